"""Which optimizers train the same on flat fragments of parameters."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from torch import nn, optim
from transformers.optimization import Adafactor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.strategy.checks import check_optimizer
from lightning_fastmoe.zero.elementwise import is_elementwise


class Lars(optim.Optimizer):
    """Steps as long as the parameter is, if the group says so; remembers its calls."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "by_norm": True})
        self.calls = []

    @torch.no_grad()
    def step(self):
        self.calls.append(len(self.calls))
        for group in self.param_groups:
            for p in group["params"]:
                length = float(p.norm() / p.grad.norm()) if group["by_norm"] else 1.0
                p.add_(p.grad, alpha=-group["lr"] * length)


class OneNormForAll(optim.Optimizer):
    """Clips by the norm of all its gradients, of which a rank has some."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        every = [p for group in self.param_groups for p in group["params"]]
        norm = torch.cat([p.grad.flatten() for p in every]).norm()
        for p in every:
            p.add_(p.grad / norm, alpha=-0.1)


class NoDecayOfVectors(optim.Optimizer):
    """Looks at shapes, not at norms."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 * (p.dim() > 1)).add_(p.grad, alpha=-group["lr"])


class Langevin(optim.SGD):
    """Adds noise."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p))


class OwnsMemory(Lars):
    """As DeepSpeedCPUAdam does outside of Python."""

    def __del__(self):
        pass


def make(kind, **options):
    return kind([nn.Parameter(torch.ones(3, 2))], **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.ASGD, {}),
        (optim.Adadelta, {}),
        (optim.Adam, {"amsgrad": True}),
        (optim.AdamW, {}),
        (optim.AdamW, {"fused": True}),
        (optim.AdamW, {"foreach": True}),
        (optim.AdamW, {"foreach": False, "lr": torch.tensor(0.1)}),
        (optim.Adamax, {}),
        (optim.NAdam, {}),
        (optim.RAdam, {}),
        (optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (optim.Rprop, {}),
        (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_these_are(kind, options):
    assert is_elementwise(make(kind, **options)) is True


@pytest.mark.parametrize(
    "kind", [optim.Adafactor, optim.Muon, Adafactor, Lars, OneNormForAll, NoDecayOfVectors]
)
def test_these_are_not(kind):
    assert is_elementwise(make(kind)) is False


@pytest.mark.parametrize("kind", [optim.LBFGS, optim.SparseAdam, Langevin, OwnsMemory])
def test_of_these_it_cannot_be_told(kind):
    assert is_elementwise(make(kind)) is None


@pytest.mark.parametrize(("options", "answer"), [((False, False), True), ((False, True), False)])
def test_each_group_is_tried_with_its_own_options(options, answer):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "by_norm": own} for own in options]
    assert is_elementwise(Lars(groups)) is answer


@pytest.mark.parametrize(("kind", "answer"), [(optim.AdamW, True), (optim.Adafactor, False)])
def test_a_scheduler_that_begins_at_zero_hides_nothing(kind, answer):
    optimizer = make(kind)
    optim.lr_scheduler.LambdaLR(optimizer, float)
    assert optimizer.param_groups[0]["lr"] == 0
    assert is_elementwise(optimizer) is answer
    assert optimizer.param_groups[0]["lr"] == 0


def test_the_optimizer_and_random_numbers_stay_as_they_were():
    optimizer = make(Langevin)
    hooked = []
    optimizer.register_step_pre_hook(lambda *_: hooked.append(1))
    other = make(Lars)
    random = torch.get_rng_state()
    with mock.patch("torch.cuda.manual_seed_all") as seed_gpus:
        is_elementwise(optimizer)
        is_elementwise(other)
    seed_gpus.assert_not_called()
    assert torch.equal(torch.get_rng_state(), random)
    assert (hooked, other.calls) == ([], [])
    for each in (optimizer, other):
        (parameter,) = each.param_groups[0]["params"]
        assert torch.equal(parameter, torch.ones(3, 2))
        assert parameter.grad is None
        assert not each.state


def test_deepspeeds_own_are_known_by_name():
    # Making one would compile it.
    check_optimizer(object.__new__(FusedAdam))
    with pytest.raises(ConfigError, match="FusedLamb depends on whole parameters"):
        check_optimizer(object.__new__(FusedLamb))
