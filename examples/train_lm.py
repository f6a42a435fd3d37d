"""What `lightning-fastmoe fit --config examples/tiny_lm.yaml` does, written out.

python examples/train_lm.py                   train; on two processes if there is no GPU
python examples/train_lm.py --resume          go on from the last checkpoint
python examples/train_lm.py --path my/text    on other text than the Python standard library
"""

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from lightning_fastmoe import ExpertLoadMonitor, FastMoEStrategy
from lightning_fastmoe.demos.byte_lm import ByteCorpus, MoELanguageModel, SampleText, TrainingBar
from lightning_fastmoe.demos.byte_lm.cli import silence_upstream


def main() -> None:
    """Train a byte-level mixture-of-experts language model and print what it writes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--path", help="a text file or a folder of them")
    parser.add_argument("--max_steps", type=int, default=450)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    silence_upstream()
    pl.seed_everything(0, workers=True)
    has_gpu = torch.cuda.is_available()

    # The model is an ordinary LightningModule whose feed-forward layers are
    # `lightning_fastmoe.MoE(d_model, d_ffn, num_experts, top_k)`.
    model = MoELanguageModel(
        d_model=128,
        num_layers=4,
        num_heads=4,
        d_ffn=128,
        num_experts=8,
        top_k=2,
        lr=3e-3,
        warmup_steps=50,
        init_std=0.06,
    )
    trainer = pl.Trainer(
        accelerator="cuda" if has_gpu else "cpu",
        devices="auto" if has_gpu else 2,
        precision="bf16-mixed" if has_gpu else "32-true",
        # This is all that expert parallelism takes: 2 processes, 4 of the 8 experts on each;
        # optimizer states and gradients of everything else are partitioned by ZeRO stage 2.
        strategy=FastMoEStrategy(expert_parallel_size="auto", stage=2),
        max_steps=args.max_steps,
        val_check_interval=150,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        logger=CSVLogger("runs", "train_lm"),
        callbacks=[
            TrainingBar(),
            ExpertLoadMonitor(),
            SampleText(),
            ModelCheckpoint(
                "runs/train_lm/checkpoints",
                save_last=True,
                save_top_k=0,
                every_n_train_steps=150,
                enable_version_counter=False,
            ),
        ],
    )
    data = ByteCorpus(args.path, seq_len=128, batch_size=8, max_val_windows=512)
    trainer.fit(model, data, ckpt_path="last" if args.resume else None)


if __name__ == "__main__":
    main()
