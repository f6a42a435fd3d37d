"""What is written through ``.data`` holds, or is an error where it would be lost."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.models import Case, Net
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

PARTITIONED = {
    "config": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
}
CASE = Case(world=2, ep=2, stage=3, extra=PARTITIONED)
ONLINE, TARGET = "net.embed.weight", "target.weight"


def multiplied(online: Any, target: Any) -> None:
    target.data.mul_(0.9).add_(online.data, alpha=0.1)


def averaged(online: Any, target: Any) -> None:
    target.data = 0.9 * target.data + 0.1 * online.data


def copied(online: Any, target: Any) -> None:
    target.data.copy_(online.data)


def augmented(online: Any, target: Any) -> None:
    target.data *= 0.9


def by_index(online: Any, target: Any) -> None:
    target.data[...] = 0.0


def in_lists(online: Any, target: Any) -> None:
    torch._foreach_mul_([target.data], 0.9)


def into(online: Any, target: Any) -> None:
    torch.mul(online.data, 0.9, out=target.data)


def initialised(online: Any, target: Any) -> None:
    nn.init.zeros_(target.data)


def as_vector(online: Any, target: Any) -> None:
    nn.utils.vector_to_parameters(torch.zeros(100), [target])


WRITES: tuple[Callable[[Any, Any], None], ...] = (
    multiplied,
    averaged,
    copied,
    augmented,
    by_index,
    in_lists,
    into,
    initialised,
    as_vector,
)


class WithTarget(Net):
    """Beside the network a copy of a part of it, which is not trained."""

    def __init__(self, case: Case, tried: bool) -> None:
        super().__init__(case)
        self.target = deepcopy(self.net["embed"]).requires_grad_(False)
        self.tried = tried
        self.found: dict[str, str] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.target(batch).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        online, target = self.net["embed"].weight, self.target.weight
        if not self.tried:
            return
        for write in WRITES:
            for to, other in ((target, online), (online, target)):
                try:
                    write(other, to)
                    message = "nothing"
                except Exception as error:  # noqa: BLE001
                    message = f"{type(error).__name__}: {error}"
                self.found[f"{write.__name__} {to is online}"] = message
        data = target.data
        self.found["read"] = f"{data.numel()} {data.dtype} {type(data * 2)} {float(data.sum())}"
        self.found["copied"] = f"{type(deepcopy(data))}"


def tried(case: Case, tried: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What came of each attempt, and the weights after training."""
    pl.seed_everything(7, verbose=False)
    module = WithTarget(case, tried)
    make_trainer(case).fit(module)
    assert "data" not in vars(nn.Parameter), "nothing watches afterwards"
    return module.found, whole_weights(module.net)


@pytest.mark.parametrize("case", [CASE, replace(CASE, world=1, ep=1)])
def test_each_way_to_write_is_an_error_that_names_the_parameter(rank_pool, case):
    plain = rank_pool.run(tried, case.world, case, False)
    for (found, weights), (nothing, right) in zip(
        rank_pool.run(tried, case.world, case, True), plain, strict=True
    ):
        assert nothing == {}
        assert found.pop("read") == "0 torch.float32 <class 'torch.Tensor'> 0.0"
        assert found.pop("copied") == "<class 'torch.Tensor'>"
        assert len(found) == 2 * len(WRITES)
        for what, message in found.items():
            assert message.startswith("ParameterEditError: Parameter '"), (what, message)
            name = ONLINE if what.endswith("True") else TARGET
            assert f"'{name}'" in message, (what, message)
            assert "with trainer.strategy.edit_parameters([parameter]):" in message
        for name, weight in right.items():
            assert torch.equal(weights[name], weight), name


def normalized(weight: Any) -> None:
    weight.data = nn.functional.normalize(weight.data)


def clamped(weight: Any) -> None:
    weight.data.clamp_(-0.1, 0.1)


def first_row(weight: Any) -> None:
    weight.data[0] = 0.0


class WrittenInItsPass(Net):
    """A parameter that ZeRO 3 has gathered is written to in the pass, after which it drops that."""

    def __init__(self, case: Case, write: Callable[[Any], None]) -> None:
        super().__init__(case)
        self.write = write

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        def before(layer: Any, given: Any) -> None:
            self.write(layer.weight)

        hook = self.net["embed"].register_forward_pre_hook(before)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            hook.remove()


def written_in_its_pass(case: Case, write: Callable[[Any], None]) -> str:
    """The error."""
    try:
        make_trainer(case).fit(WrittenInItsPass(case, write))
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("write", [normalized, clamped, first_row])
def test_what_is_written_in_a_pass_and_dropped_after_it(rank_pool, write):
    for message in rank_pool.run(written_in_its_pass, 2, CASE, write):
        assert message.startswith(f"ParameterEditError: Parameter {ONLINE!r} was written to")
    for message in rank_pool.run(written_in_its_pass, 2, replace(CASE, stage=2, extra={}), write):
        assert message == "nothing"


def in_contexts(case: Case) -> list[float]:
    """The target after DeepSpeed's own way to write, on rank 0 alone, and the strategy's."""
    import deepspeed

    class Written(WithTarget):
        def on_train_batch_end(self, *args: Any) -> None:
            weight = self.target.weight
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if self.trainer.global_rank == 0:
                    weight.data.fill_(2.0)
            with self.trainer.strategy.edit_parameters([weight]):
                weight.data[0] = 3.0
            with deepspeed.zero.GatheredParameters([weight]):
                self.sums.append(float(weight.data.sum()))

    module = Written(case, False)
    module.sums = []
    make_trainer(case).fit(module)
    return module.sums


def test_ways_to_write_that_work(rank_pool):
    for sums in rank_pool.run(in_contexts, 2, CASE):
        assert sums == [2.0 * 66 + 3.0 * 6] * 3


class WithRow(Net):
    """One row of a large weight is set to zero after each step, as that of padding often is."""

    def __init__(self, case: Case, way: str) -> None:
        super().__init__(case)
        self.large, self.way = nn.Linear(6, 4000), way
        self.rows: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.large(batch).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        weight = self.large.weight
        self.rows.append(weight.detach()[1234].clone())
        if self.way == "data":
            weight.data[1234] = 0.0
        elif self.way == "alias":
            row = weight.data[1234]
            row.mul_(0.0)
        elif self.way == "no_grad":
            with torch.no_grad():
                weight[1234] = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


def rows(case: Case, way: str) -> list[Tensor]:
    """The row after each step, before it is set."""
    pl.seed_everything(7, verbose=False)
    module = WithRow(case, way)
    make_trainer(case).fit(module)
    return module.rows


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_few_elements_of_a_large_weight_are_written(rank_pool, stage):
    """Too few for samples of it to show, and ZeRO would overwrite them."""
    case = replace(CASE, stage=stage, extra={}, steps=4)
    right = rank_pool.run(rows, 2, case, "no_grad")
    assert max(float(row.abs().max()) for row in right[0][1:]) < 0.02, "a step's from zero"
    for way in ("data", "alias"):
        for found, expected in zip(rank_pool.run(rows, 2, case, way), right, strict=True):
            for row, twin in zip(found, expected, strict=True):
                assert torch.equal(row, twin), way


class WithWholeTarget(WithTarget):
    """ZeRO 3 keeps small parameters whole, and then these are ordinary tensors."""

    def on_train_batch_end(self, *args: Any) -> None:
        averaged(self.net["embed"].weight, self.target.weight)
        multiplied(self.net["embed"].weight, self.target.weight)
        assert type(self.target.weight.data) is Tensor
        with self.trainer.strategy.edit_parameters([self.target.weight]):
            self.found["target"] = repr(self.target.weight.sum().item())


def whole(case: Case) -> list[str]:
    """The sum of the target's elements after each training."""
    pl.seed_everything(7, verbose=False)
    module = WithWholeTarget(case, False)
    make_trainer(case).fit(module)
    return [module.found["target"]]


def test_parameters_that_are_whole_are_written(rank_pool):
    small = replace(CASE, extra={})
    for three, two in zip(
        rank_pool.run(whole, 2, small),
        rank_pool.run(whole, 2, replace(small, stage=2)),
        strict=True,
    ):
        assert float(three[0]) == pytest.approx(float(two[0]), rel=1e-5)
