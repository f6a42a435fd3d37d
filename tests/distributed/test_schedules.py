"""The contract of schedules and dispatchers: the numbers of all experts on one rank."""

from __future__ import annotations

import pytest
import torch
from distributed import schedule_runs as runs

from lightning_fastmoe.distributed import AllToAllDispatcher
from lightning_fastmoe.errors import TopologyError


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("placement", runs.PLACEMENTS)
@pytest.mark.parametrize("schedule", runs.SCHEDULES)
def test_equals_all_experts_on_one_rank(rank_pool, schedule, placement, world):
    arguments = (schedule, placement, "cpu", torch.float64)
    for rank, cases in enumerate(rank_pool.run(runs.compared, world, *arguments)):
        for case, tensors in cases.items():
            for name, (found, right) in tensors.items():
                message = f"rank {rank}, {case}, {name}"
                torch.testing.assert_close(
                    found, right, rtol=1e-12, atol=1e-12, msg=lambda m, w=message: f"{w}: {m}"
                )


@pytest.mark.parametrize("placement", [[(0, 1), (1, 2)], [(0, 1)], [(0,), (2,)], [(0, 1, 2), ()]])
def test_a_placement_gives_each_expert_to_one_rank(placement):
    class Group:
        rank, size, slots = 0, 2, 0

    if placement == [(0, 1, 2), ()]:
        AllToAllDispatcher(Group(), 3, placement)  # a rank without experts
        return
    with pytest.raises(TopologyError, match="does not give each of 3 experts to exactly one"):
        AllToAllDispatcher(Group(), 3, placement)
