#!/usr/bin/env bash
# sbatch tpu_setup/slurm.sh EXPERIMENT [key.path=value]...
# Runs the experiment, or the sweep of a file with a grid, on one host with 8 GPUs, in the folder in which
# sbatch was called; `sbatch --nodes=4` takes four hosts. A job that is preempted or out of time, or that has
# lost a host, is put back into the queue and continues from its run folder.
#SBATCH --job-name=selm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --output=selm-%j.log

set -euo pipefail
(($#)) || {
  echo "usage: sbatch slurm.sh EXPERIMENT [key.path=value]..." >&2
  exit 1
}
cd "${SLURM_SUBMIT_DIR:?started by sbatch}"
if [[ -f .venv/bin/activate ]]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

verb=run
! grep -Eqs '^grid *:' "$1" || verb=sweep
said=$(mktemp)
trap 'rm -f "$said"' EXIT

# What srun says of its tasks is kept, because its status is only the highest of theirs.
tasks() {
  { srun --kill-on-bad-exit=1 selm "$verb" "$@" 2>&1 1>&3 | tee "$said" >&2; } 3>&1
}

# SLURM signals this script (B:), which signals the run; the run saves and exits with 75. Tokens are
# passed by sbatch in the environment, not as arguments.
stopped='' told=''
tasks "$@" &
run=$!
trap 'stopped=yes' TERM
wait "$run" || true
while kill -0 "$run" 2>/dev/null; do # `wait` ends at the signal, before the run does
  # Not with `kill`: on TERM srun would kill the run. The run is step 0 (the job's first srun), which may
  # not have started yet.
  if [[ -n $stopped && -z $told ]]; then
    if scancel --signal=TERM "${SLURM_JOB_ID:?}.0"; then told=yes; else sleep 5 && continue; fi
  fi
  wait "$run" || true
done
status=0
wait "$run" || status=$? # bash still knows it
again=''
case $status in
  75) again=yes ;; # told to stop
  # A task was killed, or another one of the run is gone or stuck. What kills it every time, such as too little
  # memory, must not do so for ever.
  76 | 134 | 137 | 143) ((${SLURM_RESTART_COUNT:-0} >= 20)) || again=yes ;;
esac
# When one task fails, srun kills the others, and reports these. It would only fail again.
! grep -Eq 'tasks? [0-9,-]+: Exited with exit code [12]$' "$said" || again=''
[[ -z $stopped ]] || again=yes
if [[ -n $again ]] && ((status)); then
  scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$status"
