"""Compares the ways in which a layer with sharded experts exchanges its tokens.

    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --configs sonic-7b --json run.json
    torchrun --nproc-per-node 4 benchmarks/expert_parallel.py --ranks-per-node 2   # two levels
    torchrun --nproc-per-node 2 benchmarks/expert_parallel.py --device cpu --tiny   # a check

Each rank has T tokens of its own; "local" is the same layer with all experts on each rank and no
exchange, that is, the rate of one GPU. A step is forward and backward of the whole layer, router
included, in bf16. Dispatchers take turns in every round. Times are of the slowest rank: CUDA
events around each step, the median of a round, the median over rounds. Before anything is timed,
output and gradients of tokens and router are compared with those of "local"; a dispatcher whose
error is above 1e-2 is refused. Memory is the peak during a step, its gradients included, over what
is there without them; not the memory that "symmetric" pushes to, once for all layers of a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layer.configs import Config, parse_configs
from torch import Tensor, nn

from lightning_fastmoe.distributed import ExpertSharder, make_expert_mesh
from lightning_fastmoe.distributed.nodes import check_ranks_per_node
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.dispatch import DISPATCHERS

TOLERANCE = 1e-2
CONFIGS = "sonic-7b,olmoe-1b-7b,qwen3-30b-a3b,mixtral-8x7b"
MOST_TOKENS = 24576
"""Tokens per rank of the larger configurations, so that all dispatchers fit beside each other."""


class Case:
    """One layer with one dispatcher on this rank.

    Args:
        config: its sizes.
        dispatcher: a name that ``MoE`` takes.
        device: where it is.
        dtype: of weights and tokens.
        nodes: the node of each rank; None if all are on one.
    """

    def __init__(
        self,
        config: Config,
        dispatcher: str,
        device: torch.device,
        dtype: torch.dtype,
        nodes: list[int] | None,
    ) -> None:
        torch.manual_seed(0)
        with device:
            self.layer = MoE(
                config.d_model,
                config.d_ffn,
                config.num_experts,
                top_k=config.top_k,
                activation=config.activation,
                dispatcher=dispatcher,
            ).to(dtype)
        mesh = make_expert_mesh(dist.get_world_size(), device.type)
        ExpertSharder(mesh, nodes).shard(nn.ModuleList([self.layer]))
        torch.manual_seed(1 + dist.get_rank())
        shape = (min(config.tokens, MOST_TOKENS), config.d_model)
        self.x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(shape, device=device).to(dtype)

    def step(self) -> Tensor:
        """Forward and backward with fresh gradients; the output."""
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        out: Tensor = self.layer(self.x)
        out.backward(self.grad)
        return out.detach()

    def results(self) -> dict[str, Tensor]:
        """What must not depend on the dispatcher."""
        values = {"output": self.step(), "d_tokens": self.x.grad}
        for name, parameter in self.layer.router.named_parameters():
            values[f"d_{name}"] = parameter.grad
        return {name: value.clone() for name, value in values.items() if value is not None}


def timed(case: Case, steps: int) -> float:
    """Milliseconds per step on the slowest rank: the median of ``steps``."""
    device = case.x.device
    dist.barrier()
    case.step()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            case.step()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    else:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            case.step()
            times.append((time.perf_counter() - start) * 1e3)
    return slowest(statistics.median(times), device)


def slowest(value: float, device: torch.device) -> float:
    """The largest over all ranks."""
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)


def peak_over_rest(case: Case) -> float | None:
    """GiB, of the rank with the most; None without a CUDA device."""
    if case.x.device.type != "cuda":
        return None
    case.step()
    case.x.grad = None  # experts' gradients are a part of a step, and others with each dispatcher
    case.layer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.step()
    torch.cuda.synchronize()
    return slowest((torch.cuda.max_memory_allocated() - rest) / 2**30, case.x.device)


def error(found: dict[str, Tensor], right: dict[str, Tensor], device: torch.device) -> float:
    """The largest relative error over all tensors and ranks."""
    errors = [
        float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in right.items()
    ]
    return slowest(max(e if e == e else float("inf") for e in errors), device)


def compare(config: Config, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row per dispatcher, "local" first."""
    cases = {name: Case(config, name, device, args.dtype, args.nodes) for name in args.dispatchers}
    right = cases["local"].results()
    errors = {name: error(case.results(), right, device) for name, case in cases.items()}
    refused = {name for name, value in errors.items() if not value <= TOLERANCE}
    times: dict[str, list[float]] = {name: [] for name in cases if name not in refused}
    for _ in range(args.rounds):
        for name, found in times.items():
            found.append(timed(cases[name], args.steps))
    rows = []
    flops = config.step_flops * cases["local"].x.shape[0] / config.tokens
    for name, case in cases.items():
        row: dict[str, Any] = {"config": config.name, "dispatcher": name, "error": errors[name]}
        if name not in refused:
            ms = statistics.median(times[name])
            row |= {
                "ms": ms,
                "of_local": statistics.median(times["local"]) / ms,
                "tflops_per_gpu": flops / ms / 1e9,
                "peak_gib": peak_over_rest(case),
            }
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Runs on each rank; rank 0 prints. Returns 1 if a dispatcher is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", default=CONFIGS, help="'all' or names, separated by commas")
    add(
        "--dispatchers",
        default="all_to_all,dedup,dedup_overlapped,symmetric",
        help="names, separated by commas",
    )
    add("--ranks-per-node", type=int, help="simulates nodes; without it all ranks share one")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=10, help="per round")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--tiny", action="store_true", help="small layers in fp32, to check the script")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    args.dispatchers = ["local", *args.dispatchers.split(",")]
    if unknown := [name for name in args.dispatchers if name not in DISPATCHERS]:
        parser.error(f"--dispatchers: {', '.join(unknown)}: take some of {', '.join(DISPATCHERS)}")
    args.dtype = torch.float32 if args.tiny else torch.bfloat16
    on_cuda = args.device == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo")
    args.nodes, per_node = None, args.ranks_per_node
    if per_node is not None:
        check_ranks_per_node(per_node, dist.get_world_size())
        args.nodes = [rank // per_node for rank in range(dist.get_world_size())]
    device = torch.device("cpu")
    if on_cuda:
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    rows = []
    for config in parse_configs(args.configs):
        found = compare(config.tiny() if args.tiny else config, args, device)
        rows += found
        if dist.get_rank() == 0:
            for row in found:
                print("  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        if on_cuda:
            torch.cuda.empty_cache()
    if dist.get_rank() == 0 and args.json is not None:
        name = torch.cuda.get_device_name() if on_cuda else "cpu"
        facts = {"device": name, "ranks": dist.get_world_size(), "torch": torch.__version__}
        facts["ranks_per_node"] = per_node or dist.get_world_size()
        args.json.write_text(json.dumps(facts | {"rows": rows}, indent=1))
    dist.destroy_process_group()
    return int(any("ms" not in row for row in rows))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
