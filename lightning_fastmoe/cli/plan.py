"""Predict how long passes take with experts in host memory (OffloadStrategy), and what limits them.

--config is the directory of a model of transformers, or its config.json; no weights are read. With
--measure, models with one and two of its layers are timed on the GPU, which takes half a minute;
without, the costs are those assumed of an H100.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from lightning_fastmoe.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--config", type=Path, required=True, help="the model's config.json")
    parser.add_argument(
        "--tokens",
        required=True,
        metavar="SEQUENCESxLENGTH",
        help="of a pass, such as 256x512",
    )
    parser.add_argument("--gpu-memory", default="24GB", help="what may be used (default: 24GB)")
    parser.add_argument("--host-memory", help="default: what is available here")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--resident-layers", type=int, default=0)
    parser.add_argument("--groups", type=int, default=1, help="of a layer's experts, one a slot")
    parser.add_argument("--expert-cache", help="for experts that few tokens have used last")
    parser.add_argument("--compression", help="of experts: int8 or int4 (default: none)")
    parser.add_argument("--generate", type=int, default=0, help="tokens for each sequence")
    parser.add_argument(
        "--chunk", type=int, metavar="SEQUENCES", help="compute blocks in chunks (default: whole)"
    )
    parser.add_argument("--host-cache", action="store_true", help="keys and values on the host")
    parser.add_argument("--measure", action="store_true", help="time layers on this GPU")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    shape = re.fullmatch(r"(\d+)x(\d+)", arguments.tokens)
    if shape is None or not int(shape[1]) * int(shape[2]):
        raise ConfigError(f"--tokens {arguments.tokens!r}: use SEQUENCESxLENGTH, such as 256x512.")
    from transformers import AutoConfig

    from lightning_fastmoe.huggingface.trial import assumed_costs, measured_costs, sizes_of
    from lightning_fastmoe.inference.chunks import check_chunk
    from lightning_fastmoe.inference.options import check_groups, check_slots, check_together
    from lightning_fastmoe.planning.offload import OffloadPlan
    from lightning_fastmoe.planning.offload_sizes import parse_bytes

    sequences, length = int(shape[1]), int(shape[2])
    try:
        config = AutoConfig.from_pretrained(arguments.config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{arguments.config} has no config.json: {error}") from error
    config = config.get_text_config(decoder=True)  # of a model of images and text, too
    chunk = arguments.chunk
    check_together(arguments.compression, arguments.expert_cache, arguments.groups, chunk)
    sizes = sizes_of(config, arguments.compression)
    check_slots(len(sizes.experts), arguments.slots, arguments.resident_layers)
    check_groups(arguments.groups, min(number for number, _ in sizes.choices))
    if chunk is not None:
        check_chunk(chunk)
    compression = arguments.compression
    costs = (
        measured_costs(config, sequences, length, arguments.generate > 0, compression, chunk)
        if arguments.measure
        else assumed_costs(config, sequences * length, sequences, chunk)
    )
    plan = OffloadPlan(
        sizes,
        costs,
        tokens=sequences * length,
        sequences=sequences,
        gpu_memory=parse_bytes(arguments.gpu_memory),
        slots=arguments.slots,
        resident=arguments.resident_layers,
        generated=arguments.generate,
        groups=arguments.groups,
        expert_cache=parse_bytes(arguments.expert_cache) if arguments.expert_cache else 0,
        chunk=chunk,
        host_cache=arguments.host_cache,
    )
    sys.stdout.write(plan.text())
    plan.check(
        _available() if arguments.host_memory is None else parse_bytes(arguments.host_memory)
    )
    return 0


def _available() -> int:
    """Bytes of host memory that are free, or hold caches."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text("ascii") if meminfo.exists() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    if found is None:
        raise ConfigError("The available host memory is unknown here: pass --host-memory.")
    return int(found[1]) * 1024
