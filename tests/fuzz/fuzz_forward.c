/* Arbitrary bytes choose one of a set of small models, bit patterns as its weights of any type, tokens and batches: no
 * crash, no finding of the sanitizers, a result code for whatever is not finite, caches as long as before an error.
 * Models are bound once, all of them over one pool of bytes, which is filled anew for each input. */
#define DSV3_IMPLEMENTATION
#include "../../dsv3.h"
#include <stdio.h>
#include <stdlib.h>

#define MODELS 48
#define POOL 16384
#define OFFSET 1021 /* tensors begin below it */

typedef struct source {
    const uint8_t *data;
    size_t size, at;
} source;

typedef struct bound {
    dsv3_config config;
    dsv3_model model;
    dsv3_cache caches[2], module[2];
    dsv3_workspace ws;
} bound;

typedef struct binding {
    const dsv3_config *config;
    const char *name; /* of the tensor that is looked up */
    dsv3_tensor_info info;
} binding;

static unsigned char pool[POOL];
static bound models[MODELS];
static dsv3_context context;

static unsigned take(source *s) { return s->at < s->size ? s->data[s->at++] : 0; }

static dsv3_result same_name(void *user, const dsv3_tensor_info *info) {
    binding *b = (binding *)user;
    if (strcmp(info->name, b->name) == 0) b->info = *info;
    return DSV3_OK;
}

static dsv3_result find(void *user, const char *name, dsv3_tensor *t) {
    binding *b = (binding *)user;
    char plain[DSV3_MAX_NAME];
    size_t n = strlen(name), hash = 0;
    int is_scale = n > 10 && strcmp(name + n - 10, "_scale_inv") == 0;
    for (size_t i = 0; i < n; i++) hash = (hash * 31 + (unsigned char)name[i]) & 0xFFFFFF;
    memset(&b->info, 0, sizeof b->info);
    memcpy(plain, name, n + 1);
    t->type = (dsv3_type)(hash % DSV3_TYPES);
    if (is_scale) {
        plain[n - 10] = '\0';
        t->type = DSV3_F32;
    }
    b->name = plain;
    if (dsv3_model_tensors(b->config, same_name, b, NULL) != DSV3_OK) abort();
    if (b->info.rank == 0) return DSV3_ERR_MISSING;
    if (b->info.rank == 1 && t->type >= DSV3_F8_E4M3) t->type = DSV3_BF16;
    if (b->info.cols % dsv3_type_block(t->type) != 0) t->type = DSV3_BF16;
    t->rank = b->info.rank;
    t->rows = b->info.rows;
    t->cols = b->info.cols;
    if (is_scale) {
        t->rows = (t->rows + 127) / 128;
        t->cols = (t->cols + 127) / 128;
    }
    t->data = pool + hash % OFFSET;
    if (t->rows * dsv3_row_bytes(t->type, t->cols) > POOL - OFFSET) abort();
    return DSV3_OK;
}

/* Numbers below n from a stream of their own: the same models in each run. */
static int32_t below(dsv3_rng *rng, int32_t n) { return (int32_t)(dsv3_random(rng) % (uint64_t)n); }

static dsv3_config make_config(dsv3_rng *rng) {
    dsv3_config c = dsv3_config_default();
    do {
        int blocks = below(rng, 8) == 0; /* of 32, as Q8_0 and Q4_0 want them */
        c.vocab_size = 1 + below(rng, 16);
        c.hidden_size = blocks ? 32 : 1 + below(rng, 14);
        c.intermediate_size = blocks ? 32 : 1 + below(rng, 10);
        c.moe_intermediate_size = blocks ? 32 : 1 + below(rng, 7);
        c.num_hidden_layers = 1 + (below(rng, 4) == 0);
        c.first_k_dense_replace = below(rng, 3);
        c.moe_layer_freq = 1 + below(rng, 2);
        c.num_nextn_predict_layers = below(rng, 2);
        c.num_attention_heads = 1 + below(rng, 3);
        c.q_lora_rank = below(rng, 9);
        c.kv_lora_rank = 1 + below(rng, 9);
        c.qk_nope_head_dim = 1 + below(rng, 9);
        c.qk_rope_head_dim = 2 + 2 * below(rng, 4);
        c.v_head_dim = 1 + below(rng, 9);
        c.n_group = 1 + below(rng, 4);
        c.n_routed_experts = c.n_group * (1 + below(rng, 4));
        c.topk_group = 1 + below(rng, 4);
        c.num_experts_per_tok = 1 + below(rng, 4);
        c.n_shared_experts = below(rng, 3);
        c.scoring_func = (dsv3_scoring_func)below(rng, 2);
        c.topk_method = (dsv3_topk_method)below(rng, 3);
        c.norm_topk_prob = below(rng, 2);
        c.tie_word_embeddings = below(rng, 2);
        c.group_mask = (dsv3_group_mask)below(rng, 2);
        c.gate_scaling = (dsv3_gate_scaling)below(rng, 2);
        c.bias_form = (dsv3_bias_form)below(rng, 2);
        c.rope_interleave = below(rng, 2);
    } while (dsv3_config_check(&c, NULL) != DSV3_OK);
    return c;
}

static void demand(dsv3_result result, const dsv3_error *error) {
    char text[256];
    if (result == DSV3_OK) return;
    fprintf(stderr, "fuzz_forward: %s\n", dsv3_error_text(error, text, sizeof text));
    abort();
}

static void make(bound *b, dsv3_rng *rng) {
    binding binding = {NULL, NULL, {{0}, DSV3_KIND_EMBED, 0, 0, 0, 0, 0, 0, 0}};
    dsv3_error error;
    size_t bytes = 0;
    b->config = make_config(rng);
    binding.config = &b->config;
    demand(dsv3_model_size(&b->config, &bytes, &error), &error);
    demand(dsv3_model_bind(&b->config, &b->model, malloc(bytes), bytes, find, &binding, &error), &error);
    for (int i = 0; i < 2; i++) {
        dsv3_type type = i ? DSV3_BF16 : DSV3_F32;
        demand(dsv3_cache_size(&b->config, 6, type, &bytes, &error), &error);
        demand(dsv3_cache_init(&b->config, &b->caches[i], 6, type, malloc(bytes), bytes, &error), &error);
        demand(dsv3_cache_mtp_size(&b->config, 6, type, &bytes, &error), &error);
        demand(dsv3_cache_mtp_init(&b->config, &b->module[i], 6, type, malloc(bytes), bytes, &error), &error);
    }
    demand(dsv3_workspace_size(&b->config, 8, 1, &bytes, &error), &error);
    demand(dsv3_workspace_init(&b->config, &b->ws, 8, 1, malloc(bytes), bytes, &error), &error);
}

/* One call, of the main model or of its module; then one more, which finds what the first has left in the caches. */
static void run(bound *b, source *s, int module) {
    int32_t token[8], sequence[8];
    float logits[8 * 16];
    dsv3_error error;
    dsv3_batch batch = {1 + (take(s) & 7) * (take(s) & 1), token, sequence, NULL, 0, NULL};
    dsv3_cache *caches = module ? b->module : b->caches;
    for (int i = 0; i < 8; i++) {
        unsigned x = take(s);
        token[i] = (int32_t)((x & 63) % ((unsigned)b->config.vocab_size + (x == 63))); /* seldom one too many */
        sequence[i] = (int32_t)(x >> 6) % (x == 255 ? 4 : 2);
    }
    batch.outputs = take(s) % (batch.rows + 1);
    for (int i = 0; i < 2; i++) {
        size_t before[2] = {caches[0].length, caches[1].length};
        dsv3_result result =
            module ? dsv3_mtp_forward(&context, logits, &b->model, 1, caches, 2, &batch, b->ws.hidden, &b->ws, &error)
                   : dsv3_forward(&context, logits, &b->model, caches, 2, &batch, &b->ws, &error);
        if (result != error.code) abort();
        if (result == DSV3_OK) { /* all that is said is finite, and each row has its place */
            size_t rows = caches[0].length - before[0] + caches[1].length - before[1];
            if (rows != batch.rows) abort();
            for (size_t j = 0; j < batch.outputs * (size_t)b->config.vocab_size; j++)
                if (!(logits[j] - logits[j] == 0.0f)) abort();
        } else if (caches[0].length != before[0] || caches[1].length != before[1]) {
            abort();
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    source s = {data, size, 0};
    bound *b;
    size_t filled;
    if (context.threads == 0) {
        dsv3_rng rng = {1};
        demand(dsv3_context_init(&context, DSV3_BACKEND_AUTO, 1, NULL), NULL);
        for (int i = 0; i < MODELS; i++) make(&models[i], &rng);
    }
    b = &models[take(&s) % MODELS];
    context.attention = (dsv3_attention)(take(&s) % 3);
    context.compute = (dsv3_compute)(take(&s) % 2);
    /* The rest of the input over and over, and it says what is called, too. */
    filled = size - s.at < POOL ? size - s.at : POOL;
    if (filled == 0) pool[0] = 0x3C, filled = 1;
    else memcpy(pool, data + s.at, filled);
    for (; filled < POOL; filled *= 2) memcpy(pool + filled, pool, filled < POOL - filled ? filled : POOL - filled);
    for (int i = 0; i < 2; i++) b->caches[i].length = b->module[i].length = 0;
    run(b, &s, 0);
    if (b->model.n_mtp > 0) run(b, &s, 1);
    return 0;
}
