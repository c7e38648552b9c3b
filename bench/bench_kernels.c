/* bench_kernels -- each inner loop, of all backends and of the engine, and the product of weights and activations
 * (dsv3_linear), alone, beside the limits of the machine. How to read the numbers: bench/README.md. */
#define BENCH_NAME "bench_kernels"
#include "bench.h"

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#define LIMIT_PASSES 5
#define PASSES 5                      /* of each measurement; the best counts */
#define FAR_BYTES ((size_t)128 << 20) /* what is read from memory lies in so many bytes */
#define NEAR 2048u                    /* numbers of an array that stays in the first cache */
#define MOST_ROWS 512u
#define MAX_LIST 16
#define MAX_THREADS 1024

static const char help[] =
    "usage: bench_kernels [options]\n"
    "Inner loops on one thread, then products with weights on all; bench/README.md explains the numbers.\n"
    "  --backend NAME    default: every one that this machine can run, one after the other\n"
    "  --what W          kernels, linear, all (default)\n"
    "  --type T          of the weights: F32, F16, BF16, F8_E4M3, Q8_0, Q4_0; default: each\n"
    "  --mode M          activations of products: exact, fast; default: each\n"
    "  --pack P          1: weights of products in the order of the backend, 0: as they are; default: each\n"
    "  --rows LIST       activation rows of a product, 1 .. 512; default 1,2,4,8,64,512\n"
    "  --threads N       of products, 1 .. 1024; default: all cores\n"
    "  --ms N            time of one pass at least, 1 .. 1000; default 4\n"
    "  --line            lines of key=value pairs instead of tables\n"
    "  --help            this text\n"
    "With more than 8 rows the reference backend is left out unless it is named.\n"
    "Exit status: 0 ok, 1 failed, 2 usage.\n";

/* ---- Options */

typedef struct bench_options {
    dsv3_backend backends[BENCH_BACKENDS];
    size_t n_backends;
    int named;            /* bool: --backend was given */
    int kernels, linear;  /* bool */
    int type, mode, pack; /* -1: each */
    size_t rows[MAX_LIST], n_rows, threads, ms;
    int line;
} bench_options;

static void parse_pair(void *options, const char *option, const char *value) {
    bench_options *o = (bench_options *)options;
    if (strcmp(option, "--backend") == 0) {
        o->backends[0] = bench_backend(option, value);
        o->n_backends = 1;
        o->named = 1;
    }
    if (strcmp(option, "--what") == 0) {
        static const char *const names[] = {"kernels", "linear", "all", NULL};
        size_t what = bench_choice(option, value, names, "kernels, linear or all");
        o->kernels = what != 1;
        o->linear = what != 0;
    }
    if (strcmp(option, "--type") == 0) o->type = (int)bench_type(option, value);
    if (strcmp(option, "--mode") == 0) o->mode = (int)bench_mode(option, value);
    if (strcmp(option, "--pack") == 0) o->pack = (int)bench_number(option, value, 0, 1);
    if (strcmp(option, "--rows") == 0)
        o->n_rows = bench_numbers(o->rows, MAX_LIST, option, value, 1, (long)MOST_ROWS);
    if (strcmp(option, "--threads") == 0) o->threads = bench_number(option, value, 1, MAX_THREADS);
    if (strcmp(option, "--ms") == 0) o->ms = bench_number(option, value, 1, 1000);
}

static void parse(bench_options *o, int argc, char **argv) {
    static const char *const pairs[] = {"--pack", "--backend", "--what", "--type", "--mode",
                                        "--rows", "--threads", "--ms",   NULL};
    static const size_t rows[] = {1, 2, 4, 8, 64, 512};
    memset(o, 0, sizeof *o);
    o->n_backends = bench_backends(o->backends, NULL);
    o->kernels = o->linear = 1;
    o->type = o->mode = o->pack = -1;
    o->n_rows = sizeof rows / sizeof *rows;
    memcpy(o->rows, rows, sizeof rows);
    o->ms = 4;
    bench_parse(o, pairs, parse_pair, &o->line, help, argc, argv);
}

/* ---- Timing: calls until a pass takes long enough, then the best of some passes */

/* One call, the i-th: large data is not that of the last call. */
typedef void (*bench_call)(void *arg, size_t i);

static double seconds_per_call(const bench_options *o, bench_call call, void *arg) {
    size_t calls = 1, next = 0;
    double least = 1e-3 * (double)o->ms, best;
    for (;;) {
        double begin = bench_now();
        for (size_t i = 0; i < calls; i++) call(arg, next++);
        best = bench_now() - begin;
        if (best >= least) break;
        calls = best > 0.05 * least ? (size_t)((double)calls * 1.2 * least / best) + 1 : 8 * calls;
    }
    best /= (double)calls;
    for (int p = 1; p < PASSES; p++) {
        double begin = bench_now(), seconds;
        for (size_t i = 0; i < calls; i++) call(arg, next++);
        seconds = (bench_now() - begin) / (double)calls;
        if (seconds < best) best = seconds;
        if (best > 10.0 * least) break; /* slow enough to be sure */
    }
    return best;
}

static double ratio(double a, double b) { return b > 0.0 ? a / b : 0.0; }

/* ---- Kernels. Their weights: many rows of NEAR numbers of one type */

typedef struct bench_weights {
    bench_tensor tall;
    unsigned char *arena;
} bench_weights;

static void weights_init(bench_weights *w, const dsv3_context *context, dsv3_type type, size_t rows, size_t cols) {
    bench_tensor *t = &w->tall;
    memset(w, 0, sizeof *w);
    t->info.rank = t->tensor.rank = 2;
    t->info.expert = -1;
    t->info.kind = DSV3_KIND_DENSE;
    t->info.rows = t->tensor.rows = rows;
    t->info.cols = t->tensor.cols = cols;
    t->tensor.type = type;
    t->bytes = rows * dsv3_row_bytes(type, cols);
    t->scale_at = bench_blocks(t->bytes, BENCH_ALIGN) * BENCH_ALIGN;
    if (type == DSV3_F8_E4M3) {
        t->scale_bytes = bench_blocks(rows, DSV3_BLOCK) * bench_blocks(cols, DSV3_BLOCK) * sizeof(float);
    }
    w->arena = (unsigned char *)bench_alloc(t->scale_at + t->scale_bytes + BENCH_ALIGN);
    bench_fill_tensor(context, t, w->arena, 99);
    t->tensor.data = w->arena;
    t->tensor.scale = t->scale_bytes > 0 ? w->arena + t->scale_at : NULL;
}

typedef void (*bench_round)(void *out, const float *x, size_t k);
typedef void (*bench_tile)(float *y, size_t ldy, const float *x, size_t ldx, size_t nx, const float *w, size_t ldw,
                           size_t nw, size_t k);
typedef void (*bench_outer)(float *y, size_t ldy, size_t m, const float *a, size_t at, size_t aj, const float *b,
                            size_t ldb, size_t k, size_t n);

typedef struct bench_kernel {
    const dsv3i_ops *ops;
    bench_round round[DSV3_TYPES]; /* NULL: activations stay as they are */
    bench_tile tile;               /* NULL: the backend has none */
    bench_outer outer;
    const bench_weights *w; /* rows of NEAR numbers */
    dsv3_type type;
    size_t n, rows;   /* rows: of w; 1: always the same */
    float *x, *y, *z; /* [64 NEAR] */
} bench_kernel;

static const void *kernel_row(const bench_kernel *b, size_t i) {
    return b->w->arena + i % b->rows * dsv3_row_bytes(b->type, NEAR);
}

static volatile float sink; /* results go here, so that nothing is left out */

static void call_decode(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    b->ops->decode[b->type](b->y, kernel_row(b, i), b->n);
}
static void call_dot(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    sink = b->ops->dot(b->x, (const float *)kernel_row(b, i), b->n);
}
static void call_axpy(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    b->ops->axpy(b->y, 1e-6f, (const float *)kernel_row(b, i), b->n);
}
static void call_exp_sum(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    (void)i;
    sink = b->ops->exp_sum(b->y, b->x, 1.0f, b->n);
}
static void call_silu_mul(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    (void)i;
    b->ops->silu_mul(b->y, b->x, b->z, b->n);
}
static void call_round(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    (void)i;
    b->round[b->type](b->y, b->x, b->n);
}
/* 64 rows by 64 rows of n; and 64 rows from 64 rows of n. */
static void call_tile(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    (void)i;
    b->tile(b->y, 64, b->x, b->n, 64, b->z, b->n, 64, b->n);
}
static void call_outer(void *arg, size_t i) {
    bench_kernel *b = (bench_kernel *)arg;
    (void)i;
    b->outer(b->y, b->n, 64, b->x, 64, 1, b->z, b->n, 64, b->n);
}

static void round_bf16(void *out, const float *x, size_t k) { dsv3i_round_bf16((float *)out, x, k); }
static void round_q8(void *out, const float *x, size_t k) { dsv3i_round_q8((float *)out, x, k); }

/* What the backend has beside its vectors. */
static void kernel_find(bench_kernel *b, const dsv3_context *c) {
    b->ops = c->ops;
    b->round[DSV3_BF16] = b->round[DSV3_F8_E4M3] = round_bf16;
    b->round[DSV3_Q8_0] = b->round[DSV3_Q4_0] = round_q8;
#ifdef DSV3I_ENGINE
    if (c->ops->own != NULL) {
        memcpy(b->round, dsv3i_kernels_of(c)->round, sizeof b->round);
        b->tile = dsv3i_kernels_of(c)->tile;
        b->outer = dsv3i_kernels_of(c)->outer;
    }
#endif
}

static void kernel_print(const bench_options *o, const dsv3_context *c, const bench_limits *l, const char *name,
                         const bench_kernel *b, const char *where, double seconds, double flops, double bytes) {
    double gflops = 1e-9 * flops / seconds, gbs = 1e-9 * bytes / seconds;
    double share = bytes > 0.0 ? ratio(1e9 * gbs, l->read) : ratio(1e9 * gflops, l->peak[BENCH_FMA]);
    if (o->line) {
        printf("kernel=%s type=%s backend=%s n=%zu data=%s ns=%.1f gnumbers_s=%.3f gflops=%.2f gbs=%.2f share=%.4f "
               "limit=%s\n",
               name, dsv3_type_name(b->type), c->backend, b->n, where, 1e9 * seconds, 1e-9 * (double)b->n / seconds,
               gflops, gbs, share,
               bytes > 0.0   ? "read"
               : flops > 0.0 ? "fma"
                             : "none");
    } else {
        printf("  %-9s %-8s %-12s %5zu %-6s %11.1f %9.2f", name, dsv3_type_name(b->type), c->backend, b->n, where,
               1e9 * seconds, 1e-9 * (double)b->n / seconds);
        if (flops > 0.0) printf(" %9.2f", gflops);
        if (flops <= 0.0) printf(" %9s", "-");
        if (bytes > 0.0) printf(" %8.2f %6.3f read\n", gbs, share);
        if (bytes <= 0.0 && flops > 0.0) printf(" %8s %6.3f fma\n", "-", share);
        if (bytes <= 0.0 && flops <= 0.0) printf(" %8s %6s\n", "-", "-");
    }
    fflush(stdout);
}

static void kernels_run(const bench_options *o, const dsv3_context *c, const bench_limits *l) {
    typedef struct entry {
        const char *name;
        bench_call call;
        double flops; /* for each of n numbers */
        size_t n;
        int far; /* bool: also with data from memory */
    } entry;
    static const entry entries[] = {{"dot", call_dot, 2, NEAR, 1},
                                    {"axpy", call_axpy, 2, NEAR, 1},
                                    {"exp_sum", call_exp_sum, 0, NEAR, 0},
                                    {"silu_mul", call_silu_mul, 0, NEAR, 0},
                                    {"tile", call_tile, 2 * 64 * 64, 128, 0},
                                    {"tile", call_tile, 2 * 64 * 64, 1024, 0},
                                    {"outer", call_outer, 2 * 64 * 64, 128, 0},
                                    {"outer", call_outer, 2 * 64 * 64, 1024, 0}};
    dsv3_rng rng = {5};
    bench_kernel b;
    memset(&b, 0, sizeof b);
    kernel_find(&b, c);
    b.x = (float *)bench_alloc(3 * 64 * NEAR * sizeof(float));
    b.y = b.x + 64 * NEAR;
    b.z = b.y + 64 * NEAR;
    for (size_t i = 0; i < 3 * 64 * NEAR; i++) b.x[i] = 2.0f * dsv3_random_uniform(&rng) - 1.0f;
    if (!o->line) {
        printf("\n  %-9s %-8s %-12s %5s %-6s %11s %9s %9s %8s %6s of\n", "kernel", "type", "backend", "n", "data",
               "ns", "10^9/s", "GFLOP/s", "GB/s", "share");
    }
    for (int t = 0; t < DSV3_TYPES; t++) {
        bench_weights w;
        size_t row = dsv3_row_bytes((dsv3_type)t, NEAR), all = FAR_BYTES / row;
        if (o->type >= 0 && t != o->type) continue;
        weights_init(&w, c, (dsv3_type)t, all, NEAR);
        b.w = &w;
        b.type = (dsv3_type)t;
        b.n = NEAR;
        for (int far = 0; far < 2; far++) {
            b.rows = far ? all : 1;
            kernel_print(o, c, l, "decode", &b, far ? "memory" : "cache", seconds_per_call(o, call_decode, &b), 0.0,
                         far ? (double)row : 0.0);
        }
        if (b.round[t] != NULL) {
            kernel_print(o, c, l, "round", &b, "cache", seconds_per_call(o, call_round, &b), 0.0, 0.0);
        }
        for (size_t e = 0; t == DSV3_F32 && e < sizeof entries / sizeof *entries; e++) {
            const entry *k = &entries[e];
            if ((k->call == call_tile && b.tile == NULL) || (k->call == call_outer && b.outer == NULL)) continue;
            b.n = k->n;
            for (int far = 0; far <= k->far; far++) {
                b.rows = far ? all : 1;
                kernel_print(o, c, l, k->name, &b, far ? "memory" : "cache", seconds_per_call(o, k->call, &b),
                             k->flops * (double)b.n, far ? (double)row : 0.0);
            }
        }
        free(w.arena);
    }
    free(b.x);
}

/* ---- Products with weights, through the public op. The matrices are the experts' of a model with one layer, because
 * models can be packed. */

#define MOST_EXPERTS 256u

typedef struct bench_linear {
    const dsv3_context *context;
    bench_synthetic synthetic;
    dsv3_tensor matrix[2 * MOST_EXPERTS]; /* [matrices, rows, cols] gate_proj and up_proj of each expert */
    size_t matrices, n;
    float *x, *y, *scratch;
} bench_linear;

static dsv3_config linear_config(size_t rows, size_t cols, size_t experts) {
    dsv3_config c = bench_config_1b();
    c.vocab_size = 16;
    c.num_hidden_layers = 1;
    c.first_k_dense_replace = 0;
    c.hidden_size = (int32_t)cols;
    c.moe_intermediate_size = (int32_t)rows;
    c.n_routed_experts = (int32_t)experts;
    c.n_shared_experts = 0;
    c.num_experts_per_tok = 1;
    c.n_group = c.topk_group = 1;
    return c;
}

static void linear_init(bench_linear *b, const dsv3_context *context, dsv3_type type, size_t rows, size_t cols) {
    size_t experts = FAR_BYTES / (2 * rows * dsv3_row_bytes(type, cols)) + 2;
    dsv3_config config;
    dsv3_rng rng = {3};
    memset(b, 0, sizeof *b);
    if (experts > MOST_EXPERTS) experts = MOST_EXPERTS;
    config = linear_config(rows, cols, experts);
    b->context = context;
    b->matrices = 2 * experts;
    bench_synthetic_init(&b->synthetic, &config, type, context);
    b->x = (float *)bench_alloc(MOST_ROWS * cols * sizeof *b->x);
    b->y = (float *)bench_alloc(MOST_ROWS * rows * sizeof *b->y);
    for (size_t i = 0; i < MOST_ROWS * cols; i++) b->x[i] = 2.0f * dsv3_random_uniform(&rng) - 1.0f;
}

/* The matrices as they lie now, packed or not. */
static void linear_collect(bench_linear *b) {
    for (size_t e = 0; e < b->matrices / 2; e++) {
        b->matrix[2 * e] = b->synthetic.model.layers[0].experts[e].gate_proj;
        b->matrix[2 * e + 1] = b->synthetic.model.layers[0].experts[e].up_proj;
    }
}

static void linear_free(bench_linear *b) {
    bench_synthetic_free(&b->synthetic);
    free(b->x);
    free(b->y);
}

static void call_linear(void *arg, size_t i) {
    const bench_linear *b = (const bench_linear *)arg;
    dsv3_linear(b->context, b->y, b->x, &b->matrix[i % b->matrices], b->n, b->scratch, NULL);
}

static void linear_print(const bench_options *o, const bench_linear *b, const bench_limits *l, double seconds) {
    const dsv3_context *c = b->context;
    const dsv3_tensor *t = &b->matrix[0];
    bench_kind kind = bench_limits_tiles(l, bench_limits_kind(l, t->type, c->compute), c->backend);
    double flops = 2.0 * (double)(b->n * t->rows) * (double)t->cols;
    double bytes = (double)(t->rows * dsv3_row_bytes(t->type, t->cols));
    double reading, computing, share;
    if (t->type == DSV3_F8_E4M3) {
        bytes += (double)(bench_blocks(t->rows, DSV3_BLOCK) * bench_blocks(t->cols, DSV3_BLOCK) * sizeof(float));
    }
    reading = ratio(bytes, l->read);
    computing = ratio(flops, l->peak[kind]);
    share = (reading > computing ? reading : computing) / seconds;
    if (o->line) {
        printf("op=linear type=%s mode=%s backend=%s threads=%zu packed=%d rows=%zu cols=%zu n=%zu us=%.2f "
               "gflops=%.2f gbs=%.2f "
               "share=%.4f limit=%s\n",
               dsv3_type_name(t->type), bench_mode_names[c->compute], c->backend, c->threads, t->packed != 0, t->rows,
               t->cols, b->n, 1e6 * seconds, 1e-9 * flops / seconds, 1e-9 * bytes / seconds, share,
               reading > computing ? "read" : bench_kind_names[kind]);
    } else {
        printf("  %-8s %-5s %-12s %-6s %5zu x %-5zu %4zu %11.1f %9.2f %8.2f %6.3f %s\n", dsv3_type_name(t->type),
               bench_mode_names[c->compute], c->backend, t->packed ? "yes" : "no", t->rows, t->cols, b->n,
               1e6 * seconds, 1e-9 * flops / seconds, 1e-9 * bytes / seconds, share,
               reading > computing ? "read" : bench_kind_names[kind]);
    }
    fflush(stdout);
}

/* One packing, all modes and numbers of rows. */
static void linear_modes(const bench_options *o, bench_linear *b, dsv3_context *c, const bench_limits *l) {
    int reference = strcmp(c->backend, dsv3_backend_name(DSV3_BACKEND_REFERENCE)) == 0;
    dsv3_type type = b->matrix[0].type;
    size_t bytes;
    for (int mode = DSV3_EXACT; mode <= DSV3_FAST; mode++) {
        if (o->mode >= 0 ? mode != o->mode : mode == DSV3_FAST && (type == DSV3_F32 || type == DSV3_F16)) continue;
        c->compute = (dsv3_compute)mode;
        for (size_t i = 0; i < o->n_rows; i++) {
            b->n = o->rows[i];
            if (reference && !o->named && b->n > 8) continue;
            if (dsv3_linear_size(c, b->n, b->matrix[0].cols, &bytes, NULL) != DSV3_OK) bench_die("scratch", "is too large");
            b->scratch = (float *)bench_alloc(bytes);
            linear_print(o, b, l, seconds_per_call(o, call_linear, b));
            free(b->scratch);
        }
    }
}

static void linear_run(const bench_options *o, dsv3_context *c, const bench_limits *l) {
    static const size_t sizes[][2] = {{512, 1024}, {1024, 512}, {1024, 1024}, {4096, 1024}, {2048, 7168}};
    static bench_linear b;
    if (!o->line) {
        printf("\n  %-8s %-5s %-12s %-6s %13s %4s %11s %9s %8s %6s of\n", "type", "mode", "backend", "packed",
               "rows x cols", "n", "us", "GFLOP/s", "GB/s", "share");
    }
    for (int t = 0; t < DSV3_TYPES; t++) {
        if (o->type >= 0 && t != o->type) continue;
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            linear_init(&b, c, (dsv3_type)t, sizes[s][0], sizes[s][1]);
            linear_collect(&b);
            if (o->pack != 1) linear_modes(o, &b, c, l);
            if (o->pack != 0) {
                bench_synthetic_pack(&b.synthetic, c);
                linear_collect(&b);
                if (b.synthetic.packed != NULL || o->pack == 1) linear_modes(o, &b, c, l);
            }
            linear_free(&b);
        }
    }
}

/* Before each backend; the best of all so far counts. */
static void limits_measure(bench_limits *l, const dsv3_context *context) {
    bench_reader reader;
    bench_reader_init(&reader, context);
    bench_limits_pass(l, &reader, context, LIMIT_PASSES);
    bench_reader_free(&reader);
}

int main(int argc, char **argv) {
    static bench_options o;
    bench_limits one, all;
    memset(&one, 0, sizeof one);
    memset(&all, 0, sizeof all);
    parse(&o, argc, argv);
    for (size_t i = 0; i < o.n_backends; i++) {
        dsv3_context single, context;
        bench_context(&single, o.backends[i], 1);
        bench_context(&context, o.backends[i], o.threads);
        if (o.kernels) {
            limits_measure(&one, &single);
            if (!o.line && i == 0) bench_print_machine(&single);
            if (!o.line) bench_print_limits(&one);
            kernels_run(&o, &single, &one);
        }
        if (!o.line && o.kernels && o.linear) printf("\n");
        if (o.linear) {
            limits_measure(&all, &context);
            if (!o.line) printf("%zu threads\n", context.threads);
            if (!o.line) bench_print_limits(&all);
            linear_run(&o, &context, &all);
        }
        if (!o.line && i + 1 < o.n_backends) printf("\n");
    }
    return fflush(stdout) != 0 || ferror(stdout);
}
