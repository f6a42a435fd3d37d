"""The contract of schedules: the same numbers as with all experts on one rank."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fastmoe.nn import LocalSchedule, ModuleExperts, Routing, Schedule, StackedExperts
from lightning_fastmoe.nn.experts import Experts, SharedExpert
from lightning_fastmoe.nn.inputs import TokenInputs

D, F, E, T = 6, 5, 8, 11


@dataclass(frozen=True)
class Case:
    """One call of a schedule.

    Attributes:
        top_k: K.
        choice: "any" expert, "one" for all tokens, the "first" K for all tokens, one expert
            "twice", the last expert "never", "dropped" slots, "almost all dropped", "expert"
            choice, or "soft" routing.
        tokens: the number of tokens per rank; rank r uses entry r modulo the length.
        experts: "stacked", "biased", or "modules", which take a pair of tensors.
        shared: whether there is a shared expert.
        delays: whether ranks arrive at random times, for several calls in a row.
    """

    top_k: int = 2
    choice: str = "any"
    tokens: tuple[int, ...] = (T, T + 3)
    experts: str = "stacked"
    shared: bool = False
    delays: bool = False


CASES = {
    "plain": Case(),
    "one expert per token": Case(top_k=1),
    "every expert": Case(top_k=E),
    "no tokens on some ranks": Case(tokens=(0, T)),
    "no tokens": Case(tokens=(0,)),
    "all tokens on one expert": Case(top_k=1, choice="one"),
    "an expert without tokens": Case(choice="never"),
    "all tokens on two experts": Case(choice="first"),
    "an expert twice": Case(top_k=3, choice="twice"),
    "almost all slots dropped": Case(top_k=3, choice="almost all dropped"),
    "dropped slots": Case(top_k=3, choice="dropped"),
    "expert choice": Case(choice="expert"),
    "soft routing": Case(top_k=1, choice="soft", tokens=(12,)),
    "biases": Case(experts="biased", shared=True),
    "biases and dropped slots": Case(experts="biased", choice="dropped"),
    "modules": Case(experts="modules"),
    "modules and dropped slots": Case(experts="modules", choice="dropped", tokens=(0, T)),
    "ranks at random times": Case(delays=True),
}
"""The cases of the contract, by name."""


class PairExpert(nn.Module):
    """An expert from a pair of tensors (n, D) and (n, 2, 3) to a pair of the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mixes them, so that both get a gradient through both."""
        x, extra = pair
        y = torch.tanh(self.inner(x)) * extra.sum(dim=(1, 2)).unsqueeze(1)
        return y, extra * y.sum(dim=1).view(-1, 1, 1)


def compare_with_local(
    make: Callable[[int], Schedule],
    placement: Sequence[Sequence[int]],
    case: Case,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and gradients of a schedule and of :class:`LocalSchedule`; all ranks must call this.

    Args:
        make: makes this rank's schedule from the number of experts.
        placement: global ids of each rank's experts.
        case: the case to run.
        device: the device of the tensors.
        dtype: the dtype of the tensors.

    Returns:
        Name -> (value by the schedule, value with all experts on one rank), on the CPU. Gradients
        of parameters are summed over the losses of all ranks.
    """
    rank = dist.get_rank()
    torch.manual_seed(3)
    whole = _experts(case, dtype).to(device)
    part = _experts(case, dtype).to(device)
    part.load_state_dict(whole.state_dict())
    part.keep(placement[rank])
    shared = None
    if case.shared:
        shared = SharedExpert(D, F, activation="silu", bias=True, gate=True, init_std=None)
        shared = shared.to(device, dtype)
    schedule, local = make(E), LocalSchedule(E)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    sleeper = random.Random(rank)  # noqa: S311 - not for secrets
    for call in range(6 if case.delays else 1):
        if case.delays:
            time.sleep(sleeper.uniform(0.0, 0.02))
        inputs, routing, leaves = _inputs(case, rank, call, device, dtype)
        sides: list[Any] = []
        for run, experts in ((schedule, part), (local, whole)):
            y, after = run.run(inputs, routing, experts, shared, "a layer")
            if after.tokens_per_expert is not None:  # counted by the schedule
                counts = (after.tokens_per_expert.double(), routing.routed_counts().double())
                found[f"{call}: tokens per expert of {len(sides)}"] = counts
            outputs = pytree.tree_leaves(y)
            upstream = [torch.linspace(-1, 1, o.numel()).to(o).view_as(o) for o in outputs]
            wanted = [*leaves, *experts.parameters()]
            grads = torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True)
            sides.append((outputs, grads[: len(leaves)], grads[len(leaves) :]))
        (outputs, by_leaf, of_part), (right_outputs, right_by_leaf, of_whole) = sides
        for i, pair in enumerate(zip(outputs, right_outputs, strict=True)):
            found[f"{call}: output {i}"] = pair
        for i, pair in enumerate(zip(by_leaf, right_by_leaf, strict=True)):
            found[f"{call}: gradient of input {i}"] = pair
        right = dict(zip((n for n, _ in whole.named_parameters()), of_whole, strict=True))
        for gradient in right.values():
            dist.all_reduce(gradient)
        for (name, _), gradient in zip(part.named_parameters(), of_part, strict=True):
            rows = right[name][list(placement[rank])] if part.is_stacked else right[name]
            found[f"{call}: gradient of {name}"] = (gradient, rows)
    return {name: (a.detach().cpu(), b.detach().cpu()) for name, (a, b) in found.items()}


def _experts(case: Case, dtype: torch.dtype) -> Experts:
    experts: Experts
    if case.experts == "modules":
        experts = ModuleExperts(PairExpert, (), E, layer_seed=1)
    else:
        bias = case.experts == "biased"
        experts = StackedExperts(D, F, E, layer_seed=1, bias=bias)
        for parameter in (experts.up_bias, experts.down_bias):
            if parameter is not None:
                nn.init.normal_(parameter)
    return experts.to(dtype)


def _inputs(
    case: Case, rank: int, call: int, device: torch.device, dtype: torch.dtype
) -> tuple[TokenInputs, Routing, list[Tensor]]:
    """The inputs and routing of this rank's call, and those tensors that need gradients."""
    generator = torch.Generator().manual_seed(100 * call + rank)
    tokens = case.tokens[rank % len(case.tokens)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    x = normal(tokens, D)
    leaves, spec = [x], None
    if case.experts == "modules":
        leaves.append(normal(tokens, 2, 3))
        spec = pytree.tree_flatten(tuple(leaves))[1]
    routing, weights = _routing(case, tokens, generator, normal)
    there: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in routing._asdict().items()
    }
    routing = Routing(**there)
    return TokenInputs(list(leaves), spec, (tokens,)), routing, [*leaves, *weights]


def _routing(
    case: Case, tokens: int, generator: torch.Generator, normal: Any
) -> tuple[Routing, list[Tensor]]:
    choice, k = case.choice, case.top_k
    if choice == "soft":
        groups, slots, n = 2, E, tokens // 2
        dispatch, combine = normal(groups, slots, n), normal(groups, n, slots)
        ids = torch.arange(E).repeat(groups).unsqueeze(1)
        ones = torch.ones(len(ids), 1).to(dispatch)
        logits = torch.zeros(tokens, E)
        mixes = {"dispatch_mix": dispatch, "combine_mix": combine}
        return Routing(logits, logits, ones, ids, **mixes), [dispatch, combine]
    logits = torch.randn(tokens, E, generator=generator)
    if choice == "never":
        logits[:, -1] = -torch.inf
    if choice == "one":
        logits[:, 1] = torch.inf
    if choice == "expert":
        each = max(1, tokens // 2)
        token_ids = logits.T.topk(each, dim=1).indices.reshape(-1)
        ids = torch.arange(E).repeat_interleave(each)
        weights = normal(len(ids))
        return Routing(logits, logits, weights, ids, token_ids=token_ids), [weights]
    if choice == "first":
        logits[:, :k] += 100.0
    ids = logits.topk(k, dim=1).indices
    if choice == "twice":
        ids[:, -1] = ids[:, 0]
    weights = normal(tokens, k)
    kept = None
    if choice in ("dropped", "almost all dropped"):
        share = 0.6 if choice == "dropped" else 0.05
        kept = torch.rand(tokens, k, generator=generator) < share
    return Routing(logits, logits, weights, ids, kept=kept), [weights]
