#!/usr/bin/env bash
# watch.sh SETTINGS [--delete-when-done NAME] [--with FOLDER]... EXPERIMENT [key.path=value]...
# Does everything for a run: creates the slice if there is none, installs, launches, and checks every
# POLL seconds. A preempted slice is deleted by its name and requested again, and the run continues: its
# folder is in the bucket. If this script is stopped (Ctrl-C) and started again, it continues to watch.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage="usage: watch.sh SETTINGS [--delete-when-done NAME] [--with FOLDER]... EXPERIMENT [key.path=value]..."
(($# >= 2)) || die "$usage"
read_settings "$1" && shift
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

# The run was told to stop and saved, or it lost another worker (134: found by JAX), whose own status says
# why. In all these cases the same command continues it.
STOPPED='75|76|134|143'
# Checks for which some workers may run on alone: jax ends them within two minutes, a save takes ten.
PATIENCE=15
costs="The slice still exists and costs money: delete.sh removes it"
launched='' said='' told='' refused=0 silent=0 failed=0 half=0 stuck=0 starts=0 preemptions=0

start_here() { # for a slice that is ACTIVE and does not run the experiment
  if install_all && launch_run "${before[@]}"; then
    launched=yes
    return
  fi
  # A preemption during these steps looks like a failed installation.
  [[ $(slice_state) == ACTIVE ]] || return 0
  starts=$((starts + 1))
  ((starts < 2)) || die "the run cannot be started on $NAME. $costs"
  say "trying once more" # after the next check, which may find it running
}

look() { # checks a slice that is ACTIVE
  local statuses summary bad alive absent
  if ! statuses=$(run_status) || [[ -z $statuses ]]; then
    silent=$((silent + 1))
    ((silent < 10)) || die "$NAME is ACTIVE, but its workers did not answer ten times in a row. $costs"
    return 0
  fi
  silent=0
  summary=$(sort <<<"$statuses" | uniq -c | sed 's/^ *//' | paste -sd, | sed 's/,/, /g')
  [[ $summary == "$told" ]] || say "$RUN: $summary"
  told=$summary
  bad=$(grep -Evcx "running|absent|exit (0|$STOPPED)" <<<"$statuses") || true
  alive=$(grep -Fcx running <<<"$statuses") || true
  absent=$(grep -Fcx absent <<<"$statuses") || true
  if ((bad)) && [[ -n $launched ]]; then
    failed=$((failed + 1))
    ((failed > 1)) || return 0 # if the cause was a preemption, the next check shows it
    on 0 tail -n 30 "selm-logs/${RUN//\//-}.log" >&2 || true
    die "$RUN failed ($summary); the end of its log is above. $costs"
  elif ((absent)) && grep -Fqx running <<<"$statuses"; then
    # It runs on some workers, which wait for the others. If seen twice, no launch is under way.
    half=$((half + 1))
    ((half > 1)) || return 0
    say "$RUN is running on some of the workers only; stopping it to start it on all"
    on all bash selm/tpu_setup/worker.sh stop "$RUN" || true # the next check finds the rest
    half=0 stuck=0
  elif grep -Fqx running <<<"$statuses" && grep -Fqvx running <<<"$statuses" && ((++stuck > PATIENCE)); then
    say "$RUN has ended on some of the workers, and is still running on others; stopping it to start it on all"
    on all bash selm/tpu_setup/worker.sh stop "$RUN" || true # by force if it is stuck
    stuck=0
  elif ((alive)); then
    ((bad)) || launched=yes failed=0
    half=0
    grep -Fqvx running <<<"$statuses" || starts=0 stuck=0
  elif ! grep -Eqvx 'exit 0' <<<"$statuses"; then
    finish
  else # new, or told to stop, or restarted, or failed before this watch began
    start_here
  fi
}

finish() {
  say "finished; the run is in $BUCKET/runs/$RUN"
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
    ((silent < 10)) || die "gcloud failed ten times in a row; its last message is above"
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
        ((status == 1 && refused < 5)) || die "$NAME was not created; the reason is above"
      else
        refused=0
      fi
      ;;
    ACTIVE) look ;;
    SUSPENDED)
      preemptions=$((preemptions + 1))
      say "preempted ($preemptions so far)"
      delete_slice || die "the preempted $NAME could not be deleted"
      launched='' told='' silent=0 failed=0 half=0 stuck=0 starts=0
      ;;
    FAILED)
      tpus queued-resources describe "$NAME" --format='yaml(state)' >&2 || true
      die "the request for $NAME failed; the reason is above. Delete it with delete.sh"
      ;;
  esac
  sleep "$POLL"
done
