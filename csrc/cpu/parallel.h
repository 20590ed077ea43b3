// How the operators spread independent tasks over torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

#include "checks.h"

namespace vlmfast::cpu {

// A 64-byte aligned buffer that each thread keeps between calls, so that its pages are mapped once.
// What is larger than `kKept` bytes is given back after the call.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

  // nullptr where there is no memory left.
  float* get(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    if (bytes > size_ || !data_) {
      size_ = 0;
      data_.reset();  // before the next is asked for, not beside it
      data_.reset(static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
      if (data_) size_ = bytes;
    }
    return data_.get();
  }

  void trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kKept = 0;  // a buffer that is larger than was asked for hides mistakes
#else
  static constexpr size_t kKept = 8u << 20;
#endif
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  size_t size_ = 0;
};

// How many pieces of `step` n makes, the last one maybe shorter.
template <class Int>
constexpr Int divide_up(Int n, Int step) {
  return (n + step - 1) / step;
}

// Calls work(first, last, scratch) on torch's threads, for ranges that make up [0, workers). Of an
// exception that leaves one of those threads only its failure would be told: a thread without
// memory leaves the work to others, and the call fails here.
template <class Work>
void run_workers(int64_t workers, int64_t scratch_floats, const Work& work) {
  std::atomic<bool> lacks_memory{false};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    Scratch& scratch = Scratch::of_this_thread();
    if (float* buffer = scratch.get(scratch_floats))
      work(first, last, buffer);
    else
      lacks_memory.store(true, std::memory_order_relaxed);
    scratch.trim();
  });
  VLMFAST_CHECK(!lacks_memory.load(), "out of memory: cannot allocate ",
                scratch_floats * static_cast<int64_t>(sizeof(float)),
                " bytes of scratch for each of ", workers, " threads");
}

// A task, and what the thread that claimed it ran before (-1: nothing) and runs afterwards, which
// it may prefetch for (where it runs no more: the last task).
struct Claim {
  int64_t previous, task, next;
};

// Calls body(claim, scratch) for every task in [0, tasks). Threads claim tasks as they become free,
// one group of neighbours ahead: tasks may be of unequal size (causal rows are), and so may cores.
// A task's result must not depend on which thread runs it.
template <class Body>
void for_each_task(int64_t tasks, int64_t scratch_floats, const Body& body,
                   int64_t group_size = 1) {
  const int64_t groups = divide_up(tasks, group_size);
  const int64_t workers = std::min<int64_t>(groups, torch::stable::get_num_threads());
  std::atomic<int64_t> unclaimed{workers};
  const auto work = [&](int64_t first_worker, int64_t last_worker, float* scratch) {
    int64_t previous = -1;
    for (int64_t worker = first_worker; worker < last_worker; worker++) {
      for (int64_t group = worker; group < groups;) {
        const int64_t following = unclaimed.fetch_add(1, std::memory_order_relaxed);
        const int64_t end = std::min((group + 1) * group_size, tasks);
        for (int64_t task = group * group_size; task < end; task++) {
          const int64_t next = task + 1 < end ? task + 1 : following * group_size;
          body(Claim{previous, task, std::min(next, tasks - 1)}, scratch);
          previous = task;
        }
        group = following;
      }
    }
  };
  run_workers(workers, scratch_floats, work);
}

// Lets blocks of work pass through the same stages, each in the order of the blocks.
class Turns {
 public:
  explicit Turns(int64_t blocks) : passed_(new std::atomic<int>[blocks]) {
    for (int64_t i = 0; i < blocks; i++) passed_[i].store(0, std::memory_order_relaxed);
  }
  // Returns when the block before has passed `stage`.
  void wait(int64_t block, int stage) const {
    if (block == 0) return;
    while (passed_[block - 1].load(std::memory_order_acquire) <= stage) std::this_thread::yield();
  }
  void pass(int64_t block, int stage) {
    passed_[block].store(stage + 1, std::memory_order_release);
  }

 private:
  std::unique_ptr<std::atomic<int>[]> passed_;
};

// Calls body(block, scratch) for every block in [0, blocks). Blocks are claimed in order, and also
// where all of them run on one thread, so that one may wait for those before it.
template <class Body>
void for_each_in_order(int64_t blocks, int64_t scratch_floats, const Body& body) {
  const int64_t workers = std::min<int64_t>(blocks, torch::stable::get_num_threads());
  std::atomic<int64_t> unclaimed{0};
  run_workers(workers, scratch_floats, [&](int64_t, int64_t, float* scratch) {
    for (;;) {
      const int64_t block = unclaimed.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks) break;
      body(block, scratch);
    }
  });
}

}  // namespace vlmfast::cpu
