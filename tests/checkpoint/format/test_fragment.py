"""Fragments: what they hold of a tensor, and how files name and order them."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.checkpoint import OwnedPiece
from lightning_fastmoe.checkpoint.format.fragment import Fragment, StoredFragment
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.format.tensor_names import fragment_key


@pytest.mark.parametrize(("start", "length"), [(0, 10), (3, 4), (9, 1), (10, 0), (4, 0)])
def test_a_fragment_is_an_interval_of_the_elements(start, length):
    fragment = Fragment(start, length)
    assert fragment.stop == start + length
    assert fragment.within(torch.arange(10)).tolist() == list(range(start, start + length))


def test_what_is_written_to_a_fragment_is_written_to_the_tensor():
    whole = torch.zeros(6)
    Fragment(2, 3).within(whole).copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert whole.tolist() == [0, 0, 1, 2, 3, 0]


def test_the_name_in_a_file_counts_in_the_whole_tensor():
    data = torch.arange(6.0)
    fragment = OwnedFragment.of("weights/head.weight", (3, 4), 6, data)
    assert (fragment.start, fragment.stop, fragment.size) == (6, 12, 24)
    assert fragment.key == "weights/head.weight[6:12]"
    assert fragment.key == fragment_key("weights/head.weight", Fragment(6, 6))
    assert fragment.data is data


def test_stored_fragments_sort_by_start_whatever_their_files():
    later = StoredFragment(6, 1, "a.safetensors", "00000000")
    earlier = StoredFragment(0, 6, "b.safetensors", "ffffffff")
    assert sorted([later, earlier]) == [earlier, later]


def test_former_names_are_the_same_and_refuse_their_former_order():
    assert OwnedPiece is OwnedFragment
    record = TensorRecord("F32", (2,), (StoredFragment(0, 2, "a.safetensors", "00000000"),))
    assert record.pieces is record.fragments
    with pytest.raises(TypeError, match="positional"):
        OwnedPiece("weights/a", (2,), 0, 2, torch.float32, lambda: ())
