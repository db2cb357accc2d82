#!/usr/bin/env bash
# Set up like the launchers, then lint, type-check and test.
#   bash scripts/test.sh [--slow] [pytest arguments]      --slow adds the tests that take minutes
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
cd "$root"
export HF_HUB_OFFLINE=1
chosen="not slow and not gpu"
workers=$(getconf _NPROCESSORS_ONLN)
if [ "${1:-}" = --slow ]; then
  chosen="not gpu"
  workers=0 # some start four processes, which would wait for each other's cores
  shift
fi
code=0
"$python" -m ruff check alter scripts tests || code=1
"$python" -m mypy || code=1
# Tests use one thread each; those that start processes of their own are a small part.
"$python" -m pytest -m "$chosen" -n "$workers" --maxprocesses 8 --dist worksteal "$@" || code=$?
exit "$code"
