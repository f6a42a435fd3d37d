// Host code that all operators share: checks with readable messages, the current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

namespace lightning_fastmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int kVectorBytes = 16;

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

// A bias per expert for rows in expert-major order, as kernel arguments. All null without a bias.
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

}  // namespace lightning_fastmoe
