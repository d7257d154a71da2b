#!/usr/bin/env bash
# The training step on one GPU, most important first: about ten minutes on an H200, and the rest of the options with `all`.
#
#   benchmarks/training_step.sh FOLDER [all]
#
# FOLDER gets training_step.json (and training_step_options.json), written after every row, a log, and traces of the steps with
# offloading. A case that fails or takes too long does not cost the others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?give a folder}
python=${PYTHON:-python3}
mkdir -p "$out"

file=training_step.json
measure() {
  local limit_s=$1
  shift
  timeout "$limit_s" "$python" training/bench.py --output "$out/$file" "$@" 2>&1 | tee -a "$out/log.txt"
}

measure 185 --cases 720p --blocks 1,2 --options attention,offload --repeats 2 --max-minutes 2.1 --trace "$out/traces"
measure 120 --cases 480p --blocks 2,5 --options attention,offload,checkpointing --repeats 3 --max-minutes 1.5 --trace "$out/traces"
measure 180 --cases 1080p --blocks 2,5 --options windows,attention --repeats 1 --max-minutes 1.8
measure 105 --cases 192p --blocks 2,5 --options attention --repeats 3 --max-minutes 1.1
if [ "${2:-}" = all ]; then
  file=training_step_options.json
  measure 240 --cases 480p --blocks 2,5 --repeats 3 --max-minutes 3.3
  measure 220 --cases 192p --blocks 2,5 --repeats 3 --max-minutes 3.0
  measure 130 --cases 720p --blocks 1,2 --options checkpointing,compile --repeats 1 --max-minutes 1.6
fi
