"""Lightning callbacks."""

from lightning_fastmoe.callbacks.expert_load import ExpertLoadMonitor

__all__ = ["ExpertLoadMonitor"]
