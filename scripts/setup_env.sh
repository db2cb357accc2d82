# Sourced with $root set: leaves in $python an interpreter that satisfies requirements.txt. The active environment
# is used as it is when it does; otherwise <root>/.venv is made or repaired.

satisfied() { [ -x "$(command -v "$1")" ] && "$1" "$root/scripts/requirements_met.py" "$root/requirements.txt" 2>/dev/null; }

choose_python() {
  local active=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}
  [ -n "$active" ] || active=$(command -v python3 || command -v python || true)
  if [ -n "$active" ] && satisfied "$active"; then
    python=$active
    return
  fi
  python=$root/.venv/bin/python
  # One launch at a time installs; an interrupted installation is finished by the next.
  exec 9>"$root/.venv.lock"
  flock 9
  if ! satisfied "$python"; then
    local base
    base=$(command -v python3 || command -v python || true)
    if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      echo "error: no Python 3.10 or newer on PATH: install one and run again" >&2
      exit 2
    fi
    echo "installing requirements.txt into .venv (once; several GB)" >&2
    [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear "$root/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" >&2
  fi
  exec 9>&-
}

choose_python
