// One way to launch a kernel: a handle, a shape, one struct of parameters.
#pragma once

#include "cuda/cuda_status.h"

namespace mla::cuda {

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  unsigned cluster = 1;  // CTAs along x that form a cluster
  size_t shared_bytes = 0;
};

// Enqueues the kernel with programmatic dependent launch: it may start before the stream's previous kernel has ended, and waits for it by
// griddepcontrol.wait.
template <class Params>
Status launch(const void* kernel, const char* name, const LaunchShape& shape, const Params& params, void* stream) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = shape.cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  void* arguments[] = {const_cast<Params*>(&params)};
  return to_status(cudaLaunchKernelExC(&config, kernel, arguments), name);
}

}  // namespace mla::cuda
