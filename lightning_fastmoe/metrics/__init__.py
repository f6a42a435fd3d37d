"""torchmetrics metrics of routing and expert load; public path of ``monitoring.metrics``."""

from lightning_fastmoe.monitoring.metrics import (
    DeadExperts,
    DropRate,
    ExpertCoActivation,
    ExpertLoad,
    LoadCV,
    LoadRatio,
    RouterConfidence,
    RouterEntropy,
    RoutingMetric,
    dead_experts,
    drop_rate,
    load_cv,
    load_ratio,
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
