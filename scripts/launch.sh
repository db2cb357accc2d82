#!/usr/bin/env bash
# Run scripts/train.py on every GPU: directly for one process, through accelerate for several. Returns the trainer's
# exit code and forwards SIGINT, SIGTERM and SIGUSR1 to it.
#   ALTER_PROCESSES          number of processes (default: the visible GPUs, at least one)
#   ALTER_ACCELERATE_ARGS    further arguments of `accelerate launch`, for example for several nodes
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

gpus=0
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
  for device in "${visible[@]}"; do # CUDA ignores whatever follows a negative entry
    case $device in -* | NoDevFiles) break ;; *) gpus=$((gpus + 1)) ;; esac
  done
elif command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
processes=${ALTER_PROCESSES:-$gpus}
case $processes in
*[!0-9]*)
  echo "error: ALTER_PROCESSES must be a whole number, not '$processes'" >&2
  exit 2
  ;;
esac
[ "$processes" -ge 1 ] || processes=1
export ALTER_PROCESSES=$processes # --check asks whether the configuration suits this many
for argument in "$@"; do
  case $argument in --help | -h | --dry-run | --check) processes=1 ;; esac
done
if [ "$processes" -eq 1 ]; then
  exec "$python" "$root/scripts/train.py" "$@"
fi

# accelerate turns the trainer's exit code 2 into 1 and a traceback, so bad input is refused before it starts.
"$python" "$root/scripts/train.py" --check "$@"

# Nor does it pass signals on: every trainer leaves a file named by its process id here, and its exit code in it.
ALTER_STATUS_DIR=$(mktemp -d "${TMPDIR:-/tmp}/alter.XXXXXX")
export ALTER_STATUS_DIR
trap 'rm -rf "$ALTER_STATUS_DIR"' EXIT
forward() { # signal name, exit code when nothing runs yet
  signalled=1
  [ -n "${!-}" ] || exit "$2"
  local status found=
  for status in "$ALTER_STATUS_DIR"/*; do # a file with a code in it is of a trainer that has ended
    [ -e "$status" ] && [ ! -s "$status" ] && kill "-$1" "${status##*/}" 2>/dev/null && found=1
  done
  if [ -z "$found" ]; then
    early=$2
    kill -TERM "$!" 2>/dev/null || true
  fi
}
# Before accelerate starts: a signal in between would leave it behind.
trap 'forward INT 130' INT
trap 'forward TERM 143' TERM
trap 'forward USR1 138' USR1
# Not accelerate's --cpu: it starts a single process, whatever --num_processes says.
[ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true
# A process group of its own: a terminal's Ctrl-C then reaches the trainers through the trap alone, once.
# Port 0 is any free one, so that two launches on a machine do not meet.
set -m
# shellcheck disable=SC2086
"$python" -m accelerate.commands.launch --num_processes "$processes" --num_machines 1 --mixed_precision no \
  --dynamo_backend no --multi_gpu --main_process_port 0 ${ALTER_ACCELERATE_ARGS:-} "$root/scripts/train.py" "$@" &
launcher=$!
set +m
code=0
signalled=1
while [ -n "$signalled" ]; do # a trapped signal ends `wait` early
  signalled=
  wait "$launcher" && code=0 || code=$?
done
died=
for status in "$ALTER_STATUS_DIR"/*; do # still without a code: of a trainer that could not leave one
  [ ! -e "$status" ] || [ -s "$status" ] || died="$died ${status##*/}"
done
[ -z "$died" ] || echo "error: training process$died died without an exit code (killed, or out of memory): go on from the" \
  "last checkpoint with resume=latest" >&2
# shellcheck disable=SC2045
for pid in $(ls -tr "$ALTER_STATUS_DIR"); do # oldest first: the first to fail is the cause
  recorded=$(<"$ALTER_STATUS_DIR/$pid")
  [ -z "$recorded" ] || [ "$recorded" = 0 ] || exit "$recorded"
done
exit "${early:-$code}"
