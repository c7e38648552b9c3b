/* json.h -- a strict JSON reader in one header: no allocation, no recursion, no globals.
 *
 * What it is: an RFC 8259 parser that turns a text into an array of tokens which the caller owns, and a
 * few accessors that read strings and numbers out of them. It is meant for text from strangers: every
 * byte is checked (UTF-8 too), depth is capped, repeated keys are refused, and no input makes it slow.
 *
 * What it is not: a writer, a streaming parser, or a reader of relaxed dialects (no comments, no trailing
 * commas, no NaN, no byte order mark).
 *
 * Use: in exactly one C or C++ file
 *
 *     #define JSON_IMPLEMENTATION
 *     #include "json.h"
 *
 * and in any other file only the #include. A complete example:
 *
 *     const char text[] = "{\"layers\": 61, \"scale\": 2.5}";
 *     json_token token[16];
 *     json_document doc;
 *     size_t count, at, value;
 *     uint64_t layers;
 *     if (json_parse(text, sizeof text - 1, token, 16, &count, &at) != JSON_OK) return 1;
 *     doc.text = text, doc.length = sizeof text - 1, doc.token = token, doc.count = count;
 *     if (json_find(&doc, 0, "layers", &value) == JSON_OK && json_uint(&doc, value, &layers) == JSON_OK)
 *         printf("%llu layers\n", (unsigned long long)layers);
 *
 * When the number of tokens is not known, call json_parse with tokens == NULL to count them first.
 *
 * Tokens lie in the order of the text. token[0] is the one top-level value. The members of an object
 * follow it as key, value, key, value; the elements of an array follow it directly. A value's `next` jumps
 * over everything inside it, so the members of token o are walked like this:
 *
 *     for (i = o + 1; i < token[o].next; i = token[i + 1].next) ...token[i] is a key, token[i + 1] its value
 *     for (i = a + 1; i < token[a].next; i = token[i].next) ...token[i] is an element of array a
 *
 * Contract
 *   Ownership: text and tokens belong to the caller and must outlive the json_document. Nothing is kept.
 *   Text: `length` bytes; a NUL at the end is neither needed nor looked at.
 *   Errors: a json_result, never an abort. Outputs are written on JSON_OK only, unless stated otherwise.
 *   Threads: no global state; calls on separate outputs may run at the same time.
 *   Locale: numbers are read without the C library, so the decimal point is always '.'.
 *   Time: O(bytes * log(keys)) at worst, also for keys made to collide. Stack: about 2 KB.
 */
#ifndef JSON_H
#define JSON_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An enum of 32 bits, also where one side of a call is compiled with -fshort-enums. */
#if defined(__cplusplus) && (__cplusplus >= 201103L || defined(_MSC_VER))
#define JSON_ENUM(name) enum name : int32_t
#elif defined(__GNUC__)
#define JSON_ENUM(name) enum __attribute__((__mode__(__SI__))) name
#else
#define JSON_ENUM(name) enum name
#endif

/* Deepest nesting of arrays and objects that is accepted: [[1]] has depth 2. */
#ifndef JSON_MAX_DEPTH
#define JSON_MAX_DEPTH 64
#endif

typedef JSON_ENUM(json_result) {
    JSON_OK = 0,
    JSON_ERR_TRUNC = -1,   /* the text ends before its value does (also: empty or only white space) */
    JSON_ERR_FORMAT = -2,  /* not JSON, not UTF-8, or a key twice in one object */
    JSON_ERR_LIMIT = -3,   /* nested too deep, a number out of range, or a string longer than its buffer */
    JSON_ERR_TOKENS = -4,  /* the token array is too small */
    JSON_ERR_MISSING = -5, /* no such key, or a token index outside the document */
    JSON_ERR_TYPE = -6     /* a value of another type */
} json_result;

typedef JSON_ENUM(json_type) {
    JSON_NULL,
    JSON_FALSE,
    JSON_TRUE,
    JSON_NUMBER,
    JSON_STRING,
    JSON_ARRAY,
    JSON_OBJECT
} json_type;

typedef struct json_token {
    json_type type;
    size_t start, end; /* bytes start..end-1 of the text; a string without its quotes, escapes as written */
    size_t size;       /* members of an object, elements of an array, 0 for the rest */
    size_t next;       /* index of the first token after this whole value */
} json_token;

/* What the accessors read. All four fields are the caller's: the text that was parsed and the `count`
 * tokens that json_parse wrote for it. Both pointers are borrowed. */
typedef struct json_document {
    const char *text;
    size_t length;
    const json_token *token;
    size_t count;
} json_document;

/* Parses exactly one value with optional white space around it.
 *   text      [length] bytes, UTF-8; may be NULL if length is 0
 *   tokens    [capacity], written; or NULL to only count and check. Counting checks all but repeated
 *             keys, which need the tokens as working memory. On an error the contents are unspecified.
 *   count     number of tokens of the document, 0 on an error; may be NULL
 *   error_at  offset of the byte at which the first error was noticed (`length` for JSON_ERR_TRUNC; a key
 *             that repeats an earlier one for a repeated key); written on an error only; may be NULL
 * A number is checked for its form here and for its range by the accessor that reads it. */
json_result json_parse(const char *text, size_t length, json_token *tokens, size_t capacity, size_t *count,
                       size_t *error_at);

/* Index of the value under `key` (NUL-terminated UTF-8) in the object at token index `object`.
 * Looks at each member once. JSON_ERR_MISSING without such a key, JSON_ERR_TYPE if it is no object. */
json_result json_find(const json_document *doc, size_t object, const char *key, size_t *value);

/* 1 if the token is a string that, with its escapes resolved, equals `text` (NUL-terminated), else 0. */
int json_equal(const json_document *doc, size_t token, const char *text);

/* Copies a string with its escapes resolved, as NUL-terminated UTF-8.
 *   out     [capacity], written; may be NULL if capacity is 0
 *   length  bytes without the NUL, also written when the result is JSON_ERR_LIMIT; may be NULL
 * JSON_ERR_LIMIT if capacity is less than *length + 1; JSON_ERR_FORMAT if the string contains \u0000,
 * which a C string cannot hold. On an error out is the empty string (where capacity allows). */
json_result json_string(const json_document *doc, size_t token, char *out, size_t capacity, size_t *length);

/* Integers. Only plain integer form is taken: 7168.0, 7e3 and "7168" are JSON_ERR_TYPE. A value outside
 * the type, such as -1 for json_uint, is JSON_ERR_LIMIT. */
json_result json_int(const json_document *doc, size_t token, int64_t *out);
json_result json_uint(const json_document *doc, size_t token, uint64_t *out);

/* Any number as an IEEE binary64. Rounded correctly (to nearest, ties to even, subnormals included) up to
 * 19 significant digits; longer ones are within 1 unit in the last place. Too large is JSON_ERR_LIMIT, too
 * small is 0 with the sign of the number. */
json_result json_double(const json_document *doc, size_t token, double *out);

/* true -> 1, false -> 0; anything else is JSON_ERR_TYPE. */
json_result json_bool(const json_document *doc, size_t token, int *out);

/* A short English name of the result: a constant string. */
const char *json_result_string(json_result result);

#ifdef __cplusplus
}
#endif
#endif /* JSON_H */

#if defined(JSON_IMPLEMENTATION) && !defined(JSONI_IMPLEMENTED)
#define JSONI_IMPLEMENTED

#ifdef __cplusplus
extern "C" {
#endif

/* ---- characters ------------------------------------------------------------------------------------ */

static int jsoni_digit(char c) { return c >= '0' && c <= '9'; }

/* Checks the UTF-8 sequence at text[at] and gives its length. The range of the second byte rules out
 * overlong forms (E0, F0), surrogates (ED) and values past U+10FFFF (F4). */
static json_result jsoni_utf8(const char *text, size_t at, size_t end, size_t *bytes) {
    unsigned lead = (unsigned char)text[at], low = 0x80, high = 0xBF;
    size_t n, i;
    if (lead < 0x80) {
        n = 1;
    } else if (lead >= 0xC2 && lead <= 0xDF) {
        n = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        n = 3;
        if (lead == 0xE0) low = 0xA0;
        if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        n = 4;
        if (lead == 0xF0) low = 0x90;
        if (lead == 0xF4) high = 0x8F;
    } else {
        return JSON_ERR_FORMAT;
    }
    for (i = 1; i < n; i++, low = 0x80, high = 0xBF) {
        unsigned c;
        if (end - at == i) return JSON_ERR_TRUNC;
        c = (unsigned char)text[at + i];
        if (c < low || c > high) return JSON_ERR_FORMAT;
    }
    *bytes = n;
    return JSON_OK;
}

/* Four hexadecimal digits at text[at]. */
static json_result jsoni_hex4(const char *text, size_t at, size_t end, uint32_t *code) {
    uint32_t value = 0;
    size_t i;
    for (i = 0; i < 4; i++) {
        char c;
        if (end - at == i) return JSON_ERR_TRUNC;
        c = text[at + i];
        value <<= 4;
        if (jsoni_digit(c))
            value |= (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            value |= (uint32_t)(c - 'a' + 10);
        else if (c >= 'A' && c <= 'F')
            value |= (uint32_t)(c - 'A' + 10);
        else
            return JSON_ERR_FORMAT;
    }
    *code = value;
    return JSON_OK;
}

/* \uXXXX with the backslash at text[at]; a high surrogate must be followed by an escaped low one. */
static json_result jsoni_escape_u(const char *text, size_t at, size_t end, size_t *bytes, uint32_t *code) {
    uint32_t low = 0;
    json_result result = jsoni_hex4(text, at + 2, end, code);
    if (result != JSON_OK) return result;
    *bytes = 6;
    if (*code < 0xD800 || *code > 0xDFFF) return JSON_OK;
    if (*code > 0xDBFF) return JSON_ERR_FORMAT;
    if (end - at == 6) return JSON_ERR_TRUNC;
    if (text[at + 6] != '\\') return JSON_ERR_FORMAT;
    if (end - at == 7) return JSON_ERR_TRUNC;
    if (text[at + 7] != 'u') return JSON_ERR_FORMAT;
    result = jsoni_hex4(text, at + 8, end, &low);
    if (result != JSON_OK) return result;
    if (low < 0xDC00 || low > 0xDFFF) return JSON_ERR_FORMAT;
    *bytes = 12;
    *code = 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00);
    return JSON_OK;
}

/* The escape with its backslash at text[at]: its length in the text and the character it stands for. */
static json_result jsoni_escape(const char *text, size_t at, size_t end, size_t *bytes, uint32_t *code) {
    if (end - at == 1) return JSON_ERR_TRUNC;
    *bytes = 2;
    switch (text[at + 1]) {
    case '"': *code = '"'; return JSON_OK;
    case '\\': *code = '\\'; return JSON_OK;
    case '/': *code = '/'; return JSON_OK;
    case 'b': *code = 8; return JSON_OK;
    case 'f': *code = 12; return JSON_OK;
    case 'n': *code = 10; return JSON_OK;
    case 'r': *code = 13; return JSON_OK;
    case 't': *code = 9; return JSON_OK;
    case 'u': return jsoni_escape_u(text, at, end, bytes, code);
    default: return JSON_ERR_FORMAT;
    }
}

/* A character as UTF-8; returns the number of bytes. */
static int jsoni_encode(uint32_t code, unsigned char out[4]) {
    if (code < 0x80) {
        out[0] = (unsigned char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (unsigned char)(0xC0 | (code >> 6));
        out[1] = (unsigned char)(0x80 | (code & 0x3F));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (unsigned char)(0xE0 | (code >> 12));
        out[1] = (unsigned char)(0x80 | ((code >> 6) & 0x3F));
        out[2] = (unsigned char)(0x80 | (code & 0x3F));
        return 3;
    }
    out[0] = (unsigned char)(0xF0 | (code >> 18));
    out[1] = (unsigned char)(0x80 | ((code >> 12) & 0x3F));
    out[2] = (unsigned char)(0x80 | ((code >> 6) & 0x3F));
    out[3] = (unsigned char)(0x80 | (code & 0x3F));
    return 4;
}

/* Walks the bytes of a checked string with its escapes resolved. */
typedef struct jsoni_bytes {
    const char *text;
    size_t at, end;
    unsigned char unit[4]; /* bytes of the escape that is being handed out: used .. have-1 are still due */
    int used, have;
} jsoni_bytes;

static void jsoni_bytes_begin(jsoni_bytes *b, const char *text, const json_token *token) {
    b->text = text;
    b->at = token->start;
    b->end = token->end;
    b->used = b->have = 0;
}

/* The next byte, 0..255, or -1 at the end. */
static int jsoni_bytes_next(jsoni_bytes *b) {
    uint32_t code = 0;
    size_t bytes = 0;
    if (b->used < b->have) return b->unit[b->used++];
    if (b->at >= b->end) return -1;
    if (b->text[b->at] != '\\') return (unsigned char)b->text[b->at++];
    if (jsoni_escape(b->text, b->at, b->end, &bytes, &code) != JSON_OK) return -1; /* not a checked string */
    b->at += bytes;
    b->have = jsoni_encode(code, b->unit);
    b->used = 1;
    return b->unit[0];
}

/* ---- repeated keys --------------------------------------------------------------------------------- */

/* Two equal keys are found by sorting. The keys' own tokens are the working memory: until the object is
 * finished, `next` of a key holds a hash of its bytes and `size` links it to the following key of a sorted
 * list (0 ends a list: token 0 is never a key). Both are put back afterwards. A merge sort keeps the worst
 * case at O(n log n) comparisons, and a comparison never costs more than the shorter key, so that keys
 * made to share a hash only cost time in proportion to their bytes. */

static size_t jsoni_hash(const char *text, const json_token *key) {
    uint32_t hash = 2166136261u;
    jsoni_bytes b;
    int c;
    jsoni_bytes_begin(&b, text, key);
    while ((c = jsoni_bytes_next(&b)) >= 0) hash = (hash ^ (uint32_t)c) * 16777619u;
    return (size_t)hash;
}

static int jsoni_compare_keys(const char *text, const json_token *a, const json_token *b) {
    jsoni_bytes x, y;
    int c, d;
    if (a->next != b->next) return a->next < b->next ? -1 : 1;
    jsoni_bytes_begin(&x, text, a);
    jsoni_bytes_begin(&y, text, b);
    do {
        c = jsoni_bytes_next(&x);
        d = jsoni_bytes_next(&y);
    } while (c == d && c >= 0);
    return c < d ? -1 : c > d;
}

/* Merges two sorted lists; two equal keys always meet here. *twice becomes the offset of the later one. */
static size_t jsoni_merge(const char *text, json_token *tokens, size_t a, size_t b, size_t *twice) {
    size_t head = 0, tail = 0;
    while (a && b) {
        size_t least;
        int order = jsoni_compare_keys(text, &tokens[a], &tokens[b]);
        if (order == 0) {
            size_t later = tokens[a].start > tokens[b].start ? tokens[a].start : tokens[b].start;
            if (later < *twice) *twice = later;
        }
        least = order <= 0 ? a : b;
        if (order <= 0)
            a = tokens[a].size;
        else
            b = tokens[b].size;
        if (tail)
            tokens[tail].size = least;
        else
            head = least;
        tail = least;
    }
    if (tail)
        tokens[tail].size = a ? a : b;
    else
        head = a ? a : b;
    return head;
}

/* JSON_ERR_FORMAT if the finished object has a key twice; *twice is the offset of the second one. */
static json_result jsoni_check_keys(const char *text, json_token *tokens, size_t object, size_t *twice) {
    size_t list[8 * sizeof(size_t)]; /* list[i] is empty or a sorted list of 2^i keys */
    size_t sorted = 0, i, key, end = tokens[object].next;
    *twice = (size_t)-1;
    for (i = 0; i < sizeof list / sizeof *list; i++) list[i] = 0;
    for (key = object + 1; key < end; key = tokens[key + 1].next) {
        sorted = key;
        tokens[key].size = 0;
        tokens[key].next = jsoni_hash(text, &tokens[key]);
        for (i = 0; list[i]; i++) {
            sorted = jsoni_merge(text, tokens, list[i], sorted, twice);
            list[i] = 0;
        }
        list[i] = sorted;
    }
    for (sorted = 0, i = 0; i < sizeof list / sizeof *list; i++)
        sorted = jsoni_merge(text, tokens, list[i], sorted, twice);
    for (key = object + 1; key < end; key = tokens[key + 1].next) {
        tokens[key].size = 0;
        tokens[key].next = key + 1;
    }
    return *twice == (size_t)-1 ? JSON_OK : JSON_ERR_FORMAT;
}

/* ---- parser ---------------------------------------------------------------------------------------- */

/* Every function below leaves `at` on the byte that is wrong when it fails. */
typedef struct jsoni_parser {
    const char *text;
    size_t length, at;
    json_token *tokens; /* [capacity] or NULL */
    size_t capacity, count;
    int depth;  /* open arrays and objects */
    int opened; /* the last thing read was an opening bracket: no comma is due */
    struct {
        size_t token;
        int object;
    } level[JSON_MAX_DEPTH];
} jsoni_parser;

static void jsoni_skip_space(jsoni_parser *p) {
    while (p->at < p->length) {
        char c = p->text[p->at];
        if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return;
        p->at++;
    }
}

/* Adds a token; its end is filled in for scalars, and corrected for containers when they close. */
static json_result jsoni_add(jsoni_parser *p, json_type type, size_t start, size_t end) {
    if (p->tokens) {
        json_token *t;
        if (p->count == p->capacity) {
            p->at = start;
            return JSON_ERR_TOKENS;
        }
        t = &p->tokens[p->count];
        t->type = type;
        t->start = start;
        t->end = end;
        t->size = 0;
        t->next = p->count + 1;
    }
    p->count++;
    return JSON_OK;
}

/* A string, from its opening quote to behind its closing one. */
static json_result jsoni_read_string(jsoni_parser *p) {
    size_t start = ++p->at, bytes = 0;
    uint32_t code;
    for (;;) {
        json_result result;
        unsigned c;
        if (p->at == p->length) return JSON_ERR_TRUNC;
        c = (unsigned char)p->text[p->at];
        if (c == '"') break;
        if (c < 0x20) return JSON_ERR_FORMAT;
        if (c == '\\')
            result = jsoni_escape(p->text, p->at, p->length, &bytes, &code);
        else
            result = jsoni_utf8(p->text, p->at, p->length, &bytes);
        if (result != JSON_OK) return result;
        p->at += bytes;
    }
    p->at++;
    return jsoni_add(p, JSON_STRING, start, p->at - 1);
}

/* One digit or more. */
static json_result jsoni_read_digits(jsoni_parser *p) {
    if (p->at == p->length) return JSON_ERR_TRUNC;
    if (!jsoni_digit(p->text[p->at])) return JSON_ERR_FORMAT;
    while (p->at < p->length && jsoni_digit(p->text[p->at])) p->at++;
    return JSON_OK;
}

static json_result jsoni_read_number(jsoni_parser *p) {
    size_t start = p->at;
    json_result result = JSON_OK;
    if (p->text[p->at] == '-') p->at++;
    /* A leading 0 stands alone; what follows it is then judged as what follows the number. */
    if (p->at < p->length && p->text[p->at] == '0')
        p->at++;
    else
        result = jsoni_read_digits(p);
    if (result == JSON_OK && p->at < p->length && p->text[p->at] == '.') {
        p->at++;
        result = jsoni_read_digits(p);
    }
    if (result == JSON_OK && p->at < p->length && (p->text[p->at] == 'e' || p->text[p->at] == 'E')) {
        p->at++;
        if (p->at < p->length && (p->text[p->at] == '+' || p->text[p->at] == '-')) p->at++;
        result = jsoni_read_digits(p);
    }
    return result == JSON_OK ? jsoni_add(p, JSON_NUMBER, start, p->at) : result;
}

static json_result jsoni_read_word(jsoni_parser *p, const char *word, json_type type) {
    size_t start = p->at;
    for (; *word; word++, p->at++) {
        if (p->at == p->length) return JSON_ERR_TRUNC;
        if (p->text[p->at] != *word) return JSON_ERR_FORMAT;
    }
    return jsoni_add(p, type, start, p->at);
}

static json_result jsoni_open(jsoni_parser *p, int object) {
    size_t token = p->count;
    json_result result;
    if (p->depth == JSON_MAX_DEPTH) return JSON_ERR_LIMIT;
    result = jsoni_add(p, object ? JSON_OBJECT : JSON_ARRAY, p->at, p->at + 1);
    if (result != JSON_OK) return result;
    p->level[p->depth].token = token;
    p->level[p->depth].object = object;
    p->depth++;
    p->opened = 1;
    p->at++;
    return JSON_OK;
}

/* Closes the innermost array or object at its bracket. */
static json_result jsoni_close(jsoni_parser *p) {
    size_t token, twice = 0;
    p->at++;
    p->depth--;
    p->opened = 0;
    if (!p->tokens) return JSON_OK;
    token = p->level[p->depth].token;
    p->tokens[token].end = p->at;
    p->tokens[token].next = p->count;
    if (!p->level[p->depth].object || p->tokens[token].size < 2) return JSON_OK;
    if (jsoni_check_keys(p->text, p->tokens, token, &twice) == JSON_OK) return JSON_OK;
    p->at = twice;
    return JSON_ERR_FORMAT;
}

/* A scalar, or the opening bracket of a container. */
static json_result jsoni_read_value(jsoni_parser *p) {
    char c;
    jsoni_skip_space(p);
    if (p->at == p->length) return JSON_ERR_TRUNC;
    p->opened = 0;
    c = p->text[p->at];
    switch (c) {
    case '{': return jsoni_open(p, 1);
    case '[': return jsoni_open(p, 0);
    case '"': return jsoni_read_string(p);
    case 't': return jsoni_read_word(p, "true", JSON_TRUE);
    case 'f': return jsoni_read_word(p, "false", JSON_FALSE);
    case 'n': return jsoni_read_word(p, "null", JSON_NULL);
    default: return c == '-' || jsoni_digit(c) ? jsoni_read_number(p) : JSON_ERR_FORMAT;
    }
}

/* A key and its colon. */
static json_result jsoni_read_key(jsoni_parser *p) {
    json_result result;
    jsoni_skip_space(p);
    if (p->at == p->length) return JSON_ERR_TRUNC;
    if (p->text[p->at] != '"') return JSON_ERR_FORMAT;
    result = jsoni_read_string(p);
    if (result != JSON_OK) return result;
    jsoni_skip_space(p);
    if (p->at == p->length) return JSON_ERR_TRUNC;
    if (p->text[p->at] != ':') return JSON_ERR_FORMAT;
    p->at++;
    return JSON_OK;
}

/* Goes from behind a value to the next one: closes what ends here, then takes the comma and the key.
 * *more = 0 when the top-level value is complete. */
static json_result jsoni_advance(jsoni_parser *p, int *more) {
    *more = 0;
    while (p->depth) {
        int object = p->level[p->depth - 1].object;
        jsoni_skip_space(p);
        if (p->at == p->length) return JSON_ERR_TRUNC;
        if (p->text[p->at] == (object ? '}' : ']')) {
            json_result result = jsoni_close(p);
            if (result != JSON_OK) return result;
            continue;
        }
        if (!p->opened) {
            if (p->text[p->at] != ',') return JSON_ERR_FORMAT;
            p->at++;
        }
        *more = 1;
        if (p->tokens) p->tokens[p->level[p->depth - 1].token].size++;
        return object ? jsoni_read_key(p) : JSON_OK;
    }
    return JSON_OK;
}

static json_result jsoni_read_document(jsoni_parser *p) {
    json_result result;
    int more = 1;
    do {
        result = jsoni_read_value(p);
        if (result == JSON_OK) result = jsoni_advance(p, &more);
    } while (result == JSON_OK && more);
    if (result != JSON_OK) return result;
    jsoni_skip_space(p);
    return p->at == p->length ? JSON_OK : JSON_ERR_FORMAT;
}

json_result json_parse(const char *text, size_t length, json_token *tokens, size_t capacity, size_t *count,
                       size_t *error_at) {
    jsoni_parser p;
    json_result result;
    p.text = text;
    p.length = length;
    p.at = 0;
    p.tokens = tokens;
    p.capacity = capacity;
    p.count = 0;
    p.depth = p.opened = 0;
    result = jsoni_read_document(&p);
    if (count) *count = result == JSON_OK ? p.count : 0;
    if (result == JSON_ERR_TRUNC) p.at = length;
    if (error_at && result != JSON_OK) *error_at = p.at;
    return result;
}

/* ---- accessors ------------------------------------------------------------------------------------- */

/* The token if it exists and has the type. */
static json_result jsoni_get(const json_document *doc, size_t token, json_type type, const json_token **out) {
    if (token >= doc->count) return JSON_ERR_MISSING;
    *out = &doc->token[token];
    return (*out)->type == type ? JSON_OK : JSON_ERR_TYPE;
}

json_result json_find(const json_document *doc, size_t object, const char *key, size_t *value) {
    const json_token *t = NULL;
    size_t i;
    json_result result = jsoni_get(doc, object, JSON_OBJECT, &t);
    if (result != JSON_OK) return result;
    for (i = object + 1; i < t->next; i = doc->token[i + 1].next) {
        if (json_equal(doc, i, key)) {
            *value = i + 1;
            return JSON_OK;
        }
    }
    return JSON_ERR_MISSING;
}

int json_equal(const json_document *doc, size_t token, const char *text) {
    const json_token *t = NULL;
    jsoni_bytes b;
    int c;
    if (jsoni_get(doc, token, JSON_STRING, &t) != JSON_OK) return 0;
    jsoni_bytes_begin(&b, doc->text, t);
    while ((c = jsoni_bytes_next(&b)) >= 0) {
        /* The first test keeps an escaped \u0000 from matching the end of `text` and running past it. */
        if (*text == '\0' || c != (unsigned char)*text) return 0;
        text++;
    }
    return *text == '\0';
}

json_result json_string(const json_document *doc, size_t token, char *out, size_t capacity, size_t *length) {
    const json_token *t = NULL;
    jsoni_bytes b;
    size_t n = 0;
    int c;
    json_result result = jsoni_get(doc, token, JSON_STRING, &t);
    if (capacity) out[0] = '\0';
    if (result != JSON_OK) return result;
    jsoni_bytes_begin(&b, doc->text, t);
    while ((c = jsoni_bytes_next(&b)) >= 0) {
        if (c == 0) {
            if (capacity) out[0] = '\0';
            return JSON_ERR_FORMAT;
        }
        if (n < capacity) out[n] = (char)(unsigned char)c;
        n++;
    }
    if (length) *length = n;
    if (n >= capacity) {
        if (capacity) out[0] = '\0';
        return JSON_ERR_LIMIT;
    }
    out[n] = '\0';
    return JSON_OK;
}

/* Sign and magnitude of a number in plain integer form. */
static json_result jsoni_integer(const json_document *doc, size_t token, int *negative, uint64_t *magnitude) {
    const json_token *t = NULL;
    uint64_t value = 0;
    int too_large = 0;
    size_t at;
    json_result result = jsoni_get(doc, token, JSON_NUMBER, &t);
    if (result != JSON_OK) return result;
    at = t->start;
    *negative = doc->text[at] == '-';
    if (*negative) at++;
    for (; at < t->end; at++) {
        unsigned digit;
        if (!jsoni_digit(doc->text[at])) return JSON_ERR_TYPE;
        digit = (unsigned)(doc->text[at] - '0');
        if (value > (UINT64_MAX - digit) / 10)
            too_large = 1; /* goes on: a later '.' makes it a TYPE error */
        else
            value = value * 10 + digit;
    }
    *magnitude = value;
    return too_large ? JSON_ERR_LIMIT : JSON_OK;
}

json_result json_int(const json_document *doc, size_t token, int64_t *out) {
    uint64_t magnitude = 0;
    int negative = 0;
    json_result result = jsoni_integer(doc, token, &negative, &magnitude);
    if (result != JSON_OK) return result;
    if (magnitude > (uint64_t)INT64_MAX + (negative ? 1u : 0u)) return JSON_ERR_LIMIT;
    if (!negative)
        *out = (int64_t)magnitude;
    else
        *out = magnitude ? -(int64_t)(magnitude - 1) - 1 : 0; /* never negates INT64_MIN */
    return JSON_OK;
}

json_result json_uint(const json_document *doc, size_t token, uint64_t *out) {
    uint64_t magnitude = 0;
    int negative = 0;
    json_result result = jsoni_integer(doc, token, &negative, &magnitude);
    if (result != JSON_OK) return result;
    if (negative && magnitude) return JSON_ERR_LIMIT;
    *out = magnitude;
    return JSON_OK;
}

/* ---- floating point -------------------------------------------------------------------------------- */

/* mantissa * 10^exponent is worked out exactly as big * 2^shift, with big an integer of 36 words. A
 * negative exponent divides a mantissa that was moved up 1024 bits; what the divisions leave over only
 * matters for being zero or not. 5^400 has 929 bits, so that 95 bits of quotient or more remain. */
#define JSONI_WORDS 36

static void jsoni_big_multiply(uint32_t *big, uint32_t factor) {
    uint64_t carry = 0;
    int i;
    for (i = 0; i < JSONI_WORDS; i++) {
        carry += (uint64_t)big[i] * factor;
        big[i] = (uint32_t)(carry & 0xFFFFFFFFu);
        carry >>= 32;
    }
}

/* Returns 1 if there was a remainder. */
static int jsoni_big_divide(uint32_t *big, uint32_t divisor) {
    uint64_t rest = 0;
    int i;
    for (i = JSONI_WORDS - 1; i >= 0; i--) {
        rest = (rest << 32) | big[i];
        big[i] = (uint32_t)(rest / divisor);
        rest %= divisor;
    }
    return rest != 0;
}

/* The 64 bits of big from its highest set bit on, that bit's position in *top, and whether bits are left
 * below them. */
static uint64_t jsoni_big_top(const uint32_t *big, int *top, int *inexact) {
    uint64_t bits = 0;
    int i, last;
    *top = 32 * JSONI_WORDS - 1;
    while (!(big[*top / 32] >> (*top % 32) & 1)) --*top;
    last = *top - 63;
    for (i = *top; i >= 0 && i >= last; i--) bits = bits << 1 | (big[i / 32] >> (i % 32) & 1);
    if (last < 0) bits <<= -last;
    for (i = last - 1; i >= 0; i--) *inexact |= (int)(big[i / 32] >> (i % 32) & 1);
    return bits;
}

/* Rounds bits * 2^(power - 63), with the highest bit of bits set, to a double. */
static json_result jsoni_round(uint64_t bits, int power, int inexact, double *out) {
    int kept = power < -1022 ? 53 + 1022 + power : 53; /* subnormals have fewer bits */
    int dropped = 64 - kept, scale = power - 63 + dropped;
    uint64_t whole, half;
    double x;
    *out = 0;
    if (power > 1023) return JSON_ERR_LIMIT;
    if (kept < 0) return JSON_OK;
    whole = kept ? bits >> dropped : 0;
    half = (uint64_t)1 << (dropped - 1);
    if ((bits & half) && ((bits & (half - 1)) || inexact || (whole & 1))) whole++;
    if (power == 1023 && whole >> 53) return JSON_ERR_LIMIT;
    x = (double)whole; /* at most 2^53, and every step below is exact */
    for (; scale > 0; scale--) x *= 2;
    for (; scale < 0; scale++) x *= 0.5;
    *out = x;
    return JSON_OK;
}

/* mantissa is not 0; inexact: digits that are not 0 were cut off behind it. */
static json_result jsoni_scale(uint64_t mantissa, int64_t exponent, int inexact, double *out) {
    uint32_t big[JSONI_WORDS] = {0};
    int base = exponent < 0 ? 32 : 0, top = 0, left = 0, step;
    uint64_t bits;
    *out = 0;
    if (exponent > 310) return JSON_ERR_LIMIT;
    if (exponent < -400) return JSON_OK;
    big[base] = (uint32_t)(mantissa & 0xFFFFFFFFu);
    big[base + 1] = (uint32_t)(mantissa >> 32);
    for (left = (int)(exponent < 0 ? -exponent : exponent); left > 0; left -= step) {
        uint32_t power = 5;
        for (step = 1; step < left && step < 13; step++) power *= 5; /* 5^13 is the last to fit 32 bits */
        if (exponent < 0)
            inexact |= jsoni_big_divide(big, power);
        else
            jsoni_big_multiply(big, power);
    }
    bits = jsoni_big_top(big, &top, &inexact);
    return jsoni_round(bits, top + (int)exponent - 32 * base, inexact, out);
}

/* The digits after 'e', with their sign; enough is kept to tell "far too large" from "far too small". */
static int64_t jsoni_exponent(const char *text, size_t at, size_t end) {
    int64_t value = 0;
    int negative = text[at] == '-';
    if (negative || text[at] == '+') at++;
    for (; at < end; at++)
        if (value < 10000000000000000) value = value * 10 + (text[at] - '0');
    return negative ? -value : value;
}

json_result json_double(const json_document *doc, size_t token, double *out) {
    const json_token *t = NULL;
    uint64_t mantissa = 0;
    int64_t exponent = 0;
    int negative, fraction = 0, kept = 0, inexact = 0;
    size_t at;
    double x = 0;
    json_result result = jsoni_get(doc, token, JSON_NUMBER, &t);
    if (result != JSON_OK) return result;
    negative = doc->text[t->start] == '-';
    for (at = t->start + (negative ? 1u : 0u); at < t->end; at++) {
        char c = doc->text[at];
        if (c == 'e' || c == 'E') {
            exponent += jsoni_exponent(doc->text, at + 1, t->end);
            break;
        } else if (c == '.') {
            fraction = 1;
        } else if (kept == 19) { /* no room in 64 bits: the digit only counts as a place */
            inexact |= c != '0';
            exponent += !fraction;
        } else {
            mantissa = mantissa * 10 + (uint64_t)(c - '0');
            if (mantissa) kept++; /* leading zeros are not significant */
            exponent -= fraction;
        }
    }
    if (mantissa) result = jsoni_scale(mantissa, exponent, inexact, &x);
    if (result == JSON_OK) *out = negative ? -x : x;
    return result;
}

json_result json_bool(const json_document *doc, size_t token, int *out) {
    if (token >= doc->count) return JSON_ERR_MISSING;
    if (doc->token[token].type != JSON_TRUE && doc->token[token].type != JSON_FALSE) return JSON_ERR_TYPE;
    *out = doc->token[token].type == JSON_TRUE;
    return JSON_OK;
}

const char *json_result_string(json_result result) {
    switch (result) {
    case JSON_OK: return "ok";
    case JSON_ERR_TRUNC: return "text ends too early";
    case JSON_ERR_FORMAT: return "not valid JSON";
    case JSON_ERR_LIMIT: return "beyond a limit";
    case JSON_ERR_TOKENS: return "too many tokens";
    case JSON_ERR_MISSING: return "no such key";
    case JSON_ERR_TYPE: return "wrong type";
    default: return "unknown result";
    }
}

#ifdef __cplusplus
}
#endif
#endif /* JSON_IMPLEMENTATION */
