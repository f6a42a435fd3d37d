// Products of a warpgroup (128 threads) on the tensor cores: D (64, kN) += A (64, 16) B (16, kN),
// both operands in shared memory, D in registers, fp32.
//
// Operands lie in shared memory as the copy engine's 128-byte swizzle leaves them: rows of 128
// bytes (64 elements), whose 16-byte unit u of row r stands at place u ^ (r % 8). An operand is
// "K-major" if these rows run along K, the summed dimension, and "MN-major" if they run along its
// other one.
//
// Thread t holds of D, for j < kN / 8 and i < 4, in d[4 * j + i]: row 16 * (t / 32) + t % 32 / 4 (+
// 8 if i > 1), column 8 * j + 2 * (t % 4) + i % 2.
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
constexpr int kStepK = 16;  // of one instruction

// Where, in bytes, 16-byte unit `unit` of row `row` lies.
__host__ __device__ constexpr uint32_t swizzled(uint32_t row, uint32_t unit) {
  return row * kSwizzleBytes + ((unit ^ (row % kSwizzleRows)) << 4);
}

// The descriptor of an operand that starts at `address`, a multiple of 1024. `block` is the
// distance in bytes of two blocks of 64 elements along an MN-major operand's own dimension.
template <Major kMajor>
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t block = 0) {
  const uint64_t leading = kMajor == Major::kMN ? block : 16;  // K-major: not used
  const uint64_t stride = kSwizzleBytes * kSwizzleRows;
  const uint64_t swizzle_of_128_bytes = 1;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | leading >> 4 << 16 | stride >> 4 << 32 |
         swizzle_of_128_bytes << 62;
}

// What to add to a descriptor for the next 16 of K.
template <Major kMajor>
constexpr uint64_t kOperandStep = (kMajor == Major::kK ? kStepK * 2 : kStepK * kSwizzleBytes) >> 4;

// Before the first product, and whenever registers of D were touched since the last.
__device__ __forceinline__ void products_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Without `accumulate`, D is overwritten.
// clang-format off
#define LIGHTNING_FASTMOE_PRODUCT_256(type)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                        \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, p, 1, 1, %131, %132;\n}\n" : \
      "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
      "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
      "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
      "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
      "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
      "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
      "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
      "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
      "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
      "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
      "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]) \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kA == Major::kMN), "n"(kB == Major::kMN))

// clang-format on
template <typename T, int kN, Major kA, Major kB>
__device__ __forceinline__ void product(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                        int accumulate) {
  static_assert(kN == 256, "the only width that is spelled out above");
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>);
  if constexpr (kBf16) {
    LIGHTNING_FASTMOE_PRODUCT_256("bf16");
  } else {
    LIGHTNING_FASTMOE_PRODUCT_256("f16");
  }
}

#undef LIGHTNING_FASTMOE_PRODUCT_256

}  // namespace lightning_fastmoe::hopper
