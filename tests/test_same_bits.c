/* test_same_bits.c -- chapters 2, 11, 13 and A: results do not depend on how the work is cut, nor on packing.
 *
 * A failure means that the same tokens give other bits when they are computed by more threads, in another order, in
 * smaller chunks, next to other sequences, or with packed weights: some sum is split or shared, or some scratch memory
 * is. Greedy text would then change with the load of the machine.
 *
 * The first part, all configurations, is for one backend (TEST_BACKEND); the second for all of them, unless one is
 * named, both ways of computing, and all types. */
#define DSV3I_SEGMENT 64u       /* so that short contexts have several */
#define DSV3I_SERIAL_WORK 256u  /* and small loops are split */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#include <pthread.h>

#define LONGEST 136

/* ---- Parallel loops. Each counts its calls by kind of loop: a loop too small to be split never gets here, and a
 * test in which nothing was split would prove nothing. */

enum {
    LOOP_LINEAR, LOOP_SILU, LOOP_ROWS, LOOP_COMBINE, LOOP_EMBED, LOOP_SCORES, LOOP_SELECT,
    LOOP_ATTEND, /* the plain op's, both forms; then the engine's */
    LOOP_ROUND, LOOP_BLOCKS, LOOP_ABSORBED, LOOP_SEGMENTS, LOOP_JOIN, LOOP_EXPANDED, LOOP_OTHER, LOOPS
};
static long split[LOOPS];

/* Loops that a backend has: those of all, and its own ops'. */
static int has_loop(const dsv3_context *ctx, int kind) {
    if (kind < LOOP_ATTEND) return 1;
    return (kind > LOOP_ATTEND) == (ctx->ops->own != NULL);
}

static void count_loop(dsv3_task task) {
    int kind = LOOP_OTHER;
    if (task == dsv3i_linear_task) kind = LOOP_LINEAR;
    if (task == dsv3i_silu_task) kind = LOOP_SILU;
    if (task == dsv3i_rmsnorm_task || task == dsv3i_add_task) kind = LOOP_ROWS;
    if (task == dsv3i_mla_kv_task || task == dsv3i_mla_rotate_task) kind = LOOP_ROWS;
    if (task == dsv3i_moe_combine_task) kind = LOOP_COMBINE;
    if (task == dsv3i_attend_task) kind = LOOP_ATTEND;
    if (task == dsv3i_embed_task) kind = LOOP_EMBED;
    if (task == dsv3i_scores_task) kind = LOOP_SCORES;
    if (task == dsv3i_select_task) kind = LOOP_SELECT;
#ifdef DSV3I_ENGINE
    if (task == dsv3i_jobs_task) kind = LOOP_LINEAR;
    if (task == dsv3i_round_task) kind = LOOP_ROUND;
    if (task == dsv3i_mlp_task) kind = LOOP_BLOCKS; /* of rows, through an MLP */
    if (task == dsv3i_absorb_task) kind = LOOP_ABSORBED;
    if (task == dsv3i_segment_task) kind = LOOP_SEGMENTS;
    if (task == dsv3i_join_task) kind = LOOP_JOIN;
    if (task == dsv3i_expanded_task) kind = LOOP_EXPANDED;
#endif
    split[kind]++;
}

/* Threads of the system: worker w takes every threads-th piece of three items. */
typedef struct piece_worker {
    dsv3_task task;
    void *arg;
    size_t n, worker, threads;
} piece_worker;

static void *work_pieces(void *p) {
    const piece_worker *w = (const piece_worker *)p;
    for (size_t begin = 3 * w->worker; begin < w->n; begin += 3 * w->threads) {
        w->task(w->arg, begin, begin + 3 < w->n ? begin + 3 : w->n, w->worker);
    }
    return NULL;
}

static void parallel_threads(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    pthread_t thread[64];
    piece_worker worker[64];
    (void)user;
    count_loop(task);
    if (threads > 64) exit(2);
    for (size_t i = 0; i < threads; i++) {
        worker[i].task = task, worker[i].arg = arg, worker[i].n = n, worker[i].worker = i,
        worker[i].threads = threads;
        if (i > 0 && pthread_create(&thread[i], NULL, work_pieces, &worker[i]) != 0) exit(2);
    }
    work_pieces(&worker[0]);
    for (size_t i = 1; i < threads; i++) pthread_join(thread[i], NULL);
}

/* One thread, but pieces of odd sizes from the last to the first, under changing worker numbers. */
static void parallel_backwards(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    static const size_t sizes[] = {1, 4, 2, 7, 1, 11, 3};
    size_t end = n, k = 0;
    (void)user;
    count_loop(task);
    while (end > 0) {
        size_t size = sizes[k % 7], begin = end > size ? end - size : 0;
        task(arg, begin, end, k++ % threads);
        end = begin;
    }
}

enum { HOW_SERIAL, HOW_THREADS, HOW_BACKWARDS, HOW_OPENMP };

static dsv3_backend backend; /* the one under test */

static void set_hook(synth *s, int how, size_t threads) {
    dsv3_attention form = s->context.attention;
    dsv3_compute compute = s->context.compute;
    synth_demand(dsv3_context_init(&s->context, backend, how == HOW_OPENMP ? threads : 1, NULL), "context", NULL);
    s->context.attention = form;
    s->context.compute = compute;
    if (how != HOW_OPENMP) s->context.parallel_for = NULL;
    if (how == HOW_THREADS) s->context.parallel_for = parallel_threads;
    if (how == HOW_BACKWARDS) s->context.parallel_for = parallel_backwards;
    s->context.threads = threads;
}

/* ---- One model, its tokens, and what the plain way gives */

typedef struct subject {
    synth *s;
    const char *name;
    size_t S, V, cache_bytes;
    int32_t token[LONGEST];
    float *want, *got;         /* [S, V] */
    unsigned char *want_cache; /* cache after the plain way */
} subject;

/* The tokens through cache 0 from its beginning, `chunk` at a time, into got. */
static void compute(subject *a, size_t chunk) {
    memset(a->got, 0xFF, a->S * a->V * sizeof(float));
    dsv3_cache_truncate(&a->s->caches[0], 0, NULL);
    for (size_t t = 0; t < a->S; t += chunk) {
        size_t rows = a->S - t < chunk ? a->S - t : chunk;
        CHECK_EQ(synth_forward(a->s, a->got + t * a->V, a->token + t, rows, 0, NULL), DSV3_OK);
    }
}

static void compare(const subject *a, const char *how, size_t threads, size_t chunk) {
    char line[200];
    size_t differ = 0;
    for (size_t i = 0; i < a->S * a->V; i++) differ += memcmp(a->got + i, a->want + i, sizeof(float)) != 0;
    snprintf(line, sizeof line, "%s, %s, %s cache, %s, form %d, %s, %zu threads, chunks of %zu: %zu logits differ",
             a->s->context.backend, a->name, dsv3_type_name(a->s->caches[0].type),
             a->s->context.compute == DSV3_FAST ? "fast" : "exact", (int)a->s->context.attention, how, threads, chunk,
             differ);
    test_count(differ == 0, __FILE__, __LINE__, line);
    CHECK(memcmp(a->want_cache, a->s->cache_memory[0], a->cache_bytes) == 0);
}

/* Threads and orders. */
static void vary_threads(subject *a, int all) {
    static const size_t threads[] = {3, 2, 16, 1, 4, 7};
    for (size_t i = 0; i < (all ? 6 : 2); i++) {
        long before = split[LOOP_LINEAR];
        set_hook(a->s, HOW_THREADS, threads[i]);
        compute(a, a->S);
        compare(a, "threads", threads[i], a->S);
        set_hook(a->s, HOW_BACKWARDS, threads[i]);
        compute(a, a->S);
        compare(a, "backwards", threads[i], a->S);
        CHECK((split[LOOP_LINEAR] > before + 1) == (threads[i] > 1));
#if defined(_OPENMP)
        set_hook(a->s, HOW_OPENMP, threads[i]);
        CHECK(a->s->context.parallel_for != NULL && a->s->context.threads == threads[i]);
        compute(a, a->S);
        compare(a, "OpenMP", threads[i], a->S);
#endif
    }
}

static void vary_chunks(subject *a) {
    static const size_t chunks[] = {1, 2, 7};
    for (size_t i = 0; i < 3; i++) {
        set_hook(a->s, HOW_SERIAL, 1);
        compute(a, chunks[i]);
        compare(a, "serial", 1, chunks[i]);
        set_hook(a->s, HOW_BACKWARDS, 5);
        compute(a, chunks[i]);
        compare(a, "backwards", 5, chunks[i]);
    }
}

/* The tokens in chunks of 7, each chunk scattered among rows of two other sequences. */
static void vary_company(subject *a, int how, size_t threads) {
    int32_t token[21], sequence[21], output[7];
    dsv3_batch batch;
    set_hook(a->s, how, threads);
    memset(a->got, 0xFF, a->S * a->V * sizeof(float));
    for (int i = 0; i < 3; i++) dsv3_cache_truncate(&a->s->caches[i], 0, NULL);
    for (size_t t = 0; t < a->S; t += 7) {
        size_t rows = a->S - t < 7 ? a->S - t : 7, done = 0, n = 0;
        while (done < rows) {
            int mine = test_random() % 3 == 0 || n + (rows - done) >= 21;
            if (mine) output[done] = (int32_t)n;
            token[n] = mine ? a->token[t + done++] : (int32_t)(test_random() % a->V);
            sequence[n] = mine ? 0 : 1 + (int32_t)(test_random() % 2);
            n++;
        }
        memset(&batch, 0, sizeof batch);
        batch.rows = n;
        batch.token = token;
        batch.sequence = sequence;
        batch.outputs = rows;
        batch.output = output;
        CHECK_EQ(
            dsv3_forward(&a->s->context, a->got + t * a->V, &a->s->model, a->s->caches, 3, &batch, &a->s->ws, NULL),
            DSV3_OK);
    }
    compare(a, "in company", threads, 7);
}

/* A workspace for a row and one thread has room for one segment at a time, not for all at once: they come in rounds. */
static void vary_workspace(subject *a, size_t others, dsv3_type cache) {
    for (size_t threads = 1; threads <= 2; threads++) {
        synth_run(a->s, threads, threads, 3, others, cache);
        set_hook(a->s, threads == 1 ? HOW_SERIAL : HOW_BACKWARDS, threads);
        compute(a, threads);
        compare(a, "a small workspace", threads, threads);
    }
}

/* ---- All of it for one configuration; `all`: every number of threads, not just two */

static void test_config(const char *name, const dsv3_config *c, int types, size_t length, int all) {
    subject a;
    memset(&a, 0, sizeof a);
    a.s = synth_open(c, types, 71);
    a.name = name;
    a.S = length;
    a.V = (size_t)c->vocab_size;
    a.want = (float *)test_alloc(a.S * a.V * sizeof(float));
    a.got = (float *)test_alloc(a.S * a.V * sizeof(float));
    synth_tokens(a.token, a.S, c->vocab_size);
    for (int form = 1; form <= 2; form++) {
        int engine = a.s->context.ops->own != NULL;
        int loop = !engine ? LOOP_ATTEND : form == 1 ? LOOP_ABSORBED : LOOP_EXPANDED;
        long attention = split[loop], segments = split[LOOP_SEGMENTS];
        for (int bf16 = 0; bf16 < 2; bf16++) {
            size_t others = 3 * a.S;
            a.s->context.attention = (dsv3_attention)form;
            synth_run(a.s, a.S > 21 ? a.S : 21, 16, 3, others, bf16 ? DSV3_BF16 : DSV3_F32);
            a.cache_bytes = a.s->cache_bytes;
            a.want_cache = (unsigned char *)test_alloc(a.cache_bytes);
            set_hook(a.s, HOW_SERIAL, 1);
            compute(&a, a.S);
            memcpy(a.want, a.got, a.S * a.V * sizeof(float));
            memcpy(a.want_cache, a.s->cache_memory[0], a.cache_bytes);
            vary_threads(&a, all && !bf16);
            vary_chunks(&a);
            vary_company(&a, HOW_SERIAL, 1);
            vary_company(&a, HOW_BACKWARDS, 3);
            vary_workspace(&a, others, bf16 ? DSV3_BF16 : DSV3_F32);
            free(a.want_cache);
        }
        CHECK(split[loop] > attention);
        if (engine && form == 1 && length > 64) CHECK(split[LOOP_SEGMENTS] > segments);
    }
    free(a.want), free(a.got);
    synth_close(a.s);
}

/* Large enough that every kind of loop is split, most of them even for a single row. */
static void test_wide(void) {
    dsv3_config c = dsv3_config_default();
    dsv3_context ctx;
    synth_sizes(&c, 1031, 256, 1040, 64, 2, 1);
    synth_attention(&c, 8, 64, 128, 128, 16, 128);
    synth_experts(&c, 96, 1, 6, 4, 2, 2.5f);
    memset(split, 0, sizeof split);
    test_config("wide", &c, SYNTH_BF16, 19, 1);
    synth_demand(dsv3_context_init(&ctx, backend, 1, NULL), "context", NULL);
    for (int i = 0; i < LOOP_OTHER; i++) CHECK_EQ(split[i] > 0, has_loop(&ctx, i));
    CHECK_EQ(split[LOOP_OTHER], 0);
}

/* ---- Every backend of this CPU, exact and fast, with weights of every type, packed and not */

enum { PLAIN, PACKED, KINDS };

typedef struct pair {
    synth *s[KINDS]; /* the same model */
    void *memory;
    size_t bytes;
} pair;

static pair pair_open(const dsv3_config *c, int types) {
    pair p;
    for (int i = 0; i < KINDS; i++) {
        p.s[i] = synth_open(c, types, 72);
        set_hook(p.s[i], HOW_SERIAL, 1);
    }
    CHECK_EQ(dsv3_pack_size(&p.s[PACKED]->context, &p.s[PACKED]->model, &p.bytes, NULL), DSV3_OK);
    p.memory = synth_alloc(p.bytes);
    CHECK_EQ(dsv3_pack(&p.s[PACKED]->context, &p.s[PACKED]->model, p.memory, p.bytes, NULL), DSV3_OK);
    CHECK_EQ(p.bytes > 0, backend != DSV3_BACKEND_REFERENCE);
    CHECK_EQ(p.s[PACKED]->model.lm_head.packed, backend != DSV3_BACKEND_REFERENCE);
    return p;
}

/* All ways of cutting, against the plain way with weights as they lie. */
static void vary_all(subject *a, int kind) {
    static const size_t threads[4] = {2, 3, 4, 7}, chunks[4] = {1, 2, 7, LONGEST};
    long before = split[LOOP_LINEAR];
    for (size_t i = 0; i < 4; i++) {
        set_hook(a->s, HOW_THREADS, threads[i]);
        compute(a, a->S);
        compare(a, kind == PACKED ? "packed, threads" : "threads", threads[i], a->S);
        set_hook(a->s, i % 2 ? HOW_BACKWARDS : HOW_SERIAL, i % 2 ? 5 : 1);
        compute(a, chunks[i]);
        compare(a, kind == PACKED ? "packed, one thread" : "one thread", a->s->context.threads, chunks[i]);
    }
    CHECK(split[LOOP_LINEAR] > before);
    vary_company(a, HOW_BACKWARDS, 3);
}

static void vary_kinds(subject *a, const pair *p, dsv3_compute way, int form) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (kind == PACKED && p->bytes == 0) continue;
        a->s = p->s[kind];
        a->s->context.attention = (dsv3_attention)form;
        a->s->context.compute = way;
        synth_run(a->s, a->S > 21 ? a->S : 21, 7, 3, 3 * a->S, form == 1 ? DSV3_F32 : DSV3_BF16);
        if (kind == PLAIN) {
            a->cache_bytes = a->s->cache_bytes;
            a->want_cache = (unsigned char *)test_alloc(a->cache_bytes);
            set_hook(a->s, HOW_SERIAL, 1);
            compute(a, a->S);
            memcpy(a->want, a->got, a->S * a->V * sizeof(float));
            memcpy(a->want_cache, a->s->cache_memory[0], a->cache_bytes);
        }
        vary_all(a, kind);
    }
    free(a->want_cache);
}

/* exact [S, V] and fast [S, V]: the mode must make a difference where activations are rounded, and a small one on average
 * (a close choice of experts may go another way). */
static void compare_ways(const subject *a, const float *exact, const float *fast, int is_rounded) {
    double sum = 0, largest = 0;
    for (size_t i = 0; i < a->S * a->V; i++) {
        sum += fabs((double)exact[i] - (double)fast[i]), largest = fmax(largest, fabs((double)exact[i]));
    }
    CHECK_EQ(sum > 0, is_rounded);
    CHECK(sum <= 0.01 * largest * (double)(a->S * a->V));
}

static void test_ways(const char *name, const dsv3_config *c, int types, size_t length) {
    subject a;
    pair p = pair_open(c, types);
    float *exact;
    memset(&a, 0, sizeof a);
    a.name = name;
    a.S = length;
    a.V = (size_t)c->vocab_size;
    a.want = (float *)test_alloc(a.S * a.V * sizeof(float));
    a.got = (float *)test_alloc(a.S * a.V * sizeof(float));
    exact = (float *)test_alloc(a.S * a.V * sizeof(float));
    synth_tokens(a.token, a.S, c->vocab_size);
    for (int form = 1; form <= 2; form++) {
        vary_kinds(&a, &p, DSV3_EXACT, form);
        memcpy(exact, a.want, a.S * a.V * sizeof(float));
        vary_kinds(&a, &p, DSV3_FAST, form);
        if (backend == DSV3_BACKEND_REFERENCE)
            compare_ways(&a, exact, a.want, types != SYNTH_F32 && types != SYNTH_F16);
    }
    for (int i = 0; i < KINDS; i++) synth_close(p.s[i]);
    synth_release(p.memory);
    free(a.want), free(a.got), free(exact);
}

/* Heads of 64 and 128, so that kv_b_proj has a packed copy; 32 terms behind the first 128; rows that are no whole panels. */
static void test_ways_even(int types) {
    static const char *const names[SYNTH_TYPES] = {"even F32",   "even F16",  "even BF16", "even FP8",
                                                   "even mixed", "even Q8_0", "even Q4_0"};
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, 131, 160, 192, 96, 2, 1);
    synth_attention(&c, 2, 64, 96, 64, 16, 128);
    synth_experts(&c, 4, 1, 2, 1, 1, 1.0f);
    test_ways(names[types], &c, types, test_light() ? 40 : 101);
}

/* Nothing is a multiple of anything. */
static void test_ways_odd(int types) {
    static const char *const names[SYNTH_TYPES] = {"odd F32", "odd F16", "odd BF16", "odd FP8", "odd mixed", "", ""};
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, 67, 149, 133, 29, 2, 1);
    synth_attention(&c, 3, 71, 51, 21, 6, 67);
    synth_experts(&c, 3, 1, 2, 1, 1, 1.0f);
    test_ways(names[types], &c, types, 38);
}

static void test_backends(void) {
    for (int i = DSV3_BACKEND_REFERENCE; i < DSV3_BACKENDS; i++) {
        dsv3_context ctx;
        backend = (dsv3_backend)i;
        if (dsv3_context_init(&ctx, backend, 1, NULL) != DSV3_OK) continue; /* not on this machine */
        for (int types = 0; types < SYNTH_TYPES; types++) {
            if (types != SYNTH_MIXED && (!test_light() || (types + i) % 3 == 0)) test_ways_even(types);
            if (types != SYNTH_Q8 && types != SYNTH_Q4 && (!test_light() || (types + i) % 3 == 0)) test_ways_odd(types);
        }
    }
}

int main(void) {
    backend = test_backend();
    for (int which = 0; which < SYNTH_CONFIGS; which++) {
        int types;
        dsv3_config c = synth_config(which, &types);
        int all = which == SYNTH_V3 || which == SYNTH_MOONLIGHT;
        test_config(synth_name(which), &c, types,
                    which == SYNTH_ODD      ? LONGEST
                    : which == SYNTH_BLOCKS ? 24
                                            : 72,
                    all);
    }
    test_wide();
    if (getenv("TEST_BACKEND") == NULL) test_backends();
    return test_done("same_bits");
}
