"""The operators of a layer between ranks, in a group of one rank: all of it is on this GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_fastmoe import ops
from lightning_fastmoe.ops import exchange
from lightning_fastmoe.ops.exchange_counts import HEADER, MAGIC
from lightning_fastmoe.ops.native import load

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)

T, D, F, E, K = 77, 64, 48, 6, 3
SLOTS = E + 4
BLOCK = 8 * (HEADER + SLOTS) + 8  # a multiple of 16
LINE = exchange.FLAG_BYTES
TABLE = 3 * LINE
ROW, PACKED = 2 * D, 8 * K
CAPACITY = T * (ROW + -(-PACKED // 16) * 16)
MOST = T


class Case:
    """The arguments of the operators, and what a layer without an exchange makes of them."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        self.x, self.grad = draw(T, D).bfloat16(), draw(T, D).bfloat16()
        self.up, self.down = draw(E, 2 * F, D).bfloat16() / 8, draw(E, D, F).bfloat16() / 8
        self.weights = draw(T, K)
        self.chosen = draw(T, E).topk(K).indices
        self.chosen[5, 1] = self.chosen[9] = E  # dropped slots, and a token that goes nowhere
        number = torch.arange(E, device="cuda")
        where = torch.stack([torch.zeros_like(number), number])
        self.where = torch.cat([where, torch.tensor([[1], [-1]], device="cuda")], dim=1)
        self.control = torch.zeros(TABLE + BLOCK, dtype=torch.uint8, device="cuda")
        self.memory = torch.full((2 * CAPACITY + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
        self.found = torch.zeros(1, HEADER + SLOTS, dtype=torch.int64, pin_memory=True)
        self.report = torch.zeros(4, dtype=torch.int64, pin_memory=True)

    def start(self) -> tuple[Any, ...]:
        return (
            *(self.x.view(torch.uint8), self.chosen, self.where, self.weights),
            *([self.control], [self.memory], 0, [CAPACITY, SLOTS, TABLE, LINE, 5, TABLE, BLOCK]),
            *([MAGIC, 1, 1, D], [0, MOST * ROW, MOST, 2 * LINE, 7], self.found, self.report),
            *(10.0, 0),
        )

    def forward(self, rows: int, pairs: int) -> tuple[Any, ...]:
        place = [0, MOST * ROW, MOST * ROW, -(-MOST * PACKED // 16) * 16, 2 * LINE, 7]
        return (
            *([self.control], self.memory, self.where, self.up, self.down, 0, K, rows, pairs),
            *([*place, CAPACITY, MOST], [TABLE, BLOCK, 8 * HEADER, LINE, 5], self.report),
            *(10.0, 0, "swiglu", True),
        )

    def combine(self, sums: Tensor, ends: Tensor, plan: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (
            *(sums, ends, plan[1], plan[2], [self.control], [self.memory], 0),
            *([0, 0, MOST, 2 * LINE, 9], self.report, 10.0),
        )

    def backward(self, plan: tuple[Tensor, ...], call: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x, weights, _, order, inverse, _, offsets, _, h = call
        there = [0, 0, MOST * ROW, MOST, 2 * LINE, 11]
        at, block = CAPACITY, -(-MOST * 4 * K // 16) * 16
        back = [at, at + MOST * ROW, at, at + MOST * ROW, block, MOST, 2 * LINE, 13]
        return (
            *(self.grad, plan[0], plan[1], plan[2], plan[3], [self.control], [self.memory], 0),
            *(there, back, [len(x)], self.report, 10.0, 0, x, h, weights, self.up, self.down),
            *(order, inverse, offsets, "swiglu", True, True),
        )


def test_the_bits_of_a_layer_without_an_exchange() -> None:
    case, library = Case(), load()
    assert library is not None
    plan = library.exchange_layer_start(*case.start())
    torch.cuda.synchronize()
    rows, pairs = T - 1, int((case.chosen < E).sum())
    counts = torch.bincount(case.chosen.flatten(), minlength=E + 1)[:E]
    assert case.found[0, HEADER:].tolist() == [*counts.tolist(), rows, CAPACITY, 0, 0]
    ahead = library.exchange_layer_forward(*case.forward(rows + 4, pairs + 5))
    out = library.exchange_layer_combine(*case.combine(ahead[7], ahead[2], plan))
    x, weights, ends, order, inverse, of_experts, offsets, sums, h = ahead
    assert of_experts.tolist() == counts.tolist()
    came = (
        *(x[:rows], weights[:rows], ends, order[:pairs], inverse[: rows * K]),
        *(of_experts, offsets, sums, h[:pairs]),
    )
    found = library.exchange_layer_backward_(*case.backward(plan, came))
    torch.cuda.synchronize()
    assert case.report.tolist() == [0, 0, 0, 0]

    leaves = [t.clone().requires_grad_() for t in (case.x, case.weights, case.up, case.down)]
    held = ops.order_of_held(case.chosen, E, pairs)
    right = ops.expert_layer(leaves[0], leaves[1], held, *leaves[2:], "swiglu")
    grads = torch.autograd.grad(right, leaves, case.grad)
    assert torch.equal(out, right)
    for name, got, wanted in zip(("x", "weights", "up", "down"), found, grads, strict=True):
        assert torch.equal(got, wanted), name


def test_fakes_have_the_shapes_of_results() -> None:
    """opcheck would copy the arguments, among them host memory that the device writes to."""
    case, library = Case(), load()
    assert library is not None
    plan = library.exchange_layer_start(*case.start())
    rows, pairs = T - 1, int((case.chosen < E).sum())
    ahead = library.exchange_layer_forward(*case.forward(rows, pairs))
    combined = case.combine(ahead[7], ahead[2], plan)
    backward = case.backward(plan, ahead)
    for op, args, found in (
        (library.exchange_layer_start, case.start(), plan),
        (library.exchange_layer_forward, case.forward(rows, pairs), ahead),
        (library.exchange_layer_combine, combined, library.exchange_layer_combine(*combined)),
        (library.exchange_layer_backward_, backward, library.exchange_layer_backward_(*backward)),
    ):
        with FakeTensorMode() as mode:
            fakes = tree_map_only(Tensor, mode.from_tensor, args)
            made = op(*fakes)
        for fake, real in zip(tree_leaves(made), tree_leaves(found), strict=True):
            assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_errors() -> None:
    case, library = Case(), load()
    assert library is not None
    given = list(case.start())
    given[7] = given[7][:-1]
    with pytest.raises(RuntimeError, match="counts are 7 numbers, not 6"):
        library.exchange_layer_start(*given)
    plan = library.exchange_layer_start(*case.start())
    rows, pairs = T - 1, int((case.chosen < E).sum())
    ahead = library.exchange_layer_forward(*case.forward(rows, pairs))
    given = list(case.backward(plan, ahead))
    given[10] = [MOST + 1]
    with pytest.raises(RuntimeError, match="more"):
        library.exchange_layer_backward_(*given)
