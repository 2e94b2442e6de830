// The kernels around decode: schedule, combine, merge.
#include "cuda/sm90/combine_kernel.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/merge_kernel.cuh"
#include "cuda/sm90/schedule_kernel.cuh"

namespace mla::cuda::sm90 {

const void* schedule_kernel_handle(int32_t block_tokens) {
  return block_tokens == kWideBlock ? reinterpret_cast<const void*>(&schedule_kernel<kWideBlock>)
                                    : reinterpret_cast<const void*>(&schedule_kernel<kNarrowBlock>);
}
const void* merge_kernel_handle() { return reinterpret_cast<const void*>(&merge_kernel); }
namespace {

template <DType kDType>
const void* combine_handle(int32_t tiles_of_warp) {
  return tiles_of_warp == 1 ? reinterpret_cast<const void*>(&combine_kernel<kDType, 1>)
                            : reinterpret_cast<const void*>(&combine_kernel<kDType, kCombineTiles>);
}

}  // namespace

const void* combine_kernel_handle(DType dtype, int32_t tiles_of_warp) {
  return dtype == DType::kFp16 ? combine_handle<DType::kFp16>(tiles_of_warp)
                               : combine_handle<DType::kBf16>(tiles_of_warp);
}

}  // namespace mla::cuda::sm90
