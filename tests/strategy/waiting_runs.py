"""What the ranks run in test_waiting.py: ranks that wait for each other in vain."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from strategy.models import (
    D_IN,
    Case,
    Net,
    make_batches,
    make_optimizer,
    make_scheduler,
)
from strategy.tracing import Tracer, make_trainer

from lightning_fastmoe.distributed import PendingExchange
from lightning_fastmoe.strategy.watchdog import peers


def outcome(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[str, str, float]:
    """Name and text of the error that this rank gets, and after how many seconds."""
    begin = time.monotonic()
    try:
        trainer.fit(module)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "nothing", "", time.monotonic() - begin


def sample_on_rank_zero(trainer: Any, pl_module: Any) -> None:
    """Runs a layer on rank 0 alone."""
    if trainer.is_global_zero:
        with torch.no_grad():
            pl_module.net["moes"][0](torch.zeros(3, 12, device=pl_module.device))


class RankZeroSample(pl.Callback):
    """The other rank waits until it is done, before the next epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        sample_on_rank_zero(trainer, pl_module)


class RankZeroSampleThenBarrier(pl.Callback):
    """The other rank waits in a barrier of the user's."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        sample_on_rank_zero(trainer, pl_module)
        trainer.strategy.barrier("sampled")


class RankZeroSampleOfABatch(pl.Callback):
    """The other rank goes on with the next batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        sample_on_rank_zero(trainer, pl_module)


class OtherRankLeaves(pl.Callback):
    """Rank 1 raises where rank 0 goes on."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise ValueError("the disk of rank 1 is full")


class OtherRankLeavesAfterTheEpoch(pl.Callback):
    """Rank 1 raises where rank 0 asks whether a signal has come."""

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1:
            raise ValueError("the disk of rank 1 is full")


class OtherRankEnds(pl.Callback):
    """Rank 1 ends in another way than by an error of the program; its process lives on."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            raise self.error


def ends_with(case: Case, error: BaseException, exits: bool) -> tuple[str, str, float]:
    """What each rank gets when rank 1 ends with ``error``, and its process soon or not at all."""
    begin = time.monotonic()
    try:
        make_trainer(case, callbacks=[OtherRankEnds(error)]).fit(Net(case))
    except BaseException as found:
        if os.environ["RANK"] == "1":
            time.sleep(2.0 if exits else 8.0)
            if exits:
                os._exit(1)
        return type(found).__name__, str(found), time.monotonic() - begin
    return "nothing", "", time.monotonic() - begin


class RankIsLate(pl.Callback):
    """Rank 1 is busy for a while, and then goes on."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            time.sleep(4.0)


def stuck_in(exchanges: tuple[tuple[int, str], ...], seconds: float) -> str | None:
    """What a rank finds out that stands in the exchange of this (number, layer) for a while."""
    before, peers._STILL = peers._STILL, 1.0
    dist.init_process_group("gloo")
    pending = PendingExchange()
    others = peers.Peers(lambda: "training", pending)
    number, layer = exchanges[dist.get_rank()]
    pending.number = number - 1
    try:
        with pending(layer, "counts"):
            end = time.monotonic() + seconds
            found = None
            while found is None and time.monotonic() < end:
                time.sleep(0.2)
                found = others.hopeless()
        dist.barrier()
        return found
    finally:
        others.stop()
        peers._STILL = before
        dist.destroy_process_group()


def placed(case: Case, accelerator: str) -> Case:
    """The case on as many nodes as the ranks believe."""
    nodes = case.world // int(os.environ["LOCAL_WORLD_SIZE"])
    return replace(case, accelerator=accelerator, nodes=nodes)


def fails(
    callback: type[pl.Callback],
    still: float,
    extra: dict[str, Any],
    accelerator: str = "cpu",
    dispatcher: str = "auto",
) -> Any:
    """Trains with the callback; ranks say that they wait after ``still`` seconds."""
    case = Case(2, 2, 2, steps=4, epochs=2, batches_per_epoch=2, extra=extra)
    case = placed(case, accelerator)
    before, peers._STILL = peers._STILL, still
    module = Net(case)
    assert module.net is not None
    for layer in module.net["moes"]:
        layer.dispatcher_name = dispatcher
    try:
        return outcome(make_trainer(case, callbacks=[callback()]), module)
    finally:
        peers._STILL = before


class LeavesOut(Net):
    """Rank 1 skips some MoE layers in its second step, as LayerDrop does.

    Args:
        case: of the run.
        skipped: indices of the layers.
        takes_part: whether rank 1 calls them all the same, without tokens.
    """

    def __init__(self, case: Case, skipped: tuple[int, ...], takes_part: bool = False) -> None:
        super().__init__(case)
        self.skipped, self.takes_part = skipped, takes_part

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        here = self.trainer.global_rank == 1 and self.trainer.global_step == 1
        loss = self.loss(batch, self.skipped if here else (), self.takes_part)
        self.batch_losses.append(loss.item())
        return loss

    def loss(self, batch: Any, skipped: tuple[int, ...], takes_part: bool) -> torch.Tensor:
        """That of ``loss_of`` without the skipped layers."""
        h = self.net["embed"](batch)
        for i, layer in enumerate(self.net["moes"]):
            if i not in skipped:
                h = h + layer(self.net["norm"](h))
            elif takes_part:
                h = h + layer(self.net["norm"](h)[:0]).sum()
        target = torch.sin(3 * batch.sum(-1, keepdim=True))
        return (self.net["head"](h) - target).square().mean()


def make_gathering_trainer(case: Case, **options: Any) -> pl.Trainer:
    """At stage 3 it gathers each parameter whenever it is used, however small."""
    trainer = make_trainer(case, **options)
    zero = trainer.strategy.config["zero_optimization"]
    for name in ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters"):
        zero[f"stage3_{name}"] = 0
    return trainer


def leaves_out(
    stage: int, skipped: tuple[int, ...], seconds: float = 60.0, accelerator: str = "cpu"
) -> Any:
    """What a rank gets where rank 1 leaves layers out, with this ``exchange_timeout``."""
    case = Case(2, 2, stage, steps=4, extra={"exchange_timeout": seconds})
    case = placed(case, accelerator)
    return outcome(make_gathering_trainer(case), LeavesOut(case, skipped))


WITHOUT_TERMS: dict[str, Any] = {"coefficients": (0.0, 0.0), "clip": 1e9}


def takes_part(stage: int, skipped: tuple[int, ...], accelerator: str = "cpu") -> Any:
    """Losses and last weights where rank 1 takes part in the layers that it leaves out."""
    pl.seed_everything(7, verbose=False)
    case = placed(Case(2, 2, stage, **WITHOUT_TERMS), accelerator)
    module, tracer = LeavesOut(case, skipped, takes_part=True), Tracer()
    make_gathering_trainer(case, callbacks=[tracer]).fit(module)
    return module.batch_losses, tracer.trace.weights[-1]


def in_one_process(skipped: tuple[int, ...]) -> Any:
    """The same in plain PyTorch: losses of both ranks, and last weights."""
    pl.seed_everything(7, verbose=False)
    case = Case(2, 2, **WITHOUT_TERMS)
    module = LeavesOut(case, skipped)
    optimizer = make_optimizer(module.net)
    scheduler = make_scheduler(optimizer)
    losses: list[list[float]] = [[], []]
    for step, (micro,) in enumerate(make_batches(case)):
        optimizer.zero_grad()
        for rank, batch in enumerate(micro):
            loss = module.loss(batch, skipped if (rank, step) == (1, 1) else (), False)
            losses[rank].append(loss.item())
            (loss / 2).backward()
        optimizer.step()
        scheduler.step()
    return losses, {name: p.detach() for name, p in module.net.named_parameters()}


class Samples(pl.Callback):
    """Runs the model on rank 0 alone at the end of each epoch, as it should be done."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.drawn: list[Any] = []
        self.modes: list[bool] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net["norm"].eval()  # a mode of its own, which must be kept
        self.drawn.append(trainer.strategy.on_rank_zero(self.function, pl_module))
        self.modes = [m.training for m in pl_module.modules()]


def residual(module: Net, x: Any) -> Any:
    """The forward pass of ``loss_of``, ``x (B, T, D_IN)`` -> (B, T, 1)."""
    h = module.net["embed"](x.to(module.net["embed"].weight))
    for layer in module.net["moes"]:
        h = h + layer(module.net["norm"](h))
    return module.net["head"](h)


def three_passes(module: Net) -> list[torch.Tensor]:
    """Passes of different shapes, as a growing text has them."""
    return [residual(module, sample_input(n)) for n in (1, 3, 0)]


def sample_input(tokens: int) -> torch.Tensor:
    """(1, tokens, D_IN)."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, D_IN, generator=generator)


def fails_on_rank_zero(module: Net) -> None:
    """Raises after a pass."""
    residual(module, sample_input(2))
    raise KeyError("no such prompt")


def trains_on_rank_zero(module: Net) -> None:
    """Asks for a gradient."""
    with torch.enable_grad():
        residual(module, sample_input(2)).sum().backward()


def draws(
    world: int, ep: int, stage: int, precision: str, function: Any, accelerator: str = "cpu"
) -> dict[str, Any]:
    """Trains two epochs, with or without samples in between."""
    pl.seed_everything(7, verbose=False)
    samples = Samples(function or (lambda module: None))
    case = Case(world, ep, stage, steps=2, epochs=2, batches_per_epoch=2, precision=precision)
    case = placed(replace(case, extra={"exchange_timeout": 20.0}), accelerator)
    module = Net(case)
    tracer = Tracer()
    kind, message, _ = outcome(make_trainer(case, callbacks=[samples, tracer]), module)
    return {
        "error": (kind, message),
        "drawn": samples.drawn,
        "modes": samples.modes,
        "losses": module.batch_losses,
        "weights": tracer.trace.weights,
    }
