"""A ring whose layers come over the links of several GPUs: each copies a part, and gathers others'.

N processes copy 1/N of a layer each, over N links, and exchange the parts, as MoE-Prefill does over
NVLink. An exchange that one process doesn't join hangs the others, so none depends on what a pass
does: the passes of all processes are numbered, and in pass p each joins the same exchanges, those
of p's layers in their order, K ahead, also for few tokens. Whatever else a pass needs (layers in
another order, twice as the steps of generation, or outside of a pass) it copies by itself, of few
tokens the experts that they chose; what it leaves out it joins at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.pinned import copy_async
from lightning_fastmoe.inference.ring import ExpertRing, Stack
from lightning_fastmoe.nn.experts.routed_call import RoutedCall

# Under its former name, newer releases of torch warn about it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

PARTS = 4
"""Of a layer, so that links and exchanges are busy at the same time."""


class GatheringRing(ExpertRing):
    """A ring of which every process of a group has one, with the same layers and slots.

    Args:
        stacks: of each layer, in the order in which they run.
        device: where they are computed.
        slots: K.
        cache_bytes: memory of this process's device to keep single experts in.
        copy: copies from a host tensor, the second, in the current stream.
        regions: host memory of each layer, ``(PARTS * N * S,)`` uint8 for N processes, laid out as
            a slot.
        group: the processes, with a communicator of its own; None if each copies whole layers.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        device: torch.device,
        slots: int,
        cache_bytes: int = 0,
        copy: Callable[[Tensor, Tensor], None] = copy_async,
        *,
        regions: Sequence[Tensor],
        group: Any,
    ) -> None:
        self._regions, self._group = regions[: len(stacks)], group
        self._joined = 0  # exchanges so far; the next one fills slot _joined % K
        self._granted = 0  # exchanges that all processes have promised to join
        self._versions = [stack.version() for stack in stacks]
        super().__init__(stacks, device, slots, cache_bytes, copy)

    def _room(self) -> int:
        return max(super()._room(), max(region.numel() for region in self._regions))

    def _start(self) -> None:
        if self._group is None:
            super()._start()
        else:
            self._granted = len(self._slots)
            self._join_all()

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around a pass, of which every process runs the same number.

        One that fails joins nothing more: this process is about to end, and so are the others.
        """
        if self._group is not None and len(self._slots) < len(self._stacks):
            self._granted += len(self._stacks)
        yield
        self._join_all()

    def acquire(
        self, layer: int, call: RoutedCall | None = None, *, whole: bool = False
    ) -> list[Tensor]:
        if self._stacks[layer].version() != self._versions[layer]:
            raise ConfigError(
                "Experts were changed after OffloadDDPStrategy had set up, and other processes have"
                " the same memory: change them before, on the CPU, or load them by ckpt_path."
            )
        return super().acquire(layer, call, whole=whole)

    def release(self, layer: int) -> None:
        if self._group is None:
            super().release(layer)
            return
        for slot in self._slots:
            if slot.layer == layer:
                slot.in_use = False
        awaited = (self._joined - len(self._slots)) % len(self._stacks)
        if layer == awaited and self._joined < self._granted:
            self._join()

    def _join_all(self) -> None:
        while self._joined < self._granted:
            self._join()

    def _join(self) -> None:
        """Joins the next exchange."""
        number, self._joined = self._joined, self._joined + 1
        slot = self._slots[number % len(self._slots)]
        layer = number % len(self._stacks)
        self._copy(layer, slot, partial(self._gather, self._regions[layer]))

    def _gather(self, region: Tensor, stack: Stack, slot: Any) -> None:
        """Copies this process's share of each part of a layer; the one before is exchanged then."""
        world = dist.get_world_size(self._group)
        share = region.numel() // (PARTS * world)
        begin = dist.get_rank(self._group) * share
        exchanges = []
        for host, part in zip(
            region.split(share * world),
            slot.memory[: region.numel()].split(share * world),
            strict=True,
        ):
            own = part[begin : begin + share]
            self._copy_host(own, host[begin : begin + share])
            exchanges.append(_all_gather(part, own, group=self._group, async_op=True))
        for exchange in exchanges:
            exchange.wait()  # in the stream, with NCCL
