"""A Transformer-XL whose feed-forward layers are mixtures of experts, on bytes.

python examples/transformer_xl.py                   train; on two processes if there is no GPU
python examples/transformer_xl.py --resume          go on from the last checkpoint
python examples/transformer_xl.py --mem_len 0       without memory
python examples/transformer_xl.py --path my/text    on other text than the Python standard library
"""

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from lightning_fastmoe import ExpertLoadMonitor, FastMoEStrategy
from lightning_fastmoe.demos.byte_lm import SampleText, TrainingBar
from lightning_fastmoe.demos.byte_lm.cli import silence_upstream
from lightning_fastmoe.demos.transformer_xl import ByteStreams, TransformerXL


def main() -> None:
    """Train a byte-level Transformer-XL with mixtures of experts and print what it writes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--path", help="a text file or a folder of them")
    parser.add_argument("--seq_len", type=int, default=64, help="bytes per segment")
    parser.add_argument("--mem_len", type=int, default=128, help="positions that are remembered")
    parser.add_argument("--max_steps", type=int, default=450)
    parser.add_argument("--save_every", type=int, default=150, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    silence_upstream()
    pl.seed_everything(0, workers=True)
    has_gpu = torch.cuda.is_available()

    model = TransformerXL(
        d_model=128,
        num_layers=4,
        num_heads=4,
        d_ffn=128,
        num_experts=8,
        top_k=2,
        mem_len=args.mem_len,
        lr=3e-3,
        warmup_steps=50,
        init_std=0.06,
    )
    trainer = pl.Trainer(
        accelerator="cuda" if has_gpu else "cpu",
        devices="auto" if has_gpu else 2,
        precision="bf16-mixed" if has_gpu else "32-true",
        strategy=FastMoEStrategy(expert_parallel_size="auto", stage=2),
        max_steps=args.max_steps,
        val_check_interval=args.save_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        logger=CSVLogger("runs", "transformer_xl"),
        callbacks=[
            TrainingBar(),
            ExpertLoadMonitor(),
            SampleText(context=args.seq_len + args.mem_len),
            ModelCheckpoint(
                "runs/transformer_xl/checkpoints",
                save_last=True,
                save_top_k=0,
                every_n_train_steps=args.save_every,
                enable_version_counter=False,
            ),
        ],
    )
    # Each row of each process's batches reads its own part of the text, segment after segment, and
    # remembers what it has read; a checkpoint has each process's memory beside its position.
    data = ByteStreams(args.path, seq_len=args.seq_len, batch_size=8)
    trainer.fit(model, data, ckpt_path="last" if args.resume else None)


if __name__ == "__main__":
    main()
