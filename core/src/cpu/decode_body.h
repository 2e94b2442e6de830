// MLA attention of up to a few hundred query rows to one request's keys: the algorithm once, over the vector operations of an ISA.
//
// For rows R, keys T of a block, all in one pass over the cache (README.md has the reasons and the numbers):
//
//   scores  S[T, R] = K[T, head_dim] Q^T       lanes are rows: words of K are broadcast from where they are, Q is packed once
//   softmax over T, down the columns of S      no sum across lanes; the maximum moves only when it grows by more than 2^8
//   out     O[R, V] = O * rescale + W^T[R, T] K[T, 0:value_dim]     lanes are columns: weights are broadcast
//
// Both products are tiles of kTileA broadcast words by kStripVectors vectors, summed in registers, over words of 32 bits (kernel.h).
// Everything here has internal linkage (kernel.h says why), and uses nothing from the standard library that has a body.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "shard.h"

namespace mla::cpu {
namespace {

constexpr float kMinusInf = -__builtin_inff();
constexpr int kStripVectors = 2;   // vectors of a tile of either product
constexpr float kLazyLog2 = 8.0f;  // weights in fp32 may grow to 2^8 before the running maximum follows
constexpr int32_t kExpKeys = 4;    // keys whose weights are computed together

// Units in which weights may be rounded to bf16. They have few bits, so that a weight of 1 is exact in each.
constexpr int kUnits = 3;
constexpr float unit(int u) { return 1.0f + static_cast<float>(u) / 4; }

constexpr int32_t min_int(int64_t a, int64_t b) { return static_cast<int32_t>(a < b ? a : b); }
constexpr int32_t round_up(int32_t n, int32_t to) { return (n + to - 1) / to * to; }
constexpr int elem_bytes(Elem e) { return e == Elem::kFp32 ? 4 : 2; }

inline const char* element(const void* base, Elem e, int64_t index) {
  return static_cast<const char*>(base) + index * elem_bytes(e);
}

// step(): keys between two looks at the running maximum. A longer step reads and writes out less often, a shorter one leaves more of the
// first-level cache to the strips of values.
template <class S>
struct Fp32Words {
  static constexpr int kPair = 1;
  static constexpr int32_t step(int32_t) { return 64; }
  static typename S::V mac(typename S::V acc, typename S::V a, typename S::V b) { return S::fma(a, b, acc); }
};

template <class S>
struct Bf16Words {
  static constexpr int kPair = 2;
  static constexpr int32_t step(int32_t rows) { return rows >= 8 ? kMaxStep : 64; }
  static typename S::V mac(typename S::V acc, typename S::V a, typename S::V b) { return S::dot_pairs(acc, a, b); }
};

// ---------------------------------------------------------------- rows ----------------------------------------------------------------

template <class S>
typename S::V load_elems(const char* p, Elem e) {
  if (e == Elem::kFp32) return S::load(p);
  return e == Elem::kBf16 ? S::load_bf16(p) : S::load_fp16(p);
}

// dst[0:n] = src[0:n] as fp32; writes whole vectors, zeros after n.
template <class S>
void load_row(float* dst, const char* src, Elem e, int32_t n) {
  int32_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) S::store(dst + i, load_elems<S>(src + i * elem_bytes(e), e));
  if (i < n) {
    alignas(64) char tail[S::kLanes * 4] = {};
    __builtin_memcpy(tail, src + i * elem_bytes(e), static_cast<unsigned>((n - i) * elem_bytes(e)));
    S::store(dst + i, load_elems<S>(tail, e));
  }
}

template <class S>
void store_elems(char* p, Elem e, typename S::V v) {
  if (e == Elem::kFp32)
    S::store(p, v);
  else if (e == Elem::kBf16)
    S::store_bf16(p, v);
  else
    S::store_fp16(p, v);
}

template <class S>
void store_row(void* out, Elem e, const float* row, float scale, int64_t n) {
  char* dst = static_cast<char*>(out);
  const typename S::V vscale = S::set1(scale);
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes)
    store_elems<S>(dst + i * elem_bytes(e), e, S::mul(S::load(row + i), vscale));
  if (i < n) {
    alignas(64) float in[S::kLanes] = {};
    alignas(64) char tail[S::kLanes * 4];
    __builtin_memcpy(in, row + i, static_cast<uint64_t>(n - i) * 4);
    store_elems<S>(tail, e, S::mul(S::load(in), vscale));
    __builtin_memcpy(dst + i * elem_bytes(e), tail, static_cast<uint64_t>(n - i) * elem_bytes(e));
  }
}

template <class S>
void add_part(float* sum, float weight, const void* part, Elem e, int64_t n) {
  const char* src = static_cast<const char*>(part);
  const typename S::V w = S::set1(weight);
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) {
    const typename S::V x = S::mul(w, load_elems<S>(src + i * elem_bytes(e), e));
    S::store(sum + i, S::add(S::load(sum + i), x));
  }
  if (i < n) {
    alignas(64) char tail[S::kLanes * 4] = {};
    alignas(64) float x[S::kLanes];
    __builtin_memcpy(tail, src + i * elem_bytes(e), static_cast<uint64_t>(n - i) * elem_bytes(e));
    S::store(x, S::mul(w, load_elems<S>(tail, e)));
    for (int j = 0; i + j < n; ++j) sum[i + j] += x[j];
  }
}

// ---------------------------------------------------------------- tiles ---------------------------------------------------------------

// The keys of a step where they lie: key t is words[0] words at row[0][t], then words[1] words at row[1][t].
struct Keys {
  const char* row[2][kMaxStep + 1];
  int32_t words[2];
};

// The step that comes next, in cache lines. A tile fetches the rows of its own keys' places as it goes, so that the misses are spread
// over the whole product.
struct Ahead {
  const char* row[2][kMaxStep];
  int32_t lines[2];  // 0: nothing to fetch
};
constexpr int kLineBytes = 64;
constexpr int kLineWords = kLineBytes / 4;

struct ScoreArgs {
  const Keys* keys;
  int32_t first, last;  // the tile's keys [first, first + kTileA), of which those before last are there
  const Ahead* ahead;   // null: nothing to fetch
  const uint32_t* q;    // [words][NV vectors]
  float scale;
  float* scores;  // [kTileA][NV vectors], of the tile's first key
};

// scores[t][lane] = scale * sum over words of K[t][word] * Q[word][lane], for kTileA keys and NV vectors of rows.
// Not inlined, as value_tile is not: among other code the compiler would keep its pointers on the stack.
template <class S, class M, int NV>
[[gnu::noinline]] void score_tile(const ScoreArgs& a) {
  using V = typename S::V;
  V acc[S::kTileA][NV];
#pragma GCC unroll 8
  for (int t = 0; t < S::kTileA; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[t][v] = S::zero();
  const uint32_t* q = a.q;
  for (int view = 0; view < 2; ++view) {
    const char* row[S::kTileA];
#pragma GCC unroll 8
    for (int t = 0; t < S::kTileA; ++t) row[t] = a.keys->row[view][a.first + t < a.last ? a.first + t : a.last - 1];
    const int64_t words = a.keys->words[view];
    const int64_t lines = a.ahead == nullptr ? 0 : a.ahead->lines[view];
    for (int64_t k = 0, line = 0; k < words; ++line) {
      if (line < lines) {
#pragma GCC unroll 8
        for (int t = 0; t < S::kTileA; ++t)
          __builtin_prefetch(a.ahead->row[view][min_int(a.first + t, kMaxStep - 1)] + line * kLineBytes, 0, 2);
      }
      for (const int64_t end = k + kLineWords < words ? k + kLineWords : words; k < end; ++k) {
        V b[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) b[v] = S::load(q + v * S::kLanes);
        q += NV * S::kLanes;
#pragma GCC unroll 8
        for (int t = 0; t < S::kTileA; ++t) {
          const V x = S::broadcast(row[t] + 4 * k);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) acc[t][v] = M::mac(acc[t][v], x, b[v]);
        }
      }
    }
  }
  const V vscale = S::set1(a.scale);
#pragma GCC unroll 8
  for (int t = 0; t < S::kTileA; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) S::store(a.scores + (t * NV + v) * S::kLanes, S::mul(acc[t][v], vscale));
}

// What happens to the sum that is there: nothing yet, kept, or scaled row by row.
enum class Before { kNothing, kKeep, kRescale };

struct ValueArgs {
  const uint32_t* weights;  // [steps][weights_stride], at the tile's first row
  int64_t weights_stride;
  int32_t steps;           // words of the summed dimension
  const uint32_t* values;  // [steps][values_stride], at the tile's first column
  int64_t values_stride;
  float* out;  // at the tile's first row and column
  int64_t out_stride;
  const float* rescale;  // of the tile's first row
  Before before;
  // Pack::kNext: the columns of the strip after this one, from the key rows, become words [steps][kStripVectors vectors] at packed.
  const char* const* rows;
  int64_t packed_byte;  // of the first column in a row
  uint32_t* packed;
};

enum class Pack { kNone, kNext };

// out[r][lane] = out[r][lane] * rescale[r] + sum over steps of weights[step][r] * values[step][lane], for NR rows and NV vectors.
template <class S, class M, int NR, int NV, Pack kPack>
[[gnu::noinline]] void value_tile(const ValueArgs& a) {
  using V = typename S::V;
  V acc[NR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v)
      acc[r][v] = a.before == Before::kNothing ? S::zero() : S::load(a.out + r * a.out_stride + v * S::kLanes);
  if (a.before == Before::kRescale) {
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[r][v] = S::mul(acc[r][v], S::broadcast(a.rescale + r));
  }
  const uint32_t* w = a.weights;
  const uint32_t* x = a.values;
  for (int32_t k = 0; k < a.steps; ++k) {
    if constexpr (kPack == Pack::kNext) {
      S::interleave(a.rows[2 * k] + a.packed_byte, a.rows[2 * k + 1] + a.packed_byte, a.packed + k * 2 * S::kLanes);
    }
    V b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) b[v] = S::load(x + v * S::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const V p = S::broadcast(w + r);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[r][v] = M::mac(acc[r][v], p, b[v]);
    }
    w += a.weights_stride;
    x += a.values_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) S::store(a.out + r * a.out_stride + v * S::kLanes, acc[r][v]);
}

// Turns the run-time rows of an edge tile into a compile-time size.
template <class S, class M, int NV, Pack kPack, int NR = S::kTileA>
void value_tile_of(int rows, const ValueArgs& a) {
  if constexpr (NR > 1) {
    if (rows < NR) return value_tile_of<S, M, NV, kPack, NR - 1>(rows, a);
  }
  value_tile<S, M, NR, NV, kPack>(a);
}

// ---------------------------------------------------------------- softmax -------------------------------------------------------------

// x[i] = 2^x[i] for x < 127; exactly 0 for -inf; NaN stays NaN. Relative error below 1e-7. Several at once, since each step waits for the
// one before it. Always inlined, as mask_and_max is: in a function of its own GCC 12 warns of values that its header leaves undefined.
template <class S, int N>
[[gnu::always_inline]] inline void exp2(typename S::V (&x)[N]) {
  using V = typename S::V;
  // (2^f - 1) / f on [-1/2, 1/2], Chebyshev, so that 2^0 is exactly 1.
  constexpr float kTerms[] = {1.5461447463365068e-4f,
                              1.339086735133181e-3f,
                              9.618056669885529e-3f,
                              5.550357104253126e-2f,
                              2.402265092234275e-1f,
                              6.931471880293425e-1f,
                              1.0f};
  V n[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    x[i] = S::max(S::set1(S::kZeroExponent), x[i]);  // the second operand is the result when it is NaN
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) n[i] = S::round(x[i]);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = S::sub(x[i], n[i]);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = S::set1(kTerms[0]);
#pragma GCC unroll 8
  for (int k = 1; k < 7; ++k)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = S::fma(p[i], x[i], S::set1(kTerms[k]));
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = S::scale_by_pow2(p[i], n[i]);
}

template <class S>
[[gnu::always_inline]] inline typename S::V exp2(typename S::V x) {
  typename S::V all[1] = {x};
  exp2<S, 1>(all);
  return all[0];
}

enum class Mask { kNone, kRowLimits };

// Scores of a whole number of groups of keys: those after the last are -inf.
template <class S>
int32_t pad_scores(float* scores, int32_t n, int32_t stride) {
  const int32_t padded = round_up(n, kExpKeys);
  for (int32_t t = n; t < padded; ++t) S::store(scores + t * stride, S::set1(kMinusInf));
  return padded;
}

// The largest of n scores of each row, n a whole number of groups; masked scores become -inf. Passes over NaN: it comes through the weights.
template <class S>
[[gnu::always_inline]] inline typename S::V mask_and_max(float* scores, int32_t n, int32_t stride, const int32_t* limit,
                                                         Mask mask) {
  using V = typename S::V;
  if (mask == Mask::kRowLimits) {
    for (int32_t t = 0; t < n; ++t)
      S::store(scores + t * stride, S::keep_below(S::load(scores + t * stride), t, limit));
  }
  V largest[kExpKeys];  // a chain of one would wait for its own latency
#pragma GCC unroll 8
  for (int i = 0; i < kExpKeys; ++i) largest[i] = S::set1(kMinusInf);
  for (int32_t t = 0; t < n; t += kExpKeys) {
#pragma GCC unroll 8
    for (int i = 0; i < kExpKeys; ++i) largest[i] = S::max(S::load(scores + (t + i) * stride), largest[i]);
  }
#pragma GCC unroll 8
  for (int i = 1; i < kExpKeys; ++i) largest[0] = S::max(largest[i], largest[0]);
  return largest[0];
}

// What scores are relative to. A row that has seen nothing but -inf keeps weights 2^(-inf - 0) = 0.
template <class S>
typename S::V finite_reference(typename S::V max) {
  return S::where_greater(max, S::set1(kMinusInf), max, S::zero());
}

// Scores [n][stride] of one vector of rows to weights [n words][weights_stride]; moves the rows' maximum and sum. Returns whether a
// maximum moved: out must then be multiplied by rescale.
template <class S>
bool softmax_fp32(const LaneScratch& w, float* scores, int32_t n, int32_t stride, int32_t weights_stride,
                  int32_t first_lane, Mask mask) {
  using V = typename S::V;
  uint32_t* weights = w.weights + first_lane;
  const V old_max = S::load(w.row_max + first_lane);
  const int32_t padded = pad_scores<S>(scores, n, stride);
  const V block_max = mask_and_max<S>(scores, padded, stride, w.limit + first_lane, mask);
  V new_max = old_max;
  const V bound = S::add(old_max, S::set1(kLazyLog2));
  const bool moved = S::any_greater(block_max, bound);
  V sum = S::load(w.row_sum + first_lane);
  if (moved) {
    new_max = S::where_greater(block_max, bound, block_max, old_max);
    const V rescale = S::where_greater(block_max, bound, exp2<S>(S::sub(old_max, new_max)), S::set1(1.0f));
    S::store(w.rescale + first_lane, rescale);
    S::store(w.row_max + first_lane, new_max);
    sum = S::mul(sum, rescale);
  } else {
    S::store(w.rescale + first_lane, S::set1(1.0f));
  }
  const V reference = finite_reference<S>(new_max);
  for (int32_t t = 0; t < padded; t += kExpKeys) {
    V weight[kExpKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kExpKeys; ++i) weight[i] = S::sub(S::load(scores + (t + i) * stride), reference);
    exp2<S, kExpKeys>(weight);
#pragma GCC unroll 8
    for (int i = 0; i < kExpKeys; ++i) {
      sum = S::add(sum, weight[i]);
      S::store(weights + (t + i) * weights_stride, weight[i]);
    }
  }
  S::store(w.row_sum + first_lane, sum);
  return moved;
}

// error[u] += what rounding costs in unit u, squared.
template <class S, int N>
[[gnu::always_inline]] inline void add_errors(const typename S::V (&weight)[N], typename S::V (&error)[kUnits]) {
  using V = typename S::V;
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const V x = S::mul(weight[i], S::set1(unit(u)));
      const V off = S::sub(x, S::nearest_bf16(x));
      error[u] = S::fma(off, off, error[u]);
    }
  }
}

// The same with weights rounded to bf16, in pairs of keys. Their rounding is nearly all of the result's error (README.md, 5), so: the
// maximum follows at once, which makes the largest weight exact; the weights of a step are in that one of the units in which rounding
// costs least; and out is divided by the sum of the rounded weights. row_sum stays exact, for lse.
template <class S>
bool softmax_pairs(const LaneScratch& w, float* scores, int32_t n, int32_t stride, int32_t weights_stride,
                   int32_t first_lane, Mask mask) {
  using V = typename S::V;
  uint32_t* weights = w.weights + first_lane;
  const V old_max = S::load(w.row_max + first_lane);
  const int32_t padded = pad_scores<S>(scores, n, stride);
  const V new_max = S::max(mask_and_max<S>(scores, padded, stride, w.limit + first_lane, mask), old_max);
  const V reference = finite_reference<S>(new_max);
  const bool skims = n > kMaxStep / 2;  // among so many keys the larger of each two tells enough
  V sum = S::zero();
  V error[kUnits];
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) error[u] = S::zero();
  for (int32_t t = 0; t < padded; t += kExpKeys) {
    V weight[kExpKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kExpKeys; ++i) weight[i] = S::sub(S::load(scores + (t + i) * stride), reference);
    exp2<S, kExpKeys>(weight);
#pragma GCC unroll 8
    for (int i = 0; i < kExpKeys; ++i) {
      S::store(scores + (t + i) * stride, weight[i]);
      sum = S::add(sum, weight[i]);
    }
    if (skims) {
      add_errors<S, kExpKeys / 2>({S::max(weight[0], weight[1]), S::max(weight[2], weight[3])}, error);
    } else {
      add_errors<S, kExpKeys>(weight, error);
    }
  }
  V best = error[0], scale = S::set1(1.0f), inverse = S::set1(1.0f);
#pragma GCC unroll 8
  for (int u = 1; u < kUnits; ++u) {
    const V relative = S::mul(error[u], S::set1(1.0f / (unit(u) * unit(u))));
    scale = S::where_greater(best, relative, S::set1(unit(u)), scale);
    inverse = S::where_greater(best, relative, S::set1(1.0f / unit(u)), inverse);
    best = S::where_greater(best, relative, relative, best);
  }
  const V decay = exp2<S>(S::sub(old_max, reference));
  const V rescale = S::mul(S::mul(decay, scale), S::load(w.row_per_unit + first_lane));
  V rounded_sum = S::mul(S::load(w.row_scale + first_lane), rescale);
  for (int32_t t = 0; t < n; t += 2) {
    const V low = S::mul(S::load(scores + t * stride), scale);
    const V high = S::mul(S::load(scores + (t + 1) * stride), scale);
    rounded_sum = S::add(rounded_sum, S::store_pairs(weights + t / 2 * weights_stride, low, high));
  }
  S::store(w.row_max + first_lane, new_max);
  S::store(w.row_sum + first_lane, S::fma(S::load(w.row_sum + first_lane), decay, sum));
  S::store(w.row_per_unit + first_lane, inverse);
  S::store(w.row_scale + first_lane, rounded_sum);
  S::store(w.rescale + first_lane, rescale);
  return true;  // among so many rows one moves nearly always
}

template <class S, class M>
bool softmax(const LaneScratch& w, float* scores, int32_t n, int32_t stride, int32_t weights_stride, int32_t first_lane,
             Mask mask) {
  if constexpr (M::kPair == 2)
    return softmax_pairs<S>(w, scores, n, stride, weights_stride, first_lane, mask);
  else
    return softmax_fp32<S>(w, scores, n, stride, weights_stride, first_lane, mask);
}

// ---------------------------------------------------------------- packing -------------------------------------------------------------

typedef uint32_t Quad __attribute__((vector_size(16)));

// dst[k * stride + i] = src[i][k] for 4 rows of words.
inline void transpose_4_rows(uint32_t* dst, int64_t stride, const uint32_t* src, int64_t src_stride, int32_t words) {
  int32_t k = 0;
  for (; k + 4 <= words; k += 4) {
    Quad r[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], src + i * src_stride + k, 16);
    const Quad ab0 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5),
               ab1 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const Quad cd0 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5),
               cd1 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    const Quad columns[4] = {
        __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5), __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7),
        __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5), __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) __builtin_memcpy(dst + (k + i) * stride, &columns[i], 16);
  }
  for (; k < words; ++k)
    for (int i = 0; i < 4; ++i) dst[k * stride + i] = src[i * src_stride + k];
}

// Row r of q as words.
template <class S, class M>
void load_q_row(const AttendArgs& a, int64_t r, uint32_t* words) {
  const int64_t token = (a.first_row + r) / a.heads, head = (a.first_row + r) % a.heads;
  const int32_t rope_columns = a.head_dim - a.q_columns;
  const char* q = element(a.q.data, a.q_elem, token * a.q.token_stride + head * a.q.head_stride);
  const char* rope =
      rope_columns == 0 ? nullptr
                        : element(a.q_rope.data, a.q_elem, token * a.q_rope.token_stride + head * a.q_rope.head_stride);
  if constexpr (M::kPair == 2) {
    __builtin_memcpy(words, q, static_cast<uint64_t>(a.q_columns) * 2);
    if (rope) __builtin_memcpy(words + a.q_columns / 2, rope, static_cast<uint64_t>(rope_columns) * 2);
  } else {
    float* row = reinterpret_cast<float*>(words);
    load_row<S>(row, q, a.q_elem, a.q_columns);
    if (rope) load_row<S>(row + a.q_columns, rope, a.q_elem, rope_columns);
  }
}

// Q as words [strip][word][lanes of the strip]; padded rows are 0.
template <class S, class M>
void pack_q(const AttendArgs& a, const LaneScratch& w, int32_t padded_rows) {
  static_assert(S::kLanes % 4 == 0);
  constexpr int32_t kStripLanes = kStripVectors * S::kLanes;
  const int32_t words = a.head_dim / M::kPair;
  for (int32_t r = 0; r < padded_rows; r += 4) {
    for (int32_t i = 0; i < 4; ++i) {
      uint32_t* row = w.rows + i * w.row_stride;
      if (r + i < a.rows)
        load_q_row<S, M>(a, r + i, row);
      else
        __builtin_memset(row, 0, static_cast<uint64_t>(words) * 4);
    }
    const int32_t strip = r / kStripLanes * kStripLanes;
    transpose_4_rows(w.q + static_cast<int64_t>(strip) * words + (r - strip), min_int(kStripLanes, padded_rows - strip),
                     w.rows, w.row_stride, words);
  }
}

// Where the n keys from first_token on lie.
inline void find_keys(const AttendArgs& a, int64_t first_token, int32_t n, const char* (*row)[kMaxStep + 1]) {
  int64_t page = first_token / a.page_size, in_page = first_token % a.page_size;
  const bool has_rope = a.kv_columns < a.head_dim;
  for (int32_t t = 0; t < n; ++t) {
    const int64_t id = a.table[page];
    row[0][t] = element(a.kv.data, a.kv_elem, id * a.kv.page_stride + in_page * a.kv.token_stride);
    if (has_rope)
      row[1][t] = element(a.kv_rope.data, a.kv_elem, id * a.kv_rope.page_stride + in_page * a.kv_rope.token_stride);
    if (++in_page == a.page_size) {
      in_page = 0;
      ++page;
    }
  }
}

// What to fetch of the n keys from first_token on; places past their end repeat the last one.
inline void look_ahead(const AttendArgs& a, int64_t first_token, int64_t n, Ahead& ahead) {
  ahead.lines[0] = ahead.lines[1] = 0;
  if (n <= 0) return;
  const char* row[2][kMaxStep + 1];
  find_keys(a, first_token, static_cast<int32_t>(n), row);
  for (int view = 0; view < 2; ++view) {
    const int32_t columns = view == 0 ? a.kv_columns : a.head_dim - a.kv_columns;
    if (columns == 0) continue;
    ahead.lines[view] = (columns * elem_bytes(a.kv_elem) + kLineBytes - 1) / kLineBytes;
    for (int32_t t = 0; t < kMaxStep; ++t) ahead.row[view][t] = row[view][t < n ? t : n - 1];
  }
}

inline void fetch_now(const Ahead& ahead, int64_t n) {
  for (int view = 0; view < 2; ++view) {
    for (int32_t t = 0; ahead.lines[view] > 0 && t < n; ++t) {
      for (int32_t line = 0; line < ahead.lines[view]; ++line)
        __builtin_prefetch(ahead.row[view][t] + line * kLineBytes, 0, 2);
    }
  }
}

// Keys [first, first + count) as fp32 rows, which serve both products; keys then point at them.
template <class S>
void convert_keys(const AttendArgs& a, const LaneScratch& w, int32_t first, int32_t count, Keys& keys) {
  const int32_t rope_columns = a.head_dim - a.kv_columns;
  for (int32_t t = first; t < first + count; ++t) {
    float* row = reinterpret_cast<float*>(w.values) + static_cast<int64_t>(t) * w.row_stride;
    load_row<S>(row, keys.row[0][t], a.kv_elem, a.kv_columns);
    if (rope_columns > 0) load_row<S>(row + a.kv_columns, keys.row[1][t], a.kv_elem, rope_columns);
    keys.row[0][t] = reinterpret_cast<const char*>(row);
  }
}

// One strip of values as pairs of neighbouring keys: words [steps][kStripVectors vectors]; columns past the end are 0.
template <class S>
void pack_strip(const AttendArgs& a, const Keys& keys, int32_t steps, int32_t first_column, uint32_t* packed) {
  for (int32_t k = 0; k < steps; ++k) {
    S::interleave(keys.row[0][2 * k] + first_column * 2, keys.row[0][2 * k + 1] + first_column * 2,
                  a.value_dim - first_column, packed + k * kStripVectors * S::kLanes);
  }
}

// ---------------------------------------------------------------- attend --------------------------------------------------------------

// Causal: keys of the request's cache here that query token t sees; 0 or less: none.
inline int64_t visible_keys(const AttendArgs& a, int64_t token) {
  return shard_tokens(a.visible0 + token, a.cp_world, a.cp_rank, a.cp_turn);
}

// limit[r] = keys of the step from first_token on that row r sees.
inline void set_limits(const AttendArgs& a, const LaneScratch& w, int64_t first_token, int32_t n, int32_t padded_rows) {
  int64_t token = a.first_row / a.heads, head = a.first_row % a.heads;
  for (int32_t r = 0; r < padded_rows; ++r) {
    const int64_t limit = visible_keys(a, token) - first_token;
    w.limit[r] = limit < 0 ? 0 : min_int(limit, n);
    if (++head == a.heads) {
      head = 0;
      ++token;
    }
  }
}

// Scores and softmax of n keys, strip of rows by strip of rows, so that the scores stay in the nearest cache. Returns whether a maximum moved.
template <class S, class M>
bool weigh_keys(const AttendArgs& a, const LaneScratch& w, Keys& keys, int32_t n, const Ahead& ahead,
                int32_t padded_rows, Mask mask) {
  const int32_t vectors = padded_rows / S::kLanes;
  bool moved = false;
  ScoreArgs tile{};
  tile.keys = &keys;
  tile.last = n;
  tile.q = w.q;
  tile.scale = a.scale_log2e;
  for (int32_t v = 0; v < vectors; v += kStripVectors) {
    const int32_t strip_vectors = min_int(kStripVectors, vectors - v), strip_lanes = strip_vectors * S::kLanes;
    tile.ahead = v == 0 ? &ahead : nullptr;
    for (int32_t t = 0; t < n; t += S::kTileA) {
      if constexpr (M::kPair == 1) {
        if (v == 0) convert_keys<S>(a, w, t, min_int(S::kTileA, n - t), keys);
      }
      tile.first = t;
      tile.scores = w.scores + t * strip_lanes;
      if (strip_vectors == kStripVectors)
        score_tile<S, M, kStripVectors>(tile);
      else
        score_tile<S, M, 1>(tile);
    }
    tile.q += static_cast<int64_t>(strip_lanes) * (keys.words[0] + keys.words[1]);
    for (int32_t i = 0; i < strip_vectors; ++i) {
      moved |= softmax<S, M>(w, w.scores + i * S::kLanes, n, strip_lanes, padded_rows, (v + i) * S::kLanes, mask);
    }
  }
  return moved;
}

// out += weights * values, strip of columns by strip of columns. Pairs are packed a strip ahead, within the product of the first rows: the
// multiplier is the busy unit there, and loads, shuffles and stores are to be had for nothing.
template <class S, class M>
void add_values(const AttendArgs& a, const LaneScratch& w, const Keys& keys, int32_t n, int32_t padded_rows,
                Before before) {
  constexpr int32_t kStripLanes = kStripVectors * S::kLanes;
  ValueArgs tile{};
  tile.weights_stride = padded_rows;
  tile.steps = (n + M::kPair - 1) / M::kPair;
  tile.out_stride = w.out_stride;
  tile.before = before;
  tile.rows = keys.row[0];
  uint32_t* packed[2] = {w.values, w.values + kMaxStep / 2 * kStripLanes};
  if constexpr (M::kPair == 2) pack_strip<S>(a, keys, tile.steps, 0, packed[0]);
  for (int32_t c = 0; c < a.value_dim; c += kStripLanes) {
    const bool is_narrow = a.value_dim - c <= S::kLanes;
    const bool packs_next = M::kPair == 2 && c + 2 * kStripLanes <= a.value_dim;
    if constexpr (M::kPair == 2) {
      tile.values = packed[0];
      tile.values_stride = kStripLanes;
      tile.packed = packed[1];
      tile.packed_byte = (c + kStripLanes) * 2;
    } else {
      tile.values = w.values + c;
      tile.values_stride = w.row_stride;
    }
    for (int32_t r = 0; r < a.rows; r += S::kTileA) {
      tile.weights = w.weights + r;
      tile.out = w.out + static_cast<int64_t>(r) * w.out_stride + c;
      tile.rescale = w.rescale + r;
      const int rows = min_int(S::kTileA, a.rows - r);
      if (is_narrow)
        value_tile_of<S, M, 1, Pack::kNone>(rows, tile);
      else if (packs_next && r == 0)
        value_tile_of<S, M, kStripVectors, M::kPair == 2 ? Pack::kNext : Pack::kNone>(rows, tile);
      else
        value_tile_of<S, M, kStripVectors, Pack::kNone>(rows, tile);
    }
    if constexpr (M::kPair == 2) {
      if (!packs_next && c + kStripLanes < a.value_dim) pack_strip<S>(a, keys, tile.steps, c + kStripLanes, packed[1]);
      uint32_t* next = packed[1];
      packed[1] = packed[0];
      packed[0] = next;
    }
  }
}

template <class S, class M>
void attend_in(const AttendArgs& a, const LaneScratch& w) {
  const int32_t padded_rows = round_up(a.rows, S::kLanes);
  const int32_t step = M::step(a.rows);
  int64_t end = a.end_token;
  const int64_t first_visible = visible_keys(a, a.first_row / a.heads);
  if (a.is_causal) {
    const int64_t last_visible = visible_keys(a, (a.first_row + a.rows - 1) / a.heads);
    if (end > last_visible) end = last_visible;
  }
  for (int32_t r = 0; r < padded_rows; ++r) {
    w.row_max[r] = kMinusInf;
    w.row_sum[r] = 0.0f;
    w.row_per_unit[r] = 1.0f;
    w.row_scale[r] = M::kPair == 2 ? 0.0f : 1.0f;
  }
  Ahead ahead;
  int64_t n_ahead = min_int(step, end - a.begin_token);
  look_ahead(a, a.begin_token, n_ahead, ahead);
  fetch_now(ahead, n_ahead);
  if (!a.is_q_packed) {
    pack_q<S, M>(a, w, padded_rows);
    __builtin_memset(w.rows, 0,
                     static_cast<uint64_t>(w.row_stride) * 4);  // the partner of the last key of an odd number
  }
  Keys keys;
  Before before = Before::kNothing;
  for (int64_t first = a.begin_token; first < end; first += step) {
    const int32_t n = min_int(step, end - first);
    find_keys(a, first, n, keys.row);
    if constexpr (M::kPair == 2) {
      keys.words[0] = a.kv_columns / 2;
      keys.words[1] = (a.head_dim - a.kv_columns) / 2;
      keys.row[0][n] = reinterpret_cast<const char*>(w.rows);
    } else {
      keys.words[0] = a.head_dim;
      keys.words[1] = 0;
    }
    n_ahead = min_int(step, end - first - step);
    look_ahead(a, first + step, n_ahead, ahead);
    Mask mask = Mask::kNone;
    if (a.is_causal && first + n > first_visible) {
      mask = Mask::kRowLimits;
      set_limits(a, w, first, n, padded_rows);
    }
    const bool moved = weigh_keys<S, M>(a, w, keys, n, ahead, padded_rows, mask);
    if (before != Before::kNothing) before = moved ? Before::kRescale : Before::kKeep;
    add_values<S, M>(a, w, keys, n, padded_rows, before);
    before = Before::kKeep;
  }
  if constexpr (M::kPair == 2) {
    for (int32_t r = 0; r < a.rows; ++r) {
      w.row_scale[r] = w.row_sum[r] == 0.0f ? 1.0f : w.row_sum[r] / w.row_scale[r];
    }
  }
}

template <class S>
void attend(const AttendArgs& a, const LaneScratch& w) {
  if constexpr (S::kHasBf16Pairs) {
    if (a.math == Math::kBf16Pairs) return attend_in<S, Bf16Words<S>>(a, w);
  }
  attend_in<S, Fp32Words<S>>(a, w);
}

}  // namespace
}  // namespace mla::cpu
