// A grouped GEMM of rows in expert order with their experts' weights: the down projection, and the
// gradient of the up projection's input rows.
#include "epilogues.cuh"
#include "grouped_gemm.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {

Tensor rows_product(const Tensor& rows, const Tensor& offsets, const Tensor& weight,
                    bool transposed, const std::optional<Tensor>& order,
                    const std::optional<Tensor>& weights) {
  const char* op = "hopper_rows_product";
  GroupedGemm gemm(op, rows, "rows");
  gemm.check_operand(weight, "weight", 3);
  gemm.set_groups(offsets, order);
  const int64_t n = rows.size(0), k = rows.size(1), width = weight.size(transposed ? 1 : 2);
  check_size(weight, op, "weight", 0, gemm.experts());
  check_size(weight, op, "weight", transposed ? 2 : 1, k);
  STD_TORCH_CHECK(width % 8 == 0, op, ": the result must have a multiple of 8 columns, not ",
                  width);
  if (weights) {
    STD_TORCH_CHECK(order.has_value(), op,
                    ": weights belong to the rows that order names, so pass both or none");
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
    auto params = gemm.make_ragged_rows_params<RaggedRowsParams<T, Epilogue>>();
    params.n_tiles = static_cast<int>(ceil_div(width, kTileN));
    params.epilogue = {data_of<T>(out), data_or_null<const int64_t>(order),
                       data_or_null<const float>(weights), static_cast<int>(width)};
    if (transposed) {
      gemm.set_k_major_b(params, weight, width, 1);
      gemm.launch(ragged_rows_kernel<T, Epilogue, false, Major::kK>, params);
    } else {
      gemm.set_mn_major_b(params, weight);
      gemm.launch(ragged_rows_kernel<T, Epilogue, false, Major::kMN>, params);
    }
  });
  return out;
}

}  // namespace lightning_fastmoe::hopper
