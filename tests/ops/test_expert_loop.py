"""The layer on the CPU, expert by expert, against its definition."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.ops import expert_layer, expert_loop, expert_mlp, order_by_expert, reference

T, D, F, E = 7, 6, 5, 4


@pytest.fixture(autouse=True)
def _poisoned_and_taken(monkeypatch):
    """Memory starts as NaN; and the path is the one that is tested here."""
    calls = []
    for name in ("forward", "backward_"):
        function = getattr(expert_loop, name)
        monkeypatch.setattr(
            expert_loop, name, lambda *args, f=function, n=name: calls.append(n) or f(*args)
        )
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
    assert calls


def inputs(k, spread, name, dtype=torch.float64):
    torch.manual_seed(0)
    ids = torch.rand(T, E).argsort(dim=1)[:, :k]
    if spread == "all on one":
        ids = torch.full((T, k), 2)
    elif spread == "one empty":
        ids = torch.rand(T, E - 1).argsort(dim=1)[:, :k]
    inner = 2 * F if name == "swiglu" else F
    shapes = [(T, D), (T, k), (E, inner, D), (E, D, F)]
    leaves = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    leaves[1] = leaves[1].to(torch.float32 if dtype == torch.bfloat16 else dtype)
    return ids, [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("spread", ["even", "one empty", "all on one"])
def test_equals_the_definition_twice(name, k, spread):
    """Twice through one graph: the first backward spends what the forward kept."""
    ids, leaves = inputs(k, spread, name)
    out = expert_layer(*leaves[:2], order_by_expert(ids, E), *leaves[2:], name)
    want = reference.moe(leaves[0], leaves[1], ids, *leaves[2:], name)
    torch.testing.assert_close(out, want)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(want, leaves, upstream)
    for _ in range(2):
        got = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        torch.testing.assert_close(got, grads)
    with torch.no_grad():
        again = expert_layer(*leaves[:2], order_by_expert(ids, E), *leaves[2:], name)
    assert torch.equal(again, out)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2)])
def test_only_what_is_wanted(wanted):
    ids, leaves = inputs(2, "one empty", "swiglu")
    want = reference.moe(leaves[0], leaves[1], ids, *leaves[2:], "swiglu")
    grads = torch.autograd.grad(want.square().sum(), [leaves[i] for i in wanted])
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    out = expert_layer(*leaves[:2], order_by_expert(ids, E), *leaves[2:], "swiglu")
    got = torch.autograd.grad(out.square().sum(), [leaves[i] for i in wanted])
    torch.testing.assert_close(got, grads)


def test_bf16_rounds_where_the_kernels_do():
    ids, leaves = inputs(2, "even", "swiglu", torch.bfloat16)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = expert_layer(*leaves[:2], order_by_expert(ids, E), *leaves[2:], "swiglu")
    want = reference.moe(wide[0], wide[1], ids, *wide[2:], "swiglu")
    pairs = [(out, want)]
    pairs += zip(
        torch.autograd.grad(out.float().sum(), leaves),
        torch.autograd.grad(want.sum(), wide),
        strict=True,
    )
    for a, b in pairs:
        assert float((a.double() - b).norm()) <= 1e-2 * float(b.norm())


def test_rows_that_come_by_expert():
    _, (_, _, up, down) = inputs(1, "even", "swiglu")
    counts = torch.tensor([3, 0, 4, 1])
    x = torch.randn(8, D, dtype=torch.float64, requires_grad=True)
    ids = torch.repeat_interleave(torch.arange(E), counts).unsqueeze(1)
    want = reference.moe(x, torch.ones(8, 1), ids, up, down, "swiglu")
    got = expert_mlp(x, counts, up, down, "swiglu")
    torch.testing.assert_close(got, want)
    leaves = (x, up, down)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
    )


def test_where_weights_lie_changes_no_bit() -> None:
    """ZeRO 3 gathers them now here, now there; a product of one row sees how they are aligned."""
    torch.manual_seed(0)
    x, weights, grad = torch.randn(6, 12), torch.rand(6, 1), torch.randn(6, 12)
    up, down = torch.randn(3, 40, 12), torch.randn(3, 12, 20)
    order = order_by_expert(torch.tensor([[0], [1], [1], [2], [2], [2]]), 3)

    def results(shift: int) -> list[torch.Tensor]:
        moved = []
        for weight in (up, down):
            memory = torch.empty(weight.numel() + shift)
            moved.append(memory[shift:].view(weight.shape).copy_(weight))
            assert moved[-1].data_ptr() % 64 == 4 * shift
        inputs = [t.detach().requires_grad_() for t in (x, weights, *moved)]
        out = expert_layer(inputs[0], inputs[1], order, inputs[2], inputs[3], "swiglu")
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    aligned = results(0)
    for shift in (1, 2, 3, 5, 8):
        assert all(map(torch.equal, results(shift), aligned)), shift
