/* Lesson 3: the router, on an example that can be checked by hand. Eight experts in four groups of two; two groups
 * stay, two experts are used. Scores are sigmoids; the bias steers the choice and never the weights.
 *
 *     expert          0     1  |  2     3  |  4     5  |  6     7
 *     score s       0.90  0.20 | 0.50  0.60 | 0.85  0.10 | 0.55  0.45
 *     group sum        1.10    |    1.10    |    0.95    |    1.00
 *
 * Groups 0 and 1 have the largest sums of their two best and stay; from 0.90 0.20 0.50 0.60 experts 0 and 3 are
 * taken, though expert 4 has 0.85: its group is out. Weights: 0.90 and 0.60, divided by their sum 1.50.
 * Then expert 7, which got too few tokens, has been given a bias of 0.30: group 3 now has 0.55 + 0.75 = 1.30, and
 * experts 0 and 7 are taken. Expert 7's weight still comes from its score 0.45.
 *
 * Build and run:  make build/03_router && build/03_router
 * Expected output:
 *     V3, no bias        experts 0 3   weights 0.6000 0.4000
 *     V3, bias 0.3 on 7  experts 0 7   weights 0.6667 0.3333
 *     V3, scaled by 2.5  experts 0 7   weights 1.6667 0.8333
 *     no groups          experts 0 4   weights 0.5143 0.4857
 *     V2, group maximum  experts 0 4   weights 0.9000 0.8500
 *     all scores equal   experts 0 1   weights 0.5000 0.5000
 *     a score is NaN     experts 3 6   weights 0.5217 0.4783  (value not finite)
 */
#define DSV3_IMPLEMENTATION
#include "../dsv3.h"

#include <math.h>
#include <stdio.h>

#define E 8
#define G 4
#define K 2

static void show(const char *what, const dsv3_config *config, const float *score, const float *bias) {
    int32_t idx[K];
    float gate[K], scratch[E + G];
    dsv3_result result = dsv3_router_select(config, idx, gate, score, bias, NULL, 1, scratch, NULL);
    printf("%-18s experts %d %d   weights %.4f %.4f", what, (int)idx[0], (int)idx[1], (double)gate[0],
           (double)gate[1]);
    if (result != DSV3_OK) printf("  (%s)", dsv3_result_string(result));
    printf("\n");
}

int main(void) {
    const float score[E] = {0.90f, 0.20f, 0.50f, 0.60f, 0.85f, 0.10f, 0.55f, 0.45f};
    const float bias[E] = {0, 0, 0, 0, 0, 0, 0, 0.30f};
    float equal[E], broken[E];
    dsv3_config config = dsv3_config_default(); /* the router reads no sizes but these: */
    config.n_routed_experts = E;
    config.num_experts_per_tok = K;
    config.n_group = G;
    config.topk_group = 2;
    show("V3, no bias", &config, score, NULL);
    show("V3, bias 0.3 on 7", &config, score, bias);
    config.routed_scaling_factor = 2.5f;
    show("V3, scaled by 2.5", &config, score, bias);
    config.routed_scaling_factor = 1.0f;

    config.n_group = 1;
    config.topk_group = 1;
    show("no groups", &config, score, NULL);

    /* V2: groups by their best expert, and the scores themselves as weights. */
    config.n_group = G;
    config.topk_group = 2;
    config.topk_method = DSV3_GROUP_LIMITED_GREEDY;
    config.norm_topk_prob = 0;
    show("V2, group maximum", &config, score, NULL);

    /* Ties go to the lower index, for groups and for experts. */
    config.topk_method = DSV3_NOAUX_TC;
    config.norm_topk_prob = 1;
    for (int e = 0; e < E; e++) equal[e] = 0.5f;
    show("all scores equal", &config, equal, NULL);

    /* NaN counts as the lowest score: the choice stays valid, and the result code tells. */
    for (int e = 0; e < E; e++) broken[e] = score[e];
    broken[0] = NAN; /* group 0 is now the last of all */
    show("a score is NaN", &config, broken, NULL);
    return 0;
}
