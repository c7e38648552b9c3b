#!/bin/sh
# What AddressSanitizer does not see: ThreadSanitizer (models, contexts and weights shared by threads, each with a pool of
# its own; the pool itself), MemorySanitizer and valgrind (each program in memory that nobody has written to), all over
# tests/sanitize/everything.c in plain C; and the kernels of each backend, which are compiled without AddressSanitizer's
# checks, between pages that cannot be touched. Without any of them it compares bits over memory full of NaN and of zeros.
# WATCHED_ALL=6: valgrind on all six models, not on two (a minute more).
. tests/lib.sh
out=build/watched
mkdir -p $out
flags="-std=c99 -O1 -g -D_POSIX_C_SOURCE=200809L -DDSV3I_SERIAL_WORK=1"
flags="$flags -I. -Iexamples -Itests"
source=tests/sanitize/everything.c
later "build plain" gcc $flags $source -o $out/plain -lm -lpthread
later "build thread" gcc $flags -fsanitize=thread $source -o $out/thread -lm -lpthread
later "build thread test_threads" gcc $flags -fsanitize=thread -DDSV3_IMPLEMENTATION tests/test_threads.c -o $out/threads \
    -lm -lpthread
# Every array of every layout apart from its neighbours, with a closed gap behind it: what AddressSanitizer cannot see while
# they lie in one piece of memory, side by side, and those of different parts one over the other.
mkdir -p $out/gaps
sed -e '/^static void \*dsv3i_take(/,/^}/{
        s/^    l->used = dsv3i_add(l->used, bytes == SIZE_MAX ? SIZE_MAX : padded);$/    padded = dsv3i_add(padded, DSV3I_LINE);\n&/
        s/^    return at;$/    if (at != NULL) __asan_poison_memory_region((unsigned char *)at + bytes, padded - bytes);\n&/
    }' -e '/^static void dsv3i_take_arrays(/,/^}/s/^            l->used = from;$/            (void)from;/' -e 's/DSV3_MEMSET(\(l[->.]*base\)/gap_clear(\1/' dsv3.h > $out/gaps/dsv3.h
check "five places for gaps" test "$(diff dsv3.h $out/gaps/dsv3.h | grep -c '^>')" = 5
cat > $out/gaps/gaps.h << 'END'
#include <sanitizer/asan_interface.h>
#include <stddef.h>
static inline void gap_clear(void *memory, int value, size_t n) { /* of many arrays at once, but not the gaps */
    for (size_t i = 0; i < n; i++)
        if (!__asan_address_is_poisoned((unsigned char *)memory + i)) ((unsigned char *)memory)[i] = (unsigned char)value;
}
END
later "build gaps" gcc -I$out/gaps $flags -include gaps.h -fsanitize=address,undefined \
    -fno-sanitize-recover=all $source -o $out/gaps/everything -lm -lpthread
[ -f build/implementation.o ] || make -s build/implementation.o > /dev/null
later "build guarded" gcc $flags -DGUARDED -DDSV3_SIMD -DDSV3_IMPLEMENTED $source build/implementation.o -o $out/guarded \
    -lm -lpthread
if command -v clang > /dev/null; then
    later "build memory" clang $flags -fsanitize=memory -fno-sanitize-recover=all $source -o $out/memory -lm -lpthread
else
    bad "clang is needed (make deps)"
fi
run_later
later "memory full of junk, the same bits" $out/plain apart
later "arrays of all layouts apart" $out/gaps/everything apart
later "every backend between closed pages" $out/guarded guarded
later "two models at once, the same bits" $out/plain together
later "ThreadSanitizer: two models at once" $out/thread together
later "ThreadSanitizer: the pool" $out/threads
[ -x $out/memory ] && later "MemorySanitizer: each program once" $out/memory apart
if command -v valgrind > /dev/null; then
    later "valgrind: each program once" env WATCHED=1 valgrind -q --error-exitcode=1 $out/plain apart "${WATCHED_ALL:-2}"
else
    bad "valgrind is needed (make deps)"
fi
run_later
done_testing watched
