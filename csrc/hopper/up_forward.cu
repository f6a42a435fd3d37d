// The up projection: a grouped GEMM that gathers rows of x, with the activation in its epilogue.
#include "epilogues.cuh"
#include "grouped_gemm.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {

std::tuple<Tensor, Tensor> up_forward(const Tensor& x, const Tensor& order, int64_t top_k,
                                      const Tensor& offsets, const Tensor& up,
                                      const std::optional<Tensor>& bias, std::string activation,
                                      bool keep_h) {
  const char* op = "hopper_up_forward";
  GroupedGemm gemm(op, x, "x");
  gemm.check_operand(up, "up", 3);
  gemm.set_gathered_groups(offsets, order, top_k);
  const int64_t rows = order.size(0), d_model = x.size(1), width_h = up.size(1);
  check_size(up, op, "up", 0, gemm.experts());
  check_size(up, op, "up", 2, d_model);
  if (bias) {
    check_tensor(*bias, op, "bias", 2, x);
    check_dtype(*bias, op, "bias", x.scalar_type());
    check_size(*bias, op, "bias", 0, gemm.experts());
    check_size(*bias, op, "bias", 1, width_h);
  }

  const DeviceGuard guard(x.get_device_index());
  Tensor h = torch::stable::new_empty(x, {keep_h ? rows : 0, width_h}), a;
  for_activation(activation, op, [&](auto kind) {
    using K = decltype(kind);
    constexpr int kMatrices = K::kGated ? 2 : 1;  // gate and up
    STD_TORCH_CHECK(width_h % (8 * kMatrices) == 0, op, ": up must have a multiple of ",
                    8 * kMatrices, " rows per expert, not ", width_h);
    const int64_t width = width_h / kMatrices;
    a = torch::stable::new_empty(x, {rows, width});
    if (rows == 0) return;
    for_half(x.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using Epilogue = StoreActivation<T, typename K::Act, K::kGated>;
      auto params = gemm.make_ragged_rows_params<RaggedRowsParams<T, Epilogue>>();
      gemm.set_k_major_b(params, up, width, kMatrices);
      params.n_tiles = static_cast<int>(ceil_div(width, Epilogue::kColumns));
      params.stagger_cycles = stagger_cycles(rows, d_model, width_h);
      params.epilogue = {keep_h ? data_of<T>(h) : nullptr, data_of<T>(a),
                         data_or_null<const T>(bias), static_cast<int>(width)};
      gemm.launch(ragged_rows_kernel<T, Epilogue, true, Major::kK>, params);
    });
  });
  return {h, a};
}

}  // namespace lightning_fastmoe::hopper
