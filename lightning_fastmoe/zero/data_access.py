"""Watches what PyTorch doesn't record: access to ``parameter.data`` while ZeRO trains.

In-place operations on ``parameter.data`` leave no trace on the parameter. Whoever has read it may
have written to it, so its weights are then compared with the master weights, all of them.

Of a parameter that ZeRO 3 has partitioned, ``.data`` is an empty tensor, and writing to it has no
effect. ``target.data.mul_(0.99)`` and ``target.data = 0.99 * target.data + 0.01 * online.data`` are
common in code with a target network or a clamped critic; there they are errors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_fastmoe.errors import ParameterEditError

_DATA: Any = Tensor.data
_MANAGE_PARAMETERS = ("deepspeed", "lightning_fastmoe", "torch")
"""Packages whose access is no user's."""
_WRITE_PARAMETERS = ("torch.nn.utils",)
"""Of those, what acts for users: vector_to_parameters() assigns new data."""
_IN_PLACE = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)
_WRITES_NOTHING = frozenset({"requires_grad_", "share_memory_"})


def refusal(name: str, what: str) -> str:
    """What a user is told who wrote to a partitioned parameter.

    Args:
        name: of the parameter.
        what: was done to it: "written to" for example.
    """
    return (
        f"Parameter {name!r} was {what} while ZeRO stage 3 had it partitioned, which has no effect."
        " Write to it inside 'with trainer.strategy.edit_parameters([parameter]):', on all ranks."
    )


class DataAccess:
    """Watches ``.data`` of a model's parameters from its creation until :meth:`end`.

    Args:
        names: id -> name, of all parameters of the model.

    Attributes:
        seen: ids of the parameters that were whole when their data was read or replaced; whoever
            has dealt with them clears it.
        written: those whose data was replaced, or written to while ZeRO 3 had gathered them.
    """

    _watching: list[DataAccess] = []

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self.seen: set[int] = set()
        self.written: set[int] = set()
        self._watching.append(self)
        nn.Parameter.data = property(_get, _set)  # type: ignore[assignment]

    def end(self) -> None:
        """Stops watching."""
        if self in self._watching:
            self._watching.remove(self)
        if not self._watching and "data" in vars(nn.Parameter):
            del nn.Parameter.data

    @classmethod
    def of(cls, parameter: nn.Parameter) -> DataAccess | None:
        """What watches a parameter."""
        return next((one for one in cls._watching if id(parameter) in one._names), None)

    def read(self, parameter: nn.Parameter, data: Tensor) -> Tensor:
        """What a user gets."""
        if not _is_partitioned(parameter):
            self.seen.add(id(parameter))
            if getattr(parameter, "ds_persist", True):
                return data
        found = data.as_subclass(_Data)
        found.access, found.parameter = self, parameter
        return found

    def write(self, parameter: nn.Parameter, what: str) -> None:
        """Notes that a user writes.

        Args:
            parameter: to it.
            what: is done: "written to" for example.

        Raises:
            ParameterEditError: if it is partitioned.
        """
        if _is_partitioned(parameter):
            raise ParameterEditError(refusal(self._names[id(parameter)], what))
        self.seen.add(id(parameter))
        self.written.add(id(parameter))


def _is_partitioned(parameter: nn.Parameter) -> bool:
    status = vars(parameter).get("ds_status", ZeroParamStatus.AVAILABLE)
    return status is not ZeroParamStatus.AVAILABLE


class _Data(Tensor):
    """The data of a parameter that ZeRO 3 has partitioned, or will again; notes writing to it."""

    access: DataAccess
    parameter: nn.Parameter

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _writes(func.__name__):
            first = args[0] if args else next(iter(kwargs.values()), None)
            targets = first if isinstance(first, list | tuple) else [first]
        else:
            targets = [kwargs.get("out")]
        for target in targets:
            if isinstance(target, cls):
                target.access.write(target.parameter, "written to")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(cls, _as_tensor, (args, kwargs))
            return func(*args, **kwargs)


def _as_tensor(data: _Data) -> Tensor:
    return data.as_subclass(Tensor)


def _writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    if name.endswith("__"):
        return name in _IN_PLACE
    return name.endswith("_") and name not in _WRITES_NOTHING


def _get(parameter: nn.Parameter) -> Tensor:
    data: Tensor = _DATA.__get__(parameter)
    if _manages_parameters(sys._getframe(1).f_globals.get("__name__", "")):
        return data
    access = DataAccess.of(parameter)
    return data if access is None else access.read(parameter, data)


def _set(parameter: nn.Parameter, data: Tensor) -> None:
    if not _manages_parameters(sys._getframe(1).f_globals.get("__name__", "")):
        access = DataAccess.of(parameter)
        if access is not None:
            access.write(parameter, "assigned new data")
    if isinstance(data, _Data):
        data = _as_tensor(data)
    _DATA.__set__(parameter, data)


@cache
def _manages_parameters(module: str) -> bool:
    """Whether a module's code belongs to what moves parameters, not to a user."""
    return module.partition(".")[0] in _MANAGE_PARAMETERS and not module.startswith(
        _WRITE_PARAMETERS
    )
