// Rows in expert order times their expert's matrix: the down projection, and the gradient of the
// rows that went into the up projection.
#include "checks.cuh"
#include "epilogues.cuh"
#include "launch.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {

Tensor rows_product(const Tensor& rows, const Tensor& offsets, const Tensor& weight,
                    bool transposed, const std::optional<Tensor>& order,
                    const std::optional<Tensor>& weights) {
  const char* op = "hopper_rows_product";
  const Deadline deadline = deadline_for(op);
  check_matrix(rows, op, "rows", 2, rows);
  check_matrix(weight, op, "weight", 3, rows);
  const int experts = check_groups(offsets, order ? &*order : nullptr, 1, op, rows);
  const int64_t n = rows.size(0), k = rows.size(1), width = weight.size(transposed ? 1 : 2);
  check_fits(n, op);
  check_size(weight, op, "weight", 0, experts);
  check_size(weight, op, "weight", transposed ? 2 : 1, k);
  STD_TORCH_CHECK(width % 8 == 0, op, ": the result must have a multiple of 8 columns, not ",
                  width);
  if (weights) {
    STD_TORCH_CHECK(order.has_value(), op,
                    ": weights are those of order's places, so both or none");
    check_tensor(*weights, op, "weights", 2, rows);
    check_dtype(*weights, op, "weights", ScalarType::Float);
    check_size(*weights, op, "weights", 0, n);
    check_size(*weights, op, "weights", 1, 1);
  }

  const DeviceGuard guard(rows.get_device_index());
  Tensor out = torch::stable::new_empty(rows, {n, width});
  if (n == 0) return out;
  for_half(rows.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Epilogue = StoreRows<T>;
    RaggedRowsParams<T, Epilogue> job{};
    job.a_map = tensor_map(rows, op, contiguous_boxes(k, n, 1, 1, kConsumerM));
    job.ordered = transposed && width % kOrderedRows == 0;
    job.b_map = tensor_map(weight, op,
                           job.ordered  ? ordered_boxes(k, experts * width)
                           : transposed ? contiguous_boxes(k, width, 1, experts, 128)
                                        : contiguous_boxes(width, k, 1, experts, 64));
    job.offsets = static_cast<const int32_t*>(offsets.data_ptr());
    job.experts = experts;
    job.deadline = deadline;
    job.k = static_cast<int>(k);
    job.n_tiles = static_cast<int>(ceil_div(width, kTileN));
    job.epilogue = {static_cast<T*>(out.data_ptr()),
                    order ? static_cast<const int64_t*>(order->data_ptr()) : nullptr,
                    weights ? static_cast<const float*>(weights->data_ptr()) : nullptr,
                    static_cast<int>(width)};
    if (transposed) {
      launch(ragged_rows_kernel<T, Epilogue, false, Major::kK>, job, current_stream(rows));
    } else {
      launch(ragged_rows_kernel<T, Epilogue, false, Major::kMN>, job, current_stream(rows));
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace lightning_fastmoe::hopper
