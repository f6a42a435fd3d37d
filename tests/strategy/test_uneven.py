"""Ranks with different numbers of batches, samples and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategy import uneven_runs as runs
from strategy.models import make_optimizer

RELATIVE = 1e-5


def assert_near(actual: float, expected: float, what: str) -> None:
    assert abs(actual - expected) <= RELATIVE * abs(expected), f"{what}: {actual} != {expected}"


def assert_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        error = float((actual[name] - weight).abs().max() / weight.abs().max().clamp_min(1e-12))
        assert error <= RELATIVE, f"{name}: relative error {error:.2e}"


def plain_fit(steps: list[list[int]]) -> dict[str, torch.Tensor]:
    """One process; ``steps[i]`` are the samples, one per rank, of step i."""
    net = runs.make_net()
    optimizer = make_optimizer(net)
    for numbers in steps:
        optimizer.zero_grad()
        x = torch.stack([runs.sample(n) for n in numbers])
        runs.sample_losses(net, x).mean().backward()
        optimizer.step()
    return {n: p.detach() for n, p in net.named_parameters()}


def plain_losses(numbers: list[int], net: Any = None) -> torch.Tensor:
    x = torch.stack([runs.sample(n) for n in numbers])
    with torch.no_grad():
        return runs.sample_losses(runs.make_net().eval() if net is None else net, x)


# ------------------------------------------------------------------------------------- training

TRAINING = [[0, 1, 2, 3, 4], [10, 11, 12]]


@pytest.mark.parametrize("kind", ["sized", "stream", "one-way"])
@pytest.mark.parametrize("stage", [2, 3])
def test_fit_stops_with_the_shortest_rank(rank_pool, stage, kind):
    results = rank_pool.run(runs.fit, 2, stage, kind, TRAINING, 2, {})
    expected = plain_fit([[0, 10], [1, 11], [2, 12]] * 2)
    for rank, result in enumerate(results):
        assert result["steps"] == 6
        assert result["seen"] == [TRAINING[rank][:3]] * 2
        assert_weights(result["weights"], expected)


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_fit_honours_a_limit_below_the_shortest_rank(rank_pool, kind):
    extra = {"limit_train_batches": 2, "accumulate_grad_batches": 1}
    results = rank_pool.run(runs.fit, 2, 1, kind, TRAINING, 2, extra)
    for rank, result in enumerate(results):
        assert result["steps"] == 4
        assert result["seen"] == [TRAINING[rank][:2]] * 2


@pytest.mark.parametrize("kind", ["sized", "stream"])
@pytest.mark.parametrize("stage", [2, 3])
def test_validation_inside_fit_changes_no_weight(rank_pool, stage, kind):
    training = [[0, 1], [10, 11]]
    numbers = [[20, 21, 22], [30]]
    results = rank_pool.run(runs.fit_with_validation, 2, stage, kind, training, numbers)
    weights = plain_fit([[0, 10], [1, 11]] * 2)
    net = runs.make_net().eval()
    net.load_state_dict(weights)
    loss = float(plain_losses([20, 21, 22, 30], net).mean())
    assert results[0]["validated"] == [20, 21] + [20, 21, 22] * 2
    assert results[1]["validated"] == [30] * 3
    for result in results:
        assert_weights(result["weights"], weights)
        assert_near(result["val_loss"], loss, "val_loss")


TOKEN_COUNTS = [[3, 0], [0, 7], [1, 4]]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_with_different_numbers_of_tokens(rank_pool, stage):
    net = runs.make_net()
    optimizer = make_optimizer(net)
    gradients, weights = {}, []
    for step in runs.token_batches(TOKEN_COUNTS):
        optimizer.zero_grad()
        (sum(runs.summed_loss(net, x) for x in step) / 2).backward()
        gradients = gradients or {n: p.grad.clone() for n, p in net.named_parameters()}
        optimizer.step()
        weights.append({n: p.detach().clone() for n, p in net.named_parameters()})
    for result in rank_pool.run(runs.fit_tokens, 2, stage, TOKEN_COUNTS):
        assert_weights(result["gradients"], gradients)
        for own, twin in zip(result["weights"], weights, strict=True):
            assert_weights(own, twin)


# ----------------------------------------------------------------------------------- evaluation


def assert_counted_once(
    results: list[Any], seen: list[list[int]], loader: int, loaders: int
) -> None:
    """``seen[rank]``: the samples of each rank that must be counted, once each."""
    everything = [n for own in seen for n in own]
    losses = plain_losses(everything)
    suffix = f"/dataloader_idx_{loader}" if loaders > 1 else ""
    for rank, result in enumerate(results):
        assert result["seen"][loader] == seen[rank]
        logged = result["logged"]
        assert_near(logged["metric" + suffix], float(losses.mean()), "metric")
        assert_near(logged["mean" + suffix], float(losses.mean()), "mean")
        assert_near(logged["sum" + suffix], float(losses.sum()), "sum")
        assert_near(logged["largest" + suffix], float(losses.max()), "largest")


@pytest.mark.parametrize(
    ("function", "stage", "world", "batch"),
    [("validate", 2, 2, 1), ("test", 3, 2, 2), ("validate", 3, 4, 1)],
)
def test_the_samples_of_lightnings_own_sampler_count_once(rank_pool, function, stage, world, batch):
    results = rank_pool.run(runs.evaluate_sampled, world, function, stage, world, 7, batch)
    seen = [list(range(rank, 7, world)) for rank in range(world)]
    assert_counted_once(results, seen, 0, 1)
    assert sum(result["count"] for result in results) == 7
    assert sum(result["total"] for result in results) == sum(range(7))


LENGTHS = [[[0, 1, 2, 3, 4], [10, 11]]]
TWO = [[[0, 1, 2, 3], [10]], [[20], [30, 31, 32]]]
LATER = [TWO[0], [[20, 21], [30, 31, 32]]]


@pytest.mark.parametrize(
    ("kinds", "numbers"),
    [
        (["sized"], LENGTHS),
        (["stream"], LENGTHS),
        (["one-way"], LENGTHS),
        (["sized", "sized"], TWO),
        (["sized", "sized"], TWO[::-1]),
        (["stream", "stream"], LATER),
        (["stream", "sized"], LATER),
        (["sized", "stream"], LATER),
    ],
    ids=["sized", "stream", "one-way", "sized2", "sized2-turned", "stream2", "mixed", "mixed2"],
)
@pytest.mark.parametrize(("stage", "on_step"), [(2, False), (3, True)])
def test_each_sample_counts_once(rank_pool, stage, kinds, numbers, on_step):
    results = rank_pool.run(runs.evaluate, 2, "validate", stage, kinds, numbers, on_step, {})
    for loader, seen in enumerate(numbers):
        assert_counted_once(results, seen, loader, len(numbers))
    for rank, result in enumerate(results):
        own = [n for loader in numbers for n in loader[rank]]
        assert result["count"] == len(own)
        assert result["total"] == sum(own)
        if on_step:
            suffix = "/dataloader_idx_0" if len(numbers) > 1 else ""
            everything = [n for own in numbers[0] for n in own]
            mean = float(plain_losses(everything).mean())
            assert_near(result["logged"]["stepwise_epoch" + suffix], mean, "stepwise")


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_limit_val_batches_counts_per_rank(rank_pool, kind):
    numbers = [[[0, 1, 2, 3], [10]]]
    extra = {"limit_val_batches": 2}
    results = rank_pool.run(runs.evaluate, 2, "validate", 2, [kind], numbers, False, extra)
    assert_counted_once(results, [[0, 1], [10]], 0, 1)


@pytest.mark.parametrize(("stage", "kind"), [(2, "sized"), (3, "stream"), (3, "one-way")])
def test_predict_returns_each_rank_its_own(rank_pool, stage, kind):
    numbers = [[[0, 1, 2], [10]]]
    results = rank_pool.run(runs.evaluate, 2, "predict", stage, [kind], numbers, False, {})
    for rank, result in enumerate(results):
        own = numbers[0][rank]
        assert [i for ids, _ in result["outputs"] for i in ids] == own
        losses = torch.cat([values for _, values in result["outputs"]])
        torch.testing.assert_close(losses, plain_losses(own), rtol=RELATIVE, atol=1e-6)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["sized", "stream"])
@pytest.mark.parametrize(("function", "stage"), [("fit", 2), ("validate", 3), ("predict", 2)])
def test_a_rank_without_a_batch_is_refused_on_all_ranks(rank_pool, function, stage, kind):
    errors = rank_pool.run(runs.failing, 2, function, stage, kind, [[0, 1], []])
    for name, message in errors:
        assert name == "DataError"
        assert "Rank 1 has no batch" in message


@pytest.mark.parametrize("kinds", [["stream", "stream"], ["stream", "sized"]])
def test_a_single_batch_in_a_later_loader_is_refused_on_all_ranks(rank_pool, kinds):
    errors = rank_pool.run(runs.failing_evaluation, 2, kinds, TWO)
    for name, message in errors:
        assert name == "DataError"
        assert "Rank 0 has a single batch" in message


def test_fewer_samples_than_ranks_are_refused_on_all_ranks(rank_pool):
    errors = rank_pool.run(runs.failing_sampled, 4, 3)
    for name, message in errors:
        assert name == "DataError"
        assert "3 sample(s) for 4 ranks" in message
        assert "at least 1 (one batch)" in message


@pytest.mark.parametrize(("stage", "skipped"), [(2, 0), (2, 1), (3, 0), (3, 1)])
def test_a_forward_pass_that_depends_on_the_rank_is_an_error(rank_pool, stage, skipped):
    errors = rank_pool.run(runs.rank_dependent, 2, stage, skipped, timeout=45)
    for name, message in errors:
        assert name == "ExchangeError"
        assert "in different exchanges" in message
