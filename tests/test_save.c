/* test_save.c -- writing checkpoints: checkpoint_save and its config.json, st_write_made, st_write_bytes.
 *
 * Every kind of model in every type of weights is saved in every type, opened again, and compared number by number. A
 * failure means that a saved or converted checkpoint holds other numbers than it should, that FP8 loses more than its
 * rounding, that a config.json does not come back as it was, or that a failed write leaves something behind. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* mkdtemp, posix_memalign */
#endif
#include <stdlib.h>

/* The allocation that fails, counted from the next; -1: none. */
static long fails_at = -1;
static void *sometimes(size_t bytes) { return fails_at >= 0 && fails_at-- == 0 ? NULL : malloc(bytes); }
#define ST_MALLOC(bytes) sometimes(bytes)
#define ST_FREE(memory) free(memory)
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"
#include "synthetic.h"
#include <sys/stat.h>
#include <unistd.h>

static char directory[] = "/tmp/dsv3-save-XXXXXX";
static char weights[64];

/* ---- Numbers */

static dsv3_type expected_type(const dsv3_tensor_info *info, dsv3_type type) {
    if (strstr(info->name, "e_score_correction_bias") != NULL) return DSV3_F32;
    if (type == DSV3_Q8_0 || type == DSV3_Q4_0) {
        int is_router = strstr(info->name, "mlp.gate.weight") != NULL;
        return info->rank == 2 && info->cols % 32 == 0 && !is_router ? type : DSV3_BF16;
    }
    return type == DSV3_F8_E4M3 && !info->quantised ? DSV3_BF16 : type;
}

/* The bytes that dsv3_quantize makes of the whole matrix (tests/test_codecs.c is about those). */
static int blocks_are_right(const synth_tensor *t, const st_tensor *code, dsv3_type type) {
    size_t n = t->t.rows * t->t.cols, bytes = t->t.rows * dsv3_row_bytes(type, t->t.cols);
    float *x = (float *)test_alloc(n * sizeof *x);
    unsigned char *want = (unsigned char *)test_alloc(bytes);
    int right = code->bytes == bytes && code->shape[0] == t->t.rows && code->shape[1] * t->t.rows == bytes;
    for (size_t i = 0; i < n; i++) x[i] = (float)t->value[i];
    CHECK_EQ(dsv3_quantize(want, NULL, x, type, t->t.rows, t->t.cols, NULL), DSV3_OK);
    right = right && memcmp(want, code->data, bytes) == 0;
    free(x), free(want);
    return right;
}

/* Scales are amax / 448 of their block, and no value is further off than half a step. */
static int fp8_is_right(const synth_tensor *t, const st_tensor *code, const st_tensor *scale) {
    size_t rows = t->t.rows, cols = t->t.cols, across = (cols + 127) / 128;
    if (scale == NULL || scale->dtype != ST_F32 || scale->bytes != 4 * across * ((rows + 127) / 128)) return 0;
    for (size_t b = 0; b < scale->bytes / 4; b++) {
        double most = 0, s = synth_element(DSV3_F32, (const unsigned char *)scale->data, b);
        for (size_t i = 0; i < rows * cols; i++) {
            double x = t->value[i], y;
            if (i / cols / 128 * across + i % cols / 128 != b) continue;
            y = synth_element(DSV3_F8_E4M3, (const unsigned char *)code->data, i) * s;
            if (fabs(x) > most) most = fabs(x);
            if (!(fabs(x - y) <= fabs(x) / 16 * 1.00001 + s * ldexp(1, -10))) return 0;
        }
        if (fabs(s - (most > 0 ? most / 448 : 1)) > 1e-6 * s) return 0;
    }
    return 1;
}

static int is_right(const synth_tensor *t, const st_file *file, dsv3_type type, int blocks) {
    const st_tensor *to = st_find(file, t->info.name);
    char name[DSV3_MAX_NAME + 16];
    dsv3_type want = expected_type(&t->info, type);
    snprintf(name, sizeof name, "%s_scale_inv", t->info.name);
    if (to == NULL || checkpoint_type(to->dtype, blocks) != (int)want) return 0;
    if ((uintptr_t)to->data % st_dtype_bytes(to->dtype) != 0) return 0;
    if (to->bytes != t->t.rows * dsv3_row_bytes(want, t->t.cols)) return 0;
    if (t->t.type == want) return memcmp(to->data, t->data, to->bytes) == 0;
    if (dsv3_type_block(want) > 1) return blocks_are_right(t, to, want);
    if (want == DSV3_F8_E4M3) return fp8_is_right(t, to, st_find(file, name));
    for (size_t i = 0; i < t->t.rows * t->t.cols; i++) {
        unsigned char code[4];
        synth_encode(want, code, 0, (float)t->value[i]);
        if (memcmp(code, (const unsigned char *)to->data + i * dsv3_type_bytes(want), dsv3_type_bytes(want)) != 0)
            return 0;
    }
    return st_find(file, name) == NULL;
}

static void check_model(synth *s, dsv3_type type) {
    checkpoint c;
    st_error error;
    char *text = NULL;
    int right = 1;
    CHECK_EQ(checkpoint_save(directory, &s->config, synth_find, s, type, &error), ST_OK);
    CHECK_EQ(checkpoint_config_text(&text, &s->config, type, &error), ST_OK);
    CHECK_EQ(checkpoint_config_write(directory, text, &error), ST_OK);
    ST_FREE(text);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    CHECK_EQ(c.blocks, type == DSV3_Q8_0 || type == DSV3_Q4_0 ? (int)type : -1);
    for (size_t i = 0; i < s->count && c.tables != NULL; i++) {
        if (is_right(&s->tensors[i], &c.file, type, c.blocks)) continue;
        fprintf(stderr, "%s as %s\n", s->tensors[i].info.name, dsv3_type_name(type));
        right = 0;
    }
    CHECK(right);
    checkpoint_close(&c);
}

static void test_models(void) {
    for (int which = 0; which < SYNTH_CONFIGS; which++) {
        int types;
        dsv3_config config = synth_config(which, &types);
        for (types = SYNTH_F32; types < SYNTH_TYPES; types++) {
            synth *s = synth_make(&config, types, 7);
            for (int type = 0; type < DSV3_TYPES; type++) check_model(s, (dsv3_type)type);
            synth_close(s);
        }
    }
}

/* Blocks of zeros, of numbers too small for a scale, and values that a type cannot hold. */
static void test_edges(void) {
    int types;
    dsv3_config config = synth_config(SYNTH_BLOCKS, &types);
    synth *s = synth_make(&config, SYNTH_F32, 3);
    synth_tensor *t = synth_get(s, 0, -1, "self_attn.q_a_proj.weight"); /* ragged FP8 blocks, whole ones of 32 */
    const struct {
        float x;
        int wrong; /* bits: F16, BF16, FP8, Q8_0, Q4_0 */
    } edge[] = {{INFINITY, 28}, {-INFINITY, 28}, {NAN, 28},       {65520.0f, 1},  {65519.0f, 0},    {3.4e38f, 31},
                {2.9e38f, 25},  {1e-44f, 0},     {524160.0f, 17}, {524159.0f, 1}, {8321040.0f, 25}, {8321039.0f, 17}};
    for (size_t i = 0; i < t->t.rows * t->t.cols; i++) synth_encode(DSV3_F32, t->data, i, i % 2 ? 0.0f : 1e-43f);
    synth_refresh(t);
    for (int bit = 0; bit < 5; bit++) {
        CHECK_EQ(checkpoint_save(directory, &config, synth_find, s, (dsv3_type)(DSV3_F16 + bit), NULL), ST_OK);
    }
    for (size_t k = 0; k < sizeof edge / sizeof edge[0]; k++) {
        synth_set(t, t->t.cols + 1, edge[k].x);
        for (int bit = 0; bit < 5; bit++) {
            st_error error;
            int wrong = edge[k].wrong >> bit & 1;
            st_result result =
                checkpoint_save(directory, &config, synth_find, s, (dsv3_type)(DSV3_F16 + bit), &error);
            CHECK_EQ(result, wrong ? ST_ERR_OVERFLOW : ST_OK);
            CHECK(!wrong || strstr(error.message, t->info.name) != NULL);
        }
    }
    synth_close(s);
}

/* What find does not have, or has otherwise. */
static dsv3_result find_without(void *user, const char *name, dsv3_tensor *tensor) {
    if (strcmp(name, "model.norm.weight") == 0) return DSV3_ERR_MISSING;
    return synth_find(user, name, tensor);
}
static dsv3_result find_short(void *user, const char *name, dsv3_tensor *tensor) {
    dsv3_result result = synth_find(user, name, tensor);
    if (strcmp(name, "lm_head.weight") == 0) tensor->rows--;
    return result;
}
static dsv3_result find_unscaled(void *user, const char *name, dsv3_tensor *tensor) {
    if (strstr(name, "o_proj.weight_scale_inv") != NULL) return DSV3_ERR_MISSING;
    return synth_find(user, name, tensor);
}
static dsv3_result find_main(void *user, const char *name, dsv3_tensor *tensor) {
    if (strncmp(name, "model.layers.3.", 15) == 0) return DSV3_ERR_MISSING;
    return synth_find(user, name, tensor);
}

static void test_errors(void) {
    int types;
    dsv3_config config = synth_config(SYNTH_BLOCKS, &types), mtp = synth_config(SYNTH_MTP, &types);
    synth *s = synth_make(&config, SYNTH_FP8, 3), *with_module = synth_make(&mtp, SYNTH_F32, 3);
    st_error error;
    checkpoint c;
    char *text = NULL;
    CHECK_EQ(checkpoint_save(directory, &config, find_without, s, DSV3_F32, &error), ST_ERR_MISSING);
    CHECK(strstr(error.message, "model.norm.weight") != NULL);
    CHECK_EQ(checkpoint_save(directory, &config, find_short, s, DSV3_F32, &error), ST_ERR_MISMATCH);
    CHECK(strstr(error.message, "lm_head.weight") != NULL);
    CHECK(checkpoint_save(directory, &config, find_unscaled, s, DSV3_F32, &error) != ST_OK);
    CHECK(strstr(error.message, "o_proj.weight_scale_inv") != NULL);
    CHECK_EQ(checkpoint_save("/tmp/dsv3-no-such-directory", &config, synth_find, s, DSV3_F32, &error), ST_ERR_IO);
    CHECK_EQ(checkpoint_config_write("/tmp/dsv3-no-such-directory", "{}", &error), ST_ERR_IO);
    CHECK_EQ(mtp.num_hidden_layers, 3); /* find_main: all but the module */
    CHECK_EQ(checkpoint_save(directory, &mtp, find_main, with_module, DSV3_BF16, &error), ST_OK);
    CHECK_EQ(checkpoint_config_text(&text, &mtp, DSV3_BF16, &error), ST_OK);
    CHECK_EQ(checkpoint_config_write(directory, text, &error), ST_OK);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    CHECK_EQ(c.model.n_mtp, 0);
    checkpoint_close(&c);
    ST_FREE(text);
    synth_close(s);
    synth_close(with_module);
}

/* One tensor is another than the config calls for, in each way. */
static int odd;
static dsv3_result find_odd(void *user, const char *name, dsv3_tensor *tensor) {
    dsv3_result result = synth_find(user, name, tensor);
    if (strcmp(name, "lm_head.weight") == 0) {
        if (odd == 0) tensor->rank = 1;
        if (odd == 1) tensor->cols++;
        if (odd == 2) tensor->type = (dsv3_type)DSV3_TYPES;
        if (odd == 3) tensor->type = (dsv3_type)-1;
        if (odd == 4) tensor->type = DSV3_Q8_0; /* of 36 columns */
    }
    if (strstr(name, "kv_b_proj.weight_scale_inv") != NULL) {
        if (odd == 5) tensor->type = DSV3_F16;
        if (odd == 6) tensor->rows++;
        if (odd == 7) tensor->cols++;
    }
    return result;
}

/* Each list of tensors is asked for twice; the second time it is another. */
typedef struct fickle {
    synth *s;
    int asked;
} fickle;
static dsv3_result find_fickle(void *user, const char *name, dsv3_tensor *tensor) {
    fickle *f = (fickle *)user;
    if (strcmp(name, "lm_head.weight") == 0 && f->asked++ > 0) return DSV3_ERR_MISSING;
    return synth_find(f->s, name, tensor);
}

static void test_odd_tensors(void) {
    int types;
    dsv3_config config = synth_config(SYNTH_BLOCKS, &types);
    synth *s;
    st_error error;
    fickle f;
    config.hidden_size = 36;
    s = synth_make(&config, SYNTH_FP8, 3);
    for (odd = 0; odd < 8; odd++) {
        int unknown = odd >= 2 && odd <= 4;
        CHECK_EQ(checkpoint_save(directory, &config, find_odd, s, DSV3_F32, &error),
                 unknown ? ST_ERR_UNSUPPORTED : ST_ERR_MISMATCH);
        CHECK_EQ(error.code, unknown ? ST_ERR_UNSUPPORTED : ST_ERR_MISMATCH);
        CHECK(strstr(error.message, odd < 5 ? "lm_head.weight" : "kv_b_proj.weight_scale_inv") != NULL);
        CHECK(strstr(error.message, odd < 2   ? "has the wrong shape"
                                    : unknown ? "has an unknown type or no whole blocks"
                                              : "has the wrong type or shape") != NULL);
    }
    f.s = s, f.asked = 0;
    CHECK_EQ(checkpoint_save(directory, &config, find_fickle, &f, DSV3_F32, &error), ST_ERR_ARG);
    CHECK(f.asked == 2 && strstr(error.message, "lm_head.weight") != NULL);
    synth_close(s);
}

/* Scales that come with the tensor are taken, and nobody is asked for them. */
static dsv3_result find_scaled(void *user, const char *name, dsv3_tensor *tensor) {
    const synth *s = (const synth *)user;
    dsv3_result result = synth_find(user, name, tensor);
    CHECK(strstr(name, "_scale_inv") == NULL);
    if (result == DSV3_OK && tensor->type == DSV3_F8_E4M3) {
        const synth_tensor *t = synth_tensor_of(s, name);
        tensor->scale = t != NULL ? t->scale : NULL;
    }
    return result;
}

static void test_scales_given(void) {
    int types;
    dsv3_config config = synth_config(SYNTH_BLOCKS, &types);
    synth *s = synth_make(&config, SYNTH_FP8, 3);
    st_file file[2];
    st_error error;
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(checkpoint_save(directory, &config, i ? find_scaled : synth_find, s, DSV3_F32, &error), ST_OK);
        CHECK_EQ(st_open(&file[i], weights, &error), ST_OK);
    }
    CHECK_EQ(file[0].count, file[1].count);
    for (size_t i = 0; i < file[0].count; i++) {
        const st_tensor *a = &file[0].tensor[i], *b = st_find(&file[1], a->name);
        CHECK(b != NULL && a->bytes == b->bytes && memcmp(a->data, b->data, a->bytes) == 0);
    }
    st_close(&file[0]), st_close(&file[1]);
    synth_close(s);
}

/* A tensor of more bytes than size_t can count, and more columns than 128 rows of them find memory. */
static dsv3_result find_giant(void *user, const char *name, dsv3_tensor *tensor) {
    (void)name;
    *tensor = *(const dsv3_tensor *)user;
    return DSV3_OK;
}

static void test_giants(void) {
    dsv3_tensor giant;
    dsv3_tensor_info info;
    checkpointi_save s;
    st_error error;
    memset(&giant, 0, sizeof giant), memset(&info, 0, sizeof info), memset(&s, 0, sizeof s);
    snprintf(info.name, sizeof info.name, "giant");
    info.rank = giant.rank = 2;
    info.rows = giant.rows = SIZE_MAX / 8, info.cols = giant.cols = 3;
    giant.data = "";
    s.find = find_giant, s.user = &giant, s.error = &error, s.bytes = 4;
    CHECK_EQ(checkpointi_save_visit(&s, &info), DSV3_ERR_OVERFLOW);
    CHECK(error.code == ST_ERR_OVERFLOW && strcmp(error.message, "giant: is too large") == 0 && s.count == 0);
    s.widest = SIZE_MAX / 2;
    CHECK_EQ(checkpointi_save_run(&s, weights, &error), ST_ERR_NOMEM);
    CHECK(strncmp(error.message, "saving: no memory for", 21) == 0);
    ST_FREE(s.tensors), ST_FREE(s.pieces), ST_FREE(s.rows), ST_FREE(s.code), ST_FREE(s.scale);
    CHECK_EQ(checkpointi_dtype((dsv3_type)DSV3_TYPES), ST_U8);
}

/* Whatever allocation fails: an error that says so, and the file that was there. */
static void test_no_memory(void) {
    int types, failed = 0;
    dsv3_config config = synth_config(SYNTH_V3, &types);
    synth *s = synth_make(&config, SYNTH_F32, 3);
    st_error error;
    st_file file;
    char *text, *other;
    CHECK_EQ(st_write_bytes(weights, "old", 3, &error), ST_OK);
    for (long k = 0; k < 100; k++) {
        st_result result;
        fails_at = k;
        result = checkpoint_save(directory, &config, synth_find, s, DSV3_BF16, &error);
        if (fails_at >= 0) break; /* none did */
        fails_at = -1, failed++;
        CHECK_EQ(result, ST_ERR_NOMEM);
        CHECK(error.code == ST_ERR_NOMEM && strstr(error.message, "memory") != NULL);
        CHECK_EQ(st_open(&file, weights, &error), ST_ERR_TRUNC); /* the old one */
    }
    CHECK(failed >= 5);
    fails_at = 0, text = (char *)weights;
    CHECK_EQ(checkpoint_config_text(&text, &config, DSV3_F32, &error), ST_ERR_NOMEM);
    CHECK(text == NULL && strstr(error.message, "no memory") != NULL);
    CHECK_EQ(checkpoint_config_text(&text, &config, DSV3_F32, &error), ST_OK);
    for (long k = 0; k < 3; k++) {
        fails_at = k, other = text;
        CHECK_EQ(checkpoint_config_adapt(&other, text, strlen(text), "text", DSV3_F32, &error), ST_ERR_NOMEM);
        CHECK(other == NULL && strstr(error.message, "memory") != NULL && fails_at < 0);
    }
    fails_at = -1;
    ST_FREE(text);
    synth_close(s);
}

/* ---- Paths */

static void test_long_paths(void) {
    static char path[5000];
    dsv3_config config = dsv3_config_preset(DSV3_PRESET_MICRO), got;
    checkpoint c;
    st_error error;
    char *text = path;
    size_t n = 7;
    memset(path, 'a', sizeof path - 1);
    for (int k = 0; k < 5; k++) {
        st_result result = k == 0   ? checkpoint_save(path, &config, synth_find, NULL, DSV3_F32, &error)
                           : k == 1 ? checkpoint_config_write(path, "{}", &error)
                           : k == 2 ? checkpoint_config_read(&text, &n, path, &error)
                                    : checkpoint_config(&got, path, &error);
        CHECK_EQ(result, ST_ERR_LIMIT);
        CHECK(error.code == ST_ERR_LIMIT && strstr(error.message, "aaa...: the path is too long") != NULL);
        if (k == 3) memcpy(path + sizeof path - 6, ".json", 5);
    }
    CHECK(text == NULL);
    CHECK_EQ(checkpoint_config(&got, "/-", &error), ST_ERR_MISSING);
    CHECK(strstr(error.message, "/-/config.json: does not exist") != NULL);
    /* generation_config.json is longer than config.json: where it cannot be, there is none */
    memset(&c, 0, sizeof c);
    path[4096 - 14] = '\0';
    CHECK_EQ(checkpointi_generation(&c, path, &error), ST_OK);
}

static void test_read(void) {
    char *text = NULL, name[80];
    size_t n = 0;
    checkpoint c;
    st_error error;
    CHECK_EQ(checkpoint_config_write(directory, "{\"a\": 1}", &error), ST_OK);
    for (int k = 0; k < 2; k++) {
        snprintf(name, sizeof name, "%s%s", directory, k ? "/config.json" : "");
        CHECK_EQ(checkpoint_config_read(&text, &n, name, &error), ST_OK);
        CHECK(n == 8 && memcmp(text, "{\"a\": 1}", 8) == 0);
        ST_FREE(text);
    }
    snprintf(name, sizeof name, "%s/none.json", directory);
    CHECK_EQ(checkpoint_config_read(&text, &n, name, &error), ST_ERR_MISSING);
    CHECK(text == NULL && strstr(error.message, "none.json: does not exist") != NULL);
    memset(&c, 0, sizeof c);
    snprintf(name, sizeof name, "%s/generation_config.json", directory);
    CHECK_EQ(checkpointi_generation(&c, directory, &error), ST_OK); /* there is none */
    CHECK_EQ(mkdir(name, 0777), 0);
    CHECK_EQ(checkpointi_generation(&c, directory, &error), ST_ERR_IO);
    CHECK(strstr(error.message, "generation_config.json: not a regular file") != NULL);
    CHECK_EQ(rmdir(name), 0);
}

/* ---- config.json */

static void check_config(const dsv3_config *want, const char *text) {
    dsv3_config got, plain = *want;
    st_error error;
    CHECK_EQ(checkpoint_config_parse(&got, text, strlen(text), "text", &error), ST_OK);
    plain.num_key_value_heads = want->num_attention_heads;
    plain.gate_scaling = got.gate_scaling; /* in no file */
    if (plain.rope_scaling.type == DSV3_ROPE_NONE) plain.rope_scaling = got.rope_scaling;
    CHECK(memcmp(&got, &plain, sizeof got) == 0);
}

static void test_configs(void) {
    char *text, *other;
    st_error error;
    for (int which = 0; which <= DSV3_PRESET_MICRO; which++) {
        dsv3_config config = dsv3_config_preset((dsv3_preset)which);
        for (int type = 0; type < DSV3_TYPES; type++) {
            CHECK_EQ(checkpoint_config_text(&text, &config, (dsv3_type)type, &error), ST_OK);
            check_config(&config, text);
            CHECK_EQ(strstr(text, "quantization_config") != NULL, type >= DSV3_F8_E4M3);
            for (int to = 0; to < DSV3_TYPES; to++) {
                CHECK_EQ(checkpoint_config_adapt(&other, text, strlen(text), "text", (dsv3_type)to, &error), ST_OK);
                check_config(&config, other);
                CHECK_EQ(strstr(other, "quantization_config") != NULL, to >= DSV3_F8_E4M3);
                CHECK_EQ(strstr(other, "\"fp8\"") != NULL, to == DSV3_F8_E4M3);
                CHECK_EQ(strstr(other, "\"q8_0\"") != NULL, to == DSV3_Q8_0);
                CHECK_EQ(strstr(other, "\"q4_0\"") != NULL, to == DSV3_Q4_0);
                CHECK(strstr(other, "quant_method") == NULL ||
                      strstr(strstr(other, "quant_method") + 1, "quant_method") == NULL);
                CHECK_EQ(strstr(other, "float32") != NULL, to == DSV3_F32);
                ST_FREE(other);
            }
            ST_FREE(text);
        }
    }
    other = NULL;
    CHECK(checkpoint_config_adapt(&other, "{\"a\": 1}", 8, "text", DSV3_F32, &error) != ST_OK);
    CHECK(other == NULL);
}

/* Numbers of nine digits come back as they were; short ones are written short. */
static void test_digits(void) {
    static const float eps[] = {1e-6f, 1.01529495e-05f, 1.0f / 3.0f, 0.25f};
    static const char *const shown[] = {": 1e-06,", ": 1.01529495e-05,", ": 0.33333334,", ": 0.25,"};
    for (size_t i = 0; i < 4; i++) {
        dsv3_config config = dsv3_config_preset(DSV3_PRESET_MICRO);
        char *text;
        config.rms_norm_eps = eps[i];
        CHECK_EQ(checkpoint_config_text(&text, &config, DSV3_F32, NULL), ST_OK);
        CHECK(strstr(text, shown[i]) != NULL);
        check_config(&config, text);
        ST_FREE(text);
    }
}

/* Everything else stays, byte for byte. */
static void test_adapt(void) {
    dsv3_config config = dsv3_config_preset(DSV3_PRESET_MICRO);
    char *text, *other, *own;
    st_error error;
    size_t n;
    CHECK_EQ(checkpoint_config_text(&text, &config, DSV3_F32, &error), ST_OK);
    n = strlen(text);
    own = (char *)test_alloc(n + 200);
    snprintf(own, n + 200, "{\"dtype\":\"float32\",\"a \\\"b\":[1,{\"c\":null}],\"quantization_config\":null,%s",
             text + 1);
    CHECK_EQ(checkpoint_config_adapt(&other, own, strlen(own), "text", DSV3_F8_E4M3, &error), ST_OK);
    CHECK(strstr(other, "\"dtype\": \"bfloat16\"") != NULL);
    CHECK(strstr(other, "\"a \\\"b\": [1,{\"c\":null}]") != NULL);
    CHECK(strstr(other, "\"quantization_config\": {") != NULL);
    check_config(&config, other);
    free(own);
    ST_FREE(other);
    ST_FREE(text);
}

/* Which family's config.json is written follows from the gate's scaling where that can be seen. */
static void test_scaling(void) {
    for (int i = 0; i < 12; i++) {
        static const float factor[3] = {0.5f, 1.0f, 2.5f};
        dsv3_config config = dsv3_config_preset(DSV3_PRESET_MICRO), got;
        char *text;
        st_error error;
        config.routed_scaling_factor = factor[i % 3];
        config.norm_topk_prob = i / 3 % 2;
        config.gate_scaling = i / 6 ? DSV3_SCALE_UNLESS_NORMED : DSV3_SCALE_ALWAYS;
        CHECK_EQ(checkpoint_config_text(&text, &config, DSV3_F32, &error), ST_OK);
        CHECK_EQ(checkpoint_config_parse(&got, text, strlen(text), "text", &error), ST_OK);
        if (config.norm_topk_prob && i % 3 != 1) CHECK_EQ(got.gate_scaling, config.gate_scaling);
        CHECK(memcmp(&got.routed_scaling_factor, &config.routed_scaling_factor, sizeof(float)) == 0);
        CHECK(got.norm_topk_prob == config.norm_topk_prob && got.topk_method == config.topk_method);
        ST_FREE(text);
    }
}

/* Text beyond its room is refused as a whole. */
static void test_full_text(void) {
    checkpointi_text t;
    st_error error;
    char *text = weights, wide[600];
    memset(wide, 'x', sizeof wide - 1);
    wide[sizeof wide - 1] = '\0';
    for (int k = 0; k < 3; k++) {
        CHECK_EQ(checkpointi_text_begin(&t, k < 2 ? 8 : 4096, &error), ST_OK);
        if (k < 2) checkpointi_put(&t, "1234567890", k ? 8 : 7);
        if (k == 2) checkpointi_print(&t, "%s", wide); /* no line of a config.json is that long */
        if (k == 0) {
            CHECK_EQ(checkpointi_text_end(&t, &text, &error), ST_OK);
            CHECK(strcmp(text, "1234567") == 0);
            ST_FREE(text);
        } else {
            CHECK_EQ(checkpointi_text_end(&t, &text, &error), ST_ERR_LIMIT);
            CHECK(strcmp(error.message, "config.json: is too long") == 0);
        }
    }
}

/* ---- Files */

static const float made_bytes[3] = {1.0f, 2.0f, 3.0f};

static st_result make_bytes(void *user, size_t index, st_sink *sink, st_error *error) {
    const int *how = (const int *)user;
    const float *x = made_bytes;
    (void)index;
    if (*how == 3) {
        if (error != NULL) snprintf(error->message, sizeof error->message, "no more");
        return ST_ERR_NOMEM;
    }
    if (*how == 4) return st_put(sink, x, sizeof made_bytes + 1);
    for (int i = 0; i < (*how == 1 ? 2 : 3); i++) {
        st_result result = st_put(sink, x + i, sizeof x[i]);
        if (result != ST_OK) return result;
    }
    return *how == 2 ? st_put(sink, x, sizeof x[0]) : ST_OK;
}

static void test_files(void) {
    static const st_result want[5] = {ST_OK, ST_ERR_MISMATCH, ST_ERR_MISMATCH, ST_ERR_NOMEM, ST_ERR_MISMATCH};
    st_tensor t;
    st_file file;
    st_error error;
    char temporary[128];
    memset(&t, 0, sizeof t);
    t.name = "x";
    t.dtype = ST_F32;
    t.rank = 1;
    t.shape[0] = 3;
    t.bytes = 12;
    snprintf(temporary, sizeof temporary, "%s.%ld-0.tmp", weights, (long)getpid());
    for (int how = 0; how < 5; how++) {
        CHECK_EQ(st_write_made(weights, &t, 1, NULL, make_bytes, &how, &error), want[how]);
        CHECK_EQ(error.message[0] != '\0', how > 0);
        CHECK(access(temporary, F_OK) != 0);
        CHECK_EQ(st_open(&file, weights, &error), ST_OK); /* the first one, all the time */
        CHECK(file.count == 1 && memcmp(file.tensor[0].data, made_bytes, 12) == 0);
        st_close(&file);
    }
    CHECK_EQ(st_write_made(weights, &t, 1, NULL, NULL, NULL, &error), ST_ERR_ARG);
    CHECK_EQ(st_write_bytes(NULL, "a", 1, &error), ST_ERR_ARG);
    CHECK_EQ(st_write_bytes(weights, NULL, 1, &error), ST_ERR_ARG);
    CHECK_EQ(st_write_bytes(weights, "a", 1, &error), ST_OK);
    CHECK_EQ(st_write_bytes(weights, "", 0, &error), ST_OK);
    CHECK_EQ(st_open(&file, weights, &error), ST_ERR_TRUNC);
}

/* A file is written where links lead, also when it is not there yet; what is no file is not written to. */
static void test_links(void) {
    static const char *const leads[3] = {"model.safetensors", "link0", "somewhere/there"}; /* the last is made absolute */
    char named[3][64], folder[64], target[80], pipe_name[64], long_name[4096];
    struct stat status;
    st_file file;
    st_error error;
    snprintf(folder, sizeof folder, "%s/somewhere", directory);
    snprintf(target, sizeof target, "%s/there", folder);
    CHECK_EQ(mkdir(folder, 0777), 0);
    CHECK_EQ(remove(weights), 0);
    for (int i = 0; i < 3; i++) {
        snprintf(named[i], sizeof named[i], "%s/link%d", directory, i);
        CHECK_EQ(symlink(i < 2 ? leads[i] : target, named[i]), 0);
    }
    for (int i = 0; i < 3; i++) { /* nothing, a link to a link, nothing in another folder */
        CHECK_EQ(st_write_bytes(named[i], &"abc"[i], 3 - (size_t)i, &error), ST_OK);
        CHECK(lstat(named[i], &status) == 0 && S_ISLNK(status.st_mode));
        CHECK(stat(i < 2 ? weights : target, &status) == 0 && status.st_size == 3 - i);
    }
    CHECK_EQ(remove(target), 0);
    CHECK_EQ(rmdir(folder), 0); /* no temporary file was left in it */
    CHECK_EQ(st_write_bytes(named[2], "abc", 3, &error), ST_ERR_IO);
    CHECK(strstr(error.message, target) != NULL); /* that folder is no more */
    CHECK_EQ(remove(named[2]), 0);
    snprintf(pipe_name, sizeof pipe_name, "%s/pipe", directory);
    CHECK(mkfifo(pipe_name, 0666) == 0 && symlink("pipe", named[2]) == 0);
    CHECK_EQ(st_write_bytes(named[2], "abc", 3, &error), ST_OK); /* in place of the link */
    CHECK(lstat(named[2], &status) == 0 && S_ISREG(status.st_mode));
    CHECK(stat(pipe_name, &status) == 0 && S_ISFIFO(status.st_mode));
    CHECK_EQ(remove(pipe_name), 0);
    CHECK_EQ(remove(named[0]), 0);
    memset(long_name, 'x', sizeof long_name);
    long_name[sizeof long_name - 2] = long_name[sizeof long_name - 1] = '\0';
    if (symlink(long_name, named[0]) == 0) { /* with its folder more than a path may have */
        CHECK_EQ(st_write_bytes(named[0], "abc", 3, &error), ST_OK);
        CHECK(lstat(named[0], &status) == 0 && S_ISREG(status.st_mode));
    }
    CHECK_EQ(st_open(&file, named[2], &error), ST_ERR_TRUNC);
    for (int i = 0; i < 3; i++) remove(named[i]);
}

int main(void) {
    char config[64];
    if (mkdtemp(directory) == NULL) return 2;
    snprintf(weights, sizeof weights, "%s/model.safetensors", directory);
    snprintf(config, sizeof config, "%s/config.json", directory);
    test_models();
    test_edges();
    test_errors();
    test_odd_tensors();
    test_scales_given();
    test_giants();
    test_no_memory();
    test_long_paths();
    test_read();
    test_configs();
    test_digits();
    test_adapt();
    test_scaling();
    test_full_text();
    test_files();
    test_links();
    remove(weights);
    remove(config);
    CHECK(rmdir(directory) == 0); /* nothing else was left there */
    return test_done("save");
}
