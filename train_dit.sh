#!/usr/bin/env bash
# Train temporal experts of a DiT backbone:  bash train_dit.sh [--config PATH] [key.path=value ...]
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# The trainer takes the last --config, so that one of the user's replaces the default.
exec bash "$root/scripts/launch.sh" --config "$root/configs/dit_xl2.yaml" "$@"
