// The product of a router's tokens with a narrow matrix that is a sum of bf16 matrices, its parts:
// out = sum over p of A B_p. An fp32 number is the sum of three bf16 numbers, so with three parts
// the products are those of fp32, and a GPU has fifteen times the rate for them.
//
// Tensor cores truncate their fp32 sums where an fp32 instruction rounds them, which makes long
// sums ten times as inexact. So each stage's 64 terms are summed on their own, the smallest parts
// first, and added to the total by fp32 instructions.
//
//               full[stage]: 1 arrival and all bytes of TMA's loads
//              +-------------------------------------------------------------+
//              |                                                             v
//   +---------------------+     stages in shared memory     +----------------------------------+
//   | producer            |     +--------+--------+-----+   | consumers                        |
//   | one thread of the   |---->| 0: A,  | 1: A,  | ... |-->| warpgroup 0: rows 0-63 of A      |
//   | last warp           |     | parts  | parts  |     |   | warpgroup 1: rows 64-127 of A    |
//   +---------------------+     +--------+--------+-----+   +----------------------------------+
//              ^                                                             |
//              +-------------------------------------------------------------+
//               empty[stage]: 8 arrivals, one from each consumer warp
//
// While one consumer adds to its total, the tensor cores have the other's MMAs. The rules for
// waiting are those of pipeline.cuh: only the thread that waits for an empty stage fills it.
#pragma once

#include "../deadline.cuh"
#include "narrow_wgmma.cuh"
#include "ptx.cuh"

namespace lightning_fastmoe::hopper {

// Of one block: 128 rows of A, kN columns, two consumers of 64 rows each.
template <int kN, int kParts>
struct RouterTile {
  static constexpr int kRows = 128;
  static constexpr int kBoxBytes = 64 * kSwizzleBytes;
  static constexpr int kBytesA = kRows / 64 * kBoxBytes;
  static constexpr int kPartBytes = kN / 64 * kBoxBytes;
  static constexpr int kStageBytes = kBytesA + kParts * kPartBytes;
  // Two narrow blocks share a multiprocessor: together they hide each other's ends.
  static constexpr int kBlocks = kN == 64 ? 2 : 1;
  static constexpr int kFitting = (kBlocks == 2 ? 112 : 224) * 1024 / kStageBytes;
  static constexpr int kStages = kFitting < 6 ? kFitting : 6;
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + kAlignment;
  static_assert(kStages >= 2 && kSharedBytes <= 227 * 1024 / kBlocks);
};

constexpr int kRouterConsumers = 2;
constexpr int kRouterThreads = (kRouterConsumers * 4 + 1) * 32;

struct RouterProductParams {
  CUtensorMap a_map;
  CUtensorMap b_map;
  float* out;  // (rows, columns), or for MN-major operands (splits, columns, rows)
  int rows;
  int columns;
  int column_tiles;
  int row_tiles;
  int k_tiles;        // of 64
  int split_k_tiles;  // in a split of the sum
  Deadline deadline;
};

// Blocks are numbered columns first, so that those which read the same tile of A run together.
template <Major kMajor, int kN, int kParts>
__global__ void __launch_bounds__(kRouterThreads, (RouterTile<kN, kParts>::kBlocks))
    router_product_kernel(const __grid_constant__ RouterProductParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = RouterTile<kN, kParts>;
  extern __shared__ uint8_t dynamic[];
  const uint32_t start = shared_address(dynamic);
  const uint32_t stages = (start + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment;
  const uint32_t full = stages + Tile::kStages * Tile::kStageBytes;
  const uint32_t empty = full + Tile::kStages * 8;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(full + stage * 8, 1);
      mbarrier_init(empty + stage * 8, kRouterConsumers * 4);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  const int n = static_cast<int>(blockIdx.x) % params.column_tiles * kN;
  const int block = static_cast<int>(blockIdx.x) / params.column_tiles;
  const int m = block % params.row_tiles * Tile::kRows, split = block / params.row_tiles;
  const int first = split * params.split_k_tiles;
  const int k_tiles = min(params.split_k_tiles, params.k_tiles - first);
  int stage = 0;
  uint32_t parity = 0;
  const auto wait = [&](uint32_t barrier, uint32_t phase, WaitFor what) {
    delay_at_random(params.deadline);
    wait_until(params.deadline, what, static_cast<uint32_t>(stage) << 1 | phase,
               [&] { return mbarrier_try_wait(barrier, phase); });
  };
  const auto advance = [&] {
    if (++stage == Tile::kStages) {
      stage = 0;
      parity ^= 1;
    }
  };

  if (threadIdx.x >= kRouterConsumers * 128) {
    if (threadIdx.x % 32 != 0) return;
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile, advance()) {
      wait(empty + stage * 8, parity ^ 1, WaitFor::kEmptyStage);  // in the first round all are
      const uint32_t barrier = full + stage * 8, to = stages + stage * Tile::kStageBytes;
      const uint32_t parts = to + Tile::kBytesA;
      const int k = (first + k_tile) * kTileK;
      mbarrier_arrive_expect_tx(barrier, Tile::kStageBytes);
      if constexpr (kMajor == Major::kK) {
        tma_load(to, &params.a_map, barrier, {k, m});
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          tma_load(parts + p * Tile::kPartBytes, &params.b_map, barrier, {k, n, p});
        }
      } else {
#pragma unroll
        for (int i = 0; i < Tile::kRows / 64; ++i) {
          tma_load(to + i * Tile::kBoxBytes, &params.a_map, barrier, {m + i * 64, k});
        }
#pragma unroll
        for (int i = 0; i < kParts * (kN / 64); ++i) {
          tma_load(parts + i * Tile::kBoxBytes, &params.b_map, barrier,
                   {n + i % (kN / 64) * 64, k, i / (kN / 64)});
        }
      }
    }
    return;
  }

  const int consumer = warp_uniform(static_cast<int>(threadIdx.x) / 128);
  float total[kN / 2] = {};
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile, advance()) {
    wait(full + stage * 8, parity, WaitFor::kFullStage);
    const uint32_t at = stages + stage * Tile::kStageBytes;
    const uint64_t a = matrix_descriptor<kMajor>(at + consumer * Tile::kBoxBytes, Tile::kBoxBytes);
    float d[kN / 2];
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const uint64_t b = matrix_descriptor<kMajor>(at + Tile::kBytesA + p * Tile::kPartBytes,
                                                   Tile::kBoxBytes);
#pragma unroll
      for (int i = 0; i < kTileK / kMmaK; ++i) {
        narrow_wgmma<kMajor, kMajor>(d, a + i * kDescriptorStep<kMajor>,
                                     b + i * kDescriptorStep<kMajor>, p + i > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + stage * 8);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) total[i] += d[i];
  }

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = m + static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  const auto store = [&](int r, int c, float value) {
    if (r >= params.rows || c >= params.columns) return;
    if constexpr (kMajor == Major::kK) {
      params.out[static_cast<int64_t>(r) * params.columns + c] = value;
    } else {
      params.out[(static_cast<int64_t>(split) * params.columns + c) * params.rows + r] = value;
    }
  };
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store(row + i / 2 * 8, n + j * 8 + lane % 4 * 2 + i % 2, total[j * 4 + i]);
    }
  }
#endif
}

}  // namespace lightning_fastmoe::hopper
