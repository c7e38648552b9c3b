/* dsv3.h -- the whole DeepSeek-V3 system in one C header. Version 0.2.0, MIT licence (end of file).
 *
 * What it is: the architecture of DeepSeek-V3 -- multi-head latent attention (MLA), the sigmoid-routed mixture of
 * experts (MoE) with its balancing bias, and multi-token prediction (MTP) -- on checkpoints as published, FP8 blocks
 * included, and in the 8 and 4 bit blocks of GGUF files (Q8_0, Q4_0), as a library that drops into a C or C++ project
 * with one include and reads as a textbook, chapter by chapter. DeepSeek-V2, V2-Lite, Moonlight and Kimi-K2 are
 * configurations of the same code. It generates, with the MTP modules drafting ahead, and it trains, with every
 * gradient.
 *
 * What it is not: it does not allocate, open files, print, start threads behind your back, keep global
 * state or exit. It knows no file format and no tokenizer (examples/ has small companions for files).
 *
 * >>example  One file of the program defines the implementation; the others only include.
 *
 *     #define DSV3_IMPLEMENTATION
 *     #include "dsv3.h"
 *
 *     dsv3_config_check(&config, &error);                                 // names the first bad field
 *     dsv3_context_init(&context, DSV3_BACKEND_AUTO, 0, &error);          // backend and threads
 *     dsv3_model_size(&config, &bytes, &error);                           // every _size has its _init:
 *     dsv3_model_bind(&config, &model, malloc(bytes), bytes, find, files, &error); // by published names
 *     dsv3_cache_size(&config, 4096, DSV3_BF16, &bytes, &error);
 *     dsv3_cache_init(&config, &cache, 4096, DSV3_BF16, malloc(bytes), bytes, &error);
 *     dsv3_workspace_size(&config, rows, context.threads, &bytes, &error);
 *     dsv3_workspace_init(&config, &workspace, rows, context.threads, malloc(bytes), bytes, &error);
 *     dsv3_forward(&context, logits, &model, &cache, 1, &batch, &workspace, &error);
 *     dsv3_sample(&token, logits, vocab_size, 0.8f, 0.95f, &rng, candidates, &error);
 *
 * Each level of the API is usable alone:
 *   ops       dsv3_rmsnorm, dsv3_router_select, dsv3_rope_table, dsv3_logits_top_k ... on plain arrays, without a model;
 *   blocks    dsv3_mla_forward, dsv3_ffn_forward, dsv3_layer_forward on one layer's weights;
 *   programs  dsv3_forward (prefill and decode of many sequences in one call), dsv3_mtp_forward, dsv3_sample,
 *             dsv3_generate_step (steps with drafts, several sequences at once), dsv3_evaluate (losses of all depths),
 *             dsv3_train_begin, _accumulate, _end (a training step), dsv3_sequence_save (any of it as bytes).
 *
 * >>options  Define before the first include of the file that has DSV3_IMPLEMENTATION (no macro changes a struct):
 *   DSV3_IMPLEMENTATION      compile the implementation here (once per program)
 *   DSV3_STATIC              everything static to this file, which then has to define DSV3_IMPLEMENTATION, too, for this
 *                            #include or a later one; any number of files may. (Compilers warn of static functions that
 *                            are never defined: a file that only wants types and constants leaves DSV3_STATIC out)
 *   DSV3_API                 what stands before each public function; default: extern
 *   DSV3_ASSERT(x)           checks preconditions of single ops; default: nothing
 *   DSV3_SIMD                compile the SIMD backends in (x86-64; elsewhere it changes nothing). The CPU is asked
 *                            at run time: no -m flags are needed, and an older CPU gets what it can run
 *   DSV3_NO_AMX              leave the backend "amx" out, for which Linux must be asked (see dsv3_context_init)
 *   DSV3_NO_TRAINING         leave out gradients, training, and what only it needs of the balance: the bias step,
 *                            dsv3_balancer, and V2's device and communication losses
 *   DSV3_NO_OPENMP           ignore OpenMP even if the compiler has it switched on
 *   DSV3_ALLOW_FAST_MATH     accept fast math, and floats in wider registers (x87), which are refused else: minus infinity
 *                            and NaN are part of the algorithm, and results may then be wrong without notice
 *   DSV3_FREESTANDING        do not include <math.h> and <string.h>; the hooks below must then be defined.
 *                            (__builtin_memcpy is the best DSV3_MEMCPY: as a call it would cost one per number.
 *                            Compilers may call memcpy and memset on their own.)
 *   DSV3_EXPF DSV3_LOGF DSV3_SQRTF DSV3_SINF DSV3_COSF    float -> float
 *   DSV3_POW DSV3_LOG        double functions, for RoPE frequencies when a model is bound, log-probabilities, losses
 *   DSV3_MEMCPY DSV3_MEMSET  as in <string.h>
 *   DSV3_MAX_...             the limits that dsv3_config_check enforces, below
 *
 * >>conventions
 *   Shapes   stand in brackets behind every pointer, row-major: float *x [n, d] is x[row * d + column].
 *            Weights are [out, in] and y = W x, as in the published checkpoints.
 *   Order    context or config, outputs, values saved for later, inputs, weights, dimensions, scratch.
 *   Errors   0 is ok, negative is a dsv3_result; what, where, expected and found go to a dsv3_error, the last argument,
 *            which may be NULL and is set by every call that takes one, also by success. A call that fails leaves
 *            every cache as long as it was (but see dsv3_evaluate). Outputs and workspace are then unspecified; a model
 *            whose dsv3_model_bind failed must be bound again before use. Arguments that are wrong change nothing. Calls
 *            that return a number, a name or a struct have no way to say no: their pointers must be valid.
 *   Memory   is the caller's, all of it; a workspace may hold any bytes before a call (but a batch that is begun, and what
 *            dsv3_states and workspace->hidden show, lie in it). Every _size(.., &bytes) has its _init(.., memory, bytes),
 *            which wants at least that many. Buffers for _init are aligned to DSV3_ALIGN, as malloc's are; tensor data may
 *            have any alignment and live in flash.
 *   Structs  hold no pointers to themselves: between calls any of them may be moved. Configs, tensors, batches, errors
 *            and random states are values, to be copied at will. A context or a model may be copied (dsv3_pack changes
 *            the model that it is given). A cache, workspace, sequence or trainer owns its memory: of copies of the
 *            struct use one only; dsv3_cache_copy and dsv3_sequence_copy make a second object. Memory given to
 *            _init or _bind must outlive the struct, and weights the model; a model must outlive what was made for it.
 *   Threads  every function is reentrant. Calls running at the same time may share context, config and
 *            model (they are only read), and must not share cache, workspace or outputs.
 *   Bits     sums are taken in float32, in one order that does not depend on threads, on what else is in
 *            the batch, or on how a prompt is cut into chunks -- as long as the attention form is fixed
 *            (dsv3_context.attention). Loops are split over outputs, never over a sum. Bits may differ
 *            between backends, compilers, libm versions and -ffp-contract settings.
 *   Rounding is to nearest and subnormal numbers are kept, as programs start; with other modes numbers are others
 *            (linking with -ffast-math may flush subnormals in the whole program; AMX always does).
 *            gcc's settings that reorder sums are refused (its pragmas in C++ by dsv3_context_init, which sees no other
 *            kind there), clang 13 and MSVC are told to keep the order. Unnoticed go clang's -fapprox-func,
 *            -fno-honor-nans, -fno-honor-infinities and, before clang 18, -freciprocal-math; and reordering in the
 *            engine where the program includes <immintrin.h> before this file.
 *   Tensors  are in the byte order of the machine.
 *
 * >>glossary  The sizes of the architecture, by one name each in all comments and code:
 *   n  rows (tokens) of a call    d  hidden_size             L  num_hidden_layers
 *   H  num_attention_heads        V  vocab_size              S  positions in a cache
 *   rq q_lora_rank                rk kv_lora_rank            D  num_nextn_predict_layers
 *   dn qk_nope_head_dim           dr qk_rope_head_dim        dv v_head_dim
 *   E  n_routed_experts           K  num_experts_per_tok     F  moe_intermediate_size
 *   G  n_group                    Gt topk_group              Fd intermediate_size (dense layers)
 *   A declaration says vocab_size, experts and topk for V, E and K: letters may be macros of the program's.
 *   In equations: u a normalised row, c a latent, s a score, z a logit before its sigmoid or softmax.
 *   [R] the V3 report (arXiv 2412.19437)      [R2] the V2 report (arXiv 2405.04434)
 *
 * >>life  The life of a token, by the functions that it passes:
 *     dsv3_forward, dsv3_batch_begin             its place: sequence, position, angles
 *     dsv3_embed                                 x = its row of embed_tokens
 *     dsv3i_pass, dsv3i_layer_forward            each layer: x += MLA(norm(x)), x += FFN(norm(x))
 *       dsv3i_mla_forward                        latents and queries; the latent goes into the cache
 *       dsv3i_attend, dsv3i_attend_keys          what it sees: a running softmax over the cache
 *       dsv3i_moe_forward, dsv3i_route           its experts (dsv3_router_select), and how much each counts
 *       dsv3i_mlps, dsv3i_moe_combine            what they say
 *       dsv3i_linear, dsv3i_linear_task          under all of them: a row of W, decoded, times x
 *     dsv3i_pass_logits, dsv3_sample             the final norm, the head; the next token
 * The life of a gradient, which goes the same way back:
 *     dsv3_train_accumulate, dsv3i_train_head    loss of the target; dz = softmax - onehot, du = dz W_head
 *     dsv3i_layer_backward                       from the last layer to the first
 *       dsv3i_moe_backward, dsv3i_mlp_backward   experts, their gates, the router
 *       dsv3i_mla_backward                       projections; attention by dsv3i_attend_backward_row
 *       dsv3i_linear_backward                    under all of them: dx += dy W, dW += dy^T x
 *     dsv3i_embed_backward                       the token's row of embed_tokens
 *     dsv3_train_end                             one global norm, clip, AdamW; the bias step of the routers
 *
 * >>contents  Search for the tag to jump. Numbered chapters are the book: the whole system in plain C, each op once, forward
 * and backward side by side, and the backend "reference". Lettered chapters are the engine (DSV3_SIMD): the ops of one
 * table (>>table) once more, made for speed. Nobody must read it to learn the architecture.
 *   0  >>example >>options >>conventions >>glossary >>life  front page
 *   1  >>api      public declarations, all of them
 *   2  >>tools    sizes, layouts, errors, parallel loops; >>table, what a backend may do its own way
 *   3  >>formats  numbers and their types, quantisation, rows of numbers
 *   4  >>ops      embedding, linear, RMSNorm, SwiGLU, log-sum-exp, cross-entropy
 *   5  >>rope     rotary positions and YaRN
 *   6  >>mla      multi-head latent attention, absorbed and expanded
 *   7  >>router   scores, groups, bias, top-K, gate weights; loads, the bias step, balance losses
 *   8  >>moe      rows grouped by expert, shared experts
 *   9  >>block    one transformer layer
 *   10 >>model    configurations, tensor names, binding
 *   11 >>pass     batches, the forward program
 *   12 >>mtp      multi-token prediction: modules, and the losses of whole texts
 *   13 >>infer    sampling, generation with drafts
 *   14 >>train    parameters, backward through everything, AdamW, the training step
 *   15 >>memory   where everything lies: sizes, layouts, forks
 *   16 >>save     caches, sequences and training runs as bytes
 *   17 >>calls    the book's ops and blocks as calls of their own, which look at their arguments; steering
 *   A  >>fast     what all instruction sets share: packed weights, work for threads and caches
 *   B  >>simd     kernels for AVX2, AVX-512 and AMX
 *   Y  >>backends the choice of a backend
 *   Z  >>changes  what stays, what has changed; licence
 */
#ifndef DSV3_H
#define DSV3_H

#if (defined(__STDC_VERSION__) && __STDC_VERSION__ < 199901L) || \
    (!defined(__STDC_VERSION__) && defined(__GNUC__) && !defined(__cplusplus))
#error "dsv3.h is C99 and C++11: compile with -std=c99 or later"
#define DSV3_IMPLEMENTED /* one message is enough */
#define DSV3I_OLD_STANDARD
#endif

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Version, sizes, and what the options are where they are not set --------------------------------- */

#define DSV3_VERSION_MAJOR 0 /* grows when a program must be changed; while it is 0, MINOR does */
#define DSV3_VERSION_MINOR 2 /* grows when something is added */
#define DSV3_VERSION_PATCH 0 /* grows when something is mended */
#define DSV3_VERSION (DSV3_VERSION_MAJOR * 10000 + DSV3_VERSION_MINOR * 100 + DSV3_VERSION_PATCH)

/* Bytes; alignment of every buffer given to an _init or _bind. malloc's is enough on 32 and 64 bits. */
#define DSV3_ALIGN 8
#define DSV3_MAX_NAME 128 /* bytes of a name in an error or a tensor's description, its zero included */

#ifndef DSV3_API
#ifdef DSV3_STATIC
#if defined(__GNUC__)
#define DSV3_API __attribute__((__unused__)) static
#else
#define DSV3_API static
#endif
#else
#define DSV3_API extern
#endif
#endif

/* An enum of 32 bits, also where one side of a call is compiled with -fshort-enums. */
#if defined(__cplusplus) && (__cplusplus >= 201103L || defined(_MSC_VER))
#define DSV3_ENUM(name) enum name : int32_t
#elif defined(__GNUC__)
#define DSV3_ENUM(name) enum __attribute__((__mode__(__SI__))) name
#else
#define DSV3_ENUM(name) enum name
#endif

/* Limits. dsv3_config_check refuses more; they keep hostile files from asking for absurd work. */
#ifndef DSV3_MAX_LAYERS
#define DSV3_MAX_LAYERS 1024L /* num_hidden_layers + num_nextn_predict_layers */
#endif
#ifndef DSV3_MAX_HEADS
#define DSV3_MAX_HEADS 4096L
#endif
#ifndef DSV3_MAX_EXPERTS
#define DSV3_MAX_EXPERTS 8192L
#endif
#ifndef DSV3_MAX_TOPK
#define DSV3_MAX_TOPK 512L
#endif
#ifndef DSV3_MAX_VOCAB
#define DSV3_MAX_VOCAB 16777216L
#endif
#ifndef DSV3_MAX_DIM
#define DSV3_MAX_DIM 1048576L /* any width: hidden, intermediate, ranks, head parts */
#endif
#ifndef DSV3_MAX_DRAFTS
#define DSV3_MAX_DRAFTS 15L /* tokens drafted in one step */
#endif
#ifndef DSV3_MAX_SEQ
#define DSV3_MAX_SEQ 16777216L /* positions */
#endif

/* ========================================================================================================
 * Chapter 1  >>api
 * ==================================================================================================== */

/* DSV3_VERSION of the library that the program has linked; the header's is that of what it was compiled with. */
DSV3_API int32_t dsv3_version(void);

/* ---- Results and errors ------------------------------------------------------------------------------ */

typedef DSV3_ENUM(dsv3_result) {
    DSV3_OK = 0,
    DSV3_ERR_ARG = -1,         /* an argument or config value outside its domain, or a NULL pointer */
    DSV3_ERR_LIMIT = -2,       /* beyond a DSV3_MAX_... limit */
    DSV3_ERR_OVERFLOW = -3,    /* a size does not fit into size_t */
    DSV3_ERR_UNSUPPORTED = -4, /* understood, but not something this library does */
    DSV3_ERR_MEMORY = -5,      /* the buffer is shorter than its _size says */
    DSV3_ERR_ALIGN = -6,       /* the buffer is not aligned to DSV3_ALIGN */
    DSV3_ERR_MISSING = -7,     /* a tensor, or the scales of an FP8 tensor, were not found */
    DSV3_ERR_MISMATCH = -8,    /* shape or form differs from what the config demands */
    DSV3_ERR_TOKEN = -9,       /* token id outside the vocabulary */
    DSV3_ERR_POSITION = -10,   /* position does not continue its sequence */
    DSV3_ERR_FULL = -11,       /* the cache is full */
    DSV3_ERR_NAN = -12,        /* NaN or infinity in weights, scores or activations */
    DSV3_ERR_ABORTED = -13,    /* dsv3_context.aborted said so */
    DSV3_ERR_DAMAGED = -14     /* saved bytes that are cut, altered, or something else */
} dsv3_result;
typedef char dsv3i_check_enums[sizeof(dsv3_result) == sizeof(int32_t) ? 1 : -1]; /* others: enums are ints, please */

/* Which numbers of an error mean something, and how dsv3_error_text shows them. */
typedef DSV3_ENUM(dsv3_numbers) {
    DSV3_NUMBERS_NONE = 0,
    DSV3_NUMBERS_RANGE = 1, /* expected[0] to expected[1] (one number if they are equal), found[0] */
    DSV3_NUMBERS_SHAPE = 2, /* rows and columns of both */
    DSV3_NUMBERS_WHERE = 3  /* found[0] completes `why`: "is not finite in layer" 3 */
} dsv3_numbers;

/* What went wrong, filled in by calls that take one (NULL is always allowed). */
typedef struct dsv3_error {
    dsv3_result code;
    char name[DSV3_MAX_NAME]; /* config field, tensor, or argument */
    const char *why;          /* one clause, static storage */
    dsv3_numbers numbers;
    int64_t expected[2], found[2];
} dsv3_error;
/* A few words for a code; static storage. */
DSV3_API const char *dsv3_result_string(dsv3_result result);
/* Writes "name: why (expected 256 x 48, found 48 x 256)" into text [capacity], always zero-terminated when
 * capacity > 0, cut when too long. Returns text. */
DSV3_API const char *dsv3_error_text(const dsv3_error *error, char *text, size_t capacity);

/* ---- Configuration ----------------------------------------------------------------------------------- */

typedef DSV3_ENUM(dsv3_scoring_func) { DSV3_SIGMOID = 0 /* V3 */, DSV3_SOFTMAX = 1 /* V2 */ } dsv3_scoring_func;
typedef DSV3_ENUM(dsv3_topk_method) {
    DSV3_NOAUX_TC = 0,             /* V3: score + bias; a group counts by the sum of its two best, whatever K and Gt are
                                      (Megatron takes its K / Gt best, which is the same for V3 only) */
    DSV3_GROUP_LIMITED_GREEDY = 1, /* V2: score; a group counts by its best */
    DSV3_GREEDY = 2                /* V2-Lite: score; no groups */
} dsv3_topk_method;
typedef DSV3_ENUM(dsv3_group_mask) {
    DSV3_MASK_NEG_INF = 0, /* experts of dropped groups are out of the question (official code) */
    DSV3_MASK_ZERO = 1     /* they take part with a choice score of 0, as older ports do */
} dsv3_group_mask;
typedef DSV3_ENUM(dsv3_gate_scaling) {
    DSV3_SCALE_ALWAYS = 0,       /* V3: routed_scaling_factor applies with or without normalisation */
    DSV3_SCALE_UNLESS_NORMED = 1 /* original V2 code: only when norm_topk_prob is 0 */
} dsv3_gate_scaling;
typedef DSV3_ENUM(dsv3_bias_form) {
    DSV3_BIAS_ADD = 0,     /* choice score s + alpha b (released models) */
    DSV3_BIAS_MULTIPLY = 1 /* s (1 + alpha b), a variant of arXiv 2408.15664; b = 0 is neutral in both */
} dsv3_bias_form;
typedef DSV3_ENUM(dsv3_mtp_concat) {
    DSV3_MTP_EMBED_FIRST = 0, /* eh_proj [enorm(embedding) ; hnorm(hidden)]: released weights */
    DSV3_MTP_HIDDEN_FIRST = 1 /* the order in which the report writes it */
} dsv3_mtp_concat;
typedef DSV3_ENUM(dsv3_mtp_hidden) {
    DSV3_MTP_POST_NORM = 0, /* modules get states behind the final norm, and behind shared_head.norm */
    DSV3_MTP_PRE_NORM = 1   /* before these norms */
} dsv3_mtp_hidden;
typedef DSV3_ENUM(dsv3_rope_type) { DSV3_ROPE_NONE = 0, DSV3_ROPE_YARN = 1 } dsv3_rope_type;

typedef struct dsv3_rope_scaling {
    dsv3_rope_type type;
    float factor;                             /* >= 1: how much longer than the original context */
    int32_t original_max_position_embeddings; /* > 0 with YaRN */
    float beta_fast, beta_slow;               /* rotations over the original context: kept / interpolated */
    float mscale, mscale_all_dim;             /* see chapter 5 */
    int32_t truncate;                         /* bool, default 1: the ramp begins and ends at whole pairs */
} dsv3_rope_scaling;

/* The fields of the published config.json under the same names, then choices that no file carries.
 * Start from dsv3_config_default or dsv3_config_preset, so that fields added later have their defaults. */
typedef struct dsv3_config {
    int32_t vocab_size, hidden_size;
    int32_t intermediate_size;        /* width of the dense layers' MLP */
    int32_t moe_intermediate_size;    /* width of one expert */
    int32_t num_hidden_layers;        /* main layers */
    int32_t num_nextn_predict_layers; /* D: MTP modules, stored as layers L .. L+D-1; 0 if none */
    int32_t first_k_dense_replace;    /* layers before this one are dense */
    int32_t moe_layer_freq;           /* of the others, those divisible by it are MoE */
    int32_t num_attention_heads;
    int32_t num_key_value_heads; /* ignored: MLA has one latent for all heads */
    int32_t q_lora_rank;         /* 0 (null in files): one q_proj instead of q_a, norm, q_b */
    int32_t kv_lora_rank, qk_nope_head_dim;
    int32_t qk_rope_head_dim; /* even */
    int32_t v_head_dim, n_routed_experts;
    int32_t n_shared_experts; /* one MLP of n_shared_experts * moe_intermediate_size; 0 if none */
    int32_t num_experts_per_tok, n_group, topk_group;
    dsv3_scoring_func scoring_func;
    dsv3_topk_method topk_method;
    int32_t norm_topk_prob; /* bool: gate weights of a token sum to 1 before scaling; with K = 1 of no effect, as in the
                               code released with V2, V3, Moonlight and K2 */
    float routed_scaling_factor;
    int32_t seq_aux;      /* bool: balance losses of each sequence; 0: of a micro-batch, for as many sequences as it has */
    float aux_loss_alpha; /* training only */
    float rms_norm_eps, rope_theta;
    dsv3_rope_scaling rope_scaling;
    int32_t max_position_embeddings; /* the context the model was made for; caches may be any length */
    int32_t rope_interleave;         /* bool, default 1: pairs (2i, 2i+1) as in released weights; 0: halves */
    int32_t tie_word_embeddings;     /* bool: logits from embed_tokens; an lm_head in the file is ignored */
    int32_t attention_bias;          /* bool, must be 0 as in every published model */
    int32_t bos_token_id;            /* -1: none */
    int32_t eos_token_id;            /* -1: none */
    /* not in files */
    float latent_norm_eps; /* eps of q_a_layernorm and kv_a_layernorm, 1e-6 whatever rms_norm_eps */
    dsv3_group_mask group_mask;
    dsv3_gate_scaling gate_scaling;
    dsv3_bias_form bias_form;
    dsv3_mtp_concat mtp_concat;
    dsv3_mtp_hidden mtp_hidden;
} dsv3_config;
typedef DSV3_ENUM(dsv3_preset) {
    DSV3_PRESET_V3,        /* DeepSeek-V3, R1: 671 B */
    DSV3_PRESET_V2,        /* DeepSeek-V2: 236 B */
    DSV3_PRESET_V2_LITE,   /* DeepSeek-V2-Lite: 16 B */
    DSV3_PRESET_MOONLIGHT, /* Moonlight-16B-A3B */
    DSV3_PRESET_K2,        /* Kimi-K2: 1 T */
    DSV3_PRESET_AUSTEN,    /* examples/models/austen: 6.5 M, bytes */
    DSV3_PRESET_MICRO      /* examples/models/micro: 0.3 M, bytes */
} dsv3_preset;
/* Values for every field that has a sensible default; sizes are 0 and must be set. */
DSV3_API dsv3_config dsv3_config_default(void);
/* A published model. An unknown preset gives dsv3_config_default. */
DSV3_API dsv3_config dsv3_config_preset(dsv3_preset preset);
/* DSV3_OK, or the first bad field and why: ARG (outside its domain), LIMIT (a size that is negative or beyond
 * DSV3_MAX_...), OVERFLOW (a tensor would not fit into size_t), UNSUPPORTED. All other calls expect a config that passed. */
DSV3_API dsv3_result dsv3_config_check(const dsv3_config *config, dsv3_error *error);
/* Is layer i (MTP layers included: i >= L) a mixture of experts? */
DSV3_API int dsv3_config_is_moe(const dsv3_config *config, int32_t i);

/* ---- Tensors ----------------------------------------------------------------------------------------- */

typedef DSV3_ENUM(dsv3_type) {
    DSV3_F32 = 0, DSV3_F16 = 1, DSV3_BF16 = 2,
    DSV3_F8_E4M3 = 3, /* one byte, no infinity, max 448; a matrix has a float32 scale per 128x128 block */
    DSV3_Q8_0 = 4, /* blocks of 32 in a row, 34 bytes: an F16 scale, low byte first, 32 signed bytes (as in GGUF) */
    DSV3_Q4_0 = 5  /* likewise, 18 bytes: F16 scale, 16 bytes; byte i has element i in its low four bits and
                      element i + 16 in its high ones, each stored with 8 added (as in GGUF files) */
} dsv3_type;

#define DSV3_TYPES 6
#define DSV3_BLOCK 128  /* rows and columns of one FP8 scale block; the last blocks may be ragged */
#define DSV3_QBLOCK 32  /* columns of one Q8_0 or Q4_0 block; a matrix of these types has whole blocks only */

DSV3_API size_t dsv3_type_block(dsv3_type type); /* elements that are stored together: 1, or DSV3_QBLOCK */
DSV3_API size_t dsv3_type_bytes(dsv3_type type); /* of dsv3_type_block elements; 0 for an unknown type */
/* Bytes of a row of cols elements (FP8: without scales); SIZE_MAX: too many, 0: cols is no multiple of the block. */
DSV3_API size_t dsv3_row_bytes(dsv3_type type, size_t cols);
DSV3_API const char *dsv3_type_name(dsv3_type type);

/* A read-only view of a weight. Data belongs to the caller, must outlive the model, and may be unaligned. */
typedef struct dsv3_tensor {
    const void *data;  /* [rows, cols] elements of type */
    const void *scale; /* FP8: float [ceil(rows/128), ceil(cols/128)], below 2^119, W = code * scale; NULL: 1 */
    size_t rows, cols; /* a vector has rows = 1 */
    dsv3_type type;
    int32_t rank;   /* 1: vector, 2: matrix */
    int32_t packed; /* bool: in the order of dsv3_pack; 0 for what a finder returns */
} dsv3_tensor;
/* Exact conversions of one number. Encoders round to nearest, ties to even; NaN stays NaN.
 * E4M3 saturates at +-448 (also infinities); F16 and BF16 overflow to infinity. */
DSV3_API float dsv3_f32_from_f16(uint16_t bits);
DSV3_API float dsv3_f32_from_bf16(uint16_t bits);
DSV3_API float dsv3_f32_from_f8_e4m3(uint8_t bits);
DSV3_API uint16_t dsv3_f16_from_f32(float x);
DSV3_API uint16_t dsv3_bf16_from_f32(float x);
DSV3_API uint8_t dsv3_f8_e4m3_from_f32(float x);

/* Encodes a matrix x [rows, cols], row-major, as any type; a vector is one row. Plain C, the same bytes everywhere.
 *   data   [rows, dsv3_row_bytes(type, cols)] bytes of the caller's, at any address, not x; FP8: may be NULL, then only
 *          the scales are computed
 *   scale  FP8: float [ceil(rows/128), ceil(cols/128)] of the caller's, at any address; else not used
 * Every number becomes the nearest that its type and its block's scale offer (chapter 3); ties go to the even code.
 * llama.cpp divides by a scale d that is not yet rounded to F16: 0.7 % of its Q8_0 codes are other ones, farther from x.
 * ARG: a pointer that is needed is NULL, the type is unknown, or cols are not whole blocks. OVERFLOW: rows x cols does
 * not fit into size_t, or a finite number is too large for the type (FP8: a scale of 2^119 or more). NAN: NaN or
 * infinity as FP8, Q8_0 or Q4_0; F32, F16 and BF16 keep them. After an error data and scale may hold anything. */
DSV3_API dsv3_result dsv3_quantize(void *data, void *scale, const float *x, dsv3_type type, size_t rows, size_t cols,
                                   dsv3_error *error);

/* ---- Context: backend and threads -------------------------------------------------------------------- */

typedef DSV3_ENUM(dsv3_backend) {
    DSV3_BACKEND_AUTO = 0,        /* the best one compiled in that this machine can run */
    DSV3_BACKEND_REFERENCE = 1,   /* "reference": plain C: the book */
    DSV3_BACKEND_AVX2 = 2,        /* "avx2": x86-64 with AVX2, FMA and F16C; with DSV3_SIMD */
    DSV3_BACKEND_AVX512 = 3,      /* "avx512": also AVX-512 F, BW, DQ and VL; with DSV3_SIMD */
    DSV3_BACKEND_AVX512_BF16 = 4, /* "avx512_bf16": also AVX-512 VBMI, VNNI and BF16; with DSV3_SIMD */
    DSV3_BACKEND_AMX = 5          /* "amx": also AMX tiles of BF16 and bytes; with DSV3_SIMD, on Linux */
} dsv3_backend;

#define DSV3_BACKENDS 6

/* "auto", "reference", ...; NULL for an unknown one. */
DSV3_API const char *dsv3_backend_name(dsv3_backend backend);
/* The backend of that name; ARG if there is none. Whether it runs here, dsv3_context_init tells. */
DSV3_API dsv3_result dsv3_backend_find(dsv3_backend *backend, const char *name, dsv3_error *error);

/* What a product of weights and activations is computed from. Sums are float32 either way. */
typedef DSV3_ENUM(dsv3_compute) {
    DSV3_EXACT = 0, /* activations as they are, float32 */
    DSV3_FAST = 1   /* activations rounded first: to BF16 for BF16 and FP8 weights, to a multiple, -127 to 127, of 1/127 of
                       the largest of 32 for Q8_0 and Q4_0. avx512_bf16 and amx also round to BF16 what attention
                       multiplies. Router, norms, the softmax itself, and training stay exact. Errors: README.md, "Speed" */
} dsv3_compute;
typedef DSV3_ENUM(dsv3_attention) {
    DSV3_ATTENTION_AUTO = 0,     /* per sequence and call: expanded when it brings more than rk(dn+dv) / (2rk-dn-dv) rows
                                    (V3: 171 or more) and more than a step with drafts ever does, else absorbed */
    DSV3_ATTENTION_ABSORBED = 1, /* queries move into the latent space: decode, short chunks */
    DSV3_ATTENTION_EXPANDED = 2  /* keys and values are rebuilt from latents: long prompts */
} dsv3_attention;

/* One piece of a parallel loop: does items [begin, end). worker < threads tells concurrent pieces apart. */
typedef void (*dsv3_task)(void *arg, size_t begin, size_t end, size_t worker);

/* A parallel loop: cover [0, n) by calls of task, each item exactly once, in any order and any cut, at most
 * `threads` at a time with different worker numbers below `threads`; return when all are done. Memory
 * written by the tasks must be visible to the caller afterwards. The result does not depend on the cut. */
typedef void (*dsv3_parallel_for)(void *user, size_t threads, size_t n, dsv3_task task, void *arg);

/* Watch a forward pass, called on the calling thread. Pointers are valid during the call only. layer is the layer's index in
 * the file: 0 .. L-1, MTP modules from L on. Sequences and positions of the call's rows stand in the workspace.
 * hidden: after each layer, x [n, d] (the residual stream); at the end, with layer = -1, the final norm's output.
 * choose: in each MoE layer, may overwrite idx [n, K] before the gate weights are computed from score [n, E], to
 *         replay or to force a routing. Experts out of range or chosen twice by a row end the call with ARG.
 * routing: then, score [n, E], idx [n, K] by falling choice score, gate [n, K]. */
typedef struct dsv3_observer {
    void *user;
    void (*hidden)(void *user, int32_t layer, const float *x, size_t n);
    void (*choose)(void *user, int32_t layer, int32_t *idx, const float *score, size_t n);
    void (*routing)(void *user, int32_t layer, const float *score, const int32_t *idx, const float *gate, size_t n);
} dsv3_observer;

/* How to compute. Set the fields after dsv3_context_init; do not change them during a call. */
typedef struct dsv3_context {
    const struct dsv3i_ops *ops;    /* private: the backend */
    const char *backend;            /* its name */
    dsv3_parallel_for parallel_for; /* NULL: serial. With OpenMP compiled in, dsv3_context_init sets it */
    void *parallel_user;
    size_t threads; /* the most workers parallel_for will use, >= 1 */
    dsv3_compute compute;
    dsv3_attention attention;
    dsv3_observer observer; /* function pointers NULL: nobody watches */
    /* NULL, or asked on the calling thread before each layer of dsv3_forward and of all that is made of it, and of a
     * backward pass: anything but 0 ends the call with DSV3_ERR_ABORTED. That is an error as others are: caches, sequences,
     * counters and random states are as before (dsv3_evaluate and dsv3_train_accumulate: see there). */
    int (*aborted)(void *user);
    void *abort_user;
} dsv3_context;
/* threads = 0: what OpenMP offers, or 1. Without OpenMP the result is serial, threads = 1, until the caller sets parallel_for
 * and threads. UNSUPPORTED for a backend that is not compiled in or that this machine cannot run: it is asked on each call,
 * nothing is remembered. What AMX asks of Linux, and OpenMP of programs that fork or unload: chapter Y, >>backends.
 * Stack of each thread that works, as gcc and clang optimise: reference 12 KiB, avx2 and avx512 48, avx512_bf16 64, amx 96. */
DSV3_API dsv3_result dsv3_context_init(dsv3_context *context, dsv3_backend backend, size_t threads, dsv3_error *error);

/* ---- Model: weights bound by their published names ---------------------------------------------------- */

/* y = down_proj (silu(gate_proj u) * up_proj u) */
typedef struct dsv3_mlp {
    dsv3_tensor gate_proj, up_proj; /* [F, d] */
    dsv3_tensor down_proj;          /* [d, F] */
} dsv3_mlp;

typedef struct dsv3_layer {
    dsv3_tensor input_layernorm;          /* [d] */
    dsv3_tensor q_proj;                   /* [H(dn+dr), d], only if q_lora_rank is 0 */
    dsv3_tensor q_a_proj;                 /* [rq, d] */
    dsv3_tensor q_a_layernorm;            /* [rq] */
    dsv3_tensor q_b_proj;                 /* [H(dn+dr), rq], per head: dn rows, then dr rows */
    dsv3_tensor kv_a_proj_with_mqa;       /* [rk+dr, d], rk latent rows, then dr rows */
    dsv3_tensor kv_a_layernorm;           /* [rk] */
    dsv3_tensor kv_b_proj;                /* [H(dn+dv), rk], per head: dn key rows, then dv value rows */
    dsv3_tensor kv_b_packed;              /* the same once more, from dsv3_pack; data NULL: none */
    dsv3_tensor o_proj;                   /* [d, H dv] */
    dsv3_tensor post_attention_layernorm; /* [d] */
    int32_t index;                        /* its place in the file: 0 .. L-1, MTP modules L .. L+D-1 */
    int32_t is_moe;
    dsv3_mlp mlp;                        /* dense layers, F = Fd */
    dsv3_tensor gate;                    /* MoE: router [E, d] */
    dsv3_tensor e_score_correction_bias; /* MoE with noaux_tc: [E], not FP8 */
    dsv3_mlp *experts;                   /* MoE: [E] */
    dsv3_mlp shared_experts;             /* MoE: width n_shared_experts F; data NULL if none */
} dsv3_layer;

/* What an MTP module has beside its layer (which is layers[L + k - 1]). */
typedef struct dsv3_mtp {
    dsv3_tensor enorm, hnorm;     /* [d] */
    dsv3_tensor eh_proj;          /* [d, 2d], columns: normalised embedding, then normalised hidden state */
    dsv3_tensor shared_head_norm; /* [d] */
    dsv3_tensor embed_tokens;     /* [V, d], the file's copy; the main model's tensor if it has none */
    dsv3_tensor shared_head_head; /* [V, d], likewise */
} dsv3_mtp;

typedef struct dsv3_model {
    dsv3_config config;
    dsv3_tensor embed_tokens; /* [V, d] */
    dsv3_tensor norm;         /* [d] */
    dsv3_tensor lm_head;      /* [V, d]; embed_tokens if tied */
    dsv3_layer *layers;       /* [L + D] */
    dsv3_mtp *mtp;            /* [D] */
    int32_t n_mtp;            /* MTP modules found, <= D; files may come without them */
    uint64_t *rope_turns;     /* [dr/2], chapter 5 */
    float rope_factor;        /* multiplies cos and sin */
    float softmax_scale;      /* multiplies every attention score */
} dsv3_model;

/* Finds the tensor of this name and fills in data, rows, cols, type and rank of *tensor, which comes cleared (for FP8,
 * scale may be left NULL: the library then asks for "<name>_scale_inv"). Returns DSV3_OK, DSV3_ERR_MISSING when there is none,
 * or another code, which ends the binding. */
typedef dsv3_result (*dsv3_find)(void *user, const char *name, dsv3_tensor *tensor);

/* Bytes of the tables that dsv3_model_bind lays out (not of the weights, which stay where they are). */
DSV3_API dsv3_result dsv3_model_size(const dsv3_config *config, size_t *bytes, dsv3_error *error);
/* Binds every tensor the config calls for, MTP layers when the file has them. Checks type, rank and shape and
 * that router biases are finite; on failure error names the first tensor that is wrong. memory [bytes] must
 * live as long as the model, and so must everything find returned. FP8 scales are not read here. */
DSV3_API dsv3_result dsv3_model_bind(const dsv3_config *config, dsv3_model *model, void *memory, size_t bytes,
                                     dsv3_find find, void *user, dsv3_error *error);
/* Copies of the matrices in the order in which a SIMD backend reads them, so that it need not reorder them
 * on each call: faster, at the price of the memory. Bits do not change. 0 bytes for a backend that reads weights as they
 * lie. The embedding stays where it is, since its rows are wanted as such; kv_b_proj is there in both orders. */
DSV3_API dsv3_result dsv3_pack_size(const dsv3_context *context, const dsv3_model *model, size_t *bytes, dsv3_error *error);
/* Packs, with the context's threads, and makes the model's tensors point into memory [bytes], which must live as long as it;
 * what find returned for them is no longer needed. All backends can use a packed model, and what is packed stays as it is. */
DSV3_API dsv3_result dsv3_pack(const dsv3_context *context, dsv3_model *model, void *memory, size_t bytes,
                               dsv3_error *error);

typedef DSV3_ENUM(dsv3_tensor_kind) {
    DSV3_KIND_EMBED = 0, DSV3_KIND_ATTENTION, DSV3_KIND_DENSE, DSV3_KIND_ROUTER, DSV3_KIND_EXPERTS, DSV3_KIND_SHARED,
    DSV3_KIND_NORM, DSV3_KIND_HEAD,
    DSV3_KIND_MTP, /* enorm, hnorm, eh_proj, shared_head.norm and the copies */
    DSV3_KINDS
} dsv3_tensor_kind;

/* One tensor the config calls for. */
typedef struct dsv3_tensor_info {
    char name[DSV3_MAX_NAME];
    dsv3_tensor_kind kind;
    int32_t layer;  /* -1: none */
    int32_t expert; /* routed expert, -1: none */
    int32_t rank;
    size_t rows, cols;
    int32_t quantised; /* bool: FP8 with scales in the published FP8 checkpoints */
    int32_t optional;  /* bool: a copy that may be absent */
} dsv3_tensor_info;

/* Calls visit for every tensor, in file order, until it returns something other than DSV3_OK, which is
 * returned. dsv3_model_bind sees exactly this list. */
typedef dsv3_result (*dsv3_visit)(void *user, const dsv3_tensor_info *info);
DSV3_API dsv3_result dsv3_model_tensors(const dsv3_config *config, dsv3_visit visit, void *user, dsv3_error *error);

/* ---- Cache: what MLA keeps of the past ---------------------------------------------------------------- */

/* One sequence: for each layer and position the normalised latent c [rk] and the rotated key kr [dr]. */
typedef struct dsv3_cache {
    void *data;     /* [layers, capacity, width] of type */
    dsv3_type type; /* DSV3_F32 or DSV3_BF16 */
    size_t layers, capacity, width;
    size_t length; /* positions filled; grows by dsv3_forward */
} dsv3_cache;
DSV3_API dsv3_result dsv3_cache_size(const dsv3_config *config, size_t capacity, dsv3_type type, size_t *bytes,
                                     dsv3_error *error);
/* memory [bytes], aligned; need not be cleared. */
DSV3_API dsv3_result dsv3_cache_init(const dsv3_config *config, dsv3_cache *cache, size_t capacity, dsv3_type type,
                                     void *memory, size_t bytes, dsv3_error *error);
/* Roll back: forget positions >= length. ARG when length is beyond what is filled. */
DSV3_API dsv3_result dsv3_cache_truncate(dsv3_cache *cache, size_t length, dsv3_error *error);
/* Fork: to becomes a copy of from. Same model and type (MISMATCH); FULL when to is too short. */
DSV3_API dsv3_result dsv3_cache_copy(dsv3_cache *to, const dsv3_cache *from, dsv3_error *error);

/* ---- Workspace --------------------------------------------------------------------------------------- */

/* Memory for the intermediate values of one call. */
typedef struct dsv3_workspace {
    size_t rows, threads;     /* as given to init */
    const float *hidden;      /* [n, d] after dsv3_forward or dsv3_mtp_forward and until the next call, the rows' states as
                                 MTP modules take them (config.mtp_hidden) */
    const int32_t *sequence, *position; /* [n] of the rows of a call, for observers and steps in blocks */
    void *memory;             /* private, as are the next */
    uint64_t made_for; size_t begun; /* rows of dsv3_batch_begin */
} dsv3_workspace;
/* rows: most rows of one dsv3_forward call; threads: dsv3_context.threads. */
DSV3_API dsv3_result dsv3_workspace_size(const dsv3_config *config, size_t rows, size_t threads, size_t *bytes,
                                         dsv3_error *error);
DSV3_API dsv3_result dsv3_workspace_init(const dsv3_config *config, dsv3_workspace *workspace, size_t rows, size_t threads,
                                         void *memory, size_t bytes, dsv3_error *error);

/* ---- Programs ---------------------------------------------------------------------------------------- */

/* The rows of one forward call: prompt chunks and decode steps of several sequences, in any mixture. */
typedef struct dsv3_batch {
    size_t rows;             /* n >= 1 */
    const int32_t *token;    /* [n] */
    const int32_t *sequence; /* [n] index into caches; NULL: all 0 */
    const int32_t *position; /* [n]; NULL: each row continues its sequence. If given it must do just that */
    size_t outputs;          /* rows whose logits are wanted, 0 .. n */
    const int32_t *output;   /* [outputs] their indices in the batch; NULL: the last `outputs` rows */
} dsv3_batch;
/* Runs the rows through the model and appends them to caches [n_caches]. logits [outputs, V].
 * Errors, with all cache lengths as before: ARG, TOKEN, POSITION, FULL, MISMATCH (cache or workspace of another config),
 * MEMORY (more rows or threads than the workspace has), ABORTED, NAN (error->name is row[i], or logits: not finite). */
DSV3_API dsv3_result dsv3_forward(const dsv3_context *context, float *logits, const dsv3_model *model, dsv3_cache *caches,
                                  size_t n_caches, const dsv3_batch *batch, dsv3_workspace *workspace, dsv3_error *error);

/* After dsv3_forward or dsv3_mtp_forward, until the workspace's next call: state [n, d], the final norm's output for rows
 * row [n] of the batch, in any order. An embedding is made of these; dsv3_linear with model->lm_head makes logits of
 * them, and dsv3_cross_entropy losses. If only they are wanted, batch->outputs is 0. ARG: NULL, or no row of the
 * workspace's; MISMATCH: a workspace of another config. */
DSV3_API dsv3_result dsv3_states(const dsv3_model *model, float *state, const dsv3_workspace *workspace, const int32_t *row,
                                 size_t n, dsv3_error *error);

/* ---- Multi-token prediction. [R] 2.2; chapter 12 ----------------------------------------------------- */

/* The cache of one MTP module for one sequence: a dsv3_cache of one layer. truncate and copy as for others. */
DSV3_API dsv3_result dsv3_cache_mtp_size(const dsv3_config *config, size_t capacity, dsv3_type type, size_t *bytes,
                                         dsv3_error *error);
DSV3_API dsv3_result dsv3_cache_mtp_init(const dsv3_config *config, dsv3_cache *cache, size_t capacity, dsv3_type type,
                                         void *memory, size_t bytes, dsv3_error *error);

/* Module k = 1 .. n_mtp on a batch of rows. The row at position i has as its token t_{i+k}, and as its hidden state
 * h_i^{k-1}: workspace->hidden of dsv3_forward (k = 1) or of module k - 1, at the same position. caches [n_caches]
 * are this module's. logits [outputs, V] predict t_{i+k+1}. hidden [n, d] may be workspace->hidden itself. Errors as
 * of dsv3_forward, and ARG for a module that the model does not have. */
DSV3_API dsv3_result dsv3_mtp_forward(const dsv3_context *context, float *logits, const dsv3_model *model, size_t k,
                                      dsv3_cache *caches, size_t n_caches, const dsv3_batch *batch, const float *hidden,
                                      dsv3_workspace *workspace, dsv3_error *error);

/* Whole sequences as training sees them: the row of an input token, and its target, the next token. */
typedef struct dsv3_text {
    size_t rows;             /* n >= 1, all sequences together */
    const int32_t *token;    /* [n] */
    const int32_t *target;   /* [n] DSV3_IGNORE: no loss here. NULL: the next token of the same document */
    const int32_t *sequence; /* [n] index into caches, never falling; NULL: all 0 */
    const int32_t *document; /* [n] of documents packed into a sequence; NULL: each sequence is one. Rows also attend to
                                the documents before theirs, as V3's do, unless they are apart */
    const uint8_t *mask;     /* [n] 0: padding, without loss, load and balance loss; NULL: none. Attention does not ask:
                                padding in front changes what follows, unless it is a document apart */
    int32_t apart;           /* bool: each document (rows, until the number changes) is what a sequence of its own would be, to
                                the bit: it sees itself alone, its positions begin at 0, its balance loss is its own. Only
                                its latents lie in its sequence's cache, which has room for all rows of the sequence */
} dsv3_text;

/* What dsv3_evaluate adds to, so that micro-batches add up. Arrays are the caller's, cleared by her, not NULL unless
 * said so. The row at position i has a loss at depth k if t_{i+k} (its input there) and t_{i+k+1} (its target)
 * exist, belong to its document and are neither ignored nor padding: a sequence shorter than that has none. Where
 * text->target is given it decides on the border itself: the target of a document's last row is ignored or not. */
typedef struct dsv3_losses {
    size_t depths;      /* MTP depths wanted, 0 .. n_mtp */
    double *nll;        /* [1 + depths] sums of -log p in nats: main model, then depth 1, 2 .. */
    uint64_t *targets;  /* [1 + depths] how many terms each has */
    uint64_t *load;     /* [L + D, E] assignments; NULL: not wanted */
    double *balance;    /* [L + D] sums over sequences of dsv3_balance_loss; NULL: not wanted */
    double *device, *communication; size_t devices, most_devices; /* V2's losses likewise, if devices is not 0 */
    uint64_t sequences; /* how many, those of padding alone left out; divide by it */
    int32_t actual;     /* bool: f_i of the balance loss from the actual routing, not from the largest scores */
} dsv3_losses;
/* Runs the main model and `depths` MTP modules over text. caches [n_caches] and modules [depths, n_caches] (NULL if depths is
 * 0), with room for a sequence's rows each, are emptied first and hold the text's latents afterwards (apart: stay empty). Longer
 * texts than the workspace has rows are taken piece by piece, but balance losses need them whole (MEMORY). Observers see all.
 * Errors as of dsv3_forward; TOKEN for a target outside the vocabulary; after an error sums and caches are unspecified. */
DSV3_API dsv3_result dsv3_evaluate(const dsv3_context *context, dsv3_losses *losses, const dsv3_model *model,
                                   dsv3_cache *caches, dsv3_cache *modules, size_t n_caches, const dsv3_text *text,
                                   dsv3_workspace *workspace, dsv3_error *error);

typedef DSV3_ENUM(dsv3_mtp_divisor) {
    DSV3_DIVIDE_BY_MAIN = 0, /* every depth by the number of main targets ([R]) */
    DSV3_DIVIDE_BY_VALID = 1 /* each by its own */
} dsv3_mtp_divisor;
/* main + lambda / depths * sum over depths + alpha * sum over layers of the balance loss, in nats per target. [R] eq.
 * 24-25, 17. Depths without any target add nothing; without main targets the sum is that of the rest. layers = L + D. */
DSV3_API double dsv3_losses_total(const dsv3_losses *losses, size_t layers, double lambda, double alpha,
                                  dsv3_mtp_divisor divisor);

/* Random numbers: one 64-bit word of state, the same stream on every machine. Any seed will do. A stream is split by
 * making another state of its next number: other.state = dsv3_random(&rng). */
typedef struct dsv3_rng { uint64_t state; } dsv3_rng;
DSV3_API uint64_t dsv3_random(dsv3_rng *rng);
DSV3_API float dsv3_random_uniform(dsv3_rng *rng); /* in [0, 1) */
typedef struct dsv3_candidate { float p; int32_t token; } dsv3_candidate;
/* Draws a token from softmax(logits / temperature), restricted to the smallest set of most probable tokens that
 * together have at least top_p. temperature 0: the most probable token, ties to the lower id, rng untouched.
 * top_p 1: no restriction; 0: as temperature 0. candidates [V] is scratch. Errors: ARG (temperature negative or
 * not finite, top_p outside 0..1, V 0), NAN (a NaN among the logits, or no finite maximum). */
DSV3_API dsv3_result dsv3_sample(int32_t *token, const float *logits, size_t vocab_size, float temperature, float top_p,
                                 dsv3_rng *rng, dsv3_candidate *candidates, dsv3_error *error);
/* What dsv3_sample makes of the same arguments, for a token: *log_p is the logarithm of the probability with which it is
 * drawn, in nats, minus infinity if never; *entropy (may be NULL) that of the whole distribution. Greedy: 0 for the
 * token that is taken, and entropy 0. candidates [V] is scratch. Errors as of dsv3_sample, and TOKEN. */
DSV3_API dsv3_result dsv3_sample_log_p(double *log_p, double *entropy, int32_t token, const float *logits, size_t vocab_size,
                                       float temperature, float top_p, dsv3_candidate *candidates, dsv3_error *error);
/* log_p [n] = log softmax(logits)[token], in nats, of each row of logits [n, V] and its token [n]; 0 for DSV3_IGNORE,
 * minus infinity for a logit of minus infinity. Sums are doubles. ARG, TOKEN, NAN (as dsv3_sample). */
DSV3_API dsv3_result dsv3_log_p(double *log_p, const float *logits, const int32_t *token, size_t n, size_t vocab_size,
                                dsv3_error *error);

/* ---- Steering: ops that change a row of logits [V] before a token is drawn from it. Minus infinity is "never", and
 * stays so. Errors, with nothing changed: ARG (NULL, V or a value outside its domain), TOKEN (an id outside the
 * vocabulary), NAN (NaN or plus infinity in logits). A row in which everything is forbidden is no error here. */

/* The k >= 1 largest stay, of equals those of lower id; the rest is forbidden. scratch [min(k, V)]. */
DSV3_API dsv3_result dsv3_logits_top_k(float *logits, size_t vocab_size, size_t k, dsv3_candidate *scratch, dsv3_error *error);
/* Tokens with less than min_p (0 .. 1) times the probability of the most probable one are forbidden. Probabilities are
 * those at temperature 1. */
DSV3_API dsv3_result dsv3_logits_min_p(float *logits, size_t vocab_size, float min_p, dsv3_error *error);
/* Each of the different tokens among token [n]: a positive logit is divided by penalty, another multiplied. penalty > 0;
 * above 1 it makes them rarer. seen [(V + 7) / 8] is scratch. */
DSV3_API dsv3_result dsv3_logits_penalty(float *logits, size_t vocab_size, const int32_t *token, size_t n, float penalty,
                                         uint8_t *seen, dsv3_error *error);
/* logits[token[i]] += bias[i] for i < n, also if an id comes twice. bias is finite, or minus infinity: forbidden. */
DSV3_API dsv3_result dsv3_logits_bias(float *logits, size_t vocab_size, const int32_t *token, const float *bias, size_t n,
                                      dsv3_error *error);

/* The caller's hand in what is written. dsv3_generate_step calls it, on the calling thread, for each row of logits [V] from
 * which a token is about to be chosen. It may change them; minus infinity forbids a token.
 *   text [length]  what stands before that token, length >= 1: all of the sequence, drafts included. Valid during the call
 *   sequence       its index in the call of dsv3_generate_step
 * The rows of the MTP modules come here as those of the main model do, so that drafts have a chance. A draft may be
 * refused later, and a place be asked about again: what is done must follow from logits and text alone. Then greedy text
 * is the same with any drafts and company, and sampled text has the distribution of the main model's steered logits.
 *   A code other than DSV3_OK ends the step: dsv3_generate_step returns it, and everything is as before. Text that can only
 * end is no such error: a row with nothing left to choose (or NaN, or plus infinity) ends the drafting, or the step behind
 * drafts that stand; only where the step begins it is DSV3_ERR_NAN. */
typedef dsv3_result (*dsv3_steer)(void *user, float *logits, size_t vocab_size, const int32_t *text, size_t length,
                                  size_t sequence);

/* ---- Generation, with drafts by the MTP modules. [R] 5.4.3; chapter 13 --------------------------------- */

/* What dsv3_generate_step will do with a sequence. */
typedef DSV3_ENUM(dsv3_state) {
    DSV3_STATE_READING = 0, /* a prompt is not yet read */
    DSV3_STATE_WRITING = 1,
    /* nothing: */
    DSV3_STATE_EMPTY = 2,   /* there is no token to go on from */
    DSV3_STATE_STOPPED = 3, /* the last token was written, and stops */
    DSV3_STATE_LIMIT = 4,   /* the text has `limit` tokens */
    DSV3_STATE_FULL = 5     /* the caches are full */
} dsv3_state;

/* A text being written: its caches, what the modules need to draft ahead, its sampler. Memory is the caller's. */
typedef struct dsv3_sequence {
    /* the caller's to set, after init and between calls */
    float temperature, top_p; /* as dsv3_sample; init: 0 and 1, greedy */
    dsv3_rng rng;             /* init: state 1. The same state repeats a text if prompt, drafts, rows and the company in steps
                                 are the same: where a workspace is too small for all drafts, fewer numbers are drawn */
    size_t drafts;    /* tokens to draft in a step; more than max_drafts count as that. init: max_drafts. With 0 the modules
                         still read along now and then: to do without them, init with 0 */
    int32_t adaptive; /* bool: fewer of them while they are seldom accepted. init: 0 */
    float draft_cost; /* for that: what one draft adds to the time of a step with one row. init: 0.25 */
    int32_t stop;     /* writing ends behind this token, -1: never. init: eos_token_id */
    const int32_t *stops; /* [n_stops] and behind these. init: none */
    size_t n_stops;
    size_t limit;         /* nothing is written that makes the text longer. init: SIZE_MAX. For n tokens behind a prompt
                             just appended: dsv3_sequence_length + prompt_left + n */
    dsv3_steer steer;     /* NULL (init): nobody */
    void *steer_user;
    int32_t want_log_p;   /* bool: log_p and entropy, too. init: 0 */
    int32_t stopped;      /* bool: the last token was written and is one of those that stop. Ends when more is appended and
                             read, when it is rolled back, or when the caller clears it */
    /* results of a call of dsv3_generate_step */
    int32_t *token; /* [n_token] written by it, in order */
    float *log_p;   /* [n_token] if wanted: of the distribution each was drawn from (steer, temperature, top_p); in
                       greedy text: of softmax(logits), behind steer */
    float *entropy; /* [n_token] likewise: of that distribution, in nats */
    size_t n_token; /* 0 .. max_drafts + 1 */
    /* to be read: caches.length tokens are in the caches, one more is known if pending */
    dsv3_cache cache;    /* main layers */
    dsv3_cache *modules; /* [n_modules] one layer each */
    size_t n_modules, max_drafts, rows;
    int32_t pending;       /* bool: the last token of the text is not yet in the caches */
    int32_t *history;      /* [dsv3_sequence_length] the text */
    const int32_t *prompt; /* [prompt_left] appended and not yet read; the caller's memory */
    size_t prompt_left;
    /* counters, to be read and cleared */
    uint64_t steps;     /* steps that wrote something (not those that only read a prompt) */
    uint64_t written;   /* tokens */
    uint64_t *drafted;  /* [max_drafts] how often a draft in this place was reached; what stood behind a refused one was not */
    uint64_t *accepted; /* [max_drafts] and was accepted */
    struct dsv3i_sequence *own; /* private */
} dsv3_sequence;
/* capacity: positions of the caches (a prompt of P tokens and n written ones want P + n - 1); type: theirs, as for
 * dsv3_cache_init; rows: most prompt tokens read in one call;
 * drafts: most tokens drafted in a step, 0 .. DSV3_MAX_DRAFTS. min(drafts, D) modules are used; more drafts than
 * modules re-use the last one. init also needs the model, to know how many modules it really has. */
DSV3_API dsv3_result dsv3_sequence_size(const dsv3_model *model, size_t capacity, dsv3_type type, size_t rows,
                                        size_t drafts, size_t *bytes, dsv3_error *error);
DSV3_API dsv3_result dsv3_sequence_init(const dsv3_model *model, dsv3_sequence *sequence, size_t capacity, dsv3_type type,
                                        size_t rows, size_t drafts, void *memory, size_t bytes, dsv3_error *error);
/* Tokens [n] follow the text: the first prompt, or the next turn of a conversation. They are read by the next calls
 * of dsv3_generate_step, and must stay where they are until prompt_left is 0. Errors, with nothing changed: ARG (n = 0,
 * an earlier prompt not yet read), TOKEN, FULL (more than the caches hold). */
DSV3_API dsv3_result dsv3_sequence_append(const dsv3_model *model, dsv3_sequence *sequence, const int32_t *token, size_t n,
                                          dsv3_error *error);
/* Tokens of the text: read, and pending. */
DSV3_API size_t dsv3_sequence_length(const dsv3_sequence *sequence);
DSV3_API dsv3_state dsv3_sequence_state(const dsv3_sequence *sequence);

/* Roll back to the first `length` tokens; a prompt not yet read is dropped. *kept (may be NULL) says how many
 * are really kept: fewer than length, by the number of modules, when length lies so far back that the states
 * these need are gone. Then append tokens kept .. length - 1 of the text once more, from a copy (history is the
 * sequence's). Otherwise the next step goes on from token length - 1. ARG when length is more than
 * dsv3_sequence_length. */
DSV3_API dsv3_result dsv3_sequence_truncate(dsv3_sequence *sequence, size_t length, size_t *kept, dsv3_error *error);
/* Fork: to, made with the same model, type, rows and drafts (MISMATCH), becomes a copy of from; sampler, steering, stop
 * tokens (the list stays the caller's), limit and counters included. The random state, too: both draw the same numbers
 * until one is given another (to->rng.state = dsv3_random(&to->rng)). FULL when its caches are too short. */
DSV3_API dsv3_result dsv3_sequence_copy(dsv3_sequence *to, const dsv3_sequence *from, dsv3_error *error);

/* One step of each of n sequences, together. A sequence with a prompt reads up to `rows` of it, and behind its last
 * token writes one; one without drafts up to `drafts` tokens, verifies them in the same call that computes the next,
 * and writes all that agree and one more; drafts behind a stop token or beyond the limit are dropped. Sequences in the
 * other states (dsv3_state) write nothing.
 * Greedy text is the same, bit for bit, with any number of drafts, any company and any number of threads, while the
 * attention form is fixed (with AUTO it follows from how a prompt is cut into pieces); sampled text has the same
 * distribution. n <= workspace->rows; rows that do not fit wait (drafts are dropped first).
 * logits [sum of (max_drafts + 1), V] is scratch. Errors: as of dsv3_forward; what a steer returns, and NAN when it left
 * nothing to choose; when no sequence has anything to do, FULL if one is FULL, else ARG. Every sequence is then as
 * before (its counters and random numbers too; but its modules may have read on), and n_token 0. */
DSV3_API dsv3_result dsv3_generate_step(const dsv3_context *context, float *logits, const dsv3_model *model,
                                        dsv3_sequence *const *sequences, size_t n, dsv3_workspace *workspace,
                                        dsv3_error *error);

/* ---- Load balancing on plain arrays. [R] 2.1.2, arXiv 2408.15664; chapter 7 --------------------------------- */

/* load [E] += how often idx [n, K] names each expert; rows with mask[t] = 0 (padding) are passed over. mask [n],
 * NULL: all rows count. Do not count evaluation or recomputation. ARG, and nothing counted: NULL, or an expert out of range. */
DSV3_API dsv3_result dsv3_load_count(uint64_t *load, const int32_t *idx, const uint8_t *mask, size_t n, size_t experts,
                                     size_t topk, dsv3_error *error);

/* How even a load is, of one batch or of several added up. All zero, and dead = E, when nothing was counted. */
typedef struct dsv3_load_stats {
    double mean;     /* assignments per expert */
    double max_vio;  /* max / mean - 1: 0 is perfect, E / K - 1 the worst */
    double min_load; /* min / mean */
    double entropy;  /* of the shares, divided by log E: 1 is perfect, 0 one expert alone */
    size_t dead;     /* experts without any row */
} dsv3_load_stats;
DSV3_API dsv3_load_stats dsv3_load_statistics(const uint64_t *load, size_t experts);

#ifndef DSV3_NO_TRAINING
typedef DSV3_ENUM(dsv3_bias_rule) {
    DSV3_BIAS_SIGN = 0,         /* b += speed sign(e), the report's */
    DSV3_BIAS_CENTRED = 1,      /* b += speed (sign(e) - mean sign(e)): no common drift */
    DSV3_BIAS_PROPORTIONAL = 2, /* b += speed e */
    DSV3_BIAS_FACTOR = 3        /* 1 + b *= 1 + speed sign(e), for DSV3_BIAS_MULTIPLY; speed < 1 */
} dsv3_bias_rule;
/* One step of bias [layers, E] from load [layers, E] of the whole optimizer step, after it has succeeded; e is the relative
 * error (mean - load) / mean within a layer. Always: less load never moves b down more (or up less) than more load does; an
 * expert at the mean keeps its b (under CENTRED: moves with the common drift only); a layer without any load stays as it
 * is; a finite b stays finite, and under FACTOR b stays within -0.999 and above, from where it can still come back. The
 * loads of a layer add up to less than 2^64. ARG, and nothing moves: NULL, no experts, an unknown rule, a speed that is
 * negative or not finite. */
DSV3_API dsv3_result dsv3_bias_step(float *bias, const uint64_t *load, size_t layers, size_t experts, dsv3_bias_rule rule,
                                    double speed, dsv3_error *error);

/* The schedule of the update speed: `speed` until `freeze` tokens (or steps) have been seen, then 0. freeze 0: never.
 * V3: 0.001 for the first 14.3 T tokens. */
typedef struct dsv3_bias_schedule { double speed; uint64_t freeze; } dsv3_bias_schedule;
DSV3_API double dsv3_bias_speed(const dsv3_bias_schedule *schedule, uint64_t seen);

/* Adds load [n] of all ranks, in place; DSV3_OK, or a code that ends the step. */
typedef dsv3_result (*dsv3_reduce_load)(void *user, uint64_t *load, size_t n);

/* Loads of all layers over the micro-batches of an optimizer step, and what becomes of them. */
typedef struct dsv3_balancer {
    dsv3_bias_rule rule;         /* set by the caller after init, as are the next three */
    dsv3_bias_schedule schedule; /* counts optimizer steps, or whatever the caller passes as `seen` */
    dsv3_reduce_load reduce;     /* NULL: one rank */
    void *reduce_user;
    size_t layers, experts; /* L + D, n_routed_experts */
    uint64_t *load;     /* [layers, E] since the last step: add with dsv3_load_count, or let dsv3_evaluate */
    uint64_t *load_all; /* [layers, E] of all steps: accumulated MaxVio */
} dsv3_balancer;
/* Of config only n_routed_experts and the numbers of layers are read. */
DSV3_API dsv3_result dsv3_balancer_size(const dsv3_config *config, size_t *bytes, dsv3_error *error);
/* Sign rule, speed 0.001, never frozen, no loads. */
DSV3_API dsv3_result dsv3_balancer_init(const dsv3_config *config, dsv3_balancer *balancer, void *memory, size_t bytes,
                                        dsv3_error *error);
/* Sums load over the ranks, moves bias [layers, E] (rows of dense layers stay), adds load to load_all and clears
 * it. When reduce fails nothing has changed but what reduce did. ARG as of dsv3_bias_step. */
DSV3_API dsv3_result dsv3_balancer_step(dsv3_balancer *balancer, float *bias, uint64_t seen, dsv3_error *error);
#endif

/* How the rows of one sequence were routed. */
typedef struct dsv3_routing {
    const float *score;  /* [n, E] finite */
    const int32_t *idx;  /* [n, K] the actual choice; NULL: the K largest scores, without bias and groups */
    const uint8_t *mask; /* [n] 0: padding, which does not count; NULL: none */
    size_t n, experts, topk;
    size_t devices, most_devices; /* V2's losses: experts in `devices` equal groups, a token goes to M of them at most */
} dsv3_routing;
/* Balance losses, without their weights; 0 when no row counts. f and P are sums in double; scratch [2 E]. Errors, with
 * nothing written: ARG (NULL, no experts, an expert out of range, devices that do not divide the experts), LIMIT (more than
 * there are), NAN (a score that counts).
 * The sequence-wise loss of one sequence, sum_i f_i P_i, [R] eq. 17-20: 1 when perfectly even. With idx NULL it is as the
 * report has it, with softmax scores and idx V2's expert-level loss. A row whose scores add up to 0 counts in f only. */
DSV3_API dsv3_result dsv3_balance_loss(double *loss, const dsv3_routing *routing, double *scratch, dsv3_error *error);
#ifndef DSV3_NO_TRAINING
/* V2's device-level loss, [R2] eq. 26-28, and its communication loss, [R2] eq. 29-31, which wants idx. */
DSV3_API dsv3_result dsv3_device_loss(double *loss, const dsv3_routing *routing, double *scratch, dsv3_error *error);
DSV3_API dsv3_result dsv3_communication_loss(double *loss, const dsv3_routing *routing, double *scratch, dsv3_error *error);
/* How much each balance loss counts: finite, and not less than 0 (ARG where it is used). */
typedef struct dsv3_balance_weights {
    double expert;                /* alpha of dsv3_balance_loss: V3 0.0001, V2 0.003 */
    double device, communication; /* V2: 0.05 and 0.02; V3: 0 */
    size_t devices, most_devices; /* V2: 8 and 3 */
    int32_t actual;               /* bool: f_i of the first from the actual routing (V2), not the largest scores */
} dsv3_balance_weights;

/* ---- Training. [R] 4.2; chapter 14 ------------------------------------------------------------------- */

/* Every tensor a config calls for, as float32, in one array in file order (the order of dsv3_model_tensors, without
 * the optional copies: MTP modules share the main model's embedding and head). Weights are one, gradients another. */
typedef struct dsv3_parameters {
    dsv3_model model; /* bound to data */
    float *data;      /* [count] */
    size_t count;
} dsv3_parameters;
DSV3_API dsv3_result dsv3_parameters_size(const dsv3_config *config, size_t *bytes, dsv3_error *error);
/* Zeros. */
DSV3_API dsv3_result dsv3_parameters_init(const dsv3_config *config, dsv3_parameters *parameters, void *memory,
                                          size_t bytes, dsv3_error *error);
/* Decodes a bound model of the same config into them. MISMATCH for other sizes, or fewer MTP modules than config names. */
DSV3_API dsv3_result dsv3_parameters_from_model(dsv3_parameters *parameters, const dsv3_model *from, dsv3_error *error);
/* Matrices from N(0, std^2), norms 1, router biases 0. V3: std 0.006. */
DSV3_API dsv3_result dsv3_parameters_random(dsv3_parameters *parameters, dsv3_rng *rng, float std, dsv3_error *error);

/* What the forward pass keeps for the backward pass, beside what it must. The report keeps nothing of these. */
typedef DSV3_ENUM(dsv3_keep) {
    DSV3_KEEP_NORMS = 1,          /* outputs of all RMSNorms */
    DSV3_KEEP_UP_PROJECTIONS = 2, /* queries (keys and values are always rebuilt) */
    DSV3_KEEP_SWIGLU = 4          /* outputs of SwiGLU */
} dsv3_keep;

/* Adds gradients [n] of all ranks, in place; DSV3_OK, or a code that ends the step. */
typedef dsv3_result (*dsv3_reduce_gradients)(void *user, float *gradients, size_t n);

/* How to train. Start from dsv3_training_default; the first six fix the memory, the others may change between steps. */
typedef struct dsv3_training {
    size_t rows;      /* most rows of a micro-batch */
    size_t sequences; /* most sequences of a micro-batch, <= rows */
    size_t longest;   /* most rows of a sequence */
    int32_t keep;     /* dsv3_keep, added up: of every layer */
    int32_t ema;      /* bool: keep an exponential moving average of the weights */
    const int32_t *keep_layers; /* [L + D] a keep for each layer, MTP modules last, for _size and _init. NULL: keep */
    double lambda;    /* weight of the MTP losses: V3 0.3, later 0.1 */
    dsv3_mtp_divisor divisor;
    dsv3_balance_weights balance;
    int32_t detach_trunk; /* bool: MTP losses do not reach the main model's layers */
    int32_t detach_head;  /* bool: nor its embedding and head */
    float beta1, beta2, eps, weight_decay;
    float clip; /* largest global norm of the gradients; 0: no limit */
    double ema_decay; /* below 1 */
    const char *const *exempt; /* names with * for any characters, NULL ends: no weight decay (vectors never have) */
    const char *const *frozen; /* likewise: not trained, routers' biases not moved. NULL: none */
    dsv3_reduce_gradients reduce; /* NULL: one rank. The loads' hook is the balancer's */
    void *reduce_user;
} dsv3_training;
/* The report's: lambda 0.3, balance 0.0001, AdamW (0.9, 0.95), decay 0.1, clip 1, eps 1e-8; one sequence of 4096. */
DSV3_API dsv3_training dsv3_training_default(void);

/* Warm-up from 0 to peak, constant, cosine to low, low, tail. [R] 4.2: 2000 steps to 2.2e-4, constant to 10 T tokens,
 * cosine to 2.2e-5 over 4.3 T, 333 B tokens there, 167 B at 7.3e-6. A plain cosine has constant = warmup and low = end. */
typedef struct dsv3_schedule {
    double peak, low, tail;
    uint64_t warmup, constant, cosine, end; /* steps at which each phase ends; behind `end`: tail */
} dsv3_schedule;
DSV3_API double dsv3_learning_rate(const dsv3_schedule *schedule, uint64_t step);

/* Everything that is trained, and all memory for it. */
typedef struct dsv3_trainer {
    dsv3_training settings;
    dsv3_parameters weights, gradients;
    float *m, *v;           /* [count] moments of AdamW */
    float *ema;             /* [count] or NULL */
    uint64_t step;          /* optimizer steps done */
    dsv3_balancer balancer; /* loads, until dsv3_train_end clears them; rule and schedule are the caller's to set */
    dsv3_losses losses;     /* sums of the step so far, until the next begins */
    dsv3_workspace workspace; /* of settings.rows rows; free for other calls between the stages */
    struct dsv3i_trainer *own; /* private */
} dsv3_trainer;
DSV3_API dsv3_result dsv3_trainer_size(const dsv3_config *config, const dsv3_training *settings, size_t threads,
                                       size_t *bytes, dsv3_error *error);
/* Weights are zero: load or randomise trainer->weights before the first step. */
DSV3_API dsv3_result dsv3_trainer_init(const dsv3_config *config, dsv3_trainer *trainer, const dsv3_training *settings,
                                       size_t threads, void *memory, size_t bytes, dsv3_error *error);
/* Adds the targets of a text to targets [1 + depths] and its sequences to *sequences. */
DSV3_API dsv3_result dsv3_text_count(const dsv3_text *text, size_t depths, uint64_t *targets, uint64_t *sequences,
                                     dsv3_error *error);

/* A step in four stages. begin: clears gradients, loads and sums; targets [1 + D] and sequences are those of all
 * micro-batches and ranks, known before the first of them, so that each term has its final weight where it is made.
 * accumulate: forward and backward of one micro-batch; any split of the batch gives the same sums but for rounding. When
 * it fails or is aborted, the step's sums and gradients are no use: begin again. What is trained is as before.
 * end: reduces over ranks, clips, AdamW, the bias step. Gradients that are not finite, or whose squares are not, end it
 * with DSV3_ERR_NAN: nothing is trained then, and the biases stay. Bits do not depend on the number of threads.
 * ARG, with nothing changed: NULL, a setting outside its domain (error->name says which), a rate that is negative or too
 * large for float32, accumulate without begin, end without accumulate (with settings.reduce: without begin). */
DSV3_API dsv3_result dsv3_train_begin(dsv3_trainer *trainer, const uint64_t *targets, uint64_t sequences,
                                      dsv3_error *error);
DSV3_API dsv3_result dsv3_train_accumulate(const dsv3_context *context, dsv3_trainer *trainer, const dsv3_text *text,
                                           dsv3_error *error);
/* norm (may be NULL): global norm of the gradients before clipping. */
DSV3_API dsv3_result dsv3_train_end(const dsv3_context *context, dsv3_trainer *trainer, double learning_rate, double *norm,
                                    dsv3_error *error);
/* The loss of the step so far, as it is minimised. */
DSV3_API double dsv3_train_loss(const dsv3_trainer *trainer);
#endif

/* ---- Saving: a cache, a sequence or a training run as bytes, and back; chapter 16 --------------------------
 *
 * The bytes are the same on every machine (little-endian by definition) and may lie at any address. They hold what is
 * filled, not what there is room for, then a checksum. _save_size: how many they are now; _save writes exactly so many.
 * tag: 64 bits of the caller's that must be the same again, such as a hash of the weights' file: two models of one config
 * are told apart by nothing else. Objects that are saved are only read; one that is loaded must not be in use elsewhere.
 * Errors of _save: ARG (NULL, or see there), MISMATCH (made for other sizes), MEMORY (bytes are fewer than _save_size).
 * Errors of _load, with error->name for what is at fault, and the object as it was: DAMAGED (cut, altered, or no such bytes
 * at all), UNSUPPORTED (a later version), MISMATCH (another kind, config, tag, type, or form of the object: expected is what
 * the object has), FULL (longer than the caches: error->found[0] positions). */

/* config: of the model that fills the cache. The main model's caches and those of MTP modules alike. */
DSV3_API dsv3_result dsv3_cache_save_size(const dsv3_cache *cache, size_t *bytes, dsv3_error *error);
DSV3_API dsv3_result dsv3_cache_save(const dsv3_config *config, const dsv3_cache *cache, uint64_t tag, void *data,
                                     size_t bytes, dsv3_error *error);
/* Into a cache that was made by _init, for the same type; its capacity may be another. */
DSV3_API dsv3_result dsv3_cache_load(const dsv3_config *config, dsv3_cache *cache, uint64_t tag, const void *data,
                                     size_t bytes, dsv3_error *error);
/* Text, sampler, counters, last results, all but steer and stops: a loaded sequence goes on as the saved one would have. ARG for
 * one with a prompt not yet read, which is the caller's memory: read it first, or drop it with dsv3_sequence_truncate and
 * append it behind the load. */
DSV3_API dsv3_result dsv3_sequence_save_size(const dsv3_sequence *sequence, size_t *bytes, dsv3_error *error);
DSV3_API dsv3_result dsv3_sequence_save(const dsv3_model *model, const dsv3_sequence *sequence, uint64_t tag, void *data,
                                        size_t bytes, dsv3_error *error);
/* Into a sequence that was made by _init, with the same type, modules and drafts. capacity and rows may be others; with
 * other rows, dsv3_sequence_truncate may keep fewer tokens. MISMATCH of rows: they are so few that states which modules
 * have yet to read find no place. A prompt not yet read is dropped. */
DSV3_API dsv3_result dsv3_sequence_load(const dsv3_model *model, dsv3_sequence *sequence, uint64_t tag, const void *data,
                                        size_t bytes, dsv3_error *error);

#ifndef DSV3_NO_TRAINING
/* A run between two steps: weights with the routers' biases, moments, moving average, the number of steps, all loads so far.
 * Of a step under way nothing is saved: repeat it. Settings, schedules and hooks are the caller's to set as before; then
 * the next steps have the same bits as without the interruption. */
DSV3_API dsv3_result dsv3_trainer_save_size(const dsv3_trainer *trainer, size_t *bytes, dsv3_error *error);
DSV3_API dsv3_result dsv3_trainer_save(const dsv3_trainer *trainer, uint64_t tag, void *data, size_t bytes,
                                       dsv3_error *error);
/* Into a trainer that was made by _init, for the same config and with the same settings.ema. A step under way is given up. */
DSV3_API dsv3_result dsv3_trainer_load(dsv3_trainer *trainer, uint64_t tag, const void *data, size_t bytes,
                                       dsv3_error *error);
#endif

/* ---- Blocks ------------------------------------------------------------------------------------------ */

/* A batch of rows, see dsv3_batch above, is begun, taken through blocks, and ended: dsv3_batch_begin checks it and prepares the
 * workspace (which row belongs to which cache, at which position, turned by which angle), no more; dsv3_batch_end moves the
 * caches' lengths past the rows. Other calls with the workspace end it, too. ARG: no batch of n rows; FULL: other caches. */
DSV3_API dsv3_result dsv3_batch_begin(const dsv3_context *context, const dsv3_model *model, const dsv3_cache *caches,
                                      size_t n_caches, const dsv3_batch *batch, dsv3_workspace *workspace,
                                      dsv3_error *error);
DSV3_API dsv3_result dsv3_batch_end(dsv3_cache *caches, const dsv3_batch *batch, const dsv3_workspace *workspace,
                                    dsv3_error *error);
/* layer is the layer's index in the caches, n the rows of the batch that was begun.
 * y [n, d] = MLA(u [n, d]); appends the rows' latents to their caches at their positions. u is not y. */
DSV3_API dsv3_result dsv3_mla_forward(const dsv3_context *context, float *y, const float *u, const dsv3_model *model,
                                      const dsv3_layer *weights, size_t layer, dsv3_cache *caches, size_t n,
                                      dsv3_workspace *workspace, dsv3_error *error);
/* y [n, d] = FFN(u [n, d]): the dense MLP or the mixture of experts. Returns DSV3_ERR_NAN as dsv3_router_select. */
DSV3_API dsv3_result dsv3_ffn_forward(const dsv3_context *context, float *y, const float *u, const dsv3_model *model,
                                      const dsv3_layer *weights, size_t n, dsv3_workspace *workspace, dsv3_error *error);
/* x [n, d] += MLA(norm(x)); x += FFN(norm(x)). x is not in the workspace's memory. */
DSV3_API dsv3_result dsv3_layer_forward(const dsv3_context *context, float *x, const dsv3_model *model,
                                        const dsv3_layer *weights, size_t layer, dsv3_cache *caches, size_t n,
                                        dsv3_workspace *workspace, dsv3_error *error);

/* ---- Ops on plain arrays -----------------------------------------------------------------------------
 *
 * Each looks at its arguments first. Errors, with nothing written: ARG (NULL where something is needed, a value outside its
 * domain, y or dx over the x it is made of), TOKEN, MISMATCH (sizes that disagree), OVERFLOW, UNSUPPORTED. How long an array
 * really is, no op can know, nor what else it overlaps. n may be 0: nothing is done then, and arrays of rows may be NULL. */

/* y[i] = g[i] x[i] / sqrt(mean(x^2) + eps) for each of n rows. y [n, d] may be x itself. g [d], not FP8.
 * A row whose squares overflow float32 gives zeros (NaN where x is infinite), as the official code does. */
DSV3_API dsv3_result dsv3_rmsnorm(const dsv3_context *context, float *y, const float *x, const dsv3_tensor *g, size_t n,
                                  size_t d, float eps, dsv3_error *error);
/* x [n, cols] = rows token[t] of w, decoded to float32: the embedding, with w = embed_tokens. */
DSV3_API dsv3_result dsv3_embed(const dsv3_context *context, float *x, const int32_t *token, const dsv3_tensor *w, size_t n,
                                dsv3_error *error);
/* Bytes of scratch that dsv3_linear needs for n rows and a matrix of cols columns. */
DSV3_API dsv3_result dsv3_linear_size(const dsv3_context *context, size_t n, size_t cols, size_t *bytes, dsv3_error *error);
/* y [n, rows] = x [n, cols] W^T. scratch [dsv3_linear_size]. y must not overlap x. */
DSV3_API dsv3_result dsv3_linear(const dsv3_context *context, float *y, const float *x, const dsv3_tensor *w, size_t n,
                                 float *scratch, dsv3_error *error);
/* log sum exp(logits[0..V)), safe for any finite logits. -log p(target) = this - logits[target], in nats. For up to 2^24
 * logits in any order the error is below 2^-19, and 2^-17 of what this is above the largest logit (where double is a float,
 * 2^-17), beside the rounding of the result. Minus infinity for V = 0. */
DSV3_API float dsv3_log_sum_exp(const float *logits, size_t vocab_size);
/* Bytes of scratch that dsv3_cross_entropy needs for n rows. */
DSV3_API dsv3_result dsv3_cross_entropy_size(const dsv3_context *context, const dsv3_tensor *head, size_t n, size_t *bytes,
                                             dsv3_error *error);
#define DSV3_IGNORE (-100) /* a target that is none: its loss is 0 */
/* nll [n] = -log softmax(head u_t)[target_t] in nats for u [n, d], head [V, d] and target [n], a token or
 * DSV3_IGNORE. The logits are never all in memory: the vocabulary is taken in pieces. For up to 2^24 tokens in any order
 * the error is below 2^-19, beside that of the logits and the rounding of the result. scratch [dsv3_cross_entropy_size]. */
DSV3_API dsv3_result dsv3_cross_entropy(const dsv3_context *context, float *nll, const float *u, const dsv3_tensor *head,
                                        const int32_t *target, size_t n, float *scratch, dsv3_error *error);
/* RoPE frequencies in radians per position, theta [dr/2], YaRN applied. [R] sec. 4.3; chapter 5. */
DSV3_API dsv3_result dsv3_rope_frequencies(const dsv3_config *config, double *theta, dsv3_error *error);
/* The same as 64-bit fractions of a turn (2^64 = one turn), turns [dr/2]. */
DSV3_API dsv3_result dsv3_rope_turns(const dsv3_config *config, uint64_t *turns, dsv3_error *error);
/* Multiplier of cos and sin: m(mscale) / m(mscale_all_dim); 1 for every released model. */
DSV3_API float dsv3_rope_factor(const dsv3_config *config);
/* (dn+dr)^-1/2 m(mscale_all_dim)^2, applied to the whole attention score. */
DSV3_API float dsv3_softmax_scale(const dsv3_config *config);
/* cos_sin [n, dr]: for pair i of row t, cos at [t, 2i] and sin at [t, 2i+1]; as exact at position 2^24 as at 1. */
DSV3_API dsv3_result dsv3_rope_table(float *cos_sin, const int32_t *position, const uint64_t *turns, float factor, size_t n,
                                     size_t dr, dsv3_error *error);
/* Rotates x [dr] in place by one row of the table. interleave: pairs (2i, 2i+1), else (i, i + dr/2). */
DSV3_API dsv3_result dsv3_rope_rotate(float *x, const float *cos_sin, size_t dr, int interleave, dsv3_error *error);

/* ---- The router on plain arrays, without a model. Of config the routing fields alone are read: n_routed_experts,
 * num_experts_per_tok and those from there to routed_scaling_factor, group_mask, gate_scaling, bias_form. */

/* score [n, E] = sigmoid or softmax of z = gate_w x + gate_bias, in float32. gate_bias [E]: NULL in every released
 * model. scratch as for dsv3_linear. */
DSV3_API dsv3_result dsv3_router_scores(const dsv3_context *context, const dsv3_config *config, float *score,
                                        const float *x, const dsv3_tensor *gate_w, const float *gate_bias, size_t n,
                                        float *scratch, dsv3_error *error);
/* DSV3_OK, or ARG or UNSUPPORTED and the first routing field that is wrong: all that these calls ask of a config. */
DSV3_API dsv3_result dsv3_router_check(const dsv3_config *config, dsv3_error *error);
/* From score [n, E], bias [E] (NULL: none) and its strengths alpha [E] (NULL: 1) choose idx [n, K], in order of
 * falling choice score, ties to the lower index, and their weights gate [n, K]. scratch [E + G]. A score or choice
 * score that is not finite counts as the lowest and weighs nothing; the choice is then still valid and free of
 * duplicates, and the call returns DSV3_ERR_NAN after all rows are done. */
DSV3_API dsv3_result dsv3_router_select(const dsv3_config *config, int32_t *idx, float *gate, const float *score,
                                        const float *bias, const float *alpha, size_t n, float *scratch, dsv3_error *error);
/* gate [n, K] of a choice idx [n, K] made elsewhere. ARG, and nothing written, if an expert is out of range or
 * chosen twice by a row. */
DSV3_API dsv3_result dsv3_router_weights(const dsv3_config *config, float *gate, const int32_t *idx, const float *score,
                                         size_t n, dsv3_error *error);

#ifndef DSV3_NO_TRAINING
/* ---- Backward ops --------------------------------------------------------------------------------------- */

/* Gradients d.. are added to what stands there, so that branches and micro-batches add up; dy is the gradient of the op's
 * output. Saved values: the op's inputs.
 *
 * dx [n, cols] += dy W, dw [rows, cols] += dy^T x, for dy [n, rows] and x [n, cols]. dx, dw may be NULL. scratch as
 * dsv3_linear. */
DSV3_API dsv3_result dsv3_linear_backward(const dsv3_context *context, float *dx, float *dw, const float *dy,
                                          const float *x, const dsv3_tensor *w, size_t n, float *scratch,
                                          dsv3_error *error);
/* dx [dr] in place, from the gradient of the rotated values to that of those before. */
DSV3_API dsv3_result dsv3_rope_rotate_backward(float *dx, const float *cos_sin, size_t dr, int interleave,
                                               dsv3_error *error);
/* dw [V, d]: row token[t] += dx[t]. */
DSV3_API dsv3_result dsv3_embed_backward(float *dw, const float *dx, const int32_t *token, size_t n, size_t vocab_size,
                                         size_t d, dsv3_error *error);
/* dx [n, d], dg [d], where d is the number of columns of g. scratch [n]. */
DSV3_API dsv3_result dsv3_rmsnorm_backward(const dsv3_context *context, float *dx, float *dg, const float *dy,
                                           const float *x, const dsv3_tensor *g, size_t n, float eps, float *scratch,
                                           dsv3_error *error);
/* Of weight * sum_t nll_t: du [n, d], dhead [V, d] or NULL. scratch as dsv3_cross_entropy has left it, for the same
 * u, head and target. */
DSV3_API dsv3_result dsv3_cross_entropy_backward(const dsv3_context *context, float *du, float *dhead, float weight,
                                                 const float *u, const dsv3_tensor *head, const int32_t *target, size_t n,
                                                 float *scratch, dsv3_error *error);
/* The router's: dscore [n, E] from dgate [n, K]; dz [n, E] = from dscore [n, E] (not added; dz may be dscore); and
 * scale times the gradient of the weighted balance losses of one sequence (the devices are those of weights). scratch
 * [2 E]. A score that is not finite weighed nothing, and gets no gradient. Errors as of the ops whose backward they are. */
DSV3_API dsv3_result dsv3_router_weights_backward(const dsv3_config *config, float *dscore, const float *dgate,
                                                  const int32_t *idx, const float *score, size_t n, dsv3_error *error);
DSV3_API dsv3_result dsv3_router_scores_backward(const dsv3_config *config, float *dz, const float *dscore,
                                                 const float *score, size_t n, dsv3_error *error);
DSV3_API dsv3_result dsv3_balance_backward(float *dscore, double scale, const dsv3_balance_weights *weights,
                                           const dsv3_routing *routing, double *scratch, dsv3_error *error);
#endif

#ifdef __cplusplus
}
#endif
#endif /* DSV3_H */

/* ########################################################################################################
 * Implementation
 * #################################################################################################### */
#if defined(DSV3_IMPLEMENTATION) && !defined(DSV3_IMPLEMENTED)
#define DSV3_IMPLEMENTED

#include <float.h>
#include <limits.h>

#if DSV3_MAX_SEQ > 2147483647L || DSV3_MAX_LAYERS > 32767L || DSV3_MAX_VOCAB > 2147483647L ||                        \
    DSV3_MAX_HEADS > 2147483647L || DSV3_MAX_EXPERTS > 2147483647L || DSV3_MAX_TOPK > 2147483647L ||                 \
    DSV3_MAX_DIM > 1073741824L
#error "dsv3.h: a DSV3_MAX_... limit is larger than its fields can hold"
#endif

#ifdef DSV3_FREESTANDING
#if !defined(DSV3_EXPF) || !defined(DSV3_LOGF) || !defined(DSV3_SQRTF) || !defined(DSV3_SINF) ||                     \
    !defined(DSV3_COSF) || !defined(DSV3_POW) || !defined(DSV3_LOG) || !defined(DSV3_MEMCPY) ||                      \
    !defined(DSV3_MEMSET)
#error "dsv3.h: DSV3_FREESTANDING needs DSV3_EXPF LOGF SQRTF SINF COSF POW LOG MEMCPY MEMSET to be defined"
#endif
#else
#include <math.h>
#include <string.h>
#ifndef DSV3_EXPF
#define DSV3_EXPF expf
#endif
#ifndef DSV3_LOGF
#define DSV3_LOGF logf
#endif
#ifndef DSV3_SQRTF
#define DSV3_SQRTF sqrtf
#endif
#ifndef DSV3_SINF
#define DSV3_SINF sinf
#endif
#ifndef DSV3_COSF
#define DSV3_COSF cosf
#endif
#ifndef DSV3_POW
#define DSV3_POW pow
#endif
#ifndef DSV3_LOG
#define DSV3_LOG log
#endif
#ifndef DSV3_MEMCPY
#define DSV3_MEMCPY memcpy
#endif
#ifndef DSV3_MEMSET
#define DSV3_MEMSET memset
#endif
#endif

#ifndef DSV3_ASSERT
#define DSV3_ASSERT(x) ((void)0)
#endif

/* Arithmetic as it is written: sums in their order, infinity and NaN, float rounded to float. What a compiler says of its
 * settings is refused here (behind a declaration: gcc heeds its pragmas from there); for those that say nothing the order
 * is held, and dsv3_context_init tries it out. Before <immintrin.h>, whose functions are compiled here, too. */
struct dsv3i_mlp;
#ifndef DSV3_ALLOW_FAST_MATH
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(_M_FP_FAST) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "dsv3.h: fast math reorders sums and ignores NaN, which the algorithm needs (DSV3_ALLOW_FAST_MATH accepts it)"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "dsv3.h: float is computed in a wider type: -msse2 -mfpmath=sse, s390x -fexcess-precision=fast, or DSV3_ALLOW_FAST_MATH"
#endif
#if defined(__clang__) && __clang_major__ >= 18
#pragma clang fp reassociate(off) reciprocal(off)
#elif defined(__clang__) && __clang_major__ >= 13
#pragma clang fp reassociate(off)
#elif defined(_MSC_VER) && !defined(__clang__)
#pragma float_control(precise, on)
#endif
#endif

#if defined(_OPENMP) && !defined(DSV3_NO_OPENMP)
#include <omp.h>
#endif

/* The one place that looks at compilers and processors for the engine. */
#if defined(DSV3_SIMD) && (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define DSV3I_X86
#define DSV3I_ENGINE
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DSV3I_SANITIZED
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define DSV3I_SANITIZED
#endif
#ifdef DSV3I_SANITIZED /* unrolled loops with a check at each access take minutes to compile */
#define DSV3I_TARGET __attribute__((__target__(DSV3I_ISA), __no_sanitize__("address"), __no_sanitize__("undefined")))
#else
#define DSV3I_TARGET __attribute__((__target__(DSV3I_ISA))) /* DSV3I_ISA: what the code that follows is made for */
#endif
#define DSV3I_INLINE static inline __attribute__((__always_inline__)) DSV3I_TARGET
#define DSV3I_KERNEL static DSV3I_TARGET
#if defined(__clang__)
#define DSV3I_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DSV3I_UNROLL _Pragma("GCC unroll 64")
#endif
#if defined(__linux__) && defined(__LP64__) && !defined(DSV3_NO_AMX) &&                                              \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define DSV3I_TILES
#endif
#include <cpuid.h>
#include <immintrin.h>
#elif defined(DSV3_SIMD) && defined(_MSC_VER) && defined(_M_X64)
#define DSV3I_X86
#define DSV3I_ENGINE
#define DSV3I_INLINE static __forceinline
#define DSV3I_KERNEL static
#define DSV3I_UNROLL
#include <immintrin.h>
#include <intrin.h>
#endif

#if defined(__cplusplus) || !defined(__STDC_VERSION__) || __STDC_VERSION__ < 199901L
#if defined(__GNUC__) || defined(_MSC_VER)
#define DSV3I_RESTRICT __restrict
#else
#define DSV3I_RESTRICT
#endif
#else
#define DSV3I_RESTRICT restrict
#endif

/* ========================================================================================================
 * Chapter 2  >>tools
 *
 * Sizes that cannot wrap, memory layouts that cannot disagree with themselves, error reports, random numbers, and the
 * parallel loop. Test: tests/test_tools.c.
 * ==================================================================================================== */

/* A function that is not worth to be copied into its callers. */
#if defined(__GNUC__)
#define DSV3I_APART __attribute__((__noinline__)) static
#else
#define DSV3I_APART static
#endif

/* Returns from the calling function when call fails. */
#define DSV3I_TRY(call)                                                                                              \
    do {                                                                                                             \
        dsv3_result try_result = (call);                                                                             \
        if (try_result != DSV3_OK) return try_result;                                                                \
    } while (0)

#define DSV3I_COUNT(array) (sizeof(array) / sizeof(array)[0])

/* ---- Sizes: saturating arithmetic. SIZE_MAX means "too large" and stays so (but for a product with 0). */

static size_t dsv3i_add(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }
static size_t dsv3i_mul(size_t a, size_t b) { return b != 0 && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

/* The other way round: a - b, but never below 0. */
static size_t dsv3i_sub(size_t a, size_t b) { return a > b ? a - b : 0; }
static size_t dsv3i_min(size_t a, size_t b) { return a < b ? a : b; }
static size_t dsv3i_max(size_t a, size_t b) { return a > b ? a : b; }
static size_t dsv3i_blocks(size_t n, size_t block) { return n / block + (n % block != 0); }

/* statement for i = 0 .. n-1, with p = i mod 8: eight at a time, a number that compilers know and make vector instructions
 * of. What it reads and writes must not overlap, but for the same element. */
#define DSV3I_EIGHTS(n, statement)                                                                                   \
    do {                                                                                                             \
        size_t eights = 0;                                                                                           \
        for (; eights + 8 <= (n); eights += 8) {                                                                     \
            for (size_t p = 0; p < 8; p++) {                                                                         \
                const size_t i = eights + p;                                                                         \
                statement;                                                                                           \
            }                                                                                                        \
        }                                                                                                            \
        for (size_t p = 0; eights + p < (n); p++) {                                                                  \
            const size_t i = eights + p;                                                                             \
            statement;                                                                                               \
        }                                                                                                            \
    } while (0)

/* ---- The sizes of an architecture, with the names of the glossary, from one place */

#define DSV3I_DIMS(X)                                                                                                \
    X(d, hidden_size) X(H, num_attention_heads) X(rk, kv_lora_rank) X(dn, qk_nope_head_dim) X(dv, v_head_dim)        \
    X(E, n_routed_experts) X(K, num_experts_per_tok) X(dr, qk_rope_head_dim) X(rq, q_lora_rank) X(V, vocab_size)     \
    X(G, n_group) X(F, moe_intermediate_size) X(Fd, intermediate_size) X(L, num_hidden_layers)                       \
    X(D, num_nextn_predict_layers)

typedef struct dsv3i_dims {
    size_t qk;    /* dn + dr: one head's query */
    size_t width; /* rk + dr: what the cache keeps of a position */
#define DSV3I_DIM(name, field) size_t name;
    DSV3I_DIMS(DSV3I_DIM)
    size_t d2;          /* 2 d: what an MTP module joins */
    size_t kv;          /* dn + dv: one head's rows of kv_b_proj */
    size_t Hq, Hkv, Ho; /* H times qk, kv, dv */
    size_t Fs;          /* width of the shared experts */
} dsv3i_dims;

/* The int32_t at this offset in a struct. */
static int32_t dsv3i_int_at(const void *owner, size_t at) {
    int32_t value;
    DSV3_MEMCPY(&value, (const unsigned char *)owner + at, sizeof value);
    return value;
}

static dsv3i_dims dsv3i_dims_of(const dsv3_config *c) {
#define DSV3I_DIM_AT(name, field) offsetof(dsv3_config, field),
    static const uint8_t field[] = {DSV3I_DIMS(DSV3I_DIM_AT)};
    dsv3i_dims m;
    for (size_t i = 0; i < DSV3I_COUNT(field); i++) {
        size_t size = (size_t)dsv3i_int_at(c, field[i]);
        DSV3_MEMCPY((unsigned char *)&m + offsetof(dsv3i_dims, d) + i * sizeof size, &size, sizeof size);
    }
    m.d2 = 2 * m.d;
    m.qk = m.dn + m.dr;
    m.kv = m.dn + m.dv;
    m.width = m.rk + m.dr;
    m.Hq = dsv3i_mul(m.H, m.qk);
    m.Hkv = dsv3i_mul(m.H, m.kv);
    m.Ho = dsv3i_mul(m.H, m.dv);
    m.Fs = dsv3i_mul((size_t)c->n_shared_experts, m.F);
    return m;
}

/* Tables name a size by its place in a struct of nothing but sizes. */
#define DSV3I_PLACE_OF(owner, name) (uint8_t)(offsetof(owner, name) / sizeof(size_t))
static size_t dsv3i_size_at(const void *sizes, size_t place) {
    size_t size;
    DSV3_MEMCPY(&size, (const unsigned char *)sizes + place * sizeof size, sizeof size);
    return size;
}

/* Tells configs of different sizes apart (FNV-1a over the sizes). */
static uint64_t dsv3i_fingerprint(const dsv3_config *config) {
    const dsv3i_dims m = dsv3i_dims_of(config);
    const unsigned char *bytes = (const unsigned char *)&m; /* size_t throughout: no padding */
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < sizeof m; i++) h = (h ^ bytes[i]) * 0x100000001B3u;
    return h;
}

/* ---- Text: names and messages are built without stdio. */

typedef struct dsv3i_text {
    char *at;
    size_t left; /* the terminating zero included */
} dsv3i_text;

static dsv3i_text dsv3i_text_begin(char *out, size_t capacity) {
    dsv3i_text t;
    t.at = out;
    t.left = capacity;
    if (capacity > 0) out[0] = '\0';
    return t;
}

static void dsv3i_text_add(dsv3i_text *t, const char *s) {
    while (*s != '\0' && t->left > 1) {
        *t->at++ = *s++;
        t->left--;
    }
    if (t->left > 0) *t->at = '\0';
}

static void dsv3i_text_add_int(dsv3i_text *t, int64_t value) {
    char digits[21];
    size_t n = sizeof digits;
    uint64_t v = value < 0 ? 0u - (uint64_t)value : (uint64_t)value;
    digits[--n] = '\0';
    do {
        digits[--n] = (char)('0' + (int)(v % 10u));
        v /= 10u;
    } while (v != 0);
    if (value < 0) dsv3i_text_add(t, "-");
    dsv3i_text_add(t, digits + n);
}

/* The next of texts that follow each other. */
static const char *dsv3i_next_text(const char *text) {
    while (*text++ != '\0') continue;
    return text;
}

/* "layers." 3 "." */
static void dsv3i_text_add_index(dsv3i_text *t, const char *before, int64_t index, const char *behind) {
    dsv3i_text_add(t, before);
    dsv3i_text_add_int(t, index);
    dsv3i_text_add(t, behind);
}

/* ---- Errors */

DSV3_API const char *dsv3_result_string(dsv3_result result) {
    /* one row of characters, no pointers: nothing here needs relocation or writable memory */
    static const char texts[] = "ok\0bad argument\0beyond a limit\0size overflow\0not supported\0buffer too small\0"
                                "buffer not aligned\0tensor missing\0shape mismatch\0token outside vocabulary\0"
                                "position out of sequence\0cache full\0value not finite\0aborted by the caller\0"
                                "saved bytes damaged";
    const char *text = texts;
    if (result > DSV3_OK || result < DSV3_ERR_DAMAGED) return "unknown result";
    for (int i = 0; i > (int)result; i--) text = dsv3i_next_text(text);
    return text;
}

/* All errors are made here: code, name and reason. Numbers may be added. */
DSV3I_APART dsv3_result dsv3i_fail(dsv3_error *error, dsv3_result code, const char *name, const char *why) {
    if (error != NULL) {
        dsv3i_text t = dsv3i_text_begin(error->name, sizeof error->name);
        DSV3_MEMSET(error->expected, 0, sizeof error->expected);
        DSV3_MEMSET(error->found, 0, sizeof error->found);
        error->numbers = DSV3_NUMBERS_NONE;
        error->code = code;
        error->why = why;
        dsv3i_text_add(&t, name);
    }
    return code;
}

DSV3I_APART dsv3_result dsv3i_fail_numbers(dsv3_error *error, dsv3_result code, const char *name, const char *why,
                                          dsv3_numbers numbers, int64_t e0, int64_t e1, int64_t f0, int64_t f1) {
    (void)dsv3i_fail(error, code, name, why);
    if (error != NULL) {
        error->numbers = numbers;
        error->expected[0] = e0;
        error->expected[1] = e1;
        error->found[0] = f0;
        error->found[1] = f1;
    }
    return code;
}

DSV3I_APART dsv3_result dsv3i_fail_range(dsv3_error *error, dsv3_result code, const char *name, const char *why,
                                        int64_t low, int64_t high, int64_t found) {
    return dsv3i_fail_numbers(error, code, name, why, DSV3_NUMBERS_RANGE, low, high, found, 0);
}

DSV3I_APART dsv3_result dsv3i_fail_where(dsv3_error *error, dsv3_result code, const char *name, const char *why, int64_t number) {
    return dsv3i_fail_numbers(error, code, name, why, DSV3_NUMBERS_WHERE, 0, 0, number, 0);
}

/* An error about element i of an array: name[i]. */
DSV3I_APART dsv3_result dsv3i_fail_at(dsv3_error *error, size_t i, dsv3_result code) {
    if (error != NULL) {
        dsv3i_text t = {error->name, sizeof error->name};
        for (; *t.at != '\0'; t.at++) t.left--;
        dsv3i_text_add_index(&t, "[", (int64_t)i, "]");
    }
    return code;
}

DSV3I_APART dsv3_result dsv3i_fail_row(dsv3_error *error, dsv3_result code, const char *name, size_t i,
                                      const char *why, int64_t low, int64_t high, int64_t found) {
    return dsv3i_fail_at(error, i, dsv3i_fail_range(error, code, name, why, low, high, found));
}

DSV3I_APART dsv3_result dsv3i_check_between(dsv3_error *error, dsv3_result code, const char *name, const char *why,
                                            int64_t value, int64_t low, int64_t high) {
    return value >= low && value <= high ? DSV3_OK : dsv3i_fail_range(error, code, name, why, low, high, value);
}

/* Is element i of an array one of 0 .. count - 1? */
DSV3I_APART dsv3_result dsv3i_check_element(dsv3_error *error, dsv3_result code, const char *name, size_t i,
                                           const char *why, int64_t count, int64_t found) {
    return found >= 0 && found < count ? DSV3_OK : dsv3i_fail_row(error, code, name, i, why, 0, count - 1, found);
}

static dsv3_result dsv3i_check_token(dsv3_error *error, const char *name, size_t i, int32_t V, int32_t token) {
    return dsv3i_check_element(error, DSV3_ERR_TOKEN, name, i, "is outside the vocabulary", V, token);
}

static dsv3_result dsv3i_check_least(dsv3_error *error, dsv3_result code, const char *name, const char *why, size_t n,
                                     size_t least) {
    if (n >= least) return DSV3_OK;
    return dsv3i_fail_range(error, code, name, why, (int64_t)least, (int64_t)least, (int64_t)n);
}

/* name: perhaps behind the struct that it is in, "batch->token". */
DSV3I_APART dsv3_result dsv3i_fail_null(dsv3_error *error, const char *name) {
    for (const char *c = name; *c != '\0'; c++) name = *c == '>' ? c + 1 : name;
    return dsv3i_fail(error, DSV3_ERR_ARG, name, "is NULL");
}

/* Returns from the calling function when an array of n elements is NULL. */
#define DSV3I_NEED(n, array)                                                                                         \
    if ((n) > 0 && (array) == NULL) return dsv3i_fail_null(error, #array)

static dsv3_result dsv3i_ok(dsv3_error *error) { return dsv3i_fail(error, DSV3_OK, "", "ok"); }

/* Behind the words " 3", or " (expected 256 x 48, found 48 x 256)": pairs for shapes, "1 to 8" for a range. */
DSV3_API const char *dsv3_error_text(const dsv3_error *e, char *text, size_t capacity) {
    dsv3i_text t = dsv3i_text_begin(text, capacity);
    int shape = e->numbers == DSV3_NUMBERS_SHAPE;
    dsv3i_text_add(&t, e->name);
    if (e->name[0] != '\0') dsv3i_text_add(&t, ": ");
    dsv3i_text_add(&t, e->why != NULL ? e->why : dsv3_result_string(e->code));
    if (e->numbers == DSV3_NUMBERS_NONE) return text;
    dsv3i_text_add_index(&t, e->numbers == DSV3_NUMBERS_WHERE ? " " : " (expected ",
                         e->numbers == DSV3_NUMBERS_WHERE ? e->found[0] : e->expected[0], "");
    if (e->numbers == DSV3_NUMBERS_WHERE) return text;
    if (shape || e->expected[0] != e->expected[1]) {
        dsv3i_text_add_index(&t, shape ? " x " : " to ", e->expected[1], "");
    }
    dsv3i_text_add_index(&t, ", found ", e->found[0], shape ? " x " : ")");
    if (shape) dsv3i_text_add_index(&t, "", e->found[1], ")");
    return text;
}

/* There is at least one of something, and not more than `most`. */
DSV3I_APART dsv3_result dsv3i_check_count(dsv3_error *error, const char *name, size_t n, int64_t most) {
    return dsv3i_check_between(error, n < 1 ? DSV3_ERR_ARG : DSV3_ERR_LIMIT, name, "is out of range", (int64_t)n, 1, most);
}

/* Do a [n] and b [m], in bytes, have any in common? */
static int dsv3i_overlap(const void *a, size_t n, const void *b, size_t m) {
    uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    return n > 0 && m > 0 && (x < y ? y - x < n : x - y < m);
}

/* Fields that the caller may set, and that dsv3_context_init has been here. */
static dsv3_result dsv3i_check_context(const dsv3_context *context, dsv3_error *error) {
    DSV3I_NEED(1, context);
    if (context->ops == NULL) return dsv3i_fail(error, DSV3_ERR_ARG, "context", "was not made by dsv3_context_init");
    if (context->threads < 1) return dsv3i_fail(error, DSV3_ERR_ARG, "context.threads", "is 0");
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "context.compute", "is not one of dsv3_compute",
                                  (int32_t)context->compute, DSV3_EXACT, DSV3_FAST));
    return dsv3i_check_between(error, DSV3_ERR_ARG, "context.attention", "is not one of dsv3_attention",
                               (int32_t)context->attention, DSV3_ATTENTION_AUTO, DSV3_ATTENTION_EXPANDED);
}

/* ---- Layouts: one cursor walks through a buffer, or through nothing to learn the size. The same function
 * runs for _size (base NULL) and for _init, so that the sum and the pointers cannot disagree. Parts begin on
 * cache lines, wherever the caller's buffer begins: a size includes what is lost at its front. */

#define DSV3I_LINE (sizeof(void *) > 4 ? 64u : 16u)

typedef struct dsv3i_layout {
    unsigned char *base; /* NULL: only measure */
    size_t used;         /* bytes so far, SIZE_MAX once too large */
} dsv3i_layout;

/* a x b x c elements of size bytes; NULL when only measuring. */
static void *dsv3i_take(dsv3i_layout *l, size_t size, size_t a, size_t b, size_t c) {
    size_t bytes = dsv3i_mul(dsv3i_mul(dsv3i_mul(size, a), b), c);
    size_t padded = dsv3i_mul(dsv3i_blocks(bytes, DSV3I_LINE), DSV3I_LINE);
    void *at = l->base == NULL || l->used == SIZE_MAX ? NULL : (void *)(l->base + l->used);
    l->used = dsv3i_add(l->used, bytes == SIZE_MAX ? SIZE_MAX : padded);
    return at;
}

/* rows x columns of them; NULL for 0 rows. */
static void *dsv3i_take_rows(dsv3i_layout *l, size_t size, size_t rows, size_t columns) {
    return rows == 0 ? NULL : dsv3i_take(l, size, rows, columns, 1);
}

/* Many arrays of one struct are a table: where the pointer stands in it, and two sizes in another struct. Part 0 is laid out
 * first; parts 1, 2 .. are never in use together, and all begin where it ends. */
typedef struct dsv3i_array {
    uint16_t at;
    uint8_t size, rows, columns, part;
} dsv3i_array;
#define DSV3I_ARRAY(owner, sizes, part, type, name, rows, columns)                                                   \
    {(uint16_t)offsetof(owner, name), sizeof(type), DSV3I_PLACE_OF(sizes, rows), DSV3I_PLACE_OF(sizes, columns), part},

static void dsv3i_take_arrays(dsv3i_layout *l, void *owner, const dsv3i_array *list, size_t count, const void *sizes) {
    size_t from = l->used, end = 0;
    for (size_t i = 0; i < count; i++) {
        size_t rows = dsv3i_size_at(sizes, list[i].rows), columns = dsv3i_size_at(sizes, list[i].columns);
        void *array;
        end = dsv3i_max(end, l->used);
        if (i > 0 && list[i].part != list[i - 1].part) {
            if (list[i - 1].part == 0) from = l->used;
            l->used = from;
        }
        array = dsv3i_take_rows(l, list[i].size, rows, columns);
        DSV3_MEMCPY((unsigned char *)owner + list[i].at, &array, sizeof array);
    }
    l->used = dsv3i_max(end, l->used);
}

static dsv3_result dsv3i_layout_size(const dsv3i_layout *l, size_t *bytes, dsv3_error *error) {
    if (bytes == NULL) return dsv3i_fail_null(error, "bytes");
    *bytes = dsv3i_add(l->used, DSV3I_LINE - DSV3_ALIGN);
    if (*bytes < SIZE_MAX) return dsv3i_ok(error);
    *bytes = 0;
    return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "bytes", "are more than size_t can count");
}

/* Where a layout over memory begins. */
static unsigned char *dsv3i_layout_base(void *memory) {
    size_t past = (size_t)((uintptr_t)memory % DSV3I_LINE);
    return (unsigned char *)memory + (past == 0 ? 0 : DSV3I_LINE - past);
}

/* May a layout of `need` bytes be laid over memory [bytes]? */
static dsv3_result dsv3i_memory_check(const void *memory, size_t bytes, size_t need, dsv3_error *error) {
    size_t past = (size_t)((uintptr_t)memory % DSV3_ALIGN);
    if (memory == NULL) return dsv3i_fail_null(error, "memory");
    if (past != 0) {
        return dsv3i_fail_where(error, DSV3_ERR_ALIGN, "memory", "lies behind a multiple of 8, by bytes:", (int64_t)past);
    }
    return dsv3i_check_least(error, DSV3_ERR_MEMORY, "memory", "is too small", bytes, need);
}

/* Begins the layout of an object over memory [bytes], which was measured, with that result, as *need bytes. */
static dsv3_result dsv3i_layout_begin(dsv3i_layout *l, const void *object, dsv3_result measured, void *memory,
                                      size_t bytes, const size_t *need, dsv3_error *error) {
    DSV3I_TRY(measured);
    if (object == NULL) return dsv3i_fail_null(error, "object");
    DSV3I_TRY(dsv3i_memory_check(memory, bytes, *need, error));
    l->base = dsv3i_layout_base(memory);
    l->used = 0;
    return DSV3_OK;
}

/* A struct of pointers into such a buffer has its members in a list, with their shapes,
 *     #define DSV3I_PAIR(X) X(int32_t, token, n, 1) X(float, x, n, m->d)
 * of which one macro makes the struct and the other its layout, where l, at, n and m are known:
 *     struct dsv3i_pair { DSV3I_PAIR(DSV3I_MEMBER) };         int32_t *token; float *x;
 *     DSV3I_PAIR(DSV3I_TAKE)                               at->token = dsv3i_take_rows(l, sizeof(int32_t), n, 1); ..
 */
#define DSV3I_MEMBER(type, name, rows, columns) type *name;
#define DSV3I_TAKE(type, name, rows, columns) at->name = (type *)dsv3i_take_rows(l, sizeof(type), rows, columns);

/* Such a struct has two programs around its layout function: _size ends with an `it` laid out over nothing, and _init
 * begins with l over memory [bytes], once _size has said what is needed. */
#define DSV3I_SIZE(type, bytes, layout)                                                                              \
    type it;                                                                                                         \
    dsv3i_layout l = {NULL, 0};                                                                                      \
    layout;                                                                                                          \
    return dsv3i_layout_size(&l, bytes, error)
#define DSV3I_INIT(object, size)                                                                                     \
    dsv3i_layout l = {NULL, 0};                                                                                      \
    size_t need = 0;                                                                                                 \
    DSV3I_TRY(dsv3i_layout_begin(&l, object, size, memory, bytes, &need, error))

/* ---- Random numbers: splitmix64, a counter and a mixing function. */

DSV3_API uint64_t dsv3_random(dsv3_rng *rng) {
    uint64_t z = rng->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

DSV3_API float dsv3_random_uniform(dsv3_rng *rng) {
    return (float)(dsv3_random(rng) >> 40) * 5.9604644775390625e-08f; /* 24 bits times 2^-24 */
}

/* 53 bits times 2^-53 */
static double dsv3i_uniform(dsv3_rng *rng) { return (double)(dsv3_random(rng) >> 11) * 1.1102230246251565e-16; }

/* ---- Parallel loops. work is the loop's cost in multiply-adds, roughly: what is too small to be worth
 * waking anybody (some tens of microseconds) runs right here. */

#ifndef DSV3I_SERIAL_WORK
#define DSV3I_SERIAL_WORK 262144u
#endif

static void dsv3i_parallel(const dsv3_context *ctx, size_t n, size_t work, dsv3_task task, void *arg) {
    if (n == 0) return;
    if (ctx->parallel_for == NULL || ctx->threads < 2 || n < 2 || work < DSV3I_SERIAL_WORK) {
        task(arg, 0, n, 0);
    } else {
        ctx->parallel_for(ctx->parallel_user, ctx->threads, n, task, arg);
    }
}

/* n items of `each` multiply-adds. */
static void dsv3i_loop(const dsv3_context *ctx, size_t n, size_t each, dsv3_task task, void *arg) {
    dsv3i_parallel(ctx, n, dsv3i_mul(n, each), task, arg);
}

#if defined(_OPENMP) && !defined(DSV3_NO_OPENMP)
/* Eight parts per thread: small enough to balance uneven items, large enough to be cheap. */
static void dsv3i_parallel_openmp(void *user, size_t threads, size_t n, dsv3_task task, void *arg) {
    size_t parts = dsv3i_min(n, dsv3i_mul(threads, 8));
    (void)user;
    _Pragma("omp parallel for schedule(dynamic, 1) num_threads((int)threads)") for (long i = 0; i < (long)parts;
                                                                                    i++) {
        size_t p = (size_t)i, each = n / parts, more = n % parts;
        size_t begin = p * each + dsv3i_min(p, more);
        task(arg, begin, begin + each + (p < more), (size_t)omp_get_thread_num());
    }
}
#endif

/* ---- >>table  What a backend may do in its own way; everything else in this file is done in one way only. The functions
 * of chapters 3 to 8 are the backend "reference", and what every other is proved against, op by op
 * (tests/test_ops_table.c). Nothing but `own` may be NULL. */

/* y [n, rows] = x [n, cols] times rows [row, row + rows) of W, transposed. */
typedef struct dsv3i_product {
    float *y;
    const float *x;
    const dsv3_tensor *w;
    size_t n, row, rows;
} dsv3i_product;

#define DSV3I_PRODUCTS 2 /* in one call, at most */

struct dsv3i_call;  /* below */
struct dsv3i_saved;
struct dsv3i_backward;
struct dsv3i_mlp;  /* an MLP and the rows it sees: chapter 8 */

typedef struct dsv3i_ops {
    void (*decode[DSV3_TYPES])(float *y, const void *w, size_t n); /* y[i] = element i of w, scales of FP8 apart */
    float (*dot)(const float *x, const float *y, size_t n);
    void (*axpy)(float *y, float a, const float *x, size_t n);
    float (*exp_sum)(float *p, const float *s, float top, size_t n);
    void (*silu_mul)(float *h, const float *a, const float *b, size_t n);
    void (*linear)(const dsv3_context *ctx, const dsv3i_product *list, size_t count, float *scratch);
    void (*attend)(struct dsv3i_call *c); /* ws->o and ws->softmax of ws->q and the caches, in either form */
    void (*mlps)(struct dsv3i_call *c, const struct dsv3i_mlp *list, size_t count);
#ifndef DSV3_NO_TRAINING
    /* dx [n, cols] += dy W (beta0: =), dw [rows, cols] += dy^T x; p->y [n, rows] is dy; NULL: not wanted */
    void (*linear_backward)(const dsv3_context *ctx, float *dx, int beta0, float *dw, const dsv3i_product *p, float *scratch);
    void (*attend_backward)(struct dsv3i_call *c); /* b->dq, dkeys, and the values' part of dkv_up, of b->dout */
    void (*mlps_backward)(struct dsv3i_call *c, const struct dsv3i_mlp *list, size_t count);
#endif
    const void *own; /* the engine's; NULL: weights are read as they lie */
} dsv3i_ops;

/* The engine's say in the book: how much scratch its ops want, and how it reads rows that dsv3_pack has reordered. `_size`
 * calls know no backend, so that sizes are the most that any backend compiled in wants. */
#ifdef DSV3I_ENGINE
static size_t dsv3i_engine_linear_floats(size_t n, size_t cols, size_t threads);
static size_t dsv3i_engine_pass_floats(const dsv3i_dims *m, size_t n, size_t threads);
static void dsv3i_engine_decode_row(float *y, const dsv3_tensor *w, size_t row);
#else
#define dsv3i_engine_linear_floats(n, cols, threads) ((size_t)0)
#define dsv3i_engine_pass_floats(m, n, threads) ((size_t)0)
#endif

/* ---- What a layer's ops work on, and what a backward pass keeps */

#ifndef DSV3_NO_TRAINING
/* What a layer keeps of n rows for its backward pass: the residual stream before attention and before the FFN, raw
 * projections, attention's output and softmax, the router's choice, hidden values; and, where `keep` asks for them, the
 * outputs of norms, queries, the outputs of SwiGLU. moe, norms, queries, swiglu: n, or 0 where there is no such member. */
#define DSV3I_SAVED(X)                                                                                               \
    X(float, x_mid, n, m->d) X(float, q_raw, n, m->rq) X(float, kv_raw, n, m->width)                                 \
    X(float, o, n, m->Ho) X(float, softmax, n, 2 * m->H)                                                             \
    X(float, score, moe, m->E) X(float, gate, moe, m->K) X(int32_t, idx, moe, m->K)                                  \
    X(size_t, slot, moe, m->K) X(size_t, offset, moe > 0 ? m->E + 1 : 0, 1)                                          \
    X(float, h_gate, n, hidden) X(float, h_up, n, hidden)                                                            \
    X(float, u, norms, m->d) X(float, u_ffn, norms, m->d) X(float, q_latent, norms, m->rq)                           \
    X(float, kv, norms, m->width) X(float, q, queries, m->Hq) X(float, h, swiglu, hidden)

typedef struct dsv3i_saved {
    float *x_in; /* [n, d]; all others have the names that they have in a workspace */
    DSV3I_SAVED(DSV3I_MEMBER)
} dsv3i_saved;

/* Scratch of the backward pass, one for all layers. kv_up [n, H(dn+dv)] are keys and values rebuilt from latents c; gates
 * and r stand in the order of experts; r is also 1 / rms of rows. */
#define DSV3I_BACKWARD(X)                                                                                            \
    X(float, du, n, m->d) X(float, dq, n, m->Hq) X(float, keys, n, m->Hq) X(float, dkeys, n, m->Hq)                  \
    X(float, kv_up, n, m->Hkv) X(float, dkv_up, n, m->Hkv) X(float, dout, n, m->Ho) X(float, delta, n, m->H)         \
    X(float, c, n, m->rk) X(float, dc, n, m->rk) X(float, dkv_raw, n, m->width)                                      \
    X(float, dq_latent, n, m->rq) X(float, dq_raw, n, m->rq) X(float, dh, n, hidden)                                 \
    X(float, gates, n, m->K) X(float, dgate, n, m->K) X(float, dscore, n, m->E)                                      \
    X(float, dgrouped, n, dsv3i_mul(m->K, m->d)) X(float, r, n, dsv3i_max(m->K, 1))

typedef struct dsv3i_backward {
    DSV3I_BACKWARD(DSV3I_MEMBER)
    const dsv3_balance_weights *balance;
    double balance_scale; /* 1 / sequences of the step */
} dsv3i_backward;
#endif

/* Intermediate values of a pass of n rows: a layout over dsv3_workspace.memory, made anew by each call, so that the memory
 * may hold anything before it. x is the residual stream, u normalised rows, y the result of a block; leader [n] the first row
 * of the call that has the same sequence, expanded [n] whether it attends in that form; row_.. a batch being gathered, and
 * views its caches; softmax running maxima and sums; slot [n, K] the row of (token, choice) among the rows grouped by expert,
 * pair the way back (token K + choice), offset the first row of each expert. Parts: rows of a pass; an MTP module's input,
 * the loss, attention, the FFN. */
#define DSV3I_WORKSPACE(X)                                                                                           \
    X(0, int32_t, sequence, n, one) X(0, int32_t, position, n, one) X(0, int32_t, leader, n, one)                    \
    X(0, int32_t, expanded, n, one) X(0, float, cos_sin, n, m.dr) X(0, float, x, n, m.d) X(0, float, u, n, m.d)      \
    X(0, float, y, n, m.d) X(0, float, scratch, scratch, one) X(0, dsv3_cache, views, n, one)                        \
    X(0, int32_t, row_token, n, one) X(0, int32_t, row_sequence, n, one) X(0, int32_t, row_output, n, one)           \
    X(0, size_t, row_index, n, one) X(0, uint8_t, row_mask, n, one) X(0, float, row_hidden, modules, m.d)            \
    X(0, double, balance, threads, E2) X(0, double, sequence_loss, n, one) X(1, float, concat, modules, m.d2)        \
    X(2, float, loss, loss, one) X(3, float, q_latent, n, m.rq) X(3, float, q, n, m.Hq) X(3, float, kv, n, m.width)  \
    X(3, float, o, n, m.Ho) X(3, float, softmax, n, H2) X(4, float, score, n, m.E) X(4, float, bias, m.E, one)       \
    X(4, float, select, threads, select) X(4, int32_t, idx, n, m.K) X(4, float, gate, n, m.K)                        \
    X(4, size_t, slot, n, m.K) X(4, size_t, pair, n, m.K) X(4, size_t, offset, E1, one)                              \
    X(4, struct dsv3i_mlp, mlps, mlps, one) X(4, float, grouped, n, Kd) X(4, float, h_gate, n, hidden)                      \
    X(4, float, h_up, n, hidden)
#define DSV3I_WORKSPACE_MEMBER(part, type, name, rows, columns) type *name;

typedef struct dsv3i_workspace {
    size_t rows, threads;
    DSV3I_WORKSPACE(DSV3I_WORKSPACE_MEMBER)
    float *u_ffn, *kv_raw, *q_raw, *h; /* u, kv, q_latent and h_gate, unless a backward pass wants both of a pair */
    float *x_mid;                      /* [n, d] NULL, or gets the residual stream between attention and FFN */
    const float *hidden;               /* x or u */
} dsv3i_workspace;

/* Its arrays: in chapter 15. */
static dsv3i_workspace dsv3i_workspace_of(const dsv3_workspace *workspace, const dsv3_config *config);

/* One layer's part of a pass. */
typedef struct dsv3i_call {
    const dsv3_context *ctx;
    const dsv3_model *model;
    const dsv3_layer *w;
    dsv3i_workspace *ws;
    size_t n; /* rows */
    dsv3i_dims m;
    dsv3_cache *caches;
    size_t layer; /* its index in the caches */
    const dsv3_layer *g; /* backward: gradients of w, else NULL; what w has kept; scratch */
    const struct dsv3i_saved *s;
    const struct dsv3i_backward *b;
} dsv3i_call;

static dsv3i_call dsv3i_call_of(const dsv3_context *ctx, const dsv3_model *model, const dsv3_layer *w, size_t layer,
                                dsv3_cache *caches, size_t n, dsv3i_workspace *ws) {
    dsv3i_call c = {ctx, model, w, ws, n, dsv3i_dims_of(&model->config), caches, layer, NULL, NULL, NULL};
    return c;
}

/* All rows of w. */
DSV3I_APART dsv3i_product dsv3i_product_of(float *y, const float *x, const dsv3_tensor *w, size_t n) {
    dsv3i_product p = {y, x, w, n, 0, w->rows};
    return p;
}

/* y [n, w->rows] = x [n, cols] W^T */
static void dsv3i_project(const dsv3i_call *c, float *y, const float *x, const dsv3_tensor *w) {
    dsv3i_product p = dsv3i_product_of(y, x, w, c->n);
    c->ctx->ops->linear(c->ctx, &p, 1, c->ws->scratch);
}

#ifndef DSV3_NO_TRAINING
/* The gradient of a weight of the gradients' model, which is made over memory that may be written (chapter 14). */
static float *dsv3i_grad(const dsv3_tensor *g) { return (float *)(uintptr_t)g->data; }

/* dx [n, cols] += dy W (beta0: =), and the gradient g of w. */
static void dsv3i_project_backward(const dsv3_context *ctx, const dsv3i_workspace *ws, float *dx, int beta0,
                                   const dsv3_tensor *g, const float *dy, const float *x, const dsv3_tensor *w, size_t n) {
    dsv3i_product p = dsv3i_product_of((float *)(uintptr_t)dy, x, w, n);
    ctx->ops->linear_backward(ctx, dx, beta0, dsv3i_grad(g), &p, ws->scratch);
}
#endif

/* ========================================================================================================
 * Chapter 3  >>formats
 *
 * The number formats of checkpoints: what their bits mean, the nearest code of a number, and whole matrices of codes.
 *     F16      1 sign, 5 exponent and 10 mantissa bits        BF16    1, 8 and 7: the upper half of a float
 *     E4M3     1, 4 and 3; a float scale for every 128 x 128 of a matrix
 *     Q8_0     32 signed bytes and their F16 scale            Q4_0    32 times 4 bits, likewise
 * The scales that dsv3_quantize takes, with amax the largest magnitude in the block:
 *     E4M3     amax / 448; 1 if that is no normal float, and all of the block becomes zero
 *     Q8_0     d = amax / 127, codes -127 to 127
 *     Q4_0     d = (the value of largest magnitude, the first of equals) / -8, codes 0 to 15: the other sign ends at 7 |d|
 * d is rounded to F16 before x is divided by it: to the nearest, but away from zero below 2^-14, where the nearest may be
 * far off, so that no d of a block that is not all zero is 0.
 * Test: tests/test_codecs.c.
 * ==================================================================================================== */

/* ---- Floats. Bits move through memcpy: no aliasing, no alignment, no assumption on compilers. */

static uint32_t dsv3i_bits(float x) {
    uint32_t bits;
    DSV3_MEMCPY(&bits, &x, sizeof bits);
    return bits;
}

static float dsv3i_float(uint32_t bits) {
    float x;
    DSV3_MEMCPY(&x, &bits, sizeof x);
    return x;
}

/* The sign and exponent of x in the place where a float has them. Tests compile this file with double as its real
 * type, to compare gradients with finite differences: hence the second case. */
static uint32_t dsv3i_upper_bits(float x) {
    uint64_t wide;
    if (sizeof x == sizeof(uint32_t)) return dsv3i_bits(x);
    DSV3_MEMCPY(&wide, &x, sizeof x);
    wide = (wide & 0x7FFFFFFFFFFFFFFFu) >= 0x7FF0000000000000u ? wide >> 29 | (wide & 0x1FFFFFFFu) : 0;
    return (uint32_t)(wide & 0x7FFFFFFFu);
}

/* Judged by bits, so that no compiler flag can reason it away: exponent all ones is NaN or infinity. */
static int dsv3i_is_finite(float x) { return (dsv3i_upper_bits(x) & 0x7F800000u) != 0x7F800000u; }
static int dsv3i_is_nan(float x) { return (dsv3i_upper_bits(x) & 0x7FFFFFFFu) > 0x7F800000u; }

static int dsv3i_all_finite(const float *x, size_t n) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++) bad |= (uint32_t)!dsv3i_is_finite(x[i]);
    return !bad;
}

/* ---- Types */

DSV3_API size_t dsv3_type_block(dsv3_type type) { return type == DSV3_Q8_0 || type == DSV3_Q4_0 ? DSV3_QBLOCK : 1; }

DSV3_API size_t dsv3_type_bytes(dsv3_type type) {
    static const uint8_t bytes[DSV3_TYPES] = {sizeof(float), 2, 2, 1, 2 + DSV3_QBLOCK, 2 + DSV3_QBLOCK / 2};
    return (unsigned)type < DSV3_TYPES ? bytes[type] : 0;
}

DSV3_API size_t dsv3_row_bytes(dsv3_type type, size_t cols) {
    size_t block = dsv3_type_block(type);
    return cols % block != 0 ? 0 : dsv3i_mul(cols / block, dsv3_type_bytes(type));
}

DSV3_API const char *dsv3_type_name(dsv3_type type) {
    static const char name[][8] = {"F32", "F16", "BF16", "F8_E4M3", "Q8_0", "Q4_0", "unknown"};
    return name[(unsigned)type < DSV3_TYPES ? type : DSV3_TYPES];
}

/* ---- Numbers. BF16 is the upper half of a float. F16: exponent and mantissa are put into place and the exponent's bias is
 * corrected by adding to it. That gives a subnormal code (exponent field 0, no implicit one) the value (1 + m) 2^-15
 * where m 2^-14 is meant; 2 (1 + m) 2^-15 - 2^-14 mends it, exactly, and without touching subnormal floats. */

DSV3_API float dsv3_f32_from_bf16(uint16_t bits) { return dsv3i_float((uint32_t)bits << 16); }

DSV3_API float dsv3_f32_from_f16(uint16_t bits) {
    uint32_t magnitude = ((uint32_t)bits & 0x7FFFu) << 13, sign = ((uint32_t)bits & 0x8000u) << 16;
    uint32_t special = magnitude >= 0x0F800000u ? 0x38000000u : 0u; /* infinity and NaN keep exponent all ones */
    float x = dsv3i_float(magnitude + 0x38000000u + special);
    if (magnitude < 0x00800000u) x = x + x - 6.103515625e-05f; /* 2^-14 */
    return dsv3i_float(dsv3i_bits(x) | sign);
}

#if defined(__OPTIMIZE_SIZE__) && !defined(DSV3I_ENGINE)
/* E4M3 likewise, with the exponent's bias 7; all ones are NaN. */
DSV3_API float dsv3_f32_from_f8_e4m3(uint8_t bits) {
    uint32_t magnitude = ((uint32_t)bits & 0x7Fu) << 20, sign = ((uint32_t)bits & 0x80u) << 24;
    float x = dsv3i_float(magnitude == 0x07F00000u ? 0x7FC00000u : magnitude + 0x3C000000u);
    if (magnitude < 0x00800000u) x = x + x - 0.015625f; /* 2^-6 */
    return dsv3i_float(dsv3i_bits(x) | sign);
}
#else
/* E4M3 has so few codes that a table will do, which is several times faster. One row per exponent; x is the float of
 * mantissa 0, with the sign. */
#define DSV3I_E4M3_ROW(x)                                                                                            \
    (x), (x) + 0x100000u, (x) + 0x200000u, (x) + 0x300000u, (x) + 0x400000u, (x) + 0x500000u, (x) + 0x600000u,       \
        (x) + 0x700000u
#define DSV3I_E4M3_HALF(s)                                                                                           \
    (s), (s) + 0x3B000000u, (s) + 0x3B800000u, (s) + 0x3BC00000u, (s) + 0x3C000000u, /* 0 to 7 times 2^-9 */         \
        (s) + 0x3C200000u, (s) + 0x3C400000u, (s) + 0x3C600000u, DSV3I_E4M3_ROW((s) + 0x3C800000u), /* 2^-6 */       \
        DSV3I_E4M3_ROW((s) + 0x3D000000u), DSV3I_E4M3_ROW((s) + 0x3D800000u), DSV3I_E4M3_ROW((s) + 0x3E000000u),     \
        DSV3I_E4M3_ROW((s) + 0x3E800000u), DSV3I_E4M3_ROW((s) + 0x3F000000u), DSV3I_E4M3_ROW((s) + 0x3F800000u),     \
        DSV3I_E4M3_ROW((s) + 0x40000000u), DSV3I_E4M3_ROW((s) + 0x40800000u), DSV3I_E4M3_ROW((s) + 0x41000000u),     \
        DSV3I_E4M3_ROW((s) + 0x41800000u), DSV3I_E4M3_ROW((s) + 0x42000000u), DSV3I_E4M3_ROW((s) + 0x42800000u),     \
        DSV3I_E4M3_ROW((s) + 0x43000000u), (s) + 0x43800000u, (s) + 0x43900000u, (s) + 0x43A00000u,   /* 2^8 */      \
        (s) + 0x43B00000u, (s) + 0x43C00000u, (s) + 0x43D00000u, (s) + 0x43E00000u, (s) + 0x7FC00000u /* NaN */

static const uint32_t dsv3i_e4m3[256] = {DSV3I_E4M3_HALF(0u), DSV3I_E4M3_HALF(0x80000000u)};

DSV3_API float dsv3_f32_from_f8_e4m3(uint8_t bits) { return dsv3i_float(dsv3i_e4m3[bits]); }
#endif

/* The encoders round normal values by adding half of the last kept bit (minus one unless that bit is odd: ties
 * to even), and subnormal ones by adding a power of two whose last bit has the weight of the grid. */

DSV3_API uint16_t dsv3_bf16_from_f32(float x) {
    uint32_t bits = dsv3i_bits(x);
    if (dsv3i_is_nan(x)) return (uint16_t)((bits >> 16) | 0x0040u);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

DSV3_API uint16_t dsv3_f16_from_f32(float x) {
    uint32_t bits = dsv3i_bits(x), sign = (bits >> 16) & 0x8000u, a = bits & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (a >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* 65520 and more: infinity */
    if (a < 0x38800000u)                                     /* below 2^-14: grid 2^-24 */
        return (uint16_t)(sign | (dsv3i_bits(dsv3i_float(a) + 0.5f) - 0x3F000000u));
    return (uint16_t)(sign | ((a + 0xFFFu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
}

DSV3_API uint8_t dsv3_f8_e4m3_from_f32(float x) {
    uint32_t bits = dsv3i_bits(x), sign = (bits >> 24) & 0x80u, a = bits & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return (uint8_t)(sign | 0x7Fu);
    if (a >= 0x43E80000u) return (uint8_t)(sign | 0x7Eu); /* 464 and more saturate at 448 */
    if (a < 0x3C800000u)                                  /* below 2^-6: grid 2^-9 */
        return (uint8_t)(sign | (dsv3i_bits(dsv3i_float(a) + 16384.0f) - 0x46800000u));
    return (uint8_t)(sign | ((a + 0x7FFFFu + ((a >> 20) & 1u) - 0x3C000000u) >> 20));
}

/* To the nearest whole number, ties to even, for |x| <= 2^22: behind 1.5 2^23 a float has no places. (Through its bits,
 * so that no wider register keeps them.) */
static float dsv3i_round_float(float x) { return dsv3i_float(dsv3i_bits(x + 12582912.0f)) - 12582912.0f; }

/* ---- Whole matrices */

static float dsv3i_magnitude(float x) { return x < 0.0f ? -x : x; }

/* One block of 128 x 128, or what there is of it, of a matrix whose rows are cols wide. */
static int dsv3i_quantize_f8(unsigned char *codes, unsigned char *scale, const float *x, size_t rows, size_t width, size_t cols) {
    float d = 0.0f;
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < width; i++) {
            if (dsv3i_magnitude(x[r * cols + i]) > d) d = dsv3i_magnitude(x[r * cols + i]);
        }
    }
    d /= 448.0f;
    if (d < 1.17549435e-38f) d = 1.0f; /* 2^-126: a smaller one would have lost bits */
    if (d >= 6.64613998e35f) return 0; /* 2^119: 448 times that is no float any more */
    DSV3_MEMCPY(scale, &d, sizeof d);
    for (size_t r = 0; codes != NULL && r < rows; r++) {
        for (size_t i = 0; i < width; i++) codes[r * cols + i] = dsv3_f8_e4m3_from_f32(x[r * cols + i] / d);
    }
    return 1;
}

/* The scale of a block of 32, as F16: most >= 0 becomes `top` times it. */
static uint16_t dsv3i_block_scale(float most, float top) {
    uint16_t bits = dsv3_f16_from_f32(most / top);
    int less = dsv3_f32_from_f16(bits) * top < most; /* exact: 11 bits times few */
    return (uint16_t)(bits + (bits < 0x0400u && less));
}

/* A block of 32 as Q8_0 or Q4_0. Returns 0 for a number that is too large. */
static int dsv3i_quantize_block(unsigned char *y, const float *x, dsv3_type type) {
    int is_q4 = type == DSV3_Q4_0;
    float most = 0.0f, d;
    uint16_t bits;
    unsigned char code[DSV3_QBLOCK];
    for (size_t i = 0; i < DSV3_QBLOCK; i++) {
        if (dsv3i_magnitude(x[i]) > dsv3i_magnitude(most)) most = x[i];
    }
    bits = dsv3i_block_scale(dsv3i_magnitude(most), is_q4 ? 8.0f : 127.0f);
    if (is_q4 && most > 0.0f) bits = (uint16_t)(bits | 0x8000u); /* most becomes -8 */
    d = dsv3_f32_from_f16(bits);
    y[0] = (unsigned char)(bits & 255u), y[1] = (unsigned char)(bits >> 8);
    if (!dsv3i_is_finite(d)) return 0;
    for (size_t i = 0; i < DSV3_QBLOCK; i++) {
        int q = d > 0.0f || d < 0.0f ? (int)dsv3i_round_float(x[i] / d) : 0; /* |x / d| < 127.1; Q4_0: x / d > -8.1 */
        code[i] = (unsigned char)(!is_q4 ? q : q < 8 ? q + 8 : 15);
    }
    for (size_t i = 0; is_q4 && i < DSV3_QBLOCK / 2; i++) {
        code[i] = (unsigned char)(code[i] | code[i + DSV3_QBLOCK / 2] << 4);
    }
    DSV3_MEMCPY(y + 2, code, is_q4 ? DSV3_QBLOCK / 2 : DSV3_QBLOCK);
    return 1;
}

/* A number as F16 or BF16. Returns 0 for one that is too large. */
static int dsv3i_quantize_half(unsigned char *y, float x, dsv3_type type) {
    uint16_t bits = type == DSV3_F16 ? dsv3_f16_from_f32(x) : dsv3_bf16_from_f32(x);
    DSV3_MEMCPY(y, &bits, 2);
    return dsv3i_is_finite(type == DSV3_F16 ? dsv3_f32_from_f16(bits) : dsv3_f32_from_bf16(bits)) || !dsv3i_is_finite(x);
}

DSV3_API dsv3_result dsv3_quantize(void *data, void *scale, const float *x, dsv3_type type, size_t rows, size_t cols,
                                   dsv3_error *error) {
    unsigned char *y = (unsigned char *)data, *scales = (unsigned char *)scale;
    size_t n = dsv3i_mul(rows, cols), block = dsv3_type_block(type);
    int is_f8 = type == DSV3_F8_E4M3;
    DSV3I_NEED(1, x); DSV3I_NEED(is_f8, scale); DSV3I_NEED(!is_f8, data);
    if (dsv3_type_bytes(type) == 0) return dsv3i_fail(error, DSV3_ERR_ARG, "type", "is unknown");
    if (cols % block != 0) return dsv3i_fail_where(error, DSV3_ERR_ARG, "cols", "are not whole blocks of", DSV3_QBLOCK);
    if (dsv3i_mul(n, sizeof *x) == SIZE_MAX) {
        return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "rows x cols", "are more than size_t can count");
    }
    if (dsv3i_overlap(data, rows * dsv3_row_bytes(type, cols), x, n * sizeof *x) ||
        dsv3i_overlap(scale, is_f8 ? sizeof(float) : 0, x, n * sizeof *x)) {
        return dsv3i_fail(error, DSV3_ERR_ARG, "x", "overlaps what is written");
    }
    if ((is_f8 || block > 1) && !dsv3i_all_finite(x, n)) return dsv3i_fail(error, DSV3_ERR_NAN, "x", "is not finite");
    if (type == DSV3_F32) {
        DSV3_MEMCPY(y, x, n * sizeof *x);
        return dsv3i_ok(error);
    }
    for (size_t i = 0; !is_f8 && i < n; i += block, y += dsv3_type_bytes(type)) { /* blocks do not cross rows */
        if (!(block > 1 ? dsv3i_quantize_block(y, x + i, type) : dsv3i_quantize_half(y, x[i], type))) {
            return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "x", "has a value that is too large for the type");
        }
    }
    for (size_t r = 0; is_f8 && r < rows; r += DSV3_BLOCK) {
        for (size_t i = 0; i < cols; i += DSV3_BLOCK, scales += sizeof(float)) {
            size_t at = r * cols + i, width = dsv3i_min(cols - i, DSV3_BLOCK);
            size_t height = dsv3i_min(rows - r, DSV3_BLOCK);
            if (!dsv3i_quantize_f8(y != NULL ? y + at : NULL, scales, x + at, height, width, cols)) {
                return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "x", "has a value that is too large for the type");
            }
        }
    }
    return dsv3i_ok(error);
}

/* ---- Rows of numbers become floats. Weights come from files: any alignment, so they are fetched with memcpy (which
 * compiles to a plain load). */

static uint16_t dsv3i_u16(const unsigned char *at) {
    uint16_t bits;
    DSV3_MEMCPY(&bits, at, 2);
    return bits;
}

static void dsv3i_decode_f32(float *y, const void *w, size_t n) { DSV3_MEMCPY(y, w, n * sizeof(float)); }

static void dsv3i_decode_f16(float *DSV3I_RESTRICT y, const void *DSV3I_RESTRICT w, size_t n) {
    const unsigned char *at = (const unsigned char *)w;
    for (size_t i = 0; i < n; i++) y[i] = dsv3_f32_from_f16(dsv3i_u16(at + 2 * i));
}

static void dsv3i_decode_bf16(float *DSV3I_RESTRICT y, const void *DSV3I_RESTRICT w, size_t n) {
    const unsigned char *at = (const unsigned char *)w;
    DSV3I_EIGHTS(n, y[i] = dsv3_f32_from_bf16(dsv3i_u16(at + 2 * i)));
}

static void dsv3i_decode_f8_e4m3(float *DSV3I_RESTRICT y, const void *DSV3I_RESTRICT w, size_t n) {
    const unsigned char *at = (const unsigned char *)w;
    for (size_t i = 0; i < n; i++) y[i] = dsv3_f32_from_f8_e4m3(at[i]);
}

/* Q8_0 and Q4_0: whole blocks of 32. */
static void dsv3i_decode_q8_0(float *DSV3I_RESTRICT y, const void *DSV3I_RESTRICT w, size_t n) {
    const unsigned char *at = (const unsigned char *)w;
    for (size_t i = 0; i < n; i += DSV3_QBLOCK, at += 2 + DSV3_QBLOCK) {
        float d = dsv3_f32_from_f16((uint16_t)(at[0] | at[1] << 8)); /* on any machine */
        for (size_t j = 0; j < DSV3_QBLOCK; j++) y[i + j] = d * (float)(at[2 + j] < 128 ? at[2 + j] : at[2 + j] - 256);
    }
}

static void dsv3i_decode_q4_0(float *DSV3I_RESTRICT y, const void *DSV3I_RESTRICT w, size_t n) {
    const unsigned char *at = (const unsigned char *)w;
    for (size_t i = 0; i < n; i += DSV3_QBLOCK, at += 2 + DSV3_QBLOCK / 2) {
        float d = dsv3_f32_from_f16((uint16_t)(at[0] | at[1] << 8));
        for (size_t j = 0; j < DSV3_QBLOCK / 2; j++) {
            y[i + j] = d * (float)((int)(at[2 + j] & 15u) - 8);
            y[i + j + DSV3_QBLOCK / 2] = d * (float)((int)(at[2 + j] >> 4) - 8);
        }
    }
}

/* ---- Activations made coarse, DSV3_FAST: to BF16; or 32 at a time to whole multiples, -127 to 127, of a scale. */

static void dsv3i_round_bf16(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = dsv3_f32_from_bf16(dsv3_bf16_from_f32(x[i]));
}

/* Something that is not finite makes its 32 so. */
static void dsv3i_round_q8(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += DSV3_QBLOCK) {
        float top = 0.0f, bad = 0.0f, inverse;
        for (size_t j = i; j < i + DSV3_QBLOCK; j++) {
            if (dsv3i_magnitude(x[j]) > top) top = dsv3i_magnitude(x[j]);
            bad += x[j] * 0.0f;
        }
        if (top < 1e-30f) top = 0.0f; /* its inverse would be infinite */
        inverse = top > 0.0f ? 127.0f / top : 0.0f;
        for (size_t j = i; j < i + DSV3_QBLOCK; j++) y[j] = (top / 127.0f + bad) * dsv3i_round_float(x[j] * inverse);
    }
}

/* ---- Vectors: the loops inside all ops. A float sum may not be reordered by a compiler, so a plain loop is one long
 * chain of additions; eight sums, element i to sum i mod 8, and one fixed tree at the end are faster, more exact, and as
 * reproducible. */

static float dsv3i_sum8(const float s[8]) {
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

/* sum x[i] y[i] */
static float dsv3i_dot(const float *DSV3I_RESTRICT x, const float *DSV3I_RESTRICT y, size_t n) {
    float s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    DSV3I_EIGHTS(n, s[p] += x[i] * y[i]);
    return dsv3i_sum8(s);
}

/* y[i] += a x[i] */
static void dsv3i_axpy(float *DSV3I_RESTRICT y, float a, const float *DSV3I_RESTRICT x, size_t n) {
    DSV3I_EIGHTS(n, y[i] += a * x[i]);
}

/* p[i] = exp(s[i] - top); returns their sum. p may be s. */
static float dsv3i_exp_sum(float *p, const float *s, float top, size_t n) {
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        p[i] = DSV3_EXPF(s[i] - top);
        sum[i % 8] += p[i];
    }
    return dsv3i_sum8(sum);
}

/* h[i] = silu(a[i]) b[i]. exp(-a) may overflow to infinity, the quotient is then -0, which is right. h may be a. */
static void dsv3i_silu_mul(float *h, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) h[i] = a[i] / (1.0f + DSV3_EXPF(-a[i])) * b[i];
}

/* x[i] *= a */
static void dsv3i_scale(float *x, float a, size_t n) { DSV3I_EIGHTS(n, x[i] *= a); }

static float dsv3i_max_float(const float *x, size_t n) {
    float top = x[0];
    for (size_t i = 1; i < n; i++) {
        if (x[i] > top) top = x[i];
    }
    return top;
}

/* ---- Rows of a tensor */

static const unsigned char *dsv3i_row_at(const dsv3_tensor *w, size_t row) {
    return (const unsigned char *)w->data + row * dsv3_row_bytes(w->type, w->cols);
}

/* The scales of a row's blocks, or NULL. */
static const unsigned char *dsv3i_scale_at(const dsv3_tensor *w, size_t row) {
    size_t blocks = dsv3i_blocks(w->cols, DSV3_BLOCK);
    if (w->scale == NULL) return NULL;
    return (const unsigned char *)w->scale + row / DSV3_BLOCK * blocks * sizeof(float);
}

/* y [cols] = row of w, decoded. FP8: block row r / 128 of the scales, one for 128 columns. */
static void dsv3i_decode_row(const dsv3_context *ctx, float *y, const dsv3_tensor *w, size_t row) {
    const unsigned char *scales = dsv3i_scale_at(w, row);
#ifdef DSV3I_ENGINE
    if (w->packed) {
        dsv3i_engine_decode_row(y, w, row);
        return;
    }
#endif
    ctx->ops->decode[w->type](y, dsv3i_row_at(w, row), w->cols);
    for (size_t at = 0; scales != NULL && at < w->cols; at += DSV3_BLOCK, scales += sizeof(float)) {
        float scale;
        DSV3_MEMCPY(&scale, scales, sizeof scale);
        dsv3i_scale(y + at, scale, dsv3i_min(DSV3_BLOCK, w->cols - at));
    }
}

/* ---- Loops over rows of d numbers: copies, sums, and what chapter 4 does to rows */

typedef struct dsv3i_rows {
    const dsv3_context *ctx;
    float *y;
    const float *x;
    size_t d, ldy, ldx;   /* rows of y, and of x, lie so many floats apart */
    const size_t *at;     /* [n] which rows of the other array these are; NULL: the same */
    const int32_t *token; /* [n] of embeddings */
    const dsv3_tensor *w; /* embeddings, or a norm's gain */
    float eps;
    /* backward */
    size_t n;
    const float *dy;
    float *dx, *dg, *r; /* dx like x, dy like y; r [n] = 1 / rms */
    int beta0;
} dsv3i_rows;

DSV3I_APART dsv3i_rows dsv3i_rows_of(const dsv3_context *ctx, float *y, const float *x, size_t d) {
    dsv3i_rows a = {ctx, y, x, d, d, d, NULL, NULL, NULL, 0.0f, 0, NULL, NULL, NULL, NULL, 0};
    return a;
}

static void dsv3i_rows_run(dsv3i_rows *a, size_t n, size_t cost, dsv3_task task) {
    a->n = n;
    dsv3i_loop(a->ctx, n, cost * a->d, task, a);
}

static void dsv3i_copy_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        DSV3_MEMCPY(a->y + t * a->ldy, a->x + (a->at != NULL ? a->at[t] : t) * a->ldx, a->d * sizeof *a->y);
    }
}

static void dsv3i_copy_rows(const dsv3_context *ctx, float *y, const float *x, size_t n, size_t d) {
    dsv3i_rows a = dsv3i_rows_of(ctx, y, x, d);
    dsv3i_rows_run(&a, n, 2, dsv3i_copy_task);
}

static void dsv3i_add_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        a->ctx->ops->axpy(a->y + (a->at != NULL ? a->at[t] : t) * a->ldy, 1.0f, a->x + t * a->ldx, a->d);
    }
}

/* y [n, d] += x: the residual stream. */
static void dsv3i_add_rows(const dsv3_context *ctx, float *y, const float *x, size_t n, size_t d) {
    dsv3i_rows a = dsv3i_rows_of(ctx, y, x, d);
    dsv3i_rows_run(&a, n, 2, dsv3i_add_task);
}

/* ========================================================================================================
 * Chapter 4  >>ops
 *
 *   linear      y_t = W x_t                                                  W [rows, cols]
 *   RMSNorm     y = g * x / rms(x),  rms(x) = sqrt(mean(x^2) + eps)
 *   SwiGLU      h = silu(a) * b,  silu(a) = a / (1 + exp(-a))                a, b: gate and up projections
 *   embedding   x = row `token` of embed_tokens
 *   loss        -log softmax(z)[target] = log sum exp(z) - z[target]
 *
 * Weights become float32 one row at a time, W = code * scale for FP8, and every sum is a float32 sum in one fixed
 * order: a weight's type changes its value, never the arithmetic. A row of W is decoded once, for all rows of x, so
 * that a longer batch costs less per row -- and gives the same bits. Each op has its backward beside it; gradients d..
 * are added to what stands there unless `beta0` says that they are set. Test: tests/test_ops.c.
 * ==================================================================================================== */

/* ---- Embedding: x_t = row token_t of embed_tokens */

static void dsv3i_embed_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) dsv3i_decode_row(a->ctx, a->y + t * a->d, a->w, (size_t)a->token[t]);
}

static void dsv3i_embed(const dsv3_context *ctx, float *x, const int32_t *token, const dsv3_tensor *w, size_t n) {
    dsv3i_rows a = dsv3i_rows_of(ctx, x, NULL, w->cols);
    a.token = token;
    a.w = w;
    dsv3i_rows_run(&a, n, 2, dsv3i_embed_task);
}

/* ---- Linear: y_t = W x_t. Each row of W is decoded once, for all rows of x. */

typedef struct dsv3i_linear_loop {
    const dsv3_context *ctx;
    const dsv3i_product *p;
    const float *x; /* [n, cols] as products take it */
    float *row;     /* [threads, cols] */
    float *dx, *dw; /* backward */
} dsv3i_linear_loop;

static void dsv3i_linear_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_linear_loop *a = (const dsv3i_linear_loop *)arg;
    const dsv3i_product *p = a->p;
    size_t cols = p->w->cols;
    float *row = a->row + worker * cols;
    for (size_t r = begin; r < end; r++) {
        dsv3i_decode_row(a->ctx, row, p->w, p->row + r);
        for (size_t t = 0; t < p->n; t++) p->y[t * p->rows + r] = a->ctx->ops->dot(a->x + t * cols, row, cols);
    }
}

/* x [n] as products with weights of this type take it: with DSV3_FAST rounded into y, else as it is. */
static const float *dsv3i_rounded(const dsv3_context *ctx, float *y, const float *x, dsv3_type type, size_t n) {
    if (ctx->compute != DSV3_FAST || type == DSV3_F32 || type == DSV3_F16) return x;
    if (dsv3_type_block(type) > 1) dsv3i_round_q8(y, x, n);
    if (dsv3_type_block(type) == 1) dsv3i_round_bf16(y, x, n);
    return y;
}

static void dsv3i_linear(const dsv3_context *ctx, const dsv3i_product *list, size_t count, float *scratch) {
    for (size_t i = 0; i < count; i++) {
        const dsv3i_product *p = &list[i];
        size_t cols = p->w->cols;
        dsv3i_linear_loop a = {ctx, p, NULL, scratch, NULL, NULL};
        a.x = dsv3i_rounded(ctx, scratch + ctx->threads * cols, p->x, p->w->type, p->n * cols);
        dsv3i_loop(ctx, p->rows, p->n * cols, dsv3i_linear_task, &a);
    }
}

/* Floats of scratch: a row of W for each worker, and x rounded. */
static size_t dsv3i_linear_floats(size_t n, size_t cols, size_t threads) {
    return dsv3i_max(dsv3i_mul(dsv3i_add(threads, n), cols), dsv3i_engine_linear_floats(n, cols, threads));
}

#ifndef DSV3_NO_TRAINING
/* Backward: dx += dy W, dW += dy^T x. Both are sums of scaled rows: of W for a row of dx, of x for a row of dW. The loops
 * are split over rows of dx and rows of dW, so that every sum is taken by one worker, in one order. */
static void dsv3i_linear_dx_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_linear_loop *a = (const dsv3i_linear_loop *)arg;
    const dsv3i_product *p = a->p;
    size_t cols = p->w->cols;
    float *row = a->row + worker * cols;
    for (size_t r = 0; r < p->rows; r++) {
        dsv3i_decode_row(a->ctx, row, p->w, p->row + r);
        for (size_t t = begin; t < end; t++) a->ctx->ops->axpy(a->dx + t * cols, p->y[t * p->rows + r], row, cols);
    }
}

static void dsv3i_linear_dw_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_linear_loop *a = (const dsv3i_linear_loop *)arg;
    const dsv3i_product *p = a->p;
    size_t cols = p->w->cols;
    (void)worker;
    for (size_t r = begin; r < end; r++) {
        float *dw = a->dw + r * cols;
        for (size_t t = 0; t < p->n; t++) a->ctx->ops->axpy(dw, p->y[t * p->rows + r], p->x + t * cols, cols);
    }
}

static void dsv3i_linear_backward(const dsv3_context *ctx, float *dx, int beta0, float *dw, const dsv3i_product *p,
                                  float *scratch) {
    size_t cols = p->w->cols;
    dsv3i_linear_loop a = {ctx, p, NULL, scratch, dx, dw};
    if (dx != NULL && beta0) DSV3_MEMSET(dx, 0, p->n * cols * sizeof *dx);
    if (dx != NULL) dsv3i_loop(ctx, p->n, p->rows * cols, dsv3i_linear_dx_task, &a);
    if (dw != NULL) dsv3i_loop(ctx, p->rows, p->n * cols, dsv3i_linear_dw_task, &a);
}

/* The embedding is a linear map of one-hot rows: its gradient is added row by row, columns apart. */

#define DSV3I_COLUMNS 32u

static void dsv3i_embed_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg;
    size_t first = begin * DSV3I_COLUMNS, last = dsv3i_min(end * DSV3I_COLUMNS, a->d);
    (void)worker;
    for (size_t t = 0; t < a->n; t++) {
        float *row = a->y + (size_t)a->token[t] * a->d;
        for (size_t i = first; i < last; i++) row[i] += a->x[t * a->d + i];
    }
}

static void dsv3i_embed_backward(const dsv3_context *ctx, float *dw, const float *dx, const int32_t *token, size_t n, size_t d) {
    dsv3i_rows a = dsv3i_rows_of(ctx, dw, dx, d);
    a.token = token;
    a.n = n;
    dsv3i_loop(ctx, dsv3i_blocks(d, DSV3I_COLUMNS), 2 * n * DSV3I_COLUMNS, dsv3i_embed_backward_task, &a);
}

#endif

/* ---- RMSNorm: y = g * x / rms(x) */

#define DSV3I_GAIN 64u /* numbers of the gain that are decoded together, on the stack */

/* gain [<= DSV3I_GAIN], from number i on. Returns how many. */
static size_t dsv3i_gain(const dsv3i_rows *a, float *gain, size_t i) {
    size_t n = dsv3i_min(DSV3I_GAIN, a->d - i);
    a->ctx->ops->decode[a->w->type](gain, (const unsigned char *)a->w->data + i * dsv3_type_bytes(a->w->type), n);
    return n;
}

/* 1 / rms(x) */
static float dsv3i_inverse_rms(const dsv3i_rows *a, const float *x) {
    return 1.0f / DSV3_SQRTF(a->ctx->ops->dot(x, x, a->d) / (float)a->d + a->eps);
}

/* v = gain (v r) */
static void dsv3i_norm_scale(float *DSV3I_RESTRICT v, const float *DSV3I_RESTRICT gain, float r, size_t n) {
    DSV3I_EIGHTS(n, v[i] = gain[i] * (v[i] * r));
}

static void dsv3i_rmsnorm_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        const float *x = a->x + t * a->ldx;
        float r = dsv3i_inverse_rms(a, x), gain[DSV3I_GAIN], v[DSV3I_GAIN]; /* y may be x */
        for (size_t at = 0, n; at < a->d; at += n) {
            n = dsv3i_gain(a, gain, at);
            DSV3_MEMCPY(v, x + at, n * sizeof *v);
            dsv3i_norm_scale(v, gain, r, n);
            DSV3_MEMCPY(a->y + t * a->ldy + at, v, n * sizeof *v);
        }
    }
}

/* Rows of y lie ldy floats apart. */
static void dsv3i_rmsnorm(const dsv3_context *ctx, float *y, size_t ldy, const float *x, const dsv3_tensor *g,
                          size_t n, size_t d, float eps) {
    dsv3i_rows a = dsv3i_rows_of(ctx, y, x, d);
    a.ldy = ldy;
    a.w = g;
    a.eps = eps;
    dsv3i_rows_run(&a, n, 4, dsv3i_rmsnorm_task);
}

static void dsv3i_norm(const dsv3_context *ctx, float *y, const float *x, const dsv3_tensor *g, size_t n, float eps) {
    dsv3i_rmsnorm(ctx, y, g->cols, x, g, n, g->cols, eps);
}

#ifndef DSV3_NO_TRAINING
/* Backward: with r = 1 / rms(x) and v = dy * g,
 *     dx += r v - x r^3 (v . x) / d,   dg += sum_t dy_t * x_t r_t
 * The sum over rows is split over columns; r [n] passes from the first loop to the second. */

/* sum g dy x */
static float dsv3i_norm_dot(const float *DSV3I_RESTRICT g, const float *DSV3I_RESTRICT dy,
                            const float *DSV3I_RESTRICT x, size_t n) {
    float s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    DSV3I_EIGHTS(n, s[p] += g[i] * dy[i] * x[i]);
    return dsv3i_sum8(s);
}

/* dx += r g dy - c x */
static void dsv3i_norm_add(float *DSV3I_RESTRICT dx, float r, const float *DSV3I_RESTRICT g,
                           const float *DSV3I_RESTRICT dy, float c, const float *DSV3I_RESTRICT x, size_t n) {
    DSV3I_EIGHTS(n, dx[i] += r * (g[i] * dy[i]) - c * x[i]);
}

static void dsv3i_norm_dx_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        const float *x = a->x + t * a->ldx, *dy = a->dy + t * a->ldy;
        float *dx = a->dx + t * a->ldx, r = a->r[t] = dsv3i_inverse_rms(a, x), sum = 0.0f, gain[DSV3I_GAIN];
        if (a->beta0) DSV3_MEMSET(dx, 0, a->d * sizeof *dx);
        for (size_t i = 0, n; i < a->d; i += n) {
            n = dsv3i_gain(a, gain, i);
            sum += dsv3i_norm_dot(gain, dy + i, x + i, n);
        }
        for (size_t i = 0, n; i < a->d; i += n) {
            n = dsv3i_gain(a, gain, i);
            dsv3i_norm_add(dx + i, r, gain, dy + i, sum * r * r * r / (float)a->d, x + i, n);
        }
    }
}

static void dsv3i_norm_dg_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg;
    (void)worker;
    for (size_t at = begin * DSV3I_COLUMNS; at < dsv3i_min(end * DSV3I_COLUMNS, a->d); at += DSV3I_COLUMNS) {
        float sum[DSV3I_COLUMNS];
        size_t columns = dsv3i_min(DSV3I_COLUMNS, a->d - at);
        DSV3_MEMCPY(sum, a->dg + at, columns * sizeof *sum);
        for (size_t t = 0; t < a->n; t++) {
            const float *x = a->x + t * a->ldx + at, *dy = a->dy + t * a->ldy + at;
            DSV3I_EIGHTS(columns, sum[i] += dy[i] * (x[i] * a->r[t]));
        }
        DSV3_MEMCPY(a->dg + at, sum, columns * sizeof *sum);
    }
}

/* Of g only the rest of `a` is filled in: rows of x and dx lie ldx floats apart, rows of dy ldy. */
static dsv3i_rows dsv3i_norm_rows(const dsv3_context *ctx, float *dx, int beta0, float *dg, const float *dy,
                                  const float *x, const dsv3_tensor *g, float eps, float *r) {
    dsv3i_rows a = {ctx, NULL, x, g->cols, g->cols, g->cols, NULL, NULL, g, eps, 0, dy, dx, dg, r, beta0};
    return a;
}

static void dsv3i_norm_backward(dsv3i_rows *a, size_t n) {
    dsv3i_rows_run(a, n, 4, dsv3i_norm_dx_task);
    dsv3i_loop(a->ctx, dsv3i_blocks(a->d, DSV3I_COLUMNS), 2 * n * DSV3I_COLUMNS, dsv3i_norm_dg_task, a);
}

static void dsv3i_norm_back(const dsv3_context *ctx, float *dx, float *dg, const float *dy, const float *x,
                            const dsv3_tensor *g, size_t n, float eps, float *r) {
    dsv3i_rows a = dsv3i_norm_rows(ctx, dx, 0, dg, dy, x, g, eps, r);
    dsv3i_norm_backward(&a, n);
}
#endif

/* ---- SwiGLU's elementwise half, split over threads because exp is slow */

#define DSV3I_SILU_ITEM 256u

typedef struct dsv3i_silu {
    const dsv3_context *ctx;
    float *h;           /* [n] silu(a) * b */
    const float *a, *b; /* [n] */
    size_t n, width;    /* of an item */
    /* backward */
    float *da, *db;    /* [n]; h is dh there */
    const float *gate; /* [n / width] of an expert's rows, or NULL */
    float *dgate;
} dsv3i_silu;

static void dsv3i_silu_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_silu *s = (const dsv3i_silu *)arg;
    size_t first = begin * s->width, last = dsv3i_min(end * s->width, s->n);
    (void)worker;
    s->ctx->ops->silu_mul(s->h + first, s->a + first, s->b + first, last - first);
}

/* h may be a. */
static void dsv3i_swiglu(const dsv3_context *ctx, float *h, const float *a, const float *b, size_t n) {
    dsv3i_silu s = {ctx, h, a, b, n, DSV3I_SILU_ITEM, NULL, NULL, NULL, NULL};
    dsv3i_loop(ctx, dsv3i_blocks(n, s.width), 16 * s.width, dsv3i_silu_task, &s);
}

#ifndef DSV3_NO_TRAINING
/* Backward of h = silu(a) b, with s = sigmoid(a): da = dh b s (1 + a (1 - s)), db = dh a s. Rows of experts have a
 * gate w: dh is that of w h, and dw = dh . h. */

/* n <= 64 numbers, in whole arrays of 64, which are faster. Returns dh . h. */
static float dsv3i_silu_backward_64(const dsv3_context *ctx, float *da, float *db, const float *dh, const float *a,
                                    const float *b, float gate, size_t n) {
    float x[64], y[64], d[64], h[64];
    for (size_t j = 0; j < 64; j++) x[j] = y[j] = d[j] = 0.0f;
    for (size_t j = 0; j < n; j++) h[j] = -a[j];
    ctx->ops->exp_sum(x, h, 0.0f, n);
    for (size_t j = 0; j < 64; j++) h[j] = 1.0f / (1.0f + x[j]);
    DSV3_MEMCPY(x, a, n * sizeof *a);
    DSV3_MEMCPY(y, b, n * sizeof *b);
    DSV3_MEMCPY(d, dh, n * sizeof *dh);
    for (size_t j = 0; j < 64; j++) {
        float s = h[j], silu = x[j] * s, slope = s * (1.0f + x[j] * (1.0f - s));
        h[j] = silu * y[j];
        x[j] = gate * d[j] * y[j] * slope;
        y[j] = gate * d[j] * silu;
    }
    DSV3_MEMCPY(da, x, n * sizeof *da);
    DSV3_MEMCPY(db, y, n * sizeof *db);
    return ctx->ops->dot(d, h, n);
}

static void dsv3i_silu_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_silu *v = (const dsv3i_silu *)arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        float gate = v->gate != NULL ? v->gate[i] : 1.0f, sum = 0.0f;
        size_t last = dsv3i_min((i + 1) * v->width, v->n);
        for (size_t j = i * v->width; j < last; j += 64) {
            sum += dsv3i_silu_backward_64(v->ctx, v->da + j, v->db + j, v->h + j, v->a + j, v->b + j, gate,
                                          dsv3i_min(64, last - j));
        }
        if (v->dgate != NULL) v->dgate[i] = sum;
    }
}

/* a and b [n] become da and db; dh is used up. gate and dgate [n / width]: NULL, or rows are `width` numbers. */
static void dsv3i_swiglu_backward(const dsv3_context *ctx, float *dh, float *a, float *b, size_t n, const float *gate,
                                  float *dgate, size_t width) {
    dsv3i_silu s = {ctx, dh, a, b, n, width, a, b, gate, dgate};
    if (gate == NULL) s.width = DSV3I_SILU_ITEM;
    dsv3i_loop(ctx, dsv3i_blocks(n, s.width), 32 * s.width, dsv3i_silu_backward_task, &s);
}
#endif

/* ---- Log-sum-exp: log sum exp(x) = top + log sum exp(x - top), whose terms are at most 1. Many small ones beside it would
 * vanish in a float, or be rounded up, all of them: sums are doubles, and keep what they are rounded by (Kahan), since small
 * machines may have doubles that are floats: sum[0] - sum[1] += x. */
static void dsv3i_sum_add(double *sum, double x) {
    double y = x - sum[1], s = sum[0] + y;
    sum[1] = (s - sum[0]) - y;
    sum[0] = s;
}

DSV3_API float dsv3_log_sum_exp(const float *logits, size_t V) {
    float top = V > 0 ? dsv3i_max_float(logits, V) : 0.0f;
    double sum[2] = {0.0, 0.0};
    for (size_t i = 0; i < V; i++) dsv3i_sum_add(sum, (double)DSV3_EXPF(logits[i] - top));
    return (float)((double)top + DSV3_LOG(sum[0] - sum[1]));
}

/* ---- Cross-entropy: -log p(target) = log sum exp(logits) - logit[target]. A vocabulary of 129280 times a thousand
 * rows would be half a gigabyte of logits, so it passes by in parts; each row keeps a running maximum and the sum of
 * exp(logit - maximum), which is rescaled when the maximum rises. The sum is a double, as above, of short sums in float. */

#define DSV3I_VOCAB 1024u /* tokens of a part, a multiple of DSV3_BLOCK */
#define DSV3I_SHORT 64u   /* of a short sum */

typedef struct dsv3i_loss {
    const dsv3_context *ctx;
    const float *u; /* [n, d] */
    const dsv3_tensor *head;
    const int32_t *target; /* [n] */
    size_t n;
    float *state;   /* [n, 4] maximum, sum, what a float cannot hold of it, the target's logit */
    float *logits;  /* [n, part.rows] */
    float *scratch; /* of linear */
    dsv3i_product part;
    float weight; /* backward: of each row's loss */
} dsv3i_loss;

/* loss [dsv3i_loss_floats] keeps each row's maximum and sum, between forward and backward too. */
DSV3I_APART dsv3i_loss dsv3i_loss_of(const dsv3_context *ctx, const float *u, const dsv3_tensor *head,
                                    const int32_t *target, size_t n, float *loss, float *scratch) {
    dsv3i_loss a = {ctx, u, head, target, n, loss, loss + 4 * n, scratch, {NULL, NULL, NULL, 0, 0, 0}, 0.0f};
    return a;
}

static size_t dsv3i_loss_floats(size_t V, size_t n) { return dsv3i_mul(n, dsv3i_min(V, DSV3I_VOCAB) + 4); }

/* The logits of a part of the vocabulary, and `task` for each row of them. */
static void dsv3i_loss_part(dsv3i_loss *a, size_t row, dsv3_task task) {
    const dsv3i_product part = {a->logits, a->u, a->head, a->n, row, dsv3i_min(DSV3I_VOCAB, a->head->rows - row)};
    a->part = part;
    a->ctx->ops->linear(a->ctx, &part, 1, a->scratch);
    dsv3i_loop(a->ctx, a->n, 16 * part.rows, task, a);
}

/* The target's logit of row t among those of this part, or NULL. */
static float *dsv3i_loss_target(const dsv3i_loss *a, size_t t) {
    size_t target = (size_t)a->target[t]; /* DSV3_IGNORE is beyond all */
    return target < a->part.row || target - a->part.row >= a->part.rows
               ? NULL : a->logits + t * a->part.rows + (target - a->part.row);
}

static void dsv3i_loss_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_loss *a = (const dsv3i_loss *)arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        float *z = a->logits + t * a->part.rows, *state = a->state + 4 * t, top = dsv3i_max_float(z, a->part.rows);
        const float *target = dsv3i_loss_target(a, t);
        double sum[2] = {(double)state[1], -(double)state[2]}, rescale;
        if (a->target[t] == DSV3_IGNORE) continue;
        if (target != NULL) state[3] = *target;
        if (state[0] > top) top = state[0];
        rescale = state[0] < top ? DSV3_POW(2.718281828459045, (double)state[0] - (double)top) : 1.0;
        for (size_t i = 0; i < 2; i++) sum[i] *= rescale;
        for (size_t i = 0; i < a->part.rows; i += DSV3I_SHORT) {
            dsv3i_sum_add(sum, (double)a->ctx->ops->exp_sum(z + i, z + i, top, dsv3i_min(DSV3I_SHORT, a->part.rows - i)));
        }
        state[0] = top;
        state[1] = (float)(sum[0] - sum[1]);
        state[2] = (float)((sum[0] - (double)state[1]) - sum[1]);
    }
}

static void dsv3i_cross_entropy(dsv3i_loss *a, float *nll) {
    for (size_t t = 0; t < a->n; t++) {
        a->state[4 * t] = -FLT_MAX;
        for (size_t i = 1; i < 4; i++) a->state[4 * t + i] = 0.0f;
    }
    for (size_t row = 0; row < a->head->rows; row += DSV3I_VOCAB) dsv3i_loss_part(a, row, dsv3i_loss_task);
    for (size_t t = 0; t < a->n; t++) {
        const float *state = a->state + 4 * t;
        double sum = (double)state[1] + (double)state[2], rest = (double)state[0] - (double)state[3];
        nll[t] = a->target[t] == DSV3_IGNORE ? 0.0f : (float)(DSV3_LOG(sum) + rest);
    }
}

#ifndef DSV3_NO_TRAINING
/* Backward: dlogits = weight (softmax - onehot), part by part again. */
static void dsv3i_loss_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_loss *a = (const dsv3i_loss *)arg;
    size_t rows = a->part.rows;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        float *z = a->logits + t * rows, *state = a->state + 4 * t, *target = dsv3i_loss_target(a, t);
        float weight = a->target[t] == DSV3_IGNORE ? 0.0f : a->weight;
        if (weight <= 0.0f && weight >= 0.0f) {
            DSV3_MEMSET(z, 0, rows * sizeof *z);
            continue;
        }
        a->ctx->ops->exp_sum(z, z, state[0], rows);
        dsv3i_scale(z, weight / state[1], rows);
        if (target != NULL) *target -= weight;
    }
}

/* Of weight * sum_t nll_t: du += dlogits head (beta0: =), dhead += dlogits^T u (NULL: not wanted). */
static void dsv3i_cross_entropy_backward(dsv3i_loss *a, float *du, int beta0, float *dhead, float weight) {
    a->weight = weight;
    for (size_t row = 0; row < a->head->rows; row += DSV3I_VOCAB) {
        float *dw = dhead == NULL ? NULL : dhead + row * a->head->cols;
        dsv3i_loss_part(a, row, dsv3i_loss_backward_task);
        a->ctx->ops->linear_backward(a->ctx, du, beta0 && row == 0, dw, &a->part, a->scratch);
    }
}

#endif

/* ========================================================================================================
 * Chapter 5  >>rope
 *
 * Rotary position embedding turns pair i of a vector by the angle t theta_i, t the position:
 *     (a, b) -> (a cos - b sin, a sin + b cos),    theta_i = rope_theta^(-2i/dr),  i = 0 .. dr/2 - 1
 * so that the product of a query at t and a key at j depends on t - j only. Released weights pair neighbours (2i, 2i+1).
 *
 * YaRN ([R] 4.3) lengthens the context by s = factor. A pair that makes many turns over the original context o keeps
 * its frequency, a pair that makes less than about one is slowed down by s, in between a ramp mixes both
 * (without floor and ceil if truncate is 0):
 *     cd(n) = dr ln(o / (2 pi n)) / (2 ln rope_theta)         the i at which a pair makes n turns over o
 *     lo = max(floor cd(beta_fast), 0),  hi = min(ceil cd(beta_slow), dr-1),  hi += 0.001 if equal
 *     ramp_i = clamp((i - lo) / (hi - lo), 0, 1)
 *     theta_i = f_i (1 - ramp_i) + f_i / s ramp_i,   f_i = rope_theta^(-2i/dr)
 * and corrects the softmax temperature, with m(x) = 0.1 x ln s + 1:
 *     cos, sin       times m(mscale) / m(mscale_all_dim)      1 for every released model
 *     softmax scale  (dn+dr)^-1/2 m(mscale_all_dim)^2          on the whole score, if mscale_all_dim != 0
 * The frequencies apply at all lengths, also below o.
 *
 * Angles. t theta in float32 is off by 0.01 rad at t = 160000. Here theta is kept as a fraction of a turn in 64-bit
 * fixed point: t times it, modulo 2^64, drops whole turns and nothing else, needs no double at run time, and the
 * remaining angle lies in [-pi, pi), where sinf and cosf are exact to the last bits. Test: tests/test_rope.c.
 * ==================================================================================================== */

#define DSV3I_PI 3.14159265358979323846

static double dsv3i_yarn_m(const dsv3_rope_scaling *r, float mscale) {
    if (r->type != DSV3_ROPE_YARN || !(r->factor > 1.0f)) return 1.0;
    return 0.1 * (double)mscale * DSV3_LOG((double)r->factor) + 1.0;
}

/* cd(n) above */
static double dsv3i_yarn_dim(const dsv3_config *c, float turns) {
    double o = c->rope_scaling.original_max_position_embeddings;
    return c->qk_rope_head_dim * DSV3_LOG(o / (2.0 * DSV3I_PI * (double)turns)) /
           (2.0 * DSV3_LOG((double)c->rope_theta));
}

/* Of numbers far below 2^63, as cd(n) is. */
static double dsv3i_floor(double x) {
    double y = (double)(int64_t)x;
    return y > x ? y - 1.0 : y;
}

/* theta_i */
static double dsv3i_rope_theta(const dsv3_config *c, int32_t i) {
    const dsv3_rope_scaling *r = &c->rope_scaling;
    int32_t dr = c->qk_rope_head_dim;
    double f = DSV3_POW((double)c->rope_theta, -2.0 * i / dr), lo, hi, ramp;
    if (r->type != DSV3_ROPE_YARN) return f;
    lo = dsv3i_yarn_dim(c, r->beta_fast);
    hi = dsv3i_yarn_dim(c, r->beta_slow);
    if (r->truncate) lo = dsv3i_floor(lo), hi = -dsv3i_floor(-hi); /* ceil */
    if (lo < 0.0) lo = 0.0;
    if (hi > dr - 1.0) hi = dr - 1.0;
    if (!(lo < hi) && !(hi < lo)) hi += 0.001;
    ramp = (i - lo) / (hi - lo);
    ramp = ramp < 0.0 ? 0.0 : ramp > 1.0 ? 1.0 : ramp;
    return f * (1.0 - ramp) + f / (double)r->factor * ramp;
}

static void dsv3i_rope_turns(const dsv3_config *config, uint64_t *turns) {
    for (int32_t i = 0; i < config->qk_rope_head_dim / 2; i++) { /* 2^64 to the turn; theta <= 1 < 2 pi */
        turns[i] = (uint64_t)(dsv3i_rope_theta(config, i) / (2.0 * DSV3I_PI) * 18446744073709551616.0);
    }
}

DSV3_API float dsv3_rope_factor(const dsv3_config *config) {
    const dsv3_rope_scaling *r = &config->rope_scaling;
    return (float)(dsv3i_yarn_m(r, r->mscale) / dsv3i_yarn_m(r, r->mscale_all_dim));
}

DSV3_API float dsv3_softmax_scale(const dsv3_config *config) {
    const dsv3_rope_scaling *r = &config->rope_scaling;
    double m = dsv3i_yarn_m(r, r->mscale_all_dim);
    double width = (double)config->qk_nope_head_dim + (double)config->qk_rope_head_dim;
    return (float)(m * m * DSV3_POW(width, -0.5));
}

static void dsv3i_rope_table(float *cos_sin, const int32_t *position, const uint64_t *turns, float factor, size_t n, size_t dr) {
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < dr / 2; i++) {
            uint64_t phase = (uint64_t)position[t] * turns[i]; /* modulo one turn */
            int64_t high = (int64_t)(phase >> 32);             /* 2^32 to the turn */
            if (high >= 2147483648) high -= 4294967296;        /* to [-pi, pi) */
            float angle = (float)high * (float)(2.0 * DSV3I_PI / 4294967296.0);
            cos_sin[t * dr + 2 * i] = factor * DSV3_COSF(angle);
            cos_sin[t * dr + 2 * i + 1] = factor * DSV3_SINF(angle);
        }
    }
}

/* sign -1: the rotation back, which is the transpose and so the gradient's way. */
static void dsv3i_rotate(float *x, const float *cos_sin, size_t dr, int interleave, float sign) {
    size_t step = interleave ? 2 : 1, other = interleave ? 1 : dr / 2;
    for (size_t i = 0; i < dr / 2; i++) {
        float c = cos_sin[2 * i], s = sign * cos_sin[2 * i + 1];
        float a = x[step * i], b = x[step * i + other];
        x[step * i] = a * c - b * s;
        x[step * i + other] = a * s + b * c;
    }
}

/* ========================================================================================================
 * Chapter 6  >>mla
 *
 * Multi-head latent attention ([R2] 2.1, [R] 2.1.1). For the row u_t of token t:
 *     cq = norm(q_a_proj u) [rq]        q = q_b_proj cq [H, dn+dr]         (q = q_proj u when rq = 0)
 *     a  = kv_a_proj u [rk+dr]          c = norm(a[0..rk))                 the latent
 *     kr = RoPE_t(a[rk..rk+dr))         one rotated key part for all heads, not normalised
 *     q of head h = [qn ; qr],  qr = RoPE_t(qr)
 *     kv_b_proj, head h = [UK (dn rows) ; UV (dv rows)], both [., rk]
 *
 * Expanded form: rebuild every head's keys and values from the latents.
 *     k_j = [UK c_j ; kr_j]   v_j = UV c_j   s_tj = scale q.k_j   o_t = sum_j softmax(s_t)_j v_j
 * Absorbed form: because qn.(UK c) = (UK^T qn).c, the query can move into the latent space instead, and
 * because the weighted sum is linear, UV can wait until after it:
 *     q~ = [UK^T qn ; qr]     s_tj = scale q~.[c_j ; kr_j]     m_t = sum_j softmax(s_t)_j c_j    o_t = UV m_t
 * Both give out_t = o_proj [o_t of all heads]. Only [c ; kr] is cached: rk + dr numbers per position and
 * layer, 576 for V3 where plain attention keeps H (dn + dr + dv) = 40960.
 *
 * Cost per query, key and head: expanded dn + dr + dv, absorbed 2 rk + dr multiply-adds. Expanding costs rk (dn + dv) once
 * per key and call, absorbing as much once per query. With a long past (many more keys than queries) a call that brings n
 * rows to a sequence gains by expanding when n (2 rk - dn - dv) > rk (dn + dv): 171 rows or more for V3. With a short past
 * expanding would win earlier; the automatic rule looks at n alone, so that it can be stated in one line.
 *
 * Running softmax. Keys come in blocks that begin at fixed positions, and the softmax is built up block
 * by block: with m the maximum so far, l the sum of exp(s - m), and o the sum of exp(s - m) v, a new block with
 * a larger maximum m' first scales l and o by exp(m - m'). No row of scores is ever kept, so scratch memory does not
 * grow with the context, and neither chunking nor batching changes a bit. Both forms are the same loop
 * over different keys and values. Test: tests/test_mla.c.
 * ==================================================================================================== */

#define DSV3I_KEYS 32u /* keys of a block */

/* ---- Cache rows */

static unsigned char *dsv3i_cache_at(const dsv3_cache *cache, size_t layer, size_t position) {
    size_t row = layer * cache->capacity + position;
    return (unsigned char *)cache->data + row * cache->width * dsv3_type_bytes(cache->type);
}

static void dsv3i_cache_store(dsv3_cache *cache, size_t layer, size_t position, const float *row) {
    unsigned char *at = dsv3i_cache_at(cache, layer, position);
    if (cache->type == DSV3_F32) {
        DSV3_MEMCPY(at, row, cache->width * sizeof(float));
    } else {
        for (size_t i = 0; i < cache->width; i++) {
            uint16_t bits = dsv3_bf16_from_f32(row[i]);
            DSV3_MEMCPY(at + 2 * i, &bits, 2);
        }
    }
}

/* n rows from position on: in place when they are float32, else decoded into scratch [n, width]. */
static const float *dsv3i_cache_load(const dsv3_context *ctx, const dsv3_cache *cache, size_t layer, size_t position,
                                     size_t n, float *scratch) {
    const unsigned char *at = dsv3i_cache_at(cache, layer, position);
    if (cache->type == DSV3_F32) return (const float *)(const void *)at;
    ctx->ops->decode[cache->type](scratch, at, n * cache->width);
    return scratch;
}

/* ---- Projections: u -> q (rotated) and the latent rows, which go into the caches */

/* kv_raw and q_raw (without q_lora: q), in one call: they read the same rows. */
static void dsv3i_mla_down(dsv3i_call *c, const float *u) {
    dsv3i_product list[DSV3I_PRODUCTS];
    list[0] = dsv3i_product_of(c->ws->kv_raw, u, &c->w->kv_a_proj_with_mqa, c->n);
    list[1] = c->m.rq > 0 ? dsv3i_product_of(c->ws->q_raw, u, &c->w->q_a_proj, c->n)
                          : dsv3i_product_of(c->ws->q, u, &c->w->q_proj, c->n);
    c->ctx->ops->linear(c->ctx, list, 2, c->ws->scratch);
}

/* kv from kv_raw: the latent's norm, the key's rotation. */
static void dsv3i_mla_kv_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    const dsv3_config *config = &c->model->config;
    size_t rk = c->m.rk, dr = c->m.dr;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        float *kv = c->ws->kv + t * c->m.width, *raw = c->ws->kv_raw + t * c->m.width;
        dsv3i_norm(c->ctx, kv, raw, &c->w->kv_a_layernorm, 1, config->latent_norm_eps);
        if (kv != raw) DSV3_MEMCPY(kv + rk, raw + rk, dr * sizeof *kv);
        dsv3i_rotate(kv + rk, c->ws->cos_sin + t * dr, dr, config->rope_interleave, 1.0f);
    }
}

static void dsv3i_mla_kv(dsv3i_call *c) { dsv3i_loop(c->ctx, c->n, 4 * c->m.width, dsv3i_mla_kv_task, c); }

/* Rotation of every head's query. */
static void dsv3i_mla_rotate_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    const dsv3i_dims *m = &c->m;
    (void)worker;
    for (size_t i = begin * m->H; i < end * m->H; i++) {
        dsv3i_rotate(c->ws->q + i * m->qk + m->dn, c->ws->cos_sin + i / m->H * m->dr, m->dr,
                     c->model->config.rope_interleave, 1.0f);
    }
}

/* q from q_raw: norm and q_b (without q_lora it is there already); rotation. */
static void dsv3i_mla_q(dsv3i_call *c) {
    dsv3i_workspace *ws = c->ws;
    if (c->m.rq > 0) {
        dsv3i_norm(c->ctx, ws->q_latent, ws->q_raw, &c->w->q_a_layernorm, c->n, c->model->config.latent_norm_eps);
        dsv3i_project(c, ws->q, ws->q_latent, &c->w->q_b_proj);
    }
    dsv3i_loop(c->ctx, c->n, 4 * c->m.H * c->m.dr, dsv3i_mla_rotate_task, c);
}

/* ---- Attention proper: o [n, H dv] of the queries and the caches */

typedef struct dsv3i_keys {
    const float *k, *v; /* [n, dk], [n, dv], ldk and ldv floats apart */
    size_t ldk, ldv, dk, dv, n;
    float scale;
} dsv3i_keys;

/* The running softmax: query q [dk] and one more block of keys. o [dv] and state = {m, l} are of all keys so far. */
static void dsv3i_attend_keys(const dsv3_context *ctx, float *o, float state[2], const float *q, const dsv3i_keys *b) {
    float p[DSV3I_KEYS], top = state[0], rescale;
    for (size_t j = 0; j < b->n; j++) {
        p[j] = b->scale * ctx->ops->dot(q, b->k + j * b->ldk, b->dk);
        if (p[j] > top) top = p[j];
    }
    rescale = DSV3_EXPF(state[0] - top);
    state[1] = state[1] * rescale + ctx->ops->exp_sum(p, p, top, b->n);
    state[0] = top;
    dsv3i_scale(o, rescale, b->dv);
    for (size_t j = 0; j < b->n; j++) ctx->ops->axpy(o, p[j], b->v + j * b->ldv, b->dv);
}

/* Before the first block. The maximum starts at the lowest finite value, so that exp(m - m') is always defined. */
static void dsv3i_attend_begin(float *o, float state[2], size_t dv) {
    state[0] = -FLT_MAX;
    state[1] = 0.0f;
    DSV3_MEMSET(o, 0, dv * sizeof *o);
}

/* After the last: divide by the sum. A row whose every score is minus infinity has sum 0 and gives zeros. */
static void dsv3i_attend_end(float *o, const float state[2], size_t dv) {
    dsv3i_scale(o, state[1] <= 0.0f ? 0.0f : 1.0f / state[1], dv);
}

/* Absorbed: row t, head h. scratch: q~ [rk+dr], m, m rounded and a row of kv_b_proj [rk], keys [KEYS, rk+dr] */
static void dsv3i_attend_absorbed(const dsv3i_call *c, size_t t, size_t h, float *scratch) {
    const dsv3i_dims *m = &c->m;
    const dsv3i_workspace *ws = c->ws;
    const dsv3_tensor *w = &c->w->kv_b_proj;
    const dsv3_cache *cache = &c->caches[ws->sequence[t]];
    const float *q = ws->q + (t * m->H + h) * m->qk, *x;
    float *query = scratch, *mean = query + m->width, *round = mean + m->rk, *row = round + m->rk;
    float *o = ws->o + (t * m->H + h) * m->dv, *state = ws->softmax + (t * m->H + h) * 2;
    dsv3i_keys b = {NULL, NULL, m->width, m->width, m->width, m->rk, 0, c->model->softmax_scale};
    DSV3_MEMSET(query, 0, m->rk * sizeof *query);
    DSV3_MEMCPY(query + m->rk, q + m->dn, m->dr * sizeof *query);
    for (size_t r = 0; r < m->dn; r++) { /* UK^T qn */
        dsv3i_decode_row(c->ctx, row, w, h * m->kv + r);
        c->ctx->ops->axpy(query, q[r], row, m->rk);
    }
    dsv3i_attend_begin(mean, state, m->rk);
    for (size_t j = 0, keys = (size_t)ws->position[t] + 1; j < keys; j += b.n) {
        b.n = dsv3i_min(DSV3I_KEYS, keys - j);
        b.k = b.v = dsv3i_cache_load(c->ctx, cache, c->layer, j, b.n, row + m->rk);
        dsv3i_attend_keys(c->ctx, mean, state, query, &b);
    }
    dsv3i_attend_end(mean, state, m->rk);
    x = dsv3i_rounded(c->ctx, round, mean, w->type, m->rk);
    for (size_t r = 0; r < m->dv; r++) { /* UV m */
        dsv3i_decode_row(c->ctx, row, w, h * m->kv + m->dn + r);
        o[r] = c->ctx->ops->dot(x, row, m->rk);
    }
}

/* Keys [n, dn+dr] and values [n, dv] of head h, of positions j .. j+n-1. scratch: latents [n, rk+dr], rounded [n, rk], and a
 * row of kv_b_proj */
static void dsv3i_expand(const dsv3i_call *c, const dsv3_cache *cache, size_t j, size_t n, size_t h, float *k, float *v,
                         float *scratch) {
    const dsv3i_dims *m = &c->m;
    const dsv3_tensor *w = &c->w->kv_b_proj;
    float *round = scratch + DSV3I_KEYS * m->width, *row = round + DSV3I_KEYS * m->rk;
    const float *latent = dsv3i_cache_load(c->ctx, cache, c->layer, j, n, scratch), *x[DSV3I_KEYS];
    for (size_t i = 0; i < n; i++, latent += m->width) {
        x[i] = dsv3i_rounded(c->ctx, round + i * m->rk, latent, w->type, m->rk);
        DSV3_MEMCPY(k + i * m->qk + m->dn, latent + m->rk, m->dr * sizeof *k);
    }
    for (size_t r = 0; r < m->kv; r++) {
        dsv3i_decode_row(c->ctx, row, w, h * m->kv + r);
        for (size_t i = 0; i < n; i++) {
            *(r < m->dn ? k + i * m->qk + r : v + i * m->dv + (r - m->dn)) = c->ctx->ops->dot(x[i], row, m->rk);
        }
    }
}

/* Expanded: head h of the sequence whose first row is `leader`. A block of keys is expanded once for all its rows. */
static void dsv3i_attend_expanded(const dsv3i_call *c, size_t leader, size_t h, float *scratch) {
    const dsv3i_dims *m = &c->m;
    const dsv3i_workspace *ws = c->ws;
    float *k = scratch, *v = k + DSV3I_KEYS * m->qk, *state = ws->softmax + 2 * h, *o = ws->o + h * m->dv;
    dsv3i_keys b = {k, v, m->qk, m->dv, m->qk, m->dv, 0, c->model->softmax_scale};
    size_t last = 0;
    for (size_t t = leader; t < c->n; t++) {
        if (ws->leader[t] == (int32_t)leader) last = (size_t)ws->position[t];
    }
    for (size_t j = 0; j <= last; j += DSV3I_KEYS) {
        size_t n = dsv3i_min(DSV3I_KEYS, last - j + 1);
        dsv3i_expand(c, &c->caches[ws->sequence[leader]], j, n, h, k, v, v + DSV3I_KEYS * m->dv);
        for (size_t t = leader; t < c->n; t++) {
            size_t left = (size_t)ws->position[t] + 1 - j; /* keys that the row has from here on */
            if (ws->leader[t] != (int32_t)leader || (size_t)ws->position[t] < j) continue;
            b.n = dsv3i_min(n, left);
            if (j == 0) dsv3i_attend_begin(o + t * m->Ho, state + t * 2 * m->H, m->dv);
            dsv3i_attend_keys(c->ctx, o + t * m->Ho, state + t * 2 * m->H, ws->q + t * m->Hq + h * m->qk, &b);
            if (b.n == left) dsv3i_attend_end(o + t * m->Ho, state + t * 2 * m->H, m->dv);
        }
    }
}

/* Floats of a worker's scratch, for either form. */
static size_t dsv3i_attend_floats(const dsv3i_dims *m) {
    size_t latents = dsv3i_mul(DSV3I_KEYS, m->width), rows = dsv3i_add(dsv3i_mul(3, m->rk), m->width);
    size_t expanded = dsv3i_mul(DSV3I_KEYS, dsv3i_add(dsv3i_add(m->qk, m->dv), m->rk));
    return dsv3i_add(latents, dsv3i_max(rows, dsv3i_add(m->rk, expanded)));
}

/* Item = a head and a row; of the expanded form, a head and a sequence. All workers share each sequence. */
static void dsv3i_attend_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    float *scratch = c->ws->scratch + worker * dsv3i_attend_floats(&c->m);
    for (size_t i = begin; i < end; i++) {
        size_t t = i % c->n, h = i / c->n;
        if (!c->ws->expanded[t]) {
            dsv3i_attend_absorbed(c, t, h, scratch);
        } else if (c->ws->leader[t] == (int32_t)t) {
            dsv3i_attend_expanded(c, t, h, scratch);
        }
    }
}

/* Multiply-adds of attention, roughly. */
static size_t dsv3i_attend_work(const dsv3i_call *c) {
    const dsv3i_dims *m = &c->m;
    size_t work = 0;
    for (size_t t = 0; t < c->n; t++) {
        size_t keys = dsv3i_mul((size_t)c->ws->position[t], m->qk + m->dv);
        work = dsv3i_add(work, dsv3i_mul(m->H, dsv3i_add(m->rk * m->kv, keys)));
    }
    return work;
}

static void dsv3i_attend(dsv3i_call *c) {
    dsv3i_parallel(c->ctx, c->n * c->m.H, dsv3i_attend_work(c), dsv3i_attend_task, c);
}

static void dsv3i_mla_forward(dsv3i_call *c, float *y, const float *u) {
    dsv3i_workspace *ws = c->ws;
    dsv3i_mla_down(c, u);
    dsv3i_mla_kv(c);
    dsv3i_mla_q(c);
    for (size_t t = 0; t < c->n; t++) { /* all rows are stored before any attends */
        dsv3i_cache_store(&c->caches[ws->sequence[t]], c->layer, (size_t)ws->position[t], ws->kv + t * c->m.width);
    }
    c->ctx->ops->attend(c);
    dsv3i_project(c, y, ws->o, &c->w->o_proj);
}

/* Rows of the sequence that row t begins; 0 if it begins none. Where losses are computed, the rows of
 * a sequence lie together. */
static size_t dsv3i_sequence_rows(const int32_t *leader, size_t t, size_t n) {
    size_t rows = 0;
    while (t + rows < n && leader[t + rows] == (int32_t)t) rows++;
    return rows;
}

#ifndef DSV3_NO_TRAINING
/* ---- Backward. The forward pass of training is the one above, in the expanded form, with the workspace's pointers on
 * memory that stays (chapter 14). Saved: u or the layer's input, q_raw, kv_raw, o and the softmax's maximum and sum;
 * rebuilt unless kept: the norms' outputs and q; always: keys and values. With A = softmax(s):
 *     delta_t = do_t . o_t,   dA_tj = do_t . v_j,   ds_tj = scale A_tj (dA_tj - delta_t)
 *     dq_t = sum_j ds_tj k_j,   dk_j = sum_t ds_tj q_t,   dv_j = sum_t A_tj do_t
 * A key is [UK c_j ; kr_j]: its second part is one vector for all heads, whose gradient is the sum over heads. */

/* Head h of rows [t0, t1): keys from kv_up and the rotated parts; delta = dout . o; sums are cleared. */
static void dsv3i_attend_backward_begin(const dsv3i_call *c, size_t t0, size_t t1, size_t h) {
    const dsv3i_dims *m = &c->m;
    const dsv3i_backward *b = c->b;
    for (size_t t = t0; t < t1; t++) {
        size_t key = t * m->Hq + h * m->qk, up = t * m->Hkv + h * m->kv, out = t * m->Ho + h * m->dv;
        DSV3_MEMCPY(b->keys + key, b->kv_up + up, m->dn * sizeof(float));
        DSV3_MEMCPY(b->keys + key + m->dn, c->ws->kv + t * m->width + m->rk, m->dr * sizeof(float));
        DSV3_MEMSET(b->dkeys + key, 0, m->qk * sizeof(float));
        DSV3_MEMSET(b->dq + key, 0, m->qk * sizeof(float));
        DSV3_MEMSET(b->dkv_up + up, 0, m->kv * sizeof(float));
        b->delta[t * m->H + h] = c->ctx->ops->dot(b->dout + out, c->s->o + out, m->dv);
    }
}

/* Row t and head h, whose keys are t0 .. t. */
static void dsv3i_attend_backward_row(const dsv3i_call *c, size_t t0, size_t t, size_t h) {
    const dsv3i_dims *m = &c->m;
    const dsv3i_backward *b = c->b;
    const dsv3i_ops *ops = c->ctx->ops;
    const float *state = c->s->softmax + 2 * (t * m->H + h), *dout = b->dout + (t * m->H + h) * m->dv;
    size_t query = (t * m->H + h) * m->qk;
    float scale = c->model->softmax_scale;
    for (size_t j = t0; j <= t; j++) {
        size_t key = (j * m->H + h) * m->qk, value = (j * m->H + h) * m->kv + m->dn;
        float s = scale * ops->dot(c->ws->q + query, b->keys + key, m->qk);
        float A = DSV3_EXPF(s - state[0]) / state[1];
        float ds = scale * A * (ops->dot(dout, b->kv_up + value, m->dv) - b->delta[t * m->H + h]);
        ops->axpy(b->dq + query, ds, b->keys + key, m->qk);
        ops->axpy(b->dkeys + key, ds, c->ws->q + query, m->qk);
        ops->axpy(b->dkv_up + value, A, dout, m->dv);
    }
}

/* Item = head h of the sequence that row t0 begins. */
static void dsv3i_attend_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        size_t t0 = i % c->n, h = i / c->n, t1 = t0 + dsv3i_sequence_rows(c->ws->leader, t0, c->n);
        dsv3i_attend_backward_begin(c, t0, t1, h);
        for (size_t t = t0; t < t1; t++) dsv3i_attend_backward_row(c, t0, t, h);
    }
}

static void dsv3i_attend_backward(dsv3i_call *c) {
    dsv3i_loop(c->ctx, c->n * c->m.H, c->n * c->m.qk, dsv3i_attend_backward_task, c);
}

/* dkeys goes to dkv_up and, summed over heads and rotated back, to dkv_raw; dq is rotated back. */
static void dsv3i_mla_rotate_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    const dsv3i_dims *m = &c->m;
    const dsv3i_backward *b = c->b;
    int interleave = c->model->config.rope_interleave;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        const float *cos_sin = c->ws->cos_sin + t * m->dr;
        float *dkr = b->dkv_raw + t * m->width + m->rk;
        DSV3_MEMSET(dkr, 0, m->dr * sizeof *dkr);
        for (size_t h = 0; h < m->H; h++) {
            const float *dkey = b->dkeys + t * m->Hq + h * m->qk;
            DSV3_MEMCPY(b->dkv_up + t * m->Hkv + h * m->kv, dkey, m->dn * sizeof *dkey);
            for (size_t i = 0; i < m->dr; i++) dkr[i] += dkey[m->dn + i];
            dsv3i_rotate(b->dq + t * m->Hq + h * m->qk + m->dn, cos_sin, m->dr, interleave, -1.0f);
        }
        dsv3i_rotate(dkr, cos_sin, m->dr, interleave, -1.0f);
    }
}

/* What the forward pass had and has not kept: kv, q_latent and q in the workspace, c and kv_up in b. */
static void dsv3i_mla_rebuild(dsv3i_call *c, const float *u) {
    dsv3i_workspace *ws = c->ws;
    const dsv3i_saved *s = c->s;
    dsv3i_rows latent = dsv3i_rows_of(c->ctx, c->b->c, NULL, c->m.rk);
    if (s->kv == NULL) dsv3i_mla_kv(c);
    if (s->q == NULL && c->m.rq == 0) dsv3i_project(c, ws->q, u, &c->w->q_proj);
    if (s->q == NULL) dsv3i_mla_q(c);
    if (s->q != NULL && s->q_latent == NULL && c->m.rq > 0) {
        dsv3i_norm(c->ctx, ws->q_latent, s->q_raw, &c->w->q_a_layernorm, c->n, c->model->config.latent_norm_eps);
    }
    latent.x = ws->kv;
    latent.ldx = c->m.width;
    dsv3i_rows_run(&latent, c->n, 2, dsv3i_copy_task);
    dsv3i_project(c, c->b->kv_up, c->b->c, &c->w->kv_b_proj);
}

/* du [n, d] for dy [n, d]. */
static void dsv3i_mla_backward(dsv3i_call *c, float *du, const float *dy, const float *u) {
    const dsv3i_dims *m = &c->m;
    const dsv3i_backward *b = c->b;
    const dsv3_layer *w = c->w, *g = c->g;
    float eps = c->model->config.latent_norm_eps;
    dsv3i_rows norm;
    dsv3i_mla_rebuild(c, u);
    dsv3i_project_backward(c->ctx, c->ws, b->dout, 1, &g->o_proj, dy, c->s->o, &w->o_proj, c->n);
    c->ctx->ops->attend_backward(c);
    dsv3i_loop(c->ctx, c->n, 4 * m->Hq, dsv3i_mla_rotate_backward_task, c);
    dsv3i_project_backward(c->ctx, c->ws, b->dc, 1, &g->kv_b_proj, b->dkv_up, b->c, &w->kv_b_proj, c->n);
    norm = dsv3i_norm_rows(c->ctx, b->dkv_raw, 1, dsv3i_grad(&g->kv_a_layernorm), b->dc, c->s->kv_raw,
                           &w->kv_a_layernorm, eps, b->r);
    norm.ldx = m->width;
    dsv3i_norm_backward(&norm, c->n);
    dsv3i_project_backward(c->ctx, c->ws, du, 1, &g->kv_a_proj_with_mqa, b->dkv_raw, u, &w->kv_a_proj_with_mqa, c->n);
    if (m->rq == 0) {
        dsv3i_project_backward(c->ctx, c->ws, du, 0, &g->q_proj, b->dq, u, &w->q_proj, c->n);
        return;
    }
    dsv3i_project_backward(c->ctx, c->ws, b->dq_latent, 1, &g->q_b_proj, b->dq, c->ws->q_latent, &w->q_b_proj, c->n);
    norm = dsv3i_norm_rows(c->ctx, b->dq_raw, 1, dsv3i_grad(&g->q_a_layernorm), b->dq_latent, c->s->q_raw,
                           &w->q_a_layernorm, eps, b->r);
    dsv3i_norm_backward(&norm, c->n);
    dsv3i_project_backward(c->ctx, c->ws, du, 0, &g->q_a_proj, b->dq_raw, u, &w->q_a_proj, c->n);
}
#endif

/* ========================================================================================================
 * Chapter 7  >>router
 *
 * Which K of E experts does a token use, and with which weights? ([R] 2.1.2, eq. 12-16; V2: [R2] 2.2)
 *     z = W_g u,   s = sigmoid(z) (V3) or softmax(z) (V2), float32
 *     sel = s + b                    b = e_score_correction_bias, steers the choice and nothing else
 *     groups (G > 1): a group's score is the sum of its two largest sel (noaux_tc) or its largest
 *                     (group_limited_greedy); only the best Gt groups stay, the others are masked
 *     idx = the K largest sel that are left
 *     w_k = s[idx_k], divided by (sum_k w_k + 1e-20) if norm_topk_prob and K > 1, times routed_scaling_factor
 * The weights follow s, not sel: an expert chosen for its bias is not weighted by it, and the weights need
 * not fall in order. Ties, for groups and for experts: the higher score first, then the lower index.
 *
 * Forms that no released model uses are there for experiments: a gate bias in z, strengths alpha of the bias
 * (sel = s + alpha b), and a bias that multiplies (sel = s (1 + alpha b)).
 *
 * Balance. With loads c_i (rows sent to expert i in one optimizer step) and e_i = (mean c - c_i) / mean c, the
 * bias step b_i += speed sign(e_i) raises whom few choose and lowers whom many choose, outside the gradient: no
 * auxiliary loss pulls on the model. MaxVio = max_i c_i / mean c - 1 says how uneven a load is. What remains as a
 * loss is small, and per sequence ([R] eq. 17-20):
 *     sum_i f_i P_i,   f_i = E / (K T) sum_t [i in TopK(s_t)],   P_i = 1/T sum_t s_ti / sum_j s_tj
 * and V2's three losses ([R2] 2.2.2) are of the same kind, over experts, over devices, and over devices reached.
 *
 * NaN. A sel that is not finite counts as the lowest possible one, above masked experts only, and a score that is not
 * finite weighs 0: any input gives K different experts in range. Test: tests/test_router.c, tests/test_balance.c.
 * ==================================================================================================== */

static void dsv3i_softmax(const dsv3_context *ctx, float *z, size_t n) {
    float sum = ctx->ops->exp_sum(z, z, dsv3i_max_float(z, n), n);
    for (size_t i = 0; i < n; i++) z[i] /= sum;
}

typedef struct dsv3i_scores_arg {
    const dsv3_context *ctx;
    float *score;      /* [n, E] z before, s behind */
    const float *bias; /* [E] or NULL */
    size_t E;
    dsv3_scoring_func func;
} dsv3i_scores_arg;

static void dsv3i_scores_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_scores_arg *a = (const dsv3i_scores_arg *)arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        float *z = a->score + t * a->E;
        for (size_t e = 0; a->bias != NULL && e < a->E; e++) z[e] += a->bias[e];
        if (a->func == DSV3_SOFTMAX) {
            dsv3i_softmax(a->ctx, z, a->E);
        } else {
            for (size_t e = 0; e < a->E; e++) z[e] = 1.0f / (1.0f + DSV3_EXPF(-z[e]));
        }
    }
}

/* The product is exact, whatever the context says. */
static void dsv3i_router_scores(const dsv3_context *ctx, const dsv3_config *config, float *score, const float *x,
                                const dsv3_tensor *gate_w, const float *gate_bias, size_t n, float *scratch) {
    const dsv3i_product product = dsv3i_product_of(score, x, gate_w, n);
    dsv3_context exact = *ctx;
    dsv3i_scores_arg a = {ctx, score, gate_bias, gate_w->rows, config->scoring_func};
    exact.compute = DSV3_EXACT;
    exact.ops->linear(&exact, &product, 1, scratch);
    dsv3i_loop(ctx, n, 16 * a.E, dsv3i_scores_task, &a);
}

/* What the choice goes by. */
static float dsv3i_choice(dsv3_bias_form form, float s, float b, float alpha) {
    return form == DSV3_BIAS_MULTIPLY ? s * (1.0f + alpha * b) : s + alpha * b;
}

/* A group may have a single expert, whose score then is the group's (the official code would fail there). Choice
 * scores are finite, so that minus infinity can mean "masked". */
static float dsv3i_choice_score(float sel) { return dsv3i_is_finite(sel) ? sel : -FLT_MAX; }

/* Score of a group of m experts: sum of the two largest (the only one, when m = 1) or the largest. */
static float dsv3i_group_score(const float *sel, size_t m, dsv3_topk_method method) {
    float first = sel[0], second = -FLT_MAX;
    for (size_t i = 1; i < m; i++) {
        if (sel[i] > first) {
            second = first;
            first = sel[i];
        } else if (sel[i] > second) {
            second = sel[i];
        }
    }
    return method == DSV3_NOAUX_TC && m > 1 ? first + second : first;
}

/* Place of group g in the order "higher score, then lower index". */
static size_t dsv3i_group_rank(const float *group, size_t G, size_t g) {
    size_t rank = 0;
    for (size_t i = 0; i < G; i++) rank += group[i] > group[g] || (i < g && group[i] >= group[g]);
    return rank;
}

static void dsv3i_mask_groups(const dsv3_config *c, float *sel, float *group) {
    size_t G = (size_t)c->n_group, m = (size_t)c->n_routed_experts / G;
    float lowest = -FLT_MAX, masked = c->group_mask == DSV3_MASK_ZERO ? 0.0f : 2.0f * lowest; /* minus infinity */
    for (size_t g = 0; g < G; g++) group[g] = dsv3i_group_score(sel + g * m, m, c->topk_method);
    for (size_t g = 0; g < G; g++) {
        if (dsv3i_group_rank(group, G, g) < (size_t)c->topk_group) continue;
        for (size_t i = 0; i < m; i++) sel[g * m + i] = masked;
    }
}

/* idx [K] = the K largest of sel [E], in order. Insertion into a sorted list: an element passes another only
 * when it is strictly larger, so equal ones stay in index order. */
static void dsv3i_topk(int32_t *idx, const float *sel, size_t E, size_t K) {
    size_t n = 0;
    for (size_t e = 0; e < E; e++) {
        size_t k = n;
        while (k > 0 && sel[e] > sel[idx[k - 1]]) k--;
        if (k == K) continue;
        if (n < K) n++;
        for (size_t i = n - 1; i > k; i--) idx[i] = idx[i - 1];
        idx[k] = (int32_t)e;
    }
}

/* Are weights divided by their sum? The code released with V2, V3, Moonlight and K2 does so only where K > 1: one weight
 * alone would be 1 whatever its score, and the router learn nothing. */
static int dsv3i_is_normed(const dsv3_config *c) { return c->norm_topk_prob && c->num_experts_per_tok > 1; }

static float dsv3i_gate_scale(const dsv3_config *c) {
    return dsv3i_is_normed(c) && c->gate_scaling == DSV3_SCALE_UNLESS_NORMED ? 1.0f : c->routed_scaling_factor;
}

static float dsv3i_finite_score(float s) { return dsv3i_is_finite(s) ? s : 0.0f; }

/* gate [K] from the scores of the chosen; one that is not finite weighs nothing. */
static void dsv3i_gate_weights(const dsv3_config *c, float *gate, const int32_t *idx, const float *score) {
    size_t K = (size_t)c->num_experts_per_tok;
    float sum = 0.0f, scale = dsv3i_gate_scale(c);
    for (size_t k = 0; k < K; k++) sum += gate[k] = dsv3i_finite_score(score[idx[k]]);
    for (size_t k = 0; k < K; k++) {
        if (dsv3i_is_normed(c)) gate[k] /= sum + 1e-20f;
        gate[k] *= scale;
    }
}

/* The routing fields, in themselves. least: experts of a token, 0 where there are none. */
static dsv3_result dsv3i_check_routing(const dsv3_config *c, int32_t least, dsv3_error *e) {
    int32_t G = c->n_group, E = c->n_routed_experts;
#define DSV3I_ROUTING(field, most, why)                                                                              \
    DSV3I_TRY(dsv3i_check_between(e, DSV3_ERR_UNSUPPORTED, #field, why, (int32_t)c->field, 0, most))
    DSV3I_ROUTING(scoring_func, DSV3_SOFTMAX, "must be sigmoid or softmax");
    DSV3I_ROUTING(topk_method, DSV3_GREEDY, "must be noaux_tc, group_limited_greedy or greedy");
    DSV3I_ROUTING(group_mask, DSV3_MASK_ZERO, "is not one of dsv3_group_mask");
    DSV3I_ROUTING(gate_scaling, DSV3_SCALE_UNLESS_NORMED, "is not one of dsv3_gate_scaling");
    DSV3I_ROUTING(bias_form, DSV3_BIAS_MULTIPLY, "is not one of dsv3_bias_form");
    if (!(c->routed_scaling_factor >= FLT_MIN && c->routed_scaling_factor <= FLT_MAX)) {
        return dsv3i_fail(e, DSV3_ERR_ARG, "routed_scaling_factor", "must be positive and finite");
    }
    if (G < 1 || E % G != 0) return dsv3i_fail_where(e, DSV3_ERR_ARG, "n_group", "must divide n_routed_experts, and is", G);
    DSV3I_TRY(dsv3i_check_between(e, DSV3_ERR_ARG, "topk_group", "must be between 1 and n_group", c->topk_group, 1, G));
    return dsv3i_check_between(e, DSV3_ERR_ARG, "num_experts_per_tok", "is more than the selected groups have",
                               c->num_experts_per_tok, least, c->topk_method == DSV3_GREEDY ? E : E / G * c->topk_group);
}

/* As dsv3_router_select. Returns the first row with something that is not finite; n: none. */
static size_t dsv3i_router_select(const dsv3_config *config, int32_t *idx, float *gate, const float *score,
                                  const float *bias, const float *alpha, size_t n, float *scratch) {
    size_t E = (size_t)config->n_routed_experts, K = (size_t)config->num_experts_per_tok, bad = n;
    for (size_t t = 0; t < n; t++) {
        const float *s = score + t * E;
        float *sel = scratch, *group = scratch + E;
        for (size_t e = 0; e < E; e++) {
            sel[e] = bias == NULL ? s[e] : dsv3i_choice(config->bias_form, s[e], bias[e], alpha ? alpha[e] : 1.0f);
            if (bad == n && !dsv3i_is_finite(sel[e])) bad = t; /* so is its score, then */
            sel[e] = dsv3i_choice_score(sel[e]);
        }
        if (config->topk_method != DSV3_GREEDY && config->n_group > 1) dsv3i_mask_groups(config, sel, group);
        dsv3i_topk(idx + t * K, sel, E, K);
        dsv3i_gate_weights(config, gate + t * K, idx + t * K, s);
    }
    return bad;
}

/* Are these K different experts? */
static int dsv3i_choice_valid(const int32_t *idx, size_t K, size_t E) {
    for (size_t k = 0; k < K; k++) {
        if (idx[k] < 0 || (size_t)idx[k] >= E) return 0;
        for (size_t i = 0; i < k; i++) {
            if (idx[i] == idx[k]) return 0;
        }
    }
    return 1;
}

static dsv3_result dsv3i_check_choice(const dsv3_config *config, const int32_t *idx, size_t n, dsv3_error *error) {
    size_t E = (size_t)config->n_routed_experts, K = (size_t)config->num_experts_per_tok;
    for (size_t t = 0; t < n; t++) {
        if (dsv3i_choice_valid(idx + t * K, K, E)) continue;
        return dsv3i_fail_where(error, DSV3_ERR_ARG, "idx", "has an expert twice or out of range, in row", (int64_t)t);
    }
    return DSV3_OK;
}

/* gate [n, K] of a choice made elsewhere, if it is one. */
static dsv3_result dsv3i_router_weights(const dsv3_config *config, float *gate, const int32_t *idx, const float *score,
                                        size_t n, dsv3_error *error) {
    size_t E = (size_t)config->n_routed_experts, K = (size_t)config->num_experts_per_tok;
    DSV3I_TRY(dsv3i_check_choice(config, idx, n, error));
    for (size_t t = 0; t < n; t++) dsv3i_gate_weights(config, gate + t * K, idx + t * K, score + t * E);
    return dsv3i_ok(error);
}

/* ---- Loads */

static int dsv3i_counts(const uint8_t *mask, size_t t) { return mask == NULL || mask[t] != 0; }

static void dsv3i_load_count(uint64_t *load, const int32_t *idx, const uint8_t *mask, size_t n, size_t K) {
    for (size_t t = 0; t < n; t++) {
        for (size_t k = 0; k < K && dsv3i_counts(mask, t); k++) load[idx[t * K + k]]++;
    }
}

DSV3_API dsv3_load_stats dsv3_load_statistics(const uint64_t *load, size_t E) {
    dsv3_load_stats r = {0.0, 0.0, 0.0, 0.0, E};
    uint64_t sum = 0, high = 0, low = UINT64_MAX;
    for (size_t e = 0; e < E; e++) {
        sum += load[e];
        if (load[e] > high) high = load[e];
        if (load[e] < low) low = load[e];
    }
    if (sum == 0) return r;
    r.mean = (double)sum / (double)E;
    r.max_vio = (double)high / r.mean - 1.0;
    r.min_load = (double)low / r.mean;
    r.dead = 0;
    for (size_t e = 0; e < E; e++) {
        double share = (double)load[e] / (double)sum;
        r.dead += load[e] == 0;
        if (load[e] > 0) r.entropy -= share * DSV3_LOG(share);
    }
    r.entropy = E > 1 ? r.entropy / DSV3_LOG((double)E) : 1.0;
    return r;
}

#ifndef DSV3_NO_TRAINING
/* ---- The bias step */

/* 1: below the mean whole + rest / E, -1: above it. */
static double dsv3i_load_sign(uint64_t load, uint64_t whole, uint64_t rest) {
    return load > whole ? -1.0 : load < whole || rest > 0 ? 1.0 : 0.0;
}

/* A b that would leave its range stops at the end of it, so that the order of moves is kept there too. */
static float dsv3i_bias_moved(float b, double move, dsv3_bias_rule rule) {
    double low = rule == DSV3_BIAS_FACTOR ? -0.999 : -(double)FLT_MAX, to = (double)b + move;
    if (rule == DSV3_BIAS_FACTOR) to = (double)b + move * (1.0 + (double)b);
    return (float)(to < low ? low : to > (double)FLT_MAX ? (double)FLT_MAX : to);
}

/* Of one layer: bias [E], load [E]. */
static void dsv3i_bias_step(float *bias, const uint64_t *load, size_t E, dsv3_bias_rule rule, double speed) {
    uint64_t sum = 0, whole, rest;
    double mean, drift = 0.0;
    for (size_t e = 0; e < E; e++) sum += load[e];
    if (sum == 0 || !(speed > 0.0)) return;
    whole = sum / E; /* the mean is whole + rest / E, exactly */
    rest = sum % E;
    mean = (double)sum / (double)E;
    for (size_t e = 0; e < E; e++) drift += dsv3i_load_sign(load[e], whole, rest);
    drift = rule == DSV3_BIAS_CENTRED ? drift / (double)E : 0.0;
    for (size_t e = 0; e < E; e++) {
        double sign = dsv3i_load_sign(load[e], whole, rest), error = (mean - (double)load[e]) / mean;
        double move = speed * (rule == DSV3_BIAS_PROPORTIONAL ? (sign > 0.0 || sign < 0.0 ? error : 0.0) : sign - drift);
        bias[e] = dsv3i_bias_moved(bias[e], move, rule);
    }
}

static dsv3_result dsv3i_check_bias_step(dsv3_bias_rule rule, double speed, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "rule", "is not one of dsv3_bias_rule", (int32_t)rule, 0,
                                  DSV3_BIAS_FACTOR));
    if (speed >= 0.0 && speed <= DBL_MAX) return DSV3_OK;
    return dsv3i_fail(error, DSV3_ERR_ARG, "speed", "is negative or not finite");
}

DSV3_API double dsv3_bias_speed(const dsv3_bias_schedule *schedule, uint64_t seen) {
    return schedule->freeze == 0 || seen < schedule->freeze ? schedule->speed : 0.0;
}

static dsv3_result dsv3i_balancer_reduce(const dsv3_balancer *b) {
    return b->reduce == NULL ? DSV3_OK : b->reduce(b->reduce_user, b->load, b->layers * b->experts);
}

/* The step itself, on loads that are summed over the ranks. */
static void dsv3i_balancer_move(dsv3_balancer *b, float *bias, uint64_t seen) {
    size_t n = b->layers * b->experts;
    double speed = dsv3_bias_speed(&b->schedule, seen);
    for (size_t i = 0; i < n; i += b->experts) { /* dense layers have no load, and so do not move */
        dsv3i_bias_step(bias + i, b->load + i, b->experts, b->rule, speed);
    }
    for (size_t i = 0; i < n; i++) b->load_all[i] += b->load[i];
    DSV3_MEMSET(b->load, 0, n * sizeof *b->load);
}
#endif

/* ---- Balance losses: sum_i f_i P_i, where f_i and P_i = mean s'_i have sum E and sum 1. V2's losses differ in f_i. */

enum { DSV3I_LOSS_EXPERT, DSV3I_LOSS_DEVICE, DSV3I_LOSS_COMMUNICATION };

static dsv3_result dsv3i_check_devices(size_t E, size_t devices, size_t most_devices, dsv3_error *error) {
    if (devices < 1 || E % devices != 0) {
        return dsv3i_fail_where(error, DSV3_ERR_ARG, "devices", "must divide the experts, and are", (int64_t)devices);
    }
    return dsv3i_check_count(error, "most_devices", most_devices, (int64_t)devices);
}

/* Sums count [E] over the rows that count. Returns their number. */
static double dsv3i_balance_count(const dsv3_routing *b, double *count) {
    int32_t largest[DSV3_MAX_TOPK];
    double rows = 0.0;
    for (size_t e = 0; e < b->experts; e++) count[e] = 0.0;
    for (size_t t = 0; t < b->n; t++) {
        const int32_t *chosen = b->idx != NULL ? b->idx + t * b->topk : largest;
        if (!dsv3i_counts(b->mask, t)) continue;
        if (b->idx == NULL) dsv3i_topk(largest, b->score + t * b->experts, b->experts, b->topk);
        rows += 1.0;
        for (size_t k = 0; k < b->topk; k++) count[chosen[k]] += 1.0;
    }
    return rows;
}

/* Rows that go to experts first .. first + each - 1. */
static double dsv3i_balance_sent(const dsv3_routing *b, size_t first, size_t each) {
    double sent = 0.0;
    for (size_t t = 0; t < b->n; t++) {
        size_t k = 0;
        while (k < b->topk && (size_t)b->idx[t * b->topk + k] / each != first / each) k++;
        sent += dsv3i_counts(b->mask, t) && k < b->topk;
    }
    return sent;
}

/* f [E] of a loss: E / (K T) count_i; its mean over a device's experts; or what the device is sent. Returns T. */
static double dsv3i_balance_f(const dsv3_routing *b, int loss, double *f) {
    double rows = dsv3i_balance_count(b, f), E = (double)b->experts, devices = (double)b->devices;
    double even = loss == DSV3I_LOSS_COMMUNICATION ? (double)b->most_devices * rows : (double)b->topk * rows;
    size_t each = loss == DSV3I_LOSS_EXPERT ? 1 : b->experts / b->devices;
    for (size_t g = 0; g < b->experts && rows > 0.0; g += each) {
        double sum = 0.0;
        for (size_t i = g; i < g + each; i++) sum += f[i];
        if (loss == DSV3I_LOSS_COMMUNICATION) sum = dsv3i_balance_sent(b, g, each);
        sum = loss == DSV3I_LOSS_EXPERT ? sum * (E / even) : sum * devices / even;
        for (size_t i = g; i < g + each; i++) f[i] = sum;
    }
    return rows;
}

/* scratch [2 E]: f, and the sums over t of s'_ti = s_ti / sum_j s_tj. */
static double dsv3i_balance_loss(const dsv3_routing *b, int loss, double *scratch) {
    double *f = scratch, *share = scratch + b->experts, total = 0.0, rows = dsv3i_balance_f(b, loss, f);
    for (size_t e = 0; e < b->experts; e++) share[e] = 0.0;
    for (size_t t = 0; t < b->n; t++) {
        const float *s = b->score + t * b->experts;
        double sum = 0.0;
        if (!dsv3i_counts(b->mask, t)) continue;
        for (size_t e = 0; e < b->experts; e++) sum += (double)s[e];
        for (size_t e = 0; e < b->experts && sum > 0.0; e++) share[e] += (double)s[e] / sum;
    }
    for (size_t e = 0; e < b->experts; e++) total += f[e] * share[e];
    return rows > 0.0 ? total / rows : 0.0;
}

#ifndef DSV3_NO_TRAINING
/* ---- Backward. The choice has no gradient, and neither has the bias. With c = routed_scaling_factor, S = sum of
 * the chosen scores (+ 1e-20) and mu = sum_k dw_k s_k / S:
 *     ds_k = c / S (dw_k - mu)  if weights are divided by S,  else  c dw_k    for the chosen k
 * A balance loss sum_i f_i P_i, f constant:  ds_ti = 1 / (T S_t) (f_i - sum_j f_j s_tj / S_t),  S_t = sum_j s_tj
 * Sigmoid: dz = ds s (1 - s).   Softmax: dz_i = p_i (ds_i - sum_j p_j ds_j). */

static void dsv3i_router_weights_backward(const dsv3_config *config, float *dscore, const float *dgate,
                                          const int32_t *idx, const float *score, size_t n) {
    size_t E = (size_t)config->n_routed_experts, K = (size_t)config->num_experts_per_tok;
    for (size_t t = 0; t < n; t++) {
        const int32_t *chosen = idx + t * K;
        const float *s = score + t * E, *dw = dgate + t * K;
        float sum = 0.0f, mu = 0.0f, c = dsv3i_gate_scale(config);
        for (size_t k = 0; k < K; k++) {
            sum += dsv3i_finite_score(s[chosen[k]]);
            mu += dw[k] * dsv3i_finite_score(s[chosen[k]]);
        }
        sum = dsv3i_is_normed(config) ? sum + 1e-20f : 1.0f;
        mu = dsv3i_is_normed(config) ? mu / sum : 0.0f;
        for (size_t k = 0; k < K; k++) { /* a score that is not finite weighed nothing */
            if (dsv3i_is_finite(s[chosen[k]])) dscore[t * E + (size_t)chosen[k]] += c / sum * (dw[k] - mu);
        }
    }
}

static void dsv3i_router_scores_backward(const dsv3_config *config, float *dz, const float *dscore, const float *score,
                                         size_t n) {
    size_t E = (size_t)config->n_routed_experts;
    for (size_t t = 0; t < n; t++) {
        const float *s = score + t * E, *ds = dscore + t * E;
        float sum = 0.0f;
        for (size_t e = 0; e < E && config->scoring_func == DSV3_SOFTMAX; e++) sum += dsv3i_finite_score(s[e]) * ds[e];
        for (size_t e = 0; e < E; e++) {
            float p = dsv3i_finite_score(s[e]), slope = config->scoring_func == DSV3_SOFTMAX ? p : p * (1.0f - p);
            dz[t * E + e] = slope * (ds[e] - sum);
        }
    }
}

/* dscore += weight d(sum f P) */
static void dsv3i_balance_back(const dsv3_routing *b, float *dscore, double weight, const double *f, double rows) {
    for (size_t t = 0; t < b->n; t++) {
        const float *s = b->score + t * b->experts;
        float *ds = dscore + t * b->experts;
        double sum = 0.0, mean = 0.0;
        if (!dsv3i_counts(b->mask, t)) continue;
        for (size_t e = 0; e < b->experts; e++) {
            sum += (double)s[e];
            mean += f[e] * (double)s[e];
        }
        for (size_t e = 0; e < b->experts && sum > 0.0; e++) {
            ds[e] += (float)(weight / (rows * sum) * (f[e] - mean / sum));
        }
    }
}

static void dsv3i_balance_backward(float *dscore, double scale, const dsv3_balance_weights *weights,
                                   const dsv3_routing *routing, double *scratch) {
    const double weight[3] = {weights->expert, weights->device, weights->communication};
    dsv3_routing b = *routing;
    b.devices = weights->devices;
    b.most_devices = weights->most_devices;
    for (int loss = DSV3I_LOSS_EXPERT; loss <= DSV3I_LOSS_COMMUNICATION; loss++) {
        double rows;
        b.idx = loss == DSV3I_LOSS_EXPERT && !weights->actual ? NULL : routing->idx;
        if (!(weight[loss] > 0.0)) continue;
        rows = dsv3i_balance_f(&b, loss, scratch);
        if (rows > 0.0) dsv3i_balance_back(&b, dscore, scale * weight[loss], scratch, rows);
    }
}

static dsv3_result dsv3i_check_weights(const dsv3_balance_weights *w, size_t E, dsv3_error *error) {
    if (!(w->expert >= 0.0 && w->device >= 0.0 && w->communication >= 0.0 &&
          w->expert + w->device + w->communication <= DBL_MAX)) {
        return dsv3i_fail(error, DSV3_ERR_ARG, "balance", "has a weight that is negative or not finite");
    }
    if (w->device <= 0.0 && w->communication <= 0.0) return DSV3_OK;
    return dsv3i_check_devices(E, w->devices, w->communication > 0.0 ? w->most_devices : 1, error);
}
#endif

/* ========================================================================================================
 * Chapter 8  >>moe
 *
 *     y_t = shared_experts(u_t) + sum_k w_tk expert_{idx_tk}(u_t)                          [R] eq. 12
 *     expert(u) = W_down (silu(W_gate u) * (W_up u))
 *
 * Rows are grouped by expert, so that each expert's weights are read once per call however many tokens chose it: choice
 * (t, k) gets the place slot[t, k] among n K grouped rows, experts in ascending order, tokens in ascending order within
 * an expert. The gate weight applies to the expert's output. The sum over k is taken for each token alone, the shared
 * experts first, then k = 0, 1, ..: what else is in the batch moves rows to other places and changes no sum.
 *
 * A dense layer is the same thing with one expert that everybody uses. Test: tests/test_moe.c.
 * ==================================================================================================== */

/* An MLP and the rows it sees. Its hidden values, n F of them, stand in h_gate, h_up and h from `at` on. */
typedef struct dsv3i_mlp {
    const dsv3_mlp *w, *g; /* g: backward, the gradients of w */
    const float *x;        /* its inputs: rows pair[i] / K of x [., d], or rows 0 .. n-1 if pair is NULL */
    const size_t *pair;    /* [n] choices t K + k of a routed expert, else NULL */
    float *y;              /* [n, d] forward: outputs; backward: the gradient of the inputs */
    const float *dy;       /* backward: rows like those of x */
    size_t n, at;
} dsv3i_mlp;

/* Rows that an MLP sees, from x to `to` [n, d]. */
static void dsv3i_mlp_gather(const dsv3i_call *c, float *to, const float *x, const dsv3i_mlp *r) {
    size_t d = c->m.d;
    for (size_t i = 0; i < r->n; i++) DSV3_MEMCPY(to + i * d, x + r->pair[i] / c->m.K * d, d * sizeof *x);
}

/* Each MLP after the other. Inputs of a routed expert first stand where its outputs will. */
static void dsv3i_mlps(dsv3i_call *c, const dsv3i_mlp *list, size_t count) {
    const dsv3i_workspace *ws = c->ws;
    for (size_t j = 0; j < count; j++) {
        const dsv3i_mlp *r = &list[j];
        float *gate = ws->h_gate + r->at, *up = ws->h_up + r->at, *h = ws->h + r->at;
        const float *x = r->pair != NULL ? r->y : r->x;
        dsv3i_product in[DSV3I_PRODUCTS], out = dsv3i_product_of(r->y, h, &r->w->down_proj, r->n);
        if (r->pair != NULL) dsv3i_mlp_gather(c, r->y, r->x, r);
        in[0] = dsv3i_product_of(gate, x, &r->w->gate_proj, r->n);
        in[1] = dsv3i_product_of(up, x, &r->w->up_proj, r->n);
        c->ctx->ops->linear(c->ctx, in, 2, ws->scratch);
        dsv3i_swiglu(c->ctx, h, gate, up, r->n * r->w->gate_proj.rows);
        c->ctx->ops->linear(c->ctx, &out, 1, ws->scratch);
    }
}

/* ---- Routing */

/* The bias of the choice, which has been decoded into the workspace; NULL: there is none. */
static const float *dsv3i_choice_bias(const dsv3i_call *c) {
    return c->model->config.topk_method == DSV3_NOAUX_TC ? c->ws->bias : NULL;
}

/* A worker's scratch has E + G + 1 floats; the last one tells whether there were scores that are not finite. */
static void dsv3i_select_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    size_t E = c->m.E, K = c->m.K, G = c->m.G;
    float *scratch = c->ws->select + worker * (E + G + 1);
    if (dsv3i_router_select(&c->model->config, c->ws->idx + begin * K, c->ws->gate + begin * K, c->ws->score + begin * E,
                            dsv3i_choice_bias(c), NULL, end - begin, scratch) < end - begin) {
        scratch[E + G] = 1.0f;
    }
}

/* dsv3i_router_select by all threads. */
static dsv3_result dsv3i_select(dsv3i_call *c) {
    size_t floats = c->m.E + c->m.G + 1, threads = c->ctx->threads, bad = 0;
    for (size_t i = 1; i <= threads; i++) c->ws->select[i * floats - 1] = 0.0f;
    dsv3i_loop(c->ctx, c->n, 8 * c->m.E, dsv3i_select_task, c);
    for (size_t i = 1; i <= threads; i++) bad += c->ws->select[i * floats - 1] > 0.0f;
    return bad == 0 ? DSV3_OK : DSV3_ERR_NAN;
}

/* idx and gate [n, K] of rows u; the observer may change the choice. NAN is no reason to stop. */
static dsv3_result dsv3i_route(dsv3i_call *c, const float *u) {
    const dsv3_config *config = &c->model->config;
    const dsv3_observer *o = &c->ctx->observer;
    dsv3i_workspace *ws = c->ws;
    dsv3_result result;
    if (dsv3i_choice_bias(c) != NULL) dsv3i_decode_row(c->ctx, ws->bias, &c->w->e_score_correction_bias, 0);
    dsv3i_router_scores(c->ctx, config, ws->score, u, &c->w->gate, NULL, c->n, ws->scratch);
    result = dsv3i_select(c);
    if (o->choose != NULL) {
        o->choose(o->user, c->w->index, ws->idx, ws->score, c->n);
        DSV3I_TRY(dsv3i_router_weights(config, ws->gate, ws->idx, ws->score, c->n, NULL));
    }
    if (o->routing != NULL) o->routing(o->user, c->w->index, ws->score, ws->idx, ws->gate, c->n);
    return result;
}

/* How the rows were routed whose balance loss row t begins: its sequence's, or (seq_aux false) all; none if it begins none. */
static dsv3_routing dsv3i_balance_rows(const dsv3i_call *c, size_t t, const float *score, const int32_t *idx) {
    dsv3_routing r = {score + t * c->m.E, idx + t * c->m.K, c->ws->row_mask + t, 0, c->m.E, c->m.K, 0, 0};
    r.n = !c->model->config.seq_aux && t > 0 ? 0 : !c->model->config.seq_aux ? c->n : dsv3i_sequence_rows(c->ws->leader, t, c->n);
    return r;
}

/* ---- Grouping */

/* Fills offset [E+1], slot [n, K] and its inverse pair [n K] from idx [n, K]: a counting sort. */
static void dsv3i_group_rows(size_t *offset, size_t *slot, size_t *pair, const int32_t *idx, size_t n, size_t K, size_t E) {
    DSV3_MEMSET(offset, 0, (E + 1) * sizeof *offset);
    for (size_t i = 0; i < n * K; i++) offset[idx[i] + 1]++;
    for (size_t e = 0; e < E; e++) offset[e + 1] += offset[e];
    for (size_t i = 0; i < n * K; i++) slot[i] = offset[idx[i]]++; /* each offset ends where the next began */
    for (size_t e = E; e > 0; e--) offset[e] = offset[e - 1];
    offset[0] = 0;
    for (size_t i = 0; i < n * K; i++) pair[slot[i]] = i;
}

/* The MLPs of a layer in ws->mlps, routed experts first, of those that were chosen. grouped [n K, d] and y [n, d] get
 * outputs; or, with dy, gradients of inputs. Returns how many. */
static size_t dsv3i_moe_list(const dsv3i_call *c, float *grouped, float *y, const float *u, const float *dy) {
    const dsv3i_workspace *ws = c->ws;
    const dsv3_layer *w = c->w, *g = c->g;
    const dsv3i_mlp shared = {&w->shared_experts, g != NULL ? &g->shared_experts : NULL, u, NULL, y, dy, c->n,
                              c->n * c->m.K * c->m.F};
    size_t count = 0;
    for (size_t e = 0; e < c->m.E; e++) {
        size_t first = ws->offset[e];
        const dsv3i_mlp r = {&w->experts[e], g != NULL ? &g->experts[e] : NULL, u, ws->pair + first,
                             grouped + first * c->m.d, dy, ws->offset[e + 1] - first, first * c->m.F};
        if (r.n > 0) ws->mlps[count++] = r;
    }
    if (c->m.Fs > 0) ws->mlps[count++] = shared;
    if (c->m.Fs == 0) DSV3_MEMSET(y, 0, c->n * c->m.d * sizeof *y);
    return count;
}

/* What the experts of a token say, each with its weight. */
static void dsv3i_moe_combine_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_rows *a = (const dsv3i_rows *)arg; /* y [n, d]; x, grouped; r, gate; at, slot; n, K */
    (void)worker;
    for (size_t i = begin * a->n; i < end * a->n; i++) {
        a->ctx->ops->axpy(a->y + i / a->n * a->d, a->r != NULL ? a->r[i] : 1.0f, a->x + a->at[i] * a->d, a->d);
    }
}

/* y_t += sum_k gate_tk grouped[slot_tk] (gate NULL: 1) */
static void dsv3i_moe_combine(const dsv3i_call *c, float *y, const float *grouped, float *gate) {
    dsv3i_rows a = dsv3i_rows_of(c->ctx, y, grouped, c->m.d);
    a.r = gate;
    a.at = c->ws->slot;
    a.n = c->m.K;
    dsv3i_loop(c->ctx, c->n, c->m.K * c->m.d, dsv3i_moe_combine_task, &a);
}

static dsv3_result dsv3i_moe_forward(dsv3i_call *c, float *y, const float *u) {
    dsv3i_workspace *ws = c->ws;
    dsv3_result result = dsv3i_route(c, u);
    if (result != DSV3_OK && result != DSV3_ERR_NAN) return result;
    dsv3i_group_rows(ws->offset, ws->slot, ws->pair, ws->idx, c->n, c->m.K, c->m.E);
    c->ctx->ops->mlps(c, ws->mlps, dsv3i_moe_list(c, ws->grouped, y, u, NULL));
    dsv3i_moe_combine(c, y, ws->grouped, ws->gate);
    return result;
}

/* The first row whose values are not all finite, or n. */
static size_t dsv3i_first_bad_row(const float *x, size_t n, size_t d) {
    for (size_t t = 0; t < n; t++) {
        if (!dsv3i_all_finite(x + t * d, d)) return t;
    }
    return n;
}

/* What became of a layer, or of its FFN. */
static dsv3_result dsv3i_layer_result(const dsv3i_call *c, dsv3_result result, dsv3_error *error) {
    if (result == DSV3_OK) return dsv3i_ok(error);
    if (result == DSV3_ERR_ARG) {
        return dsv3i_fail_where(error, result, "observer.choose", "chose an expert twice or out of range, in layer", c->w->index);
    }
    (void)dsv3i_fail_where(error, result, "row", "router scores are not finite in layer", c->w->index);
    return dsv3i_fail_at(error, dsv3i_first_bad_row(c->ws->score, c->n, c->m.E), result);
}

static dsv3_result dsv3i_ffn_forward(dsv3i_call *c, float *y, const float *u) {
    const dsv3i_mlp dense = {&c->w->mlp, NULL, u, NULL, y, NULL, c->n, 0};
    if (c->w->is_moe) return dsv3i_moe_forward(c, y, u);
    c->ctx->ops->mlps(c, &dense, 1);
    return DSV3_OK;
}

#ifndef DSV3_NO_TRAINING
/* ---- Backward. Expert k of row t sees dY_t; with v = W_down^T dY_t and h its SwiGLU output,
 *     dw_tk = v . h     (the weight commutes with W_down, behind the non-linearity)
 *     dh = w_tk v,   dW_down += dY_t (w_tk h)^T,   then SwiGLU and the two projections.
 * Saved: the outputs of gate_proj and up_proj, idx, gate, slot, offset, scores; h is rebuilt unless kept. */

/* One MLP. Of a routed expert, gates and their gradients stand in expert order in b->gates and b->r. */
static void dsv3i_mlp_backward(dsv3i_call *c, const dsv3i_mlp *r) {
    const dsv3i_backward *b = c->b;
    size_t F = r->w->gate_proj.rows, row = r->at / F, total = r->n * F;
    float *da = c->ws->h_gate + r->at, *db = c->ws->h_up + r->at, *h = c->ws->h + r->at, *dh = b->dh + r->at;
    float *gate = r->pair != NULL ? b->gates + row : NULL, *dgate = r->pair != NULL ? b->r + row : NULL;
    const float *x = r->x, *dy = r->dy;
    if (c->s->h == NULL) dsv3i_swiglu(c->ctx, h, da, db, total);
    if (r->pair != NULL) {
        dsv3i_mlp_gather(c, c->ws->grouped + row * c->m.d, r->x, r);
        dsv3i_mlp_gather(c, r->y, r->dy, r); /* dY stands where dx will */
        x = c->ws->grouped + row * c->m.d;
        dy = r->y;
    }
    for (size_t i = 0; gate != NULL && i < r->n; i++) {
        gate[i] = c->s->gate[r->pair[i]];
        dsv3i_scale(h + i * F, gate[i], F);
    }
    dsv3i_project_backward(c->ctx, c->ws, dh, 1, &r->g->down_proj, dy, h, &r->w->down_proj, r->n);
    dsv3i_swiglu_backward(c->ctx, dh, da, db, total, gate, dgate, F);
    dsv3i_project_backward(c->ctx, c->ws, r->y, 1, &r->g->gate_proj, da, x, &r->w->gate_proj, r->n);
    dsv3i_project_backward(c->ctx, c->ws, r->y, 0, &r->g->up_proj, db, x, &r->w->up_proj, r->n);
}

static void dsv3i_mlps_backward(dsv3i_call *c, const dsv3i_mlp *list, size_t count) {
    for (size_t j = 0; j < count; j++) dsv3i_mlp_backward(c, &list[j]);
}

/* The gradients of scores, then of z. Whoever has the first row of a balance loss does all of it. */
static void dsv3i_router_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    const dsv3_config *config = &c->model->config;
    size_t E = c->m.E, K = c->m.K;
    double *scratch = c->ws->balance + worker * 2 * E;
    for (size_t t = begin; t < end; t++) {
        const dsv3_routing r = dsv3i_balance_rows(c, t, c->s->score, c->s->idx);
        float *dscore = c->b->dscore + t * E;
        DSV3_MEMSET(dscore, 0, r.n * E * sizeof *dscore);
        dsv3i_router_weights_backward(config, dscore, c->b->dgate + t * K, r.idx, r.score, r.n);
        dsv3i_balance_backward(dscore, c->b->balance_scale, c->b->balance, &r, scratch);
        dsv3i_router_scores_backward(config, dscore, dscore, r.score, r.n);
    }
}

static void dsv3i_moe_backward(dsv3i_call *c, float *du, const float *dy, const float *u) {
    const dsv3i_backward *b = c->b;
    size_t chosen = c->n * c->m.K;
    for (size_t i = 0; i < chosen; i++) c->ws->pair[c->ws->slot[i]] = i;
    c->ctx->ops->mlps_backward(c, c->ws->mlps, dsv3i_moe_list(c, b->dgrouped, du, u, dy));
    dsv3i_moe_combine(c, du, b->dgrouped, NULL);
    for (size_t i = 0; i < chosen; i++) b->dgate[i] = b->r[c->ws->slot[i]];
    dsv3i_loop(c->ctx, c->n, 16 * c->m.E, dsv3i_router_backward_task, c);
    dsv3i_project_backward(c->ctx, c->ws, du, 0, &c->g->gate, b->dscore, u, &c->w->gate, c->n);
}

/* du [n, d] for dy [n, d] */
static void dsv3i_ffn_backward(dsv3i_call *c, float *du, const float *dy, const float *u) {
    const dsv3i_mlp dense = {&c->w->mlp, &c->g->mlp, u, NULL, du, dy, c->n, 0};
    if (c->w->is_moe) dsv3i_moe_backward(c, du, dy, u);
    if (!c->w->is_moe) c->ctx->ops->mlps_backward(c, &dense, 1);
}
#endif

/* ---- The plain ops: the backend "reference" */

static const dsv3i_ops dsv3i_plain = {
    {dsv3i_decode_f32, dsv3i_decode_f16, dsv3i_decode_bf16, dsv3i_decode_f8_e4m3, dsv3i_decode_q8_0, dsv3i_decode_q4_0},
    dsv3i_dot, dsv3i_axpy, dsv3i_exp_sum, dsv3i_silu_mul, dsv3i_linear, dsv3i_attend, dsv3i_mlps,
#ifndef DSV3_NO_TRAINING
    dsv3i_linear_backward, dsv3i_attend_backward, dsv3i_mlps_backward,
#endif
    NULL};

/* ========================================================================================================
 * Chapter 9  >>block
 *
 *     x += MLA(RMSNorm_input(x));   x += FFN(RMSNorm_post_attention(x))
 *
 * The residual stream x stays in float32 throughout. Test: tests/test_infer.c.
 * ==================================================================================================== */

static dsv3_result dsv3i_layer_forward(dsv3i_call *c, float *x) {
    dsv3i_workspace *ws = c->ws;
    size_t n = c->n, d = c->m.d;
    float eps = c->model->config.rms_norm_eps;
    dsv3_result result;
    dsv3i_norm(c->ctx, ws->u, x, &c->w->input_layernorm, n, eps);
    dsv3i_mla_forward(c, ws->y, ws->u);
    dsv3i_add_rows(c->ctx, x, ws->y, n, d);
    if (ws->x_mid != NULL) dsv3i_copy_rows(c->ctx, ws->x_mid, x, n, d);
    dsv3i_norm(c->ctx, ws->u_ffn, x, &c->w->post_attention_layernorm, n, eps);
    result = dsv3i_ffn_forward(c, ws->y, ws->u_ffn);
    dsv3i_add_rows(c->ctx, x, ws->y, n, d);
    return result;
}

#ifndef DSV3_NO_TRAINING
/* dx [n, d]: from the gradient of the layer's output to that of its input. The rows' sequences and angles stand in the
 * workspace, whose other pointers are on what the layer has kept (c->s). */
static void dsv3i_layer_backward(dsv3i_call *c, float *dx) {
    const dsv3i_saved *s = c->s;
    const dsv3_layer *w = c->w, *g = c->g;
    size_t n = c->n;
    float eps = c->model->config.rms_norm_eps, *du = c->b->du, *u = c->ws->u_ffn;
    if (s->u_ffn == NULL) dsv3i_norm(c->ctx, u, s->x_mid, &w->post_attention_layernorm, n, eps);
    dsv3i_ffn_backward(c, du, dx, u);
    dsv3i_norm_back(c->ctx, dx, dsv3i_grad(&g->post_attention_layernorm), du, s->x_mid,
                    &w->post_attention_layernorm, n, eps, c->b->r);
    u = c->ws->u;
    if (s->u == NULL) dsv3i_norm(c->ctx, u, s->x_in, &w->input_layernorm, n, eps);
    dsv3i_mla_backward(c, du, dx, u);
    dsv3i_norm_back(c->ctx, dx, dsv3i_grad(&g->input_layernorm), du, s->x_in, &w->input_layernorm, n, eps, c->b->r);
}
#endif

/* ========================================================================================================
 * Chapter 10  >>model
 *
 * Configurations, their checks, and the weights: which tensors a configuration calls for, under which
 * names and in which shapes. One walk over that list serves everybody: dsv3_model_tensors shows it,
 * dsv3_model_bind fills a model from it. A name here is a name in the published files:
 *     model.embed_tokens.weight
 *     model.layers.{i}.input_layernorm.weight ...                         i = 0 .. L-1
 *     model.norm.weight, lm_head.weight
 *     model.layers.{L+k-1}.{enorm, hnorm, eh_proj ...}.weight             MTP module k = 1 .. D
 * An FP8 tensor N comes with N_scale_inv, which despite its name is the scale itself: W = code * scale.
 * Test: tests/test_config.c, tests/test_model.c.
 * ==================================================================================================== */

/* ---- Presets: the table of published models */

DSV3_API dsv3_config dsv3_config_default(void) {
    dsv3_config c;
    DSV3_MEMSET(&c, 0, sizeof c); /* choices: the first ones, those of V3 */
    c.moe_layer_freq = c.n_group = c.topk_group = 1;
    c.norm_topk_prob = c.seq_aux = c.rope_interleave = c.rope_scaling.truncate = 1;
    c.routed_scaling_factor = 1.0f;
    c.aux_loss_alpha = 0.001f;
    c.rms_norm_eps = c.latent_norm_eps = 1e-6f;
    c.rope_theta = 10000.0f;
    c.rope_scaling.factor = c.rope_scaling.beta_slow = c.rope_scaling.mscale = 1.0f;
    c.rope_scaling.beta_fast = 32.0f;
    c.max_position_embeddings = 4096;
    c.bos_token_id = c.eos_token_id = -1;
    return c;
}

/* In the order of dsv3_preset: the fields of dsv3_config behind vocab_size, as they follow each other there. */
static const uint16_t dsv3i_preset_sizes[][19] = {
    /* d, Fd, F, L, D, dense layers, 1, H, H, rq, rk, dn, dr, dv, E, shared experts, K, G, Gt */
    {7168, 18432, 2048, 61, 1, 3, 1, 128, 128, 1536, 512, 128, 64, 128, 256, 1, 8, 8, 4}, /* V3 */
    {5120, 12288, 1536, 60, 0, 1, 1, 128, 128, 1536, 512, 128, 64, 128, 160, 2, 6, 8, 3}, /* V2 */
    {2048, 10944, 1408, 27, 0, 1, 1, 16, 16, 0, 512, 128, 64, 128, 64, 2, 6, 1, 1},       /* V2-Lite */
    {2048, 11264, 1408, 27, 0, 1, 1, 16, 16, 0, 512, 128, 64, 128, 64, 2, 6, 1, 1},       /* Moonlight */
    {7168, 18432, 2048, 61, 0, 1, 1, 64, 64, 1536, 512, 128, 64, 128, 384, 1, 8, 1, 1},   /* Kimi-K2 */
    {160, 448, 40, 5, 4, 1, 1, 5, 5, 96, 64, 32, 16, 32, 32, 1, 4, 4, 2},                    /* austen */
    {64, 192, 32, 3, 1, 1, 1, 4, 4, 0, 32, 16, 8, 16, 8, 1, 2, 1, 1},                        /* micro */
};

typedef struct dsv3i_preset {
    int32_t vocab, context, bos, eos;
    float scale, theta, eps;    /* routed_scaling_factor, rope_theta, rms_norm_eps */
    float factor, fast, mscale; /* YaRN's factor, beta_fast, both mscales; factor 0: no YaRN */
    dsv3_topk_method method;    /* noaux_tc, or one of V2 */
} dsv3i_preset;

static const dsv3i_preset dsv3i_presets[] = {
    {129280, 163840, 0, 1, 2.5f, 10000.0f, 1e-6f, 40.0f, 32.0f, 1.0f, DSV3_NOAUX_TC},
    {102400, 163840, 100000, 100001, 16.0f, 10000.0f, 1e-6f, 40.0f, 32.0f, 1.0f, DSV3_GROUP_LIMITED_GREEDY},
    {102400, 163840, 100000, 100001, 1.0f, 10000.0f, 1e-6f, 40.0f, 32.0f, 0.707f, DSV3_GREEDY},
    {163840, 8192, 163584, 163586, 2.446f, 50000.0f, 1e-5f, 0.0f, 0.0f, 0.0f, DSV3_NOAUX_TC},
    {163840, 131072, 163584, 163585, 2.827f, 50000.0f, 1e-6f, 32.0f, 1.0f, 1.0f, DSV3_NOAUX_TC},
    {256, 1024, 10, -1, 1.0f, 10000.0f, 1e-6f, 0.0f, 0.0f, 0.0f, DSV3_NOAUX_TC},
    {256, 512, 10, -1, 1.0f, 10000.0f, 1e-6f, 0.0f, 0.0f, 0.0f, DSV3_NOAUX_TC},
};

DSV3_API dsv3_config dsv3_config_preset(dsv3_preset preset) {
    dsv3_config c = dsv3_config_default();
    const dsv3i_preset *p;
    if ((size_t)preset >= DSV3I_COUNT(dsv3i_presets)) return c;
    p = dsv3i_presets + preset;
    c.vocab_size = p->vocab;
    for (size_t i = 0; i < DSV3I_COUNT(dsv3i_preset_sizes[0]); i++) {
        int32_t size = dsv3i_preset_sizes[preset][i];
        DSV3_MEMCPY((unsigned char *)&c + (i + 1) * sizeof size, &size, sizeof size);
    }
    c.max_position_embeddings = p->context;
    c.bos_token_id = p->bos;
    c.eos_token_id = p->eos;
    c.routed_scaling_factor = p->scale;
    c.rope_theta = p->theta;
    c.rms_norm_eps = p->eps;
    if (p->factor > 0.0f) {
        c.rope_scaling.type = DSV3_ROPE_YARN;
        c.rope_scaling.factor = p->factor;
        c.rope_scaling.original_max_position_embeddings = 4096;
        c.rope_scaling.beta_fast = p->fast;
        c.rope_scaling.mscale = c.rope_scaling.mscale_all_dim = p->mscale;
    }
    if (p->method != DSV3_NOAUX_TC) {
        c.scoring_func = DSV3_SOFTMAX;
        c.topk_method = p->method;
        c.norm_topk_prob = 0;
        c.gate_scaling = DSV3_SCALE_UNLESS_NORMED;
    }
    return c;
}

DSV3_API int dsv3_config_is_moe(const dsv3_config *config, int32_t i) {
    return i >= config->first_k_dense_replace && i % config->moe_layer_freq == 0;
}

/* ---- Checks. Each returns DSV3_OK or has filled in the error. */

static dsv3_result dsv3i_check_int(dsv3_error *error, const char *name, int32_t value, int32_t low, long high) {
    int64_t top = (uint64_t)high < (uint64_t)SIZE_MAX ? (int64_t)high : (int64_t)SIZE_MAX;
    dsv3_result code = value < 0 || (int64_t)value > top ? DSV3_ERR_LIMIT : DSV3_ERR_ARG;
    const char *why = code == DSV3_ERR_LIMIT ? "is outside its limits" : "is too small";
    return dsv3i_check_between(error, code, name, why, value, low, top);
}

static dsv3_result dsv3i_check_float(dsv3_error *error, const char *name, float value, float low, const char *why) {
    return value >= low && value <= FLT_MAX ? DSV3_OK : dsv3i_fail(error, DSV3_ERR_ARG, name, why);
}

/* Whole numbers and their bounds, then floats that must be positive. */
#define DSV3I_BOUNDS(X)                                                                                              \
    X(vocab_size, 1, DSV3_MAX_VOCAB) X(hidden_size, 1, DSV3_MAX_DIM) X(num_hidden_layers, 1, DSV3_MAX_LAYERS)        \
    X(moe_layer_freq, 1, DSV3_MAX_LAYERS) X(intermediate_size, 0, DSV3_MAX_DIM)                                      \
    X(num_attention_heads, 1, DSV3_MAX_HEADS) X(q_lora_rank, 0, DSV3_MAX_DIM) X(kv_lora_rank, 1, DSV3_MAX_DIM)       \
    X(qk_nope_head_dim, 1, DSV3_MAX_DIM) X(qk_rope_head_dim, 2, DSV3_MAX_DIM) X(v_head_dim, 1, DSV3_MAX_DIM)         \
    X(moe_intermediate_size, 0, DSV3_MAX_DIM) X(n_routed_experts, 0, DSV3_MAX_EXPERTS)                               \
    X(n_shared_experts, 0, DSV3_MAX_EXPERTS) X(n_group, 1, DSV3_MAX_EXPERTS)                                         \
    X(num_experts_per_tok, 0, DSV3_MAX_TOPK) X(max_position_embeddings, 1, DSV3_MAX_SEQ)                             \
    X(rms_norm_eps, 0, 0) X(latent_norm_eps, 0, 0) /* these are floats */

static dsv3_result dsv3i_check_bounds(const dsv3_config *c, dsv3_error *e) {
#define DSV3I_NAME(field, least, most) #field "\0"
#define DSV3I_BOUND(field, least, most) {offsetof(dsv3_config, field), least, (int32_t)(most)},
    static const char names[] = DSV3I_BOUNDS(DSV3I_NAME);
    static const struct { uint16_t at, least; int32_t most; } bounds[] = {DSV3I_BOUNDS(DSV3I_BOUND)};
    const char *name = names;
    for (size_t i = 0; i < DSV3I_COUNT(bounds); i++, name = dsv3i_next_text(name)) {
        float value = 1.0f;
        int32_t most = bounds[i].most, number = most > 0 ? dsv3i_int_at(c, bounds[i].at) : 0;
        DSV3I_TRY(dsv3i_check_int(e, name, number, bounds[i].least, most));
        if (most == 0) DSV3_MEMCPY(&value, (const unsigned char *)c + bounds[i].at, sizeof value);
        DSV3I_TRY(dsv3i_check_float(e, name, value, FLT_MIN, "must be positive and finite"));
    }
    return DSV3_OK;
}

/* Members of enums, which have the values 0 .. choices - 1. */
#define DSV3I_CHOICES(X)                                                                                             \
    X(mtp_concat, 2, "is not one of dsv3_mtp_concat") X(mtp_hidden, 2, "is not one of dsv3_mtp_hidden")              \
    X(rope_scaling.type, 2, "must be yarn or absent")                                                                \
    X(attention_bias, 1, "no published model has attention biases")

static dsv3_result dsv3i_check_choices(const dsv3_config *c, dsv3_error *e) {
#define DSV3I_TEXT(field, choices, why) #field "\0" why "\0"
#define DSV3I_NUMBER(field, choices, why) choices,
#define DSV3I_VALUE(field, choices, why) (int)c->field,
    static const char texts[] = DSV3I_CHOICES(DSV3I_TEXT);
    static const uint8_t choices[] = {DSV3I_CHOICES(DSV3I_NUMBER)};
    const int value[] = {DSV3I_CHOICES(DSV3I_VALUE)};
    const char *name = texts, *why;
    for (size_t i = 0; i < DSV3I_COUNT(choices); i++, name = dsv3i_next_text(why)) {
        why = dsv3i_next_text(name);
        if (value[i] < 0 || value[i] >= choices[i]) return dsv3i_fail(e, DSV3_ERR_UNSUPPORTED, name, why);
    }
    return DSV3_OK;
}

/* What depends on other fields of config c, with errors to e. */
#define DSV3I_INT(field, low, high) DSV3I_TRY(dsv3i_check_int(e, #field, c->field, low, high))
#define DSV3I_FLOAT(field, low, why) DSV3I_TRY(dsv3i_check_float(e, #field, c->field, low, why))
#define DSV3I_BETWEEN(field, low, high, why)                                                                         \
    DSV3I_TRY(dsv3i_check_between(e, DSV3_ERR_ARG, #field, why, c->field, low, high))

static size_t dsv3i_moe_layers(const dsv3_config *c) {
    int32_t layers = c->num_hidden_layers + c->num_nextn_predict_layers;
    size_t n = 0;
    for (int32_t i = 0; i < layers; i++) n += dsv3_config_is_moe(c, i) != 0;
    return n;
}

static dsv3_result dsv3i_check_layers(const dsv3_config *c, dsv3_error *e) {
    int32_t least;
    DSV3I_INT(num_nextn_predict_layers, 0, DSV3_MAX_LAYERS - c->num_hidden_layers);
    DSV3I_BETWEEN(first_k_dense_replace, 0, c->num_hidden_layers, "is not between 0 and num_hidden_layers");
    DSV3I_INT(intermediate_size, c->first_k_dense_replace > 0 || c->moe_layer_freq > 1, DSV3_MAX_DIM);
    least = dsv3i_moe_layers(c) > 0;
    DSV3I_INT(moe_intermediate_size, least, DSV3_MAX_DIM);
    DSV3I_INT(n_routed_experts, least, DSV3_MAX_EXPERTS);
    DSV3I_TRY(dsv3i_check_between(e, DSV3_ERR_LIMIT, "n_shared_experts", "times moe_intermediate_size is beyond the limit",
                                  (int64_t)c->n_shared_experts * c->moe_intermediate_size, 0, DSV3_MAX_DIM));
    DSV3I_INT(num_experts_per_tok, least, DSV3_MAX_TOPK);
    return dsv3i_check_routing(c, least, e);
}

static dsv3_result dsv3i_check_rope(const dsv3_config *c, dsv3_error *e) {
    if (!(c->rope_theta > 1.0f) || c->rope_theta > FLT_MAX) {
        return dsv3i_fail(e, DSV3_ERR_ARG, "rope_theta", "must be finite and larger than 1");
    }
    if (c->rope_scaling.type == DSV3_ROPE_NONE) return DSV3_OK;
    DSV3I_FLOAT(rope_scaling.factor, 1.0f, "must be finite and at least 1");
    DSV3I_INT(rope_scaling.original_max_position_embeddings, 1, DSV3_MAX_SEQ);
    DSV3I_FLOAT(rope_scaling.beta_slow, FLT_MIN, "must be positive and finite");
    DSV3I_FLOAT(rope_scaling.beta_fast, c->rope_scaling.beta_slow, "must be finite and at least beta_slow");
    DSV3I_FLOAT(rope_scaling.mscale, 0.0f, "must be finite and not negative");
    DSV3I_FLOAT(rope_scaling.mscale_all_dim, 0.0f, "must be finite and not negative");
    DSV3I_BETWEEN(rope_scaling.truncate, 0, 1, "is not 0 or 1");
    return DSV3_OK;
}

/* The elements of every tensor must be countable (with 64 bits they always are: the limits above see to it);
 * dsv3_model_bind checks the bytes, whose type it knows. */
static dsv3_result dsv3i_check_sizes(const dsv3_config *c, dsv3_error *e) {
    dsv3i_dims m = dsv3i_dims_of(c);
    static const char names[] = "vocab_size\0num_attention_heads\0num_attention_heads\0num_attention_heads\0kv_lora_rank\0"
                                "q_lora_rank\0intermediate_size\0moe_intermediate_size\0n_shared_experts\0n_routed_experts\0"
                                "hidden_size";
    const size_t size[][2] = {{m.V, m.d}, {m.Hq, dsv3i_max(m.rq, m.d)}, {m.Hkv, m.rk}, {m.Ho, m.d}, {m.width, m.d}, {m.rq, m.d},
                              {m.Fd, m.d}, {m.F, m.d}, {m.Fs, m.d}, {m.E, m.d}, {m.d, m.d2}};
    const char *name = names;
    for (size_t i = 0; i < DSV3I_COUNT(size); i++, name = dsv3i_next_text(name)) {
        if (dsv3i_mul(size[i][0], size[i][1]) < SIZE_MAX) continue;
        return dsv3i_fail(e, DSV3_ERR_OVERFLOW, name, "needs more bytes than size_t can count");
    }
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_config_check(const dsv3_config *c, dsv3_error *e) {
    if (c == NULL) return dsv3i_fail_null(e, "config");
    DSV3I_TRY(dsv3i_check_bounds(c, e));
    DSV3I_TRY(dsv3i_check_layers(c, e));
    DSV3I_TRY(dsv3i_check_choices(c, e));
    if (c->qk_rope_head_dim % 2 != 0) return dsv3i_fail(e, DSV3_ERR_ARG, "qk_rope_head_dim", "must be even: RoPE turns pairs");
    DSV3I_TRY(dsv3i_check_rope(c, e));
    DSV3I_BETWEEN(bos_token_id, -1, c->vocab_size - 1, "is not in the vocabulary (-1: none)");
    DSV3I_BETWEEN(eos_token_id, -1, c->vocab_size - 1, "is not in the vocabulary (-1: none)");
    DSV3I_TRY(dsv3i_check_sizes(c, e));
    return dsv3i_ok(e);
}

/* ---- The checkpoint's table of contents, in file order: the part that a tensor is of, its place in the model, its
 * name (behind "model.layers.{i}." in a layer, and then "mlp.experts.{e}." in an expert), shape and group. */

enum {
    DSV3I_PART_EMBED = 1,
    DSV3I_PART_LAST = 2, /* behind the layers */
    DSV3I_PART_HEAD = 4, /* unless tied to the embedding */
    DSV3I_PART_JOIN = 8, /* an MTP module, beside its layer; this comes first: without it there is no module */
    DSV3I_PART_NORMS = 16,
    DSV3I_PART_COPIES = 32,    /* of the embedding and the head, optional */
    DSV3I_PART_FIRST = 64,     /* a layer */
    DSV3I_PART_Q_LATENT = 128, /* rq > 0 */
    DSV3I_PART_Q = 256,        /* rq = 0 */
    DSV3I_PART_LAYER = 512,
    DSV3I_PART_DENSE = 1024,
    DSV3I_PART_ROUTER = 2048,
    DSV3I_PART_BIAS = 4096, /* noaux_tc */
    DSV3I_PART_EXPERT = 8192,
    DSV3I_PART_SHARED = 16384
};

/* rank, part, owner, field, name, rows and columns (a vector has columns), group */
#define DSV3I_PLACES(X)                                                                                              \
    X(2, EMBED, dsv3_model, embed_tokens, "model.embed_tokens.weight", V, d, EMBED)                                  \
    X(2, JOIN, dsv3_mtp, eh_proj, "eh_proj.weight", d, d2, MTP)                                                      \
    X(1, NORMS, dsv3_mtp, enorm, "enorm.weight", d, d, MTP)                                                          \
    X(1, NORMS, dsv3_mtp, hnorm, "hnorm.weight", d, d, MTP)                                                          \
    X(1, NORMS, dsv3_mtp, shared_head_norm, "shared_head.norm.weight", d, d, MTP)                                    \
    X(2, COPIES, dsv3_mtp, embed_tokens, "embed_tokens.weight", V, d, MTP)                                           \
    X(2, COPIES, dsv3_mtp, shared_head_head, "shared_head.head.weight", V, d, MTP)                                   \
    X(1, FIRST, dsv3_layer, input_layernorm, "input_layernorm.weight", d, d, NORM)                                   \
    X(2, Q_LATENT, dsv3_layer, q_a_proj, "self_attn.q_a_proj.weight", rq, d, ATTENTION)                              \
    X(1, Q_LATENT, dsv3_layer, q_a_layernorm, "self_attn.q_a_layernorm.weight", rq, rq, NORM)                        \
    X(2, Q_LATENT, dsv3_layer, q_b_proj, "self_attn.q_b_proj.weight", Hq, rq, ATTENTION)                             \
    X(2, Q, dsv3_layer, q_proj, "self_attn.q_proj.weight", Hq, d, ATTENTION)                                         \
    X(2, LAYER, dsv3_layer, kv_a_proj_with_mqa, "self_attn.kv_a_proj_with_mqa.weight", width, d, ATTENTION)          \
    X(1, LAYER, dsv3_layer, kv_a_layernorm, "self_attn.kv_a_layernorm.weight", rk, rk, NORM)                         \
    X(2, LAYER, dsv3_layer, kv_b_proj, "self_attn.kv_b_proj.weight", Hkv, rk, ATTENTION)                             \
    X(2, LAYER, dsv3_layer, o_proj, "self_attn.o_proj.weight", d, Ho, ATTENTION)                                     \
    X(1, LAYER, dsv3_layer, post_attention_layernorm, "post_attention_layernorm.weight", d, d, NORM)                 \
    X(2, DENSE, dsv3_layer, mlp.gate_proj, "mlp.gate_proj.weight", Fd, d, DENSE)                                     \
    X(2, DENSE, dsv3_layer, mlp.up_proj, "mlp.up_proj.weight", Fd, d, DENSE)                                         \
    X(2, DENSE, dsv3_layer, mlp.down_proj, "mlp.down_proj.weight", d, Fd, DENSE)                                     \
    X(2, ROUTER, dsv3_layer, gate, "mlp.gate.weight", E, d, ROUTER)                                                  \
    X(1, BIAS, dsv3_layer, e_score_correction_bias, "mlp.gate.e_score_correction_bias", E, E, ROUTER)                \
    X(2, EXPERT, dsv3_mlp, gate_proj, "gate_proj.weight", F, d, EXPERTS)                                             \
    X(2, EXPERT, dsv3_mlp, up_proj, "up_proj.weight", F, d, EXPERTS)                                                 \
    X(2, EXPERT, dsv3_mlp, down_proj, "down_proj.weight", d, F, EXPERTS)                                             \
    X(2, SHARED, dsv3_layer, shared_experts.gate_proj, "mlp.shared_experts.gate_proj.weight", Fs, d, SHARED)         \
    X(2, SHARED, dsv3_layer, shared_experts.up_proj, "mlp.shared_experts.up_proj.weight", Fs, d, SHARED)             \
    X(2, SHARED, dsv3_layer, shared_experts.down_proj, "mlp.shared_experts.down_proj.weight", d, Fs, SHARED)         \
    X(1, LAST, dsv3_model, norm, "model.norm.weight", d, d, NORM)                                                    \
    X(2, HEAD, dsv3_model, lm_head, "lm_head.weight", V, d, HEAD)

typedef struct dsv3i_place {
    uint16_t at, part;  /* offset in the struct that owns the tensor */
    uint8_t rows, cols; /* places in dsv3i_dims */
    uint8_t rank, group;
} dsv3i_place;

#define DSV3I_PLACE(rank, part, owner, field, name, rows, cols, group)                                               \
    {(uint16_t)offsetof(owner, field), DSV3I_PART_##part, DSV3I_PLACE_OF(dsv3i_dims, rows),                          \
     DSV3I_PLACE_OF(dsv3i_dims, cols), rank, DSV3_KIND_##group},
#define DSV3I_PLACE_NAME(rank, part, owner, field, name, rows, cols, group) name "\0"
static const dsv3i_place dsv3i_places[] = {DSV3I_PLACES(DSV3I_PLACE)};
static const char dsv3i_place_names[] = DSV3I_PLACES(DSV3I_PLACE_NAME);

/* ---- The walk through it. walk->visit sees each tensor's description and its slot in the model (NULL when there is
 * no model yet). */

typedef struct dsv3i_walk {
    const dsv3_config *config;
    dsv3i_dims m;
    dsv3_tensor_info info;
    dsv3_result (*visit)(struct dsv3i_walk *walk, dsv3_tensor *slot);
    void *user;
    dsv3_visit show; /* for dsv3_model_tensors */
    dsv3_find find;  /* these two for dsv3_model_bind */
    dsv3_error *error;
    int copies; /* DSV3I_PART_COPIES, or 0 to pass by them */
} dsv3i_walk;

static void dsv3i_walk_begin(dsv3i_walk *w, const dsv3_config *config, void *user,
                             dsv3_result (*visit)(dsv3i_walk *walk, dsv3_tensor *slot)) {
    DSV3_MEMSET(w, 0, sizeof *w);
    w->config = config;
    w->m = dsv3i_dims_of(config);
    w->visit = visit;
    w->user = user;
    w->info.layer = -1;
    w->info.expert = -1;
    w->copies = DSV3I_PART_COPIES;
}

static void dsv3i_walk_describe(dsv3i_walk *w, const dsv3i_place *p, const char *name) {
    dsv3i_text t = dsv3i_text_begin(w->info.name, sizeof w->info.name);
    if (w->info.layer >= 0) dsv3i_text_add_index(&t, "model.layers.", w->info.layer, ".");
    if (w->info.expert >= 0) dsv3i_text_add_index(&t, "mlp.experts.", w->info.expert, ".");
    dsv3i_text_add(&t, name);
    w->info.kind = (dsv3_tensor_kind)p->group;
    w->info.rank = p->rank;
    w->info.rows = p->rank == 1 ? 1 : dsv3i_size_at(&w->m, p->rows);
    w->info.cols = dsv3i_size_at(&w->m, p->cols);
    w->info.quantised = p->rank == 2 && (p->group == DSV3_KIND_ATTENTION || p->group == DSV3_KIND_DENSE ||
                                         p->group == DSV3_KIND_EXPERTS || p->group == DSV3_KIND_SHARED);
    w->info.optional = p->part == DSV3I_PART_COPIES;
}

/* The parts [added up] of owner, a struct of the model or NULL. */
static dsv3_result dsv3i_walk_parts(dsv3i_walk *w, void *owner, int parts) {
    const char *name = dsv3i_place_names;
    for (size_t i = 0; i < DSV3I_COUNT(dsv3i_places); i++, name = dsv3i_next_text(name)) {
        const dsv3i_place *p = dsv3i_places + i;
        if ((p->part & parts) == 0) continue;
        dsv3i_walk_describe(w, p, name);
        DSV3I_TRY(w->visit(w, owner != NULL ? (dsv3_tensor *)(void *)((unsigned char *)owner + p->at) : NULL));
    }
    return DSV3_OK;
}

static dsv3_result dsv3i_walk_layer(dsv3i_walk *w, dsv3_layer *l) {
    int parts = DSV3I_PART_FIRST | (w->m.rq > 0 ? DSV3I_PART_Q_LATENT : DSV3I_PART_Q) | DSV3I_PART_LAYER;
    if (!dsv3_config_is_moe(w->config, w->info.layer)) return dsv3i_walk_parts(w, l, parts | DSV3I_PART_DENSE);
    if (w->config->topk_method == DSV3_NOAUX_TC) parts |= DSV3I_PART_BIAS;
    DSV3I_TRY(dsv3i_walk_parts(w, l, parts | DSV3I_PART_ROUTER));
    for (size_t e = 0; e < w->m.E; e++) {
        w->info.expert = (int32_t)e;
        DSV3I_TRY(dsv3i_walk_parts(w, l != NULL ? &l->experts[e] : NULL, DSV3I_PART_EXPERT));
    }
    w->info.expert = -1;
    return w->m.Fs > 0 ? dsv3i_walk_parts(w, l, DSV3I_PART_SHARED) : DSV3_OK;
}

static dsv3_result dsv3i_walk_main(dsv3i_walk *w, dsv3_model *model) {
    DSV3I_TRY(dsv3i_walk_parts(w, model, DSV3I_PART_EMBED));
    for (size_t i = 0; i < w->m.L; i++) {
        w->info.layer = (int32_t)i;
        DSV3I_TRY(dsv3i_walk_layer(w, model != NULL ? &model->layers[i] : NULL));
    }
    w->info.layer = -1;
    return dsv3i_walk_parts(w, model, w->config->tie_word_embeddings ? DSV3I_PART_LAST : DSV3I_PART_LAST | DSV3I_PART_HEAD);
}

/* MTP module k = 0 .. D-1: its own parts, then its layer. */
static dsv3_result dsv3i_walk_module(dsv3i_walk *w, dsv3_model *model, size_t k) {
    w->info.layer = (int32_t)(w->m.L + k);
    DSV3I_TRY(dsv3i_walk_parts(w, model != NULL ? &model->mtp[k] : NULL, DSV3I_PART_JOIN | DSV3I_PART_NORMS | w->copies));
    return dsv3i_walk_layer(w, model != NULL ? &model->layers[w->m.L + k] : NULL);
}

/* Every tensor of the config, with its slot in model, or NULLs. */
static dsv3_result dsv3i_walk_all(dsv3i_walk *w, dsv3_model *model) {
    DSV3I_TRY(dsv3i_walk_main(w, model));
    for (size_t k = 0; k < w->m.D; k++) DSV3I_TRY(dsv3i_walk_module(w, model, k));
    return DSV3_OK;
}

static dsv3_result dsv3i_show_tensor(dsv3i_walk *w, dsv3_tensor *slot) {
    (void)slot;
    return w->show(w->user, &w->info);
}

DSV3_API dsv3_result dsv3_model_tensors(const dsv3_config *config, dsv3_visit visit, void *user, dsv3_error *error) {
    dsv3i_walk w;
    dsv3_result result;
    if (config == NULL || visit == NULL) return dsv3i_fail_null(error, config == NULL ? "config" : "visit");
    dsv3i_walk_begin(&w, config, user, dsv3i_show_tensor);
    w.show = visit;
    result = dsv3i_walk_all(&w, NULL);
    return result == DSV3_OK ? dsv3i_ok(error) : dsv3i_fail(error, result, w.info.name, "is where visit ended the walk");
}

/* ---- Binding */

static void dsv3i_model_layout(dsv3_model *model, const dsv3_config *c, dsv3i_layout *l) {
    dsv3i_dims m = dsv3i_dims_of(c);
    size_t layers = m.L + m.D, begin = l->used;
    dsv3_mlp *experts;
    model->layers = (dsv3_layer *)dsv3i_take(l, sizeof *model->layers, layers, 1, 1);
    model->mtp = (dsv3_mtp *)dsv3i_take(l, sizeof *model->mtp, m.D, 1, 1);
    model->rope_turns = (uint64_t *)dsv3i_take(l, sizeof *model->rope_turns, m.dr / 2, 1, 1);
    experts = (dsv3_mlp *)dsv3i_take(l, sizeof *experts, dsv3i_moe_layers(c), m.E, 1);
    if (l->base == NULL) return;
    DSV3_MEMSET(l->base + begin, 0, l->used - begin);
    model->config = *c;
    model->rope_factor = dsv3_rope_factor(c);
    model->softmax_scale = dsv3_softmax_scale(c);
    dsv3i_rope_turns(c, model->rope_turns);
    for (size_t i = 0; i < layers; i++) {
        model->layers[i].index = (int32_t)i;
        model->layers[i].is_moe = dsv3_config_is_moe(c, (int32_t)i);
        if (!model->layers[i].is_moe) continue;
        model->layers[i].experts = experts;
        experts += m.E;
    }
}

DSV3_API dsv3_result dsv3_model_size(const dsv3_config *config, size_t *bytes, dsv3_error *error) {
    DSV3I_TRY(dsv3_config_check(config, error));
    DSV3I_SIZE(dsv3_model, bytes, dsv3i_model_layout(&it, config, &l));
}

static dsv3_result dsv3i_bind_shape(dsv3_error *error, const dsv3_tensor *t, const char *name, size_t rows,
                                    size_t cols, int32_t rank) {
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_MISMATCH, name, "has the wrong number of dimensions", t->rank, rank, rank));
    if (t->rows != rows || t->cols != cols) {
        return dsv3i_fail_numbers(error, DSV3_ERR_MISMATCH, name, "has the wrong shape", DSV3_NUMBERS_SHAPE,
                                  (int64_t)rows, (int64_t)cols, (int64_t)t->rows, (int64_t)t->cols);
    }
    if (cols % dsv3_type_block(t->type) != 0) {
        int64_t whole = (int64_t)dsv3i_blocks(cols, DSV3_QBLOCK) * DSV3_QBLOCK;
        return dsv3i_fail_range(error, DSV3_ERR_MISMATCH, name, "has columns that are not whole blocks", whole, whole,
                                (int64_t)cols);
    }
    if (dsv3i_mul(rows, dsv3_row_bytes(t->type, cols)) == SIZE_MAX) {
        return dsv3i_fail(error, DSV3_ERR_OVERFLOW, name, "needs more bytes than size_t can count");
    }
    return t->data != NULL ? DSV3_OK : dsv3i_fail(error, DSV3_ERR_MISSING, name, "has no data");
}

/* An FP8 matrix: find its scales unless the finder supplied them. */
static dsv3_result dsv3i_bind_scale(const dsv3i_walk *w, dsv3_tensor *t) {
    char name[DSV3_MAX_NAME];
    dsv3i_text text = dsv3i_text_begin(name, sizeof name);
    dsv3_tensor scale;
    dsv3_result found;
    if (t->scale != NULL) return DSV3_OK;
    DSV3_MEMSET(&scale, 0, sizeof scale);
    dsv3i_text_add(&text, w->info.name);
    dsv3i_text_add(&text, "_scale_inv");
    found = w->find(w->user, name, &scale);
    if (found != DSV3_OK) {
        return dsv3i_fail(w->error, found, name,
                          found == DSV3_ERR_MISSING ? "FP8 weights without their scales" : dsv3_result_string(found));
    }
    if (scale.type != DSV3_F32) return dsv3i_fail(w->error, DSV3_ERR_UNSUPPORTED, name, "scales must be F32");
    t->scale = scale.data;
    return dsv3i_bind_shape(w->error, &scale, name, dsv3i_blocks(t->rows, DSV3_BLOCK), dsv3i_blocks(t->cols, DSV3_BLOCK), 2);
}

/* Router biases steer discrete choices: a file with a NaN among them is broken, and says so now. */
static dsv3_result dsv3i_bind_finite(const dsv3i_walk *w, const dsv3_tensor *t) {
    size_t bytes = dsv3_type_bytes(t->type);
    for (size_t i = 0; i < t->cols; i++) {
        float x;
        dsv3i_plain.decode[t->type](&x, (const unsigned char *)t->data + i * bytes, 1);
        if (dsv3i_is_finite(x)) continue;
        return dsv3i_fail_where(w->error, DSV3_ERR_NAN, w->info.name, "is not finite at index", (int64_t)i);
    }
    return DSV3_OK;
}

static dsv3_result dsv3i_bind_tensor(dsv3i_walk *w, dsv3_tensor *slot) {
    const char *name = w->info.name;
    dsv3_tensor t;
    dsv3_result found;
    DSV3_MEMSET(&t, 0, sizeof t);
    found = w->find(w->user, name, &t);
    if (found == DSV3_ERR_MISSING && w->info.optional) return DSV3_OK;
    if (found != DSV3_OK) return dsv3i_fail(w->error, found, name, dsv3_result_string(found));
    if (dsv3_type_bytes(t.type) == 0) return dsv3i_fail(w->error, DSV3_ERR_UNSUPPORTED, name, "has an unknown type");
    DSV3I_TRY(dsv3i_bind_shape(w->error, &t, name, w->info.rows, w->info.cols, w->info.rank));
    if (t.rank == 1 && (t.type == DSV3_F8_E4M3 || dsv3_type_block(t.type) > 1)) {
        return dsv3i_fail(w->error, DSV3_ERR_UNSUPPORTED, name, "a vector cannot be FP8, Q8_0 or Q4_0");
    }
    if (t.type != DSV3_F8_E4M3) t.scale = NULL;
    if (t.type == DSV3_F8_E4M3) DSV3I_TRY(dsv3i_bind_scale(w, &t));
    if (w->info.kind == DSV3_KIND_ROUTER && t.rank == 1) DSV3I_TRY(dsv3i_bind_finite(w, &t));
    *slot = t;
    return DSV3_OK;
}

static dsv3_result dsv3i_bind_absent(dsv3i_walk *w, dsv3_tensor *slot) {
    dsv3_tensor t;
    (void)slot;
    DSV3_MEMSET(&t, 0, sizeof t);
    return w->find(w->user, w->info.name, &t) == DSV3_ERR_MISSING ? DSV3_OK : DSV3_ERR_MISMATCH;
}

/* Does the file have nothing of the module at which the walk is? (Its eh_proj is known to be missing.) A file
 * without MTP layers is complete; one that has lost a single tensor is not. */
static int dsv3i_module_absent(dsv3i_walk *w) {
    dsv3_result absent;
    w->visit = dsv3i_bind_absent;
    absent = dsv3i_walk_parts(w, NULL, DSV3I_PART_NORMS | DSV3I_PART_FIRST);
    w->visit = dsv3i_bind_tensor;
    return absent == DSV3_OK;
}

/* Modules are bound one after another until a file has no more of them. */
static dsv3_result dsv3i_bind_modules(dsv3i_walk *w, dsv3_model *model) {
    for (size_t k = 0; k < w->m.D; k++) {
        dsv3_mtp *p = &model->mtp[k];
        dsv3_result result = dsv3i_walk_module(w, model, k);
        if (result == DSV3_ERR_MISSING && p->eh_proj.data == NULL && dsv3i_module_absent(w)) break;
        if (result != DSV3_OK) return result;
        if (p->embed_tokens.data == NULL) p->embed_tokens = model->embed_tokens;
        if (p->shared_head_head.data == NULL) p->shared_head_head = model->lm_head;
        model->n_mtp++;
    }
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_model_bind(const dsv3_config *config, dsv3_model *model, void *memory, size_t bytes,
                                     dsv3_find find, void *user, dsv3_error *error) {
    dsv3i_layout l = {NULL, 0};
    dsv3i_walk w;
    size_t need = 0;
    DSV3I_NEED(1, model); DSV3I_NEED(1, find);
    DSV3I_TRY(dsv3i_layout_begin(&l, model, dsv3_model_size(config, &need, error), memory, bytes, &need, error));
    DSV3_MEMSET(model, 0, sizeof *model);
    dsv3i_model_layout(model, config, &l);
    dsv3i_walk_begin(&w, config, user, dsv3i_bind_tensor);
    w.find = find;
    w.error = error;
    DSV3I_TRY(dsv3i_walk_main(&w, model));
    if (config->tie_word_embeddings) model->lm_head = model->embed_tokens;
    DSV3I_TRY(dsv3i_bind_modules(&w, model));
    return dsv3i_ok(error);
}

/* ========================================================================================================
 * Chapter 11  >>pass
 *
 * Batches, and the forward program
 *     x = embed_tokens[token];   x = layer_i(x) for i < L;   logits = lm_head RMSNorm_final(x)
 * for a batch of rows that may belong to several sequences, each with its own cache. All rows' latents of
 * a layer are stored before any row attends, so a row sees the earlier rows of its own sequence in the
 * same call: a prompt chunk of n rows is n decode steps done together.
 *
 * Nothing is final until the end: the caches' lengths move last, so a call that fails leaves every
 * sequence where it was. Test: tests/test_infer.c, tests/test_same_bits.c.
 * ==================================================================================================== */

/* Context, model and workspace as a program was given them. */
static dsv3_result dsv3i_workspace_check(const dsv3_workspace *workspace, const dsv3_context *ctx,
                                         const dsv3_model *model, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_context(ctx, error));
    DSV3I_NEED(1, model); DSV3I_NEED(1, workspace);
    if (workspace->memory == NULL) return dsv3i_fail(error, DSV3_ERR_ARG, "workspace", "was not made by dsv3_workspace_init");
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_MEMORY, "threads", "is more than the workspace was made for",
                                  (int64_t)ctx->threads, 1, (int64_t)workspace->threads));
    if (workspace->made_for != dsv3i_fingerprint(&model->config)) {
        return dsv3i_fail(error, DSV3_ERR_MISMATCH, "workspace", "was made for another config");
    }
    return DSV3_OK;
}

static dsv3_result dsv3i_workspace_open(dsv3i_workspace *ws, dsv3_workspace *workspace, const dsv3_context *ctx,
                                        const dsv3_model *model, dsv3_error *error) {
    DSV3I_TRY(dsv3i_workspace_check(workspace, ctx, model, error));
    workspace->begun = 0; /* what was begun is overwritten */
    *ws = dsv3i_workspace_of(workspace, &model->config);
    return DSV3_OK;
}

/* One run of a batch. Depth 0 is the main model; k, MTP module k. */
typedef struct dsv3i_run {
    const dsv3_context *ctx;
    const dsv3_model *model;
    size_t k;
    dsv3_cache *caches; /* [n_caches] */
    size_t n_caches;
    const dsv3_batch *batch;
    const float *hidden; /* [n, d] k > 0: the rows' states at depth k - 1 */
    float *logits;       /* [outputs, V] */
    dsv3i_workspace *ws;
    dsv3_error *error;
    const struct dsv3i_evaluation *sums; /* loads and balance losses are added up here; or NULL */
    void (*add)(const struct dsv3i_evaluation *sums, dsv3i_call *c); /* does: programs without sums carry none of it */
    struct dsv3i_saved *saved; /* [L + D] training: where layers keep what their backward pass needs, and the caches
                                  have one layer each; else NULL */
} dsv3i_run;

/* ---- A batch: checked as a whole before anything is computed */

/* The row before r of the same sequence, or r itself if it is the first. */
static size_t dsv3i_previous_row(const int32_t *sequence, size_t r) {
    for (size_t i = r; i > 0; i--) {
        if (sequence[i - 1] == sequence[r]) return i - 1;
    }
    return r;
}

static int dsv3i_cache_overlap(const dsv3_cache *a, const dsv3_cache *b) {
    size_t width = a->width * dsv3_type_bytes(a->type), other = b->width * dsv3_type_bytes(b->type);
    return dsv3i_overlap(a->data, a->layers * a->capacity * width, b->data, b->layers * b->capacity * other);
}

DSV3I_APART dsv3_result dsv3i_batch_row(const dsv3i_run *p, size_t r) {
    const dsv3_batch *batch = p->batch;
    dsv3i_workspace *ws = p->ws;
    int32_t s = batch->sequence != NULL ? batch->sequence[r] : 0;
    int documents = p->sums != NULL && p->caches == ws->views; /* which share a cache: chapter 12 */
    size_t before, position;
    DSV3I_TRY(dsv3i_check_element(p->error, DSV3_ERR_ARG, "sequence", r, "is not one of the caches", (int64_t)p->n_caches, s));
    DSV3I_TRY(dsv3i_check_token(p->error, "token", r, p->model->config.vocab_size, batch->token[r]));
    ws->sequence[r] = s;
    before = dsv3i_previous_row(ws->sequence, r);
    position = before == r ? p->caches[s].length : (size_t)ws->position[before] + 1;
    ws->leader[r] = before == r ? (int32_t)r : ws->leader[before];
    for (size_t i = 0; i < r && before == r && !documents; i++) {
        if (ws->leader[i] != (int32_t)i || !dsv3i_cache_overlap(&p->caches[s], &p->caches[ws->sequence[i]])) continue;
        (void)dsv3i_fail(p->error, DSV3_ERR_ARG, "caches", "lies over the memory of another that is in the call");
        return dsv3i_fail_at(p->error, (size_t)s, DSV3_ERR_ARG);
    }
    if (batch->position != NULL && (int64_t)batch->position[r] != (int64_t)position) {
        return dsv3i_fail_row(p->error, DSV3_ERR_POSITION, "position", r, "does not continue its sequence",
                              (int64_t)position, (int64_t)position, batch->position[r]);
    }
    ws->position[r] = (int32_t)position;
    return dsv3i_check_element(p->error, DSV3_ERR_FULL, "position", r, "is beyond the cache",
                               (int64_t)p->caches[s].capacity, (int64_t)position);
}

static dsv3_result dsv3i_batch_outputs(const dsv3_batch *batch, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "outputs", "is more than the batch has rows",
                                  (int64_t)batch->outputs, 0, (int64_t)batch->rows));
    for (size_t i = 0; batch->output != NULL && i < batch->outputs; i++) {
        DSV3I_TRY(dsv3i_check_element(error, DSV3_ERR_ARG, "output", i, "is not a row of the batch",
                                      (int64_t)batch->rows, batch->output[i]));
    }
    return DSV3_OK;
}

static dsv3_result dsv3i_batch_check(const dsv3i_run *p) {
    const dsv3i_workspace *ws = p->ws;
    dsv3_error *error = p->error;
    const dsv3_config *c;
    size_t layers, rows, width;
    DSV3I_NEED(1, p->caches); DSV3I_NEED(1, p->batch); DSV3I_NEED(1, p->batch->token);
    rows = p->batch->rows;
    if (rows < 1) return dsv3i_fail(error, DSV3_ERR_ARG, "rows", "the batch is empty");
    if (p->n_caches < 1) return dsv3i_fail(error, DSV3_ERR_ARG, "n_caches", "is 0: every sequence needs a cache");
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_MEMORY, "rows", "is more than the workspace was made for", (int64_t)rows,
                                  1, (int64_t)ws->rows));
    c = &p->model->config;
    layers = p->k > 0 || p->saved != NULL ? 1 : (size_t)c->num_hidden_layers;
    width = dsv3i_dims_of(c).width;
    for (size_t s = 0; s < p->n_caches; s++) {
        const dsv3_cache *cache = &p->caches[s];
        if (cache->layers == layers && cache->width == width) continue;
        (void)dsv3i_fail_numbers(error, DSV3_ERR_MISMATCH, "caches", "was made for another config", DSV3_NUMBERS_SHAPE,
                                 (int64_t)layers, (int64_t)width, (int64_t)cache->layers, (int64_t)cache->width);
        return dsv3i_fail_at(error, s, DSV3_ERR_MISMATCH);
    }
    return dsv3i_batch_outputs(p->batch, error);
}

/* Which rows use the expanded form: see chapter 6. */
static void dsv3i_batch_forms(const dsv3_context *ctx, size_t rk, size_t kv, size_t n, dsv3i_workspace *ws) {
    for (size_t t = 0; t < n; t++) ws->expanded[t] = 0;
    for (size_t t = 0; t < n; t++) ws->expanded[ws->leader[t]]++; /* rows of the sequence, kept by its leader */
    for (size_t t = n; t > 0; t--) {
        size_t rows = (size_t)ws->expanded[ws->leader[t - 1]];
        int pays = rows > DSV3_MAX_DRAFTS + 1 && 2 * rk > kv && rows > dsv3i_mul(rk, kv) / (2 * rk - kv);
        if (ctx->attention == DSV3_ATTENTION_ABSORBED) pays = 0;
        if (ctx->attention == DSV3_ATTENTION_EXPANDED) pays = 1;
        ws->expanded[t - 1] = pays; /* from the back: a leader's count is overwritten last */
    }
}

static dsv3_result dsv3i_batch_begin(const dsv3i_run *p) {
    const dsv3_model *model = p->model;
    DSV3I_TRY(dsv3i_batch_check(p));
    const size_t n = p->batch->rows;
    const dsv3i_dims m = dsv3i_dims_of(&model->config);
    for (size_t r = 0; r < n; r++) DSV3I_TRY(dsv3i_batch_row(p, r));
    dsv3i_batch_forms(p->ctx, m.rk, m.kv, n, p->ws);
    dsv3i_rope_table(p->ws->cos_sin, p->ws->position, model->rope_turns, model->rope_factor, n, m.dr);
    return dsv3i_ok(p->error);
}

DSV3_API dsv3_result dsv3_batch_begin(const dsv3_context *context, const dsv3_model *model, const dsv3_cache *caches,
                                      size_t n_caches, const dsv3_batch *batch, dsv3_workspace *workspace, dsv3_error *error) {
    dsv3i_workspace ws;
    dsv3_cache *unwritten = (dsv3_cache *)(uintptr_t)caches;
    const dsv3i_run p = {context, model, 0, unwritten, n_caches, batch, NULL, NULL, &ws, error, NULL, NULL, NULL};
    DSV3I_TRY(dsv3i_workspace_open(&ws, workspace, context, model, error));
    DSV3I_TRY(dsv3i_batch_begin(&p));
    workspace->begun = batch->rows;
    return DSV3_OK;
}

static void dsv3i_batch_end(dsv3_cache *caches, size_t n, const int32_t *sequence, const int32_t *position) {
    for (size_t r = 0; r < n; r++) caches[sequence[r]].length = (size_t)position[r] + 1;
}

/* ---- The pass: rows in ws->x go through a stack of layers and a norm. The main model is one such stack, and so is each
 * MTP module. */

typedef struct dsv3i_stack {
    const dsv3_layer *layers; /* [count] */
    size_t count;
    const dsv3_tensor *norm, *head;
} dsv3i_stack;

/* Depth 0: the main model; k: MTP module k. */
static dsv3i_stack dsv3i_stack_of(const dsv3_model *model, size_t k) {
    size_t L = (size_t)model->config.num_hidden_layers;
    dsv3i_stack s = {model->layers, L, &model->norm, &model->lm_head};
    if (k == 0) return s;
    s.layers += L + k - 1;
    s.count = 1;
    s.norm = &model->mtp[k - 1].shared_head_norm;
    s.head = &model->mtp[k - 1].shared_head_head;
    return s;
}

#ifndef DSV3_NO_TRAINING
/* A workspace whose pointers are on what a layer keeps. */
static dsv3i_workspace dsv3i_keeping(const dsv3i_workspace *from, const dsv3i_saved *s) {
    dsv3i_workspace ws = *from;
#define DSV3I_KEEP(type, name, rows, columns)                                                                        \
    if (s->name != NULL) ws.name = s->name;
    DSV3I_SAVED(DSV3I_KEEP)
    return ws;
}
#endif

/* Asks the caller whether to go on. */
static dsv3_result dsv3i_go_on(const dsv3_context *ctx, dsv3_error *error) {
    if (ctx->aborted == NULL || !ctx->aborted(ctx->abort_user)) return DSV3_OK;
    return dsv3i_fail(error, DSV3_ERR_ABORTED, "context.aborted", "has ended the call");
}

/* In chapter 12. */
static void dsv3i_mtp_input(const dsv3i_run *p);
/* The layers of depth k on the rows in ws->x, then the norm: ws->x, ws->u and ws->hidden. */
static dsv3_result dsv3i_pass(const dsv3i_run *p) {
    const dsv3_observer *o = &p->ctx->observer;
    dsv3i_workspace *ws = p->ws;
    dsv3i_stack stack = dsv3i_stack_of(p->model, p->k);
    size_t n = p->batch->rows;
    for (size_t i = 0; i < stack.count; i++) {
        const dsv3_layer *w = &stack.layers[i];
        dsv3i_call c = dsv3i_call_of(p->ctx, p->model, w, p->saved == NULL ? i : 0, p->caches, n, ws);
        dsv3_result result = dsv3i_go_on(p->ctx, p->error);
#ifndef DSV3_NO_TRAINING
        dsv3i_workspace keeping;
#endif
        if (result != DSV3_OK) return result;
#ifndef DSV3_NO_TRAINING
        if (p->saved != NULL) {
            dsv3i_copy_rows(p->ctx, p->saved[w->index].x_in, ws->x, n, stack.norm->cols);
            keeping = dsv3i_keeping(ws, &p->saved[w->index]);
            c.ws = &keeping;
        }
#endif
        result = dsv3i_layer_forward(&c, ws->x);
        if (result != DSV3_OK) return dsv3i_layer_result(&c, result, p->error);
        if (p->sums != NULL && w->is_moe) p->add(p->sums, &c);
        if (o->hidden != NULL) o->hidden(o->user, w->index, ws->x, n);
    }
    dsv3i_norm(p->ctx, ws->u, ws->x, stack.norm, n, p->model->config.rms_norm_eps);
    ws->hidden = p->model->config.mtp_hidden == DSV3_MTP_PRE_NORM ? ws->x : ws->u;
    if (o->hidden != NULL) o->hidden(o->user, -1, ws->u, n);
    return DSV3_OK;
}

/* NaN, infinite, or so large that the norm would make zeros of it; or the norm's gain is not finite. */
static dsv3_result dsv3i_pass_finite(const dsv3i_run *p) {
    const dsv3i_workspace *ws = p->ws;
    size_t d = (size_t)p->model->config.hidden_size;
    for (size_t t = 0; t < p->batch->rows; t++) {
        const float *x = ws->x + t * d;
        if (dsv3i_is_finite(dsv3i_dot(x, x, d)) && dsv3i_all_finite(ws->u + t * d, d)) continue;
        (void)dsv3i_fail_where(p->error, DSV3_ERR_NAN, "row", "final hidden state is not finite, in sequence", ws->sequence[t]);
        return dsv3i_fail_at(p->error, t, DSV3_ERR_NAN);
    }
    return DSV3_OK;
}

/* logits [outputs, V] from the normalised rows in ws->u; the wanted ones are gathered in ws->y. */
static dsv3_result dsv3i_pass_logits(const dsv3i_run *p) {
    const dsv3_batch *batch = p->batch;
    const dsv3_tensor *head = dsv3i_stack_of(p->model, p->k).head;
    size_t d = head->cols, skipped = batch->rows - batch->outputs, bad;
    dsv3i_product product = dsv3i_product_of(p->logits, p->ws->y, head, batch->outputs);
    if (batch->outputs == 0) return DSV3_OK;
    for (size_t i = 0; i < batch->outputs; i++) {
        size_t row = batch->output != NULL ? (size_t)batch->output[i] : skipped + i;
        DSV3_MEMCPY(p->ws->y + i * d, p->ws->u + row * d, d * sizeof(float));
    }
    p->ctx->ops->linear(p->ctx, &product, 1, p->ws->scratch);
    bad = dsv3i_first_bad_row(p->logits, batch->outputs, head->rows);
    if (bad == batch->outputs) return DSV3_OK;
    return dsv3i_fail_where(p->error, DSV3_ERR_NAN, "logits", "a value is not finite, in output", (int64_t)bad);
}

/* The whole run. In training only the losses are looked at. */
static dsv3_result dsv3i_forward(const dsv3i_run *p) {
    DSV3I_TRY(dsv3i_batch_begin(p));
    if (p->k > 0 && p->hidden == NULL) return dsv3i_fail_null(p->error, "hidden");
    if (p->logits == NULL && p->batch->outputs > 0) return dsv3i_fail_null(p->error, "logits");
    if (p->k == 0) dsv3i_embed(p->ctx, p->ws->x, p->batch->token, &p->model->embed_tokens, p->batch->rows);
    if (p->k > 0) dsv3i_mtp_input(p);
    DSV3I_TRY(dsv3i_pass(p));
    if (p->saved == NULL) DSV3I_TRY(dsv3i_pass_finite(p));
    DSV3I_TRY(dsv3i_pass_logits(p));
    dsv3i_batch_end(p->caches, p->batch->rows, p->ws->sequence, p->ws->position);
    return dsv3i_ok(p->error);
}

DSV3_API dsv3_result dsv3_forward(const dsv3_context *context, float *logits, const dsv3_model *model, dsv3_cache *caches,
                                  size_t n_caches, const dsv3_batch *batch, dsv3_workspace *workspace, dsv3_error *error) {
    dsv3i_workspace ws;
    const dsv3i_run p = {context, model, 0, caches, n_caches, batch, NULL, logits, &ws, error, NULL, NULL, NULL};
    DSV3I_TRY(dsv3i_workspace_open(&ws, workspace, context, model, error));
    DSV3I_TRY(dsv3i_forward(&p));
    workspace->hidden = ws.hidden;
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_states(const dsv3_model *model, float *state, const dsv3_workspace *workspace,
                                 const int32_t *row, size_t n, dsv3_error *error) {
    size_t d;
    const float *u;
    DSV3I_NEED(1, model); DSV3I_NEED(n, state); DSV3I_NEED(1, workspace); DSV3I_NEED(n, row);
    if (workspace->hidden == NULL) return dsv3i_fail(error, DSV3_ERR_ARG, "workspace", "has no states: no call has used it");
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "n", "is more than the workspace has rows",
                                  (int64_t)n, 0, (int64_t)workspace->rows));
    if (workspace->made_for != dsv3i_fingerprint(&model->config)) {
        return dsv3i_fail(error, DSV3_ERR_MISMATCH, "workspace", "was made for another config");
    }
    d = (size_t)model->config.hidden_size;
    u = dsv3i_workspace_of(workspace, &model->config).u;
    for (size_t i = 0; i < n; i++) {
        DSV3I_TRY(dsv3i_check_element(error, DSV3_ERR_ARG, "row", i, "is not one of the workspace",
                                      (int64_t)workspace->rows, row[i]));
    }
    for (size_t i = 0; i < n; i++) DSV3_MEMCPY(state + i * d, u + (size_t)row[i] * d, d * sizeof *state);
    return dsv3i_ok(error);
}

/* ========================================================================================================
 * Chapter 12  >>mtp
 *
 * Multi-token prediction ([R] 2.2): behind the main model stands a chain of D modules. With tokens t_0, t_1, .. and
 * h_i^0 the main model's state at position i, module k = 1 .. D computes
 *     h'_i = eh_proj [enorm(embed_tokens[t_{i+k}]) ; hnorm(h_i^{k-1})]         eh_proj [d, 2d]
 *     h_i^k = Layer_{L+k-1}(h')_i                                              causal over i, with its own cache
 *     logits_i^k = shared_head.head RMSNorm_{shared_head.norm}(h_i^k)          predict t_{i+k+1}
 * Embedding and head are the main model's (files may carry copies of them). Positions of RoPE are i.
 *
 * In training all depths learn together: position i of depth k exists if t_{i+k} does, so a sequence of T inputs
 * has T - k rows at depth k, and none, silently, if T <= k. When documents share one sequence, a row
 * whose t_{i+k} or t_{i+k+1} lies in the next document has no loss; attention crosses the border, unless documents are
 * apart: then each is a sequence of its own. The total is
 *     L = nll_0 / N + lambda / D sum_k nll_k / N_k + alpha sum over MoE layers of the balance loss
 * with N the number of main targets and N_k = N ([R], which divides a sum of T - k terms by T) or the depth's own.
 *
 * Which hidden state a module gets is not said in the report. Released weights expect it behind the final norm, and
 * from depth to depth behind shared_head.norm; eh_proj's first d columns are the embedding's, although eq. 21 prints
 * them the other way round. Both are choices in the config. Test: tests/test_mtp.c.
 * ==================================================================================================== */

/* ws->y [n, d] = embedding, ws->concat [n, 2d] = [enorm(embedding) ; hnorm(hidden)] */
static void dsv3i_mtp_concat(const dsv3_context *ctx, const dsv3_model *model, const dsv3_mtp *mtp,
                             const int32_t *token, const float *hidden, size_t n, dsv3i_workspace *ws) {
    size_t d = (size_t)model->config.hidden_size;
    size_t e = model->config.mtp_concat == DSV3_MTP_HIDDEN_FIRST ? d : 0, h = d - e;
    float eps = model->config.rms_norm_eps;
    dsv3i_embed(ctx, ws->y, token, &mtp->embed_tokens, n);
    dsv3i_rmsnorm(ctx, ws->concat + e, 2 * d, ws->y, &mtp->enorm, n, d, eps);
    dsv3i_rmsnorm(ctx, ws->concat + h, 2 * d, hidden, &mtp->hnorm, n, d, eps);
}

/* ws->x [n, d] = eh_proj concat */
static void dsv3i_mtp_input(const dsv3i_run *p) {
    const dsv3_mtp *mtp = &p->model->mtp[p->k - 1];
    size_t n = p->batch->rows;
    dsv3i_product product = dsv3i_product_of(p->ws->x, p->ws->concat, &mtp->eh_proj, n);
    dsv3i_mtp_concat(p->ctx, p->model, mtp, p->batch->token, p->hidden, n, p->ws);
    p->ctx->ops->linear(p->ctx, &product, 1, p->ws->scratch);
}

DSV3_API dsv3_result dsv3_mtp_forward(const dsv3_context *context, float *logits, const dsv3_model *model, size_t k,
                                      dsv3_cache *caches, size_t n_caches, const dsv3_batch *batch,
                                      const float *hidden, dsv3_workspace *workspace, dsv3_error *error) {
    dsv3i_workspace ws;
    const dsv3i_run p = {context, model, k, caches, n_caches, batch, hidden, logits, &ws, error, NULL, NULL, NULL};
    DSV3I_NEED(1, model);
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "k", "is not a module of this model", (int64_t)k, 1, model->n_mtp));
    DSV3I_TRY(dsv3i_workspace_open(&ws, workspace, context, model, error));
    DSV3I_TRY(dsv3i_forward(&p));
    workspace->hidden = ws.hidden;
    return DSV3_OK;
}

/* ---- The training form: all depths over whole sequences */

typedef struct dsv3i_evaluation {
    dsv3_losses *losses;
    const dsv3_text *text;
    dsv3_cache *modules; /* [depths, n_caches] */
    struct dsv3i_depth *depth; /* [1 + depths] training, with what is done behind the loss of depth k; else NULL */
    void (*behind)(const struct dsv3i_evaluation *a, size_t k, dsv3i_loss *loss);
    const void *user;
} dsv3i_evaluation;

/* The rows of one depth. */
typedef struct dsv3i_depth {
    size_t n, *from; /* [n] the row of the depth before that has the same position */
    float *du;       /* [n, d] the gradient of u */
    dsv3i_workspace ws;
} dsv3i_depth;

static int32_t dsv3i_text_sequence(const dsv3_text *x, size_t r) { return x->sequence != NULL ? x->sequence[r] : 0; }

/* Does the row begin a sequence, or a document that is apart? */
static int dsv3i_text_begins(const dsv3_text *x, size_t row) {
    return row == 0 || dsv3i_text_sequence(x, row) != dsv3i_text_sequence(x, row - 1) ||
           (x->apart && x->document != NULL && x->document[row] != x->document[row - 1]);
}

/* Is row + k in the sequence of row? */
static int dsv3i_text_continues(const dsv3_text *x, size_t row, size_t k) {
    if (k >= x->rows - row) return 0;
    while (k > 0 && !dsv3i_text_begins(x, row + k)) k--;
    return k == 0;
}

/* Is the row one of depth k (0: the main model) that counts: row + k in the same document, and neither padding? */
static int dsv3i_text_counts(const dsv3_text *x, size_t row, size_t k) {
    return dsv3i_text_continues(x, row, k) && (x->document == NULL || x->document[row] == x->document[row + k]) &&
           dsv3i_counts(x->mask, row) && dsv3i_counts(x->mask, row + k);
}

/* t_{i+k+1} as the target of row i at depth k, or DSV3_IGNORE. */
static int32_t dsv3i_text_target(const dsv3_text *x, size_t row, size_t k) {
    if (!dsv3i_text_counts(x, row, k)) return DSV3_IGNORE;
    if (x->target != NULL) return x->target[row + k];
    return dsv3i_text_counts(x, row, k + 1) ? x->token[row + k + 1] : DSV3_IGNORE;
}

/* Sequences that have a row which counts. */
static uint64_t dsv3i_text_sequences(const dsv3_text *x) {
    uint64_t sequences = 0;
    int found = 0; /* in this sequence, so far */
    for (size_t r = 0; r < x->rows; r++) {
        int first = !found && dsv3i_counts(x->mask, r);
        sequences += (uint64_t)first;
        found = (found || first) && dsv3i_text_continues(x, r, 1);
    }
    return sequences;
}

/* How many sequences a balance loss stands for: one, or (seq_aux false) all. */
static double dsv3i_text_stands(const dsv3_text *x, const dsv3_config *c) {
    return c->seq_aux ? 1.0 : (double)dsv3i_text_sequences(x);
}

static dsv3_result dsv3i_text_check(const dsv3_text *x, int32_t V, dsv3_error *error) {
    if (x->rows < 1) return dsv3i_fail(error, DSV3_ERR_ARG, "rows", "the text is empty");
    for (size_t r = 0; r < x->rows; r++) {
        int32_t target = x->target != NULL ? x->target[r] : DSV3_IGNORE;
        DSV3I_TRY(dsv3i_check_token(error, "token", r, V, x->token[r]));
        if (r > 0 && dsv3i_text_sequence(x, r) < dsv3i_text_sequence(x, r - 1)) {
            return dsv3i_fail_row(error, DSV3_ERR_ARG, "sequence", r, "is below that of the row before", x->sequence[r - 1],
                                  x->sequence[r - 1], x->sequence[r]);
        }
        if (target != DSV3_IGNORE) DSV3I_TRY(dsv3i_check_token(error, "target", r, V, target));
    }
    return DSV3_OK;
}

typedef struct dsv3i_balance_loop {
    const dsv3i_call *c;
    const dsv3_losses *sums;
    double stands; /* for so many sequences */
    int loss;
} dsv3i_balance_loop;

/* A balance loss of the rows, which are whole sequences; 0 for rows that begin none. */
static void dsv3i_evaluate_balance_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_balance_loop *a = (const dsv3i_balance_loop *)arg;
    const dsv3i_workspace *ws = a->c->ws;
    for (size_t t = begin; t < end; t++) {
        dsv3_routing r = dsv3i_balance_rows(a->c, t, ws->score, ws->idx);
        if (a->loss == DSV3I_LOSS_EXPERT && !a->sums->actual) r.idx = NULL;
        r.devices = a->sums->devices;
        r.most_devices = a->sums->most_devices;
        ws->sequence_loss[t] = a->stands * dsv3i_balance_loss(&r, a->loss, ws->balance + worker * 2 * r.experts);
    }
}

/* Adds a layer's loads and balance losses to the sums. */
static void dsv3i_evaluate_layer(const dsv3i_evaluation *a, dsv3i_call *c) {
    const dsv3_losses *sums = a->losses;
    const dsv3i_workspace *ws = c->ws;
    size_t layer = (size_t)c->w->index;
    double *const sum[] = {sums->balance, sums->device, sums->communication};
    if (sums->load != NULL) dsv3i_load_count(sums->load + layer * c->m.E, ws->idx, ws->row_mask, c->n, c->m.K);
    for (int loss = DSV3I_LOSS_EXPERT; loss <= DSV3I_LOSS_COMMUNICATION; loss++) {
        dsv3i_balance_loop loop = {c, sums, dsv3i_text_stands(a->text, &c->model->config), loss};
        if (sum[loss] == NULL || (loss > DSV3I_LOSS_EXPERT && sums->devices == 0)) continue;
        dsv3i_loop(c->ctx, c->n, 16 * c->m.E, dsv3i_evaluate_balance_task, &loop);
        for (size_t t = 0; t < c->n; t++) sum[loss][layer] += ws->sequence_loss[t];
    }
}

/* Adds the loss of the rows in ws->u to the sums. ws->y (d >= 1) and ws->row_output are free: nobody has asked for logits. */
static dsv3_result dsv3i_evaluate_nll(const dsv3i_evaluation *a, const dsv3i_run *p) {
    dsv3i_workspace *ws = p->ws;
    int32_t *target = ws->row_output;
    float *nll = ws->y;
    const dsv3_tensor *head = dsv3i_stack_of(p->model, p->k).head;
    dsv3i_loss loss = dsv3i_loss_of(p->ctx, ws->u, head, target, p->batch->rows, ws->loss, ws->scratch);
    for (size_t i = 0; i < loss.n; i++) target[i] = dsv3i_text_target(a->text, ws->row_index[i], p->k);
    dsv3i_cross_entropy(&loss, nll);
    for (size_t i = 0; i < loss.n; i++) {
        if (!dsv3i_is_finite(nll[i])) {
            return dsv3i_fail_where(p->error, DSV3_ERR_NAN, "loss", "is not finite, of row", (int64_t)ws->row_index[i]);
        }
        a->losses->nll[p->k] += (double)nll[i];
        a->losses->targets[p->k] += target[i] != DSV3_IGNORE;
    }
    if (a->behind != NULL) a->behind(a, p->k, &loss);
    return DSV3_OK;
}

/* Of the n rows that `from` has of depth k - 1 (at first: of the text), with their states in from->hidden, keeps
 * those that depth k has. ws may be `from`. */
static size_t dsv3i_evaluate_gather(const dsv3_text *x, size_t k, dsv3i_workspace *ws, const dsv3i_workspace *from,
                                    size_t n, size_t d) {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        size_t row = from->row_index[i];
        if (!dsv3i_text_continues(x, row, k)) continue;
        ws->row_index[kept] = row;
        ws->row_token[kept] = x->token[row + k];
        ws->row_sequence[kept] = dsv3i_text_sequence(x, row);
        ws->row_mask[kept] = (uint8_t)dsv3i_text_counts(x, row, k);
        if (k > 0) DSV3_MEMCPY(ws->row_hidden + kept * d, from->hidden + i * d, d * sizeof(float));
        kept++;
    }
    return kept;
}

/* Documents apart are sequences of their own: with numbers of their own, and views of their sequence's cache, each from the
 * place of its first row on. For rows gathered from row `begin` on; what is before it is there already. */
static dsv3_result dsv3i_evaluate_apart(const dsv3_text *x, dsv3i_run *p, size_t begin) {
    dsv3i_workspace *ws = p->ws;
    size_t views = 0, start = 0, first = 0;
    for (size_t i = 0; i < p->batch->rows; i++) {
        size_t row = ws->row_index[i], s = (size_t)ws->row_sequence[i];
        DSV3I_TRY(dsv3i_check_element(p->error, DSV3_ERR_ARG, "sequence", row, "is not one of the caches",
                                      (int64_t)p->n_caches, ws->row_sequence[i]));
        if (i == 0 || !dsv3i_text_continues(x, ws->row_index[i - 1], row - ws->row_index[i - 1])) {
            for (first = row; !dsv3i_text_begins(x, first);) first--;
            for (start = first; start > 0 && (size_t)dsv3i_text_sequence(x, start - 1) == s;) start--;
            ws->views[views] = p->caches[s];
            ws->views[views].data = dsv3i_cache_at(&p->caches[s], 0, first - start);
            ws->views[views++].length = dsv3i_sub(begin, first);
        }
        ws->row_sequence[i] = (int32_t)views - 1;
        DSV3I_TRY(dsv3i_check_element(p->error, DSV3_ERR_FULL, "position", row, "is beyond the cache",
                                      (int64_t)ws->views[views - 1].capacity, (int64_t)(row - start)));
    }
    p->caches = ws->views;
    p->n_caches = views;
    return DSV3_OK;
}

/* Rows [begin, begin + n) of the text through the main model and every depth. In training all depths have the same
 * caches, one after the other. */
DSV3I_APART dsv3_result dsv3i_evaluate_rows(const dsv3i_evaluation *a, dsv3i_run p, size_t begin, size_t n) {
    size_t d = (size_t)p.model->config.hidden_size;
    dsv3i_run run;
    for (size_t i = 0; i < n; i++) p.ws->row_index[i] = begin + i;
    for (p.k = 0; p.k <= a->losses->depths; p.k++) {
        const dsv3i_workspace *from = p.ws;
        dsv3_batch batch = {0, NULL, NULL, NULL, 0, NULL};
        if (a->depth != NULL) p.ws = &a->depth[p.k].ws;
        n = batch.rows = dsv3i_evaluate_gather(a->text, p.k, p.ws, from, n, d);
        if (n == 0) return DSV3_OK;
        batch.token = p.ws->row_token;
        batch.sequence = p.ws->row_sequence;
        for (size_t s = 0; s < p.n_caches && a->depth != NULL; s++) p.caches[s].length = 0;
        if (p.k > 0 && a->depth == NULL) p.caches = a->modules + (p.k - 1) * p.n_caches;
        p.batch = &batch;
        run = p;
        if (a->text->apart) DSV3I_TRY(dsv3i_evaluate_apart(a->text, &run, begin));
        DSV3I_TRY(dsv3i_forward(&run));
        DSV3I_TRY(dsv3i_evaluate_nll(a, &run));
    }
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_evaluate(const dsv3_context *context, dsv3_losses *losses, const dsv3_model *model,
                                   dsv3_cache *caches, dsv3_cache *modules, size_t n_caches, const dsv3_text *text,
                                   dsv3_workspace *workspace, dsv3_error *error) {
    const dsv3i_evaluation a = {losses, text, modules, NULL, NULL, NULL};
    dsv3i_workspace ws;
    dsv3i_run p = {context, model, 0, caches, n_caches, NULL, NULL, NULL, &ws, error, &a, dsv3i_evaluate_layer, NULL};
    DSV3I_TRY(dsv3i_workspace_open(&ws, workspace, context, model, error));
    DSV3I_NEED(1, losses); DSV3I_NEED(1, caches); DSV3I_NEED(1, text); DSV3I_NEED(1, text->token);
    DSV3I_NEED(1, losses->nll); DSV3I_NEED(1, losses->targets); DSV3I_NEED(losses->depths, modules);
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "depths", "is more than the model has modules",
                                  (int64_t)losses->depths, 0, model->n_mtp));
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_MEMORY, "rows", "the balance loss needs the text in one piece",
                                  losses->balance != NULL || losses->devices > 0 ? (int64_t)text->rows : 0, 0, (int64_t)ws.rows));
    if (losses->devices > 0) {
        DSV3I_TRY(dsv3i_check_devices((size_t)model->config.n_routed_experts, losses->devices, losses->most_devices, error));
    }
    DSV3I_TRY(dsv3i_text_check(text, model->config.vocab_size, error));
    if (n_caches < 1) return dsv3i_fail(error, DSV3_ERR_ARG, "n_caches", "is 0: every sequence needs a cache");
    for (size_t m = 0; m < n_caches * losses->depths; m++) {
        if (!dsv3i_cache_overlap(&modules[m], &caches[m % n_caches])) continue;
        return dsv3i_fail_at(error, m, dsv3i_fail(error, DSV3_ERR_ARG, "modules", "lies over the memory of caches"));
    }
    for (size_t s = 0; s < n_caches; s++) caches[s].length = 0;
    for (size_t s = 0; s < n_caches * losses->depths; s++) modules[s].length = 0;
    p.hidden = ws.row_hidden;
    for (size_t begin = 0; begin < text->rows; begin += ws.rows) {
        size_t n = dsv3i_min(ws.rows, text->rows - begin);
        DSV3I_TRY(dsv3i_evaluate_rows(&a, p, begin, n));
    }
    losses->sequences += dsv3i_text_sequences(text);
    return dsv3i_ok(error);
}

/* What the mean loss of depth k is multiplied by. */
static double dsv3i_depth_weight(size_t k, size_t D, double lambda) { return k == 0 ? 1.0 : lambda / (double)D; }

/* L of the chapter's head, or what the sums have of a step with targets [1 + D] and sequences. weighted: each term has
 * its weight from the start, and is (w / N) nll, not (w nll) / N. */
static double dsv3i_loss_total(const dsv3_losses *sums, const uint64_t *targets, uint64_t sequences, size_t layers,
                               double lambda, const double *alpha, dsv3_mtp_divisor divisor, int weighted) {
    const double *const sum[] = {sums->balance, sums->device, sums->communication};
    double total = 0.0;
    for (size_t k = 0; k <= sums->depths; k++) {
        double w = dsv3i_depth_weight(k, sums->depths, lambda), nll = sums->nll[k];
        uint64_t N = targets[divisor == DSV3_DIVIDE_BY_VALID ? k : 0];
        if (sums->targets[k] > 0 && N > 0) total += weighted ? w / (double)N * nll : w * nll / (double)N;
    }
    for (size_t j = 0; j < DSV3I_COUNT(sum) && sequences > 0; j++) { /* weights alpha [3] */
        for (size_t i = 0; sum[j] != NULL && i < layers; i++) total += alpha[j] * sum[j][i] / (double)sequences;
    }
    return total;
}

DSV3_API double dsv3_losses_total(const dsv3_losses *losses, size_t layers, double lambda, double alpha,
                                  dsv3_mtp_divisor divisor) {
    const double weight[3] = {alpha, 0.0, 0.0};
    return dsv3i_loss_total(losses, losses->targets, losses->sequences, layers, lambda, weight, divisor, 0);
}

/* ========================================================================================================
 * Chapter 13  >>infer
 *
 * Sampling, and generation with drafts ([R] 5.4.3). A step of plain decoding reads every active weight to write one
 * token. The MTP modules are cheap guesses at the tokens behind it: the main model then checks all of them in one
 * call, whose rows share the reading, and every guess that it agrees with is a token for which no step is needed.
 *
 *     text:      t_0 .. t_{N-1}   in the caches;   t_N  known, not yet in them
 *     draft:     module k at position N-1 gets (h^{k-1}, draft k-1) and guesses t_{N+k}            k = 1 .. drafts
 *     verify:    one call of the main model with the rows t_N, draft 1, draft 2 ..
 *     accept:    drafts as long as they stand; behind them one token of the main model's own
 *     roll back: all caches to the rows that read only what stands
 *
 * Nothing is lost: each row of a call has the bits it would have alone (front page, >>conventions), so greedy text is
 * that of plain decoding; sampled text has its distribution (below, at "Verifying"). The modules' caches must hold
 * every position, prompts too: module k reads position i as soon as t_{i+k} is known, or later, before the rings that
 * keep the states for it come round. A caller who steers does so on every row, before it is sampled from or verified:
 * p and q below are what she made of them. All that may fail, she included, comes before a sequence is changed.
 * Test: tests/test_sample.c, tests/test_generate.c, tests/test_steer.c.
 * ==================================================================================================== */

/* ---- Sampling. Sums are doubles: the many improbable tokens of a large vocabulary, added one by one to a float
 * near 1, would vanish together. */

/* Falling probability, then rising id. */
static int dsv3i_before(dsv3_candidate a, dsv3_candidate b) { return a.p > b.p || (a.p >= b.p && a.token < b.token); }

/* Restores the heap order below i: no candidate stands above one that comes before it. */
static void dsv3i_heap_sink(dsv3_candidate *c, size_t n, size_t i) {
    while (2 * i + 1 < n) {
        size_t child = 2 * i + 1;
        dsv3_candidate moved = c[i];
        if (child + 1 < n && dsv3i_before(c[child + 1], c[child])) child++;
        if (!dsv3i_before(c[child], moved)) return;
        c[i] = c[child];
        c[child] = moved;
        i = child;
    }
}

/* Moves the most probable candidates to the end of c [n], best last, until their sum reaches `enough`. Returns
 * how many; *sum is their sum. A heap, because usually a few of many are needed. */
static size_t dsv3i_nucleus(dsv3_candidate *c, size_t n, double enough, double *sum) {
    size_t left = n;
    for (size_t i = n / 2; i > 0; i--) dsv3i_heap_sink(c, n, i - 1);
    *sum = 0.0;
    while (left > 0) {
        dsv3_candidate best = c[0];
        c[0] = c[--left];
        c[left] = best;
        *sum += (double)best.p;
        if (*sum >= enough) break;
        dsv3i_heap_sink(c, left, 0);
    }
    return n - left;
}

/* The candidate at which the running sum of c [n] passes u. Rounding may leave u unpassed: then the last one with
 * a chance at all. */
static int32_t dsv3i_pick(const dsv3_candidate *c, size_t n, double u) {
    int32_t token = c[0].token;
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        if (!(c[i].p > 0.0f)) continue;
        token = c[i].token;
        sum += (double)c[i].p;
        if (sum > u) break;
    }
    return token;
}

/* Index of the largest logit, ties to the lower one; V when there is a NaN or no finite maximum. */
static size_t dsv3i_argmax(const float *logits, size_t V) {
    size_t best = 0;
    for (size_t i = 0; i < V; i++) {
        if (dsv3i_is_nan(logits[i])) return V;
        if (logits[i] > logits[best]) best = i;
    }
    return dsv3i_is_finite(logits[best]) ? best : V;
}

/* The tokens that may be drawn stand, with exp((logit - best) / temperature), in the last places of c [V]. Returns
 * how many; *sum is their sum. */
static size_t dsv3i_candidates(dsv3_candidate *c, const float *logits, size_t best, size_t V, float temperature,
                               float top_p, double *sum) {
    *sum = 0.0;
    for (size_t i = 0; i < V; i++) {
        c[i].p = DSV3_EXPF((logits[i] - logits[best]) / temperature);
        c[i].token = (int32_t)i;
        *sum += (double)c[i].p;
    }
    return top_p < 1.0f ? dsv3i_nucleus(c, V, (double)top_p * *sum, sum) : V;
}

/* What is wrong with them, or NULL. */
static const char *dsv3i_sampling_fault(float temperature, float top_p) {
    if (!(temperature >= 0.0f) || temperature > FLT_MAX) return "temperature is negative or not finite";
    return !(top_p >= 0.0f) || top_p > 1.0f ? "top_p is not between 0 and 1" : NULL;
}

static int dsv3i_is_greedy(float temperature, float top_p) { return !(temperature > 0.0f) || !(top_p > 0.0f); }

/* Minus infinity: the logit of what is forbidden. */
static float dsv3i_never(void) {
    float lowest = -FLT_MAX;
    return 2.0f * lowest;
}

/* Draws from those tokens; not greedy. */
static int32_t dsv3i_draw(dsv3_candidate *c, const float *logits, size_t best, size_t V, float temperature, float top_p,
                          dsv3_rng *rng) {
    double sum;
    size_t kept = dsv3i_candidates(c, logits, best, V, temperature, top_p, &sum);
    return dsv3i_pick(c + (V - kept), kept, dsv3i_uniform(rng) * sum);
}

/* Is there a row of logits [V]? */
static dsv3_result dsv3i_vocab_check(const float *logits, size_t V, dsv3_error *error) {
    if (logits == NULL) return dsv3i_fail_null(error, "logits");
    return dsv3i_check_between(error, DSV3_ERR_ARG, "vocab_size", "is out of range", (int64_t)V, 1, DSV3_MAX_VOCAB);
}

static dsv3_result dsv3i_sample_check(size_t *best, const float *logits, size_t V, float temperature, float top_p,
                                      dsv3_error *error) {
    const char *fault = dsv3i_sampling_fault(temperature, top_p);
    DSV3I_TRY(dsv3i_vocab_check(logits, V, error));
    if (fault != NULL) return dsv3i_fail(error, DSV3_ERR_ARG, "sampler", fault);
    *best = dsv3i_argmax(logits, V);
    return *best < V ? DSV3_OK : dsv3i_fail(error, DSV3_ERR_NAN, "logits", "have a NaN, or no finite maximum");
}

DSV3_API dsv3_result dsv3_sample(int32_t *token, const float *logits, size_t V, float temperature, float top_p,
                                 dsv3_rng *rng, dsv3_candidate *candidates, dsv3_error *error) {
    size_t best = 0;
    if (token == NULL) return dsv3i_fail_null(error, "token");
    DSV3I_TRY(dsv3i_sample_check(&best, logits, V, temperature, top_p, error));
    if (dsv3i_is_greedy(temperature, top_p)) {
        *token = (int32_t)best;
        return dsv3i_ok(error);
    }
    DSV3I_NEED(1, rng); DSV3I_NEED(1, candidates);
    *token = dsv3i_draw(candidates, logits, best, V, temperature, top_p, rng);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_sample_log_p(double *log_p, double *entropy, int32_t token, const float *logits, size_t V,
                                       float temperature, float top_p, dsv3_candidate *candidates, dsv3_error *error) {
    size_t best = 0, kept = 0;
    double sum = 1.0, moment = 0.0, log_sum;
    if (log_p == NULL) return dsv3i_fail_null(error, "log_p");
    DSV3I_TRY(dsv3i_sample_check(&best, logits, V, temperature, top_p, error));
    DSV3I_TRY(dsv3i_check_token(error, "token", 0, (int32_t)V, token));
    DSV3I_NEED(!dsv3i_is_greedy(temperature, top_p), candidates);
    *log_p = (size_t)token == best ? 0.0 : (double)dsv3i_never();
    if (!dsv3i_is_greedy(temperature, top_p)) {
        kept = dsv3i_candidates(candidates, logits, best, V, temperature, top_p, &sum);
    }
    log_sum = DSV3_LOG(sum);
    for (size_t i = V - kept; i < V; i++) {
        double x = (double)((logits[candidates[i].token] - logits[best]) / temperature);
        if (candidates[i].p > 0.0f) moment += (double)candidates[i].p * x;
        if (candidates[i].token == token && candidates[i].p > 0.0f) *log_p = x - log_sum;
    }
    if (entropy != NULL) *entropy = log_sum - moment / sum;
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_log_p(double *log_p, const float *logits, const int32_t *token, size_t n, size_t V, dsv3_error *error) {
    DSV3I_NEED(1, log_p); DSV3I_NEED(1, token);
    DSV3I_TRY(dsv3i_vocab_check(logits, V, error));
    for (size_t t = 0; t < n; t++) {
        if (token[t] != DSV3_IGNORE) DSV3I_TRY(dsv3i_check_token(error, "token", t, (int32_t)V, token[t]));
    }
    for (size_t t = 0; t < n; t++, logits += V) {
        size_t best = 0;
        double sum = 0.0;
        DSV3I_TRY(dsv3i_sample_check(&best, logits, V, 0.0f, 1.0f, error));
        log_p[t] = 0.0;
        if (token[t] == DSV3_IGNORE) continue;
        for (size_t i = 0; i < V; i++) sum += (double)DSV3_EXPF(logits[i] - logits[best]);
        log_p[t] = ((double)logits[token[t]] - (double)logits[best]) - DSV3_LOG(sum);
    }
    return dsv3i_ok(error);
}

/* ---- A sequence: caches, the text, and rings of the last `window` positions. hidden of depth j holds h_i^j, the states that
 * module j + 1 reads, until that module has been at position i. */

#define DSV3I_RATE 0.8f /* of drafts, before anything is known */

/* What a sequence keeps to itself, in its memory. */
#define DSV3I_DRAFTER(X)                                                                                             \
    X(0, float, hidden, states, d) X(0, float, rate, drafts, one)                                                    \
    X(1, size_t, lengths, modules, one) X(1, float, p, drafting, V) X(1, float, q, drafts, V)                        \
    X(1, dsv3_candidate, candidates, V, one)
typedef struct dsv3i_sequence {
    uint64_t made_for;
    size_t d, window, top;     /* rings of `window` positions; the end of what was ever written */
    size_t planned, step_rows; /* drafts of the step under way, and its rows */
    size_t agreed;             /* drafts that stand */
    dsv3_rng rng_before;       /* in case the step fails; likewise lengths, of the modules' caches */
    DSV3I_DRAFTER(DSV3I_WORKSPACE_MEMBER)
} dsv3i_sequence;

static dsv3_result dsv3i_sequence_check(const dsv3_sequence *s, const char *name, dsv3_error *error) {
    if (s == NULL) return dsv3i_fail_null(error, name);
    return s->own != NULL ? DSV3_OK : dsv3i_fail(error, DSV3_ERR_ARG, name, "was not made by dsv3_sequence_init");
}

/* h_position^depth [d] */
static float *dsv3i_hidden(const dsv3_sequence *s, size_t depth, size_t position) {
    return s->own->hidden + (depth * s->own->window + position % s->own->window) * s->own->d;
}

DSV3_API size_t dsv3_sequence_length(const dsv3_sequence *s) { return s->cache.length + (s->pending != 0); }

DSV3_API dsv3_state dsv3_sequence_state(const dsv3_sequence *s) {
    if (s->prompt_left > 0) return DSV3_STATE_READING;
    if (!s->pending) return DSV3_STATE_EMPTY;
    if (s->stopped) return DSV3_STATE_STOPPED;
    if (dsv3_sequence_length(s) >= s->limit) return DSV3_STATE_LIMIT;
    return s->cache.length < s->cache.capacity ? DSV3_STATE_WRITING : DSV3_STATE_FULL;
}

DSV3_API dsv3_result dsv3_sequence_append(const dsv3_model *model, dsv3_sequence *s, const int32_t *token, size_t n,
                                          dsv3_error *error) {
    size_t room;
    DSV3I_TRY(dsv3i_sequence_check(s, "sequence", error));
    DSV3I_NEED(1, model); DSV3I_NEED(1, token);
    if (n < 1) return dsv3i_fail(error, DSV3_ERR_ARG, "n", "is 0");
    if (s->prompt_left > 0) return dsv3i_fail(error, DSV3_ERR_ARG, "sequence", "has an earlier prompt that is not yet read");
    room = dsv3i_sub(s->cache.capacity, dsv3_sequence_length(s));
    if (n > room) {
        return dsv3i_fail_range(error, DSV3_ERR_FULL, "n", "is more than the caches have room for", 0, (int64_t)room, (int64_t)n);
    }
    for (size_t i = 0; i < n; i++) DSV3I_TRY(dsv3i_check_token(error, "token", i, model->config.vocab_size, token[i]));
    s->prompt = token;
    s->prompt_left = n;
    return dsv3i_ok(error);
}

/* All modules forget positions >= end, and those at which they read tokens from t_length on (module k: t_{i+k}). */
static void dsv3i_modules_keep(dsv3_sequence *s, size_t end, size_t length) {
    for (size_t k = 1; k <= s->n_modules; k++) {
        dsv3_cache *cache = &s->modules[k - 1];
        cache->length = dsv3i_min(cache->length, dsv3i_min(end, dsv3i_sub(length, k)));
    }
}

DSV3_API dsv3_result dsv3_sequence_truncate(dsv3_sequence *s, size_t length, size_t *kept, dsv3_error *error) {
    size_t oldest = length, begin;
    int ahead = 0; /* a module knows tokens that were to be appended again: perhaps they will not be */
    DSV3I_TRY(dsv3i_sequence_check(s, "sequence", error));
    if (length > dsv3_sequence_length(s)) {
        return dsv3i_fail_range(error, DSV3_ERR_ARG, "length", "is more than the text has", 0,
                                (int64_t)dsv3_sequence_length(s), (int64_t)length);
    }
    s->prompt_left = 0;
    if (length < dsv3_sequence_length(s)) s->stopped = 0;
    if (kept != NULL) *kept = length;
    for (size_t k = 1; k <= s->n_modules; k++) {
        size_t known = s->modules[k - 1].length;
        ahead |= known > dsv3i_sub(length, k);
        oldest = dsv3i_min(oldest, dsv3i_min(known, dsv3i_sub(length, dsv3i_max(k, 2)))); /* to be read again */
    }
    if (length == dsv3_sequence_length(s) && !ahead && (length == 0 || s->pending)) return dsv3i_ok(error);
    begin = s->n_modules > 0 ? dsv3i_sub(s->own->top, s->own->window) : 0; /* of what the rings still hold */
    if (length == 0 || oldest >= begin) {
        s->pending = length > 0;
        s->cache.length = length - (length > 0);
        dsv3i_modules_keep(s, SIZE_MAX, length);
        if (length == 0) s->own->top = 0;
        return dsv3i_ok(error);
    }
    s->pending = s->stopped = 0;
    s->cache.length = dsv3i_sub(length, s->n_modules);
    dsv3i_modules_keep(s, s->cache.length, SIZE_MAX);
    s->own->top = s->cache.length + s->own->window; /* from here on the rings are filled anew */
    if (kept != NULL) *kept = s->cache.length;
    return dsv3i_ok(error);
}

/* ---- Rows of several sequences, gathered for one call */

typedef struct dsv3i_step {
    const dsv3_context *ctx;
    float *logits;
    const dsv3_model *model;
    dsv3_sequence *const *sequences;
    size_t n; /* sequences */
    dsv3i_workspace *ws;
    dsv3_error *error;
    dsv3_batch batch; /* the rows gathered so far */
} dsv3i_step;

static void dsv3i_gather_begin(dsv3i_step *a) {
    const dsv3_batch empty = {0, a->ws->row_token, a->ws->row_sequence, NULL, 0, a->ws->row_output};
    a->batch = empty;
}

/* The next row: token at `position` of sequence s. */
static void dsv3i_gather_row(dsv3i_step *a, size_t s, int32_t token, size_t position, int output) {
    size_t row = a->batch.rows++;
    a->ws->row_token[row] = token;
    a->ws->row_sequence[row] = (int32_t)s;
    a->ws->row_index[row] = position;
    if (output) a->ws->row_output[a->batch.outputs++] = (int32_t)row;
}

/* The rows gathered, through the main model (k = 0) or module k. */
static dsv3_result dsv3i_gather_run(const dsv3i_step *a, size_t k) {
    const dsv3i_run p = {a->ctx, a->model, k, a->ws->views, a->n, &a->batch, a->ws->row_hidden, a->logits, a->ws,
                         a->error, NULL, NULL, NULL};
    return dsv3i_forward(&p);
}

/* Stores the states of the call just made as h^depth. */
static void dsv3i_gather_keep(const dsv3i_step *a, size_t depth) {
    for (size_t r = 0; r < a->batch.rows; r++) {
        const dsv3_sequence *s = a->sequences[a->ws->row_sequence[r]];
        if (depth >= s->n_modules) continue;
        DSV3_MEMCPY(dsv3i_hidden(s, depth, a->ws->row_index[r]), a->ws->hidden + r * s->own->d, s->own->d * sizeof(float));
    }
}

/* ---- Drafting. With N = cache.length, the text's last token t_N is pending, and h_i^0 is known for i < N. Module k
 * reads t_{i+k}; its row i = N - 1 needs draft k - 1 and gives draft k, which stands at position N + k. Draft j > D comes from
 * the last module once more, one position further on, with its own output as the state it would get from the module before. */

/* The distribution of the next token: p [V], and as candidates of the sequence, of which the place of the first is
 * returned and *sum is the sum. */
static size_t dsv3i_distribution(dsv3_sequence *s, float *p, const float *logits, size_t best, size_t V, double *sum) {
    size_t first = V - dsv3i_candidates(s->own->candidates, logits, best, V, s->temperature, s->top_p, sum);
    DSV3_MEMSET(p, 0, V * sizeof *p);
    for (size_t i = first; i < V; i++) p[s->own->candidates[i].token] = (float)((double)s->own->candidates[i].p / *sum);
    return first;
}

static dsv3_result dsv3i_steer_fail(const dsv3i_step *a, size_t i, dsv3_result code, const char *why) {
    return dsv3i_fail_at(a->error, i, dsv3i_fail(a->error, code, "steer", why));
}

/* Lets the caller change the logits of what follows the first `length` tokens of sequence i. *best: the most probable
 * token then, V if none is left. */
static dsv3_result dsv3i_steer(const dsv3i_step *a, size_t i, float *logits, size_t length, size_t *best) {
    const dsv3_sequence *s = a->sequences[i];
    size_t V = (size_t)a->model->config.vocab_size;
    if (s->steer != NULL) {
        dsv3_result result = s->steer(s->steer_user, logits, V, s->history, length, i);
        if (result != DSV3_OK) return dsv3i_steer_fail(a, i, result, "ended the step");
    }
    *best = dsv3i_argmax(logits, V); /* without steering, logits were found finite */
    return DSV3_OK;
}

static int dsv3i_stops(const dsv3_sequence *s, int32_t token) {
    for (size_t i = 0; i < s->n_stops; i++) {
        if (s->stops[i] == token) return 1;
    }
    return token == s->stop;
}

/* Draft j of sequence i, and the distribution that it is drawn from. If no token is left, or none may follow, the plan
 * is cut. */
static dsv3_result dsv3i_draft_token(const dsv3i_step *a, size_t i, size_t j, float *logits) {
    dsv3_sequence *s = a->sequences[i];
    size_t V = (size_t)a->model->config.vocab_size, length = s->cache.length + j, best, first;
    int32_t *token = s->history + length;
    double sum;
    DSV3I_TRY(dsv3i_steer(a, i, logits, length, &best));
    if (best == V) {
        s->own->planned = j - 1;
        return DSV3_OK;
    }
    *token = (int32_t)best;
    if (!dsv3i_is_greedy(s->temperature, s->top_p)) {
        first = dsv3i_distribution(s, s->own->q + (j - 1) * V, logits, best, V, &sum);
        *token = dsv3i_pick(s->own->candidates + first, V - first, dsv3i_uniform(&s->rng) * sum);
    }
    if (dsv3i_stops(s, *token)) s->own->planned = j;
    return DSV3_OK;
}

/* One call of module k with the rows gathered. Output rows give draft j (0: none are wanted). */
static dsv3_result dsv3i_module_call(dsv3i_step *a, size_t k, size_t j) {
    size_t d = (size_t)a->model->config.hidden_size, V = (size_t)a->model->config.vocab_size;
    dsv3i_workspace *ws = a->ws;
    for (size_t r = 0; r < a->batch.rows; r++) {
        dsv3_sequence *s = a->sequences[ws->row_sequence[r]];
        DSV3_MEMCPY(ws->row_hidden + r * d, dsv3i_hidden(s, k - 1, ws->row_index[r]), d * sizeof(float));
    }
    for (size_t i = 0; i < a->n; i++) {
        const dsv3_sequence *s = a->sequences[i];
        ws->views[i] = k <= s->n_modules ? s->modules[k - 1] : s->cache; /* one without it has no rows here */
        ws->views[i].layers = 1;
    }
    DSV3I_TRY(dsv3i_gather_run(a, k));
    for (size_t i = 0; i < a->n; i++) {
        if (k <= a->sequences[i]->n_modules) a->sequences[i]->modules[k - 1].length = ws->views[i].length;
    }
    dsv3i_gather_keep(a, k);
    for (size_t i = 0; i < a->batch.outputs; i++) {
        size_t row = (size_t)ws->row_output[i];
        dsv3_sequence *s = a->sequences[ws->row_sequence[row]];
        DSV3I_TRY(dsv3i_draft_token(a, (size_t)ws->row_sequence[row], j, a->logits + i * V));
        if (k == s->n_modules && j < s->own->planned) { /* as if from the module before, should it be used once more */
            DSV3_MEMCPY(dsv3i_hidden(s, k - 1, ws->row_index[row] + 1), ws->hidden + row * d, d * sizeof(float));
        }
    }
    dsv3i_gather_begin(a);
    return DSV3_OK;
}

/* Module k of sequence i reads on to position end. */
static dsv3_result dsv3i_module_read(dsv3i_step *a, size_t i, size_t k, size_t end, size_t j) {
    dsv3_sequence *s = a->sequences[i];
    size_t *length = &s->modules[k - 1].length;
    if (j > 0) *length = dsv3i_min(*length, end - 1); /* it comes out there, even if that row was read before */
    for (size_t position = *length; position < end; position++) {
        int output = j > 0 && position + 1 == end;
        dsv3i_gather_row(a, i, s->history[position + k], position, output);
        if (a->batch.rows == a->ws->rows) DSV3I_TRY(dsv3i_module_call(a, k, j));
    }
    return DSV3_OK;
}

static dsv3_result dsv3i_draft(dsv3i_step *a) {
    for (size_t j = 1; j <= DSV3_MAX_DRAFTS; j++) {
        for (size_t k = 1; k <= j; k++) {
            for (size_t i = 0; i < a->n; i++) {
                const dsv3_sequence *s = a->sequences[i];
                size_t N = s->cache.length;
                if (s->own->planned < j || dsv3i_min(j, s->n_modules) != k) continue;
                DSV3I_TRY(dsv3i_module_read(a, i, k, N + j - k, j));
            }
            if (a->batch.rows > 0) DSV3I_TRY(dsv3i_module_call(a, k, j));
        }
    }
    for (size_t i = 0; i < a->n; i++) {
        dsv3_sequence *s = a->sequences[i];
        if (s->prompt_left == 0 && s->own->step_rows > 0) s->own->step_rows = 1 + s->own->planned;
    }
    return DSV3_OK;
}

/* The rings are about to be overwritten by `rows` more positions: the modules of sequence i read what they have not
 * yet read, as far as tokens are known -- except for row N - 1, from which the drafts begin. */
static dsv3_result dsv3i_catch_up(dsv3i_step *a, size_t i, size_t rows) {
    dsv3_sequence *s = a->sequences[i];
    size_t known = dsv3_sequence_length(s), oldest = s->cache.length;
    for (size_t k = 1; k <= s->n_modules; k++) oldest = dsv3i_min(oldest, s->modules[k - 1].length);
    if (s->cache.length + rows + 1 - oldest <= s->own->window) return DSV3_OK;
    for (size_t k = 1; k <= s->n_modules; k++) { /* more positions are known than there are modules */
        DSV3I_TRY(dsv3i_module_read(a, i, k, dsv3i_min(known - k, s->cache.length - 1), 0));
        if (a->batch.rows > 0) DSV3I_TRY(dsv3i_module_call(a, k, 0));
    }
    return DSV3_OK;
}

/* ---- Verifying. Row j of the sequence's outputs is the main model's opinion on position N + 1 + j, where draft j +
 * 1 stands. Greedy: it is accepted if it is the most probable token. Else with probability min(1, p(x) / q(x)), and
 * the first one refused is replaced by a draw from max(0, p - q), which makes the text's distribution p exactly:
 * q(x) min(1, p(x) / q(x)) + (1 - sum min(p, q)) max(0, p(x) - q(x)) / sum max(0, p - q) = p(x). */

/* Is draft j (from 0) accepted? *token is best, and becomes the draft or what replaces it. */
static int dsv3i_verify(dsv3_sequence *s, size_t j, const float *logits, size_t best, size_t V, int32_t *token) {
    int32_t draft = s->history[s->cache.length + 1 + j];
    float *p = s->own->p, *q = s->own->q + j * V;
    double sum, u;
    if (dsv3i_is_greedy(s->temperature, s->top_p)) return draft == *token;
    (void)dsv3i_distribution(s, p, logits, best, V, &sum);
    if (dsv3i_uniform(&s->rng) * (double)q[draft] < (double)p[draft]) {
        *token = draft;
        return 1;
    }
    sum = 0.0;
    for (size_t i = 0; i < V; i++) {
        s->own->candidates[i].token = (int32_t)i;
        s->own->candidates[i].p = p[i] > q[i] ? p[i] - q[i] : 0.0f;
        sum += (double)s->own->candidates[i].p;
    }
    u = dsv3i_uniform(&s->rng) * sum;
    if (sum > 0.0) *token = dsv3i_pick(s->own->candidates, V, u);
    return 0;
}

/* How many tokens are in the caches when the rows of the step are, without drafts and the token before them. */
static size_t dsv3i_step_length(const dsv3_sequence *s) { return s->cache.length + s->own->step_rows - 1 - s->own->planned; }

/* Chooses what the logits [planned + 1, V] of sequence i allow to be written. Nothing is changed but the result, what
 * stands behind the text's end, and the random state. */
static dsv3_result dsv3i_choose(const dsv3i_step *a, size_t i, float *logits) {
    dsv3_sequence *s = a->sequences[i];
    size_t V = (size_t)a->model->config.vocab_size, length = dsv3i_step_length(s) + 1, best;
    int stands = 1, greedy = dsv3i_is_greedy(s->temperature, s->top_p);
    for (size_t j = 0; stands && j <= s->own->planned && length < s->limit; j++, length++, logits += V) {
        int32_t *token = s->token + j;
        DSV3I_TRY(dsv3i_steer(a, i, logits, length, &best));
        if (best == V && j > 0) break; /* the next step will say so */
        if (best == V) return dsv3i_steer_fail(a, i, DSV3_ERR_NAN, "left no token");
        *token = (int32_t)best;
        if (j < s->own->planned) {
            stands = dsv3i_verify(s, j, logits, best, V, token);
            s->own->agreed += stands != 0;
        } else if (!greedy) {
            *token = dsv3i_draw(s->own->candidates, logits, best, V, s->temperature, s->top_p, &s->rng);
        }
        if (s->want_log_p) {
            double log_p, entropy;
            DSV3I_TRY(dsv3_sample_log_p(&log_p, &entropy, *token, logits, V, greedy ? 1.0f : s->temperature,
                                        greedy ? 1.0f : s->top_p, s->own->candidates, a->error));
            s->log_p[j] = (float)log_p;
            s->entropy[j] = (float)entropy;
        }
        s->history[length] = *token;
        s->n_token = j + 1;
        if (dsv3i_stops(s, *token)) break;
    }
    return DSV3_OK;
}

/* Writes it. */
static void dsv3i_accept(dsv3_sequence *s, size_t N) {
    size_t refused = s->own->agreed < dsv3i_min(s->n_token, s->own->planned);
    for (size_t i = 0; i < s->max_drafts; i++) {
        int known = i < s->own->agreed + refused;
        float stands = i < s->own->agreed ? 1.0f : 0.0f;
        s->drafted[i] += known != 0;
        s->accepted[i] += i < s->own->agreed;
        s->own->rate[i] += known ? 0.1f * (stands - s->own->rate[i]) : 0.01f * (DSV3I_RATE - s->own->rate[i]);
    }
    dsv3i_modules_keep(s, N, N + s->own->agreed + 1); /* rows that read only what stands */
    s->cache.length = N + s->n_token;
    s->pending = 1;
    s->stopped = s->n_token > 0 && dsv3i_stops(s, s->token[s->n_token - 1]);
    s->steps += s->n_token > 0;
    s->written += s->n_token;
}

/* ---- A step: plan, draft, one call of the main model, accept */

/* Drafts that pay: with k drafts a step takes 1 + cost k and writes 1 + r_1 + r_1 r_2 + .. tokens. */
static size_t dsv3i_best_drafts(const dsv3_sequence *s, size_t most) {
    double tokens = 1.0, chance = 1.0, best = 1.0;
    size_t k = 0;
    for (size_t j = 0; j < most; j++) {
        double speed;
        chance *= (double)s->own->rate[j];
        tokens += chance;
        speed = tokens / (1.0 + (double)s->draft_cost * (double)(j + 1));
        if (speed <= best) continue;
        best = speed;
        k = j + 1;
    }
    return k;
}

/* Room for rows of a sequence that may use up to `spare` rows beside one: sets planned. Returns the rows it takes. */
static size_t dsv3i_plan_rows(dsv3_sequence *s, size_t spare) {
    size_t N = s->cache.length, room = s->cache.capacity - N, pending = s->pending != 0, most;
    s->own->planned = 0;
    if (dsv3_sequence_state(s) > DSV3_STATE_WRITING) return 0;
    most = dsv3i_min(room - 1, spare);
    if (s->prompt_left > 0) return 1 + dsv3i_min(dsv3i_min(s->prompt_left + pending, s->rows) - 1, most);
    most = dsv3i_min(most, s->limit - N - 2); /* drafts, and a token behind them */
    most = N == 0 ? 0 : dsv3i_min(dsv3i_min(s->drafts, s->max_drafts), most); /* N = 0: no state to start from */
    s->own->planned = s->adaptive ? dsv3i_best_drafts(s, most) : most;
    return 1 + s->own->planned;
}

/* Rows of sequence i for the main model: the pending token, then prompt or drafts. */
static void dsv3i_gather_main(dsv3i_step *a, size_t i) {
    dsv3_sequence *s = a->sequences[i];
    size_t N = s->cache.length, rows = s->own->step_rows, pending = s->pending != 0;
    size_t read = s->prompt_left > 0 ? rows - pending : 0;
    for (size_t r = 0; r < read; r++) s->history[N + pending + r] = s->prompt[r];
    for (size_t r = 0; r < rows; r++) {
        int output = s->prompt_left == 0 || (read == s->prompt_left && r + 1 == rows);
        dsv3i_gather_row(a, i, s->history[N + r], N + r, output);
    }
}

/* Will the sequence have logits, when the rows of the step are read? */
static int dsv3i_comes_out(const dsv3_sequence *s) {
    return s->own->step_rows > 0 && (s->prompt_left == 0 || s->own->step_rows - (s->pending != 0) == s->prompt_left);
}

/* The rows of a sequence have been through the main model. */
static void dsv3i_finish(dsv3_sequence *s) {
    size_t N = dsv3i_step_length(s), read = s->own->step_rows - (s->pending != 0);
    int comes_out = dsv3i_comes_out(s);
    if (s->own->step_rows == 0) return;
    if (s->prompt_left > 0) {
        s->pending = s->stopped = 0;
        s->prompt += read;
        s->prompt_left -= read;
        s->cache.length = N + 1;
    }
    if (comes_out) dsv3i_accept(s, N);
}

DSV3I_APART dsv3_result dsv3i_generate_check(const dsv3i_step *a, dsv3_workspace *workspace) {
    dsv3_error *e = a->error;
    uint64_t made_for = dsv3i_fingerprint(&a->model->config);
    DSV3I_TRY(dsv3i_check_between(e, a->n < 1 ? DSV3_ERR_ARG : DSV3_ERR_MEMORY, "n", "is not a number of sequences the "
                                  "workspace has rows for", (int64_t)a->n, 1, (int64_t)workspace->rows));
    for (size_t i = 0; i < a->n; i++) {
        if (a->sequences[i] == NULL || a->sequences[i]->own == NULL) continue;
        a->sequences[i]->own->step_rows = a->sequences[i]->n_token = 0; /* not yet planned: until then a mark below */
    }
    DSV3I_TRY(dsv3i_workspace_open(a->ws, workspace, a->ctx, a->model, e));
    for (size_t i = 0; i < a->n; i++) {
        dsv3_sequence *s = a->sequences[i];
        const char *why;
        dsv3_result code = dsv3i_sequence_check(s, "sequences", e);
        if (code != DSV3_OK) return dsv3i_fail_at(e, i, code);
        code = DSV3_ERR_ARG;
        why = s->own->step_rows != 0 ? "is given twice" : dsv3i_sampling_fault(s->temperature, s->top_p);
        if (s->own->made_for != made_for || s->n_modules > (size_t)a->model->n_mtp) {
            why = "was made for another model";
            code = DSV3_ERR_MISMATCH;
        }
        if (why == NULL && s->stops == NULL && s->n_stops > 0) why = "have stops that are NULL";
        if (why != NULL) return dsv3i_fail_at(e, i, dsv3i_fail(e, code, "sequences", why));
        s->own->step_rows = 1; /* seen */
    }
    return DSV3_OK;
}

/* Rows for everybody: one each, then drafts, then prompts. Returns their number. */
static size_t dsv3i_plan(const dsv3i_step *a) {
    size_t spare = a->ws->rows - a->n, total = 0;
    for (int prompts = 0; prompts < 2; prompts++) {
        for (size_t i = 0; i < a->n; i++) {
            dsv3_sequence *s = a->sequences[i];
            if ((s->prompt_left > 0) != prompts) continue;
            s->n_token = s->own->agreed = 0;
            s->own->rng_before = s->rng;
            for (size_t k = 0; k < s->n_modules; k++) s->own->lengths[k] = s->modules[k].length;
            s->own->step_rows = dsv3i_plan_rows(s, spare);
            spare -= s->own->step_rows - (s->own->step_rows > 0);
            total += s->own->step_rows;
        }
    }
    return total;
}

static dsv3_result dsv3i_nothing_to_do(const dsv3i_step *a) {
    for (size_t i = 0; i < a->n; i++) {
        const dsv3_sequence *s = a->sequences[i];
        if (dsv3_sequence_state(s) != DSV3_STATE_FULL) continue;
        return dsv3i_fail_range(a->error, DSV3_ERR_FULL, "sequences", "have no room left, positions",
                                (int64_t)s->cache.capacity, (int64_t)s->cache.capacity, (int64_t)s->cache.length);
    }
    for (size_t i = 0; i < a->n; i++) {
        const dsv3_sequence *s = a->sequences[i];
        if (dsv3_sequence_state(s) != DSV3_STATE_LIMIT) continue;
        return dsv3i_fail_where(a->error, DSV3_ERR_ARG, "sequences", "have as many tokens as their limit allows:",
                                (int64_t)s->limit);
    }
    return dsv3i_fail(a->error, DSV3_ERR_ARG, "sequences", "have stopped, or no token to go on from: append a prompt");
}

/* Everything that may fail: the sequences are changed behind it. */
DSV3I_APART dsv3_result dsv3i_compute(dsv3i_step *a) {
    dsv3i_workspace *ws = a->ws;
    size_t V = (size_t)a->model->config.vocab_size, output = 0;
    for (size_t i = 0; i < a->n; i++) {
        dsv3_sequence *s = a->sequences[i];
        if (s->own->step_rows > 0) DSV3I_TRY(dsv3i_catch_up(a, i, s->own->step_rows));
        s->own->top = dsv3i_max(s->own->top, s->cache.length + s->own->step_rows + 1);
        /* Behind an error, too, modules have read what they read here: the states may be gone that they would need again. */
        for (size_t k = 0; k < s->n_modules; k++) s->own->lengths[k] = s->modules[k].length;
    }
    DSV3I_TRY(dsv3i_draft(a));
    for (size_t i = 0; i < a->n; i++) {
        ws->views[i] = a->sequences[i]->cache;
        dsv3i_gather_main(a, i);
    }
    DSV3I_TRY(dsv3i_gather_run(a, 0));
    for (size_t i = 0; i < a->n; i++) {
        if (!dsv3i_comes_out(a->sequences[i])) continue;
        DSV3I_TRY(dsv3i_choose(a, i, a->logits + output * V));
        output += a->sequences[i]->own->planned + 1;
    }
    dsv3i_gather_keep(a, 0);
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_generate_step(const dsv3_context *context, float *logits, const dsv3_model *model,
                                        dsv3_sequence *const *sequences, size_t n, dsv3_workspace *workspace, dsv3_error *error) {
    dsv3i_workspace ws;
    dsv3i_step a = {context, logits, model, sequences, n, &ws, error, {0, NULL, NULL, NULL, 0, NULL}};
    dsv3_result result;
    DSV3I_NEED(1, context); DSV3I_NEED(1, logits); DSV3I_NEED(1, model); DSV3I_NEED(1, sequences); DSV3I_NEED(1, workspace);
    DSV3I_TRY(dsv3i_generate_check(&a, workspace));
    dsv3i_gather_begin(&a);
    if (dsv3i_plan(&a) == 0) return dsv3i_nothing_to_do(&a);
    result = dsv3i_compute(&a);
    for (size_t i = 0; i < n && result != DSV3_OK; i++) {
        dsv3_sequence *s = sequences[i];
        s->rng = s->own->rng_before;
        s->n_token = 0;
        for (size_t k = 0; k < s->n_modules; k++) s->modules[k].length = dsv3i_min(s->modules[k].length, s->own->lengths[k]);
    }
    for (size_t i = 0; i < n && result == DSV3_OK; i++) dsv3i_finish(sequences[i]);
    return result == DSV3_OK ? dsv3i_ok(error) : result;
}

#ifndef DSV3_NO_TRAINING
/* ========================================================================================================
 * Chapter 14  >>train
 *
 * Training as a program ([R] 4.2). A step is
 *     begin       how many targets will there be, in all micro-batches of all ranks?
 *     accumulate  forward, loads, backward: gradients += weight * d loss, with the final weight already in it
 *     end         sum over ranks, one global norm, clip, AdamW on float32 weights, bias step, moving average
 * so that gradient accumulation is right by construction: no mean of means, no rescaling behind the fact.
 *
 * The forward pass is that of inference (chapters 4 to 12), in the expanded attention form, with the workspace's
 * pointers on memory that stays until the backward pass. Of each layer and row stay about 2 d + rq + rk + H dv floats,
 * and 2 (K F + n_shared F) or 2 Fd; more, if settings.keep (or, layer by layer, keep_layers) asks for it (DSV3I_SAVED).
 * What is not kept is computed again. Backward goes from the last MTP module down: each gives the one before the
 * gradient of the states it was given.
 *
 * AdamW: m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
 *     w = w (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
 * A checkpoint that a run goes on from with the same bits holds the weights (routers' biases are among them), m, v, the
 * moving average, t, and the loads of all steps: dsv3_trainer_save (chapter 16). What is not in the trainer is the
 * program's to remember: its settings, the schedule, the place in the text.
 * Test: tests/test_gradients.c, tests/test_train.c.
 * ==================================================================================================== */

/* ---- Parameters: tensors one behind the other, in the order of the walk */

#define DSV3I_RUN 4096u /* most elements that the optimizer takes together */

/* Such a run of elements of one tensor. */
typedef struct dsv3i_squares {
    size_t at, n; /* among the parameters */
    float decay;  /* what its weights are multiplied by */
    double sum;   /* of the squares of its gradients */
} dsv3i_squares;

typedef struct dsv3i_flat {
    float *data; /* NULL: only count */
    size_t count, runs; /* elements and their runs, so far */
    dsv3_error *error;
} dsv3i_flat;

static dsv3_result dsv3i_flat_tensor(dsv3i_walk *w, dsv3_tensor *slot) {
    dsv3i_flat *flat = (dsv3i_flat *)w->user;
    size_t n = dsv3i_mul(w->info.rows, w->info.cols);
    if (flat->data != NULL) {
        slot->data = flat->data + flat->count;
        slot->rows = w->info.rows;
        slot->cols = w->info.cols;
        slot->rank = w->info.rank;
        slot->type = DSV3_F32;
    }
    flat->count = dsv3i_add(flat->count, n);
    flat->runs = dsv3i_add(flat->runs, dsv3i_blocks(n, DSV3I_RUN));
    return DSV3_OK;
}

static dsv3_result dsv3i_walk_parameters(const dsv3_config *config, dsv3_model *model, void *user,
                                         dsv3_result (*visit)(dsv3i_walk *walk, dsv3_tensor *slot)) {
    dsv3i_walk w;
    dsv3i_walk_begin(&w, config, user, visit);
    w.copies = 0;
    return dsv3i_walk_all(&w, model);
}

static dsv3_result dsv3i_load_tensor(dsv3i_walk *w, dsv3_tensor *slot) {
    dsv3i_flat *flat = (dsv3i_flat *)w->user;
    dsv3_context ctx;
    if (slot->data == NULL || slot->rows != w->info.rows || slot->cols != w->info.cols) {
        return dsv3i_fail(flat->error, DSV3_ERR_MISMATCH, w->info.name, "is not there, or has another shape");
    }
    DSV3_MEMSET(&ctx, 0, sizeof ctx);
    ctx.ops = &dsv3i_plain;
    for (size_t r = 0; r < slot->rows; r++, flat->count += slot->cols) {
        dsv3i_decode_row(&ctx, flat->data + flat->count, slot, r);
    }
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_parameters_from_model(dsv3_parameters *parameters, const dsv3_model *from, dsv3_error *error) {
    dsv3i_flat flat = {NULL, 0, 0, error};
    dsv3_model copy;
    const dsv3_config *config;
    DSV3I_NEED(1, parameters); DSV3I_NEED(1, from);
    config = &parameters->model.config;
    if (dsv3i_fingerprint(config) != dsv3i_fingerprint(&from->config)) {
        return dsv3i_fail(error, DSV3_ERR_MISMATCH, "model", "is of another config");
    }
    DSV3I_TRY(dsv3i_check_least(error, DSV3_ERR_MISMATCH, "model", "has too few MTP modules", (size_t)from->n_mtp,
                                (size_t)parameters->model.n_mtp));
    copy = *from;
    flat.data = parameters->data;
    DSV3I_TRY(dsv3i_walk_parameters(config, &copy, &flat, dsv3i_load_tensor));
    return dsv3i_ok(error);
}

typedef struct dsv3i_random {
    dsv3_rng *rng;
    float *data, std;
} dsv3i_random;

/* Box and Muller: two uniform numbers give a normal one. */
static float dsv3i_normal(dsv3_rng *rng) {
    float u = 1.0f - dsv3_random_uniform(rng), v = dsv3_random_uniform(rng);
    return DSV3_SQRTF(-2.0f * DSV3_LOGF(u)) * DSV3_COSF(6.28318530718f * v);
}

static dsv3_result dsv3i_random_tensor(dsv3i_walk *w, dsv3_tensor *slot) {
    dsv3i_random *r = (dsv3i_random *)w->user;
    size_t n = w->info.rows * w->info.cols;
    float fill = w->info.kind == DSV3_KIND_ROUTER ? 0.0f : 1.0f;
    (void)slot;
    for (size_t i = 0; i < n; i++) r->data[i] = w->info.rank == 1 ? fill : r->std * dsv3i_normal(r->rng);
    r->data += n;
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_parameters_random(dsv3_parameters *parameters, dsv3_rng *rng, float std, dsv3_error *error) {
    DSV3I_NEED(1, parameters); DSV3I_NEED(1, rng);
    if (!(std >= 0.0f && std <= FLT_MAX)) return dsv3i_fail(error, DSV3_ERR_ARG, "std", "is negative or not finite");
    dsv3i_random r = {rng, parameters->data, std};
    (void)dsv3i_walk_parameters(&parameters->model.config, NULL, &r, dsv3i_random_tensor);
    return dsv3i_ok(error);
}

/* ---- Settings */

DSV3_API dsv3_training dsv3_training_default(void) {
    dsv3_training s;
    DSV3_MEMSET(&s, 0, sizeof s);
    s.rows = s.longest = 4096;
    s.sequences = 1;
    s.lambda = 0.3;
    s.balance.expert = 0.0001;
    s.balance.devices = s.balance.most_devices = 1;
    s.beta1 = 0.9f;
    s.beta2 = 0.95f;
    s.eps = 1e-8f;
    s.weight_decay = 0.1f;
    s.clip = 1.0f;
    s.ema_decay = 0.999;
    return s;
}

DSV3_API double dsv3_learning_rate(const dsv3_schedule *s, uint64_t step) {
    if (step < s->warmup) return s->peak * (double)(step + 1) / (double)s->warmup;
    if (step < s->constant) return s->peak;
    if (step < s->cosine) {
        double part = (double)(step - s->constant) / (double)(s->cosine - s->constant);
        return s->low + 0.5 * (s->peak - s->low) * (1.0 + (double)DSV3_COSF((float)(3.14159265358979 * part)));
    }
    return step < s->end ? s->low : s->tail;
}

/* What a trainer keeps to itself, in its memory. targets [1 + D] and sequences are those of the whole step. */
#define DSV3I_OWN(X)                                                                                                 \
    X(uint64_t, targets, depths, 1) X(float, bias, layers, m.E) X(dsv3i_squares, squares, flat.runs, 1)              \
    X(dsv3_cache, caches, s->sequences, 1) X(dsv3i_saved, saved, layers, 1) X(dsv3i_depth, depth, depths, 1)         \
    X(dsv3i_backward, backward, 1, 1) X(float, dx, n, m.d) X(float, dconcat, n, 2 * m.d)                             \
    X(float, carry, n, m.d) X(float, carry_next, n, m.d)
typedef struct dsv3i_trainer {
    int32_t stage; /* 0: no step, 1: begun, 2: begun, and something is accumulated */
    size_t most_rows, most_sequences;
    uint64_t sequences;
    DSV3I_OWN(DSV3I_MEMBER)
} dsv3i_trainer;

/* Nothing is summed up yet, and nothing expected. */
static void dsv3i_train_clear(dsv3_trainer *t) {
    dsv3_losses *sums = &t->losses;
    const dsv3_balancer *b = &t->balancer;
    DSV3_MEMSET(t->own->targets, 0, (1 + sums->depths) * sizeof *t->own->targets);
    t->own->sequences = 0;
    sums->sequences = 0;
    sums->load = b->load;
    DSV3_MEMSET(sums->nll, 0, (1 + sums->depths) * sizeof *sums->nll);
    DSV3_MEMSET(sums->targets, 0, (1 + sums->depths) * sizeof *sums->targets);
    DSV3_MEMSET(sums->balance, 0, 3 * b->layers * sizeof *sums->balance); /* device and communication are behind it */
    DSV3_MEMSET(b->load, 0, b->layers * b->experts * sizeof *b->load);
    DSV3_MEMSET(t->gradients.data, 0, t->gradients.count * sizeof(float));
}

/* ---- Begin */

DSV3_API dsv3_result dsv3_text_count(const dsv3_text *text, size_t depths, uint64_t *targets, uint64_t *sequences,
                                     dsv3_error *error) {
    DSV3I_NEED(1, text); DSV3I_NEED(1, text->token); DSV3I_NEED(1, targets); DSV3I_NEED(1, sequences);
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_LIMIT, "depths", "are too many", (int64_t)depths, 0, DSV3_MAX_LAYERS));
    DSV3I_TRY(dsv3i_text_check(text, INT32_MAX, error));
    for (size_t r = 0; r < text->rows; r++) {
        for (size_t k = 0; k <= depths; k++) targets[k] += dsv3i_text_target(text, r, k) != DSV3_IGNORE;
    }
    *sequences += dsv3i_text_sequences(text);
    return dsv3i_ok(error);
}

static dsv3_result dsv3i_trainer_check(const dsv3_trainer *t, dsv3_error *error) {
    if (t == NULL) return dsv3i_fail_null(error, "trainer");
    return t->own != NULL ? DSV3_OK : dsv3i_fail(error, DSV3_ERR_ARG, "trainer", "was not made by dsv3_trainer_init");
}

DSV3_API dsv3_result dsv3_train_begin(dsv3_trainer *t, const uint64_t *targets, uint64_t sequences, dsv3_error *error) {
    DSV3I_TRY(dsv3i_trainer_check(t, error));
    if (targets == NULL) return dsv3i_fail_null(error, "targets");
    dsv3i_train_clear(t);
    DSV3_MEMCPY(t->own->targets, targets, (1 + t->losses.depths) * sizeof *targets);
    t->own->sequences = sequences;
    t->own->stage = 1;
    return dsv3i_ok(error);
}

/* Weight of each target's loss at depth k. */
static double dsv3i_train_weight(const dsv3_trainer *t, size_t k) {
    uint64_t terms = t->own->targets[t->settings.divisor == DSV3_DIVIDE_BY_VALID ? k : 0];
    return terms > 0 ? dsv3i_depth_weight(k, t->losses.depths, t->settings.lambda) / (double)terms : 0.0;
}

DSV3_API double dsv3_train_loss(const dsv3_trainer *t) {
    const double weight[3] = {t->settings.balance.expert, t->settings.balance.device, t->settings.balance.communication};
    return dsv3i_loss_total(&t->losses, t->own->targets, t->own->sequences, t->balancer.layers, t->settings.lambda, weight,
                            t->settings.divisor, 1);
}

/* ---- Accumulate: forward */

/* Behind the loss of depth k at once its gradients: du of the depth, and the head's. */
static void dsv3i_train_head(const dsv3i_evaluation *a, size_t k, dsv3i_loss *loss) {
    const dsv3_trainer *t = (const dsv3_trainer *)a->user;
    dsv3i_depth *v = &t->own->depth[k];
    float *dhead = k > 0 && t->settings.detach_head ? NULL : dsv3i_grad(&t->gradients.model.lm_head);
    v->n = loss->n;
    for (size_t i = 0, at = 0; k > 0 && i < v->n; v->from[i++] = at) {
        while (t->own->depth[k - 1].ws.row_index[at] != v->ws.row_index[i]) at++;
    }
    dsv3i_cross_entropy_backward(loss, v->du, 1, dhead, (float)dsv3i_train_weight(t, k));
}

/* ---- Accumulate: backward */

/* dx [n, d] of h' = eh_proj [enorm(e) ; hnorm(h)] goes to the module's parts, to the embedding, and, as carry, to the
 * states of the depth before. */
static void dsv3i_mtp_backward(const dsv3_context *ctx, dsv3_trainer *t, size_t k, float *carry) {
    const dsv3_model *model = &t->weights.model;
    const dsv3_mtp *w = &model->mtp[k - 1], *g = &t->gradients.model.mtp[k - 1];
    dsv3i_depth *v = &t->own->depth[k];
    dsv3i_workspace *ws = &v->ws;
    const dsv3i_backward *b = t->own->backward;
    size_t d = (size_t)model->config.hidden_size, n = v->n;
    size_t e = model->config.mtp_concat == DSV3_MTP_HIDDEN_FIRST ? d : 0, h = d - e;
    float eps = model->config.rms_norm_eps, *hidden = ws->row_hidden;
    dsv3i_rows rows = dsv3i_rows_of(ctx, hidden, t->own->depth[k - 1].ws.hidden, d);
    rows.at = v->from;
    dsv3i_rows_run(&rows, n, 2, dsv3i_copy_task);
    dsv3i_mtp_concat(ctx, model, w, v->ws.row_token, hidden, n, ws);
    dsv3i_project_backward(ctx, ws, t->own->dconcat, 1, &g->eh_proj, t->own->dx, ws->concat, &w->eh_proj, n);
    for (int half = 0; half < 2; half++) {
        const dsv3_tensor *gain = half ? &w->hnorm : &w->enorm, *dgain = half ? &g->hnorm : &g->enorm;
        dsv3i_rows norm = dsv3i_norm_rows(ctx, b->du, 1, dsv3i_grad(dgain), t->own->dconcat + (half ? h : e),
                                          half ? hidden : ws->y, gain, eps, b->r);
        norm.ldy = 2 * d;
        dsv3i_norm_backward(&norm, n);
        if (half == 0 && !t->settings.detach_head) {
            dsv3i_embed_backward(ctx, dsv3i_grad(&t->gradients.model.embed_tokens), b->du, v->ws.row_token, n, d);
        }
    }
    if (k == 1 && t->settings.detach_trunk) return;
    rows.y = carry;
    rows.x = b->du;
    dsv3i_rows_run(&rows, n, 2, dsv3i_add_task);
}

/* Depth k: from the head's gradient, and carry from the depth behind it, down to its input. */
static dsv3_result dsv3i_train_depth_backward(const dsv3_context *ctx, dsv3_trainer *t, size_t k, float *carry,
                                              dsv3_error *error) {
    const dsv3_model *model = &t->weights.model, *grad = &t->gradients.model;
    dsv3i_depth *v = &t->own->depth[k];
    size_t d = (size_t)model->config.hidden_size, n = v->n;
    dsv3i_stack stack = dsv3i_stack_of(model, k), g = dsv3i_stack_of(grad, k);
    int behind = model->config.mtp_hidden == DSV3_MTP_POST_NORM; /* carry is of states behind the norm */
    dsv3i_rows norm = dsv3i_norm_rows(ctx, t->own->dx, behind, dsv3i_grad(g.norm), v->du, v->ws.x, stack.norm,
                                      model->config.rms_norm_eps, t->own->backward->r);
    if (behind) dsv3i_add_rows(ctx, v->du, carry, n, d);
    if (!behind) dsv3i_copy_rows(ctx, t->own->dx, carry, n, d);
    dsv3i_norm_backward(&norm, n);
    for (size_t i = stack.count; i > 0; i--) {
        const dsv3_layer *w = &stack.layers[i - 1];
        dsv3i_workspace keeping = dsv3i_keeping(&v->ws, &t->own->saved[w->index]);
        dsv3i_call c = dsv3i_call_of(ctx, model, w, 0, t->own->caches, n, &keeping);
        c.g = &g.layers[i - 1];
        c.s = &t->own->saved[w->index];
        c.b = t->own->backward;
        DSV3I_TRY(dsv3i_go_on(ctx, error));
        dsv3i_layer_backward(&c, t->own->dx);
    }
    if (k == 0) dsv3i_embed_backward(ctx, dsv3i_grad(&grad->embed_tokens), t->own->dx, v->ws.row_token, n, d);
    return DSV3_OK;
}

static dsv3_result dsv3i_train_backward(const dsv3_context *ctx, dsv3_trainer *t, dsv3_error *error) {
    size_t d = (size_t)t->weights.model.config.hidden_size, n = t->own->depth[0].n;
    float *carry = t->own->carry, *next = t->own->carry_next, *swap;
    DSV3_MEMSET(carry, 0, n * d * sizeof *carry);
    for (size_t k = t->losses.depths + 1; k > 0; k--) {
        if (t->own->depth[k - 1].n == 0) continue;
        DSV3I_TRY(dsv3i_train_depth_backward(ctx, t, k - 1, carry, error));
        if (k == 1) continue;
        DSV3_MEMSET(next, 0, n * d * sizeof *next);
        dsv3i_mtp_backward(ctx, t, k - 1, next);
        swap = carry;
        carry = next;
        next = swap;
    }
    return DSV3_OK;
}

/* A text that has been checked, forward and backward. */
static dsv3_result dsv3i_train_text(const dsv3_context *context, dsv3_trainer *t, const dsv3_text *text, dsv3_error *error) {
    const dsv3i_evaluation a = {&t->losses, text, NULL, t->own->depth, dsv3i_train_head, t};
    dsv3_context ctx = *context;
    dsv3i_workspace *ws = &t->own->depth[0].ws;
    double stands = dsv3i_text_stands(text, &t->weights.model.config);
    const dsv3i_run p = {&ctx, &t->weights.model, 0, t->own->caches, t->own->most_sequences, NULL, ws->row_hidden, NULL, ws,
                         error, &a, dsv3i_evaluate_layer, t->own->saved};
    ctx.attention = DSV3_ATTENTION_EXPANDED;
    ctx.compute = DSV3_EXACT;
    t->losses.actual = t->settings.balance.actual;
    t->losses.devices = t->settings.balance.device + t->settings.balance.communication > 0.0 ? t->settings.balance.devices : 0;
    t->losses.most_devices = t->settings.balance.most_devices;
    for (size_t k = 0; k <= t->losses.depths; k++) t->own->depth[k].n = 0;
    t->own->stage = 0;
    DSV3I_TRY(dsv3i_evaluate_rows(&a, p, 0, text->rows));
    t->losses.sequences += dsv3i_text_sequences(text);
    t->own->backward->balance = &t->settings.balance;
    t->own->backward->balance_scale = t->own->sequences > 0 ? stands / (double)t->own->sequences : 0.0;
    DSV3I_TRY(dsv3i_train_backward(&ctx, t, error));
    t->own->stage = 2;
    return dsv3i_ok(error);
}

/* Has the step come so far, and is every number that it goes by in its domain? NaN is in none. */
static dsv3_result dsv3i_train_check(const dsv3_trainer *t, int32_t stage, dsv3_error *error) {
    static const char names[] = "eps\0lambda\0balance.expert\0balance.device\0balance.communication\0weight_decay\0clip\0"
                                "beta1\0beta2\0ema_decay\0divisor";
    const dsv3_training *s = &t->settings;
    const double value[] = {(double)s->eps, s->lambda, s->balance.expert, s->balance.device, s->balance.communication,
                            (double)s->weight_decay, (double)s->clip, (double)s->beta1, (double)s->beta2, s->ema_decay,
                            (double)s->divisor / (DSV3_DIVIDE_BY_VALID + 1)};
    const char *name = names;
    for (size_t i = 0; i < DSV3I_COUNT(value); i++, name = dsv3i_next_text(name)) {
        if (value[i] >= (i < 1 ? (double)FLT_MIN : 0.0) && value[i] < (i < 7 ? (double)FLT_MAX : 1.0)) continue;
        return dsv3i_fail(error, DSV3_ERR_ARG, name, i == 0 ? "must be finite and above 0" : i == 10 ? "is not known" :
                          i < 7 ? "must be finite and at least 0" : "must be at least 0 and below 1");
    }
    if (t->own->stage >= stage) return DSV3_OK;
    return dsv3i_fail(error, DSV3_ERR_ARG, "trainer", t->own->stage > 0 ? "has accumulated nothing in this step"
                      : "has no step begun: dsv3_train_begin comes first, also behind an error");
}

DSV3_API dsv3_result dsv3_train_accumulate(const dsv3_context *context, dsv3_trainer *t, const dsv3_text *text,
                                           dsv3_error *error) {
    DSV3I_TRY(dsv3i_trainer_check(t, error));
    DSV3I_TRY(dsv3i_workspace_check(&t->workspace, context, &t->weights.model, error));
    DSV3I_NEED(1, text); DSV3I_NEED(1, text->token);
    DSV3I_TRY(dsv3i_train_check(t, 1, error));
    DSV3I_TRY(dsv3i_check_between(error, text->rows < 1 ? DSV3_ERR_ARG : DSV3_ERR_MEMORY, "rows", "is not a micro-batch the "
                                  "trainer was made for", (int64_t)text->rows, 1, (int64_t)t->own->most_rows));
    DSV3I_TRY(dsv3i_check_weights(&t->settings.balance, t->balancer.experts, error));
    DSV3I_TRY(dsv3i_text_check(text, t->weights.model.config.vocab_size, error));
    for (size_t r = 0, rows = 0; r < text->rows; r++) {
        rows = r > 0 && dsv3i_text_continues(text, r - 1, 1) ? rows + 1 : 1;
        DSV3I_TRY(dsv3i_check_element(error, DSV3_ERR_ARG, "sequence", r, "is not one of settings.sequences",
                                      (int64_t)t->own->most_sequences, dsv3i_text_sequence(text, r)));
        DSV3I_TRY(dsv3i_check_element(error, DSV3_ERR_FULL, "sequence", r, "is longer than settings.longest",
                                      (int64_t)t->own->caches[0].capacity, (int64_t)rows - 1));
    }
    return dsv3i_train_text(context, t, text, error);
}

/* ---- End */

/* Does name match the pattern, in which * stands for any characters? */
static int dsv3i_matches(const char *pattern, const char *name) {
    if (*pattern == '*') return dsv3i_matches(pattern + 1, name) || (*name != '\0' && dsv3i_matches(pattern, name + 1));
    return *pattern == *name && (*name == '\0' || dsv3i_matches(pattern + 1, name + 1));
}

static int dsv3i_matches_any(const char *const *patterns, const char *name) {
    while (patterns != NULL && *patterns != NULL && !dsv3i_matches(*patterns, name)) patterns++;
    return patterns != NULL && *patterns != NULL;
}

typedef struct dsv3i_optimizer {
    dsv3_trainer *t;
    size_t at, runs;                /* the walk's place among the parameters; t->own->squares in use */
    float decay, scale, rate, root; /* 1 - lr decay; clipping; lr / (1 - b1^t); 1 / sqrt(1 - b2^t) */
} dsv3i_optimizer;

/* Cuts what AdamW trains into runs: all but frozen tensors and routers' biases. Vectors do not decay. */
static dsv3_result dsv3i_optimizer_tensor(dsv3i_walk *w, dsv3_tensor *slot) {
    dsv3i_optimizer *o = (dsv3i_optimizer *)w->user;
    const dsv3_training *s = &o->t->settings;
    const dsv3_tensor_info *info = &w->info;
    size_t n = info->rows * info->cols;
    int skip = (info->kind == DSV3_KIND_ROUTER && info->rank == 1) || dsv3i_matches_any(s->frozen, info->name);
    (void)slot;
    for (size_t i = 0; i < n && !skip; i += DSV3I_RUN) {
        dsv3i_squares *run = &o->t->own->squares[o->runs++];
        run->at = o->at + i;
        run->n = dsv3i_min(DSV3I_RUN, n - i);
        run->decay = info->rank == 2 && !dsv3i_matches_any(s->exempt, info->name) ? o->decay : 1.0f;
    }
    o->at += n;
    return DSV3_OK;
}

static void dsv3i_squares_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3_trainer *t = (const dsv3_trainer *)arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const float *g = t->gradients.data + t->own->squares[i].at;
        size_t n = t->own->squares[i].n, j = 0;
        double sum[4] = {0, 0, 0, 0};
        for (; j + 4 <= n; j += 4) {
            for (size_t k = 0; k < 4; k++) sum[k] += (double)g[j + k] * (double)g[j + k];
        }
        for (size_t k = 0; j + k < n; k++) sum[k] += (double)g[j + k] * (double)g[j + k];
        t->own->squares[i].sum = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    }
}

/* AdamW on w, with moments m and v; all [n]. */
static void dsv3i_adamw(const dsv3i_optimizer *o, float decay, float *DSV3I_RESTRICT w, float *DSV3I_RESTRICT m,
                        float *DSV3I_RESTRICT v, const float *DSV3I_RESTRICT gradient, size_t n) {
    const float b1 = o->t->settings.beta1, b2 = o->t->settings.beta2, eps = o->t->settings.eps;
    const float scale = o->scale, rate = o->rate, root = o->root;
    for (size_t i = 0; i < n; i++) {
        float g = gradient[i] * scale;
        m[i] = b1 * m[i] + (1.0f - b1) * g;
        v[i] = b2 * v[i] + (1.0f - b2) * (g * g);
        w[i] = w[i] * decay - rate * m[i] / (DSV3_SQRTF(v[i]) * root + eps);
    }
}

static void dsv3i_adamw_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_optimizer *o = (const dsv3i_optimizer *)arg;
    const dsv3_trainer *t = o->t;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        size_t at = t->own->squares[i].at;
        dsv3i_adamw(o, t->own->squares[i].decay, t->weights.data + at, t->m + at, t->v + at, t->gradients.data + at,
                    t->own->squares[i].n);
    }
}

/* The moving average follows the weights, biases included. It is rounded up or down by chance (a hash of step and place), to
 * either as often as it is near: so steps far smaller than what float32 resolves are not lost, but taken whole at times. */
static void dsv3i_ema_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3_trainer *t = (const dsv3_trainer *)arg;
    const double decay = t->step == 0 ? 0.0 : t->settings.ema_decay;
    const uint64_t below = 0x1FFFFFFFu; /* the bits of a double that a float does not have */
    (void)worker;
    for (size_t i = begin * DSV3I_RUN; i < dsv3i_min(end * DSV3I_RUN, t->weights.count); i++) {
        dsv3_rng rng = {t->step * t->weights.count + i};
        double x = decay * (double)t->ema[i] + (1.0 - decay) * (double)t->weights.data[i];
        uint64_t bits = 0;
        if (sizeof x == sizeof bits) DSV3_MEMCPY(&bits, &x, sizeof bits); /* else a double is a float, and rounded already */
        bits = (bits + (dsv3_random(&rng) & below)) & ~below;
        if (sizeof x == sizeof bits) DSV3_MEMCPY(&x, &bits, sizeof bits);
        t->ema[i] = (float)x;
    }
}

static dsv3_result dsv3i_bias_tensor(dsv3i_walk *w, dsv3_tensor *slot) {
    const dsv3_trainer *t = (const dsv3_trainer *)w->user;
    size_t E = w->info.cols;
    if (w->info.kind != DSV3_KIND_ROUTER || w->info.rank != 1) return DSV3_OK;
    if (dsv3i_matches_any(t->settings.frozen, w->info.name)) return DSV3_OK;
    DSV3_MEMCPY(dsv3i_grad(slot), t->own->bias + (size_t)w->info.layer * E, E * sizeof *t->own->bias);
    return DSV3_OK;
}

/* The bias step on all routers' biases [L + D, E], 0 where there is none. Those not frozen go back to the weights. */
static void dsv3i_train_bias(dsv3_trainer *t) {
    dsv3_model *model = &t->weights.model;
    size_t layers = t->balancer.layers, E = t->balancer.experts;
    DSV3_MEMSET(t->own->bias, 0, layers * E * sizeof *t->own->bias);
    for (size_t i = 0; i < layers; i++) {
        const void *bias = model->layers[i].e_score_correction_bias.data;
        if (bias != NULL) DSV3_MEMCPY(t->own->bias + i * E, bias, E * sizeof *t->own->bias);
    }
    dsv3i_balancer_move(&t->balancer, t->own->bias, t->step);
    (void)dsv3i_walk_parameters(&model->config, model, t, dsv3i_bias_tensor);
}

/* base^n, by squaring: the same on every machine. */
static double dsv3i_power(double base, uint64_t n) {
    double result = 1.0;
    for (; n > 0; n >>= 1, base *= base) {
        if (n & 1u) result *= base;
    }
    return result;
}

DSV3_API dsv3_result dsv3_train_end(const dsv3_context *context, dsv3_trainer *t, double learning_rate, double *norm,
                                    dsv3_error *error) {
    dsv3i_optimizer o = {t, 0, 0, 1.0f, 1.0f, 0.0f, 0.0f};
    dsv3_result result = DSV3_OK;
    double size = 0.0, rate, decay, clip;
    DSV3I_TRY(dsv3i_check_context(context, error));
    DSV3I_TRY(dsv3i_trainer_check(t, error));
    DSV3I_TRY(dsv3i_check_bias_step(t->balancer.rule, dsv3_bias_speed(&t->balancer.schedule, t->step), error));
    DSV3I_TRY(dsv3i_train_check(t, t->settings.reduce != NULL ? 1 : 2, error));
    rate = learning_rate / (1.0 - dsv3i_power((double)t->settings.beta1, t->step + 1));
    decay = 1.0 - learning_rate * (double)t->settings.weight_decay;
    if (!(learning_rate >= 0.0 && rate <= (double)FLT_MAX && decay >= -(double)FLT_MAX)) {
        return dsv3i_fail(error, DSV3_ERR_ARG, "learning_rate", "is negative, or too large for float32");
    }
    t->own->stage = 0;
    if (t->settings.reduce != NULL) {
        result = t->settings.reduce(t->settings.reduce_user, t->gradients.data, t->gradients.count);
    }
    if (result == DSV3_OK) result = dsv3i_balancer_reduce(&t->balancer); /* before anything has moved */
    if (result != DSV3_OK) return dsv3i_fail(error, result, "reduce", "failed");
    o.decay = (float)decay;
    (void)dsv3i_walk_parameters(&t->weights.model.config, NULL, &o, dsv3i_optimizer_tensor);
    dsv3i_loop(context, o.runs, DSV3I_RUN, dsv3i_squares_task, t);
    for (size_t i = 0; i < o.runs; i++) size += t->own->squares[i].sum;
    size = DSV3_POW(size, 0.5); /* the global norm: of the gradients of all that is trained */
    if (norm != NULL) *norm = size;
    clip = (double)t->settings.clip;
    if (clip > 0.0 && size > clip) o.scale = (float)(clip / size);
    if (!(DSV3_POW((double)o.scale * size, 2.0) <= (double)FLT_MAX)) {
        return dsv3i_fail(error, DSV3_ERR_NAN, "gradients", "or their squares are not finite, and the step is skipped");
    }
    o.rate = (float)rate;
    o.root = (float)DSV3_POW(1.0 - dsv3i_power((double)t->settings.beta2, t->step + 1), -0.5);
    dsv3i_loop(context, o.runs, 8 * DSV3I_RUN, dsv3i_adamw_task, &o);
    dsv3i_train_bias(t);
    if (t->ema != NULL) dsv3i_loop(context, dsv3i_blocks(t->weights.count, DSV3I_RUN), 2 * DSV3I_RUN, dsv3i_ema_task, t);
    t->step++;
    return dsv3i_ok(error);
}
#endif /* DSV3_NO_TRAINING */

/* ========================================================================================================
 * Chapter 15  >>memory
 *
 * Where everything lies. Each object has one layout function: _size runs it over nothing, _init over the caller's memory
 * (chapter 2), so that the two cannot disagree. Test: tests/test_tools.c, tests/test_state.c.
 * ==================================================================================================== */

/* ---- Caches */

/* layers: 1 for an MTP module; 0: those of the main model. */
static dsv3_result dsv3i_cache_layout(dsv3_cache *cache, const dsv3_config *config, size_t layers, size_t capacity,
                                      dsv3_type type, dsv3i_layout *l, dsv3_error *error) {
    DSV3I_TRY(dsv3_config_check(config, error));
    if (type != DSV3_F32 && type != DSV3_BF16) {
        return dsv3i_fail(error, DSV3_ERR_UNSUPPORTED, "type", "of a cache must be F32 or BF16");
    }
    DSV3I_TRY(dsv3i_check_count(error, "capacity", capacity, DSV3_MAX_SEQ));
    cache->type = type;
    cache->layers = layers > 0 ? layers : (size_t)config->num_hidden_layers;
    cache->capacity = capacity;
    cache->width = dsv3i_dims_of(config).width;
    cache->length = 0;
    cache->data = dsv3i_take(l, cache->width * dsv3_type_bytes(type), cache->layers, capacity, 1);
    return dsv3i_ok(error);
}

static dsv3_result dsv3i_cache_size(const dsv3_config *config, size_t layers, size_t capacity, dsv3_type type,
                                    size_t *bytes, dsv3_error *error) {
    DSV3I_SIZE(dsv3_cache, bytes, DSV3I_TRY(dsv3i_cache_layout(&it, config, layers, capacity, type, &l, error)));
}

static dsv3_result dsv3i_cache_init(dsv3_cache *cache, const dsv3_config *config, size_t layers, size_t capacity,
                                    dsv3_type type, void *memory, size_t bytes, dsv3_error *error) {
    DSV3I_INIT(cache, dsv3i_cache_size(config, layers, capacity, type, &need, error));
    return dsv3i_cache_layout(cache, config, layers, capacity, type, &l, error);
}

DSV3_API dsv3_result dsv3_cache_size(const dsv3_config *config, size_t capacity, dsv3_type type, size_t *bytes,
                                     dsv3_error *error) {
    return dsv3i_cache_size(config, 0, capacity, type, bytes, error);
}

DSV3_API dsv3_result dsv3_cache_init(const dsv3_config *config, dsv3_cache *cache, size_t capacity, dsv3_type type,
                                     void *memory, size_t bytes, dsv3_error *error) {
    return dsv3i_cache_init(cache, config, 0, capacity, type, memory, bytes, error);
}

DSV3_API dsv3_result dsv3_cache_truncate(dsv3_cache *cache, size_t length, dsv3_error *error) {
    if (cache == NULL) return dsv3i_fail_null(error, "cache");
    if (length > cache->length) {
        return dsv3i_fail_range(error, DSV3_ERR_ARG, "length", "is more than is filled", 0, (int64_t)cache->length,
                                (int64_t)length);
    }
    cache->length = length;
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_cache_copy(dsv3_cache *to, const dsv3_cache *from, dsv3_error *error) {
    DSV3I_NEED(1, to); DSV3I_NEED(1, from);
    if (to->type != from->type) return dsv3i_fail(error, DSV3_ERR_MISMATCH, "to", "is of another type");
    if (to->layers != from->layers || to->width != from->width) {
        return dsv3i_fail_numbers(error, DSV3_ERR_MISMATCH, "to", "has other layers and width", DSV3_NUMBERS_SHAPE,
                                  (int64_t)from->layers, (int64_t)from->width, (int64_t)to->layers, (int64_t)to->width);
    }
    DSV3I_TRY(dsv3i_check_least(error, DSV3_ERR_FULL, "to", "has too few positions", to->capacity, from->length));
    if (to == from) return dsv3i_ok(error);
    if (dsv3i_cache_overlap(to, from)) return dsv3i_fail(error, DSV3_ERR_ARG, "to", "lies over the memory of from");
    for (size_t i = 0; i < from->layers; i++) {
        DSV3_MEMCPY(dsv3i_cache_at(to, i, 0), dsv3i_cache_at(from, i, 0),
                    from->length * from->width * dsv3_type_bytes(from->type));
    }
    to->length = from->length;
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_cache_mtp_size(const dsv3_config *config, size_t capacity, dsv3_type type, size_t *bytes,
                                         dsv3_error *error) {
    return dsv3i_cache_size(config, 1, capacity, type, bytes, error);
}

DSV3_API dsv3_result dsv3_cache_mtp_init(const dsv3_config *config, dsv3_cache *cache, size_t capacity,
                                         dsv3_type type, void *memory, size_t bytes, dsv3_error *error) {
    return dsv3i_cache_init(cache, config, 1, capacity, type, memory, bytes, error);
}

/* ---- Workspaces */

/* Floats of scratch that the ops of a pass of n rows take, one after the other. */
static size_t dsv3i_pass_floats(const dsv3i_dims *m, size_t n, size_t threads) {
    size_t cols = dsv3i_max(dsv3i_max(m->D > 0 ? 2 * m->d : m->d, m->Ho), dsv3i_max(m->rq, m->rk)); /* eh_proj: 2 d */
    size_t floats;
    cols = dsv3i_max(dsv3i_max(cols, m->Fd), dsv3i_max(m->F, m->Fs));
    floats = dsv3i_max(dsv3i_linear_floats(n, cols, threads), dsv3i_mul(threads, dsv3i_attend_floats(m)));
    return dsv3i_max(floats, dsv3i_engine_pass_floats(m, n, threads));
}

/* Sizes of a pass of n rows. */
typedef struct dsv3i_pass_sizes {
    dsv3i_dims m;
    size_t one, n, threads, modules, H2, E1, E2, Kd, hidden, mlps, select, scratch, loss;
} dsv3i_pass_sizes;

#define DSV3I_PASS(p, t, n, r, c) DSV3I_ARRAY(dsv3i_workspace, dsv3i_pass_sizes, p, t, n, r, c)
static const dsv3i_array dsv3i_workspace_arrays[] = {DSV3I_WORKSPACE(DSV3I_PASS)};

static void dsv3i_workspace_layout(dsv3i_workspace *at, const dsv3_config *config, size_t n, size_t threads,
                                   dsv3i_layout *l) {
    const dsv3i_dims m = dsv3i_dims_of(config);
    const dsv3i_pass_sizes s = {
        m, 1, n, threads, m.D > 0 ? n : 0, 2 * m.H, m.E + 1, 2 * m.E, dsv3i_mul(m.K, m.d),
        dsv3i_max(dsv3i_add(dsv3i_mul(m.K, m.F), m.Fs), m.Fd), dsv3i_min(m.E, dsv3i_mul(n, m.K)) + 1, m.E + m.G + 1,
        dsv3i_pass_floats(&m, n, threads), dsv3i_loss_floats(m.V, n)};
    DSV3_MEMSET(at, 0, sizeof *at);
    at->rows = n;
    at->threads = threads;
    dsv3i_take_arrays(l, at, dsv3i_workspace_arrays, DSV3I_COUNT(dsv3i_workspace_arrays), &s);
    at->u_ffn = at->u; /* pairs of which nobody wants both */
    at->kv_raw = at->kv;
    at->q_raw = at->q_latent;
    at->h = at->h_gate;
}

/* The one that begins where l stands. */
static dsv3i_workspace dsv3i_workspace_make(dsv3_workspace *workspace, const dsv3_config *config, size_t n,
                                            size_t threads, dsv3i_layout *l) {
    dsv3_workspace made = {n, threads, NULL, NULL, NULL, NULL, dsv3i_fingerprint(config), 0};
    dsv3i_workspace ws;
    if (l->base != NULL) made.memory = l->base + l->used;
    dsv3i_workspace_layout(&ws, config, n, threads, l);
    made.sequence = ws.sequence;
    made.position = ws.position;
    *workspace = made;
    return ws;
}

DSV3_API dsv3_result dsv3_workspace_size(const dsv3_config *config, size_t rows, size_t threads, size_t *bytes,
                                         dsv3_error *error) {
    DSV3I_TRY(dsv3_config_check(config, error));
    DSV3I_TRY(dsv3i_check_count(error, "rows", rows, DSV3_MAX_SEQ));
    DSV3I_TRY(dsv3i_check_least(error, DSV3_ERR_ARG, "threads", "are none", threads, 1));
    DSV3I_SIZE(dsv3i_workspace, bytes, dsv3i_workspace_layout(&it, config, rows, threads, &l));
}

DSV3_API dsv3_result dsv3_workspace_init(const dsv3_config *config, dsv3_workspace *workspace, size_t rows,
                                         size_t threads, void *memory, size_t bytes, dsv3_error *error) {
    DSV3I_INIT(workspace, dsv3_workspace_size(config, rows, threads, &need, error));
    (void)dsv3i_workspace_make(workspace, config, rows, threads, &l);
    return dsv3i_ok(error);
}

static dsv3i_workspace dsv3i_workspace_of(const dsv3_workspace *workspace, const dsv3_config *config) {
    dsv3i_workspace ws;
    dsv3i_layout l = {dsv3i_layout_base(workspace->memory), 0};
    dsv3i_workspace_layout(&ws, config, workspace->rows, workspace->threads, &l);
    return ws;
}

/* ---- Sequences */

typedef struct dsv3i_sequence_sizes {
    size_t one, modules, drafts, drafting, tokens, text, states, d, V;
} dsv3i_sequence_sizes;
/* Part 0: a fork copies it. Part 1: it does not; the modules and the text are copied apart, as far as they go. One table
 * makes the layout and the copy: neither can forget any. */
#define DSV3I_SEQUENCE(X)                                                                                            \
    X(0, int32_t, token, tokens, one) X(0, uint64_t, drafted, drafts, one) X(0, uint64_t, accepted, drafts, one)     \
    X(0, float, log_p, tokens, one) X(0, float, entropy, tokens, one)                                                \
    X(1, dsv3_cache, modules, modules, one) X(1, int32_t, history, text, one) X(1, struct dsv3i_sequence, own, one, one)

#define DSV3I_OF_SEQUENCE(p, t, n, r, c) DSV3I_ARRAY(dsv3_sequence, dsv3i_sequence_sizes, p, t, n, r, c)
#define DSV3I_OF_DRAFTER(p, t, n, r, c) DSV3I_ARRAY(dsv3i_sequence, dsv3i_sequence_sizes, p, t, n, r, c)
static const dsv3i_array dsv3i_sequence_arrays[] = {DSV3I_SEQUENCE(DSV3I_OF_SEQUENCE)};
static const dsv3i_array dsv3i_drafter_arrays[] = {DSV3I_DRAFTER(DSV3I_OF_DRAFTER)};

static dsv3i_sequence_sizes dsv3i_sequence_sizes_of(const dsv3_sequence *s, const dsv3i_sequence *own,
                                                    size_t capacity, size_t V) {
    const size_t drafts = s->max_drafts, states = dsv3i_mul(s->n_modules, own->window);
    const size_t text = dsv3i_add(capacity, 1);
    const dsv3i_sequence_sizes z = {1, s->n_modules, drafts, drafts > 0, drafts + 1, text, states, own->d, V};
    return z;
}

static void dsv3i_sequence_layout(dsv3_sequence *s, const dsv3_model *model, size_t capacity, dsv3_type type,
                                  size_t rows, size_t drafts, dsv3i_layout *l) {
    dsv3i_sequence own;
    dsv3i_sequence_sizes z;
    DSV3_MEMSET(&own, 0, sizeof own);
    s->n_modules = dsv3i_min(drafts, (size_t)model->n_mtp);
    s->max_drafts = s->n_modules > 0 ? drafts : 0;
    s->rows = rows;
    own.made_for = dsv3i_fingerprint(&model->config);
    own.d = (size_t)model->config.hidden_size;
    own.window = dsv3i_add(dsv3i_max(rows, s->max_drafts + 1), s->n_modules + 2);
    z = dsv3i_sequence_sizes_of(s, &own, capacity, (size_t)model->config.vocab_size);
    dsv3i_take_arrays(l, s, dsv3i_sequence_arrays, DSV3I_COUNT(dsv3i_sequence_arrays), &z);
    dsv3i_take_arrays(l, &own, dsv3i_drafter_arrays, DSV3I_COUNT(dsv3i_drafter_arrays), &z);
    if (l->base != NULL) *s->own = own;
    (void)dsv3i_cache_layout(&s->cache, &model->config, 0, capacity, type, l, NULL);
    for (size_t k = 0; k < s->n_modules; k++) {
        dsv3_cache cache;
        (void)dsv3i_cache_layout(&cache, &model->config, 1, capacity, type, l, NULL);
        if (l->base != NULL) s->modules[k] = cache;
    }
}

DSV3_API dsv3_result dsv3_sequence_size(const dsv3_model *model, size_t capacity, dsv3_type type, size_t rows,
                                        size_t drafts, size_t *bytes, dsv3_error *error) {
    if (model == NULL) return dsv3i_fail_null(error, "model");
    DSV3I_TRY(dsv3i_check_count(error, "rows", rows, DSV3_MAX_SEQ));
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_LIMIT, "drafts", "are more than a step can have",
                                  (int64_t)drafts, 0, DSV3_MAX_DRAFTS));
    DSV3I_TRY(dsv3_cache_size(&model->config, capacity, type, bytes, error)); /* checks the rest */
    DSV3I_SIZE(dsv3_sequence, bytes, dsv3i_sequence_layout(&it, model, capacity, type, rows, drafts, &l));
}

DSV3_API dsv3_result dsv3_sequence_init(const dsv3_model *model, dsv3_sequence *s, size_t capacity, dsv3_type type,
                                        size_t rows, size_t drafts, void *memory, size_t bytes, dsv3_error *error) {
    DSV3I_INIT(s, dsv3_sequence_size(model, capacity, type, rows, drafts, &need, error));
    DSV3_MEMSET(s, 0, sizeof *s);
    dsv3i_sequence_layout(s, model, capacity, type, rows, drafts, &l);
    s->top_p = 1.0f;
    s->rng.state = 1;
    s->drafts = s->max_drafts;
    s->draft_cost = 0.25f;
    s->stop = model->config.eos_token_id;
    s->limit = SIZE_MAX;
    for (size_t j = 0; j < s->max_drafts; j++) {
        s->drafted[j] = s->accepted[j] = 0;
        s->own->rate[j] = DSV3I_RATE;
    }
    DSV3_MEMSET(s->log_p, 0, (s->max_drafts + 1) * sizeof *s->log_p);
    DSV3_MEMSET(s->entropy, 0, (s->max_drafts + 1) * sizeof *s->entropy);
    return dsv3i_ok(error);
}

/* A struct that has just been copied from another keeps the arrays that it had, and part 0 of what the other's hold. */
static void dsv3i_keep_arrays(void *to, const void *had, const dsv3i_array *list, size_t count, const void *sizes) {
    for (size_t i = 0; i < count; i++) {
        size_t bytes = list[i].size * dsv3i_size_at(sizes, list[i].rows) * dsv3i_size_at(sizes, list[i].columns);
        unsigned char *place = (unsigned char *)to + list[i].at;
        void *array, *from;
        DSV3_MEMCPY(&from, place, sizeof from);
        DSV3_MEMCPY(&array, (const unsigned char *)had + list[i].at, sizeof array);
        DSV3_MEMCPY(place, &array, sizeof array);
        if (list[i].part == 0 && bytes > 0) DSV3_MEMCPY(array, from, bytes);
    }
}

DSV3_API dsv3_result dsv3_sequence_copy(dsv3_sequence *to, const dsv3_sequence *s, dsv3_error *error) {
    dsv3_sequence had; /* its memory; everything else is copied */
    dsv3i_sequence own;
    dsv3i_sequence_sizes z;
    size_t need;
    DSV3I_TRY(dsv3i_sequence_check(to, "to", error));
    DSV3I_TRY(dsv3i_sequence_check(s, "from", error));
    if (to == s) return dsv3i_ok(error);
    if (to->own->made_for != s->own->made_for || to->n_modules != s->n_modules || to->max_drafts != s->max_drafts ||
        to->own->window != s->own->window) {
        return dsv3i_fail(error, DSV3_ERR_MISMATCH, "to", "was made for another model, rows or drafts");
    }
    need = dsv3_sequence_length(s) + s->prompt_left - (s->prompt_left == 0 && s->pending);
    DSV3I_TRY(dsv3i_check_least(error, DSV3_ERR_FULL, "to", "has too few positions", to->cache.capacity, need));
    DSV3I_TRY(dsv3_cache_copy(&to->cache, &s->cache, error));
    for (size_t k = 0; k < to->n_modules; k++) DSV3I_TRY(dsv3_cache_copy(&to->modules[k], &s->modules[k], error));
    DSV3_MEMCPY(to->history, s->history, dsv3_sequence_length(s) * sizeof *s->history);
    z = dsv3i_sequence_sizes_of(s, s->own, 0, 0);
    had = *to;
    own = *to->own;
    *to->own = *s->own;
    dsv3i_keep_arrays(to->own, &own, dsv3i_drafter_arrays, DSV3I_COUNT(dsv3i_drafter_arrays), &z);
    *to = *s;
    to->cache = had.cache;
    dsv3i_keep_arrays(to, &had, dsv3i_sequence_arrays, DSV3I_COUNT(dsv3i_sequence_arrays), &z);
    to->cache.length = s->cache.length;
    return dsv3i_ok(error);
}

#ifndef DSV3_NO_TRAINING
/* ---- Training: the balancer, parameters, and the trainer with all that it keeps */

static void dsv3i_balancer_layout(dsv3_balancer *b, const dsv3_config *config, dsv3i_layout *l) {
    dsv3i_dims m = dsv3i_dims_of(config);
    b->layers = m.L + m.D;
    b->experts = m.E;
    b->load = (uint64_t *)dsv3i_take(l, sizeof *b->load, b->layers, m.E, 1);
    b->load_all = (uint64_t *)dsv3i_take(l, sizeof *b->load_all, b->layers, m.E, 1);
}

DSV3_API dsv3_result dsv3_balancer_size(const dsv3_config *config, size_t *bytes, dsv3_error *error) {
    DSV3I_NEED(1, config);
    const int64_t L = config->num_hidden_layers, D = config->num_nextn_predict_layers, E = config->n_routed_experts;
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "num_hidden_layers", "is out of range", L, 1, DSV3_MAX_LAYERS));
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "num_nextn_predict_layers", "is out of range", D, 0, DSV3_MAX_LAYERS - L));
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "n_routed_experts", "is out of range", E, 0, DSV3_MAX_EXPERTS));
    DSV3I_SIZE(dsv3_balancer, bytes, dsv3i_balancer_layout(&it, config, &l));
}

DSV3_API dsv3_result dsv3_balancer_init(const dsv3_config *config, dsv3_balancer *balancer, void *memory,
                                        size_t bytes, dsv3_error *error) {
    DSV3I_INIT(balancer, dsv3_balancer_size(config, &need, error));
    DSV3_MEMSET(balancer, 0, sizeof *balancer);
    balancer->schedule.speed = 0.001;
    dsv3i_balancer_layout(balancer, config, &l);
    DSV3_MEMSET(l.base, 0, l.used);
    return dsv3i_ok(error);
}

static void dsv3i_parameters_layout(dsv3_parameters *q, const dsv3_config *config, dsv3i_layout *l) {
    dsv3i_flat none = {NULL, 0, 0, NULL}, flat = {NULL, 0, 0, NULL};
    dsv3_model *model = &q->model;
    (void)dsv3i_walk_parameters(config, NULL, &none, dsv3i_flat_tensor);
    q->count = none.count;
    dsv3i_model_layout(model, config, l);
    q->data = flat.data = (float *)dsv3i_take_rows(l, sizeof *q->data, q->count, 1);
    if (l->base == NULL) return;
    DSV3_MEMSET(q->data, 0, q->count * sizeof *q->data);
    (void)dsv3i_walk_parameters(config, model, &flat, dsv3i_flat_tensor);
    if (config->tie_word_embeddings) model->lm_head = model->embed_tokens;
    for (model->n_mtp = 0; model->n_mtp < config->num_nextn_predict_layers; model->n_mtp++) {
        model->mtp[model->n_mtp].embed_tokens = model->embed_tokens;
        model->mtp[model->n_mtp].shared_head_head = model->lm_head;
    }
}

DSV3_API dsv3_result dsv3_parameters_size(const dsv3_config *config, size_t *bytes, dsv3_error *error) {
    DSV3I_TRY(dsv3_config_check(config, error));
    DSV3I_SIZE(dsv3_parameters, bytes, dsv3i_parameters_layout(&it, config, &l));
}

DSV3_API dsv3_result dsv3_parameters_init(const dsv3_config *config, dsv3_parameters *parameters, void *memory,
                                          size_t bytes, dsv3_error *error) {
    DSV3I_INIT(parameters, dsv3_parameters_size(config, &need, error));
    DSV3_MEMSET(parameters, 0, sizeof *parameters);
    dsv3i_parameters_layout(parameters, config, &l);
    return dsv3i_ok(error);
}

/* The part of a workspace that each depth has of its own: its rows, from their tokens to what its head is given. */
#define DSV3I_DEPTH(X)                                                                                               \
    X(int32_t, row_token, n, 1) X(uint8_t, row_mask, n, 1) X(size_t, row_index, n, 1) X(int32_t, sequence, n, 1)     \
    X(int32_t, position, n, 1) X(int32_t, leader, n, 1) X(float, cos_sin, n, m->dr) X(float, x, n, m->d)             \
    X(float, u, n, m->d)

static void dsv3i_depth_layout(dsv3i_depth *depth, const dsv3i_workspace *shared, const dsv3i_dims *m, size_t n,
                               dsv3i_layout *l) {
    dsv3i_workspace *at = &depth->ws;
    *at = *shared;
    DSV3I_DEPTH(DSV3I_TAKE)
    depth->from = (size_t *)dsv3i_take_rows(l, sizeof(size_t), n, 1);
    depth->du = (float *)dsv3i_take_rows(l, sizeof(float), n, m->d);
}

static size_t dsv3i_hidden_floats(const dsv3i_dims *m, int is_moe) {
    return is_moe ? dsv3i_add(dsv3i_mul(m->K, m->F), m->Fs) : m->Fd;
}

static void dsv3i_saved_layout(dsv3i_saved *at, const dsv3i_dims *m, size_t n, int is_moe, int32_t keep, dsv3i_layout *l) {
    size_t hidden = dsv3i_hidden_floats(m, is_moe), moe = is_moe ? n : 0, norms = keep & DSV3_KEEP_NORMS ? n : 0;
    size_t queries = keep & DSV3_KEEP_UP_PROJECTIONS ? n : 0, swiglu = keep & DSV3_KEEP_SWIGLU ? n : 0;
    at->x_in = (float *)dsv3i_take_rows(l, sizeof(float), n, m->d);
    DSV3I_SAVED(DSV3I_TAKE)
}

static void dsv3i_backward_layout(dsv3i_backward *at, const dsv3i_dims *m, size_t n, dsv3i_layout *l) {
    size_t hidden = dsv3i_max(dsv3i_hidden_floats(m, 1), m->Fd);
    DSV3I_BACKWARD(DSV3I_TAKE)
}

#define DSV3I_TRAINER(X)                                                                                             \
    X(float, m, flat.count, 1) X(float, v, flat.count, 1) X(float, ema, s->ema ? flat.count : 0, 1)                  \
    X(double, losses.nll, depths, 1) X(uint64_t, losses.targets, depths, 1) X(double, losses.balance, layers, 3)     \
    X(dsv3i_trainer, own, 1, 1)

/* Laid out for nobody: the elements of arrays that do not exist yet. */
typedef struct dsv3i_nobody {
    dsv3i_trainer own;
    dsv3_cache cache;
    dsv3i_saved saved;
    dsv3i_depth depth;
    dsv3i_backward backward;
} dsv3i_nobody;

static void dsv3i_trainer_own_layout(dsv3i_trainer *at, const dsv3_config *c, const dsv3_training *s,
                                     const dsv3i_workspace *ws, dsv3i_flat flat, dsv3i_layout *l) {
    dsv3i_dims m = dsv3i_dims_of(c);
    size_t n = s->rows, layers = m.L + m.D, depths = 1 + m.D;
    int exists = l->base != NULL;
    dsv3i_nobody nobody;
    if (!exists) at = &nobody.own;
    DSV3I_OWN(DSV3I_TAKE)
    for (size_t i = 0; i < s->sequences; i++) {
        (void)dsv3i_cache_layout(exists ? &at->caches[i] : &nobody.cache, c, 1, s->longest, DSV3_F32, l, NULL);
    }
    for (size_t i = 0; i < layers; i++) {
        int32_t keep = s->keep_layers != NULL ? s->keep_layers[i] : s->keep;
        dsv3i_saved_layout(exists ? &at->saved[i] : &nobody.saved, &m, n, dsv3_config_is_moe(c, (int32_t)i), keep, l);
    }
    for (size_t k = 0; k < depths; k++) dsv3i_depth_layout(exists ? &at->depth[k] : &nobody.depth, ws, &m, n, l);
    dsv3i_backward_layout(exists ? at->backward : &nobody.backward, &m, n, l);
}

static void dsv3i_trainer_layout(dsv3_trainer *at, const dsv3_config *c, const dsv3_training *s, size_t threads,
                                 dsv3i_layout *l) {
    size_t layers = (size_t)c->num_hidden_layers + (size_t)c->num_nextn_predict_layers;
    size_t depths = 1 + (size_t)c->num_nextn_predict_layers;
    dsv3i_flat flat = {NULL, 0, 0, NULL};
    dsv3i_workspace ws;
    (void)dsv3i_walk_parameters(c, NULL, &flat, dsv3i_flat_tensor);
    dsv3i_parameters_layout(&at->weights, c, l);
    dsv3i_parameters_layout(&at->gradients, c, l);
    dsv3i_balancer_layout(&at->balancer, c, l);
    ws = dsv3i_workspace_make(&at->workspace, c, s->rows, threads, l);
    DSV3I_TRAINER(DSV3I_TAKE)
    dsv3i_trainer_own_layout(at->own, c, s, &ws, flat, l);
}

DSV3_API dsv3_result dsv3_trainer_size(const dsv3_config *config, const dsv3_training *s, size_t threads,
                                       size_t *bytes, dsv3_error *error) {
    DSV3I_TRY(dsv3_config_check(config, error));
    if (s == NULL) return dsv3i_fail_null(error, "settings");
    DSV3I_TRY(dsv3i_check_count(error, "rows", s->rows, DSV3_MAX_SEQ));
    DSV3I_TRY(dsv3i_check_count(error, "sequences", s->sequences, (int64_t)s->rows));
    DSV3I_TRY(dsv3i_check_count(error, "longest", s->longest, DSV3_MAX_SEQ));
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "keep", "is not a sum of dsv3_keep", s->keep, 0, 7));
    for (int32_t i = 0; s->keep_layers != NULL && i < config->num_hidden_layers + config->num_nextn_predict_layers; i++) {
        DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "keep_layers", "is not a sum of dsv3_keep", s->keep_layers[i], 0, 7));
    }
    DSV3I_TRY(dsv3i_check_least(error, DSV3_ERR_ARG, "threads", "are none", threads, 1));
    DSV3I_SIZE(dsv3_trainer, bytes, dsv3i_trainer_layout(&it, config, s, threads, &l));
}

DSV3_API dsv3_result dsv3_trainer_init(const dsv3_config *config, dsv3_trainer *t, const dsv3_training *settings,
                                       size_t threads, void *memory, size_t bytes, dsv3_error *error) {
    DSV3I_INIT(t, dsv3_trainer_size(config, settings, threads, &need, error));
    size_t n;
    DSV3_MEMSET(t, 0, sizeof *t);
    dsv3i_trainer_layout(t, config, settings, threads, &l);
    t->settings = *settings;
    t->own->most_rows = settings->rows;
    t->own->most_sequences = settings->sequences;
    n = t->weights.count * sizeof(float);
    DSV3_MEMSET(t->m, 0, n);
    DSV3_MEMSET(t->v, 0, n);
    if (t->ema != NULL) DSV3_MEMSET(t->ema, 0, n);
    DSV3_MEMSET(t->balancer.load_all, 0, t->balancer.layers * t->balancer.experts * sizeof *t->balancer.load_all);
    t->balancer.schedule.speed = 0.001;
    t->losses.depths = (size_t)config->num_nextn_predict_layers;
    t->losses.device = t->losses.balance + t->balancer.layers;
    t->losses.communication = t->losses.device + t->balancer.layers;
    dsv3i_train_clear(t);
    t->own->stage = 0;
    return dsv3i_ok(error);
}
#endif

/* ========================================================================================================
 * Chapter 16  >>save
 *
 * A cache, a sequence or a training run as bytes. All numbers are little-endian; one that is not in an array is a word of
 * 8 bytes, and an array is filled up to whole words with zeros:
 *     "dsv3save"  version  kind  bytes in all  tag     the header
 *     the config's fields                              floats by their bits
 *     the object                                       what must agree, then what is filled
 *     checksum                                         of all words before it
 * For each kind one function names the parts in their order. It is run to measure, to write, to check and to read, so
 * that these cannot disagree: every part goes through dsv3i_save_word or dsv3i_save_array, which know what is to be done.
 * Bytes are checked as a whole before anything is read. The checksum finds damage, not malice: whoever can write a file
 * can write a valid one, so lengths, tokens and places are checked as well. Test: tests/test_state.c.
 * ==================================================================================================== */

#define DSV3I_SAVE_MAGIC 0x6576617333767364u /* "dsv3save" */
#define DSV3I_SAVE_VERSION 1u
#define DSV3I_SAVE_HEADER 40u /* bytes */

enum { DSV3I_SAVE_CACHE = 1, DSV3I_SAVE_SEQUENCE = 2, DSV3I_SAVE_TRAINER = 3 };

typedef enum dsv3i_save_mode {
    DSV3I_SAVE_MEASURE,
    DSV3I_SAVE_WRITE,
    DSV3I_SAVE_CHECK, /* words are taken from the bytes, arrays are passed over */
    DSV3I_SAVE_READ
} dsv3i_save_mode;

/* Of a trainer, what is saved. */
typedef struct dsv3i_save_state {
    float *array[4];    /* [count] weights, moments, moving average or NULL */
    uint64_t *load_all; /* [loads] */
    size_t count, loads;
    uint64_t step;
} dsv3i_save_state;

typedef struct dsv3i_save {
    dsv3i_save_mode mode;
    size_t kind;
    uint64_t tag;
    const dsv3_config *config; /* NULL: only measured */
    void (*walk)(struct dsv3i_save *f, void *object); /* the function of this kind: names its parts */
    unsigned char *to;
    const unsigned char *from; /* [bytes], either; NULL */
    size_t bytes, at;
    dsv3_error *error;
    dsv3_result result; /* the first that is wrong: from then on nothing moves */
    union {
        dsv3_cache cache;
        dsv3_sequence sequence;
        dsv3i_save_state state;
    } copy; /* of the object: what is checked or written, so that only reading changes it */
} dsv3i_save;

/* n numbers of size bytes each, between memory and little-endian bytes; the same way in both directions. */
static void dsv3i_save_copy(void *to, const void *from, size_t size, size_t n) {
    const uint16_t one = 1;
    unsigned char low;
    DSV3_MEMCPY(&low, &one, 1);
    if (low == 1) {
        DSV3_MEMCPY(to, from, size * n);
        return;
    }
    for (size_t i = 0; i < size * n; i++) {
        ((unsigned char *)to)[i] = ((const unsigned char *)from)[i - i % size + (size - 1 - i % size)];
    }
}

static uint64_t dsv3i_save_get(const unsigned char *from) {
    uint64_t x;
    dsv3i_save_copy(&x, from, sizeof x, 1);
    return x;
}

/* Of whole words. Each step can be undone, in the sum and in the word: one word altered alters the sum. */
static uint64_t dsv3i_save_sum(const unsigned char *from, size_t bytes) {
    uint64_t sum = DSV3I_SAVE_MAGIC;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        sum = (sum ^ dsv3i_save_get(from + i)) * 0x9E3779B97F4A7C15u;
        sum ^= sum >> 32;
    }
    return sum;
}

/* Moves on by `bytes`, filled up to words, if there are so many. */
static int dsv3i_save_next(dsv3i_save *f, size_t bytes) {
    size_t end = dsv3i_add(f->at, dsv3i_mul(dsv3i_blocks(bytes, 8), 8));
    if (f->result != DSV3_OK) return 0;
    if (f->mode != DSV3I_SAVE_MEASURE && end > f->bytes) {
        f->result = dsv3i_fail_range(f->error, DSV3_ERR_DAMAGED, "bytes", "are fewer than their contents need",
                                     (int64_t)end, (int64_t)end, (int64_t)f->bytes);
        return 0;
    }
    f->at = end;
    return 1;
}

static void dsv3i_save_array(dsv3i_save *f, void *array, size_t size, size_t n) {
    size_t begin = f->at, bytes = dsv3i_mul(size, n);
    if (!dsv3i_save_next(f, bytes) || n == 0) return;
    if (f->mode == DSV3I_SAVE_READ) dsv3i_save_copy(array, f->from + begin, size, n);
    if (f->mode != DSV3I_SAVE_WRITE) return;
    DSV3_MEMSET(f->to + f->at - 8, 0, 8);
    dsv3i_save_copy(f->to + begin, array, size, n);
}

/* Writes x and returns it, or returns what was written. */
static uint64_t dsv3i_save_word(dsv3i_save *f, uint64_t x) {
    size_t begin = f->at;
    if (!dsv3i_save_next(f, 8)) return x;
    if (f->mode == DSV3I_SAVE_WRITE) dsv3i_save_copy(f->to + begin, &x, 8, 1);
    return f->from != NULL ? dsv3i_save_get(f->from + begin) : x;
}

static float dsv3i_save_float(dsv3i_save *f, float x) {
    return dsv3i_float((uint32_t)dsv3i_save_word(f, dsv3i_bits(x)));
}

static int32_t dsv3i_save_int(dsv3i_save *f, int32_t x) { return (int32_t)(uint32_t)dsv3i_save_word(f, (uint32_t)x); }

/* A word that must lie between low and high: else they are expected, and code is what to make of it. */
static size_t dsv3i_save_between(dsv3i_save *f, const char *name, size_t x, size_t low, size_t high, dsv3_result code) {
    uint64_t found = dsv3i_save_word(f, x);
    const char *why = code == DSV3_ERR_MISMATCH ? "is not what was saved" : "of what was saved is out of bounds";
    if (f->result != DSV3_OK || f->from == NULL || (found >= low && found <= high)) return (size_t)found;
    f->result = dsv3i_fail_range(f->error, code, name, why, (int64_t)low, (int64_t)high, (int64_t)found);
    return x;
}

static void dsv3i_save_same(dsv3i_save *f, const char *name, size_t x) {
    (void)dsv3i_save_between(f, name, x, x, x, DSV3_ERR_MISMATCH);
}

/* The fields that change results, or which weights there are. */
#define DSV3I_SAVE_FIELDS(INT, FLOAT)                                                                                \
    INT(vocab_size) INT(hidden_size) INT(intermediate_size) INT(moe_intermediate_size) INT(num_hidden_layers)        \
    INT(num_nextn_predict_layers) INT(first_k_dense_replace) INT(moe_layer_freq) INT(num_attention_heads)            \
    INT(q_lora_rank) INT(kv_lora_rank) INT(qk_nope_head_dim) INT(qk_rope_head_dim) INT(v_head_dim)                   \
    INT(n_routed_experts) INT(n_shared_experts) INT(num_experts_per_tok) INT(n_group) INT(topk_group)                \
    INT(scoring_func) INT(topk_method) INT(norm_topk_prob) INT(rope_scaling.type)                                    \
    INT(rope_scaling.original_max_position_embeddings) INT(rope_scaling.truncate) INT(rope_interleave)               \
    INT(tie_word_embeddings) INT(group_mask)                                                                         \
    INT(gate_scaling) INT(bias_form) INT(mtp_concat) INT(mtp_hidden) FLOAT(routed_scaling_factor)                    \
    FLOAT(rms_norm_eps) FLOAT(latent_norm_eps) FLOAT(rope_theta) FLOAT(rope_scaling.factor)                          \
    FLOAT(rope_scaling.beta_fast) FLOAT(rope_scaling.beta_slow) FLOAT(rope_scaling.mscale)                           \
    FLOAT(rope_scaling.mscale_all_dim)
#define DSV3I_SAVE_INT(field) (uint32_t)c->field,
#define DSV3I_SAVE_FLOAT(field) dsv3i_bits(c->field),
#define DSV3I_SAVE_NAME(field) #field "\0"
#define DSV3I_SAVE_YES(field) 1,
#define DSV3I_SAVE_NO(field) 0,

static void dsv3i_save_config(dsv3i_save *f) {
    const char *name = DSV3I_SAVE_FIELDS(DSV3I_SAVE_NAME, DSV3I_SAVE_NAME); /* one behind the other */
    static const uint8_t is_float[] = {DSV3I_SAVE_FIELDS(DSV3I_SAVE_NO, DSV3I_SAVE_YES)};
    const dsv3_config *c = f->config;
    if (c == NULL) {
        (void)dsv3i_save_next(f, 8 * sizeof is_float);
        return;
    }
    const uint32_t value[] = {DSV3I_SAVE_FIELDS(DSV3I_SAVE_INT, DSV3I_SAVE_FLOAT)};
    for (size_t i = 0; i < sizeof is_float && f->result == DSV3_OK; i++) {
        dsv3i_save_same(f, name, value[i]);
        if (f->result != DSV3_OK && is_float[i] && f->error != NULL) f->error->numbers = DSV3_NUMBERS_NONE; /* bits */
        while (*name++ != '\0') {
        }
    }
}

/* From the first byte to the last. */
static dsv3_result dsv3i_save_run(dsv3i_save *f, dsv3i_save_mode mode, void *object) {
    uint64_t tag;
    f->mode = mode;
    f->at = 0;
    f->result = DSV3_OK;
    (void)dsv3i_save_word(f, DSV3I_SAVE_MAGIC);
    (void)dsv3i_save_word(f, DSV3I_SAVE_VERSION);
    dsv3i_save_same(f, "kind", f->kind);
    (void)dsv3i_save_word(f, f->bytes);
    tag = dsv3i_save_word(f, f->tag);
    dsv3i_save_config(f); /* a field says more than the tag */
    if (tag != f->tag && f->result == DSV3_OK) {
        f->result = dsv3i_fail(f->error, DSV3_ERR_MISMATCH, "tag", "is not what was saved: other weights, perhaps");
    }
    f->walk(f, object);
    if (mode == DSV3I_SAVE_CHECK && f->result == DSV3_OK && f->at + 8 != f->bytes) {
        f->result = dsv3i_fail_range(f->error, DSV3_ERR_DAMAGED, "bytes", "are more than their contents need",
                                     (int64_t)(f->at + 8), (int64_t)(f->at + 8), (int64_t)f->bytes);
    }
    (void)dsv3i_save_word(f, mode == DSV3I_SAVE_WRITE ? dsv3i_save_sum(f->to, f->at) : 0);
    return f->result;
}

static dsv3i_save dsv3i_save_of(size_t kind, const dsv3_config *config, uint64_t tag,
                                void (*walk)(dsv3i_save *f, void *object), dsv3_error *error) {
    dsv3i_save f;
    DSV3_MEMSET(&f, 0, sizeof f);
    f.kind = kind;
    f.config = config;
    f.tag = tag;
    f.walk = walk;
    f.error = error;
    return f;
}

static dsv3_result dsv3i_save_size(dsv3i_save *f, size_t *bytes) {
    if (bytes == NULL) return dsv3i_fail_null(f->error, "bytes");
    (void)dsv3i_save_run(f, DSV3I_SAVE_MEASURE, &f->copy);
    *bytes = f->at < SIZE_MAX ? f->at : 0;
    if (f->at < SIZE_MAX) return dsv3i_ok(f->error);
    return dsv3i_fail(f->error, DSV3_ERR_OVERFLOW, "bytes", "are more than size_t can count");
}

static dsv3_result dsv3i_save_write(dsv3i_save *f, void *data, size_t bytes) {
    if (data == NULL) return dsv3i_fail_null(f->error, "data");
    DSV3I_TRY(dsv3i_save_size(f, &f->bytes));
    DSV3I_TRY(dsv3i_check_least(f->error, DSV3_ERR_MEMORY, "data", "is too small", bytes, f->bytes));
    f->to = (unsigned char *)data;
    return dsv3i_save_run(f, DSV3I_SAVE_WRITE, &f->copy);
}

/* Are these bytes what was once written, whatever it was? */
static dsv3_result dsv3i_save_open(dsv3i_save *f, const void *data, size_t bytes) {
    uint64_t version, whole;
    if (data == NULL) return dsv3i_fail(f->error, DSV3_ERR_ARG, "data", "is NULL");
    f->from = (const unsigned char *)data;
    f->bytes = bytes;
    if (bytes < DSV3I_SAVE_HEADER || dsv3i_save_get(f->from) != DSV3I_SAVE_MAGIC) {
        return dsv3i_fail(f->error, DSV3_ERR_DAMAGED, "data", "is nothing that was saved, or not all of it");
    }
    version = dsv3i_save_get(f->from + 8);
    if (version != DSV3I_SAVE_VERSION) {
        return dsv3i_fail_range(f->error, DSV3_ERR_UNSUPPORTED, "version", "of what was saved is not known",
                                DSV3I_SAVE_VERSION, DSV3I_SAVE_VERSION, (int64_t)version);
    }
    whole = dsv3i_save_get(f->from + 24);
    if (whole != bytes) {
        return dsv3i_fail_range(f->error, DSV3_ERR_DAMAGED, "bytes", "are not as many as were saved", (int64_t)whole,
                                (int64_t)whole, (int64_t)bytes);
    }
    if (bytes % 8 != 0 || dsv3i_save_get(f->from + bytes - 8) != dsv3i_save_sum(f->from, bytes - 8)) {
        return dsv3i_fail(f->error, DSV3_ERR_DAMAGED, "data", "has been altered: its checksum does not fit");
    }
    return DSV3_OK;
}

/* Checks the bytes with the copy, then reads them into the object. */
static dsv3_result dsv3i_save_load(dsv3i_save *f, void *object, const void *data, size_t bytes) {
    DSV3I_TRY(dsv3i_save_open(f, data, bytes));
    DSV3I_TRY(dsv3i_save_run(f, DSV3I_SAVE_CHECK, &f->copy));
    (void)dsv3i_save_run(f, DSV3I_SAVE_READ, object);
    return dsv3i_ok(f->error);
}

/* ---- A cache: the positions that are filled, layer by layer. What the three calls of a kind begin with is one function */

static void dsv3i_save_cache(dsv3i_save *f, dsv3_cache *c) {
    dsv3i_save_same(f, "type", (size_t)c->type);
    dsv3i_save_same(f, "layers", c->layers);
    dsv3i_save_same(f, "width", c->width);
    c->length = dsv3i_save_between(f, "length", c->length, 0, c->capacity, DSV3_ERR_FULL);
    for (size_t i = 0; i < c->layers; i++) {
        int moves = f->mode == DSV3I_SAVE_READ || f->mode == DSV3I_SAVE_WRITE; /* before that, sizes may be any */
        dsv3i_save_array(f, moves ? dsv3i_cache_at(c, i, 0) : NULL, dsv3_type_bytes(c->type), c->length * c->width);
    }
}

static void dsv3i_save_cache_walk(dsv3i_save *f, void *object) { dsv3i_save_cache(f, (dsv3_cache *)object); }

static dsv3_result dsv3i_save_cache_begin(dsv3i_save *f, dsv3i_save_mode mode, const dsv3_config *config,
                                          const dsv3_cache *cache, uint64_t tag, dsv3_error *error) {
    *f = dsv3i_save_of(DSV3I_SAVE_CACHE, config, tag, dsv3i_save_cache_walk, error);
    DSV3I_NEED(1, cache);
    f->copy.cache = *cache;
    if (mode == DSV3I_SAVE_MEASURE) return DSV3_OK;
    DSV3I_NEED(1, config);
    if (cache->width == dsv3i_dims_of(config).width &&
        (cache->layers == 1 || cache->layers == (size_t)config->num_hidden_layers)) {
        return DSV3_OK;
    }
    return dsv3i_fail(error, DSV3_ERR_MISMATCH, "cache", "was made for another model");
}

DSV3_API dsv3_result dsv3_cache_save_size(const dsv3_cache *cache, size_t *bytes, dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_cache_begin(&f, DSV3I_SAVE_MEASURE, NULL, cache, 0, error));
    return dsv3i_save_size(&f, bytes);
}

DSV3_API dsv3_result dsv3_cache_save(const dsv3_config *config, const dsv3_cache *cache, uint64_t tag, void *data,
                                     size_t bytes, dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_cache_begin(&f, DSV3I_SAVE_WRITE, config, cache, tag, error));
    return dsv3i_save_write(&f, data, bytes);
}

DSV3_API dsv3_result dsv3_cache_load(const dsv3_config *config, dsv3_cache *cache, uint64_t tag, const void *data,
                                     size_t bytes, dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_cache_begin(&f, DSV3I_SAVE_READ, config, cache, tag, error));
    return dsv3i_save_load(&f, cache, data, bytes);
}

/* ---- A sequence. Of its ring of states what is known is saved, by position: it may be of another length where it is
 * loaded */

/* Tokens are checked. */
static void dsv3i_save_tokens(dsv3i_save *f, const char *name, int32_t *token, size_t n) {
    size_t V = f->config != NULL ? (size_t)f->config->vocab_size : 1;
    for (size_t i = 0; i < n && f->result == DSV3_OK; i++) {
        size_t id = f->mode == DSV3I_SAVE_WRITE ? (size_t)token[i] : 0;
        id = dsv3i_save_between(f, name, id, 0, V - 1, DSV3_ERR_DAMAGED);
        if (f->mode == DSV3I_SAVE_READ) token[i] = (int32_t)id;
    }
}

/* States h^depth at positions [begin, end), of which those from `first` on have a place. */
static void dsv3i_save_hidden(dsv3i_save *f, const dsv3_sequence *s, size_t depth, size_t begin, size_t end,
                              size_t first) {
    for (size_t i = begin; i < end && depth < s->n_modules; i++) {
        if (i < first) (void)dsv3i_save_next(f, s->own->d * sizeof(float));
        if (i >= first) dsv3i_save_array(f, dsv3i_hidden(s, depth, i), sizeof(float), s->own->d);
    }
}

static void dsv3i_save_states(dsv3i_save *f, dsv3_sequence *s) {
    size_t N = s->cache.length, length = N + (size_t)s->pending, oldest = N, begin, first, top = s->own->top;
    if (s->n_modules == 0) return; /* there is no ring */
    begin = dsv3i_save_between(f, "begin", dsv3i_sub(top, s->own->window), 0, N, DSV3_ERR_DAMAGED);
    top = dsv3i_save_between(f, "top", top, length, SIZE_MAX / 2, DSV3_ERR_DAMAGED);
    if (begin > 0) top = dsv3i_max(top, begin + s->own->window); /* longer rings have nothing before `begin` either */
    if (f->mode == DSV3I_SAVE_READ) s->own->top = top;
    first = dsv3i_sub(top, s->own->window);
    dsv3i_save_hidden(f, s, 0, begin, N, first);
    for (size_t k = 1; k <= s->n_modules; k++) {
        dsv3_cache module = s->modules[k - 1];
        dsv3i_save_cache(f, &module);
        oldest = dsv3i_min(oldest, module.length);
        if (module.length > N && f->result == DSV3_OK) {
            f->result = dsv3i_fail(f->error, DSV3_ERR_DAMAGED, "length", "of a module is more than that of the text");
        }
        dsv3i_save_hidden(f, s, k, begin, module.length, first);
        if (f->mode == DSV3I_SAVE_READ) s->modules[k - 1] = module;
    }
    if (oldest < first && f->result == DSV3_OK) {
        f->result = dsv3i_fail(f->error, DSV3_ERR_MISMATCH, "rows", "are too few for what modules have yet to read");
    }
}

static void dsv3i_save_sequence_walk(dsv3i_save *f, void *object) {
    dsv3_sequence *s = (dsv3_sequence *)object;
    size_t n = s->max_drafts;
    uint64_t limit;
    dsv3i_save_same(f, "n_modules", s->n_modules);
    dsv3i_save_same(f, "max_drafts", n);
    s->temperature = dsv3i_save_float(f, s->temperature);
    s->top_p = dsv3i_save_float(f, s->top_p);
    s->rng.state = dsv3i_save_word(f, s->rng.state);
    s->drafts = dsv3i_save_between(f, "drafts", s->drafts, 0, SIZE_MAX, DSV3_ERR_MISMATCH);
    s->adaptive = dsv3i_save_int(f, s->adaptive);
    s->draft_cost = dsv3i_save_float(f, s->draft_cost);
    s->stop = dsv3i_save_int(f, s->stop);
    limit = dsv3i_save_word(f, s->limit == SIZE_MAX ? UINT64_MAX : (uint64_t)s->limit); /* none, on any machine */
    s->limit = (size_t)limit == limit ? (size_t)limit : SIZE_MAX;
    s->want_log_p = dsv3i_save_int(f, s->want_log_p);
    s->stopped = dsv3i_save_int(f, s->stopped);
    s->steps = dsv3i_save_word(f, s->steps);
    s->written = dsv3i_save_word(f, s->written);
    s->n_token = dsv3i_save_between(f, "n_token", s->n_token, 0, n + 1, DSV3_ERR_DAMAGED);
    s->pending = (int32_t)dsv3i_save_between(f, "pending", s->pending != 0, 0, 1, DSV3_ERR_DAMAGED);
    dsv3i_save_tokens(f, "token", s->token, s->n_token);
    dsv3i_save_array(f, s->log_p, sizeof *s->log_p, s->want_log_p ? s->n_token : 0);
    dsv3i_save_array(f, s->entropy, sizeof *s->entropy, s->want_log_p ? s->n_token : 0);
    dsv3i_save_array(f, s->drafted, sizeof *s->drafted, n);
    dsv3i_save_array(f, s->accepted, sizeof *s->accepted, n);
    dsv3i_save_array(f, s->own->rate, sizeof *s->own->rate, n);
    dsv3i_save_cache(f, &s->cache);
    dsv3i_save_tokens(f, "history", s->history, s->cache.length + (size_t)s->pending);
    dsv3i_save_states(f, s);
}

static dsv3_result dsv3i_save_sequence_begin(dsv3i_save *f, dsv3i_save_mode mode, const dsv3_model *model,
                                             const dsv3_sequence *s, uint64_t tag, dsv3_error *error) {
    *f = dsv3i_save_of(DSV3I_SAVE_SEQUENCE, NULL, tag, dsv3i_save_sequence_walk, error);
    DSV3I_TRY(dsv3i_sequence_check(s, "sequence", error));
    f->copy.sequence = *s;
    if (mode == DSV3I_SAVE_MEASURE) return DSV3_OK;
    DSV3I_NEED(1, model);
    f->config = &model->config;
    if (mode == DSV3I_SAVE_WRITE && s->prompt_left > 0) {
        return dsv3i_fail(error, DSV3_ERR_ARG, "sequence", "has a prompt that is not yet read");
    }
    if (s->own->made_for == dsv3i_fingerprint(&model->config)) return DSV3_OK;
    return dsv3i_fail(error, DSV3_ERR_MISMATCH, "sequence", "was made for another model");
}

DSV3_API dsv3_result dsv3_sequence_save_size(const dsv3_sequence *s, size_t *bytes, dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_sequence_begin(&f, DSV3I_SAVE_MEASURE, NULL, s, 0, error));
    return dsv3i_save_size(&f, bytes);
}

DSV3_API dsv3_result dsv3_sequence_save(const dsv3_model *model, const dsv3_sequence *s, uint64_t tag, void *data,
                                        size_t bytes, dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_sequence_begin(&f, DSV3I_SAVE_WRITE, model, s, tag, error));
    return dsv3i_save_write(&f, data, bytes);
}

DSV3_API dsv3_result dsv3_sequence_load(const dsv3_model *model, dsv3_sequence *s, uint64_t tag, const void *data,
                                        size_t bytes, dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_sequence_begin(&f, DSV3I_SAVE_READ, model, s, tag, error));
    DSV3I_TRY(dsv3i_save_load(&f, s, data, bytes));
    s->prompt_left = 0;
    return DSV3_OK;
}

#ifndef DSV3_NO_TRAINING
/* ---- A training run, between two steps */

static void dsv3i_save_trainer_walk(dsv3i_save *f, void *object) {
    dsv3i_save_state *s = (dsv3i_save_state *)object;
    dsv3i_save_same(f, "ema", s->array[3] != NULL);
    s->step = dsv3i_save_word(f, s->step);
    for (size_t i = 0; i < 4; i++) dsv3i_save_array(f, s->array[i], sizeof(float), s->array[i] != NULL ? s->count : 0);
    dsv3i_save_array(f, s->load_all, sizeof *s->load_all, s->loads);
}

static dsv3_result dsv3i_save_trainer_begin(dsv3i_save *f, const dsv3_trainer *t, uint64_t tag, dsv3_error *error) {
    DSV3I_TRY(dsv3i_trainer_check(t, error));
    *f = dsv3i_save_of(DSV3I_SAVE_TRAINER, &t->weights.model.config, tag, dsv3i_save_trainer_walk, error);
    dsv3i_save_state state = {{t->weights.data, t->m, t->v, t->ema}, t->balancer.load_all, t->weights.count, 0, t->step};
    state.loads = t->balancer.layers * t->balancer.experts;
    f->copy.state = state;
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_trainer_save_size(const dsv3_trainer *t, size_t *bytes, dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_trainer_begin(&f, t, 0, error));
    return dsv3i_save_size(&f, bytes);
}

DSV3_API dsv3_result dsv3_trainer_save(const dsv3_trainer *t, uint64_t tag, void *data, size_t bytes,
                                       dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_trainer_begin(&f, t, tag, error));
    return dsv3i_save_write(&f, data, bytes);
}

DSV3_API dsv3_result dsv3_trainer_load(dsv3_trainer *t, uint64_t tag, const void *data, size_t bytes,
                                       dsv3_error *error) {
    dsv3i_save f;
    DSV3I_TRY(dsv3i_save_trainer_begin(&f, t, tag, error));
    DSV3I_TRY(dsv3i_save_load(&f, &f.copy, data, bytes)); /* numbers go there, arrays to the trainer */
    t->step = f.copy.state.step;
    dsv3i_train_clear(t);
    t->own->stage = 0;
    return DSV3_OK;
}
#endif /* DSV3_NO_TRAINING */

/* ========================================================================================================
 * Chapter 17  >>calls
 *
 * The book's ops and blocks as calls of their own. The book looks at its arguments once, where a batch or a step begins,
 * and then calls dsv3i_... functions, which trust them. Who calls an op alone is told here what is wrong, before anything
 * is written. Test: tests/test_arguments.c.
 * ==================================================================================================== */

/* A tensor w of that name, and n rows beside it, of as many numbers as w has rows or columns. */
static dsv3_result dsv3i_check_op(const dsv3_context *context, const dsv3_tensor *w, const char *name, size_t n,
                                  dsv3_error *error) {
    size_t bytes;
    DSV3I_TRY(dsv3i_check_context(context, error));
    if (w == NULL || w->data == NULL) return dsv3i_fail_null(error, name);
    bytes = dsv3_row_bytes(w->type, w->cols);
    if (w->rows < 1 || bytes == 0 || bytes == SIZE_MAX) {
        return dsv3i_fail(error, DSV3_ERR_ARG, name, "is empty, of an unknown type, or has no whole blocks in a row");
    }
    if (dsv3i_mul(n, dsv3i_mul(dsv3i_max(w->rows, w->cols), sizeof(float))) < SIZE_MAX) return DSV3_OK;
    return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "n", "rows have more bytes than size_t can count");
}

/* Floats a [n] and b [m] do not overlap, unless they may be the same. */
static dsv3_result dsv3i_check_apart(dsv3_error *error, const char *name, const float *a, size_t n, const float *b,
                                     size_t m, int same) {
    if ((same && a == b) || !dsv3i_overlap(a, n * sizeof *a, b, m * sizeof *b)) return DSV3_OK;
    return dsv3i_fail(error, DSV3_ERR_ARG, name, "overlaps an input");
}

static dsv3_result dsv3i_check_not(dsv3_error *error, const char *name, int wrong, const char *why) {
    return wrong ? dsv3i_fail(error, DSV3_ERR_ARG, name, why) : DSV3_OK;
}

static dsv3_result dsv3i_check_number(dsv3_error *error, const char *name, double x) {
    return dsv3i_check_not(error, name, !(x >= -DBL_MAX && x <= DBL_MAX), "is not finite");
}

static dsv3_result dsv3i_ids_check(const int32_t *token, size_t n, size_t V, dsv3_error *error) {
    if (token == NULL && n > 0) return dsv3i_fail_null(error, "token");
    for (size_t i = 0; i < n; i++) DSV3I_TRY(dsv3i_check_token(error, "token", i, (int32_t)V, token[i]));
    return DSV3_OK;
}

/* ---- Chapter 4 */

DSV3_API dsv3_result dsv3_embed(const dsv3_context *context, float *x, const int32_t *token, const dsv3_tensor *w,
                                size_t n, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_op(context, w, "w", n, error));
    DSV3I_NEED(n, x);
    DSV3I_TRY(dsv3i_ids_check(token, n, dsv3i_min(w->rows, INT32_MAX), error));
    dsv3i_embed(context, x, token, w, n);
    return dsv3i_ok(error);
}

/* Bytes of so many floats of scratch. */
static dsv3_result dsv3i_scratch_size(size_t floats, size_t *bytes, dsv3_error *error) {
    DSV3I_NEED(1, bytes);
    *bytes = dsv3i_mul(floats, sizeof(float));
    if (*bytes < SIZE_MAX) return dsv3i_ok(error);
    *bytes = 0;
    return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "scratch", "needs more bytes than size_t can count");
}

DSV3_API dsv3_result dsv3_linear_size(const dsv3_context *context, size_t n, size_t cols, size_t *bytes,
                                      dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_context(context, error));
    return dsv3i_scratch_size(dsv3i_linear_floats(n, cols, context->threads), bytes, error);
}

DSV3_API dsv3_result dsv3_linear(const dsv3_context *context, float *y, const float *x, const dsv3_tensor *w, size_t n,
                                 float *scratch, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_op(context, w, "w", n, error));
    DSV3I_NEED(n, y); DSV3I_NEED(n, x); DSV3I_NEED(n, scratch);
    DSV3I_TRY(dsv3i_check_apart(error, "y", y, n * w->rows, x, n * w->cols, 0));
    dsv3i_product p = dsv3i_product_of(y, x, w, n);
    if (n > 0) context->ops->linear(context, &p, 1, scratch);
    return dsv3i_ok(error);
}

static dsv3_result dsv3i_check_norm(const dsv3_context *context, const dsv3_tensor *g, size_t n, float eps,
                                    dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_op(context, g, "g", n, error));
    if (g->rows != 1 || g->type == DSV3_F8_E4M3 || dsv3_type_block(g->type) > 1) {
        return dsv3i_fail(error, DSV3_ERR_UNSUPPORTED, "g", "must be one row of F32, F16 or BF16");
    }
    return dsv3i_check_not(error, "eps", !(eps >= 0.0f && eps <= FLT_MAX), "is negative or not finite");
}

static dsv3_result dsv3i_check_cols(const dsv3_tensor *w, const char *name, size_t rows, size_t cols, dsv3_error *error) {
    if (w->rows == rows && w->cols == cols) return DSV3_OK;
    return dsv3i_fail_numbers(error, DSV3_ERR_MISMATCH, name, "has another shape", DSV3_NUMBERS_SHAPE, (int64_t)rows,
                              (int64_t)cols, (int64_t)w->rows, (int64_t)w->cols);
}

DSV3_API dsv3_result dsv3_rmsnorm(const dsv3_context *context, float *y, const float *x, const dsv3_tensor *g, size_t n,
                                  size_t d, float eps, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_norm(context, g, n, eps, error));
    DSV3I_TRY(dsv3i_check_cols(g, "g", 1, d, error));
    DSV3I_NEED(n, y); DSV3I_NEED(n, x);
    DSV3I_TRY(dsv3i_check_apart(error, "y", y, n * d, x, n * d, 1));
    dsv3i_norm(context, y, x, g, n, eps);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_cross_entropy_size(const dsv3_context *context, const dsv3_tensor *head, size_t n,
                                             size_t *bytes, dsv3_error *error) {
    size_t linear;
    DSV3I_TRY(dsv3i_check_context(context, error));
    DSV3I_NEED(1, head);
    linear = dsv3i_linear_floats(n, head->cols, context->threads);
    return dsv3i_scratch_size(dsv3i_add(dsv3i_loss_floats(head->rows, n), linear), bytes, error);
}

/* Checks, then fills *a; of no rows it is left as it is. */
static dsv3_result dsv3i_loss_alone(dsv3i_loss *a, const dsv3_context *ctx, const float *u, const dsv3_tensor *head,
                                    const int32_t *target, size_t n, float *scratch, dsv3_error *error) {
    size_t floats = 0;
    DSV3I_TRY(dsv3i_check_op(ctx, head, "head", n, error));
    if (n > 0) floats = dsv3i_loss_floats(head->rows, n);
    if (floats == SIZE_MAX) return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "n", "rows have more bytes than size_t can count");
    DSV3I_NEED(n, u);
    DSV3I_NEED(n, target);
    DSV3I_NEED(n, scratch);
    for (size_t t = 0; t < n; t++) {
        int32_t V = (int32_t)dsv3i_min(head->rows, INT32_MAX);
        if (target[t] != DSV3_IGNORE) DSV3I_TRY(dsv3i_check_token(error, "target", t, V, target[t]));
    }
    if (n > 0) *a = dsv3i_loss_of(ctx, u, head, target, n, scratch, scratch + floats);
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_cross_entropy(const dsv3_context *context, float *nll, const float *u, const dsv3_tensor *head,
                                        const int32_t *target, size_t n, float *scratch, dsv3_error *error) {
    dsv3i_loss a;
    DSV3I_TRY(dsv3i_loss_alone(&a, context, u, head, target, n, scratch, error));
    DSV3I_NEED(n, nll);
    if (n > 0) dsv3i_cross_entropy(&a, nll);
    return dsv3i_ok(error);
}

/* ---- Chapter 5 */

static dsv3_result dsv3i_check_pairs(const dsv3_config *config, dsv3_error *error) {
    DSV3I_NEED(1, config);
    int32_t dr = config->qk_rope_head_dim, type = (int32_t)config->rope_scaling.type;
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "qk_rope_head_dim", "is out of range", dr, 2, DSV3_MAX_DIM));
    DSV3I_TRY(dsv3i_check_not(error, "qk_rope_head_dim", dr % 2 != 0, "must be even: RoPE turns pairs"));
    DSV3I_TRY(dsv3i_check_not(error, "rope_scaling.type", type != DSV3_ROPE_NONE && type != DSV3_ROPE_YARN, "is unknown"));
    return dsv3i_check_rope(config, error);
}

DSV3_API dsv3_result dsv3_rope_frequencies(const dsv3_config *config, double *theta, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_pairs(config, error));
    DSV3I_NEED(1, theta);
    for (int32_t i = 0; i < config->qk_rope_head_dim / 2; i++) theta[i] = dsv3i_rope_theta(config, i);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_rope_turns(const dsv3_config *config, uint64_t *turns, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_pairs(config, error));
    DSV3I_NEED(1, turns);
    dsv3i_rope_turns(config, turns);
    return dsv3i_ok(error);
}

static dsv3_result dsv3i_check_dr(size_t dr, dsv3_error *error) {
    return dsv3i_check_not(error, "dr", dr < 2 || dr % 2 != 0, "must be even and not 0: RoPE turns pairs");
}

DSV3_API dsv3_result dsv3_rope_table(float *cos_sin, const int32_t *position, const uint64_t *turns, float factor,
                                     size_t n, size_t dr, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_dr(dr, error));
    DSV3I_TRY(dsv3i_check_number(error, "factor", (double)factor));
    DSV3I_NEED(n, cos_sin); DSV3I_NEED(n, position); DSV3I_NEED(n, turns);
    if (dsv3i_mul(dsv3i_mul(n, dr), sizeof(float)) == SIZE_MAX) {
        return dsv3i_fail(error, DSV3_ERR_OVERFLOW, "n", "rows have more bytes than size_t can count");
    }
    dsv3i_rope_table(cos_sin, position, turns, factor, n, dr);
    return dsv3i_ok(error);
}

static dsv3_result dsv3i_rotate_alone(float *x, const float *cos_sin, size_t dr, int interleave, float sign,
                                      dsv3_error *error) {
    DSV3I_NEED(1, cos_sin);
    DSV3I_TRY(dsv3i_check_dr(dr, error));
    DSV3I_TRY(dsv3i_check_apart(error, "x", x, dr, cos_sin, dr, 0));
    dsv3i_rotate(x, cos_sin, dr, interleave, sign);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_rope_rotate(float *x, const float *cos_sin, size_t dr, int interleave, dsv3_error *error) {
    DSV3I_NEED(1, x);
    return dsv3i_rotate_alone(x, cos_sin, dr, interleave, 1.0f, error);
}

/* ---- Chapters 6, 8 and 9 */

/* Opens the workspace, and looks at what all blocks have. */
static dsv3_result dsv3i_block(dsv3i_workspace *ws, const dsv3_workspace *workspace, const dsv3_context *context,
                               const dsv3_model *model, const dsv3_layer *weights, size_t n, dsv3_error *error) {
    DSV3I_TRY(dsv3i_workspace_check(workspace, context, model, error));
    *ws = dsv3i_workspace_of(workspace, &model->config);
    DSV3I_NEED(1, weights);
    if (weights->input_layernorm.data == NULL) return dsv3i_fail(error, DSV3_ERR_ARG, "weights", "are not bound");
    if (weights->is_moe && weights->experts == NULL) return dsv3i_fail(error, DSV3_ERR_ARG, "weights", "have no experts");
    return dsv3i_check_between(error, n < 1 ? DSV3_ERR_ARG : DSV3_ERR_MEMORY, "n", "is none, or more than the workspace has",
                               (int64_t)n, 1, (int64_t)workspace->rows);
}

/* The batch that was begun has n rows, and the caches have room for them. How many caches there are is not known here. */
static dsv3_result dsv3i_check_begun(const dsv3_workspace *workspace, const dsv3_cache *caches, const char *name, size_t n,
                                     dsv3_error *error) {
    int64_t begun = (int64_t)workspace->begun;
    if (begun == 0) return dsv3i_fail(error, DSV3_ERR_ARG, "workspace", "has no batch begun: dsv3_batch_begin comes first");
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, name, "is not that of the batch begun", (int64_t)n, begun, begun));
    DSV3I_NEED(1, caches);
    for (size_t r = 0; r < n; r++) {
        size_t room = caches[workspace->sequence[r]].capacity;
        if ((size_t)workspace->position[r] < room) continue;
        return dsv3i_fail_where(error, DSV3_ERR_FULL, "caches", "has no room for row", (int64_t)r);
    }
    return DSV3_OK;
}

/* Caches of a batch are alike. */
static dsv3_result dsv3i_check_layer(const dsv3_cache *caches, size_t layer, dsv3_error *error) {
    return dsv3i_check_between(error, DSV3_ERR_ARG, "layer", "is not one of the caches",
                               (int64_t)layer, 0, (int64_t)caches->layers - 1);
}

DSV3_API dsv3_result dsv3_mla_forward(const dsv3_context *context, float *y, const float *u, const dsv3_model *model,
                                      const dsv3_layer *weights, size_t layer, dsv3_cache *caches, size_t n,
                                      dsv3_workspace *workspace, dsv3_error *error) {
    dsv3i_workspace ws;
    DSV3I_TRY(dsv3i_block(&ws, workspace, context, model, weights, n, error));
    DSV3I_TRY(dsv3i_check_begun(workspace, caches, "n", n, error));
    DSV3I_TRY(dsv3i_check_layer(caches, layer, error));
    DSV3I_NEED(1, y); DSV3I_NEED(1, u);
    dsv3i_call c = dsv3i_call_of(context, model, weights, layer, caches, n, &ws);
    DSV3I_TRY(dsv3i_check_apart(error, "y", y, n * c.m.d, u, n * c.m.d, 0));
    dsv3i_mla_forward(&c, y, u);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_ffn_forward(const dsv3_context *context, float *y, const float *u, const dsv3_model *model,
                                      const dsv3_layer *weights, size_t n, dsv3_workspace *workspace,
                                      dsv3_error *error) {
    dsv3i_workspace ws;
    DSV3I_TRY(dsv3i_block(&ws, workspace, context, model, weights, n, error));
    DSV3I_NEED(1, y); DSV3I_NEED(1, u);
    dsv3i_call c = dsv3i_call_of(context, model, weights, 0, NULL, n, &ws);
    DSV3I_TRY(dsv3i_check_apart(error, "y", y, n * c.m.d, u, n * c.m.d, 0));
    return dsv3i_layer_result(&c, dsv3i_ffn_forward(&c, y, u), error);
}

DSV3_API dsv3_result dsv3_layer_forward(const dsv3_context *context, float *x, const dsv3_model *model,
                                        const dsv3_layer *weights, size_t layer, dsv3_cache *caches, size_t n,
                                        dsv3_workspace *workspace, dsv3_error *error) {
    dsv3i_workspace ws;
    DSV3I_TRY(dsv3i_block(&ws, workspace, context, model, weights, n, error));
    DSV3I_NEED(1, x);
    DSV3I_TRY(dsv3i_check_begun(workspace, caches, "n", n, error));
    DSV3I_TRY(dsv3i_check_layer(caches, layer, error));
    dsv3i_call c = dsv3i_call_of(context, model, weights, layer, caches, n, &ws);
    return dsv3i_layer_result(&c, dsv3i_layer_forward(&c, x), error);
}

DSV3_API dsv3_result dsv3_batch_end(dsv3_cache *caches, const dsv3_batch *batch, const dsv3_workspace *workspace,
                                    dsv3_error *error) {
    DSV3I_NEED(1, caches); DSV3I_NEED(1, batch); DSV3I_NEED(1, workspace);
    DSV3I_TRY(dsv3i_check_begun(workspace, caches, "rows", batch->rows, error));
    dsv3i_batch_end(caches, batch->rows, workspace->sequence, workspace->position);
    return dsv3i_ok(error);
}

/* ---- Chapter 13: steering */

static dsv3_result dsv3i_logits_check(const float *logits, size_t V, dsv3_error *error) {
    DSV3I_TRY(dsv3i_vocab_check(logits, V, error));
    for (size_t i = 0; i < V; i++) {
        if (!(logits[i] <= FLT_MAX)) {
            return dsv3i_fail_where(error, DSV3_ERR_NAN, "logits", "are NaN or infinite at index", (int64_t)i);
        }
    }
    return DSV3_OK;
}

/* Negated: in a heap of such the worst is "most probable", and stands on top. */
static dsv3_candidate dsv3i_negated(const float *logits, size_t i) {
    dsv3_candidate c;
    c.p = -logits[i];
    c.token = -(int32_t)i;
    return c;
}

/* A heap of the k best so far. */
DSV3_API dsv3_result dsv3_logits_top_k(float *logits, size_t V, size_t k, dsv3_candidate *scratch, dsv3_error *error) {
    DSV3I_TRY(dsv3i_logits_check(logits, V, error));
    if (scratch == NULL) return dsv3i_fail_null(error, "scratch");
    if (k < 1) return dsv3i_fail(error, DSV3_ERR_ARG, "k", "is 0: no token would be left");
    if (k >= V) return dsv3i_ok(error);
    for (size_t i = 0; i < k; i++) scratch[i] = dsv3i_negated(logits, i);
    for (size_t i = k / 2; i > 0; i--) dsv3i_heap_sink(scratch, k, i - 1);
    for (size_t i = k; i < V; i++) {
        dsv3_candidate c = dsv3i_negated(logits, i);
        if (!dsv3i_before(scratch[0], c)) continue;
        scratch[0] = c;
        dsv3i_heap_sink(scratch, k, 0);
    }
    for (size_t i = 0; i < V; i++) {
        if (dsv3i_before(dsv3i_negated(logits, i), scratch[0])) logits[i] = dsv3i_never();
    }
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_logits_min_p(float *logits, size_t V, float min_p, dsv3_error *error) {
    float least;
    DSV3I_TRY(dsv3i_logits_check(logits, V, error));
    if (!(min_p >= 0.0f) || min_p > 1.0f) return dsv3i_fail(error, DSV3_ERR_ARG, "min_p", "is not between 0 and 1");
    least = min_p > 0.0f ? dsv3i_max_float(logits, V) + DSV3_LOGF(min_p) : dsv3i_never();
    for (size_t i = 0; i < V; i++) {
        if (logits[i] < least) logits[i] = dsv3i_never();
    }
    return dsv3i_ok(error);
}

/* What overflows stays finite, unless it is forbidden. */
static float dsv3i_clamped(float x, int forbidden) {
    if (x > FLT_MAX) return FLT_MAX;
    return x < -FLT_MAX && !forbidden ? -FLT_MAX : x;
}

DSV3_API dsv3_result dsv3_logits_penalty(float *logits, size_t V, const int32_t *token, size_t n, float penalty,
                                         uint8_t *seen, dsv3_error *error) {
    DSV3I_TRY(dsv3i_logits_check(logits, V, error));
    if (seen == NULL) return dsv3i_fail_null(error, "seen");
    if (!(penalty > 0.0f) || penalty > FLT_MAX) {
        return dsv3i_fail(error, DSV3_ERR_ARG, "penalty", "must be positive and finite");
    }
    DSV3I_TRY(dsv3i_ids_check(token, n, V, error));
    DSV3_MEMSET(seen, 0, (V + 7) / 8);
    for (size_t i = 0; i < n; i++) {
        size_t id = (size_t)token[i];
        unsigned bit = 1u << (id & 7);
        int forbidden;
        if (seen[id >> 3] & bit) continue;
        seen[id >> 3] = (uint8_t)(seen[id >> 3] | bit);
        forbidden = logits[id] < -FLT_MAX;
        logits[id] = logits[id] > 0.0f ? logits[id] / penalty : logits[id] * penalty;
        logits[id] = dsv3i_clamped(logits[id], forbidden);
    }
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_logits_bias(float *logits, size_t V, const int32_t *token, const float *bias, size_t n,
                                      dsv3_error *error) {
    DSV3I_TRY(dsv3i_logits_check(logits, V, error));
    if (bias == NULL && n > 0) return dsv3i_fail_null(error, "bias");
    DSV3I_TRY(dsv3i_ids_check(token, n, V, error));
    for (size_t i = 0; i < n; i++) {
        if (!(bias[i] <= FLT_MAX)) {
            return dsv3i_fail_where(error, DSV3_ERR_ARG, "bias", "is NaN or plus infinity at index", (int64_t)i);
        }
    }
    for (size_t i = 0; i < n; i++) {
        int forbidden = logits[token[i]] < -FLT_MAX || bias[i] < -FLT_MAX;
        logits[token[i]] = dsv3i_clamped(logits[token[i]] + bias[i], forbidden);
    }
    return dsv3i_ok(error);
}

/* ---- Chapter 7 */

DSV3_API dsv3_result dsv3_router_check(const dsv3_config *config, dsv3_error *error) {
    DSV3I_NEED(1, config);
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "n_routed_experts", "is out of range", config->n_routed_experts, 1,
                                  DSV3_MAX_EXPERTS));
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_ARG, "num_experts_per_tok", "is out of range", config->num_experts_per_tok,
                                  1, DSV3_MAX_TOPK));
    DSV3I_TRY(dsv3i_check_routing(config, 1, error));
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_router_scores(const dsv3_context *context, const dsv3_config *config, float *score,
                                        const float *x, const dsv3_tensor *gate_w, const float *gate_bias, size_t n,
                                        float *scratch, dsv3_error *error) {
    DSV3I_TRY(dsv3_router_check(config, error));
    DSV3I_TRY(dsv3i_check_op(context, gate_w, "gate_w", n, error));
    DSV3I_TRY(dsv3i_check_cols(gate_w, "gate_w", (size_t)config->n_routed_experts, gate_w->cols, error));
    DSV3I_NEED(n, score); DSV3I_NEED(n, x); DSV3I_NEED(n, scratch);
    DSV3I_TRY(dsv3i_check_apart(error, "score", score, n * gate_w->rows, x, n * gate_w->cols, 0));
    if (n > 0) dsv3i_router_scores(context, config, score, x, gate_w, gate_bias, n, scratch);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_router_select(const dsv3_config *config, int32_t *idx, float *gate, const float *score,
                                        const float *bias, const float *alpha, size_t n, float *scratch,
                                        dsv3_error *error) {
    size_t bad;
    DSV3I_TRY(dsv3_router_check(config, error));
    DSV3I_NEED(n, idx); DSV3I_NEED(n, gate); DSV3I_NEED(n, score); DSV3I_NEED(n, scratch);
    bad = dsv3i_router_select(config, idx, gate, score, bias, alpha, n, scratch);
    if (bad == n) return dsv3i_ok(error);
    return dsv3i_fail_where(error, DSV3_ERR_NAN, "score", "is not finite, in row", (int64_t)bad);
}

DSV3_API dsv3_result dsv3_router_weights(const dsv3_config *config, float *gate, const int32_t *idx,
                                         const float *score, size_t n, dsv3_error *error) {
    DSV3I_TRY(dsv3_router_check(config, error));
    DSV3I_NEED(n, gate); DSV3I_NEED(n, idx); DSV3I_NEED(n, score);
    return dsv3i_router_weights(config, gate, idx, score, n, error);
}

/* Sizes; experts and scores of the rows that count, where there are any. */
static dsv3_result dsv3i_check_rows(const dsv3_routing *r, dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_count(error, "experts", r->experts, DSV3_MAX_EXPERTS));
    DSV3I_TRY(dsv3i_check_count(error, "topk", r->topk, (int64_t)dsv3i_min(r->experts, DSV3_MAX_TOPK)));
    for (size_t t = 0; t < r->n; t++) {
        if (!dsv3i_counts(r->mask, t)) continue;
        for (size_t i = t * r->topk; r->idx != NULL && i < (t + 1) * r->topk; i++) {
            DSV3I_TRY(dsv3i_check_element(error, DSV3_ERR_ARG, "idx", i, "is not an expert", (int64_t)r->experts, r->idx[i]));
        }
        if (r->score == NULL || dsv3i_all_finite(r->score + t * r->experts, r->experts)) continue;
        return dsv3i_fail_where(error, DSV3_ERR_NAN, "score", "is not finite, in row", (int64_t)t);
    }
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_load_count(uint64_t *load, const int32_t *idx, const uint8_t *mask, size_t n, size_t E,
                                     size_t K, dsv3_error *error) {
    const dsv3_routing rows = {NULL, idx, mask, n, E, K, 0, 0};
    DSV3I_NEED(1, load); DSV3I_NEED(n, idx);
    DSV3I_TRY(dsv3i_check_rows(&rows, error));
    dsv3i_load_count(load, idx, mask, n, K);
    return dsv3i_ok(error);
}

static dsv3_result dsv3i_check_balance(const dsv3_routing *routing, int loss, const double *scratch, dsv3_error *error) {
    DSV3I_NEED(1, routing); DSV3I_NEED(1, scratch); DSV3I_NEED(routing->n, routing->score);
    if (loss == DSV3I_LOSS_COMMUNICATION) DSV3I_NEED(routing->n, routing->idx);
    DSV3I_TRY(dsv3i_check_rows(routing, error));
    if (loss == DSV3I_LOSS_EXPERT) return DSV3_OK;
    return dsv3i_check_devices(routing->experts, routing->devices,
                               loss == DSV3I_LOSS_COMMUNICATION ? routing->most_devices : 1, error);
}

static dsv3_result dsv3i_balance_alone(double *value, const dsv3_routing *routing, int loss, double *scratch,
                                       dsv3_error *error) {
    if (value == NULL) return dsv3i_fail_null(error, "loss");
    DSV3I_TRY(dsv3i_check_balance(routing, loss, scratch, error));
    *value = dsv3i_balance_loss(routing, loss, scratch);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_balance_loss(double *loss, const dsv3_routing *routing, double *scratch, dsv3_error *error) {
    return dsv3i_balance_alone(loss, routing, DSV3I_LOSS_EXPERT, scratch, error);
}

#ifndef DSV3_NO_TRAINING
DSV3_API dsv3_result dsv3_device_loss(double *loss, const dsv3_routing *routing, double *scratch, dsv3_error *error) {
    return dsv3i_balance_alone(loss, routing, DSV3I_LOSS_DEVICE, scratch, error);
}

DSV3_API dsv3_result dsv3_communication_loss(double *loss, const dsv3_routing *routing, double *scratch,
                                             dsv3_error *error) {
    return dsv3i_balance_alone(loss, routing, DSV3I_LOSS_COMMUNICATION, scratch, error);
}

DSV3_API dsv3_result dsv3_bias_step(float *bias, const uint64_t *load, size_t layers, size_t E, dsv3_bias_rule rule,
                                    double speed, dsv3_error *error) {
    DSV3I_NEED(layers, bias); DSV3I_NEED(layers, load);
    DSV3I_TRY(dsv3i_check_count(error, "experts", E, DSV3_MAX_EXPERTS));
    DSV3I_TRY(dsv3i_check_bias_step(rule, speed, error));
    for (size_t i = 0; i < layers; i++) dsv3i_bias_step(bias + i * E, load + i * E, E, rule, speed);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_balancer_step(dsv3_balancer *balancer, float *bias, uint64_t seen, dsv3_error *error) {
    dsv3_result result;
    DSV3I_NEED(1, balancer);
    if (balancer->load == NULL) return dsv3i_fail(error, DSV3_ERR_ARG, "balancer", "was not made by dsv3_balancer_init");
    DSV3I_NEED(balancer->experts, bias);
    DSV3I_TRY(dsv3i_check_bias_step(balancer->rule, dsv3_bias_speed(&balancer->schedule, seen), error));
    result = dsv3i_balancer_reduce(balancer);
    if (result != DSV3_OK) return dsv3i_fail(error, result, "reduce", "failed");
    dsv3i_balancer_move(balancer, bias, seen);
    return dsv3i_ok(error);
}

/* ---- Backward */

DSV3_API dsv3_result dsv3_linear_backward(const dsv3_context *context, float *dx, float *dw, const float *dy,
                                          const float *x, const dsv3_tensor *w, size_t n, float *scratch,
                                          dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_op(context, w, "w", n, error));
    DSV3I_NEED(n, dy); DSV3I_NEED(n, scratch); DSV3I_NEED(n * (dw != NULL), x);
    DSV3I_TRY(dsv3i_check_apart(error, "dx", dx, dx != NULL ? n * w->cols : 0, dy, n * w->rows, 0));
    DSV3I_TRY(dsv3i_check_apart(error, "dx", dx, dx != NULL && dw != NULL ? n * w->cols : 0, x, n * w->cols, 0));
    dsv3i_product p = dsv3i_product_of((float *)(uintptr_t)dy, x, w, n);
    if (n > 0) context->ops->linear_backward(context, dx, 0, dw, &p, scratch);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_rope_rotate_backward(float *dx, const float *cos_sin, size_t dr, int interleave,
                                               dsv3_error *error) {
    DSV3I_NEED(1, dx);
    return dsv3i_rotate_alone(dx, cos_sin, dr, interleave, -1.0f, error);
}

DSV3_API dsv3_result dsv3_embed_backward(float *dw, const float *dx, const int32_t *token, size_t n, size_t V, size_t d,
                                         dsv3_error *error) {
    dsv3_context alone;
    DSV3I_NEED(n, dw); DSV3I_NEED(n, dx);
    DSV3I_TRY(dsv3i_check_count(error, "d", d, DSV3_MAX_DIM));
    DSV3I_TRY(dsv3i_check_count(error, "vocab_size", V, DSV3_MAX_VOCAB));
    DSV3I_TRY(dsv3i_ids_check(token, n, V, error));
    DSV3_MEMSET(&alone, 0, sizeof alone);
    dsv3i_embed_backward(&alone, dw, dx, token, n, d);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_rmsnorm_backward(const dsv3_context *context, float *dx, float *dg, const float *dy,
                                           const float *x, const dsv3_tensor *g, size_t n, float eps, float *scratch,
                                           dsv3_error *error) {
    DSV3I_TRY(dsv3i_check_norm(context, g, n, eps, error));
    DSV3I_NEED(n, dx); DSV3I_NEED(n, dg); DSV3I_NEED(n, dy); DSV3I_NEED(n, x); DSV3I_NEED(n, scratch);
    DSV3I_TRY(dsv3i_check_apart(error, "dx", dx, n * g->cols, dy, n * g->cols, 0));
    DSV3I_TRY(dsv3i_check_apart(error, "dx", dx, n * g->cols, x, n * g->cols, 0));
    if (n > 0) dsv3i_norm_back(context, dx, dg, dy, x, g, n, eps, scratch);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_cross_entropy_backward(const dsv3_context *context, float *du, float *dhead, float weight,
                                                 const float *u, const dsv3_tensor *head, const int32_t *target, size_t n,
                                                 float *scratch, dsv3_error *error) {
    dsv3i_loss a;
    DSV3I_TRY(dsv3i_loss_alone(&a, context, u, head, target, n, scratch, error));
    DSV3I_TRY(dsv3i_check_number(error, "weight", (double)weight));
    DSV3I_NEED(n, du);
    DSV3I_TRY(dsv3i_check_apart(error, "du", du, n * head->cols, u, n * head->cols, 0));
    if (n > 0) dsv3i_cross_entropy_backward(&a, du, 0, dhead, weight);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_router_weights_backward(const dsv3_config *config, float *dscore, const float *dgate,
                                                  const int32_t *idx, const float *score, size_t n, dsv3_error *error) {
    DSV3I_TRY(dsv3_router_check(config, error));
    DSV3I_NEED(n, dscore); DSV3I_NEED(n, dgate); DSV3I_NEED(n, idx); DSV3I_NEED(n, score);
    DSV3I_TRY(dsv3i_check_choice(config, idx, n, error));
    dsv3i_router_weights_backward(config, dscore, dgate, idx, score, n);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_router_scores_backward(const dsv3_config *config, float *dz, const float *dscore,
                                                 const float *score, size_t n, dsv3_error *error) {
    DSV3I_TRY(dsv3_router_check(config, error));
    DSV3I_NEED(n, dz); DSV3I_NEED(n, dscore); DSV3I_NEED(n, score);
    dsv3i_router_scores_backward(config, dz, dscore, score, n);
    return dsv3i_ok(error);
}

DSV3_API dsv3_result dsv3_balance_backward(float *dscore, double scale, const dsv3_balance_weights *weights,
                                           const dsv3_routing *routing, double *scratch, dsv3_error *error) {
    DSV3I_NEED(1, weights);
    DSV3I_TRY(dsv3i_check_balance(routing, DSV3I_LOSS_EXPERT, scratch, error));
    DSV3I_TRY(dsv3i_check_weights(weights, routing->experts, error));
    if (weights->communication > 0.0) DSV3I_NEED(routing->n, routing->idx);
    DSV3I_NEED(routing->n, dscore);
    DSV3I_TRY(dsv3i_check_number(error, "scale", scale));
    dsv3i_balance_backward(dscore, scale, weights, routing, scratch);
    return dsv3i_ok(error);
}
#endif

/* ########################################################################################################
 * The engine: the same ops once more, made for speed. Nothing here needs to be read to understand the model.
 * #################################################################################################### */
#ifdef DSV3I_ENGINE

/* ========================================================================================================
 * Chapter A  >>fast
 *
 * What all instruction sets share: how weights are packed, how products, attention and MLPs are cut into work for threads
 * and caches, forward and backward. Each instruction set (the chapters behind) brings a short list of kernels,
 * dsv3i_kernels; the drivers here make the ops of the table (chapter 2) of them.
 *
 * What a backend promises, and tests prove against the plain ops, by name (tests/test_ops_table.c, tests/test_kernels.c).
 * Numbers are decoded exactly. A product has one chain of additions for each output, in the order of its terms, however
 * many rows and outputs are computed together, whether weights are packed or not; for FP8, Q8_0 and Q4_0 there is a chain
 * for each block of terms, then one over the blocks. (Of AMX a link of the chain is the sum of 32 terms of BF16, always cut
 * at the same places.) Between backends results differ by rounding only.
 *
 * How it is fast. Sums wait for their own previous term (4 cycles), so many are computed at once, as many as there are
 * registers. A k_block of a panel stays in the first cache while rows of x pass by, and the next is fetched meanwhile. With
 * one row there is nothing to use twice, and only reading counts: panels in two or four places are read side by side, and
 * codes never leave registers. Rows go through an MLP in blocks that stay in a worker's cache from input to output.
 * ==================================================================================================== */

#define DSV3I_PANEL 64u
#define DSV3I_LANES 16u
#define DSV3I_TERMS DSV3_BLOCK /* of a k_block: whole scale blocks, which stay near while rows of x pass by */
#define DSV3I_FEW 4u           /* rows of x for which codes are decoded in registers; more are worth floats */
#define DSV3I_MANY 96u         /* rows of x that go through a k_block together, at most: both stay in near caches */

/* Weights as products take them: some terms of up to 64 rows, in columns of 16 rows. */
typedef struct dsv3i_panel {
    const void *values; /* float [k, columns, 16], BF16 [k/2, columns, 16, 2] or bytes [k/4, columns, 16, 4] */
    size_t columns;     /* of 16 rows, 1 to 4; zeros where there are no rows, and behind k */
    const float *scale; /* [k / block, columns, 16] scales; NULL: none */
    size_t block;       /* terms that share a scale; k if there are none */
    size_t gap;         /* of panels of bytes: so many bytes between the values of a block and those of the next */
    int32_t zero;       /* bytes: the code of 0, 128 or 8 */
    size_t ahead;       /* prefetch distance: bytes from values to what will be read next; 0: nothing */
    const void *next;   /* products of floats: what will be read next instead, ... */
    size_t next_bytes;  /* ... and how much that is; 0: nothing */
} dsv3i_panel;

/* Up to 64 queries, up to 64 keys and their values. */
typedef struct dsv3i_attention_tile {
    const float *q;         /* [lanes, dk], ld_q floats apart */
    const void *keys;       /* [nk, dk], ld_k numbers apart */
    const void *values;     /* [nk, dv], ld_v numbers apart */
    dsv3_type type;         /* of keys and values: float, or BF16 where attend takes them */
    float *out;             /* [lanes, dv], ld_out floats apart: running weighted sums */
    float top[64], sum[64]; /* [lanes] running maxima, and sums of exponentials */
    int32_t seen[64];       /* [lanes] of the keys, that many are seen */
    size_t ld_q, ld_k, ld_v, ld_out, lanes, dk, dv;
    float scale;
    const dsv3_context *ctx;
    void *scratch; /* of attend: scores, and what else it needs */
} dsv3i_attention_tile;

typedef enum dsv3i_gemm_kind {
    DSV3I_GEMM_F32 = 0,       /* float rows and panels */
    DSV3I_GEMM_BF16 = 1,      /* float rows, at most 4, and BF16 panels */
    DSV3I_GEMM_BYTES = 2,     /* float rows, at most 4, and panels of bytes */
    DSV3I_GEMM_FAST_BF16 = 3, /* BF16 rows and panels */
    DSV3I_GEMM_FAST_BYTES = 4 /* rows of bytes, and panels of bytes */
} dsv3i_gemm_kind;

#define DSV3I_GEMMS 5

/* Products of n rows x with packed weights, of as many whole panels as `rows` has, one behind the other. */
typedef void (*dsv3i_whole)(float *y, size_t ldy, const void *x, size_t ldx, size_t n, const void *w, size_t rows,
                            size_t k);

typedef void (*dsv3i_rounder)(void *out, const float *x, size_t k);

/* What an instruction set brings beside the vectors of the table (decode, dot, axpy, exp_sum, silu_mul). */
typedef struct dsv3i_kernels {
    /* y_t += sum_j a[t at + j aj] b_j, n numbers each, for m rows y_t and, in this order, k rows b_j */
    void (*outer)(float *y, size_t ldy, size_t m, const float *a, size_t at, size_t aj, const float *b, size_t ldb,
                  size_t k, size_t n);
    /* rows <= 64 of w, row_bytes apart, become a panel of codes, with scale as in dsv3i_panel for Q8_0 and Q4_0 */
    void (*pack[DSV3_TYPES])(void *panel, float *scale, const void *w, size_t row_bytes, size_t rows, size_t k);
    /* from values, BF16 [0] or bytes [1], to floats */
    void (*float_panel[2])(float *values, const void *panel, size_t columns, size_t k, int32_t zero);
    /* y[t ldy + r] = x_t . w_r, k terms each, for nx rows x_t and nw rows w_r, which lie ldx and ldw floats apart; only
     * for dsv3i_tile_attend */
    void (*tile)(float *y, size_t ldy, const float *x, size_t ldx, size_t nx, const float *w, size_t ldw, size_t nw,
                 size_t k);
    /* from codes to values (FP8: BF16, F16: float, Q4_0: bytes; NULL: codes are values) */
    void (*widen[DSV3_TYPES])(void *values, const void *panel, size_t columns, size_t k);
    /* activations x [k] for DSV3_FAST and weights of this type: floats [k]; or for the fast products BF16 [k, rounded up
     * to 4] or, for every 32, bytes, a float scale and an int32, -8 times their sum. NULL: nothing is rounded */
    dsv3i_rounder round[DSV3_TYPES];
    /* y[t ldy + r] (+)= x_t . w_r for n rows x_t, ldx bytes apart, and `rows` rows of a panel of k terms */
    void (*gemm[DSV3I_GEMMS])(float *y, size_t ldy, const void *x, size_t ldx, size_t n, const dsv3i_panel *w,
                              size_t rows, size_t k, int add);
    /* scores of all queries with nk <= 64 keys, softmax, weighted sums; and what comes once before, for the same queries
     * (NULL: nothing). [1]: with everything rounded to BF16, for DSV3_FAST; NULL: as [0] */
    void (*attend_begin[2])(dsv3i_attention_tile *a);
    void (*attend[2])(dsv3i_attention_tile *a, size_t nk);
    /* with n <= 4 rows, floats [0] of which k is a multiple of 4, or rounded [1]; with more rows, rounded, and a multiple
     * of 64 rows of weights. NULL: by gemm */
    dsv3i_whole gemv[2][DSV3_TYPES], gemm_packed[DSV3_TYPES];
    /* y += sum_r x[r] w_r, n numbers each, in this order, for k rows of codes as they lie, row_bytes apart; their values
     * are those of decode, times scale (NULL: 1), a float for every 128 of them. NULL: by decode and outer */
    void (*gemv_t[DSV3_TYPES])(float *y, const float *x, const void *w, size_t row_bytes, const void *scale, size_t k,
                               size_t n);
} dsv3i_kernels;

static const dsv3i_kernels *dsv3i_kernels_of(const dsv3_context *ctx) { return (const dsv3i_kernels *)ctx->ops->own; }

/* ---- Panels: up to 64 rows of weights in columns of 16, terms interleaved, so that a SIMD register holds the same terms
 * of 16 outputs, to be multiplied by numbers of x. Each output is then a chain of additions in the order of its terms,
 * however many rows x has, and needs no sum over lanes. A panel is cut into scale blocks, of Q8_0 and Q4_0 32 terms, else
 * 128, so that what is read together lies together and one after the other:
 *     F32 [k, columns, 16]     F16, BF16 [k/2, columns, 16, 2]     Q8_0 [k/4, columns, 16, 4] bytes, 128 added
 *     Q4_0 [4, columns, 16, 4] bytes: terms 4 i .. 4 i + 3 in the low four bits, those 16 later in the high
 *     E4M3 [k/4, columns, 4, 2, 4, 2]: of four rows, terms 0 and 1 of each, then terms 2 and 3 of each
 * and, behind these codes, scales: E4M3 one float, Q8_0 and Q4_0 F16 [columns, 16]. dsv3_pack makes all panels once,
 * in memory of the caller; else they are made on the way, a k_block of 128 terms at a time, with the same bits. */

/* Bytes of codes of k terms: words of four bytes for each of 16 rows. */
static size_t dsv3i_codes_bytes(dsv3_type type, size_t columns, size_t k) {
    size_t each = type == DSV3_Q4_0 ? 8 : type == DSV3_F32 ? 1 : type == DSV3_F16 || type == DSV3_BF16 ? 2 : 4;
    return dsv3i_blocks(k, each) * columns * DSV3I_LANES * 4;
}

static size_t dsv3i_scale_block_terms(dsv3_type type) {
    return dsv3_type_block(type) > 1 ? DSV3_QBLOCK : DSV3I_TERMS;
}

static size_t dsv3i_scale_block_bytes(dsv3_type type, size_t columns, size_t k) {
    size_t scales = type == DSV3_F8_E4M3 ? 4 : dsv3_type_block(type) > 1 ? columns * DSV3I_LANES * 2 : 0;
    return dsv3i_codes_bytes(type, columns, k) + dsv3i_blocks(scales, 64) * 64;
}

/* Bytes of k terms of a panel, from the start of a scale block on. */
static size_t dsv3i_panel_bytes(dsv3_type type, size_t columns, size_t k) {
    size_t most = dsv3i_scale_block_terms(type), last = k % most;
    size_t bytes = dsv3i_mul(k / most, dsv3i_scale_block_bytes(type, columns, most));
    return last == 0 ? bytes : dsv3i_add(bytes, dsv3i_scale_block_bytes(type, columns, last));
}

/* Bytes before the panel with row r. */
static size_t dsv3i_panel_at(const dsv3_tensor *w, size_t r) {
    return dsv3i_mul(r / DSV3I_PANEL, dsv3i_panel_bytes(w->type, DSV3I_PANEL / DSV3I_LANES, w->cols));
}

static size_t dsv3i_packed_bytes(const dsv3_tensor *w) {
    size_t last = dsv3i_blocks(w->rows % DSV3I_PANEL, DSV3I_LANES);
    return dsv3i_add(dsv3i_panel_at(w, w->rows), dsv3i_panel_bytes(w->type, last, w->cols));
}

/* Columns of the panel with row r. */
static size_t dsv3i_panel_columns(const dsv3_tensor *w, size_t r) {
    return dsv3i_blocks(dsv3i_min(DSV3I_PANEL, w->rows - (r - r % DSV3I_PANEL)), DSV3I_LANES);
}

/* The scale block of a packed tensor with row r and term k. */
static const unsigned char *dsv3i_scale_block_at(const dsv3_tensor *w, size_t r, size_t k) {
    return (const unsigned char *)w->data + dsv3i_panel_at(w, r) +
           dsv3i_panel_bytes(w->type, dsv3i_panel_columns(w, r), k - k % dsv3i_scale_block_terms(w->type));
}

/* One row of a packed tensor: its bytes as they lay before, scale block by scale block. */
static void dsv3i_engine_decode_row(float *y, const dsv3_tensor *w, size_t row) {
    size_t columns = dsv3i_panel_columns(w, row), r = row % DSV3I_PANEL, most = dsv3i_scale_block_terms(w->type);
    size_t first = dsv3_type_block(w->type) > 1 ? 2 : 0; /* bytes of a scale before its codes */
    for (size_t k0 = 0; k0 < w->cols; k0 += most) {
        size_t k = dsv3i_min(most, w->cols - k0), bytes = dsv3_row_bytes(w->type, k);
        const unsigned char *codes = dsv3i_scale_block_at(w, row, k0);
        const unsigned char *scale = codes + dsv3i_codes_bytes(w->type, columns, k);
        unsigned char block[DSV3I_TERMS * sizeof(float)];
        float one;
        DSV3_MEMCPY(block, scale + 2 * r, first);
        for (size_t j = 0; first + j < bytes; j++) {
            size_t word = j / 4 * columns * DSV3I_LANES + r, at = word * 4 + j % 4;
            if (w->type == DSV3_F8_E4M3) at = (word - r % 4) * 4 + j % 4 / 2 * 8 + r % 4 * 2 + j % 2;
            block[first + j] = (unsigned char)(codes[at] ^ (w->type == DSV3_Q8_0 ? 128 : 0));
        }
        dsv3i_plain.decode[w->type](y + k0, block, k);
        if (w->type != DSV3_F8_E4M3) continue;
        DSV3_MEMCPY(&one, scale, sizeof one);
        dsv3i_scale(y + k0, one, k);
    }
}

/* ---- k_blocks: 128 terms of a panel, as products take them */

#define DSV3I_STAGE (DSV3I_PANEL * DSV3I_TERMS) /* floats of a k_block */
/* Floats of a worker's scratch for products: two k_blocks, and scales. */
#define DSV3I_STAGES (2 * DSV3I_STAGE + DSV3I_STAGE / DSV3_QBLOCK)

typedef enum dsv3i_form { DSV3I_FLOATS = 0, DSV3I_BF16S = 1, DSV3I_BYTES = 2 } dsv3i_form; /* of values */

static dsv3i_form dsv3i_form_of(dsv3_type type) {
    if (dsv3_type_block(type) > 1) return DSV3I_BYTES;
    return type == DSV3_BF16 || type == DSV3_F8_E4M3 ? DSV3I_BF16S : DSV3I_FLOATS;
}

/* In both enumerations floats come first, and then BF16 before bytes. */
static dsv3i_gemm_kind dsv3i_gemm_of(dsv3i_form form, int fast) {
    return (dsv3i_gemm_kind)((int)form + (fast && form != DSV3I_FLOATS ? 2 : 0));
}

/* Rows r .. r+rows-1 of w, which do not reach the next multiple of 64, and terms k0 .. k0+k-1, 128 if there are as many. */
typedef struct dsv3i_k_block {
    const dsv3_tensor *w;
    size_t r, rows, k0, k;
} dsv3i_k_block;

/* Codes of a k_block that is not packed, and scales as in dsv3i_panel. FP8 without scales: 1 */
static void dsv3i_k_block_codes(const dsv3_context *ctx, const dsv3i_k_block *b, void *codes, float *scale) {
    const dsv3_tensor *w = b->w;
    const unsigned char *at = dsv3i_scale_at(w, b->r);
    dsv3i_kernels_of(ctx)->pack[w->type](codes, scale, dsv3i_row_at(w, b->r) + dsv3_row_bytes(w->type, b->k0),
                                         dsv3_row_bytes(w->type, w->cols), b->rows, b->k);
    if (w->type != DSV3_F8_E4M3) return;
    *scale = 1.0f;
    if (at != NULL) DSV3_MEMCPY(scale, at + b->k0 / DSV3_BLOCK * sizeof *scale, sizeof *scale);
}

/* A k_block as products take it: where it lies, or made in scratch [DSV3I_STAGES]. Returns which product. Codes become
 * values and these floats, if need be, scale block by scale block; where there are several, values are bytes. In scratch
 * come results, then values that become floats, codes that were not packed, scales. */
static dsv3i_gemm_kind dsv3i_k_block_make(const dsv3_context *ctx, dsv3i_panel *out, const dsv3i_k_block *b, int fast,
                                          int few, float *scratch) {
    const dsv3i_kernels *kernels = dsv3i_kernels_of(ctx);
    dsv3_type type = b->w->type;
    dsv3i_form form = dsv3i_form_of(type);
    int floats = form != DSV3I_FLOATS && !fast && !few, packed_scales = form == DSV3I_BYTES && b->w->packed;
    size_t columns = dsv3i_blocks(b->rows, DSV3I_LANES), lanes = columns * DSV3I_LANES;
    size_t block = dsv3i_min(dsv3i_scale_block_terms(type), b->k), codes = dsv3i_codes_bytes(type, columns, block);
    size_t apart = b->w->packed ? dsv3i_scale_block_bytes(type, columns, block) : codes;
    float *scale = scratch + 2 * DSV3I_STAGE, *made = floats ? scratch + DSV3I_STAGE : scratch;
    unsigned char *own = (unsigned char *)(type == DSV3_F32 ? scratch : scratch + DSV3I_STAGE / 2 * 3);
    const unsigned char *from = b->w->packed ? dsv3i_scale_block_at(b->w, b->r, b->k0) : own;
    size_t bytes = b->w->packed ? dsv3i_panel_bytes(type, columns, b->k) : 0;
    if (!b->w->packed) dsv3i_k_block_codes(ctx, b, own, scale);
    DSV3_MEMSET(out, 0, sizeof *out);
    out->columns = columns;
    out->block = block;
    out->zero = type == DSV3_Q4_0 ? 8 : 128;
    if (type == DSV3_F8_E4M3 || form == DSV3I_BYTES) out->scale = scale;
    out->next = from + bytes;
    out->values = floats || kernels->widen[type] != NULL ? (const void *)scratch : from;
    if (out->values == from) {
        out->ahead = bytes;
        out->gap = packed_scales ? apart - codes : 0;
    } else if (floats) {
        out->next_bytes = bytes;
    }
    if (type == DSV3_F8_E4M3) {
        if (b->w->packed) DSV3_MEMCPY(scale, from + codes, sizeof *scale);
        for (size_t i = 1; i < lanes; i++) scale[i] = *scale;
    }
    for (size_t i = 0; i < b->k; i += block, from += apart) {
        const void *values = from;
        if (packed_scales) ctx->ops->decode[DSV3_F16](scale + i / block * lanes, from + codes, lanes);
        if (kernels->widen[type] != NULL) {
            values = (unsigned char *)made + i * lanes;
            kernels->widen[type]((unsigned char *)made + i * lanes, from, columns, block);
        }
        if (floats) kernels->float_panel[form == DSV3I_BYTES](scratch + i * lanes, values, columns, block, out->zero);
    }
    return dsv3i_gemm_of(floats ? DSV3I_FLOATS : form, fast);
}

/* All k terms of a panel, without scales. */
static dsv3i_panel dsv3i_panel_of(const void *values, size_t columns, size_t k) {
    dsv3i_panel w = {values, columns, NULL, k, 0, 0, 0, values, 0};
    return w;
}

/* ---- Rows of x for products: as they are, or rounded (DSV3_FAST) for one type of weights */

typedef struct dsv3i_input {
    const void *x;
    size_t stride; /* bytes */
    int fast;      /* rounded to what fast products take */
} dsv3i_input;

static dsv3i_input dsv3i_input_floats(const float *x, size_t ldx) {
    dsv3i_input in = {x, ldx * sizeof *x, 0};
    return in;
}

/* Row t on. */
static dsv3i_input dsv3i_input_at(dsv3i_input in, size_t t) {
    in.x = (const unsigned char *)in.x + t * in.stride;
    return in;
}

/* How activations are rounded for weights of this type; NULL: not at all. */
static dsv3i_rounder dsv3i_rounding(const dsv3_context *ctx, dsv3_type type) {
    return ctx->compute == DSV3_FAST ? dsv3i_kernels_of(ctx)->round[type] : NULL;
}

/* Is it to codes, and not to floats? */
static int dsv3i_is_fast(const dsv3_context *ctx, dsv3_type type) {
    dsv3i_form form = dsv3i_form_of(type);
    return form != DSV3I_FLOATS && dsv3i_rounding(ctx, type) != NULL &&
           dsv3i_kernels_of(ctx)->gemm[dsv3i_gemm_of(form, 1)] != NULL;
}

/* Floats from one rounded row of k numbers to the next, at most. */
static size_t dsv3i_rounded_floats(size_t k) { return dsv3i_mul(dsv3i_add(dsv3i_blocks(k, 16), 2), 16); }

/* Bytes of a row of k numbers as products take it. */
static size_t dsv3i_input_bytes(int codes, dsv3_type type, size_t k) {
    if (!codes) return k * sizeof(float);
    return dsv3i_form_of(type) == DSV3I_BF16S ? dsv3i_blocks(k, 4) * 8 : k / DSV3_QBLOCK * (DSV3_QBLOCK + 8);
}

/* Where rounded rows go: not a power of two apart, since a cache would then have room for few of them. */
static dsv3i_input dsv3i_input_rounded(const dsv3_context *ctx, const float *out, const dsv3_tensor *w) {
    dsv3i_input in = dsv3i_input_floats(out, 0);
    in.fast = dsv3i_is_fast(ctx, w->type);
    in.stride = dsv3i_blocks(dsv3i_input_bytes(in.fast, w->type, w->cols), 64) * 64;
    if (in.stride % 256 == 0) in.stride += 64;
    return in;
}

/* Many rows that lie a power of two apart are copied, for the same reason, if they are not rounded. */
static int dsv3i_is_copied(const dsv3_context *ctx, const dsv3_tensor *w, size_t n, size_t ldx) {
    return dsv3i_rounding(ctx, w->type) != NULL || (n > DSV3I_FEW && ldx % 128 == 0);
}

/* Row t: x, rounded or just copied. */
static void dsv3i_input_put(const dsv3_context *ctx, const dsv3i_input *in, size_t t, const float *x,
                            const dsv3_tensor *w) {
    void *to = (unsigned char *)(uintptr_t)in->x + t * in->stride;
    if (dsv3i_rounding(ctx, w->type) != NULL) {
        dsv3i_rounding(ctx, w->type)(to, x, w->cols);
    } else {
        DSV3_MEMCPY(to, x, w->cols * sizeof *x);
    }
}

/* n rows x, ldx floats apart, of grouped rows (pair) those of their tokens, for products with w: as they lie, or rounded
 * or copied into out [n, dsv3i_rounded_floats(cols)]. */
static dsv3i_input dsv3i_input_make(const dsv3i_call *c, float *out, const float *x, size_t ldx, const size_t *pair,
                                    size_t n, const dsv3_tensor *w) {
    dsv3i_input in = dsv3i_input_rounded(c->ctx, out, w);
    if (pair == NULL && !dsv3i_is_copied(c->ctx, w, n, ldx)) return dsv3i_input_floats(x, ldx);
    for (size_t t = 0; t < n; t++) {
        dsv3i_input_put(c->ctx, &in, t, x + (pair != NULL ? pair[t] / c->m.K : t) * ldx, w);
    }
    return in;
}

/* ---- Products of rows of x and rows of w */

#define DSV3I_DECODE 16u /* rows of weights that are decoded together, at most */

/* Floats of a worker's scratch for weights with so many columns. */
static size_t dsv3i_product_floats(size_t cols) { return dsv3i_max(dsv3i_mul(DSV3I_DECODE, cols), DSV3I_STAGES); }

/* y[t ldy + (r - r0)] = x_t . row r of w for n rows x_t and rows r0 <= r < r1 of w. scratch [DSV3I_STAGES] */
static void dsv3i_rows_near_product(const dsv3_context *ctx, float *y, size_t ldy, const dsv3i_input *in, size_t n,
                                    const dsv3_tensor *w, size_t r0, size_t r1, float *scratch) {
    const dsv3i_kernels *kernels = dsv3i_kernels_of(ctx);
    dsv3i_whole whole = in->fast ? kernels->gemm_packed[w->type] : NULL;
    dsv3i_k_block b = {w, 0, 0, 0, 0};
    if (n <= DSV3I_FEW) whole = kernels->gemv[in->fast][w->type];
    if (w->packed && whole != NULL && (in->fast || w->cols % 4 == 0)) {
        size_t rows = n <= DSV3I_FEW ? r1 - r0 : (r1 - r0) / DSV3I_PANEL * DSV3I_PANEL;
        DSV3_ASSERT(r0 % DSV3I_PANEL == 0 && (r1 % DSV3I_PANEL == 0 || r1 == w->rows));
        whole(y, ldy, in->x, in->stride, n, dsv3i_scale_block_at(w, r0, 0), rows, w->cols);
        y += rows;
        r0 += rows;
    }
    for (b.r = r0; b.r < r1; b.r += b.rows) {
        b.rows = dsv3i_min(DSV3I_PANEL - b.r % DSV3I_PANEL, r1 - b.r);
        for (b.k0 = 0; b.k0 < w->cols; b.k0 += b.k) {
            const unsigned char *x = (const unsigned char *)in->x + dsv3i_input_bytes(in->fast, w->type, b.k0);
            dsv3i_panel panel;
            dsv3i_gemm_kind product;
            b.k = dsv3i_min(DSV3I_TERMS, w->cols - b.k0);
            product = dsv3i_k_block_make(ctx, &panel, &b, in->fast, n <= DSV3I_FEW, scratch);
            kernels->gemm[product](y + (b.r - r0), ldy, x, in->stride, n, &panel, b.rows, b.k, b.k0 > 0);
        }
    }
}

/* Rows of x, of n, that go through a k_block of w together: what fits near caches, or four times as many where one is to
 * be made first, or where gemm_packed takes care of that. */
static size_t dsv3i_rows_near(const dsv3_context *ctx, const dsv3_tensor *w, size_t n) {
    int own = dsv3i_rounding(ctx, w->type) != NULL && dsv3i_kernels_of(ctx)->gemm_packed[w->type] != NULL;
    size_t parts = dsv3i_blocks(n, own || !w->packed ? 4 * DSV3I_MANY : DSV3I_MANY);
    return parts > 1 ? dsv3i_blocks(dsv3i_blocks(n, parts), 6) * 6 : n;
}

/* The same of any number of rows: one panel, which stays near, and all rows; or all panels. */
static void dsv3i_rows_product(const dsv3_context *ctx, float *y, size_t ldy, const dsv3i_input *in, size_t n,
                               const dsv3_tensor *w, size_t r0, size_t r1, float *scratch) {
    size_t many = dsv3i_rows_near(ctx, w, n);
    for (size_t r = r0, end; r < r1; r = end) {
        end = many < n ? dsv3i_min(r - r % DSV3I_PANEL + DSV3I_PANEL, r1) : r1;
        for (size_t t = 0; t < n; t += many) {
            dsv3i_input some = dsv3i_input_at(*in, t);
            dsv3i_rows_near_product(ctx, y + t * ldy + (r - r0), ldy, &some, dsv3i_min(many, n - t), w, r, end,
                                    scratch);
        }
    }
}

/* y_t += sum_i x_t[i] w_i for n rows x_t, y_t and, in this order, rows r0 <= i < r1 of w. Each row is decoded once for all
 * of them, or read where it lies. scratch [4, cols], of 8 rows x_t and more [DSV3I_DECODE, cols] */
static void dsv3i_rows_sum(const dsv3_context *ctx, float *y, size_t ldy, const float *x, size_t ldx, size_t n,
                           const dsv3_tensor *w, size_t r0, size_t r1, float *scratch) {
    const dsv3i_kernels *kernels = dsv3i_kernels_of(ctx);
    int floats = w->type == DSV3_F32 && !w->packed && (uintptr_t)w->data % sizeof(float) == 0;
    int few = n <= DSV3I_FEW && kernels->gemv_t[w->type] != NULL && !w->packed;
    size_t most = floats ? r1 - r0 : n < 8 ? 4 : DSV3I_DECODE;
    for (size_t r = r0, rows; r < r1; r += rows) {
        const float *from = scratch;
        rows = dsv3i_min(few ? DSV3_BLOCK - r % DSV3_BLOCK : most, r1 - r);
        for (size_t t = 0; few && t < n; t++) {
            kernels->gemv_t[w->type](y + t * ldy, x + t * ldx + (r - r0), dsv3i_row_at(w, r),
                                     dsv3_row_bytes(w->type, w->cols), dsv3i_scale_at(w, r), rows, w->cols);
        }
        if (few) continue;
        if (floats) from = (const float *)(const void *)dsv3i_row_at(w, r);
        for (size_t i = 0; !floats && i < rows; i++) dsv3i_decode_row(ctx, scratch + i * w->cols, w, r + i);
        kernels->outer(y, ldy, n, x + (r - r0), ldx, 1, from, w->cols, rows, w->cols);
    }
}

/* ---- Work lists: items of several jobs in one loop. Each job begins with `first`, its first item. */

/* The job, from job j on, that item i belongs to. */
static size_t dsv3i_list_at(const void *jobs, size_t size, size_t count, size_t i, size_t j) {
    for (; j + 1 < count; j++) {
        size_t first;
        DSV3_MEMCPY(&first, (const unsigned char *)jobs + (j + 1) * size, sizeof first);
        if (first > i) break;
    }
    return j;
}

/* ---- Linear. A job is y [n, rows] = x [n, cols] W[row .. row+rows)^T; several share one parallel loop, so that small
 * ones (the experts of a token) do not wait for each other. An item is some panels of weights, and some rows of x. */

typedef struct dsv3i_job {
    size_t first;
    dsv3i_product p;
    const size_t *pair; /* of grouped rows: x has those of their tokens, pair / K; else NULL */
    size_t K;
    dsv3i_input in; /* x as the products take it */
} dsv3i_job;

typedef struct dsv3i_linear_arg {
    const dsv3_context *ctx;
    const dsv3i_job *jobs;
    size_t count;
    float *scratch;    /* [workers, DSV3I_STAGES] */
    size_t item, rows; /* rows of weights and of x in an item */
} dsv3i_linear_arg;

/* Items of one job that lie next to each other are done in one go. */
static void dsv3i_jobs_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_linear_arg *a = (const dsv3i_linear_arg *)arg;
    for (size_t i = begin, j = 0, next; i < end; i = next) {
        const dsv3i_job *job = &a->jobs[j = dsv3i_list_at(a->jobs, sizeof *a->jobs, a->count, i, j)];
        const dsv3i_product *p = &job->p;
        size_t panels = dsv3i_blocks(p->rows, a->item), part = (i - job->first) / panels, t = part * a->rows;
        size_t r = (i - job->first) % panels * a->item, last;
        dsv3i_input some = dsv3i_input_at(job->in, t);
        next = dsv3i_min(end, job->first + (part + 1) * panels);
        last = dsv3i_min(r + (next - i) * a->item, p->rows);
        dsv3i_rows_product(a->ctx, p->y + t * p->rows + r, p->rows, &some, dsv3i_min(a->rows, p->n - t), p->w,
                           p->row + r, p->row + last, a->scratch + worker * DSV3I_STAGES);
    }
}

/* Rounds the rows of all jobs; `first` counts rows here. */
static void dsv3i_round_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_linear_arg *a = (const dsv3i_linear_arg *)arg;
    (void)worker;
    for (size_t i = begin, j = 0; i < end; i++) {
        const dsv3i_job *job = &a->jobs[j = dsv3i_list_at(a->jobs, sizeof *a->jobs, a->count, i, j)];
        size_t t = i - job->first, row = job->pair != NULL ? job->pair[t] / job->K : t;
        dsv3i_input_put(a->ctx, &job->in, t, job->p.x + row * job->p.w->cols, job->p.w);
    }
}

/* Do both want the same of the same rows? */
static int dsv3i_same_input(const dsv3_context *ctx, const dsv3i_job *a, const dsv3i_job *b) {
    return a->p.x == b->p.x && a->pair == b->pair && a->p.n == b->p.n && a->p.w->cols == b->p.w->cols &&
           dsv3i_rounding(ctx, a->p.w->type) == dsv3i_rounding(ctx, b->p.w->type);
}

/* rounded: room for the rows of all jobs that do not share them with the job before. */
static void dsv3i_round_jobs(dsv3i_linear_arg *arg, dsv3i_job *jobs, float *rounded) {
    size_t rows = 0, work = 0;
    for (size_t j = 0; j < arg->count; j++) {
        dsv3i_product *p = &jobs[j].p;
        size_t floats = dsv3i_rounded_floats(p->w->cols);
        jobs[j].first = rows;
        jobs[j].in = dsv3i_input_floats(p->x, p->w->cols);
        if (jobs[j].pair == NULL && !dsv3i_is_copied(arg->ctx, p->w, p->n, p->w->cols)) continue;
        if (j > 0 && dsv3i_same_input(arg->ctx, &jobs[j - 1], &jobs[j])) {
            jobs[j].in = jobs[j - 1].in;
            continue;
        }
        jobs[j].in = dsv3i_input_rounded(arg->ctx, rounded, p->w);
        rounded += p->n * floats;
        rows += p->n;
        work = dsv3i_add(work, dsv3i_mul(p->n, 4 * floats));
    }
    dsv3i_parallel(arg->ctx, rows, work, dsv3i_round_task, arg);
}

/* All jobs in one loop. scratch [threads, DSV3I_STAGES]; rounded: as for dsv3i_round_jobs. Rows of weights in an item:
 * some panels, which are read side by side when there is one row of x, but enough items for all threads. Rows of x in it:
 * all, or fewer, if they are many, to have eight items for each thread. */
static void dsv3i_jobs_run(const dsv3_context *ctx, dsv3i_job *jobs, size_t count, float *scratch, float *rounded) {
    dsv3i_linear_arg arg = {ctx, jobs, count, scratch, DSV3I_PANEL, 1};
    size_t panels = 0, items = 0, work = 0, threads = ctx->threads;
    for (size_t j = 0; j < count; j++) {
        const dsv3i_product *p = &jobs[j].p;
        panels += dsv3i_blocks(p->rows, DSV3I_PANEL);
        arg.rows = dsv3i_max(arg.rows, p->n);
        work = dsv3i_add(work, dsv3i_mul(dsv3i_mul(p->rows, p->w->cols), p->n));
    }
    if (arg.rows == 1) arg.item *= dsv3i_max(dsv3i_min(8, panels / (2 * threads)), 1);
    for (size_t j = 0; j < count; j++) items += dsv3i_blocks(jobs[j].p.rows, arg.item);
    if (threads > 1) {
        size_t n = dsv3i_blocks(arg.rows, dsv3i_blocks(8 * threads, items));
        arg.rows = dsv3i_blocks(dsv3i_max(n, 48), 6) * 6;
    }
    dsv3i_round_jobs(&arg, jobs, rounded);
    items = 0;
    for (size_t j = 0; j < count; j++) {
        jobs[j].first = items;
        items += dsv3i_blocks(jobs[j].p.rows, arg.item) * dsv3i_blocks(jobs[j].p.n, arg.rows);
    }
    dsv3i_parallel(ctx, items, work, dsv3i_jobs_task, &arg);
}

static void dsv3i_fast_linear(const dsv3_context *ctx, const dsv3i_product *list, size_t count, float *scratch) {
    dsv3i_job jobs[DSV3I_PRODUCTS];
    for (size_t j = 0; j < count; j++) {
        jobs[j].p = list[j];
        jobs[j].pair = NULL;
    }
    dsv3i_jobs_run(ctx, jobs, count, scratch, scratch + ctx->threads * DSV3I_STAGES);
}

static size_t dsv3i_engine_linear_floats(size_t n, size_t cols, size_t threads) {
    return dsv3i_add(dsv3i_mul(threads, dsv3i_product_floats(cols)), dsv3i_mul(n, dsv3i_rounded_floats(cols)));
}

#ifndef DSV3_NO_TRAINING
/* ---- Backward of linear. What reads the same rows comes one after the other: they are still in a cache then. */

#define DSV3I_BACK 96u /* rows of dx, or of dW, that one item works on, at most */

typedef struct dsv3i_backward_job {
    size_t first, dx_first; /* its first items: of dW, and of dx */
    dsv3i_product p;        /* y is dy */
    float *dx, *dw;         /* [n, cols], [rows, cols]; NULL: not wanted */
    int beta0;              /* dx is set, not added to */
    int joint;              /* the next job, of the same shape, has no dx: its dy W goes to this one's, too */
} dsv3i_backward_job;

static dsv3i_backward_job dsv3i_backward_job_of(float *dx, int beta0, float *dw, dsv3i_product p) {
    dsv3i_backward_job job = {0, 0, p, dx, dw, beta0, 0};
    return job;
}

typedef struct dsv3i_backward_arg {
    const dsv3_context *ctx;
    dsv3i_backward_job *jobs;
    size_t count, item; /* item: rows of dx, or of dW */
    float *scratch;     /* [workers, floats] */
    size_t floats;      /* as dsv3i_rows_sum wants them */
} dsv3i_backward_arg;

/* Item = some rows of dW += dy^T x of a job, or of dx += dy W of a job or of two. */
static void dsv3i_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_backward_arg *a = (const dsv3i_backward_arg *)arg;
    for (size_t i = begin, j = 0; i < end; i++) {
        const dsv3i_backward_job *job = &a->jobs[j = dsv3i_list_at(a->jobs, sizeof *a->jobs, a->count, i, j)];
        const dsv3i_product *p = &job->p;
        int weights = i < job->dx_first;
        size_t d = p->w->cols, at = (i - (weights ? job->first : job->dx_first)) * a->item;
        size_t n = dsv3i_min(a->item, (weights ? p->rows : p->n) - at);
        if (weights) {
            dsv3i_kernels_of(a->ctx)->outer(job->dw + at * d, d, n, p->y + at, 1, p->rows, p->x, d, p->n, d);
            continue;
        }
        if (job->beta0) DSV3_MEMSET(job->dx + at * d, 0, n * d * sizeof *job->dx);
        for (const dsv3i_backward_job *from = job; from <= job + (job->joint != 0); from++) {
            p = &from->p;
            dsv3i_rows_sum(a->ctx, job->dx + at * d, d, p->y + at * p->rows, p->rows, n, p->w, p->row,
                           p->row + p->rows, a->scratch + worker * a->floats);
        }
    }
}

/* Items of all jobs. Those of dW come first: they are the longest, and the loop's end would wait for them. */
static size_t dsv3i_backward_items(const dsv3i_backward_arg *a) {
    size_t items = 0;
    for (size_t j = 0; j < a->count; j++) {
        dsv3i_backward_job *job = &a->jobs[j];
        job->first = items;
        if (job->dw != NULL && job->p.n > 0) items += dsv3i_blocks(job->p.rows, a->item);
        job->dx_first = items;
        if (job->dx != NULL) items += dsv3i_blocks(job->p.n, a->item);
    }
    return items;
}

/* All jobs in one loop; none reads or writes what another writes. scratch [threads, DSV3I_DECODE, most columns] */
static void dsv3i_backward_run(const dsv3_context *ctx, dsv3i_backward_job *jobs, size_t count, float *scratch) {
    dsv3i_backward_arg arg = {ctx, jobs, count, DSV3I_BACK, scratch, 0};
    size_t work = 0, items = dsv3i_backward_items(&arg);
    for (size_t j = 0; j < count; j++) {
        const dsv3i_product *p = &jobs[j].p;
        arg.floats = dsv3i_max(arg.floats, DSV3I_DECODE * p->w->cols);
        work = dsv3i_add(work, dsv3i_mul(dsv3i_mul(p->rows, p->w->cols), p->n));
    }
    while (arg.item > 12 && ctx->threads > 1 && items < 8 * ctx->threads) { /* enough items for all threads */
        arg.item /= 2;
        items = dsv3i_backward_items(&arg);
    }
    dsv3i_parallel(ctx, items, work, dsv3i_backward_task, &arg);
}

static void dsv3i_fast_linear_backward(const dsv3_context *ctx, float *dx, int beta0, float *dw,
                                       const dsv3i_product *p, float *scratch) {
    dsv3i_backward_job job = dsv3i_backward_job_of(dx, beta0, dw, *p);
    dsv3i_backward_run(ctx, &job, 1, scratch);
}
#endif

/* ---- Attention. Up to 64 queries attend to up to 64 keys together: an attention tile.
 *
 * Segments. In the absorbed form all heads share their keys, and a token that is decoded behind a long past has more
 * keys than heads to give to threads: the past is cut at fixed positions into segments, whose (m, l, o) are built up
 * independently. Two of them join as a block does: with M the larger of m and m',
 *     l'' = l exp(m - M) + l' exp(m' - M)      o'' = o exp(m - M) + o' exp(m' - M)
 * in the order of their positions, whoever computed them. */

#define DSV3I_TILE_KEYS 64u /* keys of a tile */
#ifndef DSV3I_SEGMENT
#define DSV3I_SEGMENT 256u /* keys per segment, DSV3I_TILE_KEYS times a whole number */
#endif
#if DSV3I_SEGMENT % DSV3I_TILE_KEYS != 0
#error "a segment is whole blocks of keys"
#endif
#define DSV3I_QUERIES 8u  /* rows of a window: they share decoded rows of kv_b_proj in the absorbed form */
#define DSV3I_EXPAND 128u /* keys expanded together, DSV3I_TILE_KEYS times a whole number */

/* In the absorbed form a window of rows goes through three loops: the queries of each head; groups of queries attend to
 * segments of their cache; the sums of segments join, in their order, and UV is applied. */
typedef struct dsv3i_attention {
    const dsv3i_call *c;
    const dsv3_tensor *kv_up; /* kv_b_proj, or its packed copy, for products with its rows */
    float *query, *mean;      /* [window, H, rk+dr], [window, H, rk] */
    float *part;   /* [count, queries, part_floats] sums over segments: [rk], maximum, sum of exponentials */
    float *worker; /* [threads, worker_floats] */
    size_t part_floats, tile_floats, worker_floats;
    size_t t0, t1, queries; /* rows of the window, and H times as many queries */
    size_t segment, count;  /* segments [segment, segment + count) are dealt with, */
    size_t segments;        /* of so many, at most */
} dsv3i_attention;

/* Groups of queries times segments that are worked on at once, at most: no fewer than there are groups in a window, and
 * enough for all threads when there is one. */
static size_t dsv3i_parts(const dsv3i_dims *m, size_t n, size_t threads) {
    size_t rows = dsv3i_min(n, DSV3I_QUERIES), groups = dsv3i_add(dsv3i_blocks(dsv3i_mul(rows, m->H), 64), rows - 1);
    return dsv3i_max(groups, threads > 1 ? dsv3i_mul(8, threads) : 1);
}

/* Floats for products with kv_b_proj: of its rows, and behind them for rounded latents. */
static size_t dsv3i_up_floats(const dsv3i_dims *m) {
    return dsv3i_add(dsv3i_product_floats(m->rk), dsv3i_mul(DSV3I_EXPAND, dsv3i_rounded_floats(m->rk)));
}

/* Of calls of n rows: sizes, and places. A worker has room for products with kv_b_proj, a tile, decoded latents, expanded
 * keys and values; a tile for queries as a panel, scores of whole columns, and keys and values, rounded. */
static size_t dsv3i_attention_layout(dsv3i_attention *at, const dsv3i_dims *m, size_t n, size_t threads,
                                     float *scratch) {
    dsv3i_layout l = {(unsigned char *)scratch, 0};
    size_t window = dsv3i_min(n, DSV3I_QUERIES), wide, dk, expanded = dsv3i_add(m->width, dsv3i_add(m->qk, m->dv));
    size_t lanes = dsv3i_min(64, dsv3i_max(n, dsv3i_mul(window, m->H)));
    at->part_floats = dsv3i_mul(dsv3i_blocks(dsv3i_add(m->rk, 2), DSV3I_LANES), DSV3I_LANES);
    wide = dsv3i_blocks(dsv3i_max(m->rk, m->dv), DSV3I_LANES) * DSV3I_LANES;
    dk = dsv3i_add(dsv3i_max(dsv3i_max(m->width, m->qk), wide), 4);
    wide = dsv3i_blocks(lanes, DSV3I_LANES) * DSV3I_LANES;
    at->tile_floats = dsv3i_add(dsv3i_mul(wide, dsv3i_add(dk, DSV3I_TILE_KEYS)), dsv3i_mul(DSV3I_TILE_KEYS, dk));
    at->worker_floats = dsv3i_add(dsv3i_up_floats(m), dsv3i_add(at->tile_floats, dsv3i_mul(DSV3I_EXPAND, expanded)));
    at->worker_floats = dsv3i_mul(dsv3i_blocks(at->worker_floats, 16), 16); /* on cache lines of their own */
    at->query = (float *)dsv3i_take(&l, sizeof(float), window, m->H, m->width);
    at->mean = (float *)dsv3i_take(&l, sizeof(float), window, m->H, m->rk);
    at->part = (float *)dsv3i_take(&l, sizeof(float), dsv3i_parts(m, n, threads), lanes, at->part_floats);
    at->worker = (float *)dsv3i_take(&l, sizeof(float), threads, at->worker_floats, 1);
    return l.used;
}

/* ---- Attention tiles */

/* The kernels' attend that applies. */
static int dsv3i_tile_kind(const dsv3_context *ctx) {
    return ctx->compute == DSV3_FAST && dsv3i_kernels_of(ctx)->attend[1] != NULL;
}

/* Scores p [nk] of query i become weights, 0 for keys it does not see; its sums are rescaled to the new maximum. */
static void dsv3i_tile_weights(dsv3i_attention_tile *a, size_t i, float *p, size_t nk) {
    size_t seen = (size_t)a->seen[i];
    float top = a->top[i], rescale, *out = a->out + i * a->ld_out;
    for (size_t j = 0; j < nk; j++) {
        p[j] = j < seen ? p[j] * a->scale : 0.0f;
        if (j < seen && p[j] > top) top = p[j];
    }
    rescale = DSV3_EXPF(a->top[i] - top);
    a->top[i] = top;
    a->sum[i] = a->sum[i] * rescale + a->ctx->ops->exp_sum(p, p, top, seen);
    for (size_t j = 0; j < a->dv; j++) out[j] *= rescale;
}

/* attend, of an instruction set that has tile and outer, and no more. */
static void dsv3i_tile_attend(dsv3i_attention_tile *a, size_t nk) {
    const float *keys = (const float *)a->keys, *values = (const float *)a->values;
    float *p = (float *)a->scratch;
    dsv3i_kernels_of(a->ctx)->tile(p, nk, a->q, a->ld_q, a->lanes, keys, a->ld_k, nk, a->dk);
    for (size_t i = 0; i < a->lanes; i++) dsv3i_tile_weights(a, i, p + i * nk, nk);
    dsv3i_kernels_of(a->ctx)->outer(a->out, a->ld_out, a->lanes, p, nk, 1, values, a->ld_v, nk, a->dv);
}

static dsv3i_attention_tile dsv3i_tile_of(const dsv3i_call *c, void *scratch, dsv3_type type, size_t dk, size_t dv) {
    dsv3i_attention_tile a;
    a.ctx = c->ctx;
    a.scratch = scratch;
    a.type = type;
    a.dk = dk;
    a.dv = dv;
    a.scale = c->model->softmax_scale;
    return a;
}

/* Queries and sums are there, the latter as state [lanes, 2], ld floats apart. What is behind the lanes repeats the last. */
static void dsv3i_tile_begin(dsv3i_attention_tile *a, const float *state, size_t ld) {
    const dsv3i_kernels *kernels = dsv3i_kernels_of(a->ctx);
    int kind = dsv3i_tile_kind(a->ctx);
    for (size_t i = 0; i < 64; i++) {
        a->top[i] = state[dsv3i_min(i, a->lanes - 1) * ld];
        a->sum[i] = state[dsv3i_min(i, a->lanes - 1) * ld + 1];
    }
    if (kernels->attend_begin[kind] != NULL) kernels->attend_begin[kind](a);
}

static void dsv3i_tile_end(const dsv3i_attention_tile *a, float *state, size_t ld) {
    for (size_t i = 0; i < a->lanes; i++) {
        state[i * ld] = a->top[i];
        state[i * ld + 1] = a->sum[i];
    }
}

/* Are there keys, of nk, that a query does not see and whose values are not finite? */
static int dsv3i_tile_hides(const dsv3i_attention_tile *a, size_t nk) {
    size_t least = nk;
    for (size_t i = 0; i < a->lanes; i++) least = dsv3i_min(least, (size_t)a->seen[i]);
    for (; least < nk; least++) {
        for (size_t i = 0; i < a->dv; i += 64) {
            size_t at = least * a->ld_v + i, n = dsv3i_min(64, a->dv - i);
            float v[64];
            a->ctx->ops->decode[a->type](v, (const unsigned char *)a->values + at * dsv3_type_bytes(a->type), n);
            if (!dsv3i_is_finite(a->ctx->ops->dot(v, v, n))) return 1;
        }
    }
    return 0;
}

/* Each query by itself, with the keys that it sees. */
static void dsv3i_tile_one_by_one(dsv3i_attention_tile *a) {
    float state[128];
    dsv3i_tile_end(a, state, 2);
    for (size_t i = 0; i < a->lanes; i++) {
        dsv3i_attention_tile one = *a;
        one.lanes = 1;
        one.q = a->q + i * a->ld_q;
        one.out = a->out + i * a->ld_out;
        for (size_t j = 0; j < 64; j++) one.seen[j] = a->seen[i];
        dsv3i_tile_begin(&one, state + 2 * i, 2);
        if (a->seen[i] > 0) dsv3i_kernels_of(a->ctx)->attend[dsv3i_tile_kind(a->ctx)](&one, (size_t)a->seen[i]);
        dsv3i_tile_end(&one, state + 2 * i, 2);
    }
    dsv3i_tile_begin(a, state, 2);
}

/* The nk keys from position b on. Its queries are those with numbers query, query + step, ..; head h of row t has number
 * t H + h. What a query does not see must not matter to it, not even as 0 times infinity. */
static void dsv3i_tile_keys(dsv3i_attention_tile *a, const dsv3i_call *c, size_t query, size_t step, size_t b,
                            size_t nk) {
    size_t row = query / c->m.H, h = query % c->m.H;
    for (size_t i = 0; i < 64; i++) {
        size_t position = (size_t)c->ws->position[row];
        a->seen[i] = position < b ? 0 : (int32_t)dsv3i_min(nk, position - b + 1);
        if (i + 1 < a->lanes) h += step;
        for (; h >= c->m.H; h -= c->m.H) row++;
    }
    if (dsv3i_tile_hides(a, nk)) {
        dsv3i_tile_one_by_one(a);
    } else {
        dsv3i_kernels_of(a->ctx)->attend[dsv3i_tile_kind(a->ctx)](a, nk);
    }
}

/* ---- Absorbed form */

/* Item = a head: its queries, UK^T qn with the rotated parts behind, and sums to begin with. */
static void dsv3i_absorb_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_attention *b = (const dsv3i_attention *)arg;
    const dsv3i_dims *m = &b->c->m;
    for (size_t h = begin; h < end; h++) {
        const float *q = b->c->ws->q + b->t0 * m->Hq + h * m->qk;
        float *query = b->query + h * m->width, *state = b->c->ws->softmax + (b->t0 * m->H + h) * 2;
        for (size_t i = 0; i < b->t1 - b->t0; i++) {
            float *to = query + i * m->H * m->width;
            DSV3_MEMSET(to, 0, m->rk * sizeof *to);
            DSV3_MEMCPY(to + m->rk, q + i * m->Hq + m->dn, m->dr * sizeof *to);
            dsv3i_attend_begin(b->mean + (i * m->H + h) * m->rk, state + i * m->H * 2, m->rk);
        }
        dsv3i_rows_sum(b->c->ctx, query, m->H * m->width, q, m->Hq, b->t1 - b->t0, &b->c->w->kv_b_proj, h * m->kv,
                       h * m->kv + m->dn, b->worker + worker * b->worker_floats);
    }
}

/* Queries of the window, from `first` on, that make a group: up to 64 of one sequence. */
static size_t dsv3i_group_lanes(const dsv3i_attention *b, size_t first) {
    const int32_t *leader = b->c->ws->leader;
    size_t H = b->c->m.H, t = b->t0 + first / H, end = t + 1;
    while (end < b->t1 && leader[end] == leader[t]) end++;
    return dsv3i_min(64, (end - b->t0) * H - first);
}

/* Item = a group of queries, from `first` on, and one of the segments. */
static void dsv3i_segment_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_attention *b = (const dsv3i_attention *)arg;
    const dsv3i_call *c = b->c;
    const dsv3i_dims *m = &c->m;
    float *scratch = b->worker + worker * b->worker_floats;
    for (size_t i = begin; i < end; i++) {
        size_t first = 0, s = i % b->count, at = (b->segment + s) * DSV3I_SEGMENT, last;
        const dsv3_cache *cache;
        dsv3i_attention_tile tile = dsv3i_tile_of(c, scratch, DSV3_F32, m->width, m->rk);
        float *state;
        for (size_t group = 0; group < i / b->count; group++) first += dsv3i_group_lanes(b, first);
        cache = &c->caches[c->ws->sequence[b->t0 + first / m->H]];
        if (dsv3i_tile_kind(c->ctx) == 1 && cache->type == DSV3_BF16 && m->width % 2 == 0) tile.type = DSV3_BF16;
        tile.lanes = dsv3i_group_lanes(b, first);
        tile.q = b->query + first * m->width;
        tile.out = b->part + (s * b->queries + first) * b->part_floats;
        tile.ld_q = tile.ld_k = tile.ld_v = m->width;
        tile.ld_out = b->part_floats;
        state = tile.out + m->rk;
        for (size_t t = 0; t < tile.lanes; t++) {
            dsv3i_attend_begin(tile.out + t * tile.ld_out, state + t * tile.ld_out, m->rk);
        }
        dsv3i_tile_begin(&tile, state, tile.ld_out);
        last = (size_t)c->ws->position[b->t0 + (first + tile.lanes - 1) / m->H] + 1;
        last = dsv3i_min(at + DSV3I_SEGMENT, last);
        for (size_t nk; at < last; at += nk) {
            nk = dsv3i_min(DSV3I_TILE_KEYS, last - at);
            tile.keys = tile.type == DSV3_BF16
                            ? (const void *)dsv3i_cache_at(cache, c->layer, at)
                            : dsv3i_cache_load(c->ctx, cache, c->layer, at, nk, scratch + b->tile_floats);
            tile.values = tile.keys;
            dsv3i_tile_keys(&tile, c, b->t0 * m->H + first, 1, at, nk);
        }
        dsv3i_tile_end(&tile, state, tile.ld_out);
    }
}

/* Sums over one more segment join those so far: both are scaled to the larger maximum. */
static void dsv3i_part_join(const dsv3_context *ctx, float *mean, float state[2], const float *part, size_t rk) {
    float top = part[rk] > state[0] ? part[rk] : state[0];
    float now = DSV3_EXPF(state[0] - top), add = DSV3_EXPF(part[rk] - top);
    if (part[rk + 1] <= 0.0f) return; /* it saw none */
    if (now < 1.0f) dsv3i_scale(mean, now, rk);
    ctx->ops->axpy(mean, add, part, rk);
    state[0] = top;
    state[1] = state[1] * now + part[rk + 1] * add;
}

/* Item = a head: segments join, and after the last one o = UV m. */
static void dsv3i_join_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_attention *b = (const dsv3i_attention *)arg;
    const dsv3i_call *c = b->c;
    const dsv3i_dims *m = &c->m;
    float *scratch = b->worker + worker * b->worker_floats;
    int last = b->segment + b->count == b->segments;
    for (size_t h = begin; h < end; h++) {
        dsv3i_input in;
        for (size_t query = h; query < b->queries; query += m->H) {
            float *mean = b->mean + query * m->rk, *state = c->ws->softmax + (b->t0 * m->H + query) * 2;
            for (size_t s = 0; s < b->count; s++) {
                dsv3i_part_join(c->ctx, mean, state, b->part + (s * b->queries + query) * b->part_floats, m->rk);
            }
            if (last) dsv3i_attend_end(mean, state, m->rk);
        }
        if (!last) continue;
        in = dsv3i_input_make(c, scratch + dsv3i_product_floats(m->rk), b->mean + h * m->rk, m->H * m->rk, NULL,
                              b->t1 - b->t0, b->kv_up);
        dsv3i_rows_product(c->ctx, c->ws->o + b->t0 * m->Ho + h * m->dv, m->Ho, &in, b->t1 - b->t0, b->kv_up,
                           h * m->kv + m->dn, (h + 1) * m->kv, scratch);
    }
}

/* Rows [t0, t1), all of the absorbed form. */
static void dsv3i_absorbed_window(dsv3i_attention *b, size_t t0, size_t t1) {
    const dsv3i_call *c = b->c;
    const dsv3i_dims *m = &c->m;
    size_t last = 0, groups = 0, parts = dsv3i_parts(m, c->ws->rows, c->ws->threads);
    b->t0 = t0;
    b->t1 = t1;
    b->queries = (t1 - t0) * m->H;
    for (size_t t = t0; t < t1; t++) last = dsv3i_max(last, (size_t)c->ws->position[t]);
    for (size_t i = 0; i < b->queries; i += dsv3i_group_lanes(b, i)) groups++;
    b->segments = last / DSV3I_SEGMENT + 1;
    dsv3i_parallel(c->ctx, m->H, dsv3i_mul(b->queries, m->dn * m->rk), dsv3i_absorb_task, b);
    for (b->segment = 0; b->segment < b->segments; b->segment += b->count) {
        size_t keys, up = dsv3i_mul(b->queries, m->dv * m->rk);
        b->count = dsv3i_min(parts / groups, b->segments - b->segment);
        keys = dsv3i_min(b->count * DSV3I_SEGMENT, last + 1 - b->segment * DSV3I_SEGMENT);
        dsv3i_parallel(c->ctx, groups * b->count, dsv3i_mul(b->queries, keys * (m->width + m->rk)),
                       dsv3i_segment_task, b);
        if (b->segment + b->count < b->segments) up = dsv3i_mul(b->queries, b->count * m->rk);
        dsv3i_parallel(c->ctx, m->H, up, dsv3i_join_task, b);
    }
}

/* ---- Expanded form */

/* Latents [nk, rk] as products with kv_b_proj take them: cache rows where they lie, if these are what would come out;
 * else decoded into latents, and rounded into scratch. */
static dsv3i_input dsv3i_latent_input(const dsv3i_attention *a, const dsv3_cache *cache, size_t b, size_t nk,
                                      float *latents, float *scratch) {
    const dsv3i_call *c = a->c;
    dsv3_type type = a->kv_up->type;
    if (cache->type == DSV3_BF16 && dsv3i_form_of(type) == DSV3I_BF16S && dsv3i_is_fast(c->ctx, type) &&
        c->m.rk % 4 == 0) {
        dsv3i_input in = {dsv3i_cache_at(cache, c->layer, b), c->m.width * 2, 1};
        return in;
    }
    return dsv3i_input_make(c, scratch, dsv3i_cache_load(c->ctx, cache, c->layer, b, nk, latents), c->m.width, NULL,
                            nk, a->kv_up);
}

/* n rows of `width` floats become BF16, each behind the last, in place. Returns the width of such a row. */
static size_t dsv3i_round_rows(const dsv3_context *ctx, float *x, size_t n, size_t width) {
    size_t ld = dsv3i_blocks(width, 4) * 4;
    for (size_t j = 0; j < n; j++) {
        dsv3i_kernels_of(ctx)->round[DSV3_BF16]((unsigned char *)x + 2 * j * ld, x + j * width, width);
    }
    return ld;
}

/* Keys [nk, dn+dr] and values [nk, dv] of head h at positions b .. b+nk-1, for a tile. They are rounded once for all
 * queries, if attend can take what it would round each time. */
static void dsv3i_expand_keys(const dsv3i_attention *a, dsv3i_attention_tile *tile, const dsv3_cache *cache, size_t b,
                              size_t nk, size_t h, float *scratch) {
    const dsv3i_call *c = a->c;
    const dsv3i_dims *m = &c->m;
    size_t first = h * m->kv, size = dsv3_type_bytes(cache->type);
    float *latents = scratch + dsv3i_up_floats(m) + a->tile_floats, *keys = latents + DSV3I_EXPAND * m->width;
    float *values = keys + DSV3I_EXPAND * m->qk;
    dsv3i_input in = dsv3i_latent_input(a, cache, b, nk, latents, scratch + dsv3i_product_floats(m->rk));
    dsv3i_rows_product(c->ctx, keys, m->qk, &in, nk, a->kv_up, first, first + m->dn, scratch);
    dsv3i_rows_product(c->ctx, values, m->dv, &in, nk, a->kv_up, first + m->dn, first + m->kv, scratch);
    for (size_t j = 0; j < nk; j++) {
        c->ctx->ops->decode[cache->type](keys + j * m->qk + m->dn,
                                         dsv3i_cache_at(cache, c->layer, b + j) + m->rk * size, m->dr);
    }
    tile->keys = keys;
    tile->values = values;
    tile->type = DSV3_F32;
    tile->ld_k = m->qk;
    tile->ld_v = m->dv;
    if (dsv3i_tile_kind(c->ctx) != 1 || m->qk % 2 != 0 || m->dv < 4) return;
    tile->type = DSV3_BF16;
    tile->ld_k = dsv3i_round_rows(c->ctx, keys, nk, m->qk);
    tile->ld_v = dsv3i_round_rows(c->ctx, values, nk, m->dv);
}

/* Head h of rows t .. of one sequence, up to 64 next to each other, attends to nk expanded keys from position b on. Sums
 * live in ws->o and ws->softmax. Returns how many rows. */
static size_t dsv3i_expanded_rows(const dsv3i_call *c, dsv3i_attention_tile tile, size_t t, size_t h, size_t b,
                                  size_t nk) {
    const dsv3i_dims *m = &c->m;
    const dsv3i_workspace *ws = c->ws;
    const unsigned char *keys = (const unsigned char *)tile.keys, *values = (const unsigned char *)tile.values;
    float *state = ws->softmax + (t * m->H + h) * 2;
    size_t last;
    tile.lanes = 1;
    while (tile.lanes < 64 && t + tile.lanes < c->n && ws->leader[t + tile.lanes] == ws->leader[t]) tile.lanes++;
    last = (size_t)ws->position[t + tile.lanes - 1];
    if (last < b) return tile.lanes;
    tile.q = ws->q + t * m->Hq + h * m->qk;
    tile.out = ws->o + t * m->Ho + h * m->dv;
    tile.ld_q = m->Hq;
    tile.ld_out = m->Ho;
    dsv3i_tile_begin(&tile, state, 2 * m->H);
    for (size_t j = 0; j < nk && b + j <= last; j += DSV3I_TILE_KEYS) {
        tile.keys = keys + j * tile.ld_k * dsv3_type_bytes(tile.type);
        tile.values = values + j * tile.ld_v * dsv3_type_bytes(tile.type);
        dsv3i_tile_keys(&tile, c, t * m->H + h, m->H, b + j, dsv3i_min(DSV3I_TILE_KEYS, nk - j));
    }
    dsv3i_tile_end(&tile, state, 2 * m->H);
    return tile.lanes;
}

/* Item = a head and a row, which counts if a sequence begins there: so all threads have some. A block of keys is expanded
 * once for all rows of the sequence. */
static void dsv3i_expanded_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_attention *a = (const dsv3i_attention *)arg;
    const dsv3i_call *c = a->c;
    const dsv3i_dims *m = &c->m;
    const dsv3i_workspace *ws = c->ws;
    float *scratch = a->worker + worker * a->worker_floats;
    dsv3i_attention_tile tile = dsv3i_tile_of(c, scratch + dsv3i_up_floats(m), DSV3_F32, m->qk, m->dv);
    for (size_t i = begin; i < end; i++) {
        size_t leader = i % c->n, h = i / c->n, last = 0;
        float *state = ws->softmax + 2 * h, *o = ws->o + h * m->dv;
        if (!ws->expanded[leader] || ws->leader[leader] != (int32_t)leader) continue;
        for (size_t t = leader; t < c->n; t++) {
            if (ws->leader[t] != (int32_t)leader) continue;
            last = (size_t)ws->position[t];
            dsv3i_attend_begin(o + t * m->Ho, state + t * 2 * m->H, m->dv);
        }
        for (size_t b = 0; b <= last; b += DSV3I_EXPAND) {
            size_t nk = dsv3i_min(DSV3I_EXPAND, last - b + 1);
            dsv3i_expand_keys(a, &tile, &c->caches[ws->sequence[leader]], b, nk, h, scratch);
            for (size_t t = leader; t < c->n;) {
                t += ws->leader[t] == (int32_t)leader ? dsv3i_expanded_rows(c, tile, t, h, b, nk) : 1;
            }
        }
        for (size_t t = leader; t < c->n; t++) {
            if (ws->leader[t] == (int32_t)leader) dsv3i_attend_end(o + t * m->Ho, state + t * 2 * m->H, m->dv);
        }
    }
}

static void dsv3i_fast_attend(dsv3i_call *c) {
    const dsv3i_workspace *ws = c->ws;
    int expanded = 0;
    dsv3i_attention a;
    (void)dsv3i_attention_layout(&a, &c->m, ws->rows, ws->threads, ws->scratch);
    a.c = c;
    a.kv_up = c->w->kv_b_packed.data != NULL ? &c->w->kv_b_packed : &c->w->kv_b_proj;
    for (size_t t = 0, end; t < c->n; t = end) {
        for (end = t; end < c->n && end - t < DSV3I_QUERIES && !ws->expanded[end];) end++;
        if (end > t) dsv3i_absorbed_window(&a, t, end);
        if (end == t) end++, expanded = 1;
    }
    if (expanded) dsv3i_parallel(c->ctx, c->n * c->m.H, dsv3i_attend_work(c), dsv3i_expanded_task, &a);
}

#ifndef DSV3_NO_TRAINING
/* ---- Backward of attention: blocks of keys and blocks of rows */

#define DSV3I_BACK_ROWS 48u /* rows of a block */
#define DSV3I_BACK_KEYS 64u /* keys of a block */

/* Floats of a worker's scratch: keys and values as panels, p and dA. */
static size_t dsv3i_attend_backward_floats(const dsv3i_dims *m) {
    size_t panels = dsv3i_mul(DSV3I_BACK_KEYS, dsv3i_add(m->qk, m->dv));
    return dsv3i_add(panels, 2 * DSV3I_BACK_ROWS * DSV3I_BACK_KEYS);
}

/* y[t, r] = x_t . w_r for nq rows x_t, ldx floats apart, and a panel of nk rows w_r. y [nq, BACK_KEYS] */
static void dsv3i_block_dots(const dsv3_context *ctx, float *y, const float *x, size_t ldx, size_t nq, const float *w,
                             size_t nk, size_t k) {
    dsv3i_panel panel = dsv3i_panel_of(w, dsv3i_blocks(nk, DSV3I_LANES), k);
    dsv3i_kernels_of(ctx)->gemm[DSV3I_GEMM_F32](y, DSV3I_BACK_KEYS, x, ldx * sizeof *x, nq, &panel, nk, k, 0);
}

/* p: scores of a row with keys, da: their dA, for the first `seen`. They become A and ds; else 0. D = do . o */
static void dsv3i_attend_backward_scores(const dsv3i_call *c, float *DSV3I_RESTRICT p, float *DSV3I_RESTRICT da,
                                         const float *state, float D, size_t seen) {
    float scale = c->model->softmax_scale, r = 1.0f / state[1];
    for (size_t j = seen; j < DSV3I_BACK_KEYS; j++) p[j] = da[j] = 0.0f;
    for (size_t j = 0; j < DSV3I_BACK_KEYS; j++) p[j] *= scale;
    c->ctx->ops->exp_sum(p, p, state[0], seen);
    for (size_t j = 0; j < DSV3I_BACK_KEYS; j++) {
        p[j] *= r;
        da[j] = scale * p[j] * (da[j] - D);
    }
}

/* Item = head h and the sequence that row t0 begins, if it does. Keys from j0 on, and the rows that see some of them. */
static void dsv3i_fast_attend_backward_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_call *c = (const dsv3i_call *)arg;
    const dsv3i_dims *m = &c->m;
    const dsv3i_backward *b = c->b;
    const dsv3i_kernels *kernels = dsv3i_kernels_of(c->ctx);
    float *keys = c->ws->scratch + worker * dsv3i_attend_backward_floats(m), *values = keys + DSV3I_BACK_KEYS * m->qk;
    float *p = values + DSV3I_BACK_KEYS * m->dv, *da = p + DSV3I_BACK_ROWS * DSV3I_BACK_KEYS;
    for (size_t i = begin; i < end; i++) {
        size_t t0 = i % c->n, h = i / c->n, t1 = t0 + dsv3i_sequence_rows(c->ws->leader, t0, c->n);
        dsv3i_attend_backward_begin(c, t0, t1, h);
        for (size_t j0 = t0; j0 < t1; j0 += DSV3I_BACK_KEYS) {
            size_t key = j0 * m->Hq + h * m->qk, value = j0 * m->Hkv + h * m->kv + m->dn;
            size_t nk = dsv3i_min(DSV3I_BACK_KEYS, t1 - j0);
            kernels->pack[DSV3_F32](keys, NULL, b->keys + key, m->Hq * sizeof(float), nk, m->qk);
            kernels->pack[DSV3_F32](values, NULL, b->kv_up + value, m->Hkv * sizeof(float), nk, m->dv);
            for (size_t t = j0, nq; t < t1; t += nq) {
                size_t query = t * m->Hq + h * m->qk;
                const float *q = c->ws->q + query, *dout = b->dout + t * m->Ho + h * m->dv;
                nq = dsv3i_min(DSV3I_BACK_ROWS, t1 - t);
                dsv3i_block_dots(c->ctx, p, q, m->Hq, nq, keys, nk, m->qk);
                dsv3i_block_dots(c->ctx, da, dout, m->Ho, nq, values, nk, m->dv);
                for (size_t r = 0; r < nq; r++) {
                    size_t at = (t + r) * m->H + h, row = r * DSV3I_BACK_KEYS;
                    dsv3i_attend_backward_scores(c, p + row, da + row, c->s->softmax + 2 * at, b->delta[at],
                                                 dsv3i_min(nk, t + r - j0 + 1));
                }
                kernels->outer(b->dkv_up + value, m->Hkv, nk, p, 1, DSV3I_BACK_KEYS, dout, m->Ho, nq, m->dv);
                kernels->outer(b->dq + query, m->Hq, nq, da, DSV3I_BACK_KEYS, 1, b->keys + key, m->Hq, nk, m->qk);
                kernels->outer(b->dkeys + key, m->Hq, nk, da, 1, DSV3I_BACK_KEYS, q, m->Hq, nq, m->qk);
            }
        }
    }
}

static void dsv3i_fast_attend_backward(dsv3i_call *c) {
    dsv3i_parallel(c->ctx, c->n * c->m.H, dsv3i_mul(c->n * c->m.Hq, c->n), dsv3i_fast_attend_backward_task, c);
}
#endif

/* ---- MLPs. Few rows: gate and up projections of all MLPs in one loop, SwiGLU, down projections in one loop. Where many
 * rows are, they go through an MLP block by block: each block from its inputs to its outputs by one worker, in whose cache
 * it stays. The results are the same, bit for bit. */

#define DSV3I_MLP_ITEMS 16u /* blocks of rows for each thread: then the loop's end, where threads wait, is short */

typedef struct dsv3i_ffn {
    dsv3i_call *c;
    const dsv3i_mlp *list;
    size_t count;
    dsv3i_job *jobs; /* [2 count]; of blocks: one for each MLP, an item is a block, and y its place in rounded */
    float *worker;   /* [threads, DSV3I_STAGES] */
    float *rounded;  /* [rows, dsv3i_mlp_floats], one MLP behind the other */
    size_t own;      /* rows of memory that each worker uses for block after block; 0: every block has its own */
    size_t width;    /* hidden values of such a row */
} dsv3i_ffn;

/* Floats for a row of an MLP's inputs, rounded, and later of its hidden values. */
static size_t dsv3i_mlp_floats(size_t d, size_t F) {
    return dsv3i_max(dsv3i_rounded_floats(d), dsv3i_rounded_floats(F));
}

/* MLPs of a call with n rows, at most. */
static size_t dsv3i_mlps_most(const dsv3i_dims *m, size_t n) {
    return dsv3i_add(dsv3i_min(m->E, dsv3i_mul(n, m->K)), 1);
}

static size_t dsv3i_ffn_layout(dsv3i_ffn *at, const dsv3i_dims *m, size_t n, size_t threads, float *scratch) {
    dsv3i_layout l = {(unsigned char *)scratch, 0};
    size_t floats =
        dsv3i_add(dsv3i_mul(m->K, dsv3i_mlp_floats(m->d, m->F)), dsv3i_mlp_floats(m->d, dsv3i_max(m->Fs, m->Fd)));
    at->jobs = (dsv3i_job *)dsv3i_take(&l, sizeof(dsv3i_job), 2, dsv3i_mlps_most(m, n), 1);
    at->worker = (float *)dsv3i_take(&l, sizeof(float), threads, DSV3I_STAGES, 1);
    at->rounded = (float *)dsv3i_take(&l, sizeof(float), n, floats, 1);
    return l.used;
}

/* Of a token alone, all experts see one row: it is not grouped. */
static void dsv3i_mlps_at_once(dsv3i_ffn *a) {
    const dsv3i_call *c = a->c;
    const dsv3i_workspace *ws = c->ws;
    size_t total = 0;
    for (size_t j = 0; j < a->count; j++) {
        const dsv3i_mlp *r = &a->list[j];
        dsv3i_job *jobs = a->jobs + 2 * j;
        jobs[0].p = dsv3i_product_of(ws->h_gate + r->at, r->x, &r->w->gate_proj, r->n);
        jobs[1].p = dsv3i_product_of(ws->h_up + r->at, r->x, &r->w->up_proj, r->n);
        jobs[0].pair = jobs[1].pair = c->n > 1 ? r->pair : NULL;
        jobs[0].K = jobs[1].K = c->m.K;
        total += r->n * r->w->gate_proj.rows;
    }
    dsv3i_jobs_run(c->ctx, a->jobs, 2 * a->count, a->worker, a->rounded);
    dsv3i_swiglu(c->ctx, ws->h, ws->h_gate, ws->h_up, total);
    for (size_t j = 0; j < a->count; j++) {
        const dsv3i_mlp *r = &a->list[j];
        a->jobs[j].p = dsv3i_product_of(r->y, ws->h + r->at, &r->w->down_proj, r->n);
        a->jobs[j].pair = NULL;
    }
    dsv3i_jobs_run(c->ctx, a->jobs, a->count, a->worker, a->rounded);
}

/* Item = some rows of an MLP. */
static void dsv3i_mlp_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_ffn *a = (const dsv3i_ffn *)arg;
    const dsv3i_call *c = a->c;
    float *scratch = a->worker + worker * DSV3I_STAGES;
    for (size_t i = begin, j = 0; i < end; i++) {
        const dsv3i_mlp *r = &a->list[j = dsv3i_list_at(a->jobs, sizeof *a->jobs, a->count, i, j)];
        const dsv3_tensor *gate = &r->w->gate_proj, *up = &r->w->up_proj, *down = &r->w->down_proj;
        size_t some = dsv3i_rows_near(c->ctx, gate, r->n), t = (i - a->jobs[j].first) * some;
        size_t d = gate->cols, F = gate->rows, n = dsv3i_min(some, r->n - t);
        size_t at = a->own > 0 ? worker * a->own * a->width : r->at + t * F;
        const size_t *pair = r->pair != NULL ? r->pair + t : NULL;
        const float *x = pair != NULL ? r->x : r->x + t * d;
        float *ha = c->ws->h_gate + at, *hb = c->ws->h_up + at, *h = c->ws->h + at;
        float *rounded = a->jobs[j].p.y + t * dsv3i_mlp_floats(d, F);
        dsv3i_input in;
        if (a->own > 0) rounded = a->rounded + worker * a->own * dsv3i_mlp_floats(d, a->width);
        in = dsv3i_input_make(c, rounded, x, d, pair, n, gate);
        dsv3i_rows_product(c->ctx, ha, F, &in, n, gate, 0, F, scratch);
        if (dsv3i_rounding(c->ctx, gate->type) != dsv3i_rounding(c->ctx, up->type)) {
            in = dsv3i_input_make(c, rounded, x, d, pair, n, up);
        }
        dsv3i_rows_product(c->ctx, hb, F, &in, n, up, 0, F, scratch);
        c->ctx->ops->silu_mul(h, ha, hb, n * F);
        in = dsv3i_input_make(c, rounded, h, F, NULL, n, down);
        dsv3i_rows_product(c->ctx, r->y + t * d, d, &in, n, down, 0, d, scratch);
    }
}

/* Blocks use memory that stays in caches, a part of it for each worker, if nobody wants hidden values later and there are
 * rows enough as wide as the widest. There is no room at once for inputs of gate and up projections of two types. */
static void dsv3i_fast_mlps(dsv3i_call *c, const dsv3i_mlp *list, size_t count) {
    size_t items = 0, work = 0, rows = 0, most = 0, threads = c->ctx->threads;
    int same_types = 1;
    dsv3i_ffn a;
    float *rounded;
    (void)dsv3i_ffn_layout(&a, &c->m, c->ws->rows, c->ws->threads, c->ws->scratch);
    a.c = c;
    a.list = list;
    a.count = count;
    a.width = 0;
    rounded = a.rounded;
    for (size_t j = 0; j < count; j++) {
        const dsv3_tensor *w = &list[j].w->gate_proj;
        size_t n = list[j].n, some = dsv3i_rows_near(c->ctx, w, n);
        a.jobs[j].p = dsv3i_product_of(rounded, list[j].x, w, n);
        a.jobs[j].first = items;
        rounded += n * dsv3i_mlp_floats(w->cols, w->rows);
        items += dsv3i_blocks(n, some);
        work = dsv3i_add(work, dsv3i_mul(dsv3i_mul(3 * n, w->rows), w->cols));
        same_types = same_types && w->type == list[j].w->up_proj.type;
        if (w->rows > a.width) rows = 0;
        if (w->rows >= a.width) rows += n;
        a.width = dsv3i_max(a.width, w->rows);
        most = dsv3i_max(most, some);
    }
    a.own = c->ws->h == c->ws->h_gate && dsv3i_mul(threads, most) <= rows ? most : 0;
    if (same_types && items < dsv3i_mul(threads, DSV3I_MLP_ITEMS)) {
        dsv3i_mlps_at_once(&a);
    } else {
        dsv3i_parallel(c->ctx, items, work, dsv3i_mlp_task, &a);
    }
}

#ifndef DSV3_NO_TRAINING
/* ---- Backward of MLPs: experts one by one if there are enough of them for all threads, else a few at a time: their rows
 * stay in caches from the first product to the last. */

#define DSV3I_NEAR 65536u /* floats of u and dY that a worker's cache surely holds */

/* Some MLPs, all routed experts or one that all rows go through. */
typedef struct dsv3i_mlps_run {
    dsv3_context ctx; /* the call's, or with one thread */
    dsv3i_call *c;
    const dsv3i_mlp *list;
    size_t most, floats;      /* rows of the MLP that has the most; floats of a worker's scratch */
    dsv3i_backward_job *jobs; /* [2 count] */
    float *worker;            /* [threads, floats] */
    float *grouped, *h, *dh;  /* their rows: [n, d], [n, F], [n, F] */
} dsv3i_mlps_run;

static size_t dsv3i_mlps_run_layout(dsv3i_mlps_run *at, const dsv3i_dims *m, size_t n, size_t threads,
                                    float *scratch) {
    dsv3i_layout l = {(unsigned char *)scratch, 0};
    size_t cols = dsv3i_max(dsv3i_max(m->d, m->Fd), dsv3i_max(m->F, m->Fs));
    at->floats = dsv3i_mul(DSV3I_DECODE, cols);
    at->jobs = (dsv3i_backward_job *)dsv3i_take(&l, sizeof(dsv3i_backward_job), 2, dsv3i_mlps_most(m, n), 1);
    at->worker = (float *)dsv3i_take(&l, sizeof(float), threads, at->floats, 1);
    return l.used;
}

/* Rows of tokens to grouped rows: u, dY (where dx will be), gate; h is multiplied by its gate. */
static void dsv3i_gather_back_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_mlps_run *a = (const dsv3i_mlps_run *)arg;
    size_t d = a->c->m.d, F = a->c->m.F, first = (size_t)(a->list->pair - a->c->ws->pair);
    float *gate = a->c->b->gates + first;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        size_t pair = a->list->pair[i], t = pair / a->c->m.K;
        DSV3_MEMCPY(a->grouped + i * d, a->list->x + t * d, d * sizeof(float));
        DSV3_MEMCPY(a->list->y + i * d, a->list->dy + t * d, d * sizeof(float));
        gate[i] = a->c->s->gate[pair];
        dsv3i_scale(a->h + i * F, gate[i], F);
    }
}

/* The first `count` of a list. */
static void dsv3i_mlps_back(dsv3i_mlps_run a, const dsv3i_mlp *list, size_t count) {
    const dsv3i_call *c = a.c;
    size_t d = c->m.d, F = list->w->gate_proj.rows, n = 0;
    float *da = c->s->h_gate + list->at, *db = c->s->h_up + list->at, *gate = NULL, *dgate = NULL;
    a.list = list;
    for (size_t j = 0; j < count; j++) n += list[j].n;
    if (c->s->h != NULL) a.h = c->s->h + list->at;
    if (c->s->h == NULL) dsv3i_swiglu(&a.ctx, a.h, da, db, n * F);
    if (list->pair != NULL) {
        gate = c->b->gates + (list->pair - c->ws->pair);
        dgate = c->b->r + (list->pair - c->ws->pair);
        dsv3i_parallel(&a.ctx, n, dsv3i_mul(n, 2 * d), dsv3i_gather_back_task, &a);
    }
    for (size_t j = 0; j < count; j++) {
        const dsv3i_mlp *r = &list[j];
        size_t to = r->at - list->at;
        float *dy = r->pair != NULL ? r->y : (float *)(uintptr_t)r->dy;
        a.jobs[j] = dsv3i_backward_job_of(a.dh + to, 1, dsv3i_grad(&r->g->down_proj),
                                          dsv3i_product_of(dy, a.h + to, &r->w->down_proj, r->n));
    }
    dsv3i_backward_run(&a.ctx, a.jobs, count, a.worker);
    dsv3i_swiglu_backward(&a.ctx, a.dh, da, db, n * F, gate, dgate, F);
    for (size_t j = 0; j < count; j++) { /* dx = da W_gate + db W_up: dY's place can be dx's now */
        const dsv3i_mlp *r = &list[j];
        size_t to = r->at - list->at;
        const float *x = r->pair != NULL ? a.grouped + to / F * d : r->x;
        a.jobs[2 * j] = dsv3i_backward_job_of(r->y, 1, dsv3i_grad(&r->g->gate_proj),
                                              dsv3i_product_of(da + to, x, &r->w->gate_proj, r->n));
        a.jobs[2 * j].joint = 1;
        a.jobs[2 * j + 1] = dsv3i_backward_job_of(NULL, 0, dsv3i_grad(&r->g->up_proj),
                                                  dsv3i_product_of(db + to, x, &r->w->up_proj, r->n));
    }
    dsv3i_backward_run(&a.ctx, a.jobs, 2 * count, a.worker);
}

/* Each expert by one worker, with a part of the memory that stays in its cache. */
static void dsv3i_expert_back_task(void *arg, size_t begin, size_t end, size_t worker) {
    dsv3i_mlps_run a = *(const dsv3i_mlps_run *)arg;
    dsv3i_backward_job jobs[2];
    a.ctx.threads = 1;
    a.jobs = jobs;
    a.worker += worker * a.floats;
    a.grouped += worker * a.most * a.c->m.d;
    a.h += worker * a.most * a.c->m.F;
    a.dh += worker * a.most * a.c->m.F;
    for (size_t j = begin; j < end; j++) dsv3i_mlps_back(a, a.list + j, 1);
}

static void dsv3i_fast_mlps_backward(dsv3i_call *c, const dsv3i_mlp *list, size_t count) {
    size_t d = c->m.d, threads = c->ctx->threads, experts = 0, rows = 0, j = 0;
    dsv3i_mlps_run a;
    (void)dsv3i_mlps_run_layout(&a, &c->m, c->ws->rows, c->ws->threads, c->ws->scratch);
    a.ctx = *c->ctx;
    a.c = c;
    a.list = list;
    a.most = 0;
    a.grouped = c->ws->grouped;
    a.h = c->ws->h;
    a.dh = c->b->dh;
    for (; experts < count && list[experts].pair != NULL; experts++) {
        a.most = dsv3i_max(a.most, list[experts].n);
        rows += list[experts].n;
    }
    if (dsv3i_mul(a.most, 2 * threads) <= rows) {
        dsv3i_parallel(&a.ctx, experts, dsv3i_mul(rows, 6 * d * c->m.F), dsv3i_expert_back_task, &a);
        j = experts;
    }
    for (size_t end; j < count; j = end) {
        size_t some = list[j].n;
        for (end = j + 1; end < experts && some * 2 * d < dsv3i_mul(threads, DSV3I_NEAR); end++) some += list[end].n;
        dsv3i_mlps_back(a, list + j, end - j);
    }
}
#endif

/* ---- Scratch of a pass: of whichever op wants the most */

static size_t dsv3i_engine_pass_floats(const dsv3i_dims *m, size_t n, size_t threads) {
    size_t floats = dsv3i_engine_linear_floats(dsv3i_mul(DSV3I_PRODUCTS, n), m->d, threads), bytes;
    dsv3i_attention attention;
    dsv3i_ffn mlps;
#ifndef DSV3_NO_TRAINING
    dsv3i_mlps_run backward;
#endif
    bytes = dsv3i_max(dsv3i_attention_layout(&attention, m, n, threads, NULL),
                      dsv3i_ffn_layout(&mlps, m, n, threads, NULL));
#ifndef DSV3_NO_TRAINING
    bytes = dsv3i_max(bytes, dsv3i_mlps_run_layout(&backward, m, n, threads, NULL));
    floats = dsv3i_max(floats, dsv3i_mul(threads, dsv3i_attend_backward_floats(m)));
#endif
    return bytes == SIZE_MAX ? SIZE_MAX : dsv3i_max(floats, dsv3i_blocks(bytes, sizeof(float)));
}

/* ---- Packing: every matrix of a model, in panels */

typedef struct dsv3i_packing {
    const dsv3_context *ctx;
    dsv3_model *model;
    const void *head; /* lm_head as it was */
    const dsv3_tensor *w;
    dsv3_tensor packed; /* w, as it will be */
    dsv3i_layout l;
} dsv3i_packing;

/* Item = a panel: its k_blocks and their scales, to where they stand in the packed tensor. */
static void dsv3i_pack_task(void *arg, size_t begin, size_t end, size_t worker) {
    const dsv3i_packing *a = (const dsv3i_packing *)arg;
    dsv3_type type = a->w->type;
    size_t cols = a->w->cols, parts = dsv3i_blocks(cols, DSV3I_TERMS);
    unsigned char codes[DSV3I_PANEL * DSV3I_TERMS * sizeof(float)];
    float scale[DSV3I_TERMS / DSV3_QBLOCK * DSV3I_PANEL];
    (void)worker;
    for (size_t part = begin * parts; part < end * parts; part++) {
        dsv3i_k_block b = {a->w, part / parts * DSV3I_PANEL, 0, part % parts * DSV3I_TERMS, 0};
        size_t columns, block, bytes;
        const float *from = scale;
        unsigned char *to = (unsigned char *)(uintptr_t)dsv3i_scale_block_at(&a->packed, b.r, b.k0);
        b.rows = dsv3i_min(DSV3I_PANEL, a->w->rows - b.r);
        b.k = dsv3i_min(DSV3I_TERMS, cols - b.k0);
        columns = dsv3i_blocks(b.rows, DSV3I_LANES);
        block = dsv3i_min(dsv3i_scale_block_terms(type), b.k);
        bytes = dsv3i_codes_bytes(type, columns, block);
        dsv3i_k_block_codes(a->ctx, &b, codes, scale);
        for (size_t i = 0; i * block < b.k; i++, to += dsv3i_scale_block_bytes(type, columns, block)) {
            DSV3_MEMCPY(to, codes + i * bytes, bytes);
            if (type == DSV3_F8_E4M3) DSV3_MEMCPY(to + bytes, scale, sizeof *scale);
            for (size_t j = 0; dsv3_type_block(type) > 1 && j < columns * DSV3I_LANES; j++) {
                uint16_t bits = dsv3_f16_from_f32(*from++);
                DSV3_MEMCPY(to + bytes + 2 * j, &bits, 2);
            }
        }
    }
}

/* Measures w, or packs it. */
static void dsv3i_pack_tensor(dsv3i_packing *a, dsv3_tensor *w) {
    void *to;
    if (w->data == NULL || w->packed) return;
    to = dsv3i_take(&a->l, dsv3i_packed_bytes(w), 1, 1, 1);
    if (to == NULL) return;
    a->w = w;
    a->packed = *w;
    a->packed.data = to;
    a->packed.scale = NULL;
    a->packed.packed = 1;
    dsv3i_parallel(a->ctx, dsv3i_blocks(w->rows, DSV3I_PANEL), dsv3i_mul(w->rows, w->cols), dsv3i_pack_task, a);
    *w = a->packed;
}

/* Copies what data points to, if there is memory. */
static const void *dsv3i_pack_copy(dsv3i_packing *a, const void *data, size_t bytes) {
    void *to = dsv3i_take(&a->l, bytes, 1, 1, 1);
    if (to == NULL) return data;
    DSV3_MEMCPY(to, data, bytes);
    return to;
}

/* Products are taken of one head's key or value rows: they must begin with a panel. The absorbed form wants rows as
 * they are; they come along, since large pages or memory that is near matter to them, too. */
static void dsv3i_pack_kv_b(dsv3i_packing *a, dsv3_layer *w, const dsv3i_dims *m) {
    dsv3_tensor copy = w->kv_b_proj, rows = copy;
    if (m->dn % DSV3I_PANEL != 0 || m->dv % DSV3I_PANEL != 0 || w->kv_b_packed.data != NULL) return;
    dsv3i_pack_tensor(a, &copy);
    rows.data = dsv3i_pack_copy(a, rows.data, dsv3i_mul(rows.rows, dsv3_row_bytes(rows.type, rows.cols)));
    if (rows.scale != NULL) {
        size_t blocks = dsv3i_blocks(rows.rows, DSV3_BLOCK) * dsv3i_blocks(rows.cols, DSV3_BLOCK);
        rows.scale = dsv3i_pack_copy(a, rows.scale, blocks * sizeof(float));
    }
    if (!copy.packed) return; /* there is no memory: this is about the size */
    w->kv_b_proj = rows;
    w->kv_b_packed = copy;
}

/* Matrices of which products are taken; not embeddings, nor a head that is one or that a module shares. */
static dsv3_result dsv3i_pack_visit(dsv3i_walk *w, dsv3_tensor *slot) {
    dsv3i_packing *a = (dsv3i_packing *)w->user;
    dsv3_layer *layer = w->info.layer >= 0 ? &a->model->layers[w->info.layer] : NULL;
    dsv3_mtp *mtp = w->info.kind == DSV3_KIND_MTP ? &a->model->mtp[(size_t)w->info.layer - w->m.L] : NULL;
    if (slot->data == NULL || w->info.rank == 1 || slot == &a->model->embed_tokens) return DSV3_OK;
    if (mtp != NULL && (slot == &mtp->embed_tokens || slot->data == a->head)) return DSV3_OK;
    if (layer != NULL && slot == &layer->kv_b_proj) {
        dsv3i_pack_kv_b(a, layer, &w->m);
    } else {
        dsv3i_pack_tensor(a, slot);
    }
    return DSV3_OK;
}

/* Measures a model, or packs it into memory. */
static size_t dsv3i_pack_model(const dsv3_context *ctx, dsv3_model *model, void *memory) {
    dsv3i_packing a;
    dsv3i_walk w;
    DSV3_MEMSET(&a, 0, sizeof a);
    a.ctx = ctx;
    a.model = model;
    a.head = model->lm_head.data;
    if (memory != NULL) a.l.base = dsv3i_layout_base(memory);
    dsv3i_walk_begin(&w, &model->config, &a, dsv3i_pack_visit);
    (void)dsv3i_walk_all(&w, model);
    for (size_t k = 0; a.l.base != NULL && k < (size_t)model->n_mtp; k++) {
        if (model->mtp[k].shared_head_head.data == a.head) model->mtp[k].shared_head_head = model->lm_head;
    }
    return a.l.used;
}

/* Activations rounded as numbers, where products take floats. */
static void dsv3i_round_bf16_floats(void *out, const float *x, size_t k) { dsv3i_round_bf16((float *)out, x, k); }

static void dsv3i_round_q8_floats(void *out, const float *x, size_t k) { dsv3i_round_q8((float *)out, x, k); }

/* ========================================================================================================
 * Chapter B  >>simd
 *
 * What all instruction sets share, then AVX2, AVX-512, AVX-512 with VBMI, VNNI and BF16, AMX. What a backend promises and
 * how it is fast stands in chapter A. Tests: tests/test_kernels.c, kernel by kernel; tests/test_ops_table.c, op by op.
 *
 * Kernels that need only vectors of floats and words of four bytes are written once, as macros that are stamped for an
 * instruction set. (A file that includes itself would read better, but is not found where a header is piped, pasted into
 * another file or compiled with mapped paths.) Another one brings the vector functions listed there, its own kernels, a
 * table, and what chapter Y lists.
 *
 * Sums stay in registers: 64 outputs times 6 rows of x with AVX-512 (32 for codes, whose whole numbers need registers),
 * 16 times 6 with AVX2, so that a loaded number is used 2 to 6 times. AMX multiplies tiles, up to 32 times as fast: then
 * reading counts with 64 rows, too.
 * ==================================================================================================== */

#ifdef DSV3I_X86

/* ---- Detection: what the CPU has, and whether the operating system saves the registers. */

#if defined(__GNUC__) || defined(__clang__)
static void dsv3i_cpuid(uint32_t leaf, uint32_t part, uint32_t r[4]) {
    r[0] = r[1] = r[2] = r[3] = 0;
    (void)__get_cpuid_count(leaf, part, &r[0], &r[1], &r[2], &r[3]);
}

/* The registers that the operating system saves; only if OSXSAVE. */
static uint32_t dsv3i_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    (void)high;
    return low;
}
#else
static void dsv3i_cpuid(uint32_t leaf, uint32_t part, uint32_t r[4]) { __cpuidex((int *)r, (int)leaf, (int)part); }

static uint32_t dsv3i_xcr0(void) { return (uint32_t)_xgetbv(0); }
#endif

/* The best backend that this machine can run. */
static dsv3_backend dsv3i_best_backend(void) {
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29; /* leaf 1, ecx */
    const uint32_t avx2 = 1u << 5,
                   avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;     /* leaf 7, ebx: F, DQ, BW, VL */
    const uint32_t ymm = 6u, zmm = 0xE6u;                                  /* xcr0 */
    const uint32_t vbmi = 1u << 1, vnni = 1u << 11, bf16 = 1u << 5;        /* leaf 7, ecx; leaf 7, part 1, eax */
    const uint32_t amx = 1u << 22 | 1u << 24 | 1u << 25, tiles = 3u << 17; /* leaf 7, edx; xcr0 */
    uint32_t top[4], one[4], seven[4], more[4], saved;
    dsv3i_cpuid(0, 0, top);
    if (top[0] < 7) return DSV3_BACKEND_REFERENCE;
    dsv3i_cpuid(1, 0, one);
    dsv3i_cpuid(7, 0, seven);
    dsv3i_cpuid(7, 1, more);
    if ((one[2] & (fma | osxsave | avx | f16c)) != (fma | osxsave | avx | f16c)) return DSV3_BACKEND_REFERENCE;
    saved = dsv3i_xcr0();
    if ((saved & ymm) != ymm || (seven[1] & avx2) == 0) return DSV3_BACKEND_REFERENCE;
    if ((saved & zmm) != zmm || (seven[1] & avx512) != avx512) return DSV3_BACKEND_AVX2;
    if ((seven[2] & (vbmi | vnni)) != (vbmi | vnni) || (more[0] & bf16) == 0) return DSV3_BACKEND_AVX512;
    if ((saved & tiles) != tiles || (seven[3] & amx) != amx) return DSV3_BACKEND_AVX512_BF16;
    return DSV3_BACKEND_AMX;
}

#define DSV3I_PREFETCH 8192 /* prefetch distance of codes in bytes: about a k_block of a panel */

/* How many of n rows of x go together: kernels are made for 1, 2, 4 and, with floats or codes on both sides, for 6. */
static size_t dsv3i_rows_together(size_t n) {
    if (n <= 6) return n;
    return n <= 8 ? 4 : 6;
}

/* Statements with the constant `name`. */
#define DSV3I_WITH(name, value, ...)                                                                                 \
    {                                                                                                                \
        enum { name = value };                                                                                       \
        __VA_ARGS__;                                                                                                 \
    }
/* A call with M, the least of 1, 2, 4, 6 that is not below m <= 6; with NP, n of 1, 2 or 4 vectors of outputs. */
#define DSV3I_BY_ROWS(m, ...)                                                                                        \
    do {                                                                                                             \
        if ((m) == 1) DSV3I_WITH(M, 1, __VA_ARGS__)                                                                  \
        if ((m) == 2) DSV3I_WITH(M, 2, __VA_ARGS__)                                                                  \
        if ((m) == 3 || (m) == 4) DSV3I_WITH(M, 4, __VA_ARGS__)                                                      \
        if ((m) > 4) DSV3I_WITH(M, 6, __VA_ARGS__)                                                                   \
    } while (0)
#define DSV3I_BY_COLUMNS(n, ...)                                                                                     \
    do {                                                                                                             \
        if ((n) == 1) DSV3I_WITH(NP, 1, __VA_ARGS__)                                                                 \
        if ((n) == 2) DSV3I_WITH(NP, 2, __VA_ARGS__)                                                                 \
        if ((n) == 4) DSV3I_WITH(NP, 4, __VA_ARGS__)                                                                 \
    } while (0)

/* A statement for all of n numbers, W lanes at a time: those from i on, of which m are there. */
#define DSV3I_BY_LANES(V, W, n, ...)                                                                                 \
    do {                                                                                                             \
        size_t i = 0;                                                                                                \
        for (; i + W <= n; i += W) {                                                                                 \
            const V##_lanes m = V##_mask(W);                                                                         \
            __VA_ARGS__;                                                                                             \
        }                                                                                                            \
        if (i < n) {                                                                                                 \
            const V##_lanes m = V##_mask(n - i);                                                                     \
            __VA_ARGS__;                                                                                             \
        }                                                                                                            \
    } while (0)

/* ---- Kernels for any instruction set with vectors of W lanes. V is the prefix of its names; it has
 *     V_f32, V_u32       vectors of floats, and of words of four bytes
 *     V_lanes, V_mask    which lanes: 0 .. n-1, or all if there are fewer
 *     V_set, load, store, add, sub, mul, div, neg, fma    of floats; V_clamp: NaN stays NaN
 *     V_get, put, keep   loads some lanes, 0 in the others; stores some; sets the others to 0
 *     V_element          some lanes from F32, F16, BF16 or, as value / 256, E4M3
 *     V_sum              of the lanes, as a tree; its order is that of the instruction set
 *     V_near, far        fetch a line early, to the first or the second cache
 *     V_whole, power     for exp: x / ln 2 as a whole number; p 2^n
 *     V_words, put_words, bytes    loads and stores words, any alignment; the first n bytes, then zeros
 *     V_transpose, flip  W words of W rows; 128 added to each byte
 *     V_order            words of E4M3 as a panel has them; V_blocks: codes of Q8_0 or Q4_0 one after the other
 *     V_half             lower halves of words, from F16 to float
 *     V_bf16, nibbles    E4M3 to BF16, in two vectors; the low and the high four bits of bytes
 *     V_floats           of words, two F16 or BF16 or four bytes to floats. */

/* exp by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor series of e^r to r^7 (its rest is below 2^-27). Below -104
 * results are 0, above 89 infinite. */
#define DSV3I_VECTOR_KERNELS(V, W)                                                                                   \
    DSV3I_INLINE V##_f32 V##_exp(V##_f32 x) {                                                                        \
        static const float terms[7] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};   \
        V##_f32 n, r, p = V##_set(1.0f / 5040.0f);                                                                   \
        x = V##_clamp(x, -104.0f, 89.0f);                                                                            \
        n = V##_whole(x);                                                                                            \
        r = V##_fma(n, V##_set(-0.693359375f), x); /* ln 2 in two parts, the first with few bits */                  \
        r = V##_fma(n, V##_set(2.12194440e-4f), r);                                                                  \
        DSV3I_UNROLL for (int i = 0; i < 7; i++) p = V##_fma(p, r, V##_set(terms[i]));                               \
        return V##_power(p, n);                                                                                      \
    }                                                                                                                \
    DSV3I_INLINE void V##_decode(const dsv3_type type, float *y, const void *w, size_t n) {                          \
        const unsigned char *bytes = (const unsigned char *)w;                                                       \
        const size_t size = type == DSV3_F32 ? 4 : type == DSV3_F8_E4M3 ? 1 : 2;                                     \
        DSV3I_BY_LANES(V, W, n, {                                                                                    \
            if (W == 16) V##_near(bytes + i * size + 2048);                                                          \
            V##_f32 v = V##_element(type, m, bytes + i * size);                                                      \
            if (type == DSV3_F8_E4M3) v = V##_mul(v, V##_set(256.0f));                                               \
            V##_put(y + i, m, v);                                                                                    \
        });                                                                                                          \
    }                                                                                                                \
    DSV3I_KERNEL float V##_dot(const float *x, const float *y, size_t n) {                                           \
        V##_f32 sum = V##_set(0.0f);                                                                                 \
        DSV3I_BY_LANES(V, W, n, sum = V##_fma(V##_get(m, x + i), V##_get(m, y + i), sum));                           \
        return V##_sum(sum);                                                                                         \
    }                                                                                                                \
    DSV3I_KERNEL void V##_axpy(float *y, float a, const float *x, size_t n) {                                        \
        const V##_f32 f = V##_set(a);                                                                                \
        DSV3I_BY_LANES(V, W, n, V##_put(y + i, m, V##_fma(f, V##_get(m, x + i), V##_get(m, y + i))));                \
    }                                                                                                                \
    DSV3I_KERNEL float V##_exp_sum(float *p, const float *s, float top, size_t n) {                                  \
        const V##_f32 t = V##_set(top);                                                                              \
        V##_f32 sum = V##_set(0.0f);                                                                                 \
        DSV3I_BY_LANES(V, W, n, {                                                                                    \
            const V##_f32 e = V##_exp(V##_sub(V##_get(m, s + i), t));                                                \
            sum = V##_add(sum, V##_keep(m, e));                                                                      \
            V##_put(p + i, m, e);                                                                                    \
        });                                                                                                          \
        return V##_sum(sum);                                                                                         \
    }                                                                                                                \
    DSV3I_KERNEL void V##_silu_mul(float *h, const float *a, const float *b, size_t n) {                             \
        const V##_f32 one = V##_set(1.0f);                                                                           \
        DSV3I_BY_LANES(V, W, n, {                                                                                    \
            const V##_f32 v = V##_get(m, a + i), below = V##_add(one, V##_exp(V##_neg(v)));                          \
            V##_put(h + i, m, V##_mul(V##_div(v, below), V##_get(m, b + i)));                                        \
        });                                                                                                          \
    }

/* Panels are made, W rows at a time, while the next k_block of these rows is fetched; codes become values. */
#define DSV3I_PANEL_KERNELS(V, W)                                                                                    \
    /* The F16 scales of all scale blocks, four at a time, of rows from `first` on; 0 for rows not there. */         \
    DSV3I_INLINE void V##_scales(float *scale, size_t apart, const unsigned char *from, size_t row_bytes,            \
                                 size_t each, size_t first, size_t rows, size_t blocks) {                            \
        uint16_t bits[4 * W], one;                                                                                   \
        DSV3_MEMSET(bits, 0, sizeof bits);                                                                           \
        for (size_t i = 0, some; i < blocks; i += some, from += some * each) {                                       \
            some = dsv3i_min(blocks - i, 4);                                                                         \
            for (size_t j = first; j < dsv3i_min(rows, first + W); j++) {                                            \
                for (size_t b = 0; b < some; b++) {                                                                  \
                    DSV3_MEMCPY(&one, from + j * row_bytes + b * each, sizeof one);                                  \
                    bits[b * W + j - first] = one; /* copied there, it is checked by some libraries each time */     \
                }                                                                                                    \
            }                                                                                                        \
            for (size_t b = 0; b < some; b++, scale += apart) {                                                      \
                V##_store(scale, V##_element(DSV3_F16, V##_mask(W), (const unsigned char *)&bits[b * W]));           \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    /* Codes of `size` bytes; or blocks, a scale and `size` bytes of codes: as many at a time as fill a vector. */   \
    DSV3I_INLINE void V##_pack(const int blocks, const size_t size, void *panel, float *scale, const void *w,        \
                               size_t row_bytes, size_t rows, size_t k) {                                            \
        const size_t columns = (rows + 15) / 16, codes = blocks ? size : 1, each = blocks ? 2 + size : 1;            \
        const size_t total = blocks ? k / DSV3_QBLOCK : k * size, at_once = 4 * W / codes;                           \
        const size_t ahead = blocks ? DSV3I_TERMS / DSV3_QBLOCK * each : DSV3I_TERMS * size;                         \
        for (size_t first = 0; first < 16 * columns; first += W) {                                                   \
            const size_t real = first < rows ? rows - first : 0;                                                     \
            unsigned char *to = (unsigned char *)panel + 4 * first;                                                  \
            const unsigned char *row[W];                                                                             \
            for (size_t j = 0; j < W; j++)                                                                           \
                row[j] = (const unsigned char *)w + dsv3i_min(first + j, rows - 1) * row_bytes;                      \
            for (size_t i = 0; i < total; i += at_once) {                                                            \
                const size_t count = dsv3i_min(at_once, total - i);                                                  \
                V##_u32 r[W];                                                                                        \
                if (count == at_once && (blocks || real >= W)) {                                                     \
                    DSV3I_UNROLL for (size_t j = 0; j < W; j++) {                                                    \
                        r[j] = blocks ? V##_blocks(size, row[j] + i * each, at_once) : V##_words(row[j] + i);        \
                        V##_near(row[j] + i * each + ahead);                                                         \
                    }                                                                                                \
                } else {                                                                                             \
                    for (size_t j = 0; j < W; j++) {                                                                 \
                        r[j] = blocks ? V##_blocks(size, row[j] + i * each, count)                                   \
                                      : V##_bytes(row[j] + i, j < real ? count : 0);                                 \
                    }                                                                                                \
                }                                                                                                    \
                if (blocks && size == 32) {                                                                          \
                    DSV3I_UNROLL for (size_t j = 0; j < W; j++) r[j] = V##_flip(r[j]);                               \
                }                                                                                                    \
                V##_transpose(r);                                                                                    \
                for (size_t j = 0; j < W && 4 * j < count * codes; j++, to += 64 * columns) {                        \
                    V##_put_words(to, !blocks && size == 1 ? V##_order(r[j]) : r[j]);                                \
                }                                                                                                    \
            }                                                                                                        \
            if (blocks)                                                                                              \
                V##_scales(scale + first, 16 * columns, (const unsigned char *)w, row_bytes, each, first, rows,      \
                           total);                                                                                   \
        }                                                                                                            \
    }                                                                                                                \
    /* One function for all three sizes. */                                                                          \
    DSV3I_KERNEL void V##_pack_codes(size_t size, void *panel, const void *w, size_t row_bytes, size_t rows,         \
                                     size_t k) {                                                                     \
        V##_pack(0, size, panel, NULL, w, row_bytes, rows, k);                                                       \
    }                                                                                                                \
    /* Words of a panel of this type become values; those of BF16 and bytes, which are values, become floats. */     \
    DSV3I_INLINE void V##_widen(const dsv3_type type, void *values, const void *panel, size_t columns, size_t k,     \
                                int32_t zero) {                                                                      \
        const size_t each = type == DSV3_Q8_0 ? 4 : 2, wide = (type == DSV3_Q4_0 ? 256 : 64) * columns;              \
        const size_t terms = type == DSV3_Q4_0 ? DSV3_QBLOCK : type == DSV3_F8_E4M3 ? 4 : each;                      \
        const int coded = type == DSV3_F8_E4M3 || type == DSV3_Q4_0;                                                 \
        const unsigned char *from = (const unsigned char *)panel;                                                    \
        unsigned char *to = (unsigned char *)values;                                                                 \
        const V##_f32 code = V##_set((float)zero);                                                                   \
        for (size_t i = 0; i < k; i += terms, to += wide * (each - 1)) {                                             \
            for (size_t c = 0; c < wide; c += 4 * W, from += 4 * W, to += 4 * W) {                                   \
                V##_u32 b[2];                                                                                        \
                V##_f32 f[4];                                                                                        \
                if (type == DSV3_F8_E4M3) V##_bf16(b, V##_words(from));                                              \
                if (type == DSV3_Q4_0) V##_nibbles(b, V##_words(from));                                              \
                if (type == DSV3_Q4_0) V##_near(from + DSV3I_PREFETCH);                                              \
                if (!coded) V##_floats(type, f, V##_words(from), code);                                              \
                DSV3I_UNROLL for (size_t j = 0; j < each; j++) {                                                     \
                    if (coded) V##_put_words(to + wide * j, b[j]);                                                   \
                    if (!coded) V##_store((float *)(void *)(to + wide * j), f[j]);                                   \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
    }

/* gemm with panels, and outer. M <= 6 rows of x and NP <= N vectors of outputs: M NP sums in registers. */
#define DSV3I_GEMM_KERNELS(V, W, N)                                                                                  \
    /* Where they lie, and which outputs are wanted. */                                                              \
    typedef struct V##_place {                                                                                       \
        const unsigned char *x[6], *w; /* rows; the first vector */                                                  \
        const float *scale;                                                                                          \
        float *y;                                                                                                    \
        size_t ldy, n;             /* of the M rows, n are real: the others repeat the last */                       \
        size_t step;               /* bytes from a step of w to the next */                                          \
        size_t gap;                /* bytes from the codes of a scale block to the next ones */                      \
        size_t ahead;              /* fetched early: what lies at this distance, ... */                              \
        const unsigned char *next; /* ... or this, so many lines, some with each step */                             \
        size_t lines, each;                                                                                          \
        V##_lanes mask[N];                                                                                           \
    } V##_place;                                                                                                     \
    DSV3I_INLINE void V##_place_set(const int NP, V##_place *a, float *y, size_t ldy, const void *x, size_t ldx,     \
                                    size_t n, const void *w, size_t step, size_t columns) {                          \
        a->y = y;                                                                                                    \
        a->ldy = ldy;                                                                                                \
        a->n = n;                                                                                                    \
        a->w = (const unsigned char *)w;                                                                             \
        a->step = step;                                                                                              \
        a->gap = a->ahead = a->lines = 0;                                                                            \
        a->each = 1;                                                                                                 \
        a->next = a->w;                                                                                              \
        a->scale = NULL;                                                                                             \
        DSV3I_UNROLL for (int m = 0; m < 6; m++) {                                                                   \
            a->x[m] = (const unsigned char *)x + dsv3i_min((size_t)m, n - 1) * ldx;                                  \
        }                                                                                                            \
        DSV3I_UNROLL for (size_t p = 0; p < (size_t)NP; p++) {                                                       \
            a->mask[p] = V##_mask(columns > W * p ? columns - W * p : 0);                                            \
        }                                                                                                            \
    }                                                                                                                \
    DSV3I_INLINE void V##_begin(const int M, const int NP, V##_f32 *acc, const V##_place *a, int add) {              \
        DSV3I_UNROLL for (int i = 0; i < M * NP; i++) acc[i] = V##_set(0.0f);                                        \
        if (!add) return;                                                                                            \
        DSV3I_UNROLL for (int m = 0; m < M; m++) {                                                                   \
            const float *y = a->y + dsv3i_min((size_t)m, a->n - 1) * a->ldy;                                         \
            DSV3I_UNROLL for (int p = 0; p < NP; p++) acc[m * NP + p] = V##_get(a->mask[p], y + W * p);              \
        }                                                                                                            \
    }                                                                                                                \
    /* y = acc; or acc * scale, added to y if `add`. Of the last 16 outputs alone, some may not be wanted. */        \
    DSV3I_INLINE void V##_end(const int M, const int NP, V##_f32 *acc, const V##_place *a, int add) {                \
        if (a->scale != NULL) {                                                                                      \
            DSV3I_UNROLL for (int p = 0; p < NP; p++) {                                                              \
                const V##_f32 scale = V##_load(a->scale + W * p);                                                    \
                const V##_lanes old = add ? a->mask[p] : V##_mask(0);                                                \
                DSV3I_UNROLL for (int m = 0; m < M; m++) {                                                           \
                    const float *y = a->y + dsv3i_min((size_t)m, a->n - 1) * a->ldy + W * p;                         \
                    acc[m * NP + p] = V##_fma(acc[m * NP + p], scale, V##_get(old, y));                              \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
        DSV3I_UNROLL for (int m = 0; m < M; m++) {                                                                   \
            float *y = a->y + (size_t)m * a->ldy;                                                                    \
            if ((size_t)m >= a->n) continue;                                                                         \
            DSV3I_UNROLL for (int p = 0; p < NP; p++) {                                                              \
                if (p < NP - 16 / W) V##_store(y + W * p, acc[m * NP + p]);                                          \
                if (p >= NP - 16 / W) V##_put(y + W * p, a->mask[p], acc[m * NP + p]);                               \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    /* Terms of float rows, aj floats apart, and of floats: acc += sum_j x_mj w_j. edge: vectors under the mask. */  \
    DSV3I_INLINE void V##_float_terms(const int M, const int NP, const int edge, V##_f32 *acc, const V##_place *a,   \
                                      size_t aj, size_t k) {                                                         \
        const unsigned char *w = a->w, *next = a->next;                                                              \
        size_t x = 0, lines = a->lines;                                                                              \
        for (size_t j = 0; j < k; j++, x += aj * sizeof(float), w += a->step) {                                      \
            V##_f32 b[N];                                                                                            \
            if (j < lines) V##_far(next + 64 * j);                                                                   \
            DSV3I_UNROLL for (int p = 0; p < NP; p++) {                                                              \
                const float *at = (const float *)(const void *)w + W * p;                                            \
                b[p] = edge ? V##_get(a->mask[p], at) : V##_load(at);                                                \
            }                                                                                                        \
            DSV3I_UNROLL for (int m = 0; m < M; m++) {                                                               \
                const V##_f32 f = V##_set(*(const float *)(const void *)(a->x[m] + x));                              \
                DSV3I_UNROLL for (int p = 0; p < NP; p++) acc[m * NP + p] = V##_fma(f, b[p], acc[m * NP + p]);       \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    /* Terms i0 .. i1-1 of float rows and panels of codes. */                                                        \
    DSV3I_INLINE void V##_code_terms(const int bytes, const int M, const int NP, V##_f32 *acc, const V##_place *a,   \
                                     V##_f32 zero, size_t i0, size_t i1) {                                           \
        const size_t each = bytes ? 4 : 2;                                                                           \
        const unsigned char *w = a->w + i0 / each * a->step;                                                         \
        for (size_t i = i0; i < i1; i += each, w += a->step) {                                                       \
            const int rest = i1 - i < each; /* an odd last term of BF16 */                                           \
            DSV3I_UNROLL for (int p = 0; p < NP; p += 16 / W) V##_near(w + a->ahead + 4 * W * p);                    \
            DSV3I_UNROLL for (int p = 0; p < NP; p++) {                                                              \
                V##_f32 f[4];                                                                                        \
                V##_floats(bytes ? DSV3_Q8_0 : DSV3_BF16, f, V##_words(w + 4 * W * p), zero);                        \
                DSV3I_UNROLL for (size_t j = 0; j < each; j++) {                                                     \
                    if (j > 0 && rest) continue;                                                                     \
                    DSV3I_UNROLL for (int m = 0; m < M; m++) {                                                       \
                        const float *x = (const float *)(const void *)a->x[m] + i + j;                               \
                        acc[m * NP + p] = V##_fma(V##_set(*x), f[j], acc[m * NP + p]);                               \
                    }                                                                                                \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    DSV3I_INLINE void V##_exact(const dsv3i_gemm_kind kind, const int M, const int NP, V##_place *a,                 \
                                const dsv3i_panel *w, size_t k, int add) {                                           \
        const V##_f32 zero = V##_set((float)w->zero);                                                                \
        const int scaled = w->scale != NULL;                                                                         \
        V##_f32 acc[6 * N];                                                                                          \
        for (size_t i = 0, end; i < k; i = end) {                                                                    \
            end = dsv3i_min(i + w->block, k);                                                                        \
            V##_begin(M, NP, acc, a, add && !scaled);                                                                \
            if (kind == DSV3I_GEMM_F32) {                                                                            \
                V##_float_terms(M, NP, 0, acc, a, 1, end - i);                                                       \
                DSV3I_UNROLL for (int m = 0; m < M; m++) a->x[m] += (end - i) * sizeof(float);                       \
                a->w += (end - i) * a->step;                                                                         \
            } else {                                                                                                 \
                V##_code_terms(kind == DSV3I_GEMM_BYTES, M, NP, acc, a, zero, i, end);                               \
            }                                                                                                        \
            a->w += w->gap;                                                                                          \
            V##_end(M, NP, acc, a, add || i > 0);                                                                    \
            a->lines = 0;                                                                                            \
            if (scaled) a->scale += 16 * w->columns;                                                                 \
        }                                                                                                            \
    }                                                                                                                \
    /* n rows, columns c0 .. of a panel. Each share of the rows fetches its share of what is read next. */           \
    DSV3I_INLINE void V##_columns(const dsv3i_gemm_kind kind, const int NP, float *y, size_t ldy, const void *x,     \
                                  size_t ldx, size_t n, const dsv3i_panel *w, size_t c0, size_t rows, size_t k,      \
                                  int add) {                                                                         \
        const size_t more = kind == DSV3I_GEMM_F32 && c0 == 0 ? w->next_bytes / n : 0;                               \
        for (size_t t = 0, m; t < n; t += m) {                                                                       \
            V##_place a;                                                                                             \
            m = dsv3i_rows_together(n - t);                                                                          \
            V##_place_set(NP, &a, y + t * ldy + 16 * c0, ldy, (const unsigned char *)x + t * ldx, ldx, m,            \
                          (const unsigned char *)w->values + 64 * c0, 64 * w->columns, rows - 16 * c0);              \
            a.ahead = w->ahead;                                                                                      \
            a.lines = more * m / 64;                                                                                 \
            if (a.lines > 0) a.next = (const unsigned char *)w->next + more * t;                                     \
            if (w->scale != NULL) a.scale = w->scale + 16 * c0;                                                      \
            DSV3I_BY_ROWS(m, if (kind == DSV3I_GEMM_F32 || M <= 4) V##_exact(kind, M, NP, &a, w, k, add));           \
        }                                                                                                            \
    }                                                                                                                \
    /* Whole panels at once; a narrower one in parts, of codes the smallest: not worth the instructions. */          \
    DSV3I_INLINE void V##_gemm(const dsv3i_gemm_kind kind, float *y, size_t ldy, const void *x, size_t ldx,          \
                               size_t n, const dsv3i_panel *w, size_t rows, size_t k, int add) {                     \
        const size_t least = kind == DSV3I_GEMM_F32 ? 2 : 16 / W;                                                    \
        for (size_t c = 0, some; c < w->columns; c += some * W / 16) {                                               \
            const size_t left = (w->columns - c) * (16 / W);                                                         \
            some = left >= N ? N : left >= least ? least : 1;                                                        \
            DSV3I_BY_COLUMNS(some,                                                                                   \
                             if (NP <= N && NP * W >= 16 && (kind == DSV3I_GEMM_F32 || NP == N || NP * W == 16))     \
                                 V##_columns(kind, NP, y, ldy, x, ldx, n, w, c, rows, k, add));                      \
        }                                                                                                            \
    }                                                                                                                \
    /* All m rows of y and `columns` <= W NP columns. */                                                             \
    DSV3I_INLINE void V##_outer_rows(const int NP, float *y, size_t ldy, size_t m, const float *x, size_t at,        \
                                     size_t aj, const float *b, size_t ldb, size_t k, size_t columns) {              \
        for (size_t t = 0, rows; t < m; t += rows) {                                                                 \
            V##_place a;                                                                                             \
            rows = dsv3i_rows_together(m - t);                                                                       \
            V##_place_set(NP, &a, y + t * ldy, ldy, x + t * at, at * sizeof *x, rows, b, ldb * sizeof *b, columns);  \
            DSV3I_BY_ROWS(rows, {                                                                                    \
                V##_f32 acc[6 * N];                                                                                  \
                V##_begin(M, NP, acc, &a, 1);                                                                        \
                V##_float_terms(M, NP, 1, acc, &a, aj, k);                                                           \
                V##_end(M, NP, acc, &a, 0);                                                                          \
            });                                                                                                      \
        }                                                                                                            \
    }                                                                                                                \
    /* b in panels of W N columns and at most 160 rows, which stay in a near cache while all rows of y pass by. */   \
    DSV3I_KERNEL void V##_outer(float *y, size_t ldy, size_t m, const float *a, size_t at, size_t aj,                \
                                const float *b, size_t ldb, size_t k, size_t n) {                                    \
        const size_t parts = dsv3i_blocks(k, 160), each = parts > 0 ? dsv3i_blocks(k, parts) : 0;                    \
        for (size_t j = 0; j < k; j += each) {                                                                       \
            const size_t nj = dsv3i_min(each, k - j);                                                                \
            for (size_t i = 0, some; i < n; i += W * some) {                                                         \
                const size_t left = n - i;                                                                           \
                some = left > W * (N - 1) ? N : left > W ? 2 : 1;                                                    \
                DSV3I_BY_COLUMNS(some, if (NP <= N) V##_outer_rows(NP, y + i, ldy, m, a + j * aj, at, aj,            \
                                                                   b + j * ldb + i, ldb, nj, left));                 \
            }                                                                                                        \
        }                                                                                                            \
    }

/* ---- Functions of the tables: a kernel with its constants. */

#define DSV3I_ENTRY(name, parameters, ...)                                                                           \
    DSV3I_KERNEL void name parameters { __VA_ARGS__; }
#define DSV3I_DECODE_LIST (float *y, const void *w, size_t n)
#define DSV3I_PACK_LIST (void *panel, float *scale, const void *w, size_t row_bytes, size_t rows, size_t k)
#define DSV3I_WIDEN_LIST (void *values, const void *panel, size_t columns, size_t k)
#define DSV3I_FLOAT_LIST (float *values, const void *panel, size_t columns, size_t k, int32_t zero)
#define DSV3I_GEMM_LIST                                                                                              \
    (float *y, size_t ldy, const void *x, size_t ldx, size_t n, const dsv3i_panel *w, size_t rows, size_t k, int add)
#define DSV3I_TYPE_KERNELS(V)                                                                                        \
    DSV3I_ENTRY(V##_decode_f32, DSV3I_DECODE_LIST, V##_decode(DSV3_F32, y, w, n))                                    \
    DSV3I_ENTRY(V##_decode_f16, DSV3I_DECODE_LIST, V##_decode(DSV3_F16, y, w, n))                                    \
    DSV3I_ENTRY(V##_decode_bf16, DSV3I_DECODE_LIST, V##_decode(DSV3_BF16, y, w, n))                                  \
    DSV3I_ENTRY(V##_decode_f8_e4m3, DSV3I_DECODE_LIST, V##_decode(DSV3_F8_E4M3, y, w, n))                            \
    DSV3I_ENTRY(V##_pack_4, DSV3I_PACK_LIST, (void)scale; V##_pack_codes(4, panel, w, row_bytes, rows, k))           \
    DSV3I_ENTRY(V##_pack_2, DSV3I_PACK_LIST, (void)scale; V##_pack_codes(2, panel, w, row_bytes, rows, k))           \
    DSV3I_ENTRY(V##_pack_1, DSV3I_PACK_LIST, (void)scale; V##_pack_codes(1, panel, w, row_bytes, rows, k))           \
    DSV3I_ENTRY(V##_pack_q8_0, DSV3I_PACK_LIST, V##_pack(1, 32, panel, scale, w, row_bytes, rows, k))                \
    DSV3I_ENTRY(V##_pack_q4_0, DSV3I_PACK_LIST, V##_pack(1, 16, panel, scale, w, row_bytes, rows, k))                \
    DSV3I_ENTRY(V##_widen_f16, DSV3I_WIDEN_LIST, V##_widen(DSV3_F16, values, panel, columns, k, 0))                  \
    DSV3I_ENTRY(V##_widen_f8, DSV3I_WIDEN_LIST, V##_widen(DSV3_F8_E4M3, values, panel, columns, k, 0))               \
    DSV3I_ENTRY(V##_widen_q4_0, DSV3I_WIDEN_LIST, V##_widen(DSV3_Q4_0, values, panel, columns, k, 0))                \
    DSV3I_ENTRY(V##_float_bf16, DSV3I_FLOAT_LIST, V##_widen(DSV3_BF16, values, panel, columns, k, zero))             \
    DSV3I_ENTRY(V##_float_bytes, DSV3I_FLOAT_LIST, V##_widen(DSV3_Q8_0, values, panel, columns, k, zero))            \
    DSV3I_ENTRY(V##_gemm_f32, DSV3I_GEMM_LIST, V##_gemm(DSV3I_GEMM_F32, y, ldy, x, ldx, n, w, rows, k, add))         \
    DSV3I_ENTRY(V##_gemm_bf16, DSV3I_GEMM_LIST, V##_gemm(DSV3I_GEMM_BF16, y, ldy, x, ldx, n, w, rows, k, add))       \
    DSV3I_ENTRY(V##_gemm_bytes, DSV3I_GEMM_LIST, V##_gemm(DSV3I_GEMM_BYTES, y, ldy, x, ldx, n, w, rows, k, add))

/* ---- Tables: what a backend is made of. Rows are in the order of dsv3_type. */

#define DSV3I_WHOLE_ROW(name)                                                                                        \
    { NULL, NULL, name##_bf16, name##_f8_e4m3, name##_q8_0, name##_q4_0 }
#define DSV3I_GEMV_T_ROW(f8)                                                                                         \
    {                                                                                                                \
        NULL, dsv3i_avx512_gemv_t_f16, dsv3i_avx512_gemv_t_bf16, f8, dsv3i_avx512_gemv_t_q8_0,                       \
            dsv3i_avx512_gemv_t_q4_0                                                                                 \
    }
#define DSV3I_DECODES(V)                                                                                             \
    {                                                                                                                \
        V##_decode_f32, V##_decode_f16, V##_decode_bf16, V##_decode_f8_e4m3, dsv3i_avx2_decode_q8_0,                 \
            dsv3i_avx2_decode_q4_0                                                                                   \
    }
#ifndef DSV3_NO_TRAINING
#define DSV3I_BACKWARD_OPS dsv3i_fast_linear_backward, dsv3i_fast_attend_backward, dsv3i_fast_mlps_backward,
#else
#define DSV3I_BACKWARD_OPS
#endif
#define DSV3I_FAST_OPS dsv3i_fast_linear, dsv3i_fast_attend, dsv3i_fast_mlps, DSV3I_BACKWARD_OPS
/* Kernels of V and, of the backend itself: tile, FP8 to BF16, roundings, fast products, and what comes behind gemm. */
#define DSV3I_BACKEND(name, V, tile, f8, round_bf16, round_q8, gemm_bf16, gemm_bytes, ...)                           \
    static const dsv3i_kernels name##_kernels = {                                                                    \
        V##_outer,                                                                                                   \
        {V##_pack_4, V##_pack_2, V##_pack_2, V##_pack_1, V##_pack_q8_0, V##_pack_q4_0},                              \
        {V##_float_bf16, V##_float_bytes},                                                                           \
        tile,                                                                                                        \
        {NULL, V##_widen_f16, NULL, f8, NULL, V##_widen_q4_0},                                                       \
        {NULL, NULL, round_bf16, round_bf16, round_q8, round_q8},                                                    \
        {V##_gemm_f32, V##_gemm_bf16, V##_gemm_bytes, gemm_bf16, gemm_bytes},                                        \
        __VA_ARGS__};                                                                                                \
    static const dsv3i_ops name##_ops = {DSV3I_DECODES(V), V##_dot,      V##_axpy,                                   \
                                         V##_exp_sum,      V##_silu_mul, DSV3I_FAST_OPS & name##_kernels};

/* What AVX2 and AVX-512 have in common but for their width. repeat: 16 bytes everywhere. */
#define DSV3I_X86_VECTORS(V, bits, repeat)                                                                           \
    typedef __m##bits V##_f32;                                                                                       \
    typedef __m##bits##i V##_u32;                                                                                    \
    DSV3I_INLINE V##_f32 V##_set(float a) { return _mm##bits##_set1_ps(a); }                                         \
    DSV3I_INLINE V##_f32 V##_load(const float *at) { return _mm##bits##_loadu_ps(at); }                              \
    DSV3I_INLINE void V##_store(float *at, V##_f32 v) { _mm##bits##_storeu_ps(at, v); }                              \
    DSV3I_INLINE V##_f32 V##_add(V##_f32 a, V##_f32 b) { return _mm##bits##_add_ps(a, b); }                          \
    DSV3I_INLINE V##_f32 V##_sub(V##_f32 a, V##_f32 b) { return _mm##bits##_sub_ps(a, b); }                          \
    DSV3I_INLINE V##_f32 V##_mul(V##_f32 a, V##_f32 b) { return _mm##bits##_mul_ps(a, b); }                          \
    DSV3I_INLINE V##_f32 V##_div(V##_f32 a, V##_f32 b) { return _mm##bits##_div_ps(a, b); }                          \
    DSV3I_INLINE V##_f32 V##_neg(V##_f32 a) { return _mm##bits##_xor_ps(a, _mm##bits##_set1_ps(-0.0f)); }            \
    DSV3I_INLINE V##_f32 V##_fma(V##_f32 a, V##_f32 b, V##_f32 c) { return _mm##bits##_fmadd_ps(a, b, c); }          \
    DSV3I_INLINE V##_f32 V##_clamp(V##_f32 x, float low, float high) {                                               \
        return _mm##bits##_min_ps(_mm##bits##_set1_ps(high), _mm##bits##_max_ps(_mm##bits##_set1_ps(low), x));       \
    }                                                                                                                \
    DSV3I_INLINE void V##_near(const unsigned char *at) { _mm_prefetch((const char *)at, _MM_HINT_T0); }             \
    DSV3I_INLINE void V##_far(const unsigned char *at) { _mm_prefetch((const char *)at, _MM_HINT_T1); }              \
    DSV3I_INLINE V##_u32 V##_words(const void *at) { return _mm##bits##_loadu_si##bits((const V##_u32 *)at); }       \
    DSV3I_INLINE void V##_put_words(void *at, V##_u32 v) { _mm##bits##_storeu_si##bits((V##_u32 *)at, v); }          \
    DSV3I_INLINE V##_u32 V##_and(V##_u32 a, V##_u32 b) { return _mm##bits##_and_si##bits(a, b); }                    \
    DSV3I_INLINE V##_u32 V##_short(int a) { return _mm##bits##_set1_epi16((short)a); }                               \
    DSV3I_INLINE V##_u32 V##_flip(V##_u32 v) {                                                                       \
        return _mm##bits##_xor_si##bits(v, _mm##bits##_set1_epi8((char)-128));                                       \
    }                                                                                                                \
    DSV3I_INLINE V##_u32 V##_order(V##_u32 v) {                                                                      \
        return _mm##bits##_shuffle_epi8(                                                                             \
            v, repeat(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));                         \
    }                                                                                                                \
    /* First steps of V_transpose: r[4 i + j] becomes, of every four words, word j of rows 4 i .. 4 i + 3. */        \
    DSV3I_INLINE void V##_transpose_fours(V##_u32 *r, const int rows) {                                              \
        V##_u32 t[4];                                                                                                \
        DSV3I_UNROLL for (int i = 0; i < rows; i += 4) {                                                             \
            DSV3I_UNROLL for (int j = 0; j < 4; j += 2) {                                                            \
                t[j] = _mm##bits##_unpacklo_epi32(r[i + j], r[i + j + 1]);                                           \
                t[j + 1] = _mm##bits##_unpackhi_epi32(r[i + j], r[i + j + 1]);                                       \
            }                                                                                                        \
            DSV3I_UNROLL for (int j = 0; j < 2; j++) {                                                               \
                r[i + 2 * j] = _mm##bits##_unpacklo_epi64(t[j], t[j + 2]);                                           \
                r[i + 2 * j + 1] = _mm##bits##_unpackhi_epi64(t[j], t[j + 2]);                                       \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
    DSV3I_INLINE void V##_nibbles(V##_u32 b[2], V##_u32 v) {                                                         \
        b[0] = V##_and(v, _mm##bits##_set1_epi8(15));                                                                \
        b[1] = V##_and(_mm##bits##_srli_epi16(v, 4), _mm##bits##_set1_epi8(15));                                     \
    }                                                                                                                \
    /* E4M3 to BF16: exponent + 120. What the eight smallest codes and NaN lack is added, the former by tables: an \
     * index from 128 on gives 0. */ \
    DSV3I_INLINE void V##_bf16(V##_u32 b[2], V##_u32 v) {                                                            \
        const V##_u32 at =                                                                                           \
            _mm##bits##_adds_epu8(V##_and(v, _mm##bits##_set1_epi8(127)), _mm##bits##_set1_epi8(120));               \
        V##_u32 low = repeat(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, -16, 96, -112, -64, -48, -32, -16));           \
        V##_u32 high = repeat(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, -60, -2, -1, -1, -1, -1, -1, -1));               \
        low = _mm##bits##_shuffle_epi8(low, at);                                                                     \
        high = _mm##bits##_shuffle_epi8(high, at);                                                                   \
        b[0] = _mm##bits##_unpacklo_epi8(_mm##bits##_setzero_si##bits(), v);                                         \
        b[1] = _mm##bits##_unpackhi_epi8(_mm##bits##_setzero_si##bits(), v);                                         \
        DSV3I_UNROLL for (int i = 0; i < 2; i++) {                                                                   \
            const V##_u32 sign = V##_and(b[i], V##_short(-32768)),                                                   \
                          size = V##_and(_mm##bits##_srli_epi16(b[i], 4), V##_short(0x7F0));                         \
            const V##_u32 add = i ? _mm##bits##_unpackhi_epi8(low, high) : _mm##bits##_unpacklo_epi8(low, high);     \
            const V##_u32 r = _mm##bits##_add_epi16(_mm##bits##_add_epi16(size, V##_short(0x3C00)), add);            \
            const V##_u32 nan =                                                                                      \
                _mm##bits##_mullo_epi16(_mm##bits##_subs_epu16(r, V##_short(0x43E0)), V##_short(0x3BD));             \
            b[i] = _mm##bits##_or_si##bits(_mm##bits##_add_epi16(r, nan), sign);                                     \
        }                                                                                                            \
    }                                                                                                                \
    DSV3I_INLINE void V##_floats(const dsv3_type type, V##_f32 f[4], V##_u32 v, V##_f32 zero) {                      \
        if (type == DSV3_F16) {                                                                                      \
            f[0] = V##_half(v);                                                                                      \
            f[1] = V##_half(_mm##bits##_srli_epi32(v, 16));                                                          \
        } else if (type == DSV3_BF16) {                                                                              \
            f[0] = _mm##bits##_castsi##bits##_ps(_mm##bits##_slli_epi32(v, 16));                                     \
            f[1] = _mm##bits##_castsi##bits##_ps(V##_and(v, _mm##bits##_set1_epi32(-65536)));                        \
        } else {                                                                                                     \
            const V##_u32 byte = _mm##bits##_set1_epi32(255);                                                        \
            const V##_u32 w[4] = {v, _mm##bits##_srli_epi32(v, 8), _mm##bits##_srli_epi32(v, 16),                    \
                                  _mm##bits##_srli_epi32(v, 24)};                                                    \
            DSV3I_UNROLL for (int j = 0; j < 4; j++) {                                                               \
                f[j] = V##_sub(_mm##bits##_cvtepi32_ps(j < 3 ? V##_and(w[j], byte) : w[j]), zero);                   \
            }                                                                                                        \
        }                                                                                                            \
    }

/* ---- AVX2, FMA, F16C: 8 lanes. */

#define DSV3I_ISA "avx2,fma,f16c"
/* From F16, the lower halves of words. */
DSV3I_INLINE __m256 dsv3i_avx2_half(__m256i v) {
    const __m256i w = _mm256_and_si256(v, _mm256_set1_epi32(65535));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
DSV3I_X86_VECTORS(dsv3i_avx2, 256, _mm256_broadcastsi128_si256)

typedef size_t dsv3i_avx2_lanes; /* there are no masks but vectors, made where they are needed */

DSV3I_INLINE size_t dsv3i_avx2_mask(size_t n) { return n; }
/* Lanes 0 .. n-1 of 8. */
DSV3I_INLINE __m256i dsv3i_avx2_first(size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DSV3I_INLINE __m256 dsv3i_avx2_get(size_t n, const float *at) {
    return n >= 8 ? _mm256_loadu_ps(at) : _mm256_maskload_ps(at, dsv3i_avx2_first(n));
}
DSV3I_INLINE void dsv3i_avx2_put(float *at, size_t n, __m256 v) {
    if (n >= 8) {
        _mm256_storeu_ps(at, v);
    } else {
        _mm256_maskstore_ps(at, dsv3i_avx2_first(n), v);
    }
}
DSV3I_INLINE __m256 dsv3i_avx2_keep(size_t n, __m256 v) {
    return n >= 8 ? v : _mm256_and_ps(v, _mm256_castsi256_ps(dsv3i_avx2_first(n)));
}
DSV3I_INLINE __m128i dsv3i_avx2_bytes_16(const unsigned char *at) {
    return _mm_loadu_si128((const __m128i *)(const void *)at);
}
DSV3I_INLINE __m256i dsv3i_avx2_bytes(const unsigned char *at, size_t n) {
    unsigned char part[32];
    if (n >= 32) return dsv3i_avx2_words(at);
    DSV3_MEMSET(part, 0, sizeof part);
    DSV3_MEMCPY(part, at, n);
    return dsv3i_avx2_words(part);
}

/* E4M3: the code's seven low bits become exponent and fraction of a half, whose exponent is 8 too small: what is
 * returned is the value / 256, exactly, and NaN for NaN. */
DSV3I_INLINE __m256 dsv3i_avx2_element(const dsv3_type type, size_t n, const unsigned char *at) {
    const __m128i bits = _mm_set1_epi16(0x3F80);
    unsigned char part[32];
    __m128i h;
    if (n < 8) {
        DSV3_MEMSET(part, 0, sizeof part);
        DSV3_MEMCPY(part, at, n * (type == DSV3_F32 ? 4 : type == DSV3_F8_E4M3 ? 1 : 2));
        at = part;
    }
    if (type == DSV3_F32) return _mm256_castsi256_ps(dsv3i_avx2_words(at));
    if (type == DSV3_F16) return _mm256_cvtph_ps(dsv3i_avx2_bytes_16(at));
    if (type == DSV3_BF16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(dsv3i_avx2_bytes_16(at)), 16));
    }
    h = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)at));
    h = _mm_and_si128(_mm_slli_epi16(h, 7), _mm_set1_epi16((short)-16512)); /* 0xBF80: sign, exponent, fraction */
    return _mm256_cvtph_ps(_mm_or_si128(h, _mm_srli_epi16(_mm_cmpeq_epi16(_mm_and_si128(h, bits), bits), 1)));
}
/* The sums of the lanes of a, b, c, d: ((l0+l2)+(l1+l3)) + ((l4+l6)+(l5+l7)) of each. */
DSV3I_INLINE __m128 dsv3i_avx2_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 t = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}
DSV3I_INLINE float dsv3i_avx2_sum(__m256 v) { return _mm_cvtss_f32(dsv3i_avx2_sums(v, v, v, v)); }
DSV3I_INLINE __m256 dsv3i_avx2_whole(__m256 x) {
    return _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 2^n comes in two factors, so that results may be subnormal. */
DSV3I_INLINE __m256 dsv3i_avx2_power(__m256 p, __m256 n) {
    const __m256i bias = _mm256_set1_epi32(127), i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1);
    const __m256i rest = _mm256_sub_epi32(i, half);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
DSV3I_INLINE void dsv3i_avx2_transpose(__m256i r[8]) {
    dsv3i_avx2_transpose_fours(r, 8);
    DSV3I_UNROLL for (int i = 0; i < 4; i++) {
        const __m256i a = r[i], b = r[4 + i];
        r[i] = _mm256_permute2x128_si256(a, b, 0x20);
        r[4 + i] = _mm256_permute2x128_si256(a, b, 0x31);
    }
}
/* The codes of `count` blocks of 2 + size bytes: one of Q8_0, two of Q4_0 or, at the end of a row, one. */
DSV3I_INLINE __m256i dsv3i_avx2_blocks(const size_t size, const unsigned char *w, size_t count) {
    if (size == 32) return dsv3i_avx2_words(w + 2);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(dsv3i_avx2_bytes_16(w + 2)),
                                   count == 2 ? dsv3i_avx2_bytes_16(w + 20) : _mm_setzero_si128(), 1);
}
/* Q8_0 and Q4_0: whole blocks. */
DSV3I_INLINE void dsv3i_avx2_decode_blocks(const size_t size, float *y, const void *w, size_t n) {
    const unsigned char *bytes = (const unsigned char *)w;
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (size_t i = 0; i < n; i += DSV3_QBLOCK, bytes += 2 + size) {
        __m128i part[2];
        __m256 d;
        uint16_t bits;
        DSV3_MEMCPY(&bits, bytes, 2);
        d = _mm256_set1_ps(_cvtsh_ss(bits));
        part[0] = dsv3i_avx2_bytes_16(bytes + 2);
        if (size == 32) {
            part[1] = dsv3i_avx2_bytes_16(bytes + 18);
        } else {
            part[1] = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(part[0], 4), low), eight);
            part[0] = _mm_sub_epi8(_mm_and_si128(part[0], low), eight);
        }
        DSV3I_UNROLL for (int j = 0; j < 4; j++) {
            const __m128i q = j % 2 ? _mm_srli_si128(part[j / 2], 8) : part[j / 2];
            _mm256_storeu_ps(y + i + 8 * (size_t)j, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q))));
        }
    }
}

DSV3I_ENTRY(dsv3i_avx2_decode_q8_0, DSV3I_DECODE_LIST, dsv3i_avx2_decode_blocks(32, y, w, n))
DSV3I_ENTRY(dsv3i_avx2_decode_q4_0, DSV3I_DECODE_LIST, dsv3i_avx2_decode_blocks(16, y, w, n))

DSV3I_VECTOR_KERNELS(dsv3i_avx2, 8)
DSV3I_PANEL_KERNELS(dsv3i_avx2, 8)
DSV3I_GEMM_KERNELS(dsv3i_avx2, 8, 2)
DSV3I_TYPE_KERNELS(dsv3i_avx2)

/* nw <= 4 rows of w, n <= NX (1 or 3) of x: y [n, nw]. What is not there is its neighbour once more. */
DSV3I_INLINE void dsv3i_avx2_dots(const int NX, float *y, size_t ldy, const float *x, size_t ldx, size_t n,
                                  const float *w, size_t ldw, size_t nw, size_t k) {
    const float *xs[3], *ws[4];
    __m256 acc[12];
    DSV3I_UNROLL for (size_t t = 0; t < 3; t++) xs[t] = x + dsv3i_min(t, n - 1) * ldx;
    DSV3I_UNROLL for (size_t r = 0; r < 4; r++) ws[r] = w + dsv3i_min(r, nw - 1) * ldw;
    DSV3I_UNROLL for (int j = 0; j < 4 * NX; j++) acc[j] = _mm256_setzero_ps();
    DSV3I_BY_LANES(dsv3i_avx2, 8, k, {
        __m256 f[4];
        DSV3I_UNROLL for (int r = 0; r < 4; r++) f[r] = dsv3i_avx2_get(m, ws[r] + i);
        DSV3I_UNROLL for (int t = 0; t < NX; t++) {
            const __m256 xt = dsv3i_avx2_get(m, xs[t] + i);
            DSV3I_UNROLL for (int r = 0; r < 4; r++) acc[4 * t + r] = _mm256_fmadd_ps(xt, f[r], acc[4 * t + r]);
        }
    });
    DSV3I_UNROLL for (int t = 0; t < NX; t++) {
        const __m128 sums = dsv3i_avx2_sums(acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3]);
        float *to = y + (size_t)t * ldy, four[4];
        if ((size_t)t >= n) continue;
        if (nw < 4) _mm_storeu_ps(four, sums); /* a store under a mask would be a slow one on some processors */
        if (nw < 4) DSV3_MEMCPY(to, four, nw * sizeof *four);
        if (nw == 4) _mm_storeu_ps(to, sums);
    }
}

/* Scores of attention: queries times keys. */
DSV3I_KERNEL void dsv3i_avx2_tile(float *y, size_t ldy, const float *x, size_t ldx, size_t nx, const float *w,
                                  size_t ldw, size_t nw, size_t k) {
    for (size_t t = 0; t < nx; t += 3) {
        for (size_t r = 0; r < nw; r += 4) {
            const size_t n = dsv3i_min(3, nx - t), rows = dsv3i_min(4, nw - r);
            const float *xt = x + t * ldx, *wr = w + r * ldw;
            if (n == 1) dsv3i_avx2_dots(1, y + t * ldy + r, ldy, xt, ldx, 1, wr, ldw, rows, k);
            if (n > 1) dsv3i_avx2_dots(3, y + t * ldy + r, ldy, xt, ldx, n, wr, ldw, rows, k);
        }
    }
}

DSV3I_BACKEND(dsv3i_avx2, dsv3i_avx2, dsv3i_avx2_tile, dsv3i_avx2_widen_f8, dsv3i_round_bf16_floats,
              dsv3i_round_q8_floats, NULL, NULL, {NULL, NULL}, {dsv3i_tile_attend, NULL}, {{NULL}, {NULL}}, {NULL},
              {NULL})

/* ---- AVX-512 F, BW, DQ, VL: 16 lanes, and masks for what does not fill them. */

#if defined(__GNUC__) && !defined(__clang__) /* of variables in gcc's own header, where "undefined" is meant */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#undef DSV3I_ISA
#define DSV3I_ISA "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
DSV3I_INLINE __m512 dsv3i_avx512_half(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
DSV3I_X86_VECTORS(dsv3i_avx512, 512, _mm512_broadcast_i32x4)

typedef __mmask16 dsv3i_avx512_lanes;

/* Lanes 0 .. n-1 of 16. */
DSV3I_INLINE __mmask16 dsv3i_avx512_mask(size_t n) { return (__mmask16)(n >= 16 ? 0xFFFFu : (1u << n) - 1u); }
DSV3I_INLINE __m512 dsv3i_avx512_get(__mmask16 m, const float *at) { return _mm512_maskz_loadu_ps(m, at); }
/* The lanes of the mask. (Stores under a mask are slow on some processors, most of all when they are read soon.) */
DSV3I_INLINE void dsv3i_avx512_put(float *y, __mmask16 m, __m512 v) {
    if (m == 0xFFFF) {
        _mm512_storeu_ps(y, v);
    } else {
        _mm512_mask_storeu_ps(y, m, v);
    }
}
DSV3I_INLINE __m512 dsv3i_avx512_keep(__mmask16 m, __m512 v) { return _mm512_maskz_mov_ps(m, v); }
DSV3I_INLINE __m512i dsv3i_avx512_bytes(const unsigned char *at, size_t n) {
    return _mm512_maskz_loadu_epi8(n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1, at);
}
/* E4M3: as dsv3i_avx2_element. */
DSV3I_INLINE __m512 dsv3i_avx512_element(const dsv3_type type, __mmask16 m, const unsigned char *at) {
    const __m256i bits = _mm256_set1_epi16(0x3F80);
    __m256i h;
    __mmask16 nan;
    if (type == DSV3_F32) return _mm512_maskz_loadu_ps(m, at);
    if (type == DSV3_F16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, at));
    if (type == DSV3_BF16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, at)), 16));
    }
    h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_maskz_loadu_epi8(m, at)), 7);
    h = _mm256_and_si256(h, _mm256_set1_epi16((short)-16512)); /* 0xBF80 */
    nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(h, bits), bits);
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(h, nan, _mm256_set1_epi16(0x7FFF)));
}
/* Lane i + 8 to lane i, then as dsv3i_avx2_sum. */
DSV3I_INLINE float dsv3i_avx512_sum(__m512 v) {
    return dsv3i_avx2_sum(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
DSV3I_INLINE __m512 dsv3i_avx512_whole(__m512 x) {
    const __m512 large = _mm512_set1_ps(12582912.0f); /* 1.5 2^23: the sum is rounded to a whole number */
    return _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), large), large);
}
DSV3I_INLINE __m512 dsv3i_avx512_power(__m512 p, __m512 n) { return _mm512_scalef_ps(p, n); }
DSV3I_INLINE void dsv3i_avx512_transpose(__m512i r[16]) {
    dsv3i_avx512_transpose_fours(r, 16);
    DSV3I_UNROLL for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
        r[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
        r[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}
/* The codes of `count` blocks of 2 + size bytes: two of Q8_0 or four of Q4_0, or fewer at the end of a row. */
DSV3I_INLINE __m512i dsv3i_avx512_blocks(const size_t size, const unsigned char *w, size_t count) {
    unsigned char part[64];
    __m512i v;
    if (count < 64 / size) {
        DSV3_MEMSET(part, 0, sizeof part);
        for (size_t i = 0; i < count; i++) DSV3_MEMCPY(part + i * size, w + i * (2 + size) + 2, size);
        return dsv3i_avx512_words(part);
    }
    if (size == 32) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(dsv3i_avx2_words(w + 2)), dsv3i_avx2_words(w + 36), 1);
    }
    v = _mm512_castsi128_si512(dsv3i_avx2_bytes_16(w + 2));
    v = _mm512_inserti32x4(v, dsv3i_avx2_bytes_16(w + 20), 1);
    v = _mm512_inserti32x4(v, dsv3i_avx2_bytes_16(w + 38), 2);
    return _mm512_inserti32x4(v, dsv3i_avx2_bytes_16(w + 56), 3);
}
DSV3I_VECTOR_KERNELS(dsv3i_avx512, 16)
DSV3I_PANEL_KERNELS(dsv3i_avx512, 16)
DSV3I_GEMM_KERNELS(dsv3i_avx512, 16, 4)
DSV3I_TYPE_KERNELS(dsv3i_avx512)

/* Fetches what comes next, where steps share it. */
DSV3I_INLINE void dsv3i_avx512_fetch(dsv3i_avx512_place *a) {
    if (a->lines == 0) return;
    for (size_t i = 0; i < a->each; i++) dsv3i_avx512_far(a->next + 64 * i);
    a->next += 64 * a->each;
    a->lines -= dsv3i_min(a->each, a->lines);
}

/* ---- AVX-512: gemv_t, y += sum_r x_r w_r. */

/* The 32 numbers of a block of Q8_0 or Q4_0, times f, to two sums. Q4_0: a table of the 16 values there are. */
DSV3I_INLINE void dsv3i_avx512_gemv_t_block(const dsv3_type type, __m512 acc[2], __m512 f,
                                            const unsigned char *block) {
    const __m512 sixteen = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    int16_t half;
    __m512 d, v[2];
    DSV3_MEMCPY(&half, block, sizeof half);
    d = _mm512_cvtph_ps(_mm256_set1_epi16(half));
    if (type == DSV3_Q4_0) {
        const __m512 table = _mm512_mul_ps(sixteen, d);
        const __m512i c = _mm512_cvtepu8_epi32(dsv3i_avx2_bytes_16(block + 2));
        v[0] = _mm512_permutexvar_ps(c, table); /* of an index, four bits count */
        v[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(c, 4), table);
    } else {
        v[0] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(dsv3i_avx2_bytes_16(block + 2))), d);
        v[1] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(dsv3i_avx2_bytes_16(block + 18))), d);
    }
    acc[0] = _mm512_fmadd_ps(f, v[0], acc[0]);
    acc[1] = _mm512_fmadd_ps(f, v[1], acc[1]);
}

/* NC vectors of numbers of a row, from w on, times f; of a vector, the lanes of the mask. */
DSV3I_INLINE void dsv3i_avx512_gemv_t_columns(const dsv3_type type, const int NC, float *y, __mmask16 m, __m512 f,
                                              const unsigned char *w, const float scale[2]) {
    const size_t size = type == DSV3_F8_E4M3 ? 1 : 2;
    __m512 acc[16];
    DSV3I_UNROLL for (int c = 0; c < NC; c++) acc[c] = dsv3i_avx512_get(m, y + 16 * c);
    DSV3I_UNROLL for (int c = 0; c < NC; c++) {
        __m512 v;
        if (type == DSV3_Q8_0 || type == DSV3_Q4_0) {
            if (c % 2 == 0) dsv3i_avx512_gemv_t_block(type, acc + c, f, w + c / 2 * (type == DSV3_Q8_0 ? 34 : 18));
            continue;
        }
        v = dsv3i_avx512_element(type, m, w + 16 * (size_t)c * size);
        if (type == DSV3_F8_E4M3) {
            v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(256.0f)), _mm512_set1_ps(scale[c / 8]));
        }
        acc[c] = _mm512_fmadd_ps(f, v, acc[c]);
    }
    DSV3I_UNROLL for (int c = 0; c < NC; c++) dsv3i_avx512_put(y + 16 * c, m, acc[c]);
}

/* A row, from number i on, a multiple of 32. */
DSV3I_INLINE void dsv3i_avx512_gemv_t_row(const dsv3_type type, float *y, float x, const unsigned char *w,
                                          const unsigned char *scale, size_t i, size_t n) {
    const __m512 f = _mm512_set1_ps(x);
    const size_t block = dsv3_row_bytes(type, DSV3_QBLOCK);
    const unsigned char *at = w + i / DSV3_QBLOCK * block;
    const int blocks = type == DSV3_Q8_0 || type == DSV3_Q4_0;
    for (size_t columns; i < n; i += columns, at += columns * block / DSV3_QBLOCK) {
        float unit[2] = {1.0f, 1.0f};
        columns = n - i >= 256 ? 256 : blocks ? DSV3_QBLOCK : dsv3i_min(n - i, 16);
        if (scale != NULL) {
            DSV3_MEMCPY(unit, scale + i / DSV3_BLOCK * sizeof *unit, (columns == 256 ? 2 : 1) * sizeof *unit);
        }
        if (columns == 256) {
            dsv3i_avx512_gemv_t_columns(type, 16, y + i, 0xFFFF, f, at, unit);
        } else {
            dsv3i_avx512_gemv_t_columns(type, blocks ? 2 : 1, y + i, dsv3i_avx512_mask(columns), f, at, unit);
        }
    }
}

/* Row by row, exactly as they lie, is how they come fastest, although sums then wait in a near cache. */
#define DSV3I_GEMV_T(name, type)                                                                                     \
    DSV3I_KERNEL void dsv3i_avx512_gemv_t_##name(float *y, const float *x, const void *w, size_t row_bytes,          \
                                                 const void *scale, size_t k, size_t n) {                            \
        const unsigned char *row = (const unsigned char *)w, *scales = (const unsigned char *)scale;                 \
        for (size_t r = 0; r < k; r++) dsv3i_avx512_gemv_t_row(type, y, x[r], row + r * row_bytes, scales, 0, n);    \
    }
DSV3I_GEMV_T(f16, DSV3_F16)
DSV3I_GEMV_T(bf16, DSV3_BF16)
DSV3I_GEMV_T(f8_e4m3, DSV3_F8_E4M3)
DSV3I_GEMV_T(q8_0, DSV3_Q8_0)
DSV3I_GEMV_T(q4_0, DSV3_Q4_0)

/* ---- AVX-512: attention. Lanes are queries: scores p [nk, columns, 16]. */

/* Scores become weights; the rescaling of what is there to the new maxima. p [nk, columns, 16] */
DSV3I_INLINE void dsv3i_avx512_softmax(dsv3i_attention_tile *a, float *p, float rescale[64], size_t columns,
                                       size_t nk) {
    const __m512 scale = _mm512_set1_ps(a->scale);
    for (size_t c = 0; c < columns; c++) {
        const __m512 before = _mm512_loadu_ps(a->top + 16 * c);
        const __m512i seen = _mm512_loadu_si512(a->seen + 16 * c);
        __m512 top = before, sum, factor;
        for (size_t j = 0; j < nk; j++) {
            float *at = p + 16 * (j * columns + c);
            const __mmask16 m = _mm512_cmplt_epi32_mask(_mm512_set1_epi32((int)j), seen);
            const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(at), scale);
            top = _mm512_mask_max_ps(top, m, s, top);
            _mm512_storeu_ps(at, s);
        }
        factor = dsv3i_avx512_exp(_mm512_sub_ps(before, top));
        sum = _mm512_mul_ps(_mm512_loadu_ps(a->sum + 16 * c), factor);
        for (size_t j = 0; j < nk; j++) {
            float *at = p + 16 * (j * columns + c);
            const __mmask16 m = _mm512_cmplt_epi32_mask(_mm512_set1_epi32((int)j), seen);
            const __m512 e = dsv3i_avx512_exp(_mm512_sub_ps(_mm512_loadu_ps(at), top));
            sum = _mm512_mask_add_ps(sum, m, sum, e);
            _mm512_storeu_ps(at, _mm512_maskz_mov_ps(m, e));
        }
        _mm512_storeu_ps(a->top + 16 * c, top);
        _mm512_storeu_ps(a->sum + 16 * c, sum);
        _mm512_storeu_ps(rescale + 16 * c, factor);
    }
}

DSV3I_INLINE void dsv3i_avx512_rescale(const dsv3i_attention_tile *a, const float rescale[64]) {
    for (size_t t = 0; t < a->lanes; t++) {
        const __m512 f = _mm512_set1_ps(rescale[t]);
        float *out = a->out + t * a->ld_out;
        if (rescale[t] >= 1.0f) continue;
        DSV3I_BY_LANES(dsv3i_avx512, 16, a->dv,
                       dsv3i_avx512_put(out + i, m, _mm512_mul_ps(f, dsv3i_avx512_get(m, out + i))));
    }
}

/* A panel of queries, and behind it room for scores. */
DSV3I_KERNEL void dsv3i_avx512_attend_begin(dsv3i_attention_tile *a) {
    dsv3i_avx512_pack_codes(4, a->scratch, a->q, a->ld_q * sizeof *a->q, a->lanes, a->dk);
}

DSV3I_KERNEL void dsv3i_avx512_attend(dsv3i_attention_tile *a, size_t nk) {
    const size_t columns = (a->lanes + 15) / 16;
    const dsv3i_panel queries = dsv3i_panel_of(a->scratch, columns, a->dk);
    float *p = (float *)a->scratch + 16 * columns * a->dk, rescale[64];
    dsv3i_avx512_gemm_f32(p, 16 * columns, a->keys, a->ld_k * sizeof(float), nk, &queries, 16 * columns, a->dk, 0);
    dsv3i_avx512_softmax(a, p, rescale, columns, nk);
    dsv3i_avx512_rescale(a, rescale);
    dsv3i_avx512_outer(a->out, a->ld_out, a->lanes, p, 1, 16 * columns, (const float *)a->values, a->ld_v, nk, a->dv);
}

DSV3I_BACKEND(dsv3i_avx512, dsv3i_avx512, NULL, dsv3i_avx512_widen_f8, dsv3i_round_bf16_floats, dsv3i_round_q8_floats,
              NULL, NULL, {dsv3i_avx512_attend_begin, NULL}, {dsv3i_avx512_attend, NULL}, {{NULL}, {NULL}}, {NULL},
              DSV3I_GEMV_T_ROW(dsv3i_avx512_gemv_t_f8_e4m3))

/* ---- AVX-512 with VBMI, VNNI and BF16: FP8 becomes BF16 by tables, and codes are multiplied as they are. */

#undef DSV3I_ISA
#define DSV3I_ISA "avx512vbmi,avx512vnni,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"

/* The lower and the upper bytes of the BF16 of the 128 positive codes of E4M3. */
DSV3I_INLINE void dsv3i_bf16_tables(__m512i table[4]) {
    unsigned char bytes[2][128];
    for (size_t i = 0; i < 128; i += 16) {
        const __m512i bits = _mm512_loadu_si512(dsv3i_e4m3 + i);
        _mm_storeu_si128((__m128i *)(void *)(bytes[0] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 16)));
        _mm_storeu_si128((__m128i *)(void *)(bytes[1] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 24)));
    }
    for (int i = 0; i < 4; i++) table[i] = _mm512_loadu_si512(bytes[i / 2] + 64 * (i % 2));
}

/* E4M3 to BF16, both bytes by tables: of each eight codes the first four, and the others. */
DSV3I_INLINE void dsv3i_bf16_of_f8(__m512i b[2], __m512i v, const __m512i table[4]) {
    const __m512i low = _mm512_permutex2var_epi8(table[0], v, table[1]), sign = _mm512_set1_epi8((char)-128);
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(table[2], v, table[3]), v, sign, 0xF8);
    b[0] = _mm512_unpacklo_epi8(low, high);
    b[1] = _mm512_unpackhi_epi8(low, high);
}

/* Fours of terms of a panel of FP8 become BF16; prefetch distance: `ahead` bytes, 0: none. */
DSV3I_INLINE void dsv3i_bf16_widen(unsigned char *to, const unsigned char *from, size_t columns, size_t fours,
                                   size_t ahead, const __m512i table[4]) {
    for (size_t i = 0; i < fours; i++, to += 64 * columns) {
        for (size_t c = 0; c < columns; c++, from += 64, to += 64) {
            __m512i b[2];
            dsv3i_bf16_of_f8(b, _mm512_loadu_si512(from), table);
            if (ahead > 0) dsv3i_avx512_near(from + ahead);
            _mm512_storeu_si512(to, b[0]);
            _mm512_storeu_si512(to + 64 * columns, b[1]);
        }
    }
}

DSV3I_KERNEL void dsv3i_bf16_widen_f8(void *values, const void *panel, size_t columns, size_t k) {
    __m512i table[4];
    dsv3i_bf16_tables(table);
    dsv3i_bf16_widen((unsigned char *)values, (const unsigned char *)panel, columns, dsv3i_blocks(k, 4),
                     DSV3I_PREFETCH, table);
}

/* 256 numbers of a row of E4M3: 64 codes, in the order in which four sums want them, become BF16, and floats. */
DSV3I_INLINE void dsv3i_bf16_gemv_t_256(float *y, __m512 f, const unsigned char *w, const float scale[2],
                                        const __m512i table[4], __m512i order) {
    DSV3I_UNROLL for (size_t c = 0; c < 16; c += 4) {
        __m512i b[2];
        __m512 value[2][4];
        dsv3i_bf16_of_f8(b, _mm512_permutexvar_epi8(order, _mm512_loadu_si512(w + 16 * c)), table);
        _mm_prefetch((const char *)w + 16 * c + DSV3I_PREFETCH, _MM_HINT_T0);
        dsv3i_avx512_floats(DSV3_BF16, value[0], b[0], _mm512_setzero_ps());
        dsv3i_avx512_floats(DSV3_BF16, value[1], b[1], _mm512_setzero_ps());
        DSV3I_UNROLL for (size_t i = 0; i < 4; i++) {
            float *to = y + 16 * (c + i);
            const __m512 scaled = _mm512_mul_ps(value[i / 2][i % 2], _mm512_set1_ps(scale[c / 8]));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(f, scaled, _mm512_loadu_ps(to)));
        }
    }
}

DSV3I_KERNEL void dsv3i_bf16_gemv_t_f8_e4m3(float *y, const float *x, const void *w, size_t row_bytes,
                                            const void *scale, size_t k, size_t n) {
    const unsigned char *row = (const unsigned char *)w, *scales = (const unsigned char *)scale;
    const size_t whole = n / 256 * 256;
    unsigned char at[64];
    __m512i table[4], order;
    for (unsigned i = 0; i < 64; i++) at[i] = (unsigned char)(i % 16 / 8 * 32 + i % 2 * 16 + i / 16 * 4 + i % 8 / 2);
    order = _mm512_loadu_si512(at);
    dsv3i_bf16_tables(table);
    for (size_t r = 0; r < k; r++, row += row_bytes) {
        for (size_t i = 0; i < whole; i += 256) {
            float unit[2] = {1.0f, 1.0f};
            if (scales != NULL) DSV3_MEMCPY(unit, scales + i / DSV3_BLOCK * sizeof *unit, sizeof unit);
            dsv3i_bf16_gemv_t_256(y + i, _mm512_set1_ps(x[r]), row + i, unit, table, order);
        }
        dsv3i_avx512_gemv_t_row(DSV3_F8_E4M3, y, x[r], row, scales, whole, n);
    }
}

DSV3I_KERNEL void dsv3i_bf16_round_bf16(void *out, const float *x, size_t k) {
    unsigned char *to = (unsigned char *)out;
    for (size_t i = 0; i < k; i += 16, to += 32) {
        const __m256bh v = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(dsv3i_avx512_mask(k - i), x + i));
        if (k - i >= 16) {
            _mm256_storeu_si256((__m256i *)(void *)to, (__m256i)v);
        } else {
            _mm256_mask_storeu_epi16(to, dsv3i_avx512_mask((k - i + 3) / 4 * 4), (__m256i)v);
        }
    }
}

/* 32 bytes, their scale, and -8 times their sum. */
DSV3I_KERNEL void dsv3i_bf16_round_bytes(void *out, const float *x, size_t k) {
    unsigned char *to = (unsigned char *)out;
    for (size_t i = 0; i < k; i += DSV3_QBLOCK, to += DSV3_QBLOCK + 8) {
        const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + 16), zero = _mm512_setzero_ps();
        float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b))), unit, inverse;
        const __m512 bad = _mm512_add_ps(_mm512_mul_ps(a, zero), _mm512_mul_ps(b, zero));
        int32_t sum;
        __m512 f;
        __m512i qa, qb;
        if (!(top >= 1e-30f)) top = 0.0f;
        inverse = top > 0.0f ? 127.0f / top : 0.0f;
        unit = top / 127.0f;
        f = _mm512_set1_ps(inverse);
        qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, f));
        qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, f));
        if (_mm512_cmp_ps_mask(bad, bad, _CMP_UNORD_Q)) {
            unit = dsv3i_float(0x7FC00000u);
            qa = qb = _mm512_setzero_si512();
        }
        sum = -8 * _mm512_reduce_add_epi32(_mm512_add_epi32(qa, qb));
        _mm_storeu_si128((__m128i *)(void *)to, _mm512_cvtsepi32_epi8(qa));
        _mm_storeu_si128((__m128i *)(void *)(to + 16), _mm512_cvtsepi32_epi8(qb));
        DSV3_MEMCPY(to + DSV3_QBLOCK, &unit, 4);
        DSV3_MEMCPY(to + DSV3_QBLOCK + 4, &sum, 4);
    }
}

/* ---- AVX-512 BF16: gemm of rows of BF16 or of bytes, and a panel. */

/* The four bytes that a step has of each of 16 outputs, as dot products of codes take them. Two vectors: FP8 becomes BF16,
 * and the halves of bytes of Q4_0 are the earlier and the later terms. table: of FP8. */
DSV3I_INLINE void dsv3i_bf16_values(const dsv3_type type, __m512i b[2], const unsigned char *w,
                                    const __m512i table[4]) {
    const __m512i low = _mm512_set1_epi8(15);
    b[0] = _mm512_loadu_si512(w);
    if (type == DSV3_F8_E4M3) {
        _mm_prefetch((const char *)w + 1024, _MM_HINT_T0); /* others are slower with it */
        dsv3i_bf16_of_f8(b, b[0], table);
    } else if (type == DSV3_Q4_0) {
        b[1] = _mm512_and_si512(_mm512_srli_epi16(b[0], 4), low);
        b[0] = _mm512_and_si512(b[0], low);
    }
}

DSV3I_INLINE __m512i dsv3i_bf16_four(const unsigned char *x) {
    return _mm512_set1_epi32(*(const int32_t *)(const void *)x);
}

/* Steps of M rows and NP columns, of BF16. */
DSV3I_INLINE void dsv3i_bf16_terms(const int M, const int NP, __m512 acc[24], dsv3i_avx512_place *a, size_t steps) {
    const unsigned char *w = a->w;
    for (size_t i = 0; i < steps; i++, w += a->step) {
        __m512i b[4];
        dsv3i_avx512_fetch(a);
        DSV3I_UNROLL for (int p = 0; p < NP; p++) b[p] = _mm512_loadu_si512(w + 64 * p);
        DSV3I_UNROLL for (int m = 0; m < M; m++) {
            const __m512bh x = (__m512bh)dsv3i_bf16_four(a->x[m] + 4 * i);
            DSV3I_UNROLL for (int p = 0; p < NP; p++) {
                acc[m * NP + p] = _mm512_dpbf16_ps(acc[m * NP + p], x, (__m512bh)b[p]);
            }
        }
    }
    a->w = w;
}

/* Column c of panels w, four of each, `step` bytes on. `columns` are there; the others are the last one once more. */
DSV3I_INLINE const unsigned char *dsv3i_bf16_column(const unsigned char *const *w, size_t columns, int c,
                                                    size_t step) {
    return w[c / 4] + step + 64 * dsv3i_min((size_t)c % 4, columns - 1);
}

/* A scale block of 32 bytes, or of twice 16 in the halves of bytes (Q4_0), M rows and NC columns: sums of products of whole
 * numbers, exact, as floats times the scale of x. They begin so that codes of 0 that are not 0 come out right: with -8
 * times the sum of x, or 16 times that. fetch: NULL, or what says what is read next. */
DSV3I_INLINE void dsv3i_bf16_block(const dsv3_type type, const int M, const int NC, __m512 *sums,
                                   const unsigned char *const *w, size_t columns, size_t step,
                                   const unsigned char *const *x, __m128i shift, dsv3i_avx512_place *fetch) {
    const int halves = type == DSV3_Q4_0 ? 2 : 1;
    __m512i sum[16];
    DSV3I_UNROLL for (int j = 0; j < M * NC; j++) {
        sum[j] = _mm512_sll_epi32(dsv3i_bf16_four(x[j / NC] + DSV3_QBLOCK + 4), shift);
    }
    DSV3I_UNROLL for (size_t i = 0; i < (size_t)(8 / halves); i++) {
        if (fetch != NULL) dsv3i_avx512_fetch(fetch);
        DSV3I_UNROLL for (int c = 0; c < NC; c++) {
            __m512i b[2];
            dsv3i_bf16_values(type, b, dsv3i_bf16_column(w, columns, c, i * step), NULL);
            DSV3I_UNROLL for (int j = c; j < M * NC * halves; j += NC) {
                const int h = j / (M * NC), at = j % (M * NC);
                const __m512i f = dsv3i_bf16_four(x[at / NC] + 16 * h + 4 * i);
                sum[at] = _mm512_dpbusd_epi32(sum[at], b[h], f);
            }
        }
    }
    DSV3I_UNROLL for (int j = 0; j < M * NC; j++) {
        const __m512 scale = _mm512_set1_ps(*(const float *)(const void *)(x[j / NC] + DSV3_QBLOCK));
        sums[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[j]), scale);
    }
}

/* M rows and NP columns. Sums of BF16 go to memory after each scale block, those of bytes at last. */
DSV3I_INLINE void dsv3i_bf16_rows(const dsv3_type type, const int M, const int NP, dsv3i_avx512_place *a,
                                  const dsv3i_panel *w, size_t k, int add) {
    const __m128i shift = _mm_cvtsi32_si128(w->zero == 128 ? 4 : 0);
    const float *scale = a->scale;
    const int bytes = type != DSV3_BF16;
    __m512 acc[24], part[24];
    if (bytes) dsv3i_avx512_begin(M, NP, acc, a, add);
    for (size_t i = 0, end; i < k; i = end) {
        end = dsv3i_min(i + (bytes ? DSV3_QBLOCK : w->block), k);
        if (bytes) {
            dsv3i_bf16_block(type, M, NP, part, &a->w, (size_t)NP, a->step, a->x, shift, a);
            DSV3I_UNROLL for (int j = 0; j < M * NP; j++) {
                acc[j] = _mm512_fmadd_ps(part[j], _mm512_loadu_ps(scale + 16 * (j % NP)), acc[j]);
            }
            a->w += (type == DSV3_Q4_0 ? 4 : 8) * a->step + w->gap;
        } else {
            a->scale = scale;
            dsv3i_avx512_begin(M, NP, acc, a, add && scale == NULL);
            dsv3i_bf16_terms(M, NP, acc, a, (end - i + 1) / 2);
            dsv3i_avx512_end(M, NP, acc, a, add || i > 0);
        }
        DSV3I_UNROLL for (int m = 0; m < M; m++) a->x[m] += bytes ? DSV3_QBLOCK + 8 : 2 * (end - i);
        if (scale != NULL) scale += 16 * w->columns;
    }
    a->scale = NULL;
    if (bytes) dsv3i_avx512_end(M, NP, acc, a, 0);
}

/* n rows, up to 6 at a time, and NP columns from c0 on. Each share of rows fetches its share of what is read next. */
DSV3I_INLINE void dsv3i_bf16_columns(const dsv3_type type, const int NP, float *y, size_t ldy, const void *x,
                                     size_t ldx, size_t n, const dsv3i_panel *w, size_t c0, size_t rows, size_t k,
                                     int add) {
    const size_t lines = w->next_bytes / 64 * (size_t)NP / w->columns / dsv3i_max(n, 1);
    const size_t steps = dsv3i_blocks(k, type == DSV3_BF16 ? 2 : type == DSV3_Q8_0 ? 4 : 8);
    for (size_t t = 0, m; t < n; t += m) {
        dsv3i_avx512_place a;
        m = dsv3i_rows_together(n - t);
        dsv3i_avx512_place_set(NP, &a, y + t * ldy + 16 * c0, ldy, (const unsigned char *)x + t * ldx, ldx, m,
                               (const unsigned char *)w->values + 64 * c0, 64 * (NP == 4 ? 4 : w->columns),
                               rows - 16 * c0);
        if (w->scale != NULL) a.scale = w->scale + 16 * c0;
        a.next = (const unsigned char *)w->next + 64 * lines * (c0 / (size_t)NP * n + t);
        a.lines = lines * m;
        a.each = dsv3i_max(dsv3i_blocks(a.lines, steps), 1);
        if (m > 4) dsv3i_bf16_rows(type, 6, NP, &a, w, k, add);
        if (m > 1 && m <= 4) dsv3i_bf16_rows(type, 4, NP, &a, w, k, add);
        if (m == 1) dsv3i_bf16_rows(type, 1, NP, &a, w, k, add);
    }
}

/* Four columns of BF16 at a time, or two of bytes; then what is left. */
DSV3I_INLINE void dsv3i_bf16_gemm(const dsv3_type type, float *y, size_t ldy, const void *x, size_t ldx, size_t n,
                                  const dsv3i_panel *w, size_t rows, size_t k, int add) {
    size_t c = 0;
    if (type == DSV3_BF16 && w->columns == 4) {
        dsv3i_bf16_columns(type, 4, y, ldy, x, ldx, n, w, 0, rows, k, add);
        return;
    }
    for (; c + 2 <= w->columns; c += 2) dsv3i_bf16_columns(type, 2, y, ldy, x, ldx, n, w, c, rows, k, add);
    if (c < w->columns) dsv3i_bf16_columns(type, 1, y, ldy, x, ldx, n, w, c, rows, k, add);
}

DSV3I_ENTRY(dsv3i_bf16_gemm_bf16, DSV3I_GEMM_LIST, dsv3i_bf16_gemm(DSV3_BF16, y, ldy, x, ldx, n, w, rows, k, add))
DSV3I_ENTRY(dsv3i_bf16_gemm_bytes, DSV3I_GEMM_LIST, dsv3i_bf16_gemm(DSV3_Q8_0, y, ldy, x, ldx, n, w, rows, k, add))

/* ---- AVX-512 BF16: attention. scratch: the queries as a panel; scores [64, columns, 16]; keys [64, dk] and,
 * where gemm takes more than 4 columns, all values as one panel. */

DSV3I_KERNEL void dsv3i_bf16_attend_begin(dsv3i_attention_tile *a) {
    const size_t dk = dsv3i_blocks(a->dk, 4) * 4, columns = (a->lanes + 15) / 16;
    unsigned char *rows = (unsigned char *)a->scratch + 32 * columns * dk;
    for (size_t i = 0; i < a->lanes; i++) dsv3i_bf16_round_bf16(rows + 2 * i * dk, a->q + i * a->ld_q, a->dk);
    dsv3i_avx512_pack_codes(2, a->scratch, rows, 2 * dk, a->lanes, dk);
}

/* Places of 16 numbers and, so many behind, of 16 others: in pairs. */
DSV3I_INLINE __m512i dsv3i_bf16_pairs(int apart) {
    const __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(at, _mm512_slli_epi32(_mm512_add_epi32(at, _mm512_set1_epi32(apart)), 16));
}

/* Weights p [nk, columns, 16] as rows of 64 BF16 for each lane. */
DSV3I_INLINE void dsv3i_bf16_weights(unsigned char *rows, const float *p, size_t columns, size_t nk) {
    for (size_t c = 0; c < columns; c++, rows += 16 * 2 * DSV3I_TILE_KEYS) {
        for (size_t first = 0; first < nk; first += 32) {
            __m512i r[16];
            for (size_t j = 0; j < 16; j++) {
                const size_t key = first + 2 * j;
                const float *at = p + 16 * (key * columns + c);
                const __m512 one = key < nk ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
                const __m512 two = key + 1 < nk ? _mm512_loadu_ps(at + 16 * columns) : _mm512_setzero_ps();
                r[j] = _mm512_permutexvar_epi16(dsv3i_bf16_pairs(16), (__m512i)_mm512_cvtne2ps_pbh(two, one));
            }
            dsv3i_avx512_transpose(r);
            for (size_t i = 0; i < 16; i++) _mm512_storeu_si512(rows + 2 * DSV3I_TILE_KEYS * i + 2 * first, r[i]);
        }
    }
}

/* 32 numbers of values as BF16, from number `at` on, those of the mask. */
DSV3I_INLINE __m512i dsv3i_bf16_value(const dsv3i_attention_tile *a, size_t at, __mmask32 m) {
    const float *from = (const float *)a->values;
    if (a->type == DSV3_BF16) return _mm512_maskz_loadu_epi16(m, (const uint16_t *)a->values + at);
    from += at;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps((__mmask16)(m >> 16), from + 16),
                                        _mm512_maskz_loadu_ps((__mmask16)(m & 0xFFFF), from));
}

/* Numbers i .. end-1 of values, i a multiple of 16, two keys in four bytes: [nk/2, columns, 16, 2]. fetch: of the next
 * tile of keys, too. */
DSV3I_INLINE void dsv3i_bf16_value_panel(unsigned char *panel, const dsv3i_attention_tile *a, size_t i, size_t end,
                                         size_t nk, int fetch) {
    const __m512i first = dsv3i_bf16_pairs(32);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (size_t j = 0; j < nk; j += 2) {
        for (size_t c = i; c < end; c += 32) {
            const size_t from = j * a->ld_v + c, after = j + 1 < nk ? from + a->ld_v : from;
            const __mmask32 all = ~(__mmask32)0, m = end - c >= 32 ? all : ((__mmask32)1 << (end - c)) - 1;
            const int whole = m == all && j + 1 < nk; /* loads without masks are faster */
            const __m512i x = whole ? dsv3i_bf16_value(a, from, all) : dsv3i_bf16_value(a, from, m);
            const __m512i y =
                whole ? dsv3i_bf16_value(a, after, all) : dsv3i_bf16_value(a, after, j + 1 < nk ? m : 0);
            const uint16_t *next = (const uint16_t *)a->values + from + DSV3I_TILE_KEYS * a->ld_v;
            if (fetch) dsv3i_avx512_far((const unsigned char *)next);
            if (fetch) dsv3i_avx512_far((const unsigned char *)(next + a->ld_v));
            _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(x, first, y));
            if (end - c > 16) _mm512_storeu_si512(panel + 64, _mm512_permutex2var_epi16(x, second, y));
            panel += end - c > 16 ? 128 : 64;
        }
    }
}

/* Scores of 16 keys with the queries of one column: more rows than gemm has, so that sums hide their latency. With each
 * step goes a line of the next tile's keys. */
DSV3I_INLINE void dsv3i_bf16_scores(float *p, const unsigned char *keys, size_t ldx, const unsigned char *q,
                                    size_t k) {
    const unsigned char *x[6]; /* every third key: addresses of the others are sums */
    __m512 acc[16];
    DSV3I_UNROLL for (int m = 0; m < 16; m += 3) x[m / 3] = keys + (size_t)m * ldx;
    DSV3I_UNROLL for (int m = 0; m < 16; m++) acc[m] = _mm512_setzero_ps();
    for (size_t i = 0; i < k; i += 2) {
        const __m512bh b = (__m512bh)_mm512_loadu_si512(q + 32 * i);
        _mm_prefetch((const char *)x[0] + (DSV3I_TILE_KEYS + i / 2 % 16) * ldx + i / 32 * 64, _MM_HINT_T1);
        DSV3I_UNROLL for (int m = 0; m < 16; m++) {
            const unsigned char *at = x[m / 3] + (size_t)(m % 3) * ldx + 2 * i;
            acc[m] = _mm512_dpbf16_ps(acc[m], (__m512bh)dsv3i_bf16_four(at), b);
        }
    }
    DSV3I_UNROLL for (int m = 0; m < 16; m++) _mm512_storeu_ps(p + 16 * m, acc[m]);
}

/* The gemm of rows and panels of BF16 is the backend's. */
DSV3I_KERNEL void dsv3i_bf16_attend(dsv3i_attention_tile *a, size_t nk) {
    const size_t dk = dsv3i_blocks(a->dk, 4) * 4, columns = (a->lanes + 15) / 16;
    const dsv3i_kernels *kernels = dsv3i_kernels_of(a->ctx);
    const int wide = kernels->gemm[DSV3I_GEMM_FAST_BF16] != dsv3i_bf16_gemm_bf16;
    const size_t most = wide ? a->dv : 64;
    unsigned char *scratch = (unsigned char *)a->scratch + 32 * columns * dk,
                  *keys = scratch + 64 * columns * DSV3I_TILE_KEYS;
    unsigned char weights[64 * 2 * DSV3I_TILE_KEYS], part[DSV3I_TILE_KEYS / 2 * 256],
        *values = wide ? keys + 2 * DSV3I_TILE_KEYS * dk : part;
    float *p = (float *)(void *)scratch, rescale[64];
    size_t ldx = 2 * a->ld_k, scored = 0;
    const void *x = a->keys;
    dsv3i_panel panel = dsv3i_panel_of(a->scratch, columns, a->type == DSV3_F32 ? dk : a->dk);
    if (a->type == DSV3_F32) {
        for (size_t j = 0; j < nk; j++) {
            dsv3i_bf16_round_bf16(keys + 2 * j * dk, (const float *)a->keys + j * a->ld_k, a->dk);
        }
        x = keys;
        ldx = 2 * dk;
    }
    for (; !wide && columns == 1 && scored + 16 <= nk; scored += 16) {
        dsv3i_bf16_scores(p + 16 * scored, (const unsigned char *)x + scored * ldx, ldx,
                          (const unsigned char *)a->scratch, panel.block);
    }
    kernels->gemm[DSV3I_GEMM_FAST_BF16](p + 16 * columns * scored, 16 * columns,
                                        (const unsigned char *)x + scored * ldx, ldx, nk - scored, &panel,
                                        16 * columns, panel.block, 0);
    dsv3i_avx512_softmax(a, p, rescale, columns, nk);
    dsv3i_avx512_rescale(a, rescale);
    dsv3i_bf16_weights(weights, p, columns, nk);
    for (size_t i = 0; i < a->dv; i += most) {
        const size_t rows = dsv3i_min(most, a->dv - i);
        panel = dsv3i_panel_of(values, (rows + 15) / 16, (nk + 1) / 2 * 2);
        dsv3i_bf16_value_panel(values, a, i, i + rows, nk, scored == 0 && a->type == DSV3_BF16);
        kernels->gemm[DSV3I_GEMM_FAST_BF16](a->out + i, a->ld_out, weights, 2 * DSV3I_TILE_KEYS, a->lanes, &panel,
                                            rows, panel.block, 1);
    }
}

/* ---- AVX-512 BF16: gemv, 1 to 4 rows and packed weights. Reading is all that counts. Panels of several far places are
 * read side by side, because several streams are what a processor fetches early best, and codes stay in registers. */

typedef enum dsv3i_gemv_kind { /* rows of floats; rows of codes; rows of BF16, added as AMX adds */
                               DSV3I_GEMV_FLOATS = 0,
                               DSV3I_GEMV_CODES = 1,
                               DSV3I_GEMV_STEPS = 2
} dsv3i_gemv_kind;

/* M rows and NC columns of panels, from c0 on, terms begin .. end-1: sums[m NC + column] += .., with DSV3I_GEMV_STEPS one
 * sum of even and one of odd terms for each. With rows of floats terms are added one by one, as numbers. */
DSV3I_INLINE void dsv3i_bf16_gemv_terms(const dsv3i_gemv_kind kind, const dsv3_type type, const int M, const int c0,
                                        const int NC, __m512 sums[16], const unsigned char *const w[4],
                                        size_t columns, const unsigned char *const x[4], size_t begin, size_t end,
                                        const __m512i table[4]) {
    const int bytes = type == DSV3_Q8_0 || type == DSV3_Q4_0, passes = type == DSV3_Q4_0 ? 2 : 1;
    const int each = type == DSV3_BF16 ? 2 : 4, S = kind == DSV3I_GEMV_STEPS ? 2 : 1;
    const __m512 zero = _mm512_set1_ps(type == DSV3_Q8_0 ? 128.0f : 8.0f);
    if (type == DSV3_Q4_0) end /= 2;
    DSV3I_UNROLL for (int pass = 0; pass < passes; pass++) {
        for (size_t i = begin; i < end; i += (size_t)each) {
            DSV3I_UNROLL for (int c = 0; c < NC; c++) {
                __m512i b[2];
                dsv3i_bf16_values(type, b, dsv3i_bf16_column(w, columns, c0 + c, i / (size_t)each * 64 * columns),
                                  table);
                DSV3I_UNROLL for (int j = 0; j < each; j++) {
                    __m512 f[4], g[4];
                    dsv3i_avx512_floats(bytes ? DSV3_Q8_0 : DSV3_BF16, f, b[bytes ? pass : j / 2], zero);
                    DSV3I_UNROLL for (int m = 0; m < M; m++) {
                        __m512 *to = sums + S * (m * NC + c) + j % S;
                        const float *xf = (const float *)(const void *)x[m] + 16 * pass + i + j;
                        const unsigned char *xm = x[m] + 2 * i + 2 * (j - j % 2);
                        if (kind == DSV3I_GEMV_FLOATS) {
                            *to = _mm512_fmadd_ps(_mm512_set1_ps(*xf), f[bytes ? j : j % 2], *to);
                        } else if (kind == DSV3I_GEMV_STEPS) {
                            dsv3i_avx512_floats(DSV3_BF16, g, dsv3i_bf16_four(xm), zero);
                            *to = _mm512_fmadd_ps(g[j % 2], f[j % 2], *to);
                        } else if (j % 2 == 0) {
                            *to = _mm512_dpbf16_ps(*to, (__m512bh)dsv3i_bf16_four(xm), (__m512bh)b[j / 2]);
                        }
                    }
                }
            }
        }
    }
}

/* The same with the sums of AMX for one row: of each 32 terms, those of even and of odd ones are added, and then to what
 * is there. Up to 8 columns at a time, so that registers last. */
DSV3I_INLINE void dsv3i_bf16_gemv_steps(const dsv3_type type, const int NC, __m512 sums[16],
                                        const unsigned char *const w[4], size_t columns,
                                        const unsigned char *const x[4], size_t k, const __m512i table[4]) {
    const int some = NC < 8 ? NC : 8;
    for (size_t i = 0, end; i < k; i = end) {
        end = dsv3i_min(i + 32, k);
        DSV3I_UNROLL for (int c0 = 0; c0 < NC; c0 += some) {
            __m512 part[16];
            DSV3I_UNROLL for (int c = 0; c < 2 * some; c++) part[c] = _mm512_setzero_ps();
            dsv3i_bf16_gemv_terms(DSV3I_GEMV_STEPS, type, 1, c0, some, part, w, columns, x, i, end, table);
            if (end - i <= (type == DSV3_F8_E4M3 ? 28 : 30)) { /* a tile goes on with zeros, and -0 + 0 = 0 */
                DSV3I_UNROLL for (int c = 0; c < 2 * some; c++) part[c] = _mm512_add_ps(part[c], _mm512_setzero_ps());
            }
            DSV3I_UNROLL for (int c = 0; c < some; c++) {
                sums[c0 + c] = _mm512_add_ps(sums[c0 + c], _mm512_add_ps(part[2 * c], part[2 * c + 1]));
            }
        }
    }
}

/* M rows and NS panels, `apart` bytes from one to the next, and their outputs, ldp apart, of each so many. */
DSV3I_INLINE void dsv3i_bf16_gemv_panels(const dsv3i_gemv_kind kind, const dsv3_type type, const int M, const int NS,
                                         float *y, size_t ldy, size_t ldp, size_t outputs, const unsigned char *x,
                                         size_t ldx, const unsigned char *w, size_t apart, size_t k,
                                         const __m512i table[4]) {
    const int bytes = type == DSV3_Q8_0 || type == DSV3_Q4_0, NC = 4 * NS, scales = type == DSV3_BF16 ? 0 : NC;
    const size_t columns = dsv3i_blocks(outputs, 16);
    const __m128i shift = _mm_cvtsi32_si128(type == DSV3_Q8_0 ? 4 : 0);
    const unsigned char *ws[4], *xs[4];
    __m512 acc[16], part[16], *sums = type == DSV3_BF16 ? acc : part;
    DSV3I_UNROLL for (int s = 0; s < NS; s++) ws[s] = w + (size_t)s * apart;
    DSV3I_UNROLL for (int m = 0; m < M; m++) xs[m] = x + (size_t)m * ldx;
    DSV3I_UNROLL for (int i = 0; i < M * NC; i++) acc[i] = _mm512_setzero_ps();
    for (size_t i = 0, terms; i < k; i += terms) {
        size_t codes;
        terms = dsv3i_min(dsv3i_scale_block_terms(type), k - i);
        codes = dsv3i_codes_bytes(type, columns, terms);
        DSV3I_UNROLL for (int j = 0; j < M * NC; j++) part[j] = _mm512_setzero_ps();
        if (kind == DSV3I_GEMV_STEPS) {
            dsv3i_bf16_gemv_steps(type, NC, sums, ws, columns, xs, terms, table);
        } else if (kind == DSV3I_GEMV_CODES && bytes) {
            dsv3i_bf16_block(type, M, NC, sums, ws, columns, 64 * columns, xs, shift, NULL);
        } else {
            dsv3i_bf16_gemv_terms(kind, type, M, 0, NC, sums, ws, columns, xs, 0, terms, table);
        }
        DSV3I_UNROLL for (int c = 0; c < scales; c++) {
            const unsigned char *at = ws[c / 4] + codes + (bytes ? 32 * dsv3i_min((size_t)c % 4, columns - 1) : 0);
            const __m512 scale = bytes ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at))
                                       : _mm512_set1_ps(*(const float *)(const void *)at);
            DSV3I_UNROLL for (int j = c; j < M * NC; j += NC) acc[j] = _mm512_fmadd_ps(part[j], scale, acc[j]);
        }
        DSV3I_UNROLL for (int m = 0; m < M; m++) xs[m] += dsv3i_input_bytes(kind != DSV3I_GEMV_FLOATS, type, terms);
        DSV3I_UNROLL for (int s = 0; s < NS; s++) ws[s] += dsv3i_scale_block_bytes(type, columns, terms);
    }
    DSV3I_UNROLL for (int j = 0; j < M * NC; j++) {
        const size_t m = (size_t)(j / NC), s = (size_t)(j % NC / 4), c = (size_t)(j % 4);
        if (c >= columns) continue;
        dsv3i_avx512_put(y + m * ldy + s * ldp + 16 * c, dsv3i_avx512_mask(outputs - 16 * c), acc[j]);
    }
}

/* n <= 4 rows of x and `rows` of weights: one row with 4 panels at a time, or with 2 of Q4_0, whose codes become two values
 * and need more registers; two rows with 2; more leave registers for one. What is left, or not whole, goes panel by panel. */
DSV3I_INLINE void dsv3i_bf16_gemv(const dsv3i_gemv_kind kind, const dsv3_type type, float *y, size_t ldy,
                                  const void *x, size_t ldx, size_t n, const void *w, size_t rows, size_t k) {
    const int most = type == DSV3_Q4_0 ? 2 : 4;
    const size_t bytes = dsv3i_panel_bytes(type, 4, k), streams = n == 1 ? (size_t)most : n == 2 ? 2 : 1;
    const size_t split = streams > 1 ? rows / 64 / streams : 0, apart = split * bytes, ldp = 64 * split;
    const unsigned char *xs = (const unsigned char *)x, *ws = (const unsigned char *)w;
    __m512i table[4] = {_mm512_setzero_si512()};
    if (type == DSV3_F8_E4M3) dsv3i_bf16_tables(table);
    for (size_t i = 0; i < split; i++, y += 64, ws += bytes) {
        if (n == 1) dsv3i_bf16_gemv_panels(kind, type, 1, most, y, ldy, ldp, 64, xs, ldx, ws, apart, k, table);
        if (n == 2) dsv3i_bf16_gemv_panels(kind, type, 2, 2, y, ldy, ldp, 64, xs, ldx, ws, apart, k, table);
    }
    y += (streams - 1) * ldp;
    ws += (streams - 1) * apart;
    for (size_t p = 0; n > 2 && p < rows / 64; p++, y += 64, ws += bytes) {
        if (n == 3) dsv3i_bf16_gemv_panels(kind, type, 3, 1, y, ldy, 0, 64, xs, ldx, ws, 0, k, table);
        if (n == 4) dsv3i_bf16_gemv_panels(kind, type, 4, 1, y, ldy, 0, 64, xs, ldx, ws, 0, k, table);
    }
    for (size_t r = n > 2 ? rows / 64 * 64 : streams * ldp, some; r < rows; r += some, y += 64, ws += bytes) {
        some = dsv3i_min(rows - r, 64);
        for (size_t t = 0; t < n; t += 2, xs += 2 * ldx) {
            float *to = y + t * ldy;
            if (n - t > 1) dsv3i_bf16_gemv_panels(kind, type, 2, 1, to, ldy, 0, some, xs, ldx, ws, 0, k, table);
            if (n - t == 1) dsv3i_bf16_gemv_panels(kind, type, 1, 1, to, ldy, 0, some, xs, ldx, ws, 0, k, table);
        }
        xs = (const unsigned char *)x;
    }
}

/* ---- AVX-512 BF16: gemm_packed. Outputs stay in registers while terms pass by that near caches hold. */

/* Terms of a panel that go by all rows before the next ones do, with FP8 as BF16. */
#define DSV3I_K_BF16 1024u
#define DSV3I_K_F8 256u
#define DSV3I_K_BYTES 512u

/* The scale of 128 terms of FP8, for each output. */
static void dsv3i_f8_scale(float scale[64], const unsigned char *w) {
    float one;
    DSV3_MEMCPY(&one, w, sizeof one);
    for (size_t i = 0; i < 64; i++) scale[i] = one;
}

/* Some terms of a panel after the others, as gemm takes them: codes, or of FP8 values in BF16, and the scales behind each
 * scale block as floats. */
DSV3I_INLINE void dsv3i_bf16_gemm_packed(const dsv3_type type, float *y, size_t ldy, const void *x, size_t ldx,
                                         size_t n, const void *w, size_t rows, size_t k) {
    const size_t most = type == DSV3_BF16 ? DSV3I_K_BF16 : type == DSV3_F8_E4M3 ? DSV3I_K_F8 : DSV3I_K_BYTES;
    const dsv3_type of = type == DSV3_F8_E4M3 ? DSV3_BF16 : type;
    const unsigned char *from = (const unsigned char *)w;
    float scale[DSV3I_K_BYTES / DSV3_QBLOCK * 64];
    unsigned char values[64 * DSV3I_K_F8 * 2];
    dsv3i_panel panel = dsv3i_panel_of(values, 4, k);
    if (type != DSV3_BF16) panel.scale = scale;
    panel.zero = type == DSV3_Q8_0 ? 128 : 8;
    panel.gap = 128; /* the scales of Q8_0 and Q4_0 */
    for (size_t p = 0; p < rows / 64; p++) {
        for (size_t i = 0, terms; i < k; i += terms) {
            const unsigned char *xi = (const unsigned char *)x + dsv3i_input_bytes(1, type, i), *first = from;
            terms = dsv3i_min(most, k - i);
            panel.block = type == DSV3_BF16 ? terms : dsv3i_scale_block_terms(type);
            for (size_t j = 0, some; j < terms; j += some, from += dsv3i_scale_block_bytes(type, 4, some)) {
                some = dsv3i_min(panel.block, terms - j);
                if (type == DSV3_F8_E4M3) {
                    dsv3i_f8_scale(scale + j / DSV3I_TERMS * 64, from + dsv3i_codes_bytes(type, 4, some));
                    dsv3i_bf16_widen_f8(values + 128 * j, from, 4, some);
                } else if (type != DSV3_BF16) {
                    dsv3i_avx512_decode(DSV3_F16, scale + 2 * j, from + dsv3i_codes_bytes(type, 4, some), 64);
                }
            }
            if (type != DSV3_F8_E4M3) panel.values = first;
            panel.next = from;
            panel.next_bytes = type == DSV3_F8_E4M3 ? 0 : (size_t)(from - first);
            dsv3i_bf16_gemm(of, y + 64 * p, ldy, xi, ldx, n, &panel, 64, terms, i > 0);
        }
    }
}

/* Whole matrices of each type of packed weights: name_bf16 and so on. */
#define DSV3I_WHOLE(name, type, FUNCTION)                                                                            \
    DSV3I_KERNEL void name(float *y, size_t ldy, const void *x, size_t ldx, size_t n, const void *w, size_t rows,    \
                           size_t k) {                                                                               \
        FUNCTION(type, y, ldy, x, ldx, n, w, rows, k);                                                               \
    }
#define DSV3I_WHOLE_TYPES(name, FUNCTION)                                                                            \
    DSV3I_WHOLE(name##_bf16, DSV3_BF16, FUNCTION)                                                                    \
    DSV3I_WHOLE(name##_f8_e4m3, DSV3_F8_E4M3, FUNCTION)                                                              \
    DSV3I_WHOLE(name##_q8_0, DSV3_Q8_0, FUNCTION)                                                                    \
    DSV3I_WHOLE(name##_q4_0, DSV3_Q4_0, FUNCTION)
#define DSV3I_GEMV_EXACT(...) dsv3i_bf16_gemv(DSV3I_GEMV_FLOATS, __VA_ARGS__)
#define DSV3I_GEMV_FAST(...) dsv3i_bf16_gemv(DSV3I_GEMV_CODES, __VA_ARGS__)
DSV3I_WHOLE_TYPES(dsv3i_bf16_gemv_exact, DSV3I_GEMV_EXACT)
DSV3I_WHOLE_TYPES(dsv3i_bf16_gemv_fast, DSV3I_GEMV_FAST)
DSV3I_WHOLE_TYPES(dsv3i_bf16_gemm_packed, dsv3i_bf16_gemm_packed)

DSV3I_BACKEND(dsv3i_bf16, dsv3i_avx512, NULL, dsv3i_bf16_widen_f8, dsv3i_bf16_round_bf16, dsv3i_bf16_round_bytes,
              dsv3i_bf16_gemm_bf16, dsv3i_bf16_gemm_bytes, {dsv3i_avx512_attend_begin, dsv3i_bf16_attend_begin},
              {dsv3i_avx512_attend, dsv3i_bf16_attend},
              {DSV3I_WHOLE_ROW(dsv3i_bf16_gemv_exact), DSV3I_WHOLE_ROW(dsv3i_bf16_gemv_fast)},
              DSV3I_WHOLE_ROW(dsv3i_bf16_gemm_packed), DSV3I_GEMV_T_ROW(dsv3i_bf16_gemv_t_f8_e4m3))

#ifdef DSV3I_TILES
/* ---- AMX: tiles of 16 rows of 64 bytes are multiplied. A tile of x (16 rows, 32 terms of BF16) times a tile of a panel (32
 * terms of 16 outputs, which lie as a panel has them) is added to a tile of sums. For every output, the sum of a step's even
 * terms and that of its odd terms are added up, and then to what is there; subnormal numbers count as 0. */

#undef DSV3I_ISA
#define DSV3I_ISA                                                                                                    \
    "amx-tile,amx-bf16,amx-int8,avx512vbmi,avx512vnni,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define DSV3I_STEP 32u /* terms of BF16 in a row of a tile */

/* Linux saves tiles only for processes that have asked for them. 1: this one may use them, now and later. */
static int dsv3i_amx_permit(void) {
    long number = 158, code = 0x1023, state = 18, result; /* arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(code), "S"(state) : "rcx", "r11", "memory");
    return result == 0;
}

/* The control register: 0x8040 are its bits for subnormal numbers. Accesses of memory stay on their side of this. */
DSV3I_INLINE void dsv3i_amx_control(unsigned value) { __asm__ volatile("ldmxcsr %0" : : "m"(value) : "memory"); }

/* Intrinsics of gcc do not say that tiles are loaded from memory, and what was written there could be left out. */
#define DSV3I_AMX_LOAD(tile, at, stride)                                                                             \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(at), "r"((size_t)(stride)) : "memory")

/* Shapes of the tiles: 0 to 3 are sums, of m0 rows (0, 1) and of m1 rows (2, 3); 4 and 5 rows of x; 6 and 7 weights, for
 * each of 16 outputs `words` of four bytes. */
DSV3I_INLINE void dsv3i_amx_shape(size_t m0, size_t m1, size_t words) {
    const uint64_t rows = (uint64_t)m0 * 0x101u + (uint64_t)m1 * 0x1010000u, x = (uint64_t)m0 | (uint64_t)m1 << 8;
    const __m512i wide = _mm512_maskz_set1_epi16(0xFF00, 64),
                  inner = _mm512_set1_epi16((short)(4 * words)); /* row bytes */
    const __m512i shape = _mm512_mask_blend_epi16(0x3000, wide, inner);
    unsigned char at[64];
    _mm512_storeu_si512(at, _mm512_mask_set1_epi64(_mm512_mask_set1_epi64(shape, 1, 1), 1u << 6,
                                                   (int64_t)(rows | (x | (uint64_t)words * 0x1010000u) << 32)));
    __asm__ volatile("ldtilecfg %0" : : "m"(at));
}

DSV3I_INLINE float *dsv3i_amx_aligned(float *room) { return room + (64 - (uintptr_t)room % 64) % 64 / sizeof *room; }

/* Two times 16 rows of x, of which m[0] and m[1] are there, and two columns of a panel. */
typedef struct dsv3i_amx_place {
    const unsigned char *x[2], *w;
    size_t ldx, step; /* bytes from row to row of x, and from a pair of terms of w to the next */
    float *y;
    size_t ldy, m[2], columns; /* outputs that are wanted, 1 to 32 */
    const unsigned char *next; /* what is fetched early, ... */
    size_t lines;              /* ... so many lines with each pair of tiles */
    const float *scale;
} dsv3i_amx_place;

/* Some lines at a time: more would keep tiles waiting for theirs. */
DSV3I_INLINE void dsv3i_amx_fetch(const unsigned char *next, size_t lines) {
    for (size_t i = 0; i < lines; i++) _mm_prefetch((const char *)next + 64 * i, _MM_HINT_T1);
}

/* R times 16 rows, from x[0] and x[1] on, and C columns: tile 2 r + c of sums. `lines` from next on are fetched at each. */
DSV3I_INLINE void dsv3i_amx_step(const int R, const int C, const unsigned char *const x[2], size_t ldx,
                                 const unsigned char *const w[2], size_t step, const unsigned char *next,
                                 size_t lines) {
    DSV3I_AMX_LOAD(4, x[0], ldx);
    DSV3I_AMX_LOAD(6, w[0], step);
    _tile_dpbf16ps(0, 4, 6);
    dsv3i_amx_fetch(next, lines);
    if (C > 1) {
        DSV3I_AMX_LOAD(7, w[1], step);
        _tile_dpbf16ps(1, 4, 7);
        dsv3i_amx_fetch(next + 64 * lines, lines);
    }
    if (R > 1) {
        DSV3I_AMX_LOAD(5, x[1], ldx);
        _tile_dpbf16ps(2, 5, 6);
        dsv3i_amx_fetch(next + 64 * lines * (size_t)C, lines);
    }
    if (R > 1 && C > 1) {
        _tile_dpbf16ps(3, 5, 7);
        dsv3i_amx_fetch(next + 192 * lines, lines);
    }
}

/* The last k < 32 terms, filled up with zeros. */
DSV3I_INLINE void dsv3i_amx_rest(const int R, const int C, const dsv3i_amx_place *a, size_t i, size_t k) {
    const size_t pairs = (k + 1) / 2;
    unsigned char x[2][16 * 64], w[2][16 * 64];
    const unsigned char *const xs[2] = {x[0], x[1]}, *const ws[2] = {w[0], w[1]};
    DSV3_MEMSET(x, 0, sizeof x);
    DSV3_MEMSET(w, 0, sizeof w);
    for (int r = 0; r < R; r++) {
        for (size_t t = 0; t < a->m[r]; t++) DSV3_MEMCPY(x[r] + 64 * t, a->x[r] + t * a->ldx + 2 * i, 4 * pairs);
    }
    for (size_t j = 0; j < pairs; j++) {
        for (int c = 0; c < C; c++) DSV3_MEMCPY(w[c] + 64 * j, a->w + (i / 2 + j) * a->step + 64 * c, 64);
    }
    dsv3i_amx_step(R, C, xs, 64, ws, 64, w[0], 0);
}

/* What is done to each tile of sums: its number, and its place among R times 16 rows and C columns. */
#define DSV3I_AMX_EACH(DO) DO(0, 0, 0) DO(1, 0, 1) DO(2, 1, 0) DO(3, 1, 1)

/* Sums begin with y, or with 0 where they are to be multiplied first. The buffer is for what does not fill a tile. */
#define DSV3I_AMX_BEGIN(tile, r, c)                                                                                  \
    if (R > r && C > c && !from) {                                                                                   \
        _tile_zero(tile);                                                                                            \
    } else if (R > r && C > c && a->columns >= 16 * c + 16) {                                                        \
        DSV3I_AMX_LOAD(tile, a->y + r * 16 * a->ldy + 16 * c, a->ldy * sizeof *a->y);                                \
    } else if (R > r && C > c) {                                                                                     \
        for (size_t t = 0; t < a->m[r]; t++) {                                                                       \
            const float *at = a->y + (r * 16 + t) * a->ldy + 16 * c;                                                 \
            _mm512_storeu_ps(sums + 16 * t, _mm512_maskz_loadu_ps(dsv3i_avx512_mask(a->columns - 16 * c), at));      \
        }                                                                                                            \
        DSV3I_AMX_LOAD(tile, sums, 64);                                                                              \
    }

#define DSV3I_AMX_END(tile, r, c)                                                                                    \
    if (R > r && C > c && a->scale == NULL && a->columns >= 16 * c + 16) {                                           \
        _tile_stored(tile, a->y + r * 16 * a->ldy + 16 * c, a->ldy * sizeof *a->y);                                  \
    } else if (R > r && C > c) {                                                                                     \
        _tile_stored(tile, sums, 64);                                                                                \
        dsv3i_amx_put(a, sums, r, c, add);                                                                           \
    }

/* y = sums, or sums times scales, added to what is there if `add`. */
DSV3I_INLINE void dsv3i_amx_put(const dsv3i_amx_place *a, const float *sums, size_t r, size_t c, int add) {
    const __mmask16 mask = dsv3i_avx512_mask(a->columns - 16 * c);
    const __m512 scale = a->scale != NULL ? _mm512_loadu_ps(a->scale + 16 * c) : _mm512_setzero_ps();
    for (size_t t = 0; t < a->m[r]; t++) {
        float *y = a->y + (16 * r + t) * a->ldy + 16 * c;
        __m512 sum = _mm512_loadu_ps(sums + 16 * t);
        if (a->scale != NULL) {
            sum = _mm512_fmadd_ps(sum, scale, add ? _mm512_maskz_loadu_ps(mask, y) : _mm512_setzero_ps());
        }
        dsv3i_avx512_put(y, mask, sum);
    }
}

/* Terms i .. end-1, which share scales. */
DSV3I_INLINE void dsv3i_amx_terms(const int R, const int C, dsv3i_amx_place *a, size_t i, size_t end, int add) {
    float room[16 * 17], *sums = dsv3i_amx_aligned(room);
    const int from = add && a->scale == NULL;
    const unsigned char *next = a->next;
    const size_t lines = a->lines;
    DSV3I_AMX_EACH(DSV3I_AMX_BEGIN)
    for (; i + DSV3I_STEP <= end; i += DSV3I_STEP) {
        const unsigned char *const x[2] = {a->x[0] + 2 * i, a->x[1] + 2 * i};
        const unsigned char *const w[2] = {a->w + i / 2 * a->step, a->w + i / 2 * a->step + 64};
        dsv3i_amx_step(R, C, x, a->ldx, w, a->step, next, lines);
        next += 64 * lines * (size_t)(R * C);
    }
    a->next = next;
    if (i < end) dsv3i_amx_rest(R, C, a, i, end - i);
    DSV3I_AMX_EACH(DSV3I_AMX_END)
}

/* Columns c, and c + 1 with C = 2. */
DSV3I_INLINE void dsv3i_amx_block(const int R, const int C, dsv3i_amx_place *a, const dsv3i_panel *w, size_t c,
                                  size_t k, int add) {
    a->w = (const unsigned char *)w->values + 64 * c;
    a->scale = w->scale != NULL ? w->scale + 16 * c : NULL;
    for (size_t i = 0, end; i < k; i = end) {
        end = dsv3i_min(i + w->block, k);
        dsv3i_amx_terms(R, C, a, i, end, add || i > 0);
        if (a->scale != NULL) a->scale += 16 * w->columns;
    }
}

DSV3I_KERNEL void dsv3i_amx_gemm_bf16(float *y, size_t ldy, const void *x, size_t ldx, size_t n, const dsv3i_panel *w,
                                      size_t rows, size_t k, int add) {
    const unsigned before = _mm_getcsr();
    dsv3i_amx_place a;
    a.ldx = ldx;
    a.step = 64 * w->columns;
    a.ldy = ldy;
    a.m[0] = a.m[1] = 0;
    dsv3i_amx_control(before | 0x8040); /* what is done to sums of tiles is done as in tiles */
    for (size_t t = 0; t < n; t += 32) {
        const size_t m0 = dsv3i_min(16, n - t), m1 = dsv3i_min(16, n - t - m0);
        if (m0 != a.m[0] || m1 != a.m[1]) dsv3i_amx_shape(m0, m1 > 0 ? m1 : 1, 16);
        a.m[0] = m0;
        a.m[1] = m1;
        a.next = (const unsigned char *)w->values + w->ahead;
        a.lines = w->ahead > 0 ? dsv3i_blocks(w->ahead, 64 * 16 * dsv3i_blocks(n, 16)) : 0;
        a.x[0] = (const unsigned char *)x + t * ldx;
        a.x[1] = a.x[0] + (m1 > 0 ? 16 * ldx : 0);
        for (size_t c = 0; c < w->columns; c += 2) {
            a.y = y + t * ldy + 16 * c;
            a.columns = dsv3i_min(32, rows - 16 * c);
            if (m1 > 0 && a.columns > 16) dsv3i_amx_block(2, 2, &a, w, c, k, add);
            if (m1 > 0 && a.columns <= 16) dsv3i_amx_block(2, 1, &a, w, c, k, add);
            if (m1 == 0 && a.columns > 16) dsv3i_amx_block(1, 2, &a, w, c, k, add);
            if (m1 == 0 && a.columns <= 16) dsv3i_amx_block(1, 1, &a, w, c, k, add);
        }
    }
    _tile_release();
    dsv3i_amx_control(before);
}

/* ---- AMX: gemm_packed, panel by panel, and for each 96 rows of x k_block by k_block, while sums wait in a near cache. */

#define DSV3I_AMX_ROWS 96u /* of x */

/* All tiles of rows are of one height, so that their shapes stay: the last one may begin with rows of the one before. */
typedef struct dsv3i_amx_room { /* on cache lines: else each row of a tile would lie on two */
    __m512i table[4];           /* of FP8 */
    float y[DSV3I_AMX_ROWS * 64], scale[DSV3I_TERMS / DSV3_QBLOCK * 64];
    float sums[2 * 1024];
    unsigned char values[2][64 * DSV3I_TERMS * 2]; /* of 128 terms and, of FP8, of the next ones */
    size_t tiles, height, rows;
} dsv3i_amx_room;

static size_t dsv3i_amx_tile_row(const dsv3i_amx_room *room, size_t i) {
    return dsv3i_min(i * room->height, room->rows - room->height);
}

/* Values of blocks of bytes as tiles take them, with their signs (256 does not count), and their scales. */
DSV3I_INLINE void dsv3i_amx_signed(const dsv3_type type, dsv3i_amx_room *room, const unsigned char *w, size_t k) {
    const __m512i zero = _mm512_set1_epi8(type == DSV3_Q8_0 ? (char)-128 : 8);
    unsigned char *to = room->values[0];
    float *scale = room->scale;
    for (size_t i = 0; i < k; i += DSV3_QBLOCK, to += 2048) {
        for (size_t j = 0; j < dsv3i_codes_bytes(type, 4, DSV3_QBLOCK); j += 64, w += 64) {
            __m512i b[2];
            dsv3i_bf16_values(type, b, w, NULL);
            _mm512_storeu_si512(to + j, _mm512_sub_epi8(b[0], zero));
            if (type == DSV3_Q4_0) _mm512_storeu_si512(to + 1024 + j, _mm512_sub_epi8(b[1], zero));
        }
        dsv3i_avx512_decode(DSV3_F16, scale, w, 64);
        scale += 64;
        w += 128;
    }
}

/* Rows of bytes: scale blocks of 32, each with its scale behind it. Tiles hold the sums of up to four blocks, which
 * are exact, for one column of outputs. While those of the next column are on their way, they become floats. */
#define DSV3I_AMX_BLOCK(tile, rows, columns)                                                                         \
    _tile_zero(tile);                                                                                                \
    if (blocks > (tile)) {                                                                                           \
        DSV3I_AMX_LOAD(rows, x + (tile) * (DSV3_QBLOCK + 8), a->ldx);                                                \
        DSV3I_AMX_LOAD(columns, w + (tile)*8 * a->step, a->step);                                                    \
        _tile_dpbssd(tile, rows, columns);                                                                           \
        dsv3i_amx_fetch(a->next + 64 * (tile)*a->lines, a->lines);                                                   \
    }

DSV3I_INLINE void dsv3i_amx_column_sums(dsv3i_amx_place *a, float *sums, const unsigned char *x,
                                        const unsigned char *w, size_t blocks) {
    DSV3I_AMX_BLOCK(0, 4, 6)
    DSV3I_AMX_BLOCK(1, 5, 7)
    DSV3I_AMX_BLOCK(2, 4, 6)
    DSV3I_AMX_BLOCK(3, 5, 7)
    a->next += 256 * a->lines;
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

/* 16 rows and four columns, up to four blocks. Rows of x that are not there are the last one once more. */
DSV3I_INLINE void dsv3i_amx_bytes(dsv3i_amx_place *a, const unsigned char *x, size_t m, size_t k, int add) {
    float room[2 * 4 * 256 + 16], *sums = dsv3i_amx_aligned(room), unit[4 * 16];
    const size_t blocks = k / DSV3_QBLOCK;
    for (size_t t = 0; t < 16; t++) {
        const unsigned char *row = x + dsv3i_min(t, m - 1) * a->ldx + DSV3_QBLOCK;
        for (size_t b = 0; b < blocks; b++) DSV3_MEMCPY(unit + 16 * b + t, row + b * (DSV3_QBLOCK + 8), sizeof *unit);
    }
    dsv3i_amx_column_sums(a, sums, x, a->w, blocks);
    for (size_t c = 0; c < 4; c++) {
        float *y = a->y + 16 * c;
        __m512 acc[16];
        if (c < 3) dsv3i_amx_column_sums(a, sums + (c + 1) % 2 * 1024, x, a->w + 64 * (c + 1), blocks);
        DSV3I_UNROLL for (int t = 0; t < 16; t++) acc[t] = add ? _mm512_loadu_ps(y + 64 * t) : _mm512_setzero_ps();
        for (size_t b = 0; b < blocks; b++) {
            const __m512 scale = _mm512_loadu_ps(a->scale + 64 * b + 16 * c);
            const float *from = sums + c % 2 * 1024 + 256 * b;
            DSV3I_UNROLL for (int t = 0; t < 16; t++) {
                const __m512 f = _mm512_set1_ps(unit[16 * b + (size_t)t]);
                const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from + 16 * t)), f);
                acc[t] = _mm512_fmadd_ps(product, scale, acc[t]);
            }
        }
        DSV3I_UNROLL for (int t = 0; t < 16; t++) _mm512_storeu_ps(y + 64 * t, acc[t]);
    }
}

/* Sums [2, 16, 32] of FP8, times scales, join those of `rows` tiles of rows. */
DSV3I_INLINE void dsv3i_amx_join(float *y, const float *sums, const float *scale, size_t rows, size_t height,
                                 int add) {
    const __m512 unit[2] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + 16)};
    for (size_t r = 0; r < rows; r++, y += 16 * 64, sums += 16 * 32) {
        for (size_t i = 0; i < height; i++) {
            DSV3I_UNROLL for (size_t c = 0; c < 2; c++) {
                float *to = y + 64 * i + 16 * c;
                const __m512 old = add ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(sums + 32 * i + 16 * c), unit[c], old));
            }
        }
    }
}

/* Rows x times a k_block of BF16, or of FP8, whose values are made already. There, while sums of a pair of tiles are on their
 * way, those of the pair before join y, and some of the next k_block's values are made: `coming` terms. */
DSV3I_INLINE void dsv3i_amx_k_block(const dsv3_type type, dsv3i_amx_room *room, dsv3i_amx_place *a,
                                    const unsigned char *x, const unsigned char *w, size_t k, size_t turn,
                                    size_t coming) {
    const unsigned char *values = type == DSV3_BF16 ? w : room->values[turn % 2];
    const unsigned char *next = w + dsv3i_scale_block_bytes(type, 4, k);
    float *sums = room->sums, *before = NULL;
    const size_t pairs = dsv3i_blocks(room->tiles, 2) * 2; /* of tiles and columns */
    const size_t fours = type == DSV3_BF16 ? 0 : dsv3i_blocks(coming, 4);
    a->scale = NULL;
    for (size_t i = 0; i < pairs; i++) {
        const size_t first = i / 2 * 2, rows = dsv3i_min(2, room->tiles - first);
        const int add = turn > 0 && type == DSV3_BF16;
        float *to = room->y + 1024 * first + i % 2 * 32;
        a->y = type == DSV3_BF16 ? to : sums + i % 2 * 1024;
        a->ldy = type == DSV3_BF16 ? 64 : 32;
        a->w = values + i % 2 * 128;
        a->x[0] = x + dsv3i_amx_tile_row(room, first) * a->ldx;
        a->x[1] = x + dsv3i_amx_tile_row(room, first + 1) * a->ldx;
        if (rows == 2) dsv3i_amx_terms(2, 2, a, 0, k, add);
        if (rows == 1) dsv3i_amx_terms(1, 2, a, 0, k, add);
        if (type == DSV3_BF16) continue;
        {
            const size_t g = fours * i / pairs, end = fours * (i + 1) / pairs;
            dsv3i_bf16_widen(room->values[(turn + 1) % 2] + 512 * g, next + 256 * g, 4, end - g, 0, room->table);
        }
        if (before != NULL) {
            dsv3i_amx_join(before, sums + (i + 1) % 2 * 1024, room->scale, i % 2 ? rows : 2, room->height, turn > 0);
        }
        before = to;
        if (i + 1 == pairs) dsv3i_amx_join(to, sums + i % 2 * 1024, room->scale, rows, room->height, turn > 0);
    }
}

/* Up to DSV3I_AMX_ROWS rows and a panel, of which what comes next is fetched early. */
DSV3I_INLINE void dsv3i_amx_panel(const dsv3_type type, dsv3i_amx_room *room, dsv3i_amx_place *a, float *y,
                                  size_t ldy, const unsigned char *x, size_t rows, const unsigned char *w, size_t k,
                                  int fetch) {
    const size_t bytes = dsv3i_panel_bytes(type, 4, DSV3I_TERMS);
    const int blocks = dsv3_type_block(type) > 1;
    room->tiles = dsv3i_blocks(rows, 16);
    room->height = dsv3i_blocks(rows, room->tiles);
    room->rows = rows;
    dsv3i_amx_shape(room->height, room->height, blocks ? 8 : 16);
    a->m[0] = a->m[1] = room->height;
    a->lines = fetch ? dsv3i_blocks(bytes, 64 * 16 * room->tiles) : 0;
    if (type == DSV3_F8_E4M3) {
        dsv3i_bf16_widen(room->values[0], w, 4, dsv3i_blocks(dsv3i_min(DSV3I_TERMS, k), 4), 0, room->table);
    }
    for (size_t i = 0, turn = 0, terms; i < k; i += terms, turn++) {
        terms = dsv3i_min(DSV3I_TERMS, k - i);
        a->next = w + 2 * bytes;
        if (type == DSV3_F8_E4M3) dsv3i_f8_scale(room->scale, w + dsv3i_codes_bytes(type, 4, terms));
        if (blocks) dsv3i_amx_signed(type, room, w, terms);
        if (!blocks) dsv3i_amx_k_block(type, room, a, x, w, terms, turn, dsv3i_min(DSV3I_TERMS, k - i - terms));
        for (size_t t = 0; blocks && t < room->tiles; t++) {
            a->y = room->y + 1024 * t;
            a->w = room->values[0];
            a->scale = room->scale;
            dsv3i_amx_bytes(a, x + dsv3i_amx_tile_row(room, t) * a->ldx, room->height, terms, turn > 0);
        }
        w += dsv3i_panel_bytes(type, 4, terms);
        x += dsv3i_input_bytes(1, type, terms);
    }
    for (size_t t = 0; t < room->tiles; t++) {
        float *to = y + dsv3i_amx_tile_row(room, t) * ldy;
        for (size_t j = 0; j < 4 * room->height; j++) {
            _mm512_storeu_ps(to + j / 4 * ldy + 16 * (j % 4), _mm512_loadu_ps(room->y + 1024 * t + 16 * j));
        }
    }
}

DSV3I_INLINE void dsv3i_amx_gemm_packed(const dsv3_type type, float *y, size_t ldy, const void *x, size_t ldx,
                                        size_t n, const void *w, size_t rows, size_t k) {
    const size_t bytes = dsv3i_panel_bytes(type, 4, k);
    const unsigned before = _mm_getcsr();
    dsv3i_amx_room room;
    dsv3i_amx_place a;
    a.ldx = ldx;
    a.step = 256;
    a.ldy = 64;
    a.columns = 32;
    if (type == DSV3_F8_E4M3) {
        dsv3i_bf16_tables(room.table);
        dsv3i_amx_control(before | 0x8040);
    }
    for (size_t p = 0; p < rows / 64; p++) {
        for (size_t t = 0, some; t < n; t += some) {
            some = dsv3i_min(DSV3I_AMX_ROWS, n - t);
            dsv3i_amx_panel(type, &room, &a, y + t * ldy + 64 * p, ldy, (const unsigned char *)x + t * ldx, some,
                            (const unsigned char *)w + p * bytes, k, t == 0);
        }
    }
    _tile_release();
    if (type == DSV3_F8_E4M3) dsv3i_amx_control(before);
}

/* ---- AMX: gemv: the sums of tiles in registers, to the bit, with subnormal numbers as 0. For two rows and more, whole
 * panels go to tiles. */
DSV3I_INLINE void dsv3i_amx_gemv(const dsv3_type type, float *y, size_t ldy, const void *x, size_t ldx, size_t n,
                                 const void *w, size_t rows, size_t k) {
    const size_t done = n > 1 ? rows / 64 * 64 : 0;
    const unsigned char *rest = (const unsigned char *)w + done / 64 * dsv3i_panel_bytes(type, 4, k);
    const unsigned before = _mm_getcsr();
    if (done > 0) dsv3i_amx_gemm_packed(type, y, ldy, x, ldx, n, w, done, k);
    if (done == rows) return;
    dsv3i_amx_control(before | 0x8040);
    for (size_t t = 0; t < n; t++) {
        dsv3i_bf16_gemv(DSV3I_GEMV_STEPS, type, y + t * ldy + done, ldy, (const unsigned char *)x + t * ldx, ldx, 1,
                        rest, rows - done, k);
    }
    dsv3i_amx_control(before);
}

DSV3I_WHOLE_TYPES(dsv3i_amx_gemm_packed, dsv3i_amx_gemm_packed)
DSV3I_WHOLE(dsv3i_amx_gemv_bf16, DSV3_BF16, dsv3i_amx_gemv)
DSV3I_WHOLE(dsv3i_amx_gemv_f8_e4m3, DSV3_F8_E4M3, dsv3i_amx_gemv)

DSV3I_BACKEND(dsv3i_amx, dsv3i_avx512, NULL, dsv3i_bf16_widen_f8, dsv3i_bf16_round_bf16, dsv3i_bf16_round_bytes,
              dsv3i_amx_gemm_bf16, dsv3i_bf16_gemm_bytes, {dsv3i_avx512_attend_begin, dsv3i_bf16_attend_begin},
              {dsv3i_avx512_attend, dsv3i_bf16_attend},
              {DSV3I_WHOLE_ROW(dsv3i_bf16_gemv_exact),
               {NULL, NULL, dsv3i_amx_gemv_bf16, dsv3i_amx_gemv_f8_e4m3, dsv3i_bf16_gemv_fast_q8_0,
                dsv3i_bf16_gemv_fast_q4_0}},
              DSV3I_WHOLE_ROW(dsv3i_amx_gemm_packed), DSV3I_GEMV_T_ROW(dsv3i_bf16_gemv_t_f8_e4m3))

#endif /* DSV3I_TILES */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif /* DSV3I_X86 */
#endif /* DSV3I_ENGINE */

/* ========================================================================================================
 * Chapter Y  >>backends
 *
 * The choice of a backend when a context is made, and packing for it. A new instruction set has an entry in dsv3_backend
 * and its count, in dsv3_backend_name, in dsv3i_best_backend and in dsv3i_ops_of. Test: tests/test_backends.sh.
 *
 * AMX: where the CPU has it, and with the backends AUTO and AMX only, Linux is asked to let this process use tiles
 * (arch_prctl, which allocates nothing): it may from then on, in all threads, and its signal frames need 8 KiB more, so that
 * stacks of sigaltstack may have to grow. If Linux refuses, AUTO means avx512_bf16, and AMX is unsupported.
 *
 * OpenMP keeps its threads. With gcc's, a child hangs that is forked behind the first loop, unless it sets parallel_for to
 * NULL and threads to 1, or to threads of its own; and a plugin that is unloaded (dlclose) takes them down with the
 * program, unless it does that from the start, stays loaded (RTLD_NODELETE), or the program itself is linked with OpenMP.
 * DSV3_NO_OPENMP avoids both.
 * ==================================================================================================== */

/* ---- Packing: nothing to do where weights are read as they lie */

DSV3_API dsv3_result dsv3_pack_size(const dsv3_context *context, const dsv3_model *model, size_t *bytes,
                                    dsv3_error *error) {
    dsv3i_layout l = {NULL, 0};
    DSV3I_TRY(dsv3i_check_context(context, error));
    DSV3I_NEED(1, model); DSV3I_NEED(1, bytes);
#ifdef DSV3I_ENGINE
    if (context->ops->own != NULL) {
        dsv3_model view = *model; /* its tables are not written to, since there is no memory to point to */
        l.used = dsv3i_pack_model(context, &view, NULL);
    }
#endif
    *bytes = 0;
    return l.used == 0 ? dsv3i_ok(error) : dsv3i_layout_size(&l, bytes, error);
}

DSV3_API dsv3_result dsv3_pack(const dsv3_context *context, dsv3_model *model, void *memory, size_t bytes,
                               dsv3_error *error) {
    size_t need;
    DSV3I_TRY(dsv3_pack_size(context, model, &need, error));
    if (need == 0) return dsv3i_ok(error);
    DSV3I_TRY(dsv3i_memory_check(memory, bytes, need, error));
#ifdef DSV3I_ENGINE
    (void)dsv3i_pack_model(context, model, memory);
#endif
    return dsv3i_ok(error);
}

/* ---- The choice */

DSV3_API int32_t dsv3_version(void) { return DSV3_VERSION; }

DSV3_API const char *dsv3_backend_name(dsv3_backend backend) {
    switch (backend) {
    case DSV3_BACKEND_AUTO: return "auto";
    case DSV3_BACKEND_REFERENCE: return "reference";
    case DSV3_BACKEND_AVX2: return "avx2";
    case DSV3_BACKEND_AVX512: return "avx512";
    case DSV3_BACKEND_AVX512_BF16: return "avx512_bf16";
    case DSV3_BACKEND_AMX: return "amx";
    default: return NULL;
    }
}

DSV3_API dsv3_result dsv3_backend_find(dsv3_backend *backend, const char *name, dsv3_error *error) {
    if (backend == NULL || name == NULL) return dsv3i_fail_null(error, backend == NULL ? "backend" : "name");
    for (int i = 0; i < DSV3_BACKENDS; i++) {
        const char *a = dsv3_backend_name((dsv3_backend)i), *b = name;
        while (*a != '\0' && *a == *b) a++, b++;
        if (*a == *b) {
            *backend = (dsv3_backend)i;
            return dsv3i_ok(error);
        }
    }
    return dsv3i_fail(error, DSV3_ERR_ARG, name, "is not the name of a backend");
}

#ifndef DSV3I_X86
static dsv3_backend dsv3i_best_backend(void) { return DSV3_BACKEND_REFERENCE; }
#endif

static const dsv3i_ops *dsv3i_ops_of(dsv3_backend backend) {
    switch (backend) {
#ifdef DSV3I_X86
    case DSV3_BACKEND_AVX2: return &dsv3i_avx2_ops;
    case DSV3_BACKEND_AVX512: return &dsv3i_avx512_ops;
    case DSV3_BACKEND_AVX512_BF16: return &dsv3i_bf16_ops;
#endif
#ifdef DSV3I_TILES
    case DSV3_BACKEND_AMX: return &dsv3i_amx_ops;
#endif
    default: return &dsv3i_plain;
    }
}

/* Does a + b - a lose b, as it does when each step is rounded to float? */
static int dsv3i_sums_in_order(void) {
#ifdef DSV3_ALLOW_FAST_MATH
    return 1;
#else
    volatile float large = 9007199254740992.0f, one = 1.0f; /* 2^53; nothing for a compiler to compute */
    float a = large, b = one, left = a + b - a;
    return left < b || left > b; /* above: rounded upwards */
#endif
}

DSV3_API dsv3_result dsv3_context_init(dsv3_context *context, dsv3_backend backend, size_t threads,
                                       dsv3_error *error) {
    dsv3_backend best = dsv3i_best_backend();
    if (context == NULL) return dsv3i_fail_null(error, "context");
    DSV3_MEMSET(context, 0, sizeof *context);
    if (!dsv3i_sums_in_order()) {
        return dsv3i_fail(error, DSV3_ERR_UNSUPPORTED, "compiler", "reorders sums: compiled with fast math, unnoticed");
    }
#ifdef DSV3I_TILES
    if (best == DSV3_BACKEND_AMX && ((backend != DSV3_BACKEND_AUTO && backend != best) || !dsv3i_amx_permit())) {
        best = DSV3_BACKEND_AVX512_BF16;
    }
#else
    if (best == DSV3_BACKEND_AMX) best = DSV3_BACKEND_AVX512_BF16;
#endif
    if (backend == DSV3_BACKEND_AUTO) backend = best;
    if ((int)backend < (int)DSV3_BACKEND_REFERENCE || (int)backend > (int)best) {
        return dsv3i_fail_range(error, DSV3_ERR_UNSUPPORTED, "backend", "is not compiled in, or this machine cannot run it",
                                DSV3_BACKEND_REFERENCE, (int32_t)best, (int32_t)backend);
    }
    context->ops = dsv3i_ops_of(backend);
    context->backend = dsv3_backend_name(backend);
    context->threads = 1;
    context->compute = DSV3_EXACT;
    context->attention = DSV3_ATTENTION_AUTO;
#if defined(_OPENMP) && !defined(DSV3_NO_OPENMP)
    DSV3I_TRY(dsv3i_check_between(error, DSV3_ERR_LIMIT, "threads", "are too many",
                                  (int64_t)dsv3i_min(threads, INT_MAX), 0, INT_MAX / 8));
    context->threads = threads != 0 ? threads : (size_t)omp_get_max_threads();
    context->parallel_for = dsv3i_parallel_openmp;
#else
    (void)threads;
#endif
    return dsv3i_ok(error);
}

#endif /* DSV3_IMPLEMENTATION */

/* ========================================================================================================
 * Chapter Z  >>changes
 *
 * What stays: with a new patch number (0.2.x) programs compile, link and compute as before; what is mended is listed here.
 * With a new minor number names and structs may change as well, before 1.0, and the list says how. Bytes that a version
 * has saved (chapter 16) are read by later ones, or refused with the version's number, never misread. Bits of results are
 * no promise between versions.
 *
 * 0.2.0
 *   Errors     every call that has a result takes a dsv3_error, the last argument, and always sets it. Blocks and ops on
 *              plain arrays look at their arguments, too, and say DSV3_OK; contexts are checked where they are used. New
 *              codes: DSV3_ERR_ABORTED, DSV3_ERR_DAMAGED.
 *   Balance    dsv3_load_count knows E; dsv3_bias_step moves all layers; balance losses take a dsv3_routing and give the
 *              loss through their first argument, as NaN and the like are refused; dsv3_embed_backward knows V.
 *   Router     norm_topk_prob has no effect with one expert a token; a score that is not finite gets no gradient.
 *   Sums       dsv3_log_sum_exp and dsv3_cross_entropy add up in double, whatever the order of logits.
 *   Formats    the scale of a Q8_0 or Q4_0 block has its low byte first on big-endian machines, too.
 *   Order      context, config or model comes first, then what is written: dsv3_model_bind(config, model, ..),
 *              dsv3_cache_init(config, cache, ..), likewise workspace, sequence, parameters, trainer and balancer;
 *              dsv3_sequence_append(model, sequence, ..).
 *   Names      dsv3_generate is dsv3_generate_step, dsv3_parameters_load is dsv3_parameters_from_model, dsv3_mtp_cache_*
 *              are dsv3_cache_mtp_*, dsv3_group is dsv3_tensor_kind (DSV3_KIND_.., DSV3_KINDS; in dsv3_tensor_info: kind),
 *              DSV3_ERR_CONTEXT is DSV3_ERR_FULL.
 *   Sizes      dsv3_linear_scratch and dsv3_cross_entropy_scratch, in floats, are dsv3_linear_size and
 *              dsv3_cross_entropy_size, in bytes.
 *   Gone       dsv3_z_loss; kernels, panels and products, which were the engine's.
 *   New        steering (dsv3_steer, dsv3_logits_*), stop tokens, limits and dsv3_sequence_state, an abort hook,
 *              log-probabilities and states of chosen rows; saving (dsv3_cache_save, dsv3_sequence_save,
 *              dsv3_trainer_save); rope_scaling.truncate. A sequence holds its whole text.
 *   Training   dsv3_text.apart; dsv3_train_accumulate and _end check settings, rate and the order of calls; a gradient whose
 *              square overflows ends the step with DSV3_ERR_NAN. ema_decay is a double, and its average loses no steps.
 *              dsv3_losses has V2's device and communication losses, too, and dsv3_train_loss counts them; with seq_aux
 *              false balance losses are of micro-batches.
 *   Structs    a workspace, sequence or trainer shows what is the caller's, and keeps the rest to itself.
 *   Options    DSV3_NO_TRAINING also leaves out the balancer, the bias step and V2's balance losses.
 *   Builds     enums have 32 bits on both sides of a call (DSV3_ENUM); dsv3_version; dsv3_balancer.E is experts, and no name
 *              in a declaration is a single capital. More kinds of fast math, and the x87, are refused; C89 by one message.
 *
 * MIT License
 *
 * Copyright (c) 2026 The dsv3.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy
 * of this software and associated documentation files (the "Software"), to deal
 * in the Software without restriction, including without limitation the rights
 * to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
 * copies of the Software, and to permit persons to whom the Software is
 * furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all
 * copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
 * LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
 * SOFTWARE.
 * ==================================================================================================== */
