// The activations on fp32 registers, each with its slope. An epilogue applies them to every element
// while the tensor cores wait, so instructions count. The hardware's exp2 and reciprocal are
// off by a few units of fp32's last place, nothing beside the rounding of the half types; that they
// take subnormal numbers for zero saves the instructions that would scale them.
#pragma once

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

constexpr float kLog2E = 1.4426950408889634f;

struct Silu {
  static __device__ __forceinline__ float apply(float x, float* slope) {
    const float sigmoid = fast_reciprocal(1.0f + fast_exp2(-kLog2E * x));
    const float value = x * sigmoid;
    *slope = sigmoid + value * (1.0f - sigmoid);
    return value;
  }
};

// The exact one, x * Phi(x). Phi(-|x|) is the density's exponential times a polynomial (Abramowitz
// and Stegun, 7.1.26, off by at most 1.5e-7), so the value and the slope share one exponential:
// erff would cost more than the products that it waits for.
struct Gelu {
  static __device__ __forceinline__ float apply(float x, float* slope) {
    constexpr float kDensity = 0.39894228040143268f;
    const float t = fast_reciprocal(1.0f + 0.23164189f * fabsf(x));
    const float exponential = fast_exp2(-0.5f * kLog2E * x * x);
    float tail = 0.5f * 1.061405429f;
    tail = tail * t - 0.5f * 1.453152027f;
    tail = tail * t + 0.5f * 1.421413741f;
    tail = tail * t - 0.5f * 0.284496736f;
    tail = tail * t + 0.5f * 0.254829592f;
    tail *= t * exponential;
    const float below = x < 0.0f ? tail : 1.0f - tail;
    *slope = below + x * kDensity * exponential;
    return x * below;
  }
};

struct Relu {  // keeps NaN, as torch does
  static __device__ __forceinline__ float apply(float x, float* slope) {
    *slope = x <= 0.0f ? 0.0f : 1.0f;
    return x <= 0.0f ? 0.0f : x;
  }
};

}  // namespace lightning_fastmoe::hopper
