// The roofs that `mlakit bench --device cuda` measures beside the kernels: a small library of its own, loaded only by it.
//
// pages     each CTA reads cache pages into a ring of five slots, as the decode kernel does, and does nothing with them
// products  the tensor core instructions of decode on what shared memory holds: one warpgroup multiplies Q and K, two P and V
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/fence.cuh"
#include "cuda/sm90/ptx/mbarrier.cuh"
#include "cuda/sm90/ptx/reg.cuh"
#include "cuda/sm90/ptx/wgmma.cuh"

namespace mla::cuda::probe {
namespace {

using namespace sm90;

constexpr DecodeConfig kConfig{DType::kBf16, 576, false, kNarrowBlock};
constexpr uint32_t kSlots = 5;
constexpr int kSharedBytes = static_cast<int>(kSlots) * kConfig.slot_bytes();

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

__device__ __forceinline__ void bulk_load(uint32_t shared, const std::byte* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

// Slots i, i + gridDim.x, ... of the cache, in the order given.
__global__ void __launch_bounds__(32) read_slots(const std::byte* cache, const int32_t* order, int32_t slots) {
  extern __shared__ __align__(1024) std::byte shared[];
  __shared__ uint64_t barriers[kSlots];
  if (threadIdx.x != 0) return;
  for (uint32_t s = 0; s < kSlots; ++s) ptx::mbarrier_init(ptx::shared_address(&barriers[s]), 1);
  ptx::fence_mbarrier_init();
  const uint32_t bytes = kConfig.slot_bytes();
  int32_t loaded = 0;
  for (int32_t i = blockIdx.x; i < slots; i += gridDim.x, ++loaded) {
    const uint32_t slot = loaded % kSlots, barrier = ptx::shared_address(&barriers[slot]);
    if (loaded >= static_cast<int32_t>(kSlots)) wait(barrier, (loaded / kSlots - 1) & 1);
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
    bulk_load(ptx::shared_address(shared) + slot * bytes, cache + static_cast<int64_t>(order[i]) * bytes, bytes,
              barrier);
  }
  for (int32_t i = loaded < static_cast<int32_t>(kSlots) ? 0 : loaded - kSlots; i < loaded; ++i) {
    wait(ptx::shared_address(&barriers[i % kSlots]), (i / kSlots) & 1);
  }
}

// What nobody can know not to be so, and is not: keeps the products.
__device__ __forceinline__ void keep(float result, float* sink) {
  if (result == 12345.678f) *sink = result;
}

// Q K^T of one slot of 32 keys for 64 rows, `rounds` times.
__device__ __forceinline__ void multiply_scores(const std::byte* shared, int32_t rounds, float* sink) {
  uint32_t q[kConfig.q_register_steps()][4];
#pragma unroll
  for (int s = 0; s < kConfig.q_register_steps(); ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      q[s][i] = reinterpret_cast<const uint32_t*>(shared)[(s * 4 + i) * kMathThreads + threadIdx.x];
  }
  const uint64_t k = ptx::k_major_descriptor(ptx::shared_address(shared));
  float result = 0.0f;
#pragma unroll 1
  for (int32_t r = 0; r < rounds; ++r) {
    float s[16];
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kConfig.q_register_steps(); ++step) {
      ptx::wgmma_m64n32k16_rs<kConfig.dtype>(
          s, q[step], k + step / 4 * ptx::descriptor_step(layout::kGroupBytes) + step % 4 * 2, step > 0);
    }
#pragma unroll
    for (int step = kConfig.q_register_steps(); step < kConfig.q_steps(); ++step) {
      ptx::wgmma_m64n32k16_ss<kConfig.dtype>(
          s, k + step % 4 * 2, k + step / 4 * ptx::descriptor_step(layout::kGroupBytes) + step % 4 * 2, 1);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(s);
    result += s[0];
  }
  keep(result, sink);
}

// P V of that slot for half of the value columns.
__device__ __forceinline__ void multiply_outputs(const std::byte* shared, int half, int32_t rounds, float* sink) {
  const uint32_t base = ptx::shared_address(shared);
  const uint64_t p = ptx::k_major_descriptor(base);
  const uint64_t v = ptx::n_major_descriptor(base + half * 4 * layout::kGroupBytes, layout::kGroupBytes);
  float o[2][64] = {};
#pragma unroll 1
  for (int32_t r = 0; r < rounds; ++r) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      ptx::wgmma_m64n128k16_ss_t<kConfig.dtype>(o[0], p + 2 * step, v + step * ptx::descriptor_step(2048), 1);
      ptx::wgmma_m64n128k16_ss_t<kConfig.dtype>(
          o[1], p + 2 * step, v + step * ptx::descriptor_step(2048) + ptx::descriptor_step(2 * layout::kGroupBytes), 1);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(o[0]);
    ptx::wgmma_pin(o[1]);
  }
  keep(o[0][0] + o[1][0], sink);
}

// The registers are shared out as in decode; the fourth warpgroup only gives some away.
__global__ void __launch_bounds__(kThreads, 1) multiply(const std::byte* data, int32_t rounds, float* sink) {
  extern __shared__ __align__(1024) std::byte shared[];
  for (int i = threadIdx.x * 16; i < kSharedBytes; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(shared + i) = *reinterpret_cast<const uint4*>(data + i);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const int warpgroup = __shfl_sync(ptx::kWholeWarp, static_cast<int>(threadIdx.x) / kMathThreads, 0);
  if (warpgroup == 0) {
    ptx::setmaxnreg_inc<kScoreRegisters>();
    multiply_scores(shared, rounds, sink);
  } else if (warpgroup == 3) {
    ptx::setmaxnreg_dec<kLoaderRegisters>();
  } else {
    ptx::setmaxnreg_inc<kOutputRegisters>();
    multiply_outputs(shared, warpgroup - 1, rounds, sink);
  }
}

}  // namespace
}  // namespace mla::cuda::probe

extern "C" {

// Bytes of what one unit of `pages` reads.
__attribute__((visibility("default"))) int64_t mlakit_probe_slot_bytes() {
  return mla::cuda::probe::kConfig.slot_bytes();
}

// Reads `slots` slots of the cache in the given order. Returns a cudaError_t.
__attribute__((visibility("default"))) int mlakit_probe_pages(const void* cache, const int32_t* order, int32_t slots,
                                                              int32_t ctas, void* stream) {
  using namespace mla::cuda::probe;
  cudaError_t error = cudaFuncSetAttribute(read_slots, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  read_slots<<<static_cast<unsigned>(ctas), 32, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const std::byte*>(cache), order, slots);
  return cudaGetLastError();
}

// Floating-point operations of one round of `products` on one CTA.
__attribute__((visibility("default"))) double mlakit_probe_products_flop() { return 2.0 * 64 * 32 * (576 + 512); }

// data: at least 5 slots of random bf16. Returns a cudaError_t.
__attribute__((visibility("default"))) int mlakit_probe_products(const void* data, int32_t rounds, int32_t ctas,
                                                                 float* sink, void* stream) {
  using namespace mla::cuda::probe;
  cudaError_t error = cudaFuncSetAttribute(multiply, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  multiply<<<static_cast<unsigned>(ctas), mla::cuda::sm90::kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const std::byte*>(data), rounds, sink);
  return cudaGetLastError();
}
}
