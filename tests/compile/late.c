/* A program that includes a system header first: what strict C then hides, and where off_t has 32 bits it keeps them.
 * late FILE: opens a file; large pages come aligned. */
#include <stdio.h>

#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"
#include "large_pages.h"

int main(int argc, char **argv) {
    char *memory = (char *)large_pages_alloc(LARGE_PAGES_SIZE + 1);
    size_t beyond = (size_t)((uintptr_t)memory % LARGE_PAGES_SIZE);
    st_file file;
    st_error error;
    st_result result = st_open(&file, argc > 1 ? argv[1] : "", &error);
    printf("%d bytes beyond alignment, result %d: %s\n", (int)beyond, (int)result, error.message);
    st_close(&file);
    free(memory);
    return memory == NULL;
}
