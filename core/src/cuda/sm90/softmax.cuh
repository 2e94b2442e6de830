// One block's step of the online softmax on score fragments: 64 rows, 2 kCount keys.
//
// The reference maximum of a row moves only when a score passes it by 2^8 (scores are in base 2): in the common case there is no
// shuffle and nothing to rescale. P is then at most 2^8, and the sum and O carry the same factor, so it cancels. NaN scores never move
// the maximum, but they reach P and the sum through the exponential.
#pragma once

#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/math.cuh"
#include "layout/fragment.h"
#include "math/online_softmax.h"

namespace mla::cuda::sm90 {

inline constexpr float kMaximumSlack = 8.0f;

// Of the two rows of a thread.
struct SoftmaxState {
  float maximum[2] = {-INFINITY, -INFINITY};  // base 2, the same in all four lanes of a row
  float offset[2] = {0.0f, 0.0f};  // what is added to scaled scores: -maximum, and 0 before the first finite score
  float sum[2] = {0.0f, 0.0f};     // of this lane's columns
};

template <int kCount>
__device__ __forceinline__ float maximum_of_row(const float (&s)[kCount], int row) {
  float part[2];  // two chains: one would be a latency a score
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float pair = fmaxf(s[i + 2 * row], s[i + 2 * row + 1]);
    part[i / 4 % 2] = i < 8 ? pair : fmaxf(part[i / 4 % 2], pair);
  }
  return fmaxf(part[0], part[1]);
}

__device__ __forceinline__ float maximum_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(ptx::kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(ptx::kWholeWarp, x, 2));
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(ptx::kWholeWarp, x, 1);
  return x + __shfl_xor_sync(ptx::kWholeWarp, x, 2);
}

// s: unscaled scores. True if a reference moved in this warp; on_moved then gets the factors of O, which are applied to the sums here.
template <int kCount, class OnMoved>
__device__ __forceinline__ bool move_maximum(const float (&s)[kCount], float scale_log2e, SoftmaxState& state,
                                             const OnMoved& on_moved) {
  const float block[2] = {maximum_of_row(s, 0) * scale_log2e, maximum_of_row(s, 1) * scale_log2e};
  const bool is_moved = __any_sync(
      ptx::kWholeWarp, block[0] > state.maximum[0] + kMaximumSlack || block[1] > state.maximum[1] + kMaximumSlack);
  if (is_moved) {
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float moved = fmaxf(maximum_of_quad(block[r]), state.maximum[r]);
      const bool is_empty = moved == -INFINITY;  // nothing visible so far: -inf - -inf would be NaN
      rescale[r] = is_empty ? 1.0f : ptx::ex2_approx(state.maximum[r] - moved);
      state.maximum[r] = moved;
      state.offset[r] = is_empty ? 0.0f : -moved;
      state.sum[r] *= rescale[r];
    }
    on_moved(rescale);
  }
  return is_moved;
}

// packed: P as m64k16 A fragments of four registers.
template <DType kDType, int kCount>
__device__ __forceinline__ void exponentials(const float (&s)[kCount], float scale_log2e, SoftmaxState& state,
                                             uint32_t (&packed)[kCount / 2]) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const int r = layout::which_row(i);
    const float low = ptx::ex2_approx(fmaf(s[i], scale_log2e, state.offset[r]));
    const float high = ptx::ex2_approx(fmaf(s[i + 1], scale_log2e, state.offset[r]));
    sum[r] += low + high;
    packed[i / 2] = ptx::cvt_pack<kDType>(low, high);
  }
  state.sum[0] += sum[0];
  state.sum[1] += sum[1];
}

}  // namespace mla::cuda::sm90
