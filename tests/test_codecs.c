/* test_codecs.c -- chapter 2 (tools), number formats: BF16, F16 and FP8 E4M3, both ways.
 *
 * A failure here means that weights are read as other numbers than the file holds, or that rounding to a small
 * format does not take the nearest number (ties to even), overflows at the wrong place, or loses a NaN. */
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

static void types(void) {
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
    types();
    return test_done("codecs");
}
