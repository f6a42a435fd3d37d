"""Collective error handling: if one rank fails to save or load, all ranks raise."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_fastmoe.errors import CheckpointError


class Together:
    """Keeps ranks in step through the stages of a save or a load.

    Args:
        path: the path of the checkpoint, for messages.
        doing: "saved" or "loaded", for messages.
        group: the ranks; None is the world. A background thread needs a group of its own.
    """

    def __init__(self, path: Path, doing: str, group: Any = None) -> None:
        self.path, self.doing, self.group = path, doing, group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    @contextmanager
    def stage(self) -> Iterator[None]:
        """An error on one rank inside is raised on all ranks at the end.

        The code inside must not wait for other ranks.

        Raises:
            CheckpointError: on every rank, naming the ranks that failed and why.
        """
        own: BaseException | None = None
        try:
            yield
        except BaseException as error:  # even an interrupt: the other ranks must hear of it
            own = error
        self.agree(own)

    def agree(self, own: BaseException | None) -> None:
        """Raises on all ranks if any rank passes an error."""
        message = None if own is None else self._describe(own)
        messages = self.gather(message)
        if own is not None and not isinstance(own, Exception):
            raise own
        failed = {rank: text for rank, text in enumerate(messages) if text is not None}
        if failed:
            raise CheckpointError(self._compose(failed)) from own

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order; small things only."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def ranks_on_host(self) -> int:
        """Number of ranks on this rank's machine; all ranks must call this."""
        own = socket.gethostname()
        return self.gather(own).count(own)

    def _describe(self, error: BaseException) -> str:
        if isinstance(error, CheckpointError):
            return str(error)
        if isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename else ""
            return f"{error.strerror or error}{where}."
        return f"{type(error).__name__}: {error}"

    def _compose(self, failed: dict[int, str]) -> str:
        different = dict.fromkeys(failed.values())
        if len(failed) == self.world_size and len(different) == 1:
            return next(iter(different))
        rank, text = next(iter(failed.items()))
        ranks = ", ".join(str(r) for r in failed)
        who = f"rank {ranks}" if len(failed) == 1 else f"ranks {ranks}"
        return f"{self.path} could not be {self.doing}: {who} failed. Rank {rank}: {text}"


_MEET, _GIVE_UP = b"meet", b"give up"


def meet_after_error(path: Path, step: int, number: int = 0, seconds: float = 60.0) -> None:
    """Waits for all ranks through the store, since other ranks may be inside a collective.

    An error may stop only some of the ranks. Those that save because of it would wait for the
    others forever.

    Args:
        path: the path to save to. Its name may differ between ranks, as logged values do.
        step: the training step.
        number: how many saves have called this before; identical on every rank.
        seconds: how long to wait.

    Raises:
        CheckpointError: if some rank does not arrive in time; on all that do, at any time.
    """
    store = dist.distributed_c10d._get_default_store()
    key = f"fastmoe-after-error/{step}/{number}/{path.parent}"
    world_size, decision = dist.get_world_size(), f"{key}/decision"
    here, deadline = 0, time.monotonic() + seconds

    def decide(wanted: bytes) -> bytes:
        """The first rank's decision counts: nobody saves alone with those who have given up."""
        found: bytes = store.compare_set(decision, "", wanted.decode())
        return found

    try:
        here = store.add(key, 1)
        while here < world_size and time.monotonic() <= deadline:
            time.sleep(0.02)
            here = store.add(key, 0)
        if decide(_MEET if here >= world_size else _GIVE_UP) == _MEET:
            return
    except RuntimeError as error:  # the store is gone, with the rank that held it
        raise CheckpointError(
            f"{path} was not saved after the error: the connection to the other ranks is lost."
        ) from error
    missing = (
        f"{world_size - here} of {world_size} ranks did not arrive within {seconds:g} seconds,"
        " because they did not fail"
        if here < world_size
        else "another rank has given up waiting for this one"
    )
    raise CheckpointError(
        f"{path} was not saved after the error: {missing}. Resume from the previous checkpoint."
    )
