// From the accumulators' layout in registers to rows in memory.
//
// Four lanes of a warp (a quad) hold a row of D two columns at a time. After an exchange within the
// quad each lane has eight consecutive columns, 16 bytes, and the quad 64 contiguous bytes. If B's
// columns were reordered for this before the MMAs (see tensor_map.h), no exchange is needed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "ptx.cuh"
#include "wgmma.cuh"

namespace lightning_fastmoe::hopper {

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof(bits));
  return __half22float2(pair);
}

// Transposes the 4 x 4 words that a quad holds: word i of lane q becomes word q of lane i.
template <typename Word>
__device__ __forceinline__ void transpose_in_quad(Word& w0, Word& w1, Word& w2, Word& w3) {
  const int lane = threadIdx.x;
  const bool odd = lane & 1, high = lane & 2;
  Word x = odd ? w0 : w1, y = odd ? w2 : w3;
  x = __shfl_xor_sync(0xffffffffu, x, 1);
  y = __shfl_xor_sync(0xffffffffu, y, 1);
  if (odd) {
    w0 = x;
    w2 = y;
  } else {
    w1 = x;
    w3 = y;
  }
  x = high ? w0 : w2;
  y = high ? w1 : w3;
  x = __shfl_xor_sync(0xffffffffu, x, 2);
  y = __shfl_xor_sync(0xffffffffu, y, 2);
  if (high) {
    w0 = x;
    w1 = y;
  } else {
    w2 = x;
    w3 = y;
  }
}

// Columns 32 * group + 8 * (lane % 4) ... + 7 of row `half` (0: the lower, 1: the upper) of D.
template <typename T, bool kOrdered = false>
__device__ __forceinline__ uint4 eight_columns(const float* d, int group, int half) {
  const float* first = d + 16 * group + 2 * half;
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = pack<T>(first[4 * i], first[4 * i + 1]);
  if constexpr (!kOrdered) transpose_in_quad(w[0], w[1], w[2], w[3]);
  return {w[0], w[1], w[2], w[3]};
}

constexpr int kWarpRows = 16;  // of D in a warp
constexpr int kSubtileN = 64;  // columns of D that an epilogue passes through shared memory at once

// Rounds 64 columns of a warp's 16 rows of D to T and writes them to shared memory at `to`
// transposed, as 64 rows of 16 columns that start at 16-byte vector `vector` of each row.
template <typename T>
__device__ __forceinline__ void write_transposed(uint32_t to, const float* d, int vector) {
  const int matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
#pragma unroll
  for (int j = 0; j < kSubtileN / 8; j += 2) {
    // 8 x 8 matrices: the lower and the upper eight rows, then the same of the next eight columns.
    const float* p = d + 4 * j;
    stmatrix_x4_trans(to + swizzled(8 * (j + matrix / 2) + r, vector + matrix % 2),
                      pack<T>(p[0], p[1]), pack<T>(p[2], p[3]), pack<T>(p[4], p[5]),
                      pack<T>(p[6], p[7]));
  }
}

}  // namespace lightning_fastmoe::hopper
