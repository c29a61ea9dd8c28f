#!/usr/bin/env bash
# sbatch tpu_setup/slurm.sh EXPERIMENT [key.path=value]...
# The experiment on one host with 8 GPUs, from the folder that sbatch is called in. A job that is
# preempted or out of time is put back into the queue and goes on from its run folder.
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

# SLURM tells this script (B:), which tells the run; the run saves and leaves with 75. Tokens are in the
# environment that sbatch hands on; they are no arguments.
stopped='' told=''
srun --kill-on-bad-exit=1 selm run "$@" &
run=$!
trap 'stopped=yes' TERM
wait "$run" || true
while kill -0 "$run" 2>/dev/null; do # `wait` ends at the signal, before the run does
  # Not by `kill`: srun answers TERM by killing the run. It is step 0, the job's first srun, which may
  # not have begun yet.
  if [[ -n $stopped && -z $told ]]; then
    if scancel --signal=TERM "${SLURM_JOB_ID:?}.0"; then told=yes; else sleep 5 && continue; fi
  fi
  wait "$run" || true
done
status=0
wait "$run" || status=$? # bash still knows it
if [[ -n $stopped || $status == 75 ]] && ((status)); then
  scontrol requeue "${SLURM_JOB_ID:?}"
fi
exit "$status"
