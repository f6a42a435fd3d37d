// Checks of the tensor arguments of this folder's operators.
#pragma once

#include "../common.cuh"
#include "pipeline.cuh"
#include "tensor_map.h"

namespace lightning_fastmoe::hopper {

inline void check_matrix(const Tensor& tensor, const char* op, const char* name, int64_t dim,
                         const Tensor& like) {
  check_tensor(tensor, op, name, dim, like);
  check_dtype(tensor, op, name, like.scalar_type());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0, op, ": ",
                  name, " must start at a multiple of 16 bytes");
  STD_TORCH_CHECK(tensor.size(dim - 1) % 8 == 0, op, ": the rows of ", name,
                  " must have a multiple of 8 elements, not ", tensor.size(dim - 1));
}

// offsets (E,) int32, and order (N,) int64 where there is one: not more rows than pairs, as some
// pairs may have no row. Returns the number of experts.
inline int check_groups(const Tensor& offsets, const Tensor* order, int64_t top_k, const char* op,
                        const Tensor& like) {
  check_tensor(offsets, op, "offsets", 1, like);
  check_dtype(offsets, op, "offsets", ScalarType::Int);
  STD_TORCH_CHECK(offsets.size(0) >= 1 && offsets.size(0) <= kMaxExperts, op, ": between 1 and ",
                  kMaxExperts, " experts, not ", offsets.size(0));
  if (order != nullptr) {
    check_tensor(*order, op, "order", 1, like);
    check_dtype(*order, op, "order", ScalarType::Long);
    STD_TORCH_CHECK(top_k >= 1, op, ": top_k must be at least 1, not ", top_k);
    STD_TORCH_CHECK(order->size(0) <= like.size(0) * top_k, op, ": order must have at most size ",
                    like.size(0) * top_k, ", not ", order->size(0));
  }
  return static_cast<int>(offsets.size(0));
}

inline void check_fits(int64_t rows, const char* op) {
  STD_TORCH_CHECK(rows < (int64_t{1} << 31) - kTileM * kClusterSize, op, ": too many rows, ", rows);
}

// Gathered rows are addressed by 32-bit counts of 16-byte vectors.
inline void check_gathered(const Tensor& tensor, const char* op) {
  STD_TORCH_CHECK(tensor.numel() / 8 < (int64_t{1} << 32) - 1, op, ": too many tokens, ",
                  tensor.size(0), " of width ", tensor.size(1));
}

inline CUtensorMap tensor_map(const Tensor& tensor, const char* op, const Boxes& boxes) {
  CUtensorMap map;
  const auto& n = boxes.sizes;
  STD_TORCH_CHECK(encode_tensor_map(&map, tensor.data_ptr(),
                                    tensor.scalar_type() == ScalarType::BFloat16, boxes),
                  op, ": the driver refuses the tensor map of a tensor (", n[0], " x ", n[1], " x ",
                  n[2], " x ", n[3], " x ", n[4], ")");
  return map;
}

// Calls `function(TypeTag<T>{})` for the half-precision types supported here.
template <typename Function>
void for_half(ScalarType dtype, const char* op, Function&& function) {
  switch (dtype) {
    case ScalarType::Half:
      return function(TypeTag<__half>{});
    case ScalarType::BFloat16:
      return function(TypeTag<__nv_bfloat16>{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be float16 or bfloat16, not ",
                      torch::headeronly::toString(dtype));
  }
}

}  // namespace lightning_fastmoe::hopper
