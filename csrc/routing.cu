// Scores (softmax or sigmoid), top-k and the K weights of each token in one pass over the logits,
// and its gradient.
//
// One warp per token; lane l holds the logits of experts l, l + 32, ... in registers, so E <= 1024.
// Launch sizes depend only on E and K.
#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kMaxExperts = 1024;

// Maps a float to an integer with the order of top-k: NaN above everything, as in torch.sort, and
// all NaNs equal, so that a row of NaNs still gives K distinct experts. The bits of a float >= 0
// ascend with its value; those of a negative one descend. 0 is reserved for experts that have
// already been chosen or don't exist.
__device__ __forceinline__ unsigned rank_key(float value) {
  if (isnan(value)) return 0xffffffffu;
  const unsigned bits = __float_as_uint(value == 0.0f ? 0.0f : value);  // -0 ties with 0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// A score is exp(x), or sigmoid(x) = exp(min(x, 0)) / (1 + exp(-|x|)). Weights and the distribution
// are ratios of scores, so all of them may be divided by exp(highest), where `highest` is the
// largest exponent among them: the largest one is then 1, or at least 1/2, and no sum vanishes.
__device__ __forceinline__ float exponent(float x, bool use_sigmoid) {
  return use_sigmoid ? fminf(x, 0.0f) : x;
}

__device__ __forceinline__ float scaled_score(float x, float highest, bool use_sigmoid) {
  const float power = expf(exponent(x, use_sigmoid) - highest);
  return use_sigmoid ? power / (1.0f + expf(-fabsf(x))) : power;
}

__device__ __forceinline__ float sigmoid(float x) { return scaled_score(x, 0.0f, true); }

// A token's scores divided by their sum: score = scaled_score(logit, highest) / sum.
template <int V>  // scores per lane
__device__ __forceinline__ void distribution(const float* __restrict__ row, int lane,
                                             int num_experts, bool use_sigmoid, float (&logit)[V],
                                             float (&score)[V], float& highest, float& sum) {
  highest = -INFINITY;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    logit[v] = expert < num_experts ? row[expert] : -INFINITY;
    highest = fmaxf(highest, exponent(logit[v], use_sigmoid));
  }
  highest = warp_max(highest);
  sum = 0.0f;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    // The guard is needed: in a row of -inf, lanes beyond E would become NaN.
    const bool exists = v * kWarpSize + lane < num_experts;
    score[v] = exists ? scaled_score(logit[v], highest, use_sigmoid) : 0.0f;
    sum += score[v];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int v = 0; v < V; ++v) score[v] /= sum;
}

template <int V>
__global__ void __launch_bounds__(kBlock, 2)
    route_kernel(const float* __restrict__ logits, const float* __restrict__ selection_bias,
                 float* __restrict__ scores, float* __restrict__ weights,
                 int64_t* __restrict__ expert_ids, int64_t tokens, int num_experts, int top_k,
                 bool normalize, bool use_sigmoid) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (token >= tokens) return;

  float logit[V], score[V], highest, sum;
  distribution<V>(logits + token * num_experts, lane, num_experts, use_sigmoid, logit, score,
                  highest, sum);
  // Without a bias, rank by the logits: scores round distant logits to the same number. With a
  // bias, the larger logit wins if two sums are equal.
  const bool biased = selection_bias != nullptr;
  unsigned rank[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    rank[v] = 0;
    if (expert < num_experts) {
      scores[token * num_experts + expert] = score[v];
      float value = logit[v];
      if (biased) value = (use_sigmoid ? sigmoid(logit[v]) : score[v]) + selection_bias[expert];
      rank[v] = rank_key(value);
    }
  }

  unsigned best_key = 0;
  float best_logit = 0.0f;
  int best = 0;
  const auto find_best = [&] {
    best_key = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // Strictly greater: if both are equal, the lower expert stays.
      if (rank[v] > best_key || (rank[v] == best_key && best_key != 0 && logit[v] > best_logit)) {
        best_key = rank[v];
        best_logit = logit[v];
        best = v;
      }
    }
  };
  find_best();
  float my_logit = 0.0f;
  int my_expert = 0;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    const unsigned key = warp_max(best_key);
    bool leads = best_key == key;
    if (biased) {
      const unsigned logit_key = leads ? rank_key(best_logit) : 0;
      const unsigned highest_key = warp_max(logit_key);  // by all lanes
      leads = leads && logit_key == highest_key;
    }
    const unsigned candidate = best * kWarpSize + lane;
    const unsigned expert = warp_min(leads ? candidate : 0xffffffffu);
    const float chosen = __shfl_sync(kAllLanes, best_logit, expert % kWarpSize);
    if (lane == k) {
      my_logit = chosen;
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
  if (normalize) {
    highest = warp_max(lane < top_k ? exponent(my_logit, use_sigmoid) : -INFINITY);
  } else if (use_sigmoid) {
    highest = 0.0f;
  }
  float weight = lane < top_k ? scaled_score(my_logit, highest, use_sigmoid) : 0.0f;
  if (normalize) {
    weight /= warp_sum(weight);
  } else if (!use_sigmoid) {
    weight /= sum;
  }
  if (lane < top_k) {
    weights[token * top_k + lane] = weight;
    expert_ids[token * top_k + lane] = my_expert;
  }
}

// With q the distribution, G the gradient of q and x the logits:
//   softmax   d_x = q (G - <q, G>)
//   sigmoid   the same times sigmoid(-x), the derivative of log sigmoid(x)
// Normalised weights w contribute w (g - <w, g>) in the same way, at the K chosen experts. No term
// divides by a score.
template <int V>
__global__ void __launch_bounds__(kBlock, 1)
    route_backward_kernel(const float* __restrict__ logits, const float* __restrict__ weights,
                          const int64_t* __restrict__ expert_ids,
                          const float* __restrict__ d_scores, const float* __restrict__ d_weights,
                          float* __restrict__ d_logits, int64_t d_scores_stride, int64_t tokens,
                          int num_experts, int top_k, bool normalize, bool use_sigmoid) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (token >= tokens) return;

  const float* row = logits + token * num_experts;
  float grad[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    const bool given = expert < num_experts && d_scores != nullptr;
    grad[v] = given ? d_scores[token * d_scores_stride + expert] : 0.0f;
  }
  // Gradient of a chosen expert's logit; of its score if a weight is a score of the distribution.
  const bool weights_are_scores = !normalize && !use_sigmoid;
  int my_expert = 0;
  float my_grad = 0.0f;
  if (d_weights != nullptr) {
    float weight = 0.0f;
    if (lane < top_k) {
      my_expert = static_cast<int>(expert_ids[token * top_k + lane]);
      my_grad = d_weights[token * top_k + lane];
      weight = weights[token * top_k + lane];
    }
    if (normalize) {
      my_grad = weight * (my_grad - warp_sum(weight * my_grad));
    } else if (use_sigmoid) {
      my_grad *= weight;
    }
    if (use_sigmoid) my_grad *= sigmoid(-row[my_expert]);
  }
  const auto add_chosen = [&] {
    for (int k = 0; k < top_k; ++k) {
      const int target = __shfl_sync(kAllLanes, my_expert, k);
      const float value = __shfl_sync(kAllLanes, my_grad, k);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v * kWarpSize + lane == target) grad[v] += value;
      }
    }
  };
  if (d_weights != nullptr && weights_are_scores) add_chosen();
  if (d_scores != nullptr || weights_are_scores) {
    float logit[V], score[V], highest, sum;
    distribution<V>(row, lane, num_experts, use_sigmoid, logit, score, highest, sum);
    float inner = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) inner += score[v] * grad[v];
    inner = warp_sum(inner);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      grad[v] = score[v] * (grad[v] - inner);
      if (use_sigmoid) grad[v] *= sigmoid(-logit[v]);
    }
  }
  if (d_weights != nullptr && !weights_are_scores) add_chosen();
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int expert = v * kWarpSize + lane;
    if (expert < num_experts) d_logits[token * num_experts + expert] = grad[v];
  }
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
  for_values_per_lane(num_experts, [&](auto per_lane) {
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

Tensor route_backward(const Tensor& logits, const Tensor& weights, const Tensor& expert_ids,
                      const std::optional<Tensor>& d_scores, const std::optional<Tensor>& d_weights,
                      bool normalize, bool sigmoid) {
  const char* op = "route_backward";
  check_tensor(logits, op, "logits", 2, logits);
  check_dtype(logits, op, "logits", ScalarType::Float);
  check_tensor(expert_ids, op, "expert_ids", 2, logits);
  check_dtype(expert_ids, op, "expert_ids", ScalarType::Long);
  const int64_t tokens = logits.size(0), num_experts = logits.size(1), top_k = expert_ids.size(1);
  check_size(expert_ids, op, "expert_ids", 0, tokens);
  check_tensor(weights, op, "weights", 2, logits);
  check_dtype(weights, op, "weights", ScalarType::Float);
  check_size(weights, op, "weights", 0, tokens);
  check_size(weights, op, "weights", 1, top_k);
  check_sizes(op, num_experts, top_k);
  if (d_scores) {
    const bool is_common = d_scores->dim() == 1;
    check_tensor(*d_scores, op, "d_scores", is_common ? 1 : 2, logits);
    check_dtype(*d_scores, op, "d_scores", ScalarType::Float);
    if (!is_common) check_size(*d_scores, op, "d_scores", 0, tokens);
    check_size(*d_scores, op, "d_scores", is_common ? 0 : 1, num_experts);
  }
  if (d_weights) {
    check_tensor(*d_weights, op, "d_weights", 2, logits);
    check_dtype(*d_weights, op, "d_weights", ScalarType::Float);
    check_size(*d_weights, op, "d_weights", 0, tokens);
    check_size(*d_weights, op, "d_weights", 1, top_k);
  }

  const DeviceGuard guard(logits.get_device_index());
  Tensor d_logits = torch::stable::empty_like(logits);
  if (tokens == 0) return d_logits;

  const unsigned grid = grid_size(ceil_div(tokens, kWarpsPerBlock), op);
  for_values_per_lane(num_experts, [&](auto per_lane) {
    route_backward_kernel<decltype(per_lane)::value><<<grid, kBlock, 0, current_stream(logits)>>>(
        static_cast<const float*>(logits.data_ptr()), static_cast<const float*>(weights.data_ptr()),
        static_cast<const int64_t*>(expert_ids.data_ptr()),
        d_scores ? static_cast<const float*>(d_scores->data_ptr()) : nullptr,
        d_weights ? static_cast<const float*>(d_weights->data_ptr()) : nullptr,
        static_cast<float*>(d_logits.data_ptr()),
        d_scores && d_scores->dim() == 1 ? 0 : num_experts, tokens, static_cast<int>(num_experts),
        static_cast<int>(top_k), normalize, sigmoid);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return d_logits;
}

}  // namespace lightning_fastmoe
