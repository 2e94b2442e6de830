// The hot path does not allocate; creation that runs out of memory fails cleanly. malloc and operator new are counted here, and can be
// made to fail.
#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <new>

#include "call.h"

extern "C" void* __libc_malloc(size_t);  // glibc's own, behind the replaced name

namespace {

std::atomic<int64_t> g_allocations{0};
std::atomic<int64_t> g_allocations_left{INT64_MAX};  // of operator new, on any thread

void* counted_new(size_t size) {
  ++g_allocations;
  if (g_allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
  if (void* p = __libc_malloc(size != 0 ? size : 1)) return p;
  throw std::bad_alloc();
}

}  // namespace

extern "C" void* malloc(size_t size) {
  ++g_allocations;
  return __libc_malloc(size);
}
void* operator new(size_t size) { return counted_new(size); }
void* operator new[](size_t size) { return counted_new(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }

using mla::test::Call;

TEST_CASE("the counter counts") {
  const int64_t before = g_allocations;
  std::free(std::malloc(10));
  delete new std::string(100, 'x');
  CHECK(g_allocations >= before + 3);
}

TEST_CASE("schedule and decode do not allocate, on any CPU backend") {
  mla_backend_info backend = {};
  backend.struct_size = sizeof backend;
  for (int32_t i = 0; mla_get_backend_info(i, &backend) == MLA_OK; ++i) {
    if (backend.device_type != MLA_DEVICE_CPU || backend.is_available == 0) continue;
    for (const char* problem :
         {"dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20", "dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20:causal:ragged:chunk64"}) {
      CAPTURE(std::string(backend.name));
      CAPTURE(std::string(problem));
      Call call(problem, backend.name);
      call.decode_args.cache_seqlens = call.schedule_args.cache_seqlens;
      for (int round = 0; round < 3; ++round) {
        const int64_t before = g_allocations;
        const mla_status scheduled = call.run_schedule();
        const mla_status decoded = call.run_decode();
        const int64_t after = g_allocations;
        CHECK(scheduled == MLA_OK);
        CHECK(decoded == MLA_OK);
        // The first decode may start the library's threads.
        if (round > 0) CHECK(after == before);
      }
    }
  }
}

TEST_CASE("creation that runs out of memory at any point says so, and nothing is left behind") {
  int64_t steps = 0;
  for (bool is_done = false; !is_done; ++steps) {
    REQUIRE(steps < 1000);
    mla_context* context = nullptr;
    mla_plan* plan = nullptr;
    mla_problem problem;
    mla_problem_parse(&problem, Call::kProblem);
    g_allocations_left = steps;
    mla_status status = mla_context_create(&context, nullptr);
    if (status == MLA_OK) status = mla_plan_create(&plan, context, &problem);
    g_allocations_left = INT64_MAX;
    is_done = status == MLA_OK;
    if (!is_done) {
      CHECK(status == MLA_OUT_OF_MEMORY);
      CHECK(std::string(mla_last_error()) == "memory: the host has none left for this call");
      CHECK(plan == nullptr);
    }
    mla_plan_destroy(plan);
    mla_context_destroy(context);
  }
  CHECK(steps > 3);
}
