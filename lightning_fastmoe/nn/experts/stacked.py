"""Experts that are FFNs of one shape: stacked weights, grouped GEMMs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe import ops
from lightning_fastmoe.nn.experts.base import Experts
from lightning_fastmoe.nn.experts.grouped import groups_of
from lightning_fastmoe.nn.experts.init import init_experts_
from lightning_fastmoe.nn.experts.lora import SCALE, adapters_of
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.nn.experts.trained import TrainedExperts, check_frozen, trained_of
from lightning_fastmoe.nn.hooks import has_hooks

WEIGHTS = ("up_proj", "down_proj")
"""The names of the weights of :class:`StackedExperts`."""


class StackedExperts(Experts):
    """The routed FFNs of one layer that live on this rank, stacked along the first dimension.

    The layout matches Hugging Face transformers 5 (``Qwen3MoeExperts`` and similar classes), so
    weights can be copied across directly.

    Parameters:
        up_proj: (e, 2F, D) for gated activations, the gate's F rows first; else (e, F, D).
        down_proj: (e, D, F).
        up_bias: (e, 2F) or (e, F), only with ``bias=True``.
        down_bias: (e, D), only with ``bias=True``.

    Args:
        d_model: D.
        d_ffn: F, the inner width of one expert.
        num_experts: E of the whole model.
        local_ids: global ids of the experts on this rank, ascending; None for all.
        layer_seed: seeds each expert together with its global id.
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS` or
            :data:`~lightning_fastmoe.ops.activation.COMPOSED`.
        bias: whether both projections have biases (initially zero).
        init_std: see :func:`~lightning_fastmoe.nn.experts.init.init_experts_`.
    """

    is_stacked = True

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        num_experts: int,
        local_ids: Iterable[int] | None = None,
        *,
        layer_seed: int,
        activation: str = "swiglu",
        bias: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__(num_experts, local_ids)
        self.d_model, self.d_ffn = d_model, d_ffn
        self.layer_seed, self.activation, self.init_std = layer_seed, activation, init_std
        up_rows = (2 if ops.is_gated(activation) else 1) * d_ffn
        e = self.num_local_experts
        self.up_proj = nn.Parameter(torch.empty(e, up_rows, d_model))
        self.down_proj = nn.Parameter(torch.empty(e, d_model, d_ffn))
        self.up_bias = nn.Parameter(torch.empty(e, up_rows)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(e, d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the local experts by their global ids; does nothing on the meta device."""
        if self.up_proj.is_meta:
            return
        for name, fan_in in (("up_proj", self.d_model), ("down_proj", self.d_ffn)):
            init_experts_(
                getattr(self, name),
                name=name,
                layer_seed=self.layer_seed,
                expert_ids=self.local_ids,
                fan_in=fan_in,
                std=self.init_std,
            )
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _keep(self, ids: tuple[int, ...]) -> None:
        keep_rows(self, self.stack_names, self.local_ids, ids)

    @property
    def stack_names(self) -> list[str]:
        """Names of the stacked parameters."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """See :class:`Experts`."""
        matrices = 2 if ops.is_gated(self.activation) else 1
        return self.d_model, matrices * self.d_ffn, self.d_ffn

    def fused_stacks(self, dtype: torch.dtype) -> tuple[ops.Stacks, str] | None:
        """See :class:`Experts`."""
        is_plain = self.activation in ops.ACTIVATIONS and SCALE not in vars(self)
        if not is_plain or trained_of(self) or groups_of(self) or has_hooks(self):
            return None
        return self.stacks(dtype), self.activation

    def stacks(self, dtype: torch.dtype) -> ops.Stacks:
        """The parameters in a dtype."""
        return self._stacks(self._parameters.get, dtype)

    def with_stacks(self, stacks: Sequence[Tensor]) -> StackedExperts:
        """These experts with tensors in place of their parameters, without biases they lack."""
        other = StackedExperts.__new__(type(self))
        names = self.stack_names
        replaced = {**dict.fromkeys(self._parameters), **dict(zip(names, stacks, strict=True))}
        vars(other).update({**vars(self), "_parameters": replaced})
        return other

    def forward(
        self,
        x: Tensor,
        tokens_per_expert: Tensor,
        weights: Tensor | None = None,
        order: ops.ExpertOrder | None = None,
    ) -> Tensor:
        """``x (N, D)`` grouped by local expert, ``tokens_per_expert (e,)`` -> (N, D).

        With ``weights (T, K)`` and ``order``, permutes and combines too: ``x (T, D)`` in token
        order -> (T, D), each token's weighted sum.
        """
        rest = (x, tokens_per_expert, weights, order)
        groups = groups_of(self)
        if groups is not None:
            grouped: Tensor = groups(functools.partial(self._compute, None), *rest)
            return grouped
        trained = trained_of(self)
        return self._compute(None, *rest) if trained is None else trained(self._compute, *rest)

    def _compute(
        self,
        trained: TrainedExperts | None,
        x: Tensor,
        tokens_per_expert: Tensor,
        weights: Tensor | None,
        order: ops.ExpertOrder | None,
    ) -> Tensor:
        up, down, up_bias, down_bias = self.stacks(x.dtype)
        if trained is not None:
            check_frozen(self, trained)
            rows = ops.TrainedRows(trained.rows, self._stacks(trained.slices, x.dtype))
            stacks = (up, down, up_bias, down_bias)
            return ops.sparse_layer(
                x, tokens_per_expert, weights, order, stacks, rows, self.activation
            )
        mlp: Any = (up, down, self.activation, up_bias, down_bias)
        planned = self.activation in ops.ACTIVATIONS
        if adapters := adapters_of(self, WEIGHTS, x.dtype):
            mlp, planned = (*mlp, *adapters), False
        if weights is None or order is None:
            return (ops.expert_mlp if planned else ops.grouped_mlp)(x, tokens_per_expert, *mlp)
        return (ops.expert_layer if planned else ops.unfused_layer)(x, weights, order, *mlp)

    def routed_call(self, arguments: tuple[Any, ...]) -> RoutedCall | None:
        """See :class:`Experts`: experts with rows are read, also if their weights are zero."""
        if len(arguments) < 2 or "forward" in vars(self) or trained_of(self) is not None:
            return None
        x, counts, weights, order = (*arguments, None, None)[:4]
        tokens, top_k = x.shape[0], 1
        if weights is not None and order is not None:
            counts, (tokens, top_k) = order.tokens_per_expert, weights.shape

        def experts() -> list[int]:
            return [e for e, count in enumerate(counts.tolist()) if count]

        return RoutedCall(tokens, top_k, experts)

    @staticmethod
    def _stacks(get: Callable[[str], Tensor | None], dtype: torch.dtype) -> ops.Stacks:
        """The parameters, or the trained slices of these, by name."""
        up, down, *biases = (
            None if (p := get(name)) is None else p.to(dtype)
            for name in ("up_proj", "down_proj", "up_bias", "down_bias")
        )
        assert up is not None
        assert down is not None
        return up, down, biases[0], biases[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads the local experts, by global id, from a state dict of the whole layer (E)."""
        if self.num_local_experts < self.num_experts:
            for name, _ in self.named_parameters(recurse=False):
                value = state_dict.get(prefix + name)
                if isinstance(value, Tensor) and value.shape[:1] == (self.num_experts,):
                    rows = _rows(range(self.num_experts), self.local_ids)
                    state_dict[prefix + name] = value[rows]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.up_proj.dtype

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        sizes = f"d_model={self.d_model}, d_ffn={self.d_ffn}, activation={self.activation}"
        return f"{sizes}, {super().extra_repr()}"


def keep_rows(
    module: nn.Module, names: Iterable[str], held: Sequence[int], wanted: Sequence[int]
) -> None:
    """Leaves copies of slices in stacked parameters, so that the rest is freed.

    The parameters stay the same objects, with their hooks and what was said of them.

    Args:
        module: has the parameters.
        names: their names, each (len(held), ...).
        held: global ids of the experts whose rows they are.
        wanted: those to keep.
    """
    rows = _rows(held, wanted)
    for name in names:
        parameter = module.get_parameter(name)
        parameter.data = parameter.detach()[rows].clone()
        parameter.grad = None
        for mark in [mark for mark in vars(parameter) if mark.startswith("ds_")]:
            delattr(parameter, mark)  # DeepSpeed's, of an earlier run, about the whole


def _rows(held: Sequence[int], wanted: Sequence[int]) -> slice | list[int]:
    """The rows of experts ``wanted`` among ``held``; a slice, which makes no copy, if possible."""
    rows = [held.index(i) for i in wanted]
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return rows
