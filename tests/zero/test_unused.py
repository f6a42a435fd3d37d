"""A parameter that takes no part in a step has no gradient in it, not that of the step before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.exactness import assert_close
from strategy.models import D_IN, Case, Net, build_net, loss_of, make_batches
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

USED = (True, False, False, True, True, False)
"""Whether the layer takes part in a micro-batch."""


def build(case: Case) -> nn.ModuleDict:
    net = build_net(case.num_experts, case.coefficients)
    net["side"] = nn.Linear(D_IN, D_IN)
    return net


def loss(net: nn.ModuleDict, batch: Tensor, micro_batch: int) -> Tensor:
    return loss_of(net, batch + net["side"](batch) if USED[micro_batch] else batch)


class Sometimes(Net):
    """Leaves the layer out."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.net["side"] = nn.Linear(D_IN, D_IN)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss(self.net, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.02)


def fit(case: Case) -> dict[str, Tensor]:
    """The weights after training."""
    pl.seed_everything(7, verbose=False)
    module = Sometimes(case)
    make_trainer(case, gradient_clip_val=None).fit(module)
    return whole_weights(module.net)


def twin(case: Case) -> dict[str, Tensor]:
    """The same in one process, in plain PyTorch."""
    pl.seed_everything(7, verbose=False)
    net = build(case)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    count = 0
    for step in make_batches(case):
        optimizer.zero_grad()
        for micro in step:
            for batch in micro:
                (loss(net, batch, count) / step.shape[:2].numel()).backward()
            count += 1
        optimizer.step()
    return {n: p.detach() for n, p in net.named_parameters()}


CASE = Case(world=2, ep=2, steps=6, coefficients=(0.0, 0.0))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("stage", "extra"), [(1, {}), (2, {}), (3, {}), (3, {"offload_optimizer": True})]
)
def test_it_stays_where_it_is(rank_pool, stage, extra, accumulate):
    case = replace(CASE, stage=stage, extra=extra, accumulate=accumulate, steps=6 // accumulate)
    plain = twin(case)
    for trained in rank_pool.run(fit, 2, case):
        for name, weight in plain.items():
            assert_close(trained[name], weight, name)
