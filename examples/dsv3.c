/* dsv3.c -- the command line tool: text from a checkpoint, its score, routing, plan and contents; and its training.
 *
 *     dsv3 generate DIR     writes text
 *     dsv3 chat DIR         writes it in turns with you
 *     dsv3 score DIR FILE   how well the model predicts a text
 *     dsv3 route DIR FILE   how evenly a text is spread over the experts
 *     dsv3 plan DIR|NAME    what a model needs: parameters, bytes, cache, workspace
 *     dsv3 inspect DIR      every tensor with its range
 *     dsv3 convert DIR OUT  the same checkpoint in another type
 *     dsv3 train            a checkpoint from text
 *
 * `dsv3 COMMAND --help` lists the options. Exit status: 0 ok; 1 bad input, be it a file, a text or an option's value
 * (one line says what, where, expected and found); 2 wrong usage: an unknown command or option, a missing operand or
 * option.
 * Text goes to stdout, everything else to stderr.
 *
 * Text and tokens: the demo models have a vocabulary of 256, one token per byte. For other vocabularies (this
 * program has no tokenizer) --ids reads and writes token ids. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* the affinity mask, for thread_pool.h; madvise, for large_pages.h */
#endif
#if !defined(_POSIX_C_SOURCE) && (defined(__unix__) || defined(__APPLE__))
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__MINGW32__) && !defined(__USE_MINGW_ANSI_STDIO)
#define __USE_MINGW_ANSI_STDIO 1 /* %zu */
#endif
#define DSV3_SIMD
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"
#define SVG_IMPLEMENTATION
#include "svg.h"
#define THREADS_IMPLEMENTATION
#include "thread_pool.h"
#include "large_pages.h"

#include <errno.h>
#include <signal.h>
#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#include <dirent.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#define TOOL_POSIX
#elif defined(_WIN32)
#include <direct.h>
#include <sys/stat.h>
#endif

#define CHUNK 128 /* most rows of one forward call */

/* ---- Ending with one line */

static int progress_stands; /* bool: a line of progress is on the terminal, and has no end yet */

static const char *stop_about; /* a file whose contents are to blame for what stops now; or NULL */

/* What else is printed there begins on a line of its own. */
static void progress_leave(void) {
    if (progress_stands) fputc('\n', stderr);
    progress_stands = 0;
}

#ifdef __MINGW_PRINTF_FORMAT
__attribute__((format(__MINGW_PRINTF_FORMAT, 1, 2), noreturn))
#elif defined(__GNUC__)
__attribute__((format(printf, 1, 2), noreturn))
#endif
static void
stop(const char *format, ...) {
    va_list list;
    fflush(stdout);
    progress_leave();
    fprintf(stderr, "dsv3: %s%s", stop_about != NULL ? stop_about : "", stop_about != NULL ? ": " : "");
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    exit(1);
}

static dsv3_error stop_error; /* for calls whose result goes to stop_result */

static void stop_result(const char *what, dsv3_result result) {
    char text[256];
    if (result == DSV3_OK) return;
    if (stop_error.code != result) stop("%s: %s", what, dsv3_result_string(result));
    stop("%s: %s", what, dsv3_error_text(&stop_error, text, sizeof text));
}

static void *allocate(const char *what, size_t bytes) {
    void *p = malloc(bytes > 0 ? bytes : 1);
    if (p == NULL) stop("%s: no memory for %zu bytes", what, bytes);
    return p;
}

/* Bytes of memory of this machine, or 0. */
static double machine_memory(void) {
#if defined(TOOL_POSIX) && defined(_SC_PHYS_PAGES) && defined(_SC_PAGESIZE)
    long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
    if (pages > 0 && bytes > 0) return (double)pages * (double)bytes;
#endif
    return 0;
}

/* Memory that will be used to its end: a system that promises more than it has would kill the program for it. */
static void *allocate_whole(const char *what, size_t bytes) {
    double memory = machine_memory();
    if (memory > 0 && (double)bytes > memory) {
        stop("%s: no memory for %zu bytes: this machine has %.0f", what, bytes, memory);
    }
    return allocate(what, bytes);
}

/* Output that cannot be written (full disk, closed pipe) is an error, not a silence. */
static void flush_output(void) {
    if (fflush(stdout) != 0 || ferror(stdout)) stop("standard output: cannot be written: %s", strerror(errno));
}

/* ---- Options. A command has a table of them; what is left over are its operands. */

typedef enum option_kind { OPTION_FLAG, OPTION_TEXT, OPTION_INT, OPTION_FLOAT, OPTION_LIST } option_kind;

/* The values of an option that may be repeated. */
typedef struct texts {
    const char **item; /* [count], then NULL; NULL if there are none */
    size_t count;
    int replace; /* bool: the next one added takes the place of all */
} texts;

static void texts_add(texts *t, const char *text) {
    if (t->replace) t->count = 0;
    t->replace = 0;
    t->item = (const char **)realloc(t->item, (t->count + 2) * sizeof *t->item);
    if (t->item == NULL) stop("options: no memory for %zu texts", t->count);
    t->item[t->count++] = text;
    t->item[t->count] = NULL;
}

typedef struct option {
    const char *name;
    option_kind kind;
    void *value;      /* int *, const char **, long *, double *, texts * */
    double low, high; /* of numbers, both inclusive */
} option;

typedef struct command {
    const char *name, *help;
    int (*run)(int argc, char **argv, const struct command *command);
    const char *operands[2]; /* what they are called */
    const char *more;        /* the rest of a help that is longer than C lets a text be; or NULL */
} command;

static int usage(const command *c, const char *why, const char *what) {
    fprintf(stderr, "dsv3 %s: %s%s (see dsv3 %s --help)\n", c->name, why, what, c->name);
    return 2;
}

#define NUMBER 64 /* bytes of a number as text */

/* The shortest text that is read back as x, as one types it: 50, 0.0005, 5e-5, 1e30. */
static void number_text(char text[NUMBER], double x) {
    int digits = 0, point = 0;
    char *e;
    do snprintf(text, NUMBER, "%.*g", ++digits, x);
    while (digits < 17 && (strtod(text, NULL) < x || strtod(text, NULL) > x));
    e = strchr(text, 'e');
    if (e == NULL) return;
    point = (int)strtol(e + 1, NULL, 10);
    if (point >= 0 && point < 16) {
        snprintf(text, NUMBER, "%.0f", x);
    } else {
        snprintf(e, (size_t)(text + NUMBER - e), "e%d", point);
    }
}

static void option_number(const option *o, const char *text) {
    char *end = NULL, low[NUMBER], high[NUMBER];
    double x = strtod(text, &end);
    if (end == text || *end != '\0') stop("%s: expected a number, found '%s'", o->name, text);
    number_text(low, o->low);
    number_text(high, o->high);
    if (!(x >= o->low && x <= o->high)) stop("%s: expected %s to %s, found %s", o->name, low, high, text);
    if (o->kind == OPTION_FLOAT) {
        *(double *)o->value = x;
    } else {
        long n = strtol(text, &end, 10);
        if (*end != '\0' || (double)n != x) stop("%s: expected a whole number, found '%s'", o->name, text);
        *(long *)o->value = n;
    }
}

/* Letters to add, drop or change to make b of a; at most 9. */
static size_t spelling_distance(const char *a, size_t n, const char *b) {
    size_t m = strlen(b), row[32];
    if (n > 31 || m > 31) return 9;
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t left = row[0]; /* of the row before */
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t best = left + (a[i - 1] != b[j - 1]);
            left = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[m] < 9 ? row[m] : 9;
}

/* How far a misspelt name is from one that there is; 9: they have nothing to do with each other. */
static size_t spelling_far(const char *text, size_t n, const char *name) {
    size_t m = strlen(name), far = spelling_distance(text, n, name), common = n < m ? n : m;
    if (common >= 5 && strncmp(text, name, common) == 0) return 1; /* --temperature, --adapt */
    return n >= 4 && far <= 2 && far + 3 < n ? far : 9;
}

static int unknown_option(const command *c, const option *options, const char *text) {
    const char *nearest = NULL;
    size_t n = strcspn(text, "="), least = 9;
    char what[160];
    for (; options->name != NULL; options++) {
        size_t far = spelling_far(text, n, options->name);
        if (far < least) least = far, nearest = options->name;
    }
    if (nearest == NULL) return usage(c, "unknown option ", text);
    snprintf(what, sizeof what, "%.60s; did you mean %s?", text, nearest);
    return usage(c, "unknown option ", what);
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
            printf("%s%s", c->help, c->more != NULL ? c->more : "");
            flush_output();
            return 1;
        }
        if (!only_operands && strcmp(argv[i], "--") == 0) {
            only_operands = 1;
        } else if (only_operands || argv[i][0] != '-' || argv[i][1] == '\0') {
            if (found == count) return 1 + usage(c, "unexpected argument ", argv[i]);
            operands[found++] = argv[i];
        } else if ((o = option_find(options, argv[i])) == NULL) {
            return 1 + unknown_option(c, options, argv[i]);
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
            } else if (o->kind == OPTION_LIST) {
                if (*value == '\0') stop("%s: expected a value, found ''", o->name);
                texts_add((texts *)o->value, value);
            } else {
                option_number(o, value);
            }
        }
    }
    for (int i = 0; i < found; i++) {
        if (operands[i][0] == '\0') return 1 + usage(c, "an operand is empty", "");
    }
    return found < count ? 1 + usage(c, "an operand is missing: ", c->operands[found]) : 0;
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
    progress_stands = done < total;
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
    void *cache_memory, *workspace_memory, *packed_memory;
    size_t V, cache_bytes, workspace_bytes, packed_bytes;
} session;

static dsv3_type parse_type(const char *name, const char *text) {
    for (int t = 0; t < DSV3_TYPES; t++) {
        if (strcmp(text, dsv3_type_name((dsv3_type)t)) == 0) return (dsv3_type)t;
    }
    stop("%s: expected F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0, found '%s'", name, text);
    return DSV3_F32;
}

static dsv3_type parse_cache(const char *text) {
    if (strcmp(text, "F32") == 0) return DSV3_F32;
    if (strcmp(text, "BF16") == 0) return DSV3_BF16;
    stop("--cache: expected F32 or BF16, found '%s'", text);
    return DSV3_F32;
}

static const char attention_names[3][12] = {"auto", "absorbed", "expanded"}; /* by dsv3_attention */

static dsv3_attention parse_attention(const char *text) {
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, attention_names[i]) == 0) return (dsv3_attention)i;
    }
    stop("--attention: expected auto, absorbed or expanded, found '%s'", text);
    return DSV3_ATTENTION_AUTO;
}

#define COMPUTE_HELP                                                                                                 \
    "  --threads N      default: all cores this process may use\n"                                                   \
    "  --backend NAME   auto, reference, avx2, avx512, avx512_bf16 or amx (default auto: the best that runs here)\n" \
    "  --fast           activations are rounded before they meet weights: to BF16 for BF16 and FP8, to 8 bits for\n" \
    "                   Q8_0 and Q4_0; avx512_bf16 and amx also compute attention in BF16\n"                          \
    "  --pack           the weights once more in memory, in the order of the backend: the same text, faster; when\n" \
    "                   that takes up to 64 MiB it is done unasked, unless --no-pack forbids it\n"

/* Kernels, and a pool of threads (0: one for each core), which close_context ends. */
static void open_context(dsv3_context *context, const char *name, long threads) {
    dsv3_backend backend;
    dsv3_result result;
    threads_pool *pool;
    if (dsv3_backend_find(&backend, name, NULL) != DSV3_OK) {
        stop("--backend: expected auto, reference, avx2, avx512, avx512_bf16 or amx, found '%s'", name);
    }
    result = dsv3_context_init(context, backend, 1, &stop_error);
    if (result == DSV3_ERR_UNSUPPORTED) stop("--backend: %s does not run on this machine", name);
    stop_result("--backend", result);
    pool = threads_create((size_t)threads);
    if (pool == NULL) stop("threads: out of memory");
    context->parallel_for = threads_for;
    context->parallel_user = pool;
    context->threads = threads_count(pool);
    if ((size_t)threads > context->threads) {
        fprintf(stderr, "dsv3: the system gives %zu thread%s, not %ld\n", context->threads,
                context->threads == 1 ? "" : "s", threads);
    }
}

static void close_context(dsv3_context *context) { threads_destroy((threads_pool *)context->parallel_user); }

enum { PACK_SMALL, PACK_ALWAYS, PACK_NEVER };

static int parse_pack(int pack, int no_pack) {
    if (pack && no_pack) stop("--pack and --no-pack exclude each other");
    return pack ? PACK_ALWAYS : no_pack ? PACK_NEVER : PACK_SMALL;
}

#define PACK_UNASKED ((size_t)64 << 20)

/* A backend that reads weights as they lie wants no memory. */
static void session_pack(session *s, int pack) {
    size_t bytes;
    if (pack == PACK_NEVER) return;
    stop_result("--pack", dsv3_pack_size(&s->context, &s->model.model, &bytes, &stop_error));
    if (bytes == 0 || (pack == PACK_SMALL && bytes > PACK_UNASKED)) return;
    s->packed_memory = large_pages_alloc(bytes);
    if (s->packed_memory == NULL) stop("--pack: no memory for %zu bytes", bytes);
    s->packed_bytes = bytes;
    stop_result("--pack", dsv3_pack(&s->context, &s->model.model, s->packed_memory, bytes, &stop_error));
}

/* What is odd about it. */
static void checkpoint_notes(const checkpoint *c, const char *directory) {
    if (c->file.warning[0] != '\0') fprintf(stderr, "dsv3: warning: %s\n", c->file.warning);
    if (c->leftover > 0) {
        fprintf(stderr, "dsv3: warning: %s: %zu tensor%s not part of this model, and not used: %s\n", directory,
                c->leftover, c->leftover == 1 ? " is" : "s are", c->leftover_names);
    }
}

static void session_open(session *s, const char *directory, const char *backend, long threads, int pack) {
    st_error error;
    memset(s, 0, sizeof *s);
    if (checkpoint_open(&s->model, directory, &error) != ST_OK) stop("%s", error.message);
    checkpoint_notes(&s->model, directory);
    open_context(&s->context, backend, threads);
    s->V = (size_t)s->model.config.vocab_size;
    session_pack(s, pack);
}

static void session_reserve(session *s, size_t positions, size_t rows, dsv3_type type) {
    const dsv3_config *c = &s->model.config;
    stop_result("cache", dsv3_cache_size(c, positions, type, &s->cache_bytes, &stop_error));
    s->cache_memory = allocate("cache", s->cache_bytes);
    stop_result("cache", dsv3_cache_init(c, &s->cache, positions, type, s->cache_memory, s->cache_bytes, &stop_error));
    stop_result("workspace", dsv3_workspace_size(c, rows, s->context.threads, &s->workspace_bytes, &stop_error));
    s->workspace_memory = allocate("workspace", s->workspace_bytes);
    stop_result("workspace", dsv3_workspace_init(c, &s->workspace, rows, s->context.threads, s->workspace_memory,
                                                 s->workspace_bytes, &stop_error));
}

static void session_close(session *s) {
    close_context(&s->context);
    free(s->packed_memory);
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

#define WHY 512 /* bytes of an explanation */

/* Bytes, or numbers separated by white space, commas and brackets. Returns 0, and why, if they are none; some may have
 * been added then. */
static int tokens_read(tokens *t, const char *where, const char *text, size_t length, size_t V, int ids,
                       char why[WHY]) {
    size_t i = 0;
    if (!ids && V != 256) {
        snprintf(why, WHY,
                 "%.200s: this model has %zu tokens and this program no tokenizer; use --ids and give token ids",
                 where, V);
        return 0;
    }
    for (; !ids && i < length; i++) tokens_add(t, (unsigned char)text[i]);
    while (i < length) {
        unsigned long id = 0;
        size_t from = i;
        for (; i < length && text[i] >= '0' && text[i] <= '9'; i++) {
            if (id <= V) id = 10 * id + (unsigned long)(text[i] - '0');
        }
        if (i > from && id >= V) {
            snprintf(why, WHY, "%.200s: token id at byte %zu: expected below %zu, found %.*s", where, from, V,
                     (int)(i - from < 24 ? i - from : 24), text + from);
            return 0;
        }
        if (i > from) tokens_add(t, (int32_t)id);
        if (i < length && (text[i] == '\0' || strchr(" \t\r\n,;[]", text[i]) == NULL)) {
            snprintf(why, WHY, "%.200s: expected token ids, found another character at byte %zu", where, i);
            return 0;
        }
        if (i < length) i++;
    }
    return 1;
}

static void tokens_from_text(tokens *t, const char *where, const char *text, size_t length, size_t V, int ids) {
    char why[WHY];
    if (!tokens_read(t, where, text, length, V, ids, why)) stop("%s", why);
}

/* A text of the command line with its escapes resolved: \n, \t and \\. The caller frees it. */
static char *text_plain(const char *where, const char *text, size_t *length) {
    size_t n = strlen(text), made = 0;
    char *plain = (char *)allocate(where, n + 1);
    for (size_t i = 0; i < n; i++) {
        char next = text[i + 1];
        int escape = text[i] == '\\' && (next == 'n' || next == 't' || next == '\\');
        plain[made++] = !escape ? text[i] : next == 'n' ? '\n' : next == 't' ? '\t' : '\\';
        i += (size_t)escape;
    }
    *length = made;
    return plain;
}

static void print_token(int32_t id, int ids) {
    if (ids) {
        printf("%ld ", (long)id);
    } else {
        putchar((int)id);
    }
    flush_output();
}

/* All of a file, or of standard input if that is called -. NULL, and why, if it cannot be had. */
static char *read_try(const char *path, size_t *length, char why[WHY]) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    size_t capacity = 1 << 16, n = 0, got;
    char *text;
    int failed;
    if (file == NULL) {
        snprintf(why, WHY, "%.300s: cannot be opened: %s", path, strerror(errno));
        return NULL;
    }
    text = (char *)allocate(path, capacity);
    while ((got = fread(text + n, 1, capacity - n, file)) > 0) {
        n += got;
        if (n < capacity) continue;
        if (capacity > SIZE_MAX / 2) stop("%s: is too large", path);
        capacity *= 2;
        text = (char *)realloc(text, capacity);
        if (text == NULL) stop("%s: no memory for %zu bytes", path, capacity);
    }
    failed = ferror(file);
    if (failed) snprintf(why, WHY, "%.300s: cannot be read: %s", path, strerror(errno));
    if (file != stdin) fclose(file);
    *length = n;
    if (!failed) return text;
    free(text);
    return NULL;
}

static char *read_file(const char *path, size_t *length) {
    char why[WHY], *text = read_try(path, length, why);
    if (text == NULL) stop("%s", why);
    return text;
}

/* A text of the command line, its escapes resolved, behind the others. */
static void tokens_from_escaped(tokens *t, const char *where, const char *text, size_t V, int ids) {
    size_t length;
    char *plain = text_plain(where, text, &length);
    tokens_from_text(t, where, plain, length, V, ids);
    free(plain);
}

/* ---- Stop texts. Output is held back while it could be the beginning of one. */

typedef struct stops {
    tokens *text; /* [count] */
    size_t count;
    tokens held;
    int ids;
    int found; /* bool: a stop text has come, and is not printed */
} stops;

static void stops_open(stops *p, const texts *t, size_t V, int ids) {
    memset(p, 0, sizeof *p);
    p->ids = ids;
    p->text = (tokens *)allocate("--stop", t->count * sizeof *p->text);
    for (; p->count < t->count; p->count++) {
        tokens *one = &p->text[p->count];
        memset(one, 0, sizeof *one);
        tokens_from_escaped(one, "--stop", t->item[p->count], V, ids);
        if (one->count == 0) stop("--stop: expected a text, found '%s'", t->item[p->count]);
    }
}

static void stops_close(stops *p) {
    for (size_t i = 0; i < p->count; i++) free(p->text[i].id);
    free(p->text);
    free(p->held.id);
}

/* Prints the first n tokens that are held. */
static void stops_print(stops *p, size_t n) {
    if (n == 0) return; /* perhaps there has been none */
    for (size_t i = 0; i < n; i++) print_token(p->held.id[i], p->ids);
    p->held.count -= n;
    memmove(p->held.id, p->held.id + n, p->held.count * sizeof *p->held.id);
}

/* The longest beginning (whole: all) of a stop text with which what is held ends. */
static size_t stops_match(const stops *p, int whole) {
    size_t longest = 0;
    for (size_t i = 0; i < p->count; i++) {
        const tokens *t = &p->text[i];
        for (size_t n = whole ? t->count : 1; n <= t->count && n <= p->held.count; n++) {
            if (n <= longest || memcmp(t->id, p->held.id + p->held.count - n, n * sizeof *t->id) != 0) continue;
            longest = n;
        }
    }
    return longest;
}

/* Prints id, or holds it back. Returns how many tokens, this one the last, are a stop text: 0 until there is one. */
static size_t stops_put(stops *p, int32_t id) {
    size_t n;
    tokens_add(&p->held, id);
    n = stops_match(p, 1);
    if (n == 0) {
        stops_print(p, p->held.count - stops_match(p, 0));
        return 0;
    }
    stops_print(p, p->held.count - n);
    p->held.count = 0;
    p->found = 1;
    return n;
}

/* The text has ended otherwise: what is held was no stop text. */
static void stops_end(stops *p) {
    stops_print(p, p->held.count);
    p->found = 0;
}

/* ---- Files that are written: whole, or not at all. A device or a pipe is written to; of a link, the file behind it
 * is written, as if that had been named. */

enum { OUTPUT_PLAIN, OUTPUT_SPECIAL, OUTPUT_DIRECTORY };

static int output_kind(const char *path) {
#ifdef TOOL_POSIX
    struct stat s;
    if (stat(path, &s) != 0) return lstat(path, &s) == 0 ? OUTPUT_SPECIAL : OUTPUT_PLAIN; /* a link to nothing, yet */
    return S_ISDIR(s.st_mode) ? OUTPUT_DIRECTORY : S_ISREG(s.st_mode) ? OUTPUT_PLAIN : OUTPUT_SPECIAL;
#else
    (void)path;
    return OUTPUT_PLAIN;
#endif
}

/* Is there nothing yet, nor behind a link of that name? */
static int output_is_new(const char *path) {
#ifdef TOOL_POSIX
    struct stat s;
    return stat(path, &s) != 0 && errno == ENOENT;
#else
    FILE *file = fopen(path, "rb");
    if (file != NULL) fclose(file);
    return file == NULL && errno == ENOENT;
#endif
}

/* The path of the file itself, behind any links. The caller frees it. */
static char *output_real(const char *path) {
    size_t n = strlen(path) + 1;
    char *copy;
#ifdef TOOL_POSIX
    struct stat s;
    if (lstat(path, &s) == 0 && S_ISLNK(s.st_mode) && (copy = realpath(path, NULL)) != NULL) return copy;
#endif
    copy = (char *)allocate(path, n);
    memcpy(copy, path, n);
    return copy;
}

/* A new file beside path, under a name that nobody else has, which goes to *temporary. The caller frees that, also
 * when NULL is returned. */
static FILE *output_begin(const char *path, char **temporary) {
    size_t room = strlen(path) + 48;
    char *name = *temporary = (char *)allocate(path, room);
#ifdef TOOL_POSIX
    for (int i = 0; i < 10000; i++) {
        int handle;
        snprintf(name, room, "%s.%ld-%d.tmp", path, (long)getpid(), i);
        handle = open(name, O_WRONLY | O_CREAT | O_EXCL, 0666); /* follows no link */
        if (handle >= 0) return fdopen(handle, "wb");
        if (errno != EEXIST) break;
    }
    return NULL;
#else
    snprintf(name, room, "%s.tmp", path);
    return fopen(name, "wb");
#endif
}

/* Of a file that cannot be replaced nothing is lost. */
static int output_replace(const char *from, const char *to) {
#ifdef _WIN32
    errno = EACCES;
    return MoveFileExA(from, to, 1) != 0; /* safetensors.h declares it */
#else
    return rename(from, to) == 0;
#endif
}

/* Two names of one file or directory? */
static int is_same_file(const char *a, const char *b) {
#ifdef TOOL_POSIX
    struct stat s, t;
    if (stat(a, &s) == 0 && stat(b, &t) == 0) return s.st_dev == t.st_dev && s.st_ino == t.st_ino;
#endif
    return strcmp(a, b) == 0;
}

/* Called before the work, so that an hour of it does not end with a path that cannot be written. */
static void output_try(const char *name, const char *path) {
    char *temporary, *real;
    int kind;
    FILE *file;
    if (path == NULL) return;
    if (*path == '\0') stop("%s: expected a path, found ''", name);
    kind = output_kind(path);
    if (kind == OUTPUT_DIRECTORY) stop("%s: cannot be written: is a directory", path);
    if (kind == OUTPUT_SPECIAL) return;
    real = output_real(path);
    file = output_begin(real, &temporary);
    if (file == NULL) stop("%s: cannot be written: %s", path, strerror(errno));
    fclose(file);
    remove(temporary);
    free(temporary);
    free(real);
}

/* What put writes into the file (0: it failed) becomes PATH; or returns 0 and why not, and what was there stays. */
static int output_put(const char *path, int (*put)(FILE *file, const void *what), const void *what, char why[WHY]) {
    int kind = output_kind(path), good = kind != OUTPUT_DIRECTORY, error = EISDIR;
    char *temporary = NULL, *real = output_real(path);
    FILE *file = NULL;
    if (good) {
        file = kind == OUTPUT_SPECIAL ? fopen(path, "wb") : output_begin(real, &temporary);
        good = file != NULL;
        error = errno;
    }
    if (good) {
        good = put(file, what);
        error = errno;
        if (fclose(file) != 0 && good) good = 0, error = errno;
        if (good && temporary != NULL && !output_replace(temporary, real)) good = 0, error = errno;
        if (!good && temporary != NULL) remove(temporary);
    }
    if (!good) {
        snprintf(why, WHY, "%.300s: cannot be written: %s", path,
                 kind == OUTPUT_DIRECTORY ? "is a directory" : strerror(error));
    }
    free(temporary);
    free(real);
    return good;
}

static void output_write(const char *path, int (*put)(FILE *file, const void *what), const void *what) {
    char why[WHY];
    if (!output_put(path, put, what, why)) stop("%s", why);
}

/* ---- Checksums */

#define SUM 0xCBF29CE484222325u /* of nothing */

/* Of n elements of 1, 4 or 8 bytes, the same in any byte order. Each step can be undone, in the sum and in the element: one
 * element altered alters the sum. */
static uint64_t sum_elements(uint64_t sum, const void *data, size_t n, size_t size) {
    const unsigned char *at = (const unsigned char *)data;
    for (size_t i = 0; i < n; i++, at += size) {
        uint64_t word = *at;
        uint32_t half;
        if (size == sizeof word) memcpy(&word, at, sizeof word);
        if (size == sizeof half) memcpy(&half, at, sizeof half), word = half;
        sum = (sum ^ word) * 0x9E3779B97F4A7C15u;
        sum ^= sum >> 32;
    }
    return sum;
}

static uint64_t sum_tensor(uint64_t sum, const st_tensor *t) {
    size_t size = st_dtype_bytes(t->dtype);
    return sum_elements(sum, t->data, t->bytes / size, size);
}

static uint64_t sum_pair(uint64_t sum, const char *key, const char *value) {
    return sum_elements(sum_elements(sum, key, strlen(key) + 1, 1), value, strlen(value) + 1, 1);
}

/* The metadata of a file, which stand in the order in which they were written, but for the checksum itself. */
static uint64_t sum_metadata(const st_file *file) {
    uint64_t sum = SUM;
    for (size_t i = 0; i < file->metadata_count; i++) {
        if (strcmp(file->metadata[2 * i], "checksum") == 0) continue;
        sum = sum_pair(sum, file->metadata[2 * i], file->metadata[2 * i + 1]);
    }
    return sum;
}

/* ---- Writing: what generate and chat have in common */

#define WRITER_HELP                                                                                                  \
    "  --temp T         temperature, 0: always the most probable token (default 0.7)\n"                              \
    "  --top-p P        only the most probable tokens that together have P (default 0.95)\n"                         \
    "  --top-k N        only the N most probable tokens\n"                                                             \
    "  --min-p P        only tokens with P or more times the probability of the most probable one, at temperature 1\n" \
    "  --repeat-penalty R    makes tokens of the last 64 rarer: a positive logit is divided by R, another multiplied\n" \
    "  --logit-bias ID:VALUE  is added to the logit of a token; may be repeated. -inf forbids it\n"                   \
    "  --stop TEXT      the text ends before this; may be repeated. \\n is a line feed, \\t a tab, \\\\ a backslash\n" \
    "  --seed S         random seed (default 1); the same seed and options give the same text\n"                     \
    "  --mtp K          K tokens are drafted by the MTP modules in each step and verified together, 0 to 15 "        \
    "(default\n"                                                                                                     \
    "                   0). At temperature 0 the text is the same for every K, else its distribution is\n"           \
    "  --adaptive       fewer of them while they are seldom accepted\n"                                              \
    "  --context N      positions of the cache (default: what is needed, at most what the model was made for)\n"     \
    "  --cache TYPE     F32 or BF16 (default F32)\n"                                                                 \
    "  --attention F    auto, absorbed or expanded (default auto)\n"                                                 \
    "  --ids            prompt and output are token ids\n"                                                           \
    COMPUTE_HELP                                                                                                     \
    "  --stats          speed, memory and accepted drafts to standard error\n"

typedef struct writer_options {
    const char *cache, *attention, *backend;
    long n, seed, mtp, context, threads;
    double temperature, top_p;
    int adaptive, ids, fast, pack, no_pack, stats;
    long top_k; /* 0: all */
    double min_p, penalty;
    texts bias, stop;
} writer_options;

static writer_options writer_defaults(void) {
    writer_options o;
    memset(&o, 0, sizeof o);
    o.cache = "F32";
    o.attention = o.backend = "auto";
    o.n = 400;
    o.seed = 1;
    o.temperature = 0.7;
    o.top_p = 0.95;
    o.penalty = 1;
    return o;
}

static void writer_free(writer_options *o) { free(o->bias.item), free(o->stop.item); }

/* clang-format off */
#define WRITER_OPTIONS(o) /* the first lines of a command's table */                                                 \
    {"-n", OPTION_INT, &(o).n, 1, 1e9},                                                                              \
    {"--temp", OPTION_FLOAT, &(o).temperature, 0, 1e30},                                                             \
    {"--top-p", OPTION_FLOAT, &(o).top_p, 0, 1},                                                                     \
    {"--top-k", OPTION_INT, &(o).top_k, 1, (double)DSV3_MAX_VOCAB},                                                  \
    {"--min-p", OPTION_FLOAT, &(o).min_p, 0, 1},                                                                     \
    {"--repeat-penalty", OPTION_FLOAT, &(o).penalty, 0.01, 100},                                                     \
    {"--logit-bias", OPTION_LIST, &(o).bias, 0, 0},                                                                  \
    {"--stop", OPTION_LIST, &(o).stop, 0, 0},                                                                        \
    {"--seed", OPTION_INT, &(o).seed, 0, 9e15},                                                                      \
    {"--mtp", OPTION_INT, &(o).mtp, 0, (double)DSV3_MAX_DRAFTS},                                                     \
    {"--adaptive", OPTION_FLAG, &(o).adaptive, 0, 0},                                                                \
    {"--context", OPTION_INT, &(o).context, 1, (double)DSV3_MAX_SEQ},                                                \
    {"--cache", OPTION_TEXT, &(o).cache, 0, 0},                                                                      \
    {"--attention", OPTION_TEXT, &(o).attention, 0, 0},                                                              \
    {"--ids", OPTION_FLAG, &(o).ids, 0, 0},                                                                          \
    {"--threads", OPTION_INT, &(o).threads, 1, 4096},                                                                \
    {"--backend", OPTION_TEXT, &(o).backend, 0, 0},                                                                  \
    {"--fast", OPTION_FLAG, &(o).fast, 0, 0},                                                                        \
    {"--pack", OPTION_FLAG, &(o).pack, 0, 0},                                                                        \
    {"--no-pack", OPTION_FLAG, &(o).no_pack, 0, 0},                                                                  \
    {"--stats", OPTION_FLAG, &(o).stats, 0, 0}
/* clang-format on */

/* What is done to each row of logits. */
typedef struct steering {
    const writer_options *o;
    size_t n; /* biases */
    int32_t *id;
    float *bias;
    uint8_t *seen;
    dsv3_candidate *candidates;
} steering;

#define PENALISED 64

/* "ID:VALUE" */
static void steering_bias(steering *p, const char *text, size_t V) {
    char *end;
    long id = strtol(text, &end, 10);
    double value = *end == ':' && end > text ? strtod(end + 1, &end) : 0;
    if (end == text || *end != '\0' || strchr(text, ':') == NULL || strchr(text, ':')[1] == '\0')
        stop("--logit-bias: expected ID:VALUE, found '%s'", text);
    if (id < 0 || (size_t)id >= V) {
        stop("--logit-bias: token id: expected below %zu, found %.*s", V, (int)strcspn(text, ":"), text);
    }
    if (!(value <= 1e30)) stop("--logit-bias: expected a number up to 1e30, found '%s'", text);
    p->id[p->n] = (int32_t)id;
    p->bias[p->n++] = value < -1e30 ? -INFINITY : (float)value;
}

static void steering_open(steering *p, const writer_options *o, size_t V) {
    memset(p, 0, sizeof *p);
    p->o = o;
    p->id = (int32_t *)allocate("--logit-bias", o->bias.count * sizeof *p->id);
    p->bias = (float *)allocate("--logit-bias", o->bias.count * sizeof *p->bias);
    p->seen = (uint8_t *)allocate("--repeat-penalty", (V + 7) / 8);
    p->candidates = (dsv3_candidate *)allocate("--top-k", V * sizeof *p->candidates);
    for (size_t i = 0; i < o->bias.count; i++) steering_bias(p, o->bias.item[i], V);
}

static void steering_close(steering *p) { free(p->id), free(p->bias), free(p->seen), free(p->candidates); }

static int steering_needed(const writer_options *o) {
    return o->top_k > 0 || o->min_p > 0 || o->penalty < 1 || o->penalty > 1 || o->bias.count > 0;
}

/* A dsv3_steer. */
static dsv3_result steer(void *user, float *logits, size_t V, const int32_t *text, size_t length, size_t sequence) {
    steering *p = (steering *)user;
    size_t last = length < PENALISED ? length : PENALISED;
    dsv3_result r = dsv3_logits_penalty(logits, V, text + length - last, last, (float)p->o->penalty, p->seen, NULL);
    (void)sequence;
    if (r == DSV3_OK) r = dsv3_logits_bias(logits, V, p->id, p->bias, p->n, NULL);
    if (r == DSV3_OK && p->o->top_k > 0) r = dsv3_logits_top_k(logits, V, (size_t)p->o->top_k, p->candidates, NULL);
    if (r == DSV3_OK) r = dsv3_logits_min_p(logits, V, (float)p->o->min_p, NULL);
    return r;
}

/* A text and everything that writing it needs, beside the model. */
typedef struct writer {
    dsv3_sequence sequence;
    steering steering;
    stops stops;
    size_t bytes;
    void *memory;
    float *logits;
    double load, prompt, text; /* seconds; a prompt's last step also writes the first token behind it */
    size_t prompt_tokens, text_tokens;
} writer;

/* ---- --prompt-cache FILE: the text of an earlier call as tokens, and its sequence as dsv3_sequence_save has it */

typedef struct prompt_cache {
    const char *path;   /* NULL: there is none */
    const char *writer; /* the command whose text it is: it writes over no other's */
    uint64_t tag;     /* of the weights */
    int found;        /* bool: the file exists */
    st_file file;
    const int32_t *token; /* [count] its text */
    size_t count;
    const st_tensor *state;
    size_t common; /* tokens at the beginning of both texts */
    size_t reused; /* those of them that need not be read again */
} prompt_cache;

#define TAG_BYTES ((size_t)1 << 20) /* of one tensor */
#define TAG_PIECE ((size_t)64)

/* Tells weights apart without reading all of large ones: names, types, and up to 1 MiB of each tensor: the whole, or pieces at
 * equal distances. */
static uint64_t prompt_cache_tag(const st_file *file) {
    uint64_t sum = SUM;
    for (size_t i = 0; i < file->count; i++) {
        const st_tensor *t = &file->tensor[i];
        const unsigned char type = (unsigned char)t->dtype, *data = (const unsigned char *)t->data;
        size_t rest = t->bytes % TAG_PIECE;
        size_t far = t->bytes > TAG_BYTES ? t->bytes / (TAG_BYTES / TAG_PIECE) : TAG_PIECE;
        sum = sum_elements(sum, t->name, strlen(t->name) + 1, 1);
        sum = sum_elements(sum, &type, 1, 1);
        for (size_t left = t->bytes; left >= TAG_PIECE; left -= left > far ? far : left) {
            sum = sum_elements(sum, data + (t->bytes - left), TAG_PIECE / 8, 8);
        }
        if (rest > 0) sum = sum_elements(sum, data + (t->bytes - rest), rest, 1);
    }
    return sum;
}

/* Of what is said of a text, and the text. */
static void prompt_cache_checksum(char text[24], uint64_t sum, const int32_t *token, size_t count) {
    snprintf(text, 24, "%016llx", (unsigned long long)sum_elements(sum, token, count, sizeof *token));
}

/* Reads the file, if there is one, and how much of its text the prompt begins with. */
static void prompt_cache_open(prompt_cache *c, const char *path, const char *who, const session *s,
                              const tokens *prompt) {
    const st_tensor *text;
    const char *format, *sum, *by;
    char found[24];
    st_error error;
    memset(c, 0, sizeof *c);
    c->path = path;
    c->writer = who;
    if (path == NULL) return;
    output_try("--prompt-cache", path);
    c->tag = prompt_cache_tag(&s->model.file);
    if (output_is_new(path)) return;
    if (st_open(&c->file, path, &error) != ST_OK) stop("%s", error.message);
    c->found = 1;
    text = st_find(&c->file, "tokens");
    c->state = st_find(&c->file, "sequence");
    format = st_metadata(&c->file, "format");
    sum = st_metadata(&c->file, "checksum");
    if (format == NULL || strcmp(format, "dsv3 prompt cache") != 0 || sum == NULL || c->state == NULL ||
        c->state->dtype != ST_U8 || text == NULL || text->dtype != ST_I32) {
        stop("%s: is no prompt cache, or is damaged; it is left as it is", path);
    }
    c->count = text->bytes / sizeof *c->token;
    c->token = (const int32_t *)text->data;
    prompt_cache_checksum(found, sum_metadata(&c->file), c->token, c->count);
    if (strcmp(sum, found) != 0) {
        stop("%s: is damaged: its tokens, or what it says of them: expected checksum %.40s, found %s", path, sum, found);
    }
    by = st_metadata(&c->file, "written by");
    if (by == NULL || strcmp(by, who) != 0) {
        stop("%s: expected a text of dsv3 %s, found one of dsv3 %.16s; it is left as it is", path, who, by != NULL ? by : "?");
    }
    while (c->common < c->count && c->common < prompt->count && c->token[c->common] == prompt->id[c->common]) {
        c->common++;
    }
}

/* What it was written with, and what is wanted now. */
static void prompt_cache_same(const prompt_cache *c, const char *name, const char *found) {
    const char *expected = st_metadata(&c->file, name);
    if (expected == NULL) expected = "nothing";
    if (strcmp(expected, found) == 0) return;
    stop("%s: %s: expected %.16s, as it was written with, found %s; it is left as it is", c->path, name, expected, found);
}

/* All that is the caller's to set: what it was when the text was saved does not count. */
static void prompt_cache_settings(dsv3_sequence *to, const dsv3_sequence *fresh) {
    to->temperature = fresh->temperature;
    to->top_p = fresh->top_p;
    to->rng = fresh->rng;
    to->drafts = fresh->drafts;
    to->adaptive = fresh->adaptive;
    to->draft_cost = fresh->draft_cost;
    to->stop = fresh->stop;
    to->stops = fresh->stops;
    to->n_stops = fresh->n_stops;
    to->limit = fresh->limit;
    to->steer = fresh->steer;
    to->steer_user = fresh->steer_user;
    to->want_log_p = fresh->want_log_p;
    to->stopped = fresh->stopped;
}

/* The common text into a sequence. What was saved may be longer than it has room for: it is loaded beside it first. */
static void prompt_cache_load(prompt_cache *c, dsv3_sequence *to, const session *s) {
    const dsv3_model *model = &s->model.model;
    const dsv3_sequence fresh = *to;
    dsv3_sequence all;
    dsv3_error error;
    size_t bytes = 0, capacity = c->count > 0 ? c->count : 1;
    void *memory;
    char text[256], drafts[NUMBER];
    if (!c->found) return;
    number_text(drafts, (double)to->max_drafts);
    prompt_cache_same(c, "--mtp", drafts);
    prompt_cache_same(c, "--cache", dsv3_type_name(to->cache.type));
    stop_result(c->path, dsv3_sequence_size(model, capacity, to->cache.type, to->rows, to->max_drafts, &bytes, &stop_error));
    memory = allocate(c->path, bytes);
    stop_result(c->path, dsv3_sequence_init(model, &all, capacity, to->cache.type, to->rows, to->max_drafts, memory,
                                            bytes, &stop_error));
    if (dsv3_sequence_load(model, &all, c->tag, c->state->data, c->state->bytes, &error) != DSV3_OK) {
        stop("%s: %s; it is left as it is", c->path, dsv3_error_text(&error, text, sizeof text));
    }
    prompt_cache_same(c, "--backend", s->context.backend);
    prompt_cache_same(c, "--attention", attention_names[s->context.attention]);
    prompt_cache_same(c, "--fast", s->context.compute == DSV3_FAST ? "yes" : "no");
    if (dsv3_sequence_length(&all) > c->count) stop("%s: is damaged: its parts do not fit together", c->path);
    if (c->common < dsv3_sequence_length(&all)) {
        stop_result(c->path, dsv3_sequence_truncate(&all, c->common, &c->reused, &stop_error));
    } else {
        c->reused = dsv3_sequence_length(&all);
    }
    stop_result(c->path, dsv3_sequence_copy(to, &all, &stop_error));
    free(memory);
    st_close(&c->file);
    prompt_cache_settings(to, &fresh);
    to->steps = to->written = 0;
    for (size_t j = 0; j < to->max_drafts; j++) to->drafted[j] = to->accepted[j] = 0;
}

/* The text, for the next call; the sequence has read it, but perhaps not to its end. */
static void prompt_cache_save(const prompt_cache *c, const dsv3_sequence *from, const session *s, const int32_t *token,
                              size_t length) {
    char checksum[24], drafts[NUMBER];
    const char *pairs[] = {"format", "dsv3 prompt cache", "written by", c->writer, "--mtp", drafts,
                           "--cache", dsv3_type_name(from->cache.type), "--backend", s->context.backend,
                           "--attention", attention_names[s->context.attention],
                           "--fast", s->context.compute == DSV3_FAST ? "yes" : "no", "checksum", checksum, NULL};
    const dsv3_model *model = &s->model.model;
    st_tensor list[2];
    st_error error;
    uint64_t sum = SUM;
    size_t bytes = 0;
    void *data;
    if (c->path == NULL) return;
    number_text(drafts, (double)from->max_drafts);
    for (const char **pair = pairs; pair[2] != NULL; pair += 2) sum = sum_pair(sum, pair[0], pair[1]);
    prompt_cache_checksum(checksum, sum, token, length);
    stop_result(c->path, dsv3_sequence_save_size(from, &bytes, &stop_error));
    data = allocate(c->path, bytes);
    stop_result(c->path, dsv3_sequence_save(model, from, c->tag, data, bytes, &stop_error));
    memset(list, 0, sizeof list);
    list[0].name = "sequence";
    list[0].dtype = ST_U8;
    list[0].data = data;
    list[0].shape[0] = list[0].bytes = bytes;
    list[1].name = "tokens";
    list[1].dtype = ST_I32;
    list[1].data = token;
    list[1].shape[0] = length;
    list[1].bytes = length * sizeof *token;
    list[0].rank = list[1].rank = 1;
    if (st_write(c->path, list, 2, pairs, &error) != ST_OK) stop("%s", error.message);
    free(data);
}

/* Opens the model, before there is a text. */
static void writer_model(session *s, const char *directory, const writer_options *o) {
    session_open(s, directory, o->backend, o->threads, parse_pack(o->pack, o->no_pack));
    if (!o->ids && s->V != 256) {
        stop("%s: this model has %zu tokens and this program no tokenizer; use --ids and give token ids", directory,
             s->V);
    }
    s->context.attention = parse_attention(o->attention);
    s->context.compute = o->fast ? DSV3_FAST : DSV3_EXACT;
    if (o->mtp > 0 && s->model.model.n_mtp == 0) stop("--mtp: %s has no MTP modules", directory);
}

/* cached: where the text begins, or NULL. */
static void writer_open(writer *w, session *s, const writer_options *o, size_t context, size_t rows,
                        prompt_cache *cached) {
    const dsv3_model *model = &s->model.model;
    size_t drafts = (size_t)o->mtp;
    dsv3_type type = parse_cache(o->cache);
    memset(w, 0, sizeof *w);
    if (rows < drafts + 1) rows = drafts + 1;
    stop_result("cache", dsv3_sequence_size(model, context, type, rows, drafts, &w->bytes, &stop_error));
    w->memory = allocate("cache", w->bytes);
    stop_result("cache",
                dsv3_sequence_init(model, &w->sequence, context, type, rows, drafts, w->memory, w->bytes, &stop_error));
    if (cached != NULL) prompt_cache_load(cached, &w->sequence, s);
    stop_result("workspace",
                dsv3_workspace_size(&model->config, rows, s->context.threads, &s->workspace_bytes, &stop_error));
    s->workspace_memory = allocate("workspace", s->workspace_bytes);
    stop_result("workspace", dsv3_workspace_init(&model->config, &s->workspace, rows, s->context.threads,
                                                 s->workspace_memory, s->workspace_bytes, &stop_error));
    w->logits = (float *)allocate("logits", (drafts + 1) * s->V * sizeof *w->logits);
    w->sequence.temperature = (float)o->temperature;
    w->sequence.top_p = (float)o->top_p;
    w->sequence.rng.state = (uint64_t)o->seed;
    w->sequence.adaptive = o->adaptive;
    w->sequence.stops = s->model.eos;
    w->sequence.n_stops = s->model.n_eos;
    steering_open(&w->steering, o, s->V);
    if (steering_needed(o)) w->sequence.steer = steer;
    w->sequence.steer_user = &w->steering;
    stops_open(&w->stops, &o->stop, s->V, o->ids);
}

static void writer_close(writer *w) {
    steering_close(&w->steering);
    stops_close(&w->stops);
    free(w->memory);
    free(w->logits);
}

/* One step: w->sequence.token [n_token]. Nothing has happened if it was aborted. */
static void writer_step(writer *w, session *s) {
    dsv3_sequence *one = &w->sequence;
    dsv3_error error;
    char text[256];
    double begin = now(), spent;
    int prompt = one->prompt_left > 0;
    dsv3_result result = dsv3_generate_step(&s->context, w->logits, &s->model.model, &one, 1, &s->workspace, &error);
    if (result == DSV3_ERR_ABORTED) return;
    if (result != DSV3_OK) {
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

static void writer_stats(const writer *w, const session *s) {
    const dsv3_sequence *q = &w->sequence;
    fprintf(stderr, "load     %.3f s, %zu tensors\n", w->load, s->model.file.count);
    if (w->prompt > 0) {
        fprintf(stderr, "prompt   %zu tokens, %.3f s, %.0f tokens/s\n", w->prompt_tokens, w->prompt,
                (double)w->prompt_tokens / w->prompt);
    }
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
    fprintf(stderr, "memory   cache %zu bytes (%s, %zu positions), workspace %zu bytes, packed weights %zu bytes\n",
            w->bytes, dsv3_type_name(q->cache.type), q->cache.capacity, s->workspace_bytes, s->packed_bytes);
    fprintf(stderr, "machine  backend %s%s, %zu thread%s\n", s->context.backend,
            s->context.compute == DSV3_FAST ? ", fast" : "", s->context.threads, s->context.threads == 1 ? "" : "s");
}

/* ---- generate */

static const char generate_help[] =
    "usage: dsv3 generate DIR [options]\n"
    "Writes text with the checkpoint in DIR, token by token, to standard output.\n"
    "  -p TEXT          prompt (default: the model's begin-of-text token); \\n is a line feed, \\t a tab and \\\\ a\n"
    "                   backslash; - reads it from standard input\n"
    "  -f FILE          prompt from a file, as it is\n"
    "  --echo           write the prompt before the text and a line feed behind it, as on a terminal\n"
    "  -n N             tokens to write (default 400); ends earlier at an end-of-text token, a --stop or a full "
    "context\n"
    "  --prompt-cache F file that keeps the text with all that was computed for it: written at the end, and if it is\n"
    "                   there, what its text and the prompt begin with in common is not read again. It belongs to one\n"
    "                   model, --cache, --mtp, --backend, --attention and --fast: of another, or of chat, it is\n"
    "                   refused, and left as it is (weights are compared; those beyond 1 MiB a tensor by samples). The\n"
    "                   text is the same as without it, bit for bit if --attention is not auto, without --adaptive\n" WRITER_HELP;

/* The prompt as it is meant; *where becomes what messages call it. */
static char *generate_input(const char *text, const char *file, size_t *length, const char **where) {
    *length = 0;
    *where = file != NULL ? file : "-p";
    if (file != NULL) return read_file(file, length);
    if (text == NULL) return (char *)allocate("-p", 1);
    return strcmp(text, "-") == 0 ? read_file("-", length) : text_plain("-p", text, length);
}

static void generate_prompt(tokens *t, const session *s, const char *where, const char *text, size_t length,
                            int ids) {
    if (length > 0) tokens_from_text(t, where, text, length, s->V, ids);
    if (t->count == 0 && s->model.config.bos_token_id >= 0) tokens_add(t, s->model.config.bos_token_id);
    if (t->count == 0) stop("%s: the prompt is empty and the model has no begin-of-text token", where);
}

/* Positions that the model has not seen in training. */
static void warn_context(size_t positions, const session *s) {
    size_t most = (size_t)s->model.config.max_position_embeddings;
    if (positions <= most) return;
    fprintf(stderr, "dsv3: warning: a context of %zu positions, more than the %zu that the model was made for\n",
            positions, most);
}

static size_t generate_context(const session *s, const writer_options *o, const char *where, size_t prompt) {
    size_t most = o->context > 0 ? (size_t)o->context : (size_t)s->model.config.max_position_embeddings;
    size_t need = prompt + (size_t)o->n;
    if (prompt > most) {
        stop("%s: the prompt is longer than the context: expected at most %zu tokens, found %zu", where, most,
             prompt);
    }
    warn_context(need < most ? need : most, s);
    return o->context > 0 || need > most ? most : need;
}

static volatile sig_atomic_t generate_interrupted;

static void generate_interrupt(int signal_number) {
    (void)signal_number;
    generate_interrupted = 1;
}

/* The first Ctrl-C ends the text, the second one the program. */
static void generate_catch_interrupts(void) {
#ifdef TOOL_POSIX
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = generate_interrupt;
#ifdef SA_RESETHAND
    action.sa_flags = (int)SA_RESETHAND;
#endif
    sigaction(SIGINT, &action, NULL);
#else
    signal(SIGINT, generate_interrupt);
#endif
}

/* Writes until the text ends. Returns how many tokens belong to it. */
static size_t generate_text(writer *w, session *s) {
    dsv3_sequence *q = &w->sequence;
    size_t made = 0;
    while (dsv3_sequence_state(q) <= DSV3_STATE_WRITING && !w->stops.found && !generate_interrupted) {
        writer_step(w, s);
        for (size_t i = 0; i < q->n_token && !w->stops.found; i++) {
            if (i + 1 == q->n_token && q->stopped) break;
            made++;
            made -= stops_put(&w->stops, q->token[i]);
        }
    }
    if (!w->stops.found) stops_end(&w->stops);
    return made;
}

static int generate(int argc, char **argv, const command *c) {
    writer_options o = writer_defaults();
    const char *directory = NULL, *given = NULL, *file = NULL, *where, *cache_path = NULL;
    int echo = 0, status;
    const option options[] = {{"-p", OPTION_TEXT, &given, 0, 0},
                              {"-f", OPTION_TEXT, &file, 0, 0},
                              {"--echo", OPTION_FLAG, &echo, 0, 0},
                              {"--prompt-cache", OPTION_TEXT, &cache_path, 0, 0},
                              WRITER_OPTIONS(o),
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    session s;
    writer w;
    prompt_cache cached;
    tokens prompt = {NULL, 0, 0};
    char *text;
    size_t made, length;
    double begin = now(), load;
    status = parse(argc, argv, c, options, &directory, 1);
    if (status == 0 && given != NULL && file != NULL) status = 1 + usage(c, "-p and -f exclude each other", "");
    if (status != 0) writer_free(&o);
    if (status != 0) return status - 1;
    writer_model(&s, directory, &o);
    text = generate_input(given, file, &length, &where);
    generate_prompt(&prompt, &s, where, text, length, o.ids);
    prompt_cache_open(&cached, cache_path, "generate", &s, &prompt);
    /* A prompt's last token is read anew: the first step must be what it is without the file. */
    if (cached.common == prompt.count && prompt.count > 0) cached.common--;
    load = now() - begin;
    writer_open(&w, &s, &o, generate_context(&s, &o, where, prompt.count),
                prompt.count < CHUNK && cache_path == NULL ? prompt.count : CHUNK, &cached);
    w.load = load;
    w.prompt_tokens = prompt.count - cached.reused;
    if (w.prompt_tokens > 0) {
        stop_result("prompt", dsv3_sequence_append(&s.model.model, &w.sequence, prompt.id + cached.reused,
                                                   w.prompt_tokens, &stop_error));
    }
    echo |= is_terminal(stdout); /* so that the page reads whole */
    if (echo) fwrite(text, 1, length, stdout);
    free(text);
    w.sequence.limit = prompt.count + (size_t)o.n;
    generate_catch_interrupts();
    made = generate_text(&w, &s);
    if (echo || o.ids) printf("\n");
    flush_output();
    if (dsv3_sequence_state(&w.sequence) == DSV3_STATE_FULL && !w.stops.found && !generate_interrupted) {
        fprintf(stderr, "dsv3: the context of %zu positions is full after %zu of %ld tokens\n",
                w.sequence.cache.capacity, made, o.n);
    }
    if (w.sequence.prompt_left > 0) { /* interrupted: what is read stays */
        stop_result("prompt", dsv3_sequence_truncate(&w.sequence, dsv3_sequence_length(&w.sequence), NULL, &stop_error));
    }
    prompt_cache_save(&cached, &w.sequence, &s, w.sequence.history, dsv3_sequence_length(&w.sequence));
    if (o.stats && cache_path != NULL) {
        fprintf(stderr, "reused   %zu of %zu tokens of the prompt, from %s\n", cached.reused, prompt.count, cache_path);
    }
    if (o.stats) writer_stats(&w, &s);
    free(prompt.id);
    writer_close(&w);
    writer_free(&o);
    session_close(&s);
    if (generate_interrupted) { /* whoever waits is to know that it was */
        signal(SIGINT, SIG_DFL);
        raise(SIGINT);
    }
    return 0;
}

/* ---- chat */

#define CHAT_COMMANDS                                                                                                \
    "  /undo            forget the last turn and its reply\n"                                                        \
    "  /reset           forget everything behind --system\n"                                                         \
    "  /save FILE       write everything behind --system to a file\n"                                                \
    "  /load FILE       forget that, and go on from such a file\n"                                                   \
    "  /stats           as --stats, so far\n"                                                                        \
    "  /help            this list\n"

static const char chat_help[] =
    "usage: dsv3 chat DIR [options]\n"
    "A conversation: each line of standard input is a turn, and the model goes on from there. The caches stay, so\n"
    "that a turn costs only its own tokens. Lines that begin with a slash are commands:\n" CHAT_COMMANDS
    "  /quit            end, as the end of the input does\n"
    "Ctrl-C ends a reply, or between replies the conversation.\n"
    "Options (in texts, \\n is a line feed, \\t a tab and \\\\ a backslash):\n"
    "  --system TEXT    stands before the first turn (default: the begin-of-text token, if there is one)\n"
    "  --before TEXT    stands before each turn (default: \\n; with --ids nothing)\n"
    "  --after TEXT     stands between a turn and its reply (default: \\n\\n; with --ids nothing): so turns and "
    "replies\n"
    "                   are paragraphs\n"
    "  --stop-id ID     the token that ends a reply (default: the end-of-text tokens; a line feed if there are none,\n"
    "                   and no --stop)\n"
    "  --prompt-cache F file that keeps the conversation with all that was computed for it: written at the end, and if\n"
    "                   it is there at the beginning, the conversation goes on from it (one turn, for /undo). One\n"
    "                   of generate is refused, and left as it is\n"
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

/* Asked by the library between layers. */
static int chat_aborted(void *user) {
    (void)user;
    return chat_interrupted;
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

static void chat_add(chat_state *c, const char *where, const char *text) {
    tokens_from_escaped(&c->text, where, text, c->s.V, c->o.ids);
}

/* Rolls back to the first `length` tokens of the text; what the modules need again is appended with the next turn. */
static void chat_truncate(chat_state *c, size_t length) {
    size_t kept = 0, known = dsv3_sequence_length(&c->w.sequence);
    stop_result("roll back", dsv3_sequence_truncate(&c->w.sequence, length < known ? length : known, &kept, &stop_error));
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

/* A turn begins there. */
static void chat_mark(chat_state *c, size_t begin) {
    if (c->turns == c->turn_capacity) {
        c->turn_capacity = c->turn_capacity > 0 ? 2 * c->turn_capacity : 64;
        c->turn = (size_t *)realloc(c->turn, c->turn_capacity * sizeof *c->turn);
        if (c->turn == NULL) stop("no memory for %zu turns", c->turn_capacity);
    }
    c->turn[c->turns++] = begin;
}

/* Adds a turn to the text. Returns 0, with nothing changed and a line that says why, if that cannot be. */
static int chat_turn(chat_state *c, const char *line, size_t length) {
    size_t begin = c->text.count, capacity = c->w.sequence.cache.capacity;
    char why[WHY];
    int good;
    chat_add(c, "--before", c->before);
    good = tokens_read(&c->text, "input", line, length, c->s.V, c->o.ids, why);
    chat_add(c, "--after", c->after);
    if (good && c->text.count > capacity) {
        good = 0;
        snprintf(why, sizeof why, "the turn does not fit into the context of %zu positions; /undo or /reset",
                 capacity);
    }
    if (good) {
        chat_mark(c, begin);
    } else {
        c->text.count = begin;
        fprintf(stderr, "dsv3: %s\n", why);
    }
    return good;
}

/* What was said behind --system, as text, or as ids. */
static int chat_put(FILE *file, const void *what) {
    const chat_state *c = (const chat_state *)what;
    for (size_t i = c->begin; i < c->text.count; i++) {
        if (c->o.ids) {
            fprintf(file, "%ld%c", (long)c->text.id[i], i + 1 < c->text.count ? ' ' : '\n');
        } else {
            putc((int)c->text.id[i], file);
        }
    }
    return fflush(file) == 0 && !ferror(file);
}

static void chat_save(const chat_state *c, const char *path) {
    char why[WHY];
    if (output_put(path, chat_put, c, why)) {
        fprintf(stderr, "dsv3: %s: %zu tokens saved\n", path, c->text.count - c->begin);
    } else {
        fprintf(stderr, "dsv3: %s\n", why);
    }
}

/* The text of the file takes the place of all behind --system: one turn, for /undo. */
static void chat_load(chat_state *c, const char *path) {
    tokens t = {NULL, 0, 0};
    size_t length = 0, room = c->w.sequence.cache.capacity - c->begin;
    char why[WHY], *text = read_try(path, &length, why);
    int good = text != NULL && tokens_read(&t, path, text, length, c->s.V, c->o.ids, why);
    if (good && t.count > room) {
        good = 0;
        snprintf(why, sizeof why,
                 "%.200s: expected at most %zu tokens, as many as the context has room for, found %zu", path, room,
                 t.count);
    }
    if (good) {
        chat_reset(c);
        chat_mark(c, c->text.count);
        for (size_t i = 0; i < t.count; i++) tokens_add(&c->text, t.id[i]);
        snprintf(why, sizeof why, "%.200s: %zu tokens loaded", path, t.count);
    }
    fprintf(stderr, "dsv3: %s\n", why);
    free(text);
    free(t.id);
}

/* What --prompt-cache has, and where the conversation is to go on from it. It begins with --system. */
static void chat_cached(chat_state *c, prompt_cache *cached, const char *path) {
    prompt_cache_open(cached, path, "chat", &c->s, &c->text);
    if (!cached->found) return;
    if (cached->common < c->begin) {
        stop("%s: begins with another text than this conversation (--system); it is left as it is", path);
    }
    if (cached->count >= (size_t)c->o.context) {
        stop("%s: --context: expected more than the %zu tokens that it has, found %ld", path, cached->count, c->o.context);
    }
    for (size_t i = c->begin; i < cached->count; i++) tokens_add(&c->text, cached->token[i]);
    if (cached->count > c->begin) chat_mark(c, c->begin);
    cached->common = cached->count;
}

/* The model's turn, written as it is made, and remembered. */
static void chat_reply(chat_state *c) {
    dsv3_sequence *q = &c->w.sequence;
    stops *held = &c->w.stops;
    size_t known = dsv3_sequence_length(q), fresh = c->text.count - known;
    int32_t *copy = (int32_t *)allocate("turn", (fresh + 1) * sizeof *copy); /* text may move while it is read */
    if (fresh > 0) memcpy(copy, c->text.id + known, fresh * sizeof *copy);
    if (fresh > 0) stop_result("turn", dsv3_sequence_append(&c->s.model.model, q, copy, fresh, &stop_error));
    c->w.prompt_tokens += fresh;
    chat_interrupted = 0;
    held->found = q->stopped = 0;
    q->limit = c->text.count + (size_t)c->o.n;
    while (dsv3_sequence_state(q) <= DSV3_STATE_WRITING && !held->found && !chat_interrupted) {
        writer_step(&c->w, &c->s);
        for (size_t i = 0; i < q->n_token && !held->found; i++) {
            tokens_add(&c->text, q->token[i]);
            if (i + 1 < q->n_token || !q->stopped) c->text.count -= stops_put(held, q->token[i]);
        }
    }
    if (!held->found) stops_end(held);
    printf("\n");
    flush_output();
    if (dsv3_sequence_state(q) == DSV3_STATE_FULL && !held->found) {
        fprintf(stderr, "dsv3: the context is full\n");
    } else if (dsv3_sequence_state(q) == DSV3_STATE_LIMIT && !held->found && !chat_interrupted) {
        fprintf(stderr, "dsv3: the reply is cut at %ld tokens; -n allows more\n", c->o.n);
    }
    chat_truncate(c, c->text.count - q->prompt_left); /* an interrupted prompt; a stop text and drafts behind it */
    free(copy);
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
    } else if (strcmp(line, "/help") == 0) {
        fprintf(stderr, CHAT_COMMANDS "  /quit            end, as the end of the input does\n");
    } else if (strncmp(line, "/save ", 6) == 0 && line[6] != '\0') {
        chat_save(c, line + 6);
    } else if (strncmp(line, "/load ", 6) == 0 && line[6] != '\0') {
        chat_load(c, line + 6);
    } else if (line[0] == '/') {
        fprintf(stderr, "dsv3: %s: expected /undo, /reset, /save FILE, /load FILE, /stats, /help or /quit\n", line);
    } else if (chat_turn(c, line, length)) {
        chat_reply(c);
    }
    return 1;
}

static int chat(int argc, char **argv, const command *c) {
    chat_state chat = {0};
    const char *directory = NULL, *cache_path = NULL;
    prompt_cache cached;
    long stop_token = -1;
    double begin = now(), load;
    char *line;
    size_t length = 0;
    int status;
    const option options[] = {{"--system", OPTION_TEXT, &chat.system, 0, 0},
                              {"--before", OPTION_TEXT, &chat.before, 0, 0},
                              {"--after", OPTION_TEXT, &chat.after, 0, 0},
                              {"--stop-id", OPTION_INT, &stop_token, 0, (double)DSV3_MAX_VOCAB},
                              {"--prompt-cache", OPTION_TEXT, &cache_path, 0, 0},
                              WRITER_OPTIONS(chat.o),
                              {NULL, OPTION_FLAG, NULL, 0, 0}};
    chat.o = writer_defaults();
    status = parse(argc, argv, c, options, &directory, 1);
    if (status != 0) writer_free(&chat.o);
    if (status != 0) return status - 1;
    writer_model(&chat.s, directory, &chat.o);
    if (stop_token >= (long)chat.s.V) stop("--stop-id: expected below %zu, found %ld", chat.s.V, stop_token);
    if (stop_token >= 0) chat.s.model.n_eos = 0;
    if (stop_token < 0 && chat.s.model.n_eos == 0 && chat.o.stop.count == 0 && !chat.o.ids) stop_token = '\n';
    if (chat.before == NULL) chat.before = chat.o.ids ? "" : "\\n";
    if (chat.after == NULL) chat.after = chat.o.ids ? "" : "\\n\\n";
    load = now() - begin;
    if (chat.o.context == 0) chat.o.context = chat.s.model.config.max_position_embeddings;
    warn_context((size_t)chat.o.context, &chat.s);
    if (chat.system != NULL) chat_add(&chat, "--system", chat.system);
    if (chat.text.count == 0 && chat.s.model.config.bos_token_id >= 0) {
        tokens_add(&chat.text, chat.s.model.config.bos_token_id);
    }
    chat.begin = chat.text.count;
    if (chat.begin >= (size_t)chat.o.context) {
        stop("--system: is longer than the context: expected less than %ld tokens, found %zu", chat.o.context,
             chat.begin);
    }
    chat_cached(&chat, &cached, cache_path);
    writer_open(&chat.w, &chat.s, &chat.o, (size_t)chat.o.context,
                (size_t)chat.o.context < CHUNK ? (size_t)chat.o.context : CHUNK, &cached);
    chat.w.load = load;
    chat.w.sequence.stop = (int32_t)stop_token;
    chat.s.context.aborted = chat_aborted;
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
    prompt_cache_save(&cached, &chat.w.sequence, &chat.s, chat.text.id, chat.text.count);
    free(chat.text.id);
    free(chat.turn);
    writer_close(&chat.w);
    writer_free(&chat.o);
    session_close(&chat.s);
    return 0;
}

/* ---- A text read in windows, for score and route */

#define WINDOW_HELP                                                                                                  \
    "  --last P         only the last P percent of the file (FILE may be -, standard input)\n"                       \
    "  --context N      window length (default: what the model was made for)\n"                                      \
    "  --cache TYPE     F32 or BF16 (default F32)\n"                                                                 \
    "  --attention F    auto, absorbed or expanded (default auto)\n"                                                 \
    "  --ids            FILE holds token ids\n"                                                                      \
    COMPUTE_HELP

typedef struct window_options {
    const char *cache, *attention, *backend;
    double last;
    long context, threads;
    int ids, fast, pack, no_pack;
} window_options;

/* clang-format off */
#define WINDOW_OPTIONS(o) /* the first lines of a command's table */                                                 \
    {"--last", OPTION_FLOAT, &(o).last, 1e-6, 100},                                                                  \
    {"--context", OPTION_INT, &(o).context, 1, (double)DSV3_MAX_SEQ},                                                \
    {"--cache", OPTION_TEXT, &(o).cache, 0, 0},                                                                      \
    {"--attention", OPTION_TEXT, &(o).attention, 0, 0},                                                              \
    {"--ids", OPTION_FLAG, &(o).ids, 0, 0},                                                                          \
    {"--threads", OPTION_INT, &(o).threads, 1, 4096},                                                                \
    {"--backend", OPTION_TEXT, &(o).backend, 0, 0},                                                                  \
    {"--fast", OPTION_FLAG, &(o).fast, 0, 0},                                                                        \
    {"--pack", OPTION_FLAG, &(o).pack, 0, 0},                                                                        \
    {"--no-pack", OPTION_FLAG, &(o).no_pack, 0, 0}
/* clang-format on */

/* Opens the model in operands[0], reads the tokens of the file operands[1] and takes the memory for a window of them;
 * returns its length. The last `ahead` tokens are no inputs, only what is to be predicted. */
static size_t windows_open(session *s, tokens *t, const char *const *operands, const window_options *o,
                           size_t ahead) {
    size_t length = 0, first, window, most;
    char *text;
    session_open(s, operands[0], o->backend, o->threads, parse_pack(o->pack, o->no_pack));
    s->context.attention = parse_attention(o->attention);
    s->context.compute = o->fast ? DSV3_FAST : DSV3_EXACT;
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
    stop_result("cache", dsv3_cache_mtp_size(config, capacity, s->cache.type, &bytes, &stop_error));
    bytes += DSV3_ALIGN - bytes % DSV3_ALIGN;
    memory = (unsigned char *)allocate("cache", modules > SIZE_MAX / bytes ? SIZE_MAX : modules * bytes);
    for (size_t k = 0; k < modules; k++) {
        stop_result("cache", dsv3_cache_mtp_init(config, &caches[k], capacity, s->cache.type, memory + k * bytes,
                                                 bytes, &stop_error));
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
    window_options o = {"F32", "auto", "auto", 100, 0, 0, 0, 0, 0, 0};
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
    dsv3_load_count(r->window + row * r->E, idx, NULL, n, r->E, r->K, NULL);
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
        stop_result("cache", dsv3_cache_truncate(&s->cache, 0, &stop_error));
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
    window_options o = {"F32", "auto", "auto", 100, 0, 0, 0, 0, 0, 0};
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
    if (svg != NULL && csv != NULL && is_same_file(svg, csv)) stop("--csv: expected another path than --svg has");
    if (svg != NULL && is_same_file(svg, operands[1])) stop("--svg: %s: is the text that is read", svg);
    if (csv != NULL && is_same_file(csv, operands[1])) stop("--csv: %s: is the text that is read", csv);
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
    "active for a token (routed experts: those of one token; embedding and head: whole), cache, workspace, all of "
    "it\n"
    "together, and whether this machine has as much memory.\n"
    "Names: " PLAN_NAMES ".\n"
    "  --context N      positions of each sequence (default 4096, or the model's if shorter)\n"
    "  --batch N        sequences at a time (default 1)\n"
    "  --rows N         rows of a prompt chunk (default 512)\n"
    "  --type TYPE      weights: F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0 (default BF16), as convert writes them\n"
    "  --threads N      workers of the workspace (default 1)\n";

/* Sums of one tensor group. 64 bits everywhere: a plan must work on machines the model does not fit. */
typedef struct plan_sum {
    uint64_t tensors, parameters, active, bytes;
} plan_sum;

typedef struct plan_state {
    const dsv3_config *config;
    dsv3_type type;
    plan_sum group[DSV3_KINDS], main, mtp, copies;
} plan_state;

static void plan_add(plan_sum *to, const plan_sum *one) {
    to->tensors += one->tensors;
    to->parameters += one->parameters;
    to->active += one->active;
    to->bytes += one->bytes;
}

static dsv3_result plan_tensor(void *user, const dsv3_tensor_info *info) {
    plan_state *p = (plan_state *)user;
    dsv3_type type = checkpoint_type_of(info, p->type);
    uint64_t rows = info->rows, cols = info->cols, n = rows * cols;
    plan_sum one = {1, 0, 0, 0};
    one.parameters = n;
    one.active = n;
    one.bytes = rows * dsv3_row_bytes(type, info->cols);
    if (type == DSV3_F8_E4M3) {
        one.bytes += 4 * ((rows + DSV3_BLOCK - 1) / DSV3_BLOCK) * ((cols + DSV3_BLOCK - 1) / DSV3_BLOCK);
        one.tensors = 2;
    }
    if (info->kind == DSV3_KIND_EXPERTS && info->expert >= p->config->num_experts_per_tok) one.active = 0;
    if (info->optional) {
        plan_add(&p->copies, &one);
    } else if (info->layer >= p->config->num_hidden_layers) {
        plan_add(&p->mtp, &one);
    } else {
        plan_add(&p->group[info->kind], &one);
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
    static const char names[DSV3_KINDS][24] = {"embedding", "attention",      "dense layers",
                                               "routers",   "routed experts", "shared experts",
                                               "norms",     "output head",    "mtp"};
    char total[32], active[32];
    plan_count(total, sizeof total, p->main.parameters, 2);
    plan_count(active, sizeof active, p->main.active, 1);
    printf("%s: %s parameters, %s active for a token, weights %s\n\n", name, total, active, dsv3_type_name(p->type));
    printf("%-22s %8s %20s %20s %12s\n", "group", "tensors", "parameters", "bytes", "GB");
    for (int g = 0; g < DSV3_KINDS; g++) {
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
    result = dsv3_model_size(c, &bytes, NULL);
    plan_memory("model tables", result, bytes, 1);
    for (int t = 0; t < 2; t++) {
        dsv3_type type = t ? DSV3_F32 : DSV3_BF16;
        snprintf(line, sizeof line, "cache %s, %zu x %zu positions", dsv3_type_name(type), batch, context);
        result = dsv3_cache_size(c, context, type, &one, NULL);
        plan_memory(line, result, one, batch);
    }
    result = dsv3_workspace_size(c, batch, threads, &bytes, NULL);
    snprintf(line, sizeof line, "workspace, decode of %zu row%s", batch, batch == 1 ? "" : "s");
    plan_memory(line, result, bytes, 1);
    result = dsv3_workspace_size(c, rows, threads, &bytes, NULL);
    snprintf(line, sizeof line, "workspace, prompt chunks of %zu row%s", rows, rows == 1 ? "" : "s");
    plan_memory(line, result, bytes, 1);
}

/* All that one process needs to write text: weights, tables, caches, and a workspace for prompts and for decoding. */
static void plan_print_total(const plan_state *p, size_t context, size_t batch, size_t rows, size_t threads) {
    const dsv3_config *c = p->config;
    double total = (double)p->main.bytes + (double)p->mtp.bytes, memory = machine_memory();
    size_t tables = 0, cache = 0, workspace = 0;
    dsv3_result result = dsv3_model_size(c, &tables, NULL);
    if (result == DSV3_OK) result = dsv3_cache_size(c, context, DSV3_F32, &cache, NULL);
    if (result == DSV3_OK) result = dsv3_workspace_size(c, rows > batch ? rows : batch, threads, &workspace, NULL);
    if (result != DSV3_OK) {
        printf("\n%-42s %s\n", "in all", dsv3_result_string(result));
        return;
    }
    total += (double)tables + (double)batch * (double)cache + (double)workspace;
    printf("\n%-42s %20.0f %12.3f\n", "in all, weights and cache F32 included", total, total / 1e9);
    if (memory > 0) {
        printf("%-42s %20.0f %12.3f   %s\n", "memory of this machine", memory, memory / 1e9,
               total <= memory ? "it fits" : "it does not fit");
    }
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
    stop_result(name, dsv3_model_tensors(&config, plan_tensor, &p, &stop_error));
    plan_print(&p, name);
    if (context == 0) context = config.max_position_embeddings < 4096 ? config.max_position_embeddings : 4096;
    plan_print_memory(&config, (size_t)context, (size_t)batch, (size_t)rows, (size_t)threads);
    plan_print_total(&p, (size_t)context, (size_t)batch, (size_t)rows, (size_t)threads);
    flush_output();
    return 0;
}

/* ---- inspect */

static const char inspect_help[] =
    "usage: dsv3 inspect DIR | FILE.safetensors [options]\n"
    "Lists every tensor: type, shape, smallest and largest value, number of NaN and infinite values. FP8 values\n"
    "are shown with their scales applied, and what is Q8_0 or Q4_0 by DIR/config.json as such. Of types that are\n"
    "not known here no values are shown.\n"
    "  --check-finite   exit status 1 if a value is not finite, or a scale of FP8 not positive; names the first "
    "one\n";

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
    case ST_OTHER: return 0;
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

/* A matrix in blocks, as the numbers that it stands for. */
static range inspect_blocks(const dsv3_tensor *t) {
    range r = {HUGE_VAL, -HUGE_VAL, 0, 0, 0};
    const unsigned char *block = (const unsigned char *)t->data;
    uint64_t n = (uint64_t)t->rows * t->cols;
    int32_t row = 0;
    dsv3_tensor one; /* a matrix of one block */
    dsv3_context context;
    memset(&one, 0, sizeof one);
    one.rows = 1;
    one.cols = DSV3_QBLOCK;
    one.type = t->type;
    one.rank = 2;
    stop_result("reference", dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, &stop_error));
    for (uint64_t i = 0; i < n; i += DSV3_QBLOCK, block += dsv3_type_bytes(t->type)) {
        float x[DSV3_QBLOCK];
        one.data = block;
        dsv3_embed(&context, x, &row, &one, 1, NULL);
        for (uint64_t j = 0; j < DSV3_QBLOCK; j++) range_add(&r, (double)x[j], i + j);
    }
    return r;
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

static void inspect_shape(char *out, size_t capacity, const uint64_t *shape, int rank) {
    size_t n = (size_t)snprintf(out, capacity, "[");
    for (int i = 0; i < rank && n < capacity; i++) {
        n += (size_t)snprintf(out + n, capacity - n, "%s%llu", i ? ", " : "", (unsigned long long)shape[i]);
    }
    if (n < capacity) snprintf(out + n, capacity - n, "]");
}

/* Opens the files alone; of a directory also what its config.json says of U8 matrices, if there is one. */
static void inspect_open(checkpoint *c, const char *path) {
    size_t n = strlen(path);
    int is_file = n > 12 && strcmp(path + n - 12, ".safetensors") == 0;
    st_error error;
    st_result result;
    memset(c, 0, sizeof *c);
    c->blocks = -1;
    result = is_file ? st_open(&c->file, path, &error) : st_open_checkpoint(&c->file, path, &error);
    if (result != ST_OK) stop("%s", error.message);
    if (c->file.warning[0] != '\0') fprintf(stderr, "dsv3: warning: %s\n", c->file.warning);
    result = is_file ? ST_OK : checkpoint_blocks(&c->blocks, path, &error);
    if (result != ST_OK && result != ST_ERR_MISSING) fprintf(stderr, "dsv3: warning: %s\n", error.message);
}

typedef struct inspect_state {
    checkpoint model;
    uint64_t bytes, values, unknown; /* unknown: tensors of types that are not known here */
    char bad[ST_MAX_NAME + 64];      /* the first value that is not as it should be */
    int width;                       /* of the names */
} inspect_state;

/* Scales of an FP8 matrix are divisors of its numbers: not 0, and of no sign. */
static void inspect_positive(inspect_state *s, const st_tensor *scales) {
    for (uint64_t i = 0; scales != NULL && s->bad[0] == '\0' && i < scales->bytes / sizeof(float); i++) {
        if (element(scales, i) > 0) continue;
        snprintf(s->bad, sizeof s->bad, "%s: scale %llu is not positive", scales->name, (unsigned long long)i);
    }
}

/* One line for a tensor. */
static void inspect_tensor(inspect_state *s, const st_tensor *t) {
    char shape[256];
    const char *type = t->type;
    uint64_t real[2], values = 1;
    dsv3_tensor blocks;
    range r = {0, 0, 0, 0, 0};
    if (t->dtype == ST_U8 && checkpoint_find(&s->model, t->name, &blocks) == DSV3_OK) {
        real[0] = blocks.rows, real[1] = blocks.cols, values = real[0] * real[1];
        type = dsv3_type_name(blocks.type);
        r = inspect_blocks(&blocks);
        inspect_shape(shape, sizeof shape, real, 2);
    } else {
        inspect_shape(shape, sizeof shape, t->shape, t->rank);
        for (int i = 0; i < t->rank; i++) values *= t->shape[i]; /* it fits 64 bits, as st_open has checked */
        if (t->dtype != ST_OTHER) r = inspect_range(&s->model.file, t);
    }
    s->bytes += t->bytes;
    s->values += values;
    if (t->dtype == ST_OTHER) {
        s->unknown++;
        printf("%-*s %-8s %-16s %12s %12s %6s %6s\n", s->width, t->name, type, shape, "-", "-", "-", "-");
        return;
    }
    if (s->bad[0] == '\0' && r.nan + r.infinite > 0) {
        snprintf(s->bad, sizeof s->bad, "%s: value %llu is not finite", t->name, (unsigned long long)r.first_bad);
    }
    inspect_positive(s, inspect_scales(&s->model.file, t));
    if (r.low > r.high) r.low = r.high = 0; /* no values at all */
    printf("%-*s %-8s %-16s %12.5g %12.5g %6llu %6llu\n", s->width, t->name, type, shape, r.low, r.high,
           (unsigned long long)r.nan, (unsigned long long)r.infinite);
}

/* What the model in the directory would not use, if it is one. */
static void inspect_leftover(const char *path) {
    checkpoint c;
    if (checkpoint_open(&c, path, NULL) != ST_OK) return;
    c.file.warning[0] = '\0'; /* which was told before */
    checkpoint_notes(&c, path);
    checkpoint_close(&c);
}

static int inspect(int argc, char **argv, const command *c) {
    int check_finite = 0, status;
    const option options[] = {{"--check-finite", OPTION_FLAG, &check_finite, 0, 0}, {NULL, OPTION_FLAG, NULL, 0, 0}};
    const char *path = NULL;
    inspect_state s;
    const st_file *file = &s.model.file;
    progress p;
    status = parse(argc, argv, c, options, &path, 1);
    if (status != 0) return status - 1;
    memset(&s, 0, sizeof s);
    inspect_open(&s.model, path);
    s.width = 4;
    for (size_t i = 0; i < file->count; i++) {
        if (strlen(file->tensor[i].name) > (size_t)s.width) s.width = (int)strlen(file->tensor[i].name);
    }
    if (s.width > 72) s.width = 72;
    printf("%-*s %-8s %-16s %12s %12s %6s %6s\n", s.width, "name", "type", "shape", "min", "max", "nan", "inf");
    p = progress_begin("inspect");
    for (size_t i = 0; i < file->count; i++) {
        inspect_tensor(&s, &file->tensor[i]);
        progress_show(&p, (double)(i + 1), (double)file->count);
    }
    printf("%zu tensors, %llu values, %llu bytes, %d file%s\n", file->count, (unsigned long long)s.values,
           (unsigned long long)s.bytes, file->shards, file->shards == 1 ? "" : "s");
    flush_output();
    inspect_leftover(path);
    if (check_finite && s.unknown > 0) {
        fprintf(stderr, "dsv3: warning: %s: the values of %llu tensor%s are of types that are not known here\n", path,
                (unsigned long long)s.unknown, s.unknown == 1 ? "" : "s");
    }
    if (check_finite && s.bad[0] != '\0') stop("%s", s.bad);
    checkpoint_close(&s.model);
    return 0;
}

/* ---- Directories that are written */

/* Returns 0, and errno, if it is not there and cannot be made; EEXIST: something else has that name. */
static int directory_try(const char *path) {
#ifdef TOOL_POSIX
    struct stat s;
    return mkdir(path, 0777) == 0 || (errno == EEXIST && stat(path, &s) == 0 && S_ISDIR(s.st_mode));
#elif defined(_WIN32)
    struct _stat s;
    return _mkdir(path) == 0 || (errno == EEXIST && _stat(path, &s) == 0 && (s.st_mode & _S_IFDIR) != 0);
#else
    (void)path; /* C alone cannot make one: it must be there */
    return 1;
#endif
}

static void make_directory(const char *name, const char *path) {
    if (*path == '\0') stop("%s: expected a directory, found ''", name);
    if (directory_try(path)) return;
    if (errno == EEXIST) stop("%s: is not a directory", path);
    stop("%s: cannot be made: %s", path, strerror(errno));
}

/* directory/name. The caller frees it. */
static char *path_join(const char *directory, const char *name) {
    size_t n = strlen(directory) + strlen(name) + 2;
    char *path = (char *)allocate("path", n);
    snprintf(path, n, "%s/%s", directory, name);
    return path;
}

/* Is there anything of that name? What cannot be read, and a link to nothing, is something, too. */
static int file_exists(const char *directory, const char *name) {
    char *path = path_join(directory, name);
    int found;
#ifdef TOOL_POSIX
    struct stat s;
    found = lstat(path, &s) == 0;
    if (!found && errno != ENOENT && errno != ENOTDIR) stop("%s: cannot be looked at: %s", path, strerror(errno));
#else
    FILE *file = (errno = 0, fopen(path, "rb"));
    found = file != NULL;
    if (!found && errno != 0 && errno != ENOENT) stop("%s: cannot be looked at: %s", path, strerror(errno));
    if (found) fclose(file);
#endif
    free(path);
    return found;
}

#ifdef TOOL_POSIX

/* NAME.PROCESS-NUMBER.tmp, as output_begin, convert and safetensors.h make them. */
static int is_own_temporary(const char *name, pid_t *process) {
    const char *end = strrchr(name, '.'), *at = end;
    if (end == NULL || strcmp(end, ".tmp") != 0) return 0;
    while (at > name && at[-1] != '.') at--;
    if (at == name || *at < '1' || *at > '9' || end - at > 18) return 0;
    *process = (pid_t)strtol(at, NULL, 10);
    while (*at >= '0' && *at <= '9') at++;
    if (*at++ != '-') return 0;
    while (*at >= '0' && *at <= '9') at++;
    return at == end;
}

/* Removes a directory with the files in it; or, if all is 0, only those files of it that a process has left behind
 * which is no more. */
static void clean_directory(const char *directory, int all) {
    DIR *list = opendir(directory);
    struct dirent *entry;
    while (list != NULL && (entry = readdir(list)) != NULL) {
        pid_t process = 0;
        int mine = is_own_temporary(entry->d_name, &process) && kill(process, 0) != 0 && errno == ESRCH;
        char *path;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 || (!all && !mine)) continue;
        path = path_join(directory, entry->d_name);
        if (unlink(path) != 0 && !all) clean_directory(path, 1);
        free(path);
    }
    if (list != NULL) closedir(list);
    if (all) rmdir(directory);
}

/* ---- One writer for a directory. The lock is one of the system, on a file in it: it ends with its process, however
 * that ends, and what it leaves behind then is in nobody's way. */

static char *lock_path; /* of the lock that this process has */

static void lock_release(void) {
    if (lock_path != NULL) unlink(lock_path);
    free(lock_path);
    lock_path = NULL;
}

static void lock_take(const char *directory) {
    char *path = path_join(directory, "dsv3.lock");
    for (;;) {
        struct flock lock;
        struct stat here, there;
        int handle = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
        if (handle < 0) stop("%s: cannot be written: %s", path, strerror(errno));
        memset(&lock, 0, sizeof lock);
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        if (fcntl(handle, F_SETLK, &lock) != 0 && (errno == EACCES || errno == EAGAIN)) {
            (void)fcntl(handle, F_GETLK, &lock);
            stop("%s: another process is writing there (%ld): expected to be alone", directory, (long)lock.l_pid);
        } /* other errors: a file system without locks */
        if (fstat(handle, &here) == 0 && stat(path, &there) == 0 && here.st_ino == there.st_ino) break;
        close(handle); /* its owner has just removed it */
    }
    lock_path = path;
    atexit(lock_release);
    clean_directory(directory, 0);
}

#else

static void lock_take(const char *directory) { (void)directory; }

#endif

/* ---- convert */

static const char convert_help[] =
    "usage: dsv3 convert DIR OUT --type TYPE\n"
    "Writes the checkpoint in DIR to the directory OUT in another type: OUT/model.safetensors, one file, and\n"
    "OUT/config.json with torch_dtype and quantization_config to match. Other files of DIR are not copied.\n"
    "Links of these names in OUT are replaced: both files appear together, or what was there stays.\n"
    "  --type TYPE      F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0. With F8_E4M3, embedding, head, norms, routers and\n"
    "                   eh_proj become BF16 as in the published files, and each 128x128 block of the other matrices\n"
    "                   has a scale. With Q8_0 and Q4_0, 8 and 4 bits a number, all matrices have a scale for "
    "32\n"
    "                   numbers of a row, as in GGUF files; routers, norms, and matrices whose columns are no "
    "multiple\n"
    "                   of 32 become BF16. Router biases are always F32. What has its type already is copied bit\n"
    "                   for bit\n";

static void convert_print(const char *directory, dsv3_type type) {
    checkpoint c;
    st_error error;
    unsigned long long bytes = 0;
    if (checkpoint_open(&c, directory, &error) != ST_OK) stop("%s", error.message);
    for (size_t i = 0; i < c.file.count; i++) bytes += c.file.tensor[i].bytes;
    printf("%s: %s, %zu tensors, %llu bytes\n", directory, dsv3_type_name(type), c.file.count, bytes);
    flush_output();
    checkpoint_close(&c);
}

/* The new files are made in a directory of their own, in OUT, and moved from there when both are whole. */
typedef struct convert_files {
    const char *out;
    char *directory;   /* the one in OUT */
    char *old[2];      /* where those of OUT go meanwhile */
    int was[2], is[2]; /* bool: OUT had one; it has the new one */
} convert_files;

#ifdef TOOL_POSIX
static const char convert_names[2][24] = {"model.safetensors", "config.json"};
#endif

static void convert_begin(convert_files *f, const char *out) {
    memset(f, 0, sizeof *f);
    f->out = out;
#ifdef TOOL_POSIX
    for (int i = 0; i < 2; i++) {
        char *path = path_join(out, convert_names[i]);
        if (output_kind(path) == OUTPUT_DIRECTORY) stop("%s: cannot be written: is a directory", path);
        free(path);
    }
    for (int i = 0; f->directory == NULL; i++) {
        char name[64];
        snprintf(name, sizeof name, "convert.%ld-%d.tmp", (long)getpid(), i);
        f->directory = path_join(out, name);
        if (mkdir(f->directory, 0777) == 0) break;
        if (errno != EEXIST) stop("%s: cannot be made: %s", f->directory, strerror(errno));
        free(f->directory);
        f->directory = NULL;
    }
    f->old[0] = path_join(f->directory, "old.safetensors");
    f->old[1] = path_join(f->directory, "old.json");
#endif
}

#ifdef TOOL_POSIX

/* The file of OUT goes, if there is one. */
static int convert_away(convert_files *f, int i) {
    char *to = path_join(f->out, convert_names[i]);
    f->was[i] = rename(to, f->old[i]) == 0;
    free(to);
    return f->was[i] || errno == ENOENT;
}

/* The new one comes. */
static int convert_come(convert_files *f, int i) {
    char *to = path_join(f->out, convert_names[i]), *from = path_join(f->directory, convert_names[i]);
    f->is[i] = rename(from, to) == 0;
    free(to);
    free(from);
    return f->is[i];
}

/* What it was before. */
static void convert_back(convert_files *f, int i) {
    char *to = path_join(f->out, convert_names[i]);
    if (f->is[i]) unlink(to);
    if (f->was[i]) (void)rename(f->old[i], to);
    free(to);
}

#endif

/* Both appear, or what was there stays. (Killed in between, it has no config.json: nothing is taken for a model.) */
static void convert_end(convert_files *f, int made, const char *message) {
#ifdef TOOL_POSIX
    int moved = made && convert_away(f, 1) && convert_away(f, 0) && convert_come(f, 0) && convert_come(f, 1);
    int why = errno;
    if (!moved) convert_back(f, 0), convert_back(f, 1);
    clean_directory(f->directory, 1);
    if (made && !moved) stop("%s: cannot be replaced: %s", f->out, strerror(why));
    free(f->directory);
    free(f->old[0]);
    free(f->old[1]);
#else
    (void)f;
#endif
    if (!made) stop("%s", message);
}

static int convert(int argc, char **argv, const command *c) {
    const char *type_name = NULL, *operands[2] = {NULL, NULL};
    const option options[] = {{"--type", OPTION_TEXT, &type_name, 0, 0}, {NULL, OPTION_FLAG, NULL, 0, 0}};
    checkpoint from;
    st_error error;
    dsv3_type type;
    convert_files files;
    char *old = NULL, *text = NULL;
    const char *to;
    size_t length = 0;
    int made, status = parse(argc, argv, c, options, operands, 2);
    if (status != 0) return status - 1;
    if (type_name == NULL) return usage(c, "an option is missing: --type", "");
    type = parse_type("--type", type_name);
    if (is_same_file(operands[0], operands[1])) {
        stop("%s: expected another directory than the one to convert", operands[1]);
    }
    if (checkpoint_open(&from, operands[0], &error) != ST_OK) stop("%s", error.message);
    checkpoint_notes(&from, operands[0]);
    if (checkpoint_config_read(&old, &length, operands[0], &error) != ST_OK ||
        checkpoint_config_adapt(&text, old, length, operands[0], type, &error) != ST_OK) {
        stop("%s", error.message);
    }
    make_directory("OUT", operands[1]);
    lock_take(operands[1]);
    convert_begin(&files, operands[1]);
    to = files.directory != NULL ? files.directory : operands[1];
    made = checkpoint_save(to, &from.config, checkpoint_find, &from, type, &error) == ST_OK &&
           checkpoint_config_write(to, text, &error) == ST_OK;
    convert_end(&files, made, error.message);
    free(old);
    free(text);
    checkpoint_close(&from);
    convert_print(operands[1], type);
    return 0;
}

/* ---- train: options */

static const char train_help[] =
    "usage: dsv3 train (--preset NAME | --config FILE | --init DIR) --text FILE --out DIR [options]\n"
    "       dsv3 train --resume --out DIR [--steps MORE | --epochs MORE]\n"
    "Trains a model on text: AdamW, multi-token prediction, experts balanced by their biases. DIR gets the\n"
    "checkpoint (model.safetensors, config.json), what --resume needs (train.safetensors), log.csv and pictures of\n"
    "it. Ctrl-C ends it after the current step, with everything saved. Standard error shows the progress.\n"
    "Texts S may hold \\n, \\t and \\\\; with --ids they are token ids.\n"
    "The model:\n"
    "  --preset NAME    random weights for one of " PLAN_NAMES "\n"
    "  --config FILE    random weights for this config.json, or the one in this directory\n"
    "  --init DIR       the weights of a checkpoint, to be tuned: other defaults of --lr and --warmup, so that what\n"
    "                   the model knows survives the first steps\n"
    "  --std X          standard deviation of random weights (default 0.02)\n"
    "  --freeze NAMES   these tensors are not trained; * stands for any characters; may be repeated\n"
    "The text:\n"
    "  --text FILE      may be repeated: the files are joined\n"
    "  --ids            they hold token ids\n"
    "  --separator S    ends a document, as the end of a file then does; may be repeated. No loss crosses the border\n"
    "                   of two documents; attention does, as in V3's training\n"
    "  --apart          unless this is given: each document is read as if it stood alone\n"
    "  --loss-from S    within a document the loss begins behind S: prompts before it are read, but not learnt; may\n"
    "                   be repeated\n"
    "  --loss-to S      and ends behind this, up to the next --loss-from; may be repeated\n"
    "  --val P          the last P percent are for validation (default 5; with --val-text 0)\n"
    "  --val-text FILE  validation reads this instead; may be repeated\n"
    "  --seq N          tokens of a sequence (default: what the model was made for, at most 1024; it will predict\n"
    "                   badly at positions it has not seen)\n"
    "  --batch N        sequences of a step (default 4)\n"
    "  --accum N        micro-batches into which they are divided, to save memory (default: up to 4096 tokens each)\n";

static const char train_help_more[] =
    "The recipe:\n"
    "  --steps N        (default 1000); sequences are drawn from anywhere in the text\n"
    "  --epochs N       instead: N passes through the text, each in another order, in which every token comes once (but\n"
    "                   for less than --seq at the ends)\n"
    "  --lr X           highest learning rate (default 0.003; with --init 0.0001)\n"
    "  --schedule S     v3 (warm-up, constant, cosine, low, tail) or cosine (default v3)\n"
    "  --warmup N       steps of the warm-up (default: a twentieth; with --init at least 40, but at most half of all)\n"
    "  --constant F     v3: where the constant phase ends, as a fraction of the steps (default 0.676). The cosine "
    "ends\n"
    "                   at 0.966 and the low phase at 0.989, as for V3\n"
    "  --low F          rate of the low phase, or where the cosine ends, as a fraction of --lr (default 0.1)\n"
    "  --tail F         v3: rate of the last phase, likewise (default 0.033)\n"
    "  --lambda X       weight of the MTP losses (default 0.3)\n"
    "  --alpha X        weight of the balance loss (default: aux_loss_alpha of the config). It is of each sequence, or if\n"
    "                   the config says seq_aux false, of a micro-batch (--accum)\n"
    "  --alpha-loads W  what it counts: scores (the largest ones, V3) or routing (what was chosen, V2) (default: by\n"
    "                   topk_method)\n"
    "  --alpha-device X, --alpha-comm X   weights of V2's device and communication losses (default 0; V2: 0.05, 0.02)\n"
    "  --devices N, --most-devices N      for these: equal groups of experts, and how many of them a token is sent to\n"
    "                   (default: n_group and topk_group of the config)\n"
    "  --bias-speed X   step of the routers' biases (default 0.001)\n"
    "  --bias-freeze F  where the biases stop, as a fraction of the steps (default 0.966)\n"
    "  --weight-decay X (default 0.1)\n"
    "  --exempt NAMES   no weight decay for these tensors (norms never have any); may be repeated\n"
    "  --clip X         largest norm of the gradients, 0: any (default 1)\n"
    "  --ema X          decay of a moving average of the weights, kept in DIR/ema; 0: none (default 0)\n"
    "  --patience N     ends the run when N validations in a row were no better than the best; 0: never (default 0). It\n"
    "                   goes on by --resume with a larger N, or --patience 0\n"
    "  --seed N         (default 1)\n"
    "Memory and output:\n"
    "  --keep WHAT      activations that are kept, not computed again: none (default), all, or some of norms, up,\n"
    "                   swiglu with commas between them; does not change the result\n"
    "  --type TYPE      of the saved weights: F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0 (default F32)\n"
    "  --save-every N   steps between checkpoints (default 100)\n"
    "  --save-minutes X one comes after so many minutes at the latest; 0: by steps alone (default 10)\n"
    "  --keep-last N    the weights of the last N checkpoints also stay in DIR/step-...; 0: none (default 0)\n"
    "  --keep-best      those with the lowest validation loss (main model) stay in DIR/best\n"
    "  --val-every N    steps between validations (default 100)\n"
    "  --val-tokens N   tokens of a validation (default 8192)\n"
    "  --sample-every N steps between samples of the model's text, 0: none (default 0)\n"
    "  --threads N      default: all cores; does not change the result\n"
    "  --backend NAME   auto, reference, avx2, avx512, avx512_bf16 or amx (default auto: the best; with --resume that of\n"
    "                   the run); roundings depend on it\n"
    "  --resume         goes on with the run in DIR, bit for bit as if it had never stopped (but for load.svg, which\n"
    "                   shows the steps since the last picture); options and text are those of the run, and what is\n"
    "                   given again must agree (except --val-text, --epochs, --patience and what is under \"Memory and\n"
    "                   output\")\n"
    "  --resume --steps MORE   to another end. Before the rate falls the phases are laid out anew; later they stay, and\n"
    "                   the last rate (--tail; cosine: --low) goes on. For a new cycle use --init\n";

typedef struct train_options {
    const char *config, *preset, *init, *out, *schedule, *keep, *type, *backend, *alpha_loads;
    texts text, val_text, separator, loss_from, loss_to, freeze, exempt;
    long steps, epochs, batch, accum, seq, warmup, seed, val_every, val_tokens, sample_every, save_every, threads;
    long devices, most_devices, patience, keep_last;
    double std, val, lr, constant, low, tail, lambda, alpha, bias_speed, bias_freeze, weight_decay, clip, ema;
    double alpha_device, alpha_comm, save_minutes;
    int ids, resume, apart, keep_best;
} train_options;

#define TRAIN_OPTIONS 53
#define TRAIN_STEPS 1000

/* Defaults of --lr and --warmup. A trained model stands where large steps lead away from, and AdamW begins with moments
 * that know nothing: in its first 2 / (1 - beta2) = 40 steps the second ones are a few gradients' noise. */
#define TRAIN_RATE 0.003
#define TRAIN_RATE_TUNED 0.0001
#define TRAIN_WARMUP_TUNED 40

/* What --resume does with an option: it belongs to one call only; it is stored, but may change; it must stay. */
typedef enum train_role { TRAIN_CALL, TRAIN_FREE, TRAIN_FIXED } train_role;

static void train_table(option *table, train_options *o) {
    const option options[TRAIN_OPTIONS + 1] = {{"--config", OPTION_TEXT, &o->config, 0, 0},
                                               {"--preset", OPTION_TEXT, &o->preset, 0, 0},
                                               {"--init", OPTION_TEXT, &o->init, 0, 0},
                                               {"--out", OPTION_TEXT, &o->out, 0, 0},
                                               {"--resume", OPTION_FLAG, &o->resume, 0, 0},
                                               {"--threads", OPTION_INT, &o->threads, 1, 4096},
                                               {"--backend", OPTION_TEXT, &o->backend, 0, 0},
                                               {"--text", OPTION_LIST, &o->text, 0, 0},
                                               {"--val-text", OPTION_LIST, &o->val_text, 0, 0},
                                               {"--separator", OPTION_LIST, &o->separator, 0, 0},
                                               {"--apart", OPTION_FLAG, &o->apart, 0, 0},
                                               {"--loss-from", OPTION_LIST, &o->loss_from, 0, 0},
                                               {"--loss-to", OPTION_LIST, &o->loss_to, 0, 0},
                                               {"--epochs", OPTION_INT, &o->epochs, 1, 1e9},
                                               {"--alpha-loads", OPTION_TEXT, &o->alpha_loads, 0, 0},
                                               {"--alpha-device", OPTION_FLOAT, &o->alpha_device, 0, 1e6},
                                               {"--alpha-comm", OPTION_FLOAT, &o->alpha_comm, 0, 1e6},
                                               {"--devices", OPTION_INT, &o->devices, 1, 1e9},
                                               {"--most-devices", OPTION_INT, &o->most_devices, 1, 1e9},
                                               {"--patience", OPTION_INT, &o->patience, 0, 1e9},
                                               {"--save-minutes", OPTION_FLOAT, &o->save_minutes, 0, 1e9},
                                               {"--keep-last", OPTION_INT, &o->keep_last, 0, 1e6},
                                               {"--keep-best", OPTION_FLAG, &o->keep_best, 0, 0},
                                               {"--keep", OPTION_TEXT, &o->keep, 0, 0},
                                               {"--type", OPTION_TEXT, &o->type, 0, 0},
                                               {"--save-every", OPTION_INT, &o->save_every, 1, 1e9},
                                               {"--val-every", OPTION_INT, &o->val_every, 1, 1e9},
                                               {"--val-tokens", OPTION_INT, &o->val_tokens, 1, 1e15},
                                               {"--sample-every", OPTION_INT, &o->sample_every, 0, 1e9},
                                               {"--std", OPTION_FLOAT, &o->std, 0, 100},
                                               {"--freeze", OPTION_LIST, &o->freeze, 0, 0},
                                               {"--ids", OPTION_FLAG, &o->ids, 0, 0},
                                               {"--val", OPTION_FLOAT, &o->val, 0, 99},
                                               {"--seq", OPTION_INT, &o->seq, 1, (double)DSV3_MAX_SEQ},
                                               {"--batch", OPTION_INT, &o->batch, 1, 1e6},
                                               {"--accum", OPTION_INT, &o->accum, 1, 1e6},
                                               {"--steps", OPTION_INT, &o->steps, 1, 1e9},
                                               {"--lr", OPTION_FLOAT, &o->lr, 0, 1e30},
                                               {"--schedule", OPTION_TEXT, &o->schedule, 0, 0},
                                               {"--warmup", OPTION_INT, &o->warmup, 0, 1e9},
                                               {"--constant", OPTION_FLOAT, &o->constant, 0, 1},
                                               {"--low", OPTION_FLOAT, &o->low, 0, 1},
                                               {"--tail", OPTION_FLOAT, &o->tail, 0, 1},
                                               {"--lambda", OPTION_FLOAT, &o->lambda, 0, 1e6},
                                               {"--alpha", OPTION_FLOAT, &o->alpha, 0, 1e6},
                                               {"--bias-speed", OPTION_FLOAT, &o->bias_speed, 0, 1e6},
                                               {"--bias-freeze", OPTION_FLOAT, &o->bias_freeze, 0, 1},
                                               {"--weight-decay", OPTION_FLOAT, &o->weight_decay, 0, 1e6},
                                               {"--exempt", OPTION_LIST, &o->exempt, 0, 0},
                                               {"--clip", OPTION_FLOAT, &o->clip, 0, 1e30},
                                               {"--ema", OPTION_FLOAT, &o->ema, 0, 0.999999999},
                                               {"--seed", OPTION_INT, &o->seed, 0, 9e15},
                                               {NULL, OPTION_FLAG, NULL, 0, 0}};
    memcpy(table, options, sizeof options);
}

static train_role train_role_of(const char *name) {
    static const char calls[7][12] = {"--config", "--preset",  "--init",   "--out",
                                      "--resume", "--threads", "--backend"};
    static const char frees[14][16] = {"--text",      "--keep",       "--type",         "--save-every",   "--val-every",
                                       "--val-tokens", "--sample-every", "--steps",      "--epochs",       "--val-text",
                                       "--save-minutes", "--keep-last",  "--keep-best",  "--patience"};
    for (int i = 0; i < 7; i++) {
        if (strcmp(name, calls[i]) == 0) return TRAIN_CALL;
    }
    for (int i = 0; i < 14; i++) {
        if (strcmp(name, frees[i]) == 0) return TRAIN_FREE;
    }
    return TRAIN_FIXED;
}

static train_options train_defaults(void) {
    train_options o;
    memset(&o, 0, sizeof o);
    o.schedule = "v3";
    o.keep = "none";
    o.type = "F32";
    o.batch = 4;
    o.warmup = -1;
    o.seed = 1;
    o.save_every = o.val_every = 100;
    o.val_tokens = 8192;
    o.std = 0.02;
    o.save_minutes = 10;
    o.val = o.lr = o.alpha = o.bias_speed = o.bias_freeze = -1; /* until more is known: train_resolve */
    o.constant = 10.0 / 14.8; /* [R] 4.2: trillions of tokens */
    o.low = 0.1;
    o.tail = 7.3e-6 / 2.2e-4;
    o.lambda = 0.3;
    o.weight_decay = 0.1;
    o.clip = 1;
    return o;
}

static int32_t train_keep(const char *text) {
    static const char names[5][8] = {"none", "norms", "up", "swiglu", "all"};
    static const int32_t bits[5] = {0, DSV3_KEEP_NORMS, DSV3_KEEP_UP_PROJECTIONS, DSV3_KEEP_SWIGLU,
                                    DSV3_KEEP_NORMS + DSV3_KEEP_UP_PROJECTIONS + DSV3_KEEP_SWIGLU};
    int32_t keep = 0;
    for (const char *at = text;; at++) {
        size_t n = strcspn(at, ","), i = 0;
        while (i < 5 && (strlen(names[i]) != n || strncmp(names[i], at, n) != 0)) i++;
        if (i == 5) stop("--keep: expected none, all, or norms, up, swiglu with commas between, found '%s'", text);
        keep |= bits[i];
        at += n;
        if (*at == '\0') return keep;
    }
}

/* What makes no sense together, or is missing; NULL: nothing. */
static const char *train_misuse(const train_options *o) {
    static char why[96];
    int models = (o->config != NULL) + (o->preset != NULL) + (o->init != NULL);
    if (o->out == NULL) return "--out: expected a directory, found nothing";
    if (o->resume && models > 0) return "--resume: the model is the one in --out; expected no other";
    snprintf(why, sizeof why, "expected one of --preset, --config and --init, found %d", models);
    if (!o->resume && models != 1) return why;
    if (o->steps > 0 && o->epochs > 0) return "--steps and --epochs exclude each other";
    if (!o->resume && o->loss_to.count > 0 && o->loss_from.count == 0) return "--loss-to: expected --loss-from, too";
    return !o->resume && o->text.count == 0 ? "--text: expected at least one file, found none" : NULL;
}

static void train_check_warmup(const train_options *o, long steps) {
    if (o->warmup > steps) stop("--warmup: expected at most %ld, the steps, found %ld", steps, o->warmup);
}

/* The values of options, as far as they need no file. */
static void train_check(const train_options *o) {
    (void)train_keep(o->keep);
    (void)parse_type("--type", o->type);
    if (strcmp(o->schedule, "v3") != 0 && strcmp(o->schedule, "cosine") != 0) {
        stop("--schedule: expected v3 or cosine, found '%s'", o->schedule);
    }
    if (o->accum > 0 && o->batch % o->accum != 0) {
        stop("--accum: expected a divisor of the batch of %ld sequences, found %ld", o->batch, o->accum);
    }
    if (o->alpha_loads != NULL && strcmp(o->alpha_loads, "scores") != 0 && strcmp(o->alpha_loads, "routing") != 0) {
        stop("--alpha-loads: expected scores or routing, found '%s'", o->alpha_loads);
    }
    if (o->epochs == 0) train_check_warmup(o, o->steps > 0 ? o->steps : TRAIN_STEPS);
}

/* ---- train: everything there is */

#define NOTHING ((double)NAN) /* a number that was not measured */
#define TRAIN_PATIENCE 10     /* steps in a row without finite gradients before it is given up */

/* A tensor of the parameters. */
typedef struct train_tensor {
    char name[DSV3_MAX_NAME];
    size_t at; /* its first element */
    size_t rows, cols;
    int rank;
} train_tensor;

/* The rows of log.csv, column by column; NOTHING: not measured. */
typedef struct train_log {
    FILE *file;
    char *path;
    double **column; /* [columns][capacity] */
    size_t columns, rows, capacity;
} train_log;

/* Places in a text, never falling. */
typedef struct places {
    size_t *at; /* [count] */
    size_t count, capacity;
} places;

static void places_add(places *p, size_t at) {
    if (p->count == p->capacity) {
        p->capacity = p->capacity > 0 ? 2 * p->capacity : 256;
        p->at = (size_t *)realloc(p->at, p->capacity * sizeof *p->at);
        if (p->at == NULL) stop("text: no memory for %zu places", p->capacity);
    }
    p->at[p->count++] = at;
}

/* The first of them behind x, by its index. */
static size_t places_behind(const places *p, size_t x) {
    size_t low = 0, high = p->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (p->at[middle] > x) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* A text that is trained on or read for validation. Tokens take as many bytes as the vocabulary needs. */
typedef struct corpus {
    unsigned char *data;
    size_t count, width; /* tokens; bytes of one: 1, 2 or 4 */
    places begin;        /* of documents but the first */
    places edge;         /* where the loss begins, ends, begins ..: at first it is off */
} corpus;

typedef struct train_state {
    train_options o;
    char **string; /* [strings] what was restored */
    size_t strings;
    dsv3_config config;
    dsv3_type type;
    size_t D;
    corpus text, val_text;
    size_t taught; /* tokens that are trained on; the others are for validation, unless it has a text of its own */
    uint64_t hash, val_hash; /* of the tokens; of those that validation reads */
    dsv3_training settings;
    uint64_t phases; /* steps over which the phases of the schedule are laid out: --steps, unless that was changed late */
    dsv3_schedule schedule;
    dsv3_trainer trainer;
    void *trainer_memory;
    train_tensor *tensor; /* [tensors] in the order of the parameters */
    size_t tensors;
    size_t accum, sequences, seq;          /* micro-batches; sequences of one; tokens of a sequence */
    int32_t *token, *target, *sequence_id, *document; /* [sequences * seq] */
    session eval;                          /* the trainer's weights, for validation and samples */
    dsv3_cache *modules;
    void *modules_memory;
    dsv3_losses val;
    size_t moe;        /* layers with experts, MTP modules included */
    int32_t *layer;    /* [moe] */
    double *load;      /* [moe, E] since the last picture */
    uint64_t done;     /* steps, skipped ones included */
    uint64_t skipped;  /* of these */
    uint64_t in_a_row; /* of these, the last ones */
    uint64_t good;     /* the last step that trained something */
    uint64_t saved;    /* the step of the last checkpoint */
    int broken;        /* bool: weights are not finite */
    double best;       /* the lowest validation loss of the main model; NOTHING: none */
    uint64_t best_step, worse; /* where that was; validations since then */
    train_log log;
    double begin, shown, drawn, kept; /* seconds: of what was done last; kept: saved */
    uint64_t began_at;          /* step */
} train_state;

/* The columns of the log: step, tokens, lr, loss, main, mtp 1 .. D, balance, grad_norm, MaxVio, val main, mtp 1 .., and V2's
 * device and communication losses if they have a weight. */
enum { TRAIN_STEP, TRAIN_TOKENS, TRAIN_LR, TRAIN_LOSS, TRAIN_MAIN };
static size_t train_balance(const train_state *s) { return TRAIN_MAIN + 1 + s->D; }
static size_t train_norm(const train_state *s) { return train_balance(s) + 1; }
static size_t train_vio(const train_state *s) { return train_balance(s) + 2; }
static size_t train_val(const train_state *s) { return train_balance(s) + 3; }
static size_t train_device(const train_state *s) { return train_val(s) + 1 + s->D; }
static size_t train_communication(const train_state *s) { return train_device(s) + (s->settings.balance.device > 0); }
static size_t train_columns(const train_state *s) { return train_communication(s) + (s->settings.balance.communication > 0); }

/* ---- train: names of tensors */

static int train_matches(const char *pattern, const char *name) {
    const char *star = NULL, *back = NULL; /* the last * and the name it may still have to swallow */
    while (*name != '\0') {
        if (*pattern == '*') {
            star = pattern++;
            back = name;
        } else if (*pattern == *name) {
            pattern++;
            name++;
        } else if (star != NULL) {
            pattern = star + 1;
            name = ++back;
        } else {
            return 0;
        }
    }
    while (*pattern == '*') pattern++;
    return *pattern == '\0';
}

typedef struct train_names {
    const char *pattern;
    size_t matches, shared;
} train_names;

static dsv3_result train_match_visit(void *user, const dsv3_tensor_info *info) {
    train_names *n = (train_names *)user;
    int found = !info->optional && train_matches(n->pattern, info->name);
    n->matches += found != 0;
    n->shared += found && info->kind == DSV3_KIND_SHARED;
    return DSV3_OK;
}

/* A pattern that names nothing is a mistake. */
static void train_check_names(const train_state *s, const char *which, const texts *patterns) {
    size_t shared = 0;
    for (size_t i = 0; i < patterns->count; i++) {
        train_names n = {patterns->item[i], 0, 0};
        stop_result(which, dsv3_model_tensors(&s->config, train_match_visit, &n, &stop_error));
        if (n.matches == 0) stop("%s: no tensor has a name like '%s'", which, n.pattern);
        shared += n.shared;
    }
    if (shared > 0 && strcmp(which, "--freeze") == 0) {
        fprintf(stderr,
                "dsv3: warning: --freeze: %zu tensors of shared experts stay as they are%s; every token passes "
                "through them\n",
                shared, s->o.init == NULL && !s->o.resume ? ", random" : "");
    }
}

static dsv3_result train_tensor_visit(void *user, const dsv3_tensor_info *info) {
    train_state *s = (train_state *)user;
    if (info->optional) return DSV3_OK;
    if (s->tensor != NULL) {
        train_tensor *t = &s->tensor[s->tensors];
        memcpy(t->name, info->name, sizeof t->name);
        t->rank = info->rank;
        t->rows = info->rows;
        t->cols = info->cols;
        t->at = s->tensors > 0 ? t[-1].at + t[-1].rows * t[-1].cols : 0;
    }
    s->tensors++;
    return DSV3_OK;
}

static void train_list_tensors(train_state *s) {
    stop_result("tensors", dsv3_model_tensors(&s->config, train_tensor_visit, s, &stop_error));
    s->tensor = (train_tensor *)route_table("tensors", s->tensors, 1, 1, sizeof *s->tensor);
    s->tensors = 0;
    stop_result("tensors", dsv3_model_tensors(&s->config, train_tensor_visit, s, &stop_error));
}

/* A dsv3_find over an array in the order of the parameters. It is mostly asked in that order. */
typedef struct train_lookup {
    const train_state *s;
    const float *data;
    size_t next;
} train_lookup;

static dsv3_result train_find(void *user, const char *name, dsv3_tensor *tensor) {
    train_lookup *l = (train_lookup *)user;
    for (size_t i = 0; i < l->s->tensors; i++) {
        const train_tensor *t = &l->s->tensor[(l->next + i) % l->s->tensors];
        if (strcmp(t->name, name) != 0) continue;
        l->next += i + 1;
        tensor->data = l->data + t->at;
        tensor->type = DSV3_F32;
        tensor->rank = t->rank;
        tensor->rows = t->rows;
        tensor->cols = t->cols;
        return DSV3_OK;
    }
    return DSV3_ERR_MISSING;
}

/* ---- train: options as text, in train.safetensors */

/* A path or pattern in a list: without spaces, in ASCII, whatever its bytes are. */
static char *train_escape(char *to, const char *text) {
    for (; *text != '\0'; text++) {
        unsigned char c = (unsigned char)*text;
        if (c > 0x20 && c < 0x7F && c != '%') {
            *to++ = *text;
        } else {
            to += snprintf(to, 4, "%%%02X", (unsigned)c);
        }
    }
    *to = '\0';
    return to;
}

/* What %XX stands for; 0: nothing that was written here. */
static int train_unescape(const char *text) {
    static const char digits[] = "0123456789ABCDEF";
    const char *high = strchr(digits, text[1]), *low = high != NULL && text[1] != '\0' ? strchr(digits, text[2]) : NULL;
    return low != NULL && text[2] != '\0' ? (int)(16 * (high - digits) + (low - digits)) : 0;
}

static char *train_value(const option *o) {
    const texts *list = (const texts *)o->value;
    size_t n = NUMBER;
    char *text, *at;
    if (o->kind == OPTION_TEXT && *(const char **)o->value != NULL) n += strlen(*(const char **)o->value);
    for (size_t i = 0; o->kind == OPTION_LIST && i < list->count; i++) n += 3 * strlen(list->item[i]) + 1;
    at = text = (char *)allocate(o->name, n);
    *text = '\0';
    switch (o->kind) {
    case OPTION_FLAG: snprintf(text, n, "%d", *(int *)o->value); break;
    case OPTION_TEXT:
        if (*(const char **)o->value != NULL) snprintf(text, n, "%s", *(const char **)o->value);
        break;
    case OPTION_INT: snprintf(text, n, "%ld", *(long *)o->value); break;
    case OPTION_FLOAT: number_text(text, *(double *)o->value); break;
    case OPTION_LIST:
        for (size_t i = 0; i < list->count; i++) {
            if (i > 0) *at++ = ' ';
            at = train_escape(at, list->item[i]);
        }
        break;
    }
    return text;
}

/* A copy that lives as long as the run. */
static const char *train_keep_string(train_state *s, const char *text, size_t n) {
    char *copy = (char *)allocate("options", n + 1);
    memcpy(copy, text, n);
    copy[n] = '\0';
    s->string = (char **)realloc(s->string, (s->strings + 1) * sizeof *s->string);
    if (s->string == NULL) stop("options: no memory for %zu texts", s->strings + 1);
    return s->string[s->strings++] = copy;
}

static void train_restore_list(train_state *s, const char *name, texts *list, const char *text) {
    while (*text != '\0') {
        size_t n = strcspn(text, " "), length = 0;
        char *plain = (char *)allocate("options", n + 1);
        for (size_t i = 0; i < n; i++) {
            int escaped = text[i] == '%' ? train_unescape(text + i) : -1;
            if (escaped == 0) stop("%s: expected %% and two digits for a byte, found '%.8s'", name, text + i);
            plain[length++] = escaped > 0 ? (char)escaped : text[i];
            i += escaped > 0 ? 2 : 0;
        }
        texts_add(list, train_keep_string(s, plain, length));
        free(plain);
        text += n;
        text += *text == ' ';
    }
    list->replace = 1;
}

static void train_restore(train_state *s, const st_file *file, const char *path) {
    option table[TRAIN_OPTIONS + 1];
    train_table(table, &s->o);
    stop_about = path;
    for (const option *o = table; o->name != NULL; o++) {
        const char *value = st_metadata(file, o->name);
        if (train_role_of(o->name) == TRAIN_CALL) continue;
        if (value == NULL) continue; /* a version that did not have it yet: the default is as it was then */
        if (o->kind == OPTION_LIST) {
            train_restore_list(s, o->name, (texts *)o->value, value);
        } else if (o->kind == OPTION_TEXT) {
            *(const char **)o->value = *value != '\0' ? train_keep_string(s, value, strlen(value)) : NULL;
        } else if (o->kind == OPTION_FLAG) {
            *(int *)o->value = strcmp(value, "1") == 0;
            if (strcmp(value, "0") != 0 && strcmp(value, "1") != 0) stop("%s: expected 0 or 1, found '%s'", o->name, value);
        } else if (strcmp(o->name, "--epochs") != 0 || strcmp(value, "0") != 0) { /* there: none */
            option_number(o, value);
        }
    }
    train_check(&s->o);
    stop_about = NULL;
}

/* After the command line was read once more, over what was restored. */
static void train_compare(train_state *s, const st_file *file) {
    option table[TRAIN_OPTIONS + 1];
    train_table(table, &s->o);
    for (const option *o = table; o->name != NULL; o++) {
        const char *before = st_metadata(file, o->name);
        char *now_is, number[NUMBER];
        if (train_role_of(o->name) != TRAIN_FIXED || before == NULL) continue;
        now_is = train_value(o);
        if (o->kind == OPTION_FLOAT) {
            number_text(number, strtod(before, NULL));
            before = number;
        }
        if (strcmp(before, now_is) != 0) {
            stop("%s: expected '%s', as the run in %s has it, found '%s'", o->name, before, s->o.out, now_is);
        }
        free(now_is);
    }
}

/* ---- train: files */

static char *train_path(const train_state *s, const char *name) { return path_join(s->o.out, name); }

static uint64_t train_number(const st_file *file, const char *path, const char *key) {
    const char *value = st_metadata(file, key);
    uint64_t n = 0;
    if (value == NULL || *value == '\0') stop("%s: is no state of a training run: %s is missing", path, key);
    for (; *value >= '0' && *value <= '9' && n < UINT64_MAX / 10; value++) n = 10 * n + (uint64_t)(*value - '0');
    if (*value != '\0') stop("%s: %s is not a number", path, key);
    return n;
}

#define TRAIN_ARRAYS 4

/* The arrays of the state, by the first part of their tensors' names. */
static size_t train_arrays(train_state *s, float **array, const char *prefix[TRAIN_ARRAYS]) {
    static const char names[TRAIN_ARRAYS][12] = {"weights.", "m.", "v.", "ema."};
    array[0] = s->trainer.weights.data;
    array[1] = s->trainer.m;
    array[2] = s->trainer.v;
    array[3] = s->trainer.ema;
    for (size_t i = 0; i < TRAIN_ARRAYS; i++) prefix[i] = names[i];
    return s->trainer.ema != NULL ? 4 : 3;
}

/* The tensors of train.safetensors, with room for one more; their names follow them in the same memory. */
static st_tensor *train_state_tensors(train_state *s, size_t *count) {
    float *array[TRAIN_ARRAYS];
    const char *prefix[TRAIN_ARRAYS];
    size_t arrays = train_arrays(s, array, prefix), n = 0;
    const dsv3_balancer *b = &s->trainer.balancer;
    st_tensor *list = (st_tensor *)route_table("state", arrays * s->tensors + 2, 1, 1, sizeof *list + ST_MAX_NAME);
    char(*name)[ST_MAX_NAME] = (char(*)[ST_MAX_NAME])(void *)(list + arrays * s->tensors + 2);
    list[n].name = "loads";
    list[n].dtype = ST_U64;
    list[n].rank = 2;
    list[n].shape[0] = b->layers;
    list[n].shape[1] = b->experts;
    list[n].data = b->load_all;
    list[n++].bytes = b->layers * b->experts * sizeof *b->load_all;
    for (size_t a = 0; a < arrays; a++) {
        for (size_t i = 0; i < s->tensors; i++, n++) {
            const train_tensor *t = &s->tensor[i];
            snprintf(name[n], ST_MAX_NAME, "%s%s", prefix[a], t->name);
            list[n].name = name[n];
            list[n].dtype = ST_F32;
            list[n].rank = t->rank;
            list[n].shape[0] = t->rank == 2 ? t->rows : t->cols;
            if (t->rank == 2) list[n].shape[1] = t->cols;
            list[n].data = array[a] + t->at;
            list[n].bytes = t->rows * t->cols * sizeof(float);
        }
    }
    *count = n;
    return list;
}

/* ---- train: its checksums. A tensor of the state says of each other tensor, in the order of train_state_tensors, what its bytes
 * add up to, and "checksum" of the metadata what all else in it and this tensor do: a bit that is another is found, and
 * where. Files of 0.1 have neither. */

static void train_sums_tensor(st_tensor *t, size_t count) {
    t->name = "checksums";
    t->dtype = ST_U64;
    t->rank = 1;
    t->shape[0] = count;
    t->bytes = count * sizeof(uint64_t);
}

static void train_check_metadata(const st_file *file, const char *path) {
    const st_tensor *sums = st_find(file, "checksums");
    const char *expected = st_metadata(file, "checksum");
    char found[24];
    uint64_t sum = sum_metadata(file);
    if (st_metadata(file, "--steps") == NULL) stop("%s: is no state of a training run: --steps is missing", path);
    if (sums == NULL && expected == NULL) {
        fprintf(stderr, "dsv3: warning: %s: has no checksums, as a version before wrote it: not all damage is noticed\n", path);
        return;
    }
    if (sums == NULL || expected == NULL) stop("%s: is damaged: %s is missing", path, sums == NULL ? "checksums" : "checksum");
    if (sums->dtype != ST_U64) stop("%s: checksums: expected U64, found %.16s", path, sums->type);
    snprintf(found, sizeof found, "%016llx", (unsigned long long)sum_tensor(sum, sums));
    if (strcmp(expected, found) == 0) return;
    stop("%s: is damaged: what it says of the run, or checksums: expected checksum %.40s, found %s", path, expected, found);
}

/* ---- train: the state is read. All is looked at before anything is taken. */

static void train_shape(char *out, size_t capacity, const st_tensor *t) {
    int n = snprintf(out, capacity, "%.16s [", t->type != NULL ? t->type : st_dtype_name(t->dtype));
    for (int i = 0; i < t->rank && n > 0 && (size_t)n < capacity; i++) {
        n += snprintf(out + n, capacity - (size_t)n, "%s%llu", i > 0 ? ", " : "", (unsigned long long)t->shape[i]);
    }
    if (n > 0 && (size_t)n < capacity) snprintf(out + n, capacity - (size_t)n, "]");
}

/* Moments and weights: finite, and means of squares not below 0. */
static void train_check_values(const st_tensor *t, const char *path) {
    int square = strncmp(t->name, "v.", 2) == 0;
    for (size_t i = 0; t->dtype == ST_F32 && i < t->bytes / sizeof(float); i++) {
        float x;
        memcpy(&x, (const char *)t->data + i * sizeof x, sizeof x);
        if (isfinite(x) && !(square && x < 0)) continue;
        stop("%s: %s: element %zu: expected a finite number%s, found %g", path, t->name, i, square ? " of at least 0" : "",
             (double)x);
    }
}

/* Tensor i of those that the run has, as the file has it. */
static const st_tensor *train_check_tensor(const st_file *file, const char *path, const st_tensor *want, size_t i) {
    const st_tensor *t = st_find(file, want->name), *sums = st_find(file, "checksums");
    uint64_t expected, found;
    char shape[2][96];
    if (t == NULL) stop("%s: %s is missing", path, want->name);
    if (t->dtype != want->dtype || t->rank != want->rank || memcmp(t->shape, want->shape, sizeof t->shape) != 0) {
        train_shape(shape[0], sizeof shape[0], want);
        train_shape(shape[1], sizeof shape[1], t);
        stop("%s: %s: expected %s, found %s", path, t->name, shape[0], shape[1]);
    }
    if (sums != NULL && sums != t) {
        memcpy(&expected, (const char *)sums->data + i * sizeof expected, sizeof expected);
        found = sum_tensor(SUM, t);
        if (found != expected) {
            stop("%s: %s is damaged: expected checksum %016llx, found %016llx", path, t->name, (unsigned long long)expected,
                 (unsigned long long)found);
        }
    }
    train_check_values(t, path);
    return t;
}

/* Every tensor there is and no other. list [count]: with where each goes. */
static void train_check_tensors(const st_file *file, const char *path, st_tensor *list, size_t count) {
    st_tensor *sums = &list[count];
    size_t known = count;
    if (st_find(file, "checksums") != NULL) {
        train_sums_tensor(sums, count);
        known++;
        (void)train_check_tensor(file, path, sums, count);
    }
    for (size_t i = 0; i < count; i++) (void)train_check_tensor(file, path, &list[i], i);
    for (size_t i = 0; i < file->count && file->count > known; i++) {
        size_t j = 0;
        while (j < known && strcmp(list[j].name, file->tensor[i].name) != 0) j++;
        if (j == known) stop("%s: %s: expected no such tensor in the state of this run", path, file->tensor[i].name);
    }
}

/* Steps that were counted must agree with each other. */
static void train_check_counts(const st_file *file, const char *path) {
    uint64_t step = train_number(file, path, "step"), trained = train_number(file, path, "trained");
    uint64_t skipped = train_number(file, path, "skipped"), best = 0;
    char *end;
    if (trained > step || step - trained != skipped) {
        stop("%s: trained and skipped: expected together %llu, the steps done, found %llu and %llu", path,
             (unsigned long long)step, (unsigned long long)trained, (unsigned long long)skipped);
    }
    if (st_metadata(file, "best") == NULL || *st_metadata(file, "best") == '\0') return;
    best = train_number(file, path, "best step");
    if (best > step) {
        stop("%s: best step: expected at most %llu, the steps done, found %llu", path, (unsigned long long)step,
             (unsigned long long)best);
    }
    if (!isfinite(strtod(st_metadata(file, "best"), &end)) || *end != '\0') {
        stop("%s: best: expected a finite number, found '%.40s'", path, st_metadata(file, "best"));
    }
    (void)train_number(file, path, "worse");
}

static void train_load_state(train_state *s, const st_file *file, const char *path) {
    float *array[TRAIN_ARRAYS];
    const char *prefix[TRAIN_ARRAYS];
    size_t arrays = train_arrays(s, array, prefix), count;
    st_tensor *list = train_state_tensors(s, &count);
    train_check_counts(file, path);
    train_check_tensors(file, path, list, count);
    if (list[0].bytes > 0) memcpy(s->trainer.balancer.load_all, st_find(file, list[0].name)->data, list[0].bytes);
    for (size_t a = 0, n = 1; a < arrays; a++) {
        for (size_t i = 0; i < s->tensors; i++, n++) {
            memcpy(array[a] + s->tensor[i].at, st_find(file, list[n].name)->data, list[n].bytes);
        }
    }
    free(list);
    s->good = s->saved = s->done = train_number(file, path, "step");
    s->trainer.step = train_number(file, path, "trained");
    s->skipped = train_number(file, path, "skipped");
    s->in_a_row = 0;
    s->best = NOTHING;
    if (st_metadata(file, "best") == NULL || *st_metadata(file, "best") == '\0') return;
    if (st_metadata(file, "validation hash") != NULL && train_number(file, path, "validation hash") != s->val_hash) {
        fprintf(stderr, "dsv3: validation reads another text than before: what was best there is forgotten\n");
        return;
    }
    s->best = strtod(st_metadata(file, "best"), NULL);
    s->best_step = train_number(file, path, "best step");
    s->worse = train_number(file, path, "worse");
}

static void train_save_state(train_state *s) {
    static const char keys[9][16] = {"step",   "trained",   "skipped", "text tokens",    "text hash",
                                     "phases", "best step", "worse",   "validation hash"};
    const uint64_t values[9] = {s->done,   s->trainer.step, s->skipped, s->text.count, s->hash,
                                s->phases, s->best_step,    s->worse,   s->val_hash};
    const char *pairs[2 * (TRAIN_OPTIONS + 13) + 1];
    uint64_t *sums, sum = SUM;
    char numbers[9][24], checksum[24], best[NUMBER] = "", *path = train_path(s, "train.safetensors"), *config = NULL;
    char *value[TRAIN_OPTIONS];
    option table[TRAIN_OPTIONS + 1];
    size_t n = 0, count = 0, stored = 0;
    st_error error;
    st_tensor *list = train_state_tensors(s, &count);
    if (checkpoint_config_text(&config, &s->config, DSV3_F32, &error) != ST_OK) stop("%s", error.message);
    pairs[n++] = "config";
    pairs[n++] = config;
    pairs[n++] = "backend";
    pairs[n++] = s->eval.context.backend;
    if (isfinite(s->best)) number_text(best, s->best);
    pairs[n++] = "best";
    pairs[n++] = best;
    for (int i = 0; i < 9; i++) {
        snprintf(numbers[i], sizeof numbers[i], "%llu", (unsigned long long)values[i]);
        pairs[n++] = keys[i];
        pairs[n++] = numbers[i];
    }
    train_table(table, &s->o);
    for (const option *o = table; o->name != NULL; o++) {
        if (train_role_of(o->name) == TRAIN_CALL) continue;
        value[stored] = train_value(o);
        pairs[n++] = o->name;
        pairs[n++] = value[stored++];
    }
    sums = (uint64_t *)allocate("checksums", count * sizeof *sums);
    for (size_t i = 0; i < count; i++) sums[i] = sum_tensor(SUM, &list[i]);
    for (size_t i = 0; i < n; i += 2) sum = sum_pair(sum, pairs[i], pairs[i + 1]);
    train_sums_tensor(&list[count], count);
    list[count].data = sums;
    snprintf(checksum, sizeof checksum, "%016llx", (unsigned long long)sum_tensor(sum, &list[count]));
    pairs[n++] = "checksum";
    pairs[n++] = checksum;
    pairs[n] = NULL;
    if (st_write(path, list, count + 1, pairs, &error) != ST_OK) stop("%s", error.message);
    free(sums);
    while (stored > 0) free(value[--stored]);
    free(config);
    free(list);
    free(path);
}

/* Returns 0, and why, if it cannot. */
static int train_try_model(const train_state *s, const char *directory, const float *data, st_error *error) {
    train_lookup lookup = {s, data, 0};
    char *text = NULL;
    int good = checkpoint_config_text(&text, &s->config, s->type, error) == ST_OK &&
               checkpoint_config_write(directory, text, error) == ST_OK &&
               checkpoint_save(directory, &s->config, train_find, &lookup, s->type, error) == ST_OK;
    free(text);
    return good;
}

static void train_save_model(const train_state *s, const char *directory, const float *data) {
    st_error error;
    if (!train_try_model(s, directory, data, &error)) stop("%s", error.message);
}

static int train_is_finite(const train_state *s) {
    for (size_t i = 0; i < s->trainer.weights.count; i++) {
        if (!isfinite(s->trainer.weights.data[i])) return 0;
    }
    return 1;
}

/* The weights as a checkpoint in a folder of DIR. */
static void train_save_copy(const train_state *s, const char *folder, const float *data) {
    char *path = train_path(s, folder);
    make_directory("--out", path);
    train_save_model(s, path, data);
    free(path);
}

/* --keep-last: of the folders DIR/step-N those with the largest N stay. Of the others goes what was put there. */
static void train_forget(const train_state *s) {
#ifdef TOOL_POSIX
    places steps = {NULL, 0, 0};
    DIR *list = opendir(s->o.out);
    struct dirent *entry;
    while (list != NULL && (entry = readdir(list)) != NULL) {
        const char *name = entry->d_name;
        size_t digits = strncmp(name, "step-", 5) == 0 ? strspn(name + 5, "0123456789") : 0;
        unsigned long long n = digits > 0 && digits < 19 && name[5 + digits] == '\0' ? strtoull(name + 5, NULL, 10) : 0;
        if (n > 0 && n <= s->done) places_add(&steps, (size_t)n); /* others are of another run */
    }
    if (list != NULL) closedir(list);
    for (size_t i = 0; i < steps.count; i++) {
        size_t later = 0;
        char name[64], *folder, *model, *config;
        for (size_t j = 0; j < steps.count; j++) later += steps.at[j] > steps.at[i];
        if (later < (size_t)s->o.keep_last) continue;
        snprintf(name, sizeof name, "step-%zu", steps.at[i]);
        folder = train_path(s, name);
        model = path_join(folder, "model.safetensors");
        config = path_join(folder, "config.json");
        unlink(model), unlink(config);
        clean_directory(folder, 0);
        rmdir(folder);
        free(folder), free(model), free(config);
    }
    free(steps.at);
#else
    (void)s; /* C alone cannot list a directory: all stay */
#endif
}

/* The state first: it alone is enough to go on, so it does not matter when this is cut short between the files. */
static void train_save(train_state *s) {
#ifdef TOOL_POSIX
    if (s->log.file != NULL) (void)fsync(fileno(s->log.file));
#endif
    s->saved = s->done;
    train_save_state(s);
    train_save_model(s, s->o.out, s->trainer.weights.data);
    if (s->trainer.ema != NULL && s->trainer.step > 0) train_save_copy(s, "ema", s->trainer.ema);
    if (s->o.keep_last > 0 && s->done > 0) {
        char name[64];
        snprintf(name, sizeof name, "step-%llu", (unsigned long long)s->done);
        train_save_copy(s, name, s->trainer.weights.data);
        train_forget(s);
    }
    s->kept = now();
}

/* ---- train: log.csv */

static void train_log_header(const train_state *s, FILE *file) {
    fprintf(file, "step,tokens,lr,loss,main");
    for (size_t k = 1; k <= s->D; k++) fprintf(file, ",mtp%zu", k);
    fprintf(file, ",balance,grad_norm,maxvio,val_main");
    for (size_t k = 1; k <= s->D; k++) fprintf(file, ",val_mtp%zu", k);
    fprintf(file, "%s", s->settings.balance.device > 0 ? ",device" : "");
    fprintf(file, "%s", s->settings.balance.communication > 0 ? ",communication" : "");
    fprintf(file, "\n");
}

static void train_log_reserve(train_log *log) {
    if (log->rows < log->capacity) return;
    log->capacity = log->capacity > 0 ? 2 * log->capacity : 256;
    for (size_t c = 0; c < log->columns; c++) {
        log->column[c] = (double *)realloc(log->column[c], log->capacity * sizeof **log->column);
        if (log->column[c] == NULL) stop("%s: no memory for %zu rows", log->path, log->capacity);
    }
}

/* A line of the file as a row of so many columns; the others were not measured. Returns 0 if it is none. */
static int train_log_parse(train_log *log, const char *line, size_t columns) {
    train_log_reserve(log);
    for (size_t c = columns; c < log->columns; c++) log->column[c][log->rows] = NOTHING;
    for (size_t c = 0; c < columns; c++) {
        const char last_one = c + 1 < columns ? ',' : '\0';
        char *end = NULL;
        double x = *line == last_one ? NOTHING : strtod(line, &end);
        log->column[c][log->rows] = x;
        if (end == line || (end != NULL ? *end : *line) != last_one) return 0;
        line = (end != NULL ? end : line) + 1;
    }
    return 1;
}

typedef struct train_log_text {
    const train_state *s;
    const char *text;
    size_t length;
} train_log_text;

static int train_log_put(FILE *file, const void *what) {
    const train_log_text *t = (const train_log_text *)what;
    train_log_header(t->s, file);
    return fwrite(t->text, 1, t->length, file) == t->length && fflush(file) == 0 && !ferror(file);
}

/* A line of the file as a row. Returns 0 if it is none, else 1 + how many columns it lacks, which a version before did not
 * have. A zero byte is in no row. */
static size_t train_log_row(train_state *s, const char *line, size_t size) {
    train_log *log = &s->log;
    if (strlen(line) != size) return 0;
    if (train_log_parse(log, line, log->columns)) return 1;
    return train_log_parse(log, line, train_device(s)) ? 1 + log->columns - train_device(s) : 0;
}

/* What a file has, line by line, goes to kept [3 length + 1]: rows up to the step of the state, since those behind it are about
 * to be written again; and lines that are no rows, which somebody may have put there, but for the beginning of one at the end
 * of the file. Returns how much that is. */
static size_t train_log_read(train_state *s, char *text, size_t length, char *kept) {
    train_log *log = &s->log;
    size_t n = 0, number = 0, odd = 0, first = 0, row;
    for (char *line = text, *end; line < text + length; line = end + 1) {
        size_t size;
        int torn;
        end = (char *)memchr(line, '\n', (size_t)(text + length - line));
        torn = end == NULL;
        if (torn) end = text + length; /* the text has a zero there */
        *end = '\0';
        size = (size_t)(end - line);
        if (size > 0 && line[size - 1] == '\r') line[--size] = '\0';
        number++;
        if (number == 1 && strstr(line, "step,tokens,") != NULL) continue; /* the header is written anew */
        if (size == 0) continue;
        row = train_log_row(s, line, size);
        if (row > 0 && log->column[TRAIN_STEP][log->rows] > (double)s->done) continue;
        if (row == 0 && torn && line[strspn(line, "0123456789.,e+-")] == '\0') continue;
        if (row == 0 && odd++ == 0) first = number;
        log->rows += row > 0;
        memcpy(kept + n, line, size);
        n += size;
        for (; row > 1; row--) kept[n++] = ',';
        kept[n++] = '\n';
    }
    if (log->rows > 0 ? log->column[TRAIN_STEP][log->rows - 1] < (double)s->done : s->done > 0) {
        fprintf(stderr, "dsv3: warning: %s: expected rows up to step %llu, found them up to %.0f\n", log->path,
                (unsigned long long)s->done, log->rows > 0 ? log->column[TRAIN_STEP][log->rows - 1] : 0);
    }
    if (odd > 0) {
        fprintf(stderr, "dsv3: warning: %s: line %zu%s is no row of this run; it stays, and is in no picture\n", log->path,
                first, odd > 1 ? ", as others behind it," : "");
    }
    return n;
}

/* Begins the file, or goes on with that of the run. */
static void train_log_open(train_state *s) {
    train_log *log = &s->log;
    train_log_text kept = {s, "", 0};
    char *text = NULL, *rows = NULL;
    log->path = train_path(s, "log.csv");
    log->columns = train_columns(s);
    log->column = (double **)route_table("log", log->columns, 1, 1, sizeof *log->column);
    if (s->o.resume && s->done > 0 && !file_exists(s->o.out, "log.csv")) {
        fprintf(stderr, "dsv3: warning: %s: does not exist; it begins anew behind step %llu\n", log->path,
                (unsigned long long)s->done);
    } else if (s->o.resume && file_exists(s->o.out, "log.csv")) {
        size_t length = 0;
        if (output_kind(log->path) == OUTPUT_SPECIAL) stop("%s: not a regular file", log->path); /* a pipe would be waited for */
        text = read_file(log->path, &length);
        text = (char *)realloc(text, length + 1);
        if (text == NULL) stop("%s: no memory for %zu bytes", log->path, length + 1);
        text[length] = '\0';
        rows = (char *)allocate(log->path, 3 * length + 1); /* each line may get two more columns */
        kept.length = train_log_read(s, text, length, rows);
        kept.text = rows;
    }
    output_write(log->path, train_log_put, &kept);
    free(text);
    free(rows);
    log->file = fopen(log->path, "ab");
    if (log->file == NULL) stop("%s: cannot be written: %s", log->path, strerror(errno));
}

/* Returns 0 if it cannot be written. */
static int train_log_add(train_log *log, const double *row) {
    train_log_reserve(log);
    for (size_t c = 0; c < log->columns; c++) {
        log->column[c][log->rows] = row[c];
        if (c > 0) fputc(',', log->file);
        if (isfinite(row[c])) fprintf(log->file, "%.9g", row[c]);
    }
    fputc('\n', log->file);
    log->rows++;
    return fflush(log->file) == 0 && !ferror(log->file);
}

/* ---- train: pictures */

/* A picture is not worth a run: what cannot be written is told once. */
static void train_put(const char *path, int (*put)(FILE *file, const void *what), const void *what) {
    static int told;
    char why[WHY];
    if (output_put(path, put, what, why) || told++ > 0) return;
    progress_leave();
    fprintf(stderr, "dsv3: warning: %s\n", why);
}

static int train_put_lines(FILE *file, const void *what) { return svg_write_lines(file, (const svg_lines *)what); }

/* The named columns as lines over the steps. */
static void train_draw_lines(const train_state *s, const char *name, const char *title, const char *y_name, int log_y,
                             const size_t *column, const char (*names)[24], size_t count) {
    const train_log *log = &s->log;
    svg_series *series = (svg_series *)route_table("picture", count, 1, 1, sizeof *series);
    double *point = (double *)route_table("picture", log->rows + 1, count, 2, sizeof *point), *at = point;
    char *path = train_path(s, name);
    svg_lines chart;
    for (size_t i = 0; i < count; i++) {
        double *x = at, *y = at + log->rows;
        size_t n = 0;
        for (size_t r = 0; r < log->rows; r++) { /* what was not measured leaves no gap */
            if (!isfinite(log->column[column[i]][r])) continue;
            x[n] = log->column[TRAIN_STEP][r];
            y[n++] = log->column[column[i]][r];
        }
        series[i].name = count > 1 ? names[i] : NULL;
        series[i].x = x;
        series[i].y = y;
        series[i].n = n;
        at += 2 * log->rows;
    }
    memset(&chart, 0, sizeof chart);
    chart.title = title;
    chart.x_name = "step";
    chart.y_name = y_name;
    chart.log_y = log_y;
    chart.series = series;
    chart.count = count;
    train_put(path, train_put_lines, &chart);
    free(path);
    free(point);
    free(series);
}

static void train_draw_losses(const train_state *s) {
    size_t count = 2 * (1 + s->D), *column = (size_t *)route_table("picture", count, 1, 1, sizeof *column);
    char(*names)[24] = (char(*)[24])route_table("picture", count, 1, 1, sizeof *names);
    for (size_t k = 0; k <= s->D; k++) {
        column[k] = TRAIN_MAIN + k;
        column[1 + s->D + k] = train_val(s) + k;
        snprintf(names[k], sizeof names[k], k == 0 ? "main" : "MTP %u", (unsigned)k);
        snprintf(names[1 + s->D + k], sizeof names[k], k == 0 ? "validation" : "validation, MTP %u", (unsigned)k);
    }
    train_draw_lines(s, "loss.svg", "Loss", "nats per token", 0, column, (const char(*)[24])names,
                     s->taught < s->text.count ? count : count / 2);
    free(column);
    free(names);
}

/* Balance losses, without their weights, that have one. */
static void train_draw_balance(const train_state *s) {
    static const char all[3][24] = {"experts", "devices", "communication"};
    const double weight[3] = {s->o.alpha, s->o.alpha_device, s->o.alpha_comm};
    const size_t place[3] = {train_balance(s), train_device(s), train_communication(s)};
    char names[3][24];
    size_t column[3], count = 0;
    for (int i = 0; i < 3; i++) {
        if (!(weight[i] > 0)) continue;
        memcpy(names[count], all[i], sizeof all[i]);
        column[count++] = place[i];
    }
    train_draw_lines(s, "balance.svg", "Balance losses, sums over the layers", NULL, 0, column, (const char(*)[24])names, count);
}

/* A map of layers and experts. */
static void train_draw_map(const train_state *s, const char *name, const char *title, const char *value_name,
                           const double *value, double low, double middle, double high) {
    char(*label)[24] = (char(*)[24])route_table("picture", s->moe, 1, 1, sizeof *label), *path = train_path(s, name);
    const char **labels = (const char **)route_table("picture", s->moe, 1, 1, sizeof *labels);
    char subtitle[64];
    svg_heat h;
    for (size_t i = 0; i < s->moe; i++) {
        snprintf(label[i], sizeof label[i], "%d%s", (int)s->layer[i],
                 s->layer[i] >= s->config.num_hidden_layers ? " (MTP)" : "");
        labels[i] = label[i];
    }
    snprintf(subtitle, sizeof subtitle, "step %llu", (unsigned long long)s->done);
    memset(&h, 0, sizeof h);
    h.title = title;
    h.subtitle = subtitle;
    h.row_name = "layer";
    h.column_name = "expert";
    h.value_name = value_name;
    h.value = value;
    h.rows = s->moe;
    h.columns = (size_t)s->config.n_routed_experts;
    h.row_label = labels;
    h.low = low;
    h.middle = middle;
    h.high = high;
    train_put(path, route_write_heat, &h);
    free(path);
    free(label);
    free(labels);
}

static void train_draw_loads(train_state *s) {
    size_t E = (size_t)s->config.n_routed_experts;
    double high = 2;
    for (size_t i = 0; i < s->moe; i++) {
        double sum = 0;
        for (size_t e = 0; e < E; e++) sum += s->load[i * E + e];
        for (size_t e = 0; e < E; e++) {
            double *x = &s->load[i * E + e];
            *x = sum > 0 ? *x * (double)E / sum : NOTHING;
            if (*x > high) high = *x;
        }
    }
    train_draw_map(s, "load.svg", "Load of the experts since the last picture", "load / mean load", s->load, 0, 1,
                   high);
    memset(s->load, 0, s->moe * E * sizeof *s->load);
}

static void train_draw_biases(const train_state *s) {
    size_t E = (size_t)s->config.n_routed_experts;
    double *value = (double *)route_table("picture", s->moe, E, 1, sizeof *value), most = 0.001;
    for (size_t i = 0; i < s->moe; i++) {
        const dsv3_layer *layer = &s->trainer.weights.model.layers[s->layer[i]];
        const float *bias = (const float *)layer->e_score_correction_bias.data;
        for (size_t e = 0; e < E; e++) {
            value[i * E + e] = bias != NULL ? (double)bias[e] : NOTHING;
            if (fabs(value[i * E + e]) > most) most = fabs(value[i * E + e]);
        }
    }
    train_draw_map(s, "bias.svg", "Biases of the routers", "bias", value, -most, 0, most);
    free(value);
}

static void train_draw(train_state *s) {
    const size_t lr = TRAIN_LR, norm = train_norm(s), vio = train_vio(s);
    train_draw_losses(s);
    train_draw_lines(s, "lr.svg", "Learning rate", NULL, 0, &lr, NULL, 1);
    train_draw_lines(s, "grad_norm.svg", "Norm of the gradients, before clipping", NULL, 1, &norm, NULL, 1);
    if (s->moe > 0) {
        if (s->o.alpha > 0 || s->o.alpha_device > 0 || s->o.alpha_comm > 0) train_draw_balance(s);
        train_draw_lines(s, "maxvio.svg", "MaxVio of a step, mean over the layers", "busiest expert / mean load - 1",
                         0, &vio, NULL, 1);
        train_draw_loads(s);
        if (s->config.topk_method == DSV3_NOAUX_TC) train_draw_biases(s);
    }
    s->drawn = now();
}

/* ---- train: the run's beginning */

static int32_t corpus_at(const corpus *c, size_t i) {
    const unsigned char *at = c->data + i * c->width;
    uint16_t two;
    int32_t four;
    if (c->width == 1) return *at;
    memcpy(&two, at, sizeof two);
    if (c->width == 2) return two;
    memcpy(&four, at, sizeof four);
    return four;
}

static uint64_t corpus_hash(const corpus *c, size_t begin, size_t end) {
    uint64_t hash = 0xCBF29CE484222325u; /* FNV-1a */
    for (size_t i = begin; i < end; i++) hash = (hash ^ (uint64_t)corpus_at(c, i)) * 0x100000001B3u;
    return hash;
}

static void corpus_reserve(corpus *c, const char *path, size_t more) {
    if (more > SIZE_MAX / c->width - c->count) stop("%s: is too large", path);
    c->data = (unsigned char *)realloc(c->data, (c->count + more) * c->width + 1);
    if (c->data == NULL) stop("%s: no memory for %zu tokens", path, c->count + more);
}

/* Appends a file. Bytes are their own tokens. advice: what else is said when it cannot be read. */
static void corpus_read(corpus *c, const char *path, size_t V, int ids, const char *advice) {
    size_t length = 0;
    char why[WHY], *text = read_try(path, &length, why);
    tokens t = {NULL, 0, 0};
    if (text == NULL) stop("%s%s", why, advice);
    c->width = V <= 256 ? 1 : V <= 65536 ? 2 : 4;
    tokens_from_text(&t, path, text, ids ? length : 0, V, ids);
    corpus_reserve(c, path, ids ? t.count : length);
    if (!ids) memcpy(c->data + c->count, text, length);
    for (size_t i = 0; i < t.count; i++) {
        uint16_t two = (uint16_t)t.id[i];
        unsigned char *at = c->data + (c->count + i) * c->width;
        if (c->width == 1) *at = (unsigned char)t.id[i];
        if (c->width == 2) memcpy(at, &two, sizeof two);
        if (c->width == 4) memcpy(at, &t.id[i], sizeof t.id[i]);
    }
    c->count += ids ? t.count : length;
    free(t.id);
    free(text);
}

/* The texts of an option, as tokens. */
typedef struct marks {
    tokens *text; /* [count] */
    size_t count;
} marks;

static marks marks_open(const char *name, const texts *t, size_t V, int ids) {
    marks m = {(tokens *)route_table(name, t->count + 1, 1, 1, sizeof(tokens)), t->count};
    for (size_t i = 0; i < t->count; i++) {
        tokens_from_escaped(&m.text[i], name, t->item[i], V, ids);
        if (m.text[i].count == 0) stop("%s: expected a text, found '%s'", name, t->item[i]);
    }
    return m;
}

static void marks_close(marks *m) {
    for (size_t i = 0; i < m->count; i++) free(m->text[i].id);
    free(m->text);
}

/* Does tokens [first, end) of the text end with one of them? */
static int marks_match(const marks *m, const corpus *c, size_t first, size_t end) {
    for (size_t i = 0; i < m->count; i++) {
        const tokens *t = &m->text[i];
        size_t n = 0;
        while (n < t->count && n < end - first && corpus_at(c, end - 1 - n) == t->id[t->count - 1 - n]) n++;
        if (n == t->count) return 1;
    }
    return 0;
}

/* Documents, and where the loss counts, of the file that begins at `from`. */
static void corpus_mark(corpus *c, size_t from, const marks *separator, const marks *loss_from, const marks *loss_to) {
    size_t document = from, behind = from; /* the last mark */
    if (from > 0 && (c->begin.count == 0 || c->begin.at[c->begin.count - 1] < from)) places_add(&c->begin, from);
    if (c->edge.count % 2 == 1) places_add(&c->edge, from);
    for (size_t i = from + 1; i <= c->count; i++) {
        if (marks_match(separator, c, document, i)) {
            if (c->edge.count % 2 == 1) places_add(&c->edge, i);
            if (i < c->count) places_add(&c->begin, i);
            document = behind = i;
        } else if (marks_match(c->edge.count % 2 == 1 ? loss_to : loss_from, c, behind, i)) {
            places_add(&c->edge, i);
            behind = i;
        }
    }
}

static int train_has_documents(const train_options *o) {
    return o->separator.count > 0 || o->apart || o->loss_from.count > 0;
}

static int train_validates(const train_state *s) { return s->val_text.count > 0 || s->taught < s->text.count; }

static void train_read_files(train_state *s, corpus *c, const char *name, const texts *files) {
    const train_options *o = &s->o;
    char advice[96] = "";
    size_t V = (size_t)s->config.vocab_size;
    marks separator = marks_open("--separator", &o->separator, V, o->ids);
    marks loss_from = marks_open("--loss-from", &o->loss_from, V, o->ids);
    marks loss_to = marks_open("--loss-to", &o->loss_to, V, o->ids);
    if (files->replace) { /* as they were restored */
        snprintf(advice, sizeof advice, "; it is %s of the run: if it is elsewhere now, --resume %s PATH says where", name, name);
    }
    for (size_t i = 0; i < files->count; i++) {
        size_t from = c->count;
        corpus_read(c, files->item[i], V, o->ids, advice);
        if (train_has_documents(o)) corpus_mark(c, from, &separator, &loss_from, &loss_to);
    }
    marks_close(&separator);
    marks_close(&loss_from);
    marks_close(&loss_to);
}

/* What validation reads: inputs [begin, end) of *c. Returns 0 if it has nothing to read. */
static int train_val_range(const train_state *s, const corpus **c, size_t *begin, size_t *end) {
    size_t limit = (size_t)s->o.val_tokens;
    *c = s->val_text.count > 0 ? &s->val_text : &s->text;
    *begin = s->val_text.count > 0 ? 0 : s->taught;
    if (*begin >= (*c)->count) return 0;
    *end = (*c)->count - 1;
    if (*end - *begin > limit) *end = *begin + limit;
    return 1;
}

static void train_read_text(train_state *s) {
    const train_options *o = &s->o;
    const corpus *c;
    size_t begin, end;
    train_read_files(s, &s->text, "--text", &o->text);
    train_read_files(s, &s->val_text, "--val-text", &o->val_text);
    s->hash = corpus_hash(&s->text, 0, s->text.count);
    s->taught = (size_t)((double)s->text.count * (1 - o->val / 100)); /* the rest is what score --last P reads */
    s->val_hash = train_val_range(s, &c, &begin, &end) ? corpus_hash(c, begin, end + 1) : 0;
    if (s->taught <= (size_t)o->seq) {
        stop("--text: expected at least %ld tokens before the part for validation, found %zu", o->seq + 1, s->taught);
    }
    if (s->taught < s->text.count && s->text.count - s->taught < 2) s->taught = s->text.count;
    if (o->val_text.count > 0 && s->val_text.count < 2) {
        stop("--val-text: expected at least 2 tokens, found %zu", s->val_text.count);
    }
    if (o->patience > 0 && !train_validates(s)) stop("--patience: expected a text for validation, found none");
    if (o->keep_best && !train_validates(s)) stop("--keep-best: expected a text for validation, found none");
    if (o->loss_from.count > 0 && s->text.edge.count == 0) stop("--loss-from: is nowhere in the text");
    if (o->separator.count > 0 && s->text.begin.count < o->text.count) {
        fprintf(stderr, "dsv3: warning: --separator: is nowhere within the text\n");
    }
}

/* The shortest decimal number that is read back as x. */
static double train_decimal(float x) {
    for (int digits = 1; digits < 9; digits++) {
        char text[32];
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if (!(fabs(strtod(text, NULL) - (double)x) > 0) || (float)strtod(text, NULL) - x == 0) return strtod(text, NULL);
    }
    return (double)x;
}

static int train_has_experts(const dsv3_config *c) {
    int moe = 0;
    for (int32_t i = 0; i < c->num_hidden_layers + c->num_nextn_predict_layers; i++) moe |= dsv3_config_is_moe(c, i);
    return moe;
}

/* Experts on devices, for V2's losses. */
static void train_check_devices(const train_options *o, const train_options *given, long experts) {
    if (o->alpha_device <= 0 && o->alpha_comm <= 0) {
        if (given->devices <= 0 && given->most_devices <= 0) return;
        fprintf(stderr, "dsv3: warning: --%s: has no effect without --alpha-device or --alpha-comm\n",
                given->devices > 0 ? "devices" : "most-devices");
        return;
    }
    if (experts % o->devices != 0) stop("--devices: expected a divisor of the %ld experts, found %ld", experts, o->devices);
    if ((o->alpha_comm > 0 || given->most_devices > 0) && o->most_devices > o->devices) {
        stop("--most-devices: expected 1 to %ld, as many as there are (--devices), found %ld", o->devices, o->most_devices);
    }
    if (o->alpha_comm <= 0 && given->most_devices > 0) {
        fprintf(stderr, "dsv3: warning: --most-devices: has no effect without --alpha-comm\n");
    }
}

/* The balance: what the config says, unless an option does; and what has no effect is said of what was given. */
static void train_resolve_balance(train_options *o, const train_options *given, const dsv3_config *c) {
    int moe = train_has_experts(c), biased = moe && c->topk_method == DSV3_NOAUX_TC;
    char found[NUMBER];
    if (!biased && (given->bias_speed >= 0 || given->bias_freeze >= 0)) {
        fprintf(stderr, "dsv3: warning: --bias-%s: has no effect: %s\n", given->bias_speed >= 0 ? "speed" : "freeze",
                moe ? "routers have a bias with topk_method noaux_tc only" : "the model has no experts");
    }
    if (!moe && (given->alpha > 0 || given->alpha_device > 0 || given->alpha_comm > 0)) {
        fprintf(stderr, "dsv3: warning: --alpha%s: has no effect: the model has no experts\n",
                given->alpha > 0 ? "" : given->alpha_device > 0 ? "-device" : "-comm");
    }
    if (o->alpha < 0) {
        o->alpha = train_decimal(c->aux_loss_alpha);
        number_text(found, o->alpha);
        if (!(o->alpha >= 0 && o->alpha <= 1e6)) stop("aux_loss_alpha: expected 0 to 1000000, found %s", found);
    }
    if (o->bias_speed < 0) o->bias_speed = 0.001;
    if (o->bias_freeze < 0) o->bias_freeze = 14.3 / 14.8;
    if (o->alpha_loads == NULL) o->alpha_loads = c->topk_method == DSV3_NOAUX_TC ? "scores" : "routing";
    if (o->devices == 0) o->devices = c->n_group > 0 ? c->n_group : 1;
    if (o->most_devices == 0) o->most_devices = c->topk_group > 0 ? c->topk_group : 1;
    if (moe) train_check_devices(o, given, c->n_routed_experts);
}

/* What does not depend on the text. The micro-batches: as many sequences as make up to 4096 tokens, of those numbers that
 * divide the batch. */
static void train_resolve(train_options *o, const dsv3_config *c) {
    const train_options given = *o;
    if (o->seq == 0) o->seq = c->max_position_embeddings < 1024 ? c->max_position_embeddings : 1024;
    if (o->lr < 0) o->lr = o->init != NULL ? TRAIN_RATE_TUNED : TRAIN_RATE;
    if (o->val < 0) o->val = o->val_text.count > 0 ? 0 : 5;
    train_resolve_balance(o, &given, c);
    if (o->accum == 0) {
        o->accum = 1;
        while (o->batch % o->accum != 0 || (o->accum < o->batch && o->batch / o->accum > 4096 / o->seq)) o->accum++;
    }
    if (o->seq > c->max_position_embeddings) {
        fprintf(stderr, "dsv3: warning: sequences of %ld tokens, longer than the %ld that the model was made for\n",
                o->seq, (long)c->max_position_embeddings);
    }
}

/* Sequences of an epoch: they lie side by side. */
static size_t train_windows(const train_state *s) { return (s->taught - 1) / (size_t)s->o.seq; }

static void train_resolve_epochs(train_state *s) {
    double steps = ceil((double)s->o.epochs * (double)train_windows(s) / (double)s->o.batch);
    if (steps > 1e9) stop("--epochs: expected at most 1000000000 steps, found %.0f", steps);
    s->o.steps = (long)steps;
}

/* What does. */
static void train_resolve_steps(train_state *s) {
    train_options *o = &s->o;
    if (o->epochs > 0) train_resolve_epochs(s);
    if (o->steps == 0) o->steps = TRAIN_STEPS;
    if (o->warmup < 0) {
        o->warmup = o->steps / 20;
        if (o->init != NULL && o->warmup < TRAIN_WARMUP_TUNED) o->warmup = TRAIN_WARMUP_TUNED;
        if (o->init != NULL && o->warmup > o->steps / 2) o->warmup = o->steps / 2;
    }
    train_check_warmup(o, o->steps);
}

/* The phases over so many steps. Behind them the last rate stays. */
static dsv3_schedule train_schedule(const train_options *o, uint64_t steps) {
    dsv3_schedule s;
    s.peak = o->lr;
    s.low = s.tail = o->lr * o->low;
    s.warmup = s.constant = (uint64_t)o->warmup;
    s.cosine = s.end = steps;
    if (strcmp(o->schedule, "v3") == 0) {
        uint64_t constant = (uint64_t)(o->constant * (double)steps);
        if (constant > s.constant) s.constant = constant;
        s.tail = o->lr * o->tail;
        s.cosine = (uint64_t)(14.3 / 14.8 * (double)steps);
        s.end = (uint64_t)(14.633 / 14.8 * (double)steps);
        if (s.cosine <= s.constant) s.cosine = s.constant + (s.constant < steps); /* it begins at its top */
        if (s.end < s.cosine) s.end = s.cosine;
    }
    return s;
}

/* --resume with other --steps than before: while the rate has not begun to fall, and would not have with the new number
 * either, the phases are laid out anew. Else they stay, and the rate behind them is the last one. */
static void train_extend(train_state *s, uint64_t before) {
    uint64_t steps = (uint64_t)s->o.steps;
    if (steps < s->done) {
        stop("--steps: expected at least %llu, the steps done, found %ld", (unsigned long long)s->done, s->o.steps);
    }
    if (steps == before) return;
    if (s->done <= train_schedule(&s->o, s->phases).constant && s->done <= train_schedule(&s->o, steps).constant) {
        s->phases = steps;
    }
}

static void train_set(train_state *s) {
    const train_options *o = &s->o;
    dsv3_training *t = &s->settings;
    s->accum = (size_t)o->accum;
    s->seq = (size_t)o->seq;
    s->sequences = (size_t)o->batch / s->accum;
    *t = dsv3_training_default();
    if (s->seq > SIZE_MAX / s->sequences) stop("--batch: %zu x %zu tokens are too many", s->sequences, s->seq);
    t->rows = s->sequences * s->seq;
    if (t->rows > DSV3_MAX_SEQ) {
        stop("--batch: expected at most %ld tokens in a micro-batch (--accum), found %zu x %zu", (long)DSV3_MAX_SEQ,
             s->sequences, s->seq);
    }
    t->sequences = s->sequences;
    t->longest = s->seq;
    t->keep = train_keep(o->keep);
    t->ema = o->ema > 0;
    t->ema_decay = o->ema;
    t->lambda = o->lambda;
    t->balance.expert = o->alpha;
    t->balance.actual = strcmp(o->alpha_loads, "routing") == 0;
    t->balance.device = train_has_experts(&s->config) ? o->alpha_device : 0;
    t->balance.communication = train_has_experts(&s->config) ? o->alpha_comm : 0;
    t->balance.devices = (size_t)o->devices;
    t->balance.most_devices = (size_t)o->most_devices;
    s->config.aux_loss_alpha = (float)o->alpha;
    t->weight_decay = (float)o->weight_decay;
    t->clip = (float)o->clip;
    t->frozen = o->freeze.count > 0 ? o->freeze.item : NULL;
    t->exempt = o->exempt.count > 0 ? o->exempt.item : NULL;
    s->schedule = train_schedule(o, s->phases);
}

static void train_set_balancer(train_state *s) {
    dsv3_balancer *b = &s->trainer.balancer;
    uint64_t freeze = (uint64_t)(s->o.bias_freeze * (double)s->phases);
    b->schedule.speed = freeze > 0 ? s->o.bias_speed : 0;
    b->schedule.freeze = freeze < s->phases ? freeze : 0; /* 0: never */
}

static void train_reserve(train_state *s) {
    size_t bytes = 0, n = s->settings.rows, E = (size_t)s->config.n_routed_experts;
    open_context(&s->eval.context, s->o.backend != NULL ? s->o.backend : "auto", s->o.threads);
    stop_result("training", dsv3_trainer_size(&s->config, &s->settings, s->eval.context.threads, &bytes, &stop_error));
    s->trainer_memory = allocate_whole("training", bytes);
    stop_result("training", dsv3_trainer_init(&s->config, &s->trainer, &s->settings, s->eval.context.threads,
                                              s->trainer_memory, bytes, &stop_error));
    train_set_balancer(s);
    train_list_tensors(s);
    s->token = (int32_t *)route_table("batch", n, 1, 1, sizeof *s->token);
    s->target = (int32_t *)route_table("batch", n, 1, 1, sizeof *s->target);
    s->sequence_id = (int32_t *)route_table("batch", n, 1, 1, sizeof *s->sequence_id);
    s->document = (int32_t *)route_table("batch", n, 1, 1, sizeof *s->document);
    for (size_t i = 0; i < n; i++) s->sequence_id[i] = (int32_t)(i / s->seq);
    s->layer = (int32_t *)route_table("layers", s->trainer.balancer.layers, 1, 1, sizeof *s->layer);
    for (size_t i = 0; i < s->trainer.balancer.layers; i++) {
        if (dsv3_config_is_moe(&s->config, (int32_t)i)) s->layer[s->moe++] = (int32_t)i;
    }
    s->load = (double *)route_table("loads", s->moe + 1, E + 1, 1, sizeof *s->load);
}

/* The weights as a model that is evaluated. */
static void train_reserve_evaluation(train_state *s) {
    size_t rows = s->seq < 4 * CHUNK ? s->seq : 4 * CHUNK;
    s->eval.model.model = s->trainer.weights.model;
    s->eval.model.config = s->config;
    s->eval.V = (size_t)s->config.vocab_size;
    session_reserve(&s->eval, s->seq, rows, DSV3_F32);
    s->modules = (dsv3_cache *)route_table("caches", s->D + 1, 1, 1, sizeof *s->modules);
    s->modules_memory = score_modules(&s->eval, s->modules, s->D);
    s->val.depths = s->D;
    s->val.nll = (double *)route_table("losses", s->D + 1, 1, 1, sizeof *s->val.nll);
    s->val.targets = (uint64_t *)route_table("losses", s->D + 1, 1, 1, sizeof *s->val.targets);
}

/* Of a new run: the configuration, and the checkpoint with the weights if there is one. */
static void train_model(train_state *s, checkpoint *from) {
    st_error error;
    if (s->o.init != NULL) {
        if (checkpoint_open(from, s->o.init, &error) != ST_OK) stop("%s", error.message);
        checkpoint_notes(from, s->o.init);
        s->config = from->config;
        if (from->model.n_mtp < s->config.num_nextn_predict_layers) {
            fprintf(stderr, "dsv3: %s has %d of the %d MTP modules that its config.json names; so has the run\n",
                    s->o.init, (int)from->model.n_mtp, (int)s->config.num_nextn_predict_layers);
        }
        from->model.config.num_nextn_predict_layers = s->config.num_nextn_predict_layers = from->model.n_mtp;
    } else if (s->o.config != NULL) {
        if (checkpoint_config(&s->config, s->o.config, &error) != ST_OK) stop("%s", error.message);
    } else if (!plan_preset(&s->config, s->o.preset)) {
        stop("--preset: expected one of " PLAN_NAMES ", found '%s'", s->o.preset);
    }
}

/* NaN and infinity would spread from the first step on. */
static void train_check_weights(const train_state *s, const checkpoint *from) {
    const float *data = s->trainer.weights.data;
    for (size_t i = 0; i < s->tensors; i++) {
        const train_tensor *t = &s->tensor[i];
        for (size_t j = 0; j < t->rows * t->cols; j++) {
            if (isfinite(data[t->at + j])) continue;
            stop("%s%s: %s: element %zu is not finite", s->o.init, from->file.shards == 1 ? "/model.safetensors" : "",
                 t->name, j);
        }
    }
}

static void train_first_weights(train_state *s, checkpoint *from) {
    dsv3_rng rng;
    rng.state = (uint64_t)s->o.seed;
    if (s->o.init != NULL) {
        stop_result(s->o.init, dsv3_parameters_from_model(&s->trainer.weights, &from->model, &stop_error));
        train_check_weights(s, from);
        checkpoint_close(from);
    } else {
        dsv3_parameters_random(&s->trainer.weights, &rng, (float)s->o.std, NULL);
    }
}

static void train_prepare(train_state *s) {
    s->D = (size_t)s->config.num_nextn_predict_layers;
    s->type = parse_type("--type", s->o.type);
    train_check_names(s, "--freeze", &s->o.freeze);
    train_check_names(s, "--exempt", &s->o.exempt);
    train_set(s);
    train_reserve(s);
    train_reserve_evaluation(s);
}

/* The directory of a new run, which is this process's alone from here on. */
static void train_take(const train_state *s) {
    make_directory("--out", s->o.out);
    lock_take(s->o.out);
    if (file_exists(s->o.out, "train.safetensors") || file_exists(s->o.out, "model.safetensors") ||
        file_exists(s->o.out, "model.safetensors.index.json")) {
        stop("%s: holds a checkpoint already; expected another directory, or --resume to go on", s->o.out);
    }
}

static void train_begin(train_state *s) {
    checkpoint from;
    int there;
    memset(&from, 0, sizeof from);
    train_model(s, &from);
    train_resolve(&s->o, &s->config);
    train_read_text(s);
    train_resolve_steps(s);
    s->phases = (uint64_t)s->o.steps;
    s->best = NOTHING;
    train_prepare(s);
    there = file_exists(s->o.out, ".");
    if (there) train_take(s);
    train_first_weights(s, &from);
    if (!there) train_take(s); /* an error before leaves no directory behind */
    train_log_open(s);
    train_save(s); /* there is a checkpoint from the first moment on; and what cannot be written shows up now */
}

/* The backend of the run, unless another is asked for, or it does not run here: then the bits are others. */
static void train_resume_backend(train_state *s, const char *before) {
    dsv3_backend backend;
    dsv3_context context;
    if (before == NULL || s->o.backend != NULL) return;
    if (dsv3_backend_find(&backend, before, NULL) != DSV3_OK || dsv3_context_init(&context, backend, 1, NULL) != DSV3_OK) return;
    s->o.backend = train_keep_string(s, before, strlen(before));
}

static void train_compare_backend(const train_state *s, const char *before) {
    if (before == NULL || strcmp(before, s->eval.context.backend) == 0) return;
    fprintf(stderr, "dsv3: warning: --backend: the run was made with %s and goes on with %s, whose roundings are others\n",
            before, s->eval.context.backend);
}

/* Options and text of the run, and what the command line changes of them. Returns parse's result. */
static int train_resume_options(train_state *s, int argc, char **argv, const command *c, const st_file *file,
                                const char *path, const train_options *given) {
    option table[TRAIN_OPTIONS + 1];
    st_error error;
    const char *config = st_metadata(file, "config");
    uint64_t before;
    long epochs;
    int status;
    train_restore(s, file, path);
    before = (uint64_t)s->o.steps;
    epochs = s->o.epochs;
    train_table(table, &s->o);
    status = parse(argc, argv, c, table, NULL, 0);
    if (status != 0) return status;
    train_compare(s, file);
    if (given->epochs > 0 && epochs == 0) stop("--epochs: the run draws its sequences from anywhere; expected --steps");
    s->done = train_number(file, path, "step");
    if (s->done > before) {
        stop("%s: step: expected at most %llu, its --steps, found %llu", path, (unsigned long long)before,
             (unsigned long long)s->done);
    }
    s->phases = st_metadata(file, "phases") != NULL ? train_number(file, path, "phases") : before; /* of 0.1: none */
    if (s->phases < 1 || s->phases > 1000000000) {
        stop("%s: phases: expected 1 to 1000000000 steps, found %llu", path, (unsigned long long)s->phases);
    }
    if (config == NULL) stop("%s: is no state of a training run: config is missing", path);
    if (checkpoint_config_parse(&s->config, config, strlen(config), path, &error) != ST_OK) stop("%s", error.message);
    train_resolve_balance(&s->o, given, &s->config); /* what a version before did not save */
    train_read_text(s);
    if (given->epochs > 0) train_resolve_epochs(s);
    train_extend(s, before);
    train_check(&s->o);
    return 0;
}

/* Returns parse's result. */
static int train_resume(train_state *s, int argc, char **argv, const command *c, const train_options *given) {
    st_file file;
    st_error error;
    const char *out = given->out;
    char *path;
    uint64_t before;
    int status;
    s->o = train_defaults();
    s->o.out = out;
    path = train_path(s, "train.safetensors");
    if (!file_exists(out, "train.safetensors")) stop("%s: does not exist; there is no run to go on with", path);
    lock_take(out);
    if (st_open(&file, path, &error) != ST_OK) stop("%s", error.message);
    train_check_metadata(&file, path);
    status = train_resume_options(s, argc, argv, c, &file, path, given);
    if (status != 0) return status;
    train_resume_backend(s, st_metadata(&file, "backend"));
    train_prepare(s);
    train_compare_backend(s, st_metadata(&file, "backend"));
    if (s->text.count != train_number(&file, path, "text tokens") ||
        s->hash != train_number(&file, path, "text hash")) {
        stop("--text: expected the text of the run in %s, found another", out);
    }
    train_load_state(s, &file, path);
    before = train_number(&file, path, "--steps");
    if ((uint64_t)s->o.steps != before) {
        fprintf(stderr, "dsv3: the run of %llu steps goes on to step %ld; its phases are those of %llu steps\n",
                (unsigned long long)before, s->o.steps, (unsigned long long)s->phases);
    }
    train_log_open(s);
    st_close(&file);
    free(path);
    return 0;
}

/* ---- train: a step */

/* A permutation of 0 .. n-1: four rounds that mix one half of the bits into the other, again until the result is below n. */
static size_t train_shuffled(uint64_t key, size_t i, size_t n) {
    unsigned half = 1;
    uint64_t left, right, mask;
    while (half < 31 && (uint64_t)1 << 2 * half < n) half++;
    mask = ((uint64_t)1 << half) - 1;
    do {
        left = (uint64_t)i >> half, right = (uint64_t)i & mask;
        for (uint64_t round = 0; round < 4; round++) {
            dsv3_rng rng = {key + round};
            uint64_t mixed;
            rng.state = dsv3_random(&rng) + right;
            mixed = left ^ (dsv3_random(&rng) & mask);
            left = right;
            right = mixed;
        }
        i = (size_t)(left << half | right);
    } while (i >= n);
    return i;
}

/* Where sequence j of a step begins: from the seed and these two alone, so that nothing has to be remembered. Of an epoch
 * the sequences lie side by side, and only where the first one begins is drawn. */
static size_t train_place(const train_state *s, uint64_t step, uint64_t j) {
    dsv3_rng rng;
    rng.state = (uint64_t)s->o.seed;
    if (s->o.epochs > 0) {
        size_t windows = train_windows(s), rest = (s->taught - 1) % s->seq;
        uint64_t index = step * (uint64_t)s->o.batch + j;
        rng.state = dsv3_random(&rng) + index / windows;
        rest = (size_t)(dsv3_random(&rng) % (rest + 1));
        return rest + s->seq * train_shuffled(dsv3_random(&rng), (size_t)(index % windows), windows);
    }
    rng.state = dsv3_random(&rng) + step;
    rng.state = dsv3_random(&rng) + j;
    return (size_t)(dsv3_random(&rng) % (s->taught - s->seq));
}

/* Tokens at .. at+n-1 of a text as rows of the batch. What comes next is the target, but for borders and prompts. */
static void train_fill(train_state *s, const corpus *c, size_t at, size_t n, size_t row) {
    size_t d = places_behind(&c->begin, at), e = places_behind(&c->edge, at);
    int masked = s->o.loss_from.count > 0;
    int32_t document = 0;
    for (size_t next = at + 1; next <= at + n; next++, row++) {
        int border = d < c->begin.count && c->begin.at[d] == next;
        while (e < c->edge.count && c->edge.at[e] == next) e++;
        s->token[row] = corpus_at(c, next - 1);
        s->target[row] = border || (masked && e % 2 == 0) ? DSV3_IGNORE : corpus_at(c, next);
        s->document[row] = document;
        d += (size_t)border;
        document += border;
    }
}

/* The batch's first rows. */
static dsv3_text train_rows(const train_state *s, size_t rows) {
    dsv3_text text;
    memset(&text, 0, sizeof text);
    text.rows = rows;
    text.token = s->token;
    text.target = s->target;
    text.document = train_has_documents(&s->o) ? s->document : NULL;
    text.apart = s->o.apart;
    return text;
}

static dsv3_text train_micro_batch(train_state *s, uint64_t step, size_t micro) {
    dsv3_text text;
    for (size_t i = 0; i < s->sequences; i++) {
        train_fill(s, &s->text, train_place(s, step, micro * s->sequences + i), s->seq, i * s->seq);
    }
    text = train_rows(s, s->settings.rows);
    text.sequence = s->sequence_id;
    return text;
}

/* Adds the step's loads to those of the picture; returns MaxVio, the mean over the layers. */
static double train_loads(train_state *s) {
    size_t E = (size_t)s->config.n_routed_experts;
    double sum = 0;
    for (size_t i = 0; i < s->moe; i++) {
        const uint64_t *load = s->trainer.balancer.load + (size_t)s->layer[i] * E;
        sum += dsv3_load_statistics(load, E).max_vio;
        for (size_t e = 0; e < E; e++) s->load[i * E + e] += (double)load[e];
    }
    return s->moe > 0 ? sum / (double)s->moe : NOTHING;
}

/* Losses of the step into its row. */
static void train_note_losses(train_state *s, double *row) {
    const dsv3_losses *l = &s->trainer.losses;
    double balance = 0, device = 0, communication = 0;
    for (size_t i = 0; i < s->trainer.balancer.layers; i++) {
        balance += l->balance[i] / (double)l->sequences;
        device += l->device[i] / (double)l->sequences;
        communication += l->communication[i] / (double)l->sequences;
    }
    for (size_t k = 0; k <= s->D; k++) {
        if (l->targets[k] > 0) row[TRAIN_MAIN + k] = l->nll[k] / (double)l->targets[k];
    }
    row[TRAIN_LOSS] = dsv3_train_loss(&s->trainer);
    row[train_balance(s)] = balance;
    if (s->settings.balance.device > 0) row[train_device(s)] = device;
    if (s->settings.balance.communication > 0) row[train_communication(s)] = communication;
    row[train_vio(s)] = train_loads(s);
}

/* One step; what it was goes into row. Steps that are not finite change nothing. */
static void train_step(train_state *s, double *row) {
    uint64_t *targets = (uint64_t *)route_table("targets", 1 + s->D, 1, 1, sizeof *targets), sequences = 0;
    dsv3_result result = DSV3_OK;
    dsv3_error error;
    dsv3_text text;
    char message[256];
    for (size_t m = 0; m < s->accum; m++) {
        text = train_micro_batch(s, s->done, m);
        dsv3_text_count(&text, s->D, targets, &sequences, NULL);
    }
    row[TRAIN_LR] = dsv3_learning_rate(&s->schedule, s->done);
    stop_result("training", dsv3_train_begin(&s->trainer, targets, sequences, &stop_error));
    for (size_t m = 0; m < s->accum && result == DSV3_OK; m++) {
        text = train_micro_batch(s, s->done, m);
        result = dsv3_train_accumulate(&s->eval.context, &s->trainer, &text, &error);
    }
    if (result == DSV3_OK) {
        train_note_losses(s, row);
        result = dsv3_train_end(&s->eval.context, &s->trainer, row[TRAIN_LR], &row[train_norm(s)], &error);
    }
    free(targets);
    s->done++;
    s->in_a_row = result == DSV3_OK ? 0 : s->in_a_row + 1;
    if (result == DSV3_OK) s->good = s->done;
    if (result == DSV3_OK) return;
    row[train_norm(s)] = NOTHING;
    s->skipped++;
    dsv3_error_text(&error, message, sizeof message);
    if (result != DSV3_ERR_NAN) stop("step %llu: %s", (unsigned long long)s->done, message);
    progress_leave();
    fprintf(stderr, "dsv3: step %llu changes nothing: %s\n", (unsigned long long)s->done, message);
}

static void train_validate(train_state *s, double *row) {
    const corpus *c;
    size_t begin, end;
    dsv3_error error;
    if (!train_val_range(s, &c, &begin, &end)) return;
    memset(s->val.nll, 0, (1 + s->D) * sizeof *s->val.nll);
    memset(s->val.targets, 0, (1 + s->D) * sizeof *s->val.targets);
    for (size_t at = begin; at < end; at += s->seq) {
        dsv3_text text = train_rows(s, end - at < s->seq ? end - at : s->seq);
        train_fill(s, c, at, text.rows, 0);
        if (dsv3_evaluate(&s->eval.context, &s->val, &s->eval.model.model, &s->eval.cache, s->modules, 1, &text,
                          &s->eval.workspace, &error) != DSV3_OK) {
            return; /* not finite: the steps will tell */
        }
    }
    for (size_t k = 0; k <= s->D; k++) {
        if (s->val.targets[k] > 0) row[train_val(s) + k] = s->val.nll[k] / (double)s->val.targets[k];
    }
}

/* Is it the best so far? What cannot be kept as that is not, and no step is lost for it. */
static void train_judge(train_state *s, double loss) {
    const double best = s->best;
    const uint64_t best_step = s->best_step, worse = s->worse;
    st_error error = {ST_OK, ""};
    char *path;
    if (!isfinite(loss)) return;
    if (isfinite(s->best) && loss >= s->best) {
        s->worse++;
        return;
    }
    s->best = loss;
    s->best_step = s->done;
    s->worse = 0;
    if (!s->o.keep_best || !train_is_finite(s)) return;
    path = train_path(s, "best");
    if (!directory_try(path) || !train_try_model(s, path, s->trainer.weights.data, &error)) {
        s->best = best;
        s->best_step = best_step;
        s->worse = worse;
        train_save(s);
        make_directory("--out", path);
        stop("%s", error.message);
    }
    free(path);
}

static int train_has_patience(const train_state *s) {
    return s->o.patience == 0 || s->worse < (uint64_t)s->o.patience;
}

/* A line of what the model writes by now. */
static void train_sample(const train_state *s) {
    writer_options o = writer_defaults();
    session model = s->eval;
    writer w;
    int32_t first = s->config.bos_token_id >= 0 ? s->config.bos_token_id : corpus_at(&s->text, 0);
    writer_open(&w, &model, &o, s->seq < 161 ? s->seq : 161, 1, NULL);
    stop_result("sample", dsv3_sequence_append(&model.model.model, &w.sequence, &first, 1, &stop_error));
    progress_leave();
    fprintf(stderr, "sample at step %llu: ", (unsigned long long)s->done);
    while (dsv3_sequence_state(&w.sequence) <= DSV3_STATE_WRITING) {
        dsv3_sequence *one = &w.sequence;
        if (dsv3_generate_step(&model.context, w.logits, &model.model.model, &one, 1, &model.workspace, NULL) !=
            DSV3_OK)
            break;
        for (size_t i = 0; i < one->n_token; i++) {
            int32_t id = one->token[i];
            if (s->o.ids) {
                fprintf(stderr, "%ld ", (long)id);
            } else {
                fputc(id < 0x20 || id == 0x7F ? ' ' : (int)id, stderr);
            }
        }
    }
    fprintf(stderr, "\n");
    writer_close(&w);
    free(model.workspace_memory);
}

/* ---- train: the run */

static volatile sig_atomic_t train_interrupted;

static void train_interrupt(int signal_number) {
    (void)signal_number;
    train_interrupted = 1;
}

/* The first Ctrl-C is a request, the second one ends the program. Those who listen may go first (Ctrl-C also ends the
 * tee behind a pipe; a terminal is closed): that is the same request, as often as it comes. */
static void train_catch_interrupts(void) {
#ifdef TOOL_POSIX
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = train_interrupt;
    action.sa_flags = SA_RESTART;
    sigaction(SIGPIPE, &action, NULL);
#ifdef SIGXCPU
    sigaction(SIGXCPU, &action, NULL); /* ulimit -t */
#endif
    if (sigaction(SIGHUP, NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, NULL);
#ifdef SA_RESETHAND
    action.sa_flags |= (int)SA_RESETHAND;
#endif
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
#else
    signal(SIGINT, train_interrupt);
#endif
}

static void train_print_losses(char *out, size_t capacity, const double *loss, size_t count, int digits) {
    size_t n = 0;
    out[0] = '\0';
    for (size_t k = 0; k < count && n < capacity; k++) {
        n += (size_t)(isfinite(loss[k]) ? snprintf(out + n, capacity - n, " %.*f", digits, loss[k])
                                        : snprintf(out + n, capacity - n, " -")); /* not measured */
    }
}

#define TRAIN_LINE 1024

/* The line of a step. What matters least goes first: cut 1 leaves out norm and rate, 2 MaxVio, 3 digits of losses. */
static void train_line(const train_state *s, char line[TRAIN_LINE], const double *row, int measured, int cut) {
    double spent = s->shown - s->begin, steps = (double)(s->done - s->began_at), left;
    char losses[256], val[272] = "", norm[32] = "", lr[32] = "", vio[32] = "";
    train_print_losses(losses, sizeof losses, row + TRAIN_MAIN, 1 + s->D, cut < 3 ? 4 : 2);
    if (measured) {
        int n = snprintf(val, sizeof val, "  validation");
        train_print_losses(val + n, sizeof val - (size_t)n, row + train_val(s), 1 + s->D, 4);
    }
    if (cut < 1 && isfinite(row[train_norm(s)])) snprintf(norm, sizeof norm, "  norm %.3g", row[train_norm(s)]);
    if (cut < 1) snprintf(lr, sizeof lr, "  lr %.3g", row[TRAIN_LR]);
    if (cut < 2 && isfinite(row[train_vio(s)])) snprintf(vio, sizeof vio, "  MaxVio %.2f", row[train_vio(s)]);
    left = spent / steps * ((double)s->o.steps - (double)s->done);
    snprintf(line, TRAIN_LINE, "step %llu/%ld  loss%s%s%s%s%s  %.0f tokens/s  %.0f:%02.0f:%02.0f left",
             (unsigned long long)s->done, s->o.steps, losses, val, norm, lr, vio,
             steps * (double)(s->accum * s->settings.rows) / spent, floor(left / 3600), floor(fmod(left / 60, 60)),
             floor(fmod(left, 60)));
}

/* One line: rewritten on a terminal, and never wider than it unless it stays; else now and then. */
static void train_show(train_state *s, const double *row, int measured) {
    double t = now();
    int terminal = is_terminal(stderr), last = s->done == (uint64_t)s->o.steps || train_interrupted;
    int stays = measured || last || !terminal, width;
    char line[TRAIN_LINE];
    if (!last && !measured && s->done > s->began_at + 1 && t - s->shown < (terminal ? 0.2 : 10)) return;
    s->shown = t;
    train_line(s, line, row, measured, 0);
    if (!terminal) {
        fprintf(stderr, "%s\n", line);
        return;
    }
    width = (int)terminal_width(stderr) - 1;
    for (int cut = 1; cut <= 3 && !stays && strlen(line) > (size_t)width; cut++) {
        train_line(s, line, row, measured, cut);
    }
    fprintf(stderr, "\r%-*.*s%s", width, stays ? TRAIN_LINE : width, line, stays ? "\n" : "");
    progress_stands = !stays;
}

static int train_due(uint64_t step, long every) { return every > 0 && step % (uint64_t)every == 0; }

/* One more step, and all that is due behind it. A state whose last step was skipped is not saved: if the weights are
 * to blame, what was saved before is better. */
static void train_once(train_state *s, double *row) {
    int measure, due;
    for (size_t c = 0; c < s->log.columns; c++) row[c] = NOTHING;
    train_step(s, row);
    row[TRAIN_STEP] = (double)s->done;
    row[TRAIN_TOKENS] = (double)s->done * (double)s->o.batch * (double)s->seq;
    measure = train_validates(s) && (train_due(s->done, s->o.val_every) || s->done == (uint64_t)s->o.steps);
    if (measure) {
        train_validate(s, row);
        train_judge(s, row[train_val(s)]);
    }
    if (!train_log_add(&s->log, row)) {
        const char *why = strerror(errno);
        if (train_is_finite(s)) train_save(s);
        stop("%s: cannot be written: %s; the run is saved up to step %llu", s->log.path, why, (unsigned long long)s->saved);
    }
    train_show(s, row, measure && isfinite(row[train_val(s)]));
    if (train_due(s->done, s->o.sample_every)) train_sample(s);
    due = train_due(s->done, s->o.save_every) || (s->o.save_minutes > 0 && now() - s->kept >= 60 * s->o.save_minutes);
    if (due && s->in_a_row == 0) s->broken = !train_is_finite(s);
    if (due && s->in_a_row == 0 && !s->broken) train_save(s);
    if (now() - s->drawn > 10) train_draw(s);
}

/* The training has diverged. The last step made weights of which nothing good comes; those before it led to finite gradients.
 * They are made once more, from what was saved, and saved. Then it ends. */
static void train_give_up(train_state *s, double *row) {
    uint64_t skipped = s->in_a_row, saved = s->saved, end = s->good > 0 ? s->good - 1 : 0;
    char *path = train_path(s, "train.safetensors");
    st_file file;
    st_error error;
    if (end > saved && st_open(&file, path, &error) == ST_OK) {
        progress_leave();
        fprintf(stderr, "dsv3: the training has diverged; going back to step %llu\n", (unsigned long long)end);
        train_load_state(s, &file, path);
        st_close(&file);
        s->begin = s->shown = now();
        s->began_at = s->done;
        while (s->done < end && !train_interrupted) {
            train_step(s, row);
            train_show(s, row, 0);
        }
        progress_leave();
        if (s->done == end && train_is_finite(s)) train_save(s);
    }
    stop("the last %llu steps changed nothing, the training has diverged: they are not saved; what was saved before stays in "
         "%s: step %llu. --resume would go the same way; --init with it and a lower --lr, or --clip, may not",
         (unsigned long long)skipped, s->o.out, (unsigned long long)s->saved);
}

static void train_report(const train_state *s, uint64_t steps) {
    if (s->in_a_row > 0) {
        fprintf(stderr, "dsv3: warning: the last %llu steps changed nothing: the model is that of step %llu\n",
                (unsigned long long)s->in_a_row, (unsigned long long)s->good);
    }
    if (s->skipped > 0) fprintf(stderr, "dsv3: %llu steps changed nothing\n", (unsigned long long)s->skipped);
    if (!train_has_patience(s)) {
        fprintf(stderr, "dsv3: the run in %s has ended at step %llu: %llu validations were no better than %.4f at step %llu; "
                "go on with: dsv3 train --resume --patience 0 --out %s\n",
                s->o.out, (unsigned long long)s->done, (unsigned long long)s->worse, s->best,
                (unsigned long long)s->best_step, s->o.out);
    } else if (s->done == s->began_at && s->done == steps) {
        fprintf(stderr, "dsv3: the run in %s is complete: step %llu of %ld; --steps with more goes on\n", s->o.out,
                (unsigned long long)s->done, s->o.steps);
    } else if (s->done < steps) {
        fprintf(stderr, "dsv3: stopped and saved after step %llu; go on with: dsv3 train --resume --out %s\n",
                (unsigned long long)s->done, s->o.out);
    }
}

static void train_run(train_state *s) {
    double *row = (double *)route_table("log", s->log.columns, 1, 1, sizeof *row);
    uint64_t steps = (uint64_t)s->o.steps;
    train_catch_interrupts();
    s->begin = s->shown = s->drawn = s->kept = now();
    s->began_at = s->done;
    while (s->done < steps && !train_interrupted && s->in_a_row < TRAIN_PATIENCE && !s->broken && train_has_patience(s)) {
        train_once(s, row);
    }
    progress_leave();
    if (s->in_a_row >= TRAIN_PATIENCE || !train_is_finite(s)) {
        if (s->done > s->began_at) train_draw(s);
        train_give_up(s, row);
    }
    free(row);
    if (s->saved != s->done || s->done == s->began_at) train_save(s);
    if (s->done > s->began_at) train_draw(s);
    train_report(s, steps);
}

static void train_free_lists(train_options *o) {
    free(o->text.item), free(o->val_text.item), free(o->separator.item), free(o->loss_from.item), free(o->loss_to.item);
    free(o->freeze.item), free(o->exempt.item);
}

static void corpus_free(corpus *c) { free(c->data), free(c->begin.at), free(c->edge.at); }

static void train_end(train_state *s) {
    for (size_t c = 0; c < s->log.columns; c++) free(s->log.column[c]);
    free(s->log.column);
    free(s->log.path);
    if (s->log.file != NULL && fclose(s->log.file) != 0) stop("log.csv: cannot be written: %s", strerror(errno));
    for (size_t i = 0; i < s->strings; i++) free(s->string[i]);
    free(s->string);
    train_free_lists(&s->o);
    corpus_free(&s->text);
    corpus_free(&s->val_text);
    free(s->document);
    free(s->trainer_memory);
    free(s->tensor);
    free(s->token);
    free(s->target);
    free(s->sequence_id);
    close_context(&s->eval.context);
    free(s->eval.cache_memory);
    free(s->eval.workspace_memory);
    free(s->modules);
    free(s->modules_memory);
    free(s->val.nll);
    free(s->val.targets);
    free(s->layer);
    free(s->load);
}

static int train(int argc, char **argv, const command *c) {
    option table[TRAIN_OPTIONS + 1];
    train_options first;
    train_state s;
    int status;
    memset(&s, 0, sizeof s);
    s.o = train_defaults();
    train_table(table, &s.o);
    status = parse(argc, argv, c, table, NULL, 0);
    if (status == 0 && train_misuse(&s.o) != NULL) status = 1 + usage(c, train_misuse(&s.o), "");
    if (status != 0) {
        train_free_lists(&s.o);
        return status - 1;
    }
    train_check(&s.o);
    first = s.o;
    if (first.resume) {
        status = train_resume(&s, argc, argv, c, &first);
        if (status != 0) return status - 1;
        train_free_lists(&first);
    } else {
        train_begin(&s);
    }
    train_run(&s);
    train_end(&s);
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
                                "  convert DIR OUT         the same checkpoint in another type\n"
                                "  train                   a checkpoint from text\n"
                                "dsv3 COMMAND --help lists the options of a command; dsv3 --version says which.\n";

int main(int argc, char **argv) {
    const command commands[] = {{"generate", generate_help, generate, {"DIR", NULL}, NULL},
                                {"chat", chat_help, chat, {"DIR", NULL}, NULL},
                                {"score", score_help, score, {"DIR", "FILE"}, NULL},
                                {"route", route_help, route, {"DIR", "FILE"}, NULL},
                                {"plan", plan_help, plan, {"DIR, CONFIG.json or NAME", NULL}, NULL},
                                {"inspect", inspect_help, inspect, {"DIR or FILE.safetensors", NULL}, NULL},
                                {"convert", convert_help, convert, {"DIR", "OUT"}, NULL},
                                {"train", train_help, train, {NULL, NULL}, train_help_more}};
    const char *nearest = NULL;
    size_t least = 9;
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow is an error like a full disk */
#endif
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
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        size_t far = spelling_far(argv[1], strlen(argv[1]), commands[i].name);
        if (far < least) least = far, nearest = commands[i].name;
    }
    fprintf(stderr, "dsv3: unknown command %s%s%s%s\n%s", argv[1], nearest != NULL ? "; did you mean " : "",
            nearest != NULL ? nearest : "", nearest != NULL ? "?" : "", main_help);
    return 2;
}
