// Launches these kernels. Errors are left in the CUDA runtime; the caller must check for them.
//
// With programmatic dependent launch, a kernel's blocks start one by one, and run their prologues,
// as blocks of the preceding kernel exit, rather than after all of them have. A kernel must itself
// wait for its predecessor's writes (grid_dependency_wait), and allows its own successor to start
// only after that (launch_dependent_grids): so when it starts, all earlier kernels but the
// preceding one have completed.
#pragma once

#include "pipeline.cuh"
#include "tensor_map.h"

namespace lightning_fastmoe::hopper {

template <typename... Parameters, typename... Arguments>
void launch_dependent(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                      size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// A persistent kernel: one block per multiprocessor, in whole clusters.
template <typename Params>
void launch_gemm(void (*kernel)(Params), const Params& params, cudaStream_t stream) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  const int blocks = multiprocessors() / kClusterSize * kClusterSize;
  launch_dependent(kernel, static_cast<unsigned>(blocks), kThreads, kSharedBytes, stream, params);
}

}  // namespace lightning_fastmoe::hopper
