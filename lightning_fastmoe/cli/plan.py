"""Predict how long passes take with experts in host memory (OffloadStrategy), and what limits them.

--config is the directory of a model of transformers, or its config.json; no weights are read. With
--measure, models with one and two of its layers are timed on the GPU, which takes half a minute;
without, the costs are those assumed of an H100.

With --train, predict instead what a rank of FastMoEStrategy holds at each expert parallel size, and
say which sizes fit. Where there are several GPUs, --tokens are those of each.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from lightning_fastmoe.errors import ConfigError

_DTYPES = {
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
    "32-true": "float32",
}
"""Precisions of the Trainer -> the dtype of the weights that are computed with."""
_ONLY_OFFLOADING = (
    "host_memory",
    "slots",
    "resident_layers",
    "groups",
    "expert_cache",
    "compression",
    "generate",
    "chunk",
    "host_cache",
    "measure",
)
_ONLY_TRAINING = ("gpus_per_node", "stage", "precision", "logits_rows", "dispatcher", "exact")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--config", type=Path, required=True, help="the model's config.json")
    parser.add_argument(
        "--tokens",
        required=True,
        metavar="SEQUENCESxLENGTH",
        help="of a pass, such as 256x512",
    )
    parser.add_argument(
        "--gpu-memory",
        help="what may be used of each GPU (default: 24GB; with --train: 80GB)",
    )
    parser.add_argument(
        "--host-memory",
        help="of the host, or 'here' for what is available here (default: unlimited; with"
        " --measure: here)",
    )
    parser.add_argument("--slots", type=int, help="default: 2")
    parser.add_argument("--resident-layers", type=int, help="default: 0")
    parser.add_argument(
        "--groups", type=int, help="of a layer's experts, one in a slot (default: 1)"
    )
    parser.add_argument("--expert-cache", help="for experts that few tokens have used last")
    parser.add_argument("--compression", help="of experts: int8 or int4 (default: none)")
    parser.add_argument("--generate", type=int, help="tokens for each sequence")
    parser.add_argument(
        "--chunk", type=int, metavar="SEQUENCES", help="compute blocks in chunks (default: whole)"
    )
    parser.add_argument("--host-cache", action="store_true", help="keys and values on the host")
    parser.add_argument("--measure", action="store_true", help="time layers on this GPU")
    parser.add_argument(
        "--gpus", type=int, help="of one host (default: 1); with --train, of all nodes (default: 8)"
    )
    parser.add_argument("--train", action="store_true", help="plan training, not offloading")
    training = parser.add_argument_group("only with --train")
    training.add_argument("--gpus-per-node", type=int, help="default: at most 8")
    training.add_argument("--stage", type=int, help="ZeRO stage (default: 2)")
    training.add_argument("--precision", choices=sorted(_DTYPES), help="default: bf16-mixed")
    training.add_argument(
        "--logits-rows", type=int, help="tokens whose logits are there at a time (default: all)"
    )
    training.add_argument(
        "--dispatcher",
        choices=["auto", "all_to_all", "dedup", "dedup_overlapped", "symmetric"],
        help="how tokens reach their experts (default: auto, on GPUs that reach each other's"
        " memory)",
    )
    training.add_argument(
        "--exact", action="store_true", help="of layers with the bits of one process"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    shape = re.fullmatch(r"(\d+)x(\d+)", arguments.tokens)
    if shape is None or not int(shape[1]) * int(shape[2]):
        raise ConfigError(f"--tokens {arguments.tokens!r}: use SEQUENCESxLENGTH, such as 256x512.")
    for name in _ONLY_OFFLOADING if arguments.train else _ONLY_TRAINING:
        if (value := getattr(arguments, name)) not in (None, False):
            only = "without" if arguments.train else "with"
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} has a meaning only {only} --train: drop it."
            )
    config = _config(arguments.config)
    plan = _plan_training if arguments.train else _plan_offloading
    plan(arguments, config, int(shape[1]), int(shape[2]))
    return 0


def _config(path: Path) -> Any:
    # Before transformers, which asks the Hub for whatever it doesn't find here.
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        raise ConfigError(
            f"{path} is not a model's config.json; --config takes that file, its directory or the"
            " model's name on the Hub."
        )
    if not path.exists() and len(path.parts) != 2:
        raise ConfigError(
            f"{path} does not exist, and models on the Hub have names like Qwen/Qwen3-30B-A3B."
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} has no config.json: {error}") from error
    return config.get_text_config(decoder=True)  # of a model of images and text, too


def _plan_training(arguments: argparse.Namespace, config: Any, sequences: int, length: int) -> None:
    import torch

    from lightning_fastmoe.huggingface.activations import saved_activations
    from lightning_fastmoe.huggingface.sharded_experts import choose_dispatcher
    from lightning_fastmoe.huggingface.trial import skeleton
    from lightning_fastmoe.planning.offload_sizes import parse_bytes
    from lightning_fastmoe.planning.training import training_plan
    from lightning_fastmoe.strategy import FastMoEStrategy

    precision = arguments.precision or "bf16-mixed"
    dtype = getattr(torch, _DTYPES[precision])
    gpus, per_node = (8 if arguments.gpus is None else arguments.gpus), arguments.gpus_per_node
    stage = 2 if arguments.stage is None else arguments.stage
    strategy = FastMoEStrategy(stage=stage)
    assert isinstance(strategy.config, dict)
    model = skeleton(config, dtype=dtype)
    if arguments.dispatcher is not None or arguments.exact:
        choose_dispatcher(model, arguments.dispatcher or "auto", exact=arguments.exact)
    plan = training_plan(
        model,
        saved_activations(skeleton(config, dtype=dtype), sequences, length, arguments.logits_rows),
        gpus=gpus,
        gpus_per_node=min(gpus, 8) if per_node is None else per_node,
        gpu_memory=parse_bytes(arguments.gpu_memory or "80GB"),
        tokens=sequences * length,
        itemsize=dtype.itemsize,
        zero=strategy.config["zero_optimization"],
        run=f"{gpus} GPU{'s' * (gpus > 1)}, ZeRO stage {stage}, {precision}, Adam,"
        f" {sequences * length:,} tokens per GPU",
    )
    sys.stdout.write(plan.text())
    plan.check()


def _plan_offloading(
    arguments: argparse.Namespace, config: Any, sequences: int, length: int
) -> None:
    from lightning_fastmoe.huggingface.trial import assumed_costs, measured_costs, sizes_of
    from lightning_fastmoe.inference import options
    from lightning_fastmoe.inference.chunks import check_chunk
    from lightning_fastmoe.planning.offload import OffloadPlan
    from lightning_fastmoe.planning.offload_sizes import parse_bytes

    gpus = 1 if arguments.gpus is None else arguments.gpus
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: use at least 1.")
    groups = 1 if arguments.groups is None else arguments.groups
    compression, chunk = arguments.compression, arguments.chunk
    options.check_together(compression, arguments.expert_cache, groups, chunk)
    if gpus > 1:
        options.check_several_gpus(compression, groups)
    if chunk is not None:
        check_chunk(chunk)
    sizes = sizes_of(config, compression)
    slots = 2 if arguments.slots is None else arguments.slots
    resident, generated = arguments.resident_layers or 0, arguments.generate or 0
    options.check_slots(len(sizes.experts), slots, resident)
    options.check_groups(groups, min(number for number, _ in sizes.choices))
    costs = (
        measured_costs(config, sequences, length, generated > 0, compression, chunk)
        if arguments.measure
        else assumed_costs(config, sequences * length, sequences, chunk)
    )
    plan = OffloadPlan(
        sizes,
        costs,
        tokens=sequences * length,
        sequences=sequences,
        gpu_memory=parse_bytes(arguments.gpu_memory or "24GB"),
        slots=slots,
        resident=resident,
        generated=generated,
        expert_cache=parse_bytes(arguments.expert_cache) if arguments.expert_cache else 0,
        groups=groups,
        chunk=chunk,
        host_cache=arguments.host_cache,
        gpus=gpus,
    )
    sys.stdout.write(plan.text())
    plan.check(_host_memory(arguments))


def _host_memory(arguments: argparse.Namespace) -> int | None:
    """Bytes that experts may take; None if nobody said."""
    from lightning_fastmoe.planning.host_memory import available
    from lightning_fastmoe.planning.offload_sizes import parse_bytes

    given: str | None = arguments.host_memory
    if given == "here" or (given is None and arguments.measure):
        return available()
    return None if given is None else parse_bytes(given)
