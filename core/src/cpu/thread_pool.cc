// The pool's threads wait for a generation number to move: they spin for some microseconds, since decode calls follow one another, and
// then sleep in the kernel.
#include "cpu/thread_pool.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "backend.h"

namespace mla::cpu {

namespace {

constexpr size_t kCacheLine = 64;
constexpr auto kSpin = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns once value differs from `old`.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() - begin < kSpin);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

// A run is a word of tasks to claim. Who has claimed one may read fn and task_context: the run cannot end before that task is done. A
// thread that wakes up late finds nothing to claim and keeps nobody waiting, since the caller claims what nobody else has begun.
// Each hot word has its cache line.
struct ThreadPool::Crew {
  const pid_t pid = getpid();
  alignas(kCacheLine) std::atomic<bool> is_busy{false};
  alignas(kCacheLine) std::atomic<uint32_t> generation{0};  // of the latest run, or of the end
  alignas(kCacheLine) std::atomic<uint64_t> claims{0};      // generation << 32 | tasks << 16 | next task
  alignas(kCacheLine) std::atomic<int32_t> unfinished{0};   // tasks of the latest run
  alignas(kCacheLine) mla_task_fn fn = nullptr;
  void* task_context = nullptr;
  std::atomic<bool> is_ending{false};
  std::vector<std::thread> threads;

  static constexpr int32_t kMostTasks = 0xffff;

  // The generation in the word keeps a claim on an old run from counting in a new one.
  void run_claimed_tasks() {
    uint64_t now = claims.load(std::memory_order_acquire);
    while ((now & 0xffff) < (now >> 16 & 0xffff)) {
      if (!claims.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
      fn(task_context, static_cast<int64_t>(now & 0xffff));
      if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_one();
      now = claims.load(std::memory_order_acquire);
    }
  }

  void work(uint32_t seen) {
    for (;;) {
      wait_while(generation, seen);
      seen = generation.load(std::memory_order_acquire);
      if (is_ending.load(std::memory_order_acquire)) return;
      run_claimed_tasks();
    }
  }

  // Fewer threads than asked for are no failure. Signals are for the application's own threads.
  void grow(int32_t count) {
    const uint32_t now = generation.load(std::memory_order_relaxed);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    try {
      while (static_cast<int32_t>(threads.size()) < count) {
        threads.emplace_back([this, now] { work(now); });
      }
    } catch (const std::exception&) {
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }

  void release() {
    generation.fetch_add(1, std::memory_order_release);
    generation.notify_all();
  }

  void run(int32_t count, mla_task_fn f, void* context) {
    fn = f;
    task_context = context;
    unfinished.store(count, std::memory_order_relaxed);
    const uint64_t next_generation = generation.load(std::memory_order_relaxed) + uint64_t{1};
    claims.store(next_generation << 32 | static_cast<uint64_t>(count) << 16 | 1, std::memory_order_release);
    release();
    f(context, 0);
    unfinished.fetch_sub(1, std::memory_order_acq_rel);
    run_claimed_tasks();
    for (int32_t left = unfinished.load(std::memory_order_acquire); left != 0;
         left = unfinished.load(std::memory_order_acquire)) {
      wait_while(unfinished, left);
    }
  }

  ~Crew() {
    is_ending.store(true, std::memory_order_release);
    release();
    for (std::thread& t : threads) t.join();
  }
};

ThreadPool::~ThreadPool() {
  Crew* crew = crew_.load();
  // A forked child has no threads to join; what it inherited of the crew is left alone.
  if (crew != nullptr && crew->pid == getpid()) delete crew;
}

void ThreadPool::run(int32_t tasks, mla_task_fn fn, void* task_context) {
  if (tasks > 1 && tasks <= Crew::kMostTasks) {
    Crew* crew = crew_.load(std::memory_order_acquire);
    if (crew == nullptr || crew->pid != getpid()) {
      auto fresh = std::make_unique<Crew>();
      if (crew_.compare_exchange_strong(crew, fresh.get(), std::memory_order_acq_rel)) crew = fresh.release();
    }
    if (!crew->is_busy.exchange(true, std::memory_order_acquire)) {
      if (static_cast<int32_t>(crew->threads.size()) + 1 < tasks) crew->grow(tasks - 1);
      crew->run(tasks, fn, task_context);
      crew->is_busy.store(false, std::memory_order_release);
      return;
    }
  }
  for (int32_t i = 0; i < tasks; ++i) fn(task_context, i);
}

std::shared_ptr<ThreadPool> make_thread_pool() { return std::make_shared<ThreadPool>(); }

}  // namespace mla::cpu
