"""benchmarks/soak.py tells starts that hang, fail and differ, and resources that grow."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import soak


def ends(args: argparse.Namespace, rank: int, port: int, folder: str, core: int) -> None:
    Path(folder, f"log.{rank}").write_text("all is well")
    Path(folder, f"losses.{rank}").write_text(json.dumps([(2.5).hex()]))


def hangs(args: argparse.Namespace, rank: int, port: int, folder: str, core: int) -> None:
    if rank == 1:
        time.sleep(600)
    ends(args, rank, port, folder, core)


def stalls(args: argparse.Namespace, rank: int, port: int, folder: str, core: int) -> None:
    Path(folder, f"log.{rank}").write_text("the CUDA kernel of sort_by_expert stood still: ...")
    raise SystemExit(1)


def fails(args: argparse.Namespace, rank: int, port: int, folder: str, core: int) -> None:
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("target", "outcome"),
    [(ends, "ended"), (hangs, "hung"), (stalls, "hung"), (fails, "failed")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_start_ends_hangs_or_fails_and_leaves_nothing_behind(
    target: Any,
    outcome: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(soak, "start", target)
    others = set(multiprocessing.active_children())  # of tests before
    # Only what really hangs is waited for until the limit: others may be slow on a busy machine.
    args = argparse.Namespace(gpus=2, limit=2.0 if target is hangs else 60.0, scratch=str(tmp_path))
    found = soak.one_start(multiprocessing.get_context("fork"), 0, args)
    assert found["outcome"] == outcome
    if outcome == "ended":
        assert found["losses"] == [json.dumps([(2.5).hex()])] * 2
    assert list(tmp_path.iterdir()) == []
    assert set(multiprocessing.active_children()) <= others


def test_every_third_start_has_one_core(tmp_path: Path) -> None:
    args = argparse.Namespace(gpus=0, limit=60.0, scratch=str(tmp_path))
    context = multiprocessing.get_context("fork")
    found = [soak.one_start(context, number, args)["one_core"] for number in range(6)]
    assert found == [False, False, True, False, False, True]


def test_pressure_goes_from_even_to_one_expert_to_dead_ones_and_back() -> None:
    assert soak.pressure(0, 4) == [0.0] * 4
    assert soak.pressure(250, 4) == pytest.approx([40.0, 0.0, 0.0, 0.0])
    assert soak.pressure(1250, 4) == pytest.approx([0.0, 40.0, 0.0, 0.0])
    assert soak.pressure(600, 4) == [-1e4, 0.0, -1e4, 0.0]
    assert soak.pressure(800, 4) == [0.0] * 4


def test_growth_is_seen_against_the_second_quarter() -> None:
    samples = [{"step": float(i), "threads": 5.0, "host_MiB": 10.0 + i} for i in range(8)]
    early, late = soak.halves(samples)
    assert early == {"threads": 5.0, "host_MiB": 13.0}
    assert late == {"threads": 5.0, "host_MiB": 17.0}
    with pytest.raises(SystemExit, match="too few"):
        soak.halves(samples[:7])
