/* svg.h -- heat maps and line charts as SVG text, in one header: no allocation, no globals, no script inside.
 *
 * What it is: two functions that lay out a chart and write it to a FILE. The result is a file of its own (or an
 * <img>) that every browser shows: it scales, follows the reader's light or dark theme, and names each cell and line
 * when the mouse rests on it. The colours can be told apart with any common colour blindness.
 *
 * What it is not: a plotting library. Nothing can be placed by hand, and there is no other kind of chart.
 *
 * Use: in exactly one C or C++ file
 *
 *     #define SVG_IMPLEMENTATION
 *     #include "svg.h"
 *
 * and in any other file only the #include. A complete example:
 *
 *     const double loss[4] = {5.5, 3.1, 2.4, NAN}, step[4] = {0, 100, 200, 300};
 *     svg_series series = {"training", step, loss, 4};
 *     svg_lines chart = {0};                      // every field has 0 as its default
 *     FILE *file = fopen("loss.svg", "w");
 *     chart.title = "Loss";
 *     chart.x_name = "step";
 *     chart.y_name = "nats per token";
 *     chart.series = &series;
 *     chart.count = 1;
 *     if (file == NULL || !svg_write_lines(file, &chart) || fclose(file) != 0) return 1;
 *
 * Contract
 *   Ownership: everything belongs to the caller and is only read, during the call.
 *   Errors: 1 is ok; 0 means that the file could not be written (errno says why). The file is flushed, not closed.
 *   Values: any double. What is not finite, or not above 0 on a logarithmic axis, is "no data": an empty cell, a gap.
 *   Text: UTF-8. What may not stand in XML is escaped; bytes that are no UTF-8 and control characters become U+FFFD.
 *   Locale: the decimal point is always '.', whatever setlocale says.
 *   Size: about 100 bytes for each cell; of a line no more than four points for each column of pixels. */
#ifndef SVG_H
#define SVG_H

#if (defined(__STDC_VERSION__) && __STDC_VERSION__ < 199901L) || \
    (!defined(__STDC_VERSION__) && defined(__GNUC__) && !defined(__cplusplus))
#error "svg.h is C99 and C++11: compile with -std=c99 or later"
#define SVGI_IMPLEMENTED /* one message is enough */
#endif

#include <stddef.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A matrix as colours. */
typedef struct svg_heat {
    const char *title, *subtitle;       /* above the picture */
    const char *row_name, *column_name; /* what a row and a column are: "layer", "expert" */
    const char *value_name;             /* beside the colour bar */
    const double *value;                /* [rows, columns] */
    size_t rows, columns;
    const char *const *row_label;    /* [rows]; NULL: 0, 1, 2, ... */
    const char *const *column_label; /* [columns]; NULL: likewise */
    double low,
        high; /* ends of the colours; equal: the least and the largest value. What is beyond looks like the end */
    double middle; /* strictly between low and high: there the colours turn from blue to red. Else one ramp */
} svg_heat;
int svg_write_heat(FILE *file, const svg_heat *heat);

/* One line: n points, in order of x. */
typedef struct svg_series {
    const char *name;
    const double *x, *y;
    size_t n;
} svg_series;

typedef struct svg_lines {
    const char *title, *subtitle;
    const char *x_name, *y_name; /* of the axes */
    const svg_series *series;    /* [count] */
    size_t count;
    int log_y;        /* bool */
    double low, high; /* ends of the y axis; equal: from the points. What is beyond is cut off */
} svg_lines;
int svg_write_lines(FILE *file, const svg_lines *lines);

/* Round numbers from low to high, about `about` of them (1 to SVG_MAX_TICKS / 4), rising; returns how many. With
 * log_scale powers of ten, with multiples if there is room. None if low > high or one is not finite. */
#define SVG_MAX_TICKS 64
size_t svg_ticks(double tick[SVG_MAX_TICKS], double low, double high, int log_scale, size_t about);

#ifdef __cplusplus
}
#endif
#endif /* SVG_H */

#if defined(SVG_IMPLEMENTATION) && !defined(SVGI_IMPLEMENTED)
#define SVGI_IMPLEMENTED

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Numbers */

static double svgi_less(double a, double b) { return a < b ? a : b; }
static double svgi_more(double a, double b) { return a > b ? a : b; }

/* As %g, with a point in every locale and exponents as short as they can be: 1e-5. */
static const char *svgi_format(char text[40], double x, int digits) {
    char raw[40];
    const char *from = raw;
    char *to = text;
    if (!isfinite(x)) {
        memcpy(text, "no data", 8);
        return text;
    }
    snprintf(raw, sizeof raw, "%.*g", digits, x);
    while (*from != '\0') {
        if (*from == 'e') {
            *to++ = *from++;
            if (*from == '-') *to++ = '-';
            while (*from == '+' || *from == '-' || *from == '0') from++;
        } else if (*from == '-' || (*from >= '0' && *from <= '9')) {
            *to++ = *from++;
        } else { /* the locale's decimal point, however many bytes it has */
            *to++ = '.';
            while (*from != '\0' && *from != 'e' && (*from < '0' || *from > '9')) from++;
        }
    }
    *to = '\0';
    return text;
}

/* A coordinate, to a hundredth of a pixel. */
static void svgi_put(FILE *file, const char *before, double x) {
    char text[40];
    fprintf(file, "%s%s", before, svgi_format(text, floor(x * 100 + 0.5) / 100, 8));
}

/* Where x lies between low (0) and high (1). Halves, because high - low may overflow. */
static double svgi_part(double x, double low, double high) {
    double range = high / 2 - low / 2;
    return range > 0 ? (x / 2 - low / 2) / range : 0.5;
}

/* low < high at the end, with room on both sides if they were equal. */
static void svgi_widen(double *low, double *high) {
    if (!(*low <= *high)) *low = 0, *high = 1;
    if (!(*low < *high)) {
        double room = fabs(*low) > 1e-300 ? fabs(*low) / 2 : 0.5;
        *low = svgi_more(*low - room, -1e308);
        *high = svgi_less(*high + room, 1e308);
    }
}

/* Multiples of 1, 2 or 5 times a power of ten. */
static size_t svgi_linear_ticks(double *tick, double low, double high, size_t about) {
    double raw = high / (double)about - low / (double)about, unit = pow(10, floor(log10(raw))), step, from;
    size_t n = 0;
    if (!(raw > 0 && raw < 1e308) || !(unit > 0)) {
        tick[0] = low;
        return 1;
    }
    step = raw < 1.42 * unit ? unit : raw < 3.4 * unit ? 2 * unit : raw < 7.1 * unit ? 5 * unit : 10 * unit;
    from = ceil(low / step - 1e-9);
    for (size_t i = 0; i < SVG_MAX_TICKS; i++) {
        /* Dividing by a whole number keeps 0.3 from becoming 0.30000000000000004. */
        double x = step < 1 && step > 1e-15 ? (from + (double)i) / floor(1 / step + 0.5) : (from + (double)i) * step;
        if (!isfinite(x) || x > high + step * 1e-9) break;
        if (n == 0 || x > tick[n - 1]) tick[n++] = x;
    }
    return n;
}

/* Powers of ten, every one or every second, third ...; where they are few, with multiples. */
static size_t svgi_log_ticks(double *tick, double low, double high, size_t about) {
    static const double multiple[3][5] = {{1, 0, 0, 0, 0}, {1, 2, 5, 0, 0}, {1, 2, 3, 5, 7}};
    double decades = log10(high) - log10(low), every = svgi_more(ceil(decades / (1.5 * (double)about)), 1);
    int kind = decades < 1.2 ? 2 : decades < (double)about / 3 + 0.5 ? 1 : 0;
    size_t n = 0;
    for (double e = every * floor(log10(low) / every); e <= log10(high) + 1e-9; e += every) {
        for (int m = 0; m < 2 * kind + 1 && n < SVG_MAX_TICKS; m++) {
            double x = multiple[kind][m] * pow(10, e);
            if (isfinite(x) && x >= low * (1 - 1e-9) && x <= high * (1 + 1e-9)) tick[n++] = x;
        }
    }
    return n;
}

size_t svg_ticks(double tick[SVG_MAX_TICKS], double low, double high, int log_scale, size_t about) {
    size_t n = 0;
    if (!isfinite(low) || !isfinite(high) || low > high) return 0;
    if (about < 1) about = 1;
    if (about > SVG_MAX_TICKS / 4) about = SVG_MAX_TICKS / 4;
    if (log_scale && low > 0) n = svgi_log_ticks(tick, low, high, about);
    if (n > 2 || (n > 1 && high / 10 >= low)) return n;
    return svgi_linear_ticks(tick, low, high, about); /* for 1.2 to 1.9, too */
}

/* Digits that tell ticks apart: 6, or more where they differ late. */
static int svgi_digits(const double *tick, size_t n) {
    double size = n > 0 ? svgi_more(fabs(tick[0]), fabs(tick[n - 1])) : 0, step = n > 1 ? tick[1] - tick[0] : 0;
    double digits = step > 0 ? ceil(log10(size / step)) + 2 : 0;
    return digits > 17 ? 17 : digits > 6 ? (int)digits : 6;
}

/* ---- Text */

/* One character of UTF-8 at *text, which moves on; U+FFFD for what is none or not allowed in XML. */
static uint32_t svgi_character(const char **text) {
    const unsigned char *s = (const unsigned char *)*text;
    uint32_t c = s[0], least = 0;
    int more = 0;
    if (c >= 0xC2 && c < 0xE0) more = 1, c &= 0x1F, least = 0x80;
    if (c >= 0xE0 && c < 0xF0) more = 2, c &= 0x0F, least = 0x800;
    if (c >= 0xF0 && c < 0xF5) more = 3, c &= 0x07, least = 0x10000;
    *text += 1;
    if (more == 0) return c == '\t' || c == '\n' || c == '\r' ? ' ' : c < 0x20 || c >= 0x7F ? 0xFFFD : c;
    for (int i = 1; i <= more; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0xFFFD;
        c = c << 6 | (s[i] & 0x3Fu);
    }
    if (c < least || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return 0xFFFD;
    *text += more;
    return c < 0xA0 || (c & 0xFFFE) == 0xFFFE ? 0xFFFD : c;
}

static void svgi_put_character(FILE *file, uint32_t c) {
    if (c == '&' || c == '<' || c == '>' || c == '"' || c == '\'') {
        fprintf(file, "&#%u;", (unsigned)c);
    } else if (c < 0x80) {
        fputc((int)c, file);
    } else {
        if (c >= 0x10000) fputc((int)(0xF0 | c >> 18), file);
        if (c >= 0x10000) fputc((int)(0x80 | (c >> 12 & 0x3F)), file);
        if (c >= 0x800 && c < 0x10000) fputc((int)(0xE0 | c >> 12), file);
        fputc((int)(c >= 0x800 ? 0x80 | (c >> 6 & 0x3F) : 0xC0 | c >> 6), file);
        fputc((int)(0x80 | (c & 0x3F)), file);
    }
}

/* About as wide as fonts draw it: a share of the font's size for each character. */
static double svgi_character_width(uint32_t c) {
    return c >= 0x1100 && c != 0xFFFD && (c < 0x2000 || c > 0x2E80) ? 1 : 0.58;
}

static double svgi_width(const char *text, double size) {
    double width = 0;
    while (text != NULL && *text != '\0') width += size * svgi_character_width(svgi_character(&text));
    return width;
}

/* Text cut with an ellipsis where it would grow wider than `most`. */
static void svgi_put_text(FILE *file, const char *text, double size, double most) {
    int cut = svgi_width(text, size) > most;
    double width = cut ? size : 0;
    while (text != NULL && *text != '\0') {
        uint32_t c = svgi_character(&text);
        width += size * svgi_character_width(c);
        if (cut && width > most) break;
        svgi_put_character(file, c);
    }
    if (cut) fputs("\xE2\x80\xA6", file);
}

#define SVGI_FONT 12.0
#define SVGI_TITLE 18.0
#define SVGI_SUBTITLE 13.0
#define SVGI_LABEL_WIDTH 300.0 /* longer labels are cut */
#define SVGI_ANY 1e9           /* wide enough for any text */

static double svgi_label_width(const char *text) { return svgi_less(svgi_width(text, SVGI_FONT), SVGI_LABEL_WIDTH); }

/* At x, y (the base line); classes m and e: centred on x, ending there. */
static void svgi_label(FILE *file, double x, double y, const char *classes, const char *text) {
    svgi_put(file, "<text x=\"", x);
    svgi_put(file, "\" y=\"", y);
    fprintf(file, "\" class=\"%s\">", classes);
    svgi_put_text(file, text, SVGI_FONT, SVGI_LABEL_WIDTH);
    fputs("</text>\n", file);
}

static void svgi_number_label(FILE *file, double x, double y, const char *classes, double value, int digits) {
    char text[40];
    svgi_label(file, x, y, classes, svgi_format(text, value, digits));
}

static void svgi_line(FILE *file, double x0, double y0, double x1, double y1, const char *classes) {
    svgi_put(file, "<line x1=\"", x0);
    svgi_put(file, "\" y1=\"", y0);
    svgi_put(file, "\" x2=\"", x1);
    svgi_put(file, "\" y2=\"", y1);
    fprintf(file, "\" class=\"%s\"/>\n", classes);
}

static void svgi_rect(FILE *file, double x, double y, double width, double height, const char *classes) {
    svgi_put(file, "<rect x=\"", x);
    svgi_put(file, "\" y=\"", y);
    svgi_put(file, "\" width=\"", width);
    svgi_put(file, "\" height=\"", height);
    fprintf(file, "\" class=\"%s\"/>\n", classes);
}

/* ---- The page: size, style, title */

#define SVGI_MARGIN 24.0
#define SVGI_LEAST_WIDTH 420.0 /* of what stands between the margins */
#define SVGI_TITLE_WIDTH 900.0 /* longer titles are cut */

static int svgi_has(const char *text) { return text != NULL && text[0] != '\0'; }

/* Room between the margins for content of this width and its titles. */
static double svgi_page_width(double content, const char *title, const char *subtitle) {
    double text = svgi_more(svgi_width(title, SVGI_TITLE), svgi_width(subtitle, SVGI_SUBTITLE));
    return ceil(svgi_more(svgi_more(content, SVGI_LEAST_WIDTH), svgi_less(text, SVGI_TITLE_WIDTH)));
}

static double svgi_titles_height(const char *title, const char *subtitle) {
    return SVGI_MARGIN + (svgi_has(title) ? 26 : 0) + (svgi_has(subtitle) ? 20 : 0);
}

static void svgi_begin(FILE *file, double width, double height) {
    svgi_put(file, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", width);
    svgi_put(file, " ", height);
    svgi_put(file, "\" width=\"", width);
    svgi_put(file, "\" height=\"", height);
    fputs("\" role=\"img\">\n", file);
}

static void svgi_style(FILE *file) {
    fputs(
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;"
        "font-size:12px;fill:#59636e;font-variant-numeric:tabular-nums}\n"
        ".h{font-size:18px;font-weight:600;fill:#1f2328}.s{font-size:13px}.m{text-anchor:middle}.e{text-anchor:end}\n"
        ".page{fill:#fff}.grid{stroke:#e4e8ec}.axis{stroke:#a6aeb7}\n"
        ".none{fill:url(#none)}.n0{fill:#eceef0}.n1{stroke:#a9b0b8}\n",
        file);
}

static void svgi_dark_style(FILE *file) {
    fputs("text{fill:#9aa4af}.h{fill:#f0f6fc}.page{fill:#11151b}.grid{stroke:#262c35}.axis{stroke:#59636e}\n"
          ".n0{fill:#262c35}.n1{stroke:#59636e}\n",
          file);
}

/* Background and titles. The first <title> names the document. */
static void svgi_titles(FILE *file, double width, const char *title, const char *subtitle) {
    double y = SVGI_MARGIN;
    if (svgi_has(title)) {
        fputs("<title>", file);
        svgi_put_text(file, title, 1, SVGI_ANY);
        fputs("</title>\n", file);
    }
    fputs("<rect width=\"100%\" height=\"100%\" class=\"page\"/>\n", file);
    if (svgi_has(title)) {
        svgi_put(file, "<text x=\"24\" y=\"", y + 16);
        fputs("\" class=\"h\">", file);
        svgi_put_text(file, title, SVGI_TITLE, width);
        fputs("</text>\n", file);
        y += 26;
    }
    if (svgi_has(subtitle)) {
        svgi_put(file, "<text x=\"24\" y=\"", y + 12);
        fputs("\" class=\"s\">", file);
        svgi_put_text(file, subtitle, SVGI_SUBTITLE, width);
        fputs("</text>\n", file);
    }
}

static int svgi_end(FILE *file) {
    fputs("</svg>\n", file);
    return fflush(file) == 0 && !ferror(file);
}

/* ---- Colours: 65 steps, as the classes c0 to c64. In the dark the middle of two colours is dark, too */

#define SVGI_STEPS 65

/* Viridis: as lightness rises evenly, it reads in grey and with any colour blindness. */
static const uint32_t svgi_one_ramp[9] = {0x440154, 0x472d7b, 0x3b528b, 0x2c728e, 0x21918c,
                                          0x28ae80, 0x5ec962, 0xaddc30, 0xfde725};
/* Blue to red over light grey (ColorBrewer's RdBu), and over black (Crameri's berlin). */
static const uint32_t svgi_two_light[11] = {0x053061, 0x2166ac, 0x4393c3, 0x92c5de, 0xd1e5f0, 0xf4f4f3,
                                            0xfddbc7, 0xf4a582, 0xd6604d, 0xb2182b, 0x67001f};
static const uint32_t svgi_two_dark[11] = {0x9eb0ff, 0x72abe8, 0x4590bd, 0x2b6a89, 0x1b4459, 0x1c1e21,
                                           0x451602, 0x6d2c16, 0x9b4e3c, 0xcd7e74, 0xffacac};

static uint32_t svgi_mix(const uint32_t *ramp, size_t n, double t) {
    size_t i = (size_t)(t * (double)(n - 1));
    uint32_t mixed = 0;
    double part;
    if (i > n - 2) i = n - 2;
    part = t * (double)(n - 1) - (double)i;
    for (int shift = 0; shift < 24; shift += 8) {
        double a = ramp[i] >> shift & 0xFF, b = ramp[i + 1] >> shift & 0xFF;
        mixed |= (uint32_t)(a + part * (b - a) + 0.5) << shift;
    }
    return mixed;
}

static void svgi_ramp(FILE *file, const uint32_t *ramp, size_t n) {
    for (int i = 0; i < SVGI_STEPS; i++) {
        fprintf(file, ".c%d{fill:#%06lx}", i, (unsigned long)svgi_mix(ramp, n, (double)i / (SVGI_STEPS - 1)));
    }
    fputs("\n", file);
}

/* ---- Heat map */

typedef struct svgi_map {
    const svg_heat *heat;
    size_t rows, columns; /* 0 of both if there is nothing */
    double low, high, middle;
    int two_colours, missing; /* missing: a value is "no data" */
    double cell_width, cell_height, gap;
    double left, top;               /* of the cells */
    double width, height;           /* of the page */
    size_t row_step, column_step;   /* one label for so many */
    double row_space, column_space; /* for the labels */
    int steep;                      /* column labels are turned */
} svgi_map;

static const char *svgi_name(char text[40], const char *const *label, size_t i) {
    if (label == NULL || label[i] == NULL) {
        snprintf(text, 40, "%lu", (unsigned long)i);
        return text;
    }
    return label[i];
}

static double svgi_widest(const char *const *label, size_t n) {
    char text[40];
    double width = 0;
    for (size_t i = label == NULL && n > 0 ? n - 1 : 0; i < n; i++) { /* of numbers the last is the longest */
        width = svgi_more(width, svgi_label_width(svgi_name(text, label, i)));
    }
    return width;
}

/* The first of 1, 2, 5, 10, 20 ... whose labels have room. */
static size_t svgi_step(double need, double cell) {
    size_t step = 1;
    for (int i = 0; (double)step * cell < need && step < SIZE_MAX / 4; i++) {
        step = i % 3 == 1 ? step / 2 * 5 : step * 2;
    }
    return step;
}

static void svgi_map_range(svgi_map *m) {
    const svg_heat *h = m->heat;
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (size_t i = 0; i < m->rows * m->columns; i++) {
        if (!isfinite(h->value[i])) {
            m->missing = 1;
            continue;
        }
        low = svgi_less(low, h->value[i]);
        high = svgi_more(high, h->value[i]);
    }
    if (isfinite(h->low) && isfinite(h->high) && h->low < h->high) low = h->low, high = h->high;
    svgi_widen(&low, &high);
    m->low = low;
    m->high = high;
    m->middle = h->middle;
    m->two_colours = m->middle > low && m->middle < high;
}

/* Cells as large as the page allows, in whole pixels so that no seams show. */
static double svgi_cell(double page, size_t n, double least, double most) {
    return n > 0 ? svgi_less(svgi_more(floor(page / (double)n), least), most) : most;
}

static svgi_map svgi_map_layout(const svg_heat *h) {
    svgi_map m;
    double label;
    memset(&m, 0, sizeof m);
    m.heat = h;
    if (h->value != NULL && h->rows > 0 && h->columns > 0) m.rows = h->rows, m.columns = h->columns;
    svgi_map_range(&m);
    m.cell_width = svgi_cell(1024, m.columns, 2, 28);
    m.cell_height = svgi_cell(720, m.rows, 2, 26);
    m.gap = m.cell_width >= 12 && m.cell_height >= 12 ? 2 : m.cell_width >= 6 && m.cell_height >= 6 ? 1 : 0;
    label = svgi_widest(h->column_label, m.columns);
    m.steep = h->column_label != NULL && label + 8 > m.cell_width;
    m.column_step = svgi_step(m.steep ? 14 : label + 8, m.cell_width);
    m.column_space = m.steep ? 0.71 * (label + SVGI_FONT) : SVGI_FONT + 4;
    m.row_step = svgi_step(13, m.cell_height);
    m.row_space = svgi_more(svgi_widest(h->row_label, m.rows), svgi_label_width(h->row_name)) + 8;
    if (m.steep) m.row_space = svgi_more(m.row_space, 0.71 * label - m.cell_width / 2); /* the first leans out */
    m.left = SVGI_MARGIN + m.row_space;
    m.top = svgi_titles_height(h->title, h->subtitle) + 66;
    m.width =
        svgi_page_width(m.row_space + (double)m.columns * m.cell_width, h->title, h->subtitle) + 2 * SVGI_MARGIN;
    m.height = m.top + svgi_more((double)m.rows * m.cell_height, 26) + m.column_space +
               (svgi_has(h->column_name) ? 20 : 0) + SVGI_MARGIN;
    return m;
}

/* 0 to 1 along the colours. */
static double svgi_map_part(const svgi_map *m, double x) {
    double t = !m->two_colours ? svgi_part(x, m->low, m->high)
               : x < m->middle ? 0.5 * svgi_part(x, m->low, m->middle)
                               : 0.5 + 0.5 * svgi_part(x, m->middle, m->high);
    return svgi_less(svgi_more(t, 0), 1);
}

static void svgi_bar_ticks(FILE *file, const svgi_map *m, double x, double y, double width) {
    double tick[2 * SVG_MAX_TICKS], last = -HUGE_VAL;
    size_t n = svg_ticks(tick, m->low, m->two_colours ? m->middle : m->high, 0, m->two_colours ? 2 : 5);
    if (m->two_colours) n += svg_ticks(tick + n, m->middle, m->high, 0, 2);
    for (size_t i = 0; i < n; i++) {
        double at = x + width * svgi_map_part(m, tick[i]);
        if (at - last < 30) continue;
        last = at;
        svgi_line(file, at, y, at, y + 4, "axis");
        svgi_number_label(file, at, y + 16, "m", tick[i], svgi_digits(tick, n));
    }
}

/* "value [colours] [] no data" in one line. */
static void svgi_map_legend(FILE *file, const svgi_map *m) {
    double name = svgi_label_width(m->heat->value_name), width = 3.0 * SVGI_STEPS, y = m->top - 58;
    double x = svgi_has(m->heat->value_name) ? SVGI_MARGIN + name + 16 : SVGI_MARGIN + 6;
    if (svgi_has(m->heat->value_name)) svgi_label(file, SVGI_MARGIN, y + 10, "", m->heat->value_name);
    fputs("<g shape-rendering=\"crispEdges\">\n", file);
    for (int i = 0; i < SVGI_STEPS; i++) {
        char classes[16];
        snprintf(classes, sizeof classes, "c%d", i);
        svgi_rect(file, x + 3 * i, y, 3, 11, classes);
    }
    fputs("</g>\n", file);
    svgi_bar_ticks(file, m, x, y + 11, width);
    if (!m->missing) return;
    svgi_rect(file, x + width + 28, y, 11, 11, "none");
    svgi_label(file, x + width + 45, y + 10, "", "no data");
}

/* What "no data" is filled with: never one of the colours. */
static void svgi_hatching(FILE *file) {
    fputs("<defs><pattern id=\"none\" width=\"4\" height=\"4\" patternUnits=\"userSpaceOnUse\" "
          "patternTransform=\"rotate(45)\"><rect width=\"4\" height=\"4\" class=\"n0\"/>"
          "<path d=\"M2 0v4\" class=\"n1\"/></pattern></defs>\n",
          file);
}

static void svgi_map_cell(FILE *file, const svgi_map *m, size_t row, size_t column) {
    double x = m->heat->value[row * m->columns + column], width = m->cell_width - m->gap;
    char text[40];
    svgi_put(file, "<rect x=\"", (double)column * m->cell_width);
    svgi_put(file, "\" width=\"", width);
    svgi_put(file, "\" height=\"", m->cell_height - m->gap);
    if (m->gap > 1) fputs("\" rx=\"2", file);
    if (isfinite(x)) {
        fprintf(file, "\" class=\"c%d\"><title>", (int)(svgi_map_part(m, x) * (SVGI_STEPS - 1) + 0.5));
    } else {
        fputs("\" class=\"none\"><title>", file);
    }
    if (svgi_has(m->heat->row_name)) svgi_put_text(file, m->heat->row_name, 1, SVGI_ANY), fputc(' ', file);
    svgi_put_text(file, svgi_name(text, m->heat->row_label, row), 1, SVGI_ANY);
    fputs(", ", file);
    if (svgi_has(m->heat->column_name)) svgi_put_text(file, m->heat->column_name, 1, SVGI_ANY), fputc(' ', file);
    svgi_put_text(file, svgi_name(text, m->heat->column_label, column), 1, SVGI_ANY);
    fprintf(file, ": %s</title></rect>\n", svgi_format(text, x, 4));
}

static void svgi_map_rows(FILE *file, const svgi_map *m) {
    for (size_t row = 0; row < m->rows; row++) {
        svgi_put(file, "<g transform=\"translate(", m->left);
        svgi_put(file, " ", m->top + (double)row * m->cell_height);
        fprintf(file, ")\"%s>\n", m->gap > 0 ? "" : " shape-rendering=\"crispEdges\"");
        for (size_t column = 0; column < m->columns; column++) svgi_map_cell(file, m, row, column);
        fputs("</g>\n", file);
    }
}

static void svgi_map_labels(FILE *file, const svgi_map *m) {
    const svg_heat *h = m->heat;
    double bottom = m->top + (double)m->rows * m->cell_height, middle;
    char text[40];
    if (svgi_has(h->row_name)) svgi_label(file, m->left - 8, m->top - 9, "e", h->row_name);
    for (size_t i = 0; i < m->rows; i += m->row_step) {
        middle = m->top + ((double)i + 0.5) * m->cell_height - m->gap / 2;
        svgi_label(file, m->left - 8, middle + 4, "e", svgi_name(text, h->row_label, i));
    }
    for (size_t i = 0; i < m->columns; i += m->column_step) {
        middle = m->left + ((double)i + 0.5) * m->cell_width - m->gap / 2;
        if (!m->steep) {
            svgi_label(file, middle, bottom + 15, "m", svgi_name(text, h->column_label, i));
            continue;
        }
        svgi_put(file, "<g transform=\"translate(", middle + 4);
        svgi_put(file, " ", bottom + 12);
        fputs(") rotate(-45)\">", file);
        svgi_label(file, 0, 0, "e", svgi_name(text, h->column_label, i));
        fputs("</g>\n", file);
    }
    if (!svgi_has(h->column_name)) return;
    svgi_label(file, m->left + (double)m->columns * m->cell_width / 2, bottom + m->column_space + 19, "m",
               h->column_name);
}

int svg_write_heat(FILE *file, const svg_heat *heat) {
    svgi_map m = svgi_map_layout(heat);
    svgi_begin(file, m.width, m.height);
    fputs("<style>\n", file);
    svgi_style(file);
    svgi_ramp(file, m.two_colours ? svgi_two_light : svgi_one_ramp, m.two_colours ? 11 : 9);
    fputs("@media (prefers-color-scheme:dark){\n", file);
    svgi_dark_style(file);
    if (m.two_colours) svgi_ramp(file, svgi_two_dark, 11);
    fputs("}\n</style>\n", file);
    svgi_titles(file, m.width - 2 * SVGI_MARGIN, heat->title, heat->subtitle);
    if (m.rows > 0) {
        if (m.missing) svgi_hatching(file);
        svgi_map_legend(file, &m);
        svgi_map_rows(file, &m);
        svgi_map_labels(file, &m);
    } else {
        svgi_label(file, m.width / 2, m.top, "m", "no data");
    }
    return svgi_end(file);
}

/* ---- Line chart */

#define SVGI_COLOURS 7
#define SVGI_DASHES 3

/* Okabe and Ito's colours, for white and, brightened, for dark pages. */
static const uint32_t svgi_line_light[SVGI_COLOURS] = {0x0072b2, 0xd55e00, 0x009e73, 0xc4659a,
                                                       0xdb9200, 0x3fa7e0, 0x4d5560};
static const uint32_t svgi_line_dark[SVGI_COLOURS] = {0x4ba6f0, 0xff8a42, 0x2cc79b, 0xe898c6,
                                                      0xf0b840, 0x97d3f7, 0xc4ccd5};

typedef struct svgi_axis {
    double low, high;
    double from, to; /* pixels */
    int log_scale;
} svgi_axis;

typedef struct svgi_plot {
    const svg_lines *lines;
    svgi_axis x, y;
    double width, height; /* of the page */
    int empty, cut;       /* cut: points may lie beyond the y axis */
} svgi_plot;

static double svgi_axis_at(const svgi_axis *a, double v) {
    double part = a->log_scale ? svgi_part(log10(v), log10(a->low), log10(a->high)) : svgi_part(v, a->low, a->high);
    part = svgi_less(svgi_more(part, -10), 10); /* far beyond the page is far enough */
    return a->from + part * (a->to - a->from);
}

static int svgi_drawable(const svgi_plot *p, const svg_series *s, size_t i) {
    return isfinite(s->x[i]) && isfinite(s->y[i]) && (!p->lines->log_y || s->y[i] > 0);
}

static void svgi_plot_ranges(svgi_plot *p) {
    const svg_lines *l = p->lines;
    double room;
    svgi_axis *x = &p->x, *y = &p->y;
    x->low = y->low = HUGE_VAL;
    x->high = y->high = -HUGE_VAL;
    for (size_t s = 0; l->series != NULL && s < l->count; s++) {
        for (size_t i = 0; i < l->series[s].n; i++) {
            if (!svgi_drawable(p, &l->series[s], i)) continue;
            x->low = svgi_less(x->low, l->series[s].x[i]);
            x->high = svgi_more(x->high, l->series[s].x[i]);
            y->low = svgi_less(y->low, l->series[s].y[i]);
            y->high = svgi_more(y->high, l->series[s].y[i]);
        }
    }
    p->empty = !(x->low <= x->high);
    svgi_widen(&x->low, &x->high);
    svgi_widen(&y->low, &y->high);
    y->log_scale = l->log_y;
    p->cut = isfinite(l->low) && isfinite(l->high) && l->low < l->high && (!l->log_y || l->low > 0);
    if (p->cut) {
        y->low = l->low;
        y->high = l->high;
    } else if (l->log_y) { /* the line does not touch the frame */
        if (y->low <= 0) y->low = y->high / 10;
        room = pow(10, 0.04 * (log10(y->high) - log10(y->low)));
        if (y->low / room > 0) y->low /= room;
        if (isfinite(y->high * room)) y->high *= room;
    } else {
        room = 0.04 * (y->high / 2 - y->low / 2) * 2;
        /* What is never negative is not given a negative axis. */
        y->low = y->low >= 0 && y->low < room ? 0 : svgi_more(y->low - room, -1e308);
        y->high = svgi_less(y->high + room, 1e308);
    }
}

static double svgi_tick_space(const svgi_axis *a) {
    double tick[SVG_MAX_TICKS], width = 0;
    size_t n = svg_ticks(tick, a->low, a->high, a->log_scale, 6);
    for (size_t i = 0; i < n; i++) {
        char text[40];
        width = svgi_more(width, svgi_width(svgi_format(text, tick[i], svgi_digits(tick, n)), SVGI_FONT));
    }
    return width;
}

/* Places the legend's entry that begins at *x, in a new line if it must; returns where it begins. */
static double svgi_entry(const svg_series *s, double *x, double *y, double right) {
    double width = svgi_label_width(s->name) + 28, at;
    if (*x > SVGI_MARGIN && *x + width > right) *x = SVGI_MARGIN, *y += 20;
    at = *x;
    *x += width + 18;
    return at;
}

static int svgi_plot_has_legend(const svg_lines *l) {
    for (size_t s = 0; l->series != NULL && s < l->count; s++) {
        if (svgi_has(l->series[s].name)) return 1;
    }
    return 0;
}

static svgi_plot svgi_plot_layout(const svg_lines *l) {
    svgi_plot p;
    double x = SVGI_MARGIN, y = 0, top, inner = svgi_page_width(720, l->title, l->subtitle);
    memset(&p, 0, sizeof p);
    p.lines = l;
    svgi_plot_ranges(&p);
    p.width = inner + 2 * SVGI_MARGIN;
    for (size_t s = 0; l->series != NULL && s < l->count; s++) {
        svgi_entry(&l->series[s], &x, &y, p.width - SVGI_MARGIN);
    }
    top = svgi_titles_height(l->title, l->subtitle) + (svgi_plot_has_legend(l) ? y + 28 : 0);
    p.y.to = top + (svgi_has(l->y_name) ? 33 : 12);
    p.y.from = p.y.to + 320;
    p.x.from = SVGI_MARGIN + svgi_tick_space(&p.y) + 10;
    p.x.to = p.width - SVGI_MARGIN - 6;
    p.height = p.y.from + 20 + (svgi_has(l->x_name) ? 20 : 0) + SVGI_MARGIN;
    return p;
}

static void svgi_line_styles(FILE *file, const uint32_t *colour) {
    for (int i = 0; i < SVGI_COLOURS; i++) fprintf(file, ".l%d{stroke:#%06lx}", i, (unsigned long)colour[i]);
    fputs("\n", file);
}

static void svgi_plot_grid(FILE *file, const svgi_plot *p) {
    double tick[SVG_MAX_TICKS], at;
    size_t n = svg_ticks(tick, p->y.low, p->y.high, p->y.log_scale, 6);
    for (size_t i = 0; i < n; i++) {
        at = svgi_axis_at(&p->y, tick[i]);
        svgi_line(file, p->x.from, at, p->x.to, at, "grid");
        svgi_number_label(file, p->x.from - 8, at + 4, "e", tick[i], svgi_digits(tick, n));
    }
    svgi_line(file, p->x.from, p->y.from, p->x.to, p->y.from, "axis");
    n = svg_ticks(tick, p->x.low, p->x.high, 0, 8);
    for (size_t i = 0; i < n; i++) {
        at = svgi_axis_at(&p->x, tick[i]);
        svgi_line(file, at, p->y.from, at, p->y.from + 5, "axis");
        svgi_number_label(file, at, p->y.from + 19, "m", tick[i], svgi_digits(tick, n));
    }
    if (svgi_has(p->lines->y_name)) svgi_label(file, SVGI_MARGIN, p->y.to - 17, "", p->lines->y_name);
    if (svgi_has(p->lines->x_name)) {
        svgi_label(file, (p->x.from + p->x.to) / 2, p->y.from + 40, "m", p->lines->x_name);
    }
}

/* What stands between <path class="line l0 d1 and the end of the tag: colours go round, then dashes do. */
static void svgi_line_class(FILE *file, size_t s) {
    fprintf(file, " class=\"line l%d d%d\"", (int)(s % SVGI_COLOURS), (int)(s / SVGI_COLOURS % SVGI_DASHES));
}

static void svgi_plot_legend(FILE *file, const svgi_plot *p) {
    const svg_lines *l = p->lines;
    double x = SVGI_MARGIN, y = svgi_titles_height(l->title, l->subtitle) + 14;
    for (size_t s = 0; s < l->count; s++) {
        double at = svgi_entry(&l->series[s], &x, &y, p->width - SVGI_MARGIN);
        fputs("<path", file);
        svgi_line_class(file, s);
        svgi_put(file, " d=\"M", at + 1);
        svgi_put(file, " ", y);
        fputs("h18\"/>\n", file);
        svgi_label(file, at + 26, y + 4, "", l->series[s].name);
    }
}

/* The points of a line that fall into one column of pixels: first, lowest, highest and last draw the same picture as
 * all of them. */
typedef struct svgi_column {
    double x[4], y[4]; /* first, lowest, highest, last */
    size_t at[4];      /* their places in the series */
    size_t n;
} svgi_column;

static void svgi_column_add(svgi_column *c, double x, double y, size_t at) {
    for (int i = 0; i < 4; i++) {
        if (c->n > 0 && (i == 0 || (i == 1 && y >= c->y[1]) || (i == 2 && y <= c->y[2]))) continue;
        c->x[i] = x;
        c->y[i] = y;
        c->at[i] = at;
    }
    c->n++;
}

/* Writes the column's points in their order, each once; returns how many. */
static size_t svgi_column_flush(FILE *file, svgi_column *c, size_t drawn) {
    int order[4] = {0, 1, 2, 3};
    size_t before = drawn;
    if (c->at[1] > c->at[2]) order[1] = 2, order[2] = 1;
    for (int i = 0; i < 4 && c->n > 0; i++) {
        int k = order[i];
        if (i > 0 && c->at[k] == c->at[order[i - 1]]) continue;
        svgi_put(file, drawn == 0 ? "M" : " ", c->x[k]);
        svgi_put(file, " ", c->y[k]);
        drawn++;
    }
    c->n = 0;
    return drawn - before;
}

static void svgi_plot_series(FILE *file, const svgi_plot *p, size_t index) {
    const svg_series *s = &p->lines->series[index];
    svgi_column c;
    size_t drawn = 0; /* points since the last gap */
    memset(&c, 0, sizeof c);
    fputs("<path", file);
    svgi_line_class(file, index);
    fputs(" d=\"", file);
    for (size_t i = 0; i <= s->n; i++) {
        if (i < s->n && svgi_drawable(p, s, i)) {
            double x = svgi_axis_at(&p->x, s->x[i]), y = svgi_axis_at(&p->y, s->y[i]);
            if (c.n > 0 && (long)x != (long)c.x[0]) drawn += svgi_column_flush(file, &c, drawn);
            svgi_column_add(&c, x, y, i);
        } else {
            drawn += svgi_column_flush(file, &c, drawn);
            if (drawn == 1) fputs("m-1.5 0h3", file); /* a point alone */
            drawn = 0;
        }
    }
    fputs("\">", file);
    if (svgi_has(s->name)) {
        fputs("<title>", file);
        svgi_put_text(file, s->name, 1, SVGI_ANY);
        fputs("</title>", file);
    }
    fputs("</path>\n", file);
}

static void svgi_plot_clip(FILE *file, const svgi_plot *p) {
    svgi_put(file, "<clipPath id=\"plot\"><rect x=\"", p->x.from - 2);
    svgi_put(file, "\" y=\"", p->y.to);
    svgi_put(file, "\" width=\"", p->x.to - p->x.from + 4);
    svgi_put(file, "\" height=\"", p->y.from - p->y.to);
    fputs("\"/></clipPath>\n<g clip-path=\"url(#plot)\">\n", file);
}

int svg_write_lines(FILE *file, const svg_lines *lines) {
    svgi_plot p = svgi_plot_layout(lines);
    svgi_begin(file, p.width, p.height);
    fputs("<style>\n", file);
    svgi_style(file);
    fputs(".line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}"
          ".d1{stroke-dasharray:6 5}.d2{stroke-dasharray:.1 4.5;stroke-width:2.4}\n",
          file);
    svgi_line_styles(file, svgi_line_light);
    fputs("@media (prefers-color-scheme:dark){\n", file);
    svgi_dark_style(file);
    svgi_line_styles(file, svgi_line_dark);
    fputs("}\n</style>\n", file);
    svgi_titles(file, p.width - 2 * SVGI_MARGIN, lines->title, lines->subtitle);
    if (svgi_plot_has_legend(lines)) svgi_plot_legend(file, &p);
    svgi_plot_grid(file, &p);
    if (p.empty) svgi_label(file, (p.x.from + p.x.to) / 2, (p.y.from + p.y.to) / 2, "m", "no data");
    if (p.cut) svgi_plot_clip(file, &p);
    for (size_t s = 0; lines->series != NULL && s < lines->count; s++) svgi_plot_series(file, &p, s);
    if (p.cut) fputs("</g>\n", file);
    return svgi_end(file);
}

#ifdef __cplusplus
}
#endif
#endif /* SVG_IMPLEMENTATION */
