"""The LightningModule of the image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_info
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_fastmoe.demos.optimization import adamw_with_cosine
from lightning_fastmoe.demos.vision.network import SwinMoE, check_sizes
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.sizes import model_size
from lightning_fastmoe.planning.units import count_text

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and their classes (B,)."""


class ImageClassifier(LightningModule):
    """A vision transformer with mixtures of experts, and how it is trained.

    Args:
        image_size: Pixels along an image's side.
        channels: Colours of a pixel.
        num_classes: Classes to tell apart.
        patch_size: Pixels along the side of a patch, which becomes a token.
        d_model: Width of the first stage's tokens; each next stage has twice the width.
        depths: Blocks of each stage; every second one has a mixture of experts.
        head_dim: Width of an attention head.
        window_size: Tokens along a window's side.
        ffn_ratio: Inner width of an expert, in widths of its stage.
        num_experts: Experts of each MoE layer, over all processes.
        top_k: Experts per token; null for routers without a fixed number.
        moe: Further arguments of each `MoE` layer, by name; those of `network.MOE` otherwise.
        bias_hidden: Inner width of the network of relative positions.
        lr: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of `lr`.
        warmup_steps: Steps over which the learning rate rises from 0; a cosine follows.
        weight_decay: AdamW's weight decay for matrices.
        betas: AdamW's decay rates of the averages of the gradient and of its square.
        init_std: Standard deviation of the initial weights of all but the MoE layers.

    Raises:
        ConfigError: if sizes don't divide each other; once the network is built, also as
            :class:`SwinMoE` does.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        patch_size: int = 1,
        d_model: int = 32,
        depths: Sequence[int] = (2, 2, 2),
        head_dim: int = 16,
        window_size: int = 4,
        ffn_ratio: int = 2,
        num_experts: int = 8,
        top_k: int | None = 2,
        moe: dict[str, Any] | None = None,
        bias_hidden: int = 64,
        lr: float = 3e-3,
        min_lr_ratio: float = 0.01,
        warmup_steps: int = 30,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        init_std: float = 0.2,
    ) -> None:
        super().__init__()
        # Before other processes start, which would each report what is wrong.
        check_sizes(image_size, patch_size, d_model, depths, head_dim, window_size)
        self.save_hyperparameters()
        self.lr, self.min_lr_ratio, self.warmup_steps = lr, min_lr_ratio, warmup_steps
        self.weight_decay, self.betas = weight_decay, betas
        self._arguments: dict[str, Any] = {
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
            "patch_size": patch_size,
            "d_model": d_model,
            "depths": depths,
            "head_dim": head_dim,
            "window_size": window_size,
            "ffn_ratio": ffn_ratio,
            "num_experts": num_experts,
            "top_k": top_k,
            "moe": moe,
            "bias_hidden": bias_hidden,
            "init_std": init_std,
        }
        self.network: SwinMoE | None = None
        # Counts over all ranks: a mean of the ranks' means would weight their images unequally.
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    @override
    def configure_model(self) -> None:
        # Built here, as each rank then creates only its own experts. May be called more than once.
        if self.network is None:
            self.network = SwinMoE(**self._arguments)
            size = model_size(self.network)
            rank_zero_info(
                f"Model: {count_text(size.total)} parameters, {count_text(size.active)} used per"
                f" token; {len(size.layers)} MoE layers."
            )

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes: (B, C, H, W) to logits (B, num_classes)."""
        if self.network is None:
            raise ConfigError(
                "The network isn't built yet. A Trainer builds it; without one, call"
                " configure_model() first."
            )
        logits: Tensor = self.network(images)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, classes = batch
        loss = F.cross_entropy(self(images).float(), classes)
        self.log("train_loss", loss.detach(), sync_dist=True, batch_size=len(images))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, classes = batch
        logits = self(images).float()
        loss = F.cross_entropy(logits, classes)
        self.accuracy(logits, classes)
        self.log("val_loss", loss, sync_dist=True, batch_size=len(images))
        self.log("val_accuracy", self.accuracy, prog_bar=True, batch_size=len(images))

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The most likely class of each image, (B,)."""
        classes: Tensor = self(batch[0]).argmax(dim=-1)
        return classes

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return adamw_with_cosine(
            self,
            lr=self.lr,
            min_lr_ratio=self.min_lr_ratio,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=self.betas,
        )
