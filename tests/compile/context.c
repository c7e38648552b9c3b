/* Says what dsv3_context_init says. */
#include <stdio.h>

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

int main(void) {
    char text[256];
    dsv3_context context;
    dsv3_error error;
    dsv3_result result = dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, &error);
    puts(dsv3_error_text(&error, text, sizeof text));
    return result != DSV3_OK;
}
