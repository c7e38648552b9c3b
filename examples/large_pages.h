/* large_pages.h -- memory for weights that are read from end to end, on large pages where the system has them.
 *
 *     void *memory = large_pages_alloc(bytes);
 *     ...
 *     free(memory);
 *
 * With pages of 4 KiB a processor looks up an address every few hundred nanoseconds, and stops fetching ahead at each
 * page's end. On Linux transparent huge pages (2 MiB) are asked for by madvise; where /sys/kernel/mm/transparent_hugepage/
 * enabled says "never", and on other systems, this is plain aligned memory.
 *
 * C99, C++11. On Linux define _GNU_SOURCE or _DEFAULT_SOURCE before the first #include; else only aligned. Thread-safe. */
#ifndef LARGE_PAGES_H
#define LARGE_PAGES_H

#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_XOPEN_SOURCE) && !defined(_DEFAULT_SOURCE) && \
    !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L /* posix_memalign */
#endif
#include <stdlib.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define LARGE_PAGES_POSIX
#if !defined(__USE_XOPEN2K) && !defined(__cplusplus)
int posix_memalign(void **memory, size_t align, size_t bytes); /* hidden where a system header came first */
#endif
#endif

#define LARGE_PAGES_SIZE ((size_t)2 << 20)

/* At least `bytes` bytes, aligned to 64, from 2 MiB on to 2 MiB. NULL: out of memory. The caller frees it. */
static inline void *large_pages_alloc(size_t bytes) {
#ifdef LARGE_PAGES_POSIX
    void *memory = NULL;
    size_t align = bytes < LARGE_PAGES_SIZE ? 64 : LARGE_PAGES_SIZE;
    if (posix_memalign(&memory, align, bytes > 0 ? bytes : 1) != 0) return NULL;
#ifdef MADV_HUGEPAGE
    if (align == LARGE_PAGES_SIZE) (void)madvise(memory, bytes, MADV_HUGEPAGE); /* a wish, not a need */
#endif
    return memory;
#else
    return malloc(bytes > 0 ? bytes : 1);
#endif
}

#endif /* LARGE_PAGES_H */
