"""What a batch map says of padding and packing, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from lightning_fastmoe.errors import DataError, ShapeError
from lightning_fastmoe.huggingface.batch import IGNORED, KEYS, read_batch

X = IGNORED


def ids(*rows):
    return torch.tensor(rows)


def padded(**others):
    """Two rows of three tokens and of one: to the left of padding, and to the right of it."""
    return {"input_ids": ids([5, 6, 7, 0], [0, 0, 0, 8]),
            "attention_mask": ids([1, 1, 1, 0], [0, 0, 0, 1]), **others}  # fmt: skip


PACKED = {"input_ids": ids([1, 2, 3, 4, 5, 6]), "position_ids": ids([0, 1, 2, 0, 0, 1])}


def test_padding_is_neither_routed_nor_attended_to():
    batch = read_batch(padded())
    assert batch.targets.tolist() == [[6, 7, X], [X, X, X]]
    assert batch.layout.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch.layout.sequence_ids.tolist() == [[0, 0, 0, -1], [-1, -1, -1, 1]]
    assert batch.layout.real.tolist() == [0, 1, 2, 7]
    assert batch.layout.real_sequence_ids.tolist() == [0, 0, 0, 1]
    seen = batch.layout.attention_mask[1, 0].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def test_padding_on_the_right_needs_no_mask_of_scores():
    layout = read_batch({"input_ids": ids([5, 6, 0]), "attention_mask": ids([1, 1, 0])}).layout
    assert layout.attention_mask is None
    assert layout.real.tolist() == [0, 1]


def test_labels_beside_padding():
    labels = ids([9, 9, X, 9], [9, 9, 9, 9])
    assert read_batch(padded(labels=labels)).targets.tolist() == [[9, X, X], [X, X, X]]


def test_packed_documents():
    batch = read_batch(PACKED)
    assert batch.targets.tolist() == [[2, 3, X, X, 6]]
    assert batch.layout.real is None
    assert batch.layout.sequence_ids.tolist() == [[0, 0, 0, 1, 2, 2]]
    assert batch.layout.positions.tolist() == PACKED["position_ids"].tolist()
    assert batch.layout.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


SAME = {
    "seq_idx": {"seq_idx": ids([4, 4, 4, 0, 4, 4]).int()},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 3, 4, 6]), "max_length_k": 3},
    "an empty document": {"cu_seq_lens_k": torch.tensor([0, 3, 3, 4, 6, 6])},
    "all": {
        "seq_idx": ids([0, 0, 0, 1, 2, 2]),
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 6]),
        "cu_seq_lens_k": torch.tensor([0, 3, 4, 6]),
        "max_length_q": torch.tensor(3),
        "position_ids": PACKED["position_ids"],
        "attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "labels": None,
    },
}


@pytest.mark.parametrize("how", SAME)
def test_other_ways_to_say_it(how):
    want, got = read_batch(PACKED), read_batch({"input_ids": PACKED["input_ids"], **SAME[how]})
    assert torch.equal(got.targets, want.targets)
    for name in ("sequence_ids", "positions", "attention_mask"):
        assert torch.equal(getattr(got.layout, name), getattr(want.layout, name))


def test_what_the_collator_of_transformers_makes():
    documents = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": [5, 6]}]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    made = collate(documents, return_tensors="pt")
    assert set(made) < set(KEYS)
    got, want = read_batch(made), read_batch(PACKED)
    assert torch.equal(got.targets, want.targets)
    assert torch.equal(got.layout.sequence_ids, want.layout.sequence_ids)


def test_packing_and_padding_of_several_rows():
    """Positions of padding may be anything, as in transformers."""
    layout = read_batch({
        "input_ids": ids([1, 2, 3, 0, 0], [0, 4, 5, 6, 7]),
        "attention_mask": ids([1, 1, 1, 0, 0], [0, 1, 1, 1, 1]),
        "position_ids": ids([0, 1, 0, 1, 1], [1, 0, 0, 1, 2]),
    }).layout  # fmt: skip
    assert layout.sequence_ids.tolist() == [[0, 0, 1, -1, -1], [-1, 2, 3, 3, 3]]
    assert layout.positions.tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 2]]


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"attention_mask": torch.ones(2, 4)[:, :].long()},
        {"attention_mask": None},
        {"position_ids": torch.arange(4).view(1, 4)},
        {"seq_idx": ids([0] * 4, [1] * 4), "max_length_q": 4},
    ],
)
def test_without_padding_and_packing_nothing_changes(others):
    batch = read_batch({"input_ids": ids([1, 2, 3, 4], [5, 6, 7, 8]), **others})
    assert batch.layout is None
    assert batch.targets.tolist() == [[2, 3, 4], [6, 7, 8]]


def test_a_row_may_begin_later_than_at_position_0():
    layout = read_batch({"input_ids": ids([1, 2, 3]), "position_ids": ids([7, 8, 0])}).layout
    assert layout.positions.tolist() == [[7, 8, 0]]
    assert layout.sequence_ids.tolist() == [[0, 0, 1]]


REFUSED = {
    "an unknown key": ({"token_type_ids": 1, "x": 2}, DataError,
                       r"has token_type_ids, x, which .* not support.*may have: input_ids, labels"),
    "no tokens": ({"input_ids": None}, DataError, r"no input_ids"),
    "floating tokens": ({"input_ids": torch.ones(1, 6)}, ShapeError, r"input_ids is .*float32"),
    "flat tokens": ({"input_ids": torch.arange(6)}, ShapeError,
                    r"input_ids is a tensor of shape \(6,\).*\(batch, seq_len\)"),
    "other labels": ({"labels": ids([1, 2])}, ShapeError, r"labels is .*\(1, 2\).*\(1, 6\)"),
    "a 4-D mask": ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, ShapeError,
                   r"attention_mask is .*\(1, 1, 6, 6\).*of shape \(1, 6\).*4-dimensional"),
    "a floating mask": ({"attention_mask": torch.zeros(1, 6)}, ShapeError,
                        r"attention_mask is .*float32.* bool or an integer dtype"),
    "a short mask": ({"attention_mask": ids([1, 1])}, ShapeError, r"attention_mask is .*\(1, 2\)"),
    "a list": ({"attention_mask": [[1] * 6]}, ShapeError, r"attention_mask is a list"),
    "numbered documents": ({"attention_mask": ids([1, 1, 2, 2, 3, 0])}, DataError,
                           r"values other than 0 and 1.*give position_ids or seq_idx"),
    "a hole": ({"attention_mask": ids([1, 1, 0, 1, 1, 1])}, DataError, r"zeros between the ones"),
    "a gap": ({"position_ids": ids([0, 1, 2, 5, 6, 7])}, DataError, r"neither count up by 1 nor"),
    "negative positions": ({"position_ids": ids([-1, 0, 1, 2, 3, 4])}, DataError, r"neither count"),
    "3-D positions": ({"position_ids": torch.zeros(3, 1, 6).long()}, ShapeError,
                      r"position_ids is .*\(3, 1, 6\)"),
    "other documents": ({"position_ids": ids([0, 1, 0, 1, 2, 3]), "seq_idx": ids([0] * 6)},
                        DataError, r"position_ids and seq_idx start documents at different"),
    "unequal q and k": ({"cu_seq_lens_q": torch.tensor([0, 3, 6]),
                         "cu_seq_lens_k": torch.tensor([0, 2, 6])},
                        DataError, r"cu_seq_lens_q and cu_seq_lens_k start"),
    "boundaries elsewhere": ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, DataError,
                             r"cu_seq_lens_q goes from 0 to 5, but input_ids are \(1, 6\)"),
    "descending boundaries": ({"cu_seq_lens_q": torch.tensor([0, 4, 3, 6])}, DataError, "descends"),
    "floating boundaries": ({"cu_seq_lens_q": torch.tensor([0.0, 6.0])}, ShapeError,
                            r"cu_seq_lens_q is .*float32.*\(documents \+ 1,\)"),
    "boundaries and padding": ({"cu_seq_lens_q": torch.tensor([0, 6]),
                                "attention_mask": ids([1, 1, 1, 1, 1, 0])}, DataError,
                               r"attention_mask has padding, but cu_seq_lens_q is for rows"),
    "another longest": ({"position_ids": PACKED["position_ids"], "max_length_q": 4}, DataError,
                        r"max_length_q is 4, but the longest .* has 3 tokens"),
    "no length": ({"max_length_k": 2.5}, ShapeError, r"max_length_k is a float.*an integer"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_batch_that_contradicts_itself_is_refused(what):
    others, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        read_batch({"input_ids": PACKED["input_ids"], **others})


def test_boundaries_are_for_one_row():
    with pytest.raises(DataError, match=r"single row.*For several rows give position_ids"):
        read_batch({"input_ids": ids([1, 2], [3, 4]), "cu_seq_lens_q": torch.tensor([0, 2, 4])})
