"""Write all weights of a checkpoint into one file.

A .safetensors file has the weights under the names of the module's state_dict(). A .ckpt, .pt or
.pth file is a Lightning checkpoint without optimizer state: torch.load(weights_only=True) and
LightningModule.load_from_checkpoint can read it. The weights are streamed through a small buffer,
so the model need not fit into memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_fastmoe.cli.checkpoint.console import print_json, print_text, progress, readable
from lightning_fastmoe.cli.checkpoint.opening import (
    add_dtype,
    add_source,
    torch_dtype,
    verify_unless_told,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_source(parser, copies=True)
    parser.add_argument("output", type=Path, help="the new file")
    parser.add_argument(
        "--format", choices=("safetensors", "torch"), help="default: by the suffix of OUTPUT"
    )
    parser.add_argument(
        "--prefix",
        default="",
        help='write the weights of one submodule, such as "network.", without this prefix',
    )
    add_dtype(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")


def run(arguments: argparse.Namespace) -> int:
    """Write the file."""
    from lightning_fastmoe.checkpoint import CheckpointReader
    from lightning_fastmoe.checkpoint.tools.consolidate import FORMATS, Consolidation, consolidate
    from lightning_fastmoe.errors import ConfigError

    output: Path = arguments.output
    file_format = arguments.format or FORMATS.get(output.suffix)
    if file_format is None:
        raise ConfigError(
            f"The name {output.name!r} has none of the suffixes {', '.join(FORMATS)}: pass"
            " --format."
        )
    options = Consolidation(torch_dtype(arguments.dtype), arguments.prefix)
    with CheckpointReader(arguments.checkpoint) as reader:
        reader.advice = (
            "Write a .safetensors file, which holds only weights. If you trust the checkpoint's"
            " origin, load it with load_from_checkpoint(..., weights_only=False)."
        )
        tensors = options.tensors(reader)
        verify_unless_told(reader, arguments, weights=True)
        with progress("writing") as bar:
            bar.total(sum(tensor.size for tensor in tensors))
            consolidate(
                reader,
                output,
                file_format,
                options,
                overwrite=arguments.overwrite,
                on_bytes=bar.advance,
            )
        excluded = list(reader.manifest.excluded)
    size = output.stat().st_size
    if arguments.json:
        about = {"tensors": len(tensors), "bytes": size, "excluded": excluded}
        print_json({"path": str(output), "format": file_format, **about})
    else:
        print_text(f"{output}: {len(tensors)} tensors, {readable(size)}.")
        if excluded:
            print_text(f"{len(excluded)} frozen parameters were never saved and are missing.")
    return 0
