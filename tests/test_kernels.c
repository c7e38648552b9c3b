/* test_kernels.c -- chapter 3 (formats, vectors) and chapter A: what the ops of each backend are made of. Of every
 * backend its decoders and vectors, which stand in the table of ops; of every instruction set its kernels.
 *
 * Each entry runs for n = 0..67 from several alignments, between guard values: a failure means that a kernel
 * reads or writes outside its arrays, forgets a tail, is less exact than its order of summation allows, or computes
 * an element in another way than the same element elsewhere -- then results change with the shape of a call.
 *
 * Of the plain vectors the documented order of summation is proved, to the bit. (The ops of the reference themselves
 * are compared in test_ops.c, test_mla.c, test_moe.c and test_ops_table.c.) Of the other backends what chapter A
 * promises: sums with one partial sum per lane, to their bound; tiles that have the bits of their dots; outer in the
 * order of its terms, to the bit; panels exactly; products with panels to the bound of a chain of additions, each output
 * with the bits that it has alone.
 *
 * check_backend tests one context, whatever its backend: all that are compiled in and run here. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"
#include <float.h>
#include <sys/mman.h>
#include <unistd.h>

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

/* Values of very different sizes, so that the order of a sum shows in its bits. */
static void fill_wild(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = ldexpf(test_uniform(-1, 1), (int)test_below(13) - 6);
}

/* Such values with 11 significant bits: their products are exact floats. Compilers and backends may fuse a product
 * with the addition that follows (-ffp-contract), and gcc does so here and there within one loop; with these
 * values it makes no difference, and what is left to see is the order of the additions. */
static void fill_short(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        x[i] = ldexpf((float)((int)test_below(4095) - 2047), (int)test_below(13) - 17);
    }
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

static void check_dot(const dsv3i_ops *k) {
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
static void check_dot_tree(const dsv3i_ops *k) {
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

static void check_axpy(const dsv3i_ops *k) {
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
static void check_exp(const dsv3i_ops *k) {
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
        if (test_below(8) == 0) s[i] = -1e30f;
        if (test_below(8) == 0) s[i] = -INFINITY;
        if (test_below(2) == 0) s[i] = test_uniform(-1, 1);
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
static int exp_unlike(const dsv3i_ops *k, const float *p, const float *s, float top, size_t n) {
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        float alone, sum = k->exp_sum(&alone, s + i, top, 1);
        bad += !same_bits(&alone, p + i, 1) || !same_bits(&alone, &sum, 1);
    }
    return bad;
}

static void check_exp_sum(const dsv3i_ops *k) {
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
static void check_exp_sum_edges(const dsv3i_ops *k) {
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
static void check_exp_sum_nan(const dsv3i_ops *k) {
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

static int silu_unlike(const dsv3i_ops *k, const float *h, const float *a, const float *b, size_t n) {
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        float alone;
        k->silu_mul(&alone, a + i, b + i, 1);
        bad += !same_bits(&alone, h + i, 1);
    }
    return bad;
}

static void check_silu_mul(const dsv3i_ops *k) {
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

/* ---- decode: every type, from any byte address; the same numbers as the conversions of chapter 3 */

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

static void check_decode(const dsv3i_ops *k, dsv3_type type) {
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
static void check_decode_all(const dsv3i_ops *k, dsv3_type type, size_t shift) {
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

/* ---- bytes between guards, for panels and what is rounded. Behind those to read is a page that nobody can. */

typedef struct box {
    unsigned char *memory, *at;
    size_t before, bytes, after, locked; /* locked: bytes of that page */
} box;

static unsigned char *box_make(box *b, size_t before, size_t bytes, size_t after, size_t locked) {
    void *memory = NULL;
    b->before = before, b->bytes = bytes, b->after = after, b->locked = locked;
    if (posix_memalign(&memory, locked ? locked : 64, before + bytes + after + locked) != 0) exit(2);
    b->memory = (unsigned char *)memory;
    b->at = b->memory + before;
    memset(b->memory, (unsigned char)guard_bits, before + bytes + after);
    if (locked && mprotect(b->at + bytes + after, locked, PROT_NONE) != 0) exit(2);
    return b->at;
}

static unsigned char *box_input(box *b, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return box_make(b, (page - bytes % page) % page, bytes, 0, page);
}

/* It begins `offset` past a 64-byte boundary. */
static unsigned char *box_output(box *b, size_t offset, size_t bytes) {
    return box_make(b, 64 + offset, bytes, 192, 0);
}

static void box_free(box *b) {
    if (b->locked && mprotect(b->at + b->bytes + b->after, b->locked, PROT_READ | PROT_WRITE) != 0) exit(2);
    free(b->memory);
}

static int box_broken(const box *b) {
    unsigned char guard = (unsigned char)guard_bits;
    int bad = 0;
    for (size_t i = 0; i < b->before; i++) bad += b->memory[i] != guard;
    for (size_t i = 0; i < b->after; i++) bad += b->at[b->bytes + i] != guard;
    return bad;
}

static size_t up(size_t n, size_t step) { return (n + step - 1) / step * step; }

static int same_float(float a, float b) { return isnan(b) ? isnan(a) : dsv3i_bits(a) == dsv3i_bits(b); }

/* ---- round. BF16: to the nearest, ties to even, NaN stays NaN; numbers below 2^-126 may become 0; as codes filled up
 * with zeros to a multiple of four. Blocks of 32: unit = top / 127 for the largest magnitude top, the whole number
 * nearest to x (127 / top), all in float; nothing but zeros where top < 10^-30, NaN for the whole block where something is
 * not finite; with the bytes, -8 times their sum. */

static int round_bf16_wrong(const float *x, const unsigned char *out, size_t k, int codes) {
    int bad = 0;
    for (size_t i = 0; i < (codes ? up(k, 4) : k); i++) {
        float got, want = i < k ? dsv3_f32_from_bf16(dsv3_bf16_from_f32(x[i])) : 0;
        uint16_t half;
        if (codes) {
            memcpy(&half, out + 2 * i, 2);
            got = dsv3_f32_from_bf16(half);
        } else {
            memcpy(&got, out + 4 * i, 4);
        }
        if (i < k && fabsf(x[i]) < FLT_MIN && dsv3i_bits(got) == (dsv3i_bits(x[i]) & 0x80000000u)) continue;
        bad += !same_float(got, want);
    }
    return bad;
}

static int round_bytes_wrong(const float *x, const unsigned char *out, int codes) {
    volatile float top = 0, unit, inverse, scaled;
    int finite = 1, bad = 0;
    int32_t sum = 0, got_sum;
    float got_unit;
    for (size_t i = 0; i < 32; i++) {
        finite &= isfinite(x[i]) != 0;
        if (fabsf(x[i]) > top) top = fabsf(x[i]);
    }
    if (top < 1e-30f) top = 0;
    unit = top / 127.0f;
    inverse = top > 0 ? 127.0f / top : 0;
    memcpy(&got_unit, out + 32, 4), memcpy(&got_sum, out + 36, 4);
    if (codes && !finite) return !isnan(got_unit);
    if (codes) bad += dsv3i_bits(got_unit) != dsv3i_bits(unit);
    for (size_t i = 0; i < 32; i++) {
        int q;
        if (!finite) {
            float y;
            memcpy(&y, out + 4 * i, 4);
            bad += !isnan(y);
            continue;
        }
        scaled = x[i] * inverse;
        q = (int)nearbyintf(scaled);
        sum -= 8 * q;
        if (codes) {
            bad += out[i] != (unsigned char)q;
        } else {
            volatile float want = unit * (float)q;
            float y;
            memcpy(&y, out + 4 * i, 4);
            bad += dsv3i_bits(y) != dsv3i_bits(want) && !(y == 0 && want == 0);
        }
        bad += finite && !(fabs((double)q * (double)unit - (double)x[i]) <= 0.501 * (double)unit + 1e-30);
    }
    return bad + (codes && got_sum != sum);
}

static void fill_activations(float *x, size_t k) {
    static const uint32_t special[6] = {0x7F800000u, 0xFF800000u, 0x7FC00000u, 0xFFC12345u, 0x7F7FFFFFu, 0x80000001u};
    int size = (int)test_below(300) - 149; /* blocks of any size */
    if (test_below(4)) size = 0;
    for (size_t i = 0; i < k; i++) {
        x[i] = ldexpf(test_uniform(-1, 1), size < 128 ? size : 127);
        if (test_below(8) == 0)
            x[i] = dsv3i_float((dsv3i_bits(x[i]) & 0xFFFF0000u) | 0x8000u); /* a tie of BF16 */
        if (test_below(512) == 0) x[i] = dsv3i_float(special[test_below(6)]);
    }
    if (k >= 32 && test_below(4) == 0) { /* ties of whole numbers */
        x[test_below(k)] = 127;
        for (size_t i = 0; i < k; i++)
            x[i] = fabsf(x[i]) < 127 ? (float)((int)test_below(253) - 126) + 0.5f : x[i];
    }
}

/* codes: out is what fast products take, not numbers. */
static void check_round(void (*round)(void *out, const float *x, size_t k), dsv3_type type, int codes) {
    int wrong = 0, touched = 0, blocks = dsv3_type_block(type) > 1;
    size_t block = dsv3_type_block(type);
    for (size_t k = block; k <= 260; k += block) {
        for (size_t again = 0; again < (blocks ? 64 : 4); again++) {
            size_t bytes = !codes ? 4 * k : blocks ? k / 32 * 40 : up(k, 4) * 2;
            box x, out;
            box_input(&x, 4 * k), box_output(&out, 4 * test_below(16), bytes);
            fill_activations((float *)(void *)x.at, k);
            round(out.at, (const float *)(const void *)x.at, k);
            if (!blocks) wrong += round_bf16_wrong((const float *)(const void *)x.at, out.at, k, codes);
            for (size_t i = 0; blocks && i < k; i += 32) {
                wrong += round_bytes_wrong((const float *)(const void *)x.at + i,
                                           out.at + (codes ? i / 32 * 40 : 4 * i), codes);
            }
            touched += box_broken(&out);
            box_free(&x), box_free(&out);
        }
    }
    verdict(blocks ? "round to bytes" : "round to BF16", wrong);
    verdict("guards of round", touched);
}

/* Those of the plain ops. */
static void plain_bf16(void *out, const float *x, size_t k) { dsv3i_round_bf16((float *)out, x, k); }
static void plain_q8(void *out, const float *x, size_t k) { dsv3i_round_q8((float *)out, x, k); }

/* ---- What instruction sets bring beside vectors: the engine's kernels ---------------------------------------- */

#ifdef DSV3I_ENGINE
/* ---- tables: rows of numbers that lie ld apart, with gaps where ld > cols. Those to read are filled with NaN, gaps
 * too, and end with their last number, so that AddressSanitizer sees what reads on; those to write lie between guards,
 * and so do their rows. */

typedef struct table {
    float *memory, *x; /* x: row 0 */
    size_t cells, offset, rows, cols, ld;
} table;

static float *table_make(table *m, size_t before, size_t after, size_t rows, size_t cols, uint32_t bits) {
    m->rows = rows, m->cols = cols, m->ld = cols + test_below(4);
    m->offset = before + test_below(OFFSETS);
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

static void table_fill(table *m) {
    for (size_t r = 0; r < m->rows; r++) fill_wild(m->x + r * m->ld, m->cols);
}

/* Whole words of 64 bytes, which would be aligned each time: half of them end some floats before that page. */
static unsigned char *box_words(box *b, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), after = test_below(2) ? 4 * test_below(16) : 0;
    return box_make(b, (page - (bytes + after) % page) % page, bytes, after, page);
}

/* ---- tile: every dot of it has the bits that the backend's dot of the two rows has, whatever the size of the tile; so
 * the bound of dot holds. (Products below the normal floats add 2^-150 each.) */

#define TILE_X 9
#define TILE_W 33
#define TILE_K 300

/* Now and then a number below the normal ones, or a zero of either sign. */
static void table_fill_weights(table *m) {
    table_fill(m);
    for (size_t i = 0; i < m->rows * m->cols; i++) {
        uint32_t bits = (uint32_t)(test_random() >> 32);
        if (bits % 16 != 0) continue;
        m->x[i / m->cols * m->ld + i % m->cols] = dsv3i_float(bits & (bits & 0x100u ? 0x807C0000u : 0x80000000u));
    }
}

static void tile_run(const dsv3i_kernels *k, table *y, const table *x, const table *w) {
    k->tile(y->x, y->ld, x->x, x->ld, x->rows, w->x, w->ld, w->rows, w->cols);
}

/* The dot of two rows in double: is got within the bound? */
static int tile_exact(float got, const float *x, const float *w, size_t n) {
    double sum = 0, size = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)w[i], size += fabs((double)x[i] * (double)w[i]);
    return fabs((double)got - sum) <= (sum_bound(n) + UNIT) * size + (double)n * ldexp(1, -149);
}

typedef struct tile_faults {
    int bits, inexact, touched;
} tile_faults;

static void check_tile_shape(const dsv3_context *ctx, tile_faults *bad, size_t nx, size_t nw, size_t n) {
    table x, y, w;
    table_input(&x, nx, n), table_input(&w, nw, n);
    table_fill(&x), table_fill_weights(&w);
    table_output(&y, nx, nw);
    tile_run(dsv3i_kernels_of(ctx), &y, &x, &w);
    for (size_t t = 0; t < nx; t++) {
        for (size_t r = 0; r < nw; r++) {
            float got = y.x[t * y.ld + r], want = ctx->ops->dot(x.x + t * x.ld, w.x + r * w.ld, n);
            bad->bits += !same_bits(&got, &want, 1);
            bad->inexact += !tile_exact(got, x.x + t * x.ld, w.x + r * w.ld, n);
        }
    }
    bad->touched += table_broken(&y);
    free(w.memory), free(x.memory), free(y.memory);
}

/* All heights and widths meet all short lengths, shared out between the guards: half of the cases with each. Of the
 * long ones each meets a third of the shapes. */
static void check_tile(const dsv3_context *ctx) {
    static const size_t widths[13] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, TILE_W};
    static const size_t longer[9] = {127, 128, 129, 130, 131, 255, 256, 257, TILE_K};
    tile_faults bad = {0, 0, 0};
    for (size_t length = 0; length <= MOST + 9; length++) {
        size_t n = length <= MOST ? length : longer[length - MOST - 1];
        for (size_t shape = 0; shape < (TILE_X + 1) * 13; shape++) {
            size_t turn = length + shape + (guard_bits == guards[0]);
            if (turn % (length <= MOST ? 2 : 6) != 0) continue;
            check_tile_shape(ctx, &bad, shape / 13, widths[shape % 13], n);
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

/* One such number among positive terms: the dots of its row are what it is, and all others have the bits of before. */
static int tile_special_wrong(const dsv3i_kernels *k, const table *x, table *w, const table *clean, size_t r,
                              size_t at, float special) {
    float *place = w->x + r * w->ld + at, before = *place;
    table y;
    int bad = 0;
    *place = special;
    table_output(&y, x->rows, w->rows);
    tile_run(k, &y, x, w);
    for (size_t t = 0; t < x->rows; t++) {
        for (size_t i = 0; i < w->rows; i++) {
            float got = y.x[t * y.ld + i];
            if (i != r) bad += !same_bits(&got, clean->x + t * clean->ld + i, 1);
            if (i == r) bad += isnan(special) ? !isnan(got) : dsv3i_bits(got) != dsv3i_bits(special);
        }
    }
    *place = before;
    free(y.memory);
    return bad;
}

static void check_tile_special(const dsv3i_kernels *k) {
    static const size_t lengths[7] = {1, 7, 8, 9, 17, 35, 131};
    int bad = 0;
    for (size_t length = 0; length < 7; length++) {
        size_t n = lengths[length];
        table x, clean, w;
        table_input(&x, 5, n), table_input(&w, 7, n);
        for (size_t t = 0; t < 5; t++) test_fill(x.x + t * x.ld, n, 1, 2);
        table_fill_weights(&w);
        table_output(&clean, 5, 7);
        tile_run(k, &clean, &x, &w);
        for (size_t at = 0; at < 4 * n; at++) {
            bad +=
                tile_special_wrong(k, &x, &w, &clean, at % 7, at % n, dsv3i_float(special_codes[DSV3_F32][at / n]));
        }
        free(w.memory), free(x.memory), free(clean.memory);
    }
    verdict("NaN and infinity in tile", bad);
}

/* ---- outer: for each element alone, the terms in the order of j, whatever rows and columns share the call, in fused
 * multiply-adds */

static void plain_outer(table *y, const table *a, int turned, const table *b) {
    for (size_t j = 0; j < b->rows; j++) {
        for (size_t t = 0; t < y->rows; t++) {
            float *to = y->x + t * y->ld, f = turned ? a->x[j * a->ld + t] : a->x[t * a->ld + j];
            const float *from = b->x + j * b->ld;
            for (size_t i = 0; i < y->cols; i++) to[i] = fmaf(f, from[i], to[i]);
        }
    }
}

typedef struct outer_faults {
    int bits, touched;
} outer_faults;

/* y [m, n] += a [m, k] b [k, n]; turned: a lies as [k, m]. */
static void check_outer_shape(const dsv3i_kernels *kernels, outer_faults *bad, size_t m, size_t k, size_t n,
                              int turned) {
    table y, a, b, want;
    table_output(&y, m, n), table_output(&want, m, n);
    table_input(&a, turned ? k : m, turned ? m : k), table_input(&b, k, n);
    table_fill(&y), table_fill(&a), table_fill(&b);
    for (size_t t = 0; t < m; t++) memcpy(want.x + t * want.ld, y.x + t * y.ld, n * sizeof(float));
    kernels->outer(y.x, y.ld, m, a.x, turned ? 1 : a.ld, turned ? a.ld : 1, b.x, b.ld, k, n);
    plain_outer(&want, &a, turned, &b);
    for (size_t t = 0; t < m; t++) bad->bits += !same_bits(y.x + t * y.ld, want.x + t * want.ld, n);
    bad->touched += table_broken(&y);
    free(y.memory), free(want.memory), free(a.memory), free(b.memory);
}

/* All heights and widths meet all short sums; the long ones take turns. Half of the cases with each guard. */
static void check_outer(const dsv3i_kernels *kernels) {
    static const size_t longer[4] = {255, 256, 257, 300};
    outer_faults bad = {0, 0};
    for (size_t m = 0; m <= 9; m++) {
        for (size_t n = 0; n <= MOST; n++) {
            size_t half = guard_bits == guards[0];
            for (size_t k = (m + n + half) % 2; k <= 9; k += 2) {
                check_outer_shape(kernels, &bad, m, k, n, (int)test_below(2));
            }
            if ((m + n + half) % 3 != 0) continue;
            check_outer_shape(kernels, &bad, m, longer[(m + n / 3) % 4], n, (int)test_below(2));
        }
    }
    if (HONEST_FLOATS) verdict("bits of outer", bad.bits);
    verdict("guards of outer", bad.touched);
}

/* ---- pack: the codes of rows of weights, whatever they are, at the places that chapter A gives for a piece:
 *     F32 [k, columns, 16]     F16, BF16 [k/2, columns, 16, 2]     Q8_0 [k/4, columns, 16, 4] bytes, 128 added
 *     Q4_0 [k/32, 4, columns, 16, 4]: of a block, terms 4 i .. 4 i + 3 in the low four bits, those 16 later in the high
 *     E4M3 [k/4, columns, 4, 2, 4, 2]: of four rows, terms 0 and 1 of each, then terms 2 and 3 of each
 * Codes are 0 where there are no rows, and behind k; of Q8_0 and Q4_0 only the scales are. */

/* Bytes of a piece's codes. */
static size_t piece_codes(dsv3_type type, size_t columns, size_t k) {
    switch (type) {
    case DSV3_F32: return k * columns * 64;
    case DSV3_F16:
    case DSV3_BF16: return (k + 1) / 2 * columns * 64;
    case DSV3_F8_E4M3: return (k + 3) / 4 * columns * 64;
    case DSV3_Q8_0: return k / 4 * columns * 64;
    case DSV3_Q4_0: return k / 8 * columns * 64;
    }
    return 0;
}

/* The byte at which the code of term i of row r begins. */
static size_t piece_place(dsv3_type type, size_t columns, size_t r, size_t i) {
    size_t c = r / 16, lane = r % 16;
    switch (type) {
    case DSV3_F32: return 4 * ((i * columns + c) * 16 + lane);
    case DSV3_F16:
    case DSV3_BF16: return 2 * (((i / 2 * columns + c) * 16 + lane) * 2 + i % 2);
    case DSV3_F8_E4M3: return ((((i / 4 * columns + c) * 4 + lane / 4) * 2 + i % 4 / 2) * 4 + lane % 4) * 2 + i % 2;
    case DSV3_Q8_0: return ((i / 4 * columns + c) * 16 + lane) * 4 + i % 4;
    case DSV3_Q4_0: return (((i / 32 * 4 + i % 16 / 4) * columns + c) * 16 + lane) * 4 + i % 4;
    }
    return 0;
}

/* The code of term i of a row of weights; of a panel's. */
static uint32_t row_code(dsv3_type type, const unsigned char *row, size_t i) {
    const unsigned char *block = row + i / 32 * dsv3_type_bytes(type);
    uint32_t word = 0;
    if (type == DSV3_Q8_0) return block[2 + i % 32] ^ 128u;
    if (type == DSV3_Q4_0) return i % 32 < 16 ? block[2 + i % 16] & 15u : block[2 + i % 16] >> 4;
    memcpy(&word, row + i * dsv3_type_bytes(type), dsv3_type_bytes(type));
    return word;
}

static uint32_t panel_code(dsv3_type type, const unsigned char *panel, size_t columns, size_t r, size_t i) {
    uint32_t word = 0;
    panel += piece_place(type, columns, r, i);
    if (type == DSV3_Q8_0) return *panel;
    if (type == DSV3_Q4_0) return i % 32 < 16 ? *panel & 15u : *panel >> 4;
    memcpy(&word, panel, dsv3_type_bytes(type));
    return word;
}

/* Rows of weights with any codes at all: NaN, infinities and numbers below the normal ones among them. row_bytes apart,
 * from any byte. Scales of blocks: any, too. */
static size_t rows_make(box *w, dsv3_type type, size_t rows, size_t k, size_t row_bytes) {
    size_t bytes = (rows - 1) * row_bytes + dsv3_row_bytes(type, k);
    unsigned char *at = box_input(w, bytes);
    for (size_t i = 0; i < bytes; i++) at[i] = (unsigned char)(test_random() >> 56);
    return row_bytes;
}

typedef struct panel_faults {
    int pack, scales, widen, floats, touched;
} panel_faults;

static int pack_scales_wrong(const float *scale, dsv3_type type, const unsigned char *w, size_t row_bytes,
                             size_t rows, size_t columns, size_t k) {
    int bad = 0;
    for (size_t b = 0; b < k / 32; b++) {
        for (size_t r = 0; r < 16 * columns; r++) {
            uint16_t half = 0;
            if (r < rows) memcpy(&half, w + r * row_bytes + b * dsv3_type_bytes(type), 2);
            bad += !same_float(scale[(b * columns + r / 16) * 16 + r % 16], dsv3_f32_from_f16(half));
        }
    }
    return bad;
}

/* What is wrong with values [k, up to whole steps] made of the panel of codes; and with the floats made of them. widen
 * gives FP8 as BF16, F16 as float, Q4_0 as bytes: each value is what its code is worth, exactly. */
static void check_widen(const dsv3i_kernels *kernels, panel_faults *bad, dsv3_type type, const unsigned char *panel,
                        size_t rows, size_t columns, size_t k) {
    int bytes = dsv3_type_block(type) > 1;
    size_t steps = up(k, type == DSV3_F32 ? 1 : type == DSV3_F8_E4M3 || bytes ? 4 : 2), n = steps * columns * 16;
    dsv3_type form = type == DSV3_F16 || type == DSV3_F32 ? DSV3_F32 : bytes ? DSV3_Q8_0 : DSV3_BF16;
    size_t offset = 4 * test_below(16);
    box values, floats;
    int32_t zero = type == DSV3_Q4_0 ? 8 : 128;
    const unsigned char *from = panel;
    box_output(&values, offset, n * (form == DSV3_F32 ? 4 : bytes ? 1 : 2));
    if (kernels->widen[type] != NULL) {
        kernels->widen[type](values.at, panel, columns, k);
        from = values.at;
    } else {
        bad->widen += type == DSV3_F16 || type == DSV3_F8_E4M3 || type == DSV3_Q4_0; /* these must be widened */
    }
    for (size_t i = 0; i < steps && from == values.at; i++) {
        for (size_t r = 0; r < 16 * columns; r++) {
            uint32_t code = i < k ? panel_code(type, panel, columns, r, i) : 0;
            uint32_t got = panel_code(form, from, columns, r, i);
            float want = type == DSV3_F16 ? dsv3_f32_from_f16((uint16_t)code) : dsv3_f32_from_f8_e4m3((uint8_t)code);
            (void)rows;
            if (bytes) bad->widen += got != code;
            if (type == DSV3_F16) bad->widen += !same_float(dsv3i_float(got), want);
            if (type == DSV3_F8_E4M3) bad->widen += !same_float(dsv3_f32_from_bf16((uint16_t)got), want);
        }
    }
    if (form != DSV3_F32) {
        float *f = (float *)(void *)box_output(&floats, offset, n * sizeof(float));
        kernels->float_panel[bytes](f, from, columns, k, zero);
        for (size_t i = 0; i < up(k, bytes ? 4 : 2); i++) {
            for (size_t r = 0; r < 16 * columns; r++) {
                uint32_t code = panel_code(form, from, columns, r, i);
                float want = bytes ? (float)((int32_t)code - zero) : dsv3_f32_from_bf16((uint16_t)code);
                bad->floats += !same_float(f[(i * columns + r / 16) * 16 + r % 16], want);
            }
        }
        bad->touched += box_broken(&floats);
        box_free(&floats);
    }
    bad->touched += box_broken(&values);
    box_free(&values);
}

static void check_pack_shape(const dsv3i_kernels *kernels, panel_faults *bad, dsv3_type type, size_t rows, size_t k) {
    size_t columns = (rows + 15) / 16, block = dsv3_type_block(type), codes = piece_codes(type, columns, k);
    size_t row_bytes = dsv3_row_bytes(type, k) + test_below(5), offset = 4 * test_below(16);
    box w, panel, scale;
    rows_make(&w, type, rows, k, row_bytes);
    box_output(&panel, offset, codes);
    box_output(&scale, offset, block > 1 ? k / 32 * columns * 64 : 0);
    kernels->pack[type](panel.at, (float *)(void *)scale.at, w.at, row_bytes, rows, k);
    for (size_t r = 0; r < 16 * columns; r++) {
        if (block > 1 && r >= rows) break;
        for (size_t i = 0; i < up(k, type == DSV3_F32 ? 1 : type == DSV3_F8_E4M3 ? 4 : block > 1 ? 32 : 2); i++) {
            uint32_t want = r < rows && i < k ? row_code(type, w.at + r * row_bytes, i) : 0;
            bad->pack += panel_code(type, panel.at, columns, r, i) != want;
        }
    }
    if (block > 1) {
        bad->scales +=
            pack_scales_wrong((const float *)(const void *)scale.at, type, w.at, row_bytes, rows, columns, k);
    }
    bad->touched += box_broken(&panel) + box_broken(&scale);
    check_widen(kernels, bad, type, panel.at, rows, columns, k);
    box_free(&w), box_free(&panel), box_free(&scale);
}

/* All numbers of rows meet all k up to 260, an eighth of the pairs with each guard. */
static void check_pack(const dsv3i_kernels *kernels, dsv3_type type) {
    panel_faults bad = {0, 0, 0, 0, 0};
    size_t block = dsv3_type_block(type);
    for (size_t k = block; k <= 260; k += block) {
        for (size_t rows = 1; rows <= 64; rows++) {
            if ((k / block + 3 * rows + 4 * (size_t)(guard_bits == guards[0])) % 8 != 0) continue;
            check_pack_shape(kernels, &bad, type, rows, k);
        }
    }
    verdict("codes of pack", bad.pack);
    verdict("scales of pack", bad.scales);
    verdict("widen", bad.widen);
    verdict("float_panel", bad.floats);
    verdict("guards of pack, widen and float_panel", bad.touched);
}

/* Every code of a small type, in every place of a word. */
static void check_widen_all(const dsv3i_kernels *kernels, dsv3_type type) {
    size_t size = dsv3_type_bytes(type), n = size == 1 ? 256 : 65536;
    panel_faults bad = {0, 0, 0, 0, 0};
    box w, panel;
    box_input(&w, 64 * 64 * size), box_output(&panel, 0, piece_codes(type, 4, 64));
    for (size_t first = 0; first < n; first += size == 1 ? 64 : 4096) {
        for (size_t i = 0; i < 4096; i++) {
            uint16_t half = (uint16_t)(size == 1 ? (first + i * 17 + i / 64) % 256 : first + i);
            unsigned char byte = (unsigned char)half;
            memcpy(w.at + i * size, size == 1 ? (const void *)&byte : &half, size);
        }
        kernels->pack[type](panel.at, NULL, w.at, 64 * size, 64, 64);
        check_widen(kernels, &bad, type, panel.at, 64, 4, 64);
    }
    verdict("all codes of widen", bad.widen);
    verdict("all codes of float_panel", bad.floats);
    box_free(&w), box_free(&panel);
}

/* ---- product. x [n, k] and a panel w of `rows` rows, as each product takes them, and beside them the numbers they stand
 * for. Bounds, |error| relative to S, the sum of the magnitudes of all terms and of what y held before:
 *   float rows: an output is a chain of k fused multiply-adds, and one more for each scale: (k + blocks) 2^-24 S, or
 *     2^-150 each, half of the smallest number, times the scale, where numbers are below the normal ones
 *   BF16 rows: products are exact and added one after the other, k 2^-24 S and one more for the scale; but the
 *     instruction takes numbers below 2^-126 for 0 and makes such sums 0: a term loses at most 2^-126 (|x| + |w| + 1)
 *   rows of bytes: whole numbers, exactly; each block is rounded once by its scale and once when it is added:
 *     (2 + blocks) 2^-24 of the sum of the blocks' magnitudes
 * Besides: an output has the same bits whatever other rows there are on either side, and products of codes have those of
 * the product of the same numbers as floats. */

typedef struct factor {
    box x, values, scale;
    float *fx, *fw; /* [n, k] and [rows, k] */
    size_t n, rows, k, ldx, block;
    dsv3i_panel w;
    dsv3i_gemm_kind kind;
} factor;

static int is_codes(dsv3i_gemm_kind kind) { return kind == DSV3I_GEMM_BYTES || kind == DSV3I_GEMM_FAST_BYTES; }

/* Mostly of about the same size, sometimes below the normal numbers. */
static float bf16_number(void) {
    float x = ldexpf(test_uniform(-1, 1), (int)test_below(13) - 6);
    if (test_below(32) == 0) x = dsv3i_float((uint32_t)(test_random() >> 32) & 0x807F0000u);
    return dsv3_f32_from_bf16(dsv3_bf16_from_f32(x));
}

static void factor_x(factor *f) {
    size_t k = f->k, bytes = k * 4;
    if (f->kind == DSV3I_GEMM_FAST_BF16) bytes = up(k, 4) * 2;
    if (f->kind == DSV3I_GEMM_FAST_BYTES) bytes = k / 32 * 40;
    f->ldx = bytes + 4 * test_below(4);
    box_input(&f->x, (f->n - 1) * f->ldx + bytes);
    for (size_t t = 0; t < f->n; t++) {
        float *x = f->fx + t * k;
        unsigned char *row = f->x.at + t * f->ldx;
        if (f->kind == DSV3I_GEMM_FAST_BF16) {
            memset(row, 0, bytes);
            for (size_t i = 0; i < k; i++) {
                uint16_t half = dsv3_bf16_from_f32(x[i] = bf16_number());
                memcpy(row + 2 * i, &half, 2);
            }
        } else if (f->kind == DSV3I_GEMM_FAST_BYTES) {
            for (size_t b = 0; b < k / 32; b++, row += 40) {
                float unit = test_uniform(0.001f, 0.1f);
                int32_t sum = 0;
                for (size_t i = 0; i < 32; i++) {
                    int q = (int)test_below(255) - 127;
                    if (test_below(4) == 0) q = q < 0 ? -127 : 127;
                    row[i] = (unsigned char)q, x[32 * b + i] = (float)q, sum -= 8 * q;
                }
                memcpy(row + 32, &unit, 4), memcpy(row + 36, &sum, 4);
            }
        } else {
            fill_wild(x, k);
            memcpy(row, x, bytes);
        }
    }
}

/* The scale of row t's block that holds term i, for rows of bytes. */
static float factor_unit(const factor *f, size_t t, size_t i) {
    float unit = 1;
    if (f->kind == DSV3I_GEMM_FAST_BYTES) memcpy(&unit, f->x.at + t * f->ldx + i / 32 * 40 + 32, 4);
    return unit;
}

static float factor_scale(const factor *f, size_t r, size_t i) {
    return f->w.scale == NULL ? 1 : f->w.scale[(i / f->w.block * f->w.columns + r / 16) * 16 + r % 16];
}

/* scaled: 0 none, 1 one scale for all terms, 2 for each 32. */
static void factor_make(factor *f, dsv3i_gemm_kind kind, size_t n, size_t rows, size_t k, int scaled) {
    int codes = is_codes(kind), floats = kind == DSV3I_GEMM_F32;
    dsv3_type form = floats ? DSV3_F32 : codes ? DSV3_Q8_0 : DSV3_BF16;
    size_t columns = (rows + 15) / 16, steps = up(k, floats ? 1 : codes ? 4 : 2);
    f->kind = kind, f->n = n, f->rows = rows, f->k = k;
    f->fx = (float *)test_alloc(n * k * sizeof(float)), f->fw = (float *)test_alloc(rows * k * sizeof(float));
    factor_x(f);
    f->w.columns = columns, f->w.zero = test_below(2) ? 128 : 8, f->w.ahead = test_below(2) * 512,
    f->w.next = &f->w, f->w.next_bytes = test_below(2) * 4096;
    f->w.block = scaled == 2 ? 32 : k, f->w.gap = 0;
    f->w.values = box_words(&f->values, steps * columns * 64 / (floats ? 1 : codes ? 4 : 2));
    memset(f->values.at, 0, f->values.bytes);
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < k; i++) {
            int code = (int)test_below(f->w.zero == 8 ? 16 : 256);
            float w = codes ? (float)(code - f->w.zero) : bf16_number();
            uint16_t half = dsv3_bf16_from_f32(w);
            unsigned char *at = f->values.at + piece_place(form, columns, r, i), byte = (unsigned char)code;
            if (floats) fill_wild(&w, 1);
            memcpy(at, floats ? (const void *)&w : codes ? (const void *)&byte : &half, floats ? 4 : codes ? 1 : 2);
            f->fw[r * k + i] = w;
        }
    }
    f->w.scale = NULL;
    box_words(&f->scale, scaled ? (k / f->w.block) * columns * 64 : 0);
    if (!scaled) return;
    memset(f->scale.at, 0, f->scale.bytes);
    f->w.scale = (const float *)(const void *)f->scale.at;
    for (size_t i = 0; i < k / f->w.block; i++) {
        for (size_t r = 0; r < rows; r++) {
            ((float *)(void *)f->scale.at)[(i * columns + r / 16) * 16 + r % 16] = test_uniform(-2, 2);
        }
    }
}

static void factor_free(factor *f) {
    box_free(&f->x), box_free(&f->values), box_free(&f->scale), free(f->fx), free(f->fw);
}

/* Output of row t and row r, in double: is got within the bound? before: what y held, 0 if that is not added. */
static int product_exact(const factor *f, size_t t, size_t r, float got, float before) {
    const float *x = f->fx + t * f->k, *w = f->fw + r * f->k;
    double sum = (double)before, size = fabs((double)before), part = 0, parts = fabs((double)before), lost = 0;
    size_t blocks = f->w.scale == NULL ? 0 : f->k / f->w.block;
    double tiny = ldexp(1, -126), most = 1, bound;
    for (size_t i = 0; i < f->k; i++) {
        double times = (double)factor_scale(f, r, i) * (double)factor_unit(f, t, i);
        double term = (double)x[i] * (double)w[i];
        size += fabs(term * times), part += term; /* whole numbers: exact */
        most = fmax(most, fabs(times));
        lost += tiny * (fabs((double)x[i]) + fabs((double)w[i]) + 1) * fmax(1, fabs(times));
        if ((i + 1) % f->w.block == 0) sum += part * times, parts += fabs(part * times), part = 0;
    }
    bound = (double)(f->k + blocks) * (UNIT * size * 1.001 + ldexp(most, -150));
    if (f->kind == DSV3I_GEMM_FAST_BYTES) bound = (double)(2 + blocks) * UNIT * parts * 1.001;
    if (f->kind == DSV3I_GEMM_FAST_BF16) bound += lost;
    return fabs((double)got - sum) <= bound;
}

typedef struct product_faults {
    int inexact, alone, floats, gaps, touched;
} product_faults;

/* One row of x, and one column of the panel as a panel of its own, give the bits that they have in y. */
static int product_unlike(const dsv3i_kernels *kernels, const factor *f, const table *y, const table *before,
                          int add) {
    size_t t = test_below(f->n), c = test_below(f->w.columns),
           rows = f->rows - 16 * c < 16 ? f->rows - 16 * c : 16;
    size_t step = 64, steps = f->values.bytes / f->w.columns / 64, blocks = f->scale.bytes / f->w.columns / 64;
    float *values = (float *)test_alloc(steps * step), *scale = (float *)test_alloc(blocks * step), one[16];
    dsv3i_panel w = f->w;
    int bad;
    for (size_t i = 0; i < steps; i++) memcpy(values + 16 * i, f->values.at + (i * f->w.columns + c) * 64, 64);
    for (size_t i = 0; i < blocks; i++) memcpy(scale + 16 * i, f->scale.at + (i * f->w.columns + c) * 64, 64);
    w.values = values, w.columns = 1;
    if (w.scale != NULL) w.scale = scale;
    memcpy(one, before->x + t * before->ld + 16 * c, rows * sizeof *one);
    kernels->gemm[f->kind](one, 16, f->x.at + t * f->ldx, f->ldx, 1, &w, rows, f->k, add);
    bad = !same_bits(one, y->x + t * y->ld + 16 * c, rows);
    free(values), free(scale);
    return bad;
}

/* The same with the panel's numbers as floats. */
static int product_unlike_floats(const dsv3i_kernels *kernels, const factor *f, const table *y, table *before,
                                 int add) {
    size_t n = up(f->k, 4) * f->w.columns * 16;
    float *floats = (float *)test_alloc(n * sizeof *floats);
    dsv3i_panel w = f->w;
    int bad = 0;
    kernels->float_panel[is_codes(f->kind)](floats, w.values, w.columns, f->k, w.zero);
    w.values = floats;
    kernels->gemm[DSV3I_GEMM_F32](before->x, before->ld, f->x.at, f->ldx, f->n, &w, f->rows, f->k, add);
    for (size_t t = 0; t < f->n; t++) bad += !same_bits(before->x + t * before->ld, y->x + t * y->ld, f->rows);
    free(floats);
    return bad;
}

/* The same with something between the blocks of bytes. */
static int product_unlike_gaps(const dsv3i_kernels *kernels, const factor *f, const table *y, table *before, int add) {
    size_t block = f->w.block * f->w.columns * 16, gap = 32 * (1 + test_below(4)), n = f->k / f->w.block;
    unsigned char *values = (unsigned char *)test_alloc(n * (block + gap));
    dsv3i_panel w = f->w;
    int bad = 0;
    memset(values, 0xFF, n * (block + gap));
    for (size_t i = 0; i < n; i++) memcpy(values + i * (block + gap), f->values.at + i * block, block);
    w.values = values, w.gap = gap;
    kernels->gemm[f->kind](before->x, before->ld, f->x.at, f->ldx, f->n, &w, f->rows, f->k, add);
    for (size_t t = 0; t < f->n; t++) bad += !same_bits(before->x + t * before->ld, y->x + t * y->ld, f->rows);
    free(values);
    return bad;
}

static void check_product_shape(const dsv3i_kernels *kernels, product_faults *bad, dsv3i_gemm_kind kind, size_t n,
                                size_t rows, size_t k, int scaled, int add) {
    table y, before, again;
    factor f;
    factor_make(&f, kind, n, rows, k, scaled);
    table_output(&y, n, rows), table_output(&before, n, rows), table_output(&again, n, rows);
    for (size_t t = 0; t < n; t++) {
        if (add) fill_wild(y.x + t * y.ld, rows); /* else a NaN may stand there */
        memcpy(before.x + t * before.ld, y.x + t * y.ld, rows * sizeof(float));
        memcpy(again.x + t * again.ld, y.x + t * y.ld, rows * sizeof(float));
    }
    kernels->gemm[kind](y.x, y.ld, f.x.at, f.ldx, n, &f.w, rows, k, add);
    for (size_t t = 0; t < n; t++) {
        for (size_t r = 0; r < rows; r++) {
            bad->inexact += !product_exact(&f, t, r, y.x[t * y.ld + r], add ? before.x[t * before.ld + r] : 0);
        }
    }
    bad->alone += product_unlike(kernels, &f, &y, &before, add);
    if (kind == DSV3I_GEMM_BF16 || kind == DSV3I_GEMM_BYTES) {
        bad->floats += product_unlike_floats(kernels, &f, &y, &before, add);
    }
    if (is_codes(kind)) bad->gaps += product_unlike_gaps(kernels, &f, &y, &again, add);
    bad->touched += table_broken(&y) + table_broken(&again);
    free(y.memory), free(before.memory), free(again.memory);
    factor_free(&f);
}

/* All numbers of rows meet all k, and each of both all n, a quarter of the pairs with each guard. */
static void check_product(const dsv3i_kernels *kernels, dsv3i_gemm_kind kind) {
    static const size_t longer[5] = {127, 128, 129, 130, 256};
    static const char *const names[DSV3I_GEMMS] = {"product of floats", "product of BF16", "product of bytes",
                                                     "fast product of BF16", "fast product of bytes"};
    size_t most = kind == DSV3I_GEMM_BF16 || kind == DSV3I_GEMM_BYTES ? 4 : 20, block = is_codes(kind) ? 32 : 1;
    product_faults bad = {0, 0, 0, 0, 0};
    char text[80];
    for (size_t length = 1; length <= MOST + 5; length++) {
        size_t k = length <= MOST ? length : longer[length - MOST - 1];
        if (k % block != 0) continue;
        for (size_t rows = 1; rows <= 64; rows++) {
            size_t turn = length + rows + 2 * (size_t)(guard_bits == guards[0]);
            int scaled = (int)test_below(3), add = (int)test_below(2);
            if (block == 1 && turn % 4 != 0) continue;
            if (scaled == 2 && (k % 32 != 0 || kind == DSV3I_GEMM_BF16 || kind == DSV3I_GEMM_FAST_BF16))
                scaled = 0;
            if (kind == DSV3I_GEMM_FAST_BYTES || (block > 1 && turn % 2 == 0)) scaled = 2;
            check_product_shape(kernels, &bad, kind, 1 + (7 * length + 3 * (rows + turn / 4)) % most, rows, k, scaled,
                                add);
        }
    }
    snprintf(text, sizeof text, "exactness of %s", names[kind]);
    verdict(text, bad.inexact);
    snprintf(text, sizeof text, "bits alone of %s", names[kind]);
    verdict(text, bad.alone);
    snprintf(text, sizeof text, "bits of floats of %s", names[kind]);
    if (kind == DSV3I_GEMM_BF16 || kind == DSV3I_GEMM_BYTES) verdict(text, bad.floats);
    snprintf(text, sizeof text, "gaps of %s", names[kind]);
    if (is_codes(kind)) verdict(text, bad.gaps);
    snprintf(text, sizeof text, "guards of %s", names[kind]);
    verdict(text, bad.touched);
}

/* ---- few: of packed rows and few rows of x, floats or rounded, the bits of so many products, panel by panel and piece by piece */

/* A matrix in the order of dsv3_pack, written by the test: panels of 64 rows; of each, pieces of 128 terms, of Q8_0 and Q4_0
 * of 32; of each, codes and scales, up to a multiple of 64 bytes: E4M3 one float, Q8_0 and Q4_0 F16 [columns, 16]. */
static size_t piece_terms(dsv3_type type) { return dsv3_type_block(type) > 1 ? 32 : 128; }

static size_t piece_bytes(dsv3_type type, size_t columns, size_t k) {
    size_t scales = type == DSV3_F8_E4M3 ? 4 : dsv3_type_block(type) > 1 ? columns * 32 : 0;
    return piece_codes(type, columns, k) + up(scales, 64);
}

static size_t panel_columns(size_t rows) { return rows < 64 ? (rows + 15) / 16 : 4; }

static void packed_make(box *b, dsv3_type type, size_t rows, size_t k) {
    size_t bytes = 0, most = piece_terms(type);
    unsigned char *at;
    for (size_t p = 0; p < rows; p += 64) {
        for (size_t i = 0; i < k; i += most) {
            bytes += piece_bytes(type, panel_columns(rows - p), k - i < most ? k - i : most);
        }
    }
    at = box_input(b, bytes);
    memset(at, 0, bytes);
    for (size_t p = 0; p < rows; p += 64) {
        size_t columns = panel_columns(rows - p), tall = rows - p < 64 ? rows - p : 64;
        for (size_t i = 0; i < k; i += most) {
            size_t some = k - i < most ? k - i : most, codes = piece_codes(type, columns, some);
            float scale = test_uniform(-2, 2);
            for (size_t r = 0; r < tall; r++) {
                for (size_t j = 0; j < some; j++) {
                    unsigned char *to = at + piece_place(type, columns, r, j),
                                  byte = (unsigned char)(test_random() >> 56);
                    uint16_t half = dsv3_bf16_from_f32(bf16_number());
                    if (type == DSV3_F8_E4M3 && byte % 128 == 127) byte = 0;
                    memcpy(to, type == DSV3_BF16 ? (const void *)&half : &byte, type == DSV3_BF16 ? 2 : 1);
                }
            }
            if (type == DSV3_F8_E4M3) memcpy(at + codes, &scale, 4);
            for (size_t r = 0; dsv3_type_block(type) > 1 && r < tall; r++) {
                uint16_t half = dsv3_f16_from_f32(test_uniform(-0.1f, 0.1f));
                memcpy(at + codes + 2 * r, &half, 2);
            }
            at += piece_bytes(type, columns, some);
        }
    }
}

/* The same by kernels.product, piece by piece. x: floats, or rows as `round` makes them, ldx apart. */
static void packed_product(const dsv3i_kernels *kernels, int fast, float *y, size_t ldy, const unsigned char *x,
                           size_t ldx, size_t n, const unsigned char *at, dsv3_type type, size_t rows, size_t k) {
    int blocks = dsv3_type_block(type) > 1;
    dsv3i_gemm_kind product = blocks ? DSV3I_GEMM_BYTES : DSV3I_GEMM_BF16;
    if (fast) product = blocks ? DSV3I_GEMM_FAST_BYTES : DSV3I_GEMM_FAST_BF16;
    for (size_t p = 0; p < rows; p += 64) {
        size_t columns = panel_columns(rows - p), tall = rows - p < 64 ? rows - p : 64;
        for (size_t i = 0, some; i < k; i += some) {
            const unsigned char *xi = x + (!fast ? 4 * i : blocks ? i / 32 * 40 : 2 * i);
            size_t codes;
            float values[64 * 128 / 2], scale[64]; /* BF16 or bytes */
            dsv3i_panel w;
            some = k - i < piece_terms(type) ? k - i : piece_terms(type), codes = piece_codes(type, columns, some);
            w.values = at, w.columns = columns, w.scale = type == DSV3_BF16 ? NULL : scale;
            w.block = some, w.zero = type == DSV3_Q4_0 ? 8 : 128, w.gap = w.ahead = w.next_bytes = 0;
            for (size_t j = 0; type != DSV3_BF16 && j < 16 * columns; j++) {
                uint16_t half;
                memcpy(&half, at + codes + (blocks ? 2 * j : 0), 2);
                scale[j] = dsv3_f32_from_f16(half);
                if (!blocks) memcpy(scale + j, at + codes, 4);
            }
            if (kernels->widen[type] != NULL) kernels->widen[type](values, at, columns, some), w.values = values;
            kernels->gemm[product](y + p, ldy, xi, ldx, n, &w, tall, some, i > 0);
            at += piece_bytes(type, columns, some);
        }
    }
}

/* few, and many: all numbers of rows that few takes, and edges of those that tiles of 16 rows and groups of them have; lengths
 * on both sides of 128 terms, and of the 256, 512 or 1024 that many takes at once; of few, also last panels of any height.
 * Some rows are so small that sums are subnormal. */
static void check_whole(const dsv3i_kernels *kernels, int many, int fast, dsv3_type type) {
    static const size_t lengths[14] = {1, 2, 3, 4, 31, 32, 64, 96, 127, 128, 160, 288, 672, 1093};
    static const size_t heights[16] = {5, 6, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 95, 96, 97, 200};
    int bits = 0, touched = 0, blocks = dsv3_type_block(type) > 1;
    for (size_t length = 0; length < 14; length++) {
        size_t k = lengths[length];
        if (k % dsv3_type_block(type) != 0 || (!fast && k % 4 != 0)) continue;
        for (size_t turn = 0; turn < 40; turn++) {
            size_t n = many ? heights[turn % 16] : 1 + turn % 4;
            size_t rows = 64 * (many ? turn % 3 : turn / 4) + (many || turn % 3 == 0 ? 0 : test_below(64));
            size_t row = !fast ? 4 * k : blocks ? k / 32 * 40 : up(k, 4) * 2, ldx = row + 4 * test_below(4);
            float numbers[1093];
            table y, want;
            box x, w;
            box_input(&x, (n - 1) * ldx + row);
            for (size_t t = 0; t < n; t++) {
                fill_wild(numbers, k);
                for (size_t i = 0; turn % 5 == 4 && i < k; i++) numbers[i] = test_uniform(-1, 1) * ldexpf(1.0f, -122);
                memcpy(x.at + t * ldx, numbers, !fast ? row : 0);
                if (fast) kernels->round[type](x.at + t * ldx, numbers, k);
            }
            packed_make(&w, type, rows, k);
            table_output(&y, n, rows), table_output(&want, n, rows);
            (many ? kernels->gemm_packed[type] : kernels->gemv[fast][type])(y.x, y.ld, x.at, ldx, n, w.at, rows, k);
            packed_product(kernels, fast, want.x, want.ld, x.at, ldx, n, w.at, type, rows, k);
            for (size_t t = 0; t < n; t++) bits += !same_bits(y.x + t * y.ld, want.x + t * want.ld, rows);
            touched += table_broken(&y);
            free(y.memory), free(want.memory), box_free(&x), box_free(&w);
        }
    }
    verdict(many ? "bits of many" : "bits of few", bits);
    verdict(many ? "guards of many" : "guards of few", touched);
}

/* Sums that are taken for 0 keep their sign only where nothing is added to them, also not the zeros that fill a tile: one row
 * alone, for which there may be no tiles, and the same row several times; a whole panel, and 40 rows, which are none. */
static void zeros_panel(unsigned char *w, size_t columns, size_t rows, const size_t at[4]) {
    for (size_t i = 0; i < 4; i++) {
        uint16_t half = dsv3_bf16_from_f32(ldexpf(1, i < 2 ? -63 : -100));
        for (size_t r = 0; r < rows; r++) memcpy(w + piece_place(DSV3_BF16, columns, r, at[i]), &half, 2);
    }
}

static void check_zeros(const dsv3i_kernels *kernels) {
    static const size_t at[4] = {0, 32, 64, 65};
    static const float x[4] = {1.5f, -1.75f, -1, -1};
    enum { K = 66, N = 7 };
    unsigned char *w = (unsigned char *)test_alloc(K * 128), *rows = (unsigned char *)test_alloc(N * 2 * (K + 2));
    float y[N * 64], one[64];
    memset(rows, 0, N * 2 * (K + 2));
    for (size_t i = 0; i < 4; i++) {
        uint16_t half = dsv3_bf16_from_f32(ldexpf(x[i], i < 2 ? -63 : -100));
        for (size_t t = 0; t < N; t++) memcpy(rows + t * 2 * (K + 2) + 2 * at[i], &half, 2);
    }
    memset(w, 0, K * 128), zeros_panel(w, 4, 64, at);
    kernels->gemv[1][DSV3_BF16](one, 64, rows, 2 * (K + 2), 1, w, 64, K);
    kernels->gemm_packed[DSV3_BF16](y, 64, rows, 2 * (K + 2), N, w, 64, K);
    for (size_t t = 0; t < N; t++) CHECK(same_bits(y + 64 * t, one, 64));
    memset(w, 0, K * 128), zeros_panel(w, 3, 40, at);
    for (size_t n = 1; n <= 4; n++) {
        kernels->gemv[1][DSV3_BF16](y, 64, rows, 2 * (K + 2), n, w, 40, K);
        for (size_t t = 0; t < n; t++) CHECK(same_bits(y + 64 * t, one, 40));
    }
    free(w), free(rows);
}

/* ---- mix: the bits of decode, scales and outer, which are checked above */

static int check_mix_shape(const dsv3_context *ctx, dsv3_type type, size_t k, size_t n, int scaled, int *touched) {
    const dsv3i_kernels *kernels = dsv3i_kernels_of(ctx);
    size_t row_bytes = dsv3_row_bytes(type, n) + test_below(5), blocks = (n + DSV3_BLOCK - 1) / DSV3_BLOCK;
    float *x = (float *)test_alloc(k * sizeof(float)), *rows = (float *)test_alloc(k * n * sizeof(float));
    float *want = (float *)test_alloc(n * sizeof(float));
    table y;
    box w, scales;
    int bad = 0;
    rows_make(&w, type, k, n, row_bytes);
    box_input(&scales, blocks * sizeof(float));
    for (size_t i = 0; i < blocks; i++) {
        float scale = test_uniform(0.01f, 2.0f);
        memcpy(scales.at + i * sizeof scale, &scale, sizeof scale);
    }
    fill_wild(x, k);
    table_output(&y, 1, n);
    fill_wild(y.x, n);
    memcpy(want, y.x, n * sizeof(float));
    for (size_t r = 0; r < k; r++) {
        ctx->ops->decode[type](rows + r * n, w.at + r * row_bytes, n);
        for (size_t i = 0; i < n && scaled; i++) {
            float scale;
            memcpy(&scale, scales.at + i / DSV3_BLOCK * sizeof scale, sizeof scale);
            rows[r * n + i] *= scale;
        }
    }
    kernels->outer(want, n, 1, x, k, 1, rows, n, k, n);
    kernels->gemv_t[type](y.x, x, w.at, row_bytes, scaled ? scales.at : NULL, k, n);
    for (size_t i = 0; i < n; i++) bad += !same_float(y.x[i], want[i]);
    *touched += table_broken(&y);
    free(x), free(rows), free(want), free(y.memory), box_free(&w), box_free(&scales);
    return bad;
}

static void check_mix(const dsv3_context *ctx, dsv3_type type) {
    static const size_t longer[6] = {127, 128, 200, 256, 320, 576};
    size_t block = dsv3_type_block(type);
    int bits = 0, touched = 0;
    for (size_t turn = 0; turn < 68 + 6; turn++) {
        size_t n = turn < 68 ? turn : longer[turn - 68];
        if (n == 0 || n % block != 0) continue;
        for (size_t k = 1; k < 200; k += k < 4 ? 1 : 65) {
            bits += check_mix_shape(ctx, type, k, n, type == DSV3_F8_E4M3 && k % 2 == 0, &touched);
        }
    }
    verdict("bits of mix", bits);
    verdict("guards of mix", touched);
}

/* ---- meet: attention of some queries with blocks of at most 64 keys. Bounds for each number of out / sum, relative to
 * the largest value seen: exp(2 d) - 1 + v, where d bounds the error of a score, and of the running maximum, and v that of
 * weights and weighted sums.
 *   [0] d = 2^-24 scale (dk + 3) sum |q k| and half a unit of the score;  v = (3 keys + 16) 2^-24
 *   [1] queries, keys, weights and values are rounded to BF16, each to 2^-8, and what is left of exact arithmetic is lost
 *       in one per cent more: d = 1.01 2^-7 scale sum |q k|;  v = 1.01 2^-7
 * A query has the same bits whatever others there are beside it. */

#define MEET_DK 80
#define MEET_DV 80

typedef struct attention {
    table q, keys, values, out;
    uint16_t *keys16, *values16; /* the same as BF16, with the same distances; NULL: floats are given */
    box keys_box, values_box;
    int32_t seen[2][64];
    size_t lanes, nk[2], dk, dv;
    float scale;
} attention;

/* Lanes [first, first + count) meet both blocks. top, sum [count]; out as a->out. */
static void attention_run(const dsv3_context *ctx, int kind, const attention *a, size_t first, size_t count,
                          float *out, size_t ld, float *top, float *sum) {
    const dsv3i_kernels *kernels = dsv3i_kernels_of(ctx);
    size_t columns = up(count, 16), dk = a->dk + 4, wide = up(a->dv, 16) + 4;
    size_t floats = columns * (dk + 64) + 64 * (dk > wide ? dk : wide);
    dsv3i_attention_tile with;
    box scratch;
    memset(&with, 0, sizeof with);
    with.q = a->q.x + first * a->q.ld, with.ld_q = a->q.ld, with.lanes = count;
    with.out = out, with.ld_out = ld, with.dk = a->dk, with.dv = a->dv, with.scale = a->scale;
    with.ctx = ctx;
    with.type = a->keys16 != NULL ? DSV3_BF16 : DSV3_F32;
    with.ld_k = a->keys.ld, with.ld_v = a->values.ld;
    with.scratch = box_output(&scratch, 16, floats * sizeof(float));
    for (size_t i = 0; i < 64; i++) with.top[i] = -FLT_MAX;
    for (size_t i = 0; i < count; i++) memset(out + i * ld, 0, a->dv * sizeof *out);
    if (kernels->attend_begin[kind] != NULL) kernels->attend_begin[kind](&with);
    for (size_t b = 0, at = 0; b < 2; at += a->nk[b++]) {
        for (size_t i = 0; i < 64; i++) with.seen[i] = a->seen[b][first + (i < count ? i : count - 1)];
        with.keys = a->keys.x + at * a->keys.ld, with.values = a->values.x + at * a->values.ld;
        if (a->keys16 != NULL) with.keys = a->keys16 + at * a->keys.ld, with.values = a->values16 + at * a->values.ld;
        kernels->attend[kind](&with, a->nk[b]);
    }
    memcpy(top, with.top, count * sizeof *top), memcpy(sum, with.sum, count * sizeof *sum);
    if (box_broken(&scratch)) verdict("scratch of meet", 1);
    box_free(&scratch);
}

static int attention_wrong(const attention *a, int kind, size_t lane, float got_top, float sum) {
    double score[128], top = -INFINITY, total = 0, error = 0, most = 0;
    size_t keys[128], n = 0;
    int bad = 0;
    for (size_t j = 0; j < a->nk[0] + a->nk[1]; j++) {
        size_t b = j >= a->nk[0], at = j - (b ? a->nk[0] : 0);
        double dot = 0, size = 0;
        if (at >= (size_t)a->seen[b][lane]) continue;
        for (size_t i = 0; i < a->dk; i++) {
            double term = (double)a->q.x[lane * a->q.ld + i] * (double)a->keys.x[j * a->keys.ld + i];
            dot += term, size += fabs(term);
        }
        score[n] = dot * (double)a->scale, keys[n++] = j;
        top = fmax(top, dot * (double)a->scale);
        size *= (double)a->scale;
        error = fmax(error, kind ? 1.01 * ldexp(size, -7)
                                 : ((double)(a->dk + 3) * size + fabs(dot * (double)a->scale)) * UNIT);
    }
    bad += n > 0 && !(fabs((double)got_top - top) <= error); /* the running maximum is of what is seen */
    for (size_t j = 0; j < n; j++) total += exp(score[j] - top);
    for (size_t i = 0; i < a->dv; i++) {
        double want = 0, got = (double)a->out.x[lane * a->out.ld + i] / (double)sum;
        for (size_t j = 0; j < n; j++) {
            double v = (double)a->values.x[keys[j] * a->values.ld + i];
            want += exp(score[j] - top) / total * v, most = fmax(most, fabs(v));
        }
        if (n == 0) {
            bad += a->out.x[lane * a->out.ld + i] != 0 || sum != 0;
        } else {
            double rest = kind ? 1.01 * ldexp(1, -7) : (3 * (double)n + 16) * UNIT;
            bad += !(fabs(got - want) <= (exp(2 * error) - 1 + rest) * most);
        }
    }
    return bad;
}

static void attention_fill(attention *a, int bf16) {
    size_t n = a->nk[0] + a->nk[1];
    a->keys16 = a->values16 = NULL;
    table_input(&a->q, a->lanes, a->dk), table_input(&a->keys, n, a->dk), table_input(&a->values, n, a->dv);
    for (size_t i = 0; i < a->lanes; i++) test_fill(a->q.x + i * a->q.ld, a->dk, -2, 2);
    for (size_t i = 0; i < n; i++) test_fill(a->keys.x + i * a->keys.ld, a->dk, -2, 2);
    for (size_t i = 0; i < n; i++) test_fill(a->values.x + i * a->values.ld, a->dv, -3, 3);
    for (size_t i = 0; i < 64; i++) {
        for (size_t b = 0; b < 2; b++) {
            a->seen[b][i] = (int32_t)(test_below(2) ? a->nk[b] : test_below(a->nk[b] + 1));
        }
    }
    if (!bf16) return;
    box_input(&a->keys_box, ((n - 1) * a->keys.ld + a->dk) * 2);
    box_input(&a->values_box, ((n - 1) * a->values.ld + a->dv) * 2);
    memset(a->keys_box.at, 0xFF, a->keys_box.bytes), memset(a->values_box.at, 0xFF, a->values_box.bytes);
    a->keys16 = (uint16_t *)(void *)a->keys_box.at, a->values16 = (uint16_t *)(void *)a->values_box.at;
    for (size_t j = 0; j < n; j++) {
        for (size_t i = 0; i < a->dk; i++) {
            float *x = a->keys.x + j * a->keys.ld + i;
            *x = dsv3_f32_from_bf16(a->keys16[j * a->keys.ld + i] = dsv3_bf16_from_f32(*x));
        }
        for (size_t i = 0; i < a->dv; i++) {
            float *x = a->values.x + j * a->values.ld + i;
            *x = dsv3_f32_from_bf16(a->values16[j * a->values.ld + i] = dsv3_bf16_from_f32(*x));
        }
    }
}

static void check_meet(const dsv3_context *ctx, int kind) {
    int wrong = 0, alone = 0, touched = 0;
    char text[64];
    for (size_t turn = 0; turn < 640; turn++) {
        attention a;
        float top[64], sum[64], one[MEET_DV], one_top, one_sum;
        size_t i;
        int bf16 = kind && turn % 2;
        memset(&a, 0, sizeof a);
        a.lanes = 1 + turn % 64;
        a.nk[0] = turn % 3 ? 64 : 1 + test_below(64), a.nk[1] = 1 + test_below(64);
        a.dk = 1 + (turn / 2 * 7) % MEET_DK, a.dv = 1 + (turn / 2 * 11) % MEET_DV,
        a.scale = 0.5f / sqrtf((float)a.dk);
        if (bf16) a.dk = up(a.dk, 2); /* the engine takes cache rows as they are only then */
        attention_fill(&a, bf16);
        table_output(&a.out, a.lanes, a.dv);
        attention_run(ctx, kind, &a, 0, a.lanes, a.out.x, a.out.ld, top, sum);
        for (i = 0; i < a.lanes; i++) wrong += attention_wrong(&a, kind, i, top[i], sum[i]);
        i = test_below(a.lanes);
        attention_run(ctx, kind, &a, i, 1, one, MEET_DV, &one_top, &one_sum);
        alone += !same_bits(one, a.out.x + i * a.out.ld, a.dv) || !same_bits(&one_top, top + i, 1) ||
                 !same_bits(&one_sum, sum + i, 1);
        touched += table_broken(&a.out);
        free(a.q.memory), free(a.keys.memory), free(a.values.memory), free(a.out.memory);
        if (bf16) box_free(&a.keys_box), box_free(&a.values_box);
    }
    snprintf(text, sizeof text, "exactness of meet[%d]", kind);
    verdict(text, wrong);
    snprintf(text, sizeof text, "bits alone of meet[%d]", kind);
    verdict(text, alone);
    snprintf(text, sizeof text, "guards of meet[%d]", kind);
    verdict(text, touched);
}

/* All that panels need is there. Fast products come with their rounding as codes. */
static void check_panels(const dsv3_context *ctx) {
    const dsv3i_kernels *k = dsv3i_kernels_of(ctx);
    for (int type = 0; type < DSV3_TYPES; type++) {
        dsv3i_gemm_kind fast_product = dsv3_type_block((dsv3_type)type) > 1 ? DSV3I_GEMM_FAST_BYTES : DSV3I_GEMM_FAST_BF16;
        CHECK(k->pack[type] != NULL);
        CHECK((k->round[type] != NULL) == (type >= DSV3_BF16));
        if (k->round[type] != NULL) check_round(k->round[type], (dsv3_type)type, k->gemm[fast_product] != NULL);
        if (k->pack[type] != NULL) check_pack(k, (dsv3_type)type);
        for (int fast = 0; fast < 2; fast++) {
            CHECK((k->gemv[fast][type] != NULL) == (type >= DSV3_BF16 && k->gemm[DSV3I_GEMM_FAST_BF16] != NULL));
            if (k->gemv[fast][type] != NULL) check_whole(k, 0, fast, (dsv3_type)type);
        }
        CHECK((k->gemm_packed[type] != NULL) == (k->gemv[1][type] != NULL));
        if (k->gemm_packed[type] != NULL) check_whole(k, 1, 1, (dsv3_type)type);
        if (k->gemm_packed[type] != NULL && type == DSV3_BF16) check_zeros(k);
        CHECK((k->gemv_t[type] != NULL) ==
              (type != DSV3_F32 && strncmp(ctx->backend, "a", 1) == 0 && strcmp(ctx->backend, "avx2") != 0));
        if (k->gemv_t[type] != NULL) check_mix(ctx, (dsv3_type)type);
    }
    check_widen_all(k, DSV3_F16);
    check_widen_all(k, DSV3_BF16);
    check_widen_all(k, DSV3_F8_E4M3);
    for (int kind = 0; kind < DSV3I_GEMMS; kind++) {
        CHECK(k->gemm[kind] != NULL || kind >= DSV3I_GEMM_FAST_BF16);
        if (k->gemm[kind] != NULL) check_product(k, (dsv3i_gemm_kind)kind);
    }
    CHECK(k->attend[0] != NULL);
    for (int kind = 0; kind < 2; kind++) {
        if (k->attend[kind] != NULL) check_meet(ctx, kind);
    }
}

static void check_engine(const dsv3_context *ctx) {
    CHECK(ctx->ops->own != NULL);
    if (ctx->ops->own == NULL) return;
    if (dsv3i_kernels_of(ctx)->tile != NULL) check_tile(ctx); /* of AVX2 alone: others have no use for it */
    if (dsv3i_kernels_of(ctx)->tile != NULL) check_tile_special(dsv3i_kernels_of(ctx));
    check_outer(dsv3i_kernels_of(ctx));
    check_panels(ctx);
}
#else
static void check_engine(const dsv3_context *ctx) { CHECK(ctx->ops->own == NULL); }
#endif

/* The reference has no kernels, but functions of its own that round. */
static void check_plain(const dsv3_context *ctx) {
    CHECK(ctx->ops == &dsv3i_plain && ctx->ops->own == NULL);
    for (int type = DSV3_BF16; type < DSV3_TYPES; type++) {
        check_round(dsv3_type_block((dsv3_type)type) > 1 ? plain_q8 : plain_bf16, (dsv3_type)type, 0);
    }
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
        CHECK_EQ(dsv3_backend_find(&found, name, NULL), DSV3_OK);
        CHECK_EQ(found, i);
    }
    for (size_t i = 0; i < 7; i++) CHECK_EQ(dsv3_backend_find(&found, wrong[i], NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_backend_find(NULL, "reference", NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_backend_find(&found, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_backend_find(NULL, NULL, NULL), DSV3_ERR_ARG);
    CHECK(dsv3_backend_name((dsv3_backend)99) == NULL);
    CHECK(dsv3_backend_name((dsv3_backend)DSV3_BACKENDS) == NULL);
}

/* ---- one backend, all entries ------------------------------------------------------------------------ */

static void check_backend(const dsv3_context *ctx) {
    const dsv3i_ops *k = ctx->ops;
    backend_name = ctx->backend;
    is_reference = strcmp(backend_name, "reference") == 0;
    lanes = strncmp(backend_name, "avx512", 6) == 0 ? 16 : 8;
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
    if (is_reference) check_plain(ctx);
    if (!is_reference) check_engine(ctx);
}

int main(void) {
    check_backend_names();
    for (int i = DSV3_BACKEND_REFERENCE; i < DSV3_BACKENDS; i++) {
        dsv3_context ctx;
        dsv3_result result = dsv3_context_init(&ctx, (dsv3_backend)i, 1, NULL);
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
