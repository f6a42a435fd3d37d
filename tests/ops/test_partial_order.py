"""Layers in which some (token, slot) pairs have no row, against an expert of zeros for those."""

from __future__ import annotations

import pytest
import torch
from ops.slow_products import SlowOperators

from lightning_fastmoe import ops
from lightning_fastmoe.ops import choice, kernels, reference
from lightning_fastmoe.ops.products.hopper import HopperProducts
from lightning_fastmoe.ops.products.torch import TorchProducts
from lightning_fastmoe.ops.steps import Steps
from lightning_fastmoe.ops.two_operators import TwoOperators

E = 4
CASES = {
    "some": (13, 8, 5, 3, 0.5),
    "few": (40, 5, 8, 6, 0.1),
    "aligned": (19, 8, 16, 2, 0.5),
    "one slot": (11, 4, 3, 1, 0.5),
    "none": (6, 4, 3, 2, 0.0),
    "all": (6, 4, 3, 2, 1.0),
    "no tokens": (0, 4, 3, 2, 0.5),
}
"""(T, D, F, K, the fraction of pairs that have a row)."""


PATHS = {
    "steps": Steps(TorchProducts()),
    "hopper": Steps(HopperProducts(SlowOperators())),
    "two operators": TwoOperators(SlowOperators(), True),
}
"""Implementations that aren't the CPU's choice; those of a GPU by twins of its operators."""


def inputs(case, name, bias, dtype):
    tokens, width, inner, k, fraction = CASES[case]
    torch.manual_seed(0)
    up_rows = inner * (2 if ops.is_gated(name) else 1)
    shapes = [(tokens, width), (tokens, k), (E, up_rows, width), (E, width, inner)]
    if bias:
        shapes += [(E, up_rows), (E, width)]
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    has_row = torch.rand(tokens, k) < fraction
    ids = torch.randint(E - 1, (tokens, k)).masked_fill(~has_row, E)  # expert E - 1 is idle
    return leaves, ids, has_row


def with_an_expert_of_zeros(leaves, ids, name):
    x, weights, *mlp = leaves
    return reference.moe(
        x,
        weights,
        ids,
        *(torch.cat([p, 0 * p[:1]]) for p in mlp[:2]),
        name,
        *(torch.cat([p, 0 * p[:1]]) for p in mlp[2:]),
    )


def partial(leaves, ids, has_row, name, layer=ops.expert_layer):
    x, weights, *mlp = leaves
    order = ops.order_by_expert(ids, E + 1).first(E, int(has_row.sum()))
    assert order.has_all_pairs == bool(has_row.all())
    return layer(x, weights, order, *mlp[:2], name, *mlp[2:])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", ["chosen", "unfused", *PATHS])
def test_pairs_without_a_row_add_nothing(case, name, bias, dtype, path, monkeypatch):
    leaves, ids, has_row = inputs(case, name, bias, dtype)
    if path in PATHS:
        if bias and path == "two operators":
            pytest.skip("they have no biases")
        if path != "steps" and not has_row.any():
            pytest.skip("the kernels' twins need rows")
        monkeypatch.setattr(choice, "choose", lambda call, h=None: PATHS[path])
    layer = ops.unfused_layer if path == "unfused" else ops.expert_layer
    # Whatever is in the weights of pairs without a row must not matter.
    weights = leaves[1].detach().masked_fill(~has_row, torch.inf).requires_grad_()
    given = [leaves[0], weights, *leaves[2:]]
    out = partial(given, ids, has_row, name, layer)
    want = with_an_expert_of_zeros(leaves, ids, name)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(want, leaves, upstream, allow_unused=True)
    right = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
    for _ in range(2):  # the second recomputes what the first has overwritten
        found = torch.autograd.grad(out, given, upstream, retain_graph=True)
        torch.testing.assert_close(found, tuple(right), rtol=tolerance, atol=tolerance)


def test_second_derivatives():
    leaves, ids, has_row = inputs("some", "silu", False, torch.float64)

    def squares(out):
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    found = squares(partial(leaves, ids, has_row, "silu"))
    right = squares(with_an_expert_of_zeros(leaves, ids, "silu"))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_the_first_experts_of_an_order():
    order = ops.order_by_expert(torch.tensor([[1, 2], [0, 1], [2, 2]]), 3).first(2, 3)
    assert order.order.tolist() == [2, 0, 3]
    assert order.inverse.tolist() == [1, -1, 0, 2, -1, -1]
    assert order.tokens_per_expert.tolist() == [1, 2]
    assert order.offsets.tolist() == [1, 3]
    assert not order.has_all_pairs


def test_sums_of_the_rows_that_there_are():
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    inverse = torch.tensor([1, -1, -1, -1, 0, 1])
    total = kernels.sum_rows(rows, inverse, None, 2)
    assert total.tolist() == [[3.0, 5.0], [0.0, 0.0], [4.0, 7.0]]


@pytest.mark.parametrize("order", [[1, 4, 0], [0, 1, 2, 3, 4, 5]])
def test_slots_without_a_row_have_weights_without_gradient(order):
    h, d_act = torch.randn(len(order), 4), torch.randn(len(order), 4)
    dots = (torch.relu(h) * d_act).sum(1)
    weights = torch.full((3, 2), torch.inf)
    found = kernels.activation_backward_(h, d_act, weights, torch.tensor(order), "relu")
    right = torch.zeros(6).index_put((torch.tensor(order),), dots)
    torch.testing.assert_close(found, right.view(3, 2))
