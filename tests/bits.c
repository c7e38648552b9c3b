/* bits.c -- a yardstick: hashes of what the library computes, one line of text for each case.
 *
 * tests/bits.sh builds it with an old and a new dsv3.h and compares the lines: a change that is not meant to change
 * results must not change one. Therefore it compiles with any version of the header: it uses public calls and
 * documented fields only, and nothing that tells how results come about.
 *
 * Cases are all that may lead to other code: backends, types of weights, exact and fast, packed or not, few and
 * many rows, both forms of attention, both types of caches, one thread and three, short and long pasts, a training
 * step with and without kept values. What must agree in one version (packed or not, one thread or three) is computed
 * in both ways, too; bits.sh compares these lines with each other.
 *
 *     bits [--backend NAME] [--only KIND] [--quick]
 *
 * KIND: plain ops blocks forward long evaluate train. The environment variable BITS_TIMES: how long each takes. */
#define _POSIX_C_SOURCE 200809L
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

/* This file is compiled with headers of 0.1, too, and speaks their API. */
#if DSV3_VERSION_MINOR >= 2
#define dsv3_group dsv3_tensor_kind
#define group kind
#define DSV3_GROUP_EMBED DSV3_KIND_EMBED
#define DSV3_GROUP_ROUTER DSV3_KIND_ROUTER
#define dsv3_context_init(context, backend, threads) dsv3_context_init(context, backend, threads, NULL)
#define dsv3_model_size(config, bytes) dsv3_model_size(config, bytes, NULL)
#define dsv3_model_bind(model, config, memory, bytes, find, user, error)                                             \
    dsv3_model_bind(config, model, memory, bytes, find, user, error)
#define dsv3_pack_size(context, model, bytes) dsv3_pack_size(context, model, bytes, NULL)
#define dsv3_pack(context, model, memory, bytes) dsv3_pack(context, model, memory, bytes, NULL)
#define dsv3_cache_size(config, capacity, type, bytes) dsv3_cache_size(config, capacity, type, bytes, NULL)
#define dsv3_cache_init(cache, config, capacity, type, memory, bytes)                                                \
    dsv3_cache_init(config, cache, capacity, type, memory, bytes, NULL)
#define dsv3_cache_truncate(cache, length) dsv3_cache_truncate(cache, length, NULL)
#define dsv3_cache_copy(to, from) dsv3_cache_copy(to, from, NULL)
#define dsv3_mtp_cache_size(config, capacity, type, bytes) dsv3_cache_mtp_size(config, capacity, type, bytes, NULL)
#define dsv3_mtp_cache_init(cache, config, capacity, type, memory, bytes)                                            \
    dsv3_cache_mtp_init(config, cache, capacity, type, memory, bytes, NULL)
#define dsv3_workspace_size(config, rows, threads, bytes) dsv3_workspace_size(config, rows, threads, bytes, NULL)
#define dsv3_workspace_init(workspace, config, rows, threads, memory, bytes)                                         \
    dsv3_workspace_init(config, workspace, rows, threads, memory, bytes, NULL)
#define dsv3_sequence_size(model, capacity, type, rows, drafts, bytes)                                               \
    dsv3_sequence_size(model, capacity, type, rows, drafts, bytes, NULL)
#define dsv3_sequence_init(sequence, model, capacity, type, rows, drafts, memory, bytes)                             \
    dsv3_sequence_init(model, sequence, capacity, type, rows, drafts, memory, bytes, NULL)
#define dsv3_sequence_append(sequence, model, token, n) dsv3_sequence_append(model, sequence, token, n, NULL)
#define dsv3_generate dsv3_generate_step
#define dsv3_parameters_size(config, bytes) dsv3_parameters_size(config, bytes, NULL)
#define dsv3_parameters_init(parameters, config, memory, bytes)                                                      \
    dsv3_parameters_init(config, parameters, memory, bytes, NULL)
#define dsv3_parameters_load(parameters, model) dsv3_parameters_from_model(parameters, model, NULL)
#define dsv3_trainer_size(config, settings, threads, bytes) dsv3_trainer_size(config, settings, threads, bytes, NULL)
#define dsv3_trainer_init(trainer, config, settings, threads, memory, bytes)                                         \
    dsv3_trainer_init(config, trainer, settings, threads, memory, bytes, NULL)
#define dsv3_quantize(data, scale, x, type, rows, cols) dsv3_quantize(data, scale, x, type, rows, cols, NULL)
#define dsv3_router_select(config, idx, gate, score, bias, alpha, n, scratch)                                        \
    dsv3_router_select(config, idx, gate, score, bias, alpha, n, scratch, NULL)
#define dsv3_router_weights(config, gate, idx, score, n) dsv3_router_weights(config, gate, idx, score, n, NULL)
#define dsv3_sample(token, logits, V, temperature, top_p, rng, candidates)                                           \
    dsv3_sample(token, logits, V, temperature, top_p, rng, candidates, NULL)
#define dsv3_backend_find(backend, name) dsv3_backend_find(backend, name, NULL)
#define dsv3_model_tensors(config, visit, user) dsv3_model_tensors(config, visit, user, NULL)
#define dsv3_train_begin(trainer, targets, sequences) dsv3_train_begin(trainer, targets, sequences, NULL)
#define dsv3_ffn_forward(context, y, u, model, layer, n, workspace)                                                  \
    dsv3_ffn_forward(context, y, u, model, layer, n, workspace, NULL)
#define dsv3_text_count(text, depths, targets, sequences) dsv3_text_count(text, depths, targets, sequences, NULL)
#define dsv3_parameters_random(parameters, rng, std) dsv3_parameters_random(parameters, rng, std, NULL)
#define dsv3_linear(context, y, x, w, n, scratch) dsv3_linear(context, y, x, w, n, scratch, NULL)
#define dsv3_linear_backward(context, dx, dw, dy, x, w, n, scratch)                                                  \
    dsv3_linear_backward(context, dx, dw, dy, x, w, n, scratch, NULL)
#define dsv3_cross_entropy(context, nll, u, head, target, n, scratch)                                                \
    dsv3_cross_entropy(context, nll, u, head, target, n, scratch, NULL)
#define dsv3_cross_entropy_backward(context, du, dhead, weight, u, head, target, n, scratch)                         \
    dsv3_cross_entropy_backward(context, du, dhead, weight, u, head, target, n, scratch, NULL)
#define dsv3_embed(context, x, token, w, n) dsv3_embed(context, x, token, w, n, NULL)
#define dsv3_embed_backward(dw, dx, token, n, d) dsv3_embed_backward(dw, dx, token, n, INT32_MAX / 256, d, NULL)
#define dsv3_rmsnorm(context, y, x, g, n, d, eps) dsv3_rmsnorm(context, y, x, g, n, d, eps, NULL)
#define dsv3_rmsnorm_backward(context, dx, dg, dy, x, g, n, d, eps, scratch)                                         \
    dsv3_rmsnorm_backward(context, dx, dg, dy, x, g, n, eps, scratch, NULL)
#define dsv3_router_scores(context, config, score, x, w, bias, n, scratch)                                           \
    dsv3_router_scores(context, config, score, x, w, bias, n, scratch, NULL)
#define dsv3_router_weights_backward(config, dscore, dgate, idx, score, n)                                           \
    dsv3_router_weights_backward(config, dscore, dgate, idx, score, n, NULL)
#define dsv3_router_scores_backward(config, dz, dscore, score, n)                                                    \
    dsv3_router_scores_backward(config, dz, dscore, score, n, NULL)
#define dsv3_rope_frequencies(config, theta) dsv3_rope_frequencies(config, theta, NULL)
#define dsv3_rope_turns(config, turns) dsv3_rope_turns(config, turns, NULL)
#define dsv3_rope_table(table, position, turns, factor, n, dr)                                                       \
    dsv3_rope_table(table, position, turns, factor, n, dr, NULL)
#define dsv3_rope_rotate(x, table, dr, interleave) dsv3_rope_rotate(x, table, dr, interleave, NULL)
#define dsv3_rope_rotate_backward(x, table, dr, interleave) dsv3_rope_rotate_backward(x, table, dr, interleave, NULL)
#define dsv3_bias_step(bias, load, E, rule, speed) dsv3_bias_step(bias, load, 1, E, rule, speed, NULL)
#define dsv3_mla_forward(context, y, u, model, weights, layer, caches, n, workspace)                                 \
    dsv3_mla_forward(context, y, u, model, weights, layer, caches, n, workspace, NULL)
typedef dsv3_result (*loss_call)(double *loss, const dsv3_routing *routing, double *scratch, dsv3_error *error);
static double loss_of(loss_call call, dsv3_routing routing, double *scratch) {
    double loss = -1;
    return call(&loss, &routing, scratch, NULL) == DSV3_OK ? loss : -1;
}
static dsv3_routing routing_of(const float *score, const int32_t *idx, const uint8_t *mask, size_t n, size_t E, size_t K,
                               size_t devices, size_t most) {
    dsv3_routing routing = {score, idx, mask, n, E, K, devices, most};
    return routing;
}
static void balance_backward(float *dscore, double scale, const dsv3_balance_weights *weights, dsv3_routing routing,
                             double *scratch) {
    (void)dsv3_balance_backward(dscore, scale, weights, &routing, scratch, NULL);
}
#define dsv3_balance_loss(score, idx, mask, n, E, K, scratch)                                                        \
    loss_of(dsv3_balance_loss, routing_of(score, idx, mask, n, E, K, 0, 0), scratch)
#define dsv3_device_loss(score, idx, mask, n, E, K, devices, scratch)                                                \
    loss_of(dsv3_device_loss, routing_of(score, idx, mask, n, E, K, devices, 0), scratch)
#define dsv3_communication_loss(score, idx, mask, n, E, K, devices, most, scratch)                                   \
    loss_of(dsv3_communication_loss, routing_of(score, idx, mask, n, E, K, devices, most), scratch)
#define dsv3_balance_backward(dscore, scale, weights, score, idx, mask, n, E, K, scratch)                            \
    balance_backward(dscore, scale, weights, routing_of(score, idx, mask, n, E, K, 0, 0), scratch)
static size_t dsv3_linear_scratch(const dsv3_context *context, size_t n, size_t cols) {
    size_t bytes;
    return dsv3_linear_size(context, n, cols, &bytes, NULL) == DSV3_OK ? bytes / sizeof(float) : SIZE_MAX;
}
static size_t dsv3_cross_entropy_scratch(const dsv3_context *context, const dsv3_tensor *head, size_t n) {
    size_t bytes;
    return dsv3_cross_entropy_size(context, head, n, &bytes, NULL) == DSV3_OK ? bytes / sizeof(float) : SIZE_MAX;
}
#endif

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define THREADS 3u
#define MOST_ROWS 200u

/* ---- Small things */

static void *get(size_t bytes) {
    void *p = malloc(bytes + 1);
    if (p == NULL) fprintf(stderr, "bits: out of memory\n"), exit(2);
    memset(p, 0xFF, bytes); /* NaN, if it should ever be read before it is written */
    return p;
}

static float *get_floats(size_t n) { return (float *)get(n * sizeof(float)); }

static void demand(dsv3_result result, const char *what, const dsv3_error *error) {
    char text[256] = "";
    if (result == DSV3_OK) return;
    if (error != NULL) dsv3_error_text(error, text, sizeof text);
    fprintf(stderr, "bits: %s: %s %s\n", what, dsv3_result_string(result), text);
    exit(2);
}

static uint64_t hash(uint64_t h, const void *data, size_t bytes) {
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < bytes; i += 4) {
        uint32_t word = 0;
        memcpy(&word, p + i, bytes - i < 4 ? bytes - i : 4);
        h = (h ^ word) * 0x9E3779B97F4A7C15u;
        h ^= h >> 32;
    }
    return h;
}

/* All NaN are one: which of two an addition keeps is the compiler's choice. */
static uint64_t hash_floats(uint64_t h, const float *x, size_t n) {
    static const uint32_t nan = 0x7FC00000u;
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        if (x[i] == x[i]) continue;
        h = hash(hash(h, x + from, (i - from) * sizeof *x), &nan, sizeof nan);
        from = i + 1;
    }
    return hash(h, x + from, (n - from) * sizeof *x);
}

static uint64_t seed; /* splitmix64: the same stream everywhere */
static uint64_t next(void) {
    uint64_t z = (seed += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
static float uniform(float low, float high) { return low + (high - low) * ((float)(next() >> 40) / 16777216.0f); }
static void fill(float *x, size_t n, float low, float high) {
    for (size_t i = 0; i < n; i++) x[i] = uniform(low, high);
}
static float *random_floats(size_t n, float low, float high) {
    float *x = get_floats(n);
    fill(x, n, low, high);
    return x;
}

/* ---- What is asked for */

static const char *only_backend, *only_kind;
static int quick;

static int wanted(const char *kind) { return only_kind == NULL || strcmp(only_kind, kind) == 0; }

typedef struct backend {
    const char *name;
    dsv3_backend id;
} backend;

static backend backends[8];
static size_t n_backends;

static int is_reference(const backend *b) { return strcmp(b->name, "reference") == 0; }

static void find_backends(void) {
    static const char *const names[] = {"reference", "avx2", "avx512", "avx512_bf16", "amx"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        dsv3_context ctx;
        backend *b = &backends[n_backends];
        b->name = names[i];
        if (only_backend != NULL && strcmp(only_backend, names[i]) != 0) continue;
        if (dsv3_backend_find(&b->id, names[i]) != DSV3_OK || dsv3_context_init(&ctx, b->id, 1) != DSV3_OK) {
            fprintf(stderr, "bits: %s does not run here\n", names[i]);
        } else {
            n_backends++;
        }
    }
}

/* Three threads, each with every third of the pieces into which a loop is cut. */
typedef struct piece_worker {
    dsv3_task task;
    void *arg;
    size_t n, piece, worker, threads;
} piece_worker;

static void *work_pieces(void *p) {
    const piece_worker *w = (const piece_worker *)p;
    for (size_t begin = w->worker * w->piece; begin < w->n; begin += w->threads * w->piece) {
        w->task(w->arg, begin, begin + w->piece < w->n ? begin + w->piece : w->n, w->worker);
    }
    return NULL;
}

static void parallel(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    pthread_t thread[THREADS];
    piece_worker worker[THREADS];
    (void)user;
    for (size_t i = 0; i < threads; i++) {
        worker[i].task = task, worker[i].arg = arg, worker[i].n = n, worker[i].worker = i;
        worker[i].threads = threads, worker[i].piece = n / 7 + 1;
        if (i > 0 && pthread_create(&thread[i], NULL, work_pieces, &worker[i]) != 0) exit(2);
    }
    work_pieces(&worker[0]);
    for (size_t i = 1; i < threads; i++) pthread_join(thread[i], NULL);
}

static dsv3_context context_make(const backend *b, size_t threads, int fast) {
    dsv3_context ctx;
    demand(dsv3_context_init(&ctx, b->id, 1), b->name, NULL);
    ctx.parallel_for = threads > 1 ? parallel : NULL;
    ctx.threads = threads;
    ctx.compute = fast ? DSV3_FAST : DSV3_EXACT;
    ctx.attention = DSV3_ATTENTION_ABSORBED;
    return ctx;
}

static const char *mode_name(int fast) { return fast ? "fast" : "exact"; }

/* ---- Models with random weights */

enum { SMALL, ODD, V2, CROWD, LARGE, WIDE, TALL, MODELS };
static const char *const model_names[MODELS] = {"small", "odd", "v2", "crowd", "large", "wide", "tall"};

#define MIXED DSV3_TYPES /* every tensor of another type */

static const char *type_name(int type) { return type == MIXED ? "mixed" : dsv3_type_name((dsv3_type)type); }

static void sizes(dsv3_config *c, int V, int d, int I, int F, int L, int dense) {
    c->vocab_size = V;
    c->hidden_size = d;
    c->intermediate_size = I;
    c->moe_intermediate_size = F;
    c->num_hidden_layers = L;
    c->first_k_dense_replace = dense;
}

static void attention(dsv3_config *c, int H, int rq, int rk, int dn, int dr, int dv) {
    c->num_attention_heads = H;
    c->num_key_value_heads = H;
    c->q_lora_rank = rq;
    c->kv_lora_rank = rk;
    c->qk_nope_head_dim = dn;
    c->qk_rope_head_dim = dr;
    c->v_head_dim = dv;
}

static void experts(dsv3_config *c, int E, int shared, int K, int G, int Gt, float scale) {
    c->n_routed_experts = E;
    c->n_shared_experts = shared;
    c->num_experts_per_tok = K;
    c->n_group = G;
    c->topk_group = Gt;
    c->routed_scaling_factor = scale;
}

static void yarn(dsv3_config *c, float factor, int original, float mscale, float all_dim) {
    c->rope_scaling.type = DSV3_ROPE_YARN;
    c->rope_scaling.factor = factor;
    c->rope_scaling.original_max_position_embeddings = original;
    c->rope_scaling.mscale = mscale;
    c->rope_scaling.mscale_all_dim = all_dim;
}

static dsv3_config config_make(int which) {
    dsv3_config c = dsv3_config_default();
    switch (which) {
    case SMALL: /* the widths are multiples of 32, as Q8_0 and Q4_0 need, and of nothing more; heads are of neither */
        sizes(&c, 250, 96, 160, 96, 3, 1);
        attention(&c, 9, 64, 96, 24, 8, 32);
        experts(&c, 8, 2, 3, 4, 2, 2.5f);
        yarn(&c, 40.0f, 64, 1.0f, 0.7f);
        c.num_nextn_predict_layers = 2;
        break;
    case ODD: /* multiples of nothing */
        sizes(&c, 139, 149, 133, 29, 3, 0);
        attention(&c, 5, 71, 51, 21, 6, 67);
        experts(&c, 6, 0, 2, 3, 2, 1.5f);
        c.moe_layer_freq = 2;
        c.rope_interleave = 0;
        c.group_mask = DSV3_MASK_ZERO;
        c.mtp_concat = DSV3_MTP_HIDDEN_FIRST;
        c.mtp_hidden = DSV3_MTP_PRE_NORM;
        c.num_nextn_predict_layers = 1;
        break;
    case V2: /* kv_b_proj has a packed copy; a panel ends after 32 rows */
        sizes(&c, 163, 160, 192, 96, 2, 1);
        attention(&c, 2, 0, 96, 64, 16, 128);
        experts(&c, 6, 2, 2, 3, 2, 4.0f);
        yarn(&c, 8.0f, 32, 0.707f, 0.707f);
        c.scoring_func = DSV3_SOFTMAX;
        c.topk_method = DSV3_GROUP_LIMITED_GREEDY;
        c.norm_topk_prob = 0;
        c.gate_scaling = DSV3_SCALE_UNLESS_NORMED;
        c.tie_word_embeddings = 1;
        break;
    case CROWD: /* so many experts that one after the other goes through its whole MLP */
        sizes(&c, 97, 128, 64, 32, 2, 1);
        attention(&c, 4, 0, 32, 12, 8, 40);
        experts(&c, 64, 1, 6, 8, 4, 2.5f);
        break;
    case LARGE: /* heads and latents as published */
        sizes(&c, 1100, 512, 640, 256, 2, 1);
        attention(&c, 3, 256, 512, 128, 64, 128);
        experts(&c, 6, 1, 2, 2, 1, 2.5f);
        yarn(&c, 40.0f, 128, 1.0f, 1.0f);
        c.num_nextn_predict_layers = 1;
        break;
    case WIDE: /* of the last two, single ops take lm_head: long rows, */
        sizes(&c, 331, 1184, 32, 0, 1, 1);
        attention(&c, 1, 0, 32, 8, 8, 32);
        experts(&c, 0, 0, 0, 1, 1, 1.0f);
        break;
    case TALL: /* and many of them */
    default:
        sizes(&c, 2129, 160, 32, 0, 1, 1);
        attention(&c, 1, 0, 32, 8, 8, 32);
        experts(&c, 0, 0, 0, 1, 1, 1.0f);
        break;
    }
    return c;
}

typedef struct weight {
    dsv3_tensor_info info;
    dsv3_type type;
    float *value; /* [rows, cols] before it is encoded */
    void *data;
    float *scale;
} weight;

/* Weights, and two models bound to them, of which one gets packed. */
typedef struct model {
    const char *name;
    int which;
    dsv3_config config;
    int type; /* dsv3_type, or MIXED */
    weight *weights;
    size_t count, room;
    dsv3_model bound[2];
    void *bound_memory[2], *packed;
} model;

static size_t blocks_of(size_t n) { return (n + 127) / 128; }

static dsv3_result add_weight(void *user, const dsv3_tensor_info *info) {
    model *m = (model *)user;
    weight *w;
    float high = info->group == DSV3_GROUP_EMBED ? 1.7f : (float)sqrt(3.0 / (double)info->cols), low = -high;
    if (info->optional && m->which == SMALL)
        return DSV3_OK; /* its modules have the main model's embedding and head */
    if (m->count == m->room) {
        m->room = 2 * m->room + 64;
        m->weights = (weight *)realloc(m->weights, m->room * sizeof *m->weights);
        if (m->weights == NULL) exit(2);
    }
    w = &m->weights[m->count++];
    memset(w, 0, sizeof *w);
    w->info = *info;
    if (info->rank == 1) low = 0.75f, high = 1.25f;
    if (info->group == DSV3_GROUP_ROUTER && info->rank == 1) low = -0.1f, high = 0.1f;
    seed = hash(7, info->name, strlen(info->name)); /* the order of tensors does not matter */
    w->value = random_floats(info->rows * info->cols, low, high);
    return DSV3_OK;
}

/* The two that begin an MLP have one type: a workspace has room for one rounded copy of its input. */
static dsv3_type mixed_type(const dsv3_tensor_info *info) {
    const char *up = strstr(info->name, ".up_proj");
    size_t length = up != NULL ? (size_t)(up - info->name) : strlen(info->name);
    char name[DSV3_MAX_NAME + 16];
    snprintf(name, sizeof name, "%.*s%s", (int)length, info->name, up != NULL ? ".gate_proj.weight" : "");
    return (dsv3_type)(hash(3, name, strlen(name)) % (info->rank == 1 ? 3 : DSV3_TYPES));
}

static dsv3_type weight_type(int type, const dsv3_tensor_info *info) {
    int is_bias = info->group == DSV3_GROUP_ROUTER && info->rank == 1;
    int is_plain = info->rank == 1 || info->group == DSV3_GROUP_ROUTER;
    if (is_bias || type == DSV3_F32) return DSV3_F32;
    if (type == MIXED) return mixed_type(info);
    if (type == DSV3_F8_E4M3) return is_plain || info->group == DSV3_GROUP_EMBED ? DSV3_BF16 : DSV3_F8_E4M3;
    return is_plain && dsv3_type_block((dsv3_type)type) > 1 ? DSV3_F32 : (dsv3_type)type;
}

static dsv3_result find_weight(void *user, const char *name, dsv3_tensor *tensor) {
    const model *m = (const model *)user;
    const char *end = strstr(name, "_scale_inv");
    size_t length = end != NULL ? (size_t)(end - name) : strlen(name);
    for (size_t i = 0; i < m->count; i++) {
        const weight *w = &m->weights[i];
        if (strncmp(w->info.name, name, length) != 0 || w->info.name[length] != '\0') continue;
        if (end != NULL && w->scale == NULL) return DSV3_ERR_MISSING;
        memset(tensor, 0, sizeof *tensor);
        tensor->data = end != NULL ? w->scale : w->data;
        tensor->rows = end != NULL ? blocks_of(w->info.rows) : w->info.rows;
        tensor->cols = end != NULL ? blocks_of(w->info.cols) : w->info.cols;
        tensor->type = end != NULL ? DSV3_F32 : w->type;
        tensor->rank = end != NULL ? 2 : w->info.rank;
        return DSV3_OK;
    }
    return DSV3_ERR_MISSING;
}

static model *model_make(int which) {
    model *m = (model *)get(sizeof *m);
    dsv3_error error;
    memset(m, 0, sizeof *m);
    m->which = which;
    m->name = model_names[which];
    m->config = config_make(which);
    demand(dsv3_config_check(&m->config, &error), m->name, &error);
    demand(dsv3_model_tensors(&m->config, add_weight, m), m->name, NULL);
    return m;
}

static int model_has_type(const model *m, int type) {
    if (type == MIXED) return m->which == SMALL || m->which == CROWD;
    return m->which != ODD || dsv3_type_block((dsv3_type)type) == 1; /* its rows are no whole blocks */
}

static void model_bind(model *m, int i) {
    dsv3_error error;
    size_t bytes;
    demand(dsv3_model_size(&m->config, &bytes), "model", NULL);
    free(m->bound_memory[i]);
    m->bound_memory[i] = get(bytes);
    demand(dsv3_model_bind(&m->bound[i], &m->config, m->bound_memory[i], bytes, find_weight, m, &error), m->name,
           &error);
}

/* All weights as `type`, and bound. The bytes are a result, too. */
static void model_encode(model *m, int type) {
    uint64_t bytes = 1;
    m->type = type;
    for (size_t i = 0; i < m->count; i++) {
        weight *w = &m->weights[i];
        size_t rows = w->info.rows, cols = w->info.cols, size;
        w->type = weight_type(type, &w->info);
        size = rows * dsv3_row_bytes(w->type, cols);
        free(w->data), free(w->scale);
        w->data = get(size);
        w->scale = w->type == DSV3_F8_E4M3 ? get_floats(blocks_of(rows) * blocks_of(cols)) : NULL;
        demand(dsv3_quantize(w->data, w->scale, w->value, w->type, rows, cols), w->info.name, NULL);
        bytes = hash(bytes, w->data, size);
        if (w->scale != NULL) bytes = hash_floats(bytes, w->scale, blocks_of(rows) * blocks_of(cols));
    }
    model_bind(m, 0);
    printf("quantize backend=any model=%s type=%s bytes=%016llx\n", m->name, type_name(type),
           (unsigned long long)bytes);
}

/* Packs bound[1] for a backend. 0: it takes weights as they lie. */
static int model_pack(model *m, const backend *b, size_t threads) {
    dsv3_context ctx = context_make(b, threads, 0);
    size_t bytes;
    model_bind(m, 1);
    demand(dsv3_pack_size(&ctx, &m->bound[1], &bytes), "pack", NULL);
    free(m->packed);
    m->packed = get(bytes);
    demand(dsv3_pack(&ctx, &m->bound[1], m->packed, bytes), "pack", NULL);
    return bytes > 0;
}

static void model_free(model *m) {
    for (size_t i = 0; i < m->count; i++)
        free(m->weights[i].value), free(m->weights[i].data), free(m->weights[i].scale);
    free(m->weights), free(m->packed), free(m->bound_memory[0]), free(m->bound_memory[1]);
    free(m);
}

/* ---- Caches and workspaces */

#define CACHES 2

typedef struct run {
    const model *m;
    const backend *b;
    const dsv3_model *weights;
    dsv3_context ctx;
    dsv3_workspace ws;
    dsv3_cache caches[CACHES], modules[2 * CACHES];
    void *ws_memory, *cache_memory[CACHES], *module_memory[2 * CACHES];
    float *logits, *hidden;
    char label[160];
} run;

static int32_t token_at(const model *m, size_t i) {
    return (int32_t)((i * 7919 + i * i % 613 + 3) % (size_t)m->config.vocab_size);
}

static void run_open(run *r, const model *m, const backend *b, int fast, int pack, size_t threads, size_t rows,
                     size_t capacity, dsv3_type cache) {
    const dsv3_config *c = &m->config;
    size_t bytes;
    memset(r, 0, sizeof *r);
    r->m = m;
    r->b = b;
    r->weights = &m->bound[pack];
    r->ctx = context_make(b, threads, fast);
    demand(dsv3_workspace_size(c, rows, threads, &bytes), "workspace", NULL);
    r->ws_memory = get(bytes);
    demand(dsv3_workspace_init(&r->ws, c, rows, threads, r->ws_memory, bytes), "workspace", NULL);
    demand(dsv3_cache_size(c, capacity, cache, &bytes), "cache", NULL);
    for (size_t i = 0; i < CACHES; i++) {
        r->cache_memory[i] = get(bytes);
        demand(dsv3_cache_init(&r->caches[i], c, capacity, cache, r->cache_memory[i], bytes), "cache", NULL);
    }
    for (size_t i = 0; i < CACHES * (size_t)c->num_nextn_predict_layers; i++) {
        demand(dsv3_mtp_cache_size(c, capacity, cache, &bytes), "module's cache", NULL);
        r->module_memory[i] = get(bytes);
        demand(dsv3_mtp_cache_init(&r->modules[i], c, capacity, cache, r->module_memory[i], bytes), "module's cache",
               NULL);
    }
    r->logits = get_floats(rows * (size_t)c->vocab_size);
    r->hidden = get_floats(rows * (size_t)c->hidden_size);
    snprintf(r->label, sizeof r->label, "backend=%s model=%s type=%s mode=%s cache=%s pack=%d threads=%d", b->name,
             m->name, type_name(m->type), mode_name(fast), dsv3_type_name(cache), pack, (int)threads);
}

static void run_close(run *r) {
    for (size_t i = 0; i < CACHES; i++) free(r->cache_memory[i]);
    for (size_t i = 0; i < 2 * CACHES; i++) free(r->module_memory[i]);
    free(r->ws_memory), free(r->logits), free(r->hidden);
}

/* Prints a line for the rows of the last call. */
static void run_print(const run *r, const char *kind, size_t past, size_t rows, size_t outputs) {
    uint64_t logits = hash_floats(1, r->logits, outputs * (size_t)r->m->config.vocab_size);
    uint64_t hidden = hash_floats(1, r->ws.hidden, rows * (size_t)r->m->config.hidden_size);
    printf("%s %s form=%s past=%d rows=%d logits=%016llx hidden=%016llx\n", kind, r->label,
           r->ctx.attention == DSV3_ATTENTION_ABSORBED ? "absorbed" : "expanded", (int)past, (int)rows,
           (unsigned long long)logits, (unsigned long long)hidden);
}

/* Rows [from, from + n) of the text to sequence 0; logits of the last `outputs`. */
static void run_rows(run *r, size_t from, size_t n, size_t outputs) {
    int32_t token[MOST_ROWS];
    dsv3_batch batch;
    dsv3_error error;
    for (size_t i = 0; i < n; i++) token[i] = token_at(r->m, from + i);
    memset(&batch, 0, sizeof batch);
    batch.rows = n;
    batch.token = token;
    batch.outputs = outputs;
    memset(r->logits, 0xFF, outputs * (size_t)r->m->config.vocab_size * sizeof(float));
    demand(dsv3_forward(&r->ctx, r->logits, r->weights, r->caches, CACHES, &batch, &r->ws, &error), r->label, &error);
}

/* Rows of both sequences in one call: a prompt of one, a step or two of the other. Logits of some. */
static void run_mixed(run *r, size_t n) {
    int32_t token[MOST_ROWS], sequence[MOST_ROWS], output[3];
    dsv3_batch batch;
    dsv3_error error;
    size_t past = r->caches[0].length;
    for (size_t i = 0; i < n; i++) {
        token[i] = token_at(r->m, 1000 + 3 * i);
        sequence[i] = i % 3 == 1 || i > 12; /* their rows do not lie together */
    }
    output[0] = 0, output[1] = 1, output[2] = (int32_t)n - 1;
    memset(&batch, 0, sizeof batch);
    batch.rows = n;
    batch.token = token;
    batch.sequence = sequence;
    batch.outputs = 3;
    batch.output = output;
    memset(r->logits, 0xFF, 3 * (size_t)r->m->config.vocab_size * sizeof(float));
    demand(dsv3_forward(&r->ctx, r->logits, r->weights, r->caches, CACHES, &batch, &r->ws, &error), r->label, &error);
    run_print(r, "mixed", past, n, 3);
}

/* n rows through the main model and all modules. */
static void run_modules(run *r, size_t n) {
    size_t past = r->caches[0].length, d = (size_t)r->m->config.hidden_size;
    run_rows(r, past, n, 0);
    for (size_t k = 1; k <= (size_t)r->m->config.num_nextn_predict_layers; k++) {
        int32_t token[MOST_ROWS];
        dsv3_batch batch;
        dsv3_error error;
        char kind[16];
        for (size_t i = 0; i < n; i++) token[i] = token_at(r->m, past + i + k);
        memset(&batch, 0, sizeof batch);
        batch.rows = n;
        batch.token = token;
        batch.outputs = n;
        memcpy(r->hidden, r->ws.hidden, n * d * sizeof *r->hidden);
        memset(r->logits, 0xFF, n * (size_t)r->m->config.vocab_size * sizeof(float));
        dsv3_cache_truncate(&r->modules[CACHES * (k - 1)], 0);
        demand(dsv3_mtp_forward(&r->ctx, r->logits, r->weights, k, &r->modules[CACHES * (k - 1)], CACHES, &batch,
                                r->hidden, &r->ws, &error),
               r->label, &error);
        snprintf(kind, sizeof kind, "mtp%d", (int)k);
        run_print(r, kind, past, n, n);
    }
}

/* ---- Forward: calls of few and many rows behind a short past */

static void forward_case(const model *m, const backend *b, int fast, int pack, size_t threads, dsv3_type cache) {
    static const size_t all[] = {1, 2, 4, 5, 17, 96, 200}, some[] = {1, 5, 17}, fewer[] = {1, 5, 96};
    int light = is_reference(b) && m->which == LARGE;
    const size_t *rows = light ? some : quick ? fewer : all;
    size_t count = light || quick ? 3 : 7, past = m->which == LARGE ? 70 : 37;
    run r;
    run_open(&r, m, b, fast, pack, threads, MOST_ROWS, past + MOST_ROWS, cache);
    for (int form = 0; form < 2; form++) {
        r.ctx.attention = form ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED;
        dsv3_cache_truncate(&r.caches[0], 0);
        dsv3_cache_truncate(&r.caches[1], 0);
        run_rows(&r, 0, past, 1);
        run_print(&r, "prompt", 0, past, 1);
        for (size_t i = 0; i < count; i++) {
            dsv3_cache_truncate(&r.caches[0], past);
            run_rows(&r, past, rows[i], rows[i]);
            run_print(&r, "forward", past, rows[i], rows[i]);
        }
        dsv3_cache_truncate(&r.caches[0], past);
        run_mixed(&r, 15);
        dsv3_cache_truncate(&r.caches[0], past);
        run_modules(&r, light ? 5 : 33);
    }
    run_close(&r);
}

static void forward_model(model *m, const backend *b) {
    for (int pack = 0; pack < 2; pack++) {
        if (pack && !model_pack(m, b, 1)) continue;
        for (int fast = 0; fast < 2; fast++) {
            for (size_t threads = 1; threads <= THREADS; threads += THREADS - 1) {
                int both = !quick && (m->which != LARGE || threads == 1);
                if (both || !fast) forward_case(m, b, fast, pack, threads, DSV3_F32);
                if (both || fast) forward_case(m, b, fast, pack, threads, DSV3_BF16);
            }
        }
    }
}

/* ---- Long: a past of several segments and blocks of keys. It is read once and copied. */

#define LONG_PAST 733u

static void long_case(const model *m, const backend *b, const dsv3_cache *past, int fast, int pack, size_t threads) {
    static const size_t rows[] = {1, 4, 17};
    run r;
    run_open(&r, m, b, fast, pack, threads, 32, LONG_PAST + 32, past->type);
    for (int form = 0; form < 2; form++) {
        r.ctx.attention = form ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED;
        demand(dsv3_cache_copy(&r.caches[0], past), "copy", NULL);
        for (size_t i = 0; i < 3; i++) {
            if (form && i == 1) continue; /* both make keys and values of the whole past */
            dsv3_cache_truncate(&r.caches[0], LONG_PAST);
            run_rows(&r, LONG_PAST, rows[i], rows[i]);
            run_print(&r, "long", LONG_PAST, rows[i], rows[i]);
        }
        demand(dsv3_cache_copy(&r.caches[1], past), "copy", NULL);
        dsv3_cache_truncate(&r.caches[0], LONG_PAST);
        dsv3_cache_truncate(&r.caches[1], 300);
        run_mixed(&r, 7);
    }
    run_close(&r);
}

static void long_model(model *m, const backend *b) {
    static const dsv3_type types[2] = {DSV3_F32, DSV3_BF16};
    for (size_t i = 0; i < 2; i++) {
        run r;
        size_t at, n;
        int packs = !is_reference(b) && model_pack(m, b, THREADS);
        run_open(&r, m, b, 0, packs, 1, MOST_ROWS, LONG_PAST, types[i]);
        r.ctx.attention = DSV3_ATTENTION_EXPANDED;
        for (at = 0; at < LONG_PAST; at += n) {
            n = LONG_PAST - at < MOST_ROWS ? LONG_PAST - at : MOST_ROWS;
            run_rows(&r, at, n, 1);
        }
        run_print(&r, "past", at - n, n, 1);
        for (int pack = 0; pack <= packs; pack++) {
            for (int fast = 0; fast < 2; fast++) {
                long_case(m, b, &r.caches[0], fast, pack, 1);
                if (!is_reference(b)) long_case(m, b, &r.caches[0], fast, pack, THREADS);
            }
        }
        run_close(&r);
    }
}

/* ---- Evaluate and train: whole texts */

#define TEXT_ROWS 150u

typedef struct text {
    int32_t token[TEXT_ROWS], target[TEXT_ROWS], sequence[TEXT_ROWS], document[TEXT_ROWS];
    uint8_t mask[TEXT_ROWS];
    dsv3_text text;
} text;

/* Two sequences, of which the first has three documents; some padding. kind 1: targets are given. */
static void text_make(text *t, const model *m, int kind) {
    memset(t, 0, sizeof *t);
    for (size_t i = 0; i < TEXT_ROWS; i++) {
        t->token[i] = token_at(m, i + 5000 * (size_t)kind);
        t->target[i] = i % 11 == 4 ? DSV3_IGNORE : token_at(m, 3 * i);
        t->sequence[i] = i >= 101;
        t->document[i] = i < 20 ? 0 : i < 21 ? 1 : 2;
        t->mask[i] = i < 140;
    }
    t->text.rows = TEXT_ROWS;
    t->text.token = t->token;
    t->text.sequence = t->sequence;
    t->text.document = t->document;
    t->text.mask = t->mask;
    if (kind) t->text.target = t->target;
}

static void evaluate_case(const model *m, const backend *b, int fast, int pack, size_t threads) {
    size_t depths = (size_t)m->config.num_nextn_predict_layers, layers = (size_t)m->config.num_hidden_layers + depths;
    size_t E = (size_t)m->config.n_routed_experts;
    double nll[3] = {0}, balance[8] = {0}, total[2];
    uint64_t targets[3] = {0}, load[8 * 64] = {0}, h = 1;
    dsv3_losses losses;
    dsv3_error error;
    run r;
    text t;
    memset(&losses, 0, sizeof losses);
    losses.depths = depths;
    losses.nll = nll;
    losses.targets = targets;
    losses.load = load;
    losses.balance = balance;
    run_open(&r, m, b, fast, pack, threads, MOST_ROWS, TEXT_ROWS, DSV3_F32);
    for (int kind = 0; kind < 2; kind++) {
        text_make(&t, m, kind);
        losses.actual = kind;
        r.ctx.attention = kind ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED;
        demand(dsv3_evaluate(&r.ctx, &losses, r.weights, r.caches, r.modules, CACHES, &t.text, &r.ws, &error),
               r.label, &error);
    }
    h = hash(h, load, layers * E * sizeof *load);
    h = hash(h, targets, (1 + depths) * sizeof *targets);
    h = hash(h, balance, layers * sizeof *balance);
    total[0] = dsv3_losses_total(&losses, layers, 0.3, 0.01, DSV3_DIVIDE_BY_MAIN);
    total[1] = dsv3_losses_total(&losses, layers, 0.3, 0.01, DSV3_DIVIDE_BY_VALID);
    h = hash(h, total, sizeof total);
    printf("evaluate %s nll=%016llx other=%016llx\n", r.label,
           (unsigned long long)hash(1, nll, (1 + depths) * sizeof *nll), (unsigned long long)h);
    run_close(&r);
}

static void evaluate_model(model *m, const backend *b) {
    for (int pack = 0; pack < 2; pack++) {
        if (pack && !model_pack(m, b, 1)) continue;
        for (int fast = 0; fast < 2; fast++) {
            evaluate_case(m, b, fast, pack, 1);
            evaluate_case(m, b, fast, pack, THREADS);
        }
    }
}

/* Two steps of two micro-batches. */
static void train_case(const model *m, const backend *b, int32_t keep, size_t threads) {
    static const char *const exempt[] = {"*.q_a_proj.*", NULL};
    dsv3_context ctx = context_make(b, threads, 0);
    dsv3_training s = dsv3_training_default();
    dsv3_trainer t;
    dsv3_error error;
    text texts[2];
    size_t bytes;
    void *memory;
    ctx.attention = DSV3_ATTENTION_EXPANDED;
    s.rows = TEXT_ROWS;
    s.sequences = CACHES;
    s.longest = TEXT_ROWS;
    s.keep = keep;
    s.balance.expert = 0.01;
    s.exempt = exempt;
#ifndef BITS_CORE
    s.ema = 1;
#endif
    if (m->which == V2) {
        s.balance.device = 0.05;
        s.balance.communication = 0.02;
        s.balance.devices = 3;
        s.balance.most_devices = 2;
        s.balance.actual = 1;
        s.divisor = DSV3_DIVIDE_BY_VALID;
        s.clip = 0.0f;
    }
    demand(dsv3_trainer_size(&m->config, &s, threads, &bytes), "trainer", NULL);
    memory = get(bytes);
    demand(dsv3_trainer_init(&t, &m->config, &s, threads, memory, bytes), "trainer", NULL);
    demand(dsv3_parameters_load(&t.weights, &m->bound[0]), "load", NULL);
    for (int step = 0; step < 2; step++) {
        uint64_t targets[3] = {0}, sequences = 0, gradients;
        double loss, norm;
        for (int i = 0; i < 2; i++) {
            text_make(&texts[i], m, i);
            dsv3_text_count(&texts[i].text, (size_t)m->config.num_nextn_predict_layers, targets, &sequences);
        }
        demand(dsv3_train_begin(&t, targets, sequences), "begin", NULL);
        for (int i = 0; i < 2; i++) {
            demand(dsv3_train_accumulate(&ctx, &t, &texts[i].text, &error), "accumulate", &error);
        }
        gradients = hash_floats(1, t.gradients.data, t.gradients.count);
        loss = dsv3_train_loss(&t);
        demand(dsv3_train_end(&ctx, &t, 0.001, &norm, &error), "end", &error);
        printf("train backend=%s model=%s keep=%d threads=%d step=%d loss=%016llx gradients=%016llx norm=%016llx "
               "weights=%016llx\n",
               b->name, m->name, (int)keep, (int)threads, step, (unsigned long long)hash(1, &loss, sizeof loss),
               (unsigned long long)gradients, (unsigned long long)hash(1, &norm, sizeof norm),
               (unsigned long long)hash_floats(1, t.weights.data, t.weights.count));
    }
#ifndef BITS_CORE
    printf("ema backend=%s model=%s keep=%d threads=%d ema=%016llx\n", b->name, m->name, (int)keep, (int)threads,
           (unsigned long long)hash_floats(1, t.ema, t.weights.count));
#endif
    free(memory);
}

static void train_model(const model *m, const backend *b) {
    int light = quick || m->which == LARGE;
    if (m->which == SMALL && !quick) train_case(m, b, DSV3_KEEP_UP_PROJECTIONS, 1);
    for (size_t threads = 1; threads <= THREADS; threads += THREADS - 1) {
        if (!light || threads == 1) train_case(m, b, 0, threads);
        if (!light || threads > 1)
            train_case(m, b, DSV3_KEEP_NORMS | DSV3_KEEP_UP_PROJECTIONS | DSV3_KEEP_SWIGLU, threads);
    }
}

/* ---- Single ops */

/* Linear, its backward, cross-entropy, its backward and the embedding with one matrix. */
static void ops_matrix(const char *label, const backend *b, const dsv3_tensor *w, int pack) {
    static const size_t counts[] = {1, 2, 3, 4, 5, 6, 7, 9, 17, 96, 101, 200, 400};
    size_t rows = w->rows, cols = w->cols, most = 400;
    float *x, *y, *dx, *dw, *nll;
    int32_t *target = (int32_t *)get(most * sizeof *target), *token = (int32_t *)get(most * sizeof *token);
    seed = 11;
    x = random_floats(most * cols, -1.5f, 1.5f);
    y = get_floats(most * rows);
    dx = get_floats(most * cols);
    dw = get_floats(rows * cols);
    nll = get_floats(most);
    for (size_t i = 0; i < most; i++) {
        token[i] = (int32_t)(next() % rows);
        target[i] = i % 7 == 5 ? DSV3_IGNORE : token[i];
    }
    for (int fast = 0; fast < 2; fast++) {
        for (size_t threads = 1; threads <= THREADS; threads += THREADS - 1) {
            dsv3_context ctx = context_make(b, threads, fast);
            char what[200];
            snprintf(what, sizeof what, "backend=%s %s type=%s mode=%s pack=%d threads=%d", b->name, label,
                     dsv3_type_name(w->type), mode_name(fast), pack, (int)threads);
            for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
                size_t n = counts[i];
                float *scratch;
                if ((is_reference(b) || quick) && n > 17) continue;
                scratch = get_floats(dsv3_linear_scratch(&ctx, n, cols));
                memset(y, 0xFF, n * rows * sizeof *y);
                dsv3_linear(&ctx, y, x, w, n, scratch);
                printf("linear %s rows=%d y=%016llx\n", what, (int)n,
                       (unsigned long long)hash_floats(1, y, n * rows));
                free(scratch);
            }
            for (size_t n = 1; n <= (is_reference(b) || quick ? 17 : 101); n += n == 1 ? 16 : 84) {
                float *scratch = get_floats(dsv3_cross_entropy_scratch(&ctx, w, n));
                uint64_t du, dhead;
                dsv3_cross_entropy(&ctx, nll, x, w, target, n, scratch);
                memset(dx, 0, n * cols * sizeof *dx), memset(dw, 0, rows * cols * sizeof *dw);
                dsv3_cross_entropy_backward(&ctx, dx, dw, 0.7f, x, w, target, n, scratch);
                du = hash_floats(1, dx, n * cols), dhead = hash_floats(1, dw, rows * cols);
                printf("cross_entropy %s rows=%d nll=%016llx du=%016llx dhead=%016llx\n", what, (int)n,
                       (unsigned long long)hash_floats(1, nll, n), (unsigned long long)du, (unsigned long long)dhead);
                free(scratch);
            }
            if (fast) continue; /* there is one way only */
            for (size_t n = 1; n <= (is_reference(b) || quick ? 17 : 101); n += n == 1 ? 16 : 84) {
                float *scratch = get_floats(dsv3_linear_scratch(&ctx, n, cols));
                uint64_t dxs, dws;
                seed = 13;
                fill(y, n * rows, -1.0f, 1.0f);
                fill(dx, n * cols, -1.0f, 1.0f);
                fill(dw, rows * cols, -1.0f, 1.0f);
                dsv3_linear_backward(&ctx, dx, dw, y, x, w, n, scratch);
                dxs = hash_floats(1, dx, n * cols), dws = hash_floats(1, dw, rows * cols);
                printf("linear_backward %s rows=%d dx=%016llx dw=%016llx\n", what, (int)n, (unsigned long long)dxs,
                       (unsigned long long)dws);
                free(scratch);
            }
            memset(dx, 0xFF, most * cols * sizeof *dx);
            dsv3_embed(&ctx, dx, token, w, 40);
            printf("embed %s x=%016llx\n", what, (unsigned long long)hash_floats(1, dx, 40 * cols));
        }
    }
    free(x), free(y), free(dx), free(dw), free(nll), free(target), free(token);
}

/* A matrix of its own, at an address that is aligned to nothing. */
static void ops_loose(const backend *b, dsv3_type type, size_t rows, size_t cols) {
    dsv3_tensor w;
    float *value;
    unsigned char *data;
    char label[64];
    memset(&w, 0, sizeof w);
    seed = rows + cols;
    value = random_floats(rows * cols, -0.5f, 0.5f);
    data = (unsigned char *)get(rows * dsv3_row_bytes(type, cols) + 1);
    w.data = data + 1;
    w.rows = rows;
    w.cols = cols;
    w.type = type;
    w.rank = 2;
    if (type == DSV3_F8_E4M3) w.scale = get_floats(blocks_of(rows) * blocks_of(cols));
    demand(dsv3_quantize(data + 1, (void *)(uintptr_t)w.scale, value, type, rows, cols), "quantize", NULL);
    snprintf(label, sizeof label, "model=%dx%d", (int)rows, (int)cols);
    ops_matrix(label, b, &w, 0);
    free(value), free(data), free((void *)(uintptr_t)w.scale);
}

static void ops_norms(const backend *b) {
    static const size_t widths[] = {1, 7, 16, 67, 149, 512, 1184}, counts[] = {1, 5, 300};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        for (int type = DSV3_F32; type <= DSV3_BF16; type++) {
            for (size_t j = 0; j < 3; j++) {
                for (size_t threads = 1; threads <= THREADS; threads += THREADS - 1) {
                    dsv3_context ctx = context_make(b, threads, 0);
                    size_t d = widths[i], n = counts[j];
                    dsv3_tensor g;
                    float *x, *y, *dx, *dg, *value, *scratch = get_floats(n);
                    void *data = get(d * 4);
                    seed = 17;
                    x = random_floats(n * d, -2.0f, 2.0f), y = random_floats(n * d, -1.0f, 1.0f);
                    dx = random_floats(n * d, -1.0f, 1.0f), dg = random_floats(d, -1.0f, 1.0f);
                    value = random_floats(d, 0.5f, 1.5f);
                    memset(&g, 0, sizeof g);
                    g.data = data, g.rows = 1, g.cols = d, g.type = (dsv3_type)type, g.rank = 1;
                    demand(dsv3_quantize(data, NULL, value, g.type, 1, d), "quantize", NULL);
                    dsv3_rmsnorm_backward(&ctx, dx, dg, y, x, &g, n, d, 1e-6f, scratch);
                    dsv3_rmsnorm(&ctx, y, x, &g, n, d, 1e-6f);
                    printf("rmsnorm backend=%s type=%s cols=%d rows=%d threads=%d y=%016llx dx=%016llx dg=%016llx\n",
                           b->name, dsv3_type_name(g.type), (int)d, (int)n, (int)threads,
                           (unsigned long long)hash_floats(1, y, n * d),
                           (unsigned long long)hash_floats(1, dx, n * d), (unsigned long long)hash_floats(1, dg, d));
                    free(x), free(y), free(dx), free(dg), free(value), free(scratch), free(data);
                }
            }
        }
    }
}

static void ops_router(const backend *b) {
    static const size_t counts[] = {1, 4, 5, 130};
    size_t E = 70, d = 192, n = 130;
    float *x, *bias, *value, *score = get_floats(n * E);
    dsv3_config c = config_make(SMALL);
    seed = 19;
    x = random_floats(n * d, -1.5f, 1.5f), bias = random_floats(E, -0.1f, 0.1f),
    value = random_floats(E * d, -0.2f, 0.2f);
    for (size_t i = 0; i < d; i++) x[3 * d + i] *= 60.0f; /* scores close to 0 and 1 */
    c.n_routed_experts = (int32_t)E;
    for (int type = 0; type < DSV3_TYPES; type++) {
        float scale[2], *scratch;
        void *data = get(E * d * 4);
        dsv3_tensor w;
        memset(&w, 0, sizeof w);
        w.data = data, w.rows = E, w.cols = d, w.type = (dsv3_type)type, w.rank = 2;
        if (type == DSV3_F8_E4M3) w.scale = scale;
        demand(dsv3_quantize(data, scale, value, w.type, E, d), "quantize", NULL);
        for (int fast = 0; fast < 2; fast++) {
            for (size_t threads = 1; threads <= THREADS; threads += THREADS - 1) {
                dsv3_context ctx = context_make(b, threads, fast);
                for (size_t i = 0; i < 8; i++) {
                    size_t rows = counts[i / 2];
                    c.scoring_func = i % 2 ? DSV3_SOFTMAX : DSV3_SIGMOID;
                    c.n_routed_experts = (int32_t)E, c.n_group = c.topk_group = c.num_experts_per_tok = 1;
                    scratch = get_floats(dsv3_linear_scratch(&ctx, rows, d));
                    memset(score, 0xFF, rows * E * sizeof *score);
                    dsv3_router_scores(&ctx, &c, score, x, &w, i % 2 ? NULL : bias, rows, scratch);
                    printf("router backend=%s type=%s mode=%s scoring=%s rows=%d threads=%d score=%016llx\n", b->name,
                           dsv3_type_name(w.type), mode_name(fast), i % 2 ? "softmax" : "sigmoid", (int)rows,
                           (int)threads, (unsigned long long)hash_floats(1, score, rows * E));
                    free(scratch);
                }
            }
        }
        free(data);
    }
    free(x), free(bias), free(value), free(score);
}

/* All codes of a type, decoded. */
static void ops_codes(const backend *b, dsv3_type type) {
    dsv3_context ctx = context_make(b, 1, 0);
    size_t rows = type == DSV3_F8_E4M3 ? 2 : 512, cols = 128;
    unsigned char *codes = (unsigned char *)get(rows * cols * 2);
    int32_t *token = (int32_t *)get(rows * sizeof *token);
    float *x = get_floats(rows * cols);
    dsv3_tensor w;
    for (size_t i = 0; i < rows; i++) token[i] = (int32_t)i;
    for (size_t i = 0; i < rows * cols; i++) {
        uint16_t code = (uint16_t)i;
        if (type == DSV3_F8_E4M3) codes[i] = (unsigned char)i;
        if (type != DSV3_F8_E4M3) memcpy(codes + 2 * i, &code, 2);
    }
    memset(&w, 0, sizeof w);
    w.data = codes, w.rows = rows, w.cols = cols, w.type = type, w.rank = 2;
    dsv3_embed(&ctx, x, token, &w, rows);
    printf("codes backend=%s type=%s x=%016llx\n", b->name, dsv3_type_name(type),
           (unsigned long long)hash_floats(1, x, rows * cols));
    free(codes), free(token), free(x);
}

/* Rows of unusual numbers meet weights of which some are unusual, too. */
static void ops_unusual(const backend *b, dsv3_type type) {
    enum { ROWS = 111, COLS = 96, N = 9 };
    static const float unusual[N] = {0.0f, -0.0f, 1e-38f, 3e38f, 1e-31f, 1.0f, 1e-42f, 127.0f, 1.0f};
    static const uint16_t codes[4] = {0x0001, 0x7C01, 0xFF80, 0x8000};
    float *x = get_floats(N * COLS), *y = get_floats(N * ROWS), *value, scale[1];
    unsigned char *data = (unsigned char *)get(ROWS * COLS * 4);
    dsv3_tensor w;
    seed = 23;
    value = random_floats(ROWS * COLS, -1.0f, 1.0f);
    for (size_t i = 0; i < N * COLS; i++) x[i] = unusual[i / COLS] * (i / COLS == 7 ? 1.0f : uniform(-1.0f, 1.0f));
    for (size_t i = 1; i < 32; i++) x[7 * COLS + i] = (float)i - 0.5f; /* between two codes */
    x[5 * COLS + 40] = INFINITY;
    x[6 * COLS + 77] = NAN;
    memset(&w, 0, sizeof w);
    w.data = data, w.rows = ROWS, w.cols = COLS, w.type = type, w.rank = 2;
    if (type == DSV3_F8_E4M3) w.scale = scale;
    demand(dsv3_quantize(data, scale, value, type, ROWS, COLS), "quantize", NULL);
    for (int bad = 0; bad < 2; bad++) {
        for (int fast = 0; fast < 2; fast++) {
            dsv3_context ctx = context_make(b, 1, fast);
            float *scratch = get_floats(dsv3_linear_scratch(&ctx, N, COLS));
            dsv3_linear(&ctx, y, x, &w, N, scratch);
            for (size_t i = 0; i < N; i++) {
                printf("unusual backend=%s type=%s mode=%s weights=%d row=%d y=%016llx\n", b->name,
                       dsv3_type_name(type), mode_name(fast), bad, (int)i,
                       (unsigned long long)hash_floats(1, y + i * ROWS, ROWS));
            }
            dsv3_linear(&ctx, y, x + 5 * COLS, &w, 3, scratch);
            printf("unusual backend=%s type=%s mode=%s weights=%d row=5-7 y=%016llx\n", b->name, dsv3_type_name(type),
                   mode_name(fast), bad, (unsigned long long)hash_floats(1, y, 3 * ROWS));
            free(scratch);
        }
        for (size_t i = 0; i < 4; i++) { /* of a number each: subnormal, NaN or infinite, -0 */
            if (type == DSV3_F16 || type == DSV3_BF16) memcpy(data + 2 * (i * 2000 + 5), &codes[i], 2);
            if (type == DSV3_F8_E4M3) data[i * 2000 + 5] = (unsigned char)(i == 1 ? 0x7F : codes[i] >> 8);
        }
    }
    free(x), free(y), free(value), free(data);
}

static void ops_backend(const backend *b) {
    static const size_t loose[][2] = {{67, 149}, {1, 33}, {16, 3}, {200, 130}, {130, 257}, {48, 64}, {111, 96}};
    ops_norms(b);
    ops_router(b);
    for (int type = DSV3_F16; type <= DSV3_F8_E4M3; type++) ops_codes(b, (dsv3_type)type);
    for (int type = 0; type < DSV3_TYPES; type++) ops_unusual(b, (dsv3_type)type);
    for (size_t i = 0; i < sizeof loose / sizeof *loose; i++) {
        for (int type = DSV3_F32; type <= DSV3_F8_E4M3; type++)
            ops_loose(b, (dsv3_type)type, loose[i][0], loose[i][1]);
    }
}

static void ops_model(model *m, const backend *b) {
    char label[64];
    snprintf(label, sizeof label, "model=%s", m->name);
    ops_matrix(label, b, &m->bound[0].lm_head, 0);
    if (model_pack(m, b, THREADS)) ops_matrix(label, b, &m->bound[1].lm_head, 1);
}

/* ---- Plain arrays: what no backend changes */

static void plain_print(const char *what, uint64_t h) {
    printf("plain backend=any op=%s value=%016llx\n", what, (unsigned long long)h);
}

static void plain_numbers(void) {
    uint64_t h = 1;
    for (uint32_t i = 0; i < 65536; i++) {
        float x[3];
        x[0] = dsv3_f32_from_f16((uint16_t)i), x[1] = dsv3_f32_from_bf16((uint16_t)i);
        x[2] = dsv3_f32_from_f8_e4m3((uint8_t)i);
        h = hash_floats(h, x, 3);
    }
    plain_print("decode", h);
    seed = 29, h = 1;
    for (size_t i = 0; i < 200000; i++) {
        uint32_t bits = (uint32_t)next();
        uint16_t code[3];
        float x;
        if (i % 2)
            bits = (bits & 0x8FFFF000u) | 0x38000000u; /* in the range of all types, and often between two codes */
        memcpy(&x, &bits, sizeof x);
        code[0] = dsv3_f16_from_f32(x), code[1] = dsv3_bf16_from_f32(x), code[2] = dsv3_f8_e4m3_from_f32(x);
        if (x == x) h = hash(h, code, sizeof code);
    }
    plain_print("encode", h);
}

static void plain_router(void) {
    enum { N = 60, E = 24, K = 5, G = 6 };
    static const char *const names[3] = {"noaux_tc", "group_limited", "greedy"};
    float score[N * E], bias[E], alpha[E], gate[N * K], scratch[E + G], dgate[N * K], dscore[N * E];
    double two[2 * E], losses[3];
    int32_t idx[N * K];
    uint8_t mask[N];
    dsv3_config c = config_make(SMALL);
    dsv3_balance_weights weights;
    seed = 31;
    fill(score, N * E, 0.01f, 0.99f), fill(bias, E, -0.2f, 0.2f), fill(alpha, E, 0.5f, 1.5f),
        fill(dgate, N * K, -1, 1);
    for (size_t i = 0; i < 4; i++) score[E + 3 * i] = 0.5f; /* ties */
    for (size_t i = 0; i < N; i++) mask[i] = i % 9 != 4;
    c.n_routed_experts = E, c.num_experts_per_tok = K, c.n_group = G, c.topk_group = 3;
    for (int kind = 0; kind < 24; kind++) {
        char what[80];
        uint64_t h = 1;
        c.topk_method = (dsv3_topk_method)(kind % 3);
        c.norm_topk_prob = kind / 3 % 2;
        c.gate_scaling = kind / 6 % 2 ? DSV3_SCALE_ALWAYS : DSV3_SCALE_UNLESS_NORMED;
        c.bias_form = kind / 12 ? DSV3_BIAS_ADD : DSV3_BIAS_MULTIPLY;
        c.group_mask = kind / 12 ? DSV3_MASK_ZERO : DSV3_MASK_NEG_INF;
        c.scoring_func = kind / 6 % 2 ? DSV3_SOFTMAX : DSV3_SIGMOID;
        demand(dsv3_router_select(&c, idx, gate, score, bias, kind / 12 ? alpha : NULL, N, scratch), "select", NULL);
        h = hash_floats(hash(h, idx, sizeof idx), gate, N * K);
        demand(dsv3_router_weights(&c, gate, idx, score, N), "weights", NULL);
        h = hash_floats(h, gate, N * K);
        fill(dscore, N * E, -0.1f, 0.1f);
        dsv3_router_weights_backward(&c, dscore, dgate, idx, score, N);
        h = hash_floats(h, dscore, N * E);
        weights.expert = 0.01, weights.device = 0.05, weights.communication = 0.02;
        weights.devices = 4, weights.most_devices = 2, weights.actual = kind % 2;
        dsv3_balance_backward(dscore, 0.25, &weights, score, idx, mask, N, E, K, two);
        dsv3_router_scores_backward(&c, dscore, dscore, score, N);
        h = hash_floats(h, dscore, N * E);
        losses[0] = dsv3_balance_loss(score, kind % 2 ? idx : NULL, mask, N, E, K, two);
        losses[1] = dsv3_device_loss(score, kind % 2 ? idx : NULL, NULL, N, E, K, 4, two);
        losses[2] = dsv3_communication_loss(score, idx, mask, N, E, K, 4, 2, two);
        h = hash(h, losses, sizeof losses);
        snprintf(what, sizeof what, "router_%s_%d", names[kind % 3], kind);
        plain_print(what, h);
    }
}

static void plain_balance(void) {
    enum { E = 24 };
    uint64_t load[E];
    float bias[E];
    dsv3_load_stats stats;
    double numbers[5];
    seed = 37;
    for (int rule = 0; rule < 4; rule++) {
        char what[40];
        uint64_t h = 1;
        fill(bias, E, -0.2f, 0.2f);
        for (int step = 0; step < 5; step++) {
            for (size_t e = 0; e < E; e++) load[e] = next() % 40 * (next() % 3);
            dsv3_bias_step(bias, load, E, (dsv3_bias_rule)rule, 0.013);
            h = hash_floats(h, bias, E);
        }
        stats = dsv3_load_statistics(load, E);
        numbers[0] = stats.mean, numbers[1] = stats.max_vio, numbers[2] = stats.min_load, numbers[3] = stats.entropy;
        numbers[4] = (double)stats.dead;
        h = hash(h, numbers, sizeof numbers);
        snprintf(what, sizeof what, "bias_step_%d", rule);
        plain_print(what, h);
    }
}

static void plain_rope(void) {
    for (int which = SMALL; which <= LARGE; which++) {
        static const int32_t position[5] = {0, 1, 777, 65535, 16777215};
        dsv3_config c = config_make(which);
        size_t dr = (size_t)c.qk_rope_head_dim;
        double theta[64];
        uint64_t turns[64], h = 1;
        float table[5 * 64], x[64], numbers[2];
        char what[40];
        seed = 41;
        dsv3_rope_frequencies(&c, theta);
        dsv3_rope_turns(&c, turns);
        numbers[0] = dsv3_rope_factor(&c), numbers[1] = dsv3_softmax_scale(&c);
        dsv3_rope_table(table, position, turns, numbers[0], 5, dr);
        h = hash(hash(h, theta, dr / 2 * sizeof *theta), turns, dr / 2 * sizeof *turns);
        h = hash_floats(hash_floats(h, numbers, 2), table, 5 * dr);
        for (int i = 0; i < 2; i++) {
            fill(x, dr, -1.0f, 1.0f);
            dsv3_rope_rotate(x, table + 2 * dr, dr, i);
            h = hash_floats(h, x, dr);
            dsv3_rope_rotate_backward(x, table + 3 * dr, dr, i);
            h = hash_floats(h, x, dr);
        }
        snprintf(what, sizeof what, "rope_%s", model_names[which]);
        plain_print(what, h);
    }
}

static void plain_sample(void) {
    enum { V = 1500 };
    float *logits = random_floats(V, -9.0f, 9.0f), number;
    dsv3_candidate *candidates = (dsv3_candidate *)get(V * sizeof *candidates);
    dsv3_rng rng;
    uint64_t h = 1;
    rng.state = 43;
    for (int i = 0; i < 300; i++) {
        int32_t token;
        demand(dsv3_sample(&token, logits, V, 0.4f * (float)(i % 4), 0.25f * (float)(i % 5), &rng, candidates),
               "sample", NULL);
        h = hash(h, &token, sizeof token);
    }
    number = dsv3_random_uniform(&rng);
    h = hash_floats(h, &number, 1);
    plain_print("sample", h);
    number = dsv3_log_sum_exp(logits, V);
    plain_print("log_sum_exp", hash_floats(1, &number, 1));
    free(logits), free(candidates);
}

static void plain_train(void) {
    static const dsv3_schedule schedule = {2.2e-4, 2.2e-5, 7.3e-6, 20, 50, 90, 110};
    enum { N = 50, V = 30, D = 70 };
    float dw[V * D], dx[N * D];
    int32_t token[N];
    uint64_t h = 1;
    for (uint64_t step = 0; step < 130; step++) {
        double rate = dsv3_learning_rate(&schedule, step);
        h = hash(h, &rate, sizeof rate);
    }
    plain_print("learning_rate", h);
    seed = 47;
    fill(dw, V * D, -1.0f, 1.0f), fill(dx, N * D, -1.0f, 1.0f);
    for (size_t i = 0; i < N; i++) token[i] = (int32_t)(next() % V);
    dsv3_embed_backward(dw, dx, token, N, D);
    plain_print("embed_backward", hash_floats(1, dw, V * D));
}

#ifndef BITS_CORE
/* ---- Blocks: attention where a row that comes later is not finite, and an MLP with large numbers. These cases use
 * more of the structs than the others do; BITS_CORE leaves them out. */

static void blocks_case(const model *m, const backend *b, int fast, int pack, dsv3_type cache) {
    enum { N = 40 };
    static const float factors[3] = {1.0f, 30.0f, 3000.0f};
    size_t d = (size_t)m->config.hidden_size, L = (size_t)m->config.num_hidden_layers;
    float *u, *y = get_floats(N * d);
    int32_t token[N] = {0};
    dsv3_batch batch;
    dsv3_error error;
    run r;
    seed = 53;
    u = random_floats(N * d, -1.5f, 1.5f);
    memset(&batch, 0, sizeof batch);
    batch.rows = N;
    batch.token = token;
    run_open(&r, m, b, fast, pack, 1, N, N, cache);
    for (int form = 0; form < 2; form++) {
        r.ctx.attention = form ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED;
        for (int bad = 0; bad < 2; bad++) {
            float before = u[25 * d + 1];
            if (bad) u[25 * d + 1] = INFINITY;
            demand(dsv3_batch_begin(&r.ctx, r.weights, r.caches, CACHES, &batch, &r.ws, &error), "begin", &error);
            dsv3_mla_forward(&r.ctx, y, u, r.weights, &r.weights->layers[0], 0, r.caches, N, &r.ws);
            printf("mla %s form=%d bad=%d rows=%016llx more=%016llx\n", r.label, form, bad,
                   (unsigned long long)hash_floats(1, y, 25 * d),
                   (unsigned long long)hash_floats(1, y + 25 * d, (N - 25) * d));
            u[25 * d + 1] = before;
        }
    }
    for (size_t layer = 0; layer < L; layer++) {
        for (int i = 0; i < 3; i++) {
            for (size_t j = 0; j < N * d; j++) u[j] *= factors[i];
            demand(dsv3_ffn_forward(&r.ctx, y, u, r.weights, &r.weights->layers[layer], N, &r.ws), "ffn", NULL);
            printf("ffn %s layer=%d factor=%d y=%016llx\n", r.label, (int)layer, (int)factors[i],
                   (unsigned long long)hash_floats(1, y, N * d));
            for (size_t j = 0; j < N * d; j++) u[j] /= factors[i];
        }
    }
    run_close(&r);
    free(u), free(y);
}

/* A greedy and a random text, with drafts and without. */
static void generate_case(const model *m, const backend *b, int fast, size_t threads, size_t drafts) {
    const dsv3_model *weights = &m->bound[0];
    dsv3_context ctx = context_make(b, threads, fast);
    dsv3_sequence sequences[2], *list[2];
    dsv3_workspace ws;
    dsv3_error error;
    void *memory[3];
    size_t bytes, V = (size_t)m->config.vocab_size;
    float *logits = get_floats(2 * (drafts + 1) * V);
    int32_t prompt[40];
    uint64_t h = 1;
    for (size_t i = 0; i < 40; i++) prompt[i] = token_at(m, i);
    demand(dsv3_workspace_size(&m->config, 32, threads, &bytes), "workspace", NULL);
    memory[2] = get(bytes);
    demand(dsv3_workspace_init(&ws, &m->config, 32, threads, memory[2], bytes), "workspace", NULL);
    for (size_t i = 0; i < 2; i++) {
        demand(dsv3_sequence_size(weights, 90, DSV3_BF16, 16, drafts, &bytes), "sequence", NULL);
        memory[i] = get(bytes);
        demand(dsv3_sequence_init(&sequences[i], weights, 90, DSV3_BF16, 16, drafts, memory[i], bytes), "sequence",
               NULL);
        sequences[i].temperature = i ? 0.9f : 0.0f;
        sequences[i].top_p = 0.95f;
        demand(dsv3_sequence_append(&sequences[i], weights, prompt, i ? 40 : 23), "append", NULL);
        list[i] = &sequences[i];
    }
    for (int step = 0; step < 12; step++) {
        demand(dsv3_generate(&ctx, logits, weights, list, 2, &ws, &error), "generate", &error);
        for (size_t i = 0; i < 2; i++) h = hash(h, sequences[i].token, sequences[i].n_token * sizeof(int32_t));
    }
    printf("generate backend=%s model=%s type=%s mode=%s drafts=%d threads=%d tokens=%016llx\n", b->name, m->name,
           type_name(m->type), mode_name(fast), (int)drafts, (int)threads, (unsigned long long)h);
    for (size_t i = 0; i < 3; i++) free(memory[i]);
    free(logits);
}

static void blocks_model(model *m, const backend *b) {
    for (int fast = 0; fast < 2; fast++) {
        blocks_case(m, b, fast, 0, DSV3_F32);
        blocks_case(m, b, fast, 0, DSV3_BF16);
        if (m->which != SMALL) continue;
        generate_case(m, b, fast, 1, 0);
        generate_case(m, b, fast, THREADS, 3);
    }
    if (model_pack(m, b, 1)) blocks_case(m, b, 1, 1, DSV3_BF16);
}

static void plain_random(void) {
    dsv3_config c = config_make(SMALL);
    dsv3_parameters p;
    dsv3_rng rng;
    size_t bytes;
    void *memory;
    rng.state = 59;
    demand(dsv3_parameters_size(&c, &bytes), "parameters", NULL);
    memory = get(bytes);
    demand(dsv3_parameters_init(&p, &c, memory, bytes), "parameters", NULL);
    dsv3_parameters_random(&p, &rng, 0.1f);
    plain_print("parameters", hash_floats(1, p.data, p.count));
    free(memory);
}
#endif

static void plain(void) {
    plain_numbers();
    plain_router();
    plain_balance();
    plain_rope();
    plain_sample();
    plain_train();
#ifndef BITS_CORE
    plain_random();
#endif
}

/* ---- All of it */

static void report_time(const char *what, const char *which, const backend *b, clock_t since) {
    if (getenv("BITS_TIMES") == NULL) return;
    fprintf(stderr, "%s %s %s: %.1f s\n", what, which, b->name, (double)(clock() - since) / CLOCKS_PER_SEC);
}

static void model_cases(model *m, const backend *b) {
    clock_t since = clock();
    char which[64];
    snprintf(which, sizeof which, "%s %s", m->name, type_name(m->type));
    if (m->which != V2 && m->which != LARGE && m->type != MIXED && wanted("ops")) {
        ops_model(m, b), report_time("ops", which, b, since), since = clock();
    }
    if (m->which == WIDE || m->which == TALL) return;
#ifndef BITS_CORE
    if (m->which != LARGE && wanted("blocks"))
        blocks_model(m, b), report_time("blocks", which, b, since), since = clock();
#endif
    if (wanted("forward")) forward_model(m, b), report_time("forward", which, b, since), since = clock();
    if (wanted("evaluate")) evaluate_model(m, b), report_time("evaluate", which, b, since), since = clock();
    if (m->which == LARGE && wanted("long") && (!is_reference(b) || m->type == DSV3_BF16)) {
        long_model(m, b), report_time("long", which, b, since), since = clock();
    }
    if (m->type == DSV3_F32 && wanted("train")) train_model(m, b), report_time("train", which, b, since);
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0) {
            quick = 1;
        } else if (strcmp(argv[i], "--backend") == 0 && i + 1 < argc) {
            only_backend = argv[++i];
        } else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only_kind = argv[++i];
        } else {
            fprintf(stderr,
                    "usage: bits [--backend NAME] [--only plain|ops|blocks|forward|long|evaluate|train] [--quick]\n");
            return 2;
        }
    }
    find_backends();
    if (wanted("plain")) plain();
    for (size_t i = 0; i < n_backends && wanted("ops"); i++) {
        clock_t since = clock();
        ops_backend(&backends[i]);
        report_time("ops", "loose", &backends[i], since);
    }
    for (int which = 0; which < MODELS; which++) {
        model *m;
        if (quick && which != SMALL) continue;
        m = model_make(which);
        for (int type = 0; type <= MIXED; type++) {
            if (!model_has_type(m, type) || (quick && type == MIXED)) continue;
            model_encode(m, type);
            for (size_t i = 0; i < n_backends; i++) model_cases(m, &backends[i]);
        }
        model_free(m);
    }
    return 0;
}
