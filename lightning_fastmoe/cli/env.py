"""Print versions, GPUs and compiler of this machine, and whether the CUDA kernels run on it.

Nothing is compiled, and missing parts are reported, not errors: the exit status is always 0. For
scripts there is --json, where kernels.run is true, false, or "after compiling".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

VARIABLES = (
    "LIGHTNING_FASTMOE_KERNELS",
    "LIGHTNING_FASTMOE_LIBRARY",
    "LIGHTNING_FASTMOE_CACHE",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
)
PACKAGES = ("pytorch-lightning", "deepspeed", "torchmetrics", "jsonargparse")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about drivers: the report has it
        found = report()
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write(as_text(found))
    return 0


def report() -> dict[str, Any]:
    """The report as JSON values; where something can't be determined, a string says why."""
    from lightning_fastmoe import __version__

    return {
        "lightning_fastmoe": f"{__version__} ({Path(__file__).parents[1]})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _tried(_torch),
        "gpus": _tried(_gpus),
        "nvcc": _tried(_nvcc),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "kernels": _kernels(),
    }


def as_text(found: dict[str, Any]) -> str:
    """The report as lines of text; the last one says whether the kernels run."""
    kernels = found["kernels"]
    rows = {name: found[name] for name in ("lightning_fastmoe", "python", "platform")}
    torch = found["torch"]
    if isinstance(torch, dict):
        rows["torch"] = f"{torch['version']} (CUDA: {torch['cuda'] or 'built without'})"
    else:
        rows["torch"] = torch
    rows |= found["packages"]
    gpus = found["gpus"]
    if isinstance(gpus, list):
        for index, gpu in enumerate(gpus):
            rows[f"GPU {index}"] = f"{gpu['name']} (compute capability {gpu['capability']})"
        if not gpus:
            rows["GPUs"] = "none"
    else:
        rows["GPUs"] = gpus
    nvcc = found["nvcc"]
    rows["nvcc"] = f"{nvcc['path']} ({nvcc['version']})" if isinstance(nvcc, dict) else nvcc
    rows |= found["variables"]
    for name in ("architectures", "cache", "library", "state"):
        if value := kernels.get(name):
            rows[name] = ", ".join(value) if isinstance(value, list) else value
    lines = [f"{name:27}{value}" for name, value in rows.items()]
    if kernels["state"] == "failed":
        lines += ["", "The end of the compiler's output:", kernels["reason"]]
    return "\n".join([*lines, "", _verdict(kernels)]) + "\n"


def _kernels() -> dict[str, Any]:
    try:
        from lightning_fastmoe.ops import _build
    except Exception as error:  # torch is missing or broken in some way
        return {"run": False, "state": "unavailable", "reason": f"torch can't be imported: {error}"}
    outcome = _tried(_build.look)
    if isinstance(outcome, str):
        return {"run": False, "state": "unavailable", "reason": outcome}
    record = _tried(lambda: _build.read_record(outcome.library)) if outcome.library else None
    codes = record.codes if isinstance(record, _build.Record) else None
    codes = codes or _tried(lambda: _build.codes_to_build(_build.gpus()))
    return {
        "run": {"built": True, "not built": "after compiling"}.get(outcome.state, False),
        "state": outcome.state,
        "reason": outcome.reason,
        "architectures": codes if isinstance(codes, str) else list(codes),
        "cache": str(_tried(_build.cache_folder)),
        "library": str(outcome.library) if outcome.library else None,
    }


def _verdict(kernels: dict[str, Any]) -> str:
    state, reason = kernels["state"], kernels["reason"]
    absent = "The CUDA kernels don't run here; PyTorch's operators are used instead"
    if state == "built":
        return "The CUDA kernels run here."
    if state == "not built":
        return (
            "The CUDA kernels will run here: the first use compiles them, in about a minute;"
            " lightning-fastmoe build does it now."
        )
    if state == "failed":
        return (
            f"{absent}: the last attempt to compile them failed, as shown above. Fix that, then run"
            " lightning-fastmoe build."
        )
    return f"{absent}: {' '.join(reason.split())}."


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except Exception:  # no metadata, or unreadable
        return "not installed"


def _tried(look: Callable[[], Any]) -> Any:
    """The result of ``look``, or its error as a string: reports must work on broken machines."""
    try:
        return look()
    except Exception as error:
        return str(error) or type(error).__name__


def _torch() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def _gpus() -> list[dict[str, str]]:
    import torch

    if torch.version.cuda is None:
        return []
    torch.cuda.init()  # raises what is_available() hides, such as an old driver
    return [
        {
            "name": torch.cuda.get_device_name(device),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        }
        for device in range(torch.cuda.device_count())
    ]


def _nvcc() -> dict[str, str]:
    from lightning_fastmoe.ops import _build

    nvcc = _build.find_nvcc()
    return {"path": str(nvcc), "version": _build.toolkit_version(nvcc)}
