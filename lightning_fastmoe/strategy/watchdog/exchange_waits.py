"""Deadlines of a run's token exchanges; an error on one rank ends the run on all."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_fastmoe.distributed import ExchangeWait, ExpertSharder, PendingExchange
from lightning_fastmoe.distributed.dispatch.waiting import LEFT, advised
from lightning_fastmoe.errors import ExchangeError
from lightning_fastmoe.strategy.watchdog.peers import Peers, is_broken_connection
from lightning_fastmoe.strategy.watchdog.watch import Watch


class ExchangeWaits:
    """Limits how long ranks wait for each other in exchanges; one object per strategy.

    "auto" is long because a rank may legitimately be minutes late: slow data, its first
    compilation, or a file that only it writes. ``hang_timeout`` tolerates all of this, and so must
    the deadline; it comes a tenth earlier, so that its more precise report is printed first. Ranks
    that deadlock, in an exchange and in a gloo collective, are detected within half a minute.

    Args:
        seconds: how long a rank waits for the others in an exchange; None means no limit, "auto"
            nine tenths of ``hang_timeout``.
        hang_timeout: the run's ``hang_timeout``.
    """

    def __init__(self, seconds: float | Literal["auto"] | None, hang_timeout: float | None) -> None:
        if seconds == "auto":
            seconds = None if hang_timeout is None else 0.9 * hang_timeout
        self.seconds = seconds
        self._peers: Peers | None = None
        self._sharder: ExpertSharder | None = None
        self._broken: tuple[str, BaseException] | None = None

    def begin(self, sharder: ExpertSharder, watch: Watch) -> None:
        """Limits and records all of this rank's exchanges from now on; every rank calls this."""
        pending = watch.exchanges()
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if size > 1 and self._peers is None:
            self._peers = Peers(watch.doing, pending)
        sharder.record_exchanges(pending, ExchangeWait(self.seconds, self._peers, rank))
        self._sharder = sharder

    def for_work(self, work: Any, where: str) -> None:
        """Waits for a collective of gloo that is no exchange; ``hang_timeout`` is its deadline.

        Raises:
            ExchangeError: if another rank gave up, with what that rank said.
        """
        peers = self._peers
        if peers is None:
            work.wait()
            return
        with peers.waiting(where):
            ExchangeWait(None, peers, peers.rank).for_work(work, where)

    def leave(self, exception: BaseException) -> None:
        """Tells the other ranks about an error here, so that none waits for this one."""
        peers = self._peers
        if peers is None or isinstance(exception, SIGTERMException):  # all ranks end there
            return
        try:
            if is_broken_connection(exception) and (failure := peers.failure()) is not None:
                self._broken = failure, exception
            kind = type(exception).__name__
            peers.leave(f"rank {peers.rank} {LEFT} {kind}: {exception}")
        except RuntimeError:
            pass  # the store is gone, with the rank that held it
        finally:
            if self._sharder is not None:  # now: whoever sees that looks for what was said above
                self._sharder.give_up()

    def end(self, sharder: ExpertSharder | None) -> None:
        """Undoes :meth:`begin`."""
        self._sharder = None
        if sharder is not None:
            sharder.record_exchanges(PendingExchange(), ExchangeWait())
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.stop()

    def raise_for_peer(self, module: pl.LightningModule | None) -> None:
        """Raises the real cause if a connection broke because another rank gave up; called last.

        Raises:
            ExchangeError: if another rank gave up, and this one lost the connection to it.
        """
        broken, self._broken = self._broken, None
        if broken is None:
            return
        assert module is not None
        trainer: Any = module.trainer
        # The error skips the rest of the Trainer's teardown, so do it here.
        if (loop := trainer._active_loop) is not None:
            loop.teardown()
        trainer._logger_connector.teardown()
        trainer._signal_connector.teardown()
        trainer.state.stage = None
        raise ExchangeError(advised(f"rank {dist.get_rank()}: {broken[0]}")) from broken[1]
