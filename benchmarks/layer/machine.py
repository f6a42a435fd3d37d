"""The device itself: what it is, how fast it multiplies and copies."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from layer.measure import Clock

DENSE = 8192
"""Rows and columns of the dense product, all three."""

TINY_DENSE = 128
COPY_BYTES = 2**30


def warm_up(device: torch.device) -> None:
    """Creates the device's context and the library of its dense products."""
    a = torch.ones(128, 128, device=device, dtype=torch.bfloat16)
    (a @ a).sum().item()


def describe(device: torch.device) -> dict[str, Any]:
    """Names and versions, for the foot of the tables."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "dense_rows": DENSE if cuda else TINY_DENSE,
        "memory_gib": torch.cuda.mem_get_info(device)[1] / 2**30 if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver() if cuda else None,
        "python": platform.python_version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split() or [None])[0]


@dataclass(frozen=True)
class Yardsticks:
    """Large operations on random numbers, which the layers are compared with.

    Attributes:
        dense: a square bf16 product.
        copy: a copy of memory to memory.
        flops: floating-point operations of the product.
        bytes: amount of data that the copy reads and writes.
    """

    dense: Callable[[], object]
    copy: Callable[[], object]
    flops: int
    bytes: int


def yardsticks(device: torch.device) -> Yardsticks:
    """A product of :data:`DENSE` rows and a copy of :data:`COPY_BYTES`; small ones on a CPU."""
    cuda = device.type == "cuda"
    size, n_bytes = (DENSE, COPY_BYTES) if cuda else (TINY_DENSE, 2**16)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.randn(n_bytes // 4, device=device)
    return Yardsticks(
        dense=partial(torch.mm, a, b, out=torch.empty_like(a)),
        copy=partial(torch.empty_like(source).copy_, source),
        flops=2 * size**3,
        bytes=2 * n_bytes,
    )


def rates(device: torch.device, seconds: float) -> dict[str, list[float]]:
    """How fast the :func:`yardsticks` run, nothing else running.

    Args:
        device: the device; a CPU multiplies and copies small tensors.
        seconds: time for both together.

    Returns:
        ``dense_tflops`` of the product, one number per run, and ``copy_gbs`` of the copy, reading
        and writing counted.
    """
    cuda = device.type == "cuda"
    repeats = max(3, min(round(seconds * 300), 300)) if cuda else 3
    large = yardsticks(device)
    dense, copy = Clock(device), Clock(device)
    for clock, run in ((dense, large.dense), (copy, large.copy)):
        for _ in range(3):
            run()
        for _ in range(repeats):
            clock.start()
            run()
            clock.stop()
    found = {
        "dense_tflops": [large.flops / ms / 1e9 for ms in dense.read()],
        "copy_gbs": [large.bytes / ms / 1e6 for ms in copy.read()],
    }
    if cuda:
        del large, run
        torch.cuda.empty_cache()
    return found
