// Reads what has arrived: tokens for this rank's experts, or what other ranks made of its own.
//
// Each rank's rows are in a block of their own, with room for `most` of them. Rows from a rank with
// number r that are the i-th of it are r * most + i in memory, and behind those of lower ranks where
// they are copied to.
#include <algorithm>

#include "../ops.h"
#include "ranks.cuh"
#include "words.cuh"

namespace lightning_fastmoe {
namespace {

constexpr int kIdBytes = 4;
constexpr int kBlocksPerMultiprocessor = 8;

// Where the rows of each rank end. By value, because the host knows them.
struct Ends {
  int64_t end[kMaxRanks];
  int ranks;
};

// A row's rank, and its number among that rank's.
struct Source {
  int rank;
  int64_t row;
};

__device__ __forceinline__ Source source_of(const Ends& ends, int64_t row) {
  Source source{0, row};
  for (int r = 1; r < ends.ranks; ++r) {
    if (row < ends.end[r - 1]) break;
    source = {r, row - ends.end[r - 1]};
  }
  return source;
}

// What came with the rows: for each slot the number of its expert, -1 if another rank's, then the
// slots' weights.
struct Packed {
  const unsigned char* from;
  int64_t block_bytes;
  float* weights;  // (rows, slots)
  int64_t* keys;   // (rows, slots)
  int slots;
  int num_local;
};

// A warp per row.
template <typename Word>
__global__ void __launch_bounds__(kBlock)
    receive_kernel(const unsigned char* __restrict__ from, int64_t block_bytes,
                   unsigned char* __restrict__ out, int64_t row_bytes,
                   const __grid_constant__ Ends ends, const __grid_constant__ Packed packed,
                   int* __restrict__ ends_out) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  if (warp == 0 && lane < ends.ranks) ends_out[lane] = static_cast<int>(ends.end[lane]);
  const int64_t width = row_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t row = warp; row < ends.end[ends.ranks - 1]; row += warps) {
    const Source source = source_of(ends, row);
    const unsigned char* of_row =
        packed.from + source.rank * packed.block_bytes + source.row * packed.slots * 2 * kIdBytes;
    for (int k = lane; k < packed.slots; k += kWarpSize) {
      const int id = reinterpret_cast<const int*>(of_row)[k];
      packed.keys[row * packed.slots + k] = id < 0 ? packed.num_local : id;
      packed.weights[row * packed.slots + k] =
          reinterpret_cast<const float*>(of_row)[packed.slots + k];
    }
    copy_row<Word>(from + source.rank * block_bytes + source.row * row_bytes,
                   out + row * row_bytes, width, lane);
  }
}

// A thread per pair, of which inverse has the place among all, by rank, and offsets (R + 1,) where
// each rank's end.
__global__ void __launch_bounds__(kBlock)
    places_kernel(const int64_t* __restrict__ inverse, const int* __restrict__ offsets,
                  int64_t* __restrict__ places, int64_t pairs, int ranks, int64_t most) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= pairs) return;
  const int rank = static_cast<int>(i % ranks);
  const int64_t begin = rank == 0 ? 0 : offsets[rank - 1], place = inverse[i];
  places[i] = place < offsets[ranks - 1] ? place - begin + rank * most : -1;
}

// A thread per slot: its element of its pair's K, where the slot's rank sent that back.
__global__ void __launch_bounds__(kBlock)
    slots_kernel(const unsigned char* __restrict__ from, int64_t block_bytes,
                 const int64_t* __restrict__ inverse, const int* __restrict__ offsets,
                 const int* __restrict__ owner, float* __restrict__ out, int64_t tokens, int slots,
                 int ranks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= tokens * slots) return;
  const int rank = owner[i];
  float value = 0.0f;
  if (rank < ranks) {
    const int64_t begin = rank == 0 ? 0 : offsets[rank - 1];
    const int64_t row = inverse[i / slots * ranks + rank] - begin;
    const auto* block = reinterpret_cast<const float*>(from + rank * block_bytes);
    value = block[row * slots + i % slots];
  }
  out[i] = value;
}

void check_plan(const Tensor& inverse, const Tensor& offsets, const char* op, const Tensor& like) {
  check_tensor(inverse, op, "inverse", 1, like);
  check_dtype(inverse, op, "inverse", ScalarType::Long);
  check_tensor(offsets, op, "offsets", 1, like);
  check_dtype(offsets, op, "offsets", ScalarType::Int);
}

void check_blocks(const Tensor& memory, int64_t at, int64_t ranks, int64_t block_bytes,
                  const char* op) {
  STD_TORCH_CHECK(block_bytes % kVectorBytes == 0, op, ": blocks must be multiples of ",
                  kVectorBytes, " bytes, not ", block_bytes);
  check_range(memory, at, ranks * block_bytes, op);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_receive(
    const Tensor& memory, int64_t at, int64_t block_bytes, int64_t row_bytes,
    std::vector<int64_t> counts, int64_t packed_at, int64_t packed_block_bytes, int64_t slots,
    int64_t num_local) {
  const char* op = "exchange_receive";
  check_tensor(memory, op, "memory", 1, memory);
  check_dtype(memory, op, "memory", ScalarType::Byte);
  const int64_t ranks = static_cast<int64_t>(counts.size());
  STD_TORCH_CHECK(ranks >= 1 && ranks <= kMaxRanks, op, ": between 1 and ", kMaxRanks,
                  " ranks, not ", ranks);
  check_blocks(memory, at, ranks, block_bytes, op);
  check_blocks(memory, packed_at, ranks, packed_block_bytes, op);
  Ends ends{{}, static_cast<int>(ranks)};
  int64_t rows = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    const int64_t count = counts[static_cast<size_t>(r)];
    STD_TORCH_CHECK(count >= 0 && count * row_bytes <= block_bytes &&
                        count * slots * 2 * kIdBytes <= packed_block_bytes,
                    op, ": ", count, " rows are more than a rank sends");
    rows += count;
    ends.end[r] = rows;
  }
  const DeviceGuard guard(memory.get_device_index());
  using torch::stable::new_empty;
  Tensor out = new_empty(memory, {rows, row_bytes});
  Tensor weights = new_empty(memory, {rows, slots}, ScalarType::Float);
  Tensor keys = new_empty(memory, {rows, slots}, ScalarType::Long);
  Tensor ends_out = new_empty(memory, {ranks}, ScalarType::Int);
  const auto* begin = static_cast<const unsigned char*>(memory.data_ptr());
  const Packed packed{begin + packed_at,
                      packed_block_bytes,
                      static_cast<float*>(weights.data_ptr()),
                      static_cast<int64_t*>(keys.data_ptr()),
                      static_cast<int>(slots),
                      static_cast<int>(num_local)};
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                        memory.get_device_index()));
  const unsigned blocks = static_cast<unsigned>(
      std::min<int64_t>(std::max<int64_t>(1, ceil_div(rows, kWarpsPerBlock)),
                        int64_t{kBlocksPerMultiprocessor} * multiprocessors));
  for_word(row_bytes, {begin + at, out.data_ptr()}, [&](auto word) {
    receive_kernel<decltype(word)><<<blocks, kBlock, 0, current_stream(memory)>>>(
        begin + at, block_bytes, static_cast<unsigned char*>(out.data_ptr()), row_bytes, ends,
        packed, static_cast<int*>(ends_out.data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, weights, keys, ends_out};
}

Tensor exchange_sums(const Tensor& rows, const Tensor& inverse, const Tensor& offsets,
                     int64_t most) {
  const char* op = "exchange_sums";
  check_tensor(rows, op, "rows", 2, rows);
  check_plan(inverse, offsets, op, rows);
  const int64_t ranks = offsets.size(0) - 1, pairs = inverse.size(0);
  STD_TORCH_CHECK(ranks >= 1 && ranks * most <= rows.size(0) && pairs % ranks == 0, op, ": ", ranks,
                  " ranks with ", most, " rows each don't fit to ", rows.size(0), " rows and ",
                  pairs, " pairs");
  const DeviceGuard guard(rows.get_device_index());
  Tensor places = torch::stable::empty_like(inverse);
  if (pairs > 0) {
    places_kernel<<<grid_size(ceil_div(pairs, kBlock), op), kBlock, 0, current_stream(rows)>>>(
        static_cast<const int64_t*>(inverse.data_ptr()),
        static_cast<const int*>(offsets.data_ptr()), static_cast<int64_t*>(places.data_ptr()),
        pairs, static_cast<int>(ranks), most);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return sum_rows(rows, places, std::nullopt, ranks, std::nullopt, std::nullopt);
}

Tensor exchange_slots(const Tensor& memory, int64_t at, int64_t block_bytes, const Tensor& inverse,
                      const Tensor& offsets, const Tensor& owner) {
  const char* op = "exchange_slots";
  check_tensor(memory, op, "memory", 1, memory);
  check_dtype(memory, op, "memory", ScalarType::Byte);
  check_plan(inverse, offsets, op, memory);
  check_tensor(owner, op, "owner", 2, memory);
  check_dtype(owner, op, "owner", ScalarType::Int);
  const int64_t ranks = offsets.size(0) - 1, tokens = owner.size(0), slots = owner.size(1);
  check_size(inverse, op, "inverse", 0, tokens * ranks);
  check_blocks(memory, at, ranks, block_bytes, op);
  const DeviceGuard guard(memory.get_device_index());
  Tensor out = torch::stable::new_empty(owner, {tokens, slots}, ScalarType::Float);
  if (tokens * slots > 0) {
    slots_kernel<<<grid_size(ceil_div(tokens * slots, kBlock), op), kBlock, 0,
                   current_stream(memory)>>>(
        static_cast<const unsigned char*>(memory.data_ptr()) + at, block_bytes,
        static_cast<const int64_t*>(inverse.data_ptr()),
        static_cast<const int*>(offsets.data_ptr()), static_cast<const int*>(owner.data_ptr()),
        static_cast<float*>(out.data_ptr()), tokens, static_cast<int>(slots),
        static_cast<int>(ranks));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

}  // namespace lightning_fastmoe
