// Permutes tokens into expert order and back. All three kernels are memory-bound, so each reads
// only once what the K rows of a token share:
//
//   permute_rows: iterates over tokens and writes K rows each, rather than over rows that each
//     read their token again: (K + 1) / 2K of the traffic;
//   sum_rows: iterates over tokens and reads K rows each;
//   unpermute_backward: iterates over pairs, those of one token side by side in one block, where
//     the token's gradient stays in the L1 cache.
//
// There are no atomics: every element is written by one thread, and sums are in slot order.
#include "common.cuh"
#include "hopper/ops.h"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kLoadsInFlight = 4;

// Word is the unit that one thread moves: 16 bytes, or one element. A copy doesn't depend on the
// dtype.
template <typename Word>
__global__ void __launch_bounds__(kBlock)
    permute_rows_kernel(const Word* __restrict__ x, const int64_t* __restrict__ inverse,
                        Word* __restrict__ out, int64_t tokens, int64_t width, int top_k) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int64_t* rows = inverse + token * top_k;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const Word value = x[token * width + i];
#pragma unroll 4
    for (int k = 0; k < top_k; ++k) out[rows[k] * width + i] = value;
  }
}

// A pair without a row has the number -1 in `inverse`, and adds nothing.
//
// A thread has kLoadsInFlight 16-byte loads in flight: kColumns vectors, a block's width apart, of
// each of kRows rows. If a token has few rows, more vectors.
template <typename T, int N, int kRows, bool kBias>
__global__ void __launch_bounds__(kBlock)
    sum_rows_kernel(const T* __restrict__ rows, const int64_t* __restrict__ inverse,
                    const float* __restrict__ weights, const T* __restrict__ bias,
                    const int* __restrict__ offsets, T* __restrict__ out, int num_experts,
                    int64_t tokens, int64_t width, int top_k) {
  constexpr int kColumns = kLoadsInFlight / kRows;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int64_t first = token * top_k, stride = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < width; i += kColumns * stride) {
    float sum[kColumns][N] = {};
    for (int k = 0; k < top_k; k += kRows) {
      // All loads of a group are issued before the first is used.
      Vector<T, N> loaded[kRows][kColumns];
      int64_t from[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        from[j] = k + j < top_k ? inverse[first + k + j] : -1;
        if (from[j] < 0) continue;
        const T* row = rows + from[j] * width + i;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (i + c * stride < width) loaded[j][c] = load_once<T, N>(row + c * stride);
        }
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (from[j] < 0) continue;
        const float weight = weights == nullptr ? 1.0f : weights[first + k + j];
        int64_t expert = 0;
        if constexpr (kBias) expert = expert_of(offsets, num_experts, from[j]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (i + c * stride >= width) continue;
          float value[N];
#pragma unroll
          for (int n = 0; n < N; ++n) value[n] = to_float(loaded[j][c].element[n]);
          if constexpr (kBias) {
            const Vector<T, N> shift = load<T, N>(bias + expert * width + i + c * stride);
#pragma unroll
            for (int n = 0; n < N; ++n) value[n] += to_float(shift.element[n]);
          }
#pragma unroll
          for (int n = 0; n < N; ++n) sum[c][n] += weight * value[n];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (i + c * stride >= width) continue;
      Vector<T, N> result;
#pragma unroll
      for (int n = 0; n < N; ++n) result.element[n] = from_float<T>(sum[c][n]);
      store<T, N>(out + token * width + i + c * stride, result);
    }
  }
}

template <typename T, int N>  // one warp per (token, slot) pair
__global__ void __launch_bounds__(kBlock)
    unpermute_backward_kernel(const T* __restrict__ grad, const T* __restrict__ y,
                              const float* __restrict__ weights,
                              const int64_t* __restrict__ inverse, T* __restrict__ d_y,
                              float* __restrict__ d_weights, int64_t pairs, int64_t width,
                              int top_k) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (pair >= pairs) return;
  const int64_t row = inverse[pair];
  const float weight = weights[pair];
  grad += pair / top_k * width;
  y += row * width;
  d_y += row * width;
  float dot = 0.0f;
#pragma unroll 4
  for (int64_t i = lane * N; i < width; i += kWarpSize * N) {
    const Vector<T, N> g = load<T, N>(grad + i), value = load<T, N>(y + i);
    Vector<T, N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float upstream = to_float(g.element[n]);
      dot += upstream * to_float(value.element[n]);
      result.element[n] = from_float<T>(weight * upstream);
    }
    store<T, N>(d_y + i, result);
  }
  dot = warp_sum(dot);
  if (lane == 0) d_weights[pair] = dot;
}

template <typename Word>
void launch_permute(const Tensor& x, const Tensor& inverse, const Tensor& out, int64_t tokens,
                    int64_t row_bytes, int64_t top_k) {
  const int64_t width = row_bytes / static_cast<int64_t>(sizeof(Word));
  const dim3 block = row_block(width);
  const unsigned grid = grid_size(ceil_div(tokens, block.y), "permute_rows");
  permute_rows_kernel<Word><<<grid, block, 0, current_stream(x)>>>(
      static_cast<const Word*>(x.data_ptr()), static_cast<const int64_t*>(inverse.data_ptr()),
      static_cast<Word*>(out.data_ptr()), tokens, width, static_cast<int>(top_k));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void check_top_k(const char* op, int64_t top_k) {
  STD_TORCH_CHECK(top_k >= 1 && top_k <= std::numeric_limits<int32_t>::max(), op,
                  ": top_k must be at least 1, not ", top_k);
}

void check_inverse(const Tensor& inverse, const char* op, int64_t rows, const Tensor& like) {
  check_tensor(inverse, op, "inverse", 1, like);
  check_dtype(inverse, op, "inverse", ScalarType::Long);
  check_size(inverse, op, "inverse", 0, rows);
}

void check_weights(const Tensor& weights, const char* op, int64_t tokens, int64_t top_k,
                   const Tensor& like) {
  check_tensor(weights, op, "weights", 2, like);
  check_dtype(weights, op, "weights", ScalarType::Float);
  check_size(weights, op, "weights", 0, tokens);
  check_size(weights, op, "weights", 1, top_k);
}

}  // namespace

Tensor permute_rows(const Tensor& x, const Tensor& inverse, int64_t top_k) {
  const char* op = "permute_rows";
  check_tensor(x, op, "x", 2, x);
  check_top_k(op, top_k);
  const int64_t tokens = x.size(0), width = x.size(1);
  check_inverse(inverse, op, tokens * top_k, x);

  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {tokens * top_k, width});
  if (tokens == 0 || width == 0) return out;
  const int64_t item = static_cast<int64_t>(x.element_size()), row_bytes = width * item;
  if (takes_vectors(row_bytes, {x.data_ptr(), out.data_ptr()})) {
    launch_permute<uint4>(x, inverse, out, tokens, row_bytes, top_k);
  } else if (item == 8) {
    launch_permute<uint64_t>(x, inverse, out, tokens, row_bytes, top_k);
  } else if (item == 4) {
    launch_permute<uint32_t>(x, inverse, out, tokens, row_bytes, top_k);
  } else if (item == 2) {
    launch_permute<uint16_t>(x, inverse, out, tokens, row_bytes, top_k);
  } else {
    launch_permute<uint8_t>(x, inverse, out, tokens, row_bytes, top_k);
  }
  return out;
}

Tensor sum_rows(const Tensor& rows, const Tensor& inverse, const std::optional<Tensor>& weights,
                int64_t top_k, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& offsets) {
  const char* op = "sum_rows";
  check_tensor(rows, op, "rows", 2, rows);
  check_top_k(op, top_k);
  check_inverse(inverse, op, inverse.numel(), rows);
  const int64_t pairs = inverse.size(0), tokens = pairs / top_k, width = rows.size(1);
  STD_TORCH_CHECK(pairs % top_k == 0, op, ": ", pairs, " pairs are not a multiple of top_k = ",
                  top_k);
  if (weights) check_weights(*weights, op, tokens, top_k, rows);
  const RowBias row_bias = check_row_bias(bias, offsets, op, width, rows);

  const DeviceGuard guard(rows.get_device_index());
  Tensor out = torch::stable::new_empty(rows, {tokens, width});
  if (tokens == 0 || width == 0) return out;
  if (!bias && hopper::bulk_sum_rows(rows, inverse, weights, top_k, out)) return out;
  for_floating(rows.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch_rows = [&](auto size, auto at_once) {
      constexpr int N = decltype(size)::value, kRows = decltype(at_once)::value;
      const dim3 block = row_block(ceil_div(width / N, kLoadsInFlight / kRows));
      const unsigned grid = grid_size(ceil_div(tokens, block.y), op);
      const auto kernel = row_bias.bias == nullptr ? sum_rows_kernel<T, N, kRows, false>
                                                   : sum_rows_kernel<T, N, kRows, true>;
      kernel<<<grid, block, 0, current_stream(rows)>>>(
          static_cast<const T*>(rows.data_ptr()), static_cast<const int64_t*>(inverse.data_ptr()),
          weights ? static_cast<const float*>(weights->data_ptr()) : nullptr,
          static_cast<const T*>(row_bias.bias), row_bias.offsets, static_cast<T*>(out.data_ptr()),
          row_bias.num_experts, tokens, width, static_cast<int>(top_k));
    };
    const auto launch = [&](auto size) {
      if (top_k == 1) {
        launch_rows(size, std::integral_constant<int, 1>{});
      } else if (top_k < kLoadsInFlight) {
        launch_rows(size, std::integral_constant<int, 2>{});
      } else {
        launch_rows(size, std::integral_constant<int, kLoadsInFlight>{});
      }
    };
    if (takes_vectors(width * static_cast<int64_t>(sizeof(T)),
                      {rows.data_ptr(), row_bias.bias, out.data_ptr()})) {
      launch(std::integral_constant<int, kVectorSize<T>>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& y,
                                              const Tensor& weights, const Tensor& inverse) {
  const char* op = "unpermute_backward";
  check_tensor(grad, op, "grad", 2, grad);
  check_tensor(y, op, "y", 2, grad);
  check_dtype(y, op, "y", grad.scalar_type());
  STD_TORCH_CHECK(weights.dim() == 2, op, ": weights must have 2 dimensions, not ", weights.dim());
  const int64_t tokens = grad.size(0), width = grad.size(1), top_k = weights.size(1);
  const int64_t pairs = tokens * top_k;
  check_top_k(op, top_k);
  check_size(y, op, "y", 0, pairs);
  check_size(y, op, "y", 1, width);
  check_weights(weights, op, tokens, top_k, grad);
  check_inverse(inverse, op, pairs, grad);

  const DeviceGuard guard(grad.get_device_index());
  Tensor d_y = torch::stable::empty_like(y);
  Tensor d_weights = torch::stable::empty_like(weights);
  for_floating(grad.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (pairs == 0) return;
    const unsigned grid = grid_size(ceil_div(pairs, kWarpsPerBlock), op);
    const auto launch = [&](auto size) {
      unpermute_backward_kernel<T, decltype(size)::value>
          <<<grid, kBlock, 0, current_stream(grad)>>>(
              static_cast<const T*>(grad.data_ptr()), static_cast<const T*>(y.data_ptr()),
              static_cast<const float*>(weights.data_ptr()),
              static_cast<const int64_t*>(inverse.data_ptr()), static_cast<T*>(d_y.data_ptr()),
              static_cast<float*>(d_weights.data_ptr()), pairs, width, static_cast<int>(top_k));
    };
    if (takes_vectors(width * static_cast<int64_t>(sizeof(T)),
                      {grad.data_ptr(), y.data_ptr(), d_y.data_ptr()})) {
      launch(std::integral_constant<int, kVectorSize<T>>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {d_y, d_weights};
}

}  // namespace lightning_fastmoe
