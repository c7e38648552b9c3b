/* roofline.h -- a roofline picture as SVG, with the page, colours and axes of examples/svg.h: speed against
 * arithmetic intensity (operations for each byte read), both logarithmic. Above the points stand the roofs: read
 * bandwidth x intensity, and the peaks of the machine's instructions. Include svg.h with SVG_IMPLEMENTATION first. */
#ifndef ROOFLINE_H
#define ROOFLINE_H

#include <math.h>
#include <stdio.h>

#define ROOFLINE_ROOFS 8
#define ROOFLINE_POINTS 64

typedef struct roofline_point {
    char label[32];
    double intensity, speed; /* operations/byte, operations/s */
    int colour;              /* 0 .. 6 */
    int square;              /* bool: else a disc */
} roofline_point;

typedef struct roofline {
    const char *title, *subtitle;
    double read; /* bytes/s */
    size_t roofs;
    const char *roof_name[ROOFLINE_ROOFS];
    double roof[ROOFLINE_ROOFS]; /* operations/s */
    size_t count;
    roofline_point point[ROOFLINE_POINTS];
} roofline;

typedef struct roofline_box {
    double x0, y0, x1, y1;
} roofline_box;

/* The page, and what stands on it already: labels must not lie on other labels, nor on points. */
typedef struct roofline_page {
    svgi_axis x, y;
    double width, height;
    roofline_box taken[2 * ROOFLINE_POINTS + ROOFLINE_ROOFS];
    size_t n_taken;
} roofline_page;

static void roofline_take(roofline_page *p, double x0, double y0, double x1, double y1) {
    roofline_box box = {x0, y0, x1, y1};
    if (p->n_taken < sizeof p->taken / sizeof *p->taken) p->taken[p->n_taken++] = box;
}

static int roofline_free(const roofline_page *p, double x0, double y0, double x1, double y1) {
    if (x0 < p->x.from + 2 || x1 > p->x.to - 2 || y0 < p->y.to + 2 || y1 > p->y.from - 2) return 0;
    for (size_t i = 0; i < p->n_taken; i++) {
        const roofline_box *b = &p->taken[i];
        if (x0 < b->x1 && b->x0 < x1 && y0 < b->y1 && b->y0 < y1) return 0;
    }
    return 1;
}

static void roofline_layout(roofline_page *p, const roofline *r) {
    double left = HUGE_VAL, right = 0, low = HUGE_VAL, high = 0;
    memset(p, 0, sizeof *p);
    for (size_t i = 0; i < r->count; i++) {
        left = svgi_less(left, r->point[i].intensity);
        right = svgi_more(right, r->point[i].intensity);
        low = svgi_less(low, r->point[i].speed);
    }
    for (size_t i = 0; i < r->roofs; i++) {
        high = svgi_more(high, r->roof[i]);
        right = svgi_more(right, 2 * r->roof[i] / r->read);
    }
    p->x.log_scale = p->y.log_scale = 1;
    p->x.low = left / 2;
    p->x.high = right * 2;
    p->y.low = 1e-9 * low / 2;
    p->y.high = 1e-9 * high * 1.7;
    p->width = svgi_page_width(860, r->title, r->subtitle) + 2 * SVGI_MARGIN;
    p->y.to = svgi_titles_height(r->title, r->subtitle) + 33;
    p->y.from = p->y.to + 480;
    p->x.from = SVGI_MARGIN + svgi_tick_space(&p->y) + 10;
    p->x.to = p->width - SVGI_MARGIN - 6;
    p->height = p->y.from + 40 + SVGI_MARGIN;
}

static void roofline_axes(FILE *file, const roofline_page *p) {
    double tick[SVG_MAX_TICKS], at;
    size_t n = svg_ticks(tick, p->y.low, p->y.high, 1, 8);
    for (size_t i = 0; i < n; i++) {
        at = svgi_axis_at(&p->y, tick[i]);
        svgi_line(file, p->x.from, at, p->x.to, at, "grid");
        svgi_number_label(file, p->x.from - 8, at + 4, "e", tick[i], svgi_digits(tick, n));
    }
    n = svg_ticks(tick, p->x.low, p->x.high, 1, 8);
    for (size_t i = 0; i < n; i++) {
        at = svgi_axis_at(&p->x, tick[i]);
        svgi_line(file, at, p->y.to, at, p->y.from, "grid");
        svgi_number_label(file, at, p->y.from + 19, "m", tick[i], svgi_digits(tick, n));
    }
    svgi_line(file, p->x.from, p->y.from, p->x.to, p->y.from, "axis");
    svgi_label(file, SVGI_MARGIN, p->y.to - 17, "", "GFLOP/s (int8: GOP/s)");
    svgi_label(file, (p->x.from + p->x.to) / 2, p->y.from + 40, "m", "operations for each byte of weights read");
}

static void roofline_roofs(FILE *file, roofline_page *p, const roofline *r) {
    char text[96];
    double top = 0;
    for (size_t i = 0; i < r->roofs; i++) {
        double at = svgi_axis_at(&p->y, 1e-9 * r->roof[i]), width;
        top = svgi_more(top, r->roof[i]);
        svgi_line(file, svgi_axis_at(&p->x, r->roof[i] / r->read), at, p->x.to, at, "roof");
        snprintf(text, sizeof text, "%s %.0f", r->roof_name[i], 1e-9 * r->roof[i]);
        width = svgi_width(text, SVGI_FONT);
        svgi_label(file, p->x.to - 4, at - 5, "e", text);
        roofline_take(p, p->x.to - 4 - width, at - 16, p->x.to, at + 2);
    }
    svgi_line(file, p->x.from, svgi_axis_at(&p->y, 1e-9 * r->read * p->x.low), svgi_axis_at(&p->x, top / r->read),
              svgi_axis_at(&p->y, 1e-9 * top), "roof");
    snprintf(text, sizeof text, "read %.1f GB/s", 1e-9 * r->read);
    { /* above the slope, between the points of decode and the first ridge */
        double x = sqrt(p->x.low * top / r->read), px = svgi_axis_at(&p->x, x);
        double py = svgi_axis_at(&p->y, 1e-9 * r->read * x) - 8, width = svgi_width(text, SVGI_FONT);
        svgi_label(file, px - 8, py, "e", text);
        roofline_take(p, px - 8 - width, py - 12, px - 8, py + 4);
    }
}

/* Looks for a free place near the point, nearest first, and draws a line to it if it is not beside the point. */
static void roofline_label(FILE *file, roofline_page *p, const roofline_point *point, double x, double y) {
    double width = svgi_width(point->label, SVGI_FONT);
    for (int step = 0; step < 60; step++) {
        double away = 12.0 * (double)((step / 2 + 1) / 2) * (step / 2 % 2 ? -1.0 : 1.0);
        double out = 9 + 0.35 * fabs(away), left = step % 2 == 0 ? x + out : x - out - width;
        if (!roofline_free(p, left, y + away - 6, left + width, y + away + 6)) continue;
        roofline_take(p, left, y + away - 6, left + width, y + away + 6);
        if (away > 7 || away < -7) {
            svgi_line(file, x, y, step % 2 == 0 ? left - 2 : left + width + 2, y + away, "lead");
        }
        svgi_label(file, left, y + away + 4, "", point->label);
        return;
    }
}

static void roofline_points(FILE *file, roofline_page *p, const roofline *r) {
    for (size_t i = 0; i < r->count; i++) {
        double x = svgi_axis_at(&p->x, r->point[i].intensity), y = svgi_axis_at(&p->y, 1e-9 * r->point[i].speed);
        roofline_take(p, x - 6, y - 6, x + 6, y + 6);
    }
    for (size_t i = 0; i < r->count; i++) {
        double x = svgi_axis_at(&p->x, r->point[i].intensity), y = svgi_axis_at(&p->y, 1e-9 * r->point[i].speed);
        roofline_label(file, p, &r->point[i], x, y);
    }
    for (size_t i = 0; i < r->count; i++) {
        const roofline_point *q = &r->point[i];
        double x = svgi_axis_at(&p->x, q->intensity), y = svgi_axis_at(&p->y, 1e-9 * q->speed);
        svgi_put(file, q->square ? "<rect x=\"" : "<circle cx=\"", q->square ? x - 4.5 : x);
        svgi_put(file, q->square ? "\" y=\"" : "\" cy=\"", q->square ? y - 4.5 : y);
        fputs(q->square ? "\" width=\"9\" height=\"9\"" : "\" r=\"5\"", file);
        fprintf(file, " class=\"p%d\"><title>", q->colour % SVGI_COLOURS);
        svgi_put_text(file, q->label, 1, SVGI_ANY);
        svgi_put(file, ": ", 1e-9 * q->speed);
        svgi_put(file, " GFLOP/s at ", q->intensity);
        fprintf(file, " for each byte</title></%s>\n", q->square ? "rect" : "circle");
    }
}

static void roofline_colours(FILE *file, const uint32_t *colour) {
    for (int i = 0; i < SVGI_COLOURS; i++) fprintf(file, ".p%d{fill:#%06lx}", i, (unsigned long)colour[i]);
    fputs("\n", file);
}

/* 1, or 0 if the file could not be written. */
static int roofline_write(FILE *file, const roofline *r) {
    roofline_page p;
    roofline_layout(&p, r);
    svgi_begin(file, p.width, p.height);
    fputs("<style>\n", file);
    svgi_style(file);
    fputs(".roof{stroke:#59636e;stroke-width:1.6}.lead{stroke:#a6aeb7;stroke-width:.8}\n", file);
    roofline_colours(file, svgi_line_light);
    fputs("@media (prefers-color-scheme:dark){\n", file);
    svgi_dark_style(file);
    fputs(".roof{stroke:#9aa4af}\n", file);
    roofline_colours(file, svgi_line_dark);
    fputs("}\n</style>\n", file);
    svgi_titles(file, p.width - 2 * SVGI_MARGIN, r->title, r->subtitle);
    roofline_axes(file, &p);
    roofline_roofs(file, &p, r);
    roofline_points(file, &p, r);
    return svgi_end(file);
}

#endif /* ROOFLINE_H */
