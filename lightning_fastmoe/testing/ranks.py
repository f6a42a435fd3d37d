"""Runs functions on several gloo ranks, in worker processes that are started once and reused.

Starting a process and importing torch, Lightning and DeepSpeed takes seconds; a test case takes a
fraction of one. So a pool keeps its workers and gives each case fresh process groups on a free
port. If a case hangs or kills a worker, the pool only loses its workers.
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
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_RUNS_PER_SET = 20
_LEAVING = 20.0
"""Seconds for processes that have failed to leave their groups."""


class RankError(RuntimeError):
    """A rank raised, died, or did not finish in time.

    Attributes:
        errors: rank -> (exception type name, message), without those that were late.
        results: rank -> return value, of the ranks that returned one.
    """

    def __init__(
        self,
        message: str,
        errors: dict[int, tuple[str, str]],
        results: dict[int, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.errors = errors
        self.results = results or {}


def free_port() -> int:
    """An unused TCP port, from the operating system."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class RankPool:
    """Worker processes on this machine, with a separate set for each number of ranks.

    A worker only ever sees one world size, like a real process: DeepSpeed remembers the first.

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
            function: importable by name; its return value must be picklable.
            world_size: number of ranks.
            args: picklable, identical on every rank.
            timeout: seconds after which all workers are killed; late ones show their stacks first.
            ranks_per_node: the simulated ranks per node; None puts all on one node. With 1, all
                ranks use the first GPU, over NCCL too.

        Returns:
            The return value of each rank.

        Raises:
            RankError: if a rank raises, dies or times out.
        """
        workers = self._start(world_size)
        # As with torchrun, the launcher holds the ranks' store, on a port that it already listens
        # on. A free port for rank 0 to listen on later could be taken by then.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, pipe) in enumerate(workers):
            place = (rank, world_size, ranks_per_node or world_size, store.port)
            try:
                pipe.send((function, args, place))
            except BrokenPipeError:
                self._kill(world_size)
                raise RankError(f"the worker of rank {rank} had already died", {}) from None
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
                for rank in late:
                    _dump_stacks(workers[rank][0])
                self._kill(world_size)
                raise RankError(
                    f"ranks {late} did not finish in time; failed: {errors}\n{detail}",
                    errors,
                    results,
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
            until = time.monotonic() + _LEAVING
            for rank, (kind, _) in errors.items():
                pipe = workers[rank][1]
                if kind == "ProcessDied" or not pipe.poll(max(0.0, until - time.monotonic())):
                    self._kill(world_size)
                    break
                with suppress(EOFError):
                    pipe.recv()  # the same again, once it has left its groups
            raise RankError(f"ranks {sorted(errors)} failed: {errors}\n{detail}", errors, results)
        return [results[rank] for rank in range(world_size)]

    def _start(self, world_size: int) -> list[tuple[Any, Connection]]:
        # DeepSpeed never releases engines, which keep their groups and gloo's threads alive.
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


def _dump_stacks(process: Any) -> None:
    """Has a worker that is late write the stacks of its threads to stderr, which ends it."""
    if process.is_alive():
        os.kill(process.pid, signal.SIGABRT)  # faulthandler answers, even where the GIL is held
        process.join(3)


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the worker was ended by {signal.Signals(-exitcode).name}"
    return f"the worker ended with status {exitcode}"


def _context() -> Any:
    """Forks workers from one process that has imported everything, which takes ten seconds.

    Spawns them on a GPU machine: a fork of a process that has counted the devices can't use them.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning_fastmoe.strategy", "torch._inductor.compile_fx"])
    return context


def _work(connection: Connection, threads: int, environment: dict[str, str]) -> None:
    faulthandler.enable()
    os.environ.clear()  # the fork server may have an earlier pool's environment
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    linear = F.linear
    # Objects created by imports live forever. Scanning them took half a second per collection, and
    # half of the time of all cases: _leave() collects, and so does DeepSpeed for every new engine.
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
            # Leaving the groups can block forever if another rank is stuck, and hide the error.
            connection.send(outcome)
        _leave()
        # ZeRO 3 permanently replaces F.linear by a version that rounds differently: a run would
        # depend on earlier ones.
        F.linear = linear
        connection.send(outcome)
        if is_first:  # the first case has imported the rest
            gc.freeze()
            is_first = False


def _enter(rank: int, world_size: int, ranks_per_node: int, port: int) -> None:
    """Sets the environment that torchrun gives to a process, which Lightning recognises."""
    node, local_rank = divmod(rank, ranks_per_node)
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            # As DeepSpeed's launcher sets it. Without it, ZeRO 3 on CPUs starts `numactl` to count
            # them, for each bucket of gradients: a tenth of a small run's time.
            "LOCAL_SIZE": str(ranks_per_node),
            "GROUP_RANK": str(node),
            "TORCHELASTIC_RUN_ID": f"pool-{port}",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    )
    if ranks_per_node < world_size:
        # NCCL takes them for other machines: it uses sockets between them, and allows that their
        # first ranks have the same GPU.
        os.environ["NCCL_HOSTID"] = f"node{node}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def _leave() -> None:
    """Destroys the process groups, and resets DeepSpeed's module-level references to them."""
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
