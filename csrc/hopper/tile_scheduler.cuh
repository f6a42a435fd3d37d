// Which tile a cluster works on, from the experts' row counts, which only the device knows.
//
// The grid is as many clusters as fit the chip; cluster c takes the units c, c + grid, ... of all
// units in expert order. Every thread finds its units itself, from running sums in shared memory.
#pragma once

#include "pipeline.cuh"

namespace lightning_fastmoe::hopper {

// By the first warp: shared.row_end and shared.tile_end; units(rows) is an expert's number of
// units.
template <typename Units>
__device__ __forceinline__ void sum_units(Shared& shared, const int32_t* offsets, int experts,
                                          Units&& units) {
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int first = 0; first < experts; first += 32) {
    const int expert = first + lane;
    int sum = 0;
    if (expert < experts) {
      const int end = offsets[expert], begin = expert == 0 ? 0 : offsets[expert - 1];
      shared.row_end[expert] = end;
      sum = units(end - begin);
    }
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += below;
    }
    sum += total;
    if (expert < experts) shared.tile_end[expert] = sum;
    total = __shfl_sync(0xffffffffu, sum, 31);
  }
}

// Walks over the units of this cluster.
struct Walk {
  const Shared& shared;
  int experts;
  int unit;  // among all
  int step;  // clusters
  int expert = 0;

  // Moves `expert` to that of `unit`; false at the end. `unit` ascends, so it never goes back.
  __device__ __forceinline__ bool find() {
    while (expert < experts && unit >= shared.tile_end[expert]) ++expert;
    return expert < experts;
  }
  __device__ __forceinline__ void next() { unit += step; }
  __device__ __forceinline__ int local() const {
    return unit - (expert == 0 ? 0 : shared.tile_end[expert - 1]);
  }
  __device__ __forceinline__ int row_begin() const {
    return expert == 0 ? 0 : shared.row_end[expert - 1];
  }
  __device__ __forceinline__ int row_end() const { return shared.row_end[expert]; }
};

// Tiles that are worked on at the same time should share operands in the L2 cache: bands of pairs
// of row tiles, each with all of its columns before the next band starts. With few columns a band
// is one pair, so that rows, which may have to come from memory, are read once; the columns'
// operand, which is small then, stays in the cache.
constexpr int kPairsOfBand = 8;
constexpr int kFewColumns = 4;

struct TilePosition {
  int m;  // in pairs of row tiles
  int n;
};

__host__ __device__ __forceinline__ TilePosition tile_position(int local, int pairs, int columns) {
  const int most = columns <= kFewColumns ? 1 : kPairsOfBand;
  const int band = local / (most * columns), rest = local - band * most * columns;
  const int rows = pairs - band * most < most ? pairs - band * most : most;
  const int n = rest / rows;
  return {band * most + rest - n * rows, n};
}

// What one block of a cluster does of a unit of an expert's `tiles` x `columns` tiles. Two tiles of
// rows make a pair that shares its columns. A last one without a partner is worked on by both
// blocks, at different columns: those are not shared, but no block multiplies rows that don't
// exist.
struct RowUnit {
  int m;
  int n;
  int first_n;  // of the cluster
  bool shares;
};

__host__ __device__ __forceinline__ int row_units(int tiles, int columns) {
  return tiles / kCluster * columns + tiles % kCluster * ((columns + kCluster - 1) / kCluster);
}

__host__ __device__ __forceinline__ RowUnit row_unit(int local, int tiles, int columns, int rank) {
  const int pairs = tiles / kCluster;
  if (local < pairs * columns) {
    const TilePosition position = tile_position(local, pairs, columns);
    return {position.m * kCluster + rank, position.n, position.n, true};
  }
  const int first = (local - pairs * columns) * kCluster;
  return {tiles - 1, first + rank, first, false};
}

}  // namespace lightning_fastmoe::hopper
