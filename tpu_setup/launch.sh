#!/usr/bin/env bash
# launch.sh SETTINGS [--with FOLDER]... EXPERIMENT [key.path=value]...
# Starts the experiment on all workers, detached, and returns. The run folder is in the bucket, so a run
# that was there continues. --with downloads the models of another run to the workers, such as those of
# paper/zephyr_7b/warm_start.
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage="usage: launch.sh SETTINGS [--with FOLDER]... EXPERIMENT [key.path=value]..."
(($# >= 2)) || die "$usage"
read_settings "$1" && shift
before=()
while [[ ${1:-} == --with ]]; do
  [[ ${2:-} =~ ^[A-Za-z0-9_][A-Za-z0-9._/-]*$ ]] || die "--with: expected a folder below runs/"
  before+=("$2")
  shift 2
done
(($#)) || die "$usage"
read_experiment "$@"
launch_run "${before[@]}" || die "the launch of $RUN failed; the reason is above"
say "started. Its log: gcloud compute tpus tpu-vm ssh $NAME --project=$PROJECT --zone=$ZONE" \
  "--command='tail -f selm-logs/${RUN//\//-}.log'"
