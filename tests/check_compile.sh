#!/bin/sh
# The compile matrix: every unit of tests/compile with gcc and clang, in C99, C11, GNU C99 and C++11, at several
# levels of optimisation, with and without OpenMP, at the wide set as errors. Every program, too.
. tests/lib.sh
out=build/matrix
mkdir -p $out
wide="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wcast-qual -Wcast-align -Wvla -Wdouble-promotion
 -Wfloat-equal -Wundef -Wformat=2 -Wnull-dereference -Werror"
c="-Wstrict-prototypes -Wmissing-prototypes"
compilers=0
for cc in gcc clang; do
    command -v $cc > /dev/null || continue
    compilers=$((compilers + 1))
    for unit in use implement main static static_twice simd; do
        later "$cc -std=c99 -O2 $unit" $cc -std=c99 -O2 $wide $c -I. -c tests/compile/$unit.c -o /dev/null
        later "$cc -std=c++11 -O2 $unit" $cc -x c++ -std=c++11 -O2 $wide -I. -c tests/compile/$unit.c -o /dev/null
        for std in c11 c17 gnu99 gnu11; do # a standard changes what is parsed, not what is optimised
            later "$cc -std=$std $unit" $cc -std=$std -O0 $wide $c -I. -c tests/compile/$unit.c -o /dev/null
        done
        for std in c++17 c++20; do
            later "$cc -std=$std $unit" $cc -x c++ -std=$std -O0 $wide -I. -c tests/compile/$unit.c -o /dev/null
        done
    done
    for flags in -O0 -Os -O3 "-O2 -fopenmp" "-O2 -fshort-enums" "-O2 -funsigned-char" "-O2 -march=native" \
        "-O2 -DDSV3_NO_OPENMP -fopenmp" "-O2 -DDSV3_NO_AMX" "-O2 -fvisibility=hidden -fPIC"; do
        later "$cc $flags" $cc -std=c99 $flags $wide $c -I. -c tests/compile/implement.c -o /dev/null
    done
    for unit in implement simd; do
        later "$cc $unit without training" $cc -std=c99 -O2 $wide $c -DDSV3_NO_TRAINING -I. -c tests/compile/$unit.c \
            -o $out/inference-$cc-$unit.o
    done
    for level in -O0 -O1 -Os; do
        later "$cc $level, backends" $cc -std=c99 $level $wide $c -I. -c tests/compile/simd.c -o /dev/null
    done
    for file in examples/*.c bench/*.c tests/*.c; do
        [ $file = tests/test_no_double.c ] && continue # where double is float, constants lose digits on purpose
        later "$cc $file" $cc -std=c99 -D_POSIX_C_SOURCE=200809L -O1 $wide $c -Wno-float-equal -Wno-double-promotion -I. -Iexamples -Itests \
            -Ibench -c "$file" -o /dev/null
    done
    for header in json safetensors checkpoint svg thread_pool large_pages; do
        upper=$(echo ${header%_pool} | tr a-z A-Z | sed 's/^THREAD$/THREADS/')
        printf '#define DSV3_IMPLEMENTATION\n#define %s_IMPLEMENTATION\n#include "%s.h"\n' $upper $header > $out/$header.c
        later "$cc $header.h alone, C99" $cc -std=c99 -O2 $wide $c -Iexamples -c $out/$header.c -o /dev/null
        later "$cc $header.h alone, C++11" $cc -x c++ -std=c++11 -O2 $wide -Iexamples -c $out/$header.c -o /dev/null
    done
done
# Types and constants alone: clean without DSV3_STATIC; with it what is told is that functions have no body, and nothing else.
printf '#include "dsv3.h"\nint vocab(void);\nint vocab(void) { return DSV3_MAX_VOCAB; }\n' > $out/types.c
for compiler in "gcc -std=c99" "g++ -x c++ -std=c++17" "clang -std=c99" "clang++ -x c++ -std=c++17"; do
    later "$compiler, types alone" $compiler $wide -Wunused -I. -c $out/types.c -o /dev/null
    later "$compiler, types alone, static" $compiler $wide -Wno-unused-function -DDSV3_STATIC -I. -c $out/types.c -o /dev/null
done
if [ $compilers = 2 ]; then ok; else bad "gcc and clang are both needed (make deps)"; fi
run_later
for object in $out/inference-*.o; do
    training $object > $out/training
    if [ -s $out/training ]; then bad "training is left in $object: $(tr '\n' ' ' < $out/training)"; else ok; fi
done
# clang says nothing of some settings of fast math: sums keep their order all the same, the engine's too.
for unit in implement simd; do
    for flags in -funsafe-math-optimizations "-fassociative-math -fno-signed-zeros -fno-trapping-math"; do
        code=$out/$unit${flags%% *}.ll
        later "clang $flags, $unit.c: sums in order" sh -c "clang -std=c99 -O2 $flags -S -emit-llvm -I. tests/compile/$unit.c -o $code &&
            grep -q ' fadd ' $code && ! grep -E ' f(add|sub) reassoc ' $code"
    done
done
run_later
# And where a compiler that reorders is neither noticed nor told, dsv3_context_init finds out.
mkdir -p $out/untold
sed '/pragma clang fp/d' dsv3.h > $out/untold/dsv3.h
for flags in -O2 "-O2 -funsafe-math-optimizations"; do # unquoted: each a word of its own
    check "clang, untold, $flags" clang -std=c99 $flags -I$out/untold tests/compile/context.c -o $out/untold/context -lm
    $out/untold/context > $out/untold/${flags##* }
done
check "sums in order are found to be" test "$(cat $out/untold/-O2)" = ok
check "sums that are reordered are found out" grep -q '^compiler: reorders sums' $out/untold/-funsafe-math-optimizations
# The lessons without a library: each with an implementation of its own, and no engine.
for source in examples/[0-9]*.c; do
    name=$(basename "$source" .c)
    check "$source alone" gcc -std=c99 -O2 -I. -Iexamples "$source" -o $out/$name -lm
    check "$name prints the same" sh -c "$out/$name > $out/alone && build/$name > $out/linked && cmp $out/alone $out/linked"
done
# OpenMP's threads after fork and dlclose: what >>backends says helps.
posix="-std=c99 -D_GNU_SOURCE -O1 -I. -Itests"
for cc in gcc clang; do
    check "$cc OpenMP: build" $cc $posix -fopenmp tests/compile/openmp.c tests/library.c -o $out/openmp -lm -ldl
    check "$cc OpenMP: a plugin" $cc $posix -fopenmp -fPIC -shared -DPLUGIN tests/compile/openmp.c tests/library.c -o $out/plugin.so -lm
    check "$cc OpenMP: its host" $cc $posix tests/compile/openmp.c tests/library.c -o $out/host -lm -ldl
    check "$cc OpenMP: a child works alone" $out/openmp fork
    check "$cc OpenMP: a plugin that works alone can be closed" $out/host $out/plugin.so
done
# The hidden-visibility object exports nothing when the user asks for that.
check "DSV3_API can be set" gcc -std=c99 '-DDSV3_API=__attribute__((visibility("default")))' -fvisibility=hidden -I. \
    -c tests/compile/implement.c -o /dev/null
done_testing "compile matrix"
