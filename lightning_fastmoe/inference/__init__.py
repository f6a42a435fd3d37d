"""Scoring and generating with models whose experts do not fit on the GPU."""

from lightning_fastmoe.inference.compression_meter import CompressionErrors, compression_error
from lightning_fastmoe.inference.offload import OffloadedExperts, offload_experts

__all__ = ["CompressionErrors", "OffloadedExperts", "compression_error", "offload_experts"]
