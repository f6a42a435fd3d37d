// Descriptions of tensors for the copy engine, made on the host for every launch (a microsecond
// each).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lightning_fastmoe::hopper {

// A contiguous tensor of 2-byte elements of at most four dimensions, innermost first, of which a
// copy takes boxes of 64 x `box_rows` elements (of the two innermost dimensions) with the 128-byte
// swizzle. Returns false if the driver refuses. The address and all rows must be multiples of 16
// bytes.
bool encode_tensor_map(CUtensorMap* map, const void* address, bool is_bf16, int64_t d0, int64_t d1,
                       int64_t d2, int64_t d3, int box_rows);

int multiprocessors();

}  // namespace lightning_fastmoe::hopper
