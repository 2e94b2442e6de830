// A backend: a const table of functions. registry.cc lists them in order; the first that takes a problem wins.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "problem.h"
#include "schedule/view.h"
#include "status.h"
#include "tensors.h"

namespace mla {

namespace cpu {
class ThreadPool;
std::shared_ptr<ThreadPool> make_thread_pool();  // cpu/thread_pool.cc; starts no thread
}  // namespace cpu

// What mla_context_create settled: facts read once.
struct Context {
  std::string forced_backend;  // "" : none
  int32_t num_threads = 1;     // CPU threads, and so lanes of CPU scratch
  mla_parallel_for_fn parallel_for = nullptr;
  void* parallel_for_user = nullptr;
  // mlakit's own CPU threads: started by the first call that needs them, joined with the last owner of the context.
  std::shared_ptr<cpu::ThreadPool> threads = cpu::make_thread_pool();
};

struct Plan;

struct Backend {
  const char* name;
  DeviceType device_type;
  // Why this machine cannot run it; "" if it can. Cheap, and never starts a thread or a CUDA context.
  std::string (*why_unavailable)();
  // Why it does not take the problem; "" if it does.
  std::string (*why_unsupported)(const Problem&);
  // Fills plan.variant, config, scratch_bytes and anything private.
  Status (*plan)(Plan&);
  Status (*schedule)(const Plan&, const ScheduleCall&, void* stream);
  Status (*decode)(const Plan&, const DecodeCall&, void* stream);
  Status (*merge)(const Context&, const MergeCall&, void* stream);
  // Device memory to the host, for the checks of debug plans: waits for the stream. nullptr: the tensors are in host memory.
  Status (*read)(const Plan&, void* to, const void* from, size_t bytes, void* stream) = nullptr;
};

struct Plan {
  std::shared_ptr<const Context> context;
  Problem problem;
  std::string problem_string;
  const Backend* backend = nullptr;
  std::string variant;
  schedule::Config config{};
  size_t scratch_bytes = 0;
  std::shared_ptr<const void> state;  // the backend's own, made by plan()

  schedule::Layout layout() const { return {problem.max_batch, config.parts}; }
};

inline constexpr size_t kScratchAlignment = 256;

// Every backend of this build, in order of preference; ends with nullptr.
extern const Backend* const kBackends[];

}  // namespace mla
