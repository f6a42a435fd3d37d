"""benchmarks/expert_parallel.py runs on two ranks, and refuses wrong results."""

from __future__ import annotations

import json

import expert_parallel
import pytest
import torch

from lightning_fastmoe.testing import RankPool


def run(path: str, spoil: bool, *options: str) -> int:
    if spoil:
        before = expert_parallel.Case.results

        def spoilt(self):
            values = before(self)
            if self.layer.dispatcher_name == "dedup":
                values["d_tokens"][0] += 1.0
            return values

        expert_parallel.Case.results = spoilt
    arguments = ["--device", "cpu", "--tiny", "--configs", "sonic-7b", "--rounds", "1"]
    try:
        return expert_parallel.main([*arguments, "--steps", "1", "--json", path, *options])
    finally:
        if spoil:
            expert_parallel.Case.results = before


@pytest.mark.parametrize("spoil", [False, True])
def test_times_what_is_right(rank_pool: RankPool, tmp_path, spoil):
    path = tmp_path / "run.json"
    assert rank_pool.run(run, 2, str(path), spoil) == [int(spoil)] * 2
    rows = {row["dispatcher"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["local", "all_to_all", "dedup", "dedup_overlapped", "symmetric"]
    assert all(row["ms"] > 0 for name, row in rows.items() if name != "dedup")
    assert ("ms" in rows["dedup"]) != spoil
    assert (rows["dedup"]["error"] > expert_parallel.TOLERANCE) == spoil
    assert rows["all_to_all"]["error"] < 1e-5


def test_simulated_nodes(rank_pool: RankPool, tmp_path):
    path = tmp_path / "run.json"
    assert rank_pool.run(run, 4, str(path), False, "--ranks-per-node", "2") == [0] * 4
    facts = json.loads(path.read_text())
    assert (facts["ranks"], facts["ranks_per_node"]) == (4, 2)
    assert all(row["error"] < 1e-5 for row in facts["rows"])


def test_a_nan_is_an_error():
    bad = {"output": torch.tensor([torch.nan])}
    good = {"output": torch.tensor([1.0])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "slowest", lambda value, device: value)
        assert expert_parallel.error(bad, good, torch.device("cpu")) == float("inf")
