// The pipeline shared by all grouped GEMMs: one warpgroup, the producer, fills stages in shared
// memory, and two others, the consumers, multiply them.
//
//   Block 0 of a cluster; block 1 does the same for the neighbouring tile of A.
//
//               full[stage]: 1 arrival (129 if rows are gathered) and all bytes of TMA's loads
//              +--------------------------------------------------------------+
//              |                                                              v
//   +---------------------+      stages in shared memory     +----------------------------------+
//   | producer            |      +-----+-----+-----+-----+   | consumers                        |
//   | warpgroup 0:        |----->|  0  |  1  |  2  |  3  |-->| warpgroup 1: rows 0-63 of A, B   |
//   | A, to its own block |      | A B | A B | A B | A B |   | warpgroup 2: rows 64-127 of A, B |
//   | half of B, to both  |      +-----+-----+-----+-----+   | MMAs, then the epilogue          |
//   +---------------------+                 ^                +----------------------------------+
//              ^                            |                                 |
//              |         the other half of B, from block 1's producer         |
//              +--------------------------------------------------------------+
//               empty[stage]: 16 arrivals, one from each consumer warp of both blocks
//
// A stage holds 64 of K: an operand tile A of 128 rows, one half for each consumer, and an operand
// tile B of 256 columns, which both consumers read. Two blocks of a cluster work on neighbouring
// tiles of A and on the same tile of B; each loads half of B for both (multicast), because reading
// all of it twice would take more than the L2 cache can deliver.
//
// Consumers don't wait for each other. One may be up to kStages ahead, so that while it runs its
// epilogue the tensor cores still have the other's MMAs to execute.
//
// Rules for waiting: a wait on an mbarrier sees the parity of a phase, not its number. A thread
// that is delayed for a whole round of the stages (for example by an instruction cache miss)
// finds the parity that it started with and waits for the next phase; after the last phase it
// waits forever, and its cluster with it. So a thread may only wait for a phase that can't be
// followed by another without that thread. A producer thread that waits for an empty stage takes
// part in filling it: all of them if each copies rows, only the first if it issues all loads.
// A consumer warp releases a stage once all of its lanes have seen it full.
#pragma once

#include "../deadline.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace lightning_fastmoe::hopper {

constexpr int kTileM = 128;
constexpr int kTileN = kMmaN;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerM = kTileM / kConsumers;
constexpr int kClusterSize = 2;
constexpr int kStages = 4;

constexpr int kBoxBytes = 64 * kSwizzleBytes;  // a TMA box of 64 rows of 128 bytes
constexpr int kBytesA = kTileM / 64 * kBoxBytes;
constexpr int kBytesB = kTileN / 64 * kBoxBytes;
constexpr int kStageBytes = kBytesA + kBytesB;

// Warpgroups redistribute the registers that the block got at launch, 168 per thread: requesting
// more than have been released waits forever.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * (1 + kConsumers));

// Ids of named barriers.
constexpr int kTokensBarrier = 1;
constexpr int kConsumerBarrier = 2;  // and the next, one for each consumer

constexpr int kMaxExperts = 2048;  // limited by the shared memory left besides the stages
constexpr int kMaxSorted = 256;    // likewise

// Starts the declaration of a kernel. For other targets its body is empty and its blocks are
// limited to one thread, so that it can't be launched.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIGHTNING_FASTMOE_KERNEL \
  __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
#else
#define LIGHTNING_FASTMOE_KERNEL __global__ void __launch_bounds__(1)
#endif

struct SharedStorage {
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int row_end[kMaxExperts];        // running sum of rows
  int work_tile_end[kMaxExperts];  // running sum of work tiles
  uint16_t by_rows[kMaxSorted];    // experts by their number of rows, see split_k.cuh
  // Start addresses of gathered rows, if the producer looks up many at once.
  alignas(16) uint32_t row_start[2][kWarpgroup];
};

// The consumers' staging buffers, 8 KB each, in which an epilogue reorders results before it stores
// them.
constexpr int kStagingBytes = kConsumerM * kSwizzleBytes;

constexpr int kAlignment = 1024;  // of a swizzled tile
constexpr int kBufferBytes = kStages * kStageBytes + kConsumers * kStagingBytes;
constexpr int kSharedBytes = kBufferBytes + static_cast<int>(sizeof(SharedStorage)) + kAlignment;
static_assert(kSharedBytes <= 227 * 1024);

// A thread's position in the pipeline: the next stage, and the parity of the phase in which it is
// filled.
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Pipeline {
  uint32_t buffers;  // address of stage 0; the staging buffers follow the stages
  uint32_t full;     // addresses of the first barriers
  uint32_t empty;
  const Deadline& deadline;

  __device__ __forceinline__ uint32_t a(int stage) const { return buffers + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + kBytesA; }
  __device__ __forceinline__ uint32_t staging(int consumer) const {
    return buffers + kStages * kStageBytes + consumer * kStagingBytes;
  }
  __device__ __forceinline__ uint32_t full_barrier(int stage) const { return full + stage * 8; }
  __device__ __forceinline__ uint32_t empty_barrier(int stage) const { return empty + stage * 8; }

  // Called by the producer: waits until the stage is empty. In the first round every stage is.
  __device__ __forceinline__ void producer_acquire(const PipelineState& state) const {
    wait(empty_barrier(state.stage), state.parity ^ 1, WaitFor::kEmptyStage, state);
  }
  // Called by consumers: waits until the stage is full.
  __device__ __forceinline__ void consumer_wait(const PipelineState& state) const {
    wait(full_barrier(state.stage), state.parity, WaitFor::kFullStage, state);
  }
  // Called by a whole consumer warp: signals the producers of both blocks, since both write to this
  // stage. All of the warp's lanes must have seen the stage full: if no MMA or barrier has
  // synchronised them since, call __syncwarp() first. (In here it would keep the compiler from
  // computing the address before the MMAs are done.)
  __device__ __forceinline__ void consumer_release(int stage) const {
    const int lane = threadIdx.x % 32;
    delay_at_random(deadline);
    if (lane < kClusterSize) mbarrier_arrive_remote(empty_barrier(stage), lane);
  }

 private:
  __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity, WaitFor what,
                                       const PipelineState& state) const {
    delay_at_random(deadline);
    wait_until(deadline, what, static_cast<uint32_t>(state.stage) << 1 | state.parity,
               [&] { return mbarrier_try_wait(barrier, parity); });
  }
};

// Called by all threads at the start of a kernel. `gathers`: whether each producer thread arrives
// at the full barriers for the rows that it copies, besides the one that issues TMA loads.
__device__ __forceinline__ Pipeline make_pipeline(SharedStorage& shared, uint8_t* buffers,
                                                  bool gathers, const Deadline& deadline) {
  const Pipeline pipeline{shared_address(buffers), shared_address(shared.full),
                          shared_address(shared.empty), deadline};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(pipeline.full_barrier(stage), 1 + (gathers ? kWarpgroup : 0));
      mbarrier_init(pipeline.empty_barrier(stage), kClusterSize * kConsumers * kWarpgroup / 32);
    }
    fence_mbarrier_init();
  }
  return pipeline;
}

// The start of the buffers in dynamic shared memory, at their alignment; SharedStorage follows
// them.
__device__ __forceinline__ uint8_t* aligned_buffers(uint8_t* dynamic) {
  const uint32_t address = shared_address(dynamic);
  return dynamic + ((address + kAlignment - 1) / kAlignment * kAlignment - address);
}

// The mainloop of one consumer over `k_tiles` stages: D = sum over K of A B. All stages are
// released when it returns. `before_mma(k_tile, stage)` runs once a stage is full,
// `before_last_wait` while the last MMAs are in flight.
template <typename T, Major kA, Major kB, bool kGathered, typename BeforeMma,
          typename BeforeLastWait>
__device__ __forceinline__ void mma_mainloop(float (&d)[kAccumulators], const Pipeline& pipeline,
                                             PipelineState& state, int k_tiles, int consumer,
                                             BeforeMma&& before_mma,
                                             BeforeLastWait&& before_last_wait) {
  int previous = 0;
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    pipeline.consumer_wait(state);
    before_mma(k_tile, state.stage);
    // cp.async writes through the generic proxy; the tensor cores read through the async proxy.
    if constexpr (kGathered) fence_proxy_async();
    const uint32_t half = consumer * kBoxBytes;  // 64 rows, or 64 columns of an MN-major tile
    const uint64_t a = matrix_descriptor<kA>(pipeline.a(state.stage) + half, kBoxBytes);
    const uint64_t b = matrix_descriptor<kB>(pipeline.b(state.stage), kBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileK / kMmaK; ++i) {
      wgmma<T, kA, kB>(d, a + i * kDescriptorStep<kA>, b + i * kDescriptorStep<kB>, k_tile + i > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (k_tile > 0) pipeline.consumer_release(previous);
    previous = state.stage;
    state.advance();
  }
  before_last_wait();
  wgmma_wait<0>();
  if (k_tiles > 0) pipeline.consumer_release(previous);
}

}  // namespace lightning_fastmoe::hopper
