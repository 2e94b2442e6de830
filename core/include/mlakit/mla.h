/* mlakit: Multi-head Latent Attention (MLA) decode, the public C API.
 *
 * C99, no CUDA and no C++ header is needed. What is promised is written here; what is not written here may change.
 *
 * What it computes, for every query row (one query token and one head) of every request:
 *
 *     s[j] = softmax_scale * dot(q[0:head_dim], kv[j][0:head_dim])     for the keys j that the row may see
 *     out  = sum_j softmax(s)[j] * kv[j][0:value_dim]                   lse = log(sum_j exp(s[j]))
 *
 * Every query head of a group reads the same cache row, and the value is that row's first value_dim entries. The rows of
 * a request lie in pages of page_size tokens, found through a block table.
 *
 * The way through: problem -> context -> plan -> (per step) schedule -> (per layer) decode.
 *
 *     mla_problem problem;   mla_problem_init(&problem);   ... set fields ...
 *     mla_context* context;  mla_context_create(&context, NULL);
 *     mla_plan* plan;        mla_plan_create(&plan, context, &problem);
 *     mla_plan_info info;    info.struct_size = sizeof info;   mla_plan_get_info(plan, &info);
 *     ... allocate info.schedule_bytes and info.scratch_bytes on the plan's device ...
 *     mla_schedule(plan, &schedule_args, stream);    once for each change of the lengths
 *     mla_decode(plan, &decode_args, stream);        as often as needed (every layer)
 *
 * Rules that hold everywhere
 *   Status      Every fallible function returns mla_status; 0 is success. mla_last_error() then holds one line for people.
 *   Growth      Every struct that may grow starts with struct_size, set by the caller to sizeof of its own struct. Fields are
 *               only ever appended, and zero means "as before": a smaller (older) struct is taken, a larger (newer) one too as
 *               long as the bytes that this library does not know are zero. Unknown flag bits are refused.
 *   Ownership   Out-parameters come first and are NULL or untouched on failure. The library never owns, frees or keeps a
 *               tensor, its shape arrays, or a workspace. Strings handed out are borrowed (see each function).
 *   Threads     Contexts and plans do not change after creation and may be shared by threads. Two mla_decode calls that run
 *               at the same time need different scratch buffers; they may share one schedule, which decode only reads.
 *   Hot path    mla_schedule and mla_decode do not allocate, do not synchronise, do not read device memory from the host, do
 *               not print, and do not read the environment. CPU plans have finished when the call returns; CUDA plans
 *               enqueue on the given stream and may be captured in a CUDA graph.
 *   Placement   The plan's device decides the backend. Nothing is copied to another device.
 *   Never       The library never exits, aborts, prints or lets a C++ exception cross this boundary.
 */
#ifndef MLAKIT_MLA_H
#define MLAKIT_MLA_H

#include <stddef.h>
#include <stdint.h>

#include "mlakit/version.h"

#if defined(MLAKIT_STATIC)
#define MLA_API
#else
#define MLA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The tables are laid out by hand. */
/* clang-format off */

/* ---------------------------------------------------------------- status ---------------------------------------------- */

/* Values are pinned and never reused. Each tells the caller what to do. */
typedef int32_t mla_status;
enum {
  MLA_OK = 0,
  MLA_INVALID_ARGUMENT = 1,    /* contradicts the problem, this header or DLPack's rules: fix the call */
  MLA_UNSUPPORTED = 2,         /* valid, but no backend takes it: change shape, dtype or device */
  MLA_WORKSPACE_TOO_SMALL = 3, /* bytes or alignment of schedule or scratch: ask mla_plan_get_info */
  MLA_OUT_OF_MEMORY = 4,       /* host memory, at creation only */
  MLA_CUDA_ERROR = 10,         /* a CUDA call failed; the message holds CUDA's own name */
  MLA_NO_DRIVER = 11,          /* no usable CUDA driver or device: use the CPU */
  MLA_INTERNAL = 90            /* a bug of mlakit's: report it with the problem string */
};

/* MLAKIT_VERSION_MAJOR * 10000 + MINOR * 100 + PATCH of the library that was loaded. */
MLA_API int32_t mla_version(void);

/* The name of a status, "MLA_OK" for 0; "unknown status" for a value this library does not know. Never NULL; static. */
MLA_API const char* mla_status_string(mla_status status);

/* The message of the last failing call on this thread, one line, "" if none failed. Success does not clear it: read it only
 * right after a failure. Valid until the next failing call on this thread. Form: "argument: what was expected, got what came". */
MLA_API const char* mla_last_error(void);

/* ---------------------------------------------------------------- tensors --------------------------------------------- */

/* Device types, with DLPack's numbers. */
enum { MLA_DEVICE_CPU = 1, MLA_DEVICE_CUDA = 2 };

/* Element types as this API names them. */
enum { MLA_DTYPE_DEFAULT = 0, MLA_DTYPE_BF16 = 1, MLA_DTYPE_FP16 = 2, MLA_DTYPE_FP32 = 3, MLA_DTYPE_E4M3 = 4, MLA_DTYPE_INT32 = 5 };

/* Laid out as DLPack's DLDevice, DLDataType and DLTensor (checked by a test): a DLTensor* may be cast to mla_tensor*. */
typedef struct mla_device {
  int32_t device_type; /* MLA_DEVICE_... */
  int32_t device_id;   /* ordinal; 0 for the CPU */
} mla_device;

typedef struct mla_data_type {
  uint8_t code; /* DLPack's: 0 int, 2 IEEE float, 4 bfloat, 10 float8_e4m3fn */
  uint8_t bits;
  uint16_t lanes; /* always 1 */
} mla_data_type;

typedef struct mla_tensor {
  void* data;
  mla_device device;
  int32_t ndim;
  mla_data_type dtype;
  int64_t* shape;
  int64_t* strides; /* in elements, >= 0 (that of a size of 0 or 1 means nothing); NULL: compact, row major */
  uint64_t byte_offset;
} mla_tensor;

/* A tensor with its own shape arrays, for callers without DLPack. */
typedef struct mla_tensor_storage {
  mla_tensor tensor;
  int64_t shape[4];
  int64_t strides[4];
} mla_tensor_storage;

/* Describes raw memory in one line and returns &storage->tensor, which points into *storage:
 *
 *     mla_tensor_storage s;
 *     args.q = mla_tensor_init(&s, pointer, MLA_DTYPE_BF16, MLA_DEVICE_CPU, 0, 4, (int64_t[]){batch, 1, 128, 576}, NULL);
 *
 * ndim is 1 to 4; strides are in elements, NULL for compact row major. Returns NULL (and sets the message) on a NULL storage or
 * shape, an unknown dtype, or another ndim. Copying a mla_tensor_storage leaves tensor.shape pointing at the first one. */
MLA_API mla_tensor* mla_tensor_init(mla_tensor_storage* storage, void* data, int32_t dtype, int32_t device_type, int32_t device_id,
                                    int32_t ndim, const int64_t* shape, const int64_t* strides);

/* ---------------------------------------------------------------- problem --------------------------------------------- */

/* mla_problem.flags */
enum {
  MLA_PROBLEM_CAUSAL = 1u << 0,        /* bottom-right: query token t of q_len sees keys [0, len - q_len + 1 + t) */
  MLA_PROBLEM_RAGGED_Q = 1u << 1,      /* q is [tokens, q_heads, head_dim] with cu_seqlens_q */
  MLA_PROBLEM_LSE_BASE2 = 1u << 2,     /* lse in base 2 instead of e */
  MLA_PROBLEM_TREE_MASK = 1u << 3,     /* a bitmask for each query token (no backend yet) */
  MLA_PROBLEM_EXTRA_SEGMENT = 1u << 4, /* a second cache segment for each request (no backend yet) */
  MLA_PROBLEM_DEBUG = 1u << 5          /* CUDA: copy lengths, tables and schedules to the host and check them as on the CPU. Waits for
                                          the stream and allocates, so such a plan cannot be captured (MLA_UNSUPPORTED). */
};

/* mla_problem.kv_format: how a cache row is stored. */
enum {
  MLA_KV_PLAIN = 0,      /* head_dim elements of kv_dtype */
  MLA_KV_FP8_TENSOR = 1, /* e4m3 with one scale for the tensor (no backend yet) */
  MLA_KV_FP8_656 = 2,    /* 512 e4m3, 4 fp32 scales, 64 bf16: 656 bytes (no backend yet) */
  MLA_KV_FP8_584 = 3     /* 448 e4m3, 64 bf16, ue8m0 scales at the end of the page (no backend yet) */
};

/* mla_problem.split_policy: where the keys of a long request are cut into parts that run in parallel. */
enum {
  MLA_SPLIT_BALANCED = 0,   /* equal work for every part: fastest; a row's bits may depend on its batch mates */
  MLA_SPLIT_FIXED_CHUNK = 1 /* cut every chunk_tokens keys of the request itself: a row's bits depend on that request only */
};

/* What one plan is for: static facts and maxima. The batch, lengths and tables of a call come with the call and may be anything
 * up to the maxima, so one plan serves continuous batching. Start from mla_problem_init. Limits: max_len and page_size up to 2^28,
 * max_q_tokens * q_heads up to 2^30, heads and head_dim up to 2^16. */
typedef struct mla_problem {
  uint32_t struct_size;
  uint32_t flags;        /* MLA_PROBLEM_... */
  int32_t device_type;   /* MLA_DEVICE_... (default CPU) */
  int32_t device_id;     /* CUDA ordinal */
  int32_t q_dtype;       /* MLA_DTYPE_BF16 (default), _FP16 or _FP32 */
  int32_t kv_dtype;      /* MLA_DTYPE_DEFAULT: as q_dtype */
  int32_t out_dtype;     /* MLA_DTYPE_DEFAULT: as q_dtype; or _FP32 */
  int32_t kv_format;     /* MLA_KV_... */
  int64_t max_batch;     /* most requests in a call, >= 1 */
  int64_t q_len;         /* query tokens of a request: exact for uniform q, the most of any one request for ragged q; >= 1 */
  int64_t max_q_tokens;  /* most query tokens in a call of ragged q; 0: max_batch * q_len */
  int64_t max_len;       /* most cached tokens of one request, >= 1 */
  int64_t max_tokens;    /* most cached tokens of all requests of a call together; 0: max_batch * max_len. Kernels are chosen for it */
  int32_t q_heads;       /* a multiple of kv_heads */
  int32_t kv_heads;      /* default 1 */
  int32_t head_dim;      /* width of q and of a cache row, default 576 */
  int32_t value_dim;     /* width of out: the first part of a cache row, default 512, <= head_dim */
  int32_t page_size;     /* tokens of a page, >= 1, default 64 */
  int32_t split_policy;  /* MLA_SPLIT_... */
  int32_t chunk_tokens;  /* MLA_SPLIT_FIXED_CHUNK: a multiple of 64; 0: 2048 */
  int32_t topk;          /* > 0: each query token attends to a list of this many indices (no backend yet) */
  int32_t cp_world;      /* context parallel: ranks that share the keys of each request, default 1 */
  int32_t cp_rank;       /* this rank. Lengths and tables are those of its own keys. */
  float softmax_scale;   /* > 0; 0: head_dim ** -0.5, as FlashMLA's default. Engines with absorbed weights pass their own. */
  int32_t cp_turn;       /* keys that a rank takes at a time, 0: 1. Key j of a request is with rank j / cp_turn % cp_world. */
} mla_problem;

/* Zeroes *problem, sets struct_size and the defaults named above. q_heads and max_len stay 0 and must be set. This function and
 * mla_problem_parse write the struct of this header: a release that appends to it will give both new symbols. */
MLA_API mla_status mla_problem_init(mla_problem* problem);

/* The one-line form, printed in messages and taken by every tool:
 *
 *     dense:bf16:b128:q1:h128:k1:d576:v512:p64:l16384:causal
 *
 * kind, q dtype, then in this order b max_batch, q q_len, h q_heads, k kv_heads, d head_dim, v value_dim, p page_size, l max_len,
 * and where they differ from the default: t max_q_tokens, m max_tokens, kv<dtype>, out<dtype>, fp8tensor|fp8656|fp8584, causal,
 * ragged, lse2, tree, extra, debug, chunk<tokens>, top<k>, cp<rank>of<world>, turn<keys>, scale<float>, cuda<ordinal>.
 * format writes at most size bytes with a final NUL; *needed (may be NULL) gets the bytes for the whole string and its NUL, and
 * buffer may be NULL when size is 0. A buffer that is too small is MLA_INVALID_ARGUMENT. parse starts from mla_problem_init,
 * takes the parts after the dtype in any order, and leaves what is not named at its default. */
MLA_API mla_status mla_problem_format(const mla_problem* problem, char* buffer, size_t size, size_t* needed);
MLA_API mla_status mla_problem_parse(mla_problem* problem, const char* text);

/* ---------------------------------------------------------------- backends and contexts ------------------------------- */

typedef struct mla_backend_info {
  uint32_t struct_size;
  int32_t device_type;  /* MLA_DEVICE_... that it serves */
  int32_t is_available; /* 1: this machine can run it */
  uint32_t reserved;
  const char* name;     /* "sm90", "cpu-avx2", "reference", ... ; static */
  const char* reason;   /* "" if available, else why not, one line; valid on this thread until its next call of this function */
} mla_backend_info;

/* The backend of rank index (0 is tried first). MLA_INVALID_ARGUMENT past the last one; set info->struct_size first. */
MLA_API mla_status mla_get_backend_info(int32_t index, mla_backend_info* info);

typedef struct mla_context mla_context;

/* Runs fn(task_context, index) for every index in [0, tasks), in any order and on any threads, and returns when all are done. */
typedef void (*mla_task_fn)(void* task_context, int64_t index);
typedef void (*mla_parallel_for_fn)(void* user, int64_t tasks, mla_task_fn fn, void* task_context);

typedef struct mla_context_options {
  uint32_t struct_size;
  uint32_t flags;                   /* 0 */
  const char* backend;              /* force one by name; NULL: MLAKIT_BACKEND if set, else the first that takes the problem */
  int32_t num_threads;              /* CPU threads; 0: MLAKIT_NUM_THREADS if set, else the CPUs this process may use */
  int32_t reserved;
  mla_parallel_for_fn parallel_for; /* NULL: mlakit's own threads */
  void* parallel_for_user;
} mla_context_options;

/* options may be NULL. Reads the environment and the machine's facts here, once. *out is NULL on failure. */
MLA_API mla_status mla_context_create(mla_context** out, const mla_context_options* options);
/* NULL is allowed. Plans made from the context stay valid. */
MLA_API void mla_context_destroy(mla_context* context);

/* ---------------------------------------------------------------- plans ----------------------------------------------- */

typedef struct mla_plan mla_plan;

/* Validates the problem and chooses the backend and its variant. Host work only. *out is NULL on failure. */
MLA_API mla_status mla_plan_create(mla_plan** out, const mla_context* context, const mla_problem* problem);
/* NULL is allowed. No call may be running on the plan, nor CUDA work of it be pending. */
MLA_API void mla_plan_destroy(mla_plan* plan);

typedef struct mla_plan_info {
  uint32_t struct_size;
  int32_t parts;               /* parallel parts of a call */
  uint64_t schedule_bytes;     /* size of the schedule buffer, on the plan's device */
  uint64_t schedule_alignment; /* a power of two */
  uint64_t scratch_bytes;      /* size of the scratch buffer, on the plan's device; may be 0 */
  uint64_t scratch_alignment;
  const char* backend;         /* strings live as long as the plan */
  const char* variant;         /* the backend's own name for what it will run */
  const char* problem;         /* mla_problem_format of the problem, defaults filled in */
  int32_t block_tokens;        /* the unit in which keys are scheduled */
  int32_t item_rows;           /* query rows that walk the keys together */
  int64_t slots;               /* partial results that fit into scratch */
} mla_plan_info;

/* Set info->struct_size first. */
MLA_API mla_status mla_plan_get_info(const mla_plan* plan, mla_plan_info* info);

/* ---------------------------------------------------------------- schedule -------------------------------------------- */

typedef struct mla_schedule_args {
  uint32_t struct_size;
  uint32_t flags;                  /* 0 */
  const mla_tensor* cache_seqlens; /* int32 [batch]: cached tokens of each request, 0 allowed, any stride */
  const mla_tensor* cu_seqlens_q;  /* ragged q only: int32 [batch + 1], 0 first, not decreasing; else NULL */
  void* schedule;                  /* written: at least schedule_bytes, aligned */
  uint64_t schedule_bytes;
} mla_schedule_args;

/* Turns lengths into a schedule: a snapshot of the lengths and who computes what. The buffer holds no pointers: it may be
 * copied to another address on the same device and used there. On the CPU negative lengths, lengths over max_len and a sum over max_tokens are
 * MLA_INVALID_ARGUMENT. On CUDA the values are not seen by the host: cu_seqlens_q is clamped to non-decreasing values up to max_q_tokens, and
 * the rows of a request whose length is outside [0, max_len], or that does not fit into max_tokens, come out as NaN. Nothing is cut short. */
MLA_API mla_status mla_schedule(const mla_plan* plan, const mla_schedule_args* args, void* stream);

/* ---------------------------------------------------------------- decode ---------------------------------------------- */

/* In all tensors the last dimension has stride 1 (lse: any strides), the other strides are free unless said otherwise.
 * out, lse and scratch share no memory with each other or with anything that is read; rows of two tensors may take turns in one
 * buffer. The elements of out, and of lse, are at addresses of their own. */
typedef struct mla_decode_args {
  uint32_t struct_size;
  uint32_t flags;                  /* 0 */
  const mla_tensor* q;             /* [batch, q_len, q_heads, head_dim]; ragged: [tokens, q_heads, head_dim]. Tokens past the
                                      last of cu_seqlens_q are neither read nor written: a padded buffer may be passed whole. */
  const mla_tensor* q_rope;        /* NULL, or the last head_dim - value_dim columns of q, when q holds the first value_dim only */
  const mla_tensor* kv_cache;      /* [pages, page_size, kv_heads, head_dim] */
  const mla_tensor* kv_rope;       /* NULL, or the last head_dim - value_dim columns, when kv_cache holds the first value_dim only */
  const mla_tensor* block_table;   /* int32 [batch, width]: page ids in order; entries past the last used page may be anything */
  const mla_tensor* cache_seqlens; /* NULL, or the tensor given to mla_schedule: CPU and debug plans then refuse a stale schedule */
  const mla_tensor* sink;          /* NULL, or fp32 [q_heads]: exp(sink) joins the denominator of out, never lse */
  const mla_tensor* out;           /* written: q's shape with value_dim columns, out_dtype */
  const mla_tensor* lse;           /* NULL, or written: fp32 [batch, q_len, q_heads]; ragged: [tokens, q_heads] */
  const void* schedule;            /* made by mla_schedule with this plan, or a copy */
  uint64_t schedule_bytes;
  void* scratch;                   /* at least scratch_bytes, aligned; NULL if scratch_bytes is 0. Its content is of no interest. */
  uint64_t scratch_bytes;
  const mla_tensor* kv_scale;      /* the following are NULL until a backend takes them */
  const mla_tensor* indices;
  const mla_tensor* topk_length;
  const mla_tensor* extra_kv_cache;
  const mla_tensor* extra_block_table;
  const mla_tensor* extra_seqlens;
  const mla_tensor* tree_mask;
  const mla_tensor* global_seqlens; /* causal with cp_world > 1: int32 [batch], cached tokens of each request on all ranks together;
                                       else NULL */
} mla_decode_args;

/* Attention over the cache, as defined at the top of this file.
 *
 *   Empty rows    A row that sees no key (length 0, or hidden by the causal mask) gets out = 0 and lse = -inf; so does every row
 *                 whose softmax denominator is 0.
 *   NaN           A NaN in a visible q, k or v gives NaN in every row that sees it; infinities follow IEEE. No byte outside a
 *                 request's visible range and nothing of another request changes a bit of its rows (fixed_chunk), or
 *                 anything but the place where its keys are cut (balanced).
 *   Determinism   The same inputs and plan give the same bits, for any thread count.
 *   Shards        With cp_world > 1 a rank attends to its own keys; mla_merge of all ranks' results is attention over all keys. The
 *                 causal mask is the request's: query token t sees the rank's keys among the first global_seqlens - q_len + 1 + t.
 *                 CPU: a length that is not the rank's share of global_seqlens is MLA_INVALID_ARGUMENT.
 *   Page ids      CPU: an id outside [0, pages) in the used part of the table is MLA_INVALID_ARGUMENT and nothing is written.
 *                 CUDA: such a page reads as zeros; a plan with MLA_PROBLEM_DEBUG refuses it as the CPU does.
 *   Order         CUDA: all inputs count as they are when the stream's earlier work has ended. Where the kernel before allows
 *                 programmatic dependent launch, schedule and block table are looked at, and pages that they name brought to the
 *                 cache, before that: they have to be mapped when the call is enqueued, whatever they hold. */
MLA_API mla_status mla_decode(const mla_plan* plan, const mla_decode_args* args, void* stream);

/* ---------------------------------------------------------------- merge ----------------------------------------------- */

typedef struct mla_merge_args {
  uint32_t struct_size;
  uint32_t flags;              /* 0, or MLA_PROBLEM_LSE_BASE2: both lse tensors are in base 2 */
  const mla_tensor* out_parts; /* [parts, tokens, heads, dim], bf16, fp16 or fp32 */
  const mla_tensor* lse_parts; /* fp32 [parts, tokens, heads] */
  const mla_tensor* out;       /* written: [tokens, heads, dim], bf16, fp16 or fp32 */
  const mla_tensor* lse;       /* NULL, or written: fp32 [tokens, heads] */
} mla_merge_args;

/* Joins attention over disjoint sets of keys into attention over all of them, with the lse of mla_decode (-inf: saw nothing).
 * Runs on the device of the tensors. */
MLA_API mla_status mla_merge(const mla_context* context, const mla_merge_args* args, void* stream);

/* clang-format on */

#ifdef __cplusplus
}
#endif

#endif
