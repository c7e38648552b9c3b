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
run_later
# A big-endian machine: number formats, saved bytes, a checkpoint of each type against its golden file, and from files in
# blocks the text that the tool writes here. (gcc computes float in double there unless it is told not to.)
out=build/s390x
mkdir -p $out
cc="s390x-linux-gnu-gcc -std=c99 -fexcess-precision=fast -D_POSIX_C_SOURCE=200809L -O1 -static -I. -Iexamples -Itests"
if ! command -v s390x-linux-gnu-gcc > /dev/null || ! command -v qemu-s390x > /dev/null; then
    bad "s390x-linux-gnu-gcc and qemu-s390x are needed (make deps)"
    done_testing "emulated"
    exit
fi
library $out "$cc"
for source in tests/test_codecs.c tests/test_state.c tests/test_moe.c tests/test_save.c tests/parity.c; do
    name=$(basename $source .c)
    later "s390x build $name" $cc $source -o $out/$name $out/libdsv3.a -lm -lpthread
done
later "s390x build dsv3" $cc examples/dsv3.c -o $out/dsv3 -lm -lpthread
run_later
for name in codecs state moe save; do later "s390x $name" qemu-s390x $out/test_$name; done
for golden in v2 v3_bf16 v3_fp8; do later "s390x parity $golden" qemu-s390x $out/parity tests/golden/$golden; done
run_later
for type in BF16 F8_E4M3 Q8_0 Q4_0; do
    write="generate $out/$type -n 100 --temp 0 --threads 1 --backend reference"
    rm -rf $out/$type
    check "convert to $type" build/dsv3 convert examples/models/micro $out/$type --type $type
    check "$type here" sh -c "build/dsv3 $write > $out/here"
    check "$type on s390x" sh -c "qemu-s390x $out/dsv3 $write > $out/there"
    check "the same text of $type" cmp $out/here $out/there
done
rm -rf $out
done_testing "emulated"
