// The compiled kernels as the host sees them: handles for the runtime's launch call.
#pragma once

#include <cstdint>

#include "cuda/sm90/config.h"

namespace mla::cuda::sm90 {

// One struct a variant; variants.inc is the list. Each comes with and without shared pages.
#define MLA_VARIANT(name, dtype, head_dim)                                       \
  template <bool kSharesPages>                                                   \
  struct Variant_##name {                                                        \
    static constexpr DecodeConfig kConfig{DType::dtype, head_dim, kSharesPages}; \
  };                                                                             \
  const void* decode_kernel(Variant_##name<false>);                              \
  const void* decode_kernel(Variant_##name<true>);
#include "cuda/sm90/variants.inc"
#undef MLA_VARIANT

const void* schedule_kernel_handle();
const void* combine_kernel_handle(DType dtype, int32_t tiles_of_warp);
const void* merge_kernel_handle();

}  // namespace mla::cuda::sm90
