"""What the ranks run in test_exact_layers.py."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

from strategy.models import Case, Net, Trace
from strategy.tracing import run_case

from lightning_fastmoe.distributed import schedule
from lightning_fastmoe.distributed.schedule.exact import ExactSchedule
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers


class Exact(Net):
    """Notes how its layers exchange tokens, while it trains."""

    ways: tuple[str, ...] = ()

    def on_train_start(self) -> None:
        schedules = [layer.schedule for _, layer in expert_layers(self)]
        assert all(isinstance(one, ExactSchedule) for one in schedules)
        Exact.ways = tuple(type(one.way).__name__ for one in schedules)


class Chosen(Exact):
    """Says so of its second layer alone."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.net["moes"][1].exact = True

    def on_train_start(self) -> None:
        schedules = [layer.schedule for _, layer in expert_layers(self)]
        Exact.ways = tuple(type(one).__name__ for one in schedules)


def train(dispatcher: str, case: Case, chosen: bool = False) -> tuple[Trace, tuple[str, ...]]:
    """The run, by ``dispatcher`` for every layer, and what the layers had."""
    if not chosen:
        case = replace(case, extra={"exact": True})
    with patch.object(schedule, "AUTO", dispatcher):
        trace = run_case(case, Chosen if chosen else Exact)
    return trace, Exact.ways


def refused() -> str:
    """The error of a layer that can't be exact, in a model that has to be."""

    class Other(Net):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.net["moes"][1].dispatcher_name = "dedup_overlapped"

    try:
        run_case(Case(world=2, ep=2, extra={"exact": True}), Other)
    except ConfigError as error:
        return str(error)
    return "none"
