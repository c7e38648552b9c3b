/* test_codecs.c -- chapter 3 (formats): BF16, F16, FP8 E4M3, Q8_0 and Q4_0, both ways, and dsv3_quantize.
 *
 * A failure here means that weights are read as other numbers than the file holds, or that rounding to a small
 * format does not take the nearest number (ties to even), overflows at the wrong place, or loses a NaN. What
 * dsv3_quantize writes is compared with its rules, spelled out once more in double. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include "test.h"
#include <float.h>

/* A small format, described by numbers; the functions below follow the description and nothing else. */
typedef struct format {
    const char *name;
    int exponent_bits, mantissa_bits, bias;
    int has_infinity; /* exponent all ones: infinity or NaN; without: only the very last code is NaN */
    float (*decode)(uint32_t code);
    uint32_t (*encode)(float x);
} format;

static float decode_bf16(uint32_t code) { return dsv3_f32_from_bf16((uint16_t)code); }
static float decode_f16(uint32_t code) { return dsv3_f32_from_f16((uint16_t)code); }
static float decode_e4m3(uint32_t code) { return dsv3_f32_from_f8_e4m3((uint8_t)code); }
static uint32_t encode_bf16(float x) { return dsv3_bf16_from_f32(x); }
static uint32_t encode_f16(float x) { return dsv3_f16_from_f32(x); }
static uint32_t encode_e4m3(float x) { return dsv3_f8_e4m3_from_f32(x); }

static const format formats[] = {{"bf16", 8, 7, 127, 1, decode_bf16, encode_bf16},
                                 {"f16", 5, 10, 15, 1, decode_f16, encode_f16},
                                 {"e4m3", 4, 3, 7, 0, decode_e4m3, encode_e4m3}};
#define FORMATS (sizeof formats / sizeof formats[0])

static uint32_t sign_bit(const format *f) { return (uint32_t)1 << (f->exponent_bits + f->mantissa_bits); }

/* The first code beyond the finite ones, sign bit clear: infinity, or the one NaN. */
static uint32_t beyond_code(const format *f) {
    return f->has_infinity ? (((uint32_t)1 << f->exponent_bits) - 1) << f->mantissa_bits : sign_bit(f) - 1;
}

/* Value of a code without sign, by the definition. For the first code beyond the finite ones it gives what that
 * code would mean if the numbers went on: rounding needs to know. */
static double value_of(const format *f, uint32_t code) {
    int e = (int)(code >> f->mantissa_bits), one = 1 << f->mantissa_bits;
    int m = (int)(code & (uint32_t)(one - 1));
    if (e == 0) return ldexp((double)m, 1 - f->bias - f->mantissa_bits);
    return ldexp((double)(one + m), e - f->bias - f->mantissa_bits);
}

static void decode_every_code(const format *f) {
    uint32_t sign = sign_bit(f), beyond = beyond_code(f);
    int wrong = 0, not_nan = 0, not_inf = 0, not_back = 0;
    for (uint32_t code = 0; code < 2 * sign; code++) {
        uint32_t a = code & (sign - 1);
        float x = f->decode(code);
        if (f->has_infinity && a == beyond) {
            not_inf += !(isinf(x) && (x < 0) == (code >= sign));
        } else if (a >= beyond) {
            not_nan += !isnan(x);
            continue;
        } else {
            double want = value_of(f, a);
            wrong += (double)x != (code >= sign ? -want : want) || (signbit(x) != 0) != (code >= sign);
        }
        not_back += f->encode(x) != code;
    }
    printf("%s: %d codes\n", f->name, (int)(2 * sign));
    CHECK_EQ(wrong, 0);
    CHECK_EQ(not_nan, 0);
    CHECK_EQ(not_inf, 0);
    CHECK_EQ(not_back, 0);
}

/* The nearest code of a finite number or infinity, by bisection and comparison of distances. */
static uint32_t nearest(const format *f, float x) {
    double a = fabs((double)x);
    uint32_t sign = signbit(x) ? sign_bit(f) : 0, beyond = beyond_code(f), low = 0, high = beyond;
    if (a >= value_of(f, beyond)) {
        low = beyond;
    } else {
        while (high - low > 1) { /* value(low) <= a < value(high) */
            uint32_t middle = (low + high) / 2;
            if (value_of(f, middle) <= a) {
                low = middle;
            } else {
                high = middle;
            }
        }
        if (a - value_of(f, low) > value_of(f, high) - a)
            low = high;
        else if (!(a - value_of(f, low) < value_of(f, high) - a))
            low += low & 1; /* tie: the even code */
    }
    if (low >= beyond && !f->has_infinity) low = beyond - 1; /* saturates */
    return sign | low;
}

static int wrong_shown;

static int encode_wrong(const format *f, float x) {
    uint32_t got = f->encode(x), want = nearest(f, x);
    if (got != want && wrong_shown++ < 10) {
        fprintf(stderr, "%s of %.9g (%a): got %04x, want %04x\n", f->name, (double)x, (double)x, (unsigned)got,
                (unsigned)want);
    }
    return got != want;
}

/* Halfway between every two neighbours, and the floats just below and above. */
static void encode_halfways(const format *f) {
    int wrong = 0, halves = 0;
    for (uint32_t code = 0; code < beyond_code(f); code++) {
        double half = (value_of(f, code) + value_of(f, code + 1)) / 2;
        float x = (float)half;
        halves += (double)x == half;
        wrong += encode_wrong(f, x) + encode_wrong(f, -x);
        wrong += encode_wrong(f, nextafterf(x, 0.0f)) + encode_wrong(f, -nextafterf(x, 0.0f));
        wrong += encode_wrong(f, nextafterf(x, INFINITY)) + encode_wrong(f, -nextafterf(x, INFINITY));
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(halves, beyond_code(f)); /* every halfway point is a float: ties were really met */
}

static void encode_random(const format *f) {
    double top = value_of(f, beyond_code(f)), bottom = value_of(f, 1);
    int wrong = 0;
    for (int i = 0; i < 100000; i++) { /* any bits */
        float x = dsv3i_float((uint32_t)(test_random() >> 32));
        if (!isnan(x)) wrong += encode_wrong(f, x);
    }
    for (int i = 0; i < 100000; i++) { /* within the range of the format, and a little beyond */
        double octaves = log2(top / bottom) + 4;
        double x = bottom / 4 * exp2((double)test_uniform(0, 1) * octaves) * (double)test_uniform(0.5f, 1);
        wrong += encode_wrong(f, (float)(test_random() & 1 ? x : -x));
    }
    CHECK_EQ(wrong, 0);
}

/* A NaN stays one, whichever bits it has: also when all its bits are in the part that is cut off, and when
 * rounding up would carry into the sign. */
static void encode_nan(const format *f) {
    static const uint32_t bits[] = {0x7FC00000u, 0x7F800001u, 0x7FFFFFFFu, 0xFFC00000u,
                                    0xFF800001u, 0xFFFFFFFFu, 0x7F807FFFu, 0x7FFF8000u};
    for (size_t i = 0; i < sizeof bits / sizeof bits[0]; i++) {
        uint32_t code = f->encode(dsv3i_float(bits[i]));
        CHECK(isnan(f->decode(code)));
        CHECK_EQ(code >= sign_bit(f), bits[i] >> 31);
    }
}

static void overflow_edges(void) {
    CHECK_EQ(dsv3_f16_from_f32(65504.0f), 0x7BFF);
    CHECK_EQ(dsv3_f16_from_f32(65519.99f), 0x7BFF);
    CHECK_EQ(dsv3_f16_from_f32(65520.0f), 0x7C00);
    CHECK_EQ(dsv3_f16_from_f32(-65520.0f), 0xFC00);
    CHECK_EQ(dsv3_f16_from_f32(FLT_MAX), 0x7C00);
    CHECK_EQ(dsv3_f16_from_f32(INFINITY), 0x7C00);
    CHECK_EQ(dsv3_f16_from_f32(-INFINITY), 0xFC00);
    CHECK_EQ(dsv3_f16_from_f32(ldexpf(1.0f, -25)), 0x0000); /* tie */
    CHECK_EQ(dsv3_f16_from_f32(ldexpf(3.0f, -25)), 0x0002); /* tie */
    CHECK_EQ(dsv3_f16_from_f32(ldexpf(1.0f, -149)), 0x0000);
    CHECK_EQ(dsv3_f16_from_f32(-0.0f), 0x8000);
    CHECK_EQ(dsv3_bf16_from_f32(FLT_MAX), 0x7F80);
    CHECK_EQ(dsv3_bf16_from_f32(-FLT_MAX), 0xFF80);
    CHECK_EQ(dsv3_bf16_from_f32(INFINITY), 0x7F80);
    CHECK_EQ(dsv3_bf16_from_f32(dsv3i_float(0x7F7F7FFFu)), 0x7F7F);
    CHECK_EQ(dsv3_bf16_from_f32(dsv3i_float(0x7F7F8000u)), 0x7F80); /* tie */
    CHECK_EQ(dsv3_bf16_from_f32(dsv3i_float(0x00008000u)), 0x0000); /* tie */
    CHECK_EQ(dsv3_bf16_from_f32(dsv3i_float(0x00018000u)), 0x0002); /* tie */
    CHECK_EQ(dsv3_bf16_from_f32(-0.0f), 0x8000);
}

/* Known answers for E4M3. */
static void e4m3_golden(void) {
    static const float block[4] = {0.5f, -1.25f, 3.0f, 0.01f};
    static const double decoded[4] = {0.482142857, -1.28571429, 3, 0.0100446429};
    static const uint8_t codes[4] = {0x69, 0xF4, 0x7E, 0x3C};
    static const struct {
        float x;
        int code;
    } golden[] = {{1.0625f, 0x38},       {1.1875f, 0x3A},       {0.3f, 0x2A},
                  {448.0f, 0x7E},        {463.9f, 0x7E},        {464.0f, 0x7E},
                  {1e9f, 0x7E},          {0.0009765625f, 0x00}, {1.01f * 0.0009765625f, 0x01},
                  {0.0146484375f, 0x08}, {-3.3f, 0xC5},         {-0.0f, 0x80},
                  {0.0f, 0x00},          {-448.0f, 0xFE},       {-1e9f, 0xFE},
                  {1.0f, 0x38},          {0.001953125f, 0x01},  {432.0f, 0x7E}, /* tie */
                  {431.9f, 0x7D}};
    float scale = 3.0f / 448.0f, back[4];
    for (size_t i = 0; i < sizeof golden / sizeof golden[0]; i++) {
        CHECK_EQ(dsv3_f8_e4m3_from_f32(golden[i].x), golden[i].code);
    }
    CHECK_EQ(dsv3_f8_e4m3_from_f32(INFINITY), 0x7E);
    CHECK_EQ(dsv3_f8_e4m3_from_f32(-INFINITY), 0xFE);
    CHECK_EQ(dsv3_f8_e4m3_from_f32(NAN) & 0x7F, 0x7F);
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(dsv3_f8_e4m3_from_f32(block[i] / scale), codes[i]);
        back[i] = dsv3_f32_from_f8_e4m3(codes[i]) * scale;
        CHECK(isfinite(back[i]));
    }
    CHECK_CLOSE(back, decoded, 4, 1e-8);
    CHECK_EQ(dsv3_f32_from_f8_e4m3(0x7E), 448);
    CHECK(isnan(dsv3_f32_from_f8_e4m3(0x7F)) && isnan(dsv3_f32_from_f8_e4m3(0xFF)));
}

static void finite_and_nan(void) {
    static const struct {
        uint32_t bits;
        int finite, nan;
    } cases[] = {{0x00000000u, 1, 0}, {0x80000000u, 1, 0}, {0x00000001u, 1, 0}, {0x7F7FFFFFu, 1, 0},
                 {0xFF7FFFFFu, 1, 0}, {0x7F800000u, 0, 0}, {0xFF800000u, 0, 0}, {0x7F800001u, 0, 1},
                 {0xFF800001u, 0, 1}, {0x7FC00000u, 0, 1}, {0xFFFFFFFFu, 0, 1}, {0x3F800000u, 1, 0}};
    float x[9];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        float y = dsv3i_float(cases[i].bits);
        CHECK_EQ(dsv3i_is_finite(y), cases[i].finite);
        CHECK_EQ(dsv3i_is_nan(y), cases[i].nan);
    }
    test_fill(x, 9, -1, 1);
    CHECK(dsv3i_all_finite(x, 9) && dsv3i_all_finite(x, 0));
    for (size_t i = 0; i < 9; i++) { /* one bad value anywhere */
        float keep = x[i];
        x[i] = i % 2 ? NAN : -INFINITY;
        CHECK(!dsv3i_all_finite(x, 9));
        CHECK(dsv3i_all_finite(x, i));
        x[i] = keep;
    }
}

/* ---- Blocks of 32: an F16 scale d, and codes */

#define QBLOCK 32

static size_t block_bytes(dsv3_type type) { return type == DSV3_Q8_0 ? 34 : 18; }
static int lowest_code(dsv3_type type) { return type == DSV3_Q8_0 ? -127 : -8; }
static int highest_code(dsv3_type type) { return type == DSV3_Q8_0 ? 127 : 7; }

/* The scale of a block, by the definition of F16; its low byte comes first on any machine. */
static double block_d(const unsigned char *block) {
    uint32_t bits = block[0] + 256u * block[1], a = bits & 0x7FFFu;
    double d;
    d = a > 0x7C00 ? (double)NAN : a == 0x7C00 ? (double)INFINITY : value_of(&formats[1], a);
    return bits & 0x8000u ? -d : d;
}

/* The multiple of d that element i is. */
static int block_code(dsv3_type type, const unsigned char *block, size_t i) {
    int byte = block[type == DSV3_Q8_0 ? 2 + i : 2 + i % 16];
    if (type == DSV3_Q8_0) return byte < 128 ? byte : byte - 256;
    return (i < 16 ? byte % 16 : byte / 16) - 8;
}

static int decoded_wrong(dsv3_type type, const unsigned char *w, size_t blocks) {
    float *y = (float *)test_alloc(blocks * QBLOCK * sizeof *y);
    int wrong = 0;
    dsv3i_plain.decode[type](y, w, blocks * QBLOCK);
    for (size_t i = 0; i < blocks * QBLOCK; i++) {
        const unsigned char *block = w + i / QBLOCK * block_bytes(type);
        double want = block_d(block) * block_code(type, block, i % QBLOCK);
        wrong += isnan(want) ? !isnan(y[i]) : (double)y[i] != want;
    }
    free(y);
    return wrong;
}

/* Every scale with some codes, and some scales with every code in every place. */
static void blocks_decode(dsv3_type type) {
    static const uint16_t some[] = {0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00,
                                    0x3555, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00};
    size_t bytes = block_bytes(type);
    unsigned char *w = (unsigned char *)test_alloc(65536 * bytes);
    int wrong = 0;
    for (size_t b = 0; b < 65536; b++) {
        uint16_t d = (uint16_t)b;
        for (size_t i = 2; i < bytes; i++) w[b * bytes + i] = (unsigned char)(test_random() >> 56);
        w[b * bytes] = (unsigned char)(d & 255), w[b * bytes + 1] = (unsigned char)(d >> 8);
    }
    CHECK_EQ(decoded_wrong(type, w, 65536), 0);
    for (size_t k = 0; k < sizeof some / sizeof some[0]; k++) {
        for (size_t b = 0; b < 256; b++) {
            memcpy(w + b * bytes, &some[k], 2);
            for (size_t i = 2; i < bytes; i++) w[b * bytes + i] = (unsigned char)(b + 37 * i);
        }
        wrong += decoded_wrong(type, w, 256);
    }
    CHECK_EQ(wrong, 0);
    free(w);
}

/* Is the block what dsv3_quantize says of x [32]? The scale from its rule, and each code the nearest of all. */
static int block_wrong(dsv3_type type, const unsigned char *block, const float *x) {
    double most = 0, d = block_d(block), top = type == DSV3_Q8_0 ? 127 : 8, want;
    int wrong = 0;
    for (size_t i = 0; i < QBLOCK; i++) {
        if (fabs((double)x[i]) > fabs(most)) most = (double)x[i];
    }
    want = value_of(&formats[1], nearest(&formats[1], (float)(fabs(most) / top)));
    if (want < ldexp(1, -14) && want * top < fabs(most)) want += ldexp(1, -24);
    wrong += d != (type == DSV3_Q4_0 && most > 0 ? -want : want);
    wrong += most != 0 && d == 0;
    for (size_t i = 0; i < QBLOCK; i++) {
        int code = block_code(type, block, i), best = 0;
        double v = (double)x[i], error;
        for (int q = lowest_code(type); q <= highest_code(type); q++) {
            double this = fabs(v - d * q), that = fabs(v - d * best);
            if (this < that || (this <= that && best % 2 != 0 && q % 2 == 0)) best = q;
        }
        error = fabs(v - d * code);
        wrong += code != best;
        wrong += !(error <= fabs(d) / 2 || (type == DSV3_Q4_0 && v / d > 7.5 && error <= 1.004 * fabs(d)));
    }
    return wrong;
}

/* Encodes rows x cols into memory that ends where it should, at an odd address. */
static unsigned char *quantized(dsv3_type type, const float *x, size_t rows, size_t cols, dsv3_result want) {
    size_t bytes = rows * dsv3_row_bytes(type, cols);
    unsigned char *memory = (unsigned char *)test_alloc(bytes + 1);
    CHECK_EQ(dsv3_quantize(memory + 1, NULL, x, type, rows, cols, NULL), want);
    return memory;
}

static int quantized_wrong(dsv3_type type, const float *x, size_t rows, size_t cols) {
    unsigned char *memory = quantized(type, x, rows, cols, DSV3_OK);
    int wrong = 0;
    for (size_t b = 0; b < rows * cols / QBLOCK; b++) {
        wrong += block_wrong(type, memory + 1 + b * block_bytes(type), x + b * QBLOCK);
    }
    free(memory);
    return wrong;
}

/* Blocks of every size of number, with equal magnitudes, with ties, and almost empty ones. */
static void blocks_encode(dsv3_type type) {
    enum { ROWS = 64, COLS = 3 * QBLOCK, N = ROWS * COLS };
    float *x = (float *)test_alloc(N * sizeof *x);
    int wrong = 0, top = type == DSV3_Q8_0 ? 127 : 8;
    for (int size = -150; size <= (type == DSV3_Q8_0 ? 22 : 18); size++) {
        for (size_t i = 0; i < N; i++) x[i] = ldexpf(test_uniform(-1, 1), size);
        wrong += quantized_wrong(type, x, ROWS, COLS);
    }
    CHECK_EQ(wrong, 0);
    for (wrong = 0; wrong == 0 && test_random() % 64 != 0;) { /* all sizes in one block */
        for (size_t i = 0; i < N; i++) x[i] = ldexpf(test_uniform(-1, 1), (int)(test_random() % 40) - 30);
        wrong += quantized_wrong(type, x, ROWS, COLS);
    }
    CHECK_EQ(wrong, 0);
    for (size_t i = 0; i < N; i++) { /* halfway between codes, and next to that; d is exact, normal or not */
        float d = ldexpf(1.25f, i / QBLOCK % 2 ? -3 : -20), half = (float)(int)(test_random() % 16) - 8.5f;
        int end = i % QBLOCK == 5;
        x[i] = d * (end ? (float)-top : half);
        if (!end && test_random() % 3 == 0) x[i] = nextafterf(x[i], test_random() % 2 ? 1.0f : -1.0f);
        if (fabsf(x[i]) > d * (float)top) x[i] = 0;
    }
    CHECK_EQ(quantized_wrong(type, x, ROWS, COLS), 0);
    for (size_t i = 0; i < N; i++) x[i] = test_random() % 2 ? 3.0f : -3.0f; /* the first of equals decides */
    CHECK_EQ(quantized_wrong(type, x, ROWS, COLS), 0);
    for (size_t i = 0; i < N; i++)
        x[i] = i % QBLOCK == i / QBLOCK % QBLOCK ? ldexpf(-1, 4 - (int)(i / QBLOCK)) : 0.0f;
    CHECK_EQ(quantized_wrong(type, x, ROWS, COLS), 0);
    for (size_t i = 0; i < N; i++) x[i] = i % 2 ? -0.0f : 0.0f;
    CHECK_EQ(quantized_wrong(type, x, ROWS, COLS), 0);
    free(x);
}

/* Codes that reach the end of their range come back as they were. */
static void blocks_back(dsv3_type type) {
    enum { N = 2000 };
    size_t bytes = block_bytes(type);
    unsigned char *w = (unsigned char *)test_alloc(N * bytes), *again;
    float *x = (float *)test_alloc(N * QBLOCK * sizeof *x), *y = (float *)test_alloc(N * QBLOCK * sizeof *y);
    int wrong = 0;
    for (size_t b = 0; b < N; b++) {
        uint16_t d = (uint16_t)(test_random() % 0x7C00 | (test_random() & 0x8000));
        if (b % 7 == 0) d &= 0x83FF;
        for (size_t i = 2; i < bytes; i++) {
            do {
                w[b * bytes + i] = (unsigned char)(test_random() >> 56);
            } while (type == DSV3_Q8_0 && w[b * bytes + i] == 0x80);
        }
        w[b * bytes + 2 + b % 16] = type == DSV3_Q8_0 ? (b % 2 ? 127 : 129) : 0x40;
        w[b * bytes] = (unsigned char)(d & 255), w[b * bytes + 1] = (unsigned char)(d >> 8);
    }
    dsv3i_plain.decode[type](x, w, N * QBLOCK);
    again = quantized(type, x, N, QBLOCK, DSV3_OK);
    dsv3i_plain.decode[type](y, again + 1, N * QBLOCK);
    for (size_t i = 0; i < N * QBLOCK; i++) wrong += !(x[i] >= y[i] && x[i] <= y[i]);
    CHECK_EQ(wrong, 0);
    free(w), free(again), free(x), free(y);
}

/* Too large, NaN, infinity: in each place of the second of two blocks. */
static void blocks_refused(dsv3_type type) {
    float limit = type == DSV3_Q8_0 ? 127 * 65520.0f : 8 * 65520.0f, x[2 * QBLOCK];
    const struct {
        float x;
        dsv3_result want;
    } cases[] = {{limit, DSV3_ERR_OVERFLOW},    {-limit, DSV3_ERR_OVERFLOW},     {FLT_MAX, DSV3_ERR_OVERFLOW},
                 {-FLT_MAX, DSV3_ERR_OVERFLOW}, {nextafterf(limit, 0), DSV3_OK}, {-nextafterf(limit, 0), DSV3_OK},
                 {INFINITY, DSV3_ERR_NAN},      {-INFINITY, DSV3_ERR_NAN},       {NAN, DSV3_ERR_NAN},
                 {-NAN, DSV3_ERR_NAN}};
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        for (size_t i = QBLOCK; i < 2 * QBLOCK; i++) {
            test_fill(x, 2 * QBLOCK, -1, 1);
            x[i] = cases[k].x;
            free(quantized(type, x, 1, 2 * QBLOCK, cases[k].want));
            if (cases[k].want == DSV3_OK) CHECK_EQ(quantized_wrong(type, x, 1, 2 * QBLOCK), 0);
        }
    }
}

/* ---- dsv3_quantize, types of single numbers */

static void quantize_f8(size_t rows, size_t cols, int size) {
    size_t across = (cols + 127) / 128, blocks = across * ((rows + 127) / 128);
    float *x = (float *)test_alloc(rows * cols * sizeof *x);
    unsigned char *codes = (unsigned char *)test_alloc(rows * cols + 1);
    unsigned char *scales = (unsigned char *)test_alloc(4 * blocks + 1), *alone;
    int wrong = 0;
    for (size_t i = 0; i < rows * cols; i++) {
        x[i] = ldexpf(test_uniform(-1, 1), size - (int)(test_random() % 12) - (int)(i / cols / 128 + i % cols / 128));
    }
    CHECK_EQ(dsv3_quantize(codes + 1, scales + 1, x, DSV3_F8_E4M3, rows, cols, NULL), DSV3_OK);
    for (size_t b = 0; b < blocks; b++) {
        float most = 0, scale, got;
        for (size_t i = 0; i < rows * cols; i++) {
            if (i / cols / 128 * across + i % cols / 128 == b && fabsf(x[i]) > most) most = fabsf(x[i]);
        }
        scale = (float)((double)most / 448);
        if (scale < FLT_MIN) scale = 1;
        memcpy(&got, scales + 1 + 4 * b, 4);
        wrong += memcmp(&got, &scale, 4) != 0;
        for (size_t i = 0; i < rows * cols; i++) {
            if (i / cols / 128 * across + i % cols / 128 != b) continue;
            wrong += codes[1 + i] != nearest(&formats[2], (float)((double)x[i] / (double)scale));
        }
    }
    CHECK_EQ(wrong, 0);
    alone = (unsigned char *)test_alloc(4 * blocks);
    CHECK_EQ(dsv3_quantize(NULL, alone, x, DSV3_F8_E4M3, rows, cols, NULL), DSV3_OK);
    CHECK(memcmp(alone, scales + 1, 4 * blocks) == 0);
    free(x), free(codes), free(scales), free(alone);
}

/* Codes with a largest one, at scales that 448 times them leaves exact, come back as they were. */
static void quantize_f8_back(void) {
    enum { ROWS = 140, COLS = 260 };
    float *x = (float *)test_alloc(ROWS * COLS * sizeof *x), scales[6], again[6];
    unsigned char *w = (unsigned char *)test_alloc(ROWS * COLS), *y = (unsigned char *)test_alloc(ROWS * COLS);
    for (size_t b = 0; b < 6; b++) scales[b] = ldexpf((float)(1 + b), (int)(b * 7) - 20);
    for (size_t i = 0; i < ROWS * COLS; i++) {
        size_t row = i / COLS, col = i % COLS;
        w[i] = (unsigned char)(test_random() % 127 | (test_random() & 128));
        if (row % 128 == 3 && col % 128 == 2) w[i] = 0xFE;
        x[i] = dsv3_f32_from_f8_e4m3(w[i]) * scales[row / 128 * 3 + col / 128];
    }
    CHECK_EQ(dsv3_quantize(y, again, x, DSV3_F8_E4M3, ROWS, COLS, NULL), DSV3_OK);
    CHECK(memcmp(scales, again, sizeof scales) == 0);
    CHECK(memcmp(w, y, ROWS * COLS) == 0);
    free(x), free(w), free(y);
}

static void quantize_plain(void) {
    static const uint32_t bits[] = {0x7FC00000u, 0xFFC00001u, 0x7F800000u, 0xFF800000u, 0x3F800000u, 0x80000000u};
    enum { ROWS = 3, COLS = 67 };
    float x[ROWS * COLS], y[ROWS * COLS];
    uint16_t half[ROWS * COLS];
    int wrong = 0;
    for (size_t i = 0; i < ROWS * COLS; i++) x[i] = i < 6 ? dsv3i_float(bits[i]) : test_uniform(-2, 2);
    CHECK_EQ(dsv3_quantize(y, NULL, x, DSV3_F32, ROWS, COLS, NULL), DSV3_OK);
    CHECK(memcmp(x, y, sizeof x) == 0);
    CHECK_EQ(dsv3_quantize(half, NULL, x, DSV3_F16, ROWS, COLS, NULL), DSV3_OK);
    for (size_t i = 0; i < ROWS * COLS; i++) wrong += half[i] != dsv3_f16_from_f32(x[i]);
    CHECK_EQ(dsv3_quantize(half, NULL, x, DSV3_BF16, ROWS, COLS, NULL), DSV3_OK);
    for (size_t i = 0; i < ROWS * COLS; i++) wrong += half[i] != dsv3_bf16_from_f32(x[i]);
    CHECK_EQ(wrong, 0);
    x[100] = 65519.0f;
    CHECK_EQ(dsv3_quantize(half, NULL, x, DSV3_F16, ROWS, COLS, NULL), DSV3_OK);
    x[100] = -65520.0f;
    CHECK_EQ(dsv3_quantize(half, NULL, x, DSV3_F16, ROWS, COLS, NULL), DSV3_ERR_OVERFLOW);
    CHECK_EQ(dsv3_quantize(half, NULL, x, DSV3_BF16, ROWS, COLS, NULL), DSV3_OK);
    x[100] = FLT_MAX;
    CHECK_EQ(dsv3_quantize(half, NULL, x, DSV3_BF16, ROWS, COLS, NULL), DSV3_ERR_OVERFLOW);
}

static void quantize_refuses(void) {
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    float x[4 * QBLOCK], scale[1];
    unsigned char y[4 * QBLOCK * 4];
    test_fill(x, 4 * QBLOCK, -1, 1);
    for (int type = 0; type < DSV3_TYPES; type++) {
        int is_f8 = type == DSV3_F8_E4M3, blocks = dsv3_type_block((dsv3_type)type) > 1;
        CHECK_EQ(dsv3_quantize(y, scale, x, (dsv3_type)type, 2, 2 * QBLOCK, NULL), DSV3_OK);
        CHECK_EQ(dsv3_quantize(y, scale, NULL, (dsv3_type)type, 2, 2 * QBLOCK, NULL), DSV3_ERR_ARG);
        CHECK_EQ(dsv3_quantize(NULL, scale, x, (dsv3_type)type, 2, 2 * QBLOCK, NULL), is_f8 ? DSV3_OK : DSV3_ERR_ARG);
        CHECK_EQ(dsv3_quantize(y, NULL, x, (dsv3_type)type, 2, 2 * QBLOCK, NULL), is_f8 ? DSV3_ERR_ARG : DSV3_OK);
        CHECK_EQ(dsv3_quantize(y, scale, x, (dsv3_type)type, 2, QBLOCK + 16, NULL), blocks ? DSV3_ERR_ARG : DSV3_OK);
        CHECK_EQ(dsv3_quantize(y, scale, x, (dsv3_type)type, 0, QBLOCK, NULL), DSV3_OK);
        CHECK_EQ(dsv3_quantize(y, scale, x, (dsv3_type)type, 1, 0, NULL), DSV3_OK);
        CHECK_EQ(dsv3_quantize(y, scale, x, (dsv3_type)type, SIZE_MAX / QBLOCK, 2 * QBLOCK, NULL), DSV3_ERR_OVERFLOW);
        for (size_t i = 0; i < 4; i++) {
            x[70] = bad[i];
            CHECK_EQ(dsv3_quantize(y, scale, x, (dsv3_type)type, 2, 2 * QBLOCK, NULL),
                     is_f8 || blocks ? DSV3_ERR_NAN : DSV3_OK);
        }
        x[70] = 0;
    }
    CHECK_EQ(dsv3_quantize(y, scale, x, (dsv3_type)DSV3_TYPES, 2, 2 * QBLOCK, NULL), DSV3_ERR_ARG);
    x[3] = 448 * 6.6e35f; /* below 2^119 */
    CHECK_EQ(dsv3_quantize(y, scale, x, DSV3_F8_E4M3, 1, QBLOCK, NULL), DSV3_OK);
    x[3] = -448 * 6.7e35f;
    CHECK_EQ(dsv3_quantize(y, scale, x, DSV3_F8_E4M3, 1, QBLOCK, NULL), DSV3_ERR_OVERFLOW);
}

static void types(void) {
    CHECK_EQ(dsv3_type_bytes(DSV3_Q8_0), 34);
    CHECK_EQ(dsv3_type_bytes(DSV3_Q4_0), 18);
    for (int type = 0; type <= DSV3_TYPES; type++) {
        int blocks = type == DSV3_Q8_0 || type == DSV3_Q4_0;
        size_t bytes = dsv3_type_bytes((dsv3_type)type);
        CHECK_EQ(dsv3_type_block((dsv3_type)type), blocks ? 32 : 1);
        CHECK_EQ(dsv3_row_bytes((dsv3_type)type, 96), blocks ? 3 * bytes : 96 * bytes);
        CHECK_EQ(dsv3_row_bytes((dsv3_type)type, 97), blocks ? 0 : 97 * bytes);
        CHECK_EQ(dsv3_row_bytes((dsv3_type)type, 0), 0);
    }
    CHECK(dsv3_row_bytes(DSV3_Q8_0, SIZE_MAX / 32 * 32) == SIZE_MAX);
    CHECK(dsv3_row_bytes(DSV3_F32, SIZE_MAX / 4 + 1) == SIZE_MAX);
    CHECK(strcmp(dsv3_type_name(DSV3_Q8_0), "Q8_0") == 0);
    CHECK(strcmp(dsv3_type_name(DSV3_Q4_0), "Q4_0") == 0);
    CHECK_EQ(dsv3_type_bytes(DSV3_F32), 4);
    CHECK_EQ(dsv3_type_bytes(DSV3_F16), 2);
    CHECK_EQ(dsv3_type_bytes(DSV3_BF16), 2);
    CHECK_EQ(dsv3_type_bytes(DSV3_F8_E4M3), 1);
    CHECK_EQ(dsv3_type_bytes((dsv3_type)99), 0);
    CHECK(strcmp(dsv3_type_name(DSV3_F32), "F32") == 0);
    CHECK(strcmp(dsv3_type_name(DSV3_F16), "F16") == 0);
    CHECK(strcmp(dsv3_type_name(DSV3_BF16), "BF16") == 0);
    CHECK(strcmp(dsv3_type_name(DSV3_F8_E4M3), "F8_E4M3") == 0);
    CHECK(strcmp(dsv3_type_name((dsv3_type)99), "unknown") == 0);
}

int main(void) {
    for (size_t i = 0; i < FORMATS; i++) {
        decode_every_code(&formats[i]);
        encode_halfways(&formats[i]);
        encode_random(&formats[i]);
        encode_nan(&formats[i]);
    }
    overflow_edges();
    e4m3_golden();
    finite_and_nan();
    for (int type = DSV3_Q8_0; type <= DSV3_Q4_0; type++) {
        blocks_decode((dsv3_type)type);
        blocks_encode((dsv3_type)type);
        blocks_back((dsv3_type)type);
        blocks_refused((dsv3_type)type);
    }
    quantize_f8(1, 1, 0);
    quantize_f8(3, 200, 20);
    quantize_f8(129, 128, -110);
    quantize_f8(130, 257, -130);
    quantize_f8_back();
    quantize_plain();
    quantize_refuses();
    types();
    return test_done("codecs");
}
