"""Runs peers side by side, in turn within each round, so that drift affects all of them equally."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from layer.configs import Config
from layer.errors import BenchmarkError
from layer.registry import PEERS
from layer.worker import Failed, InProcess, Subprocess, Worker, make_bench

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass
class Options:
    """How to run.

    Attributes:
        device: "cuda" or "cpu".
        dtype: dtype of tokens and experts.
        seconds: time measured per row, over all rounds.
        rounds: how often each peer gets its turn.
        limit: seconds that a peer may take to get ready for a row.
        limits: the same for single peers by name.
        in_process: no worker processes.
        ahead: how many compiling peers to run at once before anything is measured; 0 for none.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 1.5
    rounds: int = 5
    limit: float = 90.0
    limits: dict[str, float] = field(default_factory=dict)
    in_process: bool = False
    ahead: int = 0

    def limit_of(self, peer: str) -> float:
        """Seconds that ``peer`` may take to get ready."""
        return self.limits.get(peer, self.limit)


class Runner:
    """The workers of a run.

    Args:
        peers: names.
        options: how to run.
        say: gets a line of progress at a time.
    """

    def __init__(self, peers: list[str], options: Options, say: Say) -> None:
        self.peers, self.options, self.say = peers, options, say
        self.workers: dict[str, Worker] = {}
        self.about: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Runner:
        self._device_rates(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def run(self, config: Config, routing: str) -> list[Row]:
        """One row per peer."""
        self._start_together()
        rows = [self._prepare(peer, config, routing) for peer in self.peers]
        self._compare_problems(rows)
        times: dict[str, dict[str, list[float]]] = {}
        device: dict[str, list[float]] = {}
        seconds = self.options.seconds / self.options.rounds
        for _ in range(self.options.rounds):
            for name, values in self._device_rates(min(seconds, 0.1)).items():
                device.setdefault(name, []).extend(values)
            for row in rows:
                if row["status"] != "ok":
                    continue
                limit = 30 + 20 * seconds
                try:
                    found = self._call(row["peer"], "round", seconds, limit=limit)
                except Failed as error:
                    row |= {"status": "failed", "reason": str(error)}
                    continue
                for name, values in found.items():
                    times.setdefault(row["peer"], {}).setdefault(name, []).extend(values)
        dense = statistics.median(device["dense_tflops"])
        copy = statistics.median(device["copy_gbs"])
        for row in rows:
            row |= {"dense_tflops": dense, "copy_gbs": copy}
            if row["status"] == "ok":
                row |= summary(config, times[row["peer"]], dense)
            self.say(describe(row))
        return rows

    def compile_ahead(self, configs: list[Config]) -> None:
        """Lets peers that compile fill their caches, several at once, before anything is timed.

        What a first step costs then is that of a machine that has compiled this shape before.
        """
        if not self.options.ahead or self.options.in_process:
            return
        names = [name for name in self.peers if PEERS[name].compiles]
        jobs = [(name, config) for name in names for config in configs]
        running: list[tuple[str, Config, Subprocess]] = []
        while jobs or running:
            while jobs and len(running) < self.options.ahead:
                name, config = jobs.pop(0)
                worker = Subprocess(name, self.options.device, self.options.dtype)
                worker.send("compile_ahead", config)
                running.append((name, config, worker))
            name, config, worker = running.pop(0)
            try:
                found = worker.receive(self.options.limit_of(name))
                text = found.get("reason") or f"{found['cold_ms'] / 1e3:.1f} s"
            except Failed as error:
                text = str(error)
            self.say(f"compiled ahead: {config.name}, {name}: {text}")
            worker.close()

    def _prepare(self, peer: str, config: Config, routing: str) -> Row:
        row: Row = {"config": config.name, "routing": routing, "peer": peer}
        try:
            limit = self.options.limit_of(peer)
            row |= self._call(peer, "prepare", config, routing, limit=limit)
        except Failed as error:
            row |= {"status": "failed", "reason": str(error)}
        return row

    def _device_rates(self, seconds: float) -> dict[str, list[float]]:
        """The rates of the device in one round; a worker that fails gets a second chance."""
        for last in (False, True):
            try:
                return self._call("device", "round", seconds, limit=60)
            except Failed as error:
                if last:
                    raise BenchmarkError(f"The device can't be measured: {error}") from error
        raise AssertionError

    def _compare_problems(self, rows: list[Row]) -> None:
        """Refuses what was measured on other tokens, weights or routing than the first row's."""
        given = [row for row in rows if row["status"] == "ok"]
        for row in given[1:]:
            pairs = zip(row["fingerprint"], given[0]["fingerprint"], strict=True)
            if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
                row |= {"status": "refused", "reason": f"not the problem of {given[0]['peer']}"}

    def _call(self, kind: str, command: str, *args: Any, limit: float) -> Any:
        about = self.about.get(kind)
        if about is not None and about.get("reason"):
            return {"status": "unavailable", "reason": about["reason"]}
        if kind not in self.workers:
            self.workers[kind] = worker = self._new_worker(kind)
            self._started(kind, lambda limit: worker.call("start", limit=limit))
        if self.about[kind].get("reason"):
            return {"status": "unavailable", "reason": self.about[kind]["reason"]}
        try:
            return self.workers[kind].call(command, *args, limit=limit)
        except Failed:
            self.workers.pop(kind).close()
            raise

    def _start_together(self) -> None:
        """Lets peers that have no process yet load their libraries at the same time."""
        if self.options.in_process:
            return
        options = self.options
        new = [kind for kind in self.peers if kind not in self.about]
        workers = {kind: Subprocess(kind, options.device, options.dtype) for kind in new}
        self.workers |= workers
        for worker in workers.values():
            worker.send("start")
        for kind, worker in workers.items():
            with contextlib.suppress(Failed):
                self._started(kind, worker.receive)

    def _started(self, kind: str, answer: Callable[[float], dict[str, Any]]) -> None:
        """Notes what a worker says of itself, or that it can't start."""
        try:
            found = answer(self.options.limit_of(kind) + 120)
        except Failed as error:
            # Not tried again for each row: a start that hangs would cost its limit each time.
            self.workers.pop(kind).close()
            self.about[kind] = {"reason": f"can't start: {error}", "version": None}
            raise
        self.about.setdefault(kind, found)

    def _new_worker(self, kind: str) -> Worker:
        if self.options.in_process:
            return InProcess(make_bench(kind, self.options.device, self.options.dtype))
        return Subprocess(kind, self.options.device, self.options.dtype)


def summary(config: Config, times: dict[str, list[float]], dense: float) -> Row:
    """Medians, quartiles and rates of a row's times.

    Args:
        config: the sizes.
        times: ``{"forward": [ms, ...], "step": [ms, ...]}``.
        dense: TFLOP/s of the dense product.
    """
    row: Row = {}
    for name, flops in (("forward", config.forward_flops), ("step", config.step_flops)):
        first, median, third = statistics.quantiles(times[name], n=4, method="inclusive")
        row[f"{name}_ms"] = {"median": median, "q1": first, "q3": third, "n": len(times[name])}
        row[f"{name}_tflops"] = flops / median / 1e9
    row["percent_of_dense"] = 100 * row["step_tflops"] / dense
    return row


def describe(row: Row) -> str:
    """A line of progress."""
    name = f"{row['config']}, {row['routing']}, {row['peer']}"
    if row["status"] == "refused":
        return f"REFUSED {name}: {row['reason']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}: {row['reason']}"
    ms = row["step_ms"]
    return (
        f"{name}: forward {row['forward_tflops']:.3g}, step {row['step_tflops']:.3g} TFLOP/s"
        f" ({row['percent_of_dense']:.0f}% of dense), {ms['median']:.3f} ms"
        f" [{ms['q1']:.3f}, {ms['q3']:.3f}], error {row['max_error']:.1e}"
    )
