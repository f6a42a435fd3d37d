"""How a layer reaches sharded experts, by name: a schedule, most often one with a dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lightning_fastmoe.distributed.dispatch import AllToAllDispatcher, ExpertGroup
from lightning_fastmoe.distributed.schedule.dedup import DedupSchedule
from lightning_fastmoe.distributed.schedule.symmetric import SymmetricSchedule
from lightning_fastmoe.distributed.schedule.two_level import TwoLevelDedupSchedule
from lightning_fastmoe.nn.dispatch import Dispatcher
from lightning_fastmoe.nn.schedule import Schedule, SequentialSchedule

Placement = Sequence[Sequence[int]]
"""Global ids of the experts of each rank."""


def sequential(
    dispatcher: Callable[[ExpertGroup, int, Placement], Dispatcher],
) -> Callable[[ExpertGroup, int, Placement], Schedule]:
    """Dispatch, compute and combine, one after the other, by way of ``dispatcher``."""
    return lambda group, num_experts, placement: SequentialSchedule(
        dispatcher(group, num_experts, placement)
    )


def deduplicating(group: ExpertGroup, num_experts: int, placement: Placement) -> Schedule:
    """In two levels where the group has several nodes with several ranks on each."""
    if group.nodes is None:
        return DedupSchedule(group, num_experts, placement)
    return TwoLevelDedupSchedule(group, num_experts, placement, group.nodes)


ACROSS_RANKS: dict[str, Callable[[ExpertGroup, int, Placement], Schedule]] = {
    "all_to_all": sequential(AllToAllDispatcher),
    "dedup": deduplicating,
    "dedup_overlapped": partial(DedupSchedule, parts=2),
    "symmetric": SymmetricSchedule,
}
"""Makes the schedule of a sharded layer, by the name that ``MoE(dispatcher=...)`` takes, from the
expert parallel group, E and the placement. :data:`~lightning_fastmoe.nn.dispatch.DISPATCHERS` has
the same names. The contract of schedules is tested for each."""

AUTO = "dedup"
"""The one that "auto" stands for."""


def schedule_across_ranks(
    name: str, group: ExpertGroup, num_experts: int, placement: Placement
) -> Schedule:
    """The schedule of a layer whose experts are sharded.

    Args:
        name: the layer's ``dispatcher``, except "local".
        group: the expert parallel group, shared by all layers of a model.
        num_experts: E of the layer.
        placement: global ids of the experts of each rank.
    """
    return ACROSS_RANKS[AUTO if name == "auto" else name](group, num_experts, placement)
