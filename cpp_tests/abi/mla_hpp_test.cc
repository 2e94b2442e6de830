// mla.hpp: the same calls by RAII.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "mlakit/mla.hpp"

TEST_CASE("attention to equal keys returns their value, and merging it with itself changes lse only") {
  constexpr int64_t kHeads = 2, kLen = 3;
  std::vector<float> q(kHeads * 8, 0.5f), cache(2 * 4 * 8, 0.25f), out(kHeads * 6, NAN), lse(kHeads, NAN);
  const std::vector<int32_t> lengths = {kLen}, table = {1};
  mla_problem problem = mla::make_problem(MLA_DTYPE_FP32, kHeads, 1, 8);
  problem.head_dim = 8;
  problem.value_dim = 6;
  problem.page_size = 4;
  problem.softmax_scale = 1.0f;
  const mla::Context context("reference");
  const mla::Plan plan(context, problem);
  const mla::Workspace work(plan);
  CHECK(std::string(plan.info().backend) == "reference");
  CHECK(plan.info().problem == mla::to_string(problem));

  plan.schedule(work, mla::Tensor(lengths.data(), MLA_DTYPE_INT32, {1}));
  plan.decode(work, {.q = mla::Tensor(q.data(), MLA_DTYPE_FP32, {1, 1, kHeads, 8}),
                     .kv_cache = mla::Tensor(cache.data(), MLA_DTYPE_FP32, {2, 4, 1, 8}),
                     .block_table = mla::Tensor(table.data(), MLA_DTYPE_INT32, {1, 1}),
                     .out = mla::Tensor(out.data(), MLA_DTYPE_FP32, {1, 1, kHeads, 6}),
                     .lse = mla::Tensor(lse.data(), MLA_DTYPE_FP32, {1, 1, kHeads})});
  for (const float value : out) CHECK(value == doctest::Approx(0.25));
  for (const float value : lse) CHECK(value == doctest::Approx(8 * 0.5 * 0.25 + std::log(3.0)));

  // Two parts with the same keys: each lse grows by log 2. Strides of 0 show the one result as both parts.
  std::vector<float> merged(kHeads * 6, NAN), merged_lse(kHeads, NAN);
  context.merge({.out_parts = mla::Tensor(out.data(), MLA_DTYPE_FP32, {2, 1, kHeads, 6}, {0, 0, 6, 1}),
                 .lse_parts = mla::Tensor(lse.data(), MLA_DTYPE_FP32, {2, 1, kHeads}, {0, 0, 1}),
                 .out = mla::Tensor(merged.data(), MLA_DTYPE_FP32, {1, kHeads, 6}),
                 .lse = mla::Tensor(merged_lse.data(), MLA_DTYPE_FP32, {1, kHeads})});
  for (const float value : merged) CHECK(value == doctest::Approx(0.25));
  for (size_t h = 0; h < kHeads; ++h) CHECK(merged_lse[h] == doctest::Approx(lse[h] + std::log(2.0)));
}

TEST_CASE("failures throw with status and message") {
  try {
    mla::Context context("nonesuch");
    FAIL("made a context with an unknown backend");
  } catch (const mla::Error& error) {
    CHECK(error.status() == MLA_INVALID_ARGUMENT);
    CHECK(std::string(error.what()).find("options.backend: must be one of ") == 0);
  }
  CHECK_THROWS_AS(mla::parse_problem("dense"), mla::Error);
  CHECK_THROWS_AS(mla::Tensor(nullptr, 99, {1}), mla::Error);
  CHECK_THROWS_AS(mla::Tensor(nullptr, MLA_DTYPE_FP32, {1, 2}, {1}), mla::Error);
  CHECK(mla::to_string(mla::parse_problem("dense:bf16:h4:l9")) == "dense:bf16:b1:q1:h4:k1:d576:v512:p64:l9");
}

TEST_CASE("a copied tensor points at its own arrays") {
  float data[6] = {};
  auto* first = new mla::Tensor(data, MLA_DTYPE_FP32, {2, 3}, {3, 1});
  mla::Tensor second(*first);
  mla::Tensor third(data, MLA_DTYPE_FP32, {6});
  third = *first;
  delete first;
  for (const mla::Tensor* tensor : {&second, &third}) {
    CHECK(tensor->get()->shape[1] == 3);
    CHECK(tensor->get()->strides[0] == 3);
  }
}

TEST_CASE("backends are listed in order, the reference last") {
  const std::vector<mla::BackendInfo> list = mla::backends();
  REQUIRE(!list.empty());
  CHECK(list.back().name == "reference");
  for (const mla::BackendInfo& backend : list) CHECK(backend.is_available == backend.reason.empty());
}
