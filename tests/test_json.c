/* test_json.c -- examples/json.h: the JS cases of malformed text, known answers for every accessor,
 * numbers against strtod, keys made to collide, truncation, mutation, and text before a guard page.
 *
 *     gcc -std=c99 -Itests -Iexamples tests/test_json.c -o test_json -lm && ./test_json */
#if !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#endif
#define JSON_IMPLEMENTATION
#include "json.h"

#include "test.h"
#include <time.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define TEST_GUARD_PAGE
#endif

#define TOKENS 256

/* A text in memory of its exact size, so that a read past its end is seen; and its parse. */
typedef struct parsed {
    char *text;
    json_token token[TOKENS];
    json_document doc;
    json_result result;
    size_t error_at;
} parsed;

static void parse_bytes(parsed *p, const char *text, size_t length) {
    p->text = (char *)test_alloc(length);
    memcpy(p->text, text, length);
    p->doc.text = p->text;
    p->doc.length = length;
    p->doc.token = p->token;
    p->doc.count = 99;
    p->error_at = (size_t)-1;
    p->result = json_parse(p->text, length, p->token, TOKENS, &p->doc.count, &p->error_at);
}

static void parse(parsed *p, const char *text) { parse_bytes(p, text, strlen(text)); }

static void drop(parsed *p) { free(p->text); }

static void same(const char *id, long long got, long long want) { test_eq(got, want, "JSON", 0, id); }

/* ---- accept and reject ----------------------------------------------------------------------------- */

/* The result of parsing and of counting. Counting does not look for repeated keys. */
static void check_parse(const char *id, const char *text, size_t length, json_result want, int repeated) {
    parsed p;
    size_t count = 7, at = 0;
    char *exact = (char *)test_alloc(length);
    memcpy(exact, text, length);
    parse_bytes(&p, text, length);
    same(id, p.result, want);
    if (want != JSON_OK) {
        same(id, (long long)p.doc.count, 0);
        CHECK(p.error_at <= length);
    }
    if (want == JSON_ERR_TRUNC) CHECK_EQ(p.error_at, length);
    same(id, json_parse(exact, length, NULL, 0, &count, &at), repeated ? JSON_OK : want);
    if (want == JSON_OK) CHECK_EQ(count, p.doc.count);
    same(id, json_parse(exact, length, NULL, 0, NULL, NULL), repeated ? JSON_OK : want);
    drop(&p);
    free(exact);
}

typedef struct text_case {
    const char *id, *text;
    json_result want;
} text_case;

static const text_case text_cases[] = {
    {"JS-02 string cut", "\"abc", JSON_ERR_TRUNC},
    {"JS-02 string cut in a key", "{\"a", JSON_ERR_TRUNC},
    {"JS-02 lone quote", "\"", JSON_ERR_TRUNC},
    {"JS-02 escape cut", "\"abc\\", JSON_ERR_TRUNC},
    {"JS-02 escape takes the quote", "\"abc\\\"", JSON_ERR_TRUNC},
    {"JS-02 u escape cut", "\"\\u12", JSON_ERR_TRUNC},
    {"JS-02 u escape cut by the quote", "\"\\u12\"", JSON_ERR_FORMAT},
    {"JS-02 u escape not hexadecimal", "\"\\u12g4\"", JSON_ERR_FORMAT},
    {"JS-02 unknown escape", "\"\\x41\"", JSON_ERR_FORMAT},
    {"JS-02 escaped apostrophe", "\"\\'\"", JSON_ERR_FORMAT},
    {"JS-02 capital U", "\"\\U0041\"", JSON_ERR_FORMAT},
    {"JS-03 key without quotes", "{a:1}", JSON_ERR_FORMAT},
    {"JS-03 key in apostrophes", "{'a':1}", JSON_ERR_FORMAT},
    {"JS-03 number as key", "{1:1}", JSON_ERR_FORMAT},
    {"JS-03 key alone", "{\"a\"}", JSON_ERR_FORMAT},
    {"JS-03 key cut", "{\"a\"", JSON_ERR_TRUNC},
    {"JS-03 colon cut", "{\"a\":", JSON_ERR_TRUNC},
    {"JS-03 no value", "{\"a\":}", JSON_ERR_FORMAT},
    {"JS-03 two colons", "{\"a\"::1}", JSON_ERR_FORMAT},
    {"JS-03 comma for colon", "{\"a\",1}", JSON_ERR_FORMAT},
    {"JS-03 colon in an array", "[\"a\":1]", JSON_ERR_FORMAT},
    {"JS-04 trailing comma in an array", "[1,]", JSON_ERR_FORMAT},
    {"JS-04 trailing comma in an object", "{\"a\":1,}", JSON_ERR_FORMAT},
    {"JS-04 comma alone", "[,]", JSON_ERR_FORMAT},
    {"JS-04 comma first", "[,1]", JSON_ERR_FORMAT},
    {"JS-04 comma first in an object", "{,\"a\":1}", JSON_ERR_FORMAT},
    {"JS-04 two commas", "[1,,2]", JSON_ERR_FORMAT},
    {"JS-04 comma at the top", "1,", JSON_ERR_FORMAT},
    {"JS-04 no comma", "[1 2]", JSON_ERR_FORMAT},
    {"JS-04 no comma in an object", "{\"a\":1 \"b\":2}", JSON_ERR_FORMAT},
    {"JS-05 NaN", "NaN", JSON_ERR_FORMAT},
    {"JS-05 nan", "nan", JSON_ERR_FORMAT},
    {"JS-05 Infinity", "[Infinity]", JSON_ERR_FORMAT},
    {"JS-05 -Infinity", "[-Infinity]", JSON_ERR_FORMAT},
    {"JS-05 literal cut", "tru", JSON_ERR_TRUNC},
    {"JS-05 literal wrong", "trux", JSON_ERR_FORMAT},
    {"JS-05 literal capital", "True", JSON_ERR_FORMAT},
    {"JS-05 literal too long", "nulll", JSON_ERR_FORMAT},
    {"JS-05 undefined", "[undefined]", JSON_ERR_FORMAT},
    {"JS-06 minus cut", "-", JSON_ERR_TRUNC},
    {"JS-06 minus alone", "[-]", JSON_ERR_FORMAT},
    {"JS-06 exponent cut", "1e", JSON_ERR_TRUNC},
    {"JS-06 exponent sign cut", "1e+", JSON_ERR_TRUNC},
    {"JS-06 exponent empty", "[1e]", JSON_ERR_FORMAT},
    {"JS-06 exponent with a point", "1e1.5", JSON_ERR_FORMAT},
    {"JS-06 leading zeros", "00", JSON_ERR_FORMAT},
    {"JS-06 leading zero", "01", JSON_ERR_FORMAT},
    {"JS-06 minus and leading zero", "-01", JSON_ERR_FORMAT},
    {"JS-06 plus", "+1", JSON_ERR_FORMAT},
    {"JS-06 two signs", "--1", JSON_ERR_FORMAT},
    {"JS-06 point first", ".5", JSON_ERR_FORMAT},
    {"JS-06 point cut", "1.", JSON_ERR_TRUNC},
    {"JS-06 point last", "[1.]", JSON_ERR_FORMAT},
    {"JS-06 comma for a point", "1,5", JSON_ERR_FORMAT},
    {"JS-06 hexadecimal", "0x10", JSON_ERR_FORMAT},
    {"JS-06 range is not a matter of form", "1e999", JSON_OK},
    {"JS-07 high surrogate alone", "\"\\ud800\"", JSON_ERR_FORMAT},
    {"JS-07 low surrogate alone", "\"\\udc00\"", JSON_ERR_FORMAT},
    {"JS-07 high surrogate cut", "\"\\ud800", JSON_ERR_TRUNC},
    {"JS-07 low surrogate cut", "\"\\ud800\\", JSON_ERR_TRUNC},
    {"JS-07 low surrogate cut", "\"\\ud800\\udc0", JSON_ERR_TRUNC},
    {"JS-07 two high surrogates", "\"\\ud800\\ud800\"", JSON_ERR_FORMAT},
    {"JS-07 surrogates in the wrong order", "\"\\udc00\\ud800\"", JSON_ERR_FORMAT},
    {"JS-07 high surrogate and a letter", "\"\\ud800a\"", JSON_ERR_FORMAT},
    {"JS-07 high surrogate and another escape", "\"\\ud800\\n\"", JSON_ERR_FORMAT},
    {"JS-07 high surrogate and no surrogate", "\"\\ud800\\u0041\"", JSON_ERR_FORMAT},
    {"JS-08 raw newline", "\"a\nb\"", JSON_ERR_FORMAT},
    {"JS-08 raw tab", "\"a\tb\"", JSON_ERR_FORMAT},
    {"JS-08 raw 1F", "\"a\x1f\"", JSON_ERR_FORMAT},
    {"JS-08 form feed is no space", "\f1", JSON_ERR_FORMAT},
    {"JS-08 no-break space is no space",
     "\xc2\xa0"
     "1",
     JSON_ERR_FORMAT},
    {"JS-08 DEL is allowed", "\"\x7f\"", JSON_OK},
    {"JS-11 block comment", "/* */1", JSON_ERR_FORMAT},
    {"JS-11 line comment", "1 // one", JSON_ERR_FORMAT},
    {"JS-11 comment inside", "[1 /* */]", JSON_ERR_FORMAT},
    {"JS-11 hash", "# 1", JSON_ERR_FORMAT},
    {"JS-12 empty", "", JSON_ERR_TRUNC},
    {"JS-12 white space only", " \t\r\n ", JSON_ERR_TRUNC},
    {"JS-12 byte order mark",
     "\xef\xbb\xbf"
     "1",
     JSON_ERR_FORMAT},
    {"JS-12 two values", "1 2", JSON_ERR_FORMAT},
    {"JS-12 two objects", "{}{}", JSON_ERR_FORMAT},
    {"UTF-8 FF", "\"\xff\"", JSON_ERR_FORMAT},
    {"UTF-8 continuation alone", "\"\x80\"", JSON_ERR_FORMAT},
    {"UTF-8 overlong C0 80", "\"\xc0\x80\"", JSON_ERR_FORMAT},
    {"UTF-8 overlong C1 BF", "\"\xc1\xbf\"", JSON_ERR_FORMAT},
    {"UTF-8 overlong E0 9F BF", "\"\xe0\x9f\xbf\"", JSON_ERR_FORMAT},
    {"UTF-8 overlong F0 8F BF BF", "\"\xf0\x8f\xbf\xbf\"", JSON_ERR_FORMAT},
    {"UTF-8 surrogate ED A0 80", "\"\xed\xa0\x80\"", JSON_ERR_FORMAT},
    {"UTF-8 surrogate ED BF BF", "\"\xed\xbf\xbf\"", JSON_ERR_FORMAT},
    {"UTF-8 above 10FFFF", "\"\xf4\x90\x80\x80\"", JSON_ERR_FORMAT},
    {"UTF-8 F5", "\"\xf5\x80\x80\x80\"", JSON_ERR_FORMAT},
    {"UTF-8 two bytes cut", "\"\xc3\"", JSON_ERR_FORMAT},
    {"UTF-8 three bytes cut", "\"\xe2\x82\"", JSON_ERR_FORMAT},
    {"UTF-8 four bytes cut", "\"\xf0\x9f\x98\"", JSON_ERR_FORMAT},
    {"UTF-8 cut by the end of the text", "\"\xf0\x9f", JSON_ERR_TRUNC},
    {"UTF-8 first and last of each length",
     "\"\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf\"", JSON_OK},
    {"UTF-8 outside a string", "\xc3\xa9", JSON_ERR_FORMAT},
    {"bracket cut", "[", JSON_ERR_TRUNC},
    {"brace cut", "{", JSON_ERR_TRUNC},
    {"brackets crossed", "[}", JSON_ERR_FORMAT},
    {"braces crossed", "{]", JSON_ERR_FORMAT},
    {"nesting crossed", "[{\"a\":1]}", JSON_ERR_FORMAT},
    {"closing bracket alone", "]", JSON_ERR_FORMAT},
    {"closing bracket too many", "[1]]", JSON_ERR_FORMAT},
    {"apostrophes", "'a'", JSON_ERR_FORMAT},
    {"string", "\"\"", JSON_OK},
    {"string of every escape", "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0000\\uFFff\\ud83d\\ude00\"", JSON_OK},
    {"empty array", " [ ] ", JSON_OK},
    {"empty object", "\t{\r\n}", JSON_OK},
    {"white space everywhere", " { \"a\" : [ 1 , 2 ] , \"b\" : { } } \n", JSON_OK},
    {"no white space", "{\"a\":[1,2],\"b\":{}}", JSON_OK},
    {"numbers", "[0,-0,10,-1,1.5,0.0,1e1,1E+1,1e-01,-0.5E00,123456789012345678901234567890]", JSON_OK},
    {"literals", "[true,false,null]", JSON_OK},
};

static void test_texts(void) {
    size_t i;
    for (i = 0; i < sizeof text_cases / sizeof *text_cases; i++)
        check_parse(text_cases[i].id, text_cases[i].text, strlen(text_cases[i].text), text_cases[i].want, 0);
    check_parse("JS-08 NUL in a string", "\"a\0b\"", 5, JSON_ERR_FORMAT, 0);
    check_parse("JS-08 NUL after the value", "1\0", 2, JSON_ERR_FORMAT, 0);
    CHECK_EQ(json_parse(NULL, 0, NULL, 0, NULL, NULL), JSON_ERR_TRUNC);
}

/* JS-01: nesting of n arrays or objects, closed or not. */
static json_result parse_nested(size_t n, const char *open, const char *close, size_t *at) {
    size_t a = strlen(open), b = strlen(close), i;
    char *text = (char *)test_alloc(n * (a + b) + 1);
    json_result result, counted;
    json_token *token = (json_token *)test_alloc((2 * JSON_MAX_DEPTH + 1) * sizeof *token);
    for (i = 0; i < n; i++) memcpy(text + i * a, open, a);
    text[n * a] = '1';
    for (i = 0; i < n; i++) memcpy(text + n * a + 1 + i * b, close, b);
    result = json_parse(text, n * (a + b) + 1, token, 2 * JSON_MAX_DEPTH + 1, NULL, at);
    counted = json_parse(text, n * (a + b) + 1, NULL, 0, NULL, NULL);
    CHECK_EQ(counted, result);
    free(text);
    free(token);
    return result;
}

static void test_depth(void) {
    size_t at = 0;
    CHECK_EQ(JSON_MAX_DEPTH, 64);
    same("JS-01 depth 63", parse_nested(63, "[", "]", NULL), JSON_OK);
    same("JS-01 depth 64", parse_nested(64, "[", "]", NULL), JSON_OK);
    same("JS-01 depth 65", parse_nested(65, "[", "]", &at), JSON_ERR_LIMIT);
    CHECK_EQ(at, 64);
    same("JS-01 depth 100000", parse_nested(100000, "[", "]", NULL), JSON_ERR_LIMIT);
    same("JS-01 depth 100000, never closed", parse_nested(100000, "[", "", NULL), JSON_ERR_LIMIT);
    same("JS-01 objects, depth 63", parse_nested(63, "{\"a\":", "}", NULL), JSON_OK);
    same("JS-01 objects, depth 65", parse_nested(65, "{\"a\":", "}", NULL), JSON_ERR_LIMIT);
}

/* ---- tokens ---------------------------------------------------------------------------------------- */

static void check_token(const parsed *p, size_t i, json_type type, const char *text, size_t size, size_t next) {
    const json_token *t = &p->token[i];
    CHECK(i < p->doc.count);
    CHECK_EQ(t->type, type);
    CHECK_EQ(t->size, size);
    CHECK_EQ(t->next, next);
    CHECK(t->end - t->start == strlen(text) && memcmp(p->text + t->start, text, strlen(text)) == 0);
}

static void test_tokens(void) {
    static const char text[] = " {\"b\":[1,[],\"x\\n\"], \"a\":{\"c\":null,\"d\":true} , \"c\":-2.5e1} ";
    parsed p;
    size_t n, count = 0, at = 0;
    json_token token[16];
    parse(&p, text);
    CHECK_EQ(p.result, JSON_OK);
    CHECK_EQ(p.doc.count, 14);
    check_token(&p, 0, JSON_OBJECT, "{\"b\":[1,[],\"x\\n\"], \"a\":{\"c\":null,\"d\":true} , \"c\":-2.5e1}", 3, 14);
    check_token(&p, 1, JSON_STRING, "b", 0, 2);
    check_token(&p, 2, JSON_ARRAY, "[1,[],\"x\\n\"]", 3, 6);
    check_token(&p, 3, JSON_NUMBER, "1", 0, 4);
    check_token(&p, 4, JSON_ARRAY, "[]", 0, 5);
    check_token(&p, 5, JSON_STRING, "x\\n", 0, 6);
    check_token(&p, 6, JSON_STRING, "a", 0, 7);
    check_token(&p, 7, JSON_OBJECT, "{\"c\":null,\"d\":true}", 2, 12);
    check_token(&p, 8, JSON_STRING, "c", 0, 9);
    check_token(&p, 9, JSON_NULL, "null", 0, 10);
    check_token(&p, 10, JSON_STRING, "d", 0, 11);
    check_token(&p, 11, JSON_TRUE, "true", 0, 12);
    check_token(&p, 12, JSON_STRING, "c", 0, 13);
    check_token(&p, 13, JSON_NUMBER, "-2.5e1", 0, 14);
    drop(&p);
    /* An array one token too small, for every size: the code, and nothing written behind it. */
    for (n = 0; n <= 14; n++) {
        json_token *exact = (json_token *)test_alloc(n * sizeof *exact);
        json_result result = json_parse(text, sizeof text - 1, exact, n, &count, &at);
        CHECK_EQ(result, n < 14 ? JSON_ERR_TOKENS : JSON_OK);
        CHECK_EQ(count, n < 14 ? 0 : 14);
        free(exact);
    }
    CHECK_EQ(json_parse("7", 1, token, 0, NULL, NULL), JSON_ERR_TOKENS);
    /* Offsets of errors. */
    CHECK_EQ(json_parse("[1, x]", 6, token, 16, NULL, &at), JSON_ERR_FORMAT);
    CHECK_EQ(at, 4);
    CHECK_EQ(json_parse("{\"k\" 1}", 7, token, 16, NULL, &at), JSON_ERR_FORMAT);
    CHECK_EQ(at, 5);
    CHECK_EQ(json_parse("[\"ab\xff\"]", 7, token, 16, NULL, &at), JSON_ERR_FORMAT);
    CHECK_EQ(at, 4);
    CHECK_EQ(json_parse("[1] 2", 5, token, 16, NULL, &at), JSON_ERR_FORMAT);
    CHECK_EQ(at, 4);
    at = 77; /* only written on an error */
    CHECK_EQ(json_parse("[1]", 3, token, 16, NULL, &at), JSON_OK);
    CHECK_EQ(at, 77);
}

/* ---- repeated keys --------------------------------------------------------------------------------- */

static void test_repeated_keys(void) {
    static const struct {
        const char *id, *text;
        int repeated;
    } cases[] = {
        {"JS-10 twice", "{\"a\":1,\"a\":2}", 1},
        {"JS-10 empty key twice", "{\"\":1,\"\":2}", 1},
        {"JS-10 escaped", "{\"a\":1,\"\\u0061\":2}", 1},
        {"JS-10 escaped, both ways", "{\"\\u00e9\":1,\"\xc3\xa9\":2}", 1},
        {"JS-10 surrogate pair", "{\"\\ud83d\\ude00\":1,\"\xf0\x9f\x98\x80\":2}", 1},
        {"JS-10 three bytes", "{\"\\u20AC\":1,\"\xe2\x82\xac\":2}", 1},
        {"JS-10 escaped slash", "{\"\\/\":1,\"/\":2}", 1},
        {"JS-10 far apart", "{\"a\":{\"a\":[{\"a\":1}]},\"b\":1,\"c\":2,\"a\":2}", 1},
        {"JS-10 in a nested object", "[{\"x\":{\"a\":1,\"b\":2,\"b\":3}}]", 1},
        {"JS-10 three times", "{\"a\":1,\"a\":2,\"a\":3}", 1},
        {"JS-10 with NUL", "{\"\\u0000\":1,\"\\u0000\":2}", 1},
        {"JS-10 same key at two levels", "{\"a\":{\"a\":{\"a\":1}}}", 0},
        {"JS-10 same key in two objects", "[{\"a\":1},{\"a\":1}]", 0},
        {"JS-10 key and value", "{\"a\":\"b\",\"b\":\"a\"}", 0},
        {"JS-10 prefix", "{\"a\":1,\"aa\":2,\"\":3}", 0},
        {"JS-10 capital", "{\"a\":1,\"A\":2}", 0},
        {"JS-10 NUL is no end", "{\"a\":1,\"a\\u0000\":2,\"a\\u0000b\":3}", 0},
        {"JS-10 backslash and u", "{\"\\\\u0061\":1,\"a\":2}", 0},
    };
    size_t i;
    parsed p;
    for (i = 0; i < sizeof cases / sizeof *cases; i++)
        check_parse(cases[i].id, cases[i].text, strlen(cases[i].text), cases[i].repeated ? JSON_ERR_FORMAT : JSON_OK,
                    cases[i].repeated);
    parse(&p, "{\"b\":1,\"a\":2,\"c\":3,\"a\":4}");
    CHECK_EQ(p.error_at, 20); /* inside the quotes of the second "a" */
    drop(&p);
}

/* Keys that all have the same hash, found by search: the sort must then rest on comparing bytes. */
static size_t hash_of(const char *key, size_t length) {
    json_token t;
    memset(&t, 0, sizeof t);
    t.end = length;
    return jsoni_hash(key, &t);
}

/* A birthday search for two keys of 6 letters that share their hash behind this prefix. */
static int find_pair(const char *prefix, char *left, char *right) {
    enum { KEYS = 1 << 18, SLOTS = 1 << 19 };
    uint32_t *table = (uint32_t *)test_alloc(SLOTS * sizeof *table);
    char key[128], other[128];
    size_t n = strlen(prefix);
    uint32_t i;
    int found = 0;
    memset(table, 0, SLOTS * sizeof *table);
    snprintf(key, sizeof key, "%s", prefix);
    snprintf(other, sizeof other, "%s", prefix);
    for (i = 1; i < KEYS && !found; i++) {
        size_t hash, slot;
        snprintf(key + n, 7, "%06x", (i * 61u) & 0xFFFFFFu);
        hash = hash_of(key, n + 6);
        for (slot = hash % SLOTS; table[slot] && !found; slot = (slot + 1) % SLOTS) {
            snprintf(other + n, 7, "%06x", (table[slot] * 61u) & 0xFFFFFFu);
            found = hash_of(other, n + 6) == hash;
        }
        table[slot] = i;
    }
    memcpy(left, key + n, 7);
    memcpy(right, other + n, 7);
    free(table);
    return found;
}

/* A pair for every place, found behind the left keys of the places before it: the hash only depends on
 * the number of places, so the 2^PAIRS ways to choose left or right all have the same one. */
static void test_collisions(void) {
    enum { PAIRS = 9, KEYS = 1 << PAIRS };
    char left[PAIRS][8], right[PAIRS][8], prefix[128] = "";
    char *text = (char *)test_alloc((KEYS + 1) * (6 * PAIRS + 8));
    json_token *token = (json_token *)test_alloc((2 * KEYS + 3) * sizeof *token);
    size_t i, k, length = 1, count = 0, hash = 0, differ = 0;
    for (k = 0; k < PAIRS; k++) {
        CHECK(find_pair(prefix, left[k], right[k]));
        memcpy(prefix + 6 * k, left[k], 7);
    }
    text[0] = '{';
    for (i = 0; i <= KEYS; i++) { /* the last key repeats the first */
        length += (size_t)sprintf(text + length, "\"");
        for (k = 0; k < PAIRS; k++) length += (size_t)sprintf(text + length, "%s", i >> k & 1 ? right[k] : left[k]);
        if (i == 0) hash = hash_of(text + length - 6 * PAIRS, 6 * PAIRS);
        differ += hash_of(text + length - 6 * PAIRS, 6 * PAIRS) != hash;
        length += (size_t)sprintf(text + length, "\":0%s", i < KEYS ? "," : "}");
    }
    CHECK_EQ(differ, 0);
    CHECK_EQ(json_parse(text, length, token, 2 * KEYS + 3, &count, NULL), JSON_ERR_FORMAT);
    length -= 6 * PAIRS + 5; /* without the last member */
    text[length - 1] = '}';
    CHECK_EQ(json_parse(text, length, token, 2 * KEYS + 3, &count, NULL), JSON_OK);
    CHECK_EQ(count, 2 * KEYS + 1);
    free(text);
    free(token);
}

/* n members with keys from a format, parsed: the CPU time of the fastest of three. `repeat` makes the last key equal
 * the first. */
static double time_keys(size_t n, const char *prefix, size_t step, int repeat, json_result want) {
    size_t room = strlen(prefix) + 32, length = 0, i, count = 0;
    char *text = (char *)test_alloc(n * room + 2);
    json_token *token = (json_token *)test_alloc((2 * n + 1) * sizeof *token);
    double least = 1e9;
    int k;
    text[length++] = '{';
    for (i = 0; i < n; i++) {
        size_t key = repeat && i == n - 1 ? 0 : (size_t)((uint64_t)i * step % n);
        length += (size_t)sprintf(text + length, "%s\"%s%lu\":0", i ? "," : "", prefix, (unsigned long)key);
    }
    text[length++] = '}';
    for (k = 0; k < 3; k++) {
        clock_t start = clock();
        double seconds;
        CHECK_EQ(json_parse(text, length, token, 2 * n + 1, &count, NULL), want);
        seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        if (seconds < least) least = seconds;
        if (want != JSON_OK) continue;
        CHECK_EQ(count, 2 * n + 1);
        for (i = 1; i < count; i++) /* the working memory was put back */
            if (token[i].size != 0 || token[i].next != i + 1) break;
        CHECK_EQ(i, count);
    }
    free(text);
    free(token);
    return least;
}

/* Eight times the keys take at most 32 times as long: sorting takes 8 to 11 times, comparing all pairs 64. No limit in
 * seconds: that would test the machine; and numbers that fit a cache, for the same reason. (A millisecond is for the
 * clock.) */
static void check_growth(size_t n, const char *prefix, size_t step, int repeat, json_result want) {
    double few = time_keys(n / 8, prefix, step, repeat, want), many = time_keys(n, prefix, step, repeat, want);
    CHECK(many < 32 * few + 1e-3);
    printf("%lu keys in %.2f ms, %lu in %.1f\n", (unsigned long)(n / 8), 1000 * few, (unsigned long)n, 1000 * many);
}

static void test_many_keys(void) {
    static char prefix[4001];
    check_growth(12000, "model.layers.mlp.experts.", 1, 0, JSON_OK);
    check_growth(12000, "k", 11999, 0, JSON_OK);
    check_growth(12000, "", 7919, 0, JSON_OK);
    check_growth(12000, "tensor", 1, 1, JSON_ERR_FORMAT);
    time_keys(100000, "tensor", 7919, 0, JSON_OK);
    memset(prefix, 'x', sizeof prefix - 1); /* long common beginnings */
    check_growth(2000, prefix, 1, 0, JSON_OK);
    check_growth(2000, prefix, 1, 1, JSON_ERR_FORMAT);
}

/* ---- accessors ------------------------------------------------------------------------------------- */

static void test_find(void) {
    parsed p;
    size_t v = 0;
    parse(&p, "{\"a\":1,\"b\\n\":{\"c\":[2]},\"\":3,\"nul\\u0000\":4}");
    CHECK_EQ(json_find(&p.doc, 0, "a", &v), JSON_OK);
    CHECK_EQ(v, 2);
    CHECK_EQ(json_find(&p.doc, 0, "b\n", &v), JSON_OK);
    CHECK_EQ(v, 4);
    CHECK_EQ(json_find(&p.doc, v, "c", &v), JSON_OK);
    CHECK_EQ(p.token[v].type, JSON_ARRAY);
    CHECK_EQ(json_find(&p.doc, 0, "", &v), JSON_OK);
    CHECK_EQ(p.token[v].start, 26);
    CHECK_EQ(json_find(&p.doc, 0, "c", &v), JSON_ERR_MISSING); /* not a member of this object */
    CHECK_EQ(json_find(&p.doc, 0, "nul", &v), JSON_ERR_MISSING);
    CHECK_EQ(json_find(&p.doc, 0, "aa", &v), JSON_ERR_MISSING);
    CHECK_EQ(json_find(&p.doc, 2, "a", &v), JSON_ERR_TYPE);
    CHECK_EQ(json_find(&p.doc, 999, "a", &v), JSON_ERR_MISSING);
    CHECK(json_equal(&p.doc, 1, "a"));
    CHECK(!json_equal(&p.doc, 1, "") && !json_equal(&p.doc, 1, "ab") && !json_equal(&p.doc, 1, "b"));
    CHECK(!json_equal(&p.doc, 2, "1") && !json_equal(&p.doc, 999, "a"));
    drop(&p);
}

static void check_string(const char *text, const char *want) {
    parsed p;
    char out[64];
    size_t length = 0, n, size = strlen(want);
    parse(&p, text);
    CHECK_EQ(p.result, JSON_OK);
    CHECK_EQ(json_string(&p.doc, 0, out, sizeof out, &length), JSON_OK);
    CHECK_EQ(length, size);
    CHECK(strcmp(out, want) == 0);
    CHECK(json_equal(&p.doc, 0, want));
    for (n = 0; n <= size + 1; n++) { /* every capacity */
        char *exact = (char *)test_alloc(n);
        CHECK_EQ(json_string(&p.doc, 0, n ? exact : NULL, n, &length), n <= size ? JSON_ERR_LIMIT : JSON_OK);
        CHECK_EQ(length, size);
        if (n) CHECK(strcmp(exact, n <= size ? "" : want) == 0);
        free(exact);
    }
    drop(&p);
}

static void test_strings(void) {
    parsed p;
    char out[8];
    check_string("\"\"", "");
    check_string("\"abc\"", "abc");
    check_string("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t");
    check_string("\"\\u0041\\u00e9\\u20ac\\uD83D\\uDE00\"", "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
    check_string("\"\\u0001\\u007f\\u0080\\u07ff\\u0800\\uffff\"",
                 "\x01\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xef\xbf\xbf");
    check_string("\"\\ud800\\udc00\\udbff\\udfff\"", "\xf0\x90\x80\x80\xf4\x8f\xbf\xbf");
    check_string("\"\xc3\xa9 \xe4\xb8\xad\"", "\xc3\xa9 \xe4\xb8\xad");
    parse(&p, "[\"a\\u0000b\",1,\"x\"]");
    out[0] = 'z';
    CHECK_EQ(json_string(&p.doc, 1, out, sizeof out, NULL), JSON_ERR_FORMAT);
    CHECK_EQ(out[0], 0);
    CHECK_EQ(json_string(&p.doc, 1, NULL, 0, NULL), JSON_ERR_FORMAT);
    CHECK(!json_equal(&p.doc, 1, "a"));
    CHECK_EQ(json_string(&p.doc, 2, out, sizeof out, NULL), JSON_ERR_TYPE);
    CHECK_EQ(json_string(&p.doc, 4, out, sizeof out, NULL), JSON_ERR_MISSING);
    CHECK_EQ(json_string(&p.doc, 3, out, sizeof out, NULL), JSON_OK);
    CHECK(strcmp(out, "x") == 0);
    drop(&p);
}

static void check_int(const char *text, json_result want, int64_t value) {
    parsed p;
    int64_t got = 42;
    parse(&p, text);
    CHECK_EQ(p.result, JSON_OK);
    same(text, json_int(&p.doc, 0, &got), want);
    same(text, got, want == JSON_OK ? value : 42);
    drop(&p);
}

static void check_uint(const char *text, json_result want, uint64_t value) {
    parsed p;
    uint64_t got = 42;
    parse(&p, text);
    CHECK_EQ(p.result, JSON_OK);
    same(text, json_uint(&p.doc, 0, &got), want);
    CHECK(got == (want == JSON_OK ? value : 42));
    drop(&p);
}

static void test_integers(void) {
    char digits[512];
    check_int("0", JSON_OK, 0);
    check_int("-0", JSON_OK, 0);
    check_int("7168", JSON_OK, 7168);
    check_int("-1", JSON_OK, -1);
    check_int("9223372036854775807", JSON_OK, INT64_MAX);
    check_int("9223372036854775808", JSON_ERR_LIMIT, 0);
    check_int("-9223372036854775808", JSON_OK, INT64_MIN);
    check_int("-9223372036854775807", JSON_OK, -INT64_MAX);
    check_int("-9223372036854775809", JSON_ERR_LIMIT, 0);
    check_int("18446744073709551616", JSON_ERR_LIMIT, 0);
    check_int("7168.5", JSON_ERR_TYPE, 0);
    check_int("7168.0", JSON_ERR_TYPE, 0);
    check_int("7e3", JSON_ERR_TYPE, 0);
    check_int("99999999999999999999999.5", JSON_ERR_TYPE, 0);
    check_int("\"7168\"", JSON_ERR_TYPE, 0);
    check_int("null", JSON_ERR_TYPE, 0);
    check_int("[1]", JSON_ERR_TYPE, 0);
    check_uint("0", JSON_OK, 0);
    check_uint("-0", JSON_OK, 0);
    check_uint("18446744073709551615", JSON_OK, UINT64_MAX);
    check_uint("18446744073709551616", JSON_ERR_LIMIT, 0);
    check_uint("18446744073709551625", JSON_ERR_LIMIT, 0);
    check_uint("184467440737095516150", JSON_ERR_LIMIT, 0);
    check_uint("9999999999999999999999999", JSON_ERR_LIMIT, 0);
    check_uint("-1", JSON_ERR_LIMIT, 0);
    check_uint("1.5", JSON_ERR_TYPE, 0);
    check_uint("1e30", JSON_ERR_TYPE, 0);
    check_uint("true", JSON_ERR_TYPE, 0);
    memset(digits, '7', 400);
    digits[400] = '\0';
    check_uint(digits, JSON_ERR_LIMIT, 0); /* JS-06: 400 digits */
    check_int(digits, JSON_ERR_LIMIT, 0);
}

static void test_bools(void) {
    parsed p;
    int b = 9;
    parse(&p, "[true,false,null,1]");
    CHECK_EQ(json_bool(&p.doc, 1, &b), JSON_OK);
    CHECK_EQ(b, 1);
    CHECK_EQ(json_bool(&p.doc, 2, &b), JSON_OK);
    CHECK_EQ(b, 0);
    CHECK_EQ(json_bool(&p.doc, 3, &b), JSON_ERR_TYPE);
    CHECK_EQ(json_bool(&p.doc, 4, &b), JSON_ERR_TYPE);
    CHECK_EQ(json_bool(&p.doc, 5, &b), JSON_ERR_MISSING);
    drop(&p);
}

static void test_result_strings(void) {
    int i, j;
    for (i = JSON_ERR_TYPE; i <= JSON_OK; i++) {
        CHECK(strcmp(json_result_string((json_result)i), "unknown result") != 0);
        for (j = i + 1; j <= JSON_OK; j++)
            CHECK(strcmp(json_result_string((json_result)i), json_result_string((json_result)j)) != 0);
    }
    CHECK(strcmp(json_result_string((json_result)-99), "unknown result") == 0);
}

/* ---- floating point -------------------------------------------------------------------------------- */

static uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* json_double of the text: its result, and the difference to strtod in units of the last place. */
static json_result compare_double(const char *text, double *got, uint64_t *units) {
    parsed p;
    double want = strtod(text, NULL);
    json_result result;
    *got = 42;
    parse(&p, text);
    result = p.result == JSON_OK ? json_double(&p.doc, 0, got) : p.result;
    *units = bits_of(*got) > bits_of(want) ? bits_of(*got) - bits_of(want) : bits_of(want) - bits_of(*got);
    drop(&p);
    return result;
}

static void check_exact(const char *text) {
    double got;
    uint64_t units = 0;
    same(text, compare_double(text, &got, &units), JSON_OK);
    same(text, (long long)units, 0);
}

static void check_too_large(const char *text) {
    double got;
    uint64_t units;
    same(text, compare_double(text, &got, &units), JSON_ERR_LIMIT);
    CHECK(got == 42); /* untouched */
}

static void test_doubles(void) {
    static const char *const exact[] = {"0",
                                        "-0",
                                        "0.0",
                                        "-0.0e5",
                                        "0e999",
                                        "1",
                                        "-1",
                                        "0.1",
                                        "0.2",
                                        "0.3",
                                        "1e-6",
                                        "10000",
                                        "0.1352337788608801",
                                        "1e22",
                                        "1e23",
                                        "9007199254740993",
                                        "9007199254740992",
                                        "9007199254740995",
                                        "18014398509481985",
                                        "1.7976931348623157e308",
                                        "1.7976931348623158e308",
                                        "2.2250738585072014e-308",
                                        "2.2250738585072011e-308",
                                        "2.2250738585072009e-308",
                                        "5e-324",
                                        "4.9e-324",
                                        "3e-324",
                                        "2.5e-324",
                                        "2.4703282292062328e-324",
                                        "2.4e-324",
                                        "1e-400",
                                        "-1e-400",
                                        "1e-99999999999999999999999",
                                        "1e-310",
                                        "123456789012345678e-330",
                                        "8.5e-323",
                                        "1.1e-16",
                                        "2.718281828459045",
                                        "0.000000000000000000000000000000000000001",
                                        "1E+2",
                                        "1e+0",
                                        "1234567890123456789e-19",
                                        "9223372036854775807",
                                        "9999999999999999999",
                                        "4503599627370497.5",
                                        "4503599627370496.5",
                                        "6.02214076e23",
                                        "1e308",
                                        "1e-308",
                                        "100000000000000000000000e-22"};
    char text[1024];
    double got;
    uint64_t units = 0;
    size_t i;
    parsed p;
    for (i = 0; i < sizeof exact / sizeof *exact; i++) check_exact(exact[i]);
    check_too_large("1e999"); /* JS-06 */
    check_too_large("-1e999");
    check_too_large("1.7976931348623159e308");
    check_too_large("1.8e308");
    check_too_large("1e309");
    check_too_large("1e310");
    check_too_large("1e311");
    check_too_large("1e99999999999999999999999");
    memset(text, '9', 400);
    text[400] = '\0';
    check_too_large(text); /* JS-06: 400 digits */
    /* 400 digits that are in range: a long fraction, leading zeros, and digits undone by an exponent. */
    memset(text, '3', 400), memcpy(text, "0.", 2);
    CHECK_EQ(compare_double(text, &got, &units), JSON_OK);
    CHECK(units <= 1);
    memset(text, '0', 400), memcpy(text, "0.", 2), memcpy(text + 400, "7e400", 6);
    check_exact(text);
    memset(text, '0', 400), text[0] = '7', memcpy(text + 400, "e-399", 6);
    check_exact(text);
    parse(&p, "[\"1\",true]");
    CHECK_EQ(json_double(&p.doc, 1, &got), JSON_ERR_TYPE);
    CHECK_EQ(json_double(&p.doc, 2, &got), JSON_ERR_TYPE);
    CHECK_EQ(json_double(&p.doc, 3, &got), JSON_ERR_MISSING);
    drop(&p);
}

/* Random numbers: up to 19 digits must be exact whatever the exponent, longer ones within one unit. */
static void test_doubles_random(void) {
    unsigned long i, wrong = 0, wrong_long = 0;
    double got;
    uint64_t units;
    char text[128];
    for (i = 0; i < 6000; i++) {
        uint64_t digits = test_random() >> (test_random() % 64);
        int range = i % 3 == 0 ? 22 : i % 3 == 1 ? 280 : 340, exponent;
        exponent = (int)(test_random() % (2 * (unsigned)range + 1)) - range;
        if (exponent > 288) exponent = 288;
        digits %= 10000000000000000000u;
        if (i % 4 == 0)
            snprintf(text, sizeof text, "%llu", (unsigned long long)digits);
        else
            snprintf(text, sizeof text, "-%llue%d", (unsigned long long)digits, exponent);
        if (compare_double(text, &got, &units) != JSON_OK || units != 0) wrong++;
        /* Text that a double prints must give the same double back. */
        snprintf(text, sizeof text, "%.17g", got);
        if (compare_double(text, &got, &units) != JSON_OK || units != 0) wrong++;
        snprintf(text, sizeof text, "%llu.%016llu%016llue%d", (unsigned long long)digits,
                 (unsigned long long)(test_random() % 10000000000000000u),
                 (unsigned long long)(test_random() % 10000000000000000u), exponent);
        if (compare_double(text, &got, &units) != JSON_OK || units > 1) wrong_long++;
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(wrong_long, 0);
    /* Halfway cases: the middle between two neighbours that have 54 bits. */
    for (i = 0; i < 2000; i++) {
        uint64_t odd = ((uint64_t)1 << 53) | (test_random() >> 11) | 1;
        snprintf(text, sizeof text, "%llu", (unsigned long long)odd);
        if (compare_double(text, &got, &units) != JSON_OK || units != 0) wrong++;
    }
    CHECK_EQ(wrong, 0);
}

/* ---- robustness ------------------------------------------------------------------------------------ */

static const char sample[] =
    "{\"hidden_size\": 7168, \"rope_scaling\": {\"beta_fast\": 32, \"mscale\": 1.0e0, \"type\": \"yarn\"},\n"
    " \"list\": [true, false, null, -12, [], {}, \"\\u00e9\\ud83d\\ude00\\n\", \"\xe4\xb8\xad\"], \"q\": null}\n";

/* Every prefix of an object ends too early, whether or not there are tokens. */
static void test_prefixes(void) {
    size_t n, last = sizeof sample - 2; /* without the final newline */
    for (n = 0; n < last; n++) check_parse("prefix", sample, n, JSON_ERR_TRUNC, 0);
    check_parse("whole", sample, last, JSON_OK, 0);
}

/* Calls every accessor on every token; returns how many tokens do not lie in the document. */
static unsigned long read_all(const parsed *p) {
    size_t i, value = 0;
    char out[16];
    int64_t a;
    uint64_t b;
    double c;
    int d;
    unsigned long wrong = 0;
    for (i = 0; i <= p->doc.count; i++) {
        const json_token *t = &p->token[i];
        (void)json_string(&p->doc, i, out, sizeof out, NULL);
        (void)json_int(&p->doc, i, &a);
        (void)json_uint(&p->doc, i, &b);
        (void)json_double(&p->doc, i, &c);
        (void)json_bool(&p->doc, i, &d);
        (void)json_find(&p->doc, i, "type", &value);
        if (i == p->doc.count) break;
        wrong += t->start > t->end || t->end > p->doc.length || t->next <= i || t->next > p->doc.count;
    }
    return wrong;
}

static void test_mutations(void) {
    static const char interesting[] = "\"\\{}[]:,0123456789-+.eEu \n\x80\xff\x01tfn";
    char text[sizeof sample];
    unsigned long i, accepted = 0, wrong = 0;
    for (i = 0; i < 20000; i++) {
        parsed p;
        size_t edits = 1 + (size_t)(test_random() % 3);
        memcpy(text, sample, sizeof sample);
        while (edits--) {
            size_t at = (size_t)(test_random() % (sizeof sample - 1));
            if (test_random() % 2)
                text[at] = (char)(text[at] ^ (1 << (test_random() % 8)));
            else
                text[at] = interesting[test_random() % (sizeof interesting - 1)];
        }
        parse_bytes(&p, text, sizeof sample - 1);
        if (p.result == JSON_OK) {
            accepted++;
            wrong += read_all(&p);
        } else {
            wrong += p.doc.count != 0 || p.error_at > sizeof sample - 1;
        }
        drop(&p);
    }
    CHECK_EQ(wrong, 0);
    CHECK(accepted > 100 && accepted < 19900);
}

/* JS-09: the text ends where the next page must not be touched. */
static void test_guard_page(void) {
#ifdef TEST_GUARD_PAGE
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n, length = sizeof sample - 1;
    char *pages = (char *)mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static json_token token[TOKENS];
    CHECK(pages != (char *)MAP_FAILED);
    if (pages == (char *)MAP_FAILED) return;
    CHECK_EQ(mprotect(pages + page, page, PROT_NONE), 0);
    for (n = 0; n <= length; n++) {
        char *text = pages + page - n;
        json_result want = n >= length - 1 ? JSON_OK : JSON_ERR_TRUNC;
        memcpy(text, sample, n);
        CHECK_EQ(json_parse(text, n, token, TOKENS, NULL, NULL), want);
    }
    for (n = 0; n < sizeof text_cases / sizeof *text_cases; n++) {
        size_t size = strlen(text_cases[n].text);
        memcpy(pages + page - size, text_cases[n].text, size);
        same("JS-09 guard page", json_parse(pages + page - size, size, token, TOKENS, NULL, NULL),
             text_cases[n].want);
    }
    munmap(pages, 2 * page);
#endif
}

int main(void) {
    test_texts();
    test_depth();
    test_tokens();
    test_repeated_keys();
    test_collisions();
    test_many_keys();
    test_find();
    test_strings();
    test_integers();
    test_bools();
    test_result_strings();
    test_doubles();
    test_doubles_random();
    test_prefixes();
    test_mutations();
    test_guard_page();
    return test_done("json");
}
