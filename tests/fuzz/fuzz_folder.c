/* A whole checkpoint folder, config.json, the header of its weights and their numbers altered together: what is opened is
 * run, saved, and opened again, with the same verdict and the same bits; what is refused is refused twice, in one line. The
 * folders lie in memory (/dev/shm) where that can be written to. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "../../examples/checkpoint.h"
#include <sys/stat.h>
#include <unistd.h>

enum { BASES = 4, CONFIG = 4096, WEIGHTS = 1 << 16, ROWS = 3, VOCAB = 64 };

#define MUST(condition) ((condition) ? (void)0 : broken(#condition, __LINE__))
static st_error error;
static void broken(const char *what, int line) {
    fprintf(stderr, "fuzz_folder: line %d: not so: %s (last message: %s)\n", line, what, error.message);
    abort();
}

typedef struct part {
    unsigned char data[WEIGHTS];
    size_t size;
} part;

static const dsv3_type types[BASES] = {DSV3_F32, DSV3_BF16, DSV3_F8_E4M3, DSV3_Q8_0};
static part config[BASES], weights[BASES]; /* as they should be */
static part text, tensors;                 /* as they are */
static char top[64], folder[96], copy[96];
static dsv3_context context;

static const char *const words[] = {
    "null",     "0",       "1",        "-1",       "2",     "3",     "1e39",  "-0.0",   "true",    "false",  "\"\"",
    "[]",       "{}",      "4294967296", "1e-9",   "0.5",   "F16",   "BF16",  "F64",    "U8",      "F32",    "F8_E4M3",
    "sigmoid",  "softmax", "greedy",   "yarn",     "\\u0000", "\"x\":1,", "[1,2],", "[0,0],",  ",",     "e", "}"};

static void leave(void) {
    static const char *const name[4] = {"config.json", "model.safetensors", "generation_config.json", ""};
    char path[160];
    for (int i = 0; i < 8; i++) {
        snprintf(path, sizeof path, "%s/%s", i < 4 ? folder : copy, name[i % 4]);
        remove(path);
    }
    remove(top);
}

static void path_of(char *path, size_t n, const char *directory, const char *name) {
    snprintf(path, n, "%s/%s", directory, name);
}

static void file_write(const char *directory, const char *name, const part *p) {
    char path[160];
    FILE *f;
    path_of(path, sizeof path, directory, name);
    f = fopen(path, "wb");
    MUST(f != NULL && fwrite(p->data, 1, p->size, f) == p->size && fclose(f) == 0);
}

static void file_read(const char *directory, const char *name, part *p) {
    char path[160];
    FILE *f;
    path_of(path, sizeof path, directory, name);
    f = fopen(path, "rb");
    MUST(f != NULL);
    p->size = fread(p->data, 1, sizeof p->data, f);
    MUST(fclose(f) == 0 && p->size < sizeof p->data);
}

typedef struct naming { /* finds a tensor of parameters by its name */
    const dsv3_parameters *of;
    const char *name;
    size_t at, found;
    dsv3_tensor_info info;
} naming;

static dsv3_result visit(void *user, const dsv3_tensor_info *info) {
    naming *n = (naming *)user;
    if (info->optional) return DSV3_OK;
    if (strcmp(info->name, n->name) == 0) n->info = *info, n->found = n->at;
    n->at += info->rows * info->cols;
    return DSV3_OK;
}

static dsv3_result find(void *user, const char *name, dsv3_tensor *t) {
    naming n = {(const dsv3_parameters *)user, name, 0, 0, {{0}, DSV3_KIND_EMBED, 0, 0, 0, 0, 0, 0, 0}};
    MUST(dsv3_model_tensors(&n.of->model.config, visit, &n, NULL) == DSV3_OK);
    if (n.info.rank == 0) return DSV3_ERR_MISSING;
    t->data = n.of->data + n.found, t->type = DSV3_F32, t->rank = n.info.rank;
    t->rows = n.info.rows, t->cols = n.info.cols;
    return DSV3_OK;
}

static void make(int base) {
    dsv3_config c = dsv3_config_default();
    dsv3_parameters p;
    dsv3_rng rng = {3};
    size_t bytes;
    char *made;
    void *memory;
    c.vocab_size = 12, c.hidden_size = base == 3 ? 32 : 8, c.intermediate_size = base == 3 ? 32 : 6;
    c.moe_intermediate_size = 4, c.num_hidden_layers = 2, c.first_k_dense_replace = 1;
    c.num_nextn_predict_layers = base == 1, c.num_attention_heads = 2, c.num_key_value_heads = 2;
    c.q_lora_rank = base == 1 ? 0 : 4, c.kv_lora_rank = 4;
    c.qk_nope_head_dim = 2, c.qk_rope_head_dim = 4, c.v_head_dim = 2;
    c.n_routed_experts = 4, c.n_shared_experts = 1, c.num_experts_per_tok = 2, c.n_group = 2, c.topk_group = 1;
    MUST(dsv3_parameters_size(&c, &bytes, NULL) == DSV3_OK);
    memory = malloc(bytes);
    MUST(dsv3_parameters_init(&c, &p, memory, bytes, NULL) == DSV3_OK);
    dsv3_parameters_random(&p, &rng, 0.3f, NULL);
    MUST(checkpoint_save(folder, &c, find, &p, types[base], &error) == ST_OK);
    MUST(checkpoint_config_text(&made, &c, types[base], &error) == ST_OK);
    MUST(checkpoint_config_write(folder, made, &error) == ST_OK);
    ST_FREE(made);
    free(memory);
    file_read(folder, "config.json", &config[base]);
    file_read(folder, "model.safetensors", &weights[base]);
    MUST(config[base].size < CONFIG);
}

static void start(void) {
    const char *memory = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(top, sizeof top, "%s/dsv3-fuzz-XXXXXX", memory);
    MUST(mkdtemp(top) != NULL);
    snprintf(folder, sizeof folder, "%s/a", top), snprintf(copy, sizeof copy, "%s/b", top);
    MUST(mkdir(folder, 0777) == 0 && mkdir(copy, 0777) == 0);
    atexit(leave);
    MUST(dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL) == DSV3_OK);
    for (int base = 0; base < BASES; base++) make(base);
}

/* [at, at + cut) becomes word [n]. */
static void splice(part *p, size_t at, size_t cut, const void *word, size_t n) {
    if (cut > p->size - at) cut = p->size - at;
    if (p->size - cut + n >= sizeof p->data) return;
    memmove(p->data + at + n, p->data + at + cut, p->size - at - cut);
    memcpy(p->data + at, word, n);
    p->size = p->size - cut + n;
}

/* Brings the length in front of the header up to date, unless that is what was to be altered. */
static void header_grows(int64_t by) {
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | tensors.data[i];
    n += (uint64_t)by;
    for (int i = 0; i < 8; i++) tensors.data[i] = (unsigned char)(n >> (8 * i));
}

/* The value behind the n-th colon at or behind `at`: where it begins and how long it is. */
static size_t value_at(const part *p, size_t at, size_t end, size_t *n) {
    while (at < end && p->data[at] != ':') at++;
    if (at < end) at++;
    while (at < end && p->data[at] == ' ') at++;
    *n = 0;
    while (at + *n < end && strchr(",}\n", p->data[at + *n]) == NULL) ++*n;
    return at;
}

static void alter(const uint8_t *e) {
    const char *word = words[e[3] % (sizeof words / sizeof words[0])];
    size_t header = tensors.size < 8 ? 0 : (size_t)tensors.data[0] + 256 * (size_t)tensors.data[1];
    int what = e[0] % 8;
    part *p = what < 4 ? &text : &tensors;
    size_t end = what < 4 ? text.size : header + 8 < tensors.size ? header + 8 : tensors.size;
    size_t begin = what < 4 ? 0 : what < 7 ? 8 : end, n, at, before = tensors.size;
    if (what == 7) end = tensors.size;
    if (end <= begin) return;
    at = begin + (e[1] + 256u * e[2]) % (end - begin);
    if (what == 7) { /* numbers */
        p->data[at] = e[3];
    } else if (e[0] & 8) {
        at = value_at(p, at, end, &n);
        splice(p, at, n, word, strlen(word));
    } else if (e[0] & 16) {
        p->data[at] = e[3];
    } else if (e[0] & 32) {
        splice(p, at, 1 + e[3] % 24u, "", 0);
    } else if (e[0] & 64) {
        p->size = at;
    } else {
        splice(p, at, 0, word, strlen(word));
    }
    if (p == &tensors && what != 7 && !(e[0] & 64) && tensors.size >= 8)
        header_grows((int64_t)tensors.size - (int64_t)before);
}

/* Three rows: the result, and logits if it is good. */
static dsv3_result run(const checkpoint *c, float *logits) {
    static const int32_t token[ROWS] = {1, 0, 2};
    dsv3_batch batch = {ROWS, token, NULL, NULL, ROWS, NULL};
    dsv3_cache cache;
    dsv3_workspace ws;
    size_t cache_bytes = 0, bytes = 0;
    void *memory[2];
    dsv3_result result;
    if (c->config.vocab_size > VOCAB) return DSV3_ERR_LIMIT;
    MUST(dsv3_cache_size(&c->config, ROWS, DSV3_F32, &cache_bytes, NULL) == DSV3_OK);
    MUST(dsv3_workspace_size(&c->config, ROWS, 1, &bytes, NULL) == DSV3_OK);
    memory[0] = malloc(cache_bytes), memory[1] = malloc(bytes);
    MUST(memory[0] != NULL && memory[1] != NULL);
    MUST(dsv3_cache_init(&c->config, &cache, ROWS, DSV3_F32, memory[0], cache_bytes, NULL) == DSV3_OK);
    MUST(dsv3_workspace_init(&c->config, &ws, ROWS, 1, memory[1], bytes, NULL) == DSV3_OK);
    result = dsv3_forward(&context, logits, &c->model, &cache, 1, &batch, &ws, NULL);
    MUST(cache.length == (result == DSV3_OK ? ROWS : 0));
    free(memory[0]), free(memory[1]);
    return result;
}

/* All tensors of b have in a the type that they have in b. */
static int same_types(const st_file *a, const st_file *b) {
    for (size_t i = 0; i < b->count; i++) {
        const st_tensor *t = st_find(a, b->tensor[i].name);
        if (t == NULL || t->dtype != b->tensor[i].dtype) return 0;
    }
    return 1;
}

static void again(const checkpoint *c, dsv3_type type, int adapt) {
    float logits[ROWS * VOCAB], more[ROWS * VOCAB];
    dsv3_result result = run(c, logits);
    checkpoint other;
    char *made = NULL;
    st_result saved = checkpoint_save(copy, &c->config, checkpoint_find, (void *)c, type, &error);
    if (saved != ST_OK) { /* numbers that the type cannot hold */
        MUST(saved == ST_ERR_OVERFLOW || saved == ST_ERR_UNSUPPORTED || saved == ST_ERR_FORMAT);
        return;
    }
    if (adapt) {
        if (checkpoint_config_adapt(&made, (const char *)text.data, text.size, "config.json", type, &error) != ST_OK)
            MUST(0);
    } else {
        MUST(checkpoint_config_text(&made, &c->config, type, &error) == ST_OK);
    }
    MUST(checkpoint_config_write(copy, made, &error) == ST_OK);
    ST_FREE(made);
    MUST(checkpoint_open(&other, copy, &error) == ST_OK);
    MUST(other.model.n_mtp == c->model.n_mtp && other.leftover == 0);
    if (same_types(&c->file, &other.file)) {
        MUST(run(&other, more) == result);
        if (result == DSV3_OK)
            MUST(memcmp(logits, more, ROWS * (size_t)c->config.vocab_size * sizeof *logits) == 0);
    }
    checkpoint_close(&other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    checkpoint c;
    st_error first;
    int base;
    st_result result;
    if (context.threads == 0) start();
    if (size < 1) return 0;
    base = data[0] % BASES;
    text.size = config[base].size, memcpy(text.data, config[base].data, text.size);
    tensors.size = weights[base].size, memcpy(tensors.data, weights[base].data, tensors.size);
    for (size_t i = 1; i + 4 <= size && i < 4 * 8; i += 4) alter(data + i);
    file_write(folder, "config.json", &text);
    file_write(folder, "model.safetensors", &tensors);
    result = checkpoint_open(&c, folder, &first);
    if (result == ST_OK) {
        again(&c, types[base], data[0] & 128);
    } else {
        MUST(first.message[0] != '\0' && strchr(first.message, '\n') == NULL);
    }
    checkpoint_close(&c);
    if (result != ST_OK) { /* and nothing is remembered */
        MUST(checkpoint_open(&c, folder, &error) == result && strcmp(first.message, error.message) == 0);
        checkpoint_close(&c);
    }
    return 0;
}
