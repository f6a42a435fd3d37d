// What every operator shares: checks with readable messages, 16-byte vectors, warp reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>

namespace lightning_fastmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int kWarpSize = 32;
constexpr int kBlock = 256;
constexpr int kWarpsPerBlock = kBlock / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;

// ---------------------------------------------------------------------------------------- checks

inline void check_tensor(const Tensor& tensor, const char* op, const char* name, int64_t dim,
                         const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), op,
                  ": ", name, " must be on the CUDA device of the first argument (device ",
                  like.get_device_index(), ")");
  STD_TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, not ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_dtype(const Tensor& tensor, const char* op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), ", not ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_size(const Tensor& tensor, const char* op, const char* name, int64_t dim,
                       int64_t size) {
  STD_TORCH_CHECK(tensor.size(dim) == size, op, ": ", name, " must have size ", size,
                  " in dimension ", dim, ", not ", tensor.size(dim));
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_size(int64_t blocks, const char* op) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), op,
                  ": too many rows for one launch (", blocks, " blocks)");
  return static_cast<unsigned>(blocks);
}

// A bias per expert for rows in expert-major order, as kernels take it. All null without one.
struct RowBias {
  const void* bias = nullptr;    // (E, width)
  const int* offsets = nullptr;  // (E,), the row at which each expert ends
  int num_experts = 0;
};

inline RowBias check_row_bias(const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& offsets, const char* op, int64_t width,
                              const Tensor& like) {
  if (!bias) return {};
  STD_TORCH_CHECK(offsets.has_value(), op, ": a bias needs offsets, to find each row's expert");
  check_tensor(*bias, op, "bias", 2, like);
  check_dtype(*bias, op, "bias", like.scalar_type());
  check_size(*bias, op, "bias", 1, width);
  check_tensor(*offsets, op, "offsets", 1, like);
  check_dtype(*offsets, op, "offsets", ScalarType::Int);
  check_size(*offsets, op, "offsets", 0, bias->size(0));
  return {bias->data_ptr(), static_cast<const int*>(offsets->data_ptr()),
          static_cast<int>(bias->size(0))};
}

// Whether rows of `row_bytes` bytes that start at these addresses split into 16-byte vectors.
inline bool takes_vectors(int64_t row_bytes, std::initializer_list<const void*> pointers) {
  if (row_bytes % kVectorBytes != 0) return false;
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % kVectorBytes != 0) return false;
  }
  return true;
}

// A block of about kBlock threads for rows of `units` units each: x runs along a row, y over rows.
// Short rows share a block, so no thread has to divide to find its place.
inline dim3 row_block(int64_t units) {
  const unsigned x = units >= kBlock ? kBlock : static_cast<unsigned>(units > 0 ? units : 1);
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

// N elements of T, as they lie in memory. N is 1, or fills exactly 16 bytes.
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

// The expert of an expert-major row: the first whose offset is beyond it.
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

// Butterflies leave the same bits in every lane, in an order that never changes.
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

// Sum over the lanes below and including this one.
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
