/* The same layouts on both sides of a call, whatever width a side gives its enums. Compiled twice: SIDE is what its
 * function is called, and one of the two has MAIN, too. */
#include <stdio.h>

#include "checkpoint.h"

size_t SIDE(size_t i);
size_t SIDE(size_t i) {
    static const size_t size[] = {
        sizeof(dsv3_result), sizeof(dsv3_numbers), sizeof(dsv3_scoring_func), sizeof(dsv3_topk_method), sizeof(dsv3_group_mask),
        sizeof(dsv3_gate_scaling), sizeof(dsv3_bias_form), sizeof(dsv3_mtp_concat), sizeof(dsv3_mtp_hidden), sizeof(dsv3_rope_type),
        sizeof(dsv3_preset), sizeof(dsv3_type), sizeof(dsv3_backend), sizeof(dsv3_compute), sizeof(dsv3_attention),
        sizeof(dsv3_tensor_kind), sizeof(dsv3_mtp_divisor), sizeof(dsv3_state), sizeof(dsv3_bias_rule), sizeof(dsv3_keep),
        sizeof(json_result), sizeof(json_type), sizeof(st_result), sizeof(st_dtype),
        offsetof(dsv3_error, expected), sizeof(dsv3_error), offsetof(dsv3_config, norm_topk_prob), sizeof(dsv3_config),
        offsetof(dsv3_tensor, rank), sizeof(dsv3_tensor), sizeof(dsv3_context), sizeof(dsv3_model), sizeof(dsv3_workspace),
        offsetof(dsv3_tensor_info, rows), sizeof(dsv3_tensor_info), offsetof(dsv3_cache, layers), sizeof(dsv3_cache),
        sizeof(dsv3_sequence), sizeof(dsv3_balancer), sizeof(dsv3_training), sizeof(dsv3_trainer), sizeof(json_token),
        offsetof(st_tensor, rank), sizeof(st_tensor), sizeof(st_error), sizeof(st_file), sizeof(checkpoint)};
    return i < sizeof size / sizeof size[0] ? size[i] : 0;
}

#ifdef MAIN
size_t other(size_t i);
int main(void) {
    int bad = 0;
    for (size_t i = 0; SIDE(i) != 0 || other(i) != 0; i++) {
        if (SIDE(i) == other(i)) continue;
        printf("size %d: %d here, %d there\n", (int)i, (int)SIDE(i), (int)other(i));
        bad = 1;
    }
    return bad;
}
#endif
