"""What the benchmark tells of memory, launches and waits, where there is a device to tell of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer import measure, power
from layer.configs import CONFIGS
from layer.peers import Layer
from layer.registry import PEERS
from layer.worker import Bench

CONFIG = replace(CONFIGS["sonic-7b"], tokens=4096, num_experts=16)


def prepared(peer: str) -> dict:
    bench = Bench(PEERS[peer](), "cuda")
    bench.start()
    found = bench.prepare(CONFIG, "uniform")
    bench.drop()
    return found


@pytest.mark.parametrize(
    "peer", ["ours", "ours-module", "torch", "torch-bmm", "torch-router", "loop"]
)
def test_peers_are_right(peer):
    found = prepared(peer)
    assert found["status"] == "ok", found
    assert found["max_error"] <= 1e-2
    assert found["kernels"] >= 10


def test_waits_are_counted():
    assert prepared("torch")["host_syncs"] == 0
    assert prepared("torch-router")["host_syncs"] == 0
    assert prepared("ours")["host_syncs"] == 0
    assert prepared("loop")["host_syncs"] >= 1


def test_peak_of_plain_torch_by_hand():
    # At its worst moment plain torch, its sum a product, holds three times the rows (N, D), H, and
    # A with silu(gate); the output stands against x's gradient at rest, and no weight has its
    # gradient yet.
    rows, width, inner = CONFIG.pairs, CONFIG.d_model, CONFIG.d_ffn
    weights = 3 * CONFIG.num_experts * width * inner
    right = 2 * (3 * rows * width + 4 * rows * inner - weights) / 2**30
    assert prepared("torch-bmm")["peak_gib"] == pytest.approx(right, rel=0.03)


def test_peak_over_rest_by_hand():
    """A layer that holds 256 MiB at its worst moment, beside a gradient that counts for nobody."""
    x = torch.randn(2**22, device="cuda", requires_grad=True)

    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            torch.empty(2**26, device="cuda")
            ctx.save_for_backward(x)
            return x[:1] * 2

        @staticmethod
        def backward(ctx, grad):
            return torch.ones_like(ctx.saved_tensors[0]) * grad

    layer = Layer(lambda: Squares.apply(x), {"x": x})
    peak = measure.peak_over_rest(layer, torch.ones(1, device="cuda"))
    # Rest holds x's gradient, which is gone when the 256 MiB are taken.
    assert peak == pytest.approx((2**28 - 2**24) / 2**30, rel=0.01)


def test_steps_are_timed():
    bench = Bench(PEERS["torch"](), "cuda")
    bench.start()
    bench.prepare(CONFIG, "uniform")
    times = bench.round(0.1)
    assert all(ms > 0 for ms in times["forward"] + times["step"])
    assert sum(times["forward"]) / len(times["forward"]) < sum(times["step"]) / len(times["step"])
    assert torch.cuda.memory_allocated() < 2**30


def test_sustained_time_clock_and_power():
    """Times a kernel that takes a known number of clock cycles, whatever the clock is."""
    cycles = 1_000_000
    device = torch.device("cuda")
    found = power.sustained(lambda: torch.cuda._sleep(cycles), device, 0.5)
    # Other processes on the device make it longer, never shorter; clocks are means of samples.
    assert 0.9 * cycles < found.ms * found.mhz * 1e3 < 50 * cycles
    assert 20 < power.idle_watts(device, 0.3) < 2000
    assert 20 < found.watts < 2000
