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
  // Words (low[i], high[i]) rounded to bf16. Returns the sums of both as they were rounded.
  static V store_pairs(void* p, V low, V high) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    const __m512i words = _mm512_permutexvar_epi16(pair_order(), halves);
    _mm512_storeu_si512(p, words);
    const V one = reinterpret_cast<V>(_mm512_set1_epi32(0x3f803f80));
    return dot_pairs(zero(), reinterpret_cast<V>(words), one);
  }
  // A bf16 next to a positive x, in fp32; ties go up.
  static V nearest_bf16(V x) {
    const __m512i up = _mm512_add_epi32(reinterpret_cast<__m512i>(x), _mm512_set1_epi32(0x8000));
    return reinterpret_cast<V>(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  // 32 bf16 columns of two rows as words (a[i], b[i]).
  static void interleave(const void* a, const void* b, uint32_t* words) {
    store_words(_mm512_loadu_si512(a), _mm512_loadu_si512(b), words);
  }
  // The first n of them, the others 0.
  static void interleave(const void* a, const void* b, int n, uint32_t* words) {
    const __mmask32 mask = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    store_words(_mm512_maskz_loadu_epi16(mask, a), _mm512_maskz_loadu_epi16(mask, b), words);
  }

  static void store_bf16(void* p, V v) {
    _mm256_storeu_si256(static_cast<__m256i_u*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }

 private:
  static void store_words(__m512i a, __m512i b, uint32_t* words) {
    const __m512i first = pair_order(32), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(words, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi16(a, second, b));
  }
  // 16-bit places 0, distance, 1, 1 + distance, ...
  static __m512i pair_order(int distance = 16) {
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(distance)), 16));
  }
};

}  // namespace
}  // namespace mla::cpu
