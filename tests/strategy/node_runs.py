"""What the ranks run in test_nodes.py: expert parallel groups that span nodes."""

from __future__ import annotations

import os
import time
from typing import Any

import pytorch_lightning as pl
from strategy.models import Case, Net, Trace
from strategy.tracing import make_trainer, run_case_by
from strategy.waiting_runs import outcome

from lightning_fastmoe.distributed import schedule
from lightning_fastmoe.nn import moe_layers


class ByDedup(Net):
    """Its layers deduplicate."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._choose()

    def configure_model(self) -> None:
        super().configure_model()
        self._choose()

    def _choose(self) -> None:
        for _, layer in moe_layers(self):
            layer.dispatcher_name = "dedup"


class Notes(pl.Callback):
    """Which schedule each layer has, and the size of the expert parallel group."""

    def __init__(self) -> None:
        self.found: tuple[int, set[str]] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        kinds = {type(layer.schedule).__name__ for _, layer in moe_layers(pl_module)}
        self.found = trainer.strategy.expert_mesh.ep_size, kinds


def trains(case: Case) -> tuple[Trace, set[str]]:
    """What a run by "dedup" did, and its schedules."""
    kinds = set()
    real = schedule.ACROSS_RANKS["dedup"]

    def noting(*args: Any) -> Any:
        made = real(*args)
        kinds.add(type(made).__name__)
        return made

    schedule.ACROSS_RANKS["dedup"] = noting
    try:
        return run_case_by("dedup", case), kinds
    finally:
        schedule.ACROSS_RANKS["dedup"] = real


def schedules(case: Case, in_turn: bool) -> tuple[int, set[str]] | None:
    """The size of the expert parallel group, and the schedules.

    Args:
        case: what is trained.
        in_turn: whether the launcher has numbered the ranks across nodes in turn.
    """
    if in_turn:
        local, node = divmod(int(os.environ["RANK"]), case.nodes)
        os.environ.update(GROUP_RANK=str(node), LOCAL_RANK=str(local))
    notes = Notes()
    make_trainer(case, callbacks=[notes]).fit(ByDedup(case))
    return notes.found


class ExpertsStop(pl.Callback):
    """The experts of rank 1 raise or sleep in the second step.

    Args:
        seconds: how long they sleep; None raises.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            _, layer = next(iter(moe_layers(pl_module)))
            layer.experts.register_forward_pre_hook(self._stop)

    def _stop(self, *args: Any) -> None:
        if self.seconds is None:
            raise ValueError("an expert of rank 1 is broken")
        time.sleep(self.seconds)


def stops(seconds: float | None, exchange_timeout: float) -> tuple[str, str, float]:
    """The error that this rank gets, and after how many seconds."""
    case = Case(4, 4, nodes=2, steps=4, extra={"exchange_timeout": exchange_timeout})
    return outcome(make_trainer(case, callbacks=[ExpertsStop(seconds)]), ByDedup(case))
