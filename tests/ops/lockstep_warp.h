// Enough of CUDA to run a kernel of independent warps on the CPU: 32 coroutines, which wait for each
// other at every exchange between lanes. A lane that misses an exchange leaves garbage in the others.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

using std::isnan;

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx;

namespace warp {

static ucontext_t scheduler, contexts[kWarpSize];
static bool done[kWarpSize];
static unsigned first_thread;
static uint32_t slots[kWarpSize];
static std::function<void()> kernel;

static void wait() {
  const unsigned lane = threadIdx.x % kWarpSize;
  swapcontext(&contexts[lane], &scheduler);
  threadIdx.x = first_thread + lane;
}

static void enter(int lane) {
  threadIdx.x = first_thread + lane;
  kernel();
  done[lane] = true;
  swapcontext(&contexts[lane], &scheduler);
}

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  memcpy(&slots[threadIdx.x % kWarpSize], &value, sizeof(value));
  wait();
  memcpy(&value, &slots[source % kWarpSize], sizeof(value));
  wait();
  return value;
}

// Calls `function` on the 32 lanes of each of `warps` warps.
template <typename Function>
void run(int64_t warps, Function function) {
  static char stacks[kWarpSize][1 << 17];
  kernel = function;
  for (int64_t w = 0; w < warps; ++w) {
    blockIdx.x = w / kWarpsPerBlock;
    first_thread = w % kWarpsPerBlock * kWarpSize;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      done[lane] = false;
      getcontext(&contexts[lane]);
      contexts[lane].uc_stack.ss_sp = stacks[lane];
      contexts[lane].uc_stack.ss_size = sizeof(stacks[lane]);
      makecontext(&contexts[lane], reinterpret_cast<void (*)()>(enter), 1, lane);
    }
    for (bool any = true; any;) {
      any = false;
      for (int lane = 0; lane < kWarpSize; ++lane) {
        if (done[lane]) continue;
        any = true;
        swapcontext(&scheduler, &contexts[lane]);
      }
    }
  }
}

template <typename T, typename Combine>
T reduce(T value, Combine combine) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, exchange(value, (threadIdx.x % kWarpSize) ^ offset));
  }
  return value;
}

}  // namespace warp

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return warp::exchange(value, source);
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float warp_sum(float value) {
  return warp::reduce(value, [](float a, float b) { return a + b; });
}
inline float warp_max(float value) {
  return warp::reduce(value, [](float a, float b) { return fmaxf(a, b); });
}
inline unsigned warp_max(unsigned value) {
  return warp::reduce(value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned warp_min(unsigned value) {
  return warp::reduce(value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
