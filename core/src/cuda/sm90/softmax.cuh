// One slot's step of the online softmax on score fragments: 64 rows, 32 keys.
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

__device__ __forceinline__ float maximum_of_row(const float (&s)[16], int row) {
  float maximum = s[2 * row];
#pragma unroll
  for (int i = 1; i < 16; ++i) {
    if (layout::which_row(i) == row) maximum = fmaxf(maximum, s[i]);
  }
  return maximum;
}

__device__ __forceinline__ float maximum_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(ptx::kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(ptx::kWholeWarp, x, 2));
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(ptx::kWholeWarp, x, 1);
  return x + __shfl_xor_sync(ptx::kWholeWarp, x, 2);
}

// s: unscaled scores. True if a reference moved in this warp; rescale then holds the factors of sum (applied here) and O.
__device__ __forceinline__ bool move_maximum(const float (&s)[16], float scale_log2e, SoftmaxState& state,
                                             float (&rescale)[2]) {
  const float slot[2] = {maximum_of_row(s, 0) * scale_log2e, maximum_of_row(s, 1) * scale_log2e};
  const bool is_moved = __any_sync(
      ptx::kWholeWarp, slot[0] > state.maximum[0] + kMaximumSlack || slot[1] > state.maximum[1] + kMaximumSlack);
  if (is_moved) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float moved = fmaxf(maximum_of_quad(slot[r]), state.maximum[r]);
      const bool is_empty = moved == -INFINITY;  // nothing visible so far: -inf - -inf would be NaN
      rescale[r] = is_empty ? 1.0f : ptx::ex2_approx(state.maximum[r] - moved);
      state.maximum[r] = moved;
      state.offset[r] = is_empty ? 0.0f : -moved;
      state.sum[r] *= rescale[r];
    }
  }
  return is_moved;
}

// packed: P of 32 keys as two m64k16 A fragments.
template <DType kDType>
__device__ __forceinline__ void exponentials(const float (&s)[16], float scale_log2e, SoftmaxState& state,
                                             uint32_t (&packed)[8]) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
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
