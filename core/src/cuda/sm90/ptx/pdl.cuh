// Programmatic dependent launch.
#pragma once

namespace mla::cuda::sm90::ptx {

// Nothing that an earlier kernel of the stream wrote may be read, and nothing it reads may be written, before this returns.
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel of the stream start up (it still waits for this one's end before it reads).
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace mla::cuda::sm90::ptx
