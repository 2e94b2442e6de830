// The CUDA backend below the C ABI: the device's schedule against the host's, byte by byte, and small decode calls against plain loops in
// double precision. Small enough to run under compute-sanitizer.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "copy_late.h"
#include "cuda/cuda_backend.h"
#include "schedule/build.h"

namespace {

bool has_hopper() {
  const std::string reason = mla::kSm90Backend.why_unavailable();
  if (!reason.empty()) MESSAGE("no Hopper GPU: " << reason);
  return reason.empty();
}

// Device memory with a copy on the host.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> values) : host(std::move(values)) {
    REQUIRE(cudaMalloc(&data_, bytes() + 16) == cudaSuccess);
    upload();
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* device() const { return static_cast<T*>(data_); }
  void upload() { REQUIRE(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice) == cudaSuccess); }
  void download() {
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    REQUIRE(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost) == cudaSuccess);
  }
  size_t bytes() const { return host.size() * sizeof(T); }

  std::vector<T> host;

 private:
  void* data_ = nullptr;
};

struct Shape {
  int64_t q_len;
  int32_t q_heads, kv_heads, page_size;
  bool is_causal;
  int32_t chunk_tokens;  // 0: balanced
  std::vector<int32_t> lengths;
  int64_t max_len = 1;  // that the plan is made for, where the lengths are shorter
};

mla::Problem make_problem(const Shape& s) {
  mla::Problem p{};
  p.device_type = mla::DeviceType::kCuda;
  p.q_dtype = p.kv_dtype = p.out_dtype = mla::DType::kBf16;
  p.max_batch = static_cast<int64_t>(s.lengths.size());
  p.q_len = s.q_len;
  p.max_q_tokens = p.max_batch * s.q_len;
  p.max_len = s.max_len;
  for (const int32_t n : s.lengths) p.max_len = std::max<int64_t>(p.max_len, n);
  p.max_tokens = p.max_batch * p.max_len;
  p.q_heads = s.q_heads;
  p.kv_heads = s.kv_heads;
  p.head_dim = 576;
  p.value_dim = 512;
  p.page_size = s.page_size;
  p.split_policy = s.chunk_tokens > 0 ? mla::SplitPolicy::kFixedChunk : mla::SplitPolicy::kBalanced;
  p.chunk_tokens = s.chunk_tokens;
  p.cp_world = 1;
  p.softmax_scale = 1.0f / 24.0f;
  p.is_causal = s.is_causal;
  return p;
}

mla::Plan make_plan(const mla::Problem& problem, const mla::Backend& backend) {
  mla::Plan plan;
  plan.context = std::make_shared<mla::Context>();
  plan.problem = problem;
  plan.backend = &backend;
  const mla::Status status = backend.plan(plan);
  REQUIRE_MESSAGE(status.is_ok(), status.message());
  return plan;
}

void require_ok(const mla::Status& status) { REQUIRE_MESSAGE(status.is_ok(), status.message()); }

// q_begin: empty, or batch + 1 numbers.
std::vector<std::byte> host_schedule(const mla::Plan& plan, const std::vector<int32_t>& lengths,
                                     const std::vector<int32_t>& q_begin) {
  std::vector<std::byte> bytes(plan.layout().bytes(), std::byte{0xA5});
  mla::schedule::build(
      plan.config, mla::schedule::View(bytes.data(), plan.layout()), static_cast<int32_t>(lengths.size()),
      [&](int32_t r) { return lengths[static_cast<size_t>(r)]; },
      [&](int32_t r) {
        return q_begin.empty() ? static_cast<int32_t>(r * plan.problem.q_len) : q_begin[static_cast<size_t>(r)];
      });
  return bytes;
}

std::vector<__nv_bfloat16> random_bf16(std::mt19937& random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> values(count);
  for (__nv_bfloat16& x : values) x = __float2bfloat16(normal(random));
  return values;
}

// What the kernel before decode writes while decode's CTAs have already started: what they read before that is not what holds.
enum class Late { kNothing, kSchedule, kTable };

// Runs one batch on the device, and checks each row against softmax(q k) v in double.
void check_decode(const Shape& s, Late late = Late::kNothing) {
  std::mt19937 random(7);
  const mla::Plan plan = make_plan(make_problem(s), mla::kSm90Backend);
  const mla::Problem& p = plan.problem;
  const size_t batch = s.lengths.size();
  const int64_t width = p.max_pages();
  std::vector<int32_t> table(batch * static_cast<size_t>(width), INT32_MAX);
  int32_t pages = 0;
  for (size_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < mla::ceil_div(s.lengths[b], s.page_size); ++i)
      table[b * static_cast<size_t>(width) + static_cast<size_t>(i)] = pages++;
  }
  const size_t rows = batch * static_cast<size_t>(s.q_len * s.q_heads);
  const size_t row_width = static_cast<size_t>(p.head_dim);
  Buffer<__nv_bfloat16> q(random_bf16(random, rows * row_width));
  Buffer<__nv_bfloat16> kv(
      random_bf16(random, static_cast<size_t>(pages) * static_cast<size_t>(s.page_size * s.kv_heads) * row_width));
  Buffer<__nv_bfloat16> out(std::vector<__nv_bfloat16>(rows * 512, __float2bfloat16(NAN)));
  Buffer<float> lse(std::vector<float>(rows, NAN));
  Buffer<int32_t> lengths(s.lengths), tables(table);
  Buffer<std::byte> schedule(std::vector<std::byte>(plan.layout().bytes())),
      scratch(std::vector<std::byte>(plan.scratch_bytes));

  require_ok(mla::kSm90Backend.schedule(
      plan, {static_cast<int32_t>(batch), {lengths.device(), 1}, {}, schedule.device()}, nullptr));
  const auto write_late = [](void* data, const void* now, size_t bytes) {
    std::vector<std::byte> right(bytes);
    REQUIRE(cudaMemcpy(right.data(), data, bytes, cudaMemcpyDeviceToHost) == cudaSuccess);
    REQUIRE(cudaMemcpy(data, now, bytes, cudaMemcpyDefault) == cudaSuccess);
    auto source = std::make_shared<Buffer<std::byte>>(std::move(right));
    copy_late(static_cast<std::byte*>(data), source->device(), bytes);
    return source;  // to be kept until the copy is over
  };
  std::shared_ptr<Buffer<std::byte>> source;
  if (late == Late::kSchedule) {
    std::vector<int32_t> others(s.lengths.rbegin(), s.lengths.rend());
    others[0] = static_cast<int32_t>(p.max_len);
    const std::vector<std::byte> wrong = host_schedule(plan, others, {});
    source = write_late(schedule.device(), wrong.data(), wrong.size());
  } else if (late == Late::kTable) {
    const std::vector<int32_t> wrong(table.rbegin(), table.rend());
    source = write_late(tables.device(), wrong.data(), tables.bytes());
  }
  mla::DecodeCall call{};
  call.batch = static_cast<int32_t>(batch);
  call.q_tokens = static_cast<int64_t>(batch) * s.q_len;
  call.q = {q.device(), s.q_len * s.q_heads * p.head_dim, int64_t{s.q_heads} * p.head_dim, p.head_dim};
  call.out = {out.device(), s.q_len * s.q_heads * 512, int64_t{s.q_heads} * 512, 512};
  call.lse = {lse.device(), s.q_len * s.q_heads, s.q_heads, 1};
  const int64_t token_stride = int64_t{s.kv_heads} * p.head_dim;
  call.kv = {kv.device(), pages, s.page_size * token_stride, token_stride, p.head_dim};
  call.block_table = {tables.device(), width, width};
  call.schedule = schedule.device();
  call.scratch = scratch.device();
  require_ok(mla::kSm90Backend.decode(plan, call, nullptr));
  out.download();
  lse.download();

  const int32_t group = s.q_heads / s.kv_heads;
  for (size_t row = 0; row < rows; ++row) {
    const int64_t b = static_cast<int64_t>(row) / (s.q_len * s.q_heads),
                  t = static_cast<int64_t>(row) / s.q_heads % s.q_len;
    const int64_t kv_head = static_cast<int64_t>(row) % s.q_heads / group;
    const int64_t len = s.lengths[static_cast<size_t>(b)];
    const int64_t visible = std::max<int64_t>(0, s.is_causal ? len - s.q_len + 1 + t : len);
    std::vector<double> score(static_cast<size_t>(visible)), expected(512);
    double sum = 0;
    const auto key = [&](int64_t j) {
      const int64_t page = table[static_cast<size_t>(b * width + j / s.page_size)];
      return &kv.host[static_cast<size_t>(((page * s.page_size + j % s.page_size) * s.kv_heads + kv_head) *
                                          p.head_dim)];
    };
    for (int64_t j = 0; j < visible; ++j) {
      double dot = 0;
      for (size_t c = 0; c < row_width; ++c)
        dot += double{__bfloat162float(q.host[row * row_width + c])} * double{__bfloat162float(key(j)[c])};
      score[static_cast<size_t>(j)] = std::exp(dot / 24.0);
      sum += score[static_cast<size_t>(j)];
    }
    for (int64_t j = 0; j < visible; ++j) {
      for (size_t c = 0; c < 512; ++c)
        expected[c] += score[static_cast<size_t>(j)] / sum * double{__bfloat162float(key(j)[c])};
    }
    double error = 0, norm = 0;
    for (size_t c = 0; c < 512; ++c) {
      const double got = double{__bfloat162float(out.host[row * 512 + c])};
      error += (got - expected[c]) * (got - expected[c]);
      norm += expected[c] * expected[c];
    }
    CAPTURE(row);
    if (visible == 0) {
      CHECK(error == 0.0);
      CHECK(lse.host[row] == -INFINITY);
    } else {
      CHECK(std::sqrt(error / norm) < 6e-3);
      CHECK(std::abs(double{lse.host[row]} - std::log(sum)) < 1e-3);
    }
  }
}

}  // namespace

namespace {

// The device's schedule of these lengths (and query tokens, where they are ragged), against the host's of s.lengths.
void check_schedule(const Shape& s, const std::vector<int32_t>& given, const std::vector<int32_t>& q_begin = {}) {
  mla::Plan plan = make_plan(make_problem(s), mla::kSm90Backend);
  plan.config.plan_key = 12345;
  Buffer<int32_t> lengths(given), cu_seqlens_q(q_begin);
  Buffer<std::byte> schedule(std::vector<std::byte>(plan.layout().bytes(), std::byte{0xA5}));
  mla::ScheduleCall call{static_cast<int32_t>(given.size()), {lengths.device(), 1}, {}, schedule.device()};
  if (!q_begin.empty()) call.cu_seqlens_q = {cu_seqlens_q.device(), 1};
  require_ok(mla::kSm90Backend.schedule(plan, call, nullptr));
  schedule.download();
  const std::vector<std::byte> expected = host_schedule(plan, s.lengths, q_begin);
  CAPTURE(s.lengths.size());
  CAPTURE(s.q_heads);
  CAPTURE(s.q_len);
  CAPTURE(s.chunk_tokens);
  CHECK(std::memcmp(schedule.host.data(), expected.data(), expected.size()) == 0);
}

// No request of the host's schedule is cut.
bool is_whole(const Shape& s) {
  const mla::Plan plan = make_plan(make_problem(s), mla::kSm90Backend);
  const std::vector<std::byte> bytes = host_schedule(plan, s.lengths, {});
  const mla::schedule::ConstView view(bytes.data(), plan.layout());
  for (int32_t p = 0; p < plan.config.parts; ++p) {
    if (view.boundary()[p].block > 0) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("the device's schedule has the host's bytes") {
  if (!has_hopper()) return;
  std::mt19937 random(3);
  for (const int32_t chunk : {0, 128, 2048}) {
    for (const int64_t q_len : {1, 2, 5}) {
      for (const size_t batch : {1, 2, 7, 128, 256, 257, 513, 2500}) {
        Shape s{q_len, 100, 1, 64, true, chunk, std::vector<int32_t>(batch)};
        for (int32_t& n : s.lengths) n = random() % 4 == 0 ? 0 : static_cast<int32_t>(random() % 9000);
        s.lengths[0] = 9000;
        check_schedule(s, s.lengths);
      }
    }
  }
}

TEST_CASE("the device's schedule has the host's bytes where requests are whole, or nearly could be") {
  if (!has_hopper()) return;
  std::mt19937 random(4);
  int whole = 0, cut = 0;
  for (const int32_t q_heads : {16, 128, 512}) {
    for (const size_t batch : {1, 31, 64, 66, 96, 120, 128, 132, 133, 264, 400, 511, 512, 513, 2048, 2049}) {
      for (const int32_t spread : {0, 3, 10, 30}) {
        for (const int32_t length : {64, 700, 4096}) {
          Shape s{1, q_heads, 1, 64, false, 0, std::vector<int32_t>(batch)};
          for (int32_t& n : s.lengths) n = length * (100 - static_cast<int32_t>(random() % 100) * spread / 100) / 100;
          check_schedule(s, s.lengths);
          (is_whole(s) ? whole : cut) += 1;
        }
      }
    }
  }
  MESSAGE(whole, " whole, ", cut, " cut");
  CHECK(whole > 100);
  CHECK(cut > 100);
}

TEST_CASE("small schedules of every way have the host's bytes") {
  if (!has_hopper()) return;
  const Shape even{1, 16, 1, 64, false, 0, std::vector<int32_t>(128, 1000)},
      cut{2, 9, 1, 64, true, 0, {3000, 1, 0, 700}};
  Shape packed{1, 16, 1, 64, false, 0, std::vector<int32_t>(200)};
  std::mt19937 random(6);
  for (int32_t& n : packed.lengths) n = 64 + static_cast<int32_t>(random() % 400);
  const mla::Plan plan = make_plan(make_problem(packed), mla::kSm90Backend);
  std::vector<std::byte> bytes = host_schedule(plan, packed.lengths, {});
  const mla::schedule::View view(bytes.data(), plan.layout());
  REQUIRE(is_whole(packed));
  REQUIRE_FALSE(mla::schedule::keep_whole_even(plan.config, view, 200,
                                               mla::schedule::whole_limit(plan.config, view.header()->total_cost)));
  for (const Shape& s : {even, cut, packed, Shape{1, 16, 1, 64, false, 128, {3000, 1, 0, 700}}})
    check_schedule(s, s.lengths);
  check_schedule({5, 16, 1, 64, false, 128, {3000, 1, 700}}, {3000, 1, 700}, {0, 5, 5, 8});
}

TEST_CASE("the device's schedule has the host's bytes for ragged queries") {
  if (!has_hopper()) return;
  std::mt19937 random(5);
  for (const int32_t chunk : {0, 128}) {
    for (const size_t batch : {1, 33, 128, 256, 257, 1000, 2500}) {
      Shape s{5, 100, 1, 64, false, chunk, std::vector<int32_t>(batch)};
      std::vector<int32_t> q_begin = {0};
      for (int32_t& n : s.lengths) {
        n = static_cast<int32_t>(random() % 3000);
        q_begin.push_back(q_begin.back() + static_cast<int32_t>(random() % 6));
      }
      check_schedule(s, s.lengths, q_begin);
    }
  }
}

TEST_CASE("the device's schedule takes invalid lengths for empty requests") {
  if (!has_hopper()) return;
  Shape s{1, 16, 1, 64, false, 0, std::vector<int32_t>(128, 4000)};
  std::vector<int32_t> given = s.lengths;
  for (const size_t r : {3, 64, 127}) {
    given[r] = r == 64 ? -5 : INT32_MAX;
    s.lengths[r] = mla::schedule::kInvalidLen;
  }
  check_schedule(s, given);
}

TEST_CASE("the device's schedule is the same where costs need 64 bits") {
  if (!has_hopper()) return;
  Shape s{1, 16, 1, 64, false, 0, std::vector<int32_t>(200, 4000)};
  s.lengths[7] = INT32_MAX - 1000;
  check_schedule(s, s.lengths);
  s.lengths.assign(128, INT32_MAX - 1000);
  check_schedule(s, s.lengths);
}

TEST_CASE("small batches match double precision, whatever decode saw before the kernel before it had ended") {
  if (!has_hopper()) return;
  for (const Late late : {Late::kSchedule, Late::kTable}) {
    check_decode({1, 16, 1, 64, false, 0, {70, 300, 0, 1}}, late);
    check_decode({2, 40, 1, 64, true, 0, {500, 333, 1}}, late);
    check_decode({1, 128, 1, 16, false, 128, {90, 400}}, late);
    check_decode({2, 128, 1, 64, true, 0, {700, 1, 333}}, late);
    check_decode({1, 5, 1, 1, false, 0, {70, 3}}, late);
  }
}

TEST_CASE("small batches match double precision") {
  if (!has_hopper()) return;
  check_decode({1, 16, 1, 64, false, 0, {70, 0, 1}});
  check_decode({2, 9, 1, 64, true, 0, {130, 1, 0, 33}});
  check_decode({1, 70, 1, 64, false, 0, {200}});
  check_decode({2, 4, 2, 16, true, 0, {90, 20}});
  check_decode({1, 5, 1, 1, false, 0, {70}});
  check_decode({1, 16, 1, 64, false, 128, {400, 60}});
  check_decode({1, 16, 1, 64, false, 0, {3000}});
  check_decode({1, 128, 1, 64, false, 0, {300, 0, 77}});
  check_decode({2, 128, 1, 64, true, 0, {500, 1, 33}});
  check_decode({1, 128, 1, 1, false, 0, {70}});
}

TEST_CASE("small batches of several pieces a CTA match double precision, in narrow and in wide blocks") {
  if (!has_hopper()) return;
  std::vector<int32_t> lengths(70);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = static_cast<int32_t>(i * 37 % 150);
  lengths[7] = 400;
  for (const int64_t q_len : {1, 2}) {
    for (const int64_t max_len : {400, 16384}) {
      const Shape s{q_len, 128, 1, 64, true, 0, lengths, max_len};
      CHECK(make_plan(make_problem(s), mla::kSm90Backend).config.block_tokens == (max_len > 400 ? 64 : 32));
      check_decode(s);
      check_schedule(s, lengths);
    }
  }
}
