"""A layer of which some experts are trained, against one pair at a time, and the work it skips."""

from __future__ import annotations

import pytest
import torch
from ops.slow_products import SlowProducts
from torch.utils.flop_counter import FlopCounterMode

from lightning_fastmoe.ops import (
    TrainedRows,
    choice,
    expert_layer,
    expert_mlp,
    order_by_expert,
    reference,
    sparse_layer,
    unfused_layer,
)
from lightning_fastmoe.ops.layer_call import LayerCall
from lightning_fastmoe.ops.products.torch import TorchProducts, grouped_outer_product

T, D, F, E, K = 13, 8, 16, 6, 2
ROWS = [(1, 3, 4), (0,), (), tuple(range(E))]
IDS = torch.stack([torch.tensor([0, 1, 3, 4])[torch.randperm(4)[:K]] for _ in range(T)])
"""Experts 2 and 5 stay idle."""


def make(name: str, bias: bool, dtype: torch.dtype = torch.float64):
    """x, weights, and the stacks of all experts."""
    generator = torch.Generator().manual_seed(4)
    wide = 2 * F if name == "swiglu" else F
    shapes = [(T, D), (T, K), (E, wide, D), (E, D, F), (E, wide), (E, D)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    if not bias:
        drawn[4:] = [None, None]
    return drawn[0], drawn[1], tuple(drawn[2:])


def run_sparse(x, weights, stacks, rows, name, in_order=False):
    """The output and its gradients: of x, weights, and the trained rows of each stack."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    own = tuple(None if s is None else s[list(rows)].requires_grad_() for s in stacks)
    # Whatever is in the frozen stacks where trained rows belong is not used.
    frozen = tuple(None if s is None else s.clone() for s in stacks)
    for stack in frozen:
        if stack is not None:
            stack[list(rows)] = torch.nan
    trained = TrainedRows(rows, own)
    if in_order:
        counts = torch.tensor([3, 4, 0, 2, 4, 0])
        out = sparse_layer(x, counts, None, None, frozen, trained, name)
        leaves = [x, *own]
    else:
        order = order_by_expert(IDS, E)
        out = sparse_layer(x, order.tokens_per_expert, weights, order, frozen, trained, name)
        leaves = [x, weights, *own]
    for stack in frozen:  # as where ZeRO 3 gathers them again for the backward
        if stack is not None:
            stack.data[list(rows)] = torch.nan
    leaves = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def run_whole(x, weights, stacks, rows, name, in_order=False, layer=None):
    """The same from the gradients of all experts."""
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    leaves += [None if s is None else s.clone().requires_grad_() for s in stacks]
    x, weights, up, down, *biases = leaves
    if in_order:
        out = expert_mlp(x, torch.tensor([3, 4, 0, 2, 4, 0]), up, down, name, *biases)
        leaves[1] = None
    elif layer is None:
        out = reference.moe(x, weights, IDS, up, down, name, *(b for b in biases if b is not None))
    else:
        out = layer(x, weights, order_by_expert(IDS, E), up, down, name, *biases)
    leaves = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    return [out, *(g if g.dim() == 2 and len(g) == T else g[list(rows)] for g in found)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "relu"])
def test_equals_one_pair_at_a_time(name, bias, rows):
    given = make(name, bias)
    want = run_whole(*given, rows, name)
    for a, b in zip(run_sparse(*given, rows, name), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_kept_gradients_have_the_bits_of_all_experts_layer(bias, rows, in_order, dtype):
    given = make("swiglu", bias, dtype)
    want = run_whole(*given, rows, "swiglu", in_order, expert_layer)
    for a, b in zip(run_sparse(*given, rows, "swiglu", in_order), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_hoppers_products_take_the_trained_rows_first(monkeypatch, rows):
    given = make("swiglu", True)
    want = run_whole(*given, rows, "swiglu")
    slow, seen = SlowProducts(), []
    real = slow.hopper_weight_gradient
    slow.hopper_weight_gradient = lambda *args: seen.append(args[4]) or real(*args)
    monkeypatch.setattr(SlowProducts, "_experts", staticmethod(_experts_with_rows))
    monkeypatch.setattr(choice, "hopper", lambda *_: slow)
    for a, b in zip(run_sparse(*given, rows, "swiglu"), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # The sums for down's bias are small, and of all experts.
    assert sorted(len(offsets) for offsets in seen) == [len(rows)] * (2 if rows else 0) + [E]


def _experts_with_rows(offsets: torch.Tensor, rows: int) -> list[int]:
    """Like a kernel's segments: rows after the last belong to none."""
    rows = min(rows, int(offsets[-1]))
    return torch.searchsorted(offsets.long(), torch.arange(rows), right=True).tolist()


@pytest.mark.parametrize("rows", ROWS[:2], ids=str)
def test_one_kernel_s_segments_end_before_the_frozen_rows(rows):
    """The order of rows_first, by a grouped GEMM of the trained experts alone."""
    x, weights, (up, down, *_) = make("swiglu", False, torch.float32)
    order = order_by_expert(IDS, E)
    pairs = (order.order, order.inverse, order.tokens_per_expert, order.offsets)
    call = LayerCall(x, weights, up, down, None, None, *pairs, "swiglu")
    a, b = TorchProducts().gather(call, x), torch.randn(T * K, 12)
    first, ends = call.rows_first(rows)
    assert sorted(first.tolist()) == list(range(T * K))
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.int64)
    assert torch.equal(counts, order.tokens_per_expert[list(rows)])
    found = grouped_outer_product(a[first], b[first], counts, ends)
    whole = grouped_outer_product(a, b, order.tokens_per_expert, order.offsets)
    torch.testing.assert_close(found, whole[list(rows)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS[:3], ids=str)
def test_frozen_experts_cost_no_weight_gradients(rows, bias):
    x, weights, stacks = make("swiglu", bias, torch.float32)
    own = tuple(None if s is None else s[list(rows)].requires_grad_() for s in stacks)
    order = order_by_expert(IDS, E)
    out = sparse_layer(
        x.requires_grad_(),
        *(order.tokens_per_expert, weights, order, stacks, TrainedRows(rows, own), "swiglu"),
    )
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    trained = int(order.tokens_per_expert[list(rows)].sum())
    per_row = 2 * (2 * F * D) + 2 * F * D  # of the up and the down projection
    rest = 0 if bias else T * K * per_row  # by F.grouped_mm, which is not counted
    assert counter.get_total_flops() == rest + trained * per_row
    assert own[0].grad.shape == (len(rows), 2 * F, D)


def clamped(h: torch.Tensor) -> torch.Tensor:
    """Gate and up interleaved, the gate clamped: no activation that a fused layer knows."""
    gate, up = h[:, ::2].clamp(max=1.0), h[:, 1::2]
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


def as_transposed(stack):
    """The view of a parameter that is stored (E, inputs, outputs)."""
    return stack.mT.contiguous().mT if stack is not None and stack.dim() == 3 else stack


def own_of(x, weights, stacks, rows, transposed):
    """The output and gradients of the class's own activation, in its own layout of weights."""

    def turned(stack):
        return as_transposed(stack) if transposed else stack

    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    own = [None if s is None else turned(s[list(rows)]).requires_grad_() for s in stacks]
    frozen = tuple(None if s is None else turned(s.clone()) for s in stacks)
    for stack in frozen:
        if stack is not None:
            stack[list(rows)] = torch.nan
    order = order_by_expert(IDS, E)
    trained = TrainedRows(rows, tuple(own))
    out = sparse_layer(x, order.tokens_per_expert, weights, order, frozen, trained, clamped)
    for stack in frozen:  # as where ZeRO 3 gathers them again for the backward
        if stack is not None:
            stack.data[list(rows)] = torch.nan
    return out, [x, weights, *(t for t in own if t is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_own_activations_keep_full_training_s_bits(bias, rows, transposed, dtype):
    given = make("swiglu", bias, dtype)
    stacks = [as_transposed(s) if transposed else s for s in given[2]]
    x, weights, up, down, *biases = [
        None if t is None else t.clone().requires_grad_() for t in (*given[:2], *stacks)
    ]
    whole = unfused_layer(x, weights, order_by_expert(IDS, E), up, down, clamped, *biases)
    leaves = [t for t in (x, weights, up, down, *biases) if t is not None]
    want = torch.autograd.grad(whole, leaves, torch.ones_like(whole))
    want = [g if len(g) == T else g[list(rows)] for g in want]
    out, leaves = own_of(*given, rows, transposed)
    assert torch.equal(out, whole)
    for a, b in zip(torch.autograd.grad(out, leaves, torch.ones_like(out)), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS[:3], ids=str)
def test_own_activations_cost_no_weight_gradients_of_frozen_experts(rows, bias, transposed):
    out, leaves = own_of(*make("swiglu", bias), rows, transposed)  # fp64: each GEMM is counted
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    order = order_by_expert(IDS, E)
    trained = int(order.tokens_per_expert[list(rows)].sum())
    per_row = 2 * (2 * F * D) + 2 * F * D
    biases = 2 * T * K * E * (2 * F + D) if bias else 0  # by a 0/1 matrix, of all experts
    assert counter.get_total_flops() == (T * K + trained) * per_row + biases
    assert found[2].shape == (len(rows), 2 * F, D)


def test_own_activations_have_second_derivatives():
    given, rows = make("swiglu", True), (1, 3)
    out, leaves = own_of(*given, rows, False)
    (first,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    found = torch.autograd.grad(first.square().sum(), leaves)
    x, weights, *stacks = [t.clone().requires_grad_() for t in (*given[:2], *given[2])]
    whole = unfused_layer(x, weights, order_by_expert(IDS, E), *stacks[:2], clamped, *stacks[2:])
    (first,) = torch.autograd.grad(whole.square().sum(), x, create_graph=True)
    want = torch.autograd.grad(first.square().sum(), [x, weights, *stacks], allow_unused=True)
    for a, b in zip(found, want, strict=True):
        b = b if len(b) == T else b[list(rows)]
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
