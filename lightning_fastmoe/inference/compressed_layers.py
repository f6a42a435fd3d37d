"""Experts that wait in host memory as int8 or int4 and are decompressed on the GPU.

The ring copies the compressed tensors of a layer, half or a quarter of the bytes. The stream that
computes decompresses them into one workspace, right before the layer runs, and gives the ring's
slot back at once: with two slots, the copy stream always has something to copy, and the GPU holds
the whole weights of one layer, however many slots there are. Decompressing on the copy stream would
leave the link idle meanwhile, and take whole weights for each slot.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.compression import CompressedExperts, check_finite
from lightning_fastmoe.inference.layer import OffloadedLayer
from lightning_fastmoe.inference.ring import Stack
from lightning_fastmoe.ops.group_quantization import bits_of
from lightning_fastmoe.planning.compressed import compressed_parameters, compression_scratch

CPU = torch.device("cpu")


class CompressedLayers:
    """Compresses the experts of layers, and decompresses those of one at a time.

    Args:
        layers: whose experts pass through a ring; at least one.
        compression: a name of :data:`~lightning_fastmoe.ops.group_quantization.BITS`.

    Attributes:
        workspace_bytes: device memory for the decompressed experts of one layer.
    """

    def __init__(self, layers: Sequence[OffloadedLayer], compression: str) -> None:
        self._layers, self._compression = layers, compression
        self._memory = self._scratch = torch.empty(0)
        self._device = CPU
        self._free: Any = None
        self.workspace_bytes = 0

    def compress(self, device: torch.device) -> None:
        """Compresses layer by layer, so that host memory only falls; then makes the workspace.

        Args:
            device: computes, here and later.

        Raises:
            ConfigError: before anything is compressed, if nothing would be, or a weight is not
                finite.
        """
        bits = bits_of(self._compression)
        found = [one.layer for one in self._layers if one.layer is not None]
        if not any(any(compressed_parameters(layer, bits)) for layer in found):
            dtypes = sorted({str(p.dtype) for p in self._layers[0].parameters})
            raise ConfigError(
                f"compression={self._compression!r} would make no weight of {self._layers[0].name}"
                f" smaller ({', '.join(dtypes)}): those in 4 bits, as of quantize_experts, are"
                " offloaded as they are. Leave it out."
            )
        for one in self._layers:
            assert one.layer is not None
            check_finite(one.name, one.layer, bits)
        scratch = 0
        for one in self._layers:
            assert one.layer is not None
            chosen = compressed_parameters(one.layer, bits)
            # Known to the layer first, so that closing restores what an error has interrupted.
            one.compressed = CompressedExperts(one.name, one.module, one.parameters, one.host, bits)
            one.compressed.compress(chosen, device if device.type == "cuda" else CPU)
            scratch = max(scratch, compression_scratch(one.layer, bits))
        size = max(Stack(one.host).slot_bytes for one in self._layers)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(scratch, dtype=torch.int8, device=device)
        self._free = torch.cuda.Event() if device.type == "cuda" else None
        self._device = device
        self.workspace_bytes = size + scratch

    def decompress(self, number: int, parts: Sequence[Tensor]) -> list[Tensor]:
        """Decompresses a layer's experts, after the layer before has been computed.

        Args:
            number: the layer's.
            parts: copies of what it has in host memory, on the device.

        Returns:
            The tensors that it computes with, until :meth:`release`.
        """
        layer = self._layers[number]
        assert layer.compressed is not None
        if self._free is not None:  # by another stream, if passes run on several
            self._free.wait(torch.cuda.current_stream(self._device))
        tensors = Stack(layer.host).views(self._memory)
        layer.compressed.decompress(parts, tensors, self._scratch)
        return tensors

    def release(self) -> None:
        """The layer has been computed, or will have been by the current stream."""
        if self._free is not None:
            self._free.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Gives the parameters memory again, with the rounded weights, and warns of them."""
        rounded = [one for one in self._layers if one.compressed is not None]
        for one in rounded:
            compressed, one.compressed = one.compressed, None
            assert compressed is not None
            compressed.restore()
        if rounded:
            warnings.warn(
                f"The experts' weights are what {self._compression} has left of them. Load the"
                " model again before you train or save it.",
                stacklevel=3,
            )
