// What is pushed where: the rows that both push kernels walk over.
#pragma once

#include <cassert>

#include "../common.cuh"
#include "ranks.cuh"

namespace lightning_fastmoe {

// What is sent: row order[i] / divisor of `rows`, or without an order row i; `ends` (ranks,) says
// where each rank's ends.
struct Sending {
  const unsigned char* rows;
  const int64_t* order;
  const int* ends;
  int64_t divisor;
  int64_t row_bytes;
  int64_t at;    // where the first row goes
  int64_t most;  // rows that there is room for
};

// A row on its way.
struct Transfer {
  const unsigned char* from;
  unsigned char* to;
};

// The n-th of `total` rows. Each rank starts with the next one's, so that not all of them write to
// the same one first.
__device__ __forceinline__ Transfer transfer_of(const Ranks& ranks, const Sending& sending,
                                                int64_t n, int64_t total) {
  const int64_t first = sending.ends[ranks.own];
  const int64_t i = first + n < total ? first + n : first + n - total;
  const int rank = static_cast<int>(expert_of(sending.ends, ranks.count, i));
  const int64_t slot = rank == 0 ? i : i - sending.ends[rank - 1];
  assert(slot < sending.most && "more rows than there is room for");
  const int64_t row = sending.order == nullptr ? i : sending.order[i] / sending.divisor;
  return {sending.rows + row * sending.row_bytes,
          ranks.memory[rank] + sending.at + slot * sending.row_bytes};
}

}  // namespace lightning_fastmoe
