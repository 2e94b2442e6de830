#include "cuda/device_info.h"

#include <array>
#include <mutex>

namespace mla::cuda {
namespace {

constexpr int kMaxDevices = 64;

DeviceInfo read_device(int ordinal) {
  DeviceInfo info;
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&info.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  const std::string name = "CUDA device " + std::to_string(ordinal);
  if (error != cudaSuccess) {
    cudaGetLastError();  // reported here, not by the caller's next check
    info.refusal = name + " cannot be asked: " + cudaGetErrorName(error);
  } else if (major != 9 || minor != 0) {
    info.refusal = name + " has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                   ", the kernels need 9.0 (Hopper)";
  } else {
    info.is_sm90 = true;
  }
  return info;
}

}  // namespace

int device_count(std::string* reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return count;
  if (error != cudaSuccess) cudaGetLastError();
  *reason = error == cudaSuccess || error == cudaErrorNoDevice ? std::string("no CUDA device")
            : error == cudaErrorInsufficientDriver
                ? std::string("no CUDA driver, or one older than this build's CUDA runtime needs")
                : std::string("CUDA: ") + cudaGetErrorName(error);
  return 0;
}

const DeviceInfo& device_info(int ordinal) {
  static std::array<DeviceInfo, kMaxDevices> infos;
  static std::array<std::once_flag, kMaxDevices> is_read;
  static const DeviceInfo out_of_range{false, 0, 0, "CUDA ordinals go up to 63"};
  if (ordinal < 0 || ordinal >= kMaxDevices) return out_of_range;
  const size_t i = static_cast<size_t>(ordinal);
  std::call_once(is_read[i], [i, ordinal] { infos[i] = read_device(ordinal); });
  return infos[i];
}

CurrentDevice::CurrentDevice(int ordinal) {
  int current = 0;
  error_ = cudaGetDevice(&current);
  if (error_ != cudaSuccess || current == ordinal) return;
  error_ = cudaSetDevice(ordinal);
  if (error_ == cudaSuccess) previous_ = current;
}

CurrentDevice::~CurrentDevice() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace mla::cuda
