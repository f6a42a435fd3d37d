// The whole layer as two operators, so that a step of many short kernels is not held up by the
// interpreter: what lightning_fastmoe/ops/layer.py does step by step, for the case where every
// grouped product is one kernel and there are no biases. The formulas are explained there.
#include <array>

#include "checks.h"
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
Tensor outer_product(const Tensor& a, const Tensor& b, const Tensor& tokens_per_expert,
                     const Tensor& offsets) {
  Tensor out = grouped_mm(transposed(a), b, offsets);
  zero_empty_experts_(out, tokens_per_expert);  // a product over no rows may leave what was there
  return out;
}

// Tokens in expert-major order, or `x` itself if its rows came so.
Tensor rows_of(const Tensor& x, const std::optional<Tensor>& inverse, int64_t top_k) {
  return inverse ? permute_rows(x, *inverse, top_k) : x;
}

int64_t slots(const std::optional<Tensor>& weights) { return weights ? weights->size(1) : 1; }

}  // namespace

std::tuple<Tensor, Tensor> expert_layer(const Tensor& x, const std::optional<Tensor>& weights,
                                        const Tensor& up, const Tensor& down,
                                        const std::optional<Tensor>& inverse, const Tensor& offsets,
                                        std::string name) {
  const char* op = "expert_layer";
  check_tensor(x, op, "x", 2, x);
  STD_TORCH_CHECK(weights.has_value() == inverse.has_value(), op,
                  ": weights and inverse come together or not at all");
  const int64_t top_k = slots(weights);
  const Tensor h = grouped_mm(rows_of(x, inverse, top_k), transposed(up), offsets);
  Tensor y = grouped_mm(activation(h, std::nullopt, std::nullopt, name), transposed(down), offsets);
  if (inverse) y = sum_rows(y, *inverse, weights, top_k, std::nullopt, std::nullopt);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_layer_backward_(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weights, const Tensor& up,
    const Tensor& down, const std::optional<Tensor>& order, const std::optional<Tensor>& inverse,
    const Tensor& tokens_per_expert, const Tensor& offsets, std::string name, bool wants_x,
    bool wants_up, bool wants_down) {
  const char* op = "expert_layer_backward_";
  check_tensor(grad, op, "grad", 2, x);
  STD_TORCH_CHECK(order.has_value() == inverse.has_value(), op,
                  ": order and inverse come together or not at all");
  const int64_t top_k = inverse ? weights.size(1) : 1;
  Tensor d_x, d_up, d_down;
  Tensor d_weights;
  {
    const Tensor d_out = rows_of(grad, inverse, top_k);
    const Tensor d_act = grouped_mm(d_out, down, offsets);
    d_weights =
        activation_backward_(h, d_act, weights, order, std::nullopt, std::nullopt, std::move(name));
    // d_act holds the weighted activation by now.
    if (wants_down) d_down = outer_product(d_out, d_act, tokens_per_expert, offsets);
  }
  // h holds its gradient by now.
  if (wants_up) d_up = outer_product(h, rows_of(x, inverse, top_k), tokens_per_expert, offsets);
  if (wants_x) {
    d_x = grouped_mm(h, up, offsets);
    if (inverse) d_x = sum_rows(d_x, *inverse, std::nullopt, top_k, std::nullopt, std::nullopt);
  }
  const auto or_nothing = [&](bool wanted, Tensor& result) {
    if (!wanted) result = torch::stable::new_empty(x, {0});
  };
  or_nothing(wants_x, d_x);
  or_nothing(wants_up, d_up);
  or_nothing(wants_down, d_down);
  return {d_x, d_weights, d_up, d_down};
}

}  // namespace lightning_fastmoe
