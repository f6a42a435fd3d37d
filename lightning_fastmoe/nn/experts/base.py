"""The base class of a layer's local experts, as layers, schedules and strategies use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import TopologyError
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.nn.experts.trained import TRAINED, trained_of
from lightning_fastmoe.nn.hooks import watch_hooks
from lightning_fastmoe.ops import Stacks


class Experts(nn.Module):
    """The routed experts of one layer that live on this rank, by their global ids.

    Args:
        num_experts: experts of the whole model, E.
        local_ids: global ids of the experts on this rank, ascending; None for all.

    Raises:
        TopologyError: if there are no ids, or they are out of range or not ascending.
    """

    is_stacked: ClassVar[bool]
    """Whether all experts have parameters of the same shape, stacked along the first dimension."""

    def __init__(self, num_experts: int, local_ids: Iterable[int] | None) -> None:
        super().__init__()
        watch_hooks(self)
        self.num_experts = num_experts
        self.local_ids = _checked(range(num_experts) if local_ids is None else local_ids, self)

    @property
    def holder(self) -> nn.Module:
        """The module that has the parameters."""
        return self

    @property
    def stack_names(self) -> list[str]:
        """Names of the stacked parameters in :attr:`holder`; empty if experts are modules."""
        return []

    @property
    def has_biases(self) -> bool:
        """Whether any stacked parameter is a bias."""
        return any(name.endswith("bias") for name in self.stack_names)

    @property
    def sizes(self) -> tuple[int, int, int] | None:
        """D, the rows of an expert's up projection, and F; None for experts that are modules."""
        return None

    def whole_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the experts; not those that repeat single ones to train them."""
        named = self.named_parameters()
        return [p for name, p in named if not name.startswith(f"{TRAINED}.")]

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank, e."""
        return len(self.local_ids)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None if none is floating-point."""
        raise NotImplementedError

    def fused_stacks(self, dtype: torch.dtype) -> tuple[Stacks, str] | None:
        """What :mod:`~lightning_fastmoe.ops.expert_layer` alone computes for these experts.

        For a schedule that does something else in the middle of their passes. None if anything must
        run around them: hooks, adapters, single experts that are trained.

        Args:
            dtype: of the tokens.

        Returns:
            The stacks in that dtype, and the name of the activation.
        """
        return None

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which ``x`` meets the weights: autocast's if it is on, else the weights'."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.dtype or x.dtype

    @torch.no_grad()
    def keep(self, ids: Iterable[int]) -> None:
        """Drops all local experts but these, and frees their memory.

        Args:
            ids: global ids, ascending.

        Raises:
            TopologyError: if one of them is not on this rank.
        """
        kept = _checked(ids, self)
        if missing := sorted(set(kept) - set(self.local_ids)):
            raise TopologyError(f"Experts {missing} are not on this rank, so it can't keep them.")
        self._keep(kept)
        self.local_ids = kept
        if (trained := trained_of(self.holder)) is not None:
            trained.keep(kept)

    def _keep(self, ids: tuple[int, ...]) -> None:
        raise NotImplementedError

    def forward(self, x: Any, tokens_per_expert: Tensor) -> Any:
        """Applies each local expert to its rows.

        Args:
            x: (N, D), rows grouped by local expert, in the order of :attr:`local_ids`.
            tokens_per_expert: (e,) int64.

        Returns:
            (N, D).
        """
        raise NotImplementedError

    def routed_call(self, arguments: tuple[Any, ...]) -> RoutedCall | None:
        """What a call of :attr:`holder` reads of the stacks in :attr:`stack_names`.

        Args:
            arguments: the positional ones of the call.

        Returns:
            None if that isn't known: it may read every expert.
        """
        return None

    def refuse_others(self, what: str, mend: str) -> list[RemovableHandle]:
        """Refuses calls of :attr:`holder` that compute with its parameters by other code than ours.

        Args:
            what: the module has that such code would ignore.
            mend: what to do about it.

        Returns:
            What undoes it.
        """
        return []

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return f"experts {describe_ids(self.local_ids)} of {self.num_experts}"


def describe_ids(ids: tuple[int, ...]) -> str:
    """``0..3`` for contiguous ids, else ``0, 2, 5``."""
    if is_interval(ids):
        return f"{ids[0]}..{ids[-1]}"
    return ", ".join(map(str, ids))


def is_interval(ids: tuple[int, ...]) -> bool:
    """Whether ascending ids are contiguous."""
    return ids[-1] - ids[0] + 1 == len(ids)


def _checked(ids: Iterable[int], experts: Experts) -> tuple[int, ...]:
    found = tuple(ids)
    ascending = all(a < b for a, b in zip(found, found[1:], strict=False))
    if not (found and ascending and found[0] >= 0 and found[-1] < experts.num_experts):
        raise TopologyError(
            f"The ids of a rank's experts are {list(found)}. They must be a non-empty ascending"
            f" list of ids in [0, {experts.num_experts})."
        )
    return found
