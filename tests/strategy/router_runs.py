"""Training with each router under FastMoEStrategy, and a plain twin on one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from strategy.models import (
    D_FFN,
    D_IN,
    D_MODEL,
    Case,
    Net,
    RankBatches,
    Trace,
    make_optimizer,
    make_scheduler,
    optimizer_steps,
)
from strategy.tracing import Tracer, global_losses, make_trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_fastmoe import MoE, RouterBiasBalancing, moe_losses
from lightning_fastmoe.nn import moe_layers
from lightning_fastmoe.nn.global_batch import LocalBatch


@dataclass(frozen=True)
class RouterCase(Case):
    """A run whose layers have these arguments besides the usual ones.

    Attributes:
        moe: arguments of each layer.
        whole: the twin sees the tokens of all ranks in one pass; else those of one rank at a time.
        bias_rate: of RouterBiasBalancing; 0 leaves it out.
        recompute: activation checkpointing of the layers, by "torch" or "deepspeed".
    """

    moe: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    bias_rate: float = 0.0
    recompute: str = ""


class Expert(nn.Module):
    """An expert of one's own, of any inner width."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


class Different(Expert):
    """Experts whose widths depend on how many were built: a list of different modules."""


def build(case: RouterCase) -> nn.ModuleDict:
    """A residual network with two MoE layers of different sizes."""
    moes = []
    for experts in case.num_experts:
        arguments = dict(case.moe)
        if arguments.get("expert") == "list":
            arguments["expert"] = [Expert(D_MODEL, 4 + 3 * i) for i in range(experts)]
        elif arguments.get("expert") == "class":
            arguments["expert"] = Expert
        moes.append(MoE(D_MODEL, D_FFN, experts, **arguments))
    return nn.ModuleDict(
        {
            "embed": nn.Linear(D_IN, D_MODEL),
            "norms": nn.ModuleList(nn.LayerNorm(D_MODEL) for _ in moes),
            "moes": nn.ModuleList(moes),
            "head": nn.Linear(D_MODEL, 1),
        }
    )


def loss_of(net: nn.ModuleDict, batch: Tensor, recompute: str = "") -> Tensor:
    """Mean squared error against a fixed function of the inputs ``(B, T, D_IN)``."""
    h = net["embed"](batch)
    ids = (batch.abs().sum(dim=-1) * 1000).long()
    for norm, layer in zip(net["norms"], net["moes"], strict=True):

        def block(x: Tensor, norm: nn.Module = norm, layer: nn.Module = layer) -> Tensor:
            y: Tensor = x + layer(norm(x), token_ids=ids)
            return y

        if recompute == "torch":
            h = checkpoint(block, h, use_reentrant=False)
        elif recompute == "deepspeed":
            from deepspeed.runtime.activation_checkpointing import checkpointing

            h = checkpointing.checkpoint(block, h)
        else:
            h = block(h)
    target = torch.sin(3 * batch.sum(-1, keepdim=True))
    return (net["head"](h) - target).square().mean()


class RouterNet(Net):
    """The network as a user would write it."""

    case: RouterCase

    def __init__(self, case: RouterCase) -> None:
        pl.LightningModule.__init__(self)  # Net's would draw other weights first
        self.case, self.batch_losses = case, []
        self.routed: list[list[Tensor]] = [[] for _ in case.num_experts]
        self.net = None if case.in_configure_model else build(case)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = build(self.case)
        for seen, (_, layer) in zip(self.routed, moe_layers(self.net), strict=True):
            layer.register_routing_observer(
                lambda _, routing, seen=seen: seen.append(
                    torch.stack([routing.routed_counts(), routing.kept_counts()])
                )
            )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch, self.case.recompute)
        self.batch_losses.append(loss.item())
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank = self.trainer.global_rank
        micros = [micro[rank] for step in optimizer_steps(self.case) for micro in step]
        return DataLoader(RankBatches(torch.stack(micros)), batch_size=None)


@dataclass
class Routed:
    """What a run did, and its routers' buffers and counts.

    Attributes:
        counts: per layer (2, E): pairs routed and kept in all.
    """

    trace: Trace
    buffers: dict[str, Tensor]
    counts: list[Tensor]


def run(case: RouterCase) -> Routed:
    """Trains ``case`` on this rank."""
    pl.seed_everything(7, verbose=False)
    module, tracer = RouterNet(case), Tracer()
    callbacks: list[Any] = [tracer]
    if case.bias_rate:
        callbacks.append(RouterBiasBalancing(case.bias_rate))
    trainer = make_trainer(case, callbacks=callbacks)
    trainer.fit(module)
    trace = tracer.trace
    trace.losses = global_losses(module, case, trainer.strategy.root_device)
    for _, layer in moe_layers(module):
        assert type(layer.batch) is LocalBatch, "the strategy must give its groups back"
    return Routed(trace, buffers_of(module.net), [torch.stack(s).sum(0) for s in module.routed])


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers that checkpoints hold."""
    saved = net.state_dict().keys()
    return {name: b.clone() for name, b in net.named_buffers() if name in saved}


class OtherNode(LocalBatch):
    """The view of one rank of ``ranks``, each on a node of its own."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._place, self._ranks = rank, ranks

    def near_experts(self, num_experts: int) -> Tensor:
        each = num_experts // self._ranks
        return torch.arange(num_experts) // each == self._place


def twin(case: RouterCase) -> Routed:
    """One process, plain PyTorch, terms added by hand."""
    pl.seed_everything(7, verbose=False)
    net = build(case)
    optimizer = make_optimizer(net)
    scheduler = make_scheduler(optimizer)
    trace = Trace()
    layers = [layer for _, layer in moe_layers(net)]
    seen: list[list[Tensor]] = [[] for _ in layers]
    for layer, mine in zip(layers, seen, strict=True):
        layer.register_routing_observer(
            lambda _, routing, mine=mine: mine.append(
                torch.stack([routing.routed_counts(), routing.kept_counts()])
            )
        )
    for step in optimizer_steps(case):
        optimizer.zero_grad()
        mean = 0.0
        before = [len(mine) for mine in seen]
        for micro in step:
            parts = [micro.flatten(0, 1)] if case.whole else list(micro)
            for rank, part in enumerate(parts):
                for layer in layers:
                    layer.batch = OtherNode(rank, case.nodes)
                loss = loss_of(net, part)
                share = 1 / (len(parts) * len(step))
                mean += loss.item() * share
                ((loss + sum(moe_losses(net).values())) * share).backward()
        if not trace.gradients:
            trace.gradients = {
                n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None
            }
        trace.losses.append(mean)
        trace.norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), case.clip)))
        optimizer.step()
        scheduler.step()
        if case.bias_rate:
            for layer, mine, start in zip(layers, seen, before, strict=True):
                load = torch.stack(mine[start:])[:, 0].sum(dim=0).double()
                layer.router.balance_bias += case.bias_rate * torch.sign(load.mean() - load)
        trace.weights.append({n: p.detach().clone() for n, p in net.named_parameters()})
    return Routed(trace, buffers_of(net), [torch.stack(mine).sum(dim=0) for mine in seen])


class Resumable(RouterNet):
    """One optimizer step per epoch, so that any epoch's end is a point to resume from."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        step = optimizer_steps(self.case)[self.trainer.current_epoch]
        return DataLoader(RankBatches(step[:, self.trainer.global_rank]), batch_size=None)


def fit_and_resume(case: RouterCase, directory: str) -> tuple[list[Any], list[Any]]:
    """Losses and buffers of one whole run, and of one that was cut in two."""

    def fit(epochs: int, path: str | None) -> tuple[Any, list[Any]]:
        pl.seed_everything(7, verbose=False)
        module = Resumable(case)
        trainer = make_trainer(
            case,
            callbacks=[RouterBiasBalancing(case.bias_rate)] if case.bias_rate else [],
            max_steps=-1,
            max_epochs=epochs,
            reload_dataloaders_every_n_epochs=1,
        )
        trainer.fit(module, ckpt_path=path)
        return trainer, [module.batch_losses, buffers_of(module.net)]

    _, whole = fit(case.steps, None)
    trainer, first = fit(case.steps // 2, None)
    trainer.save_checkpoint(directory)
    _, second = fit(case.steps, directory)
    return whole, [first[0] + second[0], second[1]]


def leave_out(case: RouterCase, rank: int, layer: int) -> None:
    """Trains; one rank leaves a layer out, as a forward pass that depends on the data may do."""

    class Uneven(RouterNet):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            net = nn.ModuleDict(dict(self.net.items()))
            if self.trainer.global_rank == rank:
                moes = [m for i, m in enumerate(net["moes"]) if i != layer]
                net["moes"] = nn.ModuleList(moes)
                net["norms"] = nn.ModuleList(net["norms"][: len(moes)])
            return loss_of(net, batch)

    pl.seed_everything(7, verbose=False)
    make_trainer(case).fit(Uneven(case))
