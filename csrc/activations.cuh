// The activations on fp32 registers, each with its slope. An epilogue applies them to every element
// while the tensor cores wait, so instructions count. The hardware's exp2 and reciprocal are
// off by a few units of fp32's last place, nothing beside the rounding of the half types; that they
// take subnormal numbers for zero saves the instructions that would scale them.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

namespace lightning_fastmoe::hopper {

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.4426950408889634f;

// T is what the value and the slope are rounded to.
struct Silu {
  template <typename T>
  static __device__ __forceinline__ float apply(float x, float* slope) {
    const float sigmoid = fast_reciprocal(1.0f + fast_exp2(-kLog2E * x));
    const float value = x * sigmoid;
    *slope = sigmoid + value * (1.0f - sigmoid);
    return value;
  }
};

// The exact one, x * Phi(x).
struct Gelu {
  // Phi(-|x|) is the density's exponential times a polynomial (Abramowitz and Stegun, 7.1.26, off
  // by at most 1.5e-7), so the value and the slope share one exponential: erff would cost more than
  // the products that it waits for.
  static __device__ __forceinline__ float below(float x, float exponential) {
    const float t = fast_reciprocal(1.0f + 0.23164189f * fabsf(x));
    float tail = 0.5f * 1.061405429f;
    tail = tail * t - 0.5f * 1.453152027f;
    tail = tail * t + 0.5f * 1.421413741f;
    tail = tail * t - 0.5f * 0.284496736f;
    tail = tail * t + 0.5f * 0.254829592f;
    tail *= t * exponential;
    return x < 0.0f ? tail : 1.0f - tail;
  }
  // 2 Phi(x) - 1 = tanh(p(x)) with an odd p of three terms (minimax; off by 5e-5 in Phi), and the
  // hardware's tanh, which is off by 2^-11: half of the instructions. bf16 rounds to 2^-8. Beyond
  // 6, where Phi is 1, p goes on as a straight line; the polynomial would turn back at 8.
  static __device__ __forceinline__ float below_for_bf16(float x, float square) {
    square = fminf(square, 36.0f);
    float p = -3.515167894e-4f;
    p = p * square + 3.700564603e-2f;
    p = p * square + 0.7975078843f;
    return 0.5f + 0.5f * fast_tanh(p * x);
  }
  template <typename T>
  static __device__ __forceinline__ float apply(float x, float* slope) {
    const float square = x * x;
    float phi;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      constexpr float kLog2Density = -1.3257480647361595f;  // of 1 / sqrt(2 pi)
      phi = below_for_bf16(x, square);
      *slope = phi + x * fast_exp2(kLog2Density - 0.5f * kLog2E * square);
    } else {
      constexpr float kDensity = 0.39894228040143268f;
      const float exponential = fast_exp2(-0.5f * kLog2E * square);
      phi = below(x, exponential);
      *slope = phi + x * kDensity * exponential;
    }
    return x * phi;
  }
};

struct Relu {  // keeps NaN, as torch does
  template <typename T>
  static __device__ __forceinline__ float apply(float x, float* slope) {
    *slope = x <= 0.0f ? 0.0f : 1.0f;
    return x <= 0.0f ? 0.0f : x;
  }
};

}  // namespace lightning_fastmoe::hopper
