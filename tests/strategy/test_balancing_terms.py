"""What the monitor logs, and that the balancing terms count once however the model is run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import Logger
from strategy.models import D_MODEL, Case, Net
from strategy.tracing import Tracer, make_trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe import ExpertLoadMonitor, moe_losses
from lightning_fastmoe.monitoring.logs import expert_load as load_log
from lightning_fastmoe.nn import MoE, Routing, moe_layers


class Memory(Logger):
    """Keeps what was logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {k: v for k, v in metrics.items() if k.startswith("moe/")}
        if values:
            self.logged.setdefault(-1 if step is None else step, {}).update(values)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""


class CountedMonitor(ExpertLoadMonitor):
    """Counts the all-reduces of each batch end."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder=folder)
        self.reductions: list[int] = []
        self.opened = False

    def on_train_batch_end(self, *args: Any) -> None:
        original, count = dist.all_reduce, [0]

        def counted(*a: Any, **k: Any) -> Any:
            count[0] += 1
            return original(*a, **k)

        dist.all_reduce = counted
        try:
            super().on_train_batch_end(*args)
        finally:
            dist.all_reduce = original
        self.reductions.append(count[0])
        self.opened |= self._writer is not None


@dataclass
class Monitored:
    """This rank's log, its all-reduces, and every routing: (layer, expert ids, scores)."""

    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    reductions: list[int] = field(default_factory=list)
    routings: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    shown: dict[str, float] = field(default_factory=dict)
    called_back: dict[str, float] = field(default_factory=dict)
    opened: bool = False


def monitor(case: Case, every: int, folder: str) -> Monitored:
    """Trains under a monitor, and notes every routing beside it."""
    pl.seed_everything(7, verbose=False)
    module, logger, callback = Net(case), Memory(), CountedMonitor(folder)
    result = Monitored()
    names = {id(layer): name for name, layer in moe_layers(module)}

    def observe(layer: MoE, routing: Routing) -> None:
        scores = routing.scores.detach()
        result.routings.append((names[id(layer)], routing.expert_ids, scores))

    for _, layer in moe_layers(module):
        layer.register_routing_observer(observe)
    trainer = make_trainer(case, callbacks=[callback], logger=logger, log_every_n_steps=every)
    trainer.fit(module)
    result.opened = callback.opened
    result.logged, result.reductions = logger.logged, callback.reductions
    keys = ("max_load", "dead_experts")
    result.shown = {key: float(trainer.progress_bar_metrics[key]) for key in keys}
    values = trainer.callback_metrics.items()
    result.called_back = {k: float(v) for k, v in values if k.startswith("moe/")}
    return result


class ByHand(Net):
    """Adds the terms to its loss, as those do who want to see them there."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + sum(moe_losses(self).values())


class Checkpointed(Net):
    """Recomputes the MoE layers' activations in the backward pass."""

    def __init__(self, case: Case, how: str) -> None:
        super().__init__(case)
        self.how = how
        # DeepSpeed can't reduce the gradient of a parameter of two re-entrant checkpoints.
        self.norms = nn.ModuleList(nn.LayerNorm(D_MODEL) for _ in case.num_experts)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        net = self.net
        h = net["embed"](batch)
        for norm, layer in zip(self.norms, net["moes"], strict=True):
            h = self._block(norm, layer, h)
        target = torch.sin(3 * batch.sum(-1, keepdim=True))
        loss: Tensor = (net["head"](h) - target).square().mean()
        self.batch_losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)

    def _block(self, norm: nn.Module, layer: nn.Module, h: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            y: Tensor = x + layer(norm(x))
            return y

        if self.how == "none":
            return block(h)
        if self.how == "deepspeed":
            from deepspeed.runtime.activation_checkpointing import checkpointing

            y: Tensor = checkpointing.checkpoint(block, h)
            return y
        recomputed: Tensor = checkpoint(block, h, use_reentrant=self.how == "reentrant")
        return recomputed


@dataclass
class Fitted:
    """Losses, weights after each step, and how many tokens the observers saw."""

    losses: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    observed: int = 0


def fit(case: Case, how: str) -> Fitted:
    """Trains with the terms acting as ``how`` says, or with activation checkpointing."""
    pl.seed_everything(7, verbose=False)
    kinds = {"attached": Net, "by hand": ByHand}
    module = kinds[how](case) if how in kinds else Checkpointed(case, how)
    seen = [0]

    def observe(layer: MoE, routing: Routing) -> None:
        seen[0] += len(routing.expert_ids)

    for _, layer in moe_layers(module):
        layer.register_routing_observer(observe)
    tracer = Tracer()
    make_trainer(case, callbacks=[tracer]).fit(module)
    return Fitted(module.batch_losses, tracer.trace.weights, seen[0])


# ------------------------------------------------------------------------------------ the monitor


def routings(results, layer: str, first: int, last: int) -> list[tuple]:
    """Those of all ranks' forward passes ``first .. last - 1`` of a layer."""
    found = []
    for result in results:
        mine = [r for r in result.routings if r[0] == layer][first:last]
        assert len(mine) == last - first
        found += mine
    return found


def counts(results, layer: str, experts: int, first: int, last: int) -> list[int]:
    """Pairs of each expert."""
    chosen = torch.cat([ids.flatten() for _, ids, _ in routings(results, layer, first, last)])
    return torch.bincount(chosen, minlength=experts).tolist()


def by_hand(results, layer: str, experts: int, first: int, last: int) -> dict[str, float]:
    """The values over all ranks' forward passes ``first .. last - 1`` of a layer."""
    n = torch.tensor(counts(results, layer, experts, first, last)).double()
    p = torch.cat([s for _, _, s in routings(results, layer, first, last)]).double()
    ratios = n * experts / n.sum()
    return {
        "max_load": float(ratios.max()),
        "min_load": float(ratios.min()),
        "load_cv": float((ratios - 1).square().mean().sqrt()),
        "dead_experts": float((n == 0).sum()),
        "drop_rate": 0.0,
        "entropy": float(-(p * p.log()).sum(dim=1).mean()),
        "confidence": float(p.amax(dim=1).mean()),
    }


def balance(results, layer: str, experts: int, first: int, last: int) -> float:
    """The mean load-balancing loss of all ranks' forward passes ``first .. last - 1``."""
    values = []
    for _, ids, scores in routings(results, layer, first, last):
        share = torch.bincount(ids.flatten(), minlength=experts) / ids.numel()
        values.append(float(experts * (share * scores.mean(dim=0)).sum()))
    return sum(values) / len(values)


@pytest.mark.parametrize(("world", "stage", "accumulate"), [(2, 2, 1), (2, 3, 2), (4, 2, 2)])
def test_the_monitor_logs_what_a_hand_count_gives(rank_pool, tmp_path, world, stage, accumulate):
    # Few tokens for many experts, so that some are dead.
    experts = (4, 16)
    case = Case(
        world, 2, stage, accumulate, steps=4, num_experts=experts, tokens=2, samples_per_batch=1
    )
    results = rank_pool.run(monitor, world, case, 2, str(tmp_path))
    window = 2 * accumulate
    dead = 0.0
    for rank, result in enumerate(results):
        reductions = [0] * (window - 1) + [1]
        assert result.reductions == reductions * 2
        if rank > 0:
            continue
        assert result.logged.keys() == {1, 3}  # as Lightning counts: steps before this one
        for i, step in enumerate((1, 3)):
            logged = result.logged[step]
            largest, dead = 0.0, 0.0
            for layer, number in zip(("net.moes.0", "net.moes.1"), experts, strict=True):
                values = by_hand(results, layer, number, i * window, (i + 1) * window)
                for name, value in values.items():
                    found = logged[f"moe/{layer}/{name}"]
                    assert found == pytest.approx(value, rel=1e-5, abs=1e-6), (layer, name)
                term = balance(results, layer, number, i * window, (i + 1) * window)
                found = logged[f"moe/{layer}/load_balancing_loss"]
                assert found == pytest.approx(term, rel=1e-5)
                largest = max(largest, values["max_load"])
                dead += values["dead_experts"]
    assert results[0].shown["max_load"] == pytest.approx(largest, rel=1e-5)
    assert results[0].shown["dead_experts"] == dead > 0
    log = load_log.read(tmp_path / load_log.FILE_NAME)
    assert [result.opened for result in results] == [True] + [False] * (world - 1)
    assert [layer.num_experts for layer in log.layers] == list(experts)
    for i, record in enumerate(log.records):
        for layer, number, found in zip(log.layers, experts, record.routed, strict=True):
            assert found == counts(results, layer.name, number, i * window, (i + 1) * window)
    shared = results[0].called_back
    assert len(shared) == 18
    assert {k.rsplit("/", 1)[1] for k in shared} >= {"load_balancing_loss", "z_loss"}
    for result in results:
        assert {k: result.called_back[k] for k in shared} == {
            k: results[0].called_back[k] for k in shared
        }


# -------------------------------------------------------------------------------------- the terms

CASE = Case(world=2, ep=2, steps=3, coefficients=(0.5, 0.05))


def furthest(one, other) -> float:
    """The largest difference of two weights, over the tensor's largest weight."""
    assert one.keys() == other.keys()
    return max(
        float((one[n] - other[n]).abs().max() / one[n].abs().max().clamp_min(1e-12)) for n in one
    )


@pytest.mark.parametrize(
    ("stage", "accumulate", "precision"),
    [(1, 1, "bf16-mixed"), (2, 2, "32-true"), (2, 2, "bf16-mixed"), (3, 2, "bf16-mixed")],
)
def test_attached_terms_equal_terms_added_by_hand(rank_pool, stage, accumulate, precision):
    case = replace(CASE, stage=stage, accumulate=accumulate, precision=precision)
    attached = rank_pool.run(fit, 2, case, "attached")
    added = rank_pool.run(fit, 2, case, "by hand")
    for own, twin in zip(attached, added, strict=True):
        for a, b in zip(own.weights, twin.weights, strict=True):
            assert furthest(a, b) <= 1e-6


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_the_terms_above_matter(rank_pool, factor):
    other = tuple(factor * c for c in CASE.coefficients)
    ends = [
        rank_pool.run(fit, 2, case, "attached")[0].weights[-1]
        for case in (CASE, replace(CASE, coefficients=other))
    ]
    assert furthest(*ends) > 1e-3


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant", "deepspeed"])
@pytest.mark.parametrize(("stage", "accumulate"), [(2, 2), (3, 1)])
def test_checkpointing_changes_no_weight_and_counts_once(rank_pool, stage, accumulate, how):
    case = replace(CASE, stage=stage, accumulate=accumulate)
    kept = rank_pool.run(fit, 2, case, "none")
    recomputed = rank_pool.run(fit, 2, case, how)
    tokens = case.steps * accumulate * case.samples_per_batch * case.tokens * 2  # two layers
    for own, twin in zip(recomputed, kept, strict=True):
        assert own.observed == twin.observed == tokens
        assert own.losses == pytest.approx(twin.losses, rel=1e-6)
        for a, b in zip(own.weights, twin.weights, strict=True):
            assert furthest(a, b) <= 1e-6
