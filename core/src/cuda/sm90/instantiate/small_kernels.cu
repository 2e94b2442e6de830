// The kernels around decode: schedule, combine, merge.
#include "cuda/sm90/combine_kernel.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/merge_kernel.cuh"
#include "cuda/sm90/schedule_kernel.cuh"

namespace mla::cuda::sm90 {

const void* schedule_kernel_handle() { return reinterpret_cast<const void*>(&schedule_kernel); }
const void* merge_kernel_handle() { return reinterpret_cast<const void*>(&merge_kernel); }
const void* combine_kernel_handle(DType dtype) {
  return dtype == DType::kFp16 ? reinterpret_cast<const void*>(&combine_kernel<DType::kFp16>)
                               : reinterpret_cast<const void*>(&combine_kernel<DType::kBf16>);
}

}  // namespace mla::cuda::sm90
