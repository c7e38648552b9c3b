/* Lesson 4: load balancing. Three routers that begin alike see the same skewed stream of tokens.
 *
 *     . nothing   stays as it is
 *     o V2 loss   its weights W go down the gradient of a balance loss, sum_i f_i P_i ([R2] eq. 23-25)
 *     * V3 bias   its bias takes the step b_i += 0.001 sign(mean load - load_i); W stays ([R] 2.1.2)
 *
 * A step has 4096 tokens: of word floor(64 u^3) for u in equal steps from 0 to 1, so that word 0 is a quarter of them
 * (u < 1/4), with noise for the context. MaxVio = largest load / mean load - 1; with 2 of 8 experts for each token,
 * 0 is even and 8/2 - 1 = 3 the worst. The loss balances by changing what the router says about every token, and no
 * language model here pulls the other way. The bias changes who is chosen and nothing else: scores and W know nothing
 * of it. Two biases approach each other by 0.002 a step; the gap of 0.30 that this stream needs takes 150 steps.
 * "last >= 0.1" is the last step whose MaxVio is that high.
 *
 * Build and run:  make build/04_load_balance && build/04_load_balance
 * Expected output:
 *     1.00 |**o.........................................................|
 *     0.70 |  ***********ooooooo                                        |
 *     0.50 |             ****** ooooooooo                               |
 *     0.35 |                   ****      oooooooo                       |
 *     0.25 |                       ***           oooooooooo             |
 *     0.18 |                          **                   oooooooo o   |
 *     0.10 |----------------------------**-------------------------o-ooo|
 *     0.05 |                              **                            |
 *     0.00 |                                ****************************|
 *     MaxVio step 1  201-300  last >= 0.1   loss step 1    300  W moved
 *     .      1.00     1.02          300         1.029  1.030      0 %
 *     o      1.00     0.22          300         1.165  1.006     25 %
 *     *      1.00     0.03          149         1.029  1.002      0 %
 *     V3's biases: -0.16 0.08 0.14 0.13 0.16 0.12 0.08 0.13
 */
#define DSV3_IMPLEMENTATION
#include "../dsv3.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { E = 8, K = 2, D = 8, N = 4096, WORDS = 64, STEPS = 300, COLUMN = 5 }; /* D: width of a token; N: of a step */

typedef struct router {
    dsv3_config config;
    float w[E * D], bias[E];
    double loss[STEPS], max_vio[STEPS];
} router;

static float word[WORDS * D], first_w[E * D], x[N * D], score[N * E], gate[N * K];
static int32_t idx[N * K];
static const char marks[] = ".o*";

/* In -1 .. 1. */
static float noise(dsv3_rng *rng) { return 2.0f * dsv3_random_uniform(rng) - 1.0f; }

static void draw_tokens(dsv3_rng *rng) {
    for (int i = 0; i < N * D; i++) {
        float u = ((float)(i / D) + 0.5f) / (float)N;
        int w = (int)((float)WORDS * u * u * u);
        x[i] = word[w * D + i % D] + 0.35f * (noise(rng) + noise(rng));
    }
}

/* Sends the tokens of step s to experts; score, idx and load [E] are then this step's. */
static void route(const dsv3_context *context, router *r, int s, uint64_t *load, float *linear_scratch) {
    float scratch[E + 1];
    double sums[2 * E];
    dsv3_routing routing = {score, idx, NULL, N, E, K, 0, 0};
    dsv3_tensor w = {r->w, NULL, E, D, DSV3_F32, 2, 0};
    dsv3_router_scores(context, &r->config, score, x, &w, NULL, N, linear_scratch, NULL);
    dsv3_router_select(&r->config, idx, gate, score, r->bias, NULL, N, scratch, NULL);
    for (int e = 0; e < E; e++) load[e] = 0;
    dsv3_load_count(load, idx, NULL, N, E, K, NULL);
    r->max_vio[s] = dsv3_load_statistics(load, E).max_vio;
    dsv3_balance_loss(&r->loss[s], &routing, sums, NULL);
}

/* W -= 0.05 dL/dW. f_i = E load_i / (K N) is a constant, P_i the mean of s_i = softmax(z)_i, z = W x:
 *     dL/dz_ti = s_ti (f_i - sum_j f_j s_tj) / N,   dL/dW_i = sum_t dL/dz_ti x_t */
static void loss_step(router *r, const uint64_t *load) {
    float f[E], dw[E * D] = {0};
    for (int e = 0; e < E; e++) f[e] = (float)load[e] * (float)E / (float)(K * N);
    for (int t = 0; t < N; t++) {
        const float *s = score + t * E;
        float mean = 0;
        for (int e = 0; e < E; e++) mean += f[e] * s[e];
        for (int i = 0; i < E * D; i++) dw[i] += s[i / D] * (f[i / D] - mean) / (float)N * x[t * D + i % D];
    }
    for (int i = 0; i < E * D; i++) r->w[i] -= 0.05f * dw[i];
}

static double mean_vio(const router *r, int from, int to) {
    double sum = 0;
    for (int s = from; s < to; s++) sum += r->max_vio[s];
    return sum / (to - from);
}

/* MaxVio (down) over the steps (right): a router's mark stands where its mean over COLUMN steps belongs. */
static void plot(const router *routers) {
    static const double limit[] = {1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.1, 0.05, 0.0};
    for (int row = 0; row < 9; row++) {
        printf("%4.2f |", limit[row]);
        for (int c = 0; c < STEPS / COLUMN; c++) {
            char mark = row == 6 ? '-' : ' '; /* what is below this line is below 0.1 */
            for (int i = 0; i < 3; i++) {
                double vio = mean_vio(&routers[i], c * COLUMN, (c + 1) * COLUMN);
                if (vio >= limit[row] && (row == 0 || vio < limit[row - 1])) mark = marks[i];
            }
            putchar(mark);
        }
        printf("|\n");
    }
}

static void summary(const router *r, char mark) {
    double moved = 0, all = 0;
    int last = STEPS;
    for (int i = 0; i < E * D; i++) {
        moved += pow((double)(r->w[i] - first_w[i]), 2);
        all += pow((double)first_w[i], 2);
    }
    while (last > 0 && r->max_vio[last - 1] < 0.1) last--;
    printf("%c    %6.2f  %7.2f  %11d  %12.3f  %5.3f  %5.0f %%\n", mark, r->max_vio[0], mean_vio(r, 200, STEPS), last,
           r->loss[0], r->loss[STEPS - 1], 100 * sqrt(moved / all));
}

int main(void) {
    static router routers[3];
    size_t bytes;
    float *scratch;
    dsv3_context context;
    dsv3_rng rng = {3};
    dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL);
    if (dsv3_linear_size(&context, N, D, &bytes, NULL) != DSV3_OK) return 1;
    scratch = (float *)malloc(bytes);
    if (scratch == NULL) return 1;
    for (int i = 0; i < WORDS * D; i++) word[i] = noise(&rng);
    for (int i = 0; i < E * D; i++) first_w[i] = noise(&rng);
    for (int i = 0; i < 3; i++) {
        routers[i].config = dsv3_config_default();
        routers[i].config.n_routed_experts = E;
        routers[i].config.num_experts_per_tok = K;
        for (int j = 0; j < E * D; j++) routers[i].w[j] = first_w[j];
    }
    routers[1].config.scoring_func = DSV3_SOFTMAX; /* ranks experts as the sigmoid does: it chooses alike */
    for (int s = 0; s < STEPS; s++) {
        draw_tokens(&rng);
        for (int i = 0; i < 3; i++) {
            uint64_t load[E];
            route(&context, &routers[i], s, load, scratch);
            if (i == 1) loss_step(&routers[i], load);
            if (i == 2) dsv3_bias_step(routers[i].bias, load, 1, E, DSV3_BIAS_SIGN, 0.001, NULL);
        }
    }
    plot(routers);
    printf("MaxVio step 1  201-300  last >= 0.1   loss step 1    300  W moved\n");
    for (int i = 0; i < 3; i++) summary(&routers[i], marks[i]);
    printf("V3's biases:");
    for (int e = 0; e < E; e++) printf(" %.2f%s", (double)routers[2].bias[e], e < E - 1 ? "" : "\n");
    free(scratch);
    return 0;
}
