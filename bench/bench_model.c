/* bench_model -- speed of prefill and decode on a synthetic model, beside the bandwidth of the machine.
 * How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_model"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#define CHUNK 512     /* most rows of one prefill call */
#define READ_PASSES 3 /* bandwidth passes after each repeat */
#define MAX_TOKENS 65536
#define MAX_REPEAT 100
#define MAX_THREADS 1024

static const char help[] =
    "usage: bench_model [options]\n"
    "Speed of prefill and decode on a model with random weights; bench/README.md explains the numbers.\n"
    "  --shape NAME      bench-1b (default), austen, micro\n"
    "  --type T          weights: F32, F16, BF16 (default), F8_E4M3\n"
    "  --threads N       1 .. 1024; default: what OpenMP offers\n"
    "  --prefill P       tokens before the first decode, 0 .. 65536, in calls of at most 512; default 512\n"
    "  --decode D        tokens decoded one at a time, 0 .. 65536; default 128\n"
    "  --repeat R        1 .. 100; default 3\n"
    "  --attention FORM  auto (default), absorbed, expanded\n"
    "  --cache T         F32 (default), BF16\n"
    "  --line            one line of key=value pairs instead of the table\n"
    "  --help            this text\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Options */

typedef struct bench_options {
    const char *shape;
    dsv3_config config;
    dsv3_type type, cache;
    dsv3_attention attention;
    size_t threads, prefill, decode, repeat; /* threads 0: not given */
    int line;
} bench_options;

static void parse_attention(bench_options *o, const char *value) {
    static const char *const names[] = {"auto", "absorbed", "expanded", NULL};
    static const dsv3_attention forms[] = {DSV3_ATTENTION_AUTO, DSV3_ATTENTION_ABSORBED, DSV3_ATTENTION_EXPANDED};
    o->attention = forms[bench_choice("--attention", value, names, "auto, absorbed or expanded")];
}

static void parse_cache(bench_options *o, const char *value) {
    static const char *const names[] = {"F32", "BF16", NULL};
    o->cache = bench_choice("--cache", value, names, "F32 or BF16") == 0 ? DSV3_F32 : DSV3_BF16;
}

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--shape") == 0) o->config = bench_shape(option, value, &o->shape);
    if (strcmp(option, "--type") == 0) o->type = bench_type(option, value);
    if (strcmp(option, "--attention") == 0) parse_attention(o, value);
    if (strcmp(option, "--cache") == 0) parse_cache(o, value);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--prefill") == 0) o->prefill = bench_number(option, value, 0, MAX_TOKENS);
    if (strcmp(option, "--decode") == 0) o->decode = bench_number(option, value, 0, MAX_TOKENS);
    if (strcmp(option, "--repeat") == 0) o->repeat = bench_number(option, value, 1, MAX_REPEAT);
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--shape",   "--type",   "--attention", "--cache", "--threads",
                                        "--prefill", "--decode", "--repeat",    NULL};
    memset(o, 0, sizeof *o);
    o->prefill = 512;
    o->decode = 128;
    o->repeat = 3;
    o->config = bench_shape("--shape", "bench-1b", &o->shape);
    o->type = DSV3_BF16;
    o->attention = DSV3_ATTENTION_AUTO;
    o->cache = DSV3_F32;
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
    if (o->prefill + o->decode == 0) bench_usage("--prefill and --decode", "0 and 0", "one of them larger");
}

/* ---- What is measured */

typedef struct bench_run {
    bench_options options;
    dsv3_context context;
    bench_synthetic synthetic;
    dsv3_cache cache;
    dsv3_workspace workspace;
    size_t cache_bytes, workspace_bytes;
    void *cache_memory, *workspace_memory;
    float *logits;  /* [V] */
    int32_t *token; /* [P + D] */
} bench_run;

static void run_init(bench_run *r) {
    const bench_options *o = &r->options;
    const dsv3_config *c = &o->config;
    size_t rows = o->prefill < 1 ? 1 : o->prefill < CHUNK ? o->prefill : CHUNK, V = (size_t)c->vocab_size;
    dsv3_rng rng = {1};
    bench_context(&r->context, DSV3_BACKEND_AUTO, o->threads);
    r->context.attention = o->attention;
    bench_synthetic_init(&r->synthetic, c, o->type, &r->context);
    bench_check(dsv3_cache_size(c, o->prefill + o->decode, o->cache, &r->cache_bytes), "dsv3_cache_size");
    bench_check(dsv3_workspace_size(c, rows, r->context.threads, &r->workspace_bytes), "dsv3_workspace_size");
    r->cache_memory = bench_alloc(r->cache_bytes);
    r->workspace_memory = bench_alloc(r->workspace_bytes);
    memset(r->cache_memory, 0, r->cache_bytes); /* the system hands out the pages now, not while we measure */
    memset(r->workspace_memory, 0, r->workspace_bytes);
    bench_check(dsv3_cache_init(&r->cache, c, o->prefill + o->decode, o->cache, r->cache_memory, r->cache_bytes),
                "dsv3_cache_init");
    bench_check(
        dsv3_workspace_init(&r->workspace, c, rows, r->context.threads, r->workspace_memory, r->workspace_bytes),
        "dsv3_workspace_init");
    r->logits = (float *)bench_alloc(V * sizeof *r->logits);
    r->token = (int32_t *)bench_alloc((o->prefill + o->decode) * sizeof *r->token);
    for (size_t i = 0; i < o->prefill + o->decode; i++) r->token[i] = (int32_t)(dsv3_random(&rng) % V);
}

static void run_free(bench_run *r) {
    bench_synthetic_free(&r->synthetic);
    free(r->cache_memory);
    free(r->workspace_memory);
    free(r->logits);
    free(r->token);
}

/* Tokens [begin, end) in one call; logits of the last row if wanted. */
static void run_forward(bench_run *r, size_t begin, size_t end, size_t outputs) {
    dsv3_batch batch;
    dsv3_error error;
    memset(&batch, 0, sizeof batch);
    batch.rows = end - begin;
    batch.token = r->token + begin;
    batch.outputs = outputs;
    bench_check_error(
        dsv3_forward(&r->context, r->logits, &r->synthetic.model, &r->cache, 1, &batch, &r->workspace, &error),
        "dsv3_forward", &error);
}

/* tokens/s of one prefill from an empty cache */
static double run_prefill(bench_run *r) {
    size_t P = r->options.prefill;
    double begin = bench_now();
    bench_check(dsv3_cache_truncate(&r->cache, 0), "dsv3_cache_truncate");
    for (size_t t = 0; t < P; t += CHUNK) {
        size_t end = t + CHUNK < P ? t + CHUNK : P;
        run_forward(r, t, end, end == P);
    }
    return P > 0 ? (double)P / (bench_now() - begin) : 0.0;
}

/* tokens/s of the decode steps behind it */
static double run_decode(bench_run *r) {
    size_t P = r->options.prefill, D = r->options.decode;
    double begin = bench_now();
    for (size_t t = P; t < P + D; t++) run_forward(r, t, t + 1, 1);
    return D > 0 ? (double)D / (bench_now() - begin) : 0.0;
}

/* ---- What is printed */

typedef struct bench_results {
    bench_stat prefill, decode; /* tokens/s */
    double bandwidth;           /* bytes/s */
    double peak;                /* bytes */
} bench_results;

static double decode_share(const bench_run *r, const bench_results *m) {
    return m->bandwidth > 0.0 ? m->decode.median * (double)r->synthetic.active_bytes / m->bandwidth : 0.0;
}

static void print_line(const bench_run *r, const bench_results *m) {
    const bench_options *o = &r->options;
    printf("shape=%s type=%s backend=%s threads=%zu prefill%zu=%.2f decode%zu=%.2f bytes_per_token=%zu "
           "read_gbs=%.2f decode_share=%.4f peak_mib=%.1f\n",
           o->shape, dsv3_type_name(o->type), r->context.backend, r->context.threads, o->prefill, m->prefill.median,
           o->decode, m->decode.median, r->synthetic.active_bytes, 1e-9 * m->bandwidth, decode_share(r, m),
           m->peak / 1048576.0);
}

static void print_size(const char *what, double bytes) {
    printf("  %-22s %15.0f %11.1f MiB\n", what, bytes, bytes / 1048576.0);
}

static void print_speed(const char *what, size_t tokens, const bench_stat *s) {
    char name[64];
    snprintf(name, sizeof name, "%s %zu", what, tokens);
    if (tokens > 0) printf("  %-22s %15.2f %11.2f %11.2f\n", name, s->median, s->min, s->max);
}

static void print_table(const bench_run *r, const bench_results *m) {
    static const char *const forms[] = {"auto", "absorbed", "expanded"};
    const bench_options *o = &r->options;
    const bench_synthetic *s = &r->synthetic;
    printf("%s %s, backend %s, threads %zu, attention %s, cache %s, repeats %zu\n", o->shape, dsv3_type_name(o->type),
           r->context.backend, r->context.threads, forms[o->attention], dsv3_type_name(o->cache), o->repeat);
    bench_print_machine(&r->context);
    printf("\n  %-22s %15s %11s %11s\n", "tokens/s", "median", "min", "max");
    print_speed("prefill", o->prefill, &m->prefill);
    print_speed("decode", o->decode, &m->decode);
    printf("\n  limits\n");
    printf("  %-22s %15.2f GB/s\n", "read bandwidth", 1e-9 * m->bandwidth);
    if (o->decode > 0)
        printf("  %-22s %15.2f GB/s\n", "decode reads", 1e-9 * m->decode.median * (double)s->active_bytes);
    if (o->decode > 0) printf("  %-22s %15.4f\n", "decode share", decode_share(r, m));
    if (o->prefill > 0) {
        printf("  %-22s %15.2f GFLOP/s\n", "prefill computes", 2e-9 * m->prefill.median * (double)s->active_macs);
    }
    printf("\n  %-22s %15s\n", "memory", "bytes");
    print_size("weights per token", (double)s->active_bytes);
    print_size("weights", (double)s->weight_bytes);
    print_size("model tables", (double)s->table_bytes);
    print_size("cache", (double)r->cache_bytes);
    print_size("workspace", (double)r->workspace_bytes);
    print_size("peak", m->peak);
}

int main(int argc, char **argv) {
    static bench_run r;
    bench_results m;
    bench_reader reader;
    double prefill[MAX_REPEAT], decode[MAX_REPEAT];
    memset(&m, 0, sizeof m);
    parse(&r.options, argc, argv);
    run_init(&r);
    for (size_t i = 0; i < r.options.repeat; i++) {
        double bandwidth;
        prefill[i] = run_prefill(&r);
        decode[i] = run_decode(&r);
        if (i == 0) { /* the first repeat has touched all memory of the model; the buffer below is not its own */
            m.peak = bench_peak_bytes();
            bench_reader_init(&reader, &r.context);
        }
        bandwidth = bench_read_bandwidth(&reader, &r.context, READ_PASSES);
        if (bandwidth > m.bandwidth) m.bandwidth = bandwidth;
    }
    bench_reader_free(&reader);
    m.prefill = bench_summary(prefill, r.options.repeat);
    m.decode = bench_summary(decode, r.options.repeat);
    if (r.options.line) {
        print_line(&r, &m);
    } else {
        print_table(&r, &m);
    }
    run_free(&r);
    return fflush(stdout) != 0 || ferror(stdout);
}
