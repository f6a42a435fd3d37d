"""Detects NaN and Inf in a router's logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from lightning_fastmoe.errors import NonFiniteError
from lightning_fastmoe.nn.runtime_ops import checked

NonFinitePolicy = Literal["raise", "collect", "ignore"]


class NonFiniteGuard:
    """Looks for NaN and Inf in the logits of each forward pass.

    Attributes:
        policy: "raise" an error, on the CPU; "collect" them in training, for whoever calls
            :func:`take_largest` after the step; or "ignore" them.
    """

    def __init__(self) -> None:
        self.policy: NonFinitePolicy = "raise"
        # Never None: graphs would differ between the first pass after a step and the next, and so
        # between a pass and its replay by activation checkpointing. A micro-batch begins with the
        # same tensor each time, or CUDA graphs would be recorded again; nothing is written to it,
        # since a checkpointed pass that a graph contains may save it.
        self._nothing = self._largest = _zero(torch.device("cpu"))
        self._before: Tensor | None = None  # of earlier micro-batches

    def begin(self, device: torch.device, *, collects: bool) -> None:
        """Begins a run.

        Args:
            device: of the logits: graphs that found it out would be compiled again.
            collects: whether the policy is "collect"; else it is "ignore".
        """
        self.policy = "collect" if collects else "ignore"
        self._nothing = self._largest = _zero(device)
        self._before = None

    def look(self, logits: Tensor, layer: str, *, training: bool) -> None:
        """Checks ``logits`` and acts according to :attr:`policy`; no host synchronisation on CUDA.

        Args:
            logits: (T, E).
            layer: the layer's name, for the error.
            training: whether the layer is training.

        Raises:
            NonFiniteError: on the CPU, under the policy "raise".
        """
        collects = self.policy == "collect"
        # On CUDA, reading the result would stall the stream; there the strategy collects it.
        if (not training if collects else logits.is_cuda) or self.policy == "ignore":
            return
        if logits.numel() == 0:
            return
        # One kernel, where isfinite() takes four: the largest of a NaN and anything is NaN.
        largest = torch.linalg.vector_norm(logits.detach(), torch.inf)
        if collects:
            self._collect(largest)
        elif not largest.isfinite():
            raise NonFiniteError(
                f"{layer}: the router's logits contain NaN or Inf, so its input or its weights"
                " do. Lower the learning rate or look for the bad batch; set the layer's"
                " nonfinite_policy='ignore' to continue anyway."
            )

    def look_in_graph(self, weights: Tensor, logits: Tensor, *, training: bool) -> Tensor:
        """:meth:`look` as a compiler traces it.

        Args:
            weights: (T, K), the router's.
            logits: (T, E).
            training: whether the layer is training.

        Returns:
            The weights to go on with: a copy where the logits are checked at once.
        """
        if self.policy == "raise" and not logits.is_cuda:
            return checked(weights, logits.detach())  # type: ignore[no-any-return]
        if self.policy == "collect" and training and logits.numel():
            self._collect(torch.linalg.vector_norm(logits.detach(), torch.inf))
        return weights

    def _collect(self, largest: Tensor) -> None:
        before = self._largest.to(largest.device, non_blocking=True)
        self._largest = torch.maximum(before, largest.to(before.dtype))

    @property
    def found(self) -> bool:
        """Whether any was collected since the last :func:`take_largest`; waits for the device."""
        return not bool(self._all.isfinite())

    @property
    def _all(self) -> Tensor:
        """The largest of all micro-batches."""
        return self._largest if self._before is None else torch.maximum(self._before, self._largest)

    def put(self) -> None:
        """Restores what a checkpoint found that was saved in the middle of a step."""
        self._before = torch.full_like(self._nothing, torch.inf)


def begin_micro_batch(guards: Iterable[NonFiniteGuard]) -> None:
    """Keeps what earlier micro-batches of a step have collected where no CUDA graph writes to it.

    Args:
        guards: of a model's layers.
    """
    filled = [guard for guard in guards if guard._largest is not guard._nothing]
    if not filled:
        return
    devices = {guard._largest.device for guard in filled}
    found: Iterable[Tensor] = (
        torch.stack([guard._all for guard in filled]).unbind()
        if len(devices) == 1
        else [guard._all.clone() for guard in filled]
    )
    for guard, largest in zip(filled, found, strict=True):
        guard._before, guard._largest = largest, guard._nothing


def take_largest(guards: Iterable[NonFiniteGuard], device: torch.device) -> Tensor:
    """The largest absolute logit that each guard has collected since the last call.

    Args:
        guards: n of them.
        device: of the result.

    Returns:
        (n,) fp32: NaN or Inf where any was collected, 0 where there was none.
    """
    found = []
    for guard in guards:
        found.append(guard._all.to(device))
        guard._largest, guard._before = guard._nothing, None
    return torch.stack(found) if found else torch.empty(0, device=device)


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=device)
