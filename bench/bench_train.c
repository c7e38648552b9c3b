/* bench_train -- tokens/s of whole training steps, beside the arithmetic the machine can do.
 * How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_train"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#define PEAK_PASSES 5 /* after each repeat */
#define MAX_REPEAT 1000
#define MAX_THREADS 1024
#define MAX_ROWS 1048576

static const char help[] = "usage: bench_train [options]\n"
                           "Speed of training steps on random weights; bench/README.md explains the numbers.\n"
                           "  --preset NAME  micro (default), austen\n"
                           "  --batch B      sequences of a micro-batch, 1 .. 4096; default 8\n"
                           "  --seq T        tokens of a sequence, 2 .. 65536; default 256\n"
                           "  --accum A      micro-batches of a step, 1 .. 1000; default 1\n"
                           "  --threads N    1 .. 1024; default: all cores\n"
                           "  --keep WHAT    what the backward pass need not compute again: none (default), or some "
                           "of norms,up,swiglu, or all\n"
                           "  --text FILE    its bytes are the tokens; default: random tokens\n"
                           "  --repeat R     steps timed, 1 .. 1000; default 5. One more before them is not\n"
                           "  --line         one line of key=value pairs instead of the table\n"
                           "  --help         this text\n"
                           "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Options */

typedef struct bench_options {
    const char *preset, *text, *keep_name;
    dsv3_config config;
    size_t batch, seq, accum, threads, repeat; /* threads 0: not given */
    int32_t keep;
    int line;
} bench_options;

/* Names with commas between them. */
static int32_t parse_keep(const char *option, const char *value) {
    static const char *const names[] = {"none", "norms", "up", "swiglu", "all", NULL};
    static const int32_t bits[] = {0, DSV3_KEEP_NORMS, DSV3_KEEP_UP_PROJECTIONS, DSV3_KEEP_SWIGLU,
                                   DSV3_KEEP_NORMS | DSV3_KEEP_UP_PROJECTIONS | DSV3_KEEP_SWIGLU};
    int32_t keep = 0;
    for (const char *at = value; at != NULL;) {
        const char *comma = strchr(at, ',');
        size_t length = comma != NULL ? (size_t)(comma - at) : strlen(at);
        char name[16];
        snprintf(name, sizeof name, "%.*s", (int)(length < sizeof name ? length : sizeof name - 1), at);
        keep |= bits[bench_choice(option, name, names, "none, all, or norms, up, swiglu with commas between them")];
        at = comma != NULL ? comma + 1 : NULL;
    }
    return keep;
}

static void parse_preset(bench_options *o, const char *option, const char *value) {
    static const char *const names[] = {"micro", "austen", NULL};
    size_t i = bench_choice(option, value, names, "micro or austen");
    o->preset = names[i];
    o->config = dsv3_config_preset(i == 0 ? DSV3_PRESET_MICRO : DSV3_PRESET_AUSTEN);
}

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--preset") == 0) parse_preset(o, option, value);
    if (strcmp(option, "--batch") == 0) o->batch = bench_number(option, value, 1, 4096);
    if (strcmp(option, "--seq") == 0) o->seq = bench_number(option, value, 2, 65536);
    if (strcmp(option, "--accum") == 0) o->accum = bench_number(option, value, 1, 1000);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--text") == 0) o->text = value;
    if (strcmp(option, "--repeat") == 0) o->repeat = bench_number(option, value, 1, MAX_REPEAT);
    if (strcmp(option, "--keep") == 0) {
        o->keep = parse_keep(option, value);
        o->keep_name = value;
    }
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--preset", "--batch", "--seq",    "--accum", "--threads",
                                        "--keep",   "--text",  "--repeat", NULL};
    memset(o, 0, sizeof *o);
    parse_preset(o, "--preset", "micro");
    o->batch = 8;
    o->seq = 256;
    o->accum = 1;
    o->repeat = 5;
    o->keep_name = "none";
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
    if (o->batch * o->seq > MAX_ROWS) bench_usage("--batch and --seq", "more", "together at most 1048576 tokens");
}

/* ---- What is measured */

typedef struct bench_run {
    bench_options options;
    dsv3_context context;
    dsv3_trainer trainer;
    size_t rows, trainer_bytes;   /* of a micro-batch; of dsv3_trainer_size */
    int32_t *token, *target;      /* [accum, rows] */
    int32_t *sequence;            /* [rows] */
    uint64_t *targets, sequences; /* of a step: [1 + D] */
    dsv3_cache *caches;           /* [1 + D, batch] for the forward pass alone */
    void *memory, *cache_memory;
    size_t weights, active; /* parameters; those of them that a token is multiplied by, in all depths */
    double flops;           /* of a step */
} bench_run;

static dsv3_text micro_batch(const bench_run *r, size_t i) {
    dsv3_text text;
    memset(&text, 0, sizeof text);
    text.rows = r->rows;
    text.token = r->token + i * r->rows;
    text.target = r->target + i * r->rows;
    text.sequence = r->sequence;
    return text;
}

/* Random tokens, or the bytes of a file from its beginning, over and over. A sequence overlaps the next by one token:
 * the target of its last. */
static void fill_tokens(bench_run *r) {
    const bench_options *o = &r->options;
    FILE *file = o->text != NULL ? fopen(o->text, "rb") : NULL;
    dsv3_rng rng = {1};
    int32_t last = 0;
    if (o->text != NULL && (file == NULL || fgetc(file) == EOF)) bench_die(o->text, "cannot be read, or is empty");
    for (size_t i = 0; i < o->accum * r->rows; i++) {
        int byte = file != NULL ? fgetc(file) : 0;
        if (file != NULL && byte == EOF) {
            rewind(file);
            byte = fgetc(file);
        }
        r->token[i] = last;
        r->target[i] = last = file != NULL ? byte : (int32_t)(dsv3_random(&rng) % (uint64_t)o->config.vocab_size);
    }
    for (size_t i = 0; i < r->rows; i++) r->sequence[i] = (int32_t)(i / o->seq);
    if (file != NULL) fclose(file);
}

/* Weights of a matrix that every row of its depth is multiplied by: K of E experts, and no embedding. */
typedef struct bench_count {
    const dsv3_config *config;
    size_t main, module; /* of the main model; of all modules, without their heads */
} bench_count;

static dsv3_result count_tensor(void *user, const dsv3_tensor_info *info) {
    bench_count *n = (bench_count *)user;
    size_t *to = info->layer >= n->config->num_hidden_layers ? &n->module : &n->main;
    if (info->rank != 2 || info->optional || info->kind == DSV3_KIND_EMBED) return DSV3_OK;
    if (info->expert >= n->config->num_experts_per_tok) return DSV3_OK; /* all experts have the same size */
    *to += info->rows * info->cols;
    return DSV3_OK;
}

/* Model FLOPs of a step: 2 for each weight a row is multiplied by, and 2 (dn + dr + dv) H for each pair of a query
 * and a key it sees, forward; twice that backward. Depth k has T - k rows of each sequence, a block of its own, and
 * the head. Nothing for what is computed again. */
static void count_flops(bench_run *r) {
    const dsv3_config *c = &r->options.config;
    size_t D = (size_t)c->num_nextn_predict_layers, head = (size_t)c->vocab_size * (size_t)c->hidden_size;
    double pair = (double)c->num_attention_heads * (c->qk_nope_head_dim + c->qk_rope_head_dim + c->v_head_dim);
    double sequences = (double)(r->options.batch * r->options.accum), sum = 0.0;
    bench_count n = {NULL, 0, 0};
    n.config = c;
    bench_check(dsv3_model_tensors(c, count_tensor, &n, NULL), "list of tensors");
    if (c->tie_word_embeddings) n.main += head;
    for (size_t k = 0; k <= D && k < r->options.seq; k++) {
        double T = (double)(r->options.seq - k), layers = k == 0 ? c->num_hidden_layers : 1.0;
        double weights = k == 0 ? (double)n.main : (double)(n.module / D + head);
        sum += sequences * (T * weights + layers * pair * T * (T + 1.0) / 2.0);
    }
    r->flops = 6.0 * sum;
    r->active = n.main + n.module + D * head;
    r->weights = r->trainer.weights.count;
}

/* Caches as dsv3_evaluate wants them: the main model's, then each module's. */
static void caches_init(bench_run *r) {
    const bench_options *o = &r->options;
    size_t D = (size_t)o->config.num_nextn_predict_layers, main_bytes, module_bytes;
    unsigned char *at;
    bench_check(dsv3_cache_size(&o->config, o->seq, DSV3_F32, &main_bytes, NULL), "dsv3_cache_size");
    bench_check(dsv3_cache_mtp_size(&o->config, o->seq, DSV3_F32, &module_bytes, NULL), "dsv3_cache_mtp_size");
    r->caches = (dsv3_cache *)bench_alloc((1 + D) * o->batch * sizeof *r->caches);
    at = (unsigned char *)(r->cache_memory = bench_alloc(o->batch * (main_bytes + D * module_bytes)));
    for (size_t i = 0; i < (1 + D) * o->batch; i++) {
        size_t bytes = i < o->batch ? main_bytes : module_bytes;
        bench_check(i < o->batch ? dsv3_cache_init(&o->config, &r->caches[i], o->seq, DSV3_F32, at, bytes, NULL)
                                 : dsv3_cache_mtp_init(&o->config, &r->caches[i], o->seq, DSV3_F32, at, bytes, NULL),
                    "dsv3_cache_init");
        at += bytes;
    }
}

static void run_init(bench_run *r) {
    const bench_options *o = &r->options;
    size_t D = (size_t)o->config.num_nextn_predict_layers, tokens;
    dsv3_training settings = dsv3_training_default();
    dsv3_rng rng = {2};
    bench_context(&r->context, DSV3_BACKEND_AUTO, o->threads);
    r->context.attention = DSV3_ATTENTION_EXPANDED; /* as in training */
    r->rows = o->batch * o->seq;
    tokens = o->accum * r->rows;
    settings.rows = r->rows;
    settings.sequences = o->batch;
    settings.longest = o->seq;
    settings.keep = o->keep;
    bench_check(dsv3_trainer_size(&o->config, &settings, r->context.threads, &r->trainer_bytes, NULL),
                "dsv3_trainer_size");
    r->memory = bench_alloc(r->trainer_bytes);
    bench_check(
        dsv3_trainer_init(&o->config, &r->trainer, &settings, r->context.threads, r->memory, r->trainer_bytes, NULL),
        "dsv3_trainer_init");
    dsv3_parameters_random(&r->trainer.weights, &rng, 0.02f, NULL);
    r->token = (int32_t *)bench_alloc(tokens * sizeof *r->token);
    r->target = (int32_t *)bench_alloc(tokens * sizeof *r->target);
    r->sequence = (int32_t *)bench_alloc(r->rows * sizeof *r->sequence);
    r->targets = (uint64_t *)bench_alloc((1 + D) * sizeof *r->targets);
    memset(r->targets, 0, (1 + D) * sizeof *r->targets);
    fill_tokens(r);
    for (size_t i = 0; i < o->accum; i++) {
        dsv3_text text = micro_batch(r, i);
        dsv3_text_count(&text, D, r->targets, &r->sequences, NULL);
    }
    caches_init(r);
    count_flops(r);
}

static void run_free(bench_run *r) {
    free(r->memory);
    free(r->cache_memory);
    free(r->caches);
    free(r->token);
    free(r->target);
    free(r->sequence);
    free(r->targets);
}

/* Seconds of a whole step: of its micro-batches, and of its end. */
static void run_step(bench_run *r, double *accumulate, double *end) {
    double at = bench_now(), then;
    dsv3_error error;
    bench_check(dsv3_train_begin(&r->trainer, r->targets, r->sequences, NULL), "dsv3_train_begin");
    for (size_t i = 0; i < r->options.accum; i++) {
        dsv3_text text = micro_batch(r, i);
        bench_check_error(dsv3_train_accumulate(&r->context, &r->trainer, &text, &error), "dsv3_train_accumulate",
                          &error);
    }
    then = bench_now();
    bench_check_error(dsv3_train_end(&r->context, &r->trainer, 1e-3, NULL, &error), "dsv3_train_end", &error);
    *accumulate = then - at;
    *end = bench_now() - then;
}

/* Seconds of the forward pass and the losses of the same texts, without gradients. */
static double run_forward(bench_run *r, double *nll, uint64_t *targets) {
    size_t D = (size_t)r->options.config.num_nextn_predict_layers;
    double begin = bench_now();
    for (size_t i = 0; i < r->options.accum; i++) {
        dsv3_text text = micro_batch(r, i);
        dsv3_losses losses;
        dsv3_error error;
        memset(&losses, 0, sizeof losses);
        losses.depths = D;
        losses.nll = nll;
        losses.targets = targets;
        bench_check_error(dsv3_evaluate(&r->context, &losses, &r->trainer.weights.model, r->caches,
                                        r->caches + r->options.batch, r->options.batch, &text, &r->trainer.workspace,
                                        &error),
                          "dsv3_evaluate", &error);
    }
    return bench_now() - begin;
}

/* ---- What is printed */

typedef struct bench_results {
    bench_stat step, forward, accumulate, end; /* seconds */
    double compiled, fma;                      /* FLOP/s, the best */
    const char *fma_name;
    double first_loss, peak_bytes;
} bench_results;

static size_t step_tokens(const bench_run *r) { return r->options.accum * r->rows; }

/* Of a peak, which may not be known. */
static double share(const bench_run *r, const bench_results *m, double peak) {
    return peak > 0.0 ? r->flops / m->step.median / peak : 0.0;
}

static void print_line(const bench_run *r, const bench_results *m) {
    const bench_options *o = &r->options;
    printf("preset=%s backend=%s threads=%zu batch=%zu seq=%zu accum=%zu keep=%s tokens_s=%.1f ms_step=%.3f "
           "ms_forward=%.3f ms_backward=%.3f ms_optimizer=%.3f flops_token=%.0f gflops=%.3f peak_compiled=%.2f "
           "peak_fma=%.2f share_compiled=%.4f share_fma=%.4f parameters=%zu trainer_bytes=%zu\n",
           o->preset, r->context.backend, r->context.threads, o->batch, o->seq, o->accum, o->keep_name,
           (double)step_tokens(r) / m->step.median, 1e3 * m->step.median, 1e3 * m->forward.median,
           1e3 * (m->accumulate.median - m->forward.median), 1e3 * m->end.median, r->flops / (double)step_tokens(r),
           1e-9 * r->flops / m->step.median, 1e-9 * m->compiled, 1e-9 * m->fma, share(r, m, m->compiled),
           share(r, m, m->fma), r->weights, r->trainer_bytes);
}

static void print_times(const bench_results *m) {
    double step = m->step.median, back = m->accumulate.median - m->forward.median;
    printf("\n  %-22s %15s %11s %11s %8s\n", "ms", "median", "min", "max", "of step");
    printf("  %-22s %15.2f %11.2f %11.2f\n", "step", 1e3 * step, 1e3 * m->step.min, 1e3 * m->step.max);
    printf("  %-22s %15.2f %11.2f %11.2f %6.0f %%\n", "forward and loss", 1e3 * m->forward.median,
           1e3 * m->forward.min, 1e3 * m->forward.max, 100.0 * m->forward.median / step);
    printf("  %-22s %15.2f %11s %11s %6.0f %%\n", "backward", 1e3 * back, "", "", 100.0 * back / step);
    printf("  %-22s %15.2f %11.2f %11.2f %6.0f %%\n", "optimizer", 1e3 * m->end.median, 1e3 * m->end.min,
           1e3 * m->end.max, 100.0 * m->end.median / step);
}

static void print_arithmetic(const bench_run *r, const bench_results *m) {
    printf(
        "\n  arithmetic (6 per active weight and token, 6 H (dn + dr + dv) per query and key; not what is computed "
        "again)\n");
    printf("  %-22s %15zu of %zu\n", "active weights", r->active, r->weights);
    printf("  %-22s %15.0f FLOP\n", "model, per token", r->flops / (double)step_tokens(r));
    printf("  %-22s %15.2f GFLOP/s\n", "model, in this time", 1e-9 * r->flops / m->step.median);
    printf("  %-22s %15.2f GFLOP/s, share %.4f\n", "peak, mul and add", 1e-9 * m->compiled, share(r, m, m->compiled));
    if (m->fma > 0.0) {
        printf("  %-22s %15.2f GFLOP/s, share %.4f (%s)\n", "peak, FMA", 1e-9 * m->fma, share(r, m, m->fma),
               m->fma_name);
    }
}

static void print_size(const char *what, double bytes) {
    printf("  %-22s %15.0f %11.1f MiB\n", what, bytes, bytes / 1048576.0);
}

static void print_table(const bench_run *r, const bench_results *m) {
    const bench_options *o = &r->options;
    double tokens = (double)step_tokens(r), count = 4.0 * (double)r->weights;
    printf("%s, backend %s, threads %zu, %zu x %zu tokens, %zu micro-batch%s, keep %s, %s, repeats %zu\n", o->preset,
           r->context.backend, r->context.threads, o->batch, o->seq, o->accum, o->accum == 1 ? "" : "es",
           o->keep_name, o->text != NULL ? o->text : "random tokens", o->repeat);
    bench_print_machine(&r->context);
    printf("loss     %.4f at the start\n", m->first_loss);
    printf("\n  %-22s %15s %11s %11s\n", "tokens/s", "median", "min", "max");
    printf("  %-22s %15.1f %11.1f %11.1f\n", "training", tokens / m->step.median, tokens / m->step.max,
           tokens / m->step.min);
    print_times(m);
    print_arithmetic(r, m);
    printf("\n  %-22s %15s\n", "memory", "bytes");
    print_size("weights", count);
    print_size("gradients", count);
    print_size("moments", 2.0 * count);
    print_size("trainer, all of it", (double)r->trainer_bytes);
    print_size("peak", m->peak_bytes);
}

static void measure(bench_run *r, bench_results *m) {
    double step[MAX_REPEAT], forward[MAX_REPEAT], accumulate[MAX_REPEAT], end[MAX_REPEAT], peak;
    double *nll = (double *)bench_alloc(r->trainer.balancer.layers * sizeof *nll + sizeof *nll);
    uint64_t *targets = (uint64_t *)bench_alloc(r->trainer.balancer.layers * sizeof *targets + sizeof *targets);
    size_t D = r->trainer.losses.depths;
    for (size_t i = 0; i <= r->options.repeat; i++) { /* the first step touches all memory, and is not counted */
        size_t at = i > 0 ? i - 1 : 0;
        run_step(r, &accumulate[at], &end[at]);
        if (i == 0) m->first_loss = r->trainer.losses.nll[0] / (double)r->trainer.losses.targets[0];
        step[at] = accumulate[at] + end[at];
        for (size_t k = 0; k <= D; k++) nll[k] = 0.0, targets[k] = 0;
        forward[at] = run_forward(r, nll, targets);
        if (targets[0] != r->targets[0]) bench_die("dsv3_evaluate", "has seen other targets");
        if (i == 0) m->peak_bytes = bench_peak_bytes();
        peak = bench_peak_compiled(&r->context, PEAK_PASSES);
        if (peak > m->compiled) m->compiled = peak;
        peak = bench_peak_fma(&r->context, PEAK_PASSES, &m->fma_name);
        if (peak > m->fma) m->fma = peak;
    }
    m->step = bench_summary(step, r->options.repeat);
    m->forward = bench_summary(forward, r->options.repeat);
    m->accumulate = bench_summary(accumulate, r->options.repeat);
    m->end = bench_summary(end, r->options.repeat);
    free(nll);
    free(targets);
}

int main(int argc, char **argv) {
    static bench_run r;
    bench_results m;
    memset(&m, 0, sizeof m);
    parse(&r.options, argc, argv);
    run_init(&r);
    measure(&r, &m);
    if (r.options.line) {
        print_line(&r, &m);
    } else {
        print_table(&r, &m);
    }
    run_free(&r);
    return fflush(stdout) != 0 || ferror(stdout);
}
