// The experts' activation, forward and backward, computed in fp32.
//
// The backward computes three results in a single pass over h: the gradient of h (which overwrites
// h), the weighted activation (an operand of the down projection's gradient, which overwrites
// d_act) and each row's <A, dA>, which is the gradient of its routing weight. So neither A nor the
// experts' outputs need to be saved. A bias is added here, in fp32, rather than in a separate
// pass.
#include "activations.cuh"
#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

// The bias for row `row` of h; nullptr if there is none.
template <typename T>
__device__ __forceinline__ const T* bias_of(const T* bias, const int* offsets, int num_experts,
                                            int64_t row, int64_t row_width) {
  return bias == nullptr ? nullptr : bias + expert_of(offsets, num_experts, row) * row_width;
}

template <typename T, int N>
__device__ __forceinline__ void add(float (&value)[N], const Vector<T, N>& other) {
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] += to_float(other.element[n]);
}

template <typename T, int N>
__device__ __forceinline__ void widen(float (&value)[N], const Vector<T, N>& other) {
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] = to_float(other.element[n]);
}

template <typename Act, bool kGated, typename T, int N>
__global__ void __launch_bounds__(kBlock)
    activation_kernel(const T* __restrict__ h, const T* __restrict__ bias,
                      const int* __restrict__ offsets, T* __restrict__ out, int num_experts,
                      int64_t rows, int64_t width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const int64_t row_width = width * (kGated ? 2 : 1);
  bias = bias_of(bias, offsets, num_experts, row, row_width);
  h += row * row_width;
  out += row * width;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < width;
       i += static_cast<int64_t>(blockDim.x) * N) {
    float gate[N], up[N];
    widen(gate, load<T, N>(h + i));
    if constexpr (kGated) widen(up, load<T, N>(h + width + i));
    if (bias != nullptr) {
      add(gate, load<T, N>(bias + i));
      if constexpr (kGated) add(up, load<T, N>(bias + width + i));
    }
    Vector<T, N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float slope;
      float value = Act::template apply<kElementwisePrecision<T>>(gate[n], &slope);
      if constexpr (kGated) value *= up[n];
      result.element[n] = from_float<T>(value);
    }
    store<T, N>(out + i, result);
  }
}

// One warp per row. Each element of h and d_act is overwritten by the thread that reads it. The
// loads of kInFlight iterations are issued before the first store, because the compiler can't hoist
// them itself.
constexpr int kInFlight = 2;

template <typename Act, bool kGated, typename T, int N>
__global__ void __launch_bounds__(kBlock, 2)
    activation_backward_kernel(T* h, T* d_act, const float* __restrict__ weights,
                               const int64_t* __restrict__ order, const T* __restrict__ bias,
                               const int* __restrict__ offsets, float* __restrict__ d_weights,
                               int num_experts, int64_t rows, int64_t width) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int64_t pair = order == nullptr ? row : order[row];
  const float weight = weights[pair];
  const int64_t row_width = width * (kGated ? 2 : 1);
  bias = bias_of(bias, offsets, num_experts, row, row_width);
  h += row * row_width;
  d_act += row * width;
  float dot = 0.0f;
  for (int64_t start = lane * N; start < width; start += kInFlight * kWarpSize * N) {
    Vector<T, N> gates[kInFlight], ups[kInFlight], upstreams[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = start + j * kWarpSize * N;
      if (i >= width) break;
      gates[j] = load<T, N>(h + i);
      upstreams[j] = load<T, N>(d_act + i);
      if constexpr (kGated) ups[j] = load<T, N>(h + width + i);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = start + j * kWarpSize * N;
      if (i >= width) break;
      float gate[N], up[N];
      widen(gate, gates[j]);
      if constexpr (kGated) widen(up, ups[j]);
      if (bias != nullptr) {
        add(gate, load<T, N>(bias + i));
        if constexpr (kGated) add(up, load<T, N>(bias + width + i));
      }
      Vector<T, N> weighted, d_gate, d_up;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float slope;
        const float activated = Act::template apply<kElementwisePrecision<T>>(gate[n], &slope);
        const float other = kGated ? up[n] : 1.0f;
        const float grad = to_float(upstreams[j].element[n]), scaled = weight * grad;
        const float value = activated * other;
        dot += value * grad;
        weighted.element[n] = from_float<T>(weight * value);
        d_gate.element[n] = from_float<T>(scaled * other * slope);
        if constexpr (kGated) d_up.element[n] = from_float<T>(scaled * activated);
      }
      store<T, N>(d_act + i, weighted);
      store<T, N>(h + i, d_gate);
      if constexpr (kGated) store<T, N>(h + width + i, d_up);
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) d_weights[pair] = dot;
}

int64_t activation_width(const Tensor& h, const std::string& name, const char* op) {
  const int64_t width = h.size(1);
  int64_t halves = 1;
  for_activation(name, op, [&](auto kind) { halves = decltype(kind)::kGated ? 2 : 1; });
  STD_TORCH_CHECK(width % halves == 0, op, ": the width of h, ", width,
                  ", must be even for the gated activation '", name, "'");
  return width / halves;
}

}  // namespace

Tensor activation(const Tensor& h, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& offsets, std::string name) {
  const char* op = "activation";
  check_tensor(h, op, "h", 2, h);
  const int64_t rows = h.size(0), width = activation_width(h, name, op);
  const RowBias row_bias = check_row_bias(bias, offsets, op, h.size(1), h);

  const DeviceGuard guard(h.get_device_index());
  Tensor out = torch::stable::new_empty(h, {rows, width});
  for_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (rows == 0 || width == 0) return;
    for_activation(name, op, [&](auto kind) {
      using K = decltype(kind);
      const auto launch = [&](auto size) {
        constexpr int N = decltype(size)::value;
        const dim3 block = row_block(width / N);
        const unsigned grid = grid_size(ceil_div(rows, block.y), op);
        activation_kernel<typename K::Act, K::kGated, T, N><<<grid, block, 0, current_stream(h)>>>(
            static_cast<const T*>(h.data_ptr()), static_cast<const T*>(row_bias.bias),
            row_bias.offsets, static_cast<T*>(out.data_ptr()), row_bias.num_experts, rows, width);
      };
      if (takes_vectors(width * static_cast<int64_t>(sizeof(T)),
                        {h.data_ptr(), row_bias.bias, out.data_ptr()})) {
        launch(std::integral_constant<int, kVectorSize<T>>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor activation_backward_(const Tensor& h, const Tensor& d_act, const Tensor& weights,
                            const std::optional<Tensor>& order, const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& offsets, std::string name) {
  const char* op = "activation_backward_";
  check_tensor(h, op, "h", 2, h);
  const int64_t rows = h.size(0), width = activation_width(h, name, op);
  check_tensor(d_act, op, "d_act", 2, h);
  check_dtype(d_act, op, "d_act", h.scalar_type());
  check_size(d_act, op, "d_act", 0, rows);
  check_size(d_act, op, "d_act", 1, width);
  check_tensor(weights, op, "weights", weights.dim(), h);
  check_dtype(weights, op, "weights", ScalarType::Float);
  STD_TORCH_CHECK(weights.numel() == rows, op, ": weights must have one element per row, ", rows,
                  ", not ", weights.numel());
  if (order) {
    check_tensor(*order, op, "order", 1, h);
    check_dtype(*order, op, "order", ScalarType::Long);
    check_size(*order, op, "order", 0, rows);
  }
  const RowBias row_bias = check_row_bias(bias, offsets, op, h.size(1), h);

  const DeviceGuard guard(h.get_device_index());
  Tensor d_weights = torch::stable::empty_like(weights);
  for_floating(h.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (rows == 0) return;
    const unsigned grid = grid_size(ceil_div(rows, kWarpsPerBlock), op);
    for_activation(name, op, [&](auto kind) {
      using K = decltype(kind);
      const auto launch = [&](auto size) {
        activation_backward_kernel<typename K::Act, K::kGated, T, decltype(size)::value>
            <<<grid, kBlock, 0, current_stream(h)>>>(
                static_cast<T*>(h.data_ptr()), static_cast<T*>(d_act.data_ptr()),
                static_cast<const float*>(weights.data_ptr()),
                order ? static_cast<const int64_t*>(order->data_ptr()) : nullptr,
                static_cast<const T*>(row_bias.bias), row_bias.offsets,
                static_cast<float*>(d_weights.data_ptr()), row_bias.num_experts, rows, width);
      };
      if (takes_vectors(width * static_cast<int64_t>(sizeof(T)),
                        {h.data_ptr(), d_act.data_ptr(), row_bias.bias})) {
        launch(std::integral_constant<int, kVectorSize<T>>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return d_weights;
}

}  // namespace lightning_fastmoe
