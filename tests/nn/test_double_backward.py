"""Gradients that are differentiated again, of layers whose inputs depend on one another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn.twice import SETTINGS, Twice, gradients

from lightning_fastmoe import MoE, SparseUpdate, ops

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("name", SETTINGS)
def test_as_by_separate_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where single experts are trained, whose gradients are rows of those of all."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"load_balancing": 0.0, "z_loss": 0.0, **SETTINGS[name]}
    model = Twice(MoE(6, 10, 4, **{"top_k": 2, **settings})).double().eval()
    single = copy.deepcopy(model)
    SparseUpdate(experts=[1, 2]).apply(single)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    all_found, rows_found = gradients(model, x), gradients(single, x)
    monkeypatch.setattr(ops, "expert_layer", ops.unfused_layer)
    wanted, _, second = gradients(model, x)
    for (plain, first, found), rows in ((all_found, None), (rows_found, [1, 2])):
        for key in first:
            full = key.replace(".trained.", ".")
            part = slice(None) if full == key else rows
            torch.testing.assert_close(first[key], plain[key], **CLOSE)
            torch.testing.assert_close(first[key], wanted[full][part], **CLOSE)
            torch.testing.assert_close(found[key], second[full][part], **CLOSE)
    used = [key for key, value in second.items() if value.abs().max() > 1e-3]
    assert {"x", "layer.experts.up_proj", "layer.experts.down_proj"} < set(used)
