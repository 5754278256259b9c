#!/usr/bin/env bash
# Where alignment helps: five worlds, up to four numbers of examples, methods tuned in each world, on a CPU.
#   examples/map.sh [FOLDER]
# A world differs from that of examples/tuned.yaml in one thing: the facts that the base model has seen in the
# target languages, or the number of its experts. A quarter of all samples is in English. A second call goes on.
set -euo pipefail
out=${1:-runs/map}
recipe=$(dirname "${BASH_SOURCE[0]}")/tuned.yaml

world() { # NAME BASES "IDS..." CHANGES...: methods on all 32 ids of each task, and on fewer
    local methods='{name: sft, replay: 0.25}, {name: wide, preset: [ra-moe-wide], replay: 0.25}'
    for ids in $3; do
        methods+=", {name: sft-$ids, preset: [sft], replay: 0.25, ids-per-task: $ids}"
        methods+=", {name: wide-$ids, preset: [ra-moe-wide], replay: 0.25, ids-per-task: $ids}"
    done
    local changes=()
    for change in "${@:4}"; do changes+=(--set "$change"); done
    ramoe compare "$recipe" --bases "$2" --seeds 3 --out "$out/$1" \
        --set "methods=[$methods]" --set 'tune.methods={}' "${changes[@]}"
}

world middle 1,2 "16 8 4"
world large 1,2 "16 8 4" data.world.weight_target=0.015 \
    'data.world.target_shares={es: 0.02, tr: 0.0167, fi: 0.0133, sw: 0.01, ar: 0.0067, hi: 0.005}'
world small 1 8 data.world.weight_target=0.06 \
    'data.world.target_shares={es: 0.18, tr: 0.15, fi: 0.12, sw: 0.09, ar: 0.06, hi: 0.045}'
world experts-8 1 8 model.num-experts=8
world experts-32 1 8 model.num-experts=32
ramoe map "$out"/{middle,large,small,experts-8,experts-32} --out "$out"
