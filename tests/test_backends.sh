#!/bin/sh
# Every test program that computes, and parity, once more with the best SIMD backend that runs here, by name; the others
# that run here with `sh tests/test_backends.sh others` (tests/check_backends.sh). The programs alone have tested the
# reference; test_kernels, test_ops_table and test_same_bits test all backends at once.
. tests/lib.sh
here= best=
for backend in avx2 avx512 avx512_bf16 amx; do
    if ! build/parity tests/golden/v2 --backend $backend > $check_output 2>&1; then
        if grep -q 'not on this machine' $check_output; then continue; fi
    fi
    here="$here $best" best=$backend
done
[ "${1:-}" = others ] || here=$best
for backend in $here; do
    for name in arguments balance checkpoint generate infer mla model moe mtp ops router same_bits tools train; do
        later "$name, $backend" env TEST_BACKEND=$backend build/test_$name
    done
    for dir in tests/golden/* examples/models/*; do
        for options in '' --packed --fast '--fast --packed'; do # unquoted: each a word of its own
            later "parity $dir, $backend $options" build/parity "$dir" --backend $backend $options
        done
    done
    later "trajectory, $backend" build/parity tests/golden/v3 --trajectory --backend $backend
done
[ "${1:-}" = others ] && { done_testing "other backends"; exit; }
# What is not there must be refused by name, not run.
for backend in avx1024 ''; do
    if build/dsv3 generate examples/models/micro -n 1 --backend "$backend" > $check_output 2>&1; then
        bad "backend '$backend' is accepted"
    elif [ "$(wc -l < $check_output)" = 1 ]; then ok; else bad "backend '$backend': $(cat $check_output)"; fi
done
done_testing backends
