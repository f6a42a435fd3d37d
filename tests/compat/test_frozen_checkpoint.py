"""Checkpoints of every format version ever released can still be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compat import tiny

from lightning_fastmoe.checkpoint import CheckpointReader

HERE = Path(__file__).parent
VERSIONS = sorted(p for p in HERE.glob("v*") if p.is_dir())


def test_there_is_one_for_each_version():
    assert [path.name for path in VERSIONS] == ["v1"]


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_its_values_are_read(path):
    expected = json.loads((HERE / f"{path.name}.json").read_text())
    with CheckpointReader(path) as reader:
        reader.verify()
        values = expected["first_and_last_values"]
        assert reader.manifest.tensors.keys() == values.keys()
        for name, ends in values.items():
            assert reader.read(name).flatten()[[0, -1]].tolist() == pytest.approx(ends, abs=1e-6)
        state = reader.read_state()
        assert state["lightning"]["global_step"] == tiny.SAVED
        assert state["optimizer"]["class"] == "AdamW"
        assert reader.read_rank_state(0)["rng"]["torch"]
        assert reader.read_rank_state(1) is None
    assert sum(file.stat().st_size for file in path.iterdir()) < 30_000


@pytest.mark.parametrize("layout", [(2, 2, 2), (1, 1, 3)], ids=str)
@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_training_goes_on_from_it(rank_pool, path, layout):
    expected = json.loads((HERE / f"{path.name}.json").read_text())["losses"]
    results = rank_pool.run(tiny.resume, layout[0], *layout, str(path))
    losses = [sum(step) / len(step) for step in zip(*(r[0] for r in results), strict=True)]
    assert losses == pytest.approx(expected, rel=1e-5)
    for _, seen in results:
        assert seen == tiny.STEPS
