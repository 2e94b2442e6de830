// Problems as strings: the forms that mla.h names, and the way back for random problems.
#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <string>

#include "mlakit/mla.h"

namespace {

std::string format(const mla_problem& problem) {
  char buffer[512];
  REQUIRE_MESSAGE(mla_problem_format(&problem, buffer, sizeof buffer, nullptr) == MLA_OK, mla_last_error());
  return buffer;
}

mla_problem parse(const std::string& text) {
  mla_problem problem;
  REQUIRE_MESSAGE(mla_problem_parse(&problem, text.c_str()) == MLA_OK, mla_last_error());
  return problem;
}

}  // namespace

TEST_CASE("each part of the string sets its field") {
  const mla_problem p = parse(
      "sparse:fp16:b128:q2:h64:k4:d320:v256:p16:l1000:t200:m5000:kve4m3:outfp32:fp8656:causal:ragged:lse2:tree:extra:"
      "debug:chunk128:top64:cp1of4:turn16:"
      "scale0.5:cuda3");
  CHECK(p.struct_size == sizeof(mla_problem));
  CHECK(p.q_dtype == MLA_DTYPE_FP16);
  CHECK(p.max_batch == 128);
  CHECK(p.q_len == 2);
  CHECK(p.q_heads == 64);
  CHECK(p.kv_heads == 4);
  CHECK(p.head_dim == 320);
  CHECK(p.value_dim == 256);
  CHECK(p.page_size == 16);
  CHECK(p.max_len == 1000);
  CHECK(p.max_q_tokens == 200);
  CHECK(p.max_tokens == 5000);
  CHECK(p.kv_dtype == MLA_DTYPE_E4M3);
  CHECK(p.out_dtype == MLA_DTYPE_FP32);
  CHECK(p.kv_format == MLA_KV_FP8_656);
  CHECK(p.flags == 0x3f);
  CHECK(p.split_policy == MLA_SPLIT_FIXED_CHUNK);
  CHECK(p.chunk_tokens == 128);
  CHECK(p.topk == 64);
  CHECK(p.cp_rank == 1);
  CHECK(p.cp_world == 4);
  CHECK(p.cp_turn == 16);
  CHECK(p.softmax_scale == 0.5f);
  CHECK(p.device_type == MLA_DEVICE_CUDA);
  CHECK(p.device_id == 3);
  CHECK(format(p) ==
        "sparse:fp16:b128:q2:h64:k4:d320:v256:p16:l1000:t200:m5000:kve4m3:outfp32:fp8656:causal:ragged:lse2:tree:extra:"
        "debug:chunk128:top64:cp1of4:turn16:"
        "scale0.5:cuda3");
}

TEST_CASE("what is not named has its default, and defaults are not written") {
  mla_problem init;
  REQUIRE(mla_problem_init(&init) == MLA_OK);
  const mla_problem parsed = parse("dense:bf16");
  CHECK(std::memcmp(&parsed, &init, sizeof init) == 0);
  CHECK(format(parse("dense:bf16:causal:l16384:h128:b128")) ==
        "dense:bf16:b128:q1:h128:k1:d576:v512:p64:l16384:causal");
  mla_problem p = parse("dense:bf16:b2:h4:l100");
  p.max_q_tokens = 2, p.max_tokens = 200, p.kv_dtype = p.out_dtype = MLA_DTYPE_BF16, p.softmax_scale = 1.0f / 24.0f;
  CHECK(format(p) == "dense:bf16:b2:q1:h4:k1:d576:v512:p64:l100");
  p.split_policy = MLA_SPLIT_FIXED_CHUNK;
  CHECK(format(p) == "dense:bf16:b2:q1:h4:k1:d576:v512:p64:l100:chunk2048");
}

TEST_CASE("a random problem comes back from its string, and the string from the problem") {
  std::mt19937_64 rng(9);
  const auto pick = [&](auto... values) {
    const int64_t list[] = {static_cast<int64_t>(values)...};
    return list[rng() % sizeof...(values)];
  };
  const auto pick32 = [&](auto... values) { return static_cast<int32_t>(pick(values...)); };
  for (int i = 0; i < 5000; ++i) {
    mla_problem p;
    mla_problem_init(&p);
    p.q_dtype = pick32(1, 2, 3);
    p.kv_dtype = pick32(0, 1, 2, 3, 4);
    p.out_dtype = pick32(0, 3, p.q_dtype);
    p.kv_format = pick32(0, 1, 2, 3);
    p.flags = static_cast<uint32_t>(rng() % 64);
    p.max_batch = pick(1, 7, int64_t{1} << 40);
    p.q_len = pick(1, 3, int64_t{1} << 50);
    p.max_len = pick(0, 1, 4096);
    p.max_q_tokens = pick(0, 5);
    p.max_tokens = pick(0, 12345);
    p.q_heads = pick32(0, 128);
    p.page_size = pick32(1, 64);
    p.split_policy = pick32(0, 1);
    p.chunk_tokens = p.split_policy == 1 ? pick32(64, 4096) : 0;
    p.topk = pick32(0, 2048);
    p.cp_world = pick32(1, 8);
    p.cp_rank = p.cp_world > 1 ? pick32(0, 7) : 0;
    p.cp_turn = pick32(0, 2, 64);
    p.softmax_scale = pick(0, 1) != 0 ? static_cast<float>(rng() % 100000 + 1) / 77777.0f : 0.0f;
    if (pick(0, 1) != 0) p.device_type = MLA_DEVICE_CUDA, p.device_id = pick32(0, 5);
    const std::string text = format(p);
    CAPTURE(text);
    const mla_problem back = parse(text);
    REQUIRE(format(back) == text);
    // Fields that say the default in another way are normalised by the string; all others come back as they were.
    if (p.kv_dtype == p.q_dtype) p.kv_dtype = MLA_DTYPE_DEFAULT;
    if (p.out_dtype == p.q_dtype) p.out_dtype = MLA_DTYPE_DEFAULT;
    REQUIRE(std::memcmp(&back, &p, sizeof p) == 0);
  }
}

TEST_CASE("strings that say nothing valid are refused and the problem is left alone") {
  const char* const bad[] = {"",
                             "dense",
                             "bf16",
                             "dense:",
                             "dense:bf17",
                             "dense:bf16:",
                             "dense:bf16::b1",
                             "dense:bf16:b",
                             "dense:bf16:b-1",
                             "dense:bf16:b1.5",
                             "dense:bf16:b1 ",
                             "dense:bf16:z3",
                             "dense:bf16:b1:b1",
                             "dense:bf16:causal:causal",
                             "dense:bf16:h99999999999",
                             "dense:bf16:b99999999999999999999",
                             "dense:bf16:top5",
                             "sparse:bf16",
                             "dense:bf16:cp1",
                             "dense:bf16:scale",
                             "dense:bf16:scalex",
                             "dense:bf16:kvbf17",
                             "dense:bf16:cuda",
                             "Dense:bf16"};
  for (const char* text : bad) {
    CAPTURE(text);
    mla_problem problem, before;
    std::memset(&problem, 0x5A, sizeof problem);
    std::memcpy(&before, &problem, sizeof problem);
    CHECK(mla_problem_parse(&problem, text) == MLA_INVALID_ARGUMENT);
    CHECK(std::string(mla_last_error()).find("text: ") == 0);
    CHECK(std::memcmp(&problem, &before, sizeof problem) == 0);
  }
  mla_problem problem;
  CHECK(mla_problem_parse(&problem, "dense:bf16:z3") == MLA_INVALID_ARGUMENT);
  CHECK(std::string(mla_last_error()) ==
        "text: every part must be one that mla.h names, with a number in range, got \"z3\"");
  CHECK(mla_problem_parse(&problem, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_problem_parse(nullptr, "dense:bf16") == MLA_INVALID_ARGUMENT);
}

TEST_CASE("format tells how much it needs and never writes past the buffer") {
  const mla_problem p = parse("dense:bf16:b1:h1:l1");
  size_t needed = 0;
  CHECK(mla_problem_format(&p, nullptr, 0, &needed) == MLA_OK);
  CHECK(needed == format(p).size() + 1);
  std::string buffer(needed + 4, '#');
  CHECK(mla_problem_format(&p, buffer.data(), needed - 1, &needed) == MLA_INVALID_ARGUMENT);
  CHECK(buffer == std::string(needed + 4, '#'));
  CHECK(mla_problem_format(&p, buffer.data(), needed, nullptr) == MLA_OK);
  CHECK(buffer.substr(needed) == "####");
  CHECK(mla_problem_format(&p, nullptr, 10, nullptr) == MLA_INVALID_ARGUMENT);
}
