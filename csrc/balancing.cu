// The two losses that nearly every router has, and their gradients, in two launches and one.
//
//   balancing = E sum_e f_e P_e    f_e the share of (token, slot) pairs that chose e, P_e its mean
//                                  score
//   z = mean_t lse(logits_t)^2
//
// Sums are in a fixed order: each warp adds its tokens, each block its warps, one block all blocks.
#include <algorithm>

#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kMaxExperts = 1024;
constexpr int kFinalBlock = 1024;
constexpr int kFinalWarps = kFinalBlock / kWarpSize;

// A lane's logits of a token, minus infinity beyond E, and their logsumexp.
template <int V>
struct LogSumExp {
  float logit[V];
  float highest;
  float sum;  // of exp(logit - highest)

  __device__ __forceinline__ LogSumExp(const float* row, int lane, int num_experts) {
    highest = -INFINITY;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int expert = v * kWarpSize + lane;
      logit[v] = expert < num_experts ? row[expert] : -INFINITY;
      highest = fmaxf(highest, logit[v]);
    }
    highest = warp_max(highest);
    sum = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) sum += expf(logit[v] - highest);
    sum = warp_sum(sum);
  }
  __device__ __forceinline__ float value() const { return highest + logf(sum); }
};

// partial (blocks, E + 1): the block's sums of each expert's scores, and of squared logsumexps.
template <int V>
__global__ void __launch_bounds__(kBlock)
    sums_kernel(const float* __restrict__ scores, const float* __restrict__ logits,
                float* __restrict__ partial, int64_t tokens, int num_experts, bool wants_scores,
                bool wants_z) {
  __shared__ float shared[kWarpsPerBlock][V * kWarpSize + 1];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  float sums[V] = {}, squares = 0.0f;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp; t < tokens;
       t += stride) {
    if (wants_scores) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int expert = v * kWarpSize + lane;
        if (expert < num_experts) sums[v] += scores[t * num_experts + expert];
      }
    }
    if (wants_z) {
      const float value = LogSumExp<V>(logits + t * num_experts, lane, num_experts).value();
      squares += value * value;
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) shared[warp][v * kWarpSize + lane] = sums[v];
  if (lane == 0) shared[warp][V * kWarpSize] = squares;
  __syncthreads();
  float* out = partial + static_cast<int64_t>(blockIdx.x) * (num_experts + 1);
  for (int e = threadIdx.x; e <= num_experts; e += kBlock) {
    const int column = e < num_experts ? e : V * kWarpSize;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarpsPerBlock; ++w) sum += shared[w][column];
    out[e] = sum;
  }
}

// One block. values: balancing, z, and their sum with the coefficients.
__global__ void __launch_bounds__(kFinalBlock)
    losses_kernel(const float* __restrict__ partial, const int64_t* __restrict__ counts,
                  float* __restrict__ values, float* __restrict__ share, int64_t tokens,
                  int num_experts, int blocks, float of_balancing, float of_z) {
  __shared__ float of_warps[kFinalWarps];
  __shared__ unsigned long long chosen_of_warps[kFinalWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  unsigned long long chosen = 0;
  for (int e = threadIdx.x; e < num_experts; e += kFinalBlock) {
    chosen += static_cast<unsigned long long>(counts[e]);
  }
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    chosen += __shfl_xor_sync(kAllLanes, chosen, offset);
  }
  if (lane == 0) chosen_of_warps[warp] = chosen;
  __syncthreads();
  chosen = 0;
  for (int w = 0; w < kFinalWarps; ++w) chosen += chosen_of_warps[w];
  const float pairs = fmaxf(static_cast<float>(chosen), 1.0f);
  float balancing = 0.0f, squares = 0.0f;
  for (int e = warp; e <= num_experts; e += kFinalWarps) {
    float sum = 0.0f;
    for (int b = lane; b < blocks; b += kWarpSize) {
      sum += partial[static_cast<int64_t>(b) * (num_experts + 1) + e];
    }
    sum = warp_sum(sum);
    if (e == num_experts) {
      squares = sum;
    } else {
      const float part = static_cast<float>(counts[e]) / pairs;
      if (lane == 0) share[e] = part;
      balancing += part * sum;
    }
  }
  if (lane == 0) of_warps[warp] = balancing;
  __syncthreads();
  // The warp that has the squares finishes.
  if (warp != num_experts % kFinalWarps || lane != 0) return;
  balancing = 0.0f;
  for (int w = 0; w < kFinalWarps; ++w) balancing += of_warps[w];
  const float mean = static_cast<float>(tokens > 0 ? tokens : 1);
  balancing *= static_cast<float>(num_experts) / mean;
  const float z = squares / mean;
  values[0] = balancing;
  values[1] = z;
  values[2] = of_balancing * balancing + of_z * z;
}

struct Gradient {
  const float* own;  // of the loss itself, or null
  const float* total;  // of the sum, or null
  float coefficient;

  __device__ __forceinline__ float value() const {
    return (own == nullptr ? 0.0f : *own) + (total == nullptr ? 0.0f : coefficient * *total);
  }
};

// The gradient of the scores is the same for all tokens; that of the logits has a warp per token.
template <int V>
__global__ void __launch_bounds__(kBlock)
    losses_backward_kernel(const float* __restrict__ logits, const float* __restrict__ share,
                           float* __restrict__ d_scores, float* __restrict__ d_logits,
                           int64_t tokens, int num_experts,
                           const __grid_constant__ Gradient of_balancing,
                           const __grid_constant__ Gradient of_z) {
  const int lane = threadIdx.x % kWarpSize;
  if (blockIdx.x == 0) {
    const float factor = of_balancing.value() * static_cast<float>(num_experts) /
                         static_cast<float>(tokens > 0 ? tokens : 1);
    for (int e = threadIdx.x; e < num_experts; e += kBlock) d_scores[e] = share[e] * factor;
  }
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (d_logits == nullptr || t >= tokens) return;
  const LogSumExp<V> of_token(logits + t * num_experts, lane, num_experts);
  const float factor =
      of_z.value() * 2.0f * of_token.value() / static_cast<float>(tokens) / of_token.sum;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    if (expert < num_experts) {
      d_logits[t * num_experts + expert] = factor * expf(of_token.logit[v] - of_token.highest);
    }
  }
}

void check_rows(const Tensor& rows, const char* op, const char* name, const Tensor& like) {
  check_tensor(rows, op, name, 2, like);
  check_dtype(rows, op, name, ScalarType::Float);
  check_size(rows, op, name, 0, like.size(0));
  check_size(rows, op, name, 1, like.size(1));
  STD_TORCH_CHECK(rows.size(1) >= 1 && rows.size(1) <= kMaxExperts, op, ": between 1 and ",
                  kMaxExperts, " experts, not ", rows.size(1));
}

const float* pointer_of(const std::optional<Tensor>& scalar, const char* op, const Tensor& like) {
  if (!scalar) return nullptr;
  check_tensor(*scalar, op, "a loss's gradient", 0, like);
  check_dtype(*scalar, op, "a loss's gradient", ScalarType::Float);
  return static_cast<const float*>(scalar->data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> balancing_losses(const Tensor& scores, const Tensor& logits,
                                            const Tensor& counts, double of_balancing,
                                            double of_z) {
  const char* op = "balancing_losses";
  check_rows(logits, op, "logits", logits);
  check_rows(scores, op, "scores", logits);
  check_tensor(counts, op, "counts", 1, logits);
  check_dtype(counts, op, "counts", ScalarType::Long);
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  check_size(counts, op, "counts", 0, num_experts);

  const DeviceGuard guard(logits.get_device_index());
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                        logits.get_device_index()));
  const int64_t blocks =
      std::min<int64_t>(int64_t{2} * multiprocessors, ceil_div(tokens, kWarpsPerBlock));
  Tensor partial = torch::stable::new_empty(logits, {blocks, num_experts + 1});
  Tensor values = torch::stable::new_empty(logits, {3});
  Tensor share = torch::stable::new_empty(logits, {num_experts});
  const cudaStream_t stream = current_stream(logits);
  if (blocks > 0) {
    for_values_per_lane(num_experts, [&](auto per_lane) {
      sums_kernel<decltype(per_lane)::value><<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(
          static_cast<const float*>(scores.data_ptr()),
          static_cast<const float*>(logits.data_ptr()), static_cast<float*>(partial.data_ptr()),
          tokens, static_cast<int>(num_experts), of_balancing > 0, of_z > 0);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  losses_kernel<<<1, kFinalBlock, 0, stream>>>(
      static_cast<const float*>(partial.data_ptr()),
      static_cast<const int64_t*>(counts.data_ptr()), static_cast<float*>(values.data_ptr()),
      static_cast<float*>(share.data_ptr()), tokens, static_cast<int>(num_experts),
      static_cast<int>(blocks), static_cast<float>(of_balancing), static_cast<float>(of_z));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {values, share};
}

std::tuple<Tensor, Tensor> balancing_losses_backward(
    const Tensor& logits, const Tensor& share, const std::optional<Tensor>& d_balancing,
    const std::optional<Tensor>& d_z, const std::optional<Tensor>& d_total, double of_balancing,
    double of_z) {
  const char* op = "balancing_losses_backward";
  check_rows(logits, op, "logits", logits);
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  check_tensor(share, op, "share", 1, logits);
  check_dtype(share, op, "share", ScalarType::Float);
  check_size(share, op, "share", 0, num_experts);
  const float* of_total = pointer_of(d_total, op, logits);
  const Gradient balancing{pointer_of(d_balancing, op, logits), of_total,
                           static_cast<float>(of_balancing)};
  const Gradient z{pointer_of(d_z, op, logits), of_total, static_cast<float>(of_z)};
  const bool wants_logits = of_z > 0;

  const DeviceGuard guard(logits.get_device_index());
  Tensor d_scores = torch::stable::new_empty(logits, {num_experts});
  Tensor d_logits = torch::stable::new_empty(logits, {wants_logits ? tokens : 0, num_experts});
  const unsigned grid =
      grid_size(wants_logits ? std::max<int64_t>(1, ceil_div(tokens, kWarpsPerBlock)) : 1, op);
  for_values_per_lane(num_experts, [&](auto per_lane) {
    losses_backward_kernel<decltype(per_lane)::value><<<grid, kBlock, 0, current_stream(logits)>>>(
        static_cast<const float*>(logits.data_ptr()), static_cast<const float*>(share.data_ptr()),
        static_cast<float*>(d_scores.data_ptr()),
        wants_logits ? static_cast<float*>(d_logits.data_ptr()) : nullptr, tokens,
        static_cast<int>(num_experts), balancing, z);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {d_scores, d_logits};
}

}  // namespace lightning_fastmoe
