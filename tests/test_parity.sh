#!/bin/sh
# Equal to the official model: every golden checkpoint and both trained models, see parity.c.
. tests/lib.sh
for dir in tests/golden/v2 tests/golden/v3 tests/golden/v3_bf16 tests/golden/v3_fp8 tests/golden/v3_noqlora \
    examples/models/micro examples/models/austen; do
    for threads in 1 2; do
        check "$dir, $threads threads" build/parity "$dir" --threads $threads
    done
done
for threads in 1 2; do check "trajectory, $threads threads" build/parity tests/golden/v3 --trajectory --threads $threads; done
for options in --packed --fast '--fast --packed'; do
    check "$options" build/parity tests/golden/v3_fp8 $options
done
# The check can fail: a golden file of another model, and a damaged one.
mkdir -p build/parity-bad
cp tests/golden/v3/config.json tests/golden/v3/model.safetensors build/parity-bad/
cp tests/golden/v3_noqlora/golden.safetensors build/parity-bad/
if build/parity build/parity-bad > /dev/null 2>&1; then bad "parity accepts another model's golden file"; else ok; fi
cp tests/golden/v3_noqlora/config.json tests/golden/v3_noqlora/model.safetensors tests/golden/v3/traj.safetensors \
    build/parity-bad/
if build/parity build/parity-bad --trajectory > /dev/null 2>&1; then bad "parity accepts another model's trajectory"; else ok; fi
cp tests/golden/v3/config.json tests/golden/v3/model.safetensors build/parity-bad/
# What --dump writes is a file under the golden file's names, with everything in it.
check "dump" build/parity tests/golden/v3 --dump build/parity-bad/dump.safetensors
names() { build/dsv3 inspect "$1" | sed -n 's/^\([a-z][^ ]*\)  *[FI]32 .*/\1/p' | grep -v '^tokens$' | sort; }
names tests/golden/v3/golden.safetensors > build/parity-bad/want
names build/parity-bad/dump.safetensors > build/parity-bad/found
check "dump has all names" test -z "$(comm -23 build/parity-bad/want build/parity-bad/found)"
check "names" grep -q '^grad.model.layers.4.eh_proj.weight$' build/parity-bad/found
check "dump is readable" build/dsv3 inspect build/parity-bad/dump.safetensors
check "dump holds gradients" sh -c 'build/dsv3 inspect build/parity-bad/dump.safetensors | grep -q grad.lm_head.weight'
check "dump of a trajectory" build/parity tests/golden/v3 --trajectory --dump build/parity-bad/dump.safetensors
check "dump holds weights" sh -c 'build/dsv3 inspect build/parity-bad/dump.safetensors | grep -q final.lm_head.weight'
# A golden file with nothing to compare is no agreement. (Its header: 64 bytes.)
printf '\100\0\0\0\0\0\0\0%-64s\1\0\0\0\2\0\0\0' '{"tokens":{"dtype":"I32","shape":[1,2],"data_offsets":[0,8]}}' \
    > build/parity-bad/golden.safetensors
if build/parity build/parity-bad > build/parity-bad/said 2>&1; then bad "parity accepts an empty comparison"; else ok; fi
check "it says why" grep -q 'nothing to compare' build/parity-bad/said
rm -rf build/parity-bad
done_testing parity
