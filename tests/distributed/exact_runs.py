"""What the ranks run in test_exact.py, and on GPUs in its twin: bits beside those of one process.

One process has the tokens of all ranks, in the order of the ranks: every product then has the rows
that it has where experts are sharded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed.dedup_runs import poisoned
from distributed.devices import join
from distributed.schedule_runs import PLACEMENTS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_fastmoe.distributed import ExchangeWait
from lightning_fastmoe.distributed.schedule import schedule_across_ranks
from lightning_fastmoe.distributed.schedule.exact import ExactSchedule
from lightning_fastmoe.distributed.symmetric import SymmetricExchange
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import LocalSchedule, ModuleExperts, Routing, Schedule, StackedExperts
from lightning_fastmoe.nn.experts import Experts, SharedExpert
from lightning_fastmoe.nn.experts.lora import add_adapters
from lightning_fastmoe.nn.experts.trained import train_rows
from lightning_fastmoe.nn.inputs import TokenInputs
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.ops import exchange as ops

D, F, E, T = 64, 32, 8, 40

EXACT = {"output", "x", "later output", "gradient of later x"}
"""What has the bits of one process; without biases, the weights' gradients have them, too."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        top_k: K.
        choice: "any" experts, "one" for all tokens, the "first" K for all tokens, or "never" the
            last; with "repeats" of one expert in a token; or the "experts" choose tokens.
        kept: the share of slots that isn't dropped.
        tokens: the number of tokens per rank; rank r uses entry r modulo the length.
        kind: experts that are "plain", "biased", "composed" of operations, have "hooks" as under
            ZeRO 3 or "adapters", or are "modules".
        shared: whether there is a shared expert.
        how: "trained", "checkpointed", "evaluated", in "two graphs" whose backward passes run in
            the other order, or with "frozen" tokens or experts.
    """

    top_k: int = 3
    choice: str = "any"
    kept: float = 1.0
    tokens: tuple[int, ...] = (T, T + 7, T - 5)
    kind: str = "plain"
    shared: bool = False
    how: str = "trained"


CASES = {
    "plain": Case(),
    "one expert per token": Case(top_k=1),
    "one expert per token, and dropped slots": Case(top_k=1, kept=0.6),
    "one expert per token, and biases": Case(top_k=1, kind="biased"),
    "every expert": Case(top_k=E),
    "more slots than experts": Case(top_k=20, choice="repeats"),
    "no tokens on some ranks": Case(tokens=(0, T)),
    "no tokens": Case(tokens=(0,)),
    "a token": Case(tokens=(1, 0)),
    "all tokens on two experts": Case(top_k=2, choice="first"),
    "an expert without tokens": Case(top_k=2, choice="never"),
    "dropped slots": Case(kept=0.6),
    "almost all slots dropped": Case(kept=0.05),
    "biases": Case(kind="biased", shared=True),
    "biases and dropped slots": Case(kind="biased", kept=0.6),
    "a shared expert": Case(shared=True),
    "composed": Case(kind="composed"),
    "hooks": Case(kind="hooks"),
    "adapters": Case(kind="adapters", kept=0.8),
    "modules": Case(kind="modules"),
    "checkpointed": Case(how="checkpointed"),
    "checkpointed biases": Case(kind="biased", how="checkpointed"),
    "two graphs": Case(how="two graphs"),
    "expert choice": Case(choice="experts"),
    "evaluated": Case(how="evaluated", kept=0.8),
    "frozen tokens": Case(how="frozen tokens"),
    "frozen experts": Case(how="frozen experts"),
}


def make_experts(kind: str, device: torch.device, dtype: torch.dtype) -> Experts:
    """All experts of a layer, the same on each rank."""
    torch.manual_seed(5)
    if kind == "modules":
        modules = ModuleExperts(lambda: nn.Linear(D, D), (), E, layer_seed=1)
        return modules.to(device, dtype)
    activation = "clamped_swiglu" if kind == "composed" else "swiglu"
    biased = kind == "biased"
    experts = StackedExperts(D, F, E, layer_seed=1, activation=activation, bias=biased)
    experts = experts.to(device, dtype)
    if biased:
        for bias in (experts.up_bias, experts.down_bias):
            nn.init.normal_(bias)
    if kind == "adapters":
        stacks = {"up_proj": experts.up_proj, "down_proj": experts.down_proj}
        for name in add_adapters(experts, stacks, 8, 2.0, expert_ids=range(E)):
            nn.init.normal_(experts.get_parameter(name), std=0.1)
    if kind == "hooks":
        experts.register_forward_pre_hook(lambda *_: None)
    return experts


def inputs_of(
    case: Case, rank: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weights, experts, which slots are kept, and the output's gradient."""
    generator = torch.Generator().manual_seed(rank)
    tokens = case.tokens[rank % len(case.tokens)]
    logits = torch.randn(tokens, E, generator=generator)
    if case.choice == "first":
        logits[:, : case.top_k] += 100.0
    if case.choice == "never":
        logits[:, -1] = -torch.inf
    if case.choice == "repeats":
        ids = torch.randint(E, (tokens, case.top_k), generator=generator)
    else:
        ids = logits.topk(case.top_k, dim=1).indices
    if case.choice == "experts":
        return _expert_choice(tokens, logits, generator, device, dtype)
    weights = torch.rand(tokens, case.top_k, generator=generator)
    kept = torch.rand(tokens, case.top_k, generator=generator) < case.kept
    x, upstream = (torch.randn(tokens, D, generator=generator).to(device, dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, weights.to(device, wide), ids.to(device), kept.to(device), upstream


def _expert_choice(
    tokens: int,
    logits: Tensor,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`inputs_of`, with the token of each pair in place of which slots are kept."""
    each = tokens // 3
    token_ids = logits.T.topk(each, dim=1).indices.reshape(-1)
    ids = torch.arange(E).repeat_interleave(each)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(len(ids), generator=generator)
    x, upstream = (torch.randn(tokens, D, generator=generator).to(device, dtype) for _ in range(2))
    return x, weights.to(device, wide), ids.to(device), token_ids.to(device), upstream


def run_case(
    case: Case, schedule: Schedule, experts: Experts, given: Any, dense: Any, mine: slice
) -> dict[str, Tensor]:
    """This rank's outputs and gradients.

    Args:
        case: what is run.
        schedule: runs it.
        experts: of it.
        given: of :func:`inputs_of`.
        dense: the shared expert or None, which a process runs on the tokens of each rank apart.
        mine: this rank's tokens among the given.
    """
    x, weights, ids, kept, upstream = given
    x, weights = x.clone(), weights.clone()
    if case.how != "frozen tokens":
        x.requires_grad_()
        weights.requires_grad_()
    experts.requires_grad_(case.how != "frozen experts")
    logits = torch.zeros(len(x), E, device=x.device)

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        dropped = {} if case.kept == 1.0 else {"kept": kept}
        if case.choice == "experts":
            dropped = {"token_ids": kept}
        routing = Routing(logits, logits, weights, ids, **dropped)
        return schedule.run(TokenInputs([x], None, (len(x),)), routing, experts, None, "a layer")[0]

    if case.how == "evaluated":
        with torch.inference_mode():
            return {"output": forward(x, weights)[mine].clone()}
    if case.how == "checkpointed":
        out = checkpoint(forward, x, weights, use_reentrant=False)
    else:
        out = forward(x, weights)
    outputs, grads, found = [out], [upstream], {"output": out[mine]}
    if dense is not None:
        outputs.append(dense(x[mine]))
        grads.append(upstream[mine])
        found["output"] = out[mine] + outputs[1]
    if case.how == "two graphs":
        later = forward(x, weights)
        gradient = torch.autograd.grad(later, x, 2 * upstream)[0]
        found |= {"later output": later[mine], "gradient of later x": gradient[mine]}
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, materialize_grads=True)
    if case.choice == "experts":
        del leaves["weights"]  # of pairs, not of tokens
        gradients = (gradients[0], *gradients[2:])
    for name, gradient in zip(leaves, gradients, strict=True):
        found[name] = gradient[mine] if name in ("x", "weights") else gradient
    return {name: value.detach() for name, value in found.items()}


Results = dict[tuple[str, str], dict[str, Any]]


def compared(names: list[str], device_type: str, *rest: Any, **options: Any) -> Results:
    """(Dispatcher, case) -> the tensors without the bits of one process, and how far off."""
    # On GPUs filling memory is part of a mode in which cuBLAS refuses to work.
    run = poisoned(_compared) if device_type == "cpu" else _compared
    return run(names, device_type, *rest, **options)


def _compared(
    names: list[str],
    device_type: str,
    dtype: torch.dtype,
    placement: str = "equal blocks",
    exact: bool = True,
    cases: tuple[str, ...] = tuple(CASES),
    alone: bool = False,
) -> Results:
    """See :func:`compared`.

    Args:
        names: dispatchers.
        device_type: "cpu" or "cuda".
        dtype: of tokens and experts.
        placement: a name of PLACEMENTS.
        exact: whether layers are.
        cases: names of CASES.
        alone: whether the one process has this rank's tokens only: rows of products then have other
            neighbours. Gradients of experts are not compared.
    """
    device, group = join(device_type)
    group.wait = ExchangeWait(30.0, rank=group.rank, look=2e-3)
    rank, world = group.rank, group.size
    placed = [list(ids) for ids in PLACEMENTS[placement](world)]
    schedules = {name: schedule_across_ranks(name, group, E, placed, exact) for name in names}
    results: Results = {}
    for what in cases:
        case = CASES[what]
        whole, *parts = (make_experts(case.kind, device, dtype) for _ in range(1 + len(names)))
        dense = None
        if case.shared:
            dense = SharedExpert(D, F, activation="silu", bias=False, gate=False, init_std=None)
            for parameter in dense.parameters():
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2), std=0.1)
            dense = dense.to(device, dtype).requires_grad_(False)
        everyone = [inputs_of(case, r, device, dtype) for r in range(world)]
        ends = [0, *itertools.accumulate(len(given[0]) for given in everyone)]
        numbered = everyone
        if case.choice == "experts":
            pairs = zip(everyone, ends[:-1], strict=True)
            numbered = [(*given[:3], given[3] + begin, given[4]) for given, begin in pairs]
        all_tokens = [torch.cat(part) for part in zip(*numbered, strict=True)]
        mine = slice(ends[rank], ends[rank + 1])
        if alone:
            all_tokens, mine = list(everyone[rank]), slice(None)
        right = run_case(case, LocalSchedule(E), whole, all_tokens, dense, mine)
        for name, part in zip(names, parts, strict=True):
            part.keep(placed[rank])
            found = run_case(case, schedules[name], part, everyone[rank], dense, slice(None))
            unequal, errors = [], {}
            for key, value in found.items():
                if alone and key not in (*EXACT, "weights"):
                    continue
                expected = right[key]
                if key in dict(part.named_parameters()) and part.is_stacked:
                    expected = expected[placed[rank]]
                assert value.dtype == expected.dtype, (what, key)
                if not torch.equal(value, expected):
                    unequal.append(key)
                scale = float(expected.double().norm()) or 1.0
                errors[key] = float((value.double() - expected.double()).norm()) / scale
            results[name, what] = {"unequal": unequal, "errors": errors}
    return results


def memory_and_waits() -> dict[str, Any]:
    """What symmetric memory was needed for, and how often the host waited for counts.

    All tokens of both ranks choose experts of rank 0, which returns a row for each of their slots.
    """
    _, group = join("cpu")
    schedule = schedule_across_ranks("symmetric", group, E, equal_blocks(E, 2), True)
    exchange = SymmetricExchange.of(group)
    part = make_experts("plain", torch.device("cpu"), torch.float32)
    part.keep(equal_blocks(E, 2)[group.rank])
    case = Case(top_k=4, choice="first", tokens=(300,))
    given = inputs_of(case, group.rank, torch.device("cpu"), torch.float32)
    read, reads = SymmetricExchange.read_counts, []

    def reading(*args: Any) -> Tensor:
        reads.append(args)
        return read(*args)

    with (
        patch.object(SymmetricExchange, "read_counts", reading),
        patch.object(dist, "all_to_all_single", side_effect=AssertionError),
        patch.object(dist, "all_gather", side_effect=AssertionError),
    ):
        run_case(case, schedule, part, given, None, slice(None))
    rows = 4 * 300
    return {
        "reads": len(reads),
        "has room": exchange.capacity >= rows * (D * 4 + ops.ALIGNMENT),
        "not much more": exchange.capacity <= rows * (D * 4 + ops.ALIGNMENT) * 9 / 8 + (1 << 16),
    }


def waits(name: str, device_type: str) -> list[bool]:
    """Whether each tensor of a second pass has the bits of the first.

    On a GPU the second raises where it synchronises otherwise than by waiting for the counts.
    """
    device, group = join(device_type)
    schedule = schedule_across_ranks(name, group, E, equal_blocks(E, group.size), True)
    part = make_experts("plain", device, torch.bfloat16)
    part.keep(equal_blocks(E, group.size)[group.rank])
    given = inputs_of(Case(), group.rank, device, torch.bfloat16)
    found: list[dict[str, Tensor]] = []
    for mode in ("default", "error"):
        if device_type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
        try:
            found.append(run_case(Case(), schedule, part, given, None, slice(None)))
        finally:
            if device_type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return [torch.equal(value, found[1][key]) for key, value in found[0].items()]


def way_across_nodes() -> str:
    """The schedule that "dedup" is for the pool's nodes."""
    _, group = join("cpu")
    schedule = schedule_across_ranks("dedup", group, E, equal_blocks(E, group.size), True)
    assert isinstance(schedule, ExactSchedule)
    return type(schedule.way).__name__


def refused() -> str:
    """The error on this rank, of experts of which single ones are trained."""
    _, group = join("cpu")
    schedule = schedule_across_ranks("dedup", group, E, equal_blocks(E, group.size), True)
    part = make_experts("plain", torch.device("cpu"), torch.float32)
    part.keep(equal_blocks(E, group.size)[group.rank])
    train_rows(part, ["up_proj", "down_proj"], part.local_ids, [1])
    given = inputs_of(Case(), group.rank, torch.device("cpu"), torch.float32)
    try:
        run_case(Case(), schedule, part, given, None, slice(None))
    except ConfigError as error:
        return str(error)
    return "none"
