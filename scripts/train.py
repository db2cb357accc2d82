"""Train temporal experts: `python scripts/train.py --config configs/demo_dit.yaml [key.path=value ...]`."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alter.common.config import Config, load_config, reference  # noqa: E402
from alter.common.errors import InputError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="configuration keys (set in the file, or as key.path=value):\n\n" + reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="PATH", required=True, help="YAML file, for example configs/demo_dit.yaml")
    parser.add_argument("--dry-run", action="store_true",
                        help="print sites, MACs, budget and memory, and stop; needs no weights and no network")
    parser.add_argument("--check", action="store_true", help="only validate the configuration; silent when it is fine")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        return _run(config, arguments)
    except Exception as error:
        if arguments.debug or not _expected(error):
            raise
        # A loader process hands its error over with a traceback in front; the last line is ours.
        line = str(error).strip().splitlines()[-1].removeprefix("alter.common.errors.InputError: ")
        print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else getattr(error, "signum", -127) + 128
    except KeyboardInterrupt:
        print("error: stopped at once; the last checkpoint stays", file=sys.stderr)
        return 130


def _run(config: Config, arguments: argparse.Namespace) -> int:
    if arguments.check:
        from alter.training.setup.plan import check

        check(config, int(os.environ.get("ALTER_PROCESSES", "1")))
    elif arguments.dry_run:
        from alter.training.setup.describe import describe_run

        print(describe_run(config))
    else:
        import diffusers
        import transformers

        from alter.training.run import train

        diffusers.utils.logging.disable_progress_bar()  # of loading and writing files
        transformers.utils.logging.disable_progress_bar()
        train(config)
    return 0


def _expected(error: Exception) -> bool:
    """Errors whose message says it all."""
    return isinstance(error, InputError) or type(error).__name__ in ("Interrupted", "NonFiniteLoss")


def _with_status(status_dir: Path) -> int:
    """Tell the launcher our process id now and our exit code at the end."""
    status = status_dir / str(os.getpid())
    status.touch()
    code = 1
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        status.write_text(str(code))
    return code


if __name__ == "__main__":
    launcher = os.environ.get("ALTER_STATUS_DIR")
    sys.exit(_with_status(Path(launcher)) if launcher else main())
