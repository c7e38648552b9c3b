#!/bin/sh
# Coverage-guided fuzzing under AddressSanitizer and UndefinedBehaviorSanitizer, from seeds that the repository has anyway:
# a million inputs for each target, and a hundred thousand whole folders and sequences of calls. FUZZ_RUNS=1000000 is for
# each target so many; FUZZ_SECONDS=3600 instead for so long. What was found to be new stays in build/fuzz and is gone
# through again; a finding is left there, too.
. tests/lib.sh
out=build/fuzz
mkdir -p $out
if ! command -v clang > /dev/null; then
    bad "clang is needed (make deps)"
    done_testing fuzz
    exit
fi
ASAN_OPTIONS=malloc_context_size=4:quarantine_size_mb=16
export ASAN_OPTIONS
for source in tests/fuzz/fuzz_*.c; do
    name=$(basename "$source" .c)
    # Where numbers are computed, or much else is, to follow each comparison takes most of the time.
    case $name in fuzz_forward | fuzz_calls | fuzz_folder) follow=-fno-sanitize-coverage=trace-cmp ;; *) follow= ;; esac
    later "build $name" clang -std=c99 -O2 -g -fsanitize=fuzzer,address,undefined,float-cast-overflow $follow \
        -fno-sanitize-recover=all "$source" -o $out/$name.bin -lm
done
run_later
for source in tests/fuzz/fuzz_*.c; do
    name=$(basename "$source" .c)
    runs=1000000 length=2048
    mkdir -p $out/$name
    case $name in
    fuzz_json | fuzz_config) cp examples/models/austen/config.json $out/$name/austen.json
        cp tests/golden/v3/config.json $out/$name/v3.json ;;
    fuzz_safetensors) [ -f $out/$name/seed ] || head -c 2048 tests/golden/v2/golden.safetensors > $out/$name/seed ;;
    fuzz_forward) length=256 ;;
    fuzz_calls) runs=100000 length=256 ;;
    fuzz_folder) runs=100000 length=33 ;;
    esac
    limit=-runs=${FUZZ_RUNS:-$runs}
    [ -n "${FUZZ_SECONDS:-}" ] && limit=-max_total_time=$FUZZ_SECONDS
    later "$name" $out/$name.bin $limit -seed=1 -max_len=$length -entropic=0 -print_final_stats=1 \
        -artifact_prefix=$out/ $out/$name
done
run_later
done_testing fuzz
