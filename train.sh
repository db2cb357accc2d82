#!/usr/bin/env bash
# Train temporal experts of any backbone:  bash train.sh --config configs/flux.yaml [key.path=value ...]
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec bash "$root/scripts/launch.sh" "$@"
