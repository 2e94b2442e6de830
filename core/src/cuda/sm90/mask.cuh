// Hiding keys from rows: past the end of the request, or by the causal mask.
#pragma once

#include "layout/fragment.h"

namespace mla::cuda::sm90 {

// s: scores of 64 rows and 2 kCount keys. visible[r]: how many of these keys row fragment_row(t, r) may see; may be negative or too many.
template <int kCount>
__device__ __forceinline__ void mask_scores(float (&s)[kCount], int lane, const int (&visible)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // Not a multiplication: a hidden key may hold NaN.
    if (layout::fragment_column(lane, i) >= visible[layout::which_row(i)]) s[i] = -INFINITY;
  }
}

}  // namespace mla::cuda::sm90
