"""Train temporal experts: `alter train --config demo_dit [key.path=value ...]`."""

import argparse
import os

from ..common.load import load_config, reference
from .options import add_config, announce_loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "configuration keys (set in the file, or as key.path=value):\n\n" + reference()
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="print sites, MACs, budget and memory, and stop; needs no weights and no network")
    parser.add_argument("--check", action="store_true", help="only validate the configuration; silent when it is fine")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def run(arguments: argparse.Namespace) -> None:
    _let_gpu_memory_grow()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        from ..training.setup.plan import check

        check(config, int(os.environ.get("ALTER_PROCESSES", "1")))
        return
    announce_loading()
    if arguments.dry_run:
        from ..training.setup.describe import describe_run

        print(describe_run(config))
        return
    import diffusers
    import transformers

    from ..training.run import train

    diffusers.utils.logging.disable_progress_bar()  # of loading and writing files
    transformers.utils.logging.disable_progress_bar()
    train(config)


def _let_gpu_memory_grow() -> None:
    """Layers run on changing numbers of samples, whose tensors would leave gaps in a GPU's memory: torch, which is not
    imported yet, is told to grow its segments instead, unless its allocator is set already."""
    if not any(f"PYTORCH_{kind}ALLOC_CONF" in os.environ for kind in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
