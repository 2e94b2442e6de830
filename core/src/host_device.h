// MLA_HD marks a function that host code and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define MLA_HD __host__ __device__
#else
#define MLA_HD
#endif
