// How the weights' gradients are split into units of work: which part of which expert's rows, for
// which tile of G (see weight_gradient.cuh), a cluster adds up.
//
// An expert of more than `chunk` rows is split, so that one hot expert does not keep a few blocks
// busy long after the others are done. Where none is, the units that are left for a last, mostly
// idle round of the clusters (the tail) are split instead. Parts go to a workspace in fp32 and are
// added in their order (split_k_reduction.cuh), which makes the sum the same every time.
#pragma once

#include "tile_scheduler.cuh"

namespace lightning_fastmoe::hopper {

__host__ __device__ __forceinline__ int chunks_of(int rows, int chunk) {
  return rows <= chunk ? 1 : (rows + chunk - 1) / chunk;
}

// Of a gradient G, (m, n), for each part of its expert.
__host__ __device__ __forceinline__ int units_of_part(int m, int n) {
  return ((m + kTileM * kCluster - 1) / (kTileM * kCluster)) * ((n + kTileN - 1) / kTileN);
}

// The last round's units, if they are split.
struct Tail {
  int units;
  int parts;         // of each; at least 2 if there are units
  float* workspace;  // (units, parts, kCluster, kConsumers, kAccumulators / 4, kWarpgroup, 4)

  __host__ __device__ __forceinline__ int64_t floats() const {
    return int64_t{units} * parts * kCluster * kTileM * kTileN;
  }
  // The accumulators of one consumer of one block, of this thread the first four; the next are
  // kWarpgroup on.
  __device__ __forceinline__ float4* of(int unit, int part, int rank, int consumer) const {
    const int64_t share = (static_cast<int64_t>(unit) * parts + part) * kCluster + rank;
    return reinterpret_cast<float4*>(workspace) +
           (share * kConsumers + consumer) * (kAccumulators / 4) * kWarpgroup +
           threadIdx.x % kWarpgroup;
  }
};

// Where a unit of work is in G. Each of the two blocks of a cluster has 128 of its 256 rows.
struct GradientTile {
  int m;  // the first row
  int n;  // the first column

  GradientTile() = default;
  // Of the units of a part, number `unit`.
  __device__ __forceinline__ GradientTile(int unit, int rows_of_g, int rank) {
    const int pairs = (rows_of_g + kTileM * kCluster - 1) / (kTileM * kCluster);
    n = unit / pairs * kTileN;
    m = (unit % pairs * kCluster + rank) * kTileM;
  }
};

// Walks over the units of this cluster, of which those of the tail come in parts.
struct GradientWalk {
  Walk walk;
  int whole;  // units before the tail
  int parts;  // of one in the tail
  int number;
  int in_tail;  // which of the tail's units this is, or negative
  int part;     // of it

  // Of `experts` with `in_each` units for each part.
  __device__ __forceinline__ GradientWalk(const Tail& tail, int experts, int in_each,
                                          const Shared& shared)
      : walk{shared, experts, 0, static_cast<int>(gridDim.x / kCluster)},
        parts(tail.parts),
        number(static_cast<int>(blockIdx.x / kCluster)) {
    const int units = shared.tile_end[experts - 1];
    // With split experts there are more units, and no tail.
    whole = units == experts * in_each ? units - tail.units : units;
  }
  __device__ __forceinline__ bool find() {
    const int beyond = number - whole;
    in_tail = beyond < 0 ? -1 : beyond / parts;
    part = beyond < 0 ? 0 : beyond - in_tail * parts;
    walk.unit = beyond < 0 ? number : whole + in_tail;
    return walk.find();
  }
  __device__ __forceinline__ void next() { number += walk.step; }
};

// How the tail is split: if the clusters' last round has few units, in as many parts as there are
// clusters for, up to four. Not if rounds are so many, or parts would be so short, that the sum of
// the parts takes what is gained.
inline Tail gradient_tail(int64_t rows, int64_t m, int64_t n, int64_t experts, int64_t blocks) {
  const int64_t clusters = blocks / kCluster;
  const int64_t units = experts * units_of_part(static_cast<int>(m), static_cast<int>(n));
  const int64_t left = units % clusters;
  const int64_t parts = left == 0 ? 1 : clusters / left < 4 ? clusters / left : 4;
  constexpr int64_t kMostRounds = 16, kFewestRows = 256;
  if (parts < 2 || units / clusters >= kMostRounds || rows / experts < parts * kFewestRows) {
    return {0, 1, nullptr};
  }
  return {static_cast<int>(left), static_cast<int>(parts), nullptr};
}

// How an expert is split, in chunks of so many rows. One expert's tiles take a share t of all
// blocks; if it had all rows, in p parts, it would take ceil(p t) / p of the time that they take it
// alone. Of the p that make a part half to two thirds as long as all blocks together need, we take
// the fewest that are near the best, for each costs memory. Where an expert's tiles keep nearly all
// blocks busy by themselves it is never split, and needs no workspace.
inline int64_t gradient_chunk(int64_t rows, int64_t m, int64_t n, int64_t blocks) {
  const int64_t tiles = int64_t{kCluster} * units_of_part(static_cast<int>(m), static_cast<int>(n));
  int64_t parts = 1;
  if (5 * tiles < 4 * blocks) {
    const int64_t fewest = (3 * blocks + 2 * tiles - 1) / (2 * tiles);
    const int64_t most = (2 * blocks + tiles - 1) / tiles + 1;
    const auto time = [&](int64_t p) {
      return static_cast<double>((p * tiles + blocks - 1) / blocks) / static_cast<double>(p);
    };
    double best = time(fewest);
    for (int64_t p = fewest + 1; p <= most; ++p) best = time(p) < best ? time(p) : best;
    for (parts = fewest; time(parts) > 1.125 * best;) ++parts;
  }
  const int64_t wanted = (rows + parts - 1) / parts;
  return (wanted + kTileK - 1) / kTileK * kTileK;
}

// Parts that the split experts can have at most, whatever the routing: each of them has more than
// `chunk` rows, and one part more than whole chunks.
inline int64_t gradient_parts(int64_t rows, int64_t chunk) {
  const int64_t experts = rows / (chunk + 1);
  return experts == 0 ? 0 : experts + (rows - experts) / chunk;
}

}  // namespace lightning_fastmoe::hopper
