// What the builds of tools/sanitize.py hold beside the extension: bugs that their sanitizers must
// report, and threads that ThreadSanitizer can follow.
#include <barrier>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

using vlmfast::cpu::Claim;

#define PLANTED extern "C" __attribute__((visibility("default"))) void

namespace {
volatile float sink;
}

PLANTED read_behind(const float* data, int64_t n) { sink = data[n]; }

PLANTED load_vector_across_the_end(const float* data, int64_t n) {
  typedef float Vector __attribute__((vector_size(32), aligned(4)));
  const Vector x = *reinterpret_cast<const Vector*>(data + n - 7);
  for (int i = 0; i < 8; i++) sink = x[i];  // of an element alone, only that would be loaded
}

// The thread has had a larger one before.
PLANTED read_behind_scratch(const float*, int64_t n) {
  for (int64_t floats : {64 * n, 16 * n})
    vlmfast::cpu::for_each_task(1, floats, [&](const Claim&, float* scratch) {
      if (floats == 16 * n) sink = scratch[floats];
    });
}

PLANTED index_behind(const float*, int64_t n) {
  const std::vector<float> floats(n);
  sink = floats[n];
}

PLANTED overflow_an_int(const float*, int64_t n) {
  sink = static_cast<float>(static_cast<int>(n) * (1 << 30));
}

PLANTED shift_too_far(const float*, int64_t n) { sink = static_cast<float>(1 << (32 * n)); }

PLANTED cast_what_is_too_large(const float*, int64_t n) {
  sink = static_cast<float>(static_cast<int>(1e20f * static_cast<float>(n)));
}

PLANTED race_between_tasks(const float*, int64_t n) {
  float sum = 0.f;
  vlmfast::cpu::for_each_task(n, 0, [&](const Claim&, float*) { sum += 1.f; });
  sink = sum;
}

PLANTED race_out_of_turn(const float*, int64_t n) {
  float sum = 0.f;
  vlmfast::cpu::Turns turns(n);
  vlmfast::cpu::for_each_in_order(n, 0, [&](int64_t block, float*) {
    turns.wait(block, 0);
    turns.pass(block, 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that others have a turn
    sum += 1.f;
  });
  sink = sum;
}

#ifdef __SANITIZE_THREAD__
// In place of torch's, whose threads wait for each other in code that is not instrumented. All of
// them start together, so that a quick one does not leave the others without work.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t /*grain_size*/,
                                             ParallelFunc run, void* context) {
  std::barrier start(end - begin);
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i++)
    threads.emplace_back([=, &start] {
      start.arrive_and_wait();
      run(i, i + 1, context);
    });
  for (auto& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
#endif
