"""The problem is what it says, and its answers are those of the definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer.configs import CONFIGS, parse_configs
from layer.errors import BenchmarkError
from layer.problem import (
    LOAD_BALANCING,
    Z_LOSS,
    make_problem,
    relative_error,
    route,
    solve,
)
from layer.routings import ROUTINGS

from lightning_fastmoe.ops import reference

CPU = torch.device("cpu")


def small(name: str, activation: str | None = None, top_k: int | None = None):
    config = replace(CONFIGS[name].tiny(), tokens=19)
    return replace(config, activation=activation or config.activation, top_k=top_k or config.top_k)


def test_flops_by_hand():
    # 24576 tokens x 8 experts x 1536 x 256 multiply-adds, three matrices, two FLOPs each.
    assert CONFIGS["sonic-7b"].forward_flops == 463_856_467_968
    assert CONFIGS["sonic-7b"].step_flops == 1_391_569_403_904
    # 4096 x 2 x 1024 x 4096, two matrices.
    assert CONFIGS["fastmoe-16"].forward_flops == 137_438_953_472
    assert CONFIGS["fastmoe-16"].step_flops == 412_316_860_416


def test_config_names():
    assert len(parse_configs("all")) == 12
    assert [c.name for c in parse_configs("switch-8, sonic-7b")] == ["switch-8", "sonic-7b"]
    with pytest.raises(BenchmarkError, match="sonic-8b is not a configuration"):
        parse_configs("sonic-8b")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["sonic-7b", "switch-8", "gpt-oss-20b"])
def test_a_router_would_choose_the_given_routing(name, routing):
    problem = make_problem(CONFIGS[name].tiny(), routing, CPU)
    config = problem.config
    scores, weights, ids = reference.softmax_top_k(
        problem.x.double() @ problem.router.double().T, config.top_k, config.top_k > 1
    )
    assert torch.equal(ids.sort(dim=1).values, problem.expert_ids.sort(dim=1).values)
    torch.testing.assert_close(
        weights.sort(dim=1).values, problem.weights.double().sort(dim=1).values, rtol=1e-5, atol=0
    )
    # The choice is safe from rounding, and the weights are far from one-hot.
    best = scores.sort(dim=1, descending=True).values
    assert (best[:, config.top_k - 1] > 5 * best[:, config.top_k]).all()
    assert (problem.weights > 0.05).all()


def test_nothing_is_zero():
    problem = make_problem(CONFIGS["sonic-7b"].tiny(), "uniform", CPU)
    for name in ("x", "router", "weights", "up", "down", "grad"):
        tensor = getattr(problem, name)
        assert (tensor != 0).float().mean() > 0.99, name
        assert tensor.std() > 0.01, name


def test_the_same_arguments_give_the_same_problem():
    config = CONFIGS["sonic-7b"].tiny()
    first, again = (make_problem(config, "zipf:1.0", CPU) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    other = make_problem(config, "zipf:1.0", CPU, seed=1)
    assert all(a != b for a, b in zip(first.fingerprint(), other.fingerprint(), strict=True))


def expected(problem, with_router: bool):
    """Output and gradients from the definitions, in fp64 by autograd."""
    names = ["x", "router" if with_router else "weights", "up", "down"]
    leaves = {n: getattr(problem, n).double().requires_grad_() for n in names}
    losses = torch.zeros((), dtype=torch.float64)
    if with_router:
        logits = leaves["x"] @ leaves["router"].T
        top_k = problem.config.top_k
        scores, weights, ids = reference.softmax_top_k(logits, top_k, top_k > 1)
        losses = LOAD_BALANCING * reference.load_balancing_loss(scores, ids)
        losses = losses + Z_LOSS * reference.z_loss(logits)
    else:
        weights, ids = leaves["weights"], problem.expert_ids
    up, down = leaves["up"], leaves["down"]
    out = reference.moe(leaves["x"], weights, ids, up, down, problem.config.activation)
    total = (out * problem.grad.double()).sum() + losses
    return out, dict(zip(names, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("with_router", [False, True], ids=["given", "router"])
@pytest.mark.parametrize("routing", ["uniform", "one", "half"])
@pytest.mark.parametrize(
    ("activation", "top_k"), [("swiglu", 4), ("geglu", 2), ("reglu", 1), ("relu", 2), ("gelu", 1)]
)
def test_answers_are_those_of_the_definitions(activation, top_k, routing, with_router):
    config = small("sonic-7b", activation, top_k)
    problem = make_problem(config, routing, CPU, dtype=torch.float64)
    answers = solve(problem, with_router)
    out, gradients = expected(problem, with_router)
    # The weights are given in fp32, so with a router they differ by one rounding.
    limit = 1e-6 if with_router else 1e-12
    assert relative_error(answers.out, out) < limit
    assert answers.gradients.keys() == gradients.keys()
    for name, right in gradients.items():
        assert relative_error(answers.gradients[name], right) < limit, name


def test_answers_to_a_bf16_problem_are_fp32():
    answers = solve(make_problem(small("mixtral-8x7b"), "uniform", CPU))
    assert {t.dtype for t in (answers.out, *answers.gradients.values())} == {torch.float32}


def test_relative_error():
    right = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), right) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, torch.nan]), right) == float("inf")


def test_route_normalises_for_several_experts_only():
    x, router = torch.randn(5, 8), torch.randn(4, 8)
    torch.testing.assert_close(route(x, router, 2)[0].sum(dim=1), torch.ones(5))
    assert (route(x, router, 1)[0] < 1).all()
