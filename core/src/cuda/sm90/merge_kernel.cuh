// mla_merge on the device: joins attention over disjoint sets of keys, a warp for each (token, head).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/pdl.cuh"
#include "math/online_softmax.h"
#include "tensors.h"

namespace mla::cuda::sm90 {

__device__ inline float load_element(const void* data, int64_t offset, DType dtype) {
  if (dtype == DType::kFp32) return static_cast<const float*>(data)[offset];
  if (dtype == DType::kBf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]);
  return __half2float(static_cast<const __half*>(data)[offset]);
}

__device__ inline void store_element(void* data, int64_t offset, DType dtype, float value) {
  if (dtype == DType::kFp32) {
    static_cast<float*>(data)[offset] = value;
  } else if (dtype == DType::kBf16) {
    static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16(value);
  } else {
    static_cast<__half*>(data)[offset] = __float2half(value);
  }
}

__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ MergeCall call) {
  ptx::griddepcontrol_wait();
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= call.tokens * call.heads) return;
  const int64_t token = row / call.heads, head = row % call.heads;
  const float unit = call.is_lse_base2 ? 1.0f : math::kLog2e;
  const auto lse_log2 = [&](int64_t part) {
    return unit * call.lse_parts[part * call.lse_parts_stride[0] + token * call.lse_parts_stride[1] +
                                 head * call.lse_parts_stride[2]];
  };
  float maximum = -INFINITY, sum = 0.0f;
  for (int64_t part = 0; part < call.parts; ++part) maximum = math::max_keep_nan(maximum, lse_log2(part));
  for (int64_t part = 0; part < call.parts; ++part) sum += math::merge_weight(lse_log2(part), maximum);
  const float factor = math::safe_reciprocal(sum);
  for (int64_t column = lane; column < call.dim; column += 32) {
    float o = 0.0f;
    for (int64_t part = 0; part < call.parts; ++part) {
      const float weight = math::merge_weight(lse_log2(part), maximum);
      if (weight == 0.0f) continue;  // saw nothing: its out counts for nothing, whatever it holds
      const int64_t offset =
          part * call.out_parts_stride[0] + token * call.out_parts_stride[1] + head * call.out_parts_stride[2] + column;
      o = fmaf(weight, load_element(call.out_parts, offset, call.in_dtype), o);
    }
    store_element(call.out, token * call.out_stride[0] + head * call.out_stride[1] + column, call.out_dtype,
                  o * factor);
  }
  if (lane == 0 && call.lse != nullptr) {
    call.lse[token * call.lse_stride[0] + head * call.lse_stride[1]] = math::merged_lse(maximum, sum) / unit;
  }
}

}  // namespace mla::cuda::sm90
