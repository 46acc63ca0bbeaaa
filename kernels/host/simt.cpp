#include "simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"
#include "warp.h"

namespace simt {

Counters counters;

namespace {

enum class State { ready, at_barrier, in_collective, finished };

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  Fiber fiber;
  State state = State::finished;
  Request request;
  int barrier_line = 0;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;  // committed and not yet waited for, oldest first
};

struct FreeDeleter {
  void operator()(unsigned char* p) const { free(p); }
};

std::vector<std::unique_ptr<Thread>> threads;  // fibers are kept and reused by the next block
std::unique_ptr<unsigned char, FreeDeleter> shared;
Launch launch;
Dim block;
unsigned current;
void (*body)(void*);
void* context;

Thread& running() { return *threads[current]; }
unsigned warps() { return (launch.threads + 31) / 32; }

void fiber_body() {
  entered(running().fiber);
  for (;;) {
    body(context);
    Thread& self = running();
    if (!self.uncommitted.empty()) fail("an asynchronous copy was never committed");
    for (auto& group : self.groups)
      if (!group.empty()) fail("an asynchronous copy was never waited for");
    self.state = State::finished;
    suspend(self.fiber);
  }
}

void block_until_ready(State state) {
  running().state = state;
  suspend(running().fiber);
}

bool step(unsigned thread) {
  if (threads[thread]->state != State::ready) return false;
  current = thread;
  resume(threads[thread]->fiber);
  return true;
}

// Completes the collective that a lane of this warp waits in, if all lanes it names have arrived.
bool complete_collective(unsigned warp) {
  unsigned first = warp * 32, lanes = std::min(32u, launch.threads - first), leader = 0;
  while (leader < lanes && threads[first + leader]->state != State::in_collective) leader++;
  if (leader == lanes) return false;
  const Request& wanted = threads[first + leader]->request;
  Request* requests[32] = {};
  for (unsigned i = 0; i < 32; i++) {
    if (!(wanted.mask >> i & 1)) continue;
    if (i >= lanes || threads[first + i]->state == State::finished) fail("a collective names an absent lane", wanted.line);
    if (threads[first + i]->state != State::in_collective) return false;
    Request& other = threads[first + i]->request;
    if (other.kind != wanted.kind || other.mask != wanted.mask || other.line != wanted.line)
      fail("lanes of a warp are in different collectives", other.line);
    requests[i] = &other;
  }
  perform(requests, wanted.mask, shared.get(), launch.shared_bytes);
  for (unsigned i = 0; i < 32; i++)
    if (requests[i]) threads[first + i]->state = State::ready;
  return true;
}

// One warp as far as it gets by itself.
bool run_ahead(unsigned warp) {
  bool progress = false, again = true;
  while (again) {
    again = false;
    for (unsigned i = 32 * warp; i < std::min(launch.threads, 32 * warp + 32); i++) again |= step(i);
    while (complete_collective(warp)) again = true;
    progress |= again;
  }
  return progress;
}

bool run_round(std::vector<unsigned>& order, std::mt19937& random) {
  bool progress = false;
  if (launch.order >= Order::first_warp_ahead) {
    for (unsigned i = 0; i < warps(); i++)
      progress |= run_ahead(launch.order == Order::first_warp_ahead ? i : warps() - 1 - i);
    return progress;
  }
  if (launch.order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
  for (unsigned thread : order) progress |= step(thread);
  for (unsigned warp = 0; warp < warps(); warp++)
    while (complete_collective(warp)) progress = true;
  return progress;
}

// Opens the barrier if every thread has reached it.
bool open_barrier() {
  for (unsigned i = 0; i < launch.threads; i++) {
    if (threads[i]->state == State::finished) fail("a barrier that a thread has left behind", threads[0]->barrier_line);
    if (threads[i]->state != State::at_barrier) return false;
    if (threads[i]->barrier_line != threads[0]->barrier_line) fail("threads at different barriers", threads[i]->barrier_line);
  }
  for (unsigned i = 0; i < launch.threads; i++) threads[i]->state = State::ready;
  counters.barriers++;
  return true;
}

void run_block(std::mt19937& random) {
  std::vector<unsigned> order(launch.threads);
  for (unsigned i = 0; i < launch.threads; i++) order[i] = launch.order == Order::descending ? launch.threads - 1 - i : i;
  memset(shared.get(), 0xCD, launch.shared_bytes);  // what was never written must not look right
  for (unsigned i = 0; i < launch.threads; i++) {
    threads[i]->state = State::ready;
    threads[i]->groups.clear();
  }
  for (;;) {
    bool progress = run_round(order, random);
    unsigned finished = 0;
    for (unsigned i = 0; i < launch.threads; i++) finished += threads[i]->state == State::finished;
    if (finished == launch.threads) return;
    if (!progress && !open_barrier()) fail("deadlock: threads wait for what never comes", threads[0]->request.line);
  }
}

void collective(Collective kind, uint32_t mask, int line) {
  Request& request = running().request;
  request.kind = kind;
  request.mask = mask;
  request.line = line;
  block_until_ready(State::in_collective);
}

void move(const Copy& copy) {
  if (copy.from) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}

}  // namespace

void run(const Launch& what, void (*kernel)(void*), void* kernel_context) {
  launch = what;
  body = kernel;
  context = kernel_context;
  counters = {};
  std::mt19937 random(0);
  // Exactly as large as asked for, so that the address sanitizer sees a byte beyond it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max(1u, launch.shared_bytes))) fail("out of memory");
  shared.reset((unsigned char*)memory);
  while (threads.size() < launch.threads) {
    threads.push_back(std::make_unique<Thread>());
    create(threads.back()->fiber, fiber_body);
  }
  for (block.z = 0; block.z < launch.grid.z; block.z++)
    for (block.y = 0; block.y < launch.grid.y; block.y++)
      for (block.x = 0; block.x < launch.grid.x; block.x++) run_block(random);
}

Dim thread_index() { return {current, 0, 0}; }
Dim block_index() { return block; }
Dim block_size() { return {launch.threads, 1, 1}; }
Dim grid_size() { return launch.grid; }
unsigned char* dynamic_shared() { return shared.get(); }

void barrier(int line) {
  running().barrier_line = line;
  block_until_ready(State::at_barrier);
}

uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane, int line) {
  running().request.in[0] = value;
  running().request.in[1] = (uint32_t)source_lane;
  collective(Collective::shuffle, mask, line);
  return running().request.out[0];
}

uint32_t ballot(uint32_t mask, bool predicate, int line) {
  running().request.in[0] = predicate;
  collective(Collective::ballot, mask, line);
  return running().request.out[0];
}

void load_matrix_x4(uint32_t (&out)[4], const void* row, int line) {
  running().request.address = (const unsigned char*)row;
  collective(Collective::load_matrix, 0xffffffffu, line);
  std::copy_n(running().request.out, 4, out);
}

void mma_8x8x16(int32_t (&d)[2], uint32_t a, uint32_t b, int line) {
  uint32_t* in = running().request.in;
  in[0] = a, in[1] = b, in[2] = (uint32_t)d[0], in[3] = (uint32_t)d[1];
  collective(Collective::mma_8x8x16, 0xffffffffu, line);
  for (int i = 0; i < 2; i++) d[i] = (int32_t)running().request.out[i];
}

void mma_16x8x32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  uint32_t* in = running().request.in;
  std::copy_n(a, 4, in);
  std::copy_n(b, 2, in + 4);
  std::copy_n(d, 4, in + 6);
  collective(Collective::mma_16x8x32, 0xffffffffu, line);
  for (int i = 0; i < 4; i++) d[i] = (int32_t)running().request.out[i];
}

void copy_async_16(void* to, const void* from, bool valid) {
  if (((uintptr_t)to | (uintptr_t)from) & 15) fail("cp.async is not aligned to 16 bytes");
  auto* target = (unsigned char*)to;
  if (target < shared.get() || target + 16 > shared.get() + launch.shared_bytes) fail("cp.async outside shared memory");
  Copy copy = {to, valid ? from : nullptr};
  if (launch.copies == Copies::at_issue) move(copy);
  else running().uncommitted.push_back(copy);
  if (valid) counters.async_bytes += 16;
}

void copy_commit() {
  running().groups.push_back(std::move(running().uncommitted));
  running().uncommitted.clear();
}

void copy_wait(unsigned pending) {
  auto& groups = running().groups;
  while (groups.size() > pending) {
    for (const Copy& copy : groups.front()) move(copy);
    groups.pop_front();
  }
}

void fail(const char* message, int line) {
  fflush(stdout);
  fprintf(stderr, "SIMT: block (%u,%u,%u) thread %u line %d: %s\n", block.x, block.y, block.z, current, line, message);
  _Exit(97);
}

}  // namespace simt
