"""Convert a Hugging Face transformers model to a checkpoint that training can start from.

Reads Mixtral, Qwen3-MoE and OLMoE models: a directory with config.json and safetensors files, as
huggingface_hub downloads them. Values are not changed; the experts of a layer are stacked. Train
it with MoECausalLM(weights=OUTPUT). docs/huggingface.md has the details.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lightning_fastmoe.cli.checkpoint.console import print_json, print_text, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", type=Path, help="the model's directory")
    parser.add_argument("output", type=Path, help="the new checkpoint's directory")
    parser.add_argument(
        "--prefix",
        default="network.",
        help="the attribute of your LightningModule that holds the decoder, with a dot (default:"
        ' "network.", that of MoECausalLM)',
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUTPUT")


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint."""
    from lightning_fastmoe.errors import ConfigError
    from lightning_fastmoe.huggingface import import_model

    if os.path.lexists(arguments.output) and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} exists already: pass --overwrite to replace it.")
    with progress("writing") as bar:
        about = import_model(
            arguments.model,
            arguments.output,
            prefix=arguments.prefix,
            on_total=bar.total,
            on_bytes=bar.advance,
        )
    if arguments.json:
        content = {"layers": len(about.moe_layers), "num_experts": about.num_experts}
        print_json({"path": str(arguments.output), "family": about.family, **content})
    else:
        print_text(
            f"{arguments.output}: {about.family}, {len(about.moe_layers)} layers of"
            f" {about.num_experts} experts."
        )
    return 0
