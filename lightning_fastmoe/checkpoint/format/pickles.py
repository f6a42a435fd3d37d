"""Loads a checkpoint's few pickles as plain data, with bounded memory.

``torch.load(weights_only=True)`` runs no code, but allocates whatever the file asks for: a deflated
record of 2 MB can inflate to 2 GB, and ``bytearray(6_000_000_000)`` takes 40 bytes to write. So an
archive is examined before it is loaded. ``torch.save`` never compresses, and what it writes needs
about as much memory as the file has bytes; archives that would need more are refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from lightning_fastmoe.errors import CheckpointError

TRUST_STRATEGY = (
    "If you trust the checkpoint's origin, use FastMoEStrategy(trust_checkpoints=True), or allow"
    " their classes with torch.serialization.add_safe_globals([...]) before loading."
)
"""Advice for error messages about objects that are not plain data, where a strategy loads them."""

_MAX_DEPTH = 500
_STORAGE_ITEMSIZES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "UntypedStorage": 1,
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "QInt32Storage": 4,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
_VIEWS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
_COLLECTIONS = ("OrderedDict", "Counter", "set", "Size", "complex")
_EXPANDED = 2**20
"""Maximum number of elements of a tensor that repeats its storage's, as an expanded one does."""

_ENCODINGS = ("latin1", "latin-1", "utf-8", "ascii")


def load_objects(data: bytes, where: Path, *, trusted: bool, advice: str) -> list[Any]:
    """Loads the list of values in ``objects.pt`` or ``rank_NNNNN.pt``.

    Args:
        data: the file's bytes.
        where: its path, for messages.
        trusted: also unpickle arbitrary objects, which can run any code.
        advice: for the error message, what to do about objects that are not plain data.

    Raises:
        CheckpointError: if it is not trusted and holds more than plain data, asks for more memory
            than a file of its size can need, or is not a list.
    """
    archive = _read_archive(io.BytesIO(data), where)
    if not trusted:
        _follow(archive, where)
    try:
        objects = torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where} holds objects that are not plain data, and loading them could run any code:"
            f" {_reason(error)}. {advice}"
        ) from error
    except Exception as error:  # a forged file can make the unpickler raise anything
        raise CheckpointError(f"{where} can't be read: {_reason(error)}.") from error
    if not isinstance(objects, list):
        raise CheckpointError(
            f"{where} does not contain a list: it was not written by this package."
        )
    return objects


def _reason(error: Exception) -> str:
    """What torch refused, without its paragraphs of advice, which don't apply here."""
    found = re.search(r"(?:GLOBAL|function|new object|operand) *(\S+)", str(error))
    lines = [line for line in str(error).splitlines() if line.strip()]
    return found[0] if found else (lines or [type(error).__name__])[0]


def count_objects(data: bytes, where: Path) -> int:
    """Number of values that :func:`load_objects` would return; loads nothing.

    Raises:
        CheckpointError: if it is not a ``torch.save`` archive of a list.
    """
    archive = _read_archive(io.BytesIO(data), where)
    top = _follow(archive, where, bounded=False)
    if top is None:
        return 2**62  # the pickle has instructions that are not interpreted here
    if not isinstance(top, _List):
        raise CheckpointError(
            f"{where} does not contain a list: it was not written by this package."
        )
    return top.length


def check_archive(file: IO[bytes], where: Path) -> None:
    """Refuses an archive that would need much more memory than it has bytes.

    Args:
        file: a file written by ``torch.save``, in its zip format.
        where: its path, for messages.

    Raises:
        CheckpointError: naming the record.
    """
    _follow(_read_archive(file, where), where)


@dataclass(frozen=True)
class _Archive:
    """The pickle in an archive, and the sizes of its records: ``data/0`` -> bytes."""

    pickle: bytes
    sizes: dict[str, int]


def _read_archive(file: IO[bytes], where: Path) -> _Archive:
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in records)
            total = sum(info.file_size for info in records)
            sizes = {info.filename.partition("/")[2]: info.file_size for info in records}
            if not stored or total > size or len(sizes) != len(records):
                raise CheckpointError(
                    f"{where} has {size} bytes and unpacks to {total}: torch.save compresses"
                    " nothing and writes each record once. Don't load it."
                )
            pickled = [i for i in records if i.filename.partition("/")[2] == "data.pkl"]
            if len(pickled) != 1:
                raise CheckpointError(f"{where} holds {len(pickled)} records data.pkl, not one.")
            return _Archive(archive.read(pickled[0]), sizes)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where} can't be read: it is not a torch.save archive.") from error


def _follow(archive: _Archive, where: Path, *, bounded: bool = True) -> Any:
    """The final value of the pickle; None if the end was not reached."""
    try:
        return _DryRun(archive, where, bounded).run()
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} can't be read: its pickle is damaged.") from error


class _Global(str):
    """The name of a class or function, which is never looked up."""


class _List:
    def __init__(self) -> None:
        self.length = 0


class _Storage:
    def __init__(self, numel: int) -> None:
        self.numel = numel


class _Tuple(tuple[Any, ...]):
    """A tuple that knows its nesting depth, because Python hashes nested tuples recursively."""

    depth: int

    def __new__(cls, items: Sequence[Any]) -> _Tuple:
        self = super().__new__(cls, items)
        self.depth = 1 + max((i.depth for i in items if isinstance(i, _Tuple)), default=0)
        return self


_OTHER = object()
_MADE = object()
"""Placeholder for the result of a call."""
_BYTES = object()
"""Placeholder for the result of a call that encodes a string to bytes."""


class _DryRun:
    """Interprets a pickle's instructions without creating the objects.

    Only numbers, strings, tuples and names are tracked: no other arguments determine how much
    memory a call allocates. Instructions that torch doesn't support end the run, since torch will
    refuse them.
    """

    def __init__(self, archive: _Archive, where: Path, bounded: bool) -> None:
        self.data, self.sizes, self.where = archive.pickle, archive.sizes, where
        self.bounded = bounded
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.data):
            if opcode.name == "STOP":
                return self.stack.pop()
            if not self._follow(opcode.name, argument):
                break
        return None

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _follow(self, name: str, argument: Any) -> bool:
        stack = self.stack
        match name:
            case "PROTO":
                pass
            case "GLOBAL":
                stack.append(_Global(argument.replace(" ", ".", 1)))
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE" | "NEWFALSE" | "NEWTRUE" | "BINFLOAT":
                stack.append(_OTHER)
            case "EMPTY_LIST":
                stack.append(_List())
            case "EMPTY_DICT" | "EMPTY_SET":
                stack.append(_OTHER)
            case "EMPTY_TUPLE":
                stack.append(_Tuple(()))
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                self._push(_Tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = stack[-count:]
                del stack[-count:]
                self._push(_Tuple(items))
            case "APPEND":
                stack.pop()
                self._lengthen(1)
            case "APPENDS":
                self._lengthen(len(self._since_mark()))
            case "SETITEM":
                del stack[-2:]
            case "SETITEMS":
                self._since_mark()
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINPERSID":
                identity = stack.pop()
                stack.append(self._storage(identity) if self.bounded else _MADE)
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                if self.bounded:
                    self._call(function, arguments)
                stack.append(self._made(name, function, arguments))
            case "BUILD":
                state = stack.pop()
                if self.bounded:
                    self._build(state)
            case _:
                return False
        return True

    def _lengthen(self, count: int) -> None:
        if isinstance(self.stack[-1], _List):
            self.stack[-1].length += count

    def _push(self, value: _Tuple) -> None:
        if self.bounded and value.depth > _MAX_DEPTH:
            raise CheckpointError(f"{self.where} is nested too deeply: don't load it.")
        self.stack.append(value)

    @staticmethod
    def _made(name: str, function: Any, arguments: Any) -> Any:
        if function == "_codecs.encode":
            return _BYTES
        # torch.Size((2, 3)) acts as a tuple where it is an argument.
        is_one = name == "REDUCE" and isinstance(arguments, _Tuple) and len(arguments) == 1
        return arguments[0] if is_one and isinstance(arguments[0], _Tuple) else _MADE

    def _storage(self, where: Any) -> _Storage:
        _, kind, key, _, numel = where
        itemsize = _STORAGE_ITEMSIZES.get(str(kind).rpartition(".")[2], 1)
        if not isinstance(numel, int) or numel * itemsize > self.sizes.get(f"data/{key}", 0):
            self._refuse(f"a storage of {str(numel)[:40]} elements")
        return _Storage(numel)

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            return  # torch refuses it
        module, _, name = function.rpartition(".")
        of_torch = module.split(".")[0] == "torch"
        if name == "_rebuild_from_type_v2":  # a call inside a call
            self._call(arguments[0], arguments[2])
        elif of_torch and name in _VIEWS:
            if isinstance(arguments[0], _Storage):
                self._check_view(*arguments[:4])
                if name == "_rebuild_qtensor" and math.prod(arguments[2]) > arguments[0].numel:
                    self._refuse(f"a tensor of the shape {str(tuple(arguments[2]))[:80]}")
        elif of_torch and name.endswith(("Tensor", "Storage")):
            if arguments:
                self._refuse(f"a {name} by its size")
        elif name == "bytearray":
            if arguments and arguments[0] is not _BYTES and type(arguments[0]) is not str:
                self._refuse("a bytearray by its size")
        elif function == "_codecs.encode":
            # Other encodings can double their input, which can be another call's result.
            if type(arguments[0]) is not str or any(a not in _ENCODINGS for a in arguments[1:]):
                self._refuse(f"the encoding {str(arguments[1:])[:80]}")
        elif name in _COLLECTIONS and any(a is _MADE for a in arguments):
            self._refuse(f"a {name} of a tensor's elements")

    def _build(self, state: Any) -> None:
        if isinstance(state, _Tuple) and state and isinstance(state[0], _Storage):
            self._check_view(*state[:4])

    def _check_view(self, storage: _Storage, offset: Any, shape: Any, stride: Any) -> None:
        """Refuses a view beyond its storage: torch would grow the storage to fit it."""
        if 0 in shape:
            return
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        is_inside = min(offset, *shape, *stride, 0) >= 0 and last < storage.numel
        if not is_inside or math.prod(shape) > max(storage.numel, _EXPANDED):
            self._refuse(
                f"a tensor of the shape {str(tuple(shape))[:80]} in {storage.numel} elements"
            )

    def _refuse(self, what: str) -> None:
        raise CheckpointError(
            f"{self.where} asks for {what}, which may need more memory than the file has bytes;"
            " torch.save never writes that. Don't load it."
        )
