#!/bin/sh
# Each benchmark once, as briefly as it can: it runs, prints lines of key=value pairs, and refuses unknown options. What
# they measure is not looked at (make bench).
. tests/lib.sh
smoke() { # NAME OPTIONS...
    name=$1
    shift
    check "$name" build/$name --line --threads 1 "$@"
    if grep -q '[a-z_]=[0-9a-zA-Z]' $check_output; then ok; else bad "$name prints no line: $(head -n 3 $check_output)"; fi
    check "$name --help" build/$name --help
    build/$name --frobnicate > $check_output 2>&1
    if [ $? = 2 ]; then ok; else bad "$name takes --frobnicate"; fi
}
smoke bench_kernels --type BF16 --rows 1 --ms 1
smoke bench_layer --experts 16 --tokens 1 --repeat 1
smoke bench_model --shape micro --prefill 16 --decode 4 --depth 0 --repeat 1
smoke bench_modes --model examples/models/micro
smoke bench_mtp --model examples/models/micro --prompts 1 --tokens 20 --drafts 1 --repeat 1
smoke bench_scenarios --mode exact --mtp 0 --repeat 1
smoke bench_train --batch 1 --seq 32 --repeat 1
smoke bench_v2_v3 --steps 2 --batch 1 --seq 16 --seeds 1
check "a roofline picture" build/bench_model --shape micro --threads 1 --prefill 16 --decode 4 --depth 0 --repeat 1 \
    --svg build/roofline-check.svg
check "it is there" test -s build/roofline-check.svg
rm -f build/roofline-check.svg
done_testing bench
