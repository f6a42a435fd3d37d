"""A layer of which some experts are trained, on a GPU: as close to fp64 as the layer of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.closeness import host_never_waits
from torch import Tensor

from lightning_fastmoe.ops import (
    TrainedRows,
    expert_layer,
    order_by_expert,
    sparse_layer,
    unfused_layer,
)

T, D, F, E, K = 700, 64, 96, 12, 3
ROWS = [(1, 3, 10), (0,), (), tuple(range(E))]
IDLE = (5, 10)


def make(dtype: torch.dtype, bias: bool) -> tuple[list[Tensor], tuple[Tensor | None, ...], Tensor]:
    """x, weights and the gradient of the output; the stacks; what each token chose."""
    generator = torch.Generator("cuda").manual_seed(3)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device="cuda")

    busy = torch.tensor([e for e in range(E) if e not in IDLE], device="cuda")
    scores = torch.rand(T, len(busy), generator=generator, device="cuda")
    ids = busy[scores.topk(K, dim=1).indices]
    stacks = [draw(E, 2 * F, D, scale=D**-0.5), draw(E, D, F, scale=F**-0.5)]
    stacks += [draw(E, 2 * F), draw(E, D)]
    kept = [stack.to(dtype) if bias or n < 2 else None for n, stack in enumerate(stacks)]
    tokens = [draw(T, D).to(dtype), draw(T, K).abs(), draw(T, D).to(dtype)]
    return tokens, tuple(kept), ids


def run(tokens: list[Tensor], stacks: Any, ids: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """The output and the gradients of x, weights and trained rows."""
    x, weights, grad = tokens
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    own = [None if s is None else s[list(rows)].requires_grad_() for s in stacks]
    frozen: Any = tuple(None if s is None else s.clone() for s in stacks)
    for stack in frozen:
        if stack is not None and rows:
            stack[list(rows)] = torch.nan  # of no use
    order = order_by_expert(ids, E)
    trained = TrainedRows(rows, tuple(own))  # type: ignore[arg-type]
    out = sparse_layer(
        leaves[0], order.tokens_per_expert, leaves[1], order, frozen, trained, "swiglu"
    )
    wanted = [*leaves, *(o for o in own if o is not None)]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def run_all(tokens: list[Tensor], stacks: Any, ids: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """The same by the layer of which all experts are trained."""
    x, weights, grad = tokens
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    own = [None if s is None else s.clone().requires_grad_() for s in stacks]
    out = expert_layer(
        leaves[0], leaves[1], order_by_expert(ids, E), own[0], own[1], "swiglu", own[2], own[3]
    )
    wanted = [*leaves, *(o for o in own if o is not None)]
    d_x, d_weights, *of_stacks = torch.autograd.grad(out, wanted, grad)
    return [out.detach(), d_x, d_weights, *(g[list(rows)] for g in of_stacks)]


def error(found: Tensor, exact: Tensor) -> float:
    if not exact.numel() or not exact.any():
        assert not found.any()
        return 0.0
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_close_to_fp64(dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    tokens, stacks, ids = make(dtype, bias)
    found, whole = (by(tokens, stacks, ids, rows) for by in (run, run_all))
    exact = run_all(
        [t.double() for t in tokens],
        tuple(None if s is None else s.double() for s in stacks),
        ids,
        rows,
    )
    for n, (own, other, right) in enumerate(zip(found, whole, exact, strict=True)):
        limit = 1.2 * error(other, right) + torch.finfo(dtype).eps / 8
        assert error(own, right) <= limit, (n, error(own, right), limit)


@pytest.mark.parametrize("rows", ROWS[:3], ids=str)
def test_the_host_never_waits(rows: tuple[int, ...]) -> None:
    tokens, stacks, ids = make(torch.bfloat16, False)
    run(tokens, stacks, ids, rows)  # caches, allocations
    own = [s[list(rows)].clone().requires_grad_() for s in stacks if s is not None]
    frozen = tuple(stacks)
    order = order_by_expert(ids, E)
    x, weights = (t.clone().requires_grad_() for t in tokens[:2])
    with host_never_waits():
        out = sparse_layer(
            x,
            order.tokens_per_expert,
            weights,
            order,
            frozen,  # type: ignore[arg-type]
            TrainedRows(rows, (own[0], own[1], None, None)),
            "swiglu",
        )
        out.backward(tokens[2])


def clamped(h: Tensor) -> Tensor:
    """Gate and up interleaved, the gate clamped: an activation of a class of its own."""
    gate, up = h[:, ::2].clamp(max=1.0), h[:, 1::2]
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_own_activations_are_close_to_fp64(
    dtype: torch.dtype, rows: tuple[int, ...], transposed: bool
) -> None:
    """Trained rows alone against the gradients of all, both by separate grouped GEMMs."""
    (x, weights, grad), stacks, ids = make(dtype, True)

    def laid_out(stack: Any) -> Any:
        return stack.mT.contiguous().mT if transposed and stack.dim() == 3 else stack

    def whole(kind: torch.dtype) -> list[Tensor]:
        given = [t.to(kind).requires_grad_() for t in (x, weights)]
        own = [laid_out(s.to(kind)).requires_grad_() for s in stacks if s is not None]
        out = unfused_layer(
            *given, order_by_expert(ids, E), own[0], own[1], clamped, own[2], own[3]
        )
        d_x, d_weights, *found = torch.autograd.grad(out, [*given, *own], grad.to(kind))
        return [out.detach(), d_x, d_weights, *(g[list(rows)] for g in found)]

    given = [t.clone().requires_grad_() for t in (x, weights)]
    own = [laid_out(s[list(rows)]).requires_grad_() for s in stacks if s is not None]
    frozen: Any = tuple(laid_out(s.clone()) for s in stacks if s is not None)
    for stack in frozen:
        if rows:
            stack[list(rows)] = torch.nan
    order = order_by_expert(ids, E)
    trained = TrainedRows(rows, tuple(own))  # type: ignore[arg-type]
    counts = order.tokens_per_expert
    out = sparse_layer(given[0], counts, given[1], order, frozen, trained, clamped)
    found = [out.detach(), *torch.autograd.grad(out, [*given, *own], grad)]
    for a, b, exact in zip(found, whole(dtype), whole(torch.float64), strict=True):
        limit = 1.2 * error(b, exact) + torch.finfo(dtype).eps / 8
        assert error(a, exact) <= limit
