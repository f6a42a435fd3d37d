"""The function around the kernels of the balancing losses, by twins of these."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.ops import balancing

OF_BALANCING, OF_Z = 0.5, 0.25


class Twins:
    """The operators, in any floating dtype."""

    @staticmethod
    def balancing_losses(
        scores: Tensor, logits: Tensor, counts: Tensor, of_balancing: float, of_z: float
    ) -> tuple[Tensor, Tensor]:
        share = counts / counts.sum()
        load = scores.shape[1] * (share * scores.mean(0)).sum()
        z = logits.logsumexp(1).square().mean()
        return torch.stack([load, z, of_balancing * load + of_z * z]), share


@pytest.fixture
def twins():
    with patch.object(balancing, "native", lambda *_: Twins):
        yield


@pytest.mark.parametrize("what", [0, 1, 2])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.usefixtures("twins")
def test_a_double_backward(what, is_transposed):
    torch.manual_seed(what)
    values = torch.randn(4, 6) if is_transposed else torch.randn(6, 4)
    counts = torch.tensor([3, 1, 0, 8])
    found = []
    for fused in (True, False):
        leaf = values.clone().requires_grad_()
        logits = leaf.T if is_transposed else leaf
        scores = logits.softmax(1)
        if fused:
            losses = balancing.balancing_losses(scores, logits, counts, OF_BALANCING, OF_Z)
        else:
            losses = Twins.balancing_losses(scores, logits, counts, OF_BALANCING, OF_Z)[0]
        (first,) = torch.autograd.grad(losses[what] * 3, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        found.append((first.detach(), second))
    torch.testing.assert_close(*found)
