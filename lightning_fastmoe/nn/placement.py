"""Which experts a layer creates while it is being built.

Outside of any context a layer creates all of its experts. Inside ``expert_placement`` (the strategy
enters it around ``configure_model``) it creates its rank's slice alone, so that a model larger than
one rank's memory can be built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placement:
    """A contiguous slice of a layer's experts, by global id, and the dispatcher that reaches all.

    Attributes:
        first_expert: global id of the first local expert.
        num_local_experts: experts on this rank.
        attach: called with the finished layer, to give it its dispatcher and tags.
        remember: called with the finished layer and the function that makes its experts for
            another placement; None if this placement is final.
    """

    first_expert: int
    num_local_experts: int
    attach: Callable[[Any], None]
    remember: Callable[[Any, Callable[[Placement | None], Any]], None] | None = None


PlacementRule = Callable[[int], Placement | None]
"""From a layer's ``num_experts`` to its placement; None for "all experts here"."""

_rule: ContextVar[PlacementRule | None] = ContextVar("expert_placement_rule", default=None)


@contextmanager
def expert_placement(rule: PlacementRule) -> Iterator[None]:
    """Layers built inside create the experts that ``rule`` gives them."""
    token = _rule.set(rule)
    try:
        yield
    finally:
        _rule.reset(token)


def current_placement(num_experts: int) -> Placement | None:
    """The placement of a layer built now, or None for all experts."""
    rule = _rule.get()
    return None if rule is None else rule(num_experts)
