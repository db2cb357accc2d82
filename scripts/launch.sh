#!/usr/bin/env bash
# Run scripts/train.py on every GPU: directly for one process, through accelerate for several. Returns the trainer's
# exit code and forwards SIGINT, SIGTERM and SIGUSR1 to it.
#   ALTER_PROCESSES          number of processes (default: the visible GPUs, at least one)
#   ALTER_ACCELERATE_ARGS    further arguments of `accelerate launch`, for example for several nodes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

gpus=0
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  gpus=${#visible[@]}
elif command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
processes=${ALTER_PROCESSES:-$gpus}
for argument in "$@"; do
  case $argument in --help | -h | --dry-run | --check) processes=1 ;; esac
done
if [ "$processes" -le 1 ]; then
  exec "$python" "$root/scripts/train.py" "$@"
fi

# accelerate turns the trainer's exit code 2 into 1 and a traceback, so bad input is refused before it starts.
ALTER_PROCESSES=$processes "$python" "$root/scripts/train.py" --check "$@"

# Nor does it pass signals on: every trainer leaves a file named by its process id here, and its exit code in it.
ALTER_STATUS_DIR=$(mktemp -d)
export ALTER_STATUS_DIR
trap 'rm -rf "$ALTER_STATUS_DIR"' EXIT
forward() {
  local pid found=
  for pid in "$ALTER_STATUS_DIR"/*; do
    [ -e "$pid" ] && kill "-$1" "$(basename "$pid")" 2>/dev/null && found=1
  done
  [ -n "$found" ] || kill -TERM "$launcher" 2>/dev/null || true
}
devices=(--cpu)
[ "$gpus" -eq 0 ] || devices=(--multi_gpu)
# A process group of its own: a terminal's Ctrl-C then reaches the trainers through the trap alone, once.
set -m
# shellcheck disable=SC2086
"$python" -m accelerate.commands.launch --num_processes "$processes" --num_machines 1 --mixed_precision no \
  --dynamo_backend no "${devices[@]}" ${ALTER_ACCELERATE_ARGS:-} "$root/scripts/train.py" "$@" &
launcher=$!
set +m
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064
  trap "forward $signal" "$signal"
done
code=0
while kill -0 "$launcher" 2>/dev/null; do # a trapped signal ends `wait` early
  wait "$launcher" && code=0 || code=$?
done
for status in "$ALTER_STATUS_DIR"/*; do
  recorded=$(cat "$status" 2>/dev/null || true)
  [ -z "$recorded" ] || [ "$recorded" = 0 ] || exit "$recorded"
done
exit "$code"
