/* Arbitrary bytes as a config.json: no crash, and what is accepted has sizes that can be asked for. */
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "../../examples/checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    dsv3_config config;
    st_error error;
    size_t bytes;
    if (checkpoint_config_parse(&config, (const char *)data, size, "fuzz", &error) != ST_OK) return 0;
    if (dsv3_config_check(&config, NULL) != DSV3_OK) abort();
    dsv3_model_size(&config, &bytes, NULL);
    dsv3_cache_size(&config, 16, DSV3_BF16, &bytes, NULL);
    dsv3_workspace_size(&config, 16, 2, &bytes, NULL);
    return 0;
}
