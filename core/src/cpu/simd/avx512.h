// Sixteen fp32 lanes: AVX-512 F, BW, DQ, VL. The members are those of simd/scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mla::cpu {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kTileA = 8;  // 16 accumulators cover the latency of the multiplier
  static constexpr bool kHasBf16Pairs = false;
  static constexpr float kZeroExponent = -256.0f;  // scale_by_pow2 with it gives 0
  using V = __m512;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const void* p) { return _mm512_loadu_ps(p); }
  static void store(void* p, V v) { _mm512_storeu_ps(p, v); }
  static V broadcast(const void* word) {
    int32_t x;
    __builtin_memcpy(&x, word, sizeof x);
    return _mm512_castsi512_ps(_mm512_set1_epi32(x));
  }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V where_greater(V a, V b, V yes, V no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  static bool any_greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static V keep_below(V x, int32_t t, const int32_t* limit) {
    const __mmask16 keep = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(limit), _mm512_set1_epi32(t));
    return _mm512_mask_blend_ps(keep, set1(-__builtin_inff()), x);
  }
  static V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V scale_by_pow2(V x, V n) { return _mm512_scalef_ps(x, n); }

  static V load_bf16(const void* p) {
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i_u*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static void store_bf16(void* p, V v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(static_cast<__m256i_u*>(p), _mm512_cvtepi32_epi16(words));
  }
  static V load_fp16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i_u*>(p))); }
  static void store_fp16(void* p, V v) {
    _mm256_storeu_si256(static_cast<__m256i_u*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace
}  // namespace mla::cpu
