// Stacks and the switching between them, known to the address sanitizer.
#pragma once
#include <cstddef>

namespace simt {

// A function on a stack of its own. It is resumed and suspended in turns and never returns.
struct Fiber {
  void* stack = nullptr;    // lowest address
  void* position = nullptr; // saved stack pointer, or context where there is no assembly for this CPU
  void* sanitizer = nullptr;
};

void create(Fiber& fiber, void (*body)());
void resume(Fiber& fiber);   // from the scheduler, until the fiber suspends
void suspend(Fiber& fiber);  // from within the fiber, back to the scheduler
void entered(Fiber& fiber);  // the first thing that `body` calls

}  // namespace simt
