/* test_config.c -- chapter 10, first half: configurations and the list of tensors.
 *
 * A failure means that a bad configuration would get through (and sizes computed from it could be anything), that a
 * good one is refused, that an error does not say which field is wrong, or that the tensors a published model is
 * expected to have are not the ones its files contain. */
#include "dsv3.h"
#include "test.h"

static const dsv3_preset presets[] = {DSV3_PRESET_V3, DSV3_PRESET_V2,     DSV3_PRESET_V2_LITE, DSV3_PRESET_MOONLIGHT,
                                      DSV3_PRESET_K2, DSV3_PRESET_AUSTEN, DSV3_PRESET_MICRO};
#define PRESETS (sizeof presets / sizeof presets[0])

/* ---- Good configurations */

static void test_presets(void) {
    dsv3_error error;
    dsv3_config c = dsv3_config_default();
    for (size_t i = 0; i < PRESETS; i++) {
        size_t bytes = 0;
        c = dsv3_config_preset(presets[i]);
        memset(&error, 0xFF, sizeof error);
        CHECK_EQ(dsv3_config_check(&c, &error), DSV3_OK);
        CHECK_EQ(error.code, DSV3_OK);
        CHECK(error.name[0] == '\0');
        CHECK_EQ(dsv3_config_check(&c, NULL), DSV3_OK);
        CHECK_EQ(dsv3_model_size(&c, &bytes, NULL), DSV3_OK);
        CHECK(bytes > 0);
    }
    c = dsv3_config_default();
    CHECK(dsv3_config_check(&c, &error) != DSV3_OK); /* sizes are not set */
    CHECK(strcmp(error.name, "vocab_size") == 0);
    c = dsv3_config_preset((dsv3_preset)99);
    CHECK(dsv3_config_check(&c, &error) != DSV3_OK);
    CHECK_EQ(dsv3_config_check(NULL, &error), DSV3_ERR_ARG);
    CHECK(strcmp(error.name, "config") == 0);
}

static void test_moe_layers(void) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    for (int32_t i = 0; i < 62; i++) CHECK_EQ(dsv3_config_is_moe(&c, i), i >= 3);
    c.moe_layer_freq = 3;
    c.first_k_dense_replace = 4;
    for (int32_t i = 0; i < 62; i++) CHECK_EQ(dsv3_config_is_moe(&c, i), i >= 4 && i % 3 == 0);
    c.moe_layer_freq = 1;
    c.first_k_dense_replace = 0;
    CHECK_EQ(dsv3_config_is_moe(&c, 0), 1);
    c.first_k_dense_replace = 61;
    CHECK_EQ(dsv3_config_is_moe(&c, 60), 0);
    CHECK_EQ(dsv3_config_is_moe(&c, 61), 1); /* the MTP layer */
}

/* ---- One field at a time. The base is the V3 configuration. */

typedef struct field_case {
    size_t offset;
    int is_float;
    double value;
    int code;
    const char *name; /* what the error must name; NULL when the value is fine */
} field_case;

#define INT(field, value, code)                                                                                      \
    { offsetof(dsv3_config, field), 0, value, code, code == DSV3_OK ? NULL : #field }
#define FLOAT(field, value, code)                                                                                    \
    { offsetof(dsv3_config, field), 1, value, code, code == DSV3_OK ? NULL : #field }
#define HUGE_INT 2147483647.0
#define ANY_SIZE(field, most)                                                                                        \
    INT(field, 0, DSV3_ERR_ARG), INT(field, -1, DSV3_ERR_LIMIT), INT(field, -HUGE_INT - 1, DSV3_ERR_LIMIT),          \
        INT(field, HUGE_INT, DSV3_ERR_LIMIT), INT(field, (double)(most) + 1, DSV3_ERR_LIMIT)
#define POSITIVE(field)                                                                                              \
    FLOAT(field, 0, DSV3_ERR_ARG), FLOAT(field, -1, DSV3_ERR_ARG), FLOAT(field, (double)NAN, DSV3_ERR_ARG),          \
        FLOAT(field, (double)INFINITY, DSV3_ERR_ARG), FLOAT(field, -(double)INFINITY, DSV3_ERR_ARG)

static const field_case cases[] = {
    ANY_SIZE(vocab_size, DSV3_MAX_VOCAB),
    ANY_SIZE(hidden_size, DSV3_MAX_DIM),
    ANY_SIZE(intermediate_size, DSV3_MAX_DIM),
    ANY_SIZE(moe_intermediate_size, DSV3_MAX_DIM),
    ANY_SIZE(num_hidden_layers, DSV3_MAX_LAYERS),
    ANY_SIZE(num_attention_heads, DSV3_MAX_HEADS),
    ANY_SIZE(kv_lora_rank, DSV3_MAX_DIM),
    ANY_SIZE(qk_nope_head_dim, DSV3_MAX_DIM),
    ANY_SIZE(v_head_dim, DSV3_MAX_DIM),
    ANY_SIZE(n_routed_experts, DSV3_MAX_EXPERTS),
    ANY_SIZE(num_experts_per_tok, DSV3_MAX_TOPK),
    ANY_SIZE(n_group, DSV3_MAX_EXPERTS),
    ANY_SIZE(moe_layer_freq, DSV3_MAX_LAYERS),
    ANY_SIZE(max_position_embeddings, DSV3_MAX_SEQ),
    ANY_SIZE(qk_rope_head_dim, DSV3_MAX_DIM),
    INT(qk_rope_head_dim, 63, DSV3_ERR_ARG),
    INT(qk_rope_head_dim, 1, DSV3_ERR_ARG),
    INT(qk_rope_head_dim, 2, DSV3_OK),
    INT(q_lora_rank, 0, DSV3_OK), /* null in files */
    INT(q_lora_rank, -1, DSV3_ERR_LIMIT),
    INT(q_lora_rank, HUGE_INT, DSV3_ERR_LIMIT),
    INT(num_key_value_heads, -7, DSV3_OK), /* ignored */
    INT(num_hidden_layers, 1e9, DSV3_ERR_LIMIT),
    INT(num_nextn_predict_layers, 1e9, DSV3_ERR_LIMIT),
    INT(num_nextn_predict_layers, -1, DSV3_ERR_LIMIT),
    INT(num_nextn_predict_layers, DSV3_MAX_LAYERS - 61, DSV3_OK),
    INT(num_nextn_predict_layers, DSV3_MAX_LAYERS - 60, DSV3_ERR_LIMIT),
    INT(num_nextn_predict_layers, 0, DSV3_OK),
    INT(first_k_dense_replace, 62, DSV3_ERR_ARG),
    INT(first_k_dense_replace, 61, DSV3_OK),
    INT(first_k_dense_replace, 0, DSV3_OK),
    INT(first_k_dense_replace, -1, DSV3_ERR_ARG),
    INT(first_k_dense_replace, HUGE_INT, DSV3_ERR_ARG),
    INT(moe_layer_freq, 61, DSV3_OK),
    INT(n_shared_experts, 0, DSV3_OK),
    INT(n_shared_experts, -1, DSV3_ERR_LIMIT),
    INT(n_shared_experts, 512, DSV3_OK), /* 512 * 2048 = DSV3_MAX_DIM */
    INT(n_shared_experts, 513, DSV3_ERR_LIMIT),
    INT(n_shared_experts, HUGE_INT, DSV3_ERR_LIMIT),
    INT(n_group, 7, DSV3_ERR_ARG), /* does not divide 256 */
    INT(n_group, 512, DSV3_ERR_ARG),
    INT(topk_group, 9, DSV3_ERR_ARG),
    INT(topk_group, 8, DSV3_OK),
    INT(topk_group, 0, DSV3_ERR_ARG),
    INT(topk_group, -1, DSV3_ERR_ARG),
    INT(topk_group, HUGE_INT, DSV3_ERR_ARG),
    INT(num_experts_per_tok, 128, DSV3_OK), /* 4 groups of 32 */
    INT(num_experts_per_tok, 129, DSV3_ERR_ARG),
    INT(num_experts_per_tok, 257, DSV3_ERR_ARG),
    INT(attention_bias, 1, DSV3_ERR_UNSUPPORTED),
    INT(tie_word_embeddings, 1, DSV3_OK),
    INT(rope_interleave, 0, DSV3_OK),
    INT(bos_token_id, -1, DSV3_OK),
    INT(bos_token_id, -2, DSV3_ERR_ARG),
    INT(bos_token_id, 129280, DSV3_ERR_ARG),
    INT(eos_token_id, 129279, DSV3_OK),
    INT(eos_token_id, 129280, DSV3_ERR_ARG),
    INT(eos_token_id, HUGE_INT, DSV3_ERR_ARG),
    INT(eos_token_id, -2, DSV3_ERR_ARG),
    POSITIVE(routed_scaling_factor),
    POSITIVE(rms_norm_eps),
    POSITIVE(latent_norm_eps),
    FLOAT(rms_norm_eps, 1e-45, DSV3_ERR_ARG), /* subnormal: 0 on machines that flush */
    FLOAT(rms_norm_eps, 1e-30, DSV3_OK),
    POSITIVE(rope_theta),
    FLOAT(rope_theta, 1, DSV3_ERR_ARG),
    FLOAT(rope_theta, 1.5, DSV3_OK),
    POSITIVE(rope_scaling.factor),
    FLOAT(rope_scaling.factor, 0.5, DSV3_ERR_ARG),
    FLOAT(rope_scaling.factor, 1, DSV3_OK),
    INT(rope_scaling.original_max_position_embeddings, 0, DSV3_ERR_ARG),
    INT(rope_scaling.original_max_position_embeddings, -1, DSV3_ERR_LIMIT),
    INT(rope_scaling.original_max_position_embeddings, HUGE_INT, DSV3_ERR_LIMIT),
    FLOAT(rope_scaling.beta_fast, 0.5, DSV3_ERR_ARG), /* less than beta_slow */
    FLOAT(rope_scaling.beta_fast, 1, DSV3_OK),        /* K2: equal */
    FLOAT(rope_scaling.beta_fast, (double)NAN, DSV3_ERR_ARG),
    FLOAT(rope_scaling.beta_fast, (double)INFINITY, DSV3_ERR_ARG),
    FLOAT(rope_scaling.beta_slow, 0, DSV3_ERR_ARG),
    FLOAT(rope_scaling.beta_slow, -1, DSV3_ERR_ARG),
    FLOAT(rope_scaling.beta_slow, (double)NAN, DSV3_ERR_ARG),
    FLOAT(rope_scaling.mscale, -1, DSV3_ERR_ARG),
    FLOAT(rope_scaling.mscale, (double)NAN, DSV3_ERR_ARG),
    FLOAT(rope_scaling.mscale, (double)INFINITY, DSV3_ERR_ARG),
    FLOAT(rope_scaling.mscale, 0, DSV3_OK),
    FLOAT(rope_scaling.mscale_all_dim, -1, DSV3_ERR_ARG),
    FLOAT(rope_scaling.mscale_all_dim, (double)NAN, DSV3_ERR_ARG),
    FLOAT(rope_scaling.mscale_all_dim, 0, DSV3_OK),
    INT(rope_scaling.truncate, 0, DSV3_OK),
    INT(rope_scaling.truncate, -1, DSV3_ERR_ARG),
    INT(rope_scaling.truncate, 2, DSV3_ERR_ARG),
};

/* The check must give `code` and name `name`; and every size query must refuse what the check refuses. */
static void expect(const dsv3_config *c, int code, const char *name, const char *what, double value) {
    dsv3_error error;
    char text[200], line[300];
    size_t bytes = 12345;
    dsv3_result result;
    memset(&error, 0xFF, sizeof error);
    result = dsv3_config_check(c, &error);
    if (SIZE_MAX <= 0xFFFFFFFFu && code == DSV3_OK &&
        result == DSV3_ERR_OVERFLOW) { /* 32 bits: legal, but too large */
        test_count(strcmp(error.name, name) != 0, __FILE__, __LINE__, what);
        return;
    }
    snprintf(line, sizeof line, "%s = %g: got %d \"%s\", want %d", what, value, (int)result, error.name, code);
    test_count(result == code && error.code == code && strcmp(error.name, name) == 0, __FILE__, __LINE__, line);
    CHECK_EQ(dsv3_config_check(c, NULL), code);
    if (code == DSV3_OK) return;
    dsv3_error_text(&error, text, sizeof text);
    CHECK(strncmp(text, name, strlen(name)) == 0 && strlen(text) > strlen(name) + 5);
    CHECK_EQ(dsv3_model_size(c, &bytes, NULL), code);
    CHECK(bytes == 0 || bytes == 12345);
    CHECK_EQ(dsv3_cache_size(c, 16, DSV3_F32, &bytes, NULL), code);
    CHECK(bytes == 0 || bytes == 12345);
    CHECK_EQ(dsv3_workspace_size(c, 16, 1, &bytes, NULL), code);
    CHECK(bytes == 0 || bytes == 12345);
}

static void test_fields(void) {
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const field_case *f = &cases[i];
        dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
        if (f->is_float) {
            float value = (float)f->value;
            memcpy((char *)&c + f->offset, &value, sizeof value);
        } else {
            int32_t value = (int32_t)f->value;
            memcpy((char *)&c + f->offset, &value, sizeof value);
        }
        if (f->offset == offsetof(dsv3_config, num_hidden_layers) && f->value > 1e8) c.first_k_dense_replace = 3;
        expect(&c, f->code, f->name != NULL ? f->name : "", f->name != NULL ? f->name : "legal value", f->value);
    }
}

/* Fields that are enums: what they have names for and no more, each with its own words. */
static void test_choices(void) {
#define CHOICE(field, count, words) {offsetof(dsv3_config, field), count, #field, words}
    static const struct {
        size_t offset;
        int32_t count;
        const char *name, *words;
    } field[] = {CHOICE(scoring_func, 2, "sigmoid or softmax"), CHOICE(topk_method, 3, ""), CHOICE(group_mask, 2, ""),
                 CHOICE(gate_scaling, 2, ""), CHOICE(bias_form, 2, ""),
                 CHOICE(mtp_concat, 2, "is not one of dsv3_mtp_concat"),
                 CHOICE(mtp_hidden, 2, "is not one of dsv3_mtp_hidden"),
                 CHOICE(rope_scaling.type, 2, "must be yarn or absent"),
                 CHOICE(attention_bias, 1, "no published model has attention biases")};
    for (size_t i = 0; i < sizeof field / sizeof field[0]; i++) {
        for (int32_t value = -2; value < field[i].count + 2; value++) {
            dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
            dsv3_error error;
            int known = value >= 0 && value < field[i].count;
            memcpy((char *)&c + field[i].offset, &value, sizeof value);
            CHECK_EQ(dsv3_config_check(&c, &error), known ? DSV3_OK : DSV3_ERR_UNSUPPORTED);
            if (known) continue;
            CHECK(strcmp(error.name, field[i].name) == 0);
            CHECK(strstr(error.why, field[i].words) != NULL);
        }
    }
}

/* Cases that need more than one field. */
static void test_combinations(void) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    c.scoring_func = (dsv3_scoring_func)7;
    expect(&c, DSV3_ERR_UNSUPPORTED, "scoring_func", "scoring_func", 7);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.topk_method = (dsv3_topk_method)7;
    expect(&c, DSV3_ERR_UNSUPPORTED, "topk_method", "topk_method", 7);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.rope_scaling.type = (dsv3_rope_type)7;
    expect(&c, DSV3_ERR_UNSUPPORTED, "rope_scaling.type", "rope_scaling.type", 7);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.rope_scaling.type = DSV3_ROPE_NONE; /* then nobody reads the rest */
    c.rope_scaling.factor = (float)NAN;
    c.rope_scaling.original_max_position_embeddings = -1;
    expect(&c, DSV3_OK, "", "rope_scaling.type none", 0);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.n_group = c.n_routed_experts = 8; /* one expert per group, bias scoring */
    c.num_experts_per_tok = 4;
    expect(&c, DSV3_OK, "", "groups of one", 8);
    c.num_experts_per_tok = 5;
    expect(&c, DSV3_ERR_ARG, "num_experts_per_tok", "num_experts_per_tok", 5);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.first_k_dense_replace = 61; /* no MoE layer: its fields may be 0 */
    c.num_nextn_predict_layers = 0;
    c.n_routed_experts = c.num_experts_per_tok = c.moe_intermediate_size = c.n_shared_experts = 0;
    expect(&c, DSV3_OK, "", "all dense", 0);
    c.num_nextn_predict_layers = 1; /* the MTP layer is MoE */
    expect(&c, DSV3_ERR_ARG, "moe_intermediate_size", "MTP on dense", 0);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.first_k_dense_replace = 0; /* no dense layer: its width may be 0 */
    c.intermediate_size = 0;
    expect(&c, DSV3_OK, "", "no dense layer", 0);
    c.moe_layer_freq = 2;
    expect(&c, DSV3_ERR_ARG, "intermediate_size", "dense layers by frequency", 0);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.num_hidden_layers = c.vocab_size = 0; /* the first one is named */
    expect(&c, DSV3_ERR_ARG, "vocab_size", "two bad fields", 0);
    c = dsv3_config_preset(DSV3_PRESET_V3);
    c.vocab_size = (int32_t)DSV3_MAX_VOCAB; /* 2^24 x 7168 float32: more than 32 bits can address */
    if (SIZE_MAX < 0xFFFFFFFFFFu) {
        expect(&c, DSV3_ERR_OVERFLOW, "vocab_size", "vocab_size", 0);
    } else {
        expect(&c, DSV3_OK, "", "vocab_size", 0);
    }
}

/* ---- Size queries */

static void test_sizes(void) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_MICRO);
    size_t bytes = 12345;
    CHECK_EQ(dsv3_model_size(NULL, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_model_size(&c, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_size(NULL, 8, DSV3_F32, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_size(&c, 8, DSV3_F32, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_size(&c, 0, DSV3_F32, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_size(&c, (size_t)DSV3_MAX_SEQ + 1, DSV3_F32, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_cache_size(&c, SIZE_MAX, DSV3_F32, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_cache_size(&c, 8, DSV3_F16, &bytes, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_cache_size(&c, 8, DSV3_F8_E4M3, &bytes, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_cache_size(&c, 8, (dsv3_type)17, &bytes, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_workspace_size(NULL, 8, 1, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_size(&c, 8, 1, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_size(&c, 0, 1, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_size(&c, 8, 0, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_workspace_size(&c, (size_t)DSV3_MAX_SEQ + 1, 1, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_workspace_size(&c, SIZE_MAX, 1, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_workspace_size(&c, 8, SIZE_MAX, &bytes, NULL), DSV3_ERR_OVERFLOW);
    CHECK_EQ(dsv3_workspace_size(&c, 8, SIZE_MAX / 1024, &bytes, NULL), DSV3_ERR_OVERFLOW);
    CHECK(bytes == 0 || bytes == 12345);
    /* 576 numbers per position and layer */
    c = dsv3_config_preset(DSV3_PRESET_V3);
    CHECK_EQ(dsv3_cache_size(&c, 1000, DSV3_BF16, &bytes, NULL), DSV3_OK);
    CHECK(bytes >= 1000u * 70272u && bytes < 1000u * 70272u + 64);
    CHECK_EQ(dsv3_cache_size(&c, 1000, DSV3_F32, &bytes, NULL), DSV3_OK);
    CHECK(bytes >= 2000u * 70272u && bytes < 2000u * 70272u + 64);
}

/* A larger model, batch or number of threads never needs less. */
static void test_monotonic(void) {
    static const size_t field[] = {
        offsetof(dsv3_config, vocab_size),          offsetof(dsv3_config, hidden_size),
        offsetof(dsv3_config, intermediate_size),   offsetof(dsv3_config, moe_intermediate_size),
        offsetof(dsv3_config, num_hidden_layers),   offsetof(dsv3_config, num_nextn_predict_layers),
        offsetof(dsv3_config, num_attention_heads), offsetof(dsv3_config, q_lora_rank),
        offsetof(dsv3_config, kv_lora_rank),        offsetof(dsv3_config, qk_nope_head_dim),
        offsetof(dsv3_config, qk_rope_head_dim),    offsetof(dsv3_config, v_head_dim),
        offsetof(dsv3_config, n_routed_experts),    offsetof(dsv3_config, n_shared_experts),
        offsetof(dsv3_config, num_experts_per_tok)};
    for (size_t p = 0; p < PRESETS; p++) {
        for (size_t i = 0; i < sizeof field / sizeof field[0]; i++) {
            dsv3_config c = dsv3_config_preset(presets[p]);
            size_t last[3] = {0, 0, 0}, now[3];
            int32_t value, step;
            c.n_group = c.topk_group = 1;
            memcpy(&value, (char *)&c + field[i], sizeof value);
            step = field[i] == offsetof(dsv3_config, qk_rope_head_dim) ? 2 : 1;
            for (int k = 0; k < 70; k++) {
                memcpy((char *)&c + field[i], &value, sizeof value);
                if (dsv3_config_check(&c, NULL) != DSV3_OK) break; /* more than E experts per token, say */
                CHECK_EQ(dsv3_model_size(&c, &now[0], NULL), DSV3_OK);
                CHECK_EQ(dsv3_cache_size(&c, 33, DSV3_BF16, &now[1], NULL), DSV3_OK);
                CHECK_EQ(dsv3_workspace_size(&c, 33, 3, &now[2], NULL), DSV3_OK);
                CHECK(now[0] >= last[0] && now[1] >= last[1] && now[2] >= last[2]);
                memcpy(last, now, sizeof last);
                value += step;
            }
        }
    }
    for (size_t n = 1, cache = 0, rows = 0, threads = 0; n < 300; n++) {
        dsv3_config c = dsv3_config_preset(DSV3_PRESET_AUSTEN);
        size_t bytes = 0;
        dsv3_cache_size(&c, n, DSV3_F32, &bytes, NULL);
        CHECK(bytes > cache);
        cache = bytes;
        dsv3_workspace_size(&c, n, 2, &bytes, NULL);
        CHECK(bytes > rows);
        rows = bytes;
        dsv3_workspace_size(&c, 5, n, &bytes, NULL);
        CHECK(bytes > threads);
        threads = bytes;
    }
}

/* ---- The tensors of the published models */

typedef struct tally {
    const dsv3_config *config;
    double numbers, mtp, copies; /* main model, MTP without its copies, copies */
    double fp8_bytes;            /* as in the FP8 checkpoint */
    long tensors;                /* in the FP8 checkpoint, scales included */
    long groups[DSV3_KINDS];
    size_t wrong;
    long stop_at;
} tally;

static size_t blocks_of(size_t n) { return (n + 127) / 128; }

static dsv3_result count_tensor(void *user, const dsv3_tensor_info *info) {
    tally *t = (tally *)user;
    double n = (double)info->rows * (double)info->cols;
    int is_mtp = info->layer >= t->config->num_hidden_layers;
    int is_bias = strstr(info->name, "e_score_correction_bias") != NULL;
    if (info->optional) {
        t->copies += n;
    } else if (is_mtp) {
        t->mtp += n;
    } else {
        t->numbers += n;
    }
    t->fp8_bytes += info->quantised ? n + 4.0 * (double)(blocks_of(info->rows) * blocks_of(info->cols))
                                    : n * (is_bias ? 4.0 : 2.0);
    t->tensors += info->quantised ? 2 : 1;
    t->groups[info->kind]++;
    t->wrong += (info->rank == 1) != (info->rows == 1) || info->rank < 1 || info->rank > 2;
    t->wrong += info->quantised && info->rank != 2;
    t->wrong += (info->expert >= 0) != (info->kind == DSV3_KIND_EXPERTS);
    t->wrong += strlen(info->name) > 60 || (info->optional && !is_mtp);
    return t->stop_at > 0 && --t->stop_at == 0 ? DSV3_ERR_NAN : DSV3_OK;
}

static tally count_model(dsv3_preset preset) {
    dsv3_config c = dsv3_config_preset(preset);
    tally t;
    memset(&t, 0, sizeof t);
    t.config = &c;
    CHECK_EQ(dsv3_model_tensors(&c, count_tensor, &t, NULL), DSV3_OK);
    CHECK_EQ(t.wrong, 0);
    return t;
}

/* Billions, rounded to the digits of the published figure. */
#define CHECK_BILLIONS(numbers, want, digit) CHECK(fabs((numbers) / 1e9 - (want)) <= (digit) / 2)

static void test_totals(void) {
    tally t = count_model(DSV3_PRESET_V3);
    CHECK_BILLIONS(t.numbers, 671.03, 0.01);
    CHECK_BILLIONS(t.mtp, 11.6, 0.1);
    CHECK(fabs(t.copies - 2.0 * 129280 * 7168) < 0.5);
    CHECK_EQ(t.tensors, 91991);
    CHECK(fabs(t.fp8_bytes - 688574839360.0) < 0.5);
    CHECK_EQ(t.groups[DSV3_KIND_EXPERTS], 59 * 256 * 3);
    CHECK_EQ(t.groups[DSV3_KIND_SHARED], 59 * 3);
    CHECK_EQ(t.groups[DSV3_KIND_ROUTER], 59 * 2);
    CHECK_EQ(t.groups[DSV3_KIND_DENSE], 3 * 3);
    CHECK_EQ(t.groups[DSV3_KIND_ATTENTION], 62 * 5);
    CHECK_EQ(t.groups[DSV3_KIND_NORM], 62 * 4 + 1);
    CHECK_EQ(t.groups[DSV3_KIND_MTP], 6);
    CHECK_EQ(t.groups[DSV3_KIND_EMBED], 1);
    CHECK_EQ(t.groups[DSV3_KIND_HEAD], 1);
    t = count_model(DSV3_PRESET_V2);
    CHECK_BILLIONS(t.numbers, 235.7, 0.1);
    CHECK(t.mtp <= 0 && t.copies <= 0);
    t = count_model(DSV3_PRESET_V2_LITE);
    CHECK_BILLIONS(t.numbers, 15.71, 0.01);
    t = count_model(DSV3_PRESET_MOONLIGHT);
    CHECK_BILLIONS(t.numbers, 15.96, 0.01);
    t = count_model(DSV3_PRESET_K2);
    CHECK_BILLIONS(t.numbers, 1026.4, 0.1);
    CHECK_EQ(t.groups[DSV3_KIND_MTP], 0);
    t = count_model(DSV3_PRESET_AUSTEN);
    CHECK_BILLIONS(t.numbers + t.mtp, 0.0065, 0.0001);
    t = count_model(DSV3_PRESET_MICRO);
    CHECK_BILLIONS(t.numbers + t.mtp, 0.0003, 0.0001);
}

/* ---- Names and shapes, one by one */

typedef struct wanted {
    const char *name;
    int32_t rank, quantised, optional;
    size_t rows, cols;
    int found;
} wanted;

static dsv3_result look_for(void *user, const dsv3_tensor_info *info) {
    for (wanted *w = (wanted *)user; w->name != NULL; w++) {
        if (strcmp(w->name, info->name) != 0) continue;
        w->found++;
        CHECK(info->rank == w->rank && info->rows == w->rows && info->cols == w->cols);
        CHECK(info->quantised == w->quantised && info->optional == w->optional);
    }
    return DSV3_OK;
}

static void test_names(void) {
    wanted v3[] = {{"model.embed_tokens.weight", 2, 0, 0, 129280, 7168, 0},
                   {"model.layers.0.input_layernorm.weight", 1, 0, 0, 1, 7168, 0},
                   {"model.layers.60.post_attention_layernorm.weight", 1, 0, 0, 1, 7168, 0},
                   {"model.layers.7.self_attn.q_a_proj.weight", 2, 1, 0, 1536, 7168, 0},
                   {"model.layers.7.self_attn.q_a_layernorm.weight", 1, 0, 0, 1, 1536, 0},
                   {"model.layers.7.self_attn.q_b_proj.weight", 2, 1, 0, 24576, 1536, 0},
                   {"model.layers.7.self_attn.kv_a_proj_with_mqa.weight", 2, 1, 0, 576, 7168, 0},
                   {"model.layers.7.self_attn.kv_a_layernorm.weight", 1, 0, 0, 1, 512, 0},
                   {"model.layers.7.self_attn.kv_b_proj.weight", 2, 1, 0, 32768, 512, 0},
                   {"model.layers.7.self_attn.o_proj.weight", 2, 1, 0, 7168, 16384, 0},
                   {"model.layers.2.mlp.gate_proj.weight", 2, 1, 0, 18432, 7168, 0},
                   {"model.layers.2.mlp.up_proj.weight", 2, 1, 0, 18432, 7168, 0},
                   {"model.layers.2.mlp.down_proj.weight", 2, 1, 0, 7168, 18432, 0},
                   {"model.layers.3.mlp.gate.weight", 2, 0, 0, 256, 7168, 0},
                   {"model.layers.3.mlp.gate.e_score_correction_bias", 1, 0, 0, 1, 256, 0},
                   {"model.layers.3.mlp.experts.255.gate_proj.weight", 2, 1, 0, 2048, 7168, 0},
                   {"model.layers.3.mlp.experts.0.up_proj.weight", 2, 1, 0, 2048, 7168, 0},
                   {"model.layers.61.mlp.experts.9.down_proj.weight", 2, 1, 0, 7168, 2048, 0},
                   {"model.layers.3.mlp.shared_experts.gate_proj.weight", 2, 1, 0, 2048, 7168, 0},
                   {"model.layers.3.mlp.shared_experts.up_proj.weight", 2, 1, 0, 2048, 7168, 0},
                   {"model.layers.3.mlp.shared_experts.down_proj.weight", 2, 1, 0, 7168, 2048, 0},
                   {"model.norm.weight", 1, 0, 0, 1, 7168, 0},
                   {"lm_head.weight", 2, 0, 0, 129280, 7168, 0},
                   {"model.layers.61.embed_tokens.weight", 2, 0, 1, 129280, 7168, 0},
                   {"model.layers.61.enorm.weight", 1, 0, 0, 1, 7168, 0},
                   {"model.layers.61.hnorm.weight", 1, 0, 0, 1, 7168, 0},
                   {"model.layers.61.eh_proj.weight", 2, 0, 0, 7168, 14336, 0},
                   {"model.layers.61.shared_head.norm.weight", 1, 0, 0, 1, 7168, 0},
                   {"model.layers.61.shared_head.head.weight", 2, 0, 1, 129280, 7168, 0},
                   {NULL, 0, 0, 0, 0, 0, 0}};
    wanted lite[] = {{"model.layers.5.self_attn.q_proj.weight", 2, 1, 0, 3072, 2048, 0},
                     {"model.layers.5.mlp.shared_experts.gate_proj.weight", 2, 1, 0, 2816, 2048, 0},
                     {NULL, 0, 0, 0, 0, 0, 0}};
    wanted absent[] = {{"model.layers.5.self_attn.q_a_proj.weight", 2, 1, 0, 0, 0, 0},
                       {"model.layers.5.self_attn.q_a_layernorm.weight", 1, 0, 0, 0, 0, 0},
                       {"model.layers.5.self_attn.q_b_proj.weight", 2, 1, 0, 0, 0, 0},
                       {"model.layers.5.mlp.gate.e_score_correction_bias", 1, 0, 0, 0, 0, 0},
                       {"model.layers.27.eh_proj.weight", 2, 0, 0, 0, 0, 0},
                       {"model.layers.0.mlp.gate.weight", 2, 0, 0, 0, 0, 0},
                       {"lm_head.weight", 2, 0, 0, 0, 0, 0}, /* tied below */
                       {NULL, 0, 0, 0, 0, 0, 0}};
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    CHECK_EQ(dsv3_model_tensors(&c, look_for, v3, NULL), DSV3_OK);
    for (wanted *w = v3; w->name != NULL; w++) CHECK_EQ(w->found, 1);
    c = dsv3_config_preset(DSV3_PRESET_V2_LITE);
    CHECK_EQ(dsv3_model_tensors(&c, look_for, lite, NULL), DSV3_OK);
    for (wanted *w = lite; w->name != NULL; w++) CHECK_EQ(w->found, 1);
    c.tie_word_embeddings = 1;
    CHECK_EQ(dsv3_model_tensors(&c, look_for, absent, NULL), DSV3_OK);
    for (wanted *w = absent; w->name != NULL; w++) CHECK_EQ(w->found, 0);
}

/* A visitor's own code ends the walk and comes back. */
static void test_walk(void) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    tally t;
    CHECK_EQ(dsv3_model_tensors(NULL, count_tensor, &t, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_model_tensors(&c, NULL, &t, NULL), DSV3_ERR_ARG);
    for (long stop = 1; stop < 5000; stop += 61) {
        long seen = 0;
        memset(&t, 0, sizeof t);
        t.config = &c;
        t.stop_at = stop;
        CHECK_EQ(dsv3_model_tensors(&c, count_tensor, &t, NULL), DSV3_ERR_NAN);
        for (int g = 0; g < DSV3_KINDS; g++) seen += t.groups[g];
        CHECK_EQ(seen, stop);
    }
}

int main(void) {
    test_presets();
    test_moe_layers();
    test_fields();
    test_choices();
    test_combinations();
    test_sizes();
    test_monotonic();
    test_totals();
    test_names();
    test_walk();
    return test_done("config");
}
