"""One peer in a process of its own: it can be stopped, and can't pull others down.

The parent sends a command and waits for the answer, so one worker runs at a time and the device is
never shared while something is timed. A worker that takes longer than its limit is killed with all
its children; the next command starts a new one.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from typing import Any, Protocol

import torch

from layer import machine, measure
from layer.configs import Config
from layer.errors import BenchmarkError
from layer.peers import Layer, Peer
from layer.problem import Problem, make_problem, relative_error, solve
from layer.registry import PEERS

TOLERANCE = 1e-2
"""Largest relative error of the output and of each gradient with which a row is printed."""


class Failed(Exception):
    """A command failed in the worker, or the worker did; the message says how."""


class Bench:
    """The commands of a worker. Whatever they return can be pickled.

    Args:
        peer: what to measure.
        device: "cuda" or "cpu".
        dtype: dtype of tokens and experts.
    """

    def __init__(self, peer: Peer, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.peer, self.device, self.dtype = peer, torch.device(device), dtype
        self.layer: Layer | None = None
        self.problem: Problem | None = None

    def start(self) -> dict[str, Any]:
        """Loads the peer: ``reason`` (None if it can run), ``version``, ``start_s``."""
        begin = time.perf_counter()
        torch.backends.cuda.matmul.allow_tf32 = False
        machine.warm_up(self.device)
        ready = time.perf_counter()
        reason = self.peer.unavailable(None, self.device)
        version = None
        if reason is None:
            self.peer.start(self.device)
            version = self.peer.version()
        loaded = time.perf_counter()
        return {
            "reason": reason,
            "version": version,
            "device_s": ready - begin,
            "start_s": loaded - ready,
        }

    def prepare(self, config: Config, routing: str, check: bool = True) -> dict[str, Any]:
        """Builds the problem, runs the first step, checks it, and counts.

        Args:
            config: the sizes.
            routing: the routing.
            check: False leaves all but the first step out.

        Returns:
            ``status`` "ok" with the measurements, "refused" with the errors, or "unavailable".
        """
        self.drop()
        if (reason := self.peer.unavailable(config, self.device)) is not None:
            return {"status": "unavailable", "reason": reason}
        try:
            problem = make_problem(config, routing, self.device, self.dtype)
        except BenchmarkError as error:
            return {"status": "unavailable", "reason": str(error)}
        layer = self.peer.build(problem)
        out, cold_ms = measure.first_step(layer, problem.grad)
        if not check:
            self.drop()
            return {"status": "ok", "cold_ms": cold_ms}
        errors = _errors(layer, out, problem, self.peer.with_router)
        answer = {
            "cold_ms": cold_ms,
            "errors": errors,
            "max_error": max(errors.values()),
            "fingerprint": problem.fingerprint(),
            "load_ratio": problem.load_ratio(),
        }
        del out
        if not answer["max_error"] <= TOLERANCE:
            worst = max(errors, key=lambda name: errors[name])
            return answer | {
                "status": "refused",
                "reason": f"relative error {errors[worst]:.2g} of {worst}, above {TOLERANCE:g}",
            }
        self.free()
        answer["peak_gib"] = measure.peak_over_rest(layer, problem.grad)
        launches = measure.count_launches(layer, problem.grad)
        for name in ("kernels", "copies", "host_syncs", "sync_warnings"):
            answer[name] = getattr(launches, name, None)
        self.layer, self.problem = layer, problem
        layer.forget_gradients()
        self.free()
        return answer | {"status": "ok"}

    def compile_ahead(self, config: Config) -> dict[str, Any]:
        """One step on few tokens, which compiles whatever the sizes of the experts decide."""
        if (reason := self.start()["reason"]) is not None:
            return {"status": "unavailable", "reason": reason}
        few = replace(config, tokens=min(config.tokens, 2048))
        return self.prepare(few, "uniform", check=False)

    def round(self, seconds: float) -> dict[str, list[float]]:
        """Times of one round, in ms; see :func:`~layer.measure.time_layer`."""
        if self.layer is None or self.problem is None:
            raise Failed("nothing is prepared")
        times = measure.time_layer(self.layer, self.problem.grad, seconds)
        self.free()
        return times

    def drop(self) -> None:
        """Forgets the problem."""
        self.layer = self.problem = None
        if self.device.type == "cuda":
            gc.collect()
        self.free()

    def free(self) -> None:
        """Gives cached device memory back, for the other workers."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Reference:
    """The worker that knows the device: its dense product, its copy, its names."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def start(self) -> dict[str, Any]:
        """What the device is."""
        machine.warm_up(self.device)
        return machine.describe(self.device)

    def round(self, seconds: float) -> dict[str, list[float]]:
        """TFLOP/s of the dense product, GB/s of the copy."""
        return machine.rates(self.device, seconds)


def _errors(
    layer: Layer, out: torch.Tensor, problem: Problem, with_router: bool
) -> dict[str, float]:
    answers = solve(problem, with_router)
    errors = {"out": relative_error(out, answers.out)}
    for name, grad in layer.gradients().items():
        errors[name] = relative_error(grad, answers.gradients.pop(name))
    if answers.gradients:
        raise Failed(f"no gradient of {', '.join(answers.gradients)}")
    return errors


class Worker(Protocol):
    """Runs commands of a bench."""

    def call(self, command: str, *args: Any, limit: float) -> Any:
        """The command's answer.

        Raises:
            Failed: if it raised, or took longer than ``limit`` seconds, or the process died.
        """

    def close(self) -> None:
        """Ends the worker."""


class InProcess:
    """A worker in this process, without limits: for tests and for a debugger."""

    def __init__(self, bench: Any) -> None:
        self.bench = bench

    def call(self, command: str, *args: Any, limit: float) -> Any:
        """See :class:`Worker`."""
        answer = _run(self.bench, command, args)
        if answer[0] == "failed":
            raise Failed(answer[1])
        return answer[1]

    def close(self) -> None:
        """See :class:`Worker`."""
        if isinstance(self.bench, Bench):
            self.bench.drop()


class Subprocess:
    """A worker in a process, started at once."""

    def __init__(self, kind: str, device: str, dtype: torch.dtype) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, kind, device, dtype))
        self.process.start()
        theirs.close()

    def send(self, command: str, *args: Any) -> None:
        """Sends a command; :meth:`receive` gets the answer."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send((command, args))

    def receive(self, limit: float) -> Any:
        """The answer to the last :meth:`send`; see :meth:`Worker.call`."""
        if not self.connection.poll(limit):
            self.close()
            raise Failed(f"stopped after {limit:.0f} s")
        try:
            status, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            code = self.process.exitcode
            self.close()
            raise Failed(f"its process died (exit code {code})") from None
        if status == "failed":
            self.close()  # after a CUDA error a process is of no use
            raise Failed(value)
        return value

    def call(self, command: str, *args: Any, limit: float) -> Any:
        """See :class:`Worker`."""
        self.send(command, *args)
        return self.receive(limit)

    def close(self) -> None:
        """Kills the process and its children; may be called again."""
        self.connection.close()
        if self.process.is_alive() and self.process.pid is not None:
            try:
                if os.getpgid(self.process.pid) == self.process.pid:
                    os.killpg(self.process.pid, signal.SIGKILL)
                else:  # it has not made a group of its own yet
                    self.process.kill()
            except ProcessLookupError:
                pass
        self.process.join(10)


def _serve(connection: Any, kind: str, device: str, dtype: torch.dtype) -> None:
    os.setsid()  # so that the parent can kill whatever this process starts
    if device == "cpu":
        torch.set_num_threads(1)
    bench = make_bench(kind, device, dtype)
    while True:
        try:
            command, args = connection.recv()
        except EOFError:
            return
        connection.send(_run(bench, command, args))


def make_bench(kind: str, device: str, dtype: torch.dtype) -> Any:
    """The bench of a peer, or of the device itself for the kind "device"."""
    return Reference(device) if kind == "device" else Bench(PEERS[kind](), device, dtype)


def _run(bench: Any, command: str, args: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "ok", getattr(bench, command)(*args)
    except torch.OutOfMemoryError:
        return "failed", "out of memory"
    except Exception as error:  # noqa: BLE001 - a peer may raise whatever it likes
        first = (str(error).strip().splitlines() or [""])[0]
        return "failed", f"{type(error).__name__}: {first}"[:200]
