"""Finds out where the other ranks are when one waits for them too long.

Nothing is sent while a run is healthy. A thread of each rank looks once a second whether another
rank has given up, and then reports through the process group's store what its own main thread is
doing. It uses a separate connection, as a wait on the store blocks everyone who shares one.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from lightning_fastmoe.distributed import PendingExchange
from lightning_fastmoe.strategy.watchdog.sentry import HANG_STATUS

_POLL = 1.0
_STILL = 15.0
"""Seconds in one place after which a rank reports that it is waiting there."""
_ANSWERS = 4.0
"""Seconds that a rank which gives up waits for the others' answers."""
_FREED = 30.0
"""Seconds within which an error must wake a main thread that waits for a rank that gave up."""
_TORCH = str(Path(torch.__file__).parent)
_COLLECTIVES = str(Path(dist.__file__).parent / "distributed_c10d.py")
_GLOO = "/gloo/transport/"
"""In errors of its connections: the file that raised them."""
_OWN = str(Path(__file__).parents[2])


class Peers:
    """The other ranks of a run, reached through the store of the process group.

    Args:
        doing: returns a short description of what this rank is doing.
        exchange: the record of this rank's exchanges.
    """

    def __init__(self, doing: Callable[[], str], exchange: PendingExchange) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._doing, self._exchange = doing, exchange
        default: Any = dist.distributed_c10d._get_default_store()
        default = default.clone()
        # Ranks start the same runs in the same order, so each can number them itself.
        run = default.add(f"fastmoe/runs/{self.rank}", 1)
        self._store = PrefixStore(f"fastmoe/peers/{run}", default)
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._over = False
        self._failure: str | None = None
        self._report: str | None = None
        self._place: str | None = None
        self._collective: str | None = None
        self._since = 0.0
        self._beats = 0
        self._seen: list[str] = []
        self._next_look = 0.0
        self._thread = threading.Thread(target=self._listen, name="fastmoe-peers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    # -------------------------------------------------------------------------- of the main thread

    def failure(self) -> str | None:
        """The report of the rank that gave up, with where all ranks were; None if none did."""
        if self._failure is None:
            self._notice()
        if self._failure is None:
            return None
        if self._report is None:
            self._report = self._read("report", _ANSWERS)
        return self._report or self._failure

    @contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """Says meanwhile that this rank waits for the others, outside of torch's functions.

        Args:
            where: which.
        """
        self._collective = where
        try:
            yield
        finally:
            self._collective = None

    @property
    def has_failed(self) -> bool:
        """Whether any rank has given up, as far as this one knows."""
        return self._failure is not None

    def hopeless(self) -> str | None:
        """The reason why this rank's pending exchange can never finish, or None."""
        if self._failure is not None:
            return self.failure()
        if not self._all_wait():
            return None
        where = self._collective or "an exchange of tokens"
        return self.give_up(
            f"rank {self.rank} waits in {where} that can never finish: all ranks are waiting, some"
            " elsewhere or in different exchanges. All ranks must run the same MoE layers in the"
            " same order."
        )

    def give_up(self, reason: str) -> str:
        """Tells the others that this rank gives up; returns ``reason`` and where each rank is."""
        self._over = True
        self._failure = reason
        try:
            self._store.set("failure", reason)
            self._store.set(f"at/{self.rank}", self._here())
            report = f"{reason}\n{self._where_all_are()}"
            self._report = report
            self._store.set("report", report)
        except RuntimeError as error:  # the store is gone, with the rank that held it
            return f"{reason}\nThe other ranks can't be reached: {error}"
        return report

    def leave(self, reason: str) -> None:
        """Tells the other ranks that this one leaves the run, unless one has done so before."""
        self._over = True
        try:
            if self._failure is None and not self._store.check(["failure"]):
                self._failure = reason
                self._store.set("failure", reason)
                self._store.set("report", reason)
        except RuntimeError:
            pass  # the store is gone, and the other ranks with it

    def _where_all_are(self) -> str:
        keys = [f"at/{rank}" for rank in range(self.size)]
        end = time.monotonic() + _ANSWERS
        while not (complete := self._store.check(keys)) and time.monotonic() < end:
            time.sleep(0.1)
        at: dict[str, list[int]] = {}
        for rank, key in enumerate(keys):
            there = complete or self._store.check([key])
            said = self._store.get(key).decode() if there else "does not answer"
            at.setdefault(said, []).append(rank)
        rows = sorted(at.items(), key=lambda item: len(item[1]))
        return "\n".join(f"  {_ranks(ranks)}: {said}" for said, ranks in rows)

    def _all_wait(self) -> bool:
        """Whether all ranks are stuck, and not in the same exchange.

        Some may be in another collective, or in the exchange with the same number but of another
        layer: over NCCL, ranks of which one has left out a layer under ZeRO 3 gather different
        parameters before that exchange, which never end, and then wait in it.

        A waiting rank keeps incrementing a counter next to its place. If the place changes, the
        rank has moved on; if the counter doesn't, its process is stopped. Neither counts as stuck.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + 3 * _POLL
        keys = [f"waits/{rank}" for rank in range(self.size)]
        try:
            rows = (
                [row.decode() for row in self._store.multi_get(keys)]
                if self._store.check(keys)
                else []
            )
        except RuntimeError:
            return False
        before, self._seen = self._seen, rows
        if not rows or len(before) != len(rows):
            return False
        still = all(
            new.split(" ", 1)[1] == old.split(" ", 1)[1] and new != old
            for new, old in zip(rows, before, strict=True)
        )
        places = [row.split(" ", 1)[1] for row in rows]
        return still and not _may_be_one_exchange(places)

    # --------------------------------------------------------------------------- of its own thread

    def _listen(self) -> None:
        try:
            while not self._stop.wait(_POLL):
                if self._failure is None:
                    self._notice()
                if self._failure is not None and not self._over:
                    self._store.set(f"at/{self.rank}", self._here())
                    # Read it now: the rank that holds the store may exit next.
                    self._report = self._read("report", _ANSWERS)
                    self._see_to_the_end()
                    return
                self._say_if_waiting()
        except RuntimeError:
            return  # the store is gone, with the rank that held it

    def _notice(self) -> None:
        if self._store.check(["failure"]):
            self._failure = self._store.get("failure").decode()

    def _read(self, key: str, seconds: float) -> str | None:
        end = time.monotonic() + seconds
        try:
            while not self._store.check([key]):
                if time.monotonic() > end:
                    return None
                time.sleep(0.1)
            return self._store.get(key).decode()
        except RuntimeError:
            return None

    def _say_if_waiting(self) -> None:
        place = self._waits_at()
        now = time.monotonic()
        if place is None or place != self._place:
            self._place, self._since = place, now
        elif now - self._since >= _STILL:
            self._beats += 1
            self._store.set(f"waits/{self.rank}", f"{self._beats} {place}")

    def _waits_at(self) -> str | None:
        number, pending, name = self._exchange.read()
        if pending:
            return f"in exchange {number} {name}"
        if (collective := self._collective) is not None:
            return f"in {collective}"
        frame = self._frame()
        while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
            if frame.f_code.co_filename == _COLLECTIVES:
                return f"in collective {id(frame)}"
            frame = frame.f_back
        return None

    def _here(self) -> str:
        number, pending, name = self._exchange.read()
        if pending:
            tokens = f"waits in exchange of tokens number {number}: {name}"
        elif number:
            tokens = f"no exchange of tokens is pending, the last was number {number}: {name}"
        else:
            tokens = "no exchange of tokens so far"
        return f"{self._doing()}; {tokens}; {_stack(self._frame())}"

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main)

    def _see_to_the_end(self) -> None:
        """Ends this process if it keeps waiting for the rank that gave up.

        Nothing else interrupts an NCCL collective: the remaining ranks would wait until NCCL's
        watchdog or the sentry ends them.
        """
        if self._stop.wait(_FREED) or self._over:
            return
        report = self._read("report", 0.0) or self._failure
        text = (
            f"\nlightning_fastmoe, rank {self.rank}: another rank has given up, and this one is"
            f" still blocked.\n{report}\nThis process ends with status"
            f" {HANG_STATUS}.\n"
        )
        os.write(2, text.encode())
        faulthandler.dump_traceback(2, all_threads=True)
        os._exit(HANG_STATUS)


def _may_be_one_exchange(places: list[str]) -> bool:
    """Whether ranks that wait at these places may be in the same exchange, however slow.

    Expert parallel groups exchange on their own, so numbers may differ; the layer at a number may
    not.
    """
    if not all(place.startswith("in exchange ") for place in places):
        return False
    layers: dict[str, str] = {}
    for place in places:
        number, name = place.removeprefix("in exchange ").split(" ", 1)
        layer = name.partition(", phase")[0]
        if layers.setdefault(number, layer) != layer:
            return False
    return True


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error is a failed collective, as when another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    file = frame.tb_frame.f_code.co_filename if frame is not None else ""
    # Whoever waits for an asynchronous collective calls no function of torch's.
    return type(error) is RuntimeError and (file == _COLLECTIVES or _GLOO in str(error))


def _stack(frame: FrameType | None) -> str:
    """The innermost function outside of torch and this package, and the user's callers of it."""
    at: list[str] = []
    while frame is not None and len(at) < 3:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        is_users = "site-packages" not in file and not file.startswith((sys.base_prefix, "<"))
        if not file.startswith((_TORCH, _OWN)) and (is_users or not at) and function != "<module>":
            at.append(f"{function} ({Path(file).name}:{frame.f_lineno})")
        frame = frame.f_back
    return "in " + ", called from ".join(at or ["an unknown place"])


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:16]))
    return f"ranks {shown}, ..." if len(ranks) > 16 else f"ranks {shown}"
