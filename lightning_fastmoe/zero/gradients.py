"""Saves and restores gradients of a partly accumulated step.

With ZeRO 2 and 3, each rank holds its shard of the averaged gradient. With ZeRO 1, each holds the
gradient of its own batches, which is averaged only before the step. Both are stored as they are, so
that the same ranks resume bit by bit, and the average follows from both, so that other ranks can
resume too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.checkpoint.format.manifest import Topology
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.format.tensor_names import gradient_name
from lightning_fastmoe.checkpoint.model_map import ModelMap
from lightning_fastmoe.zero.state import LocalFragment, ZeroShard, ZeroState

_ZERO_3_PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class GradientSource(Protocol):
    """The part of a checkpoint source that this module needs."""

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Name -> dtype and shape."""
        ...

    @property
    def topology(self) -> Topology | None:
        """The topology of the run that saved."""
        ...

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on."""
        ...


class PartialGradients:
    """The partly accumulated gradients of an engine.

    Args:
        zero: ZeRO's state on this rank.
        model: the map of the model's parameters.
        shard: this rank's shard; gradients of ZeRO 2 and 3 are partitioned like it.
    """

    def __init__(self, zero: ZeroState, model: ModelMap, shard: ZeroShard) -> None:
        self.state, self.zero, self.model, self.shard = zero, zero.zero, model, shard
        self.is_local = not zero.partitions_parameters and not self.zero.partition_gradients
        self.parameters = {n: p for n, (p, _) in model.parameters.items()}

    def fragments(self) -> Iterator[OwnedFragment]:
        """The fragments that this rank writes."""
        for fragment in self._local_fragments():
            own = self.model.fragment(fragment.name)
            shape, start = own.shape, own.start + fragment.start
            if self.is_local:
                replica, count = self.state.replicas(self.parameters[fragment.name])
                shape = (count, *shape)
                start += replica * math.prod(own.shape)
            name = gradient_name(fragment.name, self.is_local)
            yield OwnedFragment.of(name, shape, start, self._read(fragment))

    def load(self, source: GradientSource) -> dict[LocalFragment, Tensor]:
        """Reads this rank's fragments; none if the checkpoint was taken between steps."""
        result = {}
        for fragment in self._local_fragments():
            value = self._load_fragment(source, fragment)
            if value is not None:
                result[fragment] = value
        return result

    def _load_fragment(self, source: GradientSource, fragment: LocalFragment) -> Tensor | None:
        own = self.model.fragment(fragment.name)
        start = own.start + fragment.start
        mean, local = (gradient_name(fragment.name, is_local) for is_local in (False, True))
        if mean not in source.tensors and local not in source.tensors:
            return None
        value = torch.zeros(fragment.length, dtype=torch.float32)
        replica, count = self.state.replicas(self.parameters[fragment.name])
        # A rank's local gradient has weight 1 / world, but experts have fewer replicas than that.
        weight = dist.get_world_size() / count
        if mean in source.tensors:
            source.read_into(mean, start, value)
            return value * weight if self.is_local and weight != 1 else value
        saved_count = source.tensors[local].shape[0]
        numel = math.prod(own.shape)
        assert source.topology is not None
        saved_world = source.topology.world_size
        if self.is_local and (saved_count, saved_world) == (count, dist.get_world_size()):
            source.read_into(local, replica * numel + start, value)
            return value
        part = torch.empty_like(value)
        for i in range(saved_count):
            source.read_into(local, i * numel + start, part)
            value += part
        value /= saved_world
        return value * weight if self.is_local else value

    def put(self, gradients: Mapping[LocalFragment, Tensor], scale: float = 1.0) -> None:
        """Hands them to the engine, which accumulates the step's remaining batches.

        Args:
            gradients: from :meth:`load`.
            scale: ratio of this run's fp16 loss scale to the saved run's.
        """
        if not gradients:
            return
        values = {f: g * scale if scale != 1 else g for f, g in gradients.items()}
        if self.state.partitions_parameters:
            self._put_3(values)
        elif self.is_local:
            self._put_local(values)
        elif self.zero.cpu_offload:
            self._put_offloaded(values)
        else:
            self._put_2(values)

    def _local_fragments(self) -> Iterator[LocalFragment]:
        if not self.is_local:
            for flat in self.shard.flats:
                yield from flat.fragments
            return
        for flat in self.shard.flats:
            for name in flat.names:
                numel = self.model.fragment(name).length
                if numel:
                    yield LocalFragment(0, numel, name)

    # ------------------------------------------------------------- where DeepSpeed keeps gradients

    def _read(self, fragment: LocalFragment) -> Tensor:
        parameter = self.parameters[fragment.name]
        if self.state.partitions_parameters:
            return self._partition_3(parameter)[: fragment.length].detach().view(-1)
        if self.is_local:
            gradient = self.zero.get_param_gradient_attribute(parameter)
        elif self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()
            gradient = self.zero.accumulated_grads_in_cpu.get(self.zero.get_param_id(parameter))
        else:
            gradient = self._read_2(fragment)
            if gradient is not None and gradient.numel() == fragment.length:
                return gradient
        if gradient is None:  # no batch has used it yet
            return torch.zeros(fragment.length)
        flat: Tensor = gradient.detach().reshape(-1)
        return fragment.within(flat)

    def _read_2(self, fragment: LocalFragment) -> Tensor | None:
        i, row, offset = self._locations_2[fragment.name]
        if self.zero._use_compact_grad_partition_buffer(i):
            group = self.zero.averaged_gradients.get(i)
            if group is None:
                return None
            part: Tensor = group.flat_partition[offset : offset + fragment.length]
            return part
        gradients = self.zero.all_grad_tensors.get(i)
        if gradients is None:
            return None
        return fragment.within(gradients[row].detach().reshape(-1))

    @cached_property
    def _locations_2(self) -> dict[str, tuple[int, int, int]]:
        """Name -> (group, index among the partition's parameters, offset in the partition)."""
        offsets = [{f.name: f.offset for f in flat.fragments} for flat in self.shard.flats]
        return {
            (name := self.model.names[id(parameter)]): (i, row, offsets[i][name])
            for i, group in enumerate(self.zero.params_in_partition)
            for row, parameter in enumerate(group)
            if id(parameter) not in self.state.padding
        }

    def _partition_3(self, parameter: Any) -> Tensor:
        partition: Tensor = getattr(self.zero, _ZERO_3_PARTITIONS)[parameter.ds_id]
        return partition

    def _put_3(self, values: Mapping[LocalFragment, Tensor]) -> None:
        for fragment, value in values.items():
            target = self._partition_3(self.parameters[fragment.name])
            target.view(-1)[: fragment.length].copy_(value)
        # The next backward adds instead of overwriting.
        self.zero.micro_step_id = max(1, self.zero.micro_step_id)

    def _put_local(self, values: Mapping[LocalFragment, Tensor]) -> None:
        accumulates = self.zero.use_grad_accum_attribute
        for fragment, value in values.items():
            parameter = self.parameters[fragment.name]
            dtype = self.zero.gradient_accumulation_dtype if accumulates else parameter.dtype
            gradient = value.view(parameter.shape).to(parameter.device, dtype)
            setattr(parameter, "grad_accum" if accumulates else "grad", gradient)

    def _put_offloaded(self, values: Mapping[LocalFragment, Tensor]) -> None:
        for fragment, value in values.items():
            parameter = self.parameters[fragment.name]
            buffer = torch.zeros(parameter.numel(), dtype=parameter.dtype, device="cpu")
            fragment.within(buffer).copy_(value)
            if self.zero.cpu_offload_pin_memory:
                buffer = buffer.pin_memory()
            self.zero.accumulated_grads_in_cpu[self.zero.get_param_id(parameter)] = buffer
        self.zero.micro_step_id = max(0, self.zero.micro_step_id)

    def _put_2(self, values: Mapping[LocalFragment, Tensor]) -> None:
        zero = self.zero
        for i, flat in enumerate(self.shard.flats):
            own = {f.name: f for f in values if f.name in {g.name for g in flat.fragments}}
            if zero._use_compact_grad_partition_buffer(i):
                group = zero._build_compact_grad_partition_buffer(i)
                for fragment in flat.fragments:
                    target = group.flat_partition[fragment.offset :][: fragment.length]
                    target.copy_(values[own[fragment.name]])
                zero.averaged_gradients[i] = group
                continue
            gradients = []
            for parameter in zero.params_in_partition[i]:
                whole = torch.zeros_like(parameter, dtype=zero.gradient_accumulation_dtype)
                if id(parameter) not in self.state.padding:
                    local = own[self.model.names[id(parameter)]]
                    local.within(whole.detach().view(-1)).copy_(values[local])
                gradients.append(whole)
            zero.all_grad_tensors[i] = gradients
