#include "cuda/tensor_map.h"

#include <cinttypes>

#include "cuda/driver.h"

namespace mla::cuda {

Status encode_tensor_map(const layout::TmaBox& box, DType dtype, const char* name, CUtensorMap* out) {
  constexpr int64_t kAlignment = 16;
  constexpr int64_t kMaxStride = int64_t{1} << 40;
  if (reinterpret_cast<uintptr_t>(box.base) % kAlignment != 0) {
    return unsupported("%s: the copy engine needs data aligned to 16 bytes, got address %p", name, box.base);
  }
  cuuint64_t size[layout::kTmaDims], stride[layout::kTmaDims - 1];
  cuuint32_t count[layout::kTmaDims], element_stride[layout::kTmaDims];
  for (int i = 0; i < layout::kTmaDims; ++i) {
    size[i] = static_cast<cuuint64_t>(box.size[i]);
    count[i] = static_cast<cuuint32_t>(box.box[i]);
    element_stride[i] = 1;
  }
  for (int i = 0; i < layout::kTmaDims - 1; ++i) {
    if (box.stride_bytes[i] <= 0 || box.stride_bytes[i] % kAlignment != 0 || box.stride_bytes[i] >= kMaxStride) {
      return unsupported(
          "%s: the copy engine needs strides that are positive multiples of 8 elements below 2^39, got %" PRId64, name,
          box.stride_bytes[i] / 2);
    }
    stride[i] = static_cast<cuuint64_t>(box.stride_bytes[i]);
  }
  TensorMapEncodeTiledFn encode = nullptr;
  MLA_RETURN_IF_ERROR(tensor_map_encoder(&encode));
  const CUresult result = encode(
      out, dtype == DType::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, layout::kTmaDims,
      const_cast<void*>(box.base), size, stride, count, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return make_status(MLA_CUDA_ERROR, "%s: cuTensorMapEncodeTiled returned %d", name, static_cast<int>(result));
  return Status::ok();
}

}  // namespace mla::cuda
