// The activations on fp32 registers, each with its slope. The short forms of exp and of the
// division are off by a few units of fp32's last place, nothing beside the rounding of the half
// types.
#pragma once

namespace lightning_fastmoe::hopper {

struct Silu {
  static __device__ __forceinline__ float apply(float x, float* slope) {
    const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-x));
    *slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
    return x * sigmoid;
  }
};

// The exact one, x * Phi(x). Phi(-|x|) is the density's exponential times a polynomial (Abramowitz
// and Stegun, 7.1.26, off by at most 1.5e-7), so the value and the slope share one exponential:
// erff would cost more than the products that it waits for.
struct Gelu {
  static __device__ __forceinline__ float apply(float x, float* slope) {
    constexpr float kDensity = 0.39894228040143268f;
    const float t = __fdividef(1.0f, 1.0f + 0.23164189f * fabsf(x));
    const float exponential = __expf(-0.5f * x * x);
    float tail = 1.061405429f;
    tail = tail * t - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail *= 0.5f * t * exponential;
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
