"""One exchange of rows between the ranks of the expert parallel group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_fastmoe.distributed.dispatch.counts import ExpertGroup


@dataclass(frozen=True)
class Route:
    """One exchange: how many rows go to each rank and come from it, and how.

    Attributes:
        collective: called like ``all_to_all_single``; see :meth:`ExpertGroup.run`.
        group: the expert parallel group.
        send: rows to each rank.
        receive: rows from each rank.
        layer: the layer's name.
        phase: what is exchanged.
    """

    collective: Callable[..., Any]
    group: ExpertGroup
    send: list[int]
    receive: list[int]
    layer: str
    phase: str

    def run(self, x: Tensor) -> Tensor:
        """``x (sum(send), ...)`` -> (sum(receive), ...), in the order of the ranks."""
        out = x.new_empty((sum(self.receive), *x.shape[1:]))
        arguments = (out, x.contiguous(), self.receive, self.send)
        self.group.run(self.layer, self.phase, self.collective, *arguments)
        return out

    def start(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """:meth:`run` that goes on: the result, which may be read after calling the function."""
        out = x.new_empty((sum(self.receive), *x.shape[1:]))
        arguments = (out, x.contiguous(), self.receive, self.send)
        return out, self.group.start(self.layer, self.phase, self.collective, *arguments)

    def back(self) -> Route:
        """The way of the gradients."""
        return self.reversed(f"{self.phase} (backward)")

    def reversed(self, phase: str) -> Route:
        """The other way, for what is exchanged in ``phase``."""
        return replace(self, send=self.receive, receive=self.send, phase=phase)
