/* bench.h -- what the benchmarks of dsv3.h share: options, a clock, a median, the machine's limits (read bandwidth,
 * multiply-adds of its best instructions), peak memory, and a synthetic model. POSIX. Include it before anything else,
 * then dsv3.h with DSV3_IMPLEMENTATION:
 *
 *     #define BENCH_NAME "bench_model"
 *     #include "bench.h"
 *     #define DSV3_IMPLEMENTATION
 *     #include "dsv3.h"
 */
#ifndef BENCH_H
#define BENCH_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* the affinity mask, for thread_pool.h */
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* clock_gettime, posix_memalign, isatty */
#endif
#if defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1 /* ru_maxrss */
#endif

#define DSV3_SIMD
#include "dsv3.h"
#define THREADS_IMPLEMENTATION
#include "../examples/thread_pool.h"
#include "../examples/large_pages.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#ifndef BENCH_NAME
#define BENCH_NAME "bench" /* the program's, for messages */
#endif

/* ---- Failing: one line, exit 1 */

static inline void bench_die(const char *what, const char *why) {
    fprintf(stderr, BENCH_NAME ": %s: %s\n", what, why);
    exit(1);
}

static inline void bench_check(dsv3_result result, const char *what) {
    if (result != DSV3_OK) bench_die(what, dsv3_result_string(result));
}

/* For calls that say more than a code. */
static inline void bench_check_error(dsv3_result result, const char *what, const dsv3_error *error) {
    char text[512];
    if (result != DSV3_OK) bench_die(what, dsv3_error_text(error, text, sizeof text));
}

/* ---- Options: what is wrong with them ends the program with status 2 */

static inline void bench_usage(const char *option, const char *value, const char *expected) {
    fprintf(stderr, BENCH_NAME ": %s: found '%s', expected %s (--help)\n", option, value, expected);
    exit(2);
}

static inline size_t bench_number(const char *option, const char *value, long low, long high) {
    char *end, expected[64];
    long number = strtol(value, &end, 10);
    if (end == value || *end != '\0' || number < low || number > high) {
        snprintf(expected, sizeof expected, "a number %ld .. %ld", low, high);
        bench_usage(option, value, expected);
    }
    return (size_t)number;
}

/* Index of value among the names, which a NULL ends; that of the NULL if it is none of them. */
static inline size_t bench_index(const char *value, const char *const *names) {
    size_t i = 0;
    while (names[i] != NULL && strcmp(names[i], value) != 0) i++;
    return i;
}

static inline size_t bench_choice(const char *option, const char *value, const char *const *names,
                                  const char *expected) {
    size_t i = bench_index(value, names);
    if (names[i] == NULL) bench_usage(option, value, expected);
    return i;
}

static inline dsv3_type bench_type(const char *option, const char *value) {
    for (int t = 0; t < DSV3_TYPES; t++) {
        if (strcmp(value, dsv3_type_name((dsv3_type)t)) == 0) return (dsv3_type)t;
    }
    bench_usage(option, value, "F32, F16, BF16, F8_E4M3, Q8_0 or Q4_0");
    return DSV3_F32;
}

static const char *const bench_mode_names[] = {"exact", "fast", NULL}; /* by dsv3_compute */

static inline dsv3_compute bench_mode(const char *option, const char *value) {
    return bench_choice(option, value, bench_mode_names, "exact or fast") == 0 ? DSV3_EXACT : DSV3_FAST;
}

/* Numbers with commas between them, at most `most`, into list. Returns how many. */
static inline size_t bench_numbers(size_t *list, size_t most, const char *option, const char *value, long low,
                                   long high) {
    size_t n = 0;
    for (const char *at = value; n < most; at++) {
        char number[32];
        size_t length = strcspn(at, ",");
        if (length >= sizeof number) length = sizeof number - 1;
        memcpy(number, at, length);
        number[length] = '\0';
        list[n++] = bench_number(option, number, low, high);
        at += length;
        if (*at == '\0') return n;
    }
    bench_usage(option, value, "fewer numbers");
    return n;
}

/* Takes an option's value; that of a flag is NULL. */
typedef void (*bench_pair)(void *options, const char *option, const char *value);

/* pairs: the options that have a value, ended by a NULL; flags: those that have none, likewise, or NULL. Beside
 * them: --help, and --line, which sets *line. */
static inline void bench_parse_flags(void *options, const char *const *pairs, const char *const *flags,
                                     bench_pair pair, int *line, const char *help, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(help, stdout);
            exit(fflush(stdout) != 0 || ferror(stdout));
        }
        if (strcmp(argv[i], "--line") == 0) {
            *line = 1;
            continue;
        }
        if (flags != NULL && flags[bench_index(argv[i], flags)] != NULL) {
            pair(options, argv[i], NULL);
            continue;
        }
        if (pairs[bench_index(argv[i], pairs)] == NULL) {
            fprintf(stderr, BENCH_NAME ": unknown option '%s' (--help)\n", argv[i]);
            exit(2);
        }
        if (i + 1 == argc) bench_usage(argv[i], "nothing", "a value");
        pair(options, argv[i], argv[i + 1]);
        i++;
    }
}

static inline void bench_parse(void *options, const char *const *pairs, bench_pair pair, int *line, const char *help,
                               int argc, char **argv) {
    bench_parse_flags(options, pairs, NULL, pair, line, help, argc, argv);
}

/* ---- Shapes of synthetic models */

static inline dsv3_config bench_config_1b(void) {
    dsv3_config c = dsv3_config_default();
    c.vocab_size = 16384;
    c.hidden_size = 1024;
    c.intermediate_size = 4096;
    c.moe_intermediate_size = 512;
    c.num_hidden_layers = 10;
    c.first_k_dense_replace = 1;
    c.num_attention_heads = 16;
    c.num_key_value_heads = 16;
    c.q_lora_rank = 768;
    c.kv_lora_rank = 512;
    c.qk_nope_head_dim = 128;
    c.qk_rope_head_dim = 64;
    c.v_head_dim = 128;
    c.n_routed_experts = 64;
    c.n_shared_experts = 1;
    c.num_experts_per_tok = 8;
    c.n_group = 8;
    c.topk_group = 4;
    c.routed_scaling_factor = 2.5f;
    c.max_position_embeddings = 4096;
    return c;
}

/* The configuration of a shape; *shape becomes its name. */
static inline dsv3_config bench_shape(const char *option, const char *value, const char **shape) {
    static const char *const names[] = {"bench-1b", "austen", "micro", NULL};
    size_t i = bench_choice(option, value, names, "bench-1b, austen or micro");
    *shape = names[i];
    return i == 0   ? bench_config_1b()
           : i == 1 ? dsv3_config_preset(DSV3_PRESET_AUSTEN)
                    : dsv3_config_preset(DSV3_PRESET_MICRO);
}

/* ---- Memory, from the start of a cache line on, and all of it on large pages where there are any: the limits that are
 * measured, too. free() takes it back */

#define BENCH_ALIGN 64 /* bytes; no less than DSV3_ALIGN */

static inline void *bench_alloc(size_t bytes) {
    void *memory = large_pages_alloc(bytes);
    if (memory == NULL) {
        fprintf(stderr, BENCH_NAME ": out of memory (%.1f MiB asked for)\n", (double)bytes / 1048576.0);
        exit(1);
    }
    return memory;
}

/* The most memory the process has had so far, in bytes; 0 if the system does not say. */
static inline double bench_peak_bytes(void) {
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0.0;
#ifdef __APPLE__
    return (double)usage.ru_maxrss;
#else
    return (double)usage.ru_maxrss * 1024.0;
#endif
}

/* What the system could give away now, in bytes; 0 if it does not say. */
static inline double bench_available_bytes(void) {
    FILE *file = fopen("/proc/meminfo", "r");
    char line[256];
    double bytes = 0.0;
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, "MemAvailable:", 13) == 0) bytes = 1024.0 * strtod(line + 13, NULL);
    }
    if (file != NULL) fclose(file);
    return bytes;
}

/* ---- Time */

/* Seconds since some moment, never set back. */
static inline double bench_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct bench_stat {
    double median, min, max;
} bench_stat;

/* Sorts v [n], n >= 1. */
static inline bench_stat bench_summary(double *v, size_t n) {
    bench_stat s;
    for (size_t i = 1; i < n; i++) {
        double x = v[i];
        size_t j = i;
        for (; j > 0 && v[j - 1] > x; j--) v[j] = v[j - 1];
        v[j] = x;
    }
    s.median = n % 2 == 1 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
    s.min = v[0];
    s.max = v[n - 1];
    return s;
}

/* ---- Names of things */

/* The processor's name as the system tells it, into text [capacity]. */
static inline const char *bench_cpu(char *text, size_t capacity) {
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[512];
    snprintf(text, capacity, "unknown");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || value == NULL) continue;
        value += 1 + strspn(value + 1, " \t");
        value[strcspn(value, "\n")] = '\0';
        snprintf(text, capacity, "%s", value);
        break;
    }
    if (file != NULL) fclose(file);
    return text;
}

static inline const char *bench_compiler(void) {
#if defined(__clang__)
    return __VERSION__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

static inline const char *bench_build(void) {
#if defined(__GNUC__) && !defined(__OPTIMIZE__)
    return " (built WITHOUT optimisation)";
#else
    return "";
#endif
}

/* Two lines: where and with what this was measured. */
static inline void bench_print_machine(const dsv3_context *context) {
    char cpu[256];
    printf("machine  %s, %zu of %zu cores\n", bench_cpu(cpu, sizeof cpu), context->threads, threads_cores());
    printf("compiler %s%s\n", bench_compiler(), bench_build());
}

/* Kernels, and threads (0: one for each core this process may use). They are those of the context before, unless it had
 * another number of them: then that one can no longer be used. */
static inline void bench_context(dsv3_context *context, dsv3_backend backend, size_t threads) {
    static threads_pool *pool;
    static size_t asked;
    bench_check(dsv3_context_init(context, backend, 1, NULL), "dsv3_context_init");
    if (threads == 0) threads = threads_cores();
    if (asked != threads) {
        threads_destroy(pool);
        pool = threads_create(asked = threads);
        if (pool == NULL) bench_die("threads", "out of memory");
    }
    context->parallel_for = threads_for;
    context->parallel_user = pool;
    context->threads = threads_count(pool);
    if (threads > context->threads) {
        fprintf(stderr, BENCH_NAME ": the system gives %zu threads, not %zu\n", context->threads, threads);
    }
}

#define BENCH_BACKENDS DSV3_BACKENDS

/* The backends compiled in that this machine can run, or only the one called `name` if that is not NULL ("auto": the
 * best one): list [BENCH_BACKENDS]. Returns how many. */
static inline size_t bench_backends(dsv3_backend *list, const char *name) {
    dsv3_context best;
    size_t n = 0;
    bench_check(dsv3_context_init(&best, DSV3_BACKEND_AUTO, 1, NULL), "dsv3_context_init");
    if (name != NULL && strcmp(name, dsv3_backend_name(DSV3_BACKEND_AUTO)) == 0) name = best.backend;
    for (int b = DSV3_BACKEND_AUTO + 1; b < BENCH_BACKENDS; b++) {
        dsv3_context context;
        if (dsv3_context_init(&context, (dsv3_backend)b, 1, NULL) != DSV3_OK) continue;
        if (name == NULL || strcmp(name, context.backend) == 0) list[n++] = (dsv3_backend)b;
    }
    return n;
}

/* The value of --backend: one that is compiled in and runs here. */
static inline dsv3_backend bench_backend(const char *option, const char *value) {
    dsv3_backend list[BENCH_BACKENDS];
    if (bench_backends(list, value) == 0) {
        bench_usage(option, value, "one that is compiled in and runs here, as \"reference\"");
    }
    return list[0];
}

/* ---- Parallel loops: those of the library, so that the benchmark runs on the very threads it measures */

static inline void bench_parallel(const dsv3_context *context, size_t n, dsv3_task task, void *arg) {
    if (context->parallel_for == NULL || context->threads < 2) {
        task(arg, 0, n, 0);
    } else {
        context->parallel_for(context->parallel_user, context->threads, n, task, arg);
    }
}

/* ---- Read bandwidth: the sum of a buffer much larger than any cache */

#ifndef BENCH_READ_BYTES
#define BENCH_READ_BYTES ((size_t)512 << 20)
#endif
#define BENCH_READ_BLOCK 131072u /* words of one item of the loop: 1 MiB */

typedef struct bench_reader {
    uint64_t *words; /* [blocks, BENCH_READ_BLOCK], all 1 */
    uint64_t *sums;  /* [blocks] */
    size_t blocks;
} bench_reader;

static inline void bench_reader_fill(void *arg, size_t begin, size_t end, size_t worker) {
    bench_reader *r = (bench_reader *)arg;
    (void)worker;
    for (size_t i = begin * BENCH_READ_BLOCK; i < end * BENCH_READ_BLOCK; i++) r->words[i] = 1;
}

/* Four streams, because one core has more reads under way in several places than in one; they are long, because
 * whatever fetches ahead begins anew with each. */
#define BENCH_READER(name, attributes, SUM)                                                                          \
    attributes static inline void name(void *arg, size_t begin, size_t end, size_t worker) {                         \
        bench_reader *r = (bench_reader *)arg;                                                                       \
        (void)worker;                                                                                                \
        for (size_t b = begin; b < end; b++) {                                                                       \
            const uint64_t *w = r->words + b * BENCH_READ_BLOCK;                                                     \
            const size_t q = BENCH_READ_BLOCK / 4;                                                                   \
            SUM                                                                                                      \
        }                                                                                                            \
    }

#define BENCH_SUM_PLAIN                                                                                              \
    uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                                         \
    for (size_t i = 0; i < q; i++) s0 += w[i], s1 += w[i + q], s2 += w[i + 2 * q], s3 += w[i + 3 * q];               \
    r->sums[b] = (s0 + s1) + (s2 + s3);

BENCH_READER(bench_reader_plain, , BENCH_SUM_PLAIN)

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
/* `words` at a time, each line asked for AHEAD words before it is needed if AHEAD is not 0. */
#define BENCH_SUM_SIMD(vector, words, ZERO, ADD, LOAD, AHEAD)                                                        \
    vector s0 = ZERO(), s1 = s0, s2 = s0, s3 = s0;                                                                   \
    uint64_t lanes[words], sum = 0;                                                                                  \
    for (size_t i = 0; i < q; i += (words)) {                                                                        \
        if ((AHEAD) > 0 && i + (AHEAD) < q && i % 8 == 0) {                                                          \
            __builtin_prefetch(w + i + (AHEAD)), __builtin_prefetch(w + i + q + (AHEAD));                            \
            __builtin_prefetch(w + i + 2 * q + (AHEAD)), __builtin_prefetch(w + i + 3 * q + (AHEAD));                \
        }                                                                                                            \
        s0 = ADD(s0, LOAD((const void *)(w + i))), s1 = ADD(s1, LOAD((const void *)(w + i + q)));                    \
        s2 = ADD(s2, LOAD((const void *)(w + i + 2 * q))), s3 = ADD(s3, LOAD((const void *)(w + i + 3 * q)));        \
    }                                                                                                                \
    s0 = ADD(ADD(s0, s1), ADD(s2, s3));                                                                              \
    memcpy(lanes, &s0, sizeof lanes);                                                                                \
    for (size_t i = 0; i < (words); i++) sum += lanes[i];                                                            \
    r->sums[b] = sum;

#define BENCH_LOAD_256(p) _mm256_load_si256((const __m256i *)(p))
#define BENCH_SUM_256(AHEAD) BENCH_SUM_SIMD(__m256i, 4, _mm256_setzero_si256, _mm256_add_epi64, BENCH_LOAD_256, AHEAD)
#define BENCH_SUM_512(AHEAD)                                                                                         \
    BENCH_SUM_SIMD(__m512i, 8, _mm512_setzero_si512, _mm512_add_epi64, _mm512_load_si512, AHEAD)
BENCH_READER(bench_reader_256, __attribute__((target("avx2"))), BENCH_SUM_256(0u))
BENCH_READER(bench_reader_256_ahead, __attribute__((target("avx2"))), BENCH_SUM_256(128u))
BENCH_READER(bench_reader_512, __attribute__((target("avx512f"))), BENCH_SUM_512(0u))
BENCH_READER(bench_reader_512_ahead, __attribute__((target("avx512f"))), BENCH_SUM_512(128u))
#endif

static inline void bench_reader_init(bench_reader *r, const dsv3_context *context) {
    r->blocks = BENCH_READ_BYTES / (BENCH_READ_BLOCK * sizeof(uint64_t));
    r->words = (uint64_t *)bench_alloc(r->blocks * BENCH_READ_BLOCK * sizeof(uint64_t));
    r->sums = (uint64_t *)bench_alloc(r->blocks * sizeof(uint64_t));
    bench_parallel(context, r->blocks, bench_reader_fill, r); /* pages belong to whom they will serve */
}

static inline void bench_reader_free(bench_reader *r) {
    free(r->words);
    free(r->sums);
}

static inline double bench_reader_pass(bench_reader *r, const dsv3_context *context, dsv3_task task) {
    double begin = bench_now(), seconds;
    uint64_t sum = 0;
    bench_parallel(context, r->blocks, task, r);
    seconds = bench_now() - begin;
    for (size_t b = 0; b < r->blocks; b++) sum += r->sums[b];
    if (sum != (uint64_t)r->blocks * BENCH_READ_BLOCK) bench_die("read bandwidth", "the sum is wrong");
    return seconds > 0.0 ? (double)BENCH_READ_BYTES / seconds : 0.0;
}

/* Bytes per second of the best of `passes` passes with the context's threads, each with every loop that this machine
 * can run: none is the best on all. */
static inline double bench_read_bandwidth(bench_reader *r, const dsv3_context *context, size_t passes) {
    dsv3_task tasks[5] = {bench_reader_plain};
    size_t n = 1;
    double best = 0.0;
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        tasks[n++] = bench_reader_256;
        tasks[n++] = bench_reader_256_ahead;
    }
    if (__builtin_cpu_supports("avx512f")) {
        tasks[n++] = bench_reader_512;
        tasks[n++] = bench_reader_512_ahead;
    }
#endif
    for (size_t i = 0; i < passes * n; i++) {
        double speed = bench_reader_pass(r, context, tasks[i % n]);
        if (speed > best) best = speed;
    }
    return best;
}

/* ---- Synthetic model: every tensor a configuration calls for, each in memory of its own, with random codes */

typedef struct bench_tensor {
    dsv3_tensor_info info;
    dsv3_tensor tensor;
    size_t bytes, scale_bytes; /* exact */
    size_t at, scale_at;       /* where in the arena */
} bench_tensor;

typedef struct bench_synthetic {
    dsv3_model model;
    bench_tensor *tensors; /* [count], in file order */
    size_t count, capacity;
    size_t next; /* where the next search by name begins */
    dsv3_type type;
    unsigned char *arena; /* all weights */
    void *tables;         /* what dsv3_model_bind lays out */
    size_t table_bytes;
    size_t weight_bytes; /* exact sum over all tensors, FP8 scales included */
    size_t active_bytes; /* of these, read for one decoded token: K of E experts, one row of the embedding */
    size_t active_macs;  /* multiply-adds with weight matrices for one prefilled token: no head, no attention */
    void *packed;        /* what dsv3_pack has written, or NULL */
    size_t packed_bytes;
} bench_synthetic;

/* As in the published checkpoints: router biases are F32; beside FP8 matrices everything else is BF16. Q8_0 and Q4_0
 * hold for every matrix but the router's whose rows are whole blocks; the rest is BF16. */
static inline dsv3_type bench_tensor_type(const dsv3_tensor_info *info, dsv3_type type) {
    if (info->kind == DSV3_KIND_ROUTER && info->rank == 1) return DSV3_F32;
    if (type == DSV3_F8_E4M3) return info->quantised ? type : DSV3_BF16;
    if (dsv3_type_block(type) > 1 &&
        (info->rank == 1 || info->kind == DSV3_KIND_ROUTER || info->cols % dsv3_type_block(type) != 0)) {
        return DSV3_BF16;
    }
    return type;
}

static inline size_t bench_blocks(size_t n, size_t block) { return n / block + (n % block != 0); }

static inline dsv3_result bench_collect(void *user, const dsv3_tensor_info *info) {
    bench_synthetic *s = (bench_synthetic *)user;
    bench_tensor *t;
    if (s->count == s->capacity) {
        s->capacity = 2 * s->capacity + 64;
        t = (bench_tensor *)realloc(s->tensors, s->capacity * sizeof *t);
        if (t == NULL) bench_die("list of tensors", "out of memory");
        s->tensors = t;
    }
    t = &s->tensors[s->count++];
    memset(t, 0, sizeof *t);
    t->info = *info;
    t->tensor.type = bench_tensor_type(info, s->type);
    t->tensor.rows = info->rows;
    t->tensor.cols = info->cols;
    t->tensor.rank = info->rank;
    t->bytes = info->rows * dsv3_row_bytes(t->tensor.type, info->cols);
    if (t->tensor.type == DSV3_F8_E4M3) {
        t->scale_bytes = bench_blocks(info->rows, DSV3_BLOCK) * bench_blocks(info->cols, DSV3_BLOCK) * sizeof(float);
    }
    return DSV3_OK;
}

/* Places the tensors in the arena, each on a multiple of BENCH_ALIGN, and adds up. Returns the arena's size. */
static inline size_t bench_layout(bench_synthetic *s, const dsv3_config *c) {
    size_t used = 0, experts = 0, expert_macs = 0;
    for (size_t i = 0; i < s->count; i++) {
        bench_tensor *t = &s->tensors[i];
        size_t bytes = t->bytes + t->scale_bytes, macs = t->info.rank == 2 ? t->info.rows * t->info.cols : 0;
        t->at = used;
        used += bench_blocks(t->bytes, BENCH_ALIGN) * BENCH_ALIGN;
        t->scale_at = used;
        used += bench_blocks(t->scale_bytes, BENCH_ALIGN) * BENCH_ALIGN;
        s->weight_bytes += bytes;
        if (t->info.layer >= c->num_hidden_layers) continue; /* MTP: not part of a plain decode step */
        if (t->info.expert >= 0) {
            experts += bytes;
            expert_macs += macs;
        } else if (t->info.kind == DSV3_KIND_EMBED) {
            s->active_bytes += bytes / t->info.rows + (c->tie_word_embeddings ? bytes : 0);
        } else {
            s->active_bytes += bytes;
            if (t->info.kind != DSV3_KIND_HEAD) s->active_macs += macs;
        }
    }
    if (c->n_routed_experts > 0) { /* every expert has the same size: the quotients are exact */
        size_t E = (size_t)c->n_routed_experts, K = (size_t)c->num_experts_per_tok;
        s->active_bytes += experts / E * K;
        s->active_macs += expert_macs / E * K;
    }
    return used;
}

/* Random codes, several to a 64-bit word: of each code the bits in `keep` are random, then `add` is added, which
 * puts the exponent into its range. */
typedef struct bench_fill {
    uint64_t *words; /* [n] */
    size_t n;
    uint64_t keep, add, seed;
} bench_fill;

#define BENCH_FILL_ITEM 131072u /* words of one item of the loop: 1 MiB */

static inline void bench_fill_task(void *arg, size_t begin, size_t end, size_t worker) {
    const bench_fill *f = (const bench_fill *)arg;
    (void)worker;
    for (size_t item = begin; item < end; item++) {
        size_t i0 = item * BENCH_FILL_ITEM, i1 = i0 + BENCH_FILL_ITEM < f->n ? i0 + BENCH_FILL_ITEM : f->n;
        dsv3_rng rng;
        rng.state = f->seed + ((uint64_t)item << 40);
        for (size_t i = i0; i < i1; i++) f->words[i] = (dsv3_random(&rng) & f->keep) + f->add;
    }
}

/* A code of one element, repeated through a word. */
static inline uint64_t bench_lanes(uint64_t code, dsv3_type type) {
    switch (dsv3_type_bytes(type)) {
    case 1: return code * 0x0101010101010101u;
    case 2: return code * 0x0001000100010001u;
    default: return code * 0x0000000100000001u;
    }
}

/* Width of the mantissa, and what is added to an exponent to store it. */
static inline void bench_format(dsv3_type type, int *mantissa, int *bias) {
    *mantissa = type == DSV3_F32 ? 23 : type == DSV3_F16 ? 10 : type == DSV3_BF16 ? 7 : 3;
    *bias = type == DSV3_F16 ? 15 : type == DSV3_F8_E4M3 ? 7 : 127;
}

/* Q8_0 and Q4_0: codes -64 .. 63 and -8 .. 7, and F16 scales of unit * (1/2 .. 3/2). */
typedef struct bench_block_fill {
    unsigned char *data; /* [blocks] of 2 + codes bytes */
    size_t blocks, codes;
    uint64_t seed;
    float unit;
} bench_block_fill;

#define BENCH_BLOCK_ITEM 32768u /* blocks of one item of the loop */

static inline void bench_block_task(void *arg, size_t begin, size_t end, size_t worker) {
    const bench_block_fill *f = (const bench_block_fill *)arg;
    (void)worker;
    for (size_t item = begin; item < end; item++) {
        size_t b0 = item * BENCH_BLOCK_ITEM,
               b1 = b0 + BENCH_BLOCK_ITEM < f->blocks ? b0 + BENCH_BLOCK_ITEM : f->blocks;
        dsv3_rng rng;
        rng.state = f->seed + ((uint64_t)item << 40);
        for (size_t b = b0; b < b1; b++) {
            unsigned char *at = f->data + b * (2 + f->codes);
            uint16_t scale = dsv3_f16_from_f32(f->unit * (0.5f + dsv3_random_uniform(&rng)));
            memcpy(at, &scale, sizeof scale);
            for (size_t i = 0; i < f->codes; i += sizeof(uint64_t)) {
                uint64_t word = dsv3_random(&rng);
                if (f->codes == DSV3_QBLOCK) { /* bit 6 of a byte becomes that of its sign */
                    word &= 0xbfbfbfbfbfbfbfbfu;
                    word |= (word & 0x8080808080808080u) >> 1;
                }
                memcpy(at + 2 + i, &word, sizeof word);
            }
        }
    }
}

static inline void bench_fill_blocks(const dsv3_context *context, const bench_tensor *t, unsigned char *arena,
                                     uint64_t seed) {
    bench_block_fill f;
    f.data = arena + t->at;
    f.codes = dsv3_type_bytes(t->tensor.type) - 2;
    f.blocks = t->bytes / (2 + f.codes);
    f.seed = seed;
    f.unit = f.codes == DSV3_QBLOCK ? 0.0232f : 0.182f; /* over the codes' rms: 0.86 */
    for (size_t n = 1; n < t->info.cols; n *= 4) f.unit *= 0.5f;
    bench_parallel(context, bench_blocks(f.blocks, BENCH_BLOCK_ITEM), bench_block_task, &f);
}

/* Matrices: sign and mantissa random, exponent one of four, so that rms is about 1 / sqrt(cols) and a row times a
 * normalised x is about 1. FP8 codes have magnitudes 16 .. 240, where those of real checkpoints are, and their
 * scales do the rest. Norm gains are in [1/2, 1). Router biases stay small, so that the scores choose. */
static inline void bench_fill_tensor(const dsv3_context *context, const bench_tensor *t, unsigned char *arena,
                                     uint64_t seed) {
    dsv3_type type = t->tensor.type;
    int mantissa, bias, top = 0; /* largest exponent */
    uint64_t sign;
    bench_fill f;
    if (dsv3_type_block(type) > 1) {
        bench_fill_blocks(context, t, arena, seed);
        return;
    }
    sign = (uint64_t)1 << (8 * dsv3_type_bytes(type) - 1);
    bench_format(type, &mantissa, &bias);
    while (((size_t)1 << (-2 * top)) < t->info.cols) top--;
    f.words = (uint64_t *)(void *)(arena + t->at);
    f.n = bench_blocks(t->bytes, sizeof(uint64_t)); /* up to 7 bytes of the padding behind the tensor */
    f.seed = seed;
    if (t->info.rank == 1 && t->info.kind != DSV3_KIND_ROUTER) {
        f.keep = bench_lanes(((uint64_t)1 << mantissa) - 1, type);
        f.add = bench_lanes((uint64_t)(bias - 1) << mantissa, type);
    } else {
        int exponent = type == DSV3_F8_E4M3 ? 7 : t->info.rank == 1 ? -10 : top;
        f.keep = bench_lanes(sign | (((uint64_t)4 << mantissa) - 1), type);
        f.add = bench_lanes((uint64_t)(bias + exponent - 3) << mantissa, type);
    }
    bench_parallel(context, bench_blocks(f.n, BENCH_FILL_ITEM), bench_fill_task, &f);
    if (t->scale_bytes > 0) {
        float *scale = (float *)(void *)(arena + t->scale_at), unit = 0.0078125f; /* 2^-7 */
        dsv3_rng rng;
        rng.state = ~seed;
        for (int e = 0; e > top; e--) unit *= 0.5f;
        for (size_t i = 0; i < t->scale_bytes / sizeof(float); i++) {
            scale[i] = unit * (0.5f + dsv3_random_uniform(&rng));
        }
    }
}

/* Binding asks in file order: the search begins where the last one ended. */
static inline dsv3_result bench_find(void *user, const char *name, dsv3_tensor *tensor) {
    bench_synthetic *s = (bench_synthetic *)user;
    for (size_t k = 0; k < s->count; k++) {
        size_t i = (s->next + k) % s->count;
        if (strcmp(s->tensors[i].info.name, name) != 0) continue;
        *tensor = s->tensors[i].tensor;
        s->next = i + 1;
        return DSV3_OK;
    }
    return DSV3_ERR_MISSING;
}

/* Binds the tensors as they were made: also what undoes dsv3_pack. */
static inline void bench_synthetic_bind(bench_synthetic *s, const dsv3_config *config) {
    dsv3_error error;
    free(s->packed);
    s->packed = NULL;
    s->packed_bytes = 0;
    bench_check_error(dsv3_model_bind(config, &s->model, s->tables, s->table_bytes, bench_find, s, &error),
                      "dsv3_model_bind", &error);
}

/* Packs a model for the context's backend, into memory to be freed by the caller: bytes of it. NULL for a backend that
 * reads weights as they are. */
static inline void *bench_pack(const dsv3_context *context, dsv3_model *model, size_t *bytes) {
    void *memory;
    bench_check(dsv3_pack_size(context, model, bytes, NULL), "dsv3_pack_size");
    if (*bytes == 0) return NULL;
    memory = bench_alloc(*bytes);
    bench_check(dsv3_pack(context, model, memory, *bytes, NULL), "dsv3_pack");
    return memory;
}

static inline void bench_synthetic_pack(bench_synthetic *s, const dsv3_context *context) {
    s->packed = bench_pack(context, &s->model, &s->packed_bytes);
}

/* Makes and binds a model. Does not come back when something fails. Shows progress on a terminal. */
static inline void bench_synthetic_init(bench_synthetic *s, const dsv3_config *config, dsv3_type type,
                                        const dsv3_context *context) {
    int show = isatty(STDERR_FILENO);
    size_t done = 0, bytes;
    dsv3_error error;
    memset(s, 0, sizeof *s);
    s->type = type;
    bench_check_error(dsv3_config_check(config, &error), "config", &error);
    bench_check(dsv3_model_tensors(config, bench_collect, s, NULL), "list of tensors");
    bytes = bench_layout(s, config);
    s->arena = (unsigned char *)bench_alloc(bytes);
    for (size_t i = 0; i < s->count; i++) {
        bench_tensor *t = &s->tensors[i];
        bench_fill_tensor(context, t, s->arena, (uint64_t)i << 20);
        t->tensor.data = s->arena + t->at;
        t->tensor.scale = t->scale_bytes > 0 ? s->arena + t->scale_at : NULL;
        done += t->bytes;
        if (show && (done / 50000000 != (done - t->bytes) / 50000000 || i + 1 == s->count)) {
            fprintf(stderr, "\rmaking weights: %3d %%", (int)(100.0 * (double)done / (double)s->weight_bytes));
        }
    }
    if (show) fprintf(stderr, "\r                      \r");
    bench_check(dsv3_model_size(config, &s->table_bytes, NULL), "dsv3_model_size");
    s->tables = bench_alloc(s->table_bytes);
    bench_synthetic_bind(s, config);
}

static inline void bench_synthetic_free(bench_synthetic *s) {
    free(s->tensors);
    free(s->arena);
    free(s->tables);
    free(s->packed);
}

/* ---- What a model computes and reads */

/* Operations, a multiply-add being two, that the attention of one layer needs for a query and a key it sees: with
 * keys and values rebuilt, dn + dr and dv of them for each head; absorbed, rk + dr and rk. */
static inline double bench_pair_flops(const dsv3_config *c, int absorbed) {
    int32_t width = c->qk_rope_head_dim + (absorbed ? 2 * c->kv_lora_rank : c->qk_nope_head_dim + c->v_head_dim);
    return 2.0 * (double)c->num_attention_heads * (double)width;
}

/* Of a prompt of `rows` tokens: weights for all, the head for one, and P (P + 1) / 2 pairs in each layer. */
static inline double bench_prefill_flops(const bench_synthetic *s, size_t rows) {
    const dsv3_config *c = &s->model.config;
    double P = (double)rows;
    return 2.0 * P * (double)s->active_macs + 2.0 * (double)c->vocab_size * (double)c->hidden_size +
           (double)c->num_hidden_layers * 0.5 * P * (P + 1.0) * bench_pair_flops(c, 0);
}

/* Bytes of the main layers' cache, `length` positions. */
static inline double bench_cache_bytes(const dsv3_config *c, dsv3_type type, double length) {
    return (double)c->num_hidden_layers * (double)(c->kv_lora_rank + c->qk_rope_head_dim) * length *
           (double)dsv3_type_bytes(type);
}

/* Fills the first `length` positions with random latents, so that decoding can be timed there without reading a
 * prompt. They have the magnitude of normalised ones. */
static inline void bench_cache_fill(dsv3_cache *cache, size_t length) {
    dsv3_rng rng = {7};
    for (size_t layer = 0; layer < cache->layers; layer++) {
        size_t begin = layer * cache->capacity * cache->width, n = length * cache->width;
        for (size_t i = begin; i < begin + n; i++) {
            float x = 3.4f * (dsv3_random_uniform(&rng) - 0.5f); /* rms about 1 */
            if (cache->type == DSV3_F32) {
                ((float *)cache->data)[i] = x;
            } else {
                ((uint16_t *)cache->data)[i] = dsv3_bf16_from_f32(x);
            }
        }
    }
    cache->length = length;
}

/* ---- Multiply-adds per second: independent chains x = x + a b that never leave their registers
 *
 * bench_peak_compiled is what this build may use: vectors of the width the compiler's flags allow, a multiplication
 * and an addition apart, as C99 without contraction asks for. On x86-64 the others are the machine's own peaks in
 * the widest vectors the processor has, whatever the flags: fused float32, pairs of BF16 into float32 (vdpbf16ps),
 * fours of bytes into int32 (vpdpbusd), and tiles of either (tdpbf16ps, tdpbssd). Twelve to sixteen chains cover the
 * latency of the two units that some have, four that of tiles. */

#define BENCH_PEAK_CHAINS 16       /* at most */
#define BENCH_PEAK_ROUNDS 2000000u /* of each chain, in one item of the loop: some 5 ms */
#define BENCH_TILE_ROUNDS 131072u  /* likewise, of tiles */

typedef struct bench_peak {
    float start[BENCH_PEAK_CHAINS];
    float a, b;
    double *sums; /* [items] */
} bench_peak;

#define BENCH_CHAINS_12(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define BENCH_CHAINS_16(M) BENCH_CHAINS_12(M) M(12) M(13) M(14) M(15)
#define BENCH_CHAIN_ADD(i) sum = sum + x##i;

/* A loop of one kind: vectors whose first element has the type `element`; START(i) declares x_i, and STEP(i) takes it
 * one step on, with va and vb, which are A and B. x_i depends on the item, so that no register keeps its beginning. The
 * sum makes sure that nothing is left out. */
#define BENCH_PEAK_LOOP(name, attributes, CHAINS, vector, element, factor, A, B, START, STEP)                        \
    attributes static inline void name(void *arg, size_t begin, size_t end, size_t worker) {                         \
        const bench_peak *p = (const bench_peak *)arg;                                                               \
        (void)worker;                                                                                                \
        for (size_t item = begin; item < end; item++) {                                                              \
            factor va = A, vb = B;                                                                                   \
            CHAINS(START)                                                                                            \
            element lanes[sizeof(vector) / sizeof(element)] = {0};                                                   \
            vector sum;                                                                                              \
            double total = 0.0;                                                                                      \
            memcpy(&sum, lanes, sizeof sum);                                                                         \
            for (size_t i = 0; i < BENCH_PEAK_ROUNDS; i++) {                                                         \
                CHAINS(STEP)                                                                                         \
            }                                                                                                        \
            CHAINS(BENCH_CHAIN_ADD)                                                                                  \
            memcpy(lanes, &sum, sizeof lanes);                                                                       \
            for (size_t i = 0; i < sizeof lanes / sizeof *lanes; i++) total += (double)lanes[i];                     \
            p->sums[item] = total / (double)(sizeof lanes / sizeof *lanes);                                          \
        }                                                                                                            \
    }

#if defined(__GNUC__)
#if defined(__AVX512F__)
#define BENCH_PEAK_LANES 16
#elif defined(__AVX__)
#define BENCH_PEAK_LANES 8
#else
#define BENCH_PEAK_LANES 4
#endif
typedef float bench_vector __attribute__((vector_size(BENCH_PEAK_LANES * sizeof(float))));
#else
#define BENCH_PEAK_LANES 1
typedef float bench_vector;
#endif

static inline bench_vector bench_vector_set(float value) {
    bench_vector v;
    float lanes[BENCH_PEAK_LANES];
    for (size_t i = 0; i < BENCH_PEAK_LANES; i++) lanes[i] = value;
    memcpy(&v, lanes, sizeof v);
    return v;
}

#define BENCH_START_COMPILED(i) bench_vector x##i = bench_vector_set(p->start[(i + item) % BENCH_PEAK_CHAINS]);
#define BENCH_STEP_COMPILED(i) x##i = x##i * va + vb;
BENCH_PEAK_LOOP(bench_peak_task, , BENCH_CHAINS_12, bench_vector, float, bench_vector, bench_vector_set(p->a),
                bench_vector_set(p->b), BENCH_START_COMPILED, BENCH_STEP_COMPILED)

#if defined(__GNUC__) && defined(__x86_64__)
#define BENCH_START_256(i) __m256 x##i = _mm256_set1_ps(p->start[(i + item) % BENCH_PEAK_CHAINS]);
#define BENCH_STEP_256(i) x##i = _mm256_fmadd_ps(x##i, va, vb);
BENCH_PEAK_LOOP(bench_peak_256_task, __attribute__((target("avx2,fma"))), BENCH_CHAINS_12, __m256, float, __m256,
                _mm256_set1_ps(p->a), _mm256_set1_ps(p->b), BENCH_START_256, BENCH_STEP_256)
#define BENCH_START_512(i) __m512 x##i = _mm512_set1_ps(p->start[(i + item) % BENCH_PEAK_CHAINS]);
#define BENCH_STEP_512(i) x##i = _mm512_fmadd_ps(x##i, va, vb);
BENCH_PEAK_LOOP(bench_peak_512_task, __attribute__((target("avx512f"))), BENCH_CHAINS_16, __m512, float, __m512,
                _mm512_set1_ps(p->a), _mm512_set1_ps(p->b), BENCH_START_512, BENCH_STEP_512)

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define BENCH_PEAK_DOTS
#include <cpuid.h>
/* Two products of 2^-10 and 2^-10 in a step. */
#define BENCH_SMALL (__m512bh) _mm512_set1_epi16(0x3A80)
#define BENCH_STEP_BF16(i) x##i = _mm512_dpbf16_ps(x##i, va, vb);
BENCH_PEAK_LOOP(bench_peak_bf16_task, __attribute__((target("avx512f,avx512bw,avx512bf16"))), BENCH_CHAINS_16, __m512,
                float, __m512bh, BENCH_SMALL, BENCH_SMALL, BENCH_START_512, BENCH_STEP_BF16)
/* Four products of 3 and 5 in a step: the sum of the chains stays below 2^31. */
#define BENCH_START_INT_512(i) __m512i x##i = _mm512_set1_epi32((int)((i + item) % 16));
#define BENCH_STEP_INT_512(i) x##i = _mm512_dpbusd_epi32(x##i, va, vb);
BENCH_PEAK_LOOP(bench_peak_int8_512_task, __attribute__((target("avx512f,avx512vnni"))), BENCH_CHAINS_16, __m512i,
                int32_t, __m512i, _mm512_set1_epi8(3), _mm512_set1_epi8(5), BENCH_START_INT_512, BENCH_STEP_INT_512)
#define BENCH_START_INT_256(i) __m256i x##i = _mm256_set1_epi32((int)((i + item) % 12));
#define BENCH_STEP_INT_256(i) x##i = _mm256_dpbusd_avx_epi32(x##i, va, vb);
BENCH_PEAK_LOOP(bench_peak_int8_256_task, __attribute__((target("avx2,avxvnni"))), BENCH_CHAINS_12, __m256i, int32_t,
                __m256i, _mm256_set1_epi8(3), _mm256_set1_epi8(5), BENCH_START_INT_256, BENCH_STEP_INT_256)

#if defined(__linux__) && defined(__LP64__)
#define BENCH_PEAK_TILES
/* Four tiles of sums, [16, 16] each, and two of either factor, all of whose elements are the same. */
#define BENCH_TILE_LOOP(name, product, code)                                                                         \
    static inline void name(void *arg, size_t begin, size_t end, size_t worker) {                                    \
        const bench_peak *p = (const bench_peak *)arg;                                                               \
        unsigned char shape[64] = {1}, values[16 * 64];                                                              \
        float sums[4 * 256];                                                                                         \
        (void)worker;                                                                                                \
        for (size_t i = 0; i < 8; i++) shape[16 + 2 * i] = 64, shape[48 + i] = 16;                                   \
        for (size_t i = 0; i < sizeof values; i += 2) memcpy(values + i, &(uint16_t){code}, 2);                      \
        for (size_t item = begin; item < end; item++) {                                                              \
            __asm__ volatile("ldtilecfg (%0)\n\ttileloadd (%1,%2,1), %%tmm4\n\ttileloadd (%1,%2,1), %%tmm5\n\t"      \
                             "tileloadd (%1,%2,1), %%tmm6\n\ttileloadd (%1,%2,1), %%tmm7" ::"r"(shape),              \
                             "r"(values), "r"((size_t)64)                                                            \
                             : "memory");                                                                            \
            for (size_t i = 0; i < BENCH_TILE_ROUNDS; i++) {                                                         \
                __asm__ volatile(product " %tmm6, %tmm4, %tmm0\n\t" product " %tmm7, %tmm4, %tmm1\n\t" product       \
                                         " %tmm6, %tmm5, %tmm2\n\t" product " %tmm7, %tmm5, %tmm3");                 \
            }                                                                                                        \
            __asm__ volatile(                                                                                        \
                "tilestored %%tmm0, (%0,%4,1)\n\ttilestored %%tmm1, (%1,%4,1)\n\t"                                   \
                "tilestored %%tmm2, (%2,%4,1)\n\ttilestored %%tmm3, (%3,%4,1)\n\ttilerelease" ::"r"(sums),        \
                "r"(sums + 256), "r"(sums + 512), "r"(sums + 768), "r"((size_t)64)                                            \
                : "memory");                                                                                         \
            p->sums[item] = bench_tile_sum(sums, code);                                                           \
        }                                                                                                            \
    }
/* The mean of four tiles, times four. Bytes have integer sums. */
static inline double bench_tile_sum(const float *sums, unsigned code) {
    double total = 0.0;
    for (size_t i = 0; i < 4 * 256; i++) {
        int32_t whole;
        memcpy(&whole, sums + i, sizeof whole);
        total += code == 0x3A80 ? (double)sums[i] : (double)whole;
    }
    return total / 256.0;
}
BENCH_TILE_LOOP(bench_tile_bf16_task, "tdpbf16ps", 0x3A80) /* 2^-10: 2^-15 in a step */
BENCH_TILE_LOOP(bench_tile_int8_task, "tdpbssd", 0x0303)   /* 3: 576 in a step */
#endif

/* Bits of leaf 7: whether the processor knows the instructions. Whether the system saves the registers is asked
 * apart, with __builtin_cpu_supports, which does not know these extensions in every compiler. */
static inline unsigned bench_cpu_leaf7(unsigned subleaf, int want_ecx) {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx)) return 0;
    return want_ecx ? ecx : eax;
}
#endif
#endif

/* Operations per second, a multiply-add being two, of the best of `passes` passes with the context's threads. macs: of
 * all steps of an item; sum: of the chains at the end, to 2. */
static inline double bench_peak_items(const dsv3_context *context, dsv3_task task, double macs, double sum,
                                      size_t passes) {
    size_t items = 2 * context->threads; /* a thread that starts late leaves one to the others */
    double flops = 2.0 * macs * (double)items, best = 0.0;
    bench_peak p;
    p.a = 0.999f;
    p.b = 0.001f; /* the chains stay near 1 */
    for (size_t i = 0; i < BENCH_PEAK_CHAINS; i++) p.start[i] = 1.0f + 0.01f * (float)i;
    p.sums = (double *)bench_alloc(items * sizeof *p.sums);
    for (size_t i = 0; i < passes; i++) {
        double begin = bench_now(), seconds;
        bench_parallel(context, items, task, &p);
        seconds = bench_now() - begin;
        for (size_t j = 0; j < items; j++) {
            if (!(p.sums[j] > sum - 2.0 && p.sums[j] < sum + 2.0)) bench_die("multiply-adds", "the sum is wrong");
        }
        if (seconds > 0.0 && flops / seconds > best) best = flops / seconds;
    }
    free(p.sums);
    return best;
}

/* chains: of the loop; macs: of one step. */
static inline double bench_peak_run(const dsv3_context *context, dsv3_task task, size_t chains, size_t macs,
                                    double sum, size_t passes) {
    return bench_peak_items(context, task, (double)BENCH_PEAK_ROUNDS * (double)(chains * macs), sum, passes);
}

static inline double bench_peak_compiled(const dsv3_context *context, size_t passes) {
    return bench_peak_run(context, bench_peak_task, 12, BENCH_PEAK_LANES, 12.0, passes);
}

/* *name becomes that of the instructions; 0 and "" where they are not known. */
static inline double bench_peak_fma(const dsv3_context *context, size_t passes, const char **name) {
    *name = "";
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        *name = "AVX-512";
        return bench_peak_run(context, bench_peak_512_task, 16, 16, 16.0, passes);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        *name = "AVX2";
        return bench_peak_run(context, bench_peak_256_task, 12, 8, 12.0, passes);
    }
#endif
    (void)context;
    (void)passes;
    return 0.0;
}

/* Likewise, of dot products of pairs of BF16. */
static inline double bench_peak_bf16(const dsv3_context *context, size_t passes, const char **name) {
    *name = "";
#ifdef BENCH_PEAK_DOTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && (bench_cpu_leaf7(1, 0) >> 5 & 1) != 0) {
        *name = "AVX-512 BF16";
        return bench_peak_run(context, bench_peak_bf16_task, 16, 32, 17.2 + 16.0 * BENCH_PEAK_ROUNDS / 524288.0,
                              passes);
    }
#endif
    (void)context;
    (void)passes;
    return 0.0;
}

/* Likewise, of fours of bytes. */
static inline double bench_peak_int8(const dsv3_context *context, size_t passes, const char **name) {
    *name = "";
#ifdef BENCH_PEAK_DOTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && (bench_cpu_leaf7(0, 1) >> 11 & 1) != 0) {
        *name = "AVX-512 VNNI";
        return bench_peak_run(context, bench_peak_int8_512_task, 16, 64, 120.0 + 16.0 * 60.0 * BENCH_PEAK_ROUNDS,
                              passes);
    }
    if (__builtin_cpu_supports("avx2") && (bench_cpu_leaf7(1, 0) >> 4 & 1) != 0) {
        *name = "AVX-VNNI";
        return bench_peak_run(context, bench_peak_int8_256_task, 12, 32, 66.0 + 12.0 * 60.0 * BENCH_PEAK_ROUNDS,
                              passes);
    }
#endif
    (void)context;
    (void)passes;
    return 0.0;
}

/* Likewise, of tiles of BF16 or of bytes. */
static inline double bench_peak_tiles(const dsv3_context *context, int bytes, size_t passes, const char **name) {
    *name = "";
#ifdef BENCH_PEAK_TILES
    dsv3_context probe; /* whether the system allows them */
    if (dsv3_context_init(&probe, DSV3_BACKEND_AMX, 1, NULL) == DSV3_OK) {
        double steps = 4.0 * BENCH_TILE_ROUNDS;
        *name = "AMX";
        return bytes ? bench_peak_items(context, bench_tile_int8_task, 16 * 16 * 64 * steps, 576 * steps, passes)
                     : bench_peak_items(context, bench_tile_bf16_task, 16 * 16 * 32 * steps, steps / 32768, passes);
    }
#endif
    (void)context;
    (void)bytes;
    (void)passes;
    return 0.0;
}

/* ---- Limits of the machine, with the threads of a context: the best of all passes so far */

typedef enum bench_kind {
    BENCH_FMA = 0,
    BENCH_BF16 = 1,
    BENCH_INT8 = 2,
    BENCH_BF16_TILES = 3,
    BENCH_INT8_TILES = 4
} bench_kind;
#define BENCH_KINDS 5

static const char *const bench_kind_names[BENCH_KINDS] = {"fma", "bf16", "int8", "bf16_tiles", "int8_tiles"};
static const char *const bench_kind_titles[BENCH_KINDS] = {"float32 FMA", "BF16 dot", "int8 dot", "BF16 tiles",
                                                           "int8 tiles"};

typedef struct bench_limits {
    double read;                   /* bytes/s */
    double peak[BENCH_KINDS];      /* operations/s; 0: the machine lacks the instructions, or nobody knows */
    const char *name[BENCH_KINDS]; /* of the instructions */
} bench_limits;

/* passes of each; to be called between repeats of what is compared with them. */
static inline void bench_limits_pass(bench_limits *l, bench_reader *reader, const dsv3_context *context,
                                     size_t passes) {
    double now[BENCH_KINDS], read = bench_read_bandwidth(reader, context, passes);
    now[BENCH_FMA] = bench_peak_fma(context, passes, &l->name[BENCH_FMA]);
    now[BENCH_BF16] = bench_peak_bf16(context, passes, &l->name[BENCH_BF16]);
    now[BENCH_INT8] = bench_peak_int8(context, passes, &l->name[BENCH_INT8]);
    now[BENCH_BF16_TILES] = bench_peak_tiles(context, 0, passes, &l->name[BENCH_BF16_TILES]);
    now[BENCH_INT8_TILES] = bench_peak_tiles(context, 1, passes, &l->name[BENCH_INT8_TILES]);
    if (read > l->read) l->read = read;
    for (int k = 0; k < BENCH_KINDS; k++) {
        if (now[k] > l->peak[k]) l->peak[k] = now[k];
    }
}

/* The instructions a product of this type of weights may use in this mode: those for float32 where activations stay
 * float32, and where the machine has no better ones. */
static inline bench_kind bench_limits_kind(const bench_limits *l, dsv3_type type, dsv3_compute compute) {
    bench_kind kind = type == DSV3_BF16 || type == DSV3_F8_E4M3 ? BENCH_BF16
                      : dsv3_type_block(type) > 1               ? BENCH_INT8
                                                                : BENCH_FMA;
    return compute == DSV3_FAST && l->peak[kind] > 0.0 ? kind : BENCH_FMA;
}

/* And of the backend "amx" in its place. */
static inline bench_kind bench_limits_tiles(const bench_limits *l, bench_kind kind, const char *backend) {
    bench_kind tiles = kind == BENCH_BF16 ? BENCH_BF16_TILES : kind == BENCH_INT8 ? BENCH_INT8_TILES : kind;
    return strcmp(backend, "amx") == 0 && l->peak[tiles] > 0.0 ? tiles : kind;
}

static inline void bench_print_limits(const bench_limits *l) {
    printf("limits   read %.1f GB/s", 1e-9 * l->read);
    for (int k = 0; k < BENCH_KINDS; k++) {
        if (l->peak[k] > 0.0) printf(", %s %.0f G/s (%s)", bench_kind_titles[k], 1e-9 * l->peak[k], l->name[k]);
    }
    printf("\n");
}

#endif /* BENCH_H */
