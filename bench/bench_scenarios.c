/* bench_scenarios -- three ways to use a model, with the demo model: a short prompt and a short answer, a long text,
 * a conversation. Tokens per second, time to the first token and from token to token, and whether the text is that of
 * the reference. How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_scenarios"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"

#define MAX_DRAFTS 15
#define MAX_THREADS 1024
#define MAX_REPEAT 100
#define MAX_TEXT 1073741824L
#define MAX_TURNS 8
#define PROMPT_ROWS 256 /* most prompt tokens of one call */
#define TEXT "examples/text/austen.txt"

static const char help[] =
    "usage: bench_scenarios [options]\n"
    "A short prompt, a long text and a conversation; bench/README.md explains the numbers.\n"
    "  --model DIR       a checkpoint (default examples/models/austen); the bytes of the text are its tokens\n"
    "  --text FILE       cut the prompts from this file; default: the last 5 % of " TEXT "\n"
    "  --mtp K           also with K drafts of the MTP modules in a step, 0 .. 15; default 3. 0: without only\n"
    "  --mode M          activations: exact, fast; default: both\n"
    "  --pack P          1: weights in the order of the backend, if it has one; 0 (default)\n"
    "  --backend NAME    default: the best one that runs here\n"
    "  --threads N       1 .. 1024; default: all cores\n"
    "  --repeat R        1 .. 100; default 3. Every repeat has prompts of its own\n"
    "  --line            lines of key=value pairs instead of tables\n"
    "  --help            this text\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Scenarios: a text begins with `first` tokens and has `turns` of `prompt` others; behind each, `answer` tokens
 * are written. claimed: tokens/s and milliseconds of a note on V3's architecture, for these names */

typedef struct scenario {
    const char *name, *key;
    size_t texts, turns, prompt, answer;
    double claimed_speed, claimed_ms; /* 0: none */
} scenario;

static const scenario scenarios[] = {
    {"short prompt", "short", 8, 1, 32, 32, 5800.0, 18.2},
    {"long generation", "long", 1, 1, 64, 896, 3200.0, 42.5},
    {"multi-turn chat", "chat", 1, 6, 64, 80, 4500.0, 27.8},
};
#define SCENARIOS (sizeof scenarios / sizeof *scenarios)
#define MOST_WRITTEN 2048 /* tokens of a scenario in a repeat: texts * turns * answer, and a margin for drafts */

/* ---- Options */

typedef struct bench_options {
    const char *model, *text;
    int mode; /* -1: both */
    int pack;
    dsv3_backend backend;
    size_t drafts, threads, repeat;
    int line;
} bench_options;

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--model") == 0) o->model = value;
    if (strcmp(option, "--text") == 0) o->text = value;
    if (strcmp(option, "--mtp") == 0) o->drafts = bench_number(option, value, 0, MAX_DRAFTS);
    if (strcmp(option, "--mode") == 0) o->mode = (int)bench_mode(option, value);
    if (strcmp(option, "--pack") == 0) o->pack = (int)bench_number(option, value, 0, 1);
    if (strcmp(option, "--backend") == 0) o->backend = bench_backend(option, value);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--repeat") == 0) o->repeat = bench_number(option, value, 1, MAX_REPEAT);
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--model",   "--text",    "--mtp",    "--mode",
                                        "--pack",    "--backend", "--threads", "--repeat", NULL};
    memset(o, 0, sizeof *o);
    o->model = "examples/models/austen";
    o->mode = -1;
    o->backend = DSV3_BACKEND_AUTO;
    o->drafts = 3;
    o->repeat = 3;
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
}

/* ---- What is run, and what comes out of it */

/* One way of running: a mode, with or without drafts. */
typedef struct bench_way {
    dsv3_compute mode;
    size_t drafts;
} bench_way;

#define MAX_WAYS 4

/* Of one scenario, run one way, all repeats. */
typedef struct bench_tally {
    double seconds;
    size_t read, written;   /* tokens of prompts; tokens of answers */
    size_t n_first, n_next; /* answers; tokens that followed another one */
    size_t same, compared;  /* tokens that are those of the first way, up to the first difference; all */
    double *first, *next;   /* [..] milliseconds: to the first token of each answer, between tokens */
} bench_tally;

typedef struct bench_run {
    bench_options options;
    checkpoint file;
    dsv3_context context;
    unsigned char *text;
    size_t text_bytes;
    dsv3_workspace workspace;
    void *workspace_memory, *sequence_memory;
    size_t capacity, sequence_bytes;
    dsv3_sequence sequence;
    float *logits;
    bench_way way[MAX_WAYS];
    size_t ways;
    bench_tally tally[MAX_WAYS][SCENARIOS];
    int32_t *base; /* [repeat, MOST_WRITTEN] what the first way has written, of the scenario under way */
    size_t golden_same[MAX_WAYS], golden_all, golden_prompt; /* bytes of the reference continuation */
} bench_run;

static void read_text(bench_run *r) {
    const char *path = r->options.text != NULL ? r->options.text : TEXT;
    size_t part = r->options.text != NULL ? 1 : 20;
    FILE *f = fopen(path, "rb");
    long size = f != NULL && fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
    if (size < 0 || size > MAX_TEXT) bench_die(path, "cannot be read, or has more than 1 GiB");
    r->text_bytes = (size_t)size / part;
    r->text = (unsigned char *)bench_alloc(r->text_bytes);
    if (r->text_bytes < 4096) bench_die(path, "is too short for the prompts");
    if (fseek(f, size - (long)r->text_bytes, SEEK_SET) != 0 || fread(r->text, 1, r->text_bytes, f) != r->text_bytes) {
        bench_die(path, "cannot be read");
    }
    fclose(f);
}

static void run_init(bench_run *r) {
    const bench_options *o = &r->options;
    const dsv3_config *c = &r->file.config;
    st_error error;
    size_t bytes;
    if (checkpoint_open(&r->file, o->model, &error) != ST_OK) bench_die("model", error.message);
    if (c->vocab_size < 256) bench_die(o->model, "has a vocabulary smaller than that of bytes");
    if (c->max_position_embeddings < 1024) bench_die(o->model, "was made for less than 1024 positions");
    read_text(r);
    bench_context(&r->context, o->backend, o->threads);
    if (o->pack) (void)bench_pack(&r->context, &r->file.model, &bytes);
    for (int mode = DSV3_EXACT; mode <= DSV3_FAST; mode++) {
        for (int drafts = 0; drafts < 2; drafts++) {
            if ((o->mode >= 0 && mode != o->mode) || (drafts && (o->drafts == 0 || r->file.model.n_mtp < 1)))
                continue;
            r->way[r->ways].mode = (dsv3_compute)mode;
            r->way[r->ways++].drafts = drafts ? o->drafts : 0;
        }
    }
    r->capacity = 1024 + 2 * (MAX_DRAFTS + 1);
    bench_check(
        dsv3_sequence_size(&r->file.model, r->capacity, DSV3_F32, PROMPT_ROWS, o->drafts, &r->sequence_bytes, NULL),
        "dsv3_sequence_size");
    r->sequence_memory = bench_alloc(r->sequence_bytes);
    memset(r->sequence_memory, 0, r->sequence_bytes); /* the system hands out the pages now, not while we measure */
    bench_check(dsv3_workspace_size(c, PROMPT_ROWS, r->context.threads, &bytes, NULL), "dsv3_workspace_size");
    r->workspace_memory = bench_alloc(bytes);
    memset(r->workspace_memory, 0, bytes);
    bench_check(
        dsv3_workspace_init(c, &r->workspace, PROMPT_ROWS, r->context.threads, r->workspace_memory, bytes, NULL),
        "dsv3_workspace_init");
    r->logits = (float *)bench_alloc((o->drafts + 1) * (size_t)c->vocab_size * sizeof *r->logits);
    r->base = (int32_t *)bench_alloc(o->repeat * MOST_WRITTEN * sizeof *r->base);
    for (size_t w = 0; w < r->ways; w++) {
        for (size_t s = 0; s < SCENARIOS; s++) {
            bench_tally *t = &r->tally[w][s];
            t->first = (double *)bench_alloc(o->repeat * MOST_WRITTEN * sizeof(double));
            t->next = (double *)bench_alloc(o->repeat * MOST_WRITTEN * sizeof(double));
        }
    }
}

static void run_free(bench_run *r) {
    for (size_t w = 0; w < r->ways; w++) {
        for (size_t s = 0; s < SCENARIOS; s++) {
            free(r->tally[w][s].first);
            free(r->tally[w][s].next);
        }
    }
    free(r->base);
    free(r->logits);
    free(r->workspace_memory);
    free(r->sequence_memory);
    free(r->text);
    checkpoint_close(&r->file);
}

static void sequence_begin(bench_run *r, size_t drafts) {
    bench_check(dsv3_sequence_init(&r->file.model, &r->sequence, r->capacity, DSV3_F32, PROMPT_ROWS, drafts,
                                   r->sequence_memory, r->sequence_bytes, NULL),
                "dsv3_sequence_init");
    r->sequence.stop = -1;
}

/* One call; what it wrote stands in r->sequence. */
static void sequence_step(bench_run *r) {
    dsv3_sequence *list[1];
    dsv3_error error;
    list[0] = &r->sequence;
    bench_check_error(dsv3_generate_step(&r->context, r->logits, &r->file.model, list, 1, &r->workspace, &error),
                      "dsv3_generate_step", &error);
}

/* A prompt is read and its answer written, to out; all times count. A step that writes several tokens delivers them at
 * once: its time belongs to the first, the others follow after 0. A last step may write more than is wanted: that is
 * the text's, but neither counted nor compared. Returns the tokens of the answer. */
static size_t turn_run(bench_run *r, const int32_t *prompt, size_t n, size_t answer, int32_t *out, bench_tally *t) {
    size_t written = 0;
    double begin = bench_now(), last = begin;
    bench_check(dsv3_sequence_append(&r->file.model, &r->sequence, prompt, n, NULL), "dsv3_sequence_append");
    while (written < answer) {
        double now, ms;
        sequence_step(r);
        now = bench_now();
        ms = 1e3 * (now - last);
        for (size_t i = 0; i < r->sequence.n_token && written < answer; i++) {
            out[written] = r->sequence.token[i];
            if (written == 0) {
                t->first[t->n_first++] = ms;
            } else {
                t->next[t->n_next++] = i == 0 ? ms : 0.0;
            }
            written++;
        }
        if (r->sequence.n_token > 0) last = now;
    }
    t->seconds += bench_now() - begin;
    t->read += n;
    t->written += written;
    return written;
}

/* A scenario, once, one way. The first way leaves its text in base; others are compared with it, answer by answer,
 * up to the first difference: behind it the texts are different ones. */
static void scenario_run(bench_run *r, size_t s, size_t way, size_t repeat) {
    const scenario *c = &scenarios[s];
    bench_tally *t = &r->tally[way][s];
    int32_t prompt[PROMPT_ROWS], out[1024], *base = r->base + repeat * MOST_WRITTEN;
    size_t span = c->texts * c->turns * c->prompt, at = 0;
    size_t from = (r->text_bytes - span) * repeat / r->options.repeat;
    r->context.compute = r->way[way].mode;
    for (size_t text = 0; text < c->texts; text++) {
        int differs = 0;
        sequence_begin(r, r->way[way].drafts);
        for (size_t turn = 0; turn < c->turns; turn++) {
            size_t n;
            for (size_t i = 0; i < c->prompt; i++) prompt[i] = r->text[from++];
            if (turn > 0) { /* the last step of the answer before may have written more than the answer */
                size_t length = (c->prompt + c->answer) * turn, kept;
                bench_check(dsv3_sequence_truncate(&r->sequence, length, &kept, NULL), "dsv3_sequence_truncate");
                if (kept != length) bench_die("dsv3_sequence_truncate", "an answer is gone");
            }
            n = turn_run(r, prompt, c->prompt, c->answer, out, t);
            for (size_t i = 0; i < n; i++) {
                if (way == 0) base[at + i] = out[i];
                if (base[at + i] != out[i]) differs = 1;
                t->same += !differs;
            }
            t->compared += n;
            at += n;
        }
    }
}

/* The golden file's greedy continuation: its prompt is what it has in common with the golden tokens. */
static void golden_run(bench_run *r) {
    char path[4096];
    st_file golden;
    st_error error;
    const st_tensor *greedy, *tokens;
    const int32_t *want, *seen;
    size_t n, prompt = 0;
    snprintf(path, sizeof path, "%s/golden.safetensors", r->options.model);
    if (st_open(&golden, path, &error) != ST_OK) return;
    greedy = st_find(&golden, "greedy");
    tokens = st_find(&golden, "tokens");
    if (greedy != NULL && tokens != NULL && greedy->dtype == ST_I32 && tokens->dtype == ST_I32) {
        want = (const int32_t *)greedy->data;
        seen = (const int32_t *)tokens->data;
        n = greedy->bytes / sizeof *want;
        while (prompt < n && prompt < tokens->bytes / sizeof *seen && want[prompt] == seen[prompt]) prompt++;
        if (prompt > 0 && prompt < n && prompt <= PROMPT_ROWS && n - prompt <= 1024) {
            r->golden_prompt = prompt;
            r->golden_all = n - prompt;
            for (size_t w = 0; w < r->ways; w++) {
                int32_t out[1024];
                double spare[2][1024];
                bench_tally t;
                memset(&t, 0, sizeof t);
                t.first = spare[0];
                t.next = spare[1];
                r->context.compute = r->way[w].mode;
                sequence_begin(r, r->way[w].drafts);
                turn_run(r, want, prompt, n - prompt, out, &t);
                while (r->golden_same[w] < n - prompt && out[r->golden_same[w]] == want[prompt + r->golden_same[w]]) {
                    r->golden_same[w]++;
                }
            }
        }
    }
    st_close(&golden);
}

/* ---- What is printed */

static double percentile(double *v, size_t n, double part) {
    if (n == 0) return 0.0;
    (void)bench_summary(v, n); /* sorts */
    return v[(size_t)(part * (double)(n - 1) + 0.5)];
}

static void print_scenario(bench_run *r, size_t s) {
    const scenario *c = &scenarios[s];
    if (!r->options.line) {
        printf("\n%s: %zu x %zu prompts of %zu tokens, %zu written behind each\n", c->name, c->texts, c->turns,
               c->prompt, c->answer);
        printf("  %-5s %4s %10s %10s %9s %9s %9s %9s %9s %6s\n", "mode", "mtp", "tokens/s", "written/s", "first ms",
               "p95", "next ms", "p95", "mean", "same");
    }
    for (size_t w = 0; w < r->ways; w++) {
        bench_tally *t = &r->tally[w][s];
        double all = (double)(t->read + t->written) / t->seconds, written = (double)t->written / t->seconds,
               mean = 0.0;
        double same = (double)t->same / (double)t->compared;
        double first = percentile(t->first, t->n_first, 0.5), first95 = percentile(t->first, t->n_first, 0.95);
        double next = percentile(t->next, t->n_next, 0.5), next95 = percentile(t->next, t->n_next, 0.95);
        for (size_t i = 0; i < t->n_next; i++) mean += t->next[i] / (double)t->n_next;
        if (r->options.line) {
            printf("scenario=%s mode=%s backend=%s threads=%zu mtp=%zu tokens_s=%.1f written_s=%.1f first_ms=%.3f "
                   "first_p95_ms=%.3f next_ms=%.4f next_p95_ms=%.4f next_mean_ms=%.4f same=%.4f golden_same=%zu "
                   "golden_all=%zu note_tokens_s=%.0f note_ms=%.1f\n",
                   c->key, bench_mode_names[r->way[w].mode], r->context.backend, r->context.threads, r->way[w].drafts,
                   all, written, first, first95, next, next95, mean, same, r->golden_same[w], r->golden_all,
                   c->claimed_speed, c->claimed_ms);
        } else {
            printf("  %-5s %4zu %10.1f %10.1f %9.3f %9.3f %9.4f %9.4f %9.4f %6.3f\n",
                   bench_mode_names[r->way[w].mode], r->way[w].drafts, all, written, first, first95, next, next95,
                   mean, same);
        }
    }
    if (!r->options.line) {
        printf("  %-10s %10.0f %10s %9.1f   tokens/s, and ms of latency, without more detail\n", "the note",
               c->claimed_speed, "", c->claimed_ms);
    }
}

static void print_golden(const bench_run *r) {
    if (r->golden_all == 0 || r->options.line) return;
    printf("\nreference continuation: %zu bytes behind a prompt of %zu; the same up to the first difference\n",
           r->golden_all, r->golden_prompt);
    printf("  %-5s %4s %10s\n", "mode", "mtp", "same");
    for (size_t w = 0; w < r->ways; w++) {
        printf("  %-5s %4zu %10zu\n", bench_mode_names[r->way[w].mode], r->way[w].drafts, r->golden_same[w]);
    }
}

int main(int argc, char **argv) {
    static bench_run r;
    parse(&r.options, argc, argv);
    run_init(&r);
    golden_run(&r); /* also reads weights and caches once, before anything is timed */
    if (!r.options.line) {
        printf("%s, backend %s, threads %zu, repeats %zu\n", r.options.model, r.context.backend, r.context.threads,
               r.options.repeat);
        bench_print_machine(&r.context);
    }
    for (size_t s = 0; s < SCENARIOS; s++) {
        for (size_t repeat = 0; repeat < r.options.repeat; repeat++) {
            for (size_t w = 0; w < r.ways; w++) scenario_run(&r, s, w, repeat);
        }
        print_scenario(&r, s);
    }
    print_golden(&r);
    run_free(&r);
    return fflush(stdout) != 0 || ferror(stdout);
}
