"""Each router, capacity and loss on 2 and 4 ranks trains to the numbers of one plain process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.exactness import assert_same
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
from lightning_fastmoe.nn.router import ROUTERS
from lightning_fastmoe.nn.router.losses import LOSSES
from lightning_fastmoe.testing import RankError


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


NOTHING = {"load_balancing": 0.0, "z_loss": 0.01}
"""Losses whose global value is the mean over ranks."""

WHOLE = {
    # The twin sees all ranks' tokens at once: what is drawn and chosen must not depend on ranks.
    "noisy": {"router": "noisy", "router_options": {"init_std": 0.5}, "importance": 0, "load": 0},
    "switch": {"router": "switch", "router_options": {"jitter": 0.2}, **NOTHING},
    "dc": {"router": "dc", **NOTHING},
    "sigmoid": {
        "router": "sigmoid",
        "router_options": {"num_groups": 4, "limit_groups": 2},
        "load_balancing": 0,
        "sequence_balancing": 0.3,
    },
    "cosine": {
        "router": "cosine",
        # On a circle, the default for 4 experts, gradients are small differences of large numbers.
        "router_options": {"d_router": 8},
        **NOTHING,
        "global_balancing": 0.3,
    },
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.5},
    "soft": {"router": "soft", "router_options": {"slots_per_expert": 2}},
    "hash": {"router": "hash", "top_k": 2},
    "swipe": {"router": "swipe", "router_options": {"num_groups": 4}, **NOTHING},
    "base": {"router": "base", "router_options": {"over": "global"}},
    "sinkhorn": {"router": "sinkhorn", "router_options": {"over": "global"}, "top_k": 2},
    "capacity by position": {"capacity_factor": 0.7, "capacity_over": "global", **NOTHING},
    "capacity by score": {
        "capacity_factor": 0.7,
        "capacity_over": "global",
        "drop_by": "score",
        **NOTHING,
    },
    "bias": {"router": "softmax", "router_options": {"balance_bias": True}, **NOTHING},
    "modules": {"expert": "class", "capacity_factor": 0.9, "capacity_over": "global", **NOTHING},
    "different modules": {"expert": "list", **NOTHING},
    "shared": {"shared_expert": 6, "shared_expert_gate": True, **NOTHING},
    "clamped": {"activation": "clamped_swiglu", "bias": True, **NOTHING},
}

BY_RANK = {
    # What these do depends on the tokens of one rank by definition.
    "softmax": {"capacity_factor": 0.8, "drop_by": "score", "importance": 0.2},
    "noisy, its losses": {"router": "noisy", "router_options": {"init_std": 0.5}},
    "gshard": {"router": "gshard"},
    "expert choice by rank": {"router": "expert_choice", "router_options": {"over": "rank"}},
    "base by rank": {"router": "base"},
    "sinkhorn by rank": {"router": "sinkhorn", "top_k": 2},
    "topology": {"router": "topology", "router_options": {"outgoing_fraction": 0.4}, "top_k": 2},
}


def acting(moe: dict) -> set[str]:
    """The losses of a layer with these arguments."""
    usual = ROUTERS[moe.get("router", "softmax")].default_losses
    return {n for n in LOSSES if moe.get(n, LOSSES[n].coefficient if n in usual else 0)}


# What has no line above is run as it comes.
LISTED = [*WHOLE.values(), *BY_RANK.values()]
WHOLE |= {
    name: {"router": name, **{loss: NOTHING.get(loss, 0.0) for loss in cls.default_losses}}
    for name, cls in ROUTERS.items()
    if name not in {moe.get("router", "softmax") for moe in LISTED}
}
for name in LOSSES.keys() - set().union(*map(acting, LISTED)):
    (WHOLE if LOSSES[name].uses_batch else BY_RANK)[name] = {**NOTHING, name: 0.2}


def make(name: str, world: int, **kwargs) -> RouterCase:
    whole = name in WHOLE
    moe = (WHOLE if whole else BY_RANK)[name]
    defaults = {"world": world, "ep": world, "steps": 2, "tokens": 6, "moe": moe, "whole": whole}
    if name in ("bias", "sigmoid"):
        defaults["bias_rate"] = 0.02
    if name == "topology":
        defaults["nodes"] = world
    return RouterCase(**{**defaults, **kwargs})


def check(rank_pool, case: RouterCase) -> None:
    expected = twin(case)
    results = rank_pool.run(run, case.world, case, ranks_per_node=case.world // case.nodes)
    for result in results:
        assert_same(result.trace, expected.trace)
        assert result.buffers.keys() == expected.buffers.keys()
        for buffer, value in expected.buffers.items():
            torch.testing.assert_close(result.buffers[buffer], value, msg=buffer)
    for layer, counts in enumerate(expected.counts):
        routed, kept = sum(result.counts[layer] for result in results)
        assert torch.equal(routed, counts[0])
        assert torch.equal(kept, counts[1])
        assert int((routed - kept).min()) >= 0
        if case.moe.get("capacity_factor", 2) < 1:
            assert int(kept.sum()) < int(routed.sum())


def test_every_router_and_loss_is_covered():
    cases = [*WHOLE.values(), *BY_RANK.values()]
    assert {moe.get("router", "softmax") for moe in cases} == set(ROUTERS)
    assert set().union(*map(acting, cases)) == set(LOSSES)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", [*WHOLE, *BY_RANK])
def test_expert_parallel_equals_one_process(rank_pool, name, world):
    # A node must hold top_k experts.
    experts = (8, 8) if name == "topology" else (4, 8)
    check(rank_pool, make(name, world, num_experts=experts, accumulate=2 if world == 2 else 1))


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("dc", 1),
        ("dc", 3),
        ("noisy", 3),
        ("expert_choice", 1),
        ("expert_choice", 3),
        ("soft", 3),
        ("bias", 1),
        ("bias", 3),
        ("modules", 1),
        ("modules", 3),
        ("different modules", 1),
        ("different modules", 3),
        ("shared", 3),
        ("cosine", 3),
        ("sinkhorn", 3),
    ],
)
def test_zero_stages(rank_pool, name, stage):
    check(rank_pool, make(name, 2, stage=stage, accumulate=2, in_configure_model=stage == 3))


@pytest.mark.parametrize("name", ["dc", "cosine", "swipe", "base", "capacity by score", "modules"])
def test_data_parallel_beside_expert_parallel(rank_pool, name):
    check(rank_pool, make(name, 4, ep=2, in_configure_model=True))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("dc", "torch"),
        ("dc", "deepspeed"),
        ("noisy", "torch"),
        ("noisy", "deepspeed"),
        ("bias", "torch"),
        ("cosine", "torch"),
        ("modules", "torch"),
        ("sinkhorn", "torch"),
        ("base", "deepspeed"),
    ],
)
def test_activation_checkpointing_changes_nothing(rank_pool, name, how):
    check(rank_pool, make(name, 2, recompute=how, accumulate=2))


def test_random_draws_matter_above():
    """Else equal numbers would say nothing about the draws."""
    for name in ("noisy", "switch", "dc"):
        case = make(name, 2)
        quiet = {"noise": 0.0, "jitter": 0.0, "random_second": False}
        key = {"noisy": "noise", "switch": "jitter", "dc": "random_second"}[name]
        options = {**case.moe.get("router_options", {}), key: quiet[key]}
        other = replace(case, moe={**case.moe, "router_options": options})
        a, b = twin(case).trace.losses, twin(other).trace.losses
        assert abs(a[-1] - b[-1]) > 1e-5 * abs(b[-1]), name


@pytest.mark.parametrize(("name", "stage"), [("bias", 2), ("bias", 3), ("switch", 2), ("dc", 3)])
def test_biases_and_draws_go_on_after_a_checkpoint(rank_pool, tmp_path, name, stage):
    """A bias that restarts at zero, or draws that repeat, would change the losses."""
    case = make(name, 2, stage=stage, steps=4, accumulate=2)
    for whole, resumed in rank_pool.run(fit_and_resume, 2, case, str(tmp_path / "c.ckpt")):
        assert resumed[0] == pytest.approx(whole[0], rel=1e-6)
        for buffer, value in whole[1].items():
            assert value.any(), buffer
            assert torch.equal(resumed[1][buffer], value), buffer


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("name", "world", "ep"),
    [("switch", 2, 2), ("cosine", 2, 1), ("capacity by position", 4, 2), ("shared", 2, 2)],
)
def test_a_rank_that_leaves_a_layer_out_stops_all(rank_pool, name, world, ep, layer):
    """Ranks that wait for it in an exchange of counts find out, rather than wait for ever."""
    case = make(name, world, ep=ep, num_experts=(4, 4))
    with pytest.raises(RankError, match="different exchanges") as error:
        rank_pool.run(leave_out, world, case, 1, layer, timeout=60.0)
    assert {kind for kind, _ in error.value.errors.values()} == {"ExchangeError"}
    assert len(error.value.errors) == world


def test_module_experts_go_on_after_a_checkpoint(rank_pool, tmp_path):
    case = make("modules", 2, steps=4)
    for whole, resumed in rank_pool.run(fit_and_resume, 2, case, str(tmp_path / "c.ckpt")):
        assert resumed[0] == whole[0]
