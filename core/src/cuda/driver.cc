#include "cuda/driver.h"

#include "cuda/cuda_status.h"

namespace mla::cuda {
namespace {

struct EntryPoint {
  void* function = nullptr;
  cudaError_t error = cudaSuccess;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
};

EntryPoint look_up(const char* name, unsigned version) {
  EntryPoint entry;
  entry.error = cudaGetDriverEntryPointByVersion(name, &entry.function, version, cudaEnableDefault, &entry.result);
  return entry;
}

}  // namespace

Status tensor_map_encoder(TensorMapEncodeTiledFn* out) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  static const EntryPoint entry = look_up(kName, 12000);
  MLA_RETURN_IF_ERROR(to_status(entry.error, "cudaGetDriverEntryPointByVersion"));
  if (entry.result != cudaDriverEntryPointSuccess || entry.function == nullptr) {
    return make_status(MLA_NO_DRIVER, "driver: expected the entry point %s (CUDA 12.0), got a driver without it",
                       kName);
  }
  *out = reinterpret_cast<TensorMapEncodeTiledFn>(entry.function);
  return Status::ok();
}

}  // namespace mla::cuda
