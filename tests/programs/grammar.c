/* grammar.c -- text that must follow a grammar, with drafts: a dsv3_steer that forbids every other token.
 *
 *     grammar ROOT [-v]     ROOT: the top of the repository, for its demo model; -v shows what is written
 *
 * What it shows: the model writes a list of words as JSON has them, and nothing else, since the steer leaves only
 * tokens (bytes, with this model) that the grammar allows behind the text so far:
 *
 *     list = "[" word { "," word } "]"      at most WORDS words
 *     word = '"' letter { letter } '"'      at most LETTERS letters, each a .. z
 *
 * A steer must answer from the text alone, since drafts are asked about and may be refused: the state of the grammar is
 * found by reading the list again from its beginning. "]" is a stop token; behind it all is forbidden, which ends the
 * drafting when a draft is a "]".
 * What it checks: greedy text is the same without drafts, with 3 and with 6; drafts save steps; sampled lists are in the
 * grammar too, as json.h and a look at the letters see it; a steer that fails, or leaves nothing, ends the step only.
 *
 *     cc -std=c99 $(pkg-config --cflags dsv3) grammar.c $(pkg-config --libs dsv3)
 */
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include <dsv3/checkpoint.h> /* first: it asks for POSIX; brings json.h along */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { V = 256, WORDS = 4, LETTERS = 9, LIST = WORDS * (LETTERS + 3) + 1, CAPACITY = 256, ROWS = 32, DRAFTS = 6 };

static const char *const prompts[] = {"She said that he was ", "\"How do you like my list of words?\" said Emma. "};
enum { PROMPTS = sizeof prompts / sizeof *prompts };

static void fail(const char *what, const char *why) {
    fprintf(stderr, "grammar: %s: %s\n", what, why);
    exit(1);
}

static void check(const char *what, dsv3_result result, const dsv3_error *error) {
    char text[256];
    if (result != DSV3_OK) fail(what, dsv3_error_text(error, text, sizeof text));
}

static void expect(int holds, const char *what) {
    if (!holds) fail("does not hold", what);
}

/* ---- The grammar */

/* What may come next, before any byte of the list and behind each. */
typedef enum place { OPEN, QUOTE, FIRST_LETTER, NEXT_LETTER, BETWEEN, NOTHING } place;

typedef struct grammar {
    size_t begin;  /* of the list in the text: behind the prompt */
    size_t asked;  /* how often */
    size_t broken; /* bool: fails, instead of answering */
} grammar;

/* May the byte c stand here, words and letters (of the word under way) being written? */
static int allowed(place at, int c, size_t words, size_t letters) {
    switch (at) {
    case OPEN: return c == '[';
    case QUOTE: return c == '"';
    case FIRST_LETTER: return c >= 'a' && c <= 'z';
    case NEXT_LETTER: return c == '"' || (c >= 'a' && c <= 'z' && letters < LETTERS);
    case BETWEEN: return c == ']' || (c == ',' && words < WORDS);
    case NOTHING: break;
    }
    return 0;
}

/* A dsv3_steer. */
static dsv3_result steer(void *user, float *logits, size_t n, const int32_t *text, size_t length, size_t sequence) {
    grammar *g = (grammar *)user;
    place at = OPEN;
    size_t words = 0, letters = 0;
    (void)sequence; /* each has its own grammar */
    g->asked++;
    if (g->broken) return DSV3_ERR_LIMIT;
    for (size_t i = g->begin; i < length; i++) {
        if (!allowed(at, text[i], words, letters)) return DSV3_ERR_ARG; /* what we forbade has been written */
        switch (text[i]) {
        case '[':
        case ',': at = QUOTE; break;
        case ']': at = NOTHING; break;
        case '"':
            words += at == QUOTE;
            letters = 0;
            at = at == QUOTE ? FIRST_LETTER : BETWEEN;
            break;
        default: letters++, at = NEXT_LETTER;
        }
    }
    for (size_t c = 0; c < n; c++) {
        if (!allowed(at, (int)c, words, letters)) logits[c] = -INFINITY;
    }
    return DSV3_OK;
}

/* Is it in the grammar? By other means: a JSON parser, and a look at each string. */
static int is_list(const char *text, size_t length) {
    json_token token[1 + WORDS];
    size_t count;
    if (json_parse(text, length, token, 1 + WORDS, &count, NULL) != JSON_OK || token[0].type != JSON_ARRAY) return 0;
    if (count < 2 || strchr(text, ' ') != NULL) return 0;
    for (size_t i = 1; i < count; i++) {
        size_t letters = token[i].end - token[i].start;
        if (token[i].type != JSON_STRING || letters < 1 || letters > LETTERS) return 0;
        if (strspn(text + token[i].start, "abcdefghijklmnopqrstuvwxyz") != letters) return 0;
    }
    return 1;
}

/* ---- A list */

typedef struct machine {
    checkpoint file;
    dsv3_context context;
    dsv3_workspace workspace;
    dsv3_sequence sequence;
    float logits[(DRAFTS + 1) * V];
    char list[LIST + 1]; /* what was written */
} machine;

/* Writes a list behind the prompt; returns the steps it took. */
static uint64_t write_list(machine *m, const char *prompt, size_t drafts, float temperature, uint64_t seed) {
    static int32_t text[CAPACITY];
    dsv3_sequence *s = &m->sequence, *list = s;
    dsv3_error error;
    grammar g = {0, 0, 0};
    size_t n = strlen(prompt), written = 0;
    check("dsv3_sequence_truncate", dsv3_sequence_truncate(s, 0, NULL, &error), &error); /* the same memory again */
    for (size_t i = 0; i < n; i++) text[i] = (unsigned char)prompt[i];
    check("dsv3_sequence_append", dsv3_sequence_append(&m->file.model, s, text, n, &error), &error);
    g.begin = n;
    s->drafts = drafts;
    s->temperature = temperature;
    s->rng.state = seed;
    s->stop = ']';
    s->limit = n + LIST; /* the grammar is never longer: `limit` can cut no list */
    s->steer = steer;
    s->steer_user = &g;
    s->steps = 0;
    while (dsv3_sequence_state(s) == DSV3_STATE_READING || dsv3_sequence_state(s) == DSV3_STATE_WRITING) {
        if (written == 5 && g.broken == 0) { /* once, amid the list: the steer fails, and the step with it */
            size_t length = dsv3_sequence_length(s);
            g.broken = 1;
            expect(dsv3_generate_step(&m->context, m->logits, &m->file.model, &list, 1, &m->workspace, &error) ==
                       DSV3_ERR_LIMIT, "what a steer returns, dsv3_generate_step returns");
            expect(error.code == DSV3_ERR_LIMIT && s->n_token == 0 && dsv3_sequence_length(s) == length,
                   "a step that failed has written nothing");
            g.broken = 0;
        }
        check("dsv3_generate_step",
              dsv3_generate_step(&m->context, m->logits, &m->file.model, &list, 1, &m->workspace, &error), &error);
        for (size_t i = 0; i < s->n_token; i++) m->list[written++] = (char)s->token[i];
    }
    m->list[written] = '\0';
    expect(dsv3_sequence_state(s) == DSV3_STATE_STOPPED, "the list has its end");
    s->stopped = 0; /* what if it went on all the same? There is nothing left to choose */
    s->stop = -1;
    s->limit = SIZE_MAX;
    expect(dsv3_generate_step(&m->context, m->logits, &m->file.model, &list, 1, &m->workspace, &error) == DSV3_ERR_NAN,
           "behind the list nothing is allowed");
    s->steer_user = NULL; /* g ends here */
    s->steer = NULL;
    expect(g.asked >= written, "the steer was asked about every token");
    expect(is_list(m->list, written), "what is written is in the grammar");
    return s->steps;
}

int main(int argc, char **argv) {
    static machine m;
    char path[1024], plain[LIST + 1];
    void *work_memory, *sequence_memory;
    st_error why;
    dsv3_error error;
    size_t bytes;
    uint64_t steps, steps_plain = 0, steps_drafted = 0;

    if (argc < 2 || snprintf(path, sizeof path, "%s/examples/models/austen", argv[1]) >= (int)sizeof path)
        fail("usage", "grammar ROOT [-v]");
    if (checkpoint_open(&m.file, path, &why) != ST_OK) fail("checkpoint_open", why.message);
    expect(m.file.config.vocab_size == V && m.file.model.n_mtp > 0, "a token is a byte, and there are modules to draft");
    check("dsv3_context_init", dsv3_context_init(&m.context, DSV3_BACKEND_AUTO, 0, &error), &error);
    check("dsv3_workspace_size", dsv3_workspace_size(&m.file.config, ROWS, m.context.threads, &bytes, &error), &error);
    work_memory = malloc(bytes);
    check("dsv3_workspace_init",
          dsv3_workspace_init(&m.file.config, &m.workspace, ROWS, m.context.threads, work_memory, bytes, &error), &error);
    check("dsv3_sequence_size",
          dsv3_sequence_size(&m.file.model, CAPACITY, DSV3_F32, ROWS, DRAFTS, &bytes, &error), &error);
    sequence_memory = malloc(bytes);
    check("dsv3_sequence_init",
          dsv3_sequence_init(&m.file.model, &m.sequence, CAPACITY, DSV3_F32, ROWS, DRAFTS, sequence_memory, bytes, &error),
          &error);

    for (size_t i = 0; i < PROMPTS; i++) {
        steps_plain += write_list(&m, prompts[i], 0, 0.0f, 1);
        strcpy(plain, m.list);
        if (argc > 2) printf("%s%s\n", prompts[i], plain);
        for (size_t drafts = 3; drafts <= DRAFTS; drafts += 3) {
            steps = write_list(&m, prompts[i], drafts, 0.0f, 1);
            if (drafts == 3) steps_drafted += steps;
            expect(strcmp(plain, m.list) == 0, "greedy text is the same with any number of drafts");
        }
        for (uint64_t seed = 1; seed <= 2; seed++) {
            write_list(&m, prompts[i], 3, 1.0f, seed);
            if (argc > 2) printf("    sampled %s\n", m.list);
        }
    }
    if (argc > 2) printf("greedy lists: %u steps, with 3 drafts %u\n", (unsigned)steps_plain, (unsigned)steps_drafted);
    expect(steps_drafted < steps_plain, "drafts save steps");

    free(work_memory);
    free(sequence_memory);
    checkpoint_close(&m.file);
    printf("grammar: ok\n");
    return 0;
}
