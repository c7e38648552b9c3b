/* test_mtp.c -- chapter 12: MTP modules, and the losses of whole texts at all depths.
 *
 * A failure means that a module predicts from the wrong token, state or weights (drafts would seldom be accepted, and
 * nothing else would show it), that its results depend on how the work is cut, that a loss or load counts a row which
 * does not exist, lies in another document or is padding, or that a bad call is computed instead of refused. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#define S 14 /* tokens of the texts in most tests */
#define MOST_DEPTHS 4

/* ---- A model with D modules, the caches of all of them, and a workspace */

typedef struct rig {
    synth *s;
    size_t D, L, d, V, E, K, n; /* n: caches of each module */
    dsv3_cache *modules;        /* [D, n] */
    void **memory;
    size_t bytes; /* of each */
} rig;

enum { COPY_EMBED = 1, COPY_HEAD = 2 }; /* which copies the file has */

/* A file without a tensor: nobody finds it under its name. */
static void hide_copies(synth *s, int copies) {
    for (size_t i = 0; i < s->count; i++) {
        dsv3_tensor_info *info = &s->tensors[i].info;
        int which = strstr(info->name, "embed_tokens") != NULL ? COPY_EMBED : COPY_HEAD;
        if (info->optional && !(copies & which)) info->name[0] = '\0';
    }
}

static rig rig_open(const dsv3_config *config, int types, uint64_t seed, int copies) {
    rig r;
    memset(&r, 0, sizeof r);
    r.s = synth_make(config, types, seed);
    hide_copies(r.s, copies);
    synth_demand(synth_bind(r.s, NULL), "bind", NULL);
    r.s->context.attention = DSV3_ATTENTION_ABSORBED; /* bits are only promised for a fixed form */
    r.D = (size_t)config->num_nextn_predict_layers;
    r.L = (size_t)config->num_hidden_layers;
    r.d = (size_t)config->hidden_size;
    r.V = (size_t)config->vocab_size;
    r.E = (size_t)config->n_routed_experts;
    r.K = (size_t)config->num_experts_per_tok;
    CHECK_EQ(r.s->model.n_mtp, config->num_nextn_predict_layers);
    return r;
}

static void rig_free(rig *r) {
    for (size_t i = 0; i < r->D * r->n; i++) synth_release(r->memory[i]);
    free(r->modules), free(r->memory);
    r->modules = NULL, r->memory = NULL, r->n = 0;
}

/* As synth_run, for the modules too. Everything holds junk. */
static void rig_run(rig *r, size_t rows, size_t threads, size_t n, size_t capacity, dsv3_type type) {
    rig_free(r);
    synth_run(r->s, rows, threads, n, capacity, type);
    memset(r->s->ws_memory, 0xFF, r->s->ws_bytes);
    r->n = n;
    r->modules = (dsv3_cache *)test_alloc(r->D * n * sizeof *r->modules);
    r->memory = (void **)test_alloc(r->D * n * sizeof *r->memory);
    synth_demand(dsv3_cache_mtp_size(&r->s->config, capacity, type, &r->bytes, NULL), "cache size", NULL);
    for (size_t i = 0; i < r->D * n; i++) {
        r->memory[i] = synth_alloc(r->bytes);
        memset(r->memory[i], 0xA5, r->bytes);
        synth_demand(dsv3_cache_mtp_init(&r->s->config, &r->modules[i], capacity, type, r->memory[i], r->bytes, NULL),
                     "cache", NULL);
    }
}

static void rig_close(rig *r) {
    rig_free(r);
    synth_close(r->s);
}

static dsv3_config with_depths(int which, int D, int *types) {
    dsv3_config c = synth_config(which, types);
    c.num_nextn_predict_layers = D;
    return c;
}

static rig rig_named(int which, int D, uint64_t seed) {
    int types;
    dsv3_config c = with_depths(which, D, &types);
    return rig_open(&c, types, seed, COPY_EMBED | COPY_HEAD);
}

/* Empties cache i of the main model and of every module. */
static void forget(rig *r, size_t i) {
    r->s->caches[i].length = 0;
    for (size_t k = 0; k < r->D; k++) r->modules[k * r->n + i].length = 0;
}

/* Module k on n rows, all of them outputs. sequence NULL: all 0. */
static dsv3_result module(rig *r, size_t k, float *logits, const int32_t *token, const int32_t *sequence, size_t n,
                          const float *hidden, dsv3_error *error) {
    dsv3_batch batch;
    memset(&batch, 0, sizeof batch);
    batch.rows = batch.outputs = n;
    batch.token = token;
    batch.sequence = sequence;
    return dsv3_mtp_forward(&r->s->context, logits, &r->s->model, k, r->modules + (k - 1) * r->n, r->n, &batch,
                            hidden, &r->s->ws, error);
}

/* T tokens through the main model and all modules, `chunk` tokens at a time, from empty caches of sequence 0. out
 * [1 + D, T, V]: depth k has T - k rows. Each depth takes the states where the one before has left them. */
static void compute(rig *r, float *out, const int32_t *token, size_t T, size_t chunk) {
    forget(r, 0);
    memset(out, 0xFF, (1 + r->D) * T * r->V * sizeof *out);
    for (size_t begin = 0; begin < T; begin += chunk) {
        size_t end = begin + chunk < T ? begin + chunk : T;
        CHECK_EQ(synth_forward(r->s, out + begin * r->V, token + begin, end - begin, 0, NULL), DSV3_OK);
        for (size_t k = 1; k <= r->D && begin + k < T; k++) {
            size_t n = (end < T - k ? end : T - k) - begin;
            CHECK_EQ(module(r, k, out + (k * T + begin) * r->V, token + begin + k, NULL, n, r->s->ws.hidden, NULL),
                     DSV3_OK);
        }
    }
}

static float *logits_of_all(const rig *r, size_t T) {
    return (float *)test_alloc((1 + r->D) * T * r->V * sizeof(float));
}

static int same_bits(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof *a) == 0; }

/* ---- Against the formulas, in double */

/* want [1 + D, S, V]. Returns the closest routing decision. */
static double oracle_all(const rig *r, double *want, const int32_t *token) {
    double *x = synth_doubles(S * r->d), margin = oracle_main(r->s, want, x, token, S);
    for (size_t k = 1; k <= r->D; k++) {
        margin = fmin(margin, oracle_mtp(r->s, (int)k, want + k * S * r->V, x, token + k, S - k));
    }
    free(x);
    return margin;
}

/* Seeds are tried until no routing decision is so close that rounding may decide it. */
static rig oracle_open(const dsv3_config *c, int types, int copies, double *want, int32_t *token) {
    for (uint64_t seed = 1; seed < 20; seed++) {
        rig r = rig_open(c, types, seed, copies);
        synth_tokens(token, S, c->vocab_size);
        if (oracle_all(&r, want, token) > 1e-5) return r;
        rig_close(&r);
    }
    fprintf(stderr, "no seed with clear routing\n");
    exit(2);
}

/* Bound of logits. Where weights go by panels, an output is one chain of additions, not eight. */
static double oracle_bound(const rig *r) { return strcmp(r->s->context.backend, "reference") == 0 ? 2e-6 : 5e-6; }

static void oracle_case(const char *name, const dsv3_config *c, int types, int copies, int form) {
    double *want = synth_doubles((1 + MOST_DEPTHS) * S * (size_t)c->vocab_size);
    int32_t token[S];
    rig r = oracle_open(c, types, copies, want, token);
    float *got = logits_of_all(&r, S);
    int failed = test_failed;
    r.s->context.attention = (dsv3_attention)form;
    rig_run(&r, S, 1, 1, S, DSV3_F32);
    compute(&r, got, token, S, S);
    for (size_t k = 0; k <= r.D; k++) {
        CHECK_CLOSE(got + k * S * r.V, want + k * S * r.V, (S - k) * r.V, oracle_bound(&r));
        if (k > 0) CHECK_EQ(r.modules[k - 1].length, S - k);
    }
    if (test_failed > failed) {
        fprintf(stderr, "%s: copies %d, concat %d, hidden %d, form %d\n", name, copies, (int)c->mtp_concat,
                (int)c->mtp_hidden, form);
    }
    free(want), free(got);
    rig_close(&r);
}

static void test_oracle(void) {
    static const struct {
        int which, D;
    } models[] = {{SYNTH_V3, 4},   {SYNTH_MOONLIGHT, 2}, {SYNTH_V2, 1},       {SYNTH_ODD, 3},
                  {SYNTH_FREQ, 2}, {SYNTH_BLOCKS, 1},    {SYNTH_NO_SHARED, 1}};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        int step = models[i].which == SYNTH_BLOCKS ? 3 : 1; /* slow to make */
        for (int choice = 0; choice < 4; choice += step) {
            int types;
            dsv3_config c = with_depths(models[i].which, models[i].D, &types);
            c.mtp_concat = choice & 1 ? DSV3_MTP_HIDDEN_FIRST : DSV3_MTP_EMBED_FIRST;
            c.mtp_hidden = choice & 2 ? DSV3_MTP_PRE_NORM : DSV3_MTP_POST_NORM;
            oracle_case(synth_name(models[i].which), &c, types, choice, 1);
            oracle_case(synth_name(models[i].which), &c, types, 3 - choice, 2);
        }
    }
}

/* Tied embeddings: without a copy, a module's head is the embedding, too. */
static void test_oracle_tied(void) {
    for (int copies = 0; copies < 4; copies++) {
        dsv3_config c = with_depths(SYNTH_TIED, 2, NULL);
        oracle_case("tied", &c, SYNTH_F32, copies, 1);
    }
}

/* ---- The two choices that no file carries */

/* Exchanges the halves of eh_proj's columns in module k. Not for FP8, whose scales would have to move with them. */
static void exchange_halves(rig *r, int k) {
    synth_tensor *t = synth_get(r->s, (int)r->L + k - 1, -1, "eh_proj.weight");
    size_t half = r->d * dsv3_type_bytes(t->t.type);
    unsigned char *keep = (unsigned char *)test_alloc(half);
    for (size_t row = 0; row < r->d; row++) {
        unsigned char *at = t->data + row * 2 * half;
        memcpy(keep, at, half);
        memcpy(at, at + half, half);
        memcpy(at + half, keep, half);
    }
    free(keep);
    synth_refresh(t);
}

static void set_gain(rig *r, int k, const char *name, float gain) {
    synth_tensor *t = synth_get(r->s, (int)r->L + k - 1, -1, name);
    for (size_t i = 0; i < t->t.cols; i++) synth_encode(t->t.type, t->data, i, gain);
    synth_refresh(t);
}

static void set_concat(rig *r, dsv3_mtp_concat concat) {
    r->s->config.mtp_concat = concat;
    synth_demand(synth_bind(r->s, NULL), "bind", NULL);
}

static double worst_difference(const float *a, const float *b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
    return worst;
}

/* The other order with exchanged halves is the same sum, taken in another order: equal but for rounding. With one
 * half silent (gain 0) the order of the other half's terms does not change, so neither may a bit. */
static void concat_case(int which, const char *silent) {
    rig r = rig_named(which, 1, 5);
    size_t n = (S - 1) * r.V;
    float *a = logits_of_all(&r, S), *b = logits_of_all(&r, S);
    float *da = a + S * r.V, *db = b + S * r.V;
    int32_t token[S];
    synth_tokens(token, S, r.s->config.vocab_size);
    if (silent != NULL) set_gain(&r, 1, silent, 0.0f);
    rig_run(&r, S, 1, 1, S, DSV3_F32);
    compute(&r, a, token, S, S);
    set_concat(&r, DSV3_MTP_HIDDEN_FIRST);
    compute(&r, b, token, S, S);
    CHECK(same_bits(a, b, S * r.V));          /* the main model does not care */
    CHECK(worst_difference(da, db, n) > 0.1); /* the module does */
    exchange_halves(&r, 1);
    compute(&r, b, token, S, S);
    CHECK(worst_difference(da, db, n) < 1e-4);
    if (silent != NULL) CHECK(same_bits(da, db, n));
    free(a), free(b);
    rig_close(&r);
}

static void test_concat(void) {
    static const int which[] = {SYNTH_V3, SYNTH_MOONLIGHT};
    for (size_t i = 0; i < 2; i++) {
        concat_case(which[i], NULL);
        concat_case(which[i], "enorm.weight");
        concat_case(which[i], "hnorm.weight");
    }
}

/* States before and behind the norm give other logits, and workspace.hidden is what the name says. */
static void test_hidden(void) {
    rig r = rig_named(SYNTH_V3, 2, 6);
    float *a = logits_of_all(&r, S), *b = logits_of_all(&r, S);
    int32_t token[S];
    synth_tokens(token, S, r.s->config.vocab_size);
    rig_run(&r, S, 1, 1, S, DSV3_F32);
    compute(&r, a, token, S, S);
    CHECK(r.s->ws.hidden == dsv3i_workspace_of(&r.s->ws, &r.s->config).u);
    r.s->config.mtp_hidden = DSV3_MTP_PRE_NORM;
    synth_demand(synth_bind(r.s, NULL), "bind", NULL);
    compute(&r, b, token, S, S);
    CHECK(r.s->ws.hidden == dsv3i_workspace_of(&r.s->ws, &r.s->config).x);
    CHECK(same_bits(a, b, S * r.V));
    CHECK(worst_difference(a + S * r.V, b + S * r.V, (S - 1) * r.V) > 0.01);
    CHECK(worst_difference(a + 2 * S * r.V, b + 2 * S * r.V, (S - 2) * r.V) > 0.01);
    free(a), free(b);
    rig_close(&r);
}

/* ---- The same bits, however the work is cut */

static long hook_calls;

/* Pieces of odd sizes from the last to the first, under changing worker numbers. */
static void backwards(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    static const size_t sizes[] = {1, 4, 2, 7, 1, 11, 3};
    size_t end = n, k = 0;
    (void)user;
    hook_calls++;
    while (end > 0) {
        size_t size = sizes[k % 7], begin = end > size ? end - size : 0;
        task(arg, begin, end, k++ % threads);
        end = begin;
    }
}

/* `threads` of OpenMP where it is compiled in, else of the hook. */
static void set_threads(rig *r, size_t threads, int hook) {
    dsv3_attention form = r->s->context.attention;
    synth_demand(dsv3_context_init(&r->s->context, test_backend(), threads, NULL), "context", NULL);
    if (hook) r->s->context.parallel_for = backwards;
    r->s->context.threads = threads;
    r->s->context.attention = form;
}

typedef struct mixed {
    size_t n; /* rows */
    int32_t sequence[3 * S], position[3 * S];
} mixed;

/* The rows of three texts of length[] tokens, in random order but each text in its own. */
static mixed mix(const size_t *length) {
    mixed m;
    size_t done[3] = {0, 0, 0};
    m.n = 0;
    while (m.n < length[0] + length[1] + length[2]) {
        size_t i = (size_t)(test_random() % 3);
        if (done[i] == length[i]) continue;
        m.sequence[m.n] = (int32_t)i;
        m.position[m.n++] = (int32_t)done[i]++;
    }
    return m;
}

/* Keeps the rows that depth k has, their states too. */
static void mix_keep(mixed *m, const size_t *length, size_t k, float *hidden, size_t d) {
    size_t kept = 0;
    for (size_t i = 0; i < m->n; i++) {
        if ((size_t)m->position[i] + k >= length[m->sequence[i]]) continue;
        m->sequence[kept] = m->sequence[i];
        m->position[kept] = m->position[i];
        memmove(hidden + kept++ * d, hidden + i * d, d * sizeof *hidden);
    }
    m->n = kept;
}

/* Three texts, rows mixed in one call per depth. want[i] is what text i gives alone. */
static void company(rig *r, float *const *want, int32_t token[3][S], const size_t *length) {
    mixed m = mix(length);
    float *logits = (float *)test_alloc(m.n * r->V * sizeof(float));
    float *hidden = (float *)test_alloc(m.n * r->d * sizeof(float));
    for (size_t i = 0; i < 3; i++) forget(r, i);
    for (size_t k = 0; k <= r->D; k++) {
        int32_t input[3 * S];
        dsv3_batch batch;
        if (k > 0) mix_keep(&m, length, k, hidden, r->d);
        for (size_t i = 0; i < m.n; i++) input[i] = token[m.sequence[i]][(size_t)m.position[i] + k];
        memset(&batch, 0, sizeof batch);
        batch.rows = batch.outputs = m.n;
        batch.token = input, batch.sequence = m.sequence, batch.position = m.position;
        if (k == 0) {
            CHECK_EQ(dsv3_forward(&r->s->context, logits, &r->s->model, r->s->caches, 3, &batch, &r->s->ws, NULL),
                     DSV3_OK);
        } else {
            CHECK_EQ(dsv3_mtp_forward(&r->s->context, logits, &r->s->model, k, r->modules + (k - 1) * r->n, r->n,
                                      &batch, hidden, &r->s->ws, NULL),
                     DSV3_OK);
        }
        memcpy(hidden, r->s->ws.hidden, m.n * r->d * sizeof *hidden);
        for (size_t i = 0; i < m.n; i++) {
            size_t of = (size_t)m.sequence[i], row = k * length[of] + (size_t)m.position[i];
            CHECK(same_bits(logits + i * r->V, want[of] + row * r->V, r->V));
        }
    }
    free(logits), free(hidden);
}

/* Depth k of a text of T tokens has rows T - k of [1 + D, T, V]. */
static int same_depths(const rig *r, const float *a, const float *b, size_t T) {
    int same = 1;
    for (size_t k = 0; k <= r->D; k++) same &= same_bits(a + k * T * r->V, b + k * T * r->V, (T - k) * r->V);
    return same;
}

static void same_case(rig *r, dsv3_type type) {
    static const size_t length[3] = {S, S - 5, 4}, chunks[] = {1, 2, 7}, threads[] = {1, 2, 4};
    int32_t token[3][S];
    float *want[3], *got = logits_of_all(r, S);
    rig_run(r, 3 * S, 4, 3, S, type);
    set_threads(r, 1, 0);
    for (size_t i = 0; i < 3; i++) {
        synth_tokens(token[i], S, r->s->config.vocab_size);
        want[i] = logits_of_all(r, length[i]);
        compute(r, want[i], token[i], length[i], length[i]);
    }
    for (size_t i = 0; i < 3; i++) {
        for (int hook = 0; hook < 2; hook++) {
            set_threads(r, threads[i], hook);
            compute(r, got, token[0], S, S);
            CHECK(same_depths(r, got, want[0], S));
            compute(r, got, token[0], S, chunks[i]);
            CHECK(same_depths(r, got, want[0], S));
            company(r, want, token, length);
        }
    }
    for (size_t i = 0; i < 3; i++) free(want[i]);
    free(got);
}

/* So large that the module's loops are split. */
static dsv3_config wide_config(void) {
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, 1031, 256, 520, 64, 1, 1);
    synth_attention(&c, 4, 64, 128, 64, 16, 64);
    synth_experts(&c, 8, 1, 2, 4, 2, 2.5f);
    c.num_nextn_predict_layers = 2;
    return c;
}

static void test_same_bits(void) {
    dsv3_config wide = wide_config();
    for (int form = 1; form <= 2; form++) {
        static const int which[] = {SYNTH_V3, SYNTH_ODD};
        rig r = rig_open(&wide, SYNTH_BF16, 7, 0);
        r.s->context.attention = (dsv3_attention)form;
        hook_calls = 0;
        same_case(&r, DSV3_F32);
        CHECK(hook_calls > 0);
        rig_close(&r);
        for (size_t i = 0; i < 2; i++) {
            r = rig_named(which[i], MOST_DEPTHS - 1, 8);
            r.s->context.attention = (dsv3_attention)form;
            same_case(&r, form == 1 ? DSV3_BF16 : DSV3_F32);
            rig_close(&r);
        }
    }
}

/* Logits are of the rows that were asked for; without any, the cache is filled all the same. */
static void test_outputs(void) {
    static const int32_t output[3] = {6, 0, 6};
    rig r = rig_named(SYNTH_MTP, 1, 9);
    float *want = logits_of_all(&r, S), *depth = want + S * r.V, *got = (float *)test_alloc(3 * r.V * sizeof *got);
    float *hidden = (float *)test_alloc(S * r.d * sizeof(float));
    int32_t token[S];
    dsv3_batch batch;
    synth_tokens(token, S, r.s->config.vocab_size);
    rig_run(&r, S, 1, 1, S, DSV3_F32);
    compute(&r, want, token, S, S);
    forget(&r, 0);
    synth_demand(synth_forward(r.s, want, token, S, 0, NULL), "forward", NULL);
    memcpy(hidden, r.s->ws.hidden, S * r.d * sizeof *hidden);
    memset(&batch, 0, sizeof batch);
    batch.rows = 7, batch.token = token + 1;
    CHECK_EQ(dsv3_mtp_forward(&r.s->context, NULL, &r.s->model, 1, r.modules, 1, &batch, hidden, &r.s->ws, NULL),
             DSV3_OK);
    CHECK_EQ(module(&r, 1, got, token + 8, NULL, 3, hidden + 7 * r.d, NULL), DSV3_OK);
    CHECK(same_bits(got, depth + 7 * r.V, 3 * r.V));
    CHECK_EQ(dsv3_cache_truncate(&r.modules[0], 0, NULL), DSV3_OK);
    batch.outputs = 3, batch.output = output;
    CHECK_EQ(dsv3_mtp_forward(&r.s->context, got, &r.s->model, 1, r.modules, 1, &batch, hidden, &r.s->ws, NULL),
             DSV3_OK);
    for (size_t i = 0; i < 3; i++) CHECK(same_bits(got + i * r.V, depth + (size_t)output[i] * r.V, r.V));
    free(want), free(got), free(hidden);
    rig_close(&r);
}

/* ---- Bad calls: refused with code and name, and no byte or length of any cache moves */

typedef struct bad_call {
    rig *r;
    dsv3_batch batch;
    dsv3_context *context;
    float *logits;
    dsv3_model *model;
    size_t k, n_caches;
    dsv3_cache *caches;
    const float *hidden;
    dsv3_workspace *ws;
    unsigned char *before; /* all modules' caches */
} bad_call;

static void snapshot(bad_call *c, int check) {
    for (size_t i = 0; i < c->r->D * c->r->n; i++) {
        if (check) CHECK(memcmp(c->before + i * c->r->bytes, c->r->memory[i], c->r->bytes) == 0);
        memcpy(c->before + i * c->r->bytes, c->r->memory[i], c->r->bytes);
    }
}

static dsv3_result call(const bad_call *c, dsv3_error *error) {
    return dsv3_mtp_forward(c->context, c->logits, c->model, c->k, c->caches, c->n_caches, &c->batch, c->hidden,
                            c->ws, error);
}

static void refuse(bad_call *c, int code, const char *name, int line) {
    size_t length[8];
    dsv3_error e;
    dsv3_result result;
    char message[300];
    for (size_t i = 0; i < c->r->D * c->r->n; i++) length[i] = c->r->modules[i].length;
    memset(&e, 0xFF, sizeof e);
    result = call(c, &e);
    snprintf(message, sizeof message, "got %d \"%s\", want %d \"%s\"", (int)result, e.name, code, name);
    test_count(result == code && e.code == code && strcmp(e.name, name) == 0, __FILE__, line, message);
    CHECK_EQ(call(c, NULL), code);
    for (size_t i = 0; i < c->r->D * c->r->n; i++) CHECK_EQ(c->r->modules[i].length, length[i]);
    snapshot(c, 1);
}

#define REFUSE(code, name) refuse(&c, code, name, __LINE__)

static void refuse_pointers(bad_call c) {
    bad_call good = c;
    c.context = NULL, REFUSE(DSV3_ERR_ARG, "context"), c = good;
    c.model = NULL, REFUSE(DSV3_ERR_ARG, "model"), c = good;
    c.caches = NULL, REFUSE(DSV3_ERR_ARG, "caches"), c = good;
    c.ws = NULL, REFUSE(DSV3_ERR_ARG, "workspace"), c = good;
    c.batch.token = NULL, REFUSE(DSV3_ERR_ARG, "token"), c = good;
    c.hidden = NULL, REFUSE(DSV3_ERR_ARG, "hidden"), c = good;
    c.logits = NULL, REFUSE(DSV3_ERR_ARG, "logits"), c = good;
    CHECK_EQ(dsv3_mtp_forward(c.context, c.logits, c.model, 1, c.caches, 2, NULL, c.hidden, c.ws, NULL),
             DSV3_ERR_ARG);
}

static void refuse_sizes(bad_call c) {
    bad_call good = c;
    c.k = 0, REFUSE(DSV3_ERR_ARG, "k"), c = good;
    c.k = 3, REFUSE(DSV3_ERR_ARG, "k"), c = good;
    c.k = SIZE_MAX, REFUSE(DSV3_ERR_ARG, "k"), c = good;
    c.r->s->model.n_mtp = 0, REFUSE(DSV3_ERR_ARG, "k"); /* a file without modules */
    c.r->s->model.n_mtp = 1, c.k = 2, REFUSE(DSV3_ERR_ARG, "k"), c.r->s->model.n_mtp = 2, c = good;
    c.batch.rows = c.batch.outputs = 0, REFUSE(DSV3_ERR_ARG, "rows"), c = good;
    c.batch.rows = S + 1, REFUSE(DSV3_ERR_MEMORY, "rows"), c = good;
    c.batch.outputs = 5, REFUSE(DSV3_ERR_ARG, "outputs"), c = good;
    c.context->threads = 2, REFUSE(DSV3_ERR_MEMORY, "threads"), c.context->threads = 1;
    c.caches = c.r->s->caches, REFUSE(DSV3_ERR_MISMATCH, "caches[0]"), c = good; /* the main model's */
    c.caches[1].width++, REFUSE(DSV3_ERR_MISMATCH, "caches[1]"), c.caches[1].width--;
    c.n_caches = 1, REFUSE(DSV3_ERR_ARG, "sequence[1]"), c = good;
    c.n_caches = 0, REFUSE(DSV3_ERR_ARG, "n_caches"), c = good;
}

/* token, sequence and position are those of the batch. */
static void refuse_rows(bad_call c, int32_t *token, int32_t *sequence, int32_t *position) {
    int32_t V = c.model->config.vocab_size;
    token[3] = V, REFUSE(DSV3_ERR_TOKEN, "token[3]"), token[3] = -1, REFUSE(DSV3_ERR_TOKEN, "token[3]");
    token[3] = DSV3_IGNORE, REFUSE(DSV3_ERR_TOKEN, "token[3]"), token[3] = V - 1;
    position[2] = 4, REFUSE(DSV3_ERR_POSITION, "position[2]"), position[2] = 6;
    REFUSE(DSV3_ERR_POSITION, "position[2]"), position[2] = 5;
    position[0] = -1, REFUSE(DSV3_ERR_POSITION, "position[0]"), position[0] = 4;
    sequence[1] = 2, REFUSE(DSV3_ERR_ARG, "sequence[1]"), sequence[1] = -1, REFUSE(DSV3_ERR_ARG, "sequence[1]");
    sequence[1] = 0; /* one row too many for cache 0 */
    c.batch.position = NULL, REFUSE(DSV3_ERR_FULL, "position[3]"), sequence[1] = 1;
}

static void test_bad_calls(void) {
    rig r = rig_named(SYNTH_V3, 2, 10);
    int32_t token[S], sequence[4] = {0, 1, 0, 0}, position[4] = {4, 0, 5, 6};
    float *logits = logits_of_all(&r, S), *hidden = (float *)test_alloc(S * r.d * sizeof(float));
    dsv3_batch batch;
    bad_call c;
    rig_run(&r, S, 1, 2, 7, DSV3_F32);
    synth_tokens(token, S, r.s->config.vocab_size);
    test_fill(hidden, S * r.d, -1, 1);
    CHECK_EQ(module(&r, 1, logits, token, NULL, 4, hidden, NULL), DSV3_OK);
    memset(&c, 0, sizeof c);
    c.r = &r;
    c.context = &r.s->context, c.logits = logits, c.model = &r.s->model, c.k = 1, c.caches = r.modules;
    c.n_caches = 2, c.hidden = hidden, c.ws = &r.s->ws;
    c.batch.rows = c.batch.outputs = 4;
    c.batch.token = token, c.batch.sequence = sequence, c.batch.position = position;
    c.before = (unsigned char *)test_alloc(r.D * r.n * r.bytes);
    snapshot(&c, 0);
    refuse_pointers(c);
    refuse_sizes(c);
    refuse_rows(c, token, sequence, position);
    batch = c.batch; /* the reverse: a module's cache for the main model */
    batch.position = NULL;
    CHECK_EQ(dsv3_forward(c.context, logits, c.model, r.modules, 2, &batch, c.ws, NULL), DSV3_ERR_MISMATCH);
    snapshot(&c, 1);
    CHECK_EQ(call(&c, NULL), DSV3_OK); /* and after all that, the good call */
    CHECK(r.modules[0].length == 7 && r.modules[1].length == 1);
    CHECK(r.modules[2].length == 0 && r.modules[3].length == 0);
    snapshot(&c, 0);
    REFUSE(DSV3_ERR_POSITION, "position[0]");
    c.batch.position = NULL;
    REFUSE(DSV3_ERR_FULL, "position[0]"); /* full */
    free(c.before), free(logits), free(hidden);
    rig_close(&r);
}

/* A workspace made for a model without modules has no room for their input. */
static void test_foreign_workspace(void) {
    rig with = rig_named(SYNTH_MTP, 1, 11), without = rig_named(SYNTH_MTP, 0, 11);
    float *logits = logits_of_all(&with, S), *hidden = (float *)test_alloc(S * with.d * sizeof(float));
    int32_t token[1] = {1};
    dsv3_batch batch = {1, token, NULL, NULL, 1, NULL};
    dsv3_error e;
    test_fill(hidden, S * with.d, -1, 1);
    rig_run(&with, S, 1, 1, S, DSV3_F32);
    rig_run(&without, S, 1, 1, S, DSV3_F32);
    CHECK_EQ(dsv3_mtp_forward(&with.s->context, logits, &with.s->model, 1, with.modules, 1, &batch, hidden,
                              &without.s->ws, &e),
             DSV3_ERR_MISMATCH);
    CHECK(strcmp(e.name, "workspace") == 0);
    CHECK_EQ(dsv3_mtp_forward(&without.s->context, logits, &without.s->model, 1, with.modules, 1, &batch, hidden,
                              &without.s->ws, &e),
             DSV3_ERR_ARG); /* and such a model has no module 1 */
    CHECK(strcmp(e.name, "k") == 0);
    free(logits), free(hidden);
    rig_close(&with), rig_close(&without);
}

/* NaN in any weight that only a module has, or in a state. */
static void test_nan(void) {
    static const char *const names[] = {"eh_proj.weight",
                                        "enorm.weight",
                                        "hnorm.weight",
                                        "shared_head.norm.weight",
                                        "shared_head.head.weight",
                                        "self_attn.o_proj.weight",
                                        "mlp.shared_experts.down_proj.weight"};
    rig r = rig_named(SYNTH_MTP, 1, 12);
    float *logits = logits_of_all(&r, S), *hidden = (float *)test_alloc(S * r.d * sizeof(float));
    int32_t token[S];
    dsv3_error e;
    rig_run(&r, S, 1, 1, S, DSV3_F32);
    synth_tokens(token, S, r.s->config.vocab_size);
    test_fill(hidden, S * r.d, -1, 1);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        synth_tensor *t = synth_get(r.s, (int)r.L, -1, names[i]);
        float old = (float)t->value[7];
        synth_set(t, 7, (float)NAN);
        CHECK_EQ(module(&r, 1, logits, token, NULL, 5, hidden, &e), DSV3_ERR_NAN);
        CHECK_EQ(e.code, DSV3_ERR_NAN);
        CHECK(strncmp(e.name, i == 4 ? "logits" : "row[0]", 6) == 0);
        CHECK_EQ(r.modules[0].length, 0);
        synth_set(t, 7, old);
    }
    hidden[3 * r.d + 2] = (float)NAN;
    CHECK_EQ(module(&r, 1, logits, token, NULL, 5, hidden, &e), DSV3_ERR_NAN);
    CHECK(strcmp(e.name, "row[3]") == 0);
    CHECK_EQ(module(&r, 1, logits, token, NULL, 3, hidden, &e), DSV3_OK);
    CHECK_EQ(r.modules[0].length, 3);
    free(logits), free(hidden);
    rig_close(&r);
}

/* ---- Setting up */

static int untouched(const unsigned char *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] != 0x5A) return 0;
    }
    return 1;
}

static void test_cache_setup(void) {
    dsv3_config c = with_depths(SYNTH_V3, 2, NULL), bad = c;
    dsv3_cache cache;
    size_t need = 0, other = 0;
    unsigned char *memory;
    bad.kv_lora_rank = 0;
    CHECK_EQ(dsv3_cache_mtp_size(&c, 5, DSV3_F32, &need, NULL), DSV3_OK);
    CHECK_EQ(dsv3_cache_mtp_size(NULL, 5, DSV3_F32, &other, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_mtp_size(&bad, 5, DSV3_F32, &other, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_mtp_size(&c, 0, DSV3_F32, &other, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_mtp_size(&c, (size_t)DSV3_MAX_SEQ + 1, DSV3_F32, &other, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_cache_mtp_size(&c, 5, DSV3_F8_E4M3, &other, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_cache_size(&c, 5, DSV3_F32, &other, NULL), DSV3_OK);
    CHECK(need < other);
    memory = (unsigned char *)synth_alloc(need + 64);
    memset(memory, 0x5A, need + 64);
    CHECK_EQ(dsv3_cache_mtp_init(&c, NULL, 5, DSV3_F32, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_mtp_init(NULL, &cache, 5, DSV3_F32, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_mtp_init(&c, &cache, 5, DSV3_F32, NULL, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_mtp_init(&c, &cache, 5, DSV3_F16, memory, need, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_cache_mtp_init(&c, &cache, 5, DSV3_F32, memory, need - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_cache_mtp_init(&c, &cache, 5, DSV3_F32, memory, 0, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_cache_mtp_init(&c, &cache, 6, DSV3_F32, memory, need, NULL), DSV3_ERR_MEMORY);
    for (size_t shift = 1; shift < DSV3_ALIGN; shift *= 2) {
        CHECK_EQ(dsv3_cache_mtp_init(&c, &cache, 5, DSV3_F32, memory + shift, need, NULL), DSV3_ERR_ALIGN);
    }
    CHECK_EQ(dsv3_cache_mtp_init(&c, &cache, 5, DSV3_F32, memory, need, NULL), DSV3_OK);
    CHECK(untouched(memory, need + 64));
    CHECK(cache.length == 0 && cache.capacity == 5 && cache.layers == 1 && cache.width == 36);
    synth_release(memory);
}

/* Exactly the bytes that were asked for, at every legal beginning, and full of junk: nothing outside is written, and
 * the junk does not matter. */
static void exact_memory_case(const dsv3_config *c) {
    rig r = rig_open(c, SYNTH_F32, 13, COPY_EMBED);
    size_t ws_bytes = 0, cache_bytes = 0;
    float *want = logits_of_all(&r, 6), *got = (float *)test_alloc(5 * r.V * sizeof(float));
    float *hidden = (float *)test_alloc(5 * r.d * sizeof(float));
    int32_t token[5] = {0, 4, 3, 2, 1};
    dsv3_batch batch = {5, token, NULL, NULL, 5, NULL};
    test_fill(hidden, 5 * r.d, -1, 1);
    rig_run(&r, 5, 1, 1, 5, DSV3_BF16);
    CHECK_EQ(module(&r, 1, want, token, NULL, 5, hidden, NULL), DSV3_OK);
    CHECK_EQ(dsv3_workspace_size(&r.s->config, 5, 1, &ws_bytes, NULL), DSV3_OK);
    CHECK_EQ(dsv3_cache_mtp_size(&r.s->config, 5, DSV3_BF16, &cache_bytes, NULL), DSV3_OK);
    for (size_t shift = 0; shift < 64; shift += DSV3_ALIGN) {
        unsigned char *a = (unsigned char *)synth_alloc(ws_bytes + 64);
        unsigned char *b = (unsigned char *)synth_alloc(cache_bytes + 64);
        dsv3_cache cache;
        dsv3_workspace ws;
        memset(a, 0x5A, ws_bytes + 64), memset(a + shift, shift % 16 ? 0xFF : 0x7F, ws_bytes);
        memset(b, 0x5A, cache_bytes + 64), memset(b + shift, 0xFF, cache_bytes);
        CHECK_EQ(dsv3_workspace_init(&r.s->config, &ws, 5, 1, a + shift, ws_bytes, NULL), DSV3_OK);
        CHECK_EQ(dsv3_cache_mtp_init(&r.s->config, &cache, 5, DSV3_BF16, b + shift, cache_bytes, NULL), DSV3_OK);
        CHECK_EQ(dsv3_mtp_forward(&r.s->context, got, &r.s->model, 1, &cache, 1, &batch, hidden, &ws, NULL), DSV3_OK);
        CHECK(same_bits(got, want, 5 * r.V));
        CHECK(untouched(a, shift) && untouched(a + shift + ws_bytes, 64 - shift));
        CHECK(untouched(b, shift) && untouched(b + shift + cache_bytes, 64 - shift));
        synth_release(a), synth_release(b);
    }
    free(want), free(got), free(hidden);
    rig_close(&r);
}

/* Also where nothing but the hidden size is large: then the module's input is what most of the workspace is for. */
static void test_exact_memory(void) {
    dsv3_config c = with_depths(SYNTH_V3, 1, NULL), slim = dsv3_config_default();
    synth_sizes(&slim, 5, 64, 4, 0, 1, 1);
    synth_attention(&slim, 1, 0, 4, 2, 2, 2);
    slim.moe_layer_freq = 100;
    slim.num_nextn_predict_layers = 1;
    exact_memory_case(&c);
    exact_memory_case(&slim);
}

/* A copy may be absent. One that is there must have the right shape. */
static void test_bind(void) {
    static const char *const names[] = {"embed_tokens.weight", "shared_head.head.weight"};
    rig r = rig_named(SYNTH_MTP, 2, 14);
    for (size_t i = 0; i < 4; i++) {
        synth_tensor *t = synth_get(r.s, (int)(r.L + i / 2), -1, names[i % 2]);
        dsv3_error e;
        t->t.rows--;
        CHECK_EQ(synth_bind(r.s, &e), DSV3_ERR_MISMATCH);
        CHECK(strcmp(e.name, t->info.name) == 0);
        CHECK(e.expected[0] == (int64_t)r.V && e.found[0] == (int64_t)r.V - 1 && e.found[1] == (int64_t)r.d);
        t->t.rows++;
        CHECK_EQ(synth_bind(r.s, &e), DSV3_OK);
        CHECK_EQ(r.s->model.n_mtp, 2);
    }
    rig_close(&r);
}

/* ---- Texts, and what dsv3_evaluate adds up */

#define LONGEST 64

typedef struct passage {
    size_t n;
    int32_t token[LONGEST], target[LONGEST], sequence[LONGEST], document[LONGEST];
    uint8_t mask[LONGEST];
    int has_target, has_sequence, has_document, has_mask, apart;
} passage;

/* One more sequence of T random tokens: one document, no padding, targets that are not the next tokens. */
static void passage_add(passage *p, int32_t sequence, size_t T, size_t V) {
    for (size_t i = 0; i < T; i++, p->n++) {
        p->token[p->n] = (int32_t)(test_random() % V);
        p->target[p->n] = (int32_t)(test_random() % V);
        p->sequence[p->n] = sequence;
        p->document[p->n] = 7;
        p->mask[p->n] = 1;
    }
}

static dsv3_text text_of(const passage *p) {
    dsv3_text x;
    memset(&x, 0, sizeof x);
    x.rows = p->n;
    x.token = p->token;
    x.target = p->has_target ? p->target : NULL;
    x.sequence = p->has_sequence ? p->sequence : NULL;
    x.document = p->has_document ? p->document : NULL;
    x.mask = p->has_mask ? p->mask : NULL;
    x.apart = p->apart;
    return x;
}

static dsv3_losses losses_make(const rig *r, size_t depths) {
    dsv3_losses l;
    size_t layers = r->L + r->D;
    memset(&l, 0, sizeof l);
    l.depths = depths;
    l.nll = synth_doubles(1 + depths);
    l.targets = (uint64_t *)test_alloc((1 + depths) * sizeof *l.targets);
    l.load = (uint64_t *)test_alloc(layers * r->E * sizeof *l.load);
    l.balance = synth_doubles(layers);
    l.device = synth_doubles(layers), l.communication = synth_doubles(layers); /* devices: 0 */
    memset(l.targets, 0, (1 + depths) * sizeof *l.targets);
    memset(l.load, 0, layers * r->E * sizeof *l.load);
    return l;
}

static void losses_free(dsv3_losses *l) { free(l->nll), free(l->targets), free(l->load), free(l->balance), free(l->device), free(l->communication); }

static dsv3_result evaluate(rig *r, dsv3_losses *l, const passage *p, dsv3_error *error) {
    dsv3_text x = text_of(p);
    return dsv3_evaluate(&r->s->context, l, &r->s->model, r->s->caches, r->modules, r->n, &x, &r->s->ws, error);
}

static int near_to(double got, double want, double bound) { return fabs(got - want) <= bound * fabs(want); }

/* Counts are equal, sums but for rounding. */
static void losses_compare(const rig *r, const dsv3_losses *got, const dsv3_losses *want, const char *what) {
    size_t layers = r->L + r->D;
    int failed = test_failed;
    CHECK_EQ(got->sequences, want->sequences);
    for (size_t k = 0; k <= want->depths; k++) {
        CHECK_EQ(got->targets[k], want->targets[k]);
        CHECK(near_to(got->nll[k], want->nll[k], 1e-6));
    }
    for (size_t i = 0; i < layers; i++) {
        CHECK(memcmp(got->load + i * r->E, want->load + i * r->E, r->E * sizeof *got->load) == 0);
        if (got->balance != NULL && want->balance != NULL) {
            CHECK(near_to(got->balance[i], want->balance[i], 1e-12));
            CHECK(near_to(got->device[i], got->devices > 0 ? want->device[i] : 0, 1e-12));
            CHECK(near_to(got->communication[i], got->devices > 0 ? want->communication[i] : 0, 1e-12));
        }
    }
    if (test_failed > failed) fprintf(stderr, "%s\n", what);
}

static int same_losses(const rig *r, const dsv3_losses *a, const dsv3_losses *b) {
    return memcmp(a->nll, b->nll, (1 + a->depths) * sizeof *a->nll) == 0 &&
           memcmp(a->targets, b->targets, (1 + a->depths) * sizeof *a->targets) == 0 &&
           memcmp(a->load, b->load, (r->L + r->D) * r->E * sizeof *a->load) == 0 && a->sequences == b->sequences;
}

/* ---- By hand: each sequence alone through dsv3_forward and dsv3_mtp_forward, the rest here, in double */

#define LAYERS 8
#define EXPERTS 16
#define CHOICES 4

typedef struct seen { /* what the observer saw of one sequence */
    const rig *r;
    float score[LAYERS][LONGEST * EXPERTS];
    int32_t idx[LAYERS][LONGEST * CHOICES];
} seen;

static void see_routing(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                        size_t n) {
    seen *w = (seen *)user;
    (void)gate;
    memcpy(w->score[layer], score, n * w->r->E * sizeof *score);
    memcpy(w->idx[layer], idx, n * w->r->K * sizeof *idx);
}

/* Is t_{i+k} part of what position i belongs to? at: row of position 0. */
static int by_hand_input(const passage *p, size_t at, size_t T, size_t i, size_t k) {
    if (i + k >= T) return 0;
    if (p->has_document && p->document[at + i] != p->document[at + i + k]) return 0;
    return !p->has_mask || (p->mask[at + i] && p->mask[at + i + k]);
}

static int32_t by_hand_target(const passage *p, size_t at, size_t T, size_t i, size_t k) {
    if (!by_hand_input(p, at, T, i, k)) return DSV3_IGNORE;
    if (p->has_target) return p->target[at + i + k];
    return by_hand_input(p, at, T, i, k + 1) ? p->token[at + i + k + 1] : DSV3_IGNORE;
}

static double by_hand_nll(const float *logits, size_t V, int32_t target) {
    double top = -INFINITY, sum = 0;
    for (size_t i = 0; i < V; i++) top = fmax(top, (double)logits[i]);
    for (size_t i = 0; i < V; i++) sum += exp((double)logits[i] - top);
    return top + log(sum) - (double)logits[target];
}

static void by_hand_layer(const rig *r, dsv3_losses *l, const passage *p, size_t at, size_t T, size_t k, size_t layer,
                          const seen *w) {
    uint8_t counts[LONGEST];
    double scratch[2 * EXPERTS], loss = NAN;
    dsv3_routing routing = {w->score[layer], l->actual ? w->idx[layer] : NULL, counts, T - k, r->E, r->K, 0, 0};
    if (!r->s->model.layers[layer].is_moe || T <= k) return;
    for (size_t i = 0; i < T - k; i++) {
        counts[i] = (uint8_t)by_hand_input(p, at, T, i, k);
        for (size_t j = 0; j < r->K && counts[i]; j++) l->load[layer * r->E + (size_t)w->idx[layer][i * r->K + j]]++;
    }
    CHECK_EQ(dsv3_balance_loss(&loss, &routing, scratch, NULL), DSV3_OK);
    l->balance[layer] += loss;
    routing.idx = w->idx[layer], routing.devices = l->devices, routing.most_devices = l->most_devices;
    CHECK_EQ(dsv3_device_loss(&loss, &routing, scratch, NULL), DSV3_OK);
    l->device[layer] += loss;
    CHECK_EQ(dsv3_communication_loss(&loss, &routing, scratch, NULL), DSV3_OK);
    l->communication[layer] += loss;
}

static void by_hand_sequence(rig *r, dsv3_losses *l, const passage *p, size_t at, size_t T, seen *w) {
    float *logits = logits_of_all(r, T);
    int counts = !p->has_mask;
    compute(r, logits, p->token + at, T, T);
    for (size_t i = 0; i < T && !counts; i++) counts = p->mask[at + i];
    for (size_t k = 0; k <= l->depths; k++) {
        for (size_t i = 0; i + k < T; i++) {
            int32_t target = by_hand_target(p, at, T, i, k);
            if (target == DSV3_IGNORE) continue;
            l->nll[k] += by_hand_nll(logits + (k * T + i) * r->V, r->V, target);
            l->targets[k]++;
        }
        if (k > 0) by_hand_layer(r, l, p, at, T, k, r->L + k - 1, w);
    }
    for (size_t i = 0; i < r->L; i++) by_hand_layer(r, l, p, at, T, 0, i, w);
    l->sequences += counts != 0; /* one of padding alone does not */
    free(logits);
}

static dsv3_losses by_hand(rig *r, size_t depths, const passage *p, int actual) {
    static seen w;
    dsv3_losses l = losses_make(r, depths);
    l.actual = actual;
    l.devices = r->E % 2 == 0 ? 2 : 1, l.most_devices = 1;
    w.r = r;
    r->s->context.observer.user = &w;
    r->s->context.observer.routing = see_routing;
    for (size_t begin = 0, end; begin < p->n; begin = end) {
        for (end = begin + 1; end < p->n && p->has_sequence && p->sequence[end] == p->sequence[begin]; end++) {
        }
        if (!p->has_sequence) end = p->n;
        by_hand_sequence(r, &l, p, begin, end - begin, &w);
    }
    memset(&r->s->context.observer, 0, sizeof r->s->context.observer);
    return l;
}

static void hand_case(rig *r, size_t depths, const passage *p, int actual, const char *what) {
    dsv3_losses want = by_hand(r, depths, p, actual), got = losses_make(r, depths);
    got.actual = actual;
    got.devices = actual ? want.devices : 0, got.most_devices = want.most_devices;
    CHECK_EQ(evaluate(r, &got, p, NULL), DSV3_OK);
    losses_compare(r, &got, &want, what);
    losses_free(&want), losses_free(&got);
}

/* A random text: up to four sequences with gaps between their numbers, packed documents, padding, own targets. */
static passage random_passage(size_t V) {
    passage p;
    int32_t sequence = (int32_t)(test_random() % 2), document = 3;
    memset(&p, 0, sizeof p);
    for (size_t i = 0; i < 1 + test_random() % 4; i++, sequence += 1 + (int32_t)(test_random() % 2)) {
        passage_add(&p, sequence, 1 + (size_t)(test_random() % 12), V);
    }
    p.has_sequence = 1;
    p.has_target = test_random() % 2 == 0;
    p.has_document = test_random() % 2 == 0;
    p.has_mask = test_random() % 2 == 0;
    for (size_t i = 0; i < p.n; i++) {
        if (test_random() % 5 == 0) document++;
        p.document[i] = document;
        if (test_random() % 6 == 0) p.mask[i] = 0;
        if (test_random() % 4 == 0) p.target[i] = DSV3_IGNORE;
    }
    return p;
}

static void test_by_hand(void) {
    static const struct {
        int which, D;
    } models[] = {{SYNTH_V3, 3}, {SYNTH_ODD, 4}, {SYNTH_FREQ, 2}, {SYNTH_V2, 1}, {SYNTH_DENSE, 0}};
    for (size_t m = 0; m < sizeof models / sizeof models[0]; m++) {
        rig r = rig_named(models[m].which, models[m].D, 20);
        r.s->context.attention = m % 2 ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED;
        if (m == 1) r.s->config.mtp_hidden = DSV3_MTP_PRE_NORM, CHECK_EQ(synth_bind(r.s, NULL), DSV3_OK);
        rig_run(&r, LONGEST, 1, 8, 12, m == 2 ? DSV3_BF16 : DSV3_F32);
        for (int i = 0; i < 16; i++) {
            passage p = random_passage(r.V);
            char what[100];
            snprintf(what, sizeof what, "%s, text %d: target %d, document %d, mask %d", synth_name(models[m].which),
                     i, p.has_target, p.has_document, p.has_mask);
            hand_case(&r, i % 4 == 3 ? r.D / 2 : r.D, &p, i / 2 % 2, what);
        }
        rig_close(&r);
    }
}

/* ---- Rules whose results can be said beforehand */

static uint64_t load_of(const rig *r, const dsv3_losses *l, size_t layer) {
    uint64_t sum = 0;
    for (size_t e = 0; e < r->E; e++) sum += l->load[layer * r->E + e];
    return sum;
}

/* A text of T tokens has T - 1 - k targets at depth k, T - k rows, and what is below 0 is 0. */
static void test_short_sequences(void) {
    rig r = rig_named(SYNTH_V3, MOST_DEPTHS, 21);
    rig_run(&r, LONGEST, 1, 8, 8, DSV3_F32);
    for (size_t T = 1; T <= 7; T++) {
        dsv3_losses l = losses_make(&r, r.D);
        passage p;
        memset(&p, 0, sizeof p);
        passage_add(&p, 0, T, r.V);
        CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
        CHECK_EQ(l.sequences, 1);
        CHECK_EQ(r.s->caches[0].length, T);
        CHECK_EQ(load_of(&r, &l, 0), 0); /* dense */
        CHECK_EQ(load_of(&r, &l, 1), T * r.K);
        for (size_t k = 0; k <= r.D; k++) {
            size_t rows = T > k ? T - k : 0;
            CHECK_EQ(l.targets[k], rows > 0 ? rows - 1 : 0);
            CHECK(rows > 1 ? l.nll[k] > 0 : fpclassify(l.nll[k]) == FP_ZERO);
            if (k == 0) continue;
            CHECK_EQ(load_of(&r, &l, r.L + k - 1), rows * r.K);
            CHECK_EQ(r.modules[(k - 1) * r.n].length, rows);
            CHECK(rows > 0 ? l.balance[r.L + k - 1] > 0 : fpclassify(l.balance[r.L + k - 1]) == FP_ZERO);
        }
        if (T == 1) CHECK(fpclassify(dsv3_losses_total(&l, r.L + r.D, 0.3, 0, DSV3_DIVIDE_BY_VALID)) == FP_ZERO);
        losses_free(&l);
    }
    rig_close(&r);
}

/* Documents of 3 and 5 tokens in one sequence: each counts like a sequence of its own. */
static void test_documents(void) {
    static const uint64_t targets[] = {2 + 4, 1 + 3, 0 + 2, 0 + 1, 0}, rows[] = {8, 2 + 4, 1 + 3, 2, 1};
    rig r = rig_named(SYNTH_V3, MOST_DEPTHS, 22);
    dsv3_losses l = losses_make(&r, r.D);
    passage p;
    memset(&p, 0, sizeof p);
    rig_run(&r, LONGEST, 1, 1, 8, DSV3_F32);
    passage_add(&p, 0, 8, r.V);
    for (size_t i = 3; i < 8; i++) p.document[i] = 0;
    p.has_document = 1;
    CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
    for (size_t k = 0; k <= r.D; k++) {
        CHECK_EQ(l.targets[k], targets[k]);
        CHECK_EQ(load_of(&r, &l, k == 0 ? 1 : r.L + k - 1), rows[k] * r.K);
    }
    losses_free(&l);
    rig_close(&r);
}

/* The last two of six tokens are padding: neither loss nor load nor balance loss, and the rest is as without them. */
static void test_padding(void) {
    rig r = rig_named(SYNTH_V3, 2, 23);
    dsv3_losses with = losses_make(&r, 2), without = losses_make(&r, 2);
    passage p;
    memset(&p, 0, sizeof p);
    rig_run(&r, LONGEST, 1, 1, 8, DSV3_F32);
    passage_add(&p, 0, 6, r.V);
    p.has_mask = 1, p.mask[4] = p.mask[5] = 0;
    CHECK_EQ(evaluate(&r, &with, &p, NULL), DSV3_OK);
    CHECK(with.targets[0] == 3 && with.targets[1] == 2 && with.targets[2] == 1);
    p.n = 4, p.has_mask = 0;
    CHECK_EQ(evaluate(&r, &without, &p, NULL), DSV3_OK);
    losses_compare(&r, &with, &without, "padding");
    losses_free(&with), losses_free(&without);
    rig_close(&r);
}

/* Nothing but ignored targets, then nothing but padding. */
static void test_nothing_counts(void) {
    rig r = rig_named(SYNTH_V3, 2, 24);
    for (int padding = 0; padding < 2; padding++) {
        dsv3_losses l = losses_make(&r, 2);
        passage p;
        memset(&p, 0, sizeof p);
        rig_run(&r, LONGEST, 1, 1, 8, DSV3_F32);
        passage_add(&p, 0, 6, r.V);
        p.has_target = !padding, p.has_mask = padding;
        for (size_t i = 0; i < p.n; i++) p.target[i] = DSV3_IGNORE, p.mask[i] = 0;
        CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
        for (size_t k = 0; k <= 2; k++) CHECK(l.targets[k] == 0 && fpclassify(l.nll[k]) == FP_ZERO);
        for (int divisor = 0; divisor < 2; divisor++) {
            double total = dsv3_losses_total(&l, r.L + r.D, 0.3, padding ? 1 : 0, (dsv3_mtp_divisor)divisor);
            CHECK(fpclassify(total) == FP_ZERO);
        }
        CHECK_EQ(load_of(&r, &l, 1), padding ? 0 : 6 * r.K);
        CHECK_EQ(load_of(&r, &l, r.L + 1), padding ? 0 : 4 * r.K);
        CHECK((l.balance[1] > 0) == !padding);
        losses_free(&l);
    }
    rig_close(&r);
}

/* ---- Documents apart: to the bit what sequences of their own are */

/* The same rows, each document (up to where its number or the sequence changes) a sequence. */
static passage each_alone(const passage *p) {
    passage q = *p;
    int32_t sequence = 0;
    for (size_t i = 0; i < p->n; i++) {
        int another = i > 0 && ((p->has_sequence && p->sequence[i] != p->sequence[i - 1]) ||
                                (p->has_document && p->document[i] != p->document[i - 1]));
        q.sequence[i] = sequence += another;
    }
    q.has_sequence = 1;
    q.has_document = q.apart = 0;
    return q;
}

/* Random texts whose documents return (A B A), with few caches and a workspace that cuts them anywhere; and the same rows as
 * sequences, each with a cache. */
static void test_apart(void) {
    static const int which[] = {SYNTH_V3, SYNTH_ODD, SYNTH_V2, SYNTH_DENSE};
    int differ = 0;
    for (size_t m = 0; m < 4; m++) {
        rig r = rig_named(which[m], m == 3 ? 0 : 2, 33);
        r.s->context.attention = m % 2 ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED;
        for (size_t i = 0; i < 12; i++) {
            passage p = random_passage(r.V), alone;
            dsv3_losses want = losses_make(&r, r.D), got = losses_make(&r, r.D), across = losses_make(&r, r.D);
            double *balance = got.balance;
            for (size_t j = 0; j < p.n; j++) p.document[j] %= 2;
            p.has_document = i > 0; /* without any, apart changes nothing */
            alone = each_alone(&p);
            rig_run(&r, LONGEST, 1, 48, 12, m == 2 ? DSV3_BF16 : DSV3_F32);
            CHECK_EQ(evaluate(&r, &want, &alone, NULL), DSV3_OK);
            rig_run(&r, i % 3 == 0 ? LONGEST : i, 1, 8, 12, m == 2 ? DSV3_BF16 : DSV3_F32);
            if (i % 3 != 0) got.balance = NULL; /* it wants the text whole */
            p.apart = 1;
            CHECK_EQ(evaluate(&r, &got, &p, NULL), DSV3_OK);
            CHECK(same_losses(&r, &got, &want));
            if (i % 3 == 0) CHECK(memcmp(got.balance, want.balance, (r.L + r.D) * sizeof(double)) == 0);
            for (size_t c = 0; c < r.n; c++) CHECK_EQ(r.s->caches[c].length, 0);
            p.apart = 0;
            rig_run(&r, LONGEST, 1, 8, 12, m == 2 ? DSV3_BF16 : DSV3_F32);
            CHECK_EQ(evaluate(&r, &across, &p, NULL), DSV3_OK);
            differ += !same_losses(&r, &across, &want);
            got.balance = balance;
            losses_free(&want), losses_free(&got), losses_free(&across);
        }
        rig_close(&r);
    }
    CHECK(differ > 24); /* attention across borders is another thing */
}

/* Without depths there is nothing to lay in modules. */
static void test_no_modules(void) {
    rig r = rig_named(SYNTH_V3, 2, 34);
    dsv3_losses l = losses_make(&r, 0);
    dsv3_cache *modules;
    passage p;
    memset(&p, 0, sizeof p);
    rig_run(&r, LONGEST, 1, 2, 9, DSV3_F32);
    passage_add(&p, 0, 6, r.V);
    modules = r.modules, r.modules = NULL;
    CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
    CHECK(l.targets[0] == 5 && l.nll[0] > 0);
    r.modules = modules;
    losses_free(&l);
    rig_close(&r);
}

/* Padding in front, as a document apart, changes nothing; else it does. What does not fit is refused. */
static void test_apart_padding(void) {
    rig r = rig_named(SYNTH_V3, 2, 34);
    dsv3_losses want = losses_make(&r, 2);
    passage p, padded;
    dsv3_error e;
    memset(&p, 0, sizeof p);
    rig_run(&r, LONGEST, 1, 2, 9, DSV3_F32);
    passage_add(&p, 0, 6, r.V);
    padded = p;
    CHECK_EQ(evaluate(&r, &want, &p, NULL), DSV3_OK);
    padded.n = 0;
    passage_add(&padded, 0, 3, r.V);
    for (size_t i = 0; i < 3; i++) padded.mask[i] = 0, padded.document[i] = 1;
    for (size_t i = 0; i < p.n; i++, padded.n++) {
        padded.token[padded.n] = p.token[i], padded.document[padded.n] = 2, padded.mask[padded.n] = 1;
        padded.sequence[padded.n] = 0;
    }
    padded.has_document = padded.has_mask = 1;
    for (padded.apart = 0; padded.apart < 2; padded.apart++) {
        dsv3_losses got = losses_make(&r, 2);
        CHECK_EQ(evaluate(&r, &got, &padded, NULL), DSV3_OK);
        CHECK_EQ(same_losses(&r, &got, &want), padded.apart);
        losses_free(&got);
    }
    padded.apart = 1, padded.has_sequence = 1;
    for (int32_t bad = -1; bad < 3; bad += 3) { /* -1 and 2 */
        for (size_t i = 0; i < padded.n; i++) padded.sequence[i] = bad;
        CHECK_EQ(evaluate(&r, &want, &padded, &e), DSV3_ERR_ARG);
        CHECK(strcmp(e.name, "sequence[0]") == 0);
    }
    for (size_t i = 0; i < padded.n; i++) padded.sequence[i] = 1;
    rig_run(&r, LONGEST, 1, 2, 8, DSV3_F32); /* nine rows of one cache, though no document is as long */
    CHECK_EQ(evaluate(&r, &want, &padded, &e), DSV3_ERR_FULL);
    CHECK(strcmp(e.name, "position[8]") == 0 && e.found[0] == 8 && e.expected[1] == 7);
    losses_free(&want);
    rig_close(&r);
}

/* ---- The same sums by different ways */

static passage long_passage(size_t V) {
    static const size_t length[] = {9, 1, 12, 3, 7};
    passage p;
    memset(&p, 0, sizeof p);
    for (int32_t i = 0; i < 5; i++) passage_add(&p, i, length[i], V);
    for (size_t i = 14; i < p.n; i++) p.document[i] = 9;
    p.mask[5] = p.mask[20] = 0;
    p.has_sequence = p.has_document = p.has_mask = 1;
    return p;
}

/* Rows [begin, end) as a text of their own. */
static passage part_of(const passage *p, size_t begin, size_t end) {
    passage part = *p;
    part.n = 0;
    for (size_t i = begin; i < end; i++, part.n++) {
        part.token[part.n] = p->token[i], part.target[part.n] = p->target[i];
        part.sequence[part.n] = p->sequence[i], part.document[part.n] = p->document[i];
        part.mask[part.n] = p->mask[i];
    }
    return part;
}

/* One sequence after the other into the same losses: micro-batches add up. */
static void test_micro_batches(void) {
    rig r = rig_named(SYNTH_V3, 3, 25);
    passage p = long_passage(r.V);
    dsv3_losses whole = losses_make(&r, 3), sum = losses_make(&r, 3);
    rig_run(&r, LONGEST, 1, 5, 12, DSV3_F32);
    CHECK_EQ(evaluate(&r, &whole, &p, NULL), DSV3_OK);
    CHECK_EQ(whole.sequences, 5);
    for (size_t begin = 0, end; begin < p.n; begin = end) {
        dsv3_losses alone = losses_make(&r, 3), want;
        passage part;
        for (end = begin; end < p.n && p.sequence[end] == p.sequence[begin]; end++) {
        }
        part = part_of(&p, begin, end);
        CHECK_EQ(evaluate(&r, &sum, &part, NULL), DSV3_OK);
        CHECK_EQ(evaluate(&r, &alone, &part, NULL), DSV3_OK);
        want = by_hand(&r, 3, &part, 0);
        losses_compare(&r, &alone, &want, "alone");
        losses_free(&alone), losses_free(&want);
    }
    losses_compare(&r, &sum, &whole, "micro-batches");
    losses_free(&whole), losses_free(&sum);
    rig_close(&r);
}

/* A workspace too small for the text: taken in pieces, which end anywhere, also between i and i + k. Terms are added
 * in the order of the rows, so not even a bit changes. */
static void test_pieces(void) {
    static const size_t rows[] = {1, 2, 3, 5, 9, 31};
    rig r = rig_named(SYNTH_V3, 3, 26);
    passage p = long_passage(r.V);
    dsv3_losses whole = losses_make(&r, 3);
    for (int given = 0; given < 2; given++) {
        p.has_target = given;
        rig_run(&r, p.n, 1, 5, 12, DSV3_F32);
        losses_free(&whole), whole = losses_make(&r, 3);
        CHECK_EQ(evaluate(&r, &whole, &p, NULL), DSV3_OK);
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
            dsv3_losses l = losses_make(&r, 3);
            free(l.balance), l.balance = NULL;
            rig_run(&r, rows[i], 1, 5, 12, DSV3_F32);
            CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
            CHECK(same_losses(&r, &l, &whole));
            losses_free(&l);
        }
    }
    losses_free(&whole);
    rig_close(&r);
}

static void test_evaluate_threads(void) {
    static const size_t threads[] = {2, 4};
    dsv3_config c = wide_config();
    rig r = rig_open(&c, SYNTH_BF16, 27, COPY_HEAD);
    passage p = long_passage(r.V);
    dsv3_losses one = losses_make(&r, 2);
    rig_run(&r, p.n, 4, 5, 12, DSV3_F32);
    set_threads(&r, 1, 0);
    CHECK_EQ(evaluate(&r, &one, &p, NULL), DSV3_OK);
    for (size_t i = 0; i < 4; i++) {
        dsv3_losses l = losses_make(&r, 2);
        set_threads(&r, threads[i / 2], i % 2);
        CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
        CHECK(same_losses(&r, &l, &one));
        CHECK(memcmp(l.balance, one.balance, (r.L + r.D) * sizeof *l.balance) == 0);
        losses_free(&l);
    }
    losses_free(&one);
    rig_close(&r);
}

/* What the caller does not want is not touched, and the rest does not change. */
static void test_not_wanted(void) {
    rig r = rig_named(SYNTH_V3, 2, 28);
    passage p = long_passage(r.V);
    dsv3_losses whole = losses_make(&r, 2), l = losses_make(&r, 1);
    dsv3_text x = text_of(&p);
    rig_run(&r, p.n, 1, 5, 12, DSV3_F32);
    CHECK_EQ(evaluate(&r, &whole, &p, NULL), DSV3_OK);
    free(l.load), l.load = NULL;
    CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
    CHECK(memcmp(l.balance, whole.balance, (r.L + 1) * sizeof *l.balance) == 0);
    CHECK(fpclassify(l.balance[r.L + 1]) == FP_ZERO);
    free(l.balance), l.balance = NULL;
    l.depths = 0, l.nll[0] = 0, l.targets[0] = 0;
    CHECK_EQ(dsv3_evaluate(&r.s->context, &l, &r.s->model, r.s->caches, NULL, 5, &x, &r.s->ws, NULL), DSV3_OK);
    CHECK(memcmp(l.nll, whole.nll, sizeof *l.nll) == 0 && l.targets[0] == whole.targets[0]);
    CHECK_EQ(dsv3_evaluate(&r.s->context, &l, &r.s->model, r.s->caches, NULL, 5, &x, &r.s->ws, NULL), DSV3_OK);
    CHECK_EQ(l.targets[0], 2 * whole.targets[0]);
    losses_free(&whole), losses_free(&l);
    rig_close(&r);
}

/* Caches are emptied first, and afterwards hold the text: it can be continued. */
static void test_caches_afterwards(void) {
    rig r = rig_named(SYNTH_V3, 2, 29);
    float *want = logits_of_all(&r, S), *got = (float *)test_alloc(r.V * sizeof(float));
    dsv3_losses l = losses_make(&r, 2);
    passage p;
    memset(&p, 0, sizeof p);
    rig_run(&r, S, 1, 2, S, DSV3_F32);
    passage_add(&p, 0, S, r.V);
    compute(&r, want, p.token, S, S);
    synth_demand(synth_forward(r.s, want, p.token, S, 1, NULL), "forward", NULL); /* full, and not of this text */
    p.n = S - 1;
    CHECK_EQ(evaluate(&r, &l, &p, NULL), DSV3_OK);
    CHECK(r.s->caches[0].length == S - 1 && r.s->caches[1].length == 0);
    for (size_t k = 1; k <= 2; k++)
        CHECK(r.modules[2 * k - 2].length == S - 1 - k && r.modules[2 * k - 1].length == 0);
    CHECK_EQ(synth_forward(r.s, got, p.token + S - 1, 1, 0, NULL), DSV3_OK);
    CHECK(same_bits(got, want + (S - 1) * r.V, r.V));
    free(want), free(got);
    losses_free(&l);
    rig_close(&r);
}

/* ---- Observers are still called, with their own user pointer */

typedef struct witness {
    const rig *r;
    size_t T, event; /* calls so far */
    int wrong, force, duplicate;
} witness;

/* The calls of a pass, in order: of each layer choose and routing (if MoE), then hidden; at the end hidden of -1. A
 * whole text is one pass of the main model and one of each module, with a row less each time. */
static void expect_event(witness *w, char kind, int32_t layer, size_t n) {
    size_t event = 0;
    for (size_t i = 0; i < w->r->L + w->r->D; i++) {
        size_t k = i < w->r->L ? 0 : i - w->r->L + 1;
        int moe = w->r->s->model.layers[i].is_moe, last = i + 1 >= w->r->L;
        const char *kinds = moe ? "crhe" : "he";
        for (const char *c = kinds; *c != '\0'; c++) {
            if (*c == 'e' && !last) continue;
            if (event++ != w->event) continue;
            w->wrong += kind != (*c == 'e' ? 'h' : *c) || layer != (*c == 'e' ? -1 : (int32_t)i) || n != w->T - k;
        }
    }
    w->wrong += w->event++ >= event;
}

static void witness_hidden(void *user, int32_t layer, const float *x, size_t n) {
    (void)x;
    expect_event((witness *)user, 'h', layer, n);
}

static void witness_choose(void *user, int32_t layer, int32_t *idx, const float *score, size_t n) {
    witness *w = (witness *)user;
    (void)score;
    expect_event(w, 'c', layer, n);
    for (size_t i = 0; i < n * w->r->K && w->force; i++) idx[i] = (int32_t)(i % w->r->K);
    if (w->duplicate && (size_t)layer >= w->r->L) idx[1] = idx[0];
}

static void witness_routing(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                            size_t n) {
    (void)score, (void)idx, (void)gate;
    expect_event((witness *)user, 'r', layer, n);
}

static void test_observers(void) {
    rig r = rig_named(SYNTH_FREQ, 2, 30);
    dsv3_losses plain = losses_make(&r, 2), seen_too = losses_make(&r, 2), forced = losses_make(&r, 2);
    dsv3_error e;
    witness w;
    passage p;
    memset(&p, 0, sizeof p);
    rig_run(&r, S, 1, 1, S, DSV3_F32);
    passage_add(&p, 0, S, r.V);
    CHECK_EQ(evaluate(&r, &plain, &p, NULL), DSV3_OK);
    memset(&w, 0, sizeof w);
    w.r = &r, w.T = S;
    r.s->context.observer.user = &w;
    r.s->context.observer.hidden = witness_hidden;
    r.s->context.observer.choose = witness_choose;
    r.s->context.observer.routing = witness_routing;
    CHECK_EQ(evaluate(&r, &seen_too, &p, NULL), DSV3_OK);
    CHECK(w.wrong == 0 && w.event > 10);
    CHECK(same_losses(&r, &seen_too, &plain));
    w.event = 0, w.force = 1;
    CHECK_EQ(evaluate(&r, &forced, &p, NULL), DSV3_OK); /* a forced routing is what counts */
    CHECK_EQ(w.wrong, 0);
    for (size_t i = 0; i < (r.L + r.D) * r.E; i++) {
        size_t layer = i / r.E, rows = layer < r.L ? S : S - 1 - (layer - r.L);
        CHECK_EQ(forced.load[i], r.s->model.layers[layer].is_moe && i % r.E < r.K ? rows : 0);
    }
    w.duplicate = 1;
    CHECK_EQ(evaluate(&r, &forced, &p, &e), DSV3_ERR_ARG);
    CHECK(strcmp(e.name, "observer.choose") == 0 && e.found[0] == 6); /* layer 5 is dense */
    losses_free(&plain), losses_free(&seen_too), losses_free(&forced);
    rig_close(&r);
}

/* ---- Bad calls of dsv3_evaluate */

typedef struct bad_text {
    rig *r;
    dsv3_context *context;
    dsv3_losses *losses;
    dsv3_model *model;
    dsv3_cache *caches, *modules;
    size_t n_caches;
    dsv3_text *text;
    dsv3_workspace *ws;
} bad_text;

static void refuse_text(const bad_text *c, int code, const char *name, int line) {
    dsv3_error e;
    dsv3_result result;
    char message[300];
    memset(&e, 0xFF, sizeof e);
    result = dsv3_evaluate(c->context, c->losses, c->model, c->caches, c->modules, c->n_caches, c->text, c->ws, &e);
    snprintf(message, sizeof message, "got %d \"%s\", want %d \"%s\"", (int)result, e.name, code, name);
    test_count(result == code && e.code == code && strcmp(e.name, name) == 0, __FILE__, line, message);
    result = dsv3_evaluate(c->context, c->losses, c->model, c->caches, c->modules, c->n_caches, c->text, c->ws, NULL);
    CHECK_EQ(result, code);
}

#define REFUSE_TEXT(code, name) refuse_text(&c, code, name, __LINE__)

static void refuse_text_pointers(bad_text c) {
    bad_text good = c;
    dsv3_losses losses = *c.losses;
    dsv3_text text = *c.text;
    c.context = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "context"), c = good;
    c.losses = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "losses"), c = good;
    c.model = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "model"), c = good;
    c.caches = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "caches"), c = good;
    c.modules = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "modules"), c = good;
    c.text = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "text"), c = good;
    c.ws = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "workspace"), c = good;
    c.text->token = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "token"), *c.text = text;
    c.losses->nll = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "nll"), *c.losses = losses;
    c.losses->targets = NULL, REFUSE_TEXT(DSV3_ERR_ARG, "targets"), *c.losses = losses;
    c.text->rows = 0, REFUSE_TEXT(DSV3_ERR_ARG, "rows"), *c.text = text;
}

static void refuse_text_sizes(bad_text c) {
    bad_text good = c;
    dsv3_workspace small = *c.ws;
    c.losses->depths = 3, REFUSE_TEXT(DSV3_ERR_ARG, "depths"), c.losses->depths = 2;
    c.model->n_mtp = 1, REFUSE_TEXT(DSV3_ERR_ARG, "depths"), c.model->n_mtp = 2;
    c.context->threads = 2, REFUSE_TEXT(DSV3_ERR_MEMORY, "threads"), c.context->threads = 1;
    small.rows = 5; /* too small for a balance loss, and for nothing else */
    c.ws = &small, REFUSE_TEXT(DSV3_ERR_MEMORY, "rows"), c = good;
    small = *c.ws, small.made_for++;
    c.ws = &small, REFUSE_TEXT(DSV3_ERR_MISMATCH, "workspace"), c = good;
    c.caches = c.modules, REFUSE_TEXT(DSV3_ERR_ARG, "modules[0]"), c = good;
    c.modules = c.caches, c.losses->depths = 1, REFUSE_TEXT(DSV3_ERR_ARG, "modules[0]"), c = good;
    c.losses->depths = 2;
    c.n_caches = 1, REFUSE_TEXT(DSV3_ERR_ARG, "sequence[4]"), c = good;
    c.caches[1].capacity = 1, REFUSE_TEXT(DSV3_ERR_FULL, "position[5]"), c.caches[1].capacity = S;
    c.modules[3].capacity = 0; /* of depth 2: the second sequence has two tokens, so no row there */
    CHECK_EQ(dsv3_evaluate(c.context, c.losses, c.model, c.caches, c.modules, 2, c.text, c.ws, NULL), DSV3_OK);
    c.modules[2].capacity = 1, REFUSE_TEXT(DSV3_ERR_FULL, "position[1]");
    c.modules[2].capacity = c.modules[3].capacity = S;
}

static void refuse_text_rows(bad_text c, passage *p) {
    static const int32_t bad[] = {-1, -99, -101, INT32_MIN, INT32_MAX};
    int32_t V = c.model->config.vocab_size;
    c.text->target = p->target;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        p->target[2] = bad[i], REFUSE_TEXT(DSV3_ERR_TOKEN, "target[2]");
    }
    p->target[2] = V, REFUSE_TEXT(DSV3_ERR_TOKEN, "target[2]"), p->target[2] = V - 1;
    c.text->target = NULL;
    p->token[5] = V, REFUSE_TEXT(DSV3_ERR_TOKEN, "token[5]"), p->token[5] = DSV3_IGNORE;
    REFUSE_TEXT(DSV3_ERR_TOKEN, "token[5]"), p->token[5] = 0;
    p->sequence[2] = 1, REFUSE_TEXT(DSV3_ERR_ARG, "sequence[3]"), p->sequence[2] = 0;
    p->sequence[3] = -1, REFUSE_TEXT(DSV3_ERR_ARG, "sequence[3]"), p->sequence[3] = 0;
    p->sequence[0] = -1, REFUSE_TEXT(DSV3_ERR_ARG, "sequence[0]"), p->sequence[0] = 0;
    p->sequence[5] = 2, REFUSE_TEXT(DSV3_ERR_ARG, "sequence[5]"), p->sequence[5] = 1;
}

static void test_bad_texts(void) {
    rig r = rig_named(SYNTH_V3, 2, 31);
    dsv3_losses l = losses_make(&r, 2);
    bad_text c;
    passage p;
    dsv3_text x;
    memset(&p, 0, sizeof p);
    rig_run(&r, S, 1, 2, S, DSV3_F32);
    passage_add(&p, 0, 4, r.V), passage_add(&p, 1, 2, r.V);
    p.has_sequence = 1;
    x = text_of(&p);
    memset(&c, 0, sizeof c);
    c.r = &r;
    c.context = &r.s->context, c.losses = &l, c.model = &r.s->model, c.caches = r.s->caches, c.modules = r.modules;
    c.n_caches = 2, c.text = &x, c.ws = &r.s->ws;
    refuse_text_pointers(c);
    refuse_text_sizes(c);
    refuse_text_rows(c, &p);
    CHECK_EQ(dsv3_evaluate(c.context, &l, c.model, c.caches, c.modules, 2, &x, c.ws, NULL), DSV3_OK);
    losses_free(&l);
    rig_close(&r);
}

/* NaN in a weight that some depth needs: the code, and for a head the row of the text that was hit. */
static void test_nan_losses(void) {
    static const char *const names[] = {"model.layers.3.eh_proj.weight", "model.layers.4.shared_head.norm.weight",
                                        "model.layers.3.shared_head.head.weight", "lm_head.weight",
                                        "model.norm.weight"};
    rig r = rig_named(SYNTH_MTP, 2, 32);
    dsv3_losses l = losses_make(&r, 2);
    dsv3_error e;
    passage p;
    memset(&p, 0, sizeof p);
    rig_run(&r, 4, 1, 1, S, DSV3_F32);
    free(l.balance), l.balance = NULL;
    passage_add(&p, 0, S, r.V);
    p.has_target = 1;
    for (size_t i = 0; i < S; i++) p.target[i] = i == 6 ? 3 : DSV3_IGNORE; /* in the second piece of four rows */
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        synth_tensor *t = synth_get(r.s, -1, -1, names[i]);
        float old = (float)t->value[7];
        synth_set(t, 7, (float)NAN);
        CHECK_EQ(evaluate(&r, &l, &p, &e), DSV3_ERR_NAN);
        CHECK_EQ(e.code, DSV3_ERR_NAN);
        if (i == 2) CHECK(strcmp(e.name, "loss") == 0 && e.found[0] == 5); /* depth 1: one row earlier */
        if (i == 3) CHECK(strcmp(e.name, "loss") == 0 && e.found[0] == 6);
        synth_set(t, 7, old);
    }
    CHECK_EQ(evaluate(&r, &l, &p, &e), DSV3_OK);
    losses_free(&l);
    rig_close(&r);
}

/* ---- The total */

static void total_is(const dsv3_losses *l, double lambda, double alpha, int divisor, double want) {
    double got = dsv3_losses_total(l, 3, lambda, alpha, (dsv3_mtp_divisor)divisor);
    if (!(fabs(got - want) <= 1e-12)) fprintf(stderr, "total: got %.17g, want %.17g\n", got, want);
    CHECK(fabs(got - want) <= 1e-12);
}

static void test_total(void) {
    double nll[3] = {10, 6, 3}, balance[3] = {1.5, 0, 3};
    uint64_t targets[3] = {5, 4, 2};
    dsv3_losses l;
    memset(&l, 0, sizeof l);
    l.depths = 2, l.nll = nll, l.targets = targets, l.balance = balance, l.sequences = 2;
    total_is(&l, 0.3, 0.01, DSV3_DIVIDE_BY_MAIN, 10.0 / 5 + 0.15 * (6.0 / 5 + 3.0 / 5) + 0.01 * 4.5 / 2);
    total_is(&l, 0.3, 0.01, DSV3_DIVIDE_BY_VALID, 10.0 / 5 + 0.15 * (6.0 / 4 + 3.0 / 2) + 0.01 * 4.5 / 2);
    total_is(&l, 0, 0, DSV3_DIVIDE_BY_VALID, 2);
    CHECK(near_to(dsv3_losses_total(&l, 1, 0, 1, DSV3_DIVIDE_BY_MAIN), 2 + 0.75, 1e-12)); /* layers */
    targets[2] = 0, nll[2] = 0; /* too short for depth 2: it adds nothing, and lambda is still divided by 2 */
    total_is(&l, 0.3, 0, DSV3_DIVIDE_BY_MAIN, 2 + 0.15 * 6.0 / 5);
    total_is(&l, 0.3, 0, DSV3_DIVIDE_BY_VALID, 2 + 0.15 * 6.0 / 4);
    l.depths = 0;
    total_is(&l, 0.3, 0.01, DSV3_DIVIDE_BY_VALID, 2 + 0.01 * 4.5 / 2);
    l.depths = 2, targets[0] = targets[1] = 0, nll[0] = nll[1] = 0; /* nothing but the balance loss */
    total_is(&l, 0.3, 0.01, DSV3_DIVIDE_BY_MAIN, 0.01 * 4.5 / 2);
    total_is(&l, 0.3, 0.01, DSV3_DIVIDE_BY_VALID, 0.01 * 4.5 / 2);
    l.balance = NULL;
    total_is(&l, 0.3, 0.01, DSV3_DIVIDE_BY_VALID, 0);
    l.balance = balance, l.sequences = 0;
    total_is(&l, 0.3, 0.01, DSV3_DIVIDE_BY_MAIN, 0);
}

int main(void) {
    test_oracle();
    test_oracle_tied();
    test_concat();
    test_hidden();
    test_same_bits();
    test_outputs();
    test_bad_calls();
    test_foreign_workspace();
    test_nan();
    test_cache_setup();
    test_exact_memory();
    test_bind();
    test_by_hand();
    test_short_sequences();
    test_documents();
    test_padding();
    test_nothing_counts();
    test_apart();
    test_apart_padding();
    test_no_modules();
    test_micro_batches();
    test_pieces();
    test_evaluate_threads();
    test_not_wanted();
    test_caches_afterwards();
    test_observers();
    test_bad_texts();
    test_nan_losses();
    test_total();
    return test_done("mtp");
}
