#!/usr/bin/env bash
# The denoising step on one GPU, most important first: at most ten minutes on an H200.
#
#   benchmarks/generation_step.sh FOLDER
#
# FOLDER gets generation_step.json, written after every row, and a log. As served (eager) first, then what compiling is worth, then
# 480p with all 56 blocks, which shows how well a few of them stand for all.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?give a folder}
mkdir -p "$out"
started=$(mktemp)

timeout 590 "${PYTHON:-python3}" benchmarks/generation_step.py --modes eager,compiled --whole 480p --repeats 3 --patience 15 \
  --max-minutes 8 --save 2>&1 | tee "$out/log.txt"
status=${PIPESTATUS[0]}
if [ benchmarks/results/generation_step.json -nt "$started" ]; then
  cp benchmarks/results/generation_step.json "$out/"
fi
rm -f "$started"
exit "$status"
