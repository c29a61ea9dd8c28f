#!/usr/bin/env bash
# Measures this package and TRL's DPO on one GPU in 10 minutes, and writes a table.
#
#     benchmarks/device.sh OUT                 on a machine with a GPU
#     benchmarks/device.sh --rehearse OUT      the same on CPU with a tiny model, to try the script
#
# PYTHON has selm_jax with jax[cuda12] (default: python); TORCH_PYTHON has torch and trl (default:
# PYTHON; without them, a line of the table says that TRL was left out). Every part has a time limit
# in seconds; the limits add up to 600. A part that fails or takes too long loses only what it has
# not measured yet: results are appended to OUT/results.jsonl one by one, and OUT/table.md is made
# anew after each part. OUT/log.txt has what the parts print.
set -u

rehearse=
[ "${1:-}" = --rehearse ] && { rehearse=--rehearse; shift; }
[ $# -eq 1 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python} torch=${TORCH_PYTHON:-${PYTHON:-python}}
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
export PYTHONPATH=$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
[ -n "$rehearse" ] && export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
rm -f "$out"/{results.jsonl,work.json,table.md,log.txt}

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * patience)) began=$SECONDS status=0; shift 2
    echo "== $name, at most $limit s" | tee -a "$out/log.txt"
    timeout -k 5 "$limit" "$@" >>"$out/log.txt" 2>&1 || status=$?
    "$python" "$here/device/table.py" "$out" ended "$name" "$status" $((SECONDS - began)) "$limit"
}

ours() { part "$1" "$2" "$python" "$here/device/ours.py" $rehearse "$out" "${@:3}"; }
trl() { part "$1" "$2" "$torch" "$here/device/trl_dpo.py" "$out" "${@:3}"; }

if [ -n "$rehearse" ]; then shapes=(tiny) limits=(60) trls=(60) patience=5 # it may be a busy CPU
else patience=1 shapes=(135m 1b 8b-layers) limits=(80 90 90) trls=(40 40 40); fi

cd "$(dirname "$here")" || exit 1
ours prepare 30 prepare
for i in "${!shapes[@]}"; do ours "train ${shapes[i]}" "${limits[i]}" train "${shapes[i]}"; done
for i in "${!shapes[@]}"; do trl "TRL ${shapes[i]}" "${trls[i]}" "${shapes[i]}"; done
ours decode 110 decode "${shapes[@]}"
part tests 80 env JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" "$python" -m pytest -q -n 0 -m gpu \
    tests/models/test_accelerator.py tests/training/test_accelerator.py
cat "$out/table.md"
