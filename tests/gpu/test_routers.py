"""Routers on one GPU: the same choices, draws and numbers as on the CPU, without waiting for it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from lightning_fastmoe import MoE
from lightning_fastmoe.nn import LocalDispatcher, SequentialSchedule
from lightning_fastmoe.nn.router import ROUTERS, RoutingContext, loss_value
from lightning_fastmoe.nn.router.losses import TOKEN_CHOICE_LOSSES
from lightning_fastmoe.nn.router.random import random_bits, uniform

T, D, F, E = 96, 32, 48, 8
CASES = {
    **{name: {"router": name} for name in ROUTERS},
    "capacity": {"capacity_factor": 0.7},
    "capacity by score": {"capacity_factor": 0.7, "drop_by": "score"},
    "in groups": {"router": "sigmoid", "router_options": {"num_groups": 4, "limit_groups": 2}},
    "clamped, shared": {"activation": "clamped_swiglu", "shared_expert": 24, "bias": True},
    "losses": dict.fromkeys(sorted(TOKEN_CHOICE_LOSSES - {"load_balancing", "z_loss"}), 0.1),
}
READS_THE_DEVICE = ("base", "swipe")
"""Routers whose docs say that they do."""


def build(name: str) -> tuple[MoE, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoE(D, F, E, **CASES[name])
    return layer, torch.randn(4, T // 4, D), torch.randint(0, 50, (4, T // 4))


def run(layer: MoE, x: torch.Tensor, ids: torch.Tensor) -> tuple[list, list[torch.Tensor]]:
    seen: list = []
    handle = layer.register_routing_observer(lambda _, routing: seen.append(routing))
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y = layer(x, token_ids=ids)
    y.square().sum().backward()
    handle.remove()
    return seen, [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def test_random_bits_are_those_of_the_cpu() -> None:
    tokens = torch.randint(0, 2**50, (1000,))
    assert torch.equal(random_bits(3, 1, tokens.cuda(), 7).cpu(), random_bits(3, 1, tokens, 7))
    assert torch.equal(uniform(3, 1, tokens.cuda(), 7).cpu(), uniform(3, 1, tokens, 7))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chain", [False, True])
def test_equals_the_cpu(name: str, chain: bool) -> None:
    layer, x, ids = build(name)
    twin = copy.deepcopy(layer).cuda()
    twin._seed = layer._seed
    if chain:
        layer.schedule = SequentialSchedule(LocalDispatcher(E))
        twin.schedule = SequentialSchedule(LocalDispatcher(E))
    want_routing, want = run(layer, x, ids)
    got_routing, got = run(twin, x.cuda(), ids.cuda())
    for a, b in zip(got_routing[0], want_routing[0], strict=True):
        if isinstance(b, int):
            assert a == b
            continue
        assert (a is None) == (b is None) or a is got_routing[0].tokens_per_expert
        if a is not None and b is not None:
            if a.is_floating_point():
                torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(a.cpu(), b)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


FAR = [
    *itertools.product(
        ["softmax", "sigmoid", "gshard", "cosine", "swipe"], [-1e4, -200.0, -104.0, 100.0, 1e4]
    ),
    # Farther off, two groups with the same best expert tie in fp32 but not in fp64.
    ("in groups", -200.0),
    ("in groups", -104.0),
]


@pytest.mark.parametrize(("name", "far"), FAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_far_from_zero(name: str, dtype: torch.dtype, far: float) -> None:
    """Choices, weights, losses and gradients, against the same router in fp64 on the CPU."""
    torch.manual_seed(0)
    router = MoE(E, F, E, **CASES[name]).router
    x = (far + 16 * torch.randn(T, E)).to(dtype)
    if name != "cosine":
        with torch.no_grad():
            router.weight.copy_(torch.eye(E))
    twin = copy.deepcopy(router).double()
    leaf, wide = x.cuda().requires_grad_(), x.double().requires_grad_()
    context = RoutingContext(training=True, seed=3, grid=(4, T // 4))
    got, want = router.cuda()(leaf, context), twin(wide, context)
    if name != "cosine":  # whose logits are products
        assert torch.equal(got.expert_ids.cpu(), want.expert_ids)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 if name == "cosine" else 1e-37}
    torch.testing.assert_close(got.weights.double().cpu(), want.weights, **tolerance)
    torch.testing.assert_close(got.scores.double().cpu(), want.scores, **tolerance)
    terms = [
        (r.weights[:, 0].sum() + sum(loss_value(n, r, context) for n in sorted(router.losses)), i)
        for r, i in ((got, leaf), (want, wide))
    ]
    torch.testing.assert_close(terms[0][0].double().cpu(), terms[1][0], rtol=1e-5, atol=0)
    a, b = (torch.autograd.grad(*pair)[0].double().cpu() for pair in terms)
    assert a.isfinite().all()
    step = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(a, b, rtol=step, atol=step * float(b.abs().max()))


@pytest.mark.parametrize("name", [n for n in CASES if n not in READS_THE_DEVICE])
def test_does_not_wait_for_the_device(name: str) -> None:
    layer, x, ids = build(name)
    layer, x, ids = layer.cuda().bfloat16(), x.cuda().bfloat16(), ids.cuda()
    run(layer, x, ids)  # kernels are compiled, memory is there
    torch.cuda.synchronize()
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("without grouped_mm the experts themselves read their counts")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, x, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CASES)
def test_two_runs_give_the_same_bits(name: str) -> None:
    layer, x, ids = build(name)
    layer, x, ids = layer.cuda(), x.cuda(), ids.cuda()
    first = run(copy.deepcopy(layer), x, ids)[1]
    second = run(copy.deepcopy(layer), x, ids)[1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
