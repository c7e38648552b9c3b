#!/bin/sh
# Branch coverage of the book's chapters and of the companions that read files, by the tests in C: built with gcov's
# counters and no optimisation, SIMD compiled in, run on the reference backend and a few once more on the best one of this
# machine; safetensors.h once more as on a machine of the other byte order. At least 98 % of the branches of each must be
# taken, every error text given, and what is not taken stands, line by line with the reason, in tests/coverage.txt.
# tests/coverage.py counts; build/coverage/missed names what it missed. Some ten minutes of a processor: by hand, and
# before a release.
#
#     sh tests/coverage.sh                         all
#     sh tests/coverage.sh test_json test_save     builds and runs these again, and counts all that was run since
. tests/lib.sh
out=build/coverage
compile="gcc -std=c99 -DNDEBUG -D_POSIX_C_SOURCE=200809L -DDSV3_SIMD"
counters="--coverage -fprofile-update=atomic" # of several threads, too
flags="$compile -O0 $counters"
# Not those that are about other files or the engine, or take minutes without optimisation.
chosen=${*:-$(cd tests && ls test_*.c | sed 's/\.c$//' | grep -v -e svg -e kernels -e same_bits -e stack -e ops_table)}
if ! command -v gcov > /dev/null || ! command -v python3 > /dev/null; then
    bad "gcov and python3 are needed (make deps)"
    done_testing coverage
    exit
fi
[ $# = 0 ] && rm -rf $out
mkdir -p $out/inside/body
if [ ! -f $out/libdsv3.a ] || [ dsv3.h -nt $out/libdsv3.a ]; then
    rm -f $out/*.gcno $out/*.gcda
    awk -v body=1 -f tests/inside.awk dsv3.h > $out/inside/body/dsv3.h
    awk -f tests/inside.awk dsv3.h > $out/inside/dsv3.h
    check "build library" $flags -I$out/inside/body -I. -c tests/library.c -o $out/library.o
    check "build numbers" $flags -DDSV3_IMPLEMENTATION -x c -c $out/inside/dsv3.h -o $out/numbers.o
    rm -f $out/libdsv3.a
    ar rc $out/libdsv3.a $out/library.o $out/numbers.o
fi
for name in $chosen; do
    inside=-I$out/inside counted=-O2
    [ $name = test_gradients ] && inside= # has an implementation of its own, in double
    grep -q '_IMPLEMENTATION$' tests/$name.c && counted="-O0 $counters"
    rm -f $out/$name-*
    later "build $name" $compile $counted $inside -I. -Iexamples -Itests tests/$name.c $out/libdsv3.a -o $out/$name \
        --coverage -lm -lpthread
    [ $name = test_safetensors ] || continue
    rm -f $out/other-*
    later "build $name, other order" $compile -O0 $counters -D"ST_BIG_ENDIAN=(!sti_host_is_big_endian())" -I. -Iexamples \
        -Itests tests/$name.c -o $out/other --coverage -lm
done
run_later
for name in $chosen; do
    [ $name = test_safetensors ] && later "run $name, other order" $out/other
    case $name in
    test_generate) # but for its longest parts
        for part in 2 4 5 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25; do later "run $name $part" $out/$name $part; done ;;
    *) later "run $name" $out/$name ;;
    esac
    case $name in test_moe | test_infer)
        later "run $name, best backend" env TEST_BACKEND=auto $out/$name ;;
    esac
done
run_later
for file in $out/*.gcda; do
    gcov --branch-probabilities --json-format --stdout "$file" 2> /dev/null
done > $out/counts
check "what is not reached is listed" python3 tests/coverage.py $out/counts tests/coverage.txt $out/missed
cat $out/missed.sums
done_testing coverage
