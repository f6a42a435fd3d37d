"""Times a router's product and its gradients beside the same in fp32, and compares both with fp64.

    python benchmarks/router_product.py --configs sonic-7b,olmoe-1b-7b

Tokens are in bf16; the weight is in fp32 or in bf16. "fp32" is what PyTorch computes with tokens
and weight cast to fp32, TF32 off. Times are those of the kernels; errors are the norm of the
difference over the norm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layer import machine
from layer.configs import Config, parse_configs
from layer.errors import BenchmarkError
from layer.report import add_options, write
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CONFIGS = "sonic-7b,olmoe-1b-7b,qwen3-30b-a3b,qwen3-next"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def time_us(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """How long a call takes on average: on a GPU its kernels, since the host takes longer to launch
    them than the device to run them; on a CPU by the wall clock, the median."""
    for _ in range(3):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize(device)
        kernels = [e for e in found.events() if e.device_type == DeviceType.CUDA]
        return sum(float(e.time_range.elapsed_us()) for e in kernels) / repeats
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((found.double() - exact).norm() / exact.norm())


def measure(
    config: Config, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Times in microseconds and errors of the logits and both gradients, ours and in fp32."""
    from lightning_fastmoe import ops

    torch.manual_seed(0)
    sizes = config.tokens, config.d_model, config.num_experts
    x = torch.randn(sizes[:2], device=device).bfloat16()
    weight = (torch.randn(sizes[2], sizes[1], device=device) * 0.02).to(dtype)
    gradient = torch.randn(sizes[0], sizes[2], device=device)
    wide_x, wide_weight, wide = x.double(), weight.double(), gradient.double()
    exact = {
        "logits": wide_x @ wide_weight.T,
        "tokens": wide @ wide_weight,
        "weight": wide.T @ wide_x,
    }

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.float(), weight.float())

    found: dict[str, Any] = {}
    for name, product in (("ours", ops.router_logits), ("fp32", plain)):

        def logits(product: Callable[..., Tensor] = product) -> Tensor:
            with torch.no_grad():
                return product(x, weight)

        calls = {"logits": logits}
        for of, leaf in (("tokens", x), ("weight", weight)):
            own = leaf.detach().requires_grad_()
            given = (own, weight) if of == "tokens" else (x, own)
            graph = product(*given)

            def gradients(graph: Tensor = graph, own: Tensor = own) -> Tensor:
                return torch.autograd.grad(graph, own, gradient, retain_graph=True)[0]

            calls[of] = gradients
        for of, call in calls.items():
            found[f"{name} {of}"] = {
                "us": time_us(call, device, repeats),
                "error": error(call(), exact[of]),
            }
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each size and dtype of the weight; "ours / fp32" in each cell."""
    kinds = ("logits", "tokens", "weight")
    titles = [f"{kind}: us, error" for kind in ("logits", "gradient of x", "gradient of W")]
    lines = [f"| ours / fp32 | {' | '.join(titles)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, found in results.items():
        cells = []
        for kind in kinds:
            ours, plain = (found[f"{who} {kind}"] for who in ("ours", "fp32"))
            times = f"{ours['us']:.0f} / {plain['us']:.0f}"
            cells.append(f"{times}, {ours['error']:.1e} / {plain['error']:.1e}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and writes what was asked for; 2 for options that can't be met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default=CONFIGS, help="names, with commas between")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script out")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_options(parser)
    arguments = parser.parse_args(argv)
    try:
        configs = parse_configs(arguments.configs)
    except BenchmarkError as problem:
        print(f"router_product.py: {problem}", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(arguments.device)
    results = {}
    for config in [one.tiny() if arguments.tiny else one for one in configs]:
        for name, dtype in DTYPES.items():
            sizes = f"{config.tokens}, {config.d_model}, {config.num_experts}"
            row = f"{config.name}: {sizes}, weight in {name}"
            results[row] = measure(config, dtype, device, arguments.repeats)
    text = table(results)
    print(text)
    write(arguments, {"machine": machine.describe(device), "results": results}, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
