/* test_pack.c -- chapter A: packed models.
 *
 * A failure means that packing changes what a tensor is worth, or that a model which one backend has packed means
 * something else to another one; that dsv3_pack writes past its memory, asks for too much, takes memory that is too
 * small or not aligned, or packs what must stay as it is.
 *
 * All backends of this CPU are tested at once, each as the one that packs and as the one that reads; parallel loops are
 * threads of the test's own only where it says so. */
#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "synthetic.h"

#define ROWS 9
#define MOST 256 /* tensors */

static dsv3_context contexts[DSV3_BACKENDS];
static size_t n_contexts; /* [0] is the reference */

/* ---- A model, and the matrices that packing may move */

typedef struct list {
    dsv3_tensor *at[MOST];
    size_t n;
} list;

static void list_add(list *l, dsv3_tensor *t) {
    if (t->data == NULL) return;
    if (l->n == MOST) exit(2);
    l->at[l->n++] = t;
}

static void list_mlp(list *l, dsv3_mlp *m) {
    list_add(l, &m->gate_proj), list_add(l, &m->up_proj), list_add(l, &m->down_proj);
}

/* Every matrix but for the embedding and kv_b_proj. */
static list list_of(dsv3_model *m) {
    list l;
    memset(&l, 0, sizeof l);
    list_add(&l, &m->lm_head);
    for (int32_t i = 0; i < m->config.num_hidden_layers + m->n_mtp; i++) {
        dsv3_layer *w = &m->layers[i];
        list_add(&l, &w->q_proj), list_add(&l, &w->q_a_proj), list_add(&l, &w->q_b_proj);
        list_add(&l, &w->kv_a_proj_with_mqa), list_add(&l, &w->o_proj);
        list_add(&l, &w->gate);
        list_mlp(&l, &w->mlp);
        for (int32_t e = 0; w->is_moe && e < m->config.n_routed_experts; e++) list_mlp(&l, &w->experts[e]);
        list_mlp(&l, &w->shared_experts);
    }
    for (int32_t k = 0; k < m->n_mtp; k++) {
        list_add(&l, &m->mtp[k].eh_proj), list_add(&l, &m->mtp[k].shared_head_head);
    }
    return l;
}

/* Bytes of a packed matrix: for each panel of 64 rows, in columns of 16, and each piece of 128 terms, of Q8_0 and Q4_0 of 32,
 * words of four bytes for a row's 1, 2, 4 or 8 terms, and, up to a multiple of 64 bytes, a float or F16 for each row. */
static size_t packed_bytes(const dsv3_tensor *t) {
    size_t each = t->type == DSV3_F32                           ? 1
                  : t->type == DSV3_F16 || t->type == DSV3_BF16 ? 2
                  : t->type == DSV3_Q4_0                        ? 8
                                                                : 4;
    size_t bytes = 0, most = dsv3_type_block(t->type) > 1 ? 32 : 128;
    for (size_t r = 0; r < t->rows; r += 64) {
        size_t columns = ((t->rows - r < 64 ? t->rows - r : 64) + 15) / 16;
        for (size_t k = 0; k < t->cols; k += most) {
            size_t terms = t->cols - k < most ? t->cols - k : most, scales = t->type == DSV3_F8_E4M3 ? 4 : 0;
            if (most == 32) scales = columns * 16 * 2;
            bytes += (terms + each - 1) / each * columns * 64 + (scales + 63) / 64 * 64;
        }
    }
    return bytes;
}

/* All rows of a matrix, decoded by chapter 3. */
static float *decoded(const dsv3_context *ctx, const dsv3_tensor *t) {
    float *x = (float *)test_alloc(t->rows * t->cols * sizeof *x);
    for (size_t r = 0; r < t->rows; r++) dsv3i_decode_row(ctx, x + r * t->cols, t, r);
    return x;
}

/* Logits of a few tokens through cache 0. */
static void logits_of(synth *s, const dsv3_context *ctx, dsv3_compute way, float *logits) {
    int32_t token[ROWS];
    s->context = *ctx;
    s->context.compute = way;
    test_state = 5;
    synth_tokens(token, ROWS, s->config.vocab_size);
    dsv3_cache_truncate(&s->caches[0], 0, NULL);
    memset(logits, 0xFF, ROWS * (size_t)s->config.vocab_size * sizeof(float));
    CHECK_EQ(synth_forward(s, logits, token, ROWS, 0, NULL), DSV3_OK);
}

/* ---- Packed by one backend, read by another: tensors are worth the same numbers, and logits have the bits that the
 * reader gets without packing, whatever the finder's memory holds by then */

static void wipe_packed(synth *s, int even) {
    for (size_t i = 0; i < s->count; i++) {
        synth_tensor *t = &s->tensors[i];
        if (t->info.rank == 1 || t->info.kind == DSV3_KIND_EMBED) continue;
        if (strstr(t->info.name, "kv_b_proj") && !even) continue;
        if (strstr(t->info.name, "embed_tokens")) continue;
        if (s->config.tie_word_embeddings && t->info.kind == DSV3_KIND_HEAD) continue;
        memset(t->data, 0x55, t->t.rows * dsv3_row_bytes(t->t.type, t->t.cols));
        if (t->scale != NULL)
            memset(t->scale, 0xFF, (t->t.rows + 127) / 128 * ((t->t.cols + 127) / 128) * sizeof(float));
    }
}

static void check_packed_by(const dsv3_context *packer, const char *name, const dsv3_config *c, int types) {
    synth *s = synth_open(c, types, 81), *plain = synth_open(c, types, 81);
    size_t n = ROWS * (size_t)c->vocab_size, bytes, sum = 0;
    float *want = (float *)test_alloc(n * sizeof *want), *got = (float *)test_alloc(n * sizeof *got);
    list before = list_of(&plain->model), after = list_of(&s->model);
    void *memory;
    size_t even = c->qk_nope_head_dim % 64 == 0 && c->v_head_dim % 64 == 0, wrong = 0, moved = 0;
    for (size_t i = 0; i < before.n; i++) sum += packed_bytes(before.at[i]);
    for (int32_t i = 0; even && i < c->num_hidden_layers; i++) { /* it is packed, and there as it lies */
        sum += 2 * packed_bytes(&plain->model.layers[i].kv_b_proj);
    }
    if (c->tie_word_embeddings) sum -= packed_bytes(&plain->model.lm_head);
    CHECK_EQ(dsv3_pack_size(packer, &s->model, &bytes, NULL), DSV3_OK);
    CHECK(bytes >= sum && bytes <= sum + sum / 50 + 64 * (before.n + 8)); /* and alignment of each */
    memory = synth_alloc(bytes);
    CHECK_EQ(dsv3_pack(packer, &s->model, memory, bytes, NULL), DSV3_OK);
    wipe_packed(s, even != 0);
    for (size_t i = 0; i < before.n; i++) {
        float *x = decoded(&contexts[0], before.at[i]), *y = decoded(packer, after.at[i]);
        const unsigned char *at = (const unsigned char *)after.at[i]->data, *base = (const unsigned char *)memory;
        int is_tied = c->tie_word_embeddings && i == 0;
        wrong += memcmp(x, y, before.at[i]->rows * before.at[i]->cols * sizeof *x) != 0;
        moved += (after.at[i]->packed != 0) == is_tied;
        moved += (at >= base && at + packed_bytes(after.at[i]) <= base + bytes) == is_tied;
        moved += after.at[i]->rows != before.at[i]->rows || after.at[i]->cols != before.at[i]->cols;
        moved += after.at[i]->type != before.at[i]->type || after.at[i]->rank != before.at[i]->rank;
        free(x), free(y);
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(moved, 0);
    for (int32_t i = 0; i < c->num_hidden_layers; i++) {
        const dsv3_layer *w = &s->model.layers[i];
        CHECK(!w->kv_b_proj.packed && (w->kv_b_packed.data != NULL) == (even != 0));
        if (even) CHECK(w->kv_b_packed.packed && w->kv_b_packed.rows == w->kv_b_proj.rows);
    }
    CHECK(!s->model.embed_tokens.packed);
    synth_run(s, ROWS, 1, 1, ROWS, DSV3_F32), synth_run(plain, ROWS, 1, 1, ROWS, DSV3_F32);
    for (size_t reader = 0; reader < n_contexts; reader++) {
        for (int way = 0; way < 4; way++) {
            dsv3_context ctx = contexts[reader];
            char line[200];
            ctx.attention = way & 2 ? DSV3_ATTENTION_EXPANDED : DSV3_ATTENTION_ABSORBED;
            logits_of(plain, &ctx, way & 1 ? DSV3_FAST : DSV3_EXACT, want);
            logits_of(s, &ctx, way & 1 ? DSV3_FAST : DSV3_EXACT, got);
            snprintf(line, sizeof line, "%s, types %d, packed by %s, read by %s, way %d", name, types,
                     packer->backend, ctx.backend, way);
            test_count(memcmp(got, want, n * sizeof *got) == 0, __FILE__, __LINE__, line);
        }
    }
    synth_close(s), synth_close(plain), synth_release(memory);
    free(want), free(got);
}

static void check_packed(const dsv3_context *packer) {
    dsv3_config even = dsv3_config_default();
    synth_sizes(&even, 131, 160, 192, 96, 2, 1);
    synth_attention(&even, 2, 64, 96, 64, 16, 128);
    synth_experts(&even, 4, 1, 2, 1, 1, 1.0f);
    for (int types = 0; types < SYNTH_TYPES; types++) check_packed_by(packer, "even", &even, types);
    for (int which = 0; which < SYNTH_CONFIGS; which++) {
        int types;
        dsv3_config c = synth_config(which, &types);
        c.num_nextn_predict_layers = 0; /* see below */
        check_packed_by(packer, synth_name(which), &c, types);
    }
}

/* ---- MTP modules: a head of the file's own is packed, the main model's is not packed twice */

static void check_modules(const dsv3_context *packer, int copies) {
    dsv3_config c = synth_config(SYNTH_MTP, NULL);
    synth *s = synth_make(&c, SYNTH_BF16, 82);
    size_t bytes, more;
    void *memory;
    for (size_t i = 0; i < s->count && !copies; i++) {
        if (s->tensors[i].info.optional) s->tensors[i].info.name[0] = '\0';
    }
    synth_demand(synth_bind(s, NULL), "bind", NULL);
    CHECK_EQ(s->model.n_mtp, 1);
    CHECK_EQ(s->model.mtp[0].shared_head_head.data == s->model.lm_head.data, !copies);
    CHECK_EQ(dsv3_pack_size(packer, &s->model, &bytes, NULL), DSV3_OK);
    memory = synth_alloc(bytes);
    CHECK_EQ(dsv3_pack(packer, &s->model, memory, bytes, NULL), DSV3_OK);
    CHECK(s->model.mtp[0].eh_proj.packed && s->model.mtp[0].shared_head_head.packed && s->model.lm_head.packed);
    CHECK(s->model.layers[c.num_hidden_layers].o_proj.packed);
    CHECK_EQ(s->model.mtp[0].shared_head_head.data == s->model.lm_head.data, !copies);
    CHECK(!s->model.mtp[0].embed_tokens.packed);
    if (copies) {
        float *x = decoded(packer, &s->model.mtp[0].shared_head_head);
        const synth_tensor *t = synth_get(s, c.num_hidden_layers, -1, "shared_head.head.weight");
        int wrong = 0;
        for (size_t i = 0; i < t->t.rows * t->t.cols; i++) wrong += (double)x[i] != t->value[i];
        CHECK_EQ(wrong, 0);
        free(x);
    }
    CHECK_EQ(dsv3_pack_size(packer, &s->model, &more, NULL), DSV3_OK);
    CHECK_EQ(more, 0);
    synth_close(s), synth_release(memory);
}

/* ---- Errors, packing again, threads */

static void check_errors(const dsv3_context *packer) {
    dsv3_config c = synth_config(SYNTH_V3, NULL);
    synth *s = synth_open(&c, SYNTH_FP8, 83);
    dsv3_model before = s->model, packed;
    size_t bytes = 7, again = 7, tables = s->model_bytes;
    unsigned char *memory, *copy = (unsigned char *)test_alloc(tables);
    CHECK_EQ(dsv3_pack_size(NULL, &s->model, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_pack_size(packer, NULL, &bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_pack_size(packer, &s->model, NULL, NULL), DSV3_ERR_ARG);
    CHECK_EQ(bytes, 7);
    memcpy(copy, s->model_memory, tables);
    CHECK_EQ(dsv3_pack_size(packer, &s->model, &bytes, NULL), DSV3_OK);
    memory = (unsigned char *)synth_alloc(bytes + 64);
    memset(memory, 0xA5, bytes + 64);
    CHECK_EQ(dsv3_pack(NULL, &s->model, memory, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_pack(packer, NULL, memory, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_pack(packer, &s->model, NULL, bytes, NULL), DSV3_ERR_ARG);
    CHECK_EQ(dsv3_pack(packer, &s->model, memory, bytes - 1, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_pack(packer, &s->model, memory, 0, NULL), DSV3_ERR_MEMORY);
    CHECK_EQ(dsv3_pack(packer, &s->model, memory + 1, bytes, NULL), DSV3_ERR_ALIGN);
    for (size_t i = 0; i < bytes + 64; i++) again += memory[i] != 0xA5;
    CHECK_EQ(again, 7); /* nothing is written after an error */
    CHECK(memcmp(&before, &s->model, sizeof before) == 0 && memcmp(copy, s->model_memory, tables) == 0);
    CHECK_EQ(dsv3_pack(packer, &s->model, memory, bytes, NULL), DSV3_OK);
    for (size_t i = bytes; i < bytes + 64; i++) again += memory[i] != 0xA5;
    CHECK_EQ(again, 7);
    packed = s->model;
    memcpy(copy, s->model_memory, tables);
    CHECK_EQ(dsv3_pack_size(packer, &s->model, &again, NULL), DSV3_OK);
    CHECK_EQ(again, 0);
    CHECK_EQ(dsv3_pack(packer, &s->model, NULL, 0, NULL), DSV3_OK); /* again: nothing to do */
    CHECK(memcmp(&packed, &s->model, sizeof packed) == 0 && memcmp(copy, s->model_memory, tables) == 0);
    synth_close(s), synth_release(memory), free(copy);
}

/* A backend that reads weights as they lie wants no memory and moves nothing. */
static void check_nothing(void) {
    dsv3_config c = synth_config(SYNTH_V3, NULL);
    synth *s = synth_open(&c, SYNTH_FP8, 84);
    dsv3_model before = s->model;
    size_t bytes = 7;
    CHECK_EQ(dsv3_pack_size(&contexts[0], &s->model, &bytes, NULL), DSV3_OK);
    CHECK_EQ(bytes, 0);
    CHECK_EQ(dsv3_pack(&contexts[0], &s->model, NULL, 0, NULL), DSV3_OK);
    CHECK(memcmp(&before, &s->model, sizeof before) == 0);
    synth_close(s);
}

static void backwards(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    ++*(int *)user;
    while (n-- > 0) task(arg, n, n + 1, n % threads);
}

/* The same bytes, in whatever pieces, and by whichever backend. */
static void check_bytes(const dsv3_context *packer) {
    dsv3_config c = synth_config(SYNTH_BLOCKS, NULL);
    synth_sizes(&c, 1000, 640, 1000, 136, 2, 1); /* large enough for parallel loops */
    for (int types = 0; types < SYNTH_TYPES; types++) {
        synth *s[2];
        unsigned char *memory[2];
        dsv3_context ctx = *packer;
        size_t bytes = 0;
        int calls = 0;
        for (int i = 0; i < 2; i++) {
            s[i] = synth_open(&c, types, 85);
            CHECK_EQ(dsv3_pack_size(i ? packer : &contexts[1], &s[i]->model, &bytes, NULL), DSV3_OK);
            memory[i] = (unsigned char *)synth_alloc(bytes);
            memset(memory[i], 0, bytes);
            ctx.parallel_for = i ? backwards : NULL, ctx.parallel_user = &calls, ctx.threads = i ? 3 : 1;
            CHECK_EQ(dsv3_pack(i ? &ctx : &contexts[1], &s[i]->model, memory[i], bytes, NULL), DSV3_OK);
        }
        CHECK(calls > 0);
        if (dsv3_type_block(s[0]->model.lm_head.type) == 1) CHECK(memcmp(memory[0], memory[1], bytes) == 0);
        for (int i = 0; i < 2; i++) synth_close(s[i]), synth_release(memory[i]);
    }
}

/* ---- FP8 without scales, in a model that the caller has put together: 1 everywhere, packed or not */

static void check_unscaled(const dsv3_context *packer) {
    dsv3_config c = synth_config(SYNTH_BLOCKS, NULL);
    synth *s;
    size_t d = 300, V = 131, bytes;
    float *x, *want[2], *got, *scratch;
    void *memory;
    synth_sizes(&c, (int)V, (int)d, 32, 32, 2, 1);
    s = synth_open(&c, SYNTH_BF16, 86);
    x = (float *)test_alloc(5 * d * sizeof *x), got = (float *)test_alloc(5 * V * sizeof *got);
    scratch = (float *)test_alloc(linear_floats(packer, 5, d) * sizeof *scratch);
    test_fill(x, 5 * d, -1, 1);
    s->model.lm_head.type = DSV3_F8_E4M3; /* the bytes of the BF16 head, most of them numbers */
    for (size_t i = 0; i < V * d; i++) {
        unsigned char *code = synth_get(s, -1, -1, "lm_head.weight")->data + i;
        *code = (unsigned char)(*code % 128 == 127 ? 0 : *code);
    }
    for (int fast = 0; fast < 2; fast++) {
        dsv3_context ctx = *packer;
        ctx.compute = fast ? DSV3_FAST : DSV3_EXACT;
        want[fast] = (float *)test_alloc(5 * V * sizeof(float));
        dsv3_linear(&ctx, want[fast], x, &s->model.lm_head, 5, scratch, NULL);
    }
    CHECK_EQ(dsv3_pack_size(packer, &s->model, &bytes, NULL), DSV3_OK);
    memory = synth_alloc(bytes);
    CHECK_EQ(dsv3_pack(packer, &s->model, memory, bytes, NULL), DSV3_OK);
    CHECK(s->model.lm_head.packed);
    for (int fast = 0; fast < 2; fast++) {
        dsv3_context ctx = *packer;
        ctx.compute = fast ? DSV3_FAST : DSV3_EXACT;
        for (size_t n = 1; n <= 5; n++) {
            dsv3_linear(&ctx, got, x, &s->model.lm_head, n, scratch, NULL);
            CHECK(memcmp(got, want[fast], n * V * sizeof *got) == 0);
        }
        free(want[fast]);
    }
    synth_close(s), synth_release(memory);
    free(x), free(got), free(scratch);
}

int main(void) {
    for (int i = DSV3_BACKEND_REFERENCE; i < DSV3_BACKENDS; i++) {
        if (dsv3_context_init(&contexts[n_contexts], (dsv3_backend)i, 1, NULL) != DSV3_OK)
            continue; /* not on this machine */
        contexts[n_contexts++].parallel_for = NULL;
    }
    check_nothing();
    for (size_t i = 1; i < n_contexts; i++) {
        check_packed(&contexts[i]);
        check_modules(&contexts[i], 0), check_modules(&contexts[i], 1);
        check_errors(&contexts[i]);
        check_bytes(&contexts[i]);
        check_unscaled(&contexts[i]);
    }
    return test_done("pack");
}
