"""The plan of steps.py, with the products of a GPU replaced by obvious ones in fp64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.ops import expert_layer, expert_mlp, order_by_expert
from lightning_fastmoe.ops.activation import apply_activation

layer_module = importlib.import_module("lightning_fastmoe.ops.expert_layer")


class SlowProducts:
    """What csrc/hopper computes, one row after the other."""

    @staticmethod
    def _experts(offsets: Tensor, rows: int) -> list[int]:
        return torch.searchsorted(offsets.long(), torch.arange(rows), right=True).tolist()

    def hopper_up_forward(self, x, order, top_k, offsets, up, bias, activation, keep_h):
        experts = self._experts(offsets, len(order))
        rows = x[order // top_k]
        h = torch.stack([up[e] @ row for e, row in zip(experts, rows, strict=True)])
        if bias is not None:
            h = h + bias[experts]
        return (h if keep_h else h[:0]), apply_activation(h, activation)

    def hopper_rows_product(self, rows, offsets, weight, transposed, order=None, weights=None):
        assert order is None
        assert weights is None
        experts = self._experts(offsets, len(rows))
        matrices = weight.transpose(1, 2) if transposed else weight
        return torch.stack([row @ matrices[e] for e, row in zip(experts, rows, strict=True)])

    def hopper_backward_activation_(self, grad, order, offsets, down, h, weights, activation):
        top_k = weights.shape[1]
        d_act = self.hopper_rows_product(grad[order // top_k], offsets, down, False)
        w = weights.reshape(-1)[order].unsqueeze(1)
        with torch.enable_grad():
            leaf = h.clone().requires_grad_()
            act = apply_activation(leaf, activation)
            (d_h,) = torch.autograd.grad(act, leaf, w * d_act)
        act = act.detach()
        h.copy_(d_h)
        d_weights = torch.empty_like(weights).reshape(-1)
        d_weights[order] = (act * d_act).sum(1).to(weights.dtype)
        return w * act, d_weights.view_as(weights)

    def hopper_weight_gradient(self, gathered, order, top_k, rows, offsets, transposed):
        out = rows.new_zeros(len(offsets), gathered.shape[1], rows.shape[1])
        for r, e in enumerate(self._experts(offsets, len(rows))):
            out[e] += torch.outer(gathered[order[r] // top_k], rows[r])
        return out.transpose(1, 2).contiguous() if transposed else out


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
    monkeypatch.setattr(layer_module, "hopper", lambda *_: slow)
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
    monkeypatch.setattr(layer_module, "hopper", lambda *_: SlowProducts())
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
    monkeypatch.setattr(layer_module, "hopper", lambda *_: products[forward])
    out = run(leaves, in_order)
    for name in backward or [""]:
        monkeypatch.setattr(layer_module, "hopper", lambda *_, name=name: products[name])
        got = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
