"""Scoring on several GPUs of a host that share the experts in its memory: OffloadDDPStrategy.

    torchrun --nproc-per-node 2 benchmarks/offload_gpus.py
    torchrun --nproc-per-node 4 benchmarks/offload_gpus.py --layers 48 --tokens 8192 32768

A model of the sizes of --model with --layers layers, bf16, with random weights, scores --passes
passes of --tokens tokens on each GPU, as benchmarks/offload.py does. Rows: each GPU copies whole
layers by itself, or a part of each that it exchanges for the others' ("gathered"). Times are what
OffloadDDPStrategy reports: by CUDA events from the end of one pass to the end of the next, medians
after one. Losses of both rows must have the same bits.

Prints a table: milliseconds of a pass, tokens per second of all GPUs, milliseconds that a pass
waited for copies, the rate at which a GPU gets its experts, and peak memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import pytorch_lightning as pl
import torch
from offload import score
from offloading.models import MODELS, build, config_of, device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fastmoe import OffloadDDPStrategy


class Scorer(pl.LightningModule):
    """The loss of each pass.

    Args:
        name: of the model.
        layers: how many; None for all.
    """

    def __init__(self, name: str, layers: int | None) -> None:
        super().__init__()
        self.name, self.layers = name, layers
        self.model: nn.Module | None = None

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("cpu"):
                self.model = build(self.name, self.layers)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # where weights were drawn

    def predict_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return score(self.model, ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--gpu-memory", default="24GB")
    args = parser.parse_args()
    world, first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    module = Scorer(args.model, args.layers)
    words = config_of(args.model).vocab_size
    rows: list[Any] = []
    losses: dict[tuple[bool, int], Any] = {}
    for gather in (False, True):
        strategy = OffloadDDPStrategy(gpu_memory=args.gpu_memory, gather=gather)
        trainer = pl.Trainer(
            devices=world,
            accelerator=device().type,
            strategy=strategy,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        for tokens in args.tokens:
            sequences = tokens // args.seq_len
            generator = torch.Generator().manual_seed(tokens)
            shape = (args.passes * world * sequences, args.seq_len)
            ids: Any = torch.randint(words, shape, generator=generator)
            found = trainer.predict(module, DataLoader(ids, batch_size=sequences))
            report = strategy.last_report
            if found is None or report is None:
                raise RuntimeError("there were no passes")
            losses[gather, tokens] = found
            rows.append(
                (
                    "gathered" if gather else "whole layers",
                    tokens,
                    f"{1000 * report.seconds:.1f}",
                    f"{world * tokens / report.seconds:,.0f}",
                    f"{1000 * report.waiting:.1f}",
                    f"{report.plan.costs.link / 1e9:.1f}",
                    f"{report.peak / 1e9:.1f}",
                )
            )
    same = all(
        torch.equal(a, b)
        for tokens in args.tokens
        for a, b in zip(losses[False, tokens], losses[True, tokens], strict=True)
    )
    if first:
        print("| | tokens per GPU | ms | tokens/s | ms waiting | GB/s per GPU | peak GB |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(map(str, row)) + " |")
    if not same:
        print("Losses differ: no comparison.", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
