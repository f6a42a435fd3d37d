"""A mixture-of-experts language model with random weights, for pretraining on token files."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from typing_extensions import override

from lightning_fastmoe.demos.compilation import is_compiled
from lightning_fastmoe.demos.optimization import adamw_with_cosine
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.architecture import Architecture
from lightning_fastmoe.huggingface.causal_lm import MoECausalLM
from lightning_fastmoe.nn.compilation import check_cuda_graphs
from lightning_fastmoe.planning.sizes import model_size
from lightning_fastmoe.planning.units import count_text

VOCABULARY_MULTIPLE = 64
"""The data's vocabulary is rounded up to it, for the GEMM of the output layer."""


class TokenLM(MoECausalLM):
    """A language model with the architecture of Qwen3-MoE, and how it is pretrained.

    Its checkpoints become models for transformers with `lightning-fastmoe checkpoint export`.

    Args:
        d_model: Width of the residual stream.
        num_layers: Number of blocks, each attention + mixture of experts.
        num_heads: Attention heads; `d_model` must be an even multiple of it.
        num_kv_heads: Heads of keys and values, each for `num_heads / num_kv_heads` queries; null
            is `num_heads`.
        d_ffn: Inner width of one expert.
        num_experts: Experts per layer, over all processes.
        top_k: Experts per token.
        vocab_size: Rows of the embedding; null takes the vocabulary of the data, rounded up to a
            multiple of 64.
        rope_theta: Base of the rotary positions; longer contexts need a larger one.
        load_balancing: Weight of the load-balancing loss.
        z_loss: Weight of the loss that keeps router logits small.
        lr: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of `lr`.
        warmup_steps: Steps over which the learning rate rises from 0; a cosine follows.
        weight_decay: AdamW's weight decay for matrices (not for embeddings and norms).
        betas: AdamW's decay rates of the averages of the gradient and of its square.
        init_std: Standard deviation of the initial weights.
        compile: Whether `torch.compile` compiles each block, which takes some ten seconds in the
            first step; null compiles them on CUDA.
        cuda_graphs: Whether compiled blocks are launched as CUDA graphs, which takes the host less
            time: worth it with sharded experts. All batches should have one shape.

    Raises:
        ConfigError: if the sizes don't fit together, or neither `vocab_size` nor the data says
            how large the vocabulary is.
    """

    def __init__(
        self,
        d_model: int = 512,
        num_layers: int = 8,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        d_ffn: int = 512,
        num_experts: int = 16,
        top_k: int = 2,
        vocab_size: int | None = None,
        rope_theta: float = 10_000.0,
        load_balancing: float = 0.01,
        z_loss: float = 0.001,
        lr: float = 4e-4,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        init_std: float = 0.02,
        compile: bool | None = None,  # noqa: A002  named in config files
        cuda_graphs: bool = False,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(d_model, num_heads, kv_heads)
        config = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": d_model,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": d_model // num_heads,
            "moe_intermediate_size": d_ffn,
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": True,
            "rope_theta": rope_theta,
            "initializer_range": init_std,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        }
        if vocab_size is not None:
            config["vocab_size"] = vocab_size
        super().__init__(
            config=config,
            lr=lr,
            weight_decay=weight_decay,
            load_balancing=load_balancing,
            z_loss=z_loss,
        )
        self.save_hyperparameters()
        check_cuda_graphs(cuda_graphs, compile)
        self._wants_compiled, self._cuda_graphs = compile, cuda_graphs
        self.vocab_size = vocab_size
        self.min_lr_ratio, self.warmup_steps, self.betas = min_lr_ratio, warmup_steps, betas

    @override
    def setup(self, stage: str) -> None:
        # The data module is set up before the model is, and the network is built after.
        if self.vocab_size is None:
            data = getattr(self.trainer, "datamodule", None)
            self._set_vocabulary(getattr(data, "vocab_size", None), getattr(data, "eos_id", None))

    def _set_vocabulary(self, size: int | None, eos_id: int | None) -> None:
        if size is None:
            raise ConfigError(
                "model.vocab_size is not given, and the data does not say how many tokens there"
                " are: give it, or train on TokenFiles."
            )
        self.vocab_size = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        # The end of text is not used in training: it tells an exported model where to stop.
        self.config = {**self.config, "vocab_size": self.vocab_size, "eos_token_id": eos_id}
        self.architecture = Architecture.from_config(self.config)
        # Checkpoints say what they hold.
        self.save_hyperparameters({"config": self.config, "vocab_size": self.vocab_size})

    @override
    def configure_model(self) -> None:
        is_new = self.network is None
        if self.vocab_size is None:  # without a Trainer
            self._set_vocabulary(None, None)
        self._compiles = is_compiled(self, self._wants_compiled)
        super().configure_model()
        if is_new:
            assert self.network is not None
            size = model_size(self.network)  # all ranks, as it counts the experts of all
            rank_zero_info(
                f"Model: {count_text(size.total)} parameters, {count_text(size.active)} used per"
                f" token; a vocabulary of {self.vocab_size:,}."
            )

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:  # type: ignore[override]
        return adamw_with_cosine(
            self,
            lr=self.lr,
            min_lr_ratio=self.min_lr_ratio,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=self.betas,
        )


def _check_sizes(d_model: int, num_heads: int, num_kv_heads: int) -> None:
    if d_model % (2 * num_heads):
        raise ConfigError(
            f"model.d_model is {d_model} and model.num_heads is {num_heads}; d_model must be a"
            " multiple of 2 * num_heads, because rotary positions rotate pairs of each head's"
            " dimensions. Change either."
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads is {num_kv_heads}; it must divide model.num_heads, {num_heads}."
        )
