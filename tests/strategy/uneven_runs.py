"""What the ranks run in test_uneven.py: loaders that differ from rank to rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from strategy.models import D_IN, Case, build_net, make_optimizer
from strategy.tracing import Tracer, make_trainer, whole_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric

from lightning_fastmoe.errors import FastMoEError

TOKENS = 3
EXPERTS = (4, 8)


def make_net() -> nn.ModuleDict:
    """The network of all runs here; without balancing terms, so that a step's loss is its loss."""
    pl.seed_everything(7, verbose=False)
    return build_net(EXPERTS, (0.0, 0.0))


def sample(index: int) -> Tensor:
    """Sample number ``index``, (T, D_IN)."""
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(100 + index))


def sample_losses(net: nn.ModuleDict, x: Tensor) -> Tensor:
    """``x (B, T, D_IN) -> (B,)``."""
    h = net["embed"](x)
    for layer in net["moes"]:
        h = h + layer(net["norm"](h))
    target = torch.sin(3 * x.sum(-1, keepdim=True))
    return (net["head"](h) - target).square().mean(dim=(1, 2))


class Samples(Dataset[tuple[int, Tensor]]):
    """Samples with the given numbers."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return self.numbers[index], sample(self.numbers[index])


class Stream(IterableDataset[tuple[int, Tensor]]):
    """The same, without a length."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return ((n, sample(n)) for n in self.numbers)


class OneWay:
    """A sized loader that is at one place at a time, as one with persistent workers."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.position = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> OneWay:
        self.position = 0
        return self

    def __next__(self) -> list[Tensor]:
        if self.position == len(self):
            raise StopIteration
        number = self.numbers[self.position]
        self.position += 1
        return [torch.tensor([number]), sample(number)[None]]


def make_loader(kind: str, numbers: list[int]) -> Any:
    """A loader of batches of one sample; ``kind`` is "sized", "stream" or "one-way"."""
    if kind == "one-way":
        return OneWay(numbers)
    return DataLoader(Samples(numbers) if kind == "sized" else Stream(numbers), batch_size=1)


class Fitted(pl.LightningModule):
    """Trains, and notes which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.trained: list[list[int]] = []
        self.validated: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained[-1].extend(batch[0].tolist())
        return sample_losses(self.net, batch[1]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        losses = sample_losses(self.net, batch[1])
        self.validated.extend(batch[0].tolist())
        self.log("val_loss", losses.mean(), sync_dist=True, batch_size=len(losses))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.net)


def fit(
    stage: int, kind: str, numbers: list[list[int]], epochs: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """Trains on ``numbers[rank]``."""
    module = Fitted()
    trainer = trainer_for(len(numbers), stage, max_epochs=epochs, **extra)
    loader = make_loader(kind, numbers[trainer.global_rank])
    trainer.fit(module, loader)
    weights = whole_weights(module.net)
    return {"seen": module.trained, "steps": trainer.global_step, "weights": weights}


def fit_with_validation(
    stage: int, kind: str, training: list[list[int]], numbers: list[list[int]]
) -> dict[str, Any]:
    """Trains with a sanity check before and a validation after each epoch."""
    module = Fitted()
    trainer = trainer_for(len(numbers), stage, max_epochs=2, num_sanity_val_steps=2)
    rank = trainer.global_rank
    train, val = make_loader("sized", training[rank]), make_loader(kind, numbers[rank])
    trainer.fit(module, train, val)
    return {
        "validated": module.validated,
        "weights": whole_weights(module.net),
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "nonfinite": [not layer.nonfinite.found for layer in module.net["moes"]],
    }


def trainer_for(world: int, stage: int, **kwargs: Any) -> pl.Trainer:
    """A Trainer over ``world`` ranks, experts over neighbouring pairs."""
    case = Case(world=world, ep=2, stage=stage, steps=-1)
    return make_trainer(case, **{"gradient_clip_val": None, **kwargs})


class Evaluated(pl.LightningModule):
    """Counts samples in every way that people do."""

    def __init__(self, on_step: bool, loaders: int = 1) -> None:
        super().__init__()
        self.net = make_net()
        self.on_step = on_step
        self.means = nn.ModuleList(MeanMetric() for _ in range(loaders))
        self.seen: dict[int, list[int]] = {}
        self.count = 0
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def _evaluate(self, batch: Any, dataloader_idx: int) -> None:
        losses = sample_losses(self.net, batch[1])
        mean = self.means[dataloader_idx]
        mean.update(losses)
        self.log("metric", mean)
        self.log("mean", losses.mean(), False, None, None, None, sync_dist=True)
        self.log("sum", losses.sum().double(), sync_dist=True, reduce_fx="sum")
        self.log("largest", losses.max(), sync_dist=True, reduce_fx="max")
        if self.on_step:
            value = losses.mean().double()
            self.log("stepwise", value, on_step=True, on_epoch=True, sync_dist=True)
        self.seen.setdefault(dataloader_idx, []).extend(batch[0].tolist())
        self.count += len(losses)
        self.total += batch[0].sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch[0].tolist(), sample_losses(self.net, batch[1])


def evaluate(
    function: str,
    stage: int,
    kinds: list[str],
    numbers: list[list[list[int]]],
    on_step: bool,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Evaluates on loaders ``numbers[loader][rank]``."""
    world = len(numbers[0])
    module = Evaluated(on_step, len(numbers))
    trainer = trainer_for(world, stage, **extra)
    rank = trainer.global_rank
    loaders = [make_loader(k, n[rank]) for k, n in zip(kinds, numbers, strict=True)]
    return _evaluate(function, trainer, module, loaders)


def evaluate_sampled(function: str, stage: int, world: int, samples: int, batch: int) -> Any:
    """Evaluates one dataset that Lightning's own sampler deals out."""
    module = Evaluated(on_step=False)
    trainer = trainer_for(world, stage, use_distributed_sampler=True)
    data = Samples(list(range(samples)))
    return _evaluate(function, trainer, module, [DataLoader(data, batch_size=batch)])


def _evaluate(
    function: str, trainer: pl.Trainer, module: Evaluated, loaders: list[Any]
) -> dict[str, Any]:
    outputs = getattr(trainer, function)(module, loaders, **_quiet(function))
    return {
        "seen": module.seen,
        "count": module.count,
        "total": float(module.total),
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "outputs": outputs if function == "predict" else None,
    }


def _quiet(function: str) -> dict[str, Any]:
    return {} if function == "predict" else {"verbose": False}


class Tokens(pl.LightningModule):
    """Each rank brings its own number of tokens; a loss that is defined for none of them."""

    def __init__(self, batches: list[Tensor]) -> None:
        super().__init__()
        self.net = make_net()
        self.batches = batches

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return summed_loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.net)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def summed_loss(net: nn.ModuleDict, x: Tensor) -> Tensor:
    """``x (T, D_IN)`` -> a scalar, 0 for no tokens."""
    h = net["embed"](x)
    for layer in net["moes"]:
        h = h + layer(net["norm"](h))
    return (net["head"](h) - torch.sin(3 * x.sum(-1, keepdim=True))).square().sum()


def token_batches(counts: list[list[int]]) -> list[list[Tensor]]:
    """``counts[step][rank]`` -> batches of as many tokens."""
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(n, D_IN, generator=generator) for n in step] for step in counts]


def fit_tokens(stage: int, counts: list[list[int]]) -> dict[str, Any]:
    """Trains on ``counts[step][rank]`` tokens."""
    rank = int(os.environ["RANK"])
    module = Tokens([step[rank] for step in token_batches(counts)])
    tracer = Tracer()
    trainer = trainer_for(len(counts[0]), stage, max_epochs=1, callbacks=[tracer])
    trainer.fit(module)
    return {"gradients": tracer.trace.gradients, "weights": tracer.trace.weights}


def failing(function: str, stage: int, kind: str, numbers: list[list[int]]) -> tuple[str, str]:
    """The error that this rank gets."""
    try:
        if function == "fit":
            fit(stage, kind, numbers, 1, {})
        else:
            evaluate(function, stage, [kind], [numbers], False, {})
    except FastMoEError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


class RankDependent(Fitted):
    """Rank 1 leaves one MoE layer out in the second step."""

    def __init__(self, skipped: int) -> None:
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 1:
            moes = self.net["moes"]
            layers = [layer for i, layer in enumerate(moes) if i != self.skipped]
            net = {**dict(self.net.items()), "moes": layers}
            return sample_losses(net, batch[1]).mean()  # type: ignore[arg-type]
        return super().training_step(batch, batch_idx)


def rank_dependent(stage: int, skipped: int) -> tuple[str, str]:
    """The error that this rank gets from a forward pass that differs between ranks."""
    module = RankDependent(skipped)
    trainer = trainer_for(2, stage, max_epochs=1)
    try:
        trainer.fit(module, make_loader("sized", [1, 2, 3]))
    except FastMoEError as error:
        return type(error).__name__, str(error)
    finally:
        assert dist.is_initialized()
    return "nothing", ""


def failing_evaluation(kinds: list[str], numbers: list[list[list[int]]]) -> tuple[str, str]:
    """The error of validating on loaders ``numbers[loader][rank]``."""
    try:
        evaluate("validate", 2, kinds, numbers, True, {})
    except FastMoEError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def failing_sampled(samples: int) -> tuple[str, str]:
    """The error of a dataset with fewer samples than ranks."""
    try:
        evaluate_sampled("validate", 2, 4, samples, 1)
    except FastMoEError as error:
        return type(error).__name__, str(error)
    return "nothing", ""
