/* test_infer.c -- chapters 9 and 11: layers, caches, batches and the forward program.
 *
 * A failure means that a whole model gives wrong logits, that sequences in one call disturb each other, that a bad
 * call is computed instead of refused, that it is refused with the wrong code, or that a call that failed has moved
 * or overwritten a cache. */
#include "dsv3.h"
#include "synthetic.h"

#define S 24 /* positions of the sequences in most tests */

static size_t logits_bytes(const synth *s, size_t rows) {
    return rows * (size_t)s->config.vocab_size * sizeof(float);
}

/* A model with the attention form fixed: only then are bits promised to be the same for every cut of a prompt. */
static synth *open_form(int which, uint64_t seed, int form) {
    synth *s = synth_open_named(which, seed);
    s->context.attention = (dsv3_attention)form;
    return s;
}

/* ---- The whole model against the formulas */

static void test_oracle(int which, int form, dsv3_type type) {
    synth *s = open_form(which, 51, form);
    size_t V = (size_t)s->config.vocab_size;
    float *got = (float *)test_alloc(logits_bytes(s, S));
    double *want = synth_doubles(S * V), margin;
    int32_t token[S];
    dsv3_error e;
    synth_tokens(token, S, s->config.vocab_size);
    synth_run(s, S, 1, 1, S, type);
    margin = oracle_forward(s, want, token, S);
    if (margin < 2e-6) fprintf(stderr, "%s: a routing decision is as close as %g\n", synth_name(which), margin);
    CHECK(margin >= 2e-6); /* else rounding may decide: take another seed */
    CHECK_EQ(synth_forward(s, got, token, S, 0, &e), DSV3_OK);
    CHECK_EQ(e.code, DSV3_OK);
    CHECK_EQ(s->caches[0].length, S);
    CHECK_CLOSE(got, want, S * V, type == DSV3_F32 ? 2e-6 : 3e-2);
    free(got), free(want);
    synth_close(s);
}

/* ---- The same sequence by different ways: the bits must not differ */

/* Tokens [S] and their logits [S, V], taken in one call from an empty cache. */
static void reference(synth *s, int32_t *token, float *logits, uint64_t seed) {
    test_state = seed;
    synth_tokens(token, S, s->config.vocab_size);
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
    synth_demand(synth_forward(s, logits, token, S, 0, NULL), "reference", NULL);
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
}

static void test_same_sequence(int which, int form) {
    synth *s = open_form(which, 52, form);
    size_t V = (size_t)s->config.vocab_size, n = logits_bytes(s, S), row = V * sizeof(float);
    float *want = (float *)test_alloc(n), *got = (float *)test_alloc(n), *other = (float *)test_alloc(n);
    int32_t token[S], junk[S];
    dsv3_error e;
    synth_run(s, S, 1, 3, S, DSV3_BF16);
    reference(s, junk, other, 8);
    reference(s, token, want, 9);
    for (size_t t = 0; t < S; t++) CHECK_EQ(synth_forward(s, got + t * V, token + t, 1, 0, &e), DSV3_OK);
    CHECK(memcmp(got, want, n) == 0); /* token by token */
    /* go astray at position 10, come back, continue: as if never having been there */
    CHECK_EQ(dsv3_cache_truncate(&s->caches[0], 10, NULL), DSV3_OK);
    CHECK_EQ(synth_forward(s, other, junk, 7, 0, &e), DSV3_OK);
    CHECK_EQ(s->caches[0].length, 17);
    CHECK_EQ(dsv3_cache_truncate(&s->caches[0], 10, NULL), DSV3_OK);
    CHECK_EQ(synth_forward(s, got, token + 10, S - 10, 0, &e), DSV3_OK);
    CHECK(memcmp(got, want + 10 * V, (S - 10) * row) == 0);
    /* a fork continues like the original, and does not touch it */
    CHECK_EQ(dsv3_cache_truncate(&s->caches[0], 12, NULL), DSV3_OK);
    CHECK_EQ(dsv3_cache_copy(&s->caches[1], &s->caches[0], NULL), DSV3_OK);
    CHECK_EQ(s->caches[1].length, 12);
    CHECK_EQ(synth_forward(s, other, junk, 5, 0, &e), DSV3_OK);
    CHECK_EQ(synth_forward(s, got, token + 12, S - 12, 1, &e), DSV3_OK);
    CHECK(memcmp(got, want + 12 * V, (S - 12) * row) == 0);
    CHECK_EQ(dsv3_cache_truncate(&s->caches[0], 12, NULL), DSV3_OK);
    CHECK_EQ(synth_forward(s, got, token + 12, S - 12, 0, &e), DSV3_OK);
    CHECK(memcmp(got, want + 12 * V, (S - 12) * row) == 0);
    CHECK_EQ(dsv3_cache_copy(&s->caches[0], &s->caches[0], NULL), DSV3_OK);
    CHECK_EQ(s->caches[0].length, S);
    free(want), free(got), free(other);
    synth_close(s);
}

/* Three sequences that began at different times, rows mixed in one call, positions given or not. */
static void test_mixed_batch(int which, int form) {
    enum { N = 3 };
    static const size_t before[N] = {0, 5, 11}, rows[N] = {13, 1, 7};
    synth *s = open_form(which, 53, form);
    size_t V = (size_t)s->config.vocab_size, n = logits_bytes(s, S), row = V * sizeof(float);
    float *want[N], *got = (float *)test_alloc(n);
    int32_t token[N][S], batch_token[S], batch_sequence[S], batch_position[S];
    dsv3_batch batch;
    dsv3_error e;
    synth_run(s, S, 1, N, S, DSV3_F32);
    for (int i = 0; i < N; i++) {
        want[i] = (float *)test_alloc(n);
        reference(s, token[i], want[i], 100 + (uint64_t)i);
    }
    for (int given = 0; given < 2; given++) {
        size_t done[N] = {0, 0, 0}, total = 0;
        for (int i = 0; i < N; i++) {
            dsv3_cache_truncate(&s->caches[i], 0, NULL);
            if (before[i] > 0) CHECK_EQ(synth_forward(s, got, token[i], before[i], i, &e), DSV3_OK);
        }
        while (total < rows[0] + rows[1] + rows[2]) {
            size_t i = (size_t)(test_random() % N);
            if (done[i] == rows[i]) continue;
            batch_position[total] = (int32_t)(before[i] + done[i]);
            batch_token[total] = token[i][before[i] + done[i]];
            batch_sequence[total++] = (int32_t)i;
            done[i]++;
        }
        memset(&batch, 0, sizeof batch);
        batch.rows = batch.outputs = total;
        batch.token = batch_token;
        batch.sequence = batch_sequence;
        batch.position = given ? batch_position : NULL;
        CHECK_EQ(dsv3_forward(&s->context, got, &s->model, s->caches, N, &batch, &s->ws, &e), DSV3_OK);
        for (size_t t = 0; t < total; t++) {
            CHECK(memcmp(got + t * V, want[batch_sequence[t]] + (size_t)batch_position[t] * V, row) == 0);
        }
        for (int i = 0; i < N; i++) CHECK_EQ(s->caches[i].length, before[i] + rows[i]);
    }
    for (int i = 0; i < N; i++) free(want[i]);
    free(got);
    synth_close(s);
}

/* ---- Outputs */

static void test_outputs(void) {
    static const int32_t output[] = {5, 0, 5, 7, 3};
    synth *s = open_form(SYNTH_V3, 54, DSV3_ATTENTION_ABSORBED);
    size_t V = (size_t)s->config.vocab_size, n = logits_bytes(s, S), row = V * sizeof(float);
    float *want = (float *)test_alloc(n), *got = (float *)test_alloc(5 * row); /* exactly what is asked for */
    int32_t token[S];
    dsv3_batch batch;
    dsv3_error e;
    memset(&batch, 0, sizeof batch);
    synth_run(s, S, 1, 1, S, DSV3_F32);
    reference(s, token, want, 10);
    batch.rows = 8;
    batch.token = token;
    batch.outputs = 5;
    batch.output = output; /* in the order of the list, repetitions too */
    CHECK_EQ(dsv3_forward(&s->context, got, &s->model, s->caches, 1, &batch, &s->ws, &e), DSV3_OK);
    for (size_t i = 0; i < 5; i++) CHECK(memcmp(got + i * V, want + (size_t)output[i] * V, row) == 0);
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
    batch.output = NULL; /* the last ones */
    batch.outputs = 3;
    CHECK_EQ(dsv3_forward(&s->context, got, &s->model, s->caches, 1, &batch, &s->ws, &e), DSV3_OK);
    CHECK(memcmp(got, want + 5 * V, 3 * row) == 0);
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
    batch.outputs = 0; /* none: the cache is filled all the same */
    CHECK_EQ(dsv3_forward(&s->context, NULL, &s->model, s->caches, 1, &batch, &s->ws, &e), DSV3_OK);
    CHECK_EQ(s->caches[0].length, 8);
    CHECK_EQ(synth_forward(s, got, token + 8, 5, 0, NULL), DSV3_OK);
    CHECK(memcmp(got, want + 8 * V, 5 * row) == 0);
    free(want), free(got);
    synth_close(s);
}

/* ---- Whatever the workspace holds before a call, and however a cache was filled before */

static void test_dirty_workspace(int which, int form) {
    synth *s = open_form(which, 55, form);
    size_t n = logits_bytes(s, S);
    float *want = (float *)test_alloc(n), *got = (float *)test_alloc(n);
    int32_t token[S];
    synth_run(s, S, 2, 1, S, DSV3_F32);
    memset(s->ws_memory, 0, s->ws_bytes);
    reference(s, token, want, 11);
    for (int pattern = 0; pattern < 4; pattern++) {
        uint32_t word[4] = {0xFFFFFFFFu, 0x7FC00000u, 0x7F800000u, 0};
        for (size_t i = 0; i + 4 <= s->ws_bytes; i += 4) {
            word[3] = (uint32_t)test_random();
            memcpy((unsigned char *)s->ws_memory + i, &word[pattern], 4);
        }
        for (size_t i = 0; i + 4 <= s->cache_bytes; i += 4) {
            memcpy((unsigned char *)s->cache_memory[0] + i, &word[pattern], 4);
        }
        CHECK_EQ(synth_forward(s, got, token, S, 0, NULL), DSV3_OK);
        CHECK(memcmp(got, want, n) == 0);
        dsv3_cache_truncate(&s->caches[0], 0, NULL);
    }
    free(want), free(got);
    synth_close(s);
}

/* ---- Bad calls. Each is refused with its code and name, before anything is computed: no byte of any cache moves. */

typedef struct bad_call {
    synth *s;
    dsv3_batch batch;
    dsv3_context *context;
    float *logits;
    dsv3_model *model;
    dsv3_cache *caches;
    size_t n_caches;
    dsv3_workspace *ws;
    unsigned char *before[3];
} bad_call;

static void snapshot(bad_call *c, int check) {
    for (size_t i = 0; i < 3; i++) {
        if (check) CHECK(memcmp(c->before[i], c->s->cache_memory[i], c->s->cache_bytes) == 0);
        memcpy(c->before[i], c->s->cache_memory[i], c->s->cache_bytes);
    }
}

static void refuse(bad_call *c, int code, const char *name, int line) {
    size_t length[3];
    dsv3_error e;
    dsv3_result result;
    char text[300], message[300];
    for (int i = 0; i < 3; i++) length[i] = c->s->caches[i].length;
    memset(&e, 0xFF, sizeof e);
    result = dsv3_forward(c->context, c->logits, c->model, c->caches, c->n_caches, &c->batch, c->ws, &e);
    snprintf(message, sizeof message, "got %d \"%s\", want %d \"%s\"", (int)result, e.name, code, name);
    test_count(result == code && e.code == code && strcmp(e.name, name) == 0, __FILE__, line, message);
    dsv3_error_text(&e, text, sizeof text);
    CHECK(strlen(text) > strlen(name) + 5);
    result = dsv3_forward(c->context, c->logits, c->model, c->caches, c->n_caches, &c->batch, c->ws, NULL);
    CHECK_EQ(result, code);
    for (int i = 0; i < 3; i++) CHECK_EQ(c->s->caches[i].length, length[i]);
    snapshot(c, 1);
}

#define REFUSE(code, name) refuse(&c, code, name, __LINE__)

static void test_bad_calls(void) {
    enum { ROWS = 6 };
    synth *s = open_form(SYNTH_V3, 56, DSV3_ATTENTION_ABSORBED);
    int32_t V = s->config.vocab_size;
    int32_t token[ROWS + 1] = {4, 3, 2, 1, 0, 7, 8}, sequence[ROWS + 1] = {0, 1, 0, 2, 1, 0, 0};
    int32_t position[ROWS] = {3, 0, 4, 7, 1, 5}, output[3] = {0, 5, 2};
    float *logits = (float *)test_alloc(logits_bytes(s, ROWS));
    dsv3_cache foreign;
    bad_call c, good;
    synth_run(s, ROWS, 2, 3, 9, DSV3_F32);
    memset(&c, 0, sizeof c);
    c.s = s;
    for (int i = 0; i < 3; i++) c.before[i] = (unsigned char *)test_alloc(s->cache_bytes);
    CHECK_EQ(synth_forward(s, logits, token, 3, 0, NULL), DSV3_OK); /* lengths 3, 0, 7 */
    CHECK_EQ(synth_forward(s, logits, token, 6, 2, NULL), DSV3_OK);
    CHECK_EQ(synth_forward(s, logits, token, 1, 2, NULL), DSV3_OK);
    c.context = &s->context, c.logits = logits, c.model = &s->model, c.caches = s->caches, c.n_caches = 3;
    c.ws = &s->ws;
    c.batch.rows = ROWS, c.batch.token = token, c.batch.sequence = sequence, c.batch.position = position;
    c.batch.outputs = 3, c.batch.output = output;
    snapshot(&c, 0);
    good = c;
    /* a NULL in the place of each pointer that must not be one */
    c.context = NULL, REFUSE(DSV3_ERR_ARG, "context"), c = good;
    c.model = NULL, REFUSE(DSV3_ERR_ARG, "model"), c = good;
    c.caches = NULL, REFUSE(DSV3_ERR_ARG, "caches"), c = good;
    c.ws = NULL, REFUSE(DSV3_ERR_ARG, "workspace"), c = good;
    c.batch.token = NULL, REFUSE(DSV3_ERR_ARG, "token"), c = good;
    c.logits = NULL, REFUSE(DSV3_ERR_ARG, "logits"), c = good;
    CHECK_EQ(dsv3_forward(&s->context, logits, &s->model, s->caches, 3, NULL, &s->ws, NULL), DSV3_ERR_ARG);
    /* sizes */
    c.batch.rows = 0, c.batch.outputs = 0, REFUSE(DSV3_ERR_ARG, "rows"), c = good;
    c.batch.rows = ROWS + 1, REFUSE(DSV3_ERR_MEMORY, "rows"), c = good;
    c.batch.rows = SIZE_MAX, REFUSE(DSV3_ERR_MEMORY, "rows"), c = good;
    s->context.threads = 3, REFUSE(DSV3_ERR_MEMORY, "threads"), s->context.threads = 1;
    c.batch.outputs = ROWS + 1, REFUSE(DSV3_ERR_ARG, "outputs"), c = good;
    c.batch.output = NULL, c.batch.outputs = ROWS + 1, REFUSE(DSV3_ERR_ARG, "outputs"), c = good;
    c.batch.outputs = SIZE_MAX, REFUSE(DSV3_ERR_ARG, "outputs"), c = good;
    /* indices */
    output[1] = ROWS, REFUSE(DSV3_ERR_ARG, "output[1]"), output[1] = -1, REFUSE(DSV3_ERR_ARG, "output[1]");
    output[1] = INT32_MIN, REFUSE(DSV3_ERR_ARG, "output[1]"), output[1] = 5;
    sequence[4] = 3, REFUSE(DSV3_ERR_ARG, "sequence[4]"), sequence[4] = -1, REFUSE(DSV3_ERR_ARG, "sequence[4]");
    sequence[4] = INT32_MAX, REFUSE(DSV3_ERR_ARG, "sequence[4]"), sequence[4] = 1;
    c.n_caches = 2, REFUSE(DSV3_ERR_ARG, "sequence[3]"), c = good;
    c.n_caches = 0, REFUSE(DSV3_ERR_ARG, "n_caches"), c = good;
    c.n_caches = 0, c.batch.sequence = NULL, REFUSE(DSV3_ERR_ARG, "n_caches"), c = good;
    /* tokens */
    token[5] = V, REFUSE(DSV3_ERR_TOKEN, "token[5]"), token[5] = -1, REFUSE(DSV3_ERR_TOKEN, "token[5]");
    token[5] = INT32_MIN, REFUSE(DSV3_ERR_TOKEN, "token[5]"), token[5] = INT32_MAX;
    REFUSE(DSV3_ERR_TOKEN, "token[5]"), token[5] = 7;
    token[0] = V, REFUSE(DSV3_ERR_TOKEN, "token[0]"), token[0] = V - 1;
    /* positions */
    position[2] = 5, REFUSE(DSV3_ERR_POSITION, "position[2]"), position[2] = 3,
    REFUSE(DSV3_ERR_POSITION, "position[2]");
    position[2] = -1, REFUSE(DSV3_ERR_POSITION, "position[2]"), position[2] = 4;
    position[1] = INT32_MIN, REFUSE(DSV3_ERR_POSITION, "position[1]"), position[1] = 0;
    position[0] = 2, REFUSE(DSV3_ERR_POSITION, "position[0]"), position[0] = 3;
    position[3] = 9, REFUSE(DSV3_ERR_POSITION, "position[3]"), position[3] = 7;
    /* a full cache: sequence 2 has room for 2 more */
    sequence[0] = sequence[2] = sequence[3] = 2;
    c.batch.position = NULL, REFUSE(DSV3_ERR_FULL, "position[3]");
    position[0] = 7, position[2] = 8, position[3] = 9;
    c.batch.position = position, REFUSE(DSV3_ERR_FULL, "position[3]"), c = good;
    sequence[0] = sequence[2] = 0, position[0] = 3, position[2] = 4, position[3] = 7;
    /* a cache of another model */
    foreign = s->caches[1];
    s->caches[1].width++, REFUSE(DSV3_ERR_MISMATCH, "caches[1]"), s->caches[1] = foreign;
    s->caches[1].layers--, REFUSE(DSV3_ERR_MISMATCH, "caches[1]"), s->caches[1] = foreign;
    /* and after all that, the good call */
    CHECK_EQ(dsv3_forward(c.context, logits, c.model, c.caches, 3, &c.batch, c.ws, NULL), DSV3_OK);
    CHECK(s->caches[0].length == 6 && s->caches[1].length == 2 && s->caches[2].length == 8);
    for (int i = 0; i < 3; i++) free(c.before[i]);
    free(logits);
    synth_close(s);
}

/* The last position of a cache can be filled; one more cannot. */
static void test_full_cache(void) {
    synth *s = open_form(SYNTH_DENSE, 57, DSV3_ATTENTION_ABSORBED);
    float *logits = (float *)test_alloc(logits_bytes(s, 8));
    int32_t token[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    dsv3_error e;
    synth_run(s, 8, 1, 1, 7, DSV3_BF16);
    CHECK_EQ(synth_forward(s, logits, token, 8, 0, &e), DSV3_ERR_FULL);
    CHECK(strcmp(e.name, "position[7]") == 0 && e.expected[0] == 0 && e.expected[1] == 6 && e.found[0] == 7);
    CHECK_EQ(s->caches[0].length, 0);
    CHECK_EQ(synth_forward(s, logits, token, 6, 0, &e), DSV3_OK);
    CHECK_EQ(synth_forward(s, logits, token, 2, 0, &e), DSV3_ERR_FULL);
    CHECK_EQ(synth_forward(s, logits, token, 1, 0, &e), DSV3_OK);
    CHECK_EQ(s->caches[0].length, 7);
    CHECK_EQ(synth_forward(s, logits, token, 1, 0, &e), DSV3_ERR_FULL);
    CHECK_EQ(s->caches[0].length, 7);
    free(logits);
    synth_close(s);
}

/* ---- NaN and infinity */

/* Which rows choose expert `expert` in layer `layer`: first[0] is the first row, -1 if none. */
typedef struct watch {
    int layer, calls[16], hidden_calls, routing_calls, wrong;
    size_t n;
    const synth *s;
    int first_row[16][64]; /* [layer][expert] */
} watch;

static void watch_routing(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                          size_t n) {
    watch *w = (watch *)user;
    const dsv3_config *c = &w->s->config;
    int32_t K = c->num_experts_per_tok, E = c->n_routed_experts;
    w->routing_calls++;
    w->wrong += layer != w->layer || !dsv3_config_is_moe(c, layer) || n != w->n; /* before the layer's hidden state */
    for (int e = 0; e < E; e++) w->first_row[layer][e] = -1;
    for (int32_t i = (int32_t)n * K - 1; i >= 0; i--) {
        int32_t e = idx[i];
        w->wrong += e < 0 || e >= E || !(gate[i] > 0);
        w->wrong += !(score[i / K * E + e] > 0 && score[i / K * E + e] < 1);
        w->first_row[layer][e] = i / K;
    }
}

static void watch_hidden(void *user, int32_t layer, const float *x, size_t n) {
    watch *w = (watch *)user;
    w->hidden_calls++;
    w->wrong += layer != (w->layer < w->s->config.num_hidden_layers ? w->layer : -1) || n != w->n || x == NULL;
    w->layer++;
}

static void watch_begin(watch *w, synth *s, size_t n) {
    memset(w, 0, sizeof *w);
    w->s = s;
    w->n = n;
    s->context.observer.user = w;
    s->context.observer.hidden = watch_hidden;
    s->context.observer.routing = watch_routing;
}

/* One expert of one layer has a NaN weight: the first row that chose it is named; nobody's length moves. */
static void test_nan_weight(void) {
    synth *s = open_form(SYNTH_V3, 58, DSV3_ATTENTION_ABSORBED);
    float *want = (float *)test_alloc(logits_bytes(s, S)), *got = (float *)test_alloc(logits_bytes(s, S));
    int32_t token[S];
    int tried = 0;
    watch w;
    dsv3_error e;
    synth_run(s, S, 1, 2, S, DSV3_F32);
    watch_begin(&w, s, S);
    reference(s, token, want, 12);
    memset(&s->context.observer, 0, sizeof s->context.observer);
    for (int layer = 1; layer <= 3; layer += 2) { /* 3 is the last one: no router comes after it */
        for (int expert = 0; expert < 16; expert++) {
            synth_tensor *t = synth_get(s, layer, expert, "down_proj.weight");
            int row = w.first_row[layer][expert];
            float old = (float)t->value[5];
            char name[20];
            if (row <= 0) continue;
            snprintf(name, sizeof name, "row[%d]", row);
            tried++;
            synth_set(t, 5, (float)NAN);
            CHECK_EQ(synth_forward(s, got, token, S, 0, &e), DSV3_ERR_NAN);
            CHECK(strcmp(e.name, name) == 0);
            CHECK_EQ(s->caches[0].length, 0);
            CHECK_EQ(synth_forward(s, got, token, (size_t)row, 1, &e), DSV3_OK); /* the rows before it are sound */
            CHECK(memcmp(got, want, logits_bytes(s, (size_t)row)) == 0);
            dsv3_cache_truncate(&s->caches[1], 0, NULL);
            synth_set(t, 5, old);
        }
    }
    CHECK(tried >= 4);
    CHECK_EQ(synth_forward(s, got, token, S, 0, &e), DSV3_OK);
    CHECK(memcmp(got, want, logits_bytes(s, S)) == 0);
    free(want), free(got);
    synth_close(s);
}

/* One token's embedding is infinite or NaN. The call that has it fails and names the row; the other sequence of the
 * same call goes on afterwards as if nothing had been. */
static void test_bad_embedding(int which, float bad) {
    enum { BAD = 17, N = 6 };
    synth *s = open_form(which, 59, DSV3_ATTENTION_ABSORBED);
    size_t V = (size_t)s->config.vocab_size, d = (size_t)s->config.hidden_size;
    float *want = (float *)test_alloc(logits_bytes(s, S)), *got = (float *)test_alloc(logits_bytes(s, S));
    int32_t token[S], mixed[N], sequence[N] = {0, 1, 0, 1, 0, 1};
    dsv3_batch batch;
    dsv3_error e;
    memset(&batch, 0, sizeof batch);
    synth_run(s, S, 1, 2, S, DSV3_F32);
    synth_set(synth_get(s, -1, -1, "model.embed_tokens.weight"), BAD * d + 3, bad);
    test_state = 13;
    for (size_t i = 0; i < S; i++) {
        do synth_tokens(token + i, 1, s->config.vocab_size);
        while (token[i] == BAD);
    }
    CHECK_EQ(synth_forward(s, want, token, S, 0, &e), DSV3_OK);
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
    CHECK_EQ(synth_forward(s, got, token, 4, 0, &e), DSV3_OK);
    CHECK_EQ(synth_forward(s, got, token, 2, 1, &e), DSV3_OK);
    for (int i = 0; i < N; i++) mixed[i] = i % 2 == 0 ? token[4 + i / 2] : i == 3 ? BAD : 1;
    batch.rows = batch.outputs = N;
    batch.token = mixed;
    batch.sequence = sequence;
    CHECK_EQ(dsv3_forward(&s->context, got, &s->model, s->caches, 2, &batch, &s->ws, &e), DSV3_ERR_NAN);
    CHECK(strcmp(e.name, "row[3]") == 0);
    CHECK(s->caches[0].length == 4 && s->caches[1].length == 2);
    CHECK_EQ(synth_forward(s, got, token + 4, S - 4, 0, &e), DSV3_OK);
    CHECK(memcmp(got, want + 4 * V, logits_bytes(s, S - 4)) == 0);
    CHECK_EQ(synth_forward(s, got, token + 2, 3, 1, &e), DSV3_OK); /* and so does the one that failed */
    CHECK(memcmp(got, want + 2 * V, logits_bytes(s, 3)) == 0);
    free(want), free(got);
    synth_close(s);
}

/* ---- The observer */

static void test_observer(void) {
    static const int which[] = {SYNTH_V3, SYNTH_FREQ, SYNTH_DENSE, SYNTH_MTP};
    for (size_t i = 0; i < 4; i++) {
        synth *s = open_form(which[i], 60, DSV3_ATTENTION_ABSORBED);
        float *want = (float *)test_alloc(logits_bytes(s, S)), *got = (float *)test_alloc(logits_bytes(s, S));
        int32_t token[S];
        int L = s->config.num_hidden_layers, moe = 0;
        watch w;
        for (int l = 0; l < L; l++) moe += dsv3_config_is_moe(&s->config, l) != 0;
        synth_run(s, S, 1, 1, S, DSV3_F32);
        reference(s, token, want, 14);
        watch_begin(&w, s, 5);
        CHECK_EQ(synth_forward(s, got, token, 5, 0, NULL), DSV3_OK);
        CHECK_EQ(w.hidden_calls, L + 1);
        CHECK_EQ(w.routing_calls, moe);
        CHECK_EQ(w.wrong, 0);
        CHECK(memcmp(got, want, logits_bytes(s, 5)) == 0); /* watching changes nothing */
        watch_begin(&w, s, S - 5);
        s->context.observer.routing = NULL;
        CHECK_EQ(synth_forward(s, got, token + 5, S - 5, 0, NULL), DSV3_OK);
        CHECK(w.hidden_calls == L + 1 && w.routing_calls == 0 && w.wrong == 0);
        free(want), free(got);
        synth_close(s);
    }
}

/* ---- Replay: the observer's choose decides the routing */

typedef enum replay_mode {
    REPLAY_OFFERED, /* takes what it is offered, and keeps it */
    REPLAY_KEPT,    /* puts in what was kept */
    REPLAY_NEXT,    /* every expert's next one */
    REPLAY_BAD      /* what was kept, but for one place */
} replay_mode;

typedef struct replay {
    const synth *s;
    replay_mode mode;
    size_t first;           /* row of idx that row 0 of the call is */
    int32_t idx[8][S * 8];  /* [layer][row, K] what was kept or put in */
    float gate[8][S * 8];   /* what routing saw */
    int offers, seen, open; /* calls of choose and routing; open: a choice that routing has not yet seen */
    int same, wrong;        /* offers equal to what was kept; faults */
    int bad_layer;
    size_t bad_at;
    int32_t bad;
} replay;

static void replay_choose(void *user, int32_t layer, int32_t *idx, const float *score, size_t n) {
    replay *r = (replay *)user;
    size_t K = (size_t)r->s->config.num_experts_per_tok;
    int32_t E = r->s->config.n_routed_experts, *kept = r->idx[layer] + r->first * K;
    r->wrong += !dsv3_config_is_moe(&r->s->config, layer) || r->open != 0 || score == NULL;
    r->open = 1;
    r->offers++;
    r->same += memcmp(idx, kept, n * K * sizeof *idx) == 0;
    for (size_t i = 0; i < n * K && r->mode == REPLAY_NEXT; i++) idx[i] = (idx[i] + 1) % E;
    if (r->mode == REPLAY_OFFERED || r->mode == REPLAY_NEXT) memcpy(kept, idx, n * K * sizeof *idx);
    if (r->mode == REPLAY_KEPT || r->mode == REPLAY_BAD) memcpy(idx, kept, n * K * sizeof *idx);
    if (r->mode == REPLAY_BAD && layer == r->bad_layer) idx[r->bad_at] = r->bad;
}

/* Sees the choice that was made, with the weights of exactly that choice. */
static void replay_routing(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                           size_t n) {
    replay *r = (replay *)user;
    size_t K = (size_t)r->s->config.num_experts_per_tok;
    float want[S * 8];
    r->wrong += r->open != 1;
    r->open = 0;
    r->seen++;
    r->wrong += memcmp(idx, r->idx[layer] + r->first * K, n * K * sizeof *idx) != 0;
    r->wrong += dsv3_router_weights(&r->s->config, want, idx, score, n, NULL) != DSV3_OK;
    r->wrong += memcmp(want, gate, n * K * sizeof *gate) != 0;
    memcpy(r->gate[layer] + r->first * K, gate, n * K * sizeof *gate);
}

static void replay_begin(replay *r, synth *s, replay_mode mode) {
    r->s = s;
    r->mode = mode;
    r->first = 0;
    r->offers = r->seen = r->open = r->same = r->wrong = 0;
    s->context.observer.user = r;
    s->context.observer.choose = replay_choose;
    s->context.observer.routing = replay_routing;
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
}

/* Other biases: by itself the model would now choose otherwise. */
static void scramble_biases(synth *s) {
    for (size_t i = 0; i < s->count; i++) {
        synth_tensor *t = &s->tensors[i];
        if (strstr(t->info.name, "e_score_correction_bias") == NULL) continue;
        for (size_t e = 0; e < t->t.cols; e++) synth_set(t, e, test_uniform(-2, 2));
    }
}

static void test_replay(int which) {
    synth *s = open_form(which, 64, DSV3_ATTENTION_ABSORBED);
    size_t n = logits_bytes(s, S), V = (size_t)s->config.vocab_size;
    float *want = (float *)test_alloc(n), *got = (float *)test_alloc(n), gate[8][S * 8];
    int32_t token[S];
    int moe = 0;
    replay *r = (replay *)test_alloc(sizeof *r);
    memset(r, 0, sizeof *r);
    for (int l = 0; l < s->config.num_hidden_layers; l++) moe += dsv3_config_is_moe(&s->config, l) != 0;
    synth_run(s, S, 1, 1, S, DSV3_F32);
    reference(s, token, want, 16);
    replay_begin(r, s, REPLAY_OFFERED); /* a hook that changes nothing changes nothing */
    CHECK_EQ(synth_forward(s, got, token, S, 0, NULL), DSV3_OK);
    CHECK(memcmp(got, want, n) == 0);
    CHECK(r->offers == moe && r->seen == moe && r->wrong == 0);
    memcpy(gate, r->gate, sizeof gate);
    replay_begin(r, s, REPLAY_KEPT);
    CHECK_EQ(synth_forward(s, got, token, S, 0, NULL), DSV3_OK);
    CHECK(memcmp(got, want, n) == 0 && memcmp(gate, r->gate, sizeof gate) == 0);
    CHECK(r->offers == moe && r->seen == moe && r->same == moe && r->wrong == 0);
    if (s->config.topk_method == DSV3_NOAUX_TC) {
        scramble_biases(s);
        replay_begin(r, s, REPLAY_KEPT); /* the choice is replayed, token by token, and so are all bits */
        for (size_t t = 0; t < S; t++) {
            r->first = t;
            CHECK_EQ(synth_forward(s, got + t * V, token + t, 1, 0, NULL), DSV3_OK);
        }
        CHECK(memcmp(got, want, n) == 0 && memcmp(gate, r->gate, sizeof gate) == 0);
        CHECK(r->same < r->offers && r->offers == moe * S && r->wrong == 0);
        s->context.observer.choose = NULL; /* and this is what the biases would have done */
        s->context.observer.routing = NULL;
        dsv3_cache_truncate(&s->caches[0], 0, NULL);
        CHECK_EQ(synth_forward(s, got, token, S, 0, NULL), DSV3_OK);
        CHECK(memcmp(got, want, n) != 0);
    }
    replay_begin(r, s, REPLAY_NEXT); /* a forced routing is seen, weighted and felt */
    CHECK_EQ(synth_forward(s, got, token, S, 0, NULL), DSV3_OK);
    CHECK(memcmp(got, want, n) != 0);
    CHECK(r->offers == moe && r->seen == moe && r->wrong == 0);
    free(want), free(got), free(r);
    synth_close(s);
}

/* A choice that is none ends the call, in whichever layer and row; the cache is as long as before. */
static void test_bad_replay(void) {
    static const int32_t bad[] = {-1, 16, INT32_MIN, INT32_MAX};
    static const int layers[] = {1, 3}; /* the first with experts, and the last */
    static const size_t places[] = {0, 9, 4 * (S - 5) - 1};
    synth *s = open_form(SYNTH_V3, 65, DSV3_ATTENTION_ABSORBED);
    size_t n = logits_bytes(s, S), V = (size_t)s->config.vocab_size;
    float *want = (float *)test_alloc(n), *got = (float *)test_alloc(n);
    int32_t token[S];
    dsv3_error e;
    replay *r = (replay *)test_alloc(sizeof *r);
    memset(r, 0, sizeof *r);
    synth_run(s, S, 1, 1, S, DSV3_F32);
    reference(s, token, want, 17);
    replay_begin(r, s, REPLAY_OFFERED);
    CHECK_EQ(synth_forward(s, got, token, 5, 0, NULL), DSV3_OK);
    r->first = 5;
    CHECK_EQ(synth_forward(s, got, token + 5, S - 5, 0, NULL), DSV3_OK);
    r->mode = REPLAY_BAD;
    dsv3_cache_truncate(&s->caches[0], 5, NULL);
    for (int l = 0; l < 2; l++) {
        for (size_t p = 0; p < 3; p++) {
            for (size_t i = 0; i < 5; i++) {
                const int32_t *kept = r->idx[layers[l]] + 5 * 4;
                r->bad_layer = layers[l], r->bad_at = places[p];
                r->bad = i < 4 ? bad[i] : kept[places[p] % 4 == 0 ? places[p] + 3 : places[p] - 1]; /* or twice */
                r->seen = r->open = 0;
                CHECK_EQ(synth_forward(s, got, token + 5, S - 5, 0, &e), DSV3_ERR_ARG);
                CHECK_EQ(e.code, DSV3_ERR_ARG);
                CHECK_EQ(synth_forward(s, got, token + 5, S - 5, 0, NULL), DSV3_ERR_ARG);
                CHECK_EQ(s->caches[0].length, 5);
                CHECK_EQ(r->seen, 2 * (layers[l] - 1)); /* nobody sees the bad one */
            }
        }
    }
    r->mode = REPLAY_KEPT, r->wrong = r->open = 0;
    CHECK_EQ(synth_forward(s, got, token + 5, S - 5, 0, NULL), DSV3_OK);
    CHECK(memcmp(got, want + 5 * V, logits_bytes(s, S - 5)) == 0 && r->wrong == 0);
    free(want), free(got), free(r);
    synth_close(s);
}

/* ---- The last hidden state that the observer sees is what the logits are made from */

static float seen_hidden[S * 64];

static void keep_hidden(void *user, int32_t layer, const float *x, size_t n) {
    const synth *s = (const synth *)user;
    if (layer == -1) memcpy(seen_hidden, x, n * (size_t)s->config.hidden_size * sizeof *x);
}

static void test_last_hidden(void) {
    synth *s = open_form(SYNTH_V3, 61, DSV3_ATTENTION_ABSORBED);
    size_t V = (size_t)s->config.vocab_size, d = (size_t)s->config.hidden_size;
    float *got = (float *)test_alloc(logits_bytes(s, S));
    double *want = synth_doubles(S * V), u[64];
    int32_t token[S];
    synth_run(s, S, 1, 1, S, DSV3_F32);
    reference(s, token, got, 15);
    s->context.observer.user = s;
    s->context.observer.hidden = keep_hidden;
    CHECK_EQ(synth_forward(s, got, token, S, 0, NULL), DSV3_OK);
    for (size_t t = 0; t < S; t++) {
        for (size_t i = 0; i < d; i++) u[i] = (double)seen_hidden[t * d + i];
        oracle_linear(want + t * V, synth_get(s, -1, -1, "lm_head.weight")->value, u, V, d);
    }
    CHECK_CLOSE(got, want, S * V, 1e-6);
    free(got), free(want);
    synth_close(s);
}

/* ---- Setting up caches and workspaces wrongly */

static int untouched(const unsigned char *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] != 0x5A) return 0;
    }
    return 1;
}

static void test_cache_setup(void) {
    dsv3_config c = synth_config(SYNTH_V3, NULL), bad = c;
    dsv3_cache cache;
    size_t need = 0;
    unsigned char *memory;
    bad.kv_lora_rank = 0;
    CHECK_EQ(dsv3_cache_size(&c, 5, DSV3_F32, &need, NULL), DSV3_OK);
    memory = (unsigned char *)synth_alloc(need + 64);
    memset(memory, 0x5A, need + 64);
    CHECK_EQ(dsv3_cache_init(&c, NULL, 5, DSV3_F32, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_init(NULL, &cache, 5, DSV3_F32, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_init(&bad, &cache, 5, DSV3_F32, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_init(&c, &cache, 0, DSV3_F32, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_init(&c, &cache, (size_t)DSV3_MAX_SEQ + 1, DSV3_F32, memory, need, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_cache_init(&c, &cache, 5, DSV3_F16, memory, need, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_cache_init(&c, &cache, 5, (dsv3_type)9, memory, need, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_cache_init(&c, &cache, 5, DSV3_F32, NULL, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_init(&c, &cache, 5, DSV3_F32, memory, need - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_cache_init(&c, &cache, 5, DSV3_F32, memory, 0, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_cache_init(&c, &cache, 6, DSV3_F32, memory, need, NULL), DSV3_ERR_MEMORY);
    for (size_t shift = 1; shift < DSV3_ALIGN; shift *= 2) {
        CHECK_EQ(dsv3_cache_init(&c, &cache, 5, DSV3_F32, memory + shift, need, NULL), DSV3_ERR_ALIGN);
    }
    CHECK_EQ(dsv3_cache_init(&c, &cache, 5, DSV3_F32, memory, need, NULL), DSV3_OK);
    CHECK(untouched(memory, need + 64)); /* a cache need not even be cleared */
    CHECK(cache.length == 0 && cache.capacity == 5 && cache.layers == 4 && cache.width == 36);
    CHECK((unsigned char *)cache.data + 4u * 5 * 36 * 4 <= memory + need);
    CHECK_EQ(dsv3_cache_truncate(&cache, 0, NULL), DSV3_OK);
    CHECK_EQ(dsv3_cache_truncate(&cache, 1, NULL), DSV3_ERR_ARG);
    cache.length = 4;
    CHECK_EQ(dsv3_cache_truncate(&cache, 5, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_truncate(&cache, SIZE_MAX, NULL), DSV3_ERR_ARG);
    CHECK_EQ(cache.length, 4);
    CHECK_EQ(dsv3_cache_truncate(&cache, 4, NULL), DSV3_OK);
    CHECK_EQ(dsv3_cache_truncate(NULL, 0, NULL), DSV3_ERR_ARG);
    synth_release(memory);
}

static void test_cache_copy(void) {
    synth *s = open_form(SYNTH_V3, 62, DSV3_ATTENTION_ABSORBED);
    dsv3_cache small, other;
    float *logits = (float *)test_alloc(logits_bytes(s, 5));
    int32_t token[5] = {5, 4, 3, 2, 1};
    size_t bytes = 0;
    void *memory;
    synth_run(s, 5, 1, 2, 9, DSV3_F32);
    CHECK_EQ(synth_forward(s, logits, token, 5, 0, NULL), DSV3_OK);
    CHECK_EQ(dsv3_cache_copy(NULL, &s->caches[0], NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_copy(&s->caches[1], NULL, NULL), DSV3_ERR_ARG);
    other = s->caches[1];
    other.width--;
    CHECK_EQ(dsv3_cache_copy(&other, &s->caches[0], NULL), DSV3_ERR_MISMATCH);
    other = s->caches[1], other.layers++;
    CHECK_EQ(dsv3_cache_copy(&other, &s->caches[0], NULL), DSV3_ERR_MISMATCH);
    other = s->caches[1], other.type = DSV3_BF16;
    CHECK_EQ(dsv3_cache_copy(&other, &s->caches[0], NULL), DSV3_ERR_MISMATCH);
    CHECK_EQ(s->caches[1].length, 0);
    for (size_t capacity = 4; capacity <= 5; capacity++) { /* a shorter one will do when it holds what is filled */
        CHECK_EQ(dsv3_cache_size(&s->config, capacity, DSV3_F32, &bytes, NULL), DSV3_OK);
        memory = synth_alloc(bytes);
        CHECK_EQ(dsv3_cache_init(&s->config, &small, capacity, DSV3_F32, memory, bytes, NULL), DSV3_OK);
        CHECK_EQ(dsv3_cache_copy(&small, &s->caches[0], NULL), capacity == 4 ? DSV3_ERR_FULL : DSV3_OK);
        CHECK_EQ(small.length, capacity == 4 ? 0 : 5);
        if (capacity == 5) {
            CHECK_EQ(dsv3_cache_copy(&s->caches[1], &small, NULL), DSV3_OK);
            for (size_t l = 0; l < 4; l++) { /* there and back: the same rows, nothing else touched */
                const unsigned char *a = (const unsigned char *)s->caches[0].data + l * 9 * 36 * 4;
                const unsigned char *b = (const unsigned char *)s->caches[1].data + l * 9 * 36 * 4;
                CHECK(memcmp(a, b, 9u * 36 * 4) == 0);
            }
        }
        synth_release(memory);
    }
    free(logits);
    synth_close(s);
}

static void test_workspace_setup(void) {
    dsv3_config c = synth_config(SYNTH_V3, NULL), bad = c;
    dsv3_workspace ws;
    size_t need = 0;
    unsigned char *memory;
    bad.n_group = 3;
    CHECK_EQ(dsv3_workspace_size(&c, 5, 2, &need, NULL), DSV3_OK);
    memory = (unsigned char *)synth_alloc(need + 64);
    memset(memory, 0x5A, need + 64);
    CHECK_EQ(dsv3_workspace_init(&c, NULL, 5, 2, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_init(NULL, &ws, 5, 2, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_init(&bad, &ws, 5, 2, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 0, 2, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, 0, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, (size_t)DSV3_MAX_SEQ + 1, 2, memory, need, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, SIZE_MAX, memory, need, NULL), DSV3_ERR_OVERFLOW);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, 2, NULL, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, 2, memory, need - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, 2, memory, 0, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 6, 2, memory, need, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, 3, memory, need, NULL), DSV3_ERR_MEMORY);
    for (size_t shift = 1; shift < DSV3_ALIGN; shift *= 2) {
        CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, 2, memory + shift, need, NULL), DSV3_ERR_ALIGN);
    }
    CHECK_EQ(dsv3_workspace_init(&c, &ws, 5, 2, memory, need, NULL), DSV3_OK);
    CHECK(untouched(memory, need + 64));
    CHECK(ws.rows == 5 && ws.threads == 2);
    synth_release(memory);
}

/* A workspace and a cache of exactly the size asked for, at every legal beginning: nothing outside is written. */
static void test_exact_memory(void) {
    synth *s = open_form(SYNTH_V3, 63, DSV3_ATTENTION_ABSORBED);
    size_t ws_bytes = 0, cache_bytes = 0;
    float *logits = (float *)test_alloc(logits_bytes(s, 5));
    int32_t token[5] = {5, 4, 3, 2, 1};
    CHECK_EQ(dsv3_workspace_size(&s->config, 5, 1, &ws_bytes, NULL), DSV3_OK);
    CHECK_EQ(dsv3_cache_size(&s->config, 5, DSV3_BF16, &cache_bytes, NULL), DSV3_OK);
    for (size_t shift = 0; shift < 64; shift += DSV3_ALIGN) {
        unsigned char *a = (unsigned char *)synth_alloc(ws_bytes + 64);
        unsigned char *b = (unsigned char *)synth_alloc(cache_bytes + 64);
        dsv3_batch batch;
        dsv3_cache cache;
        dsv3_workspace ws;
        memset(a, 0x5A, ws_bytes + 64);
        memset(b, 0x5A, cache_bytes + 64);
        memset(&batch, 0, sizeof batch);
        batch.rows = batch.outputs = 5;
        batch.token = token;
        CHECK_EQ(dsv3_workspace_init(&s->config, &ws, 5, 1, a + shift, ws_bytes, NULL), DSV3_OK);
        CHECK_EQ(dsv3_cache_init(&s->config, &cache, 5, DSV3_BF16, b + shift, cache_bytes, NULL), DSV3_OK);
        CHECK_EQ(dsv3_forward(&s->context, logits, &s->model, &cache, 1, &batch, &ws, NULL), DSV3_OK);
        CHECK(untouched(a, shift) && untouched(a + shift + ws_bytes, 64 - shift));
        CHECK(untouched(b, shift) && untouched(b + shift + cache_bytes, 64 - shift));
        synth_release(a), synth_release(b);
    }
    free(logits);
    synth_close(s);
}

/* What only the end of a pass can see: a head with a NaN, and a residual so large that its squares overflow, which the
 * final norm would turn into zeros. */
static void test_bad_end(void) {
    synth *s = open_form(SYNTH_V3, 77, DSV3_ATTENTION_ABSORBED);
    float *got = (float *)test_alloc(logits_bytes(s, S));
    synth_tensor *head = synth_get(s, -1, -1, "lm_head.weight"),
                 *embed = synth_get(s, -1, -1, "model.embed_tokens.weight");
    int32_t token[3] = {1, 2, 3};
    dsv3_error e;
    float old = (float)head->value[9];
    synth_run(s, S, 1, 1, S, DSV3_F32);
    synth_set(head, 9, (float)NAN);
    CHECK_EQ(synth_forward(s, got, token, 3, 0, &e), DSV3_ERR_NAN);
    CHECK(strcmp(e.name, "logits") == 0 && e.numbers == DSV3_NUMBERS_WHERE && e.found[0] == 0);
    CHECK_EQ(s->caches[0].length, 0);
    synth_set(head, 9, old);
    CHECK_EQ(synth_forward(s, got, token, 3, 0, &e), DSV3_OK);
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
    synth_set(embed, 2 * (size_t)s->config.hidden_size, 1e22f);
    CHECK_EQ(synth_forward(s, got, token, 3, 0, &e), DSV3_ERR_NAN);
    CHECK(strcmp(e.name, "row[1]") == 0);
    free(got);
    synth_close(s);
}

/* A workspace laid out for other sizes would send writes anywhere: it is refused, whatever its own size. */
static void test_foreign_workspace(void) {
    synth *s = open_form(SYNTH_V3, 78, DSV3_ATTENTION_ABSORBED),
          *other = open_form(SYNTH_ODD, 78, DSV3_ATTENTION_ABSORBED);
    float *got = (float *)test_alloc(logits_bytes(s, S));
    int32_t token[1] = {1};
    dsv3_batch batch = {1, token, NULL, NULL, 1, NULL};
    dsv3_workspace none;
    dsv3_error e;
    synth_run(s, S, 1, 1, S, DSV3_F32);
    synth_run(other, S, 1, 1, S, DSV3_F32);
    CHECK_EQ(dsv3_forward(&s->context, got, &s->model, s->caches, 1, &batch, &other->ws, &e), DSV3_ERR_MISMATCH);
    CHECK(strcmp(e.name, "workspace") == 0);
    memset(&none, 0, sizeof none);
    CHECK_EQ(dsv3_forward(&s->context, got, &s->model, s->caches, 1, &batch, &none, &e), DSV3_ERR_ARG);
    CHECK(strcmp(e.why, "was not made by dsv3_workspace_init") == 0);
    CHECK_EQ(dsv3_states(&s->model, got, &s->ws, token, 1, &e), DSV3_ERR_ARG); /* of no call */
    CHECK_EQ(dsv3_forward(&s->context, got, &s->model, s->caches, 1, &batch, &s->ws, &e), DSV3_OK);
    free(got);
    synth_close(s);
    synth_close(other);
}

/* ---- DSV3_FAST from end to end: activations are rounded in front of weights of BF16, FP8, Q8_0 and Q4_0, and nowhere else */

static void test_fast(int which) {
    int types;
    dsv3_config c = synth_config(which, &types);
    synth *s = synth_open(&c, types, 51);
    size_t V = (size_t)c.vocab_size, different = 0;
    int rounds = types != SYNTH_F32 && types != SYNTH_F16;
    /* these two round what attention multiplies, too */
    rounds |= strcmp(s->context.backend, "avx512_bf16") == 0 || strcmp(s->context.backend, "amx") == 0;
    int32_t token[20];
    double most = 0, worst = 0;
    float *logits[2];
    synth_tokens(token, 20, c.vocab_size);
    for (int fast = 0; fast < 2; fast++) {
        logits[fast] = (float *)test_alloc(20 * V * sizeof(float));
        synth_run(s, 20, 1, 1, 20, DSV3_F32);
        s->context.attention = DSV3_ATTENTION_ABSORBED;
        s->context.compute = fast ? DSV3_FAST : DSV3_EXACT;
        CHECK_EQ(synth_forward(s, logits[fast], token, 20, 0, NULL), DSV3_OK);
    }
    for (size_t i = 0; i < 20 * V; i++) {
        double x = (double)logits[0][i], e = fabs((double)logits[1][i] - x);
        most = fmax(most, fabs(x)), worst = fmax(worst, e), different += e > 0;
    }
    CHECK(rounds ? different > 10 * V : different == 0);
    CHECK(worst <= most / 4); /* a token may take another expert, whose gate was nearly as large */
    free(logits[0]), free(logits[1]);
    synth_close(s);
}

/* What is rounded, and how: y = W x is y = W x' to the bit, with x' computed here. */
static void test_fast_rounding(void) {
    static const dsv3_type types[5] = {DSV3_F32, DSV3_F16, DSV3_BF16, DSV3_Q8_0, DSV3_Q4_0};
    enum { COLS = 64, OUT = 5 };
    dsv3_context ctx;
    CHECK_EQ(dsv3_context_init(&ctx, DSV3_BACKEND_REFERENCE, 1, NULL), DSV3_OK);
    for (int k = 0; k < 5; k++) {
        float x[COLS], rounded[COLS], y[OUT], want[OUT], numbers[OUT * COLS], *scratch;
        unsigned char data[OUT * COLS * 4];
        size_t bytes = 0;
        dsv3_tensor w;
        test_fill(x, COLS, -2, 2), test_fill(numbers, OUT * COLS, -1, 1);
        memset(&w, 0, sizeof w);
        w.data = data, w.rows = OUT, w.cols = COLS, w.type = types[k], w.rank = 2;
        memcpy(data, numbers, sizeof numbers);
        if (types[k] != DSV3_F32) CHECK_EQ(dsv3_quantize(data, NULL, numbers, types[k], OUT, COLS, NULL), DSV3_OK);
        for (size_t i = 0; i < COLS; i++) {
            float top = 0;
            for (size_t j = i / 32 * 32; j < i / 32 * 32 + 32; j++) top = fmaxf(top, fabsf(x[j]));
            rounded[i] = k < 2 ? x[i] : k == 2 ? dsv3_f32_from_bf16(dsv3_bf16_from_f32(x[i]))
                                               : top / 127.0f * nearbyintf(x[i] * (127.0f / top));
        }
        CHECK_EQ(dsv3_linear_size(&ctx, 1, COLS, &bytes, NULL), DSV3_OK);
        scratch = (float *)test_alloc(bytes);
        ctx.compute = DSV3_FAST;
        CHECK_EQ(dsv3_linear(&ctx, y, x, &w, 1, scratch, NULL), DSV3_OK);
        ctx.compute = DSV3_EXACT;
        CHECK_EQ(dsv3_linear(&ctx, want, rounded, &w, 1, scratch, NULL), DSV3_OK);
        CHECK(memcmp(y, want, sizeof y) == 0);
        free(scratch);
    }
}

/* ---- Which form attention takes: with AUTO, by the rows that a call brings to each sequence */

/* Bits of the logits of `first` rows of one sequence and then `second` of another, in one call. */
static void form_bits(synth *s, dsv3_attention form, const int32_t *token, size_t first, size_t second, float *logits) {
    int32_t sequence[160];
    size_t n = first + second;
    dsv3_batch batch = {n, token, sequence, NULL, n, NULL};
    for (size_t i = 0; i < n; i++) sequence[i] = i >= first;
    synth_run(s, n, 1, 2, n, DSV3_F32);
    s->context.attention = form;
    CHECK_EQ(dsv3_forward(&s->context, logits, &s->model, s->caches, 2, &batch, &s->ws, NULL), DSV3_OK);
}

/* The largest number of rows that are still absorbed; 0: any are. The rule of chapter 1: rk(dn+dv) / (2rk-dn-dv), and no
 * fewer than a step with drafts brings. */
static void test_form_switch(void) {
    static const struct {
        int rk, dn, dv;
        size_t most;
    } shape[] = {{20, 16, 14, 60}, {24, 8, 10, 16}, {20, 8, 24, 80}, {20, 8, 25, 94}, {12, 16, 8, 0}, {12, 16, 10, 0}};
    for (size_t i = 0; i < sizeof shape / sizeof shape[0]; i++) {
        dsv3_config c = synth_config(SYNTH_DENSE, NULL);
        synth *s;
        int32_t token[160];
        size_t most = shape[i].most, V;
        float *got, *absorbed, *expanded;
        synth_attention(&c, 2, 0, shape[i].rk, shape[i].dn, 4, shape[i].dv);
        c.num_hidden_layers = 1, c.first_k_dense_replace = 1;
        s = synth_open(&c, SYNTH_F32, 31 + i);
        V = (size_t)c.vocab_size;
        synth_tokens(token, 160, c.vocab_size);
        got = (float *)test_alloc(160 * V * sizeof *got), absorbed = (float *)test_alloc(160 * V * sizeof *got);
        expanded = (float *)test_alloc(160 * V * sizeof *got);
        for (size_t more = 0; more < 2; more++) { /* one row more turns the form of its sequence, and of no other */
            size_t first = most == 0 ? 100 : most + more, n = most == 0 ? 100 : first + (most == 16 ? 16u : 20u);
            int expands = most > 0 && more;
            form_bits(s, DSV3_ATTENTION_AUTO, token, first, n - first, got);
            form_bits(s, DSV3_ATTENTION_ABSORBED, token, first, n - first, absorbed);
            form_bits(s, DSV3_ATTENTION_EXPANDED, token, first, n - first, expanded);
            CHECK(memcmp(absorbed, expanded, first * V * sizeof *got) != 0);
            CHECK(memcmp(got, expands ? expanded : absorbed, first * V * sizeof *got) == 0);
            CHECK(memcmp(got + first * V, absorbed + first * V, (n - first) * V * sizeof *got) == 0);
        }
        free(got), free(absorbed), free(expanded);
        synth_close(s);
    }
}

int main(void) {
    test_form_switch();
    for (int which = 0; which < SYNTH_CONFIGS; which++)
        if (which != SYNTH_ODD) test_fast(which);
    test_fast_rounding();
    for (int which = 0; which < SYNTH_CONFIGS; which++) {
        for (int form = 1; form <= 2; form++) {
            test_oracle(which, form, DSV3_F32);
            test_same_sequence(which, form);
            test_mixed_batch(which, form);
            test_dirty_workspace(which, form);
        }
    }
    test_oracle(SYNTH_V3, DSV3_ATTENTION_AUTO, DSV3_F32);
    test_oracle(SYNTH_DENSE, DSV3_ATTENTION_AUTO, DSV3_BF16);
    test_outputs();
    test_bad_calls();
    test_full_cache();
    test_nan_weight();
    test_bad_embedding(SYNTH_V3, (float)INFINITY);
    test_bad_embedding(SYNTH_V3, (float)NAN);
    test_bad_embedding(SYNTH_DENSE, -(float)INFINITY);
    test_observer();
    test_replay(SYNTH_V3);
    test_replay(SYNTH_V2);
    test_replay(SYNTH_ODD);
    test_replay(SYNTH_FREQ);
    test_replay(SYNTH_NO_SHARED);
    test_bad_replay();
    test_last_hidden();
    test_cache_setup();
    test_cache_copy();
    test_workspace_setup();
    test_exact_memory();
    test_bad_end();
    test_foreign_workspace();
    return test_done("infer");
}
