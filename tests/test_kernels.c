/* test_kernels.c -- chapters 3 (kernels) and A (SIMD): every entry of dsv3_kernels, for every backend compiled in.
 *
 * Each entry runs for n = 0..67 from several alignments, between guard values: a failure means that a kernel
 * reads or writes outside its arrays, forgets a tail, is less exact than its order of summation allows, or computes
 * an element in another way than the same element elsewhere -- then results change with the shape of a call.
 *
 * Of the reference the documented order of summation is proved, to the bit. Of the other backends what chapter A
 * promises: sums with one partial sum per lane, to their bound; tiles that have the bits of their dots; outer in the
 * order of its terms, to the bit.
 *
 * check_backend tests one context, whatever its backend: all that are compiled in and run here. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"
#include <float.h>

#define MOST 67 /* longest array: eight lanes of eight, and a ragged tail */
#define OFFSETS 4
#define GUARD 16             /* values on either side */
#define UNIT ldexp(1.0, -24) /* rounding error of one float operation, relative */

static const char *backend_name = "";
static int is_reference; /* the one whose order of summation is documented */
static size_t lanes,
    depth; /* partial sums of the backend under test, and the additions on the way through its tree */

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

/* ---- tables: rows of numbers that lie ld apart, with gaps where ld > cols. Those to read are filled with NaN, gaps
 * too, and end with their last number, so that AddressSanitizer sees what reads on; those to write lie between guards,
 * and so do their rows. */

typedef struct table {
    float *memory, *x; /* x: row 0 */
    size_t cells, offset, rows, cols, ld;
} table;

static float *table_make(table *m, size_t before, size_t after, size_t rows, size_t cols, uint32_t bits) {
    m->rows = rows, m->cols = cols, m->ld = cols + test_random() % 4;
    m->offset = before + test_random() % OFFSETS;
    m->cells = m->offset + (rows == 0 ? 0 : (rows - 1) * m->ld + cols) + after;
    m->memory = (float *)test_alloc(m->cells * sizeof(float));
    m->x = m->memory + m->offset;
    for (size_t i = 0; i < m->cells; i++) m->memory[i] = dsv3i_float(bits);
    return m->x;
}

static float *table_input(table *m, size_t rows, size_t cols) { return table_make(m, 0, 0, rows, cols, 0x7FC00000u); }

static float *table_output(table *m, size_t rows, size_t cols) {
    return table_make(m, GUARD, GUARD + 3 * (cols + 3), rows, cols, guard_bits); /* three rows that are not there */
}

/* Cells outside of all rows that are not as they were. */
static int table_broken(const table *m) {
    size_t ld = m->ld > 0 ? m->ld : 1;
    int bad = 0;
    for (size_t i = 0; i < m->cells; i++) {
        size_t at = i - m->offset;
        int inside = i >= m->offset && at / ld < m->rows && at % ld < m->cols;
        bad += !inside && dsv3i_bits(m->memory[i]) != guard_bits;
    }
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

/* Values for a comparison of bits. The SIMD backends say which products they fuse; the reference leaves it to the
 * compiler and gets values that make no difference. */
static void fill_terms(float *x, size_t n) {
    if (is_reference) {
        fill_short(x, n);
    } else {
        fill_wild(x, n);
    }
}

static void table_fill(table *m) {
    for (size_t r = 0; r < m->rows; r++) fill_terms(m->x + r * m->ld, m->cols);
}

/* ---- the documented order of summation of the reference, once more and as plainly as possible */

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

/* ---- dot: |error| <= (ceil(n/lanes) + log2(lanes) + 1) 2^-24 sum |x_i y_i|: one rounding of the product, at most
 * ceil(n/lanes) additions in a partial sum, log2(lanes) in the tree. A backend has one partial sum per lane, 8 of them
 * or 16 (avx512); the reference has 8. The bound does not depend on the order of the lanes in the tree, and fused
 * products only make it wider than need be. */

/* Bound of the additions in a sum of n terms, relative to the sum of their sizes. */
static double sum_bound(size_t n) { return (double)((n + lanes - 1) / lanes + depth) * UNIT; }

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
            inexact += !(fabs((double)got - sum) <= (sum_bound(n) + UNIT) * size);
            fill_short(x, n);
            fill_short(y, n);
            got = k->dot(x, y, n), want = plain_dot(x, y, n);
            order += !same_bits(&got, &want, 1);
            touched += guarded_broken(&gx) + guarded_broken(&gy);
        }
    }
    verdict("exactness of dot", inexact);
    verdict("guards of dot", touched);
    if (HONEST_FLOATS && is_reference) verdict("order of summation of dot", order);
}

/* For the reference. Sums whose every other order gives another result: large terms that cancel in just one place. */
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
    if (HONEST_FLOATS && is_reference) verdict("tree of dot", bad);
}

/* ---- axpy: one multiply and one add, exact to both roundings; the SIMD backends fuse them always, the reference where
 * the compiler likes to */

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
                int is_sum = is_reference && dsv3i_bits(y[i]) == dsv3i_bits(sum);
                if (HONEST_FLOATS) wrong += !is_sum && dsv3i_bits(y[i]) != dsv3i_bits(fused);
                wrong += !(fabs((double)y[i] - want) <= bound * 1.01);
            }
            wrong += !same_bits(x, before_x, n);
            touched += guarded_broken(&gx) + guarded_broken(&gy);
        }
    }
    verdict("axpy", wrong);
    verdict("guards of axpy", touched);
}

/* ---- exp_sum: each p to 2 units in the last place of the exponential of the rounded difference, those below the
 * normal floats too (the reference's are those of the C library, which may make them 0); each p the same bits as in a
 * call of its own; the sum is that of these p, in the reference bit for bit, else to the bound of a sum; p may be s */

/* |got - want| in units of the last place of want; what overflows counts as 2^128. */
static double ulps(float got, double want) {
    double end = ldexp(1, 128), x = (double)got < end ? (double)got : isnan(got) ? (double)got : end;
    int exponent;
    want = want < end ? want : end;
    (void)frexp(want, &exponent);
    return fabs(x - want) / ldexp(1, want < (double)FLT_MIN ? -149 : exponent - 24);
}

static int exp_wrong(float p, float difference) {
    double want = exp((double)difference);
    if (is_reference && want < (double)FLT_MIN && dsv3i_bits(p) == 0) return 0;
    return !(ulps(p, want) <= 2) || !(p >= 0);
}

/* From where exp is 0 to where it is infinite, in steps without a pattern. */
static void check_exp(const dsv3_kernels *k) {
    float s[256], p[256], low = -104;
    int wrong = 0;
    while (low < 89) {
        for (size_t i = 0; i < 256; i++) s[i] = low, low += test_uniform(0, 0.003f);
        (void)k->exp_sum(p, s, 0, 256);
        for (size_t i = 0; i < 256; i++) wrong += exp_wrong(p[i], s[i]);
    }
    verdict("sweep of exp", wrong);
}

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
        wrong += exp_wrong(p[i], difference);
        exact += (double)p[i];
    }
    if (HONEST_FLOATS && is_reference) wrong += !same_bits(&sum, &want_sum, 1);
    return wrong + !(fabs((double)sum - exact) <= sum_bound(n) * exact);
}

/* Elements that are not those of a call of their own. */
static int exp_unlike(const dsv3_kernels *k, const float *p, const float *s, float top, size_t n) {
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        float alone, sum = k->exp_sum(&alone, s + i, top, 1);
        bad += !same_bits(&alone, p + i, 1) || !same_bits(&alone, &sum, 1);
    }
    return bad;
}

static void check_exp_sum(const dsv3_kernels *k) {
    guarded gp, gs;
    int wrong = 0, unlike = 0, in_place = 0, touched = 0;
    for (size_t n = 0; n <= MOST; n++) {
        for (size_t offsets = 0; offsets < OFFSETS * OFFSETS; offsets++) {
            float *p = guarded_begin(&gp, offsets % OFFSETS, n), *s = guarded_begin(&gs, offsets / OFFSETS, n);
            float before[MOST + 1], top, sum, again;
            fill_scores(s, n, &top);
            memcpy(before, s, n * sizeof *s);
            sum = k->exp_sum(p, s, top, n);
            wrong += exp_sum_wrong(p, s, top, sum, n) + !same_bits(before, s, n);
            unlike += exp_unlike(k, p, s, top, n);
            again = k->exp_sum(s, s, top, n);
            in_place += !same_bits(&again, &sum, 1) + !same_bits(s, p, n);
            touched += guarded_broken(&gp) + guarded_broken(&gs);
        }
    }
    verdict("exp_sum", wrong);
    verdict("elements alone of exp_sum", unlike);
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

/* NaN stays NaN, and with its neighbours nothing happens; the sum is NaN, too. */
static void check_exp_sum_nan(const dsv3_kernels *k) {
    float s[MOST], p[MOST], want[MOST];
    int wrong = 0;
    test_fill(s, MOST, -20, 0);
    (void)k->exp_sum(want, s, 0, MOST);
    for (size_t at = 0; at < MOST; at++) {
        float before = s[at], sum;
        s[at] = dsv3i_float(0x7FC00000u);
        sum = k->exp_sum(p, s, 0, MOST);
        wrong += !isnan(sum) || !isnan(p[at]) || !same_bits(p, want, at);
        wrong += !same_bits(p + at + 1, want + at + 1, MOST - 1 - at);
        s[at] = before;
    }
    verdict("NaN in exp_sum", wrong);
}

/* ---- silu_mul: 8 roundings at most (exp to 2 units, add, divide, multiply); where exp(-a) overflows the result is 0
 * instead of something below 1e-36; each element has the bits that it has in a call of its own; h may be a */

static int silu_unlike(const dsv3_kernels *k, const float *h, const float *a, const float *b, size_t n) {
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        float alone;
        k->silu_mul(&alone, a + i, b + i, 1);
        bad += !same_bits(&alone, h + i, 1);
    }
    return bad;
}

static void check_silu_mul(const dsv3_kernels *k) {
    guarded gh, ga, gb;
    int wrong = 0, unlike = 0, in_place = 0, touched = 0;
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
            unlike += silu_unlike(k, h, a, b, n);
            k->silu_mul(a, a, b, n);
            in_place += !same_bits(a, h, n) + !same_bits(b, before_b, n);
            touched += guarded_broken(&gh) + guarded_broken(&ga) + guarded_broken(&gb);
        }
    }
    verdict("silu_mul", wrong);
    verdict("elements alone of silu_mul", unlike);
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
    case DSV3_Q8_0:
    case DSV3_Q4_0: /* decode_element */
    case DSV3_F32: break;
    }
    return memcpy(&x, bytes, 4), x;
}

/* Element i of what lies at w. */
static float decode_element(dsv3_type type, const unsigned char *w, size_t i) {
    size_t size = dsv3_type_bytes(type);
    const unsigned char *block = w + i / DSV3_QBLOCK * size;
    uint16_t half;
    if (dsv3_type_block(type) == 1) return decode_one(type, w + i * size);
    memcpy(&half, block, 2);
    i %= DSV3_QBLOCK;
    if (type == DSV3_Q8_0) return dsv3_f32_from_f16(half) * (float)(block[2 + i] - (block[2 + i] < 128 ? 0 : 256));
    return dsv3_f32_from_f16(half) * (float)((i < 16 ? block[2 + i] % 16 : block[2 + i % 16] / 16) - 8);
}

static void check_decode(const dsv3_kernels *k, dsv3_type type) {
    size_t block = dsv3_type_block(type);
    guarded gy;
    int wrong = 0, touched = 0;
    for (size_t n = 0; n <= MOST; n += block) {
        size_t bytes = dsv3_row_bytes(type, n);
        for (size_t offsets = 0; offsets < OFFSETS * OFFSETS; offsets++) {
            size_t shift = offsets % OFFSETS;
            float *y = guarded_begin(&gy, offsets / OFFSETS, n);
            unsigned char *memory = (unsigned char *)test_alloc(shift + bytes), *w = memory + shift;
            for (size_t i = 0; i < bytes; i++) w[i] = (unsigned char)(test_random() >> 56);
            k->decode[type](y, w, n);
            for (size_t i = 0; i < n; i++) {
                float want = decode_element(type, w, i);
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
static void check_decode_all(const dsv3_kernels *k, dsv3_type type, size_t shift) {
    size_t size = dsv3_type_bytes(type), n = size == 1 ? 256 : 65536;
    unsigned char *memory = (unsigned char *)test_alloc(shift + n * size), *w = memory + shift;
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
    free(memory), free(y);
}

/* ---- tile: every dot of it has the bits that the backend's dot of the two rows has, the weights decoded and times the
 * scale of their block of 128 columns, whatever the size of the tile; so the bound of dot holds, with one more rounding
 * where a weight is multiplied with its scale. (Products below the normal floats add 2^-150 each.) Rows of weights lie
 * at any byte, F32 at multiples of 4: chapter 4 decodes those that do not. */

#define TILE_X 9
#define TILE_W 33
#define TILE_K 300
#define TILE_BLOCKS ((TILE_K + DSV3_BLOCK - 1) / DSV3_BLOCK)

typedef struct weights {
    dsv3_type type;
    unsigned char *memory, *w;                /* from any byte; gaps between rows are NaN in each type */
    unsigned char scale[1 + 4 * TILE_BLOCKS]; /* from byte 1 on, so never aligned */
    size_t rows, cols, ld;
    int scaled;
    float *decoded, *row; /* [rows, cols]: the codes alone, and times their scale */
} weights;

/* A finite code, sizes mixed; now and then one below the normal numbers, or a zero of either sign. */
static void random_code(dsv3_type type, unsigned char *w) {
    uint32_t bits = (uint32_t)(test_random() >> 32);
    int small = test_random() % 16 == 0;
    uint16_t half = (uint16_t)bits;
    float x;
    switch (type) {
    case DSV3_F16:
        if ((half & 0x7C00u) == 0x7C00u) half = (uint16_t)(half & 0xBFFFu);
        if (small) half = (uint16_t)(half & 0x83FFu);
        break;
    case DSV3_BF16: half = (uint16_t)((bits & 0x807Fu) | (small ? 0u : (121u + (bits >> 16) % 13u) << 7)); break;
    case DSV3_F8_E4M3: w[0] = (unsigned char)((bits & 0x7Fu) == 0x7Fu ? bits & 0x80u : bits); return;
    case DSV3_Q8_0:
    case DSV3_Q4_0: return; /* blocks have no code of one number */
    case DSV3_F32:
        fill_terms(&x, 1);
        if (small) x = dsv3i_float(bits & (bits & 0x100u ? 0x807C0000u : 0x80000000u));
        memcpy(w, &x, 4);
        return;
    }
    memcpy(w, &half, 2);
}

static void weights_decode(weights *m, const dsv3_kernels *k) {
    size_t size = dsv3_type_bytes(m->type);
    for (size_t r = 0; r < m->rows; r++) {
        float *decoded = m->decoded + r * m->cols, *row = m->row + r * m->cols;
        k->decode[m->type](decoded, m->w + r * m->ld * size, m->cols);
        for (size_t i = 0; i < m->cols; i++) {
            float scale;
            memcpy(&scale, m->scale + 1 + i / DSV3_BLOCK * sizeof scale, sizeof scale);
            row[i] = m->scaled ? decoded[i] * scale : decoded[i];
        }
    }
}

static void weights_make(weights *m, const dsv3_kernels *k, dsv3_type type, size_t rows, size_t cols, int scaled) {
    size_t size = dsv3_type_bytes(type), shift = test_random() % 8, bytes;
    m->type = type, m->rows = rows, m->cols = cols, m->ld = cols + test_random() % 4, m->scaled = scaled;
    if (type == DSV3_F32) shift &= 4;
    bytes = rows == 0 ? 0 : ((rows - 1) * m->ld + cols) * size;
    m->memory = (unsigned char *)test_alloc(shift + bytes);
    m->w = m->memory + shift;
    memset(m->memory, 0xFF, shift + bytes);
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < cols; i++) random_code(type, m->w + (r * m->ld + i) * size);
    }
    for (size_t b = 0; b < TILE_BLOCKS; b++) {
        float scale = test_uniform(0.5f, 2) * (b % 2 ? 0.25f : 2.0f);
        memcpy(m->scale + 1 + b * sizeof scale, &scale, sizeof scale);
    }
    m->decoded = (float *)test_alloc(rows * cols * sizeof(float));
    m->row = (float *)test_alloc(rows * cols * sizeof(float));
    weights_decode(m, k);
}

static void weights_free(weights *m) { free(m->memory), free(m->decoded), free(m->row); }

static void tile_run(const dsv3_kernels *k, table *y, const table *x, const weights *w) {
    k->tile[w->type](y->x, y->ld, x->x, x->ld, x->rows, w->w, w->ld, w->scaled ? w->scale + 1 : NULL, w->rows,
                     w->cols);
}

/* The dot of x and row r of the weights in double: is got within the bound? */
static int tile_exact(float got, const float *x, const weights *w, size_t r) {
    const float *decoded = w->decoded + r * w->cols;
    double sum = 0, size = 0;
    for (size_t b = 0; b < w->cols; b += DSV3_BLOCK) {
        size_t end = w->cols < b + DSV3_BLOCK ? w->cols : b + DSV3_BLOCK;
        double part = 0, part_size = 0;
        float scale = 1;
        if (w->scaled) memcpy(&scale, w->scale + 1 + b / DSV3_BLOCK * sizeof scale, sizeof scale);
        for (size_t i = b; i < end; i++) {
            double term = (double)x[i] * (double)decoded[i];
            part += term, part_size += fabs(term);
        }
        sum += part * (double)scale, size += part_size * (double)scale;
    }
    return fabs((double)got - sum) <=
           (sum_bound(w->cols) + (w->scaled ? 2 : 1) * UNIT) * size + (double)w->cols * ldexp(1, -149);
}

typedef struct tile_faults {
    int bits, inexact, touched;
} tile_faults;

static void check_tile_shape(const dsv3_kernels *k, tile_faults *bad, dsv3_type type, size_t nx, size_t nw, size_t n,
                             int scaled) {
    table x, y;
    weights w;
    table_input(&x, nx, n);
    table_fill(&x);
    table_output(&y, nx, nw);
    weights_make(&w, k, type, nw, n, scaled);
    tile_run(k, &y, &x, &w);
    for (size_t t = 0; t < nx; t++) {
        for (size_t r = 0; r < nw; r++) {
            float got = y.x[t * y.ld + r], want = k->dot(x.x + t * x.ld, w.row + r * n, n);
            bad->bits += !same_bits(&got, &want, 1);
            bad->inexact += !tile_exact(got, x.x + t * x.ld, &w, r);
        }
    }
    bad->touched += table_broken(&y);
    weights_free(&w), free(x.memory), free(y.memory);
}

/* All heights and widths meet all short lengths, shared out between the guards: half of the cases with each. Of the
 * long ones each meets a third of the shapes. */
static void check_tile(const dsv3_kernels *k, dsv3_type type) {
    static const size_t widths[13] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, TILE_W};
    static const size_t longer[9] = {127, 128, 129, 130, 131, 255, 256, 257, TILE_K};
    tile_faults bad = {0, 0, 0};
    for (size_t length = 0; length <= MOST + 9; length++) {
        size_t n = length <= MOST ? length : longer[length - MOST - 1];
        for (size_t shape = 0; shape < (TILE_X + 1) * 13; shape++) {
            int scaled = type == DSV3_F8_E4M3 && (length + shape / 2) % 3 != 0;
            size_t turn = length + shape + (guard_bits == guards[0]);
            if (turn % (length <= MOST ? 2 : 6) != 0) continue;
            check_tile_shape(k, &bad, type, shape / 13, widths[shape % 13], n, scaled);
        }
    }
    if (HONEST_FLOATS) verdict("bits of tile", bad.bits);
    verdict("exactness of tile", bad.inexact);
    verdict("guards of tile", bad.touched);
}

/* Infinities and NaNs, 0 where the type has no more of them. */
static const uint32_t special_codes[DSV3_TYPES][4] = {{0x7F800000u, 0xFF800000u, 0x7FC00000u, 0xFFC12345u},
                                                      {0x7C00u, 0xFC00u, 0x7E00u, 0xFD01u},
                                                      {0x7F80u, 0xFF80u, 0x7FC0u, 0xFFC1u},
                                                      {0x7Fu, 0xFFu, 0, 0}};

static void put_code(dsv3_type type, unsigned char *w, uint32_t code) {
    uint16_t half = (uint16_t)code;
    unsigned char byte = (unsigned char)code;
    if (type == DSV3_F32) {
        memcpy(w, &code, 4);
    } else if (type == DSV3_F8_E4M3) {
        memcpy(w, &byte, 1);
    } else {
        memcpy(w, &half, 2);
    }
}

/* One such code among positive terms: the dots of its row are what it is, and all others have the bits of before. */
static int tile_special_wrong(const dsv3_kernels *k, const table *x, weights *w, const table *clean, size_t r,
                              size_t at, uint32_t code) {
    unsigned char *place = w->w + (r * w->ld + at) * dsv3_type_bytes(w->type), before[4];
    float want;
    table y;
    int bad = 0;
    memcpy(before, place, dsv3_type_bytes(w->type));
    put_code(w->type, place, code);
    want = decode_one(w->type, place);
    table_output(&y, x->rows, w->rows);
    tile_run(k, &y, x, w);
    for (size_t t = 0; t < x->rows; t++) {
        for (size_t i = 0; i < w->rows; i++) {
            float got = y.x[t * y.ld + i];
            if (i != r) bad += !same_bits(&got, clean->x + t * clean->ld + i, 1);
            if (i == r) bad += isnan(want) ? !isnan(got) : dsv3i_bits(got) != dsv3i_bits(want);
        }
    }
    memcpy(place, before, dsv3_type_bytes(w->type));
    free(y.memory);
    return bad;
}

static void check_tile_special(const dsv3_kernels *k, dsv3_type type) {
    static const size_t lengths[7] = {1, 7, 8, 9, 17, 35, 131};
    int bad = 0;
    for (size_t length = 0; length < 7; length++) {
        size_t n = lengths[length];
        table x, clean;
        weights w;
        table_input(&x, 5, n);
        for (size_t t = 0; t < 5; t++) test_fill(x.x + t * x.ld, n, 1, 2);
        table_output(&clean, 5, 7);
        weights_make(&w, k, type, 7, n, type == DSV3_F8_E4M3 && length % 2);
        tile_run(k, &clean, &x, &w);
        for (size_t at = 0; at < 4 * n; at++) {
            uint32_t code = special_codes[type][at / n];
            if (code != 0) bad += tile_special_wrong(k, &x, &w, &clean, at % 7, at % n, code);
        }
        weights_free(&w), free(x.memory), free(clean.memory);
    }
    verdict("NaN and infinity in tile", bad);
}

/* ---- outer: for each element alone, the terms in the order of j, whatever rows and columns share the call. The
 * reference has the bits of so many calls of axpy, the SIMD backends those of fused multiply-adds. */

static void plain_outer(const dsv3_kernels *k, table *y, const table *a, int turned, const table *b) {
    for (size_t j = 0; j < b->rows; j++) {
        for (size_t t = 0; t < y->rows; t++) {
            float *to = y->x + t * y->ld, f = turned ? a->x[j * a->ld + t] : a->x[t * a->ld + j];
            const float *from = b->x + j * b->ld;
            if (is_reference) k->axpy(to, f, from, y->cols);
            for (size_t i = 0; !is_reference && i < y->cols; i++) to[i] = fmaf(f, from[i], to[i]);
        }
    }
}

typedef struct outer_faults {
    int bits, touched;
} outer_faults;

/* y [m, n] += a [m, k] b [k, n]; turned: a lies as [k, m]. */
static void check_outer_shape(const dsv3_kernels *kernels, outer_faults *bad, size_t m, size_t k, size_t n,
                              int turned) {
    table y, a, b, want;
    table_output(&y, m, n), table_output(&want, m, n);
    table_input(&a, turned ? k : m, turned ? m : k), table_input(&b, k, n);
    table_fill(&y), table_fill(&a), table_fill(&b);
    for (size_t t = 0; t < m; t++) memcpy(want.x + t * want.ld, y.x + t * y.ld, n * sizeof(float));
    kernels->outer(y.x, y.ld, m, a.x, turned ? 1 : a.ld, turned ? a.ld : 1, b.x, b.ld, k, n);
    plain_outer(kernels, &want, &a, turned, &b);
    for (size_t t = 0; t < m; t++) bad->bits += !same_bits(y.x + t * y.ld, want.x + t * want.ld, n);
    bad->touched += table_broken(&y);
    free(y.memory), free(want.memory), free(a.memory), free(b.memory);
}

/* All heights and widths meet all short sums; the long ones take turns. Half of the cases with each guard. */
static void check_outer(const dsv3_kernels *kernels) {
    static const size_t longer[4] = {255, 256, 257, 300};
    outer_faults bad = {0, 0};
    for (size_t m = 0; m <= 9; m++) {
        for (size_t n = 0; n <= MOST; n++) {
            size_t half = guard_bits == guards[0];
            for (size_t k = (m + n + half) % 2; k <= 9; k += 2) {
                check_outer_shape(kernels, &bad, m, k, n, (int)(test_random() % 2));
            }
            if ((m + n + half) % 3 != 0) continue;
            check_outer_shape(kernels, &bad, m, longer[(m + n / 3) % 4], n, (int)(test_random() % 2));
        }
    }
    if (HONEST_FLOATS) verdict("bits of outer", bad.bits);
    verdict("guards of outer", bad.touched);
}

/* ---- names: each backend has one, by which it is found, and there are no others */

static void check_backend_names(void) {
    static const char *const wrong[7] = {"", "nonsense", "avx", "avx21", "Reference", "reference ", "5"};
    dsv3_backend found;
    for (int i = 0; i < DSV3_BACKENDS; i++) {
        const char *name = dsv3_backend_name((dsv3_backend)i);
        found = (dsv3_backend)((i + 1) % DSV3_BACKENDS);
        CHECK(name != NULL);
        if (name == NULL) continue;
        CHECK_EQ(dsv3_backend_find(&found, name), DSV3_OK);
        CHECK_EQ(found, i);
    }
    for (size_t i = 0; i < 7; i++) CHECK_EQ(dsv3_backend_find(&found, wrong[i]), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_backend_find(NULL, "reference"), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_backend_find(&found, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_backend_find(NULL, NULL), DSV3_ERR_ARG);
    CHECK(dsv3_backend_name((dsv3_backend)99) == NULL);
    CHECK(dsv3_backend_name((dsv3_backend)DSV3_BACKENDS) == NULL);
}

/* ---- one backend, all entries ------------------------------------------------------------------------ */

static void check_backend(const dsv3_context *ctx) {
    const dsv3_kernels *k = &ctx->kernels;
    backend_name = ctx->backend;
    is_reference = strcmp(backend_name, "reference") == 0;
    lanes = strcmp(backend_name, "avx512") == 0 ? 16 : 8;
    depth = lanes == 16 ? 4 : 3;
    check_dot(k);
    check_dot_tree(k);
    check_axpy(k);
    check_exp(k);
    check_exp_sum(k);
    check_exp_sum_edges(k);
    check_exp_sum_nan(k);
    check_silu_mul(k);
    for (int type = 0; type < DSV3_TYPES; type++) check_decode(k, (dsv3_type)type);
    for (size_t shift = 0; shift < 3; shift++) {
        check_decode_all(k, DSV3_F16, shift);
        check_decode_all(k, DSV3_BF16, shift);
        check_decode_all(k, DSV3_F8_E4M3, shift);
    }
    CHECK(k->tile[DSV3_F32] != NULL);
    for (int type = 0; type < DSV3_TYPES; type++) {
        if (k->tile[type] == NULL) continue; /* decoded first */
        check_tile(k, (dsv3_type)type);
        check_tile_special(k, (dsv3_type)type);
    }
    check_outer(k);
}

int main(void) {
    check_backend_names();
    for (int i = DSV3_BACKEND_REFERENCE; i < DSV3_BACKENDS; i++) {
        dsv3_context ctx;
        dsv3_result result = dsv3_context_init(&ctx, (dsv3_backend)i, 1);
        if (result == DSV3_ERR_UNSUPPORTED && i > DSV3_BACKEND_REFERENCE) continue; /* not on this machine */
        CHECK_EQ(result, DSV3_OK);
        CHECK(strcmp(ctx.backend, dsv3_backend_name((dsv3_backend)i)) == 0);
        for (size_t g = 0; g < 2; g++) {
            guard_bits = guards[g];
            test_state = 1;
            check_backend(&ctx);
        }
    }
    return test_done("kernels");
}
