// Waiting with a deadline, on the device.
//
// Deadlines catch bugs in these kernels and should never pass; hopper/pipeline.cuh explains why
// every wait is eventually satisfied.
#pragma once

#include "deadline.h"

namespace lightning_fastmoe {

__device__ __forceinline__ uint64_t global_nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// In test builds (-DLIGHTNING_FASTMOE_DELAYS), delays a random one in eight warps by a random time,
// so that every possible order of events occurs sooner or later. Does nothing in other
// builds.
__device__ __forceinline__ void delay_at_random([[maybe_unused]] const Deadline& deadline) {
#ifdef LIGHTNING_FASTMOE_DELAYS
  const uint64_t start = global_nanoseconds();
  uint64_t hash = (static_cast<uint64_t>(clock64()) << 20 ^ start) +
                  (static_cast<uint64_t>(blockIdx.x) << 10) + threadIdx.x / 32;
  hash = (hash ^ hash >> 31) * 0x9e3779b97f4a7c15u;
  hash = __shfl_sync(__activemask(), hash ^ hash >> 29, 0);
  if (hash % 8 != 0) return;
  const uint64_t delay = (hash >> 8) % (deadline.delay_nanoseconds + 1);
  while (global_nanoseconds() - start < delay) {
  }
#endif
}

// Ends the kernel, and makes the device unusable for this process.
__device__ __forceinline__ void give_up(const Deadline& deadline, WaitFor what, uint32_t detail) {
  deadline.record->op = deadline.op;
  deadline.record->waiter = pack_waiter(blockIdx.x, threadIdx.x, detail, what);
  __threadfence_system();
  __trap();
  __builtin_unreachable();  // so that no register is kept live for what follows
}

__device__ __forceinline__ uint32_t global_ticks() {
  return static_cast<uint32_t>(global_nanoseconds() >> kTickBits);
}

// Repeats done() until it is true. Reads the clock only once done() has failed.
template <typename Done>
__device__ __forceinline__ void wait_until(const Deadline& deadline, WaitFor what, uint32_t detail,
                                           Done&& done) {
  if (done()) return;
  const uint32_t start = global_ticks();
  while (!done()) {
    if (global_ticks() - start > deadline.ticks) give_up(deadline, what, detail);
  }
}

// A grid barrier: waits until all blocks have arrived. They must all be resident (a cooperative
// launch ensures that). What any of them wrote to global memory before it can be read after it.
// `arrived` is zero when the kernel starts; `round` counts the calls, from 1.
__device__ __forceinline__ void grid_sync(unsigned* arrived, unsigned round,
                                          const Deadline& deadline) {
  __syncthreads();
  delay_at_random(deadline);
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    wait_until(deadline, WaitFor::kGrid, round, [&] {
      unsigned count;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
      return count >= round * gridDim.x;
    });
  }
  __syncthreads();
}

}  // namespace lightning_fastmoe
