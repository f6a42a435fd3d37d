"""The count vectors, packed and unpacked in one process; the exchange itself needs several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_fastmoe.distributed.dispatch.counts import pack_counts, unpack_counts
from lightning_fastmoe.errors import ExchangeError

COUNTS = [[3, 0, 5, 1], [0, 0, 0, 0], [2, 9, 4, 7]]
MAGIC, LAYER, SEQUENCE, WIDTH, TOTAL, CHECKSUM = range(6)
"""Places in the header; counts follow."""
BODY = 6
DAMAGED = "layers.1: the token counts of rank {} of the expert parallel group arrived damaged"


def pack(counts, *, slots=6, sequence=7, width=64, layer="layers.1"):
    return pack_counts(torch.tensor(counts), slots, sequence, width, layer)


def make():
    return torch.stack([pack(row) for row in COUNTS]).numpy()


@pytest.mark.parametrize("slots", [4, 6, 64])
def test_round_trip(slots):
    table = torch.stack([pack(row, slots=slots) for row in COUNTS]).numpy()
    assert table.shape == (3, 6 + slots)
    assert table.dtype == np.int64
    assert unpack_counts(table, 4, "layers.1").tolist() == COUNTS


def test_large_counts():
    counts = [[2**40, 1, 0, 2**41]] * 2
    table = torch.stack([pack(row) for row in counts]).numpy()
    assert unpack_counts(table, 4, "layers.1").tolist() == counts


def _flip(bit):
    def damage(row):
        row[BODY + 2] ^= 1 << bit

    return damage


def _swap(row):
    row[[BODY, BODY + 1]] = row[[BODY + 1, BODY]]


def _move(row):
    row[BODY] -= 1
    row[BODY + 3] += 1


def _set(place, change):
    def damage(row):
        row[place] += change

    return damage


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_flip(0), id="lowest-bit"),
        pytest.param(_flip(31), id="bit-31"),
        pytest.param(_flip(62), id="bit-62"),
        pytest.param(_set(BODY, -100), id="negative"),
        pytest.param(_swap, id="swapped"),
        pytest.param(_move, id="moved"),
        pytest.param(_set(TOTAL, 1), id="total"),
        pytest.param(_set(CHECKSUM, 2), id="checksum"),
        pytest.param(_set(MAGIC, 1), id="magic"),
        pytest.param(_set(BODY + 5, 1), id="padding"),
    ],
)
def test_damage_is_found_and_named(rank, damage):
    table = make()
    damage(table[rank])
    with pytest.raises(ExchangeError, match=DAMAGED.format(rank)):
        unpack_counts(table, 4, "layers.1")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([5, -1, 3, 2], id="negative"),
        pytest.param([5, 1, 3, 2, 0, 4], id="counts-of-experts-that-do-not-exist"),
    ],
)
def test_impossible_counts_with_matching_sums_are_found(row):
    table = make()
    table[1] = pack(row)
    with pytest.raises(ExchangeError, match=DAMAGED.format(1)):
        unpack_counts(table, 4, "layers.1")


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("other", [{"layer": "layers.2"}, {"sequence": 8}, {"width": 32}])
def test_ranks_in_different_exchanges(rank, other):
    table = make()
    table[rank] = pack(COUNTS[rank], **other)
    named = max(rank, 1)  # rank 0 is what the others are compared with
    message = f"different exchanges.*rank {named} in number.*same layer: {'layer' not in other}"
    for layer in {"layers.1", other.get("layer", "layers.1")}:  # as others and it itself see it
        with pytest.raises(ExchangeError, match=message):
            unpack_counts(table, 4, layer)


def test_layers_with_other_numbers_of_experts_are_not_called_damaged():
    table = make()
    table[1] = pack([1, 1, 1, 1, 1, 1], layer="layers.2")
    for experts, layer in ((4, "layers.1"), (6, "layers.2")):
        with pytest.raises(ExchangeError, match="different exchanges"):
            unpack_counts(table, experts, layer)


def test_a_whole_group_in_another_layer():
    with pytest.raises(ExchangeError, match="layers.9: the whole .*in another layer"):
        unpack_counts(make(), 4, "layers.9")


def test_the_message_tells_sequence_numbers_and_what_to_do():
    table = make()
    table[2] = pack(COUNTS[2], sequence=9)
    with pytest.raises(ExchangeError) as error:
        unpack_counts(table, 4, "layers.1")
    assert "rank 0 in number 7, rank 2 in number 9, same layer: True" in str(error.value)
    assert "same MoE layers in the same order" in str(error.value)
