"""Several processes and one cache: they build once, and a killed builder is in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from ops.toolkit import Machine, compilations, units

from lightning_fastmoe.ops import _build

TESTS = Path(__file__).parents[2]
TIMEOUT = 60

PROCESS = """
import sys, time
from pathlib import Path

folder, started = Path(sys.argv[1]), Path(sys.argv[2])
from ops.toolkit import Machine
from lightning_fastmoe.ops import _build

Machine(folder).has_gpus((9, 0))
started.touch()
while not (folder / "go").exists():
    time.sleep(0.005)
outcome = _build.build()
print(outcome.library or outcome.reason)
"""


class Processes:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.running: list[subprocess.Popen[str]] = []

    def start(self, number: int) -> None:
        """Start processes and let all call build() at the same moment."""
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, paths))}
        started = [self.machine.folder / f"started{i}" for i in range(number)]
        for file in started:
            self.running.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROCESS, str(self.machine.folder), str(file)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # with the compilers that it starts
                )
            )
        wait_for(lambda: all(file.exists() for file in started))
        (self.machine.folder / "go").touch()

    def results(self) -> list[tuple[str, str]]:
        """What each printed: its library or reason, and its errors."""
        done = [process.communicate(timeout=TIMEOUT) for process in self.running]
        return [(out.strip(), err) for out, err in done]


def wait_for(condition) -> None:
    limit = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.01)


@pytest.fixture
def processes(machine: Machine) -> Iterator[Processes]:
    started = Processes(machine)
    yield started
    for process in started.running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)


def test_ranks_that_start_together_build_once(machine: Machine, processes: Processes) -> None:
    machine.install("sleep 0.1")  # long enough for all to come
    processes.start(3)
    results = processes.results()
    assert len({out for out, _ in results}) == 1
    assert results[0][0].endswith("/sm_90a.so")
    assert compilations(machine.calls()) == sorted(units())
    assert sorted(err.count("\n") for _, err in results) == [0, 0, 1]  # one line of progress


def test_ranks_that_start_together_fail_once(machine: Machine, processes: Processes) -> None:
    machine.install('case "$*" in *sort.cu*) sleep 1; echo broken; exit 1;; esac')
    processes.start(3)
    results = processes.results()
    assert len({out for out, _ in results}) == 1
    assert "broken" in results[0][0]
    assert compilations(machine.calls()).count("sort.cu") == 1
    assert _build.look().state == "failed"


def test_a_killed_builder_is_in_nobodys_way(
    machine: Machine, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All but the last of its compilers are done when it is killed: one that had only begun would
    # write to the log while the next builder's calls are counted.
    machine.install('case "$*" in *sort.cu*) sleep 60;; esac')
    monkeypatch.setenv("MAX_JOBS", "2")
    monkeypatch.setenv("TMPDIR", str(machine.folder))  # where it leaves a folder
    processes.start(1)
    wait_for(lambda: compilations(machine.calls(forget=False)) == sorted(units()))
    (builder,) = processes.running
    # It alone: its compilers live on, as they do when a rank is killed.
    os.kill(builder.pid, signal.SIGKILL)
    builder.wait(timeout=TIMEOUT)
    (folder,) = machine.cache.iterdir()
    left = [path.name for path in folder.iterdir()]
    assert any(name.startswith("build-") for name in left)
    assert "lock" in left
    assert not any(name.endswith(".so") for name in left)
    machine.calls()
    machine.install()
    library = _build.build().library
    assert library is not None
    assert compilations(machine.calls()) == sorted(units())
    assert sorted(path.name for path in library.parent.iterdir()) == ["lock", "sm_90a.so"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=["SIGTERM", "SIGHUP", "SIGINT"]
)
def test_a_builder_that_is_told_to_end_leaves_nothing(
    machine: Machine,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    temporary = machine.folder / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    children = machine.folder / "children"
    # As nvcc does, it leaves the work, and the pipes, to a child.
    machine.install(
        f'case "$*" in *sort.cu*) touch "$TMPDIR/x"; sleep 600 & echo $! > {children}; wait;; esac'
    )
    processes.start(1)
    wait_for(lambda: children.exists() and children.read_text().endswith("\n"))
    child = int(children.read_text())
    assert any(temporary.rglob("x"))
    (builder,) = processes.running
    os.kill(builder.pid, number)  # it alone
    builder.wait(timeout=TIMEOUT)
    assert builder.returncode == -number  # as without a build
    wait_for(lambda: is_gone(child))
    (folder,) = machine.cache.iterdir()
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert list(temporary.iterdir()) == []


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for by its parent or not yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_handler_of_the_user_stays_in_place(
    machine: Machine,
) -> None:
    """SIGTERM to a run that has its own plans, while kernels are compiled in it."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        machine.install(f'case "$*" in *" -c "*sort.cu*) kill -TERM {os.getpid()};; esac')
        assert _build.build().library is not None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]
