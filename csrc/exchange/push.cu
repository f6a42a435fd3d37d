// Pushes rows into other ranks' memory.
//
// Which rank a row is for, and where it goes there, follows from the sender's own order alone: rows
// leave before any two ranks have exchanged a count.
#include <algorithm>

#include "../hopper/ops.h"
#include "../ops.h"
#include "bulk_push.cuh"
#include "sending.cuh"

namespace lightning_fastmoe {
namespace {

constexpr int kInFlight = 4;  // loads per thread
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
    const auto* from = reinterpret_cast<const Word*>(transfer.from);
    auto* to = reinterpret_cast<Word*>(transfer.to);
    for (int64_t w = lane; w < width; w += kInFlight * kWarpSize) {
      Word loaded[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (w + k * kWarpSize < width) loaded[k] = from[w + k * kWarpSize];
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (w + k * kWarpSize < width) to[w + k * kWarpSize] = loaded[k];
      }
    }
  }
}

}  // namespace

void exchange_push(const Tensor& rows, const std::optional<Tensor>& order, const Tensor& ends,
                   int64_t divisor, std::vector<Tensor> memory, int64_t rank, int64_t at,
                   int64_t most, int64_t bulk_blocks) {
  const char* op = "exchange_push";
  const Ranks ranks = check_ranks(memory, rank, op);
  check_tensor(rows, op, "rows", 2, memory[0]);
  check_tensor(ends, op, "ends", 1, rows);
  check_dtype(ends, op, "ends", ScalarType::Int);
  check_size(ends, op, "ends", 0, ranks.count);
  if (order) {
    check_tensor(*order, op, "order", 1, rows);
    check_dtype(*order, op, "order", ScalarType::Long);
  }
  STD_TORCH_CHECK(divisor >= 1, op, ": divisor must be at least 1, not ", divisor);
  const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  check_range(memory[0], at, most * row_bytes, op);
  const int64_t bound = order ? order->size(0) : rows.size(0);
  if (bound == 0 || row_bytes == 0) return;

  const DeviceGuard guard(rows.get_device_index());
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
  if (bulk_blocks > 0) {
    STD_TORCH_CHECK(hopper::available(rows.get_device_index()) && row_bytes % kVectorBytes == 0 &&
                        reinterpret_cast<uintptr_t>(rows.data_ptr()) % kVectorBytes == 0,
                    op, ": bulk copies need compute capability 9.0, and rows of multiples of ",
                    kVectorBytes, " bytes");
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        bulk_push_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BulkPush::kSharedBytes));
    const unsigned few = static_cast<unsigned>(std::min<int64_t>(
        ceil_div(bound, kWarpsPerBlock), std::min<int64_t>(bulk_blocks, multiprocessors)));
    bulk_push_kernel<<<few, kBlock, BulkPush::kSharedBytes, current_stream(rows)>>>(ranks, sending);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const auto launch = [&](auto word) {
    push_kernel<decltype(word)><<<blocks, kBlock, 0, current_stream(rows)>>>(ranks, sending);
  };
  const auto fits = [&](int64_t bytes) {
    return row_bytes % bytes == 0 && reinterpret_cast<uintptr_t>(rows.data_ptr()) % bytes == 0;
  };
  if (fits(sizeof(uint4))) {
    launch(uint4{});
  } else if (fits(sizeof(uint64_t))) {
    launch(uint64_t{});
  } else if (fits(sizeof(uint32_t))) {
    launch(uint32_t{});
  } else if (fits(sizeof(uint16_t))) {
    launch(uint16_t{});
  } else {
    launch(uint8_t{});
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace lightning_fastmoe
