// A timeout for every loop in which a kernel's thread waits for other threads: when it passes, the
// kernel records which thread waited for what and traps, so that the program ends with an error
// rather than hanging.
#pragma once

#include <cstdint>
#include <string>

namespace lightning_fastmoe {

enum class WaitFor : uint32_t { kFullStage = 1, kEmptyStage = 2, kGrid = 3, kRank = 4 };

// The record of the first thread that timed out, in pinned host memory: after a trap, the host can
// no longer read the device's memory.
struct StallRecord {
  volatile uint64_t op;      // the operator's name: the const char* that the host passed
  volatile uint64_t waiter;  // see pack_waiter(); zero while no thread has timed out
};

// block: 32 bits, thread: 16, detail (a stage and its parity, a grid barrier's round, or a rank): 12,
// what for: 4.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline uint64_t pack_waiter(uint32_t block, uint32_t thread, uint32_t detail, WaitFor what) {
  return static_cast<uint64_t>(block) << 32 | (thread & 0xffffu) << 16 | (detail & 0xfffu) << 4 |
         static_cast<uint32_t>(what);
}

// Waits measure time in ticks of 2^20 ns, about a millisecond, so that one register covers 7 weeks.
constexpr int kTickBits = 20;

// What a kernel needs to keep a deadline.
struct Deadline {
  uint32_t ticks;  // the longest wait
  uint64_t op;     // const char*, for the record
  StallRecord* record;
#ifdef LIGHTNING_FASTMOE_DELAYS
  uint64_t delay_nanoseconds;
#endif
};

// The deadline of a kernel of operator `op`, a string literal. Throws if a kernel of this process
// has given up: its device is unusable from then on, and no other error would say why.
Deadline deadline_for(const char* op);

// A wait of this many seconds; 0 for no limit.
uint32_t ticks_of(double seconds);

// Which thread waited for what; "" if no kernel of this process has timed out.
std::string stall_report();

}  // namespace lightning_fastmoe
