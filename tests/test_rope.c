/* test_rope.c -- chapter 5 (rope): rotary positions, YaRN, the softmax scale.
 *
 * A failure here means that a model looks at the wrong distances (often unnoticed at short lengths and ruinous at
 * long ones), that its attention is too sharp or too flat, or that weights of one pair layout are read as the other. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"

#define MOST_PAIRS 64

/* An independent calculation of the frequencies, straight from the published formula. */
static double yarn_dim(const dsv3_config *c, double turns) {
    double length = c->rope_scaling.original_max_position_embeddings, dr = c->qk_rope_head_dim;
    return dr * log(length / (2 * acos(-1.0) * turns)) / (2 * log((double)c->rope_theta));
}

static double frequency(const dsv3_config *c, int i) {
    return 1 / pow((double)c->rope_theta, 2.0 * i / c->qk_rope_head_dim);
}

static double yarn_frequency(const dsv3_config *c, int i) {
    double low = yarn_dim(c, (double)c->rope_scaling.beta_fast);
    double high = yarn_dim(c, (double)c->rope_scaling.beta_slow), ramp;
    low = fmax(c->rope_scaling.truncate ? floor(low) : low, 0);
    high = fmin(c->rope_scaling.truncate ? ceil(high) : high, c->qk_rope_head_dim - 1);
    if (low == high) high += 0.001;
    ramp = fmin(fmax((i - low) / (high - low), 0), 1);
    return frequency(c, i) * (1 - ramp) + frequency(c, i) / (double)c->rope_scaling.factor * ramp;
}

static int is_yarn(const dsv3_config *c) { return c->rope_scaling.type == DSV3_ROPE_YARN; }

/* Number of frequencies that are off by more than 1e-12 relative. */
static int frequencies_wrong(const dsv3_config *c) {
    double theta[MOST_PAIRS];
    int wrong = 0;
    dsv3_rope_frequencies(c, theta, NULL);
    for (int i = 0; i < c->qk_rope_head_dim / 2; i++) {
        double want = is_yarn(c) ? yarn_frequency(c, i) : frequency(c, i);
        wrong += !(fabs(theta[i] - want) <= 1e-12 * want);
    }
    return wrong;
}

#define NEAR(got, want, relative) near((double)(got), (double)(want), relative, __LINE__, #got)
static void near(double got, double want, double relative, int line, const char *what) {
    char text[160];
    snprintf(text, sizeof text, "%s: got %.9g, want %.9g", what, got, want);
    test_count(fabs(got - want) <= relative * fabs(want), __FILE__, line, text);
}

static dsv3_config yarn(int32_t dr, int32_t original, float factor, float beta_fast, float beta_slow, float theta) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    c.qk_rope_head_dim = dr;
    c.rope_theta = theta;
    c.rope_scaling.original_max_position_embeddings = original;
    c.rope_scaling.factor = factor;
    c.rope_scaling.beta_fast = beta_fast;
    c.rope_scaling.beta_slow = beta_slow;
    return c;
}

/* ---- frequencies ------------------------------------------------------------------------------------- */

/* The first pair that is slowed at all is lo + 1, the first that is slowed fully is hi. */
static void ramp_is(const dsv3_config *c, int lo, int hi) {
    double theta[MOST_PAIRS];
    int wrong = 0;
    dsv3_rope_frequencies(c, theta, NULL);
    for (int i = 0; i < c->qk_rope_head_dim / 2; i++) {
        double full = frequency(c, i), slow = full / (double)c->rope_scaling.factor;
        if (i <= lo) {
            wrong += !(fabs(theta[i] - full) <= 1e-12 * full);
        } else if (i >= hi) {
            wrong += !(fabs(theta[i] - slow) <= 1e-12 * full);
        } else {
            wrong += !(theta[i] < full * 0.999 && theta[i] > slow * 1.001);
        }
    }
    CHECK_EQ(wrong, 0);
}

static void golden(void) {
    dsv3_config v3 = dsv3_config_preset(DSV3_PRESET_V3), lite = dsv3_config_preset(DSV3_PRESET_V2_LITE);
    dsv3_config k2 = dsv3_config_preset(DSV3_PRESET_K2), plain = v3;
    double theta[MOST_PAIRS];
    dsv3_rope_frequencies(&v3, theta, NULL);
    NEAR(theta[0], 1, 1e-12);
    NEAR(theta[10], 0.0562341, 1e-6);
    NEAR(theta[16], 0.0055, 1e-6);
    NEAR(theta[22], 1.7782794e-4, 1e-6); /* the last of the ramp */
    NEAR(theta[23], 3.3338e-5, 1e-5);
    NEAR(theta[31], 3.3338e-6, 1e-5);
    ramp_is(&v3, 10, 23);
    dsv3_rope_frequencies(&k2, theta, NULL);
    NEAR(theta[9], 0.0476886, 1e-6);
    ramp_is(&k2, 19, 20);
    plain.rope_scaling.type = DSV3_ROPE_NONE;
    NEAR(dsv3_softmax_scale(&v3), 0.1352338, 5e-7);
    NEAR(dsv3_softmax_scale(&lite), 0.1147214, 5e-7);
    NEAR(dsv3_softmax_scale(&k2), 0.1308608, 5e-7);
    NEAR(dsv3_softmax_scale(&plain), 0.0721688, 5e-7);
    NEAR((double)dsv3_softmax_scale(&v3) / (double)dsv3_softmax_scale(&plain), 1.873854, 5e-7);
    for (int preset = DSV3_PRESET_V3; preset <= DSV3_PRESET_MICRO; preset++) { /* every released model */
        dsv3_config c = dsv3_config_preset((dsv3_preset)preset);
        CHECK(dsv3_rope_factor(&c) == 1.0f);
        CHECK_EQ(frequencies_wrong(&c), 0);
    }
}

/* Corners of the ramp, all within what dsv3_config_check accepts. */
static void ramp_corners(void) {
    static const struct {
        int32_t dr, original;
        float factor, fast, slow, theta;
    } cases[] = {
        {64, 4096, 40, 32, 1, 10000},       {64, 4096, 1, 32, 1, 10000},
        {2, 4096, 40, 32, 1, 10000},        {4, 4096, 40, 32, 1, 10000},
        {128, 65536, 4, 32, 1, 1e6f},       {64, 4096, 40, 1, 1, 10000},
        {64, 4096, 40, 1e6f, 1, 10000},     {64, 16777216, 2, 32, 1, 10},
        {64, 16777216, 2, 1e-3f, 1e-4f, 2}, {64, 8, 40, 32, 1, 10000},
        {64, 4096, 40, 1e6f, 600, 1e4f},    {64, 4096, 40, 1e6f, 1e5f, 1e4f}, /* hi < 0 */
        {64, 4096, 40, 32, 1e-6f, 10000},   {16, 4096, 8, 600, 1e-3f, 100}, /* lo within, hi beyond dr - 1 */
        {64, 4, 40, 32, 1, 10000} /* hi < 0: the original context is shorter than a turn */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dsv3_config c =
            yarn(cases[i].dr, cases[i].original, cases[i].factor, cases[i].fast, cases[i].slow, cases[i].theta);
        dsv3_error error;
        CHECK_EQ(dsv3_config_check(&c, &error), DSV3_OK);
        if (frequencies_wrong(&c)) fprintf(stderr, "ramp corner %d\n", (int)i);
        CHECK_EQ(frequencies_wrong(&c), 0);
        c.rope_scaling.truncate = 0;
        CHECK_EQ(frequencies_wrong(&c), 0);
    }
}

/* The ramp of V3 begins at 10.2 and ends at 22.4 when it is not truncated to 10 and 23. */
static void ramp_not_truncated(void) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    double whole[MOST_PAIRS], exact[MOST_PAIRS];
    CHECK_EQ(c.rope_scaling.truncate, 1);
    dsv3_rope_frequencies(&c, whole, NULL);
    c.rope_scaling.truncate = 0;
    dsv3_rope_frequencies(&c, exact, NULL);
    for (int i = 0; i < 32; i++) CHECK(i <= 10 || i >= 23 ? exact[i] == whole[i] : exact[i] != whole[i]);
}

/* lo = hi is possible only where both meet a whole number: here both are held at 0. */
static void ramp_without_width(void) {
    dsv3_config c = yarn(64, 5, 10, 2, 1, 10000); /* cd(2) = -3.2, cd(1) = -0.8 */
    CHECK(floor(yarn_dim(&c, 2)) < 0 && ceil(yarn_dim(&c, 1)) == 0);
    CHECK_EQ(frequencies_wrong(&c), 0);
    ramp_is(&c, 0, 1);
}

/* ---- multipliers ------------------------------------------------------------------------------------- */

static void multipliers(void) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    double m1 = 0.1 * log(40) + 1, m2 = 0.1 * (double)0.707f * log(40) + 1, base = 1 / sqrt(192);
    c.rope_scaling.mscale = 1.0f;
    c.rope_scaling.mscale_all_dim = 0.707f;
    NEAR(dsv3_rope_factor(&c), m1 / m2, 1e-7);
    NEAR(dsv3_softmax_scale(&c), base * m2 * m2, 1e-7);
    c.rope_scaling.mscale = 0.707f;
    c.rope_scaling.mscale_all_dim = 1.0f;
    NEAR(dsv3_rope_factor(&c), m2 / m1, 1e-7);
    NEAR(dsv3_softmax_scale(&c), base * m1 * m1, 1e-7);
    c.rope_scaling.mscale_all_dim = 0.0f; /* cos and sin carry it alone */
    NEAR(dsv3_rope_factor(&c), m2, 1e-7);
    NEAR(dsv3_softmax_scale(&c), base, 1e-7);
    c.rope_scaling.mscale = 0.0f;
    NEAR(dsv3_rope_factor(&c), 1, 1e-7);
    c.rope_scaling.mscale = 1.0f, c.rope_scaling.mscale_all_dim = 0.5f;
    c.rope_scaling.factor = 1.0f; /* nothing is stretched */
    NEAR(dsv3_rope_factor(&c), 1, 1e-7);
    NEAR(dsv3_softmax_scale(&c), base, 1e-7);
    c.rope_scaling.factor = 40.0f;
    c.rope_scaling.type = DSV3_ROPE_NONE;
    NEAR(dsv3_rope_factor(&c), 1, 1e-7);
    NEAR(dsv3_softmax_scale(&c), base, 1e-7);
}

/* ---- the table --------------------------------------------------------------------------------------- */

/* Largest absolute error of the table against double cos and sin. */
static double table_error(const dsv3_config *c, const int32_t *position, size_t n, float factor) {
    size_t dr = (size_t)c->qk_rope_head_dim;
    uint64_t turns[MOST_PAIRS] = {0};
    double theta[MOST_PAIRS], worst = 0;
    float *table = (float *)test_alloc(n * dr * sizeof(float));
    dsv3_rope_turns(c, turns, NULL);
    dsv3_rope_frequencies(c, theta, NULL);
    dsv3_rope_table(table, position, turns, factor, n, dr, NULL);
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < dr / 2; i++) {
            double angle = position[t] * theta[i];
            double a = fabs((double)table[t * dr + 2 * i] - (double)factor * cos(angle));
            double b = fabs((double)table[t * dr + 2 * i + 1] - (double)factor * sin(angle));
            if (!(a <= worst)) worst = a >= 0 ? a : INFINITY; /* NaN is as wrong as can be */
            if (!(b <= worst)) worst = b >= 0 ? b : INFINITY;
        }
    }
    free(table);
    return worst;
}

static void table(void) {
    static const int32_t edges[] = {0, 1, 2, 3, 4095, 4096, 163839, 1048575, 16777215};
    enum { N = 2000 };
    int32_t position[N];
    dsv3_config v3 = dsv3_config_preset(DSV3_PRESET_V3), k2 = dsv3_config_preset(DSV3_PRESET_K2), small = v3;
    float first[64];
    uint64_t turns[MOST_PAIRS] = {0};
    int32_t zero = 0;
    CHECK(table_error(&v3, edges, sizeof edges / sizeof edges[0], 1.0f) <= 5e-7);
    for (size_t i = 0; i < N; i++) position[i] = (int32_t)(test_random() % 16777216);
    CHECK(table_error(&v3, position, N, 1.0f) <= 5e-7);
    CHECK(table_error(&k2, position, N, 1.0f) <= 5e-7);
    CHECK(table_error(&v3, position, 100, 1.5f) <= 7.5e-7); /* the multiplier is applied */
    small.qk_rope_head_dim = 2;                             /* one pair, one radian per position */
    CHECK(table_error(&small, position, N, 1.0f) <= 5e-7);
    dsv3_rope_turns(&v3, turns, NULL);
    dsv3_rope_table(first, &zero, turns, 1.0f, 1, 64, NULL);
    for (size_t i = 0; i < 32; i++) CHECK(first[2 * i] == 1 && first[2 * i + 1] == 0);
}

/* Positions share nothing: a table of many rows is the tables of each. */
static void table_rows(void) {
    static const int32_t position[3] = {77, 0, 163839};
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    uint64_t turns[MOST_PAIRS] = {0};
    float *all = (float *)test_alloc(3 * 64 * sizeof(float)), *one = (float *)test_alloc(64 * sizeof(float));
    dsv3_rope_turns(&c, turns, NULL);
    dsv3_rope_table(all, position, turns, 1.0f, 3, 64, NULL);
    for (size_t t = 0; t < 3; t++) {
        dsv3_rope_table(one, position + t, turns, 1.0f, 1, 64, NULL);
        CHECK(memcmp(one, all + t * 64, 64 * sizeof(float)) == 0);
    }
    free(all), free(one);
}

/* ---- rotation ---------------------------------------------------------------------------------------- */

static void table_of(const dsv3_config *c, float *cos_sin, int32_t position) {
    uint64_t turns[MOST_PAIRS] = {0};
    dsv3_rope_turns(c, turns, NULL);
    dsv3_rope_table(cos_sin, &position, turns, 1.0f, 1, (size_t)c->qk_rope_head_dim, NULL);
}

/* By hand: pair i is (a, b) -> (a cos - b sin, a sin + b cos). */
static void rotate_by_hand(size_t dr) {
    dsv3_config c = yarn((int32_t)dr, 4096, 40, 32, 1, 10000);
    float cos_sin[2 * MOST_PAIRS], x[2 * MOST_PAIRS], y[2 * MOST_PAIRS];
    double want[2 * MOST_PAIRS];
    table_of(&c, cos_sin, 1234);
    for (int interleave = 0; interleave < 2; interleave++) {
        test_fill(x, dr, -1, 1);
        for (size_t i = 0; i < dr / 2; i++) {
            size_t p = interleave ? 2 * i : i, q = interleave ? 2 * i + 1 : i + dr / 2;
            double k = (double)cos_sin[2 * i], s = (double)cos_sin[2 * i + 1];
            want[p] = (double)x[p] * k - (double)x[q] * s;
            want[q] = (double)x[p] * s + (double)x[q] * k;
        }
        memcpy(y, x, dr * sizeof *x);
        dsv3_rope_rotate(y, cos_sin, dr, interleave, NULL);
        CHECK(dsv3i_all_finite(y, dr));
        CHECK_CLOSE(y, want, dr, 3e-7);
    }
}

/* A turn and the opposite turn. */
static void rotate_back(size_t dr) {
    dsv3_config c = yarn((int32_t)dr, 4096, 40, 32, 1, 10000);
    float cos_sin[2 * MOST_PAIRS], x[2 * MOST_PAIRS];
    double want[2 * MOST_PAIRS];
    for (int interleave = 0; interleave < 2; interleave++) {
        test_fill(x, dr, -1, 1);
        for (size_t i = 0; i < dr; i++) want[i] = (double)x[i];
        table_of(&c, cos_sin, 4321);
        dsv3_rope_rotate(x, cos_sin, dr, interleave, NULL);
        CHECK(fabs((double)x[0] - want[0]) > 1e-3); /* it did turn */
        for (size_t i = 0; i < dr / 2; i++) cos_sin[2 * i + 1] = -cos_sin[2 * i + 1];
        dsv3_rope_rotate(x, cos_sin, dr, interleave, NULL);
        CHECK(dsv3i_all_finite(x, dr));
        CHECK_CLOSE(x, want, dr, 1e-6);
    }
}

/* The two layouts are one rotation of permuted vectors. */
static void rotate_layouts(size_t dr) {
    dsv3_config c = yarn((int32_t)dr, 4096, 40, 32, 1, 10000);
    float cos_sin[2 * MOST_PAIRS], x[2 * MOST_PAIRS], halves[2 * MOST_PAIRS];
    double want[2 * MOST_PAIRS];
    table_of(&c, cos_sin, 999);
    test_fill(x, dr, -1, 1);
    for (size_t i = 0; i < dr / 2; i++) halves[i] = x[2 * i], halves[i + dr / 2] = x[2 * i + 1];
    dsv3_rope_rotate(x, cos_sin, dr, 1, NULL);
    dsv3_rope_rotate(halves, cos_sin, dr, 0, NULL);
    for (size_t i = 0; i < dr / 2; i++) want[i] = (double)x[2 * i], want[i + dr / 2] = (double)x[2 * i + 1];
    CHECK(dsv3i_all_finite(halves, dr));
    CHECK_CLOSE(halves, want, dr, 2e-7); /* equal but for how the compiler fuses products */
}

static double product_at(const dsv3_config *c, const float *q, const float *k, int32_t at_q, int32_t at_k) {
    size_t dr = (size_t)c->qk_rope_head_dim;
    float cos_sin[2 * MOST_PAIRS], a[2 * MOST_PAIRS], b[2 * MOST_PAIRS];
    double sum = 0;
    memcpy(a, q, dr * sizeof *a);
    memcpy(b, k, dr * sizeof *b);
    table_of(c, cos_sin, at_q);
    dsv3_rope_rotate(a, cos_sin, dr, c->rope_interleave, NULL);
    table_of(c, cos_sin, at_k);
    dsv3_rope_rotate(b, cos_sin, dr, c->rope_interleave, NULL);
    for (size_t i = 0; i < dr; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* The product of a query and a key depends on their distance only, at any position. */
static void relative_positions(void) {
    static const int32_t base[] = {0, 1, 1000, 163000, 16000000};
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    float q[64], k[64];
    test_fill(q, 64, -1, 1);
    test_fill(k, 64, -1, 1);
    for (c.rope_interleave = 0; c.rope_interleave < 2; c.rope_interleave++) {
        for (int32_t distance = 0; distance < 800; distance = 3 * distance + 1) {
            double want = product_at(&c, q, k, distance, 0);
            for (size_t i = 0; i < sizeof base / sizeof base[0]; i++) {
                CHECK(fabs(product_at(&c, q, k, base[i] + distance, base[i]) - want) < 2e-5);
            }
        }
        CHECK(fabs(product_at(&c, q, k, 7, 0) - product_at(&c, q, k, 0, 7)) > 1e-3); /* a direction, too */
    }
}

int main(void) {
    golden();
    ramp_corners();
    ramp_not_truncated();
    ramp_without_width();
    multipliers();
    table();
    table_rows();
    for (size_t dr = 2; dr <= 128; dr *= 2) {
        rotate_by_hand(dr);
        rotate_back(dr);
        rotate_layouts(dr);
    }
    relative_positions();
    return test_done("rope");
}
