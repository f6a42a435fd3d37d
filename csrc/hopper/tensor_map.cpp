#include "tensor_map.h"

namespace lightning_fastmoe::hopper {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// Looked up at run time, so that the library loads on machines without a driver.
Encode driver_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

bool encode_tensor_map(CUtensorMap* map, const void* address, bool is_bf16, const Boxes& boxes) {
  static const Encode encode = driver_function();
  if (encode == nullptr) return false;
  constexpr int kRank = 5;
  cuuint64_t sizes[kRank], strides[kRank - 1];
  cuuint32_t box[kRank];
  const cuuint32_t steps[kRank] = {1, 1, 1, 1, 1};
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(boxes.sizes[i]);
    box[i] = static_cast<cuuint32_t>(boxes.box[i]);
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(boxes.strides[i - 1]) * 2;
  }
  const auto encoded = [&] {
    return encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                  kRank, const_cast<void*>(address), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  if (encoded()) return true;
  // A thread of the autograd engine has no context before its first runtime call, and driver calls
  // fail without one. Setting the current device again makes its context current.
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess && encoded();
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace lightning_fastmoe::hopper
