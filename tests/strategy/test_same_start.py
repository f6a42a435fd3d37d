"""Ranks that were not seeded alike train one model: weights, buffers, and what routers draw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from strategy.models import Case, Net
from strategy.tracing import make_trainer
from torch import Tensor, nn

from lightning_fastmoe import MoE

CASE = Case(world=2, ep=2)


class WithBuffer(nn.Linear):
    """An expert with a buffer that its constructor draws."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__(d_model, d_model)
        self.register_buffer("drawn", torch.randn(3))


class Unseeded(Net):
    """Draws a random feature matrix, and has a cache that each rank has filled by itself."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.net["moes"][0] = MoE(12, 20, 4, 2, router="noisy")
        self.net["moes"][1] = MoE(12, 20, 4, 2, expert=WithBuffer)
        self.register_buffer("features", torch.randn(6, 5))
        self.register_buffer("wide", torch.randn(4, 6).T[:, :1].expand(6, 4))
        self.register_buffer("flags", torch.rand(7) > 0.5, persistent=False)
        self.register_buffer("cache", torch.zeros(1 + dist.get_rank()), persistent=False)
        self.seen: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        self.seen = {name: buffer.clone() for name, buffer in self.named_buffers()}
        self.seen |= {"embed": self.net["embed"].weight.detach().clone()}
        seeds = [layer._seed for layer in self.net["moes"]]
        self.seen |= {"seeds": torch.tensor(seeds)}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * (batch @ self.features).mean()


def fit(case: Case) -> dict[str, Tensor]:
    """This rank's buffers and seeds, after other ranks drew other numbers."""
    dist.init_process_group("gloo")
    torch.manual_seed(100 + dist.get_rank())
    module: Any = Unseeded(case)
    make_trainer(case).fit(module)
    return module.seen


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks(rank_pool, stage):
    first, second = rank_pool.run(fit, 2, replace(CASE, stage=stage))
    for name in ("features", "wide", "flags", "seeds", *(["embed"] if stage == 2 else [])):
        assert torch.equal(first[name], second[name]), name
    assert len(second["cache"]) == 2, "left as it is"


def test_experts_on_several_ranks(rank_pool):
    ranks = rank_pool.run(fit, 4, replace(CASE, world=4))
    for one, other in ((0, 2), (1, 3)):
        drawn = [name for name in ranks[one] if "drawn" in name]
        assert len(drawn) == 2
        for name in drawn:
            assert torch.equal(ranks[one][name], ranks[other][name]), name
    for found in ranks[1:]:
        for name in ("features", "wide", "flags", "seeds", "embed"):
            assert torch.equal(found[name], ranks[0][name]), name
