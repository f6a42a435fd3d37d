// Waiting for the flags of all ranks, by one warp.
#pragma once

#include "../common.cuh"
#include "../deadline.cuh"
#include "ranks.cuh"

namespace lightning_fastmoe {

// A wait's flags, and what it says if they don't come.
struct Flags {
  int64_t at;
  uint64_t value;
  volatile int64_t* report;  // (4,), host memory
  bool fatal;
};

// Lane r waits for rank r. On failure: tells all ranks to give up, reports
//
//   (ranks whose flag is missing, ranks whose flag is of another exchange, ranks that had given up,
//    the value waited for)
//
// in host memory, and returns false; if fatal it traps, because what follows would read what never
// came.
__device__ __forceinline__ bool wait_for_all(const Ranks& ranks, const Flags& flags,
                                             const Deadline& deadline) {
  delay_at_random(deadline);
  const int lane = static_cast<int>(threadIdx.x);
  unsigned char* own = ranks.memory[ranks.own];
  const bool waits = lane < ranks.count;
  const uint32_t start = global_ticks();
  bool reached = !waits, differs = false;
  unsigned missing = 0, given_up = 0;
  while (true) {
    if (!reached) {
      const uint64_t flag = load_acquire(own + flags.at + lane * kFlagBytes);
      reached = flag == flags.value;
      differs = !reached && flag >> kTagBits >= flags.value >> kTagBits;
    }
    missing = __ballot_sync(kAllLanes, !reached);
    if (missing == 0) return true;
    given_up = __ballot_sync(
        kAllLanes, waits && load_acquire(own + kGivenUpAt + lane * kFlagBytes) != 0);
    const bool late = global_ticks() - start > deadline.ticks;
    if (__any_sync(kAllLanes, differs || given_up != 0 || late)) break;
  }
  if (!reached) {  // who has given up has set its flag before: say so, if it was another one
    const uint64_t flag = load_acquire(own + flags.at + lane * kFlagBytes);
    differs = flag != flags.value && flag >> kTagBits >= flags.value >> kTagBits;
  }
  const unsigned different = __ballot_sync(kAllLanes, differs);
  if (waits) store_release(ranks.memory[lane] + kGivenUpAt + ranks.own * kFlagBytes, 1);
  __syncwarp();
  if (lane == 0) {
    flags.report[1] = different;
    flags.report[2] = given_up;
    flags.report[3] = static_cast<int64_t>(flags.value);
    __threadfence_system();
    flags.report[0] = missing;  // last: the host looks at it first
    __threadfence_system();
    if (flags.fatal) {
      const unsigned guilty = given_up != 0 ? given_up : different != 0 ? different : missing;
      give_up(deadline, WaitFor::kRank, static_cast<uint32_t>(__ffs(guilty) - 1));
    }
  }
  return false;
}

inline void check_flags(const Tensor& memory, size_t ranks, int64_t at, const char* op) {
  check_range(memory, at, static_cast<int64_t>(ranks) * kFlagBytes, op);
}

inline volatile int64_t* check_report(const Tensor& report, const char* op) {
  STD_TORCH_CHECK(report.is_cpu() && report.numel() >= 4 && report.is_contiguous(), op,
                  ": report must be 4 contiguous elements of pinned host memory");
  check_dtype(report, op, "report", ScalarType::Long);
  return static_cast<volatile int64_t*>(report.data_ptr());
}

}  // namespace lightning_fastmoe
