"""From tokens and a routing to the experts' weighted outputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.nn.dispatcher import Dispatcher, LocalDispatcher
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.module_experts import ModuleExperts
from lightning_fastmoe.nn.router.base import Routing


def run_stacked(
    x: Tensor, routing: Routing, experts: Experts, dispatcher: Dispatcher, layer: str
) -> tuple[Tensor, Routing]:
    """``x (T, D)`` through stacked experts -> (T, D), and the routing with its counts if known."""
    if routing.dispatch_mix is not None:
        return _mixed(x, routing, lambda rows, r: run_stacked(rows, r, experts, dispatcher, layer))
    if type(dispatcher) is LocalDispatcher and routing.token_ids is None:
        # Nothing crosses ranks, so one step with one backward does what the three below do. A slot
        # that reaches no expert has weight zero: the sizes stay what they are, without a host sync.
        order = ops.order_by_expert(routing.expert_ids, dispatcher.num_experts)
        weights = routing.weights
        if routing.dispatched is None:
            routing = routing._replace(tokens_per_expert=order.tokens_per_expert)
        else:
            weights = weights.masked_fill(~routing.dispatched, 0.0)
        return experts(x, order.tokens_per_expert, weights, order), routing
    rows, counts, handle = dispatcher.dispatch(x, routing, layer)
    return dispatcher.combine(experts(rows, counts), handle), routing


def run_modules(
    leaves: list[Tensor],
    spec: Any,
    routing: Routing,
    experts: ModuleExperts,
    dispatcher: Dispatcher,
    layer: str,
) -> tuple[Any, Routing]:
    """A structure of tensors ``(T, ...)`` through experts that are modules -> what they return.

    Raises:
        ConfigError: for soft routing of more than one tensor.
        ShapeError: if the experts return tensors that can't be summed with weights.
    """
    if routing.dispatch_mix is not None:
        if len(leaves) > 1:
            raise ConfigError(
                f"{layer}: soft routing mixes the tokens of one tensor, but the input is a"
                f" structure of {len(leaves)}. Choose another router."
            )
        return _mixed(
            leaves[0],
            routing,
            lambda rows, r: run_modules([rows], spec, r, experts, dispatcher, layer),
        )
    first, counts, handle = dispatcher.dispatch(leaves[0], routing, layer)
    rows = [first]
    for leaf in leaves[1:]:
        # Bools don't travel; bytes do.
        flat = leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1)
        plain = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
        sent = dispatcher.send(plain, handle).to(leaf.dtype)
        rows.append(sent.view(sent.shape[0], *leaf.shape[1:]))
    outputs = experts(rows[0] if spec is None else pytree.tree_unflatten(rows, spec), counts)

    def combine(y: Tensor) -> Tensor:
        if not y.is_floating_point():
            raise ShapeError(
                f"{layer}: an expert returned a tensor of {y.dtype}. Outputs are summed with"
                " weights, so they must have a floating dtype."
            )
        flat = y.flatten(1) if y.dim() > 1 else y.unsqueeze(1)
        total = dispatcher.combine(flat, handle)
        return total.view(total.shape[0], *y.shape[1:])

    return pytree.tree_map(combine, outputs), routing


def _mixed(x: Tensor, routing: Routing, run: Any) -> tuple[Any, Routing]:
    """Soft routing: token choice among the slots that the tokens are mixed into."""
    dispatch, combine = routing.dispatch_mix, routing.combine_mix
    assert dispatch is not None
    assert combine is not None
    groups, slots, n = dispatch.shape
    acc = torch.promote_types(x.dtype, dispatch.dtype)
    mixed = dispatch.to(acc) @ x.reshape(groups, n, x.shape[1]).to(acc)
    plain = routing._replace(dispatch_mix=None, combine_mix=None)
    y, plain = run(mixed.flatten(0, 1).to(x.dtype), plain)

    def back(leaf: Tensor) -> Tensor:
        rows = leaf.reshape(groups, slots, math.prod(leaf.shape[1:])).to(acc)
        return (combine.to(acc) @ rows).view(groups * n, *leaf.shape[1:]).to(leaf.dtype)

    mixes = {"dispatch_mix": dispatch, "combine_mix": combine}
    return pytree.tree_map(back, y), plain._replace(**mixes)
