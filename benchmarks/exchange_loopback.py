"""What "symmetric" costs a layer beside the way between GPUs: a group of one rank, on one GPU.

    python benchmarks/exchange_loopback.py --configs sonic-7b,qwen3-30b-a3b
    python benchmarks/exchange_loopback.py --device cpu --tiny   # a check

The rank pushes rows into its own memory, waits for its own flags, and reads what it pushed: all
that a rank of several does, but for the way of the rows through NVLink, and waiting for others. (Of
R ranks it would read up to R times as many rows.) Before anything is timed, output and gradients
are compared with those of the layer without an exchange, "local". "host" is how long the host takes
for a step of few tokens, for which it doesn't wait. Medians of --rounds rounds, bf16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from layer.configs import Config, parse_configs
from torch import Tensor

from lightning_fastmoe.distributed import ExpertGroup
from lightning_fastmoe.distributed.schedule.symmetric import SymmetricSchedule
from lightning_fastmoe.nn import MoE

TOLERANCE = 1e-2
FEW_TOKENS = 512
MOST_TOKENS = 24576


class Case:
    """A layer.

    Args:
        config: its sizes.
        tokens: T.
        group: of this rank alone; None for a layer without an exchange.
        device: where it is.
        dtype: of weights and tokens.
    """

    def __init__(
        self,
        config: Config,
        tokens: int,
        group: ExpertGroup | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        sizes = (config.d_model, config.d_ffn, config.num_experts)
        torch.manual_seed(0)
        with device:
            self.layer = MoE(*sizes, top_k=config.top_k, activation=config.activation).to(dtype)
        if group is not None:
            schedule = SymmetricSchedule(group, config.num_experts, [range(config.num_experts)])
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
        """Output and gradients."""
        found = [self.step(), self.x.grad, *(p.grad for p in self.layer.parameters())]
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
        name: [Case(config, tokens, own, args.device, args.dtype) for tokens in sizes]
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
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=20, help="per round")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--tiny", action="store_true", help="small layers in fp32, to check the script")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    args.dtype = torch.float32 if args.tiny else torch.bfloat16
    configs = [c.tiny() if args.tiny else c for c in parse_configs(args.configs)]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    backend = "nccl" if args.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        group = ExpertGroup(dist.new_group([0]))
        errors = [compare(config, args, group) for config in configs]
    finally:
        dist.destroy_process_group()
    return int(not max(errors) <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
