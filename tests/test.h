/* test.h -- a small test harness: a failed check is reported and counted, and the test goes on.
 *
 *     int main(void) { ...CHECK(...)...; return test_done("router"); }
 *
 * test_done prints "router: 12 passed, 0 failed" as its last line, which tests/run.sh adds up, and
 * returns 1 if anything failed (a count could wrap to 0 as an exit status). */
#ifndef TEST_H
#define TEST_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_passed, test_failed;

/* The longest tests have two forms: this one, the same cases with fewer texts, draws and types; and, with TEST_LONG in the
 * environment, all of them (tests/check_long.sh). */
static inline int test_light(void) { return getenv("TEST_LONG") == NULL; }

static void test_count(int ok, const char *file, int line, const char *what) {
    if (ok) {
        test_passed++;
    } else {
        test_failed++;
        fprintf(stderr, "%s:%d: FAILED: %s\n", file, line, what);
    }
}

#ifdef DSV3_H
/* The backend under test: the one that the environment names in TEST_BACKEND, else the plain one. */
static inline dsv3_backend test_backend(void) {
    const char *name = getenv("TEST_BACKEND");
    dsv3_backend backend = DSV3_BACKEND_REFERENCE;
    if (name != NULL && dsv3_backend_find(&backend, name, NULL) != DSV3_OK) {
        fprintf(stderr, "TEST_BACKEND: there is no backend '%s'\n", name);
        exit(2);
    }
    return backend;
}
#endif

#define CHECK(condition) test_count((condition) != 0, __FILE__, __LINE__, #condition)

/* CHECK_EQ: two integers (result codes, sizes, ids) that must be equal; prints both when they are not. */
#define CHECK_EQ(got, want) test_eq((long long)(got), (long long)(want), __FILE__, __LINE__, #got)
static void test_eq(long long got, long long want, const char *file, int line, const char *what) {
    char text[256];
    snprintf(text, sizeof text, "%s: got %lld, want %lld", what, got, want);
    test_count(got == want, file, line, text);
}

/* CHECK_CLOSE: |got - want| <= bound * max|want| over n floats; NaN never passes. */
#define CHECK_CLOSE(got, want, n, bound) test_close(got, want, n, bound, __FILE__, __LINE__, #got)
static void test_close(const float *got, const double *want, size_t n, double bound, const char *file, int line,
                       const char *what) {
    double largest = 0, worst = 0;
    size_t at = 0;
    char text[256];
    for (size_t i = 0; i < n; i++) largest = fabs(want[i]) > largest ? fabs(want[i]) : largest;
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - want[i]);
        if (e <= worst) continue;
        worst = e, at = i;
        if (isnan(e)) break; /* nothing is worse */
    }
    snprintf(text, sizeof text, "%s: worst error %.3g of %.3g (bound %.3g) at %zu: got %.9g, want %.9g", what, worst,
             largest, bound, at, n ? (double)got[at] : 0.0, n ? want[at] : 0.0);
    test_count(worst <= bound * largest, file, line, text);
}

/* A small generator for test data: same stream everywhere (splitmix64). */
static uint64_t test_state = 1;
static uint64_t test_random(void) {
    uint64_t z = (test_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
static size_t test_below(size_t n) { return (size_t)(test_random() % n); }
static float test_uniform(float low, float high) {
    return low + (high - low) * ((float)(test_random() >> 40) / 16777216.0f);
}
static void test_fill(float *x, size_t n, float low, float high) {
    for (size_t i = 0; i < n; i++) x[i] = test_uniform(low, high);
}

/* test_alloc: exactly n bytes from malloc, so that AddressSanitizer sees the first byte past the end. */
static void *test_alloc(size_t n) {
    void *p = n <= PTRDIFF_MAX ? malloc(n ? n : 1) : NULL;
    if (!p) fprintf(stderr, "test: out of memory (%zu bytes)\n", n), exit(2);
    return p;
}

static int test_done(const char *name) {
    (void)test_close, (void)test_eq, (void)test_below, (void)test_uniform, (void)test_fill, (void)test_alloc;
    printf("%s: %d passed, %d failed\n", name, test_passed, test_failed);
    return test_failed != 0;
}
#ifdef DSV3_H /* included before */
/* Floats of scratch of the two ops that want some. */
static inline size_t linear_floats(const dsv3_context *context, size_t n, size_t cols) {
    size_t bytes = 0;
    CHECK_EQ(dsv3_linear_size(context, n, cols, &bytes, NULL), DSV3_OK);
    return bytes / sizeof(float);
}

static inline size_t cross_entropy_floats(const dsv3_context *context, const dsv3_tensor *head, size_t n) {
    size_t bytes = 0;
    CHECK_EQ(dsv3_cross_entropy_size(context, head, n, &bytes, NULL), DSV3_OK);
    return bytes / sizeof(float);
}
#endif

#endif
