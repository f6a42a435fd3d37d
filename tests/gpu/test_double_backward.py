"""Gradients with ``create_graph=True`` of layers whose kernels have no second derivative."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn.twice import SETTINGS, Twice, gradients
from torch import Tensor

from lightning_fastmoe import MoE


def distance(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-6))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_and_second(name: str, dtype: torch.dtype) -> None:
    """Second ones in fp32 alone: routers choose otherwise in bf16 than in fp64."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"load_balancing": 0.0, "z_loss": 0.0, **SETTINGS[name]}
    exact = Twice(MoE(64, 128, 4, **{"top_k": 2, **settings})).double().eval()
    x = torch.randn(40, 64, dtype=torch.float64, requires_grad=True)
    model = copy.deepcopy(exact).to("cuda", dtype)
    own = x.detach().to("cuda", dtype).requires_grad_()
    plain, first, second = gradients(model, own)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert {key: d for key in plain if (d := distance(first[key], plain[key])) > close} == {}
    if dtype == torch.float32:
        _, once, twice = gradients(exact, x)
        for found, wanted in ((first, once), (second, twice)):
            far = {key: d for key in found if (d := distance(found[key], wanted[key])) > close}
            assert far == {}
