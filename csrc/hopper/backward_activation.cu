// The gradient through the down projection and the activation, in one kernel: dA' of gathered
// output gradients stays in registers.
#include "checks.cuh"
#include "epilogues.cuh"
#include "launch.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {
namespace {

// d_weights[order[row]] = the sum of the row's shares, in the order of the column tiles. (Pointers
// are not __restrict__: the compiler may read such ones before the wait.)
__global__ void __launch_bounds__(kBlock)
    reduce_dots_kernel(const float* dots, const int64_t* order, float* d_weights, int64_t rows,
                       int columns) {
  grid_dependency_wait();
  launch_dependent_grids();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int n = 0; n < columns; ++n) sum += dots[n * rows + row];
  d_weights[order[row]] = sum;
}

}  // namespace

std::tuple<Tensor, Tensor> backward_activation_(const Tensor& grad, const Tensor& order,
                                                const Tensor& offsets, const Tensor& down,
                                                const Tensor& h, const Tensor& weights,
                                                std::string activation) {
  const char* op = "hopper_backward_activation_";
  const Deadline deadline = deadline_for(op);
  check_matrix(grad, op, "grad", 2, grad);
  STD_TORCH_CHECK(weights.dim() == 1 || weights.dim() == 2, op,
                  ": weights must have 1 or 2 dimensions, not ", weights.dim());
  check_tensor(weights, op, "weights", weights.dim(), grad);
  check_dtype(weights, op, "weights", ScalarType::Float);
  check_size(weights, op, "weights", 0, grad.size(0));
  const int64_t top_k = weights.dim() == 2 ? weights.size(1) : 1;
  const int experts = check_groups(offsets, &order, top_k, op, grad);
  check_matrix(down, op, "down", 3, grad);
  check_matrix(h, op, "h", 2, grad);
  const int64_t rows = order.size(0), d_model = grad.size(1), width = down.size(2);
  check_fits(rows, op);
  check_gathered(grad, op);
  check_size(down, op, "down", 0, experts);
  check_size(down, op, "down", 1, d_model);
  check_size(h, op, "h", 0, rows);

  const DeviceGuard guard(grad.get_device_index());
  const int columns = static_cast<int>(ceil_div(width, kTileN));
  Tensor weighted = torch::stable::new_empty(h, {rows, width});
  Tensor d_weights = torch::stable::empty_like(weights);
  Tensor dots = torch::stable::new_empty(weights, {columns, rows});
  for_activation(activation, op, [&](auto kind) {
    using K = decltype(kind);
    check_size(h, op, "h", 1, K::kGated ? 2 * width : width);
    if (rows == 0) return;
    for_half(grad.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using Epilogue = BackwardActivation<T, typename K::Act, K::kGated>;
      RaggedRowsParams<T, Epilogue> job{};
      job.b_map = tensor_map(down, op, contiguous_boxes(width, d_model, 1, experts, 64));
      job.gathered = static_cast<const T*>(grad.data_ptr());
      job.order = static_cast<const int64_t*>(order.data_ptr());
      job.top_k = static_cast<int>(top_k);
      job.offsets = static_cast<const int32_t*>(offsets.data_ptr());
      job.experts = experts;
      job.deadline = deadline;
      job.k = static_cast<int>(d_model);
      job.n_tiles = columns;
      job.stagger_cycles = stagger_cycles(rows, d_model, width);
      job.h_map = tensor_map(h, op, contiguous_boxes(h.size(1), rows, 1, 1, kTileM));
      job.epilogue = {static_cast<T*>(h.data_ptr()),
                      static_cast<T*>(weighted.data_ptr()),
                      static_cast<const float*>(weights.data_ptr()),
                      job.order,
                      static_cast<float*>(dots.data_ptr()),
                      static_cast<int>(width),
                      rows};
      launch(ragged_rows_kernel<T, Epilogue, true, Major::kMN>, job, current_stream(grad));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    launch_early(reduce_dots_kernel, grid_size(ceil_div(rows, kBlock), op), kBlock, 0,
                 current_stream(grad), static_cast<const float*>(dots.data_ptr()),
                 static_cast<const int64_t*>(order.data_ptr()),
                 static_cast<float*>(d_weights.data_ptr()), rows, columns);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {weighted, d_weights};
}

}  // namespace lightning_fastmoe::hopper
