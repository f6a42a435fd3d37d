"""Two torchrun launchers on loopback train one model between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from strategy.models import Case, reference

from lightning_fastmoe.testing import free_port


@pytest.mark.parametrize(
    ("per_node", "schedule"), [(1, "DedupSchedule"), (2, "TwoLevelDedupSchedule")]
)
def test_two_nodes_train_like_one_process(tmp_path: Path, per_node: int, schedule: str) -> None:
    program = Path(__file__).with_name("two_nodes.py")
    target = tmp_path / "rank0.json"
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc-per-node", str(per_node), "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    launch += ["--local-addr", "127.0.0.1"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    # One of the two programs once ended by SIGABRT; should it again, its stacks are printed.
    environment["PYTHONFAULTHANDLER"] = "1"
    nodes = [
        subprocess.Popen(
            # Both are on this host: left to themselves, both try to be the one that others find.
            [*launch, "--rdzv-conf", f"is_host={hosts}", str(program), str(target), str(per_node)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for hosts in (1, 0)
    ]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    except subprocess.TimeoutExpired:
        for node in nodes:
            node.send_signal(signal.SIGABRT)  # prints its stacks
        pytest.fail("\n".join(_short(node.communicate(timeout=60)[0]) for node in nodes))
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(map(_short, outputs))
    found = json.loads(target.read_text())
    expected = reference(Case(world=2 * per_node))
    assert found["node"] == 2
    assert found["schedules"] == [schedule]
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-6)
    assert found["norms"] == pytest.approx(expected.norms, rel=1e-6)


def _short(output: str) -> str:
    """Without the stacks of torch's C++ code, which hide what matters."""
    return "\n".join(row for row in output.splitlines() if "frame #" not in row)
