// The pool of threads: every task once, nothing before the first run, nothing left behind, and a forked child starts over.
#include "cpu/thread_pool.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <filesystem>
#include <iterator>
#include <thread>

namespace mla::cpu {
namespace {

constexpr int kMostTasks = 9;
using Counts = std::array<std::atomic<int>, kMostTasks>;

void count_task(void* counts, int64_t index) { (*static_cast<Counts*>(counts))[index].fetch_add(1); }

bool runs_each_task_once(ThreadPool& pool, int tasks) {
  Counts counts{};
  pool.run(tasks, count_task, &counts);
  for (int i = 0; i < kMostTasks; ++i) {
    if (counts[i] != (i < tasks ? 1 : 0)) return false;
  }
  return true;
}

int64_t threads_of_process() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator());
}

TEST_CASE("every task runs once, however many there are, run after run") {
  ThreadPool pool;
  for (int round = 0; round < 2000; ++round) REQUIRE(runs_each_task_once(pool, 1 + round % kMostTasks));
}

TEST_CASE("the caller's thread takes part") {
  ThreadPool pool;
  std::array<std::thread::id, 3> ids;
  pool.run(
      3, [](void* p, int64_t i) { (*static_cast<std::array<std::thread::id, 3>*>(p))[i] = std::this_thread::get_id(); },
      &ids);
  CHECK(ids[0] == std::this_thread::get_id());
}

TEST_CASE("threads come with the first run of several tasks and go with the pool") {
  const int64_t before = threads_of_process();
  {
    ThreadPool pool;
    CHECK(runs_each_task_once(pool, 1));
    CHECK(threads_of_process() == before);
    CHECK(runs_each_task_once(pool, 4));
    CHECK(threads_of_process() == before + 3);
    CHECK(runs_each_task_once(pool, 2));
    CHECK(threads_of_process() == before + 3);
  }
  CHECK(threads_of_process() == before);
}

TEST_CASE("sleeping threads wake up") {
  ThreadPool pool;
  for (int round = 0; round < 20; ++round) {
    REQUIRE(runs_each_task_once(pool, 3));
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than they spin
  }
}

TEST_CASE("callers at the same time, and a task that runs the pool, get all their tasks done") {
  ThreadPool pool;
  std::atomic<int> failures{0};
  std::array<std::thread, 4> callers;
  for (std::thread& caller : callers) {
    caller = std::thread([&] {
      for (int round = 0; round < 300; ++round) failures += !runs_each_task_once(pool, 1 + round % 4);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(failures == 0);
  struct Nested {
    ThreadPool* pool;
    std::atomic<int> failures{0};
  } nested{&pool};
  pool.run(
      3,
      [](void* p, int64_t) {
        static_cast<Nested*>(p)->failures += !runs_each_task_once(*static_cast<Nested*>(p)->pool, 3);
      },
      &nested);
  CHECK(nested.failures == 0);
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow a fork of a process with threads
TEST_CASE("a forked child runs tasks and ends, and its parent goes on") {
  for (bool was_used : {false, true}) {
    ThreadPool pool;
    if (was_used) CHECK(runs_each_task_once(pool, 3));
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a child that hangs is a failure, not a hung test
      bool is_right = true;
      {
        ThreadPool own;
        is_right = runs_each_task_once(pool, 3) && runs_each_task_once(pool, 4) && runs_each_task_once(own, 3);
      }
      _exit(is_right ? 0 : 1);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(runs_each_task_once(pool, 3));
  }
}
#endif

}  // namespace
}  // namespace mla::cpu
