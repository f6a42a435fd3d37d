// The up projection: rows of x gathered inside the product, the activation in its epilogue.
#include "checks.cuh"
#include "epilogues.cuh"
#include "launch.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {

std::tuple<Tensor, Tensor> up_forward(const Tensor& x, const Tensor& order, int64_t top_k,
                                      const Tensor& offsets, const Tensor& up,
                                      const std::optional<Tensor>& bias, std::string activation,
                                      bool keep_h) {
  const char* op = "hopper_up_forward";
  const Deadline deadline = deadline_for(op);
  check_matrix(x, op, "x", 2, x);
  check_matrix(up, op, "up", 3, x);
  const int experts = check_groups(offsets, &order, top_k, op, x);
  const int64_t rows = order.size(0), d_model = x.size(1), width_h = up.size(1);
  check_fits(rows, op);
  check_gathered(x, op);
  check_size(up, op, "up", 0, experts);
  check_size(up, op, "up", 2, d_model);
  if (bias) {
    check_tensor(*bias, op, "bias", 2, x);
    check_dtype(*bias, op, "bias", x.scalar_type());
    check_size(*bias, op, "bias", 0, experts);
    check_size(*bias, op, "bias", 1, width_h);
  }

  const DeviceGuard guard(x.get_device_index());
  Tensor h = torch::stable::new_empty(x, {keep_h ? rows : 0, width_h}), a;
  for_activation(activation, op, [&](auto kind) {
    using K = decltype(kind);
    constexpr int kParts = K::kGated ? 2 : 1;
    STD_TORCH_CHECK(width_h % (8 * kParts) == 0, op, ": up must have a multiple of ", 8 * kParts,
                    " rows per expert, not ", width_h);
    const int64_t width = width_h / kParts;
    a = torch::stable::new_empty(x, {rows, width});
    if (rows == 0) return;
    for_half(x.scalar_type(), op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using Epilogue = StoreActivation<T, typename K::Act, K::kGated>;
      RaggedRowsParams<T, Epilogue> job{};
      job.ordered = width % kOrderedRows == 0;
      job.b_map = tensor_map(up, op,
                             job.ordered ? ordered_boxes(d_model, experts * width_h)
                                         : contiguous_boxes(d_model, width, kParts, experts, 128));
      job.stagger_cycles = stagger_cycles(rows, d_model, width_h);
      job.gathered = static_cast<const T*>(x.data_ptr());
      job.order = static_cast<const int64_t*>(order.data_ptr());
      job.top_k = static_cast<int>(top_k);
      job.offsets = static_cast<const int32_t*>(offsets.data_ptr());
      job.experts = experts;
      job.deadline = deadline;
      job.k = static_cast<int>(d_model);
      job.n_tiles = static_cast<int>(ceil_div(width, Epilogue::kColumns));
      job.epilogue = {
          keep_h ? static_cast<T*>(h.data_ptr()) : nullptr, static_cast<T*>(a.data_ptr()),
          bias ? static_cast<const T*>(bias->data_ptr()) : nullptr, static_cast<int>(width)};
      launch(ragged_rows_kernel<T, Epilogue, true, Major::kK>, job, current_stream(x));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {h, a};
}

}  // namespace lightning_fastmoe::hopper
