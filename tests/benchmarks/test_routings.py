"""Each routing is the distribution that it says it is."""

from __future__ import annotations

import pytest
import torch
from layer.errors import BenchmarkError
from layer.routings import ROUTINGS, draw_expert_ids, parse_routings

T, E = 4000, 16


def draw(name: str, tokens: int = T, experts: int = E, top_k: int = 2, seed: int = 0):
    return draw_expert_ids(name, tokens, experts, top_k, torch.Generator().manual_seed(seed))


def counts(name: str, **sizes: int) -> list[int]:
    ids = draw(name, **sizes)
    return torch.bincount(ids.flatten(), minlength=sizes.get("experts", E)).tolist()


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_every_token_gets_k_distinct_experts(name, top_k):
    ids = draw(name, top_k=top_k)
    assert ids.shape == (T, top_k)
    assert ids.dtype == torch.int64
    assert set(ids.unique().tolist()) <= set(range(E))
    ordered = ids.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_seed_alone_decides(name):
    assert torch.equal(draw(name, seed=3), draw(name, seed=3))
    assert not torch.equal(draw(name, seed=3), draw(name, seed=4))


def within_five_sigma(observed: float, draws: int, share: float) -> bool:
    return abs(observed - draws * share) <= 5 * (draws * share * (1 - share)) ** 0.5


def test_uniform_gives_each_expert_its_share():
    found = counts("uniform")
    assert all(within_five_sigma(c, T, 2 / E) for c in found)
    assert max(found) - min(found) > 1  # drawn, not dealt out


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(4000, 16, 2), (61, 8, 3), (7, 8, 1)])
def test_balanced_counts_differ_by_one_at_most(tokens, experts, top_k):
    found = counts("balanced", tokens=tokens, experts=experts, top_k=top_k)
    assert max(found) - min(found) <= 1
    assert sum(found) == tokens * top_k


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_zipf_follows_its_law(exponent):
    found = sorted(counts(f"zipf:{exponent}", tokens=40_000, top_k=1), reverse=True)
    chances = [r**-exponent for r in range(1, E + 1)]
    # Neighbours may swap ranks in the tail, so heads are compared one by one and tails as a sum.
    for rank in range(4):
        assert within_five_sigma(found[rank], 40_000, chances[rank] / sum(chances))
    assert within_five_sigma(sum(found[4:]), 40_000, sum(chances[4:]) / sum(chances))


def test_zipf_draws_without_replacement():
    # The chance of each pair follows from drawing one after the other.
    found = counts("zipf:1.0", tokens=40_000, experts=3, top_k=2)
    p = [6 / 11, 3 / 11, 2 / 11]
    shares = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    for count, share in zip(sorted(found, reverse=True), shares, strict=True):
        assert within_five_sigma(count, 40_000, share)


def test_one_fills_k_experts_and_no_other():
    found = counts("one", top_k=3)
    assert sorted(found, reverse=True) == [T] * 3 + [0] * (E - 3)


def test_half_leaves_half_empty():
    found = counts("half")
    assert sum(c == 0 for c in found) == E // 2
    assert all(within_five_sigma(c, T, 2 / (E // 2)) for c in found if c)


def test_half_needs_enough_experts():
    with pytest.raises(BenchmarkError, match="4 experts for top_k=5"):
        draw("half", experts=8, top_k=5)


def test_busy_experts_lie_anywhere():
    firsts = {_busiest(seed) for seed in range(8)}
    assert len(firsts) > 1


def _busiest(seed: int) -> int:
    ids = draw("zipf:1.5", top_k=1, seed=seed)
    return int(torch.bincount(ids.flatten(), minlength=E).argmax())


def test_a_list_of_routings_is_parsed_and_unknown_names_are_refused():
    assert parse_routings("all") == list(ROUTINGS)
    assert parse_routings("uniform, zipf:0.7") == ["uniform", "zipf:0.7"]
    with pytest.raises(BenchmarkError, match="'zipf' is not a routing"):
        parse_routings("uniform,zipf")
    with pytest.raises(BenchmarkError, match="no routing"):
        parse_routings(",")
