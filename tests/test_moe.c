/* test_moe.c -- chapter 8: dense MLP, routed and shared experts.
 *
 * A failure means that a feed-forward layer gives wrong numbers: rows go to the wrong expert or come back to the wrong
 * token, a gate weight or the shared experts are lost, an expert without tokens disturbs its neighbours, or the result
 * of a token depends on what else is in the batch. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#define ROWS 37

static float row_of_u[ROWS * 512], row_of_y[ROWS * 512];

/* slot is a permutation of 0 .. n K - 1, experts in ascending order, tokens in ascending order within an expert, and
 * offset tells where each expert's rows begin. */
static void check_slots(const synth *s, size_t n, size_t K, size_t E) {
    const dsv3i_workspace inside = dsv3i_workspace_of(&s->ws, &s->config), *ws = &inside;
    size_t seen[ROWS * 8] = {0}, wrong = 0;
    CHECK_EQ(ws->offset[0], 0);
    CHECK_EQ(ws->offset[E], n * K);
    for (size_t i = 0; i < n * K; i++) {
        size_t e = (size_t)ws->idx[i], slot = ws->slot[i];
        wrong += e >= E || slot >= n * K || slot < ws->offset[e] || slot >= ws->offset[e + 1];
        if (slot < n * K) seen[slot]++;
        for (size_t j = 0; j < i; j++) wrong += ws->idx[j] == ws->idx[i] && j / K < i / K && ws->slot[j] > slot;
    }
    for (size_t i = 0; i < n * K; i++) wrong += seen[i] != 1;
    CHECK_EQ(wrong, 0);
}

/* The layer's output for n rows against the oracle, token by token; each row must also come out the same, bit for
 * bit, when it is alone. */
static void check_layer(synth *s, int layer, size_t n) {
    size_t d = (size_t)s->config.hidden_size, K = (size_t)s->config.num_experts_per_tok;
    float *u = row_of_u, *y = row_of_y, *alone = (float *)test_alloc(d * sizeof *alone);
    double *u64 = synth_doubles(n * d), *y64 = synth_doubles(n * d), margin = 1;
    const dsv3_layer *w = &s->model.layers[layer];
    size_t differ = 0;
    test_state = 1000 + n;
    test_fill(u, n * d, -1.7f, 1.7f);
    for (size_t i = 0; i < n * d; i++) u64[i] = (double)u[i], y[i] = (float)NAN;
    for (size_t t = 0; t < n; t++) oracle_ffn(s, layer, y64 + t * d, u64 + t * d, &margin);
    CHECK(margin > 1e-6); /* else rounding may decide: take other numbers */
    memset(s->ws_memory, 0xFF, s->ws_bytes);
    CHECK_EQ(dsv3_ffn_forward(&s->context, y, u, &s->model, w, n, &s->ws, NULL), DSV3_OK);
    CHECK_CLOSE(y, y64, n * d, 2e-6);
    if (w->is_moe) check_slots(s, n, K, (size_t)s->config.n_routed_experts);
    for (size_t t = 0; t < n; t++) {
        dsv3_ffn_forward(&s->context, alone, u + t * d, &s->model, w, 1, &s->ws, NULL);
        differ += memcmp(alone, y + t * d, d * sizeof *alone) != 0;
    }
    CHECK_EQ(differ, 0);
    free(alone), free(u64), free(y64);
}

static void test_layers(void) {
    for (int which = 0; which < SYNTH_CONFIGS; which++) {
        synth *s = synth_open_named(which, 21);
        int layers = s->config.num_hidden_layers;
        synth_run(s, ROWS, 1, 1, ROWS, DSV3_F32);
        for (int layer = 0; layer < layers; layer++) {
            CHECK_EQ(s->model.layers[layer].is_moe, dsv3_config_is_moe(&s->config, layer));
            check_layer(s, layer, 1);
            check_layer(s, layer, ROWS);
        }
        synth_close(s);
    }
}

/* Router biases far beyond the scores decide the choice: K experts get every token, all others none. */
static void test_crowd(int which, const int *chosen) {
    synth *s = synth_open_named(which, 22);
    int layer = s->config.num_hidden_layers - 1;
    size_t E = (size_t)s->config.n_routed_experts, K = (size_t)s->config.num_experts_per_tok;
    synth_tensor *bias = synth_get(s, layer, -1, "mlp.gate.e_score_correction_bias");
    dsv3i_workspace ws;
    for (size_t k = 0; k < K; k++) synth_set(bias, (size_t)chosen[k], (float)(40 - 4 * k));
    synth_run(s, ROWS, 1, 1, ROWS, DSV3_F32);
    check_layer(s, layer, ROWS);
    dsv3_ffn_forward(&s->context, row_of_y, row_of_u, &s->model, &s->model.layers[layer], ROWS, &s->ws, NULL);
    ws = dsv3i_workspace_of(&s->ws, &s->config);
    for (size_t i = 0; i < ROWS * K; i++) CHECK_EQ(ws.idx[i], chosen[i % K]);
    for (size_t e = 0; e < E; e++) {
        size_t rows = 0;
        for (size_t k = 0; k < K; k++) rows += (size_t)chosen[k] == e ? ROWS : 0;
        CHECK_EQ(ws.offset[e + 1] - ws.offset[e], rows);
    }
    synth_close(s);
}

/* Every token to one expert: the first, one in the middle, the last. */
static void test_one_expert(void) {
    for (int e = 0; e < 8; e += e == 0 ? 4 : 3) {
        dsv3_config c = synth_config(SYNTH_FREQ, NULL);
        synth *s;
        c.num_experts_per_tok = 1;
        s = synth_open(&c, SYNTH_FP8, 23);
        synth_set(synth_get(s, 2, -1, "mlp.gate.e_score_correction_bias"), (size_t)e, 8.0f);
        synth_run(s, ROWS, 1, 1, ROWS, DSV3_F32);
        check_layer(s, 2, ROWS);
        dsv3_ffn_forward(&s->context, row_of_y, row_of_u, &s->model, &s->model.layers[2], ROWS, &s->ws, NULL);
        CHECK_EQ(dsv3i_workspace_of(&s->ws, &s->config).offset[e], 0);
        CHECK_EQ(dsv3i_workspace_of(&s->ws, &s->config).offset[e + 1], ROWS);
        synth_close(s);
    }
}

/* Every expert is chosen by every token: the workspace's n K rows are all in use. */
static void test_all_experts(void) {
    dsv3_config c = synth_config(SYNTH_V3, NULL);
    synth *s;
    c.num_experts_per_tok = 8; /* all of the 2 groups of 4 */
    s = synth_open(&c, SYNTH_MIXED, 24);
    synth_run(s, ROWS, 1, 1, ROWS, DSV3_F32);
    check_layer(s, 1, ROWS);
    synth_close(s);
}

/* Equal scores: the lower index first, for groups and for experts. A gate of zeros gives every expert sigmoid(0). */
static void test_ties(void) {
    static const int32_t all_equal[] = {0, 1, 2, 3}, late_groups[] = {8, 12, 9, 10};
    synth *s = synth_open_named(SYNTH_V3, 26);
    synth_tensor *gate = synth_get(s, 1, -1, "mlp.gate.weight");
    synth_tensor *bias = synth_get(s, 1, -1, "mlp.gate.e_score_correction_bias");
    float u[2 * 64], y[2 * 64];
    synth_run(s, 2, 1, 1, 2, DSV3_F32);
    test_fill(u, 2 * 64, -1.7f, 1.7f);
    for (size_t i = 0; i < gate->t.rows * gate->t.cols; i++) synth_encode(DSV3_F32, gate->data, i, 0.0f);
    for (size_t i = 0; i < 16; i++) synth_set(bias, i, 0.0f);
    CHECK_EQ(dsv3_ffn_forward(&s->context, y, u, &s->model, &s->model.layers[1], 2, &s->ws, NULL), DSV3_OK);
    for (int i = 0; i < 8; i++) CHECK_EQ(dsv3i_workspace_of(&s->ws, &s->config).idx[i], all_equal[i % 4]);
    synth_set(bias, 8, 0.25f); /* groups 2 and 3 win and tie; within them the others tie */
    synth_set(bias, 12, 0.25f);
    CHECK_EQ(dsv3_ffn_forward(&s->context, y, u, &s->model, &s->model.layers[1], 2, &s->ws, NULL), DSV3_OK);
    for (int i = 0; i < 8; i++) CHECK_EQ(dsv3i_workspace_of(&s->ws, &s->config).idx[i], late_groups[i % 4]);
    synth_close(s);
}

/* A NaN row: the layer says so, and the other rows are what they are without it. */
static void test_nan_row(void) {
    synth *s = synth_open_named(SYNTH_V3, 25);
    size_t d = (size_t)s->config.hidden_size, n = 5, bad = 2;
    float u[5 * 64], good[5 * 64], y[5 * 64];
    synth_run(s, n, 1, 1, n, DSV3_F32);
    test_fill(u, n * d, -1.7f, 1.7f);
    CHECK_EQ(dsv3_ffn_forward(&s->context, good, u, &s->model, &s->model.layers[1], n, &s->ws, NULL), DSV3_OK);
    u[bad * d + 7] = (float)NAN;
    CHECK_EQ(dsv3_ffn_forward(&s->context, y, u, &s->model, &s->model.layers[1], n, &s->ws, NULL), DSV3_ERR_NAN);
    for (size_t t = 0; t < n; t++) CHECK((memcmp(y + t * d, good + t * d, d * sizeof *y) == 0) == (t != bad));
    check_slots(s, n, 4, 16);
    CHECK_EQ(dsv3_ffn_forward(&s->context, y, u, &s->model, &s->model.layers[0], n, &s->ws, NULL), DSV3_OK);
    synth_close(s);
}

int main(void) {
    static const int v3[] = {13, 4, 15, 7}, moonlight[] = {7, 0, 3};
    test_layers();
    test_crowd(SYNTH_V3, v3);
    test_crowd(SYNTH_MOONLIGHT, moonlight);
    test_one_expert();
    test_all_experts();
    test_ties();
    test_nan_row();
    return test_done("moe");
}
