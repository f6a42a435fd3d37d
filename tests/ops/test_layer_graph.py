"""The planned layer against the chain of ops and against one (token, slot) pair at a time."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.ops import (
    ACTIVATIONS,
    ExpertOrder,
    expert_layer,
    expert_mlp,
    grouped_mlp,
    is_gated,
    kernels,
    order_by_expert,
    permute,
    reference,
    unpermute,
)
from lightning_fastmoe.ops.products.torch import (
    expert_sums,
    grouped_outer_product,
    grouped_product,
)

CASES = [
    (1, 1, 1, 1, 1),
    (7, 5, 3, 4, 1),
    (11, 3, 5, 7, 2),
    (5, 2, 3, 3, 3),
    (0, 3, 2, 4, 2),
    (13, 7, 4, 17, 3),
    (19, 8, 16, 6, 2),  # rows of whole 16-byte units: F.grouped_mm in fp32
    (0, 8, 16, 6, 2),
    (6, 16, 8, 6, 6),
]
"""(T, D, F, E, K): odd, prime, K = 1, K = E, no tokens, more experts than pairs can fill."""

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


def make(case, name="swiglu", dtype=torch.float64, bias=False):
    tokens, width, inner, experts, k = case
    torch.manual_seed(0)
    rows = (2 if is_gated(name) else 1) * inner
    shapes = [(tokens, width), (tokens, k), (experts, rows, width), (experts, width, inner)]
    if bias:
        shapes += [(experts, rows), (experts, width)]
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return leaves, torch.rand(tokens, experts).argsort(dim=1)[:, :k]


def planned(leaves, ids, name):
    x, weights, up, down, *biases = leaves
    return expert_layer(x, weights, order_by_expert(ids, up.shape[0]), up, down, name, *biases)


def chain(leaves, ids, name):
    x, weights, up, down, *biases = leaves
    order = order_by_expert(ids, up.shape[0])
    rows = permute(x, order.order, order.inverse, ids.shape[1])
    y = grouped_mlp(rows, order.tokens_per_expert, up, down, name, *biases)
    return unpermute(y, weights, order.order, order.inverse)


def slow(leaves, ids, name):
    x, weights, up, down, *biases = leaves
    return reference.moe(x, weights, ids, up, down, name, *biases)


def assert_same(leaves, ids, name, oracle=chain):
    tolerance = TOLERANCE[leaves[0].dtype]
    got, want = planned(leaves, ids, name), oracle(leaves, ids, name)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    want_grads = torch.autograd.grad(want, leaves, upstream, allow_unused=True)
    for leaf, a, b in zip(leaves, got_grads, want_grads, strict=True):
        expected = torch.zeros_like(leaf) if b is None else b
        torch.testing.assert_close(a, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("oracle", [chain, slow])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_all_sizes_equal_the_chain_and_the_slow_twin(case, oracle, dtype):
    leaves, ids = make(case, dtype=dtype)
    assert_same(leaves, ids, "swiglu", oracle)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("case", [(9, 5, 3, 4, 2), (9, 8, 8, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_all_activations_equal_the_slow_twin(name, case, dtype):
    leaves, ids = make(case, name, dtype)
    assert_same(leaves, ids, name, slow)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_biases_equal_the_slow_twin(case, name, dtype):
    leaves, ids = make(case, name, dtype, bias=True)
    assert_same(leaves, ids, name, slow)


def sorted_rows(leaves, ids):
    """What an exchange between ranks hands over: rows by expert, without weights."""
    x, _, *mlp = leaves
    order = order_by_expert(ids, mlp[0].shape[0])
    rows = x.detach()[order.order // ids.shape[1]].requires_grad_()
    return rows, order.tokens_per_expert, mlp


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_rows_in_expert_order(case, bias, dtype):
    rows, counts, (up, down, *biases) = sorted_rows(*make(case, dtype=dtype, bias=bias))
    got = expert_mlp(rows, counts, up, down, "swiglu", *biases)
    want = grouped_mlp(rows, counts, up, down, "swiglu", *biases)
    torch.testing.assert_close(got, want)
    upstream, leaves = torch.randn_like(want), (rows, up, down, *biases)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_in_expert_order_second_derivatives(bias):
    rows, counts, (up, down, *biases) = sorted_rows(*make((3, 2, 2, 3, 2), bias=bias))

    def function(*tensors):
        return expert_mlp(tensors[0], counts, tensors[1], tensors[2], "swiglu", *tensors[3:])

    assert torch.autograd.gradgradcheck(function, (rows, up, down, *biases))


def test_rows_in_expert_order_keep_the_rows_and_the_pre_activation_alone():
    rows, counts, (up, down) = sorted_rows(*make((33, 8, 16, 4, 2), dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        expert_mlp(rows, counts, up, down, "swiglu")
    floats = [tuple(t.shape) for t in saved if t.is_floating_point()]
    assert sorted(floats) == sorted([(66, 8), (66, 32), (4, 32, 8), (4, 8, 16)])


@pytest.mark.parametrize("expert", [0, 2, 4])
@pytest.mark.parametrize("width", [5, 8])
def test_all_tokens_on_one_expert(expert, width):
    leaves, _ = make((9, width, width, 5, 1), dtype=torch.float32)
    assert_same(leaves, torch.full((9, 1), expert), "swiglu")


@pytest.mark.parametrize("name", ["swiglu", "geglu", "silu"])
@pytest.mark.parametrize("case", [(4, 2, 2, 3, 2), (3, 2, 3, 4, 1)], ids=str)
def test_the_layer_passes_gradcheck(name, case):
    leaves, ids = make(case, name)
    assert torch.autograd.gradcheck(lambda *tensors: planned(tensors, ids, name), leaves)


def test_bf16_is_as_close_to_fp64_as_the_chain():
    leaves, ids = make((64, 32, 48, 6, 3), dtype=torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = chain(exact, ids, "swiglu")
    upstream = torch.randn_like(want).bfloat16()
    want_grads = torch.autograd.grad(want, exact, upstream.double())

    def errors(function):
        weights = leaves[1].detach().float().requires_grad_()
        inputs = [leaves[0], weights, *leaves[2:]]
        out = function(inputs, ids, "swiglu")
        grads = torch.autograd.grad(out, inputs, upstream)
        pairs = zip([out.detach(), *grads], [want.detach(), *want_grads], strict=True)
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    for ours, theirs in zip(errors(planned), errors(chain), strict=True):
        assert ours < 1.3 * theirs + 1e-4


def test_saves_the_tokens_and_the_pre_activation_alone():
    leaves, ids = make((33, 8, 16, 4, 2), dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        planned(leaves, ids, "swiglu")
    floats = [tuple(t.shape) for t in saved if t.is_floating_point()]
    rows, doubled = 33 * 2, 2 * 16
    assert sorted(floats) == sorted(
        [(33, 8), (rows, doubled), (33, 2), (4, doubled, 8), (4, 8, 16)]
    )


@pytest.mark.parametrize("bias", [False, True])
def test_backward_can_run_twice(bias):
    """The first one writes over the pre-activation, so the second has to compute it again."""
    leaves, ids = make((9, 8, 8, 4, 2), bias=bias)
    out = planned(leaves, ids, "swiglu")
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    third = torch.autograd.grad(out.sum(), leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_backward_takes_no_second_buffer_for_the_pre_activation():
    leaves, ids = make((9, 8, 8, 4, 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = planned(leaves, ids, "swiglu")
    (h,) = (t for t in saved if t.shape == (18, 16) and t.is_floating_point())
    before = h.clone()
    torch.autograd.grad(out.sum(), leaves)
    assert not torch.equal(h, before)


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_the_layer_passes_gradgradcheck(frozen):
    leaves, ids = make((3, 2, 2, 3, 2))
    leaves = [leaf.detach().requires_grad_(i != frozen) for i, leaf in enumerate(leaves)]
    assert torch.autograd.gradgradcheck(lambda *tensors: planned(tensors, ids, "swiglu"), leaves)


def test_the_layer_with_biases_passes_gradgradcheck():
    leaves, ids = make((3, 2, 2, 3, 2), bias=True)
    assert torch.autograd.gradgradcheck(lambda *tensors: planned(tensors, ids, "swiglu"), leaves)


@pytest.mark.parametrize("frozen", range(6))
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen):
    leaves, ids = make((9, 8, 8, 4, 2), bias=True)
    want = torch.autograd.grad(chain(leaves, ids, "swiglu").sum(), leaves)
    some = [leaf.detach().requires_grad_(i != frozen) for i, leaf in enumerate(leaves)]
    planned(some, ids, "swiglu").sum().backward()
    for i, (leaf, grad) in enumerate(zip(some, want, strict=True)):
        if i == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, grad)


def test_an_expanded_upstream_gradient_is_accepted():
    leaves, ids = make((9, 8, 8, 4, 2), dtype=torch.float32)
    got = torch.autograd.grad(planned(leaves, ids, "swiglu").sum(), leaves)
    want = torch.autograd.grad(chain(leaves, ids, "swiglu").sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weight_gradients_of_idle_experts_are_zero(dtype):
    """The memory that a product over no rows leaves untouched holds NaN here."""
    order = order_by_expert(torch.tensor([[1], [3], [3]]), 5)
    a, b = torch.randn(3, 8, dtype=dtype), torch.randn(3, 16, dtype=dtype)
    grad = grouped_outer_product(a, b, order.tokens_per_expert, order.offsets)
    assert grad.shape == (5, 8, 16)
    assert float(grad[[0, 2, 4]].abs().sum()) == 0
    torch.testing.assert_close(grad[1], torch.outer(a[0], b[0]))
    poisoned = torch.full((5, 2, 3), torch.nan)
    kernels.zero_empty_experts_(poisoned, order.tokens_per_expert)
    assert poisoned.isnan().any(dim=(1, 2)).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_product_takes_weights_at_odd_places(transposed, offset):
    flat = torch.randn(4 * 8 * 16 + offset)
    weight = flat[offset:].view(4, 16, 8).transpose(1, 2) if transposed else None
    weight = flat[offset:].view(4, 8, 16) if weight is None else weight
    order = order_by_expert(torch.tensor([[0], [2], [2]]), 4)
    x = torch.randn(3, 8)
    got = grouped_product(x, weight, order.tokens_per_expert, order.offsets)
    torch.testing.assert_close(got, torch.stack([x[0] @ weight[0], *(x[1:] @ weight[2])]))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("with_order", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_activation_backward_equals_autograd(name, with_order, with_bias):
    torch.manual_seed(0)
    h = torch.randn(6, 10 if is_gated(name) else 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(6) if with_order else None
    bias = torch.randn(4, h.shape[1], dtype=torch.float64) if with_bias else None
    offsets = torch.tensor([1, 1, 4, 6], dtype=torch.int32)
    d_act = torch.randn(6, 5, dtype=torch.float64)
    flat = weights.flatten() if order is None else weights.flatten()[order]
    shifted = h if bias is None else h + bias[[0, 2, 2, 2, 3, 3]]
    weighted = flat.unsqueeze(1) * reference.activation(shifted, name)
    want_h, want_weights = torch.autograd.grad(weighted, (h, weights), d_act)
    d_h = h.detach().clone()
    got = kernels.activation_backward_(d_h, d_act, weights.detach(), order, name, bias, offsets)
    torch.testing.assert_close(got, want_weights)
    torch.testing.assert_close(d_h, want_h)
    torch.testing.assert_close(d_act, weighted.detach())
    shifted_act = kernels.activation(h.detach(), name, bias, offsets)
    torch.testing.assert_close(shifted_act, reference.activation(shifted, name).detach())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_sums_with_biases(weighted, top_k):
    rows, bias = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    offsets = torch.tensor([1, 1, 4, 6], dtype=torch.int32)
    inverse = torch.tensor([4, 0, 2, 5, 1, 3])
    weights = torch.rand(6 // top_k, top_k, dtype=torch.float64) if weighted else None
    got = kernels.sum_rows(rows, inverse, weights, top_k, bias, offsets)
    shifted = (rows + bias[[0, 2, 2, 2, 3, 3]])[inverse].view(-1, top_k, 3)
    want = shifted if weights is None else shifted * weights.unsqueeze(-1)
    torch.testing.assert_close(got, want.sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_per_expert_round_once(dtype, weighted):
    order = order_by_expert(torch.randint(5, (400, 1)).clamp(max=3), 5)
    rows = torch.randn(400, 16).to(dtype)
    weights = torch.rand(400).to(torch.promote_types(dtype, torch.float32)) if weighted else None
    got = expert_sums(rows, order.tokens_per_expert, order.offsets, weights=weights)
    scaled = rows.double() if weights is None else rows.double() * weights.double().unsqueeze(1)
    parts = scaled.split(order.tokens_per_expert.tolist())
    want = torch.stack([part.sum(dim=0) for part in parts])
    # One rounding of the result; the weights lose nothing, though they are columns of this dtype.
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.5e-3}[dtype]
    assert got.dtype == dtype
    assert float(got[4].abs().sum()) == 0
    assert float((got.double() - want).norm() / want.norm()) < tolerance


def test_offsets_are_the_running_sum():
    order = order_by_expert(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4)
    assert isinstance(order, ExpertOrder)
    assert order.offsets.dtype == torch.int32
    assert order.offsets.tolist() == [2, 5, 6, 6]
