// Pushes long rows by Hopper's bulk copies: global to shared memory, and from there to the rank.
//
// Each warp has a ring of stages, and one lane of it works: a load runs kStages - 1 chunks ahead
// of the stores. The threads move no data, so few blocks saturate the link.
#pragma once

#include "../hopper/ptx.cuh"
#include "sending.cuh"

namespace lightning_fastmoe {

struct BulkPush {
  static constexpr int kStages = 4;
  static constexpr int kChunkBytes = 4096;
  static constexpr int kSharedBytes = kWarpsPerBlock * kStages * kChunkBytes;
};

#if __CUDA_ARCH__ >= 900

// A group of its own.
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}

// Until all but the latest `kGroups` stores have read shared memory.
template <int kGroups>
__device__ __forceinline__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// Until all stores have been written.
__device__ __forceinline__ void wait_until_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// The chunks of a warp's rows, in order.
struct Chunks {
  int64_t row;     // of all that are sent
  int64_t offset;  // in the row
  Transfer transfer;

  __device__ __forceinline__ Chunks(const Ranks& ranks, const Sending& sending, int64_t first,
                                    int64_t total)
      : row(first), offset(0), transfer{} {
    if (row < total) transfer = transfer_of(ranks, sending, row, total);
  }

  __device__ __forceinline__ uint32_t bytes(const Sending& sending) const {
    const int64_t left = sending.row_bytes - offset;
    return static_cast<uint32_t>(left < BulkPush::kChunkBytes ? left : BulkPush::kChunkBytes);
  }

  __device__ __forceinline__ void advance(const Ranks& ranks, const Sending& sending,
                                          int64_t stride, int64_t total) {
    offset += BulkPush::kChunkBytes;
    if (offset < sending.row_bytes) return;
    offset = 0;
    row += stride;
    if (row < total) transfer = transfer_of(ranks, sending, row, total);
  }
};

#endif

__global__ void __launch_bounds__(kBlock)
    bulk_push_kernel(const __grid_constant__ Ranks ranks, const __grid_constant__ Sending sending) {
#if __CUDA_ARCH__ >= 900
  constexpr int kStages = BulkPush::kStages;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t barriers[kWarpsPerBlock][kStages];
  if (threadIdx.x % kWarpSize != 0) return;
  const int in_block = threadIdx.x / kWarpSize;
  uint32_t arrived[kStages];
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    arrived[s] = hopper::shared_address(&barriers[in_block][s]);
    hopper::mbarrier_init(arrived[s], 1);
  }
  hopper::fence_mbarrier_init();
  const uint32_t ring = hopper::shared_address(shared + in_block * kStages * BulkPush::kChunkBytes);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + in_block;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t total = sending.ends[ranks.count - 1];

  Chunks loaded(ranks, sending, warp, total), stored = loaded;
  const auto load_next = [&](int stage) {
    if (loaded.row >= total) return;
    const uint32_t bytes = loaded.bytes(sending);
    const uint32_t barrier = hopper::shared_address(&barriers[in_block][stage]);
    hopper::mbarrier_arrive_expect_tx(barrier, bytes);
    hopper::bulk_load(ring + stage * BulkPush::kChunkBytes,
                      loaded.transfer.from + loaded.offset, static_cast<int>(bytes), barrier);
    loaded.advance(ranks, sending, warps, total);
  };
#pragma unroll
  for (int s = 0; s + 1 < kStages; ++s) load_next(s);
  int stage = 0;
  uint32_t parity = 0;
  while (stored.row < total) {
    const uint32_t barrier = hopper::shared_address(&barriers[in_block][stage]);
    while (!hopper::mbarrier_try_wait(barrier, parity)) {
    }
    bulk_store(stored.transfer.to + stored.offset, ring + stage * BulkPush::kChunkBytes,
               stored.bytes(sending));
    stored.advance(ranks, sending, warps, total);
    wait_until_read<1>();  // the store before: its stage is free
    load_next(stage == 0 ? kStages - 1 : stage - 1);
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  wait_until_written();
#endif
}

}  // namespace lightning_fastmoe
