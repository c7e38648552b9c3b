/* test_arguments.c -- every public call that has a result, with each of its arguments wrong in turn: NULL, 0, negative, too
 * large, NaN, not divisible, over another one. It answers with the code and the name that the table has, the same
 * without an error to fill in, and changes nothing.
 *
 * The table is held against the declarations in dsv3.h: a call that is not in it fails the test, and so does a parameter
 * of a call that no line of it makes wrong. Parameters of which any value is right, and pointers that may be NULL, are
 * in the table too. A call without a result may not be `void`: it has no way to say no.
 *
 * A failure here means a crash, or a plausible number, where a program makes a mistake. */
#include "dsv3.h"
#include "synthetic.h"

#define ROWS 4u
#define SPACE 4096u /* floats of each array */

/* All arguments of all calls, so that a line of the table is a place in here and what stands there. */
typedef struct world {
    dsv3_context ctx;
    const dsv3_context *context;
    dsv3_config cfg, router_cfg, bad_cfg;
    const dsv3_config *config, *router, *bad;
    dsv3_model mdl, spare_model;
    dsv3_model *model, *no_model;
    const dsv3_layer *weights, *unbound, *no_experts;
    dsv3_cache cache[2], module[2], other;
    dsv3_cache *caches, *modules, *to, *from;
    dsv3_workspace ws, spare_ws;
    dsv3_workspace *workspace;
    dsv3_batch b;
    const dsv3_batch *batch;
    int32_t token[ROWS], sequence[ROWS], position[ROWS], output[ROWS], row[ROWS], target[ROWS], idx[ROWS * 2], ids[2];
    uint8_t mask[ROWS], seen[64];
    size_t n_caches, n, k, d, layer, layers, experts, topk, rows, cols, capacity, threads, bytes, length, drafts,
        vocab, dr;
    size_t *kept, kept_value, *out_bytes, size;
    int32_t type, backend, rule;
    dsv3_backend *backend_out, found_backend;
    const char *name, *unknown;
    const int32_t *keeps;
    void *memory, *shifted, *data;
    dsv3_find find;
    dsv3_visit visit;
    float *logits, *state, *x, *y, *dx, *dw, *dy, *score, *gate, *scratch, *nll, *hidden, *bias, *table, *scales;
    float a[16][SPACE];
    double *log_p, *entropy, *loss, *sums, *norm, *theta, doubles[64], speed, rate, scale;
    uint64_t *load, *turns, *targets, *sequences, words[64];
    float temperature, top_p, min_p, penalty, eps, factor, weight, std;
    int32_t one;
    dsv3_candidate *candidates, room[SPACE];
    dsv3_rng *rng, stream;
    int32_t *drawn, drawn_value, *token_, *idx_, *ids_, *target_, *position_;
    uint8_t *mask_, *seen_;
    int32_t *row_;
    float *over;
    dsv3_text txt;
    const dsv3_text *text;
    dsv3_losses sum;
    dsv3_losses *losses;
    dsv3_sequence seq, seq2;
    dsv3_sequence *sequence_, *copy, *list[2];
    dsv3_sequence *const *sequences_;
    dsv3_balancer bal;
    dsv3_balancer *balancer;
    dsv3_routing rt;
    const dsv3_routing *routing;
    dsv3_balance_weights bw;
    const dsv3_balance_weights *balance;
    dsv3_parameters par, par2;
    dsv3_parameters *parameters;
    dsv3_training set;
    const dsv3_training *settings;
    dsv3_trainer tr, no_tr;
    dsv3_trainer *trainer;
    dsv3_tensor w, gain, gate_w, head;
    const dsv3_tensor *matrix, *vector, *router_w, *classes;
} world;

static world w, before;
static synth *model;

static const int32_t keeps[] = {-1, -1, -1, -1};
static dsv3_layer unbound, no_experts;

/* ---- What the calls work on. Memory behind the world's pointers is watched, too, but for what private halves keep. */

static struct {
    void *p, *copy;
    size_t n;
} blocks[64];
static size_t n_blocks;

static void *block(size_t n) {
    CHECK(n_blocks < 64);
    blocks[n_blocks].p = synth_alloc(n), blocks[n_blocks].copy = test_alloc(n), blocks[n_blocks].n = n;
    memset(blocks[n_blocks].p, 0, n);
    return blocks[n_blocks++].p;
}

static void world_close(void) {
    for (; n_blocks > 0; n_blocks--) synth_release(blocks[n_blocks - 1].p), free(blocks[n_blocks - 1].copy);
    if (model != NULL) synth_close(model);
    model = NULL;
}

static dsv3_result visit_nothing(void *user, const dsv3_tensor_info *info) {
    (void)user, (void)info;
    return DSV3_OK;
}

#define MADE(call) CHECK_EQ(call, DSV3_OK)

static void world_arrays(void) {
    test_state = 5;
    w.logits = w.a[0], w.state = w.a[1], w.x = w.a[2], w.y = w.a[3], w.dx = w.a[4], w.dw = w.a[5], w.dy = w.a[6];
    w.score = w.a[7], w.gate = w.a[8], w.scratch = w.a[9], w.nll = w.a[10], w.hidden = w.a[11], w.bias = w.a[12];
    w.table = w.a[13], w.scales = w.a[14];
    for (size_t i = 0; i < 16; i++) test_fill(w.a[i], SPACE, 0.1f, 0.9f);
    w.log_p = &w.doubles[0], w.entropy = &w.doubles[1], w.loss = &w.doubles[2], w.norm = &w.doubles[3];
    w.sums = w.doubles + 8, w.theta = w.doubles + 8;
    w.load = w.turns = w.targets = w.words, w.sequences = w.words + 63;
    w.candidates = w.room, w.rng = &w.stream, w.drawn = &w.drawn_value, w.kept = &w.kept_value, w.out_bytes = &w.size;
    w.n = w.rows = w.experts = ROWS, w.topk = 2, w.k = 1, w.d = (size_t)w.cfg.hidden_size, w.layers = 1, w.cols = 32;
    w.capacity = 8, w.threads = 2, w.drafts = 1, w.length = 1, w.vocab = (size_t)w.cfg.vocab_size, w.dr = 16;
    w.type = DSV3_F32, w.backend = DSV3_BACKEND_REFERENCE, w.rule = DSV3_BIAS_SIGN, w.one = 1;
    w.temperature = 0.8f, w.top_p = 0.9f, w.min_p = 0.1f, w.penalty = 1.5f, w.eps = 1e-6f, w.factor = w.weight = 1;
    w.std = 0.02f, w.speed = 0.01, w.rate = 0.001, w.scale = 0.5;
    w.name = "reference", w.unknown = "none", w.keeps = keeps, w.find = synth_find, w.visit = visit_nothing,
    w.backend_out = &w.found_backend;
    for (size_t i = 0; i < ROWS; i++)
        w.token[i] = w.target[i] = (int32_t)i, w.position[i] = (int32_t)i / 2, w.mask[i] = 1;
    for (size_t i = 0; i < ROWS; i++) w.sequence[i] = (int32_t)i % 2, w.output[i] = w.row[i] = (int32_t)i;
    for (size_t i = 0; i < 2 * ROWS; i++) w.idx[i] = (int32_t)(i % 4);
    w.ids[0] = 3, w.ids[1] = 5;
    w.token_ = w.token, w.idx_ = w.idx, w.ids_ = w.ids, w.target_ = w.target, w.position_ = w.position,
    w.mask_ = w.mask;
    w.seen_ = w.seen, w.row_ = w.row, w.over = w.x + 1;
}

static void world_tensors(void) {
    const dsv3_tensor matrix = {w.a[15], NULL, 4, 32, DSV3_F32, 2, 0};
    w.w = w.gain = w.gate_w = w.head = matrix;
    w.no_model = &w.spare_model;
    w.spare_model = w.mdl;
    w.gain.rows = 1, w.gain.rank = 1;
    w.head.rows = 40;
    w.matrix = &w.w, w.vector = &w.gain, w.router_w = &w.gate_w, w.classes = &w.head;
    w.router_cfg = dsv3_config_default();
    w.router_cfg.n_routed_experts = 4, w.router_cfg.num_experts_per_tok = 2, w.router_cfg.n_group = 2;
    w.router_cfg.topk_group = 1, w.router_cfg.qk_rope_head_dim = 16, w.router_cfg.qk_nope_head_dim = 8;
    w.router = &w.router_cfg;
    w.rt.score = w.score, w.rt.idx = w.idx, w.rt.mask = w.mask, w.rt.n = ROWS, w.rt.experts = 4, w.rt.topk = 2;
    w.rt.devices = 2, w.rt.most_devices = 1, w.routing = &w.rt;
    w.bw.expert = w.bw.device = w.bw.communication = 0.01, w.bw.devices = 2, w.bw.most_devices = 1, w.balance = &w.bw;
}

static void world_model(void) {
    size_t bytes;
    model = synth_open_named(SYNTH_MTP, 3);
    MADE(dsv3_context_init(&model->context, test_backend(), 1, NULL));
    w.ctx = model->context, w.cfg = model->config, w.mdl = model->model;
    w.ctx.parallel_for = NULL, w.ctx.threads = 1;
    w.context = &w.ctx, w.config = &w.cfg, w.model = &w.mdl, w.weights = &w.mdl.layers[0];
    no_experts.input_layernorm = w.mdl.layers[0].input_layernorm, no_experts.is_moe = 1;
    w.unbound = &unbound, w.no_experts = &no_experts;
    w.bad_cfg = w.cfg, w.bad_cfg.vocab_size = 0, w.bad = &w.bad_cfg;
    MADE(dsv3_cache_size(w.config, 8, DSV3_F32, &bytes, NULL));
    for (int i = 0; i < 2; i++) MADE(dsv3_cache_init(w.config, &w.cache[i], 8, DSV3_F32, block(bytes), bytes, NULL));
    MADE(dsv3_cache_init(w.config, &w.other, 8, DSV3_F32, block(bytes), bytes, NULL));
    for (int i = 0; i < 2; i++)
        MADE(dsv3_cache_mtp_init(w.config, &w.module[i], 8, DSV3_F32, block(bytes), bytes, NULL));
    w.caches = w.cache, w.modules = w.module, w.n_caches = 2, w.to = &w.other, w.from = &w.cache[0];
    MADE(dsv3_workspace_size(w.config, 8, 1, &bytes, NULL));
    synth_run(model, 8, 1, 1, 8, DSV3_F32);
    w.ws = model->ws, w.workspace = &w.ws;
    w.txt.rows = w.b.rows = ROWS, w.txt.token = w.b.token = w.token, w.txt.sequence = NULL, w.b.sequence = w.sequence;
    w.b.position = w.position, w.b.outputs = 1, w.b.output = w.output, w.batch = &w.b, w.text = &w.txt;
    w.sum.nll = w.doubles + 16, w.sum.targets = w.words + 8, w.sum.depths = 1, w.sum.devices = w.sum.most_devices = 2, w.losses = &w.sum;
}

static void world_open(void) {
    size_t bytes;
    world_close();
    memset(&w, 0, sizeof w);
    world_model();
    world_arrays();
    world_tensors();
    w.shifted = (unsigned char *)block(1 << 20) + 1;
    w.memory = (unsigned char *)w.shifted - 1, w.bytes = 1 << 20, w.data = block(1 << 20);
    w.sequence_ = &w.seq, w.copy = &w.seq2, w.list[0] = &w.seq, w.list[1] = &w.seq2, w.sequences_ = w.list;
    w.balancer = &w.bal, w.parameters = &w.par, w.trainer = &w.tr;
    MADE(dsv3_sequence_size(w.model, 8, DSV3_F32, 4, 1, &bytes, NULL));
    for (int i = 0; i < 2; i++) {
        MADE(dsv3_sequence_init(w.model, w.list[i], 8, DSV3_F32, 4, 1, block(bytes), bytes, NULL));
        blocks[n_blocks - 1].n = 0; /* a step may mark the private half */
    }
    MADE(dsv3_sequence_append(w.model, &w.seq, w.token, 3, NULL));
    MADE(dsv3_balancer_size(w.config, &bytes, NULL));
    MADE(dsv3_balancer_init(w.config, &w.bal, block(bytes), bytes, NULL));
}

static void prepare_training(void) {
    size_t bytes;
    uint64_t targets[2] = {3, 2};
    w.set = dsv3_training_default();
    w.set.rows = w.set.longest = ROWS, w.set.sequences = 1, w.settings = &w.set;
    w.set.balance.device = 0.05, w.set.balance.devices = 2;
    MADE(dsv3_trainer_size(w.config, &w.set, 1, &bytes, NULL));
    MADE(dsv3_trainer_init(w.config, &w.tr, &w.set, 1, block(bytes), bytes, NULL));
    MADE(dsv3_parameters_from_model(&w.tr.weights, w.model, NULL));
    MADE(dsv3_train_begin(&w.tr, targets, 1, NULL));
    MADE(dsv3_train_accumulate(w.context, &w.tr, w.text, NULL));
    w.targets[0] = 3, w.targets[1] = 2;
}

static void prepare_parameters(void) {
    size_t bytes;
    MADE(dsv3_parameters_size(w.config, &bytes, NULL));
    MADE(dsv3_parameters_init(w.config, &w.par, block(bytes), bytes, NULL));
}

static void prepare_batch(void) {
    MADE(dsv3_batch_begin(w.context, w.model, w.caches, 2, w.batch, w.workspace, NULL));
}
static void prepare_forward(void) {
    w.b.outputs = 0;
    MADE(dsv3_forward(w.context, NULL, w.model, w.caches, 2, w.batch, w.workspace, NULL));
    w.from = &w.cache[0];
}
static void prepare_save(void) { MADE(dsv3_cache_save(w.config, &w.cache[0], 7, w.data, w.bytes, NULL)); }
static void save_bytes(size_t *bytes, dsv3_result result) {
    MADE(result);
    *bytes = w.size, w.size = 0;
}
static void prepare_cache_bytes(void) {
    prepare_forward();
    save_bytes(&w.bytes, dsv3_cache_save_size(&w.cache[0], &w.size, NULL));
    prepare_save();
}
static void drop_prompt(void) { MADE(dsv3_sequence_truncate(&w.seq, 0, NULL, NULL)); }
static void prepare_sequence_bytes(void) {
    drop_prompt();
    save_bytes(&w.bytes, dsv3_sequence_save_size(&w.seq, &w.size, NULL));
    MADE(dsv3_sequence_save(w.model, &w.seq, 7, w.data, w.bytes, NULL));
}
static void prepare_trainer_bytes(void) {
    prepare_training();
    save_bytes(&w.bytes, dsv3_trainer_save_size(&w.tr, &w.size, NULL));
    w.data = block(w.bytes);
    MADE(dsv3_trainer_save(&w.tr, 7, w.data, w.bytes, NULL));
}
static void prepare_e4m3(void) { w.type = DSV3_F8_E4M3; }
static void prepare_mtp_batch(void) { w.caches = w.modules; }
static void prepare_settings(void) {
    w.set = dsv3_training_default();
    w.set.rows = w.set.longest = ROWS, w.set.sequences = 1, w.settings = &w.set;
    w.bytes = 8 << 20, w.memory = block(w.bytes), w.shifted = (unsigned char *)w.memory + 1;
}
static void prepare_trainer_room(void) {
    prepare_training();
    save_bytes(&w.bytes, dsv3_trainer_save_size(&w.tr, &w.size, NULL));
    w.data = block(w.bytes);
}
static void prepare_text(void) { /* read, and a token written */
    MADE(dsv3_generate_step(w.context, w.logits, w.model, w.sequences_, 1, w.workspace, NULL));
}
static void prepare_loss(void) {
    MADE(dsv3_cross_entropy(w.context, w.nll, w.x, w.classes, w.target_, w.n, w.scratch, NULL));
}

/* ---- The table. A line: the parameter, the place in the world, what is put there, the code and the name it gives. */

enum kind { NUL, COPY, SIZE, INT, FLOAT, DOUBLE, BYTE, ZERO, ANY };
typedef struct line {
    const char *parameter;
    size_t at;
    enum kind kind;
    double value; /* COPY: the place of the pointer that is taken; ZERO: how many bytes */
    dsv3_result code;
    const char *name;
} line;

#define AT(field) offsetof(world, field)
#define NEED(parameter, field)                                                                                       \
    { #parameter, AT(field), NUL, 0, DSV3_ERR_ARG, #parameter }
#define MAY(parameter, field)                                                                                        \
    { #parameter, AT(field), NUL, 0, DSV3_OK, "" } /* NULL is right */
#define FREE(parameter)                                                                                              \
    { #parameter, 0, ANY, 0, DSV3_OK, "" } /* any value is */
#define BAD(parameter, field, kind, value, code, name)                                                               \
    { #parameter, AT(field), kind, value, DSV3_ERR_##code, name }
#define OVER(parameter, field, other, name)                                                                          \
    { #parameter, AT(field), COPY, (double)AT(other), DSV3_ERR_ARG, name }
#define HUGE_ 1e19 /* more than a size_t holds: becomes SIZE_MAX */
#define MANY (double)(SIZE_MAX / 16) /* of one thing too many bytes */

#define CONTEXT                                                                                                      \
    NEED(context, context), BAD(context, ctx, ZERO, sizeof(dsv3_context), ARG, "context"),                           \
        BAD(context, ctx.threads, SIZE, 0, ARG, "context.threads"),                                                  \
        BAD(context, ctx.compute, INT, 9, ARG, "context.compute"),                                                   \
        BAD(context, ctx.compute, INT, -1, ARG, "context.compute"),                                                  \
        BAD(context, ctx.attention, INT, 9, ARG, "context.attention")
#define CONFIG NEED(config, config), OVER(config, config, bad, "vocab_size")
#define MEMORY                                                                                                       \
    NEED(memory, memory), {"memory", AT(memory), COPY, (double)AT(shifted), DSV3_ERR_ALIGN, "memory"},               \
        BAD(bytes, bytes, SIZE, 0, MEMORY, "memory")
#define ROUTER                                                                                                       \
    NEED(config, router), BAD(config, router_cfg.n_routed_experts, INT, 0, ARG, "n_routed_experts"),                 \
        BAD(config, router_cfg.n_routed_experts, INT, -4, ARG, "n_routed_experts"),                                  \
        BAD(config, router_cfg.num_experts_per_tok, INT, 0, ARG, "num_experts_per_tok"),                             \
        BAD(config, router_cfg.num_experts_per_tok, INT, 5, ARG, "num_experts_per_tok"),                             \
        BAD(config, router_cfg.num_experts_per_tok, INT, 3, ARG, "num_experts_per_tok"), /* a group has two */       \
        BAD(config, router_cfg.n_group, INT, 3, ARG, "n_group"),                                                     \
        BAD(config, router_cfg.n_group, INT, 0, ARG, "n_group"),                                                     \
        BAD(config, router_cfg.topk_group, INT, 3, ARG, "topk_group"),                                               \
        BAD(config, router_cfg.scoring_func, INT, 2, UNSUPPORTED, "scoring_func"),                                   \
        BAD(config, router_cfg.topk_method, INT, -1, UNSUPPORTED, "topk_method"),                                    \
        BAD(config, router_cfg.routed_scaling_factor, FLOAT, NAN, ARG, "routed_scaling_factor")
#define WORKSPACE                                                                                                    \
    NEED(workspace, workspace), BAD(workspace, ws.made_for, SIZE, 1, MISMATCH, "workspace"),                         \
        BAD(context, ctx.threads, SIZE, 2, MEMORY, "threads")
#define BATCH                                                                                                        \
    NEED(caches, caches), BAD(caches, cache[1].width, SIZE, 5, MISMATCH, "caches[1]"),                               \
        OVER(caches, cache[1].data, cache[0].data, "caches[1]"),                                                     \
        BAD(n_caches, n_caches, SIZE, 0, ARG, "n_caches"), NEED(batch, batch),                                    \
        BAD(batch, b.rows, SIZE, 0, ARG, "rows"), BAD(batch, b.rows, SIZE, 99, MEMORY, "rows"),                      \
        BAD(batch, b.rows, SIZE, HUGE_, MEMORY, "rows"), BAD(batch, b.token, NUL, 0, ARG, "token"),                  \
        BAD(batch, token[2], INT, -1, TOKEN, "token[2]"), BAD(batch, token[2], INT, 97, TOKEN, "token[2]"),          \
        BAD(batch, sequence[1], INT, 2, ARG, "sequence[1]"), BAD(batch, sequence[1], INT, -1, ARG, "sequence[1]"),   \
        BAD(batch, position[3], INT, 0, POSITION, "position[3]"), BAD(batch, b.outputs, SIZE, 5, ARG, "outputs"),    \
        BAD(batch, output[0], INT, 4, ARG, "output[0]"), BAD(batch, output[0], INT, -1, ARG, "output[0]"),           \
        BAD(caches, cache[0].capacity, SIZE, 1, FULL, "position[2]")
#define OPERATOR(parameter, pointer, tensor)                                                                         \
    NEED(parameter, pointer), BAD(parameter, tensor.data, NUL, 0, ARG, #parameter),                                  \
        BAD(parameter, tensor.type, INT, 9, ARG, #parameter), BAD(parameter, tensor.type, INT, -1, ARG, #parameter), \
        BAD(parameter, tensor.cols, SIZE, 0, ARG, #parameter),                                                       \
        BAD(parameter, tensor.cols, SIZE, HUGE_, ARG, #parameter),                                                   \
        BAD(parameter, tensor.rows, SIZE, 0, ARG, #parameter), BAD(n, n, SIZE, HUGE_, OVERFLOW, "n")

#define CALL(name, ...)                                                                                              \
    static dsv3_result call_##name(dsv3_error *error) { return dsv3_##name(__VA_ARGS__, error); }                    \
    static const line lines_##name[] =

CALL(config_check, w.config){CONFIG, BAD(config, cfg.hidden_size, INT, -1, LIMIT, "hidden_size")};
CALL(quantize, w.data, w.scales, w.x, (dsv3_type)w.type, w.rows,
     w.cols){MAY(data, data),
             NEED(scale, scales),
             NEED(x, x),
             BAD(type, type, INT, 9, ARG, "type"),
             BAD(type, type, INT, -1, ARG, "type"),
             BAD(rows, rows, SIZE, HUGE_, OVERFLOW, "rows x cols"),
             BAD(cols, cols, SIZE, HUGE_, OVERFLOW, "rows x cols"),
             OVER(data, data, x, "x"),
             OVER(scale, scales, x, "x"),
             BAD(x, a[2][7], FLOAT, NAN, NAN, "x")};
CALL(backend_find, w.backend_out, w.name){NEED(backend, backend_out), NEED(name, name),
                                          OVER(name, name, unknown, "none")};
CALL(context_init, &w.ctx, (dsv3_backend)w.backend, w.threads){BAD(backend, backend, INT, 9, UNSUPPORTED, "backend"),
                                                               BAD(backend, backend, INT, -1, UNSUPPORTED, "backend"),
                                                               FREE(context), FREE(threads)};
CALL(model_size, w.config, w.out_bytes){CONFIG, NEED(bytes, out_bytes)};
CALL(model_bind, w.config, w.no_model, w.memory, w.bytes, w.find, model){CONFIG, NEED(model, no_model), MEMORY,
                                                                         NEED(find, find), FREE(user)};
CALL(pack_size, w.context, w.model, w.out_bytes){CONTEXT, NEED(model, model), NEED(bytes, out_bytes)};
CALL(pack, w.context, w.no_model, w.memory, w.bytes){CONTEXT, NEED(model, no_model), FREE(memory), FREE(bytes)};
CALL(model_tensors, w.config, w.visit, NULL){NEED(config, config), NEED(visit, visit), FREE(user)};
#define CACHE_SIZES                                                                                                  \
    CONFIG, BAD(capacity, capacity, SIZE, 0, ARG, "capacity"),                                                       \
        BAD(capacity, capacity, SIZE, HUGE_, LIMIT, "capacity"),                                                     \
        BAD(type, type, INT, DSV3_F16, UNSUPPORTED, "type"), BAD(type, type, INT, -1, UNSUPPORTED, "type")
CALL(cache_size, w.config, w.capacity, (dsv3_type)w.type, w.out_bytes){CACHE_SIZES, NEED(bytes, out_bytes)};
CALL(cache_init, w.config, w.to, w.capacity, (dsv3_type)w.type, w.memory,
     w.bytes){CACHE_SIZES, MEMORY, {"cache", AT(to), NUL, 0, DSV3_ERR_ARG, "object"}};
CALL(cache_mtp_size, w.config, w.capacity, (dsv3_type)w.type, w.out_bytes){CACHE_SIZES, NEED(bytes, out_bytes)};
CALL(cache_mtp_init, w.config, w.to, w.capacity, (dsv3_type)w.type, w.memory,
     w.bytes){CACHE_SIZES, MEMORY, {"cache", AT(to), NUL, 0, DSV3_ERR_ARG, "object"}};
CALL(cache_truncate, w.from, w.length){NEED(cache, from), BAD(length, length, SIZE, 9, ARG, "length")};
CALL(cache_copy, w.to, w.from){NEED(to, to),
                               NEED(from, from),
                               OVER(to, other.data, cache[0].data, "to"),
                               BAD(to, other.capacity, SIZE, 1, FULL, "to"),
                               BAD(to, other.type, INT, DSV3_BF16, MISMATCH, "to"),
                               BAD(to, other.layers, SIZE, 1, MISMATCH, "to")};
CALL(workspace_size, w.config, w.rows, w.threads, w.out_bytes){CONFIG,
                                                               BAD(rows, rows, SIZE, 0, ARG, "rows"),
                                                               BAD(rows, rows, SIZE, HUGE_, LIMIT, "rows"),
                                                               BAD(threads, threads, SIZE, 0, ARG, "threads"),
                                                               BAD(threads, threads, SIZE, MANY, OVERFLOW, "bytes"),
                                                               NEED(bytes, out_bytes)};
CALL(workspace_init, w.config, &w.spare_ws, w.rows, w.threads, w.memory,
     w.bytes){CONFIG, BAD(rows, rows, SIZE, 0, ARG, "rows"), BAD(threads, threads, SIZE, 0, ARG, "threads"), MEMORY,
              FREE(workspace)};
CALL(forward, w.context, w.logits, w.model, w.caches, w.n_caches, w.batch,
     w.workspace){CONTEXT, WORKSPACE, BATCH, NEED(logits, logits), NEED(model, model)};
CALL(mtp_forward, w.context, w.logits, w.model, w.k, w.caches, w.n_caches, w.batch, w.hidden,
     w.workspace){CONTEXT,
                  WORKSPACE,
                  NEED(caches, caches),
                  BAD(caches, module[1].width, SIZE, 5, MISMATCH, "caches[1]"),
                  OVER(caches, module[1].data, module[0].data, "caches[1]"),
                  BAD(n_caches, n_caches, SIZE, 1, ARG, "sequence[1]"),
                  NEED(batch, batch),
                  BAD(batch, b.rows, SIZE, 0, ARG, "rows"),
                  BAD(batch, token[0], INT, -1, TOKEN, "token[0]"),
                  BAD(k, k, SIZE, 0, ARG, "k"),
                  BAD(k, k, SIZE, 2, ARG, "k"),
                  BAD(k, k, SIZE, HUGE_, ARG, "k"),
                  NEED(logits, logits),
                  NEED(model, model),
                  NEED(hidden, hidden)};
CALL(states, w.model, w.state, w.workspace, w.row_, w.n){NEED(model, model),
                                                         NEED(state, state),
                                                         NEED(workspace, workspace),
                                                         NEED(row, row_),
                                                         BAD(row, row[1], INT, -1, ARG, "row[1]"),
                                                         BAD(row, row[1], INT, 8, ARG, "row[1]"),
                                                         BAD(workspace, ws.made_for, SIZE, 1, MISMATCH, "workspace"),
                                                         BAD(n, n, SIZE, HUGE_, ARG, "n")};
#define TEXT                                                                                                         \
    NEED(text, text), BAD(text, txt.rows, SIZE, 0, ARG, "rows"), BAD(text, txt.token, NUL, 0, ARG, "token"),         \
        BAD(text, token[3], INT, -1, TOKEN, "token[3]")
CALL(evaluate, w.context, w.losses, w.model, w.caches, w.modules, w.n_caches, w.text,
     w.workspace){CONTEXT,
                  WORKSPACE,
                  TEXT,
                  NEED(losses, losses),
                  BAD(losses, sum.nll, NUL, 0, ARG, "nll"),
                  BAD(losses, sum.targets, NUL, 0, ARG, "targets"),
                  BAD(losses, sum.depths, SIZE, 2, ARG, "depths"),
                  BAD(losses, sum.devices, SIZE, 3, ARG, "devices"),
                  BAD(losses, sum.most_devices, SIZE, 3, LIMIT, "most_devices"),
                  NEED(model, model),
                  NEED(caches, caches),
                  NEED(modules, modules),
                  OVER(modules, module[0].data, cache[0].data, "modules[0]"),
                  BAD(text, token[3], INT, 97, TOKEN, "token[3]"),
                  BAD(n_caches, n_caches, SIZE, 0, ARG, "n_caches")};
#define LOGITS                                                                                                       \
    NEED(logits, logits), BAD(vocab_size, vocab, SIZE, 0, ARG, "vocab_size"),                                        \
        BAD(vocab_size, vocab, SIZE, HUGE_, ARG, "vocab_size"),                                                      \
        BAD(logits, a[0][2], FLOAT, NAN, NAN, "logits")
#define SAMPLER                                                                                                      \
    LOGITS, BAD(temperature, temperature, FLOAT, -1, ARG, "sampler"),                                                \
        BAD(temperature, temperature, FLOAT, NAN, ARG, "sampler"),                                                   \
        BAD(temperature, temperature, FLOAT, INFINITY, ARG, "sampler"),                                              \
        BAD(top_p, top_p, FLOAT, 1.5, ARG, "sampler"), BAD(top_p, top_p, FLOAT, -0.5, ARG, "sampler"),               \
        BAD(top_p, top_p, FLOAT, NAN, ARG, "sampler"), NEED(candidates, candidates)
CALL(sample, w.drawn, w.logits, w.vocab, w.temperature, w.top_p, w.rng, w.candidates){SAMPLER, NEED(token, drawn),
                                                                                      NEED(rng, rng)};
CALL(sample_log_p, w.log_p, w.entropy, w.one, w.logits, w.vocab, w.temperature, w.top_p,
     w.candidates){SAMPLER, NEED(log_p, log_p), MAY(entropy, entropy), BAD(token, one, INT, -1, TOKEN, "token[0]"),
                   BAD(token, one, INT, 97, TOKEN, "token[0]")};
CALL(log_p, w.log_p, w.logits, w.token_, w.n, w.vocab){LOGITS, NEED(log_p, log_p), NEED(token, token_),
                                                       BAD(token, token[1], INT, -1, TOKEN, "token[1]"), FREE(n)};
CALL(logits_top_k, w.logits, w.vocab, w.k, w.candidates){LOGITS, BAD(k, k, SIZE, 0, ARG, "k"),
                                                         NEED(scratch, candidates)};
CALL(logits_min_p, w.logits, w.vocab, w.min_p){LOGITS, BAD(min_p, min_p, FLOAT, -1, ARG, "min_p"),
                                               BAD(min_p, min_p, FLOAT, 2, ARG, "min_p"),
                                               BAD(min_p, min_p, FLOAT, NAN, ARG, "min_p")};
CALL(logits_penalty, w.logits, w.vocab, w.ids_, w.k, w.penalty,
     w.seen_){LOGITS,
              NEED(token, ids_),
              BAD(token, ids[0], INT, -1, TOKEN, "token[0]"),
              BAD(token, ids[0], INT, 97, TOKEN, "token[0]"),
              BAD(penalty, penalty, FLOAT, 0, ARG, "penalty"),
              BAD(penalty, penalty, FLOAT, -1, ARG, "penalty"),
              BAD(penalty, penalty, FLOAT, NAN, ARG, "penalty"),
              NEED(seen, seen_),
              FREE(n)};
CALL(logits_bias, w.logits, w.vocab, w.ids_, w.bias, w.k){LOGITS,
                                                          NEED(token, ids_),
                                                          BAD(token, ids[0], INT, 97, TOKEN, "token[0]"),
                                                          NEED(bias, bias),
                                                          BAD(bias, a[12][0], FLOAT, NAN, ARG, "bias"),
                                                          BAD(bias, a[12][0], FLOAT, INFINITY, ARG, "bias"),
                                                          FREE(n)};
#define SEQUENCE_SIZES                                                                                               \
    NEED(model, model), BAD(capacity, capacity, SIZE, 0, ARG, "capacity"),                                           \
        BAD(capacity, capacity, SIZE, HUGE_, LIMIT, "capacity"),                                                     \
        BAD(type, type, INT, DSV3_F16, UNSUPPORTED, "type"), BAD(rows, rows, SIZE, 0, ARG, "rows"),                  \
        BAD(rows, rows, SIZE, HUGE_, LIMIT, "rows"), BAD(drafts, drafts, SIZE, 16, LIMIT, "drafts"),                 \
        BAD(drafts, drafts, SIZE, HUGE_, LIMIT, "drafts")
CALL(sequence_size, w.model, w.capacity, (dsv3_type)w.type, w.rows, w.drafts, w.out_bytes){SEQUENCE_SIZES,
                                                                                           NEED(bytes, out_bytes)};
CALL(sequence_init, w.model, w.sequence_, w.capacity, (dsv3_type)w.type, w.rows, w.drafts, w.memory,
     w.bytes){SEQUENCE_SIZES, MEMORY, {"sequence", AT(sequence_), NUL, 0, DSV3_ERR_ARG, "object"}};
#define SEQUENCE NEED(sequence, sequence_), BAD(sequence, seq, ZERO, sizeof(dsv3_sequence), ARG, "sequence")
CALL(sequence_append, w.model, w.copy, w.token_,
     w.n){NEED(model, model),
          NEED(sequence, copy),
          BAD(sequence, seq2, ZERO, sizeof(dsv3_sequence), ARG, "sequence"),
          NEED(token, token_),
          BAD(n, n, SIZE, 0, ARG, "n"),
          BAD(n, n, SIZE, 9, FULL, "n"),
          BAD(n, n, SIZE, HUGE_, FULL, "n"),
          BAD(token, token[3], INT, -1, TOKEN, "token[3]"),
          OVER(sequence, copy, sequence_, "sequence")};
CALL(sequence_truncate, w.sequence_, w.length, w.kept){SEQUENCE, MAY(kept, kept),
                                                       BAD(length, length, SIZE, 9, ARG, "length"),
                                                       BAD(length, length, SIZE, HUGE_, ARG, "length")};
CALL(sequence_copy, w.copy, w.sequence_){NEED(to, copy),
                                         NEED(from, sequence_),
                                         BAD(to, seq2, ZERO, sizeof(dsv3_sequence), ARG, "to"),
                                         BAD(from, seq, ZERO, sizeof(dsv3_sequence), ARG, "from"),
                                         BAD(to, seq2.max_drafts, SIZE, 0, MISMATCH, "to"),
                                         BAD(to, seq2.cache.capacity, SIZE, 1, FULL, "to")};
CALL(generate_step, w.context, w.logits, w.model, w.sequences_, w.k,
     w.workspace){CONTEXT,
                  WORKSPACE,
                  NEED(logits, logits),
                  NEED(model, model),
                  NEED(sequences, sequences_),
                  BAD(sequences, list[0], NUL, 0, ARG, "sequences[0]"),
                  BAD(sequences, seq, ZERO, sizeof(dsv3_sequence), ARG, "sequences[0]"),
                  BAD(sequences, seq.temperature, FLOAT, NAN, ARG, "sequences[0]"),
                  BAD(sequences, seq.top_p, FLOAT, 2, ARG, "sequences[0]"),
                  BAD(sequences, seq.n_stops, SIZE, 1, ARG, "sequences[0]"),
                  BAD(n, k, SIZE, 0, ARG, "n"),
                  BAD(n, k, SIZE, 9, MEMORY, "n"),
                  BAD(n, k, SIZE, HUGE_, MEMORY, "n")};
CALL(load_count, w.load, w.idx_, w.mask_, w.n, w.experts,
     w.topk){NEED(load, load),
             NEED(idx, idx_),
             MAY(mask, mask_),
             BAD(idx, idx[3], INT, -1, ARG, "idx[3]"),
             BAD(idx, idx[3], INT, 4, ARG, "idx[3]"),
             BAD(experts, experts, SIZE, 0, ARG, "experts"),
             BAD(experts, experts, SIZE, HUGE_, LIMIT, "experts"),
             BAD(topk, topk, SIZE, 0, ARG, "topk"),
             BAD(topk, topk, SIZE, 5, LIMIT, "topk"),
             BAD(topk, topk, SIZE, HUGE_, LIMIT, "topk"),
             FREE(n)};
CALL(bias_step, w.bias, w.load, w.layers, w.experts, (dsv3_bias_rule)w.rule,
     w.speed){NEED(bias, bias),
              NEED(load, load),
              BAD(experts, experts, SIZE, 0, ARG, "experts"),
              BAD(rule, rule, INT, 4, ARG, "rule"),
              BAD(rule, rule, INT, -1, ARG, "rule"),
              BAD(speed, speed, DOUBLE, -1, ARG, "speed"),
              BAD(speed, speed, DOUBLE, NAN, ARG, "speed"),
              BAD(speed, speed, DOUBLE, INFINITY, ARG, "speed"),
              FREE(layers)};
#define BALANCER                                                                                                     \
    NEED(config, config), BAD(config, cfg.n_routed_experts, INT, -1, ARG, "n_routed_experts"),                       \
        BAD(config, cfg.num_hidden_layers, INT, 0, ARG, "num_hidden_layers"),                                        \
        BAD(config, cfg.num_nextn_predict_layers, INT, -1, ARG, "num_nextn_predict_layers")
CALL(balancer_size, w.config, w.out_bytes){BALANCER, NEED(bytes, out_bytes)};
CALL(balancer_init, w.config, w.balancer, w.memory,
     w.bytes){BALANCER, MEMORY, {"balancer", AT(balancer), NUL, 0, DSV3_ERR_ARG, "object"}};
CALL(balancer_step, w.balancer, w.bias, 0){NEED(balancer, balancer), NEED(bias, bias),
                                           BAD(balancer, bal, ZERO, sizeof(dsv3_balancer), ARG, "balancer"),
                                           BAD(balancer, bal.rule, INT, 7, ARG, "rule"),
                                           BAD(balancer, bal.schedule.speed, DOUBLE, NAN, ARG, "speed"), FREE(seen)};
#define ROUTING                                                                                                      \
    NEED(routing, routing), BAD(routing, rt.score, NUL, 0, ARG, "score"),                                            \
        BAD(routing, rt.experts, SIZE, 0, ARG, "experts"), BAD(routing, rt.experts, SIZE, HUGE_, LIMIT, "experts"),  \
        BAD(routing, rt.topk, SIZE, 0, ARG, "topk"), BAD(routing, rt.topk, SIZE, 5, LIMIT, "topk"),                  \
        BAD(routing, idx[2], INT, 4, ARG, "idx[2]"), BAD(routing, idx[2], INT, -1, ARG, "idx[2]"),                   \
        BAD(routing, a[7][5], FLOAT, NAN, NAN, "score"), BAD(routing, a[7][5], FLOAT, INFINITY, NAN, "score"),       \
        NEED(scratch, sums)
#define DEVICES                                                                                                      \
    BAD(routing, rt.devices, SIZE, 0, ARG, "devices"), BAD(routing, rt.devices, SIZE, 3, ARG, "devices"),            \
        BAD(routing, rt.devices, SIZE, 5, ARG, "devices"), BAD(routing, rt.devices, SIZE, HUGE_, ARG, "devices")
CALL(balance_loss, w.loss, w.routing, w.sums){ROUTING, NEED(loss, loss)};
CALL(device_loss, w.loss, w.routing, w.sums){ROUTING, DEVICES, NEED(loss, loss)};
CALL(communication_loss, w.loss, w.routing, w.sums){ROUTING,
                                                    DEVICES,
                                                    NEED(loss, loss),
                                                    BAD(routing, rt.idx, NUL, 0, ARG, "idx"),
                                                    BAD(routing, rt.most_devices, SIZE, 0, ARG, "most_devices"),
                                                    BAD(routing, rt.most_devices, SIZE, 3, LIMIT, "most_devices")};
CALL(parameters_size, w.config, w.out_bytes){CONFIG, NEED(bytes, out_bytes)};
CALL(parameters_init, w.config, &w.par2, w.memory, w.bytes){CONFIG, MEMORY, FREE(parameters)};
CALL(parameters_from_model, w.parameters, w.model){NEED(parameters, parameters), NEED(from, model),
                                                   BAD(from, mdl.config.hidden_size, INT, 64, MISMATCH, "model")};
CALL(parameters_random, w.parameters, w.rng, w.std){NEED(parameters, parameters), NEED(rng, rng),
                                                    BAD(std, std, FLOAT, -1, ARG, "std"),
                                                    BAD(std, std, FLOAT, NAN, ARG, "std"),
                                                    BAD(std, std, FLOAT, INFINITY, ARG, "std")};
CALL(trainer_size, w.config, w.settings, w.threads,
     w.out_bytes){CONFIG,
                  NEED(settings, settings),
                  BAD(settings, set.rows, SIZE, 0, ARG, "rows"),
                  BAD(settings, set.sequences, SIZE, 0, ARG, "sequences"),
                  BAD(settings, set.sequences, SIZE, 5, LIMIT, "sequences"),
                  BAD(settings, set.longest, SIZE, 0, ARG, "longest"),
                  BAD(settings, set.keep, INT, 8, ARG, "keep"),
                  BAD(settings, set.keep, INT, -1, ARG, "keep"),
                  OVER(settings, set.keep_layers, keeps, "keep_layers"),
                  BAD(threads, threads, SIZE, 0, ARG, "threads"),
                  NEED(bytes, out_bytes)};
CALL(trainer_init, w.config, &w.no_tr, w.settings, w.threads, w.memory, w.bytes){
    CONFIG, NEED(settings, settings), BAD(settings, set.keep, INT, 8, ARG, "keep"),
    BAD(threads, threads, SIZE, 0, ARG, "threads"), MEMORY, FREE(trainer)};
CALL(text_count, w.text, w.k, w.targets, w.sequences){TEXT, NEED(targets, targets), NEED(sequences, sequences),
                                                      BAD(depths, k, SIZE, HUGE_, LIMIT, "depths")};
#define TRAINER NEED(trainer, trainer), BAD(trainer, tr, ZERO, sizeof(dsv3_trainer), ARG, "trainer")
CALL(train_begin, w.trainer, w.targets, 1){TRAINER, NEED(targets, targets), FREE(sequences)};
#define STEP                                                                                                         \
    CONTEXT, TRAINER, BAD(trainer, tr.settings.eps, FLOAT, 0, ARG, "eps"),                                           \
        BAD(trainer, tr.settings.clip, FLOAT, -1, ARG, "clip"),                                                      \
        BAD(trainer, tr.settings.beta1, FLOAT, 1, ARG, "beta1"),                                                     \
        BAD(trainer, tr.settings.lambda, DOUBLE, NAN, ARG, "lambda"),                                                \
        BAD(trainer, tr.settings.balance.expert, DOUBLE, -1, ARG, "balance.expert")
CALL(train_accumulate, w.context, w.trainer,
     w.text){STEP,
             NEED(text, text),
             BAD(text, txt.rows, SIZE, 0, ARG, "rows"),
             BAD(text, txt.rows, SIZE, 9, MEMORY, "rows"),
             BAD(text, txt.token, NUL, 0, ARG, "token"),
             BAD(text, token[3], INT, 97, TOKEN, "token[3]"),
             BAD(trainer, tr.settings.balance.devices, SIZE, 3, ARG, "devices")};
CALL(train_end, w.context, w.trainer, w.rate,
     w.norm){STEP,
             MAY(norm, norm),
             BAD(learning_rate, rate, DOUBLE, NAN, ARG, "learning_rate"),
             BAD(learning_rate, rate, DOUBLE, INFINITY, ARG, "learning_rate"),
             BAD(trainer, tr.balancer.rule, INT, 9, ARG, "rule"),
             BAD(trainer, tr.balancer.schedule.speed, DOUBLE, -1, ARG, "speed")};
CALL(cache_save_size, w.from, w.out_bytes){NEED(cache, from), NEED(bytes, out_bytes)};
#define SAVE_BYTES NEED(data, data), BAD(bytes, bytes, SIZE, 0, MEMORY, "data"), FREE(tag)
#define LOAD_BYTES NEED(data, data), BAD(bytes, bytes, SIZE, 0, DAMAGED, "data"), FREE(tag)
CALL(cache_save, w.config, w.from, 7, w.data, w.bytes){NEED(config, config), NEED(cache, from), SAVE_BYTES};
CALL(cache_load, w.config, w.to, 7, w.data, w.bytes){NEED(config, config), NEED(cache, to), LOAD_BYTES};
CALL(sequence_save_size, w.sequence_, w.out_bytes){SEQUENCE, NEED(bytes, out_bytes)};
CALL(sequence_save, w.model, w.sequence_, 7, w.data, w.bytes){NEED(model, model), SEQUENCE, SAVE_BYTES};
CALL(sequence_load, w.model, w.sequence_, 7, w.data, w.bytes){NEED(model, model), SEQUENCE, LOAD_BYTES};
CALL(trainer_save_size, w.trainer, w.out_bytes){TRAINER, NEED(bytes, out_bytes)};
CALL(trainer_save, w.trainer, 7, w.data, w.bytes){TRAINER, SAVE_BYTES};
CALL(trainer_load, w.trainer, 7, w.data, w.bytes){TRAINER, LOAD_BYTES};
CALL(batch_begin, w.context, w.model, w.caches, w.n_caches, w.batch, w.workspace){CONTEXT, WORKSPACE, BATCH,
                                                                                  NEED(model, model)};
CALL(batch_end, w.caches, w.batch, w.workspace){NEED(caches, caches), NEED(batch, batch), NEED(workspace, workspace),
                                                BAD(batch, b.rows, SIZE, 9, ARG, "rows"), BAD(batch, b.rows, SIZE, 1, ARG, "rows"),
                                                BAD(workspace, ws.begun, SIZE, 0, ARG, "workspace"),
                                                BAD(caches, cache[0].capacity, SIZE, 1, FULL, "caches")};
#define BLOCK                                                                                                        \
    CONTEXT, WORKSPACE, NEED(model, model), NEED(weights, weights), OVER(weights, weights, unbound, "weights"),      \
        OVER(weights, weights, no_experts, "weights"), BAD(n, n, SIZE, 0, ARG, "n"),                                 \
        BAD(n, n, SIZE, 9, MEMORY, "n"), BAD(n, n, SIZE, HUGE_, MEMORY, "n")
#define BEGUN                                                                                                        \
    BLOCK, BAD(n, n, SIZE, 1, ARG, "n"), BAD(workspace, ws.begun, SIZE, 0, ARG, "workspace"),                        \
        BAD(caches, cache[0].capacity, SIZE, 1, FULL, "caches")
CALL(mla_forward, w.context, w.y, w.x, w.model, w.weights, w.layer, w.caches, w.n,
     w.workspace){BEGUN,
                  NEED(y, y),
                  NEED(u, x),
                  OVER(y, y, x, "y"),
                  BAD(layer, layer, SIZE, 99, ARG, "layer"),
                  BAD(layer, layer, SIZE, HUGE_, ARG, "layer"),
                  NEED(caches, caches)};
CALL(ffn_forward, w.context, w.y, w.x, w.model, w.weights, w.n, w.workspace){BLOCK, NEED(y, y), NEED(u, x),
                                                                             OVER(y, y, x, "y")};
CALL(layer_forward, w.context, w.x, w.model, w.weights, w.layer, w.caches, w.n,
     w.workspace){BEGUN, NEED(x, x), BAD(layer, layer, SIZE, 99, ARG, "layer"), NEED(caches, caches)};
CALL(rmsnorm, w.context, w.y, w.x, w.vector, w.n, w.cols,
     w.eps){CONTEXT,
            OPERATOR(g, vector, gain),
            NEED(y, y),
            NEED(x, x),
            BAD(d, cols, SIZE, 31, MISMATCH, "g"),
            BAD(eps, eps, FLOAT, -1, ARG, "eps"),
            BAD(eps, eps, FLOAT, NAN, ARG, "eps"),
            BAD(g, gain.type, INT, DSV3_Q8_0, UNSUPPORTED, "g"),
            BAD(g, gain.type, INT, DSV3_F8_E4M3, UNSUPPORTED, "g"),
            OVER(y, y, over, "y")};
CALL(embed, w.context, w.y, w.token_, w.matrix, w.n){CONTEXT,
                                                     OPERATOR(w, matrix, w),
                                                     NEED(x, y),
                                                     NEED(token, token_),
                                                     BAD(token, token[1], INT, -1, TOKEN, "token[1]"),
                                                     BAD(token, token[1], INT, 4, TOKEN, "token[1]")};
CALL(linear_size, w.context, w.n, w.cols, w.out_bytes){CONTEXT, NEED(bytes, out_bytes),
                                                       BAD(n, n, SIZE, HUGE_, OVERFLOW, "scratch"),
                                                       BAD(cols, cols, SIZE, HUGE_, OVERFLOW, "scratch")};
CALL(linear, w.context, w.y, w.x, w.matrix, w.n, w.scratch){CONTEXT,    OPERATOR(w, matrix, w), NEED(y, y),
                                                            NEED(x, x), NEED(scratch, scratch), OVER(y, y, x, "y")};
CALL(cross_entropy_size, w.context, w.classes, w.n, w.out_bytes){CONTEXT, NEED(head, classes), NEED(bytes, out_bytes),
                                                                 BAD(n, n, SIZE, HUGE_, OVERFLOW, "scratch")};
#define LOSS                                                                                                         \
    CONTEXT, OPERATOR(head, classes, head), NEED(u, x), NEED(target, target_), NEED(scratch, scratch),               \
        BAD(target, target[2], INT, 40, TOKEN, "target[2]"), BAD(target, target[2], INT, -1, TOKEN, "target[2]")
CALL(cross_entropy, w.context, w.nll, w.x, w.classes, w.target_, w.n, w.scratch){LOSS, NEED(nll, nll)};
#define ROPE                                                                                                         \
    NEED(config, router), BAD(config, router_cfg.qk_rope_head_dim, INT, 0, ARG, "qk_rope_head_dim"),                 \
        BAD(config, router_cfg.qk_rope_head_dim, INT, 7, ARG, "qk_rope_head_dim"),                                   \
        BAD(config, router_cfg.qk_rope_head_dim, INT, -2, ARG, "qk_rope_head_dim"),                                  \
        BAD(config, router_cfg.rope_theta, FLOAT, NAN, ARG, "rope_theta"),                                           \
        BAD(config, router_cfg.rope_theta, FLOAT, 0, ARG, "rope_theta"),                                             \
        BAD(config, router_cfg.rope_scaling.type, INT, 5, ARG, "rope_scaling.type")
CALL(rope_frequencies, w.router, w.theta){ROPE, NEED(theta, theta)};
CALL(rope_turns, w.router, w.turns){ROPE, NEED(turns, turns)};
CALL(rope_table, w.table, w.position_, w.turns, w.factor, w.n, w.dr){NEED(cos_sin, table),
                                                                     NEED(position, position_),
                                                                     NEED(turns, turns),
                                                                     BAD(factor, factor, FLOAT, NAN, ARG, "factor"),
                                                                     BAD(dr, dr, SIZE, 0, ARG, "dr"),
                                                                     BAD(dr, dr, SIZE, 7, ARG, "dr"),
                                                                     FREE(n)};
#define ROTATE                                                                                                       \
    NEED(cos_sin, table), BAD(dr, dr, SIZE, 0, ARG, "dr"), BAD(dr, dr, SIZE, 7, ARG, "dr"), FREE(interleave)
CALL(rope_rotate, w.x, w.table, w.dr, 1){ROTATE, NEED(x, x), OVER(x, x, table, "x")};
CALL(router_check, w.router){ROUTER};
CALL(router_scores, w.context, w.router, w.score, w.x, w.router_w, w.bias, w.n,
     w.scratch){CONTEXT,
                ROUTER,
                OPERATOR(gate_w, router_w, gate_w),
                NEED(score, score),
                NEED(x, x),
                MAY(gate_bias, bias),
                NEED(scratch, scratch),
                OVER(score, score, x, "score")};
CALL(router_select, w.router, w.idx_, w.gate, w.score, w.bias, w.y, w.n,
     w.scratch){ROUTER,          NEED(idx, idx_), NEED(gate, gate),       NEED(score, score),
                MAY(bias, bias), MAY(alpha, y),   NEED(scratch, scratch), FREE(n)};
CALL(router_weights, w.router, w.gate, w.idx_, w.score, w.n){ROUTER,
                                                             NEED(idx, idx_),
                                                             NEED(gate, gate),
                                                             NEED(score, score),
                                                             BAD(idx, idx[3], INT, 4, ARG, "idx"),
                                                             BAD(idx, idx[3], INT, -1, ARG, "idx"),
                                                             BAD(idx, idx[3], INT, 2, ARG, "idx"),
                                                             FREE(n)};
CALL(linear_backward, w.context, w.dx, w.dw, w.dy, w.x, w.matrix, w.n, w.scratch){CONTEXT,
                                                                                  OPERATOR(w, matrix, w),
                                                                                  MAY(dx, dx),
                                                                                  MAY(dw, dw),
                                                                                  NEED(dy, dy),
                                                                                  NEED(x, x),
                                                                                  NEED(scratch, scratch),
                                                                                  OVER(dx, dx, dy, "dx"),
                                                                                  OVER(dx, dx, x, "dx")};
CALL(rope_rotate_backward, w.dx, w.table, w.dr, 1){ROTATE, NEED(dx, dx)};
CALL(embed_backward, w.dw, w.dx, w.token_, w.n, w.vocab, w.cols){NEED(dw, dw),
                                                                 NEED(dx, dx),
                                                                 NEED(token, token_),
                                                                 BAD(token, token[1], INT, -1, TOKEN, "token[1]"),
                                                                 BAD(vocab_size, vocab, SIZE, 3, TOKEN, "token[3]"),
                                                                 BAD(vocab_size, vocab, SIZE, 0, ARG, "vocab_size"),
                                                                 BAD(d, cols, SIZE, 0, ARG, "d"),
                                                                 BAD(d, cols, SIZE, HUGE_, LIMIT, "d"),
                                                                 FREE(n)};
CALL(rmsnorm_backward, w.context, w.dx, w.dw, w.dy, w.x, w.vector, w.n, w.eps,
     w.scratch){CONTEXT,
                OPERATOR(g, vector, gain),
                NEED(dx, dx),
                NEED(dg, dw),
                NEED(dy, dy),
                NEED(x, x),
                NEED(scratch, scratch),
                BAD(eps, eps, FLOAT, NAN, ARG, "eps"),
                OVER(dx, dx, dy, "dx"),
                OVER(dx, dx, x, "dx")};
CALL(cross_entropy_backward, w.context, w.dx, w.dw, w.weight, w.x, w.classes, w.target_, w.n,
     w.scratch){LOSS,
                {"du", AT(dx), NUL, 0, DSV3_ERR_ARG, "du"},
                MAY(dhead, dw),
                BAD(weight, weight, FLOAT, NAN, ARG, "weight"),
                OVER(du, dx, x, "du")};
CALL(router_weights_backward, w.router, w.dx, w.gate, w.idx_, w.score, w.n){ROUTER,
                                                                            NEED(dscore, dx),
                                                                            NEED(dgate, gate),
                                                                            NEED(idx, idx_),
                                                                            NEED(score, score),
                                                                            BAD(idx, idx[3], INT, 4, ARG, "idx"),
                                                                            BAD(idx, idx[3], INT, 2, ARG, "idx"),
                                                                            FREE(n)};
CALL(router_scores_backward, w.router, w.dx, w.dy, w.score, w.n){ROUTER, NEED(dz, dx), NEED(dscore, dy),
                                                                 NEED(score, score), FREE(n)};
CALL(balance_backward, w.dx, w.scale, w.balance, w.routing,
     w.sums){ROUTING,
             NEED(dscore, dx),
             NEED(weights, balance),
             BAD(weights, bw.expert, DOUBLE, -0.1, ARG, "balance"),
             BAD(weights, bw.device, DOUBLE, NAN, ARG, "balance"),
             BAD(weights, bw.communication, DOUBLE, INFINITY, ARG, "balance"),
             BAD(weights, bw.communication, DOUBLE, -0.1, ARG, "balance"),
             BAD(weights, bw.devices, SIZE, 0, ARG, "devices"),
             BAD(weights, bw.devices, SIZE, 3, ARG, "devices"),
             BAD(weights, bw.most_devices, SIZE, 3, LIMIT, "most_devices"),
             BAD(routing, rt.idx, NUL, 0, ARG, "idx"),
             BAD(scale, scale, DOUBLE, NAN, ARG, "scale")};

typedef struct entry {
    const char *name;
    dsv3_result (*call)(dsv3_error *error);
    void (*prepare)(void);
    const line *lines;
    size_t count;
} entry;

#define ROW(name, prepare)                                                                                           \
    { "dsv3_" #name, call_##name, prepare, lines_##name, sizeof lines_##name / sizeof(line) }
static const entry table[] = {ROW(config_check, NULL),
                              ROW(quantize, prepare_e4m3),
                              ROW(backend_find, NULL),
                              ROW(context_init, NULL),
                              ROW(model_size, NULL),
                              ROW(model_bind, NULL),
                              ROW(pack_size, NULL),
                              ROW(pack, NULL),
                              ROW(model_tensors, NULL),
                              ROW(cache_size, NULL),
                              ROW(cache_init, NULL),
                              ROW(cache_mtp_size, NULL),
                              ROW(cache_mtp_init, NULL),
                              ROW(cache_truncate, prepare_forward),
                              ROW(cache_copy, prepare_forward),
                              ROW(workspace_size, NULL),
                              ROW(workspace_init, NULL),
                              ROW(forward, NULL),
                              ROW(mtp_forward, prepare_mtp_batch),
                              ROW(states, prepare_forward),
                              ROW(evaluate, NULL),
                              ROW(sample, NULL),
                              ROW(sample_log_p, NULL),
                              ROW(log_p, NULL),
                              ROW(logits_top_k, NULL),
                              ROW(logits_min_p, NULL),
                              ROW(logits_penalty, NULL),
                              ROW(logits_bias, NULL),
                              ROW(sequence_size, NULL),
                              ROW(sequence_init, NULL),
                              ROW(sequence_append, NULL),
                              ROW(sequence_truncate, prepare_text),
                              ROW(sequence_copy, NULL),
                              ROW(generate_step, NULL),
                              ROW(load_count, NULL),
                              ROW(bias_step, NULL),
                              ROW(balancer_size, NULL),
                              ROW(balancer_init, NULL),
                              ROW(balancer_step, NULL),
                              ROW(balance_loss, NULL),
                              ROW(device_loss, NULL),
                              ROW(communication_loss, NULL),
                              ROW(parameters_size, NULL),
                              ROW(parameters_init, NULL),
                              ROW(parameters_from_model, prepare_parameters),
                              ROW(parameters_random, prepare_parameters),
                              ROW(trainer_size, prepare_settings),
                              ROW(trainer_init, prepare_settings),
                              ROW(text_count, NULL),
                              ROW(train_begin, prepare_training),
                              ROW(train_accumulate, prepare_training),
                              ROW(train_end, prepare_training),
                              ROW(cache_save_size, prepare_forward),
                              ROW(cache_save, prepare_forward),
                              ROW(cache_load, prepare_cache_bytes),
                              ROW(sequence_save_size, drop_prompt),
                              ROW(sequence_save, drop_prompt),
                              ROW(sequence_load, prepare_sequence_bytes),
                              ROW(trainer_save_size, prepare_training),
                              ROW(trainer_save, prepare_trainer_room),
                              ROW(trainer_load, prepare_trainer_bytes),
                              ROW(batch_begin, NULL),
                              ROW(batch_end, prepare_batch),
                              ROW(mla_forward, prepare_batch),
                              ROW(ffn_forward, prepare_batch),
                              ROW(layer_forward, prepare_batch),
                              ROW(rmsnorm, NULL),
                              ROW(embed, NULL),
                              ROW(linear_size, NULL),
                              ROW(linear, NULL),
                              ROW(cross_entropy_size, NULL),
                              ROW(cross_entropy, NULL),
                              ROW(rope_frequencies, NULL),
                              ROW(rope_turns, NULL),
                              ROW(rope_table, NULL),
                              ROW(rope_rotate, NULL),
                              ROW(router_check, NULL),
                              ROW(router_scores, NULL),
                              ROW(router_select, NULL),
                              ROW(router_weights, NULL),
                              ROW(linear_backward, NULL),
                              ROW(rope_rotate_backward, NULL),
                              ROW(embed_backward, NULL),
                              ROW(rmsnorm_backward, NULL),
                              ROW(cross_entropy_backward, prepare_loss),
                              ROW(router_weights_backward, NULL),
                              ROW(router_scores_backward, NULL),
                              ROW(balance_backward, NULL)};
#define ENTRIES (sizeof table / sizeof table[0])

/* ---- The walk */

static void put_wrong(const line *l) {
    unsigned char *at = (unsigned char *)&w + l->at;
    size_t size = l->value >= HUGE_ ? SIZE_MAX : l->kind == SIZE ? (size_t)l->value : 0;
    int32_t number = l->kind == INT ? (int32_t)l->value : 0;
    float single = (float)l->value;
    if (l->kind == NUL) memset(at, 0, sizeof(void *));
    if (l->kind == COPY) memcpy(at, (unsigned char *)&w + (size_t)l->value, sizeof(void *));
    if (l->kind == SIZE) memcpy(at, &size, sizeof size);
    if (l->kind == INT) memcpy(at, &number, sizeof number);
    if (l->kind == FLOAT) memcpy(at, &single, sizeof single);
    if (l->kind == DOUBLE) memcpy(at, &l->value, sizeof l->value);
    if (l->kind == ZERO) memset(at, 0, (size_t)l->value);
}

static int blocks_changed(void) {
    for (size_t i = 0; i < n_blocks; i++) {
        if (memcmp(blocks[i].p, blocks[i].copy, blocks[i].n) != 0) return 1;
    }
    return 0;
}

static void walk_line(const entry *e, const line *l) {
    static const char *const odd[] = {"2147483647", "4294967295", "9223372036854775807", "1 to 0", "0 to -1"};
    dsv3_error error;
    dsv3_result code, again;
    char text[400], shown[200];
    world *after = &before;
    put_wrong(l);
    *after = w;
    for (size_t i = 0; i < n_blocks; i++) memcpy(blocks[i].copy, blocks[i].p, blocks[i].n);
    memset(&error, 0x5A, sizeof error);
    code = e->call(&error);
    snprintf(text, sizeof text, "%s, line %d (%s): got %d, %s; want %d, %s", e->name, (int)(l - e->lines),
             l->parameter, (int)code, dsv3_error_text(&error, shown, sizeof shown), (int)l->code, l->name);
    test_count(code == l->code && error.code == l->code && strcmp(error.name, l->name) == 0, __FILE__, __LINE__,
               text);
    if (l->code == DSV3_OK) return;
    CHECK(error.why != NULL && error.why[0] != '\0');
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) { /* numbers that nobody has given; SIZE_MAX may be one that was */
        int given = l->kind == SIZE && l->value >= HUGE_ && strtoull(odd[i], NULL, 10) == SIZE_MAX;
        test_count(given || strstr(shown, odd[i]) == NULL, __FILE__, __LINE__, shown);
    }
    if (e->call != call_context_init) { /* a context that failed is none */
        snprintf(text, sizeof text, "%s, line %d (%s): something has changed", e->name, (int)(l - e->lines),
                 l->parameter);
        test_count(memcmp(after, &w, sizeof w) == 0 && !blocks_changed(), __FILE__, __LINE__, text);
    }
    again = e->call(NULL);
    CHECK_EQ(again, l->code);
}

/* Each line begins with a world in which the call succeeds: the first is proof of that. */
static void walk(const entry *e) {
    world good;
    for (size_t i = 0; i <= e->count; i++) {
        if (i < 2 || e->lines[i - 1].code == DSV3_OK || e->lines[i - 2].code == DSV3_OK) { /* success changes it */
            world_open();
            if (e->prepare != NULL) e->prepare();
            good = w;
        }
        if (i == 0) {
            dsv3_error error;
            char text[300];
            dsv3_result code = e->call(&error);
            if (code != DSV3_OK) fprintf(stderr, "%s: %s\n", e->name, dsv3_error_text(&error, text, sizeof text));
            CHECK_EQ(code, DSV3_OK);
            continue;
        }
        if (e->lines[i - 1].kind == ANY) continue;
        w = good;
        walk_line(e, &e->lines[i - 1]);
    }
}

/* ---- The table against the header */

static const entry *entry_of(const char *name) {
    for (size_t i = 0; i < ENTRIES; i++) {
        if (strcmp(table[i].name, name) == 0) return &table[i];
    }
    return NULL;
}

static int has_line(const entry *e, const char *parameter) {
    for (size_t i = 0; i < e->count; i++) {
        if (strcmp(e->lines[i].parameter, parameter) == 0) return 1;
    }
    return 0;
}

/* "dsv3_result dsv3_name(type a, type *b, .., dsv3_error *error);" in one line. Returns whether it has a result. */
static int declaration(char *text) {
    char *open = strchr(text, '('), *name = open, *end, message[2100];
    const entry *e;
    if (open == NULL) return 0;
    *open = '\0';
    while (name > text && name[-1] != ' ' && name[-1] != '*') name--;
    CHECK(strncmp(text, "void ", 5) != 0); /* it could not say no */
    if (strncmp(text, "dsv3_result dsv3_", 17) != 0) return 0;
    e = entry_of(name);
    snprintf(message, sizeof message, "%s is in the table", name);
    test_count(e != NULL, __FILE__, __LINE__, message);
    for (char *p = open + 1; e != NULL && p != NULL; p = end != NULL ? end + 1 : NULL) {
        char *last;
        end = strchr(p, ',');
        last = end != NULL ? end : strchr(p, ')');
        if (last == NULL) break;
        *last = '\0';
        while (last > p && last[-1] != ' ' && last[-1] != '*') last--;
        snprintf(message, sizeof message, "%s: parameter %s is in the table", name, last);
        if (strcmp(last, "error") != 0) test_count(has_line(e, last), __FILE__, __LINE__, message);
    }
    return 1;
}

static void table_complete(void) {
    FILE *file = fopen("dsv3.h", "r");
    char line_[400], text[2000] = "";
    size_t found = 0;
    CHECK(file != NULL);
    while (file != NULL && fgets(line_, sizeof line_, file) != NULL &&
           strncmp(line_, "#endif /* DSV3_H */", 19) != 0) {
        char *begin = line_, *stop;
        if (strncmp(line_, "DSV3_API ", 9) == 0) text[0] = '\0', begin += 9;
        if (begin == line_ && text[0] == '\0') continue;
        while (*begin == ' ') begin++;
        if (text[0] != '\0') strcat(text, " ");
        stop = strchr(begin, ';');
        strncat(text, begin, stop != NULL ? (size_t)(stop - begin) : strcspn(begin, "\n"));
        if (stop == NULL) continue;
        found += (size_t)declaration(text);
        text[0] = '\0';
    }
    if (file != NULL) fclose(file);
    CHECK_EQ(found, ENTRIES);
}

int main(void) {
    table_complete();
    for (size_t i = 0; i < ENTRIES; i++) walk(&table[i]);
    world_close();
    return test_done("arguments");
}
