"""Lightning callbacks: schedules, router biases, partial training, monitoring and compression."""

from lightning_fastmoe.callbacks.capacity_schedule import CapacitySchedule
from lightning_fastmoe.callbacks.compression_error import CompressionErrorMonitor
from lightning_fastmoe.callbacks.expert_selection import select_experts
from lightning_fastmoe.callbacks.router_bias import RouterBiasBalancing
from lightning_fastmoe.callbacks.sparse_update import SparseUpdate
from lightning_fastmoe.monitoring.callbacks.co_activation import CoActivationMonitor
from lightning_fastmoe.monitoring.callbacks.expert_load import ExpertLoadMonitor
from lightning_fastmoe.monitoring.callbacks.summary import MoESummary
from lightning_fastmoe.monitoring.callbacks.throughput import ThroughputMonitor

__all__ = [
    "CapacitySchedule",
    "CoActivationMonitor",
    "CompressionErrorMonitor",
    "ExpertLoadMonitor",
    "MoESummary",
    "RouterBiasBalancing",
    "SparseUpdate",
    "ThroughputMonitor",
    "select_experts",
]
