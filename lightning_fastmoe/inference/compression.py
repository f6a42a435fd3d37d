"""The experts of one layer as int8 or int4: what is in host memory, and what they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.ops.group_quantization import (
    can_quantize,
    dequantize_groups,
    quantize_groups,
)
from lightning_fastmoe.planning.compressed import compressed_parameters


def check_finite(name: str, layer: ExpertLayer, bits: int) -> None:
    """Checks the weights that are to be compressed, before any is.

    Args:
        name: the layer's.
        layer: on the CPU.
        bits: of a value, 8 or 4.

    Raises:
        ConfigError: if one is NaN or infinite; names the parameter and the expert.
    """
    named = layer.experts.holder.named_parameters()
    for (path, parameter), chosen in zip(named, compressed_parameters(layer, bits), strict=True):
        if not chosen:
            continue
        stacked = layer.experts.is_stacked
        for number, weight in enumerate(parameter if stacked else parameter[None]):
            if not can_quantize(weight, bits):
                expert = layer.experts.local_ids[number] if stacked else path.split(".")[0]
                raise ConfigError(
                    f"Expert {expert} of {name} has values in {path} that are not finite, or round"
                    f" to what is not: int{bits} has no NaN and no infinity. Repair the weights, or"
                    " offload the experts without compression."
                )


def is_compressed(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a placeholder, whose weights are elsewhere."""
    return parameter.untyped_storage().nbytes() < parameter.nbytes


class CompressedWeight:
    """The weights of a parameter as integers and scales.

    Args:
        weight: on the CPU.
        bits: of a value, 8 or 4.
        device: computes.

    Attributes:
        codes: int8, as :func:`~lightning_fastmoe.ops.group_quantization.quantize_groups` gives it.
        scales: the same.
        placeholder: NaN in the shape and dtype of the weights, without memory.
    """

    def __init__(self, weight: Tensor, bits: int, device: torch.device) -> None:
        self._bits = bits
        self.codes, self.scales = quantize_groups(weight, bits, device)
        self.placeholder = torch.full((), torch.nan, dtype=weight.dtype).expand(weight.shape)

    def decompressed(self) -> Tensor:
        """The weights on the CPU, in new memory."""
        out = torch.empty(self.placeholder.shape, dtype=self.placeholder.dtype)
        dequantize_groups(self.codes, self.scales, out, self._bits)
        return out


class CompressedExperts:
    """The tensors of a layer's experts, of which some have been compressed.

    While they are, the parameters have their shapes and dtypes, but no memory, and the module
    refuses ``state_dict`` and ``load_state_dict``.

    Args:
        name: the layer's, for errors.
        module: has the parameters.
        parameters: on the CPU. Each gives its memory away before the next is compressed.
        host: their tensors; those that are compressed become placeholders in this list, too.
        bits: of a value, 8 or 4.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        host: list[Tensor],
        bits: int,
    ) -> None:
        self._name, self._bits = name, bits
        self._parameters, self._host = parameters, host
        self._weights: dict[int, CompressedWeight] = {}
        self._guards = _guards(module, self.refuse)
        self._versions = self._changes()

    def compress(self, chosen: Sequence[bool], device: torch.device) -> None:
        """Compresses some of the parameters; after an error, :meth:`restore` undoes what was done.

        Args:
            chosen: which of them.
            device: computes.
        """
        for number, parameter in enumerate(self._parameters):
            if chosen[number]:
                weight = CompressedWeight(self._host[number], self._bits, device)
                self._weights[number] = weight
                self._host[number] = parameter.data = weight.placeholder
        self._versions = self._changes()

    @property
    def parts(self) -> list[Tensor]:
        """What is in host memory: of each parameter its tensor, or values and scales."""
        parts: list[Tensor] = []
        for number, tensor in enumerate(self._host):
            weight = self._weights.get(number)
            parts += [tensor] if weight is None else [weight.codes, weight.scales]
        return parts

    def decompress(self, parts: Sequence[Tensor], out: Sequence[Tensor], scratch: Tensor) -> None:
        """Writes the experts' tensors.

        Args:
            parts: copies of :attr:`parts` on the device.
            out: one for each parameter, there.
            scratch: int8, as long as :func:`compression_scratch` says, there.
        """
        coming = iter(parts)
        for number, own in enumerate(out):
            if number in self._weights:
                dequantize_groups(next(coming), next(coming), own, self._bits, scratch)
            else:
                own.copy_(next(coming))

    def check_unchanged(self) -> None:
        """Refuses weights that have been changed in place, of which nothing is left.

        Raises:
            ConfigError: if one was.
        """
        if self._changes() != self._versions:
            self.refuse("changed in place")

    def restore(self) -> None:
        """The parameters have memory again, with the rounded values."""
        for guard in self._guards:
            guard.remove()
        for number, weight in list(self._weights.items()):
            parameter = self._parameters[number]
            if _is_placeholder(parameter, weight.placeholder):
                parameter.data = weight.decompressed().to(parameter.device, parameter.dtype)
            del self._weights[number]

    def refuse(self, what: str) -> NoReturn:
        """Refuses what compressed weights can't be.

        Args:
            what: ``"saved"``, for example.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"The weights of {self._name} can't be {what} while they are compressed to"
            f" int{self._bits}: what they were rounded from is gone. Do that before the experts are"
            " offloaded, or close what offload_experts returned, which leaves rounded weights."
        )

    def _changes(self) -> list[int]:
        parameters = [self._parameters[number] for number in self._weights]
        return [0 if p.is_inference() else p._version for p in parameters]


def _guards(module: nn.Module, refuse: Any) -> list[RemovableHandle]:
    """Makes a module and its parts refuse to be saved or loaded."""

    def saving(*_: Any) -> None:
        refuse("saved")

    def loading(*_: Any) -> None:
        refuse("loaded")

    handles = []
    for part in module.modules():
        handles.append(part.register_state_dict_pre_hook(saving))
        handles.append(part.register_load_state_dict_pre_hook(loading))
    return handles


def _is_placeholder(parameter: nn.Parameter, placeholder: Tensor) -> bool:
    """Whether a parameter is the placeholder, or what a conversion has made of it."""
    if parameter.data_ptr() == placeholder.data_ptr():
        return True
    return parameter.shape == placeholder.shape and bool(parameter.isnan().all())
