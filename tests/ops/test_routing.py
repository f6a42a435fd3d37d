from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.ops import order_by_expert, top_k
from lightning_fastmoe.ops.reference import softmax_top_k


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(0, 3, 2), (1, 1, 1), (7, 5, 1), (13, 7, 3), (11, 6, 6)]
)
def test_top_k_equals_reference(tokens, experts, k):
    torch.manual_seed(0)
    # Few distinct values, so that most rows have ties.
    logits = torch.randint(0, 3, (tokens, experts)).double()
    _, _, ids = softmax_top_k(logits, k, normalize=False)
    got = top_k(logits, k)
    assert got.dtype == torch.int64
    assert got.shape == (tokens, k)
    assert torch.equal(got, ids)


@pytest.mark.parametrize("experts", [2, 5, 64, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_ties_go_to_the_lower_id(experts, dtype):
    scores = torch.zeros(3, experts, dtype=dtype)
    assert top_k(scores, experts).tolist() == [list(range(experts))] * 3
    scores[1, -1] = 1
    assert top_k(scores, 2)[1].tolist() == [experts - 1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_top_k_of_non_finite_scores_is_valid_and_distinct(bad):
    torch.manual_seed(0)
    scores = torch.rand(50, 7)
    scores[torch.rand(50, 7) < 0.4] = bad
    scores[0] = bad
    ids = top_k(scores, 4)
    assert ids.min() >= 0
    assert ids.max() < 7
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_order_of_the_docstring():
    got = order_by_expert(torch.tensor([[1, 0], [1, 2], [0, 1]]), 3)
    assert got.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert got.inverse.tolist() == [2, 0, 3, 5, 1, 4]
    assert got.tokens_per_expert.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(0, 4, 2), (1, 1, 1), (5, 13, 2), (97, 7, 3), (300, 3, 3), (31, 64, 8)],
)
@pytest.mark.parametrize("spread", ["random", "all_on_last", "every_other_empty"])
def test_order_is_by_expert_then_token_then_slot(tokens, experts, k, spread):
    torch.manual_seed(0)
    ids = torch.randint(0, experts, (tokens, k))
    if spread == "all_on_last":
        ids.fill_(experts - 1)
    elif spread == "every_other_empty":
        ids = ids // 2 * 2
    got = order_by_expert(ids, experts)
    flat = ids.flatten().tolist()
    # Pairs are numbered token-major, so (expert, pair) is (expert, token, slot).
    want = sorted(range(tokens * k), key=lambda pair: (flat[pair], pair))
    assert got.order.tolist() == want
    assert [got.order[row].item() for row in got.inverse] == list(range(tokens * k))
    assert got.tokens_per_expert.tolist() == [flat.count(e) for e in range(experts)]
    assert {t.dtype for t in (got.order, got.inverse, got.tokens_per_expert)} == {torch.int64}


def test_order_of_a_flat_list():
    got = order_by_expert(torch.tensor([2, 0, 2, 0]), 4)
    assert got.order.tolist() == [1, 3, 0, 2]
    assert got.tokens_per_expert.tolist() == [2, 0, 2, 0]
