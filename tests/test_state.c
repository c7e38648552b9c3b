/* test_state.c -- chapter 16 (save): caches, sequences and training runs as bytes, and back.
 *
 * A failure means that what was loaded does not go on as what was saved would have, bit for bit; that bytes which are cut,
 * altered, hostile or another model's are not refused, or that a refusal has left traces; or that the format is not what
 * the chapter's head says, so that files of other machines and versions would not load. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#define TAG 0x123456789ABCDEFu
#define HEADER 40 /* bytes before the config's fields */

/* ---- Bytes, and what the chapter's head says of them: written here once more */

typedef struct blob {
    unsigned char *data; /* exactly [bytes], at an odd address */
    size_t bytes;
} blob;

static blob blob_of(size_t bytes) {
    blob b;
    b.data = (unsigned char *)test_alloc(bytes + 1) + 1;
    b.bytes = bytes;
    memset(b.data, 0x5A, bytes);
    return b;
}

static void blob_free(blob b) { free(b.data - 1); }

static uint64_t word_at(const unsigned char *at) {
    uint64_t x = 0;
    for (int i = 7; i >= 0; i--) x = x << 8 | at[i];
    return x;
}

static void word_set(unsigned char *at, uint64_t x) {
    for (int i = 0; i < 8; i++) at[i] = (unsigned char)(x >> (8 * i));
}

static uint64_t checksum(const unsigned char *data, size_t bytes) {
    uint64_t sum = word_at((const unsigned char *)"dsv3save");
    for (size_t i = 0; i < bytes; i += 8) {
        sum = (sum ^ word_at(data + i)) * 0x9E3779B97F4A7C15u;
        sum ^= sum >> 32;
    }
    return sum;
}

/* A word is altered by someone who knows how to make the checksum fit. */
static void forge(blob b, size_t at, uint64_t x) {
    word_set(b.data + at, x);
    word_set(b.data + b.bytes - 8, checksum(b.data, b.bytes - 8));
}

static const char *const fields[] = {
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_nextn_predict_layers", "first_k_dense_replace", "moe_layer_freq", "num_attention_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob",
    "rope_scaling.type", "rope_scaling.original_max_position_embeddings", "rope_scaling.truncate", "rope_interleave",
    "tie_word_embeddings",
    "group_mask", "gate_scaling", "bias_form", "mtp_concat", "mtp_hidden", "routed_scaling_factor", "rms_norm_eps",
    "latent_norm_eps", "rope_theta", "rope_scaling.factor", "rope_scaling.beta_fast", "rope_scaling.beta_slow",
    "rope_scaling.mscale", "rope_scaling.mscale_all_dim"};
#define FIELDS (sizeof fields / sizeof fields[0])
#define FIRST_FLOAT 32
#define OBJECT (HEADER + 8 * FIELDS) /* where the object begins */

/* ---- Any of the three kinds, as one thing that is saved and loaded. memory: all that loading may write to. */

enum { CACHE, SEQUENCE, TRAINER };

typedef struct thing {
    int kind;
    const dsv3_model *model;
    dsv3_config config; /* a cache's */
    dsv3_cache cache;
    dsv3_sequence sequence;
    dsv3_trainer trainer;
    void *memory;
    size_t bytes;
    unsigned char *before; /* [bytes] a copy */
    dsv3_cache cache_before;
    dsv3_sequence sequence_before;
    dsv3_trainer trainer_before;
} thing;

static int junk = 0xA5; /* what memory is full of */

static thing *thing_of(int kind, const dsv3_model *model) {
    thing *t = (thing *)test_alloc(sizeof *t);
    memset(t, 0, sizeof *t);
    t->kind = kind;
    t->model = model;
    if (model != NULL) t->config = model->config;
    return t;
}

static thing *thing_cache(const dsv3_model *model, size_t capacity, dsv3_type type, int module) {
    thing *t = thing_of(CACHE, model);
    synth_demand(module ? dsv3_cache_mtp_size(&t->config, capacity, type, &t->bytes, NULL)
                        : dsv3_cache_size(&t->config, capacity, type, &t->bytes, NULL),
                 "cache", NULL);
    t->memory = synth_alloc(t->bytes);
    memset(t->memory, junk, t->bytes);
    synth_demand(module ? dsv3_cache_mtp_init(&t->config, &t->cache, capacity, type, t->memory, t->bytes, NULL)
                        : dsv3_cache_init(&t->config, &t->cache, capacity, type, t->memory, t->bytes, NULL),
                 "cache", NULL);
    return t;
}

static thing *thing_sequence(const dsv3_model *model, size_t capacity, dsv3_type type, size_t rows, size_t drafts) {
    thing *t = thing_of(SEQUENCE, model);
    synth_demand(dsv3_sequence_size(model, capacity, type, rows, drafts, &t->bytes, NULL), "sequence", NULL);
    t->memory = synth_alloc(t->bytes);
    memset(t->memory, junk, t->bytes);
    synth_demand(dsv3_sequence_init(model, &t->sequence, capacity, type, rows, drafts, t->memory, t->bytes, NULL),
                 "sequence", NULL);
    return t;
}

static void thing_free(thing *t) {
    synth_release(t->memory);
    free(t->before), free(t);
}

static blob thing_save(const thing *t) {
    size_t bytes = 0;
    blob b;
    dsv3_result result;
    switch (t->kind) {
    case CACHE: CHECK_EQ(dsv3_cache_save_size(&t->cache, &bytes, NULL), DSV3_OK); break;
    case SEQUENCE: CHECK_EQ(dsv3_sequence_save_size(&t->sequence, &bytes, NULL), DSV3_OK); break;
    default: CHECK_EQ(dsv3_trainer_save_size(&t->trainer, &bytes, NULL), DSV3_OK); break;
    }
    b = blob_of(bytes);
    switch (t->kind) {
    case CACHE: result = dsv3_cache_save(&t->config, &t->cache, TAG, b.data, bytes, NULL); break;
    case SEQUENCE: result = dsv3_sequence_save(t->model, &t->sequence, TAG, b.data, bytes, NULL); break;
    default: result = dsv3_trainer_save(&t->trainer, TAG, b.data, bytes, NULL); break;
    }
    CHECK_EQ(result, DSV3_OK);
    return b;
}

static dsv3_result thing_load(thing *t, blob b, uint64_t tag, dsv3_error *error) {
    switch (t->kind) {
    case CACHE: return dsv3_cache_load(&t->config, &t->cache, tag, b.data, b.bytes, error);
    case SEQUENCE: return dsv3_sequence_load(t->model, &t->sequence, tag, b.data, b.bytes, error);
    default: return dsv3_trainer_load(&t->trainer, tag, b.data, b.bytes, error);
    }
}

static void thing_note(thing *t) {
    if (t->before == NULL) t->before = (unsigned char *)test_alloc(t->bytes);
    memcpy(t->before, t->memory, t->bytes);
    t->cache_before = t->cache;
    t->sequence_before = t->sequence;
    t->trainer_before = t->trainer;
}

/* Is it as it was noted? The structs were copied as a whole, padding included, and are compared so. */
static int thing_untouched(const thing *t) {
    return memcmp(t->before, t->memory, t->bytes) == 0 && memcmp(&t->cache_before, &t->cache, sizeof t->cache) == 0 &&
           memcmp(&t->sequence_before, &t->sequence, sizeof t->sequence) == 0 &&
           memcmp(&t->trainer_before, &t->trainer, sizeof t->trainer) == 0;
}

static void thing_restore(thing *t) {
    memcpy(t->memory, t->before, t->bytes);
    t->cache = t->cache_before;
    t->sequence = t->sequence_before;
    t->trainer = t->trainer_before;
}

/* The load must fail with this code (OK: any code) and name, and change nothing. */
static int refused(thing *t, blob b, uint64_t tag, dsv3_result code, const char *name) {
    dsv3_error error;
    dsv3_result result;
    int good;
    memset(&error, 0, sizeof error);
    thing_note(t);
    result = thing_load(t, b, tag, &error);
    good = result != DSV3_OK && error.code == result && error.name[0] != '\0' && error.why != NULL;
    good = good && (code == DSV3_OK || result == code) && (name == NULL || strcmp(error.name, name) == 0);
    good = good && thing_untouched(t) && thing_load(t, b, tag, NULL) == result;
    if (!good) {
        char text[256];
        fprintf(stderr, "kind %d: %d, %s (wanted %d, %s)%s\n", t->kind, (int)result,
                dsv3_error_text(&error, text, sizeof text), (int)code, name != NULL ? name : "",
                thing_untouched(t) ? "" : ", and it has changed");
    }
    return good;
}

/* ---- Bytes that must be refused, for a thing of any kind whose bytes these are */

/* Cut anywhere, longer, and with any one byte altered. step: every so many of the bytes behind the fields. */
static void check_damage(thing *t, blob b, size_t step) {
    int cut = 1, altered = 1;
    blob more = blob_of(b.bytes + 8);
    for (size_t n = 0; n < b.bytes; n += n < OBJECT + 64 ? 1 : step) {
        blob less = blob_of(n);
        memcpy(less.data, b.data, n);
        cut = cut && refused(t, less, TAG, DSV3_ERR_DAMAGED, NULL);
        blob_free(less);
    }
    CHECK(cut);
    memcpy(more.data, b.data, b.bytes);
    CHECK(refused(t, more, TAG, DSV3_ERR_DAMAGED, "bytes"));
    for (more.bytes--; more.bytes > b.bytes; more.bytes--) { /* no whole words, and the header says so, too */
        word_set(more.data + 24, more.bytes);
        word_set(more.data + more.bytes - 8, checksum(more.data, b.bytes - 8));
        CHECK(refused(t, more, TAG, DSV3_ERR_DAMAGED, "data"));
    }
    blob_free(more);
    for (size_t i = 0; i < b.bytes; i += i < OBJECT + 64 || i + 80 > b.bytes ? 1 : step) {
        unsigned char was = b.data[i];
        b.data[i] = (unsigned char)(was ^ (1u << (i % 8)));
        altered = altered && refused(t, b, TAG, i / 8 == 1 ? DSV3_ERR_UNSUPPORTED : DSV3_ERR_DAMAGED, NULL);
        b.data[i] = was;
    }
    CHECK(altered);
}

/* Another model's: each field of the config, the tag, the kind. */
static void check_others(thing *t, blob b) {
    dsv3_error error;
    CHECK(refused(t, b, TAG + 1, DSV3_ERR_MISMATCH, "tag"));
    for (size_t i = 0; i < FIELDS; i++) {
        size_t at = HEADER + 8 * i;
        uint64_t was = word_at(b.data + at);
        forge(b, at, was + 1);
        CHECK(refused(t, b, TAG, DSV3_ERR_MISMATCH, fields[i]));
        (void)thing_load(t, b, TAG, &error);
        CHECK_EQ(error.numbers, i < FIRST_FLOAT ? DSV3_NUMBERS_RANGE : DSV3_NUMBERS_NONE);
        if (i < FIRST_FLOAT) CHECK_EQ(error.expected[0], was), CHECK_EQ(error.found[0], was + 1);
        CHECK(refused(t, b, TAG + 1, DSV3_ERR_MISMATCH, fields[i])); /* which says more than the tag */
        forge(b, at, was);
    }
    for (uint64_t kind = 0; kind < 5; kind++) {
        if ((int)kind == t->kind + 1) continue;
        forge(b, 16, kind);
        CHECK(refused(t, b, TAG, DSV3_ERR_MISMATCH, "kind"));
    }
    forge(b, 16, (uint64_t)t->kind + 1);
    forge(b, 8, 2);
    CHECK(refused(t, b, TAG, DSV3_ERR_UNSUPPORTED, "version"));
    forge(b, 8, 1);
    CHECK_EQ(thing_load(t, b, TAG, NULL), DSV3_OK);
}

/* Each of the first words of the object says what it should not, and the checksum fits. What is refused has changed
 * nothing; what is not must do no harm (AddressSanitizer watches): use is called with it. */
static void check_hostile(thing *t, blob b, size_t words, void (*use)(thing *t)) {
    static const uint64_t evil[] = {0,          1,          2,          64,         255,         0x7FFFFFFFu,
                                    0x80000000u, 0xFFFFFFFFu, 0x100000000u, UINT64_MAX / 8, UINT64_MAX / 2,
                                    UINT64_MAX / 2 + 1, UINT64_MAX - 7, UINT64_MAX};
    int good = 1;
    for (size_t at = OBJECT; at < b.bytes - 8 && at < OBJECT + 8 * words; at += 8) {
        uint64_t was = word_at(b.data + at);
        for (size_t i = 0; i < sizeof evil / sizeof evil[0]; i++) {
            forge(b, at, i % 2 ? evil[i] : was + evil[i]);
            thing_note(t);
            if (thing_load(t, b, TAG, NULL) == DSV3_OK) {
                if (use != NULL) use(t);
            } else {
                good = good && thing_untouched(t);
            }
            thing_restore(t);
        }
        forge(b, at, was);
    }
    CHECK(good);
    CHECK_EQ(thing_load(t, b, TAG, NULL), DSV3_OK);
}

/* ---- Caches */

static int same_caches(const dsv3_cache *a, const dsv3_cache *b) {
    size_t row = a->width * dsv3_type_bytes(a->type);
    int same = a->length == b->length && a->type == b->type && a->layers == b->layers && a->width == b->width;
    for (size_t l = 0; l < a->layers && same && a->length > 0; l++) {
        same = memcmp((const unsigned char *)a->data + l * a->capacity * row,
                      (const unsigned char *)b->data + l * b->capacity * row, a->length * row) == 0;
    }
    return same;
}

static void fill_cache(dsv3_cache *c, size_t length) {
    unsigned char *data = (unsigned char *)c->data;
    for (size_t i = 0; i < c->layers * c->capacity * c->width * dsv3_type_bytes(c->type); i++) {
        data[i] = (unsigned char)test_random();
    }
    c->length = length;
}

static void test_cache_lengths(synth *s, dsv3_type type, int module) {
    enum { N = 9 };
    thing *from = thing_cache(&s->model, N, type, module);
    size_t empty = 0;
    dsv3_error error;
    for (size_t n = 0; n <= N; n++) {
        thing *to = thing_cache(&s->model, n == 0 ? 1 : n + n % 3, type, module);
        blob b;
        fill_cache(&from->cache, n);
        b = thing_save(from);
        if (n == 0) empty = b.bytes;
        CHECK(b.bytes <= empty + from->cache.layers * (n * from->cache.width * dsv3_type_bytes(type) + 7));
        CHECK_EQ(thing_load(to, b, TAG, NULL), DSV3_OK);
        CHECK(same_caches(&from->cache, &to->cache));
        if (n > 1) {
            thing *less = thing_cache(&s->model, n - 1, type, module);
            thing *other = thing_cache(&s->model, n, type == DSV3_F32 ? DSV3_BF16 : DSV3_F32, module);
            thing *layers = thing_cache(&s->model, n, type, !module);
            CHECK(refused(less, b, TAG, DSV3_ERR_FULL, "length"));
            CHECK_EQ(thing_load(less, b, TAG, &error), DSV3_ERR_FULL);
            CHECK_EQ(error.found[0], n);
            CHECK(refused(other, b, TAG, DSV3_ERR_MISMATCH, "type"));
            CHECK(refused(layers, b, TAG, DSV3_ERR_MISMATCH, "layers"));
            thing_free(less), thing_free(other), thing_free(layers);
        }
        blob_free(b), thing_free(to);
    }
    thing_free(from);
}

/* The bytes themselves: what a file of another machine looks like. */
static void test_format(synth *s) {
    thing *t = thing_cache(&s->model, 4, DSV3_F32, 0);
    blob b;
    float x = 0;
    uint32_t bits;
    fill_cache(&t->cache, 2);
    b = thing_save(t);
    CHECK(memcmp(b.data, "dsv3save\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0", 24) == 0);
    CHECK_EQ(word_at(b.data + 24), b.bytes);
    CHECK(word_at(b.data + 32) == TAG);
    CHECK_EQ(word_at(b.data + HEADER), s->config.vocab_size);
    CHECK_EQ(word_at(b.data + HEADER + 8), s->config.hidden_size);
    CHECK_EQ(word_at(b.data + OBJECT), DSV3_F32);
    CHECK_EQ(word_at(b.data + OBJECT + 8), s->config.num_hidden_layers);
    CHECK_EQ(word_at(b.data + OBJECT + 16), t->cache.width);
    CHECK_EQ(word_at(b.data + OBJECT + 24), 2);
    bits = (uint32_t)word_at(b.data + OBJECT + 32);
    memcpy(&x, &bits, 4);
    CHECK(memcmp(&x, t->cache.data, 4) == 0);
    CHECK(word_at(b.data + b.bytes - 8) == checksum(b.data, b.bytes - 8));
    blob_free(b), thing_free(t);
}

static void test_cache_damage(synth *s, dsv3_type type) {
    thing *t = thing_cache(&s->model, 5, type, 0);
    blob b;
    fill_cache(&t->cache, 3);
    b = thing_save(t);
    check_damage(t, b, test_light() ? 37 : 1);
    check_others(t, b);
    check_hostile(t, b, 12, NULL);
    blob_free(b), thing_free(t);
}

static void test_cache_misuse(synth *s) {
    thing *t = thing_cache(&s->model, 5, DSV3_F32, 0);
    size_t bytes = 0;
    dsv3_config other = s->config;
    blob b;
    dsv3_error error;
    fill_cache(&t->cache, 3);
    b = thing_save(t);
    CHECK_EQ(dsv3_cache_save_size(NULL, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_save_size(&t->cache, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_save(&s->config, NULL, 0, b.data, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_save(NULL, &t->cache, 0, b.data, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_save(&s->config, &t->cache, 0, NULL, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_save(&s->config, &t->cache, 0, b.data, b.bytes - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_cache_load(&s->config, NULL, TAG, b.data, b.bytes, &error), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_load(NULL, &t->cache, TAG, b.data, b.bytes, &error), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_cache_load(&s->config, &t->cache, TAG, NULL, b.bytes, &error), DSV3_ERR_ARG);
    {
        thing giant = *t; /* of more bytes than can be counted: refused before one is looked at */
        giant.cache.length = giant.cache.capacity = SIZE_MAX / giant.cache.width;
        bytes = 7;
        CHECK_EQ(dsv3_cache_save_size(&giant.cache, &bytes, &error), DSV3_ERR_OVERFLOW);
        CHECK(bytes == 0 && strcmp(error.name, "bytes") == 0);
        CHECK_EQ(dsv3_cache_save(&s->config, &giant.cache, TAG, b.data, b.bytes, &error), DSV3_ERR_OVERFLOW);
    }
    other.kv_lora_rank += 4;
    CHECK_EQ(dsv3_cache_save(&other, &t->cache, 0, b.data, b.bytes, NULL), DSV3_ERR_MISMATCH);
    CHECK_EQ(dsv3_cache_load(&other, &t->cache, TAG, b.data, b.bytes, &error), DSV3_ERR_MISMATCH);
    other = s->config;
    other.num_hidden_layers++; /* as wide, and neither of that many layers nor a module's */
    CHECK_EQ(dsv3_cache_save(&other, &t->cache, TAG, b.data, b.bytes, &error), DSV3_ERR_MISMATCH);
    CHECK(strcmp(error.name, "cache") == 0);
    CHECK_EQ(dsv3_cache_load(&other, &t->cache, TAG, b.data, b.bytes, &error), DSV3_ERR_MISMATCH);
    CHECK(strcmp(error.name, "cache") == 0);
    other = s->config;
    other.rope_theta *= 2;
    CHECK_EQ(dsv3_cache_load(&other, &t->cache, TAG, b.data, b.bytes, &error), DSV3_ERR_MISMATCH);
    CHECK(strcmp(error.name, "rope_theta") == 0);
    CHECK_EQ(dsv3_cache_load(&s->config, &t->cache, TAG, b.data, b.bytes, &error), DSV3_OK);
    CHECK_EQ(error.code, DSV3_OK);
    blob_free(b), thing_free(t);
}

/* ---- Sequences */

typedef struct player {
    const dsv3_model *model;
    dsv3_context ctx;
    dsv3_workspace ws;
    void *ws_memory;
    float *logits;
} player;

static player player_open(const dsv3_model *model) {
    player p;
    size_t bytes;
    p.model = model;
    synth_demand(dsv3_context_init(&p.ctx, test_backend(), 1, NULL), "context", NULL);
    p.ctx.attention = DSV3_ATTENTION_ABSORBED;
    synth_demand(dsv3_workspace_size(&model->config, 16, 1, &bytes, NULL), "workspace", NULL);
    p.ws_memory = synth_alloc(bytes);
    synth_demand(dsv3_workspace_init(&model->config, &p.ws, 16, 1, p.ws_memory, bytes, NULL), "workspace", NULL);
    p.logits = (float *)test_alloc(16 * (size_t)model->config.vocab_size * sizeof *p.logits);
    return p;
}

static void player_close(player *p) { synth_release(p->ws_memory), free(p->logits); }

static dsv3_result play(player *p, dsv3_sequence *s) {
    return dsv3_generate_step(&p->ctx, p->logits, p->model, &s, 1, &p->ws, NULL);
}

/* Everything that can be seen of two sequences, but for their memory and its sizes. With other rows their modules may
 * read along at other times. */
static int same_sequences(const dsv3_sequence *a, const dsv3_sequence *b) {
    size_t n = a->max_drafts;
    int same = memcmp(&a->temperature, &b->temperature, sizeof(float)) == 0 &&
               memcmp(&a->top_p, &b->top_p, sizeof(float)) == 0 && a->rng.state == b->rng.state &&
               a->drafts == b->drafts && a->adaptive == b->adaptive &&
               memcmp(&a->draft_cost, &b->draft_cost, sizeof(float)) == 0 && a->stop == b->stop &&
               a->n_token == b->n_token && a->steps == b->steps && a->written == b->written &&
               a->n_modules == b->n_modules && n == b->max_drafts && a->pending == b->pending &&
               a->prompt_left == b->prompt_left && same_caches(&a->cache, &b->cache);
    if (!same) return 0;
    same = memcmp(a->token, b->token, a->n_token * sizeof *a->token) == 0;
    if (n > 0) {
        same = same && memcmp(a->drafted, b->drafted, n * sizeof *a->drafted) == 0 &&
               memcmp(a->accepted, b->accepted, n * sizeof *a->accepted) == 0 &&
               memcmp(a->own->rate, b->own->rate, n * sizeof *a->own->rate) == 0;
    }
    for (size_t k = 0; k < a->n_modules && a->rows == b->rows; k++) {
        same = same && same_caches(&a->modules[k], &b->modules[k]);
    }
    return same;
}

/* Both take this many steps, or until one has no room for all drafts: they need not have the same room. */
static int same_steps(player *p, dsv3_sequence *a, dsv3_sequence *b, int steps) {
    int same = same_sequences(a, b);
    for (int i = 0; i < steps && same; i++) {
        if (a->cache.length + a->max_drafts >= a->cache.capacity) return same;
        same = play(p, a) == DSV3_OK && play(p, b) == DSV3_OK;
        same = same && same_sequences(a, b);
    }
    return same;
}

typedef struct recipe {
    size_t rows, drafts, prompt;
    float temperature;
    dsv3_type type;
    int adaptive;
} recipe;

/* At every length of a text: saved, loaded into fresh memory of other sizes, and continued beside the original; rolled
 * back beside it, too, and continued. */
static void test_sequence_lengths(synth *s, recipe r) {
    enum { ROOM = 34 };
    player p = player_open(&s->model);
    thing *a = thing_sequence(&s->model, ROOM, r.type, r.rows, r.drafts), *twin;
    int32_t prompt[16], more[3] = {5, 1, 7};
    size_t room = ROOM, saves = 0;
    int good = 1, rolled = 1;
    synth_tokens(prompt, 16, s->config.vocab_size);
    a->sequence.temperature = r.temperature;
    a->sequence.top_p = 0.9f;
    a->sequence.adaptive = r.adaptive;
    a->sequence.rng.state = 77;
    junk = 0x3C;
    twin = thing_sequence(&s->model, ROOM, r.type, r.rows, r.drafts);
    junk = 0xA5;
    twin->sequence.temperature = r.temperature;
    twin->sequence.top_p = 0.9f;
    twin->sequence.adaptive = r.adaptive;
    twin->sequence.rng.state = 77;
    for (int step = 0; step < 60 && a->sequence.cache.length < room; step++) {
        if (a->sequence.prompt_left == 0) {
            size_t rows = step % 3 == 1 && a->sequence.pending ? r.rows + 3 : r.rows; /* as many steps */
            blob b = thing_save(a), again = thing_save(twin);
            thing *to = thing_sequence(&s->model, room + (size_t)step % 4, r.type, rows, r.drafts);
            thing *fork = thing_sequence(&s->model, room, r.type, r.rows, r.drafts);
            saves++;
            good = good && again.bytes == b.bytes && memcmp(again.data, b.data, b.bytes) == 0; /* no junk is saved */
            blob_free(again);
            CHECK_EQ(dsv3_sequence_copy(&fork->sequence, &a->sequence, NULL), DSV3_OK);
            good = good && thing_load(to, b, TAG, NULL) == DSV3_OK;
            if (!a->sequence.pending) {
                good = good && dsv3_sequence_append(&s->model, &to->sequence, more, 3, NULL) == DSV3_OK &&
                       dsv3_sequence_append(&s->model, &fork->sequence, more, 3, NULL) == DSV3_OK;
            }
            good = good && same_steps(&p, &fork->sequence, &to->sequence, 6);
            CHECK_EQ(dsv3_sequence_copy(&fork->sequence, &a->sequence, NULL), DSV3_OK);
            good = good && thing_load(to, b, TAG, NULL) == DSV3_OK;
            for (size_t back = 0; back < 4 && rows == r.rows; back++) {
                size_t length = dsv3_sequence_length(&fork->sequence), kept[2] = {0, 0};
                length = length > back * back ? length - back * back : 0;
                rolled = rolled && dsv3_sequence_truncate(&fork->sequence, length, &kept[0], NULL) == DSV3_OK;
                rolled = rolled && dsv3_sequence_truncate(&to->sequence, length, &kept[1], NULL) == DSV3_OK;
                rolled = rolled && kept[0] == kept[1];
                if (fork->sequence.cache.length + 4 > room) continue;
                rolled = rolled && dsv3_sequence_append(&s->model, &fork->sequence, more, 3, NULL) == DSV3_OK &&
                         dsv3_sequence_append(&s->model, &to->sequence, more, 3, NULL) == DSV3_OK;
                rolled = rolled && same_steps(&p, &fork->sequence, &to->sequence, 3);
            }
            blob_free(b), thing_free(to), thing_free(fork);
        }
        if (step == 0) CHECK_EQ(dsv3_sequence_append(&s->model, &a->sequence, prompt, r.prompt, NULL), DSV3_OK);
        if (step == 0) CHECK_EQ(dsv3_sequence_append(&s->model, &twin->sequence, prompt, r.prompt, NULL), DSV3_OK);
        if (step == 12) { /* far back: what the rings held is gone */
            size_t length = dsv3_sequence_length(&a->sequence) / 2, kept = 0;
            good = good && dsv3_sequence_truncate(&a->sequence, length, &kept, NULL) == DSV3_OK &&
                   dsv3_sequence_truncate(&twin->sequence, length, NULL, NULL) == DSV3_OK;
            continue;
        }
        if (!a->sequence.pending && a->sequence.prompt_left == 0) {
            good = good && dsv3_sequence_append(&s->model, &a->sequence, more, 3, NULL) == DSV3_OK &&
                   dsv3_sequence_append(&s->model, &twin->sequence, more, 3, NULL) == DSV3_OK;
        }
        good = good && play(&p, &a->sequence) == DSV3_OK && play(&p, &twin->sequence) == DSV3_OK;
    }
    CHECK(good);
    CHECK(rolled);
    CHECK(saves >= 4);
    thing_free(a), thing_free(twin);
    player_close(&p);
}

static synth *open_modules(int D) {
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, 23, 12, 16, 8, 2, 1);
    synth_attention(&c, 2, 8, 6, 4, 2, 5);
    synth_experts(&c, 4, 1, 2, 2, 1, 1.5f);
    c.num_nextn_predict_layers = D;
    return synth_open(&c, SYNTH_F32, 5);
}

static void test_sequences(void) {
    static const recipe recipes[] = {{4, 0, 7, 0, DSV3_F32, 0},     {4, 1, 7, 0.8f, DSV3_F32, 0},
                                     {3, 3, 10, 0, DSV3_BF16, 0},   {16, 2, 1, 0.9f, DSV3_F32, 1},
                                     {1, 5, 4, 1.2f, DSV3_BF16, 0}, {5, 0, 16, 1.0f, DSV3_BF16, 0},
                                     {2, 4, 2, 1.0f, DSV3_F32, 1}};
    for (int D = 0; D <= 3; D++) {
        synth *s = open_modules(D);
        for (size_t i = 0; i < sizeof recipes / sizeof recipes[0]; i++) test_sequence_lengths(s, recipes[i]);
        synth_close(s);
    }
}

static player *hostile_player;

static void play_on(thing *t) {
    for (int i = 0; i < 3; i++) (void)play(hostile_player, &t->sequence);
    (void)dsv3_sequence_truncate(&t->sequence, dsv3_sequence_length(&t->sequence) / 2, NULL, NULL);
}

/* A text that was rolled back and gone on with, 12 tokens long. */
static thing *written(player *p, const dsv3_model *model, size_t rows, size_t drafts) {
    thing *t = thing_sequence(model, 24, DSV3_F32, rows, drafts);
    int32_t prompt[7];
    synth_tokens(prompt, 7, model->config.vocab_size);
    t->sequence.temperature = 0.7f;
    synth_demand(dsv3_sequence_append(model, &t->sequence, prompt, 7, NULL), "append", NULL);
    while (dsv3_sequence_length(&t->sequence) < 9) synth_demand(play(p, &t->sequence), "step", NULL);
    return t;
}

static void test_sequence_damage(void) {
    synth *s = open_modules(2);
    player p = player_open(&s->model);
    thing *t = written(&p, &s->model, 4, 2);
    blob b = thing_save(t);
    hostile_player = &p;
    for (size_t k = 0; k < 2; k++) { /* a module that knows more than the text */
        dsv3_cache *module = &t->sequence.modules[k];
        size_t was = module->length, bytes = 0;
        dsv3_error error;
        void *data;
        module->length = t->sequence.cache.length + 1;
        CHECK_EQ(dsv3_sequence_save_size(&t->sequence, &bytes, NULL), DSV3_OK);
        data = test_alloc(bytes);
        CHECK_EQ(dsv3_sequence_save(&s->model, &t->sequence, TAG, data, bytes, &error), DSV3_ERR_DAMAGED);
        free(data);
        CHECK(strcmp(error.name, "length") == 0 && strstr(error.why, "of a module is more than that of the text") != NULL);
        module->length = was;
    }
    check_damage(t, b, test_light() ? 61 : 1);
    check_others(t, b);
    check_hostile(t, b, b.bytes / 8, play_on);
    blob_free(b), thing_free(t);
    player_close(&p);
    synth_close(s);
}

/* The first id that no token has, in each place where tokens are saved, and the last that one has. */
static void test_sequence_tokens(void) {
    synth *s = open_modules(2);
    player p = player_open(&s->model);
    thing *t = written(&p, &s->model, 4, 2), *to = thing_sequence(&s->model, 24, DSV3_F32, 4, 2);
    blob b = thing_save(t);
    size_t V = (size_t)s->config.vocab_size, n = t->sequence.n_token, length = dsv3_sequence_length(&t->sequence);
    size_t layers = (size_t)s->config.num_hidden_layers, floats = t->sequence.cache.length * t->sequence.cache.width;
    size_t token = OBJECT + 8 * 16, history = token + 8 * (n + 2 + 2 + 1 + 4 + layers * ((floats + 1) / 2));
    CHECK(n > 0 && length >= 9);
    for (size_t i = 0; i < n + length; i++) {
        size_t at = i < n ? token + 8 * i : history + 8 * (i - n);
        int32_t *saved = i < n ? t->sequence.token + i : t->sequence.history + (i - n);
        const int32_t *loaded = i < n ? to->sequence.token + i : to->sequence.history + (i - n);
        CHECK_EQ(word_at(b.data + at), *saved);
        forge(b, at, V);
        CHECK(refused(to, b, TAG, DSV3_ERR_DAMAGED, i < n ? "token" : "history"));
        forge(b, at, V - 1);
        CHECK_EQ(thing_load(to, b, TAG, NULL), DSV3_OK);
        CHECK_EQ(*loaded, V - 1);
        forge(b, at, (uint64_t)*saved);
    }
    blob_free(b), thing_free(to), thing_free(t);
    player_close(&p);
    synth_close(s);
}

static void test_sequence_misuse(void) {
    synth *s = open_modules(2), *other = open_modules(3);
    player p = player_open(&s->model);
    thing *t = written(&p, &s->model, 4, 2), *to;
    blob b = thing_save(t);
    int32_t more[3] = {1, 2, 3};
    size_t bytes = 0, length = t->sequence.cache.length;
    CHECK_EQ(dsv3_sequence_save_size(NULL, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_save_size(&t->sequence, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_save(&s->model, NULL, TAG, b.data, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_save(NULL, &t->sequence, TAG, b.data, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_save(&s->model, &t->sequence, TAG, NULL, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_save(&s->model, &t->sequence, TAG, b.data, b.bytes - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_sequence_save(&other->model, &t->sequence, TAG, b.data, b.bytes, NULL), DSV3_ERR_MISMATCH);
    CHECK_EQ(dsv3_sequence_load(&other->model, &t->sequence, TAG, b.data, b.bytes, NULL), DSV3_ERR_MISMATCH);
    CHECK_EQ(dsv3_sequence_load(&s->model, NULL, TAG, b.data, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_load(NULL, &t->sequence, TAG, b.data, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_load(&s->model, &t->sequence, TAG, NULL, b.bytes, NULL), DSV3_ERR_ARG);
    to = thing_sequence(&s->model, length, DSV3_F32, 4, 2);
    CHECK_EQ(thing_load(to, b, TAG, NULL), DSV3_OK);
    CHECK(same_sequences(&to->sequence, &t->sequence));
    thing_free(to);
    to = thing_sequence(&s->model, length - 1, DSV3_F32, 4, 2);
    CHECK(refused(to, b, TAG, DSV3_ERR_FULL, "length"));
    thing_free(to);
    to = thing_sequence(&s->model, 24, DSV3_BF16, 4, 2);
    CHECK(refused(to, b, TAG, DSV3_ERR_MISMATCH, "type"));
    thing_free(to);
    to = thing_sequence(&s->model, 24, DSV3_F32, 4, 1);
    CHECK(refused(to, b, TAG, DSV3_ERR_MISMATCH, "n_modules"));
    thing_free(to);
    to = thing_sequence(&s->model, 24, DSV3_F32, 4, 3);
    CHECK(refused(to, b, TAG, DSV3_ERR_MISMATCH, "max_drafts"));
    CHECK(refused(to, b, TAG + 1, DSV3_ERR_MISMATCH, "tag"));
    thing_free(to);
    CHECK_EQ(dsv3_sequence_append(&s->model, &t->sequence, more, 3, NULL), DSV3_OK);
    memset(b.data, 9, b.bytes);
    CHECK_EQ(dsv3_sequence_save(&s->model, &t->sequence, TAG, b.data, b.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_truncate(&t->sequence, dsv3_sequence_length(&t->sequence), NULL, NULL), DSV3_OK);
    CHECK_EQ(dsv3_sequence_save(&s->model, &t->sequence, TAG, b.data, b.bytes, NULL), DSV3_OK);
    to = thing_sequence(&s->model, 24, DSV3_F32, 4, 2);
    CHECK_EQ(dsv3_sequence_append(&s->model, &to->sequence, more, 3, NULL), DSV3_OK);
    CHECK_EQ(thing_load(to, b, TAG, NULL), DSV3_OK); /* the prompt of before is dropped */
    CHECK(same_sequences(&to->sequence, &t->sequence));
    thing_free(to), blob_free(b), thing_free(t);
    player_close(&p);
    synth_close(s), synth_close(other);
}

/* Without drafts the modules read along late: their states must fit into the rings where the sequence is loaded. */
static void test_sequence_rows(void) {
    synth *s = open_modules(2);
    player p = player_open(&s->model);
    thing *t = written(&p, &s->model, 12, 2), *to = thing_sequence(&s->model, 24, DSV3_F32, 1, 2);
    blob b;
    t->sequence.drafts = 0;
    while (t->sequence.cache.length - t->sequence.modules[1].length < 8) {
        synth_demand(play(&p, &t->sequence), "step", NULL);
    }
    b = thing_save(t);
    CHECK(refused(to, b, TAG, DSV3_ERR_MISMATCH, "rows"));
    blob_free(b), thing_free(to), thing_free(t);
    player_close(&p);
    synth_close(s);
}

/* ---- Training */

static thing *thing_trainer(const dsv3_config *config, int ema, uint64_t seed) {
    thing *t = thing_of(TRAINER, NULL);
    dsv3_training settings = dsv3_training_default();
    dsv3_rng rng = {seed};
    settings.rows = settings.longest = 24;
    settings.sequences = 3;
    settings.balance.expert = 0.01;
    settings.ema = ema;
    synth_demand(dsv3_trainer_size(config, &settings, 1, &t->bytes, NULL), "trainer", NULL);
    t->memory = synth_alloc(t->bytes);
    memset(t->memory, junk, t->bytes);
    synth_demand(dsv3_trainer_init(config, &t->trainer, &settings, 1, t->memory, t->bytes, NULL), "trainer", NULL);
    dsv3_parameters_random(&t->trainer.weights, &rng, 0.3f, NULL);
    t->config = *config;
    return t;
}

/* The text of a step depends on its number only. */
static void train_step(dsv3_context *ctx, thing *t) {
    dsv3_trainer *trainer = &t->trainer;
    int32_t token[24], sequence[24];
    uint64_t targets[8] = {0}, sequences = 0;
    dsv3_text text;
    dsv3_error error;
    memset(&text, 0, sizeof text);
    test_state = trainer->step + 100;
    for (int i = 0; i < 24; i++) {
        token[i] = (int32_t)test_below((size_t)t->config.vocab_size);
        sequence[i] = i / 8;
    }
    text.rows = 24;
    text.token = token;
    text.sequence = sequence;
    dsv3_text_count(&text, trainer->losses.depths, targets, &sequences, NULL);
    synth_demand(dsv3_train_begin(trainer, targets, sequences, NULL), "begin", NULL);
    synth_demand(dsv3_train_accumulate(ctx, trainer, &text, &error), "accumulate", &error);
    synth_demand(dsv3_train_end(ctx, trainer, 0.01, NULL, &error), "end", &error);
}

static int same_trainers(const dsv3_trainer *a, const dsv3_trainer *b) {
    size_t n = a->weights.count * sizeof(float);
    return a->step == b->step && memcmp(a->weights.data, b->weights.data, n) == 0 && memcmp(a->m, b->m, n) == 0 &&
           memcmp(a->v, b->v, n) == 0 && (a->ema == NULL || memcmp(a->ema, b->ema, n) == 0) &&
           memcmp(a->balancer.load_all, b->balancer.load_all,
                  a->balancer.layers * a->balancer.experts * sizeof *a->balancer.load_all) == 0;
}

static void test_training(int D, int ema) {
    synth *s = open_modules(D);
    dsv3_config other = s->config;
    thing *a = thing_trainer(&s->config, ema, 3), *b, *c;
    dsv3_context ctx;
    size_t bytes = 0;
    blob saved;
    synth_demand(dsv3_context_init(&ctx, test_backend(), 1, NULL), "context", NULL);
    for (int k = 0; k < 5; k++) {
        blob again;
        int same = 1;
        saved = thing_save(a);
        b = thing_trainer(&s->config, ema, 8);
        if (k == 3) train_step(&ctx, b);
        CHECK_EQ(thing_load(b, saved, TAG, NULL), DSV3_OK);
        CHECK(same_trainers(&a->trainer, &b->trainer));
        again = thing_save(b);
        CHECK(again.bytes == saved.bytes && memcmp(again.data, saved.data, saved.bytes) == 0);
        c = thing_trainer(&s->config, ema, 9); /* goes on as a will */
        CHECK_EQ(thing_load(c, again, TAG, NULL), DSV3_OK);
        for (int i = 0; i < 3; i++) train_step(&ctx, b), train_step(&ctx, c);
        CHECK(same_trainers(&b->trainer, &c->trainer));
        for (int i = 0; i < 3 && k == 4; i++) train_step(&ctx, a);
        if (k == 4) same = same_trainers(&a->trainer, &b->trainer);
        CHECK(same);
        if (k < 4) train_step(&ctx, a);
        blob_free(saved), blob_free(again), thing_free(b), thing_free(c);
    }
    saved = thing_save(a);
    b = thing_trainer(&s->config, !ema, 4);
    CHECK(refused(b, saved, TAG, DSV3_ERR_MISMATCH, "ema"));
    other.rms_norm_eps *= 2;
    c = thing_trainer(&other, ema, 4);
    CHECK(refused(c, saved, TAG, DSV3_ERR_MISMATCH, "rms_norm_eps"));
    CHECK_EQ(dsv3_trainer_save_size(NULL, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_save_size(&a->trainer, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_save(NULL, TAG, saved.data, saved.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_save(&a->trainer, TAG, NULL, saved.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_save(&a->trainer, TAG, saved.data, saved.bytes - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_trainer_load(NULL, TAG, saved.data, saved.bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_trainer_load(&a->trainer, TAG, NULL, saved.bytes, NULL), DSV3_ERR_ARG);
    check_damage(a, saved, 4999);
    if (D == 1) check_others(a, saved);
    check_hostile(a, saved, 3, NULL);
    blob_free(saved), thing_free(a), thing_free(b), thing_free(c);
    synth_close(s);
}

int main(void) {
    synth *s = open_modules(1);
    for (int module = 0; module < 2; module++) {
        test_cache_lengths(s, DSV3_F32, module);
        test_cache_lengths(s, DSV3_BF16, module);
    }
    test_format(s);
    test_cache_damage(s, DSV3_F32);
    test_cache_damage(s, DSV3_BF16);
    test_cache_misuse(s);
    synth_close(s);
    test_sequences();
    test_sequence_damage();
    test_sequence_tokens();
    test_sequence_misuse();
    test_sequence_rows();
    test_training(0, 0);
    test_training(1, 1);
    return test_done("state");
}
