"""What a MoE layer checks in each forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import NonFiniteError, ShapeError, UnmanagedExpertsError
from lightning_fastmoe.nn.dispatcher import LocalDispatcher
from lightning_fastmoe.nn.router import Routing

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


def check_routing(layer: MoE, routing: Any, num_tokens: int) -> None:
    """Refuses what a router of the user's own must not return; ids are looked at on the CPU alone.

    Raises:
        ShapeError: naming the field and what it should be.
    """
    name = f"{layer.layer_name}: {type(layer.router).__name__}"
    if not isinstance(routing, Routing):
        raise ShapeError(f"{name} returned a {type(routing).__name__}. It must return a Routing.")
    experts = layer.num_experts
    ids, soft = routing.expert_ids, routing.dispatch_mix is not None
    wanted: dict[str, tuple[Any, Any]] = {
        "logits": (tuple(routing.logits.shape), (num_tokens, experts)),
        "scores": (tuple(routing.scores.shape), (num_tokens, experts)),
        "weights": (tuple(routing.weights.shape), tuple(ids.shape)),
        "dtype of expert_ids": (ids.dtype, torch.int64),
        "dimensions of expert_ids": (ids.dim(), 2 if routing.token_ids is None else 1),
    }
    if routing.token_ids is not None:
        wanted["token_ids"] = (tuple(routing.token_ids.shape), tuple(ids.shape))
    elif not soft:
        wanted["rows of expert_ids"] = (ids.shape[0], num_tokens)
    for field, (found, expected) in wanted.items():
        if found != expected:
            raise ShapeError(f"{name} returned {field} = {found}; it must be {expected}.")
    for field, values, limit in (
        ("expert_ids", ids, experts),
        ("token_ids", routing.token_ids, num_tokens),
    ):
        if values is None or values.device.type != "cpu" or not values.numel():
            continue
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            raise ShapeError(
                f"{name} returned {field} from {low} to {high}; they must be in [0, {limit})."
            )
