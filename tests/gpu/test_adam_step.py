"""Adam's step in one kernel against its formula in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.ops.adam_step import AdamOptions, adam_step
from lightning_fastmoe.ops.native import load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {
    "aligned": [4096, 8, 65536],
    "odd": [1, 7, 33, 40001, 5, 0, 2048],
    "many": [(i * 37) % 61 + 1 for i in range(300)],
    "long": [3_000_001],
}


def options(decoupled: bool) -> AdamOptions:
    return AdamOptions(3e-3, (0.9, 0.95), 1e-8, 0.1, decoupled)


def expected(
    gradients: list[Tensor], start: list[Tensor], steps: int, scale: float, decoupled: bool
) -> tuple[Tensor, ...]:
    """(weights, first moment, second moment) after ``steps`` more steps, in fp64."""
    o = options(decoupled)
    w, m, v = (t.double() for t in start)
    g = torch.cat([g.double().flatten() for g in gradients]) / scale
    for t in range(steps + 1, steps + 3):
        d = g
        if decoupled:
            w = w - o.lr * o.weight_decay * w
        else:
            d = g + o.weight_decay * w
        m = o.betas[0] * m + (1 - o.betas[0]) * d
        v = o.betas[1] * v + (1 - o.betas[1]) * d * d
        root = (v / (1 - o.betas[1] ** t)).sqrt() + o.eps
        w = w - o.lr / (1 - o.betas[0] ** t) * m / root
    return w, m, v


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("gradient", "weight"), [(d, d) for d in DTYPES] + [(torch.float32, d) for d in DTYPES[1:]]
)
def test_equals_the_formula(
    gradient: torch.dtype,
    weight: torch.dtype,
    sizes: str,
    offset: int,
    scale: float | None,
    decoupled: bool,
) -> None:
    torch.manual_seed(0)
    gradients = [
        torch.randn(n + 1, device="cuda").to(gradient)[1 if i == 1 else 0 :][:n]
        for i, n in enumerate(SIZES[sizes])
    ]
    count, done = sum(SIZES[sizes]), 4
    start = [torch.randn(count, device="cuda") for _ in range(2)]
    start.append(torch.rand(count, device="cuda"))
    master, mean, mean_square = (t.clone() for t in start)
    around = torch.full((count + offset + 1,), 7.0, device="cuda", dtype=weight)
    weights = around[offset : offset + count]
    step = torch.full((), float(done), device="cuda")
    divisor = None if scale is None else torch.full((), scale, device="cuda")
    for _ in range(2):
        step += 1
        adam_step(gradients, master, mean, mean_square, weights, step, options(decoupled), divisor)
    assert float(step) == done + 2  # it is the caller's
    found = (master, mean, mean_square)
    for one, right in zip(
        found, expected(gradients, start, done, scale or 1.0, decoupled), strict=True
    ):
        torch.testing.assert_close(one.double(), right, rtol=2e-6, atol=2e-7)
    assert torch.equal(weights, master.to(weight))
    assert bool((around[:offset] == 7).all())
    assert float(around[-1]) == 7
    assert math.isfinite(float(master.sum()))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("sizes", ["odd", "many"])
def test_updates_nothing_where_it_is_blocked(sizes: str, device: str) -> None:
    """Whatever the gradients are, and although the weights are not the rounded master weights."""
    gradients = [torch.full((n,), math.nan, device=device) for n in SIZES[sizes]]
    gradients[0][:] = 1.0
    count = sum(SIZES[sizes])
    before = [torch.randn(count, device=device) for _ in range(3)]
    before.append(torch.randn(count, device=device).bfloat16())
    step, blocked = (torch.full((), n, device=device) for n in (3.0, 2**40))
    now = [t.clone() for t in before]
    adam_step(gradients, *now, step, options(True), blocked=blocked.long())
    assert all(map(torch.equal, now, before))
    adam_step(gradients, *now, step, options(True), blocked=torch.zeros_like(blocked).long())
    assert not any(map(torch.equal, now, before))


def test_twin_computes_the_same() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5000), torch.randn(5000), torch.rand(5000)]
    gradients = [torch.randn(50, 60).bfloat16(), torch.randn(2000).bfloat16()]
    results: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        state = [t.clone().to(device) for t in start]
        weights = torch.empty(5000, dtype=torch.bfloat16, device=device)
        step, divisor = torch.ones((), device=device), torch.full((), 2.5, device=device)
        own = [g.to(device) for g in gradients]
        adam_step(own, state[0], state[1], state[2], weights, step, options(True), divisor)
        results.append([*state, weights])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-7)


def arguments(**changes: Any) -> list[Any]:
    """Valid arguments of the operator, by name, with some replaced."""
    flat = lambda: torch.ones(16, device="cuda")  # noqa: E731
    found: dict[str, Any] = {
        "gradients": [torch.ones(16, device="cuda", dtype=torch.bfloat16)],
        "master": flat(),
        "mean": flat(),
        "mean_square": flat(),
        "weights": flat().bfloat16(),
        "step": torch.ones((), device="cuda"),
        "scale": None,
        "blocked": None,
    }
    found.update(changes)
    return [*found.values(), 1e-3, 0.9, 0.99, 1e-8, 0.1, True]


def test_passes_opcheck() -> None:
    torch.library.opcheck(load().adam_step_.default, tuple(arguments()))


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("gradients", lambda: [torch.ones(16)], "CUDA"),
        ("gradients", lambda: [torch.ones(15, device="cuda")], "15"),
        ("gradients", lambda: [torch.ones(16, device="cuda").half()], "gradients must be float32"),
        ("mean", lambda: torch.ones(15, device="cuda"), "mean must have size 16"),
        ("master", lambda: torch.ones(16, device="cuda").bfloat16(), "master must be"),
        ("step", lambda: torch.ones(1, device="cuda"), "step must have 0 dimensions"),
        ("blocked", lambda: torch.ones((), device="cuda"), "blocked must be"),
    ],
    ids=["device", "length", "dtype", "mean", "master", "step", "blocked"],
)
def test_refuses(name: str, bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        load().adam_step_(*arguments(**{name: bad()}))
