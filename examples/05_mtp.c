/* Lesson 5: multi-token prediction. What the four modules of the demo model know, and what generation gains by it.
 *
 * Module k = 1 .. 4 gets the main model's state behind t_i and the tokens t_{i+1} .. t_{i+k}, and predicts
 * t_{i+k+1}; the main model predicts it from all tokens before. Both have seen the same text, and their losses lie
 * close together. But a module is one layer, the main model five: one drafts what the other then verifies.
 *
 * First on held-out text, with the true tokens as input: the loss of each depth, how often its first choice is the
 * main model's, and how often so where those of all depths before it were ("in a row"). With these rates r_1, r_2 ..
 * a step with K drafts should write 1 + r_1 + r_1 r_2 + .. + r_1 .. r_K tokens.
 * Then in earnest: the model writes, each draft is the input of the next, and the first one refused ends the step.
 * The text is that of plain decoding, byte for byte, in fewer steps.
 *
 * Build and run:  make build/05_mtp && build/05_mtp
 * (from the top of the repository: it reads examples/models/austen and examples/text/austen.txt)
 * Expected output:
 *     held-out text, 512 bytes
 *     depth   nats per byte   agrees   in a row   tokens per step
 *     main            0.918
 *     1               0.978     86 %       86 %              1.86
 *     2               0.984     82 %       84 %              2.57
 *     3               0.923     84 %       85 %              3.18
 *     4               0.949     84 %       85 %              3.69
 *     written by the model, 150 bytes
 *     K   same text   steps   tokens per step   accepted, by place
 *     0         yes     150              1.00
 *     1         yes      81              1.85   86 %
 *     2         yes      56              2.70   95 %  83 %
 *     3         yes      48              3.15   89 %  83 %  74 %
 *     4         yes      42              3.64   83 %  91 %  77 %  92 %
 */
#define DSV3_IMPLEMENTATION
#define CHECKPOINT_IMPLEMENTATION
#include "checkpoint.h"

/* Bytes of held-out text; of these, the prompt; bytes written behind it; the model's modules and its vocabulary. */
enum { N = 512, PROMPT = 100, WRITE = 150, D = 4, V = 256 };

static checkpoint file;
static dsv3_context context;
static dsv3_workspace workspace;
static dsv3_cache caches[1 + D];             /* of the main model, then of each module */
static int32_t text[N];                      /* a token is a byte */
static int32_t best[1 + D][N], plain[WRITE]; /* first choices of each depth; what is written without drafts */
static float logits[N * V];
static dsv3_error error;

static void die(const char *why) {
    printf("%s\n", why);
    exit(1);
}

static void check(dsv3_result result) {
    char line[200];
    if (result == DSV3_OK) return;
    die(error.code == result ? dsv3_error_text(&error, line, sizeof line) : dsv3_result_string(result));
}

/* The beginning of the last 5 % of the text, on which the model was not trained. */
static int read_text(const char *path) {
    FILE *f = fopen(path, "rb");
    long size = f != NULL && fseek(f, 0, SEEK_END) == 0 ? ftell(f) : 0;
    int found = size > 0 && fseek(f, size - size / 20, SEEK_SET) == 0;
    for (int i = 0; i < N && found; i++) found = (text[i] = fgetc(f)) != EOF;
    if (f != NULL) fclose(f);
    return found;
}

static void prepare(void) {
    size_t bytes;
    dsv3_context_init(&context, DSV3_BACKEND_REFERENCE, 1, NULL);
    dsv3_workspace_size(&file.config, N, 1, &bytes, NULL);
    dsv3_workspace_init(&file.config, &workspace, N, 1, malloc(bytes), bytes, NULL);
    dsv3_cache_size(&file.config, N, DSV3_F32, &bytes, NULL);
    dsv3_cache_init(&file.config, &caches[0], N, DSV3_F32, malloc(bytes), bytes, NULL);
    dsv3_cache_mtp_size(&file.config, N, DSV3_F32, &bytes, NULL);
    for (int k = 1; k <= D; k++)
        dsv3_cache_mtp_init(&file.config, &caches[k], N, DSV3_F32, malloc(bytes), bytes, NULL);
}

/* As in training, all depths at once: sums of losses over the text, divided by how many terms they have. */
static void evaluate(double *nll) {
    uint64_t targets[1 + D] = {0};
    dsv3_losses losses = {0};
    dsv3_text whole = {N, text, NULL, NULL, NULL, NULL, 0};
    losses.depths = D, losses.nll = nll, losses.targets = targets;
    check(dsv3_evaluate(&context, &losses, &file.model, caches, caches + 1, 1, &whole, &workspace, &error));
    for (int k = 0; k <= D; k++) nll[k] /= (double)targets[k];
}

/* The same by hand: depth k takes the states of depth k - 1, still in the workspace, and the tokens from t_k on. */
static void choose(int k) {
    size_t rows = (size_t)(N - k);
    dsv3_batch batch = {rows, text + k, NULL, NULL, rows, NULL};
    dsv3_cache_truncate(&caches[k], 0, NULL);
    check(k == 0 ? dsv3_forward(&context, logits, &file.model, &caches[0], 1, &batch, &workspace, &error)
                 : dsv3_mtp_forward(&context, logits, &file.model, (size_t)k, &caches[k], 1, &batch, workspace.hidden,
                                    &workspace, &error));
    for (size_t i = 0; i < rows; i++) dsv3_sample(&best[k][i], logits + i * V, V, 0.0f, 1.0f, NULL, NULL, NULL);
}

static void show_depths(void) {
    double nll[1 + D] = {0}, tokens = 1.0, chance = 1.0;
    int row[N]; /* have all depths so far agreed behind t_i? */
    evaluate(nll);
    printf("held-out text, %d bytes\ndepth   nats per byte   agrees   in a row   tokens per step\n", N);
    printf("main    %13.3f\n", nll[0]);
    for (int i = 0; i < N; i++) row[i] = 1;
    choose(0);
    for (int k = 1; k <= D; k++) {
        int agreed = 0, before = 0, now = 0;
        choose(k);
        for (int i = 0; i < N - k; i++) {
            int same = best[k][i] == best[0][i + k]; /* both predict t_{i+k+1} */
            agreed += same;
            before += row[i];
            now += row[i] = row[i] && same;
        }
        chance *= (double)now / before;
        tokens += chance;
        printf("%d       %13.3f   %4.0f %%     %4.0f %%   %15.2f\n", k, nll[k], 100.0 * agreed / (N - k),
               100.0 * now / before, tokens);
    }
}

/* Writes WRITE bytes behind the prompt, with up to K drafts in a step. */
static void generate(size_t K) {
    dsv3_sequence sequence, *list = &sequence;
    size_t bytes = 0, written = 0, same = 0, room = PROMPT + WRITE + D;
    void *memory;
    dsv3_sequence_size(&file.model, room, DSV3_F32, PROMPT, K, &bytes, NULL);
    memory = malloc(bytes);
    check(dsv3_sequence_init(&file.model, &sequence, room, DSV3_F32, PROMPT, K, memory, bytes, NULL));
    check(dsv3_sequence_append(&file.model, &sequence, text, PROMPT, NULL));
    while (written < WRITE) {
        check(dsv3_generate_step(&context, logits, &file.model, &list, 1, &workspace, &error));
        for (size_t i = 0; i < sequence.n_token && written < WRITE; i++, written++) {
            if (K == 0) plain[written] = sequence.token[i];
            same += sequence.token[i] == plain[written];
        }
    }
    printf("%d   %9s   %5d   %15.2f", (int)K, same == WRITE ? "yes" : "NO", (int)sequence.steps,
           (double)sequence.written / (double)sequence.steps);
    for (size_t k = 0; k < K; k++) {
        printf("%*.0f %%", k == 0 ? 5 : 4, 100.0 * (double)sequence.accepted[k] / (double)sequence.drafted[k]);
    }
    printf("\n");
    free(memory);
}

int main(void) {
    st_error why;
    if (checkpoint_open(&file, "examples/models/austen", &why) != ST_OK) die(why.message);
    if (!read_text("examples/text/austen.txt")) die("examples/text/austen.txt: cannot be read");
    prepare();
    show_depths();
    printf("written by the model, %d bytes\nK   same text   steps   tokens per step   accepted, by place\n", WRITE);
    for (size_t K = 0; K <= D; K++) generate(K);
    checkpoint_close(&file);
    return 0;
}
