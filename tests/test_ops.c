/* test_ops.c -- chapter 4 (ops): linear layers of every weight type, RMSNorm, SwiGLU, log-sum-exp, cross-entropy.
 *
 * A failure here means wrong numbers in every layer of every model: a scale block applied to the wrong columns, a
 * row that depends on how many rows share the call, a norm that is off, or NaN where a finite result exists. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"
#include <float.h>

#define UNIT ldexp(1.0, -24) /* rounding error of one float operation, relative */

static dsv3_context ctx;

static int same_bits(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof *a) == 0; }

/* ---- weights of any type, built from floats ---------------------------------------------------------- */

typedef struct weights {
    dsv3_tensor tensor;
    unsigned char *memory, *scale_memory;
    double *value; /* [rows, cols] what the elements are worth: code times scale, exactly */
} weights;

/* Encodes one number at `at` and returns what was kept. */
static double put(dsv3_type type, unsigned char *at, float x) {
    uint16_t half;
    switch (type) {
    case DSV3_F16: return half = dsv3_f16_from_f32(x), memcpy(at, &half, 2), (double)dsv3_f32_from_f16(half);
    case DSV3_BF16: return half = dsv3_bf16_from_f32(x), memcpy(at, &half, 2), (double)dsv3_f32_from_bf16(half);
    case DSV3_F8_E4M3: return *at = dsv3_f8_e4m3_from_f32(x), (double)dsv3_f32_from_f8_e4m3(*at);
    case DSV3_Q8_0:
    case DSV3_Q4_0: /* put_block */
    case DSV3_F32: break;
    }
    return memcpy(at, &x, 4), (double)x;
}

/* A block of 32: any bytes, behind a scale of about a half of 1 / 127 or 1 / 8. value [32]: what it is worth. */
static void put_block(dsv3_type type, unsigned char *at, double *value) {
    uint16_t half = dsv3_f16_from_f32(test_uniform(0.25f, 1) / (type == DSV3_Q8_0 ? 127.0f : -8.0f));
    double d = (double)dsv3_f32_from_f16(half);
    memcpy(at, &half, 2);
    for (size_t i = 2; i < dsv3_type_bytes(type); i++) at[i] = (unsigned char)(test_random() >> 56);
    for (size_t i = 0; i < 32; i++) {
        int byte = at[2 + (type == DSV3_Q8_0 ? i : i % 16)];
        value[i] = d * (type == DSV3_Q8_0 ? (byte < 128 ? byte : byte - 256) : (i < 16 ? byte % 16 : byte / 16) - 8);
    }
}

/* cols, or the next whole blocks. */
static size_t whole(dsv3_type type, size_t cols) {
    size_t block = dsv3_type_block(type);
    return (cols + block - 1) / block * block;
}

/* Data (and scales) begin `shift` bytes past what malloc gives: 1 is as misaligned as can be. */
static weights weights_make(dsv3_type type, size_t rows, size_t cols, size_t shift) {
    weights w;
    size_t size = dsv3_type_bytes(type), across = (cols + 127) / 128, down = (rows + 127) / 128;
    int quantised = type == DSV3_F8_E4M3;
    w.memory = (unsigned char *)test_alloc(rows * dsv3_row_bytes(type, cols) + shift);
    w.scale_memory = (unsigned char *)test_alloc(across * down * sizeof(float) + shift);
    w.value = (double *)test_alloc(rows * cols * sizeof(double));
    w.tensor.data = w.memory + shift;
    w.tensor.scale = quantised ? w.scale_memory + shift : NULL;
    w.tensor.rows = rows, w.tensor.cols = cols, w.tensor.type = type, w.tensor.rank = 2;
    w.tensor.packed = 0;
    for (size_t i = 0; i < across * down; i++) { /* no two blocks alike */
        float scale = test_uniform(0.5f, 1) * ldexpf(1, -(int)(i % 6));
        memcpy(w.scale_memory + shift + i * sizeof scale, &scale, sizeof scale);
    }
    for (size_t i = 0; i < rows * cols && dsv3_type_block(type) > 1; i += 32) {
        put_block(type, w.memory + shift + i / 32 * size, w.value + i);
    }
    for (size_t i = 0; i < rows * cols && dsv3_type_block(type) == 1; i++) {
        size_t block = i / cols / 128 * across + i % cols / 128;
        float scale;
        memcpy(&scale, w.scale_memory + shift + block * sizeof scale, sizeof scale);
        w.value[i] = put(type, w.memory + shift + i * size, test_uniform(-1, 1)) * (quantised ? (double)scale : 1.0);
    }
    return w;
}

static void weights_free(weights *w) { free(w->memory), free(w->scale_memory), free(w->value); }

/* ---- linear ------------------------------------------------------------------------------------------ */

/* How many y are further from the double result than (terms + 5) 2^-24 sum |w x|: the bound of a dot product
 * (tests/test_kernels.c) and the rounding of code times scale. An output is the sum of eight chains in the reference, of
 * ceil(cols/8) terms each, and one chain of all terms where weights go by panels. */
static int linear_wrong(const float *y, const float *x, const weights *w, size_t n) {
    size_t rows = w->tensor.rows, cols = w->tensor.cols;
    size_t terms = ctx.ops->own == NULL ? (cols + 7) / 8 : cols;
    int wrong = 0;
    for (size_t t = 0; t < n; t++) {
        for (size_t r = 0; r < rows; r++) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < cols; i++) {
                double product = w->value[r * cols + i] * (double)x[t * cols + i];
                sum += product, size += fabs(product);
            }
            wrong += !(fabs((double)y[t * rows + r] - sum) <= ((double)terms + 5) * UNIT * size);
        }
    }
    return wrong;
}

static void linear_case(dsv3_type type, size_t rows, size_t cols, size_t shift) {
    enum { N = 5 };
    weights w = weights_make(type, rows, cols, shift);
    float *x = (float *)test_alloc(N * cols * sizeof(float)), *y = (float *)test_alloc(N * rows * sizeof(float));
    float *one = (float *)test_alloc(rows * sizeof(float));
    size_t floats = linear_floats(&ctx, N, cols);
    float *scratch = (float *)test_alloc(floats * sizeof(float));
    int alone = 0, wrong;
    test_fill(x, N * cols, -1, 1);
    memset(y, 0xFF, N * rows * sizeof(float));
    memset(scratch, 0xFF, floats * sizeof(float)); /* scratch may hold anything */
    dsv3_linear(&ctx, y, x, &w.tensor, N, scratch, NULL);
    wrong = linear_wrong(y, x, &w, N);
    for (size_t t = 0; t < N; t++) {
        memset(one, 0xFF, rows * sizeof(float));
        dsv3_linear(&ctx, one, x + t * cols, &w.tensor, 1, scratch, NULL);
        alone += !same_bits(one, y + t * rows, rows);
    }
    if (wrong || alone) fprintf(stderr, "linear %s %zux%zu shift %zu\n", dsv3_type_name(type), rows, cols, shift);
    CHECK_EQ(wrong, 0);
    CHECK_EQ(alone, 0);
    weights_free(&w);
    free(x), free(y), free(one), free(scratch);
}

static void linear_all(void) {
    static const size_t sizes[] = {1, 127, 128, 129, 300};
    for (int type = 0; type < DSV3_TYPES; type++) {
        dsv3_type t = (dsv3_type)type;
        for (size_t i = 0; i < 25; i++) linear_case(t, sizes[i / 5], whole(t, sizes[i % 5]), i % 2);
        linear_case(t, 128, whole(t, 129), 1);
        linear_case(t, 3, whole(t, 7), 1);
    }
}

/* A decoded row is code times scale, rounded once. */
static void rows_exact(void) {
    for (int type = 0; type < DSV3_TYPES; type++) {
        size_t cols = whole((dsv3_type)type, 300);
        weights w = weights_make((dsv3_type)type, 257, cols, 1);
        float y[320];
        int wrong = 0;
        for (size_t r = 0; r < 257; r++) {
            memset(y, 0xFF, sizeof y);
            dsv3i_decode_row(&ctx, y, &w.tensor, r);
            for (size_t i = 0; i < cols; i++) wrong += y[i] != (float)w.value[r * cols + i];
        }
        CHECK_EQ(wrong, 0);
        weights_free(&w);
    }
}

/* Backwards, item by item; user counts the calls. */
static void backwards(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    ++*(int *)user;
    while (n-- > 0) task(arg, n, n + 1, n % threads);
}

/* Three products: each alone, each with the next in one call of the op, and some rows of each. The engine computes any
 * number of them in one loop. */
typedef struct products {
    weights w[3];
    float *x[3], *want[3], *got[3];
    dsv3i_product list[4]; /* the first once more behind the last */
} products;

static const size_t some_rows[3] = {301, 6, 515}, some_cols[3] = {700, 129, 260}, some_n[3] = {3, 1, 2};

static void products_clear(products *p) {
    for (size_t j = 0; j < 3; j++) memset(p->got[j], 0xFF, some_n[j] * some_rows[j] * sizeof(float));
}

static void products_compare(const products *p, size_t j) {
    CHECK(same_bits(p->got[j], p->want[j], some_n[j] * some_rows[j]));
}

/* Two in one call, in one piece or in many. */
static void linear_pairs(products *p, const dsv3_context *pieces, float *scratch) {
    int *calls = (int *)pieces->parallel_user, before = *calls;
    for (int cut = 0; cut < 2; cut++) {
        for (size_t j = 0; j < 3; j++) {
            products_clear(p);
            ctx.ops->linear(cut ? pieces : &ctx, p->list + j, 2, scratch);
            products_compare(p, j);
            products_compare(p, (j + 1) % 3);
        }
    }
    /* The plain op has a loop for each, but the second is too small to be split; the engine has one for both. */
    CHECK_EQ(*calls - before, ctx.ops->own == NULL ? 4 : 3);
}

/* Rows [128, rows - 3) of a matrix, or those behind the first 64 of a low one: a part of what all of it gives. */
static void linear_parts(products *p, const dsv3_context *pieces, float *scratch) {
    for (int cut = 0; cut < 2; cut++) {
        products_clear(p);
        for (size_t j = 0; j < 3; j++) {
            dsv3i_product part = p->list[j];
            part.row = some_rows[j] > 128 ? 128 : 0;
            part.rows = some_rows[j] - part.row - (some_rows[j] > 128 ? 3 : 0);
            ctx.ops->linear(cut ? pieces : &ctx, &part, 1, scratch);
            for (size_t t = 0; t < some_n[j]; t++) {
                CHECK(same_bits(p->got[j] + t * part.rows, p->want[j] + t * some_rows[j] + part.row, part.rows));
            }
        }
    }
}

#ifdef DSV3I_ENGINE
static void linear_many(products *p, const dsv3_context *pieces) {
    int *calls = (int *)pieces->parallel_user, before = *calls;
    size_t workers = dsv3i_engine_linear_floats(0, 1, pieces->threads); /* rounded rows come behind their room */
    float *scratch = (float *)test_alloc(linear_floats(pieces, 6, 700) * sizeof(float));
    dsv3i_job jobs[3];
    for (int cut = 0; cut < 2; cut++) {
        products_clear(p);
        for (size_t j = 0; j < 3; j++) jobs[j].p = p->list[j], jobs[j].pair = NULL;
        dsv3i_jobs_run(cut ? pieces : &ctx, jobs, 3, scratch, scratch + workers);
        for (size_t j = 0; j < 3; j++) products_compare(p, j);
    }
    CHECK_EQ(*calls - before, 1);
    free(scratch);
}
#endif

/* Several products in one call give the bits of each alone, in one piece or in many. */
static void linear_jobs(void) {
    products p;
    float *scratch;
    dsv3_context pieces = ctx;
    int calls = 0;
    pieces.parallel_for = backwards;
    pieces.parallel_user = &calls;
    pieces.threads = 3;
    scratch = (float *)test_alloc(linear_floats(&pieces, 6, 700) * sizeof(float));
    for (size_t j = 0; j < 3; j++) {
        size_t rows = some_rows[j], cols = some_cols[j], n = some_n[j];
        p.w[j] = weights_make(j == 0 ? DSV3_BF16 : DSV3_F8_E4M3, rows, cols, j);
        p.x[j] = (float *)test_alloc(n * cols * sizeof(float));
        p.want[j] = (float *)test_alloc(n * rows * sizeof(float));
        p.got[j] = (float *)test_alloc(n * rows * sizeof(float));
        test_fill(p.x[j], n * cols, -1, 1);
        dsv3_linear(&ctx, p.want[j], p.x[j], &p.w[j].tensor, n, scratch, NULL);
        p.list[j] = dsv3i_product_of(p.got[j], p.x[j], &p.w[j].tensor, n);
    }
    p.list[3] = p.list[0];
    linear_pairs(&p, &pieces, scratch);
    linear_parts(&p, &pieces, scratch);
#ifdef DSV3I_ENGINE
    if (ctx.ops->own != NULL) linear_many(&p, &pieces);
#endif
    for (size_t j = 0; j < 3; j++) weights_free(&p.w[j]), free(p.x[j]), free(p.want[j]), free(p.got[j]);
    free(scratch);
}

/* ---- RMSNorm ----------------------------------------------------------------------------------------- */

static dsv3_tensor vector(const void *data, size_t n, dsv3_type type) {
    dsv3_tensor g;
    g.data = data, g.scale = NULL, g.rows = 1, g.cols = n, g.type = type, g.rank = 1, g.packed = 0;
    return g;
}

static void rmsnorm_golden(void) {
    static const double want[8] = {0.150943921, 0.656129017, 0.980923956, 1.15869678,
                                   1.28460897,  1.31308153,  1.10309441,  0.645055261};
    float x[8], y[8], gain[8];
    dsv3_tensor g = vector(gain, 8, DSV3_F32);
    for (int i = 0; i < 8; i++) {
        x[i] = (float)sin(0.1 + 0.37 * i);
        gain[i] = (float)(1 + 0.1 * cos((double)i));
    }
    dsv3_rmsnorm(&ctx, y, x, &g, 1, 8, 1e-6f, NULL);
    CHECK(dsv3i_all_finite(y, 8));
    CHECK_CLOSE(y, want, 8, 3e-7);
    dsv3_rmsnorm(&ctx, x, x, &g, 1, 8, 1e-6f, NULL); /* in place */
    CHECK(same_bits(x, y, 8));
}

/* Widths around the piece by which gains are decoded; gains of every type, misaligned; rows alone and together. */
static void rmsnorm_case(dsv3_type type, size_t d, float eps) {
    enum { N = 3 };
    weights g = weights_make(type, 1, d, 1);
    float *x = (float *)test_alloc(N * d * sizeof(float)), *y = (float *)test_alloc(N * d * sizeof(float));
    int wrong = 0, alone = 0;
    g.tensor.rank = 1;
    test_fill(x, N * d, -2, 2);
    for (size_t i = 0; i < d; i++) x[d + i] *= 1e-4f; /* a row where eps matters */
    memset(y, 0xFF, N * d * sizeof(float));
    dsv3_rmsnorm(&ctx, y, x, &g.tensor, N, d, eps, NULL);
    for (size_t t = 0; t < N; t++) {
        double sum = 0;
        for (size_t i = 0; i < d; i++) sum += (double)x[t * d + i] * x[t * d + i];
        for (size_t i = 0; i < d; i++) {
            double want = g.value[i] * (double)x[t * d + i] / sqrt(sum / (double)d + (double)eps);
            wrong += !(fabs((double)y[t * d + i] - want) <= ((double)d / 16 + 8) * UNIT * fabs(want));
        }
        dsv3_rmsnorm(&ctx, x + t * d, x + t * d, &g.tensor, 1, d, eps, NULL);
        alone += !same_bits(x + t * d, y + t * d, d);
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(alone, 0);
    weights_free(&g);
    free(x), free(y);
}

static void rmsnorm_all(void) {
    static const size_t widths[] = {1, 2, 63, 64, 65, 128, 200};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
        rmsnorm_case(DSV3_F32, widths[i], 1e-6f);
        rmsnorm_case(DSV3_BF16, widths[i], 1e-5f);
        rmsnorm_case(DSV3_F16, widths[i], 1e-6f);
    }
}

static void rmsnorm_row(float *y, float a, float b, float c, float d) {
    static const float gain[4] = {1, 2, 3, 4};
    dsv3_tensor g = vector(gain, 4, DSV3_F32);
    float x[4];
    x[0] = a, x[1] = b, x[2] = c, x[3] = d;
    dsv3_rmsnorm(&ctx, y, x, &g, 1, 4, 1e-6f, NULL);
}

static int all_zero(const float *y) { return y[0] == 0 && y[1] == 0 && y[2] == 0 && y[3] == 0; }

static void rmsnorm_edges(void) {
    const float tiny = 1e-30f, fits = 1e19f, over = 2e19f; /* 4 fits^2 and over^2 are beyond FLT_MAX, fits^2 is not */
    static const double want_tiny[4] = {1e-27, 2e-27, 3e-27, -4e-27};
    float y[4];
    rmsnorm_row(y, 0, 0, 0, 0);
    CHECK(all_zero(y));
    rmsnorm_row(y, tiny, tiny, tiny, -tiny);
    CHECK(dsv3i_all_finite(y, 4));
    CHECK_CLOSE(y, want_tiny, 4, 1e-6);
    rmsnorm_row(y, fits, 0, 0, 0);
    CHECK(fabs((double)y[0] - 2) < 1e-6 && y[1] == 0);
    rmsnorm_row(y, fits, fits, fits, fits);
    CHECK(all_zero(y));
    rmsnorm_row(y, 1, -over, 0, 3);
    CHECK(all_zero(y));
    rmsnorm_row(y, 1, NAN, 0, 3);
    CHECK(isnan(y[0]) && isnan(y[1]) && isnan(y[2]) && isnan(y[3]));
    rmsnorm_row(y, 1, INFINITY, -INFINITY, 3);
    CHECK(y[0] == 0 && isnan(y[1]) && isnan(y[2]) && y[3] == 0);
}

/* A bad row harms itself only. */
static void rmsnorm_rows_apart(void) {
    static const float gain[4] = {1, 1, 1, 1};
    dsv3_tensor g = vector(gain, 4, DSV3_F32);
    float x[12] = {1, 2, 3, 4, NAN, 1, 1, INFINITY, 4, 3, 2, 1}, y[12], alone[4];
    dsv3_rmsnorm(&ctx, y, x, &g, 3, 4, 1e-6f, NULL);
    dsv3_rmsnorm(&ctx, alone, x, &g, 1, 4, 1e-6f, NULL);
    CHECK(same_bits(y, alone, 4) && dsv3i_all_finite(y, 4));
    dsv3_rmsnorm(&ctx, alone, x + 8, &g, 1, 4, 1e-6f, NULL);
    CHECK(same_bits(y + 8, alone, 4) && dsv3i_all_finite(y + 8, 4));
}

/* ---- SwiGLU ------------------------------------------------------------------------------------------ */

static void silu_edges(void) {
    float a[8] = {100, -100, -0.0f, 0, FLT_MAX, -FLT_MAX, 88.8f, 20}, b[8] = {1, 1, 1, 1, 1, 1, -2, 0.5f};
    float nan[1] = {NAN}, inf[1] = {INFINITY};
    dsv3i_swiglu(&ctx, a, a, b, 8);
    CHECK(a[0] == 100);
    CHECK(a[1] <= 0 && a[1] > -1e-37f);
    CHECK(a[2] == 0 && signbit(a[2]));
    CHECK(a[3] == 0 && !signbit(a[3]));
    CHECK(a[4] == FLT_MAX);
    CHECK(a[5] == 0);
    CHECK(a[6] == -2 * 88.8f);
    CHECK(fabs((double)a[7] - 10) < 1e-6);
    dsv3i_swiglu(&ctx, nan, nan, b, 1);
    CHECK(isnan(nan[0]));
    dsv3i_swiglu(&ctx, inf, inf, b, 1);
    CHECK(isinf(inf[0]) && inf[0] > 0);
}

/* Lengths around the piece of the parallel loop. */
static void silu_lengths(void) {
    static const size_t lengths[] = {0, 1, 255, 256, 257, 511, 513, 1000};
    for (size_t k = 0; k < sizeof lengths / sizeof lengths[0]; k++) {
        size_t n = lengths[k];
        float *h = (float *)test_alloc(n * sizeof(float)), *b = (float *)test_alloc(n * sizeof(float));
        double *want = (double *)test_alloc(n * sizeof(double));
        test_fill(h, n, -10, 10);
        test_fill(b, n, -1, 1);
        for (size_t i = 0; i < n; i++) want[i] = (double)h[i] / (1 + exp(-(double)h[i])) * (double)b[i];
        dsv3i_swiglu(&ctx, h, h, b, n);
        CHECK(dsv3i_all_finite(h, n));
        CHECK_CLOSE(h, want, n, 5e-7);
        free(h), free(b), free(want);
    }
}

/* ---- log-sum-exp ------------------------------------------------------------------------------------- */

static void lse_case(size_t V, float low, float high) {
    float *z = (float *)test_alloc(V * sizeof(float)), got;
    double top = -INFINITY, sum = 0, want;
    int ok;
    test_fill(z, V, low, high);
    for (size_t i = 0; i < V; i++) top = (double)z[i] > top ? (double)z[i] : top;
    for (size_t i = 0; i < V; i++) sum += exp((double)z[i] - top);
    want = top + log(sum);
    got = dsv3_log_sum_exp(z, V);
    ok = fabs((double)got - want) <= 2e-6 + 2 * UNIT * fabs(want);
    if (!ok) {
        fprintf(stderr, "log_sum_exp of %zu in %g..%g: got %.9g, want %.9g\n", V, (double)low, (double)high,
                (double)got, want);
    }
    CHECK(ok);
    CHECK(isfinite(got));
    free(z);
}

static float lse2(float a, float b) {
    float z[2];
    z[0] = a, z[1] = b;
    return dsv3_log_sum_exp(z, 2);
}

static void lse_all(void) {
    static const size_t lengths[] = {1, 2, 3, 63, 64, 65, 127, 128, 129, 1000};
    static const float singles[] = {0, 1, -88.8f, 88.8f, 1e38f, -1e38f, FLT_MAX, -FLT_MAX, 1e-30f};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        lse_case(lengths[i], -5, 5);
        lse_case(lengths[i], -120, 0);
        lse_case(lengths[i], 500, 501);
        lse_case(lengths[i], 3, 3); /* equal: 3 + log V */
    }
    for (size_t i = 0; i < sizeof singles / sizeof singles[0]; i++) {
        CHECK(dsv3_log_sum_exp(&singles[i], 1) == singles[i]);
    }
    CHECK(lse2(88.8f, -88.8f) == 88.8f && lse2(-88.8f, 88.8f) == 88.8f);
    CHECK(lse2(1e38f, -1e38f) == 1e38f && lse2(-1e38f, 1e38f) == 1e38f);
    CHECK(lse2(FLT_MAX, -FLT_MAX) == FLT_MAX);
    CHECK(lse2(1e38f, 1e38f) == 1e38f); /* log 2 is nothing beside it */
    CHECK(fabs((double)lse2(88.8f, 88.8f) - ((double)88.8f + log(2))) < 1e-5);
    CHECK(fabs((double)lse2(0, 0) - log(2)) < 1e-7);
    CHECK(lse2(0, -110) == 0);
    CHECK(isfinite(lse2(1e38f, -1e38f) - -1e38f)); /* the loss of a target with probability 0 */
}

/* ---- cross-entropy ----------------------------------------------------------------------------------- */

/* -log p(target) of row u in double, and how far a float result may be from it: two logits' errors (linear_wrong),
 * and those of exp, sum and log. */
static double entropy_want(const weights *w, const float *u, int32_t target, double *bound) {
    size_t V = w->tensor.rows, d = w->tensor.cols;
    double *z = (double *)test_alloc(V * sizeof *z), top = -INFINITY, sum = 0, largest = 0, want;
    for (size_t v = 0; v < V; v++) {
        double size = 0;
        z[v] = 0;
        for (size_t i = 0; i < d; i++) {
            z[v] += w->value[v * d + i] * (double)u[i];
            size += fabs(w->value[v * d + i] * (double)u[i]);
        }
        top = fmax(top, z[v]), largest = fmax(largest, size);
    }
    for (size_t v = 0; v < V; v++) sum += exp(z[v] - top);
    want = top + log(sum) - z[target];
    *bound = 2 * ((double)((d + 7) / 8) + 5) * UNIT * largest + 2e-6 + 2 * UNIT * fabs(want);
    free(z);
    return want;
}

/* Targets on both sides of the pieces' borders, and one that is none. All scratch is exactly as large as said. */
static void entropy_case(dsv3_type type, size_t V, size_t d) {
    enum { N = 8 };
    static const int32_t wish[N] = {0, 1023, 1024, DSV3_IGNORE, 1022, 2047, 2048, INT32_MAX};
    weights w = weights_make(type, V, d, 1);
    size_t floats = cross_entropy_floats(&ctx, &w.tensor, N);
    size_t floats_one = cross_entropy_floats(&ctx, &w.tensor, 1);
    float *u = (float *)test_alloc(N * d * sizeof(float)), *nll = (float *)test_alloc(N * sizeof(float)), one;
    float *scratch = (float *)test_alloc(floats * sizeof(float)), *scratch_one;
    int32_t target[N];
    int wrong = 0, alone = 0;
    scratch_one = (float *)test_alloc(floats_one * sizeof(float));
    for (size_t t = 0; t < N; t++) target[t] = wish[t] < (int32_t)V ? wish[t] : (int32_t)V - 1;
    test_fill(u, N * d, -1, 1);
    memset(nll, 0xFF, N * sizeof(float));
    memset(scratch, 0xFF, floats * sizeof(float));
    dsv3_cross_entropy(&ctx, nll, u, &w.tensor, target, N, scratch, NULL);
    for (size_t t = 0; t < N; t++) {
        double bound = 0, want = target[t] == DSV3_IGNORE ? 0 : entropy_want(&w, u + t * d, target[t], &bound);
        wrong += !(fabs((double)nll[t] - want) <= bound);
        memset(scratch_one, 0xFF, floats_one * sizeof(float));
        dsv3_cross_entropy(&ctx, &one, u + t * d, &w.tensor, target + t, 1, scratch_one, NULL);
        alone += !same_bits(&one, nll + t, 1);
    }
    if (wrong || alone) fprintf(stderr, "cross-entropy %s %zux%zu\n", dsv3_type_name(type), V, d);
    CHECK_EQ(wrong, 0);
    CHECK_EQ(alone, 0);
    weights_free(&w);
    free(u), free(nll), free(scratch), free(scratch_one);
}

static void entropy_all(void) {
    static const size_t sizes[] = {1, 2, 255, 1023, 1024, 1025, 3000};
    for (int type = 0; type < DSV3_TYPES; type++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            dsv3_type t = (dsv3_type)type;
            entropy_case(t, sizes[i], whole(t, 130)); /* two FP8 blocks across, the second ragged */
            entropy_case(t, sizes[i], whole(t, 7));
        }
    }
}

/* One token's logit is `high`, all others are `low`: -log p of that token and of another. */
static void entropy_peak(size_t V, size_t peak, float low, float high) {
    float *head = (float *)test_alloc(V * sizeof(float)), u[3] = {1, 1, 1}, nll[3], *scratch;
    int32_t target[3];
    dsv3_tensor w;
    double rest = log(exp((double)low - (double)high) * (double)(V - 1) + 1);
    for (size_t i = 0; i < V; i++) head[i] = i == peak ? high : low;
    w.data = head, w.scale = NULL, w.rows = V, w.cols = 1, w.type = DSV3_F32, w.rank = 2, w.packed = 0;
    target[0] = (int32_t)peak, target[1] = peak == 0 ? 1 : 0, target[2] = DSV3_IGNORE;
    scratch = (float *)test_alloc(cross_entropy_floats(&ctx, &w, 3) * sizeof(float));
    dsv3_cross_entropy(&ctx, nll, u, &w, target, 3, scratch, NULL);
    CHECK(fabs((double)nll[0] - rest) <= 2e-6);
    CHECK(fabs((double)nll[1] - (rest + ((double)high - (double)low))) <= 2e-6 + UNIT * (double)(high - low));
    CHECK(nll[2] == 0 && !signbit(nll[2]));
    free(head), free(scratch);
}

static void entropy_extremes(void) {
    static const size_t peaks[] = {0, 1023, 1024, 2047, 2048, 2999};
    for (size_t i = 0; i < sizeof peaks / sizeof peaks[0]; i++) {
        entropy_peak(3000, peaks[i], -1e4f, 1e4f); /* the maximum rises in a later piece, or never */
        entropy_peak(3000, peaks[i], 1e4f, 1e4f);  /* equal: log V */
        entropy_peak(3000, peaks[i], -1e4f, -1e4f + 1);
        entropy_peak(3000, peaks[i], -1e37f, 1e37f);
    }
    entropy_peak(2, 1, -1e4f, 1e4f);
}

/* Gradients of a negative weight are those of a positive one with the other sign; of none, and of rows without a target,
 * zeros. */
static void entropy_weights(void) {
    enum { N = 3, V = 1100, D = 5 };
    static const int32_t target[N] = {1050, DSV3_IGNORE, 2};
    weights w = weights_make(DSV3_F32, V, D, 0);
    float u[N * D], nll[N], du[3][N * D] = {{0}};
    float *dhead[3], *scratch = (float *)test_alloc(cross_entropy_floats(&ctx, &w.tensor, N) * sizeof(float));
    int right = 1;
    test_fill(u, N * D, -1, 1);
    for (int sign = 0; sign < 3; sign++) {
        dhead[sign] = (float *)test_alloc(V * D * sizeof(float));
        for (size_t i = 0; i < V * D; i++) dhead[sign][i] = 0;
        CHECK_EQ(dsv3_cross_entropy(&ctx, nll, u, &w.tensor, target, N, scratch, NULL), DSV3_OK);
        CHECK_EQ(dsv3_cross_entropy_backward(&ctx, du[sign], dhead[sign], 0.25f * (float)(1 - sign), u, &w.tensor, target, N,
                                             scratch, NULL), DSV3_OK);
    }
    for (size_t i = 0; i < N * D; i++) {
        float want = du[0][i];
        right = right && !(du[2][i] > -want || du[2][i] < -want) && !(du[1][i] > 0 || du[1][i] < 0);
        right = right && (want > 0 || want < 0) == (i / D != 1);
    }
    for (size_t i = 0; i < V * D; i++) {
        right = right && !(dhead[2][i] > -dhead[0][i] || dhead[2][i] < -dhead[0][i]) && !(dhead[1][i] > 0 || dhead[1][i] < 0);
    }
    CHECK(right);
    for (int sign = 0; sign < 3; sign++) free(dhead[sign]);
    weights_free(&w);
    free(scratch);
}

/* A NaN is the trouble of its own row, wherever it appears; a row without a target has none. */
static void entropy_nan(void) {
    enum { N = 4, V = 1500, D = 9 };
    static const int32_t target[N] = {7, 1400, DSV3_IGNORE, 3};
    weights w = weights_make(DSV3_F32, V, D, 0);
    float u[N * D], good[N], bad[N];
    float *scratch = (float *)test_alloc(cross_entropy_floats(&ctx, &w.tensor, N) * sizeof(float));
    test_fill(u, N * D, -1, 1);
    dsv3_cross_entropy(&ctx, good, u, &w.tensor, target, N, scratch, NULL);
    u[D + 3] = u[2 * D] = NAN;
    dsv3_cross_entropy(&ctx, bad, u, &w.tensor, target, N, scratch, NULL);
    CHECK(isnan(bad[1]) && bad[2] == 0);
    CHECK(same_bits(good, bad, 1) && same_bits(good + 3, bad + 3, 1));
    weights_free(&w);
    free(scratch);
}

/* Any number of threads, any cut: the same bits, and no scratch beyond what those threads are said to need. */
static void entropy_threads(void) {
    enum { N = 40, V = 3000, D = 130 };
    weights w = weights_make(DSV3_F8_E4M3, V, D, 1);
    float *u = (float *)test_alloc(N * D * sizeof(float)), want[N], got[N];
    int32_t target[N];
    test_fill(u, N * D, -1, 1);
    for (size_t t = 0; t < N; t++) target[t] = t % 7 == 3 ? DSV3_IGNORE : (int32_t)(test_random() % V);
    for (size_t threads = 1; threads <= 4; threads++) {
        for (int hook = 0; hook < 2; hook++) {
            dsv3_context many;
            int calls = 0;
            float *scratch;
            CHECK_EQ(dsv3_context_init(&many, test_backend(), threads, NULL), DSV3_OK); /* OpenMP, or serial */
            if (hook) many.parallel_for = backwards, many.parallel_user = &calls, many.threads = threads;
            scratch = (float *)test_alloc(cross_entropy_floats(&many, &w.tensor, N) * sizeof(float));
            memset(got, 0xFF, sizeof got);
            dsv3_cross_entropy(&many, got, u, &w.tensor, target, N, scratch, NULL);
            if (threads == 1 && !hook) memcpy(want, got, sizeof want);
            CHECK(same_bits(got, want, N));
            CHECK_EQ(calls, hook && threads > 1 ? 6 : 0); /* logits and losses of three pieces */
            free(scratch);
        }
    }
    {
        size_t bytes = 1;
        CHECK_EQ(dsv3_cross_entropy_size(&ctx, &w.tensor, SIZE_MAX / 8, &bytes, NULL), DSV3_ERR_OVERFLOW);
        CHECK_EQ(bytes, 0);
    }
    weights_free(&w);
    free(u);
}

/* ---- both, in any order ------------------------------------------------------------------------------ */

/* Flat tails, in which each logit is nothing beside the largest and all of them are something; slopes, along which the
 * maximum rises again and again; in any order. Written into z [V]. */
enum { TAIL_FIRST, TAIL_MIDDLE, TAIL_LAST, TAIL_MANY, RISING, FALLING, SHUFFLED, ORDERS };
static void order_make(float *z, size_t V, int order, float depth) {
    for (size_t i = 0; i < V; i++) z[i] = order < RISING ? -depth : -depth * (float)(V - i) / (float)V;
    if (order == TAIL_FIRST) z[0] = 0;
    if (order == TAIL_MIDDLE) z[V / 2] = 0;
    if (order == TAIL_LAST) z[V - 1] = 0;
    for (size_t i = 0; order == TAIL_MANY && i < V; i += 1000) z[i] = 0;
    for (size_t i = 0; order == FALLING && i < V / 2; i++) {
        float swap = z[i];
        z[i] = z[V - 1 - i], z[V - 1 - i] = swap;
    }
    for (size_t i = V - 1; order == SHUFFLED && i > 0; i--) {
        size_t j = test_below(i + 1);
        float swap = z[i];
        z[i] = z[j], z[j] = swap;
    }
}

/* log sum exp(z - top), and top. */
static double order_want(const float *z, size_t V, double *top) {
    double sum = 0, lost = 0; /* compensated: the order must not matter here */
    *top = -INFINITY;
    for (size_t i = 0; i < V; i++) *top = fmax(*top, (double)z[i]);
    for (size_t i = 0; i < V; i++) {
        double term = exp((double)z[i] - *top) - lost, next = sum + term;
        lost = (next - sum) - term, sum = next;
    }
    return log(sum);
}

/* Log-sum-exp and the losses of the best token and of the first, with a head of one column: the logits are z itself. */
static void order_case(float *z, size_t V, float *scratch, int order, float depth) {
    double top, want;
    float one[2] = {1, 1}, nll[2], got;
    int32_t target[2] = {0, 0};
    dsv3_tensor w = {z, NULL, V, 1, DSV3_F32, 2, 0};
    int ok;
    order_make(z, V, order, depth);
    want = order_want(z, V, &top);
    for (size_t i = 0; i < V; i++) target[1] = z[i] > z[target[1]] ? (int32_t)i : target[1];
    got = dsv3_log_sum_exp(z, V);
    ok = fabs((double)got - (top + want)) <= fmin(ldexp(1, -19), ldexp(want, -17)) + UNIT * fabs(top + want);
    if (!ok) fprintf(stderr, "log_sum_exp: got %.9g, want %.9g\n", (double)got, top + want);
    dsv3_cross_entropy(&ctx, nll, one, &w, target, 2, scratch, NULL);
    for (size_t t = 0; t < 2; t++) {
        double exact = want + (top - (double)z[target[t]]);
        int near = fabs((double)nll[t] - exact) <= ldexp(1, -19) + UNIT * exact;
        if (!near) fprintf(stderr, "cross-entropy: got %.9g, want %.9g\n", (double)nll[t], exact);
        ok = ok && near;
    }
    if (!ok) fprintf(stderr, "V = %zu, order %d, depth %g\n", V, order, (double)depth);
    CHECK(ok);
}

static void orders_all(void) {
    static const size_t sizes[] = {2, 1000, 129280, (size_t)1 << 24};
    static const float depths[] = {0, 1, 12, 16.6f, 17, 20.5f, 21, 60, 104};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        float *z = (float *)test_alloc(sizes[s] * sizeof *z);
        dsv3_tensor w = {z, NULL, sizes[s], 1, DSV3_F32, 2, 0};
        float *scratch = (float *)test_alloc(cross_entropy_floats(&ctx, &w, 2) * sizeof *scratch);
        for (int order = 0; order < ORDERS; order++) {
            for (size_t i = 0; i < sizeof depths / sizeof depths[0]; i++) {
                if (sizes[s] < 1000000 || i == (size_t)order + 1) order_case(z, sizes[s], scratch, order, depths[i]);
            }
        }
        free(z), free(scratch);
    }
    CHECK(isinf(dsv3_log_sum_exp(NULL, 0)) && dsv3_log_sum_exp(NULL, 0) < 0);
}

/* A router of four experts and a matrix [rows, 8] of zeros, its first row as a vector, too. */
typedef struct plain_ops {
    dsv3_config c;
    dsv3_context plain;
    dsv3_tensor w, g;
} plain_ops;

static plain_ops plain_open(size_t rows) {
    static const float numbers[4 * 8] = {0};
    plain_ops o;
    memset(&o, 0, sizeof o);
    o.c = dsv3_config_default();
    o.c.n_routed_experts = 4, o.c.num_experts_per_tok = 2, o.c.n_group = o.c.topk_group = 1, o.c.routed_scaling_factor = 1.0f;
    o.w.data = numbers, o.w.rows = rows, o.w.cols = 8, o.w.rank = 2;
    o.g = o.w;
    o.g.rows = 1, o.g.rank = 1;
    CHECK_EQ(dsv3_context_init(&o.plain, DSV3_BACKEND_REFERENCE, 1, NULL), DSV3_OK);
    return o;
}

/* No rows: nothing is read or written, whatever the pointers are. */
static void no_rows(void) {
    static const dsv3_routing routing = {NULL, NULL, NULL, 0, 4, 2, 2, 1};
    static const dsv3_balance_weights balance = {1, 1, 1, 2, 1, 0};
    const plain_ops o = plain_open(4);
    dsv3_error error;
    double loss = 7, sums[8];
#define NOTHING(call) CHECK_EQ(call, DSV3_OK), CHECK_EQ(error.code, DSV3_OK)
    NOTHING(dsv3_rmsnorm(&o.plain, NULL, NULL, &o.g, 0, 8, 1e-6f, &error));
    NOTHING(dsv3_embed(&o.plain, NULL, NULL, &o.w, 0, &error));
    NOTHING(dsv3_linear(&o.plain, NULL, NULL, &o.w, 0, NULL, &error));
    NOTHING(dsv3_cross_entropy(&o.plain, NULL, NULL, &o.w, NULL, 0, NULL, &error));
    NOTHING(dsv3_rope_table(NULL, NULL, NULL, 1.0f, 0, 8, &error));
    NOTHING(dsv3_router_scores(&o.plain, &o.c, NULL, NULL, &o.w, NULL, 0, NULL, &error));
    NOTHING(dsv3_router_select(&o.c, NULL, NULL, NULL, NULL, NULL, 0, NULL, &error));
    NOTHING(dsv3_router_weights(&o.c, NULL, NULL, NULL, 0, &error));
    NOTHING(dsv3_bias_step(NULL, NULL, 0, 4, DSV3_BIAS_SIGN, 0.001, &error));
    NOTHING(dsv3_linear_backward(&o.plain, NULL, NULL, NULL, NULL, &o.w, 0, NULL, &error));
    NOTHING(dsv3_embed_backward(NULL, NULL, NULL, 0, 4, 8, &error));
    NOTHING(dsv3_rmsnorm_backward(&o.plain, NULL, NULL, NULL, NULL, &o.g, 0, 1e-6f, NULL, &error));
    NOTHING(dsv3_cross_entropy_backward(&o.plain, NULL, NULL, 1.0f, NULL, &o.w, NULL, 0, NULL, &error));
    NOTHING(dsv3_router_weights_backward(&o.c, NULL, NULL, NULL, NULL, 0, &error));
    NOTHING(dsv3_router_scores_backward(&o.c, NULL, NULL, NULL, 0, &error));
    NOTHING(dsv3_communication_loss(&loss, &routing, sums, &error));
    CHECK(!(loss > 0 || loss < 0));
    NOTHING(dsv3_balance_backward(NULL, 1.0, &balance, &routing, sums, &error));
}

/* Arguments that are wrong upwards only: infinite, another shape; and logits that stop at the largest number. */
static void edges(void) {
    static float y[64], scratch[4096];
    static const float numbers[64] = {0};
    static const int32_t token[2] = {1, 1};
    static const float bias[2] = {3e38f, 3e38f}, low[2] = {-3e38f, -3e38f};
    float logits[3] = {0.0f, 3e38f, 1.0f};
    int32_t position[1] = {0};
    uint8_t seen[1];
    uint64_t turns[4] = {0};
    plain_ops o = plain_open(3);
    dsv3_error error;
    CHECK_EQ(dsv3_rmsnorm(&o.plain, y, numbers, &o.g, 1, 8, INFINITY, &error), DSV3_ERR_ARG);
    CHECK(strcmp(error.name, "eps") == 0);
    o.g.rows = 2;
    CHECK_EQ(dsv3_rmsnorm(&o.plain, y, numbers, &o.g, 1, 8, 1e-6f, &error), DSV3_ERR_UNSUPPORTED);
    CHECK(strcmp(error.name, "g") == 0);
    CHECK_EQ(dsv3_rope_table(y, position, turns, INFINITY, 1, 8, &error), DSV3_ERR_ARG);
    CHECK(strcmp(error.name, "factor") == 0);
    CHECK_EQ(dsv3_router_scores(&o.plain, &o.c, y, numbers, &o.w, NULL, 1, scratch, &error), DSV3_ERR_MISMATCH);
    CHECK(strcmp(error.name, "gate_w") == 0 && error.expected[0] == 4 && error.found[0] == 3);
    CHECK_EQ(dsv3_logits_penalty(logits, 3, token, 2, 0.5f, seen, &error), DSV3_OK);
    CHECK(logits[1] >= 3.4028234e38f && logits[1] - logits[1] == 0.0f && logits[2] == 1.0f);
    logits[1] = 3e38f;
    CHECK_EQ(dsv3_logits_bias(logits, 3, token, bias, 2, &error), DSV3_OK);
    CHECK(logits[1] >= 3.4028234e38f && logits[1] - logits[1] == 0.0f && logits[0] == 0.0f);
    logits[1] = -3e38f; /* what is low is not forbidden, and what is forbidden stays so */
    CHECK_EQ(dsv3_logits_penalty(logits, 3, token, 2, 10.0f, seen, &error), DSV3_OK);
    CHECK(logits[1] <= -3.4028234e38f && logits[1] - logits[1] == 0.0f);
    CHECK_EQ(dsv3_logits_bias(logits, 3, token, low, 2, &error), DSV3_OK);
    CHECK(logits[1] <= -3.4028234e38f && logits[1] - logits[1] == 0.0f);
    logits[1] = -INFINITY;
    CHECK_EQ(dsv3_logits_penalty(logits, 3, token, 2, 10.0f, seen, &error), DSV3_OK);
    CHECK_EQ(dsv3_logits_bias(logits, 3, token, bias, 2, &error), DSV3_OK);
    CHECK(logits[1] < -3.4028235e38f && logits[1] - logits[1] != 0.0f);
    CHECK_EQ(dsv3_rope_table(y, position, turns, 1.0f, SIZE_MAX / 8, 8, &error), DSV3_ERR_OVERFLOW);
    o.w.rows = o.w.cols = 1; /* rows that can be counted, with losses that cannot: found out before a target is read */
    CHECK_EQ(dsv3_cross_entropy(&o.plain, y, numbers, &o.w, token, SIZE_MAX / 4 - 1, scratch, &error), DSV3_ERR_OVERFLOW);
    CHECK(strcmp(error.name, "n") == 0);
}

/* In fast mode what a block of Q8_0 or Q4_0 meets is rounded to 127ths of its largest; where that is nothing, or next to
 * it, the block counts as zeros. What is not finite is not lost. */
static void fast_small(void) {
    static const float least[] = {0, 1e-45f, -9e-31f, 2e-30f, INFINITY, NAN};
    static float scratch[4096];
    unsigned char blocks[2][2 * 34];
    float matrix[64], x[64], y[2], exact;
    dsv3_context fast;
    CHECK_EQ(dsv3_context_init(&fast, DSV3_BACKEND_REFERENCE, 1, NULL), DSV3_OK);
    fast.compute = DSV3_FAST;
    for (size_t i = 0; i < 64; i++) matrix[i] = i % 2 ? 1.0f : 127.0f; /* codes that are whole numbers */
    for (int type = 0; type < 2; type++) {
        dsv3_tensor w = {blocks[type], NULL, 1, 64, type ? DSV3_Q4_0 : DSV3_Q8_0, 2, 0};
        CHECK_EQ(dsv3_quantize(blocks[type], NULL, matrix, w.type, 1, 64, NULL), DSV3_OK);
        for (size_t k = 0; k < 6; k++) {
            for (size_t i = 0; i < 64; i++) x[i] = i < 32 ? 0.0f : i % 2 ? 0.0f : 1.0f;
            exact = 0;
            CHECK_EQ(dsv3_linear(&fast, &exact, x, &w, 1, scratch, NULL), DSV3_OK);
            x[6] = least[k];
            CHECK_EQ(dsv3_linear(&fast, y, x, &w, 1, scratch, NULL), DSV3_OK);
            CHECK(exact > 1000);
            CHECK(k < 4 ? same_bits(y, &exact, 1) : y[0] - y[0] != 0);
            memset(x, 0, sizeof x);
            x[6] = least[k];
            CHECK_EQ(dsv3_linear(&fast, y, x, &w, 1, scratch, NULL), DSV3_OK);
            CHECK(k < 3 ? !(y[0] > 0 || y[0] < 0) : k > 3 ? y[0] - y[0] != 0 : fabs((double)y[0] - 2e-30 * 127) < 2e-29);
        }
    }
}

int main(void) {
    CHECK_EQ(dsv3_context_init(&ctx, test_backend(), 1, NULL), DSV3_OK);
    linear_all();
    rows_exact();
    linear_jobs();
    rmsnorm_golden();
    rmsnorm_all();
    rmsnorm_edges();
    rmsnorm_rows_apart();
    silu_edges();
    silu_lengths();
    lse_all();
    entropy_all();
    entropy_extremes();
    entropy_weights();
    entropy_nan();
    entropy_threads();
    orders_all();
    no_rows();
    edges();
    fast_small();
    return test_done("ops");
}
