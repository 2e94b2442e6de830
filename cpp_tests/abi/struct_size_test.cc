// Structs of older and newer headers.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstring>

#include "call.h"

using mla::test::Call;

namespace {

// A struct of a newer header: ours and 16 bytes more.
template <class T>
struct Newer {
  T known;
  unsigned char unknown[16] = {};
};

}  // namespace

TEST_CASE("a newer struct is taken while the bytes that we do not know are zero") {
  Call call;
  Newer<mla_schedule_args> schedule{call.schedule_args};
  schedule.known.struct_size = sizeof schedule;
  CHECK(mla_schedule(call.plan, &schedule.known, nullptr) == MLA_OK);
  Newer<mla_decode_args> decode{call.decode_args};
  decode.known.struct_size = sizeof decode;
  CHECK(mla_decode(call.plan, &decode.known, nullptr) == MLA_OK);
  Newer<mla_problem> problem{call.problem};
  problem.known.struct_size = sizeof problem;
  mla_plan* plan = nullptr;
  CHECK(mla_plan_create(&plan, call.context, &problem.known) == MLA_OK);
  mla_plan_destroy(plan);
  Newer<mla_context_options> options{};
  options.known.struct_size = sizeof options;
  mla_context* context = nullptr;
  CHECK(mla_context_create(&context, &options.known) == MLA_OK);
  mla_context_destroy(context);

  schedule.unknown[3] = 1;
  CHECK(mla_schedule(call.plan, &schedule.known, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(std::string(mla_last_error()) ==
        "args: bytes past the 40 that this library knows must be zero, got 1 at offset 43; use a newer library");
  decode.unknown[0] = 255;
  CHECK(mla_decode(call.plan, &decode.known, nullptr) == MLA_INVALID_ARGUMENT);
  problem.unknown[15] = 1;
  CHECK(mla_plan_create(&plan, call.context, &problem.known) == MLA_INVALID_ARGUMENT);
  CHECK(mla_problem_format(&problem.known, nullptr, 0, nullptr) == MLA_INVALID_ARGUMENT);
  options.unknown[1] = 1;
  CHECK(mla_context_create(&context, &options.known) == MLA_INVALID_ARGUMENT);
}

TEST_CASE("what an older struct lacks is not read and counts as zero") {
  Call call;
  // As if cp_world and all after it had come later: garbage lies there in memory.
  mla_problem problem = call.problem;
  problem.struct_size = offsetof(mla_problem, cp_world);
  std::memset(reinterpret_cast<char*>(&problem) + problem.struct_size, 0xEE, sizeof problem - problem.struct_size);
  mla_plan* plan = nullptr;
  CHECK_MESSAGE(mla_plan_create(&plan, call.context, &problem) == MLA_OK, mla_last_error());
  mla_plan_info info = {};
  info.struct_size = sizeof info;
  REQUIRE(mla_plan_get_info(plan, &info) == MLA_OK);
  CHECK(std::string(info.problem) == call.info.problem);
  mla_plan_destroy(plan);

  REQUIRE(call.run_schedule() == MLA_OK);
  call.decode_args.struct_size = offsetof(mla_decode_args, kv_scale);
  std::memset(&call.decode_args.kv_scale, 0xEE, sizeof call.decode_args - offsetof(mla_decode_args, kv_scale));
  CHECK_MESSAGE(call.run_decode() == MLA_OK, mla_last_error());
}

TEST_CASE("a struct_size that no header has is refused in every function") {
  Call call;
  for (const uint32_t size : {0u, 4u, 7u, 1u << 20, ~0u}) {
    CAPTURE(size);
    mla_plan* plan = nullptr;
    mla_context* context = nullptr;
    mla_problem problem = call.problem;
    problem.struct_size = size;
    CHECK(mla_plan_create(&plan, call.context, &problem) == MLA_INVALID_ARGUMENT);
    CHECK(mla_problem_format(&problem, nullptr, 0, nullptr) == MLA_INVALID_ARGUMENT);
    mla_context_options options = {};
    options.struct_size = size;
    CHECK(mla_context_create(&context, &options) == MLA_INVALID_ARGUMENT);
    mla_plan_info info = {};
    info.struct_size = size;
    CHECK(mla_plan_get_info(call.plan, &info) == MLA_INVALID_ARGUMENT);
    mla_backend_info backend = {};
    backend.struct_size = size;
    CHECK(mla_get_backend_info(0, &backend) == MLA_INVALID_ARGUMENT);
    mla_merge_args merge = {};
    merge.struct_size = size;
    CHECK(mla_merge(call.context, &merge, nullptr) == MLA_INVALID_ARGUMENT);
    CHECK(std::string(mla_last_error())
              .find("args: struct_size must be sizeof of the struct (40 in this library), got ") == 0);
    call.schedule_args.struct_size = size;
    CHECK(call.run_schedule() == MLA_INVALID_ARGUMENT);
    call.decode_args.struct_size = size;
    CHECK(call.run_decode() == MLA_INVALID_ARGUMENT);
  }
}

TEST_CASE("an output struct is filled up to its own size, with zeros for what we do not know") {
  Call call;
  Newer<mla_plan_info> newer;
  std::memset(static_cast<void*>(&newer), 0xEE, sizeof newer);
  newer.known.struct_size = sizeof newer;
  REQUIRE(mla_plan_get_info(call.plan, &newer.known) == MLA_OK);
  CHECK(newer.known.struct_size == sizeof newer);
  CHECK(newer.known.schedule_bytes == call.info.schedule_bytes);
  for (const unsigned char byte : newer.unknown) CHECK(byte == 0);

  mla_plan_info older;
  std::memset(&older, 0xEE, sizeof older);
  older.struct_size = offsetof(mla_plan_info, backend);
  REQUIRE(mla_plan_get_info(call.plan, &older) == MLA_OK);
  CHECK(older.scratch_bytes == call.info.scratch_bytes);
  const auto* bytes = reinterpret_cast<const unsigned char*>(&older);
  for (size_t i = older.struct_size; i < sizeof older; ++i) REQUIRE(bytes[i] == 0xEE);
}
