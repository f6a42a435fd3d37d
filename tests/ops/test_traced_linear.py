"""The grouped GEMM as an operator for torch.compile, against plain loops."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.ops import grouped_linear, traced_linear
from lightning_fastmoe.ops.native import TRACED_NAMESPACE

OPERATORS = getattr(torch.ops, TRACED_NAMESPACE)
COUNTS = [3, 0, 5, 1, 0]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def make(dtype=torch.float64, widths=(4, 8), counts=COUNTS, transposed=False):
    """Leaves x and weight, in the memory of its transpose if asked, and the counts."""
    torch.manual_seed(0)
    inputs, outputs = widths
    x = torch.randn(sum(counts), inputs, dtype=dtype, requires_grad=True)
    stored = (inputs, outputs) if transposed else (outputs, inputs)
    weight = torch.randn(len(counts), *stored, dtype=dtype)
    weight = (weight.transpose(1, 2) if transposed else weight).requires_grad_()
    return x, weight, torch.tensor(counts)


def twin(x, weight, counts):
    chunks = x.split(counts.tolist())
    return torch.cat([c @ w.T for c, w in zip(chunks, weight.unbind(), strict=True)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("widths", [(4, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_compiled_call_has_one_graph_and_the_twins_numbers(dtype, widths, transposed):
    x, weight, counts = make(dtype, widths, transposed=transposed)
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    out = compiled(x, weight, counts)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = twin(*wide, counts)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, weight), grad)
    expected = torch.autograd.grad(want, wide, grad.double())
    bound = 16 * torch.finfo(dtype).eps
    for got, good in zip((out, *found), (want, *expected), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), good, rtol=bound, atol=bound)


def test_batches_of_all_sizes_share_a_graph():
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(grouped_linear, backend=counting, fullgraph=True, dynamic=True)
    for counts in (COUNTS, [2, 2, 0, 0, 7], [0, 0, 0, 40, 2]):
        given = make(torch.float32, counts=counts)
        torch.testing.assert_close(compiled(*given), twin(*given))
    assert len(graphs) == 1


def test_only_wanted_gradients():
    x, weight, counts = (t.detach() for t in make())
    grad = torch.randn(len(x), weight.shape[1], dtype=x.dtype)
    both = traced_linear.grouped_linear_backward(grad, x, weight, counts, [True, True])
    for only in range(2):
        wanted = [i == only for i in range(2)]
        (found,) = traced_linear.grouped_linear_backward(grad, x, weight, counts, wanted)
        assert torch.equal(found, both[only])
    assert traced_linear.grouped_linear_backward(grad, x, weight, counts, [False, False]) == []


@pytest.mark.parametrize("counts", [COUNTS, [0, 0]], ids=str)
@pytest.mark.poisoned(False)  # opcheck traces with fake tensors
def test_operators_are_what_they_declare(counts):
    for dtype in (torch.float32, torch.float64):
        for transposed in (False, True):
            given = make(dtype, counts=counts, transposed=transposed)
            torch.library.opcheck(OPERATORS.grouped_linear.default, given)
            x, weight, of_experts = (t.detach() for t in given)
            grad = torch.randn(len(x), weight.shape[1], dtype=dtype)
            for wanted in ([True, True], [False, True], [True, False]):
                torch.library.opcheck(
                    OPERATORS.grouped_linear_backward.default, (grad, x, weight, of_experts, wanted)
                )
