// Device code that all operators share: 16-byte vectors, warp reductions, launches by dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "checks.h"

namespace lightning_fastmoe {

constexpr int kWarpSize = 32;
constexpr int kBlock = 256;
constexpr int kWarpsPerBlock = kBlock / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffffu;

// --------------------------------------------------------------------------------------- launches

// A block of about kBlock threads for rows of `width` elements or vectors: x runs along a row, y
// over rows. Short rows share a block, so no thread has to divide to find its row.
inline dim3 row_block(int64_t width) {
  const unsigned x = width >= kBlock ? kBlock : static_cast<unsigned>(width > 0 ? width : 1);
  return dim3(x, kBlock / x);
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls `function(TypeTag<T>{})` with the C++ type of a tensor's elements.
template <typename Function>
void for_floating(ScalarType dtype, const char* op, Function&& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(TypeTag<float>{});
    case ScalarType::Half:
      return function(TypeTag<__half>{});
    case ScalarType::BFloat16:
      return function(TypeTag<__nv_bfloat16>{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float32, float16 or bfloat16, not ",
                      torch::headeronly::toString(dtype));
  }
}

// Calls `function` with the smallest number of values per lane, a constant, with which a warp covers
// `count` experts, at most 1024.
template <typename Function>
void for_values_per_lane(int64_t count, Function&& function) {
  if (count <= 32) return function(std::integral_constant<int, 1>{});
  if (count <= 64) return function(std::integral_constant<int, 2>{});
  if (count <= 128) return function(std::integral_constant<int, 4>{});
  if (count <= 256) return function(std::integral_constant<int, 8>{});
  if (count <= 512) return function(std::integral_constant<int, 16>{});
  return function(std::integral_constant<int, 32>{});
}

// --------------------------------------------------------------------------------------- vectors

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements of T, as in memory. N is 1, or fills exactly 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(N == 1 || sizeof(T) * N == kVectorBytes);
  T element[N];
};

// Elements of one 16-byte vector.
template <typename T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* pointer) {
  Vector<T, N> vector;
  if constexpr (N == 1) {
    vector.element[0] = *pointer;
  } else {
    // Through uint4, because member-wise copies of half types are not always merged.
    const uint4 raw = *reinterpret_cast<const uint4*>(pointer);
    memcpy(&vector, &raw, sizeof(raw));
  }
  return vector;
}

// What nobody reads again, so that it takes no place in the L1 cache.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_once(const T* pointer) {
  if constexpr (N == 1) {
    return load<T, N>(pointer);
  } else {
    uint4 raw;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "l"(pointer));
    Vector<T, N> vector;
    memcpy(&vector, &raw, sizeof(raw));
    return vector;
  }
}

template <typename T, int N>
__device__ __forceinline__ void store(T* pointer, const Vector<T, N>& vector) {
  if constexpr (N == 1) {
    *pointer = vector.element[0];
  } else {
    uint4 raw;
    memcpy(&raw, &vector, sizeof(raw));
    *reinterpret_cast<uint4*>(pointer) = raw;
  }
}

// The expert of an expert-major row: the first one whose offset is beyond the row.
__device__ __forceinline__ int64_t expert_of(const int* offsets, int num_experts, int64_t row) {
  int low = 0, high = num_experts - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (offsets[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// ----------------------------------------------------------------------------------------- warps

// Butterfly reductions: identical bits in every lane, in a fixed order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, value);
#else
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
#endif
}

__device__ __forceinline__ unsigned warp_min(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(kAllLanes, value);
#else
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = min(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
#endif
}

// Sum over the lanes up to and including this one.
__device__ __forceinline__ int warp_inclusive_scan(int value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

}  // namespace lightning_fastmoe
