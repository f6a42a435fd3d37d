"""Shared by all tests: one thread, and uninitialised memory that shows."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pairwise
import pytest
import torch
import torch.distributed as dist

from lightning_fastmoe.testing import RankPool

ROOT = Path(__file__).parent
POISONED = ("ops", "nn")
"""Folders whose tests run with poisoned memory unless marked poisoned(False)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        pairwise.OPTION,
        action="store_true",
        help="run all combinations of parameters, not only as many as have all pairs of values",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairwise.parametrize(metafunc)


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Ranks in worker processes, started once for the whole session."""
    pool = RankPool()
    yield pool
    pool.close()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "poisoned(wanted=True): torch.empty and its kin give NaN instead of old memory"
    )
    config.addinivalue_line("markers", f"{pairwise.MARK}(...): parameters; see tests/pairwise.py")
    # A shell starts what runs in the background with SIGINT ignored, and so would be all processes
    # that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Without it, Lightning's launchers set the threads of a test's process to the number of cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with torch.device("cpu"):  # which remembers torch.empty and its kin as they are at first use
        torch.empty(0)


def _poison(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(create)
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = create(*args, **kwargs)
        if tensor.dtype == torch.bool:
            return tensor
        bad = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        with torch.no_grad():
            return tensor.fill_(bad)

    return poisoned


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading an element that nobody wrote gives NaN, or an index far out of range."""
    mark = request.node.get_closest_marker("poisoned")
    wanted = request.path.relative_to(ROOT).parts[0] in POISONED
    if mark is not None:
        wanted = mark.args[0] if mark.args else True
    if not wanted:
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Lightning leaves LOCAL_RANK behind, with which a Trainer of a later test starts no ranks."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value and name != "PYTEST_CURRENT_TEST":
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of matrices on several threads have other last bits than those of the ranks."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Lightning's strategies leave theirs, and tests that come later here are to find none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes in one piece goes first, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_csrc.py")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Prints failures as they come, too: a run that is cut short has then said what failed."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed:\n{report.longreprtext[-4000:]}", file=sys.__stderr__)
