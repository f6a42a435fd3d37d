"""What a MoE layer checks in each forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fastmoe.errors import NonFiniteError, UnmanagedExpertsError
from lightning_fastmoe.nn.dispatcher import LocalDispatcher

if TYPE_CHECKING:
    from lightning_fastmoe.nn.moe import MoE


def check_finite(layer: MoE, logits: Tensor) -> None:
    """Looks for NaN and Inf in a router's logits, as the layer's policy says.

    Raises:
        NonFiniteError: on the CPU, under the policy "raise".
    """
    if layer.nonfinite_policy == "ignore":
        return
    # Any NaN or Inf makes this sum non-finite; one scalar per pass, no host sync by itlayer.
    bad = ~torch.isfinite(logits.detach()).all()
    if layer.nonfinite_policy == "collect":
        if layer.training:
            layer.nonfinite = bad if layer.nonfinite is None else layer.nonfinite | bad
    elif logits.device.type == "cpu" and bool(bad):
        # On CUDA reading the flag would stall the stream; there the strategy collects it.
        raise NonFiniteError(
            f"{layer.layer_name}: the router's logits hold NaN or Inf, so its input does, or its"
            " weights do. Lower the learning rate or look for the bad batch; set the layer's"
            " nonfinite_policy='ignore' to let it pass."
        )


def check_managed(layer: MoE) -> None:
    """Refuses to run experts that are spread over ranks if nobody knows how to train them.

    Raises:
        UnmanagedExpertsError: naming the layer.
    """
    if layer.dispatcher_name == "all_to_all" and isinstance(layer.dispatcher, LocalDispatcher):
        raise UnmanagedExpertsError(
            f"{layer.layer_name}: dispatcher='all_to_all' exchanges tokens between ranks, but no"
            " expert parallel group was set up. Train with FastMoEStrategy, or use"
            " dispatcher='auto'."
        )
    if layer.is_spread and not layer.managed:
        raise UnmanagedExpertsError(
            f"{layer.layer_name} holds {layer.num_local_experts} of {layer.num_experts} experts,"
            " but the strategy that runs it knows nothing of experts: their gradients would be"
            " wrong and other experts unreachable. Use FastMoEStrategy, or build the model anew"
            " to train all experts on each rank."
        )
