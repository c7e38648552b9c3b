/* bench_mtp -- what drafting with the MTP modules gains over plain decoding: with a trained model, by writing text
 * both ways; with a synthetic one, by timing steps of several rows. How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_mtp"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"

#define PROMPT 128 /* tokens before the first written one */
#define MAX_DRAFTS 15
#define MAX_TOKENS 16384
#define MAX_PROMPTS 1024
#define MAX_SEQUENCES 64
#define MAX_TEXT 1073741824L
#define MAX_REPEAT 100
#define MAX_THREADS 1024
#define TEXT "examples/text/austen.txt"

static const char help[] =
    "usage: bench_mtp [options]\n"
    "Plain decoding against drafting with the MTP modules; bench/README.md explains the numbers.\n"
    "  --model DIR       a checkpoint (default examples/models/austen); the bytes of the text are its tokens\n"
    "  --text FILE       cut the prompts from this file; default: the last 5 % of " TEXT "\n"
    "  --prompts N       prompts of 128 tokens, 1 .. 1024; default 4, or as many as --sequences\n"
    "  --temp T          0 (default) .. 100\n"
    "  --shape NAME      instead of --model, random weights: bench-1b, austen, micro. Times steps of several rows\n"
    "  --type T          weights of the shape: F32, F16, BF16 (default), F8_E4M3, Q8_0, Q4_0\n"
    "  --drafts K        most drafts in a step, 1 .. 15; default 4. All numbers of drafts from 0 on are run\n"
    "  --tokens N        tokens written behind each prompt, 1 .. 16384, default 300; with --shape: steps, default 8\n"
    "  --sequences S     texts written together, 1 .. 64; default 1\n"
    "  --backend NAME    default: every one that this machine can run, one after the other\n"
    "  --mode M          activations: exact (default), fast\n"
    "  --pack P          1: weights in the order of the backend, if it has one; 0 (default)\n"
    "  --threads N       1 .. 1024; default: all cores\n"
    "  --repeat R        1 .. 100; default 3\n"
    "  --line            lines of key=value pairs instead of tables\n"
    "  --help            this text\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Options */

typedef struct bench_options {
    const char *model, *text, *shape; /* NULL: not given */
    dsv3_config config;               /* of the shape */
    dsv3_type type;
    int type_given;
    double temperature;                                         /* < 0: not given */
    size_t prompts, drafts, tokens, sequences, threads, repeat; /* 0: not given */
    dsv3_backend backends[BENCH_BACKENDS];
    size_t n_backends;
    dsv3_compute mode;
    int pack, line;
} bench_options;

static void parse_backend(bench_options *o, const char *value) {
    o->n_backends = bench_backends(o->backends, value);
    if (o->n_backends == 0)
        bench_usage("--backend", value, "one that is compiled in and runs here, as \"reference\"");
}

static void parse_temperature(bench_options *o, const char *value) {
    char *end;
    o->temperature = strtod(value, &end);
    if (end == value || *end != '\0' || !(o->temperature >= 0.0 && o->temperature <= 100.0)) {
        bench_usage("--temp", value, "a number 0 .. 100");
    }
}

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--model") == 0) o->model = value;
    if (strcmp(option, "--text") == 0) o->text = value;
    if (strcmp(option, "--prompts") == 0) o->prompts = bench_number(option, value, 1, MAX_PROMPTS);
    if (strcmp(option, "--temp") == 0) parse_temperature(o, value);
    if (strcmp(option, "--shape") == 0) o->config = bench_shape(option, value, &o->shape);
    if (strcmp(option, "--drafts") == 0) o->drafts = bench_number(option, value, 1, MAX_DRAFTS);
    if (strcmp(option, "--tokens") == 0) o->tokens = bench_number(option, value, 1, MAX_TOKENS);
    if (strcmp(option, "--sequences") == 0) o->sequences = bench_number(option, value, 1, MAX_SEQUENCES);
    if (strcmp(option, "--backend") == 0) parse_backend(o, value);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--repeat") == 0) o->repeat = bench_number(option, value, 1, MAX_REPEAT);
    if (strcmp(option, "--mode") == 0) o->mode = bench_mode(option, value);
    if (strcmp(option, "--pack") == 0) o->pack = (int)bench_number(option, value, 0, 1);
    if (strcmp(option, "--type") == 0) {
        o->type = bench_type(option, value);
        o->type_given = 1;
    }
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--model",   "--text",   "--prompts", "--temp",      "--shape",
                                        "--type",    "--drafts", "--tokens",  "--sequences", "--backend",
                                        "--threads", "--repeat", "--mode",    "--pack",      NULL};
    memset(o, 0, sizeof *o);
    o->type = DSV3_BF16;
    o->temperature = -1.0;
    o->drafts = 4;
    o->sequences = 1;
    o->repeat = 3;
    o->n_backends = bench_backends(o->backends, NULL);
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
    if (o->shape != NULL && (o->model != NULL || o->text != NULL || o->prompts > 0 || o->temperature >= 0.0)) {
        bench_usage("--shape", o->shape, "no --model, --text, --prompts or --temp beside it");
    }
    if (o->shape == NULL && o->type_given) bench_usage("--type", dsv3_type_name(o->type), "a --shape beside it");
    if (o->prompts == 0) o->prompts = o->sequences > 4 ? o->sequences : 4;
    if (o->prompts < o->sequences) bench_usage("--prompts", "too few", "as many as --sequences, or more");
    if (o->tokens == 0) o->tokens = o->shape != NULL ? 8 : 300;
    if (o->model == NULL) o->model = "examples/models/austen";
    if (o->temperature < 0.0) o->temperature = 0.0;
}

static dsv3_workspace workspace_make(const dsv3_config *config, size_t rows, size_t threads, void **memory) {
    dsv3_workspace workspace;
    size_t bytes;
    bench_check(dsv3_workspace_size(config, rows, threads, &bytes, NULL), "dsv3_workspace_size");
    *memory = bench_alloc(bytes);
    memset(*memory, 0, bytes); /* the system hands out the pages now, not while we measure */
    bench_check(dsv3_workspace_init(config, &workspace, rows, threads, *memory, bytes, NULL), "dsv3_workspace_init");
    return workspace;
}

/* ---- Writing text with a trained model. The observer sees when modules and main model end; behind its final norm
 * each has only its head to compute. */

typedef struct bench_watch {
    int32_t layers; /* of the main model */
    int in_module, drafted;
    double module_end, main_end;
} bench_watch;

static void watch_hidden(void *user, int32_t layer, const float *x, size_t n) {
    bench_watch *w = (bench_watch *)user;
    (void)x;
    (void)n;
    if (layer >= 0) {
        w->in_module = layer >= w->layers;
    } else if (w->in_module) {
        w->module_end = bench_now();
        w->drafted = 1;
    } else {
        w->main_end = bench_now();
    }
}

/* What all prompts took with one number of drafts, in one repeat. */
typedef struct bench_tally {
    double prompt;             /* seconds: calls that are not timed otherwise */
    double seconds, drafting;  /* of the others; until the last module's final norm */
    double heads;              /* seconds behind the main model's final norm */
    size_t steps, drafting_in; /* calls, and those with modules */
    size_t turns, tokens;      /* steps of all sequences, and what they wrote */
} bench_tally;

typedef struct bench_writer {
    const bench_options *options;
    void *packed; /* weights, or NULL */
    size_t packed_bytes;
    checkpoint file;
    dsv3_context context;
    bench_watch watch;
    unsigned char *text;
    size_t text_bytes;
    int32_t *prompt; /* [prompts, PROMPT] */
    int32_t *plain;  /* [prompts, tokens + 2] what is written without drafts */
    dsv3_sequence sequence[MAX_SEQUENCES], *list[MAX_SEQUENCES];
    size_t at[MAX_SEQUENCES]; /* tokens written */
    void *memory[MAX_SEQUENCES];
    size_t memory_bytes, capacity;
    dsv3_workspace workspace;
    void *workspace_memory;
    float *logits;                                 /* [sequences (drafts + 1), V] */
    bench_tally tally[MAX_DRAFTS + 1][MAX_REPEAT]; /* by number of drafts */
    uint64_t drafted[MAX_DRAFTS + 1][MAX_DRAFTS], accepted[MAX_DRAFTS + 1][MAX_DRAFTS];
    int differs; /* bool: some greedy text is not that of plain decoding */
} bench_writer;

static void writer_read(bench_writer *w, const char *path, size_t part) {
    FILE *f = fopen(path, "rb");
    long size = f != NULL && fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
    if (size < 0 || size > MAX_TEXT) bench_die(path, "cannot be read, or has more than 1 GiB");
    w->text_bytes = (size_t)size / part;
    w->text = (unsigned char *)bench_alloc(w->text_bytes);
    if (w->text_bytes < PROMPT) bench_die(path, "is too short for a prompt");
    if (fseek(f, size - (long)w->text_bytes, SEEK_SET) != 0 || fread(w->text, 1, w->text_bytes, f) != w->text_bytes) {
        bench_die(path, "cannot be read");
    }
    fclose(f);
}

/* Prompts from all over the text. */
static void writer_prompts(bench_writer *w) {
    size_t P = w->options->prompts;
    w->prompt = (int32_t *)bench_alloc(P * PROMPT * sizeof *w->prompt);
    for (size_t i = 0; i < P * PROMPT; i++) {
        size_t begin = (size_t)((double)(w->text_bytes - PROMPT) * (double)(i / PROMPT) / (double)P);
        w->prompt[i] = w->text[begin + i % PROMPT];
    }
}

/* Everything that does not depend on the backend. */
static void writer_init(bench_writer *w, const bench_options *o) {
    st_error error;
    w->options = o;
    if (checkpoint_open(&w->file, o->model, &error) != ST_OK) bench_die("model", error.message);
    if (w->file.model.n_mtp < 1) bench_die(o->model, "has no MTP modules");
    if (w->file.config.vocab_size < 256) bench_die(o->model, "has a vocabulary smaller than that of bytes");
    writer_read(w, o->text != NULL ? o->text : TEXT, o->text != NULL ? 1 : 20);
    writer_prompts(w);
    w->plain = (int32_t *)bench_alloc(o->prompts * (o->tokens + 2) * sizeof *w->plain);
    w->logits =
        (float *)bench_alloc(o->sequences * (o->drafts + 1) * (size_t)w->file.config.vocab_size * sizeof *w->logits);
    w->capacity = PROMPT + (o->tokens + 3) * (o->drafts + 1); /* one may outrun the others */
    bench_check(dsv3_sequence_size(&w->file.model, w->capacity, DSV3_F32, PROMPT, o->drafts, &w->memory_bytes, NULL),
                "dsv3_sequence_size");
    for (size_t s = 0; s < o->sequences; s++) {
        w->memory[s] = bench_alloc(w->memory_bytes);
        w->list[s] = &w->sequence[s];
    }
}

static void writer_free(bench_writer *w) {
    for (size_t s = 0; s < w->options->sequences; s++) free(w->memory[s]);
    free(w->text);
    free(w->prompt);
    free(w->plain);
    free(w->logits);
    checkpoint_close(&w->file);
}

static void writer_begin(bench_writer *w, size_t first, size_t n, size_t drafts) {
    for (size_t i = 0; i < n; i++) {
        dsv3_sequence *s = &w->sequence[i];
        bench_check(dsv3_sequence_init(&w->file.model, s, w->capacity, DSV3_F32, PROMPT, drafts, w->memory[i],
                                       w->memory_bytes, NULL),
                    "dsv3_sequence_init");
        s->temperature = (float)w->options->temperature;
        s->rng.state = first + i;
        s->stop = -1;
        bench_check(dsv3_sequence_append(&w->file.model, s, w->prompt + (first + i) * PROMPT, PROMPT, NULL),
                    "dsv3_sequence_append");
        w->at[i] = 0;
    }
}

/* One call for the n sequences of the prompts from `first` on. Returns the tokens written. */
static size_t writer_step(bench_writer *w, size_t first, size_t n, size_t drafts) {
    size_t room = w->options->tokens + 2, written = 0;
    dsv3_error error;
    bench_check_error(dsv3_generate_step(&w->context, w->logits, &w->file.model, w->list, n, &w->workspace, &error),
                      "dsv3_generate_step", &error);
    for (size_t i = 0; i < n; i++) {
        const dsv3_sequence *s = &w->sequence[i];
        for (size_t j = 0; j < s->n_token; j++, w->at[i]++) {
            int32_t *plain = w->plain + (first + i) * room + w->at[i];
            if (w->at[i] >= room) continue;
            if (drafts == 0) *plain = s->token[j];
            if (*plain != s->token[j] && w->options->temperature <= 0.0) w->differs = 1;
        }
        written += s->n_token;
    }
    return written;
}

/* Writes `tokens` tokens on average behind each of n prompts. The first call reads the prompts, in the second one the
 * modules read them: these two are not part of decoding. */
static void writer_group(bench_writer *w, size_t first, size_t n, size_t drafts, size_t tokens, bench_tally *t) {
    double begin;
    writer_begin(w, first, n, drafts);
    begin = bench_now();
    writer_step(w, first, n, drafts);
    writer_step(w, first, n, drafts);
    t->prompt += bench_now() - begin;
    for (size_t written = 0; written < tokens * n;) {
        double end;
        size_t now;
        w->watch.drafted = 0;
        begin = bench_now();
        now = writer_step(w, first, n, drafts);
        end = bench_now();
        t->seconds += end - begin;
        t->heads += end - w->watch.main_end;
        if (w->watch.drafted) t->drafting += w->watch.module_end - begin;
        t->drafting_in += w->watch.drafted != 0;
        t->steps++;
        t->turns += n;
        t->tokens += now;
        written += now;
    }
}

static void writer_count(bench_writer *w, size_t n, size_t drafts) {
    for (size_t i = 0; i < n; i++) {
        const dsv3_sequence *s = &w->sequence[i];
        for (size_t j = 0; j < s->max_drafts; j++) {
            w->drafted[drafts][j] += s->drafted[j];
            w->accepted[drafts][j] += s->accepted[j];
        }
    }
}

/* Every number of drafts in turn for each group of prompts, so that a machine whose speed drifts treats all alike. */
static void writer_run(bench_writer *w, dsv3_backend backend) {
    const bench_options *o = w->options;
    bench_tally warm;
    memset(w->tally, 0, sizeof w->tally);
    memset(w->drafted, 0, sizeof w->drafted);
    memset(w->accepted, 0, sizeof w->accepted);
    memset(&warm, 0, sizeof warm);
    bench_context(&w->context, backend, o->threads);
    w->context.compute = o->mode;
    if (o->pack && w->packed == NULL) w->packed = bench_pack(&w->context, &w->file.model, &w->packed_bytes);
    w->context.observer.user = &w->watch;
    w->context.observer.hidden = watch_hidden;
    w->watch.layers = w->file.config.num_hidden_layers;
    w->workspace = workspace_make(&w->file.config, o->sequences * PROMPT, w->context.threads, &w->workspace_memory);
    writer_group(w, 0, o->sequences, 0, 1, &warm);
    writer_group(w, 0, o->sequences, o->drafts, 1, &warm); /* weights and their pages have now been read once */
    w->differs = 0; /* only now is w->plain complete whenever it is compared with */
    for (size_t repeat = 0; repeat < o->repeat; repeat++) {
        for (size_t first = 0; first < o->prompts; first += o->sequences) {
            size_t n = o->prompts - first < o->sequences ? o->prompts - first : o->sequences;
            for (size_t k = 0; k <= o->drafts; k++) {
                writer_group(w, first, n, k, o->tokens, &w->tally[k][repeat]);
                if (repeat == 0) writer_count(w, n, k);
            }
        }
    }
    free(w->workspace_memory);
}

/* ---- What is printed of that */

typedef struct bench_result {
    bench_stat speed, gain, step, drafting, prompt; /* tokens/s; times plain; ms per call; of it; ms per group */
    double tokens;                                  /* per step of a sequence */
} bench_result;

static bench_result writer_result(const bench_writer *w, size_t k) {
    const bench_options *o = w->options;
    double speed[MAX_REPEAT] = {0}, gain[MAX_REPEAT] = {0}, step[MAX_REPEAT] = {0}, drafting[MAX_REPEAT] = {0},
           prompt[MAX_REPEAT] = {0};
    size_t groups = bench_blocks(o->prompts, o->sequences);
    bench_result m;
    for (size_t i = 0; i < o->repeat; i++) {
        const bench_tally *t = &w->tally[k][i], *plain = &w->tally[0][i];
        double head = plain->heads / (double)plain->steps; /* a draft's takes as long */
        speed[i] = (double)t->tokens / t->seconds;
        gain[i] = speed[i] * plain->seconds / (double)plain->tokens;
        step[i] = 1e3 * t->seconds / (double)t->steps;
        drafting[i] = 1e3 * (t->drafting + head * (double)t->drafting_in) / (double)t->steps;
        prompt[i] = 1e3 * t->prompt / (double)groups;
    }
    m.speed = bench_summary(speed, o->repeat);
    m.gain = bench_summary(gain, o->repeat);
    m.step = bench_summary(step, o->repeat);
    m.drafting = bench_summary(drafting, o->repeat);
    m.prompt = bench_summary(prompt, o->repeat);
    m.tokens = (double)w->tally[k][0].tokens / (double)w->tally[k][0].turns;
    return m;
}

static double writer_rate(const bench_writer *w, size_t k, size_t place) {
    return w->drafted[k][place] > 0 ? (double)w->accepted[k][place] / (double)w->drafted[k][place] : 0.0;
}

static void writer_line(const bench_writer *w, size_t k, const bench_result *m) {
    const bench_options *o = w->options;
    printf("model=%s backend=%s threads=%zu sequences=%zu temp=%g drafts=%zu tokens_s=%.2f speedup=%.4f "
           "tokens_step=%.4f ms_step=%.4f ms_draft=%.4f ms_prompt=%.2f accepted=",
           o->model, w->context.backend, w->context.threads, o->sequences, o->temperature, k, m->speed.median,
           m->gain.median, m->tokens, m->step.median, m->drafting.median, m->prompt.median);
    for (size_t j = 0; j < k; j++) printf("%s%.4f", j > 0 ? "," : "", writer_rate(w, k, j));
    printf("\n");
}

static void writer_row(const bench_writer *w, size_t k, const bench_result *m) {
    printf("  %6zu %9.2f %9.2f %9.2f %9.2f %12.2f %9.3f %9.3f %10.1f", k, m->speed.median, m->speed.min, m->speed.max,
           m->gain.median, m->tokens, m->step.median, m->drafting.median, m->prompt.median);
    for (size_t j = 0; j < k; j++) printf("%s%.2f", j > 0 ? " " : "   ", writer_rate(w, k, j));
    printf("\n");
}

static void writer_print(const bench_writer *w) {
    const bench_options *o = w->options;
    if (!o->line) {
        printf("%s, backend %s, threads %zu\n", o->model, w->context.backend, w->context.threads);
        printf("%zu prompts of %d tokens, %zu at a time, %zu tokens each, temperature %g, repeats %zu\n", o->prompts,
               PROMPT, o->sequences, o->tokens, o->temperature, o->repeat);
        bench_print_machine(&w->context);
        printf("\n  %6s %9s %9s %9s %9s %12s %9s %9s %10s   %s\n", "drafts", "tokens/s", "min", "max", "speed-up",
               "tokens/step", "ms/step", "draft ms", "prompt ms", "accepted, by place");
    }
    for (size_t k = 0; k <= o->drafts; k++) {
        bench_result m = writer_result(w, k);
        if (o->line) writer_line(w, k, &m);
        if (!o->line) writer_row(w, k, &m);
    }
    if (!o->line && o->temperature <= 0.0 && !w->differs) printf("  the text is that of plain decoding each time\n");
}

static void bench_writing(const bench_options *o) {
    static bench_writer w;
    writer_init(&w, o);
    for (size_t b = 0; b < o->n_backends; b++) {
        writer_run(&w, o->backends[b]);
        if (b > 0 && !o->line) printf("\n");
        writer_print(&w);
        if (w.differs) bench_die("greedy text", "with drafts is not that of plain decoding");
    }
    writer_free(&w);
}

/* ---- Steps of several rows with a synthetic model. Nothing is accepted by a model with random weights, so the parts
 * of a step are timed, and put together for chances of acceptance that are assumed. */

typedef struct bench_stepper {
    const bench_options *options;
    void *packed; /* weights, or NULL */
    size_t packed_bytes;
    dsv3_config config;
    bench_synthetic synthetic;
    size_t n_mtp;
    dsv3_context context;
    dsv3_cache *caches; /* [1 + n_mtp, sequences] of the main model, then of each module */
    void *caches_memory;
    dsv3_workspace workspace;
    void *workspace_memory;
    float *logits;             /* [sequences (drafts + 1), V] */
    int32_t *token, *sequence; /* [sequences PROMPT] */
    int32_t *last;             /* [sequences] the last row of each */
    dsv3_rng rng;
    double main[MAX_DRAFTS + 2][MAX_REPEAT], module[MAX_DRAFTS + 2][MAX_REPEAT]; /* ms of a call, by rows */
} bench_stepper;

static void stepper_caches(bench_stepper *p) {
    size_t S = p->options->sequences, capacity = PROMPT + p->options->drafts + 1, main, module;
    unsigned char *memory;
    bench_check(dsv3_cache_size(&p->config, capacity, DSV3_F32, &main, NULL), "dsv3_cache_size");
    bench_check(dsv3_cache_mtp_size(&p->config, capacity, DSV3_F32, &module, NULL), "dsv3_cache_mtp_size");
    main = bench_blocks(main, BENCH_ALIGN) * BENCH_ALIGN;
    module = bench_blocks(module, BENCH_ALIGN) * BENCH_ALIGN;
    p->caches = (dsv3_cache *)bench_alloc((1 + p->n_mtp) * S * sizeof *p->caches);
    p->caches_memory = bench_alloc(S * (main + p->n_mtp * module));
    memory = (unsigned char *)p->caches_memory;
    for (size_t i = 0; i < (1 + p->n_mtp) * S; i++) {
        size_t bytes = i < S ? main : module;
        bench_check(i < S ? dsv3_cache_init(&p->config, &p->caches[i], capacity, DSV3_F32, memory, bytes, NULL)
                          : dsv3_cache_mtp_init(&p->config, &p->caches[i], capacity, DSV3_F32, memory, bytes, NULL),
                    "dsv3_cache_init");
        memory += bytes;
    }
}

/* Everything that does not depend on the backend. */
static void stepper_init(bench_stepper *p, const bench_options *o) {
    dsv3_context context;
    size_t S = o->sequences;
    p->options = o;
    p->config = o->config;
    if (p->config.num_nextn_predict_layers < 1) p->config.num_nextn_predict_layers = 1; /* as V3 has */
    bench_context(&context, DSV3_BACKEND_AUTO, o->threads);
    bench_synthetic_init(&p->synthetic, &p->config, o->type, &context);
    p->n_mtp = (size_t)p->synthetic.model.n_mtp;
    stepper_caches(p);
    p->logits = (float *)bench_alloc(S * (o->drafts + 1) * (size_t)p->config.vocab_size * sizeof *p->logits);
    p->token = (int32_t *)bench_alloc(S * PROMPT * sizeof *p->token);
    p->sequence = (int32_t *)bench_alloc(S * PROMPT * sizeof *p->sequence);
    p->last = (int32_t *)bench_alloc(S * sizeof *p->last);
}

static void stepper_free(bench_stepper *p) {
    bench_synthetic_free(&p->synthetic);
    free(p->caches);
    free(p->caches_memory);
    free(p->logits);
    free(p->token);
    free(p->sequence);
    free(p->last);
}

/* ms of a call of the main model (k = 0) or of module k with this many rows of each sequence at position `begin`. The
 * main model gives logits of all rows, as verification needs; a module of the last ones only. States are those of
 * the call before, which must have had as many rows. */
static double stepper_call(bench_stepper *p, size_t k, size_t begin, size_t rows, int logits) {
    size_t S = p->options->sequences;
    dsv3_cache *caches = p->caches + k * S;
    dsv3_batch batch;
    dsv3_error error;
    double start, end;
    memset(&batch, 0, sizeof batch);
    batch.rows = S * rows;
    batch.token = p->token;
    batch.sequence = p->sequence;
    for (size_t i = 0; i < S * rows; i++) p->sequence[i] = (int32_t)(i / rows);
    for (size_t s = 0; s < S; s++) {
        p->last[s] = (int32_t)((s + 1) * rows - 1);
        bench_check(dsv3_cache_truncate(&caches[s], begin, NULL), "dsv3_cache_truncate");
    }
    if (logits) batch.outputs = k == 0 ? S * rows : S;
    if (logits && k > 0) batch.output = p->last;
    start = bench_now();
    bench_check_error(
        k == 0 ? dsv3_forward(&p->context, p->logits, &p->synthetic.model, caches, S, &batch, &p->workspace, &error)
               : dsv3_mtp_forward(&p->context, p->logits, &p->synthetic.model, k, caches, S, &batch,
                                  p->workspace.hidden, &p->workspace, &error),
        k == 0 ? "dsv3_forward" : "dsv3_mtp_forward", &error);
    end = bench_now();
    return 1e3 * (end - start);
}

static void stepper_tokens(bench_stepper *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        p->token[i] = (int32_t)(dsv3_random(&p->rng) % (uint64_t)p->config.vocab_size);
    }
}

/* Steps with other random tokens each, every number of rows in turn; modules take turns. */
static void stepper_run(bench_stepper *p, dsv3_backend backend) {
    const bench_options *o = p->options;
    memset(p->main, 0, sizeof p->main);
    memset(p->module, 0, sizeof p->module);
    p->rng.state = 1;
    bench_context(&p->context, backend, o->threads);
    p->context.compute = o->mode;
    if (o->pack && p->packed == NULL) p->packed = bench_pack(&p->context, &p->synthetic.model, &p->packed_bytes);
    p->workspace = workspace_make(&p->config, o->sequences * PROMPT, p->context.threads, &p->workspace_memory);
    stepper_tokens(p, o->sequences * PROMPT);
    for (size_t k = 0; k <= p->n_mtp; k++) (void)stepper_call(p, k, 0, PROMPT, 0);
    for (size_t i = 0; i < o->repeat * o->tokens; i++) {
        stepper_tokens(p, o->sequences * (o->drafts + 1));
        for (size_t rows = 1; rows <= o->drafts + 1; rows++) {
            p->main[rows][i / o->tokens] += stepper_call(p, 0, PROMPT, rows, 1) / (double)o->tokens;
            p->module[rows][i / o->tokens] += stepper_call(p, 1 + i % p->n_mtp, PROMPT, rows, 1) / (double)o->tokens;
        }
    }
    free(p->workspace_memory);
}

/* Speed-up with K drafts when each is accepted with this chance, if those before it were. A step whose predecessor
 * had `a` of its drafts accepted makes one call of each of M = min(K, n_mtp) modules, k = 1 .. M, with max(a + 1, k)
 * rows: the new tokens, and again the rows that had read a refused draft. Other drafts are calls of one row. */
static double stepper_gain(const double *main, const double *module, size_t K, size_t n_mtp, double chance) {
    size_t M = K < n_mtp ? K : n_mtp;
    double ms = main[K + 1] + (double)(K - M) * module[1], tokens = 0.0, reached = 1.0;
    for (size_t a = 0; a <= K; a++) {
        double p = a < K ? reached * (1.0 - chance) : reached;
        for (size_t k = 1; k <= M; k++) ms += p * module[a + 1 > k ? a + 1 : k];
        tokens += p * (double)(a + 1);
        reached *= chance;
    }
    return tokens * main[1] / ms;
}

static const double chances[] = {0.5, 0.6, 0.7, 0.8, 0.9};
#define CHANCES (sizeof chances / sizeof chances[0])

static void stepper_lines(const bench_stepper *p, const double *main, const double *module) {
    const bench_options *o = p->options;
    for (size_t rows = 1; rows <= o->drafts + 1; rows++) {
        printf("shape=%s type=%s backend=%s threads=%zu sequences=%zu rows=%zu ms_step=%.4f ms_module=%.4f", o->shape,
               dsv3_type_name(o->type), p->context.backend, p->context.threads, o->sequences, rows, main[rows],
               module[rows]);
        for (size_t i = 0; i < CHANCES; i++) {
            double gain = rows > 1 ? stepper_gain(main, module, rows - 1, p->n_mtp, chances[i]) : 1.0;
            printf(" gain%.0f=%.4f", 100.0 * chances[i], gain);
        }
        printf("\n");
    }
}

static void stepper_table(const bench_stepper *p, const bench_stat *stat, const double *main, const double *module) {
    const bench_options *o = p->options;
    printf("%s %s, backend %s, threads %zu, MTP modules %zu\n", o->shape, dsv3_type_name(o->type), p->context.backend,
           p->context.threads, p->n_mtp);
    printf("%zu at a time behind %d tokens, steps %zu, repeats %zu\n", o->sequences, PROMPT, o->tokens, o->repeat);
    bench_print_machine(&p->context);
    printf("\n  %6s %11s %11s %11s %11s %11s\n", "rows", "ms/step", "min", "max", "of one row", "ms/module");
    for (size_t rows = 1; rows <= o->drafts + 1; rows++) {
        printf("  %6zu %11.3f %11.3f %11.3f %11.2f %11.3f\n", rows, main[rows], stat[rows].min, stat[rows].max,
               main[rows] / main[1], module[rows]);
    }
    printf("\n  speed-up if a draft is accepted with the chance\n  %6s", "drafts");
    for (size_t i = 0; i < CHANCES; i++) printf(" %11.1f", chances[i]);
    printf("\n");
    for (size_t K = 1; K <= o->drafts; K++) {
        printf("  %6zu", K);
        for (size_t i = 0; i < CHANCES; i++) printf(" %11.2f", stepper_gain(main, module, K, p->n_mtp, chances[i]));
        printf("\n");
    }
}

static void stepper_print(bench_stepper *p) {
    bench_stat stat[MAX_DRAFTS + 2];
    double main[MAX_DRAFTS + 2], module[MAX_DRAFTS + 2];
    for (size_t rows = 1; rows <= p->options->drafts + 1; rows++) {
        stat[rows] = bench_summary(p->main[rows], p->options->repeat);
        main[rows] = stat[rows].median;
        module[rows] = bench_summary(p->module[rows], p->options->repeat).median;
    }
    if (p->options->line) stepper_lines(p, main, module);
    if (!p->options->line) stepper_table(p, stat, main, module);
}

static void bench_stepping(const bench_options *o) {
    static bench_stepper p;
    stepper_init(&p, o);
    for (size_t b = 0; b < o->n_backends; b++) {
        stepper_run(&p, o->backends[b]);
        if (b > 0 && !o->line) printf("\n");
        stepper_print(&p);
    }
    stepper_free(&p);
}

int main(int argc, char **argv) {
    bench_options options;
    parse(&options, argc, argv);
    if (options.shape != NULL) bench_stepping(&options);
    if (options.shape == NULL) bench_writing(&options);
    return fflush(stdout) != 0 || ferror(stdout);
}
