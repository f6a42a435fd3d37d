// The memory of a group's ranks as kernels see it, and accesses to it that other GPUs observe in
// order.
#pragma once

#include <cstdint>
#include <vector>

#include "../checks.h"

namespace lightning_fastmoe {

constexpr int kMaxRanks = 32;  // one warp has a lane for each
constexpr int kFlagBytes = 128;  // a flag has a cache line of its own
constexpr int64_t kGivenUpAt = 0;  // memory with flags begins with those of ranks that gave up
constexpr int kTagBits = 16;  // the lower bits of a flag, which say what the exchange is about

// The same number of bytes of each rank, all mapped into this process.
struct Ranks {
  unsigned char* memory[kMaxRanks];
  int count;
  int own;
};

inline Ranks check_ranks(const std::vector<Tensor>& memory, int64_t own, const char* op) {
  STD_TORCH_CHECK(memory.size() >= 1 && memory.size() <= kMaxRanks, op, ": between 1 and ",
                  kMaxRanks, " ranks, not ", memory.size());
  STD_TORCH_CHECK(own >= 0 && own < static_cast<int64_t>(memory.size()), op, ": there is no rank ",
                  own);
  Ranks ranks{};
  ranks.count = static_cast<int>(memory.size());
  ranks.own = static_cast<int>(own);
  for (size_t r = 0; r < memory.size(); ++r) {
    check_tensor(memory[r], op, "each rank's memory", 1, memory[0]);
    check_dtype(memory[r], op, "each rank's memory", ScalarType::Byte);
    check_size(memory[r], op, "each rank's memory", 0, memory[0].size(0));
    ranks.memory[r] = static_cast<unsigned char*>(memory[r].data_ptr());
  }
  return ranks;
}

// Checks that [at, at + bytes) is in the memory, and starts at a multiple of 16 bytes.
inline void check_range(const Tensor& memory, int64_t at, int64_t bytes, const char* op) {
  STD_TORCH_CHECK(at >= 0 && at % kVectorBytes == 0 && bytes >= 0 && at + bytes <= memory.size(0),
                  op, ": bytes ", at, " to ", at + bytes, " are not in a rank's memory of ",
                  memory.size(0), ", or don't start at a multiple of ", kVectorBytes);
}

#ifdef __CUDACC__

// What this thread wrote or observed before is visible, to whoever reads the new value with
// load_acquire, on any GPU.
__device__ __forceinline__ void store_release(void* to, uint64_t value) {
  asm volatile("fence.acq_rel.sys;\n st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value)
               : "memory");
}

__device__ __forceinline__ uint64_t load_acquire(const void* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

#endif

}  // namespace lightning_fastmoe
