"""Checks that a checkpoint's tensors fit a model: names, shapes, experts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_fastmoe.checkpoint.expert_names import check_expert_ids
from lightning_fastmoe.checkpoint.format.tensor_names import (
    repeats_rows,
    split_name,
    weight_name,
)
from lightning_fastmoe.checkpoint.model_map import ModelMap
from lightning_fastmoe.checkpoint.sources.base import Source
from lightning_fastmoe.errors import CheckpointError


def check_experts(source: Source, model: ModelMap) -> None:
    """Checks that every layer has as many experts in the checkpoint as in the model.

    Raises:
        CheckpointError: naming the layer.
    """
    for name, experts in model.num_experts.items():
        saved = source.moe_layers.get(name, experts)
        if saved != experts:
            raise CheckpointError(
                f"{source.path}: layer {name!r} has {saved} experts there, but here"
                f" num_experts={experts}. Experts can't be added or dropped on loading: build the"
                f" model with num_experts={saved}."
            )
    # Files of plain weights don't store num_experts, but names of module experts tell it.
    unsaid = {n: model.num_experts[n] for n in model.module_layers.keys() - source.moe_layers}
    check_expert_ids(weights_of(source), unsaid, model.parameters, source.path)


def weights_of(source: Source) -> set[str]:
    """Names of the parameters and buffers in a checkpoint."""
    return {name for kind, name in map(split_name, source.tensors) if kind is None}


def check_trained(saved: Mapping[str, list[int]], model: ModelMap, where: object) -> None:
    """Checks that a run resumes with the single experts that were trained before.

    Args:
        saved: name of a layer -> ids of its trained experts.
        model: the model of this run.
        where: the checkpoint's path, for messages.

    Raises:
        CheckpointError: naming a layer.
    """
    own = {name: list(trained.expert_ids) for name, trained in model.trained.items()}
    for name in sorted({*saved, *own}):
        there, here = saved.get(name), own.get(name)
        if there != here:
            raise CheckpointError(
                f"{where} was trained with another selection of SparseUpdate: experts"
                f" {there or 'as a whole'} of layer {name!r} there, {here or 'as a whole'} here."
                " Use the same experts=; to start another selection from its weights, use"
                " lightning_fastmoe.checkpoint.weights.load_weights."
            )


def check_names(source: Source, model: ModelMap, strict: bool) -> None:
    """Checks that checkpoint and model have the same parameters and buffers.

    Single experts that are trained are compared by :func:`check_trained`.

    Raises:
        CheckpointError: naming those that only one of them has.
    """
    saved_names = weights_of(source) - model.tied.keys()
    extra = {name for name, value in model.extra().items() if isinstance(value, Tensor)}
    own = model.parameters.keys() | model.buffers.keys() | extra
    saved_names = {name for name in saved_names if not repeats_rows(name)}
    own = {name for name in own if not repeats_rows(name)}
    missing = sorted(own - saved_names - set(source.excluded))
    # The names of an expert are checked by the ranks that hold it.
    unknown = sorted(name for name in saved_names - own if not model.is_elsewhere(name))
    if not strict or not (missing or unknown):
        return
    parts = [
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (("only in the model", missing), ("only in the checkpoint", unknown))
        if names
    ]
    raise CheckpointError(
        f"{source.path} does not fit the model: {'; '.join(parts)}. Set strict_loading=False on the"
        " LightningModule to load what matches."
    )


def check_shapes(source: Source, model: ModelMap) -> None:
    """Checks that tensors that are in both have the same shape.

    Raises:
        CheckpointError: naming the tensor, and its layer if it stacks another number of experts.
    """
    parameters = model.parameters.items()
    expected = {name: part.shape for name, (_, part) in parameters if not repeats_rows(name)}
    expected |= {name: tuple(buffer.shape) for name, buffer in model.buffers.items()}
    for name, shape in expected.items():
        record = source.tensors.get(weight_name(name))
        if record is not None and record.shape != shape:
            layer = name.rpartition(".experts.")[0]
            hint = ""
            is_stacked = layer in model.num_experts and layer not in model.module_layers
            if is_stacked and record.shape[:1] != shape[:1]:
                hint = f" (layer {layer!r} has num_experts={model.num_experts[layer]})"
            raise CheckpointError(
                f"{source.path}: {name!r} has the shape {list(record.shape)} there and"
                f" {list(shape)} in this model{hint}."
            )
