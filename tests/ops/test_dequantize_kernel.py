"""The device code of csrc/dequantize.cu on the CPU, thread by thread, against its twin."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_fastmoe.ops import _build
from lightning_fastmoe.ops.group_quantization import dequantize_groups, quantize_groups

PRELUDE = """
#include "lockstep_warp.h"
constexpr int kBlock = kWarpsPerBlock * kWarpSize;
constexpr int kVectorBytes = 16;
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct __nv_bfloat16 { uint16_t bits; };
static float to_float(float x) { return x; }
static float to_float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
template <typename T> T from_float(float x);
template <> float from_float<float>(float x) { return x; }
template <> __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  uint32_t wide;
  memcpy(&wide, &x, 4);
  return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
"""

CALLS = """
template <int B, typename T>
void run(const void* codes, const void* scales, void* out, int64_t reads, int64_t blocks) {
  warp::run(blocks * kWarpsPerBlock, [=] {
    dequantize_kernel<B, T, T>(static_cast<const uint2*>(codes), static_cast<const T*>(scales),
                               static_cast<T*>(out), reads);
  });
}
#define EXPORT(B, name, T) \\
  extern "C" void dequantize_##B##_##name(const void* a, const void* b, void* c, int64_t n, \\
                                          int64_t blocks) { run<B, T>(a, b, c, n, blocks); }
EXPORT(8, float32, float) EXPORT(4, float32, float)
EXPORT(8, bfloat16, __nv_bfloat16) EXPORT(4, bfloat16, __nv_bfloat16)
"""


LAUNCH = "template <int kBits, typename T, typename S>\nvoid launch"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("the kernel is compiled for the CPU with g++, which is missing")
    common = (_build.SOURCES / "common.cuh").read_text(encoding="utf-8")
    vectors = common[common.index("// N elements of T, as") : common.index("// The expert of an")]
    source = (_build.SOURCES / "dequantize.cu").read_text(encoding="utf-8")
    start = source.index("constexpr int kGroup")
    device_code = source[start : source.index(LAUNCH, start)]
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cpp").write_text("\n".join([PRELUDE, vectors, device_code, CALLS]))
    command = ["g++", "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += [f"-I{Path(__file__).parent}", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (16, 1024), (3, 9, 640)])
def test_the_same_bits_as_the_twin(
    library: ctypes.CDLL, shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    """With a last block that is full, and one that isn't; nothing beyond is written."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = quantize_groups(weight, bits)
    right = torch.empty_like(weight)
    dequantize_groups(codes, scales, right, bits)
    memory = torch.full((weight.numel() + 64,), torch.nan, dtype=dtype)
    reads = codes.numel() // 8
    call = getattr(library, f"dequantize_{bits}_{str(dtype).removeprefix('torch.')}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (codes, scales, memory)]
    call(*pointers, ctypes.c_int64(reads), ctypes.c_int64(-(-reads // 1024)))
    assert torch.equal(memory[: weight.numel()].view(shape), right)
    assert memory[weight.numel() :].isnan().all()
