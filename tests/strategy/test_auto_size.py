"""expert_parallel_size="auto" looks at every layer, wherever the model is built."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.models import D_MODEL, Case, Net, build_net
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.errors import TopologyError

Outcome = tuple[int, list[int], dict[str, Tensor]]


class Expert(nn.Linear):
    """An expert that is a module, with a buffer."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model)
        self.register_buffer("scale", torch.ones(()))


class Late(Net):
    """Builds some layers in ``__init__``, the others in ``configure_model``."""

    def __init__(self, case: Case, in_init: int, modules: bool) -> None:
        super().__init__(case)
        self.modules_ = modules
        self.layers = nn.ModuleList()
        self.calls = 0
        self.build(in_init)

    def build(self, count: int) -> None:
        """Layers up to the ``count``th; each from a seed of its own, wherever it is built."""
        for i in range(len(self.layers), count):
            torch.manual_seed(i)
            self.layers.append(self.make(self.case.num_experts[i]))

    def make(self, experts: int) -> MoE:
        if self.modules_:
            return MoE(D_MODEL, None, experts, 2, expert=Expert)
        return MoE(D_MODEL, 20, experts, 2, bias=True)

    def configure_model(self) -> None:
        self.calls += 1
        self.build(len(self.case.num_experts))
        torch.manual_seed(9)
        self.net = build_net((), (0.0, 0.0))
        self.net["moes"] = self.layers


def built(case: Case, in_init: int, modules: bool = False) -> Outcome:
    """The size that "auto" took, the local experts of each layer, and the trained weights."""
    pl.seed_everything(7, verbose=False)
    module = Late(case, in_init, modules)
    trainer = make_trainer(case)
    trainer.fit(module)
    assert module.calls == 1
    assert module.net is not None
    local = [layer.num_local_experts for layer in module.layers]
    return trainer.strategy.expert_mesh.ep_size, local, whole_weights(module.net)


class Written(Late):
    """Writes to each layer's experts as soon as they are built."""

    def make(self, experts: int) -> MoE:
        layer = super().make(experts)
        with torch.no_grad():
            layer.experts.up_proj.mul_(2)
        return layer


def written_early(case: Case) -> Any:
    """The error for weights that would be lost."""
    try:
        make_trainer(case).fit(Written(case, 0, False))
    except TopologyError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("world", "experts", "size", "modules"),
    [
        (2, (4, 5), 1, False),
        (2, (6, 4), 2, False),
        (4, (4, 6), 2, False),
        (4, (6, 4), 2, False),
        (4, (8, 4, 6), 2, True),
        (4, (4, 6, 5), 1, True),
    ],
)
def test_every_layer_counts(
    world: int, experts: tuple[int, ...], size: int, modules: bool, rank_pool
) -> None:
    """Built in ``__init__`` or not, one by one or not: the same size, and the same numbers."""
    case = Case(world=world, ep="auto", num_experts=experts, steps=2, in_configure_model=True)
    whole = rank_pool.run(built, world, case, len(experts), modules)
    for in_init in (0, 1):
        outcomes = rank_pool.run(built, world, case, in_init, modules)
        for expected, (ep_size, local, weights) in zip(whole, outcomes, strict=True):
            assert ep_size == expected[0] == size
            assert local == expected[1] == [e // size for e in experts]
            assert weights.keys() == expected[2].keys()
            for name, value in expected[2].items():
                assert torch.equal(weights[name], value), name


def test_weights_that_would_be_lost(rank_pool) -> None:
    case = Case(world=4, ep="auto", num_experts=(4, 6), in_configure_model=True)
    for message in rank_pool.run(written_early, 4, case):
        assert "chose 4 for a layer of 4 experts, but a later layer of 6" in message
        assert "Pass expert_parallel_size=2" in message
