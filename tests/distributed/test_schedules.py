"""The contract of schedules and dispatchers: the numbers of all experts on one rank."""

from __future__ import annotations

import pytest
import torch
from distributed import schedule_runs as runs
from pairwise import combinations

from lightning_fastmoe.distributed import AllToAllDispatcher
from lightning_fastmoe.distributed.schedule import ACROSS_RANKS, AUTO
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.dispatch import DISPATCHERS, ONE_RANK


@combinations(schedule=list(ACROSS_RANKS), placement=list(runs.PLACEMENTS), world=[1, 2, 4])
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


def test_every_name_that_the_layer_takes_has_a_schedule():
    assert [name for name in DISPATCHERS if name not in ONE_RANK] == list(ACROSS_RANKS)
    assert AUTO in ACROSS_RANKS


def test_a_dispatcher_may_replace_what_moves_the_rows_alone(rank_pool):
    for phases, tensors in rank_pool.run(runs.with_a_collective_of_its_own, 2):
        assert phases == ["dispatch", "combine", "combine (backward)", "dispatch (backward)"]
        for found, right in tensors.values():
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_a_run_without_expert_parallelism_takes_every_name(rank_pool):
    """All experts are here, whatever would reach others."""
    for rank, names in enumerate(rank_pool.run(runs.with_every_dispatcher, 2)):
        assert names == dict.fromkeys(DISPATCHERS, True), rank
