// mlakit's own CPU threads: none until the first run(), joined by the destructor, made anew in a forked child.
#pragma once

#include <atomic>
#include <cstdint>

#include "mlakit/mla.h"

namespace mla::cpu {

class ThreadPool {
 public:
  ThreadPool() = default;
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Runs fn(task_context, i) for i in [0, tasks) and returns when all are done; the caller's thread runs i = 0. Threads are
  // started when a run needs more than there are; if none can be had, or another run is going on, the caller runs everything.
  void run(int32_t tasks, mla_task_fn fn, void* task_context);

 private:
  struct Crew;
  std::atomic<Crew*> crew_{nullptr};
};

}  // namespace mla::cpu
