"""Ranks with different random seeds train the same model: weights, buffers, routers' draws."""

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


class Other(Net):
    """Rank 1 has built another model."""

    def __init__(self, case: Case, what: str) -> None:
        super().__init__(case)
        if dist.get_rank() != 1:
            return
        if what == "more":
            self.extra = nn.Linear(2, 3)
        elif what == "a layer more":
            self.extra = MoE(12, 20, 4, 2)
        elif what == "wider":
            self.net["head"] = nn.Linear(12, 2)
        elif what == "frozen":
            self.net["head"].bias.requires_grad_(False)
        elif what == "order":  # of modules with the same shapes, as those of a set
            names = ["head", "moes", "norm", "embed"]
            self.net = nn.ModuleDict({name: self.net[name] for name in names})


def error_of_another_model(case: Case, what: str) -> str:
    dist.init_process_group("gloo")
    try:
        make_trainer(case).fit(Other(case, what))
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("more", "extra.weight (3, 2) torch.float32 in place of nothing"),
        ("a layer more", "extra."),
        ("wider", "net.head.weight (2, 12) torch.float32 in place of net.head.weight (1, 12)"),
        ("frozen", "net.head.bias (1,) torch.float32 frozen in place of net.head.bias (1,)"),
        ("order", "net.head.weight (1, 12) torch.float32 in place of net.embed.weight (12, 6)"),
    ],
)
def test_ranks_that_built_other_models_are_told(rank_pool, what, named, ep):
    for message in rank_pool.run(error_of_another_model, 2, replace(CASE, ep=ep), what, timeout=60):
        assert message.startswith("TopologyError: Rank 1 has built another model than rank 0: ")
        assert named in message


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
