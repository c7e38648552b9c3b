#!/bin/sh
# Every test program again, and the tool and parity, under AddressSanitizer and UndefinedBehaviorSanitizer, with gcc
# and with clang.
. tests/lib.sh
out=build/sanitize
mkdir -p $out
san="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
export ASAN_OPTIONS=allocator_may_return_null=1 # too much is refused, as malloc does
compilers=0
for cc in gcc clang; do
    command -v $cc > /dev/null || continue
    compilers=$((compilers + 1))
    # Backends take long to compile: once, where they are what is tested.
    simd=
    [ $cc = gcc ] && simd=-DDSV3_SIMD
    flags="$cc -std=c99 -D_POSIX_C_SOURCE=200809L -O1 -g $san"
    library $out "$flags $simd"
    for source in tests/test_*.c tests/parity.c examples/dsv3.c; do
        name=$(basename "$source" .c)
        case $name in test_kernels | test_ops_table | test_train | test_same_bits) with=$simd ;; *) with= ;; esac
        later "$cc build $name" $flags $with -I. -Iexamples -Itests "$source" -o $out/$name $out/libdsv3.a -lm -lpthread
    done
    run_later
    for source in tests/test_*.c; do
        name=$(basename "$source" .c)
        later "$cc run $name" $out/$name
    done
    for dir in tests/golden/* examples/models/micro; do later "$cc parity $dir" $out/parity "$dir"; done
    run_later
    for name in infer mla moe mtp train same_bits; do
        [ $cc = gcc ] && later "run $name, best backend" env TEST_BACKEND=auto $out/test_$name
    done
    run_later
    check "$cc generate" $out/dsv3 generate examples/models/austen -n 40 --stats
    check "$cc inspect" $out/dsv3 inspect examples/models/austen
    check "$cc plan" $out/dsv3 plan deepseek-v3 --type F8_E4M3
    check "$cc score" $out/dsv3 score examples/models/micro README.md
    check "$cc route" $out/dsv3 route examples/models/micro LICENSE --svg $out/a.svg --csv $out/a.csv
    check "$cc options" $out/dsv3 generate examples/models/micro -n 5 --stop zz --stop yy --logit-bias 5:1 --top-k 9
    check "$cc options of chat" sh -c "echo x | $out/dsv3 chat examples/models/micro -n 5 --stop zz"
    check "$cc wrong usage" sh -c "$out/dsv3 generate examples/models/micro --stop x --nope; test \$? = 2"
    mkdir -p $out/ends
    cp examples/models/micro/model.safetensors $out/ends
    first=$($out/dsv3 generate examples/models/micro -n 1 --temp 0 --ids)
    sed "s/\"eos_token_id\": *[0-9a-z]*/\"eos_token_id\": ${first% }/" examples/models/micro/config.json > $out/ends/config.json
    check "$cc a text that ends at once" sh -c "$out/dsv3 generate $out/ends -n 5 --temp 0 | wc -c | grep -qx ' *0'"
    check "$cc chat" sh -c "echo x | $out/dsv3 chat examples/models/micro -n 20 --mtp 3"
    rm -rf $out/run $out/fp8
    check "$cc train" $out/dsv3 train --preset micro --text LICENSE --out $out/run --steps 3 --batch 2 --seq 32
    check "$cc resume" $out/dsv3 train --resume --out $out/run --steps 4
    check "$cc convert" $out/dsv3 convert $out/run $out/fp8 --type F8_E4M3
    rm -rf $out/*
done
if [ $compilers = 2 ]; then ok; else bad "gcc and clang are both needed (make deps)"; fi
done_testing sanitize
