/* Lesson 2: positions and latents. What RoPE keeps, why MLA's two forms are one attention, and what its cache saves.
 *
 * Build and run:  make build/02_rope_and_mla && build/02_rope_and_mla
 * (from the top of the repository: it reads examples/models/micro, or the directory given as its argument)
 * Expected output:
 *     RoPE: a query at position 7 and a key at position 4, then both 1000 positions later
 *       product -0.5258 and -0.5258: it knows their distance, 3, and nothing else
 *       a distance of 30: -0.4227
 *     YaRN: V3's softmax scale is 0.1352 = 192^-1/2 x 1.8739
 *     MLA: 64 tokens through the micro model
 *       largest logit 11.35, largest difference absorbed - expanded 1e-05 or less: yes
 *       in BF16 the cache is half as large; largest difference to F32 below 1 % of it: yes
 *     V3's cache: 576 numbers per token and layer, plain attention 40960: 71 times as much
 *       one token, 61 layers, BF16: 70272 bytes against 4997120
 *       a context of 163840 tokens: 11.5 GB against 818.7 GB
 */
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"

#include <math.h>

#define N 64

static float dot(const float *x, const float *y, size_t n) {
    float sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

/* The product of q at position t with k at position j. */
static float rotated_product(const dsv3_config *config, int32_t t, int32_t j) {
    float q[8] = {1.0f, 0.2f, -0.4f, 0.6f, 0.3f, -0.1f, 0.5f, 0.2f},
          k[8] = {0.5f, 0.3f, 0.1f, 0.4f, -0.2f, 0.6f, 0.1f, -0.3f};
    float cos_sin[2 * 8];
    uint64_t turns[4];
    int32_t positions[2];
    positions[0] = t;
    positions[1] = j;
    dsv3_rope_turns(config, turns, NULL);
    dsv3_rope_table(cos_sin, positions, turns, 1.0f, 2, 8, NULL);
    dsv3_rope_rotate(q, cos_sin, 8, 1, NULL);
    dsv3_rope_rotate(k, cos_sin + 8, 8, 1, NULL);
    return dot(q, k, 8);
}

static void show_rope(const dsv3_config *micro) {
    dsv3_config v3 = dsv3_config_preset(DSV3_PRESET_V3);
    printf("RoPE: a query at position 7 and a key at position 4, then both 1000 positions later\n");
    printf("  product %.4f and %.4f: it knows their distance, 3, and nothing else\n",
           (double)rotated_product(micro, 7, 4), (double)rotated_product(micro, 1007, 1004));
    printf("  a distance of 30: %.4f\n", (double)rotated_product(micro, 34, 4));
    printf("YaRN: V3's softmax scale is %.4f = 192^-1/2 x %.4f\n", (double)dsv3_softmax_scale(&v3),
           (double)dsv3_softmax_scale(&v3) * sqrt(192.0));
}

/* The last token's logits [V] after N tokens of text, in one call, in the given form and cache type. */
static void run(float *logits, const checkpoint *c, dsv3_attention form, dsv3_type cache_type) {
    static const char text[] = "It was the opinion of the whole family that she should be asked.";
    int32_t tokens[N];
    dsv3_context context;
    dsv3_cache cache;
    dsv3_workspace workspace;
    dsv3_batch batch = {N, tokens, NULL, NULL, 1, NULL};
    dsv3_error error;
    char line[200];
    size_t cache_bytes = 0, workspace_bytes = 0;
    void *cache_memory, *workspace_memory;
    for (int i = 0; i < N; i++) tokens[i] = (unsigned char)text[i];
    dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL);
    context.attention = form;
    dsv3_cache_size(&c->config, N, cache_type, &cache_bytes, NULL);
    dsv3_workspace_size(&c->config, N, context.threads, &workspace_bytes, NULL);
    cache_memory = malloc(cache_bytes);
    workspace_memory = malloc(workspace_bytes);
    dsv3_cache_init(&c->config, &cache, N, cache_type, cache_memory, cache_bytes, NULL);
    dsv3_workspace_init(&c->config, &workspace, N, context.threads, workspace_memory, workspace_bytes, NULL);
    if (dsv3_forward(&context, logits, &c->model, &cache, 1, &batch, &workspace, &error) != DSV3_OK) {
        printf("%s\n", dsv3_error_text(&error, line, sizeof line));
        exit(1);
    }
    free(cache_memory);
    free(workspace_memory);
}

static double largest_difference(const float *x, const float *y, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)x[i] - (double)(y != NULL ? y[i] : 0.0f)));
    return worst;
}

static void show_mla(const checkpoint *c) {
    size_t vocabulary = (size_t)c->config.vocab_size;
    float *absorbed = (float *)malloc(vocabulary * sizeof(float)),
          *other = (float *)malloc(vocabulary * sizeof(float));
    double largest;
    run(absorbed, c, DSV3_ATTENTION_ABSORBED, DSV3_F32);
    run(other, c, DSV3_ATTENTION_EXPANDED, DSV3_F32);
    largest = largest_difference(absorbed, NULL, vocabulary);
    printf("MLA: %d tokens through the micro model\n", N);
    printf("  largest logit %.2f, largest difference absorbed - expanded 1e-05 or less: %s\n", largest,
           largest_difference(absorbed, other, vocabulary) <= 1e-5 * largest ? "yes" : "NO");
    run(other, c, DSV3_ATTENTION_ABSORBED, DSV3_BF16);
    printf("  in BF16 the cache is half as large; largest difference to F32 below 1 %% of it: %s\n",
           largest_difference(absorbed, other, vocabulary) <= 1e-2 * largest ? "yes" : "NO");
    free(absorbed);
    free(other);
}

static void show_cache(void) {
    dsv3_config c = dsv3_config_preset(DSV3_PRESET_V3);
    int latent = c.kv_lora_rank + c.qk_rope_head_dim;
    int plain = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim);
    double layers = c.num_hidden_layers, context = c.max_position_embeddings;
    printf("V3's cache: %d numbers per token and layer, plain attention %d: %d times as much\n", latent, plain,
           plain / latent);
    printf("  one token, 61 layers, BF16: %.0f bytes against %.0f\n", 2 * layers * latent, 2 * layers * plain);
    printf("  a context of %.0f tokens: %.1f GB against %.1f GB\n", context, 2e-9 * layers * latent * context,
           2e-9 * layers * plain * context);
}

int main(int argc, char **argv) {
    checkpoint micro;
    st_error error;
    if (checkpoint_open(&micro, argc > 1 ? argv[1] : "examples/models/micro", &error) != ST_OK) {
        printf("%s\n", error.message);
        return 1;
    }
    show_rope(&micro.config);
    show_mla(&micro);
    show_cache();
    checkpoint_close(&micro);
    return 0;
}
