"""Decides which experts a layer creates while it is being built.

Outside any context a layer creates all of its experts. Inside ``expert_placement`` (the strategy
enters it around ``configure_model``) it creates only its rank's experts, so that a model larger
than one rank's memory can be built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placement:
    """The experts of a layer that a rank creates.

    Attributes:
        expert_ids: their global ids, ascending.
        remember: called with the finished layer and the function that makes its experts from
            global ids (None for all); None if this placement is final.
    """

    expert_ids: tuple[int, ...]
    remember: Callable[[Any, Callable[[tuple[int, ...] | None], Any]], None] | None = None


def equal_blocks(num_experts: int, ranks: int) -> list[range]:
    """``num_experts`` ids in ``ranks`` contiguous blocks: 4 over 2 are (0, 1) and (2, 3)."""
    each = num_experts // ranks
    return [range(rank * each, (rank + 1) * each) for rank in range(ranks)]


PlacementRule = Callable[[int], Placement | None]
"""Maps a layer's ``num_experts`` to its placement; None for "all experts here"."""

_rule: ContextVar[PlacementRule | None] = ContextVar("expert_placement_rule", default=None)


@contextmanager
def expert_placement(rule: PlacementRule) -> Iterator[None]:
    """Makes layers built inside create only the experts that ``rule`` gives them."""
    token = _rule.set(rule)
    try:
        yield
    finally:
        _rule.reset(token)


def current_placement(num_experts: int) -> Placement | None:
    """The placement of a layer built now, or None for all experts."""
    rule = _rule.get()
    return None if rule is None else rule(num_experts)


def is_placing() -> bool:
    """Whether a strategy is building the model, so that layers may create only some experts."""
    return _rule.get() is not None


def settle_placement() -> None:
    """Says that all layers are built, and that what is written to their experts must last."""
    settle = getattr(_rule.get(), "settle", None)
    if settle is not None:
        settle()
