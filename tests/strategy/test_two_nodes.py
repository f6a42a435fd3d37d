"""Two torchrun launchers on loopback train one model between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from strategy.models import Case, reference
from strategy.two_nodes import STARTED

from lightning_fastmoe.testing import free_port


@pytest.mark.parametrize(
    ("per_node", "schedule"), [(1, "DedupSchedule"), (2, "TwoLevelDedupSchedule")]
)
def test_two_nodes_train_like_one_process(tmp_path: Path, per_node: int, schedule: str) -> None:
    target = tmp_path / "rank0.json"
    outputs = _launch(tmp_path, per_node, target)
    if outputs is None:  # the launchers never found each other, which is none of this test's
        outputs = _launch(tmp_path, per_node, target)
    assert target.exists(), outputs
    found = json.loads(target.read_text())
    expected = reference(Case(world=2 * per_node))
    assert found["node"] == 2
    assert found["schedules"] == [schedule]
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-6)
    assert found["norms"] == pytest.approx(expected.norms, rel=1e-6)


def _launch(folder: Path, per_node: int, target: Path) -> str | None:
    """What two launchers printed that have ended well; None if no rank has started.

    Raises:
        AssertionError: with what they printed, if they ended otherwise, or stood still.
    """
    program, port = Path(__file__).with_name("two_nodes.py"), free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc-per-node", str(per_node), "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    launch += ["--local-addr", "127.0.0.1"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    # One of the two programs once ended by SIGABRT; should it again, its stacks are printed.
    environment["PYTHONFAULTHANDLER"] = "1"
    files = [folder / f"{port}.{node}.txt" for node in range(2)]
    nodes = []
    for node, file in enumerate(files):
        # Both are on this host: left to themselves, both try to be the one that others find.
        conf = ["--rdzv-conf", f"is_host={int(node == 0)}"]
        with file.open("w") as out:
            command = [*launch, *conf, str(program), str(target), str(per_node)]
            nodes.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
            )
    until, stands_still = time.monotonic() + 150, False
    try:
        for one in nodes:
            one.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        stands_still = True
        for process in [part for one in nodes for part in _family(one.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGABRT)  # prints its stacks
        time.sleep(3)
    finally:
        for process in [part for one in nodes for part in _family(one.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    outputs = "\n".join(_short(file.read_text()) for file in files)
    if stands_still and STARTED not in outputs:
        print(outputs)
        return None
    assert not stands_still, outputs
    assert [one.wait(10) for one in nodes] == [0, 0], outputs
    return outputs


def _family(pid: int) -> list[psutil.Process]:
    """A process and what it has started, those first."""
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _short(output: str) -> str:
    """Without the stacks of torch's C++ code, which hide what matters."""
    return "\n".join(row for row in output.splitlines() if "frame #" not in row)
