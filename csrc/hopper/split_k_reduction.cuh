// The sums of the parts of weights' gradients, see split_k.cuh.
#pragma once

#include "weight_gradient.cuh"

namespace lightning_fastmoe::hopper {

// Adds the parts of split experts, in their order. Every block takes a share of each. (Pointers are
// not __restrict__: the compiler may read such ones before the wait.)
template <typename T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const float* workspace, const int32_t* offsets, T* out, int experts, int chunk,
                     int64_t size) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  __shared__ int parts[kMaxExperts];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    parts[e] = chunks_of(offsets[e] - (e == 0 ? 0 : offsets[e - 1]), chunk);
  }
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  int64_t part = 0;
  for (int e = 0; e < experts; ++e) {
    if (parts[e] == 1) continue;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size;
         i += step) {
      float sum[8] = {};
      for (int p = 0; p < parts[e]; ++p) {
        const float4* from = reinterpret_cast<const float4*>(workspace + (part + p) * size + i);
        const float4 x = from[0], y = from[1];
        const float values[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += values[j];
      }
      *reinterpret_cast<uint4*>(out + e * size + i) = {
          pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]), pack<T>(sum[4], sum[5]),
          pack<T>(sum[6], sum[7])};
    }
    part += parts[e];
  }
}

// Adds the parts of the tail's units, in their order; one block for each tile of G, with the
// consumers' threads and what each of them held.
template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kConsumers* kWarpgroup)
    add_tail_kernel(const __grid_constant__ WeightGradient<T> job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  wait_for_earlier_kernels();
  let_next_kernel_start();
  __shared__ alignas(1024) uint8_t staging[kConsumers * kStagingBytes];
  int split = 0;
  for (int e = threadIdx.x; e < job.experts; e += blockDim.x) {
    const int rows = job.offsets[e] - (e == 0 ? 0 : job.offsets[e - 1]);
    split |= chunks_of(rows, job.chunk) > 1;
  }
  if (__syncthreads_or(split)) return;  // no tail, see GradientWalk
  const int unit = blockIdx.x / kCluster, rank = blockIdx.x % kCluster;
  const int consumer = threadIdx.x / kWarpgroup;
  float d[kAccumulators] = {};
  for (int part = 0; part < job.tail.parts; ++part) {
    const float4* from = job.tail.of(unit, part, rank, consumer);
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 4) {
      const float4 x = from[i / 4 * kWarpgroup];
      d[i] += x.x;
      d[i + 1] += x.y;
      d[i + 2] += x.z;
      d[i + 3] += x.w;
    }
  }
  const int in_each = units_of_part(job.m, job.n);
  const int number = job.experts * in_each - job.tail.units + unit;
  const GradientTile tile(number % in_each, job.m, rank);
  T* out = job.out + static_cast<int64_t>(number / in_each) * job.m * job.n;
  const int m = tile.m + consumer * kConsumerM;
  if constexpr (kTransposed) {
    store_gradient_transposed<T>(out, d, m, tile.n, job,
                                 shared_address(staging) + consumer * kStagingBytes,
                                 kConsumerBarrier + consumer);
  } else {
    store_gradient<T>(out, d, m, tile.n, job);
  }
#endif
}

}  // namespace lightning_fastmoe::hopper
