#!/usr/bin/env bash
# Run the core tests (method, backbones, experts) with the oldest and the newest diffusers that pyproject.toml allows.
#   bash scripts/test_versions.sh [pytest arguments]
# Each version is installed with what it needs into a temporary folder, in front of the launchers' environment, which
# is not changed.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
cd "$root"
export HF_HUB_OFFLINE=1
range=$(sed -n 's/^dependencies = .*"\(diffusers[^"]*\)".*/\1/p' pyproject.toml)
oldest=${range#*>=}
folder=$(mktemp -d "${TMPDIR:-/tmp}/alter-versions.XXXXXX")
trap 'rm -rf "$folder"' EXIT
# All else as it is; the hub's client is chosen to suit both diffusers and transformers.
"$python" -m pip freeze | grep -viE '^(diffusers|huggingface[_-]hub)[ =]|^-e|@' >"$folder/constraints.txt"
code=0
for wanted in "diffusers==${oldest%%,*}.*" "$range"; do
  rm -rf "$folder/packages"
  "$python" -m pip install --quiet --disable-pip-version-check --target "$folder/packages" \
    --constraint "$folder/constraints.txt" "$wanted" transformers
  export PYTHONPATH="$folder/packages"
  "$python" -c 'import diffusers, huggingface_hub as hub
print(f"== diffusers {diffusers.__version__}, huggingface_hub {hub.__version__}", flush=True)'
  "$python" -m pytest -q -m "not slow and not gpu" "$@" tests/method tests/backbones tests/experts || code=1
  unset PYTHONPATH
done
exit "$code"
