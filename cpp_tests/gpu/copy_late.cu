#include "copy_late.h"

namespace {

constexpr int kThreads = 256;

__global__ void copy_late_kernel(std::byte* to, const std::byte* from, size_t bytes) {
  asm volatile("griddepcontrol.launch_dependents;");
  for (int i = 0; i < 100; ++i) __nanosleep(1000);
  for (size_t i = threadIdx.x; i < bytes; i += kThreads) to[i] = from[i];
}

}  // namespace

void copy_late(std::byte* to, const std::byte* from, size_t bytes) {
  copy_late_kernel<<<1, kThreads>>>(to, from, bytes);
}
