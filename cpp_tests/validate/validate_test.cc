// What is refused, with which status and which words. Each case breaks one thing in a valid call; nothing may be written.
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "call.h"
#include "status.h"

using mla::test::Call;

namespace {

struct Bad {
  std::string message;
  std::function<void(Call&)> break_it;
  mla_status status = MLA_INVALID_ARGUMENT;
  const char* problem = Call::kProblem;
};

void check_refused(mla_status got, const Bad& bad) {
  CHECK(std::string(mla_last_error()) == bad.message);
  CHECK(got == bad.status);
}

const char* const kRagged = "dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:ragged";

}  // namespace

TEST_CASE("the calls that the cases break are valid") {
  for (const char* problem : {Call::kProblem, kRagged}) {
    Call call(problem);
    REQUIRE(call.run_schedule() == MLA_OK);
    REQUIRE(call.run_decode() == MLA_OK);
    CHECK(call.lse[0] != -12345.0f);
  }
}

TEST_CASE("bad problems are refused") {
  using P = mla_problem;
  const struct {
    std::string message;
    std::function<void(P&)> break_it;
    mla_status status = MLA_INVALID_ARGUMENT;
  } cases[] = {
      {"problem: struct_size must be sizeof of the struct (120 in this library), got 0",
       [](P& p) { p.struct_size = 0; }},
      {"problem: struct_size must be sizeof of the struct (120 in this library), got 4294967295",
       [](P& p) { p.struct_size = ~0u; }},
      {"problem: flags must be within 0x3f, got 0x40", [](P& p) { p.flags = 0x40; }},
      {"problem.device_type: must be MLA_DEVICE_CPU (1) or MLA_DEVICE_CUDA (2), got 3",
       [](P& p) { p.device_type = 3; }},
      {"problem.device_id: must be 0 for the CPU or a CUDA ordinal from 0, got 1", [](P& p) { p.device_id = 1; }},
      {"problem.device_id: must be 0 for the CPU or a CUDA ordinal from 0, got -1",
       [](P& p) { p.device_type = MLA_DEVICE_CUDA, p.device_id = -1; }},
      {"problem.q_dtype: must be MLA_DTYPE_BF16 (1), _FP16 (2) or _FP32 (3), got 5",
       [](P& p) { p.q_dtype = MLA_DTYPE_INT32; }},
      {"problem.kv_dtype: must be MLA_DTYPE_DEFAULT (0), _BF16 (1), _FP16 (2), _FP32 (3) or _E4M3 (4), got 5",
       [](P& p) { p.kv_dtype = MLA_DTYPE_INT32; }},
      {"problem.out_dtype: must be MLA_DTYPE_DEFAULT (0), q_dtype = 3 or MLA_DTYPE_FP32 (3), got 1",
       [](P& p) { p.out_dtype = MLA_DTYPE_BF16; }},
      {"problem.kv_format: must be an MLA_KV_... value from 0 to 3, got 4", [](P& p) { p.kv_format = 4; }},
      {"problem.split_policy: must be MLA_SPLIT_BALANCED (0) or MLA_SPLIT_FIXED_CHUNK (1), got 2",
       [](P& p) { p.split_policy = 2; }},
      {"problem.q_heads: must be from 1 to 65536, got 0", [](P& p) { p.q_heads = 0; }},
      {"problem.kv_heads: must be from 1 to 65536, got 0", [](P& p) { p.kv_heads = 0; }},
      {"problem.q_heads: must be a multiple of kv_heads = 3, got 4", [](P& p) { p.kv_heads = 3; }},
      {"problem.head_dim: must be from 1 to 65536, got -1", [](P& p) { p.head_dim = -1; }},
      {"problem.value_dim: must be from 1 to 8, got 9", [](P& p) { p.value_dim = 9; }},
      {"problem.page_size: must be from 1 to 268435456, got 0", [](P& p) { p.page_size = 0; }},
      {"problem.max_batch: must be from 1 to 1073741824, got 0", [](P& p) { p.max_batch = 0; }},
      {"problem.max_len: must be from 1 to 268435456, got 0", [](P& p) { p.max_len = 0; }},
      {"problem.q_len: must be from 1 to 268435456, got 0", [](P& p) { p.q_len = 0; }},
      {"problem.max_q_tokens (0: max_batch * q_len): must be from 8 to 8, got 7", [](P& p) { p.max_q_tokens = 7; }},
      {"problem.max_q_tokens (0: max_batch * q_len): must be from 1 to 8, got 9",
       [](P& p) { p.max_q_tokens = 9, p.flags = MLA_PROBLEM_RAGGED_Q; }},
      {"problem.max_q_tokens: times q_heads = 4 must be at most 1073741824, got 2147483648 query tokens",
       [](P& p) { p.max_batch = 1 << 30; }},
      {"problem.max_tokens (0: max_batch * max_len): must be from 1 to 80, got 81", [](P& p) { p.max_tokens = 81; }},
      {"problem.chunk_tokens: must be 0 unless split_policy is MLA_SPLIT_FIXED_CHUNK, got 64",
       [](P& p) { p.chunk_tokens = 64; }},
      {"problem.chunk_tokens: must be 0 (then 2048) or a multiple of 64 up to 268435456, got 65",
       [](P& p) { p.split_policy = MLA_SPLIT_FIXED_CHUNK, p.chunk_tokens = 65; }},
      {"problem.topk: must be at least 0, got -1", [](P& p) { p.topk = -1; }},
      {"problem.cp_world: must be at least 1 (or 0 for 1), got -1", [](P& p) { p.cp_world = -1; }},
      {"problem.cp_rank: must be from 0 to 0, got 1", [](P& p) { p.cp_rank = 1; }},
      {"problem.softmax_scale: must be 0 (then head_dim ** -0.5) or positive and finite, got -1",
       [](P& p) { p.softmax_scale = -1; }},
      {"problem.softmax_scale: must be 0 (then head_dim ** -0.5) or positive and finite, got inf",
       [](P& p) { p.softmax_scale = INFINITY; }},
      {"problem.cp_turn (0: 1): must be from 0 to 268435456, got -1", [](P& p) { p.cp_turn = -1; }},
      {"problem.kv_format: no backend takes FP8 caches, use MLA_KV_PLAIN with bf16, fp16 or fp32, got kv_format 2, "
       "kv_dtype 0",
       [](P& p) { p.kv_format = MLA_KV_FP8_656; }, MLA_UNSUPPORTED},
      {"problem.kv_format: no backend takes FP8 caches, use MLA_KV_PLAIN with bf16, fp16 or fp32, got kv_format 0, "
       "kv_dtype 4",
       [](P& p) { p.kv_dtype = MLA_DTYPE_E4M3; }, MLA_UNSUPPORTED},
      {"problem.topk: no backend takes index lists, use 0, got 64", [](P& p) { p.topk = 64; }, MLA_UNSUPPORTED},
      {"problem.flags: no backend takes MLA_PROBLEM_TREE_MASK, leave it out",
       [](P& p) { p.flags = MLA_PROBLEM_TREE_MASK; }, MLA_UNSUPPORTED},
      {"problem.flags: no backend takes MLA_PROBLEM_EXTRA_SEGMENT, leave it out",
       [](P& p) { p.flags = MLA_PROBLEM_EXTRA_SEGMENT; }, MLA_UNSUPPORTED},
  };
  Call call;
  for (const auto& bad : cases) {
    CAPTURE(bad.message);
    mla_problem problem = call.problem;
    bad.break_it(problem);
    mla_plan* plan = call.plan;  // any value that is not NULL
    CHECK(mla_plan_create(&plan, call.context, &problem) == bad.status);
    CHECK(std::string(mla_last_error()) == bad.message);
    CHECK(plan == nullptr);
  }
}

TEST_CASE("bad arguments of mla_schedule are refused and nothing is written") {
  const Bad cases[] = {
      {"args: flags must be within 0x0, got 0x1", [](Call& c) { c.schedule_args.flags = 1; }},
      {"cache_seqlens: must be given as [batch], got NULL", [](Call& c) { c.schedule_args.cache_seqlens = nullptr; }},
      {"cache_seqlens: dtype must be int32, got DLPack code 0 with 64 bits and 1 lanes",
       [](Call& c) { c.lengths_t.tensor().dtype.bits = 64; }},
      {"cache_seqlens: dtype must be int32, got DLPack code 0 with 32 bits and 2 lanes",
       [](Call& c) { c.lengths_t.tensor().dtype.lanes = 2; }},
      {"cache_seqlens: dtype must be int32, got fp32", [](Call& c) { c.lengths_t.tensor().dtype.code = 2; }},
      {"cache_seqlens: must have 1 dimensions [batch], got 2", [](Call& c) { c.lengths_t.tensor().ndim = 2; }},
      {"cache_seqlens: batch must be at least 0, got shape[0] = -3", [](Call& c) { c.lengths_t.shape(0) = -3; }},
      {"cache_seqlens: batch: must be from 0 to 4, got 5", [](Call& c) { c.lengths_t.shape(0) = 5; }},
      {"cache_seqlens: the stride of batch must be at least 0, got strides[0] = -1; make a copy in order",
       [](Call& c) { c.lengths_t.strides()[0] = -1; }},
      {"cache_seqlens: must be on the plan's device, CPU:0, got CUDA:0 (DLPack device type 2)",
       [](Call& c) { c.lengths_t.tensor().device.device_type = MLA_DEVICE_CUDA; }},
      {"cache_seqlens: data must point at the elements, got NULL",
       [](Call& c) { c.lengths_t.tensor().data = nullptr; }},
      {"cache_seqlens: shape must point at 1 sizes, got NULL", [](Call& c) { c.lengths_t.tensor().shape = nullptr; }},
      {"cache_seqlens: must be from 0 to 20 (max_len of the problem), got cache_seqlens[1] = -1",
       [](Call& c) { c.lengths[1] = -1; }},
      {"cache_seqlens: must be from 0 to 20 (max_len of the problem), got cache_seqlens[2] = 21",
       [](Call& c) { c.lengths[2] = 21; }},
      {"cache_seqlens: must sum to at most 15 (max_tokens of the problem), got 16", [](Call&) {}, MLA_INVALID_ARGUMENT,
       "dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:m15"},
      {"cu_seqlens_q: must be NULL unless the problem has MLA_PROBLEM_RAGGED_Q, got a tensor",
       [](Call& c) { c.schedule_args.cu_seqlens_q = &c.cu_t.tensor(); }},
      {"cu_seqlens_q: must be given as [batch + 1], got NULL", [](Call& c) { c.schedule_args.cu_seqlens_q = nullptr; },
       MLA_INVALID_ARGUMENT, kRagged},
      {"cu_seqlens_q: batch + 1 must be 4 (cache_seqlens), got shape[0] = 3", [](Call& c) { c.cu_t.shape(0) = 3; },
       MLA_INVALID_ARGUMENT, kRagged},
      {"cu_seqlens_q: must begin with 0, got cu_seqlens_q[0] = 1", [](Call& c) { c.cu[0] = 1; }, MLA_INVALID_ARGUMENT,
       kRagged},
      {"cu_seqlens_q: must not decrease, got cu_seqlens_q[2] = 1 after 2", [](Call& c) { c.cu[2] = 1; },
       MLA_INVALID_ARGUMENT, kRagged},
      {"cu_seqlens_q: a request must have at most 2 query tokens (q_len of the problem), got 3 for request 2",
       [](Call& c) { c.cu[3] = 5; }, MLA_INVALID_ARGUMENT, kRagged},
      {"cu_seqlens_q: must end with at most 2 (max_q_tokens of the problem), got 3", [](Call&) {}, MLA_INVALID_ARGUMENT,
       "dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:t2:ragged"},
  };
  for (const Bad& bad : cases) {
    CAPTURE(bad.message);
    Call call(bad.problem);
    bad.break_it(call);
    const std::string before = call.outputs();
    check_refused(call.run_schedule(), bad);
    CHECK(call.outputs() == before);
  }
}

TEST_CASE("bad arguments of mla_decode are refused and nothing is written") {
  const Bad cases[] = {
      {"args: flags must be within 0x0, got 0x2", [](Call& c) { c.decode_args.flags = 2; }},
      // q
      {"q: must be given as [batch, q_len, q_heads, head_dim], got NULL", [](Call& c) { c.decode_args.q = nullptr; }},
      {"q: must be given as [tokens, q_heads, head_dim], got NULL", [](Call& c) { c.decode_args.q = nullptr; },
       MLA_INVALID_ARGUMENT, kRagged},
      {"q: dtype must be fp32, got bf16", [](Call& c) { c.q_t.tensor().dtype = {4, 16, 1}; }},
      {"q: must have 4 dimensions [batch, q_len, q_heads, head_dim], got 3", [](Call& c) { c.q_t.tensor().ndim = 3; }},
      {"q: q_len must be 2 (problem), got shape[1] = 1", [](Call& c) { c.q_t.shape(1) = 1; }},
      {"q: q_heads must be 4 (problem), got shape[2] = 8", [](Call& c) { c.q_t.shape(2) = 8; }},
      {"q: head_dim must be 8 (problem), got shape[3] = 6", [](Call& c) { c.q_t.shape(3) = 6; }},
      {"q: the stride of head_dim must be 1, got strides[3] = 2; make that dimension contiguous",
       [](Call& c) { c.q_t.strides()[3] = 2; }},
      {"q: the stride of batch must be at least 0, got strides[0] = -64; make a copy in order",
       [](Call& c) { c.q_t.strides()[0] = -64; }},
      {"q: shape and strides must stay inside the address space, got more",
       [](Call& c) { c.q_t.strides()[0] = std::numeric_limits<int64_t>::max() / 2; }},
      {"q: must be on the plan's device, CPU:0, got CUDA:1 (DLPack device type 2)",
       [](Call& c) { c.q_t.tensor().device = {MLA_DEVICE_CUDA, 1}; }},
      {"q: must be on the plan's device, CPU:0, got other:0 (DLPack device type 4)",
       [](Call& c) { c.q_t.tensor().device = {4, 0}; }},
      {"q: data must point at the elements, got NULL", [](Call& c) { c.q_t.tensor().data = nullptr; }},
      {"q: batch: must be from 0 to 4, got 5", [](Call& c) { c.q_t.shape(0) = c.table_t.shape(0) = 5; }},
      {"block_table: batch: must be from 0 to 4, got 5", [](Call& c) { c.table_t.shape(0) = 5; }, MLA_INVALID_ARGUMENT,
       kRagged},
      // q_rope and kv_rope
      {"q: value_dim (beside q_rope) must be 6 (problem), got shape[3] = 8",
       [](Call& c) { c.decode_args.q_rope = &c.q_rope_t.tensor(); }},
      {"q_rope: head_dim - value_dim must be 2 (problem), got shape[3] = 1",
       [](Call& c) {
         c.decode_args.q_rope = &c.q_rope_t.tensor(), c.q_t.strides(), c.q_t.shape(3) = 6, c.q_rope_t.shape(3) = 1;
       }},
      {"q_rope: batch must be 3 (q), got shape[0] = 2",
       [](Call& c) {
         c.decode_args.q_rope = &c.q_rope_t.tensor(), c.q_t.strides(), c.q_t.shape(3) = 6, c.q_rope_t.shape(0) = 2;
       }},
      {"q_rope: must be NULL where head_dim equals value_dim = 8, got a tensor",
       [](Call& c) { c.decode_args.q_rope = &c.q_rope_t.tensor(); }, MLA_INVALID_ARGUMENT,
       "dense:fp32:b4:q2:h4:k2:d8:v8:p4:l20"},
      {"kv_cache: value_dim (beside kv_rope) must be 6 (problem), got shape[3] = 8",
       [](Call& c) { c.decode_args.kv_rope = &c.kv_rope_t.tensor(); }},
      {"kv_rope: pages must be 7 (kv_cache), got shape[0] = 6",
       [](Call& c) {
         c.decode_args.kv_rope = &c.kv_rope_t.tensor(), c.kv_t.strides(), c.kv_t.shape(3) = 6, c.kv_rope_t.shape(0) = 6;
       }},
      {"kv_rope: must be NULL where head_dim equals value_dim = 8, got a tensor",
       [](Call& c) { c.decode_args.kv_rope = &c.kv_rope_t.tensor(); }, MLA_INVALID_ARGUMENT,
       "dense:fp32:b4:q2:h4:k2:d8:v8:p4:l20"},
      // kv_cache
      {"kv_cache: must be given as [pages, page_size, kv_heads, head_dim], got NULL",
       [](Call& c) { c.decode_args.kv_cache = nullptr; }},
      {"kv_cache: page_size must be 4 (problem), got shape[1] = 16", [](Call& c) { c.kv_t.shape(1) = 16; }},
      {"kv_cache: kv_heads must be 2 (problem), got shape[2] = 1", [](Call& c) { c.kv_t.shape(2) = 1; }},
      {"kv_cache: dtype must be fp32, got fp16", [](Call& c) { c.kv_t.tensor().dtype = {2, 16, 1}; }},
      {"kv_cache: the stride of head_dim must be 1, got strides[3] = 3; make that dimension contiguous",
       [](Call& c) { c.kv_t.strides()[3] = 3; }},
      // block_table
      {"block_table: must be given as [batch, width], got NULL", [](Call& c) { c.decode_args.block_table = nullptr; }},
      {"block_table: batch must be 3 (q), got shape[0] = 2", [](Call& c) { c.table_t.shape(0) = 2; }},
      {"block_table: the stride of width must be 1, got strides[1] = 3; make that dimension contiguous",
       [](Call& c) { c.table_t.strides()[1] = 3; }},
      {"block_table: width must be at least 3 for the 11 cached tokens of request 2, got shape[1] = 2",
       [](Call& c) { c.table_t.strides(), c.table_t.shape(1) = 2; }},
      {"block_table: a used page id must be from 0 to 6 (pages of kv_cache, less 1), got block_table[2][2] = 7",
       [](Call& c) { c.table[12] = 7; }},
      {"block_table: a used page id must be from 0 to 6 (pages of kv_cache, less 1), got block_table[0][1] = -1",
       [](Call& c) { c.table[1] = -1; }},
      // cache_seqlens and the schedule
      {"cache_seqlens: batch must be 3 (block_table), got shape[0] = 2",
       [](Call& c) { c.decode_args.cache_seqlens = c.schedule_args.cache_seqlens, c.lengths_t.shape(0) = 2; }},
      {"cache_seqlens: must be those of the schedule, got cache_seqlens[2] = 12 where it has 11; call mla_schedule "
       "again",
       [](Call& c) { c.decode_args.cache_seqlens = c.schedule_args.cache_seqlens, c.lengths[2] = 12; }},
      {"schedule: must be made by mla_schedule, got other bytes",
       [](Call& c) { std::memset(c.schedule.get(), 0, c.info.schedule_bytes); }},
      {"schedule: must be made with this plan, got one of another plan",
       [](Call& c) {
         Call other("dense:fp32:b3:q2:h4:k2:d8:v6:p4:l20");
         REQUIRE(other.run_schedule() == MLA_OK);
         std::memcpy(c.schedule.get(), other.schedule.get(),
                     std::min(c.info.schedule_bytes, other.info.schedule_bytes));
       }},
      {"schedule: must be made for this batch of 2 requests, got one for 3; call mla_schedule again",
       [](Call& c) { c.q_t.shape(0) = c.table_t.shape(0) = c.out_t.shape(0) = c.lse_t.shape(0) = 2; }},
      {"q: must have the 3 query tokens of the schedule, got 2",
       [](Call& c) { c.q_t.shape(0) = c.out_t.shape(0) = c.lse_t.shape(0) = 2; }, MLA_INVALID_ARGUMENT, kRagged},
      {"global_seqlens: must be NULL unless the problem is causal with cp_world > 1, got a tensor",
       [](Call& c) { c.decode_args.global_seqlens = &c.lengths_t.tensor(); }},
      {"global_seqlens: must be given as [batch], got NULL", [](Call&) {}, MLA_INVALID_ARGUMENT,
       "dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:causal:cp1of2"},
      {"global_seqlens: rank 1 of 2 must have 2 of the 5 tokens of request 0, got cache_seqlens[0] = 5",
       [](Call& c) { c.decode_args.global_seqlens = &c.lengths_t.tensor(); }, MLA_INVALID_ARGUMENT,
       "dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:causal:cp1of2"},
      // sink
      {"sink: q_heads must be 4 (problem), got shape[0] = 3",
       [](Call& c) { c.decode_args.sink = &c.sink_t.tensor(), c.sink_t.shape(0) = 3; }},
      {"sink: the stride of q_heads must be 1, got strides[0] = 0; make that dimension contiguous",
       [](Call& c) { c.decode_args.sink = &c.sink_t.tensor(), c.sink_t.strides()[0] = 0; }},
      // out and lse
      {"out: must be given as [batch, q_len, q_heads, value_dim], got NULL",
       [](Call& c) { c.decode_args.out = nullptr; }},
      {"out: value_dim must be 6 (problem), got shape[3] = 8", [](Call& c) { c.out_t.shape(3) = 8; }},
      {"out: batch must be 3 (q), got shape[0] = 4", [](Call& c) { c.out_t.shape(0) = 4; }},
      {"out: tokens must be 3 (q), got shape[0] = 4", [](Call& c) { c.out_t.shape(0) = 4; }, MLA_INVALID_ARGUMENT,
       kRagged},
      {"out: the stride of value_dim must be 1, got strides[3] = 2; make that dimension contiguous",
       [](Call& c) { c.out_t.strides()[3] = 2; }},
      {"out: its elements must not share memory, got strides[2] = 5 where 6 is the least",
       [](Call& c) { c.out_t.strides()[2] = 5; }},
      {"out: its elements must not share memory, got strides[0] = 0 where 1 is the least",
       [](Call& c) { c.out_t.strides()[0] = 0; }},
      {"out: is written and must not share memory with q, got an overlap; give it memory of its own",
       [](Call& c) { c.out_t.tensor().data = c.q.data() + 3; }},
      {"out: is written and must not share memory with kv_cache, got an overlap; give it memory of its own",
       [](Call& c) { c.out_t.tensor().data = c.kv.data(); }},
      {"out: is written and must not share memory with lse, got an overlap; give it memory of its own",
       [](Call& c) { c.lse_t.tensor().data = c.out.data() + 40; }},
      {"out: is written and must not share memory with block_table, got an overlap; give it memory of its own",
       [](Call& c) { c.table_t.tensor().data = c.out.data(); }},
      {"out: is written and must not share memory with sink, got an overlap; give it memory of its own",
       [](Call& c) { c.decode_args.sink = &c.sink_t.tensor(), c.sink_t.tensor().data = c.out.data() + 143 - 3; }},
      {"lse: is written and must not share memory with schedule, got an overlap; give it memory of its own",
       [](Call& c) { c.lse_t.tensor().data = c.schedule.get(); }},
      {"lse: is written and must not share memory with scratch, got an overlap; give it memory of its own",
       [](Call& c) { c.lse_t.tensor().data = c.scratch.get(); }},
      {"scratch: is written and must not share memory with schedule, got an overlap; give it memory of its own",
       [](Call& c) { c.decode_args.schedule = c.scratch.get(); }},
      {"lse: q_heads must be 4 (problem), got shape[2] = 2", [](Call& c) { c.lse_t.shape(2) = 2; }},
      {"lse: dtype must be fp32, got bf16", [](Call& c) { c.lse_t.tensor().dtype = {4, 16, 1}; }},
      {"lse: its elements must not share memory, got strides[2] = 1 where 2 is the least",
       [](Call& c) { c.lse_t.strides()[1] = 1; }},
      // not yet
      {"kv_scale: no backend takes it, pass NULL, got a tensor",
       [](Call& c) { c.decode_args.kv_scale = &c.sink_t.tensor(); }, MLA_UNSUPPORTED},
      {"indices: no backend takes it, pass NULL, got a tensor",
       [](Call& c) { c.decode_args.indices = &c.sink_t.tensor(); }, MLA_UNSUPPORTED},
      {"topk_length: no backend takes it, pass NULL, got a tensor",
       [](Call& c) { c.decode_args.topk_length = &c.sink_t.tensor(); }, MLA_UNSUPPORTED},
      {"extra_kv_cache: no backend takes it, pass NULL, got a tensor",
       [](Call& c) { c.decode_args.extra_kv_cache = &c.sink_t.tensor(); }, MLA_UNSUPPORTED},
      {"extra_block_table: no backend takes it, pass NULL, got a tensor",
       [](Call& c) { c.decode_args.extra_block_table = &c.sink_t.tensor(); }, MLA_UNSUPPORTED},
      {"extra_seqlens: no backend takes it, pass NULL, got a tensor",
       [](Call& c) { c.decode_args.extra_seqlens = &c.sink_t.tensor(); }, MLA_UNSUPPORTED},
      {"tree_mask: no backend takes it, pass NULL, got a tensor",
       [](Call& c) { c.decode_args.tree_mask = &c.sink_t.tensor(); }, MLA_UNSUPPORTED},
  };
  for (const Bad& bad : cases) {
    CAPTURE(bad.message);
    Call call(bad.problem);
    if (std::string(bad.problem).find("v8") != std::string::npos) {
      call.out_t.shape(3) = 8;
      call.out.resize(call.out.size() * 2);
      call.out_t.tensor().data = call.out.data();
    }
    REQUIRE_MESSAGE(call.run_schedule() == MLA_OK, mla_last_error());
    bad.break_it(call);
    const std::string before = call.outputs();
    check_refused(call.run_decode(), bad);
    CHECK(call.outputs() == before);
  }
}

TEST_CASE("workspaces that are too small, misaligned or missing are refused") {
  Call call;
  const auto starts_with = [](const std::string& text) { return std::string(mla_last_error()).find(text) == 0; };
  call.schedule_args.schedule_bytes -= 1;
  CHECK(call.run_schedule() == MLA_WORKSPACE_TOO_SMALL);
  CHECK(starts_with("schedule: must have at least "));
  call.schedule_args.schedule_bytes += 1;
  call.schedule_args.schedule = static_cast<char*>(call.schedule.get()) + 16;
  CHECK(call.run_schedule() == MLA_WORKSPACE_TOO_SMALL);
  CHECK(starts_with("schedule: its address must be a multiple of 256 (mla_plan_get_info), got 0x"));
  call.schedule_args.schedule = nullptr;
  CHECK(call.run_schedule() == MLA_INVALID_ARGUMENT);
  CHECK(starts_with("schedule: must point at "));
  call.schedule_args.schedule = call.schedule.get();
  call.lengths_t.tensor().data = call.schedule.get();
  CHECK(call.run_schedule() == MLA_INVALID_ARGUMENT);
  CHECK(starts_with("schedule: is written and must not share memory with cache_seqlens, got an overlap"));
  call.lengths_t.tensor().data = call.lengths.data();
  REQUIRE(call.run_schedule() == MLA_OK);

  call.decode_args.scratch_bytes -= 1;
  CHECK(call.run_decode() == MLA_WORKSPACE_TOO_SMALL);
  CHECK(starts_with("scratch: must have at least "));
  call.decode_args.scratch_bytes += 1;
  call.decode_args.scratch = nullptr;
  CHECK(call.run_decode() == MLA_INVALID_ARGUMENT);
  CHECK(starts_with("scratch: must point at "));
  call.decode_args.scratch = static_cast<char*>(call.scratch.get()) + 128;
  CHECK(call.run_decode() == MLA_WORKSPACE_TOO_SMALL);
  CHECK(starts_with("scratch: its address must be a multiple of 256"));
  call.decode_args.scratch = call.scratch.get();
  call.decode_args.schedule_bytes = UINT64_MAX;
  CHECK(call.run_decode() == MLA_INVALID_ARGUMENT);
  CHECK(starts_with("schedule: its bytes must stay inside the address space, got 18446744073709551615"));
}

TEST_CASE("a misaligned pointer is refused, byte_offset included") {
  Call call;
  REQUIRE(call.run_schedule() == MLA_OK);
  call.q_t.tensor().byte_offset = 2;
  CHECK(call.run_decode() == MLA_INVALID_ARGUMENT);
  CHECK(std::string(mla_last_error())
            .find("q: data + byte_offset must be a multiple of 4 bytes (its element), got address 0x") == 0);
}

TEST_CASE("byte_offset is added, and strides that are not given are compact") {
  Call call;
  REQUIRE(call.run_schedule() == MLA_OK);
  REQUIRE(call.run_decode() == MLA_OK);
  const std::vector<float> expected = call.out;
  std::vector<float> moved(call.q.size() + 5, NAN);
  std::copy(call.q.begin(), call.q.end(), moved.begin() + 5);
  call.q_t.tensor().data = moved.data();
  call.q_t.tensor().byte_offset = 20;
  call.q_t.strides();
  call.kv_t.strides();
  std::fill(call.out.begin(), call.out.end(), NAN);
  REQUIRE(call.run_decode() == MLA_OK);
  CHECK(call.out == expected);
}

TEST_CASE("an empty batch needs no data and writes nothing") {
  Call call;
  for (auto* t : {&call.lengths_t, &call.q_t, &call.table_t, &call.out_t, &call.lse_t})
    t->shape(0) = 0, t->tensor().data = nullptr;
  CHECK_MESSAGE(call.run_schedule() == MLA_OK, mla_last_error());
  CHECK_MESSAGE(call.run_decode() == MLA_OK, mla_last_error());
  CHECK(call.out == std::vector<float>(call.out.size(), -12345.0f));
}

TEST_CASE("the stride of a dimension of one means nothing") {
  Call call("dense:fp32:b4:q1:h4:k2:d8:v6:p4:l20");
  call.q_t.strides()[1] = -7;
  call.out_t.strides()[1] = 0;
  call.lse_t.strides()[1] = 0;
  REQUIRE(call.run_schedule() == MLA_OK);
  CHECK_MESSAGE(call.run_decode() == MLA_OK, mla_last_error());
}

TEST_CASE("rows that take turns in one buffer do not overlap") {
  Call call;
  REQUIRE(call.run_schedule() == MLA_OK);
  REQUIRE(call.run_decode() == MLA_OK);
  const std::vector<float> expected = call.out;
  // Each row of the buffer: 8 of q, 6 of out.
  std::vector<float> both(3 * 2 * 4 * 14, NAN);
  for (size_t row = 0; row < 3 * 2 * 4; ++row)
    std::copy_n(call.q.begin() + static_cast<ptrdiff_t>(row * 8), 8, both.begin() + static_cast<ptrdiff_t>(row * 14));
  call.decode_args.q = call.q_t.set(both.data(), MLA_DTYPE_FP32, {3, 2, 4, 8}, {112, 56, 14, 1});
  call.decode_args.out = call.out_t.set(both.data() + 8, MLA_DTYPE_FP32, {3, 2, 4, 6}, {112, 56, 14, 1});
  REQUIRE_MESSAGE(call.run_decode() == MLA_OK, mla_last_error());
  for (size_t row = 0; row < 3 * 2 * 4; ++row) {
    for (size_t column = 0; column < 6; ++column) CHECK(both[row * 14 + 8 + column] == expected[row * 6 + column]);
  }
  // One column further left, the rows of out begin inside those of q.
  call.decode_args.out = call.out_t.set(both.data() + 7, MLA_DTYPE_FP32, {3, 2, 4, 6}, {112, 56, 14, 1});
  CHECK(call.run_decode() == MLA_INVALID_ARGUMENT);
}

TEST_CASE("a ragged call may have more rows than its requests use; they stay as they are") {
  Call call(kRagged);
  REQUIRE(call.run_schedule() == MLA_OK);
  for (auto* t : {&call.q_t, &call.out_t, &call.lse_t}) t->shape(0) = 4;
  REQUIRE_MESSAGE(call.run_decode() == MLA_OK, mla_last_error());
  CHECK(call.out[3 * 4 * 6] == -12345.0f);
  CHECK(call.lse[3 * 4] == -12345.0f);
}

TEST_CASE("bad arguments of mla_merge are refused") {
  Call call;
  std::vector<float> parts(2 * 3 * 4 * 6, 1.0f), lse_parts(2 * 3 * 4, 0.5f), out(3 * 4 * 6, -1.0f), lse(3 * 4, -1.0f);
  struct Merge {
    mla::test::Desc parts, lse_parts, out, lse;
    mla_merge_args args = {};
  };
  const struct {
    std::string message;
    std::function<void(Merge&)> break_it;
  } cases[] = {
      {"args: flags must be within 0x4, got 0x1", [](Merge& m) { m.args.flags = 1; }},
      {"out_parts: must not be NULL, got NULL", [](Merge& m) { m.args.out_parts = nullptr; }},
      {"out_parts: must be on the CPU (1) or a CUDA device (2), got DLPack device type 7",
       [](Merge& m) { m.parts.tensor().device.device_type = 7; }},
      {"out_parts: dtype must be bf16 or fp16 or fp32, got int32", [](Merge& m) { m.parts.tensor().dtype.code = 0; }},
      {"out_parts: must have 4 dimensions [parts, tokens, heads, dim], got 3",
       [](Merge& m) { m.parts.tensor().ndim = 3; }},
      {"out_parts: parts: must be from 1 to 2147483647, got 0", [](Merge& m) { m.parts.shape(0) = 0; }},
      {"out_parts: the stride of dim must be 1, got strides[3] = 2; make that dimension contiguous",
       [](Merge& m) { m.parts.strides()[3] = 2; }},
      {"lse_parts: must be given as [parts, tokens, heads], got NULL", [](Merge& m) { m.args.lse_parts = nullptr; }},
      {"lse_parts: parts must be 2 (out_parts), got shape[0] = 1", [](Merge& m) { m.lse_parts.shape(0) = 1; }},
      {"out: dim must be 6 (out_parts), got shape[2] = 5", [](Merge& m) { m.out.shape(2) = 5; }},
      {"out: must be given as [tokens, heads, dim], got NULL", [](Merge& m) { m.args.out = nullptr; }},
      {"out: its elements must not share memory, got strides[1] = 0 where 1 is the least",
       [](Merge& m) { m.out.strides()[1] = 0; }},
      {"out: is written and must not share memory with out_parts, got an overlap; give it memory of its own",
       [](Merge& m) { m.out.tensor().data = m.parts.tensor().data; }},
      {"lse: tokens must be 3 (out_parts), got shape[0] = 2", [](Merge& m) { m.lse.shape(0) = 2; }},
      {"lse: is written and must not share memory with lse_parts, got an overlap; give it memory of its own",
       [](Merge& m) { m.lse.tensor().data = m.lse_parts.tensor().data; }},
  };
  for (const auto& bad : cases) {
    CAPTURE(bad.message);
    Merge m;
    m.args.struct_size = sizeof m.args;
    m.args.out_parts = m.parts.set(parts.data(), MLA_DTYPE_FP32, {2, 3, 4, 6});
    m.args.lse_parts = m.lse_parts.set(lse_parts.data(), MLA_DTYPE_FP32, {2, 3, 4});
    m.args.out = m.out.set(out.data(), MLA_DTYPE_FP32, {3, 4, 6});
    m.args.lse = m.lse.set(lse.data(), MLA_DTYPE_FP32, {3, 4});
    bad.break_it(m);
    CHECK(mla_merge(call.context, &m.args, nullptr) == MLA_INVALID_ARGUMENT);
    CHECK(std::string(mla_last_error()) == bad.message);
    CHECK(out == std::vector<float>(out.size(), -1.0f));
    CHECK(lse == std::vector<float>(lse.size(), -1.0f));
  }
}

TEST_CASE("bad context options are refused") {
  const auto refused = [](const mla_context_options& options) {
    mla_context* context = reinterpret_cast<mla_context*>(0x1);
    CHECK(mla_context_create(&context, &options) == MLA_INVALID_ARGUMENT);
    CHECK(context == nullptr);
    return std::string(mla_last_error());
  };
  mla_context_options options = {};
  options.struct_size = sizeof options;
  options.flags = 1;
  CHECK(refused(options) == "options: flags must be within 0x0, got 0x1");
  options.flags = 0;
  options.reserved = 2;
  CHECK(refused(options) == "options.reserved: must be 0, got 2");
  options.reserved = 0;
  options.num_threads = -1;
  CHECK(refused(options) == "options.num_threads: must be from 0 to 1024, got -1");
  options.num_threads = 0;
  options.backend = "nonesuch\nsecond line";
  const std::string message = refused(options);
  CHECK(message.find("options.backend: must be one of ") == 0);
  CHECK(message.find("cpu-scalar, reference, got \"nonesuch second line\"") != std::string::npos);
}

TEST_CASE("bad arguments of mla_tensor_init are refused") {
  mla_tensor_storage storage;
  float data = 0;
  const int64_t shape[] = {1};
  CHECK(mla_tensor_init(nullptr, &data, MLA_DTYPE_FP32, 1, 0, 1, shape, nullptr) == nullptr);
  CHECK(std::string(mla_last_error()) == "storage: must not be NULL, got NULL");
  CHECK(mla_tensor_init(&storage, &data, 6, 1, 0, 1, shape, nullptr) == nullptr);
  CHECK(std::string(mla_last_error()) == "dtype: must be an MLA_DTYPE_... value from 1 to 5, got 6");
  CHECK(mla_tensor_init(&storage, &data, MLA_DTYPE_FP32, 1, 0, 5, shape, nullptr) == nullptr);
  CHECK(std::string(mla_last_error()) == "ndim: must be from 1 to 4, got 5");
  CHECK(mla_tensor_init(&storage, &data, MLA_DTYPE_FP32, 1, 0, 1, nullptr, nullptr) == nullptr);
  CHECK(std::string(mla_last_error()) == "shape: must not be NULL, got NULL");
}

TEST_CASE("the error table is ordered, and every code has its name") {
  mla_status last = -1;
  int entries = 0;
  for (const mla::StatusName* entry = mla::kStatusNames; entry->name != nullptr; ++entry, ++entries) {
    CHECK(entry->code > last);
    last = entry->code;
    CHECK(std::string(mla_status_string(entry->code)) == entry->name);
  }
  CHECK(entries == 8);
  CHECK(std::string(mla_status_string(MLA_OK)) == "MLA_OK");
  CHECK(std::string(mla_status_string(MLA_INTERNAL)) == "MLA_INTERNAL");
  CHECK(std::string(mla_status_string(5)) == "unknown status");
}
