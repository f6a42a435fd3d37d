"""The device code of csrc/routing.cu on the CPU, lane by lane, far from zero and near it."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_fastmoe.ops import _build, sigmoid_top_k, softmax_top_k

SIZES = [(2, 5), (4, 70)]
"""(K, E)."""

CALLS = """
template <int V>
void forward(const float* a, const float* b, float* c, float* d, int64_t* e, int64_t t, int64_t n,
             int64_t k, bool normalize, bool sigmoid) {
  warp::run(t, [=] { route_kernel<V>(a, b, c, d, e, t, n, k, normalize, sigmoid); });
}
template <int V>
void backward(const float* a, const float* b, const int64_t* c, const float* d, const float* e,
              float* f, int64_t t, int64_t n, int64_t k, bool normalize, bool sigmoid) {
  warp::run(t, [=] { route_backward_kernel<V>(a, b, c, d, e, f, n, t, n, k, normalize, sigmoid); });
}
#define EXPORT(V) \\
  extern "C" void* forward_##V() { return reinterpret_cast<void*>(&forward<V>); } \\
  extern "C" void* backward_##V() { return reinterpret_cast<void*>(&backward<V>); }
EXPORT(1) EXPORT(4)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("the kernel is compiled for the CPU with g++, which is missing")
    source = (_build.SOURCES / "routing.cu").read_text(encoding="utf-8")
    start = source.index("constexpr int kMaxExperts")
    device_code = source[start : source.index("void check_sizes(", start)]
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cpp").write_text(f'#include "lockstep_warp.h"\n{device_code}\n{CALLS}')
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared"]
    command += ["-fPIC", f"-I{Path(__file__).parent}", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def call(library: ctypes.CDLL, name: str, experts: int, *args: object) -> None:
    per_lane = 1 if experts <= 32 else 4
    getter = getattr(library, f"{name}_{per_lane}")
    getter.restype = ctypes.c_void_p
    converted = [
        ctypes.c_void_p(a.data_ptr())
        if isinstance(a, torch.Tensor)
        else ctypes.c_void_p(None)
        if a is None
        else ctypes.c_bool(a)
        if isinstance(a, bool)
        else ctypes.c_int64(a)
        for a in args
    ]
    ctypes.CFUNCTYPE(None, *(type(c) for c in converted))(getter())(*converted)


def far_logits(experts: int) -> torch.Tensor:
    torch.manual_seed(experts)
    row = torch.randn(experts)
    rows = [far + row for far in (0.0, -90.0, -200.0, 20.0, 100.0, -1e4)]
    rows.append(torch.full((experts,), -100.0))
    one = row - 150
    one[experts // 2] = 1e4
    return torch.stack([*rows, one, 100 * row])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("biased", [None, 0.0, 1.0])
def test_equals_fp64(library, size, sigmoid, biased):
    k, experts = size
    logits = far_logits(experts)
    tokens = len(logits)
    bias = None if biased is None else biased * torch.randn(experts)
    wide = logits.double().requires_grad_()
    log_scores = torch.nn.functional.logsigmoid(wide) if sigmoid else wide
    exact = torch.softmax(log_scores, dim=-1)
    for normalize in (False, True):
        scores, weights = torch.full_like(logits, torch.nan), torch.full((tokens, k), torch.nan)
        ids = torch.full((tokens, k), -1)
        sizes = (tokens, experts, k, normalize, sigmoid)
        call(library, "forward", experts, logits, bias, scores, weights, ids, *sizes)
        twin = (sigmoid_top_k if sigmoid else softmax_top_k)(logits, k, normalize, bias)
        if biased != 1.0:  # else the last bit of a sigmoid may decide
            assert torch.equal(ids, twin[2])
        chosen = log_scores.gather(1, ids)
        if normalize:
            exact_weights = torch.softmax(chosen, dim=-1)
        else:
            exact_weights = chosen.exp() if sigmoid else exact.gather(1, ids)
        torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-37)
        torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-6, atol=1e-37)
        upstream = (torch.randn_like(scores), torch.randn_like(weights))
        for use in itertools.product((True, False), repeat=2):
            if not any(use):
                continue
            given = [g if used else None for g, used in zip(upstream, use, strict=True)]
            got = torch.full_like(logits, torch.nan)
            call(library, "backward", experts, logits, weights, ids, *given, got, *sizes)
            outputs = [o for o, u in zip((exact, exact_weights), use, strict=True) if u]
            grads = [g.double() for g in given if g is not None]
            (want,) = torch.autograd.grad(outputs, wide, grads, retain_graph=True)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
