// CUDA error codes as Status.
#pragma once

#include <cuda_runtime_api.h>

#include "status.h"

namespace mla::cuda {

// MLA_OK, or MLA_CUDA_ERROR (MLA_NO_DRIVER) with CUDA's own name; `what` is the call.
inline Status to_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::ok();
  const bool has_no_driver =
      error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || error == cudaErrorStubLibrary;
  return make_status(has_no_driver ? MLA_NO_DRIVER : MLA_CUDA_ERROR, "%s: expected cudaSuccess, got %s (%s)", what,
                     cudaGetErrorName(error), cudaGetErrorString(error));
}

}  // namespace mla::cuda
