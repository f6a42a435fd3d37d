"""Locates this rank's shard of the state in ZeRO's private data structures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fastmoe.checkpoint.format.fragment import Fragment
from lightning_fastmoe.nn.experts.trained import padding_in

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class LocalFragment(Fragment):
    """A fragment of a parameter, counted in what this rank has of it: its own experts alone.

    Attributes:
        name: the name of the parameter.
    """

    name: str


@dataclass(frozen=True)
class FlatFragment(LocalFragment):
    """A fragment of a parameter that lies in a flat partition.

    Attributes:
        offset: where it begins in the flat partition, in elements.
    """

    offset: int


@dataclass
class FlatPartition:
    """A flat tensor that the inner optimizer updates: this rank's shard of a group.

    Attributes:
        master: the tensor, in the precision of the optimizer.
        fragments: the fragments in it; the rest is padding.
        names: all parameters of the group, including those of which this rank has no fragment.
        group: the inner optimizer's group, with its options.
        inner: the optimizer that holds its state.
    """

    master: Tensor
    fragments: list[FlatFragment]
    names: list[str]
    group: dict[str, Any]
    inner: torch.optim.Optimizer

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state, empty before its first step."""
        return dict(self.inner.state.get(self.master, {}))

    def view(self, tensor: Tensor, fragment: FlatFragment) -> Tensor:
        """A fragment's elements in a tensor laid out like ``master``; a view."""
        return tensor.detach()[fragment.offset : fragment.offset + fragment.length]


@dataclass(frozen=True)
class LooseParameter:
    """A parameter outside of optimizer partitions: frozen, not optimized, or in evaluation.

    Attributes:
        name: the name of the parameter.
        data: this rank's part of it, flat; writing to it changes the parameter.
        start: offset of ``data`` in this rank's part of the parameter.
        owned: fragment of ``data`` that this rank saves; replicas save the rest.
        origin: the parameter, if ``data`` is a copy because the parameter is not contiguous.
    """

    name: str
    data: Tensor
    start: int
    owned: Fragment
    origin: nn.Parameter | None = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Applies writes to ``data``."""
        if self.origin is not None:
            self.origin.copy_(self.data.view(self.origin.shape))


@dataclass
class ZeroShard:
    """This rank's shard of all parameters and their optimizer state."""

    flats: list[FlatPartition] = field(default_factory=list)
    loose: list[LooseParameter] = field(default_factory=list)


class ZeroState:
    """Reads and writes ZeRO's state on this rank.

    Args:
        engine: the DeepSpeed engine.
        names: ``id(parameter)`` -> name, of the whole model.

    Attributes:
        padding: ``id`` of the parameters that are no part of the model on this rank.
    """

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self.engine, self.names = engine, names
        self.zero = engine.optimizer
        self.partitions_parameters = bool(engine.zero_optimization_partition_weights())
        self.padding = padding_in(engine.module)
        # After validation the engine has no optimizer that trains.
        self.trains = engine.basic_optimizer is not None

    def shard(self) -> ZeroShard:
        """This rank's shard at the moment."""
        result = ZeroShard()
        if self.trains:
            if not self.partitions_parameters:
                self.zero._wait_for_offload_copies()
            flats = self._flats_3() if self.partitions_parameters else self._flats_12()
            result.flats = list(flats)
        held = {name for flat in result.flats for name in flat.names}
        for parameter in self.engine.module.parameters():
            name = self.names[id(parameter)]
            if name not in held:
                result.loose.append(self._loose(name, parameter))
        return result

    def _flats_12(self) -> Iterator[FlatPartition]:
        zero = self.zero
        for i, master in enumerate(zero.single_partition_of_fp32_groups):
            size = master.numel()
            begin = dist.get_rank(group=zero.real_dp_process_group[i]) * size
            names, fragments = [], []
            rows = zip(
                zero.round_robin_bit16_groups[i],
                zero.round_robin_bit16_meta[i],
                zero.round_robin_bit16_offsets[i],
                strict=True,
            )
            for parameter, meta, offset in rows:
                name = self.names[id(parameter)]
                names.append(name)
                first = max(offset, begin)
                last = min(offset + meta.numel(), begin + size)
                if first < last and id(parameter) not in self.padding:
                    fragments.append(
                        FlatFragment(first - offset, last - first, name, first - begin)
                    )
            group = zero.optimizer.param_groups[min(i, len(zero.optimizer.param_groups) - 1)]
            yield FlatPartition(master, fragments, names, group, zero.optimizer)

    def _flats_3(self) -> Iterator[FlatPartition]:
        zero = self.zero
        for i, master in enumerate(zero.fp32_partitioned_groups_flat):
            offset = 0
            names, fragments = [], []
            for parameter in zero.fp16_groups[i]:
                name = self.names[id(parameter)]
                names.append(name)
                own = partition_of(parameter)
                if own.length and id(parameter) not in self.padding:
                    fragments.append(FlatFragment(own.start, own.length, name, offset))
                offset += parameter.partition_numel()
            inner = zero.optimizer
            backup = getattr(zero, "backup_optimizer", None)
            if backup is not None and master in backup.state:
                inner = backup
            groups = zero.optimizer.param_groups
            group = groups[min(zero.sub_group_to_group_id[i], len(groups) - 1)]
            yield FlatPartition(master, fragments, names, group, inner)

    def _loose(self, name: str, parameter: nn.Parameter) -> LooseParameter:
        if id(parameter) in self.padding:
            return LooseParameter(name, parameter.new_empty(0), 0, Fragment(0, 0))
        if self.partitions_parameters:
            own = partition_of(parameter)
            data: Any = parameter
            flat = data.ds_tensor.detach().view(-1)[: own.length]
            return LooseParameter(name, flat, own.start, Fragment(0, own.length))
        flat = parameter.detach().contiguous().view(-1)
        origin = None if parameter.is_contiguous() else parameter
        owned = _even_fragment(flat.numel(), self.replicas(parameter))
        return LooseParameter(name, flat, 0, owned, origin)

    def replicas(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(index of this rank, count) among the ranks that hold the same parameter."""
        group = None
        if not getattr(parameter, "allreduce", True):
            from deepspeed.utils import groups

            group = groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
        return dist.get_rank(group=group), dist.get_world_size(group=group)

    # ------------------------------------------------------------------------------------- loading

    def begin_loading(self) -> None:
        """Prepares for writes to the shard."""
        if self.partitions_parameters:
            for parameter in self.engine.module.parameters():
                if parameter.ds_status.name == "AVAILABLE":
                    parameter.partition()

    @torch.no_grad()
    def finish_loading(self) -> None:
        """Derives the weights that the model computes with from the master copies.

        Without this, training would continue with the old weights.
        """
        zero = self.zero
        if self.partitions_parameters:
            if self.trains:
                for i in range(len(zero.fp32_partitioned_groups_flat)):
                    zero._reassign_or_swap_out_partitioned_parameters(i)
            if hasattr(zero, "checkpoint_event_epilogue"):
                zero.checkpoint_event_epilogue()
            elif zero is not None:
                persistent = zero.persistent_parameters
                if persistent:
                    persistent[0].all_gather(persistent)
        elif self.trains:
            zero.update_lp_params()
            zero._link_all_hp_params()
            # The lazily created link to optimizer states may refer to replaced tensors.
            zero._hp_optimizer_states_linked = False

    def scaler(self) -> dict[str, float]:
        """The loss scaler's state."""
        scaler = self.zero.loss_scaler
        return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}

    def load_scaler(self, saved: dict[str, float]) -> None:
        """Restores :meth:`scaler`; one of another precision, or a constant, keeps its own state."""
        scaler = self.zero.loss_scaler
        if scaler.dynamic and saved.keys() == self.scaler().keys():
            for name, value in saved.items():
                setattr(scaler, name, value)


def partition_of(parameter: Any) -> Fragment:
    """This rank's ZeRO 3 partition as a fragment of the parameter, without padding."""
    size, numel = parameter.partition_numel(), parameter.ds_numel
    # With fewer elements than ranks, the last partitions are padding alone.
    start = min(parameter.ds_zero_partition_rank * size, numel)
    return Fragment(start, min(size, numel - start))


def _even_fragment(numel: int, replica: tuple[int, int]) -> Fragment:
    rank, count = replica
    each = math.ceil(numel / count)
    start = min(rank * each, numel)
    return Fragment(start, min(each, numel - start))
