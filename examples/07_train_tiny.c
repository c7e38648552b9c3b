/* Lesson 7: a complete training loop. A tiny model learns four beginnings of novels by heart, and recites them.
 *
 * A step is begin, accumulate, end. begin is told how many targets the whole step has, so that each of its
 * micro-batches (here one) can weigh its losses rightly; accumulate runs forward and backward; end clips, lets AdamW
 * move the weights, and then moves the router's biases by the loads of the step.
 *
 * Weights near 0 make all characters equally likely: the loss begins at ln V, for the main model and for the MTP
 * module. The loss that is minimised is main + 0.3 MTP + balance. MaxVio (lesson 4) is that of the main model's MoE
 * layer: soon a few experts have all the tokens, then biases and gradients share them out.
 * 54528 parameters and 192 characters: the model learns them by heart and nothing else. So does the module: with its
 * drafts 43 characters take 22 steps. Between step 10 and the end roundings show, which differ between machines.
 *
 * Build and run:  make build/07_train_tiny && build/07_train_tiny
 * Expected output:
 *     54528 parameters, ln 128 = 4.852
 *     step   main    MTP  MaxVio
 *        0  4.852  4.849     1.0
 *        5   4.31   4.30     3.0
 *       10   3.17   3.17     2.2
 *      150   0.00   0.00   < 0.3
 *     It is |a truth universally acknowledged, that a si| 22 steps
 *     Emma W|oodhouse, handsome, clever, and rich, with | 22 steps
 *     No one| who had ever seen Catherine Morland in her| 22 steps
 *     The fa|mily of Dashwood had long been settled in S| 22 steps
 */
#define DSV3_IMPLEMENTATION
#include "../dsv3.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Sequences of the batch, tokens of each, of these the prompt when it recites; the vocabulary, ASCII. */
enum { B = 4, T = 48, PROMPT = 6, V = 128, STEPS = 150 };

static const char *const novel[B] = {
    "It is a truth universally acknowledged, that a single man",
    "Emma Woodhouse, handsome, clever, and rich, with a comfort",
    "No one who had ever seen Catherine Morland in her infancy",
    "The family of Dashwood had long been settled in Sussex. T",
};

static dsv3_context context;
static dsv3_trainer trainer;
static dsv3_error error;
static int32_t token[B * T], target[B * T], sequence[B * T];

static void check(dsv3_result result) {
    char text[200];
    if (result == DSV3_OK) return;
    printf("%s\n", error.code == result ? dsv3_error_text(&error, text, sizeof text) : dsv3_result_string(result));
    exit(1);
}

static dsv3_config tiny(void) {
    dsv3_config c = dsv3_config_default();
    c.vocab_size = V;
    c.hidden_size = 32;
    c.intermediate_size = 64;
    c.moe_intermediate_size = 16;
    c.num_hidden_layers = 2;
    c.num_nextn_predict_layers = 1;
    c.first_k_dense_replace = 1;
    c.num_attention_heads = 2;
    c.kv_lora_rank = 16;
    c.qk_nope_head_dim = 12;
    c.qk_rope_head_dim = 4;
    c.v_head_dim = 12;
    c.n_routed_experts = 8;
    c.n_shared_experts = 1;
    c.num_experts_per_tok = 2;
    return c;
}

/* The trainer has all that is trained, and all memory for it. */
static void *prepare(const dsv3_config *config) {
    dsv3_training settings = dsv3_training_default();
    dsv3_rng rng = {1};
    size_t bytes = 0;
    void *memory;
    settings.rows = B * T;
    settings.sequences = B;
    settings.longest = T;
    check(dsv3_config_check(config, &error));
    check(dsv3_trainer_size(config, &settings, context.threads, &bytes, NULL));
    memory = malloc(bytes);
    check(dsv3_trainer_init(config, &trainer, &settings, context.threads, memory, bytes, NULL));
    dsv3_parameters_random(&trainer.weights, &rng, 0.006f, NULL);
    trainer.balancer.schedule.speed = 0.01; /* V3's 0.001 is for many more steps */
    return memory;
}

static void train(const dsv3_text *text) {
    dsv3_schedule schedule = {0.01, 0.001, 0.001, 10, 50, STEPS, STEPS};
    const dsv3_losses *sum = &trainer.losses; /* of the step; they stay until the next begins */
    printf("step   main    MTP  MaxVio\n");
    for (int s = 0; s <= STEPS; s++) {
        uint64_t targets[2] = {0, 0}, sequences = 0;
        double rate = dsv3_learning_rate(&schedule, (uint64_t)s), main_loss, mtp_loss, vio;
        dsv3_text_count(text, 1, targets, &sequences, NULL);
        check(dsv3_train_begin(&trainer, targets, sequences, NULL));
        check(dsv3_train_accumulate(&context, &trainer, text, &error));
        vio = dsv3_load_statistics(trainer.balancer.load + 1 * trainer.balancer.experts, trainer.balancer.experts).max_vio;
        check(dsv3_train_end(&context, &trainer, rate, NULL, &error)); /* clears the loads */
        main_loss = sum->nll[0] / (double)sum->targets[0];
        mtp_loss = sum->nll[1] / (double)sum->targets[1];
        if (s % 5 == 0 && s <= 10) {
            printf("%4d  %5.*f  %5.*f  %6.1f\n", s, s ? 2 : 3, main_loss, s ? 2 : 3, mtp_loss, vio);
        }
        if (s == STEPS) printf("%4d  %5.2f  %5.2f  %s\n", s, main_loss, mtp_loss, vio < 0.3 ? " < 0.3" : ">= 0.3");
    }
}

/* Writes what follows the first PROMPT characters, the module drafting one token ahead. */
static void recite(const int32_t *prompt) {
    const dsv3_model *model = &trainer.weights.model;
    dsv3_sequence s, *list = &s;
    float logits[2 * V];
    size_t bytes = 0, n = PROMPT;
    check(dsv3_sequence_size(model, T + 2, DSV3_F32, PROMPT, 1, &bytes, NULL));
    void *memory = malloc(bytes);
    check(dsv3_sequence_init(model, &s, T + 2, DSV3_F32, PROMPT, 1, memory, bytes, NULL));
    check(dsv3_sequence_append(model, &s, prompt, PROMPT, NULL));
    for (int i = 0; i < PROMPT; i++) putchar((char)prompt[i]);
    putchar('|');
    while (n < T + 1) {
        check(dsv3_generate_step(&context, logits, model, &list, 1, &trainer.workspace, &error));
        for (size_t i = 0; i < s.n_token && n < T + 1; i++, n++) putchar((char)s.token[i]);
    }
    printf("| %d steps\n", (int)s.steps);
    free(memory);
}

int main(void) {
    dsv3_config config = tiny();
    dsv3_text text = {B * T, token, target, sequence, NULL, NULL, 0};
    for (int i = 0; i < B * T; i++) {
        token[i] = novel[i / T][i % T];
        target[i] = novel[i / T][i % T + 1];
        sequence[i] = i / T;
    }
    dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL);
    void *memory = prepare(&config);
    printf("%d parameters, ln %d = %.3f\n", (int)trainer.weights.count, V, log((double)V));
    train(&text);
    for (int b = 0; b < B; b++) recite(token + b * T);
    free(memory);
    return 0;
}
