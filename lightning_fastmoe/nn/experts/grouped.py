"""Stacked experts that are computed group by group, since not all fit on the device at once.

Expert groups are EPS-MoE's (Qian et al. 2024, arXiv 2410.12247), which overlaps a group's exchange
with computing another; here it is the copy of its weights. Each group computes its rows, and all
rows are combined at the end: sums in fp32 at least, rounded once, as without groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.ops import kernels

_GROUPS = "_fastmoe_groups"


class ExpertGroups:
    """Computes the experts of a module group by group, from :meth:`install` to :meth:`remove`.

    Args:
        module: has the stacks.
        ends: of each group, the expert before which it ends; the last is E.
        place: called with a group and what is computed with it; in the context that it returns the
            module's stacks are those of the group's experts.
    """

    def __init__(
        self,
        module: nn.Module,
        ends: Sequence[int],
        place: Callable[[int, RoutedCall], AbstractContextManager[None]],
    ) -> None:
        self.module, self.ends, self._place = ref(module), tuple(ends), place

    def install(self) -> None:
        """From now on the module is computed this way."""
        vars(self.module())[_GROUPS] = self

    def remove(self) -> None:
        """The module is computed as a whole again."""
        vars(self.module()).pop(_GROUPS, None)

    # Opaque to torch.compile: the host reads how many rows each expert has.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self,
        compute: Callable[[Tensor, Tensor, None, None], Tensor],
        x: Tensor,
        tokens_per_expert: Tensor,
        weights: Tensor | None,
        order: ops.ExpertOrder | None,
    ) -> Tensor:
        """What ``compute`` gives for all experts.

        Args:
            compute: called with the rows and counts of a group, while its stacks are in place.
            x: (N, D) by expert; with ``order`` (T, D), by token.
            tokens_per_expert: (E,) int64.
            weights: (T, K), with ``order``.
            order: the pairs by expert.

        Returns:
            (N, D); with ``order`` (T, D).
        """
        tokens, top_k, source = x.shape[0], 1, None
        if weights is not None and order is not None:
            tokens, top_k = weights.shape
            tokens_per_expert = order.tokens_per_expert
            source = torch.div(order.order, top_k, rounding_mode="floor")
        counts = tokens_per_expert.tolist()
        y = x.new_empty(sum(counts), x.shape[1])
        row = first = 0
        for group, end in enumerate(self.ends):
            mine = slice(row, row + sum(counts[first:end]))
            chosen = [e for e, count in enumerate(counts[first:end]) if count]
            share = top_k * (end - first) / len(counts)
            with self._place(group, RoutedCall(tokens, share, lambda chosen=chosen: chosen)):  # type: ignore[misc]
                if mine.start < mine.stop:
                    rows = x[mine] if source is None else x.index_select(0, source[mine])
                    y[mine] = compute(rows, tokens_per_expert[first:end], None, None)
            row, first = mine.stop, end
        if weights is None or order is None or source is None:
            return y
        return kernels.sum_rows(y, order.inverse, weights, weights.shape[1])


def groups_of(module: nn.Module) -> ExpertGroups | None:
    """The groups in which a module's experts are computed; None if all at once."""
    found: ExpertGroups | None = vars(module).get(_GROUPS)
    return found if found is not None and found.module() is module else None  # not of a copy
