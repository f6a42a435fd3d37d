"""Deduplication in two levels: the numbers of one rank, and one row per (token, node)."""

from __future__ import annotations

import pytest
import torch
from distributed import dedup_runs, two_level_runs
from distributed.two_level_runs import ROW, SLOTS

from lightning_fastmoe.distributed import nodes as nodes_module
from lightning_fastmoe.distributed.nodes import check_ranks_per_node
from lightning_fastmoe.errors import TopologyError

PLACEMENTS = {
    "blocks": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "scattered": [[1, 6], [0, 2, 7], [5], [3, 4]],
    "most on the first node": [[0, 3, 6], [2, 5, 7], [1], [4]],
}


@pytest.mark.parametrize("per_node", [2, 1, 4], ids=["2 x 2", "4 x 1", "1 x 4"])
@pytest.mark.parametrize("name", list(PLACEMENTS))
def test_equals_one_rank_and_sends_each_token_once_to_each_node(rank_pool, per_node, name):
    total = 0
    for found, rows in rank_pool.run(
        two_level_runs.compared, 4, PLACEMENTS[name], ranks_per_node=per_node
    ):
        for key, (value, right) in found.items():
            bound = 1e-12 * max(1.0, float(right.norm()))
            assert float((value - right).norm()) <= bound, key
        for case, sent, pairs in rows:
            assert sent == pairs, case
            total += sent
    assert (total > 0) == (per_node < 4)


def test_rows_of_both_levels_in_both_passes(rank_pool):
    """Distinct (token, node) pairs between nodes, distinct (token, rank) pairs within one."""
    for sent, between, inside in rank_pool.run(two_level_runs.rows_sent, 4, ranks_per_node=2):
        phases = [(phase, row) for phase, row, _ in sent]
        assert phases == [
            ("dispatch between nodes", SLOTS * 12),  # ids of 4 and weights of 8 bytes per slot
            ("dispatch between nodes", ROW),
            ("dispatch within the node", SLOTS * 12),
            ("dispatch within the node", ROW),
            ("combine within the node", ROW),
            ("combine between nodes", ROW),
            ("combine between nodes (backward)", ROW),
            ("combine within the node (backward)", ROW),
            ("dispatch within the node (backward)", SLOTS * 8),
            ("dispatch within the node (backward)", ROW),
            ("dispatch between nodes (backward)", SLOTS * 8),
            ("dispatch between nodes (backward)", ROW),
        ]
        out = {i: send for i, (_, _, send) in enumerate(sent)}
        assert out[0] == out[1] == out[6] == between
        assert out[2] == out[3] == out[7] == inside


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_repeated_runs_give_the_same_bits(rank_pool, dtype):
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    given = (dedup_runs.repeated, 4, "dedup", dtype)
    for values, right in rank_pool.run(*given, ranks_per_node=2):
        for other in values[1:]:
            for a, b in zip(values[0], other, strict=True):
                assert torch.equal(a, b)
        for a, b in zip(values[0], right, strict=True):
            assert float((a.double() - b).norm()) <= bound * float(b.norm())


@pytest.mark.parametrize("how", ["twice", "two graphs", "checkpointed"])
def test_several_passes_through_one_layer(rank_pool, how):
    for tensors in rank_pool.run(dedup_runs.steps, 4, "dedup", how, ranks_per_node=2):
        for what, (found, right) in tensors.items():
            torch.testing.assert_close(
                found, right, rtol=1e-10, atol=1e-10, msg=lambda m, n=what: f"{n}: {m}"
            )


def test_a_rank_that_raises_before_is_waited_for_until_the_deadline(rank_pool):
    errors = rank_pool.run(dedup_runs.faults, 4, "dedup", "a rank raises", ranks_per_node=2)
    assert errors.pop(1) == "raised"
    for rank, error in zip((0, 2, 3), errors, strict=True):
        assert error.startswith(
            f"a layer, exchange of tokens number 1, phase counts: rank {rank} has waited"
        )


@pytest.mark.parametrize(
    ("kind", "phases"),
    [
        (
            "experts raise",
            ["combine within the node", "", "combine between nodes", "combine between nodes"],
        ),
        (
            "no backward",
            [
                "combine within the node (backward)",
                "",
                "combine within the node (backward)",
                "combine between nodes (backward)",
            ],
        ),
    ],
)
def test_deadlines_hold_at_both_levels(rank_pool, kind, phases):
    """Rank 1 is on the first node; rank 3 has its index on the other, rank 2 waits for that."""
    errors = rank_pool.run(dedup_runs.faults, 4, "dedup", kind, ranks_per_node=2)
    for rank in (0, 2, 3):
        assert f"phase {phases[rank]}: rank {rank} has waited 2" in errors[rank], errors


@pytest.mark.parametrize("kind", ["other layers", "a node elsewhere", "a rank elsewhere"])
def test_ranks_in_other_layers_are_an_error_on_all(rank_pool, kind):
    errors = rank_pool.run(dedup_runs.faults, 4, "dedup", kind, ranks_per_node=2)
    for error in errors:
        assert "Every rank must run the same MoE layers" in error


def test_a_layer_with_capacity_and_router_equals_all_to_all(rank_pool):
    names = ["dedup", "all_to_all"]
    for found in rank_pool.run(dedup_runs.layers, 4, names, ranks_per_node=2):
        assert float(found["all_to_all"]["dropped"].sum()) > 0
        assert found["dedup"].keys() == found["all_to_all"].keys()
        for key, value in found["dedup"].items():
            torch.testing.assert_close(value, found["all_to_all"][key], rtol=1e-12, atol=1e-12)


def test_bf16_rounds_once_more_than_one_level(rank_pool):
    for tensors in rank_pool.run(dedup_runs.on_device, 4, "dedup", "cpu", ranks_per_node=2):
        for found, right in tensors:
            assert float((found.double() - right).norm()) <= 6e-3 * float(right.norm())


@pytest.mark.parametrize(
    ("nodes", "size", "parts"),
    [
        ([0, 0, 1, 1], 4, [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])]),
        ([7, 7, 3, 3], 4, [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])]),
        ([0, 1, 0, 1], 4, [None] * 4),  # ranks of a node don't follow one another
        ([0, 0, 0, 1], 4, [None] * 4),  # unequally many
        ([0, 1, 2, 3], 4, [None] * 4),  # a rank on each
        ([0, 0, 0, 0], 4, [None] * 4),  # one node
        ([0, 0, 1, 1], 2, [None] * 4),  # each expert parallel group on one node
    ],
)
def test_which_groups_have_two_levels(rank_pool, nodes, size, parts):
    assert rank_pool.run(two_level_runs.groups_of, 4, nodes, size) == parts


def test_two_expert_parallel_groups_have_parts_of_their_own(rank_pool):
    parts = rank_pool.run(two_level_runs.groups_of, 8, [0, 0, 1, 1, 2, 2, 3, 3], 4)
    assert parts[:2] == [([0, 1], [0, 2]), ([0, 1], [1, 3])]
    assert parts[6:] == [([6, 7], [4, 6]), ([6, 7], [5, 7])]


def test_groups_of_one_world_may_differ(monkeypatch):
    """Nodes of six with groups of four: the middle one lies on two nodes."""
    made = []
    monkeypatch.setattr(
        nodes_module, "own_group", lambda purpose, parts, timeout: made.append((purpose, parts))
    )
    blocks = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert nodes_module.make_node_groups(blocks, [rank // 6 for rank in range(12)]) is None
    assert made == [
        ("within a node", [[4, 5], [6, 7]]),
        ("between nodes", [[4, 6], [5, 7]]),
    ]


def test_parts_of_another_group_are_refused(rank_pool):
    for errors in rank_pool.run(two_level_runs.with_wrong_parts, 4, ranks_per_node=2):
        assert len(errors) == 3
        assert all(
            "do not divide the expert parallel group [0, 1, 2, 3] of" in error for error in errors
        )


@pytest.mark.parametrize("given", [3, 0, -2, 8])
def test_a_node_size_divides_the_world(given):
    with pytest.raises(TopologyError, match=rf"ranks_per_node={given} does not divide the world"):
        check_ranks_per_node(given, 4)
    check_ranks_per_node(2, 4)
