/* own_callback.c -- a model whose weights lie in arrays of the program: no files, only a callback.
 *
 * What it shows: a tiny configuration (some thousand weights, random, from dsv3_random), a dsv3_find that looks names up
 * in a table, a prompt of 5 tokens read in one call, 10 greedy tokens one by one, and every byte of memory where it
 * comes from. What it checks: each of those steps has the logits, bit for bit, that one call for the whole text has; and
 * a wrong table is refused by name.
 *
 *     cc -std=c99 $(pkg-config --cflags dsv3) own_callback.c $(pkg-config --libs dsv3)
 */
#define DSV3_IMPLEMENTATION
#include <dsv3.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { V = 32, PROMPT = 5, WRITE = 10, N = PROMPT + WRITE, TENSORS = 128, WEIGHTS = 16384 };

/* What the program has: tensors by name, one after the other in one array. */
typedef struct table {
    dsv3_tensor_info info[TENSORS];
    const float *data[TENSORS];
    size_t count, used;
    float weights[WEIGHTS];
} table;

static void check(const char *what, dsv3_result result, const dsv3_error *error) {
    char text[256];
    if (result == DSV3_OK) return;
    fprintf(stderr, "own_callback: %s: %s: %s\n", what, dsv3_result_string(result),
            dsv3_error_text(error, text, sizeof text));
    exit(1);
}

static void expect(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "own_callback: does not hold: %s\n", what);
    exit(1);
}

static void *take(size_t bytes) {
    void *memory = malloc(bytes > 0 ? bytes : 1);
    expect(memory != NULL, "there is memory");
    return memory;
}

/* A dsv3_visit: lays out one tensor behind those before. Copies that a file need not have are left out. */
static dsv3_result lay_out(void *user, const dsv3_tensor_info *info) {
    table *t = (table *)user;
    size_t size = info->rows * info->cols;
    if (info->optional) return DSV3_OK;
    if (t->count == TENSORS || size > WEIGHTS - t->used) return DSV3_ERR_LIMIT;
    t->info[t->count] = *info;
    t->data[t->count++] = t->weights + t->used;
    t->used += size;
    return DSV3_OK;
}

/* A dsv3_find: the tensor of this name, or that there is none. */
static dsv3_result find(void *user, const char *name, dsv3_tensor *tensor) {
    const table *t = (const table *)user;
    for (size_t i = 0; i < t->count; i++) {
        if (strcmp(t->info[i].name, name) != 0) continue;
        tensor->data = t->data[i];
        tensor->scale = NULL;
        tensor->type = DSV3_F32;
        tensor->rank = t->info[i].rank;
        tensor->rows = t->info[i].rows;
        tensor->cols = t->info[i].cols;
        tensor->packed = 0;
        return DSV3_OK;
    }
    return DSV3_ERR_MISSING;
}

static dsv3_config tiny(void) {
    dsv3_config config = dsv3_config_default(); /* V3's choices; sizes are ours */
    config.vocab_size = V;
    config.hidden_size = 16;
    config.intermediate_size = 24;
    config.moe_intermediate_size = 8;
    config.num_hidden_layers = 2;
    config.num_nextn_predict_layers = 1;
    config.first_k_dense_replace = 1; /* layer 0 is dense, layer 1 a mixture of experts */
    config.num_attention_heads = 2;
    config.q_lora_rank = 8;
    config.kv_lora_rank = 8;
    config.qk_nope_head_dim = 8;
    config.qk_rope_head_dim = 4;
    config.v_head_dim = 8;
    config.n_routed_experts = 4;
    config.n_shared_experts = 1;
    config.num_experts_per_tok = 2;
    return config;
}

/* A table that lacks a tensor, or has it in another shape, is refused with the tensor's name. Leaves it as it was. */
static void bind_wrong(const dsv3_config *config, table *t, void *memory, size_t bytes) {
    dsv3_model model;
    dsv3_error error;
    dsv3_tensor_info *last = &t->info[t->count - 1], whole = *last;
    last->name[0] = '?';
    expect(dsv3_model_bind(config, &model, memory, bytes, find, t, &error) == DSV3_ERR_MISSING, "missing: refused");
    expect(error.code == DSV3_ERR_MISSING && strcmp(error.name, whole.name) == 0, "missing: named");
    *last = whole;
    last->cols++;
    expect(dsv3_model_bind(config, &model, memory, bytes, find, t, &error) == DSV3_ERR_MISMATCH, "shape: refused");
    expect(strcmp(error.name, whole.name) == 0 && error.numbers == DSV3_NUMBERS_SHAPE, "shape: named");
    *last = whole;
}

int main(void) {
    static table weights;
    static float logits[N * V], whole[N * V];
    int32_t text[N] = {3, 1, 4, 1, 5}, next;
    size_t model_bytes, cache_bytes, work_bytes;
    void *model_memory, *cache_memory, *again_memory, *work_memory;
    dsv3_config config = tiny();
    dsv3_context context;
    dsv3_model model;
    dsv3_cache cache, again;
    dsv3_workspace workspace;
    dsv3_batch batch;
    dsv3_error error;
    dsv3_rng rng = {2024};

    /* 1. The configuration; what tensors it calls for; their weights, from -1/2 to 1/2. */
    check("dsv3_config_check", dsv3_config_check(&config, &error), &error);
    expect(dsv3_model_tensors(&config, lay_out, &weights, NULL) == DSV3_OK, "the table is large enough");
    for (size_t i = 0; i < weights.used; i++) weights.weights[i] = dsv3_random_uniform(&rng) - 0.5f;

    /* 2. Binding: the model points at the weights, its own tables lie in memory that we give. */
    check("dsv3_model_size", dsv3_model_size(&config, &model_bytes, &error), &error);
    model_memory = take(model_bytes);
    bind_wrong(&config, &weights, model_memory, model_bytes);
    check("dsv3_model_bind", dsv3_model_bind(&config, &model, model_memory, model_bytes, find, &weights, &error), &error);
    expect(model.n_mtp == 1, "the MTP module is found");

    /* 3. How to compute, a cache for each of two readings, a workspace for the longest call. */
    check("dsv3_context_init", dsv3_context_init(&context, DSV3_BACKEND_AUTO, 1, &error), &error);
    context.attention = DSV3_ATTENTION_ABSORBED; /* one form: then no cut of the text changes a bit */
    check("dsv3_cache_size", dsv3_cache_size(&config, N, DSV3_F32, &cache_bytes, &error), &error);
    cache_memory = take(cache_bytes);
    again_memory = take(cache_bytes);
    check("dsv3_cache_init", dsv3_cache_init(&config, &cache, N, DSV3_F32, cache_memory, cache_bytes, &error), &error);
    check("dsv3_cache_init", dsv3_cache_init(&config, &again, N, DSV3_F32, again_memory, cache_bytes, &error), &error);
    check("dsv3_workspace_size", dsv3_workspace_size(&config, N, context.threads, &work_bytes, &error), &error);
    work_memory = take(work_bytes);
    check("dsv3_workspace_init",
          dsv3_workspace_init(&config, &workspace, N, context.threads, work_memory, work_bytes, &error), &error);

    /* 4. The prompt at once, with the logits of each of its rows; then token by token, each the likeliest. */
    memset(&batch, 0, sizeof batch);
    batch.rows = batch.outputs = PROMPT;
    batch.token = text;
    check("dsv3_forward, prompt", dsv3_forward(&context, logits, &model, &cache, 1, &batch, &workspace, &error), &error);
    for (size_t i = PROMPT; i < N; i++) {
        check("dsv3_sample", dsv3_sample(&next, logits + (i - 1) * V, V, 0.0f, 1.0f, NULL, NULL, &error), &error);
        text[i] = next;
        batch.rows = batch.outputs = 1;
        batch.token = &text[i];
        check("dsv3_forward, token",
              dsv3_forward(&context, logits + i * V, &model, &cache, 1, &batch, &workspace, &error), &error);
    }
    expect(cache.length == N, "the cache holds the whole text");

    /* 5. The whole text in one call. */
    batch.rows = batch.outputs = N;
    batch.token = text;
    check("dsv3_forward, whole", dsv3_forward(&context, whole, &model, &again, 1, &batch, &workspace, &error), &error);
    expect(memcmp(logits, whole, sizeof whole) == 0, "step by step has the bits of one call");

    /* 6. What cannot be done is said, and changes nothing: a token that there is not, a cache that is full. */
    next = V;
    batch.rows = batch.outputs = 1;
    batch.token = &next;
    check("dsv3_cache_truncate", dsv3_cache_truncate(&again, N - 1, &error), &error);
    expect(dsv3_forward(&context, whole, &model, &again, 1, &batch, &workspace, &error) == DSV3_ERR_TOKEN, "no such token");
    next = 0;
    expect(dsv3_forward(&context, whole, &model, &cache, 1, &batch, &workspace, &error) == DSV3_ERR_FULL, "a full cache");
    expect(again.length == N - 1 && cache.length == N, "caches are as before an error");

    free(model_memory);
    free(cache_memory);
    free(again_memory);
    free(work_memory);
    printf("own_callback: ok\n");
    return 0;
}
