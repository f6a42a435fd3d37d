"""Exchanges that are differentiated twice: right, or refused."""

from __future__ import annotations

import pytest
import torch
from distributed.double_backward_runs import DATA, Net, penalised, step

from lightning_fastmoe.distributed.schedule import ACROSS_RANKS
from lightning_fastmoe.testing import RankPool


def test_all_to_all(rank_pool: RankPool) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    torch.stack([penalised(net, x) for x in DATA]).mean().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer.step()
    found, _ = rank_pool.run(step, 2, "all_to_all", timeout=60)
    for name, value in net.state_dict().items():
        assert (value - before[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dispatcher", [name for name in ACROSS_RANKS if name != "all_to_all"])
def test_others_refuse_it(dispatcher: str, rank_pool: RankPool) -> None:
    for said in rank_pool.run(step, 2, dispatcher, timeout=60):
        assert "differentiate twice" in said
