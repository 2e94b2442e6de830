#include "case.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <sstream>
#include <stdexcept>

namespace mla::test {

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

uint16_t double_to_bf16(double x) {
  const float f = static_cast<float>(x);
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

double bf16_to_double(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

uint16_t double_to_fp16(double x) {
  if (x != x) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(x);
  if (a >= 65520.0) return sign | 0x7c00;
  int exponent = a == 0.0 ? -14 : std::max(std::ilogb(a), -14);
  double mantissa = std::nearbyint(std::ldexp(a, 10 - exponent));  // 1024 .. 2048, or less for denormals
  if (mantissa == 2048.0) {
    mantissa = 1024.0;
    ++exponent;
  }
  const int biased = mantissa < 1024.0 ? 0 : exponent + 15;
  return static_cast<uint16_t>(sign | (biased << 10) | (static_cast<int>(mantissa) & 0x3ff));
}

double fp16_to_double(uint16_t h) {
  const int exponent = h >> 10 & 0x1f, mantissa = h & 0x3ff;
  double a;
  if (exponent == 31)
    a = mantissa ? kNan : std::numeric_limits<double>::infinity();
  else
    a = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  return h & 0x8000 ? -a : a;
}

double unit_roundoff(DType t) { return t == DType::kBf16 ? 0x1p-8 : t == DType::kFp16 ? 0x1p-11 : 0x1p-24; }

// Exactly so many bytes, so that a sanitizer sees the first one after them; all 0xff, which is NaN.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t bytes)
      : p_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kScratchAlignment)))) {
    std::memset(p_, 0xff, bytes);
  }
  ~AlignedBytes() { ::operator delete(p_, std::align_val_t(kScratchAlignment)); }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  std::byte* get() const { return p_; }

 private:
  std::byte* p_;
};

}  // namespace

void Case::Tensor::resize(int64_t elems) {
  data.resize(static_cast<size_t>(elems) * dtype_bytes(dtype));
  for (int64_t i = 0; i < elems; ++i) set(i, kNan);
}

void Case::Tensor::set(int64_t index, double value) {
  unsigned char* p = data.data() + index * dtype_bytes(dtype);
  if (dtype == DType::kFp32) {
    const float f = static_cast<float>(value);
    std::memcpy(p, &f, 4);
  } else {
    const uint16_t h = dtype == DType::kBf16 ? double_to_bf16(value) : double_to_fp16(value);
    std::memcpy(p, &h, 2);
  }
}

double Case::Tensor::get(int64_t index) const {
  const unsigned char* p = data.data() + index * dtype_bytes(dtype);
  if (dtype == DType::kFp32) {
    float f;
    std::memcpy(&f, p, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  return dtype == DType::kBf16 ? bf16_to_double(h) : fp16_to_double(h);
}

std::string Spec::describe() const {
  const char* names[] = {"", "bf16", "fp16", "fp32"};
  std::ostringstream s;
  s << "q " << names[static_cast<int>(q_dtype)] << " kv " << names[static_cast<int>(kv_dtype)] << " out "
    << names[static_cast<int>(out_dtype)] << " heads " << q_heads << "/" << kv_heads << " dims " << head_dim << "/"
    << value_dim << " page " << page_size << " lengths";
  for (int32_t n : lengths) s << " " << n;
  s << " q_lens";
  for (int32_t n : q_lens) s << " " << n;
  for (const auto& [flag, name] : {std::pair{is_causal, "causal"},
                                   {is_ragged, "ragged"},
                                   {is_lse_base2, "lse2"},
                                   {has_sink, "sink"},
                                   {has_q_views, "q views"},
                                   {has_kv_views, "kv views"},
                                   {is_strided, "strided"}}) {
    if (flag) s << " " << name;
  }
  if (split_policy == SplitPolicy::kFixedChunk) s << " chunk " << chunk_tokens;
  s << " seed " << seed;
  return s.str();
}

Problem Case::problem() const {
  Problem p{};
  p.device_type = DeviceType::kCpu;
  p.q_dtype = spec_.q_dtype;
  p.kv_dtype = spec_.kv_dtype;
  p.out_dtype = spec_.out_dtype;
  p.kv_format = KvFormat::kPlain;
  p.max_batch = std::max<int64_t>(spec_.max_batch, batch_);
  p.q_len = *std::max_element(spec_.q_lens.begin(), spec_.q_lens.end());
  p.max_q_tokens = p.max_batch * p.q_len;
  p.max_len = std::max<int64_t>({spec_.max_len, 1, *std::max_element(spec_.lengths.begin(), spec_.lengths.end())});
  p.max_tokens = p.max_batch * p.max_len;
  p.q_heads = spec_.q_heads;
  p.kv_heads = spec_.kv_heads;
  p.head_dim = spec_.head_dim;
  p.value_dim = spec_.value_dim;
  p.page_size = spec_.page_size;
  p.split_policy = spec_.split_policy;
  p.chunk_tokens = spec_.split_policy == SplitPolicy::kFixedChunk ? spec_.chunk_tokens : 0;
  p.cp_world = 1;
  p.softmax_scale =
      spec_.softmax_scale != 0.0f ? spec_.softmax_scale : 1.0f / std::sqrt(static_cast<float>(spec_.head_dim));
  p.is_causal = spec_.is_causal;
  p.is_ragged = spec_.is_ragged;
  p.is_lse_base2 = spec_.is_lse_base2;
  return p;
}

Case::Case(const Spec& spec) : spec_(spec), batch_(static_cast<int32_t>(spec.lengths.size())) {
  if (spec_.q_lens.size() == 1) spec_.q_lens.resize(spec_.lengths.size(), spec_.q_lens[0]);
  // A request's data depend on the seed and its place in the batch, not on the others.
  const auto numbers_of = [&](int32_t request, uint32_t tensor) {
    return [random = std::mt19937(spec_.seed * 1000003u + static_cast<uint32_t>(request) * 17u + tensor),
            normal = std::normal_distribution<double>()]() mutable { return normal(random); };
  };
  q_begin_ = {0};
  for (int32_t n : spec_.q_lens) q_begin_.push_back(q_begin_.back() + n);
  q_tokens_ = q_begin_.back();

  // Rows of q and out, with gaps if strided; one uniform layout serves uniform and ragged calls.
  const int64_t gap = spec_.is_strided ? 3 : 0;
  const auto rows_view = [&](int64_t columns, int64_t row_gap) {
    RowView v;
    v.head_stride = columns + row_gap;
    v.token_stride = v.head_stride * spec_.q_heads + row_gap;
    v.batch_stride = v.token_stride * spec_.q_lens[0];
    return v;
  };
  const int32_t rope_dim = spec_.head_dim - spec_.value_dim;
  const bool has_q_rope = spec_.has_q_views && rope_dim > 0, has_kv_rope = spec_.has_kv_views && rope_dim > 0;
  q_view_ = rows_view(has_q_rope ? spec_.value_dim : spec_.head_dim, gap);
  q_rope_view_ = rows_view(rope_dim, 2 * gap);
  out_view_ = rows_view(spec_.value_dim, gap);
  lse_view_ = rows_view(1, 0);
  if (spec_.is_strided) {  // heads first
    lse_view_.token_stride = 1;
    lse_view_.head_stride = q_tokens_ + 1;
    lse_view_.batch_stride = spec_.q_lens[0];
  }
  q_.dtype = q_rope_.dtype = spec_.q_dtype;
  q_.resize(q_view_.token_stride * q_tokens_);
  q_rope_.resize(q_rope_view_.token_stride * q_tokens_);
  out_elems_ = out_view_.token_stride * q_tokens_;
  lse_elems_ = spec_.is_strided ? lse_view_.head_stride * spec_.q_heads : q_tokens_ * spec_.q_heads;
  for (int32_t r = 0; r < batch_; ++r) {
    auto next = numbers_of(r, 0);
    for (int64_t t = q_begin_[r]; t < q_begin_[r + 1]; ++t) {
      for (int32_t h = 0; h < spec_.q_heads; ++h) {
        for (int32_t c = 0; c < spec_.head_dim; ++c) {
          bool is_rope;
          const int64_t i = q_index(t, h, c, &is_rope);
          (is_rope ? q_rope_ : q_).set(i, next() * spec_.q_magnitude);
        }
      }
    }
  }

  // Pages at random places of a pool with one page too many; used rows random, all else NaN.
  table_width_ = 2;
  int64_t used_pages = 0;
  for (int32_t n : spec_.lengths) {
    const int64_t pages = ceil_div(n, spec_.page_size);
    used_pages += pages;
    table_width_ = std::max(table_width_, pages + 2);
  }
  pages_ = used_pages + 1;
  const auto cache_view = [&](int64_t columns, int64_t row_gap) {
    CacheView v;
    v.pages = pages_;
    v.head_stride = columns + row_gap;
    v.token_stride = v.head_stride * spec_.kv_heads + row_gap;
    v.page_stride = v.token_stride * spec_.page_size + row_gap;
    return v;
  };
  kv_view_ = cache_view(has_kv_rope ? spec_.value_dim : spec_.head_dim, gap);
  kv_rope_view_ = cache_view(rope_dim, 2 * gap);
  kv_.dtype = kv_rope_.dtype = spec_.kv_dtype;
  kv_.resize(kv_view_.page_stride * pages_);
  kv_rope_.resize(kv_rope_view_.page_stride * pages_);
  std::vector<int32_t> ids(static_cast<size_t>(pages_));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  std::shuffle(ids.begin(), ids.end(), std::mt19937(spec_.page_seed));
  table_.assign(static_cast<size_t>(table_width_ * batch_), std::numeric_limits<int32_t>::min() / 2);
  size_t next_id = 0;
  for (int32_t r = 0; r < batch_; ++r) {
    auto next = numbers_of(r, 1);
    for (int64_t i = 0; i < ceil_div(spec_.lengths[r], spec_.page_size); ++i)
      table_[r * table_width_ + i] = ids[next_id++];
    for (int64_t t = 0; t < spec_.lengths[r]; ++t) {
      for (int32_t h = 0; h < spec_.kv_heads; ++h) {
        for (int32_t c = 0; c < spec_.head_dim; ++c) set_key(r, t, h, c, next());
      }
    }
  }
  auto next = numbers_of(0, 2);
  for (int32_t h = 0; spec_.has_sink && h < spec_.q_heads; ++h) sink_.push_back(static_cast<float>(next() + 2.0));
}

void Case::set_key(int32_t request, int64_t token, int32_t kv_head, int32_t column, double value) {
  bool is_rope;
  const int64_t i = kv_index_of(request, token, kv_head, column, &is_rope);
  (is_rope ? kv_rope_ : kv_).set(i, value);
}

int64_t Case::q_index(int64_t token, int32_t head, int32_t column, bool* is_rope) const {
  *is_rope = spec_.has_q_views && column >= spec_.value_dim;
  const RowView& v = *is_rope ? q_rope_view_ : q_view_;
  return token * v.token_stride + head * v.head_stride + (*is_rope ? column - spec_.value_dim : column);
}

int64_t Case::kv_index(int64_t page, int64_t row, int32_t kv_head, int32_t column, bool* is_rope) const {
  *is_rope = spec_.has_kv_views && column >= spec_.value_dim;
  const CacheView& v = *is_rope ? kv_rope_view_ : kv_view_;
  return page * v.page_stride + row * v.token_stride + kv_head * v.head_stride +
         (*is_rope ? column - spec_.value_dim : column);
}

int64_t Case::kv_index_of(int32_t request, int64_t token, int32_t kv_head, int32_t column, bool* is_rope) const {
  return kv_index(table_[request * table_width_ + token / spec_.page_size], token % spec_.page_size, kv_head, column,
                  is_rope);
}

int64_t Case::out_index(int64_t token, int32_t head, int32_t column) const {
  return token * out_view_.token_stride + head * out_view_.head_stride + column;
}

int64_t Case::lse_index(int64_t token, int32_t head) const {
  return token * lse_view_.token_stride + head * lse_view_.head_stride;
}

Output Case::run(const Backend& backend, const Runner& runner) const {
  Plan plan;
  auto context = std::make_shared<Context>();
  context->num_threads = runner.num_threads;
  context->parallel_for = runner.parallel_for;
  context->parallel_for_user = runner.parallel_for_user;
  plan.context = context;
  plan.problem = problem();
  plan.backend = &backend;
  if (const std::string reason = backend.why_unsupported(plan.problem); !reason.empty())
    throw std::runtime_error(reason);
  if (const Status s = backend.plan(plan); !s.is_ok()) throw std::runtime_error(s.message());

  const AlignedBytes schedule_bytes(plan.layout().bytes()), scratch_bytes(plan.scratch_bytes);
  std::byte* schedule = schedule_bytes.get();
  std::byte* scratch = scratch_bytes.get();

  ScheduleCall schedule_call{};
  schedule_call.batch = batch_;
  schedule_call.cache_seqlens = {spec_.lengths.data(), 1};
  if (spec_.is_ragged) schedule_call.cu_seqlens_q = {q_begin_.data(), 1};
  schedule_call.schedule = schedule;
  if (const Status s = backend.schedule(plan, schedule_call, nullptr); !s.is_ok())
    throw std::runtime_error(s.message());

  Tensor out{spec_.out_dtype, {}}, lse{DType::kFp32, {}};
  out.resize(out_elems_);
  lse.resize(lse_elems_);
  const Tensor untouched_out = out, untouched_lse = lse;
  DecodeCall call{};
  call.batch = batch_;
  call.q_tokens = q_tokens_;
  const auto with_data = [](auto view, const auto& tensor) {
    view.data = const_cast<unsigned char*>(tensor.data.data());
    return view;
  };
  const bool has_rope = spec_.head_dim > spec_.value_dim;
  call.q = with_data(q_view_, q_);
  if (spec_.has_q_views && has_rope) call.q_rope = with_data(q_rope_view_, q_rope_);
  call.kv = with_data(kv_view_, kv_);
  if (spec_.has_kv_views && has_rope) call.kv_rope = with_data(kv_rope_view_, kv_rope_);
  call.block_table = {table_.data(), table_width_, table_width_};
  call.sink = spec_.has_sink ? sink_.data() : nullptr;
  call.out = with_data(out_view_, out);
  if (spec_.has_lse) call.lse = with_data(lse_view_, lse);
  call.schedule = schedule;
  call.scratch = scratch;
  Output result;
  for (int i = 0; i < runner.decodes; ++i) {
    const int64_t allocations = runner.allocations == nullptr ? 0 : runner.allocations->load();
    if (const Status s = backend.decode(plan, call, nullptr); !s.is_ok()) throw std::runtime_error(s.message());
    if (runner.allocations != nullptr) result.allocations = runner.allocations->load() - allocations;
  }

  Tensor rest_out = out, rest_lse = lse;  // what is left when the outputs are taken away
  for (int64_t t = 0; t < q_tokens_; ++t) {
    for (int32_t h = 0; h < spec_.q_heads; ++h) {
      for (int32_t c = 0; c < spec_.value_dim; ++c) {
        result.out.push_back(out.get(out_index(t, h, c)));
        rest_out.set(out_index(t, h, c), kNan);
      }
      result.lse.push_back(lse.get(lse_index(t, h)));
      rest_lse.set(lse_index(t, h), kNan);
    }
  }
  if (rest_out.data != untouched_out.data) throw std::runtime_error("a gap of out was written");
  if (rest_lse.data != untouched_lse.data) throw std::runtime_error("a gap of lse was written");
  result.bits = out.data;
  result.bits.insert(result.bits.end(), lse.data.begin(), lse.data.end());
  return result;
}

Output Case::expect() const {
  const Problem p = problem();
  Output result;
  for (int32_t r = 0; r < batch_; ++r) {
    const int64_t q_len = q_begin_[r + 1] - q_begin_[r];
    // The request's rows of one kv head as doubles, once for all query rows.
    std::vector<std::vector<double>> keys(static_cast<size_t>(spec_.kv_heads));
    for (int32_t h = 0; h < spec_.kv_heads; ++h) {
      for (int64_t t = 0; t < spec_.lengths[r]; ++t) {
        for (int32_t c = 0; c < spec_.head_dim; ++c) {
          bool is_rope;
          const int64_t i = kv_index_of(r, t, h, c, &is_rope);
          keys[h].push_back((is_rope ? kv_rope_ : kv_).get(i));
        }
      }
    }
    for (int64_t t = 0; t < q_len; ++t) {
      for (int32_t h = 0; h < spec_.q_heads; ++h) {
        const std::vector<double>& k = keys[h / (spec_.q_heads / spec_.kv_heads)];
        std::vector<double> q;
        for (int32_t c = 0; c < spec_.head_dim; ++c) {
          bool is_rope;
          const int64_t i = q_index(q_begin_[r] + t, h, c, &is_rope);
          q.push_back((is_rope ? q_rope_ : q_).get(i));
        }
        const int64_t visible = spec_.is_causal ? spec_.lengths[r] - q_len + 1 + t : spec_.lengths[r];
        std::vector<double> weight;
        double max = -std::numeric_limits<double>::infinity(), sum = 0.0;
        for (int64_t j = 0; j < visible; ++j) {
          double s = 0.0;
          for (int32_t c = 0; c < spec_.head_dim; ++c) s += q[c] * k[j * spec_.head_dim + c];
          weight.push_back(s * p.softmax_scale);
          max = std::max(max, weight.back());
        }
        for (double& w : weight) sum += w = std::exp(w - max);
        std::vector<double> out(static_cast<size_t>(spec_.value_dim)), spread(out);
        const double lse = visible <= 0 ? -std::numeric_limits<double>::infinity() : max + std::log(sum);
        const double denominator = spec_.has_sink && visible > 0 ? sum + std::exp(sink_[h] - max) : sum;
        for (size_t j = 0; j < weight.size(); ++j) {
          for (int32_t c = 0; c < spec_.value_dim; ++c) {
            out[c] += weight[j] / denominator * k[j * spec_.head_dim + c];
            spread[c] += weight[j] / denominator * std::fabs(k[j * spec_.head_dim + c]);
          }
        }
        result.out.insert(result.out.end(), out.begin(), out.end());
        result.spread.insert(result.spread.end(), spread.begin(), spread.end());
        result.lse.push_back(spec_.is_lse_base2 ? lse / std::log(2.0) : lse);
      }
    }
  }
  return result;
}

std::vector<const Backend*> usable_backends() {
  std::vector<const Backend*> usable;
  for (const Backend* const* b = kBackends; *b != nullptr; ++b) {
    if ((*b)->device_type == DeviceType::kCpu && (*b)->why_unavailable().empty()) usable.push_back(*b);
  }
  return usable;
}

std::string compare(const Spec& spec, const Output& got, const Output& want) {
  // Three errors: the output's rounding; weights rounded to bf16 by a dot product of pairs (as far as q and cache are bf16 themselves);
  // and fp32 sums, of which the scores' error grows with the scores.
  const bool may_round_weights = spec.q_dtype == DType::kBf16 && spec.kv_dtype == DType::kBf16;
  const double out_unit = unit_roundoff(spec.out_dtype),
               weight_unit = may_round_weights ? unit_roundoff(DType::kBf16) : 0.0;
  const double sum_unit = 1e-5 * std::max(1.0f, spec.q_magnitude);
  const size_t dim = static_cast<size_t>(spec.value_dim);
  char text[256];
  for (size_t row = 0; row < want.lse.size(); ++row) {
    if (spec.has_lse) {
      const double g = got.lse[row], w = want.lse[row];
      if (!(std::isinf(w) ? g == w : std::fabs(g - w) <= sum_unit * (1.0 + std::fabs(w)))) {
        std::snprintf(text, sizeof text, "lse of row %zu is %.9g, expected %.9g: ", row, g, w);
        return text + spec.describe();
      }
    }
    double err2 = 0.0, allowed2 = 0.0;
    for (size_t c = 0; c < dim; ++c) {
      const double g = got.out[row * dim + c], w = want.out[row * dim + c], spread = want.spread[row * dim + c];
      const double allowed = out_unit * 1.01 * std::fabs(w) + (weight_unit + sum_unit) * spread +
                             0x1p-24 * (spec.out_dtype == DType::kFp16);
      if (!(std::fabs(g - w) <= allowed)) {
        std::snprintf(text, sizeof text, "out of row %zu, column %zu is %.9g, expected %.9g (+- %.3g): ", row, c, g, w,
                      allowed);
        return text + spec.describe();
      }
      // Over a whole row, errors have to be as small as independent roundings are.
      err2 += (g - w) * (g - w);
      allowed2 += std::pow(std::max(out_unit, weight_unit) * w, 2) + std::pow(sum_unit * spread, 2);
    }
    if (!(std::sqrt(err2) <= 1.2 * std::sqrt(allowed2) + 1e-7)) {
      std::snprintf(text, sizeof text, "out of row %zu is off by %.3g in norm, allowed %.3g: ", row, std::sqrt(err2),
                    std::sqrt(allowed2));
      return text + spec.describe();
    }
  }
  return "";
}

}  // namespace mla::test
