/* Arbitrary bytes choose a small configuration, arbitrary bit patterns as weights of any type, tokens and positions: no
 * crash, no finding of the sanitizers, a result code for whatever is not finite. */
#define DSV3_IMPLEMENTATION
#include "../../dsv3.h"
#include <stdlib.h>

typedef struct source {
    const uint8_t *data;
    size_t size, at;
    const dsv3_config *config;
    const char *name; /* of the tensor that is looked up */
    dsv3_tensor_info info;
} source;

static unsigned take(source *s) { return s->at < s->size ? s->data[s->at++] : 0; }

static dsv3_result same_name(void *user, const dsv3_tensor_info *info) {
    source *s = (source *)user;
    if (strcmp(info->name, s->name) == 0) s->info = *info;
    return DSV3_OK;
}

/* Weights are the input's bytes over and over; FP8 scales, too. */
static unsigned char pool[1 << 16];

static dsv3_result find(void *user, const char *name, dsv3_tensor *t) {
    source *s = (source *)user;
    char plain[DSV3_MAX_NAME];
    size_t n = strlen(name), offset = 0;
    int is_scale = n > 10 && strcmp(name + n - 10, "_scale_inv") == 0;
    for (size_t i = 0; i < n; i++) offset = offset * 31 + (unsigned char)name[i];
    memset(&s->info, 0, sizeof s->info);
    memcpy(plain, name, n + 1);
    t->type = (dsv3_type)(offset % DSV3_TYPES);
    if (is_scale) {
        plain[n - 10] = '\0';
        t->type = DSV3_F32;
    }
    s->name = plain;
    dsv3_model_tensors(s->config, same_name, s, NULL);
    if (s->info.rank == 0) return DSV3_ERR_MISSING;
    if (s->info.rank == 1 && t->type >= DSV3_F8_E4M3) t->type = DSV3_BF16;
    if (s->info.cols % dsv3_type_block(t->type) != 0) t->type = DSV3_BF16;
    t->rank = s->info.rank;
    t->rows = s->info.rows;
    t->cols = s->info.cols;
    if (is_scale) {
        t->rows = (t->rows + 127) / 128;
        t->cols = (t->cols + 127) / 128;
    }
    t->data = pool + offset % 8192;
    return DSV3_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    source s = {data, size, 0, NULL, NULL, {{0}, DSV3_KIND_EMBED, 0, 0, 0, 0, 0, 0, 0}};
    dsv3_config c = dsv3_config_default();
    dsv3_context context;
    dsv3_model model;
    dsv3_cache caches[2];
    dsv3_workspace ws;
    dsv3_error error;
    int32_t token[8], sequence[8];
    float logits[8 * 32];
    size_t bytes = 0;
    void *memory[4] = {NULL, NULL, NULL, NULL};
    c.vocab_size = 1 + (int32_t)(take(&s) % 32);
    c.hidden_size = 1 + (int32_t)(take(&s) % 40);
    c.intermediate_size = 1 + (int32_t)(take(&s) % 24);
    c.moe_intermediate_size = 1 + (int32_t)(take(&s) % 12);
    c.num_hidden_layers = 1 + (int32_t)(take(&s) % 3);
    c.first_k_dense_replace = (int32_t)(take(&s) % 3);
    c.moe_layer_freq = 1 + (int32_t)(take(&s) % 2);
    c.num_nextn_predict_layers = (int32_t)(take(&s) % 2);
    c.num_attention_heads = 1 + (int32_t)(take(&s) % 3);
    c.q_lora_rank = (int32_t)(take(&s) % 9);
    c.kv_lora_rank = 1 + (int32_t)(take(&s) % 9);
    c.qk_nope_head_dim = 1 + (int32_t)(take(&s) % 9);
    c.qk_rope_head_dim = 2 + 2 * (int32_t)(take(&s) % 4);
    c.v_head_dim = 1 + (int32_t)(take(&s) % 9);
    c.n_group = 1 + (int32_t)(take(&s) % 4);
    c.n_routed_experts = c.n_group * (1 + (int32_t)(take(&s) % 4));
    c.topk_group = 1 + (int32_t)(take(&s) % 4);
    c.num_experts_per_tok = 1 + (int32_t)(take(&s) % 6);
    c.n_shared_experts = (int32_t)(take(&s) % 3);
    c.scoring_func = (dsv3_scoring_func)(take(&s) % 2);
    c.topk_method = (dsv3_topk_method)(take(&s) % 3);
    c.norm_topk_prob = (int32_t)(take(&s) % 2);
    c.tie_word_embeddings = (int32_t)(take(&s) % 2);
    c.group_mask = (dsv3_group_mask)(take(&s) % 2);
    for (int i = 0; i < 8; i++) {
        token[i] = (int32_t)(take(&s) % 40) - 2;
        sequence[i] = (int32_t)(take(&s) % 3);
    }
    if (dsv3_config_check(&c, &error) != DSV3_OK) return 0;
    s.config = &c;
    for (size_t i = 0; i < sizeof pool; i++)
        pool[i] = s.at < size ? data[s.at + i % (size - s.at)] : (unsigned char)i;
    dsv3_context_init(&context, DSV3_BACKEND_AUTO, 1, NULL);
    context.attention = (dsv3_attention)(take(&s) % 3);
    dsv3_model_size(&c, &bytes, NULL);
    memory[0] = malloc(bytes);
    if (dsv3_model_bind(&c, &model, memory[0], bytes, find, &s, &error) == DSV3_OK) {
        dsv3_batch batch = {1 + take(&s) % 8, token, sequence, NULL, 0, NULL};
        batch.outputs = take(&s) % (batch.rows + 1);
        for (int i = 0; i < 2; i++) {
            dsv3_type type = i ? DSV3_BF16 : DSV3_F32;
            dsv3_cache_size(&c, 6, type, &bytes, NULL);
            memory[1 + i] = malloc(bytes);
            dsv3_cache_init(&c, &caches[i], 6, type, memory[1 + i], bytes, NULL);
        }
        dsv3_workspace_size(&c, 8, 1, &bytes, NULL);
        memory[3] = malloc(bytes);
        dsv3_workspace_init(&c, &ws, 8, 1, memory[3], bytes, NULL);
        for (int i = 0; i < 2; i++) {
            size_t before = caches[0].length;
            dsv3_result result = dsv3_forward(&context, logits, &model, caches, 2, &batch, &ws, &error);
            if (result != DSV3_OK && caches[0].length != before) abort();
        }
    }
    for (int i = 0; i < 4; i++) free(memory[i]);
    return 0;
}
