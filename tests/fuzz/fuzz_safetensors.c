/* Arbitrary bytes as a .safetensors file: no crash, and every tensor of an accepted file lies within it. */
#define SAFETENSORS_IMPLEMENTATION
#include "../../examples/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    st_file file;
    st_error error;
    if (st_parse(&file, data, size, "fuzz", &error) == ST_OK) {
        for (size_t i = 0; i < file.count; i++) {
            const st_tensor *t = &file.tensor[i];
            const uint8_t *begin = (const uint8_t *)t->data;
            if (begin < data || (size_t)(begin - data) > size || t->bytes > size - (size_t)(begin - data)) abort();
            if (st_find(&file, t->name) != t) abort();
        }
    }
    st_close(&file);
    return 0;
}
