// The ordered list of backends, and the choice among them.
#include "registry.h"

#include <cstring>

#include "cpu/cpu_backends.h"
#include "reference/decode_ref.h"
#ifdef MLAKIT_HAS_CUDA
#include "cuda/cuda_backend.h"
#endif

namespace mla {

const Backend* const kBackends[] = {
#ifdef MLAKIT_HAS_CUDA
    &kSm90Backend,
#endif
#ifdef MLAKIT_X86
    &kCpuAvx512Bf16Backend, &kCpuAvx512Backend, &kCpuAvx2Backend,
#endif
    &kCpuScalarBackend,     &kReferenceBackend, nullptr,
};

namespace {

const char* device_name(DeviceType type) { return type == DeviceType::kCpu ? "the CPU" : "CUDA devices"; }

// Ties a schedule to the plan that it was made for: FNV-1a over what fixes the buffer's layout and meaning.
int32_t make_plan_key(const schedule::Config& c, int64_t max_batch) {
  uint32_t hash = 2166136261u;
  for (const int64_t fact :
       {max_batch, c.slots, int64_t{c.block_tokens}, int64_t{c.item_rows}, int64_t{c.heads_per_kv_head},
        int64_t{c.kv_heads}, int64_t{c.parts}, int64_t{c.overhead_blocks}, int64_t{c.chunk_blocks}}) {
    for (int shift = 0; shift < 64; shift += 8) hash = (hash ^ static_cast<uint8_t>(fact >> shift)) * 16777619u;
  }
  return static_cast<int32_t>(hash);
}

void add_reason(std::string& reasons, const Backend& backend, const std::string& reason) {
  if (!reasons.empty()) reasons += "; ";
  reasons += backend.name;
  reasons += ": ";
  reasons += reason;
}

}  // namespace

const Backend* find_backend(const char* name) {
  for (const Backend* const* b = kBackends; *b != nullptr; ++b) {
    if (std::strcmp((*b)->name, name) == 0) return *b;
  }
  return nullptr;
}

std::string backend_names() {
  std::string names;
  for (const Backend* const* b = kBackends; *b != nullptr; ++b) {
    if (!names.empty()) names += ", ";
    names += (*b)->name;
  }
  return names;
}

Status choose_backend(Plan& plan) {
  const std::string& forced = plan.context->forced_backend;
  std::string reasons;
  bool is_any_available = false;
  for (const Backend* const* b = kBackends; *b != nullptr; ++b) {
    const Backend& backend = **b;
    if (!forced.empty() && forced != backend.name) continue;
    if (backend.device_type != plan.problem.device_type) {
      if (!forced.empty()) {
        add_reason(reasons, backend,
                   std::string("was asked for by name and serves ") + device_name(backend.device_type) + " only");
        is_any_available = true;
      }
      continue;
    }
    std::string reason = backend.why_unavailable();
    if (reason.empty()) {
      is_any_available = true;
      reason = backend.why_unsupported(plan.problem);
    }
    if (!reason.empty()) {
      add_reason(reasons, backend, reason);
      continue;
    }
    plan.backend = &backend;
    MLA_RETURN_IF_ERROR(backend.plan(plan));
    plan.config.plan_key = make_plan_key(plan.config, plan.problem.max_batch);
    return Status::ok();
  }
  if (reasons.empty()) {
    return unsupported("problem %s: this build has no backend for %s (it has %s)", plan.problem_string.c_str(),
                       device_name(plan.problem.device_type), backend_names().c_str());
  }
  const bool is_driver_missing = !is_any_available && plan.problem.device_type == DeviceType::kCuda;
  return {is_driver_missing ? MLA_NO_DRIVER : MLA_UNSUPPORTED,
          "problem " + plan.problem_string + ": no backend takes it: " + reasons};
}

Status choose_merge_backend(const Context& context, DeviceType device_type, const Backend** backend) {
  std::string reasons;
  for (const Backend* const* b = kBackends; *b != nullptr; ++b) {
    if ((*b)->device_type != device_type || (!context.forced_backend.empty() && context.forced_backend != (*b)->name))
      continue;
    const std::string reason = (*b)->why_unavailable();
    if (reason.empty()) {
      *backend = *b;
      return Status::ok();
    }
    add_reason(reasons, **b, reason);
  }
  if (reasons.empty()) {
    return unsupported("out_parts: no backend that may run here merges on %s (this build has %s%s%s)",
                       device_name(device_type), backend_names().c_str(),
                       context.forced_backend.empty() ? "" : ", and the context asks for ",
                       context.forced_backend.c_str());
  }
  return {device_type == DeviceType::kCuda ? MLA_NO_DRIVER : MLA_UNSUPPORTED,
          "out_parts: no backend merges them: " + reasons};
}

}  // namespace mla
