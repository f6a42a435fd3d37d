// Whether these kernels are there for a GPU. A library may serve a Hopper GPU by PTX of an older
// architecture, and then holds nothing but empty bodies.
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
  cudaGetLastError();  // the question is answered
  return false;
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

}  // namespace lightning_fastmoe::hopper
