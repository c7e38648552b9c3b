/* test_no_double.c -- sums over a vocabulary on a machine whose double is a float, as compilers for small ones have it.
 *
 * A failure here means that there the many improbable tokens vanish together beside the probable one. The whole
 * implementation is compiled with `double` as another name of float. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double exact(double x) { return exp(x); } /* while double is one */
static double exact_log(double x) { return log(x); }
typedef double real;

#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#define DSV3_NO_OPENMP
#define DSV3_POW powf
#define DSV3_LOG logf
#undef DSV3_SIMD
#undef DBL_MAX
#define DBL_MAX FLT_MAX
#define double float
#include "dsv3.h"
#undef double

#include "test.h"

/* One logit of `high` at `peak`, all others 0. */
static void tail(size_t V, size_t peak, float high) {
    float *z = (float *)test_alloc(V * sizeof *z), one[1] = {1}, nll, *scratch;
    int32_t target = (int32_t)peak;
    dsv3_context context;
    dsv3_tensor head = {z, NULL, V, 1, DSV3_F32, 2, 0};
    real want = exact_log(1 + (real)(V - 1) * exact(-(real)high));
    for (size_t i = 0; i < V; i++) z[i] = i == peak ? high : 0;
    CHECK(fabs((real)dsv3_log_sum_exp(z, V) - ((real)high + want)) <= ldexp(1, -17) + ldexp((real)high, -24));
    CHECK_EQ(dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL), DSV3_OK);
    scratch = (float *)test_alloc(cross_entropy_floats(&context, &head, 1) * sizeof *scratch);
    CHECK_EQ(dsv3_cross_entropy(&context, &nll, one, &head, &target, 1, scratch, NULL), DSV3_OK);
    CHECK(fabs((real)nll - want) <= ldexp(1, -17));
    free(z), free(scratch);
}

int main(void) {
    static const float depth[] = {1, 12, 16, 16.5f, 17, 20.5f, 21, 60};
    static const size_t sizes[] = {1000, 129280, (size_t)1 << 21};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (size_t i = 0; i < sizeof depth / sizeof depth[0]; i++) {
            for (int where = 0; where < 3; where++) tail(sizes[s], (sizes[s] - 1) * (size_t)where / 2, depth[i]);
        }
    }
    return test_done("no_double");
}
