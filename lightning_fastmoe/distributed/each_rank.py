"""Runs a model on every rank as often as each of them likes, with the experts of all.

A forward pass through sharded experts needs all ranks. Where each rank generates text of its own,
they make different numbers of passes: one that has finished takes part in the layers of the others
without tokens. So before each layer the ranks tell each other where they are, which also is how an
error on one of them ends the function on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fastmoe.errors import ConfigError, ExchangeError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.expert_layers import ExpertLayer

_Result = TypeVar("_Result")
_DONE, _FAILED = -1, -2


@torch.no_grad()
def run_on_each_rank(
    module: nn.Module,
    layers: Mapping[str, ExpertLayer],
    progress: Callable[[], None],
    device: torch.device,
    function: Callable[..., _Result],
    *args: Any,
) -> _Result:
    """Runs ``function(*args)``, which may differ between ranks; every rank calls this.

    Args:
        module: the model that ``function`` runs; put into evaluation mode.
        layers: its MoE layers by name, the same on all ranks.
        progress: called before each layer.
        device: of collectives.
        function: may run the model any number of times, also never, with inputs of any shapes.
        args: its arguments.

    Returns:
        What ``function`` returned on this rank, once it has ended on all.

    Raises:
        ExchangeError: on the other ranks, if ``function`` raised on one, or on all, if ranks are in
            different layers.
        ConfigError: if ``function`` trains.
    """
    shared = {n: one for n, one in layers.items() if one.is_sharded or one.uses_global_batch}
    with evaluating(module):
        joined = dist.is_available() and dist.is_initialized()
        if not shared or not joined or dist.get_world_size() == 1:
            return function(*args)
        talk = _Talk(shared, progress, device)
        try:
            with talk.before_layers():
                result = function(*args)
        except BaseException as error:
            talk.fail(error)
            raise
        talk.serve()
        return result


class _Talk:
    """What this rank says to the others, and hears from them, before each layer."""

    def __init__(
        self,
        layers: Mapping[str, ExpertLayer],
        progress: Callable[[], None],
        device: torch.device,
    ) -> None:
        self._names, self._layers = list(layers), list(layers.values())
        self._progress, self._device = progress, device
        self._empty: dict[int, Any] = {}
        self._is_between = True  # not in a layer, where others wait elsewhere, nor in a collective

    def serve(self) -> None:
        """Joins the others' layers until all ranks are done."""
        while (where := self._round(_DONE, None)) is not None:
            args, kwargs = self._empty[where]
            entry = entry_of(self._layers[where])
            here = next(entry.parameters()).device
            entry(*_to(here, args), **_to(here, kwargs))

    def fail(self, error: BaseException) -> None:
        """Tells the others of an error of the function.

        One inside a layer can't be told here: others are in that layer's exchange. It has a
        deadline, and a strategy tells them in another way.
        """
        if self._is_between:
            self._gather(_FAILED)
            self._say(f"{type(error).__name__}: {error}")

    @contextmanager
    def before_layers(self) -> Iterator[None]:
        """Inside, each layer is announced before it runs."""
        handles = []
        for where, layer in enumerate(self._layers):
            entry = entry_of(layer)
            before, after = self._announce(where), self._leave
            handles += [
                entry.register_forward_pre_hook(before, with_kwargs=True),
                entry.register_forward_hook(after),
            ]
        try:
            with torch.compiler.set_stance("force_eager"):  # a graph with the layers sees no hooks
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _announce(self, where: int) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if entry.training or torch.is_grad_enabled():
                raise ConfigError(
                    f"{self._names[where]} was run for training: on_each_rank runs the model in"
                    " evaluation mode without gradients, as ranks that have finished run no"
                    " backward pass."
                )
            self._round(where, lambda: without_tokens(entry, args, kwargs))
            self._is_between = False

        return hook

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, *_: Any) -> None:
        self._is_between = True

    def _round(self, own: int, empty: Callable[[], Any] | None) -> int | None:
        """Tells all ranks where this one is; returns the layer that they run now, if any.

        Raises:
            ExchangeError: if another rank has failed, or is in another layer.
        """
        self._progress()
        said = self._gather(own)
        if _FAILED in said:
            self._is_between = False  # all ranks know: nothing to tell any more
            texts = self._say(None)
            rank, text = next((r, t) for r, t in enumerate(texts) if t is not None)
            raise ExchangeError(f"The function of on_each_rank failed on rank {rank}: {text}")
        running = sorted({where for where in said if where >= 0})
        if not running:
            return None
        if len(running) > 1:
            self._is_between = False
            places = [self._names[where] if where >= 0 else "done" for where in said]
            raise ExchangeError(
                f"on_each_rank: ranks are in different MoE layers ({', '.join(places)}). Each pass"
                " of the model must run all of its layers, in the same order on all ranks."
            )
        (where,) = running
        if _DONE in said and where not in self._empty:
            # A rank that never came here does not know what the layer takes.
            first = said.index(where)
            box = [empty() if empty is not None and dist.get_rank() == first else None]
            self._is_between = False
            dist.broadcast_object_list(box, src=first)
            self._empty[where] = box[0]
            self._is_between = True
        return where

    def _gather(self, own: int) -> list[int]:
        self._is_between = False
        mine = torch.tensor([own], dtype=torch.int64, device=self._device)
        everyone = mine.new_empty(dist.get_world_size())
        dist.all_gather_into_tensor(everyone, mine)
        said: list[int] = everyone.tolist()
        self._is_between = True
        return said

    def _say(self, text: str | None) -> list[str | None]:
        texts: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
        return texts


def entry_of(layer: ExpertLayer) -> nn.Module:
    """The module whose forward pass exchanges the layer's tokens."""
    entry: Any = layer
    return getattr(entry, "module", entry)  # type: ignore[no-any-return]


def without_tokens(
    entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the same structure and dtypes, on the CPU, for a call with zero tokens."""
    if not isinstance(entry, MoE):  # tensors (T, ...)
        empty: Any = pytree.tree_map_only(Tensor, _no_rows, (args, kwargs))
        return empty  # type: ignore[no-any-return]
    x = args[0] if args else kwargs["x"]
    token_ids = kwargs.get("token_ids")
    if isinstance(x, Tensor):
        x = x.new_empty((0, entry.d_model), device="cpu")
    else:
        x = pytree.tree_map(_no_rows, x)
    no_ids = None if token_ids is None else token_ids.new_empty((0,), device="cpu")
    return (x,), {"token_ids": no_ids}


def _no_rows(leaf: Tensor) -> Tensor:
    return leaf.new_empty((0, *leaf.shape[1:]), device="cpu")


def _to(device: torch.device, values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), values)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode, and each part back into its own."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
