"""A LightningModule that fine-tunes language models imported from Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from typing_extensions import override

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.architecture import Architecture, read_config
from lightning_fastmoe.huggingface.batch import IGNORED, TokenBatch, read_batch
from lightning_fastmoe.huggingface.decoder import MoEDecoder
from lightning_fastmoe.huggingface.exporting import kept_config
from lightning_fastmoe.nn import compile_blocks
from lightning_fastmoe.nn.compilation import check_cuda_graphs
from lightning_fastmoe.nn.experts.lora import check_options
from lightning_fastmoe.nn.lora import add_lora

Batch = Tensor | Mapping[str, Any]


class MoECausalLM(LightningModule):
    """Mixtral, Qwen3-MoE or OLMoE, trained to predict the next token.

    ``MoECausalLM(weights="qwen3.ckpt")`` starts from a checkpoint that ``lightning-fastmoe
    checkpoint import`` wrote; ``checkpoint export`` turns its checkpoints into a model for
    transformers.

    Batches are token ids (batch, seq_len), or mappings with ``input_ids`` and, in transformers'
    conventions:

    - ``labels`` of the same shape, -100 for tokens to exclude from the loss (not shifted);
    - ``attention_mask`` of the same shape, 0 for padding before or after a row's tokens. Padding is
      skipped everywhere;
    - ``position_ids``, which restart from 0 with each document packed into a row; or ``seq_idx``,
      or ``cu_seq_lens_q`` and ``_k`` (``DataCollatorWithFlattening``). A document sees only itself,
      and its first token is not predicted.

    The loss is the mean over the predicted tokens in the rank's micro-batch, zero if there are
    none; gradients are those of its mean over ranks and micro-batches. If the logits take more than
    1 GiB in fp32, they are computed and discarded in chunks of positions. Other keys are refused.
    Override ``configure_optimizers`` as in any LightningModule.

    Args:
        weights: a checkpoint to start from; None starts from random weights.
        config: ``config.json`` of the model: its content, its path, or its directory. None uses
            the config in ``weights``.
        lr: learning rate of AdamW.
        weight_decay: AdamW's weight decay, on all weights.
        load_balancing: coefficient of the load-balancing loss.
        z_loss: coefficient of the router z-loss.
        compile: whether ``torch.compile`` compiles each block, which takes some ten seconds in the
            first step, and again when the shape of batches changes.
        cuda_graphs: whether compiled blocks are launched as CUDA graphs, which takes the host less
            time, for batches of one shape; see :func:`~lightning_fastmoe.nn.compile_blocks`.
        lora_rank: rank of adapters of the experts, which alone are trained; None trains the model.
            ``checkpoint export`` merges them.
        lora_alpha: adapters are multiplied by ``lora_alpha / lora_rank``; None is twice the rank.

    Raises:
        ConfigError: if the model's family is not supported, ``weights`` and ``config`` are both
            missing, or an argument has no effect.
    """

    def __init__(
        self,
        weights: str | None = None,
        config: dict[str, Any] | str | None = None,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        load_balancing: float = 0.01,
        z_loss: float = 0.0,
        compile: bool = False,  # noqa: A002  named in config files
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        if lora_rank is not None:
            check_options(lora_rank, lora_alpha, ())
        elif lora_alpha is not None:
            raise ConfigError(f"lora_alpha={lora_alpha!r} has no effect without lora_rank.")
        check_cuda_graphs(cuda_graphs, compile)
        self._weights, self._compiles, self._cuda_graphs = weights, compile, cuda_graphs
        self._lora = (lora_rank, lora_alpha)
        self.config = _content(config, weights)
        self.architecture = Architecture.from_config(self.config)
        self.save_hyperparameters("lr", "weight_decay", "load_balancing", "z_loss", "compile")
        # The content, not the path, because exporting needs it on any machine. The initial weights
        # are not a hyperparameter: a checkpoint has its own. By value also what subclasses may not
        # have as an argument.
        own = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "cuda_graphs": cuda_graphs}
        self.save_hyperparameters({"config": self.config, **own})
        self.lr, self.weight_decay = lr, weight_decay
        self._coefficients = {"load_balancing": load_balancing, "z_loss": z_loss}
        self.network: MoEDecoder | None = None

    @override
    def configure_model(self) -> None:
        # By now the strategy knows the ranks, so that each creates and reads only its own experts.
        if self.network is None:
            self.network = MoEDecoder(self.architecture, **self._coefficients)
            if self._weights is not None:
                load_weights(self._weights, self.network, prefix="network.")
            rank, alpha = self._lora
            if rank is not None:
                add_lora(self.network, rank, alpha)
            if self._compiles:
                compile_blocks(self.network.model.layers, cuda_graphs=self._cuda_graphs)
                self.network.compile_loss()

    @override
    def forward(self, batch: Batch) -> Tensor:
        """Predicts each next token.

        Args:
            batch: token ids (batch, seq_len), or a mapping as for training.

        Returns:
            Logits, (batch, seq_len, vocab_size); undefined for padding.

        Raises:
            DataError: if the mapping has an unknown key, or keys that contradict each other.
            ShapeError: if a tensor has the wrong shape or dtype.
        """
        read = read_batch(batch)
        logits: Tensor = self._built(read.tokens, read.layout)
        return logits

    @property
    def _built(self) -> MoEDecoder:
        if self.network is None:
            raise ConfigError(
                "The network isn't built yet. A Trainer builds it; without one, call"
                " configure_model() first."
            )
        return self.network

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(read_batch(batch))
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        read = read_batch(batch)
        # Weighted by the number of predicted tokens, so that the mean doesn't depend on padding,
        # packing and batching.
        predicted = int((read.targets != IGNORED).sum())
        self.log("val_loss", self._loss(read), sync_dist=True, batch_size=predicted)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return torch.optim.AdamW(
            self.parameters(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            fused=on_gpu or None,  # None leaves the choice to torch
        )

    def _loss(self, batch: TokenBatch) -> Tensor:
        """Mean cross-entropy of the predicted tokens, in nats; 0 if there are none."""
        total: Tensor = self._built(batch.tokens, batch.layout, batch.targets)
        return total / (batch.targets != IGNORED).sum().clamp_min(1)


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
