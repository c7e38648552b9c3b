/* chat.c -- conversations over caches that stay: in company, forked, rolled back, aborted, on threads of our own.
 *
 *     chat ROOT [-v]        ROOT: the top of the repository, for its demo model; -v shows what is said
 *
 * What it shows: dsv3_sequence for a chat. A turn appends the user's line, sets `limit`, and calls dsv3_generate_step until
 * nothing is left to do; stop tokens end the reply, drafts by the MTP module make it faster. Lines come from an array
 * instead of a keyboard, so the program ends by itself. The demo model's tokens are bytes.
 * What it checks: three conversations in one batch say what each says alone, without drafts and without threads; what
 * is rolled back and said again is the same; a fork is the same until its own line, and leaves the other alone; an
 * aborted step has changed nothing.
 *
 *     cc -std=c99 $(pkg-config --cflags dsv3) chat.c $(pkg-config --libs dsv3) -lpthread
 */
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include <dsv3/checkpoint.h> /* first: it asks for POSIX */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { V = 256, TALKS = 3, TURNS = 2, LINE = 100, REPLY = 60, CAPACITY = 512, ROWS = 16, DRAFTS = 3, THREADS = 2 };

static const char *const lines[TALKS][TURNS] = {
    {"\"My dear Mr. Bennet,\" said his lady to him one day, \"", " \"Do you not want to know who has taken it?\" "},
    {"Emma had been", " But Mr. Knightley was"},
    {"It is a truth universally acknowledged, that a single man ", " However little known the feelings "},
};
static const char *const other_line = " Nobody who had ever seen Catherine "; /* what the fork is told */
static const int32_t ends[] = {'.', ',', ';', '!', '?'};                     /* and '\n', below */

static void fail(const char *what, const char *why) {
    fprintf(stderr, "chat: %s: %s\n", what, why);
    exit(1);
}

static void check(const char *what, dsv3_result result, const dsv3_error *error) {
    char text[256];
    if (result != DSV3_OK) fail(what, dsv3_error_text(error, text, sizeof text));
}

static void expect(int holds, const char *what) {
    if (!holds) fail("does not hold", what);
}

static void *take(size_t bytes) {
    void *memory = malloc(bytes > 0 ? bytes : 1);
    expect(memory != NULL, "there is memory");
    return memory;
}

/* ---- Threads of our own: a dsv3_parallel_for that starts threads for each loop. examples/thread_pool.h keeps them. */

typedef struct piece {
    dsv3_task task;
    void *arg;
    size_t begin, end, worker;
} piece;

static void *run_piece(void *argument) {
    const piece *p = (const piece *)argument;
    p->task(p->arg, p->begin, p->end, p->worker);
    return NULL;
}

static void in_parallel(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    pthread_t thread[THREADS];
    piece pieces[THREADS];
    int started[THREADS] = {0};
    unsigned long *loops = (unsigned long *)user;
    if (threads > THREADS) threads = THREADS;
    if (threads > n) threads = n;
    for (size_t w = 0; w < threads; w++) {
        piece p = {task, arg, n * w / threads, n * (w + 1) / threads, w};
        pieces[w] = p;
        if (w > 0) started[w] = pthread_create(&thread[w], NULL, run_piece, &pieces[w]) == 0;
    }
    for (size_t w = 0; w < threads; w++) { /* the first piece is ours, and so are those that got no thread */
        if (!started[w]) run_piece(&pieces[w]);
    }
    for (size_t w = 1; w < threads; w++) {
        if (started[w]) pthread_join(thread[w], NULL);
    }
    ++*loops;
}

/* ---- A conversation */

typedef struct talk {
    dsv3_sequence sequence;
    void *memory;
    int32_t line[CAPACITY]; /* what was appended: stays here until it is read */
} talk;

/* What all of them are computed with. */
typedef struct machine {
    checkpoint file;
    dsv3_context context;
    dsv3_workspace workspace;
    void *memory;
    float logits[TALKS * (DRAFTS + 1) * V];
    unsigned long loops;     /* done in parallel */
    size_t stopped, limited; /* how replies ended */
    int patience;            /* layers until the user loses it */
} machine;

static void talk_begin(machine *m, talk *t) {
    size_t bytes;
    dsv3_error error;
    check("dsv3_sequence_size", dsv3_sequence_size(&m->file.model, CAPACITY, DSV3_F32, ROWS, DRAFTS, &bytes, &error), &error);
    t->memory = take(bytes);
    check("dsv3_sequence_init",
          dsv3_sequence_init(&m->file.model, &t->sequence, CAPACITY, DSV3_F32, ROWS, DRAFTS, t->memory, bytes, &error), &error);
    t->sequence.stop = '\n';
    t->sequence.stops = ends;
    t->sequence.n_stops = sizeof ends / sizeof *ends;
}

/* The user's line: appended, not yet read. The reply may have REPLY tokens. */
static void hear(machine *m, talk *t, const char *line) {
    dsv3_error error;
    size_t n = strlen(line);
    for (size_t i = 0; i < n; i++) t->line[i] = (unsigned char)line[i];
    check("dsv3_sequence_append", dsv3_sequence_append(&m->file.model, &t->sequence, t->line, n, &error), &error);
    t->sequence.limit = dsv3_sequence_length(&t->sequence) + t->sequence.prompt_left + REPLY;
}

static int busy(const talk *t) {
    dsv3_state state = dsv3_sequence_state(&t->sequence);
    return state == DSV3_STATE_READING || state == DSV3_STATE_WRITING;
}

/* All n of them read and write, together, until each has stopped or reached its limit; or until a step fails. */
static dsv3_result answer(machine *m, talk *const *talks, size_t n, dsv3_error *error) {
    dsv3_sequence *list[TALKS];
    for (size_t i = 0; i < n; i++) list[i] = &talks[i]->sequence;
    for (;;) {
        size_t at_work = 0;
        dsv3_result result;
        for (size_t i = 0; i < n; i++) at_work += busy(talks[i]) ? 1 : 0;
        if (at_work == 0) return DSV3_OK;
        result = dsv3_generate_step(&m->context, m->logits, &m->file.model, list, n, &m->workspace, error);
        if (result != DSV3_OK) return result;
    }
}

static void answer_all(machine *m, talk *const *talks, size_t n) {
    dsv3_error error;
    check("dsv3_generate_step", answer(m, talks, n, &error), &error);
    for (size_t i = 0; i < n; i++) {
        dsv3_state state = dsv3_sequence_state(&talks[i]->sequence);
        m->stopped += state == DSV3_STATE_STOPPED;
        m->limited += state == DSV3_STATE_LIMIT;
        expect(state == DSV3_STATE_STOPPED || state == DSV3_STATE_LIMIT, "a reply ends by a stop token or by the limit");
    }
}

static int same(const talk *a, const talk *b) {
    size_t n = dsv3_sequence_length(&a->sequence);
    return n == dsv3_sequence_length(&b->sequence) &&
           memcmp(a->sequence.history, b->sequence.history, n * sizeof *a->sequence.history) == 0;
}

static void show(const talk *t) {
    for (size_t i = 0; i < dsv3_sequence_length(&t->sequence); i++) putchar(t->sequence.history[i]);
    printf("\n----\n");
}

/* Back to the first `length` tokens. What a module can no longer do without is read once more, from our own copy. */
static void roll_back(machine *m, talk *t, size_t length) {
    dsv3_error error;
    size_t kept;
    memcpy(t->line, t->sequence.history, length * sizeof *t->line);
    check("dsv3_sequence_truncate", dsv3_sequence_truncate(&t->sequence, length, &kept, &error), &error);
    if (kept == length) return;
    check("dsv3_sequence_append",
          dsv3_sequence_append(&m->file.model, &t->sequence, t->line + kept, length - kept, &error), &error);
}

/* A dsv3_context.aborted: the user has pressed a key. */
static int impatient(void *user) { return --*(int *)user < 0; }

int main(int argc, char **argv) {
    static machine m;
    static talk alone[TALKS], together[TALKS], fork_same, fork_other;
    talk *list[TALKS], *one;
    char path[1024];
    st_error why;
    dsv3_error error;
    size_t bytes, begin, before, n;
    uint64_t accepted = 0;

    if (argc < 2 || snprintf(path, sizeof path, "%s/examples/models/micro", argv[1]) >= (int)sizeof path)
        fail("usage", "chat ROOT [-v]");
    if (checkpoint_open(&m.file, path, &why) != ST_OK) fail("checkpoint_open", why.message);
    expect(m.file.config.vocab_size == V, "a token is a byte");
    check("dsv3_context_init", dsv3_context_init(&m.context, DSV3_BACKEND_AUTO, 1, &error), &error);
    m.context.attention = DSV3_ATTENTION_ABSORBED; /* one form: then bits do not depend on the cut of prompts */
    check("dsv3_workspace_size", dsv3_workspace_size(&m.file.config, ROWS, THREADS, &bytes, &error), &error);
    m.memory = take(bytes);
    check("dsv3_workspace_init", dsv3_workspace_init(&m.file.config, &m.workspace, ROWS, THREADS, m.memory, bytes, &error),
          &error);

    /* 1. Each alone, on one thread, without drafts. */
    m.context.parallel_for = NULL;
    for (size_t i = 0; i < TALKS; i++) {
        one = &alone[i];
        talk_begin(&m, one);
        one->sequence.drafts = 0;
        for (size_t turn = 0; turn < TURNS; turn++) {
            hear(&m, one, lines[i][turn]);
            answer_all(&m, &one, 1);
        }
        if (argc > 2) show(one);
    }
    expect(m.stopped > 0 && m.limited > 0, "some replies end by a stop token, others by the limit");

    /* 2. All in one batch, with drafts, on our threads. */
    m.context.parallel_for = in_parallel;
    m.context.parallel_user = &m.loops;
    m.context.threads = THREADS;
    for (size_t i = 0; i < TALKS; i++) talk_begin(&m, list[i] = &together[i]);
    for (size_t turn = 0; turn < TURNS; turn++) {
        for (size_t i = 0; i < TALKS; i++) hear(&m, &together[i], lines[i][turn]);
        answer_all(&m, list, TALKS);
    }
    for (size_t i = 0; i < TALKS; i++) {
        expect(same(&alone[i], &together[i]), "in company, the same is said as alone");
        for (size_t k = 0; k < DRAFTS; k++) accepted += together[i].sequence.accepted[k];
    }
    expect(accepted > 0 && m.loops > 0, "drafts were accepted, and threads had work");

    /* 3. Rolled back to before the first reply: it is written again, and the second line asked again. Then to
     * every place within the last reply: the rest of it is written again. */
    one = &together[0];
    begin = strlen(lines[0][0]);
    roll_back(&m, one, begin);
    one->sequence.limit = begin + REPLY;
    answer_all(&m, &one, 1);
    hear(&m, one, lines[0][1]);
    begin = dsv3_sequence_length(&one->sequence) + one->sequence.prompt_left;
    answer_all(&m, &one, 1);
    expect(same(&alone[0], one), "rolled back, the same is said again");
    for (n = dsv3_sequence_length(&one->sequence); n-- > begin;) {
        roll_back(&m, one, n);
        answer_all(&m, &one, 1);
        expect(same(&alone[0], one), "rolled back a little, the same is said again");
    }

    /* 4. Two forks of one conversation: one is told the same as the original, the other something else. */
    one = &together[1];
    before = dsv3_sequence_length(&one->sequence);
    talk_begin(&m, &fork_same);
    talk_begin(&m, &fork_other);
    check("dsv3_sequence_copy", dsv3_sequence_copy(&fork_same.sequence, &one->sequence, &error), &error);
    check("dsv3_sequence_copy", dsv3_sequence_copy(&fork_other.sequence, &one->sequence, &error), &error);
    hear(&m, one, lines[2][0]);
    hear(&m, &fork_same, lines[2][0]);
    hear(&m, &fork_other, other_line);
    list[0] = one, list[1] = &fork_same, list[2] = &fork_other;
    answer_all(&m, list, 3);
    expect(same(one, &fork_same), "a fork that is told the same says the same");
    expect(!same(one, &fork_other), "one that is told something else does not");
    expect(memcmp(one->sequence.history, fork_other.sequence.history, before * sizeof(int32_t)) == 0 &&
               memcmp(alone[1].sequence.history, fork_other.sequence.history, before * sizeof(int32_t)) == 0,
           "up to the fork they are the same");
    if (argc > 2) show(&fork_other);

    /* 5. The user gives up in the middle of a reply, wherever that is; then lets it go on after all. */
    hear(&m, one, other_line);
    hear(&m, &fork_same, other_line);
    list[0] = one;
    answer_all(&m, list, 1);
    list[0] = &fork_same;
    m.context.aborted = impatient;
    m.context.abort_user = &m.patience;
    for (n = 0;; n++) {
        dsv3_result result;
        m.patience = (int)n;
        result = answer(&m, list, 1, &error);
        if (result == DSV3_OK) break;
        expect(result == DSV3_ERR_ABORTED && error.code == result, "the only error is that it was aborted");
        expect(fork_same.sequence.n_token == 0 && busy(&fork_same), "an aborted step has written nothing, and can be repeated");
    }
    m.context.aborted = NULL;
    expect(n > 1 && same(one, &fork_same), "aborted and gone on, the same is said");

    for (size_t i = 0; i < TALKS; i++) free(alone[i].memory), free(together[i].memory);
    free(fork_same.memory);
    free(fork_other.memory);
    free(m.memory);
    checkpoint_close(&m.file);
    printf("chat: ok\n");
    return 0;
}
