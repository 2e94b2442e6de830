// Facts of a device, read once, and the current device kept as the caller left it.
#pragma once

#include <string>

#include "cuda/cuda_status.h"

namespace mla::cuda {

struct DeviceInfo {
  bool is_sm90 = false;
  int multiprocessors = 0;
  int max_shared_bytes = 0;  // of one CTA, opted in
  std::string refusal;       // why it cannot run the kernels; "" if it can
};

// Number of devices, or 0 and the reason. Creates no CUDA context.
int device_count(std::string* reason);

// Never fails: a device that cannot be asked has a refusal. Creates no CUDA context.
const DeviceInfo& device_info(int ordinal);

// Makes a device current for a scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = -1;  // >= 0: to be restored
  cudaError_t error_ = cudaSuccess;
};

}  // namespace mla::cuda
