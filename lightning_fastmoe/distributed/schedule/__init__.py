"""How a layer reaches sharded experts, by name: a schedule, most often one with a dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lightning_fastmoe.distributed.dispatch import AllToAllDispatcher, ExpertGroup
from lightning_fastmoe.distributed.schedule.dedup import DedupSchedule
from lightning_fastmoe.distributed.schedule.exact import ExactSchedule
from lightning_fastmoe.distributed.schedule.symmetric import SymmetricSchedule
from lightning_fastmoe.distributed.schedule.two_level import TwoLevelDedupSchedule
from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.dispatch import Dispatcher, check_exact
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
"""What "auto" stands for on CPUs, and where GPUs can't write to each other's memory."""


@dataclass
class Automatic:
    """What "auto" stands for in a group, decided by its first layer.

    Attributes:
        name: of :data:`ACROSS_RANKS`.
        reason: why.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f'dispatcher="auto" is "{self.name}": {self.reason}'


def automatic(group: ExpertGroup, num_experts: int, placement: Placement) -> Schedule:
    """ "symmetric" on GPUs that reach each other's memory, else :data:`AUTO`.

    All ranks of the group come to the same decision: set-up of the former fails on all or on none.
    """
    decided = group.shared.get(Automatic)
    if decided is None and group.is_on_stream and group.nodes is None:
        try:
            schedule = SymmetricSchedule(group, num_experts, placement)
        except TopologyError as error:
            group.shared[Automatic] = Automatic(AUTO, str(error))
        else:
            reason = f"{group.size} GPUs of one host write to each other's memory"
            group.shared[Automatic] = Automatic("symmetric", reason)
            return schedule
    name = AUTO if decided is None else decided.name
    if name == "symmetric" and not SymmetricSchedule.has_room(group, num_experts):
        name = AUTO
    return ACROSS_RANKS[name](group, num_experts, placement)


def schedule_across_ranks(
    name: str, group: ExpertGroup, num_experts: int, placement: Placement, exact: bool = False
) -> Schedule:
    """The schedule of a layer whose experts are sharded.

    Args:
        name: the layer's ``dispatcher``, except "local".
        group: the expert parallel group, shared by all layers of a model.
        num_experts: E of the layer.
        placement: global ids of the experts of each rank.
        exact: whether its numbers must have the bits of one process.

    Raises:
        ConfigError: if they must, and the dispatcher's don't.
    """
    if exact:
        check_exact(name)
    make = automatic if name == "auto" else ACROSS_RANKS[name]
    schedule = make(group, num_experts, placement)
    if not exact:
        return schedule
    assert isinstance(schedule, DedupSchedule)
    return ExactSchedule(schedule)
