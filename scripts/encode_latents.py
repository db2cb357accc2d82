"""`alter encode` of this checkout, without installing it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alter.commands import main as alter  # noqa: E402


def main() -> int:
    return alter(["encode", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
