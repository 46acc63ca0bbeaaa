#include "parallel.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace haq {
namespace {

constexpr auto kSpin = std::chrono::microseconds(30); // how long a helper looks for the next job before it sleeps

struct Pool {
  std::mutex one_caller;
  std::mutex mutex; // guards the rest
  std::condition_variable job_posted, helper_left;
  std::atomic<uint64_t> posted{0}; // jobs so far; also read without the mutex, by spinning helpers
  void (*work)(void*) = nullptr;
  void* data = nullptr;
  int threads = 0; // helpers started
  int places = 0;  // helpers that may still enter the present job
  int inside = 0;  // helpers at work on it
  int asleep = 0;
};

[[noreturn]] void help(Pool& pool) {
  uint64_t seen = 0;
  for (;;) {
    const auto give_up = std::chrono::steady_clock::now() + kSpin;
    while (pool.posted.load(std::memory_order_relaxed) == seen && std::chrono::steady_clock::now() < give_up) {
    }
    std::unique_lock<std::mutex> lock(pool.mutex);
    ++pool.asleep;
    pool.job_posted.wait(lock, [&] { return pool.posted.load(std::memory_order_relaxed) != seen; });
    --pool.asleep;
    seen = pool.posted.load(std::memory_order_relaxed);
    if (pool.places == 0) continue; // full, or closed already
    --pool.places;
    ++pool.inside;
    const auto work = pool.work;
    void* const data = pool.data;
    lock.unlock();
    work(data);
    lock.lock();
    if (--pool.inside == 0) pool.helper_left.notify_one();
  }
}

} // namespace

void run_with_helpers(int helpers, void (*work)(void*), void* data) {
  static Pool& pool = *new Pool; // never destroyed: helpers live as long as the process
  std::unique_lock<std::mutex> caller(pool.one_caller, std::try_to_lock);
  if (!caller) return work(data);
  {
    std::lock_guard<std::mutex> lock(pool.mutex);
    try {
      for (; pool.threads < helpers; ++pool.threads) std::thread(help, std::ref(pool)).detach();
    } catch (const std::system_error&) { // no more threads to be had: do with those there are
    }
    pool.work = work;
    pool.data = data;
    pool.places = helpers;
    pool.posted.fetch_add(1, std::memory_order_relaxed);
    if (pool.asleep > 0) pool.job_posted.notify_all();
  }
  work(data);
  std::unique_lock<std::mutex> lock(pool.mutex);
  pool.places = 0;
  pool.helper_left.wait(lock, [&] { return pool.inside == 0; });
}

} // namespace haq
