// What every launch of these kernels does. Errors stay with the CUDA runtime; the caller asks for
// them.
#pragma once

#include "pipeline.cuh"
#include "tensor_map.h"

namespace lightning_fastmoe::hopper {

template <typename Job>
void launch(void (*kernel)(Job), const Job& job, cudaStream_t stream) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  const int blocks = multiprocessors() / kCluster * kCluster;
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(job);
}

}  // namespace lightning_fastmoe::hopper
