"""Encode a configuration's images into latents, once, for training without VAE and text encoder:
`alter encode --config dit_xl2 --out DIR [key.path=value ...]`.

`accelerate launch -m alter encode ...` uses every GPU. Train from the latents with data.source=latents data.path=DIR.
Started again with the same arguments, it goes on.
"""

import argparse

from ..common.files import check_writable
from ..common.load import load_config
from .options import add_config, announce_loading, check_least, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "YAML file, whose data, backbone and precision are used")
    parser.add_argument("--out", type=user_path, metavar="DIR", required=True)
    parser.add_argument("--batch", type=int, default=16, help="images at once on one process (default 16)")
    parser.add_argument("--shard-size", type=int, default=1024, help="samples of one file (default 1024)")


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "batch", "shard-size")
    config = load_config(arguments.config, arguments.overrides)
    check_writable(arguments.out, "--out", folder=True)
    announce_loading()
    from ..common.process import this_process
    from ..data.encode import encode

    state = this_process()
    index = encode(config, arguments.out, arguments.shard_size, arguments.batch, state)
    if state.is_main_process:
        print(f"{index['count'] - len(index['unreadable'])} of {index['count']} samples in {arguments.out}, "
              f"{len(index['unreadable'])} unusable (named in its index.json)")
    state.destroy_process_group()
