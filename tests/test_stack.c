/* How much stack the programs use, on threads whose stack was painted before: the numbers of dsv3_context_init's comment,
 * on which a program relies that makes threads with small stacks. Every backend that runs here, weights of all types as
 * they lie and packed, prefill and decode, both ways of computing, and a training step. */
#include "dsv3.h"
#include "synthetic.h"

#include <pthread.h>

/* Sanitizers make frames larger, and so does a compiler that does not optimise. */
#if !defined(__OPTIMIZE__) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MEASURED 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define MEASURED 0
#endif
#endif
#ifndef MEASURED
#define MEASURED 1
#endif

#define ROWS 40
#define STACK ((size_t)1 << 20)
#define PAINT 0xC5

typedef struct job {
    synth *s;
    dsv3_trainer *trainer; /* NULL: forward */
    void *memory;          /* NULL: not packed */
    size_t bytes;
    dsv3_result result;
} job;

static void job_train(job *j) {
    int32_t token[ROWS];
    dsv3_text text;
    uint64_t targets[1 + DSV3_MAX_DRAFTS] = {0}, sequences = 0;
    memset(&text, 0, sizeof text);
    for (int i = 0; i < ROWS; i++) token[i] = i;
    text.rows = ROWS;
    text.token = token;
    dsv3_text_count(&text, (size_t)j->s->config.num_nextn_predict_layers, targets, &sequences, NULL);
    j->result = dsv3_train_begin(j->trainer, targets, sequences, NULL);
    if (j->result == DSV3_OK) j->result = dsv3_train_accumulate(&j->s->context, j->trainer, &text, NULL);
    if (j->result == DSV3_OK) j->result = dsv3_train_end(&j->s->context, j->trainer, 0.001, NULL, NULL);
}

static void job_forward(job *j) {
    static const size_t rows[] = {ROWS, 1, 2, 4};
    static float logits[ROWS * 256];
    static int32_t token[ROWS];
    dsv3_batch batch;
    if (j->memory != NULL) j->result = dsv3_pack(&j->s->context, &j->s->model, j->memory, j->bytes, NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0] && j->result == DSV3_OK; i++) {
        memset(&batch, 0, sizeof batch);
        batch.rows = rows[i];
        batch.token = token;
        batch.outputs = rows[i];
        j->result = dsv3_forward(&j->s->context, logits, &j->s->model, j->s->caches, 1, &batch, &j->s->ws, NULL);
    }
}

static void *job_run(void *arg) {
    job *j = (job *)arg;
    j->result = DSV3_OK;
    if (j->trainer != NULL) {
        job_train(j);
    } else {
        job_forward(j);
    }
    return NULL;
}

static void *job_none(void *arg) { return arg; }

/* Bytes of a painted stack that were written to. */
static size_t depth_of(void *(*start)(void *), job *j) {
    unsigned char *stack = NULL;
    size_t clean = 0;
    pthread_attr_t attributes;
    pthread_t thread;
    if (posix_memalign((void **)&stack, 65536, STACK) != 0) exit(2);
    memset(stack, PAINT, STACK);
    pthread_attr_init(&attributes);
    if (pthread_attr_setstack(&attributes, stack, STACK) != 0 || pthread_create(&thread, &attributes, start, j) != 0) exit(2);
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attributes);
    while (clean < STACK && stack[clean] == PAINT) clean++;
    free(stack);
    return STACK - clean;
}

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

/* Beyond what a thread needs that does nothing. */
static size_t depth_beyond(job *j) {
    size_t none = depth_of(job_none, j), all = depth_of(job_run, j);
    CHECK_EQ(j->result, DSV3_OK);
    return all - (all < none ? all : none);
}

static size_t forward_depth(int which, dsv3_backend backend, dsv3_compute compute, dsv3_attention attention, int pack) {
    job j = {NULL, NULL, NULL, 0, DSV3_OK};
    size_t depth;
    j.s = synth_open_named(which, 5);
    synth_demand(dsv3_context_init(&j.s->context, backend, 1, NULL), "context", NULL);
    j.s->context.threads = 1;
    j.s->context.parallel_for = NULL;
    j.s->context.compute = compute;
    j.s->context.attention = attention;
    if (pack) {
        synth_demand(dsv3_pack_size(&j.s->context, &j.s->model, &j.bytes, NULL), "pack size", NULL);
        j.memory = synth_alloc(j.bytes);
    }
    synth_run(j.s, ROWS, 1, 1, 2 * ROWS, DSV3_F32);
    depth = depth_beyond(&j);
    if (pack) synth_release(j.memory);
    synth_close(j.s);
    return depth;
}

static size_t train_depth(int which, dsv3_backend backend) {
    job j = {NULL, NULL, NULL, 0, DSV3_OK};
    dsv3_trainer trainer;
    dsv3_training settings = dsv3_training_default();
    dsv3_rng rng = {1};
    size_t bytes = 0, depth;
    void *memory;
    j.s = synth_open_named(which, 5);
    synth_demand(dsv3_context_init(&j.s->context, backend, 1, NULL), "context", NULL);
    j.s->context.threads = 1;
    j.s->context.parallel_for = NULL;
    settings.rows = settings.longest = ROWS;
    settings.sequences = 1;
    synth_demand(dsv3_trainer_size(&j.s->config, &settings, 1, &bytes, NULL), "trainer size", NULL);
    memory = synth_alloc(bytes);
    synth_demand(dsv3_trainer_init(&j.s->config, &trainer, &settings, 1, memory, bytes, NULL), "trainer", NULL);
    dsv3_parameters_random(&trainer.weights, &rng, 0.02f, NULL);
    j.trainer = &trainer;
    depth = depth_beyond(&j);
    synth_release(memory);
    synth_close(j.s);
    return depth;
}

int main(void) {
    static const int configs[] = {SYNTH_V3, SYNTH_MOONLIGHT, SYNTH_V2, SYNTH_BLOCKS, SYNTH_MTP, SYNTH_EIGHT, SYNTH_FOUR};
    static const size_t bound[DSV3_BACKENDS] = {0, 12 << 10, 48 << 10, 48 << 10, 64 << 10, 96 << 10};
    for (int b = DSV3_BACKEND_REFERENCE; b < DSV3_BACKENDS; b++) {
        dsv3_backend backend = (dsv3_backend)b;
        dsv3_context context;
        size_t forward = 0, train = 0;
        if (dsv3_context_init(&context, backend, 1, NULL) != DSV3_OK) continue;
        for (size_t c = 0; c < sizeof configs / sizeof configs[0]; c++) {
            for (int how = 0; how < 12; how++) {
                forward = max_size(forward, forward_depth(configs[c], backend, how & 1 ? DSV3_FAST : DSV3_EXACT,
                                                          (dsv3_attention)(how / 4), (how & 2) != 0));
            }
            train = max_size(train, train_depth(configs[c], backend));
        }
        printf("%s: %u bytes of stack, training %u\n", dsv3_backend_name(backend), (unsigned)forward, (unsigned)train);
        CHECK(!MEASURED || forward <= bound[b]);
        CHECK(!MEASURED || train <= bound[b]);
    }
    return test_done("stack");
}
