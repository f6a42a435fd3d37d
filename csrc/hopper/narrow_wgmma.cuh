// Warpgroup MMAs of narrow tiles: D (64, N) += A (64, 16) B (16, N) with N = 64 or 128, in bf16. All
// else is as in wgmma.cuh.
#pragma once

#include "wgmma.cuh"

namespace lightning_fastmoe::hopper {

// clang-format off
#define LIGHTNING_FASTMOE_ACCUMULATORS_8(i)                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define LIGHTNING_FASTMOE_ACCUMULATORS_32(i)                                              \
  LIGHTNING_FASTMOE_ACCUMULATORS_8(i), LIGHTNING_FASTMOE_ACCUMULATORS_8(i + 8),           \
  LIGHTNING_FASTMOE_ACCUMULATORS_8(i + 16), LIGHTNING_FASTMOE_ACCUMULATORS_8(i + 24)
// clang-format on

// D += A B, or D = A B without `accumulate`; a and b are matrix descriptors, and N is twice the
// number of accumulators.
template <Major kA, Major kB>
__device__ __forceinline__ void narrow_wgmma(float (&d)[32], uint64_t a, uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p, 1, 1, %35, %36;\n}\n"
      : LIGHTNING_FASTMOE_ACCUMULATORS_32(0)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kA == Major::kMN), "n"(kB == Major::kMN));
}

template <Major kA, Major kB>
__device__ __forceinline__ void narrow_wgmma(float (&d)[64], uint64_t a, uint64_t b,
                                             int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, %67, %68;\n}\n"
      : LIGHTNING_FASTMOE_ACCUMULATORS_32(0), LIGHTNING_FASTMOE_ACCUMULATORS_32(32)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kA == Major::kMN), "n"(kB == Major::kMN));
}

#undef LIGHTNING_FASTMOE_ACCUMULATORS_32
#undef LIGHTNING_FASTMOE_ACCUMULATORS_8

}  // namespace lightning_fastmoe::hopper
