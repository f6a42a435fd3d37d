"""Routers: modules that choose experts. One file per family."""

from lightning_fastmoe.nn.router.balanced import BaseRouter, SinkhornRouter
from lightning_fastmoe.nn.router.cosine import CosineTopKRouter
from lightning_fastmoe.nn.router.expert_choice import ExpertChoiceRouter
from lightning_fastmoe.nn.router.gshard import DCRouter, GShardRouter
from lightning_fastmoe.nn.router.hashed import HashRouter
from lightning_fastmoe.nn.router.interface import LinearRouter, Router, any_dtype
from lightning_fastmoe.nn.router.losses import (
    global_load_balancing_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    loss_value,
    sequence_load_balancing_loss,
    z_loss,
)
from lightning_fastmoe.nn.router.noisy import NoisyTopKRouter
from lightning_fastmoe.nn.router.routing import Routing, RoutingContext
from lightning_fastmoe.nn.router.sigmoid import SigmoidTopKRouter
from lightning_fastmoe.nn.router.soft import SoftRouter
from lightning_fastmoe.nn.router.softmax import SoftmaxTopKRouter
from lightning_fastmoe.nn.router.swipe import SwipeRouter
from lightning_fastmoe.nn.router.switch import SwitchRouter
from lightning_fastmoe.nn.router.topology import TopologyAwareRouter

ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxTopKRouter,
    "noisy": NoisyTopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "sigmoid": SigmoidTopKRouter,
    "cosine": CosineTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "soft": SoftRouter,
    "hash": HashRouter,
    "base": BaseRouter,
    "sinkhorn": SinkhornRouter,
    "swipe": SwipeRouter,
    "dc": DCRouter,
    "topology": TopologyAwareRouter,
}
"""Routers by the name that ``MoE(router=...)`` takes."""

__all__ = [
    "ROUTERS",
    "BaseRouter",
    "CosineTopKRouter",
    "DCRouter",
    "ExpertChoiceRouter",
    "GShardRouter",
    "HashRouter",
    "LinearRouter",
    "NoisyTopKRouter",
    "Router",
    "Routing",
    "RoutingContext",
    "SigmoidTopKRouter",
    "SinkhornRouter",
    "SoftRouter",
    "SoftmaxTopKRouter",
    "SwipeRouter",
    "SwitchRouter",
    "TopologyAwareRouter",
    "any_dtype",
    "global_load_balancing_loss",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "loss_value",
    "sequence_load_balancing_loss",
    "z_loss",
]
