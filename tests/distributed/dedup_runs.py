"""What the ranks run in test_dedup.py and test_two_level.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed.devices import join, node_of_each_rank, whole_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe.distributed import (
    ExchangeWait,
    ExpertSharder,
    make_expert_mesh,
)
from lightning_fastmoe.distributed.schedule import ACROSS_RANKS
from lightning_fastmoe.errors import ExchangeError
from lightning_fastmoe.nn import LocalSchedule, MoE, Routing, Schedule, StackedExperts
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.placement import equal_blocks

D, F, E = 8, 16, 8


def poisoned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs it with NaN in memory that nobody has written to."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        before = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            return function(*args)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = before

    return run


class Rank:
    """This rank's schedule, experts, and what is chosen for its tokens."""

    def __init__(
        self, name: str = "dedup", top_k: int = 3, dtype: torch.dtype = torch.float64
    ) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.group = whole_group()
        self.rank, self.world, self.dtype = self.group.rank, self.group.size, dtype
        torch.manual_seed(1)
        self.whole = StackedExperts(D, F, E, layer_seed=1).to(dtype)
        self.part = StackedExperts(D, F, E, layer_seed=1).to(dtype)
        placement = equal_blocks(E, self.world)
        self.part.keep(placement[self.rank])
        self.schedule = ACROSS_RANKS[name](self.group, E, placement)
        self.local = LocalSchedule(E)
        self.top_k = top_k

    def inputs(self, call: int = 0, tokens: int | None = None) -> tuple[TokenInputs, Routing]:
        torch.manual_seed(100 * call + self.rank)
        tokens = 9 + self.rank if tokens is None else tokens
        x = torch.randn(tokens, D, dtype=torch.float64).to(self.dtype).requires_grad_()
        logits = torch.randn(tokens, E)
        ids = logits.topk(self.top_k, dim=1).indices
        weights = torch.rand(tokens, self.top_k, dtype=torch.float64)
        weights = weights.to(torch.float32 if self.dtype == torch.bfloat16 else self.dtype)
        kept = torch.rand(tokens, self.top_k) < 0.8
        routing = Routing(logits, logits, weights.requires_grad_(), ids, kept=kept)
        return TokenInputs([x], None, (tokens,)), routing

    def run(
        self, given: tuple[TokenInputs, Routing], local: bool = False, layer: str = "a layer"
    ) -> Tensor:
        schedule: Schedule = self.local if local else self.schedule
        experts = self.whole if local else self.part
        return schedule.run(*given, experts, None, layer)[0]


@poisoned
def rows_sent(name: str) -> tuple[list[tuple[str, int, list[int]]], list[int], list[int]]:
    """(phase, bytes of a row, rows to each rank) of each exchange; pairs and choices per rank."""
    rank = Rank(name)
    sent = []

    def noting(output: Tensor, data: Tensor, receive: list[int], send: list[int], **given: Any):
        _, _, name = rank.group.pending.read()
        row = data.shape[1] * data.element_size()
        sent.append((name.removeprefix("a layer, phase "), row, list(send)))
        assert data.shape[0] == sum(send)
        return real(output, data, receive, send, **given)

    real, dist.all_to_all_single = dist.all_to_all_single, noting
    try:
        given = rank.inputs()
        rank.run(given).sum().backward()
    finally:
        dist.all_to_all_single = real
    per_rank, each = E // rank.world, [0] * rank.world
    choices = [0] * rank.world
    for ids, kept in zip(given[1].expert_ids.tolist(), given[1].kept.tolist(), strict=True):
        owners = [i // per_rank for i, used in zip(ids, kept, strict=True) if used]
        for owner in set(owners):
            each[owner] += 1
        for owner in owners:
            choices[owner] += 1
    return sent, each, choices


@poisoned
def order_of_work() -> tuple[list[str], list[str]]:
    """What is started and finished, and when experts compute, in forward and backward."""
    rank = Rank("dedup_overlapped")
    log: list[str] = []
    real = rank.group.start

    def noting(layer: str, phase: str, *args: Any) -> Callable[[], None]:
        log.append(f"start {phase.removesuffix(' (backward)')}")
        finish = real(layer, phase, *args)

        def noted() -> None:
            log.append(f"finish {phase.removesuffix(' (backward)')}")
            finish()

        return noted

    def computed(_module: Any, _args: Any, output: Tensor) -> None:
        log.append("experts")
        output.register_hook(lambda _: log.append("experts"))

    rank.group.start = noting  # type: ignore[method-assign]
    rank.part.register_forward_hook(computed)
    out = rank.run(rank.inputs())
    forward = list(log)
    log.clear()
    out.square().sum().backward()
    return forward, log


@poisoned
def repeated(name: str, dtype: torch.dtype) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Output and gradients of three identical runs, and in fp64 with all experts on one rank."""
    rank = Rank(name, dtype=dtype)
    runs = []
    for _ in range(3):
        given = rank.inputs()
        leaves = [given[0].tokens, given[1].weights]
        out = rank.run(given)
        grads = torch.autograd.grad(out.double().square().sum(), [*leaves, *rank.part.parameters()])
        runs.append([out.detach(), *grads])
    wide = [t.detach().double().requires_grad_() for t in leaves]
    whole = rank.whole.double()
    routing = given[1]._replace(weights=wide[1])
    out, _ = rank.local.run(TokenInputs([wide[0]], None, (len(wide[0]),)), routing, whole, None, "")
    grads = torch.autograd.grad(out.square().sum(), [*wide, *whole.parameters()])
    held = slice(rank.rank * E // rank.world, (rank.rank + 1) * E // rank.world)
    right = [out.detach(), *grads[:2]]
    for gradient in grads[2:]:
        dist.all_reduce(gradient)
        right.append(gradient[held])
    return runs, right


@poisoned
def steps(name: str, how: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients summed over two micro-batches, and those with all experts on one rank.

    Args:
        name: the dispatcher.
        how: "twice" through the same layer in one graph, "two graphs" whose backward passes run in
            the other order, or "checkpointed" twice.
    """
    rank = Rank(name)
    found: dict[str, list[Tensor]] = {}
    for local in (False, True):
        experts = rank.whole if local else rank.part
        first, second = rank.inputs(1), rank.inputs(2)
        leaves = [t for given in (first, second) for t in (given[0].tokens, given[1].weights)]

        def forward(given: Any, local: bool = local) -> Tensor:
            if how == "checkpointed":
                x, weights = given[0].tokens, given[1].weights

                def replayed(x: Tensor, weights: Tensor) -> Tensor:
                    inputs = given[0].with_leaves([x])
                    return rank.run((inputs, given[1]._replace(weights=weights)), local)

                return checkpoint(replayed, x, weights, use_reentrant=False)
            return rank.run(given, local)

        outputs = [forward(first), forward(second)]
        losses = [out.square().sum() for out in outputs]
        if how == "two graphs":
            for loss in reversed(losses):
                loss.backward()
        else:
            (losses[0] + losses[1] * losses[0]).backward()
        values = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        values |= {f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves)}
        for name, parameter in experts.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            if local:
                dist.all_reduce(gradient)
                size = E // rank.world
                gradient = gradient[rank.rank * size : (rank.rank + 1) * size]
            values[name] = gradient
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: (a, b) for name, (a, b) in found.items()}


@poisoned
def faults(name: str, kind: str) -> str:
    """The error on this rank; ranks return together.

    Args:
        name: the dispatcher.
        kind: what rank 1 does, or in which layers the ranks are: each in "other layers", "a node
            elsewhere", "a rank elsewhere".
    """
    rank = Rank(name)
    rank.group.wait = ExchangeWait(seconds=2.0, rank=rank.rank, look=0.1)
    # All ranks stay: one that is gone closes its connections, which shows at once.
    store = dist.distributed_c10d._get_default_store()

    def over(result: str) -> str:
        if store.add("through", 1) == rank.world:
            store.set("over", "")
        store.wait(["over"])
        return result

    if kind == "a rank raises" and rank.rank == 1:
        return over("raised")
    last = rank.world - 1
    layers = {
        "other layers": rank.rank,
        "a node elsewhere": node_of_each_rank()[rank.rank],
        "a rank elsewhere": int(rank.rank == last),
    }
    layer = f"layer {layers[kind]}" if kind in layers else "a layer"
    if kind == "experts raise" and rank.rank == 1:
        rank.part.register_forward_pre_hook(_raise)
    try:
        out = rank.run(rank.inputs(), layer=layer)
        if kind == "no backward" and rank.rank == 1:
            return over("no backward")
        out.sum().backward()
    except ExchangeError as error:
        return over(str(error))
    except ArithmeticError:
        return over("experts raised")
    return over("none")


def _raise(*_: Any) -> None:
    raise ArithmeticError


@poisoned
def layers(names: list[str]) -> dict[str, dict[str, Tensor]]:
    """By dispatcher: output, gradients and counts of a whole layer with capacity, sharded."""
    dist.init_process_group("gloo")
    found: dict[str, dict[str, Tensor]] = {}
    for name in names:
        torch.manual_seed(0)
        layer = MoE(D, F, E, top_k=3, capacity_factor=0.7, dispatcher=name).double()
        model = torch.nn.ModuleList([layer])
        mesh = make_expert_mesh(dist.get_world_size(), "cpu")
        ExpertSharder(mesh, node_of_each_rank()).shard(model)
        torch.manual_seed(dist.get_rank())
        x = torch.randn(3, 7, D, dtype=torch.float64, requires_grad=True)
        seen: list[Routing] = []
        layer.register_routing_observer(lambda _, routing, seen=seen: seen.append(routing))
        out = layer(x)
        out.square().sum().backward()
        values = {"output": out.detach(), "input": x.grad}
        values |= {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        (routing,) = seen
        values["routed"], values["kept"] = routing.routed_counts(), routing.kept_counts()
        values["dropped"] = routing.dropped_counts()
        found[name] = values
    return found


def on_device(name: str, device_type: str) -> list[tuple[Tensor, Tensor]]:
    """In bf16, (found, all experts on this rank in fp64): output, gradients of inputs and weights.

    On a GPU the second pass raises where it synchronises otherwise than by waiting for the counts.
    """
    on_cuda = device_type == "cuda"
    device, group = join(device_type)
    rank, world, experts, width = group.rank, group.size, 16, 64
    parts = [StackedExperts(width, 128, experts, layer_seed=1) for _ in range(2)]
    placement = equal_blocks(experts, world)
    parts[0].keep(placement[rank])
    part, whole = parts[0].to(device, torch.bfloat16), parts[1].to(device, torch.bfloat16).double()
    schedule = ACROSS_RANKS[name](group, experts, placement)
    torch.manual_seed(rank)
    tokens = 300 + 17 * rank
    x = torch.randn(tokens, width).to(device, torch.bfloat16).requires_grad_()
    weights = torch.rand(tokens, 4).to(device).requires_grad_()
    logits = torch.randn(tokens, experts).to(device)
    routing = Routing(logits, logits, weights, logits.topk(4, dim=1).indices)
    upstream = torch.randn(tokens, width).to(device, torch.bfloat16)
    inputs = TokenInputs([x], None, (tokens,))
    found: list[Tensor] = []
    for call in range(2):
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if call else "default")
        out, _ = schedule.run(inputs, routing, part, None, "a layer")
        grads = torch.autograd.grad(out, [x, weights, *part.parameters()], upstream)
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")
        before, found = found, [out.detach(), *grads]
        assert all(torch.equal(a, b) for a, b in zip(before, found, strict=bool(call)))
    wide = [t.detach().double().requires_grad_() for t in (x, weights)]
    routing = routing._replace(weights=wide[1])
    inputs = TokenInputs([wide[0]], None, (tokens,))
    out, _ = LocalSchedule(experts).run(inputs, routing, whole, None, "a layer")
    grads = torch.autograd.grad(out, [*wide, *whole.parameters()], upstream.double())
    for gradient in grads[2:]:
        dist.all_reduce(gradient)
    right = [out.detach(), *grads[:2], *(g[list(placement[rank])] for g in grads[2:])]
    return [(a.cpu(), b.cpu()) for a, b in zip(found, right, strict=True)]
