// Every CPU backend that this machine can run, by name, against attention in double; and what must not change a bit of the result.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <random>
#include <thread>

#include "case.h"

// Counts what this program takes from the heap. A sanitizer brings its own operator new.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
static constexpr bool kIsSanitized = true;
static const std::atomic<int64_t> allocations{0};
#else
static constexpr bool kIsSanitized = false;
static std::atomic<int64_t> allocations{0};
void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
#endif

namespace mla::test {
namespace {

void check_case(const Spec& spec, const Case& c, const Backend& backend, const Output& want) {
  CAPTURE(std::string(backend.name));
  const std::string difference = compare(spec, c.run(backend), want);
  CHECK_MESSAGE(difference.empty(), difference);
}

void check_all_backends(const Spec& spec) {
  const Case c(spec);
  const Output want = c.expect();
  for (const Backend* backend : usable_backends()) check_case(c.spec(), c, *backend, want);
}

template <class T>
T pick(std::mt19937& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

// A random point of the problem space, small enough to compute in double.
Spec random_spec(uint32_t seed) {
  std::mt19937 random(seed);
  Spec s;
  s.seed = seed;
  s.page_seed = seed + 1;
  s.q_dtype = pick(random, {DType::kBf16, DType::kBf16, DType::kFp16, DType::kFp32});
  s.kv_dtype = random() % 4 == 0 ? pick(random, {DType::kBf16, DType::kFp16, DType::kFp32}) : s.q_dtype;
  s.out_dtype = random() % 2 == 0 ? DType::kFp32 : s.q_dtype;
  s.kv_heads = pick(random, {1, 1, 1, 2, 3});
  s.q_heads = s.kv_heads * pick(random, {1, 2, 3, 7, 16, 17, 40});
  const auto dims = pick(
      random, {std::pair{576, 512}, {576, 512}, {512, 512}, {320, 256}, {80, 64}, {33, 17}, {7, 5}, {2, 1}, {50, 34}});
  s.head_dim = dims.first;
  s.value_dim = dims.second;
  s.page_size = pick(random, {64, 64, 1, 2, 3, 16, 100, 256});
  const int batch = pick(random, {1, 1, 2, 3, 5});
  s.is_ragged = random() % 3 == 0;
  s.lengths.clear();
  s.q_lens.clear();
  const int32_t q_len = pick(random, {1, 1, 2, 4});
  for (int i = 0; i < batch; ++i) {
    s.lengths.push_back(pick(random, {0, 1, 2, 63, 64, 65, 127, 128, 129, static_cast<int32_t>(random() % 300)}));
    s.q_lens.push_back(s.is_ragged ? static_cast<int32_t>(random() % 4) : q_len);
  }
  if (s.is_ragged && s.q_lens[0] == 0) s.q_lens[0] = 1;  // a plan has at least one query token
  s.is_causal = random() % 2 == 0;
  s.is_lse_base2 = random() % 3 == 0;
  s.has_sink = random() % 3 == 0;
  s.has_lse = random() % 8 != 0;
  s.has_q_views = random() % 3 == 0;
  s.has_kv_views = random() % 3 == 0;
  s.is_strided = random() % 2 == 0;
  if (random() % 3 == 0) s.split_policy = SplitPolicy::kFixedChunk;
  s.chunk_tokens = pick(random, {64, 128, 192});
  s.max_len = random() % 2 == 0 ? 0 : 5000;  // a plan larger than the call cuts it finely
  s.max_batch = batch + static_cast<int>(random() % 3);
  return s;
}

TEST_CASE("every machine runs at least the scalar backend") {
  bool has_scalar = false;
  for (const Backend* b : usable_backends()) {
    MESSAGE("backend ", std::string(b->name));
    has_scalar |= std::string(b->name) == "cpu-scalar";
  }
  CHECK(has_scalar);
}

TEST_CASE("a few random problems match attention in double") {  // the emulated old machine runs these
  for (uint32_t seed = 1; seed <= 30; ++seed) check_all_backends(random_spec(seed));
}

TEST_CASE("random problems match attention in double, row by row") {
  const uint32_t last = kIsSanitized ? 80 : 400;  // instrumented code is twenty times slower
  for (uint32_t seed = 31; seed <= last; ++seed) check_all_backends(random_spec(seed));
}

TEST_CASE("the shapes of models match attention in double") {
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (bool is_causal : {false, true}) {
      if (kIsSanitized && is_causal) continue;
      Spec s;
      s.q_dtype = s.kv_dtype = s.out_dtype = dtype;
      s.q_heads = 128;
      s.q_lens = {2};
      s.lengths = {300, 0, 65};
      s.is_causal = is_causal;
      check_all_backends(s);
    }
  }
}

TEST_CASE("large scores keep their relative weights") {
  for (uint32_t seed = 1; seed <= 10; ++seed) {
    Spec s;
    s.seed = seed;
    s.q_dtype = s.kv_dtype = s.out_dtype = pick(*std::make_unique<std::mt19937>(seed), {DType::kBf16, DType::kFp32});
    s.q_magnitude = 12.0f;  // scores to +-50: the running maximum moves often
    s.lengths = {700};
    check_all_backends(s);
  }
}

TEST_CASE("a negative softmax scale is a scale") {
  Spec s;
  s.softmax_scale = -0.05f;
  s.out_dtype = DType::kFp32;
  check_all_backends(s);
}

TEST_CASE("rows that see no key give out 0 and lse -inf") {
  Spec s;
  s.lengths = {0, 2, 1};
  s.q_lens = {4};
  s.is_causal = true;
  s.has_sink = true;
  const Case c(s);
  for (const Backend* backend : usable_backends()) {
    CAPTURE(std::string(backend->name));
    const Output got = c.run(*backend);
    for (int token : {0, 1, 2, 3, 4, 5, 8, 9, 10}) {
      for (int head = 0; head < s.q_heads; ++head) {
        const int row = token * s.q_heads + head;
        CHECK(got.lse[row] == -std::numeric_limits<double>::infinity());
        for (int column = 0; column < s.value_dim; ++column) REQUIRE(got.out[row * s.value_dim + column] == 0.0);
      }
    }
  }
}

TEST_CASE("a visible NaN reaches every row that sees it, and no other request") {
  Spec s;
  s.lengths = {200, 200};
  s.out_dtype = DType::kFp32;
  const Output clean_want = Case(s).expect();
  for (int column : {0, 300, 575}) {
    for (int token : {0, 70, 199}) {
      Case c(s);
      c.set_key(1, token, 0, column, std::numeric_limits<double>::quiet_NaN());
      for (const Backend* backend : usable_backends()) {
        CAPTURE(std::string(backend->name));
        CAPTURE(column);
        CAPTURE(token);
        const Output got = c.run(*backend);
        for (int head = 0; head < s.q_heads; ++head) {
          CHECK(std::isfinite(got.lse[head]));
          CHECK(std::isnan(got.lse[s.q_heads + head]));
          for (int v = 0; v < s.value_dim; ++v) {
            REQUIRE(std::isfinite(got.out[head * s.value_dim + v]));
            REQUIRE(std::isnan(got.out[(s.q_heads + head) * s.value_dim + v]));
          }
        }
      }
    }
  }
}

TEST_CASE("an infinite key in a row's own score follows IEEE") {
  Spec s;
  s.lengths = {100};
  s.value_dim = 512;
  Case c(s);
  for (const Backend* backend : usable_backends()) {
    CAPTURE(std::string(backend->name));
    c.set_key(0, 70, 0, 575, std::numeric_limits<double>::infinity());  // a rope column: scores of +-inf
    const Output got = c.run(*backend);
    for (int head = 0; head < s.q_heads; ++head) {
      // +inf: exp(inf - inf) is NaN. -inf: the key weighs nothing.
      CHECK((std::isnan(got.lse[head]) || std::isfinite(got.lse[head])));
      CHECK(std::isnan(got.out[head * s.value_dim]) == std::isnan(got.lse[head]));
    }
  }
}

// ---------------------------------------------------------------- bitwise -------------------------------------------------------------

void run_backwards(void*, int64_t tasks, mla_task_fn fn, void* context) {
  for (int64_t i = tasks; i-- > 0;) fn(context, i);
}

void run_on_new_threads(void* calls, int64_t tasks, mla_task_fn fn, void* context) {
  static_cast<std::atomic<int>*>(calls)->fetch_add(1);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) threads.emplace_back([=] { fn(context, i); });
  for (std::thread& t : threads) t.join();
}

TEST_CASE("the bits do not depend on who runs the tasks") {
  for (uint32_t seed = 1001; seed <= 1020; ++seed) {
    Spec s = random_spec(seed);
    if (seed % 4 == 0) s.lengths = {3000}, s.q_lens = {1}, s.is_ragged = false, s.q_heads = 8 * s.kv_heads;
    const Case c(s);
    for (const Backend* backend : usable_backends()) {
      CAPTURE(std::string(backend->name));
      CAPTURE(seed);
      const Output one = c.run(*backend);
      for (int threads : {2, 3, 4}) CHECK(c.run(*backend, {threads}).bits == one.bits);
      CHECK(c.run(*backend, {3, run_backwards, nullptr}).bits == one.bits);
      std::atomic<int> calls{0};
      CHECK(c.run(*backend, {3, run_on_new_threads, &calls}).bits == one.bits);
      if (std::string(backend->name).starts_with("cpu-")) CHECK(calls > 0);
    }
  }
}

TEST_CASE("decode takes nothing from the heap once the threads are there") {
  if (kIsSanitized) return;
  Spec s;
  s.lengths = {700, 100};
  const Case c(s);
  for (const Backend* backend : usable_backends()) {
    if (std::string(backend->name) == "reference") continue;
    CAPTURE(std::string(backend->name));
    const int64_t before = allocations.load();
    CHECK(c.run(*backend, {2, nullptr, nullptr, 2, &allocations}).allocations == 0);
    CHECK(allocations.load() > before);  // the counter counts
  }
}

TEST_CASE("the bits do not depend on where the pages lie") {
  for (uint32_t seed = 2001; seed <= 2020; ++seed) {
    Spec s = random_spec(seed);
    const Case here(s);
    s.page_seed += 77;
    const Case there(s);
    for (const Backend* backend : usable_backends()) {
      CAPTURE(std::string(backend->name));
      CAPTURE(seed);
      CHECK(here.run(*backend).bits == there.run(*backend).bits);
    }
  }
}

TEST_CASE("under fixed_chunk the bits of a request do not depend on its batch mates") {
  Spec s;
  s.split_policy = SplitPolicy::kFixedChunk;
  s.chunk_tokens = 128;
  s.max_len = 4000;
  s.max_batch = 8;
  s.lengths = {777};
  const Case alone(s);  // the first request's data depend on the seed only
  for (const std::vector<int32_t>& mates : {std::vector<int32_t>{1}, {3000, 5}, {0, 128, 129, 2000}}) {
    Spec batch = s;
    batch.lengths.insert(batch.lengths.end(), mates.begin(), mates.end());
    const Case together(batch);
    for (const Backend* backend : usable_backends()) {
      CAPTURE(std::string(backend->name));
      Output a = alone.run(*backend), b = together.run(*backend);
      b.out.resize(a.out.size());
      b.lse.resize(a.lse.size());
      CHECK(a.out == b.out);
      CHECK(a.lse == b.lse);
    }
  }
}

}  // namespace
}  // namespace mla::test
