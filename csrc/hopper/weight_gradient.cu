// The gradients of both weights, with the tokens' side gathered inside the product.
#include <algorithm>

#include "checks.cuh"
#include "launch.cuh"
#include "ops.h"
#include "split_k_reduction.cuh"

namespace lightning_fastmoe::hopper {

Tensor weight_gradient(const Tensor& gathered, const Tensor& order, int64_t top_k,
                       const Tensor& rows, const Tensor& offsets, bool transposed) {
  const char* op = "hopper_weight_gradient";
  const Deadline deadline = deadline_for(op);
  check_matrix(gathered, op, "gathered", 2, gathered);
  check_matrix(rows, op, "rows", 2, gathered);
  const int experts = check_groups(offsets, &order, top_k, op, gathered);
  const int64_t count = order.size(0), m = gathered.size(1), n = rows.size(1);
  check_fits(count, op);
  check_gathered(gathered, op);
  check_size(rows, op, "rows", 0, count);

  const DeviceGuard guard(gathered.get_device_index());
  Tensor out = transposed ? torch::stable::new_empty(gathered, {experts, n, m})
                          : torch::stable::new_empty(gathered, {experts, m, n});
  if (count == 0) return torch::stable::fill_(out, 0.0);
  const int64_t blocks = multiprocessors(), chunk = rows_per_split(count, m, n, blocks);
  const int64_t parts = max_splits(count, chunk);
  LastWave tail = split_last_wave(count, m, n, experts, blocks);
  Tensor workspace = torch::stable::new_empty(
      gathered, {std::max(parts * m * n, tail.workspace_floats())}, ScalarType::Float);
  tail.workspace = static_cast<float*>(workspace.data_ptr());
  for_half(gathered.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    WeightGradientParams<T> job{};
    job.b_map = tensor_map(rows, op, contiguous_boxes(n, count, 1, 1, kTileK));
    job.gathered = static_cast<const T*>(gathered.data_ptr());
    job.order = static_cast<const int64_t*>(order.data_ptr());
    job.top_k = static_cast<int>(top_k);
    job.offsets = static_cast<const int32_t*>(offsets.data_ptr());
    job.experts = experts;
    job.m = static_cast<int>(m);
    job.n = static_cast<int>(n);
    job.split_rows = static_cast<int>(chunk);
    job.out = static_cast<T*>(out.data_ptr());
    job.workspace = static_cast<float*>(workspace.data_ptr());
    job.last_wave = tail;
    job.deadline = deadline;
    const cudaStream_t stream = current_stream(gathered);
    const auto run = [&](auto kernel, auto add_tail) {
      launch(kernel, job, stream);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (tail.tiles == 0) return;
      launch_early(add_tail, static_cast<unsigned>(tail.tiles * kClusterSize),
                   static_cast<unsigned>(kConsumers * kWarpgroup), 0, stream, job);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (transposed) {
      run(weight_gradient_kernel<T, true>, reduce_last_wave_kernel<T, true>);
    } else {
      run(weight_gradient_kernel<T, false>, reduce_last_wave_kernel<T, false>);
    }
    if (parts == 0) return;  // no expert can have that many rows
    launch_early(reduce_splits_kernel<T>, static_cast<unsigned>(2 * blocks), kBlock, 0, stream,
                 job.workspace, job.offsets, job.out, experts, job.split_rows, m * n);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace lightning_fastmoe::hopper
