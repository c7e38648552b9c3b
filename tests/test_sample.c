/* test_sample.c -- chapter 13 (infer), sampling: random numbers, the choice of a token, ops on its logits.
 *
 * A failure here means that seeds give other texts than before, that tokens are drawn with other probabilities than
 * softmax(logits / temperature) or from outside the nucleus, that an op forbids or changes other tokens than it says, or
 * that bad input is taken for good. */
#include "dsv3.h"

#include "test.h"
#include <float.h>

#define MOST 64

/* ---- random numbers ---------------------------------------------------------------------------------- */

/* a * b modulo 2^64 by shifting and adding: nothing of the library's arithmetic is reused. */
static uint64_t times(uint64_t a, uint64_t b) {
    uint64_t sum = 0;
    for (; b != 0; b >>= 1, a <<= 1) sum += b & 1 ? a : 0;
    return sum;
}

/* Output k = 1, 2 ... of splitmix64, from the closed form: the state is seed + k times the golden ratio. */
static uint64_t splitmix(uint64_t seed, uint64_t k) {
    uint64_t z = seed + times(k, 0x9E3779B97F4A7C15u);
    z = times(z ^ (z >> 30), 0xBF58476D1CE4E5B9u);
    z = times(z ^ (z >> 27), 0x94D049BB133111EBu);
    return z ^ (z >> 31);
}

/* x with x * a = 1 modulo 2^64, a odd: Newton's iteration doubles the correct bits. */
static uint64_t inverse(uint64_t a) {
    uint64_t x = a;
    for (int i = 0; i < 6; i++) x = times(x, 2 - times(a, x));
    return x;
}

static uint64_t unshift(uint64_t z, int s) {
    uint64_t x = z;
    for (int i = 0; i < 64; i += s) x = z ^ (x >> s);
    return x;
}

/* A generator whose next output is `output`. */
static dsv3_rng rng_before(uint64_t output) {
    dsv3_rng rng;
    uint64_t z = unshift(output, 31);
    z = unshift(times(z, inverse(0x94D049BB133111EBu)), 27);
    z = unshift(times(z, inverse(0xBF58476D1CE4E5B9u)), 30);
    rng.state = z - 0x9E3779B97F4A7C15u;
    return rng;
}

static dsv3_rng rng_seed(uint64_t seed) {
    dsv3_rng rng;
    rng.state = seed;
    return rng;
}

static void random_stream(void) {
    static const uint64_t known[5] = {0xE220A8397B1DCDAFu, 0x6E789E6AA1B965F4u, 0x06C45D188009454Fu,
                                      0xF88BB8A8724C81ECu, 0x1B39896A51A8749Bu};
    static const uint64_t seeds[] = {0, 1, 42, 1234567, UINT64_MAX, (uint64_t)1 << 63};
    dsv3_rng rng = rng_seed(0);
    for (size_t i = 0; i < 5; i++) CHECK(dsv3_random(&rng) == known[i]);
    for (size_t s = 0; s < sizeof seeds / sizeof seeds[0]; s++) {
        int wrong = 0;
        rng = rng_seed(seeds[s]);
        for (uint64_t k = 1; k <= 1000; k++) wrong += dsv3_random(&rng) != splitmix(seeds[s], k);
        CHECK_EQ(wrong, 0);
    }
    rng = rng_seed(1234567);
    CHECK(dsv3_random(&rng) == 6457827717110365317u);
    CHECK(dsv3_random(&rng) == 3203168211198807973u);
    CHECK(dsv3_random(&rng) == 9817491932198370423u);
}

static void random_uniforms(void) {
    enum { N = 1 << 20, BINS = 64 };
    dsv3_rng rng = rng_seed(7), same = rng;
    int bin[BINS] = {0}, outside = 0, differ = 0;
    double chi = 0;
    for (int i = 0; i < N; i++) {
        float u = dsv3_random_uniform(&rng);
        outside += !(u >= 0 && u < 1);
        differ += u != ldexpf((float)(dsv3_random(&same) >> 40), -24);
        bin[(int)(u * BINS) % BINS]++;
    }
    CHECK_EQ(outside, 0);
    CHECK_EQ(differ, 0);
    for (int i = 0; i < BINS; i++) chi += (bin[i] - N / BINS) * (double)(bin[i] - N / BINS) / (N / BINS);
    CHECK(chi < 63 + 5 * sqrt(2.0 * 63));
    rng = rng_before(UINT64_MAX); /* the largest and the smallest */
    CHECK(dsv3_random_uniform(&rng) == 1.0f - ldexpf(1, -24));
    rng = rng_before(0);
    CHECK(dsv3_random_uniform(&rng) == 0);
    rng = rng_before((uint64_t)1 << 40);
    CHECK(dsv3_random_uniform(&rng) == ldexpf(1, -24));
}

/* ---- results ----------------------------------------------------------------------------------------- */

static dsv3_candidate candidates[MOST];

/* One draw with scratch of exact size, full of anything. */
static dsv3_result draw(int32_t *token, const float *logits, size_t V, float temperature, float top_p,
                        dsv3_rng *rng) {
    dsv3_candidate *exact = (dsv3_candidate *)test_alloc(V * sizeof *exact);
    dsv3_result result;
    memset(exact, 0xFF, V * sizeof *exact);
    *token = -7;
    result = dsv3_sample(token, logits, V, temperature, top_p, rng, exact, NULL);
    free(exact);
    return result;
}

static void result_codes(void) {
    static const float good[4] = {1, 2, 3, 0}, bad_temperature[] = {-1, -1e-30f, INFINITY, -INFINITY, NAN};
    static const float good_temperature[] = {0, -0.0f, 1e-30f, 1e-45f, 1, 1e30f, FLT_MAX};
    static const float bad_top_p[] = {-0.1f, -1e-30f, 1.1f, 1.0000001f, 2, INFINITY, -INFINITY, NAN};
    static const float good_top_p[] = {0, -0.0f, 1e-30f, 0.5f, 0.99999994f, 1};
    dsv3_rng rng = rng_seed(1);
    int32_t token;
    for (size_t i = 0; i < sizeof bad_temperature / sizeof bad_temperature[0]; i++) {
        CHECK_EQ(draw(&token, good, 4, bad_temperature[i], 1, &rng), DSV3_ERR_ARG);
        CHECK_EQ(draw(&token, good, 4, bad_temperature[i], 0, &rng), DSV3_ERR_ARG);
    }
    for (size_t i = 0; i < sizeof bad_top_p / sizeof bad_top_p[0]; i++) {
        CHECK_EQ(draw(&token, good, 4, 1, bad_top_p[i], &rng), DSV3_ERR_ARG);
        CHECK_EQ(draw(&token, good, 4, 0, bad_top_p[i], &rng), DSV3_ERR_ARG);
    }
    for (size_t i = 0; i < sizeof good_temperature / sizeof good_temperature[0]; i++) {
        for (size_t j = 0; j < sizeof good_top_p / sizeof good_top_p[0]; j++) {
            CHECK_EQ(draw(&token, good, 4, good_temperature[i], good_top_p[j], &rng), DSV3_OK);
            CHECK(token >= 0 && token < 4);
        }
    }
    CHECK_EQ(dsv3_sample(NULL, good, 4, 1, 1, &rng, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample(&token, NULL, 4, 1, 1, &rng, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample(&token, good, 4, 1, 1, NULL, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample(&token, good, 4, 1, 1, &rng, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample(&token, good, 0, 1, 1, &rng, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample(&token, good, (size_t)DSV3_MAX_VOCAB + 1, 1, 1, &rng, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample(&token, good, SIZE_MAX, 1, 1, &rng, candidates, NULL), DSV3_ERR_ARG);
}

static void bad_logits(void) {
    float logits[5];
    dsv3_rng rng = rng_seed(1);
    int32_t token;
    for (int greedy = 0; greedy < 2; greedy++) {
        float temperature = greedy ? 0.0f : 1.0f;
        for (size_t at = 0; at < 5; at++) { /* one bad value anywhere */
            for (size_t i = 0; i < 5; i++) logits[i] = (float)i;
            logits[at] = NAN;
            CHECK_EQ(draw(&token, logits, 5, temperature, 1, &rng), DSV3_ERR_NAN);
            logits[at] = INFINITY;
            CHECK_EQ(draw(&token, logits, 5, temperature, 1, &rng), DSV3_ERR_NAN);
            logits[at] = -INFINITY; /* this one means "never" */
            CHECK_EQ(draw(&token, logits, 5, temperature, 1, &rng), DSV3_OK);
            CHECK(token != (int32_t)at);
            for (size_t i = 0; i < 5; i++) logits[i] = i == at ? -1e30f : -INFINITY; /* only one possible */
            CHECK_EQ(draw(&token, logits, 5, temperature, 1, &rng), DSV3_OK);
            CHECK_EQ(token, at);
            CHECK_EQ(draw(&token, logits, 5, temperature, 0.5f, &rng), DSV3_OK);
            CHECK_EQ(token, at);
            for (size_t i = 0; i < 5; i++) logits[i] = -INFINITY;
            CHECK_EQ(draw(&token, logits, 5, temperature, 1, &rng), DSV3_ERR_NAN);
            logits[at] = NAN;
            CHECK_EQ(draw(&token, logits, 5, temperature, 1, &rng), DSV3_ERR_NAN);
            logits[at] = INFINITY;
            CHECK_EQ(draw(&token, logits, 5, temperature, 1, &rng), DSV3_ERR_NAN);
        }
    }
}

/* ---- greedy ------------------------------------------------------------------------------------------ */

static void greedy(void) {
    static const float tied[6] = {1, 5, 2, 5, 5, -3}, single[1] = {-1e30f};
    float logits[MOST];
    dsv3_rng rng = rng_seed(99);
    int32_t token = -1;
    CHECK_EQ(dsv3_sample(&token, tied, 6, 0, 1, NULL, NULL, NULL), DSV3_OK); /* needs neither */
    CHECK_EQ(token, 1);
    CHECK_EQ(dsv3_sample(&token, tied, 6, 1, 0, NULL, NULL, NULL), DSV3_OK);
    CHECK_EQ(token, 1);
    CHECK_EQ(dsv3_sample(&token, tied, 6, 0, 0.5f, &rng, candidates, NULL), DSV3_OK);
    CHECK_EQ(token, 1);
    CHECK_EQ(dsv3_sample(&token, tied, 6, 1, 0, &rng, candidates, NULL), DSV3_OK);
    CHECK_EQ(token, 1);
    CHECK(rng.state == 99);
    CHECK_EQ(dsv3_sample(&token, single, 1, 0, 1, NULL, NULL, NULL), DSV3_OK);
    CHECK_EQ(token, 0);
    CHECK_EQ(dsv3_sample(&token, single, 1, 1, 1, &rng, candidates, NULL), DSV3_OK);
    CHECK_EQ(token, 0);
    for (int32_t best = 0; best < MOST; best++) { /* also by temperatures and nuclei that leave one token */
        test_fill(logits, MOST, -5, 5);
        logits[best] = 5.5f;
        CHECK_EQ(draw(&token, logits, MOST, 0, 1, NULL), DSV3_OK);
        CHECK_EQ(token, best);
        CHECK_EQ(draw(&token, logits, MOST, 1e-30f, 1, &rng), DSV3_OK);
        CHECK_EQ(token, best);
        CHECK_EQ(draw(&token, logits, MOST, 1e-45f, 0.9f, &rng), DSV3_OK);
        CHECK_EQ(token, best);
        CHECK_EQ(draw(&token, logits, MOST, 1, 1e-30f, &rng), DSV3_OK);
        CHECK_EQ(token, best);
    }
}

/* ---- nucleus ----------------------------------------------------------------------------------------- */

typedef struct entry {
    double p;
    int32_t token;
} entry;

static int by_probability(const void *a, const void *b) {
    const entry *x = (const entry *)a, *y = (const entry *)b;
    if (x->p != y->p) return x->p > y->p ? -1 : 1;
    return x->token < y->token ? -1 : x->token > y->token;
}

/* Probabilities p [V] of the tokens after restriction to the nucleus, in double, by sorting. Returns its size. */
static size_t exact(double *p, const float *logits, size_t V, double temperature, double top_p) {
    entry e[MOST];
    double top = -INFINITY, sum = 0, kept = 0;
    size_t n = 0;
    for (size_t i = 0; i < V; i++) top = fmax(top, (double)logits[i]);
    for (size_t i = 0; i < V; i++) sum += exp(((double)logits[i] - top) / temperature);
    for (size_t i = 0; i < V; i++) {
        e[i].p = exp(((double)logits[i] - top) / temperature) / sum;
        e[i].token = (int32_t)i;
        p[i] = 0;
    }
    qsort(e, V, sizeof e[0], by_probability);
    while (n < V && (n == 0 || kept < top_p)) kept += e[n++].p;
    for (size_t i = 0; i < n; i++) p[e[i].token] = e[i].p / kept;
    return n;
}

/* Sums that floats hold exactly: the nucleus is the smallest set with at least top_p, ties to the lower id. */
static void nucleus_exact(void) {
    static const struct {
        float top_p;
        int32_t size;
    } cases[] = {{0.01f, 1}, {0.25f, 1}, {0.26f, 2}, {0.5f, 2}, {0.51f, 3}, {0.75f, 3}, {0.76f, 4}, {1, 4}};
    static const float logits[5] = {2, 2, -INFINITY, 2, 2};
    static const int32_t ids[4] = {0, 1, 3, 4};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dsv3_rng rng = rng_seed(5);
        int seen[5] = {0}, wrong = 0;
        for (int k = 0; k < 2000; k++) {
            int32_t token;
            wrong += draw(&token, logits, 5, 1, cases[i].top_p, &rng) != DSV3_OK;
            if (token >= 0 && token < 5) seen[token]++;
        }
        CHECK_EQ(wrong, 0);
        CHECK_EQ(seen[2], 0);
        for (int32_t k = 0; k < 4; k++) {
            CHECK((seen[ids[k]] > 0) == (k < cases[i].size));
            if (k < cases[i].size) CHECK(abs(seen[ids[k]] - 2000 / cases[i].size) < 200);
        }
    }
}

/* Nothing outside the nucleus, for any random number: the extremes included. Rounding may let in a token that the
 * exact sum just does without, hence the slightly larger top_p. */
static void nucleus_never_left(void) {
    static const uint64_t extremes[] = {0, UINT64_MAX, (uint64_t)1 << 63, (uint64_t)0xFFFFFF << 40};
    dsv3_rng rng = rng_seed(3);
    int outside = 0;
    for (int i = 0; i < 3000; i++) {
        size_t V = 1 + (size_t)(test_random() % MOST);
        float temperature = test_uniform(0.05f, 3), top_p = i % 4 ? test_uniform(0.001f, 1) : 1, logits[MOST];
        double p[MOST];
        test_fill(logits, V, -6, 6);
        if (i % 3 == 0) { /* many ties */
            for (size_t k = 0; k < V; k++) logits[k] = floorf(logits[k] / 4);
        }
        for (size_t k = 1; k < V; k++) {
            if (test_random() % 4 == 0) logits[k] = -INFINITY; /* never drawn, whatever top_p is */
        }
        (void)exact(p, logits, V, (double)temperature, (double)top_p * (1 + 1e-5));
        for (int k = 0; k < 12; k++) {
            int32_t token;
            if (k < 4) rng = rng_before(extremes[k]);
            outside += draw(&token, logits, V, temperature, top_p, &rng) != DSV3_OK;
            outside += token < 0 || (size_t)token >= V || !(p[token] > 0);
        }
    }
    CHECK_EQ(outside, 0);
}

/* Random numbers in [k/4, (k+1)/4) choose the k-th of four equal tokens: the same seed gives the same text for ever. */
static void draws_in_order(void) {
    static const float logits[4] = {1, 1, 1, 1};
    for (uint64_t k = 0; k < 4; k++) {
        dsv3_rng first = rng_before(k << 62), last = rng_before((k << 62) + (UINT64_MAX >> 2));
        int32_t token;
        CHECK_EQ(draw(&token, logits, 4, 1, 1, &first), DSV3_OK);
        CHECK_EQ(token, k);
        CHECK_EQ(draw(&token, logits, 4, 1, 1, &last), DSV3_OK);
        CHECK_EQ(token, k);
    }
}

/* ---- distribution ------------------------------------------------------------------------------------ */

/* Chi-square of draws against the exact distribution; rare tokens are counted together. */
static void distribution(const float *logits, size_t V, float temperature, float top_p) {
    enum { DRAWS = 200000 };
    double p[MOST], rare = 0, rare_seen = 0, chi = 0, freedom = -1;
    int seen[MOST] = {0}, wrong = 0;
    dsv3_rng rng = rng_seed(2024);
    char text[160];
    (void)exact(p, logits, V, (double)temperature, (double)top_p);
    for (int i = 0; i < DRAWS; i++) {
        int32_t token = -1;
        wrong += dsv3_sample(&token, logits, V, temperature, top_p, &rng, candidates, NULL) != DSV3_OK;
        wrong += token < 0 || (size_t)token >= V;
        if (token >= 0 && (size_t)token < V) seen[token]++;
    }
    for (size_t i = 0; i < V; i++) {
        double want = p[i] * DRAWS;
        if (want < 10) {
            rare += want, rare_seen += seen[i];
            wrong += want <= 0 && seen[i] > 0; /* outside the nucleus */
        } else {
            chi += (seen[i] - want) * (seen[i] - want) / want, freedom++;
        }
    }
    if (rare >= 10) {
        chi += (rare_seen - rare) * (rare_seen - rare) / rare, freedom++;
    } else {
        wrong += rare_seen > 40;
    }
    snprintf(text, sizeof text, "V %d temperature %g top_p %g: chi-square %.1f of %.0f, %d wrong", (int)V,
             (double)temperature, (double)top_p, chi, freedom, wrong);
    test_count(wrong == 0 && chi <= freedom + 4 * sqrt(2 * freedom + 1), __FILE__, __LINE__, text);
}

static void distributions(void) {
    static const float temperatures[] = {0.3f, 1, 2.5f}, top_ps[] = {1, 0.95f, 0.6f, 0.2f};
    float logits[MOST], flat[8];
    test_fill(logits, MOST, -4, 4);
    for (size_t i = 0; i < 3; i++) {
        for (size_t j = 0; j < 4; j++) distribution(logits, j % 2 ? MOST : 17, temperatures[i], top_ps[j]);
    }
    for (size_t i = 0; i < 8; i++) flat[i] = i % 2 ? 3e38f : -3e38f;
    distribution(logits, 16, 1e30f, 1); /* all alike */
    distribution(logits, 16, FLT_MAX, 1);
    distribution(flat, 8, 1e-30f, 1); /* four tied for the first place */
    distribution(flat, 8, 1, 1);
}

/* Many improbable tokens are together as probable as softmax says: here 0.3 %, each 5e-8, beside one of nearly 1.
 * Evenly spaced random numbers from..to instead of many random ones; counts draws from the tail, and how many of
 * them repeat the one before. */
#define TAIL 60000

typedef struct tail_draws {
    int hits, repeated, failed;
    int32_t last, highest;
} tail_draws;

static void tail_draw(tail_draws *d, const float *logits, float top_p, double from, double to, int draws,
                      dsv3_candidate *scratch) {
    for (int i = 0; i < draws; i++) {
        double u = from + (to - from) * (i + 0.5) / draws;
        dsv3_rng rng = rng_before((uint64_t)ldexp(u, 53) << 11);
        int32_t token = -1;
        d->failed += dsv3_sample(&token, logits, TAIL + 1, 1, top_p, &rng, scratch, NULL) != DSV3_OK;
        if (token < 1) continue;
        d->hits++;
        d->repeated += token == d->last;
        d->last = token;
        if (token > d->highest) d->highest = token;
    }
}

static void long_tail(void) {
    float *logits = (float *)test_alloc((TAIL + 1) * sizeof *logits);
    dsv3_candidate *scratch = (dsv3_candidate *)test_alloc((TAIL + 1) * sizeof *scratch);
    tail_draws all = {0, 0, 0, 0, 0}, nucleus = all;
    for (size_t i = 1; i <= TAIL; i++) logits[i] = (float)log(5e-8);
    logits[0] = 0;
    tail_draw(&all, logits, 1, 0, 1, 1000, scratch);
    CHECK(all.hits >= 2 && all.hits <= 4);
    CHECK_EQ(all.repeated, 0);
    CHECK_EQ(all.failed, 0);
    /* 0.999 of the sum: two thirds of the tail. It lies at one end of the random numbers. */
    tail_draw(&nucleus, logits, 0.999f, 0, 0.001, 10, scratch);
    tail_draw(&nucleus, logits, 0.999f, 0.999, 1, 10, scratch);
    CHECK_EQ(nucleus.hits, 10);
    CHECK_EQ(nucleus.repeated, 0);
    CHECK_EQ(nucleus.failed, 0);
    CHECK(nucleus.highest <= 39950); /* 39940, and rounding */
    free(logits), free(scratch);
}

/* ---- log-probabilities -------------------------------------------------------------------------------- */

/* Those of dsv3_sample's draws, and the entropy, against sorting and sums in double. */
static void sample_log_ps(void) {
    int wrong = 0, failed = 0;
    for (int i = 0; i < 2000; i++) {
        size_t V = 1 + test_below(MOST);
        float temperature = test_uniform(0.2f, 3), top_p = i % 2 ? test_uniform(0.05f, 0.999f) : 1, logits[MOST];
        double p[MOST], q[MOST], log_p, entropy = -1, h = 0;
        test_fill(logits, V, -6, 6);
        if (V > 1 && i % 3 == 0) logits[test_below(V)] = -INFINITY;
        if (exact(p, logits, V, (double)temperature, (double)top_p * (1 - 1e-5)) !=
            exact(q, logits, V, (double)temperature, (double)top_p * (1 + 1e-5)))
            continue; /* rounding may decide what belongs to the nucleus */
        for (size_t k = 0; k < V; k++) h -= p[k] > 0 ? p[k] * log(p[k]) : 0;
        for (size_t k = 0; k < V; k++) {
            failed += dsv3_sample_log_p(&log_p, k % 2 ? &entropy : NULL, (int32_t)k, logits, V, temperature, top_p,
                                        candidates, NULL) != DSV3_OK;
            wrong += p[k] > 0 ? fabs(log_p - log(p[k])) > 1e-4 : !(isinf(log_p) && log_p < 0);
            wrong += k % 2 && fabs(entropy - h) > 1e-5;
        }
    }
    CHECK_EQ(failed, 0);
    CHECK_EQ(wrong, 0);
}

/* A token so improbable that its share is 0 in float32 is never drawn: minus infinity, as outside the nucleus. */
static void log_p_of_none(void) {
    static const float logits[3] = {0, -200, -1};
    double p = 1, h = 0, want = log(1 + exp(-1.0));
    for (int whole = 0; whole < 2; whole++) {
        float top_p = whole ? 1.0f : 0.9999999f;
        CHECK_EQ(dsv3_sample_log_p(&p, &h, 1, logits, 3, 1, top_p, candidates, NULL), DSV3_OK);
        CHECK(isinf(p) && p < 0);
        CHECK(fabs(h - (want + exp(-1.0) / (1 + exp(-1.0)))) < 1e-6);
        CHECK_EQ(dsv3_sample_log_p(&p, &h, 2, logits, 3, 1, top_p, candidates, NULL), DSV3_OK);
        CHECK(fabs(p + 1 + want) < 1e-6);
    }
}

static void log_p_edges(void) {
    static const float tied[4] = {1, 5, 5, -INFINITY}, bad[2] = {0, NAN}, none[1] = {-INFINITY};
    static const int32_t token[3] = {1, DSV3_IGNORE, 3}, outside[2][1] = {{4}, {-1}};
    double p[3], h = 7;
    for (int i = 0; i < 2; i++) { /* greedy */
        CHECK_EQ(dsv3_sample_log_p(p, &h, 1, tied, 4, (float)i, 1.0f - (float)i, NULL, NULL), DSV3_OK);
        CHECK(fpclassify(p[0]) == FP_ZERO && fpclassify(h) == FP_ZERO);
        CHECK_EQ(dsv3_sample_log_p(p, NULL, 2, tied, 4, (float)i, 1.0f - (float)i, NULL, NULL), DSV3_OK);
        CHECK(isinf(p[0]) && p[0] < 0);
    }
    CHECK_EQ(dsv3_sample_log_p(NULL, &h, 1, tied, 4, 1, 1, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample_log_p(p, &h, 1, NULL, 4, 1, 1, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample_log_p(p, &h, 1, tied, 0, 1, 1, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample_log_p(p, &h, 1, tied, 4, -1, 1, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample_log_p(p, &h, 1, tied, 4, 1, 1.5f, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample_log_p(p, &h, 1, tied, 4, 1, 1, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sample_log_p(p, &h, 4, tied, 4, 1, 1, candidates, NULL), DSV3_ERR_TOKEN);
    CHECK_EQ(dsv3_sample_log_p(p, &h, -1, tied, 4, 1, 1, candidates, NULL), DSV3_ERR_TOKEN);
    CHECK_EQ(dsv3_sample_log_p(p, &h, 0, bad, 2, 1, 1, candidates, NULL), DSV3_ERR_NAN);
    CHECK_EQ(dsv3_log_p(p, tied, &token[0], 1, 4, NULL), DSV3_OK);
    CHECK(fabs(p[0] + log(2 + exp(-4.0))) < 1e-6);
    CHECK_EQ(dsv3_log_p(p, tied, &token[1], 1, 4, NULL), DSV3_OK);
    CHECK(fpclassify(p[0]) == FP_ZERO);
    CHECK_EQ(dsv3_log_p(p, tied, &token[2], 1, 4, NULL), DSV3_OK);
    CHECK(isinf(p[0]) && p[0] < 0);
    CHECK_EQ(dsv3_log_p(NULL, tied, token, 1, 4, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_log_p(p, NULL, token, 1, 4, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_log_p(p, tied, NULL, 1, 4, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_log_p(p, tied, token, 1, 0, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_log_p(p, tied, token, 1, (size_t)DSV3_MAX_VOCAB + 1, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_log_p(p, tied, outside[0], 1, 4, NULL), DSV3_ERR_TOKEN);
    CHECK_EQ(dsv3_log_p(p, tied, outside[1], 1, 4, NULL), DSV3_ERR_TOKEN);
    CHECK_EQ(dsv3_log_p(p, bad, outside[1], 1, 2, NULL), DSV3_ERR_TOKEN); /* looked at first */
    CHECK_EQ(dsv3_log_p(p, bad, token, 1, 2, NULL), DSV3_ERR_NAN);
    CHECK_EQ(dsv3_log_p(p, none, token + 1, 1, 1, NULL), DSV3_ERR_NAN);
    CHECK_EQ(dsv3_log_p(p, NULL, token, 0, 4, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_log_p(p, bad, token, 0, 2, NULL), DSV3_OK); /* no rows */
}

/* The largest vocabulary: a float sum of its tail would stop growing long before the end. */
static void log_p_large(void) {
    size_t V = (size_t)DSV3_MAX_VOCAB;
    float *logits = (float *)test_alloc(V * sizeof *logits);
    int32_t token[1] = {0};
    double p;
    for (size_t i = 0; i < V; i++) logits[i] = -17;
    logits[0] = 0;
    CHECK_EQ(dsv3_log_p(&p, logits, token, 1, V, NULL), DSV3_OK);
    CHECK(fabs(p + log(1 + (double)(V - 1) * exp(-17.0))) < 1e-6);
    token[0] = (int32_t)V - 1;
    CHECK_EQ(dsv3_log_p(&p, logits, token, 1, V, NULL), DSV3_OK);
    CHECK(fabs(p + 17 + log(1 + (double)(V - 1) * exp(-17.0))) < 1e-6);
    free(logits);
}

/* ---- steering ----------------------------------------------------------------------------------------- */

/* Random logits, with ties and forbidden tokens among them. */
static void some_logits(float *logits, size_t V) {
    test_fill(logits, V, -6, 6);
    for (size_t i = 0; i < V; i++) {
        if (test_below(3) == 0) logits[i] = floorf(logits[i] / 3);
        if (test_below(6) == 0) logits[i] = -INFINITY;
    }
}

/* Tokens that come before i: larger logits, and equal ones of lower id. */
static size_t rank_of(const float *logits, size_t V, size_t i) {
    size_t rank = 0;
    for (size_t k = 0; k < V; k++) rank += logits[k] > logits[i] || (logits[k] >= logits[i] && k < i);
    return rank;
}

static int same_float(float a, float b) { return memcmp(&a, &b, sizeof a) == 0; }

/* Is now [V] before [V] with what `keep` names left as it was, and the rest forbidden? */
static int only_kept(const float *now, const float *before, const int *keep, size_t V) {
    for (size_t i = 0; i < V; i++) {
        if (!same_float(now[i], keep[i] ? before[i] : -INFINITY)) return 0;
    }
    return 1;
}

static void top_k_and_min_p(void) {
    int wrong = 0;
    for (int i = 0; i < 3000; i++) {
        size_t V = 1 + test_below(MOST), k = 1 + test_below(V + 3), room = k < V ? k : V;
        dsv3_candidate *scratch = (dsv3_candidate *)test_alloc(room * sizeof *scratch);
        float before[MOST], now[MOST], min_p = i % 7 ? test_uniform(0, 1) : (float)(i % 2), top = -INFINITY;
        int keep[MOST];
        some_logits(before, V);
        memcpy(now, before, sizeof now);
        for (size_t t = 0; t < V; t++) keep[t] = rank_of(before, V, t) < k;
        wrong += dsv3_logits_top_k(now, V, k, scratch, NULL) != DSV3_OK || !only_kept(now, before, keep, V);
        memcpy(now, before, sizeof now);
        for (size_t t = 0; t < V; t++) top = fmaxf(top, before[t]);
        for (size_t t = 0; t < V; t++) {
            double p = exp((double)before[t] - (double)top);
            if (fabs(p - (double)min_p) < 1e-5 && p < 1) before[t] = now[t] = -100; /* too close */
            keep[t] = before[t] >= top || exp((double)before[t] - (double)top) >= (double)min_p;
        }
        wrong += dsv3_logits_min_p(now, V, min_p, NULL) != DSV3_OK || !only_kept(now, before, keep, V);
        free(scratch);
    }
    CHECK_EQ(wrong, 0);
}

static void penalty_and_bias(void) {
    int wrong = 0;
    for (int i = 0; i < 3000; i++) {
        size_t V = 1 + test_below(MOST), n = test_below(2 * MOST);
        uint8_t *seen = (uint8_t *)test_alloc((V + 7) / 8);
        float before[MOST], now[MOST], want[MOST], bias[2 * MOST], penalty = test_uniform(0.5f, 2);
        int32_t token[2 * MOST];
        some_logits(before, V);
        memset(seen, 0x5A, (V + 7) / 8);
        for (size_t k = 0; k < n; k++) token[k] = (int32_t)test_below(V);
        memcpy(now, before, sizeof now);
        for (size_t t = 0; t < V; t++) {
            int there = 0;
            for (size_t k = 0; k < n; k++) there |= token[k] == (int32_t)t;
            want[t] = !there ? before[t] : before[t] > 0 ? before[t] / penalty : before[t] * penalty;
        }
        wrong += dsv3_logits_penalty(now, V, token, n, penalty, seen, NULL) != DSV3_OK;
        wrong += memcmp(now, want, V * sizeof *now) != 0;
        test_fill(bias, n, -5, 5);
        if (n > 0) bias[0] = -INFINITY;
        memcpy(now, before, sizeof now);
        memcpy(want, before, sizeof want);
        for (size_t k = 0; k < n; k++) want[token[k]] += bias[k];
        wrong += dsv3_logits_bias(now, V, token, bias, n, NULL) != DSV3_OK || memcmp(now, want, V * sizeof *now) != 0;
        free(seen);
    }
    CHECK_EQ(wrong, 0);
}

/* One op after the other on logits [4], which stay as they are. */
#define REFUSED(code, call)                                                                                          \
    do {                                                                                                             \
        memcpy(x, x0, sizeof x);                                                                                     \
        CHECK_EQ(call, code);                                                                                        \
        CHECK(memcmp(x, x0, sizeof x) == 0);                                                                         \
    } while (0)

static void steering_refused(void) {
    static const float bias[2] = {1, 2}, bad_bias[2][2] = {{1, NAN}, {1, INFINITY}};
    static const int32_t token[2] = {0, 3}, outside[2][2] = {{0, 4}, {0, -1}};
    static const size_t sizes[2] = {0, (size_t)DSV3_MAX_VOCAB + 1};
    float x0[4] = {1, -INFINITY, 3, 2}, x[4];
    uint8_t seen[1];
    for (size_t i = 0; i < 2; i++) {
        REFUSED(DSV3_ERR_ARG, dsv3_logits_top_k(x, sizes[i], 2, candidates, NULL));
        REFUSED(DSV3_ERR_ARG, dsv3_logits_min_p(x, sizes[i], 0.5f, NULL));
        REFUSED(DSV3_ERR_ARG, dsv3_logits_penalty(x, sizes[i], token, 2, 2, seen, NULL));
        REFUSED(DSV3_ERR_ARG, dsv3_logits_bias(x, sizes[i], token, bias, 2, NULL));
        REFUSED(DSV3_ERR_TOKEN, dsv3_logits_penalty(x, 4, outside[i], 2, 2, seen, NULL));
        REFUSED(DSV3_ERR_TOKEN, dsv3_logits_bias(x, 4, outside[i], bias, 2, NULL));
        REFUSED(DSV3_ERR_ARG, dsv3_logits_bias(x, 4, token, bad_bias[i], 2, NULL));
    }
    CHECK_EQ(dsv3_logits_top_k(NULL, 4, 2, candidates, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_logits_min_p(NULL, 4, 0.5f, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_logits_penalty(NULL, 4, token, 2, 2, seen, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_logits_bias(NULL, 4, token, bias, 2, NULL), DSV3_ERR_ARG);
    REFUSED(DSV3_ERR_ARG, dsv3_logits_top_k(x, 4, 0, candidates, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_top_k(x, 4, 2, NULL, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_min_p(x, 4, -0.1f, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_min_p(x, 4, 1.1f, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_min_p(x, 4, NAN, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_penalty(x, 4, token, 2, 0, seen, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_penalty(x, 4, token, 2, -1, seen, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_penalty(x, 4, token, 2, INFINITY, seen, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_penalty(x, 4, token, 2, NAN, seen, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_penalty(x, 4, NULL, 2, 2, seen, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_penalty(x, 4, token, 2, 2, NULL, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_bias(x, 4, NULL, bias, 2, NULL));
    REFUSED(DSV3_ERR_ARG, dsv3_logits_bias(x, 4, token, NULL, 2, NULL));
    REFUSED(DSV3_OK, dsv3_logits_penalty(x, 4, NULL, 0, 2, seen, NULL)); /* of nothing */
    REFUSED(DSV3_OK, dsv3_logits_bias(x, 4, NULL, NULL, 0, NULL));
    for (int i = 0; i < 2; i++) {
        x0[2] = i ? INFINITY : NAN;
        REFUSED(DSV3_ERR_NAN, dsv3_logits_top_k(x, 4, 2, candidates, NULL));
        REFUSED(DSV3_ERR_NAN, dsv3_logits_min_p(x, 4, 0.5f, NULL));
        REFUSED(DSV3_ERR_NAN, dsv3_logits_penalty(x, 4, token, 2, 2, seen, NULL));
        REFUSED(DSV3_ERR_NAN, dsv3_logits_bias(x, 4, token, bias, 2, NULL));
    }
    for (size_t i = 0; i < 4; i++) x0[i] = -INFINITY; /* nothing left: no error, and nothing comes back */
    REFUSED(DSV3_OK, dsv3_logits_top_k(x, 4, 2, candidates, NULL));
    REFUSED(DSV3_OK, dsv3_logits_min_p(x, 4, 0.5f, NULL));
    REFUSED(DSV3_OK, dsv3_logits_penalty(x, 4, token, 2, 2, seen, NULL));
    REFUSED(DSV3_OK, dsv3_logits_bias(x, 4, token, bias, 2, NULL));
}

int main(void) {
    random_stream();
    random_uniforms();
    result_codes();
    bad_logits();
    greedy();
    nucleus_exact();
    nucleus_never_left();
    draws_in_order();
    distributions();
    long_tail();
    sample_log_ps();
    log_p_of_none();
    log_p_edges();
    log_p_large();
    top_k_and_min_p();
    penalty_and_bias();
    steering_refused();
    return test_done("sample");
}
