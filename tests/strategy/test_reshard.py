"""A checkpoint of any topology resumes on any other, to the same numbers.

``pytest tests/strategy/test_reshard.py --all-combinations`` goes from each topology to each other.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy import reshard_runs as runs
from strategy.contents import assert_same_content, content, mean_losses
from strategy.reshard_runs import LAYOUTS, Layout

from lightning_fastmoe.checkpoint import CheckpointReader

RELATIVE = 1e-6


def some_pairs() -> list[tuple[Layout, Layout]]:
    """Each topology once on each side; all changes of world, of experts and of stage among them."""
    others = list(LAYOUTS)
    random.Random(340).shuffle(others)  # noqa: S311  a seed whose shuffle covers them; see below
    return list(zip(LAYOUTS, others, strict=True))


def module_pairs(every: bool) -> list[tuple[Layout, Layout]]:
    """The same for experts that are modules: half of the pairs for a list, a few for one class."""
    pairs = some_pairs()
    return [
        (replace(a, experts=kind), replace(b, experts=kind))
        for kind, some in (("list", pairs[::2]), ("class", pairs[1::6]))
        for a, b in (pairs if every else some)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-combinations")
        pairs = [(a, b) for a in LAYOUTS for b in LAYOUTS] if every else some_pairs()
        pairs += module_pairs(every)
        metafunc.parametrize("pair", pairs, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")


def test_the_few_pairs_cover_every_change():
    pairs = some_pairs()
    assert len(LAYOUTS) == 18
    assert {a for a, _ in pairs} == {b for _, b in pairs} == set(LAYOUTS)
    assert all(a != b for a, b in pairs)
    for key, count in (("world", 9), ("stage", 9), ("ep", 9)):
        assert len({(getattr(a, key), getattr(b, key)) for a, b in pairs}) == count, key


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """layout -> (checkpoint, losses and norms of the run that was not interrupted), made once."""
    made: dict[Layout, tuple[Path, list[float], list[float]]] = {}
    directory = tmp_path_factory.mktemp("saved")

    def get(layout: Layout):
        if layout not in made:
            path = directory / f"{layout}.ckpt"
            results = rank_pool.run(runs.straight, layout.world, layout, str(path))
            made[layout] = (path, mean_losses(results), results[0].norms)
        return made[layout]

    return get


def test_resumes_on_another_topology(rank_pool, saved, tmp_path, pair):
    before, after = pair
    path, losses, norms = saved(before)
    again = tmp_path / "again.ckpt"
    results = rank_pool.run(runs.resumed, after.world, after, str(path), str(again))
    assert_same_content(path, again, runs.SOME_EXPERT[before.experts])
    shutil.rmtree(again)
    left = runs.STEPS - runs.SAVED
    assert len(set(losses)) == len(set(norms)) == runs.STEPS
    assert mean_losses(results) == pytest.approx(losses[-left:], rel=RELATIVE)
    for rank in results:
        assert rank.norms == pytest.approx(norms[-left:], rel=RELATIVE)


def test_frozen_parameters_can_be_left_out(rank_pool, tmp_path):
    before = Layout(2, 2, 2, exclude_frozen=True)
    after = Layout(2, 1, 3, exclude_frozen=True)
    path, again = tmp_path / "a.ckpt", tmp_path / "again.ckpt"
    rank_pool.run(runs.straight, 2, before, str(path))
    rank_pool.run(runs.resumed, 2, after, str(path), str(again))
    frozen = {f"net.{name}" for name in runs.FROZEN}
    for file in (path, again):
        with CheckpointReader(file) as reader:
            assert set(reader.manifest.excluded) == frozen
            assert not {f"weights/{name}" for name in frozen} & reader.manifest.tensors.keys()
            assert "weights/net.norm.bias" in reader.manifest.tensors


def test_another_precision_keeps_the_master_weights(rank_pool, tmp_path):
    before, after = Layout(2, 2, 2, "bf16-mixed"), Layout(1, 1, 3)
    path, again = tmp_path / "a.ckpt", tmp_path / "again.ckpt"
    rank_pool.run(runs.straight, 2, before, str(path))
    rank_pool.run(runs.resumed, 1, after, str(path), str(again))
    (expected, _), (found, _) = content(path), content(again)
    name = "weights/net.moes.1.experts.up_proj"
    assert expected[name].dtype == torch.float32
    assert not torch.equal(expected[name], expected[name].bfloat16().float())
    for name, tensor in expected.items():
        if "norm.weight" not in name and "up_bias" not in name:  # frozen: no master, as they are
            assert torch.equal(found[name], tensor), name
