"""Fine-tuning a language model that came from Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor
from typing_extensions import override

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.huggingface import Architecture, kept_config, read_config
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.lm.decoder import MoEDecoder

IGNORED = -100
"""A label that is not predicted, as in transformers."""


class MoECausalLM(LightningModule):
    """Mixtral, Qwen3-MoE or OLMoE, trained to predict the next token.

    ``MoECausalLM(weights="qwen3.ckpt")`` starts from what ``lightning-fastmoe checkpoint import``
    wrote; ``checkpoint export`` turns checkpoints of its training into a model for transformers.

    Batches are token ids (batch, seq_len), or maps with ``input_ids`` and, if not every token is to
    be learned, ``labels`` of the same shape with -100 for the others (not shifted, as transformers
    takes them). Override ``configure_optimizers`` as in any LightningModule.

    Args:
        weights: a checkpoint to start from; None starts from random weights.
        config: ``config.json`` of the model: its content, its path, or its directory. None takes
            that of ``weights``.
        lr: learning rate of AdamW.
        weight_decay: of AdamW, on all weights.
        load_balancing: coefficient of the load-balancing loss.
        z_loss: coefficient of the router z-loss.

    Raises:
        ConfigError: if the model is of no supported kind, or both arguments are missing.
    """

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | str | None = None,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        load_balancing: float = 0.01,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self._weights = weights
        self.config = _content(config, weights)
        self.architecture = Architecture.from_config(self.config)
        self.save_hyperparameters("lr", "weight_decay", "load_balancing", "z_loss")
        # Its content and not its path, as exporting needs it on whatever machine. The weights to
        # start from are no hyperparameter: a checkpoint has its own.
        self.save_hyperparameters({"config": self.config})
        self.lr, self.weight_decay = lr, weight_decay
        self._coefficients = {"load_balancing": load_balancing, "z_loss": z_loss}
        self.network: MoEDecoder | None = None

    @override
    def configure_model(self) -> None:
        # Here the strategy knows the ranks, so that each creates and reads its own experts only.
        if self.network is None:
            self.network = MoEDecoder(self.architecture, **self._coefficients)
            if self._weights is not None:
                load_weights(self._weights, self.network, prefix="network.")

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Predicts each next token: (batch, seq_len) to logits (batch, seq_len, vocab_size)."""
        if self.network is None:
            raise ConfigError(
                "The network isn't built yet. A Trainer builds it; outside of one, call"
                " configure_model() first."
            )
        logits: Tensor = self.network(tokens)
        return logits

    @override
    def training_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> None:
        tokens = batch if isinstance(batch, Tensor) else batch["input_ids"]
        self.log("val_loss", self._loss(batch), sync_dist=True, batch_size=len(tokens))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def _loss(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the tokens that are predicted, in nats."""
        tokens = batch if isinstance(batch, Tensor) else batch["input_ids"]
        labels = tokens if isinstance(batch, Tensor) else batch.get("labels", tokens)
        logits = self(tokens)[:, :-1].float()
        return F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].long().flatten(), ignore_index=IGNORED
        )


def _content(config: dict[str, Any] | str | None, weights: str | None) -> dict[str, Any]:
    """The content of the config.json."""
    if isinstance(config, dict):
        return config
    if config is not None:
        return read_config(config)
    if weights is None:
        raise ConfigError("MoECausalLM needs weights= to start from, or config= of a new model.")
    with CheckpointReader(weights) as reader:
        return kept_config(reader)
