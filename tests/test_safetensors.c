/* test_safetensors.c -- examples/safetensors.h: the ST cases of malformed files (each as a buffer and as a
 * file), sharded checkpoints, the writer, failing allocations, files that change, truncation and mutation.
 * The cases that bind tensors to a model are elsewhere.
 *
 *     gcc -std=c99 -Itests -Iexamples tests/test_safetensors.c -o test_safetensors -lm && ./test_safetensors
 *
 * Build it also with -DST_NO_MMAP, with -DST_NO_POSIX and with -DST_BIG_ENDIAN=1. */
#if !defined(_XOPEN_SOURCE)
#define _XOPEN_SOURCE 700 /* mkdtemp, mkfifo, setrlimit */
#endif
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* ---- the allocator under test ---------------------------------------------------------------------- */

static long live_blocks, malloc_calls;
static long fail_from, fail_to; /* these calls fail, counted from 1; 0 for none */
static void (*malloc_hook)(void);

static void *count_malloc(size_t bytes) {
    void *memory;
    malloc_calls++;
    if (malloc_hook) malloc_hook();
    if (malloc_calls >= fail_from && malloc_calls <= fail_to) return NULL;
    memory = malloc(bytes ? bytes : 1);
    if (memory) live_blocks++;
    return memory;
}

static void count_free(void *memory) {
    if (memory) live_blocks--;
    free(memory);
}

static void fail_calls(long from, long to) {
    malloc_calls = 0;
    fail_from = from;
    fail_to = to;
}

/* ---- the system under test: input and output that fail on demand ----------------------------------- */

enum { NO_FAULT, FAULT_ERROR, FAULT_INTERRUPT, FAULT_SHORT, FAULT_END, FAULTS };
static int io_fault;
static long io_calls, io_from, io_to; /* these calls are at fault, counted from 1 */

static int at_fault(int kind) { return io_fault == kind && io_calls >= io_from && io_calls <= io_to; }

/* One more call; 1 if it has to fail as a whole, with errno set. */
static int fails(int can_be_interrupted) {
    io_calls++;
    errno = at_fault(FAULT_INTERRUPT) ? EINTR : EIO;
    return at_fault(FAULT_ERROR) || (can_be_interrupted && at_fault(FAULT_INTERRUPT));
}

static int fault_rename(const char *from, const char *to) { return fails(0) ? -1 : rename(from, to); }

#ifndef ST_NO_POSIX
static int fault_open(const char *path, int flags, ...) {
    int mode = 0;
    va_list list;
    va_start(list, flags);
    if (flags & O_CREAT) mode = va_arg(list, int);
    va_end(list);
    return fails(1) ? -1 : open(path, flags, mode);
}
static int fault_fstat(int handle, struct stat *status) { return fails(0) ? -1 : fstat(handle, status); }
static int fault_fsync(int handle) { return fails(0) ? -1 : fsync(handle); }
static int fault_close(int handle) { return fails(0) ? (close(handle), -1) : close(handle); }
static ssize_t fault_read(int handle, void *to, size_t bytes) {
    if (fails(1)) return -1;
    if (at_fault(FAULT_END)) return 0;
    return read(handle, to, at_fault(FAULT_SHORT) ? (bytes + 1) / 2 : bytes);
}
static ssize_t fault_write(int handle, const void *from, size_t bytes) {
    if (fails(1)) return -1;
    return write(handle, from, at_fault(FAULT_SHORT) ? (bytes + 1) / 2 : bytes);
}
#ifndef ST_NO_MMAP
static void *fault_mmap(void *at, size_t bytes, int protection, int flags, int handle, off_t offset) {
    return fails(0) ? MAP_FAILED : mmap(at, bytes, protection, flags, handle, offset);
}
#define mmap fault_mmap
#endif
#define open fault_open
#define fstat(handle, status) fault_fstat(handle, status)
#define fsync fault_fsync
#define close fault_close
#define read fault_read
#define write fault_write
#else
static FILE *fault_fopen(const char *path, const char *mode) { return fails(0) ? NULL : fopen(path, mode); }
static size_t fault_fread(void *to, size_t size, size_t n, FILE *f) {
    return fails(0) ? 0 : fread(to, size, at_fault(FAULT_END) && n ? n - 1 : n, f);
}
static size_t fault_fwrite(const void *from, size_t size, size_t n, FILE *f) {
    return fails(0) ? 0 : fwrite(from, size, n, f);
}
static int fault_fflush(FILE *f) { return fails(0) ? EOF : fflush(f); }
static int fault_fclose(FILE *f) { return fails(0) ? (fclose(f), EOF) : fclose(f); }
static int fault_fseek(FILE *f, long offset, int whence) { return fails(0) ? -1 : fseek(f, offset, whence); }
static long fault_ftell(FILE *f) { return fails(0) ? -1 : ftell(f); }
#define fopen fault_fopen
#define fread fault_fread
#define fwrite fault_fwrite
#define fflush fault_fflush
#define fclose fault_fclose
#define fseek fault_fseek
#define ftell fault_ftell
#endif
#define rename fault_rename

#define ST_MALLOC(bytes) count_malloc(bytes)
#define ST_FREE(pointer) count_free(pointer)
#define SAFETENSORS_IMPLEMENTATION
#include "safetensors.h"

#undef mmap
#undef open
#undef fstat
#undef fsync
#undef close
#undef read
#undef write
#undef fopen
#undef fread
#undef fwrite
#undef fflush
#undef fclose
#undef fseek
#undef ftell
#undef rename

#include "test.h"

static void same(const char *id, long long got, long long want) { test_eq(got, want, "safetensors", 0, id); }

/* ---- files ----------------------------------------------------------------------------------------- */

static char directory[256];

/* directory/name in one of a few buffers that are used in turn. */
static const char *in_directory(const char *name) {
    static char path[4][1024];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", directory, name);
    return path[turn];
}

static void put_file(const char *name, const void *bytes, size_t length) {
    FILE *f = fopen(in_directory(name), "wb");
    CHECK(f != NULL);
    if (!f) return;
    CHECK_EQ(fwrite(bytes, 1, length, f), length);
    fclose(f);
}

static void put_text(const char *name, const char *text) { put_file(name, text, strlen(text)); }

static int exists(const char *name) {
    struct stat status;
    return stat(in_directory(name), &status) == 0;
}

static size_t get_file(const char *name, char *to, size_t capacity) {
    FILE *f = fopen(in_directory(name), "rb");
    size_t length = 0;
    CHECK(f != NULL);
    if (!f) return 0;
    length = fread(to, 1, capacity, f);
    fclose(f);
    return length;
}

static void drop_file(const char *name) { (void)remove(in_directory(name)); }

/* ---- images of files ------------------------------------------------------------------------------- */

typedef struct image {
    unsigned char *bytes; /* [length], exact */
    size_t length;
} image;

/* An image with that length field, JSON text and number of data bytes (1, 2, 3, ...). */
static image make_raw(uint64_t field, const char *json, size_t json_bytes, size_t data) {
    image m;
    size_t i;
    m.length = 8 + json_bytes + data;
    m.bytes = (unsigned char *)test_alloc(m.length);
    for (i = 0; i < 8; i++) m.bytes[i] = (unsigned char)(field >> (8 * i) & 0xFF);
    memcpy(m.bytes + 8, json, json_bytes);
    for (i = 0; i < data; i++) m.bytes[8 + json_bytes + i] = (unsigned char)(i + 1);
    return m;
}

static image make(const char *json, size_t data) { return make_raw(strlen(json), json, strlen(json), data); }

/* What must hold for an accepted file; reads every byte of smaller tensors. */
static void check_open_file(const st_file *file) {
    static volatile unsigned sink;
    size_t i, j, wrong = 0;
    for (i = 0; i < file->count; i++) {
        const st_tensor *t = &file->tensor[i];
        const unsigned char *data = (const unsigned char *)t->data;
        uint64_t bytes = st_dtype_bytes(t->dtype);
        unsigned sum = 0;
        int k;
        for (k = 0; k < t->rank && k < ST_MAX_RANK; k++) bytes *= t->shape[k];
        if (t->dtype != ST_OTHER && (bytes != t->bytes || bytes == 0) && t->bytes != 0) wrong++;
        if (t->type == NULL || t->type[0] == '\0') wrong++;
        if (t->dtype != ST_OTHER && strcmp(t->type, st_dtype_name(t->dtype)) != 0) wrong++;
        if (!t->name[0] || strlen(t->name) >= ST_MAX_NAME || t->rank < 0 || t->rank > ST_MAX_RANK) wrong++;
        if (i && strcmp(file->tensor[i - 1].name, t->name) >= 0) wrong++;
        if (t->shard < 0 || t->shard >= file->shards) wrong++;
        if (t->bytes < 1u << 20)
            for (j = 0; j < t->bytes; j++) sum += data[j];
        sink = sum;
    }
    for (i = 0; i < 2 * file->metadata_count; i++) wrong += file->metadata[i] == NULL;
    CHECK_EQ(wrong, 0);
    (void)sink;
}

static void check_error(const st_error *error, st_result want, const char *label) {
    size_t length = strlen(error->message);
    CHECK_EQ(error->code, want);
    CHECK((want == ST_OK) == (length == 0));
    CHECK(length < sizeof error->message && !strchr(error->message, '\n'));
    if (want != ST_OK) CHECK(strstr(error->message, label) != NULL);
}

static int is_closed(const st_file *file) {
    return file->count == 0 && !file->tensor && !file->metadata && file->shards == 0 && !file->sti_shard;
}

/* Opens one image both ways; both must give the code, and leave nothing behind. */
static void check_image(const char *id, image m, st_result want) {
    st_file file;
    st_error error;
    long before = live_blocks;
    memset(&file, 0x5A, sizeof file);
    memset(&error, 0x5A, sizeof error);
    same(id, st_parse(&file, m.bytes, m.length, "a-label", &error), want);
    check_error(&error, want, "a-label");
    if (want == ST_OK)
        check_open_file(&file);
    else
        CHECK(is_closed(&file));
    st_close(&file);
    st_close(&file);
    CHECK(is_closed(&file));
    same(id, st_parse(&file, m.bytes, m.length, NULL, NULL), want);
    st_close(&file);
    put_file("case.safetensors", m.bytes, m.length);
    free(m.bytes);
    memset(&file, 0x5A, sizeof file);
    same(id, st_open(&file, in_directory("case.safetensors"), &error), want);
    check_error(&error, want, "case.safetensors");
    if (want == ST_OK) check_open_file(&file);
    st_close(&file);
    drop_file("case.safetensors");
    CHECK_EQ(live_blocks, before);
}

static void check_json(const char *id, const char *json, size_t data, st_result want) {
    check_image(id, make(json, data), want);
}

/* ---- ST cases -------------------------------------------------------------------------------------- */

/* An entry of a header. */
#define ENTRY(name, dtype, shape, offsets)                                                                           \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" offsets "]}"

static const char two[] = "{" ENTRY("a", "F32", "2,3", "0,24") "," ENTRY("b", "BF16", "4", "24,32") "}";

static void test_lengths(void) {
    image m = make_raw(2, "{}", 2, 0);
    m.length = 0;
    check_image("ST-01 0 bytes", m, ST_ERR_TRUNC);
    m = make_raw(2, "{}", 2, 0);
    m.length = 7;
    check_image("ST-02 7 bytes", m, ST_ERR_TRUNC);
    check_image("ST-03 N = 2 and nothing after", make_raw(2, "", 0, 0), ST_ERR_TRUNC);
    check_image("ST-04 N one larger than the rest", make_raw(3, "{}", 2, 0), ST_ERR_TRUNC);
    check_image("ST-05 N = 0", make_raw(0, "", 0, 0), ST_ERR_FORMAT);
    check_image("ST-05 N = 0 before data", make_raw(0, "{}", 2, 0), ST_ERR_FORMAT);
    check_image("ST-06 N = 100000001", make_raw(100000001, "{}", 2, 0), ST_ERR_LIMIT);
    check_image("ST-06 N = 100000000", make_raw(100000000, "{}", 2, 0), ST_ERR_TRUNC);
    check_image("ST-07 N = 2^63", make_raw((uint64_t)1 << 63, "{}", 2, 0), ST_ERR_LIMIT);
    check_image("ST-08 N = 2^64 - 1", make_raw(UINT64_MAX, "{}", 2, 0), ST_ERR_LIMIT);
    check_image("ST-08 N + 8 wraps", make_raw(UINT64_MAX - 7, "{}", 2, 0), ST_ERR_LIMIT);
    check_image("no tensors", make_raw(2, "{}", 2, 0), ST_OK);
    check_image("N = 1", make_raw(1, "{}", 2, 0), ST_ERR_FORMAT);
}

static void test_header_text(void) {
    check_json("ST-09 byte order mark", "\xef\xbb\xbf{}", 0, ST_ERR_FORMAT);
    check_json("ST-09 space", " {}", 0, ST_ERR_FORMAT);
    check_json("ST-09 array", "[]", 0, ST_ERR_FORMAT);
    check_json("ST-09 string", "\"{}\"", 0, ST_ERR_FORMAT);
    check_json("trailing spaces", "{}      ", 0, ST_OK);
    check_json("trailing text", "{}x", 0, ST_ERR_FORMAT);
    check_image("trailing NUL", make_raw(3, "{}\0", 3, 0), ST_ERR_FORMAT);
    check_json("header cut", "{\"a\":{", 0, ST_ERR_FORMAT);
    check_json("comma at the end", "{" ENTRY("a", "U8", "1", "0,1") ",}", 1, ST_ERR_FORMAT);
    check_json("ST-10 FF", "{" ENTRY("\xff", "U8", "1", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-10 overlong", "{" ENTRY("\xc0\x80", "U8", "1", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-10 surrogate", "{" ENTRY("\xed\xa0\x80", "U8", "1", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-10 cut sequence", "{" ENTRY("\xe2\x82", "U8", "1", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-10 good UTF-8", "{" ENTRY("\xe2\x82\xac", "U8", "1", "0,1") "}", 1, ST_OK);
    check_json("nested too deep", "{\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
               0, ST_ERR_LIMIT);
    check_json("entry is a number", "{\"a\":1}", 0, ST_ERR_FORMAT);
    check_json("entry is an array", "{\"a\":[]}", 0, ST_ERR_FORMAT);
    check_json("entry is null", "{\"a\":null}", 0, ST_ERR_FORMAT);
}

static void test_offsets(void) {
    check_json("two tensors", two, 32, ST_OK);
    check_json("ST-11 last end behind the data", "{" ENTRY("a", "U8", "8", "0,8") "}", 7, ST_ERR_MISMATCH);
    check_json("ST-11 last end behind no data", "{" ENTRY("a", "U8", "1", "0,1") "}", 0, ST_ERR_MISMATCH);
    check_json("ST-12 trailing byte", two, 33, ST_ERR_MISMATCH);
    check_json("ST-12 data without tensors", "{}", 1, ST_ERR_MISMATCH);
    check_json("ST-13 cut in the last tensor", two, 31, ST_ERR_TRUNC);
    check_json("ST-13 cut behind the first tensor", two, 24, ST_ERR_TRUNC);
    check_json("ST-14 end before begin", "{" ENTRY("a", "U8", "1", "1,0") "}", 1, ST_ERR_MISMATCH);
    check_json("ST-14 end before begin, wraps to the size", "{" ENTRY("a", "U8", "4", "18446744073709551614,2") "}",
               4, ST_ERR_MISMATCH);
    check_json("ST-15 first begin is 1", "{" ENTRY("a", "U8", "1", "1,2") "}", 2, ST_ERR_MISMATCH);
    check_json("ST-16 gap of 1", "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("b", "U8", "4", "5,9") "}", 9,
               ST_ERR_MISMATCH);
    check_json("ST-17 overlap of 1", "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("b", "U8", "4", "3,7") "}", 7,
               ST_ERR_MISMATCH);
    check_json("ST-17 alias", "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("b", "U8", "4", "0,4") "}", 4,
               ST_ERR_MISMATCH);
    check_json("ST-17 inside another", "{" ENTRY("a", "U8", "8", "0,8") "," ENTRY("b", "U8", "2", "2,4") "}", 8,
               ST_ERR_MISMATCH);
    check_json("ST-18 shape larger", "{" ENTRY("a", "F32", "1000,1000", "0,4") "}", 4, ST_ERR_MISMATCH);
    check_json("ST-19 shape smaller", "{" ENTRY("a", "F32", "1", "0,8") "}", 8, ST_ERR_MISMATCH);
    check_json("ST-27 4 MB in 4 bytes", "{" ENTRY("a", "F32", "1048576", "0,4194304") "}", 4, ST_ERR_MISMATCH);
    check_json("ST-28 no offsets", "{" ENTRY("a", "U8", "1", "") "}", 1, ST_ERR_FORMAT);
    check_json("ST-28 one offset", "{" ENTRY("a", "U8", "1", "0") "}", 1, ST_ERR_FORMAT);
    check_json("ST-28 three offsets", "{" ENTRY("a", "U8", "1", "0,1,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-28 nested offsets", "{" ENTRY("a", "U8", "1", "[0],1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-28 negative offset", "{" ENTRY("a", "U8", "1", "-1,0") "}", 1, ST_ERR_FORMAT);
    check_json("ST-28 offset of 20 digits", "{" ENTRY("a", "U8", "1", "0,99999999999999999999") "}", 1,
               ST_ERR_FORMAT);
    check_json("ST-28 offsets are a string", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":\"01\"}}", 1,
               ST_ERR_FORMAT);
    check_json("tensors in any order", "{" ENTRY("b", "U8", "4", "4,8") "," ENTRY("a", "U8", "4", "0,4") "}", 8,
               ST_OK);
}

static void test_shapes(void) {
    check_json("ST-20 product wraps to 0", "{" ENTRY("a", "U8", "4294967296,4294967296", "0,0") "}", 0,
               ST_ERR_OVERFLOW);
    check_json("ST-20 product wraps to 0 at 5",
               "{" ENTRY("b", "U8", "5", "0,5") "," ENTRY("a", "U8", "4294967296,4294967296", "5,5") "}", 5,
               ST_ERR_OVERFLOW);
    check_json("ST-21 product wraps to 4", "{" ENTRY("a", "U8", "4,4611686018427387905", "0,4") "}", 4,
               ST_ERR_OVERFLOW);
    check_json("ST-22 wraps with the dtype", "{" ENTRY("a", "F32", "4611686018427387905", "0,4") "}", 4,
               ST_ERR_OVERFLOW);
    check_json("ST-22 wraps to 0 with the dtype", "{" ENTRY("a", "F64", "2305843009213693952", "0,0") "}", 0,
               ST_ERR_OVERFLOW);
    check_json("ST-23 more than 32 bits", "{" ENTRY("a", "U8", "65536,65537", "0,4295032832") "}", 4,
               sizeof(size_t) == 4 ? ST_ERR_OVERFLOW : ST_ERR_MISMATCH);
    check_json("product wraps beside a 0", "{" ENTRY("a", "U8", "0,4294967296,4294967296", "0,0") "}", 0,
               ST_ERR_OVERFLOW);
    check_json("product wraps, and wraps again", "{" ENTRY("a", "U8", "4294967296,4294967296,4294967296,4", "0,4") "}", 4,
               ST_ERR_OVERFLOW);
    check_json("ST-24 negative dimension", "{" ENTRY("a", "U8", "-1", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-25 dimension 1.5", "{" ENTRY("a", "U8", "1.5", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-26 dimension 1e30", "{" ENTRY("a", "U8", "1e30", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("ST-26 dimension of 25 digits", "{" ENTRY("a", "U8", "1000000000000000000000000", "0,1") "}", 1,
               ST_ERR_FORMAT);
    check_json("ST-26 dimension 2^64 - 1", "{" ENTRY("a", "U8", "18446744073709551615", "0,1") "}", 1,
               sizeof(size_t) == 4 ? ST_ERR_OVERFLOW : ST_ERR_MISMATCH);
    check_json("dimension is a string", "{" ENTRY("a", "U8", "\"1\"", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("dimension is an array", "{" ENTRY("a", "U8", "[1]", "0,1") "}", 1, ST_ERR_FORMAT);
    check_json("shape is a number", "{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1,
               ST_ERR_FORMAT);
    check_json("ST-29 rank 8", "{" ENTRY("a", "U8", "1,1,1,1,1,1,1,1", "0,1") "}", 1, ST_OK);
    check_json("ST-29 rank 9", "{" ENTRY("a", "U8", "1,1,1,1,1,1,1,1,1", "0,1") "}", 1, ST_ERR_LIMIT);
    check_json("ST-29 rank 0 is one element", "{" ENTRY("a", "F32", "", "0,4") "}", 4, ST_OK);
    check_json("ST-29 rank 0 is not nothing", "{" ENTRY("a", "F32", "", "0,0") "}", 0, ST_ERR_MISMATCH);
    check_json("ST-41 empty before its neighbour",
               "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("e", "F32", "0,7", "0,0") "}", 4, ST_OK);
    check_json(
        "ST-41 empty between two",
        "{" ENTRY("b", "U8", "4", "4,8") "," ENTRY("e", "F32", "3,0", "4,4") "," ENTRY("a", "U8", "4", "0,4") "}", 8,
        ST_OK);
    check_json("ST-41 empty at the end", "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("e", "F32", "0", "4,4") "}", 4,
               ST_OK);
    check_json("ST-41 two empty ones", "{" ENTRY("a", "U8", "0", "0,0") "," ENTRY("b", "U8", "0", "0,0") "}", 0,
               ST_OK);
    check_json("ST-41 empty in the middle of one",
               "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("e", "F32", "0", "2,2") "}", 4, ST_ERR_MISMATCH);
    check_json("ST-41 empty behind the end", "{" ENTRY("e", "F32", "0", "9,9") "}", 4, ST_ERR_MISMATCH);
}

static void test_entries(void) {
    static const char *const dtypes[] = {"BOOL", "U8",  "I8",  "U16", "I16", "F16",     "BF16",   "U32",
                                         "I32",  "F32", "U64", "I64", "F64", "F8_E4M3", "F8_E5M2"};
    char json[256];
    int i;
    check_json("ST-34 F128", "{" ENTRY("a", "F128", "1", "0,16") "}", 16, ST_OK);
    check_json("ST-34 lower case", "{" ENTRY("a", "f32", "1", "0,4") "}", 4, ST_OK);
    check_json("ST-34 empty", "{" ENTRY("a", "", "1", "0,4") "}", 4, ST_ERR_UNSUPPORTED);
    check_json("ST-34 NUL", "{" ENTRY("a", "F\\u00004", "1", "0,4") "}", 4, ST_ERR_UNSUPPORTED);
    check_json("ST-34 longer", "{" ENTRY("a", "F320", "1", "0,4") "}", 4, ST_OK);
    check_json("ST-34 beyond the end", "{" ENTRY("a", "F4", "8", "0,9") "}", 4, ST_ERR_MISMATCH);
    check_json("ST-34 backwards", "{" ENTRY("a", "F4", "8", "4,0") "}", 4, ST_ERR_MISMATCH);
    check_json("ST-34 a gap", "{" ENTRY("a", "F4", "8", "0,2") "," ENTRY("b", "F4", "8", "3,4") "}", 4,
               ST_ERR_MISMATCH);
    check_json("ST-34 number", "{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, ST_ERR_UNSUPPORTED);
    check_json("ST-34 null", "{\"a\":{\"dtype\":null,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, ST_ERR_UNSUPPORTED);
    check_json("ST-35 name twice", "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("a", "U8", "2", "4,6") "}", 6,
               ST_ERR_FORMAT);
    check_json("ST-35 name twice, escaped",
               "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("\\u0061", "U8", "2", "4,6") "}", 6, ST_ERR_FORMAT);
    check_json("ST-35 key twice in an entry",
               "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, ST_ERR_FORMAT);
    check_json("ST-36 metadata", "{\"__metadata__\":{\"format\":\"pt\",\"x\":\"\"}}", 0, ST_OK);
    check_json("ST-36 metadata is empty", "{\"__metadata__\":{}}", 0, ST_OK);
    check_json("ST-36 metadata with a number", "{\"__metadata__\":{\"format\":1}}", 0, ST_ERR_FORMAT);
    check_json("ST-36 metadata with null", "{\"__metadata__\":{\"a\":\"b\",\"c\":null}}", 0, ST_ERR_FORMAT);
    check_json("ST-36 metadata with an object", "{\"__metadata__\":{\"a\":{}}}", 0, ST_ERR_FORMAT);
    check_json("ST-36 metadata is an array", "{\"__metadata__\":[]}", 0, ST_ERR_FORMAT);
    check_json("ST-36 metadata is a string", "{\"__metadata__\":\"pt\"}", 0, ST_ERR_FORMAT);
    check_json("ST-36 metadata is null", "{\"__metadata__\":null}", 0, ST_ERR_FORMAT);
    check_json("ST-36 metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, ST_ERR_FORMAT);
    check_json("ST-36 metadata with NUL", "{\"__metadata__\":{\"a\":\"b\\u0000\"}}", 0, ST_ERR_FORMAT);
    check_json("ST-37 no dtype", "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, ST_ERR_MISSING);
    check_json("ST-37 no shape", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, ST_ERR_MISSING);
    check_json("ST-37 no offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, ST_ERR_MISSING);
    check_json("ST-37 nothing", "{\"a\":{}}", 0, ST_ERR_MISSING);
    check_json("ST-38 unknown key",
               "{\"a\":{\"x\":[{}],\"dtype\":\"U8\",\"shape\":[1],\"y\":\"z\",\"data_offsets\":[0,1]}}", 1, ST_OK);
    check_json("ST-40 empty name", "{" ENTRY("", "U8", "1", "0,1") "}", 1, ST_ERR_LIMIT);
    check_json("ST-40 NUL in a name", "{" ENTRY("a\\u0000b", "U8", "1", "0,1") "}", 1, ST_ERR_LIMIT);
    for (i = 0; i < 15; i++) { /* ST-47: every dtype is known, F8_E5M2 too */
        size_t size = st_dtype_bytes((st_dtype)i);
        CHECK(strcmp(st_dtype_name((st_dtype)i), dtypes[i]) == 0);
        snprintf(json, sizeof json, "{\"a\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%lu]}}", dtypes[i],
                 (unsigned long)(3 * size));
        check_json("ST-47 dtype", json, 3 * size, ST_OK);
    }
    CHECK_EQ(st_dtype_bytes((st_dtype)15), 0);
    CHECK_EQ(st_dtype_bytes((st_dtype)-1), 0);
    CHECK(strcmp(st_dtype_name((st_dtype)15), "?") == 0);
}

/* A dtype that is not known is a name with bytes: it closes nothing, and its neighbours stay what they are. */
static void test_other_dtypes(void) {
    static const char *const names[] = {"F8_E8M0", "C64", "F4", "F6_E2M3", "F8_E4M3FNUZ", "x"};
    char json[512];
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        image m;
        st_file file;
        st_error error;
        snprintf(json, sizeof json,
                 "{\"a\":{\"dtype\":\"%s\",\"shape\":[8],\"data_offsets\":[0,3]},"
                 "\"b\":{\"dtype\":\"U16\",\"shape\":[1],\"data_offsets\":[3,5]}}",
                 names[i]);
        m = make(json, 5);
        CHECK_EQ(st_parse(&file, m.bytes, m.length, NULL, &error), ST_OK);
        CHECK(file.count == 2 && file.tensor[0].dtype == ST_OTHER && strcmp(file.tensor[0].type, names[i]) == 0);
        CHECK(file.tensor[0].bytes == 3 && file.tensor[0].shape[0] == 8);
        CHECK(memcmp(file.tensor[0].data, "\1\2\3", 3) == 0);
        CHECK(file.tensor[1].dtype == ST_U16 && strcmp(file.tensor[1].type, "U16") == 0);
        CHECK_EQ(st_write(in_directory("other.safetensors"), file.tensor, 1, NULL, &error), ST_ERR_ARG);
        st_close(&file);
        free(m.bytes);
    }
}

/* What is no safetensors file says what it is. */
static void test_strangers(void) {
    static const char *const texts[][2] = {
        {"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "Git LFS"},
        {"<!DOCTYPE html><html></html>", "HTML"},
        {"<html>  ", "HTML"},
        {"GGUF\3\0\0\0\0\0\0\0", "GGUF"},
        {"PK\3\4 archive", "ZIP"}};
    size_t i;
    for (i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        st_file file;
        st_error error;
        CHECK_EQ(st_parse(&file, texts[i][0], i == 3 ? 12 : strlen(texts[i][0]), "label", &error), ST_ERR_FORMAT);
        CHECK(strstr(error.message, texts[i][1]) != NULL);
        put_text("model.safetensors", texts[i][0]);
        CHECK_EQ(st_open_checkpoint(&file, directory, &error), i == 3 ? ST_ERR_TRUNC : ST_ERR_FORMAT);
        drop_file("model.safetensors");
        put_text("model.safetensors.index.json", texts[i][0]);
        CHECK_EQ(st_open_checkpoint(&file, directory, &error), ST_ERR_FORMAT);
        CHECK(strstr(error.message, texts[i][1]) != NULL);
        drop_file("model.safetensors.index.json");
    }
#ifndef ST_NO_POSIX
    {
        st_file file;
        st_error error;
        CHECK_EQ(symlink("nowhere", in_directory("model.safetensors")), 0);
        CHECK_EQ(st_open_checkpoint(&file, directory, &error), ST_ERR_IO);
        CHECK(strstr(error.message, "is a link to a file that does not exist") != NULL);
        drop_file("model.safetensors");
    }
#endif
}

/* ST-40: names around the limit, and one of 1 MB. */
static void test_name_lengths(void) {
    static const size_t lengths[] = {1, 255, 256, 1000000};
    size_t i;
    for (i = 0; i < 4; i++) {
        size_t n = lengths[i], at;
        char *json = (char *)test_alloc(n + 100);
        memcpy(json, "{\"", 2);
        memset(json + 2, 'n', n);
        at = n + 2;
        strcpy(json + at, "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}");
        check_json("ST-40 length of a name", json, 1, n < ST_MAX_NAME ? ST_OK : ST_ERR_LIMIT);
        free(json);
    }
}

/* n tiny entries, not in the order of their names, opened: the CPU time of the fastest of three. */
static double time_entries(size_t n) {
    char *json = (char *)test_alloc(n * 100), name[64];
    size_t length = 1, i;
    image m;
    st_file file;
    double least = 1e9;
    int k;
    json[0] = '{';
    for (i = 0; i < n; i++)
        length += (size_t)sprintf(
            json + length, "%s\"layer.%lu\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%lu,%lu]}",
            i ? "," : "", (unsigned long)(i * 7919 % n), (unsigned long)i, (unsigned long)i + 1);
    json[length++] = '}';
    m = make_raw(length, json, length, n);
    for (k = 0; k < 3; k++) {
        clock_t start = clock();
        double seconds;
        CHECK_EQ(st_parse(&file, m.bytes, m.length, "ST-39", NULL), ST_OK);
        seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        if (seconds < least) least = seconds;
        CHECK_EQ(file.count, n);
        check_open_file(&file);
        for (i = 0; i < n; i += 97) {
            const st_tensor *t;
            snprintf(name, sizeof name, "layer.%lu", (unsigned long)(i * 7919 % n));
            t = st_find(&file, name);
            if (!t || t->bytes != 1 || *(const unsigned char *)t->data != ((i + 1) & 0xFF)) break;
        }
        CHECK(i >= n);
        st_close(&file);
    }
    free(m.bytes);
    free(json);
    return least;
}

/* ST-39: 100000 tiny entries load, and eight times as many take at most 32 times as long: sorting takes 8 to 11 times,
 * comparing all pairs 64. No limit in seconds: that would test the machine; and numbers that fit a cache, for the
 * same reason. (A millisecond is for the clock.) */
static void test_many_entries(void) {
    double few = time_entries(1500), many = time_entries(12000);
    CHECK(many < 32 * few + 1e-3);
    printf("ST-39: 1500 tensors in %.2f ms, 12000 in %.1f, ", 1000 * few, 1000 * many);
    printf("100000 in %.0f\n", 1000 * time_entries(100000));
}

static void test_fields(void) {
    image m = make("{\"__metadata__\":{\"k\":\"v\\n\",\"format\":\"pt\"}," ENTRY("z.w", "U8", "2,3", "2,8") "," ENTRY(
                       "a\\\"\\u00e9", "U8", "2", "0,2") "}",
                   8);
    st_file file;
    st_error error;
    const st_tensor *t;
    CHECK_EQ(st_parse(&file, m.bytes, m.length, NULL, &error), ST_OK);
    CHECK_EQ(error.code, ST_OK);
    CHECK_EQ(file.count, 2);
    CHECK_EQ(file.shards, 1);
    CHECK_EQ(file.warning[0], 0);
    CHECK(strcmp(file.tensor[0].name, "a\"\xc3\xa9") == 0 && strcmp(file.tensor[1].name, "z.w") == 0);
    t = st_find(&file, "z.w");
    CHECK(t == &file.tensor[1]);
    CHECK(t && t->dtype == ST_U8 && t->rank == 2 && t->shape[0] == 2 && t->shape[1] == 3 && t->shape[2] == 0);
    CHECK(t && t->bytes == 6 && t->shard == 0 && memcmp(t->data, "\3\4\5\6\7\10", 6) == 0);
    CHECK(st_find(&file, "a\"\xc3\xa9") == &file.tensor[0]);
    CHECK(!st_find(&file, "a") && !st_find(&file, "zz") && !st_find(&file, "") && !st_find(&file, NULL));
    CHECK(!st_find(&file, "__metadata__") && !st_find(NULL, "a"));
    CHECK_EQ(file.metadata_count, 2);
    CHECK(st_metadata(&file, "k") && strcmp(st_metadata(&file, "k"), "v\n") == 0);
    CHECK(st_metadata(&file, "format") && strcmp(st_metadata(&file, "format"), "pt") == 0);
    CHECK(!st_metadata(&file, "none") && !st_metadata(&file, NULL) && !st_metadata(NULL, "k"));
    st_close(&file);
    CHECK(!st_find(&file, "z.w") && !st_metadata(&file, "k"));
    st_close(NULL);
    free(m.bytes);
    CHECK_EQ(st_parse(NULL, "", 0, NULL, &error), ST_ERR_ARG);
    CHECK_EQ(st_parse(&file, NULL, 8, NULL, &error), ST_ERR_ARG);
    CHECK_EQ(st_parse(&file, NULL, 0, NULL, &error), ST_ERR_TRUNC);
    CHECK_EQ(st_open(&file, NULL, &error), ST_ERR_ARG);
    CHECK_EQ(st_open(NULL, "x", &error), ST_ERR_ARG);
    CHECK_EQ(st_open_checkpoint(&file, NULL, &error), ST_ERR_ARG);
    CHECK_EQ(st_open_checkpoint(NULL, "x", NULL), ST_ERR_ARG);
    /* The message names the tensor, and a newline in a name does not break the line. */
    m = make("{" ENTRY("bad\\nname", "F32", "7", "0,4") "}", 4);
    CHECK_EQ(st_parse(&file, m.bytes, m.length, "some/file", &error), ST_ERR_MISMATCH);
    CHECK(strstr(error.message, "some/file") && strstr(error.message, "bad?name"));
    CHECK(strstr(error.message, "28") && strstr(error.message, "4 ") == NULL);
    free(m.bytes);
}

static void test_result_strings(void) {
    int i, j;
    for (i = ST_ERR_ARG; i <= ST_OK; i++) {
        CHECK(strcmp(st_result_string((st_result)i), "unknown result") != 0);
        for (j = i + 1; j <= ST_OK; j++)
            CHECK(strcmp(st_result_string((st_result)i), st_result_string((st_result)j)) != 0);
    }
    CHECK(strcmp(st_result_string((st_result)-99), "unknown result") == 0);
}

/* ---- truncation and mutation ----------------------------------------------------------------------- */

/* Every prefix of a good file: the code depends on what is left. */
static void test_prefixes(void) {
    image m = make(two, 32);
    size_t n, header = 8 + strlen(two);
    for (n = 0; n <= m.length; n++) {
        st_result want = n < header ? ST_ERR_TRUNC : n < header + 24 ? ST_ERR_MISMATCH : ST_ERR_TRUNC;
        image prefix;
        prefix.length = n;
        prefix.bytes = (unsigned char *)test_alloc(n);
        memcpy(prefix.bytes, m.bytes, n);
        check_image("prefix", prefix, n == m.length ? ST_OK : want);
    }
    free(m.bytes);
}

static void test_mutations(void) {
    static const char json[] =
        "{\"__metadata__\":{\"format\":\"pt\"}," ENTRY("layers.0.w", "F32", "2,3", "0,24") "," ENTRY(
            "b", "BF16", "4", "24,32") "," ENTRY("e", "U8", "0", "32,32") "}   ";
    image m = make(json, 32);
    size_t at;
    int bit, accepted = 0, refused = 0;
    long before = live_blocks;
    for (at = 0; at < m.length; at++) {
        for (bit = 0; bit < 8; bit++) {
            st_file file;
            st_error error;
            m.bytes[at] = (unsigned char)(m.bytes[at] ^ (1 << bit));
            if (st_parse(&file, m.bytes, m.length, "flip", &error) == ST_OK) {
                check_open_file(&file);
                accepted++;
            } else {
                CHECK(is_closed(&file) && error.code < 0);
                refused++;
            }
            st_close(&file);
            m.bytes[at] = (unsigned char)(m.bytes[at] ^ (1 << bit));
        }
    }
    CHECK(accepted > 32 * 8 && refused > 500);
    CHECK_EQ(live_blocks, before);
    free(m.bytes);
}

/* Two edits at a time out of the bytes that headers are made of. */
static void test_random_edits(void) {
    static const char set[] = "\"\\{}[]:,0123456789-.eFU8B \x80u";
    image m = make(two, 32), copy;
    unsigned long i;
    copy.length = m.length;
    copy.bytes = (unsigned char *)test_alloc(m.length);
    for (i = 0; i < 20000; i++) {
        st_file file;
        int edits = 2;
        memcpy(copy.bytes, m.bytes, m.length);
        while (edits--)
            copy.bytes[8 + test_random() % strlen(two)] = (unsigned char)set[test_random() % (sizeof set - 1)];
        if (st_parse(&file, copy.bytes, copy.length, "edit", NULL) == ST_OK) check_open_file(&file);
        st_close(&file);
    }
    free(copy.bytes);
    free(m.bytes);
}

/* ---- ST-55: odd and changing files ------------------------------------------------------------------ */

/* Cuts the file during the n-th allocation of the opening call. */
static char cut_path[1024];
static long cut_call;
static off_t cut_length;
static void cut_file(void) {
    if (malloc_calls == cut_call) CHECK_EQ(truncate(cut_path, cut_length), 0);
}

static void test_shrinking(void) {
    image m = make(two, 32);
    st_file file;
    st_error error;
    long call, calls;
    size_t i;
    const size_t lengths[] = {0, 8, 20, m.length - 33, m.length - 32, m.length - 1, m.length + 1};
    snprintf(cut_path, sizeof cut_path, "%s", in_directory("shrink.safetensors"));
    put_file("shrink.safetensors", m.bytes, m.length);
    fail_calls(0, 0);
    CHECK_EQ(st_open(&file, cut_path, &error), ST_OK);
    st_close(&file);
    calls = malloc_calls - 2; /* the last two sort, after the last look at the file */
    malloc_hook = cut_file;
    for (i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (call = 1; call <= calls; call++) {
            put_file("shrink.safetensors", m.bytes, m.length);
            fail_calls(0, 0);
            cut_call = call;
            cut_length = (off_t)lengths[i];
            same("ST-55 shrinks while opened", st_open(&file, cut_path, &error), ST_ERR_IO);
            CHECK(is_closed(&file));
        }
    }
    malloc_hook = NULL;
    drop_file("shrink.safetensors");
    free(m.bytes);
}

static void test_odd_files(void) {
    st_file file;
    st_error error;
    CHECK_EQ(mkdir(in_directory("dir.safetensors"), 0700), 0);
    same("ST-55 directory", st_open(&file, in_directory("dir.safetensors"), &error), ST_ERR_IO);
    rmdir(in_directory("dir.safetensors"));
#ifndef ST_NO_POSIX
    CHECK_EQ(mkfifo(in_directory("fifo.safetensors"), 0600), 0);
    same("ST-55 FIFO", st_open(&file, in_directory("fifo.safetensors"), &error), ST_ERR_IO);
    drop_file("fifo.safetensors");
    same("ST-55 device", st_open(&file, "/dev/null", &error), ST_ERR_IO);
#endif
    put_text("locked.safetensors", "x");
    chmod(in_directory("locked.safetensors"), 0);
    same("ST-55 unreadable", st_open(&file, in_directory("locked.safetensors"), &error),
         access(in_directory("locked.safetensors"), R_OK) == 0 ? ST_ERR_TRUNC : ST_ERR_IO); /* root reads all */
    drop_file("locked.safetensors");
    same("ST-55 path through a file", st_open(&file, "/dev/null/x.safetensors", &error), ST_ERR_IO);
    same("no such file", st_open(&file, in_directory("none.safetensors"), &error), ST_ERR_MISSING);
    CHECK(is_closed(&file) && strstr(error.message, "none.safetensors"));
}

/* A sparse file with a tensor behind 4 GiB. */
static void test_sparse(void) {
#if !defined(ST_NO_MMAP) && !defined(ST_NO_POSIX) && !defined(ST_BIG_ENDIAN)
    static const char json[] = "{" ENTRY("big", "U8", "4294967296",
                                         "0,4294967296") "," ENTRY("last", "U8", "4", "4294967296,4294967300") "}";
    image m = make(json, 0);
    st_file file;
    st_error error;
    const st_tensor *t;
    int handle, made;
    off_t end = (off_t)m.length + (off_t)4294967296LL;
    put_file("sparse.safetensors", m.bytes, m.length);
    handle = open(in_directory("sparse.safetensors"), O_RDWR);
    made = handle >= 0 && pwrite(handle, "tail", 4, end) == 4;
    if (handle >= 0) close(handle);
    if (!made) printf("ST-55: no room for a sparse file, left out\n");
    if (made && sizeof(size_t) > 4) {
        same("ST-55 sparse", st_open(&file, in_directory("sparse.safetensors"), &error), ST_OK);
        t = st_find(&file, "last");
        CHECK(t && memcmp(t->data, "tail", 4) == 0);
        t = st_find(&file, "big");
        CHECK(t && t->bytes == (size_t)4294967296u && ((const unsigned char *)t->data)[4294967295u] == 0);
        st_close(&file);
    } else if (made) {
        same("ST-55 sparse", st_open(&file, in_directory("sparse.safetensors"), &error), ST_ERR_OVERFLOW);
    }
    drop_file("sparse.safetensors");
    free(m.bytes);
#endif
}

/* ---- sharded checkpoints --------------------------------------------------------------------------- */

#define INDEX "model.safetensors.index.json"

static void put_shard(const char *name, const char *json, size_t data) {
    image m = make(json, data);
    put_file(name, m.bytes, m.length);
    free(m.bytes);
}

/* Writes the index, opens the checkpoint. */
static st_result open_index(st_file *file, const char *index, st_error *error) {
    put_text(INDEX, index);
    return st_open_checkpoint(file, directory, error);
}

static void check_index(const char *id, const char *index, st_result want) {
    st_file file;
    st_error error;
    long before = live_blocks;
    memset(&file, 0x5A, sizeof file);
    same(id, open_index(&file, index, &error), want);
    check_error(&error, want, directory);
    if (want == ST_OK)
        check_open_file(&file);
    else
        CHECK(is_closed(&file));
    st_close(&file);
    CHECK_EQ(live_blocks, before);
}

#define MAP(entries) "{\"metadata\":{\"total_size\":12},\"weight_map\":{" entries "}}"
#define GOOD_MAP MAP("\"b\":\"s2\",\"a\":\"s1\",\"c\":\"s1\"")

static void put_shards(void) {
    put_shard("s1",
              "{\"__metadata__\":{\"n\":\"one\"}," ENTRY("c", "U8", "4", "4,8") "," ENTRY("a", "U8", "4", "0,4") "}",
              8);
    put_shard("s2", "{\"__metadata__\":{\"n\":\"two\"}," ENTRY("b", "U8", "4", "0,4") "}", 4);
}

static void test_checkpoint(void) {
    st_file file;
    st_error error;
    same("neither file", st_open_checkpoint(&file, directory, &error), ST_ERR_MISSING);
    CHECK(is_closed(&file) && strstr(error.message, directory));
    put_shards();
    CHECK_EQ(open_index(&file, GOOD_MAP, &error), ST_OK);
    check_open_file(&file);
    CHECK_EQ(file.count, 3);
    CHECK_EQ(file.shards, 2);
    CHECK_EQ(file.warning[0], 0);
    CHECK_EQ(file.tensor[0].shard, 0);
    CHECK_EQ(file.tensor[1].shard, 1);
    CHECK_EQ(file.tensor[2].shard, 0);
    CHECK(memcmp(st_find(&file, "a")->data, "\1\2\3\4", 4) == 0);
    CHECK(memcmp(st_find(&file, "b")->data, "\1\2\3\4", 4) == 0);
    CHECK(memcmp(st_find(&file, "c")->data, "\5\6\7\10", 4) == 0);
    CHECK(st_metadata(&file, "n") && strcmp(st_metadata(&file, "n"), "one") == 0);
    st_close(&file);
    put_shard("s1", "{" ENTRY("a", "U8", "1", "0,1") "," ENTRY("d", "U8", "1", "1,2") "," ENTRY("f", "U8", "1", "2,3") "}", 3);
    put_shard("s2", "{" ENTRY("b", "U8", "1", "0,1") "," ENTRY("e", "U8", "1", "1,2") "}", 2);
    put_shard("s3", "{" ENTRY("c", "U8", "1", "0,1") "}", 1); /* each has fewer than the one before, the last none */
    put_shard("s4", "{}", 0);
    CHECK_EQ(open_index(&file, MAP("\"a\":\"s1\",\"b\":\"s2\",\"c\":\"s3\",\"d\":\"s1\",\"e\":\"s2\",\"f\":\"s1\",\"g\":\"s4\""),
                        &error), ST_OK);
    check_open_file(&file);
    CHECK(file.count == 6 && file.shards == 4);
    for (int i = 0; i < 6 && file.count == 6; i++) {
        static const char data[7] = "\1\1\1\2\2\3";
        CHECK(file.tensor[i].name[0] == 'a' + i && *(const char *)file.tensor[i].data == data[i]);
    }
    st_close(&file);
    drop_file("s3"), drop_file("s4");
    put_shards();
    put_shard("model.safetensors", "{" ENTRY("single", "U8", "4", "0,4") "}", 4);
    CHECK_EQ(st_open_checkpoint(&file, directory, &error), ST_OK); /* goes before the index */
    CHECK(file.count == 1 && st_find(&file, "single"));
    st_close(&file);
    put_shard("model.safetensors", "{\"a\":{}}", 0); /* MISSING inside is not a missing file */
    CHECK_EQ(st_open_checkpoint(&file, directory, &error), ST_ERR_MISSING);
    CHECK(strstr(error.message, "dtype") != NULL);
    drop_file("model.safetensors");
    CHECK_EQ(st_open_checkpoint(&file, in_directory("none"), &error), ST_ERR_MISSING);
    CHECK_EQ(st_open_checkpoint(&file, in_directory("s1"), &error), ST_ERR_IO); /* not a directory */
}

static void test_index(void) {
    check_index("ST-50 missing shard", MAP("\"a\":\"s1\",\"c\":\"s1\",\"b\":\"s3\""), ST_OK);
    check_index("ST-50 no shard is there", MAP("\"a\":\"s3\",\"c\":\"s4\""), ST_ERR_MISSING);
    check_index("ST-51 tensor absent", MAP("\"a\":\"s1\",\"b\":\"s2\",\"x\":\"s2\""), ST_OK);
    check_index("ST-51 all absent", MAP("\"x\":\"s2\""), ST_ERR_MISSING);
    check_index("ST-51 tensor in another shard", MAP("\"a\":\"s2\",\"b\":\"s2\",\"c\":\"s1\""), ST_OK);
    put_shard("s2", "{" ENTRY("a", "U8", "4", "0,4") "," ENTRY("b", "U8", "4", "4,8") "}", 8);
    check_index("ST-52 tensor in two shards", GOOD_MAP, ST_ERR_FORMAT);
    check_index("ST-52 one tensor listed twice", MAP("\"a\":\"s1\",\"a\":\"s1\""), ST_ERR_FORMAT);
    put_shards();
    check_index("ST-53 up", MAP("\"a\":\"../s1\""), ST_ERR_FORMAT);
    check_index("ST-53 up, escaped", MAP("\"a\":\"..\\u002fs1\""), ST_ERR_FORMAT);
    check_index("ST-53 parent", MAP("\"a\":\"..\""), ST_ERR_FORMAT);
    check_index("ST-53 itself", MAP("\"a\":\".\""), ST_ERR_FORMAT);
    check_index("ST-53 absolute", MAP("\"a\":\"/etc/passwd\""), ST_ERR_FORMAT);
    check_index("ST-53 below", MAP("\"a\":\"x/s1\""), ST_ERR_FORMAT);
    check_index("ST-53 backslash", MAP("\"a\":\"..\\\\s1\""), ST_ERR_FORMAT);
    check_index("ST-53 drive", MAP("\"a\":\"C:s1\""), ST_ERR_FORMAT);
    check_index("ST-53 empty", MAP("\"a\":\"\""), ST_ERR_FORMAT);
    check_index("ST-53 NUL", MAP("\"a\":\"s1\\u0000\""), ST_ERR_FORMAT);
    check_index("ST-53 last of several", MAP("\"a\":\"s1\",\"b\":\"s2\",\"c\":\"./s1\""), ST_ERR_FORMAT);
    check_index("file is a number", MAP("\"a\":1"), ST_ERR_FORMAT);
    check_index("file is null", MAP("\"a\":null"), ST_ERR_FORMAT);
    check_index("NUL in a name", MAP("\"a\\u0000\":\"s1\""), ST_ERR_LIMIT);
    check_index("no weight_map", "{\"metadata\":{}}", ST_ERR_MISSING);
    check_index("weight_map is an array", "{\"weight_map\":[]}", ST_ERR_FORMAT);
    check_index("weight_map is empty", "{\"weight_map\":{}}", ST_ERR_FORMAT);
    check_index("index is an array", "[]", ST_ERR_FORMAT);
    check_index("index is empty", "", ST_ERR_FORMAT);
    check_index("index is cut", "{\"weight_map\":{\"a\":", ST_ERR_FORMAT);
    check_index("no metadata", "{\"weight_map\":{\"b\":\"s2\"}}", ST_OK);
    put_shard("s2", two, 31);
    check_index("cut shard", GOOD_MAP, ST_ERR_TRUNC);
    put_text("s2", "");
    check_index("empty shard", GOOD_MAP, ST_ERR_TRUNC);
    drop_file("s2");
    CHECK_EQ(mkdir(in_directory("s2"), 0700), 0);
    check_index("ST-55 shard is a directory", GOOD_MAP, ST_ERR_IO);
    rmdir(in_directory("s2"));
    put_shards();
}

/* What is odd but accepted. */
static void check_warning(const char *id, const char *index, const char *want) {
    st_file file;
    st_error error;
    same(id, open_index(&file, index, &error), ST_OK);
    CHECK(*want ? strstr(file.warning, want) != NULL : file.warning[0] == '\0');
    st_close(&file);
}

static void test_warnings(void) {
#define ALL "\"weight_map\":{\"b\":\"s2\",\"a\":\"s1\",\"c\":\"s1\"}}"
    check_warning("ST-54 right", "{\"metadata\":{\"total_size\":12}," ALL, "");
    check_warning("ST-54 wrong", "{\"metadata\":{\"total_size\":13}," ALL, "13");
    check_warning("ST-54 not whole", "{\"metadata\":{\"total_size\":12.0}," ALL, "whole");
    check_warning("ST-54 string", "{\"metadata\":{\"total_size\":\"12\"}," ALL, "whole");
    check_warning("ST-54 none", "{\"metadata\":{}," ALL, "");
    check_warning("ST-54 no object", "{\"metadata\":[]," ALL, "");
    check_warning("not listed", "{\"weight_map\":{\"b\":\"s2\",\"a\":\"s1\"}}", "3 tensors");
    check_warning("ST-50 missing shard", MAP("\"a\":\"s1\",\"c\":\"s1\",\"b\":\"s3\",\"d\":\"s3\""),
                  "2 of 4 tensors of the index are absent: b is not in s3");
    check_warning("ST-51 tensor absent", MAP("\"a\":\"s1\",\"b\":\"s2\",\"x\":\"s2\""), "1 of 3 tensors");
    check_warning("ST-51 tensor in another shard", MAP("\"a\":\"s2\",\"b\":\"s2\",\"c\":\"s1\""), "a is not in s2");
#undef ALL
}

static void test_index_limits(void) {
    const size_t n = ST_MAX_SHARDS + 1;
    char *index = (char *)test_alloc(n * 32 + 64);
    size_t length, i;
    length = (size_t)sprintf(index, "{\"weight_map\":{");
    for (i = 0; i < n; i++)
        length +=
            (size_t)sprintf(index + length, "%s\"%lu\":\"x%lu\"", i ? "," : "", (unsigned long)i, (unsigned long)i);
    strcpy(index + length, "}}");
    check_index("too many shards", index, ST_ERR_LIMIT);
    length = (size_t)sprintf(index, "{\"weight_map\":{\"a\":\"");
    memset(index + length, 'x', ST_MAX_NAME);
    strcpy(index + length + ST_MAX_NAME, "\"}}");
    check_index("name of a shard too long", index, ST_ERR_LIMIT);
    free(index);
    put_text(INDEX, "{}");
    if (truncate(in_directory(INDEX), (off_t)ST_MAX_HEADER + 1) == 0) { /* sparse */
        st_file file;
        st_error error;
        same("index too long", st_open_checkpoint(&file, directory, &error), ST_ERR_LIMIT);
    }
}

/* ---- writer ---------------------------------------------------------------------------------------- */

/* Files in the directory that a writer has not finished. */
static int temporaries(void) {
    DIR *d = opendir(directory);
    struct dirent *entry;
    int count = 0;
    if (d == NULL) return -1;
    while ((entry = readdir(d)) != NULL) {
        size_t n = strlen(entry->d_name);
        count += n > 4 && strcmp(entry->d_name + n - 4, ".tmp") == 0;
    }
    closedir(d);
    return count;
}

static st_tensor describe(const char *name, st_dtype dtype, uint64_t rows, const void *data, size_t bytes) {
    st_tensor t;
    memset(&t, 0, sizeof t);
    t.name = name;
    t.dtype = dtype;
    t.rank = 1;
    t.shape[0] = rows;
    t.data = data;
    t.bytes = bytes;
    return t;
}

static void test_write_bytes(void) {
    static const char want[] = "{\"__metadata__\":{\"format\":\"pt\"},\"x\":{\"dtype\":\"F32\",\"shape\":[1],"
                               "\"data_offsets\":[0,4]}}";
    static const char *const pairs[] = {"format", "pt", NULL};
    const float one = 1;
    st_tensor t = describe("x", ST_F32, 1, &one, 4);
    st_error error;
    char bytes[256];
    size_t length, padded = (sizeof want - 1 + 7) / 8 * 8, i;
    CHECK_EQ(st_write(in_directory("w.safetensors"), &t, 1, pairs, &error), ST_OK);
    CHECK_EQ(error.code, ST_OK);
    length = get_file("w.safetensors", bytes, sizeof bytes);
    CHECK_EQ(length, 8 + padded + 4);
    CHECK_EQ((unsigned char)bytes[0], padded);
    for (i = 1; i < 8; i++) CHECK_EQ(bytes[i], 0);
    CHECK(memcmp(bytes + 8, want, sizeof want - 1) == 0);
    for (i = 8 + sizeof want - 1; i < 8 + padded; i++) CHECK_EQ(bytes[i], ' ');
#ifndef ST_BIG_ENDIAN
    CHECK(memcmp(bytes + 8 + padded, "\x00\x00\x80\x3f", 4) == 0); /* little-endian on every host */
#endif
    CHECK_EQ(temporaries(), 0);
    drop_file("w.safetensors");
}

/* Everything that can be written comes back the same. */
static void test_roundtrip(void) {
    static const char *const names[] = {"plain", "quote\"back\\slash", "new\nline\x01", "\xc3\xa9\xe2\x82\xac",
                                        "model.layers.0.mlp.experts.255.down_proj.weight_scale_inv"};
    static const char *const pairs[] = {"a\"b", "c\\d\n", "empty", "", "", "empty key", NULL};
    st_tensor tensor[22];
    unsigned char data[22][10000];
    char label[22][32];
    size_t i, n = 22;
    st_file file;
    st_error error;
    for (i = 0; i < n; i++) {
        st_dtype dtype = (st_dtype)(i % 15);
        size_t rows = i == 7 ? 0 : i == 8 ? 1250 : i + 1, j; /* one is longer than a buffer of the writer */
        for (j = 0; j < sizeof data[i]; j++) data[i][j] = (unsigned char)test_random();
        snprintf(label[i], sizeof label[i], "t%lu", (unsigned long)(n - i));
        tensor[i] = describe(i < 5 ? names[i] : label[i], dtype, rows, data[i], rows * st_dtype_bytes(dtype));
    }
    tensor[3].rank = 0, tensor[3].bytes = 2, tensor[3].shape[0] = 0;
    tensor[4].rank = 8;
    for (i = 0; i < 8; i++) tensor[4].shape[i] = 1 + i % 2;
    tensor[4].bytes = 16 * st_dtype_bytes(tensor[4].dtype);
    tensor[7].data = NULL; /* no bytes need no data */
    CHECK_EQ(st_write(in_directory("r.safetensors"), tensor, n, pairs, &error), ST_OK);
    CHECK_EQ(st_open(&file, in_directory("r.safetensors"), &error), ST_OK);
    check_open_file(&file);
    CHECK_EQ(file.count, n);
    for (i = 0; i < n; i++) {
        const st_tensor *t = st_find(&file, tensor[i].name);
        CHECK(t && t->dtype == tensor[i].dtype && t->rank == tensor[i].rank && t->bytes == tensor[i].bytes);
        CHECK(t && memcmp(t->shape, tensor[i].shape, (size_t)t->rank * sizeof t->shape[0]) == 0);
        CHECK(t && (t->bytes == 0 || memcmp(t->data, tensor[i].data, t->bytes) == 0));
    }
    CHECK_EQ(file.metadata_count, 3);
    for (i = 0; pairs[i]; i += 2)
        CHECK(st_metadata(&file, pairs[i]) && strcmp(st_metadata(&file, pairs[i]), pairs[i + 1]) == 0);
    /* What was read can be written again, over the file it is read from. */
    CHECK_EQ(
        st_write(in_directory("r.safetensors"), file.tensor, file.count, file.metadata_count ? NULL : pairs, &error),
        ST_OK);
    for (i = 0; i < n; i++) {
        const st_tensor *t = st_find(&file, tensor[i].name);
        CHECK(t && (t->bytes == 0 || memcmp(t->data, tensor[i].data, t->bytes) == 0));
    }
    st_close(&file);
    CHECK_EQ(st_open(&file, in_directory("r.safetensors"), &error), ST_OK);
    CHECK(file.count == n && file.metadata_count == 0);
    st_close(&file);
    CHECK_EQ(st_write(in_directory("r.safetensors"), NULL, 0, NULL, &error), ST_OK);
    CHECK_EQ(st_open(&file, in_directory("r.safetensors"), &error), ST_OK);
    CHECK_EQ(file.count, 0);
    st_close(&file);
    CHECK_EQ(st_write(in_directory("r.safetensors"), NULL, 0, pairs, &error), ST_OK);
    drop_file("r.safetensors");
}

/* A refused or failed write: the code, no temporary file, and the old file as it was. */
static void check_write(const char *id, const char *name, const st_tensor *tensors, size_t count,
                        const char *const *pairs, st_result want) {
    st_error error;
    long before = live_blocks;
    memset(&error, 0x5A, sizeof error);
    same(id, st_write(in_directory(name), tensors, count, pairs, &error), want);
    CHECK_EQ(error.code, want);
    CHECK(error.message[0] && !strchr(error.message, '\n'));
    CHECK_EQ(st_write(in_directory(name), tensors, count, pairs, NULL), want);
    CHECK_EQ(temporaries(), 0);
    CHECK_EQ(live_blocks, before);
}

static void test_write_refused(void) {
    static const char *const odd[] = {"key", NULL};
    static const char *const twice[] = {"k", "1", "k", "2", NULL};
    static const char *const bad[] = {"k", "\xff", NULL};
    static unsigned char data[64];
    static char long_text[500000];
    const char *many[203];
    char longer[ST_MAX_NAME + 1], old[8];
    size_t i;
    st_tensor t = describe("x", ST_U8, 4, data, 4), pair[2];
    st_error error;
    const char *file = "old.safetensors";
    put_text(file, "old");
    check_write("metadata without a value", file, &t, 1, odd, ST_ERR_ARG);
    check_write("metadata twice", file, &t, 1, twice, ST_ERR_FORMAT);
    check_write("metadata not UTF-8", file, &t, 1, bad, ST_ERR_FORMAT);
    check_write("no tensors given", file, NULL, 1, NULL, ST_ERR_ARG);
    CHECK_EQ(st_write(NULL, &t, 1, NULL, &error), ST_ERR_ARG);
    pair[0] = pair[1] = t;
    check_write("name twice", file, pair, 2, NULL, ST_ERR_FORMAT);
    t.name = NULL;
    check_write("no name", file, &t, 1, NULL, ST_ERR_ARG);
    t.name = "";
    check_write("empty name", file, &t, 1, NULL, ST_ERR_LIMIT);
    t.name = "__metadata__";
    check_write("reserved name", file, &t, 1, NULL, ST_ERR_FORMAT);
    t.name = "\xed\xa0\x80";
    check_write("name not UTF-8", file, &t, 1, NULL, ST_ERR_FORMAT);
    memset(longer, 'n', ST_MAX_NAME);
    longer[ST_MAX_NAME] = '\0';
    t.name = longer;
    check_write("name too long", file, &t, 1, NULL, ST_ERR_LIMIT);
    t.name = "x";
    t.dtype = (st_dtype)99;
    check_write("no dtype", file, &t, 1, NULL, ST_ERR_ARG);
    t.dtype = ST_U8;
    t.data = NULL;
    check_write("no data", file, &t, 1, NULL, ST_ERR_ARG);
    t.data = data;
    t.bytes = 5;
    check_write("bytes and shape differ", file, &t, 1, NULL, ST_ERR_MISMATCH);
    t.bytes = 4;
    t.rank = -1;
    check_write("rank -1", file, &t, 1, NULL, ST_ERR_ARG);
    t.rank = 9;
    check_write("rank 9", file, &t, 1, NULL, ST_ERR_LIMIT);
    t.rank = 2;
    t.shape[0] = t.shape[1] = (uint64_t)1 << 32;
    check_write("shape overflows", file, &t, 1, NULL, ST_ERR_OVERFLOW);
    pair[0] = describe("a", ST_U8, SIZE_MAX, data, SIZE_MAX);
    pair[1] = describe("b", ST_U8, 2, data, 2);
    if (sizeof(size_t) == 8) check_write("sum overflows", file, pair, 2, NULL, ST_ERR_OVERFLOW);
    for (i = 0; i < 202; i++) many[i] = long_text; /* 101 keys and values of half a megabyte each */
    many[202] = NULL;
    memset(long_text, 'x', sizeof long_text - 1);
    check_write("header too long", file, NULL, 0, many, ST_ERR_LIMIT);
    CHECK(get_file(file, old, sizeof old) == 3 && memcmp(old, "old", 3) == 0);
    drop_file(file);
}

#ifndef ST_NO_POSIX
/* What a crash left behind ten thousand times: every name is taken, and one that is not is found. */
static void test_names_taken(void) {
    static unsigned char data[4];
    char old[8], name[64];
    st_tensor t = describe("x", ST_U8, sizeof data, data, sizeof data);
    st_error error;
    put_text("taken", "old");
    for (int i = 0; i < 10000; i++) {
        snprintf(name, sizeof name, "taken.%ld-%d.tmp", (long)getpid(), i);
        if (link(in_directory("taken"), in_directory(name)) != 0) put_text(name, "old"); /* a link is quicker */
    }
    CHECK_EQ(st_write(in_directory("taken"), &t, 1, NULL, &error), ST_ERR_IO);
    CHECK_EQ(error.code, ST_ERR_IO);
    CHECK(strstr(error.message, "taken") != NULL);
    CHECK(get_file("taken", old, sizeof old) == 3 && memcmp(old, "old", 3) == 0);
    drop_file(name);
    CHECK_EQ(st_write(in_directory("taken"), &t, 1, NULL, &error), ST_OK);
    CHECK_EQ(get_file("taken", old, sizeof old), 8);
    CHECK_EQ(temporaries(), 9999);
    for (int i = 0; i < 9999; i++) {
        snprintf(name, sizeof name, "taken.%ld-%d.tmp", (long)getpid(), i);
        drop_file(name);
    }
    drop_file("taken");
}
#endif

static void test_write_failures(void) {
    static unsigned char data[100000];
    char old[8];
    st_tensor t = describe("x", ST_U8, sizeof data, data, sizeof data);
    struct rlimit limit, small;
    check_write("no such directory", "none/x.safetensors", &t, 1, NULL, ST_ERR_IO);
    CHECK(!exists("none"));
    CHECK_EQ(mkdir(in_directory("target"), 0700), 0);
    CHECK_EQ(mkdir(in_directory("target/full"), 0700), 0);
    check_write("target is a directory", "target", &t, 1, NULL, ST_ERR_IO);
    CHECK_EQ(chmod(in_directory("target"), 0500), 0);
    if (access(in_directory("target"), W_OK) != 0) /* root may write anywhere */
        check_write("read-only directory", "target/x", &t, 1, NULL, ST_ERR_IO);
    CHECK_EQ(chmod(in_directory("target"), 0700), 0);
    rmdir(in_directory("target/full"));
    rmdir(in_directory("target"));
    /* A limit on the size of files stands for a full disk. */
    put_text("old.safetensors", "old");
    signal(SIGXFSZ, SIG_IGN);
    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = limit;
    small.rlim_cur = 50000;
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    check_write("disk full", "old.safetensors", &t, 1, NULL, ST_ERR_IO);
    t.dtype = ST_F32, t.shape[0] = sizeof data / 4;
    check_write("disk full of words", "old.safetensors", &t, 1, NULL, ST_ERR_IO);
    small.rlim_cur = 4;
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    check_write("disk full at once", "old.safetensors", &t, 1, NULL, ST_ERR_IO);
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
    CHECK(get_file("old.safetensors", old, sizeof old) == 3 && memcmp(old, "old", 3) == 0);
    /* What a crash left behind, a link to another file here, and what another writer has just begun, are in nobody's
     * way, and stay. */
    put_text("other", "other");
#ifndef ST_NO_POSIX
    {
        char first[64], second[64];
        snprintf(first, sizeof first, "old.safetensors.%ld-0.tmp", (long)getpid());
        snprintf(second, sizeof second, "old.safetensors.%ld-1.tmp", (long)getpid());
        CHECK_EQ(symlink("other", in_directory(first)), 0);
        put_text(second, "begun");
        CHECK_EQ(st_write(in_directory("old.safetensors"), &t, 1, NULL, NULL), ST_OK);
        CHECK(get_file("other", old, sizeof old) == 5 && memcmp(old, "other", 5) == 0);
        CHECK(get_file(second, old, sizeof old) == 5 && memcmp(old, "begun", 5) == 0);
        CHECK_EQ(temporaries(), 2);
        drop_file(first);
        drop_file(second);
    }
#else
    put_text("old.safetensors.tmp", "left over");
    CHECK_EQ(st_write(in_directory("old.safetensors"), &t, 1, NULL, NULL), ST_OK);
#endif
    CHECK_EQ(temporaries(), 0);
    drop_file("other");
    drop_file("old.safetensors");
}

/* ---- failing allocations --------------------------------------------------------------------------- */

enum { OPEN_FILE, OPEN_CHECKPOINT, PARSE, WRITE, OPERATIONS };

static st_result operate(int operation, st_file *file, const image *m, st_error *error) {
    static const char *const pairs[] = {"k", "v", NULL};
    st_tensor t = describe("x", ST_U8, 4, "data", 4);
    memset(file, 0, sizeof *file);
    switch (operation) {
    case OPEN_FILE: return st_open(file, in_directory("s1"), error);
    case OPEN_CHECKPOINT: return st_open_checkpoint(file, directory, error);
    case PARSE: return st_parse(file, m->bytes, m->length, NULL, error);
    default: return st_write(in_directory("nomem.safetensors"), &t, 1, pairs, error);
    }
}

/* Call k fails, alone or with all that follow, for k = 1, 2, ... until the operation succeeds. */
static void test_no_memory(void) {
    image m = make("{\"__metadata__\":{\"k\":\"v\"}," ENTRY("a", "U8", "4", "0,4") "}", 4);
    int operation, persistent;
    put_shards();
    put_text(INDEX, GOOD_MAP);
    for (operation = 0; operation < OPERATIONS; operation++) {
        for (persistent = 0; persistent < 2; persistent++) {
            long k, before = live_blocks;
            st_result result = ST_ERR_NOMEM;
            for (k = 1; k < 1000 && result != ST_OK; k++) {
                st_file file;
                st_error error;
                fail_calls(k, persistent ? 1000000 : k);
                result = operate(operation, &file, &m, &error);
                if (result != ST_OK) {
                    CHECK_EQ(result, ST_ERR_NOMEM);
                    CHECK(error.code == ST_ERR_NOMEM && strstr(error.message, "out of memory"));
                    CHECK(is_closed(&file));
                    CHECK(!exists("nomem.safetensors") && temporaries() == 0);
                    CHECK_EQ(live_blocks, before);
                }
                st_close(&file);
            }
            CHECK(k > 5 && k < 1000);
            CHECK_EQ(live_blocks, before);
            drop_file("nomem.safetensors");
        }
    }
    fail_calls(0, 0);
    free(m.bytes);
}

/* ---- failing input and output ---------------------------------------------------------------------- */

/* Each call of the system in turn is at fault, alone or with all that follow. */
static void test_faults(void) {
    int operation, kind, persistent;
    put_shards();
    put_text(INDEX, GOOD_MAP);
    for (operation = 0; operation < OPERATIONS; operation++) {
        if (operation == PARSE) continue;
        for (kind = FAULT_ERROR; kind < FAULTS; kind++) {
            for (persistent = 0; persistent < 2; persistent++) {
                int done = 0, failed = 0;
                long k, before = live_blocks;
                for (k = 1; k < 1000 && !done; k++) {
                    st_file file;
                    st_error error;
                    st_result result;
                    char old[8];
                    if (kind == FAULT_INTERRUPT && persistent) break; /* would go on forever */
                    put_text("nomem.safetensors", "old");
                    io_calls = 0;
                    io_from = k;
                    io_to = persistent ? 1000000 : k;
                    io_fault = kind;
                    result = operate(operation, &file, NULL, &error);
                    io_fault = NO_FAULT;
                    done = io_calls < k;
                    CHECK(result == ST_OK || result == ST_ERR_IO);
                    if (result != ST_OK) {
                        CHECK(is_closed(&file) && error.code == result && error.message[0]);
                        failed = 1;
#ifndef ST_NO_POSIX
                        CHECK(get_file("nomem.safetensors", old, sizeof old) == 3);
#endif
                    } else if (operation != WRITE) {
                        const st_tensor *a = st_find(&file, "a");
                        CHECK(a && memcmp(a->data, "\1\2\3\4", 4) == 0);
                    } else {
                        CHECK(get_file("nomem.safetensors", old, sizeof old) == sizeof old);
                    }
                    CHECK_EQ(temporaries(), 0);
                    if (done) CHECK_EQ(result, ST_OK);
                    st_close(&file);
                    CHECK_EQ(live_blocks, before);
                }
                CHECK(k < 1000);
                /* Short and interrupted calls are gone on with; errors, and ends on reading, are not. */
                CHECK_EQ(failed, kind == FAULT_ERROR || (kind == FAULT_END && operation != WRITE));
            }
        }
    }
    drop_file("nomem.safetensors");
}

/* ---- all ------------------------------------------------------------------------------------------- */

static int lowest_free_handle(void) {
    int handle = dup(1);
    close(handle);
    return handle;
}

/* Sizes at their edges, metadata without a pair, a file of no bytes. */
static void test_edges(void) {
    static const char *const none[] = {NULL};
    uint64_t product = 7;
    float x = 1.0f;
    st_tensor t = describe("x", ST_F32, 1, &x, sizeof x);
    st_file file;
    st_error error;
    unsigned char bytes[7] = {1, 2, 3, 4, 5, 6, 7};
    CHECK(sti_alloc((size_t)-1, 2, "marks", "place", &error) == NULL);
    CHECK(error.code == ST_ERR_NOMEM && strstr(error.message, "place: out of memory for marks") != NULL);
    CHECK(sti_multiply(UINT64_MAX, 0, &product) && product == 0);
    CHECK(sti_multiply(UINT64_MAX, 1, &product) && product == UINT64_MAX);
    CHECK(!sti_multiply(UINT64_MAX / 2 + 1, 2, &product) && product == UINT64_MAX);
    sti_swap(bytes, 6, 2);
    CHECK(memcmp(bytes, "\2\1\4\3\6\5\7", 7) == 0);
    sti_swap(bytes, 7, 1);
    CHECK(memcmp(bytes, "\2\1\4\3\6\5\7", 7) == 0);
    sti_swap(bytes, 7, 4); /* whole elements only */
    CHECK(memcmp(bytes, "\3\4\1\2\6\5\7", 7) == 0);
    CHECK_EQ(st_write(in_directory("e"), &t, 1, none, &error), ST_OK);
    CHECK_EQ(st_open(&file, in_directory("e"), &error), ST_OK);
    CHECK(file.count == 1 && file.metadata_count == 0);
    st_close(&file);
    CHECK_EQ(st_write_bytes(in_directory("e"), NULL, 0, &error), ST_OK);
    CHECK_EQ(st_open(&file, in_directory("e"), &error), ST_ERR_TRUNC);
    drop_file("e");
}

int main(void) {
    static const char *const names[] = {"s1", "s2", INDEX};
    const char *base = getenv("TMPDIR");
    int handle = lowest_free_handle();
    size_t i;
    snprintf(directory, sizeof directory, "%.200s/safetensors-XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(directory)) {
        fprintf(stderr, "cannot make %s\n", directory);
        return 2;
    }
    test_lengths();
    test_header_text();
    test_offsets();
    test_shapes();
    test_entries();
    test_name_lengths();
    test_many_entries();
    test_fields();
    test_result_strings();
    test_prefixes();
    test_mutations();
    test_random_edits();
    test_odd_files();
    test_shrinking();
    test_sparse();
    test_checkpoint();
    test_index();
    test_other_dtypes();
    test_strangers();
    test_warnings();
    test_index_limits();
    test_write_bytes();
    test_roundtrip();
    test_write_refused();
    test_write_failures();
#ifndef ST_NO_POSIX
    test_names_taken();
#endif
    test_no_memory();
    test_faults();
    test_edges();
    for (i = 0; i < 3; i++) drop_file(names[i]);
    CHECK_EQ(rmdir(directory), 0); /* nothing was left behind */
    CHECK_EQ(live_blocks, 0);
    CHECK_EQ(lowest_free_handle(), handle);
    return test_done("safetensors");
}
