/* router.c -- a program of its own that uses dsv3.h for its router alone: no model, no files, no memory but plain arrays.
 *
 * 16 experts in 4 groups; a token is sent to 4 experts of at most 2 groups. A stream of tokens, most of them alike, is
 * routed again and again while the biases of loaded experts sink and those of idle ones rise, until MaxVio, largest load
 * / mean load - 1, is below 0.1. Whatever the biases are, each choice must be a valid one, the gate weights of a token
 * must sum to the scale, and no assignment may get lost. Then each mistake of a caller must be named.
 *
 * Build:  cc -std=c99 router.c $(pkg-config --cflags --libs dsv3) -o router
 */
#define DSV3_IMPLEMENTATION
#include <dsv3.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { E = 16, K = 4, G = 4, TOP_G = 2, D = 12, N = 512, STEPS = 400 }; /* D: width of a token; N: tokens of a step */

static float x[N * D], w[E * D], score[N * E], gate[N * K], again[N * K], bias[E];
static int32_t idx[N * K];
static int failures;

static void expect(int truth, const char *what) {
    if (truth) return;
    printf("router: %s\n", what);
    failures++;
}

/* The code must be this one, and the text in one line hold both words: where it is wrong, and what was expected or found. */
static void expect_error(dsv3_result found, dsv3_result code, const dsv3_error *error, const char *name,
                         const char *says) {
    char text[256];
    dsv3_error_text(error, text, sizeof text);
    printf("  %s\n", text);
    expect(found == code && error->code == code, "another code");
    expect(strstr(text, name) != NULL && strstr(text, says) != NULL, "the text of an error does not tell enough");
}

static float noise(dsv3_rng *rng) { return 2.0f * dsv3_random_uniform(rng) - 1.0f; }

/* Tokens, three of four a noisy copy of one word, and the router's weights. */
static void draw(dsv3_rng *rng) {
    float word[D];
    for (int i = 0; i < D; i++) word[i] = noise(rng);
    for (int t = 0; t < N; t++) {
        for (int i = 0; i < D; i++) x[t * D + i] = (t % 4 < 3 ? word[i] : 0) + 0.6f * noise(rng);
    }
    for (int i = 0; i < E * D; i++) w[i] = noise(rng);
}

/* Is each row of idx K different experts of at most TOP_G groups, with weights that sum to the scale? */
static void check_rows(const dsv3_config *config) {
    for (int t = 0; t < N; t++) {
        int used[E] = {0}, groups[G] = {0}, n_groups = 0, valid = 1;
        double sum = 0;
        for (int k = 0; k < K; k++) {
            int e = (int)idx[t * K + k];
            if (e < 0 || e >= E) {
                expect(0, "an expert that does not exist");
                return;
            }
            valid = valid && !used[e]++ && gate[t * K + k] > 0;
            n_groups += !groups[e / (E / G)]++;
            sum += (double)gate[t * K + k];
        }
        expect(valid, "an expert twice in a row, or one that weighs nothing");
        expect(n_groups <= TOP_G, "experts of too many groups");
        expect(fabs(sum - (double)config->routed_scaling_factor) < 1e-5, "gate weights do not sum to the scale");
    }
}

static void balance(const dsv3_config *config) {
    dsv3_load_stats stats;
    double first = 0, last = 0;
    int step = 0;
    for (; step < STEPS; step++) {
        float scratch[E + G];
        uint64_t load[E] = {0}, sum = 0;
        dsv3_error error;
        if (dsv3_router_select(config, idx, gate, score, bias, NULL, N, scratch, &error) != DSV3_OK) break;
        check_rows(config);
        dsv3_load_count(load, idx, NULL, N, E, K, NULL);
        for (int e = 0; e < E; e++) sum += load[e];
        expect(sum == (uint64_t)N * K, "assignments got lost");
        stats = dsv3_load_statistics(load, E);
        last = stats.max_vio;
        if (step == 0) {
            first = last;
            printf("  step %3d  MaxVio %.2f  dead %d\n", step, last, (int)stats.dead);
        }
        if (last < 0.1) break;
        dsv3_bias_step(bias, load, 1, E, DSV3_BIAS_SIGN, 0.002, NULL);
    }
    printf("  step %3d  MaxVio %.2f\n", step, last);
    expect(first > 1.0, "the stream is not skewed");
    expect(last < 0.1, "MaxVio has not fallen");
    /* The same choice given from outside, as one replays a routing: the weights are the same, for biases have no part. */
    expect(dsv3_router_weights(config, again, idx, score, N, NULL) == DSV3_OK, "dsv3_router_weights");
    expect(memcmp(again, gate, sizeof gate) == 0, "weights of a replayed choice differ");
}

static void mistakes(dsv3_config config) {
    float scratch[E + G], keep = score[3];
    int32_t right = idx[5];
    dsv3_backend backend;
    dsv3_context context;
    dsv3_error error;
    memset(again, 0, sizeof again);
    idx[5] = E;
    expect_error(dsv3_router_weights(&config, again, idx, score, N, &error), DSV3_ERR_ARG, &error, "idx", "row 1");
    idx[5] = idx[4];
    expect_error(dsv3_router_weights(&config, again, idx, score, N, &error), DSV3_ERR_ARG, &error, "idx", "twice");
    idx[5] = right;
    expect(again[0] <= 0 && again[N * K - 1] <= 0, "weights were written in spite of an error");
    score[3] = NAN; /* all rows are done even so */
    expect_error(dsv3_router_select(&config, idx, gate, score, bias, NULL, N, scratch, &error), DSV3_ERR_NAN, &error,
                 "score", "finite");
    check_rows(&config);
    score[3] = keep;
    expect(dsv3_router_select(&config, idx, gate, score, bias, NULL, N, scratch, &error) == DSV3_OK &&
               error.code == DSV3_OK,
           "success does not clear the error");
    expect(dsv3_backend_find(&backend, "abacus", NULL) == DSV3_ERR_ARG, "a backend that does not exist");
    expect_error(dsv3_context_init(&context, (dsv3_backend)DSV3_BACKENDS, 1, &error), DSV3_ERR_UNSUPPORTED, &error,
                 "backend", "6");

    /* A whole config is checked at once: here sizes that pass, and one wrong routing field at a time. */
    config.vocab_size = config.hidden_size = config.intermediate_size = config.moe_intermediate_size = 8;
    config.num_hidden_layers = config.num_attention_heads = 1;
    config.kv_lora_rank = config.qk_nope_head_dim = config.qk_rope_head_dim = config.v_head_dim = 4;
    expect(dsv3_config_check(&config, &error) == DSV3_OK, "a valid config");
    config.num_experts_per_tok = E + 1;
    expect_error(dsv3_config_check(&config, &error), DSV3_ERR_ARG, &error, "num_experts_per_tok", "found 17");
    config.num_experts_per_tok = K;
    config.n_group = 3;
    expect_error(dsv3_config_check(&config, &error), DSV3_ERR_ARG, &error, "n_group", "is 3");
    config.n_group = G;
    config.topk_group = G + 1;
    expect_error(dsv3_config_check(&config, &error), DSV3_ERR_ARG, &error, "topk_group", "found 5");
}

int main(void) {
    dsv3_config config =
        dsv3_config_default(); /* of which the router reads the fields set here, and their neighbours */
    dsv3_tensor gate_w = {w, NULL, E, D, DSV3_F32, 2, 0};
    dsv3_context context;
    dsv3_rng rng = {1};
    size_t bytes;
    void *scratch;
    config.n_routed_experts = E;
    config.num_experts_per_tok = K;
    config.n_group = G;
    config.topk_group = TOP_G;
    config.routed_scaling_factor = 2.5f;
    draw(&rng);
    if (dsv3_context_init(&context, DSV3_BACKEND_AUTO, 1, NULL) != DSV3_OK) return 1;
    if (dsv3_linear_size(&context, N, D, &bytes, NULL) != DSV3_OK) return 1;
    scratch = malloc(bytes + 1); /* bytes may be 0 */
    if (scratch == NULL) return 1;
    dsv3_router_scores(&context, &config, score, x, &gate_w, NULL, N, (float *)scratch, NULL);
    free(scratch);
    balance(&config);
    mistakes(config);
    if (failures == 0) printf("router: ok\n");
    return failures == 0 ? 0 : 1;
}
