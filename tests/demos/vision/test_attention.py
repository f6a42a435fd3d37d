"""Cosine attention and its position bias against plain loops in fp64, with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.demos.vision.attention import WindowAttention
from lightning_fastmoe.demos.vision.position_bias import PositionBias


@pytest.fixture(autouse=True)
def _fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bias_of(module: PositionBias, size: int, head: int, i: int, j: int) -> Tensor:
    """What the paper says of one pair of tokens."""
    coordinates = []
    for a, b in ((i // size, j // size), (i % size, j % size)):
        d = 8 * (a - b) / max(1, size - 1)
        coordinates.append(math.copysign(math.log2(1 + abs(d)) / math.log2(8), d))
    hidden = [
        torch.relu(w[0] * coordinates[0] + w[1] * coordinates[1] + b)
        for w, b in zip(module.up.weight, module.up.bias, strict=True)
    ]
    out = sum(w * h for w, h in zip(module.down.weight[head], hidden, strict=True))
    return 16 / (1 + torch.exp(-out))


def attend(module: WindowAttention, x: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """Token by token, pair by pair."""
    heads = module.num_heads
    dim = x.shape[-1] // heads
    windows = []
    for number, window in enumerate(x):
        rows = []
        for i, token in enumerate(window):
            parts = []
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                wq, wk, wv = (w[part] for w in module.qkv.weight.chunk(3))
                q = wq @ token + module.query_bias[part]
                tau = torch.exp(-module.log_scale[head].squeeze())
                tau = tau if tau > 0.01 else torch.tensor(0.01)
                powers, values = [], []
                for j, other in enumerate(window):
                    if mask is not None and not mask[number % len(mask), i, j]:
                        continue
                    k = wk @ other
                    cosine = q @ k / (q.square().sum().sqrt() * k.square().sum().sqrt())
                    bias = bias_of(module.position_bias, size, head, i, j)
                    powers.append(torch.exp(cosine / tau + bias))
                    values.append(wv @ other + module.value_bias[part])
                total = sum(powers)
                parts.append(sum(p / total * v for p, v in zip(powers, values, strict=True)))
            rows.append(module.out.weight @ torch.cat(parts) + module.out.bias)
        windows.append(torch.stack(rows))
    return torch.stack(windows)


def randomised(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_position_bias(size: int) -> None:
    module = PositionBias(size, num_heads=3, hidden=5, init_std=0.5)
    randomised(module)
    tokens = range(size * size)
    expected = torch.stack(
        [
            torch.stack(
                [torch.stack([bias_of(module, size, h, i, j) for j in tokens]) for i in tokens]
            )
            for h in range(3)
        ]
    )
    actual = module()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    weights = list(module.parameters())
    for a, e in zip(
        torch.autograd.grad(actual, weights, upstream),
        torch.autograd.grad(expected, weights, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_position_bias_depends_on_direction() -> None:
    module = PositionBias(2, num_heads=1, hidden=8, init_std=1.0)
    randomised(module)
    bias = module()[0].detach()
    assert bias[0, 3] != pytest.approx(float(bias[3, 0]), rel=1e-3)
    assert bias[0, 1] != pytest.approx(float(bias[0, 2]), rel=1e-3)
    assert bias[0, 1] == bias[2, 3]


@pytest.mark.parametrize("masked", [False, True])
def test_cosine_attention(masked: bool) -> None:
    size, images = 2, 2
    torch.manual_seed(0)
    module = WindowAttention(8, num_heads=2, size=size, bias_hidden=4, init_std=0.5)
    randomised(module)
    mask = None
    if masked:
        mask = torch.rand(3, 4, 4) < 0.5
        mask |= torch.eye(4, dtype=torch.bool)
    x = torch.randn(3 * images, 4, 8, requires_grad=True)
    actual, expected = module(x, mask), attend(module, x, size, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    inputs = [x, *module.parameters()]
    names = ["x", *(name for name, _ in module.named_parameters())]
    for name, a, e in zip(
        names,
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert e.any(), name


def test_the_temperature_is_clamped() -> None:
    """Beyond 1 / 0.01 the scale stays there, and its gradient is zero."""
    module = WindowAttention(4, num_heads=2, size=2, bias_hidden=4, init_std=0.5)
    with torch.no_grad():
        module.log_scale[:] = torch.tensor([math.log(200.0), math.log(50.0)]).view(2, 1, 1)
    x = torch.randn(1, 4, 4)
    actual = module(x)
    torch.testing.assert_close(actual, attend(module, x, 2, None), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(actual.square().sum(), [module.log_scale])
    assert gradient[0] == 0
    assert gradient[1] != 0


def test_scores_do_not_grow_with_the_tokens() -> None:
    module = WindowAttention(8, num_heads=2, size=2, bias_hidden=4, init_std=0.5)
    x = torch.randn(1, 4, 8)
    torch.testing.assert_close(module(1e4 * x), 1e4 * module(x), rtol=1e-9, atol=1e-9)


def test_values_under_the_mask_are_not_seen() -> None:
    module = WindowAttention(8, num_heads=2, size=2, bias_hidden=4, init_std=0.5)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, :3, 3] = False
    x = torch.randn(2, 4, 8)
    other = x.clone()
    other[:, 3] = torch.randn(2, 8)
    a, b = module(x, mask), module(other, mask)
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3], b[:, 3])


def test_scores_are_fp32_under_autocast() -> None:
    """At the largest scale, a product in bf16 would be off by a tenth and more."""
    torch.manual_seed(0)
    module = WindowAttention(64, num_heads=2, size=4, bias_hidden=8, init_std=0.1)
    with torch.no_grad():
        module.log_scale[:] = math.log(100.0)
    query, key = torch.randn(2, 3, 2, 16, 32).bfloat16()
    expected = module._scores(query.double(), key.double())
    with torch.autocast("cpu", torch.bfloat16):
        actual = module.float()._scores(query, key)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
