"""Runs a model on rank 0 only, with the experts of the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_fastmoe.distributed.each_rank import entry_of, evaluating, without_tokens
from lightning_fastmoe.errors import ConfigError, ExchangeError
from lightning_fastmoe.nn.expert_layers import ExpertLayer

_Result = TypeVar("_Result")


@torch.no_grad()
def run_on_rank_zero(
    module: nn.Module,
    layers: Mapping[str, ExpertLayer],
    progress: Callable[[], None],
    function: Callable[..., _Result],
    *args: Any,
) -> _Result | None:
    """Runs ``function(*args)`` on rank 0; every rank calls this at the same point.

    Rank 0 announces each layer with sharded experts, or with a router that uses the global
    batch, and the other ranks then run that layer without tokens of their own. In between they
    wait for the next announcement, or for the end.

    Args:
        module: the model that ``function`` runs; put into evaluation mode on all ranks.
        layers: its MoE layers by name, the same on all ranks.
        progress: called at each announcement.
        function: may run the model any number of times, with inputs of any shapes.
        args: its arguments.

    Returns:
        What ``function`` returned on rank 0; None on the others.

    Raises:
        ExchangeError: on the other ranks, if ``function`` raised on rank 0.
        ConfigError: on rank 0, if ``function`` trains.
    """
    shared = {n: m for n, m in layers.items() if m.is_sharded or m.uses_global_batch}
    with evaluating(module):
        if not shared:
            return function(*args) if dist.get_rank() == 0 else None
        if dist.get_rank():
            _serve(shared, progress)
            return None
        last = ""
        try:
            with _announcing(shared, progress):
                return function(*args)
        except BaseException as error:
            last = f"{type(error).__name__}: {error}"
            raise
        finally:
            _tell((None, last))


def _serve(layers: Mapping[str, ExpertLayer], progress: Callable[[], None]) -> None:
    while True:
        name, what = _hear()
        progress()
        if name is None:
            if what:
                raise ExchangeError(f"The function that on_rank_zero runs failed on rank 0: {what}")
            return
        entry = entry_of(layers[name])
        args, kwargs = _to(next(entry.parameters()).device, what)
        entry(*args, **kwargs)


def _to(device: torch.device, values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), values)


@contextmanager
def _announcing(layers: Mapping[str, ExpertLayer], progress: Callable[[], None]) -> Iterator[None]:
    def announce(name: str) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if entry.training or torch.is_grad_enabled():
                raise ConfigError(
                    f"{name} was run for training on rank 0: on_rank_zero runs the model in"
                    " evaluation mode without gradients, as the other ranks run no backward pass."
                )
            progress()
            _tell((name, without_tokens(entry, args, kwargs)))

        return hook

    handles = [
        entry_of(layer).register_forward_pre_hook(announce(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # a graph that has the layers sees no hooks
            yield
    finally:
        for handle in handles:
            handle.remove()


def _tell(message: tuple[Any, Any]) -> None:
    dist.broadcast_object_list([message], src=0)


def _hear() -> tuple[Any, Any]:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    message: tuple[Any, Any] = box[0]
    return message
