"""What the ranks run in test_symmetric.py, and on GPUs in its twin."""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed.devices import join
from torch import Tensor

from lightning_fastmoe.distributed import ExchangeWait, ExpertGroup
from lightning_fastmoe.distributed.schedule import symmetric as schedule
from lightning_fastmoe.distributed.schedule.symmetric import SymmetricSchedule
from lightning_fastmoe.distributed.symmetric import SymmetricExchange, memory
from lightning_fastmoe.distributed.symmetric.flags import Flags
from lightning_fastmoe.distributed.symmetric.layer import Expectation
from lightning_fastmoe.distributed.symmetric.operators import OperatorPassage
from lightning_fastmoe.distributed.symmetric.tokens import Passage
from lightning_fastmoe.errors import ExchangeError, TopologyError
from lightning_fastmoe.nn import LocalSchedule, Routing, StackedExperts
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.ops import exchange as ops
from lightning_fastmoe.ops.stall import stall_report

D, F, E, K = 16, 8, 8, 3


class Layer:
    """This rank's layer, and the same with all experts on this rank.

    Args:
        device_type: "cpu" or "cuda".
        seconds: how long ranks wait for each other.
        dtype: of tokens and weights.
        slots: experts of each token.
    """

    def __init__(
        self,
        device_type: str,
        seconds: float | None = 60.0,
        dtype: torch.dtype = torch.float64,
        slots: int = K,
    ) -> None:
        self.device, self.group = join(device_type)
        self.group.wait = ExchangeWait(seconds, rank=self.group.rank, look=0.05)
        self.dtype, self.slots = dtype, slots
        placement = equal_blocks(E, self.group.size)
        self.held = list(placement[self.group.rank])
        self.whole = StackedExperts(D, F, E, layer_seed=1).to(self.device, dtype)
        self.part = StackedExperts(D, F, E, layer_seed=1).to(self.device, dtype)
        self.part.keep(placement[self.group.rank])
        self.schedule = SymmetricSchedule(self.group, E, placement)
        self.exchange = SymmetricExchange.of(self.group)

    def inputs(self, call: int, tokens: int) -> tuple[TokenInputs, Routing]:
        """What this rank has in a call."""
        generator = torch.Generator().manual_seed(100 * call + self.group.rank)

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return drawn.to(self.device, self.dtype)

        x, weights, logits = draw(tokens, D), draw(tokens, self.slots), draw(tokens, E)
        ids = logits.topk(self.slots, dim=1).indices
        routing = Routing(logits, logits, weights.requires_grad_(), ids)
        return TokenInputs([x.requires_grad_()], None, (tokens,)), routing

    def run(self, given: tuple[TokenInputs, Routing], layer: str = "a layer") -> list[Tensor]:
        """Output and gradients."""
        out, _ = self.schedule.run(*given, self.part, None, layer)
        leaves = [given[0].tokens, given[1].weights, *self.part.parameters()]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    def run_whole(self, given: tuple[TokenInputs, Routing]) -> list[Tensor]:
        """The same with all experts here, and the weights' gradients of all ranks."""
        out, _ = LocalSchedule(E).run(*given, self.whole, None, "a layer")
        leaves = [given[0].tokens, given[1].weights, *self.whole.parameters()]
        grads = list(torch.autograd.grad(out.square().sum(), leaves))
        for i in range(2, len(grads)):
            dist.all_reduce(grads[i])
            grads[i] = grads[i][self.held]
        return [out.detach(), *grads]

    def poison(self) -> None:
        """NaN into the memory that others push to, while nobody does."""
        self.meet()
        if self.exchange.rows is not None:
            self.exchange.rows.own.fill_(0xFF)
        self.meet()

    def meet(self) -> None:
        """Waits for all ranks, and for what they have launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def numbers_of_tokens(device_type: str, calls: list[tuple[int, ...]]) -> dict[str, Any]:
    """Calls with other numbers of tokens on each rank: how far off, and how often memory grew."""
    layer = Layer(device_type)
    errors, capacities = [], []
    for call, tokens in enumerate(calls):
        layer.poison()
        given = layer.inputs(call, tokens[layer.group.rank % len(tokens)])
        pairs = zip(layer.run(given), layer.run_whole(given), strict=True)
        errors.append(max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs))
        capacities.append(layer.exchange.capacity)
    return {"errors": errors, "capacities": capacities}


@contextmanager
def step_by_step() -> Iterator[None]:
    """Within it, layers launch their passes step by step on Hopper GPUs, too."""

    def passage(x: Tensor, weights: Tensor, stacks: Any, *given: Any) -> Passage:
        return Passage(*given)

    with patch.object(schedule, "passage_for", passage):
        yield


def frozen_parts(device_type: str, steps: int) -> list[str]:
    """What is frozen where some bit by operators isn't that of the same pass step by step."""
    layer = Layer(device_type, dtype=torch.bfloat16)
    wrong = []
    for frozen in itertools.product((False, True), repeat=4):
        for step in range(steps):
            inputs, routing = layer.inputs(step, 60 + 30 * layer.group.rank)
            leaves = [inputs.tokens, routing.weights, *layer.part.parameters()]
            for leaf, is_frozen in zip(leaves, frozen, strict=True):
                leaf.requires_grad_(not is_frozen)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]

            def run(wanted: list[Tensor] = wanted, given: Any = (inputs, routing)) -> list[Tensor]:
                out, _ = layer.schedule.run(*given, layer.part, None, "a layer")
                if not wanted:
                    return [out]
                return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]

            found = run()
            with step_by_step():
                right = run()
            if not all(map(torch.equal, found, right)):
                wrong.append(f"{frozen} in step {step}")
    return wrong


def reading_ahead(device_type: str, calls: list[tuple[int, ...]], slots: int = K) -> dict[str, Any]:
    """Calls that launch the experts before the host knows any count, beside calls that wait.

    Returns:
        The calls of which some bit differs; and how each received its rows.
    """
    # On a GPU the kernels that take more rows than there are want half precision.
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float64
    layer = Layer(device_type, dtype=dtype, slots=slots)
    expectation, wrong, how = Expectation(), [], []
    receive, ahead = Passage.receive, Passage.receive_ahead
    operators = OperatorPassage.experts_ahead
    for call, tokens in enumerate(calls):
        given = layer.inputs(call, tokens[layer.group.rank % len(tokens)])
        layer.schedule.expectation = expectation
        layer.poison()
        seen: list[str] = []
        with (
            patch.multiple(
                Passage,
                receive=lambda *args: (seen.append("exactly"), receive(*args))[1],  # noqa: B023
                receive_ahead=lambda *args: (seen.append("ahead"), ahead(*args))[1],  # noqa: B023
            ),
            patch.object(
                OperatorPassage,
                "experts_ahead",
                lambda *args: (seen.append("by operators"), operators(*args))[1],  # noqa: B023
            ),
        ):
            found = layer.run(given)
        how.append(" then ".join(seen))
        layer.schedule.expectation = None
        with step_by_step():
            right = layer.run(given)
        if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
            wrong.append(call)
    return {"wrong": wrong, "how": how}


def validated_first(device_type: str) -> dict[str, Any]:
    """Training after a larger validation: what the layer keeps for a backward pass.

    Returns:
        How far off the training pass is; the bytes of what its graph keeps, with and without the
        validation before; and what the passage still has of the rows that were sent.
    """
    layer = Layer(device_type)
    given = layer.inputs(1, 10)
    kept, errors, parts = [], [], []
    for validates in (True, False):
        layer.schedule.expectation = Expectation()
        if validates:
            inputs, routing = layer.inputs(0, 400)
            with torch.inference_mode():
                for _ in range(2):
                    layer.schedule.run(inputs, routing, layer.part, None, "a layer")
        pairs = zip(layer.run(given), layer.run_whole(given), strict=True)
        errors.append(max(float((a - b).abs().max()) for a, b in pairs))
        storages: dict[int, int] = {}

        def count(tensor: Tensor, seen: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out, _ = layer.schedule.run(*given, layer.part, None, "a layer")
        kept.append(sum(storages.values()))
        parts.append(len(out.grad_fn.passage._parts))
        out.sum().backward()
    return {"errors": errors, "kept": kept, "parts": parts}


def without_memory_ahead() -> list[bool]:
    """Whether a pass gives the right bits where there is no memory for rows that might come."""
    layer = Layer("cpu")
    given = layer.inputs(0, 50)
    right = layer.run(given)
    layer.schedule.expectation = Expectation()
    layer.run(given)
    error = torch.OutOfMemoryError("no memory")
    with (
        patch.object(Passage, "receive_ahead", side_effect=error) as ahead,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        found = layer.run(given)
    return [ahead.called, "no memory" in str(said[0].message), *map(torch.equal, found, right)]


@contextmanager
def delays(layer: Layer, seconds: float) -> Iterator[None]:
    """Random pauses before and after each push and each wait, of the host and of the stream."""
    random_of_rank = random.Random(layer.group.rank)  # noqa: S311 - not for secrets
    places: list[tuple[Any, str]] = [
        *(
            (SymmetricExchange, name)
            for name in ("begin_counts", "begin_rows", "read_counts", "send")
        ),
        *((ops, name) for name in ("push_rows", "set_flags")),  # apart on the CPU
        *((Flags, name) for name in ("wait", "awaited", "start_reading", "finish_reading")),
        *((OperatorPassage, name) for name in ("_launch", "experts_ahead", "combine", "backward_")),
    ]
    before = [getattr(*place) for place in places]

    def pause() -> None:
        # Most pauses are none, so that ranks are far apart now and then.
        length = seconds * max(0.0, random_of_rank.uniform(-3.0, 1.0))
        if length and layer.device.type == "cuda":
            torch.cuda._sleep(int(length * 1e9))
        time.sleep(length)

    def paused(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            pause()
            result = function(*args, **kwargs)
            pause()
            return result

        return run

    for place, function in zip(places, before, strict=True):
        setattr(*place, paused(function))
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)


def at_random_times(device_type: str, steps: int, seconds: float) -> list[int]:
    """Steps of which some bit isn't that of the same step without delays."""
    # On a GPU in half precision, for which the experts are launched before counts are known.
    layer = Layer(device_type, dtype=torch.bfloat16 if device_type == "cuda" else torch.float32)
    tokens = [40 + 7 * layer.group.rank, 33, 50]
    given = [layer.inputs(call, count) for call, count in enumerate(tokens)]
    with step_by_step():
        right = [layer.run(each) for each in given]
    wrong = []
    with delays(layer, seconds):
        for step in range(steps):
            found = layer.run(given[step % 3])
            if not all(map(torch.equal, found, right[step % 3])):
                wrong.append(step)
    layer.meet()
    return wrong


def faults(device_type: str, kind: str) -> tuple[str, float]:
    """The error on this rank and the seconds that it took.

    Args:
        device_type: "cpu" or "cuda".
        kind: rank 1 "never comes", or comes with "other layers", or is at "the end" of the step, or
            has "given up".
    """
    layer = Layer(device_type, 3.0)
    rank = layer.group.rank
    layer.run(layer.inputs(0, 10))
    layer.meet()
    store = dist.distributed_c10d._get_default_store()
    name = f"layer {rank}" if kind == "other layers" else "a layer"
    if kind == "given up":
        layer.group.wait.seconds = 100.0
    begin, error = time.monotonic(), "none"
    if kind in ("never comes", "given up") and rank == 1:
        if kind == "given up":
            layer.exchange.group.give_up()
        store.wait(["over"])
        return "", 0.0
    try:
        if kind == "the end" and rank == 1:
            layer.group.end_pass(layer.device)
        layer.run(layer.inputs(1, 10), name)
    except ExchangeError as raised:
        error = str(raised)
    took = time.monotonic() - begin
    again = ""
    if kind == "never comes":
        try:
            layer.run(layer.inputs(2, 10))
        except ExchangeError as raised:
            again = str(raised)
        error += "\nthen: " + again
    store.set("over", "")
    return error, took


def interrupted() -> str:
    """What the next exchange of a rank says whose user interrupted the one before."""
    layer = Layer("cpu", 1800.0)
    store = dist.distributed_c10d._get_default_store()
    if layer.group.rank == 1:
        store.wait(["over"])
        return ""
    with (
        patch.object(ExchangeWait, "for_event", side_effect=KeyboardInterrupt),
        suppress(KeyboardInterrupt),
    ):
        layer.run(layer.inputs(0, 10))
    try:
        layer.run(layer.inputs(1, 10))
    except ExchangeError as error:
        said = str(error)
    store.set("over", "")
    return said


def without_backward() -> str:
    """The error on this rank, where rank 1 makes no backward pass; on the CPU."""
    layer = Layer("cpu", 2.0)
    store = dist.distributed_c10d._get_default_store()
    given = layer.inputs(0, 10)
    out, _ = layer.schedule.run(*given, layer.part, None, "a layer")
    if layer.group.rank == 1:
        store.wait(["over"])
        return ""
    try:
        out.sum().backward()
    except ExchangeError as error:
        return str(error)
    finally:
        store.set("over", "")
    return "none"


def other_order() -> str:
    """The error on this rank, where ranks make the backward passes of two calls in other orders."""
    layer = Layer("cpu", 5.0)
    outs = [
        layer.schedule.run(*layer.inputs(call, 10), layer.part, None, "a layer")[0]
        for call in range(2)
    ]
    try:
        for out in outs if layer.group.rank else reversed(outs):
            out.sum().backward()
    except ExchangeError as error:
        return str(error)
    return "none"


def other_dtypes() -> str:
    """The error on this rank, where ranks compute in different dtypes."""
    layer = Layer("cpu", 5.0, torch.float32 if dist.get_node_local_rank() else torch.float64)
    try:
        layer.run(layer.inputs(0, 10))
    except ExchangeError as error:
        return str(error)
    return "none"


def refused(kind: str) -> str:
    """The error on this rank: of a group on two "hosts", or where memory "fails" on rank 1.

    Or on another processor ("arm").
    """
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    group = ExpertGroup(dist.group.WORLD)
    host, new, machine = memory._host, torch.from_file, platform.machine

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no memory left")

    try:
        if kind == "hosts":
            memory._host = lambda: f"host {group.rank}"
        elif kind == "arm":
            platform.machine = lambda: "aarch64"
        elif group.rank == 1:
            torch.from_file = fail
        SymmetricSchedule(group, E, equal_blocks(E, group.size))
    except TopologyError as error:
        return str(error)
    finally:
        memory._host, torch.from_file, platform.machine = host, new, machine
    return "none"


def without_backward_on_device(folder: str) -> None:
    """Writes the error of rank 0, where rank 1 makes no backward pass, and ends the process."""
    layer = Layer("cuda", 3.0)
    given = layer.inputs(0, 10)
    out, _ = layer.schedule.run(*given, layer.part, None, "a layer")
    layer.meet()
    said = {"device": "", "next": "", "report": "", "seconds": 0.0}
    if layer.group.rank == 0:
        begin = time.monotonic()
        try:
            out.sum().backward()
            torch.cuda.synchronize()
        except RuntimeError as error:
            said["device"] = str(error)
        said["seconds"] = time.monotonic() - begin
        said["report"] = stall_report()
        try:
            layer.exchange.flags.check()  # what the next exchange does first
        except ExchangeError as error:
            said["next"] = str(error)
    else:
        time.sleep(15.0)
    Path(folder, f"rank{layer.group.rank}.json").write_text(json.dumps(said))
    os._exit(1)  # what else ends a process may wait for the device
