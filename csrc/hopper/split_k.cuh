// Split-K of the weight gradients: which rows of which expert a work tile sums, for which tile of G
// (see weight_gradient.cuh).
//
// An expert with more than `split_rows` rows is split evenly, so that one hot expert doesn't keep a
// few blocks busy long after the others are done. If there is none, the work tiles of the last,
// mostly idle wave of clusters are split instead. Partial sums go to a workspace in fp32 and are
// added in a fixed order (split_k_reduction.cuh), so that the result is deterministic.
//
// A work tile takes as long as its expert has rows, and with uneven loads a cluster could get the
// long ones. So the experts with most rows come first, and every other wave deals its work tiles to
// the clusters in reverse. Where the busiest expert has 6 to 8 times the mean, the busiest cluster
// then has 5 to 15 % more rows than the mean; in the experts' own order it had 40 to 75 % more.
#pragma once

#include "tile_scheduler.cuh"

namespace lightning_fastmoe::hopper {

// The number of splits of an expert.
__host__ __device__ __forceinline__ int count_splits(int rows, int split_rows) {
  return rows <= split_rows ? 1 : (rows + split_rows - 1) / split_rows;
}

// The number of work tiles of a gradient G, (m, n), per split of its expert.
__host__ __device__ __forceinline__ int tiles_of_gradient(int m, int n) {
  return ((m + kTileM * kClusterSize - 1) / (kTileM * kClusterSize)) * ((n + kTileN - 1) / kTileN);
}

// The number of experts that have more rows than `expert`, or as many and come before it.
template <typename Rows>
__host__ __device__ __forceinline__ int rank_by_rows(int expert, int experts, Rows&& rows_of) {
  const int rows = rows_of(expert);
  int rank = 0;
  for (int e = 0; e < experts; ++e) {
    const int others = rows_of(e);
    rank += others > rows || (others == rows && e < expert);
  }
  return rank;
}

// Called by all threads of a block: fills shared.row_end and, unless there are too many experts,
// shared.by_rows.
__device__ __forceinline__ void sort_experts(SharedStorage& shared, const int32_t* offsets,
                                             int experts) {
  for (int e = threadIdx.x; e < experts; e += blockDim.x) shared.row_end[e] = offsets[e];
  __syncthreads();
  if (experts > kMaxSorted) return;
  const auto rows_of = [&](int e) {
    return shared.row_end[e] - (e == 0 ? 0 : shared.row_end[e - 1]);
  };
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    shared.by_rows[rank_by_rows(e, experts, rows_of)] = static_cast<uint16_t>(e);
  }
  __syncthreads();
}

// The expert whose work tiles are the `position`-th to be computed.
__device__ __forceinline__ int expert_at(const SharedStorage& shared, int experts, int position) {
  return experts > kMaxSorted ? position : shared.by_rows[position];
}

// The work tiles of the last wave, if they are split.
struct LastWave {
  int tiles;
  int splits;        // of each; at least 2 if there are tiles
  float* workspace;  // (tiles, splits, kClusterSize, kConsumers, kAccumulators / 4, kWarpgroup, 4)

  __host__ __device__ __forceinline__ int64_t workspace_floats() const {
    return int64_t{tiles} * splits * kClusterSize * kTileM * kTileN;
  }
  // The accumulators of one consumer of one block: returns this thread's first four; the next four
  // are kWarpgroup further.
  __device__ __forceinline__ float4* accumulators(int tile, int split, int rank,
                                                  int consumer) const {
    const int64_t block = (static_cast<int64_t>(tile) * splits + split) * kClusterSize + rank;
    return reinterpret_cast<float4*>(workspace) +
           (block * kConsumers + consumer) * (kAccumulators / 4) * kWarpgroup +
           threadIdx.x % kWarpgroup;
  }
};

// The position of a block's tile in G. Each of the two blocks of a cluster has 128 of the work
// tile's 256 rows.
struct GradientTile {
  int m;  // the first row
  int n;  // the first column

  GradientTile() = default;
  // The tile of the work tile number `index` of a split.
  __device__ __forceinline__ GradientTile(int index, int rows_of_g, int rank) {
    const int m_pairs = (rows_of_g + kTileM * kClusterSize - 1) / (kTileM * kClusterSize);
    n = index / m_pairs * kTileN;
    m = (index % m_pairs * kClusterSize + rank) * kTileM;
  }
};

// The number of a cluster's work tile in a wave.
__host__ __device__ __forceinline__ int number_in_wave(int wave, int cluster, int clusters) {
  return wave * clusters + (wave % 2 == 0 ? cluster : clusters - 1 - cluster);
}

// Iterates over the work tiles of this cluster, of which those of the last wave are split. The tile
// scheduler's `expert` is a position in the order of rows.
struct SplitKScheduler {
  TileScheduler scheduler;
  int whole;           // work tiles before the last wave
  int splits;          // of one in the last wave
  int wave;            // of work tiles, one for each cluster
  int last_wave_tile;  // which of the last wave's tiles this is, or negative
  int split;           // of it

  // For `experts` with `tiles` work tiles per split.
  __device__ __forceinline__ SplitKScheduler(const LastWave& last_wave, int experts, int tiles,
                                             const SharedStorage& shared)
      : scheduler{shared, experts, 0, static_cast<int>(gridDim.x / kClusterSize)},
        splits(last_wave.splits),
        wave(0) {
    const int work_tiles = shared.work_tile_end[experts - 1];
    // With split experts there are more work tiles, and the last wave is not split.
    whole = work_tiles == experts * tiles ? work_tiles - last_wave.tiles : work_tiles;
  }
  __device__ __forceinline__ bool fetch_work() {
    const int number =
        number_in_wave(wave, static_cast<int>(blockIdx.x / kClusterSize), scheduler.clusters);
    const int beyond = number - whole;
    last_wave_tile = beyond < 0 ? -1 : beyond / splits;
    split = beyond < 0 ? 0 : beyond - last_wave_tile * splits;
    scheduler.work_tile = beyond < 0 ? number : whole + last_wave_tile;
    return scheduler.fetch_work();
  }
  __device__ __forceinline__ void advance() { ++wave; }
  __device__ __forceinline__ int expert() const {
    return expert_at(scheduler.shared, scheduler.experts, scheduler.expert);
  }
};

// Splits the last wave: if it has few work tiles, into as many splits as there are idle clusters
// for, up to four. Not if there are so many waves, or splits would be so short, that the reduction
// would cost more than is gained.
inline LastWave split_last_wave(int64_t rows, int64_t m, int64_t n, int64_t experts,
                                int64_t blocks) {
  const int64_t clusters = blocks / kClusterSize;
  const int64_t tiles = experts * tiles_of_gradient(static_cast<int>(m), static_cast<int>(n));
  const int64_t left = tiles % clusters;
  const int64_t splits = left == 0 ? 1 : clusters / left < 4 ? clusters / left : 4;
  constexpr int64_t kMostWaves = 16, kFewestRows = 256;
  if (splits < 2 || tiles / clusters >= kMostWaves || rows / experts < splits * kFewestRows) {
    return {0, 1, nullptr};
  }
  return {static_cast<int>(left), static_cast<int>(splits), nullptr};
}

// The most rows of a split of an expert. One expert's tiles occupy a fraction t of all blocks;
// if it had all rows, in s splits, it would take ceil(s t) / s of the time without splits. Among
// the s for which a split takes half to two thirds of the time that all blocks together need, this
// chooses the smallest that is near the optimum, because each split costs memory. If an expert's
// tiles keep nearly all blocks busy, it is never split and needs no workspace.
inline int64_t rows_per_split(int64_t rows, int64_t m, int64_t n, int64_t blocks) {
  const int64_t tiles =
      int64_t{kClusterSize} * tiles_of_gradient(static_cast<int>(m), static_cast<int>(n));
  int64_t splits = 1;
  if (5 * tiles < 4 * blocks) {
    const int64_t fewest = (3 * blocks + 2 * tiles - 1) / (2 * tiles);
    const int64_t most = (2 * blocks + tiles - 1) / tiles + 1;
    const auto time = [&](int64_t s) {
      return static_cast<double>((s * tiles + blocks - 1) / blocks) / static_cast<double>(s);
    };
    double best = time(fewest);
    for (int64_t s = fewest + 1; s <= most; ++s) best = time(s) < best ? time(s) : best;
    for (splits = fewest; time(splits) > 1.125 * best;) ++splits;
  }
  const int64_t wanted = (rows + splits - 1) / splits;
  return (wanted + kTileK - 1) / kTileK * kTileK;
}

// The maximum number of splits over all split experts, for any routing: each of them has more than
// `split_rows` rows, and at most one split that is not full.
inline int64_t max_splits(int64_t rows, int64_t split_rows) {
  const int64_t experts = rows / (split_rows + 1);
  return experts == 0 ? 0 : experts + (rows - experts) / split_rows;
}

}  // namespace lightning_fastmoe::hopper
