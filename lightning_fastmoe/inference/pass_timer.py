"""Times passes and copies on the device's own clock; nothing waits for it while passes run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.planning.observed import CopyTimes, PassTimes


class Mark(Protocol):
    """A point in a stream's time, such as ``torch.cuda.Event(enable_timing=True)``."""

    def record(self, stream: Any = None) -> None:
        """Marks where the stream is."""
        ...

    def query(self) -> bool:
        """Whether the stream has passed it."""
        ...

    def synchronize(self) -> None:
        """Waits until it has."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to another mark."""
        ...


class _HostMark:
    """A mark of the CPU, which has passed what it records."""

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _HostMark) -> float:
        return 1000 * (end.at - self.at)


@dataclass
class _Pass:
    """A pass that the device may still be in."""

    before: Mark | None
    begun: Mark
    ended: Mark | None = None
    waits: list[tuple[Mark, Mark]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)


class PassTimer:
    """Times the passes of a model whose experts are copied, by marks in the device's streams.

    What a pass takes is known only when the device has got there, so it is added up later, when
    the next one begins.

    Args:
        device: computes.
        make_mark: another clock, for tests.

    Attributes:
        passes: those that have ended, in their order.
        copies: what was copied for them.
    """

    def __init__(self, device: torch.device, make_mark: Callable[[], Mark] | None = None) -> None:
        self._device = device
        if make_mark is None:
            cuda = partial(torch.cuda.Event, enable_timing=True)
            make_mark = cuda if device.type == "cuda" else _HostMark
        self._make_mark = make_mark
        self._running: _Pass | None = None
        self._before: Mark | None = None
        self._ended: deque[_Pass] = deque()
        self._copying: deque[tuple[Mark, Mark, int]] = deque()
        self._observers: list[RemovableHandle] = []
        self.passes: list[PassTimes] = []
        self.copies = CopyTimes()

    def watch(self, model: nn.Module) -> None:
        """Counts the tokens that reach layers with experts, until :meth:`close`."""
        for name, layer in expert_layers(model):

            def count(_layer: Any, routing: Any, name: str = name) -> None:
                if self._running is not None:
                    tokens = self._running.tokens
                    tokens[name] = tokens.get(name, 0) + len(routing.logits)

            self._observers.append(layer.register_routing_observer(count))

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around a pass. One that fails is not counted."""
        self.add_up()
        self._running = running = _Pass(self._before, self.mark())
        self._before = None
        try:
            yield
        finally:
            self._running = None
        running.ended = self._before = self.mark()
        self._ended.append(running)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what makes the computing stream wait for a copy."""
        begun = self.mark()
        yield
        if self._running is not None:
            self._running.waits.append((begun, self.mark()))

    @contextmanager
    def copying(self, size: int) -> Iterator[None]:
        """Around a copy of ``size`` bytes, in the stream that copies."""
        begun = self._make_mark()
        begun.record()
        yield
        ended = self._make_mark()
        ended.record()
        self._copying.append((begun, ended, size))

    def mark(self) -> Mark:
        """Where the computing stream is."""
        mark = self._make_mark()
        cuda = self._device.type == "cuda"
        mark.record(torch.cuda.current_stream(self._device) if cuda else None)
        return mark

    def add_up(self, *, wait: bool = False) -> None:
        """Adds up what the device has done.

        Args:
            wait: until it has done everything; only after the last pass.
        """
        while self._ended and (last := self._ended[0].ended) is not None:
            if wait:
                last.synchronize()
            elif not last.query():
                break
            self.passes.append(_times(self._ended.popleft()))
        while self._copying:
            begun, ended, size = self._copying[0]
            if wait:
                ended.synchronize()
            elif not ended.query():
                break
            self._copying.popleft()
            self.copies = self.copies + CopyTimes(size, _seconds(begun, ended))

    def close(self) -> None:
        """Counts no more tokens."""
        for observer in self._observers:
            observer.remove()
        self._observers.clear()


def _times(one: _Pass) -> PassTimes:
    assert one.ended is not None
    waited = sum(_seconds(begun, ended) for begun, ended in one.waits)
    return PassTimes(
        tokens=max(one.tokens.values(), default=0),
        between=0.0 if one.before is None else _seconds(one.before, one.begun),
        computing=_seconds(one.begun, one.ended) - waited,
        waiting=waited,
    )


def _seconds(begun: Mark, ended: Mark) -> float:
    return begun.elapsed_time(ended) / 1000
