/* test_checkpoint.c -- examples/checkpoint.h: the CF cases of config.json, and the ST cases that need a model to
 * bind to: wrong shapes and types, FP8 scales, values that are not finite, missing tensors, shards, cut files.
 *
 * A failure means that a damaged or hostile directory would be taken for a model (or crash the loader), that a good
 * one is refused or read wrongly, or that an error does not say which file and which field or tensor is wrong. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L /* mkdtemp */
#endif
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- The allocator under test */

static long live_blocks, malloc_calls;
static long fail_from, fail_to; /* these calls fail, counted from 1; 0 for none */

static void *count_malloc(size_t bytes) {
    void *memory;
    malloc_calls++;
    if (malloc_calls >= fail_from && malloc_calls <= fail_to) return NULL;
    memory = malloc(bytes ? bytes : 1);
    if (memory) live_blocks++;
    return memory;
}

static void count_free(void *memory) {
    if (memory) live_blocks--;
    free(memory);
}

static void fail_calls(long from, long to) {
    malloc_calls = 0;
    fail_from = from;
    fail_to = to;
}

#define ST_MALLOC(bytes) count_malloc(bytes)
#define ST_FREE(pointer) count_free(pointer)
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"
#include "synthetic.h"

static void same(const char *id, long long got, long long want) { test_eq(got, want, "checkpoint", 0, id); }

static void holds(const char *id, int condition) { test_count(condition, "checkpoint", 0, id); }

/* One line that names the place and the thing. */
static void check_message(const char *id, const st_error *e, st_result code, const char *where, const char *what) {
    char text[1024];
    snprintf(text, sizeof text, "%.100s: the message '%.600s' names %.100s and %.100s", id, e->message, where, what);
    holds(text, e->code == code && strstr(e->message, where) != NULL && strstr(e->message, what) != NULL &&
                    strchr(e->message, '\n') == NULL);
}

/* ---- Part one: config.json in memory */

typedef struct edit {
    const char *key, *value; /* value NULL: without this key */
} edit;

#define MOST_EDITS 4

static const edit base[] = {{"model_type", "\"deepseek_v3\""},
                            {"vocab_size", "40"},
                            {"hidden_size", "16"},
                            {"intermediate_size", "24"},
                            {"moe_intermediate_size", "8"},
                            {"num_hidden_layers", "3"},
                            {"num_nextn_predict_layers", "1"},
                            {"first_k_dense_replace", "1"},
                            {"moe_layer_freq", "1"},
                            {"num_attention_heads", "2"},
                            {"num_key_value_heads", "2"},
                            {"q_lora_rank", "8"},
                            {"kv_lora_rank", "8"},
                            {"qk_nope_head_dim", "4"},
                            {"qk_rope_head_dim", "4"},
                            {"v_head_dim", "4"},
                            {"n_routed_experts", "8"},
                            {"n_shared_experts", "1"},
                            {"num_experts_per_tok", "2"},
                            {"n_group", "4"},
                            {"topk_group", "2"},
                            {"scoring_func", "\"sigmoid\""},
                            {"topk_method", "\"noaux_tc\""},
                            {"norm_topk_prob", "true"},
                            {"routed_scaling_factor", "2.5"},
                            {"seq_aux", "true"},
                            {"aux_loss_alpha", "0.001"},
                            {"rms_norm_eps", "1e-06"},
                            {"rope_theta", "10000"},
                            {"rope_scaling", "null"},
                            {"max_position_embeddings", "64"},
                            {"tie_word_embeddings", "false"},
                            {"attention_bias", "false"},
                            {"rope_interleave", "true"},
                            {"bos_token_id", "0"},
                            {"eos_token_id", "1"},
                            {"hidden_act", "\"silu\""}};
#define BASE (sizeof base / sizeof base[0])

static int all_finite(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) return 0;
    }
    return 1;
}

static size_t add_field(char *out, size_t length, size_t capacity, const char *key, const char *value) {
    int n = snprintf(out + length, capacity - length, "%s\"%s\": %s", length > 1 ? ",\n " : "\n ", key, value);
    return length + (size_t)n;
}

/* The base with its edits: keys of the base change in place, others come last. Returns the length. */
static size_t make_config(char *out, size_t capacity, const edit *edits) {
    size_t length = 1;
    out[0] = '{';
    for (size_t i = 0; i < BASE; i++) {
        const char *value = base[i].value;
        for (size_t k = 0; k < MOST_EDITS && edits[k].key != NULL; k++) {
            if (strcmp(edits[k].key, base[i].key) == 0) value = edits[k].value;
        }
        if (value != NULL) length = add_field(out, length, capacity, base[i].key, value);
    }
    for (size_t k = 0; k < MOST_EDITS && edits[k].key != NULL; k++) {
        int known = 0;
        for (size_t i = 0; i < BASE; i++) known |= strcmp(edits[k].key, base[i].key) == 0;
        if (!known) length = add_field(out, length, capacity, edits[k].key, edits[k].value);
    }
    length += (size_t)snprintf(out + length, capacity - length, "\n}");
    return length;
}

#define LABEL "some/where/config.json"

/* Parses text from a buffer of exactly its length. On an error nothing may be written. */
static st_result parse_text(dsv3_config *config, const char *text, size_t length, st_error *error) {
    char *exact = (char *)test_alloc(length);
    long before = live_blocks;
    st_result result;
    memcpy(exact, text, length);
    memset(error, 0x5A, sizeof *error);
    result = checkpoint_config_parse(config, exact, length, LABEL, error);
    if (checkpoint_config_parse(config, exact, length, LABEL, NULL) != result) result = (st_result)1;
    CHECK_EQ(live_blocks, before);
    free(exact);
    return result;
}

static void check_text(const char *id, const char *text, size_t length, st_result want, const char *what) {
    dsv3_config config, untouched;
    st_error error;
    memset(&config, 0x3C, sizeof config);
    memset(&untouched, 0x3C, sizeof untouched);
    same(id, parse_text(&config, text, length, &error), want);
    if (want != ST_OK) {
        check_message(id, &error, want, LABEL, what);
        holds(id, memcmp(&config, &untouched, sizeof config) == 0);
    } else {
        holds(id, dsv3_config_check(&config, NULL) == DSV3_OK && error.code == ST_OK && error.message[0] == '\0');
    }
}

static void check_edits(const char *id, st_result want, const char *what, const edit *edits) {
    char text[8192], name[256];
    size_t length = make_config(text, sizeof text, edits);
    snprintf(name, sizeof name, "%s: %s = %s", id, edits[0].key != NULL ? edits[0].key : "base",
             edits[0].value != NULL ? edits[0].value : "nothing");
    check_text(name, text, length, want, what);
}

static void check_edit(const char *id, st_result want, const char *key, const char *value) {
    edit edits[MOST_EDITS] = {{NULL, NULL}};
    edits[0].key = key;
    edits[0].value = value;
    check_edits(id, want, key, edits);
}

/* The config of the base with its edits, which must be good. */
static dsv3_config config_of(const char *id, const edit *edits) {
    dsv3_config config = dsv3_config_default();
    st_error error;
    char text[8192];
    size_t length = make_config(text, sizeof text, edits);
    same(id, parse_text(&config, text, length, &error), ST_OK);
    return config;
}

/* The fields that files have. */
static void check_same_config(const char *id, const dsv3_config *a, const dsv3_config *b) {
    char text[256];
#define FIELD(field)                                                                                                 \
    snprintf(text, sizeof text, "%s: %s: %.9g is %.9g", id, #field, (double)a->field, (double)b->field);             \
    holds(text, a->field == b->field)
    FIELD(vocab_size);
    FIELD(hidden_size);
    FIELD(intermediate_size);
    FIELD(moe_intermediate_size);
    FIELD(num_hidden_layers);
    FIELD(num_nextn_predict_layers);
    FIELD(first_k_dense_replace);
    FIELD(moe_layer_freq);
    FIELD(num_attention_heads);
    FIELD(num_key_value_heads);
    FIELD(q_lora_rank);
    FIELD(kv_lora_rank);
    FIELD(qk_nope_head_dim);
    FIELD(qk_rope_head_dim);
    FIELD(v_head_dim);
    FIELD(n_routed_experts);
    FIELD(n_shared_experts);
    FIELD(num_experts_per_tok);
    FIELD(n_group);
    FIELD(topk_group);
    FIELD(scoring_func);
    FIELD(topk_method);
    FIELD(norm_topk_prob);
    FIELD(routed_scaling_factor);
    FIELD(seq_aux);
    FIELD(aux_loss_alpha);
    FIELD(rms_norm_eps);
    FIELD(rope_theta);
    FIELD(rope_scaling.type);
    FIELD(rope_scaling.factor);
    FIELD(rope_scaling.original_max_position_embeddings);
    FIELD(rope_scaling.beta_fast);
    FIELD(rope_scaling.beta_slow);
    FIELD(rope_scaling.mscale);
    FIELD(rope_scaling.mscale_all_dim);
    FIELD(max_position_embeddings);
    FIELD(rope_interleave);
    FIELD(tie_word_embeddings);
    FIELD(attention_bias);
    FIELD(bos_token_id);
    FIELD(eos_token_id);
#undef FIELD
}

/* CF-01..04: a key at a time: absent, null, and of the wrong types. */
static void test_keys(void) {
    enum { REQUIRED, NULLABLE, OPTIONAL };
    enum { INTEGER, NUMBER, TRUTH, NAME };
    static const struct {
        const char *key;
        int need, type;
    } keys[] = {{"vocab_size", REQUIRED, INTEGER},
                {"hidden_size", REQUIRED, INTEGER},
                {"intermediate_size", REQUIRED, INTEGER},
                {"moe_intermediate_size", REQUIRED, INTEGER},
                {"num_hidden_layers", REQUIRED, INTEGER},
                {"num_attention_heads", REQUIRED, INTEGER},
                {"kv_lora_rank", REQUIRED, INTEGER},
                {"qk_nope_head_dim", REQUIRED, INTEGER},
                {"qk_rope_head_dim", REQUIRED, INTEGER},
                {"v_head_dim", REQUIRED, INTEGER},
                {"max_position_embeddings", REQUIRED, INTEGER},
                {"num_experts_per_tok", REQUIRED, INTEGER},
                {"first_k_dense_replace", REQUIRED, INTEGER},
                {"q_lora_rank", OPTIONAL, INTEGER},
                {"n_shared_experts", NULLABLE, INTEGER},
                {"num_nextn_predict_layers", OPTIONAL, INTEGER},
                {"num_key_value_heads", OPTIONAL, INTEGER},
                {"moe_layer_freq", OPTIONAL, INTEGER},
                {"bos_token_id", OPTIONAL, INTEGER},
                {"eos_token_id", OPTIONAL, INTEGER},
                {"rms_norm_eps", REQUIRED, NUMBER},
                {"routed_scaling_factor", REQUIRED, NUMBER},
                {"rope_theta", REQUIRED, NUMBER},
                {"aux_loss_alpha", OPTIONAL, NUMBER},
                {"norm_topk_prob", REQUIRED, TRUTH},
                {"tie_word_embeddings", OPTIONAL, TRUTH},
                {"attention_bias", OPTIONAL, TRUTH},
                {"rope_interleave", OPTIONAL, TRUTH},
                {"seq_aux", OPTIONAL, TRUTH},
                {"model_type", REQUIRED, NAME},
                {"scoring_func", OPTIONAL, NAME},
                {"topk_method", OPTIONAL, NAME},
                {"hidden_act", OPTIONAL, NAME}};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        const char *key = keys[i].key;
        int need = keys[i].need, type = keys[i].type, list = strstr(key, "token_id") != NULL;
        check_edit("CF-01 missing", need == OPTIONAL ? ST_OK : ST_ERR_MISSING, key, NULL);
        check_edit("CF-02 null", need == REQUIRED ? ST_ERR_FORMAT : ST_OK, key, "null");
        check_edit("CF-03 string", type == NAME ? ST_ERR_UNSUPPORTED : ST_ERR_FORMAT, key, "\"7168\"");
        check_edit("CF-03 empty string", type == NAME ? ST_ERR_UNSUPPORTED : ST_ERR_FORMAT, key, "\"\"");
        check_edit("CF-04 fraction", type == NUMBER ? ST_OK : ST_ERR_FORMAT, key, "7168.5");
        check_edit("CF-04 exponent", type == NUMBER ? ST_OK : ST_ERR_FORMAT, key, "1e1");
        check_edit("CF-04 object", ST_ERR_FORMAT, key, "{}");
        check_edit("CF-04 array", list ? ST_OK : ST_ERR_FORMAT, key, "[]");
        check_edit("CF-04 nested array", ST_ERR_FORMAT, key, "[[1]]");
        check_edit("CF-04 truth", type == TRUTH ? ST_OK : ST_ERR_FORMAT, key, "false");
        if (type == TRUTH) check_edit("CF-04 number for a truth", ST_ERR_FORMAT, key, "1");
        if (type == NUMBER) check_edit("CF-04 number too large", ST_ERR_LIMIT, key, "1e39");
        if (type == NUMBER) check_edit("CF-04 number too large", ST_ERR_LIMIT, key, "1e999");
    }
    {
        static const edit missing[MOST_EDITS] = {{"n_group", NULL}, {"topk_group", NULL}};
        static const edit null[MOST_EDITS] = {{"n_group", "null"}, {"topk_group", "null"}};
        dsv3_config c = config_of("n_group null", null);
        CHECK_EQ(c.n_group, 1);
        CHECK_EQ(c.topk_group, 1);
        check_edits("CF-01 missing", ST_ERR_MISSING, "n_group", missing);
        check_edit("CF-01 missing", ST_ERR_MISSING, "topk_group", NULL);
        check_edit("CF-03 string", ST_ERR_FORMAT, "n_group", "\"4\"");
        check_edit("CF-03 string", ST_ERR_FORMAT, "topk_group", "\"2\"");
        check_edit("CF-01 missing", ST_ERR_MISSING, "n_routed_experts", NULL);
        check_edit("CF-02 null: a dense model", ST_OK, "n_routed_experts", "null");
        check_edit("CF-03 string", ST_ERR_FORMAT, "n_routed_experts", "\"8\"");
        check_edit("CF-04 fraction", ST_ERR_FORMAT, "n_routed_experts", "8.5");
    }
}

/* CF-05..11: every size at 0 and outside its range. */
static void test_ranges(void) {
    static const char *const zero_is_wrong[] = {
        "hidden_size",       "vocab_size",       "num_attention_heads",     "num_hidden_layers",
        "intermediate_size", "kv_lora_rank",     "qk_nope_head_dim",        "qk_rope_head_dim",
        "v_head_dim",        "n_routed_experts", "moe_intermediate_size",   "num_experts_per_tok",
        "n_group",           "topk_group",       "max_position_embeddings", "moe_layer_freq",
        "rms_norm_eps",      "rope_theta",       "routed_scaling_factor"};
    static const char *const dims[] = {"hidden_size",       "vocab_size",
                                       "intermediate_size", "moe_intermediate_size",
                                       "num_hidden_layers", "num_nextn_predict_layers",
                                       "moe_layer_freq",    "num_attention_heads",
                                       "q_lora_rank",       "kv_lora_rank",
                                       "qk_nope_head_dim",  "qk_rope_head_dim",
                                       "v_head_dim",        "n_routed_experts",
                                       "n_shared_experts",  "num_experts_per_tok",
                                       "n_group",           "max_position_embeddings"};
    static const char *const outside[] = {"2147483647",           "2147483648",
                                          "-2147483648",          "-2147483649",
                                          "4294967297",           "9223372036854775807",
                                          "9223372036854775808",  "-9223372036854775808",
                                          "18446744073709551617", "1000000000000000000000000"};
    for (size_t i = 0; i < sizeof zero_is_wrong / sizeof zero_is_wrong[0]; i++) {
        check_edit("CF-05..08 zero", ST_ERR_ARG, zero_is_wrong[i], "0");
    }
    check_edit("CF-05 zero", ST_OK, "q_lora_rank", "0");
    check_edit("CF-05 zero", ST_OK, "n_shared_experts", "0");
    check_edit("CF-05 zero", ST_OK, "num_nextn_predict_layers", "0");
    check_edit("CF-05 zero", ST_OK, "first_k_dense_replace", "0");
    for (size_t i = 0; i < sizeof dims / sizeof dims[0]; i++) {
        check_edit("CF-09 negative", ST_ERR_LIMIT, dims[i], "-1");
        for (size_t k = 0; k < sizeof outside / sizeof outside[0]; k++) {
            check_edit("CF-10..11 range", ST_ERR_LIMIT, dims[i], outside[k]);
        }
    }
    for (size_t k = 1; k < sizeof outside / sizeof outside[0]; k++) {
        check_edit("CF-10..11 range", ST_ERR_LIMIT, "topk_group", outside[k]);
        check_edit("CF-10..11 range", ST_ERR_LIMIT, "first_k_dense_replace", outside[k]);
        check_edit("CF-10..11 range", ST_ERR_LIMIT, "bos_token_id", outside[k]);
        check_edit("CF-10..11 range", ST_ERR_LIMIT, "num_key_value_heads", outside[k]);
    }
}

#define ROPE(type, factor, original, fast, slow)                                                                     \
    "{\"type\": " type ", \"factor\": " factor ", \"original_max_position_embeddings\": " original                   \
    ", \"beta_fast\": " fast ", \"beta_slow\": " slow ", \"mscale\": 1.0, \"mscale_all_dim\": 0.7}"
#define YARN(factor, original, fast, slow) ROPE("\"yarn\"", factor, original, fast, slow)
#define YARN_WITH(field) "{\"type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 64, " field "}"
#define QUANT(method, fmt, block)                                                                                    \
    "{\"quant_method\": \"" method "\", \"fmt\": \"" fmt "\", \"weight_block_size\": " block "}"

#define BLOCKS(format, block) "{\"quant_method\": \"blocks\", \"format\": " format ", \"block\": " block "}"

static const struct {
    const char *id;
    st_result code;
    const char *what; /* what the message must name */
    edit edits[MOST_EDITS];
} cases[] = {
    {"blocks of FP8, rows", ST_ERR_UNSUPPORTED, "weight_block_size",
     {{"quantization_config", QUANT("fp8", "e4m3", "[64, 128]")}}},
    {"blocks of FP8, columns", ST_ERR_UNSUPPORTED, "weight_block_size",
     {{"quantization_config", QUANT("fp8", "e4m3", "[128, 64]")}}},
    {"blocks of FP8, no numbers", ST_ERR_UNSUPPORTED, "found '[128, \"128\"]'",
     {{"quantization_config", QUANT("fp8", "e4m3", "[128, \"128\"]")}}},
    {"blocks of FP8, no numbers", ST_ERR_UNSUPPORTED, "found '[null, 128]'",
     {{"quantization_config", QUANT("fp8", "e4m3", "[null, 128]")}}},
    {"a long value", ST_ERR_FORMAT, "found '[\"aaaaaaaaabbbbbbbbbbccccccccccddddddddd'",
     {{"hidden_size", "[\"aaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeee\"]"}}},
    {"a long name", ST_ERR_UNSUPPORTED, "found 'aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeee'",
     {{"scoring_func", "\"aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeee\""}}},
    {"a long field of RoPE", ST_ERR_UNSUPPORTED,
     "aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffff: is a field of RoPE",
     {{"rope_scaling", YARN_WITH("\"aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffg\": 1")}}},
    {"a number below any", ST_ERR_LIMIT, "aux_loss_alpha", {{"aux_loss_alpha", "-1e39"}}},
    {"attention_factor below", ST_ERR_UNSUPPORTED, "attention_factor",
     {{"rope_scaling", YARN_WITH("\"attention_factor\": 0.5")}}},
    {"attention_factor above", ST_ERR_UNSUPPORTED, "attention_factor",
     {{"rope_scaling", YARN_WITH("\"attention_factor\": 5.5")}}},
    {"rope_theta of an object that is replaced, below", ST_ERR_UNSUPPORTED, "rope_theta",
     {{"rope_theta", NULL},
      {"rope_scaling", YARN_WITH("\"beta_fast\": 32")},
      {"rope_parameters", "{\"rope_theta\": 9999.0}"}}},
    {"rope_theta of an object that is replaced, above", ST_ERR_UNSUPPORTED, "rope_theta",
     {{"rope_theta", NULL},
      {"rope_scaling", YARN_WITH("\"beta_fast\": 32")},
      {"rope_parameters", "{\"rope_theta\": 10001.0}"}}},
    {"rope_theta in what is no object", ST_ERR_MISSING, "rope_theta",
     {{"rope_theta", NULL}, {"rope_scaling", YARN_WITH("\"beta_fast\": 32")}, {"rope_parameters", "3"}}},
    {"no wrapper", ST_ERR_MISSING, "hidden_size", {{"hidden_size", NULL}, {"text_config", "3"}}},
    {"a wrapper", ST_ERR_UNSUPPORTED, "llm_config", {{"hidden_size", NULL}, {"llm_config", "{}"}}},
    {"CF-13 odd", ST_ERR_ARG, "qk_rope_head_dim", {{"qk_rope_head_dim", "3"}}},
    {"CF-13 one", ST_ERR_ARG, "qk_rope_head_dim", {{"qk_rope_head_dim", "1"}}},
    {"CF-14 zero", ST_ERR_ARG, "qk_rope_head_dim", {{"qk_rope_head_dim", "0"}}},
    {"CF-15 not divisible", ST_ERR_ARG, "n_group", {{"n_group", "3"}}},
    {"CF-15 more groups than experts", ST_ERR_ARG, "n_group", {{"n_group", "16"}}},
    {"CF-15 zero", ST_ERR_ARG, "n_group", {{"n_group", "0"}}},
    {"CF-16 above n_group", ST_ERR_ARG, "topk_group", {{"topk_group", "5"}}},
    {"CF-16 zero", ST_ERR_ARG, "topk_group", {{"topk_group", "0"}}},
    {"CF-16 negative", ST_ERR_ARG, "topk_group", {{"topk_group", "-1"}}},
    {"CF-16 all", ST_OK, "", {{"topk_group", "4"}}},
    {"CF-17 all of the groups' experts", ST_OK, "", {{"num_experts_per_tok", "4"}}},
    {"CF-17 one more", ST_ERR_ARG, "num_experts_per_tok", {{"num_experts_per_tok", "5"}}},
    {"CF-17 zero", ST_ERR_ARG, "num_experts_per_tok", {{"num_experts_per_tok", "0"}}},
    {"CF-17 more than experts", ST_ERR_ARG, "num_experts_per_tok", {{"num_experts_per_tok", "9"}}},
    {"CF-19 above the layers and the module", ST_OK, "", {{"first_k_dense_replace", "4"}}},
    {"CF-19 above some modules",
     ST_ERR_ARG,
     "first_k_dense_replace",
     {{"first_k_dense_replace", "4"}, {"num_nextn_predict_layers", "2"}}},
    {"CF-19 far above", ST_OK, "", {{"first_k_dense_replace", "2147483647"}}},
    {"CF-19 all layers", ST_OK, "", {{"first_k_dense_replace", "3"}}},
    {"CF-20 negative", ST_ERR_ARG, "first_k_dense_replace", {{"first_k_dense_replace", "-1"}}},
    {"CF-20 frequency 0", ST_ERR_ARG, "moe_layer_freq", {{"moe_layer_freq", "0"}}},
    {"CF-20 frequency 2", ST_OK, "", {{"moe_layer_freq", "2"}}},
    {"CF-21 scoring", ST_ERR_UNSUPPORTED, "scoring_func", {{"scoring_func", "\"tanh\""}}},
    {"CF-21 scoring, case", ST_ERR_UNSUPPORTED, "scoring_func", {{"scoring_func", "\"Sigmoid\""}}},
    {"CF-21 method", ST_ERR_UNSUPPORTED, "topk_method", {{"topk_method", "\"random\""}}},
    {"CF-21 method, longer", ST_ERR_UNSUPPORTED, "topk_method", {{"topk_method", "\"noaux_tc2\""}}},
    {"CF-21 method, escaped", ST_OK, "", {{"topk_method", "\"noaux\\u005ftc\""}}},
    {"model_type", ST_ERR_UNSUPPORTED, "model_type", {{"model_type", "\"llama\""}}},
    {"hidden_act", ST_ERR_UNSUPPORTED, "hidden_act", {{"hidden_act", "\"gelu\""}}},
    {"attention_bias", ST_ERR_UNSUPPORTED, "attention_bias", {{"attention_bias", "true"}}},
    {"CF-22 good", ST_OK, "", {{"rope_scaling", YARN("40", "4096", "32", "1")}}},
    {"CF-22 unknown", ST_ERR_UNSUPPORTED, "type", {{"rope_scaling", ROPE("\"linear\"", "2", "64", "32", "1")}}},
    {"CF-22 dynamic", ST_ERR_UNSUPPORTED, "type", {{"rope_scaling", ROPE("\"dynamic\"", "2", "64", "32", "1")}}},
    {"CF-22 number", ST_ERR_FORMAT, "type", {{"rope_scaling", ROPE("1", "2", "64", "32", "1")}}},
    {"CF-22 null", ST_ERR_FORMAT, "type", {{"rope_scaling", ROPE("null", "2", "64", "32", "1")}}},
    {"CF-22 without type", ST_ERR_MISSING, "type", {{"rope_scaling", "{\"factor\": 2}"}}},
    {"CF-22 empty is none", ST_OK, "", {{"rope_scaling", "{}"}}},
    {"rope_parameters, empty", ST_OK, "", {{"rope_parameters", "{}"}}},
    {"rope_parameters, theta alone", ST_OK, "", {{"rope_theta", NULL}, {"rope_parameters", "{\"rope_theta\": 500}"}}},
    {"a factor without a type", ST_ERR_MISSING, "type", {{"rope_parameters", "{\"factor\": 2}"}}},
    {"rope_parameters, a field of none",
     ST_ERR_UNSUPPORTED,
     "mrope_section",
     {{"rope_parameters", "{\"mrope_section\": []}"}}},
    {"rope_parameters, a null field", ST_OK, "", {{"rope_parameters", "{\"mrope_section\": null}"}}},
    {"partial_rotary_factor", ST_ERR_UNSUPPORTED, "partial_rotary_factor", {{"partial_rotary_factor", "0.5"}}},
    {"partial_rotary_factor 1", ST_OK, "", {{"partial_rotary_factor", "1.0"}}},
    {"partial_rotary_factor inside",
     ST_ERR_UNSUPPORTED,
     "partial_rotary_factor",
     {{"rope_parameters", "{\"partial_rotary_factor\": 0.5}"}}},
    {"partial_rotary_factor 1 inside", ST_OK, "", {{"rope_parameters", "{\"partial_rotary_factor\": 1}"}}},
    {"llama_4_scaling", ST_ERR_UNSUPPORTED, "llama_4_scaling", {{"llama_4_scaling", "{}"}}},
    {"llama_4_scaling_beta",
     ST_ERR_UNSUPPORTED,
     "llama_4_scaling_beta",
     {{"rope_scaling", YARN_WITH("\"llama_4_scaling_beta\": 0.1")}}},
    {"llama_4_scaling_beta 0", ST_OK, "", {{"rope_scaling", YARN_WITH("\"llama_4_scaling_beta\": 0")}}},
    {"YaRN, an unknown field",
     ST_ERR_UNSUPPORTED,
     "short_factor",
     {{"rope_scaling", YARN_WITH("\"short_factor\": [1]")}}},
    {"truncate", ST_OK, "", {{"rope_scaling", YARN_WITH("\"truncate\": false")}}},
    {"truncate 0", ST_ERR_FORMAT, "truncate", {{"rope_scaling", YARN_WITH("\"truncate\": 0")}}},
    {"the implied attention_factor",
     ST_OK,
     "",
     {{"rope_scaling", YARN_WITH("\"attention_factor\": 1.138629436111989")}}},
    {"another attention_factor",
     ST_ERR_UNSUPPORTED,
     "attention_factor: expected 1.138629, which the other fields imply, found 1.14",
     {{"rope_scaling", YARN_WITH("\"attention_factor\": 1.14")}}},
    {"attention_factor null", ST_OK, "", {{"rope_scaling", YARN_WITH("\"attention_factor\": null")}}},
    {"rope_theta behind another object",
     ST_ERR_UNSUPPORTED,
     "rope_theta",
     {{"rope_theta", NULL},
      {"rope_scaling", YARN_WITH("\"mscale\": 1")},
      {"rope_parameters", "{\"rope_theta\": 500}"}}},
    {"a wrapper",
     ST_ERR_UNSUPPORTED,
     "text_config: this is a wrapper",
     {{"hidden_size", NULL}, {"model_type", "\"kimi_k25\""}, {"text_config", "{\"hidden_size\": 16}"}}},
    {"a value that is not in the list",
     ST_ERR_UNSUPPORTED,
     "model_type: expected deepseek_v3, kimi_k2 or deepseek_v2, found 'glm4_moe_lite'",
     {{"model_type", "\"glm4_moe_lite\""}}},
    {"what is found", ST_ERR_FORMAT, "hidden_size: must be an integer, found '7.5'", {{"hidden_size", "7.5"}}},
    {"what is found",
     ST_ERR_UNSUPPORTED,
     "weight_block_size: must be [128, 128], found '[64, 64]'",
     {{"quantization_config", QUANT("fp8", "e4m3", "[64, 64]")}}},
    {"CF-22 string", ST_ERR_FORMAT, "rope_scaling", {{"rope_scaling", "\"yarn\""}}},
    {"CF-22 array", ST_ERR_FORMAT, "rope_scaling", {{"rope_scaling", "[]"}}},
    {"CF-22 number", ST_ERR_FORMAT, "rope_parameters", {{"rope_parameters", "1"}}},
    {"CF-22 default", ST_OK, "", {{"rope_scaling", "{\"type\": \"default\"}"}}},
    {"CF-23 factor 0", ST_ERR_ARG, "factor", {{"rope_scaling", YARN("0", "64", "32", "1")}}},
    {"CF-23 factor -1", ST_ERR_ARG, "factor", {{"rope_scaling", YARN("-1", "64", "32", "1")}}},
    {"CF-23 factor 0.5", ST_ERR_ARG, "factor", {{"rope_scaling", YARN("0.5", "64", "32", "1")}}},
    {"CF-23 factor 1e999", ST_ERR_LIMIT, "factor", {{"rope_scaling", YARN("1e999", "64", "32", "1")}}},
    {"CF-23 factor NaN is no JSON", ST_ERR_FORMAT, "byte", {{"rope_scaling", YARN("NaN", "64", "32", "1")}}},
    {"CF-23 factor Infinity", ST_ERR_FORMAT, "byte", {{"rope_scaling", YARN("Infinity", "64", "32", "1")}}},
    {"CF-23 factor string", ST_ERR_FORMAT, "factor", {{"rope_scaling", YARN("\"40\"", "64", "32", "1")}}},
    {"CF-23 factor null", ST_ERR_FORMAT, "factor", {{"rope_scaling", YARN("null", "64", "32", "1")}}},
    {"CF-23 no factor", ST_ERR_MISSING, "factor", {{"rope_scaling", "{\"type\": \"yarn\"}"}}},
    {"CF-24 original 0",
     ST_ERR_ARG,
     "original_max_position_embeddings",
     {{"rope_scaling", YARN("40", "0", "32", "1")}}},
    {"CF-24 original -1",
     ST_ERR_LIMIT,
     "original_max_position_embeddings",
     {{"rope_scaling", YARN("40", "-1", "32", "1")}}},
    {"CF-24 no original",
     ST_ERR_MISSING,
     "original_max_position_embeddings",
     {{"rope_scaling", "{\"type\": \"yarn\", \"factor\": 4}"}}},
    {"CF-24 betas the wrong way round", ST_ERR_ARG, "beta_fast", {{"rope_scaling", YARN("40", "64", "1", "32")}}},
    {"CF-24 betas equal", ST_OK, "", {{"rope_scaling", YARN("40", "64", "1", "1")}}},
    {"CF-24 beta 0", ST_ERR_ARG, "beta_slow", {{"rope_scaling", YARN("40", "64", "32", "0")}}},
    {"CF-24 mscale -1",
     ST_ERR_ARG,
     "mscale",
     {{"rope_scaling",
       "{\"type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 64, \"mscale\": -1}"}}},
    {"attention_factor",
     ST_ERR_UNSUPPORTED,
     "attention_factor",
     {{"rope_scaling",
       "{\"type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 64, \"attention_factor\": 2}"}}},
    {"rope_theta 1", ST_ERR_ARG, "rope_theta", {{"rope_theta", "1"}}},
    {"rope_theta nowhere", ST_ERR_MISSING, "rope_theta", {{"rope_theta", NULL}}},
    {"rope_theta null twice",
     ST_ERR_FORMAT,
     "rope_theta",
     {{"rope_theta", "null"}, {"rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": null}"}}},
    {"CF-25 zero", ST_ERR_ARG, "rms_norm_eps", {{"rms_norm_eps", "0"}}},
    {"CF-25 negative", ST_ERR_ARG, "rms_norm_eps", {{"rms_norm_eps", "-1e-6"}}},
    {"CF-25 1e-400 is 0", ST_ERR_ARG, "rms_norm_eps", {{"rms_norm_eps", "1e-400"}}},
    {"CF-25 1e-40 is subnormal", ST_ERR_ARG, "rms_norm_eps", {{"rms_norm_eps", "1e-40"}}},
    {"CF-25 1e-30", ST_OK, "", {{"rms_norm_eps", "1e-30"}}},
    {"CF-26 good", ST_OK, "", {{"quantization_config", QUANT("fp8", "e4m3", "[128, 128]")}}},
    {"CF-26 null", ST_OK, "", {{"quantization_config", "null"}}},
    {"CF-26 [0, 128]",
     ST_ERR_UNSUPPORTED,
     "weight_block_size",
     {{"quantization_config", QUANT("fp8", "e4m3", "[0, 128]")}}},
    {"CF-26 [128, 64]",
     ST_ERR_UNSUPPORTED,
     "weight_block_size",
     {{"quantization_config", QUANT("fp8", "e4m3", "[128, 64]")}}},
    {"CF-26 [128]",
     ST_ERR_UNSUPPORTED,
     "weight_block_size",
     {{"quantization_config", QUANT("fp8", "e4m3", "[128]")}}},
    {"CF-26 [128, 128, 128]",
     ST_ERR_UNSUPPORTED,
     "weight_block_size",
     {{"quantization_config", QUANT("fp8", "e4m3", "[128, 128, 128]")}}},
    {"CF-26 [[128], 128]",
     ST_ERR_UNSUPPORTED,
     "weight_block_size",
     {{"quantization_config", QUANT("fp8", "e4m3", "[[128], 128]")}}},
    {"CF-26 []", ST_ERR_UNSUPPORTED, "weight_block_size", {{"quantization_config", QUANT("fp8", "e4m3", "[]")}}},
    {"CF-26 128", ST_ERR_UNSUPPORTED, "weight_block_size", {{"quantization_config", QUANT("fp8", "e4m3", "128")}}},
    {"CF-26 format", ST_ERR_UNSUPPORTED, "fmt", {{"quantization_config", QUANT("fp8", "e5m2", "[128, 128]")}}},
    {"CF-26 method",
     ST_ERR_UNSUPPORTED,
     "quant_method",
     {{"quantization_config", QUANT("gptq", "e4m3", "[128, 128]")}}},
    {"CF-26 string", ST_ERR_FORMAT, "quantization_config", {{"quantization_config", "\"fp8\""}}},
    {"CF-26 array", ST_ERR_FORMAT, "quantization_config", {{"quantization_config", "[]"}}},
    {"blocks q8_0", ST_OK, "", {{"quantization_config", BLOCKS("\"q8_0\"", "32")}}},
    {"blocks q4_0", ST_OK, "", {{"quantization_config", BLOCKS("\"q4_0\"", "32")}}},
    {"blocks q5_0", ST_ERR_UNSUPPORTED, "format", {{"quantization_config", BLOCKS("\"q5_0\"", "32")}}},
    {"blocks Q8_0", ST_ERR_UNSUPPORTED, "format", {{"quantization_config", BLOCKS("\"Q8_0\"", "32")}}},
    {"blocks 8", ST_ERR_FORMAT, "format", {{"quantization_config", BLOCKS("8", "32")}}},
    {"blocks null", ST_ERR_FORMAT, "format", {{"quantization_config", BLOCKS("null", "32")}}},
    {"blocks of 64", ST_ERR_UNSUPPORTED, "block", {{"quantization_config", BLOCKS("\"q8_0\"", "64")}}},
    {"blocks of 0", ST_ERR_UNSUPPORTED, "block", {{"quantization_config", BLOCKS("\"q8_0\"", "0")}}},
    {"blocks of a half", ST_ERR_FORMAT, "block", {{"quantization_config", BLOCKS("\"q8_0\"", "32.5")}}},
    {"blocks of a text", ST_ERR_FORMAT, "block", {{"quantization_config", BLOCKS("\"q8_0\"", "\"32\"")}}},
    {"blocks, no format",
     ST_ERR_MISSING,
     "format",
     {{"quantization_config", "{\"quant_method\": \"blocks\", \"block\": 32}"}}},
    {"blocks, no block",
     ST_ERR_MISSING,
     "block",
     {{"quantization_config", "{\"quant_method\": \"blocks\", \"format\": \"q8_0\"}"}}},
    {"CF-27 kv_lora_rank 0", ST_ERR_ARG, "kv_lora_rank", {{"kv_lora_rank", "0"}}},
    {"CF-27 v_head_dim 0", ST_ERR_ARG, "v_head_dim", {{"v_head_dim", "0"}}},
    {"CF-28 MTP 10^9", ST_ERR_LIMIT, "num_nextn_predict_layers", {{"num_nextn_predict_layers", "1000000000"}}},
    {"CF-28 layers 10^9", ST_ERR_LIMIT, "num_hidden_layers", {{"num_hidden_layers", "1000000000"}}},
    {"CF-28 both together",
     ST_ERR_LIMIT,
     "num_nextn_predict_layers",
     {{"num_hidden_layers", "1000"}, {"num_nextn_predict_layers", "25"}}},
    {"CF-28 the most", ST_OK, "", {{"num_hidden_layers", "1000"}, {"num_nextn_predict_layers", "24"}}},
    {"CF-30 list", ST_OK, "", {{"eos_token_id", "[5, 6]"}}},
    {"CF-30 out of vocabulary", ST_ERR_ARG, "eos_token_id", {{"eos_token_id", "40"}}},
    {"CF-30 out of vocabulary, listed", ST_ERR_ARG, "eos_token_id", {{"eos_token_id", "[40]"}}},
    {"CF-30 negative", ST_ERR_ARG, "eos_token_id", {{"eos_token_id", "-1"}}},
    {"CF-30 negative, listed", ST_ERR_ARG, "eos_token_id", {{"eos_token_id", "[-5, 1]"}}},
    {"CF-30 string, listed", ST_ERR_FORMAT, "eos_token_id", {{"eos_token_id", "[\"1\"]"}}},
    {"CF-30 negative, listed second", ST_ERR_ARG, "eos_token_id", {{"eos_token_id", "[1, -5]"}}},
    {"CF-30 out of vocabulary, listed second", ST_ERR_ARG, "eos_token_id", {{"eos_token_id", "[1, 40]"}}},
    {"CF-30 list in a list", ST_ERR_FORMAT, "eos_token_id", {{"eos_token_id", "[1, [2]]"}}},
    {"CF-30 bos out of vocabulary", ST_ERR_ARG, "bos_token_id", {{"bos_token_id", "40"}}},
    {"num_key_value_heads is ignored", ST_OK, "", {{"num_key_value_heads", "-7"}}},
    {"unknown fields are ignored",
     ST_OK,
     "",
     {{"architectures", "[\"X\", {\"a\": [1, {}]}]"}, {"auto_map", "{\"vocab_size\": -1}"}, {"", "1"}}},
};

static void test_cases(void) {
    static const edit none[MOST_EDITS] = {{NULL, NULL}};
    check_edits("base", ST_OK, "", none);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        check_edits(cases[i].id, cases[i].code, cases[i].what, cases[i].edits);
    }
}

/* CF-12: two legal sizes whose product a 32-bit size_t cannot hold. */
static void test_overflow(void) {
    static const edit wide[MOST_EDITS] = {{"vocab_size", "16777216"}, {"hidden_size", "1048576"}};
    static const edit heads[MOST_EDITS] = {{"num_attention_heads", "4096"}, {"v_head_dim", "1048576"}};
    st_result want = sizeof(size_t) > 4 ? ST_OK : ST_ERR_OVERFLOW;
    check_edits("CF-12", want, "vocab_size", wide);
    check_edits("CF-12", want, "num_attention_heads", heads);
}

/* CF-18: groups of one expert. A group's "two best" are its only one, so that the choice is that of plain top-K. */
static void test_groups_of_one(void) {
    static const edit edits[MOST_EDITS] = {{"n_group", "8"}, {"topk_group", "3"}};
    static const float score[8] = {0.1f, 0.9f, 0.3f, 0.8f, 0.2f, 0.7f, 0.6f, 0.5f};
    static const float bias[8] = {0, -0.5f, 0, 0, 0.9f, 0, 0, 0};
    dsv3_config c = config_of("CF-18", edits);
    int32_t idx[2] = {-1, -1};
    float gate[2] = {0, 0}, scratch[16];
    CHECK_EQ(dsv3_router_select(&c, idx, gate, score, bias, NULL, 1, scratch, NULL), DSV3_OK);
    CHECK_EQ(idx[0], 4); /* 1.1 */
    CHECK_EQ(idx[1], 3); /* 0.8 */
    CHECK(fabs((double)gate[0] - 2.5 * 0.2) < 1e-6 && fabs((double)gate[1] - 2.5 * 0.8) < 1e-6);
}

/* CF-27: null and 0 are the same. */
static void test_null_rank(void) {
    static const edit zero[MOST_EDITS] = {{"q_lora_rank", "0"}}, null[MOST_EDITS] = {{"q_lora_rank", "null"}};
    dsv3_config a = config_of("CF-27 0", zero), b = config_of("CF-27 null", null);
    CHECK_EQ(b.q_lora_rank, 0);
    check_same_config("CF-27", &a, &b);
}

/* CPU seconds of judging a configuration, the fastest of three. */
static double time_config(const char *id, const edit *edits) {
    double least = 1e9;
    for (int k = 0; k < 3; k++) {
        clock_t start = clock();
        dsv3_config c = config_of(id, edits);
        size_t bytes = 0;
        dsv3_result sized = dsv3_model_size(&c, &bytes, NULL);
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        holds(id, sized == DSV3_OK || sized == DSV3_ERR_OVERFLOW);
        if (seconds < least) least = seconds;
    }
    return least;
}

/* CF-28: the largest numbers of everything are judged without work in proportion to them, which would be a million times
 * that of the base. No limit in seconds: that would test the machine. (A millisecond is for the clock.) */
static void test_bounded(void) {
    static const edit large[MOST_EDITS] = {{"num_hidden_layers", "1024"},
                                           {"num_nextn_predict_layers", "0"},
                                           {"n_routed_experts", "8192"},
                                           {"max_position_embeddings", "16777216"}},
                      base_edits[MOST_EDITS] = {{NULL, NULL}};
    CHECK(time_config("CF-28", large) < 1000 * time_config("CF-28 base", base_edits) + 1e-3);
}

/* CF-30: what the token ids become. */
static void test_token_ids(void) {
    static const edit list[MOST_EDITS] = {{"eos_token_id", "[5, 6]"}, {"bos_token_id", "[7]"}};
    static const edit none[MOST_EDITS] = {{"eos_token_id", "[]"}, {"bos_token_id", "null"}};
    static const edit absent[MOST_EDITS] = {{"eos_token_id", NULL}, {"bos_token_id", NULL}};
    dsv3_config c = config_of("CF-30 list", list);
    CHECK_EQ(c.eos_token_id, 5);
    CHECK_EQ(c.bos_token_id, 7);
    c = config_of("CF-30 none", none);
    CHECK_EQ(c.eos_token_id, -1);
    CHECK_EQ(c.bos_token_id, -1);
    c = config_of("CF-30 absent", absent);
    CHECK_EQ(c.eos_token_id, -1);
    CHECK_EQ(c.bos_token_id, -1);
}

/* Old and new files spell the same RoPE differently. */
static void test_rope_spellings(void) {
#define FACTOR                                                                                                       \
    "\"factor\": 40.0, \"original_max_position_embeddings\": 4096, \"beta_fast\": 16, \"beta_slow\": 2, "            \
    "\"mscale\": 0.7, \"mscale_all_dim\": 0.5"
    static const edit older[MOST_EDITS] = {{"rope_theta", "50000"},
                                           {"rope_scaling", "{\"type\": \"yarn\", " FACTOR "}"}};
    static const edit mixed[MOST_EDITS] = {
        {"rope_theta", "50000"}, {"rope_scaling", "{\"type\": \"linear\", \"rope_type\": \"yarn\", " FACTOR "}"}};
    static const edit newer[MOST_EDITS] = {
        {"rope_theta", NULL},
        {"rope_scaling", NULL},
        {"rope_parameters", "{\"rope_type\": \"yarn\", \"rope_theta\": 50000.0, " FACTOR "}"}};
    static const edit both[MOST_EDITS] = {{"rope_theta", "50000"},
                                          {"rope_scaling", "{\"type\": \"yarn\", " FACTOR "}"},
                                          {"rope_parameters", "{\"rope_type\": \"linear\", \"rope_theta\": 10.0}"}};
    static const edit forgotten[MOST_EDITS] = {
        {"rope_theta", NULL},
        {"rope_scaling", "{\"type\": \"yarn\", " FACTOR "}"},
        {"rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 10000.0}"}};
    static const edit exact[MOST_EDITS] = {{"rope_scaling", YARN_WITH("\"truncate\": false")}};
    static const edit theta[MOST_EDITS] = {
        {"rope_scaling", NULL}, {"rope_theta", NULL}, {"rope_parameters", "{\"rope_theta\": 500}"}};
    static const edit outer[MOST_EDITS] = {
        {"rope_theta", "50000"}, {"rope_parameters", "{\"rope_type\": \"yarn\", \"rope_theta\": null, " FACTOR "}"}};
    static const edit bare[MOST_EDITS] = {
        {"rope_scaling",
         "{\"type\": \"yarn\", \"factor\": 8, \"original_max_position_embeddings\": 64, \"mscale\": null}"}};
    static const edit plain[MOST_EDITS] = {{"rope_scaling", NULL}};
    static const edit named[MOST_EDITS] = {
        {"rope_scaling", NULL},
        {"rope_theta", NULL},
        {"rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 10000}"}};
    dsv3_config a = config_of("rope_scaling", older), b = config_of("rope_parameters", newer);
    CHECK_EQ(a.rope_scaling.type, DSV3_ROPE_YARN);
    CHECK(a.rope_theta == 50000.0f && a.rope_scaling.beta_fast == 16.0f && a.rope_scaling.mscale_all_dim == 0.5f);
    check_same_config("rope_parameters", &b, &a);
    b = config_of("rope_type wins", mixed);
    check_same_config("rope_type wins", &b, &a);
    b = config_of("rope_scaling wins", both);
    check_same_config("rope_scaling wins", &b, &a);
    b = config_of("theta of a default", forgotten);
    CHECK(b.rope_scaling.type == DSV3_ROPE_YARN && b.rope_theta == 10000.0f && b.rope_scaling.truncate == 1);
    b = config_of("truncate", exact);
    CHECK(b.rope_scaling.type == DSV3_ROPE_YARN && b.rope_scaling.truncate == 0);
    b = config_of("theta alone", theta);
    CHECK(b.rope_scaling.type == DSV3_ROPE_NONE && b.rope_theta == 500.0f);
    b = config_of("rope_theta outside", outer);
    check_same_config("rope_theta outside", &b, &a);
    a = config_of("no rope_scaling", plain);
    b = config_of("default", named);
    CHECK_EQ(a.rope_scaling.type, DSV3_ROPE_NONE);
    check_same_config("default", &b, &a);
    b = config_of("defaults of YaRN", bare);
    CHECK(b.rope_scaling.beta_fast == 32.0f && b.rope_scaling.beta_slow == 1.0f && b.rope_scaling.mscale == 1.0f &&
          b.rope_scaling.mscale_all_dim == 0.0f);
}

/* What model_type implies when the file does not say. */
static void test_model_types(void) {
    static const edit v2[MOST_EDITS] = {
        {"model_type", "\"deepseek_v2\""}, {"scoring_func", NULL}, {"topk_method", NULL}, {"hidden_act", NULL}};
    static const edit v3[MOST_EDITS] = {{"scoring_func", "null"}, {"topk_method", "null"}};
    static const edit k2[MOST_EDITS] = {
        {"model_type", "\"kimi_k2\""}, {"scoring_func", NULL}, {"topk_method", NULL}, {"num_key_value_heads", NULL}};
    static const edit said[MOST_EDITS] = {{"model_type", "\"deepseek_v2\""},
                                          {"scoring_func", "\"sigmoid\""},
                                          {"topk_method", "\"group_limited_greedy\""}};
    dsv3_config c = config_of("deepseek_v2", v2);
    CHECK(c.scoring_func == DSV3_SOFTMAX && c.topk_method == DSV3_GREEDY);
    c = config_of("deepseek_v3", v3);
    CHECK(c.scoring_func == DSV3_SIGMOID && c.topk_method == DSV3_NOAUX_TC);
    c = config_of("kimi_k2", k2);
    CHECK(c.scoring_func == DSV3_SIGMOID && c.topk_method == DSV3_NOAUX_TC && c.num_key_value_heads == 2);
    c = config_of("said", said);
    CHECK(c.scoring_func == DSV3_SIGMOID && c.topk_method == DSV3_GROUP_LIMITED_GREEDY);
    CHECK_EQ(c.gate_scaling, DSV3_SCALE_UNLESS_NORMED); /* norm_topk_prob, too: as the code of V2 has it */
    CHECK_EQ(config_of("deepseek_v3", v3).gate_scaling, DSV3_SCALE_ALWAYS);
    CHECK_EQ(config_of("kimi_k2", k2).gate_scaling, DSV3_SCALE_ALWAYS);
}

/* What a file is read as, written and read again, is the same: also how weights are scaled. */
static void test_families(void) {
    static const edit edits[][MOST_EDITS] = {
        {{"model_type", "\"deepseek_v2\""}, {"topk_method", "\"greedy\""}},
        {{"model_type", "\"deepseek_v2\""}, {"topk_method", "\"noaux_tc\""}},
        {{"model_type", "\"deepseek_v3\""}, {"topk_method", "\"greedy\""}},
        {{"model_type", "\"deepseek_v3\""}},
        {{"model_type", "\"kimi_k2\""}, {"rope_scaling", YARN_WITH("\"truncate\": false")}},
        {{"n_routed_experts", "null"}, {"moe_intermediate_size", "null"}, {"norm_topk_prob", NULL}},
        {{"first_k_dense_replace", "7"}}};
    for (size_t i = 0; i < sizeof edits / sizeof edits[0]; i++) {
        dsv3_config a = config_of("family", edits[i]), b = dsv3_config_default();
        char *text = NULL;
        st_error error;
        CHECK_EQ(checkpoint_config_text(&text, &a, DSV3_F32, &error), ST_OK);
        if (text == NULL) continue;
        CHECK_EQ(parse_text(&b, text, strlen(text), &error), ST_OK);
        check_same_config("family", &a, &b);
        CHECK_EQ(a.gate_scaling, b.gate_scaling);
        CHECK_EQ(a.rope_scaling.truncate, b.rope_scaling.truncate);
        ST_FREE(text);
    }
}

/* All layers dense, the module too: no experts, or none of them reached. */
static void test_dense(void) {
    static const edit null[MOST_EDITS] = {{"n_routed_experts", "null"}, {"num_experts_per_tok", "null"}},
                      cut[MOST_EDITS] = {{"first_k_dense_replace", "30"}, {"num_hidden_layers", "1"}},
                      bare[MOST_EDITS] = {{"first_k_dense_replace", "30"}, {"num_nextn_predict_layers", "0"}};
    dsv3_config c = config_of("no experts", null);
    CHECK(c.n_routed_experts == 0 && c.n_shared_experts == 0 && c.num_experts_per_tok == 0);
    for (int32_t i = 0; i < 4; i++) CHECK(!dsv3_config_is_moe(&c, i));
    c = config_of("cut", cut);
    for (int32_t i = 0; i < 2; i++) CHECK(!dsv3_config_is_moe(&c, i));
    c = config_of("no module", bare);
    CHECK(c.first_k_dense_replace == 3 && c.moe_layer_freq == 1);
}

/* A config.json for other weights says only what is true of them. */
static void test_adapted(void) {
    static const char *const old[] = {
        "{}",
        "null",
        "{\"quant_method\": \"fp8\", \"activation_scheme\": \"static\", \"weight_block_size\": null}",
        "{\"quant_method\": \"fp8\", \"weight_block_size\": [128, 128], \"modules_to_not_convert\": [\"lm_head\"]}",
        "{\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \"scale_fmt\": \"ue8m0\", \"weight_block_size\": [128, 128]}",
        "{\"group_size\": 64, \"bits\": 4}",
        BLOCKS("\"q8_0\"", "32")};
    for (size_t i = 0; i < sizeof old / sizeof old[0]; i++) {
        for (int type = 0; type < DSV3_TYPES; type++) {
            edit edits[MOST_EDITS] = {{"compression_config", "{\"bits\": 4}"}};
            char text[8192], *made = NULL, *fresh = NULL, *from_made, *from_fresh;
            dsv3_config c = config_of("adapted", edits);
            st_error error;
            size_t length;
            edits[1].key = "quantization_config";
            edits[1].value = old[i];
            length = make_config(text, sizeof text, edits);
            CHECK_EQ(checkpoint_config_adapt(&made, text, length, LABEL, (dsv3_type)type, &error), ST_OK);
            CHECK_EQ(checkpoint_config_text(&fresh, &c, (dsv3_type)type, &error), ST_OK);
            if (made == NULL || fresh == NULL) continue;
            from_made = strstr(made, "\"quantization_config\": ");
            from_fresh = strstr(fresh, "\"quantization_config\": ");
            CHECK((from_made != NULL) == (type == DSV3_F8_E4M3 || dsv3_type_block((dsv3_type)type) > 1));
            CHECK((from_made != NULL) == (from_fresh != NULL) && strstr(made, "compression_config") == NULL);
            if (from_made != NULL && from_fresh != NULL) {
                size_t n = strcspn(from_fresh, "}");
                CHECK(strncmp(from_made, from_fresh, n + 1) == 0);
                CHECK(strstr(from_made + 1, "\"quantization_config\": ") == NULL);
            }
            ST_FREE(made);
            ST_FREE(fresh);
        }
    }
}

/* The text itself is broken. */
static void test_texts(void) {
    static const edit none[MOST_EDITS] = {{NULL, NULL}};
    static const struct {
        const char *text;
        st_result code;
        const char *what;
    } texts[] = {{"", ST_ERR_TRUNC, "byte 0"},
                 {" \n\t ", ST_ERR_TRUNC, "byte 4"},
                 {"{", ST_ERR_TRUNC, "byte 1"},
                 {"null", ST_ERR_FORMAT, "object"},
                 {"[]", ST_ERR_FORMAT, "object"},
                 {"7168", ST_ERR_FORMAT, "object"},
                 {"\"{}\"", ST_ERR_FORMAT, "object"},
                 {"{}", ST_ERR_MISSING, "vocab_size"},
                 {"{} {}", ST_ERR_FORMAT, "byte 3"},
                 {"version https://git-lfs.github.com/spec/v1\n", ST_ERR_FORMAT, "Git LFS"},
                 {"<!DOCTYPE html>", ST_ERR_FORMAT, "HTML"},
                 {"\xef\xbb\xbf{}", ST_ERR_FORMAT, "byte 0"},
                 {"{\"a\": \"\xff\"}", ST_ERR_FORMAT, "byte"},
                 {"{\"a\": 1,}", ST_ERR_FORMAT, "byte"},
                 {"{a: 1}", ST_ERR_FORMAT, "byte 1"},
                 {"{\"vocab_size\": 1, \"vocab_size\": 1}", ST_ERR_FORMAT, "byte"},
                 {"{\"x\": {\"y\": 1, \"\\u0079\": 1}}", ST_ERR_FORMAT, "byte"}};
    char text[8192], deep[8192];
    size_t length = make_config(text, sizeof text, none), n;
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        check_text(texts[i].text, texts[i].text, strlen(texts[i].text), texts[i].code, texts[i].what);
    }
    for (size_t i = 0; i < length; i++) check_text("prefix", text, i, ST_ERR_TRUNC, "byte");
    check_text("NUL at the end", text, length + 1, ST_ERR_FORMAT, "byte"); /* snprintf has put one there */
    for (int depth = 60; depth < 70; depth += 3) { /* the object around it is one level more */
        memcpy(deep, text, length);
        n = length - 2;
        n += (size_t)snprintf(deep + n, sizeof deep - n, ", \"deep\": ");
        for (int i = 0; i < depth; i++) deep[n++] = '[';
        for (int i = 0; i < depth; i++) deep[n++] = ']';
        deep[n++] = '}';
        check_text("depth", deep, n, depth + 1 <= 64 ? ST_OK : ST_ERR_LIMIT, "byte");
    }
}

/* Every bit of the text turned, and random pairs of edits: always a code, one line, and a good config if accepted. */
static void test_mutations(void) {
    static const edit yarn[MOST_EDITS] = {{"rope_scaling", YARN("40", "4096", "32", "1")},
                                          {"quantization_config", QUANT("fp8", "e4m3", "[128, 128]")},
                                          {"eos_token_id", "[1, 2]"}};
    static const char set[] = "\"\\{}[]:,0123456789-.eE+ntf \x80u";
    char text[8192], copy[8192];
    size_t length = make_config(text, sizeof text, yarn);
    int bad = 0, accepted = 0;
    for (size_t i = 0; i < 8 * length + 6000; i++) {
        dsv3_config c;
        st_error error;
        st_result result;
        memcpy(copy, text, length);
        if (i < 8 * length) {
            copy[i / 8] = (char)(copy[i / 8] ^ (1 << i % 8));
        } else {
            for (int k = 0; k < 2; k++) copy[test_random() % length] = set[test_random() % (sizeof set - 1)];
        }
        result = checkpoint_config_parse(&c, copy, length, LABEL, &error);
        accepted += result == ST_OK;
        if (result == ST_OK) bad += dsv3_config_check(&c, NULL) != DSV3_OK;
        if (result != ST_OK) bad += strstr(error.message, LABEL) == NULL || strchr(error.message, '\n') != NULL;
        bad += error.code != result;
    }
    CHECK_EQ(bad, 0);
    CHECK(accepted > 100);
}

/* Long and odd labels do not crowd out the reason, or break the line. */
static void test_labels(void) {
    char label[4000];
    dsv3_config c;
    st_error error;
    memset(label, 'x', sizeof label - 1);
    label[sizeof label - 1] = '\0';
    CHECK_EQ(checkpoint_config_parse(&c, "{}", 2, label, &error), ST_ERR_MISSING);
    CHECK(strstr(error.message, "vocab_size: is missing") != NULL);
    CHECK_EQ(checkpoint_config_parse(&c, "{}", 2, "a\nb\tc", &error), ST_ERR_MISSING);
    CHECK(strcmp(error.message, "a?b?c: vocab_size: is missing") == 0);
}

/* The published files, as far as this library reads them, and some of what it does not. */
static const struct {
    const char *name;
    dsv3_preset preset;
    const char *text;
} published[] = {
    {"DeepSeek-V3", DSV3_PRESET_V3,
     "{\"architectures\": [\"DeepseekV3ForCausalLM\"], \"attention_bias\": false, \"attention_dropout\": 0.0,"
     "\"auto_map\": {\"AutoConfig\": \"configuration_deepseek.DeepseekV3Config\"}, \"aux_loss_alpha\": 0.001,"
     "\"bos_token_id\": 0, \"eos_token_id\": 1, \"ep_size\": 1, \"first_k_dense_replace\": 3, \"hidden_act\": "
     "\"silu\", \"hidden_size\": 7168, \"initializer_range\": 0.02, \"intermediate_size\": 18432, \"kv_lora_rank\": "
     "512, \"max_position_embeddings\": 163840, \"model_type\": \"deepseek_v3\", \"moe_intermediate_size\": 2048,"
     "\"moe_layer_freq\": 1, \"n_group\": 8, \"n_routed_experts\": 256, \"n_shared_experts\": 1, \"norm_topk_prob\": "
     "true, \"num_attention_heads\": 128, \"num_experts_per_tok\": 8, \"num_hidden_layers\": 61,"
     "\"num_key_value_heads\": 128, \"num_nextn_predict_layers\": 1, \"pretraining_tp\": 1, \"q_lora_rank\": 1536,"
     "\"qk_nope_head_dim\": 128, \"qk_rope_head_dim\": 64, \"quantization_config\": {\"activation_scheme\": "
     "\"dynamic\", \"fmt\": \"e4m3\", \"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]}, "
     "\"rms_norm_eps\": 1e-06, \"rope_scaling\": {\"beta_fast\": 32, \"beta_slow\": 1, \"factor\": 40, \"mscale\": "
     "1.0, \"mscale_all_dim\": 1.0, \"original_max_position_embeddings\": 4096, \"type\": \"yarn\"}, \"rope_theta\": "
     "10000, \"routed_scaling_factor\": 2.5, \"scoring_func\": \"sigmoid\", \"seq_aux\": true, "
     "\"tie_word_embeddings\": false, \"topk_group\": 4, \"topk_method\": \"noaux_tc\", \"torch_dtype\": "
     "\"bfloat16\", \"use_cache\": true, \"v_head_dim\": 128, \"vocab_size\": 129280}"},
    {"DeepSeek-V2", DSV3_PRESET_V2,
     "{\"attention_bias\": false, \"aux_loss_alpha\": 0.001, \"bos_token_id\": 100000, \"eos_token_id\": 100001,"
     "\"first_k_dense_replace\": 1, \"hidden_act\": \"silu\", \"hidden_size\": 5120, \"intermediate_size\": 12288,"
     "\"kv_lora_rank\": 512, \"max_position_embeddings\": 163840, \"model_type\": \"deepseek_v2\", "
     "\"moe_intermediate_size\": 1536, \"moe_layer_freq\": 1, \"n_group\": 8, \"n_routed_experts\": 160, "
     "\"n_shared_experts\": 2, \"norm_topk_prob\": false, \"num_attention_heads\": 128, \"num_experts_per_tok\": 6,"
     "\"num_hidden_layers\": 60, \"num_key_value_heads\": 128, \"q_lora_rank\": 1536, \"qk_nope_head_dim\": 128,"
     "\"qk_rope_head_dim\": 64, \"rms_norm_eps\": 1e-06, \"rope_scaling\": {\"beta_fast\": 32, \"beta_slow\": 1,"
     "\"factor\": 40, \"mscale\": 1.0, \"mscale_all_dim\": 1.0, \"original_max_position_embeddings\": 4096, "
     "\"type\": \"yarn\"}, \"rope_theta\": 10000, \"routed_scaling_factor\": 16.0, \"scoring_func\": \"softmax\","
     "\"seq_aux\": true, \"tie_word_embeddings\": false, \"topk_group\": 3, \"topk_method\": "
     "\"group_limited_greedy\", \"v_head_dim\": 128, \"vocab_size\": 102400}"},
    {"DeepSeek-V2-Lite", DSV3_PRESET_V2_LITE,
     "{\"attention_bias\": false, \"aux_loss_alpha\": 0.001, \"bos_token_id\": 100000, \"eos_token_id\": 100001,"
     "\"first_k_dense_replace\": 1, \"hidden_act\": \"silu\", \"hidden_size\": 2048, \"intermediate_size\": 10944,"
     "\"kv_lora_rank\": 512, \"max_position_embeddings\": 163840, \"model_type\": \"deepseek_v2\", "
     "\"moe_intermediate_size\": 1408, \"moe_layer_freq\": 1, \"n_group\": 1, \"n_routed_experts\": 64, "
     "\"n_shared_experts\": 2, \"norm_topk_prob\": false, \"num_attention_heads\": 16, \"num_experts_per_tok\": 6,"
     "\"num_hidden_layers\": 27, \"num_key_value_heads\": 16, \"q_lora_rank\": null, \"qk_nope_head_dim\": 128,"
     "\"qk_rope_head_dim\": 64, \"rms_norm_eps\": 1e-06, \"rope_scaling\": {\"beta_fast\": 32, \"beta_slow\": 1,"
     "\"factor\": 40, \"mscale\": 0.707, \"mscale_all_dim\": 0.707, \"original_max_position_embeddings\": 4096, "
     "\"type\": \"yarn\"}, \"rope_theta\": 10000, \"routed_scaling_factor\": 1.0, \"scoring_func\": \"softmax\","
     "\"seq_aux\": true, \"tie_word_embeddings\": false, \"topk_group\": 1, \"topk_method\": \"greedy\", "
     "\"v_head_dim\": 128, \"vocab_size\": 102400}"},
    {"Moonlight-16B-A3B", DSV3_PRESET_MOONLIGHT,
     "{\"attention_bias\": false, \"aux_loss_alpha\": 0.001, \"bos_token_id\": 163584, \"eos_token_id\": 163586,"
     "\"first_k_dense_replace\": 1, \"hidden_act\": \"silu\", \"hidden_size\": 2048, \"intermediate_size\": 11264,"
     "\"kv_lora_rank\": 512, \"max_position_embeddings\": 8192, \"model_type\": \"deepseek_v3\", "
     "\"moe_intermediate_size\": 1408, \"moe_layer_freq\": 1, \"n_group\": 1, \"n_routed_experts\": 64, "
     "\"n_shared_experts\": 2, \"norm_topk_prob\": true, \"num_attention_heads\": 16, \"num_experts_per_tok\": 6,"
     "\"num_hidden_layers\": 27, \"num_key_value_heads\": 16, \"num_nextn_predict_layers\": 0, \"q_lora_rank\": "
     "null, \"qk_nope_head_dim\": 128, \"qk_rope_head_dim\": 64, \"rms_norm_eps\": 1e-05, \"rope_theta\": 50000.0,"
     "\"routed_scaling_factor\": 2.446, \"scoring_func\": \"sigmoid\", \"seq_aux\": true, \"tie_word_embeddings\": "
     "false, \"topk_group\": 1, \"topk_method\": \"noaux_tc\", \"v_head_dim\": 128, \"vocab_size\": 163840}"},
    {"Kimi-K2", DSV3_PRESET_K2,
     "{\"attention_bias\": false, \"aux_loss_alpha\": 0.001, \"bos_token_id\": 163584, \"eos_token_id\": 163585,"
     "\"first_k_dense_replace\": 1, \"hidden_act\": \"silu\", \"hidden_size\": 7168, \"intermediate_size\": 18432,"
     "\"kv_lora_rank\": 512, \"max_position_embeddings\": 131072, \"model_type\": \"kimi_k2\", "
     "\"moe_intermediate_size\": 2048, \"moe_layer_freq\": 1, \"n_group\": 1, \"n_routed_experts\": 384, "
     "\"n_shared_experts\": 1, \"norm_topk_prob\": true, \"num_attention_heads\": 64, \"num_experts_per_tok\": 8,"
     "\"num_hidden_layers\": 61, \"num_key_value_heads\": 64, \"num_nextn_predict_layers\": 0, \"q_lora_rank\": "
     "1536, \"qk_nope_head_dim\": 128, \"qk_rope_head_dim\": 64, \"quantization_config\": {\"activation_scheme\": "
     "\"dynamic\", \"fmt\": \"e4m3\", \"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]}, "
     "\"rms_norm_eps\": 1e-06, \"rope_scaling\": {\"beta_fast\": 1.0, \"beta_slow\": 1.0, \"factor\": 32.0, "
     "\"mscale\": 1.0, \"mscale_all_dim\": 1.0, \"original_max_position_embeddings\": 4096, \"type\": \"yarn\"}, "
     "\"rope_theta\": 50000.0, \"routed_scaling_factor\": 2.827, \"scoring_func\": \"sigmoid\", \"seq_aux\": true,"
     "\"tie_word_embeddings\": false, \"topk_group\": 1, \"topk_method\": \"noaux_tc\", \"v_head_dim\": 128, "
     "\"vocab_size\": 163840}"}};

/* The largest of them are too large for a 32-bit size_t. */
static st_result fits(const dsv3_config *c) {
    return sizeof(size_t) == 4 && dsv3_config_check(c, NULL) == DSV3_ERR_OVERFLOW ? ST_ERR_OVERFLOW : ST_OK;
}

static void test_published(void) {
    for (size_t i = 0; i < sizeof published / sizeof published[0]; i++) {
        dsv3_config c = dsv3_config_default(), want = dsv3_config_preset(published[i].preset);
        st_error error;
        st_result result = parse_text(&c, published[i].text, strlen(published[i].text), &error);
        same(published[i].name, result, fits(&want));
        if (result != ST_OK) continue;
        check_same_config(published[i].name, &c, &want);
        CHECK(c.latent_norm_eps == want.latent_norm_eps);
    }
}

/* ---- Part two: directories */

static char directory[256];

/* directory/name in one of a few buffers that are used in turn. */
static const char *in_directory(const char *name) {
    static char path[4][512];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", directory, name);
    return path[turn];
}

#define CONFIG "config.json"
#define WEIGHTS "model.safetensors"
#define INDEX "model.safetensors.index.json"

static void put_file(const char *name, const void *bytes, size_t length) {
    FILE *f = fopen(in_directory(name), "wb");
    if (f == NULL || fwrite(bytes, 1, length, f) != length || fclose(f) != 0) {
        fprintf(stderr, "checkpoint: %s cannot be written\n", in_directory(name));
        exit(2);
    }
}

static void put_text(const char *name, const char *text) { put_file(name, text, strlen(text)); }

static void drop_file(const char *name) { (void)remove(in_directory(name)); }

/* The bytes of a file; free them. */
static unsigned char *get_file(const char *name, size_t *length) {
    FILE *f = fopen(in_directory(name), "rb");
    size_t capacity = 4u << 20;
    unsigned char *bytes = (unsigned char *)test_alloc(capacity);
    CHECK(f != NULL);
    *length = f != NULL ? fread(bytes, 1, capacity, f) : 0;
    CHECK(*length < capacity);
    if (f != NULL) fclose(f);
    return bytes;
}

static void config_json(char *out, size_t capacity, const dsv3_config *c) {
    static const char *const scoring[] = {"sigmoid", "softmax"};
    static const char *const methods[] = {"noaux_tc", "group_limited_greedy", "greedy"};
    const dsv3_rope_scaling *r = &c->rope_scaling;
    size_t n = 0;
#define ADD(...) n += (size_t)snprintf(out + n, capacity - n, __VA_ARGS__)
#define ADD_INT(field) ADD("\"" #field "\": %ld, ", (long)c->field)
#define ADD_BOOL(field) ADD("\"" #field "\": %s, ", c->field ? "true" : "false")
#define ADD_FLOAT(field) ADD("\"" #field "\": %.9g, ", (double)c->field)
    ADD("{\"model_type\": \"deepseek_v3\", ");
    ADD_INT(vocab_size);
    ADD_INT(hidden_size);
    ADD_INT(intermediate_size);
    ADD_INT(moe_intermediate_size);
    ADD_INT(num_hidden_layers);
    ADD_INT(num_nextn_predict_layers);
    ADD_INT(first_k_dense_replace);
    ADD_INT(moe_layer_freq);
    ADD_INT(num_attention_heads);
    ADD_INT(num_key_value_heads);
    ADD_INT(q_lora_rank);
    ADD_INT(kv_lora_rank);
    ADD_INT(qk_nope_head_dim);
    ADD_INT(qk_rope_head_dim);
    ADD_INT(v_head_dim);
    ADD_INT(n_routed_experts);
    ADD_INT(n_shared_experts);
    ADD_INT(num_experts_per_tok);
    ADD_INT(n_group);
    ADD_INT(topk_group);
    ADD_INT(max_position_embeddings);
    ADD_BOOL(norm_topk_prob);
    ADD_BOOL(seq_aux);
    ADD_BOOL(rope_interleave);
    ADD_BOOL(tie_word_embeddings);
    ADD_BOOL(attention_bias);
    ADD_FLOAT(routed_scaling_factor);
    ADD_FLOAT(aux_loss_alpha);
    ADD_FLOAT(rms_norm_eps);
    ADD_FLOAT(rope_theta);
    if (c->bos_token_id >= 0) ADD_INT(bos_token_id);
    if (c->eos_token_id >= 0) ADD_INT(eos_token_id);
    if (r->type == DSV3_ROPE_YARN) {
        ADD("\"rope_scaling\": {\"type\": \"yarn\", \"factor\": %.9g, \"original_max_position_embeddings\": %ld, ",
            (double)r->factor, (long)r->original_max_position_embeddings);
        ADD("\"beta_fast\": %.9g, \"beta_slow\": %.9g, \"mscale\": %.9g, \"mscale_all_dim\": %.9g}, ",
            (double)r->beta_fast, (double)r->beta_slow, (double)r->mscale, (double)r->mscale_all_dim);
    }
    ADD("\"scoring_func\": \"%s\", \"topk_method\": \"%s\"}", scoring[c->scoring_func], methods[c->topk_method]);
#undef ADD
#undef ADD_INT
#undef ADD_BOOL
#undef ADD_FLOAT
}

/* ---- A synthetic model, its list of tensors as they will be written, and its directory */

#define MOST_TENSORS 600
#define ROWS 5 /* tokens of a trial run */

typedef struct disk {
    synth *s;
    dsv3_config config; /* what config.json will say */
    const char *quantisation;
    size_t count;
    st_tensor t[MOST_TENSORS];
    char scale_name[MOST_TENSORS][160];
} disk;

static st_dtype file_type(dsv3_type type) {
    switch (type) {
    case DSV3_F16: return ST_F16;
    case DSV3_BF16: return ST_BF16;
    case DSV3_F8_E4M3: return ST_F8_E4M3;
    case DSV3_Q8_0:
    case DSV3_Q4_0: return ST_U8;
    case DSV3_F32:
    default: return ST_F32;
    }
}

static st_tensor file_tensor(const char *name, st_dtype type, int rank, size_t rows, size_t cols, const void *data) {
    st_tensor t;
    memset(&t, 0, sizeof t);
    t.name = name;
    t.dtype = type;
    t.rank = rank;
    t.shape[0] = rank == 2 ? rows : cols;
    if (rank == 2) t.shape[1] = cols;
    t.data = data;
    t.bytes = rows * cols * st_dtype_bytes(type);
    return t;
}

/* The list of tensors as the model has them. */
static void disk_reset(disk *d) {
    d->config = d->s->config;
    d->quantisation = d->s->types == SYNTH_Q8   ? BLOCKS("\"q8_0\"", "32")
                      : d->s->types == SYNTH_Q4 ? BLOCKS("\"q4_0\"", "32")
                                                : "null";
    d->count = 0;
    for (size_t i = 0; i < d->s->count; i++) {
        const synth_tensor *from = &d->s->tensors[i];
        if (d->count + 2 > MOST_TENSORS) fprintf(stderr, "checkpoint: too many tensors\n"), exit(2);
        size_t across = dsv3_row_bytes(from->t.type, from->t.cols) / st_dtype_bytes(file_type(from->t.type));
        d->t[d->count++] =
            file_tensor(from->info.name, file_type(from->t.type), from->t.rank, from->t.rows, across, from->data);
        if (from->scale == NULL) continue;
        snprintf(d->scale_name[i], sizeof d->scale_name[i], "%.128s_scale_inv", from->info.name);
        d->t[d->count++] = file_tensor(d->scale_name[i], ST_F32, 2, (from->t.rows + 127) / 128,
                                       (from->t.cols + 127) / 128, from->scale);
    }
}

static disk *disk_open(const dsv3_config *config, int types) {
    disk *d = (disk *)test_alloc(sizeof *d);
    d->s = synth_open(config, types, 11);
    synth_run(d->s, ROWS, 1, 1, ROWS, DSV3_F32);
    disk_reset(d);
    return d;
}

static void disk_close(disk *d) {
    synth_close(d->s);
    free(d);
    drop_file(CONFIG);
    drop_file(WEIGHTS);
}

static st_tensor *disk_tensor(disk *d, const char *name) {
    for (size_t i = 0; i < d->count; i++) {
        if (strcmp(d->t[i].name, name) == 0) return &d->t[i];
    }
    fprintf(stderr, "checkpoint: no tensor %s\n", name);
    exit(2);
}

/* Removes every tensor whose name has `part` in it. */
static void disk_drop(disk *d, const char *part) {
    size_t left = 0;
    for (size_t i = 0; i < d->count; i++) {
        if (strstr(d->t[i].name, part) == NULL) d->t[left++] = d->t[i];
    }
    d->count = left;
}

static void disk_write(const disk *d) {
    char text[4096];
    st_error error;
    size_t n;
    config_json(text, sizeof text, &d->config);
    n = strlen(text) - 1;
    snprintf(text + n, sizeof text - n, ", \"quantization_config\": %s}", d->quantisation);
    put_text(CONFIG, text);
    if (st_write(in_directory(WEIGHTS), d->t, d->count, NULL, &error) != ST_OK) {
        fprintf(stderr, "checkpoint: %s\n", error.message);
        exit(2);
    }
}

static const int32_t trial[ROWS] = {3, 0, 17, 3, 29};

/* Trial tokens through a checkpoint. Whatever the weights, a failure leaves the cache as it was. */
static dsv3_result run_checkpoint(const checkpoint *c, float *logits) {
    dsv3_context context;
    dsv3_cache cache;
    dsv3_workspace ws;
    dsv3_batch batch;
    dsv3_error error;
    size_t cache_bytes = 0, ws_bytes = 0;
    void *cache_memory, *ws_memory;
    dsv3_result result;
    synth_demand(dsv3_context_init(&context, test_backend(), 1, NULL), "context", NULL);
    synth_demand(dsv3_cache_size(&c->config, ROWS, DSV3_F32, &cache_bytes, NULL), "cache size", NULL);
    synth_demand(dsv3_workspace_size(&c->config, ROWS, 1, &ws_bytes, NULL), "workspace size", NULL);
    cache_memory = synth_alloc(cache_bytes);
    ws_memory = synth_alloc(ws_bytes);
    memset(ws_memory, 0xFF, ws_bytes);
    synth_demand(dsv3_cache_init(&c->config, &cache, ROWS, DSV3_F32, cache_memory, cache_bytes, NULL), "cache", NULL);
    synth_demand(dsv3_workspace_init(&c->config, &ws, ROWS, 1, ws_memory, ws_bytes, NULL), "workspace", NULL);
    memset(&batch, 0, sizeof batch);
    batch.rows = ROWS;
    batch.token = trial;
    batch.outputs = ROWS;
    result = dsv3_forward(&context, logits, &c->model, &cache, 1, &batch, &ws, &error);
    CHECK_EQ(error.code, result);
    CHECK_EQ(cache.length, result == DSV3_OK ? ROWS : 0);
    synth_release(cache_memory);
    synth_release(ws_memory);
    return result;
}

static size_t logits_of(const dsv3_config *c) { return ROWS * (size_t)c->vocab_size; }

/* Opens the directory as it is. On success *logits (if asked for) is the trial run's, and its result is returned. */
static dsv3_result check_directory(const char *id, st_result want, const char *what, float *logits) {
    checkpoint c;
    st_error error;
    long before = live_blocks;
    dsv3_result ran = DSV3_OK;
    memset(&c, 0x5A, sizeof c);
    memset(&error, 0x5A, sizeof error);
    same(id, checkpoint_open(&c, directory, &error), want);
    if (error.code == ST_OK && want == ST_OK) {
        float *room = logits != NULL ? logits : (float *)test_alloc(logits_of(&c.config) * sizeof(float));
        ran = run_checkpoint(&c, room);
        if (logits == NULL) free(room);
    } else if (want != ST_OK) {
        check_message(id, &error, want, directory, what);
        same(id, live_blocks, before);
    } else {
        holds(error.message, 0);
    }
    checkpoint_close(&c);
    checkpoint_close(&c);
    same(id, live_blocks, before);
    return ran;
}

static dsv3_result check_disk(const char *id, const disk *d, st_result want, const char *what) {
    disk_write(d);
    return check_directory(id, want, what, NULL);
}

/* The directory must give, bit for bit, the logits of the model in memory. */
static void check_logits(const char *id, disk *d) {
    size_t n = logits_of(&d->config);
    float *got = (float *)test_alloc(n * sizeof *got), *want = (float *)test_alloc(n * sizeof *want);
    CHECK_EQ(dsv3_cache_truncate(&d->s->caches[0], 0, NULL), DSV3_OK);
    CHECK_EQ(synth_forward(d->s, want, trial, ROWS, 0, NULL), DSV3_OK);
    memset(got, 0, n * sizeof *got);
    CHECK_EQ(check_directory(id, ST_OK, "", got), DSV3_OK);
    holds(id, memcmp(got, want, n * sizeof *got) == 0);
    free(got);
    free(want);
}

/* A model small enough to be written hundreds of times: 3 layers and an MTP module. */
static dsv3_config tiny_config(void) {
    static const edit none[MOST_EDITS] = {{NULL, NULL}};
    return config_of("tiny", none);
}

/* Everything that the synthetic models cover comes back from a directory as it was. */
static void test_round_trips(void) {
    for (int which = 0; which < SYNTH_CONFIGS; which++) {
        int types;
        dsv3_config config = synth_config(which, &types);
        disk *d;
        config.gate_scaling = DSV3_SCALE_ALWAYS; /* two choices that no file carries */
        config.group_mask = DSV3_MASK_NEG_INF;
        d = disk_open(&config, types);
        disk_write(d);
        check_logits(synth_name(which), d);
        disk_close(d);
    }
    for (int i = DSV3_PRESET_V3; i <= DSV3_PRESET_MICRO; i++) {
        dsv3_config want = dsv3_config_preset((dsv3_preset)i), got = dsv3_config_default();
        char text[4096];
        st_error error;
        config_json(text, sizeof text, &want);
        CHECK_EQ(parse_text(&got, text, strlen(text), &error), fits(&want));
        if (fits(&want) == ST_OK) check_same_config("written and read", &got, &want);
    }
}

/* The presets of the models that are in the repository are what their files say, all fields of them. */
static void test_demo_presets(void) {
    dsv3_config want[2], got;
    st_error error;
    want[0] = dsv3_config_preset(DSV3_PRESET_AUSTEN), want[1] = dsv3_config_preset(DSV3_PRESET_MICRO);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(checkpoint_config(&got, i ? "examples/models/micro" : "examples/models/austen", &error), ST_OK);
        check_same_config(i ? "preset of micro" : "preset of austen", &got, &want[i]);
        if (got.rope_scaling.type == DSV3_ROPE_NONE) got.rope_scaling = want[i].rope_scaling;
        CHECK(memcmp(&got, &want[i], sizeof got) == 0);
    }
}

/* Where config.json is looked for. */
static void test_paths(void) {
    dsv3_config config;
    st_error error;
    checkpoint c;
    char *text = (char *)test_alloc(1048576 + 16), longer[5000];
    static const edit none[MOST_EDITS] = {{NULL, NULL}};
    size_t length = make_config(text, 8192, none);
    put_file(CONFIG, text, length);
    put_file("other.json", text, length);
    CHECK_EQ(checkpoint_config(&config, directory, &error), ST_OK);
    CHECK_EQ(config.hidden_size, 16);
    CHECK_EQ(checkpoint_config(&config, in_directory(CONFIG), &error), ST_OK);
    CHECK_EQ(checkpoint_config(&config, in_directory("other.json"), NULL), ST_OK);
    CHECK_EQ(checkpoint_config(&config, in_directory("none.json"), &error), ST_ERR_MISSING);
    check_message("no such file", &error, ST_ERR_MISSING, "none.json", "exist");
    CHECK_EQ(checkpoint_config(&config, in_directory("none"), &error), ST_ERR_MISSING);
    check_message("no such directory", &error, ST_ERR_MISSING, "none/config.json", "exist");
    put_text("plain", "");
    CHECK_EQ(checkpoint_config(&config, in_directory("plain"), &error), ST_ERR_IO);
    check_message("path through a file", &error, ST_ERR_IO, "plain/config.json", "opened");
    CHECK_EQ(checkpoint_open(&c, in_directory("plain"), &error), ST_ERR_IO);
    CHECK_EQ(mkdir(in_directory("odd.json"), 0700), 0);
    CHECK_EQ(checkpoint_config(&config, in_directory("odd.json"), &error), ST_ERR_IO);
    check_message("directory for a file", &error, ST_ERR_IO, "odd.json", "not a regular file");
    rmdir(in_directory("odd.json"));
    CHECK_EQ(mkfifo(in_directory("odd.json"), 0600), 0); /* which nobody writes to */
    CHECK_EQ(checkpoint_config(&config, in_directory("odd.json"), &error), ST_ERR_IO);
    check_message("FIFO for a file", &error, ST_ERR_IO, "odd.json", "not a regular file");
    drop_file("odd.json");
    CHECK_EQ(symlink("nowhere", in_directory("odd.json")), 0);
    CHECK_EQ(checkpoint_config(&config, in_directory("odd.json"), &error), ST_ERR_IO);
    check_message("link to nothing", &error, ST_ERR_IO, "odd.json", "is a link to a file that does not exist");
    drop_file("odd.json");
    memset(text + length, ' ', 1048576 + 1 - length);
    put_file("other.json", text, 1048576);
    CHECK_EQ(checkpoint_config(&config, in_directory("other.json"), &error), ST_OK);
    put_file("other.json", text, 1048576 + 1);
    CHECK_EQ(checkpoint_config(&config, in_directory("other.json"), &error), ST_ERR_LIMIT);
    check_message("more than 1 MiB", &error, ST_ERR_LIMIT, "other.json", "larger");
    put_text("other.json", "");
    CHECK_EQ(checkpoint_config(&config, in_directory("other.json"), &error), ST_ERR_TRUNC);
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    CHECK_EQ(checkpoint_config(&config, longer, &error), ST_ERR_LIMIT);
    CHECK(strstr(error.message, "xxx") != NULL && strstr(error.message, "too long") != NULL);
    drop_file("plain");
    drop_file("other.json");
    drop_file(WEIGHTS);
    check_directory("no weights", ST_ERR_MISSING, "model.safetensors", NULL);
    put_text(CONFIG, "{}");
    check_directory("bad config", ST_ERR_MISSING, "vocab_size", NULL);
    drop_file(CONFIG);
    check_directory("empty directory", ST_ERR_MISSING, CONFIG, NULL);
    memset(&c, 0, sizeof c);
    checkpoint_close(&c);
    free(text);
}

static void test_types(void) {
    for (int i = -1; i < 17; i++) {
        int want = -1;
        if (i == ST_F32) want = DSV3_F32;
        if (i == ST_F16) want = DSV3_F16;
        if (i == ST_BF16) want = DSV3_BF16;
        if (i == ST_F8_E4M3) want = DSV3_F8_E4M3;
        CHECK_EQ(checkpoint_type((st_dtype)i, -1), want);
        CHECK_EQ(checkpoint_type((st_dtype)i, DSV3_Q8_0), i == ST_U8 ? DSV3_Q8_0 : want);
        CHECK_EQ(checkpoint_type((st_dtype)i, DSV3_Q4_0), i == ST_U8 ? DSV3_Q4_0 : want);
    }
}

/* ST-30..33, 29, 41: the right name, the wrong shape. */
static void test_shapes(disk *d) {
    static const char q_a[] = "model.layers.0.self_attn.q_a_proj.weight"; /* [8, 16] */
    static const char norm[] = "model.norm.weight";                       /* [16] */
    static const char embed[] = "model.embed_tokens.weight";              /* [40, 16] */
    static const char bias[] = "model.layers.1.mlp.gate.e_score_correction_bias";
    static const char last[] = "model.layers.2.mlp.experts.7.down_proj.weight"; /* [16, 8] */
    static const struct {
        const char *id, *name;
        int rank;
        uint64_t shape[3];
    } shapes[] = {{"ST-30 transposed", q_a, 2, {16, 8, 0}},
                  {"ST-30 transposed, the last expert", last, 2, {8, 16, 0}},
                  {"ST-31 one row more", q_a, 2, {9, 16, 0}},
                  {"ST-31 one row less", q_a, 2, {7, 16, 0}},
                  {"ST-31 one column more", q_a, 2, {8, 17, 0}},
                  {"ST-31 one row of a thousand", q_a, 2, {1, 1000, 0}},
                  {"ST-33 norm as [1, n]", norm, 2, {1, 16, 0}},
                  {"ST-33 norm as [n, 1]", norm, 2, {16, 1, 0}},
                  {"ST-33 norm as [1, 1, n]", norm, 3, {1, 1, 16}},
                  {"ST-33 norm one longer", norm, 1, {17, 0, 0}},
                  {"ST-33 norm one shorter", norm, 1, {15, 0, 0}},
                  {"ST-33 matrix as a vector", q_a, 1, {128, 0, 0}},
                  {"ST-33 matrix as [1, n, m]", q_a, 3, {1, 8, 16}},
                  {"ST-33 bias as [1, n]", bias, 2, {1, 8, 0}},
                  {"ST-33 bias one shorter", bias, 1, {7, 0, 0}},
                  {"ST-29 rank 0 for a vector", norm, 0, {0, 0, 0}},
                  {"ST-29 rank 0 for a matrix", embed, 0, {0, 0, 0}},
                  {"ST-41 empty vector", norm, 1, {0, 0, 0}},
                  {"ST-41 empty matrix", embed, 2, {40, 0, 0}},
                  {"ST-41 empty matrix", embed, 2, {0, 16, 0}}};
    static float room[4096];
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        st_tensor *t;
        disk_reset(d);
        t = disk_tensor(d, shapes[i].name);
        memset(t->shape, 0, sizeof t->shape);
        t->rank = shapes[i].rank;
        t->bytes = sizeof(float);
        for (int k = 0; k < t->rank; k++) {
            t->shape[k] = shapes[i].shape[k];
            t->bytes *= (size_t)t->shape[k];
        }
        t->data = room;
        check_disk(shapes[i].id, d, ST_ERR_MISMATCH, shapes[i].name);
    }
    disk_reset(d);
    d->config.vocab_size = 41;
    check_disk("ST-32 vocabulary", d, ST_ERR_MISMATCH, embed);
    d->config.vocab_size = 39;
    check_disk("ST-32 vocabulary", d, ST_ERR_MISMATCH, embed);
    disk_reset(d);
    d->config.n_routed_experts = 4;
    d->config.n_group = 4;
    check_disk("experts differ", d, ST_ERR_MISMATCH, "mlp.gate.weight");
    disk_reset(d);
    d->config.num_hidden_layers = 2;
    check_disk("layers differ: an MTP module is expected where a layer is", d, ST_ERR_MISSING, "eh_proj");
    disk_reset(d);
    d->config.num_nextn_predict_layers = 0;
    CHECK_EQ(check_disk("a module that the config does not have", d, ST_OK, ""), DSV3_OK);
}

/* Weights in types that are no weight types, and FP8 where it cannot be. */
static void test_weight_types(disk *d) {
    static const st_dtype types[] = {ST_F8_E5M2, ST_I32, ST_F64, ST_I8,  ST_U8, ST_BOOL,
                                     ST_U16,     ST_I16, ST_U32, ST_I64, ST_U64};
    static const char *const names[] = {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
                                        "model.layers.1.mlp.experts.3.up_proj.weight",
                                        "model.layers.3.eh_proj.weight"};
    static double room[1024];
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        for (size_t k = 0; k < sizeof names / sizeof names[0]; k++) {
            st_tensor *t;
            char id[128];
            if (k > 0 && i > 2) continue;
            disk_reset(d);
            t = disk_tensor(d, names[k]);
            t->bytes = t->bytes / sizeof(float) * st_dtype_bytes(types[i]);
            t->dtype = types[i];
            t->data = room;
            snprintf(id, sizeof id, "ST-47 %s %s", st_dtype_name(types[i]), names[k]);
            check_disk(id, d, ST_ERR_UNSUPPORTED, names[k]);
        }
    }
    disk_reset(d);
    disk_tensor(d, "model.norm.weight")->dtype = ST_F8_E4M3;
    disk_tensor(d, "model.norm.weight")->bytes /= sizeof(float);
    check_disk("FP8 vector", d, ST_ERR_UNSUPPORTED, "model.norm.weight");
    disk_reset(d);
    disk_tensor(d, "model.layers.1.mlp.gate.e_score_correction_bias")->dtype = ST_F8_E4M3;
    disk_tensor(d, "model.layers.1.mlp.gate.e_score_correction_bias")->bytes /= sizeof(float);
    check_disk("FP8 bias", d, ST_ERR_UNSUPPORTED, "e_score_correction_bias");
    disk_reset(d);
}

/* A tensor of a type that is not known here stops what needs it, and nothing else. What nothing uses is named. */
static void test_leftovers(disk *d) {
    static const char norm[] = "model.norm.weight";
    static const float zeros[8] = {0};
    st_error error;
    checkpoint c;
    char json[256];
    size_t length, n;
    unsigned char *image;
    disk_reset(d);
    disk_write(d);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    CHECK(c.leftover == 0 && c.leftover_names[0] == '\0');
    checkpoint_close(&c);
    d->t[d->count++] = file_tensor("model.layers.0.self_attn.q_a_proj.bias", ST_F32, 1, 1, 8, zeros);
    d->t[d->count++] = file_tensor("mtp.0.eh_proj.weight", ST_U8, 1, 1, 8, zeros);
    d->t[d->count++] = file_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", ST_F32, 1, 1, 2, zeros);
    d->t[d->count++] = file_tensor("model.layers.0.self_attn.q_a_proj.weight_scale_inv", ST_F32, 2, 1, 1, zeros);
    disk_write(d);
    check_logits("tensors that nothing uses", d);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    CHECK_EQ(c.leftover, 3);
    CHECK(strcmp(c.leftover_names, "model.layers.0.self_attn.q_a_proj.bias, "
                                   "model.layers.0.self_attn.q_a_proj.weight_scale_inv, mtp.0.eh_proj.weight") == 0);
    checkpoint_close(&c);
    disk_reset(d);
    disk_drop(d, "model.layers.3.eh_proj"); /* no module, then: what there is of it is left over */
    disk_drop(d, "model.layers.3.enorm");
    disk_drop(d, "model.layers.3.hnorm");
    disk_drop(d, "model.layers.3.shared_head.norm");
    disk_drop(d, "model.layers.3.input_layernorm");
    disk_drop(d, "model.layers.3.post_attention");
    disk_drop(d, "model.layers.3.self_attn");
    disk_drop(d, "model.layers.3.mlp");
    disk_write(d);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    CHECK_EQ(c.leftover, 2); /* the copies of embedding and head */
    checkpoint_close(&c);
    disk_reset(d);
    disk_write(d);
    image = get_file(WEIGHTS, &length);
    snprintf(json, sizeof json, "\"%s\":{\"dtype\":\"F32\"", norm);
    for (n = 0; n + strlen(json) < length && memcmp(image + n, json, strlen(json)) != 0; n++) {
    }
    image[n + strlen(json) - 4] = 'C';
    put_file(WEIGHTS, image, length);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_ERR_UNSUPPORTED);
    CHECK(strstr(error.message, "model.norm.weight: expected the type F32, F16, BF16 or F8_E4M3, found C32") != NULL);
    free(image);
    disk_reset(d);
}

/* Every tensor in turn is not there: its name in the header is changed to another one. */
static void test_missing(disk *d) {
    size_t length, module = 0;
    unsigned char *image;
    disk_reset(d);
    disk_write(d);
    check_logits("as written", d);
    image = get_file(WEIGHTS, &length);
    for (size_t i = 0; i < d->count; i++) {
        const char *name = d->t[i].name;
        int copy = d->s->tensors[i].info.optional;
        size_t n = strlen(name), at = 8;
        while (memcmp(image + at, name, n) != 0 || image[at - 1] != '"' || image[at + n] != '"') at++;
        image[at] = 'X';
        put_file(WEIGHTS, image, length);
        check_directory(name, copy ? ST_OK : ST_ERR_MISSING, name, NULL);
        image[at] = (unsigned char)name[0];
        module += d->s->tensors[i].info.layer == 3;
    }
    CHECK_EQ(module, 4 + 2 + 9 + 2 + 24 + 3); /* its own, copies, norms and attention, router, experts, shared */
    free(image);
    disk_drop(d, "model.layers.3.");
    CHECK_EQ(d->s->count - d->count, module);
    disk_write(d);
    check_logits("no MTP module", d);
    {
        checkpoint c;
        CHECK_EQ(checkpoint_open(&c, directory, NULL), ST_OK);
        CHECK_EQ(c.model.n_mtp, 0);
        checkpoint_close(&c);
    }
    disk_reset(d);
    disk_drop(d, "model.layers.3.embed_tokens.weight");
    disk_drop(d, "model.layers.3.shared_head.head.weight");
    CHECK_EQ(d->s->count - d->count, 2);
    disk_write(d);
    check_logits("MTP module without copies", d);
    {
        checkpoint c;
        CHECK_EQ(checkpoint_open(&c, directory, NULL), ST_OK);
        CHECK_EQ(c.model.n_mtp, 1);
        CHECK(c.model.mtp[0].embed_tokens.data == c.model.embed_tokens.data &&
              c.model.mtp[0].shared_head_head.data == c.model.lm_head.data);
        checkpoint_close(&c);
    }
    disk_tensor(d, "model.norm.weight")->name = "language_model.model.norm.weight";
    check_disk(
        "a wrapper's names", d, ST_ERR_MISSING,
        "model.norm.weight: tensor missing; the model is inside of a wrapper, where it is language_model.model.norm");
    d->count = 0;
    check_disk("no tensors", d, ST_ERR_MISSING, "model.embed_tokens.weight");
    disk_reset(d);
}

/* CF-29: a tied model ignores a head that the file has; another one needs it. */
static void test_tied(disk *d) {
    size_t n = logits_of(&d->config);
    float *with = (float *)test_alloc(n * sizeof *with), *without = (float *)test_alloc(n * sizeof *without);
    checkpoint c;
    disk_reset(d);
    d->config.tie_word_embeddings = 1;
    disk_write(d);
    CHECK_EQ(check_directory("CF-29 tied, with a head", ST_OK, "", with), DSV3_OK);
    CHECK_EQ(checkpoint_open(&c, directory, NULL), ST_OK);
    CHECK(c.model.lm_head.data == c.model.embed_tokens.data);
    checkpoint_close(&c);
    disk_drop(d, "lm_head.weight");
    disk_write(d);
    CHECK_EQ(check_directory("CF-29 tied, without", ST_OK, "", without), DSV3_OK);
    CHECK(memcmp(with, without, n * sizeof *with) == 0);
    d->config.tie_word_embeddings = 0;
    check_disk("CF-29 not tied, without", d, ST_ERR_MISSING, "lm_head.weight");
    disk_reset(d);
    disk_write(d);
    CHECK_EQ(check_directory("CF-29 not tied, with", ST_OK, "", without), DSV3_OK);
    CHECK(memcmp(with, without, n * sizeof *with) != 0);
    free(with);
    free(without);
}

/* A shard with the tensors whose index leaves the remainder `which` of `shards`. */
static size_t put_shard(const disk *d, const char *name, size_t which, size_t shards) {
    st_tensor part[MOST_TENSORS];
    size_t count = 0;
    st_error error;
    for (size_t i = which; i < d->count; i += shards) part[count++] = d->t[i];
    CHECK_EQ(st_write(in_directory(name), part, count, NULL, &error), ST_OK);
    return count;
}

static void test_shards(disk *d) {
    static const char *const names[3] = {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                         "model-00003-of-00003.safetensors"};
    char *index = (char *)test_alloc(MOST_TENSORS * 256);
    size_t n = 0, total = 0, bytes = 0;
    unsigned char *image;
    checkpoint c;
    st_error error;
    disk_reset(d);
    disk_write(d); /* for config.json */
    drop_file(WEIGHTS);
    for (size_t i = 0; i < d->count; i++) bytes += d->t[i].bytes;
    n += (size_t)sprintf(index + n, "{\"metadata\": {\"total_size\": %lu}, \"weight_map\": {", (unsigned long)bytes);
    for (size_t i = 0; i < d->count; i++) {
        n += (size_t)sprintf(index + n, "%s\"%s\": \"%s\"", i > 0 ? ", " : "", d->t[i].name, names[i % 3]);
    }
    sprintf(index + n, "}}");
    put_text(INDEX, index);
    for (size_t k = 0; k < 3; k++) total += put_shard(d, names[k], k, 3);
    CHECK_EQ(total, d->count);
    check_logits("shards", d);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    CHECK_EQ(c.file.shards, 3);
    CHECK_EQ(c.file.count, d->count);
    CHECK(c.file.warning[0] == '\0');
    checkpoint_close(&c);
    image = get_file(names[1], &n); /* one of them is cut */
    put_file(names[1], image, n - 1);
    check_directory("a shard is cut", ST_ERR_TRUNC, names[1], NULL);
    drop_file(names[1]);
    check_directory("ST-50 a shard is missing", ST_ERR_MISSING, names[1], NULL);
    {
        size_t extra = strlen(index) - 2; /* a shard with a tensor that nothing needs */
        put_shard(d, names[1], 1, 3);
        sprintf(index + extra, ", \"visual.weight\": \"model-00004.safetensors\"}}");
        put_text(INDEX, index);
        check_logits("a shard that nothing needs is missing", d);
        CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
        CHECK(strstr(c.file.warning, "visual.weight is not in model-00004.safetensors") != NULL);
        checkpoint_close(&c);
    }
    disk_drop(d, "model.layers.3.enorm.weight"); /* alone in a shard that is missing: both is said */
    put_shard(d, names[0], 0, 1);
    disk_reset(d);
    n = (size_t)sprintf(index, "{\"weight_map\": {");
    for (size_t i = 0; i < d->count; i++) {
        int apart = strcmp(d->t[i].name, "model.layers.3.enorm.weight") == 0;
        n += (size_t)sprintf(index + n, "%s\"%s\": \"%s\"", i > 0 ? ", " : "", d->t[i].name, names[apart ? 2 : 0]);
    }
    sprintf(index + n, "}}");
    put_text(INDEX, index);
    drop_file(names[2]);
    check_directory("a part of a module is missing with its shard", ST_ERR_MISSING,
                    "absent: model.layers.3.enorm.weight is not in model-00003-of-00003.safetensors", NULL);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_ERR_MISSING);
    CHECK(strstr(error.message, "model.layers.3.enorm.weight: ") != NULL && strstr(error.message, "; 1 of ") != NULL);
    put_shard(d, names[0], 0, 1);
    put_shard(d, names[2], 0, 1);
    check_directory("ST-52 the wrong shard", ST_ERR_FORMAT, "", NULL);
    drop_file(INDEX);
    check_directory("shards without an index", ST_ERR_MISSING, "model.safetensors", NULL);
    for (size_t k = 0; k < 3; k++) drop_file(names[k]);
    free(image);
    free(index);
}

/* Cut anywhere: never a crash, never a model. */
static void test_truncation(disk *d) {
    size_t length, header, cuts = 0;
    unsigned char *image;
    disk_reset(d);
    disk_write(d);
    image = get_file(WEIGHTS, &length);
    header = 8 + (size_t)image[0] + 256 * (size_t)image[1];
    for (size_t n = 0; n < length; n++) {
        size_t data = n < header ? 0 : n - header, edge = data % (16 * sizeof(float));
        checkpoint c;
        st_error error;
        st_result result;
        if (n < header ? n > 64 && n % 97 != 0 && n + 4 < header : edge > 1 && edge != 63) continue;
        if (n >= header && test_random() % 4 != 0 && n + 600 < length) continue; /* some of the edges */
        put_file(WEIGHTS, image, n);
        result = checkpoint_open(&c, directory, &error);
        if (result != ST_ERR_TRUNC && result != ST_ERR_MISMATCH) same("truncated", result, ST_ERR_TRUNC);
        if (n < header) same("truncated in the header", result, ST_ERR_TRUNC);
        check_message("truncated", &error, result, directory, WEIGHTS);
        cuts++;
    }
    CHECK(cuts > 200);
    put_file(WEIGHTS, image, length);
    check_logits("whole again", d);
    free(image);
}

/* Bits of the header turned: a code, or a model that can be run. */
static void test_header_mutations(disk *d) {
    size_t length, header;
    unsigned char *image;
    int bad = 0, opened = 0;
    long before = live_blocks;
    disk_reset(d);
    disk_write(d);
    image = get_file(WEIGHTS, &length);
    header = 8 + (size_t)image[0] + 256 * (size_t)image[1];
    for (int i = 0; i < 1500; i++) {
        size_t at = (size_t)(test_random() % header);
        unsigned char old = image[at];
        checkpoint c;
        st_error error;
        image[at] = (unsigned char)(image[at] ^ (1u << test_random() % 8));
        put_file(WEIGHTS, image, length);
        if (checkpoint_open(&c, directory, &error) == ST_OK) {
            float *logits = (float *)test_alloc(logits_of(&c.config) * sizeof(float));
            run_checkpoint(&c, logits);
            free(logits);
            opened++;
        } else {
            bad += strstr(error.message, directory) == NULL || strchr(error.message, '\n') != NULL;
        }
        checkpoint_close(&c);
        image[at] = old;
    }
    CHECK_EQ(bad, 0);
    CHECK(opened < 1500);
    CHECK_EQ(live_blocks, before);
    free(image);
}

/* ---- FP8 (ST-42..47) */

/* Blocks of 1, of 127 and of 128 + 1 rows and columns. */
static dsv3_config blocks_config(void) {
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, 40, 129, 255, 1, 2, 1);
    synth_attention(&c, 3, 127, 128, 41, 2, 43); /* q_b [129, 127], kv_a [130, 129], kv_b [252, 128], o [129, 129] */
    synth_experts(&c, 2, 1, 1, 1, 1, 1.0f);
    return c;
}

static void test_fp8(void) {
    static const char weight[] = "model.layers.0.self_attn.q_b_proj.weight";
    static const char scale[] = "model.layers.0.self_attn.q_b_proj.weight_scale_inv"; /* [2, 1] */
    static const struct {
        const char *id;
        int rank;
        uint64_t rows, cols;
    } shapes[] = {{"ST-43 transposed", 2, 1, 2},      {"ST-43 one row less", 2, 1, 1},
                  {"ST-43 one row more", 2, 3, 1},    {"ST-43 one column more", 2, 2, 2},
                  {"ST-43 a scale a row", 2, 129, 1}, {"ST-43 vector", 1, 2, 0},
                  {"ST-43 single number", 0, 0, 0},   {"ST-41 empty", 2, 0, 1}};
    static const float odd[] = {(float)NAN, (float)INFINITY, -(float)INFINITY, 0.0f, -0.0f, -0.01f, 1e-40f, FLT_MAX};
    static float room[256];
    dsv3_config config = blocks_config();
    disk *d = disk_open(&config, SYNTH_FP8);
    float *s;
    disk_write(d);
    check_logits("ST-46 partial blocks", d);
    for (size_t i = 0; i < d->s->count; i++) { /* ST-42: each in turn */
        char name[160];
        if (d->s->tensors[i].scale == NULL) continue;
        snprintf(name, sizeof name, "%.128s_scale_inv", d->s->tensors[i].info.name);
        disk_reset(d);
        disk_drop(d, name);
        check_disk("ST-42", d, ST_ERR_MISSING, name);
    }
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        st_tensor *t;
        disk_reset(d);
        t = disk_tensor(d, scale);
        memset(t->shape, 0, sizeof t->shape);
        t->rank = shapes[i].rank;
        t->bytes = sizeof(float);
        if (t->rank > 0) t->bytes *= (size_t)(t->shape[0] = shapes[i].rows);
        if (t->rank > 1) t->bytes *= (size_t)(t->shape[1] = shapes[i].cols);
        t->data = room;
        check_disk(shapes[i].id, d, ST_ERR_MISMATCH, scale);
    }
    for (int i = 0; i < 4; i++) {
        static const st_dtype types[4] = {ST_BF16, ST_F16, ST_F64, ST_F8_E4M3};
        disk_reset(d);
        disk_tensor(d, scale)->bytes = 2 * st_dtype_bytes(types[i]);
        disk_tensor(d, scale)->dtype = types[i];
        disk_tensor(d, scale)->data = room;
        check_disk("ST-45 type of the scales", d, ST_ERR_UNSUPPORTED, scale);
    }
    s = synth_get(d->s, -1, -1, weight)->scale;
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) { /* ST-44: finite and positive */
        float kept = s[0];
        dsv3_result ran;
        char id[64];
        snprintf(id, sizeof id, "ST-44 scale %g", (double)odd[i]);
        s[0] = odd[i];
        disk_reset(d);
        ran = check_disk(id, d, i < 6 ? ST_ERR_FORMAT : ST_OK, i < 6 ? scale : "");
        holds(id, i < 7 ? ran == DSV3_OK : ran == DSV3_OK || ran == DSV3_ERR_NAN);
        s[0] = kept;
    }
    for (size_t i = 0; i < d->s->count; i++) { /* ST-47: both codes for NaN in each weight in turn, and the largest */
        synth_tensor *t = &d->s->tensors[i];
        unsigned char kept = t->data[0];
        if (t->scale == NULL || (i > 8 && i % 5 != 0)) continue;
        for (int k = 0; k < 3; k++) {
            static const unsigned char codes[3] = {0x7F, 0xFF, 0x7E};
            dsv3_result ran;
            t->data[0] = codes[k];
            disk_reset(d);
            ran = check_disk("ST-47 code", d, ST_OK, "");
            holds("ST-47 code", ran == DSV3_OK || (k < 2 && ran == DSV3_ERR_NAN));
        }
        t->data[0] = kept;
    }
    memset(synth_get(d->s, -1, -1, weight)->data, 0x7F, 129 * 127);
    disk_reset(d);
    CHECK_EQ(check_disk("ST-47 all NaN", d, ST_OK, ""), DSV3_ERR_NAN);
    disk_close(d);
}

/* ---- Values that are not finite (ST-48..49) */

/* U8 matrices: config.json says what they are, and rows are whole blocks. */
static void test_blocks(int which) {
    static const char first[] = "model.embed_tokens.weight", last[] = "lm_head.weight";
    static unsigned char room[65536];
    int types;
    dsv3_config config = synth_config(which, &types);
    disk *d = disk_open(&config, types);
    synth_tensor *t = synth_get(d->s, -1, -1, last);
    size_t across = dsv3_row_bytes(t->t.type, t->t.cols), bytes = dsv3_type_bytes(t->t.type);
    const size_t rows[] = {across + 1, across - 1, across - bytes, across + bytes, 1, 0, t->t.cols};
    const char *other = types == SYNTH_Q8 ? BLOCKS("\"q4_0\"", "32") : BLOCKS("\"q8_0\"", "32");
    uint16_t nan = 0x7E01, kept;
    checkpoint c;
    st_error error;
    dsv3_tensor found;
    int blocks = 0;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        disk_reset(d);
        disk_tensor(d, last)->shape[1] = rows[i];
        disk_tensor(d, last)->bytes = t->t.rows * rows[i];
        disk_tensor(d, last)->data = room;
        check_disk("rows in blocks", d, ST_ERR_MISMATCH, last);
        if (rows[i] % bytes != 0) check_disk("rows in blocks", d, ST_ERR_MISMATCH, "whole Q");
    }
    disk_reset(d);
    disk_tensor(d, last)->shape[0]--;
    disk_tensor(d, last)->bytes -= across;
    check_disk("a row less", d, ST_ERR_MISMATCH, last);
    disk_reset(d);
    disk_tensor(d, last)->rank = 1;
    disk_tensor(d, last)->shape[0] = across;
    disk_tensor(d, last)->bytes = across;
    check_disk("a vector in blocks", d, ST_ERR_MISMATCH, last);
    check_disk("a vector in blocks", d, ST_ERR_MISMATCH, "expected rank 2 and rows of whole Q");
    disk_reset(d);
    disk_tensor(d, "model.norm.weight")->dtype = ST_U8;
    disk_tensor(d, "model.norm.weight")->bytes /= 2; /* was BF16 */
    check_disk("a norm in blocks", d, ST_ERR_MISMATCH, "model.norm.weight");
    disk_reset(d);
    d->quantisation = "null";
    check_disk("nobody says blocks", d, ST_ERR_UNSUPPORTED, first);
    check_disk("nobody says blocks", d, ST_ERR_UNSUPPORTED, "quantization_config");
    d->quantisation = QUANT("fp8", "e4m3", "[128, 128]");
    check_disk("blocks called FP8", d, ST_ERR_UNSUPPORTED, first);
    d->quantisation = BLOCKS("\"q8_1\"", "32");
    check_disk("unknown blocks", d, ST_ERR_UNSUPPORTED, "format");
    d->quantisation = other;
    check_disk("other blocks", d, ST_ERR_MISMATCH, first);
    disk_reset(d);
    memcpy(&kept, t->data, 2);
    memcpy(t->data, &nan, 2);
    CHECK_EQ(check_disk("a scale that is NaN", d, ST_OK, ""), DSV3_ERR_NAN);
    memcpy(t->data, &kept, 2);
    disk_write(d);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    CHECK_EQ(checkpoint_find(&c, last, &found), DSV3_OK); /* where the file was mapped, as it is */
    CHECK(found.type == t->t.type && found.rows == t->t.rows && found.cols == t->t.cols && found.rank == 2);
    CHECK(found.data == st_find(&c.file, last)->data && c.model.lm_head.data == found.data);
    c.blocks = -1;
    CHECK_EQ(checkpoint_find(&c, last, &found), DSV3_ERR_UNSUPPORTED);
    checkpoint_close(&c);
    CHECK_EQ(checkpoint_blocks(&blocks, directory, &error), ST_OK);
    CHECK_EQ(blocks, t->t.type);
    put_text(CONFIG, "{\"quantization_config\": " BLOCKS("\"q4_0\"", "32") "}");
    CHECK_EQ(checkpoint_blocks(&blocks, directory, &error), ST_OK);
    CHECK_EQ(blocks, DSV3_Q4_0);
    put_text(CONFIG, "{}");
    CHECK_EQ(checkpoint_blocks(&blocks, directory, &error), ST_OK);
    CHECK_EQ(blocks, -1);
    put_text(CONFIG, "[]");
    CHECK_EQ(checkpoint_blocks(&blocks, directory, &error), ST_ERR_FORMAT);
    drop_file(CONFIG);
    CHECK_EQ(checkpoint_blocks(&blocks, directory, &error), ST_ERR_MISSING);
    CHECK_EQ(blocks, -1);
    disk_close(d);
}

static void fill(synth_tensor *t, float x) {
    for (size_t i = 0; i < t->t.rows * t->t.cols; i++) memcpy(t->data + 4 * i, &x, 4);
}

static void test_values(void) {
    static const float odd[] = {(float)NAN, (float)INFINITY, -(float)INFINITY, FLT_MAX, 1e-41f, -0.0f};
    dsv3_config config = tiny_config();
    disk *d = disk_open(&config, SYNTH_F32);
    float *logits = (float *)test_alloc(logits_of(&config) * sizeof *logits);
    for (size_t k = 0; k < sizeof odd / sizeof odd[0]; k++) { /* everything at once */
        disk *all = disk_open(&config, SYNTH_F32);
        char id[64];
        dsv3_result ran;
        snprintf(id, sizeof id, "ST-48..49 all weights %g", (double)odd[k]);
        for (size_t i = 0; i < all->s->count; i++) {
            if (strstr(all->s->tensors[i].info.name, "bias") == NULL) fill(&all->s->tensors[i], odd[k]);
        }
        disk_write(all);
        ran = check_directory(id, ST_OK, "", logits);
        if (k < 3) same(id, ran, DSV3_ERR_NAN);
        if (k == 3) holds(id, ran == DSV3_OK || ran == DSV3_ERR_NAN);
        if (k > 3) same(id, ran, DSV3_OK);
        if (k > 3) holds(id, all_finite(logits, logits_of(&config)));
        for (size_t i = 0; i < all->s->count; i++) fill(&all->s->tensors[i], odd[k]); /* and the biases */
        if (k < 3) check_disk(id, all, ST_ERR_FORMAT, "e_score_correction_bias");
        if (k > 3) CHECK_EQ(check_disk(id, all, ST_OK, ""), DSV3_OK);
        disk_close(all);
    }
    for (size_t i = 0; i < d->s->count; i++) { /* one tensor in turn, its last element */
        synth_tensor *t = &d->s->tensors[i];
        size_t last = t->t.rows * t->t.cols - 1;
        const char *name = t->info.name;
        int bias = strstr(name, "bias") != NULL, mtp = t->info.layer >= config.num_hidden_layers;
        for (size_t k = 0; k < 2; k++) {
            unsigned char kept[4];
            dsv3_result ran;
            memcpy(kept, t->data + 4 * last, 4);
            memcpy(t->data + 4 * last, &odd[k], 4);
            disk_write(d);
            ran = check_directory(name, bias ? ST_ERR_FORMAT : ST_OK, "e_score_correction_bias", logits);
            memcpy(t->data + 4 * last, kept, 4);
            if (bias) continue;
            holds(name, ran == DSV3_OK || (ran == DSV3_ERR_NAN && !mtp));
            if (strstr(name, "layers.0.self_attn.kv_a_proj") != NULL || strcmp(name, "model.norm.weight") == 0) {
                same(name, ran, DSV3_ERR_NAN);
            }
            if (ran == DSV3_OK && strcmp(name, "lm_head.weight") != 0) {
                holds(name, all_finite(logits, logits_of(&config)));
            }
        }
        if (t->info.expert > 1) i += 2; /* experts are alike */
    }
    free(logits);
    disk_close(d);
}

/* ---- Allocations that fail */

static void test_memory(disk *d) {
    checkpoint c;
    st_error error;
    long before = live_blocks, calls;
    disk_reset(d);
    disk_write(d);
    fail_calls(0, 0);
    CHECK_EQ(checkpoint_open(&c, directory, &error), ST_OK);
    checkpoint_close(&c);
    calls = malloc_calls;
    CHECK(calls >= 6);
    for (int persistent = 0; persistent < 2; persistent++) {
        for (long k = 1; k <= calls + 1; k++) {
            st_result result;
            fail_calls(k, persistent ? 1000000000 : k);
            result = checkpoint_open(&c, directory, &error);
            fail_calls(0, 0);
            same("failing allocation", result, k <= calls ? ST_ERR_NOMEM : ST_OK);
            if (result != ST_OK) {
                check_message("failing allocation", &error, ST_ERR_NOMEM, directory, "memory");
                same("leak", live_blocks, before);
            }
            checkpoint_close(&c);
            same("leak", live_blocks, before);
        }
    }
    fail_calls(1, 1); /* without an error to write to */
    CHECK_EQ(checkpoint_open(&c, directory, NULL), ST_ERR_NOMEM);
    fail_calls(0, 0);
    CHECK_EQ(live_blocks, before);
}

/* Tokens that end a text, of config.json (an edit of the usual one) and of generation_config.json (NULL: there is none). */
static void check_ends(const char *id, const char *config, const char *generation, const int32_t *want, size_t n) {
    char text[8192];
    edit edits[MOST_EDITS] = {{"eos_token_id", NULL}};
    st_error error;
    checkpoint c;
    edits[0].value = config;
    put_file(CONFIG, text, make_config(text, sizeof text, edits));
    if (generation != NULL) put_text("generation_config.json", generation);
    same(id, checkpoint_open(&c, directory, &error), ST_OK);
    same(id, (long)c.n_eos, (long)n);
    for (size_t i = 0; i < n && i < c.n_eos; i++) same(id, c.eos[i], want[i]);
    same(id, c.config.eos_token_id, n > 0 ? want[0] : -1);
    same(id, c.model.config.eos_token_id, c.config.eos_token_id);
    checkpoint_close(&c);
    if (generation != NULL) drop_file("generation_config.json");
}

static void test_ends(const disk *d) {
    static const int32_t want[6] = {5, 6, 7, 7, 6, 5};
    static const char *const bad[][2] = {{"{\"eos_token_id\": \"1\"}", "eos_token_id"},
                                         {"{\"eos_token_id\": [1, 40]}", "eos_token_id"},
                                         {"{\"eos_token_id\": -1}", "eos_token_id"},
                                         {"[1]", "object"},
                                         {"{", "generation_config.json"},
                                         {"", "generation_config.json"}};
    char many[400] = "{\"eos_token_id\": [0";
    disk_write(d);
    check_ends("one", "5", NULL, want, 1);
    check_ends("none", NULL, NULL, want, 0);
    check_ends("list, each once", "[5, 6, 5]", NULL, want, 2);
    check_ends("both", "[5, 6]", "{\"eos_token_id\": [7, 6, 5], \"x\": null}", want, 3);
    check_ends("one and one", "5", "{\"eos_token_id\": 6}", want, 2);
    check_ends("the second file alone", "null", "{\"do_sample\": true, \"eos_token_id\": [7, 6]}", want + 3, 2);
    check_ends("nothing in it", "[]", "{\"eos_token_id\": null}", want, 0);
    check_ends("nothing at all", "5", "{}", want, 1);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        st_error error;
        checkpoint c;
        put_text("generation_config.json", bad[i][0]);
        CHECK(checkpoint_open(&c, directory, &error) != ST_OK);
        CHECK(strstr(error.message, "generation_config.json") != NULL && strstr(error.message, bad[i][1]) != NULL);
        checkpoint_close(&c);
    }
    for (int i = 1; i <= CHECKPOINT_MAX_EOS; i++) snprintf(many + strlen(many), 8, ", %d", i);
    strcat(many, "]}");
    put_text("generation_config.json", many);
    check_directory("too many", ST_ERR_LIMIT, "eos_token_id", NULL);
    drop_file("generation_config.json");
}

/* ---- Part four: codes, and messages that need a file which cannot be made */

static void test_codes(void) {
    static const st_result of_dsv3[] = {ST_OK, ST_ERR_ARG, ST_ERR_LIMIT, ST_ERR_OVERFLOW, ST_ERR_UNSUPPORTED, ST_ERR_ARG,
                                        ST_ERR_ARG, ST_ERR_MISSING, ST_ERR_MISMATCH, ST_ERR_ARG, ST_ERR_ARG, ST_ERR_ARG,
                                        ST_ERR_FORMAT, ST_ERR_ARG, ST_ERR_FORMAT, ST_ERR_ARG}; /* the last: none of them */
    static const struct {
        json_result from;
        st_result to;
    } of_json[] = {{JSON_OK, ST_OK}, {JSON_ERR_TRUNC, ST_ERR_TRUNC}, {JSON_ERR_LIMIT, ST_ERR_LIMIT},
                   {JSON_ERR_MISSING, ST_ERR_MISSING}, {JSON_ERR_TOKENS, ST_ERR_NOMEM}, {JSON_ERR_FORMAT, ST_ERR_FORMAT},
                   {JSON_ERR_TYPE, ST_ERR_FORMAT}, {(json_result)-99, ST_ERR_FORMAT}};
    for (int i = 0; i < 16; i++) CHECK_EQ(checkpointi_from_dsv3((dsv3_result)-i), of_dsv3[i]);
    CHECK_EQ(DSV3_ERR_DAMAGED, -14);
    for (size_t i = 0; i < sizeof of_json / sizeof of_json[0]; i++)
        CHECK_EQ(checkpointi_from_json(of_json[i].from), of_json[i].to);
}

/* A checkpoint of one tensor, which is not in any file. */
static void one_tensor(checkpoint *c, st_tensor *t) {
    memset(c, 0, sizeof *c);
    memset(t, 0, sizeof *t);
    t->name = (char *)"x";
    t->dtype = ST_U8;
    t->rank = 2;
    t->shape[0] = 1, t->shape[1] = 34;
    t->data = "";
    c->file.tensor = t;
    c->file.count = 1;
    c->blocks = DSV3_Q8_0;
    c->config.num_hidden_layers = 1;
    snprintf(c->wrong, sizeof c->wrong, "x");
}

static void test_messages(void) {
    static const struct {
        dsv3_result why;
        int known;
        st_result code;
        const char *text;
    } table[] = {{DSV3_ERR_UNSUPPORTED, 0, ST_ERR_UNSUPPORTED, "x: is U8, but"},
                 {DSV3_ERR_UNSUPPORTED, 1, ST_ERR_UNSUPPORTED, "x: is U8, but"},
                 {DSV3_ERR_UNSUPPORTED, 2, ST_ERR_UNSUPPORTED, "expected the type F32, F16, BF16 or F8_E4M3, found I8"},
                 {DSV3_ERR_MISMATCH, 0, ST_ERR_MISMATCH, "x: shape"},
                 {DSV3_ERR_MISMATCH, 1, ST_ERR_MISMATCH, "34 bytes each; found rank 2 and rows of 34 bytes"},
                 {DSV3_ERR_MISMATCH, 3, ST_ERR_MISMATCH, "34 bytes each; found rank 0 and rows of 1 bytes"},
                 {DSV3_ERR_NAN, 1, ST_ERR_FORMAT, "x: has a scale that is not finite and positive"},
                 {DSV3_ERR_OVERFLOW, 1, ST_ERR_OVERFLOW, "x: "},
                 {DSV3_ERR_MISSING, 0, ST_ERR_MISSING, "x: "}};
    checkpoint c;
    st_tensor t;
    st_error error;
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        one_tensor(&c, &t);
        if (table[i].known == 0) c.file.count = 0;
        if (table[i].known == 2) t.dtype = ST_I8, t.type = "I8";
        if (table[i].known == 3) t.rank = 0;
        CHECK_EQ(checkpointi_unexpected(&c, table[i].why, "place", &error), table[i].code);
        check_message("unexpected", &error, table[i].code, "place", table[i].text);
    }
    one_tensor(&c, &t);
    CHECK(!checkpointi_superfluous(&c, "lm_head.weight"));
    c.config.tie_word_embeddings = 1;
    CHECK(checkpointi_superfluous(&c, "lm_head.weight") && !checkpointi_superfluous(&c, "lm_head.bias"));
    CHECK(checkpointi_superfluous(&c, "a.rotary_emb.inv_freq") && !checkpointi_superfluous(&c, ".rotary_emb.inv_freq"));
}

/* Rows of blocks that are no blocks, or too many. */
static void test_block_rows(void) {
    checkpoint c;
    st_tensor t;
    dsv3_tensor got;
    one_tensor(&c, &t);
    CHECK_EQ(checkpoint_find(&c, "x", &got), DSV3_OK);
    CHECK(got.rows == 1 && got.cols == 32 && got.type == DSV3_Q8_0 && got.rank == 2 && got.data == t.data);
    CHECK_EQ(checkpoint_find(&c, "y", &got), DSV3_ERR_MISSING);
    t.shape[1] = 35;
    CHECK_EQ(checkpoint_find(&c, "x", &got), DSV3_ERR_MISMATCH);
    t.shape[1] = SIZE_MAX / 34 * 34;
    CHECK_EQ(checkpoint_find(&c, "x", &got), SIZE_MAX / 34 > SIZE_MAX / 32 ? DSV3_ERR_MISMATCH : DSV3_OK);
    c.blocks = DSV3_Q4_0, t.shape[1] = SIZE_MAX / 18 * 18; /* 32 numbers in 18 bytes: more than size_t can count */
    CHECK_EQ(checkpoint_find(&c, "x", &got), DSV3_ERR_MISMATCH);
    t.shape[1] = SIZE_MAX / 32 / 18 * 18;
    CHECK_EQ(checkpoint_find(&c, "x", &got), DSV3_OK);
    c.blocks = DSV3_Q8_0;
    t.rank = 1, t.shape[0] = 34;
    CHECK_EQ(checkpoint_find(&c, "x", &got), DSV3_ERR_MISMATCH);
    c.blocks = -1;
    CHECK_EQ(checkpoint_find(&c, "x", &got), DSV3_ERR_UNSUPPORTED);
}

/* More choices than a message holds: it is cut, and still one line. */
static void test_many_choices(void) {
    static const char long_name[] = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    static const char *const names[] = {long_name, long_name, long_name, long_name, long_name, NULL};
    json_token token;
    st_error error;
    checkpointi_reader r;
    memset(&r, 0, sizeof r);
    memset(&token, 0, sizeof token);
    r.doc.text = "b", r.doc.length = 1, r.doc.token = &token, r.doc.count = 1;
    token.type = JSON_STRING, token.end = 1;
    r.label = "place", r.error = &error;
    checkpointi_not_listed(&r, "key", 0, names);
    check_message("many choices", &error, ST_ERR_UNSUPPORTED, "place", "key: expected aaaa");
    CHECK(strstr(error.message, "found") == NULL && r.result == ST_ERR_UNSUPPORTED);
}

int main(void) {
    const char *temporary = getenv("TMPDIR");
    dsv3_config config;
    disk *d;
    snprintf(directory, sizeof directory, "%.200s/dsv3-checkpoint-XXXXXX", temporary != NULL ? temporary : "/tmp");
    if (mkdtemp(directory) == NULL) {
        fprintf(stderr, "checkpoint: no temporary directory\n");
        return 2;
    }
    test_codes();
    test_messages();
    test_block_rows();
    test_many_choices();
    test_keys();
    test_ranges();
    test_cases();
    test_overflow();
    test_groups_of_one();
    test_null_rank();
    test_bounded();
    test_token_ids();
    test_rope_spellings();
    test_model_types();
    test_families();
    test_dense();
    test_adapted();
    test_texts();
    test_mutations();
    test_labels();
    test_published();
    test_types();
    test_demo_presets();
    test_paths();
    test_round_trips();
    test_fp8();
    test_blocks(SYNTH_EIGHT);
    test_blocks(SYNTH_FOUR);
    test_values();
    config = tiny_config();
    d = disk_open(&config, SYNTH_F32);
    test_shapes(d);
    test_weight_types(d);
    test_leftovers(d);
    test_missing(d);
    test_tied(d);
    test_shards(d);
    test_truncation(d);
    test_header_mutations(d);
    test_memory(d);
    test_ends(d);
    disk_close(d);
    CHECK_EQ(live_blocks, 0);
    rmdir(directory);
    return test_done("checkpoint");
}
