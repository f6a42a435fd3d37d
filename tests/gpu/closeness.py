"""How results of kernels are compared, and that no call made the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Norm of the difference over norm: one rounding of the result to the dtype, and fp32 sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@contextmanager
def host_never_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(
    actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0, floor: float = 1e-30
) -> None:
    """``expected`` is the twin's result in fp64, ``floor`` what cancellation may leave."""
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    error = float((actual.double() - expected).norm())
    bound = factor * TOLERANCE[actual.dtype] * float(expected.norm()) + floor
    assert error <= bound, f"{error} > {bound}"


def same_bits(function: Callable[[], Any]) -> Any:
    """The result, after checking that it is the same thrice and that no call waits."""
    first = function()
    with host_never_waits():
        again = [function(), function()]
    for other in again:
        pairs = zip(*[(r,) if isinstance(r, torch.Tensor) else r for r in (first, other)])  # noqa: B905
        for a, b in pairs:
            assert a.shape == b.shape
            if a.numel():
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return first
