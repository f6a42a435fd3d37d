"""The report of a kernel that gave up reaches the user. (tests/gpu has kernels that do.)"""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_fastmoe import FastMoEStrategy
from lightning_fastmoe.ops import stall


class Library:
    """The operators of a process in which a kernel has, or has not, given up."""

    def __init__(self, report: str) -> None:
        self.stall_report = lambda: report


def test_there_is_no_report_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "_libraries", [])
    assert stall.stall_report() == ""


def test_the_report_is_that_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "_libraries", [Library(""), Library("the kernel stood still")])
    assert stall.stall_report() == "the kernel stood still"


@pytest.mark.parametrize("report", ["", "the kernel stood still"])
def test_the_report_is_printed_when_the_process_ends(report: str) -> None:
    program = (
        "import types\n"
        "from lightning_fastmoe.ops import stall\n"
        f"stall.watch(types.SimpleNamespace(stall_report=lambda: {report!r}))\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 3
    assert done.stderr == (f"lightning_fastmoe: {report}\n" if report else "")


def test_the_report_is_added_to_what_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "_libraries", [Library("the kernel stood still")])
    error = RuntimeError("CUDA error: unspecified launch failure")
    FastMoEStrategy().on_exception(error)
    assert error.__notes__ == ["lightning_fastmoe: the kernel stood still"]
