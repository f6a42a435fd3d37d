"""Experts that are custom modules, each called with its own tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.nn.experts.base import Experts
from lightning_fastmoe.nn.experts.init import expert_generator

ExpertFactory = Callable[..., nn.Module]


class ModuleExperts(Experts):
    """The routed experts of one layer that live on this rank, each a module named after its id.

    Every local expert is called in each pass, even with zero tokens, so that every parameter gets a
    gradient. Splitting the tokens reads their counts on the host.

    Args:
        expert: called once per local expert, as ``expert(*arguments)``; or the E modules.
        arguments: for ``expert``.
        num_experts: E of the whole model.
        local_ids: global ids of the experts on this rank, ascending; None for all.
        layer_seed: seeds torch's global generator for each expert, together with its global id, so
            an expert starts from the same weights on any topology.

    Raises:
        ConfigError: if ``expert`` gives something other than a module, or one module twice.
    """

    is_stacked = False

    def __init__(
        self,
        expert: ExpertFactory | Sequence[nn.Module],
        arguments: tuple[int, ...],
        num_experts: int,
        local_ids: Iterable[int] | None = None,
        *,
        layer_seed: int,
    ) -> None:
        super().__init__(num_experts, local_ids)
        for i in self.local_ids:
            module = _build(expert, arguments, layer_seed, i) if callable(expert) else expert[i]
            if not isinstance(module, nn.Module):
                raise ConfigError(
                    f"expert= gave a {type(module).__name__} for expert {i}. It must be a module"
                    " class or a function that returns a new torch.nn.Module, or a list of them."
                )
            if any(module is other for other in self.children()):
                raise ConfigError(
                    f"expert= gave the same module for expert {i} as for another one. Each expert"
                    " needs a module of its own."
                )
            self.add_module(str(i), module)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first floating-point parameter; None without any."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def _keep(self, ids: tuple[int, ...]) -> None:
        for i in set(self.local_ids) - set(ids):
            delattr(self, str(i))

    def forward(self, x: Any, tokens_per_expert: Tensor) -> Any:
        """Calls each local expert with its rows.

        Args:
            x: a tensor (N, ...), or a tuple, list or dict of them; rows grouped by local expert.
            tokens_per_expert: (e,) int64.

        Returns:
            The experts' outputs, concatenated: a tensor (N, ...) or a structure of them.

        Raises:
            ShapeError: if an expert returns a different number of rows than it got, or a different
                structure than the others.
        """
        counts = tokens_per_expert.tolist()
        leaves, spec = pytree.tree_flatten(x)
        chunks = zip(*(leaf.split(counts) for leaf in leaves), strict=True)
        outputs: list[list[Tensor]] = []
        out_spec: Any = None
        for i, n, chunk in zip(self.local_ids, counts, chunks, strict=True):
            y = self.get_submodule(str(i))(pytree.tree_unflatten(list(chunk), spec))
            y_leaves, y_spec = pytree.tree_flatten(y)
            if not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (n,) for leaf in y_leaves):
                raise ShapeError(
                    f"Expert {i} got {n} tokens and returned"
                    f" {[tuple(getattr(leaf, 'shape', ())) for leaf in y_leaves]}. An expert must"
                    " return a tensor, or a structure of tensors, with one row per token."
                )
            if outputs and y_spec != out_spec:
                raise ShapeError(
                    f"Expert {i} returned a different structure than expert {self.local_ids[0]}:"
                    f" {y_spec} and {out_spec}. All experts of a layer must return the same."
                )
            outputs.append(y_leaves)
            out_spec = y_spec
        joined = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
        return pytree.tree_unflatten(joined, out_spec)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads the local experts, by global id, from a state dict of the whole layer."""
        others = set(map(str, range(self.num_experts))) - set(map(str, self.local_ids))
        for key in [k for k in state_dict if k.startswith(prefix)]:
            if key[len(prefix) :].split(".")[0] in others:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _build(
    factory: ExpertFactory, arguments: tuple[int, ...], layer_seed: int, expert_id: int
) -> nn.Module:
    """One expert, from its own seed; torch's CPU generator is left as it was.

    Built on the CPU, then moved: every rank seeds its device's own generator the same, whichever
    experts it builds, so that different experts would start from the same weights.
    """
    try:
        inspect.signature(factory).bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"expert= can't be called with {arguments}, (d_model, d_ffn) or without d_ffn (d_model)"
            f" alone: {error}. Wrap it in a function that takes these."
        ) from error
    seed = expert_generator(layer_seed, "expert", expert_id).initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        device = torch.get_default_device()
        if device.type in ("cpu", "meta"):
            return factory(*arguments)
        with torch.device("cpu"):
            built = factory(*arguments)
        return built.to(device) if isinstance(built, nn.Module) else built
