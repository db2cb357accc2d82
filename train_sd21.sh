#!/usr/bin/env bash
# Train temporal experts of a Stable-Diffusion-2.1 backbone:  bash train_sd21.sh [--config PATH] [key.path=value ...]
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# The trainer takes the last --config, so that one of the user's replaces the default.
exec bash "$root/scripts/launch.sh" --config "$root/configs/sd21.yaml" "$@"
