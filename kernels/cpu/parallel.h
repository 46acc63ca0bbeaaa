// Work shared among threads: units are handed out by a counter, and helpers that come late are not waited for.
//
// A fork and join as in OpenMP waits until every thread has run. On a machine that others use too, a helper may
// not run for milliseconds, while a decode step takes microseconds: here the caller takes units until none is
// left, closes the job and waits only for helpers in the middle of a unit. So the worst case is one thread's
// time, and after fork(), where the helpers are gone, work goes on with the caller alone.
#pragma once
#include <atomic>
#include <cstdint>

namespace haq {

// Runs work(data) on the caller and on up to `helpers` other threads; returns when all that began have ended.
// While another caller has the helpers, runs on the caller alone.
void run_with_helpers(int helpers, void (*work)(void*), void* data);

template <class Body> // Body: void(int64_t unit), must not throw
void parallel_for(int threads, int64_t units, const Body& body) {
  if (threads > units) threads = static_cast<int>(units);
  if (threads <= 1) {
    for (int64_t i = 0; i < units; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    int64_t units;
    std::atomic<int64_t> next;
  } shared{body, units, {0}};
  const auto work = [](void* data) {
    auto& s = *static_cast<Shared*>(data);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.units;) s.body(i);
  };
  run_with_helpers(threads - 1, work, &shared);
}

// Below so many values of a row-by-row pass threads cost more than they gain.
inline int threads_for(int threads, int64_t values) { return values < 32768 ? 1 : threads; }

} // namespace haq
