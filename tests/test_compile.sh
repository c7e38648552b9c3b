#!/bin/sh
# What a user's build sees, with the compiler at hand: no warning at the wide set, C99 and (if there is one) C++11,
# static mode, two translation units, no writable globals, no symbol outside the allow-list, no unpublished one. Of the
# SIMD backends, which take long to compile, the object that `make` builds is looked at; check_compile.sh has the rest.
. tests/lib.sh
CC=${CC:-cc}
out=build/compile
mkdir -p $out
wide="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wcast-qual -Wcast-align -Wvla -Wdouble-promotion
 -Wfloat-equal -Wundef -Wformat=2 -Wnull-dereference -Werror"
c="-Wstrict-prototypes -Wmissing-prototypes"
for unit in use implement main static; do
    check "$unit.c, C99" $CC -std=c99 -O2 $wide $c -I. -c tests/compile/$unit.c -o $out/$unit.o
done
check "two units link" $CC $out/main.o $out/use.o $out/implement.o $out/static.o -o $out/two -lm
check "two units run" $out/two
check "freestanding compiles" $CC -std=c99 -O2 -ffreestanding $wide $c -Wno-missing-prototypes -I. \
    -c tests/compile/freestanding.c -o $out/freestanding.o
# Nothing that a program includes or defines first may reach in: declarations behind every macro of one letter, and the
# whole behind the standard headers (I is the imaginary unit in <complex.h>) and the words of <windows.h>.
for letter in A B C D E F G H I J K L M N O P Q R S T U V W X Y Z; do echo "#define $letter 1"; done > $out/letters.h
for header in dsv3.h examples/*.h; do
    check "$header behind letters" $CC -std=c99 $wide $c -include $out/letters.h -I. -fsyntax-only -x c "$header"
done
for options in -std=c99 -std=c11 "-std=c99 -DDSV3_SIMD"; do
    check "implement.c $options behind words" $CC $options $wide $c -include tests/compile/words.h -I. -fsyntax-only \
        tests/compile/implement.c
done
for name in json safetensors checkpoint svg thread_pool large_pages; do
    upper=$(echo ${name%_pool} | tr a-z A-Z | sed 's/^THREAD$/THREADS/')
    printf '#define DSV3_IMPLEMENTATION\n#define %s_IMPLEMENTATION\n#include "%s.h"\n' $upper $name > $out/$name.c
    for system in "" -D_POSIX_C_SOURCE=1 -D_XOPEN_SOURCE=500; do
        check "$name.h behind words $system" $CC -std=c99 $wide $c $system -include tests/compile/words.h -Iexamples \
            -fsyntax-only $out/$name.c
    done
done
ln -sf nowhere $out/dangling
says() { $out/late $out/dangling | tee $out/said; grep -q "$1" $out/said; }
check "late.c" $CC -std=c99 -O1 $wide $c -Iexamples tests/compile/late.c -o $out/late -lm
check "late.c: a link to nothing is no missing file" says "^0 bytes beyond alignment, result .*is a link to a file"
for file in examples/*.c; do # the program itself, without the implementation
    check "$file" $CC -std=c99 -O2 $wide $c -Wno-float-equal -DDSV3_IMPLEMENTED -Iexamples -I. -c "$file" -o $out/example.o
done
check "implement.c without training" $CC -std=c99 -O2 $wide $c -DDSV3_NO_TRAINING -I. -c tests/compile/implement.c \
    -o $out/inference.o
# Fast math is refused where the compiler tells of it (clang does not: check_compile.sh).
refused() { # WORDS COMMAND: fails, and says so
    words=$1
    shift
    if "$@" > $out/said 2>&1; then return 1; fi
    grep -q "error.*$words" $out/said || { cat $out/said; return 1; }
}
check "-ffast-math is refused" refused "fast math" $CC -std=c99 -ffast-math -fsyntax-only -I. tests/compile/implement.c
if $CC --version | grep -q "Free Software Foundation"; then
    for flags in -funsafe-math-optimizations "-fassociative-math -fno-signed-zeros -fno-trapping-math" -freciprocal-math -Ofast; do
        check "$flags is refused" refused "fast math" $CC -std=c99 $flags -fsyntax-only -I. tests/compile/implement.c
    done
    for option in fast-math Ofast unsafe-math-optimizations finite-math-only; do
        printf '#pragma GCC optimize("%s")\n#include "tests/compile/implement.c"\n' $option > $out/pragma.c
        check "pragma optimize $option is refused" refused "fast math" $CC -std=c99 -fsyntax-only -I. $out/pragma.c
        for unit in implement freestanding; do # the pragma stands in front of the last include
            printf '#include "dsv3.h"\n#pragma GCC optimize("%s")\n#include "tests/compile/%s.c"\n' $option $unit \
                > $out/pragma.c
            check "pragma optimize $option is refused, $unit.c" refused "fast math" $CC -std=c99 -fsyntax-only -I. $out/pragma.c
        done
    done
fi
refused_there() { ! "$@" > $out/said && grep -q '^compiler: reorders sums' $out/said; } # when a context is made
# One message to who compiles with a standard that is too old.
one_error() { "$@" > $out/said 2>&1; test "$(grep -c 'error:' $out/said)" = 1 && grep -q 'error.* C99 .*-std=c99' $out/said; }
for file in tests/compile/implement.c tests/compile/main.c $out/checkpoint.c $out/svg.c $out/thread_pool.c; do
    check "$file, gnu89" one_error $CC -std=gnu89 -fsyntax-only -I. -Iexamples $file
done
# Enums have one width, whatever each side of a call is compiled with.
check "enums.c, short" $CC -std=c99 $wide $c -fshort-enums -DSIDE=other -Iexamples -c tests/compile/enums.c -o $out/short.o
check "enums.c" $CC -std=c99 $wide $c -DMAIN -DSIDE=here -Iexamples -c tests/compile/enums.c -o $out/enums.o
check "short and other enums link" $CC $out/short.o $out/enums.o -o $out/enums
check "short and other enums are the same" $out/enums
check "use.c, short enums" $CC -std=c99 -fshort-enums $wide $c -I. -c tests/compile/use.c -o $out/short.o
check "a program with short enums links" $CC $out/main.o $out/short.o $out/implement.o -o $out/enums -lm
check "a program with short enums runs" $out/enums
check "-ffast-math, allowed" $CC -ffast-math -DDSV3_ALLOW_FAST_MATH -std=c99 -I. -c tests/compile/implement.c -o $out/fast.o
if command -v g++ > /dev/null; then
    for unit in use implement main static; do
        check "$unit.c, C++11" g++ -x c++ -std=c++11 -O2 $wide -I. -c tests/compile/$unit.c -o $out/$unit.cxx.o
    done
    printf '#pragma GCC optimize("unsafe-math-optimizations")\n#include "tests/compile/context.c"\n' > $out/pragma.c
    check "pragma optimize, C++" g++ -x c++ -std=c++11 -O1 -I. $out/pragma.c -o $out/pragma
    check "pragma optimize is found out, C++" refused_there $out/pragma
    check "C++ units link" g++ $out/main.cxx.o $out/use.cxx.o $out/implement.cxx.o -o $out/cxx
    check "C++ units run" $out/cxx
    check "C++ program, C library" g++ $out/main.cxx.o $out/use.cxx.o $out/implement.o -o $out/mixed -lm
fi
# Tables of function pointers may need relocating once, when a program starts; after that .data.rel.ro is read-only.
if command -v size > /dev/null; then
    for object in $out/implement.o $out/freestanding.o build/implementation.o; do
        size -A $object | awk '$1 ~ /^\.t?(data|bss)/ && $1 !~ /^\.data\.rel\.ro/ && $2 > 0 { print $1, $2 }' > $out/globals
        nm $object | grep ' C ' >> $out/globals
        if [ -s $out/globals ]; then bad "writable globals of $object: $(cat $out/globals)"; else ok; fi
    done
fi
if command -v nm > /dev/null; then
    for object in $out/implement.o $out/freestanding.o build/implementation.o; do
        nm -u $object | sed 's/.* //' | grep -vxE \
            'mem(cpy|move|set|cmp)|__mem(cpy|move|set)_chk|(my_)?(expf|logf|sqrtf|sinf|cosf|pow|log)|sincosf|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail(_local)?' \
            > $out/undefined
        if [ -s $out/undefined ]; then bad "$object needs: $(tr '\n' ' ' < $out/undefined)"; else ok; fi
    done
    training $out/inference.o > $out/training
    if [ -s $out/training ]; then bad "training is left: $(tr '\n' ' ' < $out/training)"; else ok; fi
    # every global the object defines is declared in chapter 1, under the public prefix
    nm $out/implement.o build/implementation.o | sed -n 's/.* [TR] //p' | grep -v '^dsv3_' > $out/private
    if [ -s $out/private ]; then bad "unpublished symbols: $(cat $out/private)"; else ok; fi
fi
done_testing compile
