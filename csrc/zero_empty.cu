// Zeroes the weight gradients of experts without tokens: a grouped GEMM over zero rows may not
// write its output. Experts with tokens cost one load each, and the host doesn't need the
// counts.
#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kBlocksPerExpert = 64;

template <typename Word>
__global__ void __launch_bounds__(kBlock)
    zero_empty_kernel(Word* __restrict__ grad, const int64_t* __restrict__ tokens_per_expert,
                      int64_t words) {
  if (tokens_per_expert[blockIdx.y] != 0) return;
  grad += static_cast<int64_t>(blockIdx.y) * words;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < words; i += step) {
    grad[i] = Word{};
  }
}

template <typename Word>
void launch(const Tensor& grad, const Tensor& tokens_per_expert, int64_t experts, int64_t bytes) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks = std::min<int64_t>(kBlocksPerExpert, ceil_div(words, kBlock));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(experts));
  zero_empty_kernel<Word><<<grid, kBlock, 0, current_stream(grad)>>>(
      static_cast<Word*>(grad.data_ptr()),
      static_cast<const int64_t*>(tokens_per_expert.data_ptr()), words);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void zero_empty_experts_(const Tensor& grad, const Tensor& tokens_per_expert) {
  const char* op = "zero_empty_experts_";
  STD_TORCH_CHECK(grad.dim() >= 1, op, ": grad must have a dimension of experts");
  check_tensor(grad, op, "grad", grad.dim(), grad);
  const int64_t experts = grad.size(0);
  STD_TORCH_CHECK(experts <= 65535, op, ": at most 65535 experts, not ", experts);
  check_tensor(tokens_per_expert, op, "tokens_per_expert", 1, grad);
  check_dtype(tokens_per_expert, op, "tokens_per_expert", ScalarType::Long);
  check_size(tokens_per_expert, op, "tokens_per_expert", 0, experts);
  if (grad.numel() == 0) return;

  const DeviceGuard guard(grad.get_device_index());
  const int64_t bytes = grad.numel() / experts * static_cast<int64_t>(grad.element_size());
  if (takes_vectors(bytes, {grad.data_ptr()})) {
    launch<uint4>(grad, tokens_per_expert, experts, bytes);
  } else if (bytes % 2 == 0 && reinterpret_cast<uintptr_t>(grad.data_ptr()) % 2 == 0) {
    launch<uint16_t>(grad, tokens_per_expert, experts, bytes);
  } else {
    launch<uint8_t>(grad, tokens_per_expert, experts, bytes);
  }
}

}  // namespace lightning_fastmoe
