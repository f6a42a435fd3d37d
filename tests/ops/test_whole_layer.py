"""All ops of a layer together, against one (token, slot) pair at a time."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fastmoe.ops import (
    ACTIVATIONS,
    grouped_mlp,
    is_gated,
    order_by_expert,
    permute,
    reference,
    unpermute,
)

CASES = [
    (1, 1, 1, 1, 1),
    (7, 5, 3, 4, 1),
    (11, 3, 5, 7, 2),
    (5, 2, 3, 3, 3),
    (0, 3, 2, 4, 2),
    (13, 7, 4, 17, 3),
]
"""(T, D, F, E, K): odd, prime, K = 1, K = E, no tokens, more experts than pairs can fill."""


def make(tokens, width, inner, experts, k, name="swiglu", bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    rows = (2 if is_gated(name) else 1) * inner
    shapes = [
        (tokens, width),
        (tokens, k),
        (experts, rows, width),
        (experts, width, inner),
        (experts, rows),
        (experts, width),
    ]
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :k]
    return (leaves if bias else leaves[:4]), ids


def fast(leaves, ids, name):
    x, weights, up, down, *biases = leaves
    order = order_by_expert(ids, up.shape[0])
    rows = permute(x, order.order, order.inverse, ids.shape[1])
    y = grouped_mlp(rows, order.tokens_per_expert, up, down, name, *biases)
    return unpermute(y, weights, order.order, order.inverse)


def slow(leaves, ids, name):
    x, weights, up, down, *biases = leaves
    return reference.moe(x, weights, ids, up, down, name, *biases)


def assert_same_value_and_grads(leaves, ids, name):
    got, want = fast(leaves, ids, name), slow(leaves, ids, name)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    want_grads = torch.autograd.grad(want, leaves, upstream, allow_unused=True)
    for leaf, a, b in zip(leaves, got_grads, want_grads, strict=True):
        expected = torch.zeros_like(leaf) if b is None else b
        torch.testing.assert_close(a, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("tokens", "width", "inner", "experts", "k"), CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_all_sizes_equal_the_slow_twin(tokens, width, inner, experts, k, bias):
    leaves, ids = make(tokens, width, inner, experts, k, bias=bias)
    assert_same_value_and_grads(leaves, ids, "swiglu")


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_all_activations_equal_the_slow_twin(name, bias):
    leaves, ids = make(9, 5, 3, 4, 2, name, bias)
    assert_same_value_and_grads(leaves, ids, name)


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_all_tokens_on_one_expert(expert):
    leaves, _ = make(9, 5, 3, 5, 1)
    assert_same_value_and_grads(leaves, torch.full((9, 1), expert), "swiglu")


@pytest.mark.parametrize("name", ["swiglu", "relu"])
def test_the_layer_passes_gradcheck(name):
    leaves, ids = make(4, 2, 2, 3, 2, name)
    assert torch.autograd.gradcheck(lambda *tensors: fast(tensors, ids, name), leaves)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name.startswith(("index_put", "_index_put_impl")):
            accumulate = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
            name += "(accumulate)" if accumulate else ""
        self.names.add(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize("size", [8, 5])
def test_nothing_adds_in_an_arbitrary_order(size):
    """What CUDA does with atomics must not occur, forward or backward."""
    leaves, ids = make(9, size, size, 4, 2, dtype=torch.float32)
    with _Names() as seen:
        fast(leaves, ids, "swiglu").square().sum().backward()
    assert "index_select" in seen.names  # the mode saw the ops
    adding = ("index_add", "scatter_add", "scatter_reduce", "accumulate", "embedding", "bincount")
    assert [name for name in seen.names if any(word in name for word in adding)] == []


def test_no_size_depends_on_the_routing():
    """Fake tensors have no data: reading one on the host raises."""
    with FakeTensorMode():
        leaves, ids = make(9, 8, 8, 4, 2, dtype=torch.bfloat16)
        out = fast(leaves, ids, "swiglu")
        out.square().sum().backward()
    assert out.shape == (9, 8)
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]
