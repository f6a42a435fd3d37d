// The operators of this folder, as ../schemas.cpp registers them (with "hopper_" before their
// names).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace lightning_fastmoe::hopper {

using torch::stable::Tensor;

// available.cu
bool available(int64_t device);
// 0, 1, ... rows - 1: the `order` of rows that are in expert order already, with a top_k of 1.
Tensor row_numbers(const Tensor& like, int64_t rows);

// up_forward.cu
std::tuple<Tensor, Tensor> up_forward(const Tensor& x, const Tensor& order, int64_t top_k,
                                      const Tensor& offsets, const Tensor& up,
                                      const std::optional<Tensor>& bias, std::string activation,
                                      bool keep_h);

// backward_activation.cu
std::tuple<Tensor, Tensor> backward_activation(const Tensor& grad, const Tensor& order,
                                               const Tensor& offsets, const Tensor& down,
                                               const Tensor& h, const Tensor& d_h,
                                               const Tensor& weights, std::string activation);
std::tuple<Tensor, Tensor> backward_activation_(const Tensor& grad, const Tensor& order,
                                                const Tensor& offsets, const Tensor& down,
                                                const Tensor& h, const Tensor& weights,
                                                std::string activation);

// rows_product.cu
Tensor rows_product(const Tensor& rows, const Tensor& offsets, const Tensor& weight,
                    bool transposed, const std::optional<Tensor>& order,
                    const std::optional<Tensor>& weights);

// weight_gradient.cu
Tensor weight_gradient(const Tensor& gathered, const Tensor& order, int64_t top_k,
                       const Tensor& rows, const Tensor& offsets, bool transposed);

// sum_rows.cu
// Computes ../ops.h's sum_rows without a bias into out (T, D), whose arguments have been checked,
// or returns false where it is not the faster way.
bool bulk_sum_rows(const Tensor& rows, const Tensor& inverse, const std::optional<Tensor>& weights,
                   int64_t top_k, const Tensor& out);

// router_product.cu
Tensor bf16_parts(const Tensor& x, int64_t parts);
Tensor router_logits(const Tensor& x, const Tensor& weight);
Tensor router_weight_gradient(const Tensor& x, const Tensor& gradient, int64_t parts,
                              int64_t experts, bool in_bf16);

}  // namespace lightning_fastmoe::hopper
