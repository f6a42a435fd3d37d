// Launches that several of the exchange's operators make.
#pragma once

#include "ranks.cuh"

namespace lightning_fastmoe {

// Sets this rank's flag, among those at byte `at`, of every rank.
void set_flags(const Ranks& ranks, int64_t at, int64_t value, cudaStream_t stream, const char* op);

}  // namespace lightning_fastmoe
