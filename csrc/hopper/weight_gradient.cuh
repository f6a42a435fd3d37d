// Grouped GEMM over ragged K: G[e] = sum over the rows r of expert e of A[r]^T B[r].
//
// A is gathered as in ragged_rows.cuh, B is in expert order. Both lie in shared memory as they do
// in global memory, the summed dimension outermost. How the sum is split over the chip:
// split_k.cuh.
#pragma once

#include "accumulators.cuh"
#include "split_k.cuh"

namespace lightning_fastmoe::hopper {

template <typename T>
struct WeightGradient {
  CUtensorMap b_map;
  const T* gathered;     // (T, m)
  const int64_t* order;  // (N,)
  int top_k;
  const int32_t* offsets;  // (E,)
  int experts;
  int m;
  int n;
  int chunk;         // rows, a multiple of 64
  T* out;            // (E, m, n), or (E, n, m) if transposed
  float* workspace;  // parts of split experts, each m * n in the order of `out`
  Tail tail;         // in the same memory, since there is one or the other
  Deadline deadline;
};

// One unit of work of a cluster.
struct GradientUnit : GradientTile {
  int row_begin;
  int row_end;
  int part;    // of this expert
  bool split;  // the expert has several parts
  int steps;   // of 64 rows
};

template <typename T>
__device__ __forceinline__ GradientUnit unit_of(const WeightGradient<T>& job,
                                                const GradientWalk& position) {
  const Walk& walk = position.walk;
  const int begin = walk.row_begin(), end = walk.row_end();
  const int in_each = units_of_part(job.m, job.n), local = walk.local();
  GradientUnit unit;
  unit.part = local / in_each;
  const GradientTile tile(local - unit.part * in_each, job.m, cluster_rank());
  unit.m = tile.m;
  unit.n = tile.n;
  unit.split = chunks_of(end - begin, job.chunk) > 1;
  int chunk = job.chunk, skipped = unit.part * chunk;
  if (position.in_tail >= 0) {
    chunk = (end - begin + position.parts - 1) / position.parts;
    chunk = (chunk + kTileK - 1) / kTileK * kTileK;
    skipped = min(position.part * chunk, end - begin);
  }
  unit.row_begin = begin + skipped;
  unit.row_end = end - unit.row_begin < chunk ? end : unit.row_begin + chunk;
  unit.steps = (unit.row_end - unit.row_begin + kTileK - 1) / kTileK;
  return unit;
}

// The rows of a unit in groups of two stages, one per producer thread, across all units of a block.
template <typename T>
struct RowGroups {
  const WeightGradient<T>& job;
  GradientWalk walk;
  GradientUnit unit;
  int first_step;  // of this group
  bool exists;

  __device__ __forceinline__ RowGroups(const WeightGradient<T>& job_, const GradientWalk& walk_)
      : job(job_), walk(walk_), unit{}, first_step(0), exists(true) {
    find();
  }
  // The next unit that has rows, from `walk` on.
  __device__ __forceinline__ void find() {
    while ((exists = walk.find())) {
      unit = unit_of(job, walk);
      if (unit.steps > 0) return;
      walk.next();
    }
  }
  __device__ __forceinline__ void next() {
    first_step += kWarpgroup / kTileK;
    if (first_step < unit.steps) return;
    first_step = 0;
    walk.next();
    find();
  }
  // The (token, slot) pair of this thread's row, -1 if there is none.
  __device__ __forceinline__ int pair(int thread) const {
    const int row = unit.row_begin + first_step * kTileK + thread;
    return exists && row < unit.row_end ? static_cast<int>(job.order[row]) : -1;
  }
};

constexpr uint32_t kNoRow = ~0u;

template <typename T>
__device__ __forceinline__ void produce_gradient(const WeightGradient<T>& job, const Ring& ring,
                                                 Shared& shared, const GradientWalk& walk) {
  constexpr int kUnits = kTileM * 2 / 16;  // 16-byte vectors of a row of A's tile
  constexpr int kPassRows = kWarpgroup / kUnits;
  constexpr int kPasses = kTileK / kPassRows;
  static_assert(kPassRows % kSwizzleRows == 0);
  const int thread = threadIdx.x % kWarpgroup;
  const int rank = cluster_rank();
  const int unit_m = thread % kUnits, first = thread / kUnits;
  const uint32_t to = unit_m / 8 * kBoxBytes + swizzled(first, unit_m % 8);
  // Where this thread leaves what it looked up: a thread's rows of a stage, every kPassRows-th one,
  // are neighbours there.
  const int place =
      thread / kTileK * kTileK + thread % kPassRows * kPasses + thread % kTileK / kPassRows;
  Place at;
  // Looking up a token takes as long as a stage or two, so it runs that far ahead.
  RowGroups<T> groups(job, walk);
  int pair = groups.pair(thread);
  for (int buffer = 0; groups.exists; buffer ^= 1) {
    const uint32_t vectors = static_cast<uint32_t>(job.m / 8);  // of 16 bytes, in a token
    shared.row_start[buffer][place] =
        pair < 0 ? kNoRow
                 : static_cast<uint32_t>(pair) / static_cast<uint32_t>(job.top_k) * vectors;
    warps_sync(kTokensBarrier, kWarpgroup);  // and so all have read what lay in the other buffer
    const int m = groups.unit.m, n = groups.unit.n;
    const int row_begin = groups.unit.row_begin + groups.first_step * kTileK;
    const int left = groups.unit.steps - groups.first_step;
    const bool inside = m + unit_m * 8 < job.m;
    const uint4* column =
        reinterpret_cast<const uint4*>(job.gathered) + (inside ? m / 8 + unit_m : 0);
    groups.next();
    pair = groups.pair(thread);
#pragma unroll
    for (int step = 0; step < kWarpgroup / kTileK; ++step) {
      if (step >= left) break;
      // All at once and before the wait: one after the other, these loads would take as long as the
      // products of a stage.
      uint32_t from[kPasses];
      const uint4* mine = reinterpret_cast<const uint4*>(
          &shared.row_start[buffer][step * kTileK + first * kPasses]);
#pragma unroll
      for (int i = 0; i < kPasses / 4; ++i) {
        const uint4 four = mine[i];
        from[4 * i] = four.x;
        from[4 * i + 1] = four.y;
        from[4 * i + 2] = four.z;
        from[4 * i + 3] = four.w;
      }
      ring.wait_empty(at);
      const uint32_t full = ring.full_at(at.stage);
      if (thread == 0) {
        barrier_arrive_expect(full, kBytesB);
#pragma unroll
        for (int i = 0; i < kTileN / 64 / kCluster; ++i) {
          const int box = rank * (kTileN / 64 / kCluster) + i;
          copy_box_to_all(ring.b(at.stage) + box * kBoxBytes, &job.b_map, full,
                          {n + box * 64, row_begin + step * kTileK}, (1 << kCluster) - 1);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool copies = inside && from[i] != kNoRow;
        copy_vector(ring.a(at.stage) + to + i * kPassRows * kSwizzleBytes,
                    column + (copies ? from[i] : 0), copies);
      }
      arrive_after_copies(full);
      at.advance();
    }
  }
}

// The tile's rows of B beyond the expert's last belong to the next expert. A has zeros there, but
// zero times infinity is not zero. Each consumer clears them for itself, as waiting for the other
// would cost more than writing zeros over zeros.
__device__ __forceinline__ void clear_rows(uint8_t* tile_b, int from, int consumer) {
  const int thread = threadIdx.x % kWarpgroup;
  constexpr int kBlocks = kTileN / 64, kUnits = kSwizzleBytes / 16;
  for (int i = thread; i < (kTileK - from) * kBlocks * kUnits; i += kWarpgroup) {
    const int row = from + i / (kBlocks * kUnits), unit = i % (kBlocks * kUnits);
    uint8_t* to = tile_b + unit / kUnits * kBoxBytes + swizzled(row, unit % kUnits);
    *reinterpret_cast<uint4*>(to) = uint4{};
  }
  proxy_fence();
  warps_sync(kConsumerBarrier + consumer, kWarpgroup);
}

// How many parts the split experts before `expert` have. By a whole warp.
__device__ __forceinline__ int parts_before(const Shared& shared, int expert, int chunk) {
  int parts = 0;
  for (int e = threadIdx.x % 32; e < expert; e += 32) {
    const int chunks = chunks_of(shared.row_end[e] - (e == 0 ? 0 : shared.row_end[e - 1]), chunk);
    parts += chunks > 1 ? chunks : 0;
  }
  return __reduce_add_sync(0xffffffffu, parts);
}

// Writes a consumer's 64 x 256 of G, which start at row m and column n, as T.
template <typename T>
__device__ __forceinline__ void store_gradient(T* out, const float (&d)[kAccumulators], int m,
                                               int n, const WeightGradient<T>& job) {
  const int lane = threadIdx.x % 32;
  m += threadIdx.x % kWarpgroup / 32 * kWarpRows + lane / 4;
  n += lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = m + 8 * half;
    T* to = out + static_cast<int64_t>(row) * job.n + n;
#pragma unroll
    for (int group = 0; group < kTileN / 32; ++group) {
      const uint4 vector = eight_columns<T>(d, group, half);
      if (row < job.m && n + group * 32 < job.n)
        *reinterpret_cast<uint4*>(to + group * 32) = vector;
    }
  }
}

// The same transposed. A warp has 16 columns of each row, 32 bytes, so the four of a consumer put
// whole rows together in shared memory first.
template <typename T>
__device__ __forceinline__ void store_gradient_transposed(T* out, const float (&d)[kAccumulators],
                                                          int m, int n,
                                                          const WeightGradient<T>& job,
                                                          uint32_t staging, int barrier) {
  const int thread = threadIdx.x % kWarpgroup, unit = thread % 8, column = m + unit * 8;
#pragma unroll
  for (int chunk = 0; chunk < kTileN / kChunk; ++chunk) {
    stage_transposed<T>(staging, d + chunk * kChunk / 2, thread / 32 * 2);
    warps_sync(barrier, kWarpgroup);
#pragma unroll
    for (int first = 0; first < kChunk; first += kWarpgroup / 8) {
      const int r = first + thread / 8, row = n + chunk * kChunk + r;
      const uint4 vector = load_shared_vector(staging + swizzled(r, unit));
      if (row < job.n && column < job.m) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * job.m + column) = vector;
      }
    }
    warps_sync(barrier, kWarpgroup);
  }
}

template <bool kTransposed>
__device__ __forceinline__ void store_part(float* out, const float (&d)[kAccumulators], int m,
                                           int n, int size_m, int size_n) {
  const int lane = threadIdx.x % 32;
  m += threadIdx.x % kWarpgroup / 32 * kWarpRows;
#pragma unroll
  for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m + 8 * half + lane / 4, column = n + 8 * j + 2 * (lane % 4);
      if (row >= size_m || column >= size_n) continue;
      const float x = d[4 * j + 2 * half], y = d[4 * j + 2 * half + 1];
      if constexpr (kTransposed) {
        out[static_cast<int64_t>(column) * size_m + row] = x;
        out[static_cast<int64_t>(column + 1) * size_m + row] = y;
      } else {
        *reinterpret_cast<float2*>(out + static_cast<int64_t>(row) * size_n + column) = {x, y};
      }
    }
  }
}

template <typename T, bool kTransposed>
__device__ __forceinline__ void consume_gradient(const WeightGradient<T>& job, const Ring& ring,
                                                 uint8_t* tiles, GradientWalk position,
                                                 int consumer) {
  const int64_t size = static_cast<int64_t>(job.m) * job.n;
  Place at;
  const Walk& walk = position.walk;
  for (; position.find(); position.next()) {
    const GradientUnit unit = unit_of(job, position);
    float d[kAccumulators];
    if (unit.steps == 0) {
#pragma unroll
      for (float& value : d) value = 0.0f;
    }
    const auto prepare = [&](int step, int stage) {
      const int left = unit.row_end - unit.row_begin - step * kTileK;
      if (left < kTileK) clear_rows(tiles + stage * kStageBytes + kBytesA, left, consumer);
    };
    multiply<T, Major::kMN, Major::kMN, true>(d, ring, at, unit.steps, consumer, prepare, [] {});
    const int m = unit.m + consumer * kConsumerM;
    if (position.in_tail >= 0) {
      float4* to = job.tail.of(position.in_tail, position.part, cluster_rank(), consumer);
#pragma unroll
      for (int i = 0; i < kAccumulators; i += 4) {
        to[i / 4 * kWarpgroup] = {d[i], d[i + 1], d[i + 2], d[i + 3]};
      }
    } else if (unit.split) {
      const int64_t part = parts_before(walk.shared, walk.expert, job.chunk) + unit.part;
      store_part<kTransposed>(job.workspace + part * size, d, m, unit.n, job.m, job.n);
    } else {
      T* out = job.out + walk.expert * size;
      if constexpr (kTransposed) {
        store_gradient_transposed<T>(out, d, m, unit.n, job, ring.staging(consumer),
                                     kConsumerBarrier + consumer);
      } else {
        store_gradient<T>(out, d, m, unit.n, job);
      }
    }
  }
}

template <typename T, bool kTransposed>
LIGHTNING_FASTMOE_KERNEL weight_gradient_kernel(const __grid_constant__ WeightGradient<T> job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic[];
  uint8_t* tiles = tiles_of(dynamic);
  Shared& shared = *reinterpret_cast<Shared*>(tiles + kTilesBytes);
  const Ring ring = make_ring(shared, tiles, true, job.deadline);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (threadIdx.x < 32) {
    const int in_each = units_of_part(job.m, job.n);
    sum_units(shared, job.offsets, job.experts,
              [&](int rows) { return in_each * chunks_of(rows, job.chunk); });
  }
  __syncthreads();
  cluster_sync();
  const GradientWalk walk(job.tail, job.experts, units_of_part(job.m, job.n), shared);
  const int warpgroup = uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    give_registers_back<kProducerRegisters>();
    produce_gradient<T>(job, ring, shared, walk);
  } else {
    take_registers<kConsumerRegisters>();
    consume_gradient<T, kTransposed>(job, ring, tiles, walk, warpgroup - 1);
  }
  __syncwarp();
  cluster_sync();
#endif
}

}  // namespace lightning_fastmoe::hopper
