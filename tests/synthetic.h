/* synthetic.h -- small models with random weights, made in memory, and a slow second opinion about them.
 *
 * synth_open makes a model for any configuration: dsv3_model_tensors lists the tensors, each is filled with random
 * numbers of a sensible size in a chosen type, and dsv3_model_bind binds them. synth_run adds context, caches and
 * workspace, each in a buffer of exactly the bytes that were asked for. synth_close frees everything.
 *
 * The oracle_ functions compute the same model straight from the formulas, in double, one token and one head at a
 * time, from the weights' values as the file formats define them. They share no code with the library.
 *
 * Include after dsv3.h. */
#ifndef SYNTHETIC_H
#define SYNTHETIC_H

#include "test.h"

/* ---- Configurations */

/* Types of the weights. Q8, Q4: Q8_0 and Q4_0 where that can be, else BF16. */
enum { SYNTH_F32, SYNTH_F16, SYNTH_BF16, SYNTH_FP8, SYNTH_MIXED, SYNTH_Q8, SYNTH_Q4, SYNTH_TYPES };

enum {
    SYNTH_V3,        /* groups, YaRN, q_lora */
    SYNTH_MOONLIGHT, /* no q_lora, two shared experts, one group */
    SYNTH_V2,        /* softmax, group-limited, two shared experts, weights not normalised */
    SYNTH_ODD,       /* no dimension a multiple of anything, RoPE in halves, all types mixed */
    SYNTH_BLOCKS,    /* FP8, heads and widths off the 128 grid */
    SYNTH_FREQ,      /* every other layer is MoE */
    SYNTH_NO_SHARED, /* no shared expert, groups of one expert */
    SYNTH_DENSE,     /* no MoE layer at all */
    SYNTH_TIED,      /* logits from the embedding, V2-Lite routing */
    SYNTH_MTP,       /* one MTP module */
    SYNTH_EIGHT,     /* Q8_0, and a latent that is not whole blocks */
    SYNTH_FOUR,      /* Q4_0, no q_lora, two shared experts */
    SYNTH_CONFIGS
};

static inline void synth_sizes(dsv3_config *c, int V, int d, int I, int F, int L, int dense) {
    c->vocab_size = V;
    c->hidden_size = d;
    c->intermediate_size = I;
    c->moe_intermediate_size = F;
    c->num_hidden_layers = L;
    c->first_k_dense_replace = dense;
}

static inline void synth_attention(dsv3_config *c, int H, int rq, int rk, int dn, int dr, int dv) {
    c->num_attention_heads = H;
    c->num_key_value_heads = H;
    c->q_lora_rank = rq;
    c->kv_lora_rank = rk;
    c->qk_nope_head_dim = dn;
    c->qk_rope_head_dim = dr;
    c->v_head_dim = dv;
}

static inline void synth_experts(dsv3_config *c, int E, int shared, int K, int G, int Gt, float scale) {
    c->n_routed_experts = E;
    c->n_shared_experts = shared;
    c->num_experts_per_tok = K;
    c->n_group = G;
    c->topk_group = Gt;
    c->routed_scaling_factor = scale;
}

static inline void synth_yarn(dsv3_config *c, float factor, int original, float mscale, float all_dim) {
    c->rope_scaling.type = DSV3_ROPE_YARN;
    c->rope_scaling.factor = factor;
    c->rope_scaling.original_max_position_embeddings = original;
    c->rope_scaling.mscale = mscale;
    c->rope_scaling.mscale_all_dim = all_dim;
}

static inline const char *synth_name(int which) {
    static const char *const name[SYNTH_CONFIGS] = {"v3",        "moonlight", "v2",   "odd", "blocks", "freq",
                                                    "no_shared", "dense",     "tied", "mtp", "eight",  "four"};
    return name[which];
}

/* Configuration `which` and the types of its weights. */
static inline dsv3_config synth_config(int which, int *types) {
    dsv3_config c = dsv3_config_default();
    int use = SYNTH_F32;
    synth_sizes(&c, 97, 48, 72, 24, 3, 1); /* what the cases below do not change */
    synth_attention(&c, 4, 24, 20, 8, 16, 10);
    synth_experts(&c, 8, 1, 2, 1, 1, 1.0f);
    switch (which) {
    case SYNTH_V3:
        synth_sizes(&c, 97, 64, 96, 24, 4, 1);
        synth_experts(&c, 16, 1, 4, 4, 2, 2.5f);
        synth_yarn(&c, 40.0f, 64, 1.0f, 0.7f);
        break;
    case SYNTH_MOONLIGHT:
        use = SYNTH_BF16;
        synth_attention(&c, 3, 0, 24, 8, 8, 12);
        synth_experts(&c, 8, 2, 3, 1, 1, 2.446f);
        c.rms_norm_eps = 1e-5f;
        c.rope_theta = 50000.0f;
        break;
    case SYNTH_V2:
        use = SYNTH_F16;
        synth_experts(&c, 12, 2, 3, 4, 2, 4.0f);
        synth_yarn(&c, 8.0f, 32, 0.707f, 0.707f);
        c.scoring_func = DSV3_SOFTMAX;
        c.topk_method = DSV3_GROUP_LIMITED_GREEDY;
        c.norm_topk_prob = 0;
        c.gate_scaling = DSV3_SCALE_UNLESS_NORMED;
        break;
    case SYNTH_ODD:
        use = SYNTH_MIXED;
        synth_sizes(&c, 53, 37, 41, 13, 3, 0);
        synth_attention(&c, 3, 11, 5, 3, 2, 7);
        synth_experts(&c, 6, 1, 2, 3, 2, 1.5f);
        c.rope_interleave = 0;
        c.group_mask = DSV3_MASK_ZERO;
        c.gate_scaling = DSV3_SCALE_UNLESS_NORMED;
        break;
    case SYNTH_BLOCKS:
        use = SYNTH_FP8;
        synth_sizes(&c, 64, 160, 200, 136, 2, 1);
        synth_attention(&c, 3, 144, 130, 40, 8, 56);
        synth_experts(&c, 4, 1, 2, 1, 1, 1.0f);
        break;
    case SYNTH_FREQ:
        c.num_hidden_layers = 5;
        c.moe_layer_freq = 2;
        break;
    case SYNTH_NO_SHARED:
        synth_experts(&c, 8, 0, 2, 8, 3, 1.0f);
        c.norm_topk_prob = 0;
        c.rope_interleave = 0;
        break;
    case SYNTH_DENSE:
        synth_sizes(&c, 97, 48, 72, 0, 3, 3);
        synth_experts(&c, 0, 0, 0, 1, 1, 1.0f);
        break;
    case SYNTH_TIED:
        c.tie_word_embeddings = 1;
        c.scoring_func = DSV3_SOFTMAX;
        c.topk_method = DSV3_GREEDY;
        break;
    case SYNTH_MTP: c.num_nextn_predict_layers = 1; break;
    case SYNTH_EIGHT:
        use = SYNTH_Q8;
        synth_sizes(&c, 97, 64, 96, 32, 3, 1);
        synth_attention(&c, 4, 32, 40, 8, 16, 16);
        break;
    case SYNTH_FOUR:
        use = SYNTH_Q4;
        synth_sizes(&c, 64, 96, 64, 32, 2, 1);
        synth_attention(&c, 3, 0, 64, 24, 8, 32);
        synth_experts(&c, 8, 2, 3, 2, 1, 1.0f);
        break;
    default: break;
    }
    if (types != NULL) *types = use;
    return c;
}

/* ---- Memory */

/* Buffers begin where malloc's might at worst: aligned to DSV3_ALIGN and to nothing more. Then what a size adds for
 * that is used up, and AddressSanitizer sees the first byte past the end. */
#define SYNTH_SHIFT (DSV3_ALIGN % 64)

static inline void *synth_alloc(size_t n) {
    void *p = NULL;
    if (posix_memalign(&p, 64, n + SYNTH_SHIFT) != 0) fprintf(stderr, "synthetic: out of memory\n"), exit(2);
    return (unsigned char *)p + SYNTH_SHIFT;
}

static inline void synth_release(void *p) {
    if (p != NULL) free((unsigned char *)p - SYNTH_SHIFT);
}

static inline void synth_demand(dsv3_result result, const char *what, const dsv3_error *error) {
    char text[256] = "";
    if (result == DSV3_OK) return;
    if (error != NULL) dsv3_error_text(error, text, sizeof text);
    fprintf(stderr, "synthetic: %s: %s: %s\n", what, dsv3_result_string(result), text);
    exit(2);
}

/* ---- Tensors */

typedef struct synth_tensor {
    dsv3_tensor_info info;
    dsv3_tensor t;
    unsigned char *data; /* what t.data points into */
    float *scale;        /* FP8 */
    double *value;       /* [rows, cols] the numbers that data and scale stand for */
} synth_tensor;

typedef struct synth {
    dsv3_config config;
    int types;
    size_t count, room;
    synth_tensor *tensors;
    dsv3_context context;
    dsv3_model model;
    void *model_memory;
    size_t model_bytes;
    dsv3_workspace ws;
    void *ws_memory;
    size_t ws_bytes;
    dsv3_cache *caches;
    void **cache_memory;
    size_t n_caches, cache_bytes;
} synth;

/* The file formats, spelled out: sign, exponent, fraction. */
static inline double synth_decode(unsigned bits, int exponent_bits, int fraction_bits, int bias) {
    int e = (int)((bits >> fraction_bits) & ((1u << exponent_bits) - 1u));
    double f = (double)(bits & ((1u << fraction_bits) - 1u));
    double x =
        e == 0 ? ldexp(f, 1 - bias - fraction_bits) : ldexp(ldexp(1, fraction_bits) + f, e - bias - fraction_bits);
    return (bits >> (exponent_bits + fraction_bits)) & 1u ? -x : x;
}

/* The scale of a block of Q8_0 or Q4_0: its low byte comes first on any machine. */
static inline double synth_block_scale(const unsigned char *block) {
    return synth_decode(block[0] + 256u * block[1], 5, 10, 15);
}

static inline double synth_element(dsv3_type type, const unsigned char *data, size_t i) {
    const unsigned char *block = data + i / 32 * (type == DSV3_Q8_0 ? 34 : 18); /* of those types that have them */
    uint16_t half;
    float x;
    int code;
    switch (type) {
    case DSV3_Q8_0:
        code = block[2 + i % 32];
        return synth_block_scale(block) * (code < 128 ? code : code - 256);
    case DSV3_Q4_0:
        code = i % 32 < 16 ? block[2 + i % 16] % 16 : block[2 + i % 16] / 16;
        return synth_block_scale(block) * (code - 8);
    case DSV3_F16: memcpy(&half, data + 2 * i, 2); return synth_decode(half, 5, 10, 15);
    case DSV3_BF16: memcpy(&half, data + 2 * i, 2); return synth_decode(half, 8, 7, 127);
    case DSV3_F8_E4M3: return synth_decode(data[i], 4, 3, 7);
    case DSV3_F32:
    default: memcpy(&x, data + 4 * i, 4); return (double)x;
    }
}

/* Of Q8_0 and Q4_0 the code of the element, with the scale that its block has. */
static inline void synth_encode_code(dsv3_type type, unsigned char *data, size_t i, float x) {
    unsigned char *block = data + i / 32 * (type == DSV3_Q8_0 ? 34 : 18), *byte;
    double q = nearbyint((double)x / synth_block_scale(block));
    byte = block + 2 + i % (type == DSV3_Q8_0 ? 32 : 16);
    if (type == DSV3_Q8_0) {
        *byte = (unsigned char)(int)fmax(-127, fmin(127, q));
    } else {
        int code = 8 + (int)fmax(-8, fmin(7, q));
        *byte = (unsigned char)(i % 32 < 16 ? *byte / 16 * 16 + code : *byte % 16 + 16 * code);
    }
}

static inline void synth_encode(dsv3_type type, unsigned char *data, size_t i, float x) {
    uint16_t half = type == DSV3_F16 ? dsv3_f16_from_f32(x) : dsv3_bf16_from_f32(x);
    if (type == DSV3_F32) memcpy(data + 4 * i, &x, 4);
    if (type == DSV3_F16 || type == DSV3_BF16) memcpy(data + 2 * i, &half, 2);
    if (type == DSV3_F8_E4M3) data[i] = dsv3_f8_e4m3_from_f32(x);
    if (type == DSV3_Q8_0 || type == DSV3_Q4_0) synth_encode_code(type, data, i, x);
}

/* Brings value up to date with data and scale. */
static inline void synth_refresh(synth_tensor *s) {
    size_t blocks = (s->t.cols + 127) / 128;
    for (size_t i = 0; i < s->t.rows * s->t.cols; i++) {
        size_t row = i / s->t.cols, col = i % s->t.cols;
        s->value[i] = synth_element(s->t.type, s->data, i);
        if (s->scale != NULL) s->value[i] *= (double)s->scale[row / 128 * blocks + col / 128];
    }
}

static inline dsv3_type synth_type(int types, const dsv3_tensor_info *info, size_t index) {
    static const dsv3_type mixed[4] = {DSV3_F8_E4M3, DSV3_F32, DSV3_BF16, DSV3_F16};
    int is_bias = strstr(info->name, "e_score_correction_bias") != NULL;
    if (types == SYNTH_F16) return DSV3_F16;
    if (types == SYNTH_BF16) return DSV3_BF16;
    if (types == SYNTH_FP8) return info->quantised ? DSV3_F8_E4M3 : is_bias ? DSV3_F32 : DSV3_BF16;
    if (types == SYNTH_Q8 || types == SYNTH_Q4) {
        int is_plain = info->rank == 1 || info->kind == DSV3_KIND_ROUTER || info->cols % 32 != 0;
        return is_bias ? DSV3_F32 : is_plain ? DSV3_BF16 : types == SYNTH_Q8 ? DSV3_Q8_0 : DSV3_Q4_0;
    }
    if (types == SYNTH_MIXED) return mixed[info->rank == 1 ? 1 + index % 3 : index % 4];
    return DSV3_F32;
}

static inline dsv3_result synth_add(void *user, const dsv3_tensor_info *info) {
    synth *s = (synth *)user;
    synth_tensor *t;
    size_t n = info->rows * info->cols;
    float low, high;
    if (s->count == s->room) {
        s->room = 2 * s->room + 64;
        s->tensors = (synth_tensor *)realloc(s->tensors, s->room * sizeof *s->tensors);
        if (s->tensors == NULL) exit(2);
    }
    t = &s->tensors[s->count];
    memset(t, 0, sizeof *t);
    t->info = *info;
    t->t.type = synth_type(s->types, info, s->count);
    t->t.rank = info->rank;
    t->t.rows = info->rows;
    t->t.cols = info->cols;
    t->data = (unsigned char *)test_alloc(info->rows * dsv3_row_bytes(t->t.type, info->cols));
    t->value = (double *)test_alloc(n * sizeof *t->value);
    t->t.data = t->data;
    high = info->kind == DSV3_KIND_EMBED ? 1.7f : (float)sqrt(3.0 / (double)info->cols);
    low = -high;
    if (info->rank == 1) low = 0.75f, high = 1.25f;
    if (strstr(info->name, "e_score_correction_bias") != NULL) low = -0.1f, high = 0.1f;
    if (t->t.type == DSV3_F8_E4M3) {
        size_t blocks = (info->rows + 127) / 128 * ((info->cols + 127) / 128);
        t->scale = (float *)test_alloc(blocks * sizeof(float));
        for (size_t i = 0; i < blocks; i++) t->scale[i] = high / 448.0f * test_uniform(0.5f, 1.5f);
        low = -448.0f, high = 448.0f;
    }
    for (size_t i = 0; i < n && dsv3_type_block(t->t.type) > 1; i += 32) { /* no two scales alike */
        uint16_t half = dsv3_f16_from_f32(high / (t->t.type == DSV3_Q8_0 ? 127.0f : -8.0f) * test_uniform(0.5f, 1));
        unsigned char *block = t->data + i / 32 * dsv3_type_bytes(t->t.type);
        block[0] = (unsigned char)(half & 255), block[1] = (unsigned char)(half >> 8);
    }
    for (size_t i = 0; i < n; i++) synth_encode(t->t.type, t->data, i, test_uniform(low, high));
    synth_refresh(t);
    s->count++;
    return DSV3_OK;
}

static inline synth_tensor *synth_tensor_of(const synth *s, const char *name) {
    for (size_t i = 0; i < s->count; i++) {
        if (strcmp(s->tensors[i].info.name, name) == 0) return &s->tensors[i];
    }
    return NULL;
}

/* A tensor of a layer (-1: none) and expert (-1: none). It must exist. */
static inline synth_tensor *synth_get(const synth *s, int layer, int expert, const char *rest) {
    char name[DSV3_MAX_NAME];
    synth_tensor *t;
    if (layer < 0) snprintf(name, sizeof name, "%s", rest);
    if (layer >= 0 && expert < 0) snprintf(name, sizeof name, "model.layers.%d.%s", layer, rest);
    if (layer >= 0 && expert >= 0)
        snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s", layer, expert, rest);
    t = synth_tensor_of(s, name);
    if (t == NULL) fprintf(stderr, "synthetic: no tensor %s\n", name), exit(2);
    return t;
}

/* Overwrites element i. */
static inline void synth_set(synth_tensor *t, size_t i, float x) {
    synth_encode(t->t.type, t->data, i, x);
    synth_refresh(t);
}

/* dsv3_find over the tensors; "<name>_scale_inv" are the scales of <name>. */
static inline dsv3_result synth_find(void *user, const char *name, dsv3_tensor *tensor) {
    const synth *s = (const synth *)user;
    const char *end = strstr(name, "_scale_inv");
    char base[DSV3_MAX_NAME];
    const synth_tensor *t = synth_tensor_of(s, name);
    if (t != NULL) {
        *tensor = t->t;
        return DSV3_OK;
    }
    if (end == NULL || (size_t)(end - name) >= sizeof base) return DSV3_ERR_MISSING;
    memcpy(base, name, (size_t)(end - name));
    base[end - name] = '\0';
    t = synth_tensor_of(s, base);
    if (t == NULL || t->scale == NULL) return DSV3_ERR_MISSING;
    memset(tensor, 0, sizeof *tensor);
    tensor->data = t->scale;
    tensor->rows = (t->t.rows + 127) / 128;
    tensor->cols = (t->t.cols + 127) / 128;
    tensor->type = DSV3_F32;
    tensor->rank = 2;
    return DSV3_OK;
}

/* ---- Life */

/* Tensors only; nothing is bound yet. */
static inline synth *synth_make(const dsv3_config *config, int types, uint64_t seed) {
    synth *s = (synth *)test_alloc(sizeof *s);
    dsv3_error error;
    memset(s, 0, sizeof *s);
    s->config = *config;
    s->types = types;
    test_state = seed;
    synth_demand(dsv3_config_check(config, &error), "config", &error);
    synth_demand(dsv3_context_init(&s->context, test_backend(), 1, NULL), "context", NULL);
    synth_demand(dsv3_model_tensors(config, synth_add, s, NULL), "tensors", NULL);
    synth_demand(dsv3_model_size(config, &s->model_bytes, NULL), "model size", NULL);
    s->model_memory = synth_alloc(s->model_bytes);
    return s;
}

static inline dsv3_result synth_bind(synth *s, dsv3_error *error) {
    return dsv3_model_bind(&s->config, &s->model, s->model_memory, s->model_bytes, synth_find, s, error);
}

static inline synth *synth_open(const dsv3_config *config, int types, uint64_t seed) {
    synth *s = synth_make(config, types, seed);
    dsv3_error error;
    synth_demand(synth_bind(s, &error), "bind", &error);
    return s;
}

static inline synth *synth_open_named(int which, uint64_t seed) {
    int types;
    dsv3_config c = synth_config(which, &types);
    return synth_open(&c, types, seed);
}

static inline void synth_run_free(synth *s) {
    for (size_t i = 0; i < s->n_caches; i++) synth_release(s->cache_memory[i]);
    free(s->caches);
    free(s->cache_memory);
    synth_release(s->ws_memory);
    s->caches = NULL;
    s->cache_memory = NULL;
    s->ws_memory = NULL;
    s->n_caches = 0;
}

/* A workspace for `rows` and `threads`, and n caches of `capacity` positions; may be called again. */
static inline void synth_run(synth *s, size_t rows, size_t threads, size_t n, size_t capacity, dsv3_type type) {
    synth_run_free(s);
    synth_demand(dsv3_workspace_size(&s->config, rows, threads, &s->ws_bytes, NULL), "workspace size", NULL);
    s->ws_memory = synth_alloc(s->ws_bytes);
    synth_demand(dsv3_workspace_init(&s->config, &s->ws, rows, threads, s->ws_memory, s->ws_bytes, NULL), "workspace",
                 NULL);
    synth_demand(dsv3_cache_size(&s->config, capacity, type, &s->cache_bytes, NULL), "cache size", NULL);
    s->caches = (dsv3_cache *)test_alloc(n * sizeof *s->caches);
    s->cache_memory = (void **)test_alloc(n * sizeof *s->cache_memory);
    s->n_caches = n;
    for (size_t i = 0; i < n; i++) {
        void *memory = s->cache_memory[i] = synth_alloc(s->cache_bytes);
        memset(memory, 0xA5, s->cache_bytes);
        synth_demand(dsv3_cache_init(&s->config, &s->caches[i], capacity, type, memory, s->cache_bytes, NULL),
                     "cache", NULL);
    }
}

static inline void synth_close(synth *s) {
    synth_run_free(s);
    for (size_t i = 0; i < s->count; i++) {
        free(s->tensors[i].data);
        free(s->tensors[i].scale);
        free(s->tensors[i].value);
    }
    free(s->tensors);
    synth_release(s->model_memory);
    free(s);
}

/* n rows of sequence `sequence` through the model, logits of all of them. */
static inline dsv3_result synth_forward(synth *s, float *logits, const int32_t *token, size_t n, int32_t sequence,
                                        dsv3_error *error) {
    int32_t *sequences = (int32_t *)test_alloc(n * sizeof *sequences);
    dsv3_batch batch;
    dsv3_result result;
    for (size_t i = 0; i < n; i++) sequences[i] = sequence;
    memset(&batch, 0, sizeof batch);
    batch.rows = n;
    batch.token = token;
    batch.sequence = sequences;
    batch.outputs = n;
    result = dsv3_forward(&s->context, logits, &s->model, s->caches, s->n_caches, &batch, &s->ws, error);
    free(sequences);
    return result;
}

static inline void synth_tokens(int32_t *token, size_t n, int32_t V) {
    for (size_t i = 0; i < n; i++) token[i] = (int32_t)(test_random() % (uint64_t)V);
}

static inline double *synth_doubles(size_t n) {
    double *p = (double *)test_alloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = 0;
    return p;
}

/* ---- The oracle: formulas, in double */

static inline void oracle_linear(double *y, const double *w, const double *x, size_t rows, size_t cols) {
    for (size_t i = 0; i < rows; i++) {
        double sum = 0;
        for (size_t j = 0; j < cols; j++) sum += w[i * cols + j] * x[j];
        y[i] = sum;
    }
}

static inline void oracle_norm(double *y, const double *x, const double *g, size_t n, double eps) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    for (size_t i = 0; i < n; i++) y[i] = x[i] / sqrt(sum / (double)n + eps) * g[i];
}

static inline double oracle_mscale(const dsv3_rope_scaling *r, float x) {
    if (r->type != DSV3_ROPE_YARN || r->factor <= 1.0f) return 1;
    return 0.1 * (double)x * log((double)r->factor) + 1;
}

static inline double oracle_theta(const dsv3_config *c, int i) {
    const dsv3_rope_scaling *r = &c->rope_scaling;
    double base = (double)c->rope_theta, f = pow(base, -2.0 * i / c->qk_rope_head_dim), low, high, ramp;
    double pi = acos(-1.0), original = r->original_max_position_embeddings, dr = c->qk_rope_head_dim;
    if (r->type != DSV3_ROPE_YARN) return f;
    low = floor(dr * log(original / (2 * pi * (double)r->beta_fast)) / (2 * log(base)));
    high = ceil(dr * log(original / (2 * pi * (double)r->beta_slow)) / (2 * log(base)));
    if (low < 0) low = 0;
    if (high > dr - 1) high = dr - 1;
    if (fabs(high - low) < 1e-9) high += 0.001;
    ramp = fmin(fmax((i - low) / (high - low), 0), 1);
    return f * (1 - ramp) + f / (double)r->factor * ramp;
}

/* Rotates x [dr] to `position`. */
static inline void oracle_rope(const dsv3_config *c, double *x, size_t position) {
    int half = c->qk_rope_head_dim / 2;
    double m = oracle_mscale(&c->rope_scaling, c->rope_scaling.mscale) /
               oracle_mscale(&c->rope_scaling, c->rope_scaling.mscale_all_dim);
    for (int i = 0; i < half; i++) {
        double angle = (double)position * oracle_theta(c, i);
        double *a = c->rope_interleave ? &x[2 * i] : &x[i], *b = c->rope_interleave ? &x[2 * i + 1] : &x[i + half];
        double p = m * (*a * cos(angle) - *b * sin(angle)), q = m * (*a * sin(angle) + *b * cos(angle));
        *a = p, *b = q;
    }
}

/* What the cache keeps of each position: latent [S, rk + dr]. */
static inline void oracle_latents(const synth *s, int layer, double *latent, const double *u, size_t S) {
    const dsv3_config *c = &s->config;
    size_t d = (size_t)c->hidden_size, rk = (size_t)c->kv_lora_rank, width = rk + (size_t)c->qk_rope_head_dim;
    const double *a = synth_get(s, layer, -1, "self_attn.kv_a_proj_with_mqa.weight")->value;
    const double *g = synth_get(s, layer, -1, "self_attn.kv_a_layernorm.weight")->value;
    for (size_t t = 0; t < S; t++) {
        double *row = latent + t * width;
        oracle_linear(row, a, u + t * d, width, d);
        oracle_norm(row, row, g, rk, (double)c->latent_norm_eps);
        oracle_rope(c, row + rk, t);
    }
}

/* The rotated queries of one token, q [H, dn + dr]. */
static inline void oracle_query(const synth *s, int layer, double *q, const double *u, size_t position) {
    const dsv3_config *c = &s->config;
    size_t d = (size_t)c->hidden_size, rq = (size_t)c->q_lora_rank, dn = (size_t)c->qk_nope_head_dim;
    size_t H = (size_t)c->num_attention_heads, qk = dn + (size_t)c->qk_rope_head_dim;
    if (rq == 0) {
        oracle_linear(q, synth_get(s, layer, -1, "self_attn.q_proj.weight")->value, u, H * qk, d);
    } else {
        double *cq = synth_doubles(rq);
        oracle_linear(cq, synth_get(s, layer, -1, "self_attn.q_a_proj.weight")->value, u, rq, d);
        oracle_norm(cq, cq, synth_get(s, layer, -1, "self_attn.q_a_layernorm.weight")->value, rq,
                    (double)c->latent_norm_eps);
        oracle_linear(q, synth_get(s, layer, -1, "self_attn.q_b_proj.weight")->value, cq, H * qk, rq);
        free(cq);
    }
    for (size_t h = 0; h < H; h++) oracle_rope(c, q + h * qk + dn, position);
}

/* One head of one token: o [dv] from its query and the latents of positions 0 .. t. */
static inline void oracle_head(const dsv3_config *c, double *o, const double *q, const double *kv_b,
                               const double *latent, size_t t) {
    size_t rk = (size_t)c->kv_lora_rank, dn = (size_t)c->qk_nope_head_dim, dr = (size_t)c->qk_rope_head_dim;
    size_t dv = (size_t)c->v_head_dim;
    double m = oracle_mscale(&c->rope_scaling, c->rope_scaling.mscale_all_dim), top = -1e300, sum = 0;
    double scale = m * m / sqrt((double)(dn + dr)), *score = synth_doubles(t + 1), *row = synth_doubles(dn + dv);
    for (size_t j = 0; j <= t; j++) {
        const double *c_j = latent + j * (rk + dr);
        oracle_linear(row, kv_b, c_j, dn, rk);
        for (size_t i = 0; i < dn; i++) score[j] += q[i] * row[i];
        for (size_t i = 0; i < dr; i++) score[j] += q[dn + i] * c_j[rk + i];
        score[j] *= scale;
        top = fmax(top, score[j]);
    }
    for (size_t j = 0; j <= t; j++) sum += exp(score[j] - top);
    for (size_t i = 0; i < dv; i++) o[i] = 0;
    for (size_t j = 0; j <= t; j++) {
        oracle_linear(row, kv_b + dn * rk, latent + j * (rk + dr), dv, rk);
        for (size_t i = 0; i < dv; i++) o[i] += exp(score[j] - top) / sum * row[i];
    }
    free(score);
    free(row);
}

/* y [S, d] = MLA(u [S, d]) for positions 0 .. S-1 of one sequence, over the given latents. */
static inline void oracle_mla(const synth *s, int layer, double *y, const double *u, size_t S, const double *latent) {
    const dsv3_config *c = &s->config;
    size_t d = (size_t)c->hidden_size, H = (size_t)c->num_attention_heads, dv = (size_t)c->v_head_dim;
    size_t qk = (size_t)c->qk_nope_head_dim + (size_t)c->qk_rope_head_dim;
    size_t kv = ((size_t)c->qk_nope_head_dim + dv) * (size_t)c->kv_lora_rank;
    const double *kv_b = synth_get(s, layer, -1, "self_attn.kv_b_proj.weight")->value;
    const double *o_proj = synth_get(s, layer, -1, "self_attn.o_proj.weight")->value;
    double *q = synth_doubles(H * qk), *o = synth_doubles(H * dv);
    for (size_t t = 0; t < S; t++) {
        oracle_query(s, layer, q, u + t * d, t);
        for (size_t h = 0; h < H; h++) oracle_head(c, o + h * dv, q + h * qk, kv_b + h * kv, latent, t);
        oracle_linear(y + t * d, o_proj, o, d, H * dv);
    }
    free(q);
    free(o);
}

/* The best of score[0..n) that is not yet taken: higher first, then lower index. */
static inline size_t oracle_best(const double *score, const int *taken, size_t n) {
    size_t best = n;
    for (size_t i = 0; i < n; i++) {
        if (!taken[i] && (best == n || score[i] > score[best])) best = i;
    }
    return best;
}

/* Marks the best `keep` of score [n] in taken [n], in order also in idx. Returns the gap to the first one left out. */
static inline double oracle_choose(size_t *idx, int *taken, const double *score, size_t n, size_t keep) {
    size_t next;
    for (size_t i = 0; i < n; i++) taken[i] = 0;
    for (size_t k = 0; k < keep; k++) {
        idx[k] = oracle_best(score, taken, n);
        taken[idx[k]] = 1;
    }
    next = oracle_best(score, taken, n);
    return next == n || keep == 0 ? 1 : score[idx[keep - 1]] - score[next];
}

/* Experts idx [K] and weights w [K] of one token from logits z [E]. Returns how clear the choice was. */
static inline double oracle_route(const dsv3_config *c, size_t *idx, double *w, const double *z, const double *bias) {
    size_t E = (size_t)c->n_routed_experts, K = (size_t)c->num_experts_per_tok, G = (size_t)c->n_group;
    double *s = synth_doubles(E), *sel = synth_doubles(E), *group = synth_doubles(G), sum = 0, margin = 1;
    size_t *order = (size_t *)test_alloc((E + G) * sizeof *order);
    int *taken = (int *)test_alloc((E + G) * sizeof *taken);
    for (size_t e = 0; e < E; e++) sum += exp(z[e]);
    for (size_t e = 0; e < E; e++) s[e] = c->scoring_func == DSV3_SOFTMAX ? exp(z[e]) / sum : 1 / (1 + exp(-z[e]));
    for (size_t e = 0; e < E; e++) sel[e] = s[e] + (bias != NULL ? bias[e] : 0);
    if (c->topk_method != DSV3_GREEDY && G > 1) {
        size_t m = E / G, two = c->topk_method == DSV3_NOAUX_TC && m > 1 ? 2 : 1;
        for (size_t g = 0; g < G; g++) {
            oracle_choose(order, taken, sel + g * m, m, two);
            for (size_t k = 0; k < two; k++) group[g] += sel[g * m + order[k]];
        }
        margin = oracle_choose(order, taken, group, G, (size_t)c->topk_group);
        for (size_t e = 0; e < E; e++) {
            if (!taken[e / m]) sel[e] = c->group_mask == DSV3_MASK_ZERO ? 0 : -1e300;
        }
    }
    margin = fmin(margin, oracle_choose(idx, taken, sel, E, K));
    sum = 0;
    for (size_t k = 0; k < K; k++) sum += s[idx[k]];
    for (size_t k = 0; k < K; k++) {
        int normed = c->norm_topk_prob && K > 1, scaled = c->gate_scaling == DSV3_SCALE_ALWAYS || !normed;
        w[k] = s[idx[k]] / (normed ? sum + 1e-20 : 1) * (scaled ? (double)c->routed_scaling_factor : 1);
    }
    free(s), free(sel), free(group), free(order), free(taken);
    return margin;
}

static inline void oracle_mlp(double *y, const double *u, const double *gate, const double *up, const double *down,
                              size_t d, size_t F) {
    double *a = synth_doubles(F), *b = synth_doubles(F);
    oracle_linear(a, gate, u, F, d);
    oracle_linear(b, up, u, F, d);
    for (size_t i = 0; i < F; i++) a[i] = a[i] / (1 + exp(-a[i])) * b[i];
    oracle_linear(y, down, a, d, F);
    free(a);
    free(b);
}

/* y [d] = FFN(u [d]) of one token. margin becomes smaller when a routing decision was close. */
static inline void oracle_ffn(const synth *s, int layer, double *y, const double *u, double *margin) {
    const dsv3_config *c = &s->config;
    size_t d = (size_t)c->hidden_size, E = (size_t)c->n_routed_experts, K = (size_t)c->num_experts_per_tok;
    size_t F = (size_t)c->moe_intermediate_size, Fs = F * (size_t)c->n_shared_experts;
    double *z, *w, *part;
    size_t *idx;
    const double *bias = NULL;
    if (layer < c->first_k_dense_replace || layer % c->moe_layer_freq != 0) {
        oracle_mlp(y, u, synth_get(s, layer, -1, "mlp.gate_proj.weight")->value,
                   synth_get(s, layer, -1, "mlp.up_proj.weight")->value,
                   synth_get(s, layer, -1, "mlp.down_proj.weight")->value, d, (size_t)c->intermediate_size);
        return;
    }
    z = synth_doubles(E), w = synth_doubles(K), part = synth_doubles(d);
    idx = (size_t *)test_alloc(K * sizeof *idx);
    oracle_linear(z, synth_get(s, layer, -1, "mlp.gate.weight")->value, u, E, d);
    if (c->topk_method == DSV3_NOAUX_TC) bias = synth_get(s, layer, -1, "mlp.gate.e_score_correction_bias")->value;
    *margin = fmin(*margin, oracle_route(c, idx, w, z, bias));
    for (size_t i = 0; i < d; i++) y[i] = 0;
    if (Fs > 0) {
        oracle_mlp(y, u, synth_get(s, layer, -1, "mlp.shared_experts.gate_proj.weight")->value,
                   synth_get(s, layer, -1, "mlp.shared_experts.up_proj.weight")->value,
                   synth_get(s, layer, -1, "mlp.shared_experts.down_proj.weight")->value, d, Fs);
    }
    for (size_t k = 0; k < K; k++) {
        int e = (int)idx[k];
        oracle_mlp(part, u, synth_get(s, layer, e, "gate_proj.weight")->value,
                   synth_get(s, layer, e, "up_proj.weight")->value, synth_get(s, layer, e, "down_proj.weight")->value,
                   d, F);
        for (size_t i = 0; i < d; i++) y[i] += w[k] * part[i];
    }
    free(z), free(w), free(part), free(idx);
}

/* x [S, d] of one sequence through a layer. margin becomes smaller when a routing decision was close. */
static inline void oracle_layer(const synth *s, int layer, double *x, size_t S, double *margin) {
    const dsv3_config *c = &s->config;
    size_t d = (size_t)c->hidden_size, width = (size_t)c->kv_lora_rank + (size_t)c->qk_rope_head_dim;
    double *u = synth_doubles(S * d), *y = synth_doubles(S * d), *latent = synth_doubles(S * width);
    const double *g = synth_get(s, layer, -1, "input_layernorm.weight")->value;
    for (size_t t = 0; t < S; t++) oracle_norm(u + t * d, x + t * d, g, d, (double)c->rms_norm_eps);
    oracle_latents(s, layer, latent, u, S);
    oracle_mla(s, layer, y, u, S, latent);
    for (size_t i = 0; i < S * d; i++) x[i] += y[i];
    g = synth_get(s, layer, -1, "post_attention_layernorm.weight")->value;
    for (size_t t = 0; t < S; t++) {
        oracle_norm(u + t * d, x + t * d, g, d, (double)c->rms_norm_eps);
        oracle_ffn(s, layer, y + t * d, u + t * d, margin);
    }
    for (size_t i = 0; i < S * d; i++) x[i] += y[i];
    free(u), free(y), free(latent);
}

/* logits [S, V] = head norm(x). x [S, d] becomes what an MTP module gets of it. */
static inline void oracle_end(const synth *s, double *logits, double *x, const double *g, const double *head,
                              size_t S) {
    const dsv3_config *c = &s->config;
    size_t d = (size_t)c->hidden_size, V = (size_t)c->vocab_size;
    double *u = synth_doubles(d);
    for (size_t t = 0; t < S; t++) {
        oracle_norm(u, x + t * d, g, d, (double)c->rms_norm_eps);
        oracle_linear(logits + t * V, head, u, V, d);
        for (size_t i = 0; i < d && c->mtp_hidden == DSV3_MTP_POST_NORM; i++) x[t * d + i] = u[i];
    }
    free(u);
}

static inline const double *oracle_lm_head(const synth *s) {
    int tied = s->config.tie_word_embeddings;
    return synth_get(s, -1, -1, tied ? "model.embed_tokens.weight" : "lm_head.weight")->value;
}

/* logits [S, V] of one sequence from its beginning, and x [S, d], its states for MTP module 1. Returns the closest
 * routing decision. */
static inline double oracle_main(const synth *s, double *logits, double *x, const int32_t *token, size_t S) {
    size_t d = (size_t)s->config.hidden_size;
    const double *embed = synth_get(s, -1, -1, "model.embed_tokens.weight")->value;
    double margin = 1;
    for (size_t i = 0; i < S * d; i++) x[i] = embed[(size_t)token[i / d] * d + i % d];
    for (int l = 0; l < s->config.num_hidden_layers; l++) oracle_layer(s, l, x, S, &margin);
    oracle_end(s, logits, x, synth_get(s, -1, -1, "model.norm.weight")->value, oracle_lm_head(s), S);
    return margin;
}

/* MTP module k on the first S positions. token [S]: t_k, t_{k+1} ..; x [S, d]: h^{k-1}, becomes h^k. */
static inline double oracle_mtp(const synth *s, int k, double *logits, double *x, const int32_t *token, size_t S) {
    const dsv3_config *c = &s->config;
    int layer = c->num_hidden_layers + k - 1;
    size_t d = (size_t)c->hidden_size, e = c->mtp_concat == DSV3_MTP_EMBED_FIRST ? 0 : d;
    double *both = synth_doubles(2 * d), margin = 1, eps = (double)c->rms_norm_eps;
    const double *embed = synth_get(s, -1, -1, "model.embed_tokens.weight")->value, *head = oracle_lm_head(s);
    char name[DSV3_MAX_NAME];
    snprintf(name, sizeof name, "model.layers.%d.embed_tokens.weight", layer);
    if (synth_tensor_of(s, name) != NULL) embed = synth_tensor_of(s, name)->value;
    snprintf(name, sizeof name, "model.layers.%d.shared_head.head.weight", layer);
    if (synth_tensor_of(s, name) != NULL) head = synth_tensor_of(s, name)->value;
    for (size_t t = 0; t < S; t++) {
        oracle_norm(both + e, embed + (size_t)token[t] * d, synth_get(s, layer, -1, "enorm.weight")->value, d, eps);
        oracle_norm(both + (d - e), x + t * d, synth_get(s, layer, -1, "hnorm.weight")->value, d, eps);
        oracle_linear(x + t * d, synth_get(s, layer, -1, "eh_proj.weight")->value, both, d, 2 * d);
    }
    oracle_layer(s, layer, x, S, &margin);
    oracle_end(s, logits, x, synth_get(s, layer, -1, "shared_head.norm.weight")->value, head, S);
    free(both);
    return margin;
}

/* The main model alone. */
static inline double oracle_forward(const synth *s, double *logits, const int32_t *token, size_t S) {
    double *x = synth_doubles(S * (size_t)s->config.hidden_size), margin = oracle_main(s, logits, x, token, S);
    free(x);
    return margin;
}
#endif
