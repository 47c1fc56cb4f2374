// The threads of one step: they share work by taking numbers, and meet after each phase.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <atomic>

struct Team {
  int size = 1;
  std::atomic<long> next{0};
  std::atomic<int> arrived{0};
  std::atomic<int> phase{0};

  // The first of `count` pieces of work that nobody has taken in this phase.
  long take(long count) { return next.fetch_add(count, std::memory_order_relaxed); }

  // Wait for the others; the last to come opens the next phase.
  void meet() {
    const int now = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      next.store(0, std::memory_order_relaxed);
      arrived.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase.load(std::memory_order_acquire) == now; ++spins) {
      if (spins < 4000) _mm_pause();
      else sched_yield();  // another process has the core that the last one needs
    }
  }
};
