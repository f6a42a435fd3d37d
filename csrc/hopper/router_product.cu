// A router's logits and the gradient of its weight, in fp32, by MMAs of bf16 numbers.
#include <algorithm>

#include "checks.cuh"
#include "ops.h"
#include "router_product.cuh"

namespace lightning_fastmoe::hopper {
namespace {

constexpr int kMaxParts = 4;

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

struct Parts {
  __nv_bfloat16 high, middle, low;
};

// Three numbers whose sum is `value`, exactly. What is not finite, or rounds to what is not, has
// one part: infinity minus infinity is not zero.
__device__ __forceinline__ Parts parts_of(float value) {
  Parts parts;
  parts.high = __float2bfloat16_rn(value);
  if (!isfinite(__bfloat162float(parts.high))) {
    parts.middle = parts.low = __float2bfloat16_rn(0.0f);
    return parts;
  }
  const float rest = value - __bfloat162float(parts.high);
  parts.middle = __float2bfloat16_rn(rest);
  parts.low = __float2bfloat16_rn(rest - __bfloat162float(parts.middle));
  return parts;
}

// A thread has eight columns of a row.
template <int kParts>
__global__ void __launch_bounds__(kBlock)
    bf16_parts_kernel(const float* x, __nv_bfloat16* out, int64_t rows, int columns, int vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= rows * vectors) return;
  const int64_t row = i / vectors;
  const int vector = static_cast<int>(i - row * vectors);
  Vector<__nv_bfloat16, 8> found[kMaxParts];
  const float* from = x + row * columns + vector * 8;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Parts parts = parts_of(vector * 8 + j < columns ? from[j] : 0.0f);
    if constexpr (kParts == 2) {
      found[0].element[j] = parts.middle;
      found[1].element[j] = parts.high;
    } else {
      found[0].element[j] = parts.low;
      found[1].element[j] = parts.middle;
      found[2].element[j] = found[3].element[j] = parts.high;
    }
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) store(out + ((row * kParts + p) * vectors + vector) * 8, found[p]);
}

template <typename T>
__global__ void __launch_bounds__(kBlock)
    sum_of_splits_kernel(const float* splits, T* out, int count, int64_t size) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) * 4;
  if (i >= size) return;
  float sum[4] = {};
  for (int s = 0; s < count; ++s) {
    const float4 one = *reinterpret_cast<const float4*>(splits + s * size + i);
    sum[0] += one.x;
    sum[1] += one.y;
    sum[2] += one.z;
    sum[3] += one.w;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) out[i + j] = from_float<T>(sum[j]);
}

template <Major kMajor, int kN, int kParts>
void launch(RouterProductParams& params, int64_t splits, const char* op, const Tensor& like) {
  using Tile = RouterTile<kN, kParts>;
  const auto kernel = router_product_kernel<kMajor, kN, kParts>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  const unsigned blocks =
      grid_size(int64_t{params.column_tiles} * params.row_tiles * splits, op);
  kernel<<<blocks, kRouterThreads, Tile::kSharedBytes, current_stream(like)>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int kNarrow = 64, kWide = 128;
constexpr int kRows = RouterTile<kNarrow, 1>::kRows;

int width_of(int64_t experts) { return experts <= kNarrow ? kNarrow : kWide; }

// x (T, D), bf16.
void check_tokens(const Tensor& x, const char* op) {
  check_matrix(x, op, "x", 2, x);
  check_dtype(x, op, "x", ScalarType::BFloat16);
  check_fits(x.size(0), op);
  check_fits(x.size(1), op);
}

RouterProductParams make_params(const char* op, int64_t rows, int64_t columns, int64_t terms) {
  RouterProductParams params{};
  params.rows = static_cast<int>(rows);
  params.columns = static_cast<int>(columns);
  params.row_tiles = static_cast<int>(ceil_div(rows, kRows));
  params.column_tiles = static_cast<int>(ceil_div(columns, width_of(columns)));
  params.k_tiles = static_cast<int>(ceil_div(terms, kTileK));
  params.split_k_tiles = params.k_tiles;
  params.deadline = deadline_for(op);
  return params;
}

}  // namespace

Tensor bf16_parts(const Tensor& x, int64_t parts) {
  const char* op = "hopper_bf16_parts";
  check_tensor(x, op, "x", 2, x);
  check_dtype(x, op, "x", ScalarType::Float);
  STD_TORCH_CHECK(parts >= 2 && parts <= kMaxParts, op, ": 2 to ", kMaxParts, " parts, not ", parts);
  const DeviceGuard guard(x.get_device_index());
  const int64_t rows = x.size(0), vectors = ceil_div(x.size(1), 8);
  check_fits(x.size(1), op);
  Tensor out = torch::stable::new_empty(x, {rows, parts, vectors * 8}, ScalarType::BFloat16);
  if (rows * vectors == 0) return out;
  const auto run = [&](auto kernel) {
    kernel<<<grid_size(ceil_div(rows * vectors, kBlock), op), kBlock, 0, current_stream(x)>>>(
        data_of<const float>(x), data_of<__nv_bfloat16>(out), rows, static_cast<int>(x.size(1)),
        static_cast<int>(vectors));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (parts == 2) {
    run(bf16_parts_kernel<2>);
  } else if (parts == 3) {
    run(bf16_parts_kernel<3>);
  } else {
    run(bf16_parts_kernel<4>);
  }
  return out;
}

Tensor router_logits(const Tensor& x, const Tensor& weight) {
  const char* op = "hopper_router_logits";
  check_tokens(x, op);
  check_matrix(weight, op, "weight", 3, x);
  const int64_t tokens = x.size(0), width = x.size(1), experts = weight.size(0);
  const int64_t parts = weight.size(1);
  check_size(weight, op, "weight", 2, width);
  STD_TORCH_CHECK(parts == 1 || parts == 3, op, ": 1 or 3 parts, not ", parts);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {tokens, experts}, ScalarType::Float);
  if (tokens * experts == 0) return out;
  if (width == 0) return torch::stable::fill_(out, 0.0);
  RouterProductParams params = make_params(op, tokens, experts, width);
  params.out = data_of<float>(out);
  params.a_map = tensor_map(x, op, contiguous_boxes(width, tokens, 1, 1, kRows));
  const int64_t all = experts * parts * width;
  params.b_map = tensor_map(weight, op,
                            {{width, experts, parts, 1, 1},
                             {parts * width, width, all, all},
                             {kTileK, width_of(experts), 1, 1, 1}});
  if (width_of(experts) == kNarrow) {
    parts == 1 ? launch<Major::kK, kNarrow, 1>(params, 1, op, x)
               : launch<Major::kK, kNarrow, 3>(params, 1, op, x);
  } else {
    parts == 1 ? launch<Major::kK, kWide, 1>(params, 1, op, x)
               : launch<Major::kK, kWide, 3>(params, 1, op, x);
  }
  return out;
}

Tensor router_weight_gradient(const Tensor& x, const Tensor& gradient, int64_t parts,
                              int64_t experts, bool in_bf16) {
  const char* op = "hopper_router_weight_gradient";
  check_tokens(x, op);
  check_matrix(gradient, op, "gradient", 3, x);
  const int64_t tokens = x.size(0), width = x.size(1), held = gradient.size(1);
  const int64_t columns = gradient.size(2);
  check_size(gradient, op, "gradient", 0, tokens);
  STD_TORCH_CHECK(parts == 2 || parts == 3, op, ": 2 or 3 parts, not ", parts);
  STD_TORCH_CHECK(parts <= held && experts <= columns && experts >= 0, op, ": ", parts,
                  " parts of ", experts, " experts are not among ", held, " of ", columns);
  const DeviceGuard guard(x.get_device_index());
  const ScalarType dtype = in_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor out = torch::stable::new_empty(x, {experts, width}, dtype);
  if (experts * width == 0) return out;
  if (tokens == 0) return torch::stable::fill_(out, 0.0);
  RouterProductParams params = make_params(op, width, experts, tokens);
  // As many splits of the sum as multiprocessors have room for.
  const int n = width_of(experts);
  const int64_t tiles = int64_t{params.row_tiles} * params.column_tiles;
  const int64_t blocks = int64_t{multiprocessors()} * (n == kNarrow ? 2 : 1);
  const int64_t wanted = std::clamp<int64_t>(blocks / tiles, 1, params.k_tiles);
  params.split_k_tiles = static_cast<int>(ceil_div(params.k_tiles, wanted));
  const int64_t splits = ceil_div(params.k_tiles, params.split_k_tiles);
  Tensor sums = splits == 1 && !in_bf16
                    ? out
                    : torch::stable::new_empty(x, {splits, experts, width}, ScalarType::Float);
  params.out = data_of<float>(sums);
  params.a_map = tensor_map(x, op, contiguous_boxes(width, tokens, 1, 1, kTileK));
  const int64_t all = tokens * held * columns;
  params.b_map = tensor_map(
      gradient, op,
      {{columns, tokens, held, 1, 1}, {held * columns, columns, all, all}, {64, kTileK, 1, 1, 1}});
  if (n == kNarrow) {
    parts == 2 ? launch<Major::kMN, kNarrow, 2>(params, splits, op, x)
               : launch<Major::kMN, kNarrow, 3>(params, splits, op, x);
  } else {
    parts == 2 ? launch<Major::kMN, kWide, 2>(params, splits, op, x)
               : launch<Major::kMN, kWide, 3>(params, splits, op, x);
  }
  if (splits == 1 && !in_bf16) return out;
  const int64_t size = experts * width;
  const unsigned grid = grid_size(ceil_div(size / 4, kBlock), op);
  const auto sum = [&](auto* to) {
    sum_of_splits_kernel<<<grid, kBlock, 0, current_stream(x)>>>(data_of<const float>(sums), to,
                                                                static_cast<int>(splits), size);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  in_bf16 ? sum(data_of<__nv_bfloat16>(out)) : sum(data_of<float>(out));
  return out;
}

}  // namespace lightning_fastmoe::hopper
