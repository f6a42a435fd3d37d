// A stable counting sort of the T*K (token, slot) pairs by expert, in one launch of three phases
// with the whole grid meeting in between:
//
//   1. each block counts the ids of its own range, per expert and warp;
//   2. per expert, a running sum over the blocks;
//   3. each block gives its pairs their rows.
//
// Nothing is added to memory by more than one thread: a lane finds its place among equal ids by
// ballots, warps and blocks theirs by running sums. Each pair's row is thus a function of the ids
// alone, whatever runs first.
#include "common.cuh"
#include "ops.h"

// After torch's headers: its warnings about them would be ours otherwise.
#include <cooperative_groups.h>

#include <cassert>

namespace lightning_fastmoe {
namespace {

constexpr int kMaxExperts = 1024;
constexpr int kIdsPerLane = 8;
constexpr int kIdsPerWarpStep = kIdsPerLane * kWarpSize;

// Lanes whose `id` is mine, among those that are `active` (inactive lanes get 0).
__device__ __forceinline__ unsigned lanes_with(int id, bool active, int id_bits) {
  unsigned same = __ballot_sync(kAllLanes, active);
  for (int bit = 0; bit < id_bits; ++bit) {
    const bool set = (id >> bit) & 1;
    const unsigned lanes = __ballot_sync(kAllLanes, set);
    same &= set ? lanes : ~lanes;
  }
  return active ? same : 0u;
}

// Walks the ids [first, last) of this warp in order. `counts[e]` grows by the warp's number of ids
// e; each pair is visited with the value that it had before.
template <typename Visit>
__device__ __forceinline__ void walk(const int64_t* __restrict__ ids, int64_t first, int64_t last,
                                     int num_experts, int id_bits, int* counts, Visit&& visit) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t step = first; step < last; step += kIdsPerWarpStep) {
    int id[kIdsPerLane];
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      const int64_t pair = step + i * kWarpSize + lane;
      const int64_t value = pair < last ? ids[pair] : 0;
      assert(value >= 0 && value < num_experts && "an expert id is outside [0, num_experts)");
      id[i] = static_cast<int>(value);
    }
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      const int64_t pair = step + i * kWarpSize + lane;
      const bool active = pair < last;
      const unsigned same = lanes_with(id[i], active, id_bits);
      const unsigned before = same & ((1u << lane) - 1u);
      if (active) visit(pair, counts[id[i]] + __popc(before));
      __syncwarp();  // all have read the old count
      if (active && before == 0) counts[id[i]] += __popc(same);
      __syncwarp();  // the next round sees the new one
    }
  }
}

// Exclusive sum over the block; `total` is the sum of all. Every thread must take part.
__device__ __forceinline__ int block_exclusive_scan(int value, int* total) {
  __shared__ int warp_totals[kWarpsPerBlock];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int inclusive = warp_inclusive_scan(value);
  __syncthreads();  // the previous call's readers are done
  if (lane == kWarpSize - 1) warp_totals[warp] = inclusive;
  __syncthreads();
  int before = 0, sum = 0;
#pragma unroll
  for (int w = 0; w < kWarpsPerBlock; ++w) {
    if (w < warp) before += warp_totals[w];
    sum += warp_totals[w];
  }
  *total = sum;
  return before + inclusive - value;
}

// The counts of one expert, one per block, become the number of its ids in earlier blocks. One
// warp.
__device__ __forceinline__ int scan_over_blocks(int* block_counts, int blocks) {
  const int lane = threadIdx.x % kWarpSize;
  int running = 0;
  for (int start = 0; start < blocks; start += kWarpSize) {
    const int i = start + lane;
    const int count = i < blocks ? block_counts[i] : 0;
    const int inclusive = warp_inclusive_scan(count);
    if (i < blocks) block_counts[i] = running + inclusive - count;
    running += __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
  }
  return running;
}

// block_counts is (E, blocks), so that the scan of one expert reads memory in sequence.
__global__ void __launch_bounds__(kBlock)
    sort_kernel(const int64_t* __restrict__ ids, int* block_counts, int64_t* tokens_per_expert,
                int64_t* __restrict__ order, int64_t* __restrict__ inverse,
                int* __restrict__ offsets, int64_t total, int64_t ids_per_warp, int num_experts,
                int id_bits) {
  extern __shared__ int counts[];  // (warps, E): first counts, then each warp's next rows
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int blocks = static_cast<int>(gridDim.x);
  const int64_t global_warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  const int64_t first = min(global_warp * ids_per_warp, total);
  const int64_t last = min(first + ids_per_warp, total);
  int* mine = counts + warp * num_experts;

  for (int i = threadIdx.x; i < kWarpsPerBlock * num_experts; i += kBlock) counts[i] = 0;
  __syncthreads();
  walk(ids, first, last, num_experts, id_bits, mine, [](int64_t, int) {});
  __syncthreads();
  for (int expert = threadIdx.x; expert < num_experts; expert += kBlock) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarpsPerBlock; ++w) sum += counts[w * num_experts + expert];
    block_counts[static_cast<int64_t>(expert) * blocks + blockIdx.x] = sum;
  }
  grid.sync();

  for (int64_t expert = global_warp; expert < num_experts; expert += blocks * kWarpsPerBlock) {
    const int sum = scan_over_blocks(block_counts + expert * blocks, blocks);
    if (lane == 0) tokens_per_expert[expert] = sum;
  }
  grid.sync();

  // Where each expert begins is cheaper to sum here, E numbers per block, than to meet once more.
  int running = 0;
  for (int start = 0; start < num_experts; start += kBlock) {
    const int expert = start + threadIdx.x;
    const bool exists = expert < num_experts;
    const int count = exists ? static_cast<int>(tokens_per_expert[expert]) : 0;
    int sum = 0;
    const int before = running + block_exclusive_scan(count, &sum);
    running += sum;
    if (exists) {
      if (blockIdx.x == 0) offsets[expert] = before + count;
      int row = before + block_counts[static_cast<int64_t>(expert) * blocks + blockIdx.x];
#pragma unroll
      for (int w = 0; w < kWarpsPerBlock; ++w) {
        int* cell = counts + w * num_experts + expert;
        const int in_warp = *cell;
        *cell = row;
        row += in_warp;
      }
    }
  }
  __syncthreads();
  walk(ids, first, last, num_experts, id_bits, mine, [=](int64_t pair, int row) {
    inverse[pair] = row;
    order[row] = pair;
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> sort_by_expert(const Tensor& expert_ids,
                                                          int64_t num_experts) {
  const char* op = "sort_by_expert";
  check_tensor(expert_ids, op, "expert_ids", 1, expert_ids);
  check_dtype(expert_ids, op, "expert_ids", ScalarType::Long);
  const int64_t total = expert_ids.numel();
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, op,
                  ": num_experts must be between 1 and ", kMaxExperts, ", not ", num_experts);
  STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), op,
                  ": at most 2^31 - 1 pairs, not ", total);

  const DeviceGuard guard(expert_ids.get_device_index());
  Tensor order = torch::stable::empty_like(expert_ids);
  Tensor inverse = torch::stable::empty_like(expert_ids);
  Tensor tokens_per_expert = torch::stable::new_empty(expert_ids, {num_experts});
  Tensor offsets = torch::stable::new_empty(expert_ids, {num_experts}, ScalarType::Int);
  // The whole grid has to be on the device at once; one block on each processor always is. Without
  // pairs one block still runs, and writes counts and offsets of zero.
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                        expert_ids.get_device_index()));
  const int64_t warp_steps = ceil_div(total, kIdsPerWarpStep);
  const int64_t most_blocks = std::max<int64_t>(1, ceil_div(warp_steps, kWarpsPerBlock));
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(processors, most_blocks));
  int64_t ids_per_warp = kIdsPerWarpStep * ceil_div(warp_steps, blocks * kWarpsPerBlock);
  Tensor block_counts = torch::stable::new_empty(
      expert_ids, {num_experts, static_cast<int64_t>(blocks)}, ScalarType::Int);

  int id_bits = 0;
  while ((int64_t{1} << id_bits) < num_experts) ++id_bits;
  int experts = static_cast<int>(num_experts);
  int64_t pairs = total;
  const auto* ids = static_cast<const int64_t*>(expert_ids.data_ptr());
  auto* counts = static_cast<int*>(block_counts.data_ptr());
  auto* per_expert = static_cast<int64_t*>(tokens_per_expert.data_ptr());
  auto* order_out = static_cast<int64_t*>(order.data_ptr());
  auto* inverse_out = static_cast<int64_t*>(inverse.data_ptr());
  auto* offsets_out = static_cast<int*>(offsets.data_ptr());
  void* arguments[] = {&ids,         &counts, &per_expert,   &order_out, &inverse_out,
                       &offsets_out, &pairs,  &ids_per_warp, &experts,   &id_bits};
  const size_t shared = sizeof(int) * kWarpsPerBlock * num_experts;
  STD_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&sort_kernel),
                                             dim3(blocks), dim3(kBlock), arguments, shared,
                                             current_stream(expert_ids)));
  return {order, inverse, tokens_per_expert, offsets};
}

}  // namespace lightning_fastmoe
