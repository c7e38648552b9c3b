/* dsv3.c -- the command line tool: text from a checkpoint, its score, its plan, its contents.
 *
 *     dsv3 generate DIR     writes text
 *     dsv3 score DIR FILE   how well the model predicts a text
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

#include <errno.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
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

/* ---- generate */

static const char generate_help[] =
    "usage: dsv3 generate DIR [options]\n"
    "Writes text with the checkpoint in DIR, token by token, to standard output.\n"
    "  -p TEXT          prompt (default: the model's begin-of-text token)\n"
    "  --echo           write the prompt before the text and a line feed behind it, as on a terminal\n"
    "  -n N             tokens to write (default 400); ends earlier at the end-of-text token or a full context\n"
    "  --temp T         temperature, 0: always the most probable token (default 0.7)\n"
    "  --top-p P        only the most probable tokens that together have P (default 0.95)\n"
    "  --seed S         random seed (default 1); the same seed gives the same text\n"
    "  --context N      positions of the cache (default: what is needed, at most what the model was made for)\n"
    "  --cache TYPE     F32 or BF16 (default F32)\n"
    "  --attention F    auto, absorbed or expanded (default auto)\n"
    "  --ids            prompt and output are token ids\n"
    "  --threads N      default: all cores\n"
    "  --stats          speed and memory to standard error\n";

typedef struct generate_options {
    const char *prompt, *cache, *attention;
    long n, seed, context, threads;
    double temperature, top_p;
    int echo, ids, stats;
} generate_options;

static void generate_prompt(tokens *t, const session *s, const generate_options *o) {
    if (o->prompt != NULL) tokens_from_text(t, "-p", o->prompt, strlen(o->prompt), s->V, o->ids);
    if (t->count == 0 && s->model.config.bos_token_id >= 0) tokens_add(t, s->model.config.bos_token_id);
    if (t->count == 0) stop("-p: the prompt is empty and the model has no begin-of-text token");
}

static size_t generate_context(const session *s, const generate_options *o, size_t prompt) {
    size_t most = o->context > 0 ? (size_t)o->context : (size_t)s->model.config.max_position_embeddings;
    size_t need = prompt + (size_t)o->n;
    if (prompt > most)
        stop("-p: the prompt is longer than the context: expected at most %zu tokens, found %zu", most, prompt);
    return o->context > 0 || need > most ? most : need;
}

static void generate_stats(const session *s, size_t prompt, size_t made, double load, double prefill, double decode) {
    fprintf(stderr, "load     %.3f s, %zu tensors\n", load, s->model.file.count);
    fprintf(stderr, "prompt   %zu tokens, %.3f s, %.0f tokens/s\n", prompt, prefill, (double)prompt / prefill);
    if (made > 1) {
        fprintf(stderr, "text     %zu tokens, %.3f s, %.0f tokens/s, %.2f ms a token\n", made, decode,
                (double)(made - 1) / decode, 1e3 * decode / (double)(made - 1));
    }
    fprintf(stderr, "memory   cache %zu bytes (%s, %zu positions), workspace %zu bytes\n", s->cache_bytes,
            dsv3_type_name(s->cache.type), s->cache.capacity, s->workspace_bytes);
    fprintf(stderr, "machine  backend %s, %zu thread%s\n", s->context.backend, s->context.threads,
            s->context.threads == 1 ? "" : "s");
}

static int generate(int argc, char **argv, const command *c) {
    generate_options o = {NULL, "F32", "auto", 400, 1, 0, 0, 0.7, 0.95, 0, 0, 0};
    const option options[] = {{"-p", OPTION_TEXT, &o.prompt, 0, 0},
                              {"--echo", OPTION_FLAG, &o.echo, 0, 0},
                              {"-n", OPTION_INT, &o.n, 1, 1e9},
                              {"--temp", OPTION_FLOAT, &o.temperature, 0, 1e30},
                              {"--top-p", OPTION_FLOAT, &o.top_p, 0, 1},
                              {"--seed", OPTION_INT, &o.seed, 0, 9e15},
                              {"--context", OPTION_INT, &o.context, 1, (double)DSV3_MAX_SEQ},
                              {"--cache", OPTION_TEXT, &o.cache, 0, 0},
                              {"--attention", OPTION_TEXT, &o.attention, 0, 0},
                              {"--ids", OPTION_FLAG, &o.ids, 0, 0},
                              {"--threads", OPTION_INT, &o.threads, 1, 4096},
                              {"--stats", OPTION_FLAG, &o.stats, 0, 0},
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    const char *directory = NULL;
    session s;
    tokens prompt = {NULL, 0, 0};
    dsv3_rng rng;
    dsv3_candidate *candidates;
    float *logits;
    size_t made = 0, done = 0;
    int32_t token = 0;
    double t0 = now(), t1, t2, t3;
    int status = parse(argc, argv, c, options, &directory, 1);
    if (status != 0) return status - 1;
    session_open(&s, directory, o.threads);
    if (!o.ids && s.V != 256) tokens_from_text(&prompt, directory, "", 0, s.V, 0);
    s.context.attention = parse_attention(o.attention);
    generate_prompt(&prompt, &s, &o);
    session_reserve(&s, generate_context(&s, &o, prompt.count), prompt.count < CHUNK ? prompt.count : CHUNK,
                    parse_cache(o.cache));
    logits = (float *)allocate("logits", s.V * sizeof *logits);
    candidates = (dsv3_candidate *)allocate("candidates", s.V * sizeof *candidates);
    rng.state = (uint64_t)o.seed;
    o.echo |= is_terminal(stdout); /* so that the page reads whole */
    if (o.echo && o.prompt != NULL) printf("%s", o.prompt);
    t1 = now();
    while (done < prompt.count) {
        size_t rows = prompt.count - done < CHUNK ? prompt.count - done : CHUNK;
        session_forward(&s, logits, prompt.id + done, rows, done + rows == prompt.count);
        done += rows;
    }
    t2 = now();
    for (;;) {
        stop_result("sampling",
                    dsv3_sample(&token, logits, s.V, (float)o.temperature, (float)o.top_p, &rng, candidates));
        if (token == s.model.config.eos_token_id) break;
        print_token(token, o.ids);
        made++;
        if (made == (size_t)o.n || s.cache.length == s.cache.capacity) break;
        session_forward(&s, logits, &token, 1, 1);
    }
    t3 = now();
    if (o.echo || o.ids) printf("\n");
    flush_output();
    if (made < (size_t)o.n && token != s.model.config.eos_token_id) {
        fprintf(stderr, "dsv3: the context of %zu positions is full after %zu of %ld tokens\n", s.cache.capacity,
                made, o.n);
    }
    if (o.stats) generate_stats(&s, prompt.count, made, t1 - t0, t2 - t1, t3 - t2);
    free(prompt.id);
    free(logits);
    free(candidates);
    session_close(&s);
    return 0;
}

/* ---- score */

static const char score_help[] =
    "usage: dsv3 score DIR FILE [options]\n"
    "How well the checkpoint in DIR predicts the text in FILE: mean negative log likelihood of every token but\n"
    "the first, in nats and bits, and the perplexity. The text is read in windows of the context length; each\n"
    "window starts afresh, with the last token of the one before it.\n"
    "  --last P         only the last P percent of the file\n"
    "  --context N      window length (default: what the model was made for)\n"
    "  --cache TYPE     F32 or BF16 (default F32)\n"
    "  --attention F    auto, absorbed or expanded (default auto)\n"
    "  --ids            FILE holds token ids\n"
    "  --threads N      default: all cores\n";

/* Sum of -log p(t[i+1] | t[0..i]) over one window of `rows` inputs. */
static double score_window(session *s, const int32_t *t, size_t rows, float *logits) {
    double sum = 0;
    stop_result("cache", dsv3_cache_truncate(&s->cache, 0));
    for (size_t done = 0; done < rows;) {
        size_t n = rows - done < CHUNK ? rows - done : CHUNK;
        session_forward(s, logits, t + done, n, n);
        for (size_t i = 0; i < n; i++) {
            const float *row = logits + i * s->V;
            sum += (double)(dsv3_log_sum_exp(row, s->V) - row[t[done + i + 1]]);
        }
        done += n;
    }
    return sum;
}

static int score(int argc, char **argv, const command *c) {
    const char *cache = "F32", *attention = "auto", *operands[2] = {NULL, NULL};
    long context = 0, threads = 0;
    double last = 100, sum = 0, mean;
    int ids = 0;
    const option options[] = {{"--last", OPTION_FLOAT, &last, 1e-6, 100},
                              {"--context", OPTION_INT, &context, 1, (double)DSV3_MAX_SEQ},
                              {"--cache", OPTION_TEXT, &cache, 0, 0},
                              {"--attention", OPTION_TEXT, &attention, 0, 0},
                              {"--ids", OPTION_FLAG, &ids, 0, 0},
                              {"--threads", OPTION_INT, &threads, 1, 4096},
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    session s;
    tokens t = {NULL, 0, 0};
    size_t length = 0, first, window, targets;
    char *text;
    float *logits;
    progress p;
    int status = parse(argc, argv, c, options, operands, 2);
    if (status != 0) return status - 1;
    session_open(&s, operands[0], threads);
    s.context.attention = parse_attention(attention);
    text = read_file(operands[1], &length);
    tokens_from_text(&t, operands[1], text, length, s.V, ids);
    first = (size_t)((double)t.count * (1 - last / 100));
    if (t.count - first < 2) stop("%s: expected at least 2 tokens, found %zu", operands[1], t.count - first);
    targets = t.count - first - 1;
    window = context > 0 ? (size_t)context : (size_t)s.model.config.max_position_embeddings;
    if (window > targets) window = targets;
    if (window > (size_t)s.model.config.max_position_embeddings) {
        fprintf(stderr, "dsv3: warning: windows of %zu tokens, longer than the %d that the model was made for\n",
                window, (int)s.model.config.max_position_embeddings);
    }
    session_reserve(&s, window, window < CHUNK ? window : CHUNK, parse_cache(cache));
    logits = (float *)allocate("logits", CHUNK * s.V * sizeof *logits);
    p = progress_begin("score");
    for (size_t done = 0; done < targets;) {
        size_t rows = targets - done < window ? targets - done : window;
        sum += score_window(&s, t.id + first + done, rows, logits);
        done += rows;
        progress_show(&p, (double)done, (double)targets);
    }
    mean = sum / (double)targets;
    printf("tokens      %zu\nnats/token  %.5f\nbits/token  %.5f\nperplexity  %.4f\n", targets, mean, mean / log(2.0),
           exp(mean));
    flush_output();
    free(t.id);
    free(text);
    free(logits);
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
                                "  score DIR FILE          how well the model predicts a text\n"
                                "  plan DIR|CONFIG|NAME    parameters, bytes, cache and workspace of a model\n"
                                "  inspect DIR|FILE        tensors and their ranges\n"
                                "dsv3 COMMAND --help lists the options of a command; dsv3 --version says which.\n";

int main(int argc, char **argv) {
    const command commands[] = {{"generate", generate_help, generate},
                                {"score", score_help, score},
                                {"plan", plan_help, plan},
                                {"inspect", inspect_help, inspect}};
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
