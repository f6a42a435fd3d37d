"""The build record of a library: a line of text embedded in it.

It is embedded rather than stored in a second file, so that a library can be copied, renamed and
stripped. ``strings kernels.so | grep lightning_fastmoe_build`` shows it.
"""

from __future__ import annotations

import hashlib
import mmap
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_fastmoe.ops._build.architectures import Capability, unserved

_LINE = re.compile(rb"lightning_fastmoe_build\{([ -|~]*)\}")


@dataclass(frozen=True)
class Key:
    """What must match, besides the GPUs, between a library and the process that loads it.

    torch's version is not part of it: csrc/ is written against torch's stable ABI, so a library
    works with every torch from TORCH_TARGET_VERSION on (which is one of the flags). CUDA's major
    version is, because the library shares torch's libcudart.so.<major>; CUDA guarantees
    compatibility within a major version.

    Attributes:
        sources: hash of csrc/ and of the compiler's flags except the architectures.
        cuda: the major version of CUDA, as "13".
        machine: operating system and processor, as "linux-x86_64".
    """

    sources: str
    cuda: str
    machine: str

    @property
    def name(self) -> str:
        """A name for a folder."""
        return f"{self.sources}-cu{self.cuda}-{self.machine}"


@dataclass(frozen=True)
class Record:
    """How a library was built.

    Attributes:
        sources: as in :class:`Key`.
        cuda: the version of the toolkit, as "13.0".
        machine: as in :class:`Key`.
        codes: the architectures, as ["sm_80", "sm_90a"].
        torch: the version of torch whose headers were used.
    """

    sources: str
    cuda: str
    machine: str
    codes: tuple[str, ...]
    torch: str

    def source(self) -> str:
        """C++ that puts the record into a library."""
        line = "lightning_fastmoe_build{" + ";".join(
            [
                f"sources={self.sources}",
                f"cuda={self.cuda}",
                f"machine={self.machine}",
                f"codes={','.join(self.codes)}",
                f"torch={self.torch}",
            ]
        )
        name = "lightning_fastmoe_record"
        return (
            f'extern "C" {{\nextern const char {name}[];\n'
            f'__attribute__((used)) const char {name}[] = "{line}}}";\n}}\n'
        )

    def objection(self, key: Key, capabilities: Iterable[Capability]) -> str:
        """Why a process with ``key`` and these GPUs can't use the library; "" if it can."""
        if self.sources != key.sources:
            return (
                f"it was built from other sources ({self.sources}) than those of this package"
                f" ({key.sources})"
            )
        if self.cuda.split(".")[0] != key.cuda:
            return f"it was built with CUDA {self.cuda}, and torch here is of CUDA {key.cuda}"
        if self.machine != key.machine:
            return f"it was built for {self.machine}, and this is {key.machine}"
        if gpu := unserved(self.codes, capabilities):
            return (
                f"it was built for {', '.join(self.codes)}, which does not run on a GPU of compute"
                f" capability {gpu}"
            )
        return ""


def read_record(library: Path) -> Record | None:
    """The record of a library; None if it has none.

    Raises:
        OSError: if the file can't be read.
    """
    with library.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return None
        with content:
            if (found := _LINE.search(content)) is None:
                return None
            text = found[1].decode("ascii")
    fields = dict(part.partition("=")[::2] for part in text.split(";"))
    try:
        return Record(**{**fields, "codes": tuple(fields["codes"].split(","))})
    except (KeyError, TypeError):
        return None


def hash_sources(sources: Iterable[Path], flags: Iterable[str]) -> str:
    """A hash of files, by name and content, and of compiler flags: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for flag in flags:
        digest.update(flag.encode() + b"\0")
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def this_machine() -> str:
    """Operating system and processor, as "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine()}"
