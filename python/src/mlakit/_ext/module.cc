// The module mlakit._ext: handles, and one function for each C call. Conversion only; every check is the library's.
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <utility>
#include <vector>

#include "bindings.h"
#include "handles.h"
#include "tensor.h"

namespace mlakit_py {

void check(mla_status status) {
  if (status == MLA_OK) return;
  PyObject* type = PyExc_RuntimeError;
  switch (status) {
    case MLA_INVALID_ARGUMENT:
      type = PyExc_ValueError;
      break;
    case MLA_UNSUPPORTED:
      type = PyExc_NotImplementedError;
      break;
    case MLA_WORKSPACE_TOO_SMALL:
      type = PyExc_ValueError;
      break;
    case MLA_OUT_OF_MEMORY:
      type = PyExc_MemoryError;
      break;
    case MLA_CUDA_ERROR:
      type = PyExc_RuntimeError;
      break;
    case MLA_NO_DRIVER:
      type = PyExc_RuntimeError;
      break;
    case MLA_INTERNAL:
      type = PyExc_AssertionError;
      break;
  }
  PyErr_SetString(type, mla_last_error());
  throw nb::python_error();
}

namespace {

void merge(const Context& context, nb::handle out_parts, nb::handle lse_parts, nb::handle out, nb::handle lse,
           bool is_base2, Stream stream) {
  void* given = reinterpret_cast<void*>(stream.value_or(0));
  Tensor t_out_parts(out_parts, "out_parts", false, given), t_lse_parts(lse_parts, "lse_parts", false, given);
  Tensor t_out(out, "out", true, given), t_lse(lse, "lse", true, given);
  mla_merge_args args{};
  args.struct_size = sizeof args;
  args.flags = is_base2 ? MLA_PROBLEM_LSE_BASE2 : 0;
  args.out_parts = t_out_parts.get();
  args.lse_parts = t_lse_parts.get();
  args.out = t_out.get();
  args.lse = t_lse.get();
  void* on = stream ? given : t_out_parts.current_stream();
  run([&] { return mla_merge(context.handle, &args, on); });
}

nb::typed<nb::dict, nb::str, nb::any> info_of(const Plan& plan) {
  const mla_plan_info& info = plan.info;
  nb::dict result;
  result["backend"] = info.backend;
  result["variant"] = info.variant;
  result["problem"] = info.problem;
  result["parts"] = info.parts;
  result["block_tokens"] = info.block_tokens;
  result["item_rows"] = info.item_rows;
  result["slots"] = info.slots;
  result["schedule_bytes"] = info.schedule_bytes;
  result["schedule_alignment"] = info.schedule_alignment;
  result["scratch_bytes"] = info.scratch_bytes;
  result["scratch_alignment"] = info.scratch_alignment;
  return result;
}

void schedule(const Plan& plan, nb::handle cache_seqlens, nb::handle cu_seqlens_q, nb::handle buffer, Stream stream) {
  void* given = reinterpret_cast<void*>(stream.value_or(0));
  Tensor t_seqlens(cache_seqlens, "cache_seqlens", false, given), t_cu(cu_seqlens_q, "cu_seqlens_q", false, given);
  const Memory memory = memory_of(buffer, "schedule", true, given);
  mla_schedule_args args{};
  args.struct_size = sizeof args;
  args.cache_seqlens = t_seqlens.get();
  args.cu_seqlens_q = t_cu.get();
  args.schedule = memory.data;
  args.schedule_bytes = memory.bytes;
  void* on = stream ? given : t_seqlens.current_stream();
  run([&] { return mla_schedule(plan.handle, &args, on); });
}

// One decode call, its tensors taken apart. Lives as long as the objects do.
struct DecodeCall {
  // q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, global_seqlens, sink, out, lse, schedule, scratch
  using Objects = std::array<nb::handle, 12>;

  DecodeCall(const Plan& plan, const Objects& o, Stream stream)
      : handle(plan.handle),
        given(reinterpret_cast<void*>(stream.value_or(0))),
        is_given(stream.has_value()),
        q(o[0], "q", false, given),
        q_rope(o[1], "q_rope", false, given),
        kv_cache(o[2], "kv_cache", false, given),
        kv_rope(o[3], "kv_rope", false, given),
        block_table(o[4], "block_table", false, given),
        cache_seqlens(o[5], "cache_seqlens", false, given),
        global_seqlens(o[6], "global_seqlens", false, given),
        sink(o[7], "sink", false, given),
        out(o[8], "out", true, given),
        lse(o[9], "lse", true, given) {
    const Memory schedule = memory_of(o[10], "schedule", false, given),
                 scratch = memory_of(o[11], "scratch", true, given);
    args = decode_args(q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, global_seqlens, sink, out, lse);
    args.schedule = schedule.data;
    args.schedule_bytes = schedule.bytes;
    args.scratch = scratch.data;
    args.scratch_bytes = scratch.bytes;
  }

  void* stream() const { return is_given ? given : q.current_stream(); }

  void operator()() const {
    void* on = stream();
    run([&] { return mla_decode(handle, &args, on); });
  }

  const mla_plan* handle;
  void* given;
  bool is_given;
  Tensor q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, global_seqlens, sink, out, lse;
  mla_decode_args args{};
};

// scratch: None: the framework's, where the plan wants any.
void decode(const Plan& plan, nb::handle q, nb::handle q_rope, nb::handle kv_cache, nb::handle kv_rope,
            nb::handle block_table, nb::handle cache_seqlens, nb::handle global_seqlens, nb::handle sink,
            nb::handle out, nb::handle lse, nb::handle schedule, nb::handle scratch, nb::handle framework,
            Stream stream) {
  DecodeCall call(
      plan,
      {q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, global_seqlens, sink, out, lse, schedule, scratch},
      stream);
  if (!scratch.is_none() || plan.info.scratch_bytes == 0) return call();
  void* on = call.stream();
  call.args.scratch_bytes = plan.info.scratch_bytes;
  run_with_workspace(framework, q, call.q, plan.info.scratch_bytes, stream, [&](void* memory) {
    call.args.scratch = memory;
    return mla_decode(call.handle, &call.args, on);
  });
}

// A decode call that keeps its tensors, to be made again and again.
struct Bound {
  using Objects = nb::typed<nb::tuple, nb::object, nb::ellipsis>;

  Bound(nb::object plan_, Objects objects_, Stream stream)
      : plan(std::move(plan_)),
        objects(std::move(objects_)),
        call(nb::cast<const Plan&>(plan), unpack(objects), stream) {
    for (Tensor* tensor : {&call.q, &call.q_rope, &call.kv_cache, &call.kv_rope, &call.block_table, &call.cache_seqlens,
                           &call.global_seqlens, &call.sink, &call.out, &call.lse}) {
      tensor->own_shape();
    }
  }

  static DecodeCall::Objects unpack(const nb::tuple& objects) {
    DecodeCall::Objects result;
    if (objects.size() != result.size()) throw nb::type_error("bind: expected 12 objects");
    for (size_t i = 0; i < result.size(); ++i) result[i] = objects[i];
    return result;
  }

  nb::object plan;
  nb::tuple objects;
  DecodeCall call;
};

// (name, device_type, is_available, reason) of each backend, in order of preference.
nb::typed<nb::list, nb::typed<nb::tuple, nb::str, nb::int_, nb::bool_, nb::str>> backends() {
  nb::list result;
  mla_backend_info info{};
  info.struct_size = sizeof info;
  for (int32_t index = 0; mla_get_backend_info(index, &info) == MLA_OK; ++index) {
    result.append(nb::make_tuple(info.name, info.device_type, info.is_available != 0, info.reason));
  }
  return result;
}

// (device_type, device_id, MLA_DTYPE_..., shape) of a tensor. stream: where it will be used.
nb::typed<nb::tuple, nb::int_, nb::int_, nb::int_, nb::typed<nb::tuple, nb::int_, nb::ellipsis>> describe(
    nb::handle object, const char* name, Stream stream) {
  Tensor holder(object, name, false, reinterpret_cast<void*>(stream.value_or(0)));
  if (holder.get() == nullptr) {
    PyErr_Format(PyExc_TypeError, "%s: expected a tensor, got None", name);
    throw nb::python_error();
  }
  const mla_tensor& tensor = *holder.get();
  nb::object shape = nb::steal(PyTuple_New(tensor.ndim));
  for (int d = 0; d < tensor.ndim; ++d) PyTuple_SetItem(shape.ptr(), d, nb::int_(tensor.shape[d]).release().ptr());
  return nb::make_tuple(tensor.device.device_type, tensor.device.device_id, dtype_of(tensor.dtype), shape);
}

// A compact array of an MLA_DTYPE_... over a buffer, which lives as long as the array.
nb::ndarray<nb::array_api> array(nb::handle self, const std::vector<size_t>& shape, int32_t dtype) {
  mla_tensor_storage storage;
  const int64_t one = 1;
  if (mla_tensor_init(&storage, nullptr, dtype, MLA_DEVICE_CPU, 0, 1, &one, nullptr) == nullptr)
    check(MLA_INVALID_ARGUMENT);
  const mla_data_type type = storage.tensor.dtype;
  return nb::ndarray<nb::array_api>(nb::inst_ptr<Buffer>(self)->data, shape.size(), shape.data(), self, nullptr,
                                    nb::dlpack::dtype{type.code, type.bits, type.lanes});
}

}  // namespace

NB_MODULE(_ext, m) {
  // Objects can outlive the interpreter by other people's references (torch keeps the traceback of an operator that refused), and
  // mlakit does not print.
  nb::set_leak_warnings(false);
  m.doc() = "mlakit's C API for the package's own use; import mlakit instead.";
  // An argument that may be None: the library says what must be given.
  const auto maybe = [](const char* name) { return nb::arg(name).none(); };
  m.def("version", [] { return MLAKIT_VERSION_STRING; });
  m.def("library_version", &mla_version);
  m.def("backends", &backends);
  m.def("describe", &describe, nb::arg("tensor"), nb::arg("name"), nb::arg("stream").none());
  bind_problem(m);

  nb::class_<Buffer>(m, "Buffer")
      .def(nb::init<size_t, size_t>(), nb::arg("nbytes"), nb::arg("alignment"))
      .def_ro("nbytes", &Buffer::nbytes)
      .def("array", &array, nb::arg("shape"), nb::arg("dtype"));

  nb::class_<Context>(m, "Context")
      .def(nb::init<std::optional<std::string>, int32_t>(), maybe("backend"), nb::arg("num_threads"))
      .def("merge", &merge, maybe("out_parts"), maybe("lse_parts"), maybe("out"), maybe("lse"), nb::arg("is_base2"),
           maybe("stream"));

  nb::class_<Plan>(m, "Plan")
      .def(nb::init<const Context&, const mla_problem&>(), nb::arg("context"), nb::arg("problem"))
      .def("info", &info_of)
      .def("schedule", &schedule, maybe("cache_seqlens"), maybe("cu_seqlens_q"), maybe("buffer"), maybe("stream"))
      .def("decode", &decode, maybe("q"), maybe("q_rope"), maybe("kv_cache"), maybe("kv_rope"), maybe("block_table"),
           maybe("cache_seqlens"), maybe("global_seqlens"), maybe("sink"), maybe("out"), maybe("lse"),
           maybe("schedule"), maybe("scratch"), nb::arg("framework"), maybe("stream"));

  bind_plan_cache(m);

  nb::class_<Bound>(m, "Bound")
      .def(nb::init<nb::object, Bound::Objects, Stream>(), nb::arg("plan"), nb::arg("objects"), maybe("stream"))
      .def("__call__", [](const Bound& self) { self.call(); });
}

}  // namespace mlakit_py
