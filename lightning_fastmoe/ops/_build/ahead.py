"""Ahead-of-time compilation for container images and clusters, with or without a local GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops import _build
from lightning_fastmoe.ops._build.architectures import codes_of_gpus, codes_of_list
from lightning_fastmoe.ops._build.cache import Cache, usable
from lightning_fastmoe.ops._build.record import Key, Record, read_record
from lightning_fastmoe.ops._build.toolchain import find_nvcc, toolkit_version


@dataclass(frozen=True)
class Ahead:
    """The outcome of :func:`build_ahead`.

    Attributes:
        library: the file.
        compiled: whether it was compiled now; False if it existed already.
        record: what it was built from and for.
    """

    library: Path
    compiled: bool
    record: Record


def build_ahead(
    architectures: str | None = None, output: Path | None = None, force: bool = False
) -> Ahead:
    """Compiles csrc/ to where a run will look for it, unless the library exists.

    Args:
        architectures: as "8.0;9.0a". By default TORCH_CUDA_ARCH_LIST, else the GPUs present.
        output: a file, or an existing folder to put ``kernels.so`` into. By default the cache.
        force: compile even if the library exists.

    Raises:
        KernelsUnavailableError: if there are no architectures to compile for, or compiling fails.
    """
    codes = _codes(architectures)
    if torch.version.cuda is not None:
        key = _build.key_for(torch.version.cuda)
    else:
        key = _build.key_for(toolkit_version(find_nvcc()))
    if output is None:
        return _into_cache(codes, key, force)
    return _into_file(codes, key, output / "kernels.so" if output.is_dir() else output, force)


def _codes(architectures: str | None) -> list[str]:
    if architectures is not None:
        codes = codes_of_list(architectures, "--arch")
    else:
        text = os.environ.get(_build.ARCH_LIST, "")
        codes = codes_of_list(text, _build.ARCH_LIST) or codes_of_gpus(_build.gpus())
    if not codes:
        raise KernelsUnavailableError(
            "no GPU was found to build for; pass the architectures with --arch '8.0;9.0a' or in"
            f" {_build.ARCH_LIST}"
        )
    return codes


def _into_cache(codes: list[str], key: Key, force: bool) -> Ahead:
    cache = Cache.of(key)

    def present() -> Path | None:
        return None if force else cache.holding(codes)

    library, compiled = present(), False
    if library is None:
        nvcc = find_nvcc()
        cuda = toolkit_version(nvcc)
        library, compiled = cache.make_once(
            codes, lambda file: _build.compile_for(codes, nvcc, key, cuda, file), present
        )
    return _ahead(library, compiled)


def _into_file(codes: list[str], key: Key, library: Path, force: bool) -> Ahead:
    record = usable(library, key, [])
    if record is not None and set(codes) <= set(record.codes) and not force:
        return Ahead(library, False, record)
    nvcc = find_nvcc()
    cuda = toolkit_version(nvcc)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        _build.compile_for(codes, nvcc, key, cuda, library)
    except OSError as error:
        raise KernelsUnavailableError(f"{library} can't be written: {error}") from error
    return _ahead(library, True)


def _ahead(library: Path, compiled: bool) -> Ahead:
    record = read_record(library)
    if record is None:
        raise KernelsUnavailableError(f"{library} changed while it was being read; build it again")
    return Ahead(library, compiled, record)
