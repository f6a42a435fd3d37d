"""Experts in host memory on a GPU: the bits of the resident model, whenever a copy comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu.sharing import run
from inference import offload_ddp_runs as ddp_runs
from inference.offload_models import D_MODEL, KINDS, Blocks, Scorer, disturbed, loader, trainer
from torch import nn

from lightning_fastmoe import OffloadStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts, pinned
from lightning_fastmoe.inference.bounce import BounceBuffers
from lightning_fastmoe.inference.pass_timer import PassTimer
from lightning_fastmoe.inference.pinned import PinnedMemory
from lightning_fastmoe.planning.observed import observed
from lightning_fastmoe.planning.offload_sizes import OffloadSizes
from lightning_fastmoe.testing import RankPool


def on_gpu(kind: str) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """A model on the CPU, batches, and what it makes of them on the GPU."""
    model = Blocks(KINDS[kind]).eval().requires_grad_(False)
    host = {name: parameter.data for name, parameter in model.named_parameters()}
    batches = [torch.randn(n, D_MODEL, device="cuda") for n in (300, 1, 77, 0, 300)]
    model.cuda()
    right = [model(batch) for batch in batches]
    for name, parameter in model.named_parameters():
        parameter.data = host[name]
    return model, batches, right


@pytest.mark.parametrize("cycles", [0, 3_000_000])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind: str, slots: int, cycles: int) -> None:
    model, batches, right = on_gpu(kind)
    with torch.inference_mode():
        offloaded = offload_experts(model, "cuda", slots=slots)
        disturbed(offloaded, cycles)
        for _ in range(2):
            for batch, expected in zip(batches, right, strict=True):
                assert torch.equal(model(batch), expected)
    assert offloaded.statistics.misses == 0
    offloaded.close()


def test_memory_is_pinned_where_it_is_and_let_go() -> None:
    large = torch.randn(1 << 20)
    memory = PinnedMemory([large, torch.zeros(4)])
    assert memory.refused == 0
    assert large.is_pinned()
    with pytest.warns(UserWarning, match=r"0.0 GB of experts can't be registered"):
        other = PinnedMemory([_Refused(large)])
    assert other.refused == 4 << 20
    assert torch.ones(3, device="cuda").sum() == 3  # the error is not reported a second time
    other.close()
    memory.close()
    assert not large.is_pinned()


@pytest.mark.filterwarnings("ignore:.*can't be registered")
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_cannot_be_registered(
    kind: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, right = on_gpu(kind)
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=lambda _: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinned, "_SMALLEST", 0)
    monkeypatch.setattr(pinned, "BounceBuffers", lambda device: BounceBuffers(device, 1000))
    with torch.inference_mode():
        offloaded = offload_experts(model, "cuda", slots=slots)
        assert offloaded._pinned is not None
        assert offloaded._pinned.refused > 4 << 10
        disturbed(offloaded, 0)
        for _ in range(3):
            for batch, expected in zip(batches, right, strict=True):
                assert torch.equal(model(batch), expected)
    offloaded.close()


class _Refused:
    """A tensor at an address that is nobody's."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like

    def __getattr__(self, name: str) -> Any:
        return getattr(self._like, name)

    def is_pinned(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return 0x1000


def test_the_strategy() -> None:
    module = Scorer({})
    whole = trainer("auto", "cuda").predict(module, loader())
    own = trainer(OffloadStrategy(gpu_memory="2GB"), "cuda")
    for _ in range(2):
        found = own.predict(module, loader())
        for a, b in zip(found, whole, strict=True):
            assert torch.equal(a, b)
    assert not any(parameter.is_pinned() for parameter in module.parameters())
    fresh = Scorer({})  # built by configure_model, on the CPU
    found = own.predict(fresh, loader())
    for a, b in zip(found, trainer("auto", "cuda").predict(fresh, loader()), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"needs 13.4 KB .* 11.4 KB are missing"):
        trainer(OffloadStrategy(gpu_memory="2KB"), "cuda").predict(module, loader())


def test_passes_are_timed_by_the_devices_clock() -> None:
    """Each copy is delayed: the passes wait for the link, which seems slow."""
    model, batches, _ = on_gpu("softmax")
    with torch.inference_mode():
        offloaded = offload_experts(model, "cuda")
        timer = PassTimer(torch.device("cuda", torch.cuda.current_device()))
        timer.watch(model)
        offloaded.time_by(timer)
        ring: Any = offloaded._ring
        transfer = ring._transfer

        def slow(stack: Any, slot: Any) -> None:
            torch.cuda._sleep(20_000_000)  # 10 ms at 2 GHz
            transfer(stack, slot)

        ring._transfer = slow
        for _ in range(4):
            with timer.one_pass():
                model(batches[0])
    timer.add_up(wait=True)
    assert [one.tokens for one in timer.passes] == [300] * 4
    sizes = OffloadSizes.of(model)
    report = observed(timer.passes, timer.copies, sizes, slots=2, resident=0)
    assert report is not None
    assert report.limit == "the link"
    assert 4 * 0.005 < report.plan.seconds < 4 * 0.05
    assert report.seconds == pytest.approx(report.plan.seconds, rel=0.3)
    assert report.waiting > 0.5 * report.seconds
    offloaded.close()


@pytest.mark.parametrize("cycles", [0, 3_000_000])
def test_gathered_layers(rank_pool: RankPool, cycles: int) -> None:
    first, second = run(rank_pool, ddp_runs.ring, 2, "cuda", cycles)
    assert first == (2 + 6 * 4, 0)
    assert second[0] == first[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{}, {"slots": 1}, {"resident_layers": 1}, {"gather": False}])
def test_two_gpus(rank_pool: RankPool, options: dict[str, Any]) -> None:
    """31 samples: 4 batches on one rank, 3 on the other."""
    orders = (ddp_runs.IN_ORDER, ddp_runs.IN_ORDER)
    results = rank_pool.run(ddp_runs.predictions, 2, 31, orders, options, False, "cuda")
    assert [[call[:2] for call in calls] for calls in results] == [[(4, 16)] * 2, [(3, 15)] * 2]
