// Rows of bytes, moved by warps in the largest words that their length and place allow.
#pragma once

#include <initializer_list>

#include "../common.cuh"

namespace lightning_fastmoe {

// Calls `launch(Word{})` with the largest unit that divides a row and at which all rows begin.
template <typename Launch>
void for_word(int64_t row_bytes, std::initializer_list<const void*> begins, Launch&& launch) {
  const auto fits = [&](int64_t bytes) {
    if (row_bytes % bytes != 0) return false;
    for (const void* begin : begins) {
      if (reinterpret_cast<uintptr_t>(begin) % bytes != 0) return false;
    }
    return true;
  };
  if (fits(sizeof(uint4))) {
    launch(uint4{});
  } else if (fits(sizeof(uint64_t))) {
    launch(uint64_t{});
  } else if (fits(sizeof(uint32_t))) {
    launch(uint32_t{});
  } else if (fits(sizeof(uint16_t))) {
    launch(uint16_t{});
  } else {
    launch(uint8_t{});
  }
}

// Copies a row of `width` words, by one warp.
template <typename Word>
__device__ __forceinline__ void copy_row(const unsigned char* source, unsigned char* target,
                                         int64_t width, int lane) {
  constexpr int kInFlight = 4;  // loads per thread
  const auto* from = reinterpret_cast<const Word*>(source);
  auto* to = reinterpret_cast<Word*>(target);
  for (int64_t w = lane; w < width; w += kInFlight * kWarpSize) {
    Word loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (w + k * kWarpSize < width) loaded[k] = from[w + k * kWarpSize];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (w + k * kWarpSize < width) to[w + k * kWarpSize] = loaded[k];
    }
  }
}

}  // namespace lightning_fastmoe
