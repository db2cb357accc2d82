"""The console command `alter COMMAND ...`; of its commands, only the one that is asked for is imported."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.version import __version__

COMMANDS = {  # module, extra that it needs, what it does
    "train": ("train", "train", "train temporal experts, from a configuration to a run directory"),
    "sample": ("sample", "train", "draw images with a run's experts"),
    "plan": ("plan", "train", "choose steps and layers together for a budget: quality against cost"),
    "evaluate": ("evaluate", "eval", "measure images: FID, KID, precision and recall, CLIP score and more"),
    "report": ("report", "report", "show finished runs as one HTML page"),
    "measure": ("measure", "train", "measure what each layer is worth at each timestep, before training"),
    "models": ("models", "train", "list the backbones: layers, MACs, and what was verified of them"),
    "latency": ("latency", "train", "measure the seconds of each layer on this machine, for a budget of time"),
    "encode": ("encode", "train", "encode images into latents once, for training without VAE and text encoder"),
    "prepare": ("prepare", "train", "write prompts and reference images of the usual evaluation sets"),
    "convert": ("convert", "train", "convert facebookresearch/DiT's checkpoints to diffusers folders, and back"),
    "ablate": ("ablate", "train", "compare the method with its ablations, over several seeds"),
    "benchmark": ("benchmark", "train", "time experts against the dense model, in use and in training"),
    "benchmark-options": ("benchmark_options", "train", "time the trainer with and without its options of speed"),
}
HEAVY = ("evaluate", "ablate")  # their options are named after what modules that import torch define


class _Stopped(KeyboardInterrupt):
    """A signal came that means what Ctrl-C means."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: this process's arguments) asks for; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    launcher = os.environ.get("ALTER_STATUS_DIR")
    return _with_status(Path(launcher), words) if launcher else _main(words)


def _main(words: list[str]) -> int:
    if not words or words[0] not in COMMANDS:
        overview = _overview()
        overview.parse_args(words or ["--help"])  # ends the process: the list, the version, or an unknown name
        overview.error("name the command first")
    name = words[0]
    module, extra, _ = COMMANDS[name]
    debug = "--debug" in words
    try:
        if name in HEAVY:
            from .options import announce_loading

            announce_loading()
        with _stoppable() if name == "train" else contextlib.nullcontext():
            command = import_module(f".{module}", __name__)
            return command.run(_parse(name, command, words[1:])) or 0
    except Exception as error:
        if debug or not _expected(error):
            raise
        if isinstance(error, ModuleNotFoundError):
            package = str(error.name).partition(".")[0]
            print(f'error: alter {name} needs {package}: pip install "alter[{extra}]"', file=sys.stderr)
            return 2
        lines = str(error).strip().splitlines()
        if any("Traceback (most recent call last)" in line for line in lines):  # of a loader process: its last line
            lines = [lines[-1].removeprefix("alter.common.errors.InputError: ")]
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else getattr(error, "signum", -127) + 128
    except KeyboardInterrupt as stop:
        stays = "; the last checkpoint, if there is one, stays" if name == "train" else ""
        print(f"error: stopped at once{stays}", file=sys.stderr)
        return getattr(stop, "signum", signal.SIGINT) + 128


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 stop what is inside as Ctrl-C does, so that it can leave its exit code."""
    def stop(signum: int, _: Any) -> None:
        raise _Stopped(signum)

    try:
        usual = {name: signal.signal(name, stop) for name in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # not the main thread, which alone receives signals
        usual = {}
    try:
        yield
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)


def _overview() -> argparse.ArgumentParser:
    """The parser that lists the commands."""
    parser = argparse.ArgumentParser(
        "alter", description="Turn pretrained diffusion models into mixtures of temporal experts.",
        epilog="`alter COMMAND --help` says more. Try it: alter train --config demo_dit")
    parser.add_argument("--version", action="version", version=f"alter {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, _, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _parse(name: str, command: Any, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"alter {name}", description=command.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if hasattr(arguments, "overrides"):
        from .options import refuse_dashes

        refuse_dashes([*unknown, *arguments.overrides])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _expected(error: Exception) -> bool:
    """Errors whose message says it all."""
    if isinstance(error, ModuleNotFoundError):
        return error.name is not None and error.name.partition(".")[0] != "alter"
    return isinstance(error, InputError) or type(error).__name__ in ("Interrupted", "NonFiniteLoss")


def _with_status(status_dir: Path, words: list[str]) -> int:
    """Tell the launcher our process id now and our exit code at the end."""
    status = status_dir / str(os.getpid())
    status.touch()
    code = 1
    try:
        code = _main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        status.write_text(str(code))
    return code
