// The definition of correct: plain loops in double, straight from the formulas at the top of mla.h. Never optimised.
#include "reference/decode_ref.h"

#include <cmath>
#include <limits>

#include "math/float16.h"
#include "schedule/host_schedule.h"

namespace mla {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kLn2 = 0.693147180559945309417;

double load(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBf16:
      return math::bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::kFp16:
      return math::fp16_to_float(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

void store(void* data, DType dtype, int64_t index, double value) {
  const float narrow = static_cast<float>(value);
  switch (dtype) {
    case DType::kBf16:
      static_cast<uint16_t*>(data)[index] = math::float_to_bf16(narrow);
      break;
    case DType::kFp16:
      static_cast<uint16_t*>(data)[index] = math::float_to_fp16(narrow);
      break;
    default:
      static_cast<float*>(data)[index] = narrow;
  }
}

double max_keep_nan(double a, double b) { return a > b || std::isnan(a) ? a : b; }

// A row of the cache: columns below split are in `first`, the others in `second`.
struct KvRow {
  const void* first;
  int64_t first_offset;
  const void* second;
  int64_t second_offset;
  int32_t split;
  DType dtype;

  double operator[](int32_t column) const {
    return column < split ? load(first, dtype, first_offset + column)
                          : load(second, dtype, second_offset + column - split);
  }
};

KvRow kv_row(const Problem& p, const DecodeCall& call, int32_t request, int64_t key, int32_t kv_head) {
  const int64_t page = call.block_table.data[request * call.block_table.row_stride + key / p.page_size];
  const int64_t token = key % p.page_size;
  const auto offset = [&](const CacheView& view) {
    return page * view.page_stride + token * view.token_stride + kv_head * view.head_stride;
  };
  const bool has_rope = call.kv_rope.data != nullptr;
  return {call.kv.data,
          offset(call.kv),
          call.kv_rope.data,
          has_rope ? offset(call.kv_rope) : 0,
          has_rope ? p.value_dim : p.head_dim,
          p.kv_dtype};
}

// One query token of a request with its schedule's facts.
struct Query {
  int32_t request;
  int64_t q_begin;  // ragged: first token of the request
  int64_t token;    // of the request
  int64_t visible;  // keys
};

// scores: double[max_len], sum: double[value_dim].
void decode_row(const Problem& p, const DecodeCall& call, const Query& query, int32_t head, double* scores,
                double* sum) {
  const auto offset = [&](const RowView& view) {
    return view.offset(p.is_ragged, query.request, query.q_begin, query.token, head);
  };
  const auto q = [&](int32_t column) {
    const bool is_rope = call.q_rope.data != nullptr && column >= p.value_dim;
    return is_rope ? load(call.q_rope.data, p.q_dtype, offset(call.q_rope) + column - p.value_dim)
                   : load(call.q.data, p.q_dtype, offset(call.q) + column);
  };
  const int32_t kv_head = head / p.heads_per_kv_head();

  double max_score = -kInf;
  for (int64_t j = 0; j < query.visible; ++j) {
    const KvRow kv = kv_row(p, call, query.request, j, kv_head);
    double dot = 0;
    for (int32_t column = 0; column < p.head_dim; ++column) dot += q(column) * kv[column];
    scores[j] = static_cast<double>(p.softmax_scale) * dot;
    max_score = max_keep_nan(max_score, scores[j]);
  }

  double denominator = 0;
  for (int32_t column = 0; column < p.value_dim; ++column) sum[column] = 0;
  if (max_score != -kInf) {
    for (int64_t j = 0; j < query.visible; ++j) {
      const KvRow kv = kv_row(p, call, query.request, j, kv_head);
      const double weight = std::exp(scores[j] - max_score);
      denominator += weight;
      for (int32_t column = 0; column < p.value_dim; ++column) sum[column] += weight * kv[column];
    }
  }

  const bool is_empty = denominator == 0;
  const double lse = is_empty ? -kInf : max_score + std::log(denominator);
  if (call.sink != nullptr && !is_empty) denominator += std::exp(static_cast<double>(call.sink[head]) - max_score);
  for (int32_t column = 0; column < p.value_dim; ++column) {
    store(call.out.data, p.out_dtype, offset(call.out) + column, is_empty ? 0 : sum[column] / denominator);
  }
  if (call.lse.data != nullptr) store(call.lse.data, DType::kFp32, offset(call.lse), p.is_lse_base2 ? lse / kLn2 : lse);
}

Status plan(Plan& plan) {
  const Problem& p = plan.problem;
  plan.variant = "double";
  // The schedule serves as the snapshot of the lengths; one part, since nothing is ever cut.
  plan.config = {.block_tokens = 64,
                 .item_rows = 1,
                 .heads_per_kv_head = p.heads_per_kv_head(),
                 .kv_heads = p.kv_heads,
                 .parts = 1,
                 .overhead_blocks = 1,
                 .chunk_blocks = 0,
                 .plan_key = 0,
                 .slots = 0};
  plan.scratch_bytes = sizeof(double) * static_cast<size_t>(p.max_len + p.value_dim);
  return Status::ok();
}

Status decode(const Plan& plan, const DecodeCall& call, void*) {
  const Problem& p = plan.problem;
  const schedule::ConstView schedule(call.schedule, plan.layout());
  double* const scores = reinterpret_cast<double*>(call.scratch);
  double* const sum = scores + p.max_len;
  for (int32_t request = 0; request < call.batch; ++request) {
    const int64_t q_tokens = schedule.q_tokens(request);
    const int64_t len = schedule.len()[request];
    const int64_t global_len =
        p.needs_global_len() ? call.global_seqlens.data[request * call.global_seqlens.stride] : len;
    for (int64_t token = 0; token < q_tokens; ++token) {
      const Query query = {request, schedule.q_begin()[request], token,
                           p.visible_tokens(len, global_len, q_tokens, token)};
      for (int32_t head = 0; head < p.q_heads; ++head) decode_row(p, call, query, head, scores, sum);
    }
  }
  return Status::ok();
}

Status merge(const Context&, const MergeCall& call, void*) {
  const double unit = call.is_lse_base2 ? kLn2 : 1.0;  // natural lse = unit * stored lse
  for (int64_t token = 0; token < call.tokens; ++token) {
    for (int64_t head = 0; head < call.heads; ++head) {
      const auto part_lse = [&](int64_t part) {
        const int64_t* stride = call.lse_parts_stride;
        return unit * static_cast<double>(call.lse_parts[part * stride[0] + token * stride[1] + head * stride[2]]);
      };
      double max_lse = -kInf;
      for (int64_t part = 0; part < call.parts; ++part) max_lse = max_keep_nan(max_lse, part_lse(part));
      // A part that saw no key weighs nothing, whatever its out holds.
      const auto weight = [&](int64_t part) {
        return part_lse(part) == -kInf ? 0.0 : std::exp(part_lse(part) - max_lse);
      };
      double denominator = 0;
      for (int64_t part = 0; part < call.parts; ++part) denominator += weight(part);

      for (int64_t column = 0; column < call.dim; ++column) {
        double sum = 0;
        for (int64_t part = 0; part < call.parts; ++part) {
          if (part_lse(part) == -kInf) continue;
          const int64_t* stride = call.out_parts_stride;
          sum += weight(part) *
                 load(call.out_parts, call.in_dtype, part * stride[0] + token * stride[1] + head * stride[2] + column);
        }
        store(call.out, call.out_dtype, token * call.out_stride[0] + head * call.out_stride[1] + column,
              denominator == 0 ? 0 : sum / denominator);
      }
      if (call.lse != nullptr) {
        const double lse = denominator == 0 ? -kInf : (max_lse + std::log(denominator)) / unit;
        call.lse[token * call.lse_stride[0] + head * call.lse_stride[1]] = static_cast<float>(lse);
      }
    }
  }
  return Status::ok();
}

}  // namespace

const Backend kReferenceBackend = {
    .name = "reference",
    .device_type = DeviceType::kCpu,
    .why_unavailable = [] { return std::string(); },
    .why_unsupported = [](const Problem&) { return std::string(); },
    .plan = plan,
    .schedule = schedule::schedule_on_host,
    .decode = decode,
    .merge = merge,
};

}  // namespace mla
