// Launches that several of the exchange's operators make.
#pragma once

#include "ranks.cuh"

namespace lightning_fastmoe {

// Sets this rank's flag, among those at byte `at`, of every rank.
void set_flags(const Ranks& ranks, int64_t at, int64_t value, cudaStream_t stream, const char* op);

// Makes `stream` wait for what has been launched on another one.
void follow(cudaStream_t stream, cudaStream_t other);

}  // namespace lightning_fastmoe
