"""Expert parallel groups that span nodes: "dedup" exchanges in two levels."""

from __future__ import annotations

import pytest
from strategy import node_runs as runs
from strategy.exactness import assert_same, ident
from strategy.models import Case, reference

from lightning_fastmoe.testing import RankError

TWO, ONE = {"TwoLevelDedupSchedule"}, {"DedupSchedule"}


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 4, stage=1, nodes=2),
        Case(4, 4, stage=2, nodes=2, accumulate=2, in_configure_model=True),
        Case(4, 4, stage=3, nodes=2, in_configure_model=True),
    ],
    ids=ident,
)
def test_training_on_two_nodes_equals_one_process(case: Case, rank_pool) -> None:
    expected = reference(case)
    for trace, kinds in rank_pool.run(runs.trains, 4, case, ranks_per_node=2):
        assert kinds == TWO
        assert_same(trace, expected)


@pytest.mark.parametrize(
    ("ep", "nodes", "given", "in_turn", "size", "kinds"),
    [
        (4, 2, None, False, 4, TWO),
        (4, 2, None, True, 4, ONE),
        (2, 2, None, False, 2, ONE),
        (4, 1, None, False, 4, ONE),
        (4, 4, None, False, 4, ONE),
        (4, 1, 2, False, 4, TWO),
        (4, 2, 4, False, 4, ONE),
        ("auto", 2, None, False, 2, ONE),
        ("auto", 2, 4, False, 4, ONE),
    ],
    ids=[
        "two nodes",
        "ranks in turn",
        "groups within nodes",
        "one node",
        "one rank per node",
        "one node given as two",
        "two nodes given as one",
        "auto",
        "auto, two nodes given as one",
    ],
)
def test_when_there_are_two_levels(rank_pool, ep, nodes, given, in_turn, size, kinds) -> None:
    extra = {} if given is None else {"ranks_per_node": given}
    built_late = ep == "auto"  # the size is resolved while layers are built
    case = Case(4, ep, nodes=nodes, steps=1, extra=extra, in_configure_model=built_late)
    found = rank_pool.run(runs.schedules, 4, case, in_turn, ranks_per_node=4 // nodes)
    assert found == [(size, kinds)] * 4


def test_a_node_size_that_does_not_divide_the_world_is_refused(rank_pool) -> None:
    for ep in (4, "auto"):
        case = Case(4, ep, steps=1, extra={"ranks_per_node": 3})
        with pytest.raises(RankError) as error:
            rank_pool.run(runs.schedules, 4, case, False)
        assert set(error.value.errors) == {0, 1, 2, 3}
        for kind, message in error.value.errors.values():
            assert kind == "TopologyError"
            assert "ranks_per_node=3 does not divide the world of 4 rank(s)" in message


def test_an_error_between_the_levels_is_told_to_all_ranks(rank_pool) -> None:
    results = rank_pool.run(runs.stops, 4, None, 1000.0, ranks_per_node=2, timeout=60)
    assert results[1][:2] == ("ValueError", "an expert of rank 1 is broken")
    for rank in (0, 2, 3):
        kind, message, _ = results[rank]
        assert kind == "ExchangeError", (rank, kind, message)
        assert "rank 1 has left the run with ValueError: an expert of rank 1" in message, rank


def test_the_deadline_of_either_level_ends_all_ranks(rank_pool) -> None:
    results = rank_pool.run(runs.stops, 4, 9.0, 2.0, ranks_per_node=2, timeout=60)
    for rank, (kind, message, seconds) in enumerate(results):
        assert kind == "ExchangeError", (rank, kind, message)
        assert "has waited 2" in message, (rank, message)
        assert "(exchange_timeout=2)" in message
        assert seconds < 40
    report = max((message for _, message, _ in results), key=len)
    assert "phase combine within the node" in report
    assert "phase combine between nodes" in report
