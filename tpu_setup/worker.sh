#!/usr/bin/env bash
# Runs on a worker. It is part of the checkout in ~/selm; the other scripts call it.
#
#   install                     makes ~/selm.new the new ~/selm, with a virtual environment. Refused while
#                               a run is active here
#   prepare-secrets             makes an empty file for tokens that only this user may read
#   fetch RUN BUCKET            copies the models of a finished run from the bucket to runs/RUN
#   start RUN BUCKET VERB EXPERIMENT ...
#                               starts selm run or selm sweep, detached; its folder is BUCKET/runs/RUN, and
#                               its log is ~/selm-logs/RUN.log
#   stop RUN                    tells the run to save and exit, and waits for it
#   status RUN                  prints `selm-status running|exit N|absent`
set -euo pipefail
{ set +x; } 2>/dev/null
cd "$HOME"

VENV=$HOME/selm-venv
LOGS=$HOME/selm-logs
STATE=$HOME/.selm # mode 700
RUNS=$HOME/selm/runs # a link to $HOME/selm-runs, which an installation leaves alone

fail() {
  printf '%s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

# --- install ----------------------------------------------------------------------------------------

make_venv() {
  local python
  for python in python3.13 python3.12 python3.11; do
    if command -v "$python" && "$python" -m venv --clear "$VENV"; then return; fi
  done
  # The images' own Python is 3.10. uv downloads a newer one.
  python3 -m pip install --user --quiet uv
  python3 -m uv venv --clear --seed --python 3.12 "$VENV"
}

install() {
  local pid
  for pid in "$STATE"/*.run.pid; do
    if is_alive "${pid%.pid}"; then
      fail "$(basename "${pid%.run.pid}") is running here and needs its files; nothing was installed"
    fi
  done
  rm -rf selm
  mv selm.new selm
  mkdir -p "$LOGS"
  # In a separate process: inside `if`, bash would not stop at the first failure.
  if ! bash selm/tpu_setup/worker.sh install-steps "$@" >"$LOGS/install.log" 2>&1; then
    tail -n 20 "$LOGS/install.log" >&2
    fail "the installation failed; the end of ~/selm-logs/install.log is above"
  fi
  echo "$(hostname): installed"
}

install_steps() {
  mkdir -p "$HOME/selm-runs"
  ln -sfn "$HOME/selm-runs" "$RUNS"
  make_venv
  "$VENV/bin/pip" install --quiet -c "$HOME/selm/constraints.txt" "$HOME/selm[tpu,bucket]"
}

# Without what a finished run no longer needs, such as answers and checkpoints.
fetch() {
  local here=$RUNS/$1 there=$2/runs/$1 partial=$RUNS/.fetching/$1
  if [[ -d $here ]]; then
    echo "$(hostname): runs/$1 exists here"
    return
  fi
  rm -rf "$partial"
  mkdir -p "$partial" "$(dirname "$here")"
  gcloud storage rsync --recursive --exclude='.*/(responses|checkpoints)/.*' "$there" "$partial" >/dev/null ||
    fail "$there cannot be read"
  [[ -f $partial/config.yaml ]] || fail "$there is not a run folder: it has no config.yaml. If an earlier" \
    "version copied the run there, see 'Runs of earlier versions' in tpu_setup/README.md"
  mv "$partial" "$here"
  echo "$(hostname): runs/$1 copied from $there"
}

# --- the run ----------------------------------------------------------------------------------------

key() { echo "${1//\//-}"; }

is_alive() { [[ -f $1.pid ]] && kill -0 "$(<"$1.pid")" 2>/dev/null; }

# detach FILE LOG COMMAND...: starts a command in a new session; its process id is in FILE.pid.
detach() {
  local file=$1 log=$2
  shift 2
  mkdir -p "$LOGS"
  (umask 077 && mkdir -p "$STATE")
  setsid nohup "$@" >>"$log" 2>&1 </dev/null &
  echo $! >"$file.pid"
}

start() {
  local file
  file=$STATE/$(key "$1")
  if is_alive "$file.run"; then fail "$1 is running here already"; fi
  rm -f "$file.status"
  detach "$file.run" "$LOGS/$(key "$1").log" bash "$0" run "$@"
  echo "$(hostname): started"
}

run() {
  local run=$1 bucket=$2 verb=$3 experiment=$4 status=0
  local output=("output=$bucket/runs/$run")
  [[ $verb == run ]] || output=(--output "$bucket/runs/$run")
  shift 4
  if [[ -f $STATE/secrets ]]; then
    # shellcheck disable=SC1091
    source "$STATE/secrets"
    rm -f "$STATE/secrets"
  fi
  cd "$HOME/selm"
  "$VENV/bin/selm" "$verb" "$experiment" "${output[@]}" "$@" || status=$?
  echo "$status" >"$STATE/$(key "$run").status"
}

stop() {
  local file pid waited told=''
  file=$STATE/$(key "$1").run
  is_alive "$file" || return 0
  pid=$(<"$file.pid")
  for ((waited = 0; waited < 120; waited++)); do
    # Signal selm itself, once: its parent shell writes the status, and selm ends its own children.
    [[ -n $told ]] || ! pkill -TERM -P "$pid" || told=yes
    is_alive "$file" || return 0
    sleep 1
  done
  kill -KILL -- "-$pid" # its last checkpoint is complete
}

status() {
  local file
  file=$STATE/$(key "$1")
  if is_alive "$file.run"; then
    echo "selm-status running"
  elif [[ -f $file.status ]]; then
    echo "selm-status exit $(<"$file.status")"
  else
    echo "selm-status absent"
  fi
}

prepare_secrets() (
  umask 077
  mkdir -p "$STATE"
  rm -f "$STATE/secrets"
  : >"$STATE/secrets"
)

case ${1:-} in
  install | fetch | start | run | stop | status) "$@" ;;
  install-steps) shift && install_steps "$@" ;;
  prepare-secrets) prepare_secrets ;;
  *) fail "worker.sh: unknown step '${1:-}'" ;;
esac
