// Pushes rows into other ranks' memory.
//
// Which rank a row is for, and where it goes there, follows from the sender's own order alone: rows
// leave before any two ranks have exchanged a count.
#include <algorithm>

#include "../hopper/ops.h"
#include "../ops.h"
#include "bulk_push.cuh"
#include "launches.h"
#include "sending.cuh"
#include "waiting.cuh"
#include "words.cuh"

namespace lightning_fastmoe {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;

// A warp per row. Word is the unit that a thread moves.
template <typename Word>
__global__ void __launch_bounds__(kBlock)
    push_kernel(const __grid_constant__ Ranks ranks, const __grid_constant__ Sending sending) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t total = sending.ends[ranks.count - 1];
  const int64_t width = sending.row_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t n = warp; n < total; n += warps) {
    const Transfer transfer = transfer_of(ranks, sending, n, total);
    copy_row<Word>(transfer.from, transfer.to, width, lane);
  }
}

// Launches the push of one tensor's rows.
void push(const Ranks& ranks, const Tensor& memory, const Tensor& rows,
          const std::optional<Tensor>& order, const Tensor& ends, int64_t divisor, int64_t at,
          int64_t most, int64_t bulk_blocks, const char* op) {
  check_tensor(rows, op, "rows", 2, memory);
  check_tensor(ends, op, "ends", 1, rows);
  check_dtype(ends, op, "ends", ScalarType::Int);
  check_size(ends, op, "ends", 0, ranks.count);
  if (order) {
    check_tensor(*order, op, "order", 1, rows);
    check_dtype(*order, op, "order", ScalarType::Long);
  }
  STD_TORCH_CHECK(divisor >= 1, op, ": divisor must be at least 1, not ", divisor);
  const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  check_range(memory, at, most * row_bytes, op);
  const int64_t bound = order ? order->size(0) : rows.size(0);
  if (bound == 0 || row_bytes == 0) return;

  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                        rows.get_device_index()));
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(
      ceil_div(bound, kWarpsPerBlock), int64_t{kBlocksPerMultiprocessor} * multiprocessors));
  const Sending sending{static_cast<const unsigned char*>(rows.data_ptr()),
                        order ? static_cast<const int64_t*>(order->data_ptr()) : nullptr,
                        static_cast<const int*>(ends.data_ptr()),
                        divisor,
                        row_bytes,
                        at,
                        most};
  const cudaStream_t stream = current_stream(rows);
  if (bulk_blocks > 0) {
    STD_TORCH_CHECK(hopper::available(rows.get_device_index()) && row_bytes % kVectorBytes == 0 &&
                        reinterpret_cast<uintptr_t>(rows.data_ptr()) % kVectorBytes == 0,
                    op, ": bulk copies need compute capability 9.0, and rows of multiples of ",
                    kVectorBytes, " bytes");
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        bulk_push_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BulkPush::kSharedBytes));
    const unsigned few = static_cast<unsigned>(std::min<int64_t>(
        ceil_div(bound, kWarpsPerBlock), std::min<int64_t>(bulk_blocks, multiprocessors)));
    bulk_push_kernel<<<few, kBlock, BulkPush::kSharedBytes, stream>>>(ranks, sending);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  for_word(row_bytes, {rows.data_ptr()}, [&](auto word) {
    push_kernel<decltype(word)><<<blocks, kBlock, 0, stream>>>(ranks, sending);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void exchange_push(const Tensor& rows, const std::optional<Tensor>& order, const Tensor& ends,
                   int64_t divisor, std::vector<Tensor> memory, int64_t rank, int64_t at,
                   int64_t most, int64_t bulk_blocks) {
  const char* op = "exchange_push";
  const Ranks ranks = check_ranks(memory, rank, op);
  const DeviceGuard guard(memory[0].get_device_index());
  push(ranks, memory[0], rows, order, ends, divisor, at, most, bulk_blocks, op);
}

void exchange_send(std::vector<Tensor> parts, const std::optional<Tensor>& order,
                   const Tensor& ends, std::vector<int64_t> divisors, std::vector<Tensor> memory,
                   int64_t rank, std::vector<int64_t> at, int64_t most, std::vector<Tensor> flags,
                   int64_t flags_at, int64_t value) {
  const char* op = "exchange_send";
  const Ranks ranks = check_ranks(memory, rank, op), flag_ranks = check_ranks(flags, rank, op);
  check_flags(flags[0], flags.size(), flags_at, op);
  STD_TORCH_CHECK(parts.size() == divisors.size() && parts.size() == at.size(), op,
                  ": as many divisors and places as parts");
  const DeviceGuard guard(memory[0].get_device_index());
  for (size_t i = 0; i < parts.size(); ++i) {
    push(ranks, memory[0], parts[i], order, ends, divisors[i], at[i], most, 0, op);
  }
  set_flags(flag_ranks, flags_at, value, current_stream(memory[0]), op);
}

}  // namespace lightning_fastmoe
