"""Sharded experts of transformers' models as ``torch.compile`` traces them.

They become one operator in the graph (:mod:`~lightning_fastmoe.nn.opaque`), as those of
:class:`~lightning_fastmoe.MoE` do. Where that can't be, the graph breaks at them.

A graph is guarded by what was read while tracing. So nothing here reads what differs between the
layers of a model, such as names and the identity of objects: they are to share one graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.huggingface.experts_class import (
    check_ids,
    check_inputs,
    only_in_range,
    stacked_weights,
)
from lightning_fastmoe.huggingface.packed_experts import packed_of
from lightning_fastmoe.nn.experts.grouped import groups_of
from lightning_fastmoe.nn.experts.lora import SCALE
from lightning_fastmoe.nn.experts.trained import trained_of
from lightning_fastmoe.nn.hooks import has_watched_hooks
from lightning_fastmoe.nn.opaque import routed_experts
from lightning_fastmoe.nn.schedule import UnmanagedSchedule
from lightning_fastmoe.nn.traced import DEVICES, runs_again
from lightning_fastmoe.ops.kernels import accumulation_dtype


def applies(layer: Any, x: Tensor) -> bool:
    """Whether this pass of a layer is traced.

    Args:
        layer: a :class:`~lightning_fastmoe.huggingface.sharded_experts.TransformersLayer` whose
            experts are sharded.
        x: (T, D).
    """
    module = layer.module
    if layer.reference is None or isinstance(layer.schedule, UnmanagedSchedule):
        return False
    if x.device.type not in DEVICES or runs_again():
        return False
    if SCALE in vars(module) or packed_of(module) is not None:
        return False
    if trained_of(module) is not None or groups_of(module) is not None:
        return False
    return not has_watched_hooks(module)  # as under ZeRO stage 3, which has no weights in between


def forward(layer: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """:func:`~lightning_fastmoe.huggingface.experts_interface.experts_forward`, sharded.

    Args:
        layer: see :func:`applies`.
        hidden_states: (T, D).
        ids: (T, K) in ``[0, E]``.
        weights: (T, K).

    Returns:
        (T, D) in the dtype of ``hidden_states``.
    """
    check_inputs(layer.module, stacked_weights(layer.module)[0], hidden_states, ids, weights)
    weights = layer.see_in_graph(ids, weights)
    dtype = layer.experts.compute_dtype(hidden_states)
    x, weights = hidden_states.to(dtype), weights.to(accumulation_dtype(dtype))
    ids = check_ids(ids, layer.num_experts)
    dispatched = ids < layer.num_experts if layer.leaves_out_dropped(x) else None
    ids, weights = only_in_range(ids, weights, layer.num_experts)
    given = (x, weights, *layer.experts.stacks(dtype))
    records = torch.is_grad_enabled()
    y, _, _ = routed_experts(
        *(layer.reference.handle, *given, ids, dispatched, layer.num_experts),
        [records and t is not None and t.requires_grad for t in given],
    )
    out: Tensor = y.to(hidden_states.dtype)
    return out
