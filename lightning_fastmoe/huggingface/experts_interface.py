"""The experts of transformers' models, computed by this package: ``experts_implementation=NAME``.

transformers calls :func:`experts_forward` with all tokens of a layer and its router's choice. On
one device the experts are computed at once; where a strategy has sharded them over ranks, the
layer's schedule exchanges the tokens.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import torch
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.errors import MissingPackageError, ShapeError
from lightning_fastmoe.huggingface import traced_experts
from lightning_fastmoe.huggingface.experts_class import (
    FLAGS,
    NAME,
    check_ids,
    check_inputs,
    compute,
    compute_dtype,
    only_in_range,
    stacked_weights,
    unknown_flags,
)
from lightning_fastmoe.huggingface.sharded_experts import layer_of
from lightning_fastmoe.ops.kernels import accumulation_dtype

_KNOWN_OPTIONS = {"experts_class", "experts_interface", *FLAGS}
"""Of transformers' decorator of classes of experts."""


def register_in(module: ModuleType) -> None:
    """Registers :data:`NAME`; ``import lightning_fastmoe`` arranges it.

    Args:
        module: ``transformers.integrations.moe``, just imported.
    """
    interface = getattr(module, "ExpertsInterface", None)
    if interface is None:  # transformers before 5 calls an unknown name unknown
        return
    interface.register(NAME, experts_forward)
    options = inspect.signature(module.use_experts_implementation).parameters.values()
    unknown_flags.clear()
    unknown_flags.update(
        (option.name, option.default) for option in options if option.name not in _KNOWN_OPTIONS
    )


def register_experts() -> str:
    """Imports transformers and registers the implementation, which an import does by itself.

    Returns:
        The name for ``experts_implementation=``.

    Raises:
        MissingPackageError: if transformers is missing, or has no experts interface.
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise MissingPackageError(
            f'experts_implementation="{NAME}" needs transformers 5.17 or newer ({error}):'
            " pip install 'transformers>=5.17,<6'."
        ) from error
    register_in(sys.modules[ExpertsInterface.__module__])
    return NAME


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Each token's weighted sum of its experts' outputs; what transformers calls.

    Equal to the class's own ``forward`` up to rounding. Under autocast the GEMMs run in its dtype,
    as ``F.linear`` does.

    Args:
        self: the module with the experts of one layer, all of them or this rank's.
        hidden_states: (T, D).
        top_k_index: (T, K) ids in ``[0, E]``. E is transformers' id of a dropped slot, which adds
            nothing. On the CPU it is not computed; elsewhere, where leaving it out would need a
            host synchronisation, it is computed with weight zero.
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of ``hidden_states``.

    Raises:
        ConfigError: if the class has something that would be ignored.
        ShapeError: for other shapes.
        UnmanagedExpertsError: if the experts are sharded and no strategy trains them.
    """
    layer = layer_of(self)
    if layer is not None and layer.is_sharded:
        if torch.compiler.is_compiling() and traced_experts.applies(layer, hidden_states):
            return traced_experts.forward(layer, hidden_states, top_k_index, top_k_weights)
        exchanged: Tensor = layer.run(hidden_states, top_k_index, top_k_weights)
        return exchanged
    if layer is not None and torch.compiler.is_compiling():
        top_k_weights = layer.see_in_graph(top_k_index, top_k_weights)
    elif layer is not None:
        layer.see(top_k_index, top_k_weights)
    up = stacked_weights(self)[0]
    check_inputs(self, up, hidden_states, top_k_index, top_k_weights)
    if self.num_experts != up.shape[0]:
        raise ShapeError(
            f"{type(self).__name__} has num_experts={self.num_experts}, but weights of"
            f" {up.shape[0]} experts."
        )
    dtype = compute_dtype(hidden_states, up)
    on_host = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
    order, weights = _order(top_k_index, top_k_weights, up.shape[0], on_host)
    weights = weights.to(accumulation_dtype(dtype))
    out = compute(self, hidden_states.to(dtype), order.tokens_per_expert, weights, order)
    return out.to(hidden_states.dtype)


def _order(
    ids: Tensor, weights: Tensor, num_experts: int, on_host: bool
) -> tuple[ops.ExpertOrder, Tensor]:
    """The pairs by expert, and their weights.

    Args:
        ids: (T, K) in ``[0, E]``; a slot with E adds nothing.
        weights: (T, K).
        num_experts: E.
        on_host: whether reading the number of pairs costs nothing: then dropped pairs have no row.
    """
    ids = check_ids(ids, num_experts)
    if on_host:
        order = ops.order_by_expert(ids, num_experts + 1)
        return order.first(num_experts, int(order.offsets[num_experts - 1])), weights
    ids, weights = only_in_range(ids, weights, num_experts)
    return ops.order_by_expert(ids, num_experts), weights
