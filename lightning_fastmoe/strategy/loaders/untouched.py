"""Undoes a step's effects on a LightningModule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

_Undo = Callable[[], Any]


@contextmanager
def untouched(module: pl.LightningModule) -> Iterator[None]:
    """Restores on exit what evaluation steps usually write to.

    That is: the state of every torchmetrics metric; all other buffers; and the module's own
    attributes, including lists, dicts, sets and deques at any depth (``self.outputs.append(...)``),
    but not the contents of other objects.
    """
    undo = [*_metrics(module), *_buffers(module), _attributes(module)]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _metrics(module: nn.Module) -> Iterator[_Undo]:
    for metric in module.modules():
        if isinstance(metric, Metric):
            yield _metric(metric)


def _metric(metric: Metric) -> _Undo:
    state = metric._copy_state_dict()
    names = ("_update_count", "_computed", "_forward_cache")
    rest = {name: getattr(metric, name) for name in names}

    def restore() -> None:
        for key, value in {**state, **rest}.items():
            setattr(metric, key, value)

    return restore


@torch.no_grad()
def _buffers(module: nn.Module) -> Iterator[_Undo]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield _rebind(owner._buffers, name, buffer)


def _rebind(owner: dict[str, Any], name: str, tensor: Tensor) -> _Undo:
    """An action that restores the values of ``tensor`` and its entry in ``owner``."""
    copy = tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            tensor.copy_(copy)
        owner[name] = tensor

    return restore


def _attributes(module: pl.LightningModule) -> _Undo:
    internal = vars(pl.LightningModule()).keys()
    own = {k: v for k, v in vars(module).items() if k not in internal and not k.startswith("ds_")}
    seen: dict[int, _Undo] = {}
    undo = {name: _value(value, seen) for name, value in own.items()}
    tensors = [_rebind(vars(module), k, v) for k, v in own.items() if isinstance(v, Tensor)]

    def restore() -> None:
        for name in vars(module).keys() - own.keys() - internal:
            if not name.startswith("ds_"):
                del vars(module)[name]
        vars(module).update({name: action() for name, action in undo.items()})
        for action in tensors:
            action()

    return restore


def _value(value: Any, seen: dict[int, _Undo]) -> _Undo:
    """An action that refills ``value``, if it is a container, and returns it."""
    if not isinstance(value, list | dict | set | deque):
        return lambda: value
    if id(value) not in seen:
        seen[id(value)] = lambda: value  # a container that holds itself
        seen[id(value)] = _container(value, seen)
    return seen[id(value)]


def _container(value: Any, seen: dict[int, _Undo]) -> _Undo:
    items: list[tuple[Any, _Undo]]
    if isinstance(value, dict):
        items = [(k, _value(v, seen)) for k, v in value.items()]
    else:
        items = [(None, _value(v, seen)) for v in value]

    def restore() -> Any:
        value.clear()
        if isinstance(value, dict):
            value.update({k: action() for k, action in items})
        elif isinstance(value, set):
            value.update(action() for _, action in items)
        else:
            value.extend(action() for _, action in items)
        return value

    return restore
