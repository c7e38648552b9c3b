/* test_train.c -- chapter 14: the training step around the gradients (which test_gradients.c proves).
 *
 * A failure means that a step depends on how its batch was cut or on the number of threads, that a failed step has
 * left traces, that the optimizer is not AdamW as the chapter's head has it, or that memory is not what was promised. */
#define DSV3I_SERIAL_WORK 256u /* small loops are split, too */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#include <pthread.h>

/* ---- A model, a text and a trainer in memory of exactly the size asked for, full of junk */

#define ROWS 64

typedef struct subject {
    dsv3_config c;
    dsv3_training s;
    dsv3_text text;
    int32_t token[ROWS], target[ROWS], sequence[ROWS];
    dsv3_context ctx;
    dsv3_trainer t;
    void *memory;
    uint64_t targets[4], sequences;
    size_t D;
} subject;

static dsv3_config tiny_config(void) {
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, 29, 16, 24, 12, 3, 1);
    synth_attention(&c, 2, 12, 8, 6, 4, 5);
    synth_experts(&c, 6, 1, 2, 3, 2, 1.5f);
    c.num_nextn_predict_layers = 1;
    return c;
}

/* Lengths of the sequences, 0 ends. */
static void set_text(subject *a, const int *lengths) {
    size_t n = 0;
    for (int32_t s = 0; lengths[s] > 0; s++) {
        for (int i = 0; i < lengths[s]; i++) a->sequence[n++] = s;
    }
    for (size_t i = 0; i < n; i++) {
        a->token[i] = (int32_t)(test_random() % (uint64_t)a->c.vocab_size);
        a->target[i] = i % 5 == 2 ? DSV3_IGNORE : (int32_t)(test_random() % (uint64_t)a->c.vocab_size);
    }
    a->text.rows = n;
    a->text.token = a->token;
    a->text.sequence = a->sequence;
}

static void prepare(subject *a, const int *lengths) {
    memset(a, 0, sizeof *a);
    test_state = 3;
    a->c = tiny_config();
    a->s = dsv3_training_default();
    a->s.rows = ROWS;
    a->s.sequences = 8;
    a->s.longest = ROWS;
    a->s.balance.expert = 0.01;
    set_text(a, lengths);
}

static void open_trainer(subject *a, size_t threads) {
    size_t bytes = 0;
    dsv3_rng rng = {11};
    synth_demand(dsv3_context_init(&a->ctx, test_backend(), 1, NULL), "context", NULL);
    synth_demand(dsv3_trainer_size(&a->c, &a->s, threads, &bytes, NULL), "trainer size", NULL);
    a->memory = synth_alloc(bytes);
    memset(a->memory, 0xFF, bytes);
    synth_demand(dsv3_trainer_init(&a->c, &a->t, &a->s, threads, a->memory, bytes, NULL), "trainer", NULL);
    dsv3_parameters_random(&a->t.weights, &rng, 0.3f, NULL);
    a->D = (size_t)a->c.num_nextn_predict_layers;
    memset(a->targets, 0, sizeof a->targets);
    a->sequences = 0;
    dsv3_text_count(&a->text, a->D, a->targets, &a->sequences, NULL);
}

static void close_trainer(subject *a) { synth_release(a->memory); }

static void demand(dsv3_result result, const dsv3_error *error) { synth_demand(result, "step", error); }

static void gradients(subject *a) {
    dsv3_error error;
    demand(dsv3_train_begin(&a->t, a->targets, a->sequences, NULL), NULL);
    demand(dsv3_train_accumulate(&a->ctx, &a->t, &a->text, &error), &error);
}

static void step(subject *a, double rate) {
    dsv3_error error;
    gradients(a);
    demand(dsv3_train_end(&a->ctx, &a->t, rate, NULL, &error), &error);
}

static float *copy_floats(const float *x, size_t n) {
    float *copy = (float *)test_alloc(n * sizeof *copy);
    memcpy(copy, x, n * sizeof *x);
    return copy;
}

static int same_floats(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof *a) == 0; }

static double largest_of(const float *x, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        if (!(fabs((double)x[i]) <= largest)) largest = fabs((double)x[i]);
    }
    return largest;
}

/* Where a tensor lies among the parameters. */
typedef struct place {
    const char *name;
    size_t at, n;
} place;

static dsv3_result find_place(void *user, const dsv3_tensor_info *info) {
    place *p = (place *)user;
    if (info->optional) return DSV3_OK;
    p->n = info->rows * info->cols;
    if (strcmp(info->name, p->name) == 0) return DSV3_ERR_MISSING; /* ends the walk */
    p->at += p->n;
    return DSV3_OK;
}

static place place_of(const subject *a, const char *name) {
    place p;
    p.name = name;
    p.at = p.n = 0;
    if (dsv3_model_tensors(&a->c, find_place, &p, NULL) != DSV3_ERR_MISSING) exit(2);
    return p;
}

/* All tensors, in the order of the parameters. */
typedef struct listed {
    dsv3_tensor_info info;
    size_t at, n;
} listed;

typedef struct listing {
    listed item[512];
    size_t count, floats;
} listing;

static dsv3_result list_tensor(void *user, const dsv3_tensor_info *info) {
    listing *l = (listing *)user;
    if (info->optional) return DSV3_OK;
    if (l->count == 512) exit(2);
    l->item[l->count].info = *info;
    l->item[l->count].at = l->floats;
    l->item[l->count++].n = info->rows * info->cols;
    l->floats += info->rows * info->cols;
    return DSV3_OK;
}

static void list_tensors(listing *l, const dsv3_config *c) {
    l->count = l->floats = 0;
    synth_demand(dsv3_model_tensors(c, list_tensor, l, NULL), "list", NULL);
}

static int is_bias(const dsv3_tensor_info *info) { return info->kind == DSV3_KIND_ROUTER && info->rank == 1; }

/* got and want per tensor, to `bound` of the tensor's largest, or of 1e-4 of the largest of all if that is more: what
 * cancels to nothing leaves rounding. */
static void compare_parameters(const subject *a, const float *got, const float *want, double bound,
                               const char *what) {
    static listing l;
    double all;
    list_tensors(&l, &a->c);
    all = largest_of(want, l.floats);
    for (size_t i = 0; i < l.count; i++) {
        const listed *x = &l.item[i];
        double largest = fmax(largest_of(want + x->at, x->n), 1e-4 * all), worst = 0;
        char text[300];
        for (size_t j = x->at; j < x->at + x->n; j++) {
            double e = fabs((double)got[j] - (double)want[j]);
            if (!(e <= worst)) worst = e;
        }
        snprintf(text, sizeof text, "%s: %s: error %.3g of %.3g", what, x->info.name, worst, largest);
        test_count(worst <= bound * largest, __FILE__, __LINE__, text);
    }
}

/* ---- Any split of a batch gives the same sums */

static void test_micro_batches(int given_targets) {
    static const int lengths[] = {9, 1, 14, 2, 20, 7, 0};
    static const size_t cuts[][7] = {{0, 9, 10, 24, 26, 46, 53}, {0, 26, 53, 53, 53, 53, 53}};
    subject a;
    float *want;
    uint64_t *load;
    double loss;
    size_t loads;
    prepare(&a, lengths);
    if (given_targets) a.text.target = a.target;
    open_trainer(&a, 1);
    gradients(&a);
    want = copy_floats(a.t.gradients.data, a.t.gradients.count);
    loss = dsv3_train_loss(&a.t);
    loads = a.t.balancer.layers * a.t.balancer.experts;
    load = (uint64_t *)test_alloc(loads * sizeof *load);
    memcpy(load, a.t.balancer.load, loads * sizeof *load);
    for (size_t cut = 0; cut < 2; cut++) {
        demand(dsv3_train_begin(&a.t, a.targets, a.sequences, NULL), NULL);
        for (size_t i = 0; i < 6 && cuts[cut][i] < cuts[cut][i + 1]; i++) {
            dsv3_text part = a.text;
            dsv3_error error;
            part.rows = cuts[cut][i + 1] - cuts[cut][i];
            part.token += cuts[cut][i];
            part.sequence += cuts[cut][i];
            if (part.target != NULL) part.target += cuts[cut][i];
            demand(dsv3_train_accumulate(&a.ctx, &a.t, &part, &error), &error);
        }
        compare_parameters(&a, a.t.gradients.data, want, 1e-6, "micro-batches");
        CHECK(fabs(dsv3_train_loss(&a.t) - loss) < 1e-6 * loss);
        CHECK(memcmp(load, a.t.balancer.load, loads * sizeof *load) == 0);
        CHECK_EQ(a.t.losses.sequences, a.sequences);
        CHECK_EQ(a.t.losses.targets[0], a.targets[0]);
        CHECK_EQ(a.t.losses.targets[1], a.targets[1]);
    }
    free(want), free(load);
    close_trainer(&a);
}

/* dsv3_evaluate sees the same losses and loads. */
static void test_evaluate_agrees(void) {
    static const int lengths[] = {9, 1, 14, 2, 20, 7, 0};
    subject a;
    synth *s;
    dsv3_losses losses;
    dsv3_error error;
    double nll[2] = {0, 0}, balance[8] = {0};
    uint64_t targets[2] = {0, 0}, load[8 * 6] = {0};
    prepare(&a, lengths);
    open_trainer(&a, 1);
    gradients(&a);
    s = synth_open(&a.c, SYNTH_F32, 1);
    s->context.attention = DSV3_ATTENTION_EXPANDED;
    synth_run(s, ROWS, 1, 6, ROWS, DSV3_F32);
    s->model = a.t.weights.model;
    memset(&losses, 0, sizeof losses);
    losses.nll = nll, losses.targets = targets, losses.balance = balance, losses.load = load;
    demand(dsv3_evaluate(&s->context, &losses, &s->model, s->caches, NULL, 6, &a.text, &s->ws, &error), &error);
    CHECK(memcmp(&nll[0], &a.t.losses.nll[0], sizeof(double)) == 0);
    CHECK(memcmp(balance, a.t.losses.balance, 3 * sizeof(double)) == 0);
    CHECK(memcmp(load, a.t.balancer.load, 3 * 6 * sizeof *load) == 0); /* the last layer is the module's */
    synth_close(s);
    close_trainer(&a);
}

/* ---- Threads. Every loop of the backward pass must really have been split: those of all backends, and those of the ops
 * of the one under test. */

enum {
    LOOP_LOSS, LOOP_SILU, LOOP_ROUTER, LOOP_BALANCE, LOOP_EMBED, LOOP_ROTATE, LOOP_NORM_DX, LOOP_NORM_DG, LOOP_SQUARES,
    LOOP_ADAMW, LOOP_EMA, LOOP_COPY,
    LOOP_SCATTER, /* the combination of the forward pass, without gates */
    LOOP_LINEAR_DX, LOOP_LINEAR_DW, LOOP_ATTENTION, /* plain */
    LOOP_BACK, LOOP_FAST_ATTENTION, LOOP_GATHER, LOOP_EXPERTS, LOOPS /* the engine's */
};
static long split[LOOPS];

static int has_loop(const dsv3_context *ctx, int kind) {
    if (kind <= LOOP_SCATTER) return 1;
    return (kind >= LOOP_BACK) == (ctx->ops->own != NULL);
}

static void count_loop(dsv3_task task, const void *arg) {
    static const dsv3_task tasks[LOOPS] = {
        dsv3i_loss_backward_task, dsv3i_silu_backward_task, dsv3i_router_backward_task, dsv3i_evaluate_balance_task,
        dsv3i_embed_backward_task, dsv3i_mla_rotate_backward_task, dsv3i_norm_dx_task, dsv3i_norm_dg_task,
        dsv3i_squares_task, dsv3i_adamw_task, dsv3i_ema_task, dsv3i_copy_task, dsv3i_moe_combine_task,
        dsv3i_linear_dx_task, dsv3i_linear_dw_task, dsv3i_attend_backward_task,
#ifdef DSV3I_ENGINE
        dsv3i_backward_task, dsv3i_fast_attend_backward_task, dsv3i_gather_back_task, dsv3i_expert_back_task
#endif
    };
    if (task == dsv3i_moe_combine_task && ((const dsv3i_rows *)arg)->r != NULL) return; /* forward */
    for (int i = 0; i < LOOPS; i++) split[i] += tasks[i] == task;
}

typedef struct piece_worker {
    dsv3_task task;
    void *arg;
    size_t n, worker, threads;
} piece_worker;

static void *work_pieces(void *p) {
    const piece_worker *w = (const piece_worker *)p;
    for (size_t begin = 3 * w->worker; begin < w->n; begin += 3 * w->threads) {
        w->task(w->arg, begin, begin + 3 < w->n ? begin + 3 : w->n, w->worker);
    }
    return NULL;
}

/* Threads of the system: worker w takes every threads-th piece of three items. */
static void parallel_threads(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    pthread_t thread[16];
    piece_worker worker[16];
    (void)user;
    count_loop(task, arg);
    if (threads > 16) exit(2);
    for (size_t i = 0; i < threads; i++) {
        worker[i].task = task, worker[i].arg = arg, worker[i].n = n, worker[i].worker = i;
        worker[i].threads = threads;
        if (i > 0 && pthread_create(&thread[i], NULL, work_pieces, &worker[i]) != 0) exit(2);
    }
    work_pieces(&worker[0]);
    for (size_t i = 1; i < threads; i++) pthread_join(thread[i], NULL);
}

/* One thread, but pieces of odd sizes from the last to the first, under changing worker numbers. */
static void parallel_backwards(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    static const size_t sizes[] = {1, 4, 2, 7, 1, 11, 3};
    size_t end = n, k = 0;
    (void)user;
    count_loop(task, arg);
    while (end > 0) {
        size_t size = sizes[k % 7], begin = end > size ? end - size : 0;
        task(arg, begin, end, k++ % threads);
        end = begin;
    }
}

enum { HOW_SERIAL, HOW_THREADS, HOW_BACKWARDS, HOW_OPENMP };

static void set_how(dsv3_context *ctx, int how, size_t threads) {
    synth_demand(dsv3_context_init(ctx, test_backend(), how == HOW_OPENMP ? threads : 1, NULL), "context", NULL);
    if (how != HOW_OPENMP) ctx->parallel_for = NULL;
    if (how == HOW_THREADS) ctx->parallel_for = parallel_threads;
    if (how == HOW_BACKWARDS) ctx->parallel_for = parallel_backwards;
    if (how != HOW_OPENMP) ctx->threads = threads;
}

/* Large enough that loops are worth splitting. */
static void prepare_wide(subject *a) {
    static const int lengths[] = {40, 24, 0};
    prepare(a, lengths);
    synth_sizes(&a->c, 600, 64, 96, 64, 2, 1);
    synth_attention(&a->c, 4, 24, 32, 16, 8, 16);
    synth_experts(&a->c, 8, 1, 2, 1, 1, 1.0f);
    for (size_t i = 0; i < a->text.rows; i++) a->token[i] = (int32_t)(test_random() % 600);
}

/* The weights after three steps, and their moving average. */
static float *three_steps(int how, size_t threads, dsv3_compute way, size_t *count) {
    subject a;
    float *w;
    prepare_wide(&a);
    a.s.ema = 1;
    open_trainer(&a, threads);
    set_how(&a.ctx, how, threads);
    a.ctx.compute = way;
    for (int i = 0; i < 3; i++) step(&a, 0.01);
    *count = 2 * a.t.weights.count;
    w = (float *)test_alloc(*count * sizeof *w);
    memcpy(w, a.t.weights.data, *count / 2 * sizeof *w);
    memcpy(w + *count / 2, a.t.ema, *count / 2 * sizeof *w);
    close_trainer(&a);
    return w;
}

/* Nor does rounding of activations matter: training is always exact. */
static void test_threads(void) {
    static const struct {
        int how;
        size_t threads;
        dsv3_compute way;
    } ways[] = {{HOW_THREADS, 2, DSV3_EXACT},   {HOW_THREADS, 3, DSV3_EXACT},   {HOW_THREADS, 4, DSV3_EXACT},
                {HOW_THREADS, 7, DSV3_EXACT},   {HOW_BACKWARDS, 3, DSV3_EXACT}, {HOW_BACKWARDS, 7, DSV3_EXACT},
                {HOW_BACKWARDS, 2, DSV3_EXACT}, {HOW_OPENMP, 3, DSV3_EXACT},    {HOW_SERIAL, 1, DSV3_FAST}};
    size_t count;
    dsv3_context ctx;
    float *want = three_steps(HOW_SERIAL, 1, DSV3_EXACT, &count);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        float *got = three_steps(ways[i].how, ways[i].threads, ways[i].way, &count);
        char text[100];
        snprintf(text, sizeof text, "weights after three steps, way %d, %zu threads, compute %d", ways[i].how,
                 ways[i].threads, (int)ways[i].way);
        test_count(same_floats(got, want, count), __FILE__, __LINE__, text);
        free(got);
    }
    synth_demand(dsv3_context_init(&ctx, test_backend(), 1, NULL), "context", NULL);
    for (int i = 0; i < LOOPS; i++) CHECK_EQ(split[i] > 0, has_loop(&ctx, i));
    free(want);
}

/* RMSNorm's loops, over more columns than one piece has. */
static void test_wide_loops(void) {
    enum { N = 260, WIDTH = 520 };
    float *x = (float *)test_alloc(N * WIDTH * sizeof *x), *dy = (float *)test_alloc(N * WIDTH * sizeof *dy);
    float *dx = (float *)test_alloc(2 * N * WIDTH * sizeof *dx), dg[2][WIDTH], gain[WIDTH], scratch[N];
    dsv3_tensor g;
    memset(&g, 0, sizeof g);
    g.data = gain, g.rows = 1, g.cols = WIDTH, g.rank = 1;
    test_fill(x, N * WIDTH, -1, 1);
    test_fill(dy, N * WIDTH, -1, 1);
    test_fill(gain, WIDTH, 0.5f, 1.5f);
    for (int how = 0; how < 2; how++) {
        dsv3_context ctx;
        set_how(&ctx, how == 0 ? HOW_SERIAL : HOW_BACKWARDS, 3);
        memset(dx + how * N * WIDTH, 0, N * WIDTH * sizeof *dx);
        memset(dg[how], 0, sizeof dg[how]);
        dsv3_rmsnorm_backward(&ctx, dx + how * N * WIDTH, dg[how], dy, x, &g, N, 1e-6f, scratch, NULL);
    }
    CHECK(same_floats(dx, dx + N * WIDTH, N * WIDTH) && same_floats(dg[0], dg[1], WIDTH));
    CHECK(split[LOOP_NORM_DX] > 0 && split[LOOP_NORM_DG] > 0);
    free(x), free(dy), free(dx);
}

static void test_norm_threads(void) {
    static const int lengths[] = {2, 0};
    subject a;
    double norm[2], sum = 0;
    dsv3_error error;
    prepare(&a, lengths);
    a.c.vocab_size = 16500; /* x 16: many pieces */
    open_trainer(&a, 3);
    for (int how = 0; how < 2; how++) {
        set_how(&a.ctx, how == 0 ? HOW_SERIAL : HOW_THREADS, 3);
        gradients(&a);
        test_state = 5;
        test_fill(a.t.gradients.data, a.t.gradients.count, -1, 1);
        demand(dsv3_train_end(&a.ctx, &a.t, 0.0, &norm[how], &error), &error);
    }
    CHECK(memcmp(&norm[0], &norm[1], sizeof norm[0]) == 0);
    CHECK(split[LOOP_SQUARES] > 0);
    for (size_t i = 0; i < a.t.gradients.count; i++) sum += pow((double)a.t.gradients.data[i], 2);
    {
        static listing l; /* biases have no gradients, whatever stands there */
        list_tensors(&l, &a.c);
        for (size_t i = 0; i < l.count; i++) {
            for (size_t j = 0; is_bias(&l.item[i].info) && j < l.item[i].n; j++) {
                sum -= pow((double)a.t.gradients.data[l.item[i].at + j], 2);
            }
        }
    }
    CHECK(fabs(norm[0] - sqrt(sum)) < 1e-9 * sqrt(sum));
    close_trainer(&a);
}

/* ---- AdamW against a second opinion in double */

typedef struct oracle {
    double *w, *m, *v, *ema;
    double product1, product2; /* beta^t */
    uint64_t steps;
} oracle;

static void oracle_open(oracle *o, const subject *a) {
    size_t n = a->t.weights.count;
    o->w = synth_doubles(n), o->m = synth_doubles(n), o->v = synth_doubles(n), o->ema = synth_doubles(n);
    for (size_t i = 0; i < n; i++) o->w[i] = (double)a->t.weights.data[i], o->m[i] = o->v[i] = o->ema[i] = 0;
    o->product1 = o->product2 = 1;
    o->steps = 0;
}

static void oracle_close(oracle *o) { free(o->w), free(o->m), free(o->v), free(o->ema); }

/* frozen, exempt: of tensor i of the list. Returns the norm. */
static double oracle_step(oracle *o, const subject *a, const listing *l, const int *frozen, const int *exempt,
                          double rate) {
    const dsv3_training *s = &a->t.settings;
    const float *g = a->t.gradients.data;
    double squares = 0, scale;
    o->product1 *= (double)s->beta1, o->product2 *= (double)s->beta2;
    for (size_t i = 0; i < l->count; i++) {
        for (size_t j = l->item[i].at; !frozen[i] && j < l->item[i].at + l->item[i].n; j++) {
            squares += pow((double)g[j], 2);
        }
    }
    scale = s->clip > 0 && sqrt(squares) > (double)s->clip ? (double)s->clip / sqrt(squares) : 1;
    for (size_t i = 0; i < l->count; i++) {
        double decay = l->item[i].info.rank == 2 && !exempt[i] ? rate * (double)s->weight_decay : 0;
        for (size_t j = l->item[i].at; !frozen[i] && j < l->item[i].at + l->item[i].n; j++) {
            double x = scale * (double)g[j];
            o->m[j] = (double)s->beta1 * o->m[j] + (1 - (double)s->beta1) * x;
            o->v[j] = (double)s->beta2 * o->v[j] + (1 - (double)s->beta2) * x * x;
            o->w[j] -= decay * o->w[j];
            o->w[j] -= rate * (o->m[j] / (1 - o->product1)) / (sqrt(o->v[j] / (1 - o->product2)) + (double)s->eps);
        }
    }
    return sqrt(squares);
}

static void oracle_average(oracle *o, const subject *a, size_t n) {
    double decay = o->steps++ == 0 ? 0 : a->t.settings.ema_decay;
    for (size_t j = 0; j < n; j++) o->ema[j] = decay * o->ema[j] + (1 - decay) * o->w[j];
}

/* The biases move by their own rule: the oracle takes them as they are. */
static void oracle_take_biases(oracle *o, const subject *a, const listing *l) {
    for (size_t i = 0; i < l->count; i++) {
        for (size_t j = 0; is_bias(&l->item[i].info) && j < l->item[i].n; j++) {
            o->w[l->item[i].at + j] = (double)a->t.weights.data[l->item[i].at + j];
        }
    }
}

static int ends_with(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

static void judge_tensor(const subject *a, const oracle *o, const listed *x, const float *before, int frozen) {
    char text[300];
    double worst = 0, largest = 0;
    for (size_t j = x->at; j < x->at + x->n; j++) {
        double e = fabs((double)a->t.weights.data[j] - o->w[j]);
        if (!(e <= worst)) worst = e;
        largest = fmax(largest, fabs(o->w[j]));
    }
    snprintf(text, sizeof text, "AdamW: %s: error %.3g of %.3g", x->info.name, worst, largest);
    test_count(worst <= 2e-6 * largest, __FILE__, __LINE__, text);
    snprintf(text, sizeof text, "AdamW: %s %s", x->info.name, frozen ? "has moved" : "has not moved");
    test_count(is_bias(&x->info) || same_floats(a->t.weights.data + x->at, before + x->at, x->n) == frozen, __FILE__,
               __LINE__, text);
}

/* Six steps with changing rates; clipping at times; two patterns of frozen and two of exempt tensors. eps is large, so
 * that gradients near 0 do not turn rounding into steps of their own. */
static void test_adamw(double clip, int patterns) {
    static const int lengths[] = {9, 14, 7, 0};
    static const char *const frozen_names[] = {"model.layers.1.*experts.*.up_proj.weight", "model.norm.weight", NULL};
    static const char *const exempt_names[] = {"*embed_tokens*", "lm_head.weight", NULL};
    static listing l;
    int frozen[512], exempt[512], clipped = 0;
    subject a;
    oracle o;
    float *before, *got;
    size_t n;
    prepare(&a, lengths);
    a.s.ema = 1;
    a.s.ema_decay = 0.75;
    a.s.clip = (float)clip;
    a.s.eps = 1e-3f;
    if (patterns) a.s.frozen = frozen_names, a.s.exempt = exempt_names;
    open_trainer(&a, 1);
    list_tensors(&l, &a.c);
    for (size_t i = 0; i < l.count; i++) {
        const char *name = l.item[i].info.name;
        frozen[i] = is_bias(&l.item[i].info);
        if (patterns && strncmp(name, "model.layers.1.", 15) == 0 && ends_with(name, "up_proj.weight")) {
            frozen[i] = l.item[i].info.expert >= 0;
        }
        if (patterns && strcmp(name, "model.norm.weight") == 0) frozen[i] = 1;
        exempt[i] =
            patterns && (strcmp(name, "model.embed_tokens.weight") == 0 || strcmp(name, "lm_head.weight") == 0);
    }
    n = a.t.weights.count;
    CHECK_EQ(n, l.floats);
    before = copy_floats(a.t.weights.data, n);
    oracle_open(&o, &a);
    for (int i = 0; i < 6; i++) {
        double rate = 0.01 / (1 + i), norm = 0, want;
        dsv3_error error;
        gradients(&a);
        want = oracle_step(&o, &a, &l, frozen, exempt, rate);
        demand(dsv3_train_end(&a.ctx, &a.t, rate, &norm, &error), &error);
        CHECK(fabs(norm - want) <= 1e-9 * want);
        clipped += clip > 0 && norm > clip;
        oracle_take_biases(&o, &a, &l);
        oracle_average(&o, &a, n);
        CHECK_EQ(a.t.step, i + 1);
    }
    CHECK(clip > 0 ? clipped > 0 : clipped == 0);
    for (size_t i = 0; i < l.count; i++) {
        int none =
            largest_of(a.t.m + l.item[i].at, l.item[i].n) <= 0; /* an expert nobody chose, exempt or without decay */
        judge_tensor(&a, &o, &l.item[i], before, frozen[i] || (none && (exempt[i] || l.item[i].info.rank == 1)));
        if (frozen[i]) CHECK(none && largest_of(a.t.v + l.item[i].at, l.item[i].n) <= 0);
    }
    got = a.t.ema;
    CHECK_CLOSE(got, o.ema, n, 2e-6);
    oracle_close(&o);
    free(before);
    close_trainer(&a);
}

/* Averages that move by less than float32 resolves: of single weights nothing can be said, of all together they keep up
 * with a second opinion in double. */
static void test_slow_average(void) {
    static const int lengths[] = {9, 14, 7, 0};
    static const double decays[] = {0.9, 0.999, 0.99999, 0.9999999, 0.999999999};
    for (size_t i = 0; i < sizeof decays / sizeof *decays; i++) {
        subject a;
        float *first;
        double *want, moved = 0, far = 0, worst = 0;
        size_t n;
        prepare(&a, lengths);
        a.c.vocab_size = 4000; /* many weights */
        a.s.ema = 1, a.s.ema_decay = decays[i];
        open_trainer(&a, 1);
        a.s.weight_decay = a.t.settings.weight_decay = 100; /* they all move */
        step(&a, 1e-3);
        n = a.t.weights.count;
        CHECK(same_floats(a.t.ema, a.t.weights.data, n));
        first = copy_floats(a.t.ema, n);
        want = synth_doubles(n);
        for (size_t j = 0; j < n; j++) want[j] = (double)first[j];
        for (int k = 0; k < 12; k++) {
            step(&a, 1e-3);
            for (size_t j = 0; j < n; j++) want[j] += (1 - decays[i]) * ((double)a.t.weights.data[j] - want[j]);
        }
        for (size_t j = 0; j < n; j++) { /* along the way of each */
            double sign = want[j] > (double)first[j] ? 1 : -1;
            moved += sign * ((double)a.t.ema[j] - (double)first[j]);
            far += sign * (want[j] - (double)first[j]);
            worst = fmax(worst, fabs((double)a.t.ema[j] - want[j]) / fmax(fabs(want[j]), 1e-3));
        }
        CHECK(far > 0 && fabs(moved / far - 1) < (i < 4 ? 0.02 : 0.2));
        CHECK(worst < 12 * 1.2e-7);
        free(first), free(want);
        close_trainer(&a);
    }
}

/* Does the pattern freeze exactly the tensors whose names match? */
static void test_patterns(void) {
    static const int lengths[] = {4, 0};
    static const struct {
        const char *pattern;
        int matches;
    } cases[] = {{"model.norm.weight", 1},
                 {"model.norm.weigh", 0},
                 {"odel.norm.weight", 0},
                 {"model.norm.weight*", 1},
                 {"*", 1},
                 {"*norm*", 1},
                 {"*.norm.*t", 1},
                 {"model.*.weight", 1},
                 {"**model*norm**", 1},
                 {"*layernorm*", 0},
                 {"", 0},
                 {"model.norm.weight.x", 0},
                 {"m*m*m*weight", 0},
                 {"m*l*.*.*", 1},
                 {"*weight.*", 0},
                 {"*.weight", 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *names[3] = {"nothing at all", NULL, NULL};
        subject a;
        place p;
        float before;
        char text[100];
        names[1] = cases[i].pattern;
        prepare(&a, lengths);
        a.s.frozen = names;
        open_trainer(&a, 1);
        p = place_of(&a, "model.norm.weight");
        before = a.t.weights.data[p.at];
        step(&a, 0.1);
        snprintf(text, sizeof text, "pattern \"%s\"", cases[i].pattern);
        test_count(same_floats(&before, &a.t.weights.data[p.at], 1) == cases[i].matches, __FILE__, __LINE__, text);
        close_trainer(&a);
    }
}

/* Gradients of 0 move nothing but what decays. */
static void test_decay(void) {
    static const int lengths[] = {4, 0};
    static listing l;
    subject a;
    float *before;
    prepare(&a, lengths);
    open_trainer(&a, 1);
    before = copy_floats(a.t.weights.data, a.t.weights.count);
    gradients(&a);
    memset(a.t.gradients.data, 0, a.t.gradients.count * sizeof(float));
    a.t.balancer.schedule.speed = 0;
    demand(dsv3_train_end(&a.ctx, &a.t, 0.5, NULL, NULL), NULL);
    list_tensors(&l, &a.c);
    for (size_t i = 0; i < l.count; i++) {
        double factor = l.item[i].info.rank == 2 ? 1 - 0.5 * 0.1 : 1, worst = 0;
        for (size_t j = l.item[i].at; j < l.item[i].at + l.item[i].n; j++) {
            worst = fmax(worst, fabs((double)a.t.weights.data[j] - factor * (double)before[j]));
        }
        test_count(worst < 1e-7, __FILE__, __LINE__, l.item[i].info.name);
    }
    free(before);
    close_trainer(&a);
}

/* ---- The bias step belongs to the step */

static void test_bias(void) {
    static const int lengths[] = {9, 14, 7, 0};
    subject a;
    place p;
    uint64_t load[6];
    prepare(&a, lengths);
    open_trainer(&a, 1);
    a.t.balancer.schedule.speed = 0.125;
    a.t.balancer.schedule.freeze = 2;
    gradients(&a);
    memcpy(load, a.t.balancer.load + 1 * 6, sizeof load);
    demand(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, NULL), NULL);
    p = place_of(&a, "model.layers.1.mlp.gate.e_score_correction_bias");
    for (size_t e = 0; e < 6; e++) { /* 30 rows, 2 choices, 6 experts: 10 each */
        double want = load[e] < 10 ? 0.125 : load[e] > 10 ? -0.125 : 0;
        CHECK(fabs((double)a.t.weights.data[p.at + e] - want) < 1e-7);
        CHECK_EQ(a.t.balancer.load[6 + e], 0);
        CHECK_EQ(a.t.balancer.load_all[6 + e], load[e]);
    }
    step(&a, 0.01);
    {
        float *frozen = copy_floats(a.t.weights.data + p.at, 6); /* the schedule counts steps: two have been done */
        step(&a, 0.01);
        CHECK(same_floats(frozen, a.t.weights.data + p.at, 6));
        free(frozen);
    }
    CHECK(largest_of(a.t.m + p.at, p.n) <= 0 && largest_of(a.t.gradients.data + p.at, p.n) <= 0);
    close_trainer(&a);
}

/* A frozen bias stays, and only that; the loads are counted as ever. */
static void test_frozen_bias(void) {
    static const int lengths[] = {9, 14, 7, 0};
    static const char *const names[] = {"model.layers.1.*_bias", NULL};
    subject a;
    place frozen, other;
    prepare(&a, lengths);
    a.s.frozen = names;
    open_trainer(&a, 1);
    a.t.balancer.schedule.speed = 0.125;
    frozen = place_of(&a, "model.layers.1.mlp.gate.e_score_correction_bias");
    other = place_of(&a, "model.layers.2.mlp.gate.e_score_correction_bias");
    for (size_t e = 0; e < 6; e++) a.t.weights.data[frozen.at + e] = a.t.weights.data[other.at + e] = 0.5f;
    step(&a, 0.01);
    for (size_t e = 0; e < 6; e++) CHECK(fabs((double)a.t.weights.data[frozen.at + e] - 0.5) <= 0);
    CHECK(largest_of(a.t.weights.data + other.at, 6) > 0.6);
    CHECK(a.t.balancer.load_all[6] + a.t.balancer.load_all[7] + a.t.balancer.load_all[8] > 0);
    close_trainer(&a);
}

/* ---- Failed steps leave no traces */

typedef struct snapshot {
    float *w, *m, *v, *ema;
    uint64_t step;
} snapshot;

static snapshot snapshot_take(const subject *a) {
    size_t n = a->t.weights.count;
    snapshot s;
    s.w = copy_floats(a->t.weights.data, n);
    s.m = copy_floats(a->t.m, n);
    s.v = copy_floats(a->t.v, n);
    s.ema = copy_floats(a->t.ema, n);
    s.step = a->t.step;
    return s;
}

/* Compares and frees. */
static int snapshot_same(snapshot *s, const subject *a) {
    size_t n = a->t.weights.count;
    int same = same_floats(s->w, a->t.weights.data, n) && same_floats(s->m, a->t.m, n) &&
               same_floats(s->v, a->t.v, n) && same_floats(s->ema, a->t.ema, n) && s->step == a->t.step;
    free(s->w), free(s->m), free(s->v), free(s->ema);
    return same;
}

static void prepare_failing(subject *a) {
    static const int lengths[] = {9, 14, 7, 0};
    prepare(a, lengths);
    a->s.ema = 1;
    open_trainer(a, 1);
    step(a, 0.01);
}

static void test_not_finite(void) {
    static const char *const names[] = {"model.embed_tokens.weight",
                                        "model.layers.0.self_attn.o_proj.weight",
                                        "model.layers.1.mlp.gate.weight",
                                        "model.layers.2.mlp.experts.0.up_proj.weight",
                                        "lm_head.weight",
                                        "model.layers.3.eh_proj.weight"};
    dsv3_error error;
    double norm = 0;
    subject a;
    snapshot s;
    prepare_failing(&a);
    for (size_t i = 0; i < 6; i++) { /* the forward pass notices */
        place p = place_of(&a, names[i]);
        float keep = a.t.weights.data[p.at];
        dsv3_result result;
        a.t.weights.data[p.at] = INFINITY;
        if (i == 0) a.t.weights.data[p.at + (size_t)a.token[0] * 16] = INFINITY;
        s = snapshot_take(&a);
        demand(dsv3_train_begin(&a.t, a.targets, a.sequences, NULL), NULL);
        result = dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error);
        if (result == DSV3_OK) result = dsv3_train_end(&a.ctx, &a.t, 0.01, &norm, &error);
        test_count(result == DSV3_ERR_NAN && error.code == DSV3_ERR_NAN, __FILE__, __LINE__, names[i]);
        CHECK(snapshot_same(&s, &a));
        a.t.weights.data[p.at] = keep;
        if (i == 0) a.t.weights.data[p.at + (size_t)a.token[0] * 16] = keep;
    }
    for (int i = 0; i < 3; i++) { /* gradients that only the end sees */
        static const float bad[] = {INFINITY, -INFINITY, NAN};
        gradients(&a);
        a.t.gradients.data[i == 0 ? 0 : a.t.gradients.count - (size_t)i] = bad[i];
        s = snapshot_take(&a);
        CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, &norm, &error), DSV3_ERR_NAN);
        CHECK(!(norm <= DBL_MAX));
        CHECK(snapshot_same(&s, &a));
    }
    for (int i = 0; i < 2; i++) step(&a, 0.01); /* and training goes on */
    CHECK_EQ(a.t.step, 3);
    CHECK(largest_of(a.t.weights.data, a.t.weights.count) < 10);
    close_trainer(&a);
}

/* Finite weights, finite loss, but gradients beyond float: a head of 1e38 behind a norm of 2e-38. */
static void test_overflow(void) {
    static const uint64_t one[2] = {1, 1}; /* each term has weight 1 */
    subject a;
    snapshot s;
    dsv3_error error;
    place p;
    prepare_failing(&a);
    p = place_of(&a, "lm_head.weight");
    for (size_t i = p.at; i < p.at + p.n; i++) a.t.weights.data[i] = 1.5e38f * test_uniform(-2, 2);
    for (int depth = 0; depth < 2; depth++) {
        p = place_of(&a, depth ? "model.layers.3.shared_head.norm.weight" : "model.norm.weight");
        for (size_t i = p.at; i < p.at + p.n; i++) a.t.weights.data[i] = 2e-38f;
    }
    s = snapshot_take(&a);
    demand(dsv3_train_begin(&a.t, one, a.sequences, NULL), NULL);
    CHECK_EQ(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), DSV3_OK);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_NAN);
    CHECK(snapshot_same(&s, &a));
    close_trainer(&a);
}

static void test_all_ignored(void) {
    subject a;
    double norm = 1;
    prepare_failing(&a);
    for (size_t i = 0; i < a.text.rows; i++) a.target[i] = DSV3_IGNORE;
    a.text.target = a.target;
    a.t.settings.balance.expert = 0;
    a.targets[0] = a.targets[1] = a.sequences = 0;
    dsv3_text_count(&a.text, 1, a.targets, &a.sequences, NULL);
    CHECK_EQ(a.targets[0], 0);
    CHECK_EQ(a.targets[1], 0);
    CHECK_EQ(a.sequences, 3);
    for (int divisor = 0; divisor < 2; divisor++) {
        a.t.settings.divisor = divisor ? DSV3_DIVIDE_BY_VALID : DSV3_DIVIDE_BY_MAIN;
        gradients(&a);
        CHECK(dsv3_train_loss(&a.t) >= 0 && dsv3_train_loss(&a.t) <= 0);
        CHECK(largest_of(a.t.gradients.data, a.t.gradients.count) <= 0);
    }
    demand(dsv3_train_end(&a.ctx, &a.t, 0.01, &norm, NULL), NULL);
    CHECK(norm >= 0 && norm <= 0);
    CHECK(largest_of(a.t.weights.data, a.t.weights.count) < 10);
    close_trainer(&a);
}

/* A step that was begun for no targets, or no sequences, weighs what comes all the same by nothing. */
static void test_none_expected(void) {
    static const uint64_t none[2] = {0, 0};
    subject a;
    dsv3_error error;
    float *want;
    double loss;
    prepare_failing(&a);
    a.t.settings.balance.expert = 0;
    gradients(&a);
    want = copy_floats(a.t.gradients.data, a.t.gradients.count);
    loss = dsv3_train_loss(&a.t);
    a.t.settings.balance.expert = 0.01;
    demand(dsv3_train_begin(&a.t, a.targets, 0, NULL), NULL);
    demand(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), &error);
    for (size_t i = 0; i < a.t.gradients.count; i++) want[i] -= a.t.gradients.data[i];
    CHECK(largest_of(a.t.gradients.data, a.t.gradients.count) > 0 && largest_of(want, a.t.gradients.count) <= 0);
    CHECK(loss > 1 && !(fabs(dsv3_train_loss(&a.t) - loss) > 0));
    for (int divisor = 0; divisor < 2; divisor++) {
        a.t.settings.divisor = divisor ? DSV3_DIVIDE_BY_VALID : DSV3_DIVIDE_BY_MAIN;
        demand(dsv3_train_begin(&a.t, none, 0, NULL), NULL);
        demand(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), &error);
        CHECK(a.t.losses.targets[0] > 0 && a.t.losses.targets[1] > 0);
        CHECK(!(fabs(dsv3_train_loss(&a.t)) > 0) && largest_of(a.t.gradients.data, a.t.gradients.count) <= 0);
    }
    free(want);
    close_trainer(&a);
}

/* ---- Ranks */

typedef struct ranks {
    const float *other;
    const uint64_t *other_load;
    size_t n, n_load;
    dsv3_result result;
    int calls;
} ranks;

static dsv3_result reduce_gradients(void *user, float *g, size_t n) {
    ranks *r = (ranks *)user;
    r->calls++;
    CHECK_EQ(n, r->n);
    for (size_t i = 0; r->result == DSV3_OK && i < n; i++) g[i] += r->other[i];
    return r->result;
}

static dsv3_result reduce_loads(void *user, uint64_t *load, size_t n) {
    ranks *r = (ranks *)user;
    r->calls++;
    CHECK_EQ(n, r->n_load);
    for (size_t i = 0; r->result == DSV3_OK && i < n; i++) load[i] += r->other_load[i];
    return r->result;
}

static void open_rank(subject *a, size_t begin, size_t end) {
    static const int lengths[] = {9, 14, 7, 0};
    prepare(a, lengths);
    a->s.eps = 1e-3f;
    a->s.clip = 0.25f; /* of the sum, not of each rank's */
    open_trainer(a, 1);
    a->t.balancer.schedule.speed = 0.125;
    a->text.rows = end - begin;
    a->text.token += begin;
    a->text.sequence += begin;
}

static void test_ranks(void) {
    subject whole, one, two;
    ranks r;
    float *want;
    size_t loads;
    double norm[2];
    dsv3_error error;
    open_rank(&whole, 0, 30);
    open_rank(&one, 0, 9);
    open_rank(&two, 9, 30);
    gradients(&whole); /* targets were counted over the whole text, for all three */
    gradients(&one);
    gradients(&two);
    loads = whole.t.balancer.layers * whole.t.balancer.experts;
    want = copy_floats(whole.t.gradients.data, whole.t.gradients.count);
    demand(dsv3_train_end(&whole.ctx, &whole.t, 0.01, &norm[0], &error), &error);
    memset(&r, 0, sizeof r);
    r.other = two.t.gradients.data, r.n = two.t.gradients.count;
    r.other_load = two.t.balancer.load, r.n_load = loads;
    one.t.settings.reduce = reduce_gradients, one.t.settings.reduce_user = &r;
    one.t.balancer.reduce = reduce_loads, one.t.balancer.reduce_user = &r;
    demand(dsv3_train_end(&one.ctx, &one.t, 0.01, &norm[1], &error), &error);
    CHECK_EQ(r.calls, 2);
    compare_parameters(&one, one.t.gradients.data, want, 1e-6, "ranks, gradients");
    compare_parameters(&one, one.t.weights.data, whole.t.weights.data, 1e-6, "ranks, weights");
    CHECK(memcmp(one.t.balancer.load_all, whole.t.balancer.load_all, loads * sizeof(uint64_t)) == 0);
    CHECK(fabs(norm[0] - norm[1]) < 1e-6 * norm[0]);
    free(want);
    close_trainer(&whole), close_trainer(&one), close_trainer(&two);
}

/* A hook that fails ends the step with its code, and nothing has been trained. */
static void test_failing_hooks(void) {
    subject a;
    snapshot s;
    ranks r;
    dsv3_error error;
    memset(&r, 0, sizeof r);
    prepare_failing(&a);
    r.n = a.t.gradients.count;
    r.n_load = a.t.balancer.layers * a.t.balancer.experts;
    r.result = DSV3_ERR_FULL;
    a.t.settings.reduce = reduce_gradients, a.t.settings.reduce_user = &r;
    gradients(&a);
    s = snapshot_take(&a);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_FULL);
    CHECK_EQ(error.code, DSV3_ERR_FULL);
    CHECK(snapshot_same(&s, &a));
    a.t.settings.reduce = NULL;
    a.t.balancer.reduce = reduce_loads, a.t.balancer.reduce_user = &r;
    gradients(&a);
    s = snapshot_take(&a);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_FULL);
    CHECK_EQ(error.code, DSV3_ERR_FULL);
    CHECK(snapshot_same(&s, &a));
    close_trainer(&a);
}

/* ---- A step's numbers and its order: what is wrong is named, and changes nothing */

typedef struct bad_number {
    const char *name;
    size_t at;    /* in dsv3_training; SIZE_MAX: the rate */
    int is_float; /* else a double */
    double value;
} bad_number;

#define BAD_DOUBLE(field, value) {#field, offsetof(dsv3_training, field), 0, value}
#define BAD_FLOAT(field, value) {#field, offsetof(dsv3_training, field), 1, value}
#define BAD_SIGN(kind, field) kind(field, (double)NAN), kind(field, (double)INFINITY), kind(field, -1.0)
#define BAD_RATE(value) {"learning_rate", SIZE_MAX, 0, value}

static const bad_number bad_numbers[] = {
    BAD_RATE((double)NAN), BAD_RATE((double)INFINITY), BAD_RATE(-(double)INFINITY), BAD_RATE(1e39), BAD_RATE(-1e-3),
    BAD_RATE(1e38), /* a tenth of it is b1's share in the first step */
    BAD_SIGN(BAD_DOUBLE, lambda), BAD_SIGN(BAD_DOUBLE, balance.expert), BAD_SIGN(BAD_DOUBLE, balance.device),
    BAD_SIGN(BAD_DOUBLE, balance.communication), BAD_SIGN(BAD_FLOAT, beta1), BAD_FLOAT(beta1, 1),
    BAD_SIGN(BAD_FLOAT, beta2), BAD_FLOAT(beta2, 1), BAD_SIGN(BAD_FLOAT, eps), BAD_FLOAT(eps, 0),
    BAD_SIGN(BAD_FLOAT, weight_decay), BAD_SIGN(BAD_FLOAT, clip), BAD_SIGN(BAD_DOUBLE, ema_decay),
    BAD_DOUBLE(ema_decay, 1)};

static double set_number(subject *a, const bad_number *bad) {
    float narrow = (float)bad->value;
    char *to = (char *)&a->t.settings;
    if (bad->at == SIZE_MAX) return bad->value;
    to += bad->at;
    if (bad->is_float) memcpy(to, &narrow, sizeof narrow);
    if (!bad->is_float) memcpy(to, &bad->value, sizeof bad->value);
    return 0.01;
}

static dsv3_result never_reduce(void *user, float *g, size_t n) {
    (void)user, (void)g, (void)n;
    test_failed++;
    return DSV3_OK;
}

/* All of them, at the end of one step; then it ends as one that was never disturbed. */
static void test_bad_numbers(void) {
    subject a, b;
    float *want;
    prepare_failing(&b);
    step(&b, 0.01);
    want = copy_floats(b.t.weights.data, b.t.weights.count);
    close_trainer(&b);
    prepare_failing(&a);
    gradients(&a);
    for (size_t i = 0; i < sizeof bad_numbers / sizeof *bad_numbers; i++) {
        const dsv3_training keep = a.t.settings;
        double rate, norm = 7;
        dsv3_error error;
        char text[160];
        snapshot s = snapshot_take(&a);
        float *g = copy_floats(a.t.gradients.data, a.t.gradients.count);
        a.t.settings.reduce = never_reduce;
        rate = set_number(&a, &bad_numbers[i]);
        memset(&error, 0, sizeof error);
        snprintf(text, sizeof text, "%s %g", bad_numbers[i].name, bad_numbers[i].value);
        test_count(dsv3_train_end(&a.ctx, &a.t, rate, &norm, &error) == DSV3_ERR_ARG, __FILE__, __LINE__, text);
        test_count(error.code == DSV3_ERR_ARG && strcmp(error.name, bad_numbers[i].name) == 0, __FILE__, __LINE__, error.name);
        test_count(snapshot_same(&s, &a) && same_floats(g, a.t.gradients.data, a.t.gradients.count) && norm >= 7,
                   __FILE__, __LINE__, text);
        if (bad_numbers[i].at != SIZE_MAX) CHECK_EQ(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), DSV3_ERR_ARG);
        free(g);
        a.t.settings = keep;
    }
    a.t.settings.divisor = (dsv3_mtp_divisor)2;
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, NULL), DSV3_ERR_ARG);
    a.t.settings.divisor = DSV3_DIVIDE_BY_MAIN;
    {
        const dsv3_training keep = a.t.settings;
        snapshot s = snapshot_take(&a);
        a.t.settings.weight_decay = 1e30f; /* times the rate it is no float any more */
        CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 1e10, NULL, NULL), DSV3_ERR_ARG);
        CHECK(snapshot_same(&s, &a));
        a.t.settings = keep;
    }
    demand(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, NULL), NULL);
    CHECK(same_floats(want, a.t.weights.data, a.t.weights.count));
    free(want);
    close_trainer(&a);
}

/* What is at the edge of its domain is in it. */
static void test_edge_numbers(void) {
    subject a;
    prepare_failing(&a);
    a.t.settings.lambda = a.t.settings.balance.expert = 0;
    a.t.settings.beta1 = a.t.settings.beta2 = a.t.settings.weight_decay = a.t.settings.clip = 0;
    a.t.settings.ema_decay = 0;
    a.t.settings.divisor = DSV3_DIVIDE_BY_VALID;
    step(&a, 0);
    CHECK(same_floats(a.t.ema, a.t.weights.data, a.t.weights.count));
    a.t.settings.lambda = a.t.settings.balance.expert = 1e3;
    a.t.settings.eps = FLT_MIN;
    a.t.settings.clip = 1e30f;
    step(&a, 1e-3);
    close_trainer(&a);
}

static int always(void *user) { return user == NULL; }

/* A micro-batch that is refused has changed nothing; one that was aborted has, and the step is to be begun again. So has a
 * run that was loaded. */
static void test_order_after_errors(void) {
    subject a;
    dsv3_error error;
    size_t bytes = 0;
    void *saved;
    prepare_failing(&a);
    gradients(&a);
    a.token[3] = -1;
    CHECK_EQ(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), DSV3_ERR_TOKEN);
    a.token[3] = 1;
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_OK);
    gradients(&a);
    a.ctx.aborted = always;
    CHECK_EQ(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), DSV3_ERR_ABORTED);
    a.ctx.aborted = NULL;
    CHECK_EQ(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_save_size(&a.t, &bytes, NULL), DSV3_OK);
    saved = synth_alloc(bytes);
    CHECK_EQ(dsv3_trainer_save(&a.t, 0, saved, bytes, NULL), DSV3_OK);
    gradients(&a);
    CHECK_EQ(dsv3_trainer_load(&a.t, 0, saved, bytes, NULL), DSV3_OK);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_ARG);
    step(&a, 0.01);
    synth_release(saved);
    close_trainer(&a);
}

/* Begin, accumulate, end: nothing else ends a step, nor adds to one that is not begun. Of several ranks one may have no
 * text. */
static void test_order(void) {
    subject a;
    snapshot s;
    dsv3_error error;
    ranks r;
    prepare_failing(&a);
    s = snapshot_take(&a);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_ARG); /* twice */
    CHECK(strcmp(error.name, "trainer") == 0 && strstr(error.why, "has no step begun: dsv3_train_begin") == error.why);
    CHECK_EQ(dsv3_train_accumulate(&a.ctx, &a.t, &a.text, &error), DSV3_ERR_ARG);
    demand(dsv3_train_begin(&a.t, a.targets, a.sequences, NULL), NULL);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_ARG); /* without text */
    CHECK(strcmp(error.name, "trainer") == 0 && strcmp(error.why, "has accumulated nothing in this step") == 0);
    CHECK(snapshot_same(&s, &a));
    memset(&r, 0, sizeof r);
    r.n = a.t.gradients.count;
    r.other = a.t.weights.data; /* any finite numbers */
    a.t.settings.reduce = reduce_gradients, a.t.settings.reduce_user = &r;
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_OK);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_ARG);
    CHECK_EQ(r.calls, 1);
    r.result = DSV3_ERR_FULL; /* sums that a hook has touched are no use any more */
    gradients(&a);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_FULL);
    CHECK_EQ(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), DSV3_ERR_ARG);
    close_trainer(&a);
}

/* Finite gradients whose squares are not: the step is skipped, and the weight is trained again in the next. Clipping
 * makes them small. */
static void test_large_squares(void) {
    for (int clip = 0; clip < 3; clip++) {
        static const float clips[] = {0, 1, 1e30f};
        subject a;
        snapshot s;
        dsv3_error error;
        dsv3_result result;
        float before;
        prepare_failing(&a);
        a.t.settings.clip = clips[clip];
        gradients(&a);
        a.t.gradients.data[5] = 1e25f;
        s = snapshot_take(&a);
        result = dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error);
        CHECK_EQ(result, clip == 1 ? DSV3_OK : DSV3_ERR_NAN);
        CHECK_EQ(snapshot_same(&s, &a), clip != 1);
        before = a.t.weights.data[5];
        gradients(&a);
        a.t.gradients.data[5] = 0.5f;
        demand(dsv3_train_end(&a.ctx, &a.t, 0.01, NULL, &error), &error);
        CHECK(fabs((double)a.t.weights.data[5] - (double)before) > 1e-3);
        CHECK(largest_of(a.t.v, a.t.weights.count) <= FLT_MAX);
        close_trainer(&a);
    }
}

/* ---- Misuse */

static void test_memory(void) {
    static const int lengths[] = {9, 0};
    subject a;
    size_t bytes = 0, need = 0, most = (size_t)DSV3_MAX_SEQ + 1;
    dsv3_training s;
    dsv3_config bad = tiny_config();
    unsigned char *memory;
    prepare(&a, lengths);
    CHECK_EQ(dsv3_trainer_size(&a.c, &a.s, 1, &need, NULL), DSV3_OK);
    CHECK_EQ(dsv3_trainer_size(NULL, &a.s, 1, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_size(&a.c, NULL, 1, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_size(&a.c, &a.s, 1, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_size(&a.c, &a.s, 0, &bytes, NULL), DSV3_ERR_ARG);
    s = a.s, s.rows = 0;
    CHECK_EQ(dsv3_trainer_size(&a.c, &s, 1, &bytes, NULL), DSV3_ERR_ARG);
    s = a.s, s.sequences = 0;
    CHECK_EQ(dsv3_trainer_size(&a.c, &s, 1, &bytes, NULL), DSV3_ERR_ARG);
    s = a.s, s.longest = 0;
    CHECK_EQ(dsv3_trainer_size(&a.c, &s, 1, &bytes, NULL), DSV3_ERR_ARG);
    s = a.s, s.rows = most;
    CHECK_EQ(dsv3_trainer_size(&a.c, &s, 1, &bytes, NULL), DSV3_ERR_LIMIT);
    s = a.s, s.longest = most;
    CHECK_EQ(dsv3_trainer_size(&a.c, &s, 1, &bytes, NULL), DSV3_ERR_LIMIT);
    bad.hidden_size = 0;
    CHECK(dsv3_trainer_size(&bad, &a.s, 1, &bytes, NULL) != DSV3_OK);
    memory = (unsigned char *)test_alloc(need + 8);
    CHECK_EQ(dsv3_trainer_init(&a.c, NULL, &a.s, 1, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_init(NULL, &a.t, &a.s, 1, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_init(&a.c, &a.t, NULL, 1, memory, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_init(&a.c, &a.t, &a.s, 1, NULL, need, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_init(&a.c, &a.t, &a.s, 1, memory + 1, need, NULL), DSV3_ERR_ALIGN);
    CHECK_EQ(dsv3_trainer_init(&a.c, &a.t, &a.s, 1, memory, need - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_trainer_init(&a.c, &a.t, &a.s, 1, memory, need, NULL), DSV3_OK);
    CHECK(largest_of(a.t.weights.data, a.t.weights.count) <= 0);
    CHECK(largest_of(a.t.m, a.t.weights.count) <= 0 && largest_of(a.t.v, a.t.weights.count) <= 0);
    free(memory);
}

static dsv3_result try_text(subject *a, const dsv3_text *text, dsv3_error *error) {
    demand(dsv3_train_begin(&a->t, a->targets, a->sequences, NULL), NULL);
    memset(error, 0, sizeof *error);
    return dsv3_train_accumulate(&a->ctx, &a->t, text, error);
}

static void expect(subject *a, const dsv3_text *text, dsv3_result want) {
    dsv3_error error;
    CHECK_EQ(try_text(a, text, &error), want);
    CHECK_EQ(error.code, want);
}

/* A micro-batch of too many or too long sequences is refused, and the step that it was for goes on. */
static void refused_within_step(subject *a) {
    int32_t many[30], one[30] = {0};
    dsv3_text text = a->text;
    dsv3_error error;
    for (int i = 0; i < 30; i++) many[i] = i / 8; /* 0 .. 3, three are allowed */
    CHECK_EQ(try_text(a, &a->text, &error), DSV3_OK);
    text.sequence = many;
    CHECK_EQ(dsv3_train_accumulate(&a->ctx, &a->t, &text, &error), DSV3_ERR_ARG);
    CHECK(strcmp(error.name, "sequence[24]") == 0);
    text.sequence = one; /* of 14 at most */
    CHECK_EQ(dsv3_train_accumulate(&a->ctx, &a->t, &text, &error), DSV3_ERR_FULL);
    CHECK(strcmp(error.name, "sequence[14]") == 0);
    CHECK_EQ(dsv3_train_end(&a->ctx, &a->t, 0.0, NULL, &error), DSV3_OK);
}

static void test_misuse(void) {
    static const int lengths[] = {9, 14, 7, 0};
    static const int32_t bad_tokens[] = {-1, 29, INT32_MAX, INT32_MIN, DSV3_IGNORE};
    subject a;
    dsv3_text text;
    dsv3_error error;
    prepare(&a, lengths);
    a.s.rows = 30, a.s.sequences = 3, a.s.longest = 14;
    open_trainer(&a, 1);
    expect(&a, &a.text, DSV3_OK);
    refused_within_step(&a);
    CHECK_EQ(dsv3_train_begin(NULL, a.targets, 1, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_train_accumulate(NULL, &a.t, &a.text, &error), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_train_accumulate(&a.ctx, NULL, &a.text, &error), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_train_accumulate(&a.ctx, &a.t, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_train_end(NULL, &a.t, 0.1, NULL, &error), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_train_end(&a.ctx, NULL, 0.1, NULL, NULL), DSV3_ERR_ARG);
    text = a.text, text.token = NULL;
    expect(&a, &text, DSV3_ERR_ARG);
    text = a.text, text.rows = 0;
    expect(&a, &text, DSV3_ERR_ARG);
    text = a.text, text.rows = 31;
    expect(&a, &text, DSV3_ERR_MEMORY);
    a.ctx.threads = 2;
    expect(&a, &a.text, DSV3_ERR_MEMORY);
    a.ctx.threads = 1;
    for (size_t i = 0; i < 5; i++) {
        int32_t keep = a.token[11];
        a.token[11] = bad_tokens[i];
        expect(&a, &a.text, DSV3_ERR_TOKEN);
        a.token[11] = keep;
        if (bad_tokens[i] == DSV3_IGNORE) continue;
        text = a.text, text.target = a.target;
        keep = a.target[11];
        a.target[11] = bad_tokens[i];
        expect(&a, &text, DSV3_ERR_TOKEN);
        a.target[11] = keep;
    }
    a.sequence[29] = 3;
    expect(&a, &a.text, DSV3_ERR_ARG); /* a fourth sequence */
    a.sequence[29] = 1;
    expect(&a, &a.text, DSV3_ERR_ARG); /* falls */
    a.sequence[29] = 2;
    a.sequence[0] = -1;
    expect(&a, &a.text, DSV3_ERR_ARG);
    a.sequence[0] = 0;
    a.sequence[9] = 0, a.sequence[22] = 2;
    expect(&a, &a.text, DSV3_OK);
    for (size_t i = 9; i < 30; i++) a.sequence[i] = 1;
    expect(&a, &a.text, DSV3_ERR_FULL); /* 21 rows of one sequence */
    close_trainer(&a);
}

/* ---- Documents apart: losses, loads and gradients are, to the bit, those of texts of their own */

static void test_apart(void) {
    static const int lengths[] = {9, 14, 7, 0}, packed[] = {30, 0};
    subject alone, together;
    float *want;
    size_t loads;
    prepare(&alone, lengths);
    open_trainer(&alone, 1);
    gradients(&alone);
    want = copy_floats(alone.t.gradients.data, alone.t.gradients.count);
    prepare(&together, packed);
    together.s.sequences = 1, together.s.longest = 30;
    memcpy(together.token, alone.token, sizeof together.token);
    together.text.document = alone.sequence;
    for (together.text.apart = 0; together.text.apart < 2; together.text.apart++) {
        open_trainer(&together, 1);
        CHECK_EQ(together.targets[0] == alone.targets[0], 1); /* documents never had losses across the border */
        CHECK_EQ(together.sequences, together.text.apart ? 3 : 1);
        gradients(&together);
        loads = together.t.balancer.layers * (size_t)together.c.n_routed_experts;
        CHECK_EQ(same_floats(together.t.gradients.data, want, alone.t.gradients.count), together.text.apart);
        CHECK_EQ(memcmp(together.t.balancer.load, alone.t.balancer.load, loads * sizeof(uint64_t)) == 0, together.text.apart);
        CHECK_EQ(memcmp(together.t.losses.nll, alone.t.losses.nll, 2 * sizeof(double)) == 0, together.text.apart);
        if (together.text.apart) CHECK(!(fabs(dsv3_train_loss(&together.t) - dsv3_train_loss(&alone.t)) > 0));
        close_trainer(&together);
    }
    free(want);
    close_trainer(&alone);
}

/* ---- Observers see training, and may force the routing: experts that nobody chose have no gradient */

typedef struct watch {
    int hidden, routing, choose;
} watch;

static void watch_hidden(void *user, int32_t layer, const float *x, size_t n) {
    (void)layer, (void)x, (void)n;
    ((watch *)user)->hidden++;
}
static void watch_routing(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                          size_t n) {
    (void)layer, (void)score, (void)idx, (void)gate, (void)n;
    ((watch *)user)->routing++;
}
static void choose_first(void *user, int32_t layer, int32_t *idx, const float *score, size_t n) {
    (void)layer, (void)score;
    ((watch *)user)->choose++;
    for (size_t i = 0; i < 2 * n; i++) idx[i] = 4 * (int32_t)(i % 2); /* experts 0 and 4 */
}

static void test_observer(void) {
    static const int lengths[] = {9, 14, 7, 0};
    static listing l;
    watch w = {0, 0, 0};
    subject a;
    prepare(&a, lengths);
    open_trainer(&a, 1);
    a.ctx.observer.user = &w;
    a.ctx.observer.hidden = watch_hidden;
    a.ctx.observer.routing = watch_routing;
    a.ctx.observer.choose = choose_first;
    gradients(&a);
    CHECK_EQ(w.hidden, 4 + 2);
    CHECK_EQ(w.routing, 3);
    CHECK_EQ(w.choose, 3);
    list_tensors(&l, &a.c);
    for (size_t i = 0; i < l.count; i++) {
        const dsv3_tensor_info *info = &l.item[i].info;
        int none = is_bias(info) || (info->expert >= 0 && info->expert != 0 && info->expert != 4);
        test_count((largest_of(a.t.gradients.data + l.item[i].at, l.item[i].n) <= 0) == none, __FILE__, __LINE__,
                   info->name);
    }
    for (size_t e = 0; e < 6; e++) CHECK_EQ(a.t.balancer.load[6 + e], e == 0 || e == 4 ? 30 : 0);
    close_trainer(&a);
}

/* ---- Parameters */

/* The tensors written and the parameters read, which lie in the order of dsv3_model_tensors. */
typedef struct {
    const synth *written;
    const float *at;
} compared;

static dsv3_result same_tensor(void *user, const dsv3_tensor_info *info) {
    const synth_tensor *t;
    compared *both = (compared *)user;
    size_t n = info->rows * info->cols;
    double worst = 0;
    if (info->optional) return DSV3_OK;
    t = synth_tensor_of(both->written, info->name);
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)both->at[i] - t->value[i]);
        if (!(e <= 1e-6 * fabs(t->value[i]))) worst = e; /* code times scale rounds once */
    }
    test_count(worst <= 0, __FILE__, __LINE__, info->name);
    both->at += n;
    return DSV3_OK;
}

static void open_parameters(dsv3_parameters *q, void **memory, const dsv3_config *c) {
    size_t bytes = 0;
    synth_demand(dsv3_parameters_size(c, &bytes, NULL), "parameters size", NULL);
    *memory = synth_alloc(bytes);
    memset(*memory, 0xFF, bytes);
    synth_demand(dsv3_parameters_init(c, q, *memory, bytes, NULL), "parameters", NULL);
    CHECK(largest_of(q->data, q->count) <= 0);
}

static void test_load(int which) {
    synth *s = synth_open_named(which, 4);
    dsv3_parameters q;
    void *memory;
    compared both;
    open_parameters(&q, &memory, &s->config);
    CHECK_EQ(dsv3_parameters_from_model(&q, &s->model, NULL), DSV3_OK);
    both.written = s, both.at = q.data;
    synth_demand(dsv3_model_tensors(&s->config, same_tensor, &both, NULL), "compare", NULL);
    CHECK_EQ(both.at - q.data, q.count);
    CHECK_EQ(dsv3_parameters_from_model(NULL, &s->model, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_parameters_from_model(&q, NULL, NULL), DSV3_ERR_ARG);
    for (int k = 0; k < 3; k++) { /* bound to one thing, and then pointed to another */
        dsv3_tensor *odd = &s->model.layers[0].o_proj, was = *odd;
        dsv3_error error;
        if (k == 0) odd->data = NULL;
        if (k == 1) odd->rows++;
        if (k == 2) odd->cols++;
        CHECK_EQ(dsv3_parameters_from_model(&q, &s->model, &error), DSV3_ERR_MISMATCH);
        CHECK(strcmp(error.name, "model.layers.0.self_attn.o_proj.weight") == 0);
        CHECK(strstr(error.why, "is not there, or has another shape") != NULL);
        *odd = was;
    }
    s->config.vocab_size++;
    s->model.config.vocab_size++;
    CHECK_EQ(dsv3_parameters_from_model(&q, &s->model, NULL), DSV3_ERR_MISMATCH);
    synth_release(memory);
    synth_close(s);
}

static void test_load_modules(void) {
    synth *s = synth_open_named(SYNTH_MTP, 4);
    dsv3_parameters q;
    void *memory;
    size_t bytes = 0;
    open_parameters(&q, &memory, &s->config);
    s->model.n_mtp = 0; /* as of a file without them */
    CHECK_EQ(dsv3_parameters_from_model(&q, &s->model, NULL), DSV3_ERR_MISMATCH);
    CHECK_EQ(dsv3_parameters_size(NULL, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_parameters_size(&s->config, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_parameters_size(&s->config, &bytes, NULL), DSV3_OK);
    CHECK_EQ(dsv3_parameters_init(&s->config, NULL, memory, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_parameters_init(&s->config, &q, NULL, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_parameters_init(&s->config, &q, memory, bytes - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_parameters_init(&s->config, &q, (unsigned char *)memory + 4, bytes, NULL), DSV3_ERR_ALIGN);
    synth_release(memory);
    synth_close(s);
}

/* Mean, spread and fourth moment of the matrices' elements (a normal's is 3 s^4); norms 1, biases 0. */
static void test_random_parameters(void) {
    static listing l;
    dsv3_config c = tiny_config();
    dsv3_parameters q;
    dsv3_rng rng = {5};
    void *memory;
    double sum[3] = {0, 0, 0}, n = 0;
    float *first;
    c.vocab_size = 2000;
    open_parameters(&q, &memory, &c);
    dsv3_parameters_random(&q, &rng, 0.006f, NULL);
    first = copy_floats(q.data, q.count);
    list_tensors(&l, &c);
    CHECK_EQ(l.floats, q.count);
    for (size_t i = 0; i < l.count; i++) {
        for (size_t j = l.item[i].at; j < l.item[i].at + l.item[i].n; j++) {
            double x = (double)q.data[j] / 0.006, norm = is_bias(&l.item[i].info) ? 0 : 1;
            if (l.item[i].info.rank == 1 && fabs((double)q.data[j] - norm) > 0) test_failed++;
            if (l.item[i].info.rank == 1) continue;
            sum[0] += x, sum[1] += x * x, sum[2] += x * x * x * x, n++;
        }
    }
    CHECK(n > 60000);
    CHECK(fabs(sum[0] / n) < 0.015 && fabs(sum[1] / n - 1) < 0.02 && fabs(sum[2] / n - 3) < 0.2);
    CHECK(largest_of(q.data, 1000) > 0.006 * 2.5 && largest_of(q.data, 1000) < 0.006 * 6);
    rng.state = 5;
    dsv3_parameters_random(&q, &rng, 0.006f, NULL);
    CHECK(same_floats(first, q.data, q.count));
    rng.state = 6;
    dsv3_parameters_random(&q, &rng, 0.006f, NULL);
    CHECK(!same_floats(first, q.data, 16));
    free(first);
    synth_release(memory);
}

/* ---- Memory: what the head of chapter 14 says is kept per layer and row, to the byte (rows are a multiple of what
 * parts are padded to) */

static size_t size_of(const dsv3_config *c, int32_t keep, size_t rows) {
    dsv3_training s = dsv3_training_default();
    size_t bytes = 0;
    s.rows = rows, s.sequences = 1, s.longest = 64, s.keep = keep;
    synth_demand(dsv3_trainer_size(c, &s, 1, &bytes, NULL), "size", NULL);
    return bytes;
}

/* Bytes that one more layer costs for each row: weights and tables cancel. */
static size_t size_per_row(const dsv3_config *c, int32_t keep, int dense) {
    dsv3_config more = *c;
    more.num_hidden_layers++;
    if (dense) more.first_k_dense_replace++;
    return (size_of(&more, keep, 64) - size_of(&more, keep, 32) - (size_of(c, keep, 64) - size_of(c, keep, 32))) / 32;
}

static void test_kept(void) {
    static const int which[] = {SYNTH_V3, SYNTH_MOONLIGHT, SYNTH_NO_SHARED};
    for (size_t i = 0; i < 3; i++) {
        dsv3_config c = synth_config(which[i], NULL);
        dsv3i_dims m = dsv3i_dims_of(&c);
        for (int32_t keep = 0; keep < 8; keep++) {
            for (int dense = 0; dense < 2; dense++) {
                size_t hidden = dense ? m.Fd : m.K * m.F + m.Fs;
                size_t floats = 2 * m.d + m.rq + m.rk + m.dr + m.Ho + 2 * m.H + 2 * hidden;
                if (!dense) floats += m.E + 2 * m.K;
                if (keep & DSV3_KEEP_NORMS) floats += 2 * m.d + m.rq + m.rk + m.dr;
                if (keep & DSV3_KEEP_UP_PROJECTIONS) floats += m.Hq;
                if (keep & DSV3_KEEP_SWIGLU) floats += hidden;
                CHECK_EQ(size_per_row(&c, keep, dense), 4 * floats + (dense ? 0 : m.K * sizeof(size_t)));
            }
        }
    }
}

/* Weights, gradients and two moments; the moving average is a fifth. */
static void test_parameter_memory(void) {
    dsv3_config c = tiny_config(), more = tiny_config();
    dsv3_training s = dsv3_training_default();
    size_t with, without, count[2], bytes;
    static listing l;
    list_tensors(&l, &c);
    count[0] = l.floats;
    more.vocab_size += 4096;
    list_tensors(&l, &more);
    count[1] = l.floats;
    CHECK_EQ(size_of(&more, 0, 16) - size_of(&c, 0, 16) < 17 * (count[1] - count[0]), 1);
    s.rows = 16, s.longest = 16;
    CHECK_EQ(dsv3_trainer_size(&c, &s, 1, &without, NULL), DSV3_OK);
    s.ema = 1;
    CHECK_EQ(dsv3_trainer_size(&c, &s, 1, &with, NULL), DSV3_OK);
    bytes = sizeof(void *) > 4 ? (4 * count[0] + 63) / 64 * 64 : (4 * count[0] + 15) / 16 * 16;
    CHECK_EQ(with - without, bytes);
}

/* A policy of each layer costs what that layer's does, to the byte; one byte less is refused. */
static void test_kept_layers(void) {
    dsv3_config c = tiny_config();
    dsv3_training s = dsv3_training_default();
    int32_t layers[4] = {0, 0, 0, 0}; /* dense, MoE, MoE, MTP */
    dsv3_trainer t;
    size_t bytes = 0, sum = 0, none = size_of(&c, 0, 64);
    s.rows = 64, s.longest = 64, s.keep = 7, s.keep_layers = layers;
    CHECK_EQ(dsv3_trainer_size(&c, &s, 1, &bytes, NULL), DSV3_OK);
    CHECK_EQ(bytes, none); /* keep itself is not read then */
    for (int i = 0; i < 4; i++) {
        layers[i] = 7;
        CHECK_EQ(dsv3_trainer_size(&c, &s, 1, &bytes, NULL), DSV3_OK);
        CHECK_EQ(bytes - none, 64 * (size_per_row(&c, 7, i == 0) - size_per_row(&c, 0, i == 0)));
        sum += bytes - none;
        layers[i] = 0;
    }
    for (int i = 0; i < 4; i++) layers[i] = 7;
    CHECK_EQ(dsv3_trainer_size(&c, &s, 1, &bytes, NULL), DSV3_OK);
    CHECK_EQ(bytes - none, sum);
    CHECK_EQ(bytes, size_of(&c, 7, 64));
    {
        void *memory = synth_alloc(bytes);
        CHECK_EQ(dsv3_trainer_init(&c, &t, &s, 1, memory, bytes - 1, NULL), DSV3_ERR_MEMORY);
        CHECK_EQ(dsv3_trainer_init(&c, &t, &s, 1, memory, bytes, NULL), DSV3_OK);
        synth_release(memory);
    }
}

/* All keep policies, the same bits; also if each layer has its own. The memory is exactly that asked for. */
static void test_keep(void) {
    static const int lengths[] = {9, 14, 7, 0};
    float *want = NULL;
    for (int32_t keep = 0; keep < 16; keep++) {
        const int32_t layers[4] = {keep % 8, (keep + 3) % 8, 7 - keep % 8, (5 * keep) % 8};
        subject a;
        prepare(&a, lengths);
        a.s.keep = keep % 8;
        if (keep >= 8) a.s.keep_layers = layers;
        open_trainer(&a, 1);
        for (int i = 0; i < 2; i++) step(&a, 0.01);
        if (want == NULL) want = copy_floats(a.t.weights.data, a.t.weights.count);
        CHECK(same_floats(want, a.t.weights.data, a.t.weights.count));
        close_trainer(&a);
    }
    free(want);
}

/* The settings that memory was made for are not read again: a step goes by what was laid out, whatever they say by then. */
static void test_fixed_settings(void) {
    static const int lengths[] = {9, 14, 7, 0};
    static const int32_t others[4] = {7, 7, 7, 7};
    for (int32_t keep = 0; keep < 8; keep += 7) {
        subject a, b;
        prepare(&a, lengths);
        a.s.keep = keep, a.s.ema = keep > 0;
        b = a;
        open_trainer(&a, 1);
        open_trainer(&b, 1);
        b.text.token = b.token, b.text.sequence = b.sequence;
        for (int i = 0; i < 2; i++) {
            step(&a, 0.01);
            step(&b, 0.01);
            CHECK(same_floats(a.t.weights.data, b.t.weights.data, a.t.weights.count));
            CHECK(a.t.ema == NULL || same_floats(a.t.ema, b.t.ema, a.t.weights.count));
            b.t.settings.keep = 7 - keep, b.t.settings.keep_layers = keep == 0 ? others : NULL;
            b.t.settings.ema = keep == 0;
            b.t.settings.rows = b.t.settings.sequences = b.t.settings.longest = keep == 0 ? 1 : 1000;
        }
        if (keep > 0) { /* nor may more come in than there is room for */
            dsv3_error error;
            b.text.rows = ROWS + 1;
            demand(dsv3_train_begin(&b.t, b.targets, b.sequences, NULL), NULL);
            CHECK_EQ(dsv3_train_accumulate(&b.ctx, &b.t, &b.text, &error), DSV3_ERR_MEMORY);
            CHECK(strcmp(error.name, "rows") == 0 && error.expected[1] == ROWS);
        }
        close_trainer(&a), close_trainer(&b);
    }
}

/* ---- Schedules */

static int near(double got, double want) { return fabs(got - want) <= 1e-9 + 1e-6 * fabs(want); }

static void test_schedule(void) {
    dsv3_schedule v3 = {2.2e-4, 2.2e-5, 7.3e-6, 2000, 10000, 14300, 14633},
                  plain = {1e-3, 1e-4, 5e-5, 10, 10, 110, 110};
    dsv3_schedule none = {1e-3, 1e-3, 1e-3, 0, 0, 0, 0};
    CHECK(near(dsv3_learning_rate(&v3, 0) * 1e6, 2.2e-4 / 2000 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 999) * 1e6, 1.1e-4 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 1999) * 1e6, 2.2e-4 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 2000) * 1e6, 2.2e-4 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 9999) * 1e6, 2.2e-4 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 10000) * 1e6, 2.2e-4 * 1e6)); /* the cosine begins at its top */
    CHECK(near(dsv3_learning_rate(&v3, 12150) * 1e6, 1.21e-4 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 11075) * 1e6, (1.21e-4 + 0.99e-4 * sqrt(0.5)) * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 14300) * 1e6, 2.2e-5 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 14632) * 1e6, 2.2e-5 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, 14633) * 1e6, 7.3e-6 * 1e6));
    CHECK(near(dsv3_learning_rate(&v3, UINT64_MAX) * 1e6, 7.3e-6 * 1e6));
    CHECK(near(dsv3_learning_rate(&plain, 9) * 1e6, 1e3));
    CHECK(near(dsv3_learning_rate(&plain, 10) * 1e6, 1e3));
    CHECK(near(dsv3_learning_rate(&plain, 60) * 1e6, 550));
    CHECK(near(dsv3_learning_rate(&plain, 110) * 1e6, 50));
    CHECK(near(dsv3_learning_rate(&none, 0) * 1e6, 1e3));
    for (uint64_t i = 0; i < 15000; i++) { /* never up behind the warm-up, never below the tail */
        double rate = dsv3_learning_rate(&v3, i), next = dsv3_learning_rate(&v3, i + 1);
        if (!(i + 1 < 2000 ? next > rate : next <= rate) || !(rate > 0)) test_failed++;
    }
}

/* ---- It learns: one batch by heart */

static void test_overfit(void) {
    static const int lengths[] = {12, 12, 8, 0};
    subject a;
    double first, loss = 0;
    int steps = 0;
    dsv3_rng rng = {2};
    prepare(&a, lengths);
    a.s.weight_decay = 0;
    open_trainer(&a, 1);
    dsv3_parameters_random(&a.t.weights, &rng, 0.02f, NULL);
    gradients(&a);
    first = a.t.losses.nll[0] / (double)a.targets[0];
    CHECK(fabs(first - log(29.0)) < 0.1);
    CHECK(fabs(a.t.losses.nll[1] / (double)a.targets[1] - log(29.0)) < 0.1);
    for (; steps < 300; steps++) {
        step(&a, 0.01);
        loss = a.t.losses.nll[0] / (double)a.targets[0];
        if (loss < 0.05) break;
    }
    CHECK(loss < 0.1);
    CHECK(a.t.losses.nll[1] / (double)a.targets[1] < 1.0); /* the module learns too */
    close_trainer(&a);
}

int main(void) {
    test_micro_batches(0);
    test_micro_batches(1);
    test_evaluate_agrees();
    test_threads();
    test_wide_loops();
    test_norm_threads();
    for (int i = 0; i < 4; i++) test_adamw(i % 2 ? 0.5 : 0, i / 2);
    test_slow_average();
    test_patterns();
    test_decay();
    test_bias();
    test_frozen_bias();
    test_not_finite();
    test_overflow();
    test_all_ignored();
    test_none_expected();
    test_ranks();
    test_failing_hooks();
    test_bad_numbers();
    test_edge_numbers();
    test_order();
    test_order_after_errors();
    test_large_squares();
    test_memory();
    test_misuse();
    test_apart();
    test_observer();
    test_load(SYNTH_V3);
    test_load(SYNTH_MOONLIGHT);
    test_load(SYNTH_BLOCKS);
    test_load(SYNTH_ODD);
    test_load(SYNTH_TIED);
    test_load(SYNTH_MTP);
    test_load_modules();
    test_random_parameters();
    test_kept();
    test_parameter_memory();
    test_kept_layers();
    test_keep();
    test_fixed_settings();
    test_schedule();
    test_overfit();
    return test_done("train");
}
