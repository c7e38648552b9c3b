/* bench_v2_v3 -- the same small model trained with V2's routing and with V3's, on the same text, for as many steps.
 * What is compared, and how to read it: bench/README.md. */
#define BENCH_NAME "bench_v2_v3"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#define KINDS 2
#define MAX_SEEDS 20
#define MAX_POINTS 51 /* validations of a run, that before the first step included */
#define MAX_THREADS 1024
#define WINDOWS 16 /* sequences of the validation text, spread over the last 5 % */

static const char help[] =
    "usage: bench_v2_v3 [options]\n"
    "Trains a small model with V2's routing and with V3's, with several seeds; bench/README.md explains the table.\n"
    "  --text FILE    its bytes are the tokens, the last 5 % for validation; default examples/text/austen.txt\n"
    "  --steps N      1 .. 1000000; default 700\n"
    "  --batch B      sequences of a step, 1 .. 4096; default 8\n"
    "  --seq T        tokens of a sequence, 2 .. 4096; default 128\n"
    "  --seeds S      runs of each, 1 .. 20; default 3\n"
    "  --rate R       peak of the learning rate; default 0.004\n"
    "  --factor-v2 X  weight of the routed experts of V2; default 4\n"
    "  --factor-v3 X  of V3; default 2.5\n"
    "  --target X     validation loss to reach, nats per byte; default: the lowest multiple of 0.05 that every run\n"
    "                 has reached\n"
    "  --threads N    1 .. 1024; default: all cores\n"
    "  --curves FILE  writes the validation losses of all runs there, as CSV\n"
    "  --line         one line of key=value pairs for each run instead of the table\n"
    "  --help         this text\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Options */

typedef struct bench_options {
    const char *text, *curves;
    size_t steps, batch, seq, seeds, threads; /* threads 0: not given */
    double rate, factor[KINDS], target;       /* target 0: not given */
    int line;
} bench_options;

static double parse_real(const char *option, const char *value) {
    char *end;
    double number = strtod(value, &end);
    if (end == value || *end != '\0' || !(number > 0.0 && number <= 1000.0)) {
        bench_usage(option, value, "a number above 0, at most 1000");
    }
    return number;
}

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--text") == 0) o->text = value;
    if (strcmp(option, "--steps") == 0) o->steps = bench_number(option, value, 1, 1000000);
    if (strcmp(option, "--batch") == 0) o->batch = bench_number(option, value, 1, 4096);
    if (strcmp(option, "--seq") == 0) o->seq = bench_number(option, value, 2, 4096);
    if (strcmp(option, "--seeds") == 0) o->seeds = bench_number(option, value, 1, MAX_SEEDS);
    if (strcmp(option, "--rate") == 0) o->rate = parse_real(option, value);
    if (strcmp(option, "--factor-v2") == 0) o->factor[0] = parse_real(option, value);
    if (strcmp(option, "--factor-v3") == 0) o->factor[1] = parse_real(option, value);
    if (strcmp(option, "--target") == 0) o->target = parse_real(option, value);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--curves") == 0) o->curves = value;
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--text",      "--steps",     "--batch",  "--seq",     "--seeds",  "--rate",
                                        "--factor-v2", "--factor-v3", "--target", "--threads", "--curves", NULL};
    memset(o, 0, sizeof *o);
    o->text = "examples/text/austen.txt";
    o->steps = 700;
    o->batch = 8;
    o->seq = 128;
    o->seeds = 3;
    o->rate = 0.004;
    o->factor[0] = 4.0;
    o->factor[1] = 2.5;
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
}

/* ---- The two models. Everything that is not set here by kind is the same */

static const char *const kind_names[KINDS] = {"V2", "V3"};

static dsv3_config model_config(const bench_options *o, int v3) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_MICRO);
    c.num_nextn_predict_layers = 0;     /* V2 has none */
    c.n_routed_experts = v3 ? 32 : 20;  /* 256 and 160 */
    c.num_experts_per_tok = v3 ? 4 : 3; /* 8 and 6 */
    c.n_group = 4;                      /* 8; but 8 do not divide 20 */
    c.topk_group = 2;                   /* 4 of 8, and 3 of 8 */
    c.scoring_func = v3 ? DSV3_SIGMOID : DSV3_SOFTMAX;
    c.topk_method = v3 ? DSV3_NOAUX_TC : DSV3_GROUP_LIMITED_GREEDY;
    c.norm_topk_prob = v3;
    /* V3 has 2.5, for weights that add up to 1. V2 has 16 for scores near 1/160: 6 of them weigh 0.6 together, as do
     * 3 near 1/20 with a factor of 4. */
    c.routed_scaling_factor = (float)o->factor[v3];
    return c;
}

static dsv3_training model_training(const bench_options *o, int v3) {
    dsv3_training s = dsv3_training_default();
    s.rows = o->batch * o->seq;
    s.sequences = o->batch;
    s.longest = o->seq;
    if (v3) return s; /* balance 0.0001, and the bias step of 0.001 */
    s.balance.expert = 0.003;
    s.balance.device = 0.05;
    s.balance.communication = 0.02;
    s.balance.devices = 4;
    s.balance.most_devices = 2;
    s.balance.actual = 1;
    return s;
}

static dsv3_schedule model_schedule(const bench_options *o) {
    dsv3_schedule s;
    s.peak = o->rate;
    s.low = s.tail = 0.1 * s.peak;
    s.warmup = s.constant = (o->steps + 9) / 10;
    s.cosine = s.end = o->steps;
    return s;
}

/* ---- Text */

typedef struct bench_text {
    int32_t *token;  /* [n] */
    size_t n, train; /* of these, for training */
} bench_text;

static void text_read(bench_text *t, const char *path, size_t least) {
    FILE *file = fopen(path, "rb");
    unsigned char buffer[4096];
    size_t got, capacity = 0;
    memset(t, 0, sizeof *t);
    while (file != NULL && (got = fread(buffer, 1, sizeof buffer, file)) > 0) {
        if (t->n + got > capacity) {
            capacity = 2 * (t->n + got);
            t->token = (int32_t *)realloc(t->token, capacity * sizeof *t->token);
            if (t->token == NULL) bench_die(path, "out of memory");
        }
        for (size_t i = 0; i < got; i++) t->token[t->n++] = buffer[i];
    }
    if (file == NULL || ferror(file)) bench_die(path, "cannot be read");
    fclose(file);
    t->train = t->n - t->n / 20;
    if (t->n / 20 < least) bench_die(path, "is too short");
}

/* ---- A run */

typedef struct bench_result {
    size_t points, step[MAX_POINTS];
    double loss[MAX_POINTS];              /* validation, nats per byte */
    double seconds;                       /* of the steps */
    double tokens_s, vio, vio_validation; /* MaxVio: mean over the last tenth of the steps; of the validation text */
    size_t bytes, parameters;
} bench_result;

typedef struct bench_run {
    const bench_options *options;
    const bench_text *text;
    const dsv3_context *context;
    dsv3_trainer trainer;
    dsv3_workspace workspace; /* for validation */
    dsv3_cache *caches;       /* [WINDOWS] */
    void *trainer_memory, *workspace_memory, *cache_memory;
    int32_t *token, *target, *sequence; /* [rows] of a step or of the validation */
    dsv3_rng rng;
} bench_run;

static void run_memory(bench_run *r, bench_result *result, const dsv3_config *c, const dsv3_training *s) {
    size_t bytes, T = r->options->seq, threads = r->context->threads, rows = s->rows;
    if (rows < WINDOWS * T) rows = WINDOWS * T;
    bench_check(dsv3_trainer_size(c, s, threads, &result->bytes, NULL), "dsv3_trainer_size");
    r->trainer_memory = bench_alloc(result->bytes);
    bench_check(dsv3_trainer_init(c, &r->trainer, s, threads, r->trainer_memory, result->bytes, NULL),
                "dsv3_trainer_init");
    result->parameters = r->trainer.weights.count;
    bench_check(dsv3_workspace_size(c, WINDOWS * T, threads, &bytes, NULL), "dsv3_workspace_size");
    r->workspace_memory = bench_alloc(bytes);
    bench_check(dsv3_workspace_init(c, &r->workspace, WINDOWS * T, threads, r->workspace_memory, bytes, NULL),
                "dsv3_workspace_init");
    bench_check(dsv3_cache_size(c, T, DSV3_F32, &bytes, NULL), "dsv3_cache_size");
    r->caches = (dsv3_cache *)bench_alloc(WINDOWS * sizeof *r->caches);
    r->cache_memory = bench_alloc(WINDOWS * bytes);
    for (size_t i = 0; i < WINDOWS; i++) {
        bench_check(
            dsv3_cache_init(c, &r->caches[i], T, DSV3_F32, (unsigned char *)r->cache_memory + i * bytes, bytes, NULL),
            "dsv3_cache_init");
    }
    r->token = (int32_t *)bench_alloc(rows * sizeof *r->token);
    r->target = (int32_t *)bench_alloc(rows * sizeof *r->target);
    r->sequence = (int32_t *)bench_alloc(rows * sizeof *r->sequence);
}

static void run_free(bench_run *r) {
    free(r->trainer_memory);
    free(r->workspace_memory);
    free(r->cache_memory);
    free(r->caches);
    free(r->token);
    free(r->target);
    free(r->sequence);
}

/* Sequence b of the rows begins at byte `at` of the text. */
static void run_place(bench_run *r, size_t b, size_t at) {
    size_t T = r->options->seq;
    for (size_t i = 0; i < T; i++) {
        r->token[b * T + i] = r->text->token[at + i];
        r->target[b * T + i] = r->text->token[at + i + 1];
        r->sequence[b * T + i] = (int32_t)b;
    }
}

static dsv3_text run_text(const bench_run *r, size_t sequences) {
    dsv3_text text;
    memset(&text, 0, sizeof text);
    text.rows = sequences * r->options->seq;
    text.token = r->token;
    text.target = r->target;
    text.sequence = r->sequence;
    return text;
}

/* Mean over the MoE layers. */
static double mean_max_vio(const dsv3_model *model, const uint64_t *load) {
    size_t E = (size_t)model->config.n_routed_experts, layers = 0;
    double sum = 0.0;
    for (int32_t i = 0; i < model->config.num_hidden_layers; i++) {
        if (!dsv3_config_is_moe(&model->config, i)) continue;
        sum += dsv3_load_statistics(load + (size_t)i * E, E).max_vio;
        layers++;
    }
    return layers > 0 ? sum / (double)layers : 0.0;
}

/* Nats per byte of the validation text, the same windows always; vio may be NULL. */
static double run_validate(bench_run *r, double *vio) {
    const dsv3_model *model = &r->trainer.weights.model;
    size_t T = r->options->seq, held = r->text->n - r->text->train - T - 1;
    size_t n = (size_t)model->config.num_hidden_layers * (size_t)model->config.n_routed_experts;
    uint64_t targets = 0, *load = (uint64_t *)bench_alloc(n * sizeof *load);
    double nll = 0.0;
    dsv3_losses losses;
    dsv3_text text;
    dsv3_error error;
    memset(load, 0, n * sizeof *load);
    memset(&losses, 0, sizeof losses);
    losses.nll = &nll;
    losses.targets = &targets;
    losses.load = load;
    for (size_t b = 0; b < WINDOWS; b++) run_place(r, b, r->text->train + held * b / (WINDOWS - 1));
    text = run_text(r, WINDOWS);
    bench_check_error(
        dsv3_evaluate(r->context, &losses, model, r->caches, NULL, WINDOWS, &text, &r->workspace, &error),
        "dsv3_evaluate", &error);
    if (vio != NULL) *vio = mean_max_vio(model, load);
    free(load);
    return nll / (double)targets;
}

/* One step on sequences from anywhere in the training text; returns MaxVio of its batch. */
static double run_step(bench_run *r, double rate) {
    size_t B = r->options->batch, T = r->options->seq;
    uint64_t targets = 0, sequences = 0;
    double vio;
    dsv3_text text;
    dsv3_error error;
    for (size_t b = 0; b < B; b++) run_place(r, b, (size_t)(dsv3_random(&r->rng) % (r->text->train - T)));
    text = run_text(r, B);
    dsv3_text_count(&text, 0, &targets, &sequences, NULL);
    bench_check(dsv3_train_begin(&r->trainer, &targets, sequences, NULL), "dsv3_train_begin");
    bench_check_error(dsv3_train_accumulate(r->context, &r->trainer, &text, &error), "dsv3_train_accumulate", &error);
    vio = mean_max_vio(&r->trainer.weights.model, r->trainer.balancer.load); /* the end of the step clears it */
    bench_check_error(dsv3_train_end(r->context, &r->trainer, rate, NULL, &error), "dsv3_train_end", &error);
    return vio;
}

/* Progress of all runs on a terminal: `done` steps of `all`. */
static void progress(const char *kind, size_t seed, size_t step, double loss, size_t done, size_t all, double begin) {
    long left = done > 0 ? (long)((bench_now() - begin) / (double)done * (double)(all - done)) : 0;
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r%s seed %zu step %zu  validation %.3f  %3.0f %%", kind, seed, step, loss,
            100.0 * (double)done / (double)all);
    if (done > 0) fprintf(stderr, ", %ld min %02ld s left   ", left / 60, left % 60);
    if (done == all) fprintf(stderr, "\r%78s\r", "");
}

/* The same seed gives both kinds the same texts; their weights cannot be the same, as their shapes are not. */
static void run(bench_result *result, const bench_options *o, const bench_text *text, const dsv3_context *context,
                int v3, size_t seed, size_t done, double begin) {
    static bench_run r;
    dsv3_config c = model_config(o, v3);
    dsv3_training settings = model_training(o, v3);
    dsv3_schedule schedule = model_schedule(o);
    dsv3_rng weights = {seed};
    size_t every = (o->steps + MAX_POINTS - 2) / (MAX_POINTS - 1), counted = 0;
    memset(&r, 0, sizeof r);
    memset(result, 0, sizeof *result);
    r.options = o;
    r.text = text;
    r.context = context;
    r.rng.state = 1000 + seed;
    run_memory(&r, result, &c, &settings);
    dsv3_parameters_random(&r.trainer.weights, &weights, 0.02f, NULL);
    for (size_t s = 0; s <= o->steps; s++) {
        double vio, at;
        if (s % every == 0 || s == o->steps) {
            result->step[result->points] = s;
            result->loss[result->points] = run_validate(&r, &result->vio_validation);
            progress(kind_names[v3], seed, s, result->loss[result->points++], done + s, KINDS * o->seeds * o->steps,
                     begin);
        }
        if (s == o->steps) break;
        at = bench_now();
        vio = run_step(&r, dsv3_learning_rate(&schedule, s));
        result->seconds += bench_now() - at;
        if (s >= o->steps - (o->steps + 9) / 10) result->vio += vio, counted++;
    }
    result->vio /= (double)counted;
    result->tokens_s = (double)(o->steps * o->batch * o->seq) / result->seconds;
    run_free(&r);
}

/* ---- What is printed */

typedef struct bench_results {
    bench_result run[KINDS][MAX_SEEDS];
    double target; /* nats per byte */
} bench_results;

static double last_loss(const bench_result *r) { return r->loss[r->points - 1]; }

/* Steps until the target, -1 if never. */
static double steps_to(const bench_result *r, double target) {
    for (size_t i = 0; i < r->points; i++) {
        if (r->loss[i] <= target) return (double)r->step[i];
    }
    return -1.0;
}

/* What all runs have reached at some time, up to the next multiple of 0.05. */
static double common_target(const bench_results *m, size_t seeds) {
    double worst = 0.0;
    size_t target = 0; /* of 0.05 */
    for (int kind = 0; kind < KINDS; kind++) {
        for (size_t s = 0; s < seeds; s++) {
            const bench_result *r = &m->run[kind][s];
            double best = r->loss[0];
            for (size_t i = 1; i < r->points; i++) best = r->loss[i] < best ? r->loss[i] : best;
            worst = best > worst ? best : worst;
        }
    }
    while (0.05 * (double)target < worst) target++;
    return 0.05 * (double)target;
}

static void print_lines(const bench_options *o, const bench_results *m, const dsv3_context *context) {
    for (int kind = 0; kind < KINDS; kind++) {
        for (size_t s = 0; s < o->seeds; s++) {
            const bench_result *r = &m->run[kind][s];
            printf("routing=%s seed=%zu backend=%s threads=%zu steps=%zu batch=%zu seq=%zu parameters=%zu "
                   "tokens_s=%.1f trainer_bytes=%zu target=%.3f steps_to_target=%.0f loss=%.4f max_vio=%.4f "
                   "max_vio_validation=%.4f\n",
                   kind_names[kind], s + 1, context->backend, context->threads, o->steps, o->batch, o->seq,
                   r->parameters, r->tokens_s, r->bytes, m->target, steps_to(r, m->target), last_loss(r), r->vio,
                   r->vio_validation);
        }
    }
}

typedef enum bench_row { ROW_SPEED, ROW_BYTES, ROW_STEPS, ROW_LOSS, ROW_VIO, ROW_VIO_VALIDATION } bench_row;

static double row_value(const bench_result *r, bench_row row, double target) {
    switch (row) {
    case ROW_SPEED: return r->tokens_s;
    case ROW_BYTES: return (double)r->bytes;
    case ROW_STEPS: return steps_to(r, target);
    case ROW_LOSS: return last_loss(r);
    case ROW_VIO: return r->vio;
    case ROW_VIO_VALIDATION: return r->vio_validation;
    }
    return 0.0;
}

/* Median and spread of one kind into text: "1.52 (1.50 .. 1.55)". Returns the median, 0 if a run has no value. */
static double print_cell(char *text, size_t capacity, const bench_results *m, int kind, size_t seeds, bench_row row) {
    double v[MAX_SEEDS];
    int digits = row == ROW_LOSS || row == ROW_VIO || row == ROW_VIO_VALIDATION ? 3 : 0;
    size_t missing = 0;
    bench_stat s;
    for (size_t i = 0; i < seeds; i++) missing += (v[i] = row_value(&m->run[kind][i], row, m->target)) < 0.0;
    s = bench_summary(v, seeds);
    if (missing > 0) {
        snprintf(text, capacity, "%zu of %zu not reached", missing, seeds);
        return 0.0;
    }
    if (row == ROW_BYTES) {
        snprintf(text, capacity, "%.0f", s.median);
    } else {
        snprintf(text, capacity, "%.*f (%.*f .. %.*f)", digits, s.median, digits, s.min, digits, s.max);
    }
    return s.median;
}

static void print_row(const char *name, const bench_options *o, const bench_results *m, bench_row row,
                      const char *claim) {
    char cell[KINDS][64], ratio[32] = "-";
    double v2 = print_cell(cell[0], sizeof cell[0], m, 0, o->seeds, row);
    double v3 = print_cell(cell[1], sizeof cell[1], m, 1, o->seeds, row);
    if (v2 > 0.0 && v3 > 0.0) snprintf(ratio, sizeof ratio, "%.2f", v3 / v2);
    printf("  %-22s %25s %25s %7s   %s\n", name, cell[0], cell[1], ratio, claim);
}

static void write_curves(const bench_options *o, const bench_results *m) {
    FILE *file = fopen(o->curves, "w");
    if (file == NULL) bench_die(o->curves, "cannot be written");
    fprintf(file, "routing,seed,step,loss\n");
    for (int kind = 0; kind < KINDS; kind++) {
        for (size_t s = 0; s < o->seeds; s++) {
            const bench_result *r = &m->run[kind][s];
            for (size_t i = 0; i < r->points; i++) {
                fprintf(file, "%s,%zu,%zu,%.5f\n", kind_names[kind], s + 1, r->step[i], r->loss[i]);
            }
        }
    }
    if (ferror(file) | fclose(file)) bench_die(o->curves, "cannot be written");
}

static void print_table(const bench_options *o, const bench_results *m, const dsv3_context *context) {
    char steps[64];
    printf("V2's routing against V3's: %zu steps of %zu x %zu bytes, %zu seed%s, backend %s, threads %zu\n", o->steps,
           o->batch, o->seq, o->seeds, o->seeds == 1 ? "" : "s", context->backend, context->threads);
    bench_print_machine(context);
    for (int kind = 0; kind < KINDS; kind++) {
        dsv3_config c = model_config(o, kind);
        printf("%s       %d experts of %d, %d for a token, %d of %d groups, %zu parameters; %s, factor %g\n",
               kind_names[kind], (int)c.n_routed_experts, (int)c.moe_intermediate_size, (int)c.num_experts_per_tok,
               (int)c.topk_group, (int)c.n_group, m->run[kind][0].parameters,
               kind ? "sigmoid, normalised, bias step 0.001, loss 0.0001"
                    : "softmax, not normalised, losses 0.003 0.05 0.02",
               o->factor[kind]);
    }
    printf("\n  %-22s %25s %25s %7s   %s\n", "median (min .. max)", "V2", "V3", "V3/V2", "the note's claim");
    print_row("tokens/s", o, m, ROW_SPEED, "1.2x -> 1.8x: 1.50");
    print_row("bytes of the trainer", o, m, ROW_BYTES, "32 -> 28: 0.88");
    snprintf(steps, sizeof steps, "steps to %.3f", m->target);
    print_row(steps, o, m, ROW_STEPS, "150k -> 90k: 0.60");
    print_row("final validation loss", o, m, ROW_LOSS, "");
    print_row("MaxVio, last batches", o, m, ROW_VIO, "");
    print_row("MaxVio, validation", o, m, ROW_VIO_VALIDATION, "");
}

int main(int argc, char **argv) {
    static bench_results m;
    bench_options o;
    bench_text text;
    dsv3_context context;
    double begin;
    size_t done = 0;
    parse(&o, argc, argv);
    text_read(&text, o.text, o.seq + WINDOWS + 1);
    bench_context(&context, DSV3_BACKEND_AUTO, o.threads);
    context.attention = DSV3_ATTENTION_EXPANDED; /* in validation as in training */
    begin = bench_now();
    for (size_t s = 0; s < o.seeds; s++) { /* in turn: a machine whose speed drifts treats both alike */
        for (int kind = 0; kind < KINDS; kind++, done += o.steps) {
            run(&m.run[kind][s], &o, &text, &context, kind, s + 1, done, begin);
        }
    }
    m.target = o.target > 0.0 ? o.target : common_target(&m, o.seeds);
    if (o.curves != NULL) write_curves(&o, &m);
    if (o.line) {
        print_lines(&o, &m, &context);
    } else {
        print_table(&o, &m, &context);
    }
    free(text.token);
    return fflush(stdout) != 0 || ferror(stdout);
}
