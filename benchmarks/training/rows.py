"""What is trained how: each row is one way to train the same model on the same batches."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.clock import Clock
from training.shapes import Shape

LR, BETAS, CLIP = 4e-4, (0.9, 0.95), 1.0
LORA_RANK, LORA_ALPHA = 16, 32


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        build: makes the model, in fp32 on the CPU.
        trains: trains it and tells the clock when each step ends.
        fused: whether AdamW is one kernel.
        compiled: whether torch.compile compiles each block.
        fullgraph: whether it traces this package's layers too.
        graphs: whether what it compiles is launched as CUDA graphs, which takes the host less time.
        bf16: whether the weights are bf16; else autocast, or ZeRO's mixed precision.
        expert_parallel: whether experts are sharded over all GPUs; else each GPU has all of them.
        dispatcher: how experts' tokens are exchanged.
        own_loss: whether the model computes the loss, without having all logits at once.
        needs: a module of another package that it imports.
        lr: the learning rate.
        gpus: number of GPUs, each with a process like this one.
    """

    build: Callable[[Shape], nn.Module]
    trains: Callable[[Row, Shape, int, Clock], None]
    fused: bool = True
    compiled: bool = False
    fullgraph: bool = False
    graphs: bool = False
    bf16: bool = False
    expert_parallel: bool = False
    dispatcher: str = "auto"
    own_loss: bool = False
    needs: str | None = None
    lr: float = LR
    gpus: int = 1

    def takes(self, gpus: int) -> bool:
        """Whether it trains on so many GPUs."""
        return self.trains is by_trainer if gpus > 1 else not self.expert_parallel

    def missing(self) -> str | None:
        """What must be installed first, None for nothing."""
        # Looked for, not imported: that would take CUDA from the processes that train.
        if self.needs is None or importlib.util.find_spec(self.needs):
            return None
        return f"not installed: {self.needs}"


# ------------------------------------------------------------------------------------------ models


def ours(shape: Shape) -> nn.Module:
    """This package's decoder."""
    from lightning_fastmoe.huggingface.architecture import Architecture
    from lightning_fastmoe.huggingface.decoder import MoEDecoder

    torch.manual_seed(0)
    return MoEDecoder(Architecture.from_config(shape.config()))


def transformers_model(shape: Shape, experts: str = "grouped_mm") -> nn.Module:
    """The model of transformers, by default with its fastest built-in experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**shape.config(), use_cache=False)
    with device():  # drawing billions of weights on the CPU takes minutes
        model: nn.Module = Qwen3MoeForCausalLM._from_config(
            config, attn_implementation="sdpa", experts_implementation=experts
        )
    return model


def in_place(shape: Shape) -> nn.Module:
    """The model of transformers with this package's experts."""
    import lightning_fastmoe.huggingface  # noqa: F401  registers them

    return transformers_model(shape, "fastmoe")


def in_place_lora(shape: Shape) -> nn.Module:
    """The model of transformers with this package's experts, of which adapters are trained."""
    from lightning_fastmoe.huggingface import add_lora

    model = in_place(shape)
    add_lora(model, LORA_RANK, LORA_ALPHA)
    return model


def in_place_qlora(shape: Shape) -> nn.Module:
    """The same adapters on experts in 4 bits."""
    from lightning_fastmoe.huggingface import add_lora, quantize_experts

    model = in_place(shape).bfloat16()
    quantize_experts(model, "nf4-double")
    add_lora(model, LORA_RANK, LORA_ALPHA)
    if torch.cuda.is_available():  # the weights that are drawn above would not be in memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def peft_lora(shape: Shape) -> nn.Module:
    """The model of transformers with PEFT's adapters on its stacked experts."""
    from peft import LoraConfig, get_peft_model

    projections = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = get_peft_model(
        transformers_model(shape),
        LoraConfig(
            r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=[], target_parameters=projections
        ),
    )
    model: nn.Module = wrapped.get_base_model()
    return model


def liger(shape: Shape) -> nn.Module:
    """The model of transformers with all that Liger has for it: experts, norms, RoPE and loss."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    model = transformers_model(shape)
    apply_liger_kernel_to_qwen3_moe(model=model)
    return model


def with_liger(model: nn.Module) -> nn.Module:
    """Replaces all but a model's experts by Liger's kernels: norms, RoPE and loss."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    apply_liger_kernel_to_qwen3_moe(model=model, swiglu=False)
    return model


def sonicmoe(shape: Shape) -> nn.Module:
    """The model of transformers with SonicMoE's experts, with QuACK's default tiles."""
    from layer.libraries import use_default_tiles
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs
    from transformers.integrations import sonicmoe as integration

    use_default_tiles()
    # transformers downloads these kernels from the Hub. The package of the same name has the same
    # function, which refuses to be traced.
    integration._SONICMOE = integration.SonicMoE(
        ActivationType, torch.compiler.disable(moe_general_routing_inputs)
    )
    return transformers_model(shape, "sonicmoe")


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of either model."""
    yield from model.model.layers  # type: ignore[union-attr, misc]


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(batch, seq_len, V)."""
    found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean cross-entropy of the next token, in fp32."""
    logits = logits_of(model, batch[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def own_loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The same by the model itself, from its hidden states; by this package's without the last."""
    if hasattr(model, "compile_loss"):
        targets = batch[:, 1:-1]
        mean: Tensor = model(batch[:, :-1], targets=targets) / targets.numel()
        return mean
    loss: Tensor = model(batch[:, :-1], shift_labels=batch[:, 1:].contiguous()).loss
    return loss


# ---------------------------------------------------------------------------------------- training


def device() -> torch.device:
    """The GPU; the CPU for a trial of the script."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def optimizer_of(row: Row, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the same settings in all rows."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=row.lr, betas=BETAS, fused=row.fused or None)


def compile_blocks(row: Row, model: nn.Module) -> None:
    """Compiles each block as the row says, when it first runs."""
    for block in blocks(model):
        mode = "reduce-overhead" if row.graphs else None
        block.compile(fullgraph=row.fullgraph, mode=mode)
    if row.own_loss and hasattr(model, "compile_loss"):
        model.compile_loss()  # type: ignore[operator]


def in_a_loop(row: Row, shape: Shape, steps: int, clock: Clock) -> None:
    """A plain loop."""
    model = row.build(shape).to(device())
    if row.bf16:
        model = model.bfloat16()
    if row.compiled:
        compile_blocks(row, model)
    optimizer = optimizer_of(row, model)
    autocast = nullcontext() if row.bf16 else torch.autocast(device().type, torch.bfloat16)
    compute_loss = own_loss_of if row.own_loss else loss_of
    batches = shape.batches(8)
    clock.start()
    for step in range(steps):
        batch = batches[step % len(batches)].to(device(), non_blocking=True)
        with autocast:
            loss = compute_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(loss.detach())


def by_trainer(row: Row, shape: Shape, steps: int, clock: Clock) -> None:
    """``Trainer.fit`` with FastMoEStrategy, or with Lightning's own for models of transformers."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    from lightning_fastmoe import FastMoEStrategy
    from lightning_fastmoe.demos.byte_lm.cli import silence_upstream
    from lightning_fastmoe.nn.expert_layers import expert_layers

    class Model(pl.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "network"):
                self.network = row.build(shape)
                for _, layer in expert_layers(self.network):
                    layer.dispatcher_name = row.dispatcher
                if row.compiled:
                    compile_blocks(row, self.network)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            compute_loss = own_loss_of if row.own_loss else loss_of
            return compute_loss(self.network, batch)

        def configure_optimizers(self) -> Any:
            return optimizer_of(row, self.network)

        def on_train_start(self) -> None:
            clock.start()

        def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
            clock.step(outputs["loss"].detach())

    silence_upstream()
    shards = row.gpus if row.expert_parallel else 1
    strategy: Any = "deepspeed_stage_2"
    if row.build is not transformers_model:
        strategy = FastMoEStrategy(expert_parallel_size=shards, stage=2)
    trainer = pl.Trainer(
        accelerator=device().type,
        devices=row.gpus,
        strategy=strategy,
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # which would shuffle: the same batches in all rows
    )
    batches = shape.batches(8, rank=int(os.environ.get("LOCAL_RANK", 0)))
    endless = [batches[step % len(batches)] for step in range(steps)]
    trainer.fit(Model(), DataLoader(endless, batch_size=None, pin_memory=torch.cuda.is_available()))


ROWS = {
    "strategy": Row(ours, by_trainer),
    "strategy-unfused": Row(ours, by_trainer, fused=False),
    "strategy-compiled": Row(ours, by_trainer, compiled=True),
    "strategy-fullgraph": Row(ours, by_trainer, compiled=True, fullgraph=True),
    "strategy-own-loss": Row(ours, by_trainer, compiled=True, fullgraph=True, own_loss=True),
    "strategy-graphs": Row(ours, by_trainer, compiled=True, fullgraph=True, graphs=True),
    "experts-compiled": Row(ours, by_trainer, compiled=True, expert_parallel=True),
    "experts-fullgraph": Row(ours, by_trainer, compiled=True, fullgraph=True, expert_parallel=True),
    "experts-graphs": Row(
        ours, by_trainer, compiled=True, fullgraph=True, graphs=True, expert_parallel=True
    ),
    "experts-all-to-all": Row(
        ours, by_trainer, compiled=True, expert_parallel=True, dispatcher="all_to_all"
    ),
    "experts-dedup": Row(ours, by_trainer, compiled=True, expert_parallel=True, dispatcher="dedup"),
    "experts-symmetric": Row(
        ours, by_trainer, compiled=True, expert_parallel=True, dispatcher="symmetric"
    ),
    "loop": Row(ours, in_a_loop),
    "loop-compiled": Row(ours, in_a_loop, compiled=True),
    "in-place": Row(in_place, in_a_loop, bf16=True),
    "in-place-compiled": Row(in_place, in_a_loop, bf16=True, compiled=True),
    "in-place-strategy": Row(in_place, by_trainer),
    "in-place-strategy-compiled": Row(in_place, by_trainer, compiled=True),
    "in-place-experts": Row(in_place, by_trainer, expert_parallel=True),
    "in-place-experts-compiled": Row(in_place, by_trainer, compiled=True, expert_parallel=True),
    "in-place-lora": Row(in_place_lora, in_a_loop, bf16=True),
    "in-place-qlora": Row(in_place_qlora, in_a_loop, bf16=True),
    "peft-lora": Row(peft_lora, in_a_loop, bf16=True, needs="peft"),
    "transformers": Row(transformers_model, in_a_loop, bf16=True),
    "transformers-compiled": Row(transformers_model, in_a_loop, bf16=True, compiled=True),
    "transformers-zero2": Row(transformers_model, by_trainer),
    "transformers-liger": Row(liger, in_a_loop, bf16=True, own_loss=True, needs="liger_kernel"),
    "transformers-liger-compiled": Row(
        liger, in_a_loop, bf16=True, compiled=True, own_loss=True, needs="liger_kernel"
    ),
    "transformers-liger-loss": Row(
        lambda shape: with_liger(transformers_model(shape)),
        in_a_loop,
        bf16=True,
        own_loss=True,
        needs="liger_kernel",
    ),
    "in-place-liger-loss": Row(
        lambda shape: with_liger(in_place(shape)),
        in_a_loop,
        bf16=True,
        own_loss=True,
        needs="liger_kernel",
    ),
    "sonicmoe-liger-loss": Row(
        lambda shape: with_liger(sonicmoe(shape)),
        in_a_loop,
        bf16=True,
        own_loss=True,
        needs="sonicmoe",
    ),
    "transformers-sonicmoe": Row(sonicmoe, in_a_loop, bf16=True, needs="sonicmoe"),
    "transformers-sonicmoe-compiled": Row(
        sonicmoe, in_a_loop, bf16=True, compiled=True, needs="sonicmoe"
    ),
}
