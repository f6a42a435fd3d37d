// The whole layer as two operators, so that launching many short kernels is not limited by the
// Python interpreter: the steps of lightning_fastmoe/ops/steps.py, if every grouped GEMM is one
// kernel and there are no biases. The formulas are explained there.
//
// With `hopper`, the grouped GEMMs are those of hopper/, with fused gathers and activations;
// otherwise they are F.grouped_mm, with separate kernels in between.
#include <array>

#include "checks.h"
#include "hopper/ops.h"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

// F.grouped_mm: rows of `a` up to each offset times the expert's matrix of `b`, or, for a
// two-dimensional `b`, columns of `a` times rows of `b` between offsets.
Tensor grouped_mm(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  std::array<StableIValue, 5> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(std::optional<Tensor>(offsets)),
                                    torch::stable::detail::from(std::nullopt),
                                    torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor transposed(const Tensor& matrix) {
  const int64_t last = matrix.dim() - 1;
  return torch::stable::transpose(matrix, last - 1, last);
}

// Gradient of stacked weights: a^T b over the rows of each expert.
Tensor weight_gradient(const Tensor& a, const Tensor& b, const Tensor& tokens_per_expert,
                       const Tensor& offsets) {
  Tensor out = grouped_mm(transposed(a), b, offsets);
  zero_empty_experts_(out, tokens_per_expert);  // a GEMM over zero rows may not write it
  return out;
}

// Tokens in expert-major order, or `x` itself if its rows already are.
Tensor rows_of(const Tensor& x, const std::optional<Tensor>& inverse, int64_t top_k) {
  return inverse ? permute_rows(x, *inverse, top_k) : x;
}

// The (token, slot) pair of each row, for GEMMs that gather.
Tensor pairs_of(const Tensor& x, const std::optional<Tensor>& order) {
  return order ? *order : hopper::row_numbers(x, x.size(0));
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// With one expert per token, the GEMM's epilogue itself can store rows in the tokens' order, if all
// tokens have a row.
std::optional<Tensor> token_order(const std::optional<Tensor>& order,
                                  const std::optional<Tensor>& inverse, int64_t top_k,
                                  bool hopper) {
  const bool moves = hopper && order && inverse && top_k == 1;
  return moves && order->size(0) == inverse->size(0) ? order : std::nullopt;
}

}  // namespace

std::tuple<Tensor, Tensor> expert_layer(const Tensor& x, const std::optional<Tensor>& weights,
                                        const Tensor& up, const Tensor& down,
                                        const std::optional<Tensor>& order,
                                        const std::optional<Tensor>& inverse, const Tensor& offsets,
                                        std::string name, bool keep_h, bool hopper) {
  const char* op = "expert_layer";
  check_tensor(x, op, "x", 2, x);
  STD_TORCH_CHECK(weights.has_value() == inverse.has_value(), op,
                  ": weights and inverse come together or not at all");
  const int64_t top_k = weights ? weights->size(1) : 1;
  const auto out_order = token_order(order, inverse, top_k, hopper);
  Tensor h, a, y;
  if (hopper) {
    const Tensor pairs = pairs_of(x, order);
    std::tie(h, a) = hopper::up_forward(x, pairs, top_k, offsets, up, std::nullopt, name, keep_h);
    y = hopper::rows_product(a, offsets, down, true, out_order, out_order ? weights : std::nullopt);
  } else {
    h = grouped_mm(rows_of(x, inverse, top_k), transposed(up), offsets);
    a = activation(h, std::nullopt, std::nullopt, name);
    if (!keep_h) h = nothing(x);
    y = grouped_mm(a, transposed(down), offsets);
  }
  a = nothing(x);
  if (inverse && !out_order) {
    y = sum_rows(y, *inverse, weights, top_k, std::nullopt, std::nullopt);
  }
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_layer_backward_(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weights, const Tensor& up,
    const Tensor& down, const std::optional<Tensor>& order, const std::optional<Tensor>& inverse,
    const Tensor& tokens_per_expert, const Tensor& offsets, std::string name, bool wants_x,
    bool wants_up, bool wants_down, bool hopper, bool keep_h) {
  const char* op = "expert_layer_backward_";
  check_tensor(grad, op, "grad", 2, x);
  STD_TORCH_CHECK(weights.dim() == 2, op, ": weights must have 2 dimensions, not ", weights.dim());
  const int64_t top_k = weights.size(1);
  Tensor d_x = nothing(x), d_up = nothing(x), d_down = nothing(x), d_weights;
  const Tensor pairs = hopper ? pairs_of(x, order) : d_x;
  Tensor d_h = h;
  if (hopper) {
    if (keep_h) d_h = torch::stable::empty_like(h);
    Tensor weighted_act;
    std::tie(weighted_act, d_weights) =
        hopper::backward_activation(grad, pairs, offsets, down, h, d_h, weights, name);
    if (wants_down) {
      d_down = hopper::weight_gradient(grad, pairs, top_k, weighted_act, offsets, false);
    }
  } else {
    const Tensor d_out = rows_of(grad, inverse, top_k);
    const Tensor weighted_act = grouped_mm(d_out, down, offsets);
    if (keep_h) d_h = torch::stable::clone(h);
    d_weights =
        activation_backward_(d_h, weighted_act, weights, order, std::nullopt, std::nullopt, name);
    if (wants_down) d_down = weight_gradient(d_out, weighted_act, tokens_per_expert, offsets);
  }
  // The gradient of x is computed first, because its N rows of D are
  // freed before the gradient of up is allocated.
  if (wants_x) {
    const auto out_order = token_order(order, inverse, top_k, hopper);
    d_x = hopper ? hopper::rows_product(d_h, offsets, up, false, out_order, std::nullopt)
                 : grouped_mm(d_h, up, offsets);
    if (inverse && !out_order) {
      d_x = sum_rows(d_x, *inverse, std::nullopt, top_k, std::nullopt, std::nullopt);
    }
  }
  if (wants_up && hopper) {
    d_up = hopper::weight_gradient(x, pairs, top_k, d_h, offsets, true);
  } else if (wants_up) {
    d_up = weight_gradient(d_h, rows_of(x, inverse, top_k), tokens_per_expert, offsets);
  }
  return {d_x, d_weights, d_up, d_down};
}

}  // namespace lightning_fastmoe
