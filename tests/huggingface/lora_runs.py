"""What the ranks run in test_lora.py: training adapters of experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from huggingface.sharding_runs import (
    EpochPerStep,
    Run,
    WeightsByEpoch,
    make_batches,
    make_model,
)
from strategy.tracing import make_trainer
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError, FastMoEError
from lightning_fastmoe.huggingface import add_lora, save_adapters, save_pretrained

RANK, ALPHA = 4, 6.0


def adapted(run: Run) -> Any:
    """The model with its adapters, of which B isn't zero, so that all gradients matter."""
    return adapt(make_model(run))


def adapt(model: Any) -> Any:
    """Adds the same adapters, whatever the model's base."""
    torch.manual_seed(11)
    add_lora(model, RANK, ALPHA, also_train=["lm_head.weight"])
    torch.manual_seed(12)
    for name, parameter in model.named_parameters():
        if name.endswith("_lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted_by_peft_too(run: Run) -> Any:
    """The model with adapters on linear layers, of other ranks and scales, and on experts."""
    from peft import LoraConfig, get_peft_model

    model = make_model(run)
    torch.manual_seed(11)
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "layers.1.self_attn.v_proj"],
        rank_pattern={"q_proj": RANK},
        alpha_pattern={"q_proj": ALPHA},
    )
    model = get_peft_model(model, config)
    add_lora(model, RANK, ALPHA)
    torch.manual_seed(12)
    for name, parameter in model.named_parameters():
        if name.endswith(("_lora_b", "lora_B.default.weight")):
            nn.init.normal_(parameter, std=0.1)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.1)


class Adapted(EpochPerStep):
    """Fine-tunes the adapters, a step per epoch."""

    def __init__(self, run: Run | None = None) -> None:
        super().__init__(run)
        self.net = adapted(self.run)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.net)


def reference(run: Run, model: Any = None) -> list[dict[str, Tensor]]:
    """The weights after each step of one plain process."""
    model = (model or adapted(run)).train()
    optimizer = make_optimizer(model)
    weights = []
    for step in make_batches(run):
        optimizer.zero_grad()
        losses = [model(**batch, use_cache=False).loss for micro in step for batch in micro]
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], run.clip)
        optimizer.step()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return weights


def fits(
    run: Run,
    epochs: int,
    save_to: Path,
    resume_from: Path | None = None,
    export: bool = False,
    make: Callable[[Run], pl.LightningModule] = Adapted,
) -> list[dict[str, Tensor]]:
    """Trains up to so many steps, and saves a checkpoint, or files for transformers as well."""
    module, weights = make(run), WeightsByEpoch()
    trainer = make_trainer(
        run,
        callbacks=[weights],
        max_steps=-1,
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, ckpt_path=resume_from)
    trainer.save_checkpoint(save_to)
    if export:
        save_pretrained(trainer, save_to.with_suffix(".model"))
        with pytest.raises(ConfigError, match=r"1 other trained parameters \(lm_head.weight"):
            save_adapters(trainer, save_to.with_suffix(".peft"))
    return weights.weights


def saves_adapters(run: Run, folder: Path) -> dict[str, Tensor]:
    """Trains nothing but adapters, writes them, and returns the weights."""
    module, weights = Adapted(run), WeightsByEpoch()
    module.net.lm_head.weight.requires_grad_(False)
    trainer = make_trainer(run, callbacks=[weights], max_steps=-1, max_epochs=1)
    trainer.fit(module)
    save_adapters(trainer, folder, base_model="some/model")
    with pytest.raises(ConfigError, match="exists already"):
        save_adapters(trainer, folder)
    return weights.weights[0]


class AdaptedByPeftToo(Adapted):
    """Fine-tunes adapters of experts and of linear layers."""

    def __init__(self, run: Run) -> None:
        EpochPerStep.__init__(self, run)
        self.net = adapted_by_peft_too(self.run)


def saves_adapters_of_both(run: Run, folder: Path) -> dict[str, Tensor]:
    """Trains, writes the adapters and the merged model, and returns the weights."""
    module, weights = AdaptedByPeftToo(run), WeightsByEpoch()
    trainer = make_trainer(run, callbacks=[weights], max_steps=-1, max_epochs=1)
    trainer.fit(module)
    save_adapters(trainer, folder / "adapters")
    save_pretrained(trainer, folder / "merged")
    trainer.save_checkpoint(folder / "last.ckpt")
    return weights.weights[0]


class AdaptedAs(Adapted):
    """Fine-tunes adapters of experts and what a configuration of PEFT trains."""

    def __init__(self, run: Run, options: dict[str, Any]) -> None:
        from peft import LoraConfig, get_peft_model

        EpochPerStep.__init__(self, run)
        self.net = get_peft_model(make_model(run), LoraConfig(r=RANK, lora_alpha=ALPHA, **options))
        torch.manual_seed(11)
        add_lora(self.net, RANK, ALPHA)


class AdaptedByPeftAlone(Adapted):
    """Fine-tunes adapters of attention; the experts, sharded, have none."""

    def __init__(self, run: Run) -> None:
        EpochPerStep.__init__(self, run)
        self.net = adapted_by_peft_alone(self.run)


def adapted_by_peft_alone(run: Run) -> Any:
    """Two of PEFT's adapters per layer, of two ranks, with values."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "o_proj"]
    options = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, rank_pattern={"o_proj": 1}
    )
    model = get_peft_model(make_model(run), options)
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def saves_adapters_of_attention(run: Run, folder: Path) -> dict[str, Tensor]:
    """Trains, writes the adapters, and returns the weights."""
    module, weights = AdaptedByPeftAlone(run), WeightsByEpoch()
    trainer = make_trainer(run, callbacks=[weights], max_steps=-1, max_epochs=1)
    trainer.fit(module)
    save_adapters(trainer, folder / "adapters")
    with pytest.raises(FastMoEError, match=r"save_adapters\(trainer,"):
        module.net.save_pretrained(folder / "theirs")
    return weights.weights[0]


def saves_by_configuration(
    run: Run, folder: Path, options: dict[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights after training, and what the two ways to save them have refused."""
    module, weights = AdaptedAs(run, options), WeightsByEpoch()
    trainer = make_trainer(run, callbacks=[weights], max_steps=-1, max_epochs=1)
    trainer.fit(module)
    refused = []
    for save, name in ((save_adapters, "adapters"), (save_pretrained, "merged")):
        try:
            save(trainer, folder / name)
        except ConfigError as error:
            refused.append(f"{name}: {error}")
    return weights.weights[0], refused


class WithHeads(Adapted):
    """Trains heads beside the model, one of them frozen, one tied to a parameter of the model."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.net.lm_head.weight.requires_grad_(False)
        self.value_head, self.frozen_head = nn.Linear(32, 1), nn.Linear(32, 1).requires_grad_(False)
        self.net.model.norm.weight.requires_grad_(False)
        self.tied = self.net.lm_head

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.value_head.weight.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self)


def saves_beside_heads(run: Run, folder: Path) -> list[str]:
    """The warnings of both ways to save."""
    trainer = make_trainer(run, max_steps=1)
    trainer.fit(WithHeads(run))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_adapters(trainer, folder / "adapters")
        save_pretrained(trainer, folder / "whole")
    return [str(one.message) for one in caught if "also trained" in str(one.message)]


def parameters_adapted_by_peft(run: Run, implementation: str = "fastmoe") -> Any:
    """PEFT's adapters of the stacked parameters themselves, with values."""
    from peft import LoraConfig, get_peft_model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=targets)
    torch.manual_seed(11)
    model = get_peft_model(make_model(run, implementation), options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


class ParametersAdaptedByPeft(Adapted):
    """Fine-tunes them."""

    def __init__(self, run: Run) -> None:
        EpochPerStep.__init__(self, run)
        self.net = parameters_adapted_by_peft(self.run)


def fits_parameters(run: Run, save_to: Path) -> list[dict[str, Tensor]] | str:
    """The weights after each step, or the error."""
    try:
        return fits(run, run.steps, save_to, make=ParametersAdaptedByPeft)
    except ConfigError as error:
        return str(error)
