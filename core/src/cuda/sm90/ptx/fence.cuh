// Fences between ordinary shared-memory accesses and those of the copy engine and the tensor cores (the async proxy).
#pragma once

namespace mla::cuda::sm90::ptx {

// Between a write of shared memory by st.shared or stmatrix and its use by wgmma or TMA: by each writing thread before the barrier that hands it over,
// or by each using thread behind that barrier (the fence may stand anywhere on the path of causality from one to the other).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace mla::cuda::sm90::ptx
