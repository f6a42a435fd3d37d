"""What the strategy says about an optimizer that it accepts."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn, optim

from lightning_fastmoe.strategy.checks import advise_fused

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Own(optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "fused": None})


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("optimizer", "device", "advised"),
    [
        (lambda: optim.AdamW(parameters()), CUDA, True),
        (lambda: optim.Adam(parameters(), foreach=True), CUDA, True),
        (lambda: optim.SGD(parameters(), lr=0.1, fused=False), CUDA, True),
        (lambda: optim.AdamW(parameters(), fused=True), CUDA, False),
        (lambda: optim.AdamW([{"params": parameters(), "fused": True}]), CUDA, False),
        (lambda: optim.AdamW(parameters()), CPU, False),
        (lambda: optim.RMSprop(parameters()), CUDA, False),  # has none that is fused
        (lambda: Own(parameters()), CUDA, False),  # means something of its own
    ],
)
def test_a_fused_optimizer_is_advised_where_there_is_one(optimizer, device, advised, caplog):
    made = optimizer()
    with caplog.at_level(logging.INFO):
        advise_fused(made, device)
    said = [record.getMessage() for record in caplog.records]
    assert [f"{type(made).__name__}(fused=True)" in text for text in said] == [True] * advised
