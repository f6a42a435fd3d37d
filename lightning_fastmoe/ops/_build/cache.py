"""The cache folder for libraries of one key, and the lock under which they are compiled.

Processes that start together wait for a lock file: the first compiles, the others then find its
library, or its error. The lock is the kernel's (flock), so it is released when its holder exits,
however that happens.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops._build.architectures import Capability, least_service
from lightning_fastmoe.ops._build.record import Key, Record, read_record
from lightning_fastmoe.ops._build.toolchain import TEMPORARY

VARIABLE = "LIGHTNING_FASTMOE_CACHE"


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lightning_fastmoe"


def usable(library: Path, key: Key, capabilities: Sequence[Capability]) -> Record | None:
    """The record of a library if a process with ``key`` and these GPUs can load it."""
    try:
        record = read_record(library)
    except OSError:
        return None
    return record if record and not record.objection(key, capabilities) else None


@dataclass(frozen=True)
class Cache:
    """The folder of one key.

    Attributes:
        folder: its path; it need not exist.
        key: the key that its libraries share.
    """

    folder: Path
    key: Key

    @classmethod
    def of(cls, key: Key) -> Cache:
        """The folder in :func:`cache_folder`."""
        return cls(cache_folder() / key.name, key)

    def path(self, codes: Sequence[str]) -> Path:
        """The file for these architectures."""
        return self.folder / f"{'-'.join(codes)}.so"

    def libraries(self) -> list[Path]:
        """All libraries, by name."""
        try:
            return sorted(self.folder.glob("*.so"))
        except OSError:
            return []

    def serving(self, capabilities: Sequence[Capability], least: int) -> Path | None:
        """A library that supports all of these GPUs at least as well as ``least``."""
        for library in self.libraries():
            record = usable(library, self.key, capabilities)
            if record and least_service(record.codes, capabilities) >= least:
                return library
        return None

    def holding(self, codes: Sequence[str]) -> Path | None:
        """A library that was compiled for all of ``codes``."""
        for library in self.libraries():
            record = usable(library, self.key, [])
            if record and set(codes) <= set(record.codes):
                return library
        return None

    def failure(self, codes: Sequence[str]) -> str:
        """Why the last build for ``codes`` failed, "" if it didn't."""
        try:
            return self._failure_file(codes).read_text(encoding="utf-8")
        except OSError:
            return ""

    def obstacle(self) -> str:
        """Why the folder can't be written to; "" if it seems writable."""
        there = self.folder
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            return self._refusal(f"{there} is not a folder that this process may write to")
        return ""

    def make_once(
        self,
        codes: Sequence[str],
        compile_to: Callable[[Path], None],
        present: Callable[[], Path | None],
    ) -> tuple[Path, bool]:
        """A library of this cache, made by one process while the others wait for it.

        Args:
            codes: its architectures.
            compile_to: compiles it into a file.
            present: finds an existing library that will do.

        Returns:
            The library, and whether it was made by this call.

        Raises:
            KernelsUnavailableError: if it can't be compiled, or the folder can't be written.
        """
        library = self.path(codes)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._last_failure(codes)
            with self._locked():
                if (found := present()) is not None:
                    return found, False
                if (after := self._last_failure(codes)) is not None and after != before:
                    # The process that held the lock has just tried.
                    raise KernelsUnavailableError(self.failure(codes))
                self._sweep()
                try:
                    compile_to(library)
                except KernelsUnavailableError as error:
                    with suppress(OSError):  # a full disk must not hide the reason
                        self._failure_file(codes).write_text(str(error), encoding="utf-8")
                    raise
                self._failure_file(codes).unlink(missing_ok=True)
        except OSError as error:
            raise KernelsUnavailableError(self._refusal(str(error))) from error
        return library, True

    def _refusal(self, why: str) -> str:
        return (
            f"the cache {self.folder} can't be written: {why}; set {VARIABLE} to a writable"
            " folder, or build ahead of time (lightning-fastmoe build --help)"
        )

    def _failure_file(self, codes: Sequence[str]) -> Path:
        return self.path(codes).with_suffix(".failed.txt")

    def _last_failure(self, codes: Sequence[str]) -> tuple[int, int] | None:
        """Identifies the last failure, independent of the file system's clock."""
        try:
            status = self._failure_file(codes).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size

    def _sweep(self) -> None:
        """Removes the leftovers of killed builds; the lock's holder is the only builder."""
        for left in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
