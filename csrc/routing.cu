// Scores (softmax or sigmoid), top-k and the K weights of each token in one pass over the logits,
// and its gradient.
//
// One warp per token; lane l holds the scores of experts l, l + 32, ... in registers, so E <= 1024.
// Sizes depend on E and K alone.
#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kMaxExperts = 1024;

// An integer that orders numbers as top-k does: NaN above everything, as torch.sort has it, and all
// NaN equal, so that a row of NaN still gives K distinct experts. The bits of a float >= 0 ascend
// with its value; those of a negative one descend. 0 is left for experts that are taken or do not
// exist.
__device__ __forceinline__ unsigned rank_key(float value) {
  if (isnan(value)) return 0xffffffffu;
  const unsigned bits = __float_as_uint(value == 0.0f ? 0.0f : value);  // -0 ties with 0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <int V>  // scores per lane
__global__ void __launch_bounds__(kBlock, 2)
    route_kernel(const float* __restrict__ logits, const float* __restrict__ selection_bias,
                 float* __restrict__ scores, float* __restrict__ weights,
                 int64_t* __restrict__ expert_ids, int64_t tokens, int num_experts, int top_k,
                 bool normalize, bool use_sigmoid) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (token >= tokens) return;

  const float* row = logits + token * num_experts;
  float score[V];
  float highest = -INFINITY;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    score[v] = expert < num_experts ? row[expert] : -INFINITY;
    highest = fmaxf(highest, score[v]);
  }
  if (use_sigmoid) {
#pragma unroll
    for (int v = 0; v < V; ++v) score[v] = sigmoid(score[v]);
  } else {
    highest = warp_max(highest);
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // The guard matters: a row of -inf would turn the lanes beyond E into NaN of their own.
      score[v] = v * kWarpSize + lane < num_experts ? expf(score[v] - highest) : 0.0f;
      sum += score[v];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int v = 0; v < V; ++v) score[v] /= sum;
  }
  unsigned rank[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    rank[v] = 0;
    if (expert < num_experts) {
      scores[token * num_experts + expert] = score[v];
      rank[v] = rank_key(selection_bias == nullptr ? score[v] : score[v] + selection_bias[expert]);
    }
  }

  unsigned best_key = 0;
  float best_score = 0.0f;
  int best = 0;
  const auto find_best = [&] {
    best_key = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (rank[v] > best_key) {  // strictly: ties stay with the lower expert
        best_key = rank[v];
        best_score = score[v];
        best = v;
      }
    }
  };
  find_best();
  float my_weight = 0.0f, total = 0.0f;
  int my_expert = 0;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    const unsigned key = warp_max(best_key);
    const unsigned candidate = best * kWarpSize + lane;
    const unsigned expert = warp_min(best_key == key ? candidate : 0xffffffffu);
    const float weight = __shfl_sync(kAllLanes, best_score, expert % kWarpSize);
    total += weight;
    if (lane == k) {
      my_weight = weight;
      my_expert = static_cast<int>(expert);
    }
    if (lane == expert % kWarpSize) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v == best) rank[v] = 0;  // an index known at compile time keeps the array in registers
      }
      find_best();
    }
  }
  if (lane < top_k) {
    weights[token * top_k + lane] = normalize ? my_weight / total : my_weight;
    expert_ids[token * top_k + lane] = my_expert;
  }
}

template <int V>
__global__ void __launch_bounds__(kBlock)
    route_backward_kernel(const float* __restrict__ scores, const int64_t* __restrict__ expert_ids,
                          const float* __restrict__ d_scores, const float* __restrict__ d_weights,
                          float* __restrict__ d_logits, int64_t tokens, int num_experts, int top_k,
                          bool normalize, bool use_sigmoid) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (token >= tokens) return;

  float score[V], grad[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    const bool exists = expert < num_experts;
    score[v] = exists ? scores[token * num_experts + expert] : 0.0f;
    grad[v] = exists && d_scores != nullptr ? d_scores[token * num_experts + expert] : 0.0f;
  }
  if (d_weights != nullptr) {
    int expert = 0;
    float chosen = 0.0f, grad_chosen = 0.0f;
    if (lane < top_k) {
      expert = static_cast<int>(expert_ids[token * top_k + lane]);
      chosen = scores[token * num_experts + expert];
      grad_chosen = d_weights[token * top_k + lane];
    }
    if (normalize) {  // weight_k = chosen_k / sum_j chosen_j
      const float total = warp_sum(chosen);
      const float shared = warp_sum(lane < top_k ? grad_chosen * (chosen / total) : 0.0f);
      grad_chosen = (grad_chosen - shared) / total;
    }
    for (int k = 0; k < top_k; ++k) {
      const int target = __shfl_sync(kAllLanes, expert, k);
      const float value = __shfl_sync(kAllLanes, grad_chosen, k);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v * kWarpSize + lane == target) grad[v] += value;
      }
    }
  }
  float inner = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v) inner += score[v] * grad[v];
  inner = use_sigmoid ? 0.0f : warp_sum(inner);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    if (expert < num_experts) {
      const float slope = use_sigmoid ? score[v] * (1.0f - score[v]) : score[v];
      d_logits[token * num_experts + expert] = slope * (grad[v] - inner);
    }
  }
}

// Calls `function` with the smallest number of scores per lane that covers E experts.
template <typename Function>
void for_scores_per_lane(int64_t num_experts, Function&& function) {
  if (num_experts <= 32) return function(std::integral_constant<int, 1>{});
  if (num_experts <= 64) return function(std::integral_constant<int, 2>{});
  if (num_experts <= 128) return function(std::integral_constant<int, 4>{});
  if (num_experts <= 256) return function(std::integral_constant<int, 8>{});
  if (num_experts <= 512) return function(std::integral_constant<int, 16>{});
  return function(std::integral_constant<int, 32>{});
}

void check_sizes(const char* op, int64_t num_experts, int64_t top_k) {
  STD_TORCH_CHECK(num_experts <= kMaxExperts, op, ": at most ", kMaxExperts, " experts, not ",
                  num_experts);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= kWarpSize && top_k <= num_experts, op,
                  ": top_k must be between 1 and the smaller of ", kWarpSize, " and ", num_experts,
                  ", not ", top_k);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits,
                                         const std::optional<Tensor>& selection_bias, int64_t top_k,
                                         bool normalize, bool sigmoid) {
  const char* op = "route";
  check_tensor(logits, op, "logits", 2, logits);
  check_dtype(logits, op, "logits", ScalarType::Float);
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  check_sizes(op, num_experts, top_k);
  if (selection_bias) {
    check_tensor(*selection_bias, op, "selection_bias", 1, logits);
    check_dtype(*selection_bias, op, "selection_bias", ScalarType::Float);
    check_size(*selection_bias, op, "selection_bias", 0, num_experts);
  }

  const DeviceGuard guard(logits.get_device_index());
  Tensor scores = torch::stable::empty_like(logits);
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k});
  Tensor expert_ids = torch::stable::new_empty(logits, {tokens, top_k}, ScalarType::Long);
  if (tokens == 0) return {scores, weights, expert_ids};

  const unsigned grid = grid_size(ceil_div(tokens, kWarpsPerBlock), op);
  for_scores_per_lane(num_experts, [&](auto per_lane) {
    route_kernel<decltype(per_lane)::value><<<grid, kBlock, 0, current_stream(logits)>>>(
        static_cast<const float*>(logits.data_ptr()),
        selection_bias ? static_cast<const float*>(selection_bias->data_ptr()) : nullptr,
        static_cast<float*>(scores.data_ptr()), static_cast<float*>(weights.data_ptr()),
        static_cast<int64_t*>(expert_ids.data_ptr()), tokens, static_cast<int>(num_experts),
        static_cast<int>(top_k), normalize, sigmoid);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {scores, weights, expert_ids};
}

Tensor route_backward(const Tensor& scores, const Tensor& expert_ids,
                      const std::optional<Tensor>& d_scores, const std::optional<Tensor>& d_weights,
                      bool normalize, bool sigmoid) {
  const char* op = "route_backward";
  check_tensor(scores, op, "scores", 2, scores);
  check_dtype(scores, op, "scores", ScalarType::Float);
  check_tensor(expert_ids, op, "expert_ids", 2, scores);
  check_dtype(expert_ids, op, "expert_ids", ScalarType::Long);
  const int64_t tokens = scores.size(0), num_experts = scores.size(1), top_k = expert_ids.size(1);
  check_size(expert_ids, op, "expert_ids", 0, tokens);
  check_sizes(op, num_experts, top_k);
  if (d_scores) {
    check_tensor(*d_scores, op, "d_scores", 2, scores);
    check_dtype(*d_scores, op, "d_scores", ScalarType::Float);
    check_size(*d_scores, op, "d_scores", 0, tokens);
    check_size(*d_scores, op, "d_scores", 1, num_experts);
  }
  if (d_weights) {
    check_tensor(*d_weights, op, "d_weights", 2, scores);
    check_dtype(*d_weights, op, "d_weights", ScalarType::Float);
    check_size(*d_weights, op, "d_weights", 0, tokens);
    check_size(*d_weights, op, "d_weights", 1, top_k);
  }

  const DeviceGuard guard(scores.get_device_index());
  Tensor d_logits = torch::stable::empty_like(scores);
  if (tokens == 0) return d_logits;

  const unsigned grid = grid_size(ceil_div(tokens, kWarpsPerBlock), op);
  for_scores_per_lane(num_experts, [&](auto per_lane) {
    route_backward_kernel<decltype(per_lane)::value><<<grid, kBlock, 0, current_stream(scores)>>>(
        static_cast<const float*>(scores.data_ptr()),
        static_cast<const int64_t*>(expert_ids.data_ptr()),
        d_scores ? static_cast<const float*>(d_scores->data_ptr()) : nullptr,
        d_weights ? static_cast<const float*>(d_weights->data_ptr()) : nullptr,
        static_cast<float*>(d_logits.data_ptr()), tokens, static_cast<int>(num_experts),
        static_cast<int>(top_k), normalize, sigmoid);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return d_logits;
}

}  // namespace lightning_fastmoe
