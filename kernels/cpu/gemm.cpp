// y = epilogue(quantise(x) W^T): rows are quantised and staged once, then each unit of work takes some panels of
// weights and a block of row tiles, a step of k at a time. A panel's part is read from memory once for a block. A
// tile's part stays in the nearest cache while the panels, in the second, pass by, and their outputs lie side by side.
// Widened weights are the other way round: a panel's part stays while the tiles pass by.
#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "parallel.h"
#include "scratch.h"

namespace haq {

namespace {

constexpr int64_t kStreamBytes = 1 << 17;   // weights that a unit streams when there are few rows
constexpr int64_t kBlockBytes = 8 << 20;    // staged activations of a block of tiles
constexpr int64_t kStepGroups = 160;        // k groups of a step at most: 20 KiB of a panel's weights
constexpr int64_t kUnitPanels = 8;          // panels of a unit when there are many rows: 256 columns of outputs
constexpr int64_t kTileSlack = 32 * kChunk; // tile registers take full tiles, also at the end of a smaller one
constexpr int kWideTiles = 4;               // tiles from which widening a panel first pays

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

thread_local Scratch staged_scratch, row_scratch, worker_scratch, rotated_scratch;

int64_t bytes_of(Kind kind) { return kind == kFloat ? 4 : kind == kBFloat16 ? 2 : 1; }

// A row to quantise: what is in memory, or, with a rotation, its transform in this thread's nearest cache.
struct Row {
  const void* values;
  Kind kind;
};

Row rotated(const Kernels& isa, const void* x, Kind kind, int64_t k, int64_t rotation) {
  if (rotation <= 1) return {x, kind};
  float* out = rotated_scratch.floats(k);
  isa.hadamard(x, kind, k, rotation, static_cast<float>(1.0 / std::sqrt(static_cast<double>(rotation))), out);
  return {out, kFloat};
}

// Calls body(index) for `count` indices; what it throws for want of memory is thrown after all.
template <class Body>
void parallel_or_throw(int threads, int64_t count, const Body& body) {
  std::atomic<bool> out_of_memory{false};
  parallel_for(threads, count, [&](int64_t index) {
    try {
      body(index);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

struct Plan {
  int64_t groups, step, tiles, tile_bytes; // step: groups at a time
  int64_t span, spans;                     // groups of 4-bit weights that share scales, and how many spans there are
  int64_t panel_bytes;
  bool wide;
  int64_t blocks, tiles_per_block, panels, panels_per_unit, chunks;
};

Plan make_plan(const Product& p) {
  Plan plan{};
  const Kernels& isa = *p.isa;
  plan.groups = ceil_div(p.k, kGroup);
  plan.tiles = ceil_div(p.m, isa.row_tile);
  plan.tile_bytes = ceil_div(p.k, kChunk) * kChunk * isa.element_bytes * isa.row_tile;
  plan.wide = p.group == 0 && isa.widen && plan.tiles >= kWideTiles;
  plan.span = p.group == 0 || p.group >= p.k ? ceil_div(p.k, kPair) * 2 : p.group / kGroup;
  plan.spans = p.group == 0 ? 0 : ceil_div(p.k, p.group);
  plan.panel_bytes = p.group == 0 ? plan.groups * kGroupBytes : ceil_div(p.k, kPair) * kGroupBytes;
  const int64_t steps = plan.tiles > 1 ? std::max<int64_t>(1, ceil_div(plan.groups, kStepGroups)) : 1;
  // Steps begin at a chunk of the staged rows, and at a span.
  const int64_t chunk_groups = std::max<int64_t>(kChunk / kGroup, p.group == 0 ? 0 : plan.span);
  plan.step = ceil_div(plan.groups, steps * chunk_groups) * chunk_groups;
  plan.panels = ceil_div(p.n, kPanel);
  const int64_t bytes = std::max<int64_t>(1, plan.panel_bytes);
  plan.panels_per_unit = plan.tiles == 1 ? std::max<int64_t>(1, kStreamBytes / bytes) : kUnitPanels;
  plan.chunks = ceil_div(plan.panels, plan.panels_per_unit);
  const int64_t fitting = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>(1, plan.tile_bytes));
  // Few panels and many threads: split the rows as well.
  const int64_t wanted = p.threads > 1 ? ceil_div(4 * p.threads, plan.chunks) : 1;
  const int64_t least = std::max(ceil_div(plan.tiles, fitting), std::min(wanted, plan.tiles));
  plan.tiles_per_block = ceil_div(plan.tiles, least);
  plan.blocks = ceil_div(plan.tiles, plan.tiles_per_block);
  return plan;
}

// `offsets` (m, spans) are filled in for 4-bit weights.
void stage_tile(const Product& p, const Plan& plan, int64_t tile, uint8_t* staged, float* scales, int32_t* sums,
                int32_t* offsets) {
  const int64_t row_bytes = p.k * bytes_of(p.x_kind);
  const int64_t first = tile * p.isa->row_tile;
  const int64_t last = std::min(p.m, first + p.isa->row_tile);
  for (int64_t row = first; row < last; ++row) {
    const Row x = rotated(*p.isa, static_cast<const uint8_t*>(p.x) + row * row_bytes, p.x_kind, p.k, p.rotation);
    uint8_t* out = staged + tile * plan.tile_bytes + (row - first) * kChunk;
    p.isa->stage(x.values, x.kind, p.k, p.static_scale, last - first, out, scales + row, sums + row);
    if (p.group) p.isa->offsets(out, last - first, plan.groups, plan.span, offsets + row * plan.spans);
  }
}

// What `finish` will read of 32 columns lies apart from the weights that stream by.
void ask_for_columns(const Epilogue& e, int64_t column) {
  for (const float* values : {e.column_scale, e.bias})
    if (values) {
      __builtin_prefetch(values + column);
      __builtin_prefetch(values + column + kPanel / 2);
    }
}

// The panels [start, stop) through the tiles [first, last). `work` holds the sums and, where asked for, a panel's
// widened weights.
void run_panels(const Product& p, const Plan& plan, const Epilogue& e, const uint8_t* staged, int64_t start,
                int64_t stop, int64_t first, int64_t last, uint8_t* work) {
  const Kernels& isa = *p.isa;
  const int64_t sums_of_tile = isa.row_tile * kPanel;
  const bool whole = plan.groups <= plan.step; // else the sums of all wait for the next step
  auto* sums = reinterpret_cast<int32_t*>(work);
  auto* wide = reinterpret_cast<uint16_t*>(sums + (whole ? 1 : (stop - start) * (last - first)) * sums_of_tile);
  const int64_t tiles = last - first;
  int64_t group = 0;
  do { // at least once, so that K = 0 gives zeros
    const int64_t count = std::min(plan.step, plan.groups - group);
    const int64_t x_offset = group * kGroup * isa.element_bytes; // of a row
    const auto part = [&](int64_t panel) { return p.packed + (panel * plan.groups + group) * kGroupBytes; };
    const auto multiply_tile = [&](int64_t tile, int64_t panel, const void* weights) {
      const int64_t row = tile * isa.row_tile;
      const int rows = static_cast<int>(std::min<int64_t>(isa.row_tile, p.m - row));
      int32_t* acc = sums + (whole ? 0 : (panel - start) * tiles + tile - first) * sums_of_tile;
      ask_for_columns(e, panel * kPanel);
      isa.tile(rows, staged + tile * plan.tile_bytes + x_offset * rows, weights, plan.wide, count, group > 0, acc);
      if (group + count >= plan.groups) isa.finish(acc, rows, row, panel * kPanel, e);
    };
    if (plan.wide)
      for (int64_t panel = start; panel < stop; ++panel) {
        isa.widen(part(panel), count, wide);
        for (int64_t tile = first; tile < last; ++tile) multiply_tile(tile, panel, wide);
      }
    else
      for (int64_t tile = first; tile < last; ++tile)
        for (int64_t panel = start; panel < stop; ++panel) multiply_tile(tile, panel, part(panel));
    group += count;
  } while (group < plan.groups);
}

// The same for 4-bit weights. `work` holds the sums and the scales of a last panel that is not full.
void run_panels4(const Product& p, const Plan& plan, const Epilogue& e, const uint8_t* staged, const int32_t* offsets,
                 int64_t start, int64_t stop, int64_t first, int64_t last, uint8_t* work) {
  const Kernels& isa = *p.isa;
  const int64_t tiles = last - first, sums_of_tile = isa.row_tile * kPanel;
  auto* sums = reinterpret_cast<float*>(work);
  float* padded = sums + (plan.groups <= plan.step ? 1 : (stop - start) * tiles) * sums_of_tile;
  const bool whole = plan.groups <= plan.step;
  for (int64_t group = 0; group < plan.groups; group += plan.step) {
    const int64_t count = std::min(plan.step, plan.groups - group);
    const int64_t span = group / plan.span;
    for (int64_t tile = first; tile < last; ++tile)
      for (int64_t panel = start; panel < stop; ++panel) {
        const int64_t row = tile * isa.row_tile, column = panel * kPanel;
        Tile4 t;
        t.rows = static_cast<int>(std::min<int64_t>(isa.row_tile, p.m - row));
        t.x = staged + tile * plan.tile_bytes + group * kGroup * isa.element_bytes * t.rows;
        t.panel = p.packed + panel * plan.panel_bytes + group / 2 * kGroupBytes;
        t.groups = count;
        t.span = plan.span;
        t.scale = e.column_scale + span * p.n + column;
        t.scale_stride = p.n;
        if (column + kPanel > p.n) {
          for (int64_t i = 0; i * plan.span < count; ++i)
            std::memcpy(padded + i * kPanel, t.scale + i * p.n, static_cast<size_t>(p.n - column) * sizeof(float));
          t.scale = padded;
          t.scale_stride = kPanel;
        }
        t.offset = offsets + row * plan.spans + span;
        t.offset_stride = plan.spans;
        t.add = group > 0;
        t.sums = sums + (whole ? 0 : (panel - start) * tiles + tile - first) * sums_of_tile;
        isa.tile4(t);
        if (group + count >= plan.groups) isa.finish4(t.sums, t.rows, row, column, e);
      }
  }
}

} // namespace

void quantize_rows(const Kernels& isa, int threads, const void* x, Kind kind, int64_t m, int64_t k, float static_scale,
                   int64_t rotation, int8_t* q, float* scale) {
  const int64_t bytes = k * bytes_of(kind);
  parallel_or_throw(threads_for(threads, m * k), m, [&](int64_t index) {
    const Row row = rotated(isa, static_cast<const uint8_t*>(x) + index * bytes, kind, k, rotation);
    isa.quantize(row.values, row.kind, k, static_scale, q + index * k, scale + index);
  });
}

void multiply(const Product& p, Epilogue e) {
  if (p.m == 0 || p.n == 0) return;
  const Plan plan = make_plan(p);
  uint8_t* staged = staged_scratch.get(plan.tiles * plan.tile_bytes + kTileSlack);
  auto* scales = reinterpret_cast<float*>(row_scratch.get(p.m * (8 + 4 * plan.spans)));
  auto* sums = reinterpret_cast<int32_t*>(scales + p.m);
  int32_t* offsets = sums + p.m;
  parallel_or_throw(threads_for(p.threads, p.m * p.k), plan.tiles,
                    [&](int64_t tile) { stage_tile(p, plan, tile, staged, scales, sums, offsets); });
  e.row_sum = sums;
  e.row_scale = p.row_scale ? p.row_scale : scales;
  const int64_t waiting = plan.groups > plan.step ? plan.panels_per_unit * plan.tiles_per_block : 1;
  const int64_t work_bytes = (waiting * p.isa->row_tile + plan.spans) * kPanel * 4 +
                             (plan.wide ? plan.step * kGroupBytes * 2 : 0);
  parallel_or_throw(p.threads, plan.blocks * plan.chunks, [&](int64_t unit) {
    uint8_t* work = worker_scratch.get(work_bytes);
    const int64_t first = unit / plan.chunks * plan.tiles_per_block;
    const int64_t last = std::min(plan.tiles, first + plan.tiles_per_block);
    const int64_t start = unit % plan.chunks * plan.panels_per_unit;
    const int64_t stop = std::min(plan.panels, start + plan.panels_per_unit);
    if (p.isa->begin) p.isa->begin(p.m);
    if (p.group)
      run_panels4(p, plan, e, staged, offsets, start, stop, first, last, work);
    else
      run_panels(p, plan, e, staged, start, stop, first, last, work);
    if (p.isa->end) p.isa->end();
  });
}

} // namespace haq
