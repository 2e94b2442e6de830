// A backend asked for by name is the one that runs: by the context's option, by MLAKIT_BACKEND, and the number of threads likewise.
#include <doctest/doctest.h>

#include <cstdlib>
#include <optional>

#include "backend.h"
#include "call.h"
#include "validate.h"

using mla::test::Call;

namespace {

class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~Environment() {
    if (old_)
      setenv(name_, old_->c_str(), 1);
    else
      unsetenv(name_);
  }

 private:
  const char* name_;
  std::optional<std::string> old_;
};

// The backends of this machine's CPU, by the internal table, so that a wrong answer of the C ABI shows.
std::vector<const mla::Backend*> cpu_backends() {
  std::vector<const mla::Backend*> list;
  for (const mla::Backend* const* b = mla::kBackends; *b != nullptr; ++b) {
    if ((*b)->device_type == mla::DeviceType::kCpu && (*b)->why_unavailable().empty()) list.push_back(*b);
  }
  return list;
}

uint64_t scratch_bytes(int32_t num_threads) {
  mla_context_options options = {};
  options.struct_size = sizeof options;
  options.backend = "cpu-scalar";
  options.num_threads = num_threads;
  mla_context* context = nullptr;
  REQUIRE_MESSAGE(mla_context_create(&context, &options) == MLA_OK, mla_last_error());
  Call call;
  mla_plan* plan = nullptr;
  REQUIRE(mla_plan_create(&plan, context, &call.problem) == MLA_OK);
  mla_plan_info info = {};
  info.struct_size = sizeof info;
  REQUIRE(mla_plan_get_info(plan, &info) == MLA_OK);
  mla_plan_destroy(plan);
  mla_context_destroy(context);
  return info.scratch_bytes;
}

}  // namespace

TEST_CASE("the backend named by the option runs, whatever the environment says") {
  const Environment environment("MLAKIT_BACKEND", "cpu-scalar");
  for (const mla::Backend* backend : cpu_backends()) {
    CAPTURE(std::string(backend->name));
    Call call(Call::kProblem, backend->name);
    CHECK(std::string(call.info.backend) == backend->name);
    // Backends differ in what they need: a plan made by the backend itself has to agree.
    mla::Plan plan;
    auto context = std::make_shared<mla::Context>();
    context->num_threads = 2;
    plan.context = context;
    REQUIRE(mla::make_problem(call.problem, plan.problem).is_ok());
    REQUIRE(backend->plan(plan).is_ok());
    CHECK(plan.variant == call.info.variant);
    CHECK(plan.scratch_bytes == call.info.scratch_bytes);
  }
}

TEST_CASE("the backend named by MLAKIT_BACKEND runs, and a context reads it once") {
  for (const mla::Backend* backend : cpu_backends()) {
    mla_context* context = nullptr;
    {
      const Environment environment("MLAKIT_BACKEND", backend->name);
      REQUIRE(mla_context_create(&context, nullptr) == MLA_OK);
    }
    const Environment later("MLAKIT_BACKEND", "nonesuch");
    mla_problem problem;
    REQUIRE(mla_problem_parse(&problem, Call::kProblem) == MLA_OK);
    mla_plan* plan = nullptr;
    REQUIRE(mla_plan_create(&plan, context, &problem) == MLA_OK);
    mla_plan_info info = {};
    info.struct_size = sizeof info;
    REQUIRE(mla_plan_get_info(plan, &info) == MLA_OK);
    CHECK(std::string(info.backend) == backend->name);
    mla_plan_destroy(plan);
    mla_context_destroy(context);
  }
}

TEST_CASE("the first backend that takes the problem runs when none is named") {
  const Environment environment("MLAKIT_BACKEND", "");
  Call call;
  CHECK(std::string(call.info.backend) == cpu_backends().front()->name);
}

TEST_CASE("an unknown MLAKIT_BACKEND is refused with the names that there are") {
  const Environment environment("MLAKIT_BACKEND", "nonesuch");
  mla_context* context = nullptr;
  CHECK(mla_context_create(&context, nullptr) == MLA_INVALID_ARGUMENT);
  const std::string message = mla_last_error();
  CHECK(message.find("MLAKIT_BACKEND: must be one of ") == 0);
  CHECK(message.find("reference, got \"nonesuch\"") != std::string::npos);
}

TEST_CASE("a forced backend of another device is refused with the reason") {
  Call call(Call::kProblem, "reference");
  call.problem.device_type = MLA_DEVICE_CUDA;
  mla_plan* plan = nullptr;
  CHECK(mla_plan_create(&plan, call.context, &call.problem) == MLA_UNSUPPORTED);
  CHECK(std::string(mla_last_error()) ==
        "problem dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:cuda0: no backend takes it: reference: was asked for by name and "
        "serves the CPU only");
}

TEST_CASE("MLAKIT_NUM_THREADS sets the threads unless the option does") {
  const uint64_t one = scratch_bytes(1);
  const uint64_t three = scratch_bytes(3);
  CHECK(three > one);
  const Environment environment("MLAKIT_NUM_THREADS", "3");
  CHECK(scratch_bytes(0) == three);
  CHECK(scratch_bytes(1) == one);
  for (const char* bad : {"0", "-1", "two", "3x", "1025", "99999999999"}) {
    CAPTURE(std::string(bad));
    const Environment wrong("MLAKIT_NUM_THREADS", bad);
    mla_context* context = nullptr;
    CHECK(mla_context_create(&context, nullptr) == MLA_INVALID_ARGUMENT);
    CHECK(std::string(mla_last_error()) ==
          "MLAKIT_NUM_THREADS: must be a number from 1 to 1024, got \"" + std::string(bad) + "\"");
  }
}
