// Tensor maps, TMA's descriptors of tensors, encoded on the host for every launch (a microsecond
// each).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

namespace lightning_fastmoe::hopper {

// A tensor of 2-byte elements in five dimensions, innermost first, and the box of one load.
struct Boxes {
  std::array<int64_t, 5> sizes;
  std::array<int64_t, 4> strides;  // of all but the innermost, in elements
  std::array<int, 5> box;
};

// Contiguous; boxes are 64 x `box_rows` elements of the two innermost dimensions.
constexpr Boxes contiguous_boxes(int64_t d0, int64_t d1, int64_t d2, int64_t d3, int box_rows) {
  return {
      {d0, d1, d2, d3, 1}, {d0, d0 * d1, d0 * d1 * d2, d0 * d1 * d2 * d3}, {64, box_rows, 1, 1, 1}};
}

// Rows of a K-major operand B in an order such that each thread holds eight consecutive columns of
// D for every 32: the accumulators of thread q of a quad are columns 8 j + 2 q + i (j < 4, i < 2),
// and row 8 q + 2 j + i of the matrix is loaded to that row of B's tile. Boxes are 64 x 128 rows.
constexpr int kOrderedRows = 32;
constexpr Boxes ordered_boxes(int64_t k, int64_t rows) {
  return {{k, 2, 4, 4, rows / kOrderedRows},
          {k, 8 * k, 2 * k, kOrderedRows * k},
          {64, 2, 4, 4, 128 / kOrderedRows}};
}

// Encodes a map with the 128-byte swizzle. Returns false if the driver refuses it. The address and
// all strides must be multiples of 16 bytes.
bool encode_tensor_map(CUtensorMap* map, const void* address, bool is_bf16, const Boxes& boxes);

int multiprocessors();

}  // namespace lightning_fastmoe::hopper
