"""`python -m alter`: the console command."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
