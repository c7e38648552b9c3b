/* train_integers.c -- a program of its own that trains a model on integers, stops halfway, and goes on from saved bytes.
 *
 * A tiny model, its config made here, learns to count modulo 17 by steps of 1, 2 or 3: 5 7 9 11 13 15 0 2 ... The first
 * number of a text may be followed by any of three, from then on everything is determined, so the loss of a perfect model
 * is ln 3 for one target of each text and 0 for the others. After half of the steps the run is saved to a buffer. It goes
 * on, and a second trainer, in memory full of junk, is loaded from the buffer and goes on as well: in the end all weights
 * must be the same bytes. Then the trained model counts.
 *
 * Build:  cc -std=c99 train_integers.c $(pkg-config --cflags --libs dsv3) -o train_integers
 */
#define DSV3_IMPLEMENTATION
#include <dsv3.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Texts of a batch, numbers of each, the numbers themselves, optimizer steps; a tag that says what the bytes are. */
enum { B = 16, T = 12, V = 17, STEPS = 160, TAG = 17 };

static dsv3_context context;
static dsv3_error error;

static void check(dsv3_result result, const char *what) {
    char text[256];
    if (result == DSV3_OK) return;
    printf("train_integers: %s: %s\n", what, dsv3_error_text(&error, text, sizeof text));
    exit(1);
}

static void expect(int truth, const char *what) {
    if (truth) return;
    printf("train_integers: %s\n", what);
    exit(1);
}

static void *take(size_t bytes) {
    void *memory = malloc(bytes);
    expect(memory != NULL, "out of memory");
    return memset(memory, 0x5A, bytes); /* junk: nothing may depend on what was there */
}

static dsv3_config tiny(void) {
    dsv3_config c = dsv3_config_default();
    c.vocab_size = V;
    c.hidden_size = 32;
    c.intermediate_size = 64;
    c.moe_intermediate_size = 16;
    c.num_hidden_layers = 2;
    c.first_k_dense_replace = 1;
    c.num_attention_heads = 4;
    c.kv_lora_rank = 16;
    c.qk_nope_head_dim = 8;
    c.qk_rope_head_dim = 4;
    c.v_head_dim = 8;
    c.n_routed_experts = 8;
    c.n_shared_experts = 1;
    c.num_experts_per_tok = 2;
    return c;
}

/* All that a run is made of beside its saved bytes: settings, and the balancer's speed. */
static void *prepare(const dsv3_config *config, dsv3_trainer *trainer) {
    dsv3_training settings = dsv3_training_default();
    size_t bytes;
    void *memory;
    settings.rows = B * T;
    settings.sequences = B;
    settings.longest = T;
    check(dsv3_trainer_size(config, &settings, context.threads, &bytes, &error), "trainer_size");
    memory = take(bytes);
    check(dsv3_trainer_init(config, trainer, &settings, context.threads, memory, bytes, &error), "trainer_init");
    trainer->balancer.schedule.speed = 0.01; /* V3's 0.001 is for many more steps */
    return memory;
}

/* One optimizer step, whose texts follow from its number alone. Returns the mean loss of a target, in nats. */
static double train_step(dsv3_trainer *trainer) {
    static const dsv3_schedule schedule = {0.01, 0.001, 0.001, 10, 60, STEPS, STEPS};
    int32_t token[B * T], sequence[B * T];
    dsv3_text text = {B * T, token, NULL, sequence, NULL, NULL, 0}; /* no targets: each is the next token */
    dsv3_rng rng;
    uint64_t targets[1] = {0}, sequences = 0;
    rng.state = 1000 + trainer->step;
    for (int b = 0; b < B; b++) {
        int32_t first = (int32_t)(dsv3_random(&rng) % V), step = 1 + (int32_t)(dsv3_random(&rng) % 3);
        for (int t = 0; t < T; t++) {
            token[b * T + t] = (first + t * step) % V;
            sequence[b * T + t] = b;
        }
    }
    dsv3_text_count(&text, 0, targets, &sequences, NULL);
    expect(targets[0] == B * (T - 1) && sequences == B, "every number but the last of a text has a target");
    expect(dsv3_train_begin(trainer, targets, sequences, NULL) == DSV3_OK, "train_begin"); /* this one takes no error */
    check(dsv3_train_accumulate(&context, trainer, &text, &error), "train_accumulate");
    check(dsv3_train_end(&context, trainer, dsv3_learning_rate(&schedule, trainer->step), NULL, &error), "train_end");
    return trainer->losses.nll[0] / (double)trainer->losses.targets[0];
}

static void *save(const dsv3_trainer *trainer, size_t *bytes) {
    void *data;
    check(dsv3_trainer_save_size(trainer, bytes, &error), "trainer_save_size");
    data = take(*bytes);
    check(dsv3_trainer_save(trainer, TAG, data, *bytes, &error), "trainer_save");
    return data;
}

/* Bytes that are not those of this run are refused, and named. */
static void refuse(dsv3_trainer *trainer, unsigned char *data, size_t bytes) {
    char text[256];
    expect(dsv3_trainer_load(trainer, TAG + 1, data, bytes, &error) == DSV3_ERR_MISMATCH, "another tag was accepted");
    printf("  %s\n", dsv3_error_text(&error, text, sizeof text));
    expect(dsv3_trainer_load(trainer, TAG, data, bytes - 1, &error) == DSV3_ERR_DAMAGED, "cut bytes were accepted");
    printf("  %s\n", dsv3_error_text(&error, text, sizeof text));
    data[bytes / 2] ^= 1;
    expect(dsv3_trainer_load(trainer, TAG, data, bytes, &error) == DSV3_ERR_DAMAGED, "altered bytes were accepted");
    printf("  %s\n", dsv3_error_text(&error, text, sizeof text));
    data[bytes / 2] ^= 1;
}

/* Two numbers say where to begin and how to go on; the next ones must be right. */
static void count(const dsv3_model *model, int32_t first, int32_t step) {
    int32_t prompt[2];
    float logits[V];
    dsv3_workspace work;
    dsv3_sequence text, *list = &text;
    size_t bytes;
    void *memory, *work_memory;
    prompt[0] = first;
    prompt[1] = (first + step) % V;
    check(dsv3_workspace_size(&model->config, 2, context.threads, &bytes, &error), "workspace_size");
    work_memory = take(bytes);
    check(dsv3_workspace_init(&model->config, &work, 2, context.threads, work_memory, bytes, &error),
          "workspace_init");
    check(dsv3_sequence_size(model, T, DSV3_F32, 2, 0, &bytes, &error), "sequence_size");
    memory = take(bytes);
    check(dsv3_sequence_init(model, &text, T, DSV3_F32, 2, 0, memory, bytes, &error), "sequence_init");
    check(dsv3_sequence_append(model, &text, prompt, 2, &error), "sequence_append");
    text.limit = T;
    while (dsv3_sequence_length(&text) < T) {
        check(dsv3_generate_step(&context, logits, model, &list, 1, &work, &error), "generate_step");
    }
    expect(dsv3_sequence_state(&text) == DSV3_STATE_LIMIT && dsv3_sequence_length(&text) == T,
           "the text is too short");
    printf("  by %d:", (int)step);
    for (int t = 0; t < T; t++) printf(" %d", (int)text.history[t]);
    printf("\n");
    for (int t = 0; t < T; t++) expect(text.history[t] == (first + t * step) % V, "it counts wrong");
    free(memory);
    free(work_memory);
}

int main(void) {
    dsv3_config config = tiny();
    dsv3_trainer run, resumed;
    dsv3_rng rng = {1};
    void *run_memory, *resumed_memory, *half, *end[2];
    size_t half_bytes, end_bytes[2];
    double first = 0, last = 0, again = 0;
    check(dsv3_config_check(&config, &error), "config");
    check(dsv3_context_init(&context, DSV3_BACKEND_AUTO, 0, &error), "context");
    run_memory = prepare(&config, &run);
    dsv3_parameters_random(&run.weights, &rng, 0.02f, NULL);
    for (int s = 0; s < STEPS / 2; s++) {
        last = train_step(&run);
        if (s == 0) first = last;
    }
    half = save(&run, &half_bytes);
    printf("  %d parameters, %d bytes saved behind step %d\n", (int)run.weights.count, (int)half_bytes,
           (int)run.step);

    while (run.step < STEPS) last = train_step(&run); /* the run that never stopped */

    resumed_memory = prepare(&config, &resumed);
    refuse(&resumed, (unsigned char *)half, half_bytes);
    check(dsv3_trainer_load(&resumed, TAG, half, half_bytes, &error), "trainer_load");
    expect(resumed.step == STEPS / 2, "it does not know where it was");
    while (resumed.step < STEPS) again = train_step(&resumed);

    printf("  loss %.3f before, %.3f after\n", first, last);
    expect(last < first / 4, "the loss has not fallen clearly");
    expect(memcmp(&last, &again, sizeof last) == 0, "the resumed run has another loss");
    expect(run.weights.count == resumed.weights.count &&
               memcmp(run.weights.data, resumed.weights.data, run.weights.count * sizeof(float)) == 0,
           "the resumed run has other weights");
    end[0] = save(&run, &end_bytes[0]); /* moments, biases and loads too */
    end[1] = save(&resumed, &end_bytes[1]);
    expect(end_bytes[0] == end_bytes[1] && memcmp(end[0], end[1], end_bytes[0]) == 0,
           "the resumed run saves otherwise");
    for (int32_t step = 1; step <= 3; step++) count(&resumed.weights.model, 12 + step, step);
    free(end[0]);
    free(end[1]);
    free(half);
    free(run_memory);
    free(resumed_memory);
    printf("train_integers: ok\n");
    return 0;
}
