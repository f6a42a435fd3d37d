"""Relative attention against one score at a time, in fp64."""

from __future__ import annotations

import pytest
import torch
from demos.transformer_xl.twins import attend, encoding
from torch import Tensor

from lightning_fastmoe.demos.transformer_xl import RelativeAttention
from lightning_fastmoe.demos.transformer_xl.attention import relative_shift, sinusoids

BATCH, LENGTH, D_MODEL, HEADS = 2, 5, 12, 3


def attention_and_states(mem_len: int) -> tuple[RelativeAttention, Tensor, Tensor | None]:
    torch.manual_seed(0)
    attention = RelativeAttention(D_MODEL, HEADS, init_std=0.5).double()
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(BATCH, mem_len, D_MODEL, dtype=torch.float64, requires_grad=True)
    return attention, x, memory if mem_len else None


def by_loops(attention: RelativeAttention, x: Tensor, memory: Tensor | None) -> Tensor:
    seen = x if memory is None else torch.cat((memory, x), dim=1)
    before = seen.shape[1] - x.shape[1]
    places = range(before, seen.shape[1])
    return torch.stack([torch.stack([attend(attention, i, s, 0, i) for i in places]) for s in seen])


@pytest.mark.parametrize("mem_len", [0, 1, 3, 9])
def test_values_and_gradients_are_those_of_the_formula(mem_len: int) -> None:
    attention, x, memory = attention_and_states(mem_len)
    upstream = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64)
    inputs = {"x": x, **({} if memory is None else {"memory": memory})}
    inputs |= dict(attention.named_parameters())
    assert {"content_bias", "position_bias", "position.weight"} < inputs.keys()
    out, expected = attention(x, memory), by_loops(attention, x, memory)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, list(inputs.values()), upstream)
    twins = torch.autograd.grad(expected, list(inputs.values()), upstream)
    for name, gradient, twin in zip(inputs, found, twins, strict=True):
        assert twin.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, twin, rtol=1e-11, atol=1e-12, msg=name)


def test_shift_lines_up_distances_with_keys() -> None:
    """Four keys, of which the last three ask."""
    by_distance = torch.tensor([3, 2, 1, 0]).repeat(2, 3, 1)
    shifted = relative_shift(by_distance)
    for query in range(3):
        position = query + 1
        expected = [position - key for key in range(position + 1)]
        assert shifted[:, query, : position + 1].tolist() == [expected] * 2


def test_shift_takes_each_row_from_its_own_query() -> None:
    by_distance = torch.arange(3)[:, None] * 10 + torch.tensor([4, 3, 2, 1, 0])
    shifted = relative_shift(by_distance)
    assert [row.tolist()[: 3 + i] for i, row in enumerate(shifted)] == [
        [2, 1, 0],
        [13, 12, 11, 10],
        [24, 23, 22, 21, 20],
    ]


def test_encodings_are_ordered_from_the_longest_distance() -> None:
    found = sinusoids(7, 8, torch.empty(0, dtype=torch.float64))
    expected = torch.stack([encoding(distance, 8) for distance in range(6, -1, -1)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_encodings_are_exact_before_they_are_rounded() -> None:
    """Distance 1000 in bf16 would be 1000, but 1001 would be it too."""
    found = sinusoids(1002, 8, torch.empty(0, dtype=torch.bfloat16))
    expected = torch.stack([encoding(distance, 8) for distance in (1001, 1000)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[:2].double(), expected, rtol=2**-8, atol=1e-3)


def test_no_gradient_is_lost_to_a_later_position() -> None:
    """Causal: a query's output has no gradient for what comes after it."""
    attention, x, memory = attention_and_states(3)
    for query in range(LENGTH):
        (gradient,) = torch.autograd.grad(attention(x, memory)[:, query].sum(), x)
        assert (gradient[:, query + 1 :] == 0).all()
        assert (gradient[:, : query + 1].abs().amax(dim=-1) > 1e-6).all()
