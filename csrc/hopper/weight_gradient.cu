// The gradients of both projections' weights: grouped GEMMs that gather the operand with a row per
// token.
#include <algorithm>

#include "grouped_gemm.cuh"
#include "ops.h"
#include "split_k_reduction.cuh"

namespace lightning_fastmoe::hopper {

Tensor weight_gradient(const Tensor& gathered, const Tensor& order, int64_t top_k,
                       const Tensor& rows, const Tensor& offsets, bool transposed) {
  const char* op = "hopper_weight_gradient";
  GroupedGemm gemm(op, gathered, "gathered");
  gemm.check_operand(rows, "rows", 2);
  gemm.set_gathered_groups(offsets, order, top_k);
  const int64_t count = order.size(0), m = gathered.size(1), n = rows.size(1);
  check_size(rows, op, "rows", 0, count);

  const DeviceGuard guard(gathered.get_device_index());
  const int experts = gemm.experts();
  Tensor out = transposed ? torch::stable::new_empty(gathered, {experts, n, m})
                          : torch::stable::new_empty(gathered, {experts, m, n});
  if (count == 0) return torch::stable::fill_(out, 0.0);
  const int64_t blocks = multiprocessors(), split_rows = rows_per_split(count, m, n, blocks);
  const int64_t splits = max_splits(count, split_rows);
  LastWave last_wave = split_last_wave(count, m, n, experts, blocks);
  Tensor workspace = torch::stable::new_empty(
      gathered, {std::max(splits * m * n, last_wave.workspace_floats())}, ScalarType::Float);
  last_wave.workspace = data_of<float>(workspace);
  for_half(gathered.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto params = gemm.make_params<WeightGradientParams<T>>();
    params.b_map = gemm.map(rows, contiguous_boxes(n, count, 1, 1, kTileK));
    params.m = static_cast<int>(m);
    params.n = static_cast<int>(n);
    params.split_rows = static_cast<int>(split_rows);
    params.out = data_of<T>(out);
    params.workspace = data_of<float>(workspace);
    params.last_wave = last_wave;
    const cudaStream_t stream = current_stream(gathered);
    const auto run = [&](auto kernel, auto reduce_last_wave) {
      gemm.launch(kernel, params);
      if (last_wave.tiles == 0) return;
      launch_dependent(reduce_last_wave, static_cast<unsigned>(last_wave.tiles * kClusterSize),
                       static_cast<unsigned>(kConsumers * kWarpgroup), 0, stream, params);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (transposed) {
      run(weight_gradient_kernel<T, true>, reduce_last_wave_kernel<T, true>);
    } else {
      run(weight_gradient_kernel<T, false>, reduce_last_wave_kernel<T, false>);
    }
    if (splits == 0) return;  // no expert can have that many rows
    launch_dependent(reduce_splits_kernel<T>, static_cast<unsigned>(2 * blocks), kBlock, 0, stream,
                     params.workspace, params.offsets, params.out, experts, params.split_rows,
                     m * n);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace lightning_fastmoe::hopper
