// How these kernels are launched. Errors stay with the CUDA runtime; the caller asks for them.
//
// With programmatic dependent launch, a kernel's blocks start one by one as those of the kernel
// before it exit, and run their prologues, rather than when all of them have exited. A kernel has
// to wait itself for what was written before it (grid_dependency_wait), and lets its own successor
// in only after that (launch_dependent_grids): so all but the last kernel before it have completed
// when it starts.
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
