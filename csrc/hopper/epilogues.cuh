// What becomes of a tile of D in registers.
//
// Each has: kGated, whether a tile's columns are 128 gate columns and the 128 up columns beside
// them; prefetch(), called by the producer with one row per thread; and, for the consumers, begin()
// before the products, load() while the last of them run, and finish().
#pragma once

#include "activations.cuh"
#include "ragged_rows.cuh"

namespace lightning_fastmoe::hopper {

__device__ __forceinline__ void store_vector(void* to, uint4 vector) {
  *reinterpret_cast<uint4*>(to) = vector;
}

// D itself, as (N, width) in T.
template <typename T>
struct StoreRows {
  static constexpr bool kGated = false;
  struct Rows {};

  T* out;
  int width;

  __device__ __forceinline__ int chunks(int) const { return 0; }
  __device__ __forceinline__ void fetch(const Ring&, int, const CUtensorMap*, int, int, int) const {
  }
  __device__ __forceinline__ void begin(const Tile&, Rows&) const {}
  __device__ __forceinline__ void load(const Tile&, Rows&) const {}
  __device__ __forceinline__ void finish(const Tile& tile, Rows&, const float (&d)[kAccumulators],
                                         const Ring&, Place&) const {
    const int column = tile.n * kTileN + threadIdx.x % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row_of(half);
      T* to = out + static_cast<int64_t>(row) * width + column;
#pragma unroll
      for (int group = 0; group < kTileN / 32; ++group) {
        const uint4 vector = eight_columns<T>(d, group, half);
        if (row < tile.row_end && column + group * 32 < width)
          store_vector(to + group * 32, vector);
      }
    }
  }
};

// H = D (+ bias) and A = act(H). h may be null: then only A is written.
template <typename T, typename Act, bool kGated_>
struct StoreActivation {
  static constexpr bool kGated = kGated_;
  struct Rows {};
  static constexpr int kColumns = kGated ? kTileN / 2 : kTileN;

  T* h;           // (N, 2F) or (N, F)
  T* a;           // (N, F)
  const T* bias;  // (E, 2F) or (E, F), or null
  int width;      // F

  __device__ __forceinline__ int chunks(int) const { return 0; }
  __device__ __forceinline__ void fetch(const Ring&, int, const CUtensorMap*, int, int, int) const {
  }
  __device__ __forceinline__ void begin(const Tile&, Rows&) const {}
  __device__ __forceinline__ void load(const Tile&, Rows&) const {}

  // Adds the bias of this thread's pairs of columns to one part of D.
  __device__ __forceinline__ void add_bias(float* d, const T* of_columns, int column) const {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (column + 8 * j >= width) continue;
      const float2 pair = unpack<T>(*reinterpret_cast<const uint32_t*>(of_columns + 8 * j));
      d[4 * j] += pair.x;
      d[4 * j + 1] += pair.y;
      d[4 * j + 2] += pair.x;
      d[4 * j + 3] += pair.y;
    }
  }

  __device__ __forceinline__ void finish(const Tile& tile, Rows&, float (&d)[kAccumulators],
                                         const Ring&, Place&) const {
    const int width_h = kGated ? 2 * width : width;
    if (bias != nullptr) {
      const int column = tile.n * kColumns + threadIdx.x % 4 * 2;
      const T* mine = bias + static_cast<int64_t>(tile.expert) * width_h + column;
      add_bias(d, mine, column);
      if constexpr (kGated) add_bias(d + kAccumulators / 2, mine + width, column);
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
          const uint4 gate = eight_columns<T>(d, group, half);
          if (writes) store_vector(to_h + group * 32, gate);
          if constexpr (kGated) {
            const uint4 up = eight_columns<T>(d + kAccumulators / 2, group, half);
            if (writes) store_vector(to_h + width + group * 32, up);
          }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (i % 4 / 2 != half) continue;
          float& gate = d[16 * group + i];
          float slope;
          gate = Act::apply(gate, &slope);
          if constexpr (kGated) gate *= d[kAccumulators / 2 + 16 * group + i];
        }
        const uint4 activated = eight_columns<T>(d, group, half);
        if (writes) store_vector(to_a + group * 32, activated);
      }
    }
  }
};

// With D = dA', the gradient that A would have if the routing weight w were 1, and H of the
// forward: dH = w D act'(H), the weighted activation w A, and this column tile's share of <A, D> of
// each row.
//
// H comes through the ring, 64 columns to a stage, and the results take its place there before they
// leave, so that memory sees whole rows of 128 bytes.
template <typename T, typename Act, bool kHasGate>
struct BackwardActivation {
  static constexpr bool kGated = false;  // D has the columns of A, in order
  static constexpr uint32_t kPartBytes = kTileM * kSwizzleBytes;
  static_assert(3 * kPartBytes <= kStageBytes);  // gate, up, weighted activation
  struct Rows {
    int pair[2];
    float weight[2];
  };

  T* d_h;                // (N, 2F) or (N, F), like H; may be the same memory
  T* weighted;           // (N, F)
  const float* weights;  // (T * K,)
  const int64_t* order;  // (N,)
  float* dots;           // (number of column tiles, N)
  int width;             // F
  int64_t rows_in_all;   // N

  __device__ __forceinline__ int chunks(int n) const {
    const int left = (width - n * kTileN + kChunk - 1) / kChunk;
    return left < kTileN / kChunk ? left : kTileN / kChunk;
  }
  __device__ __forceinline__ void fetch(const Ring& ring, int stage, const CUtensorMap* h_map,
                                        int row, int n, int chunk) const {
    const uint32_t full = ring.full_at(stage);
    const int column = n * kTileN + chunk * kChunk;
    barrier_arrive_expect(full, (kHasGate ? 2 : 1) * kPartBytes);
    copy_box(ring.a(stage), h_map, full, column, row, 0, 0);
    if constexpr (kHasGate) {
      copy_box(ring.a(stage) + kPartBytes, h_map, full, width + column, row, 0, 0);
    }
  }

  __device__ __forceinline__ void begin(const Tile& tile, Rows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row_of(half);
      rows.pair[half] = row < tile.row_end ? static_cast<int>(order[row]) : 0;
    }
  }
  __device__ __forceinline__ void load(const Tile&, Rows& rows) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.weight[half] = weights[rows.pair[half]];
  }

  // Replaces a pair of H by that of dH and adds that of w A. `at` is its address in the gate part.
  __device__ __forceinline__ void replace(uint32_t at, uint32_t gate_pair, uint32_t up_pair,
                                          float2 grad, float weight, float& dot) const {
    const float2 gate = unpack<T>(gate_pair);
    const float2 up = kHasGate ? unpack<T>(up_pair) : float2{1.0f, 1.0f};
    float2 slope;
    const float2 bent{Act::apply(gate.x, &slope.x), Act::apply(gate.y, &slope.y)};
    const float2 value{bent.x * up.x, bent.y * up.y};
    const float2 scaled{weight * grad.x, weight * grad.y};
    dot += value.x * grad.x;
    dot += value.y * grad.y;
    store_shared(at, pack<T>(scaled.x * up.x * slope.x, scaled.y * up.y * slope.y));
    if constexpr (kHasGate) {
      store_shared(at + kPartBytes, pack<T>(scaled.x * bent.x, scaled.y * bent.y));
    }
    store_shared(at + 2 * kPartBytes, pack<T>(weight * value.x, weight * value.y));
  }

  __device__ __forceinline__ void finish(const Tile& tile, Rows& rows, float (&d)[kAccumulators],
                                         const Ring& ring, Place& at) const {
    const int lane = threadIdx.x % 32, quad = lane / 4;
    // This warp's 16 rows of the tile.
    const int first = (threadIdx.x - kWarpgroup) / 32 * 16;
    const int first_row = tile.row + threadIdx.x % kWarpgroup / 32 * 16;
    const int width_h = kHasGate ? 2 * width : width;
    float dot[2] = {};
#pragma unroll
    for (int chunk = 0; chunk < kTileN / kChunk; ++chunk) {
      if (chunk >= tile.chunks) break;
      ring.wait_full(at);
      const uint32_t part = ring.a(at.stage) + first * kSwizzleBytes;
      const auto address = [&](int j, int half) {
        return part + swizzled(quad, j) + half * 8 * kSwizzleBytes + lane % 4 * 4;
      };
      constexpr int kAtOnce = 4;  // loads that are under way together
#pragma unroll
      for (int first_j = 0; first_j < kChunk / 8; first_j += kAtOnce) {
        uint32_t gate[2 * kAtOnce], up[2 * kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < 2 * kAtOnce; ++i) {
          gate[i] = load_shared(address(first_j + i / 2, i % 2));
          if constexpr (kHasGate) up[i] = load_shared(address(first_j + i / 2, i % 2) + kPartBytes);
        }
#pragma unroll
        for (int i = 0; i < 2 * kAtOnce; ++i) {
          const int j = first_j + i / 2, half = i % 2;
          const float* pair = d + 4 * (chunk * kChunk / 8 + j) + 2 * half;
          replace(address(j, half), gate[i], up[i], {pair[0], pair[1]}, rows.weight[half],
                  dot[half]);
        }
      }
      __syncwarp();
      const int unit = lane % 8, column = tile.n * kTileN + chunk * kChunk + unit * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = lane / 8 + 4 * i, row = first_row + r;
        if (row >= tile.row_end || column >= width) continue;
        const uint32_t from = part + swizzled(r, unit);
        T* to = d_h + static_cast<int64_t>(row) * width_h + column;
        store_vector(to, load_shared_vector(from));
        if constexpr (kHasGate) store_vector(to + width, load_shared_vector(from + kPartBytes));
        store_vector(weighted + static_cast<int64_t>(row) * width + column,
                     load_shared_vector(from + 2 * kPartBytes));
      }
      proxy_fence();  // the copy engine writes here next
      __syncwarp();
      ring.release(at.stage);
      at.advance();
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
