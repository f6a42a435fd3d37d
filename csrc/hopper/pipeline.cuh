// The frame that all grouped GEMMs share: a ring of stages in shared memory that one warpgroup, the
// producer, fills and two others, the consumers, multiply.
//
// A stage holds 64 of K: an operand tile A of 128 rows, one half for each consumer, and an operand
// tile B of 256 columns, which both consumers read. Two blocks of a cluster work on neighbouring
// tiles of A and on the same tile of B; each loads half of B for both, because reading all of it
// twice would take more than the L2 cache can deliver.
//
// Consumers don't wait for each other. One may be up to kStages ahead, so that while it writes its
// results the tensor cores still have the other's products to do.
//
// A wait sees the parity of a phase, not its number. A thread that is held up for a whole round of
// the stages (by an instruction that has to come from memory, say) finds the parity that it started
// with and waits for the next phase; after the last one it waits forever, and its cluster with it.
// So a thread waits only for a phase that can't be followed by another without that thread. A
// producer thread that waits for an empty stage takes part in filling it: all of them where each
// copies rows, the first alone where it starts all copies. A consumer's warp releases a stage once
// all of its lanes have seen it full.
#pragma once

#include "../deadline.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace lightning_fastmoe::hopper {

constexpr int kTileM = 128;
constexpr int kTileN = 256;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerM = kTileM / kConsumers;
constexpr int kAccumulators = kTileN / 2;  // registers per thread: 64 x 256 fp32 over 128 threads
constexpr int kCluster = 2;
constexpr int kStages = 4;

constexpr int kBoxBytes = 64 * kSwizzleBytes;  // 64 rows of 128 bytes
constexpr int kBytesA = kTileM / 64 * kBoxBytes;
constexpr int kBytesB = kTileN / 64 * kBoxBytes;
constexpr int kStageBytes = kBytesA + kBytesB;

// What threads exchange is what the block was given at its start, 168 for each: taking more waits
// for ever.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * (1 + kConsumers));

// Numbers of the barriers of some warps.
constexpr int kTokensBarrier = 1;
constexpr int kConsumerBarrier = 2;  // and the next, one for each consumer

constexpr int kMaxExperts = 2048;  // what shared memory has room for beside the stages

// How a kernel starts. For other targets its body is empty and, so that nobody launches it, a block
// has a thread at most.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIGHTNING_FASTMOE_KERNEL \
  __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
#else
#define LIGHTNING_FASTMOE_KERNEL __global__ void __launch_bounds__(1)
#endif

struct Shared {
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int row_end[kMaxExperts];   // running sum of rows
  int tile_end[kMaxExperts];  // running sum of a cluster's units of work
  // Where the rows that the producer gathers start, where it looks up many at once.
  alignas(16) uint32_t row_start[2][kWarpgroup];
};

// Where consumers put results in order before they leave, 8 KB each.
constexpr int kStagingBytes = kConsumerM * kSwizzleBytes;

constexpr int kAlignment = 1024;  // of a swizzled tile
constexpr int kTilesBytes = kStages * kStageBytes + kConsumers * kStagingBytes;
constexpr int kSharedBytes = kTilesBytes + static_cast<int>(sizeof(Shared)) + kAlignment;
static_assert(kSharedBytes <= 227 * 1024);

// A place in the ring. The parity is that of the phase in which the stage is filled.
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Ring {
  uint32_t tiles;  // address of stage 0
  uint32_t full;   // addresses of the first barriers
  uint32_t empty;
  const Deadline& deadline;

  __device__ __forceinline__ uint32_t a(int stage) const { return tiles + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t b(int stage) const { return a(stage) + kBytesA; }
  // Of consumer 0 or 1.
  __device__ __forceinline__ uint32_t staging(int consumer) const {
    return tiles + kStages * kStageBytes + consumer * kStagingBytes;
  }
  __device__ __forceinline__ uint32_t full_at(int stage) const { return full + stage * 8; }
  __device__ __forceinline__ uint32_t empty_at(int stage) const { return empty + stage * 8; }

  __device__ __forceinline__ void wait_full(const Place& at) const {
    wait(full_at(at.stage), at.parity, WaitFor::kFullStage, at);
  }
  // The first round finds every stage empty.
  __device__ __forceinline__ void wait_empty(const Place& at) const {
    wait(empty_at(at.stage), at.parity ^ 1, WaitFor::kEmptyStage, at);
  }
  __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity, WaitFor what,
                                       const Place& at) const {
    delay_at_random(deadline);
    wait_until(deadline, what, static_cast<uint32_t>(at.stage) << 1 | at.parity,
               [&] { return barrier_try_wait(barrier, parity); });
  }
  // By a whole warp of a consumer: to the producers of both blocks, since both write here. All of the
  // warp's lanes must have seen the stage full: where no product and no barrier has brought them
  // together since, a __syncwarp() has to. (Here it would keep the compiler from finding the address
  // before the products are done.)
  __device__ __forceinline__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    delay_at_random(deadline);
    if (lane < kCluster) barrier_arrive_at(empty_at(stage), lane);
  }
};

// The start of a kernel, by all threads. `gathers`: whether each producer thread arrives as well.
__device__ __forceinline__ Ring make_ring(Shared& shared, uint8_t* tiles, bool gathers,
                                          const Deadline& deadline) {
  const Ring ring{shared_address(tiles), shared_address(shared.full), shared_address(shared.empty),
                  deadline};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(ring.full_at(stage), 1 + (gathers ? kWarpgroup : 0));
      barrier_init(ring.empty_at(stage), kCluster * kConsumers * kWarpgroup / 32);
    }
    barrier_init_fence();
  }
  return ring;
}

// Splits dynamic shared memory: the tiles first, at their alignment.
__device__ __forceinline__ uint8_t* tiles_of(uint8_t* dynamic) {
  const uint32_t address = shared_address(dynamic);
  return dynamic + ((address + kAlignment - 1) / kAlignment * kAlignment - address);
}

// One consumer's share of `steps` stages: D = sum over K of A B. Returns with all stages released.
// `before_last_wait` runs while the last products do.
template <typename T, Major kA, Major kB, bool kGathered, typename Prepare, typename Function>
__device__ __forceinline__ void multiply(float (&d)[kAccumulators], const Ring& ring, Place& at,
                                         int steps, int consumer, Prepare&& prepare,
                                         Function&& before_last_wait) {
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    ring.wait_full(at);
    prepare(step, at.stage);
    // Copies by threads are ordinary writes; the tensor cores must see them.
    if constexpr (kGathered) proxy_fence();
    const uint32_t half = consumer * kBoxBytes;  // 64 rows, or 64 columns of an MN-major tile
    const uint64_t a = operand<kA>(ring.a(at.stage) + half, kBoxBytes);
    const uint64_t b = operand<kB>(ring.b(at.stage), kBoxBytes);
    products_fence();
#pragma unroll
    for (int i = 0; i < kTileK / kStepK; ++i) {
      product<T, kTileN, kA, kB>(d, a + i * kOperandStep<kA>, b + i * kOperandStep<kB>,
                                 step + i > 0);
    }
    products_commit();
    products_wait<1>();
    if (step > 0) ring.release(previous);
    previous = at.stage;
    at.advance();
  }
  before_last_wait();
  products_wait<0>();
  if (steps > 0) ring.release(previous);
}

}  // namespace lightning_fastmoe::hopper
