// Setup shared by this folder's operators: the checks of a grouped GEMM's operands, its tensor
// maps, the parameters common to all kernels, and the launch.
#pragma once

#include "checks.cuh"
#include "launch.cuh"

namespace lightning_fastmoe::hopper {

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data_of<T>(*tensor) : nullptr;
}

// One call of operator `op`, whose first operand is `a`.
class GroupedGemm {
 public:
  GroupedGemm(const char* op, const Tensor& a, const char* name)
      : op_(op), deadline_(deadline_for(op)), a_(a) {
    check_matrix(a, op, name, 2, a);
  }

  void check_operand(const Tensor& tensor, const char* name, int64_t dim) const {
    check_matrix(tensor, op_, name, dim, a_);
  }

  // The experts' rows are those of `a`. `order`, if any, is only checked: a permutation of them.
  void set_groups(const Tensor& offsets, const std::optional<Tensor>& order) {
    if (order) check_size(*order, op_, "order", 0, a_.size(0));
    experts_ = check_groups(offsets, order ? &*order : nullptr, 1, op_, a_);
    offsets_ = data_of<const int32_t>(offsets);
    check_fits(a_.size(0), op_);
  }

  // The experts' rows are gathered: row r is row order[r] / top_k of `a`.
  void set_gathered_groups(const Tensor& offsets, const Tensor& order, int64_t top_k) {
    experts_ = check_groups(offsets, &order, top_k, op_, a_);
    offsets_ = data_of<const int32_t>(offsets);
    gathers_ = true;
    order_ = data_of<const int64_t>(order);
    top_k_ = static_cast<int>(top_k);
    check_fits(order.size(0), op_);
    check_gathered(a_, op_);
  }

  int experts() const { return experts_; }

  CUtensorMap map(const Tensor& tensor, const Boxes& boxes) const {
    return tensor_map(tensor, op_, boxes);
  }

  // Params with the groups, with `a` if its rows are gathered, and with the deadline.
  template <typename Params>
  Params make_params() const {
    Params params{};
    if (gathers_) {
      params.gathered = static_cast<decltype(params.gathered)>(a_.data_ptr());
      params.order = order_;
      params.top_k = top_k_;
    }
    params.offsets = offsets_;
    params.experts = experts_;
    params.deadline = deadline_;
    return params;
  }

  // The same for a kernel over ragged rows, whose K is the width of `a`.
  template <typename Params>
  Params make_ragged_rows_params() const {
    Params params = make_params<Params>();
    params.k = static_cast<int>(a_.size(1));
    if (!gathers_) {
      params.a_map = map(a_, contiguous_boxes(a_.size(1), a_.size(0), 1, 1, kConsumerM));
    }
    return params;
  }

  // B from `weight` (E, matrices * n, k).
  template <typename Params>
  void set_k_major_b(Params& params, const Tensor& weight, int64_t n, int matrices) const {
    const int64_t k = weight.size(2);
    params.ordered = n % kOrderedRows == 0;
    params.b_map =
        map(weight, params.ordered ? ordered_boxes(k, experts_ * matrices * n)
                                   : contiguous_boxes(k, n, matrices, experts_, kTileN / 2));
  }

  // B from `weight` (E, k, n).
  template <typename Params>
  void set_mn_major_b(Params& params, const Tensor& weight) const {
    params.b_map =
        map(weight, contiguous_boxes(weight.size(2), weight.size(1), 1, experts_, kTileK));
  }

  template <typename Params>
  void launch(void (*kernel)(Params), const Params& params) const {
    launch_gemm(kernel, params, current_stream(a_));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  const char* op_;
  Deadline deadline_;
  const Tensor& a_;
  bool gathers_ = false;
  const int32_t* offsets_ = nullptr;
  const int64_t* order_ = nullptr;
  int top_k_ = 0;
  int experts_ = 0;
};

}  // namespace lightning_fastmoe::hopper
