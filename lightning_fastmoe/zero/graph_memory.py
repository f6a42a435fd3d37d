"""Gradients of an unfinished accumulation, out of the memory of CUDA graphs.

What a CUDA graph returns, gradients included, is overwritten when the graph is launched again.
autograd and ZeRO keep a gradient where it is, and add the next micro-batch's to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_KEPT = "_is_outside_of_cuda_graphs"


def begin_graphs(zero: Any, parameters: Iterable[nn.Parameter], *, has_gradients: bool) -> None:
    """Tells CUDA graphs that a pass begins, and that they may use their memory again.

    Args:
        zero: DeepSpeed's optimizer; None if nothing is trained.
        parameters: of the model.
        has_gradients: whether gradients wait for the next micro-batch's.
    """
    if not _are_there_graphs():
        return
    if has_gradients and zero is not None:
        groups: dict[int, list[Tensor] | None] = getattr(zero, "all_grad_tensors", {})
        for i, gradients in groups.items():
            if gradients is not None:
                groups[i] = [_kept(gradient) for gradient in gradients]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = _kept(parameter.grad)
    torch.compiler.cudagraph_mark_step_begin()


def _kept(gradient: Tensor) -> Tensor:
    """A copy; itself, if it is one already."""
    if hasattr(gradient, _KEPT):
        return gradient
    copy = gradient.clone()
    setattr(copy, _KEPT, True)
    return copy


def _are_there_graphs() -> bool:
    """Whether any may have been recorded; to ask torch would import its compiler."""
    return "torch._inductor.cudagraph_trees" in sys.modules
