"""Scoring and generating with models whose experts do not fit on the GPU."""

from lightning_fastmoe.inference.offload import OffloadedExperts, offload_experts

__all__ = ["OffloadedExperts", "offload_experts"]
