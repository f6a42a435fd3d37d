// The reductions of the weight gradients' partial sums, see split_k.cuh.
#pragma once

#include "weight_gradient.cuh"

namespace lightning_fastmoe::hopper {

// Adds the splits of split experts, in order. Every block handles a part of each. (Pointers are not
// __restrict__: the compiler could hoist loads through them above the wait.)
template <typename T>
__global__ void __launch_bounds__(256)
    reduce_splits_kernel(const float* workspace, const int32_t* offsets, T* out, int experts,
                         int split_rows, int64_t size) {
  grid_dependency_wait();
  launch_dependent_grids();
  __shared__ int splits[kMaxExperts];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    splits[e] = count_splits(offsets[e] - (e == 0 ? 0 : offsets[e - 1]), split_rows);
  }
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  int64_t split = 0;
  for (int e = 0; e < experts; ++e) {
    if (splits[e] == 1) continue;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size;
         i += step) {
      float sum[8] = {};
      for (int s = 0; s < splits[e]; ++s) {
        const float4* from = reinterpret_cast<const float4*>(workspace + (split + s) * size + i);
        const float4 x = from[0], y = from[1];
        const float values[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += values[j];
      }
      *reinterpret_cast<uint4*>(out + e * size + i) = {
          pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]), pack<T>(sum[4], sum[5]),
          pack<T>(sum[6], sum[7])};
    }
    split += splits[e];
  }
}

// Adds the splits of the last wave's work tiles, in order. A block reduces one block's tile of G,
// with as many threads as the consumers had; each thread adds the accumulators at its own index.
template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kConsumers* kWarpgroup)
    reduce_last_wave_kernel(const __grid_constant__ WeightGradientParams<T> params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  grid_dependency_wait();
  launch_dependent_grids();
  __shared__ alignas(1024) uint8_t staging[kConsumers * kStagingBytes];
  __shared__ int expert;
  const int tiles = tiles_of_gradient(params.m, params.n);
  const int last_wave_tile = blockIdx.x / kClusterSize, rank = blockIdx.x % kClusterSize;
  const int number = params.experts * tiles - params.last_wave.tiles + last_wave_tile;
  const int position = number / tiles;
  const auto rows_of = [&](int e) {
    return params.offsets[e] - (e == 0 ? 0 : params.offsets[e - 1]);
  };
  int split_experts = 0;
  for (int e = threadIdx.x; e < params.experts; e += blockDim.x) {
    split_experts |= count_splits(rows_of(e), params.split_rows) > 1;
    const bool sorted = params.experts <= kMaxSorted;
    if ((sorted ? rank_by_rows(e, params.experts, rows_of) : e) == position) expert = e;
  }
  if (__syncthreads_or(split_experts)) return;  // then the last wave is whole, see SplitKScheduler
  const int consumer = threadIdx.x / kWarpgroup;
  float d[kAccumulators] = {};
  for (int split = 0; split < params.last_wave.splits; ++split) {
    const float4* from = params.last_wave.accumulators(last_wave_tile, split, rank, consumer);
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 4) {
      const float4 x = from[i / 4 * kWarpgroup];
      d[i] += x.x;
      d[i + 1] += x.y;
      d[i + 2] += x.z;
      d[i + 3] += x.w;
    }
  }
  const GradientTile tile(number % tiles, params.m, rank);
  T* out = params.out + static_cast<int64_t>(expert) * params.m * params.n;
  const int m = tile.m + consumer * kConsumerM;
  if constexpr (kTransposed) {
    store_transposed<T>(out, d, m, tile.n, params,
                        shared_address(staging) + consumer * kStagingBytes,
                        kConsumerBarrier + consumer);
  } else {
    store<T>(out, d, m, tile.n, params);
  }
#endif
}

}  // namespace lightning_fastmoe::hopper
