// The compiled kernels as the host sees them: handles for the runtime's launch call.
#pragma once

#include <cstdint>

#include "cuda/sm90/config.h"

namespace mla::cuda::sm90 {

// One struct a variant; variants.inc is the list. Each comes alone, with shared pages, and with these and wide blocks.
#define MLA_VARIANT(name, dtype, head_dim)                                                     \
  template <bool kSharesPages, int kBlockTokens = kNarrowBlock>                                \
  struct Variant_##name {                                                                      \
    static constexpr DecodeConfig kConfig{DType::dtype, head_dim, kSharesPages, kBlockTokens}; \
  };                                                                                           \
  const void* decode_kernel(Variant_##name<false>);                                            \
  const void* decode_kernel(Variant_##name<true>);                                             \
  const void* decode_kernel(Variant_##name<true, kWideBlock>);
#include "cuda/sm90/variants.inc"
#undef MLA_VARIANT

const void* schedule_kernel_handle(int32_t block_tokens);
const void* combine_kernel_handle(DType dtype, int32_t tiles_of_warp);
const void* merge_kernel_handle();

}  // namespace mla::cuda::sm90
