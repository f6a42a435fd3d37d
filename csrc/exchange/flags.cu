// Flags by which ranks tell each other that rows have arrived, or have been read.
//
// A flag is the number of an exchange, which only grows, above a tag of kTagBits that says which
// exchange it is. Nobody resets one. Rank r writes line r of every rank's flags, and waits for all
// lines of its own.
//
// Each of these kernels is one warp: a wait keeps no multiprocessor from the kernels that it waits
// for.
#include "../common.cuh"
#include "../deadline.cuh"
#include "../ops.h"
#include "ranks.cuh"

namespace lightning_fastmoe {
namespace {

// What earlier kernels of the stream wrote, also into other GPUs' memory, is visible to whoever
// has seen the flag: the end of a kernel orders it before this one, and the release passes it on.
__global__ void __launch_bounds__(kWarpSize)
    set_kernel(const __grid_constant__ Ranks ranks, int64_t at, uint64_t value,
               const __grid_constant__ Deadline deadline) {
  delay_at_random(deadline);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < ranks.count) {
    store_release(ranks.memory[lane] + at + ranks.own * kFlagBytes, value);
  }
}

// Lane r waits for rank r. On failure: tells all ranks to give up, reports
//
//   (ranks whose flag is missing, ranks whose flag is of another exchange, ranks that had given up,
//    the value waited for)
//
// in host memory, and ends; if fatal by a trap, because what follows would read what never came.
__global__ void __launch_bounds__(kWarpSize)
    wait_kernel(const __grid_constant__ Ranks ranks, int64_t at, uint64_t value,
                volatile int64_t* report, bool fatal, const __grid_constant__ Deadline deadline) {
  delay_at_random(deadline);
  const int lane = static_cast<int>(threadIdx.x);
  unsigned char* own = ranks.memory[ranks.own];
  const bool waits = lane < ranks.count;
  const uint32_t start = global_ticks();
  bool reached = !waits, differs = false;
  unsigned missing = 0, given_up = 0;
  while (true) {
    if (!reached) {
      const uint64_t flag = load_acquire(own + at + lane * kFlagBytes);
      reached = flag == value;
      differs = !reached && flag >> kTagBits >= value >> kTagBits;
    }
    missing = __ballot_sync(kAllLanes, !reached);
    if (missing == 0) return;
    given_up = __ballot_sync(
        kAllLanes, waits && load_acquire(own + kGivenUpAt + lane * kFlagBytes) != 0);
    const bool late = global_ticks() - start > deadline.ticks;
    if (__any_sync(kAllLanes, differs || given_up != 0 || late)) break;
  }
  const unsigned different = __ballot_sync(kAllLanes, differs);
  if (waits) store_release(ranks.memory[lane] + kGivenUpAt + ranks.own * kFlagBytes, 1);
  __syncwarp();
  if (lane != 0) return;
  report[1] = different;
  report[2] = given_up;
  report[3] = static_cast<int64_t>(value);
  __threadfence_system();
  report[0] = missing;  // last: the host looks at it first
  __threadfence_system();
  if (fatal) {
    const unsigned guilty = given_up != 0 ? given_up : different != 0 ? different : missing;
    give_up(deadline, WaitFor::kRank, static_cast<uint32_t>(__ffs(guilty) - 1));
  }
}

void check_flags(const std::vector<Tensor>& memory, int64_t at, const char* op) {
  check_range(memory[0], at, static_cast<int64_t>(memory.size()) * kFlagBytes, op);
}

}  // namespace

void exchange_set_flags(std::vector<Tensor> memory, int64_t rank, int64_t at, int64_t value) {
  const char* op = "exchange_set_flags";
  const Ranks ranks = check_ranks(memory, rank, op);
  check_flags(memory, at, op);
  const Deadline deadline = deadline_for(op);
  const DeviceGuard guard(memory[0].get_device_index());
  set_kernel<<<1, kWarpSize, 0, current_stream(memory[0])>>>(
      ranks, at, static_cast<uint64_t>(value), deadline);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void exchange_wait(std::vector<Tensor> memory, int64_t rank, int64_t at, int64_t value,
                   const Tensor& report, double seconds, bool fatal) {
  const char* op = "exchange_wait";
  const Ranks ranks = check_ranks(memory, rank, op);
  check_flags(memory, at, op);
  STD_TORCH_CHECK(report.is_cpu() && report.numel() >= 4 && report.is_contiguous(), op,
                  ": report must be 4 contiguous elements of pinned host memory");
  check_dtype(report, op, "report", ScalarType::Long);
  Deadline deadline = deadline_for(op);
  deadline.ticks = ticks_of(seconds);
  const DeviceGuard guard(memory[0].get_device_index());
  wait_kernel<<<1, kWarpSize, 0, current_stream(memory[0])>>>(
      ranks, at, static_cast<uint64_t>(value), static_cast<volatile int64_t*>(report.data_ptr()),
      fatal, deadline);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace lightning_fastmoe
