// Warpgroup MMAs (wgmma, by 128 threads) on the tensor cores: D (64, 256) += A (64, 16) B (16,
// 256). Both operands are in shared memory; the accumulators, D, are in registers, in fp32.
//
// Operands have the layout of TMA's 128-byte swizzle: rows of 128 bytes (64 elements), in which the
// 16-byte vector v of row r is stored at position v ^ (r % 8). An operand is "K-major" if these
// rows run along K, the summed dimension, and "MN-major" if they run along its other dimension.
//
// For j < 32 and i < 4, accumulator 4 * j + i of thread t is the element of D in row
// 16 * (t / 32) + t % 32 / 4 (+ 8 if i > 1) and column 8 * j + 2 * (t % 4) + i % 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace lightning_fastmoe::hopper {

enum class Major { kK, kMN };

constexpr int kSwizzleBytes = 128;  // the length of a row
constexpr int kSwizzleRows = 8;
constexpr int kTileK = 64;  // elements of a half type in such a row
constexpr int kMmaK = 16;   // of one instruction
constexpr int kMmaN = 256;
constexpr int kAccumulators = kMmaN / 2;  // registers per thread: 64 x 256 fp32 over 128 threads

// The offset in bytes of 16-byte vector `vector` of row `row` of a swizzled tile.
__host__ __device__ constexpr uint32_t swizzled(uint32_t row, uint32_t vector) {
  return row * kSwizzleBytes + ((vector ^ (row % kSwizzleRows)) << 4);
}

// The matrix descriptor of an operand that starts at `address`, a multiple of 1024. `block` is the
// leading dimension's byte offset of an MN-major operand: the distance between two blocks of 64
// elements along M or N.
template <Major kMajor>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t block = 0) {
  const uint64_t leading = kMajor == Major::kMN ? block : 16;  // K-major: not used
  const uint64_t stride = kSwizzleBytes * kSwizzleRows;
  const uint64_t swizzle_of_128_bytes = 1;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | leading >> 4 << 16 | stride >> 4 << 32 |
         swizzle_of_128_bytes << 62;
}

// The increment of a descriptor that advances it by kMmaK along K.
template <Major kMajor>
constexpr uint64_t kDescriptorStep = (kMajor == Major::kK ? kMmaK * 2 : kMmaK * kSwizzleBytes) >> 4;

// Call before the first MMA, and whenever accumulators have been accessed since the last one.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// clang-format off
#define LIGHTNING_FASTMOE_ACCUMULATORS_8(i)                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define LIGHTNING_FASTMOE_ACCUMULATORS_32(i)                                              \
  LIGHTNING_FASTMOE_ACCUMULATORS_8(i), LIGHTNING_FASTMOE_ACCUMULATORS_8(i + 8),           \
  LIGHTNING_FASTMOE_ACCUMULATORS_8(i + 16), LIGHTNING_FASTMOE_ACCUMULATORS_8(i + 24)
#define LIGHTNING_FASTMOE_WGMMA(type)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                              \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "  \
      "%96, %97, %98, %99, %100, %101, %102, %103, "                                      \
      "%104, %105, %106, %107, %108, %109, %110, %111, "                                  \
      "%112, %113, %114, %115, %116, %117, %118, %119, "                                  \
      "%120, %121, %122, %123, %124, %125, %126, %127"                                    \
      "}, %128, %129, p, 1, 1, %131, %132;\n}\n" :                                        \
      LIGHTNING_FASTMOE_ACCUMULATORS_32(0), LIGHTNING_FASTMOE_ACCUMULATORS_32(32),        \
      LIGHTNING_FASTMOE_ACCUMULATORS_32(64), LIGHTNING_FASTMOE_ACCUMULATORS_32(96)        \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kA == Major::kMN), "n"(kB == Major::kMN))
// clang-format on

// D += A B, or D = A B without `accumulate`; a and b are matrix descriptors.
template <typename T, Major kA, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[kAccumulators], uint64_t a, uint64_t b,
                                      int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    LIGHTNING_FASTMOE_WGMMA("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    LIGHTNING_FASTMOE_WGMMA("f16");
  }
}

#undef LIGHTNING_FASTMOE_WGMMA
#undef LIGHTNING_FASTMOE_ACCUMULATORS_32
#undef LIGHTNING_FASTMOE_ACCUMULATORS_8

}  // namespace lightning_fastmoe::hopper
