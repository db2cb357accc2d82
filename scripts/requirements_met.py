"""Exit 0 if this Python satisfies a requirements file, else 1, naming what is missing on stderr."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement


def missing(text: str) -> list[str]:
    """The requirements in `text` that the running interpreter does not satisfy."""
    found = []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except (PackageNotFoundError, KeyError):
            installed = None
        if not installed:  # also without metadata, as an interrupted installation leaves it
            found.append(line)
        elif not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{line} (found {installed})")
    return found


if __name__ == "__main__":
    unmet = missing(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if unmet:
        print("missing: " + ", ".join(unmet), file=sys.stderr)
    sys.exit(bool(unmet))
