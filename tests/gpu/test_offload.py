"""Experts in host memory on a GPU: the bits of the resident model, whenever a copy comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inference.offload_models import D_MODEL, KINDS, Blocks, Scorer, disturbed, loader, trainer
from torch import nn

from lightning_fastmoe import OffloadStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.pinned import PinnedMemory


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
    pinned = PinnedMemory([large, torch.zeros(4)])
    assert pinned.refused == 0
    assert large.is_pinned()
    with pytest.warns(UserWarning, match=r"0.0 GB of experts can't be registered"):
        other = PinnedMemory([_Refused(large)])
    assert other.refused == 4 << 20
    assert torch.ones(3, device="cuda").sum() == 3  # the error is not reported a second time
    other.close()
    pinned.close()
    assert not large.is_pinned()


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
    with pytest.raises(ConfigError, match=r"needs 0.0 GB .* missing"):
        trainer(OffloadStrategy(gpu_memory="2KB"), "cuda").predict(module, loader())
