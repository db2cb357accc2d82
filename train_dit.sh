#!/usr/bin/env bash
# Train temporal experts of a DiT backbone:  bash train_dit.sh [--config PATH] [key.path=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in
*" --config "* | *" --config="* | *" --help "* | *" -h "*) ;;
*) set -- --config "$root/configs/dit_xl2.yaml" "$@" ;;
esac
exec bash "$root/scripts/launch.sh" "$@"
