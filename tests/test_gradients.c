/* test_gradients.c -- every gradient against finite differences of the forward pass.
 *
 * Finite differences in float32 have two or three digits and prove little. So this program compiles the header with
 * double in the place of float: the same text, statement by statement, with another type. What it proves is that each
 * backward formula is the derivative of its forward formula, to 1e-6 of the tensor's largest gradient (an error of
 * sign, factor, index or a forgotten term is never smaller than that everywhere). What it does not prove, that
 * float32 is exact enough, is shown by tests/test_float_gradients.sh: it builds this program once more with float
 * as it is (-DGRADIENTS_FLOAT) and compares the gradients of the same models and texts with those found here.
 *
 * Weights and texts are small dyadic numbers, the same in both builds. Memory is exactly as large as was asked for
 * and full of NaN, so that whatever is read before it is written shows.
 *
 *     test_gradients             all tests
 *     test_gradients write FILE  the end-to-end gradients, for the float build
 *     (the float build)  FILE    compares its gradients with FILE
 *
 * A failure names the tensor, the worst element, and both numbers. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef GRADIENTS_FLOAT
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wkeyword-macro" /* it is what we are here for */
#elif defined(__GNUC__) /* decoders of 16 and 8 bit numbers mean floats and would read past them; nobody calls them */
#pragma GCC diagnostic ignored "-Warray-bounds"
#if __GNUC__ >= 11
#pragma GCC diagnostic ignored "-Wstringop-overread"
#endif
#endif
#define DSV3_EXPF exp
#define DSV3_LOGF log
#define DSV3_SQRTF sqrt
#define DSV3_SINF sin
#define DSV3_COSF cos
#define float double
#endif
#undef DSV3_SIMD /* the reference's gradients; what else there is, is compared with it */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "test.h"

typedef float real; /* double, but in the float build */

#define BOUND 1e-6  /* of the tensor's largest gradient */
#define FLOOR 1e-11 /* what finite differences cannot tell from 0: 1e-16 of a loss of some nats, divided by STEP */
#define STEP 5e-4   /* the five-point formula errs by STEP^4 times a fifth derivative */

/* ---- Numbers and memory */

/* A multiple of 2^-12 in [low, high]: exact in both builds. */
static double number(double low, double high) {
    double u = (double)(test_random() >> 40) / 16777216.0;
    return floor((low + (high - low) * u) * 4096.0) / 4096.0;
}

static void fill(real *x, size_t n, double low, double high) {
    for (size_t i = 0; i < n; i++) x[i] = (real)number(low, high);
}

/* Arrays of one test, given back together. */
static void *held[64];
static size_t n_held;

static void *hold(size_t bytes) {
    void *p = test_alloc(bytes);
    memset(p, 0xFF, bytes); /* NaN */
    if (n_held == sizeof held / sizeof *held) exit(2);
    return held[n_held++] = p;
}

static real *reals(size_t n, double low, double high) {
    real *x = (real *)hold(n * sizeof *x);
    fill(x, n, low, high);
    return x;
}

static void release(void) {
    while (n_held > 0) free(held[--n_held]);
}

static dsv3_tensor matrix(const real *data, size_t rows, size_t cols) {
    dsv3_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.rows = rows;
    t.cols = cols;
    t.type = DSV3_F32;
    t.rank = rows > 1 ? 2 : 1;
    return t;
}

static dsv3_context serial(void) {
    dsv3_context ctx;
    if (dsv3_context_init(&ctx, DSV3_BACKEND_REFERENCE, 1, NULL) != DSV3_OK) exit(2);
    return ctx;
}

/* ---- One tensor's gradient and what finite differences say of it */

typedef struct verdict {
    double largest, worst; /* of all gradients; error */
    double got, want;
    size_t at, checked;
} verdict;

static void verdict_add(verdict *v, size_t at, double got, double want) {
    double e = fabs(got - want);
    v->checked++;
    if (e <= v->worst) return; /* NaN is not */
    v->worst = e, v->at = at, v->got = got, v->want = want;
}

static void verdict_judge(const verdict *v, double bound, double least, const char *what, const char *tensor) {
    char text[400];
    snprintf(text, sizeof text, "%s: %s: worst error %.3g of %.3g at %zu: got %.12g, want %.12g (%zu compared)", what,
             tensor, v->worst, v->largest, v->at, v->got, v->want, v->checked);
    test_count(v->worst <= bound * v->largest + least, __FILE__, __LINE__, text);
}

static double largest_of(const real *x, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        if (!(fabs((double)x[i]) <= largest)) largest = fabs((double)x[i]);
    }
    return largest;
}

/* The weighted sum of all three losses. */
static double balance_sum(const dsv3_balance_weights *b, const real *score, const int32_t *idx, const uint8_t *mask,
                          size_t n, size_t E, size_t K, double *sums) {
    dsv3_routing all = {score, idx, mask, n, E, K, b->devices, b->most_devices}, expert = all;
    double loss[3] = {0, 0, 0};
    if (!b->actual) expert.idx = NULL;
    CHECK_EQ(dsv3_balance_loss(&loss[0], &expert, sums, NULL), DSV3_OK);
    if (b->device > 0) CHECK_EQ(dsv3_device_loss(&loss[1], &all, sums, NULL), DSV3_OK);
    if (b->communication > 0) CHECK_EQ(dsv3_communication_loss(&loss[2], &all, sums, NULL), DSV3_OK);
    return b->expert * loss[0] + b->device * loss[1] + b->communication * loss[2];
}

#ifndef GRADIENTS_FLOAT

typedef double (*objective)(void *arg);

/* df / dx[i] */
static double slope(objective f, void *arg, real *x, size_t i) {
    real middle = x[i];
    double y[4];
    for (int j = 0; j < 4; j++) {
        x[i] = middle + STEP * (j < 2 ? j - 2 : j - 1);
        y[j] = f(arg);
    }
    x[i] = middle;
    return (8.0 * (y[2] - y[1]) - (y[3] - y[0])) / (12.0 * STEP);
}

/* ---- Ops. Each is turned into a number, sum(dy * op(x)), whose gradient the backward op gives for upstream dy. What
 * stands in the outputs before (`before`) must still be in them. */

typedef struct op {
    dsv3_context ctx;
    dsv3_config c;
    dsv3_balance_weights balance;
    dsv3_tensor w;
    real *x, *y, *dy, *matrix, *scratch, *gate;
    double *sums; /* [2 E] */
    int32_t *idx;
    uint8_t *mask;
    size_t n, d, rows; /* x [n, d], y [n, rows] */
    real weight, eps;
    int interleave;
    double scale;
} op;

static double dot(const real *a, const real *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* g [n], less what stood there before, against the slopes of f by x, of about `sample` elements. */
static void check_op(const char *what, const char *tensor, objective f, op *o, real *x, const real *g,
                     const real *before, size_t n, size_t sample) {
    verdict v;
    size_t step = n / sample + 1;
    memset(&v, 0, sizeof v);
    for (size_t i = 0; i < n; i++) {
        double got = g[i] - before[i];
        v.largest = fabs(got) > v.largest ? fabs(got) : v.largest;
        if (i % step == 0) verdict_add(&v, i, got, slope(f, o, x, i));
    }
    CHECK(v.largest > 0);
    verdict_judge(&v, BOUND, FLOOR, what, tensor);
}

static void copy_reals(real *to, const real *from, size_t n) { memcpy(to, from, n * sizeof *to); }

static op op_begin(size_t n, size_t d, size_t rows) {
    op o;
    memset(&o, 0, sizeof o);
    o.ctx = serial();
    o.n = n;
    o.d = d;
    o.rows = rows;
    o.x = reals(n * d, -1, 1);
    o.y = reals(n * rows, 0, 0);
    o.dy = reals(n * rows, -1, 1);
    return o;
}

static double linear_value(void *arg) {
    op *o = (op *)arg;
    dsv3_linear(&o->ctx, o->y, o->x, &o->w, o->n, o->scratch, NULL);
    return dot(o->dy, o->y, o->n * o->rows);
}

/* More rows than one item takes, on both sides. */
static void test_linear(size_t n, size_t cols, size_t rows) {
    op o = op_begin(n, cols, rows);
    real *dx = reals(n * cols, -1, 1), *dw = reals(rows * cols, -1, 1), *other = reals(rows * cols, 0, 0);
    real *dx0 = reals(n * cols, 0, 0), *dw0 = reals(rows * cols, 0, 0);
    o.matrix = reals(rows * cols, -1, 1);
    o.w = matrix(o.matrix, rows, cols);
    o.scratch = reals(linear_floats(&o.ctx, n, cols), 0, 0);
    copy_reals(dx0, dx, n * cols);
    copy_reals(dw0, dw, rows * cols);
    dsv3_linear_backward(&o.ctx, dx, dw, o.dy, o.x, &o.w, n, o.scratch, NULL);
    check_op("linear", "dx", linear_value, &o, o.x, dx, dx0, n * cols, 1000);
    check_op("linear", "dw", linear_value, &o, o.matrix, dw, dw0, rows * cols, 1000);
    copy_reals(other, dw0, rows * cols);
    dsv3_linear_backward(&o.ctx, NULL, other, o.dy, o.x, &o.w, n, o.scratch, NULL);
    CHECK(memcmp(other, dw, rows * cols * sizeof *dw) == 0);
    copy_reals(o.x, dx0, n * cols); /* x is not needed for dx */
    dsv3_linear_backward(&o.ctx, o.x, NULL, o.dy, NULL, &o.w, n, o.scratch, NULL);
    CHECK(memcmp(o.x, dx, n * cols * sizeof *dx) == 0);
    release();
}

static double embed_value(void *arg) {
    op *o = (op *)arg;
    dsv3_embed(&o->ctx, o->y, o->idx, &o->w, o->n, NULL);
    return dot(o->dy, o->y, o->n * o->rows);
}

static void test_embed(void) {
    static int32_t token[] = {3, 0, 3, 6, 3}; /* one thrice */
    op o = op_begin(5, 1, 9);
    real *dw = reals(7 * 9, -1, 1), *before = reals(7 * 9, 0, 0);
    o.matrix = reals(7 * 9, -1, 1);
    o.w = matrix(o.matrix, 7, 9);
    o.idx = token;
    copy_reals(before, dw, 7 * 9);
    dsv3_embed_backward(dw, o.dy, token, 5, 7, 9, NULL);
    check_op("embed", "dw", embed_value, &o, o.matrix, dw, before, 7 * 9, 1000);
    release();
}

static double rmsnorm_value(void *arg) {
    op *o = (op *)arg;
    dsv3_rmsnorm(&o->ctx, o->y, o->x, &o->w, o->n, o->d, o->eps, NULL);
    return dot(o->dy, o->y, o->n * o->d);
}

/* eps large enough to matter; d beside the sizes of its loops (16 and 64). */
static void test_rmsnorm(size_t n, size_t d, double eps) {
    op o = op_begin(n, d, d);
    real *dx = reals(n * d, -1, 1), *dg = reals(d, -1, 1), *dx0 = reals(n * d, 0, 0), *dg0 = reals(d, 0, 0);
    o.matrix = reals(d, 0.5, 1.5);
    o.w = matrix(o.matrix, 1, d);
    o.eps = eps;
    o.scratch = reals(n, 0, 0);
    copy_reals(dx0, dx, n * d);
    copy_reals(dg0, dg, d);
    dsv3_rmsnorm_backward(&o.ctx, dx, dg, o.dy, o.x, &o.w, n, eps, o.scratch, NULL);
    check_op("rmsnorm", "dx", rmsnorm_value, &o, o.x, dx, dx0, n * d, 1000);
    check_op("rmsnorm", "dg", rmsnorm_value, &o, o.matrix, dg, dg0, d, 1000);
    release();
}

static double cross_entropy_value(void *arg) {
    op *o = (op *)arg;
    double sum = 0;
    dsv3_cross_entropy(&o->ctx, o->y, o->x, &o->w, o->idx, o->n, o->scratch, NULL);
    for (size_t t = 0; t < o->n; t++) sum += o->weight * o->y[t];
    return sum;
}

/* Logits of some 10 nats: a softmax with tails and a top. Targets in the first and the last piece of the vocabulary,
 * and one row without. */
static void test_cross_entropy(size_t V) {
    enum { N = 5, COLS = 3 };
    int32_t target[N];
    op o = op_begin(N, COLS, 1);
    real *du = reals(N * COLS, -1, 1), *dhead = reals(V * COLS, -1, 1), *other = reals(N * COLS, 0, 0);
    real *du0 = reals(N * COLS, 0, 0), *dhead0 = reals(V * COLS, 0, 0);
    o.matrix = reals(V * COLS, -4, 4);
    o.w = matrix(o.matrix, V, COLS);
    o.weight = 0.375;
    o.idx = target;
    o.scratch = reals(cross_entropy_floats(&o.ctx, &o.w, N), 0, 0);
    for (size_t t = 0; t < N; t++) target[t] = (int32_t)(t * (V - 1) / (N - 1));
    target[1] = DSV3_IGNORE;
    copy_reals(du0, du, N * COLS);
    copy_reals(dhead0, dhead, V * COLS);
    cross_entropy_value(&o); /* leaves its sums in scratch */
    dsv3_cross_entropy_backward(&o.ctx, du, dhead, o.weight, o.x, &o.w, target, N, o.scratch, NULL);
    copy_reals(other, du0, N * COLS);
    cross_entropy_value(&o);
    dsv3_cross_entropy_backward(&o.ctx, other, NULL, o.weight, o.x, &o.w, target, N, o.scratch, NULL);
    CHECK(memcmp(other, du, N * COLS * sizeof *du) == 0);
    CHECK(memcmp(du + COLS, du0 + COLS, COLS * sizeof *du) == 0); /* the ignored row */
    check_op("cross-entropy", "du", cross_entropy_value, &o, o.x, du, du0, N * COLS, 1000);
    check_op("cross-entropy", "dhead", cross_entropy_value, &o, o.matrix, dhead, dhead0, V * COLS, 100);
    for (size_t t = 0; t < N; t++) target[t] = DSV3_IGNORE;
    cross_entropy_value(&o);
    copy_reals(du, du0, N * COLS);
    dsv3_cross_entropy_backward(&o.ctx, du, dhead, o.weight, o.x, &o.w, target, N, o.scratch, NULL);
    CHECK(memcmp(du, du0, N * COLS * sizeof *du) == 0);
    release();
}

static double rope_value(void *arg) {
    op *o = (op *)arg;
    copy_reals(o->y, o->x, o->d);
    dsv3_rope_rotate(o->y, o->matrix, o->d, o->interleave, NULL);
    return dot(o->dy, o->y, o->d);
}

/* The angles' factor is not 1: the transpose keeps it, the inverse would divide by it. */
static void test_rope(size_t dr, int interleave) {
    uint64_t turns[4] = {(uint64_t)1 << 60, (uint64_t)3 << 57, (uint64_t)5 << 55, (uint64_t)7 << 54};
    int32_t position = 3;
    op o = op_begin(1, dr, dr);
    real *before = reals(dr, 0, 0);
    o.matrix = reals(dr, 0, 0);
    o.interleave = interleave;
    dsv3_rope_table(o.matrix, &position, turns, 1.5, 1, dr, NULL);
    copy_reals(o.y, o.dy, dr);
    o.scratch = reals(dr, 0, 0);
    copy_reals(o.scratch, o.dy, dr);
    dsv3_rope_rotate_backward(o.scratch, o.matrix, dr, interleave, NULL);
    check_op("rope", "dx", rope_value, &o, o.x, o.scratch, before, dr, 1000);
    release();
}

/* ---- The router's ops */

static double weights_value(void *arg) {
    op *o = (op *)arg;
    if (dsv3_router_weights(&o->c, o->gate, o->idx, o->x, o->n, NULL) != DSV3_OK) return NAN;
    return dot(o->dy, o->gate, o->n * o->rows);
}

static double scores_value(void *arg) {
    op *o = (op *)arg;
    dsv3_router_scores(&o->ctx, &o->c, o->y, o->x, &o->w, NULL, o->n, o->scratch, NULL);
    return dot(o->dy, o->y, o->n * o->rows);
}

static dsv3_config router_config(int32_t E, int32_t K, int norm, dsv3_gate_scaling scaling) {
    dsv3_config c = dsv3_config_default();
    c.n_routed_experts = E;
    c.num_experts_per_tok = K;
    c.norm_topk_prob = norm;
    c.gate_scaling = scaling;
    c.routed_scaling_factor = 2.5;
    return c;
}

static void test_router_weights(size_t E, size_t K, int norm, dsv3_gate_scaling scaling) {
    enum { N = 3 };
    char what[80];
    op o = op_begin(N, E, K);
    real *dscore = reals(N * E, -1, 1), *before = reals(N * E, 0, 0);
    snprintf(what, sizeof what, "router weights, E %zu, K %zu, norm %d, scaling %d", E, K, norm, (int)scaling);
    o.c = router_config((int32_t)E, (int32_t)K, norm, scaling);
    o.gate = reals(N * K, 0, 0);
    o.idx = (int32_t *)hold(N * K * sizeof(int32_t));
    fill(o.x, N * E, 0.125, 1);
    for (size_t i = 0; i < N * K; i++) o.idx[i] = (int32_t)((5 * (i / K) + 7 * (i % K) + 1) % E);
    copy_reals(before, dscore, N * E);
    dsv3_router_weights_backward(&o.c, dscore, o.dy, o.idx, o.x, N, NULL);
    check_op(what, "dscore", weights_value, &o, o.x, dscore, before, N * E, 1000);
    release();
}

/* dz is written, not added, and may be dscore. The matrix is the identity, so that x is z. */
static void test_router_scores(dsv3_scoring_func scoring) {
    enum { N = 3, E = 7 };
    op o = op_begin(N, E, E);
    real *score = reals(N * E, 0, 0), *dz = reals(N * E, 0, 0), *zero = reals(N * E, 0, 0);
    o.c = router_config(E, 2, 1, DSV3_SCALE_ALWAYS);
    o.c.scoring_func = scoring;
    o.matrix = reals(E * E, 0, 0);
    for (size_t e = 0; e < E; e++) o.matrix[e * E + e] = 1;
    o.w = matrix(o.matrix, E, E);
    o.scratch = reals(linear_floats(&o.ctx, N, E), 0, 0);
    dsv3_router_scores(&o.ctx, &o.c, score, o.x, &o.w, NULL, N, o.scratch, NULL);
    fill(dz, N * E, 5, 6); /* must not matter */
    dsv3_router_scores_backward(&o.c, dz, o.dy, score, N, NULL);
    check_op(scoring == DSV3_SOFTMAX ? "router softmax" : "router sigmoid", "dz", scores_value, &o, o.x, dz, zero,
             N * E, 1000);
    copy_reals(zero, o.dy, N * E);
    dsv3_router_scores_backward(&o.c, zero, zero, score, N, NULL);
    CHECK(memcmp(zero, dz, N * E * sizeof *dz) == 0);
    release();
}

static double balance_value(void *arg) {
    op *o = (op *)arg;
    const dsv3_balance_weights *b = &o->balance;
    size_t E = o->d, K = o->rows;
    return o->scale * balance_sum(b, o->x, o->idx, o->mask, o->n, E, K, o->sums);
}

/* kind: 0, 1, 2 one loss alone, 3 all. Scores lie well apart, so that the largest stay the largest. */
static void test_balance(int kind, int actual, int masked) {
    enum { N = 7, E = 6, K = 2 };
    char what[80];
    uint8_t mask[N] = {1, 1, 0, 1, 0, 1, 1};
    dsv3_routing routing;
    op o = op_begin(N, E, K);
    real *dscore = reals(N * E, -1, 1), *before = reals(N * E, 0, 0);
    snprintf(what, sizeof what, "balance loss %d, actual %d, masked %d", kind, actual, masked);
    o.mask = masked ? mask : NULL;
    o.sums = (double *)hold(2 * E * sizeof(double));
    o.idx = (int32_t *)hold(N * K * sizeof(int32_t));
    o.scale = 0.75;
    o.balance.expert = kind == 0 || kind == 3 ? 0.5 : 0;
    o.balance.device = kind == 1 || kind == 3 ? 0.25 : 0;
    o.balance.communication = kind == 2 || kind == 3 ? 0.125 : 0;
    o.balance.devices = 3;
    o.balance.most_devices = 2;
    o.balance.actual = actual;
    for (size_t i = 0; i < N * E; i++) o.x[i] = 0.1 + 0.1 * (double)((i / E + 5 * (i % E) * (i % E)) % 7);
    for (size_t i = 0; i < N * E; i++) o.x[i] += 0.01 * (double)(i % E);
    for (size_t i = 0; i < N * K; i++) o.idx[i] = (int32_t)((i / K / 2 + 3 * (i % K)) % E);
    copy_reals(before, dscore, N * E);
    routing = (dsv3_routing){o.x, o.idx, o.mask, N, E, K, 0, 0};
    CHECK_EQ(dsv3_balance_backward(dscore, o.scale, &o.balance, &routing, o.sums, NULL), DSV3_OK);
    check_op(what, "dscore", balance_value, &o, o.x, dscore, before, N * E, 1000);
    for (size_t e = 0; e < E && masked; e++) CHECK(memcmp(&dscore[2 * E + e], &before[2 * E + e], sizeof(real)) == 0);
    copy_reals(dscore, before, N * E);
    memset(mask, 0, sizeof mask); /* no row counts, or no score: nothing, and no 0 / 0 */
    routing.mask = mask;
    CHECK_EQ(dsv3_balance_backward(dscore, o.scale, &o.balance, &routing, o.sums, NULL), DSV3_OK);
    fill(o.x, N * E, 0, 0);
    routing.mask = NULL;
    CHECK_EQ(dsv3_balance_backward(dscore, o.scale, &o.balance, &routing, o.sums, NULL), DSV3_OK);
    CHECK(memcmp(dscore, before, N * E * sizeof *dscore) == 0);
    release();
}

/* Far from 0 the sigmoid's tails must neither overflow nor turn into NaN: d silu is 1 or 0 there. */
static void test_silu_tails(void) {
    real da[4] = {800, -800, 0, 40}, db[4] = {2, 2, 2, 2}, dh[4] = {3, 3, 3, 3}; /* at first a and b */
    dsv3_context ctx = serial();
    dsv3i_swiglu_backward(&ctx, dh, da, db, 4, NULL, NULL, 4);
    CHECK(fabs(da[0] - 6) < 1e-12 && fabs(db[0] - 2400) < 1e-9);
    CHECK(fabs(da[1]) < 1e-12 && fabs(db[1]) < 1e-12);
    CHECK(fabs(da[2] - 3) < 1e-12 && fabs(db[2]) < 1e-12);
    CHECK(fabs(da[3] - 6) < 1e-12 && fabs(db[3] - 120) < 1e-12);
}

/* Numbers that are none are seen where float is double, too: what the other tests here are told by. */
static void test_not_finite(void) {
    static const real good[] = {0, -1, 1e-300, 1e300, -1e300}, bad[] = {HUGE_VAL, -HUGE_VAL, NAN, -NAN};
    for (size_t i = 0; i < 5; i++) CHECK(dsv3i_is_finite(good[i]) && !dsv3i_is_nan(good[i]));
    for (size_t i = 0; i < 4; i++) CHECK(!dsv3i_is_finite(bad[i]) && dsv3i_is_nan(bad[i]) == (i > 1));
}

static void test_ops(void) {
    static const size_t vocabularies[] = {7, 1024, 1025, 2500};
    test_linear(1, 1, 1);
    test_linear(8, 5, 8);
    test_linear(19, 13, 21);
    test_embed();
    test_rmsnorm(1, 3, 1e-6);
    test_rmsnorm(5, 16, 0.25);
    test_rmsnorm(3, 71, 0.01);
    for (size_t i = 0; i < 4; i++) test_cross_entropy(vocabularies[i]);
    for (int interleave = 0; interleave < 2; interleave++) {
        test_rope(2, interleave);
        test_rope(6, interleave);
    }
    for (int i = 0; i < 4; i++) {
        dsv3_gate_scaling scaling = i % 2 ? DSV3_SCALE_UNLESS_NORMED : DSV3_SCALE_ALWAYS;
        test_router_weights(9, 3, i / 2, scaling);
        test_router_weights(9, 1, i / 2, scaling);
        test_router_weights(4, 4, i / 2, scaling);
    }
    test_router_scores(DSV3_SIGMOID);
    test_router_scores(DSV3_SOFTMAX);
    for (int i = 0; i < 16; i++) test_balance(i / 4, i / 2 % 2, i % 2);
    test_silu_tails();
    test_not_finite();
}

#endif /* GRADIENTS_FLOAT */

/* ---- End to end: tiny models, no two of whose sizes are equal where they could be mistaken for each other */

enum {
    V3,           /* groups, YaRN with both mscales, q_lora, one module, balance loss */
    NO_Q_LORA,    /* one q_proj, three shared experts, weights not normalised, no module */
    V2,           /* softmax, groups, not normalised, three balance losses */
    V2_LITE,      /* softmax, greedy, normalised, tied, one module, halves rotated */
    PRE_NORM,     /* two modules, states before the norm, hidden first, no shared expert, documents and padding */
    THREE,        /* three modules, tied, sequences too short for some of them */
    EVERY_SECOND, /* every other layer is MoE, K = 1 normalised: the router learns by the balance loss alone */
    ONE_EXPERT,   /* K = 1 not normalised, bias multiplied */
    TARGETS,      /* targets given, some ignored, documents, padding, two modules before the norm */
    OWN_DIVISOR,  /* two modules, hidden first, behind the norm, each depth divided by its own targets */
    DENSE,        /* no MoE layer */
    TOO_SHORT,    /* no sequence is long enough for the second module */
    ZERO_MASK,    /* dropped groups take part with 0; factor only unless normed */
    APART,        /* documents apart, two modules, padding */
    BATCH_WISE,   /* as V2, but balance losses are of the whole micro-batch; two modules, padding */
    CASES
};

static const char *const case_name[CASES] = {"v3",    "no q_lora",    "v2",         "v2 lite", "pre norm",
                                             "three", "every second", "one expert", "targets", "own divisor",
                                             "dense", "too short",    "zero mask",  "apart",   "batch-wise"};

#define ROWS 24 /* the most of a text */

typedef struct setup {
    const char *name;
    dsv3_config c;
    dsv3_training s;
    dsv3_text text;
    int32_t token[ROWS], target[ROWS], sequence[ROWS], document[ROWS];
    uint8_t mask[ROWS];
    dsv3_context ctx;
    dsv3_trainer t;
    void *memory;
    uint64_t targets[4], sequences;
    /* of the last pass, by the observer */
    uint64_t choices;    /* a hash of who was chosen, and who had the largest scores */
    double balance;      /* all balance losses, weighted */
    uint8_t used[8][16]; /* [layer][expert] by any row */
    int quiet;           /* bool: whole modules have no rows */
} setup;

/* Lengths of the sequences: digits. */
static void set_text(setup *a, const char *lengths) {
    size_t n = 0;
    for (int32_t s = 0; lengths[s] != '\0'; s++) {
        for (int i = 0; i < lengths[s] - '0'; i++) a->sequence[n++] = s;
    }
    for (size_t i = 0; i < n; i++) {
        a->token[i] = (int32_t)(test_random() % (uint64_t)a->c.vocab_size);
        a->target[i] = i % 4 == 1 ? DSV3_IGNORE : (int32_t)(test_random() % (uint64_t)a->c.vocab_size);
        a->document[i] = (int32_t)(i / 5);
        a->mask[i] = i % 7 != 4;
    }
    memset(&a->text, 0, sizeof a->text);
    a->text.rows = n;
    a->text.token = a->token;
    a->text.sequence = a->sequence;
}

static void set_config(setup *a) {
    dsv3_config *c = &a->c;
    *c = dsv3_config_default();
    c->vocab_size = 13;
    c->hidden_size = 10;
    c->intermediate_size = 9;
    c->moe_intermediate_size = 7;
    c->num_hidden_layers = 3;
    c->first_k_dense_replace = 1;
    c->num_attention_heads = 2;
    c->num_key_value_heads = 2;
    c->q_lora_rank = 8;
    c->kv_lora_rank = 6;
    c->qk_nope_head_dim = 3;
    c->qk_rope_head_dim = 4;
    c->v_head_dim = 5;
    c->n_routed_experts = 6;
    c->n_shared_experts = 1;
    c->num_experts_per_tok = 2;
    c->n_group = 1;
    c->topk_group = 1;
    c->routed_scaling_factor = 1.5;
    c->rms_norm_eps = 0.0078125; /* large enough to be missed */
    c->latent_norm_eps = 0.015625;
    c->rope_theta = 100;
    a->s = dsv3_training_default();
    a->s.lambda = 0.75;
    a->s.balance.expert = 0.25;
}

static void set_groups(dsv3_config *c, int32_t groups, int32_t best) {
    c->n_group = groups;
    c->topk_group = best;
}

static void set_softmax(setup *a, dsv3_topk_method method) {
    a->c.scoring_func = DSV3_SOFTMAX;
    a->c.topk_method = method;
    a->c.gate_scaling = DSV3_SCALE_UNLESS_NORMED;
    a->s.balance.actual = 1;
}

static void set_modules(dsv3_config *c, int32_t D, dsv3_mtp_concat concat, dsv3_mtp_hidden hidden) {
    c->num_nextn_predict_layers = D;
    c->mtp_concat = concat;
    c->mtp_hidden = hidden;
}

static void set_case_router(setup *a, int which) {
    dsv3_config *c = &a->c;
    switch (which) {
    case V3:
        set_groups(c, 3, 2);
        c->rope_scaling.type = DSV3_ROPE_YARN;
        c->rope_scaling.factor = 8;
        c->rope_scaling.original_max_position_embeddings = 16;
        c->rope_scaling.mscale = 1;
        c->rope_scaling.mscale_all_dim = 0.5;
        break;
    case NO_Q_LORA:
        c->q_lora_rank = 0;
        c->n_shared_experts = 3;
        c->norm_topk_prob = 0;
        a->s.balance.actual = 1;
        break;
    case BATCH_WISE: c->seq_aux = 0; /* fall through */
    case V2:
        set_softmax(a, DSV3_GROUP_LIMITED_GREEDY);
        set_groups(c, 3, 2);
        c->norm_topk_prob = 0;
        c->n_shared_experts = 2;
        a->s.balance.device = 0.125;
        a->s.balance.communication = 0.0625;
        a->s.balance.devices = 3;
        a->s.balance.most_devices = 2;
        break;
    case V2_LITE:
        set_softmax(a, DSV3_GREEDY);
        c->norm_topk_prob = 1;
        c->tie_word_embeddings = 1;
        c->rope_interleave = 0;
        break;
    case EVERY_SECOND:
        c->num_hidden_layers = 4;
        c->first_k_dense_replace = 0;
        c->moe_layer_freq = 2;
        c->num_experts_per_tok = 1;
        break;
    case ONE_EXPERT:
        c->num_experts_per_tok = 1;
        c->norm_topk_prob = 0;
        c->bias_form = DSV3_BIAS_MULTIPLY;
        break;
    case DENSE:
        c->n_routed_experts = c->n_shared_experts = c->num_experts_per_tok = c->moe_intermediate_size = 0;
        c->first_k_dense_replace = c->num_hidden_layers = 2;
        break;
    case ZERO_MASK:
        set_groups(c, 3, 1);
        c->group_mask = DSV3_MASK_ZERO;
        c->gate_scaling = DSV3_SCALE_UNLESS_NORMED;
        break;
    default: break;
    }
}

static void set_case(setup *a, int which) {
    dsv3_config *c = &a->c;
    const char *lengths = "514";
    memset(a, 0, sizeof *a);
    a->name = case_name[which];
    test_state = 100 + (uint64_t)which;
    set_config(a);
    set_case_router(a, which);
    if (which == V3 || which == V2_LITE) set_modules(c, 1, c->mtp_concat, c->mtp_hidden);
    if (which == PRE_NORM) set_modules(c, 2, DSV3_MTP_HIDDEN_FIRST, DSV3_MTP_PRE_NORM), lengths = "93";
    if (which == THREE) set_modules(c, 3, DSV3_MTP_EMBED_FIRST, DSV3_MTP_POST_NORM), lengths = "2631";
    if (which == TARGETS) set_modules(c, 2, DSV3_MTP_EMBED_FIRST, DSV3_MTP_PRE_NORM), lengths = "57";
    if (which == OWN_DIVISOR) set_modules(c, 2, DSV3_MTP_HIDDEN_FIRST, DSV3_MTP_POST_NORM), lengths = "53";
    if (which == APART) set_modules(c, 2, DSV3_MTP_EMBED_FIRST, DSV3_MTP_POST_NORM), lengths = "97";
    if (which == BATCH_WISE) set_modules(c, 2, DSV3_MTP_EMBED_FIRST, DSV3_MTP_POST_NORM), lengths = "5724";
    if (which == TOO_SHORT) set_modules(c, 2, DSV3_MTP_EMBED_FIRST, DSV3_MTP_POST_NORM), lengths = "2212";
    if (which == PRE_NORM) c->n_shared_experts = 0;
    if (which == THREE) c->tie_word_embeddings = 1;
    if (which == OWN_DIVISOR || which == PRE_NORM) a->s.divisor = DSV3_DIVIDE_BY_VALID;
    set_text(a, lengths);
    if (which == TARGETS || which == TOO_SHORT) a->text.target = a->target;
    if (which == TARGETS || which == PRE_NORM || which == APART) a->text.document = a->document, a->text.mask = a->mask;
    if (which == APART) a->text.apart = 1;
    if (which == TOO_SHORT) a->quiet = 1;
    if (which == BATCH_WISE) a->text.mask = a->mask;
}

/* ---- The trainer of a setup */

/* Own hash, of sets: the order of equals does not matter. */
static uint64_t choice_hash(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    uint64_t z = a * 0x9E3779B97F4A7C15u + b * 0xBF58476D1CE4E5B9u + c * 0x94D049BB133111EBu + d + 1;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    return z ^ (z >> 27);
}

/* Of the rows of one sequence. */
static double balance_of(const setup *a, const real *score, const int32_t *idx, const uint8_t *mask, size_t n) {
    size_t E = (size_t)a->c.n_routed_experts, K = (size_t)a->c.num_experts_per_tok;
    const dsv3_balance_weights *b = &a->s.balance;
    double sums[64];
    return balance_sum(b, score, idx, mask, n, E, K, sums);
}

static void see_routing(void *user, int32_t layer, const real *score, const int32_t *idx, const real *gate,
                        size_t n) {
    setup *a = (setup *)user;
    size_t E = (size_t)a->c.n_routed_experts, K = (size_t)a->c.num_experts_per_tok;
    int32_t depth = layer < a->c.num_hidden_layers ? 0 : layer - a->c.num_hidden_layers + 1;
    const dsv3i_workspace *ws = &a->t.own->depth[depth].ws; /* each depth has its own rows */
    (void)gate;
    for (size_t i = 0; i < n * K; i++) {
        a->choices += choice_hash((uint64_t)layer, i / K, (uint64_t)idx[i], 0);
        a->used[layer][idx[i]] = 1;
    }
    for (size_t t = 0; t < n; t++) {
        for (size_t e = 0; e < E; e++) {
            size_t above = 0;
            for (size_t j = 0; j < E; j++) above += score[t * E + j] > score[t * E + e];
            if (above < K) a->choices += choice_hash((uint64_t)layer, t, e, 1);
        }
    }
    if (!a->c.seq_aux) a->balance += (double)a->sequences * balance_of(a, score, idx, ws->row_mask, n);
    for (size_t begin = 0, end; begin < n && a->c.seq_aux; begin = end) {
        for (end = begin + 1; end < n && ws->sequence[end] == ws->sequence[begin]; end++) {
        }
        a->balance += balance_of(a, score + begin * E, idx + begin * K, ws->row_mask + begin, end - begin);
    }
}

static dsv3_result weight_tensor(void *user, const dsv3_tensor_info *info) {
    real **at = (real **)user;
    size_t n = info->rows * info->cols;
    double width = info->kind == DSV3_KIND_EMBED ? 1.5 : sqrt(3.0 / (double)info->cols);
    if (info->optional) return DSV3_OK;
    if (info->rank == 2) fill(*at, n, -width, width);
    if (info->rank == 1) fill(*at, n, 0.5, 1.5);
    if (info->rank == 1 && info->kind == DSV3_KIND_ROUTER) fill(*at, n, -0.125, 0.125);
    *at += n;
    return DSV3_OK;
}

static void open_setup(setup *a, uint64_t seed) {
    size_t bytes = 0;
    real *at;
    dsv3_error error;
    a->ctx = serial();
    a->ctx.observer.user = a;
    a->ctx.observer.routing = see_routing;
    a->s.rows = a->text.rows;
    a->s.sequences = (size_t)a->sequence[a->text.rows - 1] + 1;
    a->s.longest = 9;
    if (dsv3_config_check(&a->c, &error) != DSV3_OK) {
        fprintf(stderr, "%s: %s %s\n", a->name, error.name, error.why);
        exit(2);
    }
    CHECK_EQ(dsv3_trainer_size(&a->c, &a->s, 1, &bytes, NULL), DSV3_OK);
    a->memory = test_alloc(bytes);
    memset(a->memory, 0xFF, bytes);
    CHECK_EQ(dsv3_trainer_init(&a->c, &a->t, &a->s, 1, a->memory, bytes, NULL), DSV3_OK);
    test_state = seed;
    at = a->t.weights.data;
    dsv3_model_tensors(&a->c, weight_tensor, &at, NULL);
    CHECK_EQ(at - a->t.weights.data, a->t.weights.count);
    memset(a->targets, 0, sizeof a->targets);
    a->sequences = 0;
    dsv3_text_count(&a->text, (size_t)a->c.num_nextn_predict_layers, a->targets, &a->sequences, NULL);
}

static void close_setup(setup *a) { free(a->memory); }

static void begin_pass(setup *a) {
    dsv3_train_begin(&a->t, a->targets, a->sequences, NULL);
    a->choices = 0;
    a->balance = 0;
    memset(a->used, 0, sizeof a->used);
}

/* One step's gradients and loss terms. */
static void pass(setup *a) {
    dsv3_error error;
    char text[256];
    dsv3_result result;
    begin_pass(a);
    result = dsv3_train_accumulate(&a->ctx, &a->t, &a->text, &error);
    if (result == DSV3_OK) return;
    fprintf(stderr, "%s: %s\n", a->name, dsv3_error_text(&error, text, sizeof text));
    exit(2);
}

/* The total as the head of chapter 12 writes it, from the sums of the last pass. */
static double total_loss(const setup *a) {
    double total = a->sequences > 0 ? a->balance / (double)a->sequences : 0;
    size_t D = (size_t)a->c.num_nextn_predict_layers;
    for (size_t k = 0; k <= D; k++) {
        uint64_t terms = a->targets[a->s.divisor == DSV3_DIVIDE_BY_VALID ? k : 0];
        double weight = k == 0 ? 1 : a->s.lambda / (double)D;
        if (terms > 0) total += weight * a->t.losses.nll[k] / (double)terms;
    }
    return total;
}

static real *copy_gradients(const setup *a) {
    real *g = (real *)test_alloc(a->t.gradients.count * sizeof *g);
    memcpy(g, a->t.gradients.data, a->t.gradients.count * sizeof *g);
    return g;
}

/* ---- A walk over the tensors with their gradients */

typedef struct walk {
    setup *a;
    const real *g, *other; /* gradients of all parameters */
    const double *want;
    size_t at;
    size_t checked, skipped, zeros, unexpected;
    double bound, least;
    const char *what;
    int (*take)(const dsv3_tensor_info *info); /* NULL: every tensor */
} walk;

static dsv3_result walk_on(walk *w, const dsv3_tensor_info *info) {
    w->at += info->rows * info->cols;
    return DSV3_OK;
}

/* Must this tensor's gradient be 0 exactly? */
static int must_be_zero(const setup *a, const dsv3_tensor_info *info) {
    if (info->kind == DSV3_KIND_ROUTER && info->rank == 1) return 1;
    return info->expert >= 0 && !a->used[info->layer][info->expert];
}

#ifndef GRADIENTS_FLOAT

static double setup_value(void *arg) {
    setup *a = (setup *)arg;
    pass(a);
    return total_loss(a);
}

/* df / dx[i], or NaN when a choice changes on the way: the loss jumps there. */
static double slope_of_setup(setup *a, real *x, size_t i, uint64_t choices) {
    real middle = x[i];
    double y[4];
    int same = 1;
    for (int j = 0; j < 4; j++) {
        x[i] = middle + STEP * (j < 2 ? j - 2 : j - 1);
        y[j] = setup_value(a);
        same &= a->choices == choices;
    }
    x[i] = middle;
    return same ? (8.0 * (y[2] - y[1]) - (y[3] - y[0])) / (12.0 * STEP) : NAN;
}

static dsv3_result difference_tensor(void *user, const dsv3_tensor_info *info) {
    walk *w = (walk *)user;
    setup *a = w->a;
    size_t n = info->rows * info->cols, sample = info->expert >= 0 ? 4 : 10;
    uint64_t choices = a->choices;
    verdict v;
    if (info->optional) return DSV3_OK;
    memset(&v, 0, sizeof v);
    v.largest = largest_of(w->g + w->at, n);
    if (!(v.largest > 0)) {
        w->zeros++;
        w->unexpected += info->expert < 0 && !must_be_zero(a, info); /* an expert's rows may all be without a loss */
        sample = 2;
    } else if (must_be_zero(a, info)) {
        verdict_add(&v, 0, v.largest, 0);
    }
    for (size_t i = 0; i < sample && i < n; i++) {
        size_t at = n <= sample ? i : (size_t)(test_random() % n);
        double want;
        if (info->kind == DSV3_KIND_ROUTER && info->rank == 1) break; /* outside the gradient */
        want = slope_of_setup(a, a->t.weights.data + w->at, at, choices);
        w->skipped += isnan(want) != 0;
        if (!isnan(want)) verdict_add(&v, at, w->g[w->at + at], want);
    }
    pass(a); /* used[] is of the unchanged model again */
    w->checked += v.checked;
    verdict_judge(&v, BOUND, FLOOR, a->name, info->name);
    return walk_on(w, info);
}

/* Every parameter tensor of a model against finite differences. */
static void test_differences(setup *a, const real *g) {
    walk w;
    memset(&w, 0, sizeof w);
    w.a = a;
    w.g = g;
    pass(a);
    CHECK(a->t.losses.sequences == a->sequences);
    for (int32_t k = 0; k <= a->c.num_nextn_predict_layers; k++) CHECK_EQ(a->t.losses.targets[k], a->targets[k]);
    CHECK(fabs(dsv3_train_loss(&a->t) - total_loss(a)) <= 1e-13 * total_loss(a));
    dsv3_model_tensors(&a->c, difference_tensor, &w, NULL);
    CHECK_EQ(w.at, a->t.weights.count);
    CHECK(w.unexpected == 0 || a->quiet);
    CHECK(w.skipped * 10 <= w.checked);
    if (getenv("GRADIENTS_VERBOSE")) {
        printf("%-12s %6zu parameters, %4zu elements compared, %3zu skipped, %2zu tensors 0\n", a->name, w.at,
               w.checked, w.skipped, w.zeros);
    }
}

/* All eight keep policies give the same bits; so do others in every layer. */
static void test_keep(int which, const real *g) {
    for (int32_t keep = 0; keep < 16; keep++) {
        setup a;
        char text[80];
        int32_t layers[8];
        for (int32_t i = 0; i < 8; i++) layers[i] = (keep + 3 * i) % 8;
        set_case(&a, which);
        a.s.keep = keep % 8;
        if (keep >= 8) a.s.keep_layers = layers;
        open_setup(&a, 7);
        pass(&a);
        snprintf(text, sizeof text, "%s: gradients with keep %d%s", a.name, (int)keep % 8,
                 keep < 8 ? "" : ", other layers others");
        test_count(memcmp(a.t.gradients.data, g, a.t.gradients.count * sizeof *g) == 0, __FILE__, __LINE__, text);
        close_setup(&a);
    }
}

static dsv3_result compare_tensor(void *user, const dsv3_tensor_info *info) {
    walk *w = (walk *)user;
    verdict v;
    if (info->optional) return DSV3_OK;
    memset(&v, 0, sizeof v);
    for (size_t i = 0; i < info->rows * info->cols; i++) verdict_add(&v, i, w->g[w->at + i], w->other[w->at + i]);
    v.largest = largest_of(w->other + w->at, info->rows * info->cols);
    if (w->take == NULL || w->take(info)) verdict_judge(&v, w->bound, w->least, w->what, info->name);
    return walk_on(w, info);
}

/* Gradients got and want of the config's tensors that `take` takes. */
static void compare_gradients(setup *a, const real *got, const real *want, int (*take)(const dsv3_tensor_info *),
                              const char *what) {
    walk w;
    memset(&w, 0, sizeof w);
    w.a = a;
    w.g = got;
    w.other = want;
    w.take = take;
    w.bound = 1e-12;
    w.least = 1e-15;
    w.what = what;
    dsv3_model_tensors(&a->c, compare_tensor, &w, NULL);
}

/* One micro-batch per sequence: the same sums but for rounding. */
static void test_split(setup *a, const real *g) {
    char what[80];
    begin_pass(a);
    for (size_t begin = 0, end; begin < a->text.rows; begin = end) {
        dsv3_text part = a->text;
        dsv3_error error;
        for (end = begin + 1; end < a->text.rows && a->sequence[end] == a->sequence[begin]; end++) {
        }
        part.rows = end - begin;
        part.token += begin;
        part.sequence += begin;
        if (part.target != NULL) part.target += begin;
        if (part.document != NULL) part.document += begin;
        if (part.mask != NULL) part.mask += begin;
        CHECK_EQ(dsv3_train_accumulate(&a->ctx, &a->t, &part, &error), DSV3_OK);
    }
    snprintf(what, sizeof what, "%s, split", a->name);
    compare_gradients(a, a->t.gradients.data, g, NULL, what);
}

/* ---- Detached parts. The references are the gradients without detaching, those of the main model alone (the same
 * weights, no modules), and for the embedding, which modules and main model share, the gradient by a copy of it that
 * only the modules see. */

static int is_main(const dsv3_tensor_info *info) { return info->layer < 3 && info->kind != DSV3_KIND_MTP; }
static int is_trunk(const dsv3_tensor_info *info) {
    return is_main(info) && info->kind != DSV3_KIND_EMBED && info->kind != DSV3_KIND_HEAD;
}
static int is_module(const dsv3_tensor_info *info) { return !is_main(info); }
static int is_head(const dsv3_tensor_info *info) { return info->kind == DSV3_KIND_HEAD; }
static int is_embed(const dsv3_tensor_info *info) { return info->kind == DSV3_KIND_EMBED; }

static real *detached(setup *a, int trunk, int head) {
    a->t.settings.detach_trunk = trunk;
    a->t.settings.detach_head = head;
    pass(a);
    a->t.settings.detach_trunk = a->t.settings.detach_head = 0;
    return copy_gradients(a);
}

/* The embedding's gradient that comes through the modules' inputs, by differences: x is the modules' copy. */
static void check_direct(setup *a, const real *full, const real *without) {
    size_t n = (size_t)(a->c.vocab_size * a->c.hidden_size);
    real *copy = (real *)test_alloc(n * sizeof *copy);
    uint64_t choices;
    verdict v;
    memset(&v, 0, sizeof v);
    copy_reals(copy, a->t.weights.data, n);
    for (int32_t k = 0; k < a->c.num_nextn_predict_layers; k++) a->t.weights.model.mtp[k].embed_tokens.data = copy;
    pass(a);
    choices = a->choices;
    for (size_t i = 0; i < n; i++) {
        double got = full[i] - without[i], want;
        v.largest = fabs(got) > v.largest ? fabs(got) : v.largest;
        if (i % 5 != 0) continue;
        want = slope_of_setup(a, copy, i, choices);
        if (!isnan(want)) verdict_add(&v, i, got, want);
    }
    for (int32_t k = 0; k < a->c.num_nextn_predict_layers; k++) {
        a->t.weights.model.mtp[k].embed_tokens = a->t.weights.model.embed_tokens;
    }
    CHECK(v.largest > 0 && v.checked > 10);
    verdict_judge(&v, BOUND, FLOOR, "detach", "embedding by the modules' copy");
    free(copy);
}

static void test_detach(int which) {
    setup a, alone;
    real *full, *trunk, *head, *both, *sum;
    size_t n;
    set_case(&a, which);
    open_setup(&a, 7);
    set_case(&alone, which);
    alone.c.num_nextn_predict_layers = 0;
    open_setup(&alone, 7); /* the same weights: modules come last */
    pass(&alone);
    full = detached(&a, 0, 0);
    trunk = detached(&a, 1, 0);
    head = detached(&a, 0, 1);
    both = detached(&a, 1, 1);
    compare_gradients(&alone, both, alone.t.gradients.data, NULL, "both detached: the main model alone");
    compare_gradients(&alone, trunk, alone.t.gradients.data, is_trunk, "trunk detached: the main model's layers");
    compare_gradients(&a, trunk, full, is_module, "trunk detached: modules");
    compare_gradients(&a, head, full, is_module, "head detached: modules");
    compare_gradients(&a, both, full, is_module, "both detached: modules");
    compare_gradients(&a, head, full, is_trunk, "head detached: the main model's layers");
    if (!a.c.tie_word_embeddings) { /* else the embedding is the head, and only the case of both is simple */
        compare_gradients(&a, trunk, full, is_head, "trunk detached: head");
        compare_gradients(&alone, head, alone.t.gradients.data, is_head, "head detached: head");
        check_direct(&a, full, head);
        n = (size_t)(a.c.vocab_size * a.c.hidden_size);
        sum = (real *)test_alloc(a.t.weights.count * sizeof *sum);
        copy_reals(sum, alone.t.gradients.data, alone.t.weights.count);
        for (size_t i = 0; i < n; i++) sum[i] += full[i] - head[i];
        compare_gradients(&alone, trunk, sum, is_embed, "trunk detached: embedding");
        free(sum);
    }
    free(full), free(trunk), free(head), free(both);
    close_setup(&a);
    close_setup(&alone);
}

/* Nothing to learn from: no gradient but the balance loss's, and none at all without it. */
static void test_no_targets(int which) {
    setup a;
    set_case(&a, which);
    for (size_t i = 0; i < a.text.rows; i++) a.target[i] = DSV3_IGNORE;
    a.text.target = a.target;
    open_setup(&a, 7);
    for (int32_t k = 0; k <= a.c.num_nextn_predict_layers; k++) CHECK_EQ(a.targets[k], 0);
    pass(&a);
    CHECK(a.t.losses.nll[0] <= 0 && a.t.losses.nll[0] >= 0);
    CHECK(largest_of(a.t.gradients.data, a.t.gradients.count) > 0);
    a.t.settings.balance.expert = 0;
    pass(&a);
    CHECK(largest_of(a.t.gradients.data, a.t.gradients.count) <= 0);
    CHECK(dsv3_train_loss(&a.t) <= 0 && dsv3_train_loss(&a.t) >= 0);
    close_setup(&a);
}

static void write_gradients(FILE *f, setup *a, const real *g) {
    uint64_t count = a->t.gradients.count;
    if (fwrite(&count, sizeof count, 1, f) != 1 || fwrite(g, sizeof *g, (size_t)count, f) != count) exit(2);
}

int main(int argc, char **argv) {
    FILE *out = argc == 3 && strcmp(argv[1], "write") == 0 ? fopen(argv[2], "wb") : NULL;
    if (argc > 1 && out == NULL) return 2;
    if (out == NULL) test_ops();
    for (int which = 0; which < CASES; which++) {
        setup a;
        real *g;
        set_case(&a, which);
        open_setup(&a, 7);
        pass(&a);
        g = copy_gradients(&a);
        if (out != NULL) write_gradients(out, &a, g);
        if (out == NULL) {
            test_differences(&a, g);
            if (a.c.seq_aux) test_split(&a, g); /* else the balance loss is of each part */
            test_keep(which, g);
        }
        free(g);
        close_setup(&a);
    }
    if (out != NULL) return fclose(out) != 0;
    test_detach(PRE_NORM);
    test_detach(OWN_DIVISOR);
    test_detach(THREE);
    test_no_targets(V3);
    test_no_targets(THREE);
    return test_done("gradients");
}

#else

/* The float build: every tensor's gradient against the double build's, to 1e-4 of its largest. */
static dsv3_result float_tensor(void *user, const dsv3_tensor_info *info) {
    walk *w = (walk *)user;
    size_t n = info->rows * info->cols;
    verdict v;
    if (info->optional) return DSV3_OK;
    memset(&v, 0, sizeof v);
    for (size_t i = 0; i < n; i++) {
        double want = w->want[w->at + i];
        v.largest = fabs(want) > v.largest ? fabs(want) : v.largest;
        verdict_add(&v, i, (double)w->g[w->at + i], want);
    }
    if (must_be_zero(w->a, info)) CHECK(largest_of(w->g + w->at, n) <= 0);
    verdict_judge(&v, 1e-4, w->least, w->a->name, info->name);
    return walk_on(w, info);
}

static void compare_file(FILE *f, int which) {
    setup a;
    walk w;
    uint64_t count = 0;
    double *want, loss;
    real *first;
    set_case(&a, which);
    open_setup(&a, 7);
    pass(&a);
    first = copy_gradients(&a);
    loss = total_loss(&a);
    CHECK(fabs(dsv3_train_loss(&a.t) - loss) <= 1e-6 * loss);
    if (fread(&count, sizeof count, 1, f) != 1 || count != a.t.gradients.count) exit(2);
    want = (double *)test_alloc(count * sizeof *want);
    if (fread(want, sizeof *want, count, f) != count) exit(2);
    memset(&w, 0, sizeof w);
    w.a = &a;
    w.g = a.t.gradients.data;
    w.want = want;
    w.least = 2e-7 * largest_of(w.g, count); /* what cancels in double leaves float's rounding */
    dsv3_model_tensors(&a.c, float_tensor, &w, NULL);
    free(want);
    close_setup(&a);
    for (int32_t keep = 1; keep < 8; keep++) {
        set_case(&a, which);
        a.s.keep = keep;
        open_setup(&a, 7);
        pass(&a);
        CHECK(memcmp(a.t.gradients.data, first, count * sizeof *first) == 0);
        close_setup(&a);
    }
    free(first);
}

int main(int argc, char **argv) {
    FILE *f = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (f == NULL) return 2;
    (void)reals, (void)release, (void)matrix;
    for (int which = 0; which < CASES; which++) compare_file(f, which);
    fclose(f);
    return test_done("float_gradients");
}
#endif
