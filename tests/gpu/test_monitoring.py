"""What the monitoring callbacks say, against the device's own counters."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from gpu import monitoring_runs as runs

from lightning_fastmoe.monitoring.callbacks.throughput import measure_peak_flops
from lightning_fastmoe.testing import ranks

DENSE_BF16 = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12}
"""FLOPs per second without sparsity, by part of the device's name (NVIDIA's data sheets)."""


@pytest.fixture(autouse=True)
def _no_traces() -> Iterator[None]:
    """Training goes on in this process, as starting another one takes longer than the tests."""
    before = dict(os.environ)
    yield
    ranks._leave()
    os.environ.clear()
    os.environ.update(before)


def best_by_events(dtype: torch.dtype, size: int, products: int) -> float:
    """FLOPs per second of the fastest of many single products, timed by the device.

    Not a mean: other tests' processes share the device.
    """
    a = torch.randn(size, size, device="cuda").to(dtype)
    b = torch.randn(size, size, device="cuda").to(dtype)
    milliseconds = []
    for _ in range(products):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return 2.0 * size**3 / (min(milliseconds) / 1000)


def test_measured_peak() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    measured = measure_peak_flops(device, torch.bfloat16)
    assert 0.85 < measured / best_by_events(torch.bfloat16, 8192, 200) < 1.1
    for name, peak in DENSE_BF16.items():
        if name in torch.cuda.get_device_name():
            assert 0.55 * peak < measured < peak
    exact = measure_peak_flops(device, torch.float32, seconds=0.2)
    assert exact < measured / 5  # no tensor cores: TF32 is off in these tests


def test_utilisation_is_flops_over_time_and_peak() -> None:
    sizes = runs.BUSY
    flops = 6 * sizes.tokens * (sizes.dense + sizes.num_layers * sizes.top_k * sizes.expert)
    for _ in range(3):
        logged, peak, seconds = runs.throughput()
        rate = pytest.approx(sizes.tokens / seconds, rel=0.05)
        if logged["train/device/items_per_sec"] == rate:
            break
        # Another test's process may have had the device between one clock and the other.
        ranks._leave()
    assert logged["train/device/items_per_sec"] == rate
    assert logged["train/device/flops_per_sec"] == pytest.approx(flops / seconds, rel=0.05)
    mfu = logged["train/device/mfu"]
    assert mfu == pytest.approx(logged["train/device/flops_per_sec"] / peak, rel=1e-6)
    # Large experts in bf16: a good part of what products reach, and never more.
    assert 0.05 < mfu < 1


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "32-true"), (2, "bf16-mixed"), (3, "bf16-mixed")]
)
def test_planned_bytes_are_allocated(stage: int, precision: str) -> None:
    memory, held, peak = runs.allocate(stage, precision)
    plan = memory.total
    kept = plan.weights + plan.gradients + plan.optimizer
    # Stages 1 and 2 free the buckets after each backward pass.
    assert 0.97 * kept < held < 1.03 * (kept + (plan.buffers if stage == 3 else 0))
    # In the backward pass come the buckets, activations and the gradient of a single layer; stage 1
    # copies this rank's part of the gradients at its end, on one rank all of them.
    moment = plan.gradients if stage == 1 else 0
    assert 0.97 * plan.device < peak < 1.12 * plan.device + moment
