// Grouped GEMM over rows in expert order (ragged M): D[r] = A[r] @ B[expert of r], with an epilogue
// on the accumulators.
//
// A's rows are loaded in order by TMA, or gathered: row r of A is row order[r] / top_k of a smaller
// matrix, copied by the producer, 16 bytes per thread. An M tile ends with its expert: rows beyond
// are loaded (as zeros if gathered) but not stored.
#pragma once

#include "accumulators.cuh"
#include "tensor_map.h"
#include "tile_scheduler.cuh"

namespace lightning_fastmoe::hopper {

// A consumer's 64 x 256 of D.
struct OutputTile {
  int expert;
  int row;          // the first
  int row_end;      // of the expert
  int n;            // number of the N tile
  int load_stages;  // what the epilogue loads, the same in both blocks of the cluster
  bool ordered;     // D's columns, see RaggedRowsParams

  // The row of this thread's lower (0) or upper (1) half of the accumulators.
  __device__ __forceinline__ int row_of(int half) const {
    const int thread = threadIdx.x % kWarpgroup;
    return row + thread / 32 * kWarpRows + thread % 32 / 4 + 8 * half;
  }
};

template <typename T, typename Epilogue>
struct RaggedRowsParams {
  CUtensorMap a_map;  // unless gathered; boxes of one consumer's rows
  CUtensorMap b_map;
  CUtensorMap h_map;     // of H, which the epilogue loads
  const T* gathered;     // (T, k)
  const int64_t* order;  // (N,)
  int top_k;
  const int32_t* offsets;  // (E,)
  int experts;
  int k;
  int n_tiles;
  int stagger_cycles;  // over which the clusters start one after the other
  // Whether B's columns are in the order of ordered_boxes(), so that each thread of a quad holds
  // eight consecutive columns of D rather than every fourth pair.
  bool ordered;
  Deadline deadline;
  Epilogue epilogue;
};

// B's tile as TMA boxes: two of 128 columns by 64 of K, or four of 64 of K by 64 columns.
template <Major kB>
constexpr int kBoxesB = kB == Major::kK ? 2 : 4;

// Issues the loads of B's tile: this block's half for both blocks, if they share the tile, or the
// whole tile.
template <typename T, typename Epilogue, Major kB>
__device__ __forceinline__ void load_b(const RaggedRowsParams<T, Epilogue>& params, uint32_t to,
                                       uint32_t full, int k, int expert, const WorkTile& tile,
                                       int rank) {
  constexpr int kBoxes = kBoxesB<kB>, kHalf = kBoxes / kClusterSize;
  constexpr uint16_t kAllBlocks = (1 << kClusterSize) - 1;
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) {
    if (tile.multicast && i / kHalf != rank) continue;
    BoxCoordinates at;
    if constexpr (kB == Major::kMN) {
      at = {tile.n * kTileN + i * 64, k, 0, expert};
    } else {
      // With a gate: its columns, then the up columns next to them.
      constexpr bool kGated = Epilogue::kGated;
      const int n = kGated ? tile.n * (kTileN / 2) : tile.n * kTileN + i * 128;
      const int matrix = kGated ? i : 0;
      at = {k, n, matrix, expert};
      if (params.ordered) {
        const int row = (expert * (kGated ? 2 : 1) + matrix) * params.epilogue.width + n;
        at = {k, 0, 0, 0, row / kOrderedRows};
      }
    }
    const uint32_t box = to + i * (kBytesB / kBoxes);
    if (tile.multicast) {
      tma_load_multicast(box, &params.b_map, full, at, kAllBlocks);
    } else {
      tma_load(box, &params.b_map, full, at);
    }
  }
}

// Clusters that start simultaneously run their epilogues simultaneously, and then all tensor cores
// wait for memory. If tiles are short, and numerous enough to make up for the late start, the
// clusters' starts are spread over three quarters of one tile's time; returns that in clock cycles.
// `n` is the number of B's columns.
inline int stagger_cycles(int64_t rows, int64_t k, int64_t n) {
  constexpr int64_t kLongestK = 2048, kFewestWaves = 8, kCyclesPerTileK = 900, kOtherCycles = 4500;
  const int64_t clusters = multiprocessors() / kClusterSize;
  const int64_t work_tiles = rows / (kTileM * kClusterSize) * (n / kTileN);
  if (k > kLongestK || work_tiles < kFewestWaves * clusters) return 0;
  return static_cast<int>(k / kTileK * kCyclesPerTileK + kOtherCycles);
}

template <typename T, typename Epilogue, bool kGathers, Major kB>
__device__ __forceinline__ void produce_rows(const RaggedRowsParams<T, Epilogue>& params,
                                             const Pipeline& pipeline, TileScheduler scheduler) {
  constexpr int kPasses = kTileM * kSwizzleBytes / 16 / kWarpgroup;  // vectors per thread and stage
  constexpr int kPassRows = kTileM / kPasses;
  constexpr int kRowVectors = kSwizzleBytes / 16;
  const int thread = threadIdx.x % kWarpgroup;
  const int rank = block_rank_in_cluster();
  const int vector_of_row = thread % kRowVectors, first = thread / kRowVectors;
  const uint32_t to = swizzled(first, vector_of_row);
  static_assert(kPassRows % kSwizzleRows == 0);
  const int k_tiles = (params.k + kTileK - 1) / kTileK;
  // The others would wait for stages that they take no part in filling, see pipeline.cuh.
  if (!kGathers && thread != 0) return;
  PipelineState state;
  wait_cycles(static_cast<int64_t>(params.stagger_cycles) * blockIdx.x / gridDim.x);
  for (; scheduler.fetch_work(); scheduler.advance()) {
    const int begin = scheduler.row_begin(), end = scheduler.row_end();
    const int m_tiles = (end - begin + kTileM - 1) / kTileM;
    const WorkTile tile =
        make_work_tile(scheduler.index_in_expert(), m_tiles, params.n_tiles, rank);
    const int row = begin + tile.m * kTileM;
    const bool idle = tile.n >= params.n_tiles;
    uint32_t vector[kPasses];  // of 16 bytes, where the row starts; fewer registers than pointers
    unsigned valid = 0;
    if constexpr (kGathers) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int r = row + first + i * kPassRows;
        vector[i] = 0;
        if (r < end && !idle) {
          const uint32_t pair = static_cast<uint32_t>(params.order[r]);
          vector[i] =
              pair / static_cast<uint32_t>(params.top_k) * static_cast<uint32_t>(params.k / 8);
          valid |= 1u << i;
        }
      }
    }
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      pipeline.producer_acquire(state);
      const uint32_t full = pipeline.full_barrier(state.stage);
      const int k = k_tile * kTileK;
      if (thread == 0) {
        if (idle) {
          mbarrier_arrive(full);
        } else {
          // No rows of A for a consumer that has none.
          const int halves = kGathers ? 0 : row + kConsumerM < end ? kConsumers : 1;
          mbarrier_arrive_expect_tx(full, kBytesB + halves * kBoxBytes);
          for (int i = 0; i < halves; ++i) {
            tma_load(pipeline.a(state.stage) + i * kBoxBytes, &params.a_map, full,
                     {k, row + i * kConsumerM});
          }
          load_b<T, Epilogue, kB>(params, pipeline.b(state.stage), full, k, scheduler.expert, tile,
                                  rank);
        }
      }
      if constexpr (kGathers) {
        __syncwarp();
        const bool inside = k + vector_of_row * 8 < params.k;
        const uint4* from =
            reinterpret_cast<const uint4*>(params.gathered) + (inside ? k / 8 + vector_of_row : 0);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          const bool copies = inside && (valid >> i & 1);
          cp_async_zfill(pipeline.a(state.stage) + to + i * kPassRows * kSwizzleBytes,
                         from + vector[i], copies);
        }
        cp_async_mbarrier_arrive(full);
      }
      state.advance();
    }
    // The epilogue's loads go through the pipeline too, so they are ready after the mainloop.
    const int load_stages = params.epilogue.load_stages(tile.first_n);
    for (int i = 0; i < load_stages; ++i) {
      pipeline.producer_acquire(state);
      const uint32_t full = pipeline.full_barrier(state.stage);
      if (thread == 0) {
        params.epilogue.load(pipeline, state.stage, &params.h_map, row, tile.n, i);
      }
      if constexpr (kGathers) {
        __syncwarp();
        cp_async_mbarrier_arrive(full);
      }
      state.advance();
    }
  }
}

template <typename T, typename Epilogue, bool kGathers, Major kB>
__device__ __forceinline__ void consume_rows(const RaggedRowsParams<T, Epilogue>& params,
                                             const Pipeline& pipeline, TileScheduler scheduler,
                                             int consumer) {
  const int k_tiles = (params.k + kTileK - 1) / kTileK;
  const int rank = block_rank_in_cluster();
  PipelineState state;
  for (; scheduler.fetch_work(); scheduler.advance()) {
    const int begin = scheduler.row_begin(), end = scheduler.row_end();
    const int m_tiles = (end - begin + kTileM - 1) / kTileM;
    const WorkTile work =
        make_work_tile(scheduler.index_in_expert(), m_tiles, params.n_tiles, rank);
    const int row = begin + work.m * kTileM + consumer * kConsumerM;
    const int load_stages = params.epilogue.load_stages(work.first_n);
    if (row >= end || work.n >= params.n_tiles) {  // no work, but the pipeline must advance
      for (int i = 0; i < k_tiles + load_stages; ++i) {
        pipeline.consumer_wait(state);
        __syncwarp();
        pipeline.consumer_release(state.stage);
        state.advance();
      }
      continue;
    }
    const OutputTile tile{scheduler.expert, row, end, work.n, load_stages, params.ordered};
    float d[kAccumulators];
    typename Epilogue::Rows rows;
    params.epilogue.prepare(tile, rows);
    mma_mainloop<T, Major::kK, kB, kGathers>(
        d, pipeline, state, k_tiles, consumer, [](int, int) {},
        [&] { params.epilogue.prefetch(tile, rows); });
    params.epilogue.store(tile, rows, d, pipeline, state);
  }
}

template <typename T, typename Epilogue, bool kGathers, Major kB>
LIGHTNING_FASTMOE_KERNEL ragged_rows_kernel(
    const __grid_constant__ RaggedRowsParams<T, Epilogue> params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic[];
  uint8_t* buffers = aligned_buffers(dynamic);
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(buffers + kBufferBytes);
  const Pipeline pipeline = make_pipeline(shared, buffers, kGathers, params.deadline);
  grid_dependency_wait();
  launch_dependent_grids();
  if (threadIdx.x < 32) {
    sum_work_tiles(shared, params.offsets, params.experts, [&](int rows) {
      return count_work_tiles((rows + kTileM - 1) / kTileM, params.n_tiles);
    });
  }
  __syncthreads();
  cluster_sync();  // the other block's barriers are initialised, too
  const TileScheduler scheduler{shared, params.experts, static_cast<int>(blockIdx.x / kClusterSize),
                                static_cast<int>(gridDim.x / kClusterSize)};
  const int warpgroup = warp_uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    produce_rows<T, Epilogue, kGathers, kB>(params, pipeline, scheduler);
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    consume_rows<T, Epilogue, kGathers, kB>(params, pipeline, scheduler, warpgroup - 1);
  }
  __syncwarp();
  cluster_sync();  // no block exits while the other may still write to its shared memory
#endif
}

}  // namespace lightning_fastmoe::hopper
