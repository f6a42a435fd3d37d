"""Sums over tokens' rows by bulk copies: the bits of the kernel that loads rows by threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_fastmoe.ops import native

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs compute capability 9.0", allow_module_level=True)

SIZES = [
    # T, D, K: whole rows, rows in parts of which the last is shorter, all that a warp can hold.
    (2048, 2048, 8),
    (1500, 4096, 2),
    (800, 2880, 4),
    (700, 7168, 3),
    (650, 1024, 32),
    (900, 2056, 10),
    (5000, 512, 6),
]


@pytest.fixture(scope="module")
def library() -> Any:
    found = native.load()
    assert found is not None, native.unavailable_reason()
    return found


def problem(tokens: int, width: int, k: int, dtype: torch.dtype, missing: bool) -> tuple[Any, ...]:
    """Rows, the row of each pair, and weights. Rows that no pair has are NaN."""
    torch.manual_seed(0)
    rows = torch.randn(tokens * k + 7, width, device="cuda").to(dtype)
    inverse = torch.randperm(len(rows), device="cuda")[: tokens * k]
    if missing:
        inverse[torch.rand(tokens * k, device="cuda") < 0.3] = -1
        inverse[: 2 * k] = -1  # tokens without rows
    unused = torch.ones(len(rows), dtype=torch.bool, device="cuda")
    unused[inverse[inverse >= 0]] = False
    rows[unused] = float("nan")
    return rows, inverse, torch.rand(tokens, k, device="cuda")


def exact(rows: Tensor, inverse: Tensor, weights: Tensor | None, k: int) -> Tensor:
    found = torch.where(inverse[:, None] < 0, 0, rows.double()[inverse.clamp(min=0)])
    found = found.view(-1, k, rows.shape[1])
    return (found if weights is None else found * weights.double()[:, :, None]).sum(1)


def by_threads(
    library: Any, rows: Tensor, inverse: Tensor, weights: Tensor | None, k: int
) -> Tensor:
    """With a bias, which is zero, rows are loaded by threads."""
    bias = rows.new_zeros(1, rows.shape[1])
    ends = torch.tensor([len(rows)], dtype=torch.int32, device="cuda")
    found: Tensor = library.sum_rows(rows, inverse, weights, k, bias, ends)
    return found


def kernels_of(library: Any, *arguments: Any) -> str:
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        library.sum_rows(*arguments)
        torch.cuda.synchronize()
    return " ".join(event.name for event in found.events())


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", SIZES)
def test_sums(sizes: tuple[int, int, int], dtype: torch.dtype, missing: bool, library: Any) -> None:
    rows, inverse, weights = problem(*sizes, dtype, missing)
    k = sizes[2]
    for given in (weights, None):
        out = library.sum_rows(rows, inverse, given, k, None, None)
        assert torch.equal(out, by_threads(library, rows, inverse, given, k))
        right = exact(rows, inverse, given, k)
        bound = torch.finfo(dtype).eps * right.abs() + 1e-5
        assert bool(((out.double() - right).abs() <= bound).all())
        for _ in range(3):
            assert torch.equal(out, library.sum_rows(rows, inverse, given, k, None, None))


@pytest.mark.parametrize("sizes", SIZES)
def test_which_kernel_it_is(sizes: tuple[int, int, int], library: Any) -> None:
    rows, inverse, _ = problem(*sizes, torch.bfloat16, False)
    assert "bulk_sum_rows" in kernels_of(library, rows, inverse, None, sizes[2], None, None)


@pytest.mark.parametrize(
    "sizes",
    [(2048, 2048, 1), (600, 1024, 33), (100, 2048, 8), (2048, 128, 8), (2048, 1028, 8)],
    ids=["one row", "too many rows", "few tokens", "short rows", "not vectors"],
)
def test_others_are_loaded_by_threads(sizes: tuple[int, int, int], library: Any) -> None:
    rows, inverse, weights = problem(*sizes, torch.bfloat16, True)
    arguments = rows, inverse, weights, sizes[2], None, None
    assert "bulk_sum_rows" not in kernels_of(library, *arguments)
    right = exact(*arguments[:4])
    close = (library.sum_rows(*arguments).double() - right).abs() <= 2**-8 * right.abs() + 1e-5
    assert bool(close.all())


def test_waits_for_the_kernel_before_and_the_next_for_it(library: Any) -> None:
    """Its blocks may start while the kernel before it still writes the rows."""
    rows, inverse, _ = problem(4096, 2048, 8, torch.bfloat16, False)
    ones = torch.ones_like(rows)
    for _ in range(20):
        torch.add(ones, 1, out=rows)
        twos = library.sum_rows(rows, inverse, None, 8, None, None)
        torch.add(ones, 3, out=rows)
        fours = library.sum_rows(rows, inverse, None, 8, None, None)
        assert bool((twos == 16).all())
        assert bool((fours == 32).all())
