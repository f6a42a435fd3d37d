"""What dispatcher="auto" stands for, by what a group's GPUs can do; the group is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_fastmoe.distributed import schedule
from lightning_fastmoe.distributed.schedule import Automatic, schedule_across_ranks
from lightning_fastmoe.distributed.schedule.symmetric import SymmetricSchedule
from lightning_fastmoe.errors import TopologyError

PLACEMENT = [[0, 1], [2, 3]]


def group(**values: Any) -> Any:
    return SimpleNamespace(
        **{"shared": {}, "is_on_stream": True, "nodes": None, "size": 2} | values
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The experts of layers for which memory was mapped; it works until there are three."""
    found: list[int] = []

    class Mapped(SymmetricSchedule):
        def __init__(self, group: Any, num_experts: int, placement: Any) -> None:
            found.append(num_experts)
            if num_experts == 3:
                raise TopologyError("no access to GPU 1")

    monkeypatch.setattr(schedule, "SymmetricSchedule", Mapped)
    monkeypatch.setitem(schedule.ACROSS_RANKS, "symmetric", Mapped)
    monkeypatch.setitem(schedule.ACROSS_RANKS, schedule.AUTO, lambda *_: "the other")
    return found


def test_gpus_that_reach_each_other_push(asked: list[int]) -> None:
    one = group()
    for experts in (4, 8):
        assert isinstance(schedule_across_ranks("auto", one, experts, PLACEMENT), SymmetricSchedule)
    assert asked == [4, 8]
    chosen = str(one.shared[Automatic])
    assert chosen == (
        'dispatcher="auto" is "symmetric": 2 GPUs of one host write to each other\'s memory'
    )
    assert schedule_across_ranks("auto", one, 5000, PLACEMENT) == "the other", "too many counts"
    assert schedule_across_ranks("auto", one, 4, PLACEMENT) != "the other"


def test_the_others_say_why_not_and_are_asked_once(asked: list[int]) -> None:
    one = group()
    for experts in (3, 4):
        assert schedule_across_ranks("auto", one, experts, PLACEMENT) == "the other"
    assert asked == [3]
    assert str(one.shared[Automatic]) == 'dispatcher="auto" is "dedup": no access to GPU 1'


@pytest.mark.parametrize("name", ["is_on_stream", "nodes"])
def test_cpus_and_several_nodes_are_not_asked(asked: list[int], name: str) -> None:
    values = {"is_on_stream": False, "nodes": object()}
    one = group(**{name: values[name]})
    assert schedule_across_ranks("auto", one, 4, PLACEMENT) == "the other"
    assert asked == []
