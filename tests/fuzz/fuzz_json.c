/* Arbitrary bytes as JSON: no crash, and what is accepted with tokens is accepted without them and the other way round
 * (but for repeated keys, which only the first can see). */
#define JSON_IMPLEMENTATION
#include "../../examples/json.h"
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    json_token tokens[256];
    size_t count = 0, again = 0, at = 0;
    json_result counted = json_parse((const char *)data, size, NULL, 0, &count, &at);
    json_result parsed = json_parse((const char *)data, size, tokens, 256, &again, &at);
    json_document doc = {(const char *)data, size, tokens, again};
    if (parsed == JSON_OK && (counted != JSON_OK || count != again)) abort();
    if (counted != JSON_OK && parsed == JSON_OK) abort();
    for (size_t i = 0; parsed == JSON_OK && i < again; i++) {
        char text[64];
        double x;
        int64_t n;
        size_t length;
        if (tokens[i].end > size || tokens[i].start > tokens[i].end || tokens[i].next <= i) abort();
        json_string(&doc, i, text, sizeof text, &length);
        json_double(&doc, i, &x);
        json_int(&doc, i, &n);
    }
    return 0;
}
