"""The metrics on two ranks with different numbers of tokens against one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from strategy.models import Case, Net
from strategy.tracing import make_trainer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe import CoActivationMonitor, metrics
from lightning_fastmoe.monitoring.logs import co_activation as co_activation_log
from lightning_fastmoe.nn import MoE, Routing, moe_layers

KINDS = (
    metrics.LoadRatio,
    metrics.LoadCV,
    metrics.DeadExperts,
    metrics.DropRate,
    metrics.RouterEntropy,
    metrics.RouterConfidence,
    metrics.ExpertCoActivation,
)
TOKENS = ((5, 9), (0, 3))
"""Of each rank in each micro-batch."""


def passes(ranks: Sequence[int]) -> list[Tensor]:
    """The micro-batches of these ranks."""
    generator = torch.Generator().manual_seed(5)
    every = [[torch.randn(n, 6, generator=generator) for n in row] for row in TOKENS]
    return [row[rank] for row in every for rank in ranks]


def monitor(case: Case, folder: str) -> list[Tensor]:
    """This rank's pairs in the last step, per layer; rank zero's monitor writes those of all."""
    net = Net(case)
    seen: dict[str, list[Tensor]] = {}

    def note(layer: MoE, routing: Routing) -> None:
        chosen = torch.zeros(routing.scores.shape, dtype=torch.int64)
        chosen.scatter_(1, routing.expert_ids, 1)
        seen.setdefault(layer.layer_name, []).append(chosen.T @ chosen)

    for _, layer in moe_layers(net):
        layer.register_routing_observer(note)
    callback = CoActivationMonitor(1, folder)
    make_trainer(case, callbacks=[callback]).fit(net)
    return [sum(pairs[-case.accumulate :]) for pairs in seen.values()]


def measure(capacity_factor: float | None) -> dict[str, Tensor]:
    """The metrics over all ranks, each pass replayed by activation checkpointing."""
    dist.init_process_group("gloo")
    return values(capacity_factor, passes([dist.get_rank()]))


def values(capacity_factor: float | None, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The metrics over ``batches``."""
    torch.manual_seed(1)
    # More experts than tokens in a pass, so that some are dead.
    layer = MoE(6, 8, 24, 2, capacity_factor=capacity_factor)
    found = [kind(24) for kind in KINDS]
    for metric in found:
        metric.observe(layer)
    for batch in batches:
        x = batch.clone().requires_grad_()
        (checkpoint(layer, x, use_reentrant=False) * 1.5).sum().backward()
    return {type(metric).__name__: metric.compute() for metric in found}


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_two_ranks_equal_one_process(rank_pool, capacity_factor):
    ranks = rank_pool.run(measure, 2, capacity_factor)
    alone = values(capacity_factor, passes([0, 1]))
    assert alone["DeadExperts"] > 0
    assert (alone["DropRate"] > 0) == (capacity_factor is not None)
    own = values(capacity_factor, passes([0]))
    for name, want in alone.items():
        for found in ranks:
            torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-12, equal_nan=True)
        if name != "DropRate":
            assert not torch.equal(own[name].nan_to_num(9), want.nan_to_num(9)), name


def test_co_activation_of_all_ranks_and_micro_batches(rank_pool, tmp_path):
    case = Case(world=2, ep=2, accumulate=2)
    ranks = rank_pool.run(monitor, 2, case, str(tmp_path))
    log = co_activation_log.read(tmp_path / co_activation_log.FILE_NAME)
    assert (log.first_step, log.last_step) == (2, 2)
    assert [x.name for x in log.layers] == ["net.moes.0", "net.moes.1"]
    for layer, *own in zip(log.layers, *ranks, strict=True):
        assert layer.together == sum(own).tolist()
        assert layer.together != (2 * own[0]).tolist()
