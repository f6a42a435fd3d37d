"""A Transformer-XL over bytes whose feed-forward layers are mixtures of experts, and its data."""

from lightning_fastmoe.demos.transformer_xl.attention import RelativeAttention
from lightning_fastmoe.demos.transformer_xl.data import ByteStreams, Segment, SegmentLoader
from lightning_fastmoe.demos.transformer_xl.memory import Memory
from lightning_fastmoe.demos.transformer_xl.model import TransformerXL

__all__ = [
    "ByteStreams",
    "Memory",
    "RelativeAttention",
    "Segment",
    "SegmentLoader",
    "TransformerXL",
]
