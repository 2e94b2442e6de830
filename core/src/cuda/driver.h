// Driver entry points, found at run time: the library never links libcuda, so it loads on machines without a driver.
#pragma once

#include <cuda.h>

#include "status.h"

namespace mla::cuda {

using TensorMapEncodeTiledFn = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                            CUtensorMapFloatOOBfill);

// cuTensorMapEncodeTiled, looked up on the first call.
Status tensor_map_encoder(TensorMapEncodeTiledFn* out);

}  // namespace mla::cuda
