/* test_router.c -- chapter 7 (router): scores, groups, bias, top-K, gate weights.
 *
 * Selection is compared with a second implementation that sorts; over many shapes, modes and hostile scores. A
 * failure here means that tokens go to other experts than in the published models, that ties fall differently on
 * different machines, that the balancing bias leaks into the weights, or that a NaN yields an invalid expert. */
#include "dsv3.h"

#include "test.h"
#include <float.h>

#define MOST 256 /* experts */

static dsv3_context ctx;

static dsv3_config routing(int32_t E, int32_t G, int32_t Gt, int32_t K) {
    dsv3_config c = dsv3_config_default();
    c.n_routed_experts = E, c.n_group = G, c.topk_group = Gt, c.num_experts_per_tok = K;
    return c;
}

/* ---- the second implementation ----------------------------------------------------------------------- */

typedef struct ranked {
    float value;
    int index;
} ranked;

/* Falling value, then rising index. */
static int by_rank(const void *a, const void *b) {
    const ranked *p = (const ranked *)a, *q = (const ranked *)b;
    if (p->value != q->value) return p->value > q->value ? -1 : 1;
    return p->index - q->index;
}

static int by_value(const void *a, const void *b) {
    float p = *(const float *)a, q = *(const float *)b;
    return p > q ? -1 : p < q;
}

/* What a group is worth: the sum of its two best (noaux_tc) or its best. */
static float group_worth(const dsv3_config *c, const float *sel, int m) {
    float sorted[MOST];
    memcpy(sorted, sel, (size_t)m * sizeof *sorted);
    qsort(sorted, (size_t)m, sizeof *sorted, by_value);
    return c->topk_method == DSV3_NOAUX_TC && m > 1 ? sorted[0] + sorted[1] : sorted[0];
}

/* s + alpha b or s (1 + alpha b), each operation rounded by itself. */
static float choice_score(dsv3_bias_form form, float s, float b, float alpha) {
    volatile float moved = alpha * b, result;
    if (form == DSV3_BIAS_ADD) {
        result = s + moved;
    } else {
        moved = 1 + moved;
        result = s * moved;
    }
    return result;
}

typedef struct choice {
    int32_t idx[MOST];
    double gate[MOST];
    int finite; /* every score and choice score */
} choice;

static void expected_indices(const dsv3_config *c, choice *out, const float *s, const float *bias,
                             const float *alpha) {
    int E = c->n_routed_experts, G = c->n_group, m = E / G;
    ranked expert[MOST], group[MOST];
    float sel[MOST];
    out->finite = 1;
    for (int e = 0; e < E; e++) {
        sel[e] = bias != NULL ? choice_score(c->bias_form, s[e], bias[e], alpha != NULL ? alpha[e] : 1) : s[e];
        out->finite &= isfinite(s[e]) && isfinite(sel[e]);
        if (!isfinite(sel[e])) sel[e] = -FLT_MAX; /* the lowest */
    }
    if (c->topk_method != DSV3_GREEDY && G > 1) {
        for (int g = 0; g < G; g++) group[g].value = group_worth(c, sel + g * m, m), group[g].index = g;
        qsort(group, (size_t)G, sizeof group[0], by_rank);
        for (int g = c->topk_group; g < G; g++) { /* the others are masked */
            float masked = c->group_mask == DSV3_MASK_ZERO ? 0.0f : -INFINITY;
            for (int i = 0; i < m; i++) sel[group[g].index * m + i] = masked;
        }
    }
    for (int e = 0; e < E; e++) expert[e].value = sel[e], expert[e].index = e;
    qsort(expert, (size_t)E, sizeof expert[0], by_rank);
    for (int k = 0; k < c->num_experts_per_tok; k++) out->idx[k] = expert[k].index;
}

static void expected_gates(const dsv3_config *c, choice *out, const float *s) {
    double sum = 0, scale = (double)c->routed_scaling_factor;
    int normed = c->norm_topk_prob && c->num_experts_per_tok > 1; /* as in released code */
    for (int k = 0; k < c->num_experts_per_tok; k++) {
        out->gate[k] = isfinite(s[out->idx[k]]) ? (double)s[out->idx[k]] : 0.0;
        sum += out->gate[k];
    }
    if (normed && c->gate_scaling == DSV3_SCALE_UNLESS_NORMED) scale = 1;
    for (int k = 0; k < c->num_experts_per_tok; k++) {
        out->gate[k] = (normed ? out->gate[k] / (sum + 1e-20) : out->gate[k]) * scale;
    }
}

static void expected(const dsv3_config *c, choice *out, const float *s, const float *bias, const float *alpha) {
    expected_indices(c, out, s, bias, alpha);
    expected_gates(c, out, s);
}

/* ---- one comparison ---------------------------------------------------------------------------------- */

static int select_shown;

/* Selects for n rows in memory of exact size, twice, and compares each with the second implementation and the gates
 * with dsv3_router_weights. The result: what is wrong, as a number of faults. */
static int select_wrong(const dsv3_config *c, const float *score, const float *bias, const float *alpha, size_t n,
                        const char *what) {
    size_t E = (size_t)c->n_routed_experts, K = (size_t)c->num_experts_per_tok, scratch_n = E + (size_t)c->n_group;
    int32_t *idx = (int32_t *)test_alloc(n * K * sizeof *idx);
    int32_t *again = (int32_t *)test_alloc(n * K * sizeof *again);
    float *gate = (float *)test_alloc(n * K * sizeof *gate), *gate_again = (float *)test_alloc(n * K * sizeof *gate),
          *scratch = (float *)test_alloc(scratch_n * sizeof *scratch);
    int index = 0, weight = 0, invalid = 0, finite = 1;
    dsv3_result result;
    memset(idx, 0x7F, n * K * sizeof *idx);
    memset(gate, 0xFF, n * K * sizeof *gate);
    memset(scratch, 0xFF, scratch_n * sizeof *scratch);
    result = dsv3_router_select(c, idx, gate, score, bias, alpha, n, scratch, NULL);
    memset(scratch, 0x3F, scratch_n * sizeof *scratch);
    invalid += dsv3_router_select(c, again, gate_again, score, bias, alpha, n, scratch, NULL) != result;
    invalid += memcmp(idx, again, n * K * sizeof *idx) != 0 || memcmp(gate, gate_again, n * K * sizeof *gate) != 0;
    memset(gate_again, 0xFF, n * K * sizeof *gate);
    invalid += dsv3_router_weights(c, gate_again, idx, score, n, NULL) != DSV3_OK;
    invalid += memcmp(gate, gate_again, n * K * sizeof *gate) != 0;
    for (size_t t = 0; t < n; t++) {
        unsigned char taken[MOST] = {0};
        choice want;
        expected(c, &want, score + t * E, bias, alpha);
        finite &= want.finite;
        for (size_t k = 0; k < K; k++) {
            int32_t e = idx[t * K + k];
            double g = (double)gate[t * K + k];
            if (e < 0 || (size_t)e >= E || taken[e]++) invalid++;
            index += e != want.idx[k];
            weight += !(fabs(g - want.gate[k]) <= 2e-6 * fabs(want.gate[k]) + 1e-37) || !isfinite(g);
        }
    }
    invalid += result != (finite ? DSV3_OK : DSV3_ERR_NAN);
    if (index + weight + invalid && select_shown++ < 20) {
        fprintf(stderr,
                "select %s: E %d G %d Gt %d K %d method %d mask %d norm %d scaling %d bias %d form %d alpha %d: %d "
                "indices, %d weights, %d invalid, result %d\n",
                what, c->n_routed_experts, c->n_group, c->topk_group, c->num_experts_per_tok, (int)c->topk_method,
                (int)c->group_mask, c->norm_topk_prob, (int)c->gate_scaling, bias != NULL, (int)c->bias_form,
                alpha != NULL, index, weight, invalid, (int)result);
    }
    free(idx), free(again), free(gate), free(gate_again), free(scratch);
    return index + weight + invalid;
}

/* ---- golden table ------------------------------------------------------------------------------------ */

/* Scores of three tokens whose logits are z_i(t) = 2 sin(1 + 0.9 i + 1.7 t): row t of x picks column t of W. */
static void golden_scores(const dsv3_config *c, float *score) {
    static const float x[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    float w[16 * 3], *scratch = (float *)test_alloc(linear_floats(&ctx, 3, 3) * sizeof(float));
    dsv3_tensor gate_w;
    for (int i = 0; i < 16; i++) {
        for (int t = 0; t < 3; t++) w[i * 3 + t] = (float)(2 * sin(1 + 0.9 * i + 1.7 * t));
    }
    gate_w.data = w, gate_w.scale = NULL, gate_w.rows = 16, gate_w.cols = 3, gate_w.type = DSV3_F32, gate_w.rank = 2;
    gate_w.packed = 0;
    dsv3_router_scores(&ctx, c, score, x, &gate_w, NULL, 3, scratch, NULL);
    free(scratch);
}

static void golden_case(const dsv3_config *c, const float *bias, const int32_t *want_idx, const double *want_gate) {
    float score[3 * 16], gate[3 * 4], scratch[16 + 4];
    int32_t idx[3 * 4];
    golden_scores(c, score);
    CHECK_EQ(dsv3_router_select(c, idx, gate, score, bias, NULL, 3, scratch, NULL), DSV3_OK);
    for (int i = 0; i < 12; i++) {
        CHECK_EQ(idx[i], want_idx[i]);
        CHECK(fabs((double)gate[i] - want_gate[i]) <= 1e-6 * want_gate[i]);
    }
}

static void golden(void) {
    static const int32_t v3_idx[12] = {15, 0, 1, 14, 6, 12, 13, 5, 11, 4, 10, 5};
    static const double v3_gate[12] = {0.632121256, 0.615238878, 0.634031062, 0.618608804, 0.640807933, 0.610572007,
                                       0.640124146, 0.608495914, 0.66460486,  0.665023471, 0.61668535,  0.553686319};
    static const int32_t v2_idx[12] = {1, 8, 0, 2, 6, 13, 12, 5, 4, 11, 10, 5};
    static const double v2_gate[12] = {2.41398155, 2.38724127, 1.95740433, 0.710812644, 3.21738976, 3.19027247,
                                       2.30794987, 2.26172207, 3.59619546, 3.57764193,  2.1856467,  1.35418756};
    dsv3_config v3 = routing(16, 4, 2, 4), v2 = v3;
    float bias[16];
    for (int i = 0; i < 16; i++) bias[i] = (float)(0.05 * cos(2.1 * i));
    v3.routed_scaling_factor = 2.5f;
    golden_case(&v3, bias, v3_idx, v3_gate);
    v2.scoring_func = DSV3_SOFTMAX;
    v2.topk_method = DSV3_GROUP_LIMITED_GREEDY;
    v2.norm_topk_prob = 0;
    v2.gate_scaling = DSV3_SCALE_UNLESS_NORMED;
    v2.routed_scaling_factor = 16;
    golden_case(&v2, NULL, v2_idx, v2_gate);
}

/* ---- scores ------------------------------------------------------------------------------------------ */

/* Scores of logits z [E] through a gate of one column, and a gate bias. */
static void scores_biased(dsv3_scoring_func func, float *score, const float *z, const float *gate_bias, size_t E) {
    static const float one[1] = {1};
    float *scratch = (float *)test_alloc(linear_floats(&ctx, 1, 1) * sizeof(float));
    dsv3_config c = dsv3_config_default();
    dsv3_tensor gate_w;
    c.scoring_func = func;
    c.n_routed_experts = (int32_t)E;
    c.num_experts_per_tok = 1;
    gate_w.data = z, gate_w.scale = NULL, gate_w.rows = E, gate_w.cols = 1, gate_w.type = DSV3_F32, gate_w.rank = 2;
    gate_w.packed = 0;
    CHECK_EQ(dsv3_router_scores(&ctx, &c, score, one, &gate_w, gate_bias, 1, scratch, NULL), DSV3_OK);
    free(scratch);
}

static void scores_of(dsv3_scoring_func func, float *score, const float *z, size_t E) {
    scores_biased(func, score, z, NULL, E);
}

/* To 1e-6 relative; what is below the normal floats may be 0. */
static int scores_wrong(const float *z, size_t E) {
    float score[MOST];
    double top = (double)z[0], sum = 0;
    int wrong = 0;
    scores_of(DSV3_SIGMOID, score, z, E);
    for (size_t e = 0; e < E; e++) {
        double want = 1 / (1 + exp(-(double)z[e]));
        wrong += !(fabs((double)score[e] - want) <= 1e-6 * want + 1e-37);
        if ((double)z[e] > top) top = (double)z[e];
    }
    for (size_t e = 0; e < E; e++) sum += exp((double)z[e] - top);
    scores_of(DSV3_SOFTMAX, score, z, E);
    for (size_t e = 0; e < E; e++) {
        double want = exp((double)z[e] - top) / sum,
               wide = (top - (double)z[e]) * ldexp(1, -24); /* rounded z - top */
        wrong += !(fabs((double)score[e] - want) <= (3e-6 + wide) * want + 1e-37);
    }
    return wrong;
}

static void scores(void) {
    static const size_t sizes[] = {1, 2, 7, 8, 9, 64, 256};
    static const float ranges[] = {1, 10, 100, 1e4f};
    static const float edges[] = {1e4f, -1e4f, 0, 88.8f, -88.8f, -0.0f, 104, -104};
    static const float huge[] = {1e38f, -1e38f, 3e38f, -3e38f};
    float z[MOST];
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (size_t r = 0; r < sizeof ranges / sizeof ranges[0]; r++) {
            test_fill(z, sizes[i], -ranges[r], ranges[r]);
            CHECK_EQ(scores_wrong(z, sizes[i]), 0);
            test_fill(z, sizes[i], -ranges[r], -ranges[r]); /* all equal */
            CHECK_EQ(scores_wrong(z, sizes[i]), 0);
        }
    }
    CHECK_EQ(scores_wrong(edges, 8), 0);
    CHECK_EQ(scores_wrong(edges + 1, 1), 0);
    scores_of(DSV3_SIGMOID, z, huge, 4);
    CHECK(z[0] == 1 && z[1] == 0 && z[2] == 1 && z[3] == 0);
    scores_of(DSV3_SOFTMAX, z, huge, 4);
    CHECK(z[0] == 0 && z[1] == 0 && z[2] == 1 && z[3] == 0);
}

/* Rows are independent: a NaN token spoils its own scores only. */
static void scores_rows(void) {
    static const float x[3] = {1, NAN, 2};
    float z[8], all[24], alone[8], *scratch = (float *)test_alloc(linear_floats(&ctx, 3, 1) * sizeof(float));
    dsv3_config c = dsv3_config_default();
    dsv3_tensor gate_w;
    c.n_routed_experts = 8, c.num_experts_per_tok = 1;
    test_fill(z, 8, -2, 2);
    gate_w.data = z, gate_w.scale = NULL, gate_w.rows = 8, gate_w.cols = 1, gate_w.type = DSV3_F32, gate_w.rank = 2;
    gate_w.packed = 0;
    for (int func = 0; func < 2; func++) {
        c.scoring_func = func ? DSV3_SOFTMAX : DSV3_SIGMOID;
        dsv3_router_scores(&ctx, &c, all, x, &gate_w, NULL, 3, scratch, NULL);
        CHECK(isnan(all[8]) && isnan(all[15]));
        for (size_t t = 0; t < 3; t += 2) {
            dsv3_router_scores(&ctx, &c, alone, x + t, &gate_w, NULL, 1, scratch, NULL);
            CHECK(memcmp(alone, all + t * 8, sizeof alone) == 0);
        }
    }
    free(scratch);
}

/* A gate bias is added to the logits of every row, before the sigmoid or the softmax. */
static void scores_gate_bias(void) {
    static const size_t sizes[] = {1, 2, 9, 64, 256};
    float w[MOST], gate_bias[MOST], zero[MOST] = {0}, z[MOST], score[3 * MOST], plain[3 * MOST];
    float *scratch = (float *)test_alloc(linear_floats(&ctx, 3, 1) * sizeof(float));
    static const float x[3] = {1, -0.5f, 2};
    for (int func = 0; func < 2; func++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            size_t E = sizes[i];
            dsv3_config c = dsv3_config_default();
            dsv3_tensor gate_w = {w, NULL, E, 1, DSV3_F32, 2, 0};
            int wrong = 0;
            c.scoring_func = func ? DSV3_SOFTMAX : DSV3_SIGMOID;
            c.n_routed_experts = (int32_t)E, c.num_experts_per_tok = 1;
            test_fill(w, E, -3, 3), test_fill(gate_bias, E, -3, 3);
            dsv3_router_scores(&ctx, &c, score, x, &gate_w, gate_bias, 3, scratch, NULL);
            for (size_t t = 0; t < 3; t++) {
                double sum = 0;
                for (size_t e = 0; e < E; e++) z[e] = w[e] * x[t] + gate_bias[e], sum += exp((double)z[e]);
                for (size_t e = 0; e < E; e++) {
                    double want = func ? exp((double)z[e]) / sum : 1 / (1 + exp(-(double)z[e]));
                    wrong += !(fabs((double)score[t * E + e] - want) <= 3e-6 * want);
                }
            }
            CHECK_EQ(wrong, 0);
            dsv3_router_scores(&ctx, &c, plain, x, &gate_w, NULL, 3, scratch, NULL); /* none is the same as zero */
            dsv3_router_scores(&ctx, &c, score, x, &gate_w, zero, 3, scratch, NULL);
            CHECK(memcmp(score, plain, 3 * E * sizeof *score) == 0);
        }
    }
    w[0] = w[1] = 1e4f, w[2] = w[3] = -1e4f; /* a bias can bring back what had underflowed */
    for (int e = 0; e < 4; e++) gate_bias[e] = -w[e];
    scores_biased(DSV3_SIGMOID, score, w, gate_bias, 4);
    for (int e = 0; e < 4; e++) CHECK(score[e] == 0.5f);
    scores_biased(DSV3_SOFTMAX, score, w, gate_bias, 4);
    for (int e = 0; e < 4; e++) CHECK(score[e] == 0.25f);
    free(scratch);
}

/* ---- selection: many shapes, modes and inputs -------------------------------------------------------- */

typedef enum pattern {
    RANDOM,
    TIES,      /* few different values */
    EQUAL,     /* one value */
    ZERO,      /* underflowed */
    UNDERFLOW, /* so small that 1e-20 matters */
    SOME_ZERO, /* underflowed but for a few */
    NEGATIVE,  /* no sigmoid gives these, but any float is allowed */
    RISING,
    FALLING,
    ONE_NAN,
    SOME_NAN,
    ALL_NAN,
    MINUS_INF,
    ALL_MINUS_INF,
    PLUS_INF,
    ALL_PLUS_INF,
    MIXED_BAD, /* NaN and infinities among numbers */
    PATTERNS
} pattern;

static float pattern_value(pattern p, size_t i, size_t n) {
    float r = test_uniform(0, 1);
    switch (p) {
    case TIES: return (float)(test_random() % 3) * 0.25f;
    case EQUAL: return 0.5f;
    case ZERO: return 0;
    case UNDERFLOW: return r * 1e-20f;
    case SOME_ZERO: return r < 0.8f ? 0 : r;
    case NEGATIVE: return -r;
    case RISING: return (float)(i + 1) / (float)(n + 1);
    case FALLING: return (float)(n - i) / (float)(n + 1);
    case SOME_NAN: return r < 0.5f ? NAN : r;
    case ALL_NAN: return NAN;
    case MINUS_INF: return r < 0.3f ? -INFINITY : r;
    case ALL_MINUS_INF: return -INFINITY;
    case PLUS_INF: return r < 0.3f ? INFINITY : r;
    case ALL_PLUS_INF: return INFINITY;
    case MIXED_BAD: return r < 0.2f ? NAN : r < 0.4f ? -INFINITY : r < 0.5f ? INFINITY : r;
    case RANDOM:
    case ONE_NAN:
    case PATTERNS: break;
    }
    return r;
}

static void pattern_fill(pattern p, float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = pattern_value(p, i, n);
    if (p == ONE_NAN) x[test_random() % n] = NAN;
}

static const char *const bias_names[] = {"no bias",       "small bias", "bias -2",   "biases -7..-2",
                                         "bias around 0", "bias +2..7", "bad biases"};
#define BIASES 7

static const float *bias_fill(int kind, float *bias, size_t n) {
    static const float low[BIASES] = {0, -0.1f, -2, -7, -1, 2, 0}, high[BIASES] = {0, 0.1f, -2, -2, 1, 7, 1};
    if (kind == 0) return NULL;
    test_fill(bias, n, low[kind], high[kind]);
    if (kind == BIASES - 1) {
        static const float bad[3] = {NAN, INFINITY, -INFINITY};
        for (size_t i = 0; i < n; i++) bias[i] = test_random() % 4 ? bias[i] : bad[test_random() % 3];
    }
    return bias;
}

/* Strengths by which a product is exact, so that it does not matter whether it is fused with the sum. */
static const float *alpha_fill(float *alpha, size_t n) {
    static const float strengths[] = {1, 0, 0.5f, 2, -1, 4};
    for (size_t i = 0; i < n; i++) alpha[i] = strengths[test_random() % 6];
    return alpha;
}

/* All modes of one shape with one input, each in one form of the bias or the other, with strengths or without. norm
 * over negative scores has no meaning (their sum may vanish). */
static int modes_wrong(dsv3_config c, pattern p, const float *score, const float *bias, const char *what) {
    float strengths[MOST];
    const float *alpha;
    int wrong = 0;
    for (int mode = 0; mode < 3 * 2 * 2 * 2; mode++) {
        c.topk_method = (dsv3_topk_method)(mode % 3);
        c.group_mask = mode / 3 % 2 ? DSV3_MASK_ZERO : DSV3_MASK_NEG_INF;
        c.norm_topk_prob = mode / 6 % 2 && p != NEGATIVE;
        c.gate_scaling = mode / 12 ? DSV3_SCALE_UNLESS_NORMED : DSV3_SCALE_ALWAYS;
        alpha = test_random() % 2 ? NULL : alpha_fill(strengths, (size_t)c.n_routed_experts);
        c.bias_form = test_random() % 2 ? DSV3_BIAS_ADD : DSV3_BIAS_MULTIPLY;
        wrong += select_wrong(&c, score, bias, alpha, 2, what);
    }
    return wrong;
}

static int shape_wrong(int32_t E, int32_t G, int32_t Gt, int32_t K) {
    dsv3_config c = routing(E, G, Gt, K);
    float score[2 * MOST], bias[MOST];
    int wrong = 0;
    c.routed_scaling_factor = 2.5f;
    for (int p = 0; p < PATTERNS; p++) {
        for (int kind = 0; kind < BIASES; kind++) {
            pattern_fill((pattern)p, score, (size_t)E);
            pattern_fill((pattern)p, score + E, (size_t)E);
            wrong += modes_wrong(c, (pattern)p, score, bias_fill(kind, bias, (size_t)E), bias_names[kind]);
        }
    }
    return wrong;
}

static void shapes(void) {
    static const int32_t experts[] = {1, 2, 4, 8, 24, 32}, groups[] = {1, 2, 4, 8, -1};
    for (size_t i = 0; i < sizeof experts / sizeof experts[0]; i++) {
        for (size_t j = 0; j < sizeof groups / sizeof groups[0]; j++) {
            int32_t E = experts[i], G = groups[j] < 0 ? E : groups[j];
            if (G > E || E % G != 0) continue;
            for (int32_t Gt = 1; Gt <= G; Gt = Gt < G && 2 * Gt > G ? G : 2 * Gt) {
                int32_t all = Gt * (E / G);
                CHECK_EQ(shape_wrong(E, G, Gt, 1), 0);
                if (all > 2) CHECK_EQ(shape_wrong(E, G, Gt, (all + 1) / 2), 0);
                if (all > 1) CHECK_EQ(shape_wrong(E, G, Gt, all), 0);
            }
        }
    }
    CHECK_EQ(shape_wrong(256, 8, 4, 8), 0);  /* V3 */
    CHECK_EQ(shape_wrong(160, 8, 3, 6), 0);  /* V2 */
    CHECK_EQ(shape_wrong(64, 1, 1, 6), 0);   /* V2-Lite */
    CHECK_EQ(shape_wrong(30, 10, 7, 12), 0); /* odd numbers */
}

/* ---- single properties, by hand ---------------------------------------------------------------------- */

static int32_t got_idx[MOST];
static float got_gate[MOST];

static dsv3_result pick_alpha(const dsv3_config *c, const float *score, const float *bias, const float *alpha) {
    float scratch[2 * MOST];
    return dsv3_router_select(c, got_idx, got_gate, score, bias, alpha, 1, scratch, NULL);
}

static dsv3_result pick(const dsv3_config *c, const float *score, const float *bias) {
    return pick_alpha(c, score, bias, NULL);
}

static int picked(int32_t a, int32_t b) { return got_idx[0] == a && got_idx[1] == b; }

/* Equal scores, and none: experts 0, 1, 2 ... of the lowest groups. */
static void ties(void) {
    static const float values[] = {0.5f, 0, 1, NAN, -INFINITY, INFINITY};
    dsv3_config c = routing(256, 8, 4, 8);
    float score[256];
    for (size_t v = 0; v < sizeof values / sizeof values[0]; v++) {
        for (int method = 0; method < 3; method++) {
            c.topk_method = (dsv3_topk_method)method;
            for (size_t i = 0; i < 256; i++) score[i] = values[v];
            CHECK_EQ(pick(&c, score, NULL), isfinite(values[v]) ? DSV3_OK : DSV3_ERR_NAN);
            for (int32_t k = 0; k < 8; k++) {
                CHECK_EQ(got_idx[k], k);
                CHECK(isfinite(values[v]) && values[v] > 0 ? fabs((double)got_gate[k] - 0.125) < 1e-7
                                                           : got_gate[k] == 0);
            }
        }
    }
}

/* NaN and infinity of either sign count as the lowest scores and weigh nothing. */
static void not_finite(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    dsv3_config c = routing(8, 1, 1, 2);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        float score[8] = {0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f, 0.7f, 0.8f};
        score[7] = bad[i];
        CHECK_EQ(pick(&c, score, NULL), DSV3_ERR_NAN);
        CHECK(picked(6, 5)); /* not 7: it counts as the lowest */
        CHECK(fabs((double)got_gate[0] - 0.7 / 1.3) < 1e-6);
        for (int k = 0; k < 8; k++) score[k] = bad[i];
        score[3] = 0.25f;
        CHECK_EQ(pick(&c, score, NULL), DSV3_ERR_NAN);
        CHECK(picked(3, 0));
        CHECK(got_gate[0] == 1 && got_gate[1] == 0);
        score[3] = bad[i]; /* all bad */
        CHECK_EQ(pick(&c, score, NULL), DSV3_ERR_NAN);
        CHECK(picked(0, 1));
        CHECK(got_gate[0] == 0 && got_gate[1] == 0);
    }
}

/* Plus infinity here and there, in many shapes. */
static void plus_infinity(void) {
    static const int32_t shape[][4] = {{8, 1, 1, 2}, {16, 4, 2, 4}, {32, 8, 4, 8}, {8, 8, 4, 4}, {6, 2, 1, 3}};
    int wrong = 0;
    for (size_t i = 0; i < 500; i++) {
        const int32_t *s = shape[i % 5];
        dsv3_config c = routing(s[0], s[1], s[2], s[3]);
        float score[2 * MOST], bias[MOST];
        for (int32_t e = 0; e < 2 * s[0]; e++) {
            score[e] = test_uniform(0, 1);
            if (test_random() % 4 == 0) score[e] = INFINITY;
        }
        wrong += modes_wrong(c, RANDOM, score, bias_fill((int)(i % BIASES), bias, (size_t)s[0]), "plus infinity");
    }
    CHECK_EQ(wrong, 0);
}

/* A bias that is not a number: its expert counts as the lowest, the choice stays valid. */
static void bias_not_finite(void) {
    static const float score[4] = {0.1f, 0.2f, 0.3f, 0.4f}, bias[4] = {0, 0, NAN, -INFINITY};
    dsv3_config c = routing(4, 1, 1, 2);
    CHECK_EQ(pick(&c, score, bias), DSV3_ERR_NAN);
    CHECK(picked(1, 0));
    c.num_experts_per_tok = 4;
    CHECK_EQ(pick(&c, score, bias), DSV3_ERR_NAN);
    CHECK(picked(1, 0) && got_idx[2] == 2 && got_idx[3] == 3);
}

/* A row with a NaN changes nothing in its neighbours, and all rows are done. */
static void rows_apart(void) {
    dsv3_config c = routing(16, 4, 2, 4);
    float score[3 * 16], gate[12], scratch[20];
    int32_t idx[12];
    test_fill(score, 3 * 16, 0, 1);
    score[16 + 5] = NAN;
    CHECK_EQ(dsv3_router_select(&c, idx, gate, score, NULL, NULL, 3, scratch, NULL), DSV3_ERR_NAN);
    for (size_t t = 0; t < 3; t += 2) {
        CHECK_EQ(pick(&c, score + t * 16, NULL), DSV3_OK);
        CHECK(memcmp(got_idx, idx + t * 4, 4 * sizeof *idx) == 0);
        CHECK(memcmp(got_gate, gate + t * 4, 4 * sizeof *gate) == 0);
    }
}

/* Underflowed sigmoids: the plain quotient would be 0/0. */
static void underflow(void) {
    dsv3_config c = routing(8, 2, 1, 2);
    float z[8], score[8];
    for (int i = 0; i < 8; i++) z[i] = -1e4f;
    scores_of(DSV3_SIGMOID, score, z, 8);
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    CHECK(picked(0, 1) && got_gate[0] == 0 && got_gate[1] == 0);
    z[6] = -40;
    scores_of(DSV3_SIGMOID, score, z, 8);
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    CHECK(picked(6, 4) && fabs((double)got_gate[0] - 1) < 1e-2 && got_gate[1] == 0);
}

/* Dropped groups: out of the question, or taking part with 0, which beats a negative sum of score and bias. */
static void masks(void) {
    static const float score[8] = {0.9f, 0.8f, 0.2f, 0.1f, 0.5f, 0.6f, 0.3f, 0.4f};
    static const float negative[8] = {-0.3f, -0.4f, -0.1f, -0.2f, -0.5f, -0.6f, -0.7f, -0.8f};
    static const float bias[8] = {-2, -2, -2, -2, -2, -2, -2, -2};
    dsv3_config c = routing(8, 4, 1, 2);
    c.norm_topk_prob = 0;
    CHECK_EQ(pick(&c, score, bias), DSV3_OK);
    CHECK(picked(0, 1) && got_gate[0] == 0.9f && got_gate[1] == 0.8f);
    CHECK_EQ(pick(&c, negative, NULL), DSV3_OK);
    CHECK(picked(2, 3));
    c.group_mask = DSV3_MASK_ZERO;
    CHECK_EQ(pick(&c, score, bias), DSV3_OK);
    CHECK(picked(2, 3) && got_gate[0] == 0.2f && got_gate[1] == 0.1f);
    CHECK_EQ(pick(&c, negative, NULL), DSV3_OK);
    CHECK(picked(0, 1)); /* group 1 is chosen, yet the zeros of the masked ones are higher */
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    CHECK(picked(0, 1));
}

/* Two best or one best: the methods disagree about the better group. */
static void group_methods(void) {
    static const float score[6] = {0.9f, 0.1f, 0.1f, 0.6f, 0.7f, 0.0f};
    dsv3_config c = routing(6, 2, 1, 2);
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    CHECK(picked(4, 3));
    c.topk_method = DSV3_GROUP_LIMITED_GREEDY;
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    CHECK(picked(0, 1));
    c.topk_method = DSV3_GREEDY;
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    CHECK(picked(0, 4));
}

/* The bias moves the choice, never a weight. */
static void bias_steers_only(void) {
    dsv3_config c = routing(16, 4, 2, 4);
    float score[16], bias[16], plain_gate[4];
    int32_t plain_idx[4];
    c.routed_scaling_factor = 2.5f;
    test_fill(score, 16, 0.1f, 0.9f);
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    memcpy(plain_idx, got_idx, sizeof plain_idx);
    memcpy(plain_gate, got_gate, sizeof plain_gate);
    for (int i = 0; i < 16; i++) bias[i] = 8; /* the same for all: nothing happens */
    CHECK_EQ(pick(&c, score, bias), DSV3_OK);
    CHECK(memcmp(plain_idx, got_idx, sizeof plain_idx) == 0);
    CHECK(memcmp(plain_gate, got_gate, sizeof plain_gate) == 0);
    c.norm_topk_prob = 0;
    for (int32_t e = 0; e < 16; e++) { /* one favourite: first, at the weight of its own score */
        memset(bias, 0, sizeof bias);
        bias[e] = 100;
        CHECK_EQ(pick(&c, score, bias), DSV3_OK);
        CHECK_EQ(got_idx[0], e);
        for (int k = 0; k < 4; k++) CHECK(got_gate[k] == score[got_idx[k]] * 2.5f);
    }
}

/* The two forms of the bias and its strengths, by hand. Neither enters a weight. */
static void bias_forms(void) {
    static const float score[4] = {0.25f, 0.5f, 0.75f, 0.125f}, bias[4] = {1, 0, -0.5f, 4};
    static const float alpha[4] = {0, 1, 1, 0.5f}, off[4] = {0, 0, 0, 0}, against[4] = {-1, -1, -1, -1};
    dsv3_config c = routing(4, 1, 1, 2);
    c.norm_topk_prob = 0;
    CHECK_EQ(pick(&c, score, bias), DSV3_OK); /* 1.25 0.5 0.25 4.125 */
    CHECK(picked(3, 0) && got_gate[0] == 0.125f && got_gate[1] == 0.25f);
    CHECK_EQ(pick_alpha(&c, score, bias, alpha), DSV3_OK); /* 0.25 0.5 0.25 2.125 */
    CHECK(picked(3, 1) && got_gate[0] == 0.125f && got_gate[1] == 0.5f);
    CHECK_EQ(pick_alpha(&c, score, bias, against), DSV3_OK); /* -0.75 0.5 1.25 -3.875 */
    CHECK(picked(2, 1));
    CHECK_EQ(pick_alpha(&c, score, bias, off), DSV3_OK);
    CHECK(picked(2, 1));
    c.bias_form = DSV3_BIAS_MULTIPLY;
    CHECK_EQ(pick(&c, score, bias), DSV3_OK); /* 0.5 0.5 0.375 0.625 */
    CHECK(picked(3, 0) && got_gate[0] == 0.125f && got_gate[1] == 0.25f);
    CHECK_EQ(pick_alpha(&c, score, bias, alpha), DSV3_OK); /* 0.25 0.5 0.375 0.375 */
    CHECK(picked(1, 2) && got_gate[0] == 0.5f && got_gate[1] == 0.75f);
    CHECK_EQ(pick_alpha(&c, score, bias, against), DSV3_OK); /* 0 0.5 1.125 -0.375 */
    CHECK(picked(2, 1));
    CHECK_EQ(pick_alpha(&c, score, bias, off), DSV3_OK);
    CHECK(picked(2, 1));
    CHECK_EQ(pick(&c, score, off), DSV3_OK); /* b = 0 is neutral */
    CHECK(picked(2, 1));
    CHECK_EQ(pick_alpha(&c, score, NULL, alpha), DSV3_OK); /* without a bias there is nothing to be strong */
    CHECK(picked(2, 1));
}

/* ---- weights of a choice made elsewhere -------------------------------------------------------------- */

/* Any valid choice, of finite and other scores, has the weights of the formula; two rows may choose the same. */
static void weights_of_choice(void) {
    for (int round = 0; round < 400; round++) {
        int32_t E = 1 + (int32_t)(test_random() % 64), K = 1 + (int32_t)(test_random() % (uint64_t)E);
        dsv3_config c = routing(E, 1, 1, K);
        size_t n = (size_t)(1 + test_random() % 5);
        float *score = (float *)test_alloc(n * (size_t)E * sizeof *score),
              *gate = (float *)test_alloc(n * (size_t)K * sizeof *gate);
        int32_t *idx = (int32_t *)test_alloc(n * (size_t)K * sizeof *idx);
        int wrong = 0;
        c.norm_topk_prob = round % 2, c.routed_scaling_factor = 2.5f;
        c.gate_scaling = round / 2 % 2 ? DSV3_SCALE_UNLESS_NORMED : DSV3_SCALE_ALWAYS;
        pattern_fill(round % 3 ? RANDOM : MIXED_BAD, score, n * (size_t)E);
        for (size_t t = 0; t < n; t++) { /* every `step`-th expert, round and round: all different */
            int32_t at = (int32_t)(test_random() % (uint64_t)E), step = E % 2 ? 2 : 1;
            for (int32_t k = 0; k < K; k++, at = (at + step) % E) idx[t * (size_t)K + (size_t)k] = at;
        }
        CHECK_EQ(dsv3_router_weights(&c, gate, idx, score, n, NULL), DSV3_OK);
        for (size_t t = 0; t < n; t++) {
            choice want;
            memcpy(want.idx, idx + t * (size_t)K, (size_t)K * sizeof *idx);
            expected_gates(&c, &want, score + t * (size_t)E);
            for (size_t k = 0; k < (size_t)K; k++) {
                wrong += !(fabs((double)gate[t * (size_t)K + k] - want.gate[k]) <= 2e-6 * want.gate[k] + 1e-37);
            }
        }
        CHECK_EQ(wrong, 0);
        free(score), free(gate), free(idx);
    }
}

/* One bad place anywhere, and nothing is written, not even for the rows before it. */
static void weights_refused(void) {
    enum { N = 3, K = 4, E = 6 };
    static const int32_t bad[] = {-1, E, E + 1, INT32_MIN, INT32_MAX}, valid[K] = {5, 0, 3, 2};
    dsv3_config c = routing(E, 1, 1, K);
    float score[N * E], gate[N * K], untouched[N * K];
    int32_t idx[N * K];
    test_fill(score, N * E, 0, 1);
    memset(untouched, 0x7B, sizeof untouched);
    memcpy(gate, untouched, sizeof gate);
    for (int i = 0; i < N * K; i++) idx[i] = valid[i % K];
    for (int i = 0; i < N * K; i++) {
        int32_t old = idx[i];
        for (size_t j = 0; j < sizeof bad / sizeof bad[0]; j++) {
            idx[i] = bad[j];
            CHECK_EQ(dsv3_router_weights(&c, gate, idx, score, N, NULL), DSV3_ERR_ARG);
        }
        for (int k = 1; k < K; k++) { /* the same as another place of its row */
            idx[i] = valid[(i + k) % K];
            CHECK_EQ(dsv3_router_weights(&c, gate, idx, score, N, NULL), DSV3_ERR_ARG);
        }
        CHECK(memcmp(gate, untouched, sizeof gate) == 0);
        idx[i] = old;
    }
    CHECK_EQ(dsv3_router_weights(&c, gate, idx, score, 0, NULL), DSV3_OK);
    CHECK(memcmp(gate, untouched, sizeof gate) == 0);
    CHECK_EQ(dsv3_router_weights(&c, gate, idx, score, N, NULL), DSV3_OK);
    for (int i = 0; i < N * K; i++) CHECK(gate[i] >= 0 && gate[i] <= 1);
}

/* Scaling with and without normalisation. */
static void scaling(void) {
    static const float score[4] = {0.25f, 0.5f, 0.75f, 0.125f};
    static const double want[4][2] = {{0.75, 0.5}, {1.5, 1.0}, {0.6, 0.4}, {1.2, 0.8}};
    dsv3_config c = routing(4, 1, 1, 2);
    for (int norm = 0; norm < 2; norm++) {
        for (int scaled = 0; scaled < 2; scaled++) {
            for (int rule = 0; rule < 2; rule++) {
                int applies = scaled && !(norm && rule);
                c.norm_topk_prob = norm;
                c.routed_scaling_factor = scaled ? 2.0f : 1.0f;
                c.gate_scaling = rule ? DSV3_SCALE_UNLESS_NORMED : DSV3_SCALE_ALWAYS;
                CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
                CHECK(picked(2, 1));
                CHECK(fabs((double)got_gate[0] - want[2 * norm + applies][0]) < 1e-6);
                CHECK(fabs((double)got_gate[1] - want[2 * norm + applies][1]) < 1e-6);
            }
        }
    }
}

/* One expert a token: the code released with V2, V3, Moonlight and K2 divides by the sum only where K > 1 (and V2's scales
 * wherever it does not divide). Its weight is its score, and the router learns. */
static void one_expert(void) {
    static const dsv3_preset families[] = {DSV3_PRESET_V3, DSV3_PRESET_V2, DSV3_PRESET_V2_LITE, DSV3_PRESET_MOONLIGHT,
                                           DSV3_PRESET_K2};
    static const float score[4] = {0.25f, 0.5f, 0.75f, 0.125f}, dgate[1] = {2};
    static const int32_t chosen[1] = {2};
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        for (int norm = 0; norm < 2; norm++) {
            dsv3_config c = dsv3_config_preset(families[i]);
            float dscore[4] = {1, 1, 1, 1}, scale = c.routed_scaling_factor, gate;
            c.n_routed_experts = 4, c.num_experts_per_tok = c.n_group = c.topk_group = 1;
            c.norm_topk_prob = norm;
            CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
            CHECK(got_idx[0] == 2 && got_gate[0] == 0.75f * scale);
            CHECK_EQ(dsv3_router_weights(&c, &gate, chosen, score, 1, NULL), DSV3_OK);
            CHECK(gate == 0.75f * scale);
#ifndef DSV3_NO_TRAINING
            CHECK_EQ(dsv3_router_weights_backward(&c, dscore, dgate, chosen, score, 1, NULL), DSV3_OK);
            CHECK(dscore[2] == 1 + 2 * scale && dscore[0] == 1 && dscore[1] == 1 && dscore[3] == 1);
#endif
        }
    }
}

#ifndef DSV3_NO_TRAINING
/* A score that is not finite weighs nothing forward, so nothing flows back through it, and the others of its row have the
 * gradients that they would have if it were 0. */
static void not_finite_backward(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY}, dgate[3] = {0.5f, -1, 2};
    static const int32_t chosen[3] = {4, 1, 2};
    for (int mode = 0; mode < 12; mode++) {
        dsv3_config c = routing(5, 1, 1, 3);
        float score[5] = {0.3f, 0.6f, 0.2f, 0.9f, 0.4f}, zero[5], got[5] = {0}, want[5] = {0}, dz[5], dz_want[5];
        score[1] = bad[mode % 3];
        memcpy(zero, score, sizeof zero);
        zero[1] = 0;
        c.norm_topk_prob = mode / 3 % 2;
        c.scoring_func = mode / 6 ? DSV3_SOFTMAX : DSV3_SIGMOID;
        CHECK_EQ(dsv3_router_weights_backward(&c, got, dgate, chosen, score, 1, NULL), DSV3_OK);
        CHECK_EQ(dsv3_router_weights_backward(&c, want, dgate, chosen, zero, 1, NULL), DSV3_OK);
        want[1] = 0;
        CHECK(memcmp(got, want, sizeof got) == 0 && got[4] != 0 && got[2] != 0);
        CHECK_EQ(dsv3_router_scores_backward(&c, dz, got, score, 1, NULL), DSV3_OK);
        CHECK_EQ(dsv3_router_scores_backward(&c, dz_want, want, zero, 1, NULL), DSV3_OK);
        CHECK(memcmp(dz, dz_want, sizeof dz) == 0 && dz[1] == 0 && isfinite(dz[4]) && dz[4] != 0);
    }
}
#endif

/* greedy knows no groups: they limit neither the choice nor what the config may ask for. */
static void greedy_ignores_groups(void) {
    static const float score[8] = {0.1f, 0.9f, 0.2f, 0.3f, 0.8f, 0.4f, 0.7f, 0.5f};
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_MICRO);
    dsv3_error error;
    c.topk_method = DSV3_GREEDY;
    c.n_group = 4;
    c.topk_group = 1;
    c.num_experts_per_tok = 3;
    CHECK_EQ(dsv3_config_check(&c, &error), DSV3_OK);
    CHECK_EQ(pick(&c, score, NULL), DSV3_OK);
    CHECK(got_idx[0] == 1 && got_idx[1] == 4 && got_idx[2] == 6);
    c.topk_method = DSV3_NOAUX_TC;
    CHECK_EQ(dsv3_config_check(&c, &error), DSV3_ERR_ARG);
    CHECK(strcmp(error.name, "num_experts_per_tok") == 0);
}

int main(void) {
    greedy_ignores_groups();
    one_expert();
#ifndef DSV3_NO_TRAINING
    not_finite_backward();
#endif
    CHECK_EQ(dsv3_context_init(&ctx, test_backend(), 1, NULL), DSV3_OK);
    golden();
    scores();
    scores_rows();
    scores_gate_bias();
    shapes();
    ties();
    not_finite();
    plus_infinity();
    bias_not_finite();
    rows_apart();
    underflow();
    masks();
    group_methods();
    bias_steers_only();
    bias_forms();
    weights_of_choice();
    weights_refused();
    scaling();
    return test_done("router");
}
