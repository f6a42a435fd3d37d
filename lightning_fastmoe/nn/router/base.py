"""What a router returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """The choice of experts for T tokens.

    A named tuple, as ZeRO 3 looks for the tensors in a module's output to know when the module's
    backward pass begins, and it looks into tuples but not into dataclasses.

    Attributes:
        logits: (T, E) fp32, raw.
        scores: (T, E) fp32, after softmax.
        weights: (T, K) fp32, used to combine; differentiable with respect to the router.
        expert_ids: (T, K) int64, global expert ids.
    """

    logits: Tensor
    scores: Tensor
    weights: Tensor
    expert_ids: Tensor
