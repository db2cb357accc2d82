#!/usr/bin/env bash
# The console command of this checkout, in the environment that the launchers use:  bash scripts/alter.sh COMMAND ...
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m alter "$@"
