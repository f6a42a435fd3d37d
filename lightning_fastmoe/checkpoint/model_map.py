"""Maps a rank's parameters to the whole model: names, global shapes, fragments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_fastmoe.checkpoint.expert_names import (
    expert_of,
    names_by_expert,
    why_mistaken,
    why_not_saved,
)
from lightning_fastmoe.checkpoint.format.fragment import Fragment
from lightning_fastmoe.checkpoint.format.tensor_names import TRAINED_EXPERTS, repeats_rows
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.nn import ModuleExperts
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.nn.experts.base import describe_ids, is_interval
from lightning_fastmoe.nn.experts.trained import TrainedExperts, trained_of
from lightning_fastmoe.nn.partial_state import expected_partial_state


@dataclass(frozen=True)
class ParameterFragment(Fragment):
    """What one of this rank's parameters is of the whole model's: a fragment, or all of it.

    Attributes:
        name: name in the model, identical on every rank.
        shape: the shape of the whole model's parameter.
        is_expert: whether other ranks hold other experts of the parameter.
    """

    name: str
    shape: tuple[int, ...]
    is_expert: bool


@dataclass
class ModelMap:
    """Names and fragments of everything that a module's checkpoint holds.

    Attributes:
        module: the LightningModule.
        parameters: name -> (parameter, its fragment of the whole model's).
        buffers: name -> persistent buffer.
        tied: further name of a parameter -> its first.
        names: ``id(parameter)`` -> name.
        num_experts: name of every MoE layer, sharded or not -> its ``num_experts``.
        module_layers: name of every layer whose experts are modules -> this rank's experts.
        trained: name of every layer of which single experts are trained -> these, on this rank.
    """

    module: nn.Module
    parameters: dict[str, tuple[nn.Parameter, ParameterFragment]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    num_experts: dict[str, int] = field(default_factory=dict)
    module_layers: dict[str, ModuleExperts] = field(default_factory=dict)
    trained: dict[str, TrainedExperts] = field(default_factory=dict)

    def fragment(self, name: str) -> ParameterFragment:
        """The fragment of the whole model's parameter that this rank has, before ZeRO's."""
        return self.parameters[name][1]

    def frozen(self) -> set[str]:
        """The parameters that are not trained; without stacks of which some rows are."""
        stacks = {
            f"{layer}.experts.{name}"
            for layer, trained in self.trained.items()
            for name in trained.shapes
        }
        frozen = {name for name, (p, _) in self.parameters.items() if not p.requires_grad}
        return frozen - stacks

    def extra(self) -> dict[str, Any]:
        """What the module's state dict holds beyond parameters and buffers."""
        known = self.parameters.keys() | self.buffers.keys() | self.tied.keys()
        with expected_partial_state():
            return {k: v for k, v in self.module.state_dict().items() if k not in known}

    def in_stack(self, name: str, part: Fragment) -> Iterator[tuple[str, int, Fragment]]:
        """Where a checkpoint's stacks hold what this rank has of trained experts.

        Args:
            name: of a parameter that repeats rows.
            part: a fragment of it, as this rank holds it.

        Yields:
            Name of the stack, start in it, and the fragment of ``part`` that is there.
        """
        layer, _, stack = name.rpartition(TRAINED_EXPERTS)
        fragment, ids = self.fragment(name), self.trained[layer].local_ids
        row = fragment.length // max(1, len(ids))
        for place, i in enumerate(ids):
            first = max(part.start, place * row)
            last = min(part.stop, (place + 1) * row)
            if first < last:
                start = i * row + first - place * row
                yield f"{layer}.experts.{stack}", start, Fragment(first - part.start, last - first)

    @property
    def sharded_modules(self) -> set[str]:
        """Layers whose module experts are sharded over ranks; identical on every rank."""
        return {n for n, e in self.module_layers.items() if e.num_local_experts < e.num_experts}

    def is_elsewhere(self, name: str) -> bool:
        """Whether a name belongs to a module expert that only other ranks hold."""
        owner = expert_of(name, self.module_layers)
        if owner is None:
            return False
        experts = self.module_layers[owner[0]]
        return owner[1] < experts.num_experts and owner[1] not in experts.local_ids

    def names_by_expert(self) -> dict[str, dict[int, list[str]]]:
        """Layer whose experts are modules -> id of a local expert -> names inside it."""
        extra = {name for name, value in self.extra().items() if isinstance(value, Tensor)}
        names = {*self.parameters, *self.tied, *self.buffers, *extra}
        return names_by_expert(names, {n: e.local_ids for n, e in self.module_layers.items()})


def map_model(module: nn.Module, layers: Mapping[str, ExpertLayer]) -> ModelMap:
    """Finds the name of every parameter and buffer, and the fragment that this rank has.

    Args:
        module: the LightningModule, partitioned by ZeRO 3 or not.
        layers: name -> MoE layer, for all MoE layers.

    Raises:
        CheckpointError: if sharded experts have state that a checkpoint of the whole model can't
            represent, or other parameters are named like experts that SparseUpdate trains.
    """
    for name, layer in layers.items():
        if layer.is_sharded and (why := why_not_saved(name, layer)):
            raise CheckpointError(why)
    if why := why_mistaken(module, layers):
        raise CheckpointError(why)
    result = ModelMap(
        module,
        num_experts={n: layer.num_experts for n, layer in layers.items()},
        module_layers={
            name: layer.experts
            for name, layer in layers.items()
            if isinstance(layer.experts, ModuleExperts)
        },
    )
    for name, layer in layers.items():
        if (trained := trained_of(layer.experts.holder)) is not None:
            result.trained[name] = trained
    experts = {
        f"{name}.experts.{parameter}": layer
        for name, layer in layers.items()
        if layer.is_sharded
        for parameter, _ in layer.experts.named_parameters(remove_duplicate=False)
    }
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = result.names.setdefault(id(parameter), name)
        if first != name:
            _check_tied(first, name, result)
            result.tied[name] = first
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        result.parameters[name] = (parameter, _fragment(name, shape, experts.get(name)))
    result.buffers = dict(_persistent_buffers(module))
    for name, layer in layers.items():
        stacked = layer.is_sharded and layer.experts.is_stacked
        if stacked and (own := [b for b, _ in layer.experts.named_buffers()]):
            raise CheckpointError(
                f"The experts of layer {name!r} have buffers ({', '.join(own)}). They differ"
                " between ranks, and checkpoints can't hold them. Make them parameters."
            )
    return result


def _check_tied(first: str, name: str, model: ModelMap) -> None:
    """Refuses parameters shared between sharded experts: each rank would train its own copy."""
    sharded = model.sharded_modules
    if expert_of(first, sharded) != expert_of(name, sharded):
        raise CheckpointError(
            f"{first!r} and {name!r} are one parameter, but the layer's experts are sharded over"
            " ranks: each rank would train its own copy. Give each expert its own parameters, or"
            " keep all of them on each rank with MoE(dispatcher='local')."
        )


def _fragment(name: str, shape: tuple[int, ...], layer: ExpertLayer | None) -> ParameterFragment:
    trained = None if layer is None else trained_of(layer.experts.holder)
    if trained is not None and repeats_rows(name):
        shape = (len(trained.local_ids), *trained.shapes[name.rpartition(TRAINED_EXPERTS)[2]])
    else:
        trained = None
    numel = math.prod(shape)
    if layer is None:
        return ParameterFragment(0, numel, name, shape, is_expert=False)
    experts = layer.experts
    if not experts.is_stacked:  # its name says which expert it is
        return ParameterFragment(0, numel, name, shape, is_expert=True)
    if not is_interval(experts.local_ids):
        raise CheckpointError(
            f"The experts {describe_ids(experts.local_ids)} of {name!r} are on one rank."
            " Checkpoints require each rank's experts to have consecutive ids."
        )
    row = math.prod(shape[1:])
    if trained is not None:
        # What one rank holds of the trained experts is an interval of them, as of all experts.
        before = sum(i < experts.local_ids[0] for i in trained.expert_ids)
        whole = (len(trained.expert_ids), *shape[1:])
        return ParameterFragment(before * row, numel, name, whole, is_expert=True)
    assert shape[0] == experts.num_local_experts, name
    return ParameterFragment(
        experts.local_ids[0] * row,
        numel,
        name,
        (experts.num_experts, *shape[1:]),
        is_expert=True,
    )


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
