// Grouped GEMM over ragged K: G[e] = sum over the rows r of expert e of A[r]^T B[r].
//
// A is gathered as in ragged_rows.cuh, B is in expert order. Both lie in shared memory as they do
// in global memory, the summed dimension outermost. An expert of more than `chunk` rows is split,
// so that one hot expert does not keep a few blocks busy long after the others are done; its parts
// go to a workspace in fp32 and are added in their order, which makes the sum the same every time.
#pragma once

#include "fragment.cuh"
#include "schedule.cuh"

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
};

__host__ __device__ __forceinline__ int chunks_of(int rows, int chunk) {
  return rows <= chunk ? 1 : (rows + chunk - 1) / chunk;
}

// One unit of work of a cluster; each of its two blocks has 128 of the 256 rows of G.
struct GradientUnit {
  int m;  // the first row of G
  int n;  // the first column
  int row_begin;
  int row_end;
  int part;    // of this expert
  bool split;  // the expert has several parts
  int steps;   // of 64 rows
};

template <typename T>
__device__ __forceinline__ GradientUnit unit_of(const WeightGradient<T>& job, const Walk& walk) {
  const int begin = walk.row_begin(), end = walk.row_end();
  const int pairs = (job.m + kTileM * kCluster - 1) / (kTileM * kCluster);
  const int columns = (job.n + kTileN - 1) / kTileN;
  const int local = walk.local();
  GradientUnit unit;
  unit.part = local / (pairs * columns);
  const int tile = local - unit.part * pairs * columns;
  unit.n = tile / pairs * kTileN;
  unit.m = (tile % pairs * kCluster + static_cast<int>(cluster_rank())) * kTileM;
  unit.split = chunks_of(end - begin, job.chunk) > 1;
  unit.row_begin = begin + unit.part * job.chunk;
  unit.row_end = end - unit.row_begin < job.chunk ? end : unit.row_begin + job.chunk;
  unit.steps = (unit.row_end - unit.row_begin + kTileK - 1) / kTileK;
  return unit;
}

// The rows of a unit in groups of two stages, one per producer thread, across all units of a block.
template <typename T>
struct RowGroups {
  const WeightGradient<T>& job;
  Walk walk;
  GradientUnit unit;
  int first_step;  // of this group
  bool exists;

  __device__ __forceinline__ RowGroups(const WeightGradient<T>& job_, const Walk& walk_)
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
                                                 Shared& shared, const Walk& walk) {
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
                                                 uint8_t* tiles, Walk walk, int consumer) {
  const int64_t size = static_cast<int64_t>(job.m) * job.n;
  Place at;
  for (; walk.find(); walk.next()) {
    const GradientUnit unit = unit_of(job, walk);
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
    if (unit.split) {
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
  const Ring ring = make_ring(shared, tiles, true);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (threadIdx.x < 32) {
    const int in_each =
        ((job.m + kTileM * kCluster - 1) / (kTileM * kCluster)) * ((job.n + kTileN - 1) / kTileN);
    sum_units(shared, job.offsets, job.experts,
              [&](int rows) { return in_each * chunks_of(rows, job.chunk); });
  }
  __syncthreads();
  cluster_sync();
  const Walk walk{shared, job.experts, static_cast<int>(blockIdx.x / kCluster),
                  static_cast<int>(gridDim.x / kCluster)};
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

// Adds the parts of split experts, in their order. Every block takes a share of each. (Pointers are
// not __restrict__: the compiler may read such ones before the wait.)
template <typename T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const float* workspace, const int32_t* offsets, T* out, int experts, int chunk,
                     int64_t size) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  __shared__ int parts[kMaxExperts];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    parts[e] = chunks_of(offsets[e] - (e == 0 ? 0 : offsets[e - 1]), chunk);
  }
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  int64_t part = 0;
  for (int e = 0; e < experts; ++e) {
    if (parts[e] == 1) continue;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size;
         i += step) {
      float sum[8] = {};
      for (int p = 0; p < parts[e]; ++p) {
        const float4* from = reinterpret_cast<const float4*>(workspace + (part + p) * size + i);
        const float4 x = from[0], y = from[1];
        const float values[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += values[j];
      }
      *reinterpret_cast<uint4*>(out + e * size + i) = {
          pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]), pack<T>(sum[4], sum[5]),
          pack<T>(sum[6], sum[7])};
    }
    part += parts[e];
  }
}

// How an expert is split: when its rows would keep a block busy for more than half of the time that
// all rows take all blocks. Where an expert's tiles keep nearly all blocks busy by themselves it
// never is, and needs no workspace.
inline int64_t gradient_chunk(int64_t rows, int64_t m, int64_t n, int64_t blocks) {
  const int64_t tiles =
      ((m + kTileM * kCluster - 1) / (kTileM * kCluster)) * kCluster * ((n + kTileN - 1) / kTileN);
  const bool fills = 5 * tiles >= 4 * blocks;
  const int64_t wanted = fills ? rows : (rows * tiles + 2 * blocks - 1) / (2 * blocks);
  return (wanted + kTileK - 1) / kTileK * kTileK;
}

// Parts that the split experts can have at most, whatever the routing.
inline int64_t gradient_parts(int64_t rows, int64_t chunk) {
  return rows <= chunk ? 0 : 2 * rows / chunk;
}

}  // namespace lightning_fastmoe::hopper
