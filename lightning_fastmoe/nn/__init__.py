"""torch.nn modules. No Lightning, no DeepSpeed."""

from lightning_fastmoe.nn.collect import moe_layers, moe_losses
from lightning_fastmoe.nn.dispatcher import Dispatcher, LocalDispatcher
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.moe import MoE
from lightning_fastmoe.nn.moe_options import CausalityWarning
from lightning_fastmoe.nn.router import Router, Routing, RoutingContext, SoftmaxTopKRouter

__all__ = [
    "CausalityWarning",
    "Dispatcher",
    "Experts",
    "LocalDispatcher",
    "MoE",
    "Router",
    "Routing",
    "RoutingContext",
    "SoftmaxTopKRouter",
    "moe_layers",
    "moe_losses",
]
