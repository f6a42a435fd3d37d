// Each token's sum over its rows, as sum_rows of permute.cu, by bulk copies: as fast as a copy.
//
//   full[stage]: 1 arrival, after the weights, and all bytes     empty[stage]: 1 arrival per warp
//
//   +----------------------+     stages: a part of each of     +--------------------------------+
//   | producer, one warp:  |     the token's rows, weights     | workers: one 16-byte vector    |
//   | lane k copies row k  |---->+--------+--------+     ----->| of the sum per thread,         |
//   | and its weight       |     |   0    |   1    |           | in fp32, in slot order         |
//   +----------------------+     +--------+--------+           +--------------------------------+
//
// Rows that lie anywhere are loaded at 0.7 to 0.8 of the speed of a copy if each thread loads what
// it adds: a thread first needs the row's number, then the row, and few fit into its registers.
// Here the producer has the next token's numbers while the rows of this one are on their way.
//
// The rules for waiting are those of pipeline.cuh: lane 0 alone waits for an empty stage, and
// arrives at the full barrier.
#include <algorithm>

#include "checks.cuh"
#include "launch.cuh"
#include "ops.h"

namespace lightning_fastmoe::hopper {
namespace {

constexpr int kSumStages = 2;
constexpr int kMaxRows = 32;  // of a token: one for each lane of the producer
constexpr int kMaxPartBytes = 4096, kMaxStageBytes = 32 * 1024;
constexpr int kMinPartVectors = 32;       // shorter copies cost more than they bring
constexpr int kMaxBlocks = 6;             // on a multiprocessor
constexpr int kSharedOfAll = 200 * 1024;  // likewise
constexpr int kMinItems = 4;              // for each multiprocessor

struct SumRowsParams {
  const uint4* rows;       // (N, vectors)
  const int64_t* inverse;  // (tokens * top_k,)
  const float* weights;    // the same, or null
  uint4* out;              // (tokens, vectors)
  int items;               // parts of tokens
  int vectors;             // of 16 bytes, in a row
  int parts;               // of a row
  int part_vectors;        // in all parts but the last
  int top_k;
  Deadline deadline;
};

struct SumRowsStorage {
  uint64_t full[kSumStages];
  uint64_t empty[kSumStages];
  uint32_t rows[kSumStages];  // a mask: a pair without a row adds nothing
  float weights[kSumStages][kMaxRows];
};

template <typename T, int kWorkers>
__global__ void __launch_bounds__(kWorkers + kWarpSize)
    bulk_sum_rows_kernel(const __grid_constant__ SumRowsParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int N = kVectorSize<T>;
  extern __shared__ __align__(128) uint8_t stages[];
  __shared__ SumRowsStorage shared;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kSumStages; ++stage) {
      mbarrier_init(shared_address(&shared.full[stage]), 1);
      mbarrier_init(shared_address(&shared.empty[stage]), kWorkers / kWarpSize);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  grid_dependency_wait();
  launch_dependent_grids();

  const int row_bytes = params.part_vectors * kVectorBytes;  // in a stage
  const int stage_bytes = params.top_k * row_bytes;
  int stage = 0;
  uint32_t parity = 0;
  const auto wait = [&](uint64_t& barrier, uint32_t phase, WaitFor what) {
    delay_at_random(params.deadline);
    wait_until(params.deadline, what, static_cast<uint32_t>(stage) << 1 | phase,
               [&] { return mbarrier_try_wait(shared_address(&barrier), phase); });
  };
  const auto advance = [&] {
    if (++stage == kSumStages) {
      stage = 0;
      parity ^= 1;
    }
  };
  const auto after = [&](int item) {  // without overflowing
    const int step = static_cast<int>(gridDim.x);
    return step < params.items - item ? item + step : params.items;
  };

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (threadIdx.x >= kWorkers) {
    const auto row_of = [&](int item) -> int64_t {
      if (item >= params.items || lane >= params.top_k) return -1;
      return params.inverse[static_cast<int64_t>(item / params.parts) * params.top_k + lane];
    };
    const auto weight_of = [&](int item) {
      if (params.weights == nullptr || item >= params.items || lane >= params.top_k) return 1.0f;
      return params.weights[static_cast<int64_t>(item / params.parts) * params.top_k + lane];
    };
    int item = static_cast<int>(blockIdx.x);
    int64_t row = row_of(item);
    float weight = weight_of(item);
    for (; item < params.items; advance()) {
      const int part = item % params.parts, first = part * params.part_vectors;
      const int bytes = min(params.part_vectors, params.vectors - first) * kVectorBytes;
      const int next = after(item);
      const int64_t next_row = row_of(next);
      const float next_weight = weight_of(next);
      const uint32_t mask = __ballot_sync(kAllLanes, row >= 0);
      if (lane == 0) wait(shared.empty[stage], parity ^ 1, WaitFor::kEmptyStage);
      __syncwarp();
      const uint32_t full = shared_address(&shared.full[stage]);
      shared.weights[stage][lane] = weight;
      if (lane == 0) shared.rows[stage] = mask;
      __syncwarp();
      if (lane == 0) mbarrier_arrive_expect_tx(full, __popc(mask) * bytes);
      __syncwarp();
      if (row >= 0) {
        bulk_load(shared_address(stages) + stage * stage_bytes + lane * row_bytes,
                  params.rows + row * params.vectors + first, bytes, full);
      }
      item = next;
      row = next_row;
      weight = next_weight;
    }
    return;
  }

  const int vector = static_cast<int>(threadIdx.x);
  for (int item = static_cast<int>(blockIdx.x); item < params.items; item = after(item), advance()) {
    const int token = item / params.parts, first = item % params.parts * params.part_vectors;
    const bool inside = vector < min(params.part_vectors, params.vectors - first);
    wait(shared.full[stage], parity, WaitFor::kFullStage);
    const uint32_t mask = shared.rows[stage];
    const uint32_t from = shared_address(stages) + stage * stage_bytes + vector * kVectorBytes;
    float sum[N] = {};
    if (inside) {
#pragma unroll 4
      for (int k = 0; k < params.top_k; ++k) {
        if ((mask >> k & 1) == 0) continue;
        const uint4 raw = load_shared_vector(from + k * row_bytes);
        const float weight = shared.weights[stage][k];
        Vector<T, N> row;
        memcpy(&row, &raw, sizeof(raw));
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += weight * to_float(row.element[n]);
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.empty[stage]));
    if (inside) {
      Vector<T, N> result;
#pragma unroll
      for (int n = 0; n < N; ++n) result.element[n] = from_float<T>(sum[n]);
      uint4 raw;
      memcpy(&raw, &result, sizeof(raw));
      __stcs(params.out + static_cast<int64_t>(token) * params.vectors + first + vector, raw);
    }
  }
#endif
}

}  // namespace

bool bulk_sum_rows(const Tensor& rows, const Tensor& inverse, const std::optional<Tensor>& weights,
                   int64_t top_k, const Tensor& out) {
  const char* op = "sum_rows";
  const int64_t tokens = out.size(0);
  const int64_t bytes = out.size(1) * static_cast<int64_t>(out.element_size());
  if (top_k < 2 || top_k > kMaxRows || !takes_vectors(bytes, {rows.data_ptr(), out.data_ptr()}) ||
      !available(rows.get_device_index())) {
    return false;
  }
  // Equal parts of a row, such that those of all rows fit into a stage.
  const int64_t vectors = bytes / kVectorBytes;
  const int64_t most = std::min<int64_t>(kMaxPartBytes, kMaxStageBytes / top_k) / kVectorBytes;
  const int64_t parts = ceil_div(vectors, most), part_vectors = ceil_div(vectors, parts);
  const int64_t items = tokens * parts, blocks = multiprocessors();
  if (part_vectors < kMinPartVectors || items < kMinItems * blocks || items >= int64_t{1} << 31) {
    return false;
  }

  const int shared = static_cast<int>(kSumStages * top_k * part_vectors * kVectorBytes);
  SumRowsParams params{};
  params.rows = static_cast<const uint4*>(rows.data_ptr());
  params.inverse = static_cast<const int64_t*>(inverse.data_ptr());
  params.weights = weights ? static_cast<const float*>(weights->data_ptr()) : nullptr;
  params.out = static_cast<uint4*>(out.data_ptr());
  params.items = static_cast<int>(items);
  params.vectors = static_cast<int>(vectors);
  params.parts = static_cast<int>(parts);
  params.part_vectors = static_cast<int>(part_vectors);
  params.top_k = static_cast<int>(top_k);
  params.deadline = deadline_for(op);
  const int64_t resident = std::clamp(kSharedOfAll / shared, 1, kMaxBlocks);
  const auto grid = static_cast<unsigned>(std::min(items, blocks * resident));
  const auto launch = [&](auto kernel, unsigned workers) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    launch_dependent(kernel, grid, workers + kWarpSize, shared, current_stream(rows), params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  for_floating(rows.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (part_vectors <= 64) {
      launch(bulk_sum_rows_kernel<T, 64>, 64);
    } else if (part_vectors <= 128) {
      launch(bulk_sum_rows_kernel<T, 128>, 128);
    } else {
      launch(bulk_sum_rows_kernel<T, 256>, 256);
    }
  });
  return true;
}

}  // namespace lightning_fastmoe::hopper
