// A stable counting sort of the T*K (token, slot) pairs by expert, in one launch whose phases are
// separated by grid barriers:
//
//   1. each block counts the ids of its own range, per expert and warp;
//   2. per expert, prefix sums over the blocks: with few counts each block computes its own; with
//      many the blocks divide the experts among themselves, which takes another grid barrier;
//   3. each block assigns rows to its pairs.
//
// There are no atomics on counts: a lane finds its rank among equal ids by ballots, and warps and
// blocks find theirs by prefix sums. So each pair's row depends only on the ids, not on the order
// in which blocks run.
//
// There is little data, so the time is the latency of dependent operations. Loads are issued in
// batches, and a warp keeps what it computed about its own ids for the last phase.
#include <cassert>

#include "common.cuh"
#include "deadline.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kMaxExperts = 1024;
constexpr int kIdsPerLane = 8;
constexpr int kIdsPerWarpStep = kIdsPerLane * kWarpSize;
// Experts times blocks up to which each block reads all counts, to save a grid barrier.
constexpr int kFewCounts = 16384;

// A warp's next pairs, kWarpSize apart in a lane.
struct Step {
  int64_t first;  // of this lane
  int64_t last;
  int id[kIdsPerLane];
  int rank[kIdsPerLane];  // how many of the warp's earlier pairs have the same expert

  __device__ __forceinline__ int64_t pair(int i) const { return first + i * kWarpSize; }
  __device__ __forceinline__ bool exists(int i) const { return pair(i) < last; }

  __device__ __forceinline__ void load_ids(const int64_t* __restrict__ ids, int num_experts) {
    // No check between these loads, otherwise each would wait for the previous one.
    int64_t value[kIdsPerLane];
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) value[i] = exists(i) ? ids[pair(i)] : 0;
    bool valid = true;
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      valid = valid && value[i] >= 0 && value[i] < num_experts;
      id[i] = static_cast<int>(value[i]);
    }
    assert(valid && "an expert id is outside [0, num_experts)");
  }

  // Finds each pair's rank, and adds this step to the warp's `counts`.
  __device__ __forceinline__ void count(int id_bits, int* counts) {
    const unsigned lower = (1u << threadIdx.x % kWarpSize) - 1u;
    unsigned same[kIdsPerLane];  // lanes with this lane's id
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) same[i] = __ballot_sync(kAllLanes, exists(i));
    for (int bit = 0; bit < id_bits; ++bit) {
#pragma unroll
      for (int i = 0; i < kIdsPerLane; ++i) {
        const bool set = (id[i] >> bit) & 1;
        const unsigned lanes = __ballot_sync(kAllLanes, set);
        same[i] &= set ? lanes : ~lanes;
      }
    }
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      const unsigned before = same[i] & lower;
      const int old = exists(i) ? counts[id[i]] : 0;
      rank[i] = old + __popc(before);
      __syncwarp();  // all have read the old count
      if (exists(i) && before == 0) counts[id[i]] = old + __popc(same[i]);
      __syncwarp();  // the next iteration sees the new one
    }
  }

  // Assigns rows to the pairs. `rows`: the first row of the warp's pairs, per expert. Pairs of
  // experts from `kept` on have none.
  __device__ __forceinline__ void finish(const int* rows, int kept, int64_t* __restrict__ order,
                                         int64_t* inverse) const {
#pragma unroll
    for (int i = 0; i < kIdsPerLane; ++i) {
      if (!exists(i)) continue;
      const int64_t row = rows[id[i]] + rank[i];
      inverse[pair(i)] = id[i] < kept ? row : -1;
      order[row] = pair(i);
    }
  }
};

// The pairs [first, last) of a warp, step by step. Between count() and finish() the last step,
// usually the only one, stays in registers; the ranks of earlier steps are stored in `inverse`.
struct WarpPairs {
  int64_t first;
  int64_t last;
  Step step;

  __device__ __forceinline__ WarpPairs(int64_t first_, int64_t last_)
      : first(first_), last(last_) {}

  // False at the end.
  __device__ __forceinline__ bool at(int64_t begin) {
    step.first = begin + threadIdx.x % kWarpSize;
    step.last = last;
    return begin < last;
  }
  __device__ __forceinline__ bool is_last(int64_t begin) const {
    return begin + kIdsPerWarpStep >= last;
  }

  __device__ __forceinline__ void count(const int64_t* __restrict__ ids, int num_experts,
                                        int id_bits, int* counts, int64_t* inverse) {
    for (int64_t begin = first; at(begin); begin += kIdsPerWarpStep) {
      step.load_ids(ids, num_experts);
      step.count(id_bits, counts);
      if (is_last(begin)) break;
#pragma unroll
      for (int i = 0; i < kIdsPerLane; ++i) inverse[step.pair(i)] = step.rank[i];
    }
  }

  __device__ __forceinline__ void finish(const int64_t* __restrict__ ids, int num_experts, int kept,
                                         const int* rows, int64_t* __restrict__ order,
                                         int64_t* inverse) {
    if (first >= last) return;
    step.finish(rows, kept, order, inverse);
    for (int64_t begin = first; at(begin) && !is_last(begin); begin += kIdsPerWarpStep) {
      step.load_ids(ids, num_experts);
#pragma unroll
      for (int i = 0; i < kIdsPerLane; ++i) step.rank[i] = static_cast<int>(inverse[step.pair(i)]);
      step.finish(rows, kept, order, inverse);
    }
  }
};

// Exclusive prefix sum over the block; `total` is the sum of all. Every thread must take part.
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

// The counts of one expert.
struct Counts {
  int all;
  int before;  // in earlier blocks
};

// Sums the counts of all blocks, (blocks, E), into `counts`, (E,), expert by expert. Every thread
// must take part.
__device__ __forceinline__ void sum_all_blocks(const int* block_counts, int num_experts,
                                               Counts* counts) {
  __shared__ Counts shares[kBlock];
  constexpr int kInFlight = 8;  // loads
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  for (int start = 0; start < num_experts; start += kBlock) {
    // With few experts, several threads share the blocks of each.
    const int width = min(kBlock, num_experts - start), threads = kBlock / width;
    const int share = thread / width, expert = thread - share * width;
    Counts sum{0, 0};
    for (int first = share; share < threads && first < blocks; first += kInFlight * threads) {
      int count[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int from = first + i * threads;
        count[i] = from < blocks ? block_counts[from * num_experts + start + expert] : 0;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        sum.all += count[i];
        if (first + i * threads < block) sum.before += count[i];
      }
    }
    shares[thread] = sum;
    __syncthreads();
    if (thread < width) {
      for (int other = 1; other < threads; ++other) {
        sum.all += shares[other * width + thread].all;
        sum.before += shares[other * width + thread].before;
      }
      counts[start + thread] = sum;
    }
    __syncthreads();
  }
}

// Replaces the counts of one expert, one per block, by their exclusive prefix sum: the number of
// its ids in earlier blocks. Returns the sum of all. By one warp.
__device__ __forceinline__ int scan_over_blocks(int* block_counts, int num_experts, int blocks) {
  constexpr int kInFlight = 5;  // loads: enough for 160 blocks
  const int lane = threadIdx.x % kWarpSize;
  int running = 0;
  for (int start = lane; start - lane < blocks; start += kInFlight * kWarpSize) {
    int count[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int block = start + i * kWarpSize;
      count[i] = block < blocks ? block_counts[static_cast<int64_t>(block) * num_experts] : 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int block = start + i * kWarpSize;
      const int inclusive = warp_inclusive_scan(count[i]);
      if (block < blocks) {
        block_counts[static_cast<int64_t>(block) * num_experts] = running + inclusive - count[i];
      }
      running += __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
    }
  }
  return running;
}

// block_counts is (blocks, E); arrived is zero.
__global__ void __launch_bounds__(kBlock)
    sort_kernel(const int64_t* __restrict__ ids, int* block_counts, int64_t* tokens_per_expert,
                int64_t* __restrict__ order, int64_t* inverse, int* __restrict__ offsets,
                int64_t total, int64_t ids_per_warp, int num_experts, int kept, int id_bits,
                unsigned* arrived, const __grid_constant__ Deadline deadline) {
  // (warps, E): first each warp's counts, then its next rows; and (E,), those of all blocks.
  extern __shared__ int counts[];
  Counts* const of_experts = reinterpret_cast<Counts*>(counts + kWarpsPerBlock * num_experts);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int blocks = static_cast<int>(gridDim.x);
  const int64_t global_warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  const int64_t first = min(global_warp * ids_per_warp, total);
  WarpPairs pairs(first, min(first + ids_per_warp, total));
  int* mine = counts + warp * num_experts;
  int* of_block = block_counts + static_cast<int64_t>(blockIdx.x) * num_experts;

  for (int i = lane; i < num_experts; i += kWarpSize) mine[i] = 0;
  __syncwarp();
  pairs.count(ids, num_experts, id_bits, mine, inverse);
  __syncthreads();
  for (int expert = threadIdx.x; expert < num_experts; expert += kBlock) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarpsPerBlock; ++w) sum += counts[w * num_experts + expert];
    of_block[expert] = sum;
  }
  grid_sync(arrived, 1, deadline);

  if (num_experts * blocks <= kFewCounts) {
    sum_all_blocks(block_counts, num_experts, of_experts);
    if (blockIdx.x == 0) {
      for (int expert = threadIdx.x; expert < num_experts; expert += kBlock) {
        tokens_per_expert[expert] = of_experts[expert].all;
      }
    }
  } else {
    for (int64_t expert = global_warp; expert < num_experts; expert += blocks * kWarpsPerBlock) {
      const int sum = scan_over_blocks(block_counts + expert, num_experts, blocks);
      if (lane == 0) tokens_per_expert[expert] = sum;
    }
    grid_sync(arrived, 2, deadline);
    for (int expert = threadIdx.x; expert < num_experts; expert += kBlock) {
      of_experts[expert] = {static_cast<int>(tokens_per_expert[expert]), of_block[expert]};
    }
    __syncthreads();
  }

  // Summing E numbers in every block, to find where each expert begins, is cheaper than another
  // grid barrier.
  int running = 0;
  for (int start = 0; start < num_experts; start += kBlock) {
    const int expert = start + threadIdx.x;
    const bool exists = expert < num_experts;
    const Counts found = exists ? of_experts[expert] : Counts{0, 0};
    int sum = 0;
    const int before = running + block_exclusive_scan(found.all, &sum);
    running += sum;
    if (exists) {
      if (blockIdx.x == 0) offsets[expert] = before + found.all;
      int row = before + found.before;
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
  pairs.finish(ids, num_experts, kept, mine, order, inverse);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> sort_by_expert(const Tensor& expert_ids,
                                                          int64_t num_experts, int64_t kept) {
  const char* op = "sort_by_expert";
  Deadline deadline = deadline_for(op);
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
  // The whole grid must be resident at once; one block per multiprocessor always is. Without pairs
  // one block still runs, and writes zero counts and offsets.
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                        expert_ids.get_device_index()));
  const int64_t warp_steps = ceil_div(total, kIdsPerWarpStep);
  const int64_t most_blocks = std::max<int64_t>(1, ceil_div(warp_steps, kWarpsPerBlock));
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(multiprocessors, most_blocks));
  int64_t ids_per_warp = kIdsPerWarpStep * ceil_div(warp_steps, blocks * kWarpsPerBlock);
  Tensor workspace = torch::stable::new_empty(
      expert_ids, {static_cast<int64_t>(blocks) * num_experts + 1}, ScalarType::Int);

  int id_bits = 0;
  while ((int64_t{1} << id_bits) < num_experts) ++id_bits;
  int experts = static_cast<int>(num_experts);
  int with_rows = static_cast<int>(std::min(kept, num_experts));
  int64_t pairs = total;
  const auto* ids = static_cast<const int64_t*>(expert_ids.data_ptr());
  auto* counts = static_cast<int*>(workspace.data_ptr());
  auto* arrived = reinterpret_cast<unsigned*>(counts + blocks * num_experts);
  auto* per_expert = static_cast<int64_t*>(tokens_per_expert.data_ptr());
  auto* order_out = static_cast<int64_t*>(order.data_ptr());
  auto* inverse_out = static_cast<int64_t*>(inverse.data_ptr());
  auto* offsets_out = static_cast<int*>(offsets.data_ptr());
  void* arguments[] = {&ids,   &counts,       &per_expert, &order_out, &inverse_out, &offsets_out,
                       &pairs, &ids_per_warp, &experts,    &with_rows, &id_bits,     &arrived,     &deadline};
  const size_t shared = (sizeof(int) * kWarpsPerBlock + sizeof(Counts)) * num_experts;
  const cudaStream_t stream = current_stream(expert_ids);
  STD_CUDA_CHECK(cudaMemsetAsync(arrived, 0, sizeof(*arrived), stream));
  STD_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&sort_kernel),
                                             dim3(blocks), dim3(kBlock), arguments, shared,
                                             stream));
  return {order, inverse, tokens_per_expert, offsets};
}

}  // namespace lightning_fastmoe
