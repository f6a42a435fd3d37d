"""The plan of steps.py, with the products of a GPU replaced by obvious ones in fp64."""

from __future__ import annotations

import pytest
import torch
from ops.slow_products import SlowProducts
from torch import Tensor

from lightning_fastmoe.ops import choice, expert_layer, expert_mlp, order_by_expert


@pytest.fixture
def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, up, down = randn(13, 8), randn(5, 32, 8), randn(5, 8, 16)
    given = [x, randn(13, 3), up, down, randn(5, 32), randn(5, 8)]
    return [leaf.requires_grad_() for leaf in given]


# Expert 2 of the five stays idle.
IDS = torch.stack([torch.tensor([0, 1, 3, 4])[torch.randperm(4)[:3]] for _ in range(13)])


def run(leaves: list[Tensor], in_order: bool) -> Tensor:
    x, weights, up, down, *biases = leaves
    if in_order:
        return expert_mlp(x, torch.tensor([4, 0, 2, 6, 1]), up, down, "swiglu", *biases)
    return expert_layer(x, weights, order_by_expert(IDS, 5), up, down, "swiglu", *biases)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("without", [None, 4, 5])
def test_equals_the_steps(monkeypatch, leaves, in_order, without):
    """Output and every gradient, with each bias missing in turn, and a second backward."""
    inputs = [None if i == without else leaf for i, leaf in enumerate(leaves)]
    wanted = [t for i, t in enumerate(inputs) if t is not None and not (in_order and i == 1)]
    out = run(inputs, in_order)
    upstream = torch.randn_like(out)
    want = [out, *torch.autograd.grad(out, wanted, upstream)]

    slow = SlowProducts()
    monkeypatch.setattr(choice, "hopper", lambda *_: slow)
    out = run(inputs, in_order)
    first = [out, *torch.autograd.grad(out, wanted, upstream, retain_graph=True)]
    second = [out, *torch.autograd.grad(out, wanted, upstream)]
    for got in (first, second):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alone", range(6))
def test_each_gradient_alone(monkeypatch, leaves, alone):
    out = run(leaves, False)
    upstream = torch.randn_like(out)
    want = torch.autograd.grad(out, leaves, upstream)[alone]
    monkeypatch.setattr(choice, "hopper", lambda *_: SlowProducts())
    inputs = [leaf.detach().requires_grad_(i == alone) for i, leaf in enumerate(leaves)]
    (got,) = torch.autograd.grad(run(inputs, False), inputs[alone], upstream)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("backward", [["slow"], [], ["", "slow"], ["slow", ""]])
@pytest.mark.parametrize("forward", ["", "slow"])
def test_products_may_change_between_passes(monkeypatch, leaves, in_order, forward, backward):
    """As when ZeRO 3 gathers weights to another address: what H holds must not be guessed."""
    wanted = [t for i, t in enumerate(leaves) if not (in_order and i == 1)]
    out = run(leaves, in_order)
    upstream = torch.randn_like(out)
    want = torch.autograd.grad(out, wanted, upstream)
    products = {"": None, "slow": SlowProducts()}
    monkeypatch.setattr(choice, "hopper", lambda *_: products[forward])
    out = run(leaves, in_order)
    for name in backward or [""]:
        monkeypatch.setattr(choice, "hopper", lambda *_, name=name: products[name])
        got = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
