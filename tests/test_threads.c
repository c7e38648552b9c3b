/* test_threads.c -- examples/thread_pool.h: the contract of a parallel loop, the life of a pool, and that waiting ends in
 * sleep.
 *
 * A failure means that items are left out or done twice, that two threads share a worker number (and with it scratch
 * memory), that results depend on who computed them, that helpers do not help, or that they burn a core while there is
 * nothing to do. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "dsv3.h"
#include "synthetic.h"
#define THREADS_IMPLEMENTATION
#include "thread_pool.h"

#include <time.h>

#if defined(THREADS_NONE)
#error "this test is about pools"
#endif
#include <pthread.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void rest(long microseconds) {
    struct timespec t;
    t.tv_sec = microseconds / 1000000;
    t.tv_nsec = microseconds % 1000000 * 1000;
    nanosleep(&t, NULL);
}

/* ---- Every item once, worker numbers apart */

#define MOST_WORKERS 64

typedef struct tally {
    unsigned char *seen; /* [n], of each item */
    size_t n, threads;   /* of the loop */
    int inside[MOST_WORKERS];
    int shared, outside; /* worker numbers that were taken; items or workers that do not exist */
    int most, present;   /* at the same time */
    long pieces;
} tally;

static void tally_task(void *arg, size_t begin, size_t end, size_t worker) {
    tally *t = (tally *)arg;
    int known = worker < t->threads;
    pthread_mutex_lock(&lock);
    t->pieces++;
    t->outside += !known || begin >= end || end > t->n;
    if (known) t->shared += t->inside[worker]++ != 0;
    if (++t->present > t->most) t->most = t->present;
    pthread_mutex_unlock(&lock);
    for (size_t i = begin; i < end && i < t->n; i++) t->seen[i]++;
    pthread_mutex_lock(&lock);
    if (known) t->inside[worker]--;
    t->present--;
    pthread_mutex_unlock(&lock);
}

/* Pieces of a loop, as thread_pool.h describes them. */
static long pieces_of(size_t n, size_t threads) {
    long pieces = 0;
    if (threads < 2 || n < 2) return n > 0;
    for (; n > 0; pieces++) n -= n < 8 * threads ? 1 : n / (4 * threads);
    return pieces;
}

static void one_loop(threads_pool *pool, size_t threads, size_t n) {
    tally t;
    size_t wrong = 0, count = threads_count(pool) < threads ? threads_count(pool) : threads;
    memset(&t, 0, sizeof t);
    t.seen = (unsigned char *)test_alloc(n);
    memset(t.seen, 0, n);
    t.n = n;
    t.threads = count > 0 ? count : 1;
    threads_for(pool, threads, n, tally_task, &t);
    for (size_t i = 0; i < n; i++) wrong += t.seen[i] != 1;
    CHECK_EQ(wrong, 0);
    CHECK_EQ(t.shared, 0);
    CHECK_EQ(t.outside, 0);
    CHECK_EQ(t.present, 0);
    CHECK(t.most <= (int)t.threads);
    CHECK_EQ(t.pieces, pieces_of(n, t.threads));
    free(t.seen);
}

static void loops(void) {
    static const size_t sizes[] = {0, 1, 2, 3, 7, 15, 16, 17, 39, 40, 41, 1000, 1000003};
    static const size_t counts[] = {1, 2, 3, 5, 16};
    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        threads_pool *pool = threads_create(counts[c]);
        CHECK_EQ(threads_count(pool), counts[c]);
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            one_loop(pool, counts[c], sizes[i]);
            one_loop(pool, 2, sizes[i]);    /* fewer than the pool has */
            one_loop(pool, 1000, sizes[i]); /* more */
            one_loop(pool, 0, sizes[i]);
        }
        threads_destroy(pool);
    }
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) one_loop(NULL, 4, sizes[i]);
}

/* ---- Many thousands of tiny loops: each adds to what the one before left, in plain memory */

typedef struct chain {
    uint64_t value[24];
} chain;

static void chain_task(void *arg, size_t begin, size_t end, size_t worker) {
    chain *c = (chain *)arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) c->value[i] = c->value[i] * 6364136223846793005u + i + 1;
}

/* Every second item from the other half: what another thread wrote in the loop before. */
static void cross_task(void *arg, size_t begin, size_t end, size_t worker) {
    chain *c = (chain *)arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) c->value[i] += c->value[12 + (i + 5) % 12];
}

static void tiny_loops(size_t threads, int count) {
    threads_pool *pool = threads_create(threads);
    chain got, want;
    memset(&got, 0, sizeof got);
    memset(&want, 0, sizeof want);
    for (int i = 0; i < count; i++) {
        threads_for(pool, threads, 24, chain_task, &got);
        threads_for(pool, threads, 12, cross_task, &got);
        chain_task(&want, 0, 24, 0);
        cross_task(&want, 0, 12, 0);
        if (i % 1000 == 999) rest(300); /* so that some find the helpers asleep */
    }
    CHECK(memcmp(&got, &want, sizeof got) == 0);
    threads_destroy(pool);
}

/* ---- Helpers help: two items, each of which waits (for a while) until the other has begun */

typedef struct meeting {
    int present, met;
} meeting;

static void meeting_task(void *arg, size_t begin, size_t end, size_t worker) {
    meeting *m = (meeting *)arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 2;
        pthread_mutex_lock(&lock);
        if (++m->present == 2) pthread_cond_broadcast(&changed);
        while (m->present < 2) {
            if (pthread_cond_timedwait(&changed, &lock, &until) != 0) break;
        }
        m->met += m->present >= 2;
        pthread_mutex_unlock(&lock);
    }
}

/* The helpers asleep, or still awake. */
static void helpers_help(size_t threads, long pause) {
    threads_pool *pool = threads_create(threads);
    int together = 0;
    for (int i = 0; i < 10; i++) {
        meeting m = {0, 0};
        if (pause > 0) rest(pause);
        threads_for(pool, threads, 2, meeting_task, &m);
        CHECK_EQ(m.present, 2);
        together += m.met == 2;
        if (m.met != 2) break;
    }
    CHECK_EQ(together, 10);
    threads_destroy(pool);
}

/* ---- Nobody burns a core: not the helpers between loops, nor the caller behind a long last piece */

static double cpu_seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

/* Whoever is not the caller takes long. */
static void slow_helper_task(void *arg, size_t begin, size_t end, size_t worker) {
    meeting *m = (meeting *)arg;
    meeting_task(arg, begin, end, worker);
    if (worker > 0) rest(300000);
    pthread_mutex_lock(&lock);
    m->present += 10 * (worker > 0);
    pthread_mutex_unlock(&lock);
}

static void waiting_sleeps(void) {
    threads_pool *pool = threads_create(2);
    meeting m = {0, 0};
    chain c;
    double begin;
    memset(&c, 0, sizeof c);
    threads_for(pool, 2, 24, chain_task, &c);
    begin = cpu_seconds();
    rest(300000);
    CHECK(cpu_seconds() - begin < 0.03);
    begin = cpu_seconds();
    threads_for(pool, 2, 2, slow_helper_task, &m);
    CHECK_EQ(m.present, 12); /* returned after the helper, not before */
    CHECK_EQ(m.met, 2);
    CHECK(cpu_seconds() - begin < 0.03);
    threads_destroy(pool);
}

/* ---- Loops within loops, and by several threads at the same time */

typedef struct outer {
    threads_pool *pool;
    chain inner[8];
} outer;

static void outer_task(void *arg, size_t begin, size_t end, size_t worker) {
    outer *o = (outer *)arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) threads_for(o->pool, 3, 24, chain_task, &o->inner[i]);
}

static void *outer_thread(void *arg) {
    outer *o = (outer *)arg;
    for (int k = 0; k < 2000; k++) outer_task(o, 0, 1, 0);
    return NULL;
}

static void overlapping(void) {
    threads_pool *pool = threads_create(3);
    outer o, many[4];
    chain want;
    pthread_t thread[4];
    memset(&o, 0, sizeof o);
    memset(many, 0, sizeof many);
    memset(&want, 0, sizeof want);
    o.pool = pool;
    for (int k = 0; k < 2000; k++) chain_task(&want, 0, 24, 0);
    for (int k = 0; k < 2000; k++) threads_for(pool, 3, 8, outer_task, &o);
    for (int i = 0; i < 8; i++) CHECK(memcmp(&o.inner[i], &want, sizeof want) == 0);
    for (int i = 0; i < 4; i++) {
        many[i].pool = pool;
        if (pthread_create(&thread[i], NULL, outer_thread, &many[i]) != 0) exit(2);
    }
    for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < 4; i++) CHECK(memcmp(&many[i].inner[0], &want, sizeof want) == 0);
    threads_destroy(pool);
}

/* ---- Life */

static void lives(void) {
    threads_pool *pool = threads_create(0);
    size_t cores = threads_cores();
    chain got, want;
    CHECK(cores >= 1 && cores <= THREADS_MAX);
    CHECK_EQ(threads_count(pool), cores);
    threads_destroy(pool);
    threads_destroy(NULL);
    CHECK_EQ(threads_count(NULL), 1);
    memset(&got, 0, sizeof got);
    memset(&want, 0, sizeof want);
    for (int i = 0; i < 300; i++) { /* ended before, while and after its threads first look around */
        pool = threads_create(2 + (size_t)i % 4);
        if (i % 3 > 0) threads_for(pool, 5, 24, chain_task, &got);
        if (i % 3 > 0) chain_task(&want, 0, 24, 0);
        if (i % 3 > 1) rest(i % 2 ? 20 : 200);
        threads_destroy(pool);
    }
    CHECK(memcmp(&got, &want, sizeof got) == 0);
#if defined(__linux__) && defined(CPU_COUNT)
    {
        cpu_set_t old, one;
        int first = 0;
        if (sched_getaffinity(0, sizeof old, &old) != 0) exit(2);
        while (!CPU_ISSET((size_t)first, &old)) first++;
        CPU_ZERO(&one);
        CPU_SET((size_t)first, &one);
        CHECK_EQ(sched_setaffinity(0, sizeof one, &one), 0);
        CHECK_EQ(threads_cores(), 1); /* taskset is heeded */
        tiny_loops(4, 2000);          /* more threads than cores */
        helpers_help(2, 0);
        CHECK_EQ(sched_setaffinity(0, sizeof old, &old), 0);
    }
#endif
}

/* ---- The same bits as a serial forward pass, and OpenMP's */

static long hooked;

static void counted_for(void *pool, size_t threads, size_t n, dsv3_task task, void *arg) {
    hooked++;
    threads_for(pool, threads, n, task, arg);
}

static void forward(synth *s, float *logits, const int32_t *token, size_t rows) {
    size_t V = (size_t)s->config.vocab_size;
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
    CHECK_EQ(synth_forward(s, logits, token, rows, 0, NULL), DSV3_OK);
    for (size_t i = 0; i < 4; i++)
        CHECK_EQ(synth_forward(s, logits + (rows + i) * V, token + i, 1, 0, NULL), DSV3_OK);
}

static void same_bits(void) {
    dsv3_config c = dsv3_config_default();
    enum { ROWS = 24, MOST = 7 };
    int32_t token[ROWS];
    size_t V, bytes;
    float *want, *got;
    synth *s;
    synth_sizes(&c, 1031, 256, 1040, 64, 2, 1);
    synth_attention(&c, 8, 64, 128, 128, 16, 128);
    synth_experts(&c, 8, 1, 2, 4, 2, 2.5f);
    s = synth_open(&c, SYNTH_BF16, 5);
    V = (size_t)c.vocab_size, bytes = (ROWS + 4) * V * sizeof(float);
    want = (float *)test_alloc(bytes), got = (float *)test_alloc(bytes);
    synth_tokens(token, ROWS, c.vocab_size);
    synth_demand(dsv3_context_init(&s->context, test_backend(), 1, NULL), "context", NULL);
    synth_run(s, ROWS, MOST, 1, 2 * ROWS, DSV3_F32);
    s->context.parallel_for = NULL;
    forward(s, want, token, ROWS);
    for (size_t threads = 1; threads <= MOST; threads += threads < 3 ? 1 : 2) {
        threads_pool *pool = threads_create(threads);
        hooked = 0;
        s->context.parallel_for = counted_for;
        s->context.parallel_user = pool;
        s->context.threads = threads_count(pool);
        memset(got, 0xFF, bytes);
        forward(s, got, token, ROWS);
        CHECK(memcmp(got, want, bytes) == 0);
        CHECK((hooked > 10) == (threads > 1)); /* there was something to share */
        threads_destroy(pool);
    }
#if defined(_OPENMP) && !defined(DSV3_NO_OPENMP)
    synth_demand(dsv3_context_init(&s->context, test_backend(), 3, NULL), "context", NULL);
    CHECK(s->context.parallel_for != NULL && s->context.threads == 3);
    memset(got, 0xFF, bytes);
    forward(s, got, token, ROWS);
    CHECK(memcmp(got, want, bytes) == 0);
#endif
    free(want), free(got);
    synth_close(s);
}

int main(void) {
    loops();
    tiny_loops(1, 1000);
    tiny_loops(2, 20000);
    tiny_loops(3, 5000);
    tiny_loops(16, 2000);
    helpers_help(2, 0);
    helpers_help(2, 3000);
    helpers_help(5, 3000);
    waiting_sleeps();
    overlapping();
    lives();
    same_bits();
    return test_done("threads");
}
