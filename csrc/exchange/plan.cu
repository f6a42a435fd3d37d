// What a rank sends where, and where in memory it finds what comes back.
//
// A pair is a (token, rank): number t * R + r. It is sent if one of the token's experts is on that
// rank. Pairs are sorted by rank with sort_by_expert between these kernels.
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

// A thread per pair, then per slot. inverse: the place of each pair among all, by rank; offsets
// (R + 1,): where each rank's pairs end.
__global__ void __launch_bounds__(kBlock)
    places_kernel(const int64_t* __restrict__ inverse, const int* __restrict__ offsets,
                  const int* __restrict__ owner, int64_t* __restrict__ places,
                  int64_t* __restrict__ slot_places, int64_t tokens, int slots, int ranks,
                  int64_t most) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i < tokens * ranks) {
    const int rank = static_cast<int>(i % ranks);
    const int64_t begin = rank == 0 ? 0 : offsets[rank - 1];
    const int64_t place = inverse[i];
    places[i] = place < offsets[ranks - 1] ? place - begin + rank * most : -1;
  }
  if (i < tokens * slots) {
    const int64_t t = i / slots;
    const int rank = owner[i];
    slot_places[i] = rank < ranks ? inverse[t * ranks + rank] * slots + i % slots : -1;
  }
}

// A thread per slot of the rows that came: `most` rows of row_bytes from each rank, its block of a
// size of block_bytes; ends (R,): where each rank's rows end.
__global__ void __launch_bounds__(kBlock)
    unpack_kernel(const unsigned char* __restrict__ from, const int* __restrict__ ends,
                  float* __restrict__ weights, int64_t* __restrict__ keys, int64_t rows, int slots,
                  int ranks, int64_t block_bytes, int num_local) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= rows * slots) return;
  const int64_t row = i / slots;
  const int rank = static_cast<int>(expert_of(ends, ranks, row));
  const int64_t in_rank = rank == 0 ? row : row - ends[rank - 1];
  const unsigned char* packed = from + rank * block_bytes + in_rank * slots * 2 * kIdBytes;
  const int k = static_cast<int>(i % slots);
  const int id = reinterpret_cast<const int*>(packed)[k];
  keys[i] = id < 0 ? num_local : id;
  weights[i] = reinterpret_cast<const float*>(packed)[slots + k];
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_pairs(const Tensor& chosen, const Tensor& where,
                                                          const Tensor& weights, int64_t ranks) {
  const char* op = "exchange_pairs";
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
  return {keys, packed, owner, counts};
}

std::tuple<Tensor, Tensor> exchange_places(const Tensor& inverse, const Tensor& offsets,
                                           const Tensor& owner, int64_t most) {
  const char* op = "exchange_places";
  check_tensor(inverse, op, "inverse", 1, inverse);
  check_dtype(inverse, op, "inverse", ScalarType::Long);
  check_tensor(offsets, op, "offsets", 1, inverse);
  check_dtype(offsets, op, "offsets", ScalarType::Int);
  check_tensor(owner, op, "owner", 2, inverse);
  check_dtype(owner, op, "owner", ScalarType::Int);
  const int64_t ranks = offsets.size(0) - 1, tokens = owner.size(0), slots = owner.size(1);
  check_size(inverse, op, "inverse", 0, tokens * ranks);

  const DeviceGuard guard(inverse.get_device_index());
  Tensor places = torch::stable::empty_like(inverse);
  Tensor slot_places = torch::stable::new_empty(inverse, {tokens * slots}, ScalarType::Long);
  const int64_t threads = tokens * (ranks > slots ? ranks : slots);
  if (threads > 0) {
    places_kernel<<<grid_size(ceil_div(threads, kBlock), op), kBlock, 0, current_stream(inverse)>>>(
        static_cast<const int64_t*>(inverse.data_ptr()),
        static_cast<const int*>(offsets.data_ptr()), static_cast<const int*>(owner.data_ptr()),
        static_cast<int64_t*>(places.data_ptr()), static_cast<int64_t*>(slot_places.data_ptr()),
        tokens, static_cast<int>(slots), static_cast<int>(ranks), most);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {places, slot_places};
}

std::tuple<Tensor, Tensor> exchange_unpack(const Tensor& memory, int64_t at, int64_t block_bytes,
                                           const Tensor& ends, int64_t rows, int64_t slots,
                                           int64_t num_local) {
  const char* op = "exchange_unpack";
  check_tensor(memory, op, "memory", 1, memory);
  check_dtype(memory, op, "memory", ScalarType::Byte);
  check_tensor(ends, op, "ends", 1, memory);
  check_dtype(ends, op, "ends", ScalarType::Int);
  const int64_t ranks = ends.size(0);
  STD_TORCH_CHECK(at >= 0 && at % kIdBytes == 0 && block_bytes >= 0 &&
                      block_bytes % kIdBytes == 0 && at + ranks * block_bytes <= memory.size(0),
                  op, ": ", ranks, " blocks of ", block_bytes, " bytes from byte ", at,
                  " are not in the memory of ", memory.size(0));

  const DeviceGuard guard(memory.get_device_index());
  Tensor weights = torch::stable::new_empty(memory, {rows, slots}, ScalarType::Float);
  Tensor keys = torch::stable::new_empty(memory, {rows, slots}, ScalarType::Long);
  if (rows * slots > 0) {
    unpack_kernel<<<grid_size(ceil_div(rows * slots, kBlock), op), kBlock, 0,
                    current_stream(memory)>>>(
        static_cast<const unsigned char*>(memory.data_ptr()) + at,
        static_cast<const int*>(ends.data_ptr()), static_cast<float*>(weights.data_ptr()),
        static_cast<int64_t*>(keys.data_ptr()), rows, static_cast<int>(slots),
        static_cast<int>(ranks), block_bytes, static_cast<int>(num_local));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {weights, keys};
}

}  // namespace lightning_fastmoe
