/* The ABI, pinned: sizes, offsets and values that programs out there have compiled in. A line here may be added, never changed.
 * Offsets are those of LP64 platforms, the only ones this library builds for. */
#include "mlakit/mla.h"

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "size of " #type)
#define OFFSET(type, field, bytes) _Static_assert(offsetof(type, field) == (bytes), "offset of " #type "." #field)
#define VALUE(name, value) _Static_assert((name) == (value), "value of " #name)

SIZE(mla_device, 8);
OFFSET(mla_device, device_type, 0);
OFFSET(mla_device, device_id, 4);

SIZE(mla_data_type, 4);
OFFSET(mla_data_type, code, 0);
OFFSET(mla_data_type, bits, 1);
OFFSET(mla_data_type, lanes, 2);

SIZE(mla_tensor, 48);
OFFSET(mla_tensor, data, 0);
OFFSET(mla_tensor, device, 8);
OFFSET(mla_tensor, ndim, 16);
OFFSET(mla_tensor, dtype, 20);
OFFSET(mla_tensor, shape, 24);
OFFSET(mla_tensor, strides, 32);
OFFSET(mla_tensor, byte_offset, 40);

SIZE(mla_tensor_storage, 112);
OFFSET(mla_tensor_storage, tensor, 0);
OFFSET(mla_tensor_storage, shape, 48);
OFFSET(mla_tensor_storage, strides, 80);

SIZE(mla_problem, 120);
OFFSET(mla_problem, struct_size, 0);
OFFSET(mla_problem, flags, 4);
OFFSET(mla_problem, device_type, 8);
OFFSET(mla_problem, device_id, 12);
OFFSET(mla_problem, q_dtype, 16);
OFFSET(mla_problem, kv_dtype, 20);
OFFSET(mla_problem, out_dtype, 24);
OFFSET(mla_problem, kv_format, 28);
OFFSET(mla_problem, max_batch, 32);
OFFSET(mla_problem, q_len, 40);
OFFSET(mla_problem, max_q_tokens, 48);
OFFSET(mla_problem, max_len, 56);
OFFSET(mla_problem, max_tokens, 64);
OFFSET(mla_problem, q_heads, 72);
OFFSET(mla_problem, kv_heads, 76);
OFFSET(mla_problem, head_dim, 80);
OFFSET(mla_problem, value_dim, 84);
OFFSET(mla_problem, page_size, 88);
OFFSET(mla_problem, split_policy, 92);
OFFSET(mla_problem, chunk_tokens, 96);
OFFSET(mla_problem, topk, 100);
OFFSET(mla_problem, cp_world, 104);
OFFSET(mla_problem, cp_rank, 108);
OFFSET(mla_problem, softmax_scale, 112);
OFFSET(mla_problem, cp_turn, 116);

SIZE(mla_backend_info, 32);
OFFSET(mla_backend_info, struct_size, 0);
OFFSET(mla_backend_info, device_type, 4);
OFFSET(mla_backend_info, is_available, 8);
OFFSET(mla_backend_info, reserved, 12);
OFFSET(mla_backend_info, name, 16);
OFFSET(mla_backend_info, reason, 24);

SIZE(mla_context_options, 40);
OFFSET(mla_context_options, struct_size, 0);
OFFSET(mla_context_options, flags, 4);
OFFSET(mla_context_options, backend, 8);
OFFSET(mla_context_options, num_threads, 16);
OFFSET(mla_context_options, reserved, 20);
OFFSET(mla_context_options, parallel_for, 24);
OFFSET(mla_context_options, parallel_for_user, 32);

SIZE(mla_plan_info, 80);
OFFSET(mla_plan_info, struct_size, 0);
OFFSET(mla_plan_info, parts, 4);
OFFSET(mla_plan_info, schedule_bytes, 8);
OFFSET(mla_plan_info, schedule_alignment, 16);
OFFSET(mla_plan_info, scratch_bytes, 24);
OFFSET(mla_plan_info, scratch_alignment, 32);
OFFSET(mla_plan_info, backend, 40);
OFFSET(mla_plan_info, variant, 48);
OFFSET(mla_plan_info, problem, 56);
OFFSET(mla_plan_info, block_tokens, 64);
OFFSET(mla_plan_info, item_rows, 68);
OFFSET(mla_plan_info, slots, 72);

SIZE(mla_schedule_args, 40);
OFFSET(mla_schedule_args, struct_size, 0);
OFFSET(mla_schedule_args, flags, 4);
OFFSET(mla_schedule_args, cache_seqlens, 8);
OFFSET(mla_schedule_args, cu_seqlens_q, 16);
OFFSET(mla_schedule_args, schedule, 24);
OFFSET(mla_schedule_args, schedule_bytes, 32);

SIZE(mla_decode_args, 176);
OFFSET(mla_decode_args, struct_size, 0);
OFFSET(mla_decode_args, flags, 4);
OFFSET(mla_decode_args, q, 8);
OFFSET(mla_decode_args, q_rope, 16);
OFFSET(mla_decode_args, kv_cache, 24);
OFFSET(mla_decode_args, kv_rope, 32);
OFFSET(mla_decode_args, block_table, 40);
OFFSET(mla_decode_args, cache_seqlens, 48);
OFFSET(mla_decode_args, sink, 56);
OFFSET(mla_decode_args, out, 64);
OFFSET(mla_decode_args, lse, 72);
OFFSET(mla_decode_args, schedule, 80);
OFFSET(mla_decode_args, schedule_bytes, 88);
OFFSET(mla_decode_args, scratch, 96);
OFFSET(mla_decode_args, scratch_bytes, 104);
OFFSET(mla_decode_args, kv_scale, 112);
OFFSET(mla_decode_args, indices, 120);
OFFSET(mla_decode_args, topk_length, 128);
OFFSET(mla_decode_args, extra_kv_cache, 136);
OFFSET(mla_decode_args, extra_block_table, 144);
OFFSET(mla_decode_args, extra_seqlens, 152);
OFFSET(mla_decode_args, tree_mask, 160);
OFFSET(mla_decode_args, global_seqlens, 168);

SIZE(mla_merge_args, 40);
OFFSET(mla_merge_args, struct_size, 0);
OFFSET(mla_merge_args, flags, 4);
OFFSET(mla_merge_args, out_parts, 8);
OFFSET(mla_merge_args, lse_parts, 16);
OFFSET(mla_merge_args, out, 24);
OFFSET(mla_merge_args, lse, 32);

VALUE(MLA_OK, 0);
VALUE(MLA_INVALID_ARGUMENT, 1);
VALUE(MLA_UNSUPPORTED, 2);
VALUE(MLA_WORKSPACE_TOO_SMALL, 3);
VALUE(MLA_OUT_OF_MEMORY, 4);
VALUE(MLA_CUDA_ERROR, 10);
VALUE(MLA_NO_DRIVER, 11);
VALUE(MLA_INTERNAL, 90);
VALUE(MLA_DEVICE_CPU, 1);
VALUE(MLA_DEVICE_CUDA, 2);
VALUE(MLA_DTYPE_DEFAULT, 0);
VALUE(MLA_DTYPE_BF16, 1);
VALUE(MLA_DTYPE_FP16, 2);
VALUE(MLA_DTYPE_FP32, 3);
VALUE(MLA_DTYPE_E4M3, 4);
VALUE(MLA_DTYPE_INT32, 5);
VALUE(MLA_PROBLEM_CAUSAL, 1);
VALUE(MLA_PROBLEM_RAGGED_Q, 2);
VALUE(MLA_PROBLEM_LSE_BASE2, 4);
VALUE(MLA_PROBLEM_TREE_MASK, 8);
VALUE(MLA_PROBLEM_EXTRA_SEGMENT, 16);
VALUE(MLA_PROBLEM_DEBUG, 32);
VALUE(MLA_KV_PLAIN, 0);
VALUE(MLA_KV_FP8_TENSOR, 1);
VALUE(MLA_KV_FP8_656, 2);
VALUE(MLA_KV_FP8_584, 3);
VALUE(MLA_SPLIT_BALANCED, 0);
VALUE(MLA_SPLIT_FIXED_CHUNK, 1);

/* DLPack's own declarations (its header, version 1), field by field: a DLTensor* has to work as a const mla_tensor*. */
typedef struct {
  int device_type; /* an enum of int32_t */
  int32_t device_id;
} dl_device;
typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} dl_data_type;
typedef struct {
  void* data;
  dl_device device;
  int32_t ndim;
  dl_data_type dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} dl_tensor;

#define SAME(field)                                                                              \
  _Static_assert(offsetof(dl_tensor, field) == offsetof(mla_tensor, field), "DLTensor." #field); \
  _Static_assert(sizeof(((dl_tensor*)0)->field) == sizeof(((mla_tensor*)0)->field), "size of DLTensor." #field)
SAME(data);
SAME(device);
SAME(ndim);
SAME(dtype);
SAME(shape);
SAME(strides);
SAME(byte_offset);
_Static_assert(sizeof(dl_tensor) == sizeof(mla_tensor), "size of DLTensor");
_Static_assert(offsetof(dl_data_type, lanes) == offsetof(mla_data_type, lanes), "DLDataType.lanes");
