// wgmma: products of a warpgroup, one instruction a function. D (fp32, registers) = A x B + D, or A x B where accumulate is 0.
// "rs": A in registers, "ss": A in shared memory (K-major); B in shared memory, K-major, or "t": N-major (transposed).
#pragma once

#include <cstdint>

#include "problem.h"

namespace mla::cuda::sm90::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  static_assert(kPending >= 0 && kPending < 8);
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators across a wait: emits nothing.
template <int kCount>
__device__ __forceinline__ void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// A descriptor of an operand in shared memory: of all the kinds used here the upper half is the same, the 128-byte swizzle and 8 rows of 128 bytes
// every 1024 bytes. So it is enough to keep the lower half.
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
  constexpr uint32_t kStride = 1024 >> 4;
  constexpr uint32_t kSwizzle128 = uint32_t{1} << 30;
  return uint64_t{kStride | kSwizzle128} << 32 | low;
}

// Of a K-major operand: a row holds 64 elements of K.
__device__ __forceinline__ uint64_t k_major_descriptor(uint32_t shared) {
  constexpr uint32_t kUnused = uint32_t{1} << 16;
  return descriptor((shared & 0x3FFFF) >> 4 | kUnused);
}

// Of an N-major operand: a row holds 64 elements of N, the next 64 lie `group_bytes` on.
__device__ __forceinline__ uint64_t n_major_descriptor(uint32_t shared, uint32_t group_bytes) {
  return descriptor((shared & 0x3FFFF) >> 4 | group_bytes >> 4 << 16);
}

// The lower half, worked out here and not where it is used: what stands between a wait and the products behind it is waited for.
__device__ __forceinline__ uint32_t low_half_now(uint64_t whole) {
  uint32_t low = static_cast<uint32_t>(whole);
  asm volatile("" : "+r"(low));
  return low;
}

// What a descriptor grows by for an address `bytes` further on.
__host__ __device__ constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

// S[64 rows, 32 keys] += Q[64, 16] in registers x K[32, 16] K-major.
#define MLA_WGMMA_M64N32K16_RS(TYPE)                                                                                \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                                   \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                        \
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}"                                                                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
template <DType kDType>
__device__ __forceinline__ void wgmma_m64n32k16_rs(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kDType == DType::kBf16 || kDType == DType::kFp16);
  if constexpr (kDType == DType::kBf16) {
    MLA_WGMMA_M64N32K16_RS("bf16");
  } else {
    MLA_WGMMA_M64N32K16_RS("f16");
  }
}
#undef MLA_WGMMA_M64N32K16_RS

// S[64 rows, 32 keys] += Q[64, 16] in shared memory x K[32, 16] K-major.
#define MLA_WGMMA_M64N32K16_SS(TYPE)                                                                                \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                                   \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                        \
      "}, %16, %17, p, 1, 1, 0, 0;\n}"                                                                              \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                    \
      : "l"(a), "l"(b), "r"(accumulate))
template <DType kDType>
__device__ __forceinline__ void wgmma_m64n32k16_ss(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kDType == DType::kBf16 || kDType == DType::kFp16);
  if constexpr (kDType == DType::kBf16) {
    MLA_WGMMA_M64N32K16_SS("bf16");
  } else {
    MLA_WGMMA_M64N32K16_SS("f16");
  }
}
#undef MLA_WGMMA_M64N32K16_SS

// The same of 64 keys.
#define MLA_WGMMA_M64N64K16_RS(TYPE)                                                                                \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                   \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                              \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                                                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
template <DType kDType>
__device__ __forceinline__ void wgmma_m64n64k16_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(kDType == DType::kBf16 || kDType == DType::kFp16);
  if constexpr (kDType == DType::kBf16) {
    MLA_WGMMA_M64N64K16_RS("bf16");
  } else {
    MLA_WGMMA_M64N64K16_RS("f16");
  }
}
#undef MLA_WGMMA_M64N64K16_RS

#define MLA_WGMMA_M64N64K16_SS(TYPE)                                                                                \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                                   \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                              \
      "}, %32, %33, p, 1, 1, 0, 0;\n}"                                                                              \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                   \
      : "l"(a), "l"(b), "r"(accumulate))
template <DType kDType>
__device__ __forceinline__ void wgmma_m64n64k16_ss(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kDType == DType::kBf16 || kDType == DType::kFp16);
  if constexpr (kDType == DType::kBf16) {
    MLA_WGMMA_M64N64K16_SS("bf16");
  } else {
    MLA_WGMMA_M64N64K16_SS("f16");
  }
}
#undef MLA_WGMMA_M64N64K16_SS

// Scores of 32 or of 64 keys.
template <DType kDType>
__device__ __forceinline__ void wgmma_scores_rs(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  wgmma_m64n32k16_rs<kDType>(d, a, b, accumulate);
}
template <DType kDType>
__device__ __forceinline__ void wgmma_scores_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  wgmma_m64n64k16_rs<kDType>(d, a, b, accumulate);
}
template <DType kDType>
__device__ __forceinline__ void wgmma_scores_ss(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  wgmma_m64n32k16_ss<kDType>(d, a, b, accumulate);
}
template <DType kDType>
__device__ __forceinline__ void wgmma_scores_ss(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  wgmma_m64n64k16_ss<kDType>(d, a, b, accumulate);
}

// O[64 rows, 128 columns] += P[64, 16 keys] in shared memory x V[16 keys, 128] N-major.
#define MLA_WGMMA_M64N128K16_SS_T(TYPE)                                                                             \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                  \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                              \
      "}, %64, %65, p, 1, 1, 0, 1;\n}"                                                                              \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),     \
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),     \
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),     \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),     \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                   \
      : "l"(a), "l"(b), "r"(accumulate))
template <DType kDType>
__device__ __forceinline__ void wgmma_m64n128k16_ss_t(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kDType == DType::kBf16 || kDType == DType::kFp16);
  if constexpr (kDType == DType::kBf16) {
    MLA_WGMMA_M64N128K16_SS_T("bf16");
  } else {
    MLA_WGMMA_M64N128K16_SS_T("f16");
  }
}
#undef MLA_WGMMA_M64N128K16_SS_T

}  // namespace mla::cuda::sm90::ptx
