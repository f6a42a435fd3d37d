"""The classifier on two ranks, its experts sharded, against one plain process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from strategy.models import Case, Trace, make_optimizer
from strategy.tracing import Tracer, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import moe_losses
from lightning_fastmoe.demos.vision import ImageClassifier
from lightning_fastmoe.nn import moe_layers
from lightning_fastmoe.testing import RankPool

WORLD, STEPS, IMAGES = 2, 3, 6
MEANS = {"load_balancing": 0.0, "z_loss": 0.01}
"""Losses whose global value is the mean of the ranks'."""
GLOBAL = {**MEANS, "global_balancing": 0.3, "capacity_over": "global"}
BY_RANK = {"load_balancing": 0.3, "capacity_over": "rank"}


def batches() -> list[list[tuple[Tensor, Tensor]]]:
    """For each step, the images and classes of each rank; noise, so that no two tokens tie."""
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        images = torch.randn(IMAGES, 1, 8, 8, generator=generator)
        return images, torch.randint(10, (IMAGES,), generator=generator)

    return [[batch() for _ in range(WORLD)] for _ in range(STEPS)]


class Classifier(ImageClassifier):
    """The example's, at a small size, with the optimizer and the data of these tests."""

    def __init__(self, moe: dict[str, Any]) -> None:
        options = {"capacity_factor": 0.8, "router_options": {"d_router": 8}, **moe}
        super().__init__(8, 1, 10, d_model=16, depths=(2, 2), num_experts=4, moe=options)
        self.dropped = 0

    @property
    def net(self) -> nn.Module:
        assert self.network is not None
        return self.network

    def configure_model(self) -> None:
        super().configure_model()
        for _, layer in moe_layers(self.net):
            layer.register_routing_observer(self.count)

    def count(self, layer: nn.Module, routing: Any) -> None:
        self.dropped += int(routing.dropped_counts().sum())

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.net)

    def train_dataloader(self) -> DataLoader[Any]:
        rank = self.trainer.global_rank
        return DataLoader([step[rank] for step in batches()], batch_size=None)  # type: ignore[arg-type]


def train(case: Case, moe: dict[str, Any]) -> tuple[Trace, int]:
    """On this rank."""
    pl.seed_everything(7, verbose=False)
    module, tracer = Classifier(moe), Tracer()
    make_trainer(case, callbacks=[tracer], limit_val_batches=0).fit(module)
    return tracer.trace, module.dropped


def twin(case: Case, moe: dict[str, Any], *, whole: bool) -> tuple[Trace, int]:
    """One process and plain PyTorch: all images in one pass, or those of one rank at a time."""
    pl.seed_everything(7, verbose=False)
    module = Classifier(moe)
    module.configure_model()
    optimizer = make_optimizer(module.net)
    trace = Trace()
    for step in batches():
        parts = step
        if whole:
            parts = [tuple(torch.cat(tensors) for tensors in zip(*step, strict=True))]
        optimizer.zero_grad()
        for images, classes in parts:
            loss = F.cross_entropy(module(images), classes)
            ((loss + sum(moe_losses(module.net).values())) / len(parts)).backward()
        if not trace.gradients:
            named = module.net.named_parameters()
            trace.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
        trace.norms.append(float(nn.utils.clip_grad_norm_(module.net.parameters(), case.clip)))
        optimizer.step()
        trace.weights.append({n: p.detach().clone() for n, p in module.net.named_parameters()})
    return trace, module.dropped


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """To 1e-5 of the tensor's largest entry."""
    scale = float(expected.abs().max().clamp_min(1e-12))
    assert float((actual - expected).abs().max()) <= 1e-5 * scale, what


@pytest.mark.parametrize(
    ("name", "stage"), [("global", 2), ("global", 3), ("rank", 2), ("rank", 3)]
)
def test_two_ranks_equal_one_process(rank_pool: RankPool, name: str, stage: int) -> None:
    """A capacity over the global batch: all in one pass. Over a rank's: a pass for each."""
    moe = GLOBAL if name == "global" else BY_RANK
    case = Case(world=WORLD, ep=WORLD, stage=stage, steps=STEPS, clip=1.0)
    expected, dropped = twin(case, moe, whole=name == "global")
    results = rank_pool.run(train, WORLD, case, moe)
    assert sum(result[1] for result in results) == dropped > 0
    for trace, _ in results:
        assert trace.norms == pytest.approx(expected.norms, rel=1e-5)
        assert trace.gradients.keys() == expected.gradients.keys()
        for parameter, gradient in expected.gradients.items():
            assert gradient.any(), parameter
            assert_close(trace.gradients[parameter], gradient, f"gradient of {parameter}")
        for step, (own, theirs) in enumerate(zip(trace.weights, expected.weights, strict=True)):
            assert own.keys() == theirs.keys()
            for parameter, weight in theirs.items():
                assert_close(own[parameter], weight, f"{parameter} after step {step}")


def test_the_two_capacities_differ() -> None:
    """Else the test above would not tell them apart."""
    case = Case()
    a, _ = twin(case, {**MEANS, "capacity_over": "rank"}, whole=False)
    b, _ = twin(case, {**MEANS, "capacity_over": "global"}, whole=True)
    assert abs(a.norms[0] - b.norms[0]) > 1e-3 * b.norms[0]


def test_bf16_mixed(rank_pool: RankPool) -> None:
    """ZeRO then has bf16 weights, fp32 buffers and no autocast."""
    case = Case(world=1, ep=1, steps=STEPS, clip=1.0)
    ((expected, _),) = rank_pool.run(train, 1, case, BY_RANK)
    ((trace, _),) = rank_pool.run(train, 1, replace(case, precision="bf16-mixed"), BY_RANK)
    assert trace.norms == pytest.approx(expected.norms, rel=0.1)
    assert trace.norms != expected.norms
