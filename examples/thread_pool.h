/* thread_pool.h -- a pool of threads for parallel loops, in one header: spins for a moment, then sleeps.
 *
 * What it is: threads that are started once and then share out one loop after another, thousands of them a second,
 * each of which may take only microseconds. threads_for has the form of dsv3_parallel_for, but this header knows
 * nothing of dsv3.h.
 *
 * What it is not: a queue of jobs, a scheduler, or a set of locks. There is one loop at a time.
 *
 * Use: in exactly one C or C++ file
 *
 *     #define THREADS_IMPLEMENTATION
 *     #include "thread_pool.h"
 *
 * and in any other file only the #include. With dsv3.h:
 *
 *     threads_pool *pool = threads_create(0);         // as many as there are cores
 *     context.parallel_for = threads_for;
 *     context.parallel_user = pool;
 *     context.threads = threads_count(pool);
 *     ...
 *     threads_destroy(pool);
 *
 * How it behaves: the caller of threads_for works along as worker 0, and helpers join if they come in time. Nobody is
 * waited for but those who have begun a piece. A helper without work looks for the next loop for some microseconds,
 * then gives way to others who want its core, and soon sleeps; so does the caller while the last pieces are
 * finished. When other programs keep the cores busy, a loop therefore takes about as long as one thread alone needs,
 * where a pool with barriers waits for the slowest to get its turn.
 *
 * Contract
 *   Ownership: the pool is one block from malloc and its threads; threads_destroy gives both back. Nothing else is
 *     allocated.
 *   Calls at the same time: of all threads_for on one pool that overlap, be it from several threads or from inside
 *     a task, the first gets the helpers; each of the others runs its whole loop itself, at once, as worker 0.
 *   Memory: what the caller wrote before threads_for is seen by the tasks, and what they wrote is seen by the caller
 *     after it.
 *   fork: the child has no helpers. threads_for works there, alone; threads_destroy must not be called.
 *   Systems: POSIX threads, and either C11 atomics or a compiler that knows GCC's (gcc, clang). Elsewhere, or with
 *     THREADS_NONE defined, a pool is one thread and every loop is serial.
 *   Cores: on Linux define _GNU_SOURCE before the first #include, and threads_cores heeds the affinity mask
 *     (taskset); without it, all cores that are online count. Quotas of containers are not asked for.
 *
 * Macros, for the file with the implementation
 *   THREADS_SPIN  microseconds that a thread without work stays awake (default 50); 0: it sleeps at once
 *   THREADS_NONE  serial everywhere
 */
#ifndef THREADS_H
#define THREADS_H

#if (defined(__STDC_VERSION__) && __STDC_VERSION__ < 199901L) || \
    (!defined(__STDC_VERSION__) && defined(__GNUC__) && !defined(__cplusplus))
#error "thread_pool.h is C99 and C++11: compile with -std=c99 or later"
#define THREADSI_IMPLEMENTED /* one message is enough */
#endif

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The most threads of a pool. */
#define THREADS_MAX 4096

/* One piece of a loop: does items [begin, end). worker tells concurrent pieces of one loop apart. */
typedef void (*threads_task)(void *arg, size_t begin, size_t end, size_t worker);

typedef struct threads_pool threads_pool;

/* Cores that this process may use, 1 .. THREADS_MAX; 1 if the system does not say. */
size_t threads_cores(void);

/* A pool for loops on `threads` threads, the caller's included: threads - 1 are started. 0 means threads_cores().
 * There may be fewer, if the system starts no more or above THREADS_MAX: ask threads_count. NULL: out of memory. */
threads_pool *threads_create(size_t threads);

/* Ends the threads and frees the pool; NULL is allowed. No loop may be running. */
void threads_destroy(threads_pool *pool);

/* Threads of the pool, the caller's included, >= 1; 1 for NULL. */
size_t threads_count(const threads_pool *pool);

/* A parallel loop: covers [0, n) by calls of task, each item exactly once, at most `threads` of them at a time (and no
 * more than the pool has), with different worker numbers below `threads`; returns when all are done.
 *   pool  a threads_pool; NULL: the loop is serial
 * Items go out in contiguous pieces to whoever is free: each a fourth of what would be a thread's share of the items
 * left, so that few pieces do, and the last ones are single items: uneven items are balanced. The cut is the same in
 * every run of the same n and threads, but not who does which piece. A serial loop is one piece. */
void threads_for(void *pool, size_t threads, size_t n, threads_task task, void *arg);

#ifdef __cplusplus
}
#endif
#endif /* THREADS_H */

#if defined(THREADS_IMPLEMENTATION) && !defined(THREADSI_IMPLEMENTED)
#define THREADSI_IMPLEMENTED

#include <stdlib.h>

#ifndef THREADS_SPIN
#define THREADS_SPIN 50
#endif

/* ---- The one place that looks at compilers and systems */

#if !defined(THREADS_NONE) && (defined(__unix__) || defined(__APPLE__))
#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L && !defined(__STDC_NO_ATOMICS__)
#define THREADSI_C11
#define THREADSI_POOL
#elif defined(__GNUC__)
#define THREADSI_POOL
#endif
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

size_t threads_cores(void) {
    long n = 1;
#if defined(__linux__) && defined(CPU_COUNT)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        n = (long)CPU_COUNT(&set);
    } else { /* more processors than the set has room for */
        n = sysconf(_SC_NPROCESSORS_ONLN);
    }
#elif defined(_SC_NPROCESSORS_ONLN)
    n = sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return n < 1 ? 1 : n > THREADS_MAX ? THREADS_MAX : (size_t)n;
}

#ifdef THREADSI_POOL

#include <pthread.h>
#include <sched.h>
#include <sys/time.h>

#ifdef THREADSI_C11
#include <stdatomic.h>
typedef atomic_uint threadsi_word;
typedef atomic_size_t threadsi_size;
#define THREADSI_GET(p) atomic_load_explicit(p, memory_order_acquire)
#define THREADSI_GET_STRICT(p) atomic_load_explicit(p, memory_order_seq_cst)
#define THREADSI_SET_STRICT(p, x) atomic_store_explicit(p, x, memory_order_seq_cst)
#define THREADSI_SET(p, x) atomic_store_explicit(p, x, memory_order_release)
#define THREADSI_SWAP(p, x) atomic_exchange_explicit(p, x, memory_order_acquire)
#define THREADSI_CHANGE(p, old, x)                                                                                   \
    atomic_compare_exchange_weak_explicit(p, old, x, memory_order_acq_rel, memory_order_acquire)
#else
typedef unsigned threadsi_word;
typedef size_t threadsi_size;
#define THREADSI_GET(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define THREADSI_GET_STRICT(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define THREADSI_SET_STRICT(p, x) __atomic_store_n(p, x, __ATOMIC_SEQ_CST)
#define THREADSI_SET(p, x) __atomic_store_n(p, x, __ATOMIC_RELEASE)
#define THREADSI_SWAP(p, x) __atomic_exchange_n(p, x, __ATOMIC_ACQUIRE)
#define THREADSI_CHANGE(p, old, x) __atomic_compare_exchange_n(p, old, x, 1, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
#endif

/* Tells the core that this is a loop of waiting. */
static void threadsi_pause(void) {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    __builtin_ia32_pause();
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* ---- The pool
 *
 * Everything turns on one word, `state`: the seats that helpers may still take in the present loop, whether the caller
 * sleeps until they are done, and how many are at work.
 *
 *   0              no loop; only the caller (who holds `taken`) may change it, and the loop's fields
 *   seats > 0      the loop is open: a helper takes a seat, which is its worker number, and counts as at work
 *   active > 0     somebody may be reading the loop's fields: the caller must not return
 *
 * Whoever finds no piece left clears the seats, so that nobody joins in vain. The loop's fields are published by the
 * store that opens it and read after the exchange that takes a seat; the results by the exchange that leaves, and
 * the load that finds active = 0. */

#define THREADSI_ACTIVE 0x00007FFFu
#define THREADSI_WAITING 0x00008000u
#define THREADSI_SEATS 0x7FFF0000u
#define THREADSI_SEAT 0x00010000u
#define THREADSI_SHARE 4u /* a piece is so much of what a thread would get */

struct threads_pool {
    threadsi_word state;
    threadsi_word asleep; /* helpers that sleep and that nobody has woken yet; changed under `lock` */
    threads_task task;    /* the loop */
    void *arg;
    size_t n, shares;
    char apart1[128];   /* what many write lies alone in its cache lines */
    threadsi_size next; /* item */
    char apart2[128];
    threadsi_word taken; /* by a caller of threads_for */
    size_t threads;      /* helpers + 1 */
    unsigned spin;       /* microseconds */
    pthread_mutex_t lock;
    pthread_cond_t wake; /* helpers wait for it: there are calls, or the end */
    pthread_cond_t done; /* the caller waits for it: active = 0 */
    unsigned calls;      /* to wake up, not yet heard */
    int end;
    pthread_t thread[1]; /* [threads - 1] */
};

/* A moment in microseconds, modulo 2^32. Only differences over short times are used, and a clock that is set
 * meanwhile ends the waiting early. */
static unsigned threadsi_now(void) {
    struct timeval t;
    gettimeofday(&t, NULL);
    return (unsigned)t.tv_sec * 1000000u + (unsigned)t.tv_usec;
}

/* Waits awake until some of these bits of the state are set (if `set`) or none. 0: not within the time. */
static int threadsi_spin(threads_pool *p, unsigned bits, int set) {
    unsigned begin = 0, passed;
    for (unsigned round = 0;; round++) {
        for (unsigned i = 0; i < 16; i++) {
            if (((THREADSI_GET(&p->state) & bits) != 0) == set) return 1;
            if (p->spin == 0) return 0;
            threadsi_pause();
        }
        if (round == 0) begin = threadsi_now();
        passed = threadsi_now() - begin;
        if (passed >= p->spin) return 0;
        if (passed > p->spin / 8) sched_yield(); /* nearly free where nobody wants the core */
    }
}

/* ---- Helpers */

/* Does pieces until there are no items left. */
static void threadsi_work(threads_pool *p, size_t worker) {
    size_t n = p->n, shares = p->shares, begin = THREADSI_GET(&p->next);
    while (begin < n) {
        size_t some = n - begin < 2 * shares ? 1 : (n - begin) / shares;
        if (!THREADSI_CHANGE(&p->next, &begin, begin + some)) continue;
        p->task(p->arg, begin, begin + some, worker);
        begin = THREADSI_GET(&p->next);
    }
}

/* Takes a seat: the worker number, or 0 if no loop is open. */
static size_t threadsi_join(threads_pool *p) {
    unsigned state = THREADSI_GET(&p->state);
    while ((state & THREADSI_SEATS) != 0) {
        if (THREADSI_CHANGE(&p->state, &state, state - THREADSI_SEAT + 1)) return state / THREADSI_SEAT;
    }
    return 0;
}

static void threadsi_leave(threads_pool *p) {
    unsigned state = THREADSI_GET(&p->state), left;
    do {
        left = (state & ~THREADSI_SEATS) - 1;
    } while (!THREADSI_CHANGE(&p->state, &state, left));
    if (left != THREADSI_WAITING) return;
    pthread_mutex_lock(&p->lock); /* the caller is not between its look at the state and its sleep */
    pthread_mutex_unlock(&p->lock);
    pthread_cond_signal(&p->done);
}

/* Sleeps until a loop is open. 0: the pool ends. A helper first says that it sleeps, then looks at the state; a caller
 * first opens the loop, then looks for sleepers: in the one order of strict accesses one of them sees the other. */
static int threadsi_sleep(threads_pool *p) {
    int end;
    pthread_mutex_lock(&p->lock);
    THREADSI_SET_STRICT(&p->asleep, THREADSI_GET(&p->asleep) + 1);
    if ((THREADSI_GET_STRICT(&p->state) & THREADSI_SEATS) != 0 && !p->end) {
        THREADSI_SET_STRICT(&p->asleep, THREADSI_GET(&p->asleep) - 1);
    } else {
        while (p->calls == 0 && !p->end) pthread_cond_wait(&p->wake, &p->lock);
        if (p->calls > 0) p->calls--;
    }
    end = p->end;
    pthread_mutex_unlock(&p->lock);
    return !end;
}

static void *threadsi_main(void *arg) {
    threads_pool *p = (threads_pool *)arg;
    do {
        while (threadsi_spin(p, THREADSI_SEATS, 1)) {
            size_t worker = threadsi_join(p);
            if (worker == 0) continue; /* closed again, or others were faster */
            threadsi_work(p, worker);
            threadsi_leave(p);
        }
    } while (threadsi_sleep(p));
    return NULL;
}

/* ---- The caller */

/* Calls up to `seats` sleepers. If somebody else has the lock for long, it has lost its core: this loop then does
 * without, which is better than to wait for it. */
static void threadsi_wake(threads_pool *p, unsigned seats) {
    unsigned n, tries = 0;
    while (pthread_mutex_trylock(&p->lock) != 0) {
        if (++tries == 100) return;
        threadsi_pause();
    }
    n = THREADSI_GET(&p->asleep);
    if (n > seats) n = seats;
    THREADSI_SET_STRICT(&p->asleep, THREADSI_GET(&p->asleep) - n);
    p->calls += n;
    pthread_mutex_unlock(&p->lock);
    for (unsigned i = 0; i < n; i++) pthread_cond_signal(&p->wake);
}

/* Closes the loop and waits for those at work. */
static void threadsi_finish(threads_pool *p) {
    unsigned state = THREADSI_GET(&p->state);
    while (!THREADSI_CHANGE(&p->state, &state, state & ~THREADSI_SEATS)) {
    }
    if (threadsi_spin(p, THREADSI_ACTIVE, 0)) return;
    state = THREADSI_GET(&p->state);
    while (!THREADSI_CHANGE(&p->state, &state, state | THREADSI_WAITING)) {
    }
    pthread_mutex_lock(&p->lock);
    while ((THREADSI_GET(&p->state) & THREADSI_ACTIVE) != 0) pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

void threads_for(void *pool, size_t threads, size_t n, threads_task task, void *arg) {
    threads_pool *p = (threads_pool *)pool;
    size_t seats;
    if (n == 0) return;
    if (p != NULL && threads > p->threads) threads = p->threads;
    if (p == NULL || threads < 2 || n < 2 || THREADSI_SWAP(&p->taken, 1) != 0) {
        task(arg, 0, n, 0);
        return;
    }
    p->task = task;
    p->arg = arg;
    p->n = n;
    p->shares = threads * THREADSI_SHARE;
    THREADSI_SET(&p->next, 0);
    seats = (threads < n ? threads : n) - 1;
    THREADSI_SET_STRICT(&p->state, (unsigned)seats * THREADSI_SEAT);
    if (THREADSI_GET_STRICT(&p->asleep) > 0) threadsi_wake(p, (unsigned)seats);
    threadsi_work(p, 0);
    threadsi_finish(p);
    THREADSI_SET(&p->taken, 0);
}

/* ---- Life */

threads_pool *threads_create(size_t threads) {
    size_t cores = threads_cores();
    threads_pool *p;
    if (threads == 0) threads = cores;
    if (threads > THREADS_MAX) threads = THREADS_MAX;
    p = (threads_pool *)calloc(1, sizeof *p + threads * sizeof p->thread[0]);
    if (p == NULL) return NULL;
    if (pthread_mutex_init(&p->lock, NULL) != 0) {
        free(p);
        return NULL;
    }
    if (pthread_cond_init(&p->wake, NULL) != 0) {
        pthread_mutex_destroy(&p->lock);
        free(p);
        return NULL;
    }
    if (pthread_cond_init(&p->done, NULL) != 0) {
        pthread_cond_destroy(&p->wake);
        pthread_mutex_destroy(&p->lock);
        free(p);
        return NULL;
    }
    p->spin = threads <= cores ? THREADS_SPIN : 0; /* with fewer cores, whoever waits is in somebody's way */
    p->threads = 1;
    while (p->threads < threads && pthread_create(&p->thread[p->threads - 1], NULL, threadsi_main, p) == 0)
        p->threads++;
    return p;
}

void threads_destroy(threads_pool *pool) {
    if (pool == NULL) return;
    pthread_mutex_lock(&pool->lock);
    pool->end = 1;
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    for (size_t i = 0; i + 1 < pool->threads; i++) pthread_join(pool->thread[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

size_t threads_count(const threads_pool *pool) { return pool == NULL ? 1 : pool->threads; }

#else /* serial */

struct threads_pool {
    size_t threads;
};

threads_pool *threads_create(size_t threads) {
    threads_pool *p = (threads_pool *)malloc(sizeof *p);
    (void)threads;
    if (p != NULL) p->threads = 1;
    return p;
}

void threads_destroy(threads_pool *pool) { free(pool); }

size_t threads_count(const threads_pool *pool) { return pool == NULL ? 1 : pool->threads; }

void threads_for(void *pool, size_t threads, size_t n, threads_task task, void *arg) {
    (void)pool;
    (void)threads;
    if (n > 0) task(arg, 0, n, 0);
}

#endif /* THREADSI_POOL */
#endif /* THREADS_IMPLEMENTATION */
