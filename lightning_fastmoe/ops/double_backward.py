"""Backward passes that are differentiated again (``create_graph=True``), through slow twins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    compute: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of a function's inputs, with a graph.

    The inputs that an autograd function has saved may depend on one another, as a router's weights
    do on the tokens. What is asked for is the gradient of each with the others held fixed: the way
    from one to the other is differentiated by the rest of the backward pass. So they are
    differentiated through names of their own.

    Args:
        compute: called with the inputs; differentiable.
        inputs: n of them.
        grad: the gradient of its result.
        wanted: n flags.

    Returns:
        n gradients, None where none is wanted.
    """
    apart = [t if t is None or not t.requires_grad else t.view_as(t) for t in inputs]
    pairs = zip(apart, wanted, strict=True)
    leaves = [t for t, needed in pairs if needed and t is not None]
    found = iter(torch.autograd.grad(compute(*apart), leaves, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in wanted)
