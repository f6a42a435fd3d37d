"""Python values as JSON, without loss; what JSON can't hold goes into a list beside it.

Beyond JSON's own types a value is an object with one key that begins with ``$``:

    {"$float": "nan" | "inf" | "-inf"}
    {"$tuple": [values]}
    {"$dict": [[key, value], ...]}            keys that are no strings, or begin with "$"
    {"$tensor": [dtype, shape, [values]]}     dtype as in safetensors; up to 1024 values
    {"$bytes": base64}
    {"$object": index}                        into the list of objects
"""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.records import DTYPE_NAMES, DTYPES
from lightning_fastmoe.errors import CheckpointError

_MAX_TENSOR = 1024
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
        value: anything.
        objects: what JSON can't hold is appended here.
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


def decode(value: Any, objects: list[Any], where: object) -> Any:
    """The opposite of :func:`encode`.

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
            except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{where}: {key!r} can't be read: {error}") from error
    return {k: decode(v, objects, where) for k, v in value.items()}


def _decode_tagged(key: str, content: Any, objects: list[Any], where: object) -> Any:
    match key:
        case "$float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
        case "$tuple":
            return tuple(decode(v, objects, where) for v in content)
        case "$dict":
            return {decode(k, objects, where): decode(v, objects, where) for k, v in content}
        case "$bytes":
            return base64.b64decode(content, validate=True)
        case "$tensor":
            dtype, shape, values = content
            flat = torch.tensor([decode(v, objects, where) for v in values], dtype=DTYPES[dtype])
            return flat.reshape(shape)
        case "$object":
            if not 0 <= content < len(objects):
                raise IndexError(f"there is no object {content}")
            return objects[content]
    raise CheckpointError(f"{where}: {key!r} is unknown. It may come from a newer version.")
