"""The oracle itself, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_fastmoe.ops import reference


def test_softmax_top_k_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]], dtype=torch.float64)
    scores, weights, ids = reference.softmax_top_k(logits, 2, normalize=False)
    torch.testing.assert_close(scores, torch.tensor([[0.125, 0.25, 0.625]]).double())
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.25]]).double())
    assert ids.tolist() == [[2, 1]]
    _, weights, _ = reference.softmax_top_k(logits, 2, normalize=True)
    torch.testing.assert_close(weights, torch.tensor([[5 / 7, 2 / 7]], dtype=torch.float64))


def test_moe_by_hand():
    """Experts multiply by 1 * 2, 10 * 3 and 100 * 4 (relu of a positive number)."""
    up = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    down = torch.tensor([2.0, 3.0, 4.0]).view(3, 1, 1)
    x = torch.tensor([[1.0], [2.0]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    ids = torch.tensor([[0, 2], [1, 0]])
    got = reference.moe(x, weights, ids, up, down, "relu")
    assert got.tolist() == [[0.5 * 2 + 0.25 * 400], [60.0 + 2 * 4]]
    biased = reference.moe(
        x, weights, ids, up, down, "relu", torch.ones(3, 1), torch.tensor([[7.0], [8.0], [9.0]])
    )
    assert biased[1].item() == (21 * 3 + 8) + 2 * (3 * 2 + 7)


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_activations_are_those_of_torch(name):
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(reference.activation(z, name), getattr(F, name)(z))


def test_load_balancing_loss_is_one_when_uniform_and_e_when_collapsed():
    uniform = torch.full((4, 4), 0.25, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert reference.load_balancing_loss(uniform, ids).item() == pytest.approx(1.0)
    collapsed = torch.eye(4, dtype=torch.float64)[[2, 2, 2]]
    assert reference.load_balancing_loss(collapsed, torch.full((3, 1), 2)).item() == 4.0


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    want = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert reference.z_loss(logits).item() == pytest.approx(want)
