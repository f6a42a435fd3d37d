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

struct Gelu {  // the exact one: x * Phi(x)
  static __device__ __forceinline__ float apply(float x, float* slope) {
    constexpr float kRootHalf = 0.70710678118654752f, kDensity = 0.39894228040143268f;
    const float below = 0.5f * (1.0f + erff(x * kRootHalf));
    *slope = below + x * kDensity * __expf(-0.5f * x * x);
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
