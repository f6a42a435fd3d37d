"""Timed passes against a simulated device, whose link and layers take what the test says."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from inference.offload_models import D_MODEL, Blocks, Scorer, loader, trainer

from lightning_fastmoe import OffloadStrategy
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.inference.pass_timer import PassTimer
from lightning_fastmoe.planning.observed import CopyTimes, PassTimes, observed
from lightning_fastmoe.planning.offload_sizes import OffloadSizes

LAYER = 4 * (2 * 8 + 8) * D_MODEL * 4
"""Bytes of a layer's experts."""


class Device:
    """Two streams and their times in seconds: one computes, the other copies.

    Args:
        monkeypatch: puts it in the place of CUDA.
        rate: bytes per second of the link.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
        self.rate, self.now = rate, {"compute": 0.0, "copy": 0.0}
        self.current, self.asked, self.tokens = "compute", 0, 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self)
        monkeypatch.setattr(torch.cuda, "stream", self._in)
        monkeypatch.setattr(torch.cuda, "Event", self.mark)

    def wait_stream(self, other: Any) -> None:
        """The copying one waits for the computing one."""
        self.now["copy"] = max(self.now.values())

    def synchronize(self) -> None:
        """Of the stream, when the ring is closed."""

    @contextmanager
    def _in(self, stream: Any) -> Any:
        self.current = "copy"
        yield
        self.current = "compute"

    def mark(self, **_: Any) -> Any:
        """An event."""
        device = self

        class Mark:
            at, waited = 0.0, False

            def record(self, stream: Any = None) -> None:
                self.at = device.now[device.current]

            def query(self) -> bool:
                device.asked += 1
                return device.asked % 3 == 0  # the device is behind

            def synchronize(self) -> None:
                pass

            def wait(self, stream: Any) -> None:
                device.now["compute"] = max(device.now["compute"], self.at)

            def elapsed_time(self, end: Any) -> float:
                return 1000 * float(end.at - self.at)

        return Mark()

    def attach(self, model: Blocks, offloaded: Any, per_token: float) -> PassTimer:
        """Copies and layers take time on it."""
        ring = offloaded._ring
        transfer = ring._transfer

        def copy(stack: Any, slot: Any) -> None:
            assert self.current == "copy"
            transfer(stack, slot)
            self.now["copy"] += LAYER / self.rate

        def compute(module: Any, args: Any) -> None:  # after the wait, before the next copy
            self.now["compute"] += per_token * self.tokens

        ring._transfer, ring._stream = copy, self
        for layer in model.layers:
            layer.experts.holder.register_forward_pre_hook(compute)
        timer = PassTimer(torch.device("cpu"), self.mark)
        timer.watch(model)
        offloaded.time_by(timer)
        return timer


def by_hand(tokens: list[int], gap: float, link: float, per_token: float) -> list[PassTimes]:
    """The same passes with two slots, layer by layer, from full slots."""
    now, free, filled = 0.0, 0.0, {0: 0.0, 1: 0.0}
    passes = []
    for number, count in enumerate(tokens):
        between = 0.0 if number == 0 else gap
        now += between
        waiting = 0.0
        for layer in range(4):
            late = max(0.0, filled[layer] - now)
            waiting += late
            now += late + per_token * count
            free = max(free, now) + link
            filled[(layer + 2) % 4] = free
        passes.append(PassTimes(count, between, 4 * per_token * count, waiting))
    return passes


@pytest.mark.parametrize(
    ("per_token", "gap", "limit"),
    [(0.001, 0.0, "the link"), (0.02, 0.0, "the GPU"), (0.004, 0.3, "what comes between passes")],
)
def test_times_of_a_simulated_device(
    per_token: float, gap: float, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of several sizes; the link takes 60 ms for a layer."""
    model = Blocks({}).eval()
    offloaded = offload_experts(model, "cpu")
    device = Device(monkeypatch, LAYER / 0.06)
    timer = device.attach(model, offloaded, per_token)
    tokens = [10, 10, 3, 10, 3, 10, 10]
    with torch.inference_mode():
        for count in tokens:
            device.tokens = count
            with timer.one_pass():
                model(torch.randn(count, D_MODEL))
            device.now["compute"] += gap
    assert len(timer.passes) < len(tokens)  # the device had not got there
    timer.add_up(wait=True)
    right = by_hand(tokens, gap, 0.06, per_token)
    for found, expected in zip(timer.passes, right, strict=True):
        assert found.tokens == expected.tokens
        for name in ("between", "computing", "waiting"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name)), name
    assert timer.copies.bytes == 4 * len(tokens) * LAYER
    assert timer.copies.rate == pytest.approx(LAYER / 0.06)

    report = observed(timer.passes, timer.copies, OffloadSizes.of(model), slots=2, resident=0)
    assert report is not None
    assert (report.plan.tokens, len(report.comparable)) == (10, 4)
    assert report.limit.startswith(limit)
    assert report.plan.copying == pytest.approx(4 * 0.06)
    assert report.plan.seconds == pytest.approx(max(4 * 0.06, 4 * 10 * per_token + gap))
    if limit != "the link":  # smaller passes between them hide less
        assert report.seconds == pytest.approx(report.plan.seconds, rel=0.2)


def test_the_report_by_hand() -> None:
    gigabyte = 10**9
    sizes = OffloadSizes((2 * gigabyte,) * 10, 3 * gigabyte)
    passes = [
        PassTimes(1000, 0.0, 3.0, 0.9),  # the first
        PassTimes(1000, 0.01, 0.2, 0.19),
        PassTimes(5, 0.01, 0.1, 0.3),
        PassTimes(1000, 0.03, 0.22, 0.17),
        PassTimes(1000, 0.02, 0.24, 0.15),
    ]
    copies = CopyTimes(100 * gigabyte, 2.0)
    report = observed(passes, copies, sizes, slots=2, resident=0, peak=9 * gigabyte)
    assert report is not None
    assert report.text() == (
        "5 passes took 5.54 s: those of 1,000 tokens 0.41 s each (2,439 tokens/s), of which 0.17 s"
        " for copies; they waited for the link.\n"
        "With the costs seen, 0.4 s are planned: copies 0.4 s at 50.0 GB/s, computation 0.22 s,"
        " between passes 0.02 s; 9.0 GB of GPU memory at most."
    )
    assert report.plan.costs.activations == 2 * gigabyte
    assert report.plan.on_gpu == 9 * gigabyte
    assert observed([], copies, sizes, slots=2, resident=0) is None
    (only,) = observed(passes[:1], copies, sizes, slots=2, resident=0).comparable  # type: ignore[union-attr]
    assert only == passes[0]
    resident = observed(passes, CopyTimes(), sizes, slots=2, resident=10)
    assert resident is not None
    assert "no copies, computation 0.22 s" in resident.text()


def test_a_pass_that_fails_is_not_counted() -> None:
    timer = PassTimer(torch.device("cpu"))
    with pytest.raises(RuntimeError), timer.one_pass():
        raise RuntimeError
    with timer.one_pass():
        pass
    timer.add_up()
    assert [one.between for one in timer.passes] == [0.0]


def test_what_the_strategy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_fastmoe.strategy.offload.rank_zero_info", said.append)
    module = Scorer({})
    strategy = OffloadStrategy()
    own = trainer(strategy)
    assert strategy.last_report is None
    for call in (own.predict, own.validate, own.test):
        call(module, loader())
        report = strategy.last_report
        assert report is not None
        assert [one.tokens for one in report.passes] == [10, 10, 7]
        assert said[-1] == f"OffloadStrategy: {report.text()}"
        assert "those of 10 tokens" in said[-1] or "those of 7 tokens" in said[-1]
        assert report.plan.costs.link < float("inf")
    assert not any(layer._observers for layer in module.network.layers)  # type: ignore[union-attr]

    count = len(said)
    quiet = OffloadStrategy(report=False)
    trainer(quiet).predict(module, loader())
    assert quiet.last_report is None
    assert len(said) == count + 1  # where the experts are
