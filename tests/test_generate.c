/* test_generate.c -- chapter 13 (infer), generation: sequences, drafts by the MTP modules, rolling back.
 *
 * A failure means that drafts change what is written (greedy text must be that of plain decoding, sampled text must
 * have its distribution), that a sequence is not what it should be after it was rolled back, copied or continued,
 * that a step that failed has left traces, or that a bad call is computed instead of refused.
 *
 * "test_generate full DIR" compares greedy texts only, but those of the checkpoint in DIR, and in more ways, with a
 * line about each: tests/check_generate.sh. "test_generate 4" runs the fifth of the tests listed at the end. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define CHECKPOINT_IMPLEMENTATION
#define DSV3_IMPLEMENTATION
#include "checkpoint.h"
#include "synthetic.h"

#include <time.h>

#define MODULES 4 /* most MTP modules of a model here */
#define MOST_WRITERS 20

/* ---- Contexts. The second thread is OpenMP's; without OpenMP, a loop is still cut in two and done backwards. */

static void halves(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    (void)user;
    if (n > 1) task(arg, n / 2, n, threads - 1);
    task(arg, 0, n > 1 ? n / 2 : n, 0);
}

static dsv3_compute computing = DSV3_EXACT;

static dsv3_context context_of(dsv3_attention form, size_t threads) {
    dsv3_context c;
    synth_demand(dsv3_context_init(&c, test_backend(), threads, NULL), "context", NULL);
    if (threads > 1 && c.threads == 1) {
        c.threads = threads;
        c.parallel_for = halves;
    }
    c.attention = form;
    c.compute = computing;
    return c;
}

static void *workspace_of(dsv3_workspace *ws, const dsv3_model *model, size_t rows, size_t threads) {
    size_t bytes;
    void *memory;
    synth_demand(dsv3_workspace_size(&model->config, rows, threads, &bytes, NULL), "workspace size", NULL);
    memory = synth_alloc(bytes);
    synth_demand(dsv3_workspace_init(&model->config, ws, rows, threads, memory, bytes, NULL), "workspace", NULL);
    return memory;
}

/* ---- Steering: what all witnesses and writers below have; NULL: none */

static dsv3_steer steering;

/* A small grammar: even tokens and odd ones take turns, and what the text has less of is made more probable. Token 0 may
 * follow anything. */
static dsv3_result steer_turns(void *user, float *logits, size_t V, const int32_t *text, size_t length,
                               size_t sequence) {
    (void)user, (void)sequence;
    for (size_t i = 0; i < V; i++) {
        size_t count = 0;
        for (size_t t = 0; t < length; t++) count += (size_t)text[t] == i;
        logits[i] -= 0.3f * (float)count;
        if (i > 0 && (i + (size_t)text[length - 1]) % 2 == 0) logits[i] = -INFINITY;
    }
    return DSV3_OK;
}

/* ---- The witness: what plain decoding writes, and what the modules guess at every place of it. It shares nothing
 * with dsv3_generate_step: one sequence, one dsv3_forward or dsv3_mtp_forward after the other, all states kept. */

typedef struct witness {
    const dsv3_model *model;
    dsv3_context context;
    dsv3_workspace ws;
    void *ws_memory, *memory[1 + MODULES];
    dsv3_cache cache, modules[MODULES];
    size_t D, V, d, room, chunk, drafts, length;
    int32_t *text;  /* [room] */
    int32_t *next;  /* [room] the most probable token behind each */
    int32_t *guess; /* [room, drafts] when text[N] is the last token: what stands at N + 1 .. */
    float *state;   /* [D, room, d] what module k + 1 reads */
    float *logits;  /* [V] of the last call */
} witness;

static void witness_cache(witness *w, dsv3_cache *cache, int module, dsv3_type type) {
    const dsv3_config *c = &w->model->config;
    size_t bytes = 0, n = w->room + w->drafts;
    void **memory = &w->memory[module];
    synth_demand(module ? dsv3_cache_mtp_size(c, n, type, &bytes, NULL) : dsv3_cache_size(c, n, type, &bytes, NULL),
                 "cache size", NULL);
    *memory = synth_alloc(bytes);
    synth_demand(module ? dsv3_cache_mtp_init(c, cache, n, type, *memory, bytes, NULL)
                        : dsv3_cache_init(c, cache, n, type, *memory, bytes, NULL),
                 "cache", NULL);
}

/* chunk: prompt tokens read in one call; drafts: how far the modules look ahead, 0: they are not asked. */
static witness *witness_open(const dsv3_model *model, dsv3_attention form, dsv3_type type, size_t room, size_t chunk,
                             size_t drafts) {
    witness *w = (witness *)test_alloc(sizeof *w);
    memset(w, 0, sizeof *w);
    w->model = model;
    w->context = context_of(form, 1);
    w->D = drafts < (size_t)model->n_mtp ? drafts : (size_t)model->n_mtp;
    w->V = (size_t)model->config.vocab_size;
    w->d = (size_t)model->config.hidden_size;
    w->room = room;
    w->chunk = chunk;
    w->drafts = w->D > 0 ? drafts : 0;
    w->ws_memory = workspace_of(&w->ws, model, chunk, 1);
    witness_cache(w, &w->cache, 0, type);
    for (size_t k = 1; k <= w->D; k++) witness_cache(w, &w->modules[k - 1], (int)k, type);
    w->text = (int32_t *)test_alloc(room * sizeof *w->text);
    w->next = (int32_t *)test_alloc(room * sizeof *w->next);
    w->guess = (int32_t *)test_alloc(room * w->drafts * sizeof *w->guess);
    w->state = (float *)test_alloc(w->D * room * w->d * sizeof *w->state);
    w->logits = (float *)test_alloc(w->V * sizeof *w->logits);
    return w;
}

static void witness_close(witness *w) {
    for (size_t k = 0; k <= MODULES; k++) synth_release(w->memory[k]);
    synth_release(w->ws_memory);
    free(w->text), free(w->next), free(w->guess), free(w->state), free(w->logits), free(w);
}

static float *witness_state(const witness *w, size_t depth, size_t position) {
    return w->state + (depth * w->room + position) * w->d;
}

/* The most probable token behind text [length]. */
static int32_t most_probable(float *logits, size_t V, const int32_t *text, size_t length) {
    int32_t token = -1;
    if (steering != NULL) synth_demand(steering(NULL, logits, V, text, length, 0), "steering", NULL);
    synth_demand(dsv3_sample(&token, logits, V, 0, 1, NULL, NULL, NULL), "sample", NULL);
    return token;
}

/* Tokens of the text at [begin, end) through the main model. */
static void witness_main(witness *w, size_t begin, size_t end) {
    dsv3_batch batch;
    memset(&batch, 0, sizeof batch);
    batch.rows = end - begin;
    batch.token = w->text + begin;
    batch.outputs = 1;
    synth_demand(dsv3_forward(&w->context, w->logits, w->model, &w->cache, 1, &batch, &w->ws, NULL), "forward", NULL);
    w->next[end - 1] = most_probable(w->logits, w->V, w->text, end);
    if (w->D > 0) memcpy(witness_state(w, 0, begin), w->ws.hidden, batch.rows * w->d * sizeof(float));
}

/* Module k reads its next position, with this token and state; what it makes of them stands in ws.hidden, logits. */
static void witness_module(witness *w, size_t k, int32_t token, const float *state) {
    dsv3_batch batch;
    size_t position = w->modules[k - 1].length;
    memset(&batch, 0, sizeof batch);
    batch.rows = batch.outputs = 1;
    batch.token = &token;
    synth_demand(
        dsv3_mtp_forward(&w->context, w->logits, w->model, k, &w->modules[k - 1], 1, &batch, state, &w->ws, NULL),
        "module", NULL);
    if (k < w->D) memcpy(witness_state(w, k, position), w->ws.hidden, w->d * sizeof(float));
}

/* The modules learn text[N], and guess on from it: draft j at position N + j comes from module j, or from the last
 * one, one position further on each time, with its own state. Afterwards they know the text and nothing else. */
static void witness_guess(witness *w, size_t N) {
    int32_t *guess = w->guess + N * w->drafts;
    float *own = (float *)test_alloc(w->d * sizeof *own);
    int32_t *told = (int32_t *)test_alloc((w->room + w->drafts) * sizeof *told); /* the text, then guesses */
    memcpy(told, w->text, (N + 1) * sizeof *told);
    for (size_t j = 1; j <= w->drafts && N > 0; j++) {
        size_t k = j < w->D ? j : w->D;
        if (j <= w->D && j <= N) witness_module(w, j, w->text[N], witness_state(w, j - 1, N - j));
        for (size_t i = w->modules[k - 1].length; i < N + j - k; i++) {
            int32_t token = i + k <= N ? w->text[i + k] : guess[i + k - N - 1];
            witness_module(w, k, token, i < N ? witness_state(w, k - 1, i) : own);
        }
        guess[j - 1] = told[N + j] = most_probable(w->logits, w->V, told, N + j);
        memcpy(own, w->ws.hidden, w->d * sizeof(float));
    }
    for (size_t k = 1; k <= w->D; k++) dsv3_cache_truncate(&w->modules[k - 1], N + 1 > k ? N + 1 - k : 0, NULL);
    free(own), free(told);
}

/* Tokens [n] follow the text. */
static void witness_append(witness *w, const int32_t *token, size_t n) {
    if (w->length + n > w->room) fprintf(stderr, "witness: no room\n"), exit(2);
    for (size_t i = 0; i < n; i += w->chunk) {
        size_t begin = w->length, end = begin + (n - i < w->chunk ? n - i : w->chunk);
        memcpy(w->text + begin, token + i, (end - begin) * sizeof *token);
        w->length = end;
        witness_main(w, begin, end);
        for (size_t N = begin; N < end && w->drafts > 0; N++) witness_guess(w, N);
    }
}

/* Writes until the text has `length` tokens. */
static void witness_write(witness *w, size_t length) {
    while (w->length < length) witness_append(w, &w->next[w->length - 1], 1);
}

/* ---- Writers: sequences under test, each with the text it should have, and what it was before a step */

typedef struct writer {
    dsv3_sequence s;
    void *memory;
    int32_t *prompt;     /* exactly what was appended, freed as soon as it has been read */
    int32_t *text;       /* [length] appended and written */
    size_t length, goal; /* steps are taken until it is reached */
    witness *truth;      /* greedy text and guesses to be compared with; NULL: only the invariants */
    int ample;           /* bool: there is room for every draft that is asked for */
    int loose;           /* bool: guesses may differ from the witness's, texts not */
    int wrong;           /* checks that failed: the first one was printed */
    int inside;          /* times that the stop token was a draft */
    size_t promised;     /* tokens up to here are being appended again: the modules may know them already */
    size_t N, left;      /* before the step: positions in the cache, prompt to be read */
    uint64_t rng, steps, written, drafted[DSV3_MAX_DRAFTS], accepted[DSV3_MAX_DRAFTS];
} writer;

static void writer_expect(writer *w, int condition, int line, const char *what) {
    if (condition) return;
    if (w->wrong++ == 0) fprintf(stderr, "%s:%d: at token %d: %s\n", __FILE__, line, (int)w->length, what);
}
#define EXPECT(w, condition) writer_expect(w, (condition) != 0, __LINE__, #condition)

/* Steering, with the text that the writer should have. */
static dsv3_result writer_steer(void *user, float *logits, size_t V, const int32_t *text, size_t length,
                                size_t sequence) {
    writer *w = (writer *)user;
    if (w == NULL) return steering(NULL, logits, V, text, length, sequence);
    EXPECT(w, length >= w->length && length <= w->length + w->s.own->planned && text == w->s.history);
    for (size_t t = 0; t < w->length && t < length; t++) EXPECT(w, text[t] == w->text[t]);
    return steering(NULL, logits, V, text, length, sequence);
}

/* A sequence in a buffer of exactly its size, full of anything. */
static writer *writer_open(const dsv3_model *model, size_t capacity, dsv3_type type, size_t rows, size_t drafts) {
    writer *w = (writer *)test_alloc(sizeof *w);
    size_t bytes = 0;
    memset(w, 0, sizeof *w);
    memset(&w->s, 0xA5, sizeof w->s);
    synth_demand(dsv3_sequence_size(model, capacity, type, rows, drafts, &bytes, NULL), "sequence size", NULL);
    w->memory = synth_alloc(bytes);
    memset(w->memory, 0xA5, bytes);
    synth_demand(dsv3_sequence_init(model, &w->s, capacity, type, rows, drafts, w->memory, bytes, NULL), "sequence",
                 NULL);
    w->text = (int32_t *)test_alloc((capacity + 1) * sizeof *w->text);
    w->ample = 1;
    CHECK(w->s.steer == NULL);
    if (steering != NULL) w->s.steer = writer_steer;
    w->s.steer_user = w;
    return w;
}

static void writer_close(writer *w) {
    synth_release(w->memory);
    free(w->prompt), free(w->text), free(w);
}

/* Tokens [n] follow the text, from memory that lives no longer than it must. */
static void writer_append(writer *w, const dsv3_model *model, const int32_t *token, size_t n) {
    free(w->prompt);
    w->prompt = (int32_t *)test_alloc(n * sizeof *token);
    memcpy(w->prompt, token, n * sizeof *token);
    CHECK_EQ(dsv3_sequence_append(model, &w->s, w->prompt, n, NULL), DSV3_OK);
    memcpy(w->text + w->length, token, n * sizeof *token);
    w->length += n;
}

/* Rolls back to `length` tokens. Those that the sequence has not kept are appended again, and then extra [n]. Returns
 * how many were kept. */
static size_t writer_truncate(writer *w, const dsv3_model *model, size_t length, const int32_t *extra, size_t n) {
    size_t kept = SIZE_MAX, behind = w->s.n_modules > 0 ? w->s.n_modules : 1;
    int32_t *again = (int32_t *)test_alloc((length + n) * sizeof *again);
    EXPECT(w, dsv3_sequence_truncate(&w->s, length, &kept, NULL) == DSV3_OK);
    EXPECT(w, kept == length || kept == (length > behind ? length - behind : 0));
    EXPECT(w, dsv3_sequence_length(&w->s) == kept);
    EXPECT(w, w->s.prompt_left == 0);
    if (kept > length) exit(2);
    memcpy(again, w->text + kept, (length - kept) * sizeof *again);
    if (n > 0) memcpy(again + (length - kept), extra, n * sizeof *again);
    w->length = kept;
    w->promised = length;
    if (length - kept + n > 0) writer_append(w, model, again, length - kept + n);
    free(again);
    return kept;
}

/* What holds between steps. Module k has read position i only if t_{i+k} is known, and no position that the main
 * model has not; what it has yet to read is still in the rings. */
static void writer_invariants(writer *w) {
    const dsv3_sequence *s = &w->s;
    size_t known = s->cache.length + (s->pending != 0), told = known > w->promised ? known : w->promised;
    EXPECT(w, s->pending == 0 || s->pending == 1);
    EXPECT(w, s->cache.length <= s->cache.capacity);
    EXPECT(w, dsv3_sequence_length(s) == known);
    EXPECT(w, known + s->prompt_left == w->length);
    EXPECT(w, s->n_token == 0 || (s->pending && s->prompt_left == 0));
    EXPECT(w, s->n_token <= s->max_drafts + 1);
    for (size_t k = 1; k <= s->n_modules; k++) {
        EXPECT(w, s->modules[k - 1].length <= s->cache.length);
        EXPECT(w, s->modules[k - 1].length <= (told > k ? told - k : 0));
        EXPECT(w, s->cache.length + 1 - s->modules[k - 1].length <= s->own->window);
    }
}

static void writer_note(writer *w) {
    const dsv3_sequence *s = &w->s;
    w->N = s->cache.length;
    w->left = s->prompt_left;
    w->rng = s->rng.state;
    w->steps = s->steps;
    w->written = s->written;
    for (size_t j = 0; j < s->max_drafts; j++) w->drafted[j] = s->drafted[j], w->accepted[j] = s->accepted[j];
}

/* Drafts that a step has to make if there is room for all. */
static size_t writer_drafts(const writer *w) {
    size_t room = w->s.cache.capacity - w->N, drafts = w->s.drafts;
    if (drafts > w->s.max_drafts) drafts = w->s.max_drafts;
    if (w->left > 0 || w->N == 0 || room == 0) return 0;
    return drafts < room - 1 ? drafts : room - 1;
}

/* The step must have accepted what the witness guessed rightly, and counted it. */
static void writer_counts(writer *w, size_t first) {
    const dsv3_sequence *s = &w->s;
    const witness *t = w->truth;
    size_t p = s->own->planned, a = 0;
    int stopped = 0;
    int cut = p > 0 && !w->loose &&
              t->guess[(first - 1) * t->drafts + p - 1] == s->stop; /* nothing is drafted behind a stop token */
    if (w->ample && !s->adaptive && !cut) EXPECT(w, p == writer_drafts(w));
    EXPECT(w, p <= writer_drafts(w));
    if (w->loose) return;
    while (a < p && !stopped && t->guess[(first - 1) * t->drafts + a] == t->text[first + a]) {
        stopped = t->text[first + a] == s->stop;
        a++;
    }
    w->inside += stopped;
    EXPECT(w, s->n_token == a + !stopped);
    for (size_t j = 0; j < s->max_drafts; j++) {
        EXPECT(w, j == 0 || s->drafted[j] <= s->accepted[j - 1]);
        EXPECT(w, s->accepted[j] - w->accepted[j] == (j < a));
        EXPECT(w, s->drafted[j] - w->drafted[j] == (j < a || (j == a && a < p && !stopped)));
    }
}

/* Adds what the step wrote to the text, and compares it. */
static void writer_check(writer *w) {
    const dsv3_sequence *s = &w->s;
    size_t first = w->length;
    EXPECT(w, s->n_token == 0 || first + s->n_token <= s->cache.capacity + 1);
    if (first + s->n_token > s->cache.capacity + 1) return;
    for (size_t i = 0; i < s->n_token; i++) {
        w->text[w->length++] = s->token[i];
        EXPECT(w, i + 1 == s->n_token || s->token[i] != s->stop);
        EXPECT(w, s->history[w->length - 1] == s->token[i]);
        if (w->truth != NULL) EXPECT(w, w->length <= w->truth->length);
        if (w->truth != NULL && w->length <= w->truth->length)
            EXPECT(w, s->token[i] == w->truth->text[w->length - 1]);
    }
    EXPECT(w, s->steps - w->steps == (s->n_token > 0));
    EXPECT(w, s->written - w->written == s->n_token);
    if (s->n_token > 0) EXPECT(w, s->stopped == (s->token[s->n_token - 1] == s->stop));
    if (w->truth != NULL && s->n_token > 0) writer_counts(w, first);
    if (w->truth != NULL) EXPECT(w, s->rng.state == w->rng);
    writer_invariants(w);
    if (s->prompt_left == 0) {
        free(w->prompt);
        w->prompt = NULL;
    }
}

/* The first n positions of two caches: the same bits in all layers? */
static int same_rows(const dsv3_cache *a, const dsv3_cache *b, size_t n) {
    size_t row = a->width * dsv3_type_bytes(a->type);
    for (size_t l = 0; l < a->layers; l++) {
        const unsigned char *x = (const unsigned char *)a->data + l * a->capacity * row;
        const unsigned char *y = (const unsigned char *)b->data + l * b->capacity * row;
        if (n > 0 && memcmp(x, y, n * row) != 0) return 0;
    }
    return 1;
}

/* All caches hold what the witness's do, as far as they go. */
static int writer_caches(const writer *w) {
    int same = same_rows(&w->s.cache, &w->truth->cache, w->s.cache.length);
    for (size_t k = 0; k < w->s.n_modules; k++) {
        same = same && same_rows(&w->s.modules[k], &w->truth->modules[k], w->s.modules[k].length);
    }
    return same;
}

/* Most rows of a sequence in a step. */
static size_t widest(size_t rows, size_t drafts) { return rows > drafts + 1 ? rows : drafts + 1; }

/* ---- The desk: writers that take their steps together, with a context and a workspace */

typedef struct desk {
    const dsv3_model *model;
    dsv3_context context;
    dsv3_workspace ws;
    void *ws_memory;
    writer *w[MOST_WRITERS];
    size_t n;
    dsv3_error error;
} desk;

static desk *desk_open(const dsv3_model *model, dsv3_attention form, size_t rows, size_t threads) {
    desk *k = (desk *)test_alloc(sizeof *k);
    memset(k, 0, sizeof *k);
    k->model = model;
    k->context = context_of(form, threads);
    k->ws_memory = workspace_of(&k->ws, model, rows, threads);
    return k;
}

static writer *desk_add(desk *k, writer *w) {
    if (k->n == MOST_WRITERS) exit(2);
    return k->w[k->n++] = w;
}

static void desk_close(desk *k) {
    for (size_t i = 0; i < k->n; i++) writer_close(k->w[i]);
    synth_release(k->ws_memory);
    free(k);
}

/* dsv3_generate_step with logits of exact size, nothing else. */
static dsv3_result desk_call(desk *k, dsv3_sequence *const *list, size_t n) {
    size_t rows = 0;
    float *logits;
    dsv3_result result;
    for (size_t i = 0; i < n; i++) rows += list[i]->max_drafts + 1;
    logits = (float *)test_alloc(rows * (size_t)k->model->config.vocab_size * sizeof *logits);
    result = dsv3_generate_step(&k->context, logits, k->model, list, n, &k->ws, &k->error);
    free(logits);
    return result;
}

/* One step of these writers, whatever comes of it. */
static dsv3_result desk_try(desk *k, writer *const *w, size_t n) {
    dsv3_sequence *list[MOST_WRITERS] = {NULL};
    dsv3_result result;
    for (size_t i = 0; i < n; i++) {
        writer_note(w[i]);
        list[i] = &w[i]->s;
    }
    result = desk_call(k, list, n);
    for (size_t i = 0; i < n && result == DSV3_OK; i++) writer_check(w[i]);
    return result;
}

/* One step of the writers that have not reached their goals. Returns how many there are; 0: nothing was done. */
static size_t desk_step(desk *k) {
    writer *active[MOST_WRITERS];
    size_t n = 0;
    dsv3_result result;
    for (size_t i = 0; i < k->n; i++) {
        if (k->w[i]->length < k->w[i]->goal || k->w[i]->s.prompt_left > 0) active[n++] = k->w[i];
    }
    if (n == 0) return 0;
    result = desk_try(k, active, n);
    if (result == DSV3_OK) return n;
    CHECK_EQ(result, DSV3_OK);
    return 0;
}

/* Steps until every writer has `goal` tokens. */
static void desk_write(desk *k, size_t goal) {
    for (size_t i = 0; i < k->n; i++) k->w[i]->goal = goal;
    while (desk_step(k) > 0) {
    }
}

/* Are all texts as long as they should be, and right, and the caches behind them? */
static int desk_right(const desk *k) {
    int right = 1;
    for (size_t i = 0; i < k->n; i++) {
        const writer *w = k->w[i];
        right = right && w->wrong == 0 && w->length >= w->goal && (w->truth == NULL || w->loose || writer_caches(w));
    }
    return right;
}

/* ---- 1. Greedy text is that of plain decoding, whatever is drafted, in any company, by any number of threads */

#define TEXTS 20

/* Prompts from all over a novel, of 1 to 200 bytes, and their truths. */
typedef struct library {
    checkpoint model;
    size_t n, goal; /* texts; tokens to be written behind each prompt */
    int32_t prompt[TEXTS][200];
    size_t length[TEXTS];
    witness *truth[TEXTS];
} library;

static void library_prompts(library *l) {
    FILE *file = fopen("examples/text/austen.txt", "rb");
    long size;
    unsigned char bytes[200];
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) fprintf(stderr, "no examples/text/austen.txt\n"), exit(2);
    size = ftell(file);
    for (size_t i = 0; i < l->n; i++) {
        l->length[i] = 1 + i * 199 / (l->n - 1);
        if (fseek(file, size / (long)l->n * (long)i + 1000, SEEK_SET) != 0) exit(2);
        if (fread(bytes, 1, l->length[i], file) != l->length[i]) exit(2);
        for (size_t t = 0; t < l->length[i]; t++) l->prompt[i][t] = bytes[t];
    }
    fclose(file);
}

static library *library_open(const char *directory, size_t n, size_t goal) {
    library *l = (library *)test_alloc(sizeof *l);
    st_error error;
    memset(l, 0, sizeof *l);
    if (checkpoint_open(&l->model, directory, &error) != ST_OK) fprintf(stderr, "%s\n", error.message), exit(2);
    l->n = n;
    l->goal = goal;
    library_prompts(l);
    return l;
}

static void library_forget(library *l) {
    for (size_t i = 0; i < l->n; i++) {
        if (l->truth[i] != NULL) witness_close(l->truth[i]);
        l->truth[i] = NULL;
    }
}

/* chunk: prompt tokens read in one call; drafts: guesses wanted. */
static void library_truth(library *l, dsv3_attention form, dsv3_type type, size_t chunk, size_t drafts) {
    library_forget(l);
    for (size_t i = 0; i < l->n; i++) {
        size_t room = l->length[i] + l->goal + DSV3_MAX_DRAFTS + 1;
        l->truth[i] = witness_open(&l->model.model, form, type, room, chunk, drafts);
        witness_append(l->truth[i], l->prompt[i], l->length[i]);
        witness_write(l->truth[i], room);
    }
}

static void library_close(library *l) {
    library_forget(l);
    checkpoint_close(&l->model);
    free(l);
}

/* One way of writing the texts. */
typedef struct way {
    dsv3_attention form;
    dsv3_type type;
    size_t threads, drafts, rows; /* rows: prompt tokens read in one step */
    size_t ws_rows;               /* 0: as many as can be of use */
    int together, adaptive;       /* bool */
} way;

static writer *library_writer(const library *l, const way *y, size_t i) {
    writer *w = writer_open(&l->model.model, l->length[i] + l->goal + DSV3_MAX_DRAFTS, y->type, y->rows, y->drafts);
    w->truth = l->truth[i];
    w->ample = y->ws_rows == 0;
    w->loose = y->form == DSV3_ATTENTION_AUTO || y->drafts > l->truth[i]->drafts;
    w->s.adaptive = y->adaptive;
    w->goal = l->length[i] + l->goal;
    writer_append(w, &l->model.model, l->prompt[i], l->length[i]);
    return w;
}

typedef struct tally {
    uint64_t steps, written, accepted;
} tally;

static const char *const form_name[] = {"auto", "absorbed", "expanded"};

/* Texts [begin, end) written together. */
static void library_write(const library *l, const way *y, size_t begin, size_t end, tally *sum) {
    size_t each = widest(y->rows, y->drafts);
    desk *k = desk_open(&l->model.model, y->form, y->ws_rows ? y->ws_rows : each * (end - begin), y->threads);
    char line[200];
    for (size_t i = begin; i < end; i++) desk_add(k, library_writer(l, y, i));
    while (desk_step(k) > 0) {
    }
    snprintf(line, sizeof line, "texts %d to %d, %s, %s caches, %d threads, %d drafts, %d rows of %d", (int)begin,
             (int)end - 1, form_name[y->form], dsv3_type_name(y->type), (int)y->threads, (int)y->drafts, (int)y->rows,
             (int)k->ws.rows);
    test_count(desk_right(k), __FILE__, __LINE__, line);
    for (size_t i = 0; i < k->n; i++) {
        const dsv3_sequence *s = &k->w[i]->s;
        sum->steps += s->steps;
        sum->written += s->written;
        for (size_t j = 0; j < s->max_drafts; j++) sum->accepted += s->accepted[j];
    }
    desk_close(k);
}

/* All texts of the library, together or one after the other. */
static tally library_run(const library *l, const way *y) {
    tally sum = {0, 0, 0};
    size_t n = y->together ? l->n : 1;
    for (size_t i = 0; i < l->n; i += n) library_write(l, y, i, i + n, &sum);
    CHECK_EQ(sum.written, sum.steps + sum.accepted);          /* no stop token here */
    CHECK(y->drafts == 0 || sum.accepted > sum.written / 10); /* else little was tested */
    return sum;
}

/* From `least` to `most` drafts, alone and together, by one thread and by two; the texts must be those of the truth.
 * `all`: each with each, and a line about it; else alone by one thread and together by two. */
static void lossless(const library *l, dsv3_attention form, size_t least, size_t most, int all) {
    static const size_t drafts[] = {0, 1, 2, 3, 4, 7, 15};
    for (size_t i = 0; i < 4 * sizeof drafts / sizeof drafts[0]; i++) {
        way y = {form, DSV3_F32, 1, drafts[i / 4], l->truth[0]->chunk, 0, 0, 0};
        clock_t begin = clock();
        tally sum;
        y.threads = 1 + i % 2;
        y.together = i / 2 % 2;
        if (y.drafts < least || y.drafts > most || (!all && y.together != (y.threads == 2))) continue;
        sum = library_run(l, &y);
        if (!all) continue;
        printf("%s, %d threads, %s, %d drafts: %d tokens in %d steps, %.1f s\n", form_name[form], (int)y.threads,
               y.together ? "together" : "alone", (int)y.drafts, (int)sum.written, (int)sum.steps,
               (double)(clock() - begin) / CLOCKS_PER_SEC);
        fflush(stdout);
    }
}

static void test_micro(void) {
    size_t texts = test_light() ? 3 : TEXTS, goal = test_light() ? 48 : 300;
    library *l = library_open("examples/models/micro", texts, goal);
    library_truth(l, DSV3_ATTENTION_ABSORBED, DSV3_F32, 24, 15);
    lossless(l, DSV3_ATTENTION_ABSORBED, 0, 4, 0);
    l->goal = goal / 3;
    lossless(l, DSV3_ATTENTION_ABSORBED, 7, 15, 0);
    library_truth(l, DSV3_ATTENTION_AUTO, DSV3_F32, 48, 0); /* micro's chunks of 33 rows and more are expanded */
    lossless(l, DSV3_ATTENTION_AUTO, 4, 4, 0);
    l->goal = goal / 6;
    library_truth(l, DSV3_ATTENTION_EXPANDED, DSV3_F32, 24, 4);
    lossless(l, DSV3_ATTENTION_EXPANDED, 4, 4, 0);
    library_close(l);
}

/* Rounded activations: drafts must not show there, either, nor that the second half is written with packed weights. */
static void test_micro_fast(void) {
    library *l = library_open("examples/models/micro", test_light() ? 2 : 4, test_light() ? 24 : 60);
    dsv3_context ctx;
    size_t bytes;
    void *memory;
    computing = DSV3_FAST;
    ctx = context_of(DSV3_ATTENTION_ABSORBED, 1);
    library_truth(l, DSV3_ATTENTION_ABSORBED, DSV3_F32, 24, 4);
    lossless(l, DSV3_ATTENTION_ABSORBED, 1, 4, 0);
    synth_demand(dsv3_pack_size(&ctx, &l->model.model, &bytes, NULL), "pack size", NULL);
    memory = synth_alloc(bytes);
    CHECK_EQ(dsv3_pack(&ctx, &l->model.model, memory, bytes, NULL), DSV3_OK);
    lossless(l, DSV3_ATTENTION_ABSORBED, 1, 4, 0);
    library_truth(l, DSV3_ATTENTION_EXPANDED, DSV3_F32, 24, 4);
    lossless(l, DSV3_ATTENTION_EXPANDED, 2, 3, 0);
    computing = DSV3_EXACT;
    library_close(l);
    synth_release(memory);
}

/* All of it, for the patient. */
static void test_full(const char *directory) {
    library *l = library_open(directory, TEXTS, 300);
    library_truth(l, DSV3_ATTENTION_ABSORBED, DSV3_F32, 24, 4);
    lossless(l, DSV3_ATTENTION_ABSORBED, 1, 4, 1);
    l->goal = 100;
    lossless(l, DSV3_ATTENTION_ABSORBED, 7, 15, 1);
    l->goal = 60;
    library_truth(l, DSV3_ATTENTION_EXPANDED, DSV3_F32, 24, 4);
    lossless(l, DSV3_ATTENTION_EXPANDED, 1, 4, 0);
    library_truth(l, DSV3_ATTENTION_AUTO, DSV3_F32, 100, 0); /* austen's chunks of 65 rows and more are expanded */
    lossless(l, DSV3_ATTENTION_AUTO, 1, 4, 0);
    library_close(l);
}

/* ---- Random models: few tokens, so that guesses are right now and then */

static synth *random_model(int V, int D, uint64_t seed) {
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, V, 24, 28, 12, 2, 1);
    synth_attention(&c, 2, D % 2 ? 0 : 12, 10, 6, 4, 5);
    synth_experts(&c, 4, 1, 2, 2, 1, 1.5f);
    c.num_nextn_predict_layers = D;
    c.mtp_hidden = D == 2 ? DSV3_MTP_PRE_NORM : DSV3_MTP_POST_NORM;
    c.mtp_concat = D == 3 ? DSV3_MTP_HIDDEN_FIRST : DSV3_MTP_EMBED_FIRST;
    return synth_open(&c, D == 1 ? SYNTH_BF16 : SYNTH_F32, seed);
}

/* Greedy truth behind tokens [n], `more` tokens of it, in the form that all random models use. */
static witness *truth_of(const dsv3_model *model, dsv3_type type, size_t drafts, const int32_t *token, size_t n,
                         size_t more) {
    witness *w = witness_open(model, DSV3_ATTENTION_ABSORBED, type, n + more, 5, drafts);
    witness_append(w, token, n);
    witness_write(w, n + more);
    return w;
}

#define COMPANY 3

/* One way of writing behind three prompts. Sizes may leave no room for drafts, or for more than one row each. */
static void random_way(const dsv3_model *model, witness *const *truth, const size_t *n, const way *y) {
    size_t each = widest(y->rows, y->drafts);
    desk *k = desk_open(model, y->form, y->ws_rows ? y->ws_rows : COMPANY * each, y->threads);
    char line[200];
    for (size_t i = 0; i < COMPANY; i++) {
        writer *w = desk_add(k, writer_open(model, truth[i]->room, y->type, y->rows, y->drafts));
        w->truth = truth[i];
        w->ample = y->ws_rows == 0;
        w->s.adaptive = y->adaptive;
        w->s.draft_cost = 0.05f;
        writer_append(w, model, truth[i]->text, n[i]);
    }
    desk_write(k, 40);
    snprintf(line, sizeof line, "%d modules, %s caches, %d drafts%s, %d rows of %d", (int)model->n_mtp,
             dsv3_type_name(y->type), (int)y->drafts, y->adaptive ? " adaptive" : "", (int)y->rows, (int)k->ws.rows);
    test_count(desk_right(k), __FILE__, __LINE__, line);
    desk_close(k);
}

static void random_ways(const dsv3_model *model, dsv3_type type, uint64_t seed) {
    static const size_t n[COMPANY] = {1, 9, 23}, drafts[] = {0, 1, 2, 3, 5}, rows[] = {1, 2, 7};
    static const size_t ws_rows[] = {0, COMPANY, COMPANY + 2};
    witness *truth[COMPANY];
    int32_t token[23];
    test_state = seed;
    for (size_t i = 0; i < COMPANY; i++) {
        synth_tokens(token, n[i], model->config.vocab_size);
        truth[i] = truth_of(model, type, 5, token, n[i], 40 + 6);
    }
    for (size_t i = 0; i < 5 * 3 * 3 * 2; i++) {
        way y = {DSV3_ATTENTION_ABSORBED, type, 1, 0, 0, 0, 1, 0};
        y.drafts = drafts[i % 5];
        y.rows = rows[i / 5 % 3];
        y.ws_rows = ws_rows[i / 15 % 3];
        y.adaptive = i / 45 == 1;
        if (test_light() && i % 3 != 0) continue;
        random_way(model, truth, n, &y);
    }
    for (size_t i = 0; i < COMPANY; i++) witness_close(truth[i]);
}

static void test_random_models(void) {
    for (int D = 0; D <= 3; D++) {
        synth *s = random_model(5 + D, D, 400 + (uint64_t)D);
        random_ways(&s->model, DSV3_F32, 1);
        random_ways(&s->model, DSV3_BF16, 2);
        if (D == 3) {
            s->model.n_mtp = 2; /* a file with fewer modules than its config says */
            random_ways(&s->model, DSV3_F32, 3);
        }
        synth_close(s);
    }
}

/* Steered: the same of what the grammar allows. */
static void test_steered(void) {
    steering = steer_turns;
    for (int D = 1; D <= 3; D++) {
        synth *s = random_model(5 + D, D, 400 + (uint64_t)D);
        random_ways(&s->model, DSV3_F32, 4);
        synth_close(s);
    }
    steering = NULL;
}

/* ---- 2. Sampled text has the distribution of plain decoding */

#define TOKENS 6      /* most tokens of a vocabulary here */
#define CELLS 216     /* most continuations: TOKENS to the third */
#define STEM 7        /* tokens before the continuation */
#define UNLIKELY 1e-3 /* chance of a chi-square that fails a right distribution */

/* Q(a, x): the part of the gamma distribution above x, by its series or its continued fraction. */
static double gamma_above(double a, double x) {
    double front = exp(a * log(x) - x - lgamma(a)), sum = 1 / a, term = sum;
    double b = x + 1 - a, c = 1e300, d = 1 / b, h = d;
    if (x <= 0) return 1;
    for (int i = 1; i < 1000 && x < a + 1; i++) sum += term *= x / (a + i);
    if (x < a + 1) return 1 - front * sum;
    for (int i = 1; i < 1000; i++) { /* Lentz */
        double an = i * (a - i), delta;
        b += 2;
        d = 1 / (an * d + b);
        c = b + an / c;
        delta = c * d;
        h *= delta;
    }
    return front * h;
}

static void test_gamma(void) { /* tables of the chi-square distribution */
    static const float chi[] = {3.8415f, 18.307f, 124.342f, 6.6349f, 90.0f}, freedom[] = {1, 10, 100, 1, 100};
    static const float want[] = {0.05f, 0.05f, 0.05f, 0.01f, 0.7532f};
    for (int i = 0; i < 5; i++) {
        double got = gamma_above((double)freedom[i] / 2, (double)chi[i] / 2);
        CHECK(fabs(got - (double)want[i]) < 2e-4);
    }
}

/* How likely a right distribution p [n] would differ more from the counts. 0 when something impossible was seen.
 * Cells too rare for the approximation are counted together. */
static double chi_square(const double *p, const int *seen, size_t n) {
    double draws = 0, chi = 0, freedom = -1, rare = 0, rare_seen = 0;
    for (size_t i = 0; i < n; i++) draws += seen[i];
    for (size_t i = 0; i < n; i++) {
        double want = p[i] * draws;
        if (p[i] <= 0 && seen[i] > 0) return 0;
        if (want < 10) {
            rare += want;
            rare_seen += seen[i];
        } else {
            chi += (seen[i] - want) * (seen[i] - want) / want;
            freedom++;
        }
    }
    if (rare >= 5) {
        chi += (rare_seen - rare) * (rare_seen - rare) / rare;
        freedom++;
    } else if (rare_seen > 30) {
        return 0;
    }
    return freedom < 1 ? 1 : gamma_above(freedom / 2, chi / 2);
}

/* p [V] = softmax(logits / temperature) restricted to the nucleus, in double, by looking for the best again and
 * again. Returns how clear the border of the nucleus is. */
static double nucleus(double *p, const float *logits, size_t V, double temperature, double top_p) {
    double e[TOKENS], top = -INFINITY, sum = 0, kept = 0, margin = 1;
    int taken[TOKENS] = {0};
    for (size_t i = 0; i < V; i++) top = fmax(top, (double)logits[i]);
    for (size_t i = 0; i < V; i++) sum += e[i] = exp(((double)logits[i] - top) / temperature);
    while (kept < top_p - 1e-9) {
        size_t best = V;
        for (size_t i = 0; i < V; i++) {
            if (!taken[i] && (best == V || e[i] > e[best])) best = i;
        }
        if (best == V) break;
        taken[best] = 1;
        kept += e[best] / sum;
        if (top_p < 1) margin = fmin(margin, fabs(kept - top_p));
    }
    for (size_t i = 0; i < V; i++) p[i] = taken[i] ? e[i] / sum / kept : 0;
    return margin;
}

/* As small as a model can be: tens of thousands of texts are drawn from it. */
static synth *tiny_model(int V, int D, uint64_t seed) {
    dsv3_config c = dsv3_config_default();
    synth_sizes(&c, V, 8, 8, 0, 1, 1);
    synth_attention(&c, 1, 0, 4, 4, 2, 4);
    synth_experts(&c, 0, 0, 0, 1, 1, 1.0f);
    c.moe_layer_freq = 64; /* the modules are dense, too */
    c.num_nextn_predict_layers = D;
    return synth_open(&c, SYNTH_F32, seed);
}

/* A random model, a text, and what may follow it. */
typedef struct odds {
    synth *s;
    size_t V;
    float temperature, top_p;
    int32_t text[STEM + 3];
    double margin;   /* how clear every nucleus was */
    double p[CELLS]; /* [V, V, V] of the next three tokens */
    double q[TOKENS];
} odds;

/* The main model's distribution behind the first n tokens of the text. */
static void odds_main(odds *o, double *p, size_t n) {
    witness *w = truth_of(&o->s->model, DSV3_F32, 0, o->text, n, 0); /* its logits are steered */
    o->margin = fmin(o->margin, nucleus(p, w->logits, o->V, (double)o->temperature, (double)o->top_p));
    witness_close(w);
}

/* Three tokens, all possibilities; and the first module's opinion on the first of them. */
static void odds_make(odds *o, float temperature, float top_p) {
    double p[3][TOKENS];
    size_t V = o->V;
    witness *w = truth_of(&o->s->model, DSV3_F32, 1, o->text, STEM, 0);
    o->temperature = temperature;
    o->top_p = top_p;
    o->margin = nucleus(o->q, w->logits, V, (double)temperature, (double)top_p);
    witness_close(w);
    odds_main(o, p[0], STEM);
    for (size_t a = 0; a < V; a++) {
        o->text[STEM] = (int32_t)a;
        odds_main(o, p[1], STEM + 1);
        for (size_t b = 0; b < V; b++) {
            o->text[STEM + 1] = (int32_t)b;
            odds_main(o, p[2], STEM + 2);
            for (size_t c = 0; c < V; c++) o->p[(a * V + b) * V + c] = p[0][a] * p[1][b] * p[2][c];
        }
    }
    CHECK(o->margin > 1e-5); /* else rounding may decide what belongs to a nucleus: take another seed */
}

enum { STEM_FRESH, STEM_BACK, STEM_BEHIND, STEM_PASTS };

/* The text up to its last token, which is pending. It may have been longer and rolled back, or its last tokens may
 * have been written without drafts: then states and drafts of other steps are left over, and must not be used. */
static writer *odds_stem(odds *o, desk *k, size_t drafts, int past) {
    writer *w = desk_add(k, writer_open(&o->s->model, STEM + 8, DSV3_F32, 8, drafts));
    writer_append(w, &o->s->model, o->text, 2);
    if (past == STEM_BACK) {
        w->s.temperature = 2;
        while (w->s.modules[0].length < STEM - 1) desk_write(k, w->length + 1);
        CHECK_EQ(writer_truncate(w, &o->s->model, STEM, NULL, 0), STEM);
    }
    if (past == STEM_BEHIND) w->s.drafts = 0;
    while (w->length < STEM) {
        if (w->s.drafts > STEM - w->length - 1) w->s.drafts = STEM - w->length - 1;
        desk_write(k, w->length + 1);
    }
    memcpy(o->text, w->text, STEM * sizeof *w->text);
    return w;
}

static const double uniform_step = 1.0 / 9007199254740992.0; /* 2^-53 */
static double uniform(void) { return (double)(test_random() >> 11) * uniform_step; }
static double uniform_of(dsv3_rng *rng) { return (double)(dsv3_random(rng) >> 11) * uniform_step; }

/* Draws of three tokens behind the stem. seen [V, V, V]; accepted: how often the first step's first draft was. */
static void odds_draw(const odds *o, desk *k, const writer *stem, size_t drafts, int draws, int *seen,
                      int *accepted) {
    writer *w = writer_open(&o->s->model, STEM + 8, DSV3_F32, 8, stem->s.max_drafts);
    dsv3_sequence *list[1];
    int failed = 0;
    list[0] = &w->s;
    memset(seen, 0, CELLS * sizeof *seen);
    *accepted = 0;
    for (int i = 0; i < draws; i++) {
        size_t cell = 0, n = 0;
        failed += dsv3_sequence_copy(&w->s, &stem->s, NULL) != DSV3_OK;
        w->s.temperature = o->temperature;
        w->s.top_p = o->top_p;
        w->s.drafts = drafts;
        w->s.rng.state = test_random();
        w->s.steer_user = NULL; /* not the stem */
        while (n < 3) {
            uint64_t before = drafts > 0 ? w->s.accepted[0] : 0;
            failed += desk_call(k, list, 1) != DSV3_OK || w->s.n_token == 0;
            if (failed) break;
            if (n == 0 && drafts > 0) *accepted += w->s.accepted[0] > before;
            for (size_t t = 0; t < w->s.n_token && n < 3; t++, n++) cell = cell * o->V + (size_t)w->s.token[t];
        }
        if (failed) break;
        seen[cell]++;
    }
    CHECK_EQ(failed, 0);
    writer_close(w);
}

/* The first draft is accepted with probability sum min(p, q). */
static void odds_accepted(const odds *o, int accepted, int draws) {
    double want = 0, p[TOKENS] = {0};
    for (size_t i = 0; i < o->V * o->V * o->V; i++) p[i / (o->V * o->V)] += o->p[i];
    for (size_t i = 0; i < o->V; i++) want += fmin(p[i], o->q[i]);
    CHECK(fabs(accepted - draws * want) <= 4 * sqrt(draws * want * (1 - want)) + 1);
}

/* ---- The same test must tell a right rule of acceptance from wrong ones. Here the rules are written once more, over
 * the tables p and q of a model, with one draft. */

enum { RULE_RIGHT, RULE_ALWAYS, RULE_P, RULE_REPLACE_P, RULES };

static size_t pick(const double *p, size_t V) {
    double u = uniform(), sum = 0;
    size_t last = 0;
    for (size_t i = 0; i < V; i++) {
        if (p[i] <= 0) continue;
        last = i;
        sum += p[i];
        if (sum > u) break;
    }
    return last;
}

/* A token by drafting from q [V] and verifying with p [V]. */
static size_t pick_by_rule(int rule, const double *p, const double *q, size_t V) {
    double rest[TOKENS], sum = 0;
    size_t draft = pick(q, V);
    double chance = rule == RULE_ALWAYS ? 1 : rule == RULE_P ? p[draft] : fmin(1, p[draft] / q[draft]);
    if (uniform() < chance) return draft;
    if (rule == RULE_REPLACE_P) return pick(p, V);
    for (size_t i = 0; i < V; i++) sum += rest[i] = fmax(0, p[i] - q[i]);
    for (size_t i = 0; i < V; i++) rest[i] /= sum;
    return pick(rest, V);
}

/* The p-value of three tokens of which the first is drafted. */
static double rule_p_value(const odds *o, int rule, int draws) {
    int seen[CELLS] = {0};
    size_t V = o->V, square = V * V;
    double first[TOKENS] = {0}, rest[CELLS];
    for (size_t i = 0; i < V * square; i++) first[i / square] += o->p[i];
    for (int i = 0; i < draws; i++) {
        size_t a = pick_by_rule(rule, first, o->q, V), n = 0;
        double u = uniform(), sum = 0;
        for (size_t j = 0; j < square; j++) rest[j] = first[a] > 0 ? o->p[a * square + j] / first[a] : 0;
        for (n = 0; n + 1 < square; n++) {
            if ((sum += rest[n]) > u) break;
        }
        seen[a * square + n]++;
    }
    return chi_square(o->p, seen, V * square);
}

static void test_rules(const odds *o, int draws) {
    test_state = 5;
    for (int rule = 0; rule < RULES; rule++) {
        double p = rule_p_value(o, rule, draws);
        char line[100];
        snprintf(line, sizeof line, "%d tokens, temperature %g, top_p %g, rule %d: p %.2g", (int)o->V,
                 (double)o->temperature, (double)o->top_p, rule, p);
        test_count(rule == RULE_RIGHT ? p > UNLIKELY : p < UNLIKELY, __FILE__, __LINE__, line);
    }
}

static void test_distribution(int V, int D, uint64_t seed, int past, float temperature, float top_p) {
    odds o;
    int seen[CELLS], accepted, draws = test_light() ? 2000 : 20000;
    desk *k;
    writer *stem;
    memset(&o, 0, sizeof o);
    o.s = tiny_model(V, D, seed);
    o.V = (size_t)V;
    synth_tokens(o.text, STEM, V);
    k = desk_open(&o.s->model, DSV3_ATTENTION_ABSORBED, 4, 1);
    stem = odds_stem(&o, k, 3, past);
    odds_make(&o, temperature, top_p);
    test_rules(&o, 20000);
    for (size_t drafts = 0; drafts <= 3; drafts++) {
        char line[200];
        double p;
        test_state = 1000 + drafts;
        odds_draw(&o, k, stem, drafts, draws, seen, &accepted);
        p = chi_square(o.p, seen, o.V * o.V * o.V);
        snprintf(line, sizeof line, "%d tokens, %d modules, temperature %g, top_p %g, %d drafts: p %.2g", V, D,
                 (double)temperature, (double)top_p, (int)drafts, p);
        test_count(p > UNLIKELY, __FILE__, __LINE__, line);
        if (drafts > 0) odds_accepted(&o, accepted, draws);
    }
    desk_close(k);
    synth_close(o.s);
}

static void test_distributions(void) {
    test_gamma();
    steering = steer_turns;
    test_distribution(5, 1, 82, STEM_FRESH, 1, 1);
    test_distribution(6, 2, 83, STEM_BACK, 1.7f, 0.9f);
    steering = NULL;
    test_distribution(5, 1, 82, STEM_FRESH, 1, 1);
    test_distribution(6, 2, 83, STEM_BACK, 1.7f, 1);
    test_distribution(3, 3, 84, STEM_BACK, 0.7f, 0.9f);
    test_distribution(4, 2, 81, STEM_BEHIND, 1, 0.8f);
    test_distribution(5, 1, 82, STEM_BACK, 1.7f, 0.6f);
}

/* Texts drawn alone, in company and by two threads: each sequence has random numbers of its own. */
static void sampled_text(const dsv3_model *model, int32_t *text, size_t which, size_t n, int together,
                         size_t threads) {
    desk *k = desk_open(model, DSV3_ATTENTION_ABSORBED, 40, threads);
    for (size_t i = 0; i < COMPANY; i++) {
        static const int32_t token[COMPANY] = {1, 0, 2};
        writer *w;
        if (!together && i != which) continue;
        w = desk_add(k, writer_open(model, n + 8, DSV3_F32, 4, 3));
        w->s.temperature = i == 1 ? 0.0f : 1.3f;
        w->s.top_p = i == 2 ? 0.9f : 1.0f;
        w->s.rng.state = 100 + i;
        writer_append(w, model, &token[i], 1);
    }
    desk_write(k, n);
    CHECK(desk_right(k));
    memcpy(text, k->w[together ? which : 0]->text, n * sizeof *text);
    desk_close(k);
}

static void test_sampled_company(void) {
    synth *s = random_model(7, 2, 13);
    enum { N = 60 };
    for (size_t which = 0; which < COMPANY; which++) {
        int32_t alone[N], other[N];
        sampled_text(&s->model, alone, which, N, 0, 1);
        for (size_t threads = 1; threads <= 2; threads++) {
            sampled_text(&s->model, other, which, N, 1, threads);
            CHECK(memcmp(alone, other, sizeof alone) == 0);
        }
    }
    synth_close(s);
}

/* ---- 3. State: rolling back, forks, turns of a conversation */

#define WRITTEN 34 /* tokens of the text that is rolled back */

/* A copy of a writer, text and all; its own truth must be given to it. */
static writer *writer_fork(const writer *from, const dsv3_model *model, size_t rows, size_t drafts) {
    writer *w = writer_open(model, from->s.cache.capacity, from->s.cache.type, rows, drafts);
    CHECK_EQ(dsv3_sequence_copy(&w->s, &from->s, NULL), DSV3_OK);
    memcpy(w->text, from->text, from->length * sizeof *w->text);
    w->length = from->length;
    w->promised = from->promised;
    w->wrong = from->wrong;
    writer_invariants(w);
    return w;
}

typedef struct roll {
    const dsv3_model *model;
    dsv3_type type;
    size_t drafts, rows;
    int lag;       /* the last tokens were written without drafts: the modules have fallen behind */
    int near, far; /* what came of it: truncations that kept all, and that did not */
    desk *k;
    writer *master;
} roll;

/* Rolls a copy of the master back to `length`, goes on with extra [n], and compares with the truth of that text. */
static void roll_back(roll *r, size_t length, const int32_t *extra, size_t n) {
    writer *w = writer_fork(r->master, r->model, r->rows, r->drafts);
    int32_t text[WRITTEN + 32];
    size_t kept;
    witness *truth;
    memcpy(text, w->text, length * sizeof *text);
    memcpy(text + length, extra, n * sizeof *text);
    truth = truth_of(r->model, r->type, r->drafts, text, length + n, 12 + r->drafts + 1);
    kept = writer_truncate(w, r->model, length, extra, n);
    r->near += kept == length;
    r->far += kept != length;
    if (length + 1 + (r->drafts > 0) + widest(r->rows, r->drafts) > r->master->length + r->drafts) {
        CHECK_EQ(kept, length); /* that far the rings reach */
    }
    w->truth = truth;
    r->k->w[0] = w;
    r->k->n = 1;
    desk_write(r->k, length + n + 12);
    CHECK(desk_right(r->k));
    r->k->n = 0;
    writer_close(w);
    witness_close(truth);
}

static void roll_everywhere(roll *r) {
    static const int32_t prompt[9] = {1, 3, 0, 2, 2, 4, 1, 0, 3}, other[2] = {4, 2};
    r->k = desk_open(r->model, DSV3_ATTENTION_ABSORBED, widest(r->rows, r->drafts), 1);
    r->master = desk_add(r->k, writer_open(r->model, WRITTEN + 32, r->type, r->rows, r->drafts));
    writer_append(r->master, r->model, prompt, 9);
    desk_write(r->k, WRITTEN - (r->lag ? 6 : 0));
    if (r->lag) r->master->s.drafts = 0;
    desk_write(r->k, WRITTEN);
    r->master->s.drafts = r->drafts;
    for (size_t length = 0; length <= r->master->length && length <= WRITTEN; length++) {
        roll_back(r, length, prompt, length == 0 ? 3 : 0);
        roll_back(r, length, other, 2);
    }
    r->k->n = 0;
    writer_close(r->master);
    desk_close(r->k);
}

static void test_roll_back(void) {
    int near = 0, far = 0;
    for (int D = 0; D <= 3; D++) {
        synth *s = random_model(5, D, 500 + (uint64_t)D);
        for (int variant = 0; variant < (test_light() ? 2 : 4); variant++) {
            roll r = {NULL, DSV3_F32, 0, 3, 0, 0, 0, NULL, NULL};
            r.model = &s->model;
            r.type = variant % 2 ? DSV3_BF16 : DSV3_F32;
            r.drafts = (size_t)D + (variant / 2 && D > 0 ? 2 : 0);
            r.rows = variant % 2 ? 9 : 2;
            r.lag = variant % 2;
            roll_everywhere(&r);
            near += r.near;
            far += r.far;
        }
        synth_close(s);
    }
    CHECK(near > 100 && far > 100);
}

/* A long life: steps with any number of drafts, turns, cuts anywhere (in the middle of a prompt, too), forks. After
 * each of them, what is written and how many drafts are accepted is what a fresh start gives. */
typedef struct life {
    const dsv3_model *model;
    dsv3_type type;
    desk *k;
    writer *w;
    witness *truth;
    size_t drafts, rows;
    size_t cuts, turns, forks, unread;
} life;

#define LIFE 90 /* positions */


/* Whatever the text is now, the truth behind it. */
static void life_truth(life *f) {
    if (f->truth != NULL) witness_close(f->truth);
    f->truth = truth_of(f->model, f->type, f->drafts, f->w->text, f->w->length, 8 * (f->drafts + 1));
    f->w->truth = f->truth;
}

static void life_steps(life *f, size_t n) {
    f->w->s.drafts = test_below(f->drafts + 2); /* one more than there are */
    f->w->s.adaptive = test_below(4) == 0;
    for (size_t i = 0; i < n; i++) {
        if (f->w->length >= LIFE - f->drafts && f->w->s.prompt_left == 0) return;
        f->w->goal = f->w->length + 1;
        desk_step(f->k);
    }
}

static void life_cut(life *f) {
    int32_t extra[4];
    size_t length, n = test_below(5), have = dsv3_sequence_length(&f->w->s);
    f->unread += f->w->s.prompt_left > 0;
    synth_tokens(extra, 4, f->model->config.vocab_size);
    length = test_below(3) > 0 && have > 6 ? have - test_below(6) : test_below(have + 1);
    if (n == 0 && (length == 0 || (length == have && !f->w->s.pending)))
        n = 1; /* else there is nothing to go on from */
    writer_truncate(f->w, f->model, length, extra, n);
    f->cuts++;
}

static void life_turn(life *f) {
    int32_t token[12];
    size_t n = 1 + test_below(12);
    if (f->w->s.prompt_left > 0 || f->w->length + n > LIFE - 8) return;
    synth_tokens(token, n, f->model->config.vocab_size);
    writer_append(f->w, f->model, token, n);
    f->turns++;
}

static void life_fork(life *f) {
    writer *w = writer_fork(f->w, f->model, f->rows, f->drafts);
    w->prompt = f->w->prompt; /* the copy reads on in the same memory */
    f->w->prompt = NULL;
    writer_close(f->w);
    f->w = f->k->w[0] = w;
    f->forks++;
}

static void live(life *f, size_t events) {
    static const int32_t first[1] = {2};
    f->k = desk_open(f->model, DSV3_ATTENTION_ABSORBED, widest(f->rows, f->drafts), 1);
    f->w = desk_add(f->k, writer_open(f->model, LIFE, f->type, f->rows, f->drafts));
    writer_append(f->w, f->model, first, 1);
    for (size_t i = 0; i < events && f->w->wrong == 0; i++) {
        switch (test_below(5)) {
        case 0: life_turn(f); break;
        case 1:
        case 2: life_cut(f); break;
        case 3: life_fork(f); break;
        default: break;
        }
        if (f->w->length + 8 * (f->drafts + 1) > LIFE - f->drafts) writer_truncate(f->w, f->model, 5, first, 1);
        life_truth(f);
        life_steps(f, 1 + test_below(7));
        CHECK(writer_caches(f->w));
    }
    CHECK_EQ(f->w->wrong, 0);
    witness_close(f->truth);
    desk_close(f->k);
}

static void test_long_lives(void) {
    for (int i = 0; i < (test_light() ? 6 : 16); i++) {
        int D = i % 4;
        synth *s = random_model(4 + i % 3, D, 600 + (uint64_t)D);
        life f;
        memset(&f, 0, sizeof f);
        f.model = &s->model;
        f.type = i % 5 == 0 ? DSV3_BF16 : DSV3_F32;
        f.drafts = D == 0 ? 0 : (size_t)D + (size_t)(i / 4 % 3);
        f.rows = 1 + (size_t)(i * 5 % 9);
        test_state = 900 + (uint64_t)i;
        live(&f, test_light() ? 40 : 80);
        CHECK(f.cuts > 5 && f.turns > 1 && f.forks > 2);
        CHECK(f.rows > 3 || f.unread > 0);
        synth_close(s);
    }
}

/* Modules that read a prompt in chunks of any size, or token by token, keep the same bits. */
static void test_chunks(void) {
    static const size_t rows[] = {1, 2, 7, 64};
    int32_t prompt[40];
    synth *s = random_model(6, 3, 31);
    synth_tokens(prompt, 40, 6);
    for (int form = DSV3_ATTENTION_ABSORBED; form <= DSV3_ATTENTION_EXPANDED; form++) {
        for (int bf16 = 0; bf16 < 2; bf16++) {
            dsv3_type type = bf16 ? DSV3_BF16 : DSV3_F32;
            witness *truth = witness_open(&s->model, (dsv3_attention)form, type, 60, 11, 3);
            desk *k = desk_open(&s->model, (dsv3_attention)form, 4 * 64, 1);
            witness_append(truth, prompt, 40);
            witness_write(truth, 60);
            for (size_t i = 0; i < 4; i++) {
                writer *w = desk_add(k, writer_open(&s->model, 60, type, rows[i], 3));
                w->truth = truth;
                writer_append(w, &s->model, prompt, 40);
            }
            desk_write(k, 44);
            CHECK(desk_right(k));
            for (size_t i = 0; i < 4; i++) CHECK(k->w[i]->s.modules[2].length >= 38);
            desk_close(k);
            witness_close(truth);
        }
    }
    synth_close(s);
}

/* A conversation of three turns is the text of all three. */
static void test_turns(void) {
    synth *s = random_model(6, 2, 32);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 16, 1);
    writer *w = desk_add(k, writer_open(&s->model, 100, DSV3_F32, 5, 4)), *fresh;
    witness *truth;
    int32_t said[9];
    for (size_t turn = 0; turn < 3; turn++) {
        synth_tokens(said, 9, 6);
        if (turn > 0) CHECK(w->s.pending); /* what was written last is read together with what is said next */
        writer_append(w, &s->model, said, 3 * (turn + 1));
        truth = truth_of(&s->model, DSV3_F32, 4, w->text, w->length, 20);
        w->truth = truth;
        desk_write(k, w->length + 11);
        CHECK(desk_right(k));
        witness_close(truth);
    }
    fresh = desk_add(k, writer_open(&s->model, 100, DSV3_F32, 64, 4));
    fresh->truth = truth = truth_of(&s->model, DSV3_F32, 4, w->text, w->length - 1, 40);
    writer_append(fresh, &s->model, w->text, w->length - 1);
    desk_write(k, w->length); /* its first token is the last one of the conversation */
    w->truth = truth;
    desk_write(k, w->length + 20);
    CHECK(desk_right(k));
    CHECK(w->length == fresh->length && memcmp(w->text, fresh->text, w->length * sizeof *w->text) == 0);
    CHECK(same_rows(&w->s.modules[0], &fresh->s.modules[0], w->s.modules[0].length));
    desk_close(k);
    witness_close(truth);
    synth_close(s);
}

/* Forks go on alike, then each its own way, by random numbers of their own. */
static void test_forks(void) {
    static const int32_t prompt[5] = {1, 4, 0, 2, 3}, other[2] = {5, 5};
    synth *s = random_model(6, 2, 33);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 16, 1);
    writer *a = desk_add(k, writer_open(&s->model, 80, DSV3_BF16, 5, 3)), *b;
    a->s.temperature = 1.5f;
    writer_append(a, &s->model, prompt, 5);
    desk_write(k, 20);
    b = desk_add(k, writer_fork(a, &s->model, 5, 3));
    CHECK(b->s.steps == a->s.steps && b->s.accepted[0] == a->s.accepted[0] && b->s.rng.state == a->s.rng.state);
    CHECK(b->s.n_token == a->s.n_token && memcmp(b->s.token, a->s.token, a->s.n_token * sizeof *a->s.token) == 0);
    desk_write(k, 40);
    CHECK(a->length == b->length && memcmp(a->text, b->text, a->length * sizeof *a->text) == 0);
    CHECK(a->s.accepted[0] == b->s.accepted[0] && a->s.drafted[2] == b->s.drafted[2]);
    b->s.rng.state = 99;
    desk_write(k, 60);
    CHECK(memcmp(a->text, b->text, 60 * sizeof *a->text) != 0);
    a->s.temperature = b->s.temperature = 0;
    writer_append(b, &s->model, other, 2);
    a->truth = truth_of(&s->model, DSV3_BF16, 3, a->text, a->length, 16);
    b->truth = truth_of(&s->model, DSV3_BF16, 3, b->text, b->length, 16);
    desk_write(k, 70);
    CHECK(desk_right(k));
    witness_close(a->truth), witness_close(b->truth);
    desk_close(k);
    synth_close(s);
}

static void test_truncate_edges(void) {
    static const int32_t prompt[8] = {1, 4, 0, 2, 3, 1, 0, 5};
    synth *s = random_model(6, 1, 34);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 8, 1);
    writer *w = desk_add(k, writer_open(&s->model, 40, DSV3_F32, 3, 2));
    size_t kept = 7;
    CHECK_EQ(dsv3_sequence_length(&w->s), 0);
    CHECK_EQ(dsv3_sequence_truncate(&w->s, 0, &kept, NULL), DSV3_OK); /* nothing, of nothing */
    CHECK_EQ(kept, 0);
    CHECK_EQ(dsv3_sequence_truncate(&w->s, 1, &kept, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_truncate(NULL, 0, &kept, NULL), DSV3_ERR_ARG);
    writer_append(w, &s->model, prompt, 8);
    CHECK_EQ(dsv3_sequence_length(&w->s), 0);
    CHECK_EQ(desk_step(k), 1);
    CHECK(dsv3_sequence_length(&w->s) == 3 && w->s.prompt_left == 5 && w->s.n_token == 0 && !w->s.pending);
    CHECK_EQ(dsv3_sequence_truncate(&w->s, 4, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(w->s.prompt_left, 5); /* still there */
    CHECK_EQ(writer_truncate(w, &s->model, 3, NULL, 0), 3);
    CHECK_EQ(dsv3_sequence_state(&w->s), DSV3_STATE_WRITING); /* it goes on from its last token */
    CHECK_EQ(dsv3_sequence_truncate(&w->s, 1, NULL, NULL), DSV3_OK);
    w->length = 1;
    w->truth = truth_of(&s->model, DSV3_F32, 2, prompt, 1, 30);
    CHECK(w->s.pending && w->s.cache.length == 0); /* no state to draft from */
    CHECK_EQ(desk_try(k, k->w, 1), DSV3_OK);
    CHECK_EQ(w->s.n_token, 1);
    desk_write(k, 20);
    CHECK_EQ(writer_truncate(w, &s->model, 0, prompt, 1), 0);
    desk_write(k, 20);
    CHECK(desk_right(k));
    witness_close(w->truth);
    desk_close(k);
    synth_close(s);
}

/* ---- 4. Where writing ends, how much is drafted */

static void test_stop(void) {
    static const int32_t prompt[4] = {3, 0, 2, 1};
    synth *s = random_model(6, 2, 35);
    witness *truth = truth_of(&s->model, DSV3_F32, 5, prompt, 4, 80);
    int inside = 0;
    for (int32_t stop = -1; stop < 6; stop++) {
        for (size_t drafts = 0; drafts <= 5; drafts++) {
            desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 8, 1);
            writer *w = desk_add(k, writer_open(&s->model, 84, DSV3_F32, 3, drafts));
            CHECK_EQ(w->s.stop, -1);
            w->s.stop = stop;
            w->truth = truth;
            writer_append(w, &s->model, prompt, 4);
            for (w->goal = 70; desk_step(k) > 0; w->s.stopped = 0) { /* on from each, as if it were none */
            }
            CHECK(desk_right(k));
            inside += w->inside;
            desk_close(k);
        }
    }
    CHECK(inside > 20);
    witness_close(truth);
    s->config.eos_token_id = s->model.config.eos_token_id = 4;
    {
        writer *w = writer_open(&s->model, 8, DSV3_F32, 3, 1);
        CHECK_EQ(w->s.stop, 4);
        writer_close(w);
    }
    synth_close(s);
}

/* capacity + 1 tokens, of which the last is never read; others in the batch go on. */
static void test_full_context(void) {
    static const size_t capacity[COMPANY] = {12, 1, 31};
    static const int32_t prompt[COMPANY] = {3, 0, 2}, more[1] = {1};
    synth *s = random_model(6, 3, 36);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 24, 1);
    dsv3_result result = DSV3_OK;
    for (size_t i = 0; i < COMPANY; i++) {
        writer *w = desk_add(k, writer_open(&s->model, capacity[i], DSV3_F32, 3, 4));
        w->truth = truth_of(&s->model, DSV3_F32, 4, &prompt[i], 1, capacity[i] + 4);
        w->goal = capacity[i] + 1;
        writer_append(w, &s->model, &prompt[i], 1);
    }
    for (int i = 0; i < 100 && result == DSV3_OK; i++) result = desk_try(k, k->w, COMPANY);
    CHECK_EQ(result, DSV3_ERR_FULL);
    CHECK_EQ(k->error.code, DSV3_ERR_FULL);
    CHECK(desk_right(k));
    for (size_t i = 0; i < COMPANY; i++) {
        writer *w = k->w[i];
        CHECK(w->length == capacity[i] + 1 && w->s.cache.length == capacity[i] && w->s.pending);
        CHECK_EQ(dsv3_sequence_append(&s->model, &w->s, more, 1, NULL), DSV3_ERR_FULL);
        if (capacity[i] > 6) writer_truncate(w, &s->model, capacity[i] - 5, NULL, 0);
    }
    while (desk_step(k) > 0) { /* and once more */
    }
    CHECK(desk_right(k));
    for (size_t i = 0; i < COMPANY; i++) {
        CHECK_EQ(k->w[i]->length, capacity[i] + 1);
        witness_close(k->w[i]->truth);
    }
    desk_close(k);
    synth_close(s);
}

static void test_drafts_change(void) {
    static const size_t drafts[] = {0, 4, 1, 9, 0, 2};
    static const int32_t prompt[4] = {3, 0, 2, 1};
    synth *s = random_model(6, 2, 37);
    witness *truth = truth_of(&s->model, DSV3_F32, 4, prompt, 4, 90);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 8, 1);
    writer *w = desk_add(k, writer_open(&s->model, 94, DSV3_F32, 3, 4));
    CHECK(w->s.drafts == 4 && w->s.max_drafts == 4 && w->s.n_modules == 2 && !w->s.adaptive);
    w->truth = truth;
    writer_append(w, &s->model, prompt, 4);
    for (size_t i = 0; i < 6; i++) {
        w->s.drafts = drafts[i];
        desk_write(k, 16 + 11 * i);
    }
    CHECK(desk_right(k));
    desk_close(k);
    witness_close(truth);
    synth_close(s);
}

/* Adaptive drafting changes how much is drafted, and nothing else. */
static void test_adaptive(void) {
    static const float cost[] = {0, 0.05f, 0.25f, 1, 100};
    static const int32_t prompt[4] = {3, 0, 2, 1};
    synth *s = random_model(6, 2, 38);
    witness *truth = truth_of(&s->model, DSV3_F32, 4, prompt, 4, 200);
    uint64_t last = UINT64_MAX;
    for (size_t i = 0; i < 5; i++) {
        desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 8, 1);
        writer *w = desk_add(k, writer_open(&s->model, 204, DSV3_F32, 3, 4));
        uint64_t drafted = 0;
        w->s.adaptive = 1;
        w->s.draft_cost = cost[i];
        w->truth = truth;
        writer_append(w, &s->model, prompt, 4);
        desk_write(k, 190);
        CHECK(desk_right(k));
        for (size_t j = 0; j < 4; j++) drafted += w->s.drafted[j];
        CHECK(drafted <= last);
        last = drafted;
        if (i == 0) CHECK(w->s.drafted[0] == w->s.steps - 1); /* they cost nothing: always */
        desk_close(k);
    }
    CHECK_EQ(last, 0); /* too dear: never */
    witness_close(truth);
    synth_close(s);
}

/* ---- 4b. Verifying and the choice of drafts, by hand: private halves of a sequence that hold what a test has put there */

/* Rounding may leave a nucleus short of what it should reach, or a draw beyond all that it has: then all belong to it, and
 * the last with a chance is drawn. */
static void test_rounding(void) {
    dsv3_candidate c[4] = {{0.25f, 3}, {0.5f, 1}, {0.25f, 0}, {0, 2}};
    double sum = 7;
    size_t kept = dsv3i_nucleus(c, 4, 1.0000001, &sum);
    CHECK_EQ(kept, 4);
    CHECK(!(sum < 1 || sum > 1));
    CHECK(c[3].token == 1 && c[2].token == 0 && c[1].token == 3 && c[0].token == 2); /* best last, ties to the lower id */
    CHECK_EQ(dsv3i_pick(c, 4, 1.0), 1);
    CHECK_EQ(dsv3i_pick(c, 4, 1.0000001), 1);
    CHECK_EQ(dsv3i_pick(c, 4, 0.3), 0);
    CHECK_EQ(dsv3i_pick(c, 4, 0.0), 3); /* the first has none */
    CHECK_EQ(dsv3i_pick(c, 2, 5.0), 3);
    CHECK_EQ(dsv3i_pick(c, 1, 5.0), 2);
}

/* The token that a running sum of weight [n] passes u at, -1 where rounding may decide. */
static int32_t passed_at(const double *weight, size_t n, double u) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += weight[i];
        if (fabs(sum - u) < 1e-6) return -1;
        if (sum > u) return (int32_t)i;
    }
    return -1;
}

/* What verification makes of draft j, by its definition: two random numbers, of which the first accepts and the second draws
 * from what p has more than q. */
static void verify_one(writer *w, size_t j, const double *p, const double *q, int *drawn) {
    enum { V = 5 };
    dsv3_rng rng = w->s.rng;
    int32_t draft = (int32_t)test_below(V), token = 3, want;
    float logits[V];
    double rest[V], sum = 0, u, keep;
    size_t best = 0;
    for (size_t i = 0; i < V; i++) {
        logits[i] = p[i] > 0 ? (float)log(p[i]) : -INFINITY;
        w->s.own->q[j * V + i] = (float)q[i];
        sum += rest[i] = p[i] > q[i] ? p[i] - q[i] : 0;
        if (p[i] > p[best]) best = i;
    }
    w->s.history[w->s.cache.length + 1 + j] = draft;
    keep = uniform_of(&rng) * q[draft];
    u = uniform_of(&rng) * sum;
    want = passed_at(rest, V, u);
    if (fabs(keep - p[draft]) < 1e-6 || (keep > p[draft] && want < 0)) {
        w->s.rng.state = test_random();
        return;
    }
    if (keep < p[draft]) {
        CHECK(dsv3i_verify(&w->s, j, logits, best, V, &token) == 1 && token == draft);
        drawn[V]++;
        return;
    }
    CHECK_EQ(dsv3i_verify(&w->s, j, logits, best, V, &token), 0);
    CHECK_EQ(token, want);
    CHECK(w->s.rng.state == rng.state); /* two numbers, no more */
    drawn[want]++;
}

static void test_verify(void) {
    /* What is left of p is spread, then in one place; the draft's own place never is. Some tokens have no chance. */
    static const double p[3][5] = {{0.3, 0.05, 0.25, 0.1, 0.3}, {0.1, 0.2, 0.3, 0.4, 0}, {0, 0.5, 0, 0.5, 0}};
    static const double q[3][5] = {{0.1, 0.6, 0.1, 0.15, 0.05}, {0.15, 0.25, 0.35, 0.05, 0.2}, {0.5, 0, 0.1, 0.2, 0.2}};
    synth *s = tiny_model(5, 1, 86);
    writer *w = writer_open(&s->model, 12, DSV3_F32, 2, 3);
    float even[5] = {0, 0, 0, 0, 0};
    int32_t token = 4;
    w->s.temperature = 1;
    w->s.rng.state = 9;
    for (size_t i = 0; i < 3; i++) {
        for (size_t j = 0; j < 3; j++) {
            int drawn[6] = {0};
            for (int k = 0; k < 1000; k++) verify_one(w, j, p[i], q[i], drawn);
            for (size_t t = 0; t < 5; t++) CHECK_EQ(drawn[t] > 0, p[i][t] > q[i][t]);
            CHECK(drawn[5] > 300);
        }
    }
    /* A draft is refused, but for rounding nothing of p is left: the most probable token. */
    for (size_t i = 0; i < 5; i++) w->s.own->q[i] = 1e9f;
    w->s.history[1] = 2;
    CHECK_EQ(dsv3i_verify(&w->s, 0, even, 4, 5, &token), 0);
    CHECK_EQ(token, 4);
    test_rounding();
    writer_close(w);
    synth_close(s);
}

/* Drafts that pay, by trying each number of them: a step writes 1 + r_1 + r_1 r_2 + .. tokens in 1 + cost k. */
static size_t drafts_that_pay(const dsv3_sequence *s, size_t most, double *speed) {
    size_t best = 0;
    *speed = 1;
    for (size_t k = 1; k <= most; k++) {
        double tokens = 1, chance = 1;
        for (size_t j = 0; j < k; j++) tokens += chance *= (double)s->own->rate[j];
        if (tokens / (1 + (double)s->draft_cost * (double)k) <= *speed) continue;
        *speed = tokens / (1 + (double)s->draft_cost * (double)k);
        best = k;
    }
    return best;
}

static void test_best_drafts(void) {
    synth *s = tiny_model(5, 1, 86);
    writer *w = writer_open(&s->model, 12, DSV3_F32, 2, 4);
    int seen[5] = {0}, close = 0;
    test_state = 6;
    for (int i = 0; i < 2000; i++) {
        double speed;
        size_t most = test_below(5), want;
        for (size_t j = 0; j < 4; j++) w->s.own->rate[j] = test_uniform(0.4f, 1);
        w->s.draft_cost = test_uniform(0, 0.6f);
        want = drafts_that_pay(&w->s, most, &speed);
        CHECK_EQ(dsv3i_best_drafts(&w->s, most), want);
        seen[want]++;
        close += want > 0 && speed < 1.05; /* hardly better than none */
    }
    for (size_t k = 0; k < 5; k++) CHECK(seen[k] > 50);
    CHECK(close > 50);
    for (size_t j = 0; j < 4; j++) w->s.own->rate[j] = 0.5f;
    w->s.draft_cost = 0.5f; /* as fast with one draft as with none, slower with more */
    CHECK_EQ(dsv3i_best_drafts(&w->s, 4), 0);
    writer_close(w);
    synth_close(s);
}

/* ---- 5. Misuse, and errors on the way */

/* What a call that fails must not change. */
typedef struct snapshot {
    dsv3_sequence s;
    uint64_t drafted[DSV3_MAX_DRAFTS], accepted[DSV3_MAX_DRAFTS];
} snapshot;

static snapshot snapshot_of(const dsv3_sequence *s) {
    snapshot n;
    memset(&n, 0, sizeof n);
    n.s = *s;
    if (s->max_drafts > 0) memcpy(n.drafted, s->drafted, s->max_drafts * sizeof *n.drafted);
    if (s->max_drafts > 0) memcpy(n.accepted, s->accepted, s->max_drafts * sizeof *n.accepted);
    return n;
}

static int unchanged(const snapshot *before, const dsv3_sequence *s) {
    snapshot now = snapshot_of(s);
    return now.s.cache.length == before->s.cache.length && now.s.pending == before->s.pending &&
           now.s.prompt == before->s.prompt && now.s.prompt_left == before->s.prompt_left &&
           now.s.rng.state == before->s.rng.state && now.s.steps == before->s.steps &&
           now.s.written == before->s.written && memcmp(now.drafted, before->drafted, sizeof now.drafted) == 0 &&
           memcmp(now.accepted, before->accepted, sizeof now.accepted) == 0;
}

static void test_bad_sizes(void) {
    synth *s = random_model(6, 2, 39);
    const dsv3_model *m = &s->model;
    size_t bytes = 0, above = (size_t)DSV3_MAX_SEQ + 1;
    dsv3_sequence q;
    unsigned char *memory;
    CHECK_EQ(dsv3_sequence_size(NULL, 8, DSV3_F32, 1, 1, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_F32, 1, 1, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_size(m, 0, DSV3_F32, 1, 1, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_F32, 0, 1, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_size(m, above, DSV3_F32, 1, 1, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_F32, above, 1, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_sequence_size(m, SIZE_MAX, DSV3_F32, 1, 1, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_F32, 1, (size_t)DSV3_MAX_DRAFTS + 1, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_F32, 1, SIZE_MAX, &bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_F16, 1, 1, &bytes, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_F8_E4M3, 1, 1, &bytes, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_BF16, 1, (size_t)DSV3_MAX_DRAFTS, &bytes, NULL), DSV3_OK);
    CHECK_EQ(dsv3_sequence_size(m, 8, DSV3_BF16, 3, 2, &bytes, NULL), DSV3_OK);
    memory = (unsigned char *)synth_alloc(bytes + 1);
    CHECK_EQ(dsv3_sequence_init(m, NULL, 8, DSV3_BF16, 3, 2, memory, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_init(NULL, &q, 8, DSV3_BF16, 3, 2, memory, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_BF16, 3, 2, NULL, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_BF16, 3, 2, memory, bytes - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_BF16, 3, 2, memory, 0, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_BF16, 3, 2, memory + 1, bytes, NULL), DSV3_ERR_ALIGN);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_F16, 3, 2, memory, bytes, NULL), DSV3_ERR_UNSUPPORTED);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_BF16, 0, 2, memory, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_BF16, 3, 16, memory, bytes, NULL), DSV3_ERR_LIMIT);
    CHECK_EQ(dsv3_sequence_init(m, &q, 8, DSV3_BF16, 3, 2, memory, bytes, NULL), DSV3_OK);
    synth_release(memory);
    synth_close(s);
}

static void test_bad_appends(void) {
    static const int32_t good[3] = {1, 2, 3}, negative[3] = {1, -1, 2}, large[3] = {1, 2, 6};
    int32_t many[11] = {0};
    synth *s = random_model(6, 2, 40);
    const dsv3_model *m = &s->model;
    writer *w = writer_open(m, 10, DSV3_F32, 3, 2);
    snapshot before = snapshot_of(&w->s);
    CHECK_EQ(dsv3_sequence_append(m, NULL, good, 3, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_append(NULL, &w->s, good, 3, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_append(m, &w->s, NULL, 3, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_append(m, &w->s, good, 0, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_append(m, &w->s, negative, 3, NULL), DSV3_ERR_TOKEN);
    CHECK_EQ(dsv3_sequence_append(m, &w->s, large, 3, NULL), DSV3_ERR_TOKEN);
    CHECK_EQ(dsv3_sequence_append(m, &w->s, many, 11, NULL), DSV3_ERR_FULL);
    CHECK(unchanged(&before, &w->s));
    CHECK_EQ(dsv3_sequence_append(m, &w->s, good, 3, NULL), DSV3_OK);
    before = snapshot_of(&w->s);
    CHECK_EQ(dsv3_sequence_append(m, &w->s, good, 3, NULL), DSV3_ERR_ARG); /* one prompt at a time */
    CHECK(unchanged(&before, &w->s));
    writer_close(w);
    synth_close(s);
}

/* A copy that is refused leaves its target alone. */
static void refuse_copy(const writer *from, const dsv3_model *model, size_t capacity, dsv3_type type, size_t rows,
                        size_t drafts, dsv3_result want) {
    writer *w = writer_open(model, capacity, type, rows, drafts);
    dsv3_sequence before;
    memcpy(&before, &w->s, sizeof before);
    CHECK_EQ(dsv3_sequence_copy(&w->s, &from->s, NULL), want);
    CHECK(want == DSV3_OK || memcmp(&before, &w->s, sizeof before) == 0);
    writer_close(w);
}

static void test_bad_copies(void) {
    static const int32_t prompt[4] = {3, 0, 2, 1};
    synth *s = random_model(6, 2, 41), *other = random_model(7, 2, 41);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 8, 1);
    writer *w = desk_add(k, writer_open(&s->model, 20, DSV3_F32, 6, 3));
    dsv3_sequence before;
    writer_append(w, &s->model, prompt, 4);
    desk_write(k, 12);
    memcpy(&before, &w->s, sizeof before);
    CHECK_EQ(dsv3_sequence_copy(NULL, &w->s, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_copy(&w->s, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_copy(&w->s, &w->s, NULL), DSV3_OK);
    refuse_copy(w, &s->model, 20, DSV3_BF16, 6, 3, DSV3_ERR_MISMATCH);
    refuse_copy(w, &s->model, 20, DSV3_F32, 7, 3, DSV3_ERR_MISMATCH);
    refuse_copy(w, &s->model, 20, DSV3_F32, 6, 4, DSV3_ERR_MISMATCH);
    refuse_copy(w, &s->model, 20, DSV3_F32, 6, 1, DSV3_ERR_MISMATCH);
    refuse_copy(w, &s->model, 20, DSV3_F32, 6, 0, DSV3_ERR_MISMATCH);
    refuse_copy(w, &other->model, 20, DSV3_F32, 6, 3, DSV3_ERR_MISMATCH);
    refuse_copy(w, &s->model, w->s.cache.length - 1, DSV3_F32, 6, 3, DSV3_ERR_FULL);
    writer_append(w, &s->model, prompt, 4);
    memcpy(&before, &w->s, sizeof before);
    refuse_copy(w, &s->model, w->length - 1, DSV3_F32, 6, 3, DSV3_ERR_FULL); /* what it has yet to read counts, too */
    refuse_copy(w, &s->model, w->length, DSV3_F32, 6, 3, DSV3_OK);
    CHECK(memcmp(&before, &w->s, sizeof before) == 0);
    desk_close(k);
    synth_close(s), synth_close(other);
}

/* Sequences whose drafts come from no module, some or all, in one step; texts are those that each would write alone. */
static void test_mixed_modules(void) {
    static const size_t drafts[4] = {2, 0, 5, 1};
    int32_t prompt[4][9];
    synth *s = random_model(6, 3, 45);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 16, 1);
    for (size_t i = 0; i < 4; i++) {
        writer *w = desk_add(k, writer_open(&s->model, 60, DSV3_F32, 3, drafts[i]));
        synth_tokens(prompt[i], 9, 6);
        CHECK_EQ(w->s.n_modules, drafts[i] < 3 ? drafts[i] : 3);
        w->truth = truth_of(&s->model, DSV3_F32, drafts[i], prompt[i], 9, 60);
        writer_append(w, &s->model, prompt[i], 9);
    }
    desk_write(k, 50);
    CHECK(desk_right(k));
    for (size_t i = 0; i < 4; i++) witness_close(k->w[i]->truth);
    desk_close(k);
    synth_close(s);
}

/* ---- Aborted: in each place where the caller is asked, of steps in which modules that lag behind read more rows than the
 * workspace has. */

static long asked; /* how often; aborted when it is 0 */
static int abort_there(void *user) {
    (void)user;
    return asked-- == 0;
}

/* One text, of which a part is written without drafts; step `when` is aborted when asked for the `place`th time, and taken
 * again. Returns whether it was. */
static int abort_run(const dsv3_model *model, witness *truth, const int32_t *prompt, size_t n, int when, long place) {
    desk *k = desk_open(model, DSV3_ATTENTION_ABSORBED, 2, 1);
    writer *w = desk_add(k, writer_open(model, 40, DSV3_F32, 6, 2));
    int aborted = 0;
    w->truth = truth, w->ample = 0, w->loose = 1;
    w->goal = 34;
    writer_append(w, model, prompt, n);
    for (int step = 0;; step++) {
        snapshot before = snapshot_of(&w->s);
        w->s.drafts = step % 9 < 5 ? 0 : 2;
        if (step == when) {
            dsv3_sequence *list[1];
            list[0] = &w->s;
            k->context.aborted = abort_there;
            asked = place;
            aborted = desk_call(k, list, 1) == DSV3_ERR_ABORTED;
            k->context.aborted = NULL;
            EXPECT(w, aborted == (asked < 0));
            if (!aborted) break;
            EXPECT(w, k->error.code == DSV3_ERR_ABORTED && unchanged(&before, &w->s));
            writer_invariants(w);
        }
        if (desk_step(k) == 0) break;
    }
    CHECK(w->wrong == 0 && (!aborted || w->length == 34));
    desk_close(k);
    return aborted;
}

static void test_aborted(void) {
    int32_t prompt[11];
    synth *s = random_model(6, 2, 44);
    witness *truth;
    int places = 0, most = 0;
    synth_tokens(prompt, 11, 6);
    truth = truth_of(&s->model, DSV3_F32, 0, prompt, 11, 40);
    for (int when = 0; when < 20; when++) {
        long place = 0;
        while (abort_run(&s->model, truth, prompt, 11, when, place)) place++;
        places += place > 0;
        if (place > most) most = (int)place;
    }
    CHECK(places == 20 && most > 8); /* asked for each layer, of the modules, too */
    witness_close(truth);
    synth_close(s);
}

typedef struct bad_step {
    desk *k;
    dsv3_sequence *list[2];
    snapshot before[2];
    float *logits;
} bad_step;

static void refuse(bad_step *b, dsv3_result want, dsv3_result got, int line) {
    char text[100];
    snprintf(text, sizeof text, "refused with %d, and nothing changed; found %d", (int)want, (int)got);
    test_count(got == want && unchanged(&b->before[0], b->list[0]) && unchanged(&b->before[1], b->list[1]), __FILE__,
               line, text);
}
#define REFUSE(b, want, call) refuse(b, want, call, __LINE__)

/* The second sequence with a temperature and top_p that no sampler takes. */
static void refuse_sampler(bad_step *b, float temperature, float top_p) {
    desk *k = b->k;
    b->list[1]->temperature = temperature;
    b->list[1]->top_p = top_p;
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&k->context, b->logits, k->model, b->list, 2, &k->ws, &k->error));
    CHECK(strcmp(k->error.name, "sequences[1]") == 0);
    b->list[1]->temperature = 0;
    b->list[1]->top_p = 1;
}

static void refuse_strangers(bad_step *b) {
    desk *k = b->k;
    synth *other = random_model(7, 2, 41);
    writer *stranger = writer_open(&other->model, 20, DSV3_F32, 3, 2);
    dsv3_sequence *list[2];
    dsv3_workspace ws;
    void *memory = workspace_of(&ws, &other->model, 8, 1);
    dsv3_model fewer = *k->model;
    list[0] = b->list[0];
    list[1] = &stranger->s;
    REFUSE(b, DSV3_ERR_MISMATCH, dsv3_generate_step(&k->context, b->logits, k->model, list, 2, &k->ws, NULL));
    list[1] = NULL;
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&k->context, b->logits, k->model, list, 2, &k->ws, NULL));
    list[1] = list[0]; /* it cannot take two steps at once */
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&k->context, b->logits, k->model, list, 2, &k->ws, NULL));
    REFUSE(b, DSV3_ERR_MISMATCH, dsv3_generate_step(&k->context, b->logits, k->model, b->list, 2, &ws, NULL));
    fewer.n_mtp = 1;
    REFUSE(b, DSV3_ERR_MISMATCH, dsv3_generate_step(&k->context, b->logits, &fewer, b->list, 2, &k->ws, NULL));
    writer_close(stranger);
    synth_release(memory);
    synth_close(other);
}

static void refuse_arguments(bad_step *b) {
    desk *k = b->k;
    dsv3_context c = k->context;
    dsv3_workspace small;
    void *memory = workspace_of(&small, k->model, 1, 1);
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(NULL, b->logits, k->model, b->list, 2, &k->ws, NULL));
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&c, NULL, k->model, b->list, 2, &k->ws, NULL));
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&c, b->logits, NULL, b->list, 2, &k->ws, NULL));
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&c, b->logits, k->model, NULL, 2, &k->ws, NULL));
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&c, b->logits, k->model, b->list, 2, NULL, NULL));
    REFUSE(b, DSV3_ERR_ARG, dsv3_generate_step(&c, b->logits, k->model, b->list, 0, &k->ws, NULL));
    REFUSE(b, DSV3_ERR_MEMORY, dsv3_generate_step(&c, b->logits, k->model, b->list, 2, &small, NULL));
    c.threads = 2;
    REFUSE(b, DSV3_ERR_MEMORY, dsv3_generate_step(&c, b->logits, k->model, b->list, 2, &k->ws, NULL));
    synth_release(memory);
}

static void test_bad_steps(void) {
    static const int32_t prompt[4] = {3, 0, 2, 1};
    synth *s = random_model(6, 2, 42);
    desk *k = desk_open(&s->model, DSV3_ATTENTION_ABSORBED, 8, 1);
    bad_step b;
    writer *w[2];
    witness *truth = truth_of(&s->model, DSV3_F32, 2, prompt, 4, 16);
    b.k = k;
    b.logits = (float *)test_alloc(6 * 6 * sizeof *b.logits);
    for (size_t i = 0; i < 2; i++) {
        w[i] = desk_add(k, writer_open(&s->model, 20, DSV3_F32, 3, 2));
        w[i]->truth = truth;
        b.list[i] = &w[i]->s;
        b.before[i] = snapshot_of(b.list[i]);
    }
    REFUSE(&b, DSV3_ERR_ARG, desk_call(k, b.list, 2)); /* no prompts */
    writer_append(w[0], &s->model, prompt, 4);
    w[0]->goal = 8;
    while (desk_step(k) > 0) {
    }
    writer_append(w[1], &s->model, prompt, 4);
    for (size_t i = 0; i < 2; i++) b.before[i] = snapshot_of(b.list[i]);
    refuse_arguments(&b);
    refuse_strangers(&b);
    refuse_sampler(&b, -1, 1), refuse_sampler(&b, NAN, 1), refuse_sampler(&b, INFINITY, 1);
    refuse_sampler(&b, 0, 2), refuse_sampler(&b, 1, -0.5f), refuse_sampler(&b, 1, NAN);
    desk_write(k, 16); /* as if nothing had happened */
    CHECK(desk_right(k));
    free(b.logits);
    desk_close(k);
    witness_close(truth);
    synth_close(s);
}

/* Two texts, one of them still a prompt while the other is written, with weight `element` of a tensor broken during
 * step `when` (-1: never). Returns how often a step failed; in the end the texts stand in text [2, n]. */
typedef struct accident {
    synth *s;
    synth_tensor *t;
    float temperature;
    int when;
    int failed;
    uint64_t accepted;
    int32_t text[2][40];
} accident;

static void accident_step(accident *a, desk *k) {
    snapshot before[2];
    dsv3_result result;
    float whole;
    memcpy(&whole, a->t->data, sizeof whole);
    for (size_t i = 0; i < 2; i++) before[i] = snapshot_of(&k->w[i]->s);
    synth_set(a->t, 0, NAN);
    result = desk_try(k, k->w, 2);
    synth_set(a->t, 0, whole);
    CHECK(result == DSV3_OK || result == DSV3_ERR_NAN);
    if (result == DSV3_OK) return; /* a module that was not asked */
    a->failed++;
    for (size_t i = 0; i < 2; i++) {
        CHECK(unchanged(&before[i], &k->w[i]->s));
        writer_invariants(k->w[i]);
    }
}

static void accident_run(accident *a) {
    int32_t prompt[2][14];
    desk *k = desk_open(&a->s->model, DSV3_ATTENTION_ABSORBED, 8, 1);
    test_state = 8;
    for (size_t i = 0; i < 2; i++) {
        size_t n = i == 0 ? 3 : 14;
        writer *w = desk_add(k, writer_open(&a->s->model, 48, DSV3_F32, 2, 3));
        synth_tokens(prompt[i], n, a->s->config.vocab_size);
        w->s.temperature = a->temperature;
        w->s.rng.state = 7 + i;
        writer_append(w, &a->s->model, prompt[i], n);
        w->goal = 40;
    }
    for (int step = 0; step < 100; step++) {
        if (step == a->when) accident_step(a, k);
        if (desk_step(k) == 0) break;
    }
    CHECK(desk_right(k));
    a->accepted = 0;
    for (size_t i = 0; i < 2; i++) {
        memcpy(a->text[i], k->w[i]->text, sizeof a->text[i]);
        for (size_t j = 0; j < 3; j++) a->accepted += k->w[i]->s.accepted[j];
    }
    desk_close(k);
}

/* NaN in the main model and in each part of the modules, in every step: the step fails, and can be taken again. */
static void test_accidents(void) {
    static const char *const name[] = {"lm_head.weight",
                                       "model.layers.1.input_layernorm.weight",
                                       "model.layers.2.eh_proj.weight",
                                       "model.layers.2.shared_head.norm.weight",
                                       "model.layers.3.hnorm.weight",
                                       "model.layers.3.input_layernorm.weight"};
    synth *s = random_model(6, 2, 43);
    for (size_t i = 0; i < 6; i++) {
        for (int greedy = 0; greedy < 2; greedy++) {
            accident right, a;
            memset(&right, 0, sizeof right);
            right.s = s;
            right.t = synth_get(s, -1, -1, name[i]);
            right.temperature = greedy ? 0 : 1.4f;
            right.when = -1;
            accident_run(&right);
            a = right;
            for (a.when = 0; a.when < 12; a.when++) {
                memset(a.text, 0, sizeof a.text);
                accident_run(&a);
                CHECK(memcmp(a.text, right.text, sizeof a.text) == 0);
                CHECK_EQ(a.accepted, right.accepted);
            }
            CHECK(a.failed >= 10); /* the others wrote nothing, or drafted nothing */
        }
    }
    synth_close(s);
}

/* ---- 6. Sizes too large for size_t are reported, not wrapped */

static void test_huge(void) {
    static const int32_t vocab[] = {1000, 16777216}, width[] = {64, 1048576}, modules[] = {0, 15, 900};
    static const size_t capacity[] = {1, 16777216}, rows[] = {1, 16777216};
    int overflown = 0;
    for (int i = 0; i < 2 * 2 * 3 * 2 * 2; i++) {
        dsv3_model model;
        dsv3_config *c = &model.config;
        size_t S = capacity[i % 2], n = rows[i / 2 % 2], bytes = 1, used;
        double need;
        dsv3_result result;
        memset(&model, 0, sizeof model);
        *c = dsv3_config_default();
        synth_sizes(c, vocab[i / 4 % 2], width[i / 8 % 2], 8, 0, 100, 100);
        synth_attention(c, 1, 0, width[i / 8 % 2], 8, 8, 8);
        synth_experts(c, 0, 0, 0, 1, 1, 1.0f);
        c->moe_layer_freq = 1024;
        c->first_k_dense_replace = 100;
        model.n_mtp = c->num_nextn_predict_layers = modules[i / 16];
        used = model.n_mtp < 15 ? (size_t)model.n_mtp : 15;
        if (dsv3_config_check(c, NULL) != DSV3_OK) continue;
        need = 4.0 * (double)S * (100 + (double)used) * (c->kv_lora_rank + 8.0) +
               4.0 * (double)used * (double)(n > 16 ? n : 16) * c->hidden_size + 4.0 * 16 * c->vocab_size;
        if (used == 0) need -= 4.0 * 16 * c->vocab_size;
        result = dsv3_sequence_size(&model, S, DSV3_F32, n, 15, &bytes, NULL);
        if (need > (double)SIZE_MAX) {
            CHECK_EQ(result, DSV3_ERR_OVERFLOW);
            CHECK_EQ(bytes, 0);
            overflown++;
        } else if (result == DSV3_OK) {
            CHECK((double)bytes >= need);
        } else {
            CHECK(need > 0.99 * (double)SIZE_MAX && result == DSV3_ERR_OVERFLOW);
        }
    }
    if (sizeof(size_t) == 4) CHECK(overflown > 10); /* 64 bits are enough for all that the limits allow */
}

static void (*const tests[])(void) = {test_micro,         test_micro_fast,      test_random_models,
                                      test_distributions, test_sampled_company, test_roll_back,
                                      test_long_lives,    test_chunks,          test_turns,
                                      test_forks,         test_truncate_edges,  test_stop,
                                      test_full_context,  test_drafts_change,   test_adaptive,
                                      test_bad_sizes,     test_bad_appends,     test_bad_copies,
                                      test_bad_steps,     test_accidents,       test_huge,
                                      test_steered,       test_verify,          test_best_drafts,
                                      test_mixed_modules, test_aborted};

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "full") == 0) {
        test_full(argv[2]);
        return test_done("generate");
    }
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        if (argc == 1 || (size_t)atoi(argv[1]) == i) tests[i]();
    }
    return test_done("generate");
}
