"""Differences between checkpoints, whatever their layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint.samples import make_tensors, write_sample

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.tools import diff as compare_module
from lightning_fastmoe.checkpoint.tools.diff import bytes_to_compare, compare
from lightning_fastmoe.cli import main

HEAD = "weights/head.weight"


def differences(first: Path, second: Path, **options) -> dict:
    with CheckpointReader(first) as a, CheckpointReader(second) as b:
        return {d.tensor: d for d in compare(a, b, **options)}


@pytest.fixture
def tensors():
    return make_tensors()


@pytest.fixture
def path(tmp_path, tensors):
    return write_sample(tmp_path / "a.ckpt", tensors)


@pytest.fixture
def other(tmp_path, tensors):
    """Writes what is left of ``tensors``, on three ranks."""
    return lambda: write_sample(tmp_path / "b.ckpt", tensors, ranks=3)


def test_another_layout_is_no_difference(path, other):
    assert differences(path, other()) == {}


def test_names_shapes_and_dtypes(path, other, tensors):
    del tensors["weights/seen"]
    tensors["weights/new"] = torch.ones(2)
    states = [name for name in tensors if name.startswith("optimizer/")]
    for name in (HEAD, *states):
        tensors[name] = tensors[name].T.contiguous()
    tensors["weights/half"] = tensors["weights/half"].float()
    found = differences(path, other())
    assert {name: (d.kind, d.detail) for name, d in found.items()} == {
        "weights/seen": ("only in first", "I64 []"),
        "weights/new": ("only in second", "F32 [2]"),
        **{name: ("shape", "[5, 7] and [7, 5]") for name in (HEAD, *states)},
        "weights/half": ("dtype", "BF16 and F32"),
    }
    assert found["weights/half"].elements == 0


def test_the_largest_differences_are_reported(path, other, tensors):
    a = tensors[HEAD].clone()
    tensors[HEAD][0, 3] += 0.25
    tensors[HEAD][4, 6] = -tensors[HEAD][4, 6]
    found = differences(path, other())
    gap = (a.double() - tensors[HEAD].double()).abs()
    size = torch.maximum(a.double().abs(), tensors[HEAD].double().abs())
    assert list(found) == [HEAD]
    assert found[HEAD].elements == 2
    assert found[HEAD].max_abs == float(gap.max())
    assert found[HEAD].max_rel == float((gap / size).max()) == 2.0


def test_values_are_compared_in_steps(path, other, tensors, monkeypatch):
    monkeypatch.setattr(compare_module, "_ELEMENTS", 4)
    tensors[HEAD].view(-1)[33] += 1
    tensors[HEAD].view(-1)[2] += 3
    b = other()
    seen = []
    found = differences(path, b, on_bytes=seen.append)
    assert (found[HEAD].elements, round(found[HEAD].max_abs, 5)) == (2, 3.0)
    with CheckpointReader(path) as x, CheckpointReader(b) as y:
        assert sum(seen) == bytes_to_compare(x, y) == sum(t.nbytes for t in tensors.values())


def test_bits_count_unless_there_is_a_tolerance(path, other, tensors):
    tensors["weights/zero"] = torch.tensor([0.0, math.nan])
    first = other()
    assert differences(first, first) == {}
    copy = dict(tensors)
    copy["weights/zero"] = torch.tensor([-0.0, math.nan])
    copy[HEAD] = tensors[HEAD] * (1 + 1e-6)
    second = write_sample(path.with_name("c.ckpt"), copy)
    found = differences(first, second)
    assert found["weights/zero"].elements == 1
    assert found["weights/zero"].max_abs == 0
    assert HEAD in found
    assert differences(first, second, rtol=2e-6) == {}
    assert list(differences(first, second, rtol=1e-7)) == [HEAD]


def test_nan_against_a_number_is_infinitely_far(path, other, tensors):
    tensors[HEAD][1, 1] = math.nan
    found = differences(path, other(), rtol=1.0, atol=1e9)
    assert (found[HEAD].elements, found[HEAD].max_abs) == (1, math.inf)


def test_infinity_against_a_number(path, other, tensors):
    tensors[HEAD][1, 1] = math.inf
    found = differences(path, other(), rtol=1.0, atol=1e9)
    assert (found[HEAD].elements, found[HEAD].max_rel) == (1, math.inf)


def test_diff_reports_differences_and_exits_with_one(path, other, tensors, capsys):
    tensors["optimizer/exp_avg/head.weight"][0, 0] = math.inf
    second = other()
    assert main(["checkpoint", "diff", str(path), str(path)]) == 0
    assert "8 tensors are equal bit by bit" in capsys.readouterr().out
    assert main(["checkpoint", "diff", str(path), str(second)]) == 1
    out = capsys.readouterr().out
    assert "optimizer/exp_avg/head.weight" in out
    assert "1 tensor differs" in out
    assert main(["checkpoint", "diff", str(path), str(second), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] is False
    assert report["differences"][0]["max_abs"] == "inf"
    assert main(["checkpoint", "diff", str(path), str(second), "--weights-only"]) == 0
    assert "6 tensors" in capsys.readouterr().out


def test_the_command_refuses_nonsense(path, capsys):
    assert main(["checkpoint", "diff", str(path), str(path), "--rtol", "nan"]) == 2
    assert "at least 0" in capsys.readouterr().err
    assert main(["checkpoint", "diff", str(path), str(path) + "x"]) == 3
    with pytest.raises(SystemExit) as exit_:
        main(["checkpoint", "diff", str(path)])
    assert exit_.value.code == 2
