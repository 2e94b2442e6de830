// Threads share a plan and a schedule, each with scratch and outputs of its own, and all get the bits of a single thread.
#include <doctest/doctest.h>

#include <thread>

#include "call.h"

using mla::test::Call;

namespace {

void share_plan(const char* problem, const char* backend) {
  Call call(problem, backend);
  REQUIRE(call.run_schedule() == MLA_OK);
  REQUIRE(call.run_decode() == MLA_OK);
  const std::vector<float> expected_out = call.out, expected_lse = call.lse;

  constexpr int kThreads = 4, kRounds = 20;
  int failures[kThreads] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&call, &expected_out, &expected_lse, failure = &failures[t]] {
      for (int round = 0; round < kRounds; ++round) {
        std::vector<float> out(expected_out.size(), -12345.0f), lse(expected_lse.size(), -12345.0f);
        const mla::test::Buffer scratch = mla::test::aligned_buffer(call.info.scratch_bytes);
        mla::test::Desc out_t, lse_t;
        mla_decode_args args = call.decode_args;
        args.out = out_t.set(out.data(), MLA_DTYPE_FP32, {Call::kBatch, 2, Call::kHeads, Call::kValueDim});
        args.lse = lse_t.set(lse.data(), MLA_DTYPE_FP32, {Call::kBatch, 2, Call::kHeads});
        args.scratch = scratch.get();
        *failure += mla_decode(call.plan, &args, nullptr) != MLA_OK;
        *failure += out != expected_out || lse != expected_lse;
        // Plans may be made from the shared context meanwhile.
        mla_plan* plan = nullptr;
        *failure += mla_plan_create(&plan, call.context, &call.problem) != MLA_OK;
        mla_plan_destroy(plan);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int failed : failures) CHECK(failed == 0);
}

}  // namespace

TEST_CASE("threads may share a context, a plan and a schedule") {
  mla_backend_info backend = {};
  backend.struct_size = sizeof backend;
  for (int32_t i = 0; mla_get_backend_info(i, &backend) == MLA_OK; ++i) {
    if (backend.device_type != MLA_DEVICE_CPU || backend.is_available == 0) continue;
    CAPTURE(std::string(backend.name));
    share_plan(Call::kProblem, backend.name);
    // A plan for long requests has many parts: the library's own threads take part.
    share_plan("dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20000", backend.name);
  }
}
