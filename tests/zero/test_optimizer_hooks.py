"""What is registered with an optimizer is called as in plain PyTorch, and what it writes holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from strategy.exactness import assert_close
from strategy.models import Case, Net, build_net, loss_of, make_batches, make_optimizer
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

CASE = Case(world=2, ep=2, steps=4, coefficients=(0.0, 0.0))


def halve(weight: Any) -> None:
    with torch.no_grad():
        weight.mul_(0.5)


class Hooked(Net):
    """The embedding is halved before each step and clamped after it, by hooks of the optimizer."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.calls: list[str] = []

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        optimizer = found["optimizer"] if isinstance(found, dict) else found[0][0]
        hook(optimizer, self.net, self.calls)
        return found


def hook(optimizer: torch.optim.Optimizer, net: nn.Module, calls: list[str]) -> None:
    weight = net["embed"].weight

    def before(given: Any, args: Any, kwargs: Any) -> None:
        calls.append(f"before {given is optimizer} {len(args)} {kwargs}")
        halve(weight)

    def after(given: Any, args: Any, kwargs: Any) -> None:
        held = any(p is weight for group in given.param_groups for p in group["params"])
        calls.append(f"after {given is optimizer} {len(args)} {kwargs} {held}")
        with torch.no_grad():
            weight.clamp_(-0.05, 0.05)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def fit(case: Case) -> tuple[list[str], dict[str, Tensor]]:
    pl.seed_everything(7, verbose=False)
    module = Hooked(case)
    make_trainer(case).fit(module)
    return module.calls, whole_weights(module.net)


def plain(case: Case) -> tuple[list[str], dict[str, Tensor]]:
    pl.seed_everything(7, verbose=False)
    net = build_net(case.num_experts, case.coefficients)
    optimizer, calls = make_optimizer(net), []
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda s: 1.0 / (1 + s), lambda s: 0.5 / (1 + s)]
    )
    hook(optimizer, net, calls)
    for step in make_batches(case):
        optimizer.zero_grad()
        for batch in step.flatten(0, 1):
            (loss_of(net, batch) / (case.world * case.accumulate)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        optimizer.step()
        scheduler.step()
    return calls, {n: p.detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_hooks_run_once_a_step_with_the_users_optimizer(rank_pool, stage, fused):
    case = replace(CASE, stage=stage, fused=fused)
    calls, weights = plain(case)
    assert len(calls) == 2 * case.steps
    for found, trained in rank_pool.run(fit, 2, case):
        assert found == calls
        for name, weight in weights.items():
            assert_close(trained[name], weight, name)


def error_of(case: Case) -> tuple[str, int]:
    module = Hooked(case)
    trainer = make_trainer(case)
    try:
        trainer.fit(module)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}", trainer.global_step
    return "nothing", trainer.global_step


def test_what_they_write_to_partitioned_parameters_is_an_error(rank_pool):
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    case = replace(CASE, stage=3, extra={"config": config})
    for message, steps in rank_pool.run(error_of, 2, case):
        assert message.startswith("ParameterEditError: Parameter 'net.embed.weight' was written to")
        assert steps == 0


class Overflowing(Hooked):
    """The second step's loss is NaN, and that step is skipped."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 1 else loss


def calls_of_skipped(case: Case) -> list[str]:
    module = Overflowing(case)
    make_trainer(case).fit(module)
    return [call.split()[0] for call in module.calls]


def test_none_runs_after_a_step_that_was_skipped(rank_pool):
    case = replace(
        CASE,
        precision="bf16-mixed",
        extra={
            "config": {
                "zero_optimization": {"stage": 2},
                "bf16": {"enabled": True, "check_grad_overflow": True},
            }
        },
    )
    for calls in rank_pool.run(calls_of_skipped, 2, case):
        assert calls == ["before", "after", "before", "before", "after", "before", "after"]
