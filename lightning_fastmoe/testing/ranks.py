"""Functions run on several gloo ranks, in worker processes that are started once and reused.

Starting a process and importing torch, Lightning and DeepSpeed takes seconds; a case takes a
fraction of one. So a pool keeps its workers and gives each case fresh process groups on a free
port. A case that hangs or kills a worker costs the pool its workers and nothing else.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_RUNS_PER_SET = 20


class RankError(RuntimeError):
    """A rank raised, died, or did not finish in time.

    Attributes:
        errors: rank -> (exception type name, message); empty after a time-out.
    """

    def __init__(self, message: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__(message)
        self.errors = errors


def free_port() -> int:
    """A TCP port that nobody listens on, from the operating system."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class RankPool:
    """Worker processes on this machine: a set of its own for each number of ranks.

    A worker never sees two world sizes, as no real process does: DeepSpeed remembers the first.

    Args:
        threads: torch's threads per worker.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._sets: dict[int, list[tuple[Any, Connection]]] = {}
        self._runs: dict[int, int] = {}

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        ranks_per_node: int | None = None,
    ) -> list[Any]:
        """Runs ``function(*args)`` on ranks ``0 .. world_size - 1``.

        Args:
            function: importable by name; what it returns must be picklable.
            world_size: number of ranks.
            args: picklable, the same on every rank.
            timeout: seconds; then all workers are killed.
            ranks_per_node: what the ranks are told; None puts all on one node.

        Returns:
            What each rank returned.

        Raises:
            RankError: if a rank raises, dies or is late.
        """
        workers = self._start(world_size)
        # As with torchrun, whoever starts the ranks holds their store, on a port that it has when
        # it tells them. A free port that rank 0 would listen on later can be taken by then.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, pipe) in enumerate(workers):
            place = (rank, world_size, ranks_per_node or world_size, store.port)
            try:
                pipe.send((function, args, place))
            except BrokenPipeError:
                self._kill(world_size)
                raise RankError(f"the worker of rank {rank} had died before", {}) from None
        results: dict[int, Any] = {}
        errors: dict[int, tuple[str, str]] = {}
        deadline = time.monotonic() + timeout
        pending: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
        detail = ""
        grace: float | None = None
        while pending:
            limit = deadline if grace is None else min(deadline, grace)
            ready: list[Any] = wait(list(pending), timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                late = sorted(pending.values())
                self._kill(world_size)
                raise RankError(
                    f"ranks {late} did not finish in time; failed: {errors}\n{detail}", errors
                )
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    ok, value = connection.recv()
                except EOFError:
                    process = workers[rank][0]
                    process.join(5)
                    ok, value = False, ("ProcessDied", _how_it_ended(process.exitcode), "")
                if ok:
                    results[rank] = value
                else:
                    errors[rank] = value[:2]
                    # Peers of a failed rank may wait for it forever.
                    grace = time.monotonic() + 20.0
                    detail = value[2]
        if errors:
            if any(kind == "ProcessDied" for kind, _ in errors.values()):
                self._kill(world_size)
            raise RankError(f"ranks {sorted(errors)} failed: {errors}\n{detail}", errors)
        return [results[rank] for rank in range(world_size)]

    def _start(self, world_size: int) -> list[tuple[Any, Connection]]:
        # Engines that DeepSpeed never lets go keep their groups, and gloo's threads, alive.
        self._runs[world_size] = self._runs.get(world_size, 0) + 1
        if self._runs[world_size] % _RUNS_PER_SET == 0:
            self._kill(world_size)
        if world_size not in self._sets:
            context = _context()
            workers = []
            for _ in range(world_size):
                parent, child = context.Pipe()
                process = context.Process(
                    target=_work, args=(child, self.threads, dict(os.environ)), daemon=True
                )
                process.start()
                child.close()
                workers.append((process, parent))
            self._sets[world_size] = workers
        return self._sets[world_size]

    def _kill(self, world_size: int) -> None:
        workers = self._sets.pop(world_size, [])
        for process, connection in workers:
            connection.close()
            process.kill()
        for process, _ in workers:
            process.join()

    def close(self) -> None:
        """Kills all workers; the next case starts new ones."""
        for world_size in list(self._sets):
            self._kill(world_size)


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the worker was ended by {signal.Signals(-exitcode).name}"
    return f"the worker ended with status {exitcode}"


def _context() -> Any:
    """Workers are copies of one process that has imported everything: that takes ten seconds.

    Not beside a GPU, where a copy of a process that has counted the devices can't use them.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning_fastmoe.strategy", "torch._inductor.compile_fx"])
    return context


def _work(connection: Connection, threads: int, environment: dict[str, str]) -> None:
    faulthandler.enable()
    os.environ.clear()  # it may be that of a pool that was the first
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    linear = F.linear
    # What the libraries made while they were imported stays for good. Passing over it took half a
    # second of each collection, and half of the time of all cases together: _leave() collects, and
    # so does DeepSpeed whenever it makes an engine.
    gc.freeze()
    is_first = True
    while True:
        try:
            function, args, place = connection.recv()
        except EOFError:
            return
        try:
            _enter(*place)
            outcome: tuple[bool, Any] = (True, function(*args))
        except BaseException as error:  # noqa: BLE001  reported to the parent, whatever it is
            text = traceback.format_exc()
            outcome = (False, (type(error).__name__, str(error), text))
        finally:
            _leave()
            # ZeRO 3 puts its own in place for good, which rounds otherwise: a run would depend on
            # those before it.
            F.linear = linear
        connection.send(outcome)
        if is_first:  # and imported the rest
            gc.freeze()
            is_first = False


def _enter(rank: int, world_size: int, ranks_per_node: int, port: int) -> None:
    """The environment that torchrun gives to a process; Lightning recognises it."""
    node, local_rank = divmod(rank, ranks_per_node)
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "GROUP_RANK": str(node),
            "TORCHELASTIC_RUN_ID": f"pool-{port}",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    )


def _leave() -> None:
    """Drops the process groups, and DeepSpeed's module-level memory of them."""
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        for name, value in vars(groups).items():
            if name.isupper() and name.startswith("_") and "GROUP" in name:
                setattr(groups, name, {} if isinstance(value, dict) else None)
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None:
        vars(comm)["cdb"] = None
