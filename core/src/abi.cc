// The C ABI: settles struct_size, keeps exceptions inside, and hands on. Nothing else happens here.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "backend.h"
#include "mlakit/mla.h"
#include "problem_string.h"
#include "registry.h"
#include "schedule/view.h"
#include "status.h"
#include "validate.h"

struct mla_context {
  std::shared_ptr<const mla::Context> context;
};

struct mla_plan {
  mla::Plan plan;
};

namespace {

using mla::Status;

mla_status fail(mla_status code, const char* message) noexcept {
  mla::set_last_error(message);
  return code;
}

// Runs fn, remembers its message if it fails, and turns exceptions into statuses.
template <class Fn>
mla_status guarded(Fn&& fn) noexcept {
  try {
    const Status status = fn();
    return status.is_ok() ? MLA_OK : fail(status.code(), status.message().c_str());
  } catch (const std::bad_alloc&) {
    return fail(MLA_OUT_OF_MEMORY, "memory: the host has none left for this call");
  } catch (const std::exception& e) {
    return fail(MLA_INTERNAL, e.what());
  } catch (...) {
    return fail(MLA_INTERNAL, "an exception of unknown type");
  }
}

// A caller's input struct, smaller (older) or larger (newer) than ours, as ours: what it lacks is zero.
template <class T>
Status read_struct(const char* name, const T* in, T& out) {
  MLA_RETURN_IF_ERROR(mla::check_struct_size(name, in, sizeof(T)));
  MLA_RETURN_IF_ERROR(mla::check_unknown_bytes(name, in, sizeof(T)));
  out = {};
  std::memcpy(&out, in, std::min<size_t>(in->struct_size, sizeof(T)));
  return Status::ok();
}

// Our result into a caller's output struct; what a newer one has beside it becomes zero.
template <class T>
void write_struct(const T& value, T* out) {
  const uint32_t size = out->struct_size;
  std::memset(static_cast<void*>(out), 0, size);
  std::memcpy(static_cast<void*>(out), &value, std::min<size_t>(size, sizeof(T)));
  out->struct_size = size;
}

}  // namespace

extern "C" {

int32_t mla_version(void) { return MLAKIT_VERSION_MAJOR * 10000 + MLAKIT_VERSION_MINOR * 100 + MLAKIT_VERSION_PATCH; }

const char* mla_status_string(mla_status status) { return mla::status_name(status); }

const char* mla_last_error(void) { return mla::last_error(); }

mla_tensor* mla_tensor_init(mla_tensor_storage* storage, void* data, int32_t dtype, int32_t device_type,
                            int32_t device_id, int32_t ndim, const int64_t* shape, const int64_t* strides) {
  const mla_status status =
      guarded([&] { return mla::make_tensor({data, dtype, device_type, device_id, ndim, shape, strides}, storage); });
  return status == MLA_OK ? &storage->tensor : nullptr;
}

mla_status mla_problem_init(mla_problem* problem) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("problem", problem));
    *problem = mla::default_problem();
    return Status::ok();
  });
}

mla_status mla_problem_format(const mla_problem* problem, char* buffer, size_t size, size_t* needed) {
  return guarded([&] {
    mla_problem in;
    std::string text;
    MLA_RETURN_IF_ERROR(read_struct("problem", problem, in));
    MLA_RETURN_IF_ERROR(mla::format_problem(in, text));
    const size_t bytes = text.size() + 1;
    if (needed != nullptr) *needed = bytes;
    if (buffer == nullptr && size == 0) return Status::ok();
    MLA_RETURN_IF_ERROR(mla::check_buffer("buffer", buffer, size, bytes));
    std::memcpy(buffer, text.c_str(), bytes);
    return Status::ok();
  });
}

mla_status mla_problem_parse(mla_problem* problem, const char* text) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("problem", problem));
    return mla::parse_problem(text, *problem);
  });
}

mla_status mla_get_backend_info(int32_t index, mla_backend_info* info) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_struct_size("info", info, sizeof *info));
    const mla::Backend* backend = nullptr;
    MLA_RETURN_IF_ERROR(mla::backend_at(index, &backend));
    thread_local std::string t_reason;
    t_reason = backend->why_unavailable();
    write_struct({.struct_size = 0,
                  .device_type = static_cast<int32_t>(backend->device_type),
                  .is_available = t_reason.empty() ? 1 : 0,
                  .reserved = 0,
                  .name = backend->name,
                  .reason = t_reason.c_str()},
                 info);
    return Status::ok();
  });
}

mla_status mla_context_create(mla_context** out, const mla_context_options* options) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("out", out));
    *out = nullptr;
    mla_context_options in = {};
    if (options != nullptr) MLA_RETURN_IF_ERROR(read_struct("options", options, in));
    const auto context = std::make_shared<mla::Context>();
    MLA_RETURN_IF_ERROR(mla::make_context(in, *context));
    *out = new mla_context{context};
    return Status::ok();
  });
}

void mla_context_destroy(mla_context* context) { delete context; }

mla_status mla_plan_create(mla_plan** out, const mla_context* context, const mla_problem* problem) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("out", out));
    *out = nullptr;
    MLA_RETURN_IF_ERROR(mla::check_not_null("context", context));
    mla_problem in;
    MLA_RETURN_IF_ERROR(read_struct("problem", problem, in));
    auto made = std::make_unique<mla_plan>();
    made->plan.context = context->context;
    MLA_RETURN_IF_ERROR(mla::make_problem(in, made->plan.problem));
    MLA_RETURN_IF_ERROR(mla::format_problem(in, made->plan.problem_string));
    MLA_RETURN_IF_ERROR(mla::choose_backend(made->plan));
    *out = made.release();
    return Status::ok();
  });
}

void mla_plan_destroy(mla_plan* plan) { delete plan; }

mla_status mla_plan_get_info(const mla_plan* plan, mla_plan_info* info) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("plan", plan));
    MLA_RETURN_IF_ERROR(mla::check_struct_size("info", info, sizeof *info));
    const mla::Plan& p = plan->plan;
    write_struct({.struct_size = 0,
                  .parts = p.config.parts,
                  .schedule_bytes = p.layout().bytes(),
                  .schedule_alignment = mla::schedule::kAlignment,
                  .scratch_bytes = p.scratch_bytes,
                  .scratch_alignment = mla::kScratchAlignment,
                  .backend = p.backend->name,
                  .variant = p.variant.c_str(),
                  .problem = p.problem_string.c_str(),
                  .block_tokens = p.config.block_tokens,
                  .item_rows = p.config.item_rows,
                  .slots = p.config.slots},
                 info);
    return Status::ok();
  });
}

mla_status mla_schedule(const mla_plan* plan, const mla_schedule_args* args, void* stream) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("plan", plan));
    mla_schedule_args in;
    mla::ScheduleCall call{};
    MLA_RETURN_IF_ERROR(read_struct("args", args, in));
    MLA_RETURN_IF_ERROR(mla::make_schedule_call(plan->plan, in, stream, call));
    return plan->plan.backend->schedule(plan->plan, call, stream);
  });
}

mla_status mla_decode(const mla_plan* plan, const mla_decode_args* args, void* stream) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("plan", plan));
    mla_decode_args in;
    mla::DecodeCall call{};
    MLA_RETURN_IF_ERROR(read_struct("args", args, in));
    MLA_RETURN_IF_ERROR(mla::make_decode_call(plan->plan, in, stream, call));
    return plan->plan.backend->decode(plan->plan, call, stream);
  });
}

mla_status mla_merge(const mla_context* context, const mla_merge_args* args, void* stream) {
  return guarded([&] {
    MLA_RETURN_IF_ERROR(mla::check_not_null("context", context));
    mla_merge_args in;
    mla::MergeCall call{};
    mla::DeviceType device_type{};
    const mla::Backend* backend = nullptr;
    MLA_RETURN_IF_ERROR(read_struct("args", args, in));
    MLA_RETURN_IF_ERROR(mla::make_merge_call(in, call, device_type));
    MLA_RETURN_IF_ERROR(mla::choose_merge_backend(*context->context, device_type, &backend));
    return backend->merge(*context->context, call, stream);
  });
}

}  // extern "C"
