#!/bin/sh
# The training step of dsv3.h and the same one in PyTorch, in turn, and their ratio: bench/bench_train.sh [options]
# Options are those that both programs have: --preset --batch --seq --accum --threads --repeat. ROUNDS (default 3)
# says how often each runs, PYTHON which interpreter has torch. Without PyTorch the first is timed alone, status 0.
set -eu
ROUNDS=${ROUNDS:-3}
THREADS=$(nproc 2> /dev/null || echo 1)
cd "$(dirname "$0")/.."
make -s build/bench_train
for arg in "$@"; do
    if [ "$arg" = --help ]; then sed -n '2,4s/^# //p' bench/bench_train.sh; exit 0; fi
    if [ "$arg" = --threads ]; then THREADS=; fi
done
if [ -n "$THREADS" ]; then set -- "$@" --threads "$THREADS"; fi # both get as many
if [ -z "${PYTHON:-}" ]; then
    for PYTHON in python3 /usr/bin/python3; do
        if "$PYTHON" -c 'import torch' 2> /dev/null; then break; fi
    done
fi
torch=no
if "$PYTHON" -c 'import torch' 2> /dev/null; then torch=yes; fi

# The value of a key in a line of key=value pairs.
value() { printf '%s\n' "$2" | tr ' ' '\n' | sed -n "s/^$1=//p"; }

ratios=
round=1
while [ "$round" -le "$ROUNDS" ]; do
    ours=$(build/bench_train --line "$@")
    if [ "$round" = 1 ]; then
        echo "$(value preset "$ours"), $(value batch "$ours") x $(value seq "$ours") tokens," \
            "threads $(value threads "$ours")"
    fi
    if [ $torch = no ]; then
        echo "dsv3 $(value tokens_s "$ours") tokens/s"
        round=$((round + 1))
        continue
    fi
    theirs=$("$PYTHON" bench/bench_train_torch.py --line "$@")
    if [ "$(value parameters "$ours")" != "$(value parameters "$theirs")" ]; then
        echo "bench_train.sh: the models differ: $(value parameters "$ours") parameters," \
            "PyTorch's $(value parameters "$theirs")" >&2
        exit 1
    fi
    if [ "$round" = 1 ]; then
        echo "dsv3 backend $(value backend "$ours"); PyTorch $(value torch "$theirs"), $(value blas "$theirs")"
    fi
    ratio=$(awk "BEGIN { printf \"%.3f\", $(value tokens_s "$ours") / $(value tokens_s "$theirs") }")
    ratios="$ratios $ratio"
    echo "dsv3 $(value tokens_s "$ours") tokens/s, PyTorch $(value tokens_s "$theirs") tokens/s, ratio $ratio"
    round=$((round + 1))
done
if [ $torch = no ]; then
    echo "PyTorch is not installed (Debian: python3-torch): no ratio"
    exit 0
fi
printf '%s\n' $ratios | sort -n | awk '{ r[NR] = $1 }
    END { m = NR % 2 ? r[(NR + 1) / 2] : (r[NR / 2] + r[NR / 2 + 1]) / 2
          printf "ratio dsv3 / PyTorch: median %.2f (%.2f .. %.2f)\n", m, r[1], r[NR] }'
