"""Counts what a training step of a model of transformers keeps for its backward pass.

The model runs on the meta device, which computes shapes alone, and every tensor that autograd saves
is counted once. Attention and experts are replaced by functions that save what their kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import stacked_weights
from lightning_fastmoe.huggingface.sharded_experts import kind
from lightning_fastmoe.planning.training import Activations

_ATTENTION = "fastmoe_shapes"


class _Attention(torch.autograd.Function):
    """Saves what flash attention does: q, k, v, the output, and a logsumexp for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out


class _Experts(torch.autograd.Function):
    """Saves what :func:`~lightning_fastmoe.ops.expert_layer` does, for experts of width F or 2F."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, width: int) -> Tensor:
        h = x.new_empty(ids.numel(), width)
        order = ids.new_empty(ids.numel(), dtype=torch.int64)
        ctx.save_for_backward(x, weights, h, order, torch.empty_like(order))
        return torch.empty_like(x)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None


def _forward_of(experts: nn.Module) -> Callable[..., Tensor]:
    up = stacked_weights(experts)[0]
    width = up.numel() // up.shape[0] // int(experts.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def forward(x: Tensor, ids: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Experts.apply(x, ids, weights, width)  # type: ignore[no-any-return]

    return forward


class _Saved:
    """Adds up what autograd saves: each storage once, and no parameters or buffers.

    Attributes:
        bytes: so far.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = [*model.parameters(), *model.buffers()]
        # A storage is one object for as long as it is kept; on the meta device it has no address.
        self._storages = {id(s): s for s in (w.untyped_storage() for w in weights)}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Called by autograd with what it saves."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._storages:
            self._storages[id(storage)] = storage
            self.bytes += storage.nbytes()
        return tensor


def saved_activations(
    model: Any, sequences: int, length: int, logits_rows: int | None = None
) -> Activations | None:
    """What a micro-batch's forward pass and loss keep on a rank.

    Args:
        model: a causal language model of transformers on the meta device, whose experts are this
            package's. It can't be used for anything else afterwards.
        sequences: of a micro-batch.
        length: tokens of each.
        logits_rows: tokens whose logits are there at a time; None for all.

    Returns:
        Bytes; None if the model can't run on shapes alone, as where its control flow looks at data.

    Raises:
        ConfigError: if ``logits_rows`` is not positive.
    """
    from transformers import AttentionInterface
    from transformers.modeling_layers import GradientCheckpointingLayer

    if logits_rows is not None and logits_rows < 1:
        raise ConfigError(f"logits_rows={logits_rows} must be at least 1.")
    AttentionInterface.register(_ATTENTION, _attend)
    saved, layers, begun = _Saved(model), [], []

    def before(*_: Any) -> None:
        begun.append(saved.bytes)

    def after(*_: Any) -> None:
        layers.append(saved.bytes - begun.pop())

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    try:
        model.train()
        model.set_attn_implementation(_ATTENTION)
        for _, layer in kind.layers(model):
            layer.module.forward = _forward_of(layer.module)
        ids = torch.empty(sequences, length, dtype=torch.int64, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    except Exception:  # whatever a model does that shapes alone don't allow
        return None
    outside = saved.bytes - sum(layers)
    rows = sequences * length if logits_rows is None else min(logits_rows, sequences * length)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return Activations(
        layers=tuple(layers),
        outside=outside,
        # Logits, their copy in fp32, and its log-softmax, which the backward needs.
        logits=rows * vocabulary * (hidden.element_size() + 8),
        hidden=hidden.numel() * hidden.element_size(),
    )
