"""Loads a checkpoint on any topology: each rank reads the fragments it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.extra_states import load_extra_states
from lightning_fastmoe.checkpoint.format.dtypes import DTYPES
from lightning_fastmoe.checkpoint.format.fragment import Fragment
from lightning_fastmoe.checkpoint.format.manifest import Topology
from lightning_fastmoe.checkpoint.format.tensor_names import (
    GRADIENTS,
    repeats_rows,
    split_name,
    state_name,
    weight_name,
)
from lightning_fastmoe.checkpoint.lockstep import Together
from lightning_fastmoe.checkpoint.matching import (
    check_experts,
    check_names,
    check_shapes,
    check_trained,
)
from lightning_fastmoe.checkpoint.model_map import ModelMap, map_model
from lightning_fastmoe.checkpoint.param_options import by_parameter, common, restored
from lightning_fastmoe.checkpoint.sources.base import Source
from lightning_fastmoe.checkpoint.step_counts import restore_counts
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.zero.averages import TRAINING, Averages, training_name
from lightning_fastmoe.zero.gradients import PartialGradients
from lightning_fastmoe.zero.snapshot import COUNTERS
from lightning_fastmoe.zero.state import FlatPartition, ZeroShard, ZeroState


@dataclass
class Loaded:
    """Everything in a checkpoint other than tensors.

    Attributes:
        lightning: Lightning's checkpoint dictionary.
        user_groups: rows of parameter names and options, as the user wrote them.
        local_state: this rank's own state, if the run had the same number of ranks; else None.
        topology: the topology of the run that saved, if known.
        put_gradients: hands partly accumulated gradients, if there are any, to the engine. Call it
            when nothing will clear gradients before the first batch any more.
    """

    lightning: dict[str, Any]
    user_groups: list[dict[str, Any]]
    local_state: dict[str, Any] | None
    topology: Topology | None
    put_gradients: Callable[[], None]


def load(
    source: Source,
    together: Together,
    *,
    engine: Any,
    layers: Mapping[str, ExpertLayer],
    training: bool,
    strict: bool,
    trusted: bool = False,
    verify: bool = True,
    averages: Averages | None = None,
) -> Loaded:
    """Restores a checkpoint into a freshly built engine; every rank calls this.

    Args:
        source: the checkpoint, opened on every rank.
        together: synchronises the ranks and their errors.
        engine: the DeepSpeed engine.
        layers: name -> MoE layer.
        training: restore optimizer state and counters too.
        strict: parameter names must match exactly.
        trusted: also unpickle arbitrary objects, which can run any code.
        verify: compare the files with their hashes first; each is read by one rank.
        averages: the averages to restore, for a run that averages its weights.

    Raises:
        CheckpointError: on all ranks, if the checkpoint is damaged or does not fit the model.
    """
    with together.stage():
        if training and "optimizer" not in source.contents:
            raise CheckpointError(
                f"{source.path} was saved with weights only, so training can't resume from it. Load"
                " it for validation, testing or prediction, or resume from a full checkpoint."
            )
        model = map_model(engine.module, layers)
        check_experts(source, model)
    with together.stage():  # after check_experts on all: else some would report shapes
        check_names(source, model, strict)
        check_shapes(source, model)
        if verify:
            wanted = ("weights", "optimizer") if training else ("weights",)
            source.check(together.rank, together.world_size, wanted)
        state = source.read_state(trusted=trusted)
        if training:
            check_trained(state["optimizer"].get("trained_experts", {}), model, source.path)
        zero = ZeroState(engine, model.names)
        local = _local_state(source, together, trusted)
    put: Callable[[], None] = lambda: None  # noqa: E731
    zero.begin_loading()
    with together.stage(), torch.no_grad():
        shard = zero.shard()
        _load_weights(source, model, shard, from_stacks=not training)
        _load_buffers(source, model, weight_name)
        load_extra_states(source, model, state["extra_state"], strict=strict)
        if averages is not None:
            averages.take(shard, model.buffers)
            _load_weights(source, model, shard, training_name)
            _load_buffers(source, model, training_name)
        if training:
            restore = _OptimizerLoader(source, model, state["optimizer"], strict)
            for flat in shard.flats:
                restore.load(flat)
            _load_engine(engine, zero, state["engine"])
            gradients = PartialGradients(zero, model, shard)
            put = _putter(gradients, source, zero.scaler(), state["engine"]["loss_scaler"])
            restore_counts(source, layers, together.rank, together.world_size, trusted)
    zero.finish_loading()
    groups = state["optimizer"]["user_groups"] if training else []
    return Loaded(state["lightning"], groups, local, source.topology, put)


def _putter(
    gradients: PartialGradients,
    source: Source,
    scaler: Mapping[str, float],
    saved_scaler: Mapping[str, float],
) -> Callable[[], None]:
    values = gradients.load(source)
    scale = scaler.get("cur_scale", 1.0) / saved_scaler.get("cur_scale", 1.0)
    return lambda: gradients.put(values, scale)


def _local_state(source: Source, together: Together, trusted: bool) -> dict[str, Any] | None:
    if source.topology is None or source.topology.world_size != together.world_size:
        return None
    return source.read_rank_state(together.rank, trusted=trusted)


def _load_weights(
    source: Source,
    model: ModelMap,
    shard: ZeroShard,
    named: Callable[[str], str] = weight_name,
    *,
    from_stacks: bool = False,
) -> None:
    """Fills the weights; trained experts, if ``from_stacks``, with the rows of their stacks."""
    for flat in shard.flats:
        for fragment in flat.fragments:
            name = named(fragment.name)
            if name in source.tensors:
                start = model.fragment(fragment.name).start + fragment.start
                source.read_into(name, start, flat.view(flat.master, fragment))
    for loose in shard.loose:
        name = named(loose.name)
        if from_stacks and repeats_rows(loose.name):
            part = Fragment(loose.start, loose.data.numel())
            for stack, start, there in model.in_stack(loose.name, part):
                if named(stack) in source.tensors:
                    source.read_into(named(stack), start, there.within(loose.data))
            loose.write_back()
        elif name in source.tensors:
            source.read_into(name, model.fragment(loose.name).start + loose.start, loose.data)
            loose.write_back()


def _load_buffers(source: Source, model: ModelMap, named: Callable[[str], str]) -> None:
    for name, buffer in model.buffers.items():
        if named(name) in source.tensors:
            values = torch.empty(buffer.shape, dtype=buffer.dtype)
            source.read_into(named(name), 0, values.view(-1))
            buffer.copy_(values)


class _OptimizerLoader:
    """Restores optimizer states and options into this rank's partitions."""

    def __init__(
        self, source: Source, model: ModelMap, info: Mapping[str, Any], strict: bool
    ) -> None:
        self.source, self.model, self.strict = source, model, strict
        self.scalars = by_parameter(info["scalars"], "values")
        self.options = by_parameter(info["groups"], "options")
        self.states: dict[str, set[str]] = {}
        for tensor in source.tensors:
            state, name = split_name(tensor)
            if state not in (None, TRAINING) and not state.startswith(GRADIENTS):
                self.states.setdefault(name, set()).add(state)
        self.saved_class = info["class"]

    def load(self, flat: FlatPartition) -> None:
        """Restores the state of one partition, and its group's options."""
        path = self.source.path
        own = type(flat.inner).__name__
        if self.saved_class is not None and own != self.saved_class:
            raise CheckpointError(
                f"{path} holds the state of {self.saved_class}, but configure_optimizers returned"
                f" {own}. Use the same optimizer to resume; to start a new run with these weights,"
                " load them into the module before Trainer.fit."
            )
        options = common(flat.names, self.options, "the optimizer options", path)
        for key, value in (options or {}).items():
            flat.group[key] = restored(value, flat.group.get(key))
        scalars = common(flat.names, self.scalars, "the optimizer states", path) or {}
        state = {key: self._on_device(flat, key, value) for key, value in scalars.items()}
        for key in self._elementwise(flat):
            record = next(
                r for n in flat.names if (r := self.source.tensors.get(state_name(key, n)))
            )
            state[key] = self._values(flat, key, DTYPES[record.dtype])
        if state:
            flat.inner.state[flat.master] = state
        else:
            flat.inner.state.pop(flat.master, None)  # saved before the first step

    def _values(self, flat: FlatPartition, key: str, dtype: torch.dtype) -> Tensor:
        """One state of a partition; reuses the memory of the state that it replaces."""
        values = flat.state.get(key)
        if (
            not isinstance(values, Tensor)
            or (values.shape, values.dtype) != (flat.master.shape, dtype)
            or values.device != flat.master.device
            or not values.is_contiguous()
        ):
            values = torch.empty_like(flat.master, dtype=dtype, requires_grad=False)
        position = 0
        for fragment in sorted(flat.fragments, key=lambda f: f.offset):
            values[position : fragment.offset].zero_()  # padding
            name, part = state_name(key, fragment.name), flat.view(values, fragment)
            if name in self.source.tensors:
                start = self.model.fragment(fragment.name).start + fragment.start
                self.source.read_into(name, start, part)
            else:
                part.zero_()
            position = fragment.offset + fragment.length
        values[position:].zero_()
        return values

    @staticmethod
    def _on_device(flat: FlatPartition, key: str, value: Any) -> Any:
        """Moves a scalar to where torch's optimizers expect it: mostly the CPU for ``step``."""
        if not isinstance(value, Tensor):
            return value
        on_device = key != "step" or flat.group.get("capturable") or flat.group.get("fused")
        return value.clone().to(flat.master.device if on_device else "cpu")

    def _elementwise(self, flat: FlatPartition) -> list[str]:
        """The names of its parameters' states, which must be the same for all."""
        having = {name: self.states.get(name, set()) for name in flat.names}
        keys: set[str] = set().union(*having.values())
        for name, states in having.items():
            if states != keys and self.strict:
                raise CheckpointError(
                    f"{self.source.path} has no optimizer state {min(keys - states)!r} for"
                    f" {name!r}, but has it for others in the same optimizer group. Set"
                    " strict_loading=False on the LightningModule to initialise it with zeros."
                )
        return sorted(keys)


def _load_engine(engine: Any, zero: ZeroState, saved: Mapping[str, Any]) -> None:
    for name in COUNTERS:
        if name in saved["counters"]:
            setattr(engine, name, saved["counters"][name])
    zero.load_scaler(saved["loss_scaler"])
