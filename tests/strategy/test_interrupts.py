"""Ctrl-C ends a training between two batches; what resumes it does what would have followed."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from unittest import mock

import pytest
from strategy import interrupt_runs as runs
from strategy.models import Case
from torch.utils.data import DataLoader, Dataset

from lightning_fastmoe.strategy.loaders.interrupts import (
    WithoutInterrupts,
    leave_interrupts_to_ranks,
)
from lightning_fastmoe.strategy.loaders.resumable import resumable


def case_of(world: int) -> Case:
    return Case(world, world, 2, fused=True)


@pytest.mark.parametrize(("world", "interval"), [(1, None), (1, 2), (2, 2)])
def test_nothing_is_left_out_and_nothing_done_twice(rank_pool, tmp_path, world, interval):
    """No hook of the batch, no validation that was due, no end of an epoch; and the same bits."""
    arguments = case_of(world), interval, str(tmp_path)
    for straight, found in rank_pool.run(runs.in_every_batch, world, *arguments, timeout=240):
        for batch, how, ended, rest, differs in found:
            assert how == "SystemExit", batch
            # A validation that had begun begins again.
            last = len(ended) - 1 - next(i for i, x in enumerate(ended[::-1]) if x != "validate")
            is_left = rest[:1] == ["validate"]
            assert (ended[: last + 1] if is_left else ended) + rest == straight, batch
            assert differs == 0, batch


def test_a_rank_that_waits_for_its_next_batch_ends_with_those_that_are_in_it(rank_pool, tmp_path):
    """It would end at once, and the others would wait for it for a minute."""
    results = rank_pool.run(runs.while_a_rank_waits, 2, case_of(2), str(tmp_path), timeout=50)
    assert results[0] == results[1]
    for how, order in results:
        assert how == "SystemExit"
        assert order.count("hook") == 4  # the batch that it comes before, and one to tell the other


@pytest.mark.parametrize("world", [1, 2])
def test_a_handler_that_returns_is_called_once(rank_pool, tmp_path, world):
    results = rank_pool.run(runs.with_a_handler_that_returns, world, case_of(world), str(tmp_path))
    assert results == [("nothing", runs.BATCHES * runs.EPOCHS, 1)] * world


def test_it_works_after_an_error_in_an_errors_handling(rank_pool, tmp_path):
    """Lightning tears nothing down then, so that the run's handlers are still there."""
    arguments = case_of(1), str(tmp_path)
    results = rank_pool.run(runs.after_an_error_in_an_errors_handling, 1, *arguments)
    assert results == [("second", "KeyboardInterrupt")]


@pytest.mark.parametrize("world", [1, 2])
def test_it_need_not_be_said(rank_pool, tmp_path, world):
    results = rank_pool.run(runs.without_a_screen, world, case_of(world), str(tmp_path))
    assert results == [("SystemExit", 2 + world)] * world


class Asking(Dataset[bool]):
    """Says whether Ctrl-C is ignored in the process that reads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> bool:
        return signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("training", [True, False])
def test_workers_leave_it_to_their_rank(training):
    fit_loop = mock.MagicMock()
    fit_loop.epoch_progress.current.processed = 0
    trainer = SimpleNamespace(training=training, fit_loop=fit_loop)
    loader = DataLoader(Asking(), batch_size=None, num_workers=1)
    assert list(resumable(loader, trainer)) == [True] * 4
    assert not Asking()[0]


def test_what_workers_do_when_they_begin():
    begun = []
    loader = DataLoader([1, 2], num_workers=1, worker_init_fn=begun.append)
    assert leave_interrupts_to_ranks(loader) is loader
    once = loader.worker_init_fn
    assert isinstance(once, WithoutInterrupts)
    assert leave_interrupts_to_ranks(loader).worker_init_fn is once
    assert leave_interrupts_to_ranks(DataLoader([1, 2])).worker_init_fn is None
    assert leave_interrupts_to_ranks(begun) is begun
