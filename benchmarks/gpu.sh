#!/usr/bin/env bash
# What a machine with a GPU has to show, meant to take less than eight minutes: a converted model computes there what it computes
# on the CPU, and what alignment costs at hidden 2048, 128 experts, top-8 and 8k tokens. Tables on the screen, the
# figures as JSON in OUT.
#   benchmarks/gpu.sh                  a GPU with 80 GB
#   SHAPE=tiny benchmarks/gpu.sh       the same at a tiny shape; it runs on a CPU too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SHAPE=${SHAPE:-gpu} ROUNDS=${ROUNDS:-11} OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-.venv/bin/python}

if [ "$SHAPE" = gpu ]; then small=cpu; else small=$SHAPE; fi # the CPU computes the small model too
status=0
"$PYTHON" -m benchmarks.parity --shape "$small" --out "$OUT" || status=$?
"$PYTHON" -m benchmarks --shape "$SHAPE" --rounds "$ROUNDS" --out "$OUT"
exit $status
