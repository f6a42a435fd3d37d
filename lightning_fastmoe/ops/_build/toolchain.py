"""Finds nvcc and builds a library from csrc/ with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops._build.architectures import codes_of_list, flags_of
from lightning_fastmoe.ops._build.compilers import Compilers, check_status, unwound_by_signals
from lightning_fastmoe.ops._build.record import Record, read_record

# Version 2.11 in the headers' encoding: the oldest torch whose stable ABI has all that csrc/ calls.
_ABI = "0x020b000000000000ULL"
_DEFINES = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={_ABI}"]
FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", *_DEFINES]
"""nvcc's flags, except the architectures."""

PLACES = (Path("/usr/local/cuda/bin/nvcc"),)
"""Default locations of nvcc."""

TEMPORARY = "build-"
"""Prefix of the names of temporary build folders."""


def find_nvcc() -> Path:
    """The CUDA compiler.

    Raises:
        KernelsUnavailableError: if there is none.
    """
    homes = [Path(h) for name in ("CUDA_HOME", "CUDA_PATH") if (h := os.environ.get(name))]
    candidates = [home / "bin" / "nvcc" for home in homes]
    if (on_path := shutil.which("nvcc")) is not None:
        candidates.append(Path(on_path))
    for candidate in (*candidates, *PLACES):
        if candidate.is_file():
            return candidate
    wanted = f"CUDA toolkit {torch.version.cuda}" if torch.version.cuda else "CUDA toolkit"
    raise KernelsUnavailableError(
        f"there is no nvcc; install the {wanted} and put nvcc on PATH, or set CUDA_HOME"
    )


def toolkit_version(nvcc: Path) -> str:
    """The release of ``nvcc``, as "13.0".

    Raises:
        KernelsUnavailableError: if it doesn't run, or its major version isn't that of torch's CUDA.
    """
    text = _run([str(nvcc), "--version"])
    if (found := re.search(r"release (\d+\.\d+)", text)) is None:
        raise KernelsUnavailableError(f"{nvcc} --version reports no release: {text.strip()!r}")
    version = found[1]
    if torch.version.cuda and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise KernelsUnavailableError(
            f"{nvcc} is from CUDA {version}, but torch was built with CUDA {torch.version.cuda};"
            " install a toolkit of the same major version, or point CUDA_HOME to it"
        )
    return version


def default_flags(architectures: str) -> list[str]:
    """All flags of a build for ``architectures``, as in TORCH_CUDA_ARCH_LIST."""
    return [*FLAGS, *flags_of(codes_of_list(architectures, "architectures"))]


def compile_command(nvcc: Path | str, flags: list[str], source: Path, output: Path) -> list[str]:
    """The command that makes an object file of one source."""
    include = Path(torch.__file__).parent / "include"
    return [str(nvcc), *flags, f"-I{include}", "-c", str(source), "-o", str(output)]


def compile_library(
    nvcc: Path,
    record: Record,
    sources: Sequence[Path],
    library: Path,
    defines: Sequence[str] = (),
) -> None:
    """Compiles ``sources``, several at once, and links them.

    Args:
        nvcc: the compiler.
        record: the record to embed; its ``codes`` are the architectures to compile for.
        sources: the files to compile.
        library: the result, replaced atomically.
        defines: additional macros to define, for tests.

    Raises:
        KernelsUnavailableError: if the compiler fails, with the end of its output.
        OSError: if the folder of the library can't be written.
    """
    jobs = _max_jobs()
    print(  # the user is about to wait
        f"lightning_fastmoe: compiling CUDA kernels for {', '.join(record.codes)} into"
        f" {library.parent} (once, about a minute)",
        file=sys.stderr,
        flush=True,
    )
    flags = [*FLAGS, *(f"-D{name}" for name in defines), *flags_of(record.codes)]
    if (threads := min(len(record.codes), jobs // len(sources))) > 1:
        flags.append(f"--threads={threads}")  # architectures of one file at once
    # A folder of this process: leftovers of a killed build don't disturb later builds.
    with (
        unwound_by_signals(),
        tempfile.TemporaryDirectory(dir=library.parent, prefix=TEMPORARY) as name,
        Compilers(jobs) as compilers,
    ):
        folder = Path(name)
        about = folder / "record.cpp"
        about.write_text(record.source(), encoding="ascii")
        # Long files first, so that the last ones to finish are short.
        ordered = sorted(sources, key=lambda source: -source.stat().st_size)
        objects = [folder / f"{source.parent.name}.{source.name}.o" for source in (*ordered, about)]
        commands = [
            compile_command(nvcc, flags, source, output)
            for source, output in zip((*ordered, about), objects, strict=True)
        ]
        compilers.run(commands)
        linked = folder / "kernels.so"
        for step in link_commands(nvcc, objects, linked, folder):
            compilers.run([step])
        if read_record(linked) != record:
            raise KernelsUnavailableError(f"{nvcc} made a library without its build record")
        linked.replace(library)  # atomic: other processes see all of it or nothing


def link_commands(nvcc: Path, objects: list[Path], output: Path, folder: Path) -> list[list[str]]:
    """The commands, to run in order, that link ``objects`` against torch's libraries by name.

    By the time the library is loaded, the process has loaded torch's libraries and torch's CUDA
    runtime of the same major version. A torch without CUDA has no libtorch_cuda.so; then an empty
    library of that name stands in for it, so that images can be built with a CPU-only torch.
    """
    lib = Path(torch.__file__).parent / "lib"
    commands = []
    paths = [f"-L{lib}"]
    if not (lib / "libtorch_cuda.so").exists():
        empty = folder / "empty.cpp"
        empty.write_text("", encoding="ascii")
        name = "libtorch_cuda.so"
        soname = ["-Xlinker", "-soname", "-Xlinker", name]
        commands.append([str(nvcc), "-shared", *soname, str(empty), "-o", str(folder / name)])
        paths.append(f"-L{folder}")
    # Some linkers drop a library that resolves no symbol, as the empty stand-in does.
    names = ["-Xlinker", "--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    inputs = [*(str(path) for path in objects), *paths, *names]
    commands.append([str(nvcc), "-shared", "-cudart", "shared", *inputs, "-o", str(output)])
    return commands


def _max_jobs() -> int:
    text = os.environ.get("MAX_JOBS", "").strip()
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise KernelsUnavailableError(f"MAX_JOBS={text!r} is invalid: it must be an integer of at least 1")
    return int(text)


def _run(command: list[str]) -> str:
    done = subprocess.run(  # noqa: S603 - the compiler, without a shell
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    check_status(command, done.returncode, done.stdout + done.stderr)
    return done.stdout
