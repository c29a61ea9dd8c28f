#!/usr/bin/env bash
# watch.sh SETTINGS [--delete-when-done NAME] [--with FOLDER]... EXPERIMENT [key.path=value]...
# From nothing to a finished run: creates the slice if there is none, installs, launches, and looks
# every POLL seconds. A preempted slice is deleted by its name, asked for again, and the run goes on
# from the bucket. Stopped itself (Ctrl-C) and started again, it goes on watching.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage="usage: watch.sh SETTINGS [--delete-when-done NAME] [--with FOLDER]... EXPERIMENT [key.path=value]..."
(($# >= 2)) || die "$usage"
read_settings "$1" && shift
check_share
before=() delete=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --with)
      [[ ${2:-} =~ ^[A-Za-z0-9_][A-Za-z0-9._/-]*$ ]] || die "--with: expected a folder below runs/"
      before+=("$2")
      ;;
    --delete-when-done)
      [[ ${2:-} == "$NAME" ]] || die "--delete-when-done: expected the name of the slice, $NAME"
      delete=yes
      ;;
    *) die "$usage" ;;
  esac
  shift 2
done
(($#)) || die "$usage"
read_experiment "$@"

# Told to stop, saved, and left; or left behind by another worker (134: by jax's own watch), which says itself
# why it ended. The same command goes on.
STOPPED='75|76|134|143'
costs="The slice is still there, and costs: delete.sh removes it"
launched='' said='' told='' refused=0 silent=0 failed=0 half=0 starts=0 preemptions=0

start_here() { # a slice that is ACTIVE and does not run it
  if install_all && launch_run "${before[@]}"; then
    launched=yes
    return
  fi
  # A slice that is preempted meanwhile looks like a failed installation.
  [[ $(slice_state) == ACTIVE ]] || return 0
  starts=$((starts + 1))
  ((starts < 2)) || die "it cannot be started on $NAME. $costs"
  say "once more" # at the next look, which shows how far it came: it may be running
}

look() { # a slice that is ACTIVE
  local statuses summary bad alive absent copied=''
  if ! statuses=$(run_status) || [[ -z $statuses ]]; then
    silent=$((silent + 1))
    ((silent < 10)) || die "$NAME is ACTIVE, but its workers have not answered ten times. $costs"
    return 0
  fi
  silent=0
  summary=$(sort <<<"$statuses" | uniq -c | sed 's/^ *//' | paste -sd, | sed 's/,/, /g')
  [[ $summary == "$told" ]] || say "$RUN: $summary"
  told=$summary
  bad=$(grep -Evcx "running|copying|absent|exit (0|$STOPPED)" <<<"$statuses") || true
  alive=$(grep -Ecx 'running|copying' <<<"$statuses") || true
  absent=$(grep -Fcx absent <<<"$statuses") || true
  # Whoever started it: the launch may have broken off before the copying began, or that was killed.
  if grep -Fqvx absent <<<"$statuses" && see_to_copy; then copied=yes; fi
  if ((bad)) && [[ -n $launched ]]; then
    failed=$((failed + 1))
    ((failed > 1)) || return 0 # one look later, a slice that was preempted says so
    on 0 tail -n 30 "selm-logs/${RUN//\//-}.log" >&2 || true
    die "$RUN failed ($summary); the end of its log is above. $costs"
  elif ((absent)) && grep -Fqx running <<<"$statuses"; then
    # Started on some workers: they wait for the others. Seen twice, it is no launch under way.
    half=$((half + 1))
    ((half > 1)) || return 0
    say "$RUN is running on some of the workers only; it is stopped, and started on all"
    on all bash selm/tpu_setup/worker.sh stop "$RUN" || true # what is left is seen at the next look
    half=0
  elif ((alive)); then
    # One that failed before this watch began, and is still copied, is waited for and started anew.
    ((bad)) || launched=yes failed=0
    half=0
    grep -Fqvx running <<<"$statuses" || starts=0
  elif [[ -z $copied ]] && grep -q '^exit' <<<"$statuses"; then
    return 0 # its end is not in the bucket yet; that is being done
  elif ! grep -Eqvx 'exit 0' <<<"$statuses"; then
    finish
  else # new, or told to stop, or restarted, or failed before this watch began
    start_here
  fi
}

finish() {
  say "finished; the run is in $BUCKET/runs/$RUN, the folder that its file \`latest\` names"
  if [[ -n $delete ]]; then
    delete_slice
  else
    say "$costs"
  fi
  exit 0
}

while :; do
  if ! state=$(slice_state); then
    silent=$((silent + 1))
    ((silent < 10)) || die "gcloud has not answered ten times"
    sleep "$POLL"
    continue
  fi
  [[ $state == "$said" ]] || say "$NAME: $state"
  said=$state
  case $state in
    ABSENT)
      status=0
      create_slice || status=$?
      if ((status)); then
        refused=$((refused + 1))
        ((status == 1 && refused < 5)) || die "$NAME was not created"
      else
        refused=0
      fi
      ;;
    ACTIVE) look ;;
    SUSPENDED)
      preemptions=$((preemptions + 1))
      say "preempted ($preemptions so far)"
      delete_slice || die "the preempted $NAME could not be deleted"
      launched='' told='' silent=0 failed=0 half=0 starts=0
      ;;
    FAILED)
      tpus queued-resources describe "$NAME" --format='yaml(state)' >&2 || true
      die "the request for $NAME failed, as told above; delete.sh removes it"
      ;;
  esac
  sleep "$POLL"
done
