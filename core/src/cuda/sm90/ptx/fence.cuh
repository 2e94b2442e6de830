// Fences between ordinary shared-memory accesses and those of the copy engine and the tensor cores (the async proxy).
#pragma once

namespace mla::cuda::sm90::ptx {

// Before the barrier that hands over shared memory written by st.shared or stmatrix to wgmma or TMA; by each writing thread.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace mla::cuda::sm90::ptx
