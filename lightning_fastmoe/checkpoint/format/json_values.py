"""Lossless encoding of Python values as JSON; what JSON can't hold goes into a separate list.

A value of a type that JSON lacks is an object with one key that begins with ``$``:

    {"$float": "nan" | "inf" | "-inf"}
    {"$tuple": [values]}
    {"$dict": [[key, value], ...]}            keys that are not strings, or begin with "$"
    {"$tensor": [dtype, shape, [values]]}     dtype as in safetensors; up to 1024 values
    {"$bytes": base64}
    {"$object": index}                        into the list of objects
"""

from __future__ import annotations

import base64
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format.dtypes import DTYPE_NAMES, DTYPES
from lightning_fastmoe.checkpoint.format.json_file import is_a
from lightning_fastmoe.checkpoint.format.records import MAX_NUMEL
from lightning_fastmoe.errors import CheckpointError

_MAX_TENSOR = 1024
_FLOATS = ("nan", "inf", "-inf")
_JSON_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


def encode(value: Any, objects: list[Any]) -> Any:
    """Turns a value into what ``json.dumps`` writes.

    Args:
        value: any value.
        objects: values that JSON can't hold are appended to this list.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) is list:
        return [encode(v, objects) for v in value]
    if type(value) is tuple:
        return {"$tuple": [encode(v, objects) for v in value]}
    if type(value) is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if type(value) is dict:
        if all(type(k) is str and not k.startswith("$") for k in value):
            return {k: encode(v, objects) for k, v in value.items()}
        pairs = [[encode(k, objects), encode(v, objects)] for k, v in value.items()]
        return {"$dict": pairs}
    if type(value) is Tensor and _fits(value):
        flat = value.detach().cpu().reshape(-1).tolist()
        name = DTYPE_NAMES[value.dtype]
        return {"$tensor": [name, list(value.shape), [encode(v, objects) for v in flat]]}
    objects.append(value.detach().cpu() if type(value) is Tensor else value)
    return {"$object": len(objects) - 1}


def _fits(value: Tensor) -> bool:
    plain = value.layout == torch.strided and not value.requires_grad and not value.is_meta
    return plain and value.dtype in _JSON_DTYPES and value.numel() <= _MAX_TENSOR


class Sized(Protocol):
    """A list of objects, or a placeholder for one that is not loaded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def decode(value: Any, objects: Sized, where: object) -> Any:
    """The inverse of :func:`encode`.

    Args:
        value: from JSON.
        objects: as filled by :func:`encode`.
        where: the file, for messages.

    Raises:
        CheckpointError: if the value was not made by :func:`encode`.
    """
    if isinstance(value, list):
        return [decode(v, objects, where) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, content),) = value.items()
        if key.startswith("$"):
            try:
                return _decode_tagged(key, content, objects, where)
            except CheckpointError:
                raise
            except (TypeError, ValueError, LookupError, RuntimeError, OverflowError) as error:
                if isinstance(error, RecursionError):
                    raise
                raise CheckpointError(f"{where}: {key!r} can't be read: {error}") from error
    for key in value:
        if key.startswith("$"):
            raise CheckpointError(f"{where}: {key[:80]!r} is not the only key of its object.")
    return {k: decode(v, objects, where) for k, v in value.items()}


def _decode_tagged(key: str, content: Any, objects: Sized, where: object) -> Any:
    match key:
        case "$float":
            if content not in _FLOATS:
                raise ValueError(f"{str(content)[:80]} is not one of {', '.join(_FLOATS)}")
            return float(content)  # a new object: two NaN can be keys of one map
        case "$tuple":
            return tuple(decode(v, objects, where) for v in _a_list(content))
        case "$dict":
            pairs = [_a_list(pair, 2) for pair in _a_list(content)]
            result = {decode(k, objects, where): decode(v, objects, where) for k, v in pairs}
            if len(result) != len(pairs):
                raise ValueError("a key occurs twice")
            return result
        case "$bytes":
            return base64.b64decode(_a(content, str), validate=True)
        case "$tensor":
            dtype, shape, values = _a_list(content, 3)
            return _tensor(dtype, shape, values, where)
        case "$object":
            if not 0 <= _a(content, int) < len(objects):
                raise IndexError(
                    f"object {str(content)[:40]} does not exist; there are {len(objects)}"
                )
            return objects[content]
    raise CheckpointError(f"{where}: {key[:80]!r} is unknown. It may come from a newer version.")


def _tensor(name: Any, shape: Any, values: Any, where: object) -> Tensor:
    dtype = DTYPES.get(_a(name, str))
    if dtype not in _JSON_DTYPES:
        raise ValueError(f"dtype {name[:40]!r} can't be stored in JSON")
    for size in _a_list(shape):
        if not 0 <= _a(size, int) <= MAX_NUMEL:
            raise ValueError(f"the shape {str(shape)[:80]} is invalid")
    count = math.prod(shape)
    if count > _MAX_TENSOR or len(_a_list(values)) != count:
        raise ValueError(f"the shape {str(shape)[:80]} does not fit {len(values)} values")
    kinds: tuple[type, ...] = (bool,) if dtype == torch.bool else (int,)
    if dtype.is_floating_point:
        kinds = (int, float)
    plain = [decode(v, [], where) for v in values]
    if not all(any(is_a(v, kind) for kind in kinds) for v in plain):
        raise TypeError(f"a value is not of the dtype {name}")
    return torch.tensor(plain, dtype=dtype).reshape(shape)


def _a(value: Any, kind: type) -> Any:
    if not is_a(value, kind):
        raise TypeError(f"{str(value)[:80]} is not of type {kind.__name__}")
    return value


def _a_list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        expected = "a list" if length is None else f"a list of {length}"
        raise TypeError(f"{str(value)[:80]} is not {expected}")
    return value
