"""The layer's forward pass as ``torch.compile(..., fullgraph=True)`` traces it.

Without ``fullgraph=True`` a layer is opaque to the compiler, which breaks its graph there. With it,
where a break would be an error, dynamo traces :func:`forward` instead: the steps of
:class:`~lightning_fastmoe.nn.MoE`; and after :func:`~lightning_fastmoe.nn.trace_layers`, where it
can. Experts that are sharded over ranks are one operator in the
graph (:mod:`~lightning_fastmoe.nn.opaque`). What isn't covered is refused while being traced, and
dynamo's error quotes the reason.

A graph is guarded by what was read while tracing. So nothing here reads what differs between the
layers of a model, such as names, seeds and the identity of objects: they are to share one graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from lightning_fastmoe import ops
from lightning_fastmoe.nn.experts.grouped import groups_of
from lightning_fastmoe.nn.experts.lora import SCALE
from lightning_fastmoe.nn.experts.trained import trained_of
from lightning_fastmoe.nn.global_batch import LocalBatch
from lightning_fastmoe.nn.hooks import has_watched_hooks
from lightning_fastmoe.nn.inputs import read_inputs
from lightning_fastmoe.nn.opaque import observe, routed_experts
from lightning_fastmoe.nn.router import ROUTERS, Routing, RoutingContext
from lightning_fastmoe.nn.runtime_ops import add_load, within_capacity
from lightning_fastmoe.nn.schedule import LocalSchedule, UnmanagedSchedule

DEVICES = ("cpu", "cuda")
"""Where layers are traced; elsewhere ``fullgraph=True`` is refused, as nothing has checked it."""

_NAME, _BATCH = "MoE", LocalBatch()


def applies(layer: Any, x: Any, mask: Tensor | None) -> bool:
    """Whether dynamo traces this pass of a layer, or says why it can't."""
    if is_fullgraph():
        return True
    # A graph would compute the weight gradients of all experts, which is not what was asked for.
    asked = layer.is_traced and trained_of(layer.experts) is None
    return asked and _obstacle(layer, x, mask) is None


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def is_fullgraph() -> bool:
    """Whether the frame that dynamo is tracing may have no graph break. Call it only then."""
    tracer = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    # By getattr: where a version of torch lacks one, the layer is opaque as without fullgraph=True.
    names = ("one_graph", "error_on_graph_break")
    return any(getattr(tracer, name, False) for name in names)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def runs_again() -> bool:
    """Whether a compiler may run operators again in the backward pass, to save memory."""
    return bool(functorch.activation_memory_budget < 1)


def forward(
    layer: Any,
    x: Any,
    mask: Tensor | None,
    token_ids: Tensor | None,
    sequence_ids: Tensor | None,
) -> Tensor:
    """The forward pass of ``layer``, a :class:`~lightning_fastmoe.nn.MoE`.

    Args:
        layer: the layer.
        x: (..., D).
        mask: None, or else refused.
        token_ids: see :meth:`MoE.forward`.
        sequence_ids: see :meth:`MoE.forward`.

    Returns:
        (..., D) in the dtype of ``x``.
    """
    if (reason := _obstacle(layer, x, mask)) is not None:
        torch._dynamo.graph_break(msg=f"MoE can't be traced: {reason}.")
    router, training = layer.router, layer.training
    inputs = read_inputs(x, layer.d_model, _NAME, token_ids=token_ids, sequence_ids=sequence_ids)
    context = RoutingContext(
        training=training,
        grid=inputs.grid,
        sequence_ids=inputs.sequence_ids,
        token_ids=inputs.token_ids,
        batch=_BATCH,
        layer=_NAME,
    )
    routing = router(inputs.tokens, context)
    weights = layer.nonfinite.look_in_graph(routing.weights, routing.logits, training=training)
    routing = routing._replace(weights=weights)
    phase = 0 if training else 1  # dynamo of torch 2.11 takes no bool as an index
    if layer.capacity.is_limited[phase]:
        factor = layer.capacity.in_graphs[phase]
        rule = (factor, layer.capacity.over, layer.capacity.drop_by)
        kept = within_capacity(routing.expert_ids, routing.active, routing.scores.detach(), *rule)
        routing = routing._replace(kept=kept)
    inputs = inputs.to(layer.experts.compute_dtype(x))
    if type(layer.schedule) is LocalSchedule:
        y, routing = layer.schedule.run(inputs, routing, layer.experts, layer.shared_expert, _NAME)
    else:
        y, routing = _run_across_ranks(layer, inputs.tokens, routing)
    y = y.to(x.dtype)
    if training:
        y = layer.balancing.attach_in_graph(y, routing, context, router.losses)
        if router.load_since_update is not None:
            add_load(router.load_since_update, routing.routed_counts())
    if len(layer._observers) > 0:  # dynamo guards a dict's length, but not its truth
        _observe(layer, routing)
    out: Tensor = y.reshape(x.shape)
    return out


def _observe(layer: Any, routing: Routing) -> None:
    """Shows the routing to the layer's observers when the graph runs."""
    seen = (routing.logits, routing.scores, routing.weights)
    observe(
        *(layer.reference.observed, layer.reference.handle, *(t.detach() for t in seen)),
        *(routing.expert_ids, routing.active, routing.kept, routing.tokens_per_expert),
    )


def _run_across_ranks(layer: Any, x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """What :meth:`Schedule.run` does, for ``x (T, D)``."""
    stacks = layer.experts.stacks(x.dtype)
    given = (x, routing.weights, *stacks)
    records = torch.is_grad_enabled()
    y, counts, _ = routed_experts(
        *(layer.reference.handle, x, routing.weights, *stacks),
        *(routing.expert_ids, routing.dispatched, layer.num_experts),
        [records and t is not None and t.requires_grad for t in given],
    )
    if routing.dispatched is None:
        routing = routing._replace(tokens_per_expert=counts)
    if layer.shared_expert is not None:
        y = y + layer.shared_expert(x)
    return y, routing


def _obstacle(layer: Any, x: Any, mask: Tensor | None) -> str | None:
    """Why this pass can't be traced, or None."""
    router, experts, is_local = layer.router, layer.experts, type(layer.schedule) is LocalSchedule
    if not isinstance(x, Tensor):
        return "its input is a structure of tensors"
    if x.device.type not in DEVICES:
        return f"fullgraph=True is not supported on {x.device.type}"
    if mask is not None:
        return "mask= makes the number of tokens depend on data"
    if isinstance(layer.schedule, UnmanagedSchedule):
        return "no strategy has connected it to the ranks of its other experts"
    if not experts.is_stacked or experts.activation not in ops.ACTIVATIONS:
        return "its experts are modules, or their activation has no fused backward"
    if getattr(experts, SCALE, None) is not None:
        return "its experts have adapters"
    if not is_local and (trained_of(experts) is not None or groups_of(experts) is not None):
        return "only single experts are trained, or its experts are computed in groups"
    if not is_local and runs_again():
        return (
            "activation_memory_budget makes a compiler run the exchange of tokens again in the"
            " backward pass, on each rank in an order of its own; leave it at 1, and put activation"
            " checkpointing around the blocks"
        )
    if type(router) not in ROUTERS.values():
        return "its router comes from outside the package"
    if not router.traceable:
        return "its router draws random numbers, or doesn't choose K experts per token"
    if type(layer.batch) is not LocalBatch and (
        router.uses_batch or layer.capacity.uses_batch or layer.balancing.use_batch
    ):
        return "it exchanges counts with other ranks"
    if len(layer._observers) > 0 and getattr(layer, "reference", None) is None:
        return "observers look at its routing, and no strategy runs it"
    has_watched_hooks(layer)  # dynamo itself traces them, if it notices them
    # The operator of sharded experts sees hooks of the backward pass when it runs.
    if has_watched_hooks(router) or has_watched_hooks(experts, backward=is_local):
        return "its router or its experts have hooks, as under ZeRO stage 3"
    return None
