"""Reads checkpoints: any elements of any tensor, from files that may be damaged or forged."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint.format import files, publish
from lightning_fastmoe.checkpoint.format.consistency import check_manifest
from lightning_fastmoe.checkpoint.format.directory import (
    check_checksum,
    fragments_by_file,
    open_listed,
    read_manifest,
    strangers,
    verify_file,
)
from lightning_fastmoe.checkpoint.format.dtypes import DTYPES, itemsize
from lightning_fastmoe.checkpoint.format.files import BUFFER_BYTES, read_exactly
from lightning_fastmoe.checkpoint.format.fragment import StoredFragment
from lightning_fastmoe.checkpoint.format.hashing import damaged
from lightning_fastmoe.checkpoint.format.manifest import (
    CHECKSUM,
    MANIFEST,
    OBJECTS,
    STATE,
    Manifest,
    parse_manifest,
)
from lightning_fastmoe.checkpoint.format.pickles import TRUST_STRATEGY, load_objects
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.safetensors_stream import byte_view
from lightning_fastmoe.checkpoint.format.shards import HeaderEntry, chunks, read_header
from lightning_fastmoe.checkpoint.format.state_files import decode_rank_state, decode_state
from lightning_fastmoe.checkpoint.format.tensor_names import fragment_key
from lightning_fastmoe.checkpoint.format.threads import run_all
from lightning_fastmoe.errors import CheckpointError

_MAX_OPEN = 64


class CheckpointReader:
    """An open checkpoint.

    Opening reads the manifest and checks names and sizes; it reads no tensor. The directory is then
    held open by its descriptor: if a newer checkpoint replaces it, reading continues from this one
    or fails, and never mixes the two.

    Use as a context manager, or call :meth:`close`.

    Args:
        path: the directory.

    Attributes:
        threads: number of threads that verify files or read parts of a large tensor; default 1.
            The reader itself is not thread-safe.
        advice: text for error messages, what to do about objects that are not plain data.

    Raises:
        CheckpointError: if it is not a complete checkpoint of this package and version, or if files
            are missing, added, or of the wrong size.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = publish.resolve(Path(path))
        self.threads = 1
        self.advice = TRUST_STRATEGY
        self._directory = files.open_directory(self.path)
        self._open: OrderedDict[str, tuple[int, dict[str, HeaderEntry]]] = OrderedDict()
        self._starts: dict[str, list[int]] = {}
        self._by_file: dict[str, list[tuple[str, str, StoredFragment]]] | None = None
        try:
            self.manifest, self.checksum = self._read_manifest()
            self._check_files()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files."""
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    # ------------------------------------------------------------------------------- the directory

    def _read_manifest(self) -> tuple[Manifest, str]:
        if not is_checkpoint(self.path):
            if inside := sorted(p.name for p in self.path.iterdir() if is_checkpoint(p)):
                names = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
                raise CheckpointError(
                    f"{self.path} is no checkpoint but a directory of {len(inside)}: {names}."
                    " Choose one of them."
                )
            raise CheckpointError(
                f"{self.path} has no {MANIFEST}, so it is not a complete checkpoint of"
                " FastMoEStrategy: saving writes that file last. Choose another checkpoint."
            )
        where = self.path / MANIFEST
        data = read_manifest(self._directory, self.path)
        checksum = check_checksum(self._directory, self.path, data)
        manifest = parse_manifest(data, where)
        check_manifest(manifest, where)
        return manifest, checksum

    def _check_files(self) -> None:
        """Checks that the directory has exactly the manifest's files, with the right sizes."""
        for name, record in self.manifest.files.items():
            fd, _ = open_listed(self._directory, self.path, name, record, self.fragments_of(name))
            os.close(fd)
        for _, fault in strangers(self._directory, self.path, self.manifest):
            raise CheckpointError(fault)

    def fragments_of(self, file: str) -> list[tuple[str, str, StoredFragment]]:
        """(tensor, dtype, fragment) of every fragment in a file."""
        if self._by_file is None:
            self._by_file = fragments_by_file(self.manifest)
        return self._by_file.get(file, [])

    def _shard(self, file: str) -> tuple[int, dict[str, HeaderEntry]]:
        """(descriptor, checked header) of a safetensors file."""
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        fd, size = files.open_regular(self._directory, file, self.path)
        try:
            header = read_header(fd, size, self.fragments_of(file), self.path / file)
        except BaseException:
            os.close(fd)
            raise
        self._open[file] = (fd, header)
        if len(self._open) > _MAX_OPEN:
            _, (oldest, _) = self._open.popitem(last=False)
            os.close(oldest)
        return fd, header

    # --------------------------------------------------------------------------------- verification

    def verify(
        self,
        names: Iterable[str] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Reads whole files and compares their hashes.

        Args:
            names: names of files in the manifest; None for all of them.
            on_bytes: called with the number of bytes after each read, for progress bars.

        Raises:
            CheckpointError: naming the file and tensor of the first damage found.
        """
        known = self.manifest.files
        wanted = sorted(known if names is None else names, key=lambda name: -known[name].size)
        self.fragments_of("")  # fills a table that the threads read
        run_all([partial(self._verify_file, name) for name in wanted], self.threads, on_bytes)

    def _verify_file(self, name: str, on_bytes: Callable[[int], None]) -> None:
        record = self.manifest.files[name]
        verify_file(self._directory, self.path, name, record, self.fragments_of(name), on_bytes)

    # -------------------------------------------------------------------------------------- tensors

    def record(self, tensor: str) -> TensorRecord:
        """Dtype, shape and fragments of a tensor.

        Raises:
            CheckpointError: if the checkpoint has no such tensor.
        """
        try:
            return self.manifest.tensors[tensor]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {tensor!r}.") from None

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        """Fills ``out`` with the elements from ``start`` on; reads nothing else.

        Args:
            tensor: name in the manifest.
            start: first element, in row-major order.
            out: (length,), contiguous, on any device; the tensor's dtype, or both floating.

        Raises:
            CheckpointError: if there are no such elements, or the dtypes don't fit.
        """
        record = self.record(tensor)
        stop = start + out.numel()
        stored = DTYPES[record.dtype]
        if not 0 <= start <= stop <= record.numel:
            raise CheckpointError(
                f"{self.path}: tensor {tensor!r} has {record.numel} elements; {start} to {stop}"
                " were requested."
            )
        if out.dtype != stored and not (out.is_floating_point() and stored.is_floating_point):
            raise CheckpointError(
                f"{self.path}: tensor {tensor!r} has dtype {stored}, but {out.dtype} is needed."
            )
        fragments = record.fragments
        if tensor not in self._starts:
            self._starts[tensor] = [f.start for f in fragments]
        index = bisect.bisect_right(self._starts[tensor], start) - 1
        position = start
        while position < stop:
            fragment = fragments[index]
            end = min(stop, fragment.stop)
            part = out[position - start : end - start]
            self._read_fragment(tensor, record.dtype, fragment, position, part)
            position, index = end, index + 1

    def _read_fragment(
        self, tensor: str, dtype: str, fragment: StoredFragment, start: int, out: Tensor
    ) -> None:
        fd, header = self._shard(fragment.file)
        size = itemsize(dtype)
        offset = header[fragment_key(tensor, fragment)].begin
        offset += (start - fragment.start) * size
        where = self.path / fragment.file
        if out.device.type == "cpu" and out.dtype == DTYPES[dtype]:
            self._read_parts(fd, byte_view(out), offset, where)
            return
        step = BUFFER_BYTES // size
        buffer = torch.empty(min(step, out.numel()), dtype=DTYPES[dtype])
        for begin, end in chunks(0, out.numel(), step):
            part = buffer[: end - begin]
            read_exactly(fd, byte_view(part), offset + begin * size, where)
            out[begin:end].copy_(part)

    def _read_parts(self, fd: int, view: memoryview, offset: int, where: Path) -> None:
        """Does what :func:`read_exactly` does, in several threads if that is worth it."""
        count = max(1, min(self.threads, len(view) // BUFFER_BYTES))
        edges = [len(view) * i // count for i in range(count + 1)]

        def read(begin: int, end: int, report: Callable[[int], None]) -> None:
            read_exactly(fd, view[begin:end], offset + begin, where)

        run_all([partial(read, *part) for part in zip(edges, edges[1:], strict=False)], count)

    def read(self, tensor: str) -> Tensor:
        """Reads a whole tensor to the CPU."""
        record = self.record(tensor)
        flat = torch.empty(record.numel, dtype=DTYPES[record.dtype])
        self.read_into(tensor, 0, flat)
        return flat.view(record.shape)

    # ------------------------------------------------------------------------------ everything else

    def read_file(self, name: str) -> bytes:
        """Reads a small file and checks its hash.

        Raises:
            CheckpointError: if it is damaged.
        """
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path} has no {name}: the manifest does not list it.")
        record = self.manifest.files[name]
        data = files.read_small(self._directory, name, self.path, record.size)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise damaged(self.path / name, "all of it")
        return data

    def read_state(self, *, trusted: bool = False) -> dict[str, Any]:
        """Reads ``state.json``, including the objects that JSON could not hold.

        Args:
            trusted: see :meth:`read_objects`.

        Raises:
            CheckpointError: see :meth:`read_objects`.
        """
        objects = self.read_objects(trusted=trusted)
        data, where = self.read_file(STATE), self.path / STATE
        return decode_state(data, objects, self.manifest.contents, where)

    def read_rank_state(self, rank: int, *, trusted: bool = False) -> dict[str, Any] | None:
        """Reads the state that only this rank saved; None if there is none.

        Args:
            rank: the rank, in the run that saved.
            trusted: see :meth:`read_objects`.
        """
        name = f"rank_{rank:05d}.json"
        if name not in self.manifest.files:
            return None
        objects = self.read_objects(f"rank_{rank:05d}.pt", trusted=trusted)
        return decode_rank_state(self.read_file(name), objects, self.path / name)

    def read_objects(self, name: str = OBJECTS, *, trusted: bool = False) -> list[Any]:
        """Reads the objects that JSON could not hold; empty if there are none.

        Args:
            name: the name of the file.
            trusted: also unpickle arbitrary objects, which can run any code: only for files whose
                origin you trust.

        Raises:
            CheckpointError: if it holds objects that are not plain data, unless trusted.
        """
        if name not in self.manifest.files:
            return []
        data = self.read_file(name)
        return load_objects(data, self.path / name, trusted=trusted, advice=self.advice)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a complete checkpoint of this package; no file is read."""
    return (path / MANIFEST).is_file() and (path / CHECKSUM).is_file()
