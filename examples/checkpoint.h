/* checkpoint.h -- from a directory as published (config.json, *.safetensors) to a bound dsv3_model, and back.
 *
 * What it is: the glue between dsv3.h, which knows no files, and safetensors.h and json.h, which know no
 * model. What it is not: a tokenizer or a downloader.
 *
 * Use: in exactly one file of the program
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
 * for q_lora_rank, n_shared_experts, n_group, topk_group and the token ids; q_lora_rank may be absent). Null
 * n_routed_experts, and a first_k_dense_replace beyond the layers, mean that all layers are dense. scoring_func,
 * topk_method, and whether the routed scaling factor applies to normalised weights, follow model_type.
 * rope_scaling (older files) and rope_parameters (newer ones) are both understood; of two, rope_scaling counts.
 * eos_token_id may be a list, whose first id goes into the config; checkpoint_open keeps all of them, and those of a
 * generation_config.json beside it, of which nothing else is read. A field this library could not honour is refused:
 * another activation, another RoPE scaling or an unknown field of it, another FP8 block size. Other unknown fields are
 * ignored.
 *
 * Q8_0 and Q4_0: safetensors files know no types that store numbers in blocks. A matrix [rows, cols] of these types has
 * its published name, dtype U8 and the shape [rows, bytes of a row]; the bytes are those of the same tensor in a GGUF
 * file (34, or 18, for 32 numbers in a row). What they mean is said in config.json, for all U8 matrices of the files:
 *
 *     "quantization_config": {"quant_method": "blocks", "format": "q8_0", "block": 32}           or "q4_0"
 *
 * Without that, U8 is refused as a type of weights, and rows that are not whole blocks always are. */
#if defined(CHECKPOINT_IMPLEMENTATION) && !defined(SAFETENSORS_IMPLEMENTATION)
#define SAFETENSORS_IMPLEMENTATION
#endif
#include "safetensors.h"

#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "../dsv3.h"
#ifdef DSV3I_OLD_STANDARD
#define CHECKPOINT_IMPLEMENTED
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define CHECKPOINT_MAX_EOS 32

typedef struct checkpoint {
    dsv3_config config;
    int32_t eos[CHECKPOINT_MAX_EOS]; /* [n_eos] every token that ends a text, each once; those of config.json first */
    size_t n_eos;
    dsv3_model model;
    st_file file;
    int blocks;                     /* what U8 matrices are: DSV3_Q8_0, DSV3_Q4_0, or -1: not weights */
    void *tables;                   /* memory of model */
    char wrong[DSV3_MAX_NAME + 16]; /* the first tensor that is missing or unusable */
    size_t leftover;                /* tensors of the files that this model does not use */
    char leftover_names[256];       /* the first few of them */
} checkpoint;

/* Reads a config.json of `length` bytes that is in memory; label stands for its path in messages. */
st_result checkpoint_config_parse(dsv3_config *config, const char *text, size_t length, const char *label,
                                  st_error *error);

/* Reads path if its name ends in .json, else path/config.json. */
st_result checkpoint_config(dsv3_config *config, const char *path, st_error *error);

/* What U8 matrices of the checkpoint are, by its config.json alone, of which nothing else is read: see checkpoint. */
st_result checkpoint_blocks(int *blocks, const char *path, st_error *error);

/* Config, files (one or sharded) and binding. Scales of FP8 weights must be finite and positive. */
st_result checkpoint_open(checkpoint *c, const char *directory, st_error *error);
void checkpoint_close(checkpoint *c);

/* A dsv3_find; user is a checkpoint of which file and blocks are set. */
dsv3_result checkpoint_find(void *user, const char *name, dsv3_tensor *tensor);

/* The type of dsv3.h for a file's, or -1: not a weight type. blocks: as in checkpoint. */
int checkpoint_type(st_dtype dtype, int blocks);

/* ---- Writing. Each file is written under another name, synced, and renamed: whatever happens, there is the old
 * one or the new one. */

/* The type that a tensor has in a checkpoint of `type`. F8_E4M3: the tensors that are FP8 in the published files are,
 * the others are BF16. Q8_0 and Q4_0: all matrices are, but the routers' and those whose columns are not whole blocks
 * of 32, which are BF16 as the norms are. Router biases are always F32. */
dsv3_type checkpoint_type_of(const dsv3_tensor_info *info, dsv3_type type);

/* Writes directory/model.safetensors: every tensor the config calls for, as far as find has it (only copies and whole
 * MTP modules may be missing), converted to type by the rules of dsv3_quantize. A tensor that has its type already is
 * copied bit for bit, with its scales. A value that the type cannot hold (finite, but too large; not finite as FP8, Q8_0
 * or Q4_0) is ST_ERR_OVERFLOW. Takes memory for 128 rows of the widest tensor. */
st_result checkpoint_save(const char *directory, const dsv3_config *config, dsv3_find find, void *user,
                          dsv3_type type, st_error *error);

/* A config.json for weights of that type, to be released with ST_FREE: made from a config, which must be valid ... */
st_result checkpoint_config_text(char **text, const dsv3_config *config, dsv3_type type, st_error *error);
/* ... or from another config.json [length], of which everything stays but torch_dtype and quantization_config (and
 * compression_config, its older name), which say what checkpoint_save has written. */
st_result checkpoint_config_adapt(char **text, const char *from, size_t length, const char *label, dsv3_type type,
                                  st_error *error);
/* Reads path if its name ends in .json, else path/config.json, as it stands. The caller releases *text with ST_FREE. */
st_result checkpoint_config_read(char **text, size_t *length, const char *path, st_error *error);
/* Writes directory/config.json. */
st_result checkpoint_config_write(const char *directory, const char *text, st_error *error);

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
__attribute__((__format__(__printf__, 3, 4)))
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
    case DSV3_ERR_NAN:
    case DSV3_ERR_DAMAGED: return ST_ERR_FORMAT;
    case DSV3_ERR_ARG:
    case DSV3_ERR_MEMORY:
    case DSV3_ERR_ALIGN:
    case DSV3_ERR_TOKEN:
    case DSV3_ERR_POSITION:
    case DSV3_ERR_FULL:
    case DSV3_ERR_ABORTED: return ST_ERR_ARG;
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
    int blocks; /* as in checkpoint */
    checkpoint *c; /* gets the tokens that end a text; or NULL */
} checkpointi_reader;

static void checkpointi_bad(checkpointi_reader *r, st_result code, const char *key, const char *why) {
    if (r->result != ST_OK) return;
    r->result = checkpointi_fail(r->error, code, "%.300s: %s: %s", r->label, key, why);
}

/* The same, with what is there: value is its token. */
static void checkpointi_found(checkpointi_reader *r, st_result code, const char *key, size_t value, const char *why) {
    const json_token *t = &r->doc.token[value];
    size_t length = t->end - t->start;
    char text[160];
    snprintf(text, sizeof text, "%.100s, found '%.*s'", why, (int)(length < 40 ? length : 40),
             r->doc.text + t->start);
    checkpointi_bad(r, code, key, text);
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
        checkpointi_found(r, ST_ERR_LIMIT, key, value, "is beyond any limit");
    } else if (found != JSON_OK) {
        checkpointi_found(r, ST_ERR_FORMAT, key, value, "must be an integer");
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
        checkpointi_found(r, ST_ERR_FORMAT, key, value, "must be true or false");
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
        checkpointi_found(r, ST_ERR_LIMIT, key, value, "is beyond any limit");
    } else if (found != JSON_OK) {
        checkpointi_found(r, ST_ERR_FORMAT, key, value, "must be a number");
    } else {
        *out = (float)number;
    }
}

/* The string at value is none of `names`. */
static void checkpointi_not_listed(checkpointi_reader *r, const char *key, size_t value, const char *const *names) {
    const json_token *t = &r->doc.token[value];
    char why[256];
    size_t n = (size_t)snprintf(why, sizeof why, "expected %s", names[0]), length = t->end - t->start;
    for (int i = 1; names[i] != NULL && n < sizeof why; i++) {
        n += (size_t)snprintf(why + n, sizeof why - n, "%s%s", names[i + 1] != NULL ? ", " : " or ", names[i]);
    }
    if (n < sizeof why) {
        snprintf(why + n, sizeof why - n, ", found '%.*s'", (int)(length < 48 ? length : 48), r->doc.text + t->start);
    }
    checkpointi_bad(r, ST_ERR_UNSUPPORTED, key, why);
}

/* Which of `names` (ended by NULL) is the string under key? -1 when there is no value. */
static int checkpointi_name(checkpointi_reader *r, size_t object, const char *key, checkpointi_need need,
                            const char *const *names) {
    size_t value;
    if (!checkpointi_value(r, object, key, need, &value)) return -1;
    if (r->doc.token[value].type != JSON_STRING) {
        checkpointi_found(r, ST_ERR_FORMAT, key, value, "must be a string");
        return -1;
    }
    for (int i = 0; names[i] != NULL; i++) {
        if (json_equal(&r->doc, value, names[i])) return i;
    }
    checkpointi_not_listed(r, key, value, names);
    return -1;
}

/* ---- The fields, by theme */

static void checkpointi_sizes(checkpointi_reader *r, dsv3_config *c) {
    checkpointi_int(r, 0, "vocab_size", CHECKPOINTI_REQUIRED, &c->vocab_size);
    checkpointi_int(r, 0, "hidden_size", CHECKPOINTI_REQUIRED, &c->hidden_size);
    checkpointi_int(r, 0, "intermediate_size", CHECKPOINTI_REQUIRED, &c->intermediate_size);
    checkpointi_int(r, 0, "num_hidden_layers", CHECKPOINTI_REQUIRED, &c->num_hidden_layers);
    checkpointi_int(r, 0, "num_attention_heads", CHECKPOINTI_REQUIRED, &c->num_attention_heads);
    checkpointi_int(r, 0, "q_lora_rank", CHECKPOINTI_OPTIONAL, &c->q_lora_rank);
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

static void checkpointi_family(checkpointi_reader *r, dsv3_config *c) {
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
    c->gate_scaling = model == 2 ? DSV3_SCALE_UNLESS_NORMED : DSV3_SCALE_ALWAYS;
}

/* Of a model without experts, or one whose layers before the first with experts are all it has: modules, too. */
static void checkpointi_dense(dsv3_config *c, int no_experts) {
    if (c->num_hidden_layers < 1 || c->num_hidden_layers > DSV3_MAX_LAYERS) return;
    if (!no_experts && c->first_k_dense_replace <= c->num_hidden_layers) return;
    if (!no_experts && (int64_t)c->first_k_dense_replace - c->num_hidden_layers < c->num_nextn_predict_layers) return;
    c->first_k_dense_replace = c->num_hidden_layers;
    if (c->num_nextn_predict_layers > 0) c->moe_layer_freq = DSV3_MAX_LAYERS; /* which no number of a module is */
    if (!no_experts) return;
    c->n_routed_experts = c->n_shared_experts = c->num_experts_per_tok = 0;
    c->n_group = c->topk_group = 1;
}

static void checkpointi_experts(checkpointi_reader *r, dsv3_config *c) {
    size_t value;
    int none = r->result == ST_OK && json_find(&r->doc, 0, "n_routed_experts", &value) == JSON_OK &&
               r->doc.token[value].type == JSON_NULL;
    checkpointi_need must = none ? CHECKPOINTI_OPTIONAL : CHECKPOINTI_REQUIRED;
    checkpointi_need may = none ? CHECKPOINTI_OPTIONAL : CHECKPOINTI_NULLABLE;
    checkpointi_int(r, 0, "moe_intermediate_size", must, &c->moe_intermediate_size);
    checkpointi_int(r, 0, "n_routed_experts", must, &c->n_routed_experts);
    checkpointi_int(r, 0, "n_shared_experts", may, &c->n_shared_experts);
    checkpointi_int(r, 0, "num_experts_per_tok", must, &c->num_experts_per_tok);
    checkpointi_int(r, 0, "n_group", may, &c->n_group);
    checkpointi_int(r, 0, "topk_group", may, &c->topk_group);
    checkpointi_int(r, 0, "first_k_dense_replace", must, &c->first_k_dense_replace);
    checkpointi_int(r, 0, "moe_layer_freq", CHECKPOINTI_OPTIONAL, &c->moe_layer_freq);
    checkpointi_bool(r, 0, "norm_topk_prob", must, &c->norm_topk_prob);
    checkpointi_float(r, 0, "routed_scaling_factor", must, &c->routed_scaling_factor);
    checkpointi_bool(r, 0, "seq_aux", CHECKPOINTI_OPTIONAL, &c->seq_aux);
    checkpointi_float(r, 0, "aux_loss_alpha", CHECKPOINTI_OPTIONAL, &c->aux_loss_alpha);
    checkpointi_dense(c, none);
}

/* A factor that leaves the numbers as they are. */
static void checkpointi_neutral(checkpointi_reader *r, size_t object, const char *key, float neutral) {
    float x = neutral;
    size_t value;
    if (!checkpointi_value(r, object, key, CHECKPOINTI_OPTIONAL, &value)) return;
    checkpointi_float(r, object, key, CHECKPOINTI_REQUIRED, &x);
    if (x < neutral || x > neutral) {
        checkpointi_found(r, ST_ERR_UNSUPPORTED, key, value,
                          neutral > 0 ? "must be 1 or absent" : "must be 0 or absent");
    }
}

/* The object that says what RoPE is, under one of the two names that exist for it, or 0; an empty one is none. */
static size_t checkpointi_rope_object(checkpointi_reader *r) {
    static const char keys[2][16] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++) {
        size_t object;
        if (!checkpointi_value(r, 0, keys[i], CHECKPOINTI_OPTIONAL, &object)) continue;
        if (r->doc.token[object].type != JSON_OBJECT) {
            checkpointi_bad(r, ST_ERR_FORMAT, keys[i], "must be an object or null");
        } else if (r->doc.token[object].size > 0) {
            return object;
        }
    }
    return 0;
}

/* Every field that is there must be one whose meaning is known. */
static void checkpointi_rope_fields(checkpointi_reader *r, size_t object) {
    static const char known[14][36] = {"type",
                                       "rope_type",
                                       "rope_theta",
                                       "factor",
                                       "original_max_position_embeddings",
                                       "beta_fast",
                                       "beta_slow",
                                       "mscale",
                                       "mscale_all_dim",
                                       "attention_factor",
                                       "truncate",
                                       "partial_rotary_factor",
                                       "llama_4_scaling_beta",
                                       "finetuned"};
    const json_token *token = r->doc.token;
    for (size_t i = object + 1; i < token[object].next; i = token[i + 1].next) {
        size_t k = 0, length = token[i].end - token[i].start;
        char name[64];
        while (k < 14 && !json_equal(&r->doc, i, known[k])) k++;
        if (k < 14 || token[i + 1].type == JSON_NULL) continue;
        snprintf(name, sizeof name, "%.*s", (int)(length < 60 ? length : 60), r->doc.text + token[i].start);
        checkpointi_bad(r, ST_ERR_UNSUPPORTED, name, "is a field of RoPE that is not known here");
    }
    checkpointi_neutral(r, object, "partial_rotary_factor", 1.0f);
    checkpointi_neutral(r, object, "llama_4_scaling_beta", 0.0f);
}

/* In the object, or outside. Of two objects transformers forgets the second with all that is in it, and takes 10000
 * when rope_theta is nowhere else. */
static void checkpointi_rope_theta(checkpointi_reader *r, size_t object, float *theta) {
    size_t other, unused;
    if (object > 0 && checkpointi_value(r, object, "rope_theta", CHECKPOINTI_OPTIONAL, &unused)) {
        checkpointi_float(r, object, "rope_theta", CHECKPOINTI_REQUIRED, theta);
    } else if (object > 0 && !checkpointi_value(r, 0, "rope_theta", CHECKPOINTI_OPTIONAL, &unused) &&
               checkpointi_value(r, 0, "rope_parameters", CHECKPOINTI_OPTIONAL, &other) && other != object &&
               r->doc.token[other].type == JSON_OBJECT) {
        checkpointi_float(r, other, "rope_theta", CHECKPOINTI_REQUIRED, theta);
        if (*theta < 10000.0f || *theta > 10000.0f) {
            checkpointi_bad(r, ST_ERR_UNSUPPORTED, "rope_theta",
                            "is only in rope_parameters, which rope_scaling replaces: expected it in rope_scaling");
        }
    } else {
        checkpointi_float(r, 0, "rope_theta", CHECKPOINTI_REQUIRED, theta);
    }
}

/* 1: YaRN. Without a type, and without a factor, the object only carries rope_theta. */
static int checkpointi_rope_type(checkpointi_reader *r, size_t object) {
    static const char types[2][8] = {"default", "yarn"};
    const char *type_names[] = {types[0], types[1], NULL};
    size_t unused;
    if (checkpointi_value(r, object, "rope_type", CHECKPOINTI_OPTIONAL, &unused)) {
        return checkpointi_name(r, object, "rope_type", CHECKPOINTI_REQUIRED, type_names);
    }
    if (json_find(&r->doc, object, "type", &unused) != JSON_OK &&
        json_find(&r->doc, object, "factor", &unused) != JSON_OK) {
        return 0;
    }
    return checkpointi_name(r, object, "type", CHECKPOINTI_REQUIRED, type_names);
}

static void checkpointi_yarn(checkpointi_reader *r, size_t object, dsv3_config *c) {
    dsv3_rope_scaling *s = &c->rope_scaling;
    float factor, implied;
    size_t unused;
    s->type = DSV3_ROPE_YARN;
    s->mscale_all_dim = 0.0f;
    checkpointi_float(r, object, "factor", CHECKPOINTI_REQUIRED, &s->factor);
    checkpointi_int(r, object, "original_max_position_embeddings", CHECKPOINTI_REQUIRED,
                    &s->original_max_position_embeddings);
    checkpointi_float(r, object, "beta_fast", CHECKPOINTI_OPTIONAL, &s->beta_fast);
    checkpointi_float(r, object, "beta_slow", CHECKPOINTI_OPTIONAL, &s->beta_slow);
    checkpointi_float(r, object, "mscale", CHECKPOINTI_OPTIONAL, &s->mscale);
    checkpointi_float(r, object, "mscale_all_dim", CHECKPOINTI_OPTIONAL, &s->mscale_all_dim);
    checkpointi_bool(r, object, "truncate", CHECKPOINTI_OPTIONAL, &s->truncate);
    if (!checkpointi_value(r, object, "attention_factor", CHECKPOINTI_OPTIONAL, &unused)) return;
    factor = implied = dsv3_rope_factor(c);
    checkpointi_float(r, object, "attention_factor", CHECKPOINTI_REQUIRED, &factor);
    if (!(factor >= implied * 0.99999f && factor <= implied * 1.00001f)) {
        char why[96];
        snprintf(why, sizeof why, "expected %.7g, which the other fields imply, found %.7g", (double)implied,
                 (double)factor);
        checkpointi_bad(r, ST_ERR_UNSUPPORTED, "attention_factor", why);
    }
}

static void checkpointi_rope(checkpointi_reader *r, dsv3_config *c) {
    size_t object = checkpointi_rope_object(r), unused;
    int type;
    checkpointi_rope_theta(r, object, &c->rope_theta);
    checkpointi_neutral(r, 0, "partial_rotary_factor", 1.0f);
    if (checkpointi_value(r, 0, "llama_4_scaling", CHECKPOINTI_OPTIONAL, &unused)) {
        checkpointi_bad(r, ST_ERR_UNSUPPORTED, "llama_4_scaling", "is not part of this architecture's RoPE");
    }
    if (object == 0 || r->result != ST_OK) return;
    type = checkpointi_rope_type(r, object);
    checkpointi_rope_fields(r, object);
    if (type == 1) checkpointi_yarn(r, object, c);
}

/* One id or a list of them, of which the first goes to *out. end: they end a text. */
static void checkpointi_token(checkpointi_reader *r, const char *key, int32_t V, int end, int32_t *out) {
    size_t value, n = 1, known;
    checkpoint *c = end ? r->c : NULL;
    if (!checkpointi_value(r, 0, key, CHECKPOINTI_OPTIONAL, &value)) return;
    if (r->doc.token[value].type == JSON_ARRAY) n = r->doc.token[value++].size;
    for (size_t i = 0; i < n && r->result == ST_OK; i++) {
        int32_t id = -1;
        checkpointi_int_at(r, key, value + i, &id);
        if (r->result == ST_OK && id < 0) checkpointi_found(r, ST_ERR_ARG, key, value + i, "must not be negative");
        if (r->result == ST_OK && V > 0 && id >= V) {
            char why[64];
            snprintf(why, sizeof why, "is outside the vocabulary: expected below %ld", (long)V);
            checkpointi_found(r, ST_ERR_ARG, key, value + i, why);
        }
        if (i == 0) *out = id;
        if (c == NULL || r->result != ST_OK) continue;
        for (known = 0; known < c->n_eos && c->eos[known] != id; known++) {
        }
        if (known == CHECKPOINT_MAX_EOS) checkpointi_bad(r, ST_ERR_LIMIT, key, "has more ids than this program keeps");
        if (known == c->n_eos && known < CHECKPOINT_MAX_EOS) c->eos[c->n_eos++] = id;
    }
}

/* The type of blocks that the object says. */
static int checkpointi_block_format(checkpointi_reader *r, size_t object) {
    static const char words[2][5] = {"q8_0", "q4_0"};
    const char *formats[] = {words[0], words[1], NULL};
    int32_t block = DSV3_QBLOCK;
    int format = checkpointi_name(r, object, "format", CHECKPOINTI_REQUIRED, formats);
    checkpointi_int(r, object, "block", CHECKPOINTI_REQUIRED, &block);
    if (block != DSV3_QBLOCK) checkpointi_bad(r, ST_ERR_UNSUPPORTED, "block", "must be 32");
    return format < 0 ? -1 : format == 0 ? DSV3_Q8_0 : DSV3_Q4_0;
}

/* quantization_config: what cannot be honoured is refused. */
static void checkpointi_quantised(checkpointi_reader *r) {
    static const char words[3][7] = {"fp8", "blocks", "e4m3"};
    const char *methods[] = {words[0], words[1], NULL}, *e4m3[] = {words[2], NULL};
    size_t quantisation, block;
    if (!checkpointi_value(r, 0, "quantization_config", CHECKPOINTI_OPTIONAL, &quantisation)) return;
    if (r->doc.token[quantisation].type != JSON_OBJECT) {
        checkpointi_bad(r, ST_ERR_FORMAT, "quantization_config", "must be an object or null");
        return;
    }
    if (checkpointi_name(r, quantisation, "quant_method", CHECKPOINTI_OPTIONAL, methods) == 1) {
        r->blocks = checkpointi_block_format(r, quantisation);
        return;
    }
    checkpointi_name(r, quantisation, "fmt", CHECKPOINTI_OPTIONAL, e4m3);
    if (!checkpointi_value(r, quantisation, "weight_block_size", CHECKPOINTI_OPTIONAL, &block)) return;
    if (r->doc.token[block].type == JSON_ARRAY && r->doc.token[block].size == 2) {
        int64_t rows = 0, cols = 0;
        json_result first = json_int(&r->doc, block + 1, &rows), second = json_int(&r->doc, block + 2, &cols);
        if (first == JSON_OK && second == JSON_OK && rows == DSV3_BLOCK && cols == DSV3_BLOCK) return;
    }
    checkpointi_found(r, ST_ERR_UNSUPPORTED, "weight_block_size", block, "must be [128, 128]");
}

/* Models that see or hear have their language model inside. */
static void checkpointi_wrapped(checkpointi_reader *r) {
    static const char keys[3][16] = {"text_config", "language_config", "llm_config"};
    size_t value;
    for (int i = 0; i < 3 && json_find(&r->doc, 0, "hidden_size", &value) != JSON_OK; i++) {
        if (json_find(&r->doc, 0, keys[i], &value) != JSON_OK || r->doc.token[value].type != JSON_OBJECT) continue;
        checkpointi_bad(r, ST_ERR_UNSUPPORTED, keys[i],
                        "this is a wrapper with the model inside; expected the model's own config.json");
    }
}

static st_result checkpointi_config_read(checkpointi_reader *r, dsv3_config *config) {
    static const char silu[] = "silu";
    const char *activations[] = {silu, NULL};
    dsv3_error why;
    char text[256];
    dsv3_config c = dsv3_config_default();
    if (r->doc.token[0].type != JSON_OBJECT) {
        return checkpointi_fail(r->error, ST_ERR_FORMAT, "%.300s: is not a JSON object", r->label);
    }
    if (config == NULL && r->c != NULL) { /* a generation_config.json */
        int32_t *first = &r->c->config.eos_token_id, id = -1;
        checkpointi_token(r, "eos_token_id", r->c->config.vocab_size, 1, *first < 0 ? first : &id);
        return r->result;
    }
    if (config == NULL) {
        checkpointi_quantised(r);
        return r->result;
    }
    checkpointi_wrapped(r);
    checkpointi_sizes(r, &c);
    checkpointi_family(r, &c);
    checkpointi_experts(r, &c);
    checkpointi_rope(r, &c);
    checkpointi_token(r, "bos_token_id", c.vocab_size, 0, &c.bos_token_id);
    checkpointi_token(r, "eos_token_id", c.vocab_size, 1, &c.eos_token_id);
    checkpointi_name(r, 0, "hidden_act", CHECKPOINTI_OPTIONAL, activations);
    checkpointi_quantised(r);
    if (r->result != ST_OK) return r->result;
    if (dsv3_config_check(&c, &why) != DSV3_OK) {
        return checkpointi_fail(r->error, checkpointi_from_dsv3(why.code), "%.300s: %s", r->label,
                                dsv3_error_text(&why, text, sizeof text));
    }
    *config = c;
    return ST_OK;
}

/* config may be NULL, to learn only what is in blocks, or, of a generation_config.json, what c wants to know. c may be
 * NULL. */
static st_result checkpointi_parse(dsv3_config *config, int *blocks, checkpoint *c, const char *text, size_t length,
                                   const char *label, st_error *error) {
    checkpointi_reader r;
    json_token *tokens;
    size_t count = 0, at = 0;
    json_result parsed = json_parse(text, length, NULL, 0, &count, &at);
    st_result result;
    memset(&r, 0, sizeof r);
    r.label = label;
    r.error = error;
    r.blocks = -1;
    r.c = c;
    if (error != NULL) memset(error, 0, sizeof *error);
    if (parsed != JSON_OK && sti_stranger((const unsigned char *)text, length) != NULL) {
        return checkpointi_fail(error, ST_ERR_FORMAT, "%.300s: %s", label,
                                sti_stranger((const unsigned char *)text, length));
    }
    if (parsed != JSON_OK) {
        return checkpointi_fail(error, checkpointi_from_json(parsed), "%.300s: %s at byte %lu", label,
                                json_result_string(parsed), (unsigned long)at);
    }
    if (count > SIZE_MAX / sizeof *tokens || length > SIZE_MAX / 4)
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
        *blocks = r.blocks;
    }
    ST_FREE(tokens);
    return result;
}

st_result checkpoint_config_parse(dsv3_config *config, const char *text, size_t length, const char *label,
                                  st_error *error) {
    int blocks;
    return checkpointi_parse(config, &blocks, NULL, text, length, label, error);
}

/* ---- Files */

#define CHECKPOINTI_MAX_CONFIG 1048576 /* bytes of a config.json */

/* Reads a whole config.json, which must be a plain file: a pipe would be waited for. */
static st_result checkpointi_config_load(char **out, size_t *length, const char *path, st_error *error) {
    sti_source source;
    char *text = NULL;
    st_result result;
    *out = NULL;
    result = sti_source_open(&source, path, error);
    if (result == ST_ERR_MISSING) {
        return checkpointi_fail(error, result, "%.300s: does not exist; expected a checkpoint's directory", path);
    }
    if (result == ST_ERR_IO && errno == ENOTDIR) {
        return checkpointi_fail(error, result,
                                "%.300s: cannot be opened: expected a checkpoint's directory, found a file", path);
    }
    if (result != ST_OK) return result;
    if (source.length > CHECKPOINTI_MAX_CONFIG) {
        result = checkpointi_fail(error, ST_ERR_LIMIT, "%.300s: is larger than a config.json can be", path);
    } else if ((text = (char *)ST_MALLOC((size_t)source.length + 1)) == NULL) {
        result = checkpointi_fail(error, ST_ERR_NOMEM, "%.300s: out of memory", path);
    } else {
        *length = (size_t)source.length;
        result = sti_source_read(&source, text, *length, error);
    }
    sti_source_close(&source);
    if (result == ST_OK) {
        *out = text;
    } else {
        ST_FREE(text);
    }
    return result;
}

/* directory/name, or ST_ERR_LIMIT. */
static st_result checkpointi_path(char *path, size_t capacity, const char *directory, const char *name,
                                  st_error *error) {
    int written = snprintf(path, capacity, "%s/%s", directory, name);
    if ((size_t)written < capacity) return ST_OK; /* what is negative is not */
    return checkpointi_fail(error, ST_ERR_LIMIT, "%.100s...: the path is too long", directory);
}

/* path itself, or the config.json in it. */
static st_result checkpointi_config_path(char *inside, size_t capacity, const char *path, st_error *error) {
    size_t n = strlen(path);
    if (n < 5 || strcmp(path + n - 5, ".json") != 0)
        return checkpointi_path(inside, capacity, path, "config.json", error);
    if (n >= capacity) return checkpointi_fail(error, ST_ERR_LIMIT, "%.100s...: the path is too long", path);
    memcpy(inside, path, n + 1);
    return ST_OK;
}

st_result checkpoint_config_read(char **text, size_t *length, const char *path, st_error *error) {
    char inside[4096];
    st_result result = checkpointi_config_path(inside, sizeof inside, path, error);
    *text = NULL;
    return result == ST_OK ? checkpointi_config_load(text, length, inside, error) : result;
}

static st_result checkpointi_config_file(dsv3_config *config, int *blocks, checkpoint *c, const char *path,
                                         st_error *error) {
    char inside[4096], *text = NULL;
    size_t length = 0;
    st_result result = checkpointi_config_path(inside, sizeof inside, path, error);
    *blocks = -1;
    if (result == ST_OK) result = checkpointi_config_load(&text, &length, inside, error);
    if (result == ST_OK) result = checkpointi_parse(config, blocks, c, text, length, inside, error);
    ST_FREE(text);
    return result;
}

/* directory/generation_config.json, if there is one. */
static st_result checkpointi_generation(checkpoint *c, const char *directory, st_error *error) {
    char inside[4096];
    sti_source source;
    st_result result;
    int blocks;
    if (checkpointi_path(inside, sizeof inside, directory, "generation_config.json", error) != ST_OK) return ST_OK;
    result = sti_source_open(&source, inside, error);
    if (result != ST_OK) return result == ST_ERR_MISSING ? ST_OK : result;
    sti_source_close(&source);
    return checkpointi_config_file(NULL, &blocks, c, inside, error);
}

st_result checkpoint_config(dsv3_config *config, const char *path, st_error *error) {
    int blocks;
    return checkpointi_config_file(config, &blocks, NULL, path, error);
}

st_result checkpoint_blocks(int *blocks, const char *path, st_error *error) {
    return checkpointi_config_file(NULL, blocks, NULL, path, error);
}

int checkpoint_type(st_dtype dtype, int blocks) {
    switch (dtype) {
    case ST_U8: return blocks;
    case ST_F32: return DSV3_F32;
    case ST_F16: return DSV3_F16;
    case ST_BF16: return DSV3_BF16;
    case ST_F8_E4M3: return DSV3_F8_E4M3;
    default: return -1;
    }
}

dsv3_result checkpoint_find(void *user, const char *name, dsv3_tensor *tensor) {
    const checkpoint *c = (const checkpoint *)user;
    const st_tensor *t = st_find(&c->file, name);
    int type;
    if (t == NULL) return DSV3_ERR_MISSING;
    type = checkpoint_type(t->dtype, c->blocks);
    if (type < 0) return DSV3_ERR_UNSUPPORTED;
    tensor->data = t->data;
    tensor->scale = NULL;
    tensor->type = (dsv3_type)type;
    tensor->rank = t->rank;
    tensor->rows = t->rank == 2 ? (size_t)t->shape[0] : 1; /* st_open has checked that shapes fit size_t */
    tensor->cols = t->rank == 0 ? 1 : (size_t)t->shape[t->rank - 1];
    if (t->dtype == ST_U8) {
        size_t bytes = dsv3_type_bytes(tensor->type);
        if (t->rank != 2 || tensor->cols % bytes != 0 || tensor->cols / bytes > SIZE_MAX / DSV3_QBLOCK) {
            return DSV3_ERR_MISMATCH;
        }
        tensor->cols = tensor->cols / bytes * DSV3_QBLOCK;
    }
    return DSV3_OK;
}

/* Is every tensor of the main model there, and can it be weights? Asked before memory is taken, so that a config that
 * promises a giant costs nothing when the files do not keep the promise. */
static dsv3_result checkpointi_expect(void *user, const dsv3_tensor_info *info) {
    checkpoint *c = (checkpoint *)user;
    const st_tensor *t = st_find(&c->file, info->name);
    dsv3_tensor tensor;
    dsv3_result result = t == NULL && info->layer < c->config.num_hidden_layers ? DSV3_ERR_MISSING : DSV3_OK;
    if (t != NULL) result = checkpoint_find(c, info->name, &tensor);
    if (result != DSV3_OK) snprintf(c->wrong, sizeof c->wrong, "%s", info->name);
    return result;
}

static st_result checkpointi_unexpected(const checkpoint *c, dsv3_result why, const char *directory,
                                        st_error *error) {
    const st_tensor *t = st_find(&c->file, c->wrong);
    char inside[sizeof c->wrong + 16];
    snprintf(inside, sizeof inside, "language_model.%s", c->wrong);
    if (why == DSV3_ERR_MISSING && st_find(&c->file, inside) != NULL) {
        return checkpointi_fail(error, ST_ERR_MISSING,
                                "%.200s: %s: tensor missing; the model is inside of a wrapper, where it is %s",
                                directory, c->wrong, inside);
    }
    if (why == DSV3_ERR_UNSUPPORTED && t != NULL && t->dtype != ST_U8) {
        return checkpointi_fail(error, ST_ERR_UNSUPPORTED,
                                "%.300s: %s: expected the type F32, F16, BF16 or F8_E4M3, found %.40s", directory,
                                c->wrong, t->type);
    }
    if (why == DSV3_ERR_UNSUPPORTED) {
        return checkpointi_fail(error, ST_ERR_UNSUPPORTED,
                                "%.300s: %s: is U8, but config.json has no quantization_config of blocks", directory,
                                c->wrong);
    }
    if (why == DSV3_ERR_NAN) {
        return checkpointi_fail(error, ST_ERR_FORMAT, "%.300s: %s: has a scale that is not finite and positive",
                                directory, c->wrong);
    }
    if (why == DSV3_ERR_MISMATCH && t != NULL) {
        dsv3_type type = (dsv3_type)c->blocks;
        return checkpointi_fail(error, ST_ERR_MISMATCH,
                                "%.300s: %s: expected rank 2 and rows of whole %s blocks, %lu bytes each; found "
                                "rank %d and rows of %lu bytes",
                                directory, c->wrong, dsv3_type_name(type), (unsigned long)dsv3_type_bytes(type),
                                t->rank, t->rank == 0 ? 1ul : (unsigned long)t->shape[t->rank - 1]);
    }
    return checkpointi_fail(error, checkpointi_from_dsv3(why), "%.200s: %s: %s%s%s", directory, c->wrong,
                            dsv3_result_string(why), c->file.warning[0] != '\0' ? "; " : "", c->file.warning);
}

/* ---- What a file has and the model does not know */

typedef struct checkpointi_used {
    checkpoint *c;
    unsigned char *used; /* [tensors of the file] bool */
} checkpointi_used;

/* A scale that is not finite and positive is a mistake of whoever wrote it. */
static dsv3_result checkpointi_scales(checkpoint *c, const st_tensor *t) {
    for (size_t i = 0; i < t->bytes / sizeof(float); i++) {
        float x;
        memcpy(&x, (const unsigned char *)t->data + i * sizeof x, sizeof x);
        if (x > 0.0f && x <= 3.4028235e38f) continue;
        snprintf(c->wrong, sizeof c->wrong, "%s", t->name);
        return DSV3_ERR_NAN;
    }
    return DSV3_OK;
}

static dsv3_result checkpointi_use(void *user, const dsv3_tensor_info *info) {
    checkpointi_used *u = (checkpointi_used *)user;
    const st_file *file = &u->c->file;
    const st_tensor *t = st_find(file, info->name);
    char name[DSV3_MAX_NAME + 16];
    if (t == NULL) return DSV3_OK;
    u->used[t - file->tensor] = 1;
    if (t->dtype != ST_F8_E4M3) return DSV3_OK;
    snprintf(name, sizeof name, "%s_scale_inv", info->name);
    t = st_find(file, name);
    if (t == NULL) return DSV3_OK;
    u->used[t - file->tensor] = 1;
    return checkpointi_scales(u->c, t);
}

/* Old files keep RoPE's frequencies, and tied models a head: known, and not needed. */
static int checkpointi_superfluous(const checkpoint *c, const char *name) {
    static const char frequencies[] = ".rotary_emb.inv_freq";
    size_t n = strlen(name), m = sizeof frequencies - 1;
    if (n > m && strcmp(name + n - m, frequencies) == 0) return 1;
    return c->config.tie_word_embeddings && strcmp(name, "lm_head.weight") == 0;
}

/* Tensors that nothing uses: they may be another model's, or this one's under another name. */
static st_result checkpointi_leftover(checkpoint *c, const char *directory, st_error *error) {
    checkpointi_used u;
    dsv3_config config = c->config;
    dsv3_result walked;
    size_t count = c->file.count, n = 0;
    u.c = c;
    u.used = (unsigned char *)ST_MALLOC(count + 1);
    if (u.used == NULL) {
        return checkpointi_fail(error, ST_ERR_NOMEM, "%.300s: no memory for %lu marks", directory,
                                (unsigned long)count);
    }
    memset(u.used, 0, count + 1);
    config.num_nextn_predict_layers = c->model.n_mtp;
    walked = dsv3_model_tensors(&config, checkpointi_use, &u, NULL);
    for (size_t i = 0; i < count && walked == DSV3_OK; i++) {
        const char *name = c->file.tensor[i].name;
        if (u.used[i] || checkpointi_superfluous(c, name)) continue;
        if (c->leftover++ < 3) {
            n += (size_t)snprintf(c->leftover_names + n, sizeof c->leftover_names - n, "%s%.72s", n > 0 ? ", " : "",
                                  name);
        }
    }
    if (c->leftover > 3) snprintf(c->leftover_names + n, sizeof c->leftover_names - n, ", ...");
    ST_FREE(u.used);
    return walked == DSV3_OK ? ST_OK : checkpointi_unexpected(c, walked, directory, error);
}

static st_result checkpointi_bind(checkpoint *c, const char *directory, st_error *error) {
    dsv3_error why;
    size_t bytes = 0;
    dsv3_result result = dsv3_model_tensors(&c->config, checkpointi_expect, c, NULL);
    if (result != DSV3_OK) return checkpointi_unexpected(c, result, directory, error);
    (void)dsv3_model_size(&c->config, &bytes, NULL); /* what could be wrong, dsv3_model_bind would say */
    c->tables = ST_MALLOC(bytes);
    if (c->tables == NULL) {
        return checkpointi_fail(error, ST_ERR_NOMEM, "%.300s: no memory for %lu bytes of tables", directory,
                                (unsigned long)bytes);
    }
    if (dsv3_model_bind(&c->config, &c->model, c->tables, bytes, checkpoint_find, c, &why) != DSV3_OK) {
        char text[256];
        dsv3_error_text(&why, text, sizeof text);
        return checkpointi_fail(error, checkpointi_from_dsv3(why.code), "%.200s: %s%s%s", directory, text,
                                why.code == DSV3_ERR_MISSING && c->file.warning[0] != '\0' ? "; " : "",
                                why.code == DSV3_ERR_MISSING ? c->file.warning : "");
    }
    return checkpointi_leftover(c, directory, error);
}

st_result checkpoint_open(checkpoint *c, const char *directory, st_error *error) {
    st_result result;
    memset(c, 0, sizeof *c);
    result = checkpointi_config_file(&c->config, &c->blocks, c, directory, error);
    if (result == ST_OK) result = checkpointi_generation(c, directory, error);
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

/* ---- Writing config.json */

/* Text that grows in a buffer of fixed size; too much of it only sets full. */
typedef struct checkpointi_text {
    char *at;
    size_t length, capacity;
    int full;
} checkpointi_text;

static void checkpointi_put(checkpointi_text *t, const char *bytes, size_t n) {
    if (n >= t->capacity - t->length) {
        t->full = 1;
        return;
    }
    memcpy(t->at + t->length, bytes, n);
    t->length += n;
    t->at[t->length] = '\0';
}

#ifdef __GNUC__
__attribute__((__format__(__printf__, 2, 3)))
#endif
static void
checkpointi_print(checkpointi_text *t, const char *format, ...) {
    char line[512];
    va_list list;
    int n;
    va_start(list, format);
    n = vsnprintf(line, sizeof line, format, list);
    va_end(list);
    if ((size_t)n >= sizeof line) { /* so is what is negative */
        t->full = 1;
    } else {
        checkpointi_put(t, line, (size_t)n);
    }
}

/* The shortest decimal number that is read back as x, with a point whatever the locale. */
static void checkpointi_put_float(checkpointi_text *t, const char *key, float x) {
    char text[64];
    size_t n = 0;
    int digits = 0;
    float back;
    do {
        snprintf(text, sizeof text, "%.*g", ++digits, (double)x);
        back = strtof(text, NULL);
    } while (digits < 9 && memcmp(&x, &back, sizeof x) != 0);
    for (const char *c = text; *c != '\0'; c++) {
        int digit = strchr("0123456789+-e", *c) != NULL;
        if (digit || n == 0 || text[n - 1] != '.') text[n++] = digit ? *c : '.';
    }
    text[n] = '\0';
    checkpointi_print(t, "  \"%s\": %s%s,\n", key, text, strpbrk(text, ".e") == NULL ? ".0" : "");
}

static void checkpointi_put_int(checkpointi_text *t, const char *key, int32_t x) {
    checkpointi_print(t, "  \"%s\": %ld,\n", key, (long)x);
}

/* What the file says when there is none. */
static void checkpointi_put_or_null(checkpointi_text *t, const char *key, int32_t x, int32_t none) {
    if (x == none) {
        checkpointi_print(t, "  \"%s\": null,\n", key);
    } else {
        checkpointi_put_int(t, key, x);
    }
}

static void checkpointi_put_bool(checkpointi_text *t, const char *key, int32_t x) {
    checkpointi_print(t, "  \"%s\": %s,\n", key, x ? "true" : "false");
}

static void checkpointi_put_sizes(checkpointi_text *t, const dsv3_config *c) {
    checkpointi_put_int(t, "vocab_size", c->vocab_size);
    checkpointi_put_int(t, "hidden_size", c->hidden_size);
    checkpointi_put_int(t, "intermediate_size", c->intermediate_size);
    checkpointi_put_int(t, "moe_intermediate_size", c->moe_intermediate_size);
    checkpointi_put_int(t, "num_hidden_layers", c->num_hidden_layers);
    checkpointi_put_int(t, "num_nextn_predict_layers", c->num_nextn_predict_layers);
    checkpointi_put_int(t, "num_attention_heads", c->num_attention_heads);
    checkpointi_put_int(t, "num_key_value_heads", c->num_attention_heads);
    checkpointi_put_or_null(t, "q_lora_rank", c->q_lora_rank, 0);
    checkpointi_put_int(t, "kv_lora_rank", c->kv_lora_rank);
    checkpointi_put_int(t, "qk_nope_head_dim", c->qk_nope_head_dim);
    checkpointi_put_int(t, "qk_rope_head_dim", c->qk_rope_head_dim);
    checkpointi_put_int(t, "v_head_dim", c->v_head_dim);
    checkpointi_put_int(t, "max_position_embeddings", c->max_position_embeddings);
    checkpointi_put_float(t, "rms_norm_eps", c->rms_norm_eps);
    checkpointi_put_bool(t, "tie_word_embeddings", c->tie_word_embeddings);
    checkpointi_put_bool(t, "attention_bias", c->attention_bias);
    checkpointi_put_float(t, "attention_dropout", 0.0f);
    checkpointi_print(t, "  \"hidden_act\": \"silu\",\n");
    checkpointi_put_or_null(t, "bos_token_id", c->bos_token_id, -1);
    checkpointi_put_or_null(t, "eos_token_id", c->eos_token_id, -1);
}

static void checkpointi_put_experts(checkpointi_text *t, const dsv3_config *c) {
    static const char methods[3][21] = {"noaux_tc", "group_limited_greedy", "greedy"};
    checkpointi_put_int(t, "n_routed_experts", c->n_routed_experts);
    checkpointi_put_int(t, "n_shared_experts", c->n_shared_experts);
    checkpointi_put_int(t, "num_experts_per_tok", c->num_experts_per_tok);
    checkpointi_put_int(t, "n_group", c->n_group);
    checkpointi_put_int(t, "topk_group", c->topk_group);
    checkpointi_put_int(t, "first_k_dense_replace", c->first_k_dense_replace);
    checkpointi_put_int(t, "moe_layer_freq", c->moe_layer_freq);
    checkpointi_print(t, "  \"scoring_func\": \"%s\",\n", c->scoring_func == DSV3_SOFTMAX ? "softmax" : "sigmoid");
    checkpointi_print(t, "  \"topk_method\": \"%s\",\n", methods[c->topk_method]);
    checkpointi_put_bool(t, "norm_topk_prob", c->norm_topk_prob);
    checkpointi_put_float(t, "routed_scaling_factor", c->routed_scaling_factor);
    checkpointi_put_bool(t, "seq_aux", c->seq_aux);
    checkpointi_put_float(t, "aux_loss_alpha", c->aux_loss_alpha);
}

static void checkpointi_put_rope(checkpointi_text *t, const dsv3_config *c) {
    const dsv3_rope_scaling *s = &c->rope_scaling;
    checkpointi_put_float(t, "rope_theta", c->rope_theta);
    checkpointi_put_bool(t, "rope_interleave", c->rope_interleave);
    if (s->type == DSV3_ROPE_NONE) {
        checkpointi_print(t, "  \"rope_scaling\": null,\n");
        return;
    }
    checkpointi_print(t, "  \"rope_scaling\": {\n");
    checkpointi_put_float(t, "beta_fast", s->beta_fast);
    checkpointi_put_float(t, "beta_slow", s->beta_slow);
    checkpointi_put_float(t, "factor", s->factor);
    checkpointi_put_float(t, "mscale", s->mscale);
    checkpointi_put_float(t, "mscale_all_dim", s->mscale_all_dim);
    checkpointi_put_int(t, "original_max_position_embeddings", s->original_max_position_embeddings);
    if (!s->truncate) checkpointi_put_bool(t, "truncate", 0);
    checkpointi_print(t, "  \"type\": \"yarn\"\n  },\n");
}

/* As in the published files: the type that is not quantised. */
static const char *checkpointi_torch_type(dsv3_type type) {
    return type == DSV3_F32 ? "\"float32\"" : type == DSV3_F16 ? "\"float16\"" : "\"bfloat16\"";
}

/* The quantization_config of a type, or NULL. */
static const char *checkpointi_quantisation(dsv3_type type) {
    if (type == DSV3_F8_E4M3) {
        return "{\n    \"activation_scheme\": \"dynamic\",\n    \"fmt\": \"e4m3\",\n    \"quant_method\": \"fp8\",\n"
               "    \"weight_block_size\": [128, 128]\n  }";
    }
    if (type == DSV3_Q8_0)
        return "{\n    \"block\": 32,\n    \"format\": \"q8_0\",\n    \"quant_method\": \"blocks\"\n  }";
    if (type == DSV3_Q4_0)
        return "{\n    \"block\": 32,\n    \"format\": \"q4_0\",\n    \"quant_method\": \"blocks\"\n  }";
    return NULL;
}

/* Room for n bytes of text. */
static st_result checkpointi_text_begin(checkpointi_text *t, size_t n, st_error *error) {
    memset(t, 0, sizeof *t);
    t->capacity = n;
    t->at = (char *)ST_MALLOC(n);
    if (t->at == NULL)
        return checkpointi_fail(error, ST_ERR_NOMEM, "config.json: no memory for %lu bytes", (unsigned long)n);
    t->at[0] = '\0';
    return ST_OK;
}

static st_result checkpointi_text_end(checkpointi_text *t, char **text, st_error *error) {
    if (!t->full) {
        *text = t->at;
        return ST_OK;
    }
    ST_FREE(t->at);
    return checkpointi_fail(error, ST_ERR_LIMIT, "config.json: is too long");
}

/* Which model_type has this routing? Where it says whether weights are scaled, that counts. */
static int checkpointi_is_v2(const dsv3_config *c) {
    int says = c->norm_topk_prob && (c->routed_scaling_factor < 1.0f || c->routed_scaling_factor > 1.0f);
    return says ? c->gate_scaling == DSV3_SCALE_UNLESS_NORMED : c->topk_method != DSV3_NOAUX_TC;
}

st_result checkpoint_config_text(char **text, const dsv3_config *config, dsv3_type type, st_error *error) {
    const char *family = checkpointi_is_v2(config) ? "2" : "3";
    const char *quantisation = checkpointi_quantisation(type);
    checkpointi_text t;
    *text = NULL;
    if (checkpointi_text_begin(&t, 8192, error) != ST_OK) return ST_ERR_NOMEM;
    checkpointi_print(&t, "{\n  \"architectures\": [\"DeepseekV%sForCausalLM\"],\n", family);
    checkpointi_print(&t, "  \"model_type\": \"deepseek_v%s\",\n", family);
    checkpointi_put_sizes(&t, config);
    checkpointi_put_experts(&t, config);
    checkpointi_put_rope(&t, config);
    if (quantisation != NULL) checkpointi_print(&t, "  \"quantization_config\": %s,\n", quantisation);
    checkpointi_print(&t, "  \"torch_dtype\": %s\n}\n", checkpointi_torch_type(type));
    return checkpointi_text_end(&t, text, error);
}

/* The members of the old file one by one; values as they are written there. What it says of its own quantisation need
 * not be true of the new weights (modules that were left out, another format of the scales), whatever its kind. */
static void checkpointi_adapt(checkpointi_text *t, const json_document *doc, dsv3_type type) {
    const json_token *token = doc->token;
    const char *quantisation = checkpointi_quantisation(type);
    int had_type = 0;
    checkpointi_put(t, "{", 1);
    for (size_t i = 1; i < token[0].next; i = token[i + 1].next) {
        const json_token *key = &token[i], *value = &token[i + 1];
        size_t quote = value->type == JSON_STRING;
        int names_type = json_equal(doc, i, "torch_dtype") || json_equal(doc, i, "dtype");
        int is_quantisation = json_equal(doc, i, "quantization_config");
        if ((is_quantisation && quantisation == NULL) || json_equal(doc, i, "compression_config")) continue;
        checkpointi_put(t, t->length > 1 ? ",\n  \"" : "\n  \"", t->length > 1 ? 5 : 4);
        checkpointi_put(t, doc->text + key->start, key->end - key->start);
        checkpointi_put(t, "\": ", 3);
        had_type |= names_type;
        if (names_type) {
            checkpointi_put(t, checkpointi_torch_type(type), strlen(checkpointi_torch_type(type)));
        } else if (is_quantisation) {
            checkpointi_put(t, quantisation, strlen(quantisation));
            quantisation = NULL; /* there it is */
        } else {
            checkpointi_put(t, doc->text + value->start - quote, value->end - value->start + 2 * quote);
        }
    }
    if (!had_type) checkpointi_print(t, ",\n  \"torch_dtype\": %s", checkpointi_torch_type(type));
    if (quantisation != NULL) checkpointi_print(t, ",\n  \"quantization_config\": %s", quantisation);
    checkpointi_put(t, "\n}\n", 3);
}

st_result checkpoint_config_adapt(char **text, const char *from, size_t length, const char *label, dsv3_type type,
                                  st_error *error) {
    checkpointi_text t;
    json_document doc;
    json_token *tokens;
    dsv3_config config;
    size_t count = 0;
    int blocks = -1; /* of the old file */
    st_result result = checkpointi_parse(&config, &blocks, NULL, from, length, label, error); /* a usable object, then */
    *text = NULL;
    if (result != ST_OK) return result;
    (void)json_parse(from, length, NULL, 0, &count, NULL); /* as it has been just now */
    result = checkpointi_text_begin(&t, 2 * length + 1024, error);
    if (result != ST_OK) return result;
    tokens = (json_token *)ST_MALLOC(count * sizeof *tokens);
    if (tokens == NULL) {
        ST_FREE(t.at);
        return checkpointi_fail(error, ST_ERR_NOMEM, "%.300s: out of memory", label);
    }
    (void)json_parse(from, length, tokens, count, &count, NULL);
    doc.text = from;
    doc.length = length;
    doc.token = tokens;
    doc.count = count;
    checkpointi_adapt(&t, &doc, type);
    ST_FREE(tokens);
    return checkpointi_text_end(&t, text, error);
}

st_result checkpoint_config_write(const char *directory, const char *text, st_error *error) {
    char path[4096];
    st_result result = checkpointi_path(path, sizeof path, directory, "config.json", error);
    return result == ST_OK ? st_write_bytes(path, text, strlen(text), error) : result;
}

/* ---- Writing weights */

/* A tensor of the new file. */
typedef struct checkpointi_piece {
    dsv3_tensor from;
    dsv3_type to;
    int scales; /* bool: the scales of an FP8 tensor, not the tensor */
    char name[DSV3_MAX_NAME + 16];
} checkpointi_piece;

typedef struct checkpointi_save {
    const dsv3_config *config;
    dsv3_find find;
    void *user;
    dsv3_type type;
    st_error *error;
    st_tensor *tensors;
    checkpointi_piece *pieces; /* NULL: only count */
    size_t count, bytes;       /* bytes: of a file's element. Larger ones go first, so that all are aligned */
    size_t widest;             /* columns */
    dsv3_context context;
    float *rows;    /* [128, widest] */
    float *scale;   /* [widest / 128, rounded up] */
    uint16_t *code; /* [128, widest] in the new type */
} checkpointi_save;

static size_t checkpointi_blocks(size_t n) { return n / DSV3_BLOCK + (n % DSV3_BLOCK != 0); }

dsv3_type checkpoint_type_of(const dsv3_tensor_info *info, dsv3_type type) {
    int is_router = info->kind == DSV3_KIND_ROUTER;
    if (is_router && info->rank == 1) return DSV3_F32;
    if (type == DSV3_F8_E4M3) return info->quantised ? type : DSV3_BF16;
    if (dsv3_type_block(type) == 1) return type;
    return is_router || info->rank == 1 || info->cols % dsv3_type_block(type) != 0 ? DSV3_BF16 : type;
}

static st_dtype checkpointi_dtype(dsv3_type type) {
    switch (type) {
    case DSV3_F32: return ST_F32;
    case DSV3_F16: return ST_F16;
    case DSV3_BF16: return ST_BF16;
    case DSV3_F8_E4M3: return ST_F8_E4M3;
    case DSV3_Q8_0:
    case DSV3_Q4_0: return ST_U8;
    }
    return ST_U8;
}

static dsv3_result checkpointi_save_fail(checkpointi_save *s, const char *name, const char *why, dsv3_result code) {
    checkpointi_fail(s->error, checkpointi_from_dsv3(code), "%.200s: %s", name, why);
    return code;
}

/* The tensor, with its scales. data is NULL when it is missing, and may be. */
static dsv3_result checkpointi_save_find(checkpointi_save *s, const dsv3_tensor_info *info, dsv3_tensor *tensor) {
    char name[DSV3_MAX_NAME + 16];
    dsv3_tensor scale;
    dsv3_result result;
    memset(tensor, 0, sizeof *tensor);
    result = s->find(s->user, info->name, tensor);
    if (result == DSV3_ERR_MISSING && (info->optional || info->layer >= s->config->num_hidden_layers)) {
        tensor->data = NULL;
        return DSV3_OK;
    }
    if (result != DSV3_OK) return checkpointi_save_fail(s, info->name, dsv3_result_string(result), result);
    if (tensor->rank != info->rank || tensor->rows != info->rows || tensor->cols != info->cols) {
        return checkpointi_save_fail(s, info->name, "has the wrong shape", DSV3_ERR_MISMATCH);
    }
    if (dsv3_type_bytes(tensor->type) == 0 || tensor->cols % dsv3_type_block(tensor->type) != 0) {
        return checkpointi_save_fail(s, info->name, "has an unknown type or no whole blocks", DSV3_ERR_UNSUPPORTED);
    }
    if (tensor->type != DSV3_F8_E4M3 || tensor->scale != NULL) return DSV3_OK;
    snprintf(name, sizeof name, "%s_scale_inv", info->name);
    memset(&scale, 0, sizeof scale);
    result = s->find(s->user, name, &scale);
    if (result != DSV3_OK) return checkpointi_save_fail(s, name, dsv3_result_string(result), DSV3_ERR_UNSUPPORTED);
    if (scale.type != DSV3_F32 || scale.rows != checkpointi_blocks(tensor->rows) ||
        scale.cols != checkpointi_blocks(tensor->cols)) {
        return checkpointi_save_fail(s, name, "has the wrong type or shape", DSV3_ERR_MISMATCH);
    }
    tensor->scale = scale.data;
    return DSV3_OK;
}

static void checkpointi_save_add(checkpointi_save *s, const dsv3_tensor_info *info, const dsv3_tensor *from,
                                 int scales) {
    dsv3_type type = checkpoint_type_of(info, s->type);
    size_t i = s->count++, rows = scales ? checkpointi_blocks(info->rows) : info->rows;
    size_t cols = scales ? checkpointi_blocks(info->cols) : info->cols; /* of the file's elements */
    checkpointi_piece *piece;
    st_tensor *t;
    if (s->pieces == NULL) return;
    if (dsv3_type_block(type) > 1) cols = dsv3_row_bytes(type, cols);
    piece = &s->pieces[i];
    piece->from = *from;
    piece->to = type;
    piece->scales = scales;
    snprintf(piece->name, sizeof piece->name, "%s%s", info->name, scales ? "_scale_inv" : "");
    t = &s->tensors[i];
    memset(t, 0, sizeof *t);
    t->name = piece->name;
    t->dtype = scales ? ST_F32 : checkpointi_dtype(piece->to);
    t->rank = info->rank;
    t->shape[0] = info->rank == 2 ? rows : cols;
    if (info->rank == 2) t->shape[1] = cols;
    t->bytes = rows * cols * st_dtype_bytes(t->dtype);
}

static dsv3_result checkpointi_save_visit(void *user, const dsv3_tensor_info *info) {
    checkpointi_save *s = (checkpointi_save *)user;
    dsv3_type type = checkpoint_type_of(info, s->type);
    int scales = type == DSV3_F8_E4M3 && s->bytes == 4;
    dsv3_tensor tensor;
    dsv3_result result;
    if (st_dtype_bytes(checkpointi_dtype(type)) != s->bytes && !scales) return DSV3_OK;
    result = checkpointi_save_find(s, info, &tensor);
    if (result != DSV3_OK || tensor.data == NULL) return result;
    if (info->rows > SIZE_MAX / 4 / info->cols) {
        return checkpointi_save_fail(s, info->name, "is too large", DSV3_ERR_OVERFLOW);
    }
    if (info->cols > s->widest) s->widest = info->cols;
    checkpointi_save_add(s, info, &tensor, scales);
    return DSV3_OK;
}

/* Lists the tensors, or counts them. */
static dsv3_result checkpointi_save_walk(checkpointi_save *s) {
    dsv3_result result = DSV3_OK;
    s->count = 0;
    for (s->bytes = 4; s->bytes > 0 && result == DSV3_OK; s->bytes /= 2) {
        result = dsv3_model_tensors(s->config, checkpointi_save_visit, s, NULL);
    }
    return result;
}

/* Decodes rows [begin, begin + n) of a tensor, n <= 128, as embeddings; begin is a multiple of 128. */
static void checkpointi_decode(checkpointi_save *s, const dsv3_tensor *t, size_t begin, size_t n) {
    size_t blocks = checkpointi_blocks(t->cols);
    int32_t row[DSV3_BLOCK];
    dsv3_tensor part = *t;
    part.data = (const unsigned char *)t->data + begin * dsv3_row_bytes(t->type, t->cols);
    part.scale = NULL;
    part.rows = n;
    if (t->type == DSV3_F8_E4M3) {
        part.scale = (const unsigned char *)t->scale + begin / DSV3_BLOCK * blocks * sizeof(float);
    }
    for (size_t r = 0; r < n; r++) row[r] = (int32_t)r;
    dsv3_embed(&s->context, s->rows, row, &part, n, NULL);
}

/* 128 rows at a time: one row of scale blocks. */
static st_result checkpointi_save_rows(checkpointi_save *s, const checkpointi_piece *piece, size_t begin, size_t n,
                                       st_sink *sink) {
    size_t cols = piece->from.cols;
    checkpointi_decode(s, &piece->from, begin, n);
    if (piece->to == DSV3_F32) return st_put(sink, s->rows, n * cols * sizeof *s->rows);
    if (dsv3_quantize(piece->scales ? NULL : s->code, s->scale, s->rows, piece->to, n, cols, NULL) != DSV3_OK) {
        return ST_ERR_OVERFLOW; /* nothing else can have happened */
    }
    if (piece->scales) return st_put(sink, s->scale, checkpointi_blocks(cols) * sizeof *s->scale);
    return st_put(sink, s->code, n * dsv3_row_bytes(piece->to, cols));
}

static st_result checkpointi_save_tensor(void *user, size_t index, st_sink *sink, st_error *error) {
    checkpointi_save *s = (checkpointi_save *)user;
    const checkpointi_piece *piece = &s->pieces[index];
    const dsv3_tensor *from = &piece->from;
    st_result result = ST_OK;
    if (from->type == piece->to) {
        return st_put(sink, piece->scales ? from->scale : from->data, s->tensors[index].bytes);
    }
    for (size_t begin = 0; begin < from->rows && result == ST_OK; begin += DSV3_BLOCK) {
        size_t n = from->rows - begin < DSV3_BLOCK ? from->rows - begin : DSV3_BLOCK;
        result = checkpointi_save_rows(s, piece, begin, n, sink);
    }
    if (result == ST_ERR_OVERFLOW) {
        checkpointi_fail(error, result, "%.200s: has a value that %s cannot hold", piece->name,
                         dsv3_type_name(piece->to));
    }
    return result;
}

/* count x size bytes, or NULL. */
static void *checkpointi_memory(size_t count, size_t size, st_error *error) {
    void *p = count <= SIZE_MAX / size ? ST_MALLOC(count > 0 ? count * size : 1) : NULL;
    if (p == NULL) {
        checkpointi_fail(error, ST_ERR_NOMEM, "saving: no memory for %lu x %lu bytes", (unsigned long)count,
                         (unsigned long)size);
    }
    return p;
}

static st_result checkpointi_save_run(checkpointi_save *s, const char *path, st_error *error) {
    static const char *const pairs[] = {"format", "pt", NULL};
    size_t cells = s->widest <= SIZE_MAX / DSV3_BLOCK ? s->widest * DSV3_BLOCK : SIZE_MAX;
    s->tensors = (st_tensor *)checkpointi_memory(s->count, sizeof *s->tensors, error);
    s->pieces = (checkpointi_piece *)checkpointi_memory(s->count, sizeof *s->pieces, error);
    s->rows = (float *)checkpointi_memory(cells, sizeof *s->rows, error);
    s->code = (uint16_t *)checkpointi_memory(cells, sizeof *s->code, error);
    s->scale = (float *)checkpointi_memory(checkpointi_blocks(s->widest), sizeof *s->scale, error);
    if (s->tensors == NULL || s->pieces == NULL || s->rows == NULL || s->code == NULL || s->scale == NULL) {
        return ST_ERR_NOMEM;
    }
    if (checkpointi_save_walk(s) != DSV3_OK) return ST_ERR_ARG; /* it was another list a moment ago */
    return st_write_made(path, s->tensors, s->count, pairs, checkpointi_save_tensor, s, error);
}

st_result checkpoint_save(const char *directory, const dsv3_config *config, dsv3_find find, void *user,
                          dsv3_type type, st_error *error) {
    checkpointi_save s;
    char path[4096];
    dsv3_result walked;
    st_result result = checkpointi_path(path, sizeof path, directory, "model.safetensors", error);
    if (result != ST_OK) return result;
    memset(&s, 0, sizeof s);
    s.config = config;
    s.find = find;
    s.user = user;
    s.type = type;
    s.error = error;
    (void)dsv3_context_init(&s.context, DSV3_BACKEND_REFERENCE, 1, NULL);
    walked = checkpointi_save_walk(&s);
    result = walked == DSV3_OK ? checkpointi_save_run(&s, path, error) : checkpointi_from_dsv3(walked);
    ST_FREE(s.tensors);
    ST_FREE(s.pieces);
    ST_FREE(s.rows);
    ST_FREE(s.code);
    ST_FREE(s.scale);
    return result;
}

#endif /* CHECKPOINT_IMPLEMENTATION */
