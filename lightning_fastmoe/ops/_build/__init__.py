"""Compiles csrc/ on first use on a CUDA machine, or reports why it couldn't.

``pip install`` compiles nothing. Libraries are searched in this order, and the first one that runs
on all GPUs of this process is used:

1. the file named by LIGHTNING_FASTMOE_LIBRARY; if that is set, nothing else is tried;
2. ``kernels.so`` in the package's folder, put there by a packager;
3. the cache: a folder for each (sources and flags, major version of CUDA, machine), with a file for
   each list of architectures;
4. a new library, compiled into the cache once even if many processes start together.

Each library contains a record of what it was built from and for, see :mod:`.record`.

Environment:
    LIGHTNING_FASTMOE_KERNELS: 0 disables the kernels; PyTorch's operators are used instead.
    LIGHTNING_FASTMOE_LIBRARY: a library made by ``lightning-fastmoe build --output``.
    LIGHTNING_FASTMOE_CACHE: where libraries are kept (default ~/.cache/lightning_fastmoe).
    TORCH_CUDA_ARCH_LIST: architectures to build for, as "8.0;9.0a" (default: the GPUs present).
    CUDA_HOME: the CUDA toolkit (default: the one of the nvcc on PATH, then /usr/local/cuda).
    MAX_JOBS: number of parallel compiler processes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops._build.architectures import (
    NATIVE,
    PTX,
    Capability,
    codes_of_gpus,
    codes_of_list,
    least_service,
    unserved,
)
from lightning_fastmoe.ops._build.cache import Cache, cache_folder, usable
from lightning_fastmoe.ops._build.record import (
    Key,
    Record,
    hash_sources,
    read_record,
    this_machine,
)
from lightning_fastmoe.ops._build.toolchain import (
    FLAGS,
    compile_command,
    compile_library,
    default_flags,
    find_nvcc,
    toolkit_version,
)

PACKAGE = Path(__file__).resolve().parents[2]
SOURCES = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"
"""A folder in an installed package; in a checkout a link to csrc/, or csrc/ itself."""

PACKAGED = PACKAGE / "kernels.so"
"""Where a packager may have placed a library."""

ARCH_LIST = "TORCH_CUDA_ARCH_LIST"
LIBRARY = "LIGHTNING_FASTMOE_LIBRARY"
SWITCH = "LIGHTNING_FASTMOE_KERNELS"


@dataclass(frozen=True)
class Build:
    """The outcome of :func:`build` and :func:`look`.

    Attributes:
        library: the shared library, None if there is none.
        reason: why there is none and what to do about it; "" if there is one.
        state: "built"; "not built" if :func:`build` would compile it; "failed" if the last attempt
            failed and :func:`build` would retry; "off" if the user disabled the kernels;
            "unavailable".
    """

    library: Path | None
    reason: str
    state: str


def build() -> Build:
    """The library for the GPUs of this machine, compiled if there is none yet."""
    return _outcome(compile_it=True)


def look() -> Build:
    """What :func:`build` would find. Compiles nothing, and writes nothing."""
    return _outcome(compile_it=False)


def sources() -> list[Path]:
    """The files of csrc/ that a library is made of.

    Raises:
        KernelsUnavailableError: if there are none.
    """
    found = sorted(SOURCES.rglob("*.c*")) + sorted(SOURCES.rglob("*.h"))
    if not found:
        raise KernelsUnavailableError(
            f"the sources are missing from {SOURCES}; reinstall the package"
        )
    return found


def key_for(cuda: str) -> Key:
    """The key of libraries for a CUDA version such as "13.0"."""
    return Key(hash_sources(sources(), FLAGS), cuda.split(".")[0], this_machine())


def gpus() -> list[Capability]:
    """The compute capability of each GPU that this process sees."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(d) for d in range(torch.cuda.device_count())]


def codes_to_build(capabilities: list[Capability]) -> list[str]:
    """The architectures of TORCH_CUDA_ARCH_LIST, or of these GPUs if it is not set.

    Raises:
        KernelsUnavailableError: if the list can't be parsed, or doesn't cover one of the GPUs.
    """
    text = os.environ.get(ARCH_LIST, "")
    codes = codes_of_list(text, ARCH_LIST)
    if codes and (gpu := unserved(codes, capabilities)):
        raise KernelsUnavailableError(
            f"{ARCH_LIST}={text!r} doesn't cover a GPU of compute capability {gpu}; add it, or"
            " unset the variable"
        )
    return codes or codes_of_gpus(capabilities)


def compile_for(codes: list[str], nvcc: Path, key: Key, cuda: str, library: Path) -> None:
    """Compiles csrc/ for ``codes`` into ``library`` with ``nvcc`` of CUDA version ``cuda``."""
    record = Record(key.sources, cuda, key.machine, tuple(codes), torch.__version__)
    units = [source for source in sources() if source.suffix in (".cu", ".cpp")]
    compile_library(nvcc, record, units, library)


def _outcome(compile_it: bool) -> Build:
    try:
        if os.environ.get(SWITCH, "1") == "0":
            return Build(None, f"{SWITCH}=0 switches them off", "off")
        if torch.version.cuda is None:
            raise KernelsUnavailableError(
                f"this torch ({torch.__version__}) is built without CUDA; install one with it"
            )
        if not (capabilities := gpus()):
            raise KernelsUnavailableError("torch sees no CUDA device; if there is one, check nvidia-smi and CUDA_VISIBLE_DEVICES")
        key = key_for(torch.version.cuda)
        if named := os.environ.get(LIBRARY):
            return Build(_named(Path(named).expanduser(), key, capabilities), "", "built")
        return _packaged_cached_or_new(key, capabilities, compile_it)
    except (KernelsUnavailableError, OSError) as error:
        return Build(None, str(error), "unavailable")


def _named(library: Path, key: Key, capabilities: list[Capability]) -> Path:
    try:
        record = read_record(library)
    except OSError as error:
        raise KernelsUnavailableError(f"{LIBRARY} can't be read: {error}") from error
    if record is None:
        raise KernelsUnavailableError(
            f"{LIBRARY}={library} has no build record; name a file made by"
            " lightning-fastmoe build --output"
        )
    if objection := record.objection(key, capabilities):
        raise KernelsUnavailableError(
            f"{LIBRARY}={library} is refused: {objection}; build it again with"
            f" lightning-fastmoe build --output {library}"
        )
    return library


def _packaged_cached_or_new(key: Key, capabilities: list[Capability], compile_it: bool) -> Build:
    cache = Cache.of(key)

    def present(least: int = NATIVE) -> Path | None:
        packaged = usable(PACKAGED, key, capabilities)
        if packaged and least_service(packaged.codes, capabilities) >= least:
            return PACKAGED
        return cache.serving(capabilities, least)

    if (library := present()) is not None:
        return Build(library, "", "built")
    try:
        codes = codes_to_build(capabilities)
        # The user's architecture list may contain only PTX for these GPUs.
        least = least_service(codes, capabilities)
        if (library := present(least)) is not None:
            return Build(library, "", "built")
        nvcc = find_nvcc()
        cuda = toolkit_version(nvcc)
        if not compile_it:
            if obstacle := cache.obstacle():
                raise KernelsUnavailableError(obstacle)
            failure = cache.failure(codes)
            return Build(None, failure, "failed" if failure else "not built")
        library, _ = cache.make_once(
            codes,
            lambda library: compile_for(codes, nvcc, key, cuda, library),
            lambda: present(least),
        )
    except KernelsUnavailableError as error:
        if (library := present(PTX)) is not None:
            return Build(library, "", "built")
        if PACKAGED.exists():
            raise KernelsUnavailableError(f"{error} ({_packaged_objection(key, capabilities)})") from error
        raise
    return Build(library, "", "built")


def _packaged_objection(key: Key, capabilities: list[Capability]) -> str:
    record = read_record(PACKAGED)
    why = record.objection(key, capabilities) if record else "it has no build record"
    return f"{PACKAGED} is not used: {why}"


__all__ = [
    "Build",
    "Record",
    "build",
    "cache_folder",
    "codes_to_build",
    "compile_command",
    "compile_for",
    "default_flags",
    "find_nvcc",
    "gpus",
    "key_for",
    "look",
    "read_record",
    "sources",
    "toolkit_version",
]
