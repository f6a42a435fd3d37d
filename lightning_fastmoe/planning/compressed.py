"""Which of a layer's parameters are compressed to int8 or int4, and what they take then."""

from __future__ import annotations

from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.nn.experts.lora import LORA_A, LORA_B
from lightning_fastmoe.ops.group_quantization import SCALE_DTYPES, quantized_bytes, scratch_bytes

_SMALL = 4
"""A tensor with fewer elements than a quarter of the layer's largest is not compressed."""


def compressed_parameters(layer: ExpertLayer, bits: int) -> list[bool]:
    """Which of the parameters of a layer's experts are compressed.

    Those are matrices of floating dtypes, unless they would take more memory. Biases and adapters
    keep their bits: they are small, and an error in them is one of every token.

    Args:
        layer: on any device.
        bits: of a value, 8 or 4.

    Returns:
        An entry for each parameter of ``layer.experts.holder``, in order.
    """
    experts = layer.experts
    named = list(experts.holder.named_parameters())
    largest = max((parameter.numel() for _, parameter in named), default=0)
    names = set(experts.stack_names)
    return [
        parameter.dtype in SCALE_DTYPES
        and not path.endswith((LORA_A, LORA_B))
        and (path in names and parameter.dim() >= 3 if experts.is_stacked else parameter.dim() >= 2)
        and _SMALL * parameter.numel() >= largest
        and quantized_bytes(parameter.shape, parameter.dtype, bits) < parameter.nbytes
        for path, parameter in named
    ]


def compressed_bytes(layer: ExpertLayer, bits: int) -> int:
    """Bytes of a layer's experts once they are compressed; it may be on the meta device."""
    parameters = layer.experts.holder.parameters()
    return sum(
        quantized_bytes(parameter.shape, parameter.dtype, bits) if chosen else parameter.nbytes
        for parameter, chosen in zip(parameters, compressed_parameters(layer, bits), strict=True)
    )


def compression_scratch(layer: ExpertLayer, bits: int) -> int:
    """Bytes that decompressing a layer takes beside its weights and what they come from."""
    parameters = layer.experts.holder.parameters()
    chosen = zip(parameters, compressed_parameters(layer, bits), strict=True)
    return max((scratch_bytes(p.shape, bits) for p, is_chosen in chosen if is_chosen), default=0)
