"""A rank is killed at every single step of a save; nothing that was saved before is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_fastmoe.checkpoint.format.publish import exchange

TESTS = Path(__file__).parents[2]
OLD, NEW = 0, 1
KILLED = {"kill": -9, "term": -15}


@pytest.mark.parametrize(
    ("how", "replacing", "stride"),
    [("kill", "exchange", 1), ("kill", "renames", 1), ("term", "exchange", 5)],
)
def test_killed_at_every_step_of_a_save(tmp_path, how, replacing, stride):
    options = [str(tmp_path), how, replacing, str(stride)]
    command = [sys.executable, "-m", "checkpoint.format.kill_runs", *options]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["clean"] == NEW
    trials = result["trials"]
    assert sum(result["steps"]) > 50
    expected = result["steps"][0] // 2 if replacing == "renames" else sum(result["steps"]) // stride
    assert len(trials) >= expected
    for victim, at, codes, found, offered, after, left in trials:
        where = f"rank {victim}, step {at}: {codes} {found}"
        assert codes[victim] == KILLED[how], where
        assert codes[1 - victim] in (0, 1, 3), f"{where}: the other rank hangs"
        assert found in (OLD, NEW), where
        assert offered in (["last.ckpt"], []), where
        # Without a name only in the moment between two renames, and never where names trade places.
        assert offered or replacing == "renames", where
        assert after == found, where
        assert left == ["last.ckpt", "other.ckpt"], where
    assert {row[3] for row in trials} == {OLD, NEW}
    if replacing == "renames":
        assert sum(row[4] == [] for row in trials) >= 1


def test_names_can_trade_places_here(tmp_path):
    """Or the parameter above would test one way twice."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert exchange(tmp_path / "a", tmp_path / "b")
