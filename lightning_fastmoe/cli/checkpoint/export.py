"""Write a model for Hugging Face transformers: safetensors files, index and config.json.

Without --to the checkpoint has a model of transformers of any family whose experts were trained in
place (experts_implementation="fastmoe"); --config says which. With --to it has the weights of a
model whose modules are named as transformers names them (MoECausalLM, or transformers' own model
with this package's MoE layers); the config.json comes from the checkpoint if training started from
an import, else from --config. Values are not changed.
docs/huggingface.md has the details.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fastmoe.cli.checkpoint.console import (
    print_json,
    print_text,
    progress,
    readable,
    size_in_bytes,
)
from lightning_fastmoe.cli.checkpoint.opening import (
    add_dtype,
    add_source,
    torch_dtype,
    verify_unless_told,
)
from lightning_fastmoe.errors import ConfigError

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_source(parser, copies=True)
    parser.add_argument("output", type=Path, help="the new directory")
    parser.add_argument(
        "--to",
        choices=FAMILIES,
        help="the family of a MoECausalLM, or of a model with MoE layers of this package (default:"
        " a model of transformers with its own experts, of any family)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="config.json of a model with these sizes, or its directory, from which the tokenizer"
        " is copied too",
    )
    parser.add_argument(
        "--prefix",
        help='prefix of the names of the weights, such as "network." (default: detected)',
    )
    parser.add_argument(
        "--lora-scale",
        type=float,
        metavar="SCALE",
        help="alpha / rank of all adapters, to merge them, where the checkpoint doesn't say it",
    )
    add_dtype(parser)
    parser.add_argument(
        "--max-shard-size",
        type=size_in_bytes,
        default=5 * 10**9,
        metavar="SIZE",
        help="maximum size of a file, such as 500MB or 2GiB (default: 5GB)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the directory."""
    from lightning_fastmoe.checkpoint import CheckpointReader
    from lightning_fastmoe.huggingface import export, export_in_place

    if arguments.to is None and arguments.config is None:
        raise ConfigError(
            "--config is missing: the directory of the model that training started from. For a"
            " MoECausalLM, --to chooses its family instead."
        )
    with CheckpointReader(arguments.checkpoint) as reader:
        reader.advice = "Pass --config with the model's config.json; then they are not needed."
        verify_unless_told(reader, arguments, weights=True)
        with progress("writing") as bar:
            options = {
                "prefix": arguments.prefix,
                "dtype": torch_dtype(arguments.dtype),
                "max_shard_bytes": arguments.max_shard_size,
                "on_total": bar.total,
                "on_bytes": bar.advance,
            }
            options["lora_scale"] = arguments.lora_scale
            if arguments.to is None:
                written = export_in_place(reader, arguments.output, arguments.config, **options)
            else:
                options["config"] = arguments.config
                written = export(reader, arguments.output, arguments.to, **options)
    if arguments.json:
        print_json({"path": str(arguments.output), "to": arguments.to, **written})
    else:
        print_text(
            f"{arguments.output}: {written['tensors']} tensors, {readable(written['bytes'])}."
            f" Load it with AutoModelForCausalLM.from_pretrained({str(arguments.output)!r})."
        )
    return 0
