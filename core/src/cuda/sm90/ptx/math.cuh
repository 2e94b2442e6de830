// Approximate exp2 and conversions to packed two-byte elements.
#pragma once

#include <cstdint>

#include "problem.h"

namespace mla::cuda::sm90::ptx {

__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rounds to nearest even; low in the lower half.
template <DType kDType>
__device__ __forceinline__ uint32_t cvt_pack(float low, float high) {
  uint32_t packed;
  if constexpr (kDType == DType::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(kDType == DType::kFp16);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

}  // namespace mla::cuda::sm90::ptx
