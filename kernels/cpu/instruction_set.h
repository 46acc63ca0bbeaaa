// All that an instruction set's source needs beside its tile loop, and the table it makes of both. The source defines
// HAQ_TARGET and HAQ_STAGED, includes its chunk header and then this, once.
#pragma once
#include "rows.h"
#include "tile4.h"
#include "attention.h"
#include "float_product.h"
#include "hadamard.h"

namespace haq {
namespace {

// `attend` is one of attention.h and `float_product` one of float_product.h, by how many registers there are.
constexpr Kernels table(const char* name, int row_tile, decltype(Kernels::tile) tile, decltype(Kernels::tile4) tile4,
                        decltype(Kernels::attend) attend, decltype(Kernels::float_product) float_product) {
  Kernels kernels{};
  kernels.name = name;
  kernels.row_tile = row_tile;
  kernels.element_bytes = sizeof(HAQ_STAGED);
  kernels.stage = stage;
  kernels.quantize = quantize;
  kernels.tile = tile;
  kernels.finish = finish;
  kernels.tile4 = tile4;
  kernels.finish4 = finish4;
  kernels.offsets = offsets;
  kernels.silu_mul = silu_mul;
  kernels.hadamard = hadamard;
  kernels.rms_norm = rms_norm;
  kernels.layer_norm = layer_norm;
  kernels.rotate = rotate;
  kernels.gate_up = gate_up;
  kernels.attend = attend;
  kernels.float_product = float_product;
  kernels.read = read;
  return kernels;
}

} // namespace
} // namespace haq
