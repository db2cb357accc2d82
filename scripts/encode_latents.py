"""Encode a configuration's images into latents, once, for training without VAE and text encoder:
`accelerate launch scripts/encode_latents.py --config configs/dit_xl2.yaml --out DIR [key.path=value ...]`.

Train from them with data.source=latents data.path=DIR. Started again with the same arguments, it goes on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alter.common.config import load_config  # noqa: E402
from alter.common.errors import InputError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="PATH", required=True, help="its data, backbone and precision are used")
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--batch", type=int, default=16, help="images at once on one process (default 16)")
    parser.add_argument("--shard-size", type=int, default=1024, help="samples of one file (default 1024)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args()
    try:
        for name, value in (("--batch", arguments.batch), ("--shard-size", arguments.shard_size)):
            if value < 1:
                raise InputError(f"{name} {value}: choose at least 1")
        _encode(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _encode(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    from alter.common.process import this_process
    from alter.data.encode import encode

    state = this_process()
    index = encode(config, Path(arguments.out), arguments.shard_size, arguments.batch, state)
    if state.is_main_process:
        print(f"{index['count'] - len(index['unreadable'])} of {index['count']} samples in {arguments.out}, "
              f"{len(index['unreadable'])} unusable (named in its index.json)")
    state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
