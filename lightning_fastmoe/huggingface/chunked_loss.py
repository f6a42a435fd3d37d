"""The loss of a linear layer's logits, a chunk of positions at a time.

The gradients are computed in the forward pass, from the logits of a chunk while they exist: so none
are kept, and none are computed again. Liger's and torch 2.13's linear cross-entropies do this, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fastmoe.huggingface.batch import IGNORED
from lightning_fastmoe.ops.double_backward import differentiable_gradients


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, compiles: bool
) -> Tensor:
    """The sum of the cross-entropies of ``x @ weight.T + bias`` in nats.

    Gradients are those of the logits rounded to their dtype, summed over the chunks in the dtype of
    the weight. Not for fp16: its gradients must be scaled before they are rounded.

    Args:
        x: (N, d_model).
        weight: (vocab_size, d_model).
        bias: (vocab_size,), or None.
        targets: (N,) int64, -100 for positions that don't count.
        rows: the positions of a chunk.
        compiles: whether ``torch.compile`` makes what happens to a chunk's logits one kernel, on
            CUDA.

    Returns:
        A scalar in fp32, or in fp64 if ``x`` is.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(
        x, weight, bias, targets, rows, compiles, torch.is_grad_enabled()
    )
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        compiles: bool,
        wants_gradients: bool,
    ) -> Tensor:
        wanted = [wants_gradients and wants for wants in ctx.needs_input_grad[:3]]
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        of_x, of_weight, of_bias = (
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            if wants and t is not None
            else None
            for t, wants in zip((x, weight, bias), wanted, strict=True)
        )
        with torch.autocast(kind, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for begin in range(0, len(x), rows):
                part = slice(begin, begin + rows)
                hidden, wants = x[part].to(dtype), targets[part]
                logits = F.linear(hidden, w, b)
                if not any(wanted):
                    total += _losses(logits.to(total.dtype), wants)
                    continue
                loss, gradient = _loss_and_gradient(logits, wants, compiles)
                del logits
                total += loss
                if of_x is not None:
                    of_x[part] = gradient @ w
                if of_weight is not None:
                    _add_product(of_weight, gradient.T, hidden)
                if of_bias is not None:
                    of_bias += gradient.sum(0, dtype=total.dtype).to(of_bias.dtype)
                del gradient  # before the next chunk's logits
        ctx.save_for_backward(x, weight, bias, targets, of_x, of_weight, of_bias)
        ctx.dtype = dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = ctx.needs_input_grad[:3]

            def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return _whole(x, weight, bias, targets, ctx.dtype)

            found = differentiable_gradients(compute, (x, weight, bias), grad, wanted)
            return (*found, *(None,) * 4)
        # Multiplied by a number that is on the device, which changes no dtype.
        return (*(None if g is None else g * grad for g in gradients), *(None,) * 4)


def _whole(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same from all logits at once, differentiable any number of times."""
    b = None if bias is None else bias.to(dtype)
    logits = F.linear(x.to(dtype), weight.to(dtype), b)
    return _losses(logits.to(torch.promote_types(x.dtype, torch.float32)), targets)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _loss_and_gradient(logits: Tensor, targets: Tensor, compiles: bool) -> tuple[Tensor, Tensor]:
    """A chunk's loss, a scalar, and the gradient of its logits in their dtype.

    Args:
        logits: (n, vocab_size); overwritten.
        targets: (n,) int64.
        compiles: whether by one kernel on CUDA.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if compiles and logits.is_cuda:
        for tensor in (logits, targets):  # the last chunk is shorter
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        loss, gradient = _compiled()(logits, targets)
        return loss, gradient
    log_softmax = torch.log_softmax(logits, 1, dtype=wide)
    loss = F.nll_loss(log_softmax, targets, ignore_index=IGNORED, reduction="sum")
    counted = (targets != IGNORED)[:, None]
    gradient = log_softmax.exp_().masked_fill_(~counted, 0)
    gradient.scatter_add_(1, targets.clamp(min=0)[:, None], -counted.to(wide))
    return loss, logits.copy_(gradient)


def _in_one_pass(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_loss_and_gradient` computes, by operators that a compiler joins."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = torch.logsumexp(wide, 1, keepdim=True)
    counted = (targets != IGNORED)[:, None]
    own = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    chosen = wide.gather(1, targets.clamp(min=0)[:, None])
    loss = torch.where(counted, total - chosen, 0).sum()
    gradient = torch.where(counted, (wide - total).exp() - own.to(wide.dtype), 0)
    return loss, gradient.to(logits.dtype)


@cache
def _compiled() -> Any:
    return torch.compile(_in_one_pass)


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """``to += a @ b``, rounded once if the three have one dtype or, on CUDA, ``to`` is in fp32."""
    if to.dtype == a.dtype:
        to.addmm_(a, b)
    elif to.is_cuda:
        to += torch.mm(a, b, out_dtype=to.dtype)
    else:
        to += a.to(to.dtype) @ b.to(to.dtype)
