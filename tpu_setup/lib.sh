# shellcheck shell=bash
# Functions for the other scripts: reading and checking the settings file, and calling gcloud.

set -euo pipefail
{ set +x; } 2>/dev/null # a trace would show what is sent to the workers

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE") # the checkout
TEMPORARY=$(mktemp -d)  # mode 700
trap 'rm -rf "$TEMPORARY"' EXIT

die() {
  printf 'tpu_setup: %s\n' "$*" >&2
  exit 1
}

say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*"; }

# --- settings ---------------------------------------------------------------------------------------

# Software of the TPU VM by generation (cloud.google.com/tpu/docs/runtimes).
runtime_of() {
  case "$1" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

# The file is read, never executed: lines KEY=VALUE, blank lines and comments.
read_settings() {
  [[ -f $1 ]] || die "$1: no such settings file; copy $HERE/example.env and fill it in"
  PROJECT='' ZONE='' NAME='' ACCELERATOR='' RUNTIME='' BUCKET='' CAPACITY=spot
  POLL=60
  local line key number=0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || die "$1, line $number: KEY=VALUE was expected"
    key=${BASH_REMATCH[1]}
    case $key in
      PROJECT | ZONE | NAME | ACCELERATOR | RUNTIME | BUCKET | CAPACITY | POLL)
        printf -v "$key" '%s' "${BASH_REMATCH[2]}"
        ;;
      *TOKEN* | *KEY* | *SECRET* | *PASSWORD*)
        die "$1, line $number: $key looks like a secret. Remove it from this file and export it in" \
          "your shell"
        ;;
      *) die "$1, line $number: unknown setting $key; example.env lists them all" ;;
    esac
  done <"$1"
  if [[ $ACCELERATOR == tpu7x* || $ACCELERATOR == v7* ]]; then
    die "ACCELERATOR: the Cloud TPU API does not support $ACCELERATOR; use GKE: see gke_jobset.yaml"
  fi
  local name='[a-z]([a-z0-9-]{0,46}[a-z0-9])?'
  matches PROJECT '[a-z][a-z0-9:.-]{4,61}[a-z0-9]' 'the id of a project, such as my-project-123'
  matches ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone, such as us-central1-a'
  matches NAME "$name" 'small letters, digits and hyphens, such as selm-1'
  matches ACCELERATOR '(v4|v5litepod|v5p|v6e)-[1-9][0-9]*' 'such as v5litepod-16, v5p-16 or v6e-8'
  matches BUCKET 'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*' 'gs://BUCKET or gs://BUCKET/FOLDER'
  matches CAPACITY 'spot|reserved|on-demand' 'spot, reserved or on-demand'
  matches POLL '[1-9][0-9]*' 'seconds between looks at the slice'
  RUNTIME=${RUNTIME:-$(runtime_of "$ACCELERATOR")}
  matches RUNTIME '[a-z0-9][a-z0-9.-]*' 'a TPU software version'
}

matches() {
  local value=${!1}
  [[ $value =~ ^($2)$ ]] || die "$1 is '$value'; expected $3"
}

# --- the experiment ---------------------------------------------------------------------------------

# Sets EXPERIMENT, RUN (the run's or sweep's folder below BUCKET/runs/), VERB (run, or sweep for a file with
# a grid) and OVERRIDES.
read_experiment() {
  EXPERIMENT=${1:?} && shift
  OVERRIDES=("$@")
  [[ $EXPERIMENT =~ ^[A-Za-z0-9_][A-Za-z0-9._/-]*\.yaml$ && $EXPERIMENT != *..* ]] ||
    die "'$EXPERIMENT': expected an experiment file of this checkout, such as experiments/quickstart.yaml"
  [[ -f $ROOT/$EXPERIMENT ]] || die "$ROOT/$EXPERIMENT: no such experiment file"
  VERB=run
  ! grep -Eq '^grid *:' "$ROOT/$EXPERIMENT" || VERB=sweep
  RUN=${EXPERIMENT%.yaml}
  RUN=${RUN#experiments/}
  local override
  for override in "${OVERRIDES[@]}"; do
    [[ $override =~ ^[A-Za-z_][A-Za-z0-9_.]*=[^[:cntrl:]]*$ ]] ||
      die "'$override': expected an override key.path=value"
    [[ $override != output=* ]] || die "output cannot be changed: it is $BUCKET/runs/$RUN"
  done
}

# --- gcloud -----------------------------------------------------------------------------------------

tpus() {
  local group=$1 verb=$2
  shift 2
  gcloud compute tpus "$group" "$verb" "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

# on WORKER ARGUMENT...: runs a command on one worker or on all. stdin is closed: ssh would consume it.
on() {
  local worker=$1 quoted
  shift
  printf -v quoted '%q ' "$@"
  tpus tpu-vm ssh "$NAME" --worker="$worker" --command="${quoted% }" </dev/null
}

# Retries, because a new TPU VM becomes ACTIVE some time before its ssh answers.
patiently() {
  local try
  for try in 1 2 3 4 5; do
    "$@" && return
    [[ $try == 5 ]] || sleep "$((try * POLL / 6))"
  done
  return 1
}

send() { tpus tpu-vm scp "$1" "$NAME:$2" --worker=all </dev/null; }

# The state of the queued resource; ABSENT if there is none. Fails if gcloud fails.
slice_state() {
  local answer
  if answer=$(tpus queued-resources describe "$NAME" --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif grep -Eqi 'NOT_FOUND|was not found|404' <<<"$answer"; then
    echo ABSENT
  else
    printf '%s\n' "$answer" >&2
    return 1
  fi
}

# --- steps that the scripts and watch.sh share ------------------------------------------------------

# Status 2: a retry would not help.
create_slice() {
  local capacity=() answer
  case $CAPACITY in
    spot) capacity=(--spot) ;;
    reserved) capacity=(--reserved) ;;
  esac
  say "requesting $NAME: $ACCELERATOR, $CAPACITY, $RUNTIME, in $ZONE"
  if answer=$(tpus queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
    --scopes=https://www.googleapis.com/auth/cloud-platform "${capacity[@]}" 2>&1); then
    return
  fi
  printf '%s\n' "$answer" >&2
  if grep -Eqi 'quota' <<<"$answer"; then
    say "refused: no quota for $ACCELERATOR ($CAPACITY) in $ZONE. Request it (README.md, 'Quota'), or try" \
      "another ZONE or CAPACITY" >&2
    return 2
  fi
  ! grep -q 'ALREADY_EXISTS' <<<"$answer" || return 0
  ! grep -Eq 'PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED' <<<"$answer" || return 2
  return 1
}

delete_slice() {
  say "deleting $NAME"
  tpus queued-resources delete "$NAME" --force
}

# Files that may contain a token; .dockerignore and .gitignore have the same list.
is_private() {
  case "${1##*/}" in
    example.env) return 1 ;;
    .env* | *.env | *token | *TOKEN | *token.txt | *tokens.txt | *secret*.txt | .netrc | *.pem | *credentials*.json) ;;
    *) return 1 ;;
  esac
}

# Packs the checkout, including files that git does not track yet, without ignored ones.
pack() {
  if git -C "$ROOT" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git -C "$ROOT" ls-files -z --cached --others --exclude-standard
  else
    (cd "$ROOT" && find . -type f -not -path './.*' -not -path './runs/*' -print0)
  fi | (cd "$ROOT" && while IFS= read -r -d '' file; do
    if [[ -f $file && $file != runs/* ]] && ! is_private "$file"; then printf '%s\0' "$file"; fi
  done) >"$TEMPORARY/files" && tar -C "$ROOT" --null -T "$TEMPORARY/files" -czf "$1"
}

install_all() {
  pack "$TEMPORARY/selm.tgz" || return 1
  say "sending the checkout to all workers of $NAME"
  patiently send "$TEMPORARY/selm.tgz" selm.tgz || {
    say "$NAME: not all workers can be reached by ssh" >&2
    return 1
  }
  say "installing"
  # The scripts are in the checkout, so this first step is spelled out here. It replaces nothing yet,
  # because a run may be active.
  local unpack="rm -rf selm.new && mkdir selm.new && tar -xzf selm.tgz -C selm.new && bash selm.new/tpu_setup/worker.sh install"
  if ! tpus tpu-vm ssh "$NAME" --worker=all --command="$unpack" </dev/null; then
    say "the installation failed on at least one worker; the end of its log is above, with its host name" >&2
    return 1
  fi
}

# Sends tokens by scp, in a file that only its owner may read, and never as an argument.
send_secrets() {
  local key sent=() file=$TEMPORARY/secrets
  rm -f "$file"
  (umask 077 && : >"$file")
  for key in HF_TOKEN WANDB_API_KEY; do
    if [[ -n ${!key:-} ]]; then
      printf 'export %s=%q\n' "$key" "${!key}" >>"$file"
      sent+=("$key")
    fi
  done
  if ((${#sent[@]} == 0)); then return 0; fi
  say "sending ${sent[*]}"
  on all bash selm/tpu_setup/worker.sh prepare-secrets && send "$file" .selm/secrets && rm -f "$file"
}

# launch_run [FOLDER...]: starts RUN on all workers; FOLDERs are finished runs that it starts from.
launch_run() {
  local run
  for run in "$@"; do
    on all bash selm/tpu_setup/worker.sh fetch "$run" "$BUCKET" || return 1
  done
  send_secrets || return 1
  say "starting: selm $VERB $EXPERIMENT ${OVERRIDES[*]}, in $BUCKET/runs/$RUN"
  on all bash selm/tpu_setup/worker.sh start "$RUN" "$BUCKET" "$VERB" "$EXPERIMENT" "${OVERRIDES[@]}"
}

# The state of RUN on each worker, one per line: `running`, `exit STATUS` or `absent`. Fails if a worker
# cannot be reached.
run_status() {
  local answer script=selm/tpu_setup/worker.sh
  local ask="if [ -f $script ]; then bash $script status $RUN; else echo selm-status absent; fi"
  answer=$(tpus tpu-vm ssh "$NAME" --worker=all --command="$ask" </dev/null 2>/dev/null) || return 1
  sed -n 's/^selm-status //p' <<<"$answer"
}
