"""Training transformers' models with sharded experts, and their twins in one plain process."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from huggingface.experts_classes import experts_classes, make_experts
from strategy.models import Trace
from strategy.tracing import Tracer, make_trainer, whole_weights
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader

from lightning_fastmoe import CoActivationMonitor, ExpertLoadMonitor
from lightning_fastmoe.distributed import schedule
from lightning_fastmoe.errors import FastMoEError
from lightning_fastmoe.huggingface import choose_dispatcher
from lightning_fastmoe.nn.expert_layers import expert_layers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 12,
        "intermediate_size": 20,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "mixtral": {"intermediate_size": 12, "num_local_experts": 4},
    "olmoe": {"intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "attention", "moe"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 12,
        "intermediate_size": 12,
        "moe_latent_size": None,
        "num_hidden_layers": 3,
    },
}
MORE_MODELS: dict[str, dict[str, Any]] = {
    **MODELS,
    "deepseek_v3": {
        "moe_intermediate_size": 12,
        "intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
    },
    "minimax_m2": {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {
        "moe_intermediate_size": 12,
        "intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "full_attention"],
    },
}
"""Those whose files are read and written."""
WITH_AUXILIARY_LOSS = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")
ROWS, TOKENS = 2, 7
RELATIVE = 1e-5


@dataclass(frozen=True)
class Run:
    """One training run that must come out the same on any topology."""

    name: str = "qwen3_moe"
    world: int = 2
    ep: Any = 2
    stage: int = 2
    accumulate: int = 1
    dispatcher: str = "auto"
    padded: bool = True
    auxiliary: bool = False
    checkpointing: bool = False
    compiled: bool = False
    fullgraph: bool = False
    in_configure_model: bool = False
    steps: int = 3
    clip: float = 0.05
    precision: str = "32-true"
    accelerator: str = "cpu"
    nodes: int = 1
    shared_gpu: bool = False
    batches_per_epoch: int = 0
    epochs: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)


def make_model(run: Run, implementation: str = "fastmoe", **sizes: Any) -> Any:
    """The same weights in any implementation."""
    torch.manual_seed(5)
    options: dict[str, Any] = {**SIZES, **MORE_MODELS[run.name], **run.sizes, **sizes}
    if run.auxiliary:
        options |= {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    config = transformers.AutoConfig.for_model(run.name, **options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )
    with torch.no_grad():  # biases too, which transformers leaves at zero
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.2)
    if run.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_batches(run: Run) -> list[list[list[dict[str, Tensor]]]]:
    """Step -> micro-batch -> rank -> batch; rows are padded to different lengths."""
    generator = torch.Generator().manual_seed(6)

    def batch() -> dict[str, Tensor]:
        ids = torch.randint(3, SIZES["vocab_size"], (ROWS, TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        if run.padded:
            mask[0, int(torch.randint(3, TOKENS, (), generator=generator)) :] = 0
        return {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }

    return [
        [[batch() for _ in range(run.world)] for _ in range(run.accumulate)]
        for _ in range(run.steps)
    ]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)


def reference(run: Run, model: Any = None) -> Trace:
    """One process and transformers' own experts; the mean of the micro-batches' losses."""
    model = (model or make_model(run, "eager")).train()
    optimizer = make_optimizer(model)
    trace = Trace()
    for step in make_batches(run):
        optimizer.zero_grad()
        chunks = [batch for micro in step for batch in micro]
        losses = [model(**chunk, use_cache=False).loss for chunk in chunks]
        mean = torch.stack(losses).mean()
        mean.backward()
        trace.losses.append(mean.item())
        if not trace.gradients:
            trace.gradients = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }
        trace.norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), run.clip)))
        optimizer.step()
        trace.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return trace


class Tuned(pl.LightningModule):
    """A model of transformers as a user would fine-tune it."""

    def __init__(self, run: Run | None = None) -> None:
        super().__init__()
        self.run = run or Run()
        self.losses: list[float] = []
        self.graphs = 0
        self.net: Any = None if self.run.in_configure_model else make_model(self.run)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_model(self.run)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.run.compiled and not self.graphs:
            run = self.run
            # Later versions of transformers than 5.17 checkpoint inside of what is compiled here,
            # and a graph breaks at a checkpoint with a layer in it.
            whole = run.fullgraph and not run.checkpointing
            for part in self.net.model.layers if run.fullgraph else [self.net]:
                part.compile(backend=self._count, fullgraph=whole)
        loss: Tensor = self.net(**batch, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def _count(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, inputs) if self.run.fullgraph else graph.forward

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.net(**batch, use_cache=False).loss
        self.log("val_loss", loss, sync_dist=True, batch_size=1)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.net)

    def train_dataloader(self) -> Any:
        rank = self.trainer.global_rank
        own = [micro[rank] for step in make_batches(self.run) for micro in step]
        return DataLoader(own, batch_size=None)


def train(run: Run, *callbacks: pl.Callback) -> tuple[Trace, pl.Trainer, Tuned]:
    """Trains on this rank."""
    module, tracer = Tuned(run), Tracer()
    if run.dispatcher != "auto":
        choose_dispatcher(module, run.dispatcher)
    trainer = make_trainer(run, callbacks=[tracer, *callbacks])
    trainer.fit(module)
    trace = tracer.trace
    device = trainer.strategy.root_device
    own = torch.tensor(module.losses, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(own)
    means = own / run.world
    trace.losses = [float(step.mean()) for step in means.split(run.accumulate)]
    trace.gradients = {name: g.cpu() for name, g in trace.gradients.items()}
    trace.weights = [{name: w.cpu() for name, w in step.items()} for step in trace.weights]
    return trace, trainer, module


def run_case(run: Run) -> Trace:
    torch._dynamo.reset()
    trace, trainer, module = train(run)
    layers = dict(expert_layers(module))
    moe = [name for name, _ in module.named_modules() if name.endswith(".experts")]
    assert moe
    assert bool(module.graphs) == run.compiled
    assert list(layers) == [name.removesuffix(".experts") for name in moe]
    mesh = trainer.strategy.expert_mesh
    assert mesh.ep_size == (run.world if run.ep == "auto" else run.ep)
    for layer in layers.values():
        assert layer.experts.local_ids == tuple(mesh.local_experts(layer.num_experts))
        assert layer.module.num_experts == layer.num_experts
        for parameter in layer.experts.parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            assert shape[0] == layer.num_experts // mesh.ep_size
    return trace


def run_case_and_count(run: Run) -> tuple[Trace, int]:
    """The trace, and the number of graphs that were compiled: for steps, and for validation."""
    torch._dynamo.reset()
    trace, _, module = train(run)
    return trace, module.graphs


def run_case_by(dispatcher: str, run: Run) -> Trace:
    """As :func:`run_case`, and the schedule of that name was made for each layer."""
    made = []
    real = schedule.ACROSS_RANKS[dispatcher]
    schedule.ACROSS_RANKS[dispatcher] = lambda *args: made.append(dispatcher) or real(*args)
    try:
        trace = run_case(run)
    finally:
        schedule.ACROSS_RANKS[dispatcher] = real
    assert len(made) == 2
    return trace


class EpochPerStep(Tuned):
    """One optimizer step per epoch, so that a run resumes on any number of ranks."""

    def train_dataloader(self) -> Any:
        step = make_batches(self.run)[self.trainer.current_epoch]
        return DataLoader([micro[self.trainer.global_rank] for micro in step], batch_size=None)


class WeightsByEpoch(pl.Callback):
    """Notes the weights after each epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(whole_weights(pl_module.net))


def fit_epochs(
    run: Run, epochs: int, save_to: Path, resume_from: Path | None = None
) -> list[dict[str, Tensor]]:
    """Trains up to so many steps, and saves."""
    module, tracer = EpochPerStep(run), WeightsByEpoch()
    trainer = make_trainer(
        run,
        callbacks=[tracer],
        max_steps=-1,
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, ckpt_path=resume_from)
    trainer.save_checkpoint(save_to)
    return tracer.weights


def refuses_save_pretrained(run: Run, folder: Path) -> list[str]:
    """What a sharded model, and then one on a single rank's terms, says to being used otherwise."""
    _, trainer, module = train(run)
    said = []
    ids = torch.full((1, 4), 5)

    def eager() -> Any:
        module.net.set_experts_implementation("eager")
        return module.net(ids)

    for use in (
        lambda: module.net.save_pretrained(folder),
        vars(module.net)["push_to_hub"],  # not by getattr: its own one would use the network
        lambda: module.net(ids),  # after the run
        eager,
    ):
        try:
            use()
        except FastMoEError as error:
            said.append(f"{type(error).__name__}: {error}")
    assert not folder.exists()
    return said


def warnings_in_evaluation_mode(run: Run) -> list[str]:
    """What training warns of if the model is in evaluation mode, as from_pretrained() leaves it."""
    module = Tuned(run)
    module.net.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(run).fit(module)
    return [str(warning.message) for warning in caught]


def saved_partitioned(run: Run, folder: Path) -> str:
    """What a model of which ZeRO 3 has partitioned weights says to ``save_pretrained``."""
    _, _, module = train(run)
    assert any(p.numel() == 0 for p in module.net.parameters())
    try:
        module.net.save_pretrained(folder)
    except FastMoEError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def validated(run: Run) -> float:
    """The mean loss in evaluation, of weights that were not trained."""
    (logged,) = make_trainer(run).validate(Tuned(run), verbose=False)
    return float(logged["val_loss"])


def outcome_of(run: Run, implementation: str = "fastmoe", **sizes: Any) -> str:
    """The error of a run whose model uses ``implementation`` and other sizes; "" if it trains."""
    module = Tuned(run)
    module.net = make_model(run, implementation, **sizes)
    try:
        make_trainer(run).fit(module)
    except FastMoEError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outcome_of_unnamed(run: Run) -> str:
    """As :func:`outcome_of`, of a model whose only experts are not called so."""
    module = Tuned(run)
    module.net = nn.ModuleDict({"mine": make_experts(experts_classes()["Qwen3MoeExperts"])})
    try:
        make_trainer(run).fit(module)
    except FastMoEError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Poison(pl.Callback):
    """Makes the router of the second layer give NaN on rank 1, in the second batch."""

    def __init__(self) -> None:
        self.factor = torch.ones(())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Before the first compiled pass, or its graph would not have it.
        pl_module.net.model.layers[1].mlp.gate.register_forward_hook(
            lambda module, args, out: (out[0] * self.factor, out[1] * self.factor, out[2])
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if index == 1 and trainer.global_rank == 1:
            self.factor.fill_(torch.nan)


def poisoned(run: Run) -> str:
    try:
        make_trainer(run, callbacks=[Poison()]).fit(Tuned(run))
    except FastMoEError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Generate(pl.Callback):
    """Continues a prompt on rank 0, between two steps."""

    def __init__(self) -> None:
        self.found: Any = None
        self.tokens: list[int] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            self.weights = whole_weights(pl_module.net)
            handles = [
                layer.module.register_forward_pre_hook(self._note)
                for _, layer in expert_layers(pl_module)
            ]
            generate = partial(pl_module.net.generate, max_new_tokens=5, do_sample=False)
            self.found = trainer.strategy.on_rank_zero(generate, PROMPT)
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: Any) -> None:
        self.tokens.append(len(args[0]))


PROMPT = torch.tensor([[5, 9, 33], [4, 17, 8]])


def generated(run: Run) -> tuple[Trace, Any, dict[str, Tensor], list[int]]:
    """The trace, what was generated from which weights, and the tokens of each layer's pass."""
    generate = Generate()
    trace, _, _ = train(run, generate)
    return trace, generate.found, generate.weights, generate.tokens


def fits_again(run: Run) -> tuple[dict[str, Tensor], float, str]:
    """Weights after a fit, the mean loss with which another begins, and a third on other terms."""
    trace, _, module = train(run)
    module.losses.clear()
    make_trainer(run).fit(module)
    first = torch.tensor(module.losses[0], dtype=torch.float64)
    torch.distributed.all_reduce(first)
    try:
        make_trainer(replace(run, ep=1)).fit(module)
    except FastMoEError as error:
        return trace.weights[-1], float(first) / run.world, f"{type(error).__name__}: {error}"
    return trace.weights[-1], float(first) / run.world, ""


def monitored(run: Run, folder: Path) -> dict[str, float]:
    """Logs the experts' loads and co-activation; returns what was logged last."""
    module = Tuned(run)
    monitors = [ExpertLoadMonitor(1, folder=str(folder)), CoActivationMonitor(1, str(folder))]
    trainer = make_trainer(run, callbacks=monitors)
    trainer.fit(module)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def chosen_experts(run: Run) -> dict[str, list[Tensor]]:
    """Layer -> (T, K) ids of each batch of the first step, in one plain process."""
    model = make_model(replace(run, checkpointing=False), "eager").train()
    seen: dict[str, list[Tensor]] = {}
    for name, part in model.named_modules():
        if name.endswith(".experts"):

            def note(part: nn.Module, args: Any, name: str = name) -> None:
                seen.setdefault(f"net.{name.removesuffix('.experts')}", []).append(args[1])

            part.register_forward_pre_hook(note)
    for batch in (batch for micro in make_batches(run)[0] for batch in micro):
        model(**batch, use_cache=False)
    return seen


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    scale = expected.abs().max().clamp_min(1e-12)
    error = float((actual - expected).abs().max() / scale)
    assert error <= RELATIVE, f"{what}: relative error {error:.2e}"


def assert_same(actual: Trace, expected: Trace) -> None:
    for what in ("losses", "norms"):
        pairs = zip(getattr(actual, what), getattr(expected, what), strict=True)
        for i, (a, e) in enumerate(pairs):
            assert abs(a - e) <= RELATIVE * abs(e), f"{what} of step {i}: {a} != {e}"
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(actual.gradients[name], gradient, f"gradient of {name}")
    assert len(actual.weights) == len(expected.weights)
    for i, (own, twin) in enumerate(zip(actual.weights, expected.weights, strict=True)):
        assert own.keys() == twin.keys()
        for name, weight in twin.items():
            assert_close(own[name], weight, f"{name} after step {i}")
