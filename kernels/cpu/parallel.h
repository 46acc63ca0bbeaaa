// Work shared among threads: units are handed out by a counter, so that any number of threads that really turn
// up - also fewer than asked for - does all of them.
//
// torch's own OpenMP runtime lends its threads (Python passes the address of its GOMP_parallel): a second pool
// would fight with torch's for the cores, as idle OpenMP threads spin. Without it, plain threads are started.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace haq {

using Fork = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern std::atomic<Fork> fork_threads; // null: start std::threads

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
  if (const Fork fork = fork_threads.load(std::memory_order_relaxed)) {
    fork(work, &shared, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int t = 1; t < threads; ++t) helpers.emplace_back(work, &shared);
  work(&shared);
  for (auto& helper : helpers) helper.join();
}

} // namespace haq
