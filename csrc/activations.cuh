// The activations on fp32 registers, each with its derivative. Their precision is a parameter: the
// dtype that results are rounded to decides how many instructions are worthwhile.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "checks.h"

namespace lightning_fastmoe {

enum class Precision {
  // The CUDA math library's functions, for fp32 tensors.
  kFull,
  // Intrinsics with errors of a few fp32 ulp: negligible next to rounding to half precision, and
  // fast enough that kernels over half tensors stay memory-bound.
  kFast,
  // For epilogues of GEMMs with fp16 results, which apply an activation to every element while the
  // tensor cores wait, so instructions count. Uses the hardware's exp2 and reciprocal, as precise
  // as kFast; flushing subnormal numbers to zero saves the instructions that would otherwise scale
  // them.
  kEpilogue,
  // The same for bf16, with the hardware's tanh.
  kEpilogueBf16,
};

// The precision of kernels over tensors of T.
template <typename T>
constexpr Precision kElementwisePrecision =
    std::is_same_v<T, float> ? Precision::kFull : Precision::kFast;

// The precision of epilogues that round to T.
template <typename T>
constexpr Precision kEpiloguePrecision =
    std::is_same_v<T, __nv_bfloat16> ? Precision::kEpilogueBf16 : Precision::kEpilogue;

template <Precision kPrecision>
constexpr bool kInEpilogue =
    kPrecision == Precision::kEpilogue || kPrecision == Precision::kEpilogueBf16;

// --------------------------------------------------------------------------------- building blocks

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <Precision kPrecision>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (kPrecision == Precision::kFull) {
    return expf(x);
  } else if constexpr (kPrecision == Precision::kFast) {
    return __expf(x);
  } else {
    return exp2_approx(kLog2E * x);
  }
}

template <Precision kPrecision>
__device__ __forceinline__ float reciprocal(float x) {
  if constexpr (kPrecision == Precision::kFull) {
    return 1.0f / x;
  } else if constexpr (kPrecision == Precision::kFast) {
    return __fdividef(1.0f, x);
  } else {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
}

// ------------------------------------------------------------------------------- the activations

// Each returns act(x) and, through `slope`, act'(x).
struct Silu {
  template <Precision kPrecision>
  static __device__ __forceinline__ float apply(float x, float* slope) {
    const float sigmoid = reciprocal<kPrecision>(1.0f + exponential<kPrecision>(-x));
    if constexpr (kInEpilogue<kPrecision>) {
      const float value = x * sigmoid;
      *slope = sigmoid + value * (1.0f - sigmoid);  // one instruction fewer than below
      return value;
    } else {
      *slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
      return x * sigmoid;
    }
  }
};

// The exact GELU, x * Phi(x).
struct Gelu {
  static constexpr float kDensity = 0.39894228040143268f;  // 1 / sqrt(2 pi)

  template <Precision kPrecision>
  static __device__ __forceinline__ float apply(float x, float* slope) {
    if constexpr (kPrecision == Precision::kEpilogue) {
      const float square = x * x;
      const float power = exp2_approx(-0.5f * kLog2E * square);
      const float phi = phi_of(x, power);
      *slope = phi + x * kDensity * power;
      return x * phi;
    } else if constexpr (kPrecision == Precision::kEpilogueBf16) {
      constexpr float kLog2Density = -1.3257480647361595f;
      const float square = x * x;
      const float phi = phi_of_bf16(x, square);
      *slope = phi + x * exp2_approx(kLog2Density - 0.5f * kLog2E * square);
      return x * phi;
    } else {
      constexpr float kRootHalf = 0.70710678118654752f;
      const float phi = 0.5f * (1.0f + erff(x * kRootHalf));
      *slope = phi + x * kDensity * exponential<kPrecision>(-0.5f * x * x);
      return x * phi;
    }
  }

 private:
  // Phi(-|x|) is `power`, exp(-x^2 / 2), times a polynomial (Abramowitz and Stegun, 7.1.26, off
  // by at most 1.5e-7), so the value and the slope share one exponential: erff would cost more than
  // the MMAs that it waits for.
  static __device__ __forceinline__ float phi_of(float x, float power) {
    const float t = reciprocal<Precision::kEpilogue>(1.0f + 0.23164189f * fabsf(x));
    float tail = 0.5f * 1.061405429f;
    tail = tail * t - 0.5f * 1.453152027f;
    tail = tail * t + 0.5f * 1.421413741f;
    tail = tail * t - 0.5f * 0.284496736f;
    tail = tail * t + 0.5f * 0.254829592f;
    tail *= t * power;
    return x < 0.0f ? tail : 1.0f - tail;
  }
  // 2 Phi(x) - 1 = tanh(p(x)) with an odd p of three terms (minimax; off by 5e-5 in Phi), and the
  // hardware's tanh, with an error of 2^-11: half the instructions. bf16 rounds to 2^-8. Beyond 6,
  // where Phi is 1, p continues as a straight line; the polynomial would turn back at 8.
  static __device__ __forceinline__ float phi_of_bf16(float x, float square) {
    square = fminf(square, 36.0f);
    float p = -3.515167894e-4f;
    p = p * square + 3.700564603e-2f;
    p = p * square + 0.7975078843f;
    return 0.5f + 0.5f * tanh_approx(p * x);
  }
};

struct Relu {  // keeps NaN, as torch does
  template <Precision>
  static __device__ __forceinline__ float apply(float x, float* slope) {
    *slope = x <= 0.0f ? 0.0f : 1.0f;
    return x <= 0.0f ? 0.0f : x;
  }
};

// ------------------------------------------------------------------------------------------ names

template <typename Act_, bool kGated_>
struct Activation {
  using Act = Act_;
  static constexpr bool kGated = kGated_;
};

// Calls `function(Activation<Act, gated>{})` for the activation of that name.
template <typename Function>
void for_activation(const std::string& name, const char* op, Function&& function) {
  if (name == "swiglu") return function(Activation<Silu, true>{});
  if (name == "geglu") return function(Activation<Gelu, true>{});
  if (name == "reglu") return function(Activation<Relu, true>{});
  if (name == "silu") return function(Activation<Silu, false>{});
  if (name == "gelu") return function(Activation<Gelu, false>{});
  if (name == "relu") return function(Activation<Relu, false>{});
  STD_TORCH_CHECK(false, op, ": unknown activation '", name, "'");
}

}  // namespace lightning_fastmoe
