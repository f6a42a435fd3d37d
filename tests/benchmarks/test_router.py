"""The router in plain torch is the one of the definitions, its losses by themselves included."""

from __future__ import annotations

import pytest
import torch
from layer.problem import LOAD_BALANCING, Z_LOSS
from layer.router import add_losses, route

from lightning_fastmoe.ops import reference


@pytest.mark.parametrize("top_k", [1, 3])
def test_routing_and_losses_are_those_of_the_definitions(top_k):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=generator).requires_grad_()
    router = torch.randn(8, 16, generator=generator).requires_grad_()
    routing = route(x, router, top_k)
    logits = x.double() @ router.double().T
    scores, weights, ids = reference.softmax_top_k(logits, top_k, top_k > 1)
    assert torch.equal(routing.expert_ids, ids)
    for found, right in [(routing.logits, logits), (routing.scores, scores)]:
        torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.weights, weights.float(), rtol=1e-5, atol=0)

    # In a whole layer the losses are too small for its tolerance. Here nothing else has a gradient.
    out = torch.ones(50, 16, requires_grad=True)
    added = add_losses(out, routing, torch.bincount(ids.flatten(), minlength=8))
    assert torch.equal(added, out)
    balance = LOAD_BALANCING * reference.load_balancing_loss(scores, ids)
    z = Z_LOSS * reference.z_loss(logits)
    grads = torch.autograd.grad(added, (out, x, router), torch.zeros_like(out))
    assert not grads[0].any()
    right = torch.autograd.grad(balance + z, (x, router))
    for found, wanted in zip(grads[1:], right, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)
