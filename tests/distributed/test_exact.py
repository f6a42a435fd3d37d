"""Bits of one process, where experts return a row per slot instead of a sum."""

from __future__ import annotations

import pytest
import torch
from distributed import exact_runs as runs
from distributed import schedule_runs

from lightning_fastmoe.distributed.schedule import ACROSS_RANKS
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.dispatch import EXACT, ONE_RANK

NAMES = [name for name in EXACT if name not in ONE_RANK]
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}
BY_RANK = "expert choice"
"""Its sums are in the order of ranks, which is that of experts where ranks hold blocks of them."""
PLACEMENTS = {1: "equal blocks", 2: "every second expert", 4: "unequal"}


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("world", list(PLACEMENTS))
def test_outputs_and_gradients_of_tokens_have_the_bits_of_one_process(rank_pool, world, dtype):
    cases = tuple(case for case in runs.CASES if world != 2 or case != BY_RANK)
    arguments = (NAMES, "cpu", dtype, PLACEMENTS[world], True, cases)
    for rank, results in enumerate(rank_pool.run(runs.compared, world, *arguments)):
        assert len(results) == len(NAMES) * len(cases)
        for case, found in results.items():
            assert not runs.EXACT & {*found["unequal"]}, (rank, case, found)
            if runs.CASES[case[1]].kind != "biased":
                assert "weights" not in found["unequal"], (rank, case)
            assert max(found["errors"].values()) <= TOLERANCES[dtype], (rank, case, found)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_expert_choice_has_them_too(rank_pool, dtype):
    arguments = (NAMES, "cpu", dtype, "equal blocks", True, (BY_RANK,))
    for results in rank_pool.run(runs.compared, 2, *arguments):
        assert [found["unequal"] for found in results.values()] == [[]] * len(NAMES)


def test_across_nodes_rows_go_in_one_level(rank_pool):
    ways = rank_pool.run(runs.way_across_nodes, 4, ranks_per_node=2)
    assert ways == ["TwoLevelDedupSchedule"] * 4
    arguments = (["dedup"], "cpu", torch.bfloat16)
    results = rank_pool.run(runs.compared, 4, *arguments, ranks_per_node=2)
    for rank, cases in enumerate(results):
        for case, found in cases.items():
            assert not runs.EXACT & {*found["unequal"]}, (rank, case, found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_contract_of_schedules(rank_pool, world, name):
    arguments = (name, "unequal", "cpu", torch.float64, True)
    for rank, cases in enumerate(rank_pool.run(schedule_runs.compared, world, *arguments)):
        for case, tensors in cases.items():
            for what, (found, right) in tensors.items():
                message = f"rank {rank}, {case}, {what}"
                torch.testing.assert_close(
                    found, right, rtol=1e-12, atol=1e-12, msg=lambda m, w=message: f"{w}: {m}"
                )


def test_without_the_option_half_precision_is_rounded_once_more(rank_pool):
    """What the test above would find."""
    arguments = ([*NAMES, "all_to_all"], "cpu", torch.bfloat16, "equal blocks", False)
    for results in rank_pool.run(runs.compared, 2, *arguments, ("plain", "biases")):
        for name in NAMES:
            assert {"output", "x"} <= {*results[name, "plain"]["unequal"]}
        # A row per slot there, too, but its gradient is multiplied by its weight and rounded first.
        assert "x" in results["all_to_all", "plain"]["unequal"]
        assert "output" not in results["all_to_all", "plain"]["unequal"]
        assert "output" in results["all_to_all", "biases"]["unequal"]


def test_symmetric_memory_has_room_for_a_row_per_slot_and_the_host_waits_once(rank_pool):
    for found in rank_pool.run(runs.memory_and_waits, 2):
        assert found == {"reads": 1, "has room": True, "not much more": True}


@pytest.mark.parametrize("name", [name for name in ACROSS_RANKS if name not in NAMES])
def test_other_dispatchers_refuse(name):
    with pytest.raises(ConfigError, match=f"exact=True is not possible with dispatcher='{name}'"):
        MoE(8, 16, 4, dispatcher=name, exact=True)


@pytest.mark.parametrize("name", EXACT)
def test_a_layer_on_one_rank_takes_it(name):
    assert MoE(8, 16, 4, dispatcher=name, exact=True).exact
    assert not MoE(8, 16, 4, dispatcher=name).exact


def test_single_experts_can_not_be_trained(rank_pool):
    for error in rank_pool.run(runs.refused, 2):
        assert error.startswith("a layer: exact=True can't train single experts. Drop SparseUpdate")
