"""Files of Lightning, torch and safetensors load into any topology."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from strategy.models import Case
from strategy.reshard_runs import Divided, Layout
from strategy.resume_runs import error_of, trainer_for
from strategy.tracing import whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE

STEPS, SAVED = 6, 3
ONE = Layout(1, 1, 1)


def write_files(directory: str) -> tuple[list[float], dict[str, Tensor]]:
    """Trains by Lightning alone on one process; writes its checkpoint and state dicts on the way.

    Returns:
        (losses, weights at the end)
    """
    target = Path(directory)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == SAVED:
                trainer.save_checkpoint(target / "lightning.ckpt")
                weights = pl_module.state_dict()
                torch.save(weights, target / "state_dict.pt")
                save_file(weights, target / "model.safetensors")

    pl.seed_everything(7, verbose=False)
    module = Divided(ONE.case())
    trainer = trainer_for(
        ONE.case(), STEPS, strategy="auto", callbacks=[Save()], gradient_clip_val=0.05
    )
    trainer.fit(module)
    return module.batch_losses, copy.deepcopy(module.state_dict())


def resume(layout: Layout, path: str) -> tuple[list[float], dict[str, Tensor]]:
    """Goes on from Lightning's own checkpoint."""
    pl.seed_everything(8, verbose=False)
    module = Divided(layout.case())
    trainer = trainer_for(layout.case(), STEPS)
    trainer.fit(module, ckpt_path=path)
    return module.batch_losses, whole_weights(module.net)


class Keep(pl.Callback):
    """The weights while the model is sharded."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = whole_weights(pl_module.net)


def load(layout: Layout, path: str) -> dict[str, Tensor]:
    """The whole weights of a model into which a file was loaded for validation."""
    pl.seed_everything(9, verbose=False)
    keep = Keep()
    case: Case = layout.case()
    trainer = trainer_for(case, 1, limit_val_batches=1, callbacks=[keep])
    trainer.validate(Divided(case), ckpt_path=path, verbose=False)
    return keep.weights


def refusals(layout: Layout, paths: list[str]) -> list[tuple[str, str]]:
    """Errors of resuming from files that don't allow it."""
    return [
        error_of(trainer_for(layout.case(), STEPS).fit, Divided(layout.case()), ckpt_path=path)
        for path in paths
    ]


# ------------------------------------------------------------------------------ DeepSpeed's own MoE

D, F, E = 6, 10, 4


class FeedForward(nn.Module):
    """An expert as users of DeepSpeed write it."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=not gated)
        self.down_proj = nn.Linear(F, D, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


def write_deepspeed(directory: str, gated: bool) -> dict[str, Tensor]:
    """Saves a model with DeepSpeed's MoE layer by its engine; its weights as ours are called."""
    import deepspeed
    from deepspeed.moe.layer import MoE as DeepSpeedMoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from lightning_fastmoe.zero.config import select_accelerator

    select_accelerator(torch.device("cpu"))
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    net = nn.ModuleDict({"embed": nn.Linear(D, D)})
    net["moe"] = DeepSpeedMoE(D, FeedForward(gated), num_experts=E, ep_size=2, k=1)
    for i, expert in enumerate(net["moe"].deepspeed_moe.experts.deepspeed_experts):
        generator = torch.Generator().manual_seed(10 * rank + i)
        for parameter in expert.parameters():
            nn.init.normal_(parameter, generator=generator)
    groups = [{"params": list(net.parameters()), "name": "all"}]
    groups = split_params_into_different_moe_groups_for_optimizer(groups)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        args=argparse.Namespace(device_rank=rank),
        model=nn.ModuleDict({"net": net}),
        optimizer=torch.optim.AdamW(groups, lr=0.1),
        config=config,
    )
    engine.save_checkpoint(directory, tag="step_7")
    return _ours(net, gated)


def _ours(net: nn.ModuleDict, gated: bool) -> dict[str, Tensor]:
    moe = net["moe"].deepspeed_moe
    ups = ["gate_proj", "up_proj"] if gated else ["up_proj"]
    own = {
        "up_proj": [torch.cat([e.get_submodule(n).weight for n in ups]) for e in _experts(moe)],
        "down_proj": [e.down_proj.weight for e in _experts(moe)],
    }
    if not gated:
        own["up_bias"] = [e.up_proj.bias for e in _experts(moe)]
        own["down_bias"] = [e.down_proj.bias for e in _experts(moe)]
    whole = {
        "embed.weight": net["embed"].weight,
        "embed.bias": net["embed"].bias,
        "moe.router.weight": moe.gate.wg.weight,
    }
    for name, values in own.items():
        stacked = torch.stack(values).detach()
        parts = [torch.empty_like(stacked) for _ in range(2)]
        dist.all_gather(parts, stacked)
        whole[f"moe.experts.{name}"] = torch.cat(parts)
    return {name: value.detach().clone() for name, value in whole.items()}


def _experts(moe: Any) -> Any:
    return moe.experts.deepspeed_experts


class Ported(Divided):
    """The same model with our layer in the place of DeepSpeed's."""

    def __init__(self, case: Case, gated: bool) -> None:
        pl.LightningModule.__init__(self)
        self.case = case
        moe = MoE(D, F, E, 1, activation="swiglu" if gated else "relu", bias=not gated)
        self.net = nn.ModuleDict({"embed": nn.Linear(D, D), "moe": moe})

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net["moe"](self.net["embed"](batch))


def load_deepspeed(layout: Layout, path: str, gated: bool) -> dict[str, Tensor]:
    """The whole weights after loading DeepSpeed's checkpoint."""
    pl.seed_everything(9, verbose=False)
    keep = Keep()
    case = layout.case()
    trainer = trainer_for(case, 1, limit_val_batches=1, callbacks=[keep])
    trainer.validate(Ported(case, gated), ckpt_path=path, verbose=False)
    return keep.weights


@pytest.fixture(scope="module")
def files(rank_pool, tmp_path_factory):
    """(directory, losses, weights at the end) of a run by Lightning alone."""
    directory = tmp_path_factory.mktemp("foreign")
    ((losses, weights),) = rank_pool.run(write_files, 1, str(directory))
    return directory, losses, weights


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(2, 2, 2), Layout(4, 2, 3)], ids=str)
def test_lightnings_checkpoint_resumes(rank_pool, files, layout):
    directory, losses, expected = files
    path = str(directory / "lightning.ckpt")
    results = rank_pool.run(resume, layout.world, layout, path)
    means = [sum(step) / len(step) for step in zip(*(r[0] for r in results), strict=True)]
    assert means == pytest.approx(losses[SAVED:], rel=1e-6)
    for _, weights in results:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[f"net.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lightning.ckpt", "state_dict.pt", "model.safetensors"])
@pytest.mark.parametrize("layout", [Layout(2, 2, 2), Layout(2, 2, 3)], ids=str)
def test_weights_load_bit_by_bit(rank_pool, files, layout, name):
    directory = files[0]
    expected = torch.load(directory / "state_dict.pt", weights_only=True)
    for weights in rank_pool.run(load, layout.world, layout, str(directory / name)):
        for key, weight in weights.items():
            assert torch.equal(weight, expected[f"net.{key}"]), key


@pytest.mark.parametrize("gated", [False, True])
def test_deepspeeds_own_moe_checkpoint_loads(rank_pool, tmp_path, gated):
    """Written by DeepSpeed's engine on two ranks with half of the experts each."""
    outputs = rank_pool.run(write_deepspeed, 2, str(tmp_path), gated)
    for layout in (Layout(2, 2, 2), Layout(2, 1, 3), Layout(1, 1, 1)):
        loaded = rank_pool.run(load_deepspeed, layout.world, layout, str(tmp_path), gated)
        for weights in loaded:
            assert weights.keys() == outputs[0].keys()
            for name, weight in weights.items():
                assert torch.equal(weight, outputs[0][name]), name


def test_what_does_not_allow_to_resume_is_refused(rank_pool, files, tmp_path):
    directory: Path = files[0]
    half = torch.load(directory / "lightning.ckpt", weights_only=True)
    name = "net.moes.1.experts.up_proj"
    half["state_dict"][name] = half["state_dict"][name][:4]
    torch.save(half, tmp_path / "half.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((directory / "lightning.ckpt").read_bytes()[:-500])
    torch.save([1], tmp_path / "list.ckpt")
    paths = [tmp_path / n for n in ("half.ckpt", "cut.ckpt", "list.ckpt")]
    paths += [directory / "state_dict.pt", directory / "model.safetensors"]
    words = [
        r"state 'exp_avg' of 'net.moes.1.experts.up_proj' has the shape \[8,.*parameter has \[4,",
        "cut.ckpt",
        "holds a list",
        "saved with weights only",
        "saved with weights only",
    ]
    layout = Layout(2, 2, 2)
    for errors in rank_pool.run(refusals, 2, layout, [str(p) for p in paths]):
        for (kind, message), pattern in zip(errors, words, strict=True):
            assert kind == "CheckpointError", pattern
            with pytest.raises(RuntimeError, match=pattern):
                raise RuntimeError(message)
