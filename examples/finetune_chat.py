"""Fine-tunes a mixture of experts from Hugging Face on chats, with its experts sharded.

python examples/finetune_chat.py MODEL chats.jsonl --output tuned     MODEL: a local directory
python examples/finetune_chat.py MODEL chats.jsonl --resume           go on from the last checkpoint

A line of chats.jsonl is {"messages": [{"role": "user", "content": "..."}, ...]}. Only what the
assistant says is learned. The result is a directory that transformers, vLLM and SGLang load.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from transformers import AutoTokenizer

from lightning_fastmoe import ExpertLoadMonitor, FastMoEStrategy
from lightning_fastmoe.demos.chat import ChatFiles, check_separation
from lightning_fastmoe.huggingface import add_lora, from_pretrained, save_pretrained


class Tuned(pl.LightningModule):
    """A model of transformers, of which each process reads its own experts only.

    Args:
        path: the model's directory.
        lr: the peak learning rate.
        warmup_steps: steps over which it rises.
        lora_rank: of adapters that are trained in the place of the experts' weights; 0 trains all.
        base: "nf4" or "nf4-double" to keep the weights beside adapters in 4 bits (QLoRA).
    """

    def __init__(
        self, path: str, lr: float, warmup_steps: int, lora_rank: int = 0, base: str | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            # fp32: the optimizer's weights. What is multiplied is what precision= says.
            self.model = from_pretrained(
                self.hparams.path, dtype=torch.float32, quantize_experts=self.hparams.base
            )
            self.model.config.use_cache = False
            self.model.train()
            if self.hparams.lora_rank:
                add_lora(self.model, self.hparams.lora_rank)

    def on_train_start(self) -> None:
        if self.trainer.datamodule.packed:
            check_separation(self.model)

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, (0.9, 0.95), fused=fused)
        steps = max(1, self.hparams.warmup_steps)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / steps, total_iters=steps - 1)
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]


def main() -> None:
    """Fine-tune a model of transformers on chats."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help="a directory with a model and its tokenizer")
    parser.add_argument("chats", help="a file of chats, a line of JSON each")
    parser.add_argument("--val", help="a file of chats to validate on")
    parser.add_argument("--output", default="tuned", help="the new model's directory")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--batch-size", type=int, default=1, help="rows per step and process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank")
    parser.add_argument("--base", choices=["nf4", "nf4-double"], help="experts beside adapters")
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--devices", default="auto", help="GPUs; without any, processes")
    parser.add_argument("--expert-parallel-size", default="auto")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO's stage")
    parser.add_argument("--one-chat-per-row", action="store_true", help="don't pack chats")
    args = parser.parse_args()
    if args.base and not args.lora_rank:
        parser.error(f"--base {args.base} can't be trained itself: choose a --lora-rank")
    if Path(args.output).exists():
        parser.error(f"{args.output} exists already; move it away, or choose another --output")

    pl.seed_everything(0, workers=True)
    has_gpu = torch.cuda.is_available()
    devices = args.devices if args.devices == "auto" else int(args.devices)
    size = args.expert_parallel_size
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = ChatFiles(
        args.chats,
        tokenizer,
        args.val,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        packed=not args.one_chat_per_row,
    )
    runs = Path(f"{args.output}.run")
    trainer = pl.Trainer(
        accelerator="cuda" if has_gpu else "cpu",
        devices=devices if has_gpu or devices != "auto" else 2,
        precision="bf16-mixed" if has_gpu else "32-true",
        strategy=FastMoEStrategy(
            expert_parallel_size=size if size == "auto" else int(size),
            stage=args.stage,
            exclude_frozen_parameters=bool(args.lora_rank),  # checkpoints of adapters alone
        ),
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        logger=CSVLogger(runs, name=""),
        callbacks=[
            ExpertLoadMonitor(),
            ModelCheckpoint(runs / "checkpoints", save_last=True, enable_version_counter=False),
        ],
    )
    module = Tuned(args.model, args.lr, args.warmup_steps, args.lora_rank, args.base)
    trainer.fit(module, data, ckpt_path="last" if args.resume else None)
    save_pretrained(trainer, args.output, dtype=torch.bfloat16)
    if trainer.is_global_zero:
        tokenizer.save_pretrained(args.output)
        print(f"Load it with AutoModelForCausalLM.from_pretrained({args.output!r}).")


if __name__ == "__main__":
    main()
