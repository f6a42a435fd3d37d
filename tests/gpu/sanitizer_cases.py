"""Every kernel once or twice at awkward sizes, for compute-sanitizer to watch."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

from lightning_fastmoe.ops import (
    ACTIVATIONS,
    exchange,
    exchange_counts,
    expert_layer,
    is_gated,
    kernels,
    native,
    order_by_expert,
    router_logits,
    sigmoid_top_k,
    softmax_top_k,
)
from lightning_fastmoe.ops.balancing import balancing_losses
from lightning_fastmoe.ops.group_quantization import dequantize_groups, quantize_groups
from lightning_fastmoe.ops.products import hopper

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops import ahead_cases, plan_cases  # noqa: E402  helpers of the tests

SIZES = [(1, 1, 1, 1, 1), (67, 72, 40, 33, 3), (37, 17, 7, 70, 5), (0, 8, 8, 4, 2)]
"""(T, D, F, E, K)."""


def run(size: tuple[int, ...], dtype: torch.dtype, name: str, skewed: bool) -> None:
    tokens, width, inner, experts, k = size
    logits = torch.randn(tokens, experts, device="cuda", requires_grad=True)
    bias = torch.randn(experts, device="cuda")
    routings = softmax_top_k(logits, k, True), sigmoid_top_k(logits, k, False, bias)
    for scores, weights, _ in routings:
        torch.autograd.grad(scores.sum() + weights.square().sum(), logits)
    _, weights, ids = routings[1]
    if skewed:
        ids = ids * 0 + torch.arange(k, device="cuda")  # all tokens on the first K experts
    order = order_by_expert(ids, experts)
    inner_rows = inner * (2 if is_gated(name) else 1)
    shapes = [(tokens, width), (experts, inner_rows, width), (experts, width, inner)]
    shapes += [(experts, inner_rows), (experts, width)]
    x, up, down, up_bias, down_bias = (
        torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes
    )
    half = (experts + 1) // 2  # the pairs of the other experts have no row
    partial = order.first(half, int(order.tokens_per_expert[:half].sum()))
    for biases in ((), (up_bias, down_bias)):
        out = expert_layer(x, weights.detach(), order, up, down, name, *biases)
        torch.autograd.grad(out, (x, up, down, *biases), torch.randn_like(out))
        mlp = [p[:half].detach().requires_grad_() for p in (up, down, *biases)]
        out = expert_layer(x, weights.detach(), partial, *mlp[:2], name, *mlp[2:])
        torch.autograd.grad(out, (x, *mlp), torch.randn_like(out))
    rows = torch.randn(tokens * k, width, device="cuda").to(dtype)
    kernels.unpermute_backward(
        torch.randn_like(x), rows, weights.detach(), order.order, order.inverse
    )
    kernels.zero_empty_experts_(torch.randn(experts, 5, device="cuda"), order.tokens_per_expert)


def dequantize() -> None:
    for bits in (8, 4):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((1, 64), (3, 5, 640), (16, 1024)):
                weight = torch.randn(shape, device="cuda").to(dtype)
                dequantize_groups(*quantize_groups(weight, bits), weight, bits)


def sort(pairs: int, experts: int) -> None:
    order_by_expert(torch.randint(experts, (pairs,), device="cuda"), experts)


def split_gradients() -> None:
    """The workspaces of split weight gradients: of as many experts as fit, and the last wave's."""
    for counts, m, n in (([193] * 84 + [172], 256, 256), ([1085] * 15 + [109], 712, 760)):
        order = torch.randperm(sum(counts), device="cuda")
        offsets = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
        x, rows = (torch.randn(sum(counts), d, device="cuda").bfloat16() for d in (m, n))
        weight = torch.randn(len(counts), n, m, device="cuda").bfloat16()
        if (library := hopper.hopper(x, weight)) is None:
            return
        for transposed in (False, True):
            hopper.weight_gradient(library, x, order, 1, rows, offsets, transposed)


def rows_for_ranks() -> None:
    """Rows pushed to "ranks" of which all memory is here, and a flag that is waited for."""
    for counts, width in (((3, 0, 5), 33), ((700, 300), 64), ((20, 50), 10_000)):
        ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
        order = torch.randperm(sum(counts) + 2, device="cuda")
        rows = torch.zeros(len(order), width, dtype=torch.uint8, device="cuda")
        size = 2 * len(counts) * exchange.FLAG_BYTES + -(-max(counts) * width // 16) * 16
        memory = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in counts]
        at = 2 * len(counts) * exchange.FLAG_BYTES
        exchange.push_rows(rows, order, ends, 1, memory, 1, at, max(counts))
        exchange.push_rows(rows, None, ends, 1, memory, 0, at, max(counts))
        if width % 16 == 0 and hopper.hopper(torch.zeros(1, 8, device="cuda").bfloat16()):
            exchange.push_rows(rows, order, ends, 1, memory, 1, at, max(counts), 2)
        report = torch.zeros(4, dtype=torch.int64, pin_memory=True)
        flags = len(counts) * exchange.FLAG_BYTES
        for rank in range(len(counts)):
            exchange.set_flags(memory, rank, flags, 5)
        exchange.wait_for_flags(memory, 0, flags, 5, report, 60.0, False)
        exchange.wait_for_flags(memory, 0, flags, 6, report, 0.01, False)


def plans() -> None:
    """What is sent where, and what came, also where the host doesn't know yet."""
    for case in plan_cases.CASES:
        plan_cases.check(case, "cuda", torch.float32)
    for wrong in ahead_cases.WRONG:
        ahead_cases.check(wrong, "cuda")


def counts_for_ranks() -> None:
    """Counts announced to "ranks" of which all memory is here, and read on the host."""
    ranks, slots, at = 3, 700, 2 * 3 * exchange.FLAG_BYTES
    block = 8 * (exchange_counts.HEADER + slots)
    memory = [torch.zeros(at + ranks * block, device="cuda").byte() for _ in range(ranks)]
    numbers = torch.arange(690, device="cuda")
    stream, flags = torch.cuda.Stream().cuda_stream, at // 2
    for rank in range(ranks):
        place = (rank, at + rank * block, flags, 5, stream)
        exchange_counts.announce(numbers, numbers[:3], 9, (1, 2, 3, 4), slots, memory, *place)
    report = torch.zeros(4, dtype=torch.int64, pin_memory=True)
    found = torch.zeros(ranks, block // 8, dtype=torch.int64, pin_memory=True)
    for value, seconds in ((5, 60.0), (6, 0.01)):
        where = (1, flags, value, at, block)
        exchange_counts.await_table(memory, *where, found, report, seconds, stream)


def losses() -> None:
    """The balancing losses of few and many experts."""
    for tokens, experts in ((7, 3), (3000, 130), (0, 5)):
        logits = torch.randn(tokens, experts, device="cuda", requires_grad=True)
        counts = torch.arange(experts, device="cuda")
        found = balancing_losses(logits.softmax(1), logits, counts, 0.1, 0.01)
        assert found is not None
        found[2].backward()


def routers() -> None:
    """Logits of tokens in bf16, whose products end within tiles, and of no tokens."""
    for tokens, width, experts in ((1, 8, 1), (300, 72, 33), (130, 200, 131), (0, 64, 4)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
            weight = torch.randn(experts, width, device="cuda").to(dtype).requires_grad_()
            logits = router_logits(x, weight)
            torch.autograd.grad(logits, (x, weight), torch.randn_like(logits))


def sums() -> None:
    """Sums of enough tokens' rows for bulk copies: of whole rows, and of parts, some shorter."""
    for tokens, width, k in ((1200, 520, 3), (700, 2056, 10)):
        rows = torch.randn(tokens * k, width, device="cuda").bfloat16()
        inverse = torch.randperm(tokens * k, device="cuda")
        inverse[::5] = -1
        kernels.sum_rows(rows, inverse, torch.rand(tokens, k, device="cuda"), k)


def main() -> None:
    """Runs all cases, or those that use shared memory and no library."""
    torch.manual_seed(0)
    if native.load() is None:
        raise SystemExit(native.unavailable_reason())
    for pairs, experts in ((5_001, 33), (50_001, 1024), (1, 1), (0, 7)):
        sort(pairs, experts)
    if "--sort-alone" not in sys.argv:
        for size, dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16)):
            run(size, dtype, "swiglu", skewed=False)
        for name in ACTIVATIONS:
            run(SIZES[1], torch.float16, name, skewed=True)
        split_gradients()
        dequantize()
        rows_for_ranks()
        plans()
        counts_for_ranks()
        losses()
        routers()
        sums()
    torch.cuda.synchronize()
    print("all cases ran")


if __name__ == "__main__":
    main()
