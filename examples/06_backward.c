/* Lesson 6: a backward pass, and how to know that it is right. One op, RMSNorm, on one row of eight numbers.
 *
 *     y_i = g_i x_i r,  r = 1 / sqrt(mean(x^2) + eps)
 *     dx_i = r g_i dy_i - x_i r^3 sum_j(g_j dy_j x_j) / n,   dg_i = dy_i x_i r
 *
 * dy is the gradient of the loss at y. A loss with just this gradient is sum_i dy_i y_i, and that can be
 * differentiated without any calculus: (loss(x_i + h) - loss(x_i - h)) / 2h, columns "by h". They agree with dsv3.h.
 * "Forgot r" takes r for a constant, the first term alone: a program with it runs, and only a check like this one
 * tells.
 *
 * Which h? The quotient is wrong by about h^2 (times the third derivative), so that h should be small. But y is a
 * float, good to 2^-24 of itself, and the difference of two losses is divided by 2h: rounding adds about 2^-24 / h,
 * so that h should be large. The sum of both is least near h = 2^-8, the cube root of 2^-24: between 4 and 5 digits,
 * and no h shows more. With double in place of float it would be 2^-18, and 10 digits: tests/test_gradients.c
 * compiles dsv3.h so.
 *
 * Build and run:  make build/06_backward && build/06_backward
 * Expected output:
 *     i  dx: dsv3.h    by h  forgot r   dg: dsv3.h    by h
 *     0       1.400   1.400     1.512        0.137   0.137
 *     1       0.910   0.910     1.420        0.610   0.610
 *     2       0.375   0.375     1.213        0.943   0.943
 *     3      -0.031  -0.031     1.022        1.061   1.061
 *     4      -0.231  -0.231     0.895        0.958   0.958
 *     5      -0.282  -0.282     0.764        0.690   0.690
 *     6      -0.279  -0.279     0.546        0.365   0.365
 *     7      -0.240  -0.240     0.251        0.102   0.102
 *     h      digits of dx that are confirmed
 *     2^-1   #
 *     2^-3   ##
 *     2^-5   ###
 *     2^-7   ####
 *     2^-11  ###
 *     2^-14  ##
 *     2^-17  #
 *     2^-21
 */
#define DSV3_IMPLEMENTATION
#include "../dsv3.h"

#include <math.h>
#include <stdio.h>

enum { N = 8 };

static const float eps = 1e-6f, best = 0.0078125f; /* 2^-7 */
static dsv3_context context;
static float x[N], g[N], dy[N]; /* input, gains, and what the rest of the model wants of y */

/* The loss, as a function of all inputs: its gradient at y is dy. The sum is taken in double; y is a float. */
static double loss(const float *row, const float *gains) {
    dsv3_tensor t = {gains, NULL, 1, N, DSV3_F32, 1, 0};
    float y[N];
    double sum = 0;
    dsv3_rmsnorm(&context, y, row, &t, 1, N, eps, NULL);
    for (int i = 0; i < N; i++) sum += (double)dy[i] * (double)y[i];
    return sum;
}

/* (loss(v_i + h) - loss(v_i - h)) / 2h, for element i of x or of g. What was really added is not h but what the float
 * next to v_i + h makes of it: divide by that. */
static double difference(int gain, int i, float h) {
    float v[2][N], *at = &v[gain][i];
    float middle, up, down;
    double above, below;
    for (int j = 0; j < N; j++) {
        v[0][j] = x[j];
        v[1][j] = g[j];
    }
    middle = *at;
    *at = up = middle + h;
    above = loss(v[0], v[1]);
    *at = down = middle - h;
    below = loss(v[0], v[1]);
    return (above - below) / ((double)up - (double)down);
}

/* A wrong gradient that looks right: r g dy, as if 1 / sqrt(mean) were a constant. */
static void forgetful(float *dx) {
    double squares = 0;
    for (int i = 0; i < N; i++) squares += (double)x[i] * (double)x[i];
    for (int i = 0; i < N; i++) dx[i] = (float)((double)(g[i] * dy[i]) / sqrt(squares / N + (double)eps));
}

/* Largest error of the gradient against differences of width h, relative to its largest element. */
static double worst(const float *dx, float h) {
    double error = 0, largest = 0;
    for (int i = 0; i < N; i++) {
        error = fmax(error, fabs((double)dx[i] - difference(0, i, h)));
        largest = fmax(largest, fabs((double)dx[i]));
    }
    return error / largest;
}

/* One '#' for each decimal digit that the differences confirm. */
static void print_digits(const float *dx, int power) {
    int digits = (int)floor(-log10(worst(dx, (float)ldexp(1.0, power))));
    printf("2^%d%s", power, digits > 0 ? power > -10 ? "   " : "  " : "");
    for (int i = 0; i < digits; i++) putchar('#');
    putchar('\n');
}

int main(void) {
    static const int powers[] = {-1, -3, -5, -7, -11, -14, -17, -21};
    dsv3_tensor t = {g, NULL, 1, N, DSV3_F32, 1, 0};
    float dx[N] = {0}, dg[N] = {0}, wrong[N], scratch[1]; /* gradients are added to what stands there: zeros */
    dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL);
    for (int i = 0; i < N; i++) {
        x[i] = (float)sin(0.1 + 0.37 * i);
        g[i] = (float)(1.0 + 0.1 * cos(i));
        dy[i] = (float)cos(0.2 * i);
    }
    dsv3_rmsnorm_backward(&context, dx, dg, dy, x, &t, 1, eps, scratch, NULL);
    forgetful(wrong);
    printf("i  dx: dsv3.h    by h  forgot r   dg: dsv3.h    by h\n");
    for (int i = 0; i < N; i++) {
        printf("%d %11.3f %7.3f %9.3f %12.3f %7.3f\n", i, (double)dx[i], difference(0, i, best), (double)wrong[i],
               (double)dg[i], difference(1, i, best));
    }
    printf("h      digits of dx that are confirmed\n");
    for (size_t i = 0; i < sizeof powers / sizeof *powers; i++) print_digits(dx, powers[i]);
    return 0;
}
