"""Adam's step for a flat partition of ZeRO: one CUDA kernel, or torch's fused step as its twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from lightning_fastmoe.ops.native import native


@dataclass(frozen=True)
class AdamOptions:
    """The options of :class:`torch.optim.Adam` that a step uses.

    Attributes:
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: its coefficient.
        decoupled: whether weights decay as in AdamW (Loshchilov and Hutter 2019), not through the
            gradient.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool


@torch.no_grad()
def adam_step(
    gradients: Sequence[Tensor],
    master: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    weights: Tensor,
    step: Tensor,
    options: AdamOptions,
    scale: Tensor | None = None,
    blocked: Tensor | None = None,
) -> None:
    """Updates a partition of N parameters (Kingma and Ba 2015).

    The kernel reads each gradient where autograd left it and moves 28 bytes per parameter with bf16
    gradients and weights. Its twin first joins the gradients in fp32.

    Args:
        gradients: together N elements, in the partition's order; all of them fp32, or all in the
            dtype of ``weights``.
        master: (N,) fp32, updated.
        mean: (N,) fp32, the first moment, updated.
        mean_square: (N,) fp32, the second moment, updated.
        weights: (N,), the model's own weights: set to the updated master weights, rounded.
        step: scalar in fp32, this step's number, from 1.
        options: the optimizer's.
        scale: scalar in fp32 that divides the gradients; None is one.
        blocked: scalar in int64: unless zero, nothing is updated; None is zero.
    """
    beta1, beta2 = options.betas
    parts = [g.contiguous() for g in gradients]
    if (library := native(*parts, master, mean, mean_square, weights, step)) is not None:
        library.adam_step_(
            parts,
            master,
            mean,
            mean_square,
            weights,
            step,
            scale,
            blocked,
            options.lr,
            beta1,
            beta2,
            options.eps,
            options.weight_decay,
            options.decoupled,
        )
        return
    if blocked is not None and blocked.item():
        return
    joined = torch.empty_like(master)
    pieces = joined.split([g.numel() for g in parts])
    torch._foreach_copy_(list(pieces), [g.view(-1) for g in parts])
    (adamw if options.decoupled else adam)(
        [master],
        [joined],
        [mean],
        [mean_square],
        [],
        [step - 1],  # torch counts it
        fused=True,
        grad_scale=scale,
        found_inf=None if scale is None else torch.zeros_like(scale),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=options.lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )
    weights.copy_(master)
