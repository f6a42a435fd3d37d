"""The inputs and results shared by a layer's implementations: a call, its H, its gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fastmoe.ops.kernels import accumulation_dtype, masked_weights


@functools.lru_cache(maxsize=1024)
def index_of(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """``rows`` as int64 on a device; copied there once, as that would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device=device)


@dataclass(slots=True, eq=False)
class LayerCall:
    """The inputs of a layer. Without ``order``, input and output are in expert-major order.

    Attributes:
        x: (T, D) in the order of the tokens, contiguous; (N, D) by expert without ``order``.
        weights: (T, K), or None without ``order``.
        up: (E, 2F, D) for gated activations (gate rows first), else (E, F, D).
        down: (E, D, F).
        up_bias: (E, 2F) or (E, F), or None.
        down_bias: (E, D), or None.
        order: (N,) int64, the flat (token, slot) pair of each row, or None.
        inverse: (T*K,) int64, the row of each pair, or -1 if it has none; None without ``order``.
        tokens_per_expert: (E,) int64.
        offsets: (E,) int32, their running sum.
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`.
    """

    x: Tensor
    weights: Tensor | None
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    order: Tensor | None
    inverse: Tensor | None
    tokens_per_expert: Tensor
    offsets: Tensor
    activation: str
    _pairs: Tensor | None = field(default=None, init=False)
    _ones: Tensor | None = field(default=None, init=False)
    _first: tuple[tuple[int, ...], Tensor, Tensor] | None = field(default=None, init=False)

    @property
    def top_k(self) -> int:
        """K; 1 for rows in expert-major order."""
        return 1 if self.weights is None else self.weights.shape[1]

    @property
    def has_biases(self) -> bool:
        """Whether there is any bias."""
        return self.up_bias is not None or self.down_bias is not None

    @property
    def has_all_pairs(self) -> bool:
        """Whether each (token, slot) pair has a row."""
        return self.order is None or self.inverse is None or self.order.shape == self.inverse.shape

    def of_pairs_with_rows(self, d_weights: Tensor) -> Tensor:
        """``d_weights (T, K)`` with zeros for the pairs that have no row."""
        if self.has_all_pairs:
            return d_weights
        assert self.inverse is not None
        return masked_weights(d_weights, self.inverse)

    def rows_first(self, experts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """An order of the rows in which those of some experts come first, expert by expert.

        A GEMM whose segments tile its rows can't skip rows in between; it can end before the last.
        Nothing is read from the device.

        Args:
            experts: t of them, ascending.

        Returns:
            (N,) int64, the row at each place; (t,) int32, where the rows of each expert end.
        """
        if self._first is None or self._first[0] != experts:
            device, number = self.offsets.device, self.offsets.shape[0]
            index = index_of(experts, device)
            place = torch.full((number + 1,), len(experts), device=device)
            place[index] = torch.arange(len(experts), device=device)
            rows = torch.arange(self.pairs().shape[0], dtype=torch.int32, device=device)
            of_row = torch.searchsorted(self.offsets, rows, right=True)
            order = torch.sort(place[of_row], stable=True).indices
            ends = torch.cumsum(self.tokens_per_expert[index], 0).to(torch.int32)
            self._first = experts, order, ends
        return self._first[1:]

    def pairs(self) -> Tensor:
        """(N,) int64: ``order``, or 0, 1, ..., N - 1 for rows in expert-major order."""
        if self.order is not None:
            return self.order
        if self._pairs is None:
            self._pairs = torch.arange(self.x.shape[0], device=self.x.device)
        return self._pairs

    def weights_or_ones(self) -> Tensor:
        """``weights``, or ones (N, 1)."""
        if self.weights is not None:
            return self.weights
        if self._ones is None:
            self._ones = self.x.new_ones(self.x.shape[0], 1, dtype=accumulation_dtype(self.x.dtype))
        return self._ones


class PreActivation(NamedTuple):
    """H, the input of the activation.

    Attributes:
        rows: (N, 2F) or (N, F) in expert-major order; zero rows if no backward can follow.
        has_bias: whether the bias, where there is one, has been added to ``rows``.
    """

    rows: Tensor
    has_bias: bool


def save(ctx: Any, call: LayerCall, h: PreActivation) -> None:
    """Saves a call and its H in the context of an autograd node, for :func:`restore`."""
    ctx.save_for_backward(
        *(h.rows, call.x, call.weights, call.up, call.down, call.up_bias, call.down_bias),
        *(call.order, call.inverse, call.tokens_per_expert, call.offsets),
    )
    ctx.activation, ctx.h_has_bias, ctx.h_is_spent = call.activation, h.has_bias, False


def restore(ctx: Any) -> tuple[LayerCall, PreActivation | None]:
    """The call that a node has saved, and its H; None for an H that a backward has overwritten."""
    rows, *tensors = ctx.saved_tensors
    fields: list[Any] = [*tensors, ctx.activation]
    call = LayerCall(*fields)
    if ctx.h_is_spent:
        return call, None
    # Through .data, because autograd would reject the overwritten H of a retained graph.
    return call, PreActivation(rows.data, ctx.h_has_bias)


class Wanted(NamedTuple):
    """Which gradients a backward must compute.

    ``experts`` names those whose weights and biases are wanted, ascending; these gradients then
    have a row for each of them. None is all.
    """

    x: bool
    weights: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool
    experts: tuple[int, ...] | None = None


class Gradients(NamedTuple):
    """The gradients of a call, None where not wanted."""

    x: Tensor | None
    weights: Tensor | None
    up: Tensor | None
    down: Tensor | None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
