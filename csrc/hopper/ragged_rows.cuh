// Grouped GEMM over rows in expert order: D[r] = A[r] @ B[expert of r], with an epilogue on D while
// it is in registers.
//
// A is read where it lies, through the copy engine, or gathered: row r of A is row order[r] / top_k
// of a smaller matrix, fetched 16 bytes per thread by the producer. A tile ends with its expert:
// rows beyond are read (as zeros if gathered) and not written.
#pragma once

#include "accumulators.cuh"
#include "tensor_map.h"
#include "tile_scheduler.cuh"

namespace lightning_fastmoe::hopper {

// Where a consumer's 64 rows of D stand.
struct Tile {
  int expert;
  int row;       // the first
  int row_end;   // of the expert
  int n;         // number of the column tile
  int chunks;    // stages that the epilogue reads, the same in both blocks of the cluster
  bool ordered;  // D's columns, see RaggedRows

  // The row of this thread's lower (0) or upper (1) half of D.
  __device__ __forceinline__ int row_of(int half) const {
    const int thread = threadIdx.x % kWarpgroup;
    return row + thread / 32 * kWarpRows + thread % 32 / 4 + 8 * half;
  }
};

template <typename T, typename Epilogue>
struct RaggedRows {
  CUtensorMap a_map;  // unless gathered; boxes of one consumer's rows
  CUtensorMap b_map;
  CUtensorMap h_map;     // where the epilogue reads H
  const T* gathered;     // (T, k)
  const int64_t* order;  // (N,)
  int top_k;
  const int32_t* offsets;  // (E,)
  int experts;
  int k;
  int columns;  // number of column tiles
  int spread;   // clock cycles over which the clusters start one after the other
  // Whether B's columns come in the order of ordered_boxes(), by which each thread of a quad holds
  // eight neighbours of D rather than every fourth pair.
  bool ordered;
  Deadline deadline;
  Epilogue epilogue;
};

// B's tile as boxes: two of 128 columns by 64 of K, or four of 64 of K by 64 columns.
template <Major kB>
constexpr int kBoxesB = kB == Major::kK ? 2 : 4;

// Starts the copies of B's tile: of this block's part for both, if they share it, or of all of it.
template <typename T, typename Epilogue, Major kB>
__device__ __forceinline__ void fetch_columns(const RaggedRows<T, Epilogue>& job, uint32_t to,
                                              uint32_t full, int k, int expert, const RowUnit& unit,
                                              int rank) {
  constexpr int kBoxes = kBoxesB<kB>, kPart = kBoxes / kCluster;
  constexpr uint16_t kAll = (1 << kCluster) - 1;
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) {
    if (unit.shares && i / kPart != rank) continue;
    Corner at;
    if constexpr (kB == Major::kMN) {
      at = {unit.n * kTileN + i * 64, k, 0, expert};
    } else {
      // With a gate: its columns, then the up columns beside them.
      constexpr bool kGated = Epilogue::kGated;
      const int n = kGated ? unit.n * (kTileN / 2) : unit.n * kTileN + i * 128;
      const int part = kGated ? i : 0;
      at = {k, n, part, expert};
      if (job.ordered) {
        const int row = (expert * (kGated ? 2 : 1) + part) * job.epilogue.width + n;
        at = {k, 0, 0, 0, row / kOrderedRows};
      }
    }
    const uint32_t box = to + i * (kBytesB / kBoxes);
    if (unit.shares) {
      copy_box_to_all(box, &job.b_map, full, at, kAll);
    } else {
      copy_box(box, &job.b_map, full, at);
    }
  }
}

// Clusters that start at once write their results at once, and then the tensor cores of all of them
// wait for memory. Where tiles are short, and many enough to make up for the late start, clusters
// start one after the other, over three quarters of the time of one tile, in clock cycles. `width`
// is that of B.
inline int start_spread(int64_t rows, int64_t k, int64_t width) {
  constexpr int64_t kLongestK = 2048, kFewestRounds = 8, kCyclesOfStep = 900, kOtherCycles = 4500;
  const int64_t clusters = multiprocessors() / kCluster;
  const int64_t units = rows / (kTileM * kCluster) * (width / kTileN);
  if (k > kLongestK || units < kFewestRounds * clusters) return 0;
  return static_cast<int>(k / kTileK * kCyclesOfStep + kOtherCycles);
}

template <typename T, typename Epilogue, bool kGathers, Major kB>
__device__ __forceinline__ void produce_rows(const RaggedRows<T, Epilogue>& job, const Ring& ring,
                                             Walk walk) {
  constexpr int kPasses = kTileM * kSwizzleBytes / 16 / kWarpgroup;  // vectors per thread and stage
  constexpr int kPassRows = kTileM / kPasses;
  constexpr int kUnits = kSwizzleBytes / 16;  // in a row
  const int thread = threadIdx.x % kWarpgroup;
  const int rank = cluster_rank();
  const int vector_of_row = thread % kUnits, first = thread / kUnits;
  const uint32_t to = swizzled(first, vector_of_row);
  static_assert(kPassRows % kSwizzleRows == 0);
  const int steps = (job.k + kTileK - 1) / kTileK;
  // The others would wait for stages that are filled without them, see pipeline.cuh.
  if (!kGathers && thread != 0) return;
  Place at;
  wait_cycles(static_cast<int64_t>(job.spread) * blockIdx.x / gridDim.x);
  for (; walk.find(); walk.next()) {
    const int begin = walk.row_begin(), end = walk.row_end();
    const int tiles = (end - begin + kTileM - 1) / kTileM;
    const RowUnit unit = row_unit(walk.local(), tiles, job.columns, rank);
    const int row = begin + unit.m * kTileM;
    const bool idle = unit.n >= job.columns;
    uint32_t vector[kPasses];  // of 16 bytes, where the row starts; fewer registers than pointers
    unsigned valid = 0;
    if constexpr (kGathers) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int r = row + first + i * kPassRows;
        vector[i] = 0;
        if (r < end && !idle) {
          const uint32_t pair = static_cast<uint32_t>(job.order[r]);
          vector[i] = pair / static_cast<uint32_t>(job.top_k) * static_cast<uint32_t>(job.k / 8);
          valid |= 1u << i;
        }
      }
    }
    for (int step = 0; step < steps; ++step) {
      ring.wait_empty(at);
      const uint32_t full = ring.full_at(at.stage);
      const int k = step * kTileK;
      if (thread == 0) {
        if (idle) {
          barrier_arrive(full);
        } else {
          // Of A no rows for a consumer that has none.
          const int halves = kGathers ? 0 : row + kConsumerM < end ? kConsumers : 1;
          barrier_arrive_expect(full, kBytesB + halves * kBoxBytes);
          for (int i = 0; i < halves; ++i) {
            copy_box(ring.a(at.stage) + i * kBoxBytes, &job.a_map, full, {k, row + i * kConsumerM});
          }
          fetch_columns<T, Epilogue, kB>(job, ring.b(at.stage), full, k, walk.expert, unit, rank);
        }
      }
      if constexpr (kGathers) {
        __syncwarp();
        const bool inside = k + vector_of_row * 8 < job.k;
        const uint4* from =
            reinterpret_cast<const uint4*>(job.gathered) + (inside ? k / 8 + vector_of_row : 0);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          const bool copies = inside && (valid >> i & 1);
          copy_vector(ring.a(at.stage) + to + i * kPassRows * kSwizzleBytes, from + vector[i],
                      copies);
        }
        arrive_after_copies(full);
      }
      at.advance();
    }
    // What the epilogue reads comes the same way, so it is there when the products are done.
    const int chunks = job.epilogue.chunks(unit.first_n);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ring.wait_empty(at);
      const uint32_t full = ring.full_at(at.stage);
      if (thread == 0) job.epilogue.fetch(ring, at.stage, &job.h_map, row, unit.n, chunk);
      if constexpr (kGathers) {
        __syncwarp();
        arrive_after_copies(full);
      }
      at.advance();
    }
  }
}

template <typename T, typename Epilogue, bool kGathers, Major kB>
__device__ __forceinline__ void consume_rows(const RaggedRows<T, Epilogue>& job, const Ring& ring,
                                             Walk walk, int consumer) {
  const int steps = (job.k + kTileK - 1) / kTileK;
  const int rank = cluster_rank();
  Place at;
  for (; walk.find(); walk.next()) {
    const int begin = walk.row_begin(), end = walk.row_end();
    const int tiles = (end - begin + kTileM - 1) / kTileM;
    const RowUnit unit = row_unit(walk.local(), tiles, job.columns, rank);
    const int row = begin + unit.m * kTileM + consumer * kConsumerM;
    const int chunks = job.epilogue.chunks(unit.first_n);
    if (row >= end || unit.n >= job.columns) {  // nothing here, but the ring goes on
      for (int i = 0; i < steps + chunks; ++i) {
        ring.wait_full(at);
        __syncwarp();
        ring.release(at.stage);
        at.advance();
      }
      continue;
    }
    const Tile tile{walk.expert, row, end, unit.n, chunks, job.ordered};
    float d[kAccumulators];
    typename Epilogue::Rows rows;
    job.epilogue.begin(tile, rows);
    multiply<T, Major::kK, kB, kGathers>(
        d, ring, at, steps, consumer, [](int, int) {}, [&] { job.epilogue.load(tile, rows); });
    job.epilogue.finish(tile, rows, d, ring, at);
  }
}

template <typename T, typename Epilogue, bool kGathers, Major kB>
LIGHTNING_FASTMOE_KERNEL ragged_rows_kernel(const __grid_constant__ RaggedRows<T, Epilogue> job) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic[];
  uint8_t* tiles = tiles_of(dynamic);
  Shared& shared = *reinterpret_cast<Shared*>(tiles + kTilesBytes);
  const Ring ring = make_ring(shared, tiles, kGathers, job.deadline);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (threadIdx.x < 32) {
    sum_units(shared, job.offsets, job.experts,
              [&](int rows) { return row_units((rows + kTileM - 1) / kTileM, job.columns); });
  }
  __syncthreads();
  cluster_sync();  // the other block's barriers, too
  const Walk walk{shared, job.experts, static_cast<int>(blockIdx.x / kCluster),
                  static_cast<int>(gridDim.x / kCluster)};
  const int warpgroup = uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    give_registers_back<kProducerRegisters>();
    produce_rows<T, Epilogue, kGathers, kB>(job, ring, walk);
  } else {
    take_registers<kConsumerRegisters>();
    consume_rows<T, Epilogue, kGathers, kB>(job, ring, walk, warpgroup - 1);
  }
  __syncwarp();
  cluster_sync();  // no block leaves while the other may still write to it
#endif
}

}  // namespace lightning_fastmoe::hopper
