"""Writes a user's edits of parameters to ZeRO's master weights, or refuses them.

ZeRO trains a flat fp32 copy of the weights and overwrites the module's after each step, so an edit
in a hook would be lost. Before each step and each save, the module's parameters are therefore
compared with their state after the previous step:

* ``parameter._version``, which every in-place operation increments, and the memory address, which
  ``parameter.data = ...`` changes. Both are known on the host.
* Whether ``parameter.data`` was read: in-place operations on it leave no other trace
  (:mod:`~lightning_fastmoe.zero.data_access`).
* A sample of each parameter's elements, different ones in each step, for what else leaves none:
  operations on a tensor that was ``parameter.data`` in an earlier step, or in a compiled function.

Of a changed parameter, elements that differ from the master weights are written to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from lightning_fastmoe.errors import ParameterEditError
from lightning_fastmoe.zero.data_access import DataAccess, refusal
from lightning_fastmoe.zero.module_tree import ModuleTree
from lightning_fastmoe.zero.state import FlatFragment, FlatPartition, ZeroState, partition_of
from lightning_fastmoe.zero.weight_samples import Sampler, differ, sample_each


@dataclass
class _Watched:
    """A parameter of the module.

    Attributes:
        name: the name of the parameter.
        parameter: the parameter; typed Any, as ZeRO 3 adds attributes to it.
        holders: (``_parameters`` of a module, key) for each module that holds it.
        is_optimized: whether it is in the user's optimizer, trained or frozen.
        is_trained: whether it is in ZeRO's optimizer.
        flat_offset: (group, offset) in ZeRO 1 and 2's flat buffers.
    """

    name: str
    parameter: Any
    is_optimized: bool
    holders: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    is_trained: bool = False
    flat_offset: tuple[int, int] | None = None


class WeightEdits:
    """Detects edits of parameters since the last step, and applies them.

    Args:
        engine: the DeepSpeed engine, with its optimizer.
        optimized: the parameters of the user's optimizer, frozen ones too.
    """

    def __init__(self, engine: Any, optimized: Iterable[nn.Parameter]) -> None:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        self._state, self._tree = ZeroState(engine, names), ModuleTree(engine.module)
        self._zero = engine.optimizer
        self._partitioned = self._state.partitions_parameters
        self._watched = self._find(engine.module, names, {id(p) for p in optimized})
        self._parameters = [one.parameter for one in self._watched]
        self._by_name = {one.name: one.parameter for one in self._watched}
        self._holders = [(*holder, one) for one in self._watched for holder in one.holders]
        self._trainable = [p.requires_grad for p in self._parameters]
        index = {one.name: i for i, one in enumerate(self._watched)}
        self._samplers = [Sampler(f.fragments, index) for f in self._state.shard().flats]
        self._complaints: dict[str, str] = {}
        self._turn = 0
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._access: DataAccess | None = None
        self.remember()
        self._access = DataAccess(names)

    def _find(
        self, module: nn.Module, names: dict[int, str], optimized: set[int]
    ) -> list[_Watched]:
        found = {id(p): _Watched(names[id(p)], p, id(p) in optimized) for p in module.parameters()}
        for owner in module.modules():
            for key in owner._parameters:
                parameter = _peek(owner._parameters, key)
                if parameter is not None:
                    found[id(parameter)].holders.append((owner._parameters, key))
        zero = self._zero
        if self._partitioned:
            for parameter in (p for group in zero.fp16_groups for p in group):
                found[id(parameter)].is_trained = True
        else:
            for i, group in enumerate(zero.round_robin_bit16_groups):
                offsets = zero.round_robin_bit16_offsets[i]
                for parameter, offset in zip(group, offsets, strict=True):
                    one = found[id(parameter)]
                    one.is_trained, one.flat_offset = True, (i, offset)
        return list(found.values())

    def let_go(self) -> None:
        """Called when training is over."""
        if self._access is not None:
            self._access.end()

    # ---------------------------------------------------------------------------------- noticing

    @torch.no_grad()
    def remember(self) -> None:
        """Records the current parameters as unedited, as after a step."""
        self._turn += 1
        if self._access is not None:
            self._access.seen.clear()
            self._access.written.clear()
        self._versions = [p._version for p in self._parameters]
        self._addresses = [p.data_ptr() for p in self._parameters]
        if self._partitioned:
            self._partition_versions = [p.ds_tensor._version for p in self._parameters]
            self._whole = [i for i, p in enumerate(self._parameters) if _is_whole(p)]
            self._whole_samples = self._sample_whole()
        self._partition_samples = self._samples()

    def forget(self) -> None:
        """Forgets earlier edits, after everything was loaded."""
        self._complaints.clear()
        self.remember()

    @torch.no_grad()
    def look(self) -> None:
        """Looks for edits before a forward pass of ZeRO 3, which overwrites gathered parameters.

        Raises:
            ParameterEditError: if a parameter was replaced by another object.
        """
        if not self._partitioned:
            return
        if replaced := self._replaced():
            raise ParameterEditError(replaced[0])
        parameters = self._parameters
        versions = [p._version for p in parameters]
        addresses = [p.data_ptr() for p in parameters]
        partition_versions = [p.ds_tensor._version for p in parameters]
        written = _unequal(versions, self._versions)
        if self._access is not None:
            written |= {self._index[i] for i in self._access.written}
            self._access.written.clear()
        for i in written - _unequal(partition_versions, self._partition_versions):
            if not _is_whole(parameters[i]):
                self._complain_of_partition(self._watched[i], "written to")
        for i, parameter in enumerate(parameters):
            if addresses[i] and not _is_whole(parameter):
                self._complain_of_partition(self._watched[i], "assigned new data")
        # Parameters still gathered from an earlier pass may be freed in this one.
        written |= _unequal(addresses, self._addresses) | self._accessed()
        self._take_over({i for i in written if _is_whole(parameters[i])}, set())
        self._versions, self._addresses = versions, addresses
        self._partition_versions = [p.ds_tensor._version for p in parameters]

    @torch.no_grad()
    def settle(self, samples: bool = True) -> list[str]:
        """Applies what was written to parameters since :meth:`remember`.

        Args:
            samples: whether to compare samples too, or only what the host knows.

        Returns:
            For each edit that can't be applied, a message with the reason and the alternative.
        """
        self.look()
        standing = [*self._replaced(), *self._tree.replaced(), *self._frozen_or_unfrozen()]
        written, partition_written = self._edited(samples)
        self._take_over(written, partition_written)
        if written or partition_written:
            self.remember()
        return [*standing, *self._complaints.values()]

    @torch.no_grad()
    def samples_differ(self) -> Tensor:
        """Whether a sample of ZeRO 1 and 2's weights has changed: a scalar on their device."""
        pairs = zip(self._samples(), self._partition_samples, strict=True)
        return torch.stack([(now != before).any() for now, before in pairs]).any()

    def assigned_gradients(self) -> list[str]:
        """Complaints about gradients assigned after the backward pass; called before a step."""
        return [
            f"The gradient of {one.name!r} was set after the backward pass, when ZeRO had"
            " already reduced the gradients, so it would be lost. Change gradients in a hook:"
            " parameter.register_hook(lambda gradient: ...)."
            for one in self._watched
            if one.is_trained and one.parameter.grad is not None
        ]

    def _samples(self) -> list[Tensor]:
        """Samples of this rank's partitions, of the same elements since :meth:`remember`."""
        return [
            sampler.sample(partition, self._turn)
            for sampler, partition in zip(self._samplers, self._partitions(), strict=True)
        ]

    def _edited(self, look_at_samples: bool) -> tuple[set[int], set[int]]:
        """Parameters that were written to, and those of which only this rank's partition was."""
        parameters = self._parameters
        written = _unequal([p._version for p in parameters], self._versions) | self._accessed()
        moved = _unequal([p.data_ptr() for p in parameters], self._addresses)
        partition_written: set[int] = set()
        # Whoever has taken over an edit records all weights as unedited, those of others too.
        look_at_samples |= bool(written | moved)
        samples = self._samples() if look_at_samples else self._partition_samples
        if look_at_samples and differ(samples, self._partition_samples):
            for sampler, now, before in zip(
                self._samplers, samples, self._partition_samples, strict=True
            ):
                partition_written |= sampler.owners_of(now != before)
        if not self._partitioned:
            return written | moved | partition_written, set()
        # ZeRO 3 itself frees and gathers parameters.
        written |= {i for i in moved if _is_whole(parameters[i])}
        partition_versions = [p.ds_tensor._version for p in parameters]
        partition_written |= _unequal(partition_versions, self._partition_versions)
        if [i for i, p in enumerate(parameters) if _is_whole(p)] != self._whole or differ(
            self._sample_whole(), self._whole_samples
        ):
            written |= {i for i, p in enumerate(parameters) if _is_whole(p)} - partition_written
        return written, partition_written

    def _accessed(self) -> set[int]:
        """Parameters whose ``.data`` was read, and may have been written to."""
        return {self._index[i] for i in self._access.seen} if self._access is not None else set()

    def _partitions(self) -> list[Tensor]:
        """This rank's flat partitions in the model's precision, laid out like the masters."""
        zero = self._zero
        if self._partitioned:
            return list(zero.fp16_partitioned_groups_flat)
        return [
            partitions[torch.distributed.get_rank(group=group)]
            for partitions, group in zip(
                zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group, strict=True
            )
        ]

    def _sample_whole(self) -> list[Tensor]:
        """Samples of the parameters that ZeRO 3 keeps whole because they are small."""
        return sample_each([self._parameters[i].detach() for i in self._whole], self._turn)

    # ---------------------------------------------------------------------------------- complaints

    def _replaced(self) -> list[str]:
        return [
            f"Parameter {one.name!r} was replaced by another object after training was set up, but"
            " ZeRO trains the original. Write into it instead: with torch.no_grad():"
            " parameter.copy_(values). load_state_dict() does so, unless assign=True."
            for owner, key, one in self._holders
            if _peek(owner, key) is not one.parameter
        ]

    def _frozen_or_unfrozen(self) -> list[str]:
        trainable = [p.requires_grad for p in self._parameters]
        if trainable == self._trainable:
            return []
        result = []
        for i in sorted(_unequal(trainable, self._trainable)):
            one = self._watched[i]
            if one.is_trained and not trainable[i]:
                result.append(
                    f"Parameter {one.name!r} was frozen (requires_grad=False) while training, but"
                    " momentum and weight decay would still change it. Freeze it before training"
                    " is set up (in __init__, configure_model or setup), or give it a group of its"
                    " own in the optimizer and set that group's lr to 0."
                )
            elif one.is_optimized and trainable[i]:
                result.append(
                    f"Parameter {one.name!r} was unfrozen (requires_grad=True) while training: ZeRO"
                    " left it out, as it was frozen when training was set up. Leave it trainable"
                    " from the start, in a group of its own whose lr is 0 until then."
                )
        return result

    def _complain_of_partition(self, one: _Watched, what: str) -> None:
        self._complaints[one.name] = refusal(one.name, what)

    # -------------------------------------------------------------------------------------- writing

    def _take_over(self, written: set[int], partition_written: set[int]) -> None:
        """Writes edited parameters, or this rank's edited partitions of them, to the masters."""
        names = {
            self._watched[i].name
            for i in written | partition_written
            if self._is_taken(i, i in written)
        }
        for flat in self._state.shard().flats if names else ():
            for fragment in flat.fragments:
                if fragment.name in names:
                    _write_through(self._weights(fragment), flat, fragment)

    def _is_taken(self, i: int, written: bool) -> bool:
        """Makes a parameter and this rank's partition of it agree; False if that is impossible."""
        one, parameter = self._watched[i], self._parameters[i]
        if not self._partitioned:
            return one.flat_offset is not None and self._put_back(one)
        if written and _is_whole(parameter):
            if parameter.shape != parameter.ds_shape:
                self._complain_of_shape(one, parameter.ds_shape)
                return False
            own = partition_of(parameter)
            partition = parameter.ds_tensor.detach().view(-1)[: own.length]
            partition.copy_(own.within(parameter.detach().reshape(-1)))
        return True

    def _put_back(self, one: _Watched) -> bool:
        """Moves a parameter whose ``.data`` was replaced back to its place in the flat buffer."""
        assert one.flat_offset is not None
        group, offset = one.flat_offset
        meta = next(
            m
            for p, m in zip(
                self._zero.round_robin_bit16_groups[group],
                self._zero.round_robin_bit16_meta[group],
                strict=True,
            )
            if p is one.parameter
        )
        if one.parameter.shape != meta.shape:
            self._complain_of_shape(one, meta.shape)
            return False
        flat = self._zero.bit16_groups_flat[group].detach()
        own = flat.narrow(0, offset, meta.numel()).view(meta.shape)
        if own.data_ptr() != one.parameter.data_ptr():
            own.copy_(one.parameter.detach())
            one.parameter.data = own
        return True

    def _complain_of_shape(self, one: _Watched, shape: Sequence[int]) -> None:
        self._complaints[one.name] = (
            f"Parameter {one.name!r} was assigned data of shape {list(one.parameter.shape)} while"
            f" training; its own shape is {list(shape)}. Write values of that shape."
        )

    def _weights(self, fragment: FlatFragment) -> Tensor:
        parameter = self._by_name[fragment.name]
        if self._partitioned:
            partition: Tensor = parameter.ds_tensor.detach().view(-1)
            return partition[: fragment.length]
        return fragment.within(parameter.detach().view(-1))

    @contextmanager
    def editing(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """See :meth:`FastMoEStrategy.edit_parameters`."""
        index = self._index
        chosen = list({id(p): p for p in parameters}.values())
        if any(id(p) not in index for p in chosen):
            raise ParameterEditError(
                "edit_parameters() was given a tensor that is not a parameter of the model being"
                " trained. Pass parameters of the LightningModule."
            )
        self.settle()
        gathered: list[Any] = []
        if self._partitioned:
            gathered = [p for p in chosen if not _is_whole(p)]
            for parameter in gathered:
                parameter.all_gather()
        try:
            yield
            with torch.no_grad():
                self._take_over({index[id(parameter)] for parameter in chosen}, set())
        finally:
            for parameter in gathered:
                parameter.partition()
            self.remember()


def _unequal(now: Sequence[Any], before: Sequence[Any]) -> set[int]:
    if now == before:
        return set()
    return {i for i, (a, b) in enumerate(zip(now, before, strict=True)) if a != b}


def _peek(parameters: dict[str, Any], key: str) -> nn.Parameter | None:
    """A module's parameter, without the gathering that a lookup triggers under ZeRO 3."""
    return dict.get(parameters, key)


def _is_whole(parameter: Any) -> bool:
    return bool(parameter.ds_status is ZeroParamStatus.AVAILABLE)


def _write_through(weights: Tensor, flat: FlatPartition, fragment: FlatFragment) -> None:
    """Writes only elements that differ: unchanged ones keep the master's precision."""
    master = flat.view(flat.master, fragment)
    weights = weights.to(master.device)
    is_same = master.to(weights.dtype) == weights
    master.copy_(torch.where(is_same, master, weights.to(master.dtype)))
