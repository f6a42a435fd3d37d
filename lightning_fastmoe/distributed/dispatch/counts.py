"""Exchanges token counts per expert between ranks, and checks them before tokens are sent.

Every rank of the expert parallel group gets every rank's counts, so all see the same table and
reach the same verdict: on an error all of them raise it, and none is left waiting for tokens.
(`all_to_all_single` itself doesn't raise when the two sides disagree about a size.)
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lightning_fastmoe.distributed.dispatch.pending import PendingExchange
from lightning_fastmoe.distributed.dispatch.waiting import ExchangeWait
from lightning_fastmoe.distributed.nodes import NodeGroups
from lightning_fastmoe.errors import ExchangeError
from lightning_fastmoe.ops.exchange_counts import HEADER, MAGIC, factors, pack

MISMATCH = (
    "Every rank must run the same MoE layers in the same order in each step: make the forward pass"
    " independent of the data, and run the model for rank 0 alone with"
    " strategy.on_rank_zero(function). A rank that repeats a pass after an error, of memory for"
    " example, is in another exchange, too."
)


class ExpertGroup:
    """The expert parallel group as dispatchers see it; one object for all layers of a model.

    Attributes:
        group: the process group, R ranks.
        nodes: its parts within and between nodes; None if there are no two levels.
        rank: this rank's number in it.
        size: R.
        slots: the largest ``num_experts`` of the model. All count vectors have this length, so that
            ranks in different layers can detect it.
        pending: the record of this rank's current exchange.
        wait: how the host waits for the other ranks.
        is_on_stream: whether exchanges are enqueued on the device without blocking the host.
        shared: what all schedules of the group share, by its class.
        other_way: exchanges counts, or returns None where it can't, in place of a collective. A
            schedule that sends its own counts otherwise sets it on all ranks, so that they meet
            those of a rank that is elsewhere, and both see that.
        on_giving_up: called when this rank leaves the run, so that no kernel waits for it.
    """

    def __init__(self, group: dist.ProcessGroup, nodes: NodeGroups | None = None) -> None:
        self.group, self.nodes = group, nodes
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.slots = 0
        self.pending = PendingExchange()
        self.wait = ExchangeWait()
        self.shared: dict[type, Any] = {}
        self.other_way: Callable[[Tensor, int, str], Tensor | None] | None = None
        self.on_giving_up: list[Callable[[], None]] = []
        self._sequence = 0
        self.is_on_stream = "nccl" in dist.get_backend(group)
        self._pinned: Tensor | None = None

    def give_up(self) -> None:
        """Tells the other ranks' kernels that this rank leaves the run."""
        for call in self.on_giving_up:
            call()

    def exchange_counts(self, counts: Tensor, width: int, layer: str) -> Tensor:
        """Gathers ``tokens_per_expert`` of all ranks of the group.

        Args:
            counts: (E,) int64, this rank's tokens for each expert of the whole layer.
            width: D, the elements of one row.
            layer: the layer's name.

        Returns:
            (R, E) int64 on the CPU. The only host sync of an exchange.

        Raises:
            ExchangeError: on every rank of the group, if the ranks are not in the same exchange of
                the same layer, or if counts arrive corrupted; on this rank, if the others don't
                join before the deadline of :attr:`wait`.
        """
        if self.other_way is not None:
            found = self.other_way(counts, width, layer)
            if found is not None:
                return found
        self._sequence += 1
        vector = pack_counts(counts, self.slots, self._sequence, width, layer)
        table = vector.new_empty((self.size, vector.numel()))
        with self.pending(layer, "counts"):
            self._run(layer, "counts", dist.all_gather, list(table.unbind()), vector)
            on_host = self._read(table, layer)
        return torch.from_numpy(unpack_counts(on_host.numpy(), counts.numel(), layer))

    def run(self, layer: str, phase: str, collective: Callable[..., Any], *args: Any) -> None:
        """Runs a collective of the group; the host waits only if the backend isn't on the device.

        Args:
            layer: the layer's name.
            phase: what is exchanged.
            collective: a function of ``torch.distributed``, or one called like it: with ``group=``,
                it enqueues the exchange on the device; with ``async_op=True`` as well, where the
                host waits, it returns a ``Work``. That is waited for a slice at a time, so a
                ``wait(timeout)`` that runs out must leave it intact. gloo's single sends and
                receives don't: they close the connection.
            args: the collective's arguments, except the group.

        Raises:
            ExchangeError: if the host waits and the others don't join before the deadline.
        """
        with self.pending(layer, phase):
            self._run(layer, phase, collective, *args)

    def start(
        self, layer: str, phase: str, collective: Callable[..., Any], *args: Any
    ) -> Callable[[], None]:
        """Starts a collective of the group, as :meth:`run`, and goes on.

        Returns:
            A function to call before its results are read, once. It waits as :meth:`run` does, and
            raises what :meth:`run` raises.
        """
        with self.pending(layer, phase):
            self.wait.begin(self.where(layer, phase))
            work = collective(*args, group=self.group, async_op=True)

        def finish() -> None:
            with self.pending(layer, phase):
                if self.is_on_stream:
                    work.wait()  # the device does, not the host
                else:
                    self.wait.for_work(work, self.where(layer, phase))

        return finish

    def _run(self, layer: str, phase: str, collective: Callable[..., Any], *args: Any) -> None:
        where = self.where(layer, phase)
        self.wait.begin(where)
        if self.is_on_stream:
            collective(*args, group=self.group)
        else:
            work = collective(*args, group=self.group, async_op=True)
            self.wait.for_work(work, where)

    def _read(self, table: Tensor, layer: str) -> Tensor:
        """Copies ``table`` to the host."""
        if not (self.is_on_stream and table.is_cuda):
            return table.cpu()
        if self._pinned is None or self._pinned.shape != table.shape:
            self._pinned = torch.empty_like(table, device="cpu", pin_memory=True)
        self._pinned.copy_(table, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(table.device))
        try:
            self.wait.for_event(event, self.where(layer, "counts"))
        except BaseException:
            self._pinned = None  # the copy may still be in flight
            raise
        return self._pinned.clone()  # the next exchange overwrites it

    def where(self, layer: str, phase: str) -> str:
        """The current exchange, for messages."""
        return f"{layer}, exchange of tokens number {self.pending.number}, phase {phase}"

    def end_pass(self, device: torch.device) -> None:
        """Ends a forward pass; all ranks call this after it, before waiting for others elsewhere.

        This detects a rank that skipped the last layers while others are still in them.

        Raises:
            ExchangeError: on every rank of the group, if one is still in an exchange of a layer.
        """
        none = torch.zeros(self.slots, dtype=torch.int64, device=device)
        self.exchange_counts(none, 0, "the end of the step")


def header(layer: str, sequence: int, width: int) -> list[int]:
    """What precedes a rank's counts."""
    return [MAGIC, zlib.crc32(layer.encode()), sequence, width]


def pack_counts(counts: Tensor, slots: int, sequence: int, width: int, layer: str) -> Tensor:
    """The vector that a rank sends: header, then counts padded to ``slots``; int64."""
    return pack(counts, slots, header(layer, sequence, width))


def unpack_counts(table: NDArray[np.int64], num_experts: int, layer: str) -> NDArray[np.int64]:
    """Checks the gathered ``table (R, 6 + slots)`` and returns the counts ``(R, E)``.

    With numpy, whose functions take a tenth of the time of torch's on so few numbers.
    """
    head, body = table[:, :HEADER].tolist(), table[:, HEADER:]
    sums, smallest = body.sum(1).tolist(), body.min(1).tolist() if body.shape[1] else []
    codes = (body * _factors(body.shape[1])).sum(1).tolist()
    beyond: list[bool] = np.any(body[:, num_experts:], axis=1).tolist()
    for rank, (magic, layer_hash, sequence, width, total, checksum) in enumerate(head):
        damaged = (
            magic != MAGIC
            or (bool(smallest) and smallest[rank] < 0)
            or sums[rank] != total
            or codes[rank] != checksum
            or beyond[rank]
        )
        ours = layer_hash == zlib.crc32(layer.encode())
        if damaged and ours:
            raise ExchangeError(
                f"{layer}: the token counts of rank {rank} of the expert parallel group arrived"
                f" damaged (sum {sums[rank]}, declared {total}, smallest {smallest[rank]}). No"
                " tokens were exchanged. This points to faulty memory or network: restart from the"
                " last checkpoint, and check that node."
            )
        if [layer_hash, sequence, width] != head[0][1:4]:
            raise ExchangeError(
                f"{layer}: the ranks of the expert parallel group are in different exchanges"
                f" (rank 0 in number {head[0][2]}, rank {rank} in number {sequence}, same"
                f" layer: {layer_hash == head[0][1]}). {MISMATCH}"
            )
    if head[0][1] != zlib.crc32(layer.encode()):
        raise ExchangeError(
            f"{layer}: the whole expert parallel group, this rank's own entry included, arrived as"
            " being in another layer. This points to faulty memory or network: restart from the"
            " last checkpoint, and check that node."
        )
    return body[:, :num_experts]


@functools.cache
def _factors(slots: int) -> NDArray[np.int64]:
    """What :func:`~lightning_fastmoe.ops.exchange_counts.checksums` multiplies by."""
    return factors(slots, torch.device("cpu")).numpy()
