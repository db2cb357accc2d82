"""What several commands share: `--config` with its overrides, paths, checks of numbers, a word before slow imports."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ..common.config import Config
from ..common.errors import InputError
from ..common.files import read_lines


def add_config(parser: argparse.ArgumentParser, meaning: str = "YAML file of the run", required: bool = True) -> None:
    """`--config`, and overrides of its keys among the other arguments."""
    parser.add_argument("--config", metavar="PATH", type=os.path.expanduser, required=required,
                        help=f"{meaning}, or the name of one that alter brings (demo_dit)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the file")


def user_path(text: str) -> Path:
    """The type of options that name a place; no shell expands the ~ of `--out=~/x`."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(os.path.expanduser(text))


def read_prompts(file: Path) -> list[str]:
    """The lines of `--prompts`; raises InputError if there are none."""
    prompts = read_lines(file, "--prompts")
    if not prompts:
        raise InputError(f"--prompts {file}: holds no prompt")
    return prompts


def refuse_dashes(words: Iterable[str]) -> None:
    """Keys of the configuration are no options.

    Raises:
        InputError: saying what to write instead of `--train.steps=10`.
    """
    sections = {field.name for field in dataclasses.fields(Config)}
    for word in words:
        text = word.lstrip("-")
        if word != text and text.partition("=")[0].partition(".")[0] in sections:
            raise InputError(f"{word}: keys of the configuration are written without dashes: write "
                             f"{text if '=' in text else f'{text}=VALUE'}")


def check_least(arguments: argparse.Namespace, least: int, *names: str) -> None:
    """Raises InputError for options with a value below `least`; those without a value pass."""
    for name in names:
        value = getattr(arguments, name.replace("-", "_"))
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise InputError(f"--{name} {number}: choose at least {least}")


def check_keep(arguments: argparse.Namespace) -> None:
    """Raises InputError unless each of `--keep` is a share."""
    for keep in arguments.keep:
        if not 0 < keep <= 1:
            raise InputError(f"--keep {keep}: choose a value in (0, 1]")


def announce_loading() -> None:
    """Say why nothing happens for the next seconds."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        print("loading torch and diffusers ...", file=sys.stderr, flush=True)
