// Whether this library has these kernels for a GPU. On a Hopper GPU the library may run as PTX of
// an older architecture, in which their bodies are empty.
#include <array>
#include <atomic>

#include "checks.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {
namespace {

LIGHTNING_FASTMOE_KERNEL probe_kernel() {}

bool probe() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess) {
    return attributes.maxThreadsPerBlock >= kThreads;
  }
  cudaGetLastError();  // clear the error
  return false;
}

__global__ void __launch_bounds__(kBlock) row_numbers_kernel(int64_t* out, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (row < rows) out[row] = row;
}

}  // namespace

bool available(int64_t device) {
  constexpr int kUnknown = 0, kYes = 1, kNo = 2;
  static std::array<std::atomic<int>, 64> known{};
  if (device < 0 || device >= static_cast<int64_t>(known.size())) return false;
  std::atomic<int>& answer = known[device];
  if (answer == kUnknown) {
    const DeviceGuard guard(static_cast<int32_t>(device));
    answer = probe() ? kYes : kNo;
  }
  return answer == kYes;
}

Tensor row_numbers(const Tensor& like, int64_t rows) {
  const DeviceGuard guard(like.get_device_index());
  Tensor out = torch::stable::new_empty(like, {rows}, ScalarType::Long);
  if (rows == 0) return out;
  const unsigned grid = grid_size(ceil_div(rows, kBlock), "row_numbers");
  row_numbers_kernel<<<grid, kBlock, 0, current_stream(like)>>>(
      static_cast<int64_t*>(out.data_ptr()), rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace lightning_fastmoe::hopper
