/* bench_model -- speed of prefill and decode on a synthetic model, beside the limits of the machine.
 * How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_model"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#define SVG_IMPLEMENTATION
#include "svg.h"

#include "roofline.h"

#define CHUNK 512      /* most rows of one prefill call */
#define LIMIT_PASSES 3 /* of each limit, after each repeat */
#define DEEP 64        /* most tokens decoded at a depth */
#define MAX_TOKENS 65536
#define MAX_REPEAT 100
#define MAX_THREADS 1024
#define MAX_DEPTHS 16

static const char help[] =
    "usage: bench_model [options]\n"
    "Speed of prefill and decode on a model with random weights; bench/README.md explains the numbers.\n"
    "  --shape NAME      bench-1b (default), austen, micro\n"
    "  --type T          weights: F32, F16, BF16 (default), F8_E4M3, Q8_0, Q4_0\n"
    "  --mode M          activations: exact (default), fast\n"
    "  --pack P          1: weights in the order of the backend, if it has one; 0 (default; with --sweep 1)\n"
    "  --backend NAME    default: the best one that runs here\n"
    "  --threads N       1 .. 1024; default: all cores, with --sweep 2\n"
    "  --prefill P       tokens of a prompt, 0 .. 65536, read in calls of at most 512; default 512\n"
    "  --decode D        tokens decoded one at a time from an empty cache, 0 .. 65536; default 128\n"
    "  --depth N         and at most 64 of them behind N tokens of cache, 0 .. 65536; default 2048. 0: not at all\n"
    "  --depths LIST     decode alone, behind each of these numbers of tokens: as 0,2048,8192,32768\n"
    "  --sweep           every type and mode, with one thread and with --threads: one table\n"
    "  --svg FILE        also a roofline picture; of a sweep, that of the most threads\n"
    "  --repeat R        1 .. 100; default 3, with --sweep 2\n"
    "  --attention FORM  auto (default), absorbed, expanded\n"
    "  --cache T         F32, BF16 (default)\n"
    "  --line            one line of key=value pairs for each case instead of a table\n"
    "  --help            this text\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Options */

typedef struct bench_options {
    const char *shape, *svg; /* svg NULL: not wanted */
    dsv3_config config;
    dsv3_type type, cache;
    dsv3_compute mode;
    dsv3_backend backend;
    dsv3_attention attention;
    int pack;                                       /* -1: not given */
    size_t threads, prefill, decode, depth, repeat; /* threads and repeat 0: not given */
    size_t depths[MAX_DEPTHS], n_depths;
    int sweep, one; /* bool: --type or --mode was given, which a sweep does not take */
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
    if (strcmp(option, "--sweep") == 0) o->sweep = 1;
    if (strcmp(option, "--svg") == 0) o->svg = value;
    if (strcmp(option, "--shape") == 0) o->config = bench_shape(option, value, &o->shape);
    if (strcmp(option, "--type") == 0) o->type = bench_type(option, value);
    if (strcmp(option, "--mode") == 0) o->mode = bench_mode(option, value);
    if (strcmp(option, "--type") == 0 || strcmp(option, "--mode") == 0) o->one = 1;
    if (strcmp(option, "--backend") == 0) o->backend = bench_backend(option, value);
    if (strcmp(option, "--pack") == 0) o->pack = (int)bench_number(option, value, 0, 1);
    if (strcmp(option, "--attention") == 0) parse_attention(o, value);
    if (strcmp(option, "--cache") == 0) parse_cache(o, value);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--prefill") == 0) o->prefill = bench_number(option, value, 0, MAX_TOKENS);
    if (strcmp(option, "--decode") == 0) o->decode = bench_number(option, value, 0, MAX_TOKENS);
    if (strcmp(option, "--depth") == 0) o->depth = bench_number(option, value, 0, MAX_TOKENS);
    if (strcmp(option, "--depths") == 0)
        o->n_depths = bench_numbers(o->depths, MAX_DEPTHS, option, value, 0, MAX_TOKENS);
    if (strcmp(option, "--repeat") == 0) o->repeat = bench_number(option, value, 1, MAX_REPEAT);
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--shape",   "--type",    "--mode",      "--pack",  "--backend",
                                        "--threads", "--prefill", "--decode",    "--depth", "--depths",
                                        "--svg",     "--repeat",  "--attention", "--cache", NULL};
    static const char *const flags[] = {"--sweep", NULL};
    memset(o, 0, sizeof *o);
    o->prefill = 512;
    o->decode = 128;
    o->depth = 2048;
    o->pack = -1;
    o->config = bench_shape("--shape", "bench-1b", &o->shape);
    o->type = DSV3_BF16;
    o->mode = DSV3_EXACT;
    o->backend = DSV3_BACKEND_AUTO;
    o->attention = DSV3_ATTENTION_AUTO;
    o->cache = DSV3_BF16;
    bench_parse_flags(o, pairs, flags, parse_pair, &o->line, help, argc, argv);
    if (o->prefill + o->decode == 0) bench_usage("--prefill and --decode", "0 and 0", "one of them larger");
    if (o->sweep && o->one) bench_usage("--sweep", "--type or --mode", "none of them beside it");
    if (o->n_depths > 0 && (o->sweep || o->svg != NULL)) {
        bench_usage("--depths", "--sweep or --svg", "none of them beside it");
    }
    if (o->n_depths > 0 && o->decode == 0) bench_usage("--depths", "--decode 0", "tokens to decode");
    if (o->repeat == 0) o->repeat = o->sweep ? 2 : 3;
    if (o->threads == 0 && o->sweep) o->threads = 2;
    if (o->pack < 0) o->pack = o->sweep;
    if (o->decode == 0) o->depth = 0;
}

/* ---- A model, and how it is run: what a case is measured with */

typedef struct bench_run {
    const bench_options *options;
    dsv3_context context;
    bench_synthetic *synthetic;
    dsv3_type type;
    dsv3_cache cache;
    dsv3_workspace workspace;
    size_t capacity; /* positions of the cache */
    size_t cache_bytes, workspace_bytes;
    void *cache_memory, *workspace_memory;
    float *logits;  /* [V] */
    int32_t *token; /* [capacity] */
} bench_run;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }
static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static void run_init(bench_run *r, const bench_options *o, bench_synthetic *synthetic, const dsv3_context *context) {
    const dsv3_config *c = &o->config;
    size_t rows = larger(1, smaller(o->prefill, CHUNK)), V = (size_t)c->vocab_size;
    dsv3_rng rng = {1};
    memset(r, 0, sizeof *r);
    r->options = o;
    r->context = *context;
    r->synthetic = synthetic;
    r->type = synthetic->type;
    r->capacity = larger(o->prefill, larger(o->decode, o->depth + DEEP));
    for (size_t i = 0; i < o->n_depths; i++) r->capacity = larger(r->capacity, o->depths[i] + DEEP);
    bench_check(dsv3_cache_size(c, r->capacity, o->cache, &r->cache_bytes, NULL), "dsv3_cache_size");
    bench_check(dsv3_workspace_size(c, rows, context->threads, &r->workspace_bytes, NULL), "dsv3_workspace_size");
    r->cache_memory = bench_alloc(r->cache_bytes);
    r->workspace_memory = bench_alloc(r->workspace_bytes);
    memset(r->workspace_memory, 0, r->workspace_bytes); /* the system hands out the pages now, not while we measure */
    bench_check(dsv3_cache_init(c, &r->cache, r->capacity, o->cache, r->cache_memory, r->cache_bytes, NULL),
                "dsv3_cache_init");
    bench_check(
        dsv3_workspace_init(c, &r->workspace, rows, context->threads, r->workspace_memory, r->workspace_bytes, NULL),
        "dsv3_workspace_init");
    bench_cache_fill(&r->cache, r->capacity);
    r->logits = (float *)bench_alloc(V * sizeof *r->logits);
    r->token = (int32_t *)bench_alloc(r->capacity * sizeof *r->token);
    for (size_t i = 0; i < r->capacity; i++) r->token[i] = (int32_t)(dsv3_random(&rng) % V);
}

static void run_free(bench_run *r) {
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
        dsv3_forward(&r->context, r->logits, &r->synthetic->model, &r->cache, 1, &batch, &r->workspace, &error),
        "dsv3_forward", &error);
}

/* tokens/s of one prefill from an empty cache */
static double run_prefill(bench_run *r) {
    size_t P = r->options->prefill;
    double begin = bench_now();
    bench_check(dsv3_cache_truncate(&r->cache, 0, NULL), "dsv3_cache_truncate");
    for (size_t t = 0; t < P; t += CHUNK) {
        size_t end = smaller(t + CHUNK, P);
        run_forward(r, t, end, end == P);
    }
    return P > 0 ? (double)P / (bench_now() - begin) : 0.0;
}

/* tokens/s of D decode steps behind `depth` tokens, whatever they were: the cache was filled in the beginning */
static double run_decode(bench_run *r, size_t depth, size_t D) {
    double begin = bench_now();
    r->cache.length = depth;
    for (size_t t = depth; t < depth + D; t++) run_forward(r, t, t + 1, 1);
    return D > 0 ? (double)D / (bench_now() - begin) : 0.0;
}

/* ---- A case: one type, mode, packing and number of threads */

typedef struct bench_case {
    dsv3_type type;
    dsv3_compute mode;
    const char *backend;
    size_t threads, deep; /* deep: tokens decoded behind `depth` */
    int packed;
    bench_stat prefill, decode, at_depth; /* tokens/s */
    bench_limits limits;
    size_t active_bytes, weight_bytes;
    double flops, token_flops; /* of the prefill; of a decoded token, attention left out */
    double touched;            /* bytes of weights that the prefill reads once: all of them, without the embedding */
    double memory;             /* bytes, the most so far */
} bench_case;

static void case_measure(bench_case *k, bench_run *r, bench_reader *reader) {
    const bench_options *o = r->options;
    const bench_synthetic *s = r->synthetic;
    const dsv3_config *c = &o->config;
    double prefill[MAX_REPEAT], decode[MAX_REPEAT], at_depth[MAX_REPEAT];
    memset(k, 0, sizeof *k);
    k->type = r->type;
    k->mode = r->context.compute;
    k->backend = r->context.backend;
    k->threads = r->context.threads;
    k->packed = s->packed != NULL;
    k->deep = o->depth > 0 ? smaller(o->decode, DEEP) : 0;
    k->active_bytes = s->active_bytes;
    k->weight_bytes = s->weight_bytes;
    k->flops = o->prefill > 0 ? bench_prefill_flops(s, o->prefill) : 0.0;
    k->token_flops = 2.0 * ((double)s->active_macs + (double)c->vocab_size * (double)c->hidden_size);
    k->touched = (double)s->weight_bytes;
    for (size_t i = 0; i < s->count; i++) {
        const bench_tensor *t = &s->tensors[i];
        if (t->info.kind == DSV3_KIND_EMBED || t->info.layer >= c->num_hidden_layers) {
            k->touched -= (double)(t->bytes + t->scale_bytes);
        }
    }
    for (size_t i = 0; i < o->repeat; i++) {
        prefill[i] = run_prefill(r);
        decode[i] = run_decode(r, 0, o->decode);
        at_depth[i] = run_decode(r, o->depth, k->deep);
        if (i == 0) { /* all memory of the model has been touched; the buffer below is not its own */
            k->memory = bench_peak_bytes();
            if (reader->words == NULL) bench_reader_init(reader, &r->context);
        }
        bench_limits_pass(&k->limits, reader, &r->context, LIMIT_PASSES);
    }
    k->prefill = bench_summary(prefill, o->repeat);
    k->decode = bench_summary(decode, o->repeat);
    k->at_depth = bench_summary(at_depth, o->repeat);
}

static double ratio(double a, double b) { return b > 0.0 ? a / b : 0.0; }

static double decode_share(const bench_case *k) {
    return ratio(k->decode.median * (double)k->active_bytes, k->limits.read);
}

static bench_kind case_kind(const bench_case *k) { return bench_limits_kind(&k->limits, k->type, k->mode); }

/* operations/s of the prefill */
static double prefill_speed(const bench_options *o, const bench_case *k) {
    return o->prefill > 0 ? k->flops * k->prefill.median / (double)o->prefill : 0.0;
}

static double prefill_share(const bench_options *o, const bench_case *k) {
    return ratio(prefill_speed(o, k), k->limits.peak[case_kind(k)]);
}

/* The kind of tiles that the backend has instead; the same kind: none. */
static bench_kind case_tiles(const bench_case *k) { return bench_limits_tiles(&k->limits, case_kind(k), k->backend); }

static double tile_share(const bench_options *o, const bench_case *k) {
    return case_tiles(k) == case_kind(k) ? 0.0 : ratio(prefill_speed(o, k), k->limits.peak[case_tiles(k)]);
}

/* ---- What is printed of cases */

static void print_line(const bench_options *o, const bench_case *k) {
    bench_kind kind = case_kind(k);
    printf("shape=%s type=%s mode=%s backend=%s threads=%zu prefill%zu=%.2f decode%zu=%.2f decode_at%zu=%.2f "
           "read_gbs=%.2f decode_share=%.4f prefill_share=%.4f packed=%d bytes_per_token=%zu prefill_gflop=%.2f "
           "peak=%.2f peak_kind=%s tile_share=%.4f tile_peak=%.2f at%zu_ratio=%.4f cache=%s peak_mib=%.1f\n",
           o->shape, dsv3_type_name(k->type), bench_mode_names[k->mode], k->backend, k->threads, o->prefill,
           k->prefill.median, o->decode, k->decode.median, o->depth, k->at_depth.median, 1e-9 * k->limits.read,
           decode_share(k), prefill_share(o, k), k->packed, k->active_bytes, 1e-9 * k->flops,
           1e-9 * k->limits.peak[kind], bench_kind_names[kind], tile_share(o, k),
           case_tiles(k) == kind ? 0.0 : 1e-9 * k->limits.peak[case_tiles(k)], o->depth,
           ratio(k->at_depth.median, k->decode.median), dsv3_type_name(o->cache), k->memory / 1048576.0);
    fflush(stdout);
}

static void print_size(const char *what, double bytes) {
    printf("  %-22s %15.0f %11.1f MiB\n", what, bytes, bytes / 1048576.0);
}

static void print_speed(const char *what, size_t tokens, size_t count, const bench_stat *s) {
    char name[64];
    snprintf(name, sizeof name, "%s %zu", what, tokens);
    if (count > 0) printf("  %-22s %15.2f %11.2f %11.2f\n", name, s->median, s->min, s->max);
}

static const char *attention_name(dsv3_attention form) {
    static const char *const forms[] = {"auto", "absorbed", "expanded"};
    return forms[form];
}

static void print_table(const bench_run *r, const bench_case *k) {
    const bench_options *o = r->options;
    bench_kind kind = case_kind(k);
    printf("%s %s, mode %s, backend %s%s, threads %zu, attention %s, cache %s, repeats %zu\n", o->shape,
           dsv3_type_name(k->type), bench_mode_names[k->mode], k->backend, k->packed ? " (packed)" : "", k->threads,
           attention_name(o->attention), dsv3_type_name(o->cache), o->repeat);
    bench_print_machine(&r->context);
    bench_print_limits(&k->limits);
    printf("\n  %-22s %15s %11s %11s\n", "tokens/s", "median", "min", "max");
    print_speed("prefill", o->prefill, o->prefill, &k->prefill);
    print_speed("decode", o->decode, o->decode, &k->decode);
    print_speed("decode at", o->depth, k->deep, &k->at_depth);
    printf("\n  shares of the limits\n");
    if (o->decode > 0) {
        printf("  %-22s %15.2f of %.2f GB/s\n", "decode reads", 1e-9 * k->decode.median * (double)k->active_bytes,
               1e-9 * k->limits.read);
        printf("  %-22s %15.4f\n", "decode share", decode_share(k));
    }
    if (k->deep > 0) {
        printf("  at %-19zu %15.4f of an empty cache\n", o->depth, ratio(k->at_depth.median, k->decode.median));
    }
    if (o->prefill > 0) {
        printf("  %-22s %15.2f of %.2f GFLOP/s (%s)\n", "prefill computes", 1e-9 * prefill_speed(o, k),
               1e-9 * k->limits.peak[kind], bench_kind_names[kind]);
        printf("  %-22s %15.4f\n", "prefill share", prefill_share(o, k));
        if (case_tiles(k) != kind) {
            printf("  %-22s %15.4f of %.2f GFLOP/s (%s)\n", "share of tiles", tile_share(o, k),
                   1e-9 * k->limits.peak[case_tiles(k)], bench_kind_names[case_tiles(k)]);
        }
        printf("  %-22s %15.2f GFLOP\n", "prefill", 1e-9 * k->flops);
    }
    printf("\n  %-22s %15s\n", "memory", "bytes");
    print_size("weights per token", (double)k->active_bytes);
    print_size("weights", (double)k->weight_bytes);
    if (k->packed) print_size("packed weights", (double)r->synthetic->packed_bytes);
    print_size("model tables", (double)r->synthetic->table_bytes);
    print_size("cache", (double)r->cache_bytes);
    print_size("workspace", (double)r->workspace_bytes);
    print_size("peak", k->memory);
}

static void print_sweep_head(const bench_options *o, const dsv3_context *context) {
    char text[32];
    printf("%s, backend %s, attention %s, cache %s, repeats %zu\n", o->shape, context->backend,
           attention_name(o->attention), dsv3_type_name(o->cache), o->repeat);
    bench_print_machine(context);
    printf("\n  %-8s %-5s %7s %6s", "type", "mode", "threads", "packed");
    snprintf(text, sizeof text, "prefill %zu", o->prefill);
    printf(" %13s %6s %-4s %8s", text, "share", "of", "GFLOP/s");
    snprintf(text, sizeof text, "decode %zu", o->decode);
    printf(" %12s %6s %7s", text, "share", "of GB/s");
    snprintf(text, sizeof text, "at %zu", o->depth);
    printf(" %10s %6s\n", text, "ratio");
}

static void print_sweep_row(const bench_options *o, const bench_case *k) {
    bench_kind kind = case_kind(k);
    printf("  %-8s %-5s %7zu %6s", dsv3_type_name(k->type), bench_mode_names[k->mode], k->threads,
           k->packed ? "yes" : "no");
    printf(" %13.2f %6.3f %-4s %8.0f", k->prefill.median, prefill_share(o, k), bench_kind_names[kind],
           1e-9 * k->limits.peak[kind]);
    printf(" %12.2f %6.3f %7.1f", k->decode.median, decode_share(k), 1e-9 * k->limits.read);
    printf(" %10.2f %6.3f\n", k->at_depth.median, ratio(k->at_depth.median, k->decode.median));
    fflush(stdout);
}

/* ---- The roofline picture */

static void picture_add(roofline *picture, const bench_case *k, const char *what, double flops, double bytes,
                        double speed) {
    roofline_point *p = &picture->point[picture->count];
    if (speed <= 0.0 || picture->count == ROOFLINE_POINTS) return;
    picture->count++;
    snprintf(p->label, sizeof p->label, "%s %s%s", dsv3_type_name(k->type), what,
             k->mode == DSV3_FAST ? " fast" : "");
    p->intensity = flops / bytes;
    p->speed = speed;
    p->colour = (int)k->type;
    p->square = k->mode == DSV3_FAST;
}

static void picture_write(const bench_options *o, const bench_case *cases, size_t n, size_t threads) {
    static roofline picture;
    char title[96], subtitle[512], cpu[256];
    FILE *file;
    bench_limits limits;
    memset(&limits, 0, sizeof limits);
    for (size_t i = 0; i < n; i++) {
        const bench_case *k = &cases[i];
        if (k->threads != threads) continue;
        if (k->limits.read > limits.read) limits.read = k->limits.read;
        for (int j = 0; j < BENCH_KINDS; j++) {
            if (k->limits.peak[j] > limits.peak[j]) limits.peak[j] = k->limits.peak[j];
        }
        picture_add(&picture, k, "prefill", k->flops, k->touched, prefill_speed(o, k));
        picture_add(&picture, k, "decode", k->token_flops, (double)k->active_bytes,
                    k->decode.median * k->token_flops);
    }
    snprintf(title, sizeof title, "%s: prefill of %zu tokens and decode", o->shape, o->prefill);
    snprintf(subtitle, sizeof subtitle, "%s, %zu threads, backend %s. Discs: exact, squares: fast",
             bench_cpu(cpu, sizeof cpu), threads, cases[0].backend);
    picture.title = title;
    picture.subtitle = subtitle;
    picture.read = limits.read;
    for (int j = 0; j < BENCH_KINDS; j++) {
        if (limits.peak[j] <= 0.0) continue;
        picture.roof_name[picture.roofs] = bench_kind_titles[j];
        picture.roof[picture.roofs++] = limits.peak[j];
    }
    if (picture.roofs == 0 || picture.read <= 0.0) bench_die(o->svg, "no limits are known on this machine");
    file = fopen(o->svg, "w");
    if (file == NULL || !roofline_write(file, &picture) || fclose(file) != 0) bench_die(o->svg, "cannot be written");
}

/* ---- Decode at several depths */

static void depths_run(bench_run *r) {
    const bench_options *o = r->options;
    const dsv3_config *c = &o->config;
    const bench_synthetic *s = r->synthetic;
    size_t D = smaller(o->decode, DEEP);
    static double speed[MAX_DEPTHS][MAX_REPEAT];
    double first = 0.0, first_limit = 0.0;
    bench_limits limits;
    bench_reader reader;
    memset(&limits, 0, sizeof limits);
    bench_reader_init(&reader, &r->context);
    for (size_t i = 0; i < o->repeat; i++) {
        for (size_t d = 0; d < o->n_depths; d++) speed[d][i] = run_decode(r, o->depths[d], D);
        bench_limits_pass(&limits, &reader, &r->context, LIMIT_PASSES);
    }
    bench_reader_free(&reader);
    if (!o->line) {
        printf("%s %s, mode %s, backend %s%s, threads %zu, cache %s, repeats %zu of %zu tokens\n", o->shape,
               dsv3_type_name(r->type), bench_mode_names[r->context.compute], r->context.backend,
               s->packed != NULL ? " (packed)" : "", r->context.threads, dsv3_type_name(o->cache), o->repeat, D);
        bench_print_machine(&r->context);
        bench_print_limits(&limits);
        printf("\n  %7s %10s %10s %10s %7s %9s %9s %8s %7s %9s %7s\n", "depth", "tokens/s", "min", "max", "ratio",
               "weights", "cache MB", "GB/s", "share", "GFLOP", "limit");
    }
    for (size_t d = 0; d < o->n_depths; d++) {
        bench_stat t = bench_summary(speed[d], o->repeat);
        double seen = (double)o->depths[d] + 0.5 * (double)(D + 1);
        double cache = bench_cache_bytes(c, o->cache, seen), bytes = (double)s->active_bytes + cache;
        double flops = (double)c->num_hidden_layers * seen * bench_pair_flops(c, 1);
        double reading = ratio(cache, limits.read), computing = ratio(flops, limits.peak[BENCH_FMA]);
        double limit =
            1.0 / (ratio((double)s->active_bytes, limits.read) + (reading > computing ? reading : computing));
        double share = ratio(t.median * bytes, limits.read);
        if (d == 0) first = t.median;
        if (d == 0) first_limit = limit;
        if (o->line) {
            printf(
                "shape=%s type=%s mode=%s backend=%s threads=%zu depth=%zu decode=%.2f ratio=%.4f weight_bytes=%zu "
                "cache_bytes=%.0f read_gbs=%.2f decode_share=%.4f attention_gflop=%.4f limit_ratio=%.4f packed=%d "
                "cache=%s\n",
                o->shape, dsv3_type_name(r->type), bench_mode_names[r->context.compute], r->context.backend,
                r->context.threads, o->depths[d], t.median, ratio(t.median, first), s->active_bytes, cache,
                1e-9 * limits.read, share, 1e-9 * flops, ratio(limit, first_limit), s->packed != NULL,
                dsv3_type_name(o->cache));
        } else {
            printf("  %7zu %10.2f %10.2f %10.2f %7.3f %9.1f %9.1f %8.2f %7.3f %9.3f %7.3f\n", o->depths[d], t.median,
                   t.min, t.max, ratio(t.median, first), 1e-6 * (double)s->active_bytes, 1e-6 * cache,
                   1e-9 * t.median * bytes, share, 1e-9 * flops, ratio(limit, first_limit));
        }
    }
}

/* ---- Programs */

/* What one type costs to make is shared by its modes and numbers of threads. */
static size_t type_run(const bench_options *o, dsv3_type type, const dsv3_context *contexts, size_t n,
                       bench_reader *reader, bench_case *cases) {
    bench_synthetic synthetic;
    size_t done = 0;
    int plain = type == DSV3_F32 || type == DSV3_F16; /* both modes are one */
    bench_synthetic_init(&synthetic, &o->config, type, &contexts[n - 1]);
    for (int mode = DSV3_EXACT; mode <= (plain ? DSV3_EXACT : DSV3_FAST); mode++) {
        if (!o->sweep && mode != (int)o->mode && !(plain && mode == DSV3_EXACT)) continue;
        for (size_t i = 0; i < n; i++) {
            dsv3_context context = contexts[i];
            bench_run r;
            context.compute = o->sweep ? (dsv3_compute)mode : o->mode;
            if (i == 0) bench_synthetic_bind(&synthetic, &o->config);
            if (i == 0 && o->pack) bench_synthetic_pack(&synthetic, &context);
            run_init(&r, o, &synthetic, &context);
            if (o->n_depths > 0) {
                depths_run(&r);
            } else {
                bench_case *k = &cases[done++];
                case_measure(k, &r, reader);
                if (o->line) {
                    print_line(o, k);
                } else if (o->sweep) {
                    print_sweep_row(o, k);
                } else {
                    print_table(&r, k);
                }
            }
            run_free(&r);
        }
    }
    bench_synthetic_free(&synthetic);
    return done;
}

int main(int argc, char **argv) {
    static bench_options o;
    static bench_case cases[DSV3_TYPES * 2 * 2];
    dsv3_context contexts[2];
    bench_reader reader = {NULL, NULL, 0};
    size_t n = 1, done = 0;
    parse(&o, argc, argv);
    bench_context(&contexts[0], o.backend, o.sweep ? 1 : o.threads);
    if (o.sweep && o.threads > 1) bench_context(&contexts[n++], o.backend, o.threads);
    for (size_t i = 0; i < n; i++) contexts[i].attention = o.attention;
    if (o.sweep && !o.line) print_sweep_head(&o, &contexts[0]);
    for (int type = 0; type < DSV3_TYPES; type++) {
        if (!o.sweep && type != (int)o.type) continue;
        done += type_run(&o, (dsv3_type)type, contexts, n, &reader, cases + done);
    }
    if (o.svg != NULL) picture_write(&o, cases, done, contexts[n - 1].threads);
    bench_reader_free(&reader);
    return fflush(stdout) != 0 || ferror(stdout);
}
