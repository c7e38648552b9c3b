#!/bin/sh
# Coverage-guided fuzzing under AddressSanitizer and UndefinedBehaviorSanitizer, FUZZ_SECONDS (default 20) for each
# target, from seeds that the repository has anyway. A finding is left in build/fuzz.
. tests/lib.sh
out=build/fuzz
mkdir -p $out
if ! command -v clang > /dev/null; then
    bad "clang is needed (make deps)"
    done_testing fuzz
    exit
fi
for source in tests/fuzz/fuzz_*.c; do
    name=$(basename "$source" .c)
    mkdir -p $out/$name
    case $name in
    fuzz_json | fuzz_config) cp examples/models/austen/config.json $out/$name/austen.json
        cp tests/golden/v3/config.json $out/$name/v3.json ;;
    fuzz_safetensors) [ -f $out/$name/seed ] || head -c 4096 tests/golden/v2/golden.safetensors > $out/$name/seed ;;
    esac
    check "build $name" clang -std=c99 -O1 -g -fsanitize=fuzzer,address,undefined,float-cast-overflow \
        -fno-sanitize-recover=all "$source" -o $out/$name.bin -lm
    check "$name" $out/$name.bin -max_total_time="${FUZZ_SECONDS:-20}" -seed=1 -max_len=8192 -artifact_prefix=$out/ \
        $out/$name
done
done_testing fuzz
