from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from lightning_fastmoe.ops import ACTIVATIONS, grouped_linear, grouped_mlp, is_gated, reference
from lightning_fastmoe.ops.grouped_linear import grouped_linear_loop
from lightning_fastmoe.ops.products.torch import grouped_mm_applies

COUNTS = [(3, 0, 5, 1), (0, 0, 7), (7, 0, 0), (5,), (0, 0, 0), (2, 3, 1, 0, 11)]


def make_linear(counts, width, out, dtype, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(sum(counts), width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), out, width, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.tensor(counts)


def naive_linear(x, weight, counts):
    expert_of_row = [e for e, n in enumerate(counts.tolist()) for _ in range(n)]
    rows = [weight[e] @ x[row] for row, e in enumerate(expert_of_row)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1]) + 0 * weight.sum()


def value_and_grads(function, tensors, upstream):
    out = function()
    grads = torch.autograd.grad(out, tensors, upstream, allow_unused=True)
    return (out, *grads)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("width", "out"), [(3, 5), (1, 1), (4, 8)])
def test_linear_equals_naive_loop(counts, width, out):
    x, weight, n = make_linear(counts, width, out, torch.float64)
    upstream = torch.randn(sum(counts), out, dtype=torch.float64)
    got = value_and_grads(lambda: grouped_linear(x, weight, n), (x, weight), upstream)
    want = value_and_grads(lambda: naive_linear(x, weight, n), (x, weight), upstream)
    for a, b in zip(got, want, strict=True):
        expected = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("counts", [c for c in COUNTS if sum(c)])
@pytest.mark.parametrize(("width", "out"), [(4, 8), (16, 4), (12, 20)])
def test_grouped_mm_path_equals_loop_path(counts, width, out):
    x, weight, n = make_linear(counts, width, out, torch.float32)
    upstream = torch.randn(sum(counts), out)
    with mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as kernel:
        got = value_and_grads(lambda: grouped_linear(x, weight, n), (x, weight), upstream)
    kernel.assert_called_once()
    want = value_and_grads(lambda: grouped_linear_loop(x, weight, n), (x, weight), upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    empty = [e for e, rows in enumerate(counts) if rows == 0]
    assert not got[2][empty].any()  # zeros, not left-over memory


@pytest.mark.parametrize(
    ("dtype", "width", "out", "applies"),
    [
        (torch.float32, 4, 8, True),
        (torch.float32, 6, 8, False),
        (torch.float32, 8, 6, False),
        (torch.bfloat16, 8, 16, True),
        (torch.bfloat16, 4, 8, False),
        (torch.bfloat16, 8, 12, False),
        (torch.float64, 8, 8, False),
        (torch.float16, 8, 8, False),
    ],
)
def test_misaligned_sizes_and_other_dtypes_take_the_loop(dtype, width, out, applies):
    x, weight, n = make_linear((2, 0, 3), width, out, dtype)
    assert grouped_mm_applies(x, weight) is applies
    with mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as kernel:
        got = grouped_linear(x, weight, n)
    assert kernel.called is applies
    want = naive_linear(x.double(), weight.double(), n)
    assert (got.double() - want).norm() / want.norm() < 1e-2


@pytest.mark.parametrize("size", [8, 7])
def test_upstream_gradients_of_any_layout(size):
    """Sizes 8 and 7: grouped_mm and the loop."""
    x, weight, n = make_linear((2, 0, 3), size, size, torch.float32)
    want_sum = torch.autograd.grad(naive_linear(x, weight, n).sum(), (x, weight))
    got_sum = torch.autograd.grad(grouped_linear(x, weight, n).sum(), (x, weight))  # strides 0
    upstream = torch.randn(size, 5).t()  # columns first
    want_t = torch.autograd.grad(naive_linear(x, weight, n), (x, weight), upstream)
    got_t = torch.autograd.grad(grouped_linear(x, weight, n), (x, weight), upstream)
    for a, b in zip((*got_sum, *got_t), (*want_sum, *want_t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [8, 7])
def test_inputs_of_any_layout(size):
    torch.manual_seed(0)
    n = torch.tensor([2, 0, 3])
    x = torch.randn(size, 5).t().requires_grad_()
    weight = torch.randn(3, size, size).transpose(1, 2).requires_grad_()
    got = value_and_grads(lambda: grouped_linear(x, weight, n), (x, weight), torch.ones(5, size))
    want = value_and_grads(lambda: naive_linear(x, weight, n), (x, weight), torch.ones(5, size))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def make_mlp(counts, width, inner, name, bias, dtype=torch.float64, scale=1.0):
    torch.manual_seed(0)
    experts, rows = len(counts), (2 if is_gated(name) else 1) * inner
    shapes = {
        "x": (sum(counts), width),
        "up": (experts, rows, width),
        "down": (experts, width, inner),
        "up_bias": (experts, rows) if bias else None,
        "down_bias": (experts, width) if bias else None,
    }
    return {
        key: None
        if shape is None
        else (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for key, shape in shapes.items()
    }


def naive_mlp(tensors, counts, name):
    outs = []
    for e, x in enumerate(tensors["x"].split(list(counts))):
        biases = [None if tensors[k] is None else tensors[k][e] for k in ("up_bias", "down_bias")]
        outs.append(reference.expert_ffn(x, tensors["up"][e], tensors["down"][e], name, *biases))
    return torch.cat(outs)


def fast_mlp(tensors, counts, name):
    return grouped_mlp(
        tensors["x"],
        torch.tensor(counts),
        tensors["up"],
        tensors["down"],
        name,
        tensors["up_bias"],
        tensors["down_bias"],
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_mlp_equals_reference(name, bias, counts):
    tensors = make_mlp(counts, 5, 3, name, bias)
    leaves = [t for t in tensors.values() if t is not None]
    upstream = torch.randn(sum(counts), 5, dtype=torch.float64)
    got = value_and_grads(lambda: fast_mlp(tensors, counts, name), leaves, upstream)
    want = value_and_grads(lambda: naive_mlp(tensors, counts, name), leaves, upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_gradcheck(name, bias):
    counts = (2, 0, 1)
    tensors = make_mlp(counts, 3, 2, name, bias)
    keys = [key for key, t in tensors.items() if t is not None]

    def run(*leaves):
        return fast_mlp({**tensors, **dict(zip(keys, leaves, strict=True))}, counts, name)

    assert torch.autograd.gradcheck(run, [tensors[key] for key in keys])


@pytest.mark.parametrize("inner", [16, 13])
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_mlp_in_bf16_is_near_fp64(name, inner):
    """Inner widths 16 and 13: grouped_mm and the loop."""
    counts = (9, 0, 17, 4)
    low = make_mlp(counts, 32, inner, name, True, torch.bfloat16, scale=0.3)
    high = {key: t.detach().double().requires_grad_() for key, t in low.items()}
    upstream = torch.randn(sum(counts), 32).bfloat16()
    got = value_and_grads(lambda: fast_mlp(low, counts, name), list(low.values()), upstream)
    want = value_and_grads(
        lambda: naive_mlp(high, counts, name), list(high.values()), upstream.double()
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        error = ((a.double() - b).norm() / b.norm()).item()
        assert 0 < error < 1e-2


def test_bias_of_an_expert_without_rows_gets_a_zero_gradient():
    tensors = make_mlp((2, 0, 1), 3, 2, "relu", True)
    fast_mlp(tensors, (2, 0, 1), "relu").sum().backward()
    assert tensors["down_bias"].grad.tolist() == [[2.0] * 3, [0.0] * 3, [1.0] * 3]
    assert tensors["up_bias"].grad[1].tolist() == [0.0, 0.0]


def test_a_broken_expert_does_not_spoil_the_others():
    tensors = make_mlp((2, 0, 1), 3, 2, "relu", True)
    clean = fast_mlp(tensors, (2, 0, 1), "relu")
    with torch.no_grad():
        for key in ("up", "down", "up_bias", "down_bias"):
            tensors[key][1] = float("nan")
    assert torch.equal(fast_mlp(tensors, (2, 0, 1), "relu"), clean)
