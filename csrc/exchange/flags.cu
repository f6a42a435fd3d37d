// Flags by which ranks tell each other that rows have arrived, or have been read.
//
// A flag is the number of an exchange, which only grows, above a tag of kTagBits that says which
// exchange it is. Nobody resets one. Rank r writes line r of every rank's flags, and waits for all
// lines of its own.
//
// Each of these kernels is one warp: a wait keeps no multiprocessor from the kernels that it waits
// for.
#include "../ops.h"
#include "launches.h"
#include "waiting.cuh"

namespace lightning_fastmoe {
namespace {

// What earlier kernels of the stream wrote, also into other GPUs' memory, is visible to whoever
// has seen the flag: the end of a kernel orders it before this one, and the release passes it on.
__global__ void __launch_bounds__(kWarpSize)
    set_kernel(const __grid_constant__ Ranks ranks, int64_t at, uint64_t value,
               const __grid_constant__ Deadline deadline) {
  delay_at_random(deadline);
  const int lane = static_cast<int>(threadIdx.x);
  // After a wait that failed without a trap, this stream has pushed nothing, or not what it should.
  const unsigned char* given_up = ranks.memory[ranks.own] + kGivenUpAt + ranks.own * kFlagBytes;
  if (at != kGivenUpAt && load_acquire(given_up) != 0) return;
  if (lane < ranks.count) {
    store_release(ranks.memory[lane] + at + ranks.own * kFlagBytes, value);
  }
}

__global__ void __launch_bounds__(kWarpSize)
    wait_kernel(const __grid_constant__ Ranks ranks, const __grid_constant__ Flags flags,
                const __grid_constant__ Deadline deadline) {
  wait_for_all(ranks, flags, deadline);
}

}  // namespace

void set_flags(const Ranks& ranks, int64_t at, int64_t value, cudaStream_t stream, const char* op) {
  const Deadline deadline = deadline_for(op);
  set_kernel<<<1, kWarpSize, 0, stream>>>(ranks, at, static_cast<uint64_t>(value), deadline);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void exchange_set_flags(std::vector<Tensor> memory, int64_t rank, int64_t at, int64_t value) {
  const char* op = "exchange_set_flags";
  const Ranks ranks = check_ranks(memory, rank, op);
  check_flags(memory[0], memory.size(), at, op);
  const DeviceGuard guard(memory[0].get_device_index());
  set_flags(ranks, at, value, current_stream(memory[0]), op);
}

void exchange_wait(std::vector<Tensor> memory, int64_t rank, int64_t at, int64_t value,
                   const Tensor& report, double seconds, bool fatal) {
  const char* op = "exchange_wait";
  const Ranks ranks = check_ranks(memory, rank, op);
  check_flags(memory[0], memory.size(), at, op);
  const Flags flags{at, static_cast<uint64_t>(value), check_report(report, op), fatal};
  Deadline deadline = deadline_for(op);
  deadline.ticks = ticks_of(seconds);
  const DeviceGuard guard(memory[0].get_device_index());
  wait_kernel<<<1, kWarpSize, 0, current_stream(memory[0])>>>(ranks, flags, deadline);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace lightning_fastmoe
