// AVX-512 with vdpbf16ps: one instruction multiplies 16 pairs of bf16 and adds both products to 16 fp32 lanes.
#pragma once

#include "cpu/simd/avx512.h"

namespace mla::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kHasBf16Pairs = true;

  // acc + a.low * b.low + a.high * b.high in each lane.
  static V dot_pairs(V acc, V a, V b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Words (low[i], high[i]) rounded to bf16.
  static void store_pairs(void* p, V low, V high) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(pair_order(0), halves));
  }
  // Up to 32 bf16 columns of two rows as words (a[i], b[i]); columns from n on, and b where it is null, become 0.
  static void interleave(const void* a, const void* b, int n, V* words_low, V* words_high) {
    const __mmask32 mask = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    const __m512i va = _mm512_maskz_loadu_epi16(mask, a);
    const __m512i vb = b == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, b);
    *words_low = _mm512_castsi512_ps(_mm512_permutex2var_epi16(va, interleave_order(0), vb));
    *words_high = _mm512_castsi512_ps(_mm512_permutex2var_epi16(va, interleave_order(16), vb));
  }

  static void store_bf16(void* p, V v) { _mm256_storeu_si256(static_cast<__m256i_u*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v))); }

 private:
  // 16-bit places 0, step, 1, 1 + step, ...
  static __m512i pair_order(int) {
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(16)), 16));
  }
  static __m512i interleave_order(int first) {
    const __m512i i = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(first));
    return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(32)), 16));
  }
};

}  // namespace
}  // namespace mla::cpu
