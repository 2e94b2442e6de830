// The sm_90a backend: problem -> variant and shape, calls -> kernel parameters and launches.
#include "cuda/cuda_backend.h"

#include <bit>
#include <cstdint>
#include <memory>

#include "cuda/device_info.h"
#include "cuda/launch.h"
#include "cuda/plan_shape.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/shared.h"
#include "cuda/tensor_map.h"
#include "math/online_softmax.h"

namespace mla::cuda {
namespace {

struct Variant {
  const char* name;
  sm90::DecodeConfig config;
  const void* (*kernel)();
  size_t shared_bytes;
};

template <class T>
constexpr Variant variant(const char* name) {
  return {name, T::kConfig, [] { return sm90::decode_kernel(T{}); }, sm90::smem_plan<T::kConfig>().bytes()};
}

constexpr Variant kVariants[] = {
#define MLA_VARIANT(name, dtype, head_dim)                                                          \
  variant<sm90::Variant_##name<false>>(#name), variant<sm90::Variant_##name<true>>(#name "_pairs"), \
      variant<sm90::Variant_##name<true, sm90::kWideBlock>>(#name "_wide"),
#include "cuda/sm90/variants.inc"
#undef MLA_VARIANT
};

const Variant* find_variant(const Problem& p, const PlanShape& shape) {
  for (const Variant& v : kVariants) {
    if (v.config.dtype == p.q_dtype && v.config.head_dim == p.head_dim && v.config.shares_pages == shape.shares_pages &&
        v.config.block_tokens == shape.config.block_tokens)
      return &v;
  }
  return nullptr;
}

struct Sm90Plan {
  const Variant* variant;
  PlanShape shape;
};

const Sm90Plan& state_of(const Plan& plan) { return *static_cast<const Sm90Plan*>(plan.state.get()); }

std::string why_unavailable() {
  std::string reason;
  const int count = device_count(&reason);
  for (int i = 0; i < count; ++i) {
    if (device_info(i).is_sm90) return "";
    reason += (i == 0 ? "" : "; ") + device_info(i).refusal;
  }
  return reason;
}

std::string why_unsupported(const Problem& p) {
  if (p.value_dim != sm90::kValueDim || (p.head_dim != 576 && p.head_dim != 512))
    return "head_dim/value_dim must be 576/512 or 512/512";
  if (p.q_dtype != DType::kBf16 && p.q_dtype != DType::kFp16) return "q must be bf16 or fp16";
  if (p.kv_dtype != p.q_dtype) return "kv must have q's dtype";
  if (p.out_dtype != p.q_dtype && p.out_dtype != DType::kFp32) return "out must have q's dtype or fp32";
  if (p.kv_format != KvFormat::kPlain) return "only plain cache rows";
  if (p.topk > 0 || p.has_tree_mask || p.has_extra_segment) return "no index lists, tree masks or extra segments";
  if (!(p.softmax_scale > 0.0f)) return "softmax_scale must be positive";
  if (p.page_size > INT32_MAX / 2 || p.max_len > INT32_MAX - 2 * sm90::kWideBlock)
    return "lengths must fit into 31 bits";
  std::string reason;
  if (device_count(&reason) <= p.device_id) return reason.empty() ? "there is no such CUDA device" : reason;
  return device_info(p.device_id).refusal;
}

// Dynamic shared memory for a small grid, so that its CTAs spread over all multiprocessors: else they crowd on those that the kernel
// before leaves first.
size_t spreading_bytes(int64_t ctas, int multiprocessors) {
  constexpr int64_t kMostOfOne = 4, kUsable = 204 * 1024, kStatic = 10 * 1024;
  const int64_t of_one = ceil_div(ctas, multiprocessors);
  return of_one <= kMostOfOne ? static_cast<size_t>(kUsable / of_one - kStatic) : 0;
}

// Lets a kernel have so many dynamic bytes. All kernels ask for the largest share of the multiprocessor's memory, as decode needs it:
// another split between shared memory and cache would be changed between the kernels of a call.
Status set_shared_memory(const void* kernel, size_t bytes) {
  MLA_RETURN_IF_ERROR(
      to_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)"));
  return to_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)");
}

Status make_plan(Plan& plan) {
  const Problem& p = plan.problem;
  const DeviceInfo& device = device_info(p.device_id);
  auto state = std::make_shared<Sm90Plan>(Sm90Plan{nullptr, plan_shape(p, device.multiprocessors)});
  state->variant = find_variant(p, state->shape);
  plan.config = state->shape.config;
  plan.scratch_bytes = state->shape.partial_out_bytes() + state->shape.partial_state_bytes();
  plan.variant = state->variant->name;
  const CurrentDevice current(p.device_id);
  MLA_RETURN_IF_ERROR(to_status(current.error(), "cudaSetDevice"));
  MLA_RETURN_IF_ERROR(set_shared_memory(state->variant->kernel(), state->variant->shared_bytes));
  for (const int32_t tiles_of_warp : {1, sm90::kCombineTiles}) {
    MLA_RETURN_IF_ERROR(
        set_shared_memory(sm90::combine_kernel_handle(p.q_dtype, tiles_of_warp), spreading_bytes(1, 1)));
  }
  MLA_RETURN_IF_ERROR(set_shared_memory(sm90::schedule_kernel_handle(plan.config.block_tokens), 0));
  plan.state = std::move(state);
  return Status::ok();
}

Status run_schedule(const Plan& plan, const ScheduleCall& call, void* stream) {
  const Problem& p = plan.problem;
  const CurrentDevice current(p.device_id);
  MLA_RETURN_IF_ERROR(to_status(current.error(), "cudaSetDevice"));
  const sm90::ScheduleParams params{plan.config,
                                    plan.layout(),
                                    call.schedule,
                                    call.cache_seqlens,
                                    call.cu_seqlens_q,
                                    call.batch,
                                    static_cast<int32_t>(p.q_len),
                                    p.max_len,
                                    p.max_q_tokens};
  return launch(sm90::schedule_kernel_handle(plan.config.block_tokens), "schedule kernel",
                {dim3(1), sm90::kScheduleThreads}, params, stream);
}

// The two parts of a row, latent and rope, in one tensor or two, as maps.
struct RowMaps {
  CUtensorMap* latent;
  CUtensorMap* rope;
};

Status encode_maps(const layout::TmaSource& row, const void* rope_data, const layout::TmaSource& rope_row,
                   const sm90::DecodeConfig& config, const char* name, const char* rope_name, const RowMaps& maps) {
  MLA_RETURN_IF_ERROR(encode_tensor_map(layout::make_box(row), config.dtype, name, maps.latent));
  if (!config.has_rope()) return Status::ok();
  layout::TmaSource rope = rope_data != nullptr ? rope_row : row;
  if (rope_data == nullptr) rope.base = static_cast<const uint16_t*>(row.base) + sm90::kValueDim;
  rope.groups = 1;
  rope.box_groups = 1;
  return encode_tensor_map(layout::make_box(rope), config.dtype, rope_data != nullptr ? rope_name : name, maps.rope);
}

layout::TmaSource q_source(const Plan& plan, const DecodeCall& call, const RowView& q) {
  const Problem& p = plan.problem;
  return {q.data,
          p.q_heads,
          q.head_stride,
          sm90::kLatentGroups,
          p.is_ragged ? call.q_tokens : p.q_len,
          q.token_stride,
          p.is_ragged ? 1 : call.batch,
          q.batch_stride,
          layout::run_rows(p.heads_per_kv_head()),
          state_of(plan).variant->config.q_box_groups()};
}

// A cache without pages is seen as 128 bytes of something readable: every page id is then outside but 0, which no valid call uses.
layout::TmaSource kv_source(const Plan& plan, const DecodeCall& call, const CacheView& kv) {
  const Problem& p = plan.problem;
  const sm90::DecodeConfig& config = state_of(plan).variant->config;
  const int32_t run = layout::run_rows(p.page_size, config.block_tokens);
  const int32_t box_groups = run == config.block_tokens ? config.box_groups() : 1;
  if (kv.pages == 0) return {call.schedule, 1, 0, 1, 1, 0, 1, 0, run, box_groups};
  return {kv.data,        p.page_size, kv.token_stride, sm90::kLatentGroups, p.kv_heads, kv.head_stride, kv.pages,
          kv.page_stride, run,         box_groups};
}

sm90::ResultParams result_params(const Plan& plan, const DecodeCall& call) {
  const Problem& p = plan.problem;
  const PlanShape& shape = state_of(plan).shape;
  sm90::ResultParams result{};
  result.out = call.out;
  result.lse = call.lse;
  result.sink = call.sink;
  result.lse_unit = p.is_lse_base2 ? 1.0f : math::kLn2;
  result.is_ragged = p.is_ragged;
  result.is_out_fp32 = p.out_dtype == DType::kFp32;
  result.heads = layout::Divider::by(p.heads_per_kv_head());
  result.partial_out = reinterpret_cast<float*>(call.scratch);
  result.partial_state = reinterpret_cast<layout::PartialState*>(call.scratch + shape.partial_out_bytes());
  result.partial = shape.partial;
  return result;
}

// How the combine grid is laid out, see CombineParams.
struct CombineShape {
  LaunchShape launch;
  int32_t tiles_of_warp;
  int32_t warps_of_tile;
  bool is_by_item;
};

// Of a combine grid whose CTAs are all there at once, two a multiprocessor.
int64_t most_warps(int multiprocessors) { return int64_t{2} * multiprocessors * sm90::kCombineWarps; }

// As many as there are pieces for (at least two each), and as fill the device. fixed_chunk: always the same, because the order of the
// merge is part of a row's bits, and these must not depend on the batch.
int32_t warps_of_tile(const PlanShape& shape, int64_t items, int64_t tiles, int multiprocessors) {
  if (shape.config.chunk_blocks > 0) return 4;
  const int64_t cuts = ceil_div(shape.config.parts, items);  // of an item, about
  int32_t warps = 1;
  while (warps < sm90::kCombineWarps && 4 * warps <= cuts && items * tiles * 2 * warps <= most_warps(multiprocessors))
    warps *= 2;
  return warps;
}

CombineShape combine_shape(const PlanShape& shape, int32_t batch, int multiprocessors) {
  const int64_t items = int64_t{batch} * shape.items_per_request;
  const int64_t cut_places = shape.config.parts - 1;
  const int64_t tiles = int64_t{shape.partial.strips} * layout::PartialLayout::kTiles;
  CombineShape c{};
  c.is_by_item = shape.config.chunk_blocks > 0 || items <= cut_places;
  c.warps_of_tile = warps_of_tile(shape, items, tiles, multiprocessors);
  c.tiles_of_warp = c.warps_of_tile > 1 || items * tiles <= most_warps(multiprocessors) ? 1 : sm90::kCombineTiles;
  const int64_t tiles_of_cta = sm90::kCombineWarps * c.tiles_of_warp / c.warps_of_tile;
  const int64_t columns = c.is_by_item ? items : cut_places, ctas = ceil_div(tiles, tiles_of_cta);
  c.launch = {dim3(static_cast<unsigned>(columns), static_cast<unsigned>(ctas)), sm90::kCombineThreads, 1,
              spreading_bytes(columns * ctas, multiprocessors)};
  return c;
}

Status run_decode(const Plan& plan, const DecodeCall& call, void* stream) {
  if (call.batch == 0) return Status::ok();
  const Problem& p = plan.problem;
  const Sm90Plan& state = state_of(plan);
  const CurrentDevice current(p.device_id);
  MLA_RETURN_IF_ERROR(to_status(current.error(), "cudaSetDevice"));

  sm90::DecodeParams params{};
  MLA_RETURN_IF_ERROR(encode_maps(q_source(plan, call, call.q), call.q_rope.data, q_source(plan, call, call.q_rope),
                                  state.variant->config, "q", "q_rope", {&params.q_latent, &params.q_rope}));
  MLA_RETURN_IF_ERROR(encode_maps(kv_source(plan, call, call.kv), call.kv_rope.data,
                                  kv_source(plan, call, call.kv_rope), state.variant->config, "kv_cache", "kv_rope",
                                  {&params.kv_latent, &params.kv_rope}));
  params.config = plan.config;
  params.layout = plan.layout();
  params.schedule = call.schedule;
  params.block_table = call.block_table;
  params.result = result_params(plan, call);
  params.batch = call.batch;
  params.page_size = layout::Divider::by(p.page_size);
  params.kv_heads = layout::Divider::by(p.kv_heads);
  // Measured, see sm90/README.md.
  params.most_in_flight = state.shape.tiles > 1 ? 3 : 2;
  params.prefetched_slots = 4;
  params.prefetches_late = state.shape.tiles == 2;
  params.kv_run = layout::run_rows(p.page_size);
  params.q_run = layout::run_rows(p.heads_per_kv_head());
  params.scale_log2e = p.softmax_scale * math::kLog2e;
  params.is_causal = p.is_causal;
  params.global_seqlens = call.global_seqlens;
  params.cp_world = p.cp_world;
  params.cp_rank = p.cp_rank;
  params.cp_turn = p.cp_turn;
  const PlanShape& shape = state.shape;
  MLA_RETURN_IF_ERROR(launch(state.variant->kernel(), state.variant->name,
                             {dim3(static_cast<unsigned>(shape.tiles), static_cast<unsigned>(shape.config.parts)),
                              sm90::kThreads, static_cast<unsigned>(shape.cluster), state.variant->shared_bytes},
                             params, stream));

  const CombineShape combine = combine_shape(shape, call.batch, device_info(p.device_id).multiprocessors);
  if (combine.launch.grid.x == 0) return Status::ok();  // a single part cuts nothing
  const sm90::CombineParams combine_params{plan.config,
                                           plan.layout(),
                                           call.schedule,
                                           params.result,
                                           call.batch,
                                           static_cast<int32_t>(p.q_len),
                                           std::countr_zero(static_cast<uint32_t>(combine.warps_of_tile)),
                                           combine.is_by_item,
                                           layout::Divider::by(shape.items_per_request),
                                           params.kv_heads};
  return launch(sm90::combine_kernel_handle(p.q_dtype, combine.tiles_of_warp), "combine kernel", combine.launch,
                combine_params, stream);
}

Status run_merge(const Context&, const MergeCall& call, void* stream) {
  if (!device_info(call.device_id).is_sm90)
    return unsupported("out_parts: %s", device_info(call.device_id).refusal.c_str());
  const CurrentDevice current(call.device_id);
  MLA_RETURN_IF_ERROR(to_status(current.error(), "cudaSetDevice"));
  const int64_t rows = call.tokens * call.heads;
  if (rows == 0) return Status::ok();
  constexpr int64_t kRowsOfCta = sm90::kMergeThreads / 32;
  return launch(sm90::merge_kernel_handle(), "merge kernel",
                {dim3(static_cast<unsigned>(ceil_div(rows, kRowsOfCta))), sm90::kMergeThreads}, call, stream);
}

Status read_device(const Plan& plan, void* to, const void* from, size_t bytes, void* stream) {
  const CurrentDevice current(plan.problem.device_id);
  MLA_RETURN_IF_ERROR(to_status(current.error(), "cudaSetDevice"));
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  MLA_RETURN_IF_ERROR(to_status(cudaStreamIsCapturing(s, &capture), "cudaStreamIsCapturing"));
  if (capture != cudaStreamCaptureStatusNone)
    return unsupported(
        "stream: a plan with MLA_PROBLEM_DEBUG reads device memory, got a stream that is being captured");
  MLA_RETURN_IF_ERROR(to_status(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, s), "cudaMemcpyAsync"));
  return to_status(cudaStreamSynchronize(s), "cudaStreamSynchronize");
}

}  // namespace

}  // namespace mla::cuda

namespace mla {

const Backend kSm90Backend{"sm90",           DeviceType::kCuda,  cuda::why_unavailable, cuda::why_unsupported,
                           cuda::make_plan,  cuda::run_schedule, cuda::run_decode,      cuda::run_merge,
                           cuda::read_device};

}  // namespace mla
