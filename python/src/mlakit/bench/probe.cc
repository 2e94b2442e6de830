// What one core of this machine can do at most: multiply-adds in registers for each instruction set, and a read sweep over memory.
// A library of its own for bench/roofs.py (ctypes): nothing here is part of mlakit's API.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Hides where a value comes from and keeps the loop that made it. Chains that began with the same known value would be one to the compiler.
template <class T>
void keep(T& value) {
  asm volatile("" : "+x"(value));
}

constexpr int kChains = 12;  // independent sums: more than latency times issue width of any core so far
constexpr int kSteps = 20000;

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bf16"))) double flop_avx512bf16() {
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80), b = (__m512bh)_mm512_set1_epi32(0x00800080);
  __m512 sum[kChains] = {};
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, a, b);
  }
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  return 64.0 * kChains * kSteps;
}

__attribute__((target("avx512f"))) double flop_avx512() {
  __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.5f), sum[kChains] = {};
  keep(a);
  keep(b);
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm512_fmadd_ps(s, a, b);
  }
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  return 32.0 * kChains * kSteps;
}

__attribute__((target("avx2,fma"))) double flop_avx2() {
  __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.5f), sum[kChains] = {};
  keep(a);
  keep(b);
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(s, a, b);
  }
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  return 16.0 * kChains * kSteps;
}
#endif

// The baseline of the architecture, in the vectors that every compiler has.
double flop_scalar() {
  typedef float Float4 __attribute__((vector_size(16)));
  Float4 a = {0.999f, 0.999f, 0.999f, 0.999f}, b = {0.5f, 0.5f, 0.5f, 0.5f}, sum[kChains] = {};
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& s : sum) s = s * a + b;
  }
#pragma GCC unroll 12
  for (auto& s : sum) keep(s);
  return 8.0 * kChains * kSteps;
}

using Loop = double (*)();

Loop loop_of(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return flop_scalar;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512bf16") == 0 && __builtin_cpu_supports("avx512bf16")) return flop_avx512bf16;
  if (std::strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512f")) return flop_avx512;
  if (std::strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return flop_avx2;
#endif
  return nullptr;
}

}  // namespace

extern "C" {

// GFLOP/s of this thread over at least that many seconds; 0 if this CPU lacks the instruction set.
__attribute__((visibility("default"))) double mlakit_probe_gflops(const char* isa, double seconds) {
  const Loop loop = loop_of(isa);
  if (loop == nullptr) return 0;
  loop();  // wakes the wide units
  const auto begin = Clock::now();
  double flop = 0, elapsed = 0;
  while (elapsed < seconds) {
    flop += loop();
    elapsed = seconds_since(begin);
  }
  return flop / elapsed * 1e-9;
}

// GB/s of this thread reading the memory repeatedly over at least that many seconds. The count of words is a multiple of 8.
__attribute__((visibility("default"))) double mlakit_probe_read(const uint64_t* data, size_t words, double seconds) {
  const auto begin = Clock::now();
  double bytes = 0, elapsed = 0;
  while (elapsed < seconds) {
    uint64_t sum[8] = {};
    for (size_t i = 0; i < words; i += 8) {
      for (size_t j = 0; j < 8; ++j) sum[j] ^= data[i + j];
    }
    for (auto& s : sum) asm volatile("" ::"r"(s));
    bytes += 8.0 * static_cast<double>(words);
    elapsed = seconds_since(begin);
  }
  return bytes / elapsed * 1e-9;
}
}
