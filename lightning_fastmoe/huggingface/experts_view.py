"""transformers' modules of stacked experts as :class:`~lightning_fastmoe.nn.Experts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe import ops
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import (
    NAME,
    compute,
    compute_dtype,
    compute_with,
    fused_activation,
    fused_stacks,
    parameter_names,
    stack_names,
    stacked_weights,
    views,
)
from lightning_fastmoe.huggingface.packed_experts import stack_dtype, weight_of
from lightning_fastmoe.nn.experts import Experts
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.nn.experts.stacked import keep_rows
from lightning_fastmoe.nn.experts.trained import trained_of


class TransformersExperts(Experts):
    """A view of transformers' module, which holds the parameters; no part of the model's tree.

    Args:
        module: of a class with transformers' ``@use_experts_implementation``.
    """

    is_stacked = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.num_experts, None)  # type: ignore[arg-type]
        self._module = (module,)  # in a tuple, so that it isn't registered as a part
        self._given: Mapping[str, Tensor] | None = None

    @property
    def module(self) -> nn.Module:
        """transformers' module."""
        return self._module[0]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Those of :attr:`module`, so that parameters and buffers are its own, too."""
        yield from self.module.named_modules(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, or the one that they had before they were packed."""
        return stack_dtype(self.module, "down_proj")

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which ``x`` meets the weights: autocast's, which leaves fp64 alone."""
        return compute_dtype(x, weight_of(self.module, "down_proj"))

    def _keep(self, ids: tuple[int, ...]) -> None:
        keep_rows(self.module, self.stack_names, self.local_ids, ids)

    holder = module

    @property
    def stack_names(self) -> list[str]:
        """The names in :attr:`module` of the parameters that are computed with."""
        return parameter_names(self.module)

    @property
    def activation(self) -> str | None:
        """See :func:`~lightning_fastmoe.huggingface.experts_class.fused_activation`."""
        return fused_activation(self.module)

    def stacks(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Both weights in a dtype, in the layout of their class, and both biases or None."""
        stacked_weights(self.module)  # raises what this package can't compute
        found = [getattr(self.module, name).to(dtype) for name in stack_names(self.module)]
        return (*found, None, None)[:4]

    def with_stacks(self, stacks: Sequence[Tensor]) -> TransformersExperts:
        """These experts with tensors in place of their parameters, without biases they lack."""
        other = TransformersExperts.__new__(TransformersExperts)
        names = stack_names(self.module)
        vars(other).update({**vars(self), "_given": dict(zip(names, stacks, strict=True))})
        return other

    @property
    def sizes(self) -> tuple[int, int, int]:
        """See :class:`~lightning_fastmoe.nn.experts.Experts`."""
        up, down = stacked_weights(self.module)[:2]
        return up.shape[2], up.shape[1], down.shape[2]

    def fused_stacks(self, dtype: torch.dtype) -> tuple[ops.Stacks, str] | None:
        """See :class:`~lightning_fastmoe.nn.experts.Experts`."""
        return fused_stacks(self.module, dtype, self._replaced())

    def forward(
        self,
        x: Tensor,
        tokens_per_expert: Tensor,
        weights: Tensor | None = None,
        order: ops.ExpertOrder | None = None,
    ) -> Tensor:
        """See :func:`~lightning_fastmoe.huggingface.experts_class.compute`."""
        rest = (x, tokens_per_expert, weights, order)
        replaced = self._replaced()
        if replaced is None:
            return compute(self.module, *rest)
        return compute_with(self.module, replaced, *rest)

    def _replaced(self) -> Any:
        """What :meth:`with_stacks` was given, in the layout that is computed with; else None."""
        return None if self._given is None else views(self.module, self._given.__getitem__)

    def routed_call(self, arguments: tuple[Any, ...]) -> RoutedCall | None:
        """See :class:`~lightning_fastmoe.nn.Experts`; other implementations may read all experts.

        Args:
            arguments: (T, D) tokens, (T, K) ids and (T, K) weights.
        """
        chosen = getattr(self.module.config, "_experts_implementation", None)
        if chosen != NAME or "forward" in vars(self.module) or trained_of(self.module) is not None:
            return None
        if len(arguments) < 3 or arguments[1].dim() != 2:
            return None
        ids, number = arguments[1], self.num_experts

        def experts() -> list[int]:
            read: set[int] = set()
            for row in ids.tolist():
                # Dropped slots are computed with another expert of their token, see only_in_range.
                another = min([*row, number - 1])
                read.update(another if e == number else e for e in row)
            return sorted(e for e in read if 0 <= e < number)  # the layer refuses others

        return RoutedCall(ids.shape[0], ids.shape[1], experts)

    def refuse_others(self, what: str, mend: str) -> list[RemovableHandle]:
        """See :class:`~lightning_fastmoe.nn.Experts`: other implementations of transformers."""
        return [self.module.register_forward_pre_hook(partial(_refuse, what, mend))]


def allow_others(module: nn.Module) -> None:
    """Undoes :meth:`TransformersExperts.refuse_others`, in a copy of the module, too."""
    hooks = module._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "func", None) is _refuse]:
        del hooks[key]


def _refuse(what: str, mend: str, experts: Any, args: Any) -> None:
    chosen = experts.config._experts_implementation
    if chosen != NAME:
        raise ConfigError(
            f"{type(experts).__name__} has {what}, which experts_implementation={chosen!r} would"
            f' ignore. Keep "{NAME}", or {mend}.'
        )
