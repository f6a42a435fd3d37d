// The gradient through the down projection and the activation: a grouped GEMM that gathers rows of
// the output's gradient. Its result, dA', never leaves the accumulators.
#include "epilogues.cuh"
#include "grouped_gemm.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {
namespace {

// d_weights[order[row]] = the sum of the row's partial dots, in the order of the N tiles. (Pointers
// are not __restrict__: the compiler could hoist loads through them above the wait.)
__global__ void __launch_bounds__(kBlock)
    reduce_dots_kernel(const float* dots, const int64_t* order, float* d_weights, int64_t rows,
                       int n_tiles) {
  grid_dependency_wait();
  launch_dependent_grids();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int n = 0; n < n_tiles; ++n) sum += dots[n * rows + row];
  d_weights[order[row]] = sum;
}

}  // namespace

// d_h, like h, may be h itself.
std::tuple<Tensor, Tensor> backward_activation(const Tensor& grad, const Tensor& order,
                                               const Tensor& offsets, const Tensor& down,
                                               const Tensor& h, const Tensor& d_h,
                                               const Tensor& weights, std::string activation) {
  const char* op = "hopper_backward_activation_";
  GroupedGemm gemm(op, grad, "grad");
  STD_TORCH_CHECK(weights.dim() == 1 || weights.dim() == 2, op,
                  ": weights must have 1 or 2 dimensions, not ", weights.dim());
  check_tensor(weights, op, "weights", weights.dim(), grad);
  check_dtype(weights, op, "weights", ScalarType::Float);
  check_size(weights, op, "weights", 0, grad.size(0));
  gemm.set_gathered_groups(offsets, order, weights.dim() == 2 ? weights.size(1) : 1);
  gemm.check_operand(down, "down", 3);
  gemm.check_operand(h, "h", 2);
  const int64_t rows = order.size(0), d_model = grad.size(1), width = down.size(2);
  check_size(down, op, "down", 0, gemm.experts());
  check_size(down, op, "down", 1, d_model);
  check_size(h, op, "h", 0, rows);
  gemm.check_operand(d_h, "d_h", 2);
  check_size(d_h, op, "d_h", 0, rows);
  check_size(d_h, op, "d_h", 1, h.size(1));

  const DeviceGuard guard(grad.get_device_index());
  const int n_tiles = static_cast<int>(ceil_div(width, kTileN));
  Tensor weighted = torch::stable::new_empty(h, {rows, width});
  Tensor d_weights = torch::stable::empty_like(weights);
  Tensor dots = torch::stable::new_empty(weights, {n_tiles, rows});
  for_activation(activation, op, [&](auto kind) {
    using K = decltype(kind);
    check_size(h, op, "h", 1, K::kGated ? 2 * width : width);
    if (rows == 0) return;
    for_half(grad.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using Epilogue = BackwardActivation<T, typename K::Act, K::kGated>;
      auto params = gemm.make_ragged_rows_params<RaggedRowsParams<T, Epilogue>>();
      gemm.set_mn_major_b(params, down);
      params.n_tiles = n_tiles;
      params.stagger_cycles = stagger_cycles(rows, d_model, width);
      params.h_map = gemm.map(h, contiguous_boxes(h.size(1), rows, 1, 1, kTileM));
      params.epilogue = {data_of<T>(d_h), data_of<T>(weighted), data_of<const float>(weights),
                         params.order,  data_of<float>(dots), static_cast<int>(width),
                         rows};
      gemm.launch(ragged_rows_kernel<T, Epilogue, true, Major::kMN>, params);
    });
    launch_dependent(reduce_dots_kernel, grid_size(ceil_div(rows, kBlock), op), kBlock, 0,
                     current_stream(grad), data_of<const float>(dots),
                     data_of<const int64_t>(order), data_of<float>(d_weights), rows, n_tiles);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {weighted, d_weights};
}

std::tuple<Tensor, Tensor> backward_activation_(const Tensor& grad, const Tensor& order,
                                                const Tensor& offsets, const Tensor& down,
                                                const Tensor& h, const Tensor& weights,
                                                std::string activation) {
  return backward_activation(grad, order, offsets, down, h, h, weights, activation);
}

}  // namespace lightning_fastmoe::hopper
