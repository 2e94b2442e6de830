// Eight fp32 lanes: AVX2, FMA and F16C. The members are those of simd/scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mla::cpu {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kTileA = 6;  // 12 accumulators, 2 vectors and 1 broadcast in 16 registers
  static constexpr bool kHasBf16Pairs = false;
  static constexpr float kZeroExponent = -127.0f;  // scale_by_pow2 with it gives 0
  using V = __m256;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V load(const void* p) { return _mm256_castsi256_ps(_mm256_loadu_si256(static_cast<const __m256i_u*>(p))); }
  static void store(void* p, V v) { _mm256_storeu_si256(static_cast<__m256i_u*>(p), _mm256_castps_si256(v)); }
  static V broadcast(const void* word) {
    int32_t x;
    __builtin_memcpy(&x, word, sizeof x);
    return _mm256_castsi256_ps(_mm256_set1_epi32(x));
  }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V where_greater(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static bool any_greater(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
  static V keep_below(V x, int32_t t, const int32_t* limit) {
    const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(limit));
    const __m256i keep = _mm256_cmpgt_epi32(l, _mm256_set1_epi32(t));
    return _mm256_blendv_ps(set1(-__builtin_inff()), x, _mm256_castsi256_ps(keep));
  }
  static V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V scale_by_pow2(V x, V n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  }

  static V load_bf16(const void* p) {
    const __m128i h = _mm_loadu_si128(static_cast<const __m128i_u*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static void store_bf16(void* p, V v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(static_cast<__m128i_u*>(p), _mm256_castsi256_si128(packed));
  }
  static V load_fp16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i_u*>(p))); }
  static void store_fp16(void* p, V v) {
    _mm_storeu_si128(static_cast<__m128i_u*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace
}  // namespace mla::cpu
