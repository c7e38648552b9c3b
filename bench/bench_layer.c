/* bench_layer -- one decode step through one MoE layer with the dimensions of V3-671B, whose 257 experts alone are
 * 11.3 GB in FP8: how long a token takes, how near that is to reading, and what 61 such layers would give.
 * How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_layer"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#define LIMIT_PASSES 3
#define MAX_TOKENS 4096
#define MAX_DEPTH 65536
#define MAX_REPEAT 100
#define MAX_THREADS 1024

static const char help[] =
    "usage: bench_layer [options]\n"
    "Decode through one MoE layer of V3-671B's size, random weights; bench/README.md explains the numbers.\n"
    "  --type T          weights: F32, F16, BF16, F8_E4M3 (default), Q8_0, Q4_0\n"
    "  --experts E       routed experts, 16 .. 256 in steps of 8; default 256 (11.5 GB with F8_E4M3)\n"
    "  --mode M          activations: exact (default), fast\n"
    "  --pack P          1: weights in the order of the backend, if it has one: twice the memory; default 0\n"
    "  --backend NAME    default: the best one that runs here\n"
    "  --threads N       1 .. 1024; default: all cores\n"
    "  --tokens N        decoded in a repeat, 1 .. 4096; default 16\n"
    "  --depth N         behind so many tokens of cache, 0 .. 65536; default 0\n"
    "  --repeat R        1 .. 100; default 3\n"
    "  --line            one line of key=value pairs instead of the table\n"
    "  --help            this text\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Options */

typedef struct bench_options {
    dsv3_type type;
    dsv3_compute mode;
    dsv3_backend backend;
    size_t experts, pack, threads, tokens, depth, repeat;
    int line;
} bench_options;

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--type") == 0) o->type = bench_type(option, value);
    if (strcmp(option, "--mode") == 0) o->mode = bench_mode(option, value);
    if (strcmp(option, "--backend") == 0) o->backend = bench_backend(option, value);
    if (strcmp(option, "--pack") == 0) o->pack = bench_number(option, value, 0, 1);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--tokens") == 0) o->tokens = bench_number(option, value, 1, MAX_TOKENS);
    if (strcmp(option, "--depth") == 0) o->depth = bench_number(option, value, 0, MAX_DEPTH);
    if (strcmp(option, "--repeat") == 0) o->repeat = bench_number(option, value, 1, MAX_REPEAT);
    if (strcmp(option, "--experts") == 0) {
        o->experts = bench_number(option, value, 16, 256);
        if (o->experts % 8 != 0) bench_usage(option, value, "a multiple of 8, as there are 8 groups");
    }
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--type",    "--experts", "--mode",  "--pack",   "--backend",
                                        "--threads", "--tokens",  "--depth", "--repeat", NULL};
    memset(o, 0, sizeof *o);
    o->type = DSV3_F8_E4M3;
    o->experts = 256;
    o->tokens = 16;
    o->repeat = 3;
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
}

/* One MoE layer of V3. The vocabulary is a stub: embedding and head are neither read nor counted. */
static dsv3_config layer_config(const bench_options *o) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    c.vocab_size = 16;
    c.bos_token_id = c.eos_token_id = -1;
    c.num_hidden_layers = 1;
    c.num_nextn_predict_layers = 0;
    c.first_k_dense_replace = 0;
    c.n_routed_experts = (int32_t)o->experts;
    return c;
}

/* ---- Memory: better a clear line now than a machine that swaps */

typedef struct bench_need {
    dsv3_type type;
    double bytes;
} bench_need;

static dsv3_result add_bytes(void *user, const dsv3_tensor_info *info) {
    bench_need *n = (bench_need *)user;
    n->bytes += (double)info->rows * (double)dsv3_row_bytes(bench_tensor_type(info, n->type), info->cols);
    return DSV3_OK;
}

static void check_memory(const bench_options *o, const dsv3_config *config) {
    double need, available = bench_available_bytes();
    bench_need weights = {o->type, 0.0};
    bench_check(dsv3_model_tensors(config, add_bytes, &weights, NULL), "list of tensors");
    need = (o->pack ? 2.0 : 1.0) * weights.bytes + (double)BENCH_READ_BYTES + 268435456.0;
    if (available <= 0.0 || need <= available) return;
    fprintf(stderr, BENCH_NAME ": needs %.1f GiB of memory, found %.1f GiB available: choose fewer --experts\n",
            need / 1073741824.0, available / 1073741824.0);
    exit(1);
}

/* ---- What is measured */

typedef struct bench_run {
    bench_options options;
    dsv3_config config;
    dsv3_context context;
    bench_synthetic synthetic;
    dsv3_cache cache;
    dsv3_workspace workspace;
    void *cache_memory, *workspace_memory;
    float *x;          /* [d] the residual stream of a token */
    double made_in;    /* seconds */
    size_t read_bytes; /* of the layer, for a token */
} bench_run;

static void run_init(bench_run *r) {
    const bench_options *o = &r->options;
    const dsv3_config *c = &r->config;
    size_t bytes, capacity = o->depth + o->tokens;
    double begin;
    bench_context(&r->context, o->backend, o->threads);
    r->context.compute = o->mode;
    r->config = layer_config(o);
    check_memory(o, c);
    begin = bench_now();
    bench_synthetic_init(&r->synthetic, c, o->type, &r->context);
    if (o->pack) bench_synthetic_pack(&r->synthetic, &r->context);
    r->made_in = bench_now() - begin;
    bench_check(dsv3_cache_size(c, capacity, DSV3_BF16, &bytes, NULL), "dsv3_cache_size");
    r->cache_memory = bench_alloc(bytes);
    bench_check(dsv3_cache_init(c, &r->cache, capacity, DSV3_BF16, r->cache_memory, bytes, NULL), "dsv3_cache_init");
    bench_cache_fill(&r->cache, capacity);
    bench_check(dsv3_workspace_size(c, 1, r->context.threads, &bytes, NULL), "dsv3_workspace_size");
    r->workspace_memory = bench_alloc(bytes);
    memset(r->workspace_memory, 0, bytes); /* the system hands out the pages now, not while we measure */
    bench_check(dsv3_workspace_init(c, &r->workspace, 1, r->context.threads, r->workspace_memory, bytes, NULL),
                "dsv3_workspace_init");
    r->x = (float *)bench_alloc((size_t)c->hidden_size * sizeof *r->x);
    for (size_t i = 0; i < r->synthetic.count; i++) { /* what belongs to no layer is not read */
        const bench_tensor *t = &r->synthetic.tensors[i];
        size_t all = t->bytes + t->scale_bytes;
        if (t->info.layer < 0) r->read_bytes += t->info.kind == DSV3_KIND_EMBED ? all / t->info.rows : all;
    }
    r->read_bytes = r->synthetic.active_bytes - r->read_bytes;
}

static void run_free(bench_run *r) {
    bench_synthetic_free(&r->synthetic);
    free(r->cache_memory);
    free(r->workspace_memory);
    free(r->x);
}

/* A token of its own for each step: other values, other experts. */
static void run_token(bench_run *r, dsv3_rng *rng) {
    int32_t token = 0;
    dsv3_batch batch;
    dsv3_error error;
    for (size_t i = 0; i < (size_t)r->config.hidden_size; i++) r->x[i] = 3.4f * (dsv3_random_uniform(rng) - 0.5f);
    memset(&batch, 0, sizeof batch);
    batch.rows = 1;
    batch.token = &token;
    bench_check_error(dsv3_batch_begin(&r->context, &r->synthetic.model, &r->cache, 1, &batch, &r->workspace, &error),
                      "dsv3_batch_begin", &error);
    bench_check(dsv3_layer_forward(&r->context, r->x, &r->synthetic.model, &r->synthetic.model.layers[0], 0,
                                   &r->cache, 1, &r->workspace, NULL),
                "dsv3_layer_forward");
    dsv3_batch_end(&r->cache, &batch, &r->workspace, NULL);
}

/* milliseconds for a token */
static double run_repeat(bench_run *r, dsv3_rng *rng) {
    double begin = bench_now();
    r->cache.length = r->options.depth;
    for (size_t t = 0; t < r->options.tokens; t++) run_token(r, rng);
    return 1e3 * (bench_now() - begin) / (double)r->options.tokens;
}

/* ---- What is printed */

static void print_line(const bench_run *r, const bench_stat *ms, const bench_limits *l) {
    const bench_options *o = &r->options;
    double speed = (double)r->read_bytes / (1e-3 * ms->median);
    printf("shape=v3-layer type=%s mode=%s backend=%s threads=%zu experts=%zu depth=%zu ms_token=%.3f read_gbs=%.2f "
           "decode_share=%.4f ms_61=%.1f tokens_s_61=%.3f bytes_per_token=%zu weight_bytes=%zu packed=%d "
           "peak_mib=%.1f\n",
           dsv3_type_name(o->type), bench_mode_names[o->mode], r->context.backend, r->context.threads, o->experts,
           o->depth, ms->median, 1e-9 * l->read, l->read > 0.0 ? speed / l->read : 0.0, 61.0 * ms->median,
           1e3 / (61.0 * ms->median), r->read_bytes, r->synthetic.weight_bytes, r->synthetic.packed != NULL,
           bench_peak_bytes() / 1048576.0);
}

static void print_table(const bench_run *r, const bench_stat *ms, const bench_limits *l) {
    const bench_options *o = &r->options;
    double speed = (double)r->read_bytes / (1e-3 * ms->median);
    printf("one MoE layer of V3-671B, %zu experts, %s, mode %s, backend %s%s, threads %zu, depth %zu, repeats %zu\n",
           o->experts, dsv3_type_name(o->type), bench_mode_names[o->mode], r->context.backend,
           r->synthetic.packed != NULL ? " (packed)" : "", r->context.threads, o->depth, o->repeat);
    bench_print_machine(&r->context);
    bench_print_limits(l);
    printf("weights  %.2f GB, made in %.1f s\n", 1e-9 * (double)r->synthetic.weight_bytes, r->made_in);
    printf("\n  %-24s %10s %10s %10s\n", "", "median", "min", "max");
    printf("  %-24s %10.3f %10.3f %10.3f\n", "ms for a token", ms->median, ms->min, ms->max);
    printf("\n  %-24s %10.1f MB\n", "weights for a token", 1e-6 * (double)r->read_bytes);
    printf("  %-24s %10.2f of %.2f GB/s\n", "reads", 1e-9 * speed, 1e-9 * l->read);
    if (l->read > 0.0) printf("  %-24s %10.4f\n", "share", speed / l->read);
    printf("  %-24s %10.1f ms, %.2f tokens/s\n", "61 such layers", 61.0 * ms->median, 1e3 / (61.0 * ms->median));
    printf("  %-24s %10.1f MiB\n", "peak memory", bench_peak_bytes() / 1048576.0);
}

int main(int argc, char **argv) {
    static bench_run r;
    double ms[MAX_REPEAT];
    bench_limits limits;
    bench_reader reader;
    bench_stat stat;
    dsv3_rng rng = {1};
    memset(&limits, 0, sizeof limits);
    parse(&r.options, argc, argv);
    run_init(&r);
    bench_reader_init(&reader, &r.context);
    for (size_t i = 0; i < r.options.repeat; i++) {
        ms[i] = run_repeat(&r, &rng);
        bench_limits_pass(&limits, &reader, &r.context, LIMIT_PASSES);
    }
    bench_reader_free(&reader);
    stat = bench_summary(ms, r.options.repeat);
    if (r.options.line) {
        print_line(&r, &stat, &limits);
    } else {
        print_table(&r, &stat, &limits);
    }
    run_free(&r);
    return fflush(stdout) != 0 || ferror(stdout);
}
