// Weights from integers and a scale for each group of 64: one pass that reads 1.03 or 0.53 bytes and
// writes 2 for each bf16 weight. A thread reads 8 bytes of integers at a time, all of one group.
#include <type_traits>

#include "common.cuh"
#include "ops.h"

namespace lightning_fastmoe {
namespace {

constexpr int kGroup = 64;
constexpr int kBytes = 8;     // of integers that a thread reads at a time
constexpr int kInFlight = 4;  // reads of a thread that are issued before its first write

template <typename T>
__device__ __forceinline__ void write(T* to, const float (&from)[kBytes]) {
#pragma unroll
  for (int first = 0; first < kBytes; first += kVectorSize<T>) {
    Vector<T, kVectorSize<T>> vector;
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i) vector.element[i] = from_float<T>(from[first + i]);
    store<T, kVectorSize<T>>(to + first, vector);
  }
}

template <int kBits, typename T, typename S>
__global__ void __launch_bounds__(kBlock)
    dequantize_kernel(const uint2* __restrict__ codes, const S* __restrict__ scales,
                      T* __restrict__ out, int64_t reads) {
  constexpr int kReads = kGroup * kBits / 8 / kBytes;  // of a group
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kBlock * kInFlight) + threadIdx.x;
  uint2 raw[kInFlight];
  float scale[kInFlight];
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const int64_t i = first + j * kBlock;
    if (i < reads) {
      raw[j] = codes[i];
      scale[j] = to_float(scales[i / kReads]);
    }
  }
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    const int64_t i = first + j * kBlock;
    if (i >= reads) return;
    int8_t bytes[kBytes];
    memcpy(bytes, &raw[j], sizeof(bytes));
    T* own = out + i / kReads * kGroup + i % kReads * kBytes;
    float values[kBytes];
    if constexpr (kBits == 8) {
#pragma unroll
      for (int n = 0; n < kBytes; ++n) values[n] = scale[j] * static_cast<float>(bytes[n]);
      write(own, values);
    } else {  // the lower halves are the first 32 values of the group, the upper ones the others
#pragma unroll
      for (int n = 0; n < kBytes; ++n) {
        const int lower = ((bytes[n] & 15) ^ 8) - 8;  // with the sign
        values[n] = scale[j] * static_cast<float>(lower);
      }
      write(own, values);
#pragma unroll
      for (int n = 0; n < kBytes; ++n) values[n] = scale[j] * static_cast<float>(bytes[n] >> 4);
      write(own + kGroup / 2, values);
    }
  }
}

template <int kBits, typename T, typename S>
void launch(const Tensor& codes, const Tensor& scales, const Tensor& out, const char* op) {
  const int64_t reads = codes.numel() / kBytes;
  const unsigned blocks = grid_size(ceil_div(reads, kBlock * kInFlight), op);
  dequantize_kernel<kBits, T, S><<<blocks, kBlock, 0, current_stream(out)>>>(
      static_cast<const uint2*>(codes.data_ptr()), static_cast<const S*>(scales.data_ptr()),
      static_cast<T*>(out.data_ptr()), reads);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void dequantize_groups_(const Tensor& codes, const Tensor& scales, const Tensor& out,
                        int64_t bits) {
  const char* op = "dequantize_groups_";
  STD_TORCH_CHECK(bits == 8 || bits == 4, op, ": bits must be 8 or 4, not ", bits);
  STD_TORCH_CHECK(out.dim() >= 1 && out.size(out.dim() - 1) % kGroup == 0, op,
                  ": the last dimension of out must be a multiple of ", kGroup);
  check_tensor(out, op, "out", out.dim(), out);
  check_tensor(codes, op, "codes", codes.dim(), out);
  check_tensor(scales, op, "scales", scales.dim(), out);
  check_dtype(codes, op, "codes", ScalarType::Char);
  const bool is_bf16 = out.scalar_type() == ScalarType::BFloat16;
  check_dtype(scales, op, "scales", is_bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  STD_TORCH_CHECK(codes.numel() == out.numel() / 8 * bits, op, ": codes must have ",
                  out.numel() / 8 * bits, " elements, not ", codes.numel());
  STD_TORCH_CHECK(scales.numel() == out.numel() / kGroup, op, ": scales must have ",
                  out.numel() / kGroup, " elements, not ", scales.numel());
  STD_TORCH_CHECK(takes_vectors(kVectorBytes, {codes.data_ptr(), out.data_ptr()}), op,
                  ": codes and out must be aligned to ", kVectorBytes, " bytes");
  if (out.numel() == 0) return;

  const DeviceGuard guard(out.get_device_index());
  for_floating(out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using S = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat16, float>;
    if (bits == 8) {
      launch<8, T, S>(codes, scales, out, op);
    } else {
      launch<4, T, S>(codes, scales, out, op);
    }
  });
}

}  // namespace lightning_fastmoe
