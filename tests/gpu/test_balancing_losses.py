"""The balancing losses' kernels against the same losses as separate operations, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fastmoe.nn.router import Routing, RoutingContext
from lightning_fastmoe.nn.router.losses import LOSSES, loss_values
from lightning_fastmoe.ops import softmax_top_k
from lightning_fastmoe.ops.native import load

SIZES = [(1, 1, 1), (7, 3, 2), (300, 64, 8), (24_577, 128, 8), (1000, 1000, 4), (0, 16, 2)]
BOTH = {"load_balancing": 0.01, "z_loss": 0.001}


def routing_of(logits: Tensor, k: int) -> Routing:
    scores, weights, ids = softmax_top_k(logits, k, True)
    return Routing(logits, scores, weights, ids)


@pytest.mark.parametrize("coefficients", [BOTH, {"z_loss": 3.0}, {"load_balancing": 0.5}], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_separate_operations(
    size: tuple[int, int, int], coefficients: dict[str, float]
) -> None:
    tokens, experts, k = size
    torch.manual_seed(tokens)
    logits = 3 * torch.randn(tokens, experts)
    if tokens:
        logits[0] += 80.0  # a large logsumexp
    own = logits.cuda().requires_grad_()
    values, total = loss_values(coefficients, routing_of(own, k), RoutingContext(training=True))
    assert total is not None, "the kernels were not used"
    wide = logits.double().requires_grad_()
    routing, context = routing_of(wide, k), RoutingContext(training=True)
    right = {name: LOSSES[name].function(routing, context) for name in coefficients}
    right_total = sum(coefficients[name] * value for name, value in right.items())
    for name, value in right.items():
        torch.testing.assert_close(values[name].double().cpu(), value, rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(total.double().cpu(), right_total, rtol=2e-6, atol=1e-12)
    scale = 3.0
    (found,) = torch.autograd.grad(total * scale, own)
    (wanted,) = torch.autograd.grad(right_total * scale, wide)
    bound = 3e-5 * float(wanted.abs().max()) if tokens else 0.0
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=bound)


def test_each_value_has_a_gradient_of_its_own() -> None:
    logits = torch.randn(50, 16)
    results = []
    for own, move in ((logits.cuda().requires_grad_(), True), (logits.double(), False)):
        own = own.detach().requires_grad_()
        routing, context = routing_of(own, 2), RoutingContext(training=True)
        if move:
            values, _ = loss_values(BOTH, routing, context)
        else:
            values = {name: LOSSES[name].function(routing, context) for name in BOTH}
        loss = 7 * values["load_balancing"] - 2 * values["z_loss"]
        results.append(torch.autograd.grad(loss, own)[0].double().cpu())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


def test_same_bits_again_and_nothing_waits_for_the_device() -> None:
    logits = torch.randn(9000, 96, device="cuda", requires_grad=True)
    routing, found = routing_of(logits, 4), []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            _, total = loss_values(BOTH, routing, RoutingContext(training=True))
            assert total is not None
            found.append((total, torch.autograd.grad(total, logits, retain_graph=True)[0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)


def test_opcheck_and_errors() -> None:
    library = load()
    assert library is not None
    scores, logits = (torch.rand(9, 5, device="cuda") for _ in range(2))
    counts, one = torch.arange(5, device="cuda"), torch.ones((), device="cuda")
    share = torch.rand(5, device="cuda")
    torch.library.opcheck(library.balancing_losses.default, (scores, logits, counts, 0.1, 0.2))
    backward = (logits, share, None, one, one, 0.1, 0.2)
    torch.library.opcheck(library.balancing_losses_backward.default, backward)
    with pytest.raises(RuntimeError, match="counts must have size 5"):
        library.balancing_losses(scores, logits, counts[:4], 0.1, 0.2)
    with pytest.raises(RuntimeError, match="scores must have size 9"):
        library.balancing_losses(scores[:8].contiguous(), logits, counts, 0.1, 0.2)
