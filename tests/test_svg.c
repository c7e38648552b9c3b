/* svg.h: the text of the charts. A failure means that a browser would refuse a picture, show a value in the wrong
 * colour or place, lose a peak or a gap of a line, or that a full disk goes unnoticed. */
#define SVG_IMPLEMENTATION
#include "svg.h"
#include "test.h"
#include <ctype.h>
#include <float.h>
#include <locale.h>

/* ---- Reading what was written */

static char *text; /* of the last picture */
static size_t text_bytes;

static void read_back(FILE *file) {
    size_t n = (size_t)ftell(file);
    rewind(file);
    free(text);
    text = (char *)test_alloc(n + 1);
    text_bytes = fread(text, 1, n, file);
    text[text_bytes] = '\0';
    CHECK_EQ(text_bytes, n);
    fclose(file);
}

static FILE *scratch(void) {
    FILE *file = tmpfile();
    if (file == NULL) fprintf(stderr, "test_svg: no temporary file\n"), exit(2);
    return file;
}

/* How often `what` stands in the text. */
static size_t count(const char *what) {
    size_t n = 0;
    for (const char *at = text; (at = strstr(at, what)) != NULL; at += strlen(what)) n++;
    return n;
}

static int has(const char *what) { return count(what) > 0; }

/* One tag at `at`, behind its '<': pushes or pops its name; returns what follows '>', NULL if the tag is wrong. */
static const char *read_tag(const char *at, char stack[16][16], int *depth) {
    char name[16] = "";
    size_t n = 0;
    int closing = *at == '/', empty;
    if (closing) at++;
    while (isalpha((unsigned char)*at) && n < 15) name[n++] = *at++;
    name[n] = '\0';
    while (*at == ' ') { /* name="value", without < & or what a broken number becomes */
        const char *value;
        for (at++; isalpha((unsigned char)*at) || isdigit((unsigned char)*at) || *at == '-'; at++) {
        }
        if (closing || *at++ != '=' || *at++ != '"') return NULL;
        for (value = at; *at != '"'; at++) {
            if (*at == '\0' || *at == '<' || *at == '&') return NULL;
        }
        for (; value < at; value++) {
            if (strncmp(value, "no data", 7) == 0 || strncmp(value, "nan", 3) == 0) return NULL;
        }
        at++;
    }
    empty = *at == '/';
    if (empty) at++;
    if (n == 0 || *at != '>' || (empty && closing)) return NULL;
    if (closing && (*depth == 0 || strcmp(stack[--*depth], name) != 0)) return NULL;
    if (!closing && !empty && *depth < 16) memcpy(stack[(*depth)++], name, sizeof name);
    return at + 1;
}

/* Tags nest and close, references are numbers, the rest is text. Enough XML for what svg.h writes. */
static int well_formed(void) {
    char stack[16][16];
    int depth = 0;
    const char *at = text;
    if (strncmp(text, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", 52) != 0) return 0;
    while (at != NULL && *at != '\0') {
        if (*at == '<') {
            at = read_tag(at + 1, stack, &depth);
        } else if (*at == '&') {
            if (at[1] != '#' || !isdigit((unsigned char)at[2])) return 0;
            for (at += 2; isdigit((unsigned char)*at); at++) {
            }
            if (*at != ';') return 0;
        } else if ((unsigned char)*at < 0x20 && *at != '\n') {
            return 0;
        } else {
            at++;
        }
    }
    return at != NULL && depth == 0 && (size_t)(at - text) == text_bytes;
}

static void draw_heat(const svg_heat *heat) {
    FILE *file = scratch();
    CHECK_EQ(svg_write_heat(file, heat), 1);
    read_back(file);
    CHECK(well_formed());
}

static void draw_lines(const svg_lines *lines) {
    FILE *file = scratch();
    CHECK_EQ(svg_write_lines(file, lines), 1);
    read_back(file);
    CHECK(well_formed());
}

static svg_heat heat_of(const double *value, size_t rows, size_t columns) {
    svg_heat h;
    memset(&h, 0, sizeof h);
    h.value = value;
    h.rows = rows;
    h.columns = columns;
    return h;
}

static svg_lines lines_of(const svg_series *series, size_t n) {
    svg_lines l;
    memset(&l, 0, sizeof l);
    l.series = series;
    l.count = n;
    return l;
}

/* ---- Ticks */

static void ticks_are(double low, double high, int log_scale, size_t about, size_t n, const double *want) {
    double tick[SVG_MAX_TICKS];
    size_t found = svg_ticks(tick, low, high, log_scale, about);
    CHECK_EQ(found, n);
    for (size_t i = 0; i < n && i < found; i++) {
        char was[40], is[40];
        CHECK(strcmp(svgi_format(is, tick[i], 15), svgi_format(was, want[i], 15)) == 0);
    }
}

static void test_ticks(void) {
    const double fifths[6] = {0, 0.2, 0.4, 0.6, 0.8, 1}, tenths[4] = {0, 0.1, 0.2, 0.3}, fifty[3] = {-50, 0, 50};
    const double steps[4] = {0, 1000, 2000, 3000}, inside[3] = {1.4, 1.6, 1.8}, one[1] = {7};
    const double decades[5] = {0.01, 0.1, 1, 10, 100}, second[6] = {1e-8, 1e-6, 1e-4, 0.01, 1, 100};
    const double fives[7] = {1, 2, 5, 10, 20, 50, 100}, primes[5] = {1, 2, 3, 5, 7}, near[4] = {1.2, 1.4, 1.6, 1.8};
    const double two[2] = {1e12, 1e13};
    double tick[SVG_MAX_TICKS];
    ticks_are(0, 1, 0, 5, 6, fifths);
    ticks_are(0, 0.3, 0, 3, 4, tenths);
    ticks_are(-70, 70, 0, 3, 3, fifty);
    ticks_are(0, 2999.9999999999, 0, 3, 4, steps);
    ticks_are(1.3, 1.9, 0, 4, 3, inside);
    ticks_are(7, 7, 0, 5, 1, one);
    ticks_are(0.01, 100, 1, 6, 5, decades);
    ticks_are(0.009, 101, 1, 6, 5, decades);
    ticks_are(1e-9, 999, 1, 6, 6, second);
    ticks_are(1, 100, 1, 6, 7, fives);
    ticks_are(0.9, 7.5, 1, 6, 5, primes);
    ticks_are(1.2, 1.9, 1, 4, 4, near); /* no power of ten there: the usual numbers */
    ticks_are(1.9e11, 6e13, 1, 3, 2, two);
    CHECK_EQ(svg_ticks(tick, 2, 1, 0, 5), 0);
    CHECK_EQ(svg_ticks(tick, (double)NAN, 1, 0, 5), 0);
    CHECK_EQ(svg_ticks(tick, 0, HUGE_VAL, 0, 5), 0);
    CHECK_EQ(svg_ticks(tick, -HUGE_VAL, 0, 1, 5), 0);
}

/* In range, rising, neither none nor a crowd, for ranges of any size and place. */
static void test_ticks_everywhere(void) {
    int rising = 1, inside = 1, many = 1, round_ones = 1;
    for (int i = 0; i < 20000; i++) {
        double tick[SVG_MAX_TICKS], middle, half;
        size_t about = 1 + (size_t)(test_random() % 12), n;
        int log_scale = i % 2;
        middle = pow(10, (double)test_uniform(-12, 12)) * (i % 4 < 2 ? 1 : -1);
        half = fabs(middle) * pow(10, (double)test_uniform(-6, 3));
        if (log_scale) middle = fabs(middle) + half * 1.0001;
        n = svg_ticks(tick, middle - half, middle + half, log_scale, about);
        many = many && n <= 4 * about + 4 && (n >= 2 || about < 3);
        for (size_t k = 0; k < n; k++) {
            inside = inside && tick[k] >= middle - half * 1.001 && tick[k] <= middle + half * 1.001;
            rising = rising && (k == 0 || tick[k] > tick[k - 1]);
        }
        if (!log_scale && n > 2) {
            double step = tick[1] - tick[0], digit = step / pow(10, floor(log10(step) + 1e-3));
            round_ones = round_ones && (fabs(digit - 1) < 1e-3 || fabs(digit - 2) < 1e-3 || fabs(digit - 5) < 1e-3);
        }
    }
    CHECK(rising);
    CHECK(inside);
    CHECK(many);
    CHECK(round_ones);
}

static void test_extreme_ticks(void) {
    const double range[8][2] = {{-DBL_MAX, DBL_MAX}, {0, DBL_MAX},      {DBL_MAX / 2, DBL_MAX}, {0, 5e-324},
                                {1, 1 + 2.3e-16},    {-1e-310, 1e-310}, {1e15, 1e15 + 2},       {DBL_MIN, DBL_MAX}};
    for (int i = 0; i < 8; i++) {
        for (int log_scale = 0; log_scale < 2; log_scale++) {
            double tick[SVG_MAX_TICKS];
            size_t n = svg_ticks(tick, range[i][0], range[i][1], log_scale, 5);
            int good = n <= SVG_MAX_TICKS;
            for (size_t k = 0; k < n && good; k++) good = isfinite(tick[k]) && (k == 0 || tick[k] > tick[k - 1]);
            CHECK(good);
        }
    }
}

static void test_numbers(void) {
    char buffer[40];
    CHECK(strcmp(svgi_format(buffer, 0.5, 6), "0.5") == 0);
    CHECK(strcmp(svgi_format(buffer, -12.25, 6), "-12.25") == 0);
    CHECK(strcmp(svgi_format(buffer, 1e-5, 6), "1e-5") == 0);
    CHECK(strcmp(svgi_format(buffer, 2.5e120, 6), "2.5e120") == 0);
    CHECK(strcmp(svgi_format(buffer, 1e10, 6), "1e10") == 0);
    CHECK(strcmp(svgi_format(buffer, 20000, 6), "20000") == 0);
    CHECK(strcmp(svgi_format(buffer, (double)NAN, 6), "no data") == 0);
    CHECK(strcmp(svgi_format(buffer, -HUGE_VAL, 6), "no data") == 0);
    CHECK(strlen(svgi_format(buffer, -DBL_MAX / 3, 17)) < 40);
    if (setlocale(LC_NUMERIC, "de_DE.UTF-8") != NULL) { /* where it is installed: 0,5 */
        CHECK(strcmp(svgi_format(buffer, 0.5, 6), "0.5") == 0);
        setlocale(LC_NUMERIC, "C");
    }
}

/* ---- Heat map */

static void test_cells(void) {
    const double value[6] = {0, 1, 2, 1.5, 0.5, 1};
    svg_heat h = heat_of(value, 2, 3);
    h.title = "Loads";
    h.subtitle = "of a test";
    h.row_name = "layer";
    h.column_name = "expert";
    h.value_name = "load";
    h.low = 0;
    h.high = 2;
    draw_heat(&h);
    CHECK_EQ(count("<rect "), 1 + 65 + 6); /* page, colour bar, cells */
    CHECK_EQ(count("<title>"), 1 + 6);
    CHECK(has("<title>Loads</title>") && has("class=\"h\">Loads</text>") && has(">of a test</text>"));
    CHECK(has(" class=\"c0\"><title>layer 0, expert 0: 0</title></rect>"));
    CHECK(has(" class=\"c32\"><title>layer 0, expert 1: 1</title></rect>"));
    CHECK(has(" class=\"c64\"><title>layer 0, expert 2: 2</title></rect>"));
    CHECK(has(" class=\"c48\"><title>layer 1, expert 0: 1.5</title></rect>"));
    CHECK(has("prefers-color-scheme:dark"));
    CHECK(has(".c0{fill:#440154}") && has(".c64{fill:#fde725}")); /* one ramp */
    CHECK(!has("no data"));
    CHECK_EQ(count("\"none\""), 0);
    h.high = 4; /* two colours, each side on its own scale */
    h.middle = 1;
    draw_heat(&h);
    CHECK(has(".c32{fill:#f4f4f3}"));
    CHECK(has(" class=\"c32\"><title>layer 0, expert 1: 1</title>"));
    CHECK(has(" class=\"c16\"><title>layer 1, expert 1: 0.5</title>"));
    CHECK(has(" class=\"c43\"><title>layer 0, expert 2: 2</title>"));
    h.middle = 4; /* an end is no middle */
    draw_heat(&h);
    CHECK(has(".c0{fill:#440154}"));
    h.low = 0.9; /* beyond the ends: the colours of the ends */
    h.high = 1.1;
    draw_heat(&h);
    CHECK(has(" class=\"c0\"><title>layer 0, expert 0: 0</title>"));
    CHECK(has(" class=\"c64\"><title>layer 0, expert 2: 2</title>"));
}

static void test_own_range(void) {
    const double value[3] = {10, 30, 20}, both[3] = {-1, 0, 3}, equal[2] = {5, 5}, zero[2] = {0, 0};
    svg_heat h = heat_of(value, 1, 3);
    draw_heat(&h);
    CHECK(has(" class=\"c0\"><title>0, 0: 10<") && has(" class=\"c64\"><title>0, 1: 30<"));
    CHECK(has(" class=\"c32\"><title>0, 2: 20<"));
    h = heat_of(both, 1, 3); /* both signs: the colours meet at 0 */
    draw_heat(&h);
    CHECK(has(".c32{fill:#f4f4f3}") && has(" class=\"c32\"><title>0, 1: 0<"));
    h = heat_of(equal, 2, 1);
    draw_heat(&h);
    CHECK_EQ(count(" class=\"c32\"><title>"), 2);
    h = heat_of(zero, 2, 1);
    draw_heat(&h);
    h = heat_of(value, 1, 3);
    h.low = (double)NAN;
    h.high = 40;
    draw_heat(&h);
    CHECK(has(" class=\"c64\"><title>0, 1: 30<"));
}

static void test_missing(void) {
    const double value[4] = {1, (double)NAN, HUGE_VAL, -HUGE_VAL}, none[2] = {(double)NAN, (double)NAN};
    svg_heat h = heat_of(value, 2, 2);
    draw_heat(&h);
    CHECK_EQ(count(" class=\"none\"><title>"), 3);
    CHECK_EQ(count(": no data</title>"), 3);
    CHECK(has(">no data</text>") && has("<pattern id=\"none\"")); /* the legend says so */
    h = heat_of(none, 1, 2);
    draw_heat(&h);
    CHECK_EQ(count(" class=\"none\"><title>"), 2);
}

static void test_nothing(void) {
    const double value[1] = {1};
    svg_heat h = heat_of(NULL, 0, 0);
    svg_lines l = lines_of(NULL, 0);
    svg_series s = {NULL, NULL, NULL, 0};
    draw_heat(&h);
    CHECK_EQ(count(">no data</text>"), 1);
    h = heat_of(NULL, 3, 3);
    draw_heat(&h);
    CHECK_EQ(count(">no data</text>"), 1);
    h = heat_of(value, 1, 0);
    h.title = "";
    draw_heat(&h);
    CHECK(!has("<title>"));
    h = heat_of(value, 1, 1); /* one cell */
    draw_heat(&h);
    CHECK_EQ(count("<title>"), 1);
    draw_lines(&l);
    CHECK_EQ(count(">no data</text>"), 1);
    CHECK(has("class=\"grid\"") && has(">1</text>")); /* axes all the same */
    l = lines_of(&s, 1);
    draw_lines(&l);
    CHECK_EQ(count(">no data</text>"), 1);
    l = lines_of(NULL, 5);
    draw_lines(&l);
}

static void test_huge_values(void) {
    const double value[6] = {-DBL_MAX, DBL_MAX, 0, 5e-324, -5e-324, 1};
    svg_heat h = heat_of(value, 2, 3);
    draw_heat(&h);
    CHECK(has(" class=\"c0\"><title>0, 0: -1.798e308<") && has(" class=\"c64\"><title>0, 1: 1.798e308<"));
    h.middle = DBL_MAX; /* one ramp, whose length is no double */
    draw_heat(&h);
    CHECK(has(" class=\"c0\"><title>0, 0: -") && has(" class=\"c32\"><title>0, 2: 0<"));
    h = heat_of(value + 3, 1, 1);
    draw_heat(&h);
    h = heat_of(value + 2, 1, 2); /* a range whose half is 0 */
    draw_heat(&h);
    CHECK_EQ(count(" class=\"c32\"><title>"), 2);
    h = heat_of(value + 1, 1, 1);
    draw_heat(&h);
}

/* The largest that is asked of it: 61 layers of 256 experts, and wider ones. */
static void test_size(void) {
    size_t rows = 61, columns = 256;
    double *value = (double *)test_alloc(8192 * sizeof *value * 4);
    svg_heat h;
    unsigned long width = 0, height = 0;
    for (size_t i = 0; i < 4 * 8192; i++) value[i] = (double)test_uniform(0, 2);
    h = heat_of(value, rows, columns);
    h.row_name = "layer";
    h.column_name = "expert";
    draw_heat(&h);
    CHECK_EQ(count("<title>"), rows * columns);
    CHECK(text_bytes < 2000000);
    CHECK_EQ(sscanf(strstr(text, "viewBox"), "viewBox=\"0 0 %lu %lu", &width, &height), 2);
    CHECK(width > 1000 && width < 1300 && height > 600 && height < 1000);
    CHECK(count("class=\"e\"") > 20 && count("class=\"m\"") > 20); /* labels, not of every cell */
    CHECK(count("class=\"e\"") < 61 && count("class=\"m\"") < 100);
    h = heat_of(value, 4, 8192);
    draw_heat(&h);
    h = heat_of(value, 8192, 4);
    draw_heat(&h);
    free(value);
}

static void test_text(void) {
    const double value[2] = {1, 2};
    const char *const label[2] = {"a<b", "\"q\" & 'r'"}, *const one[1] = {NULL};
    char longest[4001];
    svg_heat h = heat_of(value, 1, 2);
    h.title = "<script>&amp;\x01\x7F\ttab]]>";
    h.subtitle = "\xC3\xA9 \xE6\x97\xA5 \xF0\x9F\x90\xB8 | \xC3 \xC0\xAF \xE0\x80\xAF \xED\xA0\x80 \xF4\x90\x80\x80 "
                 "\xEF\xBF\xBF "
                 "\xC2\x85 \xFF";
    h.column_label = label;
    h.row_label = one;
    draw_heat(&h);
    CHECK(has("<title>&#60;script&#62;&#38;amp;\xEF\xBF\xBD\xEF\xBF\xBD tab]]&#62;</title>"));
    CHECK(has(">\xC3\xA9 \xE6\x97\xA5 \xF0\x9F\x90\xB8 | ")); /* good UTF-8 is kept, the rest replaced byte by byte */
    CHECK(has("| \xEF\xBF\xBD \xEF\xBF\xBD\xEF\xBF\xBD \xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD "));
    CHECK(!has("\xE0"));
    CHECK(!has("\xEF\xBF\xBF") && !has("\xED") && !has("\xF4") && !has("\xC2\x85") && !has("\xFF"));
    CHECK(has("<title>0, a&#60;b: 1</title>") && has(">&#34;q&#34; &#38; &#39;r&#39;</text>"));
    CHECK(has("rotate(-45)")); /* names wider than a cell are turned */
    memset(longest, 'w', 4000);
    longest[4000] = '\0';
    h.title = h.subtitle = h.row_name = h.column_name = h.value_name = longest;
    draw_heat(&h);
    CHECK_EQ(count("\xE2\x80\xA6</text>"), 5); /* cut with an ellipsis */
    h.title = "\xE6\x97";                      /* the string ends within a character */
    draw_heat(&h);
    CHECK(has("<title>\xEF\xBF\xBD\xEF\xBF\xBD</title>"));
}

/* ---- Lines */

/* The d of path number n, n-th of the text. */
static const char *path(size_t n) {
    static char d[4096];
    const char *at = text, *end;
    d[0] = '\0';
    for (size_t i = 0; i <= n && at != NULL; i++) at = strstr(at + 1, "<path class=\"line");
    if (at == NULL || (at = strstr(at, " d=\"")) == NULL || (end = strchr(at + 4, '"')) == NULL) return d;
    snprintf(d, sizeof d, "%.*s", (int)(end - at - 4), at + 4);
    return d;
}

static size_t letters(const char *d, char letter) {
    size_t n = 0;
    for (; *d != '\0'; d++) n += *d == letter;
    return n;
}

static void test_lines(void) {
    const double x[4] = {0, 10, 20, 30}, y[4] = {1, 3, 2, 0};
    svg_series s[2] = {{"a & b", NULL, NULL, 4}, {NULL, NULL, NULL, 2}};
    svg_lines l = lines_of(s, 1);
    double x0, y0, x1, y1, x2, y2, x3, y3;
    s[0].x = s[1].x = x;
    s[0].y = s[1].y = y;
    l.title = "Lines";
    l.x_name = "step";
    l.y_name = "loss <nats>";
    draw_lines(&l);
    CHECK(has(">step</text>") && has(">loss &#60;nats&#62;</text>") && has("<title>a &#38; b</title></path>"));
    CHECK_EQ(count("<path class"), 2); /* legend and line */
    CHECK_EQ(sscanf(path(1), "M%lf %lf %lf %lf %lf %lf %lf %lf", &x0, &y0, &x1, &y1, &x2, &y2, &x3, &y3), 8);
    CHECK(fabs(x1 - x0 - (x3 - x2)) < 0.03 && x0 < x1); /* even steps to the right */
    CHECK(y1 < y2 && y2 < y0 && y0 < y3);               /* larger is higher */
    CHECK(fabs((y0 - y1) - 2 * (y3 - y0)) < 0.05);
    CHECK(!has("clip-path"));
    l.count = 2; /* the second line has its own colour, and no name in the legend */
    draw_lines(&l);
    CHECK(has("\"line l0 d0\"") && has("\"line l1 d0\""));
    l.low = 1; /* cut off */
    l.high = 2;
    draw_lines(&l);
    CHECK(has("clip-path=\"url(#plot)\"") && has("<clipPath id=\"plot\">"));
    l.low = 1e-300; /* points beyond the page by more than a renderer can hold */
    l.high = 2e-300;
    draw_lines(&l);
    CHECK_EQ(sscanf(path(2), "M%lf %lf %lf %lf", &x0, &y0, &x1, &y1), 4);
    CHECK(fabs(y0) < 1e4 && fabs(y1) < 1e4);
}

static void test_gaps(void) {
    const double x[7] = {0, 1, 2, 3, 4, 5, 6}, nan = (double)NAN;
    const double y[7] = {1, 2, nan, 3, HUGE_VAL, 5, 6}, holes[7] = {nan, nan, 1, nan, nan, nan, nan};
    const double bad_x[3] = {0, nan, 2}, low[3] = {-1, 0, 10}, none[3] = {nan, nan, nan};
    svg_series s = {NULL, NULL, NULL, 7};
    svg_lines l = lines_of(&s, 1);
    s.x = x;
    s.y = y;
    draw_lines(&l);
    CHECK_EQ(letters(path(0), 'M'), 3);
    CHECK_EQ(letters(path(0), 'h'), 1); /* the point alone is seen */
    s.y = holes;
    draw_lines(&l);
    CHECK_EQ(letters(path(0), 'M'), 1);
    CHECK_EQ(letters(path(0), 'h'), 1);
    s.n = 3;
    s.x = bad_x;
    s.y = x;
    draw_lines(&l);
    CHECK_EQ(letters(path(0), 'M'), 2);
    s.x = x;
    s.y = low; /* on a logarithmic axis only 10 is there */
    l.log_y = 1;
    draw_lines(&l);
    CHECK_EQ(letters(path(0), 'M'), 1);
    CHECK_EQ(letters(path(0), 'h'), 1);
    s.y = none;
    draw_lines(&l);
    CHECK_EQ(count(">no data</text>"), 1);
    CHECK(path(0)[0] == '\0');
}

static void test_log_axis(void) {
    const double x[3] = {0, 1, 2}, y[3] = {1000, 1, 0.001}, tiny[3] = {5e-324, 1, DBL_MAX};
    svg_series s = {"loss", NULL, NULL, 3};
    svg_lines l = lines_of(&s, 1);
    double x0, y0, x1, y1, x2, y2;
    s.x = x;
    s.y = y;
    l.log_y = 1;
    draw_lines(&l);
    CHECK_EQ(sscanf(path(1), "M%lf %lf %lf %lf %lf %lf", &x0, &y0, &x1, &y1, &x2, &y2), 6);
    CHECK(fabs((y1 - y0) - (y2 - y1)) < 0.03 && y0 < y1); /* decades are equal steps */
    CHECK(has(">1000</text>") && has(">100</text>") && has(">0.001</text>"));
    l.low = 1e-6; /* given ends */
    l.high = 1e6;
    draw_lines(&l);
    CHECK(has(">1e-6</text>"));
    l.low = -1; /* ends that cannot be: those of the points */
    draw_lines(&l);
    CHECK(!has("clip-path") && has(">0.001</text>"));
    s.y = tiny;
    l.low = l.high = 0;
    draw_lines(&l);
}

/* A hundred thousand points: a small file, the peak still there. */
static void test_many_points(void) {
    size_t n = 100000;
    double *x = (double *)test_alloc(n * sizeof *x), *y = (double *)test_alloc(n * sizeof *y), at = 0, top = 1e9,
           first = -1, last = 0, before[4];
    svg_series s = {NULL, NULL, NULL, 0};
    svg_lines l = lines_of(&s, 1);
    char *d;
    size_t pairs = 0;
    for (size_t i = 0; i < n; i++) x[i] = (double)i, y[i] = (double)test_uniform(0, 1);
    y[70001] = 2;
    y[30003] = -1;
    s.x = x;
    s.y = y;
    s.n = n;
    draw_lines(&l);
    CHECK(text_bytes < 100000);
    d = strchr(strstr(text, "<path class"), 'M') + 1;
    while (*d != '"') {
        double px = strtod(d, &d), py = strtod(d, &d);
        if (py < top) top = py, at = px;
        if (pairs == 0) first = px;
        last = px;
        pairs++;
    }
    CHECK(pairs > 2000 && pairs < 4000);
    CHECK(fabs((at - first) / (last - first) - 0.7) < 0.002);
    s.n = 3; /* few points in one column are all kept, in their order */
    x[0] = 0, x[1] = 1e-9, x[2] = 1;
    y[0] = 1, y[1] = 0, y[2] = 1;
    draw_lines(&l);
    CHECK_EQ(letters(path(0), ' '), 5);
    for (size_t i = 0; i < 5; i++) x[i] = i < 4 ? 1e-9 * (double)i : 1;
    y[0] = 1, y[1] = 0, y[2] = 2, y[3] = 0.5, y[4] = 1;
    s.n = 5;
    draw_lines(&l);
    CHECK_EQ(sscanf(path(0), "M%*f %lf %*f %lf %*f %lf %*f %lf", &before[0], &before[1], &before[2], &before[3]), 4);
    CHECK(before[2] < before[0] && before[0] < before[3] && before[3] < before[1]);
    free(x);
    free(y);
}

static void test_flat_and_many(void) {
    const double x[2] = {5, 5}, y[2] = {3, 3}, huge[2] = {-DBL_MAX, DBL_MAX};
    svg_series s[30];
    svg_lines l;
    for (int i = 0; i < 30; i++) s[i].name = "a line with a name", s[i].x = x, s[i].y = y, s[i].n = 2;
    l = lines_of(s, 1);
    draw_lines(&l);
    CHECK(count("class=\"grid\"") > 2 && has(">3</text>") && has(">5</text>"));
    l.count = 30;
    draw_lines(&l);
    CHECK_EQ(count("\"line l0 d0\""), 4); /* line and legend, for series 0 and 21 */
    CHECK_EQ(count("\"line l6 d2\""), 2);
    s[0].x = s[0].y = huge;
    draw_lines(&l);
}

/* ---- Errors */

static void test_errors(void) {
    const double value[1] = {1};
    svg_heat h = heat_of(value, 1, 1);
    svg_lines l = lines_of(NULL, 0);
    FILE *file = fopen("/dev/full", "w");
    if (file != NULL) {
        CHECK_EQ(svg_write_heat(file, &h), 0);
        clearerr(file);
        CHECK_EQ(svg_write_lines(file, &l), 0);
        fclose(file);
    }
    file = fopen("Makefile", "r"); /* a stream that cannot be written to */
    if (file != NULL) {
        CHECK_EQ(svg_write_heat(file, &h), 0);
        clearerr(file);
        CHECK_EQ(svg_write_lines(file, &l), 0);
        fclose(file);
    }
}

int main(void) {
    test_ticks();
    test_ticks_everywhere();
    test_extreme_ticks();
    test_numbers();
    test_cells();
    test_own_range();
    test_missing();
    test_nothing();
    test_huge_values();
    test_size();
    test_text();
    test_lines();
    test_gaps();
    test_log_axis();
    test_many_points();
    test_flat_and_many();
    test_errors();
    free(text);
    return test_done("svg");
}
