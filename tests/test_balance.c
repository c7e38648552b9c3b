/* test_balance.c -- chapter 7, load balancing: loads, MaxVio, the bias step, the balancer, the balance losses.
 *
 * Losses and statistics are compared with second implementations in double, written from the reports' formulas. A
 * failure here means that padding is counted as load, that MaxVio or a loss is off by a factor, that the bias moves
 * the wrong way, drifts, leaves the finite numbers, or depends on how a step was cut into micro-batches and ranks, or
 * that training would not balance its experts. */
#include "dsv3.h"
#include "synthetic.h"

#include <float.h>

#define MOST 64 /* experts */
#define ROWS 48


static int near(double got, double want, double bound) {
    int ok = fabs(got - want) <= bound * fmax(1.0, fabs(want)); /* NaN never passes */
    if (!ok) fprintf(stderr, "got %.17g, want %.17g\n", got, want);
    return ok;
}

/* K different experts for each of n rows. */
static void random_choice(int32_t *idx, size_t n, size_t K, size_t E) {
    int32_t all[MOST];
    for (size_t t = 0; t < n; t++) {
        for (size_t e = 0; e < E; e++) all[e] = (int32_t)e;
        for (size_t k = 0; k < K; k++) {
            size_t j = k + test_below(E - k);
            int32_t e = all[j];
            all[j] = all[k];
            all[k] = idx[t * K + k] = e;
        }
    }
}

/* Any value but 0 counts. */
static void random_mask(uint8_t *mask, size_t n) {
    static const uint8_t values[4] = {0, 1, 255, 0};
    for (size_t t = 0; t < n; t++) mask[t] = values[test_below(4)];
}

/* ---- Loads --------------------------------------------------------------------------------------------- */

static void counting(void) {
    for (int round = 0; round < 300; round++) {
        size_t E = 1 + test_below(MOST), K = 1 + test_below(E), n = test_below(ROWS);
        uint64_t *load = (uint64_t *)test_alloc(E * sizeof *load), want[MOST];
        int32_t *idx = (int32_t *)test_alloc(n * K * sizeof *idx);
        uint8_t *mask = round % 3 == 0 ? NULL : (uint8_t *)test_alloc(n);
        random_choice(idx, n, K, E);
        if (mask != NULL) random_mask(mask, n);
        for (size_t e = 0; e < E; e++) load[e] = want[e] = test_random() % 1000; /* it adds to what is there */
        for (size_t t = 0; t < n; t++) {
            for (size_t k = 0; k < K; k++) want[idx[t * K + k]] += mask == NULL || mask[t] != 0;
            if (mask != NULL && mask[t] == 0) idx[t * K] = -7; /* padding may hold anything */
        }
        CHECK_EQ(dsv3_load_count(load, idx, mask, n, E, K, NULL), DSV3_OK);
        CHECK(memcmp(load, want, E * sizeof *load) == 0);
        free(load), free(idx), free(mask);
    }
}

static void statistics_golden(void) {
    static const uint64_t load[8] = {5, 3, 0, 4, 4, 4, 2, 10}, none[8] = {0};
    uint64_t one[8] = {0}, equal[8], huge[8];
    dsv3_load_stats s = dsv3_load_statistics(load, 8);
    double entropy = 0;
    for (int e = 0; e < 8; e++) entropy -= load[e] ? (double)load[e] / 32 * log((double)load[e] / 32) / log(8.0) : 0;
    CHECK(s.mean == 4 && s.max_vio == 1.5 && s.min_load == 0 && s.dead == 1);
    CHECK(near(s.entropy, entropy, 1e-14));
    s = dsv3_load_statistics(none, 8);
    CHECK(s.mean == 0 && s.max_vio == 0 && s.min_load == 0 && s.entropy == 0 && s.dead == 8);
    s = dsv3_load_statistics(none, 0);
    CHECK(s.mean == 0 && s.max_vio == 0 && s.dead == 0);
    one[5] = 12; /* one expert alone: the worst there is */
    s = dsv3_load_statistics(one, 8);
    CHECK(s.mean == 1.5 && s.max_vio == 7 && s.min_load == 0 && s.entropy == 0 && s.dead == 7);
    for (int e = 0; e < 8; e++) equal[e] = 13, huge[e] = (uint64_t)1 << 53;
    s = dsv3_load_statistics(equal, 8);
    CHECK(s.mean == 13 && s.max_vio == 0 && s.min_load == 1 && s.dead == 0 && near(s.entropy, 1, 1e-14));
    s = dsv3_load_statistics(equal, 1); /* the only expert there is: perfect */
    CHECK(s.mean == 13 && s.max_vio == 0 && s.min_load == 1 && s.dead == 0 && s.entropy == 1);
    s = dsv3_load_statistics(none, 1);
    CHECK(s.mean == 0 && s.entropy == 0 && s.dead == 1);
    s = dsv3_load_statistics(huge, 8);
    CHECK(s.mean == 9007199254740992.0 && s.max_vio == 0 && s.min_load == 1 && near(s.entropy, 1, 1e-14));
    huge[3] = ((uint64_t)1 << 54) - 1;
    s = dsv3_load_statistics(huge, 8);
    CHECK(near(s.max_vio, 2.0 / 1.125 - 1, 1e-14) && near(s.min_load, 1 / 1.125, 1e-14) && s.dead == 0);
}

static void statistics_random(void) {
    for (int round = 0; round < 300; round++) {
        size_t E = 2 + test_below(MOST - 1), dead = 0;
        uint64_t load[MOST], high = 0, low = UINT64_MAX;
        double sum = 0, entropy = 0;
        dsv3_load_stats s;
        for (size_t e = 0; e < E; e++) load[e] = test_random() % 4 == 0 ? 0 : test_random() >> (11 + 7 * (round % 7));
        load[test_below(E)] += 1;
        for (size_t e = 0; e < E; e++) {
            sum += (double)load[e], dead += load[e] == 0;
            if (load[e] > high) high = load[e];
            if (load[e] < low) low = load[e];
        }
        for (size_t e = 0; e < E; e++) {
            if (load[e] > 0) entropy += (double)load[e] / sum * log(sum / (double)load[e]) / log((double)E);
        }
        s = dsv3_load_statistics(load, E);
        CHECK(near(s.mean * (double)E / sum, 1, 1e-13) && s.dead == dead);
        CHECK(near(s.max_vio, (double)high * (double)E / sum - 1, 1e-12));
        CHECK(near(s.min_load, (double)low * (double)E / sum, 1e-12) && near(s.entropy, entropy, 1e-12));
    }
}

/* ---- The bias step ------------------------------------------------------------------------------------- */

#define RULES 4

/* Where b goes, from the formulas: e = (mean - load) / mean. */
static double moved(double b, const uint64_t *load, size_t E, size_t i, dsv3_bias_rule rule, double speed) {
    double mean = 0, signs = 0, e, sign;
    for (size_t j = 0; j < E; j++) mean += (double)load[j];
    mean /= (double)E;
    for (size_t j = 0; j < E; j++) signs += ((double)load[j] < mean) - ((double)load[j] > mean);
    if (mean == 0) return b;
    e = (mean - (double)load[i]) / mean;
    sign = (e > 0) - (e < 0);
    switch (rule) {
    case DSV3_BIAS_SIGN: return b + speed * sign;
    case DSV3_BIAS_CENTRED: return b + speed * (sign - signs / (double)E);
    case DSV3_BIAS_PROPORTIONAL: return b + speed * e;
    case DSV3_BIAS_FACTOR:
    default: return (1 + b) * (1 + speed * sign) - 1;
    }
}

/* Random loads whose mean is a whole number, and the load of some. */
static void random_load(uint64_t *load, size_t E) {
    uint64_t sum = 0, most = (uint64_t)1 << test_below(30), mean;
    for (size_t e = 0; e < E; e++) sum += load[e] = test_random() % (most + 1);
    mean = sum / (uint64_t)E + 1;
    load[0] += mean * (uint64_t)E - sum;
    for (size_t e = 1; e < E; e++) {
        if (test_random() % 4 != 0 || load[0] + load[e] < mean) continue;
        load[0] = load[0] + load[e] - mean;
        load[e] = mean;
    }
}

static void step_golden(void) {
    static const uint64_t load[8] = {5, 3, 0, 4, 4, 4, 2, 10};
    static const float sign[8] = {-1, 1, 1, 0, 0, 0, 1, -1}, error[8] = {-0.25f, 0.25f, 1, 0, 0, 0, 0.5f, -1.5f};
    float b[RULES][8] = {{0}};
    for (int rule = 0; rule < RULES; rule++) dsv3_bias_step(b[rule], load, 1, 8, (dsv3_bias_rule)rule, 0.001, NULL);
    for (int e = 0; e < 8; e++) {
        CHECK(b[DSV3_BIAS_SIGN][e] == 0.001f * sign[e]);
        CHECK(near((double)b[DSV3_BIAS_CENTRED][e], 0.001 * ((double)sign[e] - 0.125), 1e-9));
        CHECK(near((double)b[DSV3_BIAS_PROPORTIONAL][e], 0.001 * (double)error[e], 1e-9));
        CHECK(near((double)b[DSV3_BIAS_FACTOR][e], 0.001 * (double)sign[e], 1e-9));
    }
    for (int rule = 0; rule < RULES; rule++) { /* and a second time, from where it is now */
        float before[8];
        memcpy(before, b[rule], sizeof before);
        dsv3_bias_step(b[rule], load, 1, 8, (dsv3_bias_rule)rule, 0.25, NULL);
        for (size_t e = 0; e < 8; e++) {
            CHECK(near((double)b[rule][e], moved((double)before[e], load, 8, e, (dsv3_bias_rule)rule, 0.25), 1e-7));
        }
    }
}

static void step_random(void) {
    static const double speeds[] = {0, 0.0001, 0.001, 0.01, 0.5};
    for (int round = 0; round < 400; round++) {
        size_t E = 1 + test_below(MOST);
        dsv3_bias_rule rule = (dsv3_bias_rule)(round % RULES);
        double speed = speeds[test_below(5)];
        float *bias = (float *)test_alloc(E * sizeof *bias), before[MOST];
        uint64_t *load = (uint64_t *)test_alloc(E * sizeof *load);
        int wrong = 0;
        random_load(load, E);
        load[0] += (uint64_t)(round % 3); /* a mean between two whole numbers, too */
        test_fill(bias, E, -0.9f, 2);
        memcpy(before, bias, E * sizeof *bias);
        dsv3_bias_step(bias, load, 1, E, rule, speed, NULL);
        for (size_t e = 0; e < E; e++) {
            wrong += !near((double)bias[e], moved((double)before[e], load, E, e, rule, speed), 2e-7);
        }
        CHECK_EQ(wrong, 0);
        free(bias), free(load);
    }
}

/* Of experts with the same b, one with less load does not end below one with more; at the mean b stays. */
static void step_order(void) {
    for (int round = 0; round < 400; round++) {
        size_t E = 2 + test_below(MOST - 1);
        dsv3_bias_rule rule = (dsv3_bias_rule)(round % RULES);
        float start = test_uniform(-0.99f, 3), bias[MOST];
        uint64_t load[MOST], sum = 0;
        int wrong = 0;
        random_load(load, E);
        for (size_t e = 0; e < E; e++) bias[e] = start, sum += load[e];
        dsv3_bias_step(bias, load, 1, E, rule, (double)test_uniform(0, 0.9f), NULL);
        for (size_t i = 0; i < E; i++) {
            for (size_t j = 0; j < E; j++) wrong += load[i] <= load[j] && bias[i] < bias[j];
            wrong += rule != DSV3_BIAS_CENTRED && load[i] * (uint64_t)E == sum && bias[i] != start;
        }
        CHECK_EQ(wrong, 0);
    }
}

/* Nobody moves: without load, with the same load everywhere, and when there is a single expert. */
static void step_still(void) {
    static const uint64_t none[8] = {0}, equal[8] = {7, 7, 7, 7, 7, 7, 7, 7};
    for (int rule = 0; rule < RULES; rule++) {
        float bias[8], before[8];
        test_fill(bias, 8, -0.9f, 3);
        bias[2] = NAN, bias[3] = FLT_MAX; /* not even touched */
        memcpy(before, bias, sizeof bias);
        dsv3_bias_step(bias, none, 1, 8, (dsv3_bias_rule)rule, 0.1, NULL);
        CHECK(memcmp(bias, before, sizeof bias) == 0);
        bias[2] = before[2] = 0.25f;
        dsv3_bias_step(bias, equal, 1, 8, (dsv3_bias_rule)rule, 0.1, NULL);
        for (int e = 0; e < 8; e++) CHECK(bias[e] == before[e]);
        for (uint64_t load = 0; load < 3; load++) {
            dsv3_bias_step(bias, &load, 1, 1, (dsv3_bias_rule)rule, 0.1, NULL);
            CHECK(bias[0] == before[0]);
        }
    }
}

/* From finite numbers one stays among finite numbers, and FACTOR above -1, whatever the speed. */
static void step_stays_finite(void) {
    static const float edges[] = {FLT_MAX, -FLT_MAX, 3e38f, -3e38f, 0, -0.99999994f, -0.5f, 1e-45f, 1};
    static const double speeds[] = {0.001, 0.999, 1, 2, 1e30, 1e38, DBL_MAX, INFINITY, NAN};
    for (int rule = 0; rule < RULES; rule++) {
        for (size_t i = 0; i < sizeof speeds / sizeof speeds[0]; i++) {
            int wrong = 0;
            for (int round = 0; round < 200; round++) {
                float bias[9];
                uint64_t load[9];
                random_load(load, 9);
                for (size_t e = 0; e < 9; e++) {
                    bias[e] = edges[test_below(9)];
                    if (rule == DSV3_BIAS_FACTOR && bias[e] <= -1) bias[e] = FLT_MAX;
                }
                for (int again = 0; again < 5; again++) {
                    dsv3_bias_step(bias, load, 1, 9, (dsv3_bias_rule)rule, speeds[i], NULL);
                    for (size_t e = 0; e < 9; e++) {
                        wrong += !isfinite(bias[e]) || (rule == DSV3_BIAS_FACTOR && !(bias[e] > -1));
                    }
                }
            }
            CHECK_EQ(wrong, 0);
        }
    }
}

/* A b that would leave its range stops at its end. A speed that is none moves nobody. */
static void step_stops(void) {
    static const uint64_t load[2] = {1, 3};
    static const double none[] = {0, -0.001, -INFINITY, INFINITY, NAN};
    float bias[2] = {FLT_MAX, FLT_MAX};
    dsv3_bias_step(bias, load, 1, 2, DSV3_BIAS_SIGN, (double)FLT_MAX, NULL);
    CHECK(bias[0] == FLT_MAX && bias[1] == 0);
    bias[0] = bias[1] = -3e38f;
    dsv3_bias_step(bias, load, 1, 2, DSV3_BIAS_SIGN, (double)3e38f, NULL);
    CHECK(bias[0] == 0 && bias[1] == -FLT_MAX);
    bias[0] = bias[1] = 0.5f;
    dsv3_bias_step(bias, load, 1, 2, DSV3_BIAS_FACTOR, 1.5, NULL); /* 1.5 * (1 - 1.5) would be negative */
    CHECK(bias[0] == 2.75f && bias[1] == -0.999f);
    bias[0] = bias[1] = 0;
    for (int i = 0; i < 1000; i++) dsv3_bias_step(bias, load, 1, 2, DSV3_BIAS_FACTOR, 0.5, NULL); /* halved for ever */
    CHECK(bias[0] == FLT_MAX && bias[1] == -0.999f);
    for (int rule = 0; rule < RULES; rule++) {
        bias[0] = 0.25f, bias[1] = -0.25f;
        for (int i = 0; i < 5; i++) dsv3_bias_step(bias, load, 1, 2, (dsv3_bias_rule)rule, none[i], NULL);
        CHECK(bias[0] == 0.25f && bias[1] == -0.25f);
    }
}

/* The promises hold at the edges of float and double too: near FLT_MAX less load does not end below more load, a b
 * far below the precision of 1 + b stays what it is, and equal loads are equal when their sum is beyond 2^53. */
static void step_edges(void) {
    static const uint64_t uneven[2][4] = {{1, 4, 5, 6}, {1, 4, 5, 10}}, middle[2] = {7, 7};
    for (int rule = 0; rule < RULES; rule++) {
        double speed = rule == DSV3_BIAS_FACTOR ? 0.5 : 1e38;
        float bias[7];
        uint64_t huge[7];
        int moves = 0;
        for (int i = 0; i < 2; i++) {
            bias[0] = bias[1] = bias[2] = bias[3] = 3e38f;
            dsv3_bias_step(bias, uneven[i], 1, 4, (dsv3_bias_rule)rule, speed, NULL);
            for (int e = 1; e < 4; e++) CHECK(bias[e - 1] >= bias[e]);
        }
        bias[0] = 1e-42f, bias[1] = 1e-10f;
        dsv3_bias_step(bias, middle, 1, 2, (dsv3_bias_rule)rule, 0.5, NULL);
        CHECK(bias[0] == 1e-42f && bias[1] == 1e-10f);
        for (size_t E = 1; E <= 7; E++) {
            for (size_t e = 0; e < E; e++) huge[e] = ((uint64_t)1 << 53) - 1, bias[e] = 0;
            dsv3_bias_step(bias, huge, 1, E, (dsv3_bias_rule)rule, 0.5, NULL);
            for (size_t e = 0; e < E; e++) moves += bias[e] != 0;
        }
        CHECK_EQ(moves, 0);
    }
}

/* CENTRED moves are SIGN moves less a common one, and add up to nothing. */
static void step_centred(void) {
    for (int round = 0; round < 200; round++) {
        size_t E = 2 + test_below(MOST - 1);
        float centred[MOST] = {0}, sign[MOST] = {0};
        uint64_t load[MOST];
        double sum = 0, drift = 0;
        int wrong = 0;
        random_load(load, E);
        dsv3_bias_step(centred, load, 1, E, DSV3_BIAS_CENTRED, 0.001, NULL);
        dsv3_bias_step(sign, load, 1, E, DSV3_BIAS_SIGN, 0.001, NULL);
        for (size_t e = 0; e < E; e++) sum += (double)centred[e], drift += (double)sign[e] / (double)E;
        for (size_t e = 0; e < E; e++) wrong += !(fabs((double)(sign[e] - centred[e]) - drift) < 1e-9);
        CHECK_EQ(wrong, 0);
        CHECK(fabs(sum) < 1e-9 * (double)E);
    }
}

static void schedule(void) {
    dsv3_bias_schedule s = {0.001, 0};
    CHECK(dsv3_bias_speed(&s, 0) == 0.001 && dsv3_bias_speed(&s, UINT64_MAX) == 0.001);
    s.freeze = 14300000000000u; /* V3: tokens */
    CHECK(dsv3_bias_speed(&s, 0) == 0.001 && dsv3_bias_speed(&s, s.freeze - 1) == 0.001);
    CHECK(dsv3_bias_speed(&s, s.freeze) == 0 && dsv3_bias_speed(&s, s.freeze + 1) == 0);
    CHECK(dsv3_bias_speed(&s, UINT64_MAX) == 0);
    s.freeze = 1;
    CHECK(dsv3_bias_speed(&s, 0) == 0.001 && dsv3_bias_speed(&s, 1) == 0);
}

/* ---- The balancer -------------------------------------------------------------------------------------- */

/* Four layers: 0 dense, 1 and 2 MoE, 3 an MTP module; 8 experts, 2 for each token. */
enum { LAYERS = 4, EXPERTS = 8, CHOSEN = 2, LOADS = LAYERS * EXPERTS };

typedef struct balance {
    dsv3_balancer b;
    void *memory;
    float bias[LOADS];
} balance;

static void balance_open(balance *b) {
    dsv3_config c = synth_config(SYNTH_MTP, NULL);
    size_t bytes = 0;
    CHECK_EQ(dsv3_balancer_size(&c, &bytes, NULL), DSV3_OK);
    b->memory = synth_alloc(bytes);
    memset(b->memory, 0xA5, bytes);
    CHECK_EQ(dsv3_balancer_init(&c, &b->b, b->memory, bytes, NULL), DSV3_OK);
    CHECK(b->b.layers == LAYERS && b->b.experts == EXPERTS);
    test_fill(b->bias, LOADS, -0.5f, 0.5f);
}

static void balance_close(balance *b) { synth_release(b->memory); }

/* Random loads in the MoE layers, none in the dense one. */
static void balance_load(uint64_t *load) {
    memset(load, 0, LOADS * sizeof *load);
    for (size_t i = EXPERTS; i < LOADS; i++) load[i] = test_random() % 100;
}

static int all_zero(const uint64_t *load, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (load[i] != 0) return 0;
    }
    return 1;
}

static int untouched(const unsigned char *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] != 0x5A) return 0;
    }
    return 1;
}

static void balancer_setup(void) {
    dsv3_config c = synth_config(SYNTH_MTP, NULL), bad = c;
    dsv3_balancer b;
    size_t need = 0;
    unsigned char *memory;
    bad.n_routed_experts = -1;
    CHECK_EQ(dsv3_balancer_size(NULL, &need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_balancer_size(&bad, &need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_balancer_size(&c, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_balancer_size(&c, &need, NULL), DSV3_OK);
    CHECK(need >= 2 * LOADS * sizeof(uint64_t));
    memory = (unsigned char *)synth_alloc(need + 64);
    memset(memory, 0x5A, need + 64);
    CHECK_EQ(dsv3_balancer_init(&c, NULL, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_balancer_init(NULL, &b, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_balancer_init(&bad, &b, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_balancer_init(&c, &b, NULL, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_balancer_init(&c, &b, memory, need - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_balancer_init(&c, &b, memory, 0, NULL), DSV3_ERR_MEMORY);
    for (size_t shift = 1; shift < DSV3_ALIGN; shift *= 2) {
        CHECK_EQ(dsv3_balancer_init(&c, &b, memory + shift, need, NULL), DSV3_ERR_ALIGN);
    }
    CHECK(untouched(memory, need + 64)); /* refused is refused */
    synth_release(memory);
    c = synth_config(SYNTH_DENSE, NULL); /* no expert anywhere: nothing to do, and no harm done */
    CHECK_EQ(dsv3_balancer_size(&c, &need, NULL), DSV3_OK);
    memory = (unsigned char *)synth_alloc(need);
    CHECK_EQ(dsv3_balancer_init(&c, &b, memory, need, NULL), DSV3_OK);
    CHECK_EQ(dsv3_balancer_step(&b, NULL, 0, NULL), DSV3_OK);
    synth_release(memory);
}

/* Memory of exactly the size asked for, at every legal beginning, and what is in it. */
static void balancer_memory(void) {
    dsv3_config c = synth_config(SYNTH_MTP, NULL);
    size_t need = 0;
    CHECK_EQ(dsv3_balancer_size(&c, &need, NULL), DSV3_OK);
    for (size_t shift = 0; shift < 64; shift += DSV3_ALIGN) {
        unsigned char *memory = (unsigned char *)synth_alloc(need + 64);
        uint64_t load[LOADS];
        float bias[LOADS] = {0};
        dsv3_balancer b;
        memset(memory, 0x5A, need + 64);
        memset(&b, 0xFF, sizeof b);
        CHECK_EQ(dsv3_balancer_init(&c, &b, memory + shift, need, NULL), DSV3_OK);
        CHECK(b.rule == DSV3_BIAS_SIGN && b.schedule.speed == 0.001 && b.schedule.freeze == 0);
        CHECK(b.reduce == NULL && b.layers == LAYERS && b.experts == EXPERTS);
        CHECK(all_zero(b.load, LOADS) && all_zero(b.load_all, LOADS));
        balance_load(load);
        memcpy(b.load, load, sizeof load);
        CHECK(all_zero(b.load_all, LOADS));
        CHECK_EQ(dsv3_balancer_step(&b, bias, 0, NULL), DSV3_OK);
        CHECK(all_zero(b.load, LOADS) && memcmp(b.load_all, load, sizeof load) == 0);
        CHECK(untouched(memory, shift) && untouched(memory + shift + need, 64 - shift));
        synth_release(memory);
    }
}

/* A step is dsv3_bias_step for each layer; what was counted goes to load_all; the dense layer's row stays. */
static void balancer_steps(void) {
    for (int rule = 0; rule < RULES; rule++) {
        balance b;
        uint64_t all[LOADS] = {0}, load[LOADS];
        float want[LOADS], dense[EXPERTS];
        balance_open(&b);
        b.b.rule = (dsv3_bias_rule)rule;
        b.b.schedule.speed = 0.01;
        b.b.schedule.freeze = 40;
        memcpy(dense, b.bias, sizeof dense);
        for (uint64_t step = 0; step < 6; step++) { /* frozen from the fifth on */
            balance_load(load);
            memcpy(b.b.load, load, sizeof load);
            memcpy(want, b.bias, sizeof want);
            for (size_t l = 1; l < LAYERS && step < 4; l++) {
                dsv3_bias_step(want + l * EXPERTS, load + l * EXPERTS, 1, EXPERTS, (dsv3_bias_rule)rule, 0.01, NULL);
            }
            for (size_t i = 0; i < LOADS; i++) all[i] += load[i];
            CHECK((memcmp(want, b.bias, sizeof want) == 0) == (step >= 4));
            CHECK_EQ(dsv3_balancer_step(&b.b, b.bias, 10 * step, NULL), DSV3_OK);
            CHECK(memcmp(want, b.bias, sizeof want) == 0 && memcmp(dense, b.bias, sizeof dense) == 0);
            CHECK(all_zero(b.b.load, LOADS) && memcmp(all, b.b.load_all, sizeof all) == 0);
        }
        balance_close(&b);
    }
}

/* Another rank: its loads, and what it was asked. */
typedef struct rank {
    uint64_t load[LOADS];
    size_t n, calls;
    dsv3_result answer;
} rank;

static dsv3_result add_rank(void *user, uint64_t *load, size_t n) {
    rank *r = (rank *)user;
    r->n = n;
    r->calls++;
    for (size_t i = 0; i < n && r->answer == DSV3_OK; i++) load[i] += r->load[i];
    return r->answer;
}

/* Two ranks, each seeing its half, both take the step of the whole. */
static void balancer_ranks(void) {
    balance part[2], whole;
    rank other[2];
    balance_open(&whole);
    for (int i = 0; i < 2; i++) {
        balance_open(&part[i]);
        memset(&other[i], 0, sizeof other[i]);
        memcpy(part[i].bias, whole.bias, sizeof whole.bias);
        part[i].b.reduce = add_rank;
        part[i].b.reduce_user = &other[i];
    }
    for (uint64_t step = 0; step < 5; step++) {
        for (int i = 0; i < 2; i++) {
            balance_load(part[i].b.load);
            memcpy(other[1 - i].load, part[i].b.load, sizeof other[i].load);
            for (size_t j = 0; j < LOADS; j++) whole.b.load[j] += part[i].b.load[j];
        }
        CHECK_EQ(dsv3_balancer_step(&whole.b, whole.bias, step, NULL), DSV3_OK);
        for (int i = 0; i < 2; i++) {
            CHECK_EQ(dsv3_balancer_step(&part[i].b, part[i].bias, step, NULL), DSV3_OK);
            CHECK(memcmp(part[i].bias, whole.bias, sizeof whole.bias) == 0);
            CHECK(memcmp(part[i].b.load_all, whole.b.load_all, LOADS * sizeof(uint64_t)) == 0);
            CHECK(all_zero(part[i].b.load, LOADS));
            CHECK_EQ(other[i].n, LOADS);
            CHECK_EQ(other[i].calls, step + 1);
        }
    }
    balance_close(&part[0]), balance_close(&part[1]), balance_close(&whole);
}

/* The other ranks cannot be reached: nothing has happened, and the step can be taken later. */
static void balancer_reduce_fails(void) {
    static const dsv3_result answers[] = {DSV3_ERR_MISSING, DSV3_ERR_ARG, DSV3_ERR_NAN};
    balance b;
    rank other;
    uint64_t load[LOADS], all[LOADS];
    float bias[LOADS];
    memset(&other, 0, sizeof other);
    balance_open(&b);
    b.b.reduce = add_rank, b.b.reduce_user = &other;
    balance_load(b.b.load);
    CHECK_EQ(dsv3_balancer_step(&b.b, b.bias, 0, NULL), DSV3_OK);
    balance_load(b.b.load);
    memcpy(load, b.b.load, sizeof load), memcpy(all, b.b.load_all, sizeof all), memcpy(bias, b.bias, sizeof bias);
    for (size_t i = 0; i < 3; i++) {
        other.answer = answers[i];
        CHECK_EQ(dsv3_balancer_step(&b.b, b.bias, 1, NULL), answers[i]);
        CHECK(memcmp(load, b.b.load, sizeof load) == 0 && memcmp(all, b.b.load_all, sizeof all) == 0);
        CHECK(memcmp(bias, b.bias, sizeof bias) == 0);
    }
    other.answer = DSV3_OK;
    CHECK_EQ(dsv3_balancer_step(&b.b, b.bias, 1, NULL), DSV3_OK);
    CHECK(memcmp(bias, b.bias, sizeof bias) != 0 && all_zero(b.b.load, LOADS));
    for (size_t i = 0; i < LOADS; i++) CHECK_EQ(b.b.load_all[i], all[i] + load[i]);
    balance_close(&b);
}

/* An optimizer step cut into micro-batches in any way is the same step. */
static void balancer_micro_batches(void) {
    int32_t idx[LAYERS][ROWS * CHOSEN];
    uint8_t mask[ROWS];
    balance whole;
    random_mask(mask, ROWS);
    balance_open(&whole);
    for (size_t l = 1; l < LAYERS; l++) {
        random_choice(idx[l], ROWS, CHOSEN, EXPERTS);
        dsv3_load_count(whole.b.load + l * EXPERTS, idx[l], mask, ROWS, EXPERTS, CHOSEN, NULL);
    }
    for (int cut = 0; cut < 20; cut++) {
        balance parts;
        balance_open(&parts);
        memcpy(parts.bias, whole.bias, sizeof parts.bias);
        for (size_t t = 0, n; t < ROWS; t += n) {
            n = cut == 0 ? 1 : 1 + test_below(ROWS - t);
            for (size_t l = 1; l < LAYERS; l++) {
                dsv3_load_count(parts.b.load + l * EXPERTS, idx[l] + t * CHOSEN, mask + t, n, EXPERTS, CHOSEN, NULL);
            }
        }
        CHECK(memcmp(parts.b.load, whole.b.load, LOADS * sizeof(uint64_t)) == 0);
        CHECK_EQ(dsv3_balancer_step(&parts.b, parts.bias, 0, NULL), DSV3_OK);
        for (size_t l = 1; l < LAYERS; l++) { /* the step of the whole, on the bias as it was */
            float want[EXPERTS];
            memcpy(want, whole.bias + l * EXPERTS, sizeof want);
            dsv3_bias_step(want, whole.b.load + l * EXPERTS, 1, EXPERTS, DSV3_BIAS_SIGN, 0.001, NULL);
            CHECK(memcmp(want, parts.bias + l * EXPERTS, sizeof want) == 0);
        }
        balance_close(&parts);
    }
    balance_close(&whole);
}

/* ---- The losses, from the formulas --------------------------------------------------------------------- */

typedef struct batch {
    size_t n, E, K, devices, most;
    float score[ROWS * MOST];
    int32_t idx[ROWS * MOST];
    uint8_t mask[ROWS];
    int masked, chosen, hostile; /* are mask and idx used? is there nonsense in what is masked? */
} batch;

static int counts(const batch *b, size_t t) { return !b->masked || b->mask[t] != 0; }

/* 1[i in TopK(s_t)]: fewer than K are higher, or equal and before it. Or the choice that was made. */
static int selected(const batch *b, size_t t, size_t i) {
    const float *s = b->score + t * b->E;
    size_t before = 0, found = 0;
    for (size_t k = 0; k < b->K; k++) found += b->idx[t * b->K + k] == (int32_t)i;
    for (size_t j = 0; j < b->E; j++) before += s[j] > s[i] || (s[j] == s[i] && j < i);
    return b->chosen ? found > 0 : before < b->K;
}

static double tokens(const batch *b) {
    double T = 0;
    for (size_t t = 0; t < b->n; t++) T += counts(b, t);
    return T;
}

/* f_i = E / (K T) sum_t 1[i in TopK(s_t)] */
static double f_of(const batch *b, size_t i) {
    double sum = 0;
    for (size_t t = 0; t < b->n; t++) sum += counts(b, t) && selected(b, t, i);
    return (double)b->E / ((double)b->K * tokens(b)) * sum;
}

/* P_i = 1/T sum_t s_ti / sum_j s_tj, a row without scores adding nothing */
static double p_of(const batch *b, size_t i) {
    double sum = 0;
    for (size_t t = 0; t < b->n; t++) {
        double all = 0;
        for (size_t j = 0; j < b->E; j++) all += (double)b->score[t * b->E + j];
        if (counts(b, t) && all > 0) sum += (double)b->score[t * b->E + i] / all;
    }
    return sum / tokens(b);
}

static double balance_want(const batch *b) {
    double sum = 0;
    for (size_t i = 0; i < b->E && tokens(b) > 0; i++) sum += f_of(b, i) * p_of(b, i);
    return sum;
}

/* f'_d = the mean of its experts' f, P'_d = the sum of their P */
static double device_want(const batch *b) {
    size_t each = b->E / b->devices;
    double sum = 0;
    for (size_t d = 0; d < b->devices && tokens(b) > 0; d++) {
        double f = 0, p = 0;
        for (size_t i = d * each; i < (d + 1) * each; i++) f += f_of(b, i) / (double)each, p += p_of(b, i);
        sum += f * p;
    }
    return sum;
}

/* f''_d = D / (M T) times the number of tokens that are sent to device d */
static double communication_want(const batch *b) {
    size_t each = b->E / b->devices;
    double sum = 0;
    for (size_t d = 0; d < b->devices && tokens(b) > 0; d++) {
        double sent = 0, p = 0;
        for (size_t i = d * each; i < (d + 1) * each; i++) p += p_of(b, i);
        for (size_t t = 0; t < b->n; t++) {
            int there = 0;
            for (size_t i = d * each; i < (d + 1) * each; i++) there |= selected(b, t, i);
            sent += counts(b, t) && there;
        }
        sum += (double)b->devices / ((double)b->most * tokens(b)) * sent * p;
    }
    return sum;
}

static dsv3_result (*const losses[3])(double *, const dsv3_routing *, double *, dsv3_error *) = {
    dsv3_balance_loss, dsv3_device_loss, dsv3_communication_loss};

static double balance_loss(const float *score, const int32_t *idx, const uint8_t *mask, size_t n, size_t E, size_t K) {
    const dsv3_routing r = {score, idx, mask, n, E, K, 0, 0};
    double loss = NAN, scratch[2 * MOST];
    CHECK_EQ(dsv3_balance_loss(&loss, &r, scratch, NULL), DSV3_OK);
    return loss;
}

/* Runs in memory of exact size; kind 0: balance, 1: device, 2: communication. */
static double loss_got(const batch *b, int kind) {
    size_t n = b->n, E = b->E, K = b->K;
    float *score = (float *)test_alloc(n * E * sizeof *score);
    int32_t *idx = b->chosen ? (int32_t *)test_alloc(n * K * sizeof *idx) : NULL;
    uint8_t *mask = b->masked ? (uint8_t *)test_alloc(n) : NULL;
    double *scratch = (double *)test_alloc(2 * E * sizeof *scratch), got = NAN;
    memcpy(score, b->score, n * E * sizeof *score);
    memset(scratch, 0xFF, 2 * E * sizeof *scratch);
    if (idx != NULL) memcpy(idx, b->idx, n * K * sizeof *idx);
    if (mask != NULL) memcpy(mask, b->mask, n);
    for (size_t t = 0; t < n && b->hostile; t++) {
        for (size_t e = 0; e < E && !counts(b, t); e++) score[t * E + e] = NAN;
        for (size_t k = 0; k < K && idx != NULL && !counts(b, t); k++) idx[t * K + k] = k % 2 ? -7 : INT32_MAX;
    }
    {
        const dsv3_routing r = {score, idx, mask, n, E, K, kind > 0 ? b->devices : 0, kind > 1 ? b->most : 0};
        CHECK_EQ(losses[kind](&got, &r, scratch, NULL), DSV3_OK);
    }
    free(score), free(idx), free(mask), free(scratch);
    return got;
}

static void random_batch(batch *b, int round) {
    memset(b, 0, sizeof *b);
    b->devices = 1 + test_below(8);
    b->E = b->devices * (1 + test_below(MOST / b->devices));
    b->K = 1 + test_below(b->E < 9 ? b->E : 9);
    b->most = 1 + test_below(b->devices);
    b->n = 1 + test_below(ROWS);
    b->masked = round % 2, b->chosen = round / 2 % 2, b->hostile = round / 4 % 2;
    for (size_t i = 0; i < b->n * b->E; i++) {
        b->score[i] = round % 5 == 0 ? (float)(test_random() % 4) * 0.25f : test_uniform(0, 1); /* ties too */
    }
    for (size_t t = 0; t < b->n; t++) {
        float scale = round % 3 == 0 ? powf(10, test_uniform(-30, 0)) : 1;
        if (test_random() % 8 == 0) scale = 0; /* every sigmoid underflowed */
        for (size_t e = 0; e < b->E; e++) b->score[t * b->E + e] *= scale;
    }
    random_choice(b->idx, b->n, b->K, b->E);
    random_mask(b->mask, b->n);
    if (round % 11 == 0) memset(b->mask, 0, b->n);
}

static void losses_random(void) {
    static batch b;
    for (int round = 0; round < 600; round++) {
        random_batch(&b, round);
        CHECK(near(loss_got(&b, 0), balance_want(&b), 1e-12));
        CHECK(near(loss_got(&b, 1), device_want(&b), 1e-12));
        b.chosen = 1; /* without a choice nothing is sent anywhere */
        CHECK(near(loss_got(&b, 2), communication_want(&b), 1e-12));
        b.masked = 1;
        memset(b.mask, 0, sizeof b.mask); /* nobody counts */
        for (int kind = 0; kind < 3; kind++) CHECK(loss_got(&b, kind) == 0);
    }
}

/* The three tokens of the golden router table as one sequence. */
static void loss_golden(void) {
    float score[48];
    for (int i = 0; i < 48; i++) score[i] = (float)(1 / (1 + exp(-2 * sin(1 + 0.9 * (i % 16) + 1.7 * (i / 16)))));
    CHECK(near(balance_loss(score, NULL, NULL, 3, 16, 4), 1.01646217, 1e-8));
}

/* Each row is the one before, two experts further: everybody has the same load, and every loss is 1. Two devices out
 * of four are reached by each token. The worst is all tokens on the same experts. */
static void loss_even_and_worst(void) {
    static batch b;
    memset(&b, 0, sizeof b);
    b.n = 4, b.E = 8, b.K = 4, b.devices = 4, b.most = 2;
    for (size_t t = 0; t < b.n; t++) {
        for (size_t e = 0; e < b.E; e++) {
            size_t place = (e + 2 * t) % b.E;
            b.score[t * b.E + e] = place < 4 ? 0.9f - 0.1f * (float)(place % 2) : 0.2f + 0.1f * (float)(place % 2);
        }
        for (size_t k = 0; k < b.K; k++) b.idx[t * b.K + k] = (int32_t)((k + b.E - 2 * t) % b.E);
    }
    for (b.chosen = 0; b.chosen < 2; b.chosen++) {
        CHECK(near(loss_got(&b, 0), 1, 1e-7));
        CHECK(near(loss_got(&b, 1), 1, 1e-7));
    }
    b.chosen = 1;
    CHECK(near(loss_got(&b, 2), 1, 1e-7));
    for (size_t i = 0; i < b.n * b.E; i++) b.score[i] = i % b.E < b.K ? 1 : 0;
    for (size_t i = 0; i < b.n * b.K; i++) b.idx[i] = (int32_t)(i % b.K);
    CHECK(near(loss_got(&b, 0), 2, 1e-12)); /* E / K */
    CHECK(near(loss_got(&b, 1), 2, 1e-12)); /* devices / 2: two of four have it all */
    CHECK(near(loss_got(&b, 2), 2, 1e-12));
    b.chosen = 0;
    CHECK(near(loss_got(&b, 0), 2, 1e-12));
}

/* By hand: a row whose scores are all 0 counts in f (experts 0 and 1, ties to the lower index) and not in P. */
static void loss_zero_row(void) {
    static const float score[8] = {0, 0, 0, 0, 0.5f, 0.125f, 0.25f, 0.125f}, zero[8] = {0};
    static const uint8_t second[2] = {0, 1};
    /* counts 2 1 1 0, P = (0.5, 0.125, 0.25, 0.125) / 2; f = counts * 4 / (2 * 2) */
    CHECK(near(balance_loss(score, NULL, NULL, 2, 4, 2), (2 * 0.5 + 0.125 + 0.25) / 2, 1e-15));
    CHECK(near(balance_loss(score, NULL, second, 2, 4, 2), 2 * 0.5 + 2 * 0.25, 1e-15));
    CHECK(balance_loss(zero, NULL, NULL, 2, 4, 2) == 0);
    CHECK(balance_loss(zero, NULL, NULL, 0, 4, 2) == 0);
}

/* ---- Dynamics: a skewed stream ------------------------------------------------------------------------- */

/* Scores of fresh tokens whose logits lean towards the higher experts. */
static void stream(float *score, size_t n) {
    for (size_t i = 0; i < n * EXPERTS; i++) {
        float z = 0.2f * (float)(i % EXPERTS) + test_uniform(-2, 2);
        score[i] = 1 / (1 + expf(-z));
    }
}

/* The largest MaxVio of the last 100 of 300 steps; *first is where it first was below 0.1 (-1: never). */
static double late_max_vio(dsv3_bias_form form, dsv3_bias_rule rule, double speed, double *lowest, uint64_t freeze) {
    enum { N = 4096, STEPS = 300 };
    static float score[N * EXPERTS], gate[N * CHOSEN];
    static int32_t idx[N * CHOSEN];
    float scratch[EXPERTS + 1];
    dsv3_config c = dsv3_config_default();
    double worst = 0;
    balance b;
    c.n_routed_experts = EXPERTS, c.num_experts_per_tok = CHOSEN, c.bias_form = form;
    balance_open(&b);
    memset(b.bias, 0, sizeof b.bias);
    b.b.rule = rule, b.b.schedule.speed = speed, b.b.schedule.freeze = freeze;
    test_state = 99;
    *lowest = 1e9;
    for (uint64_t step = 0; step < STEPS; step++) {
        float *bias = b.bias + EXPERTS; /* of layer 1 */
        double vio;
        stream(score, N);
        dsv3_router_select(&c, idx, gate, score, bias, NULL, N, scratch, NULL);
        dsv3_load_count(b.b.load + EXPERTS, idx, NULL, N, EXPERTS, CHOSEN, NULL);
        vio = dsv3_load_statistics(b.b.load + EXPERTS, EXPERTS).max_vio;
        dsv3_balancer_step(&b.b, b.bias, step, NULL);
        *lowest = fmin(*lowest, vio);
        if (step >= STEPS - 100) worst = fmax(worst, vio);
    }
    balance_close(&b);
    return worst;
}

static void dynamics(void) {
    double lowest, worst;
    worst = late_max_vio(DSV3_BIAS_ADD, DSV3_BIAS_SIGN, 0, &lowest, 0);
    CHECK(lowest > 0.5 && worst > 0.5); /* nothing balances by itself */
    worst = late_max_vio(DSV3_BIAS_ADD, DSV3_BIAS_SIGN, 0.001, &lowest, 50);
    CHECK(worst > 0.1); /* frozen too early */
    CHECK(late_max_vio(DSV3_BIAS_ADD, DSV3_BIAS_SIGN, 0.001, &lowest, 0) < 0.1);
    CHECK(late_max_vio(DSV3_BIAS_ADD, DSV3_BIAS_SIGN, 0.001, &lowest, 250) < 0.1); /* stays without further steps */
    CHECK(late_max_vio(DSV3_BIAS_ADD, DSV3_BIAS_CENTRED, 0.001, &lowest, 0) < 0.1);
    CHECK(late_max_vio(DSV3_BIAS_ADD, DSV3_BIAS_PROPORTIONAL, 0.01, &lowest, 0) < 0.1);
    CHECK(late_max_vio(DSV3_BIAS_MULTIPLY, DSV3_BIAS_SIGN, 0.001, &lowest, 0) < 0.1);
    CHECK(late_max_vio(DSV3_BIAS_MULTIPLY, DSV3_BIAS_FACTOR, 0.001, &lowest, 0) < 0.1);
}

int main(void) {
    counting();
    statistics_golden();
    statistics_random();
    step_golden();
    step_random();
    step_order();
    step_still();
    step_stays_finite();
    step_stops();
    step_edges();
    step_centred();
    schedule();
    balancer_setup();
    balancer_memory();
    balancer_steps();
    balancer_ranks();
    balancer_reduce_fails();
    balancer_micro_batches();
    losses_random();
    loss_golden();
    loss_even_and_worst();
    loss_zero_row();
    dynamics();
    return test_done("balance");
}
