/* Structs that are moved between calls: each lies at another address before every call, and where it was is overwritten.
 * Results must be the same bits. A failure means that a struct points into itself, which >>conventions says none does. */
#include "dsv3.h"
#include "synthetic.h"

#define ROWS 12
#define VOCAB 97

/* *at, on the heap, goes to another address. */
static void move_bytes(void **at, size_t bytes) {
    void *to = malloc(bytes);
    if (to == NULL) exit(2);
    memcpy(to, *at, bytes);
    memset(*at, 0xEE, bytes);
    free(*at);
    *at = to;
}

static void *on_heap(const void *from, size_t bytes) {
    void *to = test_alloc(bytes);
    memcpy(to, from, bytes);
    return to;
}

typedef struct all {
    synth *s;
    void *context, *model, *cache, *workspace, *sequence, *trainer, *rng; /* of the structs that their names say */
    void *sequence_memory, *trainer_memory;
    int move;
} all;

#define CONTEXT(a) ((dsv3_context *)(a)->context)
#define MODEL(a) ((dsv3_model *)(a)->model)
#define CACHE(a) ((dsv3_cache *)(a)->cache)
#define WORKSPACE(a) ((dsv3_workspace *)(a)->workspace)
#define SEQUENCE(a) ((dsv3_sequence *)(a)->sequence)
#define TRAINER(a) ((dsv3_trainer *)(a)->trainer)

static void all_open(all *a, int move) {
    dsv3_training settings = dsv3_training_default();
    dsv3_sequence sequence;
    dsv3_trainer trainer;
    dsv3_rng rng = {7};
    size_t bytes = 0;
    memset(a, 0, sizeof *a);
    a->move = move;
    a->s = synth_open_named(SYNTH_MTP, 11);
    synth_run(a->s, 4, 1, 1, 4 * ROWS, DSV3_F32);
    a->context = on_heap(&a->s->context, sizeof a->s->context);
    a->model = on_heap(&a->s->model, sizeof a->s->model);
    a->cache = on_heap(&a->s->caches[0], sizeof a->s->caches[0]);
    a->workspace = on_heap(&a->s->ws, sizeof a->s->ws);
    synth_demand(dsv3_sequence_size(MODEL(a), 4 * ROWS, DSV3_F32, 4, 2, &bytes, NULL), "sequence size", NULL);
    a->sequence_memory = synth_alloc(bytes);
    synth_demand(dsv3_sequence_init(MODEL(a), &sequence, 4 * ROWS, DSV3_F32, 4, 2, a->sequence_memory, bytes, NULL), "sequence",
                 NULL);
    a->sequence = on_heap(&sequence, sizeof sequence);
    settings.rows = settings.longest = ROWS;
    settings.sequences = 1;
    settings.ema = 1;
    settings.ema_decay = 0.9f;
    synth_demand(dsv3_trainer_size(&MODEL(a)->config, &settings, 1, &bytes, NULL), "trainer size", NULL);
    a->trainer_memory = synth_alloc(bytes);
    synth_demand(dsv3_trainer_init(&MODEL(a)->config, &trainer, &settings, 1, a->trainer_memory, bytes, NULL), "trainer", NULL);
    dsv3_parameters_random(&trainer.weights, &rng, 0.05f, NULL);
    a->trainer = on_heap(&trainer, sizeof trainer);
    a->rng = on_heap(&rng, sizeof rng);
    memset(&sequence, 0xEE, sizeof sequence);
    memset(&trainer, 0xEE, sizeof trainer);
}

/* Before each call. */
static void all_move(all *a) {
    if (!a->move) return;
    move_bytes(&a->context, sizeof(dsv3_context));
    move_bytes(&a->model, sizeof(dsv3_model));
    move_bytes(&a->cache, sizeof(dsv3_cache));
    move_bytes(&a->workspace, sizeof(dsv3_workspace));
    move_bytes(&a->sequence, sizeof(dsv3_sequence));
    move_bytes(&a->trainer, sizeof(dsv3_trainer));
    move_bytes(&a->rng, sizeof(dsv3_rng));
}

static void all_close(all *a) {
    free(a->context), free(a->model), free(a->cache), free(a->workspace), free(a->sequence), free(a->trainer), free(a->rng);
    synth_release(a->sequence_memory);
    synth_release(a->trainer_memory);
    synth_close(a->s);
}

/* Chunks of a prompt, and what was made of them. */
static void forward(all *a, float *logits) {
    int32_t token[ROWS];
    dsv3_batch batch;
    for (int i = 0; i < ROWS; i++) token[i] = 7 * i % VOCAB;
    for (size_t i = 0; i < ROWS; i += 4) {
        memset(&batch, 0, sizeof batch);
        batch.rows = batch.outputs = 4;
        batch.token = token + i;
        all_move(a);
        CHECK_EQ(dsv3_forward(CONTEXT(a), logits + i * VOCAB, MODEL(a), CACHE(a), 1, &batch, WORKSPACE(a), NULL), DSV3_OK);
    }
    all_move(a);
    CHECK_EQ(dsv3_cache_truncate(CACHE(a), 5, NULL), DSV3_OK);
    all_move(a);
    batch.token = token;
    CHECK_EQ(dsv3_forward(CONTEXT(a), logits, MODEL(a), CACHE(a), 1, &batch, WORKSPACE(a), NULL), DSV3_OK);
}

/* A prompt, steps with drafts, a roll-back, and more steps. */
static void write_text(all *a, int32_t *text) {
    static const int32_t prompt[5] = {3, 1, 4, 1, 5};
    static float logits[3 * VOCAB];
    size_t kept = 0;
    CHECK_EQ(dsv3_sequence_append(MODEL(a), SEQUENCE(a), prompt, 5, NULL), DSV3_OK);
    for (int i = 0; i < 12; i++) {
        dsv3_sequence *list[1];
        all_move(a);
        list[0] = SEQUENCE(a);
        list[0]->temperature = 0.9f;
        CHECK_EQ(dsv3_generate_step(CONTEXT(a), logits, MODEL(a), list, 1, WORKSPACE(a), NULL), DSV3_OK);
        all_move(a);
        if (i == 6) CHECK_EQ(dsv3_sequence_truncate(SEQUENCE(a), dsv3_sequence_length(SEQUENCE(a)) - 1, &kept, NULL), DSV3_OK);
    }
    for (size_t i = 0; i < 2 * ROWS; i++) text[i] = i < dsv3_sequence_length(SEQUENCE(a)) ? SEQUENCE(a)->history[i] : -1;
}

static void train(all *a) {
    int32_t token[ROWS];
    dsv3_text text;
    uint64_t targets[2] = {0}, sequences = 0;
    memset(&text, 0, sizeof text);
    for (int i = 0; i < ROWS; i++) token[i] = 5 * i % VOCAB;
    text.rows = ROWS;
    text.token = token;
    dsv3_text_count(&text, 1, targets, &sequences, NULL);
    for (int step = 0; step < 3; step++) {
        all_move(a);
        CHECK_EQ(dsv3_train_begin(TRAINER(a), targets, sequences, NULL), DSV3_OK);
        all_move(a);
        CHECK_EQ(dsv3_train_accumulate(CONTEXT(a), TRAINER(a), &text, NULL), DSV3_OK);
        all_move(a);
        CHECK_EQ(dsv3_train_end(CONTEXT(a), TRAINER(a), 0.01, NULL, NULL), DSV3_OK);
    }
}

int main(void) {
    static float logits[2][ROWS * VOCAB];
    static int32_t text[2][2 * ROWS];
    all a[2];
    for (int i = 0; i < 2; i++) {
        all_open(&a[i], i);
        forward(&a[i], logits[i]);
        write_text(&a[i], text[i]);
        train(&a[i]);
    }
    CHECK(memcmp(logits[0], logits[1], sizeof logits[0]) == 0);
    CHECK(memcmp(text[0], text[1], sizeof text[0]) == 0);
    CHECK_EQ(TRAINER(&a[0])->weights.count, TRAINER(&a[1])->weights.count);
    CHECK(memcmp(TRAINER(&a[0])->weights.data, TRAINER(&a[1])->weights.data, TRAINER(&a[0])->weights.count * sizeof(float)) == 0);
    CHECK(memcmp(TRAINER(&a[0])->ema, TRAINER(&a[1])->ema, TRAINER(&a[0])->weights.count * sizeof(float)) == 0);
    for (int i = 0; i < 2; i++) all_close(&a[i]);
    return test_done("moved");
}
