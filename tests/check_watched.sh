#!/bin/sh
# What AddressSanitizer does not see: ThreadSanitizer (models, contexts and weights shared by threads, each with a pool of
# its own; the pool itself), MemorySanitizer and valgrind (each program in memory that nobody has written to), all over
# tests/sanitize/everything.c in plain C; and the kernels of each backend, which are compiled without AddressSanitizer's
# checks, between pages that cannot be touched. Without any of them it compares bits over memory full of NaN and of zeros.
# WATCHED_ALL=6: valgrind on all six models, not on two (a minute more).
. tests/lib.sh
out=build/watched
mkdir -p $out
flags="-std=c99 -O1 -g -D_POSIX_C_SOURCE=200809L -DDSV3I_SERIAL_WORK=1 -I. -Iexamples -Itests"
source=tests/sanitize/everything.c
later "build plain" gcc $flags $source -o $out/plain -lm -lpthread
later "build thread" gcc $flags -fsanitize=thread $source -o $out/thread -lm -lpthread
later "build thread test_threads" gcc $flags -fsanitize=thread -DDSV3_IMPLEMENTATION tests/test_threads.c -o $out/threads \
    -lm -lpthread
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
