// Reads what has arrived: tokens for this rank's experts, or what other ranks made of its own.
//
// Each rank's rows are in a block of their own, with room for `most` of them. Rows from a rank with
// number r that are the i-th of it are r * most + i in memory, and behind those of lower ranks where
// they are copied to.
#include <algorithm>

#include "../ops.h"
#include "waiting.cuh"
#include "words.cuh"

namespace lightning_fastmoe {
namespace {

constexpr int kIdBytes = 4;
constexpr int kBlocksPerMultiprocessor = 8;

// Where the rows of each rank end: by value where the host knows it.
struct Ends {
  int64_t end[kMaxRanks];
  const int* on_device;  // instead, (ranks,)
  int ranks;

  __device__ __forceinline__ int64_t of(int rank) const {
    return on_device == nullptr ? end[rank] : on_device[rank];
  }
};

// A row's rank, and its number among that rank's.
struct Source {
  int rank;
  int64_t row;
};

__device__ __forceinline__ Source source_of(const Ends& ends, int64_t row) {
  Source source{0, row};
  for (int r = 1; r < ends.ranks; ++r) {
    const int64_t begin = ends.of(r - 1);
    if (row < begin) break;
    source = {r, row - begin};
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

// A warp per row. Rows that nobody sent choose no expert here.
template <typename Word>
__global__ void __launch_bounds__(kBlock)
    receive_kernel(const unsigned char* __restrict__ from, int64_t block_bytes,
                   unsigned char* __restrict__ out, int64_t row_bytes, int64_t rows,
                   const __grid_constant__ Ends ends, const __grid_constant__ Packed packed,
                   int* __restrict__ ends_out) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  if (ends_out != nullptr && warp == 0 && lane < ends.ranks) {
    ends_out[lane] = static_cast<int>(ends.of(lane));
  }
  const int64_t width = row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t sent = ends.of(ends.ranks - 1);
  for (int64_t row = warp; row < rows; row += warps) {
    if (row >= sent) {
      for (int k = lane; k < packed.slots; k += kWarpSize) {
        packed.keys[row * packed.slots + k] = packed.num_local;
        packed.weights[row * packed.slots + k] = 0.0f;
      }
      continue;
    }
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

void check_rank_count(int64_t ranks, const char* op) {
  STD_TORCH_CHECK(ranks >= 1 && ranks <= kMaxRanks, op, ": between 1 and ", kMaxRanks,
                  " ranks, not ", ranks);
}

void check_blocks(const Tensor& memory, int64_t at, int64_t ranks, int64_t block_bytes,
                  const char* op) {
  STD_TORCH_CHECK(block_bytes % kVectorBytes == 0, op, ": blocks must be multiples of ",
                  kVectorBytes, " bytes, not ", block_bytes);
  check_range(memory, at, ranks * block_bytes, op);
}

// What must hold for rows to be read before the host has seen the counts.
struct Expectation {
  const unsigned char* control;  // this rank's flags and tables
  int64_t counts_flags_at;
  uint64_t counts_value;
  int64_t rows_flags_at;
  uint64_t rows_value;
  int64_t table_at;
  int64_t table_block_bytes;
  int64_t header;          // numbers of a table's header, then E counts, R counts, bytes needed
  const int64_t* where;    // (2, E + 1): each expert's rank
  int64_t num_experts;
  int rank;
  int ranks;
  int64_t capacity;  // bytes
  int64_t most;      // rows of a rank
  int64_t rows;      // of all
  int64_t pairs;     // of (row, slot) that choose an expert here
};

// One block. Writes where each rank's rows end; or zeros, if a flag isn't there or there are more
// than expected: then the host will find out why.
__global__ void __launch_bounds__(kBlock)
    verdict_kernel(const __grid_constant__ Expectation expected, int* __restrict__ ends) {
  __shared__ int64_t counts[kMaxRanks];
  const int thread = static_cast<int>(threadIdx.x);
  const auto numbers = [&](int rank) {
    return reinterpret_cast<const volatile int64_t*>(
               expected.control + expected.table_at + rank * expected.table_block_bytes) +
           expected.header;
  };
  bool holds = true;
  if (thread < expected.ranks) {
    const auto flag = [&](int64_t at) {
      return load_acquire(expected.control + at + thread * kFlagBytes);
    };
    const volatile int64_t* own = numbers(thread);
    const int64_t count = own[expected.num_experts + expected.rank];
    holds = flag(expected.counts_flags_at) == expected.counts_value &&
            flag(expected.rows_flags_at) == expected.rows_value && count >= 0 &&
            count <= expected.most &&
            own[expected.num_experts + expected.ranks] <= expected.capacity;
    counts[thread] = count;
  }
  holds = __syncthreads_and(holds);
  int64_t pairs = 0;
  if (holds) {
    for (int64_t e = thread; e < expected.num_experts; e += kBlock) {
      if (expected.where[e] != expected.rank) continue;
      for (int r = 0; r < expected.ranks; ++r) pairs += numbers(r)[e];
    }
  }
  __shared__ int64_t of_warps[kWarpsPerBlock];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    pairs += __shfl_xor_sync(kAllLanes, pairs, offset);
  }
  if (thread % kWarpSize == 0) of_warps[thread / kWarpSize] = pairs;
  __syncthreads();
  if (thread != 0) return;
  int64_t all_pairs = 0, rows = 0;
  for (int w = 0; w < kWarpsPerBlock; ++w) all_pairs += of_warps[w];
  for (int r = 0; holds && r < expected.ranks; ++r) rows += counts[r];
  holds = holds && all_pairs >= 0 && all_pairs <= expected.pairs && rows <= expected.rows;
  int end = 0;
  for (int r = 0; r < expected.ranks; ++r) {
    if (holds) end += static_cast<int>(counts[r]);
    ends[r] = end;
  }
}

// The blocks that tokens come in, and what comes with them.
struct Places {
  int64_t at;
  int64_t block_bytes;
  int64_t row_bytes;
  int64_t packed_at;
  int64_t packed_block_bytes;
  int64_t slots;
  int64_t num_local;
};

std::tuple<Tensor, Tensor, Tensor> read_rows(const Tensor& memory, const Places& places,
                                             int64_t rows, const Ends& ends, int* ends_out,
                                             const char* op) {
  check_tensor(memory, op, "memory", 1, memory);
  check_dtype(memory, op, "memory", ScalarType::Byte);
  check_blocks(memory, places.at, ends.ranks, places.block_bytes, op);
  check_blocks(memory, places.packed_at, ends.ranks, places.packed_block_bytes, op);
  using torch::stable::new_empty;
  Tensor out = new_empty(memory, {rows, places.row_bytes});
  Tensor weights = new_empty(memory, {rows, places.slots}, ScalarType::Float);
  Tensor keys = new_empty(memory, {rows, places.slots}, ScalarType::Long);
  const auto* begin = static_cast<const unsigned char*>(memory.data_ptr());
  const Packed packed{begin + places.packed_at,
                      places.packed_block_bytes,
                      static_cast<float*>(weights.data_ptr()),
                      static_cast<int64_t*>(keys.data_ptr()),
                      static_cast<int>(places.slots),
                      static_cast<int>(places.num_local)};
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                        memory.get_device_index()));
  const unsigned blocks = static_cast<unsigned>(
      std::min<int64_t>(std::max<int64_t>(1, ceil_div(rows, kWarpsPerBlock)),
                        int64_t{kBlocksPerMultiprocessor} * multiprocessors));
  for_word(places.row_bytes, {begin + places.at, out.data_ptr()}, [&](auto word) {
    receive_kernel<decltype(word)><<<blocks, kBlock, 0, current_stream(memory)>>>(
        begin + places.at, places.block_bytes, static_cast<unsigned char*>(out.data_ptr()),
        places.row_bytes, rows, ends, packed, ends_out);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, weights, keys};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_receive(
    const Tensor& memory, int64_t at, int64_t block_bytes, int64_t row_bytes,
    std::vector<int64_t> counts, int64_t packed_at, int64_t packed_block_bytes, int64_t slots,
    int64_t num_local) {
  const char* op = "exchange_receive";
  const int64_t ranks = static_cast<int64_t>(counts.size());
  check_rank_count(ranks, op);
  Ends ends{{}, nullptr, static_cast<int>(ranks)};
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
  Tensor ends_out = torch::stable::new_empty(memory, {ranks}, ScalarType::Int);
  const Places places{at,    block_bytes, row_bytes, packed_at, packed_block_bytes,
                      slots, num_local};
  auto [out, weights, keys] =
      read_rows(memory, places, rows, ends, static_cast<int*>(ends_out.data_ptr()), op);
  return {out, weights, keys, ends_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_receive_ahead(
    const Tensor& memory, int64_t at, int64_t block_bytes, int64_t row_bytes, int64_t rows,
    int64_t packed_at, int64_t packed_block_bytes, int64_t slots, int64_t num_local,
    const Tensor& control, const Tensor& where, int64_t rank, int64_t ranks,
    std::vector<int64_t> flags, std::vector<int64_t> table, int64_t capacity, int64_t most,
    int64_t pairs) {
  const char* op = "exchange_receive_ahead";
  check_rank_count(ranks, op);
  check_tensor(control, op, "control", 1, memory);
  check_dtype(control, op, "control", ScalarType::Byte);
  check_tensor(where, op, "where", 2, memory);
  check_dtype(where, op, "where", ScalarType::Long);
  STD_TORCH_CHECK(flags.size() == 4 && table.size() == 3, op,
                  ": flags are two places, each with a value, and a table is a place, the bytes of"
                  " a block and of a header");
  const int64_t num_experts = where.size(1) - 1;
  const auto numbers = table[2] + (num_experts + ranks + 1) * static_cast<int64_t>(sizeof(int64_t));
  STD_TORCH_CHECK(numbers <= table[1], op, ": a block of ", table[1], " bytes has no room for ",
                  num_experts, " experts");
  check_range(control, table[0], ranks * table[1], op);
  check_flags(control, static_cast<size_t>(ranks), flags[0], op);
  check_flags(control, static_cast<size_t>(ranks), flags[2], op);
  STD_TORCH_CHECK(most * row_bytes <= block_bytes && most * slots * 2 * kIdBytes <=
                      packed_block_bytes, op, ": blocks have no room for ", most, " rows");
  const Expectation expected{static_cast<const unsigned char*>(control.data_ptr()),
                             flags[0],
                             static_cast<uint64_t>(flags[1]),
                             flags[2],
                             static_cast<uint64_t>(flags[3]),
                             table[0],
                             table[1],
                             table[2] / static_cast<int64_t>(sizeof(int64_t)),
                             static_cast<const int64_t*>(where.data_ptr()),
                             num_experts,
                             static_cast<int>(rank),
                             static_cast<int>(ranks),
                             capacity,
                             most,
                             rows,
                             pairs};
  const DeviceGuard guard(memory.get_device_index());
  Tensor ends_out = torch::stable::new_empty(memory, {ranks}, ScalarType::Int);
  auto* on_device = static_cast<int*>(ends_out.data_ptr());
  verdict_kernel<<<1, kBlock, 0, current_stream(memory)>>>(expected, on_device);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Places places{at,    block_bytes, row_bytes, packed_at, packed_block_bytes,
                      slots, num_local};
  const Ends ends{{}, on_device, static_cast<int>(ranks)};
  auto [out, weights, keys] = read_rows(memory, places, rows, ends, nullptr, op);
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
