"""Gathers the weights that each rank has updated, part by part, while it updates the next part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

PART = 64 * 2**20
"""Elements of a rank's partition that are gathered at a time."""


class WeightGather:
    """The gathering of a group's flat weights from the ranks that share them.

    ::

        for part in gather.parts():
            update(part)
            gather.start(part)
        gather.finish()

    Args:
        flat: (R n,), the weights of the group; rank r has updated elements r n to (r + 1) n.
        ranks: the process group, R ranks.
        stream: where to gather on CUDA; None waits for each part.
    """

    def __init__(
        self, flat: Tensor, ranks: dist.ProcessGroup, stream: torch.cuda.Stream | None
    ) -> None:
        self._rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
        self._partitions, self._ranks = flat.detach().view(size, -1), ranks
        self._is_alone = size == 1
        self._stream = stream if flat.is_cuda else None

    def parts(self) -> Iterator[slice]:
        """Slices of this rank's partition, in order."""
        length = self._partitions.shape[1]
        step = length if self._is_alone else PART
        for begin in range(0, length, max(1, step)):
            yield slice(begin, min(begin + step, length))

    def start(self, part: slice) -> None:
        """Gathers a part, after what has been enqueued on the current stream."""
        if self._is_alone:
            return
        if self._stream is None:
            self._gather(part)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._gather(part)

    def finish(self) -> None:
        """Makes the current stream wait for all parts."""
        if self._stream is not None and not self._is_alone:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _gather(self, part: slice) -> None:
        parts = [partition[part] for partition in self._partitions]
        group = self._ranks
        if "nccl" not in dist.get_backend(group):
            for rank, one in enumerate(parts):
                dist.broadcast(one, group=group, group_src=rank)
            return
        # One operation of NCCL, which writes each part where it belongs; all_gather would need a
        # copy of them.
        with dist._coalescing_manager(group, parts[0].device, async_ops=True) as gathering:  # type: ignore[attr-defined]
            for rank, one in enumerate(parts):
                dist.broadcast(one, group=group, group_src=rank)
        gathering.wait()
