"""Lightning callbacks."""

from lightning_fastmoe.callbacks.expert_load import ExpertLoadMonitor
from lightning_fastmoe.callbacks.router_bias import RouterBiasBalancing

__all__ = ["ExpertLoadMonitor", "RouterBiasBalancing"]
