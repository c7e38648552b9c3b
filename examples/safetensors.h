/* safetensors.h -- reads and writes .safetensors files, alone or as a sharded checkpoint, in one header.
 *
 * What it is: a reader that checks a whole file before it hands out the first pointer, so that a damaged
 * or hostile file is refused with a reason instead of being read past its end; then every tensor is used
 * where it lies in the file (mmap), without a copy. And a writer that replaces a file in one step.
 *
 * What it is not: a converter (data keeps its type), a tensor library, or a check of the values (NaN and
 * bytes other than 0 and 1 in a BOOL pass). It needs json.h beside it and nothing else.
 *
 * Use: in exactly one C or C++ file
 *
 *     #define SAFETENSORS_IMPLEMENTATION
 *     #include "safetensors.h"
 *
 * and in any other file only the #include. Where off_t has 32 bits that file opens nothing above 2 GiB, unless this comes
 * before any other #include or it is compiled with -D_FILE_OFFSET_BITS=64. A complete example:
 *
 *     int main(int argc, char **argv) {
 *         st_file file;
 *         st_error error;
 *         size_t i;
 *         if (st_open_checkpoint(&file, argc > 1 ? argv[1] : ".", &error) != ST_OK) {
 *             fprintf(stderr, "%s\n", error.message);
 *             return 1;
 *         }
 *         for (i = 0; i < file.count; i++)
 *             printf("%s %s %lu bytes\n", file.tensor[i].name, st_dtype_name(file.tensor[i].dtype),
 *                    (unsigned long)file.tensor[i].bytes);
 *         st_close(&file);
 *         return 0;
 *     }
 *
 * Options, defined before the #include of the implementation:
 *   ST_MALLOC(bytes), ST_FREE(pointer)  the allocator (malloc, free); both are always used together
 *   ST_NO_MMAP                          read files into memory instead of mapping them
 *   ST_NO_POSIX                         use only the C library (the default where POSIX is not to be had):
 *                                       nothing is mapped, and st_write replaces a file in two steps
 *   ST_NO_JSON_IMPLEMENTATION           json.h is implemented in another file of the program
 *   ST_BIG_ENDIAN                       0 or 1: the byte order of the host (otherwise found at run time)
 *
 * What is checked, in this order: the length of the header; its JSON and UTF-8; no name twice; for every
 * tensor its name, the presence of dtype, shape and data_offsets (other keys are ignored), the rank, products
 * of dimensions that do not overflow, and shape x dtype = end - begin; then that the tensors cover the data
 * exactly: first begin 0, no gap, no overlap, last end = end of the file. A dtype that is not known here is
 * ST_OTHER: its tensor has the bytes that its offsets give, which nothing checks against its shape.
 *
 * When the file is shorter than its (consistent) header says, the code is ST_ERR_TRUNC if at least one
 * whole tensor is there: the file was cut. Otherwise it is ST_ERR_MISMATCH: header and data are strangers.
 *
 * Contract
 *   Ownership: everything reachable from an st_file belongs to it and lives until st_close. Buffers and
 *     strings given to a call stay the caller's; only st_parse keeps its buffer, see there.
 *   Errors: an st_result, never an abort. On an error the st_file is left closed and `error`, which may
 *     always be NULL, holds one line that names the file and the tensor.
 *   Data: in the byte order of the host. On a little-endian host it is the file itself; on a big-endian
 *     one it is a copy with its elements swapped (but those of ST_OTHER). An address is only as aligned as the file makes it
 *     (st_write aligns the start of the data to 8): read elements with memcpy where that matters.
 *   Threads: no global state. One thread opens and closes; in between any number may read.
 *   Changing files: the length is taken once, and a file that has another one when opening ends is
 *     ST_ERR_IO. A mapped file that is cut later raises SIGBUS on access: that is how mmap works, so
 *     replace files by rename (st_write does) or use ST_NO_MMAP. */
#if defined(SAFETENSORS_IMPLEMENTATION) && !defined(STI_IMPLEMENTED) && !defined(ST_NO_POSIX) &&                     \
    (defined(__unix__) || defined(__APPLE__))
#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_XOPEN_SOURCE) && !defined(_DEFAULT_SOURCE) && \
    !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64 /* files above 2 GiB also where off_t has 32 bits otherwise */
#endif
#endif

#if defined(SAFETENSORS_IMPLEMENTATION) && !defined(ST_NO_JSON_IMPLEMENTATION) && !defined(JSON_IMPLEMENTATION)
#define JSON_IMPLEMENTATION
#endif
#include "json.h"

#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ST_MAX_RANK 8           /* dimensions of a tensor */
#define ST_MAX_NAME 256         /* bytes of a tensor's or shard's name with its NUL */
#define ST_MAX_HEADER 100000000 /* bytes of a header, and of an index file */
#define ST_MAX_SHARDS 4096      /* files of one checkpoint */

typedef JSON_ENUM(st_result) {
    ST_OK = 0,
    ST_ERR_IO = -1,          /* the system refused to open, read or write, or it is no regular file */
    ST_ERR_TRUNC = -2,       /* the file ends too early */
    ST_ERR_FORMAT = -3,      /* not the format: bad JSON, a wrong type of value, a name twice */
    ST_ERR_LIMIT = -4,       /* beyond one of the limits above, or JSON nested too deep */
    ST_ERR_OVERFLOW = -5,    /* a size that does not fit 64 bits or the size_t of this machine */
    ST_ERR_MISMATCH = -6,    /* shape, offsets and file length contradict each other */
    ST_ERR_UNSUPPORTED = -7, /* a dtype that is no name */
    ST_ERR_MISSING = -8,     /* a file, a key or a listed tensor does not exist */
    ST_ERR_NOMEM = -9,       /* out of memory */
    ST_ERR_ARG = -10         /* the call itself is wrong */
} st_result;

typedef JSON_ENUM(st_dtype) {
    ST_BOOL,
    ST_U8,
    ST_I8,
    ST_U16,
    ST_I16,
    ST_F16,
    ST_BF16,
    ST_U32,
    ST_I32,
    ST_F32,
    ST_U64,
    ST_I64,
    ST_F64,
    ST_F8_E4M3,
    ST_F8_E5M2,
    ST_OTHER /* any other name; read only. Its elements have no size here */
} st_dtype;

typedef struct st_tensor {
    const char *name; /* NUL-terminated UTF-8, 1 to ST_MAX_NAME - 1 bytes; owned by the file */
    st_dtype dtype;
    int rank;                    /* 0 to ST_MAX_RANK; a rank of 0 is a single element */
    uint64_t shape[ST_MAX_RANK]; /* the first `rank` are set, the slowest one first; the rest are 0 */
    const void *data;            /* `bytes` bytes, rows one after another; owned by the file */
    size_t bytes;                /* the product of the shape times st_dtype_bytes(dtype); may be 0. ST_OTHER: any */
    int shard;                   /* which file it came from, 0 to shards - 1 */
    const char *type;            /* the name of dtype as the file has it, also of ST_OTHER; not read by st_write */
} st_tensor;

typedef struct st_error {
    st_result code;
    char message[512]; /* one line without its newline; "" after success */
} st_error;

/* An open file or checkpoint. Declare one and pass it to an opening call, which sets all of it. The fields
 * are for reading; those that begin with sti_ are private. */
typedef struct st_file {
    size_t count;                /* tensors */
    const st_tensor *tensor;     /* [count], sorted by name (as by strcmp) */
    size_t metadata_count;       /* entries of the __metadata__ of the first shard */
    const char *const *metadata; /* [2 * metadata_count] key, value, key, value, ... */
    int shards;                  /* files, those that the index lists and that are absent included */
    char warning[256];           /* "" or one line: odd, but no reason to refuse the checkpoint */

    struct sti_shard *sti_shard;
    st_tensor *sti_tensor;
    const char **sti_metadata;
    size_t sti_capacity;
} st_file;

/* Opens one file. `path` is only used during the call. */
st_result st_open(st_file *file, const char *path, st_error *error);

/* Opens directory/model.safetensors or, if that does not exist, the shards that
 * directory/model.safetensors.index.json lists. A shard must be a plain file name in that directory, and no
 * tensor may be in two shards. These set file->warning, which names the first of them: listed tensors that are
 * not in the shard they are listed for, or whose shard does not exist (a caller who needs one will miss it);
 * tensors that are in a listed shard but not in the index, which are kept; a wrong total_size. */
st_result st_open_checkpoint(st_file *file, const char *directory, st_error *error);

/* Reads a file that is in memory: [length] bytes, any alignment, borrowed until st_close (a big-endian
 * host copies the data). `label` stands for the path in messages; NULL is allowed. */
st_result st_parse(st_file *file, const void *bytes, size_t length, const char *label, st_error *error);

/* Releases everything. Safe on a zeroed or failed st_file, on a closed one, and on NULL. */
void st_close(st_file *file);

/* The tensor of that name, or NULL. Takes O(log count) comparisons. */
const st_tensor *st_find(const st_file *file, const char *name);

/* The value of that key in __metadata__ (of the first shard), or NULL. */
const char *st_metadata(const st_file *file, const char *key);

/* Bytes of one element, 0 for a value outside the enum; the name as in files, "?" outside the enum; a
 * short English name of a result. The strings are constants. */
size_t st_dtype_bytes(st_dtype dtype);
const char *st_dtype_name(st_dtype dtype);
const char *st_result_string(st_result result);

/* Writes a file: the tensors in the order given, without gaps, after a header padded to 8 bytes. Put
 * larger elements first if every tensor is to be aligned to its element.
 *   tensors         [count]; name, dtype, rank, shape, data and bytes are read, data in host byte order
 *   metadata_pairs  key, value, key, value, ..., NULL; or NULL for none
 * The bytes go to a new file PATH.PROCESS-NUMBER.tmp (ST_NO_POSIX: PATH.tmp), are synced, and are then renamed
 * to PATH, so that a reader sees the old file or the new one and never half of one, and writers are not in each
 * other's way. Where PATH is a link to a file, or to nothing yet, all this happens to that file, and the link stays.
 * On an error the new file is removed and PATH is untouched. Whatever st_open would refuse is
 * refused here, with the same code; so is ST_OTHER. A file beyond the process's limit (ulimit -f) is an error like a full
 * disk in a program that ignores SIGXFSZ, which else ends it in the middle. */
st_result st_write(const char *path, const st_tensor *tensors, size_t count, const char *const *metadata_pairs,
                   st_error *error);

/* The same for tensors that are not in memory. The data fields are not looked at: `make` is called once for each
 * tensor, in their order, and hands its elements to st_put, piece by piece, whole elements in host byte order, until
 * all of the tensor's bytes are there. It returns ST_OK, or the code with which to give up, after filling *error. */
typedef struct st_sink st_sink;
typedef st_result (*st_make)(void *user, size_t index, st_sink *sink, st_error *error);
st_result st_write_made(const char *path, const st_tensor *tensors, size_t count, const char *const *metadata_pairs,
                        st_make make, void *user, st_error *error);
/* Next `bytes` bytes of the tensor being made. ST_ERR_IO: return that, st_write_made then fills in the error. */
st_result st_put(st_sink *sink, const void *data, size_t bytes);

/* Replaces any file by these bytes, in the same way: a new file, sync, rename. */
st_result st_write_bytes(const char *path, const void *bytes, size_t length, st_error *error);

#ifdef __cplusplus
}
#endif
#endif /* SAFETENSORS_H */

#if defined(SAFETENSORS_IMPLEMENTATION) && !defined(STI_IMPLEMENTED)
#define STI_IMPLEMENTED

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(ST_NO_POSIX) && (defined(__unix__) || defined(__APPLE__))
#define STI_POSIX
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
#ifndef ST_NO_MMAP
#include <sys/mman.h>
#endif
#if !defined(__USE_XOPEN2K) && !defined(__cplusplus)
/* hidden where a system header came before _POSIX_C_SOURCE */
int lstat(const char *path, struct stat *status);
ssize_t readlink(const char *path, char *to, size_t size);
#endif
#endif

#ifdef _WIN32 /* from <windows.h>, which need not be here */
#ifdef __cplusplus
extern "C"
#endif
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to, unsigned long how);
#endif

#ifndef ST_MALLOC
#define ST_MALLOC(bytes) malloc(bytes)
#define ST_FREE(pointer) free(pointer)
#endif

#ifndef ST_BIG_ENDIAN
#define ST_BIG_ENDIAN sti_host_is_big_endian()
#endif

#if defined(__GNUC__)
#define STI_PRINTF(text, first) __attribute__((__format__(__printf__, text, first)))
#else
#define STI_PRINTF(text, first)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define STI_ULL(x) ((unsigned long long)(x)) /* for %llu */

/* ---- errors, memory, order ------------------------------------------------------------------------- */

/* Fills *error (if there is one) and returns its code. Names from a file can hold control characters;
 * they become '?' to keep the message on one line. */
static st_result sti_fail(st_error *error, st_result code, const char *format, ...) STI_PRINTF(3, 4);
static st_result sti_fail(st_error *error, st_result code, const char *format, ...) {
    va_list list;
    size_t i;
    if (!error) return code;
    error->code = code;
    va_start(list, format);
    if (vsnprintf(error->message, sizeof error->message, format, list) < 0) error->message[0] = '\0';
    va_end(list);
    for (i = 0; error->message[i]; i++) {
        unsigned char c = (unsigned char)error->message[i];
        if (c < 0x20 || c == 0x7F) error->message[i] = '?';
    }
    return code;
}

static st_result sti_succeed(st_error *error) {
    if (!error) return ST_OK;
    error->code = ST_OK;
    error->message[0] = '\0';
    return ST_OK;
}

/* count * size bytes, or NULL with *error set. */
static void *sti_alloc(size_t count, size_t size, const char *what, const char *label, st_error *error) {
    void *memory = NULL;
    if (count == 0) count = 1; /* NULL only ever means failure */
    if (count <= (size_t)-1 / size) memory = ST_MALLOC(count * size);
    if (!memory)
        sti_fail(error, ST_ERR_NOMEM, "%.150s: out of memory for %s (%llu of %llu bytes)", label, what,
                 STI_ULL(count), STI_ULL(size));
    return memory;
}

static void sti_free(void *memory) {
    if (memory) ST_FREE(memory);
}

static int sti_multiply(uint64_t a, uint64_t b, uint64_t *product) {
    if (b && a > UINT64_MAX / b) return 0;
    *product = a * b;
    return 1;
}

/* Sorts order[n], a list of indices, with scratch[n]. A merge sort: no input makes it slow. */
typedef int (*sti_compare)(const void *context, size_t a, size_t b);
static void sti_sort(size_t *order, size_t *scratch, size_t n, sti_compare compare, const void *context) {
    size_t *from = order, *to = scratch, width, start, i;
    for (width = 1; width < n; width *= 2) {
        size_t *swap = from;
        for (start = 0; start < n; start += 2 * width) {
            size_t left = start, middle = n - start < width ? n : start + width;
            size_t right = middle, end = n - middle < width ? n : middle + width;
            for (i = start; i < end; i++) {
                int take_left = left < middle && (right == end || compare(context, from[left], from[right]) <= 0);
                to[i] = take_left ? from[left++] : from[right++];
            }
        }
        from = to;
        to = swap;
    }
    if (from != order) memcpy(order, from, n * sizeof *order);
}

static void sti_sort_all(size_t *order, size_t n, sti_compare compare, const void *context) {
    size_t i;
    for (i = 0; i < n; i++) order[i] = i;
    sti_sort(order, order + n, n, compare, context);
}

/* ---- element types and byte order ------------------------------------------------------------------ */

size_t st_dtype_bytes(st_dtype dtype) {
    switch (dtype) {
    case ST_BOOL:
    case ST_U8:
    case ST_I8:
    case ST_F8_E4M3:
    case ST_F8_E5M2: return 1;
    case ST_U16:
    case ST_I16:
    case ST_F16:
    case ST_BF16: return 2;
    case ST_U32:
    case ST_I32:
    case ST_F32: return 4;
    case ST_U64:
    case ST_I64:
    case ST_F64: return 8;
    case ST_OTHER:
    default: return 0;
    }
}

const char *st_dtype_name(st_dtype dtype) {
    switch (dtype) {
    case ST_BOOL: return "BOOL";
    case ST_U8: return "U8";
    case ST_I8: return "I8";
    case ST_U16: return "U16";
    case ST_I16: return "I16";
    case ST_F16: return "F16";
    case ST_BF16: return "BF16";
    case ST_U32: return "U32";
    case ST_I32: return "I32";
    case ST_F32: return "F32";
    case ST_U64: return "U64";
    case ST_I64: return "I64";
    case ST_F64: return "F64";
    case ST_F8_E4M3: return "F8_E4M3";
    case ST_F8_E5M2: return "F8_E5M2";
    case ST_OTHER:
    default: return "?";
    }
}

const char *st_result_string(st_result result) {
    switch (result) {
    case ST_OK: return "ok";
    case ST_ERR_IO: return "input or output failed";
    case ST_ERR_TRUNC: return "file ends too early";
    case ST_ERR_FORMAT: return "not in safetensors format";
    case ST_ERR_LIMIT: return "beyond a limit";
    case ST_ERR_OVERFLOW: return "size overflow";
    case ST_ERR_MISMATCH: return "sizes contradict each other";
    case ST_ERR_UNSUPPORTED: return "unsupported dtype";
    case ST_ERR_MISSING: return "missing";
    case ST_ERR_NOMEM: return "out of memory";
    case ST_ERR_ARG: return "bad argument";
    default: return "unknown result";
    }
}

static inline int sti_host_is_big_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 0;
}

/* Turns the bytes of each element around. */
static void sti_swap(unsigned char *data, size_t bytes, size_t size) {
    size_t at, i;
    if (size < 2) return;
    for (at = 0; at + size <= bytes; at += size) {
        for (i = 0; i < size / 2; i++) {
            unsigned char byte = data[at + i];
            data[at + i] = data[at + size - 1 - i];
            data[at + size - 1 - i] = byte;
        }
    }
}

/* ---- sources: a file to read from ------------------------------------------------------------------ */

/* What an open file holds on to. */
typedef struct sti_shard {
    unsigned char *owned; /* the data, if it was read or copied */
    void *map;            /* the whole file, if it is mapped */
    size_t map_bytes;
    char *strings; /* names and metadata */
} sti_shard;

/* Why the last call of the system failed; or the word for it that is given. */
static const char *sti_reason(const char *word) {
#ifdef STI_POSIX
    if ((errno == EOVERFLOW || errno == EFBIG) && sizeof(off_t) < sizeof(uint64_t))
        return "too large for a program compiled without -D_FILE_OFFSET_BITS=64";
#endif
    return word ? word : strerror(errno);
}

typedef struct sti_source {
    const char *path;
    uint64_t length; /* taken once, when opened */
#ifdef STI_POSIX
    int handle;
#else
    FILE *handle;
#endif
} sti_source;

#ifdef STI_POSIX

static void sti_source_close(sti_source *s) { close(s->handle); }

static int sti_source_length(sti_source *s, uint64_t *length) {
    struct stat status;
    memset(&status, 0, sizeof status);
    if (fstat(s->handle, &status) != 0 || !S_ISREG(status.st_mode)) return 0;
    *length = (uint64_t)status.st_size;
    return 1;
}

/* open, whose file no program inherits that this one starts. */
static int sti_open(const char *path, int flags) {
    int handle;
#ifdef O_CLOEXEC
    flags |= O_CLOEXEC;
#endif
    do handle = open(path, flags, 0666);
    while (handle < 0 && errno == EINTR);
#ifndef O_CLOEXEC
    if (handle >= 0) (void)fcntl(handle, F_SETFD, FD_CLOEXEC);
#endif
    return handle;
}

static int sti_source_start(sti_source *s, const char *path) {
    /* O_NONBLOCK: opening a FIFO that nobody writes to must not wait. Regular files do not care. */
    s->handle = sti_open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
    return s->handle >= 0;
}

/* Reads the next bytes; 0 if they are not all there. */
static int sti_source_take(sti_source *s, unsigned char *to, size_t bytes) {
    while (bytes) {
        size_t part = bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30; /* some systems cap one read */
        ssize_t got = read(s->handle, to, part);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            if (got == 0) errno = 0;
            return 0;
        }
        to += got;
        bytes -= (size_t)got;
    }
    return 1;
}

#else /* the C library alone */

#ifdef _WIN32
#define STI_SEEK _fseeki64
#define STI_TELL _ftelli64
#else
#define STI_SEEK fseek
#define STI_TELL ftell
#endif

static void sti_source_close(sti_source *s) { fclose(s->handle); }

/* Leaves the position alone. */
static int sti_source_length(sti_source *s, uint64_t *length) {
    long long end, here = STI_TELL(s->handle);
    if (here < 0 || STI_SEEK(s->handle, 0, SEEK_END) != 0) return 0;
    end = STI_TELL(s->handle);
    if (end < 0 || STI_SEEK(s->handle, 0, SEEK_SET) != 0) return 0;
#ifdef _WIN32
    if (STI_SEEK(s->handle, here, SEEK_SET) != 0) return 0;
#else
    if (STI_SEEK(s->handle, (long)here, SEEK_SET) != 0) return 0;
#endif
    *length = (uint64_t)end;
    return 1;
}

static int sti_source_start(sti_source *s, const char *path) {
    s->handle = fopen(path, "rb");
    return s->handle != NULL;
}

static int sti_source_take(sti_source *s, unsigned char *to, size_t bytes) {
    errno = 0;
    return fread(to, 1, bytes, s->handle) == bytes;
}

#endif

/* A name that is there and leads nowhere. */
static int sti_is_dangling(const char *path) {
#ifdef STI_POSIX
    struct stat status;
    return lstat(path, &status) == 0 && S_ISLNK(status.st_mode);
#else
    (void)path;
    return 0;
#endif
}

/* ST_ERR_MISSING only if the file does not exist. */
static st_result sti_source_open(sti_source *s, const char *path, st_error *error) {
    s->path = path;
    s->length = 0;
    errno = 0;
    if (!sti_source_start(s, path)) {
        int absent = errno == ENOENT;
        if (absent && sti_is_dangling(path))
            return sti_fail(error, ST_ERR_IO, "%.300s: is a link to a file that does not exist", path);
        return sti_fail(error, absent ? ST_ERR_MISSING : ST_ERR_IO, "%.300s: cannot open: %s", path, sti_reason(NULL));
    }
    errno = 0;
    if (sti_source_length(s, &s->length)) return ST_OK;
    sti_fail(error, ST_ERR_IO, "%.300s: %s", path, sti_reason("not a regular file"));
    sti_source_close(s);
    return ST_ERR_IO;
}

static st_result sti_source_read(sti_source *s, void *to, size_t bytes, st_error *error) {
    if (sti_source_take(s, (unsigned char *)to, bytes)) return ST_OK;
    return sti_fail(error, ST_ERR_IO, "%.300s: cannot read: %s", s->path,
                    errno ? sti_reason(NULL) : "the file became shorter");
}

/* A file that was cut while it was being opened would be read or mapped past its end. */
static st_result sti_source_check_unchanged(sti_source *s, st_error *error) {
    uint64_t length = 0;
    if (sti_source_length(s, &length) && length == s->length) return ST_OK;
    return sti_fail(error, ST_ERR_IO, "%.300s: changed from %llu to %llu bytes while it was opened", s->path,
                    STI_ULL(s->length), STI_ULL(length));
}

/* Maps the whole file; 0 if that is not possible and the file has to be read. */
static int sti_source_map(sti_source *s, sti_shard *shard) {
#if defined(STI_POSIX) && !defined(ST_NO_MMAP)
    void *map;
    if (ST_BIG_ENDIAN) return 0;
    map = mmap(NULL, (size_t)s->length, PROT_READ, MAP_PRIVATE, s->handle, 0);
    if (map == MAP_FAILED) return 0;
    shard->map = map;
    shard->map_bytes = (size_t)s->length;
    return 1;
#else
    (void)s, (void)shard;
    return 0;
#endif
}

/* Reads a whole text file into new memory. */
static st_result sti_source_text(sti_source *s, char **text, size_t *length, st_error *error) {
    if (s->length > ST_MAX_HEADER)
        return sti_fail(error, ST_ERR_LIMIT, "%.300s: %llu bytes, at most %d are read", s->path, STI_ULL(s->length),
                        ST_MAX_HEADER);
    *length = (size_t)s->length;
    *text = (char *)sti_alloc(*length, 1, "the text", s->path, error);
    return *text ? sti_source_read(s, *text, *length, error) : ST_ERR_NOMEM;
}

/* ---- one header ------------------------------------------------------------------------------------ */

typedef struct sti_range {
    uint64_t begin, end;
} sti_range;

/* The reading of one header. The tensors go to file->sti_tensor[first .. first + count - 1]. */
typedef struct sti_job {
    st_file *file;
    st_error *error;
    const char *label;
    int shard;
    const char *text; /* the JSON, borrowed */
    size_t text_bytes;
    uint64_t data_bytes; /* what follows it in the file */

    json_token *token;
    json_document doc;
    size_t first, count;
    sti_range *range; /* [count] */
    size_t *order;    /* [2 * count] */
    char *string;     /* where the next name goes, inside the shard's strings */
} sti_job;

/* Parses JSON into new tokens. */
static st_result sti_tokenize(const char *text, size_t length, json_token **token, json_document *doc,
                              const char *label, st_error *error) {
    size_t count = 0, at = 0;
    json_result result = json_parse(text, length, NULL, 0, &count, &at);
    if (result == JSON_OK) {
        *token = (json_token *)sti_alloc(count, sizeof **token, "JSON tokens", label, error);
        if (!*token) return ST_ERR_NOMEM;
        result = json_parse(text, length, *token, count, &count, &at);
    }
    if (result != JSON_OK)
        return sti_fail(error, result == JSON_ERR_LIMIT ? ST_ERR_LIMIT : ST_ERR_FORMAT,
                        "%.150s: byte %llu of the JSON: %s%s", label, STI_ULL(at), json_result_string(result),
                        result == JSON_ERR_FORMAT ? " or a repeated name" : "");
    doc->text = text;
    doc->length = length;
    doc->token = *token;
    doc->count = count;
    return ST_OK;
}

/* Room for the string of this token with its NUL. */
static size_t sti_string_room(const json_document *doc, size_t token) {
    return doc->token[token].end - doc->token[token].start + 1;
}

/* Decodes a string to *to and moves *to behind it. */
static json_result sti_take_string(const json_document *doc, size_t token, char **to, const char **string) {
    size_t length = 0;
    json_result result = JSON_ERR_TYPE; /* there is only room for strings */
    if (doc->token[token].type == JSON_STRING)
        result = json_string(doc, token, *to, sti_string_room(doc, token), &length);
    if (result != JSON_OK) return result;
    *string = *to;
    *to += length + 1;
    return JSON_OK;
}

/* Room for more tensors at the end of the file's array. */
static st_result sti_reserve(sti_job *job) {
    st_file *file = job->file;
    st_tensor *larger;
    size_t capacity = file->sti_capacity;
    if (file->sti_tensor && capacity - file->count >= job->count) return ST_OK;
    capacity = capacity > job->count ? 2 * capacity : file->count + job->count;
    larger = (st_tensor *)sti_alloc(capacity, sizeof *larger, "the tensors", job->label, job->error);
    if (!larger) return ST_ERR_NOMEM;
    if (file->count) memcpy(larger, file->sti_tensor, file->count * sizeof *larger);
    sti_free(file->sti_tensor);
    file->sti_tensor = larger;
    file->sti_capacity = capacity;
    return ST_OK;
}

static int sti_is_metadata(const json_document *doc, size_t key) { return json_equal(doc, key, "__metadata__"); }

/* Counts the tensors and allocates for them and for all strings. */
static st_result sti_prepare(sti_job *job) {
    const json_document *doc = &job->doc;
    sti_shard *shard = &job->file->sti_shard[job->shard];
    size_t key, i, room = 0;
    for (key = 1; key < doc->count; key = doc->token[key + 1].next) {
        if (!sti_is_metadata(doc, key)) {
            job->count++;
            room += sti_string_room(doc, key);
            if (doc->token[key + 1].type == JSON_OBJECT && json_find(doc, key + 1, "dtype", &i) == JSON_OK)
                room += sti_string_room(doc, i);
            continue;
        }
        for (i = key + 2; i < doc->token[key + 1].next; i = doc->token[i].next)
            if (doc->token[i].type == JSON_STRING) room += sti_string_room(doc, i);
    }
    shard->strings = (char *)sti_alloc(room, 1, "names", job->label, job->error);
    if (!shard->strings) return ST_ERR_NOMEM;
    job->string = shard->strings;
    job->range = (sti_range *)sti_alloc(job->count, sizeof *job->range, "offsets", job->label, job->error);
    if (!job->range) return ST_ERR_NOMEM;
    job->order = (size_t *)sti_alloc(job->count, 2 * sizeof *job->order, "sorting", job->label, job->error);
    if (!job->order) return ST_ERR_NOMEM;
    return sti_reserve(job);
}

/* __metadata__: an object of strings. Only the first shard's is kept. */
static st_result sti_read_metadata(sti_job *job, size_t object) {
    const json_document *doc = &job->doc;
    const json_token *t = &doc->token[object];
    const char **pair;
    size_t i, n = 0;
    if (t->type != JSON_OBJECT)
        return sti_fail(job->error, ST_ERR_FORMAT, "%.150s: __metadata__ is not an object", job->label);
    pair = (const char **)sti_alloc(t->size, 2 * sizeof *pair, "metadata", job->label, job->error);
    if (!pair) return ST_ERR_NOMEM;
    for (i = object + 1; i < t->next; i = doc->token[i].next, n++) {
        if (sti_take_string(doc, i, &job->string, &pair[n]) != JSON_OK) {
            sti_free((void *)pair);
            return sti_fail(job->error, ST_ERR_FORMAT,
                            "%.150s: __metadata__ has a value that is not a string, or a NUL", job->label);
        }
    }
    if (job->shard == 0) {
        job->file->metadata_count = t->size;
        job->file->metadata = job->file->sti_metadata = pair;
    } else {
        sti_free((void *)pair);
    }
    return ST_OK;
}

static st_result sti_read_name(sti_job *job, size_t key, const char **name) {
    json_result result = sti_take_string(&job->doc, key, &job->string, name);
    if (result == JSON_OK && **name && strlen(*name) < ST_MAX_NAME) return ST_OK;
    return sti_fail(job->error, ST_ERR_LIMIT, "%.150s: byte %llu of the header: a tensor's name %s", job->label,
                    STI_ULL(job->doc.token[key].start),
                    result != JSON_OK ? "contains a NUL"
                    : **name          ? "is too long"
                                      : "is empty");
}

/* A required member of a tensor's entry. */
static st_result sti_member(sti_job *job, const st_tensor *tensor, size_t entry, const char *key, size_t *value) {
    if (json_find(&job->doc, entry, key, value) == JSON_OK) return ST_OK;
    return sti_fail(job->error, ST_ERR_MISSING, "%.150s: tensor \"%.200s\" has no %s", job->label, tensor->name, key);
}

static st_result sti_read_dtype(sti_job *job, st_tensor *tensor, size_t value) {
    int i;
    for (i = ST_BOOL; i <= ST_F8_E5M2; i++) {
        if (json_equal(&job->doc, value, st_dtype_name((st_dtype)i))) {
            tensor->dtype = (st_dtype)i;
            tensor->type = st_dtype_name((st_dtype)i);
            return ST_OK;
        }
    }
    tensor->dtype = ST_OTHER;
    if (sti_take_string(&job->doc, value, &job->string, &tensor->type) == JSON_OK && *tensor->type) return ST_OK;
    return sti_fail(job->error, ST_ERR_UNSUPPORTED, "%.150s: tensor \"%.200s\": its dtype is not the name of one",
                    job->label, tensor->name);
}

static st_result sti_read_shape(sti_job *job, st_tensor *tensor, size_t value) {
    const json_token *t = &job->doc.token[value];
    size_t i;
    if (t->type != JSON_ARRAY)
        return sti_fail(job->error, ST_ERR_FORMAT, "%.150s: tensor \"%.200s\": shape is not an array", job->label,
                        tensor->name);
    if (t->size > ST_MAX_RANK)
        return sti_fail(job->error, ST_ERR_LIMIT, "%.150s: tensor \"%.200s\" has %llu dimensions, at most %d",
                        job->label, tensor->name, STI_ULL(t->size), ST_MAX_RANK);
    tensor->rank = (int)t->size;
    for (i = 0; i < t->size; i++) /* numbers have one token each; anything else is refused at once */
        if (json_uint(&job->doc, value + 1 + i, &tensor->shape[i]) != JSON_OK)
            return sti_fail(job->error, ST_ERR_FORMAT,
                            "%.150s: tensor \"%.200s\": dimension %llu is not a whole number of 64 bits", job->label,
                            tensor->name, STI_ULL(i));
    return ST_OK;
}

static st_result sti_read_offsets(sti_job *job, const st_tensor *tensor, size_t value, sti_range *range) {
    const json_token *t = &job->doc.token[value];
    if (t->type == JSON_ARRAY && t->size == 2 && json_uint(&job->doc, value + 1, &range->begin) == JSON_OK &&
        json_uint(&job->doc, value + 2, &range->end) == JSON_OK)
        return ST_OK;
    return sti_fail(job->error, ST_ERR_FORMAT, "%.150s: tensor \"%.200s\": data_offsets is not two whole numbers",
                    job->label, tensor->name);
}

/* Shape times element size; it must fit this machine and equal the range. Dimensions of 0 are left out of
 * the products, so that no product a caller may form of some of the dimensions can overflow. */
static st_result sti_check_size(sti_job *job, st_tensor *tensor, const sti_range *range) {
    uint64_t bytes = tensor->dtype == ST_OTHER ? 1 : st_dtype_bytes(tensor->dtype);
    int i, fits = 1, empty = 0;
    for (i = 0; i < tensor->rank; i++) {
        if (tensor->shape[i] == 0)
            empty = 1;
        else
            fits = fits && sti_multiply(bytes, tensor->shape[i], &bytes);
    }
    if (!fits || bytes > (size_t)-1)
        return sti_fail(job->error, ST_ERR_OVERFLOW, "%.150s: tensor \"%.200s\": the size of its shape overflows",
                        job->label, tensor->name);
    if (empty) bytes = 0;
    if (tensor->dtype == ST_OTHER && range->end >= range->begin) bytes = range->end - range->begin;
    if (range->end < range->begin)
        return sti_fail(job->error, ST_ERR_MISMATCH,
                        "%.150s: tensor \"%.200s\" ends at %llu before it begins at %llu", job->label, tensor->name,
                        STI_ULL(range->end), STI_ULL(range->begin));
    if (bytes > (size_t)-1 || range->end - range->begin != bytes)
        return sti_fail(job->error, ST_ERR_MISMATCH,
                        "%.150s: tensor \"%.200s\": shape and dtype need %llu bytes, data_offsets give %llu",
                        job->label, tensor->name, STI_ULL(bytes), STI_ULL(range->end - range->begin));
    tensor->bytes = (size_t)bytes;
    return ST_OK;
}

static st_result sti_read_tensor(sti_job *job, size_t key, st_tensor *tensor, sti_range *range) {
    size_t dtype = 0, shape = 0, offsets = 0;
    st_result result;
    memset(tensor, 0, sizeof *tensor);
    tensor->shard = job->shard;
    result = sti_read_name(job, key, &tensor->name);
    if (result != ST_OK) return result;
    if (job->doc.token[key + 1].type != JSON_OBJECT)
        return sti_fail(job->error, ST_ERR_FORMAT, "%.150s: tensor \"%.200s\": its entry is not an object",
                        job->label, tensor->name);
    result = sti_member(job, tensor, key + 1, "dtype", &dtype);
    if (result == ST_OK) result = sti_member(job, tensor, key + 1, "shape", &shape);
    if (result == ST_OK) result = sti_member(job, tensor, key + 1, "data_offsets", &offsets);
    if (result == ST_OK) result = sti_read_dtype(job, tensor, dtype);
    if (result == ST_OK) result = sti_read_shape(job, tensor, shape);
    if (result == ST_OK) result = sti_read_offsets(job, tensor, offsets, range);
    if (result == ST_OK) result = sti_check_size(job, tensor, range);
    return result;
}

static int sti_compare_ranges(const void *context, size_t a, size_t b) {
    const sti_range *range = (const sti_range *)context;
    const sti_range *x = &range[a], *y = &range[b];
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end; /* an empty tensor goes before the one it touches */
}

/* The ranges must follow one another without gap or overlap from 0 to the end of the data. */
static st_result sti_check_coverage(sti_job *job) {
    const st_tensor *tensor = job->file->sti_tensor + job->first;
    uint64_t at = 0;
    size_t i;
    int any_whole = 0;
    sti_sort_all(job->order, job->count, sti_compare_ranges, job->range);
    for (i = 0; i < job->count; i++) {
        const sti_range *r = &job->range[job->order[i]];
        if (r->begin != at)
            return sti_fail(job->error, ST_ERR_MISMATCH,
                            "%.150s: tensor \"%.200s\" begins at %llu, expected %llu (%s)", job->label,
                            tensor[job->order[i]].name, STI_ULL(r->begin), STI_ULL(at),
                            r->begin > at ? "a gap" : "an overlap");
        at = r->end;
        if (r->end > r->begin && r->end <= job->data_bytes) any_whole = 1;
    }
    if (at == job->data_bytes) return ST_OK;
    return sti_fail(job->error, at > job->data_bytes && any_whole ? ST_ERR_TRUNC : ST_ERR_MISMATCH,
                    "%.150s: the tensors need %llu bytes of data, the file has %llu", job->label, STI_ULL(at),
                    STI_ULL(job->data_bytes));
}

/* Everything but the data pointers. */
static st_result sti_read_header(sti_job *job) {
    size_t key, i = 0;
    st_result result;
    if (job->text[0] != '{')
        return sti_fail(job->error, ST_ERR_FORMAT, "%.300s: the header does not begin with '{'", job->label);
    result = sti_tokenize(job->text, job->text_bytes, &job->token, &job->doc, job->label, job->error);
    if (result == ST_OK) result = sti_prepare(job);
    if (result != ST_OK) return result;
    for (key = 1; key < job->doc.count; key = job->token[key + 1].next) {
        if (sti_is_metadata(&job->doc, key)) {
            result = sti_read_metadata(job, key + 1);
        } else {
            result = sti_read_tensor(job, key, &job->file->sti_tensor[job->first + i], &job->range[i]);
            i++;
        }
        if (result != ST_OK) return result;
    }
    return sti_check_coverage(job);
}

static void sti_job_begin(sti_job *job, st_file *file, int shard, const char *label, st_error *error) {
    memset(job, 0, sizeof *job);
    job->file = file;
    job->error = error;
    job->label = label;
    job->shard = shard;
    job->first = file->count;
}

static void sti_job_end(sti_job *job) {
    sti_free(job->token);
    sti_free(job->range);
    sti_free(job->order);
}

/* Points the tensors into the data, which is the shard's own copy where elements have to be swapped. */
static void sti_attach(sti_job *job, const unsigned char *data) {
    unsigned char *owned = job->file->sti_shard[job->shard].owned;
    size_t i;
    for (i = 0; i < job->count; i++) {
        st_tensor *tensor = &job->file->sti_tensor[job->first + i];
        size_t begin = (size_t)job->range[i].begin;
        tensor->data = data + begin;
        if (ST_BIG_ENDIAN) sti_swap(owned + begin, tensor->bytes, st_dtype_bytes(tensor->dtype));
    }
    job->file->count += job->count;
}

/* What a file is that does not even begin as one of these, or NULL: it is as far as can be seen. */
static const char *sti_stranger(const unsigned char *first, size_t n) {
    static const char begins[7][24] = {
        "version https://git-lfs", "<!DOCTYPE", "<!doctype", "<html", "<?xml", "GGUF", "PK\003\004"};
    static const char words[4][72] = {"is a pointer of Git LFS, not the file itself: git lfs pull gets it",
                                      "is a page of HTML or XML, as a failed download leaves it", "is a GGUF file",
                                      "is a ZIP archive, as PyTorch writes them"};
    size_t i;
    for (i = 0; i < 7; i++) {
        size_t length = strlen(begins[i]) < 8 ? strlen(begins[i]) : 8;
        if (n >= length && memcmp(first, begins[i], length) == 0) return words[i == 0 ? 0 : i < 5 ? 1 : i - 3];
    }
    return NULL;
}

/* The first 8 bytes: the length of the header, which must lie within the file. */
static st_result sti_header_length(const unsigned char first[8], uint64_t file_bytes, uint64_t *length,
                                   const char *label, st_error *error) {
    uint64_t n = 0;
    int i;
    if (sti_stranger(first, 8)) return sti_fail(error, ST_ERR_FORMAT, "%.300s: %s", label, sti_stranger(first, 8));
    for (i = 7; i >= 0; i--) n = n << 8 | first[i];
    if (n > ST_MAX_HEADER)
        return sti_fail(error, ST_ERR_LIMIT, "%.300s: a header of %llu bytes, at most %d are read", label, STI_ULL(n),
                        ST_MAX_HEADER);
    if (n == 0) return sti_fail(error, ST_ERR_FORMAT, "%.300s: the header is empty", label);
    if (n > file_bytes - 8)
        return sti_fail(error, ST_ERR_TRUNC, "%.300s: a header of %llu bytes in a file of %llu", label, STI_ULL(n),
                        STI_ULL(file_bytes));
    *length = n;
    return ST_OK;
}

static st_result sti_too_short(uint64_t file_bytes, const char *label, st_error *error) {
    return sti_fail(error, ST_ERR_TRUNC, "%.300s: %llu bytes, a file has 8 or more", label, STI_ULL(file_bytes));
}

/* ---- opening --------------------------------------------------------------------------------------- */

/* Clears the file and makes room for its shards. */
static st_result sti_begin(st_file *file, int shards, const char *label, st_error *error) {
    memset(file, 0, sizeof *file);
    file->sti_shard = (sti_shard *)sti_alloc((size_t)shards, sizeof(sti_shard), "shards", label, error);
    if (!file->sti_shard) return ST_ERR_NOMEM;
    memset(file->sti_shard, 0, (size_t)shards * sizeof(sti_shard));
    file->shards = shards;
    return ST_OK;
}

static int sti_compare_names(const void *context, size_t a, size_t b) {
    const st_tensor *tensor = (const st_tensor *)context;
    return strcmp(tensor[a].name, tensor[b].name);
}

/* Puts the tensors of all shards into the order of their names. */
static st_result sti_order_by_name(st_file *file, const char *label, st_error *error) {
    st_result result = ST_OK;
    st_tensor *sorted = NULL;
    size_t i, n = file->count;
    size_t *order = (size_t *)sti_alloc(n, 2 * sizeof *order, "sorting", label, error);
    if (order) sorted = (st_tensor *)sti_alloc(n, sizeof *sorted, "the tensors", label, error);
    if (!sorted) {
        sti_free(order);
        return ST_ERR_NOMEM;
    }
    sti_sort_all(order, n, sti_compare_names, file->sti_tensor);
    for (i = 0; i < n; i++) sorted[i] = file->sti_tensor[order[i]];
    sti_free(order);
    sti_free(file->sti_tensor);
    file->tensor = file->sti_tensor = sorted;
    file->sti_capacity = n;
    for (i = 1; i < n && result == ST_OK; i++)
        if (strcmp(sorted[i - 1].name, sorted[i].name) == 0)
            result =
                sti_fail(error, ST_ERR_FORMAT, "%.150s: tensor \"%.200s\" is in two shards", label, sorted[i].name);
    return result;
}

/* The last step of every opening call: all or nothing. */
static st_result sti_finish(st_file *file, st_result result, st_error *error) {
    if (result == ST_OK) return sti_succeed(error);
    st_close(file);
    return result;
}

/* Maps or reads the data of a shard whose header is good. */
static st_result sti_load_data(sti_job *job, sti_source *source) {
    sti_shard *shard = &job->file->sti_shard[job->shard];
    size_t bytes = (size_t)job->data_bytes;
    st_result result = ST_OK;
    const unsigned char *data;
    if (sti_source_map(source, shard)) {
        data = (const unsigned char *)shard->map + 8 + job->text_bytes;
    } else {
        shard->owned = (unsigned char *)sti_alloc(bytes, 1, "the data", job->label, job->error);
        if (!shard->owned) return ST_ERR_NOMEM;
        result = sti_source_read(source, shard->owned, bytes, job->error);
        data = shard->owned;
    }
    if (result == ST_OK) result = sti_source_check_unchanged(source, job->error);
    if (result == ST_OK) sti_attach(job, data);
    return result;
}

/* Reads one open shard. The header is read rather than mapped: a file that is being cut cannot make the
 * parser touch pages that are no longer there. */
static st_result sti_load(st_file *file, int shard, sti_source *source, st_error *error) {
    unsigned char first[8];
    uint64_t length = 0;
    char *text;
    sti_job job;
    st_result result;
    if (source->length < 8) return sti_too_short(source->length, source->path, error);
    if (source->length > (size_t)-1)
        return sti_fail(error, ST_ERR_OVERFLOW, "%.300s: %llu bytes do not fit the memory of this machine",
                        source->path, STI_ULL(source->length));
    result = sti_source_read(source, first, 8, error);
    if (result == ST_OK) result = sti_header_length(first, source->length, &length, source->path, error);
    if (result != ST_OK) return result;
    text = (char *)sti_alloc((size_t)length, 1, "the header", source->path, error);
    if (!text) return ST_ERR_NOMEM;
    sti_job_begin(&job, file, shard, source->path, error);
    job.text = text;
    job.text_bytes = (size_t)length;
    job.data_bytes = source->length - 8 - length;
    result = sti_source_read(source, text, (size_t)length, error);
    if (result == ST_OK) result = sti_read_header(&job);
    if (result == ST_OK) result = sti_load_data(&job, source);
    sti_job_end(&job);
    sti_free(text);
    return result;
}

static st_result sti_open_source(st_file *file, sti_source *source, st_error *error) {
    st_result result = sti_begin(file, 1, source->path, error);
    if (result == ST_OK) result = sti_load(file, 0, source, error);
    if (result == ST_OK) result = sti_order_by_name(file, source->path, error);
    return sti_finish(file, result, error);
}

st_result st_open(st_file *file, const char *path, st_error *error) {
    sti_source source;
    st_result result;
    if (file) memset(file, 0, sizeof *file);
    if (!file || !path) return sti_fail(error, ST_ERR_ARG, "st_open: file or path is NULL");
    result = sti_source_open(&source, path, error);
    if (result != ST_OK) return result;
    result = sti_open_source(file, &source, error);
    sti_source_close(&source);
    return result;
}

/* st_parse after its arguments were checked. */
static st_result sti_parse(sti_job *job, const unsigned char *bytes, size_t length) {
    sti_shard *shard = &job->file->sti_shard[0];
    const unsigned char *data;
    uint64_t header = 0;
    st_result result;
    if (length < 8) return sti_too_short(length, job->label, job->error);
    result = sti_header_length(bytes, length, &header, job->label, job->error);
    if (result != ST_OK) return result;
    job->text = (const char *)bytes + 8;
    job->text_bytes = (size_t)header;
    job->data_bytes = length - 8 - header;
    result = sti_read_header(job);
    if (result != ST_OK) return result;
    data = bytes + 8 + job->text_bytes;
    if (ST_BIG_ENDIAN) {
        shard->owned = (unsigned char *)sti_alloc((size_t)job->data_bytes, 1, "the data", job->label, job->error);
        if (!shard->owned) return ST_ERR_NOMEM;
        memcpy(shard->owned, data, (size_t)job->data_bytes);
        data = shard->owned;
    }
    sti_attach(job, data);
    return ST_OK;
}

st_result st_parse(st_file *file, const void *bytes, size_t length, const char *label, st_error *error) {
    sti_job job;
    st_result result;
    if (file) memset(file, 0, sizeof *file);
    if (!file || (!bytes && length)) return sti_fail(error, ST_ERR_ARG, "st_parse: file or bytes is NULL");
    if (!label) label = "safetensors";
    result = sti_begin(file, 1, label, error);
    if (result == ST_OK) {
        sti_job_begin(&job, file, 0, label, error);
        result = sti_parse(&job, (const unsigned char *)bytes, length);
        sti_job_end(&job);
    }
    if (result == ST_OK) result = sti_order_by_name(file, label, error);
    return sti_finish(file, result, error);
}

void st_close(st_file *file) {
    int i;
    if (!file) return;
    for (i = 0; i < file->shards; i++) {
        sti_shard *shard = &file->sti_shard[i];
#if defined(STI_POSIX) && !defined(ST_NO_MMAP)
        if (shard->map) munmap(shard->map, shard->map_bytes);
#endif
        sti_free(shard->owned);
        sti_free(shard->strings);
    }
    sti_free(file->sti_shard);
    sti_free(file->sti_tensor);
    sti_free((void *)file->sti_metadata);
    memset(file, 0, sizeof *file);
}

const st_tensor *st_find(const st_file *file, const char *name) {
    size_t low = 0, high;
    if (!file || !name) return NULL;
    high = file->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(name, file->tensor[middle].name);
        if (order == 0) return &file->tensor[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

const char *st_metadata(const st_file *file, const char *key) {
    size_t i;
    if (!file || !key) return NULL;
    for (i = 0; i < file->metadata_count; i++)
        if (strcmp(file->metadata[2 * i], key) == 0) return file->metadata[2 * i + 1];
    return NULL;
}

/* ---- sharded checkpoints --------------------------------------------------------------------------- */

typedef struct sti_entry {
    const char *name, *file;
    int shard;
} sti_entry;

/* The reading of an index file. */
typedef struct sti_index {
    const char *directory, *label;
    st_error *error;
    char *text;
    json_token *token;
    json_document doc;
    char *strings;
    sti_entry *entry; /* [count], the weight_map */
    size_t *order;    /* [2 * count], the first half sorted by file */
    size_t count;
    int shards;
    size_t absent;              /* entries whose tensor is not where they say */
    const sti_entry *first_one; /* of these */
} sti_index;

/* directory/name in new memory. */
static char *sti_join(const char *directory, const char *name, st_error *error) {
    size_t a = strlen(directory), b = strlen(name);
    char *path = (char *)sti_alloc(a + b + 2, 1, "a path", directory, error);
    if (!path) return NULL;
    memcpy(path, directory, a);
    path[a] = '/';
    memcpy(path + a + 1, name, b + 1);
    return path;
}

/* A shard must stay inside the directory: no separators, no drive letter, no way up. */
static int sti_is_plain_name(const char *name) {
    return *name && !strpbrk(name, "/\\:") && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

static int sti_compare_files(const void *context, size_t a, size_t b) {
    const sti_entry *entry = (const sti_entry *)context;
    return strcmp(entry[a].file, entry[b].file);
}

static st_result sti_index_entry(sti_index *index, size_t key, char **string, sti_entry *entry) {
    if (sti_take_string(&index->doc, key, string, &entry->name) != JSON_OK)
        return sti_fail(index->error, ST_ERR_LIMIT, "%.150s: a tensor's name contains a NUL", index->label);
    if (sti_take_string(&index->doc, key + 1, string, &entry->file) != JSON_OK || !sti_is_plain_name(entry->file))
        return sti_fail(index->error, ST_ERR_FORMAT, "%.150s: tensor \"%.200s\": its shard is not a plain file name",
                        index->label, entry->name);
    if (strlen(entry->file) >= ST_MAX_NAME)
        return sti_fail(index->error, ST_ERR_LIMIT, "%.150s: tensor \"%.200s\": the name of its shard is too long",
                        index->label, entry->name);
    return ST_OK;
}

/* Finds weight_map and allocates for its entries. */
static st_result sti_index_prepare(sti_index *index, size_t *map) {
    const json_document *doc = &index->doc;
    size_t i, room = 0;
    if (doc->token[0].type != JSON_OBJECT)
        return sti_fail(index->error, ST_ERR_FORMAT, "%.150s: not an object", index->label);
    if (json_find(doc, 0, "weight_map", map) != JSON_OK)
        return sti_fail(index->error, ST_ERR_MISSING, "%.150s: no weight_map", index->label);
    if (doc->token[*map].type != JSON_OBJECT || doc->token[*map].size == 0)
        return sti_fail(index->error, ST_ERR_FORMAT, "%.150s: weight_map is not an object of file names",
                        index->label);
    index->count = doc->token[*map].size;
    for (i = *map + 1; i < doc->token[*map].next; i = doc->token[i].next)
        if (doc->token[i].type == JSON_STRING) room += sti_string_room(doc, i);
    index->strings = (char *)sti_alloc(room, 1, "names", index->label, index->error);
    if (!index->strings) return ST_ERR_NOMEM;
    index->entry =
        (sti_entry *)sti_alloc(index->count, sizeof *index->entry, "weight_map", index->label, index->error);
    if (!index->entry) return ST_ERR_NOMEM;
    index->order = (size_t *)sti_alloc(index->count, 2 * sizeof *index->order, "sorting", index->label, index->error);
    return index->order ? ST_OK : ST_ERR_NOMEM;
}

/* Reads weight_map and numbers the shards in the order of their names. */
static st_result sti_index_read(sti_index *index) {
    size_t map = 0, key, i;
    char *string;
    st_result result = sti_index_prepare(index, &map);
    if (result != ST_OK) return result;
    string = index->strings;
    for (key = map + 1, i = 0; i < index->count; key = index->token[key + 1].next, i++) {
        result = sti_index_entry(index, key, &string, &index->entry[i]);
        if (result != ST_OK) return result;
    }
    sti_sort_all(index->order, index->count, sti_compare_files, index->entry);
    for (i = 0; i < index->count; i++) {
        if (i == 0 || sti_compare_files(index->entry, index->order[i - 1], index->order[i]) != 0) {
            if (index->shards == ST_MAX_SHARDS)
                return sti_fail(index->error, ST_ERR_LIMIT, "%.150s: more than %d shards", index->label,
                                ST_MAX_SHARDS);
            index->shards++;
        }
        index->entry[index->order[i]].shard = index->shards - 1;
    }
    return ST_OK;
}

/* A shard that does not exist leaves its tensors absent. */
static st_result sti_index_load_shard(sti_index *index, st_file *file, const sti_entry *entry) {
    sti_source source;
    st_result result;
    char *path = sti_join(index->directory, entry->file, index->error);
    if (!path) return ST_ERR_NOMEM;
    result = sti_source_open(&source, path, index->error);
    if (result == ST_OK) {
        result = sti_load(file, entry->shard, &source, index->error);
        sti_source_close(&source);
    } else if (result == ST_ERR_MISSING) {
        result = ST_OK;
    }
    sti_free(path);
    return result;
}

/* Counts what is not where the list says. Something must be. */
static st_result sti_index_check(sti_index *index, const st_file *file) {
    size_t i;
    for (i = 0; i < index->count; i++) {
        const sti_entry *entry = &index->entry[index->order[i]];
        const st_tensor *tensor = st_find(file, entry->name);
        if (tensor && tensor->shard == entry->shard) continue;
        if (index->absent++ == 0) index->first_one = entry;
    }
    if (index->absent < index->count) return ST_OK;
    return sti_fail(index->error, ST_ERR_MISSING, "%.150s: tensor \"%.200s\" is not in %.100s, nor any other one",
                    index->label, index->first_one->name, index->first_one->file);
}

static void sti_index_warn(sti_index *index, st_file *file) {
    uint64_t total = 0, listed = 0;
    size_t i, metadata = 0, value = 0;
    if (index->absent > 0) {
        snprintf(file->warning, sizeof file->warning,
                 "%llu of %llu tensors of the index are absent: %.100s is not in %.80s", STI_ULL(index->absent),
                 STI_ULL(index->count), index->first_one->name, index->first_one->file);
        return;
    }
    if (file->count != index->count)
        snprintf(file->warning, sizeof file->warning, "%llu tensors in the shards, %llu in the index",
                 STI_ULL(file->count), STI_ULL(index->count));
    if (json_find(&index->doc, 0, "metadata", &metadata) != JSON_OK ||
        json_find(&index->doc, metadata, "total_size", &value) != JSON_OK)
        return;
    for (i = 0; i < file->count; i++) total += file->tensor[i].bytes;
    if (json_uint(&index->doc, value, &listed) != JSON_OK)
        snprintf(file->warning, sizeof file->warning, "total_size of the index is not a whole number");
    else if (listed != total)
        snprintf(file->warning, sizeof file->warning, "total_size of the index is %llu, the tensors have %llu bytes",
                 STI_ULL(listed), STI_ULL(total));
}

static st_result sti_index_open(sti_index *index, st_file *file, sti_source *source) {
    size_t length = 0, i;
    int next = 0;
    st_result result = sti_source_text(source, &index->text, &length, index->error);
    if (result == ST_OK && sti_stranger((const unsigned char *)index->text, length))
        result = sti_fail(index->error, ST_ERR_FORMAT, "%.300s: %s", index->label,
                          sti_stranger((const unsigned char *)index->text, length));
    if (result == ST_OK)
        result = sti_tokenize(index->text, length, &index->token, &index->doc, index->label, index->error);
    if (result == ST_OK) result = sti_index_read(index);
    if (result == ST_OK) result = sti_begin(file, index->shards, index->label, index->error);
    for (i = 0; i < index->count && result == ST_OK; i++) {
        const sti_entry *entry = &index->entry[index->order[i]];
        if (entry->shard != next) continue;
        result = sti_index_load_shard(index, file, entry);
        next++;
    }
    if (result == ST_OK) result = sti_order_by_name(file, index->label, index->error);
    if (result == ST_OK) result = sti_index_check(index, file);
    if (result == ST_OK) sti_index_warn(index, file);
    return sti_finish(file, result, index->error);
}

/* Opens directory/name, as an index or as a single file. ST_ERR_MISSING with *absent = 1 if that file does
 * not exist; the contents of the file can be ST_ERR_MISSING too. */
static st_result sti_open_in(st_file *file, const char *directory, const char *name, int is_index, int *absent,
                             st_error *error) {
    sti_source source;
    sti_index index;
    st_result result;
    char *path = sti_join(directory, name, error);
    *absent = 0;
    if (!path) return ST_ERR_NOMEM;
    result = sti_source_open(&source, path, error);
    *absent = result == ST_ERR_MISSING;
    if (result == ST_OK) {
        memset(&index, 0, sizeof index);
        index.directory = directory;
        index.label = path;
        index.error = error;
        result = is_index ? sti_index_open(&index, file, &source) : sti_open_source(file, &source, error);
        sti_free(index.text);
        sti_free(index.token);
        sti_free(index.strings);
        sti_free(index.entry);
        sti_free(index.order);
        sti_source_close(&source);
    }
    sti_free(path);
    return result;
}

st_result st_open_checkpoint(st_file *file, const char *directory, st_error *error) {
    st_result result;
    int absent = 0;
    if (file) memset(file, 0, sizeof *file);
    if (!file || !directory) return sti_fail(error, ST_ERR_ARG, "st_open_checkpoint: file or directory is NULL");
    result = sti_open_in(file, directory, "model.safetensors", 0, &absent, error);
    if (absent) result = sti_open_in(file, directory, "model.safetensors.index.json", 1, &absent, error);
    if (absent)
        sti_fail(error, result, "%.300s: expected a directory with model.safetensors or model.safetensors.index.json",
                 directory);
    return result;
}

/* ---- writing --------------------------------------------------------------------------------------- */

/* A text that is measured first (to == NULL) and written then. Beyond ST_MAX_HEADER it is only known to be
 * too long, which keeps `length` from overflowing. */
typedef struct sti_text {
    char *to;
    size_t length;
} sti_text;

static void sti_put_byte(sti_text *text, char byte) {
    if (text->length > ST_MAX_HEADER) return;
    if (text->to) text->to[text->length] = byte;
    text->length++;
}

static void sti_put(sti_text *text, const char *string) {
    while (*string) sti_put_byte(text, *string++);
}

static void sti_put_number(sti_text *text, uint64_t number) {
    char digits[24];
    snprintf(digits, sizeof digits, "%llu", STI_ULL(number));
    sti_put(text, digits);
}

static void sti_put_quoted(sti_text *text, const char *string) {
    char escape[8];
    sti_put_byte(text, '"');
    for (; *string; string++) {
        unsigned char c = (unsigned char)*string;
        if (c < 0x20) {
            snprintf(escape, sizeof escape, "\\u%04x", (unsigned)c);
            sti_put(text, escape);
        } else {
            if (c == '"' || c == '\\') sti_put_byte(text, '\\');
            sti_put_byte(text, *string);
        }
    }
    sti_put_byte(text, '"');
}

static void sti_put_tensor(sti_text *text, const st_tensor *tensor, uint64_t begin) {
    int i;
    sti_put_quoted(text, tensor->name);
    sti_put(text, ":{\"dtype\":\"");
    sti_put(text, st_dtype_name(tensor->dtype));
    sti_put(text, "\",\"shape\":[");
    for (i = 0; i < tensor->rank; i++) {
        if (i) sti_put_byte(text, ',');
        sti_put_number(text, tensor->shape[i]);
    }
    sti_put(text, "],\"data_offsets\":[");
    sti_put_number(text, begin);
    sti_put_byte(text, ',');
    sti_put_number(text, begin + tensor->bytes);
    sti_put(text, "]}");
}

static void sti_put_header(sti_text *text, const st_tensor *tensors, size_t count, const char *const *pairs) {
    uint64_t begin = 0;
    size_t i;
    sti_put_byte(text, '{');
    if (pairs && pairs[0]) {
        sti_put(text, "\"__metadata__\":{");
        for (i = 0; pairs[i]; i += 2) {
            if (i) sti_put_byte(text, ',');
            sti_put_quoted(text, pairs[i]);
            sti_put_byte(text, ':');
            sti_put_quoted(text, pairs[i + 1]);
        }
        sti_put_byte(text, '}');
        if (count) sti_put_byte(text, ',');
    }
    for (i = 0; i < count; i++) {
        if (i) sti_put_byte(text, ',');
        sti_put_tensor(text, &tensors[i], begin);
        begin += tensors[i].bytes;
    }
    sti_put_byte(text, '}');
    while (text->length % 8 != 0 && text->length <= ST_MAX_HEADER) sti_put_byte(text, ' ');
}

/* What has to hold before the arguments can be looked at more closely. */
static st_result sti_check_arguments(const char *path, const st_tensor *tensors, size_t count,
                                     const char *const *pairs, int made, uint64_t *total, st_error *error) {
    size_t i;
    if (!path || (!tensors && count)) return sti_fail(error, ST_ERR_ARG, "st_write: path or tensors is NULL");
    for (i = 0; pairs && pairs[i]; i += 2)
        if (!pairs[i + 1])
            return sti_fail(error, ST_ERR_ARG, "%.150s: metadata \"%.200s\" has no value", path, pairs[i]);
    *total = 0;
    for (i = 0; i < count; i++) {
        const st_tensor *t = &tensors[i];
        if (!t->name || !st_dtype_bytes(t->dtype) || t->rank < 0 || (!t->data && t->bytes && !made))
            return sti_fail(error, ST_ERR_ARG, "%.150s: tensor %llu has no name, dtype, rank or data", path,
                            STI_ULL(i));
        if (t->rank > ST_MAX_RANK)
            return sti_fail(error, ST_ERR_LIMIT, "%.150s: tensor \"%.200s\" has %d dimensions, at most %d", path,
                            t->name, t->rank, ST_MAX_RANK);
        if (t->bytes > UINT64_MAX - *total)
            return sti_fail(error, ST_ERR_OVERFLOW, "%.150s: the sum of all tensors overflows", path);
        *total += t->bytes;
    }
    return ST_OK;
}

/* Builds the header in new memory and gives it to the reader's own checks. */
static st_result sti_make_header(const char *path, const st_tensor *tensors, size_t count, const char *const *pairs,
                                 uint64_t total, sti_text *text, st_error *error) {
    st_file file;
    sti_job job;
    st_result result;
    sti_put_header(text, tensors, count, pairs);
    if (text->length > ST_MAX_HEADER)
        return sti_fail(error, ST_ERR_LIMIT, "%.300s: the header would be longer than %d bytes", path, ST_MAX_HEADER);
    text->to = (char *)sti_alloc(text->length, 1, "the header", path, error);
    if (!text->to) return ST_ERR_NOMEM;
    text->length = 0;
    sti_put_header(text, tensors, count, pairs);
    result = sti_begin(&file, 1, path, error);
    if (result != ST_OK) return result;
    sti_job_begin(&job, &file, 0, path, error);
    job.text = text->to;
    job.text_bytes = text->length;
    job.data_bytes = total;
    result = sti_read_header(&job);
    sti_job_end(&job);
    st_close(&file);
    return result;
}

/* The file being written: 0 from each of these is a failure. */
#ifdef STI_POSIX

typedef int sti_sink;

/* O_EXCL follows no link, opens no FIFO and takes no other writer's file. */
static int sti_sink_open(sti_sink *sink, const char *path) {
    *sink = sti_open(path, O_WRONLY | O_CREAT | O_EXCL);
    return *sink >= 0;
}

static int sti_sink_put(sti_sink *sink, const unsigned char *from, size_t bytes) {
    while (bytes) {
        size_t part = bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30; /* some systems cap one write */
        ssize_t put = write(*sink, from, part);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return 0;
        from += put;
        bytes -= (size_t)put;
    }
    return 1;
}

static int sti_sink_close(sti_sink *sink, int good) {
    good = good && fsync(*sink) == 0;
    return close(*sink) == 0 && good;
}

static int sti_replace(const char *from, const char *to) { return rename(from, to) == 0; }

#else

typedef FILE *sti_sink;

#define STI_ONE_NAME /* C99 knows no exclusive opening */
static int sti_sink_open(sti_sink *sink, const char *path) {
    *sink = fopen(path, "wb");
    return *sink != NULL;
}

static int sti_sink_put(sti_sink *sink, const unsigned char *from, size_t bytes) {
    return fwrite(from, 1, bytes, *sink) == bytes;
}

static int sti_sink_close(sti_sink *sink, int good) {
    good = good && fflush(*sink) == 0;
    return fclose(*sink) == 0 && good;
}

#ifdef _WIN32
static int sti_replace(const char *from, const char *to) {
    errno = EACCES;
    return MoveFileExA(from, to, 1) != 0; /* 1: replaces what is there */
}
#else
/* Where rename does not replace, the old file has to go first. */
static int sti_replace(const char *from, const char *to) {
    return rename(from, to) == 0 || (remove(to) == 0 && rename(from, to) == 0);
}
#endif

#endif

/* Data in the byte order of the file. */
static int sti_sink_put_data(sti_sink *sink, const st_tensor *tensor) {
    const unsigned char *from = (const unsigned char *)tensor->data;
    unsigned char part[4096];
    size_t at, bytes, size = st_dtype_bytes(tensor->dtype);
    if (tensor->bytes == 0) return 1;
    if (!ST_BIG_ENDIAN || size == 1) return sti_sink_put(sink, from, tensor->bytes);
    for (at = 0; at < tensor->bytes; at += bytes) {
        bytes = tensor->bytes - at < sizeof part ? tensor->bytes - at : sizeof part;
        memcpy(part, from + at, bytes);
        sti_swap(part, bytes, size);
        if (!sti_sink_put(sink, part, bytes)) return 0;
    }
    return 1;
}

/* A tensor on its way into the file. */
struct st_sink {
    sti_sink file;
    st_tensor tensor; /* of which data and bytes are the next piece */
    size_t left;      /* bytes that are still to come */
};

st_result st_put(st_sink *sink, const void *data, size_t bytes) {
    if (bytes > sink->left) return ST_ERR_MISMATCH;
    sink->left -= bytes;
    sink->tensor.data = data;
    sink->tensor.bytes = bytes;
    return sti_sink_put_data(&sink->file, &sink->tensor) ? ST_OK : ST_ERR_IO;
}

#define STI_SUFFIX 48 /* bytes of what is behind the path in a temporary name, with its NUL */

/* What is to be written, and where to. */
typedef struct sti_job_out {
    const char *path;
    char *temporary;
    const st_tensor *tensors;
    size_t count;
    st_make make; /* NULL: the tensors' data */
    void *user;
    const void *front; /* what comes before the tensors: a header, or a whole file of another kind */
    size_t front_bytes;
    unsigned char length[8]; /* of the header, before it */
    size_t length_bytes;     /* 8, or 0 */
} sti_job_out;

/* ST_ERR_IO is left to the caller to explain; all else is explained here or by make. */
static st_result sti_write_tensor(const sti_job_out *job, size_t i, st_sink *sink, st_error *error) {
    const st_tensor *t = &job->tensors[i];
    st_result result;
    sink->tensor = *t;
    sink->left = t->bytes;
    result = job->make ? job->make(job->user, i, sink, error) : st_put(sink, t->data, t->bytes);
    if (result == ST_OK && sink->left > 0) result = ST_ERR_MISMATCH;
    if (result == ST_ERR_MISMATCH)
        sti_fail(error, result, "%.150s: tensor \"%.200s\" was given too few or too many bytes", job->path, t->name);
    return result;
}

/* A new file beside the path: names are tried until one is free. */
static int sti_open_temporary(const sti_job_out *job, st_sink *sink) {
#ifdef STI_ONE_NAME
    return sti_sink_open(&sink->file, job->temporary);
#else
    int i;
    for (i = 0; i < 10000; i++) {
        snprintf(job->temporary + strlen(job->path), STI_SUFFIX, ".%ld-%d.tmp", (long)getpid(), i);
        if (sti_sink_open(&sink->file, job->temporary)) return 1;
        if (errno != EEXIST) return 0;
    }
    return 0;
#endif
}

/* Fills the temporary file and moves it into place. */
static st_result sti_write_file(const sti_job_out *job, st_error *error) {
    st_sink sink;
    st_result result;
    size_t i;
    int whole;
    if (!sti_open_temporary(job, &sink))
        return sti_fail(error, ST_ERR_IO, "%.300s: cannot create: %s", job->temporary, sti_reason(NULL));
    result = sti_sink_put(&sink.file, job->length, job->length_bytes) &&
                     sti_sink_put(&sink.file, (const unsigned char *)job->front, job->front_bytes)
                 ? ST_OK
                 : ST_ERR_IO;
    for (i = 0; i < job->count && result == ST_OK; i++) result = sti_write_tensor(job, i, &sink, error);
    whole = sti_sink_close(&sink.file, result == ST_OK);
    if (result == ST_OK && whole && sti_replace(job->temporary, job->path)) return sti_succeed(error);
    if (result == ST_OK || result == ST_ERR_IO) {
        result = sti_fail(error, ST_ERR_IO, "%.300s: cannot %s: %s", job->path, whole ? "replace" : "write",
                          sti_reason(NULL));
    }
    remove(job->temporary);
    return result;
}

#define STI_PATH 4096 /* bytes of a path behind a link, with its NUL */

/* The path behind links, in `real`, if there is a file or nothing yet; else the path as it is. */
static const char *sti_real(const char *path, char real[STI_PATH]) {
#ifdef STI_POSIX
    const char *at = path, *slash;
    char to[STI_PATH];
    struct stat status;
    ssize_t n;
    int links;
    for (links = 0; links < 40 && (n = readlink(at, to, sizeof to)) > 0; links++) {
        size_t keep;
        slash = strrchr(at, '/');
        keep = to[0] != '/' && slash ? (size_t)(slash + 1 - at) : 0;
        if (keep + (size_t)n >= STI_PATH) return path;
        memmove(real, at, keep);
        memcpy(real + keep, to, (size_t)n);
        real[keep + (size_t)n] = '\0';
        at = real;
    }
    if (stat(at, &status) == 0 ? S_ISREG(status.st_mode) : errno == ENOENT) return at;
#else
    (void)real;
#endif
    return path;
}

static st_result sti_write(sti_job_out *job, st_error *error) {
    char real[STI_PATH], *temporary;
    size_t length;
    st_result result = ST_ERR_NOMEM;
    job->path = sti_real(job->path, real);
    length = strlen(job->path);
    temporary = (char *)sti_alloc(length + STI_SUFFIX, 1, "a path", job->path, error);
    if (temporary) {
        memcpy(temporary, job->path, length);
        memcpy(temporary + length, ".tmp", sizeof ".tmp");
        job->temporary = temporary;
        result = sti_write_file(job, error);
    }
    sti_free(temporary);
    return result;
}

static st_result sti_write_tensors(sti_job_out *job, const char *const *metadata_pairs, st_error *error) {
    sti_text text = {NULL, 0};
    uint64_t total = 0;
    int i;
    st_result result =
        sti_check_arguments(job->path, job->tensors, job->count, metadata_pairs, job->make != NULL, &total, error);
    if (result == ST_OK)
        result = sti_make_header(job->path, job->tensors, job->count, metadata_pairs, total, &text, error);
    if (result == ST_OK) {
        job->front = text.to;
        job->front_bytes = text.length;
        job->length_bytes = 8;
        for (i = 0; i < 8; i++) job->length[i] = (unsigned char)((uint64_t)text.length >> (8 * i) & 0xFF);
        result = sti_write(job, error);
    }
    sti_free(text.to);
    return result;
}

st_result st_write(const char *path, const st_tensor *tensors, size_t count, const char *const *metadata_pairs,
                   st_error *error) {
    sti_job_out job = {path, NULL, tensors, count, NULL, NULL, NULL, 0, {0}, 0};
    return sti_write_tensors(&job, metadata_pairs, error);
}

st_result st_write_made(const char *path, const st_tensor *tensors, size_t count, const char *const *metadata_pairs,
                        st_make make, void *user, st_error *error) {
    sti_job_out job = {path, NULL, tensors, count, make, user, NULL, 0, {0}, 0};
    if (!make) return sti_fail(error, ST_ERR_ARG, "st_write_made: make is NULL");
    return sti_write_tensors(&job, metadata_pairs, error);
}

st_result st_write_bytes(const char *path, const void *bytes, size_t length, st_error *error) {
    sti_job_out job = {path, NULL, NULL, 0, NULL, NULL, bytes, length, {0}, 0};
    if (!path || (!bytes && length)) return sti_fail(error, ST_ERR_ARG, "st_write_bytes: path or bytes is NULL");
    return sti_write(&job, error);
}

#ifdef __cplusplus
}
#endif
#endif /* SAFETENSORS_IMPLEMENTATION */
