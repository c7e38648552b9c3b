/* Every companion as it is installed, over the compiled library; a model is opened. */
#define CHECKPOINT_IMPLEMENTATION
#define SVG_IMPLEMENTATION
#define THREADS_IMPLEMENTATION
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <dsv3/checkpoint.h>
#include <dsv3/large_pages.h>
#include <dsv3/svg.h>
#include <dsv3/thread_pool.h>

#include <dsv3.h>
#include <stdio.h>

int main(int argc, char **argv) {
    checkpoint model;
    st_error error;
    threads_pool *pool = threads_create(2);
    void *memory = large_pages_alloc(1000);
    int ok = argc == 2 && pool != NULL && memory != NULL && checkpoint_open(&model, argv[1], &error) == ST_OK;
    if (ok)
        printf("%d layers, dsv3 %d.%d.%d\n", (int)model.config.num_hidden_layers, DSV3_VERSION_MAJOR,
               DSV3_VERSION_MINOR, DSV3_VERSION_PATCH);
    if (ok) checkpoint_close(&model);
    free(memory);
    threads_destroy(pool);
    return ok ? 0 : 1;
}
