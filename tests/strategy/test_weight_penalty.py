"""A penalty on weights in the loss, as docs/lightning.md has it, trains as in one process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.exactness import assert_close
from strategy.models import Case, Net, build_net, loss_of, make_batches
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

PAGE = Path(__file__).parents[2] / "docs" / "lightning.md"
CASE = Case(coefficients=(0.0, 0.0))


def documented() -> Any:
    """``penalty(module)`` of the page."""
    (block,) = re.findall(
        r"```python\n((?:(?!```).)*def penalty.*?)```", PAGE.read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102
    return names["penalty"]


class Penalized(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.1 * documented()(self.net)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(case: Case) -> dict[str, Tensor]:
    pl.seed_everything(7, verbose=False)
    module = Penalized(case)
    make_trainer(case).fit(module)
    return whole_weights(module.net)


def plain(case: Case) -> dict[str, Tensor]:
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in make_batches(case):
        optimizer.zero_grad()
        batches = step.flatten(0, 1)
        loss = sum(loss_of(net, batch) for batch in batches) / len(batches)
        (loss + 0.1 * sum(p.square().sum() for p in net.parameters())).backward()
        nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        optimizer.step()
    return {n: p.detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("stage", [1, 2])
def test_it_trains_as_in_one_process(rank_pool, world, ep, stage):
    case = replace(CASE, world=world, ep=ep, stage=stage, clip=100.0)
    expected = plain(case)
    for trained in rank_pool.run(fit, world, case):
        for name, weight in expected.items():
            assert_close(trained[name], weight, name)
