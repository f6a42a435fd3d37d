"""What test_stall.py runs in a process of its own, since a kernel that gives up ends its process.

python stall_cases.py layers    every product of a layer and its router, both ways, many times
python stall_cases.py sort      the sort alone
"""

from __future__ import annotations

import functools
import hashlib
import sys

import torch

from lightning_fastmoe.ops import expert_layer, order_by_expert, router_logits
from lightning_fastmoe.ops.stall import stall_report

SIZES = [
    # T, D, F, E, K, activation; many tiles, one tile, experts without rows, one row tile too many.
    (4096, 512, 640, 16, 4, "swiglu"),
    (300, 256, 264, 8, 2, "gelu"),
    (2048, 1024, 256, 64, 8, "swiglu"),
    (1100, 256, 512, 3, 1, "relu"),
]
REPEATS = 10


def layers() -> str:
    """A digest of all outputs and gradients."""
    digest = hashlib.sha256()
    for seed, (tokens, width, inner, experts, k, name) in enumerate(SIZES):
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator)

        x = draw(tokens, width).bfloat16().requires_grad_()
        rows = inner * (2 if name == "swiglu" else 1)
        up = (draw(experts, rows, width) / width**0.5).bfloat16().requires_grad_()
        down = (draw(experts, width, inner) / inner**0.5).bfloat16().requires_grad_()
        logits = draw(tokens, experts) * 3
        weights, ids = torch.softmax(logits, dim=-1).topk(k)
        grad = draw(tokens, width).bfloat16()
        router, of_logits = draw(experts, width).requires_grad_(), draw(tokens, experts)
        for _ in range(REPEATS):
            order = order_by_expert(ids, experts)
            out = expert_layer(x, weights, order, up, down, name)
            found = [out, *torch.autograd.grad(out, (x, up, down), grad)]
            for weight in (router, router.bfloat16()):
                own = router_logits(x, weight)
                found += [own, *torch.autograd.grad(own, (x, router), of_logits)]
            for tensor in found:
                digest.update(tensor.detach().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def expert_ids() -> torch.Tensor:
    return torch.randint(64, (1 << 17,), generator=torch.Generator().manual_seed(0)).cuda()


def sort() -> str:
    """A digest of an order."""
    order = order_by_expert(expert_ids(), 64)
    return hashlib.sha256(order.order.cpu().numpy().tobytes()).hexdigest()


def main() -> None:
    """Prints the digest, or the first error, that of the next call, and the report."""
    run = {"layers": layers, "sort": sort}[sys.argv[1]]
    for attempt in ("first", "next"):
        try:
            print(f"{attempt}: {run()}", flush=True)
        except RuntimeError as error:
            print(f"{attempt} error: {str(error).splitlines()[0]}", flush=True)
    print(f"report: {stall_report()}", flush=True)


if __name__ == "__main__":
    main()
