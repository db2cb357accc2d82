#!/usr/bin/env bash
# Train temporal experts of a Stable-Diffusion-2.1 backbone:  bash train_sd21.sh [--config PATH] [key.path=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in
*" --config "* | *" --config="* | *" --help "* | *" -h "*) ;;
*) set -- --config "$root/configs/sd21.yaml" "$@" ;;
esac
exec bash "$root/scripts/launch.sh" "$@"
