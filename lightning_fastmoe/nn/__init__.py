"""torch.nn modules. No Lightning, no DeepSpeed."""

from lightning_fastmoe.nn.dispatcher import Dispatcher, LocalDispatcher
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.moe import MoE, moe_layers, moe_losses
from lightning_fastmoe.nn.router import Routing, SoftmaxTopKRouter

__all__ = [
    "Dispatcher",
    "Experts",
    "LocalDispatcher",
    "MoE",
    "Routing",
    "SoftmaxTopKRouter",
    "moe_layers",
    "moe_losses",
]
