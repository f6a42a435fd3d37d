// Token counts of all ranks, which the host reads while rows travel.
//
// A rank writes a vector into its place of every rank's table: a header, and the numbers, padded.
// The header's fields and its checksum are those of lightning_fastmoe/ops/exchange_counts.py, whose
// functions are the twins of these kernels.
#include "../ops.h"
#include "launches.h"
#include "waiting.cuh"

namespace lightning_fastmoe {
namespace {

constexpr int kGiven = 4;               // fields of the header that the host gives
constexpr int kHeader = kGiven + 2;     // and the sum and the checksum
constexpr uint64_t kFactor = 2654435761ull, kModulus = 2147483647ull;

struct Announcement {
  int64_t header[kGiven];
  const int64_t* first;  // (first_size,)
  const int64_t* second;  // (second_size,)
  int64_t first_size;
  int64_t second_size;
  int64_t last;  // one more number; none if negative
  int64_t size;  // of the vector without its header

  __device__ __forceinline__ int64_t number(int64_t i) const {
    if (i < first_size) return first[i];
    i -= first_size;
    if (i < second_size) return second[i];
    return i == second_size && last >= 0 ? last : 0;
  }
};

// Sums over the block; the result is thread 0's.
__device__ __forceinline__ uint64_t block_sum(uint64_t value) {
  __shared__ uint64_t of_warps[kWarpsPerBlock];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  __syncthreads();  // the previous call's reader is done
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  uint64_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarpsPerBlock; ++w) sum += of_warps[w];
  return sum;
}

// One block writes the vector to all ranks, then sets their flags.
__global__ void __launch_bounds__(kBlock)
    announce_kernel(const __grid_constant__ Ranks ranks,
                    const __grid_constant__ Announcement announcement, int64_t at, int64_t flags_at,
                    uint64_t value, const __grid_constant__ Deadline deadline) {
  delay_at_random(deadline);
  uint64_t sum = 0, checksum = 0;
  for (int64_t i = threadIdx.x; i < announcement.size; i += kBlock) {
    const auto number = static_cast<uint64_t>(announcement.number(i));
    sum += number;
    checksum += number * (static_cast<uint64_t>(i + 1) * kFactor % kModulus);
    for (int r = 0; r < ranks.count; ++r) {
      reinterpret_cast<uint64_t*>(ranks.memory[r] + at)[kHeader + i] = number;
    }
  }
  sum = block_sum(sum);
  checksum = block_sum(checksum);
  if (threadIdx.x == 0) {
    for (int r = 0; r < ranks.count; ++r) {
      auto* vector = reinterpret_cast<uint64_t*>(ranks.memory[r] + at);
#pragma unroll
      for (int i = 0; i < kGiven; ++i) {
        vector[i] = static_cast<uint64_t>(announcement.header[i]);
      }
      vector[kGiven] = sum;
      vector[kGiven + 1] = checksum;
    }
  }
  __syncthreads();  // what all threads wrote comes before the release
  if (threadIdx.x < ranks.count) {
    store_release(ranks.memory[threadIdx.x] + flags_at + ranks.own * kFlagBytes, value);
  }
}

// One warp waits for all ranks' vectors, and copies them into host memory.
__global__ void __launch_bounds__(kWarpSize)
    await_kernel(const __grid_constant__ Ranks ranks, const __grid_constant__ Flags flags,
                 int64_t at, int64_t block_bytes, int64_t* found, int64_t columns,
                 const __grid_constant__ Deadline deadline) {
  if (!wait_for_all(ranks, flags, deadline)) return;
  const unsigned char* own = ranks.memory[ranks.own] + at;
  const int lane = static_cast<int>(threadIdx.x);
  // The lane that waited for a rank has acquired what it wrote; for the others' sake:
  __threadfence_system();
  __syncwarp();
  for (int r = 0; r < ranks.count; ++r) {
    const auto* vector = reinterpret_cast<const volatile int64_t*>(own + r * block_bytes);
    for (int64_t i = lane; i < columns; i += kWarpSize) found[r * columns + i] = vector[i];
  }
}

}  // namespace

void follow(cudaStream_t stream, cudaStream_t other) {
  if (stream == other) return;
  cudaEvent_t event = nullptr;
  STD_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  STD_CUDA_CHECK(cudaEventRecord(event, other));
  STD_CUDA_CHECK(cudaStreamWaitEvent(stream, event, 0));
  STD_CUDA_CHECK(cudaEventDestroy(event));  // once it has been reached
}

void exchange_announce(const Tensor& first, const Tensor& second, int64_t last,
                       std::vector<int64_t> header, int64_t size, std::vector<Tensor> memory,
                       int64_t rank, int64_t at, int64_t flags_at, int64_t value, int64_t stream) {
  const char* op = "exchange_announce";
  const Ranks ranks = check_ranks(memory, rank, op);
  check_tensor(first, op, "first", 1, memory[0]);
  check_dtype(first, op, "first", ScalarType::Long);
  check_tensor(second, op, "second", 1, memory[0]);
  check_dtype(second, op, "second", ScalarType::Long);
  STD_TORCH_CHECK(header.size() == kGiven, op, ": the header has ", kGiven, " fields, not ",
                  header.size());
  const int64_t numbers = first.size(0) + second.size(0) + (last >= 0 ? 1 : 0);
  STD_TORCH_CHECK(numbers <= size, op, ": ", numbers, " numbers don't fit into ", size);
  check_range(memory[0], at, (kHeader + size) * static_cast<int64_t>(sizeof(int64_t)), op);
  check_flags(memory[0], memory.size(), flags_at, op);
  Announcement announcement{{},
                            static_cast<const int64_t*>(first.data_ptr()),
                            static_cast<const int64_t*>(second.data_ptr()),
                            first.size(0),
                            second.size(0),
                            last,
                            size};
  for (int i = 0; i < kGiven; ++i) announcement.header[i] = header[static_cast<size_t>(i)];
  const Deadline deadline = deadline_for(op);
  const DeviceGuard guard(memory[0].get_device_index());
  const auto aside = reinterpret_cast<cudaStream_t>(stream);
  follow(aside, current_stream(memory[0]));
  announce_kernel<<<1, kBlock, 0, aside>>>(ranks, announcement, at, flags_at,
                                           static_cast<uint64_t>(value), deadline);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void exchange_await(std::vector<Tensor> memory, int64_t rank, int64_t flags_at, int64_t value,
                    int64_t at, int64_t block_bytes, const Tensor& found, const Tensor& report,
                    double seconds, int64_t stream) {
  const char* op = "exchange_await";
  const Ranks ranks = check_ranks(memory, rank, op);
  check_flags(memory[0], memory.size(), flags_at, op);
  STD_TORCH_CHECK(found.is_cpu() && found.dim() == 2 && found.is_contiguous() &&
                      found.size(0) == ranks.count,
                  op, ": found must have a contiguous row of pinned host memory for each rank");
  check_dtype(found, op, "found", ScalarType::Long);
  const int64_t columns = found.size(1);
  STD_TORCH_CHECK(columns * static_cast<int64_t>(sizeof(int64_t)) <= block_bytes, op, ": ", columns,
                  " numbers are more than a rank sends");
  check_range(memory[0], at, ranks.count * block_bytes, op);
  const Flags flags{flags_at, static_cast<uint64_t>(value), check_report(report, op), false};
  Deadline deadline = deadline_for(op);
  deadline.ticks = ticks_of(seconds);
  const DeviceGuard guard(memory[0].get_device_index());
  await_kernel<<<1, kWarpSize, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      ranks, flags, at, block_bytes, static_cast<int64_t*>(found.data_ptr()), columns, deadline);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace lightning_fastmoe
