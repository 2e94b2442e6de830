// mla_decode in one call: its plan found by the tensors' shapes, made if there is none, scheduled and run.
//
// This is in C++ because the search is all that a call costs: every tensor is taken apart once, and nothing is made for the search.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "handles.h"
#include "tensor.h"

namespace mlakit_py {

namespace {

// The next power of two, and at least 1: so few plans serve a growing batch or cache. The library refuses what is too large.
int64_t rounded(int64_t extent) {
  if (extent > int64_t{1} << 62) return std::numeric_limits<int64_t>::max();
  return extent <= 1 ? 1 : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(extent)));
}

int64_t product(int64_t a, int64_t b) {
  int64_t result;
  return __builtin_mul_overflow(a, b, &result) ? std::numeric_limits<int64_t>::max() : result;
}

int64_t extent_of(const mla_tensor& tensor, int32_t from_the_end) {
  return from_the_end <= tensor.ndim ? tensor.shape[tensor.ndim - from_the_end] : 0;
}

std::string shape_text(const mla_tensor& tensor) {
  std::string text = "[";
  for (int32_t d = 0; d < tensor.ndim; ++d) text += (d > 0 ? ", " : "") + std::to_string(tensor.shape[d]);
  return text + "]";
}

[[noreturn]] void refuse_shape(const char* expected, const mla_tensor& tensor, const char* advice) {
  PyErr_Format(PyExc_ValueError, "%s, got shape %s%s", expected, shape_text(tensor).c_str(), advice);
  throw nb::python_error();
}

// What the search needs of a tensor that may not be left out.
const mla_tensor& given(const Tensor& tensor, const char* name) {
  if (tensor.get() != nullptr) return *tensor.get();
  PyErr_Format(PyExc_TypeError, "%s: expected a tensor, got None", name);
  throw nb::python_error();
}

// The cached tokens of all requests together. Lengths that are none are for the library to refuse.
int64_t sum_of(const mla_tensor* lengths) {
  if (lengths == nullptr || lengths->ndim != 1 || dtype_of(lengths->dtype) != MLA_DTYPE_INT32 ||
      lengths->device.device_type != MLA_DEVICE_CPU)
    return 0;
  const char* data = static_cast<const char*>(lengths->data) + lengths->byte_offset;
  const int64_t stride = lengths->strides == nullptr ? 1 : lengths->strides[0];
  int64_t sum = 0;
  for (int64_t i = 0; i < lengths->shape[0]; ++i) {
    int32_t length;
    std::memcpy(&length, data + i * stride * static_cast<int64_t>(sizeof length), sizeof length);
    sum += length;
  }
  return sum;
}

nb::object tuple_of(const int64_t* extents, size_t count) {
  nb::object result = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(count)));
  for (size_t i = 0; i < count; ++i)
    PyTuple_SetItem(result.ptr(), static_cast<Py_ssize_t>(i), nb::int_(extents[i]).release().ptr());
  return result;
}

using Objects = nb::typed<nb::tuple, nb::object, nb::ellipsis>;

// What a plan is found by, next to the caller's options.
struct Numbers {
  int64_t device_type, device_id, q_dtype, kv_dtype, out_dtype, is_ragged, max_batch, q_len, max_len, max_tokens,
      q_heads, kv_heads, head_dim, page_size;

  static constexpr size_t kCount = 14;
  bool operator==(const Numbers&) const = default;
};
static_assert(sizeof(Numbers) == Numbers::kCount * sizeof(int64_t));

struct Entry {
  Numbers numbers;
  Objects options;
  nb::object plan;
  nb::object q_dtype_name;  // as the caller's framework is asked for outputs
  int64_t value_dim;
  const mla_plan* handle;
  uint64_t schedule_bytes, scratch_begin, scratch_bytes, alignment;
  // Workspaces of a CPU plan that no call uses. A call has finished when it returns: each concurrent one takes its own.
  std::vector<std::unique_ptr<Buffer>> free;

  uint64_t workspace_bytes() const { return scratch_begin + scratch_bytes; }

  std::unique_ptr<Buffer> take_workspace() {
    if (free.empty()) return std::make_unique<Buffer>(workspace_bytes(), alignment);
    std::unique_ptr<Buffer> buffer = std::move(free.back());
    free.pop_back();
    return buffer;
  }
};

class PlanCache {
 public:
  using Outputs = nb::typed<nb::tuple, nb::object, nb::object>;

  PlanCache(size_t max_size, nb::object make_plan) : max_size_(max_size), make_plan_(std::move(make_plan)) {}

  // objects: q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, cu_seqlens_q, global_seqlens, sink, out, lse.
  // options: value_dim, split, and whatever else make_plan wants; compared as a whole. framework: _arrays.Framework.
  Outputs decode(nb::handle framework, const Objects& objects, const Objects& options, Stream stream) {
    if (objects.size() != 11) throw nb::type_error("decode: expected 11 objects");
    std::array<nb::object, 11> o;
    for (size_t i = 0; i < o.size(); ++i) o[i] = objects[i];
    void* on = reinterpret_cast<void*>(stream.value_or(0));
    const Tensor q(o[0], "q", false, on), q_rope(o[1], "q_rope", false, on), kv_cache(o[2], "kv_cache", false, on),
        kv_rope(o[3], "kv_rope", false, on), block_table(o[4], "block_table", false, on),
        cache_seqlens(o[5], "cache_seqlens", false, on), cu_seqlens_q(o[6], "cu_seqlens_q", false, on),
        global_seqlens(o[7], "global_seqlens", false, on), sink(o[8], "sink", false, on);
    std::optional<Tensor> out, lse;
    if (!o[9].is_none()) out.emplace(o[9], "out", true, on);
    if (!o[10].is_none()) lse.emplace(o[10], "lse", true, on);

    const std::shared_ptr<Entry> entry =
        find(numbers_of(q, q_rope, kv_cache, block_table, cache_seqlens, cu_seqlens_q, out, options[1]), options);
    const mla_tensor& rows = *q.get();
    if (!out) {
      std::vector<int64_t> extents(rows.shape, rows.shape + rows.ndim);
      extents.back() = entry->value_dim;
      o[9] = framework.attr("empty")(o[0], tuple_of(extents.data(), extents.size()), entry->q_dtype_name);
      out.emplace(o[9], "out", true, on);
    }
    if (!lse) {
      o[10] = framework.attr("empty")(o[0], tuple_of(rows.shape, static_cast<size_t>(rows.ndim - 1)), "fp32");
      lse.emplace(o[10], "lse", true, on);
    }

    mla_schedule_args schedule{};
    schedule.struct_size = sizeof schedule;
    schedule.cache_seqlens = cache_seqlens.get();
    schedule.cu_seqlens_q = cu_seqlens_q.get();
    schedule.schedule_bytes = entry->schedule_bytes;
    mla_decode_args args =
        decode_args(q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, global_seqlens, sink, *out, *lse);
    args.schedule_bytes = entry->schedule_bytes;
    args.scratch_bytes = entry->scratch_bytes;
    if (!stream) on = q.current_stream();
    const auto call = [&](void* workspace) {
      schedule.schedule = workspace;
      args.schedule = workspace;
      args.scratch = static_cast<char*>(workspace) + entry->scratch_begin;
      const mla_status status = mla_schedule(entry->handle, &schedule, on);
      return status == MLA_OK ? mla_decode(entry->handle, &args, on) : status;
    };

    if (entry->numbers.device_type == MLA_DEVICE_CPU) {
      std::unique_ptr<Buffer> workspace = entry->take_workspace();
      run([&] { return call(workspace->data); });
      entry->free.push_back(std::move(workspace));
      return nb::make_tuple(o[9], o[10]);
    }
    run_with_workspace(framework, o[0], q, entry->workspace_bytes(), stream, call);
    return nb::make_tuple(o[9], o[10]);
  }

  void clear() {
    const std::vector<std::shared_ptr<Entry>> dropped = std::exchange(entries_, {});
    hits_ = misses_ = 0;
  }

  nb::typed<nb::tuple, nb::int_, nb::int_, nb::int_, nb::int_> info() const {
    return nb::make_tuple(hits_, misses_, max_size_, entries_.size());
  }

 private:
  static Numbers numbers_of(const Tensor& q_tensor, const Tensor& q_rope, const Tensor& kv_tensor,
                            const Tensor& table_tensor, const Tensor& cache_seqlens, const Tensor& cu_seqlens_q,
                            const std::optional<Tensor>& out, nb::handle split) {
    const mla_tensor& q = given(q_tensor, "q");
    const mla_tensor& kv = given(kv_tensor, "kv_cache");
    const mla_tensor& table = given(table_tensor, "block_table");
    const bool is_ragged = cu_seqlens_q.get() != nullptr;
    if (is_ragged && q.ndim != 3)
      refuse_shape("q: expected [tokens, q_heads, head_dim] because cu_seqlens_q is given", q, "");
    if (!is_ragged && q.ndim != 4)
      refuse_shape("q: expected [batch, q_len, q_heads, head_dim]", q,
                   ": reshape it, or pass cu_seqlens_q for ragged q");
    if (kv.ndim != 4) refuse_shape("kv_cache: expected [pages, page_size, kv_heads, head_dim]", kv, ": reshape it");
    if (table.ndim != 2) refuse_shape("block_table: expected [batch, width]", table, ": reshape it");

    Numbers n{};
    n.device_type = q.device.device_type;
    n.device_id = q.device.device_id;
    n.q_dtype = dtype_of(q.dtype);
    n.kv_dtype = dtype_of(kv.dtype);
    n.out_dtype = out ? dtype_of(out->get()->dtype) : n.q_dtype;
    n.is_ragged = is_ragged;
    n.max_batch = rounded(is_ragged ? table.shape[0] : std::max(q.shape[0], table.shape[0]));
    n.q_len = is_ragged ? rounded(q.shape[0]) : q.shape[1];
    n.max_len = rounded(product(table.shape[1], kv.shape[1]));
    if (n.device_type == MLA_DEVICE_CPU && PyUnicode_Check(split.ptr()) &&
        PyUnicode_CompareWithASCIIString(split.ptr(), "fixed_chunk") == 0)
      n.max_tokens = rounded(sum_of(cache_seqlens.get()));
    n.q_heads = extent_of(q, 2);
    n.kv_heads = kv.shape[2];
    n.head_dim = extent_of(q, 1) + (q_rope.get() != nullptr ? extent_of(*q_rope.get(), 1) : 0);
    n.page_size = kv.shape[1];
    return n;
  }

  std::shared_ptr<Entry> find(const Numbers& numbers, const Objects& options) {
    if (std::shared_ptr<Entry> entry = search(numbers, options)) {
      ++hits_;
      return entry;
    }
    ++misses_;
    auto entry = std::make_shared<Entry>();
    const auto* values = reinterpret_cast<const int64_t*>(&numbers);
    const nb::tuple made(make_plan_(tuple_of(values, Numbers::kCount), options));
    const Plan& plan = nb::cast<const Plan&>(made[0]);
    entry->numbers = numbers;
    entry->options = options;
    entry->plan = made[0];
    entry->q_dtype_name = made[1];
    entry->value_dim = nb::cast<int64_t>(options[0]);
    entry->handle = plan.handle;
    entry->schedule_bytes = plan.info.schedule_bytes;
    entry->scratch_bytes = plan.info.scratch_bytes;
    entry->alignment = std::max(plan.info.schedule_alignment, plan.info.scratch_alignment);
    entry->scratch_begin = (plan.info.schedule_bytes + entry->alignment - 1) / entry->alignment * entry->alignment;
    if (std::shared_ptr<Entry> other = search(numbers, options)) return other;  // another thread was first
    move_to_front(entry);
    return entry;
  }

  std::shared_ptr<Entry> search(const Numbers& numbers, const Objects& options) {
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (!(entries_[i]->numbers == numbers)) continue;
      std::shared_ptr<Entry> entry = entries_[i];  // comparing options may run anything
      const int is_equal = PyObject_RichCompareBool(entry->options.ptr(), options.ptr(), Py_EQ);
      if (is_equal < 0) throw nb::python_error();
      if (is_equal == 0) continue;
      move_to_front(entry);
      return entry;
    }
    return nullptr;
  }

  // Most recently used first, so that a loop over layers compares with one entry and the last one goes when there are too many.
  void move_to_front(const std::shared_ptr<Entry>& entry) {
    if (!entries_.empty() && entries_.front() == entry) return;
    const auto at = std::find(entries_.begin(), entries_.end(), entry);
    if (at != entries_.end()) {
      std::rotate(entries_.begin(), at, at + 1);
      return;
    }
    entries_.insert(entries_.begin(), entry);
    if (entries_.size() > max_size_) {
      const std::shared_ptr<Entry> dropped = std::move(entries_.back());
      entries_.pop_back();
    }
  }

  size_t max_size_, hits_ = 0, misses_ = 0;
  nb::object make_plan_;
  std::vector<std::shared_ptr<Entry>> entries_;
};

}  // namespace

void bind_plan_cache(nb::module_& m) {
  nb::class_<PlanCache>(m, "PlanCache")
      .def(nb::init<size_t, nb::object>(), nb::arg("max_size"), nb::arg("make_plan"))
      .def("decode", &PlanCache::decode, nb::arg("framework"), nb::arg("objects"), nb::arg("options"),
           nb::arg("stream").none())
      .def("clear", &PlanCache::clear)
      .def("info", &PlanCache::info);
}

}  // namespace mlakit_py
