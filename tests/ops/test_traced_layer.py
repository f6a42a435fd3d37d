"""The layer as operators for torch.compile, against the layer as one autograd node and the twin."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.ops import is_gated, order_by_expert, reference, traced_layer
from lightning_fastmoe.ops.native import TRACED_NAMESPACE

OPERATORS = getattr(torch.ops, TRACED_NAMESPACE)


def make(tokens, width, inner, experts, k, name="swiglu", bias=True, dtype=torch.float64):
    """Leaves (x, weights, up, down and the biases), and each token's K distinct experts."""
    torch.manual_seed(0)
    rows = (2 if is_gated(name) else 1) * inner
    shapes = [(tokens, width), (tokens, k), (experts, rows, width), (experts, width, inner)]
    shapes += [(experts, rows), (experts, width)] if bias else []
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return leaves, torch.rand(tokens, experts).argsort(dim=1)[:, :k]


def arguments(leaves, ids, name="swiglu", keep_h=True):
    x, weights, up, down, *biases = leaves
    order = order_by_expert(ids, up.shape[0])
    up_bias, down_bias = biases or (None, None)
    return (
        *(x, weights, up, down, up_bias, down_bias, order.order, order.inverse),
        *(order.tokens_per_expert, order.offsets, name, keep_h),
    )


def backward_arguments(leaves, ids, wanted, name="swiglu"):
    """Those of the backward, after a forward, and the gradients' inputs."""
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(leaves, ids, name)]
    out, h = traced_layer.expert_layer(*given)
    return torch.randn_like(out), h, *given[:-1], wanted


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", [(7, 5, 3, 4, 1), (11, 3, 5, 7, 2), (0, 3, 2, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ["swiglu", "relu"])
def test_values_and_gradients_are_the_twins(case, name, bias):
    leaves, ids = make(*case, name=name, bias=bias)
    out = traced_layer.expert_layer(*arguments(leaves, ids, name))[0]
    x, weights, up, down, *biases = leaves
    want = reference.moe(x, weights, ids, up, down, name, *biases)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    if not case[0]:
        return
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(want, leaves, grad)
    # Twice: the first backward pass must leave H as it was.
    for retain in (True, False):
        found = torch.autograd.grad(out, leaves, grad, retain_graph=retain)
        for got, good in zip(found, expected, strict=True):
            torch.testing.assert_close(got, good, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [False, True])
def test_only_wanted_gradients(bias):
    leaves, ids = make(11, 3, 5, 7, 2, bias=bias)
    count = len(leaves)
    everything = [i < count for i in range(6)]
    full = backward_arguments(leaves, ids, everything)
    expected = traced_layer.expert_layer_backward(*full)
    for only in range(count):
        wanted = [i == only for i in range(6)]
        (found,) = traced_layer.expert_layer_backward(*full[:-1], wanted)
        assert torch.equal(found, expected[only])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.poisoned(False)  # opcheck traces with fake tensors
def test_operators_are_what_they_declare(bias):
    for dtype in (torch.float32, torch.float64):
        leaves, ids = make(11, 4, 8, 7, 2, bias=bias, dtype=dtype)
        for keep_h in (True, False):
            inputs = leaves if keep_h else [t.detach() for t in leaves]
            torch.library.opcheck(
                OPERATORS.expert_layer.default, arguments(inputs, ids, keep_h=keep_h)
            )
        for wanted in (
            [True, True, True, True, bias, bias],
            [True, False, False, True, False, bias],
        ):
            torch.library.opcheck(
                OPERATORS.expert_layer_backward.default, backward_arguments(leaves, ids, wanted)
            )


def test_the_copy_of_h_is_one_experts(monkeypatch):
    """On the CPU without biases; eager mode copies nothing."""
    leaves, ids = make(64, 4, 8, 16, 2, bias=False)
    given = backward_arguments(leaves, ids, [True] * 4 + [False] * 2)
    rows = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor,
        "clone",
        lambda t, **how: rows.append(t.shape[0]) or clone(t, **how) if t.dim() == 2 else clone(t),
    )
    before = clone(given[1])
    traced_layer.expert_layer_backward(*given)
    assert torch.equal(given[1], before)
    assert sorted(rows) == sorted(ids.flatten().bincount().tolist())
