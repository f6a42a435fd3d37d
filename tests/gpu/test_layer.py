"""The layer on one GPU against the slow definitions in fp64."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe import MoE
from lightning_fastmoe.ops import reference

# Norm of the difference over norm; half precisions round each product and each activation.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 4e-3}
SIZES = [  # T, D, F, E, K
    (257, 64, 96, 8, 2),
    (64, 32, 16, 5, 5),
    (1, 16, 32, 7, 1),
    (300, 64, 96, 8, 1),  # with one expert per token, products may put rows in their places
    (97, 24, 40, 64, 3),  # most experts nearly empty
    (33, 17, 23, 3, 2),  # no 16-byte rows: the loop path
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.to(actual.device)
    return float((actual.double() - expected).norm() / expected.norm())


def build(size: tuple[int, ...], dtype: torch.dtype, activation: str) -> tuple[MoE, torch.Tensor]:
    tokens, d_model, d_ffn, experts, top_k = size
    torch.manual_seed(5)
    layer = MoE(
        d_model,
        d_ffn,
        experts,
        top_k,
        activation=activation,
        bias=activation == "gelu",
        load_balancing=0.0,
        z_loss=0.0,
    )
    layer = layer.to("cuda", dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer, torch.randn(tokens, d_model, device="cuda", dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layer_equals_reference(size: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    layer, x = build(size, dtype, activation)
    upstream = torch.randn_like(x)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(upstream)

    twin = {n: p.detach().double().cpu().requires_grad_() for n, p in layer.named_parameters()}
    x64 = x.detach().double().cpu().requires_grad_()
    scores = torch.softmax(x64 @ twin["router.weight"].T, dim=-1)
    expert_ids = layer.router(x).expert_ids.cpu()  # the choice itself is the router's
    weights = torch.gather(scores, 1, expert_ids)
    if size[-1] > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    up_bias, down_bias = twin.get("experts.up_bias"), twin.get("experts.down_bias")
    expected = reference.moe(
        x64,
        weights,
        expert_ids,
        twin["experts.up_proj"],
        twin["experts.down_proj"],
        activation,
        up_bias,
        down_bias,
    )
    expected.backward(upstream.double().cpu())
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert x.grad is not None
    assert relative_error(x.grad, x64.grad) < 2 * TOLERANCE[dtype]
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        if float(twin[name].grad.norm()) > 1e-12:
            error = relative_error(parameter.grad, twin[name].grad)
            condition = 1.0
            if size[0] == 1 and name == "router.weight":
                # It hangs on a single inner product, which cancels: roundings grow as the product
                # of the norms over it.
                right, grad = expected.detach(), upstream.double().cpu()
                condition = float(right.norm() * grad.norm() / (right * grad).sum().abs())
            assert error < 2 * TOLERANCE[dtype] * condition, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    layer, x = build((1031, 64, 96, 16, 4), dtype, "swiglu")
    upstream = torch.randn_like(x)
    runs = []
    for _ in range(3):
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
        runs.append([y.detach(), *grads])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


def test_bf16_layer_never_waits_for_the_host() -> None:
    layer, x = build((512, 64, 96, 8, 2), torch.bfloat16, "swiglu")
    layer(x).sum().backward()  # the first call compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(torch.ones_like(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("expert", [0, 5])
def test_all_tokens_on_one_expert_and_none(expert: int) -> None:
    layer, x = build((128, 32, 48, 6, 1), torch.bfloat16, "swiglu")
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[expert] = 50 * x[0]
        x.copy_(x[0].expand_as(x))
    layer(x).backward(torch.ones_like(x))
    grad = layer.experts.up_proj.grad
    assert grad is not None
    idle = [e for e in range(6) if e != expert]
    assert float(grad[expert].abs().sum()) > 0
    assert float(grad[idle].abs().sum()) == 0

    empty = torch.empty(0, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer.zero_grad()
    layer(empty).sum().backward()
    assert float(layer.experts.up_proj.grad.abs().sum()) == 0
