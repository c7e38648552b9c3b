// Where a token goes: the router of DeepSeek-V3 takes the best two of eight experts, and a bias may move its choice.
#include <dsv3.h>

static dsv3_config config;

static void show(const float *bias) {
    const float score[8] = {0.90f, 0.20f, 0.50f, 0.60f, 0.85f, 0.10f, 0.55f, 0.45f};
    float gate[2], scratch[8 + 1];
    int32_t expert[2];
    dsv3_result result = dsv3_router_select(&config, expert, gate, score, bias, NULL, 1, scratch, NULL);
    if (result != DSV3_OK) {
        Serial.println(dsv3_result_string(result));
        return;
    }
    for (int k = 0; k < 2; k++) {
        Serial.print(expert[k]);
        Serial.print(" with weight ");
        Serial.println(gate[k], 4);
    }
}

void setup() {
    const float bias[8] = {0, 0, 0, 0, 0, 0, 0, 0.50f};
    Serial.begin(115200);
    config = dsv3_config_default(); // the router reads no sizes but these:
    config.n_routed_experts = 8;
    config.num_experts_per_tok = 2;
    config.n_group = 1;
    config.topk_group = 1;
    show(NULL);
    show(bias);
}

void loop() {}
