"""The inputs of a MoE layer: a tensor or a structure of tensors, optionally with a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_fastmoe.errors import ShapeError

MaskedValues = Mapping[int, float | Tensor] | float | Tensor


@dataclass
class TokenInputs:
    """The tokens of one call.

    Attributes:
        leaves: the tensors, each (T, ...); the router sees the first.
        spec: the tree of the structure; None for a plain tensor.
        lead: leading dimensions of the input; their product is the number of tokens before masking.
        positions: (T,) int64, positions of the unmasked tokens in the input; None without a mask.
        labels: (prod(lead),), 0 for active tokens; None without a mask.
        token_ids: (T,) vocabulary ids, or None.
        sequence_ids: (T,) numbers of sequences, ascending and below prod(lead), or None.
    """

    leaves: list[Tensor]
    spec: Any
    lead: tuple[int, ...]
    positions: Tensor | None = None
    labels: Tensor | None = None
    token_ids: Tensor | None = None
    sequence_ids: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """(T, D): the first tensor, which the router sees."""
        return self.leaves[0]

    def with_leaves(self, leaves: list[Tensor]) -> TokenInputs:
        """The same call with other tensors."""
        return replace(self, leaves=leaves)

    def to(self, dtype: torch.dtype) -> TokenInputs:
        """The same call with its floating-point tensors in ``dtype``."""
        return self.with_leaves([t.to(dtype) if t.is_floating_point() else t for t in self.leaves])

    def structure(self, leaves: list[Tensor]) -> Any:
        """``leaves`` in the structure of the input."""
        return leaves[0] if self.spec is None else pytree.tree_unflatten(leaves, self.spec)

    @property
    def grid(self) -> tuple[int, int]:
        """(sequences, tokens per sequence) before masking; dimension 0 is the sequences."""
        if len(self.lead) < 2:
            return 1, math.prod(self.lead)
        return self.lead[0], math.prod(self.lead[1:])

    def restore(self, y: Any, masked_values: MaskedValues | None) -> Any:
        """Tensors ``(T, ...)`` -> (*lead, ...), with values filled in for masked tokens."""
        return pytree.tree_map(lambda leaf: self._restore(leaf, masked_values), y)

    def _restore(self, y: Tensor, masked_values: MaskedValues | None) -> Tensor:
        if self.positions is not None:
            assert self.labels is not None
            full = y.new_zeros((self.labels.shape[0], *y.shape[1:]))
            if not isinstance(masked_values, Mapping):
                value = 0.0 if masked_values is None else masked_values
                full = full + torch.as_tensor(value, dtype=y.dtype, device=y.device)
            else:
                for label, value in masked_values.items():
                    chosen = (self.labels == label).view(-1, *[1] * (y.dim() - 1))
                    value = torch.as_tensor(value, dtype=y.dtype, device=y.device)
                    full = torch.where(chosen, value, full)
            y = full.index_copy(0, self.positions, y)
        return y.reshape(*self.lead, *y.shape[1:])


def read_inputs(
    x: Any,
    d_model: int,
    layer: str,
    *,
    mask: Tensor | None = None,
    token_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> TokenInputs:
    """Checks the arguments of a call and flattens them to tokens.

    Raises:
        ShapeError: if a shape or dtype is invalid.
    """
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise ShapeError(
                f"{layer} got an input of dtype {x.dtype}; it takes vectors in a floating dtype,"
                f" (..., {d_model}). Token ids go through an embedding first."
            )
        if x.shape[-1:] != (d_model,):
            raise ShapeError(
                f"{layer} got an input of shape {tuple(x.shape)}; it takes (..., {d_model}): the"
                f" last dimension must be d_model={d_model}."
            )
        inputs = TokenInputs([x.reshape(-1, d_model)], None, tuple(x.shape[:-1]))
    else:
        leaves, spec = pytree.tree_flatten(x)
        first: Any = leaves[0] if leaves else None
        good = isinstance(first, Tensor) and first.is_floating_point() and first.dim() == 2
        if not good or first.shape[1] != d_model:
            raise ShapeError(
                f"{layer} got a {type(x).__name__} whose first tensor is not (T, {d_model}) in a"
                " floating dtype. The router chooses by the first tensor of a tuple or dict."
            )
        bad = [leaf for leaf in leaves if getattr(leaf, "shape", (-1,))[:1] != first.shape[:1]]
        if bad:
            raise ShapeError(
                f"{layer} got tensors of different lengths: the first holds {first.shape[0]}"
                f" tokens, another one is {getattr(bad[0], 'shape', bad[0])}. All must have one row"
                " per token."
            )
        inputs = TokenInputs(leaves, spec, (first.shape[0],))
    per_token = {"mask": mask, "token_ids": token_ids, "sequence_ids": sequence_ids}
    for name, value in per_token.items():
        if value is None:
            continue
        if tuple(value.shape) != inputs.lead:
            raise ShapeError(
                f"{layer} got {name} of shape {tuple(value.shape)} for tokens of shape"
                f" {inputs.lead}. It needs one element per token."
            )
        if value.is_floating_point() or value.is_complex():
            raise ShapeError(
                f"{layer} got {name} of dtype {value.dtype}. It must be bool or an integer dtype:"
                " rounding would change its meaning. Convert it, for example by mask != 0."
            )
    if token_ids is not None:
        inputs.token_ids = token_ids.reshape(-1)
    if sequence_ids is not None:
        inputs.sequence_ids = _numbered(sequence_ids.reshape(inputs.grid))
    if mask is not None:
        _take_out_masked(inputs, mask)
    return inputs


def _take_out_masked(inputs: TokenInputs, mask: Tensor) -> None:
    inputs.labels = mask.reshape(-1).to(torch.int64)
    inputs.positions = torch.nonzero(inputs.labels == 0).squeeze(1)
    inputs.leaves = [leaf.index_select(0, inputs.positions) for leaf in inputs.leaves]
    if inputs.token_ids is not None:
        inputs.token_ids = inputs.token_ids.index_select(0, inputs.positions)
    if inputs.sequence_ids is not None:
        inputs.sequence_ids = inputs.sequence_ids.index_select(0, inputs.positions)


def _numbered(sequence_ids: Tensor) -> Tensor:
    """(G, n) -> (G * n,): runs of equal ids within each row, numbered from 0."""
    begins = torch.ones_like(sequence_ids, dtype=torch.bool)
    begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return begins.reshape(-1).cumsum(0) - 1
