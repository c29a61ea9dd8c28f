#!/usr/bin/env bash
# Runs on a worker. It is part of the checkout in ~/selm; the other scripts call it.
#
#   install [SHARED]            makes ~/selm.new the new ~/selm, with a virtual environment; runs/ is on
#                               this disk or on a share. Refused while a run is active here
#   prepare-secrets             makes an empty file for tokens that only this user may read
#   check-bucket RUN BUCKET     checks that the bucket is writable: writes the time into runs/RUN/started
#   restore RUN BUCKET          copies runs/RUN from the bucket, unless it exists here
#   start RUN EXPERIMENT ...    starts selm run, detached; its log is ~/selm-logs/RUN.log
#   stop RUN                    tells the run to save and exit, and waits for it
#   copy RUN BUCKET SECONDS     copies runs/RUN to the bucket every SECONDS, and once more at its end. May
#                               be called at any time; prints `selm-copy done` after the last copy
#   status RUN                  prints `selm-status running|copying|exit N|absent`
set -euo pipefail
{ set +x; } 2>/dev/null
cd "$HOME"

VENV=$HOME/selm-venv
LOGS=$HOME/selm-logs
STATE=$HOME/.selm # mode 700
RUNS=$HOME/selm/runs # a link to $HOME/selm-runs, or to the share
SHARE=$HOME/selm-share

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

apt() { sudo apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }

mount_share() {
  local try
  if mountpoint -q "$SHARE"; then return; fi
  # A new machine runs updates of its own. apt waits for dpkg's lock, but not for the lock of its lists.
  for try in 1 2 3 4 5 6; do
    if apt update; then break; fi
    [[ $try == 6 ]] || sleep 20
  done
  apt install -y nfs-common
  mkdir -p "$SHARE"
  sudo mount -t nfs "$1" "$SHARE"
  sudo chmod 1777 "$SHARE"
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
  local target=$HOME/selm-runs
  if [[ -n ${1:-} ]]; then
    mount_share "$1"
    target=$SHARE
  fi
  mkdir -p "$target"
  ln -sfn "$target" "$RUNS"
  make_venv
  "$VENV/bin/pip" install --quiet -c "$HOME/selm/constraints.txt" "$HOME/selm[tpu]"
}

# --- the bucket -------------------------------------------------------------------------------------

# BUCKET/runs/RUN has two folders, a and b, and a file `latest` with the name of the complete one. A copy
# is written into the other one, and `latest` is changed when it is complete: so one is always complete.
latest() {
  local answer
  if answer=$(gcloud storage cat "$1/latest" 2>&1); then
    [[ $answer == [ab] ]] || return 1
    echo "$answer"
  elif ! grep -q 'matched no objects' <<<"$answer"; then
    # Only this message means that there is no copy. After any other error a new run would eventually
    # overwrite the copy in the bucket.
    printf '%s\n' "$answer" >&2
    return 1
  fi
}

check_bucket() {
  date -u +%FT%TZ | gcloud storage cp - "$2/runs/$1/started" ||
    fail "$2 cannot be written to by this machine's service account (README.md, 'The bucket')"
}

restore() {
  local here=$RUNS/$1 there=$2/runs/$1 slot partial
  if [[ -d $here ]]; then
    echo "$(hostname): runs/$1 exists here"
    return
  fi
  slot=$(latest "$there") || fail "$there cannot be read"
  if [[ -z $slot ]]; then
    echo "$(hostname): $there has nothing yet"
    return
  fi
  partial=$RUNS/.restoring/$1
  rm -rf "$partial"
  mkdir -p "$partial" "$(dirname "$here")"
  gcloud storage rsync --recursive "$there/$slot" "$partial" >/dev/null || fail "$there/$slot was not copied"
  mv "$partial" "$here"
  echo "$(hostname): runs/$1 copied from $there/$slot"
}

# stage.json is copied first: files of stages that it marks as done were complete before. Then hard links
# are made, which takes no time or space: the run replaces its files and never writes into them.
snapshot() {
  local here=$1 into=$2 stages=$2.stages
  rm -rf "$into" "$stages"
  mkdir -p "$into" "$stages"
  (cd "$here" && find . -name stage.json -exec cp --parents -p {} "$stages" \;) || return 1
  cp -al "$here/." "$into/" || return 1 # a file was removed meanwhile: try again later
  find "$into" \( -name '*.selm-partial' -o -name '*.orbax-checkpoint-tmp*' -o -name '.lock*' \) \
    -prune -exec rm -rf {} + || return 1
  cp -a --remove-destination "$stages/." "$into/" || return 1
  rm -rf "$stages"
}

copy_once() {
  local run=$1 there=$2/runs/$1 slot
  [[ -d $RUNS/ ]] || return 1 # it is being installed again
  [[ -d $RUNS/$run ]] || return 0
  snapshot "$RUNS/$run" "$RUNS/.snapshots/$run" || return 1
  slot=$(latest "$there") || return 1
  if [[ $slot == a ]]; then slot=b; else slot=a; fi
  gcloud storage rsync --recursive --delete-unmatched-destination-objects \
    "$RUNS/.snapshots/$run" "$there/$slot" >/dev/null || return 1
  printf '%s' "$slot" | gcloud storage cp - "$there/latest" || return 1
  echo "$(date -u +%FT%TZ) copied to $there/$slot"
}

copier() {
  local run=$1 bucket=$2 every=$3 waited file
  file=$STATE/$(key "$run")
  while :; do
    while is_alive "$file.run"; do
      for ((waited = 0; waited < every; waited++)); do
        is_alive "$file.run" || break
        sleep 1
      done
      copy_once "$run" "$bucket" || echo "$(date -u +%FT%TZ) not copied; again in $every s"
    done
    touch "$file.ended" # the run has ended, and the last copy begins
    until copy_once "$run" "$bucket"; do sleep "$every"; done
    is_alive "$file.run" || break # it was started again meanwhile
  done
  mv "$file.ended" "$file.copied"
}

# Succeeds if the last copy began after the run's end.
is_copied() { [[ $1.copied -nt $1.status ]] && ! is_alive "$1.run"; }

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
  if is_alive "$file.run"; then fail "runs/$1 is running here already"; fi
  rm -f "$file.status" "$file.copied"
  detach "$file.run" "$LOGS/$(key "$1").log" bash "$0" run "$@"
  echo "$(hostname): started"
}

run() {
  local run=$1 experiment=$2 status=0
  shift 2
  if [[ -f $STATE/secrets ]]; then
    # shellcheck disable=SC1091
    source "$STATE/secrets"
    rm -f "$STATE/secrets"
  fi
  cd "$HOME/selm"
  "$VENV/bin/selm" run "$experiment" "output=runs/$run" "$@" || status=$?
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

copy() {
  local file
  file=$STATE/$(key "$1")
  if is_alive "$file.copy"; then return; fi
  if is_copied "$file"; then
    echo "selm-copy done"
    return
  fi
  detach "$file.copy" "$LOGS/$(key "$1").copy.log" bash "$0" copier "$@"
}

status() {
  local file
  file=$STATE/$(key "$1")
  if is_alive "$file.run"; then
    echo "selm-status running"
  elif is_alive "$file.copy"; then
    echo "selm-status copying"
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
  install | restore | start | run | stop | copy | copier | status) "$@" ;;
  install-steps) shift && install_steps "$@" ;;
  check-bucket) shift && check_bucket "$@" ;;
  prepare-secrets) prepare_secrets ;;
  *) fail "worker.sh: unknown step '${1:-}'" ;;
esac
