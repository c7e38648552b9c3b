#!/bin/sh
# A 32-bit size_t: every test program and parity, built by the i686 cross compiler (which leaves other cross compilers
# alone, as gcc-multilib does not) and run here, by qemu-i386 where the kernel runs no 32-bit programs. SSE arithmetic:
# the excess precision of the x87 is not float32. (The SIMD backends are for 64 bits: DSV3_SIMD must change nothing.)
. tests/lib.sh
out=build/i686
mkdir -p $out
cc="i686-linux-gnu-gcc -std=c99 -D_POSIX_C_SOURCE=200809L -DDSV3_SIMD -O2 -msse2 -mfpmath=sse -static -I. -Iexamples -Itests"
if ! command -v i686-linux-gnu-gcc > /dev/null; then
    bad "i686-linux-gnu-gcc is needed (make deps)"
    done_testing "32 bit"
    exit
fi
cc="$cc -Wall -Wextra -Wconversion -Wsign-conversion -Werror"
later "build dsv3" $cc -UDSV3_SIMD examples/dsv3.c -o $out/dsv3 -lm
library $out "$cc"
refused() { ! i686-linux-gnu-gcc -std=c99 -I. -fsyntax-only tests/compile/implement.c 2> $out/said && grep -q '#error.*-msse2' $out/said; }
check "the x87 is refused" refused
for source in tests/test_*.c tests/parity.c; do
    name=$(basename "$source" .c)
    relaxed=
    [ $name = test_no_double ] && relaxed=-w # where double is float, constants lose digits on purpose
    later "build $name" $cc $relaxed "$source" -o $out/$name $out/libdsv3.a -lm -lpthread
done
# A system header came first, so off_t stays at 32 bits, and the message says how to have 64.
later "build late" i686-linux-gnu-gcc -std=c99 -O1 -msse2 -mfpmath=sse -static -Iexamples tests/compile/late.c -o $out/late -lm
later "build late, 64 bit off_t" i686-linux-gnu-gcc -std=c99 -D_FILE_OFFSET_BITS=64 -O1 -msse2 -mfpmath=sse -static -Iexamples tests/compile/late.c \
    -o $out/late64 -lm
run_later
emulate=
if ! $out/dsv3 --version > /dev/null 2>&1; then emulate=qemu-i386; fi
for source in tests/test_*.c; do
    name=$(basename "$source" .c)
    later "run $name" $emulate $out/$name
done
for dir in tests/golden/* examples/models/micro; do later "parity $dir" $emulate $out/parity "$dir"; done
later "generate" $emulate $out/dsv3 generate examples/models/austen -n 40
run_later
truncate -s 3G $out/hole
says() { $emulate "$1" $out/hole | tee $out/said; grep -q "$2" $out/said; }
check "a file of 3 GiB, off_t of 32 bits" says $out/late 'too large .* -D_FILE_OFFSET_BITS=64'
check "a file of 3 GiB, off_t of 64 bits" says $out/late64 'header'
rm -rf $out
done_testing "32 bit"
