/* test_mla.c -- chapter 6: multi-head latent attention.
 *
 * A failure means that attention gives wrong numbers: a head reads another head's rows of kv_b_proj, a key block or a
 * query block is cut in the wrong place, RoPE turns the wrong part, the absorbed and the expanded form have come
 * apart, or the cache keeps something other than the normalised latent and the rotated key. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#define POSITIONS 300 /* more than a segment of the engine has keys */

static const size_t lengths[] = {1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, POSITIONS};

/* Begins a batch of n rows of sequence 0, runs the attention of `layer`, ends it. */
static void run_mla(synth *s, float *y, const float *u, size_t layer, size_t n) {
    int32_t *token = (int32_t *)test_alloc(n * sizeof *token);
    dsv3_batch batch;
    dsv3_error error;
    memset(token, 0, n * sizeof *token);
    memset(&batch, 0, sizeof batch);
    batch.rows = n;
    batch.token = token;
    CHECK_EQ(dsv3_batch_begin(&s->context, &s->model, s->caches, s->n_caches, &batch, &s->ws, &error), DSV3_OK);
    dsv3_mla_forward(&s->context, y, u, &s->model, &s->model.layers[layer], layer, s->caches, n, &s->ws, NULL);
    dsv3_batch_end(s->caches, &batch, &s->ws, NULL);
    free(token);
}

/* ---- The published example: all matrices from one formula, 24 numbers */

static const double golden[24] = {0.35589374,   -0.103684799,  -0.344283309,  0.142237006,   0.328355873,
                                  -0.179005687, -0.308311148,  0.213529798,   0.186206616,   -0.0626942625,
                                  -0.179186229, 0.082759204,   0.169919007,   -0.101786419,  -0.158521152,
                                  0.119537324,  0.0737163015,  -0.0310322309, -0.0702413699, 0.0388977292,
                                  0.0658856743, -0.0462754847, -0.0607038314, 0.0530729872};

static void golden_matrix(synth *s, const char *name, double seed) {
    synth_tensor *t = synth_get(s, 0, -1, name);
    size_t rows = t->t.rows, cols = t->t.cols;
    for (size_t i = 0; i < rows * cols; i++) {
        double r = (double)(i / cols), c = (double)(i % cols);
        synth_encode(DSV3_F32, t->data, i, (float)(0.4 * sin(seed + 1.3 * r * (double)cols + 0.7 * c + 0.11 * r)));
    }
    synth_refresh(t);
}

static void golden_ones(synth *s, const char *name) {
    synth_tensor *t = synth_get(s, 0, -1, name);
    for (size_t i = 0; i < t->t.cols; i++) synth_set(t, i, 1.0f);
}

static void test_golden(void) {
    dsv3_config c = dsv3_config_default();
    synth *s;
    float u[24], y[24];
    double u64[24], y64[24], latent[24];
    synth_sizes(&c, 5, 8, 8, 0, 1, 1);
    synth_attention(&c, 2, 6, 4, 4, 4, 3);
    s = synth_open(&c, SYNTH_F32, 1);
    golden_matrix(s, "self_attn.q_a_proj.weight", 0.1);
    golden_matrix(s, "self_attn.q_b_proj.weight", 0.2);
    golden_matrix(s, "self_attn.kv_a_proj_with_mqa.weight", 0.3);
    golden_matrix(s, "self_attn.kv_b_proj.weight", 0.4);
    golden_matrix(s, "self_attn.o_proj.weight", 0.5);
    golden_ones(s, "self_attn.q_a_layernorm.weight");
    golden_ones(s, "self_attn.kv_a_layernorm.weight");
    for (int i = 0; i < 24; i++) {
        u64[i] = sin(0.5 + 0.3 * (i % 8) + 0.9 * (double)(i / 8));
        u[i] = (float)u64[i];
    }
    oracle_latents(s, 0, latent, u64, 3);
    oracle_mla(s, 0, y64, u64, 3, latent);
    for (int i = 0; i < 24; i++) CHECK(fabs(y64[i] - golden[i]) < 1e-7); /* matrices are rounded to float32 */
    for (int form = 1; form <= 2; form++) {
        s->context.attention = form == 1 ? DSV3_ATTENTION_ABSORBED : DSV3_ATTENTION_EXPANDED;
        synth_run(s, 3, 1, 1, 3, DSV3_F32);
        run_mla(s, y, u, 0, 3);
        CHECK_CLOSE(y, golden, 24, 1e-6);
    }
    synth_close(s);
}

/* ---- Random cases against the oracle */

/* The cache's rows [n, width] of a layer as numbers. */
static void cache_values(const synth *s, double *value, size_t layer, size_t n) {
    const dsv3_cache *cache = &s->caches[0];
    for (size_t i = 0; i < n * cache->width; i++) {
        value[i] = synth_element(cache->type, (const unsigned char *)cache->data,
                                 layer * cache->capacity * cache->width + i);
    }
}

/* Every byte of the cache outside the first n positions of `layer` still has the pattern synth_run left there. */
static int cache_rest_untouched(const synth *s, size_t layer, size_t n) {
    const dsv3_cache *cache = &s->caches[0];
    size_t row = cache->width * dsv3_type_bytes(cache->type), first = layer * cache->capacity * row;
    const unsigned char *bytes = (const unsigned char *)cache->data;
    for (size_t i = 0; i < cache->layers * cache->capacity * row; i++) {
        if ((i < first || i >= first + n * row) && bytes[i] != 0xA5) return 0;
    }
    return 1;
}

typedef struct mla_case {
    synth *s;
    size_t layer, d, width;
    float *u;          /* [POSITIONS, d] */
    double *u64, *y64; /* the oracle's output over its own latents */
    double *latent;    /* [POSITIONS, width] */
    double *kept, *yk; /* latents as the BF16 cache keeps them, the oracle's output over those */
    float *y;
} mla_case;

/* What the cache holds agrees with the oracle: float32 closely, BF16 to half a unit of its 8 digits. */
static void check_latents(mla_case *m, size_t n) {
    int bf16 = m->s->caches[0].type == DSV3_BF16;
    size_t wrong = 0;
    cache_values(m->s, m->kept, m->layer, n);
    for (size_t i = 0; i < n * m->width; i++) {
        double e = fabs(m->kept[i] - m->latent[i]), bound = 3e-6;
        if (bf16) bound += fabs(m->latent[i]) / 256.0;
        wrong += !(e <= bound);
    }
    CHECK_EQ(wrong, 0);
    CHECK(cache_rest_untouched(m->s, m->layer, n));
}

/* n rows in chunks of `chunk`. */
static void check_rows(mla_case *m, size_t n, size_t chunk, dsv3_type type) {
    synth_run(m->s, chunk, 1, 1, n, type);
    memset(m->s->ws_memory, 0xFF, m->s->ws_bytes);
    for (size_t t = 0; t < n; t += chunk) {
        size_t rows = n - t < chunk ? n - t : chunk;
        run_mla(m->s, m->y + t * m->d, m->u + t * m->d, m->layer, rows);
    }
    CHECK_EQ(m->s->caches[0].length, n);
    check_latents(m, n);
    if (type == DSV3_F32) {
        CHECK_CLOSE(m->y, m->y64, n * m->d, 2e-6);
    } else {
        oracle_mla(m->s, (int)m->layer, m->yk, m->u64, n, m->kept);
        CHECK_CLOSE(m->y, m->yk, n * m->d, 2e-6);
    }
}

static void test_case(const dsv3_config *c, int types, size_t layer) {
    mla_case m;
    size_t n;
    m.s = synth_open(c, types, 77);
    m.layer = layer;
    m.d = (size_t)c->hidden_size;
    m.width = (size_t)c->kv_lora_rank + (size_t)c->qk_rope_head_dim;
    n = POSITIONS * m.d;
    m.u = (float *)test_alloc(n * sizeof(float));
    m.y = (float *)test_alloc(n * sizeof(float));
    m.u64 = synth_doubles(n), m.y64 = synth_doubles(n), m.yk = synth_doubles(n);
    m.latent = synth_doubles(POSITIONS * m.width), m.kept = synth_doubles(POSITIONS * m.width);
    test_fill(m.u, n, -1.7f, 1.7f);
    for (size_t i = 0; i < n; i++) m.u64[i] = (double)m.u[i];
    oracle_latents(m.s, (int)layer, m.latent, m.u64, POSITIONS);
    oracle_mla(m.s, (int)layer, m.y64, m.u64, POSITIONS, m.latent);
    for (int form = 1; form <= 2; form++) {
        m.s->context.attention = form == 1 ? DSV3_ATTENTION_ABSORBED : DSV3_ATTENTION_EXPANDED;
        for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
            check_rows(&m, lengths[i], lengths[i], DSV3_F32);
            if (lengths[i] <= 33) check_rows(&m, lengths[i], lengths[i], DSV3_BF16);
        }
        check_rows(&m, POSITIONS, 9, DSV3_F32);
        check_rows(&m, 65, 33, DSV3_BF16);
    }
    free(m.u), free(m.y), free(m.u64), free(m.y64), free(m.yk), free(m.latent), free(m.kept);
    synth_close(m.s);
}

static void test_random_cases(void) {
    static const int which[] = {SYNTH_V3, SYNTH_MOONLIGHT, SYNTH_V2, SYNTH_ODD};
    for (size_t i = 0; i < 4; i++) {
        int types;
        dsv3_config c = synth_config(which[i], &types);
        for (int interleave = 0; interleave < 2; interleave++) {
            c.rope_interleave = interleave;
            test_case(&c, types, 1);
        }
    }
}

/* 3 heads of 96 rows: blocks of 128 rows cut through heads; rk 130: the last column block has 2 columns. */
static void test_fp8(void) {
    int types;
    dsv3_config c = synth_config(SYNTH_BLOCKS, &types);
    c.hidden_size = 129;
    test_case(&c, types, 0);
}

/* ---- Two sequences in one call see their own cache only */

static void test_two_sequences(void) {
    enum { N = 40 };
    synth *s = synth_open_named(SYNTH_V3, 5);
    size_t d = (size_t)s->config.hidden_size;
    float *u = (float *)test_alloc(2 * N * d * sizeof *u), *alone = (float *)test_alloc(2 * N * d * sizeof *u);
    float *both = (float *)test_alloc(2 * N * d * sizeof *u), *part = (float *)test_alloc(N * d * sizeof *u);
    int32_t token[2 * N] = {0}, sequence[2 * N];
    dsv3_batch batch;
    memset(&batch, 0, sizeof batch);
    test_fill(u, 2 * N * d, -1.7f, 1.7f);
    for (int i = 0; i < 2 * N; i++) sequence[i] = (i % 3 == 0) == (i < N); /* mixed, N of each or nearly so */
    for (int form = 1; form <= 2; form++) {
        s->context.attention = form == 1 ? DSV3_ATTENTION_ABSORBED : DSV3_ATTENTION_EXPANDED;
        for (int which = 0; which < 2; which++) {
            size_t n = 0;
            synth_run(s, 2 * N, 1, 1, 2 * N, DSV3_F32);
            for (size_t i = 0; i < 2 * N; i++) {
                if (sequence[i] != which) continue;
                run_mla(s, part, u + i * d, 0, 1);
                memcpy(alone + i * d, part, d * sizeof *u);
                n++;
            }
            CHECK(n > 20 && s->caches[0].length == n);
        }
        synth_run(s, 2 * N, 1, 2, 2 * N, DSV3_F32);
        batch.rows = 2 * N;
        batch.token = token;
        batch.sequence = sequence;
        CHECK_EQ(dsv3_batch_begin(&s->context, &s->model, s->caches, 2, &batch, &s->ws, NULL), DSV3_OK);
        dsv3_mla_forward(&s->context, both, u, &s->model, &s->model.layers[0], 0, s->caches, 2 * N, &s->ws, NULL);
        CHECK(memcmp(both, alone, 2 * N * d * sizeof *u) == 0);
    }
    free(u), free(alone), free(both), free(part);
    synth_close(s);
}

/* ---- Which form is chosen */

/* Runs dsv3_batch_begin on `rows` rows of sequence 0 and `other` of sequence 1, mixed; returns whether all rows of
 * sequence 0 are expanded (1), none (0), or some (-1). *second: the same for sequence 1. */
static int form_of(synth *s, size_t rows, size_t other, int *second) {
    size_t n = rows + other, count[2] = {0, 0}, seen[2] = {0, 0};
    int32_t *token = (int32_t *)test_alloc(n * sizeof *token), *sequence = (int32_t *)test_alloc(n * sizeof *token);
    dsv3_batch batch;
    int form[2];
    memset(token, 0, n * sizeof *token);
    for (size_t i = 0; i < n; i++) { /* alternate while both last */
        int first = seen[1] >= other || (seen[0] < rows && i % 2 == 0);
        sequence[i] = first ? 0 : 1;
        seen[sequence[i]]++;
    }
    memset(&batch, 0, sizeof batch);
    batch.rows = n;
    batch.token = token;
    batch.sequence = sequence;
    CHECK_EQ(dsv3_batch_begin(&s->context, &s->model, s->caches, 2, &batch, &s->ws, NULL), DSV3_OK);
    for (size_t i = 0; i < n; i++) count[sequence[i]] += dsv3i_workspace_of(&s->ws, &s->config).expanded[i] != 0;
    for (int i = 0; i < 2; i++) form[i] = count[i] == 0 ? 0 : count[i] == seen[i] ? 1 : -1;
    if (second != NULL) *second = form[1];
    free(token), free(sequence);
    return form[0];
}

static void test_forms(int rk, int dn, int dv, size_t last_absorbed) {
    dsv3_config c = dsv3_config_default();
    synth *s;
    int second = 2;
    synth_sizes(&c, 3, 4, 4, 0, 1, 1);
    synth_attention(&c, 1, 0, rk, dn, 2, dv);
    s = synth_open(&c, SYNTH_BF16, 3);
    synth_run(s, 1000, 1, 2, 1000, DSV3_BF16);
    if (last_absorbed > 0) {
        CHECK_EQ(form_of(s, last_absorbed, 0, NULL), 0);
        CHECK_EQ(form_of(s, last_absorbed + 1, 0, NULL), 1);
        CHECK_EQ(form_of(s, last_absorbed + 1, last_absorbed, &second), 1); /* each sequence counts for itself */
        CHECK_EQ(second, 0);
        CHECK_EQ(form_of(s, last_absorbed, last_absorbed + 1, &second), 0);
        CHECK_EQ(second, 1);
    } else {
        CHECK_EQ(form_of(s, 1000, 0, NULL), 0); /* latents no wider than keys and values: expanding never pays */
    }
    CHECK_EQ(form_of(s, 1, 0, NULL), 0);
    s->context.attention = DSV3_ATTENTION_ABSORBED;
    CHECK_EQ(form_of(s, 1000, 0, NULL), 0);
    s->context.attention = DSV3_ATTENTION_EXPANDED;
    CHECK_EQ(form_of(s, 1, 1, &second), 1);
    CHECK_EQ(second, 1);
    synth_close(s);
}

int main(void) {
    test_golden();
    test_random_cases();
    test_fp8();
    test_two_sequences();
    test_forms(512, 128, 128, 170); /* V3: 512 * 256 / (1024 - 256) = 170.67 */
    test_forms(20, 8, 10, 16);      /* 360 / 22 = 16.4 */
    test_forms(16, 8, 8, 16);       /* 256 / 16 = 16 exactly: 16 rows cost the same either way */
    test_forms(8, 8, 8, 0);
    test_forms(5, 8, 8, 0);
    return test_done("mla");
}
