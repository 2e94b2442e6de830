// Dense MLA decode on sm_90a: O = softmax(scale Q K^T) V with Q [rows, 576 | 512], K [len, same], V = K[:, :512]; README.md has the design.
//
// A CTA owns up to 64 rows of an item and walks the pieces of its part. Four warpgroups by role:
//   loader   one warp plans (schedule -> Work), one warp feeds the ring of slots by TMA, one prefetches where blocks are wide
//   scores   S = Q K^T (Q in registers), softmax, P to shared memory
//   outputs  two warpgroups, 256 columns of O each: O = O * rescale + P V
#pragma once

#include "cuda/sm90/kernels.h"
#include "cuda/sm90/ptx/cluster.cuh"
#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/ptx/reg.cuh"
#include "cuda/sm90/roles/loader.cuh"
#include "cuda/sm90/roles/outputs.cuh"
#include "cuda/sm90/roles/planner.cuh"
#include "cuda/sm90/roles/prefetcher.cuh"
#include "cuda/sm90/roles/scores.cuh"
#include "cuda/sm90/roles/wide_loader.cuh"

namespace mla::cuda::sm90 {

// Grid (row tiles of an item, parts); tiles in pairs form clusters, which read the same pages at the same time.
// Variant::kConfig is the DecodeConfig: nvcc 13.0's host stub cannot spell a struct value as a template argument.
template <class Variant>
__global__ void __launch_bounds__(kThreads, 1) decode_dense_kernel(const __grid_constant__ DecodeParams p) {
  constexpr DecodeConfig kCfg = Variant::kConfig;
  extern __shared__ __align__(1024) std::byte shared[];
  Control* control = reinterpret_cast<Control*>(shared + smem_plan<kCfg>().control());
  const int warpgroup = __shfl_sync(ptx::kWholeWarp, static_cast<int>(threadIdx.x) / kMathThreads, 0);
  const int thread = threadIdx.x % kMathThreads;
  const RoleContext ctx{
      ptx::shared_address(shared), ptx::shared_address(control->barriers), control, thread / 32, thread % 32, thread};
  const int tile = blockIdx.x;
  Guess guess{p, ctx};
  if (!kCfg.is_wide() && threadIdx.x / 32 == kLoaderWarp) guess.begin();
  if (threadIdx.x == 0) init_barriers<kCfg>(ctx.barriers);
  if (threadIdx.x / 32 == 4) control->zeros[ctx.lane] = 0;
  if (threadIdx.x == kThreads - 1) {
    ptx::prefetch_tensor_map(&p.q_latent);
    ptx::prefetch_tensor_map(&p.kv_latent);
    if constexpr (kCfg.has_rope()) {
      ptx::prefetch_tensor_map(&p.q_rope);
      ptx::prefetch_tensor_map(&p.kv_rope);
    }
  }
  __syncthreads();
  if constexpr (kCfg.shares_pages) ptx::cluster_arrive_relaxed();

  // Each role waits for the kernel before by itself, once it has all that does not depend on it: the first instructions of a role, its
  // registers and the parameters that it needs are found while the other kernel ends.
  if (warpgroup == 0) {
    ptx::setmaxnreg_inc<kScoreRegisters>();
    if constexpr (kCfg.shares_pages) ptx::cluster_wait();  // the other CTA's barriers are there
    ptx::griddepcontrol_wait();
    Scores<kCfg>{p, ctx}.run_all(tile);
  } else if (warpgroup == 3) {
    ptx::setmaxnreg_dec<kLoaderRegisters>();
    if (ctx.warp == kLoaderWarp % 4) {
      if constexpr (kCfg.is_wide()) {
        WideLoader<kCfg>{p, ctx}.run_all();
      } else {
        Loader<kCfg>{p, ctx, guess}.run_all();
      }
    } else if (ctx.warp == kPlannerWarp % 4 && ctx.lane == 0) {
      run_planner(p, ctx, tile, blockIdx.y);
    } else if (ctx.warp == kPrefetcherWarp % 4) {
      if constexpr (kCfg.has_prefetcher()) Prefetcher<kCfg>{p, ctx}.run_all();
    }
  } else {
    ptx::setmaxnreg_inc<kOutputRegisters>();
    if constexpr (kCfg.shares_pages) ptx::cluster_wait();
    ptx::griddepcontrol_wait();
    Outputs<kCfg>{p, ctx, warpgroup - 1}.run_all(tile);
  }
}

}  // namespace mla::cuda::sm90

// In a file of its own each: compiles the variant and defines its handles.
#define MLA_INSTANTIATE(name)                                                                     \
  namespace mla::cuda::sm90 {                                                                     \
  const void* decode_kernel(Variant_##name<false>) {                                              \
    return reinterpret_cast<const void*>(&decode_dense_kernel<Variant_##name<false>>);            \
  }                                                                                               \
  const void* decode_kernel(Variant_##name<true>) {                                               \
    return reinterpret_cast<const void*>(&decode_dense_kernel<Variant_##name<true>>);             \
  }                                                                                               \
  const void* decode_kernel(Variant_##name<true, kWideBlock>) {                                   \
    return reinterpret_cast<const void*>(&decode_dense_kernel<Variant_##name<true, kWideBlock>>); \
  }                                                                                               \
  }
