// Grouped GEMM over ragged K: G[e] = sum over the rows r of expert e of A[r]^T B[r].
//
// A is gathered as in ragged_rows.cuh, B is in expert order. Both are MN-major: in shared memory as
// in global memory, the summed dimension is outermost. split_k.cuh describes how the sum is split
// over the GPU.
#pragma once

#include "accumulators.cuh"
#include "split_k.cuh"

namespace lightning_fastmoe::hopper {

template <typename T>
struct WeightGradientParams {
  CUtensorMap b_map;
  const T* gathered;     // (T, m)
  const int64_t* order;  // (N,)
  int top_k;
  const int32_t* offsets;  // (E,)
  int experts;
  int m;
  int n;
  int split_rows;      // at most in a split; a multiple of 64
  T* out;              // (E, m, n), or (E, n, m) if transposed
  float* workspace;    // the splits of split experts, each m * n in the order of `out`
  LastWave last_wave;  // shares the workspace, since only one of the two is used
  Deadline deadline;
};

// One block's part of a work tile.
struct GradientWork : GradientTile {
  int row_begin;
  int row_end;
  int split;      // of this expert
  bool is_split;  // the expert has several splits
  int k_tiles;    // of 64 rows
};

template <typename T>
__device__ __forceinline__ GradientWork current_work(const WeightGradientParams<T>& params,
                                                     const SplitKScheduler& position) {
  const SharedStorage& shared = position.scheduler.shared;
  const int expert = position.expert(), end = shared.row_end[expert];
  const int begin = expert == 0 ? 0 : shared.row_end[expert - 1];
  const int tiles = tiles_of_gradient(params.m, params.n);
  const int index = position.scheduler.index_in_expert();
  GradientWork work;
  work.split = index / tiles;
  const GradientTile tile(index - work.split * tiles, params.m, block_rank_in_cluster());
  work.m = tile.m;
  work.n = tile.n;
  int splits = count_splits(end - begin, params.split_rows), split = work.split;
  work.is_split = splits > 1;
  if (position.last_wave_tile >= 0) {
    splits = position.splits;
    split = position.split;
  }
  int rows = (end - begin + splits - 1) / splits;
  rows = (rows + kTileK - 1) / kTileK * kTileK;
  const int skipped = min(split * rows, end - begin);
  work.row_begin = begin + skipped;
  work.row_end = end - work.row_begin < rows ? end : work.row_begin + rows;
  work.k_tiles = (work.row_end - work.row_begin + kTileK - 1) / kTileK;
  return work;
}

// The rows of work tiles in groups of two stages, one row per producer thread, across all work
// tiles of a block.
template <typename T>
struct RowGroups {
  const WeightGradientParams<T>& params;
  SplitKScheduler scheduler;
  GradientWork work;
  int first_k_tile;  // of this group
  bool exists;

  __device__ __forceinline__ RowGroups(const WeightGradientParams<T>& params_,
                                       const SplitKScheduler& scheduler_)
      : params(params_), scheduler(scheduler_), work{}, first_k_tile(0), exists(true) {
    find();
  }
  // The next work tile that has rows, from `scheduler` on.
  __device__ __forceinline__ void find() {
    while ((exists = scheduler.fetch_work())) {
      work = current_work(params, scheduler);
      if (work.k_tiles > 0) return;
      scheduler.advance();
    }
  }
  __device__ __forceinline__ void advance() {
    first_k_tile += kWarpgroup / kTileK;
    if (first_k_tile < work.k_tiles) return;
    first_k_tile = 0;
    scheduler.advance();
    find();
  }
  // The (token, slot) pair of this thread's row; -1 if there is none.
  __device__ __forceinline__ int pair(int thread) const {
    const int row = work.row_begin + first_k_tile * kTileK + thread;
    return exists && row < work.row_end ? static_cast<int>(params.order[row]) : -1;
  }
};

constexpr uint32_t kNoRow = ~0u;

// Issues the loads of this block's half of B's tile, for both blocks.
template <typename T>
__device__ __forceinline__ void load_b(const WeightGradientParams<T>& params, uint32_t to,
                                       uint32_t full, int row, int n, int rank) {
  constexpr int kHalf = kTileN / 64 / kClusterSize;  // in boxes of 64 columns
  constexpr uint16_t kAllBlocks = (1 << kClusterSize) - 1;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int box = rank * kHalf + i;
    tma_load_multicast(to + box * kBoxBytes, &params.b_map, full, {n + box * 64, row}, kAllBlocks);
  }
}

template <typename T>
__device__ __forceinline__ void produce_gradient(const WeightGradientParams<T>& params,
                                                 const Pipeline& pipeline, SharedStorage& shared,
                                                 const SplitKScheduler& scheduler) {
  constexpr int kRowVectors = kTileM * 2 / 16;  // 16-byte vectors of a row of A's tile
  constexpr int kPassRows = kWarpgroup / kRowVectors;
  constexpr int kPasses = kTileK / kPassRows;
  static_assert(kPassRows % kSwizzleRows == 0);
  const int thread = threadIdx.x % kWarpgroup;
  const int rank = block_rank_in_cluster();
  const int vector_of_row = thread % kRowVectors, first = thread / kRowVectors;
  const uint32_t to = vector_of_row / 8 * kBoxBytes + swizzled(first, vector_of_row % 8);
  // Where this thread stores the address it looked up: the rows that a thread copies for a stage,
  // every kPassRows-th one, are adjacent there.
  const int lookup =
      thread / kTileK * kTileK + thread % kPassRows * kPasses + thread % kTileK / kPassRows;
  PipelineState state;
  // Looking up a token takes as long as a stage or two, so it runs that far ahead.
  RowGroups<T> groups(params, scheduler);
  int pair = groups.pair(thread);
  for (int buffer = 0; groups.exists; buffer ^= 1) {
    const uint32_t vectors = static_cast<uint32_t>(params.m / 8);  // of 16 bytes, in a token
    shared.row_start[buffer][lookup] =
        pair < 0 ? kNoRow
                 : static_cast<uint32_t>(pair) / static_cast<uint32_t>(params.top_k) * vectors;
    named_barrier_sync(kTokensBarrier, kWarpgroup);  // all have read the other buffer, too
    const int m = groups.work.m, n = groups.work.n;
    const int row_begin = groups.work.row_begin + groups.first_k_tile * kTileK;
    const int left = groups.work.k_tiles - groups.first_k_tile;
    const bool inside = m + vector_of_row * 8 < params.m;
    const uint4* column =
        reinterpret_cast<const uint4*>(params.gathered) + (inside ? m / 8 + vector_of_row : 0);
    groups.advance();
    pair = groups.pair(thread);
#pragma unroll
    for (int k_tile = 0; k_tile < kWarpgroup / kTileK; ++k_tile) {
      if (k_tile >= left) break;
      // All at once and before the wait: issued one by one, these loads would take as long as the
      // MMAs of a stage.
      uint32_t from[kPasses];
      const uint4* mine = reinterpret_cast<const uint4*>(
          &shared.row_start[buffer][k_tile * kTileK + first * kPasses]);
#pragma unroll
      for (int i = 0; i < kPasses / 4; ++i) {
        const uint4 four = mine[i];
        from[4 * i] = four.x;
        from[4 * i + 1] = four.y;
        from[4 * i + 2] = four.z;
        from[4 * i + 3] = four.w;
      }
      pipeline.producer_acquire(state);
      const uint32_t full = pipeline.full_barrier(state.stage);
      if (thread == 0) {
        mbarrier_arrive_expect_tx(full, kBytesB);
        load_b<T>(params, pipeline.b(state.stage), full, row_begin + k_tile * kTileK, n, rank);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool copies = inside && from[i] != kNoRow;
        cp_async_zfill(pipeline.a(state.stage) + to + i * kPassRows * kSwizzleBytes,
                       column + (copies ? from[i] : 0), copies);
      }
      cp_async_mbarrier_arrive(full);
      state.advance();
    }
  }
}

// The rows of B's tile beyond the expert's last belong to the next expert. A has zeros there, but
// zero times infinity is not zero. Each consumer clears them itself, because waiting for the other
// would cost more than writing zeros twice.
__device__ __forceinline__ void clear_rows(uint8_t* tile_b, int from, int consumer) {
  const int thread = threadIdx.x % kWarpgroup;
  constexpr int kBoxes = kTileN / 64, kRowVectors = kSwizzleBytes / 16;
  for (int i = thread; i < (kTileK - from) * kBoxes * kRowVectors; i += kWarpgroup) {
    const int row = from + i / (kBoxes * kRowVectors), vector = i % (kBoxes * kRowVectors);
    uint8_t* to = tile_b + vector / kRowVectors * kBoxBytes + swizzled(row, vector % kRowVectors);
    *reinterpret_cast<uint4*>(to) = uint4{};
  }
  fence_proxy_async();
  named_barrier_sync(kConsumerBarrier + consumer, kWarpgroup);
}

// The total number of splits of the split experts before `expert`. Called by a whole warp.
__device__ __forceinline__ int splits_before(const SharedStorage& shared, int expert,
                                             int split_rows) {
  int sum = 0;
  for (int e = threadIdx.x % 32; e < expert; e += 32) {
    const int rows = shared.row_end[e] - (e == 0 ? 0 : shared.row_end[e - 1]);
    const int splits = count_splits(rows, split_rows);
    sum += splits > 1 ? splits : 0;
  }
  return __reduce_add_sync(0xffffffffu, sum);
}

// Stores a consumer's 64 x 256 of G, which start at row m and column n, as T.
template <typename T>
__device__ __forceinline__ void store(T* out, const float (&d)[kAccumulators], int m, int n,
                                      const WeightGradientParams<T>& params) {
  const int lane = threadIdx.x % 32;
  m += threadIdx.x % kWarpgroup / 32 * kWarpRows + lane / 4;
  n += lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = m + 8 * half;
    T* to = out + static_cast<int64_t>(row) * params.n + n;
#pragma unroll
    for (int group = 0; group < kTileN / 32; ++group) {
      const uint4 vector = eight_columns<T>(d, group, half);
      if (row < params.m && n + group * 32 < params.n)
        *reinterpret_cast<uint4*>(to + group * 32) = vector;
    }
  }
}

// The same, transposed. A warp has 16 columns of each row, 32 bytes, so a consumer's four warps
// first assemble whole rows in shared memory.
template <typename T>
__device__ __forceinline__ void store_transposed(T* out, const float (&d)[kAccumulators], int m,
                                                 int n, const WeightGradientParams<T>& params,
                                                 uint32_t staging, int barrier) {
  const int thread = threadIdx.x % kWarpgroup, vector_of_row = thread % 8;
  const int column = m + vector_of_row * 8;
#pragma unroll
  for (int subtile = 0; subtile < kTileN / kSubtileN; ++subtile) {
    write_transposed<T>(staging, d + subtile * kSubtileN / 2, thread / 32 * 2);
    named_barrier_sync(barrier, kWarpgroup);
#pragma unroll
    for (int first = 0; first < kSubtileN; first += kWarpgroup / 8) {
      const int r = first + thread / 8, row = n + subtile * kSubtileN + r;
      const uint4 vector = load_shared_vector(staging + swizzled(r, vector_of_row));
      if (row < params.n && column < params.m) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * params.m + column) = vector;
      }
    }
    named_barrier_sync(barrier, kWarpgroup);
  }
}

// Stores a split of a split expert, in fp32 and in the layout of the result.
template <bool kTransposed>
__device__ __forceinline__ void store_split(float* out, const float (&d)[kAccumulators], int m,
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

// Stores a split of the last wave, in the layout of the accumulators.
__device__ __forceinline__ void store_accumulators(float4* to, const float (&d)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; i += 4) {
    to[i / 4 * kWarpgroup] = {d[i], d[i + 1], d[i + 2], d[i + 3]};
  }
}

// Stores a consumer's part of a work tile: the gradient itself, or a partial sum. `size` is the
// size of a gradient.
template <typename T, bool kTransposed>
__device__ __forceinline__ void store_gradient(const WeightGradientParams<T>& params,
                                               const Pipeline& pipeline,
                                               const SplitKScheduler& position,
                                               const GradientWork& work,
                                               const float (&d)[kAccumulators], int64_t size,
                                               int consumer) {
  const int expert = position.expert(), m = work.m + consumer * kConsumerM;
  if (position.last_wave_tile >= 0) {
    store_accumulators(params.last_wave.accumulators(position.last_wave_tile, position.split,
                                                     block_rank_in_cluster(), consumer),
                       d);
  } else if (work.is_split) {
    const int64_t split =
        splits_before(position.scheduler.shared, expert, params.split_rows) + work.split;
    store_split<kTransposed>(params.workspace + split * size, d, m, work.n, params.m, params.n);
  } else {
    T* out = params.out + expert * size;
    if constexpr (kTransposed) {
      store_transposed<T>(out, d, m, work.n, params, pipeline.staging(consumer),
                          kConsumerBarrier + consumer);
    } else {
      store<T>(out, d, m, work.n, params);
    }
  }
}

template <typename T, bool kTransposed>
__device__ __forceinline__ void consume_gradient(const WeightGradientParams<T>& params,
                                                 const Pipeline& pipeline, uint8_t* buffers,
                                                 SplitKScheduler scheduler, int consumer) {
  const int64_t size = static_cast<int64_t>(params.m) * params.n;
  PipelineState state;
  for (; scheduler.fetch_work(); scheduler.advance()) {
    const GradientWork work = current_work(params, scheduler);
    float d[kAccumulators];
    if (work.k_tiles == 0) {
#pragma unroll
      for (float& value : d) value = 0.0f;
    }
    const auto clear_beyond_end = [&](int k_tile, int stage) {
      const int left = work.row_end - work.row_begin - k_tile * kTileK;
      if (left < kTileK) clear_rows(buffers + stage * kStageBytes + kBytesA, left, consumer);
    };
    mma_mainloop<T, Major::kMN, Major::kMN, true>(d, pipeline, state, work.k_tiles, consumer,
                                                  clear_beyond_end, [] {});
    store_gradient<T, kTransposed>(params, pipeline, scheduler, work, d, size, consumer);
  }
}

template <typename T, bool kTransposed>
LIGHTNING_FASTMOE_KERNEL weight_gradient_kernel(
    const __grid_constant__ WeightGradientParams<T> params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic[];
  uint8_t* buffers = aligned_buffers(dynamic);
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(buffers + kBufferBytes);
  const Pipeline pipeline = make_pipeline(shared, buffers, true, params.deadline);
  grid_dependency_wait();
  launch_dependent_grids();
  sort_experts(shared, params.offsets, params.experts);
  if (threadIdx.x < 32) {
    const int tiles = tiles_of_gradient(params.m, params.n);
    scan_work_tiles(shared, params.experts, [&](int position) {
      const int e = expert_at(shared, params.experts, position);
      const int rows = shared.row_end[e] - (e == 0 ? 0 : shared.row_end[e - 1]);
      return tiles * count_splits(rows, params.split_rows);
    });
  }
  __syncthreads();
  cluster_sync();  // the other block's barriers are initialised, too
  const SplitKScheduler scheduler(params.last_wave, params.experts,
                                  tiles_of_gradient(params.m, params.n), shared);
  const int warpgroup = warp_uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    produce_gradient<T>(params, pipeline, shared, scheduler);
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    consume_gradient<T, kTransposed>(params, pipeline, buffers, scheduler, warpgroup - 1);
  }
  __syncwarp();
  cluster_sync();  // no block exits while the other may still write to its shared memory
#endif
}

}  // namespace lightning_fastmoe::hopper
