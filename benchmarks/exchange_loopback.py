"""What "symmetric" costs a layer beside the way of its rows: one GPU plays all ranks.

    python benchmarks/exchange_loopback.py --configs sonic-7b,qwen3-30b-a3b
    python benchmarks/exchange_loopback.py --device cpu --tiny   # a check

Rows that this rank pushes to rank r land in its own memory, in the place of rows from rank r. The
experts of all ranks, and the router's weights for them, are the same, so that each token goes to
every rank, and what comes back is right: before anything is timed, output and gradients of tokens
and router are compared with those of the layer with all experts, "local". What is missing of a step
between GPUs is the way of the rows through NVLink, and waiting for others. "host" is how long the
host takes for a step of few tokens, for which it doesn't wait. Medians of --rounds rounds, bf16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from layer.configs import Config, parse_configs
from torch import Tensor

from lightning_fastmoe.distributed import ExpertGroup
from lightning_fastmoe.distributed.schedule.symmetric import SymmetricSchedule
from lightning_fastmoe.distributed.symmetric import exchange as rows_of_ranks
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.placement import equal_blocks
from lightning_fastmoe.ops import exchange as ops
from lightning_fastmoe.ops import exchange_counts as counts

TOLERANCE = 1e-2
FEW_TOKENS = 512
MOST_TOKENS = 24576


def shifted(own: Tensor, step: int, ranks: int) -> list[Tensor]:
    """Memory of which what is for rank r begins ``r * step`` bytes later."""
    size = own.numel() - (ranks - 1) * step
    return [own[rank * step :][:size] for rank in range(ranks)]


@contextmanager
def loopback(ranks: int) -> Iterator[None]:
    """Within it, this process plays all ranks of groups that say that they have so many."""
    push, set_flags, wait = ops.push_rows, ops.set_flags, ops.wait_for_flags
    announce, await_table = counts.announce, counts.await_table

    def send_rows(
        parts: Sequence[Tensor],
        order: Tensor | None,
        divisors: Sequence[int],
        ends: Tensor,
        memory: Sequence[Tensor],
        rank: int,
        at: Sequence[int],
        most: int,
        flags: Sequence[Tensor],
        flags_at: int,
        value: int,
    ) -> None:
        for rows, divisor, begin in zip(parts, divisors, at, strict=True):
            block = most * -(-rows.shape[1] // ops.ALIGNMENT) * ops.ALIGNMENT
            everyone = shifted(memory[0], block, ranks)
            push(rows, order, ends, divisor, everyone, rank, begin, most)
        set_flags(shifted(flags[0], ops.FLAG_BYTES, ranks), rank, flags_at, value)

    def announce_to_itself(
        of_experts: Tensor,
        of_ranks: Tensor,
        needed: int | None,
        header: Sequence[int],
        slots: int,
        memory: Sequence[Tensor],
        rank: int,
        at: int,
        flags_at: int,
        value: int,
        stream: int,
    ) -> None:
        given = (of_experts, of_ranks, needed, header, slots, memory[:1], rank)
        for other in range(ranks):
            place = at + other * rows_of_ranks._COUNTS_BYTES
            announce(*given, place, flags_at + other * ops.FLAG_BYTES, value, stream)

    with (
        patch.object(ops, "send_rows", send_rows),
        patch.object(ops, "wait_for_flags", lambda memory, *rest: wait([*memory] * ranks, *rest)),
        patch.object(counts, "announce", announce_to_itself),
        patch.object(
            counts, "await_table", lambda memory, *rest: await_table([*memory] * ranks, *rest)
        ),
    ):
        yield


class Case:
    """A layer, all of it or the experts of the first of ``ranks`` ranks.

    Args:
        config: its sizes.
        tokens: T.
        ranks: how many are played.
        group: of which this process is all ranks; None for the whole layer.
        device: where it is.
        dtype: of weights and tokens.
    """

    def __init__(
        self,
        config: Config,
        tokens: int,
        ranks: int,
        group: ExpertGroup | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        sizes = (config.d_model, config.d_ffn, config.num_experts)
        torch.manual_seed(0)
        with device:
            self.layer = MoE(*sizes, top_k=config.top_k, activation=config.activation).to(dtype)
        held = equal_blocks(config.num_experts, ranks)
        with torch.no_grad():
            for stack in (*self.layer.experts.parameters(), self.layer.router.weight):
                stack.copy_(torch.cat([stack[: len(held[0])]] * ranks))
        if group is not None:
            self.layer.experts.keep(held[0])
            schedule = SymmetricSchedule(group, config.num_experts, held)
            self.layer.connect("layer", None, schedule)
        torch.manual_seed(1)
        self.x = torch.randn(tokens, config.d_model, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(tokens, config.d_model, device=device).to(dtype)

    def step(self) -> Tensor:
        """Forward and backward with fresh gradients; the output."""
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        out: Tensor = self.layer(self.x)
        out.backward(self.grad)
        return out.detach()

    def results(self) -> list[Tensor]:
        """What must not depend on the way."""
        found = [self.step(), self.x.grad, self.layer.router.weight.grad]
        return [value.clone() for value in found if value is not None]


def milliseconds(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Of a step, over ``steps`` of them."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps * 1e3


def compare(config: Config, args: argparse.Namespace, group: ExpertGroup) -> float:
    """Prints a line for each way; the largest relative error."""
    many = min(config.tokens, MOST_TOKENS)
    sizes = (many, min(many, FEW_TOKENS))
    cases = {
        name: [Case(config, tokens, args.ranks, own, args.device, args.dtype) for tokens in sizes]
        for name, own in (("local", None), ("symmetric", group))
    }
    for _ in range(2):  # the second pass doesn't wait for counts
        pairs = zip(*(case[0].results() for case in cases.values()), strict=True)
        errors = [float((b - a).norm() / a.norm()) for a, b in pairs]
    if not max(errors) <= TOLERANCE:
        print(f"config {config.name}  refused: errors {errors}", flush=True)
        return max(errors)
    times: dict[str, list[list[float]]] = {name: [[], []] for name in cases}
    for _ in range(args.rounds):
        for name, both in cases.items():
            for case, found in zip(both, times[name], strict=True):
                found.append(milliseconds(case.step, args.steps, args.device))
    whole = statistics.median(times["local"][0])
    for name, (step, host) in times.items():
        ms = statistics.median(step)
        print(
            f"config {config.name}  way {name}  ms {ms:.3f}  of_local {whole / ms:.3f}"
            f"  host_ms {statistics.median(host):.3f}  error {max(errors):.2g}",
            flush=True,
        )
    return max(errors)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", default="sonic-7b,olmoe-1b-7b,qwen3-30b-a3b,mixtral-8x7b")
    add("--ranks", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=20, help="per round")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--tiny", action="store_true", help="small layers in fp32, to check the script")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    args.dtype = torch.float32 if args.tiny else torch.bfloat16
    configs = [c.tiny() if args.tiny else c for c in parse_configs(args.configs)]
    if wrong := [c.name for c in configs if c.top_k % args.ranks or c.num_experts % args.ranks]:
        parser.error(f"--ranks {args.ranks} must divide the top_k and experts of {wrong[0]}")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    backend = "nccl" if args.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        group = ExpertGroup(dist.new_group([0]))
        group.size = args.ranks
        with loopback(args.ranks):
            errors = [compare(config, args, group) for config in configs]
    finally:
        dist.destroy_process_group()
    return int(not max(errors) <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
