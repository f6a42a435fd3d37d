"""Averages gradients over ranks while the backward pass goes on, for ZeRO 1 and 2.

DeepSpeed copies each gradient into a bucket, reduces it, copies it out again, and then waits for
the device. Its buckets hold gradients in the order in which they come, which must be the same on
all ranks. Here, as in PyTorch's DDP (Li et al. 2020), buckets and their order are those of the
model:

* A large gradient is a bucket of its own, and is reduced where autograd put it.
* A bucket is reduced once it is complete and all buckets before it are on their way. Those that are
  not complete at the end of the pass follow then: a parameter that this rank didn't use has a
  gradient of zero, so ranks may use different parameters.
* Streams wait for each other, the host doesn't.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Reduced:
    """A parameter whose gradient is averaged.

    Attributes:
        parameter: the parameter.
        ranks: the process group of those that hold it.
        is_kept: whether this rank's optimizer needs its gradient.
    """

    parameter: Tensor
    ranks: dist.ProcessGroup
    is_kept: bool


@dataclass
class _Bucket:
    """Gradients that are reduced together.

    Attributes:
        members: its parameters.
        last: the position of the last of them in the order in which gradients are expected.
        missing: ids of those whose gradients have not come.
    """

    members: list[Reduced] = field(default_factory=list)
    last: int = 0
    missing: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Elements."""
        return sum(member.parameter.numel() for member in self.members)

    def separate(self) -> None:
        """Frees the memory of those that are not kept."""
        for member in self.members:
            if member.is_kept and len(self.members) > 1:
                member.parameter.grad = member.parameter.grad.clone()  # type: ignore[union-attr]


class GradientReduction:
    """Averages the gradients of a backward pass over ranks.

    Args:
        parameters: in the order in which their gradients are expected, identical on all ranks.
        divisor: of the sums, the number of ranks whose losses are averaged.
        limit: elements up to which gradients are reduced together; larger ones are on their own.
        is_overlapped: whether the backward pass goes on meanwhile.
    """

    def __init__(
        self, parameters: Iterable[Reduced], divisor: int, limit: int, is_overlapped: bool
    ) -> None:
        self._buckets = _make_buckets(parameters, limit)
        self._bucket_of = {
            id(member.parameter): bucket for bucket in self._buckets for member in bucket.members
        }
        self._divisor, self._is_overlapped = divisor, is_overlapped
        self._next = 0
        self._works: deque[Any] = deque()
        self._streams: set[torch.cuda.Stream] = set()
        self._reset()

    def take(self, parameter: Tensor) -> None:
        """Called when a parameter's gradient is complete.

        Raises:
            RuntimeError: if it was taken in this pass already.
        """
        bucket = self._bucket_of[id(parameter)]
        if id(parameter) not in bucket.missing:
            raise RuntimeError(
                f"A gradient of shape {tuple(parameter.shape)} was computed twice in one backward"
                " pass, after it had been averaged over ranks."
            )
        bucket.missing.remove(id(parameter))
        if parameter.is_cuda:  # autograd may use several streams (DeepSpeed #8061)
            self._streams.add(torch.cuda.current_stream(parameter.device))
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._reduce(self._buckets[self._next])
            self._next += 1
        while self._works and self._works[0].is_completed():
            self._works.popleft().wait()  # releases what it has reduced

    def finish(self) -> None:
        """Averages what is left; gradients are valid on the current stream after it."""
        for bucket in self._buckets[self._next :]:
            self._reduce(bucket)
        while self._works:
            self._works.popleft().wait()
        for bucket in self._buckets:
            if not all(member.is_kept for member in bucket.members):
                bucket.separate()
        self._reset()

    def _reset(self) -> None:
        self._next = 0
        self._streams.clear()
        for bucket in self._buckets:
            bucket.missing = {id(member.parameter) for member in bucket.members}

    def _reduce(self, bucket: _Bucket) -> None:
        """Replaces a bucket's gradients by their averages, later; drops those not kept."""
        parameters = [member.parameter for member in bucket.members]
        for stream in self._streams:
            if stream != (current := torch.cuda.current_stream(stream.device)):
                current.wait_stream(stream)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        rows = [g.contiguous().view(-1) for g in gradients]
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)
        ranks = bucket.members[0].ranks
        op = dist.ReduceOp.SUM
        if flat.is_cuda and self._averages_exactly(ranks):
            op = dist.ReduceOp.AVG  # saves a pass over the gradients
        else:
            flat.div_(self._divisor)
        averages = flat.split([p.numel() for p in parameters])
        for member, average in zip(bucket.members, averages, strict=True):
            parameter = member.parameter
            parameter.grad = average.view(parameter.shape) if member.is_kept else None
        if dist.get_world_size(ranks) == 1:
            return
        work = dist.all_reduce(flat, op, group=ranks, async_op=True)
        if self._is_overlapped:
            self._works.append(work)
        else:
            work.wait()

    def _averages_exactly(self, ranks: dist.ProcessGroup) -> bool:
        """Whether NCCL's average is that of the losses; it rounds the divisor's inverse to bf16."""
        return (
            1 < dist.get_world_size(ranks) == self._divisor
            and self._divisor & (self._divisor - 1) == 0
            and "nccl" in dist.get_backend(ranks)
        )


def _make_buckets(parameters: Iterable[Reduced], limit: int) -> Sequence[_Bucket]:
    """Buckets of one process group each, in the order in which they are expected to be complete."""
    buckets: list[_Bucket] = []
    open_buckets: dict[Any, _Bucket] = {}
    for position, reduced in enumerate(parameters):
        size = reduced.parameter.numel()
        key = reduced.ranks, reduced.parameter.dtype
        bucket = open_buckets.get(key)
        if bucket is None or bucket.size + size > limit:
            bucket = _Bucket()
            buckets.append(bucket)
            if size <= limit:
                open_buckets[key] = bucket
        bucket.members.append(reduced)
        bucket.last = position
    return sorted(buckets, key=lambda bucket: bucket.last)
