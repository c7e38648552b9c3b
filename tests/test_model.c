/* test_model.c -- chapter 10, second half: binding weights by their published names.
 *
 * A failure means that a file with a missing, misshapen or broken tensor would be bound (and read past its end later),
 * that the error names the wrong tensor, that a buffer which is too small or not aligned is used all the same, or
 * that weights must be writable or aligned after all. */
#include "dsv3.h"
#include "synthetic.h"

#include <sys/mman.h>
#include <unistd.h>

#define TOKENS 6

/* ---- A finder that falsifies one tensor of a model. */

typedef struct spoiled {
    const synth *s;
    const char *name; /* the one it falsifies */
    enum {
        SPOIL_MISSING,
        SPOIL_TRANSPOSED,
        SPOIL_ROW_MORE,
        SPOIL_ROW_LESS,
        SPOIL_COL_MORE,
        SPOIL_RANK,  /* a vector as [1, n], a matrix as a vector */
        SPOIL_RANK3, /* three dimensions */
        SPOIL_FP8,   /* one byte each, no scale given */
        SPOIL_Q8_0,  /* in blocks */
        SPOIL_Q4_0,
        SPOIL_TYPE,  /* a type nobody knows */
        SPOIL_BF16,  /* other type, same shape */
        SPOIL_DATA,  /* data NULL */
        SPOIL_EMPTY, /* no rows and no columns */
        SPOIL_CODE   /* the finder itself fails */
    } how;
    dsv3_result code;
    int asked; /* how often the name was asked for */
} spoiled;

static dsv3_result find_spoiled(void *user, const char *name, dsv3_tensor *t) {
    spoiled *f = (spoiled *)user;
    dsv3_result result = synth_find((void *)(uintptr_t)f->s, name, t);
    size_t rows = t->rows;
    if (strcmp(name, f->name) != 0) return result;
    f->asked++;
    switch (f->how) {
    case SPOIL_MISSING: return DSV3_ERR_MISSING;
    case SPOIL_TRANSPOSED: t->rows = t->cols, t->cols = rows; break;
    case SPOIL_ROW_MORE: t->rows++; break;
    case SPOIL_ROW_LESS: t->rows--; break;
    case SPOIL_COL_MORE: t->cols++; break;
    case SPOIL_RANK: t->rank = 3 - t->rank; break;
    case SPOIL_RANK3: t->rank = 3; break;
    case SPOIL_FP8: t->type = DSV3_F8_E4M3, t->scale = NULL; break;
    case SPOIL_Q8_0: t->type = DSV3_Q8_0, t->scale = NULL; break;
    case SPOIL_Q4_0: t->type = DSV3_Q4_0, t->scale = NULL; break;
    case SPOIL_TYPE: t->type = (dsv3_type)DSV3_TYPES; break;
    case SPOIL_BF16: t->type = DSV3_BF16; break;
    case SPOIL_DATA: t->data = NULL; break;
    case SPOIL_EMPTY: t->rows = t->cols = 0; break;
    case SPOIL_CODE: return f->code;
    }
    return result;
}

/* Binds with tensor `name` spoiled. Wants the code, and that the error names `blame` ("" when ok). */
static void expect(synth *s, const char *name, int how, int code, const char *blame, dsv3_error *error) {
    spoiled f;
    dsv3_result result;
    char line[400], text[200];
    memset(&f, 0, sizeof f);
    f.s = s;
    f.name = name;
    memcpy(&f.how, &how, sizeof f.how);
    f.code = (dsv3_result)code;
    memset(error, 0xFF, sizeof *error);
    result = dsv3_model_bind(&s->config, &s->model, s->model_memory, s->model_bytes, find_spoiled, &f, error);
    snprintf(line, sizeof line, "%s spoiled by %d: got %d \"%s\", want %d \"%s\"", name, how, (int)result,
             error->name, code, blame);
    test_count(result == code && error->code == code && strcmp(error->name, blame) == 0, __FILE__, __LINE__, line);
    CHECK_EQ(f.asked, 1);
    if (result == DSV3_OK) return;
    dsv3_error_text(error, text, sizeof text);
    CHECK(strlen(text) > strlen(blame) + 5);
    result = dsv3_model_bind(&s->config, &s->model, s->model_memory, s->model_bytes, find_spoiled, &f, NULL);
    CHECK_EQ(result, code);
}

static void expect_shape(const dsv3_error *e, size_t rows, size_t cols, size_t found_rows, size_t found_cols) {
    CHECK_EQ(e->numbers, DSV3_NUMBERS_SHAPE);
    CHECK(e->expected[0] == (int64_t)rows && e->expected[1] == (int64_t)cols);
    CHECK(e->found[0] == (int64_t)found_rows && e->found[1] == (int64_t)found_cols);
}

/* Every tensor of the model in turn, spoiled in every way. */
static void spoil_each(synth *s) {
    dsv3_error e;
    for (size_t i = 0; i < s->count; i++) {
        const synth_tensor *t = &s->tensors[i];
        const char *name = t->info.name;
        size_t rows = t->t.rows, cols = t->t.cols;
        int gone_is_fine = t->info.optional; /* a module that has lost one tensor, eh_proj included, is broken */
        expect(s, name, SPOIL_MISSING, gone_is_fine ? DSV3_OK : DSV3_ERR_MISSING, gone_is_fine ? "" : name, &e);
        CHECK_EQ(s->model.n_mtp, gone_is_fine ? s->config.num_nextn_predict_layers : 0);
        if (t->info.rank == 2 && rows != cols) {
            expect(s, name, SPOIL_TRANSPOSED, DSV3_ERR_MISMATCH, name, &e);
            expect_shape(&e, rows, cols, cols, rows);
        }
        expect(s, name, SPOIL_ROW_MORE, DSV3_ERR_MISMATCH, name, &e);
        expect_shape(&e, rows, cols, rows + 1, cols);
        expect(s, name, SPOIL_ROW_LESS, DSV3_ERR_MISMATCH, name, &e);
        expect(s, name, SPOIL_COL_MORE, DSV3_ERR_MISMATCH, name, &e);
        expect(s, name, SPOIL_RANK, DSV3_ERR_MISMATCH, name, &e);
        CHECK(e.numbers == DSV3_NUMBERS_RANGE && e.expected[0] == t->info.rank && e.found[0] == 3 - t->info.rank);
        expect(s, name, SPOIL_RANK3, DSV3_ERR_MISMATCH, name, &e);
        expect(s, name, SPOIL_TYPE, DSV3_ERR_UNSUPPORTED, name, &e);
        expect(s, name, SPOIL_EMPTY, DSV3_ERR_MISMATCH, name, &e);
        expect(s, name, SPOIL_CODE, DSV3_ERR_OVERFLOW, name, &e);
        expect(s, name, SPOIL_CODE, DSV3_ERR_UNSUPPORTED, name, &e);
        expect(s, name, SPOIL_DATA, DSV3_ERR_MISSING, name, &e);
        for (int how = SPOIL_Q8_0; how <= SPOIL_Q4_0; how++) {
            int code = cols % 32 != 0 ? DSV3_ERR_MISMATCH : t->info.rank == 1 ? DSV3_ERR_UNSUPPORTED : DSV3_OK;
            expect(s, name, how, code, code == DSV3_OK ? "" : name, &e);
            if (cols % 32 != 0) CHECK(e.numbers == DSV3_NUMBERS_RANGE && e.found[0] == (int64_t)cols);
            if (cols % 32 != 0) CHECK(e.expected[0] == (int64_t)((cols + 31) / 32 * 32));
        }
        if (t->info.rank == 1) expect(s, name, SPOIL_FP8, DSV3_ERR_UNSUPPORTED, name, &e);
    }
}

static void test_each_tensor(void) {
    synth *s = synth_open_named(SYNTH_V3, 31);
    spoil_each(s);
    synth_close(s);
    s = synth_open_named(SYNTH_MTP, 32);
    spoil_each(s);
    synth_close(s);
    s = synth_open_named(SYNTH_TIED, 33);
    spoil_each(s);
    synth_close(s);
    s = synth_open_named(SYNTH_EIGHT, 34);
    spoil_each(s);
    synth_close(s);
    s = synth_open_named(SYNTH_ODD, 34);
    spoil_each(s);
    synth_close(s);
}

/* ---- FP8 and its scales */

static void test_scales(void) {
    int types;
    dsv3_config c = synth_config(SYNTH_BLOCKS, &types);
    synth *s;
    dsv3_error e;
    char name[DSV3_MAX_NAME + 16];
    c.num_nextn_predict_layers = 1;
    s = synth_open(&c, SYNTH_FP8, 35);
    for (size_t i = 0; i < s->count; i++) {
        const synth_tensor *t = &s->tensors[i];
        snprintf(name, sizeof name, "%s_scale_inv", t->info.name);
        if (t->t.type != DSV3_F8_E4M3) {
            if (t->info.rank == 2) { /* any matrix may be FP8, and then needs scales */
                spoiled f = {s, t->info.name, SPOIL_FP8, DSV3_OK, 0};
                CHECK_EQ(dsv3_model_bind(&c, &s->model, s->model_memory, s->model_bytes, find_spoiled, &f, &e),
                         DSV3_ERR_MISSING);
                CHECK(strcmp(e.name, name) == 0);
            }
            continue;
        }
        expect(s, name, SPOIL_MISSING, DSV3_ERR_MISSING, name, &e);
        expect(s, name, SPOIL_ROW_MORE, DSV3_ERR_MISMATCH, name, &e);
        expect_shape(&e, (t->t.rows + 127) / 128, (t->t.cols + 127) / 128, (t->t.rows + 127) / 128 + 1,
                     (t->t.cols + 127) / 128);
        expect(s, name, SPOIL_ROW_LESS, DSV3_ERR_MISMATCH, name, &e);
        expect(s, name, SPOIL_COL_MORE, DSV3_ERR_MISMATCH, name, &e);
        expect(s, name, SPOIL_RANK, DSV3_ERR_MISMATCH, name, &e);
        expect(s, name, SPOIL_BF16, DSV3_ERR_UNSUPPORTED, name, &e);
        expect(s, name, SPOIL_FP8, DSV3_ERR_UNSUPPORTED, name, &e);
        expect(s, name, SPOIL_TYPE, DSV3_ERR_UNSUPPORTED, name, &e);
        expect(s, name, SPOIL_DATA, DSV3_ERR_MISSING, name, &e);
        expect(s, name, SPOIL_CODE, DSV3_ERR_OVERFLOW, name, &e);
    }
    CHECK_EQ(synth_bind(s, &e), DSV3_OK);
    CHECK_EQ(s->model.n_mtp, 1);
    synth_close(s);
}

/* A finder may give the scales along with the matrix; then nobody asks for them. A scale on another type is no scale. */
static dsv3_result find_with_scales(void *user, const char *name, dsv3_tensor *t) {
    const synth *s = (const synth *)user;
    const synth_tensor *found = synth_tensor_of(s, name);
    static const float junk[64];
    if (found == NULL) return DSV3_ERR_OVERFLOW; /* a scale was asked for */
    *t = found->t;
    t->scale = found->scale != NULL ? found->scale : junk;
    return DSV3_OK;
}

static void test_given_scales(void) {
    synth *s = synth_open_named(SYNTH_BLOCKS, 36);
    dsv3_error e;
    size_t V = (size_t)s->config.vocab_size;
    float *asked = (float *)test_alloc(TOKENS * V * sizeof(float)), *given = (float *)test_alloc(TOKENS * V * 4);
    int32_t token[TOKENS] = {1, 2, 3, 4, 5, 6};
    synth_run(s, TOKENS, 1, 1, TOKENS, DSV3_F32);
    CHECK_EQ(synth_forward(s, asked, token, TOKENS, 0, &e), DSV3_OK);
    CHECK_EQ(dsv3_model_bind(&s->config, &s->model, s->model_memory, s->model_bytes, find_with_scales, s, &e),
             DSV3_OK);
    CHECK(s->model.norm.scale == NULL && s->model.lm_head.scale == NULL);
    CHECK(s->model.layers[0].mlp.up_proj.scale != NULL);
    synth_run(s, TOKENS, 1, 1, TOKENS, DSV3_F32);
    CHECK_EQ(synth_forward(s, given, token, TOKENS, 0, &e), DSV3_OK);
    CHECK(memcmp(asked, given, TOKENS * V * sizeof(float)) == 0);
    free(asked), free(given);
    synth_close(s);
}

/* ---- Router biases */

static void test_bias(void) {
    static const int types[] = {SYNTH_F32, SYNTH_F16, SYNTH_BF16};
    static const int codes[] = {0x7FC0, 0x7F80, 0xFF80, 0xFFFF}; /* NaN, infinities, in the upper half of a float32 */
    for (size_t k = 0; k < 3; k++) {
        dsv3_config c = synth_config(SYNTH_MTP, NULL);
        synth *s = synth_open(&c, types[k], 37);
        dsv3_error e;
        for (int layer = 1; layer <= 3; layer++) { /* 3: the MTP layer */
            synth_tensor *t = synth_get(s, layer, -1, "mlp.gate.e_score_correction_bias");
            for (size_t i = 0; i < 8; i += 7) {
                for (size_t j = 0; j < 4; j++) {
                    float old = (float)t->value[i];
                    uint32_t bits = (uint32_t)codes[j] << 16;
                    float bad;
                    char want[80];
                    memcpy(&bad, &bits, sizeof bad);
                    synth_encode(t->t.type, t->data, i, bad);
                    CHECK_EQ(synth_bind(s, &e), DSV3_ERR_NAN);
                    snprintf(want, sizeof want, "model.layers.%d.mlp.gate.e_score_correction_bias", layer);
                    CHECK(strcmp(e.name, want) == 0);
                    CHECK_EQ(e.numbers, DSV3_NUMBERS_WHERE);
                    CHECK_EQ(e.found[0], i);
                    CHECK_EQ(synth_bind(s, NULL), DSV3_ERR_NAN);
                    synth_encode(t->t.type, t->data, i, old);
                }
            }
        }
        CHECK_EQ(synth_bind(s, &e), DSV3_OK);
        synth_close(s);
    }
}

/* ---- MTP modules */

static dsv3_result find_without(void *user, const char *name, dsv3_tensor *t) {
    const synth *s = (const synth *)user;
    const synth_tensor *found = synth_tensor_of(s, name);
    if (found != NULL && found->info.layer >= s->config.num_hidden_layers) return DSV3_ERR_MISSING;
    return synth_find(user, name, t);
}

/* Layers from `first` on are not there, and neither is the tensor `gone` (if not NULL). */
typedef struct cut_file {
    const synth *s;
    int first, last;
    const char *gone;
} cut_file;

static dsv3_result find_cut(void *user, const char *name, dsv3_tensor *t) {
    const cut_file *f = (const cut_file *)user;
    const synth_tensor *found = synth_tensor_of(f->s, name);
    if (found != NULL && found->info.layer >= f->first && found->info.layer <= f->last) return DSV3_ERR_MISSING;
    if (f->gone != NULL && strcmp(name, f->gone) == 0) return DSV3_ERR_MISSING;
    return synth_find((void *)(uintptr_t)f->s, name, t);
}

static void test_mtp(void) {
    dsv3_config c = synth_config(SYNTH_MTP, NULL);
    synth *s;
    dsv3_error e;
    cut_file f;
    c.num_nextn_predict_layers = 3; /* layers 3, 4, 5 */
    s = synth_open(&c, SYNTH_F32, 38);
    CHECK_EQ(s->model.n_mtp, 3);
    CHECK(s->model.mtp[0].embed_tokens.data == synth_get(s, 3, -1, "embed_tokens.weight")->data);
    CHECK(s->model.mtp[2].shared_head_head.data == synth_get(s, 5, -1, "shared_head.head.weight")->data);
    CHECK(s->model.mtp[1].eh_proj.data == synth_get(s, 4, -1, "eh_proj.weight")->data);
    CHECK(s->model.layers[4].kv_b_proj.data == synth_get(s, 4, -1, "self_attn.kv_b_proj.weight")->data);
    CHECK(s->model.layers[5].is_moe && s->model.layers[5].experts[7].up_proj.data != NULL);
    memset(&e, 0xFF, sizeof e);
    CHECK_EQ(dsv3_model_bind(&c, &s->model, s->model_memory, s->model_bytes, find_without, s, &e), DSV3_OK);
    CHECK_EQ(s->model.n_mtp, 0);
    CHECK(e.code == DSV3_OK && e.name[0] == '\0');
    for (int first = 3; first <= 6; first++) { /* the last modules are not there */
        f.s = s, f.first = first, f.last = 99, f.gone = NULL;
        CHECK_EQ(dsv3_model_bind(&c, &s->model, s->model_memory, s->model_bytes, find_cut, &f, &e), DSV3_OK);
        CHECK_EQ(s->model.n_mtp, first - 3);
    }
    f.first = f.last = 4; /* module 2 of 3 is not there: module 3 cannot be used without it */
    CHECK_EQ(dsv3_model_bind(&c, &s->model, s->model_memory, s->model_bytes, find_cut, &f, &e), DSV3_OK);
    CHECK_EQ(s->model.n_mtp, 1);
    f.first = f.last = 99; /* a module with a part missing is a broken file */
    for (size_t i = 0; i < s->count; i++) {
        const dsv3_tensor_info *info = &s->tensors[i].info;
        if (info->layer != 4 || info->optional || strstr(info->name, "eh_proj") != NULL) continue;
        f.gone = info->name;
        CHECK_EQ(dsv3_model_bind(&c, &s->model, s->model_memory, s->model_bytes, find_cut, &f, &e), DSV3_ERR_MISSING);
        CHECK(strcmp(e.name, info->name) == 0);
    }
    f.gone = "model.layers.3.embed_tokens.weight"; /* the copies fall back to the main model's */
    CHECK_EQ(dsv3_model_bind(&c, &s->model, s->model_memory, s->model_bytes, find_cut, &f, &e), DSV3_OK);
    CHECK(s->model.n_mtp == 3 && s->model.mtp[0].embed_tokens.data == s->model.embed_tokens.data);
    CHECK(s->model.mtp[0].shared_head_head.data != s->model.lm_head.data);
    f.gone = "model.layers.5.shared_head.head.weight";
    CHECK_EQ(dsv3_model_bind(&c, &s->model, s->model_memory, s->model_bytes, find_cut, &f, &e), DSV3_OK);
    CHECK(s->model.n_mtp == 3 && s->model.mtp[2].shared_head_head.data == s->model.lm_head.data);
    synth_close(s);
}

static void test_tied(void) {
    synth *s = synth_open_named(SYNTH_TIED, 39);
    dsv3_config c;
    CHECK(s->model.lm_head.data != NULL && s->model.lm_head.data == s->model.embed_tokens.data);
    CHECK(synth_tensor_of(s, "lm_head.weight") == NULL);
    c = s->config;
    synth_close(s);
    c.num_nextn_predict_layers = 1; /* the module's head falls back to the embedding, too */
    s = synth_make(&c, SYNTH_F32, 40);
    for (size_t i = 0; i < s->count; i++) {
        if (s->tensors[i].info.optional) s->tensors[i].info.name[0] = '\0';
    }
    CHECK_EQ(synth_bind(s, NULL), DSV3_OK);
    CHECK_EQ(s->model.n_mtp, 1);
    CHECK(s->model.mtp[0].shared_head_head.data == s->model.embed_tokens.data);
    CHECK(s->model.mtp[0].embed_tokens.data == s->model.embed_tokens.data);
    synth_close(s);
    c.tie_word_embeddings = 0;
    s = synth_open(&c, SYNTH_F32, 40);
    CHECK(s->model.lm_head.data != s->model.embed_tokens.data);
    synth_close(s);
}

/* ---- The table's memory */

static int all_bytes(const unsigned char *p, size_t n, unsigned char value) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] != value) return 0;
    }
    return 1;
}

static void test_memory(void) {
    synth *s = synth_open_named(SYNTH_V3, 41);
    dsv3_config c = s->config;
    dsv3_model model;
    dsv3_error e;
    size_t need = s->model_bytes;
    unsigned char *memory = (unsigned char *)synth_alloc(need + 64);
    memset(memory, 0x5A, need + 64);
    CHECK_EQ(dsv3_model_bind(&c, &model, memory, need - 1, synth_find, s, &e), DSV3_ERR_MEMORY);
    CHECK(strcmp(e.name, "memory") == 0 && e.expected[0] == (int64_t)need && e.found[0] == (int64_t)need - 1);
    CHECK_EQ(dsv3_model_bind(&c, &model, memory, 0, synth_find, s, &e), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_model_bind(&c, &model, NULL, need, synth_find, s, &e), DSV3_ERR_ARG);
    CHECK(strcmp(e.name, "memory") == 0);
    for (size_t shift = 1; shift <= 32; shift *= 2) {
        int want = shift % DSV3_ALIGN == 0 ? DSV3_OK : DSV3_ERR_ALIGN;
        if (want == DSV3_OK) continue;
        CHECK_EQ(dsv3_model_bind(&c, &model, memory + shift, need, synth_find, s, &e), want);
        CHECK(strcmp(e.name, "memory") == 0);
    }
    CHECK_EQ(dsv3_model_bind(&c, NULL, memory, need, synth_find, s, &e), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_model_bind(NULL, &model, memory, need, synth_find, s, &e), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_model_bind(&c, &model, memory, need, NULL, s, &e), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_model_bind(NULL, NULL, NULL, 0, NULL, NULL, NULL), DSV3_ERR_ARG);
    c.hidden_size = 0;
    CHECK_EQ(dsv3_model_bind(&c, &model, memory, need, synth_find, s, &e), DSV3_ERR_ARG);
    CHECK(strcmp(e.name, "hidden_size") == 0);
    CHECK(all_bytes(memory, need + 64, 0x5A)); /* none of these wrote anything */
    c = s->config;
    for (size_t shift = 0; shift < 64; shift += DSV3_ALIGN) { /* every legal beginning, nothing past the end */
        memset(memory, 0x5A, need + 64);
        CHECK_EQ(dsv3_model_bind(&c, &model, memory + shift, need, synth_find, s, &e), DSV3_OK);
        CHECK(all_bytes(memory, shift, 0x5A) && all_bytes(memory + shift + need, 64 - shift, 0x5A));
        CHECK((const unsigned char *)model.layers >= memory + shift);
        CHECK((uintptr_t)model.layers % DSV3_ALIGN == 0);
    }
    synth_release(memory);
    synth_close(s);
}

/* ---- Weights where they lie: unaligned, or in memory that cannot be written */

static void logits_of(synth *s, float *logits) {
    static const int32_t token[TOKENS] = {3, 1, 41, 5, 9, 26};
    synth_run(s, TOKENS, 1, 1, TOKENS, DSV3_F32);
    synth_demand(synth_forward(s, logits, token, TOKENS, 0, NULL), "forward", NULL);
}

/* Moves each tensor to `shift` bytes past an aligned address. */
static void test_unaligned(int which) {
    synth *s = synth_open_named(which, 42);
    size_t n = TOKENS * (size_t)s->config.vocab_size * sizeof(float);
    float *want = (float *)test_alloc(n), *got = (float *)test_alloc(n);
    void **moved = (void **)test_alloc(2 * s->count * sizeof *moved);
    dsv3_error e;
    logits_of(s, want);
    for (size_t shift = 1; shift <= 3; shift++) {
        for (size_t i = 0; i < s->count; i++) {
            synth_tensor *t = &s->tensors[i];
            size_t bytes = t->t.rows * dsv3_row_bytes(t->t.type, t->t.cols);
            size_t blocks = (t->t.rows + 127) / 128 * ((t->t.cols + 127) / 128) * sizeof(float);
            unsigned char *data = (unsigned char *)test_alloc(bytes + shift);
            unsigned char *scale = (unsigned char *)test_alloc(blocks + shift);
            memcpy(data + shift, t->data, bytes);
            if (t->scale != NULL) memcpy(scale + shift, t->scale, blocks);
            moved[2 * i] = data, moved[2 * i + 1] = scale;
            t->t.data = data + shift;
            t->t.scale = t->scale != NULL ? scale + shift : NULL; /* given along: never asked for */
        }
        CHECK_EQ(synth_bind(s, &e), DSV3_OK);
        memset(got, 0, n);
        logits_of(s, got);
        CHECK(memcmp(want, got, n) == 0);
        for (size_t i = 0; i < 2 * s->count; i++) free(moved[i]);
        for (size_t i = 0; i < s->count; i++) s->tensors[i].t.data = s->tensors[i].data, s->tensors[i].t.scale = NULL;
    }
    free(want), free(got), free(moved);
    synth_close(s);
}

/* All weights in pages that may only be read: a write would kill this program. */
static void test_read_only(int which) {
    synth *s = synth_open_named(which, 43);
    size_t n = TOKENS * (size_t)s->config.vocab_size * sizeof(float), total = 0, at = 0;
    float *want = (float *)test_alloc(n), *got = (float *)test_alloc(n);
    FILE *file = tmpfile();
    unsigned char *pages;
    dsv3_error e;
    logits_of(s, want);
    for (size_t i = 0; i < s->count; i++) {
        const dsv3_tensor *t = &s->tensors[i].t;
        total += fwrite(t->data, 1, t->rows * dsv3_row_bytes(t->type, t->cols), file);
    }
    fflush(file);
    pages = (unsigned char *)mmap(NULL, total, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    CHECK((void *)pages != MAP_FAILED);
    for (size_t i = 0; i < s->count; i++) {
        dsv3_tensor *t = &s->tensors[i].t;
        t->data = pages + at;
        at += t->rows * dsv3_row_bytes(t->type, t->cols);
    }
    CHECK_EQ(at, total);
    CHECK_EQ(synth_bind(s, &e), DSV3_OK);
    logits_of(s, got);
    CHECK(memcmp(want, got, n) == 0);
    munmap(pages, total);
    fclose(file);
    free(want), free(got);
    synth_close(s);
}

int main(void) {
    static const int which[] = {SYNTH_V3,     SYNTH_MOONLIGHT, SYNTH_V2,  SYNTH_ODD,
                                SYNTH_BLOCKS, SYNTH_EIGHT,     SYNTH_FOUR};
    test_each_tensor();
    test_scales();
    test_given_scales();
    test_bias();
    test_mtp();
    test_tied();
    test_memory();
    for (size_t i = 0; i < sizeof which / sizeof which[0]; i++) {
        test_unaligned(which[i]);
        test_read_only(which[i]);
    }
    return test_done("model");
}
