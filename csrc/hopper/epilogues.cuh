// The epilogues, which process and store a tile of D in the accumulators.
//
// Each has: kGated, whether a tile's columns are 128 gate columns followed by the corresponding 128
// up columns; load_stages(n), how many additional pipeline stages it uses for N tile n, and load(),
// with which the producer fills one of them; and, for the consumers, prepare() before the mainloop,
// prefetch() while the last MMAs are in flight, and store().
#pragma once

#include "../activations.cuh"
#include "ragged_rows.cuh"

namespace lightning_fastmoe::hopper {

__device__ __forceinline__ void store_vector(void* to, uint4 vector) {
  *reinterpret_cast<uint4*>(to) = vector;
}

// Stores D as (N, width) in T: in row order, or with row r going to row order[r] of the result,
// times the weight of that row.
template <typename T>
struct StoreRows {
  static constexpr bool kGated = false;
  struct Rows {
    int out_row[2];  // of the result
    float weight[2];
  };

  T* out;
  const int64_t* order;  // (N,), or null
  const float* weights;  // (N,), or null
  int width;

  __device__ __forceinline__ int load_stages(int) const { return 0; }
  __device__ __forceinline__ void load(const Pipeline&, int, const CUtensorMap*, int, int,
                                       int) const {}
  __device__ __forceinline__ void prepare(const OutputTile& tile, Rows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row_of(half);
      const bool moves = order != nullptr && row < tile.row_end;
      rows.out_row[half] = moves ? static_cast<int>(order[row]) : row;
    }
  }
  __device__ __forceinline__ void prefetch(const OutputTile& tile, Rows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool weighs = weights != nullptr && tile.row_of(half) < tile.row_end;
      rows.weight[half] = weighs ? weights[rows.out_row[half]] : 1.0f;
    }
  }
  __device__ __forceinline__ void store(const OutputTile& tile, Rows& rows,
                                        float (&d)[kAccumulators], const Pipeline&,
                                        PipelineState&) const {
    if (tile.ordered) {
      store_in_order<true>(tile, rows, d);
    } else {
      store_in_order<false>(tile, rows, d);
    }
  }

  template <bool kOrdered>
  __device__ __forceinline__ void store_in_order(const OutputTile& tile, Rows& rows,
                                                 float (&d)[kAccumulators]) const {
    const int column = tile.n * kTileN + threadIdx.x % 4 * 8;
    if (weights != nullptr) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) d[i] *= rows.weight[i % 4 / 2];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row_of(half);
      T* to = out + static_cast<int64_t>(rows.out_row[half]) * width + column;
#pragma unroll
      for (int group = 0; group < kTileN / 32; ++group) {
        const uint4 vector = eight_columns<T, kOrdered>(d, group, half);
        if (row < tile.row_end && column + group * 32 < width)
          store_vector(to + group * 32, vector);
      }
    }
  }
};

// Stores H = D (+ bias) and A = act(H). If h is null, only A is written.
template <typename T, typename Act, bool kGated_>
struct StoreActivation {
  static constexpr bool kGated = kGated_;
  struct Rows {};
  static constexpr int kColumns = kGated ? kTileN / 2 : kTileN;

  T* h;           // (N, 2F) or (N, F)
  T* a;           // (N, F)
  const T* bias;  // (E, 2F) or (E, F), or null
  int width;      // F

  __device__ __forceinline__ int load_stages(int) const { return 0; }
  __device__ __forceinline__ void load(const Pipeline&, int, const CUtensorMap*, int, int,
                                       int) const {}
  __device__ __forceinline__ void prepare(const OutputTile&, Rows&) const {}
  __device__ __forceinline__ void prefetch(const OutputTile&, Rows&) const {}

  // Adds the bias of this thread's pairs of columns to D's gate or up columns, whose first column
  // in memory is `first`.
  template <bool kOrdered>
  __device__ __forceinline__ void add_bias(float* d, const T* row, int first) const {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const int column = first + (kOrdered ? j / 4 * 32 + 8 * lane + j % 4 * 2 : 8 * j + 2 * lane);
      if (column >= width) continue;
      const float2 pair = unpack<T>(*reinterpret_cast<const uint32_t*>(row + column));
      d[4 * j] += pair.x;
      d[4 * j + 1] += pair.y;
      d[4 * j + 2] += pair.x;
      d[4 * j + 3] += pair.y;
    }
  }

  __device__ __forceinline__ void store(const OutputTile& tile, Rows&, float (&d)[kAccumulators],
                                        const Pipeline&, PipelineState&) const {
    if (tile.ordered) {
      store_in_order<true>(tile, d);
    } else {
      store_in_order<false>(tile, d);
    }
  }

  template <bool kOrdered>
  __device__ __forceinline__ void store_in_order(const OutputTile& tile,
                                                 float (&d)[kAccumulators]) const {
    const int width_h = kGated ? 2 * width : width;
    if (bias != nullptr) {
      const T* row = bias + static_cast<int64_t>(tile.expert) * width_h;
      const int first = tile.n * kColumns;
      add_bias<kOrdered>(d, row, first);
      if constexpr (kGated) add_bias<kOrdered>(d + kAccumulators / 2, row + width, first);
    }
    const int column = tile.n * kColumns + threadIdx.x % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row_of(half);
      T* to_h = h + static_cast<int64_t>(row) * width_h + column;
      T* to_a = a + static_cast<int64_t>(row) * width + column;
#pragma unroll
      for (int group = 0; group < kColumns / 32; ++group) {
        const bool writes = row < tile.row_end && column + group * 32 < width;
        if (h != nullptr) {
          const uint4 gate = eight_columns<T, kOrdered>(d, group, half);
          if (writes) store_vector(to_h + group * 32, gate);
          if constexpr (kGated) {
            const uint4 up = eight_columns<T, kOrdered>(d + kAccumulators / 2, group, half);
            if (writes) store_vector(to_h + width + group * 32, up);
          }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (i % 4 / 2 != half) continue;
          float& gate = d[16 * group + i];
          float slope;
          gate = Act::template apply<kEpiloguePrecision<T>>(gate, &slope);
          if constexpr (kGated) gate *= d[kAccumulators / 2 + 16 * group + i];
        }
        const uint4 activated = eight_columns<T, kOrdered>(d, group, half);
        if (writes) store_vector(to_a + group * 32, activated);
      }
    }
  }
};

// From D = dA', the gradient that A would have if the routing weight w were 1, and the forward's H,
// stores dH = w D act'(H), the weighted activation w A, and this N tile's part of each row's
// <A, D>.
//
// H is loaded through the pipeline, 64 columns per stage, and the results overwrite it there before
// they are stored, so that global memory is written in whole rows of 128 bytes.
template <typename T, typename Act, bool kHasGate>
struct BackwardActivation {
  static constexpr bool kGated = false;  // D has the columns of A, in order
  static constexpr uint32_t kSubtileBytes = kTileM * kSwizzleBytes;
  static_assert(3 * kSubtileBytes <= kStageBytes);  // gate, up, weighted activation
  struct Rows {
    int pair[2];
    float weight[2];
  };

  T* d_h;                // (N, 2F) or (N, F), like H; may be the same memory
  T* weighted;           // (N, F)
  const float* weights;  // (T * K,)
  const int64_t* order;  // (N,)
  float* dots;           // (number of N tiles, N)
  int width;             // F
  int64_t rows_in_all;   // N

  __device__ __forceinline__ int load_stages(int n) const {
    const int left = (width - n * kTileN + kSubtileN - 1) / kSubtileN;
    return left < kTileN / kSubtileN ? left : kTileN / kSubtileN;
  }
  __device__ __forceinline__ void load(const Pipeline& pipeline, int stage,
                                       const CUtensorMap* h_map, int row, int n,
                                       int subtile) const {
    const uint32_t full = pipeline.full_barrier(stage);
    const int column = n * kTileN + subtile * kSubtileN;
    mbarrier_arrive_expect_tx(full, (kHasGate ? 2 : 1) * kSubtileBytes);
    tma_load(pipeline.a(stage), h_map, full, {column, row});
    if constexpr (kHasGate) {
      tma_load(pipeline.a(stage) + kSubtileBytes, h_map, full, {width + column, row});
    }
  }

  __device__ __forceinline__ void prepare(const OutputTile& tile, Rows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row_of(half);
      rows.pair[half] = row < tile.row_end ? static_cast<int>(order[row]) : 0;
    }
  }
  __device__ __forceinline__ void prefetch(const OutputTile&, Rows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.weight[half] = weights[rows.pair[half]];
  }

  // Replaces a pair of elements of H by those of dH. Returns the pair of w A.
  __device__ __forceinline__ uint32_t replace(uint32_t& gate_pair, uint32_t& up_pair, float2 grad,
                                              float weight, float& dot) const {
    const float2 gate = unpack<T>(gate_pair);
    const float2 up = kHasGate ? unpack<T>(up_pair) : float2{1.0f, 1.0f};
    float2 slope;
    const float2 activated{Act::template apply<kEpiloguePrecision<T>>(gate.x, &slope.x),
                           Act::template apply<kEpiloguePrecision<T>>(gate.y, &slope.y)};
    const float2 value{activated.x * up.x, activated.y * up.y};
    const float2 scaled{weight * grad.x, weight * grad.y};
    dot += value.x * grad.x;
    dot += value.y * grad.y;
    gate_pair = pack<T>(scaled.x * up.x * slope.x, scaled.y * up.y * slope.y);
    if constexpr (kHasGate) up_pair = pack<T>(scaled.x * activated.x, scaled.y * activated.y);
    return pack<T>(weight * value.x, weight * value.y);
  }

  // Replaces this warp's 16 rows of H at `subtile` by dH, and writes those of w A after them. d:
  // the accumulators of the same columns.
  __device__ __forceinline__ void replace_subtile(uint32_t subtile, const float* d,
                                                  const Rows& rows, float (&dot)[2]) const {
    // 8 x 8 matrices: the lower and the upper eight rows, then the same of the next columns.
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    const uint32_t mine = subtile + matrix % 2 * 8 * kSwizzleBytes + swizzled(lane % 8, matrix / 2);
    constexpr int kInFlight = 2;
#pragma unroll
    for (int first = 0; first < kSubtileN / 16; first += kInFlight) {
      uint32_t gate[kInFlight][4], up[kInFlight][4] = {};
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const uint32_t from = mine ^ ((first + n) * 32);  // two 16-byte vectors on, swizzled
        ldmatrix_x4(gate[n], from);
        if constexpr (kHasGate) ldmatrix_x4(up[n], from + kSubtileBytes);
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        uint32_t scaled[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = d + 8 * (first + n) + 2 * i;
          scaled[i] =
              replace(gate[n][i], up[n][i], {pair[0], pair[1]}, rows.weight[i % 2], dot[i % 2]);
        }
        const uint32_t to = mine ^ ((first + n) * 32);
        stmatrix_x4(to, gate[n]);
        if constexpr (kHasGate) stmatrix_x4(to + kSubtileBytes, up[n]);
        stmatrix_x4(to + 2 * kSubtileBytes, scaled);
      }
    }
  }

  // Stores a subtile, 64 columns of this warp's 16 rows, from shared memory to `to`, 16 bytes of
  // every fourth row per lane. `rows_left`: valid rows from this lane's first one on; `inside`:
  // whether the columns are valid.
  __device__ __forceinline__ void store_subtile(T* to, int64_t row_size, uint32_t from,
                                                int rows_left, bool inside) const {
    const int lane = threadIdx.x % 32;
    uint4 vectors[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      vectors[i] = load_shared_vector(from + swizzled(lane / 8 + 4 * i, lane % 8));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < rows_left && inside) store_vector(to + 4 * i * row_size, vectors[i]);
    }
  }

  __device__ __forceinline__ void store(const OutputTile& tile, Rows& rows,
                                        float (&d)[kAccumulators], const Pipeline& pipeline,
                                        PipelineState& state) const {
    const int lane = threadIdx.x % 32;
    const uint32_t warp_offset = (threadIdx.x - kWarpgroup) / 32 * kWarpRows * kSwizzleBytes;
    // What this lane stores, see store_subtile().
    const int row = tile.row + threadIdx.x % kWarpgroup / 32 * kWarpRows + lane / 8;
    const int rows_left = tile.row_end - row;
    int column = tile.n * kTileN + lane % 8 * 8;
    const int64_t width_h = kHasGate ? 2 * width : width;
    T* to_h = d_h + row * width_h + column;
    T* to_a = weighted + static_cast<int64_t>(row) * width + column;
    float dot[2] = {};
#pragma unroll
    for (int i = 0; i < kTileN / kSubtileN; ++i) {
      if (i >= tile.load_stages) break;
      pipeline.consumer_wait(state);
      const uint32_t subtile = pipeline.a(state.stage) + warp_offset;
      replace_subtile(subtile, d + i * kSubtileN / 2, rows, dot);
      __syncwarp();
      const bool inside = column < width;
      store_subtile(to_h, width_h, subtile, rows_left, inside);
      if constexpr (kHasGate) {
        store_subtile(to_h + width, width_h, subtile + kSubtileBytes, rows_left, inside);
      }
      store_subtile(to_a, width, subtile + 2 * kSubtileBytes, rows_left, inside);
      to_h += kSubtileN;
      to_a += kSubtileN;
      column += kSubtileN;
      fence_proxy_async();  // TMA writes here next
      __syncwarp();
      pipeline.consumer_release(state.stage);
      state.advance();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row_of(half);
      float sum = dot[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0 && row < tile.row_end) dots[tile.n * rows_in_all + row] = sum;
    }
  }
};

}  // namespace lightning_fastmoe::hopper
