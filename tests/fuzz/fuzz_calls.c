/* Arbitrary bytes as a sequence of calls over small models: batches, roll back, copies, saving and loading, generation with
 * drafts, training, with arguments that are good, bad and damaged, hooks that fail and calls that are aborted.
 * After an error everything is as long as it was; at the end what is in each cache and each text is what a fresh run makes
 * of it, bit for bit, and weights are what they were unless a step has succeeded. */
#define DSV3_IMPLEMENTATION
#include "../../dsv3.h"
#include <stdio.h>
#include <stdlib.h>

enum { CAPACITY = 12, VOCAB = 11, ROWS = 8, DRAFTS = 3, SAVED = 1 << 14, MODELS = 2 };

#define MUST(condition) ((condition) ? (void)0 : broken(#condition, __LINE__))
static void broken(const char *what, int line) {
    fprintf(stderr, "fuzz_calls: line %d: not so: %s\n", line, what);
    abort();
}

static dsv3_error error;
#define MUST_OK(call)                                                                                                 \
    do {                                                                                                              \
        char text[256];                                                                                               \
        if ((call) != DSV3_OK) broken(dsv3_error_text(&error, text, sizeof text), __LINE__);                          \
    } while (0)

typedef struct writing { /* a sequence and what must be true of it */
    dsv3_sequence s;
    int32_t prompt[CAPACITY + 4]; /* what was appended last */
    int32_t text[CAPACITY + 1];
    unsigned char made[CAPACITY + 1]; /* written, not appended */
    size_t length;
} writing;

typedef struct world { /* of one model */
    dsv3_parameters weights;
    dsv3_cache cache[2], fresh;
    int32_t text[2][CAPACITY]; /* [cache.length] */
    writing writing[2];
    dsv3_workspace ws;
    dsv3_trainer trainer;
    float *was; /* the trainer's weights */
} world;

static world worlds[MODELS];
static dsv3_context context;
static int armed, before_abort, before_fail;
static float logits[2 * (DRAFTS + 1) * VOCAB + ROWS * VOCAB], again[CAPACITY * VOCAB];
static unsigned char saved[SAVED];

static const uint8_t *input, *input_end;
static unsigned take(void) { return input < input_end ? *input++ : 0; }

static int aborted(void *user) {
    (void)user;
    return armed == 1 && before_abort-- == 0;
}

static dsv3_result steer(void *user, float *row, size_t n, const int32_t *text, size_t length, size_t sequence) {
    (void)user, (void)sequence;
    MUST(n == VOCAB && length >= 1);
    if (armed == 2 && before_fail-- == 0) return DSV3_ERR_UNSUPPORTED;
    row[(size_t)text[length - 1]] -= 0.5f; /* follows from logits and text alone */
    return DSV3_OK;
}

static void *need(dsv3_result result, const size_t *bytes) { /* which the result came with */
    MUST(result == DSV3_OK);
    return malloc(*bytes);
}

static void make(world *w, int drafting) {
    dsv3_config c = dsv3_config_default();
    dsv3_training settings = dsv3_training_default();
    dsv3_rng rng = {7};
    size_t n;
    c.vocab_size = VOCAB, c.hidden_size = 6, c.intermediate_size = 5, c.moe_intermediate_size = 3;
    c.num_hidden_layers = 2, c.first_k_dense_replace = 1, c.num_nextn_predict_layers = drafting ? 2 : 0;
    c.num_attention_heads = 2, c.q_lora_rank = drafting ? 3 : 0, c.kv_lora_rank = 4;
    c.qk_nope_head_dim = 2, c.qk_rope_head_dim = 2, c.v_head_dim = 3;
    c.n_routed_experts = 4, c.n_shared_experts = 1, c.num_experts_per_tok = 2, c.n_group = 2, c.topk_group = 1;
    c.routed_scaling_factor = 1.5f;
    void *memory = need(dsv3_parameters_size(&c, &n, NULL), &n);
    MUST_OK(dsv3_parameters_init(&c, &w->weights, memory, n, &error));
    dsv3_parameters_random(&w->weights, &rng, 0.6f, NULL);
    for (int i = 0; i < 3; i++) {
        dsv3_cache *cache = i < 2 ? &w->cache[i] : &w->fresh;
        memory = need(dsv3_cache_size(&c, CAPACITY, DSV3_F32, &n, NULL), &n);
        MUST_OK(dsv3_cache_init(&c, cache, CAPACITY, DSV3_F32, memory, n, &error));
    }
    for (int i = 0; i < 2; i++) {
        dsv3_model *model = &w->weights.model;
        memory = need(dsv3_sequence_size(model, CAPACITY, DSV3_F32, 4, DRAFTS, &n, NULL), &n);
        MUST_OK(dsv3_sequence_init(model, &w->writing[i].s, CAPACITY, DSV3_F32, 4, DRAFTS, memory, n, &error));
    }
    memory = need(dsv3_workspace_size(&c, CAPACITY, 1, &n, NULL), &n);
    MUST_OK(dsv3_workspace_init(&c, &w->ws, CAPACITY, 1, memory, n, &error));
    settings.rows = ROWS, settings.sequences = 2, settings.longest = ROWS;
    memory = need(dsv3_trainer_size(&c, &settings, 1, &n, NULL), &n);
    MUST_OK(dsv3_trainer_init(&c, &w->trainer, &settings, 1, memory, n, &error));
    MUST(w->trainer.weights.count == w->weights.count);
    w->was = (float *)malloc(w->weights.count * sizeof(float));
}

static void reset(world *w) {
    for (int i = 0; i < 2; i++) {
        writing *x = &w->writing[i];
        w->cache[i].length = 0;
        MUST_OK(dsv3_sequence_truncate(&x->s, 0, NULL, &error));
        x->length = 0, x->s.drafts = DRAFTS, x->s.limit = SIZE_MAX, x->s.stop = -1, x->s.stopped = 0;
        x->s.adaptive = 0, x->s.steer = NULL, x->s.want_log_p = 0;
    }
}

/* ---- Caches */

static void call_forward(world *w) {
    int32_t token[CAPACITY], sequence[CAPACITY], position[CAPACITY];
    size_t at[2] = {w->cache[0].length, w->cache[1].length}, was[2] = {at[0], at[1]};
    unsigned form = take();
    dsv3_batch batch = {1 + form % ROWS, token, sequence, form & 32 ? position : NULL, 0, NULL};
    for (size_t r = 0; r < batch.rows; r++) {
        unsigned x = take();
        token[r] = x == 255 ? VOCAB : x == 254 ? -1 : (int32_t)(x % VOCAB);
        sequence[r] = x == 253 ? 2 : (int32_t)(x >> 7);
        position[r] = (int32_t)at[x >> 7]++ + (x == 252);
    }
    batch.outputs = form & 64 ? batch.rows : batch.rows + (form == 31);
    dsv3_result result = dsv3_forward(&context, logits, &w->weights.model, w->cache, 2, &batch, &w->ws, &error);
    MUST(result == error.code);
    for (int i = 0; i < 2; i++) MUST(w->cache[i].length == (result == DSV3_OK ? at[i] : was[i]));
    if (result != DSV3_OK) return;
    for (size_t r = 0; r < batch.rows; r++) w->text[sequence[r]][was[sequence[r]]++] = token[r];
}

static void call_truncate(world *w, int i) {
    size_t before = w->cache[i].length, length = take() % (CAPACITY + 2);
    dsv3_result result = dsv3_cache_truncate(&w->cache[i], length, NULL);
    MUST((result == DSV3_OK) == (length <= before));
    MUST(w->cache[i].length == (result == DSV3_OK ? length : before));
}

static void call_copy(world *w, int i) {
    MUST_OK(dsv3_cache_copy(&w->cache[1 - i], &w->cache[i], &error));
    memcpy(w->text[1 - i], w->text[i], sizeof w->text[i]);
}

/* Damages what was saved, or not; true when it is whole. */
static int damage(size_t *n) {
    unsigned x = take(), y = take();
    if (x & 1) return 1;
    if (x & 2) *n -= 1 + (x * 256 + y) % *n;
    else saved[(x * 256 + y) % *n] ^= (unsigned char)(1u << (y & 7));
    return 0;
}

static void call_save(world *w, int i) {
    const dsv3_config *c = &w->weights.model.config;
    size_t n, before = w->cache[1 - i].length;
    MUST_OK(dsv3_cache_save_size(&w->cache[i], &n, &error));
    MUST(n <= SAVED);
    MUST_OK(dsv3_cache_save(c, &w->cache[i], 5, saved, n, &error));
    int whole = damage(&n);
    dsv3_result result = dsv3_cache_load(c, &w->cache[1 - i], 5, saved, n, NULL);
    MUST((result == DSV3_OK) == whole);
    if (whole) memcpy(w->text[1 - i], w->text[i], sizeof w->text[i]);
    MUST(w->cache[1 - i].length == (whole ? w->cache[i].length : before));
}

/* ---- Texts */

static void must_be(const writing *x, size_t left) {
    MUST(dsv3_sequence_length(&x->s) == x->length && x->s.prompt_left == left);
    MUST(memcmp(x->s.history, x->text, x->length * sizeof x->text[0]) == 0);
}

static void call_append(world *w, int i) {
    writing *x = &w->writing[i];
    unsigned form = take();
    size_t n = form % (CAPACITY + 4), left = x->s.prompt_left;
    int32_t token[CAPACITY + 4];
    for (size_t j = 0; j < n; j++) {
        unsigned t = take();
        token[j] = t == 255 ? VOCAB : (int32_t)(t % VOCAB);
    }
    if (left == 0) memcpy(x->prompt, token, sizeof token);
    dsv3_result result = dsv3_sequence_append(&w->weights.model, &x->s, left == 0 ? x->prompt : token, n, NULL);
    must_be(x, result == DSV3_OK ? n : left);
}

static void call_step(world *w) {
    unsigned which = take() % 4;
    dsv3_sequence *both[2] = {&w->writing[which & 1].s, &w->writing[1 - (which & 1)].s};
    size_t n = which & 2 ? 2 : 1, left[2] = {w->writing[0].s.prompt_left, w->writing[1].s.prompt_left};
    dsv3_result result = dsv3_generate_step(&context, logits, &w->weights.model, both, n, &w->ws, &error);
    MUST(result == error.code);
    for (int i = 0; i < 2; i++) {
        writing *x = &w->writing[i];
        size_t length = dsv3_sequence_length(&x->s);
        if (&x->s != both[0] && n == 1) continue;
        if (result != DSV3_OK) {
            MUST(x->s.n_token == 0);
            must_be(x, left[i]);
            continue;
        }
        size_t read = left[i] - x->s.prompt_left;
        MUST(length == x->length + read + x->s.n_token && length <= CAPACITY + 1);
        for (size_t j = 0; j < read; j++) { /* what is read comes from where it was appended */
            x->text[x->length] = x->s.history[x->length];
            x->made[x->length++] = 0;
        }
        for (size_t j = 0; j < x->s.n_token; j++) {
            MUST(x->s.token[j] >= 0 && x->s.token[j] < VOCAB);
            x->text[x->length] = x->s.token[j];
            x->made[x->length++] = x->s.steer != NULL ? 2 : 1;
        }
        MUST(length <= x->s.limit || x->s.n_token == 0);
        must_be(x, x->s.prompt_left);
    }
}

static void call_back(world *w, int i) {
    writing *x = &w->writing[i];
    size_t length = take() % (CAPACITY + 3), kept = 99, left = x->s.prompt_left;
    dsv3_result result = dsv3_sequence_truncate(&x->s, length, &kept, NULL);
    MUST((result == DSV3_OK) == (length <= x->length));
    if (result == DSV3_OK) {
        MUST(kept <= length && kept + (size_t)w->weights.model.n_mtp >= length);
        x->length = kept, left = 0;
    }
    must_be(x, left);
}

static void call_fork(world *w, int i) {
    writing *x = &w->writing[i], *to = &w->writing[1 - i];
    unsigned form = take();
    size_t n, left = to->s.prompt_left;
    int whole = 1;
    if (form & 1) {
        MUST_OK(dsv3_sequence_copy(&to->s, &x->s, &error));
        left = x->s.prompt_left;
    } else {
        if (x->s.prompt_left > 0) {
            MUST(dsv3_sequence_save(&w->weights.model, &x->s, 5, saved, SAVED, NULL) == DSV3_ERR_ARG);
            return;
        }
        MUST_OK(dsv3_sequence_save_size(&x->s, &n, &error));
        MUST(n <= SAVED);
        MUST_OK(dsv3_sequence_save(&w->weights.model, &x->s, 5, saved, n, &error));
        whole = damage(&n);
        MUST((dsv3_sequence_load(&w->weights.model, &to->s, 5, saved, n, NULL) == DSV3_OK) == whole);
        if (whole) left = 0;
    }
    if (whole) { /* its own prompt goes on lying in the other's memory: a copy says so */
        memcpy(to->text, x->text, sizeof x->text);
        memcpy(to->made, x->made, sizeof x->made);
        to->length = x->length;
        if (left > 0) {
            memcpy(to->prompt, x->prompt, sizeof x->prompt);
            to->s.prompt = to->prompt + (x->s.prompt - x->prompt);
        }
    }
    must_be(to, left);
}

static void call_settings(world *w, int i) {
    dsv3_sequence *s = &w->writing[i].s;
    unsigned x = take();
    s->drafts = x % (DRAFTS + 2);
    s->adaptive = (x >> 3) & 1;
    s->stop = x & 16 ? (int32_t)(x >> 5) : -1;
    s->limit = x & 32 ? (x >> 4) : SIZE_MAX;
    s->want_log_p = x >> 7;
    s->steer = x & 64 ? steer : NULL;
}

/* ---- Training */

static void same_weights(const world *w) {
    MUST(memcmp(w->was, w->trainer.weights.data, w->weights.count * sizeof(float)) == 0);
}

static void call_train(world *w, int *used) {
    static const double rate[8] = {0.01, 0, -1, 1e39, (double)NAN, (double)INFINITY, 0.1, 1e-3};
    dsv3_trainer *t = &w->trainer;
    unsigned x = take();
    size_t bytes = w->weights.count * sizeof(float);
    if (!*used) { /* as new */
        size_t n;
        *used = 1;
        memcpy(t->weights.data, w->weights.data, bytes);
        memset(t->m, 0, bytes), memset(t->v, 0, bytes);
        t->step = 0;
        memcpy(w->was, t->weights.data, bytes);
        MUST_OK(dsv3_trainer_save_size(t, &n, &error));
        (void)n;
    }
    if (x % 4 == 0) {
        uint64_t targets[3] = {ROWS, ROWS, ROWS};
        dsv3_train_begin(t, x & 8 ? targets : NULL, x >> 4, NULL);
    } else if (x % 4 == 1) {
        int32_t token[ROWS], target[ROWS], sequence[ROWS];
        dsv3_text text = {1 + (x >> 2) % (ROWS + 1), token, x & 128 ? target : NULL, sequence, NULL, NULL, 0};
        for (size_t r = 0; r < ROWS; r++) {
            unsigned y = take();
            token[r] = y == 255 ? VOCAB : (int32_t)(y % VOCAB);
            target[r] = y == 254 ? VOCAB : y == 253 ? DSV3_IGNORE : (int32_t)(y / 11 % VOCAB);
            sequence[r] = r >= 4 ? 1 + (y == 252) : 0;
        }
        if (text.rows > ROWS) text.rows = ROWS + 1; /* refused before it is read */
        dsv3_train_accumulate(&context, t, &text, NULL);
    } else if (x % 4 == 2) {
        dsv3_training good = t->settings;
        double norm = -1;
        unsigned y = take();
        if (y == 1) t->settings.beta1 = 1;
        if (y == 2) t->settings.beta2 = NAN;
        if (y == 3) t->settings.eps = 0;
        if (y == 4) t->settings.weight_decay = NAN;
        if (y == 5) t->settings.clip = -1;
        dsv3_result result = dsv3_train_end(&context, t, rate[(x >> 2) % 8], &norm, NULL);
        t->settings = good;
        if (result == DSV3_OK) {
            MUST(norm >= 0);
            for (size_t j = 0; j < w->weights.count; j++) MUST(t->weights.data[j] - t->weights.data[j] == 0.0f);
            memcpy(w->was, t->weights.data, bytes);
        }
    } else {
        dsv3_result result = dsv3_trainer_load(t, 5, saved, take() * 64u, NULL); /* what is there is no trainer */
        MUST(result != DSV3_OK);
    }
    same_weights(w);
}

/* ---- What a fresh run says */

static void check_cache(world *w, int i) {
    dsv3_batch batch = {1, w->text[i], NULL, NULL, 1, NULL};
    size_t length = w->cache[i].length;
    int32_t next = 3;
    if (length == CAPACITY) {
        length--;
        MUST_OK(dsv3_cache_truncate(&w->cache[i], length, &error));
    }
    w->text[i][length] = next;
    batch.token = &w->text[i][length];
    MUST_OK(dsv3_forward(&context, logits, &w->weights.model, &w->cache[i], 1, &batch, &w->ws, &error));
    batch.token = w->text[i], batch.rows = length + 1, w->fresh.length = 0;
    MUST_OK(dsv3_forward(&context, again, &w->weights.model, &w->fresh, 1, &batch, &w->ws, &error));
    MUST(memcmp(logits, again, VOCAB * sizeof(float)) == 0);
}

static void check_text(world *w, int i) {
    writing *x = &w->writing[i];
    size_t n = x->length < CAPACITY ? x->length : CAPACITY;
    dsv3_batch batch = {n, x->text, NULL, NULL, n, NULL};
    if (n == 0) return;
    w->fresh.length = 0;
    MUST_OK(dsv3_forward(&context, again, &w->weights.model, &w->fresh, 1, &batch, &w->ws, &error));
    for (size_t j = 1; j < x->length; j++) {
        float *row = again + (j - 1) * VOCAB;
        int32_t best = 0;
        if (!x->made[j]) continue;
        if (x->made[j] == 2) row[(size_t)x->text[j - 1]] -= 0.5f;
        for (int32_t v = 1; v < VOCAB; v++)
            if (row[v] > row[best]) best = v;
        MUST(x->text[j] == best);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    int trained = 0;
    world *w;
    if (context.threads == 0) {
        MUST_OK(dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, &error));
        context.attention = DSV3_ATTENTION_ABSORBED;
        context.aborted = aborted;
        for (int i = 0; i < MODELS; i++) make(&worlds[i], i);
    }
    input = data, input_end = data + size;
    w = &worlds[take() % MODELS];
    reset(w);
    for (int calls = 0; calls < 40 && input < input_end; calls++) {
        unsigned x = take();
        int i = (x >> 4) & 1;
        armed = x >= 0xE0 ? (x & 1) + 1 : 0; /* this call is aborted, or its steering fails, sooner or later */
        before_abort = before_fail = (x >> 1) & 3;
        switch (x & 15) {
        case 0: case 1: case 12: call_forward(w); break;
        case 2: call_truncate(w, i); break;
        case 3: call_copy(w, i); break;
        case 4: call_save(w, i); break;
        case 5: case 13: call_append(w, i); break;
        case 6: case 7: case 14: case 15: call_step(w); break;
        case 8: call_back(w, i); break;
        case 9: call_fork(w, i); break;
        case 10: call_settings(w, i); break;
        default: call_train(w, &trained); break;
        }
    }
    armed = 0;
    for (int i = 0; i < 2; i++) check_cache(w, i), check_text(w, i);
    return 0;
}
