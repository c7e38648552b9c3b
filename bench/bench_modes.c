/* bench_modes -- what fast mode (DSV3_FAST) and smaller types of weights cost: logits, distributions and greedy choices
 * beside those of exact mode, on the same tokens. How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_modes"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"

#include <math.h>

#define ROWS 128 /* of a call, as `dsv3 score` has it: the rows decide about the form of attention */
#define MAX_MODELS 16
#define MAX_WEIGHTS (DSV3_TYPES + 1)
#define MAX_THREADS 1024
#define MAX_TEXT 1073741824L
#define NO_TARGET (-1)

static const char help[] =
    "usage: bench_modes [options]\n"
    "The error of fast mode, and of smaller types of weights; bench/README.md explains the numbers.\n"
    "  --model DIR       a checkpoint; may be repeated. Default: tests/golden/{v2,v3,v3_bf16,v3_fp8,v3_noqlora},\n"
    "                    examples/models/{austen,micro}. The tokens of its golden.safetensors are read, or the text:\n"
    "                    if there is no such file, or one with a greedy continuation, as of trained models\n"
    "  --text FILE       default examples/text/austen.txt; its bytes are the tokens\n"
    "  --last P          only the last P percent of the text, 1 .. 100; default 1\n"
    "  --type T          beside the weights as stored, convert them to F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0;\n"
    "                    default: for models that read the text each of the last four, for others none\n"
    "  --attention FORM  auto (default), absorbed, expanded\n"
    "  --backend NAME    default: the best one that runs here\n"
    "  --threads N       1 .. 1024; default: all cores\n"
    "  --line            lines of key=value pairs instead of tables\n"
    "  --help            this text\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

static const char *const default_models[] = {
    "tests/golden/v2",         "tests/golden/v3",        "tests/golden/v3_bf16", "tests/golden/v3_fp8",
    "tests/golden/v3_noqlora", "examples/models/austen", "examples/models/micro"};
#define DEFAULT_MODELS (sizeof default_models / sizeof *default_models)

/* ---- Options */

typedef struct bench_options {
    const char *model[MAX_MODELS], *text;
    size_t models, last, threads;
    int type; /* -1: not given */
    dsv3_attention attention;
    dsv3_backend backend;
    int line;
} bench_options;

static void parse_model(bench_options *o, const char *value) {
    if (o->models == MAX_MODELS) bench_usage("--model", value, "at most 16 of them");
    o->model[o->models++] = value;
}

static void parse_attention(bench_options *o, const char *value) {
    static const char *const names[] = {"auto", "absorbed", "expanded", NULL};
    static const dsv3_attention forms[] = {DSV3_ATTENTION_AUTO, DSV3_ATTENTION_ABSORBED, DSV3_ATTENTION_EXPANDED};
    o->attention = forms[bench_choice("--attention", value, names, "auto, absorbed or expanded")];
}

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--model") == 0) parse_model(o, value);
    if (strcmp(option, "--text") == 0) o->text = value;
    if (strcmp(option, "--last") == 0) o->last = bench_number(option, value, 1, 100);
    if (strcmp(option, "--type") == 0) o->type = (int)bench_type(option, value);
    if (strcmp(option, "--attention") == 0) parse_attention(o, value);
    if (strcmp(option, "--backend") == 0) o->backend = bench_backend(option, value);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--model",     "--text",    "--last",    "--type",
                                        "--attention", "--backend", "--threads", NULL};
    memset(o, 0, sizeof *o);
    o->text = "examples/text/austen.txt";
    o->last = 1;
    o->type = -1;
    o->attention = DSV3_ATTENTION_AUTO;
    o->backend = DSV3_BACKEND_AUTO;
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
    if (o->models > 0) return;
    for (size_t i = 0; i < DEFAULT_MODELS; i++) parse_model(o, default_models[i]);
}

/* ---- What is run, and what comes out of it */

/* A model with some weights in one mode. */
typedef struct bench_pass {
    dsv3_cache cache;
    void *memory;
    float *logits;   /* [ROWS, V] of the call under way */
    double *log_sum; /* [ROWS] log sum exp of them */
    int32_t *expert; /* [L, ROWS, K] of the call under way; dense layers have none */
    double nats;     /* sum of -log p over all targets */
} bench_pass;

/* Of one pass against another, over all rows. */
typedef struct bench_error {
    double most, largest;        /* largest difference of a logit, largest logit */
    double most_routed;          /* largest difference in rows with the same experts */
    double squares, all_squares; /* sums of squares of differences, of logits */
    double kl, kl_most;          /* nats: sum over rows, largest row */
    size_t same, routed, rows;   /* rows with the same likeliest token, with the same experts in all layers; all */
} bench_error;

/* The model with one type of weights. */
typedef struct bench_weights {
    checkpoint file;
    dsv3_type type;
    bench_pass pass[2];    /* by dsv3_compute */
    bench_error mode;      /* of fast against exact */
    bench_error stored[2]; /* of both against exact with the weights as stored; nothing for these themselves */
} bench_weights;

typedef struct bench_run {
    const bench_options *options;
    const char *model;
    dsv3_context context;
    dsv3_workspace workspace;
    void *workspace_memory;
    bench_weights weights[MAX_WEIGHTS]; /* the first as stored */
    size_t n_weights;
    int32_t *token, *target; /* [n]; NO_TARGET where no next token is known */
    size_t n, targets;
    size_t window; /* tokens that are read together, each time from an empty cache */
    int is_text;   /* bool: bytes of --text, not golden tokens */
} bench_run;

/* ---- Tokens */

static void tokens_alloc(bench_run *r, size_t n) {
    r->n = n;
    r->token = (int32_t *)bench_alloc(n * sizeof *r->token);
    r->target = (int32_t *)bench_alloc(n * sizeof *r->target);
}

/* The golden file's tokens [B, S]. Returns 0 if there are none that this program should use. */
static int tokens_golden(bench_run *r) {
    char path[4096];
    st_file golden;
    st_error error;
    const st_tensor *t;
    int32_t V = r->weights[0].file.config.vocab_size;
    snprintf(path, sizeof path, "%s/golden.safetensors", r->model);
    if (access(path, F_OK) != 0) return 0;
    if (st_open(&golden, path, &error) != ST_OK) bench_die("golden", error.message);
    t = st_find(&golden, "tokens");
    if (t == NULL || t->dtype != ST_I32 || t->rank != 2 || t->bytes == 0) bench_die(path, "has no tokens I32 [B, S]");
    if (st_find(&golden, "greedy") != NULL) {
        st_close(&golden);
        return 0;
    }
    tokens_alloc(r, t->bytes / sizeof *r->token);
    memcpy(r->token, t->data, t->bytes);
    r->window = (size_t)t->shape[1];
    for (size_t i = 0; i < r->n; i++) {
        if (r->token[i] < 0 || r->token[i] >= V) bench_die(path, "has a token outside the vocabulary");
        r->target[i] = (i + 1) % r->window != 0 ? r->token[i + 1] : NO_TARGET;
    }
    r->targets = r->n - r->n / r->window;
    st_close(&golden);
    return 1;
}

/* The last bytes of the text: all but the last one are read, all but the first predicted. They begin, and are cut into
 * windows, where `dsv3 score` does it. */
static void tokens_text(bench_run *r) {
    const bench_options *o = r->options;
    const dsv3_config *c = &r->weights[0].file.config;
    FILE *f = fopen(o->text, "rb");
    long size = f != NULL && fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
    size_t bytes, first;
    unsigned char *text;
    if (c->vocab_size < 256) bench_die(r->model, "has a vocabulary smaller than that of bytes");
    if (size < 0 || size > MAX_TEXT) bench_die(o->text, "cannot be read, or has more than 1 GiB");
    first = (size_t)((double)size * (1 - (double)o->last / 100));
    bytes = (size_t)size - first;
    if (bytes < 2) bench_die(o->text, "is too short");
    text = (unsigned char *)bench_alloc(bytes);
    if (fseek(f, (long)first, SEEK_SET) != 0 || fread(text, 1, bytes, f) != bytes) {
        bench_die(o->text, "cannot be read");
    }
    fclose(f);
    tokens_alloc(r, bytes - 1);
    for (size_t i = 0; i < r->n; i++) {
        r->token[i] = text[i];
        r->target[i] = text[i + 1];
    }
    r->targets = r->n;
    r->window = (size_t)c->max_position_embeddings < r->n ? (size_t)c->max_position_embeddings : r->n;
    r->is_text = 1;
    free(text);
}

/* ---- Weights */

/* That of attention's output stands for all: embedding, head, routers and norms may have another one. */
static dsv3_type weights_type(const checkpoint *file) { return file->model.layers[0].o_proj.type; }

/* Converted as by `dsv3 convert`, into a directory of its own that is gone as soon as the files are open. Returns what
 * has failed, or ST_OK. */
static st_result convert(checkpoint *to, const checkpoint *from, const char *model, const char *directory,
                         dsv3_type type, st_error *error) {
    char *old = NULL, *text = NULL;
    checkpoint source = *from; /* a finder takes one that it could change, and does not */
    size_t length;
    st_result result = checkpoint_config_read(&old, &length, model, error);
    if (result == ST_OK) result = checkpoint_config_adapt(&text, old, length, model, type, error);
    if (result == ST_OK) result = checkpoint_config_write(directory, text, error);
    if (result == ST_OK) result = checkpoint_save(directory, &from->config, checkpoint_find, &source, type, error);
    if (result == ST_OK) result = checkpoint_open(to, directory, error);
    ST_FREE(old);
    ST_FREE(text);
    return result;
}

static void remove_files(const char *directory) {
    static const char *const names[] = {"config.json", "model.safetensors"};
    char path[4096];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        (void)unlink(path);
    }
    (void)rmdir(directory);
}

static void weights_convert(bench_run *r, dsv3_type type) {
    bench_weights *w = &r->weights[r->n_weights];
    const char *base = getenv("TMPDIR");
    char directory[2048];
    st_error error;
    st_result result;
    if (type == r->weights[0].type) return;
    snprintf(directory, sizeof directory, "%s/bench_modes.XXXXXX", base != NULL && *base != '\0' ? base : "/tmp");
    if (mkdtemp(directory) == NULL) bench_die(directory, "cannot be made");
    result = convert(&w->file, &r->weights[0].file, r->model, directory, type, &error);
    remove_files(directory);
    if (result != ST_OK) bench_die(dsv3_type_name(type), error.message);
    w->type = type;
    r->n_weights++;
}

static size_t expert_numbers(const dsv3_config *c) {
    return (size_t)c->num_hidden_layers * ROWS * (size_t)c->num_experts_per_tok;
}

static void pass_init(bench_run *r, const checkpoint *file, bench_pass *p) {
    size_t bytes;
    p->expert = (int32_t *)bench_alloc(expert_numbers(&file->config) * sizeof *p->expert);
    memset(p->expert, 0, expert_numbers(&file->config) * sizeof *p->expert);
    bench_check(dsv3_cache_size(&file->config, r->window, DSV3_F32, &bytes, NULL), "dsv3_cache_size");
    p->memory = bench_alloc(bytes);
    bench_check(dsv3_cache_init(&file->config, &p->cache, r->window, DSV3_F32, p->memory, bytes, NULL),
                "dsv3_cache_init");
    p->logits = (float *)bench_alloc(ROWS * (size_t)file->config.vocab_size * sizeof *p->logits);
    p->log_sum = (double *)bench_alloc(ROWS * sizeof *p->log_sum);
}

static void run_init(bench_run *r, const bench_options *o, const char *model) {
    static const dsv3_type types[] = {DSV3_BF16, DSV3_F8_E4M3, DSV3_Q8_0, DSV3_Q4_0};
    const dsv3_config *config = &r->weights[0].file.config;
    st_error error;
    size_t bytes;
    memset(r, 0, sizeof *r);
    r->options = o;
    r->model = model;
    bench_context(&r->context, o->backend, o->threads);
    r->context.attention = o->attention;
    if (checkpoint_open(&r->weights[0].file, model, &error) != ST_OK) bench_die("model", error.message);
    r->weights[0].type = weights_type(&r->weights[0].file);
    r->n_weights = 1;
    if (!tokens_golden(r)) tokens_text(r);
    if (o->type >= 0) weights_convert(r, (dsv3_type)o->type);
    for (size_t i = 0; o->type < 0 && r->is_text && i < sizeof types / sizeof *types; i++) {
        weights_convert(r, types[i]);
    }
    for (size_t i = 0; i < r->n_weights; i++) {
        for (int mode = DSV3_EXACT; mode <= DSV3_FAST; mode++) {
            pass_init(r, &r->weights[i].file, &r->weights[i].pass[mode]);
        }
    }
    bench_check(dsv3_workspace_size(config, ROWS, r->context.threads, &bytes, NULL), "dsv3_workspace_size");
    r->workspace_memory = bench_alloc(bytes);
    bench_check(
        dsv3_workspace_init(config, &r->workspace, ROWS, r->context.threads, r->workspace_memory, bytes, NULL),
        "dsv3_workspace_init");
}

static void run_free(bench_run *r) {
    for (size_t i = 0; i < r->n_weights; i++) {
        for (int mode = DSV3_EXACT; mode <= DSV3_FAST; mode++) {
            bench_pass *p = &r->weights[i].pass[mode];
            free(p->memory);
            free(p->logits);
            free(p->log_sum);
            free(p->expert);
        }
        checkpoint_close(&r->weights[i].file);
    }
    free(r->workspace_memory);
    free(r->token);
    free(r->target);
}

/* ---- Running and comparing */

static double log_sum_exp(const float *z, size_t n) {
    double top = (double)z[0], sum = 0.0;
    for (size_t i = 1; i < n; i++) {
        if ((double)z[i] > top) top = (double)z[i];
    }
    for (size_t i = 0; i < n; i++) sum += exp((double)z[i] - top);
    return top + log(sum);
}

/* The experts of a layer, where the pass under way keeps them. */
typedef struct bench_watch {
    bench_pass *pass;
    size_t K;
} bench_watch;

static void watch_routing(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                          size_t n) {
    const bench_watch *w = (const bench_watch *)user;
    (void)score;
    (void)gate;
    memcpy(w->pass->expert + (size_t)layer * ROWS * w->K, idx, n * w->K * sizeof *idx);
}

/* n rows from `begin` on, appended to the pass's cache. */
static void pass_run(bench_run *r, bench_weights *w, dsv3_compute mode, size_t begin, size_t n) {
    bench_pass *p = &w->pass[mode];
    size_t V = (size_t)w->file.config.vocab_size;
    bench_watch watch;
    dsv3_batch batch;
    dsv3_error error;
    watch.pass = p;
    watch.K = (size_t)w->file.config.num_experts_per_tok;
    r->context.observer.user = &watch;
    r->context.observer.routing = watch_routing;
    memset(&batch, 0, sizeof batch);
    batch.rows = batch.outputs = n;
    batch.token = r->token + begin;
    r->context.compute = mode;
    bench_check_error(
        dsv3_forward(&r->context, p->logits, &w->file.model, &p->cache, 1, &batch, &r->workspace, &error),
        "dsv3_forward", &error);
    for (size_t t = 0; t < n; t++) {
        int32_t target = r->target[begin + t];
        p->log_sum[t] = log_sum_exp(p->logits + t * V, V);
        if (target != NO_TARGET) p->nats += p->log_sum[t] - (double)p->logits[t * V + (size_t)target];
    }
}

static size_t likeliest(const float *z, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++) {
        if (z[i] > z[best]) best = i;
    }
    return best;
}

/* Has row t the same experts in all layers? Their order within a layer follows the scores and does not count. */
static int same_experts(const bench_pass *q, const bench_pass *p, const dsv3_config *c, size_t t) {
    size_t L = (size_t)c->num_hidden_layers, K = (size_t)c->num_experts_per_tok;
    for (size_t i = 0; i < L; i++) {
        const int32_t *a = q->expert + (i * ROWS + t) * K, *b = p->expert + (i * ROWS + t) * K;
        for (size_t j = 0; j < K; j++) {
            size_t k = 0;
            while (k < K && b[k] != a[j]) k++;
            if (k == K) return 0;
        }
    }
    return 1;
}

/* Adds a row: q of the pass in question, p of what it is compared with. KL(p || q) = sum_i p_i (log p_i - log q_i). */
static void error_row(bench_error *e, const float *q, double q_sum, const float *p, double p_sum, size_t V,
                      int routed) {
    double kl = 0.0;
    for (size_t i = 0; i < V; i++) {
        double x = (double)p[i], d = (double)q[i] - x, log_p = x - p_sum;
        if (fabs(d) > e->most) e->most = fabs(d);
        if (routed && fabs(d) > e->most_routed) e->most_routed = fabs(d);
        if (fabs(x) > e->largest) e->largest = fabs(x);
        e->squares += d * d;
        e->all_squares += x * x;
        kl += exp(log_p) * (log_p - ((double)q[i] - q_sum));
    }
    if (kl < 0.0) kl = 0.0; /* only rounding can do that */
    e->kl += kl;
    if (kl > e->kl_most) e->kl_most = kl;
    e->same += likeliest(q, V) == likeliest(p, V);
    e->routed += routed != 0;
    e->rows++;
}

static void error_add(bench_error *e, const bench_pass *q, const bench_pass *p, const dsv3_config *c, size_t n) {
    size_t V = (size_t)c->vocab_size;
    for (size_t t = 0; t < n; t++) {
        error_row(e, q->logits + t * V, q->log_sum[t], p->logits + t * V, p->log_sum[t], V, same_experts(q, p, c, t));
    }
}

/* The same rows with all weights in both modes. */
static void rows_run(bench_run *r, size_t begin, size_t n) {
    const bench_pass *stored = &r->weights[0].pass[DSV3_EXACT];
    const dsv3_config *c = &r->weights[0].file.config;
    for (size_t i = 0; i < r->n_weights; i++) {
        bench_weights *w = &r->weights[i];
        pass_run(r, w, DSV3_EXACT, begin, n);
        pass_run(r, w, DSV3_FAST, begin, n);
        error_add(&w->mode, &w->pass[DSV3_FAST], &w->pass[DSV3_EXACT], c, n);
        for (int mode = DSV3_EXACT; i > 0 && mode <= DSV3_FAST; mode++) {
            error_add(&w->stored[mode], &w->pass[mode], stored, c, n);
        }
    }
}

static void run(bench_run *r) {
    for (size_t first = 0; first < r->n; first += r->window) {
        size_t end = r->n - first < r->window ? r->n : first + r->window;
        for (size_t i = 0; i < r->n_weights; i++) {
            for (int mode = DSV3_EXACT; mode <= DSV3_FAST; mode++) {
                bench_check(dsv3_cache_truncate(&r->weights[i].pass[mode].cache, 0, NULL), "dsv3_cache_truncate");
            }
        }
        for (size_t t = first; t < end; t += ROWS) rows_run(r, t, end - t < ROWS ? end - t : ROWS);
    }
}

/* ---- What is printed */

static double bits(const bench_run *r, const bench_pass *p) {
    return r->targets > 0 ? p->nats / (double)r->targets / log(2.0) : 0.0;
}

/* What a pass shows against an exact one with the weights `base`. */
static void print_row(const bench_run *r, const bench_weights *w, dsv3_compute mode, const bench_error *e,
                      const bench_weights *base) {
    double largest = e->largest > 0.0 ? e->largest : 1.0, rows = (double)e->rows; /* all logits 0: then so is most */
    double rms = e->all_squares > 0.0 ? sqrt(e->squares / e->all_squares) : 0.0;
    double same = 100.0 * (double)e->same / rows, routed = 100.0 * (double)e->routed / rows;
    double now = bits(r, &w->pass[mode]), was = bits(r, &base->pass[DSV3_EXACT]);
    if (r->options->line) {
        printf("model=%s type=%s mode=%s against=%s backend=%s tokens=%zu logit_max=%.3e logit_max_routed=%.3e "
               "logit_rms=%.3e kl_mean=%.3e kl_max=%.3e same=%.4f routed=%.4f bits=%.6f bits_against=%.6f\n",
               r->model, dsv3_type_name(w->type), bench_mode_names[mode], dsv3_type_name(base->type),
               r->context.backend, e->rows, e->most / largest, e->most_routed / largest, rms, e->kl / rows,
               e->kl_most, same, routed, now, was);
    } else {
        printf("  %-8s%-5s  %-8s%-5s %10.1e %9.1e %9.1e %9.1e %9.1e %7.2f %7.2f %10.5f %8.5f\n",
               dsv3_type_name(w->type), bench_mode_names[mode], dsv3_type_name(base->type),
               bench_mode_names[DSV3_EXACT], e->most / largest, e->most_routed / largest, rms, e->kl / rows,
               e->kl_most, same, routed, now, was);
    }
}

static void print_head(const bench_run *r) {
    const bench_options *o = r->options;
    char what[64];
    if (o->line) return;
    snprintf(what, sizeof what, "last %zu %% of ", o->last);
    printf("\n%s: %zu tokens (%s%s), %zu at a time\n", r->model, r->n, r->is_text ? what : "golden",
           r->is_text ? o->text : "", r->window);
    printf("  %-13s  %-13s %10s %9s %9s %9s %9s %7s %7s %10s %8s\n", "weights, mode", "against", "logit max",
           "of routed", "logit rms", "KL mean", "KL max", "same %", "routed%", "bits/token", "against");
}

static void print_run(const bench_run *r) {
    print_head(r);
    for (size_t i = 0; i < r->n_weights; i++) {
        const bench_weights *w = &r->weights[i];
        print_row(r, w, DSV3_FAST, &w->mode, w);
        for (int mode = DSV3_EXACT; i > 0 && mode <= DSV3_FAST; mode++) {
            print_row(r, w, (dsv3_compute)mode, &w->stored[mode], &r->weights[0]);
        }
    }
}

int main(int argc, char **argv) {
    static bench_run r;
    bench_options options;
    parse(&options, argc, argv);
    for (size_t i = 0; i < options.models; i++) {
        run_init(&r, &options, options.model[i]);
        if (i == 0 && !options.line) {
            printf("error of fast mode and of types of weights, backend %s\n", r.context.backend);
            bench_print_machine(&r.context);
        }
        run(&r);
        print_run(&r);
        run_free(&r);
    }
    return fflush(stdout) != 0 || ferror(stdout);
}
