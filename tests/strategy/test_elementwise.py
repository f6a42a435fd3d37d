"""Which optimizers train the same on flat pieces of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim
from transformers.optimization import Adafactor

from lightning_fastmoe.strategy.elementwise import is_elementwise


class Lars(optim.Optimizer):
    """Steps as long as the parameter; by one element too, if it has but one dimension."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.calls = []

    @torch.no_grad()
    def step(self):
        self.calls.append(len(self.calls))
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] * float(p.norm() / p.grad.norm()))


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


def test_one_group_is_enough():
    optimizer = make(optim.AdamW)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": "fast"})
    assert is_elementwise(optimizer) is None


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
    is_elementwise(optimizer)
    is_elementwise(other)
    assert torch.equal(torch.get_rng_state(), random)
    assert (hooked, other.calls) == ([], [])
    for each in (optimizer, other):
        (parameter,) = each.param_groups[0]["params"]
        assert torch.equal(parameter, torch.ones(3, 2))
        assert parameter.grad is None
        assert not each.state
