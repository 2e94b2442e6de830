// One variant of the dense decode kernel.
#include "cuda/sm90/decode_dense_kernel.cuh"
MLA_INSTANTIATE(dense_bf16_d576)
