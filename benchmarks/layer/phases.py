"""Which kernel of a step does what: the one table to change when the layer's kernels change.

Kernels are told apart by name and order. An entry takes the next kernel whose name matches its
pattern; if a later entry matches first, those between are missing (fused away, say). What no entry
takes is "other", and is told like everything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from layer import floors
from layer.floors import Floor

GEMM = r"cutlass|gemm|nvjet|wgmma|grouped"
"""Names of matrix products."""

ROWS = r"ragged_rows"
"""Name of our own products on Hopper."""

HELPERS = r"prepare_grouped_gemm|tensormap"
"""Names of kernels that prepare a product: they count for the product that follows."""

ANY = r""
"""Pattern of a run of kernels that ends where the next entry begins."""

MANY = True


@dataclass(frozen=True)
class Entry:
    """One kernel, or one run of kernels.

    Attributes:
        group: the part of the step that it belongs to.
        phase: what it does.
        pattern: regular expression searched for in the kernel's name, ignoring case.
        floor: what it must do, None for nothing worth counting.
        many: whether it is a run: it takes kernels until one matches the next entry.
    """

    group: str
    phase: str
    pattern: str
    floor: Floor | None
    many: bool = False


_FORWARD = (
    Entry("sort", "sort by expert", r"sort_kernel", floors.sort),
    Entry("permute", "permute x", r"permute_rows", floors.permute),
    Entry("up product", "H = rows @ up.T", GEMM, floors.up_product),
    Entry("activation", "A = act(H)", r"activation_kernel", floors.activation),
    Entry("down product", "Y = A @ down.T", GEMM, floors.down_product),
    Entry("sum", "weighted sum of Y", r"sum_rows", floors.weighted_sum),
)
_BACKWARD = (
    Entry("permute, backward", "permute dO", r"permute_rows", floors.permute),
    Entry("down product, backward", "dA = dO @ down", GEMM, floors.down_product),
    Entry(
        "activation, backward",
        "dH, weighted A, dw",
        r"activation_backward",
        floors.activation_backward,
    ),
    Entry("down product, backward", "d_down = dO.T @ A", GEMM, floors.down_gradient),
    Entry("down product, backward", "zero empty experts", r"zero_empty", floors.empty_experts),
    Entry("up product, backward", "d_rows = dH @ up", GEMM, floors.rows_gradient),
    Entry("sum, backward", "sum of d_rows", r"sum_rows", floors.plain_sum),
    Entry("permute, backward", "permute x again", r"permute_rows", floors.permute),
    Entry("up product, backward", "d_up = dH.T @ rows", GEMM, floors.up_gradient),
    Entry("up product, backward", "zero empty experts", r"zero_empty", floors.empty_experts),
)

_FORWARD_HOPPER = (
    Entry("sort", "sort by expert", r"sort_kernel", floors.sort),
    Entry("up product", "H, A = act(H); x gathered", ROWS, floors.fused_up),
    Entry("down product", "Y = A @ down.T", ROWS, floors.down_product),
    Entry("sum", "weighted sum of Y", r"sum_rows", floors.weighted_sum),
)
_BACKWARD_HOPPER = (
    Entry(
        "down product, backward",
        "dH, weighted A, dw; dO gathered",
        ROWS,
        floors.fused_down_backward,
    ),
    Entry("down product, backward", "dw, sum over N tiles", r"reduce_dots", None),
    Entry(
        "down product, backward",
        "d_down = dO.T @ A, gathered",
        r"weight_gradient",
        floors.gathered_down_gradient,
    ),
    Entry("down product, backward", "last wave of d_down", r"reduce_last_wave", None),
    Entry("down product, backward", "splits of d_down", r"reduce_splits", None),
    Entry("up product, backward", "d_rows = dH @ up", ROWS, floors.rows_gradient),
    Entry("sum, backward", "sum of d_rows", r"sum_rows", floors.plain_sum),
    Entry(
        "up product, backward",
        "d_up = dH.T @ x, gathered",
        r"weight_gradient",
        floors.gathered_up_gradient,
    ),
    Entry("up product, backward", "last wave of d_up", r"reduce_last_wave", None),
    Entry("up product, backward", "splits of d_up", r"reduce_splits", None),
)


def _with_router(forward: tuple[Entry, ...], backward: tuple[Entry, ...]) -> tuple[Entry, ...]:
    return (
        Entry("routing", "router, softmax, top-k", ANY, floors.router, MANY),
        *forward,
        Entry("routing", "losses, both ways", ANY, floors.router_losses, MANY),
        *backward,
        Entry("routing", "router, backward", ANY, floors.router_backward, MANY),
    )


GIVEN_ROUTING = (*_FORWARD, *_BACKWARD)
"""A step of ``order_by_expert`` and ``expert_layer`` with PyTorch's products."""

GIVEN_ROUTING_HOPPER = (*_FORWARD_HOPPER, *_BACKWARD_HOPPER)
"""The same with our own products. With one expert per token there are no sums."""

WHOLE_MODULE = _with_router(_FORWARD, _BACKWARD)
"""A step of the whole module with PyTorch's products."""

WHOLE_MODULE_HOPPER = _with_router(_FORWARD_HOPPER, _BACKWARD_HOPPER)
"""The same with our own products."""


def table_for(names: list[str], module: bool) -> tuple[Entry, ...]:
    """The table of a step whose kernels have these names.

    Args:
        names: names of the step's kernels.
        module: whether the step is one of the whole module.
    """
    if any(re.search(ROWS, name) for name in names):
        return WHOLE_MODULE_HOPPER if module else GIVEN_ROUTING_HOPPER
    return WHOLE_MODULE if module else GIVEN_ROUTING


def assign(names: list[str], entries: tuple[Entry, ...]) -> list[int | None]:
    """The entry of each kernel.

    Args:
        names: kernels in the order in which they ran.
        entries: the table.

    Returns:
        For each name the index of its entry, None for "other".
    """
    found: list[int | None] = [None] * len(names)
    waiting: list[int] = []  # helpers before their product
    place = -1
    for i, name in enumerate(names):
        if re.search(HELPERS, name, re.IGNORECASE):
            waiting.append(i)
            continue
        entry = _next(name, place, entries)
        if entry is None:
            continue
        place = found[i] = entry
        for helper in waiting:
            found[helper] = entry
        waiting = []
    return found


def _next(name: str, place: int, entries: tuple[Entry, ...]) -> int | None:
    def matches(index: int) -> bool:
        return re.search(entries[index].pattern, name, re.IGNORECASE) is not None

    following = place + 1
    ended = following >= len(entries)
    # A run goes on until the entry after it begins.
    if place >= 0 and entries[place].many and matches(place) and (ended or not matches(following)):
        return place
    if ended:
        return None
    # A run of anything begins only in its turn, or it would swallow what others don't know.
    if entries[following].pattern == ANY:
        after = following + 1
        return after if after < len(entries) and matches(after) else following
    known = (i for i in range(following, len(entries)) if entries[i].pattern != ANY and matches(i))
    return next(known, None)
