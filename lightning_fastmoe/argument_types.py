"""Checks arguments against their annotations, so that a wrong type is reported at the call.

Otherwise ``async_checkpoint="yes"`` would pass, and ``top_k="2"`` would fail far from the call.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import operator
import types
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_fastmoe.errors import ConfigError


def check_types(
    owner: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    whole_floats: bool = False,
) -> dict[str, Any]:
    """Checks arguments and returns them as the types of their annotations.

    NumPy's integers and floats are numbers, bools are not, and strings are never converted.

    Args:
        owner: the class or function that takes them, for messages.
        function: the function with the annotations. Arguments without one are not checked.
        given: values by name.
        whole_floats: whether floats such as 5e8 are accepted as integers.

    Returns:
        The values, with NumPy's numbers replaced by Python's.

    Raises:
        ConfigError: naming the argument, its value and type, and the required type.
    """
    hints = _hints(function)
    checked = {}
    for name, value in given.items():
        hint = hints.get(name, Any)
        found = _convert(value, hint, whole_floats)
        if found is _WRONG:
            raise ConfigError(
                f"{owner}: {name}={value!r} ({type(value).__name__}) is invalid: it must be"
                f" {describe(hint)}."
            )
        checked[name] = found
    return checked


def check_known(owner: str, given: Collection[str], known: Collection[str]) -> None:
    """Refuses unknown argument names.

    Raises:
        ConfigError: naming the argument, and the one that was probably meant.
    """
    for name in given:
        if name not in known:
            raise ConfigError(f"{owner} has no argument {name!r}.{suggestion(name, known)}")


def suggestion(name: str, known: Collection[str]) -> str:
    """A sentence that suggests the closest name in ``known``; "" if none is close.

    >>> suggestion("expert_parallel", ["stage", "expert_parallel_size"])
    ' Did you mean expert_parallel_size?'
    """
    extended = [candidate for candidate in known if candidate.startswith(name)] if name else []
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    best = [*sorted(extended, key=len), *close][:1]
    return f" Did you mean {best[0]}?" if best else ""


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments, without ``self``, ``*args`` and ``**kwargs``."""
    rest = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.name != "self" and p.kind not in rest]


def describe(hint: Any) -> str:
    """Describes the values of an annotation in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        members = sorted(get_args(hint), key=lambda member: member is types.NoneType)
        return " or ".join(dict.fromkeys(describe(member) for member in members))
    if origin is Literal:
        return " or ".join(repr(value) for value in get_args(hint))
    simple = _WORDS.get(hint)
    if simple is not None:
        return simple
    kind = origin or hint
    if kind is list:
        return f"a list ({describe(get_args(hint)[0])} each)" if get_args(hint) else "a list"
    if kind in (dict, Mapping):
        return "a dict"
    return getattr(kind, "__name__", str(kind))


_WRONG = object()
_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    types.NoneType: "None",
}


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _convert(value: Any, hint: Any, whole_floats: bool) -> Any:
    """The value as the hint's type, or _WRONG."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        tried = (_convert(value, member, whole_floats) for member in members)
        return next((found for found in tried if found is not _WRONG), _WRONG)
    if origin is Literal:
        same = (known for known in members if type(known) is type(value) and known == value)
        return next(same, _WRONG)
    if hint in (bool, int, float):
        return _number(value, hint, whole_floats)
    if (origin or hint) is list:
        return _list(value, members, whole_floats)
    kind = origin or hint
    if kind is Any or not isinstance(kind, type) or isinstance(value, kind):
        return value  # annotations that are not classes are not checked
    return _WRONG


def _number(value: Any, kind: type, whole_floats: bool) -> Any:
    # NumPy's bool is neither a number nor a bool to Python.
    is_flag = isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
    if kind is bool or is_flag:
        return bool(value) if kind is bool and is_flag else _WRONG
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real) and kind is float:
        return float(value)
    if whole_floats and isinstance(value, float) and value.is_integer():
        return int(value)
    return _WRONG


def _list(value: Any, members: tuple[Any, ...], whole_floats: bool) -> Any:
    if not isinstance(value, list):
        return _WRONG
    found = [_convert(item, members[0], whole_floats) for item in value] if members else value
    return _WRONG if any(item is _WRONG for item in found) else found
