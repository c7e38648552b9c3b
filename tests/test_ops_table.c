/* test_ops_table.c -- the table of ops (chapter 2, >>table): each op of each backend against the plain op, by name.
 *
 * A failure means that a backend computes something else than the book does: a term, a key, a row or a scale that is
 * missing, counted twice or taken from elsewhere; a gradient that is set where it should be added; a write outside its
 * outputs or its scratch; a number that it should not have read; or results that change with the number of threads.
 *
 * How it is proved. For every case the test computes, in double and straight from the formula, what the op must give: a
 * value v and a radius r, such that whoever takes the same sums in float32, in any order, lies within r of v (struct
 * known). Radii are derived stage by stage: how many roundings a stage has, and what it makes of the radius of the stage
 * before. No factor is fitted. Then the plain op must lie within r of v, and an op of a backend within r + r of the
 * plain op. Which is sharp enough to see a single missing term: r is some 1e-5 of the sum of its terms' sizes.
 *
 * u = 2^-24 is the relative error of one float32 operation, and gamma(k) = k u / (1 - k u) that of k of them in a row.
 *
 * All backends of this CPU run, one after the other, with one thread and with three (items of loops in three hands, from
 * the last to the first), with junk in the scratch, which has exactly the size that the book asks for, and guards around
 * all that is read or written. Option -v prints the worst error of each op in parts of its bound. */
#define DSV3I_SERIAL_WORK 1u /* loops are cut, however small they are */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"

#define U ldexp(1.0, -24)
#define COARSE ldexp(1.0, -9) /* the same of rounding to BF16 */

static double roundings(size_t k) { return (double)k * U / (1 - (double)k * U); }

/* ---- Memory: everything lies between guards, once of NaNs, so that reading one shows, and once of numbers, so that adding
 * to one does. What was taken since a mark is checked and given back together. */

#define GUARD 64u    /* bytes before */
#define BEHIND 2048u /* and behind */
#define MOST 4096

typedef struct taken {
    unsigned char *memory, *x;
    size_t bytes;
    unsigned char guard;
} taken;

static taken taken_list[MOST];
static size_t n_taken;
static unsigned char guard = 0xFF;

/* `past` bytes behind a multiple of 64. Filled with what guards are made of. */
static void *bytes_new(size_t bytes, size_t past) {
    taken *p = &taken_list[n_taken++];
    if (n_taken == MOST) fprintf(stderr, "too much is taken\n"), exit(2);
    p->memory = (unsigned char *)test_alloc(bytes + past + 2 * GUARD + BEHIND);
    p->x = p->memory + GUARD;
    p->x += (64 - (uintptr_t)p->x % 64) % 64 + past;
    p->bytes = bytes;
    p->guard = guard;
    memset(p->memory, guard, bytes + past + 2 * GUARD + BEHIND);
    return p->x;
}

static float *floats_new(size_t n, size_t past) {
    return (float *)bytes_new(n * sizeof(float), past * sizeof(float));
}

static double *doubles_new(size_t n) {
    double *x = (double *)bytes_new(n * sizeof(double), 0);
    for (size_t i = 0; i < n; i++) x[i] = 0;
    return x;
}

static float *random_new(size_t n, float most) {
    float *x = floats_new(n, 1 + n % 3);
    for (size_t i = 0; i < n; i++) x[i] = test_uniform(0.25f * most, most) * (test_below(2) ? 1.0f : -1.0f);
    return x;
}

static float *copy_new(const float *x, size_t n, size_t past) {
    float *y = floats_new(n, past);
    memcpy(y, x, n * sizeof *x);
    return y;
}

static void release(size_t mark, const char *what) {
    size_t broken = 0;
    while (n_taken > mark) {
        const taken *p = &taken_list[--n_taken];
        for (size_t i = 0; i < GUARD; i++) broken += p->x[-1 - (int)i] != p->guard;
        for (size_t i = 0; i < BEHIND; i++) broken += p->x[p->bytes + i] != p->guard;
        free(p->memory);
    }
    if (broken > 0) fprintf(stderr, "%s: bytes written outside: %u\n", what, (unsigned)broken);
    test_count(broken == 0, __FILE__, __LINE__, "guards");
}

/* ---- Verdicts, and the worst of them for each name */

typedef struct worst {
    char name[96];
    double ratio;
} worst;

static worst worsts[MOST];
static size_t n_worsts;
static const char *backend = ""; /* under test */

static void remember(const char *name, double ratio) {
    size_t i = 0;
    while (i < n_worsts && strcmp(worsts[i].name, name) != 0) i++;
    if (i == MOST) return;
    if (i == n_worsts) snprintf(worsts[n_worsts++].name, sizeof worsts[0].name, "%s", name);
    if (!(ratio <= worsts[i].ratio)) worsts[i].ratio = ratio;
}

/* |got - want| <= r + s for n numbers; where r + s is 0 they must be equal. */
static void compare_double(const char *op, const float *got, const double *want, const double *r, const double *s,
                           size_t n) {
    double most = 0;
    size_t at = 0;
    char name[96], text[256];
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - want[i]), bound = (r[i] + (s != NULL ? s[i] : 0)) * (1 + 1e-6);
        double ratio = e > 0 ? (bound > 0 ? e / bound : 1e30) : isnan(e) ? 1e30 : 0;
        if (ratio > most) most = ratio, at = i;
    }
    snprintf(name, sizeof name, "%s %s", backend, op);
    remember(name, most);
    if (most <= 1) {
        test_passed++;
        return;
    }
    snprintf(text, sizeof text, "%s: %.3g of the bound, at %u of %u: got %.9g, want %.9g, bound %.3g", name, most,
             (unsigned)at, (unsigned)n, (double)got[at], want[at], r[at] + (s != NULL ? s[at] : 0));
    test_count(0, __FILE__, __LINE__, text);
}

static void compare(const char *op, const float *got, const float *want, const double *r, const double *s, size_t n) {
    double *x = (double *)test_alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (double)want[i];
    compare_double(op, got, x, r, s, n);
    free(x);
}

static void same_bits(const char *what, const float *a, const float *b, size_t n) {
    char text[160];
    if (memcmp(a, b, n * sizeof *a) == 0) {
        test_passed++;
        return;
    }
    snprintf(text, sizeof text, "%s %s: other bits", backend, what);
    test_count(0, __FILE__, __LINE__, text);
}

/* ---- Backends */

static dsv3_context plain, contexts[DSV3_BACKENDS];
static size_t n_contexts;

/* Does this backend round to BF16 what attention multiplies, with DSV3_FAST? (See dsv3_compute.) */
static int is_coarse(const dsv3_context *ctx) {
    return ctx->compute == DSV3_FAST &&
           (strcmp(ctx->backend, "avx512_bf16") == 0 || strcmp(ctx->backend, "amx") == 0);
}

/* Parts of 1, 2, 3, 1 .. items, the last one first, in turn by each worker. */
static void backwards(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    (void)user;
    for (size_t end = n, i = 0; end > 0; i++) {
        size_t part = 1 + i % 3 < end ? 1 + i % 3 : end;
        task(arg, end - part, end, i % threads);
        end -= part;
    }
}

/* Backend i with these settings; turn 0: one thread, guards of NaNs, 1: three threads, guards of numbers. */
static dsv3_context context_of(size_t i, dsv3_compute compute, size_t turn) {
    dsv3_context ctx = contexts[i];
    backend = ctx.backend;
    guard = turn == 0 ? 0xFF : 0x46;
    ctx.compute = compute;
    ctx.threads = turn == 0 ? 1 : 3;
    ctx.parallel_for = turn == 0 ? NULL : backwards;
    return ctx;
}

static dsv3_context plain_of(dsv3_compute compute) {
    dsv3_context ctx = plain;
    backend = "reference";
    guard = 0xFF;
    ctx.compute = compute;
    return ctx;
}

/* ---- What an op must give */

typedef struct known {
    double *v, *r;
} known;

static known known_new(size_t n) {
    known k;
    k.v = doubles_new(n);
    k.r = doubles_new(n);
    return k;
}

static known known_of(const float *x, size_t n) {
    known k = known_new(n);
    for (size_t i = 0; i < n; i++) k.v[i] = (double)x[i];
    return k;
}

/* y [n, rows] = x [n, k] W^T. A term is rounded at most three times before it is added: as x (a multiple of the scale of its
 * 32), as w (code times scale), as their product. Then come at most k - 1 additions, or, block by block, as many and two
 * multiplications by scales, one of them rounded itself. So |error| <= gamma(k + 5) sum |x w|, whatever the order; and
 * errors of x enter with their weight. (Sums of whole numbers within a block are exact.) */
static known known_linear(const known *x, size_t n, size_t k, const double *w, size_t rows) {
    known y = known_new(n * rows);
    double gamma = roundings(k + 5);
    for (size_t t = 0; t < n; t++) {
        const double *v = x->v + t * k, *e = x->r + t * k;
        for (size_t r = 0; r < rows; r++) {
            const double *row = w + r * k;
            double sum = 0, size = 0, error = 0;
            for (size_t i = 0; i < k; i++) {
                double a = fabs(row[i]);
                sum += v[i] * row[i];
                size += fabs(v[i]) * a;
                error += e[i] * a;
            }
            y.v[t * rows + r] = sum;
            y.r[t * rows + r] = error + gamma * (size + error);
        }
    }
    return y;
}

static double bf16(double x) { return (double)dsv3_f32_from_bf16(dsv3_bf16_from_f32((float)x)); }

/* 32 numbers become multiples of 1 / 127 of the largest. If they are known exactly, chapter 3 says which, and everybody finds
 * the same. Else, with T0 <= largest <= T1, number i is q T / 127 with q between the nearest whole numbers to its least and
 * its greatest possible quotient, each taken 1e-6 wider, since quotients are rounded three times. */
static void known_q8(double *v, double *r) {
    double t0 = 0, t1 = 0, errors = 0;
    float x[32];
    for (size_t i = 0; i < 32; i++) errors += r[i], x[i] = (float)v[i];
    if (!(errors > 0)) dsv3i_round_q8(x, x, 32);
    for (size_t i = 0; i < 32 && !(errors > 0); i++) v[i] = (double)x[i];
    if (!(errors > 0)) return;
    for (size_t i = 0; i < 32; i++) {
        if (fabs(v[i]) - r[i] > t0) t0 = fabs(v[i]) - r[i];
        if (fabs(v[i]) + r[i] > t1) t1 = fabs(v[i]) + r[i];
    }
    for (size_t i = 0; i < 32; i++) {
        double low = v[i] - r[i], high = v[i] + r[i];
        if (!(t0 > 0)) continue;
        low = low * 127 / (low > 0 ? t1 : t0), high = high * 127 / (high > 0 ? t0 : t1);
        low -= 1e-6 * fabs(low), high += 1e-6 * fabs(high);
        low = fmax(nearbyint(low), -127), high = fmin(nearbyint(high), 127);
        low *= (low > 0 ? t0 : t1) / 127, high *= (high > 0 ? t1 : t0) / 127;
        v[i] = (low + high) / 2;
        r[i] = (high - low) / 2 * (1 + 1e-9);
    }
}

/* x [n] as products with weights of this type take it. Rounding never turns two numbers round, so that what lies
 * between v - r and v + r lies between their roundings afterwards. Where r is 0, all round to the same number. */
static known known_rounded(const known *x, size_t n, dsv3_type type, dsv3_compute compute) {
    known y = known_new(n);
    memcpy(y.v, x->v, n * sizeof(double));
    memcpy(y.r, x->r, n * sizeof(double));
    if (compute == DSV3_EXACT || type == DSV3_F32 || type == DSV3_F16) return y;
    for (size_t i = 0; dsv3_type_block(type) > 1 && i < n; i += 32) known_q8(y.v + i, y.r + i);
    for (size_t i = 0; dsv3_type_block(type) == 1 && i < n; i++) {
        double low = bf16(x->v[i] - x->r[i]), high = bf16(x->v[i] + x->r[i]);
        y.v[i] = (low + high) / 2;
        y.r[i] = (high - low) / 2;
    }
    return y;
}

/* ---- Weights of every type, at odd addresses, no two blocks with the same scale */

enum { F32, F16, BF16, F8_SCALED, F8, Q8, Q4, KINDS };

static const char *const kind_name[KINDS] = {"F32",  "F16", "BF16", "F8_E4M3", "F8_E4M3 without scales",
                                             "Q8_0", "Q4_0"};
static const dsv3_type kind_type[KINDS] = {DSV3_F32,     DSV3_F16,  DSV3_BF16, DSV3_F8_E4M3,
                                           DSV3_F8_E4M3, DSV3_Q8_0, DSV3_Q4_0};

typedef struct weights {
    dsv3_tensor t;
    double *v; /* [rows, cols] */
} weights;

static weights weights_new(int kind, size_t rows, size_t cols) {
    dsv3_type type = kind_type[kind];
    size_t row_bytes = dsv3_row_bytes(type, cols), blocks = (cols + 127) / 128, mark = n_taken;
    unsigned char *data = (unsigned char *)bytes_new(rows * row_bytes, 1 + mark % 2 * 2);
    unsigned char *scale = (unsigned char *)bytes_new((rows + 127) / 128 * blocks * sizeof(float), 3);
    float *x = (float *)test_alloc(rows * cols * sizeof *x), most = (float)sqrt(3.0 / (double)cols);
    weights w;
    memset(&w, 0, sizeof w);
    for (size_t i = 0; i < rows * cols; i++) {
        size_t r = i / cols, c = i % cols, part = type == DSV3_F8_E4M3 ? r / 128 * 3 + c / 128 : r + c / 32;
        x[i] = test_uniform(0.25f, 1) * most * (test_below(2) ? 1.0f : -1.0f) * (0.6f + 0.3f * (float)(part * 5 % 7));
    }
    for (size_t i = 0; kind == F8 && i < rows * cols; i++) data[i] = dsv3_f8_e4m3_from_f32(x[i]);
    if (kind != F8) CHECK_EQ(dsv3_quantize(data, scale, x, type, rows, cols, NULL), DSV3_OK);
    w.v = doubles_new(rows * cols);
    for (size_t r = 0; r < rows; r++) {
        plain.ops->decode[type](x, data + r * row_bytes, cols);
        for (size_t i = 0; i < cols; i++) {
            float one = 1;
            if (kind == F8_SCALED) memcpy(&one, scale + (r / 128 * blocks + i / 128) * sizeof one, sizeof one);
            w.v[r * cols + i] = (double)x[i] * (double)one;
        }
    }
    free(x);
    w.t.data = data;
    w.t.scale = kind == F8_SCALED ? scale : NULL;
    w.t.rows = rows, w.t.cols = cols, w.t.type = type, w.t.rank = 2;
    return w;
}

/* dsv3_pack for whatever hangs on the model, in memory of exactly the size that it asks for. */
static void pack(const dsv3_context *ctx, dsv3_model *model) {
    size_t bytes;
    void *memory;
    CHECK_EQ(dsv3_pack_size(ctx, model, &bytes, NULL), DSV3_OK);
    memory = bytes_new(bytes, 8);
    CHECK_EQ(dsv3_pack(ctx, model, memory, bytes, NULL), DSV3_OK);
}

static dsv3_tensor packed_of(const dsv3_context *ctx, const dsv3_tensor *t) {
    dsv3_model model;
    memset(&model, 0, sizeof model);
    model.lm_head = *t;
    pack(ctx, &model);
    CHECK(model.lm_head.packed);
    return model.lm_head;
}

/* ---- Vectors */

static const size_t lengths[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 67, 100, 300};
#define LENGTHS (sizeof lengths / sizeof lengths[0])

/* decode: exactly the same numbers. Every code of 16 bits and less, and blocks of all codes with scales of all kinds. */
static void check_decode(void) {
    for (int type = 0; type < DSV3_TYPES; type++) {
        size_t mark = n_taken, block = dsv3_type_block((dsv3_type)type), n = 65536, wrong[DSV3_BACKENDS] = {0};
        size_t bytes = dsv3_row_bytes((dsv3_type)type, n);
        unsigned char *w = (unsigned char *)bytes_new(bytes, 1);
        float *want = floats_new(n, 0);
        for (size_t i = 0; i < bytes; i++) w[i] = (unsigned char)test_random();
        for (size_t i = 0; i < n && (type == DSV3_F16 || type == DSV3_BF16); i++) {
            w[2 * i] = (unsigned char)(i & 255), w[2 * i + 1] = (unsigned char)(i >> 8);
        }
        plain.ops->decode[type](want, w, n);
        for (size_t i = 0; i < n_contexts; i++) {
            dsv3_context ctx = context_of(i, DSV3_EXACT, 0);
            for (size_t j = 0; j <= LENGTHS; j++) {
                size_t some = j < LENGTHS ? lengths[j] / block * block : n;
                size_t from = j < LENGTHS ? test_below((n - some) / block) * block : 0;
                float *got = floats_new(some, j % 4);
                ctx.ops->decode[type](got, w + dsv3_row_bytes((dsv3_type)type, from), some);
                for (size_t at = 0; at < some; at++) { /* of NaNs only that they are */
                    int nan = dsv3i_is_nan(got[at]) && dsv3i_is_nan(want[from + at]);
                    wrong[i] += !nan && dsv3i_bits(got[at]) != dsv3i_bits(want[from + at]);
                }
            }
            CHECK_EQ(wrong[i], 0);
        }
        release(mark, "decode");
    }
}

/* dot: n products in some order: gamma(n + 1) sum |x y| each. axpy: a product and a sum, fused or not: u |a x| and u |y + a x|.
 * exp_sum: p to two units in the last place of the exponential of the float s - top, that is 4 u; below the smallest normal
 * number two units are 2^-148; their sum, and n roundings. silu_mul: exp (4 u), sum, quotient, product: 8 u. */
static void check_vectors_of(const dsv3_context *ctx, size_t n) {
    size_t mark = n_taken;
    float *x = random_new(n, 1), *y = random_new(n, 1), *s = floats_new(n, 1), top = 2.5f, *got, *want, sums[2];
    double *r = doubles_new(n), dots = 0, total = 0;
    for (size_t i = 0; i < n; i++) {
        s[i] = i % 5 == 4 ? test_uniform(-110, -80) : test_uniform(-9, 2.5f);
        dots += fabs((double)x[i] * (double)y[i]);
    }
    sums[0] = ctx->ops->dot(x, y, n), sums[1] = plain.ops->dot(x, y, n);
    dots *= roundings(n + 1);
    compare("dot", &sums[0], &sums[1], &dots, &dots, 1);
    got = copy_new(y, n, 2), want = copy_new(y, n, 0);
    ctx->ops->axpy(got, 0.7f, x, n), plain.ops->axpy(want, 0.7f, x, n);
    for (size_t i = 0; i < n; i++) {
        double term = (double)0.7f * (double)x[i];
        r[i] = U * (fabs(term) + fabs((double)y[i] + term)) * (1 + 4 * U);
    }
    compare("axpy", got, want, r, r, n);
    got = floats_new(n, 1), want = floats_new(n, 0);
    sums[0] = ctx->ops->exp_sum(got, s, top, n), sums[1] = plain.ops->exp_sum(want, s, top, n);
    for (size_t i = 0; i < n; i++) {
        double p = exp((double)(s[i] - top));
        r[i] = 4 * U * p + ldexp(1, -148);
        total += r[i] + roundings(n) * p;
    }
    compare("exp_sum", got, want, r, r, n);
    compare("exp_sum's sum", &sums[0], &sums[1], &total, &total, 1);
    got = floats_new(n, 3), want = floats_new(n, 0);
    for (size_t i = 0; i < n; i++) s[i] = test_uniform(-20, 20);
    ctx->ops->silu_mul(got, s, y, n), plain.ops->silu_mul(want, s, y, n);
    for (size_t i = 0; i < n; i++) r[i] = roundings(8) * fabs((double)s[i] / (1 + exp(-(double)s[i])) * (double)y[i]);
    compare("silu_mul", got, want, r, r, n);
    release(mark, "vectors");
}

/* ---- linear, and its backward */

static const size_t counts[] = {1, 2, 3, 4, 5, 6, 7, 17, 48, 96, 97, 200};
#define COUNTS (sizeof counts / sizeof counts[0])
static const size_t all_rows[] = {200, 1, 15, 16, 17, 63, 64, 65, 128, 130, 191, 193};
static const size_t all_cols[] = {288, 1, 3, 32, 64, 96, 127, 128, 129, 160, 256, 300};
#define SHAPES 12

typedef struct linear_case {
    dsv3i_product p;
    weights w;
    known y;
    float *plain_y;
} linear_case;

static size_t fitting(int kind, size_t cols) { return kind < Q8 ? cols : (cols + 31) / 32 * 32; }

/* Rows [row, row + rows) of a matrix; x NULL: rows of its own. */
static linear_case linear_new(int kind, size_t n, size_t rows, size_t cols, size_t row, size_t some, const float *x) {
    linear_case c;
    c.w = weights_new(kind, rows, cols);
    c.p = dsv3i_product_of(NULL, x != NULL ? x : random_new(n * cols, 1), &c.w.t, n);
    c.p.row = row;
    c.p.rows = some;
    return c;
}

/* What the products must give, and what the plain op does: of all in one call, with the scratch that the book says. */
static void linear_plain(linear_case *c, size_t count, dsv3_compute compute) {
    dsv3_context ctx = plain_of(compute);
    dsv3i_product list[DSV3I_PRODUCTS];
    size_t rows = 0, cols = 0;
    for (size_t j = 0; j < count; j++) {
        size_t k = c[j].w.t.cols, n = c[j].p.n;
        known x = known_of(c[j].p.x, n * k);
        x = known_rounded(&x, n * k, c[j].w.t.type, compute);
        c[j].y = known_linear(&x, n, k, c[j].w.v + c[j].p.row * k, c[j].p.rows);
        list[j] = c[j].p;
        list[j].w = &c[j].w.t;
        list[j].y = c[j].plain_y = floats_new(n * c[j].p.rows, 1);
        rows += n, cols = cols > k ? cols : k;
    }
    ctx.ops->linear(&ctx, list, count, floats_new(dsv3i_linear_floats(rows, cols, 1), 1));
    for (size_t j = 0; j < count; j++) {
        compare_double("linear", c[j].plain_y, c[j].y.v, c[j].y.r, NULL, c[j].p.n * c[j].p.rows);
    }
}

static const char *linear_name(char *name, size_t size, const char *op, int kind, dsv3_compute compute, int packed) {
    snprintf(name, size, "%s %s%s%s", op, kind_name[kind], compute == DSV3_FAST ? " fast" : "",
             packed ? " packed" : "");
    return name;
}

/* Both threads and the plain op. */
static void linear_against(linear_case *c, size_t count, size_t i, dsv3_compute compute, int packed, int kind) {
    float *y[2][DSV3I_PRODUCTS];
    char name[96];
    for (size_t turn = 0; turn < 2; turn++) {
        dsv3_context ctx = context_of(i, compute, turn);
        dsv3i_product list[DSV3I_PRODUCTS];
        dsv3_tensor w[DSV3I_PRODUCTS];
        size_t rows = 0, cols = 0;
        for (size_t j = 0; j < count; j++) {
            w[j] = packed ? packed_of(&ctx, &c[j].w.t) : c[j].w.t;
            list[j] = c[j].p;
            list[j].w = &w[j];
            list[j].y = y[turn][j] = floats_new(c[j].p.n * c[j].p.rows, 3);
            rows += c[j].p.n, cols = cols > w[j].cols ? cols : w[j].cols;
        }
        ctx.ops->linear(&ctx, list, count, floats_new(dsv3i_linear_floats(rows, cols, ctx.threads), 1));
    }
    linear_name(name, sizeof name, count > 1 ? "linear of two" : "linear", kind, compute, packed);
    for (size_t j = 0; j < count; j++) {
        size_t n = c[j].p.n * c[j].p.rows;
        compare(name, y[0][j], c[j].plain_y, c[j].y.r, c[j].y.r, n);
        same_bits(name, y[0][j], y[1][j], n);
    }
}

static void linear_check(linear_case *c, size_t count, int kind, int may_pack, size_t mark) {
    for (int compute = DSV3_EXACT; compute <= DSV3_FAST; compute++) {
        linear_plain(c, count, (dsv3_compute)compute);
        for (size_t i = 0; i < n_contexts; i++) {
            for (int packed = 0; packed <= may_pack; packed++) {
                size_t inner = n_taken;
                linear_against(c, count, i, (dsv3_compute)compute, packed, kind);
                release(inner, "linear");
            }
        }
    }
    release(mark, "linear");
}

/* Every type and count with shapes in turn; ranges of rows; two products of the same rows and of others, of one type and of
 * two. Packed matrices are only read from multiples of 64 rows on, to such a multiple or to the end. */
static void check_linear(int kind) {
    for (size_t j = 0; j < COUNTS; j++) {
        size_t n = counts[j], mark = n_taken, row, rows, cols;
        linear_case c[DSV3I_PRODUCTS];
        for (size_t s = 0; s < 3; s++) {
            size_t shape = s == 0 ? 0 : 1 + (j + 5 * s + (size_t)kind) % (SHAPES - 1);
            size_t other = s == 0 ? 0 : 1 + (3 * j + 4 * s + 2 * (size_t)kind) % (SHAPES - 1);
            rows = s == 0 && n > 48 ? 100 : all_rows[shape];
            c[0] = linear_new(kind, n, rows, fitting(kind, all_cols[other]), 0, rows, NULL);
            linear_check(c, 1, kind, 1, mark);
        }
        rows = 150 + 7 * j % 40, cols = fitting(kind, 70 + j);
        row = 1 + test_below(80);
        c[0] = linear_new(kind, n, rows, cols, row, 1 + test_below(rows - row), NULL);
        linear_check(c, 1, kind, 0, mark);
        c[0] = linear_new(kind, n, rows, cols, 64, j % 2 ? 64 : rows - 64, NULL);
        linear_check(c, 1, kind, 1, mark);
        cols = j % 3 == 0 ? 128 : 96;
        c[0] = linear_new(kind, n, 70, cols, 0, 70, NULL); /* the same rows of x */
        c[1] = linear_new(j % 2 ? kind : (int)test_below(KINDS), n, 33, cols, 0, 33, c[0].p.x);
        linear_check(c, 2, kind, 1, mark);
        c[0] = linear_new(kind, n, 65, 96, 0, 65, NULL); /* others, of another length */
        c[1] = linear_new(j % 2 ? kind : (int)test_below(KINDS), counts[(j + 5) % COUNTS] % 90 + 1, 20, 160, 0, 20,
                          NULL);
        linear_check(c, 2, kind, 1, mark);
    }
}

/* More rows than any driver keeps together. */
static void check_linear_long(void) {
    static const int kinds[3] = {F32, BF16, Q8};
    for (size_t i = 0; i < 3; i++) {
        size_t mark = n_taken;
        linear_case c = linear_new(kinds[i], 400, 65, 64, 0, 65, NULL);
        linear_check(&c, 1, kinds[i], 1, mark);
    }
}

/* dx_ti = what stood there + sum over r of dy_tr W_ri: a chain of `rows` terms, each rounded as weight and product; dW
 * likewise, of n terms: |error| <= gamma(terms + 3) times the sum of sizes, what stood there included. */
static void backward_known(const dsv3i_product *p, const weights *w, const float *dx0, const float *dw0, known *dx,
                           known *dw) {
    size_t k = w->t.cols;
    *dx = known_new(p->n * k), *dw = known_new(p->rows * k);
    for (size_t i = 0; i < p->n * k; i++) dx->v[i] = dx0 != NULL ? (double)dx0[i] : 0, dx->r[i] = fabs(dx->v[i]);
    for (size_t i = 0; i < p->rows * k; i++) dw->v[i] = (double)dw0[i], dw->r[i] = fabs(dw->v[i]);
    for (size_t t = 0; t < p->n; t++) {
        for (size_t r = 0; r < p->rows; r++) {
            double dy = (double)p->y[t * p->rows + r];
            for (size_t i = 0; i < k; i++) {
                double a = dy * w->v[(p->row + r) * k + i], b = dy * (double)p->x[t * k + i];
                dx->v[t * k + i] += a, dx->r[t * k + i] += fabs(a);
                dw->v[r * k + i] += b, dw->r[r * k + i] += fabs(b);
            }
        }
    }
    for (size_t i = 0; i < p->n * k; i++) dx->r[i] *= roundings(p->rows + 3);
    for (size_t i = 0; i < p->rows * k; i++) dw->r[i] *= roundings(p->n + 3);
}

static void backward_check(const weights *w, dsv3i_product p, int kind, int beta0, int which, int may_pack) {
    size_t nx = p.n * w->t.cols, nw = p.rows * w->t.cols;
    float *dx0 = random_new(nx, 1), *dw0 = random_new(nw, 1), *out[3][2], *scratch;
    known dx, dw;
    backward_known(&p, w, beta0 ? NULL : dx0, dw0, &dx, &dw);
    for (size_t i = 0; i <= n_contexts; i++) {
        for (int packed = 0; packed <= (i > 0 && may_pack); packed++) {
            size_t mark = n_taken;
            char name[96];
            for (size_t turn = 0; turn < (i == 0 ? 1u : 2u); turn++) {
                dsv3_context ctx = i == 0 ? plain_of(DSV3_EXACT) : context_of(i - 1, DSV3_EXACT, turn);
                size_t at = i == 0 ? 0 : 1 + turn;
                dsv3_tensor t = packed ? packed_of(&ctx, &w->t) : w->t;
                out[at][0] = copy_new(dx0, nx, 1), out[at][1] = copy_new(dw0, nw, 2);
                scratch = floats_new(dsv3i_linear_floats(p.n, t.cols, ctx.threads), 1);
                p.w = &t;
                ctx.ops->linear_backward(&ctx, which == 1 ? NULL : out[at][0], beta0, which == 2 ? NULL : out[at][1],
                                         &p, scratch);
            }
            linear_name(name, sizeof name, "linear_backward", kind, DSV3_EXACT, packed);
            if (i == 0) {
                if (which != 1) compare_double(name, out[0][0], dx.v, dx.r, NULL, nx);
                if (which != 2) compare_double(name, out[0][1], dw.v, dw.r, NULL, nw);
                continue; /* the others want it */
            }
            if (which != 1) compare(name, out[1][0], out[0][0], dx.r, dx.r, nx);
            if (which != 2) compare(name, out[1][1], out[0][1], dw.r, dw.r, nw);
            same_bits(name, out[1][0], out[2][0], nx);
            same_bits(name, out[1][1], out[2][1], nw);
            release(mark, name);
        }
    }
}

static void check_linear_backward(int kind) {
    for (size_t j = 0; j < COUNTS; j++) {
        for (size_t s = 0; s < 2; s++) {
            size_t mark = n_taken, n = counts[j], rows = all_rows[(j * 5 + s * 3 + (size_t)kind) % SHAPES];
            size_t cols = fitting(kind, all_cols[(j * 7 + s + (size_t)kind) % SHAPES]), row = 0;
            weights w = weights_new(kind, rows, cols);
            dsv3i_product p = dsv3i_product_of(NULL, random_new(n * cols, 1), &w.t, n);
            if (s == 1 && rows > 2) row = rows / 3, p.row = row, p.rows = 1 + test_below(rows - row);
            p.y = random_new(n * p.rows, 1);
            backward_check(&w, p, kind, (int)(j + s) % 2, (int)(j + 2 * s) % 4, 1);
            release(mark, "linear_backward");
        }
    }
}

/* ---- attend */

#define SEQUENCES 6
#define CACHE_LAYERS 2
#define CACHE_LAYER 1

typedef struct attention {
    dsv3_model model;
    dsv3_layer layer;
    dsv3i_workspace ws;
    dsv3i_dims m;
    dsv3_cache caches[SEQUENCES];
    weights kv_b;
    size_t n;
} attention;

/* past: positions before the rows of this call. */
typedef struct sequence {
    size_t past, rows;
} sequence;

static dsv3_config sizes(int H, int dn, int dr, int dv, int rk) {
    dsv3_config c = dsv3_config_default();
    c.num_attention_heads = H;
    c.qk_nope_head_dim = dn;
    c.qk_rope_head_dim = dr;
    c.v_head_dim = dv;
    c.kv_lora_rank = rk;
    c.q_lora_rank = 0;
    c.vocab_size = 1;
    c.hidden_size = 32;
    c.intermediate_size = c.moe_intermediate_size = 32;
    c.n_routed_experts = c.n_shared_experts = c.num_experts_per_tok = 0;
    c.num_hidden_layers = 1;
    return c;
}

/* Keys of blocks' and segments' edges and of the rows of the call count much, each for some of the heads: a score that is
 * larger by 6, through one of the numbers that are rotated. Where one of them is missing or one too many is seen, outputs
 * change by more than any rounding. */
static void fill_latents(attention *a, dsv3_cache *cache, size_t past, size_t last) {
    static const size_t edges[] = {0, 31, 32, 63, 64, 127, 128, 191, 192, 255, 256, 257, 511, 512, 639, 640};
    size_t rk = a->m.rk, dr = a->m.dr;
    float *row = (float *)test_alloc(cache->width * sizeof *row);
    for (size_t j = 0; j <= last; j++) {
        int counts_much = j + 1 >= past;
        for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) counts_much |= edges[i] == j;
        for (size_t i = 0; i < cache->width; i++) row[i] = test_uniform(-1, 1) * (i < rk ? 0.5f : 0.03f);
        if (counts_much) row[rk + test_below(dr)] = 3;
        dsv3i_cache_store(cache, CACHE_LAYER, j, row);
    }
    free(row);
}

static void fill_queries(attention *a) {
    float large = 2 / a->model.softmax_scale;
    for (size_t i = 0; i < a->n * a->m.H; i++) {
        float *q = a->ws.q + i * a->m.qk;
        for (size_t j = 0; j < a->m.qk; j++) q[j] = test_uniform(-0.5f, 0.5f);
        q[a->m.dn + i % a->m.H % a->m.dr] = large;
    }
}

/* Rows of sequences, those of the first two in turn while there are any; forms: bit s, sequence s is expanded. */
static attention *attention_new(const dsv3_config *c, int kind, dsv3_type type, const sequence *list, size_t count,
                                unsigned forms) {
    attention *a = (attention *)bytes_new(sizeof *a, 0);
    size_t next[SEQUENCES] = {0}, n = 0, s = 0;
    memset(a, 0, sizeof *a);
    a->model.config = *c;
    a->model.softmax_scale = 1.0f / sqrtf((float)(c->qk_nope_head_dim + c->qk_rope_head_dim));
    a->m = dsv3i_dims_of(c);
    for (s = 0; s < count; s++) n += list[s].rows;
    a->n = a->ws.rows = n;
    a->kv_b = weights_new(kind, a->m.Hkv, a->m.rk);
    a->layer.kv_b_proj = a->kv_b.t;
    a->ws.sequence = (int32_t *)bytes_new(n * sizeof(int32_t), 0);
    a->ws.position = (int32_t *)bytes_new(n * sizeof(int32_t), 0);
    a->ws.leader = (int32_t *)bytes_new(n * sizeof(int32_t), 0);
    a->ws.expanded = (int32_t *)bytes_new(n * sizeof(int32_t), 0);
    a->ws.q = floats_new(n * a->m.Hq, 1);
    for (size_t t = 0; t < n; t++) {
        s = count > 1 && t % 2 == 1 && next[1] < list[1].rows ? 1 : 0;
        while (next[s] == list[s].rows) s++;
        a->ws.sequence[t] = (int32_t)s;
        a->ws.position[t] = (int32_t)(list[s].past + next[s]++);
        a->ws.leader[t] = (int32_t)t;
        for (size_t i = t; i-- > 0;) a->ws.leader[t] = a->ws.sequence[i] == (int32_t)s ? (int32_t)i : a->ws.leader[t];
        a->ws.expanded[t] = (int32_t)(forms >> s & 1);
    }
    for (s = 0; s < count; s++) { /* positions behind the last are junk */
        dsv3_cache *cache = &a->caches[s];
        cache->type = type;
        cache->layers = CACHE_LAYERS;
        cache->width = a->m.width;
        cache->length = list[s].past + list[s].rows;
        cache->capacity = cache->length + s % 2 * 5;
        cache->data = bytes_new(CACHE_LAYERS * cache->capacity * cache->width * dsv3_type_bytes(type), 0);
        fill_latents(a, cache, list[s].past, cache->length - 1);
    }
    fill_queries(a);
    return a;
}

static double cached(const attention *a, size_t t, size_t j, size_t i) {
    const dsv3_cache *cache = &a->caches[a->ws.sequence[t]];
    const unsigned char *at = dsv3i_cache_at(cache, CACHE_LAYER, j);
    float x;
    dsv3i_plain.decode[cache->type](&x, at + i * dsv3_type_bytes(cache->type), 1);
    return (double)x;
}

/* One row and head: scores, in radius E at most, become weights A. The computed ones are those of scores up to E away: each
 * exp(s - top) and their sum by a factor within exp(+-E), a weight within exp(+-2E). On top of it: an exponential is good to
 * two units in the last place (4 u), its argument is rounded (u times the spread of scores); blocks, of no fewer than 32
 * keys, and segments multiply what was summed up so far by one more rounded exponential each; and so many additions as keys
 * and blocks. All of it once for a weighted sum and once for the sum of weights. Where weights are rounded to BF16, that
 * comes on top twice. Returns the relative radius of a weighted sum of |A v|; *lse = log sum exp(s) is within *lse_r. */
static double softmax_known(double *A, const double *s, double E, size_t keys, int coarse, double *lse,
                            double *lse_r) {
    double top = s[0], low = s[0], sum = 0, blocks = (double)(keys / 32 + 2), delta;
    for (size_t j = 0; j < keys; j++) top = fmax(top, s[j]), low = fmin(low, s[j]);
    for (size_t j = 0; j < keys; j++) sum += A[j] = exp(s[j] - top);
    for (size_t j = 0; j < keys; j++) A[j] /= sum;
    delta = U * (4 + 6 * blocks + 2 * (top - low + 2 * E) + (double)keys + 2) + (coarse ? 1.01 * COARSE : 0);
    *lse = top + log(sum);
    *lse_r = E + delta * 1.01 + 2 * U * (fabs(top) + E + 4);
    return exp(2 * E + 2 * delta) - 1;
}

typedef struct attended {
    known o, lse; /* [n, H dv], [n, H] */
} attended;

/* Row t, head h, the absorbed form. q~ = UK^T qn: gamma(dn + 4) of its terms' sizes; a score: gamma(width + 3), and the
 * errors of q~; m = sum A c; o = UV m, of m rounded with DSV3_FAST. Coarse: q~, latents that are not BF16 and weights are
 * rounded to it, each by 2^-9 at most. */
static void absorbed_known(const attention *a, attended *to, size_t t, size_t h, dsv3_compute compute, int coarse) {
    const dsv3i_dims *m = &a->m;
    size_t keys = (size_t)a->ws.position[t] + 1, mark = n_taken, rk = m->rk, at = t * m->H + h;
    const float *q = a->ws.q + at * m->qk;
    const double *up = a->kv_b.v + h * m->kv * rk;
    double *query = doubles_new(m->width), *error = doubles_new(m->width), *s = doubles_new(keys), E = 0, rel;
    double *A = doubles_new(keys), *c = doubles_new(keys * m->width), gamma = roundings(m->width + 3);
    double scale = (double)a->model.softmax_scale,
           ek = coarse && a->caches[a->ws.sequence[t]].type == DSV3_F32 ? COARSE : 0;
    known mean = known_new(rk), o;
    for (size_t r = 0; r < m->dn; r++) {
        for (size_t i = 0; i < rk; i++) {
            query[i] += (double)q[r] * up[r * rk + i];
            error[i] += fabs((double)q[r] * up[r * rk + i]) * roundings(m->dn + 4);
        }
    }
    for (size_t i = 0; i < m->dr; i++) query[rk + i] = (double)q[m->dn + i];
    for (size_t i = 0; i < m->width && coarse; i++) error[i] += COARSE * (fabs(query[i]) + error[i]);
    for (size_t j = 0; j < keys; j++) {
        double e = 0;
        for (size_t i = 0; i < m->width; i++) {
            double x = c[j * m->width + i] = cached(a, t, j, i), size = fabs(x) * (1 + ek);
            s[j] += query[i] * x;
            e += error[i] * size + fabs(query[i] * x) * ek + gamma * (fabs(query[i]) + error[i]) * size;
        }
        s[j] *= scale, E = fmax(E, scale * e);
    }
    rel = softmax_known(A, s, E, keys, coarse, &to->lse.v[at], &to->lse.r[at]);
    for (size_t j = 0; j < keys; j++) {
        for (size_t i = 0; i < rk; i++) {
            double term = A[j] * c[j * m->width + i];
            mean.v[i] += term, mean.r[i] += fabs(term) * (rel + ek * (1 + rel));
        }
    }
    mean = known_rounded(&mean, rk, a->kv_b.t.type, compute);
    o = known_linear(&mean, 1, rk, up + m->dn * rk, m->dv);
    memcpy(to->o.v + at * m->dv, o.v, m->dv * sizeof(double)),
        memcpy(to->o.r + at * m->dv, o.r, m->dv * sizeof(double));
    release(mark, "absorbed_known");
}

/* Expanded: keys and values [keys, kv] of head h, as far as row t sees. */
static known expanded_keys(const attention *a, size_t t, size_t h, dsv3_compute compute) {
    size_t keys = (size_t)a->ws.position[t] + 1, rk = a->m.rk;
    known x = known_new(keys * rk);
    for (size_t j = 0; j < keys; j++) {
        for (size_t i = 0; i < rk; i++) x.v[j * rk + i] = cached(a, t, j, i);
    }
    x = known_rounded(&x, keys * rk, a->kv_b.t.type, compute);
    return known_linear(&x, keys, rk, a->kv_b.v + h * a->m.kv * rk, a->m.kv);
}

/* Row t, head h, the expanded form. Scores: gamma(dn + dr + 3) and the errors of keys; o = sum A v with the errors of
 * values. Coarse: queries, keys, values and weights are rounded to BF16. */
static void expanded_known(const attention *a, const known *kv, attended *to, size_t t, size_t h, int coarse) {
    const dsv3i_dims *m = &a->m;
    size_t keys = (size_t)a->ws.position[t] + 1, mark = n_taken, at = t * m->H + h;
    const float *q = a->ws.q + at * m->qk;
    double *s = doubles_new(keys), *A = doubles_new(keys), E = 0, rel, gamma = roundings(m->qk + 3);
    double scale = (double)a->model.softmax_scale, e = coarse ? COARSE : 0;
    for (size_t j = 0; j < keys; j++) {
        double error = 0;
        for (size_t i = 0; i < m->qk; i++) {
            double k = i < m->dn ? kv->v[j * m->kv + i] : cached(a, t, j, m->rk + i - m->dn), x = (double)q[i];
            double rk = i < m->dn ? kv->r[j * m->kv + i] : 0;
            rk += e * (fabs(k) + rk);
            s[j] += x * k;
            error += fabs(x) * (1 + e) * rk + e * fabs(x * k) + gamma * fabs(x) * (1 + e) * (fabs(k) + rk);
        }
        s[j] *= scale, E = fmax(E, scale * error);
    }
    rel = softmax_known(A, s, E, keys, coarse, &to->lse.v[at], &to->lse.r[at]);
    for (size_t i = 0; i < m->dv; i++) {
        double sum = 0, error = 0;
        for (size_t j = 0; j < keys; j++) {
            double v = kv->v[j * m->kv + m->dn + i], r = kv->r[j * m->kv + m->dn + i];
            r += e * (fabs(v) + r);
            sum += A[j] * v, error += A[j] * (rel * fabs(v) + (1 + rel) * r);
        }
        to->o.v[at * m->dv + i] = sum, to->o.r[at * m->dv + i] = error;
    }
    release(mark, "expanded_known");
}

/* Of all rows: fine, and coarse where some backend is. */
static void attend_known(const attention *a, attended to[2], dsv3_compute compute) {
    for (int coarse = 0; coarse < 2; coarse++) {
        to[coarse].o = known_new(a->n * a->m.Ho), to[coarse].lse = known_new(a->n * a->m.H);
    }
    for (size_t t = 0; t < a->n; t++) {
        for (size_t h = 0; h < a->m.H && !a->ws.expanded[t]; h++) {
            absorbed_known(a, &to[0], t, h, compute, 0);
            if (compute == DSV3_FAST) absorbed_known(a, &to[1], t, h, compute, 1);
        }
        if (!a->ws.expanded[t] || a->ws.leader[t] != (int32_t)t) continue;
        for (size_t h = 0; h < a->m.H; h++) {
            size_t mark = n_taken, last = t;
            known kv;
            for (size_t i = t; i < a->n; i++) last = a->ws.leader[i] == (int32_t)t ? i : last;
            kv = expanded_keys(a, last, h, compute);
            for (size_t i = t; i < a->n; i++) {
                if (a->ws.leader[i] != (int32_t)t) continue;
                expanded_known(a, &kv, &to[0], i, h, 0);
                if (compute == DSV3_FAST) expanded_known(a, &kv, &to[1], i, h, 1);
            }
            release(mark, "expanded keys");
        }
    }
}

/* o [n, H dv] and log sum exp [n, H], in memory of exactly the sizes of a workspace for these rows and threads. */
static float *attend_by(const attention *a, const dsv3_context *ctx, float **lse, int packed) {
    dsv3i_workspace ws = a->ws;
    dsv3_model model = a->model;
    dsv3_layer layer = a->layer;
    dsv3_cache caches[SEQUENCES];
    dsv3i_call c;
    ws.threads = ctx->threads;
    ws.o = floats_new(a->n * a->m.Ho, 1);
    ws.softmax = floats_new(a->n * a->m.H * 2, 1);
    ws.scratch = floats_new(dsv3i_pass_floats(&a->m, ws.rows, ws.threads), 0);
    memcpy(caches, a->caches, sizeof caches);
    model.layers = &layer;
    if (packed) pack(ctx, &model);
    if (packed) CHECK(layer.kv_b_packed.packed && !layer.kv_b_proj.packed);
    c = dsv3i_call_of(ctx, &model, &layer, CACHE_LAYER, caches, a->n, &ws);
    ctx->ops->attend(&c);
    *lse = floats_new(a->n * a->m.H, 0);
    for (size_t i = 0; i < a->n * a->m.H; i++) {
        (*lse)[i] = (float)((double)ws.softmax[2 * i] + log((double)ws.softmax[2 * i + 1]));
    }
    return ws.o;
}

/* A latent of row t's own position becomes infinite or NaN: rows that do not see it keep their bits, those that do are not
 * finite any more. */
static void attend_poisoned(attention *a, const dsv3_context *ctx, const float *clean, size_t victim, int packed) {
    size_t mark = n_taken, wrong = 0, Ho = a->m.Ho;
    dsv3_cache *cache = &a->caches[a->ws.sequence[victim]];
    unsigned char *at = dsv3i_cache_at(cache, CACHE_LAYER, (size_t)a->ws.position[victim]);
    size_t bytes = cache->width * dsv3_type_bytes(cache->type);
    unsigned char *saved = (unsigned char *)bytes_new(bytes, 0);
    float *row = floats_new(cache->width, 0), *o, *lse, bad = dsv3i_float(victim % 2 ? 0x7F800000u : 0x7FC00000u);
    memcpy(saved, at, bytes);
    for (size_t i = 0; i < cache->width; i++) row[i] = bad;
    dsv3i_cache_store(cache, CACHE_LAYER, (size_t)a->ws.position[victim], row);
    o = attend_by(a, ctx, &lse, packed);
    for (size_t t = 0; t < a->n; t++) {
        int sees = a->ws.sequence[t] == a->ws.sequence[victim] && a->ws.position[t] >= a->ws.position[victim];
        if (!sees) wrong += memcmp(o + t * Ho, clean + t * Ho, Ho * sizeof *o) != 0;
        for (size_t h = 0; sees && h < a->m.H; h++) wrong += dsv3i_all_finite(o + t * Ho + h * a->m.dv, a->m.dv) != 0;
    }
    if (wrong > 0) fprintf(stderr, "%s: attend with a latent that is not finite: rows\n", ctx->backend);
    CHECK_EQ(wrong, 0);
    memcpy(at, saved, bytes);
    release(mark, "attend, poisoned");
}

static void check_attend(attention *a, int kind, dsv3_compute compute, int may_pack) {
    size_t start = n_taken;
    attended want[2];
    dsv3_context ctx = plain_of(compute);
    float *lse, *o;
    attend_known(a, want, compute);
    ctx = plain_of(compute);
    o = attend_by(a, &ctx, &lse, 0);
    compare_double("attend", o, want[0].o.v, want[0].o.r, NULL, a->n * a->m.Ho);
    compare_double("attend's log-sum-exp", lse, want[0].lse.v, want[0].lse.r, NULL, a->n * a->m.H);
    attend_poisoned(a, &ctx, o, a->n / 2, 0);
    for (size_t i = 0; i < n_contexts; i++) {
        for (int packed = 0; packed <= may_pack; packed++) {
            size_t mark = n_taken;
            float *got[2], *sums[2];
            char name[96];
            int coarse;
            for (size_t turn = 0; turn < 2; turn++) {
                ctx = context_of(i, compute, turn);
                got[turn] = attend_by(a, &ctx, &sums[turn], packed);
                attend_poisoned(a, &ctx, got[turn], turn == 0 ? a->n - 1 : a->n / 2, packed);
            }
            coarse = is_coarse(&ctx);
            linear_name(name, sizeof name, "attend", kind, compute, packed);
            compare(name, got[0], o, want[coarse].o.r, want[0].o.r, a->n * a->m.Ho);
            compare("attend's log-sum-exp", sums[0], lse, want[coarse].lse.r, want[0].lse.r, a->n * a->m.H);
            same_bits(name, got[0], got[1], a->n * a->m.Ho);
            same_bits("attend's log-sum-exp", sums[0], sums[1], a->n * a->m.H);
            release(mark, "attend");
        }
    }
    release(start, "attend");
}

static void check_attention(int kind) {
    static const sequence batches[3][SEQUENCES] = {{{65, 1}, {0, 3}, {1, 2}, {63, 1}, {64, 4}, {0, 1}},
                                                   {{255, 2}, {256, 1}, {257, 9}, {700, 2}},
                                                   {{0, 97}, {64, 2}, {30, 70}}};
    static const size_t lengths_of[3] = {6, 4, 3};
    for (size_t b = 0; b < 3; b++) {
        for (unsigned forms = 0; forms < 2; forms++) {
            size_t mark = n_taken;
            int odd = (int)(b + forms + (size_t)kind) % 2, type = (int)(b + forms + (size_t)kind / 2) % 2;
            dsv3_config c = sizes(2, 64, 4, 64, 96); /* packed */
            attention *a;
            if (odd && kind < Q8) c = sizes(b == 0 ? 17 : 3, 7, 2, 5, 37);
            if (odd && kind >= Q8) c = sizes(b == 0 ? 11 : 3, 24, 4, 20, 64);
            if (b == 1 && odd) c = kind < Q8 ? sizes(3, 24, 4, 20, 130) : sizes(3, 64, 4, 64, 160);
            a = attention_new(&c, kind, type ? DSV3_BF16 : DSV3_F32, batches[b], lengths_of[b], forms ? 0x2A : 0x15);
            for (int compute = DSV3_EXACT; compute <= DSV3_FAST; compute++) {
                check_attend(a, kind, (dsv3_compute)compute, c.qk_nope_head_dim == 64);
            }
            release(mark, "attention");
        }
    }
}

/* One row, one head, one key, one number of each kind; and a lone row with a long past. */
static void check_attention_small(void) {
    static const sequence one[1] = {{0, 1}}, far[1] = {{700, 1}}, block[1] = {{0, 64}};
    for (unsigned i = 0; i < 12; i++) {
        size_t mark = n_taken;
        dsv3_config c = i % 3 == 1 ? sizes(1, 64, 2, 64, 33) : sizes(1, 1, 2, 1, 1);
        attention *a = attention_new(&c, i % 4 < 2 ? BF16 : F32, i % 2 ? DSV3_F32 : DSV3_BF16,
                                     i % 3 == 0   ? one
                                     : i % 3 == 1 ? far
                                                  : block,
                                     1, i / 6);
        check_attend(a, i % 4 < 2 ? BF16 : F32, DSV3_EXACT, i % 3 == 1);
        check_attend(a, i % 4 < 2 ? BF16 : F32, DSV3_FAST, i % 3 == 1);
        release(mark, "attention");
    }
}

/* ---- attend_backward */

typedef struct attend_gradients {
    known dq, dkeys, dup; /* like b's; of dup only the values' part */
} attend_gradients;

/* A gradient's sums: v += x, and its radius += e (the errors of what is summed up) + the sizes of terms times gamma. */
static void add_known(const known *to, size_t at, double x, double e, double gamma) {
    to->v[at] += x;
    to->r[at] += e + gamma * (fabs(x) + e);
}

/* With A = exp(s - top) / sum of a given top and sum: a score has gamma(dn + dr + 3) of its terms' sizes, A relatively as
 * much, and 8 u and the rounding of s - top more; dA and D: gamma(dv + 2); ds = scale A (dA - D): 4 u more. The sums over keys
 * or rows have `rows` terms. */
static void attend_backward_known(const attention *a, const dsv3i_backward *b, const dsv3i_saved *s, size_t t0,
                                  size_t t1, size_t h, attend_gradients *to) {
    const dsv3i_dims *m = &a->m;
    double scale = (double)a->model.softmax_scale, gamma = roundings(t1 - t0 + 3);
    for (size_t t = t0; t < t1; t++) {
        size_t at = t * m->H + h;
        const float *q = a->ws.q + at * m->qk, *dout = b->dout + at * m->dv, *state = s->softmax + 2 * at;
        double D = 0, D_size = 0;
        for (size_t i = 0; i < m->dv; i++) {
            double x = (double)dout[i] * (double)s->o[at * m->dv + i];
            D += x, D_size += fabs(x);
        }
        for (size_t j = t0; j <= t; j++) {
            size_t key = j * m->H + h;
            const float *up = b->kv_up + key * m->kv, *kr = a->ws.kv + j * m->width + m->rk, *v = up + m->dn;
            double sj = 0, size = 0, dA = 0, dA_size = 0, A, A_r, ds, ds_r;
            for (size_t i = 0; i < m->qk; i++) {
                double x = (double)q[i] * (double)(i < m->dn ? up[i] : kr[i - m->dn]);
                sj += x, size += fabs(x);
            }
            for (size_t i = 0; i < m->dv; i++)
                dA += (double)dout[i] * (double)v[i], dA_size += fabs((double)dout[i] * (double)v[i]);
            A = exp(scale * sj - (double)state[0]) / (double)state[1];
            A_r = A * (exp(scale * size * roundings(m->qk + 3) + U * (8 + fabs(scale * sj - (double)state[0]))) - 1);
            ds = scale * A * (dA - D);
            ds_r = scale * (A_r * fabs(dA - D) + (A + A_r) * roundings(m->dv + 2) * (dA_size + D_size));
            ds_r += 5 * U * (fabs(ds) + ds_r);
            for (size_t i = 0; i < m->qk; i++) {
                double k = (double)(i < m->dn ? up[i] : kr[i - m->dn]);
                add_known(&to->dq, at * m->qk + i, ds * k, ds_r * fabs(k), gamma);
                add_known(&to->dkeys, key * m->qk + i, ds * (double)q[i], ds_r * fabs((double)q[i]), gamma);
            }
            for (size_t i = 0; i < m->dv; i++) {
                add_known(&to->dup, key * m->kv + m->dn + i, A * (double)dout[i], A_r * fabs((double)dout[i]), gamma);
            }
        }
    }
}

/* Sequences of these many rows, next to each other. */
static void check_attend_backward(const dsv3_config *config, const size_t *rows, size_t count) {
    size_t start = n_taken, n = 0, first[4];
    attention a;
    dsv3i_saved s;
    dsv3i_backward b;
    attend_gradients want;
    float *out[3][4];
    const dsv3i_dims *m = &a.m;
    memset(&a, 0, sizeof a), memset(&s, 0, sizeof s), memset(&b, 0, sizeof b);
    a.model.config = *config;
    a.m = dsv3i_dims_of(config);
    a.model.softmax_scale = 1.0f / sqrtf((float)a.m.qk);
    for (size_t i = 0; i < count; i++) first[i] = n, n += rows[i];
    a.n = a.ws.rows = n;
    a.ws.leader = (int32_t *)bytes_new(n * sizeof(int32_t), 0);
    for (size_t i = 0; i < count; i++) {
        for (size_t t = 0; t < rows[i]; t++) a.ws.leader[first[i] + t] = (int32_t)first[i];
    }
    a.ws.q = random_new(n * m->Hq, 1), a.ws.kv = random_new(n * m->width, 1);
    b.dout = random_new(n * m->Ho, 1), b.kv_up = random_new(n * m->Hkv, 0.7f);
    s.o = random_new(n * m->Ho, 0.5f), s.softmax = floats_new(2 * n * m->H, 1);
    for (size_t i = 0; i < n * m->H; i++)
        s.softmax[2 * i] = test_uniform(0, 2), s.softmax[2 * i + 1] = test_uniform(2, 9);
    want.dq = known_new(n * m->Hq), want.dkeys = known_new(n * m->Hq), want.dup = known_new(n * m->Hkv);
    for (size_t i = 0; i < count; i++) {
        for (size_t h = 0; h < m->H; h++) attend_backward_known(&a, &b, &s, first[i], first[i] + rows[i], h, &want);
    }
    for (size_t i = 0; i <= n_contexts; i++) {
        size_t mark = n_taken;
        for (size_t turn = 0; turn < (i == 0 ? 1u : 2u); turn++) {
            dsv3_context ctx = i == 0 ? plain_of(DSV3_EXACT) : context_of(i - 1, DSV3_EXACT, turn);
            float **o = out[i == 0 ? 0 : 1 + turn];
            dsv3i_workspace ws = a.ws;
            dsv3i_call c = dsv3i_call_of(&ctx, &a.model, &a.layer, 0, NULL, n, &ws);
            ws.threads = ctx.threads;
            ws.scratch = floats_new(dsv3i_pass_floats(m, n, ws.threads), 0);
            o[0] = b.dq = floats_new(n * m->Hq, 1), o[1] = b.dkeys = floats_new(n * m->Hq, 2);
            o[2] = b.dkv_up = floats_new(n * m->Hkv, 3);
            b.keys = floats_new(n * m->Hq, 1), b.delta = floats_new(n * m->H, 1);
            c.s = &s, c.b = &b;
            ctx.ops->attend_backward(&c);
        }
        if (i == 0) {
            compare_double("attend_backward dq", out[0][0], want.dq.v, want.dq.r, NULL, n * m->Hq);
            compare_double("attend_backward dkeys", out[0][1], want.dkeys.v, want.dkeys.r, NULL, n * m->Hq);
            compare_double("attend_backward dvalues", out[0][2], want.dup.v, want.dup.r, NULL, n * m->Hkv);
            continue; /* the others want it */
        }
        compare("attend_backward dq", out[1][0], out[0][0], want.dq.r, want.dq.r, n * m->Hq);
        compare("attend_backward dkeys", out[1][1], out[0][1], want.dkeys.r, want.dkeys.r, n * m->Hq);
        compare("attend_backward dvalues", out[1][2], out[0][2], want.dup.r, want.dup.r, n * m->Hkv);
        same_bits("attend_backward", out[1][0], out[2][0], n * m->Hq);
        same_bits("attend_backward", out[1][1], out[2][1], n * m->Hq);
        same_bits("attend_backward", out[1][2], out[2][2], n * m->Hkv);
        release(mark, "attend_backward");
    }
    release(start, "attend_backward");
}

static void check_attention_backward(void) {
    static const size_t short_ones[4] = {1, 5, 49, 17}, long_ones[3] = {64, 65, 130}, one[1] = {1};
    dsv3_config even = sizes(2, 64, 4, 64, 96), odd = sizes(3, 7, 2, 5, 37), wide = sizes(1, 130, 2, 129, 8);
    check_attend_backward(&even, short_ones, 4);
    check_attend_backward(&odd, long_ones, 3);
    check_attend_backward(&wide, long_ones, 2);
    check_attend_backward(&odd, one, 1);
}

/* ---- mlps, and their backward */

typedef struct mlp_weights {
    weights gate, up, down;
} mlp_weights;

typedef struct mlp_case {
    dsv3_model model;
    dsv3_layer layer, gradients;
    dsv3i_dims m;
    dsv3i_workspace ws; /* idx, offset, slot, pair */
    mlp_weights *w;    /* [E], shared or dense */
    dsv3_mlp *experts, *dexperts;
    const float *u, *dy, *gate; /* [n, d], [n, d], [n, K] */
    size_t n, hidden;           /* hidden: of all rows and MLPs */
    int is_moe;
} mlp_case;

static mlp_weights mlp_weights_new(int kind, int up, int down, size_t d, size_t F) {
    mlp_weights w;
    w.gate = weights_new(kind, F, d);
    w.up = weights_new(up, F, d);
    w.down = weights_new(down, d, F);
    return w;
}

static dsv3_mlp mlp_of(const mlp_weights *w) {
    dsv3_mlp m;
    m.gate_proj = w->gate.t, m.up_proj = w->up.t, m.down_proj = w->down.t;
    return m;
}

/* E = 0: a dense layer of F. up, down: other types. */
static mlp_case *mlp_new(size_t n, int d, int F, int E, int K, int shared, const int kinds[3]) {
    mlp_case *a = (mlp_case *)bytes_new(sizeof *a, 0);
    dsv3_config c = sizes(1, 1, 2, 1, 1);
    size_t mlps;
    memset(a, 0, sizeof *a);
    c.hidden_size = d, c.moe_intermediate_size = F, c.intermediate_size = E == 0 ? F : 1;
    c.n_routed_experts = E, c.num_experts_per_tok = K, c.n_shared_experts = shared;
    a->model.config = c, a->m = dsv3i_dims_of(&c), a->n = a->ws.rows = n, a->is_moe = E > 0;
    mlps = a->m.E + 1;
    a->w = (mlp_weights *)bytes_new(mlps * sizeof *a->w, 0);
    a->experts = (dsv3_mlp *)bytes_new(mlps * sizeof *a->experts, 0);
    a->dexperts = (dsv3_mlp *)bytes_new(mlps * sizeof *a->dexperts, 0);
    for (size_t e = 0; e < mlps; e++) {
        size_t width = e < a->m.E ? a->m.F : E == 0 ? a->m.Fd : a->m.Fs;
        if (width == 0) continue;
        a->w[e] = mlp_weights_new(kinds[0], kinds[1], kinds[2], a->m.d, width);
        a->experts[e] = mlp_of(&a->w[e]);
    }
    a->layer.experts = a->experts, a->layer.is_moe = a->is_moe;
    if (E == 0) a->layer.mlp = a->experts[0];
    if (shared > 0) a->layer.shared_experts = a->experts[a->m.E];
    a->hidden = E == 0 ? n * a->m.Fd : n * (a->m.K * a->m.F + a->m.Fs);
    a->u = random_new(n * a->m.d, 1), a->dy = random_new(n * a->m.d, 1), a->gate = random_new(n * a->m.K, 1);
    a->ws.idx = (int32_t *)bytes_new(n * a->m.K * sizeof(int32_t), 0);
    a->ws.slot = (size_t *)bytes_new(n * a->m.K * sizeof(size_t), 0);
    a->ws.pair = (size_t *)bytes_new(n * a->m.K * sizeof(size_t), 0);
    a->ws.offset = (size_t *)bytes_new((a->m.E + 1) * sizeof(size_t), 0);
    a->ws.mlps = (dsv3i_mlp *)bytes_new(mlps * sizeof(dsv3i_mlp), 0);
    for (size_t i = 0; i < n * a->m.K; i++) { /* different ones for each row; some get many rows, some none */
        size_t e = i % a->m.K == 0 ? test_below(2) : (size_t)a->ws.idx[i - 1] + 1 + test_below((a->m.E - 2) / a->m.K);
        a->ws.idx[i] = (int32_t)e;
    }
    dsv3i_group_rows(a->ws.offset, a->ws.slot, a->ws.pair, a->ws.idx, n, a->m.K, a->m.E);
    return a;
}

/* MLPs with rows, in the order of their hidden values: which weights, where, how many. */
typedef struct seen {
    const mlp_weights *w;
    const size_t *pair;
    size_t F, n, at, row; /* row: of grouped rows, or 0 */
} seen;

static size_t mlps_seen(const mlp_case *a, seen *list) {
    size_t count = 0, at = 0;
    for (size_t e = 0; e <= a->m.E; e++) {
        int routed = e < a->m.E;
        seen s = {&a->w[e], NULL, a->m.F, a->n, at, 0};
        if (routed) s.row = a->ws.offset[e], s.n = a->ws.offset[e + 1] - s.row, s.pair = a->ws.pair + s.row;
        if (!routed) s.F = a->is_moe ? a->m.Fs : a->m.Fd;
        if (s.n == 0 || s.F == 0) continue;
        list[count++] = s;
        at += s.n * s.F;
    }
    return count;
}

/* Rows of x that an MLP sees. */
static float *rows_seen(const mlp_case *a, const seen *s, const float *x) {
    float *rows = floats_new(s->n * a->m.d, 0);
    for (size_t i = 0; i < s->n; i++) {
        size_t t = s->pair != NULL ? s->pair[i] / a->m.K : i;
        memcpy(rows + i * a->m.d, x + t * a->m.d, a->m.d * sizeof *x);
    }
    return rows;
}

typedef struct mlp_known {
    known gate, up, h, grouped, y;
} mlp_known;

static void known_put(const known *to, size_t at, const known *from, size_t n) {
    memcpy(to->v + at, from->v, n * sizeof(double)), memcpy(to->r + at, from->r, n * sizeof(double));
}

/* h = silu(a) b: the slope of silu is at most 1.1, and 8 roundings (see vectors). */
static known swiglu_known(const known *a, const known *b, size_t n) {
    known h = known_new(n);
    for (size_t i = 0; i < n; i++) {
        double silu = a->v[i] / (1 + exp(-a->v[i])), e = 1.1 * a->r[i];
        h.v[i] = silu * b->v[i];
        h.r[i] = e * fabs(b->v[i]) + (fabs(silu) + e) * b->r[i];
        h.r[i] += roundings(8) * (fabs(h.v[i]) + h.r[i]);
    }
    return h;
}

/* Products, SwiGLU, product: the error of each stage goes into the next. */
static mlp_known mlps_known(const mlp_case *a, dsv3_compute compute) {
    size_t d = a->m.d;
    seen *list = (seen *)bytes_new((a->m.E + 1) * sizeof *list, 0);
    size_t count = mlps_seen(a, list);
    mlp_known k = {known_new(a->hidden), known_new(a->hidden), known_new(a->hidden), known_new(a->n * a->m.K * d),
                   known_new(a->n * d)};
    for (size_t j = 0; j < count; j++) {
        const seen *s = &list[j];
        size_t mark = n_taken, size = s->n * s->F;
        known u = known_of(rows_seen(a, s, a->u), s->n * d), x, gate, up, h, y;
        x = known_rounded(&u, s->n * d, s->w->gate.t.type, compute);
        gate = known_linear(&x, s->n, d, s->w->gate.v, s->F);
        x = known_rounded(&u, s->n * d, s->w->up.t.type, compute);
        up = known_linear(&x, s->n, d, s->w->up.v, s->F);
        h = swiglu_known(&gate, &up, size);
        known_put(&k.gate, s->at, &gate, size), known_put(&k.up, s->at, &up, size), known_put(&k.h, s->at, &h, size);
        h = known_rounded(&h, size, s->w->down.t.type, compute);
        y = known_linear(&h, s->n, s->F, s->w->down.v, d);
        known_put(s->pair != NULL ? &k.grouped : &k.y, s->row * d, &y, s->n * d);
        release(mark, "mlps_known");
    }
    return k;
}

typedef struct mlp_out {
    float *gate, *up, *h, *grouped, *y;
} mlp_out;

/* A call over a workspace whose arrays are exactly as large as shapes say. */
static dsv3i_call mlp_call(const mlp_case *a, const dsv3_context *ctx, dsv3i_workspace *ws, dsv3_layer *layer,
                           dsv3_mlp *experts, int packed) {
    dsv3_model model = a->model;
    dsv3i_call c;
    *ws = a->ws;
    *layer = a->layer;
    memcpy(experts, a->experts, (a->m.E + 1) * sizeof *experts);
    layer->experts = experts;
    model.layers = layer;
    if (packed) pack(ctx, &model);
    ws->threads = ctx->threads;
    ws->scratch = floats_new(dsv3i_pass_floats(&a->m, ws->rows, ws->threads), 0);
    ws->grouped = floats_new(a->n * a->m.K * a->m.d, 1);
    ws->h_gate = floats_new(a->hidden, 2), ws->h_up = floats_new(a->hidden, 3);
    c = dsv3i_call_of(ctx, &a->model, layer, 0, NULL, a->n, ws);
    return c;
}

/* keep: hidden values, too. */
static mlp_out mlps_by(const mlp_case *a, const dsv3_context *ctx, int packed, int keep) {
    dsv3i_workspace ws;
    dsv3_layer layer;
    dsv3_mlp *experts = (dsv3_mlp *)bytes_new((a->m.E + 1) * sizeof *experts, 0);
    dsv3i_call c = mlp_call(a, ctx, &ws, &layer, experts, packed);
    mlp_out out;
    ws.h = keep ? floats_new(a->hidden, 1) : ws.h_gate;
    out.gate = ws.h_gate, out.up = ws.h_up, out.h = ws.h, out.grouped = ws.grouped;
    out.y = floats_new(a->n * a->m.d, 1);
    if (a->is_moe) {
        ctx->ops->mlps(&c, ws.mlps, dsv3i_moe_list(&c, ws.grouped, out.y, a->u, NULL));
    } else {
        dsv3i_mlp dense = {&layer.mlp, NULL, a->u, NULL, out.y, NULL, a->n, 0};
        ctx->ops->mlps(&c, &dense, 1);
    }
    return out;
}

static void check_mlps(const mlp_case *a, int kind, int keep, dsv3_compute compute) {
    size_t start = n_taken, d = a->m.d, rows = a->is_moe ? a->n * a->m.K * d : 0;
    mlp_known want = mlps_known(a, compute);
    dsv3_context ctx = plain_of(compute);
    mlp_out o = mlps_by(a, &ctx, 0, 1); /* whether they are kept changes nothing else */
    const char *const op = a->is_moe ? "mlps" : "mlps dense";
    compare_double("mlps hidden", o.gate, want.gate.v, want.gate.r, NULL, a->hidden);
    compare_double("mlps hidden", o.up, want.up.v, want.up.r, NULL, a->hidden);
    compare_double("mlps hidden", o.h, want.h.v, want.h.r, NULL, a->hidden);
    compare_double(op, o.grouped, want.grouped.v, want.grouped.r, NULL, rows);
    compare_double(op, o.y, want.y.v, want.y.r, NULL, a->n * d);
    for (size_t i = 0; i < n_contexts; i++) {
        for (int packed = 0; packed < 2; packed++) {
            size_t mark = n_taken;
            mlp_out got[2];
            char name[96];
            for (size_t turn = 0; turn < 2; turn++) {
                ctx = context_of(i, compute, turn);
                got[turn] = mlps_by(a, &ctx, packed, keep);
            }
            linear_name(name, sizeof name, op, kind, compute, packed);
            compare(name, got[0].grouped, o.grouped, want.grouped.r, want.grouped.r, rows);
            compare(name, got[0].y, o.y, want.y.r, want.y.r, a->n * d);
            same_bits(name, got[0].grouped, got[1].grouped, rows);
            same_bits(name, got[0].y, got[1].y, a->n * d);
            linear_name(name, sizeof name, "mlps hidden", kind, compute, packed);
            for (size_t part = 0; keep && part < 3; part++) {
                const float *x = part == 0 ? got[0].gate : part == 1 ? got[0].up : got[0].h;
                const float *y = part == 0 ? o.gate : part == 1 ? o.up : o.h;
                const float *z = part == 0 ? got[1].gate : part == 1 ? got[1].up : got[1].h;
                const double *r = part == 0 ? want.gate.r : part == 1 ? want.up.r : want.h.r;
                compare(name, x, y, r, r, a->hidden);
                same_bits(name, x, z, a->hidden);
            }
            release(mark, "mlps");
        }
    }
    release(start, "mlps");
}

/* Rows n and shapes; E and K: few experts (all at once), and so many that blocks of rows go one by one, by one and by three
 * threads; with and without shared experts, wider ones and as wide ones. */
static void check_all_mlps(int kind) {
    static const struct {
        size_t n;
        int d, F, E, K, shared, keep;
    } list[] = {{1, 37, 13, 0, 0, 0, 1},   {1, 37, 13, 6, 2, 1, 0},   {1, 160, 72, 8, 3, 2, 1},
                {2, 128, 144, 0, 0, 0, 0}, {3, 160, 40, 5, 2, 0, 1},  {7, 130, 70, 6, 2, 3, 0},
                {48, 40, 24, 56, 6, 0, 0}, {48, 40, 24, 56, 6, 1, 1}, {97, 70, 33, 20, 4, 1, 0},
                {97, 40, 30, 20, 4, 2, 0}, {97, 128, 65, 0, 0, 0, 0}, {200, 24, 16, 60, 5, 1, 0},
                {5, 1, 1, 4, 1, 1, 1},     {4, 300, 9, 4, 2, 1, 0},   {17, 64, 160, 4, 2, 1, 1}};
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        size_t mark = n_taken;
        int kinds[3], d = list[i].d, F = list[i].F;
        mlp_case *a;
        kinds[0] = kinds[1] = kinds[2] = kind;
        if (i % 3 == 1)
            kinds[1] = (kind + 3 + (int)i) % KINDS; /* gate and up projections do not share rounded rows */
        if (i % 4 == 2) kinds[2] = (kind + 1 + (int)i) % KINDS;
        if (kinds[0] >= Q8 || kinds[1] >= Q8) d = (d + 31) / 32 * 32;
        if (kinds[2] >= Q8) F = (F + 31) / 32 * 32;
        a = mlp_new(list[i].n, d, F, list[i].E, list[i].K, list[i].shared, kinds);
        for (int compute = DSV3_EXACT; compute <= DSV3_FAST; compute++) {
            check_mlps(a, kind, list[i].keep, (dsv3_compute)compute);
        }
        release(mark, "mlps");
    }
}

/* Gradients of an MLP's weights lie one behind the other: [3, d F]. */
static dsv3_mlp gradients_of(float *g, size_t d, size_t F) {
    dsv3_mlp m;
    memset(&m, 0, sizeof m);
    m.gate_proj.data = g, m.up_proj.data = g + d * F, m.down_proj.data = g + 2 * d * F;
    m.gate_proj.rows = m.up_proj.rows = m.down_proj.cols = F;
    m.gate_proj.cols = m.up_proj.cols = m.down_proj.rows = d;
    return m;
}

static size_t gradients_size(const mlp_case *a) {
    return 3 * a->m.d * (a->is_moe ? a->m.E * a->m.F + a->m.Fs : a->m.Fd);
}

typedef struct backward_out {
    float *dx, *dy, *dw, *dgate; /* grouped rows, rows of the shared or dense MLP, weights, gates in expert order */
} backward_out;

typedef struct backward_want {
    known dx, dy, dw, dgate;
} backward_want;

/* dW [rows, cols] += y^T x of n rows: like the backward of linear, with an error of y, or of x. */
static void dw_known(const known *dw, size_t at, const known *y, size_t rows, const known *x, size_t cols, size_t n) {
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < cols; i++) {
            double sum = 0, size = 0, error = 0, *v = &dw->v[at + r * cols + i];
            for (size_t t = 0; t < n; t++) {
                double a = y->v[t * rows + r], b = x->v[t * cols + i], ra = y->r[t * rows + r],
                       rb = x->r[t * cols + i];
                sum += a * b, size += fabs(a * b), error += ra * (fabs(b) + rb) + fabs(a) * rb;
            }
            dw->r[at + r * cols + i] = error + roundings(n + 3) * (fabs(*v) + size + error);
            *v += sum;
        }
    }
}

/* x [n, k] W of W [rows.., k]: what known_linear is for W^T. */
static known known_transposed(const known *x, size_t n, size_t rows, const double *w, size_t k) {
    double *wt = doubles_new(rows * k);
    for (size_t i = 0; i < rows * k; i++) wt[i % k * rows + i / k] = w[i];
    return known_linear(x, n, rows, wt, k);
}

/* With s = sigmoid(a) (6 u), v = W_down^T dY and gate w:
 *     h = a s b (9 u),  dw = v . h,  da = w v b s (1 + a (1 - s)),  db = w v a s,  dx = W_gate^T da + W_up^T db
 * The slope s (1 + a (1 - s)): 1 - s has an error of 7 u, however small it is, and a times as much; all in all 20 u (1 + |a|).
 * h: NULL, or it was kept, without any error. */
static void mlp_backward_known(const mlp_case *a, const seen *s, const float *ha, const float *hb, const float *h,
                               const backward_want *to, size_t dw_at) {
    size_t d = a->m.d, F = s->F, n = s->n, size = n * F;
    known x = known_of(rows_seen(a, s, a->u), n * d), dy = known_of(rows_seen(a, s, a->dy), n * d);
    known v = known_transposed(&dy, n, d, s->w->down.v, F), wh = known_new(size), da = known_new(size),
          db = known_new(size);
    known dx, other;
    for (size_t i = 0; i < size; i++) {
        double ga = (double)ha[s->at + i], gb = (double)hb[s->at + i], sig = 1 / (1 + exp(-ga)), out = ga * sig * gb;
        double w = s->pair != NULL ? (double)a->gate[s->pair[i / F]] : 1, slope = sig * (1 + ga * (1 - sig));
        double e = 20 * U * (1 + fabs(ga)), *dgate = &to->dgate.v[s->row + i / F];
        if (h != NULL) out = (double)h[s->at + i];
        wh.v[i] = w * out, wh.r[i] = 10 * U * fabs(w * out);
        da.v[i] = w * v.v[i] * gb * slope;
        da.r[i] = fabs(w * gb) * (v.r[i] * (fabs(slope) + e) + fabs(v.v[i]) * e) + 4 * U * fabs(da.v[i]);
        db.v[i] = w * v.v[i] * ga * sig;
        db.r[i] = fabs(w * ga * sig) * v.r[i] * (1 + 12 * U) + 12 * U * fabs(db.v[i]);
        if (s->pair == NULL) continue;
        *dgate += v.v[i] * out;
        to->dgate.r[s->row + i / F] +=
            (v.r[i] + fabs(v.v[i]) * 10 * U) * fabs(out) + roundings(F + 3) * fabs(v.v[i] * out);
    }
    dx = known_transposed(&da, n, F, s->w->gate.v, d), other = known_transposed(&db, n, F, s->w->up.v, d);
    for (size_t i = 0; i < n * d; i++) { /* one chain of 2 F terms: each half waits for the additions of the other */
        double more = 2 * dx.r[i] + 2 * other.r[i] + roundings(F + 2) * (fabs(dx.v[i]) + fabs(other.v[i]));
        dx.v[i] += other.v[i], dx.r[i] = more;
    }
    known_put(s->pair != NULL ? &to->dx : &to->dy, s->row * d, &dx, n * d);
    dw_known(&to->dw, dw_at, &da, F, &x, d, n);
    dw_known(&to->dw, dw_at + d * F, &db, F, &x, d, n);
    dw_known(&to->dw, dw_at + 2 * d * F, &dy, d, &wh, F, n);
}

/* Saved hidden values ha, hb and, unless it is NULL, h; dw0: what stands where gradients go. */
static backward_want mlps_backward_known(const mlp_case *a, const float *ha, const float *hb, const float *h,
                                         const float *dw0) {
    size_t d = a->m.d, chosen = a->n * a->m.K;
    seen *list = (seen *)bytes_new((a->m.E + 1) * sizeof *list, 0);
    size_t count = mlps_seen(a, list);
    backward_want to = {known_new(chosen * d), known_new(a->n * d), known_of(dw0, gradients_size(a)),
                        known_new(chosen)};
    for (size_t j = 0; j < count; j++) {
        size_t mark = n_taken, e = (size_t)(list[j].w - a->w);
        mlp_backward_known(a, &list[j], ha, hb, h, &to, 3 * d * a->m.F * (a->is_moe ? e : 0));
        release(mark, "mlp_backward_known");
    }
    return to;
}

static backward_out mlps_backward_by(const mlp_case *a, const dsv3_context *ctx, const float *ha, const float *hb,
                                     const float *h, const float *dw0, int packed) {
    size_t d = a->m.d, chosen = a->n * a->m.K;
    dsv3i_workspace ws;
    dsv3_layer layer, g;
    dsv3_mlp *experts = (dsv3_mlp *)bytes_new((a->m.E + 1) * sizeof *experts, 0);
    dsv3i_call c = mlp_call(a, ctx, &ws, &layer, experts, packed);
    dsv3i_saved s;
    dsv3i_backward b;
    backward_out out;
    memset(&s, 0, sizeof s), memset(&b, 0, sizeof b), memset(&g, 0, sizeof g);
    memcpy(ws.h_gate, ha, a->hidden * sizeof *ha), memcpy(ws.h_up, hb, a->hidden * sizeof *hb);
    ws.h = floats_new(a->hidden, 1);
    if (h != NULL) memcpy(ws.h, h, a->hidden * sizeof *h), s.h = ws.h;
    s.h_gate = ws.h_gate, s.h_up = ws.h_up, s.gate = (float *)(uintptr_t)a->gate;
    b.dh = floats_new(a->hidden, 2), b.gates = floats_new(chosen, 1);
    out.dgate = b.r = floats_new(chosen, 3), out.dx = b.dgrouped = floats_new(chosen * d, 1);
    out.dy = floats_new(a->n * d, 2), out.dw = copy_new(dw0, gradients_size(a), 1);
    for (size_t e = 0; e < a->m.E; e++) a->dexperts[e] = gradients_of(out.dw + 3 * d * a->m.F * e, d, a->m.F);
    g.experts = a->dexperts;
    g.shared_experts = gradients_of(out.dw + 3 * d * a->m.F * a->m.E, d, a->m.Fs);
    g.mlp = gradients_of(out.dw, d, a->m.Fd);
    c.s = &s, c.b = &b, c.g = &g;
    if (a->is_moe) {
        ctx->ops->mlps_backward(&c, ws.mlps, dsv3i_moe_list(&c, b.dgrouped, out.dy, a->u, a->dy));
    } else {
        dsv3i_mlp dense = {&layer.mlp, &g.mlp, a->u, NULL, out.dy, a->dy, a->n, 0};
        ctx->ops->mlps_backward(&c, &dense, 1);
    }
    return out;
}

static void check_mlps_backward(const mlp_case *a, int kind, int keep) {
    size_t start = n_taken, d = a->m.d, chosen = a->n * a->m.K, all = gradients_size(a);
    const float *ha = random_new(a->hidden, 3), *hb = random_new(a->hidden, 1), *dw0 = random_new(all, 1);
    float *h = keep ? floats_new(a->hidden, 0) : NULL;
    dsv3_context ctx = plain_of(DSV3_EXACT);
    backward_want want;
    backward_out o;
    if (keep) plain.ops->silu_mul(h, ha, hb, a->hidden);
    want = mlps_backward_known(a, ha, hb, h, dw0);
    o = mlps_backward_by(a, &ctx, ha, hb, h, dw0, 0);
    compare_double("mlps_backward dx", o.dx, want.dx.v, want.dx.r, NULL, chosen * d);
    compare_double("mlps_backward dx", o.dy, want.dy.v, want.dy.r, NULL, a->n * d);
    compare_double("mlps_backward dW", o.dw, want.dw.v, want.dw.r, NULL, all);
    compare_double("mlps_backward dgate", o.dgate, want.dgate.v, want.dgate.r, NULL, chosen);
    for (size_t i = 0; i < n_contexts; i++) {
        size_t mark = n_taken;
        backward_out got[2];
        char name[96];
        for (size_t turn = 0; turn < 2; turn++) {
            ctx = context_of(i, DSV3_EXACT, turn);
            got[turn] = mlps_backward_by(a, &ctx, ha, hb, h, dw0, turn == 1); /* packed rows are the same numbers */
        }
        linear_name(name, sizeof name, "mlps_backward dx", kind, DSV3_EXACT, 0);
        compare(name, got[0].dx, o.dx, want.dx.r, want.dx.r, chosen * d);
        compare(name, got[0].dy, o.dy, want.dy.r, want.dy.r, a->n * d);
        linear_name(name, sizeof name, "mlps_backward dW", kind, DSV3_EXACT, 0);
        compare(name, got[0].dw, o.dw, want.dw.r, want.dw.r, all);
        compare("mlps_backward dgate", got[0].dgate, o.dgate, want.dgate.r, want.dgate.r, chosen);
        same_bits(name, got[0].dx, got[1].dx, chosen * d);
        same_bits(name, got[0].dy, got[1].dy, a->n * d);
        same_bits(name, got[0].dw, got[1].dw, all);
        same_bits(name, got[0].dgate, got[1].dgate, chosen);
        release(mark, "mlps_backward");
    }
    release(start, "mlps_backward");
}

static void check_all_mlps_backward(int kind) {
    static const struct {
        size_t n;
        int d, F, E, K, shared;
    } list[] = {{1, 37, 13, 6, 2, 1},  {3, 64, 72, 0, 0, 0},   {7, 70, 33, 6, 2, 2},   {48, 40, 24, 30, 6, 0},
                {97, 33, 40, 6, 2, 1}, {120, 65, 17, 0, 0, 0}, {60, 24, 16, 40, 5, 1}, {1, 20, 1, 4, 1, 0}};
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        size_t mark = n_taken;
        int kinds[3], d = list[i].d, F = list[i].F;
        kinds[0] = kinds[1] = kinds[2] = kind;
        if (kind >= Q8) d = (d + 31) / 32 * 32, F = (F + 31) / 32 * 32;
        check_mlps_backward(mlp_new(list[i].n, d, F, list[i].E, list[i].K, list[i].shared, kinds), kind,
                            (int)(i % 2));
        release(mark, "mlps_backward");
    }
}

int main(int argc, char **argv) {
    int verbose = argc > 1 && strcmp(argv[1], "-v") == 0;
    CHECK_EQ(dsv3_context_init(&plain, DSV3_BACKEND_REFERENCE, 1, NULL), DSV3_OK);
    plain.threads = 1, plain.parallel_for = NULL;
    for (int i = DSV3_BACKEND_AVX2; i < DSV3_BACKENDS; i++) {
        if (dsv3_context_init(&contexts[n_contexts], (dsv3_backend)i, 1, NULL) == DSV3_OK) n_contexts++;
    }
    check_decode();
    for (size_t i = 0; i < n_contexts; i++) {
        for (size_t j = 0; j < LENGTHS; j++) {
            dsv3_context ctx = context_of(i, DSV3_EXACT, j % 2);
            check_vectors_of(&ctx, lengths[j]);
        }
    }
    check_linear_long();
    for (int kind = 0; kind < KINDS; kind++) {
        check_linear(kind);
        check_linear_backward(kind);
        check_attention(kind);
        check_all_mlps(kind);
        if (kind == F32 || kind == BF16 || kind == F8_SCALED || kind == Q4) check_all_mlps_backward(kind);
    }
    check_attention_small();
    check_attention_backward();
    for (size_t i = 0; verbose && i < n_worsts; i++)
        printf("%s: %.3f of the bound\n", worsts[i].name, worsts[i].ratio);
    return test_done("ops_table");
}
