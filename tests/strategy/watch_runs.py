"""Ranks that stand still or get SIGTERM, each a process that ends. Run by test_watch.py.

One process imports everything once and forks the ranks of all trials, which run side by side. Their
limits of time begin when they train, however long the set-up of so many ranks takes.
Prints a line of JSON: for each trial, what became of its ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from strategy.models import Case, Net, RankBatches, make_batches
from strategy.tracing import make_trainer
from torch.distributed import TCPStore
from torch.utils.data import DataLoader

from lightning_fastmoe.distributed import ExchangeWait
from lightning_fastmoe.testing import ranks

LIMIT = 60.0
"""Seconds after which a rank prints its stacks and is killed, and its trial has failed."""
NEVER = 1000
STUCK_IN_BATCH = 2


def lock_twice(library: Any) -> None:
    """Stays inside C, whatever signal comes."""
    mutex = ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def stand_still() -> None:
    lock_twice(ctypes.CDLL(None))


def stand_still_with_the_gil() -> None:
    lock_twice(ctypes.PyDLL(None))


@dataclass
class Trial:
    """What happens.

    Attributes:
        world: number of ranks.
        limits: (hang_timeout, signal_grace).
        stuck: what the last rank does in the middle of a batch.
        in_exchange: whether it does so where it should send tokens.
        signals: (seconds after all ranks are in a batch, signal), sent to all ranks if one is
            stuck, else to the last one.
        launches: whether rank 0 has launched a process.
    """

    world: int
    limits: tuple[float | None, float | None]
    stuck: Callable[[], None] | None = None
    in_exchange: bool = False
    signals: list[tuple[float, int]] = field(default_factory=list)
    launches: bool = False


HANG, TERM, PATIENT = (3.0, None), (None, 1.5), (600.0, 600.0)
TRIALS = {
    "hang": Trial(2, HANG, stand_still, launches=True),
    "hang with the GIL": Trial(2, HANG, stand_still_with_the_gil, in_exchange=True),
    "SIGTERM": Trial(2, TERM, stand_still, signals=[(0.0, signal.SIGTERM)]),
    "SIGTERM with the GIL": Trial(
        1, TERM, stand_still_with_the_gil, signals=[(0.0, signal.SIGTERM)]
    ),
    "two SIGTERMs": Trial(
        1,
        PATIENT,
        stand_still,
        signals=[(0.0, signal.SIGTERM), (0.1, signal.SIGTERM), (2.5, signal.SIGTERM)],
    ),
    "two SIGINTs": Trial(
        1,
        PATIENT,
        stand_still,
        signals=[(0.0, signal.SIGINT), (2.5, signal.SIGINT)],
    ),
    "obeyed by one": Trial(1, PATIENT, signals=[(0.0, signal.SIGTERM)]),
    "obeyed by two": Trial(2, PATIENT, signals=[(0.0, signal.SIGTERM)], launches=True),
}


def set_limits(strategy: Any, limits: tuple[float | None, float | None]) -> None:
    """Watches with other limits from now on."""
    watch = strategy._watch
    watch.stop()
    watch._limits = limits
    watch.start(
        strategy.global_rank, strategy.root_device, [p.pid for p in strategy.launcher.procs]
    )
    sharder = strategy._groups.sharder
    strategy._waits.end(sharder)  # its thread reads the memory of the watch that has stopped
    sharder.record_exchanges(watch.exchanges(), ExchangeWait())


class Stuck(Net):
    """Runs many slow batches, and stands still in one of them if the trial says so."""

    def __init__(self, case: Case, trial: Trial, directory: Path) -> None:
        super().__init__(case)
        self.trial, self.directory = trial, directory

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.05)
        rank = dist.get_rank()
        if batch_idx == STUCK_IN_BATCH - 1:
            set_limits(self.trainer.strategy, self.trial.limits)
        if batch_idx == STUCK_IN_BATCH:
            (self.directory / f"in_batch_{rank}").touch()
            if self.trial.stuck is not None and rank == self.trial.world - 1:
                if self.trial.in_exchange:
                    dist.all_to_all_single = lambda *_, **__: self.trial.stuck()
                else:
                    self.trial.stuck()
        return super().training_step(batch, batch_idx)


def fit(trial: Trial, directory: Path) -> None:
    """What a rank does."""
    case = Case(trial.world, trial.world, steps=100)
    keep = ModelCheckpoint(directory, save_last=True, save_on_exception=True, every_n_epochs=100)
    trainer = make_trainer(case, callbacks=[keep], enable_checkpointing=True)
    if trial.launches and trainer.global_rank == 0:
        process = subprocess.Popen(["sleep", str(NEVER)])  # noqa: S607
        trainer.strategy.launcher.procs.append(process)
        (directory / "launched").write_text(str(process.pid))
    trainer.fit(Stuck(case, trial, directory))


@dataclass
class Child:
    """A rank that was forked, and waits for the port of its store."""

    pid: int
    pipe: int

    def send(self, port: int) -> None:
        os.write(self.pipe, str(port).encode())
        os.close(self.pipe)


def fork(trial: Trial, rank: int, directory: Path) -> Child:
    """Starts a rank; it leaves as the interpreter would, with all that it prints in a file.

    All ranks are forked before there is a store: a store has threads, and a lock that one of them
    holds during a fork is never released in the child.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        return Child(pid, write)
    status = 1
    try:
        signal.alarm(int(2 * LIMIT))  # should nobody else end it
        output = os.open(directory / f"output_{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.register(signal.SIGUSR1, sys.__stderr__.fileno(), all_threads=True)
        ranks._enter(rank, trial.world, trial.world, int(os.read(read, 16)))
        fit(trial, directory)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:  # noqa: BLE001  the interpreter would print it
        os.write(2, repr(error).encode())
    finally:
        os._exit(status)


@dataclass
class Running:
    """A trial that goes on.

    Attributes:
        began: when its ranks had all come to the batch.
        ended: rank -> (exit status, negative for a signal; seconds since then).
    """

    name: str
    directory: Path
    store: Any
    pids: list[int]
    signals: list[tuple[float, int]]
    signalled: list[int]
    began: float | None = None
    ended: dict[int, tuple[int, float]] = field(default_factory=dict)

    def step(self, now: float) -> None:
        """Sends signals that are due, and notes ranks that have ended."""
        if self.began is None and len(list(self.directory.glob("in_batch_*"))) == len(self.pids):
            self.began = now
        while self.began is not None and self.signals and now - self.began > self.signals[0][0]:
            number = self.signals.pop(0)[1]
            for rank in self.signalled:
                if rank not in self.ended:
                    os.kill(self.pids[rank], number)
        for rank, pid in enumerate(self.pids):
            if rank not in self.ended:
                gone, status = os.waitpid(pid, os.WNOHANG)
                if gone:
                    since = now - (self.began or now)
                    self.ended[rank] = (os.waitstatus_to_exitcode(status), since)

    def report(self) -> dict[str, Any]:
        """What became of the ranks."""
        launched = self.directory / "launched"
        pid = int(launched.read_text()) if launched.exists() else 0
        launched_lives = pid > 0 and lives(pid)
        if launched_lives:
            os.kill(pid, signal.SIGKILL)
        return {
            "status": [self.ended[rank][0] for rank in range(len(self.pids))],
            "seconds": [self.ended[rank][1] for rank in range(len(self.pids))],
            "output": [
                (self.directory / f"output_{rank}").read_text() for rank in range(len(self.pids))
            ],
            "saved": (self.directory / "last.ckpt").exists(),
            "launched_lives": launched_lives,
        }


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descriptors() -> set[tuple[str, str]]:
    """The open descriptors of this process, and what they are."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def left() -> list[str]:
    """What of a watch is in this process: memory, thread, process, or its places in signals."""
    found = [t.name for t in threading.enumerate() if t.name == "fastmoe-watch"]
    if "lightning_fastmoe_watch" in Path("/proc/self/maps").read_text():
        found.append("memory")
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            if b"sentry.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append("process")
    wakeup = signal.set_wakeup_fd(-1)
    if wakeup != -1:
        signal.set_wakeup_fd(wakeup)
        found.append("wakeup")
    return found


def there() -> int:
    """How much of a watch is in this process; all four once its process has a command line.

    On a busy machine that may come a while after its parent goes on.
    """
    until = time.monotonic() + 10
    while len(left()) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    return len(left())


class Failing(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert there() == 4
        raise ZeroDivisionError("a bug")


def left_after_runs(case: Case) -> dict[str, list[str]]:
    """What is left of the watch after each of several runs."""
    found = {}
    module, trainer = Net(case), make_trainer(case)
    trainer.fit(module)
    found["fit"] = left()
    with contextlib.suppress(ZeroDivisionError):
        make_trainer(case).fit(Failing(case))
    found["failed fit"] = left()
    loader = DataLoader(RankBatches(make_batches(case)[0, 0]), batch_size=None)
    Evaluated.seen = []
    make_trainer(case).validate(Evaluated(case), loader, verbose=False)
    assert Evaluated.seen == [4] * len(loader)
    found["validate"] = left()
    trainer = make_trainer(case)
    trainer.fit(Net(case))
    found["fit again"] = left()
    return found


class Evaluated(Net):
    """Looks for the watch in each batch of a validation, which takes its time."""

    seen: ClassVar[list[int]] = []
    seconds = 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)
        self.seen.append(there())
        self.net["moes"][0](self.net["norm"](self.net["embed"](batch)))


class Terminated(Evaluated):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated_while_validating(case: Case) -> tuple[Any, int]:
    """(the exit status, batches that were done)."""
    Evaluated.seen = []
    batches = make_batches(case)[0, 0].expand(10, -1, -1, -1)
    loader = DataLoader(RankBatches(batches), batch_size=None)
    try:
        make_trainer(case).validate(Terminated(case), loader, verbose=False)
    except SystemExit as error:
        return error.code, len(Evaluated.seen)
    return None, len(Evaluated.seen)


VALIDATION_BATCHES, VALIDATION_LIMIT = 30, 1.2


class ImpatientValidation(pl.Callback):
    """Gives the watch a short limit, but not to the set-up of a run, which takes what it takes."""

    began = 0.0

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        set_limits(trainer.strategy, (VALIDATION_LIMIT, None))
        self.began = time.monotonic()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.monotonic() - self.began
        trainer.strategy._watch.stop()


def long_validation(case: Case) -> tuple[float, int]:
    """(seconds, batches) of a validation that is longer than ``hang_timeout``."""
    Evaluated.seen, Evaluated.seconds = [], 0.1
    batches = make_batches(case)[0, 0].expand(VALIDATION_BATCHES, -1, -1, -1)
    loader = DataLoader(RankBatches(batches), batch_size=None)
    impatient = ImpatientValidation()
    trainer = make_trainer(case, num_sanity_val_steps=0, callbacks=[impatient])
    trainer.fit(Evaluated(case), val_dataloaders=loader)
    return impatient.seconds, len(Evaluated.seen)


def start(number: int, name: str, directory: Path) -> tuple[str, Path, list[Child]]:
    """Forks the ranks of a trial."""
    folder = directory / str(number)
    folder.mkdir()
    trial = TRIALS[name]
    return name, folder, [fork(trial, rank, folder) for rank in range(trial.world)]


def release(name: str, folder: Path, children: list[Child]) -> Running:
    """Lets the ranks of a trial go on, with a store."""
    trial = TRIALS[name]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for child in children:
        child.send(store.port)
    everyone = list(range(trial.world))
    signalled = everyone if trial.stuck is not None else everyone[-1:]
    pids = [child.pid for child in children]
    return Running(name, folder, store, pids, list(trial.signals), signalled)


def main(directory: Path) -> None:
    """Runs all trials."""
    forked = [start(number, name, directory) for number, name in enumerate(TRIALS)]
    running = [release(*trial) for trial in forked]
    deadline = time.monotonic() + LIMIT
    while any(len(trial.ended) < len(trial.pids) for trial in running):
        now = time.monotonic()
        for trial in running:
            trial.step(now)
        if now > deadline:
            late = [
                pid
                for trial in running
                for rank, pid in enumerate(trial.pids)
                if rank not in trial.ended
            ]
            for number in (signal.SIGUSR1, signal.SIGKILL):
                for pid in late:
                    os.kill(pid, number)
                time.sleep(1.0)
        time.sleep(0.02)
    print(json.dumps({trial.name: trial.report() for trial in running}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
