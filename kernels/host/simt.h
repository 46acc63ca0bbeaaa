// A GPU block on a CPU: what a kernel can ask of the machine that runs it.
//
// The threads of a block are fibers, one block runs at a time, and a schedule says who runs next. Whatever CUDA leaves
// undefined and this layer can see (divergent barriers or collectives, shuffles from absent lanes, misaligned or
// unawaited copies, deadlock) ends the process with a message. The engine is simt.cpp; primitives.h maps CUDA's names.
#pragma once
#include <cstdint>

namespace simt {

struct Dim {
  unsigned x, y, z;
};

// Who runs next. The last two let one warp run until it blocks, which is what exposes a missing barrier before memory
// is overwritten; threads in lockstep never do.
enum class Order { ascending, descending, shuffled, first_warp_ahead, last_warp_ahead };

// When cp.async moves its bytes: CUDA allows any moment between these two.
enum class Copies { when_waited_for, at_issue };

struct Launch {
  Dim grid;
  unsigned threads;        // of a block; x only
  unsigned shared_bytes;   // dynamic shared memory
  Order order;
  Copies copies;
};

// What was executed, for comparing with a kernel's cost model.
struct Counters {
  long long mma_multiplies, matrix_loads, bank_conflicts, async_bytes, dot_multiplies, barriers;
};
extern Counters counters;

// Runs body(context) once for every thread of every block.
void run(const Launch& launch, void (*body)(void*), void* context);

// For the thread that is running.
Dim thread_index();
Dim block_index();
Dim block_size();
Dim grid_size();
unsigned char* dynamic_shared();
void barrier(int line);

// Warp collectives: return once every lane in `mask` has arrived. `line` tells call sites apart.
uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane, int line);
uint32_t ballot(uint32_t mask, bool predicate, int line);
void load_matrix_x4(uint32_t (&out)[4], const void* row, int line);
void mma_8x8x16(int32_t (&d)[2], uint32_t a, uint32_t b, int line);
void mma_16x8x32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line);

void copy_async_16(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(unsigned pending);

[[noreturn]] void fail(const char* message, int line = 0);

}  // namespace simt
