/* test_steer.c -- the caller's hand in what is written (chapter 13) and in how long it takes (chapter 11): steering,
 * stop tokens, limits, log-probabilities, aborts. That steered text is lossless is shown in test_generate.c.
 *
 * A failure means that a step or a call that the caller ended has left traces, that text goes on behind its end or ends
 * before it, or that a reported log-probability is not that of the draw. */
#define DSV3I_SERIAL_WORK 256u /* small loops are split, too */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#define ROOM 64
#define MOST 3 /* sequences of a step */

static synth *random_model(int V, int D, uint64_t seed) {
    dsv3_config c = dsv3_config_default();
    synth *s;
    synth_sizes(&c, V, 24, 28, 12, 2, 1);
    synth_attention(&c, 2, 12, 10, 6, 4, 5);
    synth_experts(&c, 4, 1, 2, 2, 1, 1.5f);
    c.num_nextn_predict_layers = D;
    s = synth_open(&c, SYNTH_F32, seed);
    s->context.attention = DSV3_ATTENTION_ABSORBED;
    synth_run(s, 16, 1, 1, ROOM, DSV3_F32);
    return s;
}

/* ---- Callbacks. Each asks `fuse` first: the call with that number fails. */

typedef struct fuse {
    int asked, fails; /* -1: never */
} fuse;

static int fuse_blows(void *user) {
    fuse *f = (fuse *)user;
    return f->asked++ == f->fails;
}

/* Tokens of the last one's class are forbidden, but for 0. */
static dsv3_result turns(void *user, float *logits, size_t V, const int32_t *text, size_t length, size_t sequence) {
    (void)sequence;
    if (user != NULL && fuse_blows(user)) {
        memset(logits, 0xFF, V * sizeof *logits);
        return DSV3_ERR_LIMIT;
    }
    for (size_t i = 1; i < V; i++) {
        if ((i + (size_t)text[length - 1]) % 2 == 0) logits[i] = -INFINITY;
    }
    return DSV3_OK;
}

/* The same, by a sequence that knows its place in the call. */
static dsv3_result turns_of(void *user, float *logits, size_t V, const int32_t *text, size_t length,
                            size_t sequence) {
    CHECK_EQ(sequence, *(const size_t *)user);
    return turns(NULL, logits, V, text, length, sequence);
}

/* Nothing follows token 1 behind the eighth place. */
static dsv3_result dead_end(void *user, float *logits, size_t V, const int32_t *text, size_t length,
                            size_t sequence) {
    (void)user, (void)sequence;
    logits[text[length - 1]] = -INFINITY;
    for (size_t i = 0; i < V && length > 8 && text[length - 1] == 1; i++) logits[i] = -INFINITY;
    return DSV3_OK;
}

/* ---- Sequences */

typedef struct pen {
    dsv3_sequence s;
    void *memory;
} pen;

static void pen_open(pen *p, const synth *s, size_t rows, size_t drafts) {
    size_t bytes = 0;
    synth_demand(dsv3_sequence_size(&s->model, ROOM, DSV3_F32, rows, drafts, &bytes, NULL), "sequence size", NULL);
    p->memory = synth_alloc(bytes);
    memset(p->memory, 0xA5, bytes);
    synth_demand(dsv3_sequence_init(&s->model, &p->s, ROOM, DSV3_F32, rows, drafts, p->memory, bytes, NULL),
                 "sequence", NULL);
}

static void pen_close(pen *p) { synth_release(p->memory); }

/* One step of p [n]. */
static dsv3_result pens_step(synth *s, pen *p, size_t n, dsv3_error *error) {
    dsv3_sequence *list[MOST] = {NULL};
    float *logits = (float *)test_alloc(MOST * 4 * (size_t)s->config.vocab_size * sizeof *logits);
    dsv3_result result;
    for (size_t i = 0; i < n; i++) list[i] = &p[i].s;
    result = dsv3_generate_step(&s->context, logits, &s->model, list, n, &s->ws, error);
    free(logits);
    return result;
}

/* Steps until there is nothing more to do, or an error. */
static dsv3_result pens_run(synth *s, pen *p, size_t n) {
    for (;;) {
        int busy = 0;
        dsv3_result result;
        for (size_t i = 0; i < n; i++) busy |= dsv3_sequence_state(&p[i].s) <= DSV3_STATE_WRITING;
        if (!busy) return DSV3_OK;
        result = pens_step(s, p, n, NULL);
        if (result != DSV3_OK) return result;
    }
}

static int same_text(const dsv3_sequence *s, const int32_t *text, size_t n) {
    return dsv3_sequence_length(s) == n && memcmp(s->history, text, n * sizeof *text) == 0;
}

/* All that a step which fails must leave as it is. */
static int same_state(const dsv3_sequence *a, const dsv3_sequence *b) {
    size_t n = a->max_drafts;
    return same_text(a, b->history, dsv3_sequence_length(b)) && a->cache.length == b->cache.length &&
           a->pending == b->pending && a->stopped == b->stopped && (a->prompt == b->prompt || a->prompt_left == 0) &&
           a->prompt_left == b->prompt_left && a->rng.state == b->rng.state && a->steps == b->steps &&
           a->written == b->written && dsv3_sequence_state(a) == dsv3_sequence_state(b) &&
           memcmp(a->drafted, b->drafted, n * sizeof *a->drafted) == 0 &&
           memcmp(a->accepted, b->accepted, n * sizeof *a->accepted) == 0 &&
           memcmp(a->own->rate, b->own->rate, n * sizeof *a->own->rate) == 0;
}

/* ---- 1. A step that the caller ends, by a code or an abort, at every call, has left no trace */

typedef struct ending {
    synth *s;
    int aborts; /* bool: else the steer fails */
    float temperature;
    fuse fuse;
    int32_t text[MOST][ROOM];
    uint64_t accepted;
} ending;

/* The step is taken beside a copy of what was before. Returns its result. */
static dsv3_result ending_step(ending *e, pen *p, pen *before) {
    dsv3_error error;
    dsv3_result result;
    for (size_t i = 0; i < MOST; i++) CHECK_EQ(dsv3_sequence_copy(&before[i].s, &p[i].s, NULL), DSV3_OK);
    result = pens_step(e->s, p, MOST, &error);
    if (result == DSV3_OK) return result;
    CHECK_EQ(result, e->aborts ? DSV3_ERR_ABORTED : DSV3_ERR_LIMIT);
    CHECK(error.code == result && strncmp(error.name, e->aborts ? "context.aborted" : "steer[", 6) == 0);
    for (size_t i = 0; i < MOST; i++) CHECK(same_state(&p[i].s, &before[i].s) && p[i].s.n_token == 0);
    e->fuse.fails = -1;
    return result;
}

/* Three texts, of which one is still being read while others are written. */
static void ending_run(ending *e) {
    static const int32_t prompt[14] = {3, 0, 2, 1, 4, 5, 5, 3, 2, 4, 1, 0, 0, 3};
    static const size_t length[MOST] = {2, 14, 5};
    pen p[MOST], before[MOST];
    dsv3_result result = DSV3_OK;
    e->fuse.asked = 0;
    e->s->context.aborted = e->aborts ? fuse_blows : NULL;
    e->s->context.abort_user = &e->fuse;
    for (size_t i = 0; i < MOST; i++) {
        pen_open(&p[i], e->s, 3, 3), pen_open(&before[i], e->s, 3, 3);
        p[i].s.temperature = e->temperature;
        p[i].s.rng.state = 70 + i;
        p[i].s.limit = 24;
        p[i].s.steer = turns;
        p[i].s.steer_user = e->aborts ? NULL : &e->fuse;
        CHECK_EQ(dsv3_sequence_append(&e->s->model, &p[i].s, prompt, length[i], NULL), DSV3_OK);
    }
    while (result != DSV3_ERR_ARG) {
        int busy = 0;
        for (size_t i = 0; i < MOST; i++) busy |= dsv3_sequence_state(&p[i].s) <= DSV3_STATE_WRITING;
        if (!busy) break;
        result = ending_step(e, p, before);
    }
    e->accepted = 0;
    for (size_t i = 0; i < MOST; i++) {
        CHECK_EQ(dsv3_sequence_state(&p[i].s), DSV3_STATE_LIMIT);
        CHECK_EQ(dsv3_sequence_length(&p[i].s), 24);
        memcpy(e->text[i], p[i].s.history, 24 * sizeof(int32_t));
        for (size_t j = 0; j < 3; j++) e->accepted += p[i].s.accepted[j];
        pen_close(&p[i]), pen_close(&before[i]);
    }
    e->s->context.aborted = NULL;
}

static void test_endings(void) {
    synth *s = random_model(6, 2, 43);
    for (int i = 0; i < 4; i++) {
        ending right, e;
        memset(&right, 0, sizeof right);
        right.s = s;
        right.aborts = i / 2;
        right.temperature = i % 2 ? 1.4f : 0;
        right.fuse.fails = -1;
        ending_run(&right);
        CHECK(right.fuse.asked > 40 && right.accepted > 5);
        for (int at = 0; at < right.fuse.asked; at++) {
            memset(&e, 0, sizeof e);
            e.s = s, e.aborts = right.aborts, e.temperature = right.temperature;
            e.fuse.fails = at;
            ending_run(&e);
            CHECK_EQ(e.fuse.fails, -1); /* it did fail */
            CHECK(memcmp(e.text, right.text, sizeof e.text) == 0 && e.accepted == right.accepted);
        }
    }
    synth_close(s);
}

/* ---- 2. Where text ends */

/* Greedy text behind a prompt, to the end of the caches, without drafts. */
static void truth_of(synth *s, int32_t *text, const int32_t *prompt, size_t n, dsv3_steer steer) {
    pen p;
    pen_open(&p, s, 4, 0);
    p.s.steer = steer;
    CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, n, NULL), DSV3_OK);
    CHECK_EQ(pens_run(s, &p, 1), DSV3_OK);
    CHECK_EQ(dsv3_sequence_state(&p.s), DSV3_STATE_FULL);
    CHECK_EQ(dsv3_sequence_length(&p.s), ROOM + 1);
    memcpy(text, p.s.history, (ROOM + 1) * sizeof *text);
    pen_close(&p);
}

/* The end of what is written behind the first n tokens. */
static size_t end_of(const int32_t *truth, size_t n, const int32_t *stops, size_t n_stops) {
    for (; n < ROOM + 1; n++) {
        for (size_t i = 0; i < n_stops; i++) {
            if (truth[n] == stops[i]) return n + 1;
        }
    }
    return ROOM + 1;
}

/* Behind its stop token: a step does nothing, alone or in company; a copy and what is rolled back behave. */
static void stopped(synth *s, pen *p, size_t end) {
    pen q;
    int32_t last = p->s.history[end - 1];
    CHECK(p->s.stopped && p->s.pending && p->s.cache.length == end - 1);
    pen_open(&q, s, 4, 3);
    CHECK_EQ(dsv3_sequence_copy(&q.s, &p->s, NULL), DSV3_OK);
    CHECK_EQ(dsv3_sequence_state(&q.s), DSV3_STATE_STOPPED);
    CHECK_EQ(pens_step(s, &q, 1, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_truncate(&q.s, end, NULL, NULL), DSV3_OK); /* nothing is rolled back */
    CHECK(same_state(&q.s, &p->s));
    CHECK_EQ(dsv3_sequence_append(&s->model, &q.s, &last, 1, NULL), DSV3_OK);
    CHECK_EQ(dsv3_sequence_state(&q.s), DSV3_STATE_READING);
    CHECK_EQ(dsv3_sequence_truncate(&q.s, end, NULL, NULL), DSV3_OK); /* what is not read is dropped */
    CHECK(same_state(&q.s, &p->s));
    CHECK_EQ(dsv3_sequence_truncate(&q.s, end - 1, NULL, NULL), DSV3_OK);
    CHECK_EQ(dsv3_sequence_state(&q.s), DSV3_STATE_WRITING);
    CHECK_EQ(pens_run(s, &q, 1), DSV3_OK); /* the same token again */
    CHECK(same_text(&q.s, p->s.history, end) && dsv3_sequence_state(&q.s) == DSV3_STATE_STOPPED);
    pen_close(&q);
}

static void test_stops(void) {
    static const int32_t prompt[3] = {3, 0, 2};
    synth *s = random_model(6, 2, 35);
    int32_t truth[ROOM + 1];
    uint64_t inside = 0;
    truth_of(s, truth, prompt, 3, NULL);
    for (int pair = 0; pair < 36 * 4; pair++) {
        int32_t stops[2];
        pen p;
        size_t end = 3;
        stops[0] = pair % 6, stops[1] = pair / 6 % 6 == 5 ? -7 : pair / 6 % 6;
        pen_open(&p, s, 4, 3);
        p.s.drafts = (size_t)pair / 36;
        p.s.stops = stops;
        p.s.n_stops = 2;
        CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 3, NULL), DSV3_OK);
        while (end < ROOM - 8) {
            uint64_t accepted;
            size_t begin = end;
            end = end_of(truth, end, stops, 2);
            if (end > ROOM - 8) break;
            CHECK_EQ(pens_run(s, &p, 1), DSV3_OK);
            CHECK(same_text(&p.s, truth, end) && dsv3_sequence_state(&p.s) == DSV3_STATE_STOPPED);
            accepted = p.s.own->planned > 0 && p.s.own->agreed == p.s.n_token; /* the stop token was a draft */
            inside += accepted;
            if (begin == 3) CHECK_EQ(p.s.written, end - 3);
            if (begin == 3) stopped(s, &p, end);
            CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, truth + end, 1, NULL),
                     DSV3_OK); /* perhaps one that stops */
            end++;
        }
        pen_close(&p);
    }
    CHECK(inside > 20);
    synth_close(s);
}

/* At its limit: rolled back, written again, and continued by another prompt. */
static void limited(synth *s, pen *p, const int32_t *truth, size_t length) {
    CHECK_EQ(dsv3_sequence_state(&p->s), DSV3_STATE_LIMIT);
    CHECK_EQ(pens_step(s, p, 1, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_sequence_truncate(&p->s, length - 1, NULL, NULL), DSV3_OK);
    CHECK_EQ(dsv3_sequence_state(&p->s), DSV3_STATE_WRITING);
    CHECK_EQ(pens_run(s, p, 1), DSV3_OK); /* one token, with all these drafts */
    CHECK(same_text(&p->s, truth, length) && p->s.n_token == 1);
    CHECK_EQ(dsv3_sequence_append(&s->model, &p->s, truth + length, 2, NULL),
             DSV3_OK); /* is read, but nothing is written */
    CHECK_EQ(pens_run(s, p, 1), DSV3_OK);
    CHECK_EQ(dsv3_sequence_state(&p->s), DSV3_STATE_LIMIT);
    CHECK(same_text(&p->s, truth, length + 2));
}

/* Exactly as many tokens as are allowed, with any drafts, in company of one that goes on. */
static void test_limits(void) {
    static const int32_t prompt[3] = {3, 0, 2};
    synth *s = random_model(6, 2, 36);
    size_t place[2] = {0, 1};
    int32_t truth[ROOM + 1];
    truth_of(s, truth, prompt, 3, turns);
    for (size_t i = 0; i < 14 * 4; i++) {
        pen p[2];
        size_t limit = i / 4, length = limit > 3 ? limit : 3;
        for (size_t j = 0; j < 2; j++) {
            pen_open(&p[j], s, 2, 3);
            CHECK(p[j].s.limit == SIZE_MAX && !p[j].s.stopped);
            p[j].s.steer = turns_of;
            p[j].s.steer_user = &place[j];
            p[j].s.drafts = i % 4;
            p[j].s.limit = j == 0 ? limit : 20;
            CHECK_EQ(dsv3_sequence_append(&s->model, &p[j].s, prompt, 3, NULL), DSV3_OK);
        }
        CHECK_EQ(pens_run(s, p, 2), DSV3_OK);
        CHECK(same_text(&p[0].s, truth, length) && same_text(&p[1].s, truth, 20));
        CHECK_EQ(p[0].s.written, length - 3);
        CHECK_EQ(dsv3_sequence_state(&p[0].s), DSV3_STATE_LIMIT);
        if (limit > 3) limited(s, &p[0], truth, length);
        p[0].s.limit = SIZE_MAX;
        CHECK_EQ(pens_run(s, p, 1), DSV3_OK);
        CHECK(same_text(&p[0].s, truth, ROOM + 1));
        pen_close(&p[0]), pen_close(&p[1]);
    }
    synth_close(s);
}

/* Without modules every length can be rolled back to, and nothing is appended again. */
static void test_far_back(void) {
    static const int32_t prompt[3] = {3, 0, 2};
    synth *s = random_model(6, 2, 37);
    int32_t truth[ROOM + 1];
    size_t kept = 0;
    pen p;
    truth_of(s, truth, prompt, 3, turns);
    pen_open(&p, s, 2, 0);
    p.s.steer = turns;
    CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 3, NULL), DSV3_OK);
    for (size_t length = 3; length <= ROOM + 1; length += 6) {
        CHECK_EQ(pens_run(s, &p, 1), DSV3_OK);
        CHECK(same_text(&p.s, truth, ROOM + 1));
        CHECK_EQ(dsv3_sequence_truncate(&p.s, length, &kept, NULL), DSV3_OK);
        CHECK(kept == length && same_text(&p.s, truth, length));
    }
    pen_close(&p);
    synth_close(s);
}

/* A text that cannot go on ends at the same place with any drafts: there, and not before, the step fails. */
static void test_dead_ends(void) {
    static const int32_t prompt[2] = {3, 0};
    int drafted = 0;
    for (uint64_t seed = 50; seed < 60; seed++) {
        synth *s = random_model(5, 2, seed);
        int32_t text[ROOM + 1] = {0};
        size_t length = 0;
        for (size_t drafts = 0; drafts <= 3; drafts++) {
            pen p;
            dsv3_result result;
            dsv3_error error;
            pen_open(&p, s, 4, 3);
            p.s.drafts = drafts;
            p.s.steer = dead_end;
            CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 2, NULL), DSV3_OK);
            result = pens_run(s, &p, 1);
            if (drafts == 0) {
                length = dsv3_sequence_length(&p.s);
                memcpy(text, p.s.history, length * sizeof *text);
            }
            CHECK_EQ(result, length == ROOM + 1 ? DSV3_OK : DSV3_ERR_NAN);
            CHECK(same_text(&p.s, text, length));
            if (result != DSV3_OK) {
                drafted += drafts > 0;
                CHECK_EQ(pens_step(s, &p, 1, &error), DSV3_ERR_NAN);
                CHECK(strcmp(error.name, "steer[0]") == 0 && same_text(&p.s, text, length));
            }
            pen_close(&p);
        }
        synth_close(s);
    }
    CHECK(drafted > 5);
}

/* ---- 3. Log-probabilities of what is written */

/* log p of token behind text [n], and the entropy, by one call of the model from an empty cache, in double. */
static double log_p_behind(synth *s, const int32_t *text, size_t n, const dsv3_sequence *q, int32_t token,
                           double *entropy) {
    float *logits = (float *)test_alloc(n * (size_t)s->config.vocab_size * sizeof *logits), *row;
    size_t V = (size_t)s->config.vocab_size;
    int greedy = !(q->temperature > 0);
    double sum = 0, top = -INFINITY, T = greedy ? 1 : (double)q->temperature, kept = 0, p = 0, e[16] = {0}, h = 0;
    CHECK_EQ(dsv3_cache_truncate(s->caches, 0, NULL), DSV3_OK);
    CHECK_EQ(synth_forward(s, logits, text, n, 0, NULL), DSV3_OK);
    row = logits + (n - 1) * V;
    if (q->steer != NULL) CHECK_EQ(q->steer(NULL, row, V, text, n, 0), DSV3_OK);
    for (size_t i = 0; i < V; i++) top = fmax(top, (double)row[i]);
    for (size_t i = 0; i < V; i++) sum += e[i] = exp(((double)row[i] - top) / T);
    p = e[token];
    while (kept < (double)q->top_p * sum * (1 - 1e-6)) { /* the nucleus, best first */
        size_t best = 0;
        for (size_t i = 1; i < V; i++) best = e[i] > e[best] ? i : best;
        if (!(e[best] > 0)) break;
        kept += e[best];
        h += e[best] * log(e[best]);
        e[best] = 0;
    }
    free(logits);
    *entropy = log(kept) - h / kept;
    return log(p / kept);
}

static void test_log_p(void) {
    static const int32_t prompt[3] = {3, 0, 2};
    synth *s = random_model(7, 2, 61);
    for (int i = 0; i < 16; i++) {
        pen p;
        double worst = 0;
        pen_open(&p, s, 4, 3);
        p.s.drafts = i & 1 ? 3 : 0;
        p.s.steer = i & 2 ? turns : NULL;
        p.s.temperature = i & 4 ? 1.3f : 0;
        p.s.top_p = (i & 12) == 12 ? 0.8f : 1;
        p.s.rng.state = 9;
        p.s.limit = 16;
        p.s.want_log_p = 1;
        CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 3, NULL), DSV3_OK);
        while (dsv3_sequence_state(&p.s) <= DSV3_STATE_WRITING) {
            size_t n = dsv3_sequence_length(&p.s) + p.s.prompt_left;
            CHECK_EQ(pens_step(s, &p, 1, NULL), DSV3_OK);
            for (size_t t = 0; t < p.s.n_token; t++) {
                double entropy, want = log_p_behind(s, p.s.history, n + t, &p.s, p.s.token[t], &entropy);
                worst = fmax(worst, fabs(want - (double)p.s.log_p[t]));
                worst = fmax(worst, fabs(entropy - (double)p.s.entropy[t]));
            }
        }
        CHECK(worst < 2e-5);
        pen_close(&p);
    }
    synth_close(s);
}

/* ---- 4. Other long calls, and the states they leave */

static void test_forward_aborted(void) {
    synth *s = random_model(6, 2, 71);
    int32_t token[12];
    float *logits = (float *)test_alloc(12 * 6 * sizeof *logits),
          *again = (float *)test_alloc(12 * 6 * sizeof *again);
    dsv3_error error;
    fuse f = {0, -1};
    synth_tokens(token, 12, 6);
    CHECK_EQ(synth_forward(s, logits, token, 5, 0, NULL), DSV3_OK);
    CHECK_EQ(synth_forward(s, logits, token + 5, 7, 0, NULL), DSV3_OK);
    s->context.aborted = fuse_blows;
    s->context.abort_user = &f;
    for (f.fails = 0; f.fails < s->config.num_hidden_layers; f.fails++) {
        f.asked = 0;
        CHECK_EQ(dsv3_cache_truncate(s->caches, 5, NULL), DSV3_OK);
        CHECK_EQ(synth_forward(s, again, token + 5, 7, 0, &error), DSV3_ERR_ABORTED);
        CHECK(s->caches->length == 5 && f.asked == f.fails + 1 && error.code == DSV3_ERR_ABORTED);
        CHECK(strcmp(error.name, "context.aborted") == 0);
        CHECK(strcmp(dsv3_result_string(error.code), "aborted by the caller") == 0);
        CHECK_EQ(synth_forward(s, again, token + 5, 7, 0, NULL), DSV3_OK);
        CHECK(memcmp(again, logits, 7 * 6 * sizeof *again) == 0);
    }
    free(logits), free(again);
    synth_close(s);
}

/* An MTP module, and the losses of a text, aborted before each layer. */
static void test_modules_aborted(void) {
    synth *s = random_model(6, 2, 72);
    int32_t token[12];
    size_t bytes = 0;
    dsv3_cache modules[2];
    void *memory[2];
    float hidden[12 * 24], logits[12 * 6];
    double nll[3] = {0, 0, 0};
    uint64_t targets[3] = {0, 0, 0};
    dsv3_losses losses;
    dsv3_text text;
    dsv3_batch batch;
    fuse f = {0, 0};
    memset(&losses, 0, sizeof losses), memset(&text, 0, sizeof text), memset(&batch, 0, sizeof batch);
    losses.depths = 2, losses.nll = nll, losses.targets = targets;
    text.rows = batch.rows = 12, text.token = batch.token = token;
    synth_tokens(token, 12, 6);
    test_fill(hidden, 12 * 24, -1, 1);
    CHECK_EQ(dsv3_cache_mtp_size(&s->config, ROOM, DSV3_F32, &bytes, NULL), DSV3_OK);
    for (size_t k = 0; k < 2; k++) {
        memory[k] = synth_alloc(bytes);
        CHECK_EQ(dsv3_cache_mtp_init(&s->config, &modules[k], ROOM, DSV3_F32, memory[k], bytes, NULL), DSV3_OK);
    }
    s->context.aborted = fuse_blows;
    s->context.abort_user = &f;
    CHECK_EQ(dsv3_mtp_forward(&s->context, logits, &s->model, 1, modules, 1, &batch, hidden, &s->ws, NULL),
             DSV3_ERR_ABORTED);
    CHECK_EQ(modules[0].length, 0);
    for (f.fails = 0; f.fails < s->config.num_hidden_layers + 2; f.fails++) {
        f.asked = 0;
        CHECK_EQ(dsv3_evaluate(&s->context, &losses, &s->model, s->caches, modules, 1, &text, &s->ws, NULL),
                 DSV3_ERR_ABORTED);
        CHECK_EQ(losses.sequences, 0);
    }
    f.asked = 0;
    CHECK_EQ(dsv3_evaluate(&s->context, &losses, &s->model, s->caches, modules, 1, &text, &s->ws, NULL), DSV3_OK);
    CHECK_EQ(f.asked, s->config.num_hidden_layers + 2);
    synth_release(memory[0]), synth_release(memory[1]);
    synth_close(s);
}

#ifndef DSV3_NO_TRAINING
/* A training step that was aborted anywhere and begun again trains as one that was not. */
static void test_training_aborted(void) {
    synth *s = random_model(6, 2, 73);
    dsv3_training settings = dsv3_training_default();
    dsv3_trainer t;
    dsv3_text text;
    int32_t token[12];
    uint64_t targets[3] = {0, 0, 0}, sequences = 0;
    size_t bytes = 0, count;
    void *memory;
    float *want = NULL;
    int asked = 1;
    settings.rows = settings.longest = 12;
    synth_tokens(token, 12, 6);
    memset(&text, 0, sizeof text);
    text.rows = 12, text.token = token;
    dsv3_text_count(&text, 2, targets, &sequences, NULL);
    CHECK_EQ(dsv3_trainer_size(&s->config, &settings, 1, &bytes, NULL), DSV3_OK);
    memory = synth_alloc(bytes);
    for (int at = -1; at < asked; at++) {
        fuse f = {0, -1};
        f.fails = at;
        s->context.aborted = at < 0 ? NULL : fuse_blows;
        s->context.abort_user = &f;
        CHECK_EQ(dsv3_trainer_init(&s->config, &t, &settings, 1, memory, bytes, NULL), DSV3_OK);
        CHECK_EQ(dsv3_parameters_from_model(&t.weights, &s->model, NULL), DSV3_OK);
        count = t.weights.count;
        if (at < 0) want = (float *)test_alloc(count * sizeof *want);
        CHECK_EQ(dsv3_train_begin(&t, targets, sequences, NULL), DSV3_OK);
        if (at >= 0) {
            CHECK_EQ(dsv3_train_accumulate(&s->context, &t, &text, NULL), DSV3_ERR_ABORTED);
            CHECK_EQ(dsv3_train_begin(&t, targets, sequences, NULL), DSV3_OK);
            f.asked = 0, f.fails = -1;
        }
        CHECK_EQ(dsv3_train_accumulate(&s->context, &t, &text, NULL), DSV3_OK);
        if (at >= 0) asked = f.asked;
        CHECK_EQ(dsv3_train_end(&s->context, &t, 0.01, NULL, NULL), DSV3_OK);
        if (at < 0) memcpy(want, t.weights.data, count * sizeof *want);
        CHECK(memcmp(want, t.weights.data, count * sizeof *want) == 0);
    }
    CHECK_EQ(asked, 2 * (s->config.num_hidden_layers + 2)); /* forward and backward */
    free(want);
    synth_release(memory);
    synth_close(s);
}
#endif

static void test_states(void) {
    static const int32_t row[3] = {4, 0, 4}, bad[2][1] = {{-1}, {16}};
    synth *s = random_model(6, 2, 74), *other = random_model(7, 2, 74);
    int32_t token[5];
    float logits[5 * 6], state[3 * 24], nll[3], *scratch;
    int32_t target[3] = {1, 5, DSV3_IGNORE};
    synth_tokens(token, 5, 6);
    CHECK_EQ(synth_forward(s, logits, token, 5, 0, NULL), DSV3_OK);
    CHECK_EQ(dsv3_states(&s->model, state, &s->ws, row, 3, NULL), DSV3_OK);
    CHECK(memcmp(state, state + 48, 24 * sizeof *state) == 0);
    scratch = (float *)test_alloc(cross_entropy_floats(&s->context, &s->model.lm_head, 3) * sizeof *scratch);
    dsv3_cross_entropy(&s->context, nll, state, &s->model.lm_head, target, 3, scratch, NULL);
    free(scratch);
    for (size_t i = 0; i < 2; i++) {
        double log_p = 1;
        CHECK_EQ(dsv3_log_p(&log_p, logits + row[i] * 6, &target[i], 1, 6, NULL), DSV3_OK);
        CHECK(fabs(log_p + (double)nll[i]) < 1e-5);
    }
    CHECK_EQ(dsv3_states(&s->model, NULL, &s->ws, row, 3, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_states(NULL, state, &s->ws, row, 3, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_states(&s->model, state, NULL, row, 3, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_states(&s->model, state, &s->ws, NULL, 3, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_states(&s->model, state, &s->ws, bad[0], 1, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_states(&s->model, state, &s->ws, bad[1], 1, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_states(&other->model, state, &s->ws, row, 3, NULL), DSV3_ERR_MISMATCH);
    CHECK_EQ(dsv3_states(&s->model, NULL, &s->ws, NULL, 0, NULL), DSV3_OK);
    synth_close(s), synth_close(other);
}

/* A list that is not there. */
static void test_bad_stops(void) {
    static const int32_t prompt[2] = {3, 0};
    synth *s = random_model(6, 2, 75);
    dsv3_error error;
    pen p;
    pen_open(&p, s, 4, 3);
    CHECK(p.s.stops == NULL && p.s.n_stops == 0 && p.s.steer == NULL && !p.s.want_log_p);
    CHECK_EQ(dsv3_sequence_state(&p.s), DSV3_STATE_EMPTY);
    CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 2, NULL), DSV3_OK);
    p.s.n_stops = 1;
    CHECK_EQ(pens_step(s, &p, 1, &error), DSV3_ERR_ARG);
    CHECK(strcmp(error.name, "sequences[0]") == 0 && p.s.prompt_left == 2);
    p.s.n_stops = 0;
    CHECK_EQ(pens_step(s, &p, 1, &error), DSV3_OK);
    pen_close(&p);
    synth_close(s);
}

/* A prompt that is half read, then dropped: the text goes on from its last token. */
static void test_half_read(void) {
    static const int32_t prompt[8] = {1, 2, 3, 4, 5, 0, 1, 2};
    for (size_t drafts = 0; drafts <= 2; drafts += 2) {
        synth *s = random_model(6, 2, 81);
        int32_t truth[ROOM + 1];
        size_t kept = 0;
        pen p;
        truth_of(s, truth, prompt, 4, NULL);
        pen_open(&p, s, 4, drafts);
        CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 8, NULL), DSV3_OK);
        CHECK_EQ(pens_step(s, &p, 1, NULL), DSV3_OK);
        CHECK(dsv3_sequence_length(&p.s) == 4 && p.s.prompt_left == 4);
        CHECK_EQ(dsv3_sequence_truncate(&p.s, 4, &kept, NULL), DSV3_OK);
        CHECK(kept == 4 && dsv3_sequence_state(&p.s) == DSV3_STATE_WRITING);
        CHECK_EQ(pens_run(s, &p, 1), DSV3_OK);
        CHECK(same_text(&p.s, truth, ROOM + 1));
        pen_close(&p);
        synth_close(s);
    }
}

/* Behind a roll-back that kept fewer tokens, a step that is aborted leaves the modules as they were. */
static void test_aborted_behind_rollback(void) {
    static const int32_t prompt[6] = {1, 2, 3, 4, 5, 0};
    synth *s = random_model(6, 3, 83);
    pen p[2];
    for (int i = 0; i < 2; i++) {
        int32_t again[8];
        size_t kept = 0, bytes = 0;
        void *bytes_of;
        fuse first = {0, 0};
        pen_open(&p[i], s, 2, 3);
        CHECK_EQ(dsv3_sequence_append(&s->model, &p[i].s, prompt, 6, NULL), DSV3_OK);
        while (dsv3_sequence_length(&p[i].s) < 24) CHECK_EQ(pens_step(s, &p[i], 1, NULL), DSV3_OK);
        memcpy(again, p[i].s.history, sizeof again);
        CHECK_EQ(dsv3_sequence_truncate(&p[i].s, 8, &kept, NULL), DSV3_OK);
        CHECK(kept < 8);
        CHECK_EQ(dsv3_sequence_append(&s->model, &p[i].s, again + kept, 8 - kept, NULL), DSV3_OK);
        if (i == 1) {
            s->context.aborted = fuse_blows;
            s->context.abort_user = &first;
            CHECK_EQ(pens_step(s, &p[i], 1, NULL), DSV3_ERR_ABORTED);
            s->context.aborted = NULL;
            for (size_t k = 0; k < 3; k++) CHECK_EQ(p[i].s.modules[k].length, kept);
        }
        CHECK_EQ(pens_run(s, &p[i], 1), DSV3_OK);
        CHECK_EQ(dsv3_sequence_save_size(&p[i].s, &bytes, NULL), DSV3_OK);
        bytes_of = test_alloc(bytes);
        CHECK_EQ(dsv3_sequence_save(&s->model, &p[i].s, 0, bytes_of, bytes, NULL), DSV3_OK);
        free(bytes_of);
    }
    CHECK(same_text(&p[0].s, p[1].s.history, dsv3_sequence_length(&p[1].s)));
    CHECK(memcmp(p[0].s.accepted, p[1].s.accepted, 3 * sizeof *p[0].s.accepted) == 0);
    pen_close(&p[0]), pen_close(&p[1]);
    synth_close(s);
}

/* A step is aborted in which modules that lag behind had to read first, at each place: the sequence can still be saved, its
 * modules are not put back to where the states are gone, and what they draft later is what they had drafted. */
static void test_aborted_behind_lag(void) {
    static const int32_t prompt[3] = {1, 2, 3};
    synth *s = random_model(6, 2, 84);
    int aborted = 0;
    for (size_t plain = 1; plain < 12; plain++) {
        pen right; /* of fails -1, the first */
        memset(&right, 0, sizeof right);
        for (int fails = -1; fails < 40; fails++) {
            size_t bytes = 0;
            dsv3_result result = DSV3_OK;
            void *data;
            fuse f = {0, 0};
            pen p;
            pen_open(&p, s, 2, 3);
            f.fails = fails;
            CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 3, NULL), DSV3_OK);
            p.s.drafts = 0;
            for (size_t i = 0; i <= plain; i++) CHECK_EQ(pens_step(s, &p, 1, NULL), DSV3_OK);
            p.s.drafts = 3, p.s.limit = 22;
            s->context.aborted = fuse_blows;
            s->context.abort_user = &f;
            result = pens_step(s, &p, 1, NULL);
            s->context.aborted = NULL;
            CHECK(result == DSV3_OK || result == DSV3_ERR_ABORTED);
            aborted += result != DSV3_OK;
            CHECK_EQ(dsv3_sequence_save_size(&p.s, &bytes, NULL), DSV3_OK);
            data = test_alloc(bytes);
            CHECK_EQ(dsv3_sequence_save(&s->model, &p.s, 0, data, bytes, NULL), DSV3_OK);
            free(data);
            CHECK_EQ(pens_run(s, &p, 1), DSV3_OK);
            if (fails < 0) {
                right = p;
                continue;
            }
            CHECK(same_text(&p.s, right.s.history, dsv3_sequence_length(&right.s)));
            CHECK(memcmp(p.s.accepted, right.s.accepted, 3 * sizeof *p.s.accepted) == 0);
            pen_close(&p);
            if (result == DSV3_OK) break;
        }
        pen_close(&right);
    }
    CHECK(aborted > 50);
    synth_close(s);
}

/* Rolled back to any place while the modules lag behind: what is drafted from there on is what a sequence drafts whose
 * modules had always read along, step by step; and where states are gone, fewer tokens are kept, which says so. */
static void test_truncated_behind_lag(void) {
    static const int32_t prompt[3] = {1, 2, 3};
    synth *s = random_model(6, 2, 85);
    int whole = 0, less = 0;
    for (size_t plain = 0; plain < 14; plain++) {
        for (size_t length = 1; length < plain + 4; length++) {
            pen p[2];
            size_t kept[2] = {99, 99};
            for (int i = 0; i < 2; i++) { /* the second drafts all the time */
                pen_open(&p[i], s, 2, 3);
                CHECK_EQ(dsv3_sequence_append(&s->model, &p[i].s, prompt, 3, NULL), DSV3_OK);
                if (i == 0) p[i].s.drafts = 0;
                p[i].s.limit = plain + 4;
                CHECK_EQ(pens_run(s, &p[i], 1), DSV3_OK);
                CHECK_EQ(dsv3_sequence_truncate(&p[i].s, length, &kept[i], NULL), DSV3_OK);
                CHECK(kept[i] == dsv3_sequence_length(&p[i].s) && kept[i] <= length && kept[i] + 2 >= length);
                for (size_t k = 1; k <= 2; k++) { /* nobody has read what is no more */
                    CHECK(p[i].s.modules[k - 1].length + k <= (kept[i] < length ? length + k : length) ||
                          p[i].s.modules[k - 1].length == 0);
                    CHECK(p[i].s.modules[k - 1].length <= kept[i]);
                }
                p[i].s.drafts = 3, p[i].s.limit = 26;
            }
            whole += kept[0] == length, less += kept[0] < length;
            while (kept[0] == length && kept[1] == length && dsv3_sequence_state(&p[0].s) == DSV3_STATE_WRITING) {
                CHECK_EQ(pens_step(s, &p[0], 1, NULL), DSV3_OK);
                CHECK_EQ(pens_step(s, &p[1], 1, NULL), DSV3_OK);
                CHECK_EQ(p[0].s.n_token, p[1].s.n_token);
                CHECK(same_text(&p[0].s, p[1].s.history, dsv3_sequence_length(&p[1].s)));
                for (size_t k = 0; k < 2; k++) { /* and the modules have read the same states, to the bit */
                    const dsv3_cache *a = &p[0].s.modules[k], *b = &p[1].s.modules[k];
                    size_t both = a->length < b->length ? a->length : b->length;
                    CHECK(memcmp(a->data, b->data, both * a->width * sizeof(float)) == 0);
                }
            }
            pen_close(&p[0]), pen_close(&p[1]);
        }
    }
    CHECK(whole > 20 && less > 5);
    synth_close(s);
}

/* A workspace of another config is refused before anything is written to it; a step that is refused has no results. */
static void test_foreign_workspace(void) {
    static const int32_t prompt[2] = {3, 0};
    synth *s = random_model(6, 2, 87), *other = random_model(6, 0, 88);
    dsv3_workspace own = s->ws;
    dsv3_error error;
    pen p;
    pen_open(&p, s, 2, 2);
    CHECK_EQ(dsv3_sequence_append(&s->model, &p.s, prompt, 2, NULL), DSV3_OK);
    CHECK_EQ(pens_step(s, &p, 1, NULL), DSV3_OK);
    CHECK_EQ(p.s.n_token, 1);
    s->ws = other->ws;
    CHECK_EQ(pens_step(s, &p, 1, &error), DSV3_ERR_MISMATCH);
    CHECK(strcmp(error.name, "workspace") == 0 && p.s.n_token == 0);
    s->ws = own;
    CHECK_EQ(pens_step(s, &p, 1, NULL), DSV3_OK);
    pen_close(&p);
    synth_close(s), synth_close(other);
}

int main(void) {
    test_endings();
    test_stops();
    test_limits();
    test_far_back();
    test_dead_ends();
    test_log_p();
    test_forward_aborted();
    test_modules_aborted();
#ifndef DSV3_NO_TRAINING
    test_training_aborted();
#endif
    test_states();
    test_bad_stops();
    test_half_read();
    test_aborted_behind_rollback();
    test_aborted_behind_lag();
    test_truncated_behind_lag();
    test_foreign_workspace();
    return test_done("steer");
}
