/* everything.c -- each program of the library once, on small models of several kinds, for what watches from outside:
 *
 *     everything apart      one after the other, in memory that nobody has written to (MemorySanitizer, valgrind) or, where
 *                           neither watches, once full of NaN and once full of zeros: the same bits
 *     everything together   three threads at once, two of which share context, weights and model, each loop on the threads
 *                           of a pool of its own caller's (ThreadSanitizer): the bits of one after the other
 *
 *     everything guarded    with -DGUARDED: on each backend, packed and not, all that is read or written ending at a page
 *                           that cannot be touched, and once more beginning behind one: the kernels, which sanitizers
 *                           do not look into
 *
 * Compile with -DDSV3I_SERIAL_WORK=1, or loops of so little work wake nobody. */
#ifdef GUARDED
#define _DEFAULT_SOURCE 1 /* MAP_ANONYMOUS */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Each block lies in pages of its own between two that are closed: at their end, or (the second time) at their beginning. */
typedef struct guarded {
    unsigned char *at, *pages;
    size_t bytes, length;
} guarded;
static guarded blocks[1 << 15];
static size_t n_blocks;
static int in_front;

static void *guarded_take(size_t align, size_t bytes) {
    const size_t page = 4096, length = (bytes + page - 1) / page * page + 2 * page;
    unsigned char *pages = (unsigned char *)mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *at = in_front ? pages + page : pages + length - page - bytes;
    at -= (uintptr_t)at % align;
    if (pages == MAP_FAILED || n_blocks == sizeof blocks / sizeof blocks[0] || mprotect(pages, page, PROT_NONE) != 0 ||
        mprotect(pages + length - page, page, PROT_NONE) != 0) {
        fprintf(stderr, "everything: no guarded pages\n"), exit(2);
    }
    blocks[n_blocks].at = at, blocks[n_blocks].pages = pages;
    blocks[n_blocks].bytes = bytes, blocks[n_blocks++].length = length;
    return at;
}
static void guarded_give(void *memory) {
    size_t i = n_blocks;
    if (memory == NULL) return;
    while (i > 0 && blocks[i - 1].at != memory) i--;
    if (i == 0) fprintf(stderr, "everything: no such block\n"), exit(2);
    munmap(blocks[i - 1].pages, blocks[i - 1].length);
    blocks[i - 1] = blocks[--n_blocks];
}
static void *guarded_again(void *memory, size_t bytes) {
    void *more = guarded_take(1, bytes);
    for (size_t i = 0; memory != NULL && i < n_blocks; i++)
        if (blocks[i].at == memory) memcpy(more, memory, blocks[i].bytes < bytes ? blocks[i].bytes : bytes);
    guarded_give(memory);
    return more;
}
static int guarded_aligned(void **memory, size_t align, size_t bytes) { return (*memory = guarded_take(align, bytes)) == NULL; }
#define malloc(bytes) guarded_take(1, bytes)
#define calloc(n, bytes) guarded_take(1, (n) * (bytes)) /* new pages are zeros */
#define realloc(memory, bytes) guarded_again(memory, bytes)
#define posix_memalign(memory, align, bytes) guarded_aligned(memory, align, bytes)
#define free(memory) guarded_give(memory)
#endif
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#define THREADS_IMPLEMENTATION
#include "thread_pool.h"

#include "synthetic.h"

#include <pthread.h>

#if defined(__has_feature)
#if __has_feature(memory_sanitizer)
#define NOT_WRITTEN_TO
#endif
#endif

enum { ROWS = 24, STEPS = 6, DRAFTS = 3, RESULTS = 1 << 16 };

typedef struct work {
    const synth *s; /* shared: only read */
    dsv3_context context;
    int junk; /* memory's bytes; -1: as it comes */
    float result[RESULTS];
    size_t count;
} work;

static void *memory_of(const work *w, dsv3_result sized, const size_t *wanted) {
    size_t bytes = *wanted; /* sized first: arguments have no order */
    void *p;
    synth_demand(sized, "size", NULL);
    p = synth_alloc(bytes);
    (void)w;
#ifndef NOT_WRITTEN_TO
    if (w->junk >= 0) memset(p, w->junk, bytes);
#endif
    return p;
}

/* What comes out is looked at, number by number: whoever watches sees one that depends on nothing. */
static void keep(work *w, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (!(x[i] - x[i] == 0.0f)) fprintf(stderr, "everything: a result is not finite\n"), exit(1);
        if (w->count < RESULTS) w->result[w->count++] = x[i];
    }
}

static void tokens_of(const work *w, int32_t *token, size_t n) {
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        token[i] = (int32_t)(x % (uint64_t)w->s->config.vocab_size);
    }
}

/* Two sequences in chunks, in both forms of attention, exact and fast; then the losses of a text. */
static void read_texts(work *w, dsv3_compute compute, dsv3_attention form, dsv3_type type) {
    const dsv3_config *c = &w->s->config;
    const dsv3_model *model = &w->s->model;
    size_t V = (size_t)c->vocab_size, D = (size_t)model->n_mtp, bytes = 0;
    int32_t token[ROWS], sequence[ROWS];
    dsv3_batch batch = {0, token, sequence, NULL, 0, NULL};
    dsv3_text text;
    dsv3_losses losses;
    dsv3_cache cache[2], module[2 * 4];
    dsv3_workspace ws;
    void *memory[16] = {NULL};
    size_t room = ROWS * V * sizeof(float);
    float *logits = (float *)memory_of(w, DSV3_OK, &room);
    double nll[5] = {0}, balance[16] = {0};
    uint64_t targets[5] = {0}, *load = (uint64_t *)calloc(16 * 64, sizeof *load);
    tokens_of(w, token, ROWS);
    w->context.compute = compute, w->context.attention = form;
    for (int i = 0; i < 2; i++) {
        memory[i] = memory_of(w, dsv3_cache_size(c, ROWS, type, &bytes, NULL), &bytes);
        synth_demand(dsv3_cache_init(c, &cache[i], ROWS, type, memory[i], bytes, NULL), "cache", NULL);
    }
    for (size_t i = 0; i < 2 * D; i++) {
        memory[2 + i] = memory_of(w, dsv3_cache_mtp_size(c, ROWS, type, &bytes, NULL), &bytes);
        synth_demand(dsv3_cache_mtp_init(c, &module[i], ROWS, type, memory[2 + i], bytes, NULL), "module", NULL);
    }
    memory[15] = memory_of(w, dsv3_workspace_size(c, ROWS, w->context.threads, &bytes, NULL), &bytes);
    synth_demand(dsv3_workspace_init(c, &ws, ROWS, w->context.threads, memory[15], bytes, NULL), "workspace", NULL);
    for (size_t i = 0; i < ROWS; i++) sequence[i] = (int32_t)(i % 3 == 0);
    for (size_t at = 0, n = 17; at < ROWS; at += n, n = n == 17 ? 6 : 1) { /* a prompt, more of it, and a step */
        batch.rows = batch.outputs = n;
        batch.token = token + at, batch.sequence = sequence + at;
        synth_demand(dsv3_forward(&w->context, logits, model, cache, 2, &batch, &ws, NULL), "forward", NULL);
        keep(w, logits, n * V);
    }
    memset(&text, 0, sizeof text), memset(&losses, 0, sizeof losses);
    for (size_t i = 0; i < ROWS; i++) sequence[i] = i >= 13;
    text.rows = ROWS, text.token = token, text.sequence = sequence;
    losses.depths = D, losses.nll = nll, losses.targets = targets, losses.load = load, losses.balance = balance;
    synth_demand(dsv3_evaluate(&w->context, &losses, model, cache, module, 2, &text, &ws, NULL), "evaluate", NULL);
    for (size_t k = 0; k <= D; k++) logits[k] = (float)nll[k];
    keep(w, logits, 1 + D);
    for (int i = 0; i < 16; i++) synth_release(memory[i]);
    synth_release(logits);
    free(load);
}

/* Two texts together, with drafts, greedy and drawn. */
static void write_texts(work *w) {
    const dsv3_model *model = &w->s->model;
    size_t V = (size_t)w->s->config.vocab_size, bytes = 0;
    int32_t token[9];
    dsv3_sequence text[2], *both[2] = {&text[0], &text[1]};
    dsv3_workspace ws;
    void *memory[3];
    size_t room = 2 * (DRAFTS + 1) * V * sizeof(float);
    float *logits = (float *)memory_of(w, DSV3_OK, &room);
    tokens_of(w, token, 9);
    w->context.compute = DSV3_EXACT, w->context.attention = DSV3_ATTENTION_ABSORBED;
    for (int i = 0; i < 2; i++) {
        memory[i] = memory_of(w, dsv3_sequence_size(model, 40, DSV3_F32, 4, DRAFTS, &bytes, NULL), &bytes);
        synth_demand(dsv3_sequence_init(model, &text[i], 40, DSV3_F32, 4, DRAFTS, memory[i], bytes, NULL), "text", NULL);
        text[i].temperature = i ? 0.8f : 0.0f, text[i].top_p = i ? 0.9f : 1.0f, text[i].rng.state = 5;
        text[i].stop = -1, text[i].want_log_p = 1;
        synth_demand(dsv3_sequence_append(model, &text[i], token, i ? 9 : 3, NULL), "append", NULL);
    }
    memory[2] = memory_of(w, dsv3_workspace_size(&w->s->config, ROWS, w->context.threads, &bytes, NULL), &bytes);
    synth_demand(dsv3_workspace_init(&w->s->config, &ws, ROWS, w->context.threads, memory[2], bytes, NULL), "ws", NULL);
    for (int step = 0; step < STEPS; step++) {
        synth_demand(dsv3_generate_step(&w->context, logits, model, both, 2, &ws, NULL), "step", NULL);
        for (int i = 0; i < 2; i++) {
            float x[DRAFTS + 1];
            for (size_t j = 0; j < text[i].n_token; j++) x[j] = (float)text[i].token[j];
            keep(w, x, text[i].n_token), keep(w, text[i].log_p, text[i].n_token);
        }
    }
    for (int i = 0; i < 3; i++) synth_release(memory[i]);
    synth_release(logits);
}

/* Two steps of training of two micro-batches each, every loss on, nothing kept and everything. */
static void train(work *w, int keep_all) {
    const dsv3_config *c = &w->s->config;
    dsv3_training settings = dsv3_training_default();
    dsv3_trainer t;
    dsv3_text text;
    int32_t token[ROWS + 1], sequence[ROWS];
    uint64_t targets[5] = {0}, sequences = 0;
    size_t bytes = 0;
    void *memory;
    settings.rows = ROWS, settings.sequences = 2, settings.longest = ROWS, settings.ema = 1, settings.ema_decay = 0.9f;
    settings.keep = keep_all ? DSV3_KEEP_NORMS + DSV3_KEEP_UP_PROJECTIONS + DSV3_KEEP_SWIGLU : 0;
    w->context.compute = DSV3_EXACT, w->context.attention = DSV3_ATTENTION_AUTO;
    memory = memory_of(w, dsv3_trainer_size(c, &settings, w->context.threads, &bytes, NULL), &bytes);
    synth_demand(dsv3_trainer_init(c, &t, &settings, w->context.threads, memory, bytes, NULL), "trainer", NULL);
    synth_demand(dsv3_parameters_from_model(&t.weights, &w->s->model, NULL), "weights", NULL);
    tokens_of(w, token, ROWS);
    memset(&text, 0, sizeof text);
    for (size_t i = 0; i < ROWS; i++) sequence[i] = i >= 9;
    text.rows = ROWS, text.token = token, text.sequence = sequence;
    synth_demand(dsv3_text_count(&text, (size_t)c->num_nextn_predict_layers, targets, &sequences, NULL), "count", NULL);
    for (int k = 0; k < 5; k++) targets[k] *= 2;
    for (int step = 0; step < 2; step++) {
        double norm;
        float x;
        synth_demand(dsv3_train_begin(&t, targets, 2 * sequences, NULL), "begin", NULL);
        for (int i = 0; i < 2; i++)
            synth_demand(dsv3_train_accumulate(&w->context, &t, &text, NULL), "accumulate", NULL);
        synth_demand(dsv3_train_end(&w->context, &t, 0.01, &norm, NULL), "end", NULL);
        x = (float)norm, keep(w, &x, 1);
        x = (float)dsv3_train_loss(&t), keep(w, &x, 1);
    }
    keep(w, t.weights.data, t.weights.count), keep(w, t.ema, t.weights.count);
    synth_release(memory);
}

static void *do_all(void *arg) {
    work *w = (work *)arg;
    w->count = 0;
    for (int i = 0; i < 4; i++)
        read_texts(w, i & 1 ? DSV3_FAST : DSV3_EXACT, i & 2 ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED,
                   i & 1 ? DSV3_BF16 : DSV3_F32);
    write_texts(w);
    train(w, 0), train(w, 1);
    return NULL;
}

static work *work_of(const synth *s, threads_pool *pool, int junk) {
    work *w = (work *)calloc(1, sizeof *w);
    w->s = s;
    w->context = s->context;
    w->context.parallel_for = pool != NULL ? threads_for : NULL;
    w->context.parallel_user = pool;
    w->context.threads = pool != NULL ? threads_count(pool) : 1;
    w->junk = junk;
    return w;
}

static int same(const work *a, const work *b) {
    return a->count == b->count && a->count > 0 && memcmp(a->result, b->result, a->count * sizeof *a->result) == 0;
}

static void apart(int which) {
    synth *s = synth_open_named(which, 11);
    work *first = work_of(s, NULL, -1), *second = work_of(s, NULL, 0xFF), *third = work_of(s, NULL, 0);
    do_all(first);
#ifndef NOT_WRITTEN_TO
    if (getenv("WATCHED") == NULL) {
        do_all(second), do_all(third);
        CHECK(same(first, second) && same(first, third));
    }
#endif
    CHECK(first->count > 1000);
    free(first), free(second), free(third);
    synth_close(s);
}

static void together(int one, int other) {
    synth *shared = synth_open_named(one, 11), *alone = synth_open_named(other, 12);
    threads_pool *pool[3];
    work *w[3], *right[2];
    pthread_t thread[3];
    right[0] = work_of(shared, NULL, 0), right[1] = work_of(alone, NULL, 0);
    do_all(right[0]), do_all(right[1]);
    for (int i = 0; i < 3; i++) {
        pool[i] = threads_create(3);
        w[i] = work_of(i < 2 ? shared : alone, pool[i], 0xFF);
        CHECK_EQ(pthread_create(&thread[i], NULL, do_all, w[i]), 0);
    }
    for (int i = 0; i < 3; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < 3; i++) {
        CHECK(same(w[i], right[i == 2]));
        threads_destroy(pool[i]);
        free(w[i]);
    }
    free(right[0]), free(right[1]);
    synth_close(shared), synth_close(alone);
}

#ifdef GUARDED
static void guarded_run(int which) {
    for (int backend = DSV3_BACKEND_REFERENCE; backend < DSV3_BACKENDS; backend++) {
        work *w[4];
        for (int i = 0; i < 4; i++) { /* at the end and at the beginning, as it lies and packed */
            synth *s;
            size_t bytes = 0;
            void *packed = NULL;
            in_front = i & 1;
            s = synth_open_named(which, 11);
            w[i] = NULL;
            if (dsv3_context_init(&s->context, (dsv3_backend)backend, 1, NULL) == DSV3_OK) {
                w[i] = work_of(s, NULL, 0xFF);
                if (i & 2) {
                    synth_demand(dsv3_pack_size(&w[i]->context, &s->model, &bytes, NULL), "pack size", NULL);
                    packed = synth_alloc(bytes);
                    synth_demand(dsv3_pack(&w[i]->context, &s->model, packed, bytes, NULL), "pack", NULL);
                }
                do_all(w[i]);
                CHECK(same(w[i], w[0]));
            }
            synth_release(packed);
            synth_close(s);
        }
        for (int i = 0; i < 4; i++) free(w[i]);
    }
}
#endif

int main(int argc, char **argv) {
    static const int kinds[] = {SYNTH_MTP, SYNTH_V2, SYNTH_BLOCKS, SYNTH_EIGHT, SYNTH_FOUR, SYNTH_ODD};
    if (argc > 1 && strcmp(argv[1], "together") == 0) {
        together(SYNTH_MTP, SYNTH_V2);
        together(SYNTH_EIGHT, SYNTH_V3);
#ifdef GUARDED
    } else if (argc > 1 && strcmp(argv[1], "guarded") == 0) {
        for (int i = 0; i < 6; i++) guarded_run(kinds[i]);
#endif
    } else {
        for (int i = 0; i < (argc > 2 ? atoi(argv[2]) : 6); i++) apart(kinds[i]);
    }
    return test_done("everything");
}
