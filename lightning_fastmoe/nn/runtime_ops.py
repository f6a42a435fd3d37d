"""What a layer inside a compiled graph must find out when the graph runs, as operators.

Whether activation checkpointing is replaying a pass, how the training loop scales the loss, whether
logits are finite and how many tokens there are differ between runs of one graph, so tracing must
not decide them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import NonFiniteError
from lightning_fastmoe.nn.attached_loss import is_recomputing
from lightning_fastmoe.nn.capacity import limit_by_capacity
from lightning_fastmoe.nn.global_batch import LocalBatch
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.ops.operator import differentiate, fake_of, operator

NAMESPACE = "lightning_fastmoe_runtime"

ON_HOST = (torch.Tag.cudagraph_unsafe,)
"""Of operators that read on the host what differs between runs: a replayed CUDA graph would not."""


@operator(f"{NAMESPACE}::scale_for")
def scale_for(grad: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """The gradient that an attached loss starts with, at the time when ``grad`` passes through.

    Args:
        grad: the gradient of the layer's output. Only its existence counts: ``factor`` is written
            earlier in the same backward pass, so reading it must not move ahead of ``grad``.
        factor: :attr:`~lightning_fastmoe.nn.attached_loss.LossScale.factor`, (1,).
        like: a scalar of the loss's dtype and device.
    """
    return factor.detach().reshape(()).to(device=like.device, dtype=like.dtype, copy=True)


@fake_of(scale_for)
def _(grad: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op(f"{NAMESPACE}::add_load", mutates_args=("load",), tags=ON_HOST)
def add_load(load: Tensor, counts: Tensor) -> None:
    """Adds ``counts (E,)`` to ``load (E,)``, unless a backward pass is replaying a forward pass."""
    if not is_recomputing():
        load += counts


@add_load.register_fake
def _(load: Tensor, counts: Tensor) -> None:
    pass


@operator(f"{NAMESPACE}::checked", tags=ON_HOST)
def checked(weights: Tensor, logits: Tensor) -> Tensor:
    """A copy of ``weights (T, K)``; the experts use it, so a compiler can't drop the check.

    Raises:
        NonFiniteError: if the router's ``logits (T, E)`` contain NaN or Inf.
    """
    if logits.numel() and not torch.linalg.vector_norm(logits, torch.inf).isfinite():
        raise NonFiniteError(
            "A MoE layer inside a compiled graph: the router's logits contain NaN or Inf, so its"
            " input or its weights do. Lower the learning rate or look for the bad batch; run"
            " without torch.compile to see the layer's name; set its nonfinite_policy='ignore' to"
            " continue anyway."
        )
    return weights.clone(memory_format=torch.contiguous_format)


@fake_of(checked)
def _(weights: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


def _pass_on(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


differentiate(checked, _pass_on)


@operator(f"{NAMESPACE}::within_capacity", tags=ON_HOST)
def within_capacity(
    expert_ids: Tensor, active: Tensor | None, scores: Tensor, factor: Tensor, over: str, by: str
) -> Tensor:
    """(T, K) bool: the pairs for which their experts, all on this rank, have room.

    At run time, because the capacity is a product of floats rounded up: a compiler that multiplies
    a symbolic T in another order may get another integer. For the arguments see
    :func:`~lightning_fastmoe.nn.capacity.limit_by_capacity`; ``factor`` is (1,) on the CPU.
    """
    routing = Routing(scores, scores, scores, expert_ids, active)
    limited = limit_by_capacity(
        routing, float(factor), over=over, by=by, batch=LocalBatch(), layer="MoE"
    )
    assert limited.kept is not None
    return limited.kept.contiguous()


@fake_of(within_capacity)
def _(expert_ids: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(expert_ids, dtype=torch.bool, memory_format=torch.contiguous_format)


class _Attach(torch.autograd.Function):
    """:func:`~lightning_fastmoe.nn.attached_loss.attach` as dynamo can trace it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, total: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor, total)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor, total = ctx.saved_tensors
        return grads[0], scale_for(grads[0], factor, total), None


def attach_total(y: Tensor, total: Tensor, factor: Tensor) -> Tensor:
    """Returns ``y``; its backward pass also starts that of ``total``, times ``factor`` by then."""
    return _Attach.apply(y, total, factor)  # type: ignore[no-any-return]
