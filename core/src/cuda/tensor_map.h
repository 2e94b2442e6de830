// TmaBox -> CUtensorMap.
#pragma once

#include <cuda.h>

#include "layout/tma_box.h"
#include "problem.h"
#include "status.h"

namespace mla::cuda {

// Encodes the box for two-byte elements with the 128-byte swizzle. `name` is the tensor's, for messages. No allocation.
Status encode_tensor_map(const layout::TmaBox& box, DType dtype, const char* name, CUtensorMap* out);

}  // namespace mla::cuda
