// What a rank sends where.
//
// A pair is a (token, rank): number t * R + r. It is sent if one of the token's experts is on that
// rank. Pairs are sorted by rank with sort_by_expert.
#include <cassert>

#include "../common.cuh"
#include "../ops.h"
#include "ranks.cuh"

namespace lightning_fastmoe {
namespace {

constexpr int kIdBytes = 4;
constexpr int64_t kMostExperts = 8192;  // counts in shared memory

// A thread per token. where (2, E + 1): each expert's rank and its number there; R and -1 for
// dropped slots, whose expert is E. A pair's K ids, then its K weights, are what travels with it.
__global__ void __launch_bounds__(kBlock)
    pairs_kernel(const int64_t* __restrict__ chosen, const int64_t* __restrict__ where,
                 const float* __restrict__ weights, int64_t* __restrict__ keys,
                 unsigned char* __restrict__ packed, int* __restrict__ owner,
                 unsigned long long* __restrict__ counts, int64_t tokens, int slots, int ranks,
                 int num_experts) {
  extern __shared__ int in_block[];  // tokens of each expert
  for (int e = threadIdx.x; e < num_experts; e += kBlock) in_block[e] = 0;
  __syncthreads();
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (t < tokens) {
    unsigned needed = 0;
    for (int k = 0; k < slots; ++k) {
      const int64_t expert = chosen[t * slots + k];
      assert(expert >= 0 && expert <= num_experts && "an expert id is outside [0, E]");
      const int rank = static_cast<int>(where[expert]);
      owner[t * slots + k] = rank;
      if (expert < num_experts) {
        atomicAdd(&in_block[expert], 1);
        needed |= 1u << rank;
      }
    }
    for (int r = 0; r < ranks; ++r) {
      const int64_t pair = t * ranks + r;
      const bool is_sent = needed >> r & 1u;
      keys[pair] = is_sent ? r : ranks;
      if (!is_sent) continue;
      auto* ids = reinterpret_cast<int*>(packed + pair * slots * 2 * kIdBytes);
      auto* wide = reinterpret_cast<float*>(ids + slots);
      for (int k = 0; k < slots; ++k) {
        const int64_t expert = chosen[t * slots + k];
        const bool here = where[expert] == r;
        ids[k] = here ? static_cast<int>(where[num_experts + 1 + expert]) : -1;
        wide[k] = weights[t * slots + k];
      }
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kBlock) {
    if (in_block[e] != 0) atomicAdd(&counts[e], static_cast<unsigned long long>(in_block[e]));
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exchange_plan(
    const Tensor& chosen, const Tensor& where, const Tensor& weights, int64_t ranks) {
  const char* op = "exchange_plan";
  check_tensor(chosen, op, "chosen", 2, chosen);
  check_dtype(chosen, op, "chosen", ScalarType::Long);
  check_tensor(where, op, "where", 2, chosen);
  check_dtype(where, op, "where", ScalarType::Long);
  check_size(where, op, "where", 0, 2);
  check_tensor(weights, op, "weights", 2, chosen);
  check_dtype(weights, op, "weights", ScalarType::Float);
  const int64_t tokens = chosen.size(0), slots = chosen.size(1);
  check_size(weights, op, "weights", 0, tokens);
  check_size(weights, op, "weights", 1, slots);
  STD_TORCH_CHECK(ranks >= 1 && ranks <= kMaxRanks, op, ": between 1 and ", kMaxRanks,
                  " ranks, not ", ranks);
  const int64_t num_experts = where.size(1) - 1;
  STD_TORCH_CHECK(num_experts <= kMostExperts, op, ": at most ", kMostExperts, " experts, not ",
                  num_experts);

  const DeviceGuard guard(chosen.get_device_index());
  using torch::stable::new_empty;
  Tensor keys = new_empty(chosen, {tokens * ranks}, ScalarType::Long);
  Tensor packed = new_empty(chosen, {tokens * ranks, slots * 2 * kIdBytes}, ScalarType::Byte);
  Tensor owner = new_empty(chosen, {tokens, slots}, ScalarType::Int);
  Tensor counts = torch::stable::new_zeros(chosen, {num_experts}, ScalarType::Long);
  if (tokens > 0) {
    pairs_kernel<<<grid_size(ceil_div(tokens, kBlock), op), kBlock,
                   static_cast<size_t>(num_experts) * sizeof(int), current_stream(chosen)>>>(
        static_cast<const int64_t*>(chosen.data_ptr()),
        static_cast<const int64_t*>(where.data_ptr()),
        static_cast<const float*>(weights.data_ptr()), static_cast<int64_t*>(keys.data_ptr()),
        static_cast<unsigned char*>(packed.data_ptr()), static_cast<int*>(owner.data_ptr()),
        static_cast<unsigned long long*>(counts.data_ptr()), tokens, static_cast<int>(slots),
        static_cast<int>(ranks), static_cast<int>(num_experts));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  auto [order, inverse, of_ranks, offsets] = sort_by_expert(keys, ranks + 1, ranks + 1);
  return {order, inverse, offsets, owner, packed, counts, of_ranks};
}

}  // namespace lightning_fastmoe
