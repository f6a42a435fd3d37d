"""torchmetrics metrics of routing and expert load."""

from lightning_fastmoe.monitoring.metrics.expert_load import ExpertLoad
from lightning_fastmoe.monitoring.metrics.formulas import (
    dead_experts,
    drop_rate,
    load_cv,
    load_ratio,
)
from lightning_fastmoe.monitoring.metrics.routing import (
    DeadExperts,
    DropRate,
    ExpertCoActivation,
    LoadCV,
    LoadRatio,
    RouterConfidence,
    RouterEntropy,
    RoutingMetric,
)

__all__ = [
    "DeadExperts",
    "DropRate",
    "ExpertCoActivation",
    "ExpertLoad",
    "LoadCV",
    "LoadRatio",
    "RouterConfidence",
    "RouterEntropy",
    "RoutingMetric",
    "dead_experts",
    "drop_rate",
    "load_cv",
    "load_ratio",
]
