"""Waits on the host, with a deadline, for other ranks in a token exchange."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from lightning_fastmoe.errors import ExchangeError

_BUSY = 2e-3
"""Seconds of polling a CUDA event before the first sleep; most waits are shorter."""
_LOOK = 1.0
"""Seconds between two checks of the other ranks."""
_TOLD = 4.0
"""Seconds within which a rank that has given up says why."""

ADVICE = (
    "Every rank must run the same MoE layers in the same order. To run the model only for rank 0,"
    " for example in a callback, use strategy.on_rank_zero(...); to generate on each rank,"
    " on_each_rank(...). A rank that skips a layer must"
    " take part without tokens, in the backward pass too: x = x + layer(x[:0]).sum(). If a rank is"
    " only late, raise FastMoEStrategy(exchange_timeout=...) or ExpertDataParallel(timeout=...)."
)
LEFT = "has left the run with"
"""In what ranks say of one that has raised an error."""


def advised(text: str) -> str:
    """A message with advice, unless it has the cause: an error that another rank has raised."""
    return text if LEFT in text else f"{text}\n{ADVICE}"


class Peers(Protocol):
    """What a rank can find out about the others without a collective."""

    @property
    def has_failed(self) -> bool:
        """Whether this rank or another has given up; doesn't communicate."""
        ...

    def failure(self) -> str | None:
        """Why another rank has given up, asked of the others now; None if none has."""
        ...

    def hopeless(self) -> str | None:
        """Why this rank's current exchange can no longer complete, or None."""
        ...

    def give_up(self, reason: str) -> str:
        """Tells the other ranks that this one gives up; adds all ranks' states to ``reason``."""
        ...


class ExchangeWait:
    """Waits on the host for the other ranks of an exchange.

    Args:
        seconds: timeout after which the wait is an error; None sets none.
        peers: access to the other ranks' states; None if there is none.
        rank: this process's rank in the world, for messages.
        look: seconds between two looks at the other ranks.
        option: the user's name of ``seconds``, for messages.
    """

    def __init__(
        self,
        seconds: float | None = None,
        peers: Peers | None = None,
        rank: int | None = None,
        look: float = _LOOK,
        option: str = "exchange_timeout",
    ) -> None:
        self.seconds = seconds
        self.peers = peers
        self.rank = rank
        self.look = look
        self.option = option

    def begin(self, where: str) -> None:
        """Called before an exchange; refuses to start one once a rank has given up.

        A collective abandoned by one rank could match another rank's next one, which would then
        continue with wrong data.

        Raises:
            ExchangeError: if a rank has given up.
        """
        if self.peers is not None and self.peers.has_failed:
            raise ExchangeError(advised(f"{where}: {self.peers.hopeless()}"))

    def for_work(self, work: Any, where: str) -> None:
        """Waits for the ``Work`` of a host backend such as gloo.

        Args:
            work: what a collective with ``async_op=True`` returned.
            where: layer, number and phase of the exchange, for messages.

        Raises:
            ExchangeError: at the deadline, or if another rank is gone.
        """
        begin = time.monotonic()
        while True:
            try:
                work.wait(timedelta(seconds=self._slice(time.monotonic() - begin)))
                return
            except RuntimeError:  # the end of the slice, or what the collective failed with
                if work.is_completed():
                    break
            waited = time.monotonic() - begin
            self._look(waited, where, self.seconds is not None and waited >= self.seconds)
        # It may have completed only after the slice had ended: a second wait, which no longer takes
        # time, tells that from a failure.
        try:
            work.wait(timedelta(seconds=self.look))
        except RuntimeError as error:
            raise ExchangeError(self._failed(where, error)) from error

    def for_event(
        self,
        event: Any,
        where: str,
        sleep: Callable[[float], None] = time.sleep,
        seconds: float | None = None,
    ) -> None:
        """Waits until the device has reached a CUDA event.

        NCCL's ``Work.wait(timeout)`` polls too coarsely, and synchronising has no deadline.

        Args:
            event: the event; anything with ``query()``.
            where: layer, number and phase of the exchange, for messages.
            sleep: yields the CPU and the GIL to other threads.
            seconds: another deadline; None is the usual one.

        Raises:
            ExchangeError: at the deadline, or if another rank is gone.
        """
        if event.query():
            return
        begin = time.monotonic()
        look = self.look
        seconds = self.seconds if seconds is None else seconds
        while not event.query():
            waited = time.monotonic() - begin
            # Polling overshoots by at most a sixteenth of the wait.
            sleep(0.0 if waited < _BUSY else min(1e-3, waited / 16))
            is_late = seconds is not None and waited >= seconds
            if waited >= look or is_late:
                look = waited + self.look
                self._look(waited, where, is_late)

    def ended(self, where: str, reason: str, *, late: bool = False, told: bool = False) -> str:
        """What to say of a wait that ended because of other ranks' flags.

        Tells the others, unless one of them has given up before; either may take some seconds.

        Args:
            where: layer, number and phase of the exchange.
            reason: what the flags say.
            late: whether they were waited for until the deadline.
            told: whether other ranks have given up, and so may say why.
        """
        told = told or (self.peers is not None and self.peers.has_failed)
        if late and not told and self.seconds is not None:
            return f"{self._late(self.seconds, where, reason)}\n{ADVICE}"
        text = f"{where}: {reason}"
        if self.peers is None:
            return text if told else f"{text}\n{ADVICE}"
        text = f"{text}\n{self._told()}" if told else self.peers.give_up(text)
        return advised(text)

    def _slice(self, waited: float) -> float:
        left = self.look if self.seconds is None else self.seconds - waited
        return max(1e-3, min(self.look, left))

    def _look(self, waited: float, where: str, is_late: bool) -> None:
        reason = self.peers.hopeless() if self.peers is not None else None
        if reason is not None:
            raise ExchangeError(advised(f"{where}: {reason}"))
        if is_late:
            raise ExchangeError(f"{self._late(waited, where)}\n{ADVICE}")

    def _late(self, waited: float, where: str, *details: str) -> str:
        """Gives up at the deadline; returns what there is to say."""
        first = (
            f"{where}: rank {self.rank} has waited {waited:.3g} s for the other ranks"
            f" ({self.option}={self.seconds:g})."
        )
        reason = " ".join([first, *details])
        return reason if self.peers is None else self.peers.give_up(reason)

    def _told(self) -> str:
        """Why another rank has given up, for which it has some time to say so."""
        assert self.peers is not None
        end = time.monotonic() + _TOLD
        found = None
        try:
            while (found := self.peers.failure()) is None and time.monotonic() < end:
                time.sleep(0.05)
        except RuntimeError:
            pass  # the store is gone, with the rank that held it
        return "No reason was given." if found is None else found

    def _failed(self, where: str, error: RuntimeError) -> str:
        # Whoever closed the connection may have said why a moment ago.
        reason = self.peers.failure() if self.peers is not None else None
        text = f"{where}: the exchange failed on rank {self.rank}: {error}"
        return text if reason is None else f"{text}\n{reason}"
