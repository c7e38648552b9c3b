/* dsv3.c -- the command line tool: text from a checkpoint, its score, its routing, its plan, its contents.
 *
 *     dsv3 generate DIR     writes text
 *     dsv3 chat DIR         writes it in turns with you
 *     dsv3 score DIR FILE   how well the model predicts a text
 *     dsv3 route DIR FILE   how evenly a text is spread over the experts
 *     dsv3 plan DIR|NAME    what a model needs: parameters, bytes, cache, workspace
 *     dsv3 inspect DIR      every tensor with its range
 *
 * `dsv3 COMMAND --help` lists the options. Exit status: 0 ok; 1 bad input, be it a file, a text or an option's value
 * (one line says what, where, expected and found); 2 wrong usage: an unknown command or option, a missing operand.
 * Text goes to stdout, everything else to stderr.
 *
 * Text and tokens: the demo models have a vocabulary of 256, one token per byte. For other vocabularies (this
 * program has no tokenizer) --ids reads and writes token ids. */
#if !defined(_POSIX_C_SOURCE) && (defined(__unix__) || defined(__APPLE__))
#define _POSIX_C_SOURCE 200809L
#endif
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"
#define SVG_IMPLEMENTATION
#include "svg.h"

#include <errno.h>
#include <signal.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#define TOOL_POSIX
#endif

#define CHUNK 128 /* most rows of one forward call */

/* ---- Ending with one line */

#ifdef __GNUC__
__attribute__((format(printf, 1, 2), noreturn))
#endif
static void
stop(const char *format, ...) {
    va_list list;
    fflush(stdout);
    fprintf(stderr, "dsv3: ");
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    exit(1);
}

static void stop_result(const char *what, dsv3_result result) {
    if (result != DSV3_OK) stop("%s: %s", what, dsv3_result_string(result));
}

static void *allocate(const char *what, size_t bytes) {
    void *p = malloc(bytes > 0 ? bytes : 1);
    if (p == NULL) stop("%s: no memory for %zu bytes", what, bytes);
    return p;
}

/* Output that cannot be written (full disk, closed pipe) is an error, not a silence. */
static void flush_output(void) {
    if (fflush(stdout) != 0 || ferror(stdout)) stop("standard output: cannot be written: %s", strerror(errno));
}

/* ---- Options. A command has a table of them; what is left over are its operands. */

typedef enum option_kind { OPTION_FLAG, OPTION_TEXT, OPTION_INT, OPTION_FLOAT } option_kind;

typedef struct option {
    const char *name;
    option_kind kind;
    void *value;      /* int *, const char **, long *, double * */
    double low, high; /* of numbers, both inclusive */
} option;

typedef struct command {
    const char *name, *help;
    int (*run)(int argc, char **argv, const struct command *command);
} command;

static int usage(const command *c, const char *why, const char *what) {
    fprintf(stderr, "dsv3 %s: %s%s (see dsv3 %s --help)\n", c->name, why, what, c->name);
    return 2;
}

static void option_number(const option *o, const char *text) {
    char *end = NULL;
    double x = strtod(text, &end);
    if (end == text || *end != '\0') stop("%s: expected a number, found '%s'", o->name, text);
    if (!(x >= o->low && x <= o->high)) {
        if (o->kind == OPTION_FLOAT) stop("%s: expected %g to %g, found %s", o->name, o->low, o->high, text);
        stop("%s: expected %.0f to %.0f, found %s", o->name, o->low, o->high, text);
    }
    if (o->kind == OPTION_FLOAT) {
        *(double *)o->value = x;
    } else {
        long n = strtol(text, &end, 10);
        if (*end != '\0' || (double)n != x) stop("%s: expected a whole number, found '%s'", o->name, text);
        *(long *)o->value = n;
    }
}

/* By the text before an '=', if there is one. */
static const option *option_find(const option *options, const char *text) {
    size_t n = strcspn(text, "=");
    for (; options->name != NULL; options++) {
        if (strlen(options->name) == n && strncmp(options->name, text, n) == 0) return options;
    }
    return NULL;
}

/* Fills in options (--name value or --name=value) and operands [count]. Returns 0 to go on, else 1 + the exit
 * status. */
static int parse(int argc, char **argv, const command *c, const option *options, const char **operands, int count) {
    int found = 0, only_operands = 0;
    for (int i = 0; i < argc; i++) {
        const option *o;
        const char *value;
        if (!only_operands && (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)) {
            printf("%s", c->help);
            flush_output();
            return 1;
        }
        if (!only_operands && strcmp(argv[i], "--") == 0) {
            only_operands = 1;
        } else if (only_operands || argv[i][0] != '-' || argv[i][1] == '\0') {
            if (found == count) return 1 + usage(c, "unexpected argument ", argv[i]);
            operands[found++] = argv[i];
        } else if ((o = option_find(options, argv[i])) == NULL) {
            return 1 + usage(c, "unknown option ", argv[i]);
        } else if ((value = strchr(argv[i], '=')) != NULL && o->kind == OPTION_FLAG) {
            return 1 + usage(c, "no value is expected behind ", o->name);
        } else if (o->kind == OPTION_FLAG) {
            *(int *)o->value = 1;
        } else if (value == NULL && ++i == argc) {
            return 1 + usage(c, "a value is missing behind ", o->name);
        } else {
            value = value != NULL ? value + 1 : argv[i];
            if (o->kind == OPTION_TEXT) {
                *(const char **)o->value = value;
            } else {
                option_number(o, value);
            }
        }
    }
    for (int i = 0; i < found; i++) {
        if (operands[i][0] == '\0') return 1 + usage(c, "an operand is empty", "");
    }
    return found < count ? 1 + usage(c, "an operand is missing", "") : 0;
}

/* ---- Time and terminals */

static double now(void) {
#ifdef TOOL_POSIX
    struct timespec t;
    if (clock_gettime(CLOCK_MONOTONIC, &t) == 0) return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#endif
    return (double)clock() / CLOCKS_PER_SEC;
}

static int is_terminal(FILE *file) {
#ifdef TOOL_POSIX
    return isatty(fileno(file));
#else
    (void)file;
    return 0;
#endif
}

static size_t terminal_width(FILE *file) {
#if defined(TOOL_POSIX) && defined(TIOCGWINSZ)
    struct winsize size;
    if (ioctl(fileno(file), TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
#else
    (void)file;
#endif
    return 80;
}

static int has_colours(FILE *file) {
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");
    return is_terminal(file) && (no == NULL || *no == '\0') && term != NULL && strcmp(term, "dumb") != 0;
}

/* One line that is rewritten, on a terminal only. done = total ends it. */
typedef struct progress {
    const char *what;
    double begin, shown;
    int active;
} progress;

static progress progress_begin(const char *what) {
    progress p;
    p.what = what;
    p.begin = p.shown = now();
    p.active = is_terminal(stderr);
    return p;
}

static void progress_show(progress *p, double done, double total) {
    double t = now(), spent = t - p->begin, left = done > 0 ? spent / done * (total - done) : 0;
    if (!p->active || (done < total && t - p->shown < 0.2)) return;
    p->shown = t;
    if (done < total) {
        fprintf(stderr, "\r%s %3.0f %%, %.0f s left   ", p->what, 100 * done / total, left);
    } else {
        fprintf(stderr, "\r%*s\r", (int)strlen(p->what) + 30, "");
    }
}

/* ---- A session: checkpoint, context, one cache, workspace */

typedef struct session {
    checkpoint model;
    dsv3_context context;
    dsv3_cache cache;
    dsv3_workspace workspace;
    void *cache_memory, *workspace_memory;
    size_t V, cache_bytes, workspace_bytes;
} session;

static dsv3_type parse_type(const char *name, const char *text) {
    for (int t = 0; t < DSV3_TYPES; t++) {
        if (strcmp(text, dsv3_type_name((dsv3_type)t)) == 0) return (dsv3_type)t;
    }
    stop("%s: expected F32, F16, BF16 or F8_E4M3, found '%s'", name, text);
    return DSV3_F32;
}

static dsv3_type parse_cache(const char *text) {
    if (strcmp(text, "F32") == 0) return DSV3_F32;
    if (strcmp(text, "BF16") == 0) return DSV3_BF16;
    stop("--cache: expected F32 or BF16, found '%s'", text);
    return DSV3_F32;
}

static dsv3_attention parse_attention(const char *text) {
    if (strcmp(text, "auto") == 0) return DSV3_ATTENTION_AUTO;
    if (strcmp(text, "absorbed") == 0) return DSV3_ATTENTION_ABSORBED;
    if (strcmp(text, "expanded") == 0) return DSV3_ATTENTION_EXPANDED;
    stop("--attention: expected auto, absorbed or expanded, found '%s'", text);
    return DSV3_ATTENTION_AUTO;
}

static void session_open(session *s, const char *directory, long threads) {
    st_error error;
    memset(s, 0, sizeof *s);
    if (checkpoint_open(&s->model, directory, &error) != ST_OK) stop("%s", error.message);
    if (s->model.file.warning[0] != '\0') fprintf(stderr, "dsv3: warning: %s\n", s->model.file.warning);
    stop_result("threads", dsv3_context_init(&s->context, DSV3_BACKEND_AUTO, (size_t)threads));
    if (threads > 1 && s->context.threads == 1) fprintf(stderr, "dsv3: built without OpenMP: one thread\n");
    s->V = (size_t)s->model.config.vocab_size;
}

static void session_reserve(session *s, size_t positions, size_t rows, dsv3_type type) {
    const dsv3_config *c = &s->model.config;
    stop_result("cache", dsv3_cache_size(c, positions, type, &s->cache_bytes));
    s->cache_memory = allocate("cache", s->cache_bytes);
    stop_result("cache", dsv3_cache_init(&s->cache, c, positions, type, s->cache_memory, s->cache_bytes));
    stop_result("workspace", dsv3_workspace_size(c, rows, s->context.threads, &s->workspace_bytes));
    s->workspace_memory = allocate("workspace", s->workspace_bytes);
    stop_result("workspace", dsv3_workspace_init(&s->workspace, c, rows, s->context.threads, s->workspace_memory,
                                                 s->workspace_bytes));
}

static void session_close(session *s) {
    free(s->cache_memory);
    free(s->workspace_memory);
    checkpoint_close(&s->model);
}

/* rows tokens continue the cache; logits [outputs, V] of the last ones. */
static void session_forward(session *s, float *logits, const int32_t *tokens, size_t rows, size_t outputs) {
    dsv3_batch batch;
    dsv3_error error;
    char text[256];
    memset(&batch, 0, sizeof batch);
    batch.rows = rows;
    batch.token = tokens;
    batch.outputs = outputs;
    if (dsv3_forward(&s->context, logits, &s->model.model, &s->cache, 1, &batch, &s->workspace, &error) != DSV3_OK) {
        stop("%s", dsv3_error_text(&error, text, sizeof text));
    }
}

/* ---- Text and token ids */

typedef struct tokens {
    int32_t *id;
    size_t count, capacity;
} tokens;

static void tokens_add(tokens *t, int32_t id) {
    if (t->count == t->capacity) {
        t->capacity = t->capacity > 0 ? 2 * t->capacity : 1024;
        t->id = (int32_t *)realloc(t->id, t->capacity * sizeof *t->id);
        if (t->id == NULL) stop("tokens: no memory for %zu tokens", t->capacity);
    }
    t->id[t->count++] = id;
}

/* Bytes, or numbers separated by white space, commas and brackets. */
static void tokens_from_text(tokens *t, const char *where, const char *text, size_t length, size_t V, int ids) {
    size_t i = 0;
    if (!ids && V != 256) {
        stop("%s: this model has %zu tokens and this program no tokenizer; use --ids and give token ids", where, V);
    }
    for (; !ids && i < length; i++) tokens_add(t, (unsigned char)text[i]);
    while (i < length) {
        unsigned long id = 0;
        size_t from = i;
        for (; i < length && text[i] >= '0' && text[i] <= '9'; i++) {
            if (id <= V) id = 10 * id + (unsigned long)(text[i] - '0');
        }
        if (i > from && id >= V) {
            stop("%s: token id at byte %zu: expected below %zu, found %.*s", where, from, V,
                 (int)(i - from < 24 ? i - from : 24), text + from);
        }
        if (i > from) tokens_add(t, (int32_t)id);
        if (i < length && (text[i] == '\0' || strchr(" \t\r\n,;[]", text[i]) == NULL)) {
            stop("%s: expected token ids, found another character at byte %zu", where, i);
        }
        if (i < length) i++;
    }
}

static void print_token(int32_t id, int ids) {
    if (ids) {
        printf("%ld ", (long)id);
    } else {
        putchar((int)id);
    }
    flush_output();
}

static char *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    size_t capacity = 1 << 16, n = 0, got;
    char *text;
    if (file == NULL) stop("%s: cannot be opened: %s", path, strerror(errno));
    text = (char *)allocate(path, capacity);
    while ((got = fread(text + n, 1, capacity - n, file)) > 0) {
        n += got;
        if (n < capacity) continue;
        if (capacity > SIZE_MAX / 2) stop("%s: is too large", path);
        capacity *= 2;
        text = (char *)realloc(text, capacity);
        if (text == NULL) stop("%s: no memory for %zu bytes", path, capacity);
    }
    if (ferror(file)) {
        int why = errno;
        free(text);
        fclose(file);
        stop("%s: cannot be read: %s", path, strerror(why));
    }
    fclose(file);
    *length = n;
    return text;
}

/* ---- Writing: what generate and chat have in common */

#define WRITER_HELP                                                                                                  \
    "  --temp T         temperature, 0: always the most probable token (default 0.7)\n"                              \
    "  --top-p P        only the most probable tokens that together have P (default 0.95)\n"                         \
    "  --seed S         random seed (default 1); the same seed and options give the same text\n"                     \
    "  --mtp K          K tokens are drafted by the MTP modules in each step and verified together, 0 to 15 "        \
    "(default\n"                                                                                                     \
    "                   0). At temperature 0 the text is the same for every K, else its distribution is\n"           \
    "  --adaptive       fewer of them while they are seldom accepted\n"                                              \
    "  --context N      positions of the cache (default: what is needed, at most what the model was made for)\n"     \
    "  --cache TYPE     F32 or BF16 (default F32)\n"                                                                 \
    "  --attention F    auto, absorbed or expanded (default auto)\n"                                                 \
    "  --ids            prompt and output are token ids\n"                                                           \
    "  --threads N      default: all cores\n"                                                                        \
    "  --stats          speed, memory and accepted drafts to standard error\n"

typedef struct writer_options {
    const char *cache, *attention;
    long n, seed, mtp, context, threads;
    double temperature, top_p;
    int adaptive, ids, stats;
} writer_options;

/* clang-format off */
#define WRITER_OPTIONS(o) /* the first lines of a command's table */                                                 \
    {"-n", OPTION_INT, &(o).n, 1, 1e9},                                                                              \
    {"--temp", OPTION_FLOAT, &(o).temperature, 0, 1e30},                                                             \
    {"--top-p", OPTION_FLOAT, &(o).top_p, 0, 1},                                                                     \
    {"--seed", OPTION_INT, &(o).seed, 0, 9e15},                                                                      \
    {"--mtp", OPTION_INT, &(o).mtp, 0, (double)DSV3_MAX_DRAFTS},                                                     \
    {"--adaptive", OPTION_FLAG, &(o).adaptive, 0, 0},                                                                \
    {"--context", OPTION_INT, &(o).context, 1, (double)DSV3_MAX_SEQ},                                                \
    {"--cache", OPTION_TEXT, &(o).cache, 0, 0},                                                                      \
    {"--attention", OPTION_TEXT, &(o).attention, 0, 0},                                                              \
    {"--ids", OPTION_FLAG, &(o).ids, 0, 0},                                                                          \
    {"--threads", OPTION_INT, &(o).threads, 1, 4096},                                                                \
    {"--stats", OPTION_FLAG, &(o).stats, 0, 0}
/* clang-format on */

/* A text and everything that writing it needs, beside the model. */
typedef struct writer {
    dsv3_sequence sequence;
    size_t bytes;
    void *memory;
    float *logits;
    double load, prompt, text; /* seconds; a prompt's last step also writes the first token behind it */
    size_t prompt_tokens, text_tokens;
} writer;

/* Opens the model, before there is a text. */
static void writer_model(session *s, const char *directory, const writer_options *o) {
    session_open(s, directory, o->threads);
    if (!o->ids && s->V != 256) {
        stop("%s: this model has %zu tokens and this program no tokenizer; use --ids and give token ids", directory,
             s->V);
    }
    s->context.attention = parse_attention(o->attention);
    if (o->mtp > 0 && s->model.model.n_mtp == 0) stop("--mtp: %s has no MTP modules", directory);
}

static void writer_open(writer *w, session *s, const writer_options *o, size_t context, size_t rows) {
    const dsv3_model *model = &s->model.model;
    size_t drafts = (size_t)o->mtp;
    dsv3_type type = parse_cache(o->cache);
    memset(w, 0, sizeof *w);
    if (rows < drafts + 1) rows = drafts + 1;
    stop_result("cache", dsv3_sequence_size(model, context, type, rows, drafts, &w->bytes));
    w->memory = allocate("cache", w->bytes);
    stop_result("cache", dsv3_sequence_init(&w->sequence, model, context, type, rows, drafts, w->memory, w->bytes));
    stop_result("workspace", dsv3_workspace_size(&model->config, rows, s->context.threads, &s->workspace_bytes));
    s->workspace_memory = allocate("workspace", s->workspace_bytes);
    stop_result("workspace", dsv3_workspace_init(&s->workspace, &model->config, rows, s->context.threads,
                                                 s->workspace_memory, s->workspace_bytes));
    w->logits = (float *)allocate("logits", (drafts + 1) * s->V * sizeof *w->logits);
    w->sequence.temperature = (float)o->temperature;
    w->sequence.top_p = (float)o->top_p;
    w->sequence.rng.state = (uint64_t)o->seed;
    w->sequence.adaptive = o->adaptive;
}

static void writer_close(writer *w) {
    free(w->memory);
    free(w->logits);
}

/* One step: w->sequence.token [n_token]. */
static void writer_step(writer *w, session *s) {
    dsv3_sequence *one = &w->sequence;
    dsv3_error error;
    char text[256];
    double begin = now(), spent;
    int prompt = one->prompt_left > 0;
    if (dsv3_generate(&s->context, w->logits, &s->model.model, &one, 1, &s->workspace, &error) != DSV3_OK) {
        stop("%s", dsv3_error_text(&error, text, sizeof text));
    }
    spent = now() - begin;
    if (prompt) {
        w->prompt += spent;
    } else {
        w->text += spent;
        w->text_tokens += one->n_token;
    }
}

static int writer_full(const writer *w) { return w->sequence.cache.length == w->sequence.cache.capacity; }

static void writer_stats(const writer *w, const session *s) {
    const dsv3_sequence *q = &w->sequence;
    fprintf(stderr, "load     %.3f s, %zu tensors\n", w->load, s->model.file.count);
    fprintf(stderr, "prompt   %zu tokens, %.3f s, %.0f tokens/s\n", w->prompt_tokens, w->prompt,
            (double)w->prompt_tokens / w->prompt);
    if (w->text > 0) {
        fprintf(stderr, "text     %llu tokens, %.3f s, %.0f tokens/s, %.2f ms a token\n",
                (unsigned long long)q->written, w->text, (double)w->text_tokens / w->text,
                1e3 * w->text / (double)w->text_tokens);
    }
    if (q->max_drafts > 0 && q->steps > 0) {
        fprintf(stderr, "drafts   %.2f tokens a step; accepted", (double)q->written / (double)q->steps);
        for (size_t j = 0; j < q->max_drafts; j++) {
            if (q->drafted[j] == 0) continue;
            fprintf(stderr, " %.1f %%", 100 * (double)q->accepted[j] / (double)q->drafted[j]);
        }
        fprintf(stderr, "\n");
    }
    fprintf(stderr, "memory   cache %zu bytes (%s, %zu positions), workspace %zu bytes\n", w->bytes,
            dsv3_type_name(q->cache.type), q->cache.capacity, s->workspace_bytes);
    fprintf(stderr, "machine  backend %s, %zu thread%s\n", s->context.backend, s->context.threads,
            s->context.threads == 1 ? "" : "s");
}

/* ---- generate */

static const char generate_help[] =
    "usage: dsv3 generate DIR [options]\n"
    "Writes text with the checkpoint in DIR, token by token, to standard output.\n"
    "  -p TEXT          prompt (default: the model's begin-of-text token)\n"
    "  --echo           write the prompt before the text and a line feed behind it, as on a terminal\n"
    "  -n N             tokens to write (default 400); ends earlier at the end-of-text token or a full "
    "context\n" WRITER_HELP;

static void generate_prompt(tokens *t, const session *s, const char *prompt, int ids) {
    if (prompt != NULL) tokens_from_text(t, "-p", prompt, strlen(prompt), s->V, ids);
    if (t->count == 0 && s->model.config.bos_token_id >= 0) tokens_add(t, s->model.config.bos_token_id);
    if (t->count == 0) stop("-p: the prompt is empty and the model has no begin-of-text token");
}

static size_t generate_context(const session *s, const writer_options *o, size_t prompt) {
    size_t most = o->context > 0 ? (size_t)o->context : (size_t)s->model.config.max_position_embeddings;
    size_t need = prompt + (size_t)o->n;
    if (prompt > most)
        stop("-p: the prompt is longer than the context: expected at most %zu tokens, found %zu", most, prompt);
    return o->context > 0 || need > most ? most : need;
}

static int generate(int argc, char **argv, const command *c) {
    writer_options o = {"F32", "auto", 400, 1, 0, 0, 0, 0.7, 0.95, 0, 0, 0};
    const char *directory = NULL, *text = NULL;
    int echo = 0, status, ended = 0;
    const option options[] = {{"-p", OPTION_TEXT, &text, 0, 0},
                              {"--echo", OPTION_FLAG, &echo, 0, 0},
                              WRITER_OPTIONS(o),
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    session s;
    writer w;
    tokens prompt = {NULL, 0, 0};
    size_t made = 0;
    double begin = now(), load;
    status = parse(argc, argv, c, options, &directory, 1);
    if (status != 0) return status - 1;
    writer_model(&s, directory, &o);
    generate_prompt(&prompt, &s, text, o.ids);
    load = now() - begin;
    writer_open(&w, &s, &o, generate_context(&s, &o, prompt.count), prompt.count < CHUNK ? prompt.count : CHUNK);
    w.load = load;
    w.prompt_tokens = prompt.count;
    stop_result("prompt", dsv3_sequence_append(&w.sequence, &s.model.model, prompt.id, prompt.count));
    echo |= is_terminal(stdout); /* so that the page reads whole */
    if (echo && text != NULL) printf("%s", text);
    while (made < (size_t)o.n && !ended && !writer_full(&w)) {
        writer_step(&w, &s);
        for (size_t i = 0; i < w.sequence.n_token && made < (size_t)o.n && !ended; i++) {
            ended = w.sequence.token[i] == s.model.config.eos_token_id;
            if (!ended) print_token(w.sequence.token[i], o.ids);
            made += !ended;
        }
    }
    if (echo || o.ids) printf("\n");
    flush_output();
    if (made < (size_t)o.n && !ended) {
        fprintf(stderr, "dsv3: the context of %zu positions is full after %zu of %ld tokens\n",
                w.sequence.cache.capacity, made, o.n);
    }
    if (o.stats) writer_stats(&w, &s);
    free(prompt.id);
    writer_close(&w);
    session_close(&s);
    return 0;
}

/* ---- chat */

static const char chat_help[] =
    "usage: dsv3 chat DIR [options]\n"
    "A conversation: each line of standard input is a turn, and the model goes on from there. The caches stay, so\n"
    "that a turn costs only its own tokens. Lines that begin with a slash are commands:\n"
    "  /undo            forget the last turn and its reply\n"
    "  /reset           forget everything behind --system\n"
    "  /stats           as --stats, so far\n"
    "  /quit            end, as the end of the input does\n"
    "Ctrl-C ends a reply, or between replies the conversation.\n"
    "Options (in texts, \\n is a line feed, \\t a tab and \\\\ a backslash):\n"
    "  --system TEXT    stands before the first turn (default: the begin-of-text token, if there is one)\n"
    "  --before TEXT    stands before each turn (default: \\n; with --ids nothing)\n"
    "  --after TEXT     stands between a turn and its reply (default: \\n\\n; with --ids nothing): so turns and "
    "replies\n"
    "                   are paragraphs\n"
    "  --stop ID        the token that ends a reply (default: the end-of-text token; a line feed if there is none)\n"
    "  -n N             most tokens of a reply (default 400)\n" WRITER_HELP;

typedef struct chat_state {
    session s;
    writer w;
    writer_options o;
    const char *system, *before, *after;
    tokens text;  /* everything that was said, as tokens */
    size_t begin; /* of it, where the first turn begins */
    size_t *turn; /* [turns] where each turn began */
    size_t turns, turn_capacity;
} chat_state;

static volatile sig_atomic_t chat_interrupted;

static void chat_interrupt(int signal_number) {
    (void)signal_number;
    chat_interrupted = 1;
}

/* Ctrl-C must end a read that waits: no restart. */
static void chat_catch_interrupts(void) {
#ifdef TOOL_POSIX
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = chat_interrupt;
    sigaction(SIGINT, &action, NULL);
#else
    signal(SIGINT, chat_interrupt);
#endif
}

/* Text with its escapes resolved, behind the others. */
static void chat_add(chat_state *c, const char *where, const char *text) {
    size_t n = strlen(text), length = 0;
    char *plain = (char *)allocate(where, n + 1);
    for (size_t i = 0; i < n; i++) {
        char next = text[i + 1];
        int escape = text[i] == '\\' && (next == 'n' || next == 't' || next == '\\');
        plain[length++] = !escape ? text[i] : next == 'n' ? '\n' : next == 't' ? '\t' : '\\';
        i += (size_t)escape;
    }
    tokens_from_text(&c->text, where, plain, length, c->s.V, c->o.ids);
    free(plain);
}

/* Rolls back to the first `length` tokens of the text; what the modules need again is appended with the next turn. */
static void chat_truncate(chat_state *c, size_t length) {
    size_t kept = 0, known = dsv3_sequence_length(&c->w.sequence);
    stop_result("roll back", dsv3_sequence_truncate(&c->w.sequence, length < known ? length : known, &kept));
    c->text.count = length;
}

/* Everything is forgotten but --system. */
static void chat_reset(chat_state *c) {
    c->turns = 0;
    chat_truncate(c, c->begin);
}

static void chat_undo(chat_state *c) {
    if (c->turns == 0) {
        fprintf(stderr, "dsv3: there is no turn to forget\n");
    } else {
        chat_truncate(c, c->turn[--c->turns]);
    }
}

/* Adds a turn to the text. Returns 0, with nothing changed, if it does not fit. */
static int chat_turn(chat_state *c, const char *line, size_t length) {
    size_t begin = c->text.count, capacity = c->w.sequence.cache.capacity;
    chat_add(c, "--before", c->before);
    tokens_from_text(&c->text, "input", line, length, c->s.V, c->o.ids);
    chat_add(c, "--after", c->after);
    if (c->text.count > capacity) {
        c->text.count = begin;
        return 0;
    }
    if (c->turns == c->turn_capacity) {
        c->turn_capacity = c->turn_capacity > 0 ? 2 * c->turn_capacity : 64;
        c->turn = (size_t *)realloc(c->turn, c->turn_capacity * sizeof *c->turn);
        if (c->turn == NULL) stop("no memory for %zu turns", c->turn_capacity);
    }
    c->turn[c->turns++] = begin;
    return 1;
}

/* The model's turn, written as it is made, and remembered. */
static void chat_reply(chat_state *c) {
    dsv3_sequence *q = &c->w.sequence;
    size_t known = dsv3_sequence_length(q), made = 0, fresh = c->text.count - known;
    int32_t *copy = (int32_t *)allocate("turn", (fresh + 1) * sizeof *copy); /* text may move while it is read */
    int ended = fresh == 0 && !q->pending;
    memcpy(copy, c->text.id + known, fresh * sizeof *copy);
    if (fresh > 0) stop_result("turn", dsv3_sequence_append(q, &c->s.model.model, copy, fresh));
    c->w.prompt_tokens += fresh;
    chat_interrupted = 0;
    while (made < (size_t)c->o.n && !ended && !chat_interrupted && !writer_full(&c->w)) {
        writer_step(&c->w, &c->s);
        for (size_t i = 0; i < q->n_token && made < (size_t)c->o.n && !ended; i++) {
            ended = q->token[i] == q->stop;
            if (!ended) print_token(q->token[i], c->o.ids);
            tokens_add(&c->text, q->token[i]);
            made++;
        }
    }
    chat_truncate(c, c->text.count - q->prompt_left); /* an interrupted prompt; drafts behind the last token */
    free(copy);
    printf("\n");
    flush_output();
    if (!ended && writer_full(&c->w)) fprintf(stderr, "dsv3: the context is full\n");
}

/* A line without its end; NULL at the end of the input. The caller frees it. */
static char *chat_read(size_t *length) {
    size_t capacity = 256, n = 0;
    char *line = (char *)allocate("input", capacity);
    int byte;
    while ((byte = getchar()) != EOF && byte != '\n') {
        if (n + 1 == capacity) {
            capacity *= 2;
            line = (char *)realloc(line, capacity);
            if (line == NULL) stop("input: no memory for a line of %zu bytes", capacity);
        }
        line[n++] = (char)byte;
    }
    line[n] = '\0';
    *length = n;
    if (byte != EOF || (n > 0 && !chat_interrupted)) return line;
    free(line);
    return NULL;
}

/* Returns 0 to end. */
static int chat_line(chat_state *c, const char *line, size_t length) {
    if (strcmp(line, "/quit") == 0) return 0;
    if (strcmp(line, "/undo") == 0) {
        chat_undo(c);
    } else if (strcmp(line, "/reset") == 0) {
        chat_reset(c);
    } else if (strcmp(line, "/stats") == 0) {
        writer_stats(&c->w, &c->s);
    } else if (line[0] == '/') {
        fprintf(stderr, "dsv3: %s: expected /undo, /reset, /stats or /quit\n", line);
    } else if (chat_turn(c, line, length)) {
        chat_reply(c);
    } else {
        fprintf(stderr, "dsv3: the turn does not fit into the context of %zu positions; /undo or /reset\n",
                c->w.sequence.cache.capacity);
    }
    return 1;
}

static int chat(int argc, char **argv, const command *c) {
    chat_state chat = {0};
    const char *directory = NULL;
    long stop_token = -1;
    double begin = now(), load;
    char *line;
    size_t length = 0;
    int status;
    const option options[] = {{"--system", OPTION_TEXT, &chat.system, 0, 0},
                              {"--before", OPTION_TEXT, &chat.before, 0, 0},
                              {"--after", OPTION_TEXT, &chat.after, 0, 0},
                              {"--stop", OPTION_INT, &stop_token, 0, (double)DSV3_MAX_VOCAB},
                              WRITER_OPTIONS(chat.o),
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    writer_options defaults = {"F32", "auto", 400, 1, 0, 0, 0, 0.7, 0.95, 0, 0, 0};
    chat.o = defaults;
    status = parse(argc, argv, c, options, &directory, 1);
    if (status != 0) return status - 1;
    writer_model(&chat.s, directory, &chat.o);
    if (stop_token >= (long)chat.s.V) stop("--stop: expected below %zu, found %ld", chat.s.V, stop_token);
    if (stop_token < 0) stop_token = chat.s.model.config.eos_token_id;
    if (stop_token < 0 && !chat.o.ids) stop_token = '\n';
    if (chat.before == NULL) chat.before = chat.o.ids ? "" : "\\n";
    if (chat.after == NULL) chat.after = chat.o.ids ? "" : "\\n\\n";
    load = now() - begin;
    if (chat.o.context == 0) chat.o.context = chat.s.model.config.max_position_embeddings;
    writer_open(&chat.w, &chat.s, &chat.o, (size_t)chat.o.context,
                (size_t)chat.o.context < CHUNK ? (size_t)chat.o.context : CHUNK);
    chat.w.load = load;
    chat.w.sequence.stop = (int32_t)stop_token;
    if (chat.system != NULL) chat_add(&chat, "--system", chat.system);
    if (chat.text.count == 0 && chat.s.model.config.bos_token_id >= 0) {
        tokens_add(&chat.text, chat.s.model.config.bos_token_id);
    }
    chat.begin = chat.text.count;
    if (chat.begin >= (size_t)chat.o.context) {
        stop("--system: is longer than the context: expected less than %ld tokens, found %zu", chat.o.context,
             chat.begin);
    }
    chat_catch_interrupts();
    for (;;) {
        chat_interrupted = 0;
        if (is_terminal(stdin) && is_terminal(stdout)) printf("> ");
        flush_output();
        line = chat_read(&length);
        if (line == NULL || !chat_line(&chat, line, length)) break;
        free(line);
    }
    free(line);
    if (is_terminal(stdin) && is_terminal(stdout)) printf("\n");
    if (chat.o.stats) writer_stats(&chat.w, &chat.s);
    free(chat.text.id);
    free(chat.turn);
    writer_close(&chat.w);
    session_close(&chat.s);
    return 0;
}

/* ---- Files that are written: whole, or not at all. What is no plain file (a device, a pipe, a link) is written to */

static int output_is_special(const char *path) {
#ifdef TOOL_POSIX
    struct stat s;
    if (stat(path, &s) == 0 && S_ISDIR(s.st_mode)) stop("%s: cannot be written: is a directory", path);
    return lstat(path, &s) == 0 && !S_ISREG(s.st_mode);
#else
    (void)path;
    return 0;
#endif
}

/* PATH.tmp, which becomes PATH when all is written. The caller frees it. */
static char *output_temporary(const char *path) {
    size_t length = strlen(path);
    char *temporary = (char *)allocate(path, length + sizeof ".tmp");
    memcpy(temporary, path, length);
    memcpy(temporary + length, ".tmp", sizeof ".tmp");
    return temporary;
}

/* Called before the work, so that an hour of it does not end with a path that cannot be written. */
static void output_try(const char *name, const char *path) {
    char *temporary;
    FILE *file;
    if (path == NULL) return;
    if (*path == '\0') stop("%s: expected a path, found ''", name);
    if (output_is_special(path)) return;
    temporary = output_temporary(path);
    file = fopen(temporary, "wb");
    if (file == NULL) stop("%s: cannot be written: %s", path, strerror(errno));
    fclose(file);
    remove(temporary);
    free(temporary);
}

/* What put writes into the file (0: it failed) becomes PATH, or a line says why not. */
static void output_write(const char *path, int (*put)(FILE *file, const void *what), const void *what) {
    int special = output_is_special(path), good, why;
    char *temporary = output_temporary(path);
    const char *to = special ? path : temporary;
    FILE *file = fopen(to, "wb");
    if (file == NULL) stop("%s: cannot be written: %s", path, strerror(errno));
    good = put(file, what);
    why = errno;
    if (fclose(file) != 0 && good) good = 0, why = errno;
    if (good && !special && rename(temporary, path) != 0) {
        remove(path); /* where rename does not replace */
        if (rename(temporary, path) != 0) good = 0, why = errno;
    }
    if (!good && !special) remove(temporary);
    free(temporary);
    if (!good) stop("%s: cannot be written: %s", path, strerror(why));
}

/* ---- A text read in windows, for score and route */

#define WINDOW_HELP                                                                                                  \
    "  --last P         only the last P percent of the file\n"                                                       \
    "  --context N      window length (default: what the model was made for)\n"                                      \
    "  --cache TYPE     F32 or BF16 (default F32)\n"                                                                 \
    "  --attention F    auto, absorbed or expanded (default auto)\n"                                                 \
    "  --ids            FILE holds token ids\n"                                                                      \
    "  --threads N      default: all cores\n"

typedef struct window_options {
    const char *cache, *attention;
    double last;
    long context, threads;
    int ids;
} window_options;

/* clang-format off */
#define WINDOW_OPTIONS(o) /* the first lines of a command's table */                                                 \
    {"--last", OPTION_FLOAT, &(o).last, 1e-6, 100},                                                                  \
    {"--context", OPTION_INT, &(o).context, 1, (double)DSV3_MAX_SEQ},                                                \
    {"--cache", OPTION_TEXT, &(o).cache, 0, 0},                                                                      \
    {"--attention", OPTION_TEXT, &(o).attention, 0, 0},                                                              \
    {"--ids", OPTION_FLAG, &(o).ids, 0, 0},                                                                          \
    {"--threads", OPTION_INT, &(o).threads, 1, 4096}
/* clang-format on */

/* Opens the model in operands[0], reads the tokens of the file operands[1] and takes the memory for a window of them;
 * returns its length. The last `ahead` tokens are no inputs, only what is to be predicted. */
static size_t windows_open(session *s, tokens *t, const char *const *operands, const window_options *o,
                           size_t ahead) {
    size_t length = 0, first, window, most;
    char *text;
    session_open(s, operands[0], o->threads);
    s->context.attention = parse_attention(o->attention);
    text = read_file(operands[1], &length);
    tokens_from_text(t, operands[1], text, length, s->V, o->ids);
    free(text);
    first = (size_t)((double)t->count * (1 - o->last / 100));
    t->count -= first;
    if (t->count <= ahead) {
        stop("%s: expected at least %zu token%s, found %zu", operands[1], ahead + 1, ahead > 0 ? "s" : "", t->count);
    }
    memmove(t->id, t->id + first, t->count * sizeof *t->id);
    most = (size_t)s->model.config.max_position_embeddings;
    window = o->context > 0 ? (size_t)o->context : most;
    if (window > t->count - ahead) window = t->count - ahead;
    if (window > most) {
        fprintf(stderr, "dsv3: warning: windows of %zu tokens, longer than the %zu that the model was made for\n",
                window, most);
    }
    session_reserve(s, window, window < CHUNK ? window : CHUNK, parse_cache(o->cache));
    return window;
}

/* ---- score */

static const char score_help[] =
    "usage: dsv3 score DIR FILE [options]\n"
    "How well the checkpoint in DIR predicts the text in FILE: mean negative log likelihood of every token but\n"
    "the first, in nats and bits, and the perplexity; then the same of every MTP module, given the true tokens\n"
    "before its target. The text is read in windows of the context length; each window starts afresh, with the last\n"
    "token of the one before it.\n"
    "  --mtp K          modules to score, 0 to what the model has (default: all)\n" WINDOW_HELP;

/* Caches of `modules` MTP modules, in one piece of memory that the caller frees. */
static void *score_modules(const session *s, dsv3_cache *caches, size_t modules) {
    const dsv3_config *config = &s->model.config;
    size_t bytes = 0, capacity = s->cache.capacity;
    unsigned char *memory;
    stop_result("cache", dsv3_mtp_cache_size(config, capacity, s->cache.type, &bytes));
    bytes += DSV3_ALIGN - bytes % DSV3_ALIGN;
    memory = (unsigned char *)allocate("cache", modules > SIZE_MAX / bytes ? SIZE_MAX : modules * bytes);
    for (size_t k = 0; k < modules; k++) {
        stop_result("cache",
                    dsv3_mtp_cache_init(&caches[k], config, capacity, s->cache.type, memory + k * bytes, bytes));
    }
    return memory;
}

static void score_print(size_t k, double nats, uint64_t count) {
    if (k == 0) {
        printf("tokens      %llu\nnats/token  %.5f\nbits/token  %.5f\nperplexity  %.4f\n", (unsigned long long)count,
               nats, nats / log(2.0), exp(nats));
    } else if (count > 0) {
        printf("mtp %zu       %.5f nats/token, %.5f bits/token, perplexity %.4f, %llu tokens\n", k, nats,
               nats / log(2.0), exp(nats), (unsigned long long)count);
    }
}

static int score(int argc, char **argv, const command *c) {
    const char *operands[2] = {NULL, NULL};
    window_options o = {"F32", "auto", 100, 0, 0, 0};
    long modules = -1;
    const option options[] = {WINDOW_OPTIONS(o),
                              {"--mtp", OPTION_INT, &modules, 0, (double)DSV3_MAX_LAYERS},
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    session s;
    tokens t = {NULL, 0, 0};
    dsv3_losses losses;
    dsv3_text text;
    dsv3_error error;
    dsv3_cache *caches;
    void *memory;
    char message[256];
    size_t window, targets;
    progress p;
    int status = parse(argc, argv, c, options, operands, 2);
    if (status != 0) return status - 1;
    window = windows_open(&s, &t, operands, &o, 1);
    targets = t.count - 1;
    if (modules > s.model.model.n_mtp) {
        stop("--mtp: expected at most %d, the modules of this model, found %ld", (int)s.model.model.n_mtp, modules);
    }
    memset(&losses, 0, sizeof losses);
    memset(&text, 0, sizeof text);
    losses.depths = modules < 0 ? (size_t)s.model.model.n_mtp : (size_t)modules;
    losses.nll = (double *)calloc(losses.depths + 1, sizeof *losses.nll);
    losses.targets = (uint64_t *)calloc(losses.depths + 1, sizeof *losses.targets);
    caches = (dsv3_cache *)allocate("caches", (losses.depths + 1) * sizeof *caches);
    if (losses.nll == NULL || losses.targets == NULL) stop("no memory for %zu losses", losses.depths + 1);
    memory = score_modules(&s, caches, losses.depths);
    p = progress_begin("score");
    for (size_t done = 0; done < targets; done += text.rows) {
        text.rows = targets - done < window ? targets - done : window;
        text.token = t.id + done;
        text.target = t.id + done + 1;
        if (dsv3_evaluate(&s.context, &losses, &s.model.model, &s.cache, caches, 1, &text, &s.workspace, &error) !=
            DSV3_OK) {
            stop("%s", dsv3_error_text(&error, message, sizeof message));
        }
        progress_show(&p, (double)(done + text.rows), (double)targets);
    }
    for (size_t k = 0; k <= losses.depths; k++) {
        score_print(k, losses.nll[k] / (double)losses.targets[k], losses.targets[k]);
    }
    flush_output();
    free(t.id);
    free(losses.nll);
    free(losses.targets);
    free(caches);
    free(memory);
    session_close(&s);
    return 0;
}

/* ---- route */

static const char route_help[] =
    "usage: dsv3 route DIR FILE [options]\n"
    "How evenly the checkpoint in DIR spreads the text in FILE over its experts. The text is read in windows of the\n"
    "context length, each of which starts afresh. Shown are a map of the loads and, for each MoE layer,\n"
    "  MaxVio     load of the busiest expert / mean load - 1, of the whole text: 0 is even\n"
    "  batches    the same of one window, the mean over all windows of full length\n"
    "  min load   load of the least busy expert / mean load\n"
    "  dead       experts that no token chose\n"
    "  entropy    of the experts' shares, 1 is even\n"
    "  pair       the two experts that most often serve a token together: in how many percent of the tokens, and\n"
    "             how often compared with random pairs of experts at these loads (lift)\n"
    "Options:\n" WINDOW_HELP "  --svg OUT        writes the map as a picture, each expert by itself\n"
    "  --csv OUT        writes layer,expert,count,share\n";

typedef struct route_state {
    size_t layers, E, K; /* MoE layers; experts of each; experts of a token */
    size_t *row;         /* [all layers] which MoE layer this is */
    int32_t *index;      /* [layers] and back: its place in the file */
    uint64_t *load;      /* [layers, E] of the whole text */
    uint64_t *window;    /* [layers, E] of one window */
    uint64_t *pairs;     /* [layers, E, E] tokens that have both a and b, a < b */
    double *batch_vio;   /* [layers] sum of the windows' MaxVio */
    size_t tokens, batches;
} route_state;

/* Zeros. */
static void *route_table(const char *what, size_t a, size_t b, size_t c, size_t size) {
    size_t left = SIZE_MAX / size;
    void *p = a <= left && b <= left / a && c <= left / a / b ? calloc(a * b * c, size) : NULL;
    if (p == NULL) stop("%s: no memory for %zu x %zu x %zu numbers", what, a, b, c);
    return p;
}

static void route_begin(route_state *r, const dsv3_config *c, const char *directory) {
    size_t all = (size_t)c->num_hidden_layers;
    memset(r, 0, sizeof *r);
    r->E = (size_t)c->n_routed_experts;
    r->K = (size_t)c->num_experts_per_tok;
    r->row = (size_t *)route_table("layers", all, 1, 1, sizeof *r->row);
    r->index = (int32_t *)route_table("layers", all, 1, 1, sizeof *r->index);
    for (int32_t i = 0; i < c->num_hidden_layers; i++) {
        if (!dsv3_config_is_moe(c, i)) continue;
        r->row[i] = r->layers;
        r->index[r->layers++] = i;
    }
    if (r->layers == 0) stop("%s: this model has no MoE layers, nothing is routed", directory);
    r->load = (uint64_t *)route_table("loads", r->layers, r->E, 1, sizeof *r->load);
    r->window = (uint64_t *)route_table("loads", r->layers, r->E, 1, sizeof *r->window);
    r->pairs = (uint64_t *)route_table("pairs", r->layers, r->E, r->E, sizeof *r->pairs);
    r->batch_vio = (double *)route_table("layers", r->layers, 1, 1, sizeof *r->batch_vio);
}

static void route_end(route_state *r) {
    free(r->row);
    free(r->index);
    free(r->load);
    free(r->window);
    free(r->pairs);
    free(r->batch_vio);
}

static void route_watch(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate,
                        size_t n) {
    route_state *r = (route_state *)user;
    size_t row = r->row[layer];
    uint64_t *pairs = r->pairs + row * r->E * r->E;
    (void)score, (void)gate;
    dsv3_load_count(r->window + row * r->E, idx, NULL, n, r->K);
    for (size_t t = 0; t < n; t++, idx += r->K) {
        for (size_t i = 1; i < r->K; i++) {
            for (size_t j = 0; j < i; j++) {
                size_t a = (size_t)idx[i], b = (size_t)idx[j];
                pairs[a < b ? a * r->E + b : b * r->E + a]++;
            }
        }
    }
}

/* The window's loads join those of the text. One that was cut short by the end of the text is no batch: the fewer
 * tokens, the larger its MaxVio. */
static void route_add_window(route_state *r, size_t rows, int whole) {
    r->tokens += rows;
    r->batches += whole != 0;
    for (size_t row = 0; row < r->layers; row++) {
        uint64_t *window = r->window + row * r->E;
        if (whole) r->batch_vio[row] += dsv3_load_statistics(window, r->E).max_vio;
        for (size_t e = 0; e < r->E; e++) r->load[row * r->E + e] += window[e];
        memset(window, 0, r->E * sizeof *window);
    }
}

static void route_run(session *s, route_state *r, const tokens *t, size_t window) {
    progress p = progress_begin("route");
    s->context.observer.user = r;
    s->context.observer.routing = route_watch;
    for (size_t begin = 0; begin < t->count; begin += window) {
        size_t rows = t->count - begin < window ? t->count - begin : window;
        stop_result("cache", dsv3_cache_truncate(&s->cache, 0));
        for (size_t done = 0; done < rows;) {
            size_t n = rows - done < CHUNK ? rows - done : CHUNK;
            session_forward(s, NULL, t->id + begin + done, n, 0);
            done += n;
            progress_show(&p, (double)(begin + done), (double)t->count);
        }
        route_add_window(r, rows, rows == window);
    }
}

/* One layer's numbers. */
typedef struct route_line {
    dsv3_load_stats stats;
    double batch_vio, together, lift; /* together: share of the tokens */
    size_t a, b;                      /* the pair; equal: there is none */
} route_line;

/* Two of a layer's uses, drawn at random from all those of different experts, are of a and b with probability
 * 2 load[a] load[b] / (sum load)^2 - sum load^2. Lift is what was counted, divided by what that makes of all pairs. */
static route_line route_layer(const route_state *r, size_t row) {
    const uint64_t *load = r->load + row * r->E, *pairs = r->pairs + row * r->E * r->E;
    double sum = 0, squares = 0, all = 0, most = 0;
    route_line line;
    memset(&line, 0, sizeof line);
    line.stats = dsv3_load_statistics(load, r->E);
    line.batch_vio = r->batch_vio[row] / (double)r->batches;
    for (size_t a = 0; a < r->E; a++) {
        sum += (double)load[a];
        squares += (double)load[a] * (double)load[a];
        for (size_t b = a + 1; b < r->E; b++) {
            double count = (double)pairs[a * r->E + b];
            all += count;
            if (count > most) most = count, line.a = a, line.b = b;
        }
    }
    if (most > 0) {
        double chance = 2 * (double)load[line.a] * (double)load[line.b] / (sum * sum - squares);
        line.together = most / (double)r->tokens;
        line.lift = most / (chance * all);
    }
    return line;
}

static void route_print_line(const char *name, const route_line *l, int digits, double dead) {
    char pair[48] = "";
    if (l->a < l->b) snprintf(pair, sizeof pair, "%zu+%zu", l->a, l->b);
    printf("%5s %8.4f %8.4f %8.4f %6.*f %8.4f   %-11s", name, l->stats.max_vio, l->batch_vio, l->stats.min_load,
           digits, dead, l->stats.entropy, pair);
    if (l->together > 0) printf(" %7.2f %% %6.2f", 100 * l->together, l->lift);
    printf("\n");
}

/* Returns the mean over the layers. */
static route_line route_print(const route_state *r, size_t window) {
    route_line mean;
    double n = (double)r->layers, dead = 0;
    size_t left = r->tokens - r->batches * window;
    memset(&mean, 0, sizeof mean);
    printf("tokens      %zu\nbatches     %zu of %zu token%s", r->tokens, r->batches, window, window == 1 ? "" : "s");
    if (left > 0) printf(", %zu token%s left over", left, left == 1 ? "" : "s");
    printf("\nexperts     %zu in each of %zu layer%s, %zu for a token\n\n", r->E, r->layers,
           r->layers == 1 ? "" : "s", r->K);
    printf("%5s %8s %8s %8s %6s %8s   %-11s %9s %6s\n", "layer", "MaxVio", "batches", "min load", "dead", "entropy",
           "pair", "together", "lift");
    for (size_t row = 0; row < r->layers; row++) {
        route_line l = route_layer(r, row);
        char name[16];
        snprintf(name, sizeof name, "%d", (int)r->index[row]);
        route_print_line(name, &l, 0, (double)l.stats.dead);
        mean.stats.max_vio += l.stats.max_vio / n;
        mean.batch_vio += l.batch_vio / n;
        mean.stats.min_load += l.stats.min_load / n;
        mean.stats.entropy += l.stats.entropy / n;
        mean.together += l.together / n;
        mean.lift += l.lift / n;
        dead += (double)l.stats.dead / n;
    }
    route_print_line("mean", &mean, 1, dead);
    return mean;
}

/* ---- The map of loads on a page of characters: ten shades, a fifth of the mean load each */

#define ROUTE_SHADES 10

static void route_print_shade(int shade, int colours) {
    static const int palette[ROUTE_SHADES] = {18, 25, 68, 110, 189, 224, 216, 209, 160, 88}; /* of 256: blue to red */
    if (colours) {
        printf("\033[48;5;%dm  ", palette[shade]);
    } else {
        putchar(" .:-=+*#%@"[shade]);
    }
}

/* The shade of experts [begin, end) of a layer, together. */
static int route_shade(const uint64_t *load, double mean, size_t begin, size_t end) {
    double sum = 0, shade;
    for (size_t e = begin; e < end; e++) sum += (double)load[e];
    shade = 5 * sum / (double)(end - begin) / mean + 1e-9;
    return shade < ROUTE_SHADES - 1 ? (int)shade : ROUTE_SHADES - 1;
}

static void route_print_legend(size_t each, int colours) {
    printf("\nload / mean load: ");
    if (colours) {
        printf("0 ");
        for (int shade = 0; shade < ROUTE_SHADES; shade++) route_print_shade(shade, 1);
        printf("\033[0m 2 and more");
    } else {
        printf("' ' below 0.2, then . : - = + * # %% in steps of 0.2, @ from 1.8");
    }
    if (each > 1) printf("\neach column is the mean of %zu neighbouring experts", each);
    printf("\n");
}

static void route_print_map(const route_state *r) {
    size_t width = terminal_width(stdout), wide, most, each;
    int colours = has_colours(stdout);
    wide = colours ? 2 : 1; /* characters of a cell */
    most = width > 24 ? (width - 8) / wide : 16 / wide;
    each = (r->E + most - 1) / most;
    printf("\n%6s", "expert");
    for (size_t e = 0; e < r->E; e += 8 * each) printf(" %-*zu", r->E - e > 8 * each ? (int)(8 * wide) - 1 : 0, e);
    printf("\n");
    for (size_t row = 0; row < r->layers; row++) {
        const uint64_t *load = r->load + row * r->E;
        double mean = dsv3_load_statistics(load, r->E).mean;
        printf("%5d %s", (int)r->index[row], colours ? " " : "|");
        for (size_t e = 0; e < r->E; e += each) {
            route_print_shade(route_shade(load, mean, e, e + each < r->E ? e + each : r->E), colours);
        }
        printf("%s\n", colours ? "\033[0m" : "|");
    }
    route_print_legend(each, colours);
}

/* ---- The loads as files */

static int route_write_csv(FILE *file, const void *what) {
    const route_state *r = (const route_state *)what;
    fprintf(file, "layer,expert,count,share\n");
    for (size_t row = 0; row < r->layers; row++) {
        for (size_t e = 0; e < r->E; e++) {
            uint64_t count = r->load[row * r->E + e];
            fprintf(file, "%d,%zu,%llu,%.9g\n", (int)r->index[row], e, (unsigned long long)count,
                    (double)count / ((double)r->tokens * (double)r->K));
        }
    }
    return fflush(file) == 0 && !ferror(file);
}

static int route_write_heat(FILE *file, const void *what) { return svg_write_heat(file, (const svg_heat *)what); }

static void route_write_svg(const route_state *r, const char *path, const char *const *operands, double max_vio) {
    double *value = (double *)route_table("picture", r->layers, r->E, 1, sizeof *value);
    const char **label = (const char **)route_table("picture", r->layers, 1, 1, sizeof *label);
    char(*name)[16] = (char(*)[16])route_table("picture", r->layers, 1, 1, sizeof *name);
    char title[1024], subtitle[256];
    svg_heat h;
    memset(&h, 0, sizeof h);
    snprintf(title, sizeof title, "Load of the experts: %s on %s", operands[0], operands[1]);
    snprintf(subtitle, sizeof subtitle, "MaxVio %.4f, mean over %zu layer%s; %zu tokens, %zu of %zu experts for each",
             max_vio, r->layers, r->layers == 1 ? "" : "s", r->tokens, r->K, r->E);
    h.high = 2;
    for (size_t row = 0; row < r->layers; row++) {
        const uint64_t *load = r->load + row * r->E;
        double mean = dsv3_load_statistics(load, r->E).mean;
        snprintf(name[row], sizeof name[row], "%d", (int)r->index[row]);
        label[row] = name[row];
        for (size_t e = 0; e < r->E; e++) {
            value[row * r->E + e] = (double)load[e] / mean;
            if (value[row * r->E + e] > h.high) h.high = value[row * r->E + e];
        }
    }
    h.title = title;
    h.subtitle = subtitle;
    h.row_name = "layer";
    h.column_name = "expert";
    h.value_name = "load / mean load";
    h.value = value;
    h.rows = r->layers;
    h.columns = r->E;
    h.row_label = label;
    h.middle = 1;
    output_write(path, route_write_heat, &h);
    free(value);
    free(label);
    free(name);
}

static int route(int argc, char **argv, const command *c) {
    const char *svg = NULL, *csv = NULL, *operands[2] = {NULL, NULL};
    window_options o = {"F32", "auto", 100, 0, 0, 0};
    const option options[] = {WINDOW_OPTIONS(o),
                              {"--svg", OPTION_TEXT, &svg, 0, 0},
                              {"--csv", OPTION_TEXT, &csv, 0, 0},
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    session s;
    tokens t = {NULL, 0, 0};
    route_state r;
    route_line mean;
    size_t window;
    int status = parse(argc, argv, c, options, operands, 2);
    if (status != 0) return status - 1;
    if (svg != NULL && csv != NULL && strcmp(svg, csv) == 0) stop("--csv: expected another path than --svg has");
    output_try("--svg", svg);
    output_try("--csv", csv);
    window = windows_open(&s, &t, operands, &o, 0);
    route_begin(&r, &s.model.config, operands[0]);
    route_run(&s, &r, &t, window);
    mean = route_print(&r, window);
    route_print_map(&r);
    flush_output();
    if (svg != NULL) route_write_svg(&r, svg, operands, mean.stats.max_vio);
    if (csv != NULL) output_write(csv, route_write_csv, &r);
    free(t.id);
    route_end(&r);
    session_close(&s);
    return 0;
}

/* ---- plan */

#define PLAN_NAMES "deepseek-v3, deepseek-v2, deepseek-v2-lite, moonlight, kimi-k2, austen and micro"

static const char plan_help[] =
    "usage: dsv3 plan DIR | CONFIG.json | NAME [options]\n"
    "What a model needs, from its configuration alone: tensors, parameters and bytes by group, parameters\n"
    "active for a token (routed experts: those of one token; embedding and head: whole), cache and workspace.\n"
    "Names: " PLAN_NAMES ".\n"
    "  --context N      positions of each sequence (default 4096, or the model's if shorter)\n"
    "  --batch N        sequences at a time (default 1)\n"
    "  --rows N         rows of a prompt chunk (default 512)\n"
    "  --type TYPE      weights: F32, F16, BF16 or F8_E4M3 (default BF16). With F8_E4M3, embedding, head, norms,\n"
    "                   routers and eh_proj stay BF16 as in the published files; router biases are always F32\n"
    "  --threads N      workers of the workspace (default 1)\n";

/* Sums of one tensor group. 64 bits everywhere: a plan must work on machines the model does not fit. */
typedef struct plan_sum {
    uint64_t tensors, parameters, active, bytes;
} plan_sum;

typedef struct plan_state {
    const dsv3_config *config;
    dsv3_type type;
    plan_sum group[DSV3_GROUPS], main, mtp, copies;
} plan_state;

static void plan_add(plan_sum *to, const plan_sum *one) {
    to->tensors += one->tensors;
    to->parameters += one->parameters;
    to->active += one->active;
    to->bytes += one->bytes;
}

static dsv3_result plan_tensor(void *user, const dsv3_tensor_info *info) {
    plan_state *p = (plan_state *)user;
    uint64_t rows = info->rows, cols = info->cols, n = rows * cols;
    plan_sum one = {1, 0, 0, 0};
    one.parameters = n;
    one.active = n;
    if (info->group == DSV3_GROUP_ROUTER && info->rank == 1) {
        one.bytes = 4 * n;
    } else if (p->type == DSV3_F8_E4M3 && info->quantised) {
        one.bytes = n + 4 * ((rows + DSV3_BLOCK - 1) / DSV3_BLOCK) * ((cols + DSV3_BLOCK - 1) / DSV3_BLOCK);
        one.tensors = 2;
    } else {
        one.bytes = n * dsv3_type_bytes(p->type == DSV3_F8_E4M3 ? DSV3_BF16 : p->type);
    }
    if (info->group == DSV3_GROUP_EXPERTS && info->expert >= p->config->num_experts_per_tok) one.active = 0;
    if (info->optional) {
        plan_add(&p->copies, &one);
    } else if (info->layer >= p->config->num_hidden_layers) {
        plan_add(&p->mtp, &one);
    } else {
        plan_add(&p->group[info->group], &one);
        plan_add(&p->main, &one);
    }
    return DSV3_OK;
}

static void plan_line(const char *name, const plan_sum *sum) {
    printf("%-22s %8llu %20llu %20llu %12.3f\n", name, (unsigned long long)sum->tensors,
           (unsigned long long)sum->parameters, (unsigned long long)sum->bytes, (double)sum->bytes / 1e9);
}

/* 671.03 B, 6.50 M, ... */
static void plan_count(char *out, size_t capacity, uint64_t n, int digits) {
    if (n >= 1000000000u) {
        snprintf(out, capacity, "%.*f B", digits, (double)n / 1e9);
    } else {
        snprintf(out, capacity, "%.*f M", digits, (double)n / 1e6);
    }
}

static void plan_memory(const char *name, dsv3_result result, size_t bytes, uint64_t times) {
    if (result == DSV3_OK && bytes > UINT64_MAX / times) result = DSV3_ERR_OVERFLOW;
    if (result != DSV3_OK) {
        printf("%-42s %s\n", name, dsv3_result_string(result));
    } else {
        uint64_t all = (uint64_t)bytes * times;
        printf("%-42s %20llu %12.3f\n", name, (unsigned long long)all, (double)all / 1e9);
    }
}

static void plan_print(const plan_state *p, const char *name) {
    static const char names[DSV3_GROUPS][24] = {"embedding", "attention",      "dense layers",
                                                "routers",   "routed experts", "shared experts",
                                                "norms",     "output head",    "mtp"};
    char total[32], active[32];
    plan_count(total, sizeof total, p->main.parameters, 2);
    plan_count(active, sizeof active, p->main.active, 1);
    printf("%s: %s parameters, %s active for a token, weights %s\n\n", name, total, active, dsv3_type_name(p->type));
    printf("%-22s %8s %20s %20s %12s\n", "group", "tensors", "parameters", "bytes", "GB");
    for (int g = 0; g < DSV3_GROUPS; g++) {
        if (p->group[g].tensors > 0) plan_line(names[g], &p->group[g]);
    }
    plan_line("main model", &p->main);
    if (p->mtp.tensors > 0) {
        plan_line("MTP modules", &p->mtp);
        plan_line("MTP copies (optional)", &p->copies);
    }
    printf("%-22s %8s %20llu\n", "active for a token", "", (unsigned long long)p->main.active);
}

static void plan_print_memory(const dsv3_config *c, size_t context, size_t batch, size_t rows, size_t threads) {
    size_t bytes = 0, width = (size_t)c->kv_lora_rank + (size_t)c->qk_rope_head_dim, one = 0;
    size_t heads = (size_t)c->num_attention_heads *
                   ((size_t)c->qk_nope_head_dim + (size_t)c->qk_rope_head_dim + (size_t)c->v_head_dim);
    unsigned long long layers = (unsigned long long)c->num_hidden_layers;
    char line[64];
    dsv3_result result;
    printf("\ncache per token: %llu bytes BF16, %llu bytes F32 (plain attention would keep %llu bytes BF16)\n\n",
           2 * layers * width, 4 * layers * width, 2 * layers * heads);
    printf("%-42s %20s %12s\n", "memory beside the weights", "bytes", "GB");
    result = dsv3_model_size(c, &bytes);
    plan_memory("model tables", result, bytes, 1);
    for (int t = 0; t < 2; t++) {
        dsv3_type type = t ? DSV3_F32 : DSV3_BF16;
        snprintf(line, sizeof line, "cache %s, %zu x %zu positions", dsv3_type_name(type), batch, context);
        result = dsv3_cache_size(c, context, type, &one);
        plan_memory(line, result, one, batch);
    }
    result = dsv3_workspace_size(c, batch, threads, &bytes);
    snprintf(line, sizeof line, "workspace, decode of %zu row%s", batch, batch == 1 ? "" : "s");
    plan_memory(line, result, bytes, 1);
    result = dsv3_workspace_size(c, rows, threads, &bytes);
    snprintf(line, sizeof line, "workspace, prompt chunks of %zu row%s", rows, rows == 1 ? "" : "s");
    plan_memory(line, result, bytes, 1);
}

static int plan_preset(dsv3_config *config, const char *name) {
    static const char names[7][20] = {"deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "moonlight", "kimi-k2",
                                      "austen",      "micro"};
    static const dsv3_preset presets[7] = {DSV3_PRESET_V3,        DSV3_PRESET_V2, DSV3_PRESET_V2_LITE,
                                           DSV3_PRESET_MOONLIGHT, DSV3_PRESET_K2, DSV3_PRESET_AUSTEN,
                                           DSV3_PRESET_MICRO};
    for (int i = 0; i < 7; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *config = dsv3_config_preset(presets[i]);
        return 1;
    }
    return 0;
}

static int plan(int argc, char **argv, const command *c) {
    long context = 0, batch = 1, rows = 512, threads = 1;
    const char *type = "BF16", *name = NULL;
    const option options[] = {{"--context", OPTION_INT, &context, 1, (double)DSV3_MAX_SEQ},
                              {"--batch", OPTION_INT, &batch, 1, 1e6},
                              {"--rows", OPTION_INT, &rows, 1, 1e6},
                              {"--type", OPTION_TEXT, &type, 0, 0},
                              {"--threads", OPTION_INT, &threads, 1, 4096},
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    dsv3_config config;
    st_error error;
    plan_state p;
    int status = parse(argc, argv, c, options, &name, 1);
    if (status != 0) return status - 1;
    if (!plan_preset(&config, name) && checkpoint_config(&config, name, &error) != ST_OK) {
        stop(strpbrk(name, "/.") == NULL ? "%s; the names known here are " PLAN_NAMES : "%s", error.message);
    }
    memset(&p, 0, sizeof p);
    p.config = &config;
    p.type = parse_type("--type", type);
    stop_result(name, dsv3_model_tensors(&config, plan_tensor, &p));
    plan_print(&p, name);
    if (context == 0) context = config.max_position_embeddings < 4096 ? config.max_position_embeddings : 4096;
    plan_print_memory(&config, (size_t)context, (size_t)batch, (size_t)rows, (size_t)threads);
    flush_output();
    return 0;
}

/* ---- inspect */

static const char inspect_help[] =
    "usage: dsv3 inspect DIR | FILE.safetensors [options]\n"
    "Lists every tensor: type, shape, smallest and largest value, number of NaN and infinite values. FP8 values\n"
    "are shown with their scales applied.\n"
    "  --check-finite   exit status 1 if a value is not finite; names the first one\n";

typedef struct range {
    double low, high;
    uint64_t nan, infinite, first_bad; /* first_bad: index of the first value that is not finite */
} range;

static void range_add(range *r, double x, uint64_t index) {
    if (!isfinite(x)) {
        if (r->nan + r->infinite == 0) r->first_bad = index;
        if (isnan(x)) {
            r->nan++;
            return;
        }
        r->infinite++;
    }
    if (x < r->low) r->low = x;
    if (x > r->high) r->high = x;
}

/* Element i of t as a double. */
static double element(const st_tensor *t, uint64_t i) {
    const unsigned char *at = (const unsigned char *)t->data + i * st_dtype_bytes(t->dtype);
    uint16_t u16;
    int16_t i16;
    uint32_t u32;
    int32_t i32;
    uint64_t u64;
    int64_t i64;
    float f32;
    double f64;
    switch (t->dtype) {
    case ST_BOOL:
    case ST_U8: return *at;
    case ST_I8: return *at < 128 ? *at : *at - 256;
    case ST_U16: return memcpy(&u16, at, 2), u16;
    case ST_I16: return memcpy(&i16, at, 2), i16;
    case ST_F16: return memcpy(&u16, at, 2), (double)dsv3_f32_from_f16(u16);
    case ST_BF16: return memcpy(&u16, at, 2), (double)dsv3_f32_from_bf16(u16);
    case ST_U32: return memcpy(&u32, at, 4), u32;
    case ST_I32: return memcpy(&i32, at, 4), i32;
    case ST_F32: return memcpy(&f32, at, 4), (double)f32;
    case ST_U64: return memcpy(&u64, at, 8), (double)u64;
    case ST_I64: return memcpy(&i64, at, 8), (double)i64;
    case ST_F64: return memcpy(&f64, at, 8), f64;
    case ST_F8_E4M3: return (double)dsv3_f32_from_f8_e4m3(*at);
    case ST_F8_E5M2: return (double)dsv3_f32_from_f16((uint16_t)(*at << 8)); /* the upper half of an F16 */
    }
    return 0;
}

/* The scales of an FP8 matrix, or NULL. */
static const st_tensor *inspect_scales(const st_file *file, const st_tensor *t) {
    char name[ST_MAX_NAME + 16];
    const st_tensor *scales;
    if (t->dtype != ST_F8_E4M3 || t->rank != 2) return NULL;
    snprintf(name, sizeof name, "%s_scale_inv", t->name);
    scales = st_find(file, name);
    if (scales == NULL || scales->dtype != ST_F32 || scales->rank != 2) return NULL;
    if (scales->shape[0] != (t->shape[0] + DSV3_BLOCK - 1) / DSV3_BLOCK) return NULL;
    return scales->shape[1] == (t->shape[1] + DSV3_BLOCK - 1) / DSV3_BLOCK ? scales : NULL;
}

static range inspect_range(const st_file *file, const st_tensor *t) {
    range r = {HUGE_VAL, -HUGE_VAL, 0, 0, 0};
    const st_tensor *scales = inspect_scales(file, t);
    uint64_t n = t->bytes / st_dtype_bytes(t->dtype), cols = scales != NULL ? t->shape[1] : 1;
    for (uint64_t i = 0; i < n; i++) {
        double x = element(t, i);
        if (scales != NULL) x *= element(scales, i / cols / DSV3_BLOCK * scales->shape[1] + i % cols / DSV3_BLOCK);
        range_add(&r, x, i);
    }
    return r;
}

static void inspect_shape(char *out, size_t capacity, const st_tensor *t) {
    size_t n = (size_t)snprintf(out, capacity, "[");
    for (int i = 0; i < t->rank && n < capacity; i++) {
        n += (size_t)snprintf(out + n, capacity - n, "%s%llu", i ? ", " : "", (unsigned long long)t->shape[i]);
    }
    if (n < capacity) snprintf(out + n, capacity - n, "]");
}

static int inspect(int argc, char **argv, const command *c) {
    int check_finite = 0, status;
    const option options[] = {{"--check-finite", OPTION_FLAG, &check_finite, 0, 0}, {NULL, OPTION_FLAG, NULL, 0, 0}};
    const char *path = NULL, *bad_name = NULL;
    st_file file;
    st_error error;
    st_result opened;
    progress p;
    uint64_t bad_index = 0, bytes = 0, parameters = 0;
    size_t n, width = 4;
    status = parse(argc, argv, c, options, &path, 1);
    if (status != 0) return status - 1;
    n = strlen(path);
    opened = n > 12 && strcmp(path + n - 12, ".safetensors") == 0 ? st_open(&file, path, &error)
                                                                  : st_open_checkpoint(&file, path, &error);
    if (opened != ST_OK) stop("%s", error.message);
    if (file.warning[0] != '\0') fprintf(stderr, "dsv3: warning: %s\n", file.warning);
    for (size_t i = 0; i < file.count; i++) {
        if (strlen(file.tensor[i].name) > width) width = strlen(file.tensor[i].name);
    }
    if (width > 72) width = 72;
    printf("%-*s %-8s %-16s %12s %12s %6s %6s\n", (int)width, "name", "type", "shape", "min", "max", "nan", "inf");
    p = progress_begin("inspect");
    for (size_t i = 0; i < file.count; i++) {
        const st_tensor *t = &file.tensor[i];
        char shape[256];
        range r = inspect_range(&file, t);
        inspect_shape(shape, sizeof shape, t);
        if (r.low > r.high) r.low = r.high = 0; /* no values at all */
        printf("%-*s %-8s %-16s %12.5g %12.5g %6llu %6llu\n", (int)width, t->name, st_dtype_name(t->dtype), shape,
               r.low, r.high, (unsigned long long)r.nan, (unsigned long long)r.infinite);
        if (bad_name == NULL && r.nan + r.infinite > 0) {
            bad_name = t->name;
            bad_index = r.first_bad;
        }
        bytes += t->bytes;
        parameters += t->bytes / st_dtype_bytes(t->dtype);
        progress_show(&p, (double)(i + 1), (double)file.count);
    }
    printf("%zu tensors, %llu values, %llu bytes, %d file%s\n", file.count, (unsigned long long)parameters,
           (unsigned long long)bytes, file.shards, file.shards == 1 ? "" : "s");
    flush_output();
    if (check_finite && bad_name != NULL) {
        stop("%s: value %llu is not finite", bad_name, (unsigned long long)bad_index);
    }
    st_close(&file);
    return 0;
}

/* ---- main */

static const char main_help[] = "usage: dsv3 COMMAND ...\n"
                                "  generate DIR            write text\n"
                                "  chat DIR                write it in turns\n"
                                "  score DIR FILE          how well the model predicts a text\n"
                                "  route DIR FILE          how evenly a text is spread over the experts\n"
                                "  plan DIR|CONFIG|NAME    parameters, bytes, cache and workspace of a model\n"
                                "  inspect DIR|FILE        tensors and their ranges\n"
                                "dsv3 COMMAND --help lists the options of a command; dsv3 --version says which.\n";

int main(int argc, char **argv) {
    const command commands[] = {
        {"generate", generate_help, generate}, {"chat", chat_help, chat}, {"score", score_help, score},
        {"route", route_help, route},          {"plan", plan_help, plan}, {"inspect", inspect_help, inspect}};
    if (argc < 2) {
        fprintf(stderr, "%s", main_help);
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        printf("%s", main_help);
        flush_output();
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("dsv3 %d.%d.%d\n", DSV3_VERSION_MAJOR, DSV3_VERSION_MINOR, DSV3_VERSION_PATCH);
        flush_output();
        return 0;
    }
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) return commands[i].run(argc - 2, argv + 2, &commands[i]);
    }
    fprintf(stderr, "dsv3: unknown command %s\n%s", argv[1], main_help);
    return 2;
}
