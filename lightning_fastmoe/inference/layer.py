"""A layer whose parameters are in host memory, and elsewhere while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.compression import CompressedExperts
from lightning_fastmoe.inference.ring import Stack
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.experts.routed_call import RoutedCall


class OffloadedLayer:
    """The experts of one layer: parameters in host memory, swapped for a slot's while they compute.

    Args:
        module: computes with the parameters.
        parameters: on the CPU.
        experts: tell what a call of the module reads, if each parameter is a stack of them.
        reads_all: whether any call does, as those of soft routing and expert choice do.
        name: the layer's, for errors.
        layer: as the model sees it; needed to compress.

    Attributes:
        host: the parameters' tensors on the CPU.
        compressed: what holds those that are placeholders in ``host``.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        experts: Experts | None = None,
        reads_all: bool = False,
        name: str = "",
        layer: ExpertLayer | None = None,
    ) -> None:
        self._reads_all = reads_all
        self.module, self.parameters, self.experts = module, parameters, experts
        self.name, self.layer = name, layer
        self.compressed: CompressedExperts | None = None
        self.host = [parameter.data for parameter in parameters]
        self._placed: Sequence[torch.Tensor] = self.host
        self.hook: RemovableHandle | None = None  # that runs before the module
        self._holds_all = True
        self._placed_at = self.version()

    @property
    def stored(self) -> list[torch.Tensor]:
        """What is in host memory."""
        return self.host if self.compressed is None else self.compressed.parts

    @property
    def bytes(self) -> int:
        """Of what is in host memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored)

    def version(self) -> tuple[int, ...]:
        """Changes when a parameter is changed in place."""
        return tuple(0 if p.is_inference() else p._version for p in self.parameters)

    def stacks(self, groups: int) -> list[Stack]:
        """What a ring copies: all experts, or groups of them."""
        if self.experts is None or self.compressed is not None:  # then experts are decompressed
            return [Stack(self.stored, self.version)]
        ends = self.ends(groups)
        parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        return [
            Stack(
                [tensor[part] for tensor in self.host],
                self.version,
                0 if self._reads_all else part.stop - part.start,
            )
            for part in parts
        ]

    def ends(self, groups: int) -> list[int]:
        """Where groups of experts end."""
        assert self.experts is not None
        return [self.experts.num_experts * (group + 1) // groups for group in range(groups)]

    def call(self, arguments: tuple[Any, ...]) -> RoutedCall | None:
        """What a call of the module reads; None if that may be everything.

        It may if hooks of others come after ours, which may choose other experts.
        """
        last = next(reversed(self.module._forward_pre_hooks), None)
        if self.experts is None or self.hook is None or last != self.hook.id:
            return None
        return self.experts.routed_call(arguments)

    def put(self, tensors: Sequence[torch.Tensor], holds_all: bool = True) -> None:
        """The parameters are these tensors, until :meth:`take_back`.

        Args:
            tensors: in the order of the parameters.
            holds_all: whether every expert is in them.
        """
        own = list(self.module.parameters())
        kept = len(own) == len(self.parameters) and all(map(is_, own, self.parameters))
        if not kept or not all(map(_is, self.parameters, self.host)):
            raise ConfigError(
                f"The parameters of {type(self.module).__name__} have been moved, converted or"
                " replaced since they were offloaded: do that before, or close what"
                " offload_experts returned, and offload them again."
            )
        if self.compressed is not None:
            self.compressed.check_unchanged()
        self._placed, self._placed_at, self._holds_all = tensors, self.version(), holds_all
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    def take_back(self) -> bool:
        """The parameters are in host memory, also what has changed them in place meanwhile.

        Returns:
            False if such a change is lost, because only some of the experts were there.
        """
        placed, self._placed = self._placed, self.host
        for parameter, tensor, host in zip(self.parameters, placed, self.host, strict=True):
            if _is(parameter, tensor):  # else it has been given other memory, and keeps it
                parameter.data = host
        changed = placed is not self.host and self.version() != self._placed_at
        if changed and self.compressed is not None:
            self.compressed.refuse("changed in place")
        if changed and self._holds_all:
            for tensor, host in zip(placed, self.host, strict=True):
                host.copy_(tensor)
        return self._holds_all or not changed


def _is(parameter: nn.Parameter, tensor: torch.Tensor) -> bool:
    """Whether a parameter is in the memory of a tensor."""
    return (
        parameter.data_ptr() == tensor.data_ptr()
        and parameter.device == tensor.device
        and parameter.dtype == tensor.dtype
        and parameter.shape == tensor.shape
    )
