"""Compiles csrc/ on first use on a CUDA machine, or says why it did not.

Nothing is compiled by ``pip install``. The library is kept in a cache under a name that hashes all
it depends on (sources, versions of torch and CUDA, architectures, flags), so it is built anew when
one of these changes, and once by however many ranks start together.

Environment:
    LIGHTNING_FASTMOE_KERNELS: 0 switches the kernels off; PyTorch's operators compute instead.
    LIGHTNING_FASTMOE_CACHE: where libraries are kept (default ~/.cache/lightning_fastmoe).
    TORCH_CUDA_ARCH_LIST: architectures to build for, as "8.0;9.0a" (default: of the GPUs present).
    CUDA_HOME: the CUDA toolkit (default: that of the nvcc on PATH, then /usr/local/cuda).
    MAX_JOBS: compilers that run at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"
"""A folder in an installed package, a link to csrc/ in a checkout (or that, without links)."""

# The oldest torch whose stable ABI has all that csrc/ calls, 2.11, as the headers spell versions.
_ABI = "0x020b000000000000ULL"
_DEFINES = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={_ABI}"]
_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", *_DEFINES]


@dataclass(frozen=True)
class Build:
    """The outcome of :func:`build`.

    Attributes:
        library: the shared library, None if there is none.
        reason: why there is none and what to do, "" if there is one.
    """

    library: Path | None
    reason: str


class Unavailable(Exception):
    """Why there is no library, and what to do."""


def build() -> Build:
    """The library for the GPUs of this machine, compiled unless it is in the cache."""
    try:
        return Build(_build(), "")
    except (Unavailable, OSError) as error:
        return Build(None, str(error))


def _build() -> Path:
    if os.environ.get("LIGHTNING_FASTMOE_KERNELS", "1") == "0":
        raise Unavailable("LIGHTNING_FASTMOE_KERNELS=0 switches them off")
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device")
    if not (sources := sorted(SOURCES.glob("*.c*")) + sorted(SOURCES.glob("*.h"))):
        raise Unavailable(f"the sources are missing from {SOURCES}; install the package anew")
    nvcc = find_nvcc()
    flags = [*_FLAGS, *architecture_flags()]
    version = toolkit_version(nvcc)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Unavailable(
            f"{nvcc} is of CUDA {version}, but torch was built with CUDA {torch.version.cuda};"
            " install a toolkit of the same major version, or point CUDA_HOME to it"
        )
    digest = hashlib.sha256()
    for part in (torch.__version__, torch.version.cuda, version, *flags, sys.platform):
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    folder = cache_folder() / digest.hexdigest()[:16]
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    waiting_since = time.time()
    with _locked(folder / "lock"):
        failure = folder / "failed.txt"
        if library.exists():
            return library
        if failure.exists() and failure.stat().st_mtime >= waiting_since:
            # The rank that held the lock has just tried.
            raise Unavailable(failure.read_text(encoding="utf-8"))
        try:
            _compile(nvcc, flags, [s for s in sources if s.suffix in (".cu", ".cpp")], library)
        except Unavailable as error:
            failure.write_text(str(error), encoding="utf-8")
            raise
        failure.unlink(missing_ok=True)
    return library


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if chosen := os.environ.get("LIGHTNING_FASTMOE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lightning_fastmoe"


def find_nvcc() -> Path:
    """The CUDA compiler."""
    homes = [Path(h) for name in ("CUDA_HOME", "CUDA_PATH") if (h := os.environ.get(name))]
    candidates = [home / "bin" / "nvcc" for home in homes]
    if (on_path := shutil.which("nvcc")) is not None:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise Unavailable(
        f"there is no nvcc; install the CUDA toolkit {torch.version.cuda} and put nvcc on PATH, or"
        " set CUDA_HOME"
    )


def toolkit_version(nvcc: Path) -> str:
    """The release of ``nvcc``, as "13.0"."""
    text = _run([str(nvcc), "--version"])
    if (found := re.search(r"release (\d+\.\d+)", text)) is None:
        raise Unavailable(f"{nvcc} --version names no release: {text.strip()!r}")
    return found[1]


def architecture_flags(wanted: str | None = None) -> list[str]:
    """nvcc's -gencode flags.

    Args:
        wanted: as TORCH_CUDA_ARCH_LIST, which is the default: "8.0;9.0a+PTX". If both are empty,
            the architectures of the GPUs present.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if wanted is None else wanted
    names = [name for name in re.split(r"[;,\s]+", text) if name]
    if not names:
        devices = range(torch.cuda.device_count())
        names = sorted({"{}.{}".format(*torch.cuda.get_device_capability(d)) for d in devices})
    flags = []
    for name in names:
        if (found := re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)) is None:
            raise Unavailable(
                f"TORCH_CUDA_ARCH_LIST={text!r} holds {name!r}; write it as '8.0;9.0a+PTX'"
            )
        number = found[1] + found[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_command(nvcc: Path | str, flags: list[str], source: Path, output: Path) -> list[str]:
    """The command that makes an object file of one source."""
    include = Path(torch.__file__).parent / "include"
    return [str(nvcc), *flags, f"-I{include}", "-c", str(source), "-o", str(output)]


def default_flags(architectures: str) -> list[str]:
    """All flags of a build for ``architectures``, as in TORCH_CUDA_ARCH_LIST."""
    return [*_FLAGS, *architecture_flags(architectures)]


def _compile(nvcc: Path, flags: list[str], sources: list[Path], library: Path) -> None:
    jobs = int(os.environ.get("MAX_JOBS") or min(len(sources), os.cpu_count() or 1))
    print(  # the user is about to wait
        f"lightning_fastmoe: compiling CUDA kernels into {library.parent} (once, about a minute)",
        file=sys.stderr,
        flush=True,
    )
    # A folder of this process: what a killed build leaves behind is in nobody's way.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as name:
        folder = Path(name)
        objects = [folder / f"{source.name}.o" for source in sources]
        commands = [
            compile_command(nvcc, flags, source, output)
            for source, output in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            list(pool.map(_run, commands))
        # torch's libraries are in the process by then, and found by their names. A shared CUDA
        # runtime is torch's own, too.
        lib = Path(torch.__file__).parent / "lib"
        linked = folder / library.name
        names = ["-ltorch_cuda", "-ltorch_cpu", "-lc10"]
        link = [str(nvcc), "-shared", "-cudart", "shared", *map(str, objects), f"-L{lib}", *names]
        _run([*link, "-o", str(linked)])
        linked.replace(library)  # atomic: other processes see all of it or nothing


def _run(command: list[str]) -> str:
    done = subprocess.run(  # noqa: S603 - the compiler, without a shell
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise Unavailable(f"this failed: {' '.join(command)}\n{tail}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that the kernel releases when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
