/* test_tools.c -- chapter 2 (tools) and the context: size arithmetic, layouts, error reports, parallel loops.
 *
 * A failure here means that a size can wrap around, that a _size and its _init disagree (memory beyond the
 * caller's buffer is then written), that an error report says something else than it should, or that the result
 * of a call depends on how a parallel loop is cut. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"
#include <limits.h>

/* ---- sizes ------------------------------------------------------------------------------------------- */

#define HALF_BITS (sizeof(size_t) * CHAR_BIT / 2)

/* a * b by halves, as on paper; SIZE_MAX when it does not fit. */
static size_t paper_mul(size_t a, size_t b) {
    size_t mask = ((size_t)1 << HALF_BITS) - 1, ah = a >> HALF_BITS, al = a & mask, bh = b >> HALF_BITS,
           bl = b & mask;
    size_t low = al * bl, middle;
    if (ah != 0 && bh != 0) return SIZE_MAX;
    middle = ah != 0 ? ah * bl : al * bh; /* at most one of them */
    if (middle > mask) return SIZE_MAX;
    middle <<= HALF_BITS;
    return middle > SIZE_MAX - low ? SIZE_MAX : middle + low;
}

static void sizes_at_boundaries(void) {
    const size_t m = SIZE_MAX, half = (size_t)1 << HALF_BITS;
    CHECK(dsv3i_add(0, 0) == 0);
    CHECK(dsv3i_add(3, 4) == 7);
    CHECK(dsv3i_add(m, 0) == m);
    CHECK(dsv3i_add(0, m) == m);
    CHECK(dsv3i_add(m, 1) == m);
    CHECK(dsv3i_add(1, m) == m);
    CHECK(dsv3i_add(m, m) == m);
    CHECK(dsv3i_add(m - 1, 1) == m);
    CHECK(dsv3i_add(m - 1, 2) == m);
    CHECK(dsv3i_add(m - 5, 4) == m - 1);
    CHECK(dsv3i_add(4, m - 5) == m - 1);
    CHECK(dsv3i_add(m / 2 + 1, m / 2 + 1) == m);
    CHECK(dsv3i_mul(0, 0) == 0);
    CHECK(dsv3i_mul(7, 0) == 0);
    CHECK(dsv3i_mul(0, 7) == 0);
    CHECK(dsv3i_mul(6, 7) == 42);
    CHECK(dsv3i_mul(m, 1) == m);
    CHECK(dsv3i_mul(1, m) == m);
    CHECK(dsv3i_mul(m, 2) == m);
    CHECK(dsv3i_mul(2, m) == m);
    CHECK(dsv3i_mul(m, m) == m);
    CHECK(dsv3i_mul(m / 2, 2) == m - 1);
    CHECK(dsv3i_mul(2, m / 2) == m - 1);
    CHECK(dsv3i_mul(m / 2 + 1, 2) == m);
    CHECK(dsv3i_mul(half, half) == m);
    CHECK(dsv3i_mul(half, half - 1) == half * (half - 1));
    CHECK(dsv3i_mul(half - 1, half - 1) == (half - 1) * (half - 1));
    CHECK(dsv3i_mul(half + 1, half) == m);
    CHECK(dsv3i_min(3, 4) == 3 && dsv3i_min(4, 3) == 3 && dsv3i_min(m, 0) == 0 && dsv3i_min(5, 5) == 5);
    CHECK(dsv3i_max(3, 4) == 4 && dsv3i_max(4, 3) == 4 && dsv3i_max(m, 0) == m && dsv3i_max(5, 5) == 5);
}

static void sizes_of_blocks(void) {
    const size_t m = SIZE_MAX;
    CHECK(dsv3i_blocks(0, 64) == 0);
    CHECK(dsv3i_blocks(1, 64) == 1);
    CHECK(dsv3i_blocks(63, 64) == 1);
    CHECK(dsv3i_blocks(64, 64) == 1);
    CHECK(dsv3i_blocks(65, 64) == 2);
    CHECK(dsv3i_blocks(m, 1) == m);
    CHECK(dsv3i_blocks(m, 64) == m / 64 + 1);
    CHECK(dsv3i_blocks(m - 63, 64) == m / 64);
    CHECK(dsv3i_blocks(576, DSV3_BLOCK) == 5);
}

static void sizes_at_random(void) {
    int bad_mul = 0, bad_add = 0;
    for (int i = 0; i < 100000; i++) {
        size_t a = (size_t)test_random() >> (test_random() % (2 * HALF_BITS));
        size_t b = (size_t)test_random() >> (test_random() % (2 * HALF_BITS));
        size_t sum = a + b; /* wraps when too large */
        bad_mul += dsv3i_mul(a, b) != paper_mul(a, b);
        bad_add += dsv3i_add(a, b) != (sum < a ? SIZE_MAX : sum);
    }
    CHECK_EQ(bad_mul, 0);
    CHECK_EQ(bad_add, 0);
}

/* ---- layouts ----------------------------------------------------------------------------------------- */

typedef struct part {
    size_t size, a, b, c;
} part;

static const part parts[] = {{4, 3, 5, 1},  {1, 1, 1, 1}, {8, 8, 1, 1}, {4, 0, 9, 9},
                             {1, 65, 1, 1}, {2, 7, 9, 3}, {4, 16, 1, 1}};
#define PARTS (sizeof parts / sizeof parts[0])

static void lay_out(dsv3i_layout *l, void **at) {
    for (size_t i = 0; i < PARTS; i++) {
        at[i] = dsv3i_take(l, parts[i].size, parts[i].a, parts[i].b, parts[i].c);
    }
}

static size_t part_bytes(size_t i) { return parts[i].size * parts[i].a * parts[i].b * parts[i].c; }

/* What every part begins on a multiple of. */
static size_t line_size(void) {
    dsv3i_layout l = {NULL, 0};
    (void)dsv3i_take(&l, 1, 1, 1, 1);
    return l.used;
}

/* Measuring and laying out agree; parts are aligned, in order, apart from each other and inside the buffer,
 * wherever (at multiples of DSV3_ALIGN) the buffer begins. */
static void layout_agrees(void) {
    dsv3i_layout measure = {NULL, 0};
    void *none[PARTS];
    size_t line = line_size(), bytes = 1, expected = 0;
    CHECK(line >= DSV3_ALIGN && (line & (line - 1)) == 0);
    lay_out(&measure, none);
    CHECK_EQ(dsv3i_layout_size(&measure, &bytes, NULL), DSV3_OK);
    for (size_t i = 0; i < PARTS; i++) {
        CHECK(none[i] == NULL);
        expected += (part_bytes(i) + line - 1) / line * line;
    }
    CHECK_EQ(measure.used, expected);
    CHECK_EQ(bytes, expected + line - DSV3_ALIGN); /* what may be lost at the front */
    for (size_t shift = 0; shift <= line; shift += DSV3_ALIGN) {
        unsigned char *memory = (unsigned char *)test_alloc(bytes + 4 * line);
        unsigned char *begin = memory + 2 * line - (uintptr_t)memory % line + shift; /* line + shift, and a guard */
        dsv3i_layout real = {NULL, 0};
        void *at[PARTS];
        int bad = 0;
        memset(memory, 0xA5, bytes + 4 * line);
        CHECK_EQ(dsv3i_memory_check(begin, bytes, bytes, NULL), DSV3_OK);
        real.base = dsv3i_layout_base(begin);
        lay_out(&real, at);
        CHECK_EQ(real.used, measure.used);
        for (size_t i = 0; i < PARTS; i++) {
            unsigned char *p = (unsigned char *)at[i];
            CHECK((uintptr_t)p % line == 0);
            CHECK(p >= begin && p + part_bytes(i) <= begin + bytes);
            memset(p, (int)i, part_bytes(i));
        }
        for (size_t i = 0; i < PARTS; i++) {
            for (size_t j = 0; j < part_bytes(i); j++) bad += ((const unsigned char *)at[i])[j] != i;
        }
        CHECK_EQ(bad, 0);
        CHECK(begin[-1] == 0xA5 && begin[bytes] == 0xA5);
        free(memory);
    }
}

static void layout_overflows(void) {
    unsigned char some[1];
    dsv3i_layout l = {NULL, 0}, real = {NULL, 0};
    size_t bytes = 1, line = line_size();
    CHECK_EQ(dsv3i_layout_size(&l, NULL, NULL), DSV3_ERR_ARG);
    (void)dsv3i_take(&l, 4, SIZE_MAX / 4, 2, 1);
    CHECK(l.used == SIZE_MAX);
    (void)dsv3i_take(&l, 1, 1, 1, 1); /* too large stays too large */
    CHECK(l.used == SIZE_MAX);
    CHECK_EQ(dsv3i_layout_size(&l, &bytes, NULL), DSV3_ERR_OVERFLOW);
    CHECK(bytes == 0);
    l.used = 0; /* the bytes fit, their padding does not */
    (void)dsv3i_take(&l, 1, SIZE_MAX - 1, 1, 1);
    CHECK(l.used == SIZE_MAX);
    l.used = 0; /* just fits */
    (void)dsv3i_take(&l, 1, SIZE_MAX - line + 1, 1, 1);
    CHECK(l.used == SIZE_MAX - line + 1);
    (void)dsv3i_take(&l, 1, 1, 1, 1); /* and this does not */
    CHECK(l.used == SIZE_MAX);
    real.base = some;
    real.used = SIZE_MAX;
    CHECK(dsv3i_take(&real, 1, 1, 1, 1) == NULL);
}

static void memory_checks(void) {
    unsigned char memory[256], *p = memory + (DSV3_ALIGN - (uintptr_t)memory % DSV3_ALIGN);
    CHECK_EQ(dsv3i_memory_check(p, 128, 128, NULL), DSV3_OK);
    CHECK_EQ(dsv3i_memory_check(p, 129, 128, NULL), DSV3_OK);
    CHECK_EQ(dsv3i_memory_check(p, 127, 128, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3i_memory_check(p, 0, 0, NULL), DSV3_OK);
    CHECK_EQ(dsv3i_memory_check(NULL, 128, 128, NULL), DSV3_ERR_ARG);
    for (size_t i = 1; i < DSV3_ALIGN; i++) CHECK_EQ(dsv3i_memory_check(p + i, 128, 64, NULL), DSV3_ERR_ALIGN);
    CHECK_EQ(dsv3i_memory_check(p + DSV3_ALIGN, 128, 64, NULL), DSV3_OK);
}

/* ---- results and errors ------------------------------------------------------------------------------ */

static void result_strings(void) {
    static const struct {
        dsv3_result code;
        const char *text;
    } want[] = {{DSV3_OK, "ok"},
                {DSV3_ERR_ARG, "bad argument"},
                {DSV3_ERR_LIMIT, "beyond a limit"},
                {DSV3_ERR_OVERFLOW, "size overflow"},
                {DSV3_ERR_UNSUPPORTED, "not supported"},
                {DSV3_ERR_MEMORY, "buffer too small"},
                {DSV3_ERR_ALIGN, "buffer not aligned"},
                {DSV3_ERR_MISSING, "tensor missing"},
                {DSV3_ERR_MISMATCH, "shape mismatch"},
                {DSV3_ERR_TOKEN, "token outside vocabulary"},
                {DSV3_ERR_POSITION, "position out of sequence"},
                {DSV3_ERR_FULL, "cache full"},
                {DSV3_ERR_NAN, "value not finite"},
                {DSV3_ERR_ABORTED, "aborted by the caller"},
                {DSV3_ERR_DAMAGED, "saved bytes damaged"}};
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        CHECK_EQ(want[i].code, -(int)i);
        CHECK(strcmp(dsv3_result_string(want[i].code), want[i].text) == 0);
    }
    CHECK(strcmp(dsv3_result_string((dsv3_result)1), "unknown result") == 0);
    CHECK(strcmp(dsv3_result_string((dsv3_result)(DSV3_ERR_DAMAGED - 1)), "unknown result") == 0);
    CHECK(strcmp(dsv3_result_string((dsv3_result)-1000), "unknown result") == 0);
    CHECK(strcmp(dsv3_result_string((dsv3_result)INT_MAX), "unknown result") == 0);
    CHECK(strcmp(dsv3_result_string((dsv3_result)-INT_MAX), "unknown result") == 0);
    CHECK(strcmp(dsv3_result_string((dsv3_result)INT_MIN), "unknown result") == 0); /* has no negative */
}

static dsv3_error error_make(const char *name, const char *why, dsv3_numbers numbers, int64_t e0, int64_t e1, int64_t f0,
                             int64_t f1) {
    dsv3_error e;
    memset(&e, 0x55, sizeof e);
    e.code = DSV3_ERR_MISMATCH;
    strcpy(e.name, name);
    e.why = why;
    e.numbers = numbers;
    e.expected[0] = e0, e.expected[1] = e1;
    e.found[0] = f0, e.found[1] = f1;
    return e;
}

/* The text at every capacity from 0 to more than enough: a prefix, zero-terminated, and nothing beyond it. */
static void error_text_is(dsv3_error e, const char *want) {
    char text[300];
    size_t length = strlen(want);
    int bad = 0;
    CHECK(dsv3_error_text(&e, text, sizeof text) == text);
    if (strcmp(text, want) != 0) fprintf(stderr, "got  \"%s\"\nwant \"%s\"\n", text, want);
    CHECK(strcmp(text, want) == 0);
    for (size_t capacity = 0; capacity <= length + 3; capacity++) {
        size_t shown = capacity == 0 ? 0 : capacity - 1 < length ? capacity - 1 : length;
        char *exact = (char *)test_alloc(capacity); /* nothing behind it that may be written */
        memset(text, '#', sizeof text);
        bad += dsv3_error_text(&e, text, capacity) != text;
        bad += memcmp(text, want, shown) != 0;
        bad += capacity > 0 && text[shown] != '\0';
        for (size_t i = capacity; i < sizeof text; i++) bad += text[i] != '#';
        bad += dsv3_error_text(&e, exact, capacity) != exact;
        free(exact);
    }
    CHECK_EQ(bad, 0);
}

static void error_texts(void) {
    dsv3_error e;
    error_text_is(error_make("n_group", "is too small", DSV3_NUMBERS_NONE, 1, 2, 3, 4), "n_group: is too small");
    error_text_is(error_make("n_group", "is too small", DSV3_NUMBERS_RANGE, 8, 2, 3, 4),
                  "n_group: is too small (expected 8 to 2, found 3)");
    error_text_is(error_make("w", "has another shape", DSV3_NUMBERS_SHAPE, 256, 48, 48, 256),
                  "w: has another shape (expected 256 x 48, found 48 x 256)");
    error_text_is(error_make("", "is NULL", DSV3_NUMBERS_NONE, 0, 0, 0, 0), "is NULL");
    error_text_is(error_make("x", NULL, DSV3_NUMBERS_NONE, 0, 0, 0, 0), "x: shape mismatch");
    error_text_is(error_make("", NULL, DSV3_NUMBERS_RANGE, 0, 0, -1, 0), "shape mismatch (expected 0, found -1)");
    error_text_is(error_make("x", "y", DSV3_NUMBERS_SHAPE, INT64_MIN, INT64_MAX, -10, 10),
                  "x: y (expected -9223372036854775808 x 9223372036854775807, found -10 x 10)");
    error_text_is(error_make("x", "y", DSV3_NUMBERS_RANGE, 7, 7, 8, 9), "x: y (expected 7, found 8)");
    error_text_is(error_make("x", "is odd in layer", DSV3_NUMBERS_WHERE, 1, 2, -3, 4), "x: is odd in layer -3");
    e = error_make("x", "y", DSV3_NUMBERS_NONE, 0, 0, 0, 0);
    CHECK(dsv3_error_text(&e, NULL, 0) == NULL);
}

static void error_reports(void) {
    dsv3_error e;
    char name[2 * DSV3_MAX_NAME];
    memset(&e, 0x55, sizeof e);
    CHECK_EQ(dsv3i_fail(&e, DSV3_ERR_LIMIT, "field", "why"), DSV3_ERR_LIMIT);
    error_text_is(e, "field: why");
    CHECK(e.code == DSV3_ERR_LIMIT && e.numbers == DSV3_NUMBERS_NONE);
    CHECK(e.expected[0] == 0 && e.expected[1] == 0 && e.found[0] == 0 && e.found[1] == 0);
    CHECK_EQ(dsv3i_fail_range(&e, DSV3_ERR_ARG, "field", "why", 5, 5, -6), DSV3_ERR_ARG);
    error_text_is(e, "field: why (expected 5, found -6)");
    CHECK(e.expected[1] == 5 && e.found[1] == 0);
    CHECK_EQ(dsv3i_fail_row(&e, DSV3_ERR_TOKEN, "token", 31, "is outside", 0, 255, 300), DSV3_ERR_TOKEN);
    error_text_is(e, "token[31]: is outside (expected 0 to 255, found 300)");
    CHECK_EQ(dsv3i_ok(&e), DSV3_OK);
    error_text_is(e, "ok");
    CHECK(e.code == DSV3_OK);
    CHECK_EQ(dsv3i_fail(NULL, DSV3_ERR_NAN, "a", "b"), DSV3_ERR_NAN);
    CHECK_EQ(dsv3i_fail_range(NULL, DSV3_ERR_NAN, "a", "b", 1, 1, 2), DSV3_ERR_NAN);
    CHECK_EQ(dsv3i_fail_row(NULL, DSV3_ERR_NAN, "a", 0, "b", 1, 1, 2), DSV3_ERR_NAN);
    CHECK_EQ(dsv3i_ok(NULL), DSV3_OK);
    for (size_t n = DSV3_MAX_NAME - 3; n < sizeof name; n++) { /* long names are cut, not written past */
        size_t kept = n < DSV3_MAX_NAME - 1 ? n : DSV3_MAX_NAME - 1;
        memset(name, 'n', n);
        name[n] = '\0';
        (void)dsv3i_fail(&e, DSV3_ERR_ARG, name, "why");
        if (strlen(e.name) != kept || e.code != DSV3_ERR_ARG) CHECK_EQ(n, -1);
        (void)dsv3i_fail_row(&e, DSV3_ERR_ARG, name, 7, "why", 0, 0, 0);
        if (strlen(e.name) > DSV3_MAX_NAME - 1 || e.code != DSV3_ERR_ARG) CHECK_EQ(n, -2);
    }
}

/* ---- parallel loops ---------------------------------------------------------------------------------- */

#define MOST_ITEMS 1000
#define MOST_WORKERS 8

typedef struct tally {
    unsigned char seen[MOST_ITEMS];
    size_t calls, n;
    size_t begin, end, worker; /* of the last call */
    int bad;
} tally;

static void tally_task(void *arg, size_t begin, size_t end, size_t worker) {
    tally *t = (tally *)arg;
    t->calls++;
    t->begin = begin, t->end = end, t->worker = worker;
    t->bad += begin > end || end > t->n || worker >= MOST_WORKERS;
    for (size_t i = begin; i < end; i++) t->seen[i]++;
}

/* A hook in the worst mood: uneven pieces in shuffled order, by changing workers. */
typedef struct shuffler {
    size_t calls, threads, n;
} shuffler;

static void shuffle(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    shuffler *s = (shuffler *)user;
    size_t cut[MOST_ITEMS + 1], pieces = 0;
    size_t order[MOST_ITEMS];
    s->calls++;
    s->threads = threads;
    s->n = n;
    for (size_t i = 0; i < n; i += 1 + (size_t)(test_random() % 5)) cut[pieces++] = i;
    cut[pieces] = n;
    for (size_t i = 0; i < pieces; i++) {
        size_t j = (size_t)(test_random() % (i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    for (size_t i = 0; i < pieces; i++) {
        task(arg, cut[order[i]], cut[order[i] + 1], (size_t)(test_random() % threads));
    }
}

static tally run_tally(const dsv3_context *ctx, size_t n, size_t work) {
    tally t;
    memset(&t, 0, sizeof t);
    t.n = n;
    dsv3i_parallel(ctx, n, work, tally_task, &t);
    for (size_t i = 0; i < MOST_ITEMS; i++) t.bad += t.seen[i] != (i < n);
    return t;
}

static void parallel_calls(void) {
    dsv3_context ctx;
    shuffler s = {0, 0, 0};
    tally t;
    CHECK_EQ(dsv3_context_init(&ctx, test_backend(), 1, NULL), DSV3_OK);
    ctx.parallel_for = NULL;
    ctx.threads = 4;
    t = run_tally(&ctx, 10, SIZE_MAX); /* no hook: one piece, by worker 0, on the spot */
    CHECK(t.calls == 1 && t.begin == 0 && t.end == 10 && t.worker == 0 && t.bad == 0);
    t = run_tally(&ctx, 0, SIZE_MAX);
    CHECK(t.calls == 0);
    ctx.parallel_for = shuffle;
    ctx.parallel_user = &s;
    t = run_tally(&ctx, 0, SIZE_MAX);
    CHECK(t.calls == 0 && s.calls == 0);
    t = run_tally(&ctx, 1, SIZE_MAX); /* nothing to share */
    CHECK(t.calls == 1 && t.bad == 0 && s.calls == 0);
    t = run_tally(&ctx, 100, 1); /* not worth it */
    CHECK(t.calls == 1 && t.bad == 0 && s.calls == 0);
    t = run_tally(&ctx, 100, SIZE_MAX);
    CHECK(t.calls > 1 && t.bad == 0 && s.calls == 1 && s.threads == 4 && s.n == 100);
    ctx.threads = 1;
    t = run_tally(&ctx, 100, SIZE_MAX);
    CHECK(t.calls == 1 && t.bad == 0 && s.calls == 1);
}

/* The same bits however the loop is cut. */
static void parallel_bits(void) {
    enum { ROWS = 301, COLS = 1031, N = 3, THREADS = 5, SILU = 70001 };
    dsv3_context serial, ctx;
    dsv3_tensor w;
    shuffler s = {0, 0, 0};
    float *data = (float *)test_alloc(ROWS * COLS * sizeof(float));
    float *x = (float *)test_alloc(N * COLS * sizeof(float));
    float *scratch;
    float *want = (float *)test_alloc(SILU * sizeof(float)), *got = (float *)test_alloc(SILU * sizeof(float));
    float *b = (float *)test_alloc(SILU * sizeof(float));
    test_fill(data, ROWS * COLS, -1, 1);
    test_fill(x, N * COLS, -1, 1);
    test_fill(b, SILU, -1, 1);
    CHECK_EQ(dsv3_context_init(&serial, test_backend(), 1, NULL), DSV3_OK);
    serial.parallel_for = NULL;
    ctx = serial;
    ctx.parallel_for = shuffle;
    ctx.parallel_user = &s;
    ctx.threads = THREADS;
    scratch = (float *)test_alloc(linear_floats(&ctx, N, COLS) * sizeof(float));
    w.data = data, w.scale = NULL, w.rows = ROWS, w.cols = COLS, w.type = DSV3_F32, w.rank = 2, w.packed = 0;
    dsv3_linear(&serial, want, x, &w, N, scratch, NULL);
    for (int i = 0; i < 20; i++) {
        memset(got, 0xFF, N * ROWS * sizeof(float));
        dsv3_linear(&ctx, got, x, &w, N, scratch, NULL);
        CHECK(memcmp(got, want, N * ROWS * sizeof(float)) == 0);
    }
    CHECK_EQ(s.calls, 20);
    test_fill(want, SILU, -20, 20);
    memcpy(got, want, SILU * sizeof(float));
    dsv3i_swiglu(&serial, want, want, b, SILU);
    dsv3i_swiglu(&ctx, got, got, b, SILU);
    CHECK(memcmp(got, want, SILU * sizeof(float)) == 0);
    CHECK_EQ(s.calls, 21);
    free(data), free(x), free(scratch), free(want), free(got), free(b);
}

#if defined(_OPENMP) && !defined(DSV3_NO_OPENMP)
/* Every item once, workers below the number of threads; items are apart, so nothing races. */
typedef struct omp_tally {
    unsigned char seen[MOST_ITEMS];
    size_t worker[MOST_ITEMS];
} omp_tally;

static void omp_task(void *arg, size_t begin, size_t end, size_t worker) {
    omp_tally *t = (omp_tally *)arg;
    for (size_t i = begin; i < end; i++) t->seen[i]++, t->worker[i] = worker;
}

static void parallel_openmp(void) {
    static const size_t n[] = {1, 2, 7, 39, 40, 41, 999, MOST_ITEMS};
    for (size_t threads = 1; threads <= 5; threads++) {
        for (size_t k = 0; k < sizeof n / sizeof n[0]; k++) {
            omp_tally t;
            int bad = 0;
            memset(&t, 0, sizeof t);
            dsv3i_parallel_openmp(NULL, threads, n[k], omp_task, &t);
            for (size_t i = 0; i < MOST_ITEMS; i++) bad += t.seen[i] != (i < n[k]) || t.worker[i] >= threads;
            CHECK_EQ(bad, 0);
        }
    }
}
#endif

/* ---- context ----------------------------------------------------------------------------------------- */

static void context_codes(void) {
    dsv3_context c;
    memset(&c, 0x55, sizeof c);
    CHECK_EQ(dsv3_context_init(NULL, DSV3_BACKEND_AUTO, 0, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_context_init(&c, (dsv3_backend)99, 1, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_context_init(&c, (dsv3_backend)-1, 1, NULL), DSV3_ERR_UNSUPPORTED);
    memset(&c, 0x55, sizeof c);
    CHECK_EQ(dsv3_context_init(&c, DSV3_BACKEND_REFERENCE, 3, NULL), DSV3_OK);
    CHECK(strcmp(c.backend, "reference") == 0);
    CHECK_EQ(c.attention, DSV3_ATTENTION_AUTO);
    CHECK(c.observer.hidden == NULL && c.observer.routing == NULL && c.observer.user == NULL);
    CHECK(c.parallel_user == NULL);
#if defined(_OPENMP) && !defined(DSV3_NO_OPENMP)
    CHECK_EQ(c.threads, 3);
    CHECK(c.parallel_for != NULL);
    CHECK_EQ(dsv3_context_init(&c, DSV3_BACKEND_REFERENCE, SIZE_MAX, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_context_init(&c, DSV3_BACKEND_AUTO, 0, NULL), DSV3_OK);
    CHECK(c.threads >= 1);
#else
    CHECK_EQ(c.threads, 1);
    CHECK(c.parallel_for == NULL);
#endif
    memset(&c, 0x55, sizeof c);
    CHECK_EQ(dsv3_context_init(&c, DSV3_BACKEND_AUTO, 1, NULL), DSV3_OK);
    CHECK(c.backend != NULL && c.backend[0] != '\0');
    for (size_t i = 0; i < DSV3_TYPES; i++) CHECK(c.ops->decode[i] != NULL);
    CHECK_EQ(c.compute, DSV3_EXACT);
    CHECK(c.ops->dot != NULL && c.ops->axpy != NULL && c.ops->exp_sum != NULL && c.ops->silu_mul != NULL);
    CHECK(c.ops->linear != NULL && c.ops->attend != NULL && c.ops->mlps != NULL);
    CHECK(c.ops->linear_backward != NULL && c.ops->attend_backward != NULL && c.ops->mlps_backward != NULL);
}

/* Bytes in common; of nothing there are none. */
static void overlaps(void) {
    char a[8] = {0};
    CHECK(dsv3i_overlap(a, 8, a + 7, 4) && dsv3i_overlap(a + 7, 4, a, 8));
    CHECK(!dsv3i_overlap(a, 4, a + 4, 4) && !dsv3i_overlap(a + 4, 4, a, 4));
    CHECK(!dsv3i_overlap(a, 8, a + 2, 0) && !dsv3i_overlap(a + 2, 0, a, 8));
}

/* What no config or tensor within the limits has where size_t has 64 bits: more than it can count. */
static void uncountable(void) {
    dsv3_config c = dsv3_config_default();
    dsv3_error error;
    dsv3_tensor t;
    CHECK_EQ(dsv3i_check_sizes(&c, &error), DSV3_OK);
    c.hidden_size = c.qk_nope_head_dim = c.num_attention_heads = INT32_MAX;
    CHECK_EQ(dsv3i_check_sizes(&c, &error), DSV3_ERR_OVERFLOW);
    CHECK(error.code == DSV3_ERR_OVERFLOW && strstr(error.why, "more bytes than size_t can count") != NULL);
    CHECK(sizeof(size_t) == 4 || strcmp(error.name, "num_attention_heads") == 0);
    memset(&t, 0, sizeof t);
    t.data = &c, t.rank = 2, t.type = DSV3_F32, t.rows = SIZE_MAX / 32 + 1, t.cols = 8;
    CHECK_EQ(dsv3i_bind_shape(&error, &t, "wide", t.rows, 8, 2), DSV3_ERR_OVERFLOW);
    CHECK(strcmp(error.name, "wide") == 0 && strstr(error.why, "more bytes than size_t can count") != NULL);
    t.rows--;
    CHECK_EQ(dsv3i_bind_shape(&error, &t, "wide", t.rows, 8, 2), DSV3_OK);
}

int main(void) {
    uncountable();
    sizes_at_boundaries();
    sizes_of_blocks();
    sizes_at_random();
    layout_agrees();
    layout_overflows();
    memory_checks();
    result_strings();
    error_texts();
    error_reports();
    parallel_calls();
    parallel_bits();
#if defined(_OPENMP) && !defined(DSV3_NO_OPENMP)
    parallel_openmp();
#endif
    context_codes();
    overlaps();
    return test_done("tools");
}
