"""Lightning's WeightAveraging equals an average by hand, on any ranks and at every stage."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from strategy.models import Case, reference
from strategy.resume_runs import Resumed, error_of, trainer_for
from strategy.tracing import whole_weights
from torch import Tensor, nn

from lightning_fastmoe.checkpoint import CheckpointReader

Weights = dict[str, Tensor]
DECAY = 0.6


class Counting(Resumed):
    """Has a buffer and a parameter that is in no optimizer; both count steps."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "lambda")
        self.register_buffer("progress", torch.zeros(2))
        self.register_buffer("cache", torch.ones(2), persistent=False)  # not in checkpoints
        self.loose = nn.Parameter(torch.zeros(3), requires_grad=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.progress += 1
        with self.trainer.strategy.edit_parameters([self.loose]), torch.no_grad():
            self.loose += 1

    def counts(self) -> tuple[float, float]:
        """Of the buffer and the parameter."""
        partitioned = [self.loose] if hasattr(self.loose, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            return float(self.progress[0]), float(self.loose[0])


@dataclass
class Averaged:
    """What a run saw.

    Attributes:
        trained: weights after each step, before the callbacks that come after the first.
        validated: weights in the validation of each epoch.
        restored: weights at the end of each validation, before saving.
        end: weights at the end of training.
        start: weights at the start.
        warned: what was said of averages.
        counts: of buffer and loose parameter, in validation and after it, of each epoch.
    """

    trained: list[Weights] = field(default_factory=list)
    validated: list[Weights] = field(default_factory=list)
    restored: list[Weights] = field(default_factory=list)
    end: Weights = field(default_factory=dict)
    start: Weights = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    counts: list[tuple[float, ...]] = field(default_factory=list)


class Look(pl.Callback):
    def __init__(self, seen: Averaged) -> None:
        self.seen = seen
        self.in_validation: tuple[float, ...] = ()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.start = whole_weights(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.trained.append(whole_weights(pl_module.net))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            with torch.inference_mode(False):
                self.seen.validated.append(whole_weights(pl_module.net))
                self.in_validation = pl_module.counts()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            with torch.inference_mode(False):
                self.seen.restored.append(whole_weights(pl_module.net))
                self.seen.counts.append((*self.in_validation, *pl_module.counts()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # The order of callbacks: this one comes after the average.
        self.seen.end = whole_weights(pl_module.net)


def averaging(kind: str) -> list[pl.Callback]:
    return {
        "none": list,
        "ema": lambda: [EMAWeightAveraging(decay=DECAY)],
        "swa": lambda: [WeightAveraging(use_buffers=False)],
        "on the cpu": lambda: [EMAWeightAveraging(device="cpu", decay=DECAY)],
    }[kind]()


def fit(
    case: Case,
    kind: str,
    epochs: int,
    directory: str | None = None,
    path: str | None = None,
    seed: int = 7,
) -> Averaged:
    """Trains with validation after each epoch of one step, and saves after each."""
    pl.seed_everything(seed, verbose=False)
    seen = Averaged()
    callbacks = [*averaging(kind), Look(seen)]
    if directory is not None:
        callbacks.append(ModelCheckpoint(directory, filename="{step}", save_top_k=-1))
    trainer = trainer_for(
        case,
        epochs,
        callbacks=callbacks,
        enable_checkpointing=directory is not None,
        limit_val_batches=1.0,
        num_sanity_val_steps=1,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Counting(case), ckpt_path=path)
    seen.warned = [
        text for w in caught if " with" in (text := str(w.message)) and "Averaging" in text
    ]
    return seen


def evaluated(case: Case, path: str) -> Weights:
    """The weights with which a checkpoint is validated, by a Trainer without the callback."""
    seen = Averaged()
    trainer = trainer_for(case, 1, callbacks=[Look(seen)], limit_val_batches=1.0)
    trainer.validate(Counting(case), ckpt_path=path, verbose=False)
    return seen.validated[0]


class OwnSwap(WeightAveraging):
    def _swap_models(self, pl_module: Any) -> None: ...


def _by_norm(average: Tensor, current: Tensor, _: Any) -> Tensor:
    return average + (current - average) / (1 + current.norm())


def refused(case: Case) -> list[Any]:
    """What each refused callback says."""
    callbacks: list[list[pl.Callback]] = [
        [OwnSwap()],
        [WeightAveraging(avg_fn=_by_norm)],
        [WeightAveraging(), EMAWeightAveraging()],
    ]
    return [
        error_of(trainer_for(case, 1, callbacks=group).fit, Counting(case)) for group in callbacks
    ]


CASE = Case(world=2, ep=2, steps=4)
EPOCHS = 4


def by_hand(steps: list[Weights], kind: str) -> list[Weights]:
    """The average after each step, in fp64."""
    averages: list[Weights] = []
    for count, weights in enumerate(steps):
        now = {name: value.double() for name, value in weights.items()}
        if averages:
            share = 1 / (count + 1) if kind == "swa" else 1 - DECAY
            now = {n: v + (now[n] - v) * share for n, v in averages[-1].items()}
        averages.append(now)
    return averages


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def one_process() -> list[Weights]:
    return reference(CASE).weights


@pytest.mark.parametrize("kind", ["ema", "swa", "on the cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_averages_equal_those_of_one_process(stage, kind, rank_pool, one_process) -> None:
    case = replace(CASE, stage=stage, in_configure_model=kind == "swa")
    expected = by_hand(one_process, kind)
    plain = rank_pool.run(fit, 2, case, "none", EPOCHS)
    for seen, other in zip(rank_pool.run(fit, 2, case, kind, EPOCHS), plain, strict=True):
        assert len(seen.validated) == EPOCHS
        for validated, average in zip(seen.validated, expected, strict=True):
            assert_close(validated, average)
        # Training goes on as if there were no average, to the last bit.
        for restored, trained, without in zip(
            seen.restored, seen.trained, other.trained, strict=True
        ):
            assert_same(restored, trained)
            assert_same(trained, without)
        assert_same(seen.end, seen.validated[-1])


def test_bf16_averages_fp32_masters(rank_pool) -> None:
    case = replace(CASE, precision="bf16-mixed")
    for seen in rank_pool.run(fit, 2, case, "ema", EPOCHS):
        for validated, average in zip(seen.validated, by_hand(seen.trained, "ema"), strict=True):
            assert_close(validated, average)
        for restored, trained in zip(seen.restored, seen.trained, strict=True):
            assert_same(restored, trained)


@pytest.mark.parametrize("stage", [2, 3])
def test_masters_on_the_host(stage, rank_pool, one_process) -> None:
    case = replace(CASE, stage=stage, extra={"offload_optimizer": True})
    for seen in rank_pool.run(fit, 2, case, "ema", EPOCHS):
        for validated, average in zip(seen.validated, by_hand(one_process, "ema"), strict=True):
            assert_close(validated, average)
        for restored, trained in zip(seen.restored, seen.trained, strict=True):
            assert_same(restored, trained)


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_and_parameters_outside_of_the_optimizer(stage, rank_pool) -> None:
    """Buffers are averaged unless use_buffers=False, parameters in any case, as in Lightning."""
    case = replace(CASE, stage=stage)
    (ema, _), (swa, _) = (rank_pool.run(fit, 2, case, kind, 3) for kind in ("ema", "swa"))
    second = 1 + (2 - 1) * (1 - DECAY)
    third = second + (3 - second) * (1 - DECAY)
    averages = ((1, 1), (second, 2), (third, 3))
    assert ema.counts == [pytest.approx((mean, mean, now, now)) for mean, now in averages]
    assert swa.counts == [(1, 1, 1, 1), (2, 1.5, 2, 2), (3, 2, 3, 3)]


@pytest.fixture(scope="module")
def straight(rank_pool, tmp_path_factory) -> tuple[str, Averaged]:
    directory = str(tmp_path_factory.mktemp("averaged"))
    return directory, rank_pool.run(fit, 2, CASE, "ema", EPOCHS, directory)[0]


@pytest.mark.parametrize(("world", "stage"), [(2, 2), (2, 3), (1, 1)])
def test_resuming(world, stage, straight, rank_pool) -> None:
    directory, expected = straight
    # One rank accumulates the batches of two.
    case = replace(CASE, ep=world, stage=stage, world=world)
    if world == 1:
        case = replace(case, accumulate=2)
    path = f"{directory}/step=2.ckpt"
    for seen in rank_pool.run(fit, world, case, "ema", EPOCHS, None, path, 9):
        assert len(seen.validated) == 2
        check = assert_same if (world, stage) == (2, 2) else assert_close
        for found, wanted in zip(seen.validated, expected.validated[2:], strict=True):
            check(found, wanted)
        check(seen.trained[-1], expected.trained[-1])
        if world == 2:  # one rank has two batches to a step
            assert seen.counts == expected.counts[2:]


def test_checkpoints_hold_the_averages(straight, rank_pool) -> None:
    directory, expected = straight
    path = f"{directory}/step=3.ckpt"
    for weights in rank_pool.run(evaluated, 2, replace(CASE, stage=3), path):
        assert_same(weights, expected.validated[2])
    with CheckpointReader(path) as reader:
        for name, value in expected.validated[2].items():
            stored = torch.empty(value.shape)
            reader.read_into(f"weights/net.{name}", 0, stored.view(-1))
            assert torch.equal(stored, value)
            reader.read_into(f"optimizer/training_weights/net.{name}", 0, stored.view(-1))
            assert torch.equal(stored, expected.trained[2][name])


def test_saving_in_the_background(straight, rank_pool, tmp_path) -> None:
    _, expected = straight
    case = replace(CASE, extra={"async_checkpoint": True})
    rank_pool.run(fit, 2, case, "ema", EPOCHS, str(tmp_path))
    for weights in rank_pool.run(evaluated, 2, CASE, str(tmp_path / "step=3.ckpt")):
        assert_same(weights, expected.validated[2])


def test_resuming_without_the_callback_starts_from_the_averages(straight, rank_pool) -> None:
    directory, expected = straight
    path = f"{directory}/step=2.ckpt"
    both = rank_pool.run(fit, 2, CASE, "none", 3, None, path, 9)
    for seen in both:
        assert_same(seen.start, expected.validated[1])
    said = [
        [w for w in seen.warned if "training continues from the averages" in w] for seen in both
    ]
    assert [len(texts) for texts in said] == [1, 0]


def test_an_average_that_begins_at_a_checkpoint_without_one(rank_pool, tmp_path) -> None:
    (plain, _) = rank_pool.run(fit, 2, CASE, "none", 2, str(tmp_path))
    path = str(tmp_path / "step=2.ckpt")
    first, second = rank_pool.run(fit, 2, CASE, "ema", EPOCHS, None, path, 9)
    for seen in (first, second):
        assert_same(seen.start, plain.trained[-1])
        for validated, average in zip(seen.validated, by_hand(seen.trained, "ema"), strict=True):
            assert_close(validated, average)
    assert [w for w in first.warned if "saved without WeightAveraging" in w]


def test_what_is_refused(rank_pool) -> None:
    for errors in rank_pool.run(refused, 2, CASE):
        assert [kind for kind, _ in errors] == ["ConfigError"] * 3
        own, norm, two = (message for _, message in errors)
        assert "OwnSwap overrides _swap_models()" in own
        assert "is not elementwise" in norm
        assert "2 WeightAveraging callbacks" in two
