// What every launch of these kernels does. Errors stay with the CUDA runtime; the caller asks for
// them.
//
// A kernel is launched so that its blocks take the place of those of the kernel before it one by
// one, and get ready, rather than when all of them have left. It has to wait itself for what was
// written before (grid_dependency_wait), and lets its own successor in only after that: so all
// but the last kernel before it are done at its start.
#pragma once

#include "pipeline.cuh"
#include "tensor_map.h"

namespace lightning_fastmoe::hopper {

template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
                  cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <typename Job>
void launch(void (*kernel)(Job), const Job& job, cudaStream_t stream) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  const int blocks = multiprocessors() / kClusterSize * kClusterSize;
  launch_early(kernel, static_cast<unsigned>(blocks), kThreads, kSharedBytes, stream, job);
}

}  // namespace lightning_fastmoe::hopper
