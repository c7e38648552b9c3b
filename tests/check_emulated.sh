#!/bin/sh
# Other CPUs than this one, emulated: without AVX2 the tool must choose the reference, with AVX2 that, and run.
. tests/lib.sh
if ! command -v qemu-x86_64 > /dev/null; then
    bad "qemu-x86_64 is needed (make deps)"
    done_testing "emulated"
    exit
fi
case $(uname -m) in x86_64) ;; *) ok; done_testing "emulated"; exit ;; esac
for pair in Nehalem:reference SandyBridge:reference Haswell:avx2; do
    cpu=${pair%:*} backend=${pair#*:}
    check "$cpu generates" qemu-x86_64 -cpu $cpu build/dsv3 generate examples/models/micro -n 8 --threads 1 --stats
    if grep -q "backend $backend," $check_output; then ok; else bad "$cpu: $(grep backend $check_output)"; fi
    for name in kernels mla moe pack; do later "$cpu $name" qemu-x86_64 -cpu $cpu build/test_$name; done
    for options in '' '--fast --packed'; do # unquoted: each a word of its own
        later "$cpu parity $options" qemu-x86_64 -cpu $cpu build/parity tests/golden/v3_fp8 $options
    done
done
for pair in Nehalem:avx2 Haswell:avx512 Haswell:avx512_bf16 Haswell:amx; do
    if qemu-x86_64 -cpu ${pair%:*} build/dsv3 generate examples/models/micro -n 1 --backend ${pair#*:} > $check_output 2>&1; then
        bad "${pair#*:} is accepted where it does not run"
    else ok; fi
done
done_testing "emulated"
