"""Schedules run tokens through their experts: the interface, and the simple ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError, ShapeError, UnmanagedExpertsError
from lightning_fastmoe.nn.dispatch import Dispatcher, LocalDispatcher
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.router import Routing

Back = Callable[[Tensor], Sequence[Tensor | None]]
"""From the output's gradient to those of the inputs that were wanted; may be called again."""


class Schedule:
    """The order of dispatch, expert computation and combine. Owns no parameters: not a module.

    A layer doesn't know which schedule it has: all give the same outputs and gradients as
    :class:`LocalSchedule` with all experts on one rank. A subclass defines :meth:`run_routed`; one
    that overlaps the shared expert with something else overrides :meth:`run`.

    Attributes:
        dispatcher: how rows cross ranks.
    """

    dispatcher: Dispatcher

    def run(
        self,
        inputs: TokenInputs,
        routing: Routing,
        experts: Experts,
        shared_expert: nn.Module | None,
        layer: str,
    ) -> tuple[Any, Routing]:
        """Applies routed and shared experts.

        Args:
            inputs: T tokens, in the dtype of the GEMMs.
            routing: the routing of these tokens, in any of its three forms.
            experts: the experts of this rank.
            shared_expert: applied to every token; its output is added.
            layer: the layer's name, for errors and to detect ranks in different layers.

        Returns:
            The outputs, a tensor ``(T, D)`` or what experts that are modules return; and the
            routing, with its counts if the schedule computed them.

        Raises:
            ConfigError: if the input is a structure of tensors, and the experts or the routing
                take one tensor.
            ShapeError: if experts that are modules return tensors that aren't floating-point.
        """
        if routing.dispatch_mix is not None:
            y, routing = self._run_mixed(inputs, routing, experts, layer)
        else:
            y, routing = self.run_routed(inputs, routing, experts, layer)
        if shared_expert is None:
            return y, routing
        if not isinstance(y, Tensor):
            raise ConfigError(
                f"{layer}: shared_expert adds to one tensor, but the experts return a structure."
                " Drop it."
            )
        return y + shared_expert(inputs.tokens), routing

    def run_routed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """Applies the routed experts, for token choice and expert choice; see :meth:`run`."""
        raise NotImplementedError

    def run_by_hand(
        self,
        tensors: Sequence[Tensor | None],
        expert_ids: Tensor,
        dispatched: Tensor | None,
        activation: str,
        layer: str,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Back | None] | None:
        """The routed experts of token choice without autograd, for operators of compiled graphs.

        Args:
            tensors: x (T, D), weights (T, K) and the stacks of this rank's experts.
            expert_ids: (T, K) int64.
            dispatched: (T, K) bool, the slots that reach an expert; None for all.
            activation: the experts'.
            layer: the layer's name.
            wanted: the tensors whose gradients a backward pass may ask for.

        Returns:
            The output (T, D); (E,) int64, this rank's pairs of each expert, of those that reach it;
            and what gives the gradients of the tensors that are wanted, if any are. Or None where
            autograd has to record the pass.
        """
        return None

    def _run_mixed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """Runs soft routing: mixes tokens into rows and routes the rows as in token choice."""
        if len(inputs.leaves) > 1:
            raise ConfigError(
                f"{layer}: soft routing mixes the tokens of one tensor, but the input is a"
                f" structure of {len(inputs.leaves)}. Choose another router."
            )
        dispatch, combine = routing.dispatch_mix, routing.combine_mix
        assert dispatch is not None
        assert combine is not None
        x = inputs.tokens
        groups, slots, n = dispatch.shape
        acc = torch.promote_types(x.dtype, dispatch.dtype)
        mixed = dispatch.to(acc) @ x.reshape(groups, n, x.shape[1]).to(acc)
        rows = inputs.with_leaves([mixed.flatten(0, 1).to(x.dtype)])
        plain = routing._replace(dispatch_mix=None, combine_mix=None)
        y, plain = self.run_routed(rows, plain, experts, layer)

        def back(leaf: Tensor) -> Tensor:
            rows = leaf.reshape(groups, slots, math.prod(leaf.shape[1:])).to(acc)
            return (combine.to(acc) @ rows).view(groups * n, *leaf.shape[1:]).to(leaf.dtype)

        return pytree.tree_map(back, y), plain._replace(dispatch_mix=dispatch, combine_mix=combine)


class SequentialSchedule(Schedule):
    """Dispatch, compute, combine, one after the other.

    Args:
        dispatcher: how rows reach the ranks of their experts.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher

    def run_routed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """See :class:`Schedule`."""
        if experts.is_stacked and inputs.spec is not None:
            raise ConfigError(
                f"{layer} got a structure of tensors, but its experts are FFNs. Use"
                " MoE(expert=...) with modules that take it."
            )
        first, counts, handle = self.dispatcher.dispatch(inputs.tokens, routing, layer)
        rows = [first, *(self._send(leaf, handle) for leaf in inputs.leaves[1:])]
        outputs = experts(inputs.structure(rows), counts)
        return pytree.tree_map(lambda y: self._combine(y, handle, layer), outputs), routing

    def _send(self, leaf: Tensor, handle: Any) -> Tensor:
        """``leaf (T, ...) -> (N, ...)``. Bools are sent as bytes."""
        flat = leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1)
        plain = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
        sent = self.dispatcher.send(plain, handle).to(leaf.dtype)
        return sent.view(sent.shape[0], *leaf.shape[1:])

    def _combine(self, y: Tensor, handle: Any, layer: str) -> Tensor:
        """``y (N, ...) -> (T, ...)``, each token's weighted sum."""
        if not y.is_floating_point():
            raise ShapeError(
                f"{layer}: an expert returned a tensor of {y.dtype}. Outputs are summed with"
                " weights, so they must have a floating dtype."
            )
        flat = y.flatten(1) if y.dim() > 1 else y.unsqueeze(1)
        total = self.dispatcher.combine(flat, handle)
        return total.view(total.shape[0], *y.shape[1:])


class LocalSchedule(SequentialSchedule):
    """The schedule when all experts are on this rank; stacked ones run in one fused operation.

    Args:
        num_experts: experts of the layer, E.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__(LocalDispatcher(num_experts))
        self.num_experts = num_experts

    def run_routed(
        self, inputs: TokenInputs, routing: Routing, experts: Experts, layer: str
    ) -> tuple[Any, Routing]:
        """See :class:`Schedule`. No host synchronisation for stacked experts and token choice.

        Raises:
            UnmanagedExpertsError: if other ranks hold some of the experts.
        """
        check_all_are_here(experts, layer)
        if not experts.is_stacked or inputs.spec is not None or routing.token_ids is not None:
            return super().run_routed(inputs, routing, experts, layer)
        # Dropped slots are computed with weight zero: sizes don't depend on the data, so nothing
        # needs to be read from the device.
        order = ops.order_by_expert(routing.expert_ids, self.num_experts)
        weights = routing.weights
        if routing.dispatched is None:
            routing = routing._replace(tokens_per_expert=order.tokens_per_expert)
        else:
            weights = weights.masked_fill(~routing.dispatched, 0.0)
        return experts(inputs.tokens, order.tokens_per_expert, weights, order), routing


class UnmanagedSchedule(Schedule):
    """Refuses to run, because no strategy manages the layer's sharded experts.

    Used by a layer whose ``dispatcher`` needs other ranks until a strategy connects it to them, and
    by a layer with sharded experts after the run that sharded them.

    Args:
        dispatcher: the dispatcher that the schedule exposes but doesn't use.
        name: what ``MoE(dispatcher=...)`` was given.
    """

    def __init__(self, dispatcher: Dispatcher, name: str) -> None:
        self.dispatcher, self.name = dispatcher, name

    def run(
        self,
        inputs: TokenInputs,
        routing: Routing,
        experts: Experts,
        shared_expert: nn.Module | None,
        layer: str,
    ) -> tuple[Any, Routing]:
        """Raises:
        UnmanagedExpertsError: naming the layer.
        """
        check_all_are_here(experts, layer)
        raise UnmanagedExpertsError(
            f"{layer}: dispatcher={self.name!r} exchanges tokens between ranks, but no"
            " expert parallel group was set up. Train with FastMoEStrategy, wrap the model in"
            " ExpertDataParallel in a plain loop, or use dispatcher='auto'."
        )


def check_all_are_here(experts: Experts, layer: str) -> None:
    """Raises:
    UnmanagedExpertsError: if other ranks hold some of the layer's experts.
    """
    if experts.num_local_experts != experts.num_experts:
        raise UnmanagedExpertsError(
            f"{layer} holds {experts.num_local_experts} of {experts.num_experts} experts,"
            " and only FastMoEStrategy reaches the others, or ExpertDataParallel in a plain loop."
            " After a run, use the Trainer's predict(), strategy.on_each_rank(function), or a new"
            " model with the weights of a checkpoint. Rebuild the model to train all experts on"
            " each rank."
        )
