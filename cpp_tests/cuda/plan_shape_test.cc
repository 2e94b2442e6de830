// Which shape a plan on the device takes, by the problem alone.
#include "cuda/plan_shape.h"

#include <doctest/doctest.h>

namespace cuda = mla::cuda;

namespace {

constexpr int kMultiprocessors = 132;

mla::Problem problem(int64_t batch, int64_t q_len, int32_t heads, int64_t max_len) {
  mla::Problem p{};
  p.device_type = mla::DeviceType::kCuda;
  p.q_dtype = p.kv_dtype = p.out_dtype = mla::DType::kBf16;
  p.max_batch = batch;
  p.q_len = q_len;
  p.max_q_tokens = batch * q_len;
  p.max_len = max_len;
  p.max_tokens = batch * max_len;
  p.q_heads = heads;
  p.kv_heads = 1;
  p.head_dim = 576;
  p.value_dim = 512;
  p.page_size = 64;
  p.split_policy = mla::SplitPolicy::kBalanced;
  p.cp_world = 1;
  return p;
}

int32_t block_tokens(const mla::Problem& p) { return cuda::plan_shape(p, kMultiprocessors).config.block_tokens; }

}  // namespace

TEST_CASE("an item has as many tiles as its rows fill, and pairs share pages where all are full") {
  const auto shape = [](int64_t q_len, int32_t heads) {
    return cuda::plan_shape(problem(4, q_len, heads, 1000), kMultiprocessors);
  };
  CHECK(shape(1, 16).tiles == 1);
  CHECK(shape(1, 128).tiles == 2);
  CHECK(shape(2, 128).tiles == 4);
  CHECK(shape(4, 128).tiles == 8);
  CHECK(shape(6, 128).tiles == 4);  // three items of four tiles, none of them with empty ones
  CHECK(shape(5, 128).tiles == 4);
  CHECK(shape(4, 128).config.parts == 16);
  for (const int64_t q_len : {1, 2, 4, 6, 8}) CHECK(shape(q_len, 128).shares_pages);
  CHECK_FALSE(shape(5, 128).shares_pages);
  CHECK_FALSE(shape(1, 100).shares_pages);
  CHECK_FALSE(shape(1, 64).shares_pages);
}

TEST_CASE("blocks are wide for many long requests of many rows") {
  CHECK(block_tokens(problem(128, 1, 128, 16384)) == 64);
  CHECK(block_tokens(problem(128, 2, 128, 2048)) == 64);
  CHECK(block_tokens(problem(128, 4, 128, 1024)) == 64);
  CHECK(block_tokens(problem(128, 1, 128, 4096)) == 64);
  CHECK(block_tokens(problem(128, 1, 128, 2048)) == 32);
  CHECK(block_tokens(problem(128, 2, 128, 1984)) == 32);
  CHECK(block_tokens(problem(128, 4, 128, 960)) == 32);
  CHECK(block_tokens(problem(16, 1, 128, 65536)) == 32);  // fewer requests than parts
  CHECK(block_tokens(problem(128, 1, 64, 65536)) == 32);
  CHECK(block_tokens(problem(128, 1, 126, 65536)) == 32);
}

TEST_CASE("blocks are not wide where a full cache holds short requests only") {
  mla::Problem p = problem(128, 2, 128, 65536);
  CHECK(block_tokens(p) == 64);
  p.max_tokens = 128 * 2000;
  CHECK(block_tokens(p) == 32);
}

TEST_CASE("blocks are not wide where that would change a row's arithmetic, or a page is no multiple of them") {
  mla::Problem p = problem(128, 2, 128, 8192);
  p.split_policy = mla::SplitPolicy::kFixedChunk;
  p.chunk_tokens = 1024;
  CHECK(block_tokens(p) == 32);
  CHECK(cuda::plan_shape(p, kMultiprocessors).config.chunk_blocks == 32);
  p = problem(128, 2, 128, 8192);
  p.page_size = 32;
  CHECK(block_tokens(p) == 32);
  p.page_size = 128;
  CHECK(block_tokens(p) == 64);
  p.is_ragged = true;
  CHECK(block_tokens(p) == 32);
}
