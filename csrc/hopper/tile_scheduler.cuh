// The tile scheduler: assigns output tiles to clusters, from the experts' row counts, which only
// the device knows.
//
// Kernels are persistent: the grid has as many clusters as fit on the GPU, and cluster c computes
// work tiles c, c + clusters, ... of all work tiles in expert order. Every thread determines its
// work tiles itself, from running sums in shared memory.
#pragma once

#include "pipeline.cuh"

namespace lightning_fastmoe::hopper {

// Called by the first warp: fills shared.work_tile_end; count(i) is the number of work tiles of the
// i-th expert.
template <typename Count>
__device__ __forceinline__ void scan_work_tiles(SharedStorage& shared, int experts, Count&& count) {
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int first = 0; first < experts; first += 32) {
    const int i = first + lane;
    int sum = i < experts ? count(i) : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += below;
    }
    sum += total;
    if (i < experts) shared.work_tile_end[i] = sum;
    total = __shfl_sync(0xffffffffu, sum, 31);
  }
}

// Called by the first warp: fills shared.row_end and shared.work_tile_end; count(rows) is an
// expert's number of work tiles.
template <typename Count>
__device__ __forceinline__ void sum_work_tiles(SharedStorage& shared, const int32_t* offsets,
                                               int experts, Count&& count) {
  scan_work_tiles(shared, experts, [&](int expert) {
    const int end = offsets[expert], begin = expert == 0 ? 0 : offsets[expert - 1];
    shared.row_end[expert] = end;
    return count(end - begin);
  });
}

// Iterates over the work tiles of this cluster.
struct TileScheduler {
  const SharedStorage& shared;
  int experts;
  int work_tile;  // among those of all experts
  int clusters;
  int expert = 0;

  // Advances `expert` to the expert of `work_tile`; false if there is no such work tile. Work tiles
  // ascend, so `expert` never decreases.
  __device__ __forceinline__ bool fetch_work() {
    while (expert < experts && work_tile >= shared.work_tile_end[expert]) ++expert;
    return expert < experts;
  }
  __device__ __forceinline__ void advance() { work_tile += clusters; }
  __device__ __forceinline__ int index_in_expert() const {
    return work_tile - (expert == 0 ? 0 : shared.work_tile_end[expert - 1]);
  }
  __device__ __forceinline__ int row_begin() const {
    return expert == 0 ? 0 : shared.row_end[expert - 1];
  }
  __device__ __forceinline__ int row_end() const { return shared.row_end[expert]; }
};

// Rasterization order. Tiles that are computed at the same time should share operands in the L2
// cache: bands of pairs of M tiles, each with all of its N tiles before the next band starts. With
// few N tiles a band is one pair, so that rows, which may have to come from memory, are read once;
// B, which is small then, stays in the cache.
constexpr int kPairsPerBand = 8;
constexpr int kFewTilesN = 4;

struct TileCoordinates {
  int m;  // in pairs of M tiles
  int n;
};

__host__ __device__ __forceinline__ TileCoordinates rasterize(int index, int m_pairs, int n_tiles) {
  const int most = n_tiles <= kFewTilesN ? 1 : kPairsPerBand;
  const int band = index / (most * n_tiles), rest = index - band * most * n_tiles;
  const int pairs = m_pairs - band * most < most ? m_pairs - band * most : most;
  const int n = rest / pairs;
  return {band * most + rest - n * pairs, n};
}

// One block's part of a work tile, for an expert with m_tiles x n_tiles output tiles. Two M tiles
// form a pair that shares its N tile. A last M tile without a partner is computed by both blocks,
// at different N tiles: then B is not shared, but no block multiplies rows that don't exist.
struct WorkTile {
  int m;
  int n;
  int first_n;     // of the cluster
  bool multicast;  // whether the blocks share B's tile
};

__host__ __device__ __forceinline__ int count_work_tiles(int m_tiles, int n_tiles) {
  return m_tiles / kClusterSize * n_tiles +
         m_tiles % kClusterSize * ((n_tiles + kClusterSize - 1) / kClusterSize);
}

// Block `rank`'s part of an expert's work tile number `index`.
__host__ __device__ __forceinline__ WorkTile make_work_tile(int index, int m_tiles, int n_tiles,
                                                            int rank) {
  const int m_pairs = m_tiles / kClusterSize;
  if (index < m_pairs * n_tiles) {
    const TileCoordinates at = rasterize(index, m_pairs, n_tiles);
    return {at.m * kClusterSize + rank, at.n, at.n, true};
  }
  const int first = (index - m_pairs * n_tiles) * kClusterSize;
  return {m_tiles - 1, first + rank, first, false};
}

}  // namespace lightning_fastmoe::hopper
