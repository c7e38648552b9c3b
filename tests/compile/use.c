/* Calls something from every chapter, so that nothing is compiled away. Also built as C++11. */
#include "dsv3.h"
#include <stdio.h>
#include <stdlib.h>

dsv3_result use_everything(void);

static dsv3_result find_nothing(void *user, const char *name, dsv3_tensor *tensor) {
    (void)user, (void)name, (void)tensor;
    return DSV3_ERR_MISSING;
}

dsv3_result use_everything(void) {
    dsv3_config config = dsv3_config_preset(DSV3_PRESET_MICRO);
    dsv3_context context;
    dsv3_error error;
    dsv3_model model;
    dsv3_workspace workspace;
    dsv3_cache cache;
    dsv3_rng rng = {1};
    dsv3_candidate candidates[4];
    float logits[4] = {0, 1, 2, 3}, cos_sin[8], score[8] = {0}, gate[2], scratch[16];
    int32_t token = 0, position = 3, idx[2];
    uint64_t turns[4];
    size_t bytes = 0;
    void *memory;
    dsv3_result result;
    if (dsv3_version() != DSV3_VERSION || DSV3_VERSION != 100 * (100 * DSV3_VERSION_MAJOR + DSV3_VERSION_MINOR) + DSV3_VERSION_PATCH)
        return DSV3_ERR_ARG;
    if (dsv3_config_check(&config, &error) != DSV3_OK) return error.code;
    if (dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL) != DSV3_OK) return DSV3_ERR_ARG;
    if (dsv3_sample(&token, logits, 4, 1.0f, 0.9f, &rng, candidates, NULL) != DSV3_OK) return DSV3_ERR_ARG;
    dsv3_rope_turns(&config, turns, NULL);
    dsv3_rope_table(cos_sin, &position, turns, dsv3_rope_factor(&config), 1, 8, NULL);
    dsv3_rope_rotate(score, cos_sin, 8, config.rope_interleave, NULL);
    if (dsv3_router_select(&config, idx, gate, score, NULL, NULL, 1, scratch, NULL) != DSV3_OK) return DSV3_ERR_ARG;
    if (dsv3_log_sum_exp(logits, 4) < 3.0f) return DSV3_ERR_ARG;
    if (dsv3_workspace_size(&config, 1, 1, &bytes, NULL) != DSV3_OK || bytes == 0) return DSV3_ERR_ARG;
    if (dsv3_workspace_init(&config, &workspace, 1, 1, NULL, 0, NULL) != DSV3_ERR_ARG) return DSV3_ERR_ARG;
    if (dsv3_cache_init(&config, &cache, 1, DSV3_F32, NULL, 0, NULL) != DSV3_ERR_ARG) return DSV3_ERR_ARG;
    if (dsv3_model_size(&config, &bytes, NULL) != DSV3_OK) return DSV3_ERR_ARG;
    memory = malloc(bytes);
    if (memory == NULL) return DSV3_ERR_MEMORY;
    result = dsv3_model_bind(&config, &model, memory, bytes, find_nothing, NULL, &error);
    free(memory);
    return result == DSV3_ERR_MISSING ? DSV3_OK : DSV3_ERR_ARG;
}
