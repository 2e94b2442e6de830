// How calls fail: NULL, exceptions, the message of a thread, devices that are not there, lifetimes.
#include <doctest/doctest.h>

#include <new>
#include <stdexcept>
#include <thread>

#include "call.h"

using mla::test::Call;

TEST_CASE("NULL is refused or ignored, never followed") {
  Call call;
  CHECK(mla_problem_init(nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_problem_format(nullptr, nullptr, 0, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_get_backend_info(0, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_context_create(nullptr, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_plan_create(nullptr, call.context, &call.problem) == MLA_INVALID_ARGUMENT);
  mla_plan* plan = call.plan;
  CHECK(mla_plan_create(&plan, nullptr, &call.problem) == MLA_INVALID_ARGUMENT);
  CHECK(plan == nullptr);
  CHECK(mla_plan_create(&plan, call.context, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(std::string(mla_last_error()) == "problem: must not be NULL, got NULL");
  CHECK(mla_plan_get_info(nullptr, &call.info) == MLA_INVALID_ARGUMENT);
  CHECK(mla_plan_get_info(call.plan, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_schedule(nullptr, &call.schedule_args, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_schedule(call.plan, nullptr, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_decode(nullptr, &call.decode_args, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_decode(call.plan, nullptr, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_merge(nullptr, nullptr, nullptr) == MLA_INVALID_ARGUMENT);
  CHECK(mla_merge(call.context, nullptr, nullptr) == MLA_INVALID_ARGUMENT);
  mla_context_destroy(nullptr);
  mla_plan_destroy(nullptr);
}

TEST_CASE("an index past the last backend is refused") {
  mla_backend_info info = {};
  info.struct_size = sizeof info;
  CHECK(mla_get_backend_info(-1, &info) == MLA_INVALID_ARGUMENT);
  int32_t count = 0;
  while (mla_get_backend_info(count, &info) == MLA_OK) ++count;
  CHECK(count >= 2);
  CHECK(std::string(info.name) == "reference");
  CHECK(info.is_available == 1);
  CHECK(std::string(info.reason).empty());
}

TEST_CASE("an exception of the caller's parallel_for ends as a status") {
  // Throws what user points at.
  const auto throwing = [](void* user, int64_t, mla_task_fn, void*) {
    switch (*static_cast<int*>(user)) {
      case 0:
        throw std::runtime_error("thrown by parallel_for");
      case 1:
        throw std::bad_alloc();
      default:
        throw 42;
    }
  };
  const struct {
    int kind;
    mla_status status;
    const char* message;
  } cases[] = {{0, MLA_INTERNAL, "thrown by parallel_for"},
               {1, MLA_OUT_OF_MEMORY, "memory: the host has none left for this call"},
               {2, MLA_INTERNAL, "an exception of unknown type"}};
  for (const auto& expected : cases) {
    int kind = expected.kind;
    mla_context_options options = {};
    options.struct_size = sizeof options;
    options.backend = "cpu-scalar";
    options.num_threads = 4;
    options.parallel_for = throwing;
    options.parallel_for_user = &kind;
    mla_context* context = nullptr;
    REQUIRE(mla_context_create(&context, &options) == MLA_OK);
    Call call("dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20", "cpu-scalar");  // lends its tensors; same problem
    mla_plan* plan = nullptr;
    REQUIRE(mla_plan_create(&plan, context, &call.problem) == MLA_OK);
    mla_plan_info info = {};
    info.struct_size = sizeof info;
    REQUIRE(mla_plan_get_info(plan, &info) == MLA_OK);
    const mla::test::Buffer scratch = mla::test::aligned_buffer(info.scratch_bytes);
    call.decode_args.scratch = scratch.get();
    call.decode_args.scratch_bytes = info.scratch_bytes;
    REQUIRE(mla_schedule(plan, &call.schedule_args, nullptr) == MLA_OK);
    CHECK(mla_decode(plan, &call.decode_args, nullptr) == expected.status);
    CHECK(std::string(mla_last_error()) == expected.message);
    mla_plan_destroy(plan);
    mla_context_destroy(context);
  }
}

TEST_CASE("a message belongs to its thread and survives success") {
  CHECK(mla_problem_init(nullptr) == MLA_INVALID_ARGUMENT);
  const std::string mine = mla_last_error();
  CHECK(mine == "problem: must not be NULL, got NULL");
  std::thread([] {
    CHECK(std::string(mla_last_error()).empty());
    CHECK(mla_context_create(nullptr, nullptr) == MLA_INVALID_ARGUMENT);
    CHECK(std::string(mla_last_error()) == "out: must not be NULL, got NULL");
  }).join();
  mla_problem problem;
  CHECK(mla_problem_init(&problem) == MLA_OK);
  CHECK(mla_last_error() == mine);
}

TEST_CASE("a plan outlives its context") {
  Call call;
  REQUIRE(call.run_schedule() == MLA_OK);
  mla_context_destroy(call.context);
  call.context = nullptr;
  CHECK(call.run_decode() == MLA_OK);
}

TEST_CASE("a CUDA plan where there is no CUDA says so") {
  mla_backend_info info = {};
  info.struct_size = sizeof info;
  bool is_built = false, is_available = false;
  for (int32_t i = 0; mla_get_backend_info(i, &info) == MLA_OK; ++i) {
    if (info.device_type != MLA_DEVICE_CUDA) continue;
    is_built = true;
    is_available = is_available || info.is_available != 0;
  }
  if (is_available) return;
  Call call;
  call.problem.device_type = MLA_DEVICE_CUDA;
  mla_plan* plan = nullptr;
  CHECK(mla_plan_create(&plan, call.context, &call.problem) == (is_built ? MLA_NO_DRIVER : MLA_UNSUPPORTED));
  CHECK(std::string(mla_last_error()).find("problem dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:cuda0: ") == 0);
}
