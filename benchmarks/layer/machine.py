"""The device itself: what it is, how fast it multiplies and copies."""

from __future__ import annotations

import platform
import subprocess
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


def rates(device: torch.device, seconds: float) -> dict[str, list[float]]:
    """The rates of large operations on random numbers, nothing else running.

    Args:
        device: where; a CPU multiplies and copies small things.
        seconds: for both together.

    Returns:
        ``dense_tflops`` of a square bf16 product of 8192 rows, one number per run, and
        ``copy_gbs`` of copying 1 GiB, reading and writing counted.
    """
    cuda = device.type == "cuda"
    size, n_bytes = (DENSE, COPY_BYTES) if cuda else (TINY_DENSE, 2**16)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    repeats = max(3, min(round(seconds * 300), 300)) if cuda else 3
    dense, copy = Clock(device), Clock(device)
    for clock, run in (
        (dense, lambda: torch.mm(a, b, out=out)),
        (copy, lambda: target.copy_(source)),
    ):
        for _ in range(3):
            run()
        for _ in range(repeats):
            clock.start()
            run()
            clock.stop()
    found = {
        "dense_tflops": [2 * size**3 / ms / 1e9 for ms in dense.read()],
        "copy_gbs": [2 * n_bytes / ms / 1e6 for ms in copy.read()],
    }
    if cuda:
        del a, b, out, source, target
        torch.cuda.empty_cache()
    return found
