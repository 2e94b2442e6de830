// The engine of engine_example.c in C++20: same numbers, same lines, by mla.hpp.
#include <cstdio>
#include <numeric>
#include <span>
#include <vector>

#include "mlakit/mla.hpp"

constexpr int64_t kBatch = 3, kHeads = 4, kHeadDim = 576, kValueDim = 512, kPageSize = 16, kPages = 20, kWidth = 9;

// Element i of a tensor: a multiple of 1/256 in [-0.5, 0.5).
float value(uint32_t i) {
  uint32_t x = i * 2654435761u;
  x = (x ^ (x >> 15)) * 2246822519u;
  return static_cast<float>(x >> 24) / 256.0f - 0.5f;
}

int main() try {
  std::vector<float> q(kBatch * kHeads * kHeadDim), cache(kPages * kPageSize * kHeadDim),
      out(kBatch * kHeads * kValueDim), lse(kBatch * kHeads);
  std::vector<int32_t> lengths = {130, 0, 77}, table(kBatch * kWidth);
  for (uint32_t i = 0; i < q.size(); ++i) q[i] = value(i);
  for (uint32_t i = 0; i < cache.size(); ++i) cache[i] = value(i + 1000000);
  for (uint32_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i * 7 % kPages);

  // Once: what will be decoded, and how.
  mla_problem problem = mla::make_problem(MLA_DTYPE_FP32, kHeads, kBatch, kWidth * kPageSize);
  problem.page_size = kPageSize;
  problem.softmax_scale = 0.0721687824f;  // (128 + 64) ** -0.5: the head_dim before weight absorption
  mla::Context context;
  mla::Plan plan(context, problem);
  mla::Workspace work(plan);

  // Once a step: the lengths.
  plan.schedule(work, mla::Tensor(lengths.data(), MLA_DTYPE_INT32, {kBatch}));

  // Once a layer: attention.
  plan.decode(work, {.q = mla::Tensor(q.data(), MLA_DTYPE_FP32, {kBatch, 1, kHeads, kHeadDim}),
                     .kv_cache = mla::Tensor(cache.data(), MLA_DTYPE_FP32, {kPages, kPageSize, 1, kHeadDim}),
                     .block_table = mla::Tensor(table.data(), MLA_DTYPE_INT32, {kBatch, kWidth}),
                     .out = mla::Tensor(out.data(), MLA_DTYPE_FP32, {kBatch, 1, kHeads, kValueDim}),
                     .lse = mla::Tensor(lse.data(), MLA_DTYPE_FP32, {kBatch, 1, kHeads})});

  for (int64_t row = 0; row < kBatch * kHeads; ++row) {
    const std::span<const float> columns(out.data() + row * kValueDim, kValueDim);
    std::printf("request %d token 0 head %d lse %.5f out[0] %.5f out[511] %.5f sum %.4f\n",
                static_cast<int>(row / kHeads), static_cast<int>(row % kHeads), static_cast<double>(lse[row]),
                static_cast<double>(columns.front()), static_cast<double>(columns.back()),
                std::accumulate(columns.begin(), columns.end(), 0.0));
  }
} catch (const mla::Error& error) {
  std::fprintf(stderr, "%s: %s\n", mla_status_string(error.status()), error.what());
  return 1;
}
