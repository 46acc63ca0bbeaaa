#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
Fiber scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_bytes = 0;

// The sanitizer is told before a switch where the next stack is, and after it that the switch took place.
void announce([[maybe_unused]] Fiber& from, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer, stack, bytes);
#endif
}

void arrived([[maybe_unused]] Fiber& at, [[maybe_unused]] bool from_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(at.sanitizer, &stack, &bytes);
  if (from_scheduler) scheduler_stack = stack, scheduler_bytes = bytes;
#endif
}

}  // namespace

#if defined(__x86_64__)
// Saves the registers that a call must preserve on the stack, stores the stack pointer and takes the other one.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace {
void prepare(Fiber& fiber, void (*body)()) {
  auto* top = (uint64_t*)((char*)fiber.stack + STACK_BYTES);
  *--top = 0;                // a return address that is never used, and the alignment a call leaves
  *--top = (uint64_t)body;   // where the first switch returns to
  for (int registers = 0; registers < 6; registers++) *--top = 0;
  fiber.position = top;
}
void change(Fiber& from, Fiber& to) { simt_switch(&from.position, to.position); }
}  // namespace
#else
}  // namespace simt
#include <ucontext.h>
namespace simt {
namespace {
ucontext_t* context(Fiber& fiber) {
  if (!fiber.position) fiber.position = new ucontext_t;
  return (ucontext_t*)fiber.position;
}
void prepare(Fiber& fiber, void (*body)()) {
  ucontext_t* c = context(fiber);
  getcontext(c);
  c->uc_stack.ss_sp = fiber.stack;
  c->uc_stack.ss_size = STACK_BYTES;
  c->uc_link = nullptr;
  makecontext(c, body, 0);
}
void change(Fiber& from, Fiber& to) { swapcontext(context(from), context(to)); }
}  // namespace
#endif

void create(Fiber& fiber, void (*body)()) {
  fiber.stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber.stack == MAP_FAILED) abort();
  prepare(fiber, body);
}

void resume(Fiber& fiber) {
  announce(scheduler, fiber.stack, STACK_BYTES);
  change(scheduler, fiber);
  arrived(scheduler, false);
}

void suspend(Fiber& fiber) {
  announce(fiber, scheduler_stack, scheduler_bytes);
  change(fiber, scheduler);
  arrived(fiber, true);
}

void entered(Fiber& fiber) { arrived(fiber, true); }

}  // namespace simt
