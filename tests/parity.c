/* parity.c -- is dsv3.h equal to the official model?
 *
 *     build/parity DIR [--dump OUT.safetensors] [--backend NAME] [--threads N] [--trajectory] [--packed] [--fast]
 *
 * DIR holds a checkpoint (config.json, model.safetensors) and golden.safetensors: what independent programs
 * computed from it. Everything this version of the library computes is computed again on the golden tokens,
 * once in each attention form, and compared. For each kind of tensor one line shows the worst error relative to
 * the largest magnitude of its tensor, beside its bound; integers must be equal. Exit status 1 beyond a bound.
 *
 * --trajectory replays DIR/traj.safetensors instead: optimizer steps from the checkpoint's weights, with the settings of
 * its metadata. Losses must agree to 1e-5 at every step, the gradients' norm to 1e-4, the final weights to 5e-3 of their
 * largest magnitude, and loads exactly.
 *
 * --packed: with weights as dsv3_pack orders them; the bounds are the same.
 *
 * --fast: with rounded activations (DSV3_FAST). What is measured is shown. Where two experts are about equally good,
 * rounding decides, and models with random weights are full of that: single numbers have no bound. Losses have 1e-3 (the
 * golden models show up to 7.6e-4) and, because a token that another expert has seen is predicted otherwise, 1e-3 more for
 * each choice that differs in the layer where most do, up to 1e-2 (shown: 5.1e-3, where 7 of 160 differ); choices, that a
 * quarter of them differs (shown: 21 of 160). Gradients keep their bound, since training is always exact.
 *
 * Bounds: 1e-5, where float64 references exist; 1e-4 for the trained models (golden files with a `greedy`
 * continuation), whose references are float32 programs. */
#define CHECKPOINT_IMPLEMENTATION
#include "../examples/checkpoint.h"
#include <math.h>

/* ---- What was computed: tensors under the golden file's names */

typedef struct record {
    char name[DSV3_MAX_NAME + 8];
    st_dtype dtype; /* ST_F32 or ST_I32 */
    int rank;
    uint64_t shape[3];
    size_t bytes;
    void *data;
} record;

typedef struct run {
    checkpoint *model;
    int module; /* 0: the main model runs, k: MTP module k */
    const st_file *golden;
    dsv3_context context;
    const int32_t *tokens; /* [B, S] */
    size_t B, S;
    record *records;
    size_t count, capacity;
    int dumping, failed;
    void *packed; /* memory of dsv3_pack */
} run;

static void *must(void *p) {
    if (p == NULL) {
        fprintf(stderr, "parity: out of memory\n");
        exit(1);
    }
    return p;
}

/* A new record [a, b, c]; b or c may be 0 for fewer dimensions. */
static void *record_add(run *r, const char *prefix, long layer, const char *suffix, st_dtype dtype, size_t a,
                        size_t b, size_t c) {
    record *n;
    if (r->count == r->capacity) {
        r->capacity = r->capacity ? 2 * r->capacity : 64;
        r->records = (record *)must(realloc(r->records, r->capacity * sizeof *r->records));
    }
    n = &r->records[r->count++];
    memset(n, 0, sizeof *n);
    if (layer >= 0) {
        snprintf(n->name, sizeof n->name, "%s.%ld%s", prefix, layer, suffix);
    } else {
        snprintf(n->name, sizeof n->name, "%s", prefix);
    }
    n->dtype = dtype;
    n->rank = c ? 3 : b ? 2 : 1;
    n->shape[0] = a;
    n->shape[1] = b;
    n->shape[2] = c;
    n->bytes = 4 * a * (b ? b : 1) * (c ? c : 1);
    n->data = must(malloc(n->bytes ? n->bytes : 1));
    return n->data;
}

static void records_clear(run *r) {
    for (size_t i = 0; i < r->count; i++) free(r->records[i].data);
    r->count = 0;
}

static void on_hidden(void *user, int32_t layer, const float *x, size_t n) {
    run *r = (run *)user;
    size_t d = (size_t)r->model->config.hidden_size;
    if (r->module > 0) return;
    memcpy(record_add(r, layer < 0 ? "final" : "hidden", layer, "", ST_F32, r->B, r->S, d), x, n * d * sizeof *x);
}

static void on_routing(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                       size_t n) {
    run *r = (run *)user;
    size_t E = (size_t)r->model->config.n_routed_experts, K = (size_t)r->model->config.num_experts_per_tok;
    memcpy(record_add(r, "router", layer, ".score", ST_F32, n, E, 0), score, n * E * sizeof *score);
    memcpy(record_add(r, "router", layer, ".gate", ST_F32, n, K, 0), gate, n * K * sizeof *gate);
    memcpy(record_add(r, "router", layer, ".idx", ST_I32, n, K, 0), idx, n * K * sizeof *idx);
}

/* ---- Computing */

typedef struct session {
    dsv3_cache *caches;  /* [n_caches] of the main model, then of each MTP module */
    void **cache_memory; /* [n_all] */
    size_t n_caches, n_all;
    dsv3_workspace workspace;
    void *workspace_memory;
} session;

static void session_begin(session *s, const run *r, size_t n_caches, size_t capacity, size_t rows) {
    size_t bytes = 0;
    const dsv3_config *config = &r->model->config;
    s->n_caches = n_caches;
    s->n_all = n_caches * (1 + (size_t)r->model->model.n_mtp);
    s->caches = (dsv3_cache *)must(calloc(s->n_all, sizeof *s->caches));
    s->cache_memory = (void **)must(calloc(s->n_all, sizeof *s->cache_memory));
    for (size_t i = 0; i < s->n_all; i++) {
        if (i < n_caches) {
            dsv3_cache_size(config, capacity, DSV3_F32, &bytes, NULL);
            s->cache_memory[i] = must(malloc(bytes));
            dsv3_cache_init(config, &s->caches[i], capacity, DSV3_F32, s->cache_memory[i], bytes, NULL);
        } else {
            dsv3_cache_mtp_size(config, capacity, DSV3_F32, &bytes, NULL);
            s->cache_memory[i] = must(malloc(bytes));
            dsv3_cache_mtp_init(config, &s->caches[i], capacity, DSV3_F32, s->cache_memory[i], bytes, NULL);
        }
    }
    dsv3_workspace_size(config, rows, r->context.threads, &bytes, NULL);
    s->workspace_memory = must(malloc(bytes));
    dsv3_workspace_init(config, &s->workspace, rows, r->context.threads, s->workspace_memory, bytes, NULL);
}

static void session_end(session *s) {
    for (size_t i = 0; i < s->n_all; i++) free(s->cache_memory[i]);
    free(s->caches);
    free(s->cache_memory);
    free(s->workspace_memory);
}

static void check(dsv3_result result, const dsv3_error *error) {
    char text[256];
    if (result == DSV3_OK) return;
    fprintf(stderr, "parity: %s\n", dsv3_error_text(error, text, sizeof text));
    exit(1);
}

static void forward(run *r, session *s, float *logits, const dsv3_batch *batch) {
    dsv3_error error;
    check(dsv3_forward(&r->context, logits, &r->model->model, s->caches, s->n_caches, batch, &s->workspace, &error),
          &error);
}

/* Module k on its S - k rows of each sequence; hidden [B, S - k + 1, d] are the states of the module before. */
static float *compute_module(run *r, session *s, size_t k, const float *hidden) {
    size_t d = (size_t)r->model->config.hidden_size, V = (size_t)r->model->config.vocab_size, S = r->S - k,
           n = r->B * S;
    int32_t *token = (int32_t *)must(malloc(n * sizeof *token)),
            *sequence = (int32_t *)must(malloc(n * sizeof *token));
    float *from = (float *)must(malloc(n * d * sizeof *from)), *to = (float *)must(malloc(n * d * sizeof *to));
    float *logits;
    dsv3_batch batch;
    dsv3_error error;
    for (size_t i = 0; i < n; i++) {
        size_t b = i / S, t = i % S;
        token[i] = r->tokens[b * r->S + t + k];
        sequence[i] = (int32_t)b;
        memcpy(from + i * d, hidden + (b * (S + 1) + t) * d, d * sizeof *from);
    }
    logits = (float *)record_add(r, "mtp", (long)k, ".logits", ST_F32, r->B, S, V);
    memset(&batch, 0, sizeof batch);
    batch.rows = batch.outputs = n;
    batch.token = token;
    batch.sequence = sequence;
    r->module = (int)k;
    check(dsv3_mtp_forward(&r->context, logits, &r->model->model, k, s->caches + k * s->n_caches, s->n_caches, &batch,
                           from, &s->workspace, &error),
          &error);
    r->module = 0;
    memcpy(to, s->workspace.hidden, n * d * sizeof *to);
    free(token);
    free(sequence);
    free(from);
    return to;
}

/* All B sequences in one call; the observer records the rest. Then the MTP modules, one after another. */
static void compute_forward(run *r) {
    size_t V = (size_t)r->model->config.vocab_size, d = (size_t)r->model->config.hidden_size, n = r->B * r->S;
    int32_t *sequence = (int32_t *)must(malloc(n * sizeof *sequence));
    dsv3_batch batch;
    session s;
    float *logits, *hidden = (float *)must(malloc(n * d * sizeof *hidden));
    for (size_t i = 0; i < n; i++) sequence[i] = (int32_t)(i / r->S);
    memset(&batch, 0, sizeof batch);
    batch.rows = batch.outputs = n;
    batch.token = r->tokens;
    batch.sequence = sequence;
    r->context.observer.user = r;
    r->context.observer.hidden = on_hidden;
    r->context.observer.routing = on_routing;
    session_begin(&s, r, r->B, r->S, n);
    logits = (float *)record_add(r, "logits", -1, "", ST_F32, r->B, r->S, V);
    forward(r, &s, logits, &batch);
    memcpy(hidden, s.workspace.hidden, n * d * sizeof *hidden);
    for (size_t k = 1; k <= (size_t)r->model->model.n_mtp && k < r->S; k++) {
        float *next = compute_module(r, &s, k, hidden);
        free(hidden);
        hidden = next;
    }
    r->context.observer.hidden = NULL;
    r->context.observer.routing = NULL;
    session_end(&s);
    free(hidden);
    free(sequence);
}

static void record_number(run *r, const char *prefix, long layer, const char *suffix, double value) {
    *(float *)record_add(r, prefix, layer, suffix, ST_F32, 1, 0, 0) = (float)value;
}

/* The biases of all layers after one step from these loads. */
static void compute_bias(run *r, dsv3_balancer *balancer) {
    size_t E = balancer->experts;
    float *bias = (float *)must(calloc(balancer->layers * E, sizeof *bias));
    for (size_t i = 0; i < balancer->layers; i++) {
        const dsv3_tensor *b = &r->model->model.layers[i].e_score_correction_bias;
        int32_t row = 0;
        if (b->data != NULL) dsv3_embed(&r->context, bias + i * E, &row, b, 1, NULL);
    }
    dsv3_balancer_step(balancer, bias, 0, NULL);
    for (size_t i = 0; i < balancer->layers; i++) {
        if (r->model->model.layers[i].e_score_correction_bias.data == NULL) continue;
        memcpy(record_add(r, "router", (long)i, ".bias_after", ST_F32, E, 0, 0), bias + i * E, E * sizeof *bias);
    }
    free(bias);
}

/* A number of the golden file's metadata, or fallback. */
static double setting(const run *r, const char *name, double fallback) {
    const char *text = st_metadata(r->golden, name);
    return text != NULL ? strtod(text, NULL) : fallback;
}

/* Weight of the balance loss: the golden V2 model has none. */
static double balance_weight(const run *r) {
    return r->model->config.topk_method == DSV3_NOAUX_TC ? setting(r, "alpha", 0.01) : 0.0;
}

/* What training computes: losses of all depths, balance losses, loads, the bias step. */
static void compute_losses(run *r) {
    size_t n = r->B * r->S, D = (size_t)r->model->model.n_mtp, layers, bytes = 0;
    int32_t *sequence = (int32_t *)must(malloc(n * sizeof *sequence));
    void *memory;
    session s;
    dsv3_text text;
    dsv3_losses losses;
    dsv3_balancer balancer;
    dsv3_error error;
    dsv3_balancer_size(&r->model->config, &bytes, NULL);
    memory = must(malloc(bytes));
    dsv3_balancer_init(&r->model->config, &balancer, memory, bytes, NULL);
    layers = balancer.layers;
    memset(&text, 0, sizeof text);
    memset(&losses, 0, sizeof losses);
    for (size_t i = 0; i < n; i++) sequence[i] = (int32_t)(i / r->S);
    text.rows = n;
    text.token = r->tokens;
    text.sequence = sequence;
    losses.depths = D;
    losses.nll = (double *)must(calloc(1 + D, sizeof(double)));
    losses.targets = (uint64_t *)must(calloc(1 + D, sizeof(uint64_t)));
    losses.balance = (double *)must(calloc(layers, sizeof(double)));
    losses.load = balancer.load;
    session_begin(&s, r, r->B, r->S, n);
    check(dsv3_evaluate(&r->context, &losses, &r->model->model, s.caches, s.caches + s.n_caches, s.n_caches, &text,
                        &s.workspace, &error),
          &error);
    record_number(r, "nll.main", -1, "", losses.nll[0]);
    for (size_t k = 1; k <= D; k++) record_number(r, "nll.mtp", (long)k, "", losses.nll[k]);
    for (size_t i = 0; i < layers; i++) {
        int32_t *load;
        if (!r->model->model.layers[i].is_moe) continue;
        record_number(r, "aux", (long)i, "", losses.balance[i] / (double)losses.sequences);
        load = (int32_t *)record_add(r, "router", (long)i, ".load", ST_I32, balancer.experts, 0, 0);
        for (size_t e = 0; e < balancer.experts; e++) load[e] = (int32_t)balancer.load[i * balancer.experts + e];
    }
    record_number(r, "loss.total", -1, "",
                  dsv3_losses_total(&losses, layers, setting(r, "lam", 0.3), balance_weight(r), DSV3_DIVIDE_BY_MAIN));
    balancer.schedule.speed = setting(r, "gamma", 0.001);
    compute_bias(r, &balancer);
    session_end(&s);
    free(memory);
    free(losses.nll);
    free(losses.targets);
    free(losses.balance);
    free(sequence);
}

/* ---- Gradients of loss.total, with respect to the decoded weights */

/* Records all tensors of a dsv3_parameters under prefix + name, but of gradients the biases': they have none. */
typedef struct parameter_walk {
    run *r;
    const char *prefix;
    const float *data;
    size_t at;
    int gradient;
} parameter_walk;

static dsv3_result record_parameter(void *user, const dsv3_tensor_info *info) {
    parameter_walk *w = (parameter_walk *)user;
    char name[DSV3_MAX_NAME + 8];
    size_t n = info->rows * info->cols;
    if (info->optional) return DSV3_OK;
    snprintf(name, sizeof name, "%s%s", w->prefix, info->name);
    if (!w->gradient || info->kind != DSV3_KIND_ROUTER || info->rank == 2) {
        memcpy(record_add(w->r, name, -1, "", ST_F32, info->rank == 1 ? info->cols : info->rows,
                          info->rank == 1 ? 0 : info->cols, 0),
               w->data + w->at, n * sizeof(float));
    }
    w->at += n;
    return DSV3_OK;
}

static void record_parameters(run *r, const char *prefix, const dsv3_parameters *parameters) {
    parameter_walk walk;
    walk.r = r;
    walk.prefix = prefix;
    walk.data = parameters->data;
    walk.at = 0;
    walk.gradient = strcmp(prefix, "grad.") == 0;
    dsv3_model_tensors(&r->model->config, record_parameter, &walk, NULL);
}

/* B sequences of S tokens, one after another. */
static dsv3_text text_of(const int32_t *tokens, int32_t *sequence, size_t B, size_t S) {
    dsv3_text text;
    memset(&text, 0, sizeof text);
    for (size_t i = 0; i < B * S; i++) sequence[i] = (int32_t)(i / S);
    text.rows = B * S;
    text.token = tokens;
    text.sequence = sequence;
    return text;
}

typedef struct training {
    dsv3_trainer trainer;
    void *memory;
    int32_t *sequence; /* [B, S] */
    uint64_t *targets; /* [1 + D] */
    size_t D;
} training;

static void training_begin(training *t, run *r, size_t B, size_t S, dsv3_training settings) {
    size_t bytes = 0;
    t->D = (size_t)r->model->model.n_mtp;
    t->sequence = (int32_t *)must(malloc(B * S * sizeof *t->sequence));
    t->targets = (uint64_t *)must(calloc(1 + t->D, sizeof *t->targets));
    settings.rows = B * S;
    settings.sequences = B;
    settings.longest = S;
    settings.lambda = setting(r, "lam", 0.3);
    settings.balance.expert = balance_weight(r);
    dsv3_trainer_size(&r->model->config, &settings, r->context.threads, &bytes, NULL);
    t->memory = must(malloc(bytes));
    dsv3_trainer_init(&r->model->config, &t->trainer, &settings, r->context.threads, t->memory, bytes, NULL);
    t->trainer.balancer.schedule.speed = setting(r, "gamma", 0.001);
    dsv3_parameters_from_model(&t->trainer.weights, &r->model->model, NULL);
}

static void training_end(training *t) {
    free(t->memory);
    free(t->sequence);
    free(t->targets);
}

static void compute_gradients(run *r) {
    training t;
    dsv3_text text;
    dsv3_error error;
    uint64_t sequences = 0;
    if (st_find(r->golden, "greedy") != NULL) return; /* a trained model's file */
    training_begin(&t, r, r->B, r->S, dsv3_training_default());
    text = text_of(r->tokens, t.sequence, r->B, r->S);
    dsv3_text_count(&text, t.D, t.targets, &sequences, NULL);
    dsv3_train_begin(&t.trainer, t.targets, sequences, NULL);
    check(dsv3_train_accumulate(&r->context, &t.trainer, &text, &error), &error);
    record_parameters(r, "grad.", &t.trainer.gradients);
    training_end(&t);
}

/* tokens [steps, micro, B, S]: each step has `micro` micro-batches. */
static void compute_trajectory(run *r, size_t steps, size_t micro) {
    size_t B = r->B, S = r->S, E = (size_t)r->model->config.n_routed_experts, layers;
    float *loss = (float *)record_add(r, "loss", -1, "", ST_F32, steps, 0, 0);
    float *first = (float *)record_add(r, "main", -1, "", ST_F32, steps, 0, 0);
    float *norm = (float *)record_add(r, "grad_norm", -1, "", ST_F32, steps, 0, 0);
    int32_t **load;
    training t;
    dsv3_training settings = dsv3_training_default();
    settings.beta1 = (float)setting(r, "beta1", 0.9);
    settings.beta2 = (float)setting(r, "beta2", 0.95);
    settings.eps = (float)setting(r, "eps", 1e-8);
    settings.weight_decay = (float)setting(r, "weight_decay", 0.1);
    settings.clip = (float)setting(r, "clip", 1.0);
    training_begin(&t, r, B, S, settings);
    layers = t.trainer.balancer.layers;
    load = (int32_t **)must(calloc(layers, sizeof *load));
    for (size_t i = 0; i < layers; i++) {
        if (t.trainer.weights.model.layers[i].is_moe) {
            load[i] = (int32_t *)record_add(r, "router", (long)i, ".load", ST_I32, steps, E, 0);
        }
    }
    for (size_t step = 0; step < steps; step++) {
        const int32_t *tokens = r->tokens + step * micro * B * S;
        uint64_t sequences = 0;
        dsv3_error error;
        double size = 0;
        memset(t.targets, 0, (1 + t.D) * sizeof *t.targets);
        for (size_t i = 0; i < micro; i++) {
            dsv3_text text = text_of(tokens + i * B * S, t.sequence, B, S);
            dsv3_text_count(&text, t.D, t.targets, &sequences, NULL);
        }
        dsv3_train_begin(&t.trainer, t.targets, sequences, NULL);
        for (size_t i = 0; i < micro; i++) {
            dsv3_text text = text_of(tokens + i * B * S, t.sequence, B, S);
            check(dsv3_train_accumulate(&r->context, &t.trainer, &text, &error), &error);
        }
        loss[step] = (float)dsv3_train_loss(&t.trainer);
        first[step] = (float)(t.trainer.losses.nll[0] / (double)t.trainer.losses.targets[0]);
        for (size_t i = 0; i < layers; i++) {
            for (size_t e = 0; load[i] != NULL && e < E; e++) {
                load[i][step * E + e] = (int32_t)t.trainer.balancer.load[i * E + e];
            }
        }
        check(dsv3_train_end(&r->context, &t.trainer, setting(r, "lr", 0.003), &size, &error), &error);
        norm[step] = (float)size;
    }
    record_parameters(r, "final.", &t.trainer.weights);
    training_end(&t);
    free(load);
}

/* `greedy` is a prompt and its greedy continuation. Where the prompt ends is not written down, but it is a prefix
 * of `tokens`: what both have in common serves as the prompt (were it longer than the prompt, the continuation from
 * there would be the same). */
static void compute_greedy(run *r) {
    const st_tensor *want = st_find(r->golden, "greedy");
    size_t V = (size_t)r->model->config.vocab_size, steps, prompt = 0;
    float *logits;
    dsv3_batch batch;
    session s;
    int32_t *out;
    if (want == NULL || want->dtype != ST_I32) return;
    steps = want->bytes / 4;
    out = (int32_t *)record_add(r, "greedy", -1, "", ST_I32, 1, steps, 0);
    memcpy(out, want->data, want->bytes);
    while (prompt < steps && prompt < r->S && out[prompt] == r->tokens[prompt]) prompt++;
    if (prompt == 0) out[0] = -1; /* strangers: nothing to continue, and nothing to agree with */
    if (prompt == 0) return;
    memset(out + prompt, 0, (steps - prompt) * sizeof *out);
    logits = (float *)must(malloc(V * sizeof *logits));
    session_begin(&s, r, 1, steps, prompt);
    memset(&batch, 0, sizeof batch);
    batch.rows = prompt;
    batch.outputs = 1;
    batch.token = out;
    for (size_t i = prompt; i < steps; i++) {
        forward(r, &s, logits, &batch);
        dsv3_sample(&out[i], logits, V, 0.0f, 1.0f, NULL, NULL, NULL);
        batch.rows = 1;
        batch.token = &out[i];
    }
    session_end(&s);
    free(logits);
}

/* ---- Comparing */

/* router.3.gate -> router.gate: the kind under which errors are summed up. */
static void kind_of(char *kind, size_t capacity, const char *name) {
    size_t n = 0;
    if (strncmp(name, "grad.", 5) == 0) name = "grad";
    if (strncmp(name, "final.", 6) == 0) name = "final weights";
    for (; *name != '\0' && n + 1 < capacity; name++) {
        if (*name == '.' && name[1] >= '0' && name[1] <= '9') {
            name++;
            while (name[1] >= '0' && name[1] <= '9') name++;
            continue;
        }
        kind[n++] = *name;
    }
    kind[n] = '\0';
}

/* Worst error relative to the largest magnitude (for a series over steps: to its own); for integers the number of
 * differing elements. */
static double worst_error(const record *got, const st_tensor *want) {
    size_t n = got->bytes / 4;
    int series =
        strcmp(got->name, "loss") == 0 || strcmp(got->name, "main") == 0 || strcmp(got->name, "grad_norm") == 0;
    double worst = 0, largest = 0;
    const char *a = (const char *)got->data, *b = (const char *)want->data;
    if (want->dtype != got->dtype || want->bytes != got->bytes) return HUGE_VAL;
    for (size_t i = 0; i < n; i++) {
        if (got->dtype == ST_F32) {
            float x, y;
            double error;
            memcpy(&x, a + 4 * i, 4);
            memcpy(&y, b + 4 * i, 4);
            error = fabs((double)x - (double)y) / (series ? fabs((double)y) : 1.0);
            if (fabs((double)y) > largest) largest = series ? 1.0 : fabs((double)y);
            if (!(error <= worst)) worst = error;
            if (isnan(worst)) return worst;
        } else {
            worst += memcmp(a + 4 * i, b + 4 * i, 4) != 0;
        }
    }
    if (largest <= 0 && worst > 0 && strstr(got->name, ".experts.") != NULL) return HUGE_VAL; /* nobody chose it: 0 */
    return got->dtype == ST_F32 && largest > 0 ? worst / largest : worst;
}

/* Choices of experts that differ, in the layer where most do. */
static double differing_choices(const run *r) {
    double most = 0;
    for (size_t i = 0; i < r->count; i++) {
        const st_tensor *want = st_find(r->golden, r->records[i].name);
        char kind[64];
        kind_of(kind, sizeof kind, r->records[i].name);
        if (want != NULL && strcmp(kind, "router.idx") == 0) most = fmax(most, worst_error(&r->records[i], want));
    }
    return most;
}

static void compare(run *r, const char *form) {
    char done[64][64];
    size_t kinds = 0, compared = 0;
    double bound = st_find(r->golden, "greedy") != NULL ? 1e-4 : 1e-5;
    double rounded = fmin(1e-2, 1e-3 * (1 + differing_choices(r)));
    for (size_t i = 0; i < r->count; i++) {
        char kind[64];
        double worst = 0, limit;
        size_t tensors = 0;
        kind_of(kind, sizeof kind, r->records[i].name);
        limit = r->records[i].dtype == ST_I32 || strcmp(kind, "router.bias_after") == 0 ? 0 : bound;
        if (r->context.compute == DSV3_FAST) {
            limit = strcmp(kind, "router.idx") == 0 ? (double)(r->records[i].bytes / 16) /* a quarter of them */
                    : strncmp(kind, "nll", 3) == 0 || strcmp(kind, "loss.total") == 0 ? rounded
                                                                                      : HUGE_VAL;
        }
        if (strcmp(kind, "grad") == 0 || strcmp(kind, "grad_norm") == 0) limit = 1e-4;
        if (strcmp(kind, "final weights") == 0) limit = 5e-3;
        for (size_t k = 0; k < kinds; k++) tensors += strcmp(done[k], kind) == 0;
        if (tensors > 0 || kinds == 64) continue; /* seen */
        memcpy(done[kinds++], kind, sizeof kind);
        for (size_t j = i; j < r->count; j++) {
            char other[64];
            const st_tensor *want = st_find(r->golden, r->records[j].name);
            double e;
            kind_of(other, sizeof other, r->records[j].name);
            if (want == NULL || strcmp(kind, other) != 0) continue;
            e = worst_error(&r->records[j], want);
            if (!(e <= worst) && !isnan(worst)) worst = e;
            tensors++;
        }
        if (tensors == 0) continue; /* the golden file does not have it */
        r->failed |= !(worst <= limit);
        printf("%-9s %-14s %3zu tensors  worst %-9.3g bound %-7g %s\n", form, kind, tensors, worst, limit,
               worst <= limit ? "ok" : "FAILED");
        compared++;
    }
    if (compared > 0 || r->dumping) return; /* a file with tokens alone may ask for a dump */
    printf("%-9s the golden file has nothing to compare with: FAILED\n", form);
    r->failed = 1;
}

static int dump(const run *r, const char *path) {
    st_tensor *out = (st_tensor *)must(calloc(r->count ? r->count : 1, sizeof *out));
    st_error error;
    st_result result;
    for (size_t i = 0; i < r->count; i++) {
        const record *from = &r->records[i];
        out[i].name = from->name;
        out[i].dtype = from->dtype;
        out[i].rank = from->rank;
        memcpy(out[i].shape, from->shape, sizeof from->shape);
        out[i].data = from->data;
        out[i].bytes = from->bytes;
    }
    result = st_write(path, out, r->count, NULL, &error);
    if (result != ST_OK) fprintf(stderr, "parity: %s\n", error.message);
    free(out);
    return result != ST_OK;
}

/* Weights in the order that the backend reads best. */
static void pack(run *r) {
    size_t bytes;
    check(dsv3_pack_size(&r->context, &r->model->model, &bytes, NULL), NULL);
    if (bytes == 0) return; /* it reads them as they lie */
    r->packed = must(malloc(bytes));
    check(dsv3_pack(&r->context, &r->model->model, r->packed, bytes, NULL), NULL);
}

static int usage(void) {
    fprintf(stderr, "usage: parity DIR [--dump OUT.safetensors] [--backend NAME] [--threads N] "
                    "[--trajectory] [--packed] [--fast]\n");
    return 2;
}

int main(int argc, char **argv) {
    static const char form_names[3][12] = {"", "absorbed", "expanded"};
    const char *directory = NULL, *out = NULL, *backend = "auto";
    dsv3_backend which = DSV3_BACKEND_AUTO;
    long threads = 0;
    int trajectory = 0, packed = 0, fast = 0;
    checkpoint model;
    st_file golden;
    st_error error;
    const st_tensor *tokens;
    char path[4096];
    run r;
    int32_t *token_copy;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--dump") == 0 && i + 1 < argc) {
            out = argv[++i];
        } else if (strcmp(argv[i], "--backend") == 0 && i + 1 < argc) {
            backend = argv[++i];
        } else if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
            threads = strtol(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--trajectory") == 0) {
            trajectory = 1;
        } else if (strcmp(argv[i], "--packed") == 0) {
            packed = 1;
        } else if (strcmp(argv[i], "--fast") == 0) {
            fast = 1;
        } else if (argv[i][0] == '-' || directory != NULL) {
            return usage();
        } else {
            directory = argv[i];
        }
    }
    if (directory == NULL || threads < 0 || dsv3_backend_find(&which, backend, NULL) != DSV3_OK) {
        return usage();
    }
    memset(&r, 0, sizeof r);
    snprintf(path, sizeof path, "%s/%s.safetensors", directory, trajectory ? "traj" : "golden");
    if (st_open(&golden, path, &error) != ST_OK || checkpoint_open(&model, directory, &error) != ST_OK) {
        fprintf(stderr, "parity: %s\n", error.message);
        return 1;
    }
    tokens = st_find(&golden, "tokens");
    if (tokens == NULL || tokens->dtype != ST_I32 || tokens->rank != (trajectory ? 4 : 2) || tokens->bytes == 0) {
        fprintf(stderr, "parity: %s: tokens: must be I32 %s\n", path, trajectory ? "[steps, micro, B, S]" : "[B, S]");
        return 1;
    }
    if (dsv3_context_init(&r.context, which, (size_t)threads, NULL) != DSV3_OK) {
        fprintf(stderr, "parity: backend %s: not on this machine\n", backend);
        return 1;
    }
    token_copy = (int32_t *)must(malloc(tokens->bytes));
    memcpy(token_copy, tokens->data, tokens->bytes);
    r.model = &model;
    r.golden = &golden;
    r.tokens = token_copy;
    r.dumping = out != NULL;
    r.B = (size_t)tokens->shape[tokens->rank - 2];
    r.S = (size_t)tokens->shape[tokens->rank - 1];
    if (fast) r.context.compute = DSV3_FAST;
    if (packed) pack(&r);
    printf("%s: %zu x %zu tokens, backend %s, %zu threads%s%s\n", directory, r.B, r.S, r.context.backend,
           r.context.threads, packed ? ", packed" : "", fast ? ", fast" : "");
    if (trajectory) {
        compute_trajectory(&r, (size_t)tokens->shape[0], (size_t)tokens->shape[1]);
        compare(&r, "training");
    }
    /* The expanded form comes last: it has the gradients, and --dump shall have them, too. */
    for (int form = DSV3_ATTENTION_ABSORBED; !trajectory && form <= DSV3_ATTENTION_EXPANDED; form++) {
        records_clear(&r);
        r.context.attention = (dsv3_attention)form;
        compute_forward(&r);
        compute_losses(&r);
        if (form == DSV3_ATTENTION_EXPANDED) compute_gradients(&r); /* training knows no other form */
        compute_greedy(&r);
        compare(&r, form_names[form]);
    }
    if (out != NULL) r.failed |= dump(&r, out);
    records_clear(&r);
    free(r.records);
    free(token_copy);
    checkpoint_close(&model);
    free(r.packed);
    st_close(&golden);
    return r.failed;
}
