// Adam's step (Kingma and Ba 2015; decoupled decay: Loshchilov and Hutter 2019) for a flat
// partition of ZeRO, in one pass: gradients as autograd left them, master weights and moments in;
// master weights, moments and the model's own weights out. With bf16 gradients and weights that is
// 28 bytes per parameter, where joining the gradients in fp32, stepping and converting take 44.
#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kMostTensors = 128;              // of a launch: their addresses are kernel arguments
constexpr int kVector = 8;                     // elements of a thread at a time
constexpr int kChunk = 16 * kBlock * kVector;  // elements of a block

template <typename G, typename W>
struct AdamParams {
  const G* gradients[kMostTensors];
  int64_t begin[kMostTensors];  // of each gradient in the partition
  int64_t length[kMostTensors];
  int first_block[kMostTensors + 1];
  int tensors;
  float* master;
  float* mean;
  float* mean_square;
  W* weights;
  const float* step;       // this step's number, from 1
  const float* scale;      // divides the gradients; may be null
  const int64_t* blocked;  // unless zero, nothing is updated; may be null
  double lr;
  double beta1;
  double beta2;
  float eps;
  float weight_decay;
  bool decoupled;
};

// What is the same for all elements.
struct AdamFactors {
  float scale;
  float step_size;
  float bias2_root;  // the square root of the second moment's bias correction
};

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

template <typename T, int N>
__device__ __forceinline__ void read(const T* from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = to_float(*from);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += kVectorSize<T>) {
      const auto vector = load<T, kVectorSize<T>>(from + first);
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) to[first + i] = to_float(vector.element[i]);
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void write(T* to, const float (&from)[N]) {
  if constexpr (N == 1) {
    *to = from_float<T>(from[0]);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += kVectorSize<T>) {
      Vector<T, kVectorSize<T>> vector;
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) vector.element[i] = from_float<T>(from[first + i]);
      store<T, kVectorSize<T>>(to + first, vector);
    }
  }
}

// Updates N elements from `i` on of the partition.
template <int N, typename G, typename W>
__device__ __forceinline__ void update(const AdamParams<G, W>& params, const AdamFactors& factors,
                                       const G* gradient, int64_t i) {
  const float beta1 = static_cast<float>(params.beta1),
              rest1 = static_cast<float>(1 - params.beta1);
  const float beta2 = static_cast<float>(params.beta2),
              rest2 = static_cast<float>(1 - params.beta2);
  const float decay = static_cast<float>(params.lr * params.weight_decay);
  float g[N], w[N], m[N], v[N];
  read(gradient, g);
  read(params.master + i, w);
  read(params.mean + i, m);
  read(params.mean_square + i, v);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    g[j] /= factors.scale;
    if (params.decoupled) {
      w[j] -= decay * w[j];
    } else {
      g[j] += params.weight_decay * w[j];
    }
    m[j] = beta1 * m[j] + rest1 * g[j];
    v[j] = beta2 * v[j] + rest2 * g[j] * g[j];
    w[j] -= factors.step_size * m[j] / (sqrtf(v[j]) / factors.bias2_root + params.eps);
  }
  write(params.master + i, w);
  write(params.mean + i, m);
  write(params.mean_square + i, v);
  write(params.weights + i, w);
}

template <typename G, typename W>
__global__ void __launch_bounds__(kBlock)
    adam_step_kernel(const __grid_constant__ AdamParams<G, W> params) {
  if (params.blocked != nullptr && *params.blocked != 0) return;
  __shared__ AdamFactors shared;
  if (threadIdx.x == 0) {
    const double step = static_cast<double>(*params.step);
    shared.scale = params.scale == nullptr ? 1.0f : *params.scale;
    shared.step_size = static_cast<float>(params.lr / (1 - pow(params.beta1, step)));
    shared.bias2_root = static_cast<float>(sqrt(1 - pow(params.beta2, step)));
  }
  __syncthreads();
  const AdamFactors factors = shared;
  const int block = static_cast<int>(blockIdx.x);
  int tensor = 0;
  for (int high = params.tensors - 1; tensor < high;) {  // the last whose first block is not beyond
    const int middle = (tensor + high + 1) / 2;
    if (params.first_block[middle] <= block) {
      tensor = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t first = static_cast<int64_t>(block - params.first_block[tensor]) * kChunk;
  const int64_t end = min(first + kChunk, params.length[tensor]);
  const int64_t begin = params.begin[tensor];
  const G* gradient = params.gradients[tensor];
  const bool aligned = begin % kVector == 0 && is_aligned(gradient) && is_aligned(params.weights);
  const int64_t vectors_end = aligned ? first + (end - first) / kVector * kVector : first;
  for (int64_t i = first + threadIdx.x * kVector; i < vectors_end; i += kBlock * kVector) {
    update<kVector>(params, factors, gradient + i, begin + i);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kBlock) {
    update<1>(params, factors, gradient + i, begin + i);
  }
}

template <typename G, typename W>
void launch(AdamParams<G, W>& params, const std::vector<Tensor>& gradients, cudaStream_t stream,
            const char* op) {
  int64_t begin = 0;
  for (size_t next = 0; next < gradients.size();) {
    params.tensors = 0;
    int64_t blocks = 0;
    for (; next < gradients.size() && params.tensors < kMostTensors; ++next) {
      const int64_t length = gradients[next].numel();
      if (length == 0) continue;
      const int i = params.tensors++;
      params.gradients[i] = static_cast<const G*>(gradients[next].data_ptr());
      params.begin[i] = begin;
      params.length[i] = length;
      params.first_block[i] = static_cast<int>(blocks);
      blocks += ceil_div(length, kChunk);
      begin += length;
    }
    if (blocks == 0) return;
    adam_step_kernel<<<grid_size(blocks, op), kBlock, 0, stream>>>(params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename Function>
void for_gradient_and_weight(ScalarType gradient, ScalarType weight, const char* op,
                             Function&& function) {
  for_floating(weight, op, [&](auto w) {
    if (gradient == weight) return function(w, w);
    STD_TORCH_CHECK(gradient == ScalarType::Float, op, ": gradients must be float32 or ",
                    torch::headeronly::toString(weight), ", as the weights, not ",
                    torch::headeronly::toString(gradient));
    return function(TypeTag<float>{}, w);
  });
}

float* flat(const Tensor& tensor, const char* op, const char* name, const Tensor& like) {
  check_tensor(tensor, op, name, 1, like);
  check_dtype(tensor, op, name, ScalarType::Float);
  check_size(tensor, op, name, 0, like.size(0));
  STD_TORCH_CHECK(takes_vectors(kVectorBytes, {tensor.data_ptr()}), op, ": ", name,
                  " must be aligned to 16 bytes");
  return static_cast<float*>(tensor.data_ptr());
}

template <typename T>
const T* scalar(const Tensor& tensor, const char* op, const char* name, const Tensor& like,
                ScalarType dtype) {
  check_tensor(tensor, op, name, 0, like);
  check_dtype(tensor, op, name, dtype);
  return static_cast<const T*>(tensor.data_ptr());
}

}  // namespace

void adam_step_(std::vector<Tensor> gradients, const Tensor& master, const Tensor& mean,
                const Tensor& mean_square, const Tensor& weights, const Tensor& step,
                const std::optional<Tensor>& scale, const std::optional<Tensor>& blocked,
                double lr, double beta1, double beta2, double eps, double weight_decay,
                bool decoupled) {
  const char* op = "adam_step_";
  float* const master_data = flat(master, op, "master", master);
  float* const mean_data = flat(mean, op, "mean", master);
  float* const mean_square_data = flat(mean_square, op, "mean_square", master);
  const auto* const step_data = scalar<float>(step, op, "step", master, ScalarType::Float);
  const auto* const scale_data =
      scale ? scalar<float>(*scale, op, "scale", master, ScalarType::Float) : nullptr;
  const auto* const blocked_data =
      blocked ? scalar<int64_t>(*blocked, op, "blocked", master, ScalarType::Long) : nullptr;
  check_tensor(weights, op, "weights", 1, master);
  check_size(weights, op, "weights", 0, master.size(0));
  int64_t length = 0;
  for (const Tensor& gradient : gradients) {
    check_tensor(gradient, op, "a gradient", gradient.dim(), master);
    check_dtype(gradient, op, "a gradient", gradients[0].scalar_type());
    length += gradient.numel();
  }
  STD_TORCH_CHECK(length == master.size(0), op, ": the gradients have ", length,
                  " elements, the partition ", master.size(0));
  if (length == 0) return;

  const DeviceGuard guard(master.get_device_index());
  for_gradient_and_weight(gradients[0].scalar_type(), weights.scalar_type(), op,
                          [&](auto g, auto w) {
                            using G = typename decltype(g)::type;
                            using W = typename decltype(w)::type;
                            AdamParams<G, W> params{};
                            params.master = master_data;
                            params.mean = mean_data;
                            params.mean_square = mean_square_data;
                            params.weights = static_cast<W*>(weights.data_ptr());
                            params.step = step_data;
                            params.scale = scale_data;
                            params.blocked = blocked_data;
                            params.lr = lr;
                            params.beta1 = beta1;
                            params.beta2 = beta2;
                            params.eps = static_cast<float>(eps);
                            params.weight_decay = static_cast<float>(weight_decay);
                            params.decoupled = decoupled;
                            launch(params, gradients, current_stream(master), op);
                          });
}

}  // namespace lightning_fastmoe
