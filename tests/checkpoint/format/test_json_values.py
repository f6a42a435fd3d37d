"""Values as JSON."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from enum import IntEnum

import pytest
import torch

from lightning_fastmoe.checkpoint.format.json_values import decode, encode
from lightning_fastmoe.errors import CheckpointError


class Colour(IntEnum):
    RED = 1


def same(a, b) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


PLAIN = [
    None,
    True,
    0,
    -(2**70),
    1,
    0.1,
    1e-300,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    "é\ud800 \0",
    b"\0\xff",
    [],
    (),
    (1, [2, (3.0,)]),
    {"a": {"b": [None]}},
    {1: "int", (2, 3): "tuple", None: 0},
    {"$float": "not a tag"},
    {"$": 1, "b": 2},
    torch.tensor(0.1),
    torch.tensor([[1.5, math.nan]], dtype=torch.float64).nan_to_num(7),
    torch.tensor([0.1, -3e38], dtype=torch.bfloat16),
    torch.tensor([True, False]),
    torch.tensor([2**62, -1]),
    torch.empty(0, 3),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_comes_back_with_its_types(value):
    objects = []
    text = json.dumps(encode(value, objects), allow_nan=False)
    assert objects == []
    assert same(decode(json.loads(text), [], "here"), value)


@pytest.mark.parametrize(
    "value",
    [OrderedDict(a=1), {1, 2}, Colour.RED, torch.zeros(2000), torch.nn.Parameter(torch.zeros(1))],
    ids=lambda v: type(v).__name__,
)
def test_what_json_has_not_goes_beside_it(value):
    objects = []
    encoded = encode({"deep": [value, 1]}, objects)
    assert encoded == {"deep": [{"$object": 0}, 1]}
    assert len(objects) == 1
    assert decode(encoded, objects, "here")["deep"][0] is objects[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"$object": 0},
        {"$object": -1},
        {"$object": "0"},
        {"$float": "1e9"},
        {"$tensor": ["F32", [2], [1.0]]},
        {"$tensor": ["F33", [1], [1.0]]},
        {"$bytes": "*"},
        {"$dict": [[[1], 2]]},
        {"$tuple": 3},
        {"$eval": "1"},
    ],
    ids=str,
)
def test_forged_values_are_refused(bad):
    with pytest.raises(CheckpointError, match="here"):
        decode({"a": [bad]}, [], "here")
