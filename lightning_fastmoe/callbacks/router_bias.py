"""RouterBiasBalancing: load balancing without an auxiliary loss."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import Router, moe_layers


class RouterBiasBalancing(pl.Callback):
    """Updates each router's balance bias towards even loads, once per optimizer step.

    ``bias[e] += rate * sign(mean load - load[e])``, with the loads of the step counted over all
    ranks and micro-batches (Wang et al. 2024, "Auxiliary-loss-free load balancing"; DeepSeek-V3).
    Dropped tokens count, masked ones don't, and replays by activation checkpointing don't count
    again. The bias affects only the choice of experts and gets no gradient. It is a buffer of the
    router, so checkpoints include it. One all-reduce per step, for any number of layers.

    Usually combined with ``MoE(..., router="sigmoid", load_balancing=0)``; "softmax" needs
    ``router_options={"balance_bias": True}``.

    Args:
        rate: size of an update; 0.001 in DeepSeek-V3. Set the attribute to 0 to freeze the bias, as
            DeepSeek-V3 does at the end of training.

    Raises:
        ConfigError: if ``rate`` is negative or not finite; at the start of a fit, if no router of
            the model has a balance bias.
    """

    def __init__(self, rate: float = 0.001) -> None:
        if not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"rate={rate!r} is invalid: it must be finite and at least 0.")
        self.rate = rate
        self._routers: list[Router] = []
        self._step = 0
        self._restored_step: int | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        routers = [layer.router for _, layer in moe_layers(pl_module)]
        self._routers = [
            r for r in routers if isinstance(r, Router) and r.load_since_update is not None
        ]
        if not self._routers:
            raise ConfigError(
                "RouterBiasBalancing found no router with a balance bias. Use"
                " MoE(router='sigmoid'), or router_options={'balance_bias': True}."
            )
        for router in self._routers:
            _load(router).zero_()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in on_fit_start: the checkpoint is restored after it, with the step and the counts of
        # a partially accumulated step.
        self._step, restored = trainer.global_step, self._restored_step
        self._restored_step = None
        if restored is not None and restored != self._step:
            self.move()  # the checkpoint was saved between a step and its update of the bias

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            engine = getattr(trainer.strategy, "deepspeed_engine", None)
            if getattr(engine, "has_dropped_step", False):
                self._forget()
            else:
                self.move()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_step = state_dict["step"]

    @torch.no_grad()
    def move(self) -> None:
        """Updates the biases by the loads since the last call; all ranks must call this."""
        loads = torch.cat([_load(router) for router in self._routers])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loads)
        sizes = [router.num_experts for router in self._routers]
        for router, load in zip(self._routers, loads.split(sizes), strict=True):
            assert router.balance_bias is not None
            error = load.double().mean() - load.double()
            router.balance_bias += self.rate * torch.sign(error).to(router.balance_bias.dtype)
        self._forget()

    def _forget(self) -> None:
        """Drops the loads since the last update: of a step, or of one that was not taken."""
        for router in self._routers:
            _load(router).zero_()


def _load(router: Router) -> Tensor:
    assert router.load_since_update is not None
    return router.load_since_update
