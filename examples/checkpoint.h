/* checkpoint.h -- from a directory as published (config.json, *.safetensors) to a bound dsv3_model.
 *
 * What it is: the glue between dsv3.h, which knows no files, and safetensors.h and json.h, which know no
 * model. What it is not: a tokenizer, a downloader, or a converter.
 *
 * Use: in exactly one file of the program, before any other #include,
 *
 *     #define DSV3_IMPLEMENTATION
 *     #define CHECKPOINT_IMPLEMENTATION
 *     #include "checkpoint.h"
 *
 *     checkpoint model;
 *     if (checkpoint_open(&model, "examples/models/austen", &error) != ST_OK) puts(error.message);
 *     ... model.model is a dsv3_model, model.config its dsv3_config ...
 *     checkpoint_close(&model);
 *
 * Contract: a checkpoint owns its files and tables until checkpoint_close, which is safe on a failed or
 * zeroed one. Errors are an st_result and one line of text (file, name, expected, found). No global state.
 *
 * config.json: fields have their published names. Sizes and routing fields must be there (null is allowed
 * for q_lora_rank, n_shared_experts, n_group, topk_group and the token ids); scoring_func and topk_method
 * default by model_type; rope_parameters (newer files) and rope_scaling (older ones) are both understood;
 * eos_token_id may be a list, whose first id is kept. A field this library could not honour is refused:
 * another activation, another RoPE scaling, another FP8 block size. Unknown fields are ignored. */
#if defined(CHECKPOINT_IMPLEMENTATION) && !defined(SAFETENSORS_IMPLEMENTATION)
#define SAFETENSORS_IMPLEMENTATION
#endif
#include "safetensors.h"

#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "../dsv3.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct checkpoint {
    dsv3_config config;
    dsv3_model model;
    st_file file;
    void *tables;                /* memory of model */
    char missing[DSV3_MAX_NAME]; /* the tensor that was looked for in vain */
} checkpoint;

/* Reads a config.json of `length` bytes that is in memory; label stands for its path in messages. */
st_result checkpoint_config_parse(dsv3_config *config, const char *text, size_t length, const char *label,
                                  st_error *error);

/* Reads path, or path/config.json if path is a directory. */
st_result checkpoint_config(dsv3_config *config, const char *path, st_error *error);

/* Config, files (one or sharded) and binding. */
st_result checkpoint_open(checkpoint *c, const char *directory, st_error *error);
void checkpoint_close(checkpoint *c);

/* A dsv3_find over an st_file. */
dsv3_result checkpoint_find(void *user, const char *name, dsv3_tensor *tensor);

/* The type of dsv3.h for a file's, or -1: not a weight type. */
int checkpoint_type(st_dtype dtype);

#ifdef __cplusplus
}
#endif
#endif /* CHECKPOINT_H */

#if defined(CHECKPOINT_IMPLEMENTATION) && !defined(CHECKPOINT_IMPLEMENTED)
#define CHECKPOINT_IMPLEMENTED

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __GNUC__
__attribute__((format(printf, 3, 4)))
#endif
static st_result
checkpointi_fail(st_error *error, st_result code, const char *format, ...) {
    if (error != NULL) {
        va_list list;
        va_start(list, format);
        vsnprintf(error->message, sizeof error->message, format, list);
        va_end(list);
        for (char *c = error->message; *c != '\0'; c++) { /* a path may hold anything; the message is one line */
            if ((unsigned char)*c < 0x20 || *c == 0x7F) *c = '?';
        }
        error->code = code;
    }
    return code;
}

static st_result checkpointi_from_dsv3(dsv3_result result) {
    switch (result) {
    case DSV3_OK: return ST_OK;
    case DSV3_ERR_LIMIT: return ST_ERR_LIMIT;
    case DSV3_ERR_OVERFLOW: return ST_ERR_OVERFLOW;
    case DSV3_ERR_UNSUPPORTED: return ST_ERR_UNSUPPORTED;
    case DSV3_ERR_MISSING: return ST_ERR_MISSING;
    case DSV3_ERR_MISMATCH: return ST_ERR_MISMATCH;
    case DSV3_ERR_NAN: return ST_ERR_FORMAT;
    case DSV3_ERR_ARG:
    case DSV3_ERR_MEMORY:
    case DSV3_ERR_ALIGN:
    case DSV3_ERR_TOKEN:
    case DSV3_ERR_POSITION:
    case DSV3_ERR_CONTEXT: return ST_ERR_ARG;
    }
    return ST_ERR_ARG;
}

static st_result checkpointi_from_json(json_result result) {
    switch (result) {
    case JSON_OK: return ST_OK;
    case JSON_ERR_TRUNC: return ST_ERR_TRUNC;
    case JSON_ERR_LIMIT: return ST_ERR_LIMIT;
    case JSON_ERR_MISSING: return ST_ERR_MISSING;
    case JSON_ERR_TOKENS: return ST_ERR_NOMEM;
    case JSON_ERR_FORMAT:
    case JSON_ERR_TYPE: return ST_ERR_FORMAT;
    }
    return ST_ERR_FORMAT;
}

/* ---- Reading fields. A reader that has failed stays failed, so that a list of reads needs one check. */

typedef struct checkpointi_reader {
    json_document doc;
    const char *label;
    st_error *error;
    st_result result;
} checkpointi_reader;

static void checkpointi_bad(checkpointi_reader *r, st_result code, const char *key, const char *why) {
    if (r->result != ST_OK) return;
    r->result = checkpointi_fail(r->error, code, "%.300s: %s: %s", r->label, key, why);
}

/* What to do with a field that is absent, or null. */
typedef enum checkpointi_need { CHECKPOINTI_REQUIRED, CHECKPOINTI_NULLABLE, CHECKPOINTI_OPTIONAL } checkpointi_need;

/* Finds key in object. Returns whether there is a value to read; complains if there must be one. */
static int checkpointi_value(checkpointi_reader *r, size_t object, const char *key, checkpointi_need need,
                             size_t *value) {
    if (r->result != ST_OK) return 0;
    if (json_find(&r->doc, object, key, value) != JSON_OK) {
        if (need != CHECKPOINTI_OPTIONAL) checkpointi_bad(r, ST_ERR_MISSING, key, "is missing");
        return 0;
    }
    if (r->doc.token[*value].type != JSON_NULL) return 1;
    if (need == CHECKPOINTI_REQUIRED) checkpointi_bad(r, ST_ERR_FORMAT, key, "must not be null");
    return 0;
}

static void checkpointi_int_at(checkpointi_reader *r, const char *key, size_t value, int32_t *out) {
    int64_t number = 0;
    json_result found = json_int(&r->doc, value, &number);
    if (found == JSON_ERR_LIMIT || (found == JSON_OK && (number > INT32_MAX || number < -INT32_MAX))) {
        checkpointi_bad(r, ST_ERR_LIMIT, key, "is beyond any limit");
    } else if (found != JSON_OK) {
        checkpointi_bad(r, ST_ERR_FORMAT, key, "must be an integer");
    } else {
        *out = (int32_t)number;
    }
}

static void checkpointi_int(checkpointi_reader *r, size_t object, const char *key, checkpointi_need need,
                            int32_t *out) {
    size_t value;
    if (checkpointi_value(r, object, key, need, &value)) checkpointi_int_at(r, key, value, out);
}

static void checkpointi_bool(checkpointi_reader *r, size_t object, const char *key, checkpointi_need need,
                             int32_t *out) {
    size_t value;
    int truth;
    if (!checkpointi_value(r, object, key, need, &value)) return;
    if (json_bool(&r->doc, value, &truth) != JSON_OK) {
        checkpointi_bad(r, ST_ERR_FORMAT, key, "must be true or false");
    } else {
        *out = truth;
    }
}

static void checkpointi_float(checkpointi_reader *r, size_t object, const char *key, checkpointi_need need,
                              float *out) {
    size_t value;
    double number = 0;
    json_result found;
    if (!checkpointi_value(r, object, key, need, &value)) return;
    found = json_double(&r->doc, value, &number);
    if (found == JSON_ERR_LIMIT || (found == JSON_OK && (number > 3.4e38 || number < -3.4e38))) {
        checkpointi_bad(r, ST_ERR_LIMIT, key, "is beyond any limit");
    } else if (found != JSON_OK) {
        checkpointi_bad(r, ST_ERR_FORMAT, key, "must be a number");
    } else {
        *out = (float)number;
    }
}

/* Which of `names` (ended by NULL) is the string under key? -1 when there is no value. */
static int checkpointi_name(checkpointi_reader *r, size_t object, const char *key, checkpointi_need need,
                            const char *const *names) {
    size_t value;
    if (!checkpointi_value(r, object, key, need, &value)) return -1;
    if (r->doc.token[value].type != JSON_STRING) {
        checkpointi_bad(r, ST_ERR_FORMAT, key, "must be a string");
        return -1;
    }
    for (int i = 0; names[i] != NULL; i++) {
        if (json_equal(&r->doc, value, names[i])) return i;
    }
    checkpointi_bad(r, ST_ERR_UNSUPPORTED, key, "has a value that is not supported");
    return -1;
}

/* ---- The fields, by theme */

static void checkpointi_sizes(checkpointi_reader *r, dsv3_config *c) {
    checkpointi_int(r, 0, "vocab_size", CHECKPOINTI_REQUIRED, &c->vocab_size);
    checkpointi_int(r, 0, "hidden_size", CHECKPOINTI_REQUIRED, &c->hidden_size);
    checkpointi_int(r, 0, "intermediate_size", CHECKPOINTI_REQUIRED, &c->intermediate_size);
    checkpointi_int(r, 0, "num_hidden_layers", CHECKPOINTI_REQUIRED, &c->num_hidden_layers);
    checkpointi_int(r, 0, "num_attention_heads", CHECKPOINTI_REQUIRED, &c->num_attention_heads);
    checkpointi_int(r, 0, "q_lora_rank", CHECKPOINTI_NULLABLE, &c->q_lora_rank);
    checkpointi_int(r, 0, "kv_lora_rank", CHECKPOINTI_REQUIRED, &c->kv_lora_rank);
    checkpointi_int(r, 0, "qk_nope_head_dim", CHECKPOINTI_REQUIRED, &c->qk_nope_head_dim);
    checkpointi_int(r, 0, "qk_rope_head_dim", CHECKPOINTI_REQUIRED, &c->qk_rope_head_dim);
    checkpointi_int(r, 0, "v_head_dim", CHECKPOINTI_REQUIRED, &c->v_head_dim);
    checkpointi_int(r, 0, "max_position_embeddings", CHECKPOINTI_REQUIRED, &c->max_position_embeddings);
    checkpointi_float(r, 0, "rms_norm_eps", CHECKPOINTI_REQUIRED, &c->rms_norm_eps);
    checkpointi_int(r, 0, "num_nextn_predict_layers", CHECKPOINTI_OPTIONAL, &c->num_nextn_predict_layers);
    c->num_key_value_heads = c->num_attention_heads;
    checkpointi_int(r, 0, "num_key_value_heads", CHECKPOINTI_OPTIONAL, &c->num_key_value_heads);
    checkpointi_bool(r, 0, "tie_word_embeddings", CHECKPOINTI_OPTIONAL, &c->tie_word_embeddings);
    checkpointi_bool(r, 0, "attention_bias", CHECKPOINTI_OPTIONAL, &c->attention_bias);
    checkpointi_bool(r, 0, "rope_interleave", CHECKPOINTI_OPTIONAL, &c->rope_interleave);
}

static void checkpointi_experts(checkpointi_reader *r, dsv3_config *c) {
    static const char models[3][12] = {"deepseek_v3", "kimi_k2", "deepseek_v2"};
    static const char scoring[2][8] = {"sigmoid", "softmax"};
    static const char methods[3][21] = {"noaux_tc", "group_limited_greedy", "greedy"};
    const char *model_names[] = {models[0], models[1], models[2], NULL};
    const char *scoring_names[] = {scoring[0], scoring[1], NULL};
    const char *method_names[] = {methods[0], methods[1], methods[2], NULL};
    int model = checkpointi_name(r, 0, "model_type", CHECKPOINTI_REQUIRED, model_names);
    int score = checkpointi_name(r, 0, "scoring_func", CHECKPOINTI_OPTIONAL, scoring_names);
    int method = checkpointi_name(r, 0, "topk_method", CHECKPOINTI_OPTIONAL, method_names);
    c->scoring_func = score >= 0 ? (dsv3_scoring_func)score : model == 2 ? DSV3_SOFTMAX : DSV3_SIGMOID;
    c->topk_method = method >= 0 ? (dsv3_topk_method)method : model == 2 ? DSV3_GREEDY : DSV3_NOAUX_TC;
    checkpointi_int(r, 0, "moe_intermediate_size", CHECKPOINTI_REQUIRED, &c->moe_intermediate_size);
    checkpointi_int(r, 0, "n_routed_experts", CHECKPOINTI_REQUIRED, &c->n_routed_experts);
    checkpointi_int(r, 0, "n_shared_experts", CHECKPOINTI_NULLABLE, &c->n_shared_experts);
    checkpointi_int(r, 0, "num_experts_per_tok", CHECKPOINTI_REQUIRED, &c->num_experts_per_tok);
    checkpointi_int(r, 0, "n_group", CHECKPOINTI_NULLABLE, &c->n_group);
    checkpointi_int(r, 0, "topk_group", CHECKPOINTI_NULLABLE, &c->topk_group);
    checkpointi_int(r, 0, "first_k_dense_replace", CHECKPOINTI_REQUIRED, &c->first_k_dense_replace);
    checkpointi_int(r, 0, "moe_layer_freq", CHECKPOINTI_OPTIONAL, &c->moe_layer_freq);
    checkpointi_bool(r, 0, "norm_topk_prob", CHECKPOINTI_REQUIRED, &c->norm_topk_prob);
    checkpointi_float(r, 0, "routed_scaling_factor", CHECKPOINTI_REQUIRED, &c->routed_scaling_factor);
    checkpointi_bool(r, 0, "seq_aux", CHECKPOINTI_OPTIONAL, &c->seq_aux);
    checkpointi_float(r, 0, "aux_loss_alpha", CHECKPOINTI_OPTIONAL, &c->aux_loss_alpha);
}

/* The object under one of the two names that exist for it, under one of the two names its type has. */
static void checkpointi_rope(checkpointi_reader *r, dsv3_config *c) {
    static const char types[2][8] = {"default", "yarn"};
    const char *type_names[] = {types[0], types[1], NULL};
    dsv3_rope_scaling *s = &c->rope_scaling;
    size_t object, unused;
    const char *key = "rope_parameters";
    int type, inside, found = checkpointi_value(r, 0, key, CHECKPOINTI_OPTIONAL, &object);
    if (!found) found = checkpointi_value(r, 0, key = "rope_scaling", CHECKPOINTI_OPTIONAL, &object);
    if (found && r->doc.token[object].type != JSON_OBJECT) {
        checkpointi_bad(r, ST_ERR_FORMAT, key, "must be an object or null");
        return;
    }
    inside = found && checkpointi_value(r, object, "rope_theta", CHECKPOINTI_OPTIONAL, &unused);
    checkpointi_float(r, inside ? object : 0, "rope_theta", CHECKPOINTI_REQUIRED, &c->rope_theta);
    if (!found) return;
    type = checkpointi_name(r, object,
                            json_find(&r->doc, object, "rope_type", &unused) == JSON_OK ? "rope_type" : "type",
                            CHECKPOINTI_REQUIRED, type_names);
    if (type != 1) return;
    s->type = DSV3_ROPE_YARN;
    s->mscale_all_dim = 0.0f;
    checkpointi_float(r, object, "factor", CHECKPOINTI_REQUIRED, &s->factor);
    checkpointi_int(r, object, "original_max_position_embeddings", CHECKPOINTI_REQUIRED,
                    &s->original_max_position_embeddings);
    checkpointi_float(r, object, "beta_fast", CHECKPOINTI_OPTIONAL, &s->beta_fast);
    checkpointi_float(r, object, "beta_slow", CHECKPOINTI_OPTIONAL, &s->beta_slow);
    checkpointi_float(r, object, "mscale", CHECKPOINTI_OPTIONAL, &s->mscale);
    checkpointi_float(r, object, "mscale_all_dim", CHECKPOINTI_OPTIONAL, &s->mscale_all_dim);
    if (checkpointi_value(r, object, "attention_factor", CHECKPOINTI_OPTIONAL, &unused)) {
        checkpointi_bad(r, ST_ERR_UNSUPPORTED, "attention_factor", "is not part of this architecture's YaRN");
    }
}

static void checkpointi_token(checkpointi_reader *r, const char *key, int32_t *out) {
    size_t value;
    if (!checkpointi_value(r, 0, key, CHECKPOINTI_OPTIONAL, &value)) return;
    if (r->doc.token[value].type == JSON_ARRAY) {
        if (r->doc.token[value].size == 0) return;
        value++; /* its first element */
    }
    checkpointi_int_at(r, key, value, out);
    if (r->result == ST_OK && *out < 0) checkpointi_bad(r, ST_ERR_ARG, key, "must not be negative");
}

/* What cannot be honoured is refused. */
static void checkpointi_refuse(checkpointi_reader *r) {
    static const char words[3][5] = {"silu", "fp8", "e4m3"};
    const char *silu[] = {words[0], NULL}, *fp8[] = {words[1], NULL}, *e4m3[] = {words[2], NULL};
    size_t quantisation, block;
    checkpointi_name(r, 0, "hidden_act", CHECKPOINTI_OPTIONAL, silu);
    if (!checkpointi_value(r, 0, "quantization_config", CHECKPOINTI_OPTIONAL, &quantisation)) return;
    if (r->doc.token[quantisation].type != JSON_OBJECT) {
        checkpointi_bad(r, ST_ERR_FORMAT, "quantization_config", "must be an object or null");
        return;
    }
    checkpointi_name(r, quantisation, "quant_method", CHECKPOINTI_OPTIONAL, fp8);
    checkpointi_name(r, quantisation, "fmt", CHECKPOINTI_OPTIONAL, e4m3);
    if (!checkpointi_value(r, quantisation, "weight_block_size", CHECKPOINTI_OPTIONAL, &block)) return;
    if (r->doc.token[block].type == JSON_ARRAY && r->doc.token[block].size == 2) {
        int64_t rows = 0, cols = 0;
        json_result first = json_int(&r->doc, block + 1, &rows), second = json_int(&r->doc, block + 2, &cols);
        if (first == JSON_OK && second == JSON_OK && rows == DSV3_BLOCK && cols == DSV3_BLOCK) return;
    }
    checkpointi_bad(r, ST_ERR_UNSUPPORTED, "weight_block_size", "must be [128, 128]");
}

static st_result checkpointi_config_read(checkpointi_reader *r, dsv3_config *config) {
    dsv3_error why;
    char text[256];
    dsv3_config c = dsv3_config_default();
    if (r->doc.token[0].type != JSON_OBJECT) {
        return checkpointi_fail(r->error, ST_ERR_FORMAT, "%.300s: is not a JSON object", r->label);
    }
    checkpointi_sizes(r, &c);
    checkpointi_experts(r, &c);
    checkpointi_rope(r, &c);
    checkpointi_token(r, "bos_token_id", &c.bos_token_id);
    checkpointi_token(r, "eos_token_id", &c.eos_token_id);
    checkpointi_refuse(r);
    if (r->result != ST_OK) return r->result;
    if (dsv3_config_check(&c, &why) != DSV3_OK) {
        return checkpointi_fail(r->error, checkpointi_from_dsv3(why.code), "%.300s: %s", r->label,
                                dsv3_error_text(&why, text, sizeof text));
    }
    *config = c;
    return ST_OK;
}

st_result checkpoint_config_parse(dsv3_config *config, const char *text, size_t length, const char *label,
                                  st_error *error) {
    checkpointi_reader r;
    json_token *tokens;
    size_t count = 0, at = 0;
    json_result parsed = json_parse(text, length, NULL, 0, &count, &at);
    st_result result;
    memset(&r, 0, sizeof r);
    r.label = label;
    r.error = error;
    if (error != NULL) memset(error, 0, sizeof *error);
    if (parsed != JSON_OK) {
        return checkpointi_fail(error, checkpointi_from_json(parsed), "%.300s: %s at byte %lu", label,
                                json_result_string(parsed), (unsigned long)at);
    }
    if (count > SIZE_MAX / sizeof *tokens)
        return checkpointi_fail(error, ST_ERR_OVERFLOW, "%.300s: is too large", label);
    tokens = (json_token *)ST_MALLOC(count * sizeof *tokens);
    if (tokens == NULL) return checkpointi_fail(error, ST_ERR_NOMEM, "%.300s: out of memory", label);
    parsed = json_parse(text, length, tokens, count, &count, &at);
    if (parsed != JSON_OK) {
        result = checkpointi_fail(error, checkpointi_from_json(parsed), "%.300s: %s at byte %lu", label,
                                  json_result_string(parsed), (unsigned long)at);
    } else {
        r.doc.text = text;
        r.doc.length = length;
        r.doc.token = tokens;
        r.doc.count = count;
        result = checkpointi_config_read(&r, config);
    }
    ST_FREE(tokens);
    return result;
}

/* ---- Files */

#define CHECKPOINTI_MAX_CONFIG 1048576 /* bytes of a config.json */

static st_result checkpointi_config_file(dsv3_config *config, const char *path, st_error *error) {
    FILE *file;
    char *text;
    size_t length;
    st_result result;
    errno = 0;
    file = fopen(path, "rb");
    if (file == NULL) {
        if (errno == ENOENT) {
            return checkpointi_fail(error, ST_ERR_MISSING,
                                    "%.300s: does not exist; expected a checkpoint's directory", path);
        }
        return checkpointi_fail(error, ST_ERR_IO, "%.300s: cannot be opened: %s", path, strerror(errno));
    }
    text = (char *)ST_MALLOC(CHECKPOINTI_MAX_CONFIG + 1);
    if (text == NULL) {
        fclose(file);
        return checkpointi_fail(error, ST_ERR_NOMEM, "%.300s: out of memory", path);
    }
    length = fread(text, 1, CHECKPOINTI_MAX_CONFIG + 1, file);
    if (ferror(file)) {
        result = checkpointi_fail(error, ST_ERR_IO, "%.300s: cannot be read", path);
    } else if (length > CHECKPOINTI_MAX_CONFIG) {
        result = checkpointi_fail(error, ST_ERR_LIMIT, "%.300s: is larger than a config.json can be", path);
    } else {
        result = checkpoint_config_parse(config, text, length, path, error);
    }
    ST_FREE(text);
    fclose(file);
    return result;
}

st_result checkpoint_config(dsv3_config *config, const char *path, st_error *error) {
    size_t n = strlen(path);
    char inside[4096];
    int written;
    if (n >= 5 && strcmp(path + n - 5, ".json") == 0) return checkpointi_config_file(config, path, error);
    written = snprintf(inside, sizeof inside, "%s/config.json", path);
    if (written < 0 || (size_t)written >= sizeof inside) {
        return checkpointi_fail(error, ST_ERR_LIMIT, "%.100s...: the path is too long", path);
    }
    return checkpointi_config_file(config, inside, error);
}

int checkpoint_type(st_dtype dtype) {
    switch (dtype) {
    case ST_F32: return DSV3_F32;
    case ST_F16: return DSV3_F16;
    case ST_BF16: return DSV3_BF16;
    case ST_F8_E4M3: return DSV3_F8_E4M3;
    default: return -1;
    }
}

dsv3_result checkpoint_find(void *user, const char *name, dsv3_tensor *tensor) {
    const st_tensor *t = st_find((const st_file *)user, name);
    if (t == NULL) return DSV3_ERR_MISSING;
    if (checkpoint_type(t->dtype) < 0) return DSV3_ERR_UNSUPPORTED;
    tensor->data = t->data;
    tensor->scale = NULL;
    tensor->type = (dsv3_type)checkpoint_type(t->dtype);
    tensor->rank = t->rank;
    tensor->rows = t->rank == 2 ? (size_t)t->shape[0] : 1; /* st_open has checked that shapes fit size_t */
    tensor->cols = t->rank == 0 ? 1 : (size_t)t->shape[t->rank - 1];
    return DSV3_OK;
}

/* Is every tensor of the main model there? Asked before memory is taken, so that a config that promises a giant costs
 * nothing when the files do not keep the promise. */
static dsv3_result checkpointi_expect(void *user, const dsv3_tensor_info *info) {
    checkpoint *c = (checkpoint *)user;
    if (info->layer >= c->config.num_hidden_layers || st_find(&c->file, info->name) != NULL) return DSV3_OK;
    snprintf(c->missing, sizeof c->missing, "%s", info->name);
    return DSV3_ERR_MISSING;
}

static st_result checkpointi_bind(checkpoint *c, const char *directory, st_error *error) {
    dsv3_error why;
    size_t bytes;
    dsv3_result result = dsv3_model_tensors(&c->config, checkpointi_expect, c);
    if (result != DSV3_OK) {
        return checkpointi_fail(error, ST_ERR_MISSING, "%.300s: %s: %s", directory, c->missing,
                                dsv3_result_string(result));
    }
    result = dsv3_model_size(&c->config, &bytes);
    if (result != DSV3_OK) {
        return checkpointi_fail(error, checkpointi_from_dsv3(result), "%.300s: %s", directory,
                                dsv3_result_string(result));
    }
    c->tables = ST_MALLOC(bytes);
    if (c->tables == NULL) {
        return checkpointi_fail(error, ST_ERR_NOMEM, "%.300s: no memory for %lu bytes of tables", directory,
                                (unsigned long)bytes);
    }
    if (dsv3_model_bind(&c->model, &c->config, c->tables, bytes, checkpoint_find, &c->file, &why) != DSV3_OK) {
        char text[256];
        return checkpointi_fail(error, checkpointi_from_dsv3(why.code), "%.300s: %s", directory,
                                dsv3_error_text(&why, text, sizeof text));
    }
    return ST_OK;
}

st_result checkpoint_open(checkpoint *c, const char *directory, st_error *error) {
    st_result result;
    memset(c, 0, sizeof *c);
    result = checkpoint_config(&c->config, directory, error);
    if (result == ST_OK) result = st_open_checkpoint(&c->file, directory, error);
    if (result == ST_OK) result = checkpointi_bind(c, directory, error);
    if (result != ST_OK) checkpoint_close(c);
    return result;
}

void checkpoint_close(checkpoint *c) {
    st_close(&c->file);
    ST_FREE(c->tables);
    c->tables = NULL;
}

#endif /* CHECKPOINT_IMPLEMENTATION */
