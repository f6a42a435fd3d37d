"""The trial of an optimizer where its parameters are, and what it leaves alone there."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from lightning_fastmoe.zero.elementwise import is_elementwise


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("kind", "options", "answer"),
    [
        (optim.AdamW, {"fused": True}, True),
        (optim.AdamW, {"foreach": True, "amsgrad": True}, True),
        (optim.SGD, {"momentum": 0.9}, True),
        (optim.Adafactor, {}, False),
        (optim.Muon, {}, False),
    ],
)
def test_answers_and_random_numbers(device, kind, options, answer):
    optimizer = kind([nn.Parameter(torch.ones(3, 2, device=device))], **options)
    states = torch.cuda.get_rng_state_all()
    assert is_elementwise(optimizer) is answer
    for before, after in zip(states, torch.cuda.get_rng_state_all(), strict=True):
        assert torch.equal(before, after)
