"""One grouped GEMM with stacked weights, differentiable: all of them trained, or some experts'.

Or none, of a :class:`~lightning_fastmoe.ops.frozen_weight.FrozenWeight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.ops import traced_linear
from lightning_fastmoe.ops.double_backward import differentiable_gradients
from lightning_fastmoe.ops.frozen_weight import FrozenWeight, frozen_linear
from lightning_fastmoe.ops.layer_call import LayerCall, index_of
from lightning_fastmoe.ops.products.torch import (
    TorchProducts,
    counts_on_host,
    grouped_mm_applies,
    grouped_product,
    is_aligned,
)


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm refuses expanded (stride-0) gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def grouped_linear(x: Tensor, weight: Tensor | FrozenWeight, tokens_per_expert: Tensor) -> Tensor:
    """``x[rows of e] @ weight[e].T`` for every expert e.

    Args:
        x: (N, D), rows grouped by expert; N is the sum of the counts.
        weight: (E, M, D); one that isn't kept is made in the dtype of ``x``, once here and once in
            the backward pass.
        tokens_per_expert: (E,) int64, zeros allowed.

    Returns:
        (N, M). An expert without tokens gets a gradient of zeros.
    """
    if isinstance(weight, FrozenWeight):
        return frozen_linear(x, weight, tokens_per_expert, grouped_linear)
    if torch.compiler.is_dynamo_compiling():
        found: Tensor = traced_linear.grouped_linear(x, weight, tokens_per_expert)
        return found
    if x.shape[0] and grouped_mm_applies(x, weight):
        offsets = torch.cumsum(tokens_per_expert, 0).to(torch.int32)
        weight = weight if is_aligned(weight) else weight.clone()
        out = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=offsets)
        return _Contiguous.apply(out)  # type: ignore[no-any-return]
    return grouped_linear_loop(x, weight, tokens_per_expert)


def grouped_linear_loop(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """:func:`grouped_linear` as one GEMM per expert; reads the counts on the host."""
    chunks = x.split(counts_on_host(tokens_per_expert))
    # unbind's gradient stacks one slice per expert, zeros for the empty ones.
    return torch.cat([c @ w.T for c, w in zip(chunks, weight.unbind(0), strict=True)])


def put_in_place(
    stacks: Iterable[Tensor | None], rows: tuple[int, ...], own: Iterable[Tensor | None]
) -> None:
    """Overwrites rows of frozen stacks with the trained ones, unseen by autograd.

    It changes nothing between two optimizer steps except where ZeRO 3 has gathered the frozen
    stacks anew, so that what an earlier pass has saved stays right.

    Args:
        stacks: each (E, ...).
        rows: their rows that are trained.
        own: for each stack, what belongs there: (rows, ...).
    """
    for stack, part in zip(stacks, own, strict=True):
        if stack is not None and part is not None and rows:
            stack.data.index_copy_(0, index_of(rows, stack.device), part.data)


class PartlyTrained(NamedTuple):
    """A frozen stack of weights of which single experts are trained, by smaller weights.

    Attributes:
        stack: (E, M, D), frozen.
        own: (rows, M, D) in its dtype, trained.
        rows: where these belong in the stack, ascending; may be empty.
    """

    stack: Tensor
    own: Tensor
    rows: tuple[int, ...]

    def whole(self) -> Tensor:
        """A copy of the stack with the trained rows, differentiable in these."""
        if torch.compiler.is_dynamo_compiling():  # which warns of caches
            rows = torch.tensor(self.rows, dtype=torch.int64, device=self.stack.device)
        else:
            rows = index_of(self.rows, self.stack.device)
        return self.stack.index_copy(0, rows, self.own)


class _PartlyTrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: Tensor, stack: Tensor, counts: Tensor, rows: tuple[int, ...]
    ) -> Tensor:
        put_in_place([stack], rows, [own])
        ctx.save_for_backward(x, own, stack, counts)
        ctx.rows = rows
        offsets = torch.cumsum(counts, 0).to(torch.int32)
        return grouped_product(x.contiguous(), stack.transpose(1, 2), counts, offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, own, stack, counts = ctx.saved_tensors
        wants_x, wants_own, *_ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        if torch.is_grad_enabled():
            found = _differentiable_backward(x, own, stack, counts, ctx.rows, grads[0])
            return found[0] if wants_x else None, found[1] if wants_own else None, None, None, None
        put_in_place([stack], ctx.rows, [own])  # ZeRO 3 has gathered the stack again
        offsets = torch.cumsum(counts, 0).to(torch.int32)
        d_x = grouped_product(grad, stack, counts, offsets) if wants_x else None
        d_own = None
        if wants_own:
            d_own = _weight_gradient(x, grad, stack, counts, offsets, ctx.rows)
        return d_x, d_own, None, None, None


def _weight_gradient(
    x: Tensor,
    grad: Tensor,
    stack: Tensor,
    counts: Tensor,
    offsets: Tensor,
    rows: tuple[int, ...],
) -> Tensor:
    """(rows, M, D), in the layout of the stack: then its parameter needs no transposition."""
    call = LayerCall(x, None, stack, stack, None, None, None, None, counts, offsets, "")
    is_transposed = stack.stride(1) == 1 and stack.stride(2) != 1
    found = TorchProducts().weight_gradient(call, x.contiguous(), grad, not is_transposed, rows)
    return found.transpose(1, 2) if is_transposed else found


def _differentiable_backward(
    x: Tensor, own: Tensor, stack: Tensor, counts: Tensor, rows: tuple[int, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The backward for create_graph=True, through a copy of the stack."""
    inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, own)]

    def compute(x: Tensor, own: Tensor) -> Tensor:
        return grouped_linear(x, PartlyTrained(stack, own, rows).whole(), counts)

    return differentiable_gradients(compute, inputs, grad, (True, True))


def partly_trained_linear(x: Tensor, weight: PartlyTrained, tokens_per_expert: Tensor) -> Tensor:
    """:func:`grouped_linear` that computes the gradients of the trained experts' weights alone.

    The trained rows of the stack are overwritten, not copied, except under ``torch.compile``.

    Args:
        x: (N, D), rows grouped by expert.
        weight: (E, M, D).
        tokens_per_expert: (E,) int64.

    Returns:
        (N, M).
    """
    if torch.compiler.is_dynamo_compiling():
        return grouped_linear(x, weight.whole(), tokens_per_expert)
    stack, own, rows = weight
    out: Tensor = _PartlyTrainedLinear.apply(x, own, stack, tokens_per_expert, rows)
    return out
