// The handles of the C API, as the Python objects that own them, and how the library is called without the GIL.
#pragma once

#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings.h"
#include "tensor.h"

namespace mlakit_py {

using Stream = std::optional<uintptr_t>;  // None: the current stream of the producer of the first tensor

// Calls a function of the library without the GIL.
template <class Call>
void run(Call call) {
  mla_status status;
  {
    nb::gil_scoped_release release;
    status = call();
  }
  check(status);
}

struct Context {
  Context(std::optional<std::string> backend, int32_t num_threads) {
    mla_context_options options{};
    options.struct_size = sizeof options;
    options.backend = backend ? backend->c_str() : nullptr;
    options.num_threads = num_threads;
    check(mla_context_create(&handle, &options));
  }
  ~Context() { mla_context_destroy(handle); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  mla_context* handle = nullptr;
};

struct Plan {
  Plan(const Context& context, const mla_problem& problem) {
    check(mla_plan_create(&handle, context.handle, &problem));
    info.struct_size = sizeof info;
    mla_plan_get_info(handle, &info);
  }
  ~Plan() { mla_plan_destroy(handle); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  mla_plan* handle = nullptr;
  mla_plan_info info{};
};

// The tensors of a decode call; workspace and sizes are for the caller to add.
inline mla_decode_args decode_args(const Tensor& q, const Tensor& q_rope, const Tensor& kv_cache, const Tensor& kv_rope,
                                   const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& global_seqlens,
                                   const Tensor& sink, const Tensor& out, const Tensor& lse) {
  mla_decode_args args{};
  args.struct_size = sizeof args;
  args.q = q.get();
  args.q_rope = q_rope.get();
  args.kv_cache = kv_cache.get();
  args.kv_rope = kv_rope.get();
  args.block_table = block_table.get();
  args.cache_seqlens = cache_seqlens.get();
  args.global_seqlens = global_seqlens.get();
  args.sink = sink.get();
  args.out = out.get();
  args.lse = lse.get();
  return args;
}

// run(call) with memory of q's device for the length of its work: q's framework gives it, on the stream of the work.
template <class Call>
void run_with_workspace(nb::handle framework, nb::handle q, const Tensor& q_tensor, uint64_t nbytes, Stream stream,
                        Call call) {
  if (!stream) {
    bool is_there = false;
    run([&] {
      const FrameworkMemory workspace(q_tensor, nbytes);
      is_there = workspace.data() != nullptr;
      return is_there ? call(workspace.data()) : MLA_OK;
    });
    if (is_there) return;
  }
  nb::object workspace = framework.attr("workspace")(q, nbytes, stream);
  const Memory memory = memory_of(workspace, "workspace", true, reinterpret_cast<void*>(stream.value_or(0)));
  run([&] { return call(memory.data); });
}

}  // namespace mlakit_py
