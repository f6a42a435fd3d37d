"""What is measured of one layer on one problem.

**Time.** CUDA events around each forward and each whole step (forward and backward), without a
synchronisation between steps, as in training; gaps in which the device waits for the host count.
Gradients are set to None before each step, so each step makes fresh ones.

**Peak memory over rest.** Rest is what is allocated after a step: the problem, the weights and the
gradients of all leaves that the step left behind (its output is gone). Before the measured step the
gradients are set to None, and its own take their place. So gradient buffers are counted for nobody,
and what remains is what the layer needs beside them at its worst moment.

**Kernels and host syncs** are counted in one profiled step: kernels run on the device (copies and
fills by the driver are told apart), and CUDA calls that make the host wait.

**Cold start** is the wall time of the first step of a problem, in a process in which CUDA and the
peer's library are loaded, all kernels ready or not.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from layer.peers import Layer

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cuMemcpyDtoH",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD",
    "cuMemcpyHtoD_v2",
)
"""CUDA calls that return when the device has caught up."""

STEP = "one_step"


def step(layer: Layer, grad: Tensor) -> None:
    """Forward and backward with fresh gradients."""
    layer.forget_gradients()
    layer.forward().backward(grad)


def synchronize(device: torch.device) -> None:
    """Waits for ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_step(layer: Layer, grad: Tensor) -> tuple[Tensor, float]:
    """The output of the first step, whose gradients stay, and its wall time in ms."""
    synchronize(grad.device)
    start = time.perf_counter()
    layer.forget_gradients()
    out = layer.forward()
    out.backward(grad)
    synchronize(grad.device)
    return out.detach(), (time.perf_counter() - start) * 1e3


def peak_over_rest(layer: Layer, grad: Tensor) -> float | None:
    """GiB, by the rule above; None without a CUDA device."""
    if grad.device.type != "cuda":
        return None
    step(layer, grad)
    torch.cuda.synchronize()
    rest = torch.cuda.memory_allocated()
    layer.forget_gradients()
    torch.cuda.reset_peak_memory_stats()
    step(layer, grad)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - rest) / 2**30


@dataclass(frozen=True)
class Launches:
    """Counts of one step.

    Attributes:
        kernels: run on the device.
        copies: memory copies and fills by the driver.
        host_syncs: CUDA calls that make the host wait.
        sync_warnings: how often PyTorch's own sync debug mode warned.
    """

    kernels: int
    copies: int
    host_syncs: int
    sync_warnings: int


def count_launches(layer: Layer, grad: Tensor) -> Launches | None:
    """Counts launches and waits of one step; None without a CUDA device."""
    if grad.device.type != "cuda":
        return None
    warned = _count_sync_warnings(layer, grad)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        torch.cuda.synchronize()
        with record_function(STEP):
            step(layer, grad)
        torch.cuda.synchronize()
    events = found.events()
    spans = [e.time_range for e in events if e.name == STEP and e.device_type == DeviceType.CPU]
    start, end = spans[0].start, spans[0].end
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and e.name != STEP]
    copies = sum(is_copy(e.name) for e in on_device)
    waits = [e for e in events if e.device_type == DeviceType.CPU and e.name in WAITS]
    inside = [e for e in waits if start <= e.time_range.start <= end]
    return Launches(len(on_device) - copies, copies, len(inside), warned)


def is_copy(name: str) -> bool:
    """Whether a device event is a copy or a fill of the driver's, not a kernel."""
    return name.startswith(("Memcpy", "Memset"))


def _count_sync_warnings(layer: Layer, grad: Tensor) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(layer, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


class Clock:
    """Times what runs between two marks, on the device if there is one."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.ms: list[float] = []
        self._start: torch.cuda.Event | float = 0.0

    def start(self) -> None:
        """The first mark."""
        if self.cuda:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> None:
        """The second one."""
        if isinstance(self._start, float):
            self.ms.append((time.perf_counter() - self._start) * 1e3)
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.pairs.append((self._start, end))

    def read(self) -> list[float]:
        """All times in ms; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            self.ms += [a.elapsed_time(b) for a, b in self.pairs]
            self.pairs = []
        return self.ms


def time_layer(layer: Layer, grad: Tensor, seconds: float) -> dict[str, list[float]]:
    """One round: forwards for a quarter of ``seconds``, steps for the rest, after a warm step.

    Returns:
        ``{"forward": [ms, ...], "step": [ms, ...]}``, three of each at least.
    """
    device = grad.device
    warm = Clock(device)
    for _ in range(2):  # memory is mapped anew after a round, so the first step is a slow one
        warm.start()
        step(layer, grad)
        warm.stop()
    step_ms = max(warm.read()[-1], 1e-3)
    steps = min(max(3, round(seconds * 750 / step_ms)), 400)
    forwards = min(max(3, round(seconds * 750 / step_ms)), 400)
    clocks = {"forward": Clock(device), "step": Clock(device)}
    for _ in range(forwards):
        clocks["forward"].start()
        out = layer.forward()
        clocks["forward"].stop()
        del out
    for _ in range(steps):
        layer.forget_gradients()
        clocks["step"].start()
        layer.forward().backward(grad)
        clocks["step"].stop()
    times = {name: clock.read() for name, clock in clocks.items()}
    layer.forget_gradients()
    return times
