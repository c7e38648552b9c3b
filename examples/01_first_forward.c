/* Lesson 1: a whole program. A configuration, its memory, its weights, and the first logits.
 *
 * The model is the smallest one that has everything: two layers (one dense, one mixture of experts), two heads,
 * four experts of which two are used. Its weights are random, so it knows nothing: its loss is about the logarithm
 * of the vocabulary, ln 16 = 2.77. No file is needed; dsv3.h asks for each tensor by its published name, and this
 * program answers.
 *
 * Build and run:  make build/01_first_forward && build/01_first_forward
 * Expected output:
 *     config: ok, layer 0 is dense, layer 1 is a mixture of experts
 *     asked for 41 tensors, 2008 numbers
 *     cache: 20 numbers per token (plain attention would keep 40)
 *     logits of the token after 3 1 4 1 5: 16 numbers, the largest for token 1
 *     the same, one token at a time: identical
 *     mean loss over 3 1 4 1 5: 2.83, a guess would have ln 16 = 2.77
 */
#define DSV3_IMPLEMENTATION
#include "../dsv3.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define V 16
#define N 5

/* The weights: every tensor gets its own stretch of one array of random numbers. */
typedef struct weights {
    float values[4096];
    size_t used, tensors;
    dsv3_config config;
} weights;

/* What shape does the tensor of this name have? The library can list them all. */
typedef struct question {
    const char *name;
    dsv3_tensor_info info;
} question;

static dsv3_result compare_name(void *user, const dsv3_tensor_info *info) {
    question *q = (question *)user;
    if (strcmp(info->name, q->name) == 0) q->info = *info;
    return DSV3_OK;
}

/* The callback of dsv3_model_bind. A real program looks the name up in a file. */
static dsv3_result find(void *user, const char *name, dsv3_tensor *tensor) {
    weights *w = (weights *)user;
    question q;
    memset(&q, 0, sizeof q);
    q.name = name;
    dsv3_model_tensors(&w->config, compare_name, &q, NULL);
    tensor->data = w->values + w->used;
    tensor->type = DSV3_F32;
    tensor->rank = q.info.rank;
    tensor->rows = q.info.rows;
    tensor->cols = q.info.cols;
    w->used += q.info.rows * q.info.cols;
    w->tensors++;
    return w->used <= 4096 ? DSV3_OK : DSV3_ERR_MISSING;
}

static void check(dsv3_result result, const dsv3_error *error) {
    char text[200];
    if (result == DSV3_OK) return;
    printf("%s\n", dsv3_error_text(error, text, sizeof text));
    exit(1);
}

int main(void) {
    static weights w;
    static const int32_t tokens[N] = {3, 1, 4, 1, 5};
    static float logits[N * V], again[V];
    dsv3_config config = dsv3_config_default();
    dsv3_context context;
    dsv3_model model;
    dsv3_cache cache;
    dsv3_workspace workspace;
    dsv3_batch batch = {N, tokens, NULL, NULL, N, NULL};
    dsv3_error error;
    dsv3_rng rng = {7};
    void *tables, *cache_memory, *workspace_memory;
    size_t bytes, best = 0;
    double loss = 0;

    /* 1. The configuration, field by field; the defaults are V3's. */
    config.vocab_size = V;
    config.hidden_size = 8;
    config.intermediate_size = 16;
    config.moe_intermediate_size = 4;
    config.num_hidden_layers = 2;
    config.first_k_dense_replace = 1;
    config.num_attention_heads = 2;
    config.q_lora_rank = 6;
    config.kv_lora_rank = 8;
    config.qk_nope_head_dim = 4;
    config.qk_rope_head_dim = 2;
    config.v_head_dim = 4;
    config.n_routed_experts = 4;
    config.n_shared_experts = 1;
    config.num_experts_per_tok = 2;
    check(dsv3_config_check(&config, &error), &error);
    printf("config: ok, layer 0 is %s, layer 1 is %s\n", dsv3_config_is_moe(&config, 0) ? "a mixture" : "dense",
           dsv3_config_is_moe(&config, 1) ? "a mixture of experts" : "dense");

    /* 2. The weights, bound by name. The model's tables need memory, the weights stay where they are. */
    w.config = config;
    for (size_t i = 0; i < 4096; i++) w.values[i] = dsv3_random_uniform(&rng) - 0.5f;
    dsv3_model_size(&config, &bytes, NULL);
    tables = malloc(bytes);
    check(dsv3_model_bind(&config, &model, tables, bytes, find, &w, &error), &error);
    printf("asked for %d tensors, %d numbers\n", (int)w.tensors, (int)w.used);

    /* 3. A cache for one sequence of up to N tokens, and a workspace for N rows at a time. */
    dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL);
    dsv3_cache_size(&config, N, DSV3_F32, &bytes, NULL);
    cache_memory = malloc(bytes);
    dsv3_cache_init(&config, &cache, N, DSV3_F32, cache_memory, bytes, NULL);
    dsv3_workspace_size(&config, N, context.threads, &bytes, NULL);
    workspace_memory = malloc(bytes);
    dsv3_workspace_init(&config, &workspace, N, context.threads, workspace_memory, bytes, NULL);
    printf("cache: %d numbers per token (plain attention would keep %d)\n", (int)(cache.layers * cache.width),
           2 * 2 * (4 + 2 + 4));

    /* 4. All five tokens at once, logits for each. */
    context.attention = DSV3_ATTENTION_ABSORBED; /* fixed: then chunks cannot change a bit */
    check(dsv3_forward(&context, logits, &model, &cache, 1, &batch, &workspace, &error), &error);
    for (size_t i = 1; i < V; i++) {
        if (logits[(N - 1) * V + i] > logits[(N - 1) * V + best]) best = i;
    }
    printf("logits of the token after 3 1 4 1 5: %d numbers, the largest for token %d\n", V, (int)best);

    /* 5. Back to the beginning, now token by token: the cache carries the past. */
    dsv3_cache_truncate(&cache, 0, NULL);
    batch.rows = batch.outputs = 1;
    for (size_t i = 0; i < N; i++) {
        batch.token = &tokens[i];
        check(dsv3_forward(&context, again, &model, &cache, 1, &batch, &workspace, &error), &error);
        if (i + 1 < N) loss += (double)(dsv3_log_sum_exp(again, V) - again[tokens[i + 1]]) / (N - 1);
    }
    printf("the same, one token at a time: %s\n",
           memcmp(again, logits + (N - 1) * V, sizeof again) == 0 ? "identical" : "different");
    printf("mean loss over 3 1 4 1 5: %.2f, a guess would have ln 16 = %.2f\n", loss, log(16.0));
    free(tables);
    free(cache_memory);
    free(workspace_memory);
    return 0;
}
