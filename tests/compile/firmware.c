/* What a firmware is linked with: tests/check_size.sh builds it with each function in a section of its own and drops what is
 * not reached. Binds a model, reads a prompt, writes greedily; with -DGENERATE by dsv3_generate_step, with a draft. */
#define DSV3_NO_TRAINING
#include "freestanding.c"

static unsigned char model_memory[65536], cache_memory[65536], workspace_memory[65536];
static float logits[3 * 256];

static dsv3_result find(void *user, const char *name, dsv3_tensor *tensor) {
    (void)user, (void)name, (void)tensor;
    return DSV3_ERR_MISSING; /* weights in flash */
}

int main(void) {
    dsv3_config config = dsv3_config_default();
    dsv3_context context;
    dsv3_model model;
    dsv3_workspace workspace;
    int32_t token = 1;
    dsv3_context_init(&context, DSV3_BACKEND_AUTO, 1, NULL);
    dsv3_model_bind(&config, &model, model_memory, sizeof model_memory, find, NULL, NULL);
    dsv3_workspace_init(&config, &workspace, 4, 1, workspace_memory, sizeof workspace_memory, NULL);
#ifdef GENERATE
    dsv3_sequence sequence, *one = &sequence;
    dsv3_sequence_init(&model, &sequence, 128, DSV3_BF16, 4, 1, cache_memory, sizeof cache_memory, NULL);
    dsv3_sequence_append(&model, &sequence, &token, 1, NULL);
    while (dsv3_generate_step(&context, logits, &model, &one, 1, &workspace, NULL) == DSV3_OK) token = sequence.token[0];
#else
    dsv3_cache cache;
    dsv3_batch batch = {1, NULL, NULL, NULL, 1, NULL};
    dsv3_cache_init(&config, &cache, 128, DSV3_BF16, cache_memory, sizeof cache_memory, NULL);
    batch.token = &token;
    while (dsv3_forward(&context, logits, &model, &cache, 1, &batch, &workspace, NULL) == DSV3_OK) {
        dsv3_sample(&token, logits, 256, 0.0f, 1.0f, NULL, NULL, NULL);
    }
#endif
    return (int)token;
}
