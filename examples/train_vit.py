"""Trains a vision transformer with mixtures of experts, on handwritten digits by default.

python examples/train_vit.py                     train; on two processes if there is no GPU
python examples/train_vit.py --resume            go on from the last checkpoint
python examples/train_vit.py --path my/images    on a folder with a subfolder of images per class
"""

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from lightning_fastmoe import ExpertLoadMonitor, FastMoEStrategy
from lightning_fastmoe.demos.byte_lm import TrainingBar
from lightning_fastmoe.demos.byte_lm.cli import silence_upstream
from lightning_fastmoe.demos.vision import ImageClassifier, ImageData


def main() -> None:
    """Train a Swin V2 whose every second feed-forward block is a mixture of experts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--path", help="a folder of images, with a subfolder per class")
    parser.add_argument("--image_size", type=int, default=32, help="what they are scaled to")
    parser.add_argument("--patch_size", type=int, default=1, help="pixels along a token's side")
    parser.add_argument("--max_epochs", type=int, default=15)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    silence_upstream()
    pl.seed_everything(0, workers=True)
    has_gpu = torch.cuda.is_available()

    data = ImageData(args.path, args.image_size, batch_size=32)
    model = ImageClassifier(
        data.image_size,
        data.channels,
        len(data.class_names),
        patch_size=args.patch_size,
        d_model=32,
        depths=(2, 2, 2),
        window_size=4,
        num_experts=8,
        top_k=2,
        # In training an expert takes 1.25 times its share of a batch's tokens at most, and keeps
        # those with the best scores; in evaluation it takes all.
        moe={"router": "cosine", "capacity_factor": (1.25, None), "drop_by": "score"},
    )
    trainer = pl.Trainer(
        accelerator="cuda" if has_gpu else "cpu",
        devices="auto" if has_gpu else 2,
        precision="bf16-mixed" if has_gpu else "32-true",
        strategy=FastMoEStrategy(expert_parallel_size="auto", stage=2),
        max_epochs=args.max_epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        logger=CSVLogger("runs", "train_vit"),
        callbacks=[
            TrainingBar(),
            ExpertLoadMonitor(),
            ModelCheckpoint(
                "runs/train_vit/checkpoints",
                save_last=True,
                save_top_k=0,
                enable_version_counter=False,
            ),
        ],
    )
    trainer.fit(model, data, ckpt_path="last" if args.resume else None)
    if trainer.is_global_zero:
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        print(f"Accuracy on {len(data.val)} images that were not trained on: {accuracy:.1%}")


if __name__ == "__main__":
    main()
