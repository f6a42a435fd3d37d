// A stable counting sort of the T*K (token, slot) pairs by expert, in three launches:
//
//   1. count_kernel: each block counts the ids of its own range, per expert;
//   2. scan_kernel: per expert, a running sum over the blocks;
//   3. place_kernel: each block gives its pairs their rows.
//
// No atomics anywhere: a lane finds its place among equal ids by ballots, warps and blocks theirs
// by running sums. Each pair's row is thus a function of the ids alone, whatever runs first.
#include <cassert>

#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kMaxExperts = 1024;
constexpr int kIdsPerLane = 8;
constexpr int kIdsPerWarp = kIdsPerLane * kWarpSize;
constexpr int kIdsPerBlock = kIdsPerWarp * kWarpsPerBlock;

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

// Walks the ids of this warp in order. Afterwards `counts[e]` holds the warp's number of ids e, and
// rank[i] the number of equal ids before the i-th id of this lane, inside the warp's range.
__device__ __forceinline__ void rank_in_warp(const int64_t* __restrict__ ids, int64_t first,
                                             int64_t total, int num_experts, int id_bits,
                                             int* counts, int (&id)[kIdsPerLane],
                                             int (&rank)[kIdsPerLane]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kIdsPerLane; ++i) {
    const int64_t pair = first + i * kWarpSize + lane;
    const int64_t value = pair < total ? ids[pair] : 0;
    assert(value >= 0 && value < num_experts && "an expert id is outside [0, num_experts)");
    id[i] = static_cast<int>(value);
  }
#pragma unroll
  for (int i = 0; i < kIdsPerLane; ++i) {
    const bool active = first + i * kWarpSize + lane < total;
    const unsigned same = lanes_with(id[i], active, id_bits);
    const unsigned before = same & ((1u << lane) - 1u);
    rank[i] = active ? counts[id[i]] + __popc(before) : 0;
    __syncwarp();  // all have read the old count
    if (active && before == 0) counts[id[i]] += __popc(same);
    __syncwarp();  // the next round sees the new one
  }
}

__device__ __forceinline__ void clear(int* counts, int size) {
  for (int i = threadIdx.x; i < size; i += kBlock) counts[i] = 0;
  __syncthreads();
}

__global__ void __launch_bounds__(kBlock)
    count_kernel(const int64_t* __restrict__ ids, int* __restrict__ block_counts, int64_t total,
                 int num_experts, int id_bits) {
  extern __shared__ int counts[];  // (warps, E)
  clear(counts, kWarpsPerBlock * num_experts);
  const int warp = threadIdx.x / kWarpSize;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kIdsPerBlock + static_cast<int64_t>(warp) * kIdsPerWarp;
  int id[kIdsPerLane], rank[kIdsPerLane];
  rank_in_warp(ids, first, total, num_experts, id_bits, counts + warp * num_experts, id, rank);
  __syncthreads();
  for (int expert = threadIdx.x; expert < num_experts; expert += kBlock) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarpsPerBlock; ++w) sum += counts[w * num_experts + expert];
    // (E, blocks), so that the scan of one expert reads memory in sequence.
    block_counts[static_cast<int64_t>(expert) * gridDim.x + blockIdx.x] = sum;
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

// One block per expert: counts become the number of that expert's ids in earlier blocks.
__global__ void __launch_bounds__(kBlock)
    scan_kernel(int* __restrict__ block_counts, int64_t* __restrict__ tokens_per_expert,
                int blocks) {
  int* row = block_counts + static_cast<int64_t>(blockIdx.x) * blocks;
  int running = 0;
  for (int start = 0; start < blocks; start += kBlock) {
    const int i = start + threadIdx.x;
    int total = 0;
    const int before = block_exclusive_scan(i < blocks ? row[i] : 0, &total);
    if (i < blocks) row[i] = running + before;
    running += total;
  }
  if (threadIdx.x == 0) tokens_per_expert[blockIdx.x] = running;
}

__global__ void __launch_bounds__(kBlock)
    place_kernel(const int64_t* __restrict__ ids, const int* __restrict__ earlier_blocks,
                 const int64_t* __restrict__ tokens_per_expert, int64_t* __restrict__ order,
                 int64_t* __restrict__ inverse, int* __restrict__ offsets, int64_t total,
                 int num_experts, int id_bits) {
  extern __shared__ int counts[];  // (warps, E): first counts, then each warp's first row
  clear(counts, kWarpsPerBlock * num_experts);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kIdsPerBlock + static_cast<int64_t>(warp) * kIdsPerWarp;
  int id[kIdsPerLane], rank[kIdsPerLane];
  rank_in_warp(ids, first, total, num_experts, id_bits, counts + warp * num_experts, id, rank);
  __syncthreads();

  // Where each expert begins is cheaper to sum here, E numbers per block, than to launch for.
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
      int row = before + earlier_blocks[static_cast<int64_t>(expert) * gridDim.x + blockIdx.x];
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
#pragma unroll
  for (int i = 0; i < kIdsPerLane; ++i) {
    const int64_t pair = first + i * kWarpSize + lane;
    if (pair < total) {
      const int64_t row = counts[warp * num_experts + id[i]] + rank[i];
      inverse[pair] = row;
      order[row] = pair;
    }
  }
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
  // Without pairs one block still runs, and writes counts and offsets of zero.
  const int64_t blocks = total == 0 ? 1 : ceil_div(total, kIdsPerBlock);
  Tensor block_counts =
      torch::stable::new_empty(expert_ids, {num_experts, blocks}, ScalarType::Int);

  int id_bits = 0;
  while ((int64_t{1} << id_bits) < num_experts) ++id_bits;
  const int experts = static_cast<int>(num_experts);
  const unsigned grid = grid_size(blocks, op);
  const size_t shared = sizeof(int) * kWarpsPerBlock * num_experts;
  const cudaStream_t stream = current_stream(expert_ids);
  const auto* ids = static_cast<const int64_t*>(expert_ids.data_ptr());
  auto* counts = static_cast<int*>(block_counts.data_ptr());
  auto* per_expert = static_cast<int64_t*>(tokens_per_expert.data_ptr());
  count_kernel<<<grid, kBlock, shared, stream>>>(ids, counts, total, experts, id_bits);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  scan_kernel<<<experts, kBlock, 0, stream>>>(counts, per_expert, static_cast<int>(blocks));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  place_kernel<<<grid, kBlock, shared, stream>>>(
      ids, counts, per_expert, static_cast<int64_t*>(order.data_ptr()),
      static_cast<int64_t*>(inverse.data_ptr()), static_cast<int*>(offsets.data_ptr()), total,
      experts, id_bits);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {order, inverse, tokens_per_expert, offsets};
}

}  // namespace lightning_fastmoe
