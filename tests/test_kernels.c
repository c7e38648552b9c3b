/* test_kernels.c -- chapter 3 (kernels): every entry of dsv3_kernels, for every backend compiled in.
 *
 * Each entry runs for n = 0..67 from several alignments, between guard values: a failure means that a kernel
 * reads or writes outside its arrays, forgets a tail, is less exact than its order of summation allows, or adds in
 * another order than the documented one -- then results change between machines and versions.
 *
 * check_backend tests one context, whatever its backend; a new backend needs one line in `backends`. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"
#include <float.h>

#define MOST 67 /* longest array: eight lanes of eight, and a ragged tail */
#define OFFSETS 4
#define GUARD 16             /* values on either side */
#define UNIT ldexp(1.0, -24) /* rounding error of one float operation, relative */

static const char *backend_name = "";

static void verdict(const char *what, int bad) {
    char text[128];
    snprintf(text, sizeof text, "%s of backend %s: %d wrong", what, backend_name, bad);
    test_count(bad == 0, __FILE__, __LINE__, text);
}

static int same_bits(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof *a) == 0; }

/* ---- arrays between guards: once a NaN, so that reading one shows in the result, and once a number, so that adding
 * to one shows, too */

typedef struct guarded {
    float cell[2 * GUARD + OFFSETS + MOST + 16];
    float *x; /* offset floats past a 64-byte boundary */
    size_t n;
} guarded;

static const uint32_t guards[2] = {0x7FC5A5A5u, 0x46404400u};
static uint32_t guard_bits;

static float *guarded_begin(guarded *g, size_t offset, size_t n) {
    size_t cells = sizeof g->cell / sizeof g->cell[0];
    size_t past = (size_t)((uintptr_t)(g->cell + GUARD) % 64) / sizeof(float);
    for (size_t i = 0; i < cells; i++) g->cell[i] = dsv3i_float(guard_bits);
    g->x = g->cell + GUARD + (past == 0 ? 0 : 16 - past) + offset;
    g->n = n;
    return g->x;
}

static int guarded_broken(const guarded *g) {
    size_t cells = sizeof g->cell / sizeof g->cell[0], begin = (size_t)(g->x - g->cell);
    int bad = 0;
    for (size_t i = 0; i < cells; i++)
        bad += (i < begin || i >= begin + g->n) && dsv3i_bits(g->cell[i]) != guard_bits;
    return bad;
}

/* Values of very different sizes, so that the order of a sum shows in its bits. */
static void fill_wild(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = ldexpf(test_uniform(-1, 1), (int)(test_random() % 13) - 6);
}

/* Such values with 11 significant bits: their products are exact floats. Compilers and backends may fuse a product
 * with the addition that follows (-ffp-contract), and gcc does so here and there within one loop; with these
 * values it makes no difference, and what is left to see is the order of the additions. */
static void fill_short(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        x[i] = ldexpf((float)((int)(test_random() % 4095) - 2047), (int)(test_random() % 13) - 17);
    }
}

/* ---- the documented order of summation, once more and as plainly as possible */

static float tree(const volatile float *s) {
    volatile float s04 = s[0] + s[4], s26 = s[2] + s[6], s15 = s[1] + s[5], s37 = s[3] + s[7];
    volatile float even = s04 + s26, odd = s15 + s37;
    return even + odd;
}

static float plain_dot(const float *x, const float *y, size_t n) {
    volatile float s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        volatile float product = x[i] * y[i];
        s[i % 8] = s[i % 8] + product;
    }
    return tree(s);
}

static float plain_sum(const float *p, size_t n) {
    volatile float s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) s[i % 8] = s[i % 8] + p[i];
    return tree(s);
}

/* Can bits be compared at all? Not where the compiler computes floats in a wider type. */
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD == 0
#define HONEST_FLOATS 1
#else
#define HONEST_FLOATS 0
#endif

/* ---- dot: |error| <= (ceil(n/8) + 4) 2^-24 sum |x_i y_i|: one rounding of the product, at most ceil(n/8)
 * additions in a partial sum, three in the tree. */

static void check_dot(const dsv3_kernels *k) {
    guarded gx, gy;
    int inexact = 0, order = 0, touched = 0;
    for (size_t n = 0; n <= MOST; n++) {
        for (size_t offsets = 0; offsets < OFFSETS * OFFSETS; offsets++) {
            float *x = guarded_begin(&gx, offsets % OFFSETS, n), *y = guarded_begin(&gy, offsets / OFFSETS, n);
            float got, want;
            double sum = 0, size = 0;
            fill_wild(x, n);
            fill_wild(y, n);
            for (size_t i = 0; i < n; i++) sum += (double)x[i] * y[i], size += fabs((double)x[i] * y[i]);
            got = k->dot(x, y, n);
            inexact += !(fabs((double)got - sum) <= ((double)((n + 7) / 8) + 4) * UNIT * size);
            fill_short(x, n);
            fill_short(y, n);
            got = k->dot(x, y, n), want = plain_dot(x, y, n);
            order += !same_bits(&got, &want, 1);
            touched += guarded_broken(&gx) + guarded_broken(&gy);
        }
    }
    verdict("exactness of dot", inexact);
    verdict("guards of dot", touched);
    if (HONEST_FLOATS) verdict("order of summation of dot", order);
}

/* Sums whose every other order gives another result: large terms that cancel in just one place. */
static void check_dot_tree(const dsv3_kernels *k) {
    static const float big = 33554432.0f; /* 2^25: big + 1 = big */
    float x[16], one[16];
    int bad = 0;
    for (size_t i = 0; i < 16; i++) one[i] = 1;
    for (size_t a = 0; a < 16; a++) {
        for (size_t b = 0; b < 16; b++) {
            float got, want;
            if (a == b) continue;
            for (size_t i = 0; i < 16; i++) x[i] = (float)(i + 1) * 0.37f;
            x[a] = big, x[b] = -big;
            got = k->dot(x, one, 16);
            want = plain_dot(x, one, 16);
            bad += !same_bits(&got, &want, 1);
        }
    }
    if (HONEST_FLOATS) verdict("tree of dot", bad);
}

/* ---- axpy: one multiply and one add, exact to both roundings */

static void check_axpy(const dsv3_kernels *k) {
    guarded gx, gy;
    int wrong = 0, touched = 0;
    for (size_t n = 0; n <= MOST; n++) {
        for (size_t offsets = 0; offsets < OFFSETS * OFFSETS; offsets++) {
            float *x = guarded_begin(&gx, offsets % OFFSETS, n), *y = guarded_begin(&gy, offsets / OFFSETS, n);
            float before_x[MOST + 1], before_y[MOST + 1], a = test_uniform(-2, 2);
            fill_wild(x, n);
            fill_wild(y, n);
            memcpy(before_x, x, n * sizeof *x);
            memcpy(before_y, y, n * sizeof *y);
            k->axpy(y, a, x, n);
            for (size_t i = 0; i < n; i++) {
                volatile float product = a * x[i], sum = before_y[i] + product;
                float fused = fmaf(a, x[i], before_y[i]);
                double want = (double)a * x[i] + before_y[i];
                double bound = UNIT * (fabs((double)a * x[i]) + fabs(want));
                if (HONEST_FLOATS)
                    wrong += dsv3i_bits(y[i]) != dsv3i_bits(sum) && dsv3i_bits(y[i]) != dsv3i_bits(fused);
                wrong += !(fabs((double)y[i] - want) <= bound * 1.01);
            }
            wrong += !same_bits(x, before_x, n);
            touched += guarded_broken(&gx) + guarded_broken(&gy);
        }
    }
    verdict("axpy", wrong);
    verdict("guards of axpy", touched);
}

/* ---- exp_sum: each p to 2 units in the last place of the exponential of the rounded difference (what is below the
 * normal floats may become 0); the sum is that of these p, bit for bit; p may be s */

static void fill_scores(float *s, size_t n, float *top) {
    *top = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        s[i] = test_uniform(-110, 10);
        if (test_random() % 8 == 0) s[i] = -1e30f;
        if (test_random() % 8 == 0) s[i] = -INFINITY;
        if (test_random() % 2 == 0) s[i] = test_uniform(-1, 1);
        if (s[i] > *top) *top = s[i];
    }
    if (!(*top > -INFINITY)) *top = 0;
}

static int exp_sum_wrong(const float *p, const float *s, float top, float sum, size_t n) {
    float want_sum = plain_sum(p, n);
    double exact = 0;
    int wrong = 0;
    for (size_t i = 0; i < n; i++) {
        volatile float difference = s[i] - top;
        double want = exp((double)difference);
        wrong += !(fabs((double)p[i] - want) <= 4 * UNIT * want + FLT_MIN) || !(p[i] >= 0);
        exact += (double)p[i];
    }
    if (HONEST_FLOATS) wrong += !same_bits(&sum, &want_sum, 1);
    return wrong + !(fabs((double)sum - exact) <= ((double)((n + 7) / 8) + 3) * UNIT * exact);
}

static void check_exp_sum(const dsv3_kernels *k) {
    guarded gp, gs;
    int wrong = 0, in_place = 0, touched = 0;
    for (size_t n = 0; n <= MOST; n++) {
        for (size_t offsets = 0; offsets < OFFSETS * OFFSETS; offsets++) {
            float *p = guarded_begin(&gp, offsets % OFFSETS, n), *s = guarded_begin(&gs, offsets / OFFSETS, n);
            float before[MOST + 1], top, sum, again;
            fill_scores(s, n, &top);
            memcpy(before, s, n * sizeof *s);
            sum = k->exp_sum(p, s, top, n);
            wrong += exp_sum_wrong(p, s, top, sum, n) + !same_bits(before, s, n);
            again = k->exp_sum(s, s, top, n);
            in_place += !same_bits(&again, &sum, 1) + !same_bits(s, p, n);
            touched += guarded_broken(&gp) + guarded_broken(&gs);
        }
    }
    verdict("exp_sum", wrong);
    verdict("exp_sum in place", in_place);
    verdict("guards of exp_sum", touched);
}

/* The softmax edges: the largest entry counts exactly 1, whatever else there is. */
static void check_exp_sum_edges(const dsv3_kernels *k) {
    static const float s[6] = {88.8f, -88.8f, 1e38f, -1e38f, 1e38f, -INFINITY};
    float p[6];
    int wrong = 0;
    wrong += k->exp_sum(p, s, 88.8f, 1) != 1.0f || p[0] != 1.0f;
    wrong += k->exp_sum(p, s, 88.8f, 2) != 1.0f || !(p[1] >= 0 && p[1] < 1e-37f);
    wrong +=
        k->exp_sum(p, s, 1e38f, 6) != 2.0f || p[2] != 1.0f || p[4] != 1.0f || p[3] != 0 || p[5] != 0 || p[0] != 0;
    verdict("edges of exp_sum", wrong);
}

/* ---- silu_mul: 8 roundings at most (exp to 2 units, add, divide, multiply); where exp(-a) overflows the result is 0
 * instead of something below 1e-36; h may be a */

static void check_silu_mul(const dsv3_kernels *k) {
    guarded gh, ga, gb;
    int wrong = 0, in_place = 0, touched = 0;
    for (size_t n = 0; n <= MOST; n++) {
        for (size_t offsets = 0; offsets < OFFSETS * OFFSETS; offsets++) {
            float *h = guarded_begin(&gh, offsets % OFFSETS, n), *a = guarded_begin(&ga, offsets / OFFSETS, n);
            float *b = guarded_begin(&gb, (offsets + offsets / OFFSETS) % OFFSETS, n);
            float before_a[MOST + 1], before_b[MOST + 1];
            test_fill(a, n, n % 2 ? -10 : -120, n % 2 ? 10 : 120);
            test_fill(b, n, -3, 3);
            memcpy(before_a, a, n * sizeof *a);
            memcpy(before_b, b, n * sizeof *b);
            k->silu_mul(h, a, b, n);
            for (size_t i = 0; i < n; i++) {
                double want = (double)a[i] / (1 + exp(-(double)a[i])) * (double)b[i];
                wrong += !(fabs((double)h[i] - want) <= 8 * UNIT * fabs(want) + 1e-35);
            }
            wrong += !same_bits(a, before_a, n) + !same_bits(b, before_b, n);
            k->silu_mul(a, a, b, n);
            in_place += !same_bits(a, h, n) + !same_bits(b, before_b, n);
            touched += guarded_broken(&gh) + guarded_broken(&ga) + guarded_broken(&gb);
        }
    }
    verdict("silu_mul", wrong);
    verdict("silu_mul in place", in_place);
    verdict("guards of silu_mul", touched);
}

/* ---- decode: every type, from any byte address; the same numbers as the conversions of chapter 2 */

static float decode_one(dsv3_type type, const unsigned char *bytes) {
    uint16_t half;
    float x;
    switch (type) {
    case DSV3_F16: return memcpy(&half, bytes, 2), dsv3_f32_from_f16(half);
    case DSV3_BF16: return memcpy(&half, bytes, 2), dsv3_f32_from_bf16(half);
    case DSV3_F8_E4M3: return dsv3_f32_from_f8_e4m3(bytes[0]);
    case DSV3_F32: break;
    }
    return memcpy(&x, bytes, 4), x;
}

static void check_decode(const dsv3_kernels *k, dsv3_type type) {
    size_t size = dsv3_type_bytes(type);
    guarded gy;
    int wrong = 0, touched = 0;
    for (size_t n = 0; n <= MOST; n++) {
        for (size_t offsets = 0; offsets < OFFSETS * OFFSETS; offsets++) {
            size_t shift = offsets % OFFSETS;
            float *y = guarded_begin(&gy, offsets / OFFSETS, n);
            unsigned char *memory = (unsigned char *)test_alloc(shift + n * size), *w = memory + shift;
            for (size_t i = 0; i < n * size; i++) w[i] = (unsigned char)(test_random() >> 56);
            k->decode[type](y, w, n);
            for (size_t i = 0; i < n; i++) {
                float want = decode_one(type, w + i * size);
                wrong += isnan(want) ? !isnan(y[i]) : !same_bits(&y[i], &want, 1);
            }
            touched += guarded_broken(&gy);
            free(memory);
        }
    }
    verdict(dsv3_type_name(type), wrong);
    verdict("guards of decode", touched);
}

/* All codes of a small type in one go: rare ones must not get lost in random bytes. */
static void check_decode_all(const dsv3_kernels *k, dsv3_type type) {
    size_t size = dsv3_type_bytes(type), n = size == 1 ? 256 : 65536;
    unsigned char *w = (unsigned char *)test_alloc(n * size);
    float *y = (float *)test_alloc(n * sizeof *y);
    int wrong = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t half = (uint16_t)i;
        if (size == 1) {
            w[i] = (unsigned char)i;
        } else {
            memcpy(w + 2 * i, &half, 2);
        }
    }
    k->decode[type](y, w, n);
    for (size_t i = 0; i < n; i++) {
        float want = decode_one(type, w + i * size);
        wrong += isnan(want) ? !isnan(y[i]) : !same_bits(&y[i], &want, 1);
    }
    verdict("all codes", wrong);
    free(w), free(y);
}

/* ---- one backend, all entries ------------------------------------------------------------------------ */

static void check_backend(const dsv3_context *ctx) {
    const dsv3_kernels *k = &ctx->kernels;
    backend_name = ctx->backend;
    check_dot(k);
    check_dot_tree(k);
    check_axpy(k);
    check_exp_sum(k);
    check_exp_sum_edges(k);
    check_silu_mul(k);
    for (int type = 0; type < DSV3_TYPES; type++) check_decode(k, (dsv3_type)type);
    check_decode_all(k, DSV3_F16);
    check_decode_all(k, DSV3_BF16);
    check_decode_all(k, DSV3_F8_E4M3);
}

static const dsv3_backend backends[] = {DSV3_BACKEND_REFERENCE, DSV3_BACKEND_AUTO};

int main(void) {
    const char *before = "";
    for (size_t i = 0; i < sizeof backends / sizeof backends[0]; i++) {
        dsv3_context ctx;
        dsv3_result result = dsv3_context_init(&ctx, backends[i], 1);
        if (result == DSV3_ERR_UNSUPPORTED && backends[i] > DSV3_BACKEND_REFERENCE)
            continue; /* not on this machine */
        CHECK_EQ(result, DSV3_OK);
        if (strcmp(before, ctx.backend) == 0) continue; /* AUTO chose the one before */
        before = ctx.backend;
        for (size_t g = 0; g < 2; g++) {
            guard_bits = guards[g];
            test_state = 1;
            check_backend(&ctx);
        }
    }
    return test_done("kernels");
}
