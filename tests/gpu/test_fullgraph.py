"""A layer inside the graph of torch.compile(..., fullgraph=True) on the GPU: the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from gpu.closeness import host_never_waits
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager
from torch.utils.data import DataLoader

from lightning_fastmoe import FastMoEStrategy, MoE
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import compile_blocks
from lightning_fastmoe.nn.nonfinite import take_largest

D = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "activation": "gelu"},
    "sigmoid": {"router": "sigmoid", "router_options": {"balance_bias": True}},
    "capacity": {"capacity_factor": 0.8},
    "shared": {"shared_expert": 32, "shared_expert_gate": True},
}


class Block(nn.Module):
    def __init__(self, **moe: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.moe = MoE(D, 96, 8, **{"top_k": 2, "load_balancing": 0.3, "z_loss": 0.2, **moe})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def pair(dtype: torch.dtype, **moe: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """A model of two blocks, and a copy whose blocks are compiled."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    eager = nn.Sequential(*(Block(**moe) for _ in range(2))).to("cuda", dtype)
    compiled = copy.deepcopy(eager)
    for block in compiled:
        block.compile(fullgraph=True)
    return eager, compiled


def run(model: nn.Sequential, x: Tensor, scale: float = 4.0) -> Tensor:
    """A pass and its gradients, with a loss that is scaled after it was watched."""
    y: Tensor = model(x)
    loss = y.float().square().mean()
    for block in model:
        block.moe.loss_scale.watch(loss)
    (loss * scale).backward()
    return y


def errors(found: nn.Module, exact: nn.Module) -> list[float]:
    """Of each parameter's gradient, norm of the difference over norm."""
    pairs = zip(found.parameters(), exact.parameters(), strict=True)
    return [float((p.grad.double() - q.grad).norm() / q.grad.norm()) for p, q in pairs]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_numbers_are_those_of_the_plain_layer(name: str) -> None:
    """In fp32, forward and all gradients; the attached losses follow the loss's scale."""
    eager, compiled = pair(torch.float32, **SETTINGS[name])
    for scale in (4.0, 0.25):
        x = torch.randn(3, 50, D, device="cuda", requires_grad=True)
        for model in (eager, compiled):
            model.zero_grad()
        got, want = run(compiled, x, scale), run(eager, x, scale)
        assert float((got - want).detach().norm()) <= 2e-6 * float(want.detach().norm())
        assert max(errors(compiled, eager)) < 2e-5
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(compiled, eager, strict=True):
        for loss, value in b.moe.last_losses.items():
            torch.testing.assert_close(a.moe.last_losses[loss], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_it_is_as_exact_as_the_plain_layer(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    eager, compiled = pair(dtype)
    exact = copy.deepcopy(eager).double()
    x = torch.randn(3, 200, D, device="cuda", dtype=dtype)
    want = run(exact, x.double())
    with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
        found = [run(model, x) for model in (compiled, eager)]
    off, usual = (float((y.double() - want).detach().norm() / want.norm()) for y in found)
    assert off <= 1.3 * usual < 0.02
    # Where logits nearly agree, either may choose another expert than fp64 does.
    for a, b in zip(errors(compiled, exact), errors(eager, exact), strict=True):
        assert a <= 1.5 * b + 2e-3 < 0.3


def test_the_host_never_waits_and_memory_is_one_h_more() -> None:
    tokens = 8192
    eager, compiled = pair(torch.bfloat16)
    x = torch.randn(1, tokens, D, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for model in (compiled, eager):
        run(model, x)  # compiles, allocates
        with host_never_waits():
            run(model, x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(model, x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    h = tokens * 2 * 2 * 96 * 2  # T, K, 2F, bytes
    assert peaks[0] - peaks[1] <= 1.25 * h, peaks


class Model(pl.LightningModule):
    def __init__(self, compiles: Callable[[nn.Module], object], recorded: list[Any]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.losses: list[float] = []
        self.graphs: list[int] = []  # recorded until then
        self.recorded = recorded
        for block in self.blocks:
            compiles(block)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.blocks(batch) - batch.sin()).square().mean()
        self.losses.append(float(loss.detach()))
        self.graphs.append(len(self.recorded))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, fused=True)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for each CUDA graph that is recorded."""
    found: list[Any] = []
    record = CUDAGraphTreeManager.record_function

    def recording(manager: Any, inputs: Any, function: Any) -> Any:
        found.append(function)  # not the inputs, whose memory graphs use again
        return record(manager, inputs, function)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", recording)
    return found


@pytest.mark.parametrize(
    ("precision", "bound", "stage"),
    [("32-true", 2e-5, 2), ("bf16-mixed", 2e-2, 1), ("bf16-mixed", 2e-2, 2)],
)
def test_under_the_strategy(precision: Any, bound: float, stage: int, recorded: list[Any]) -> None:
    """With accumulation and clipping, ten steps as without compiling; graphs are recorded once.

    Gradients of a micro-batch stay while the next one's graphs run.
    """
    torch._dynamo.reset()
    found, graphs = [], []
    torch.manual_seed(1)
    batches = torch.randn(2, 40, D).repeat(10, 1, 1)
    ways: list[Callable[[nn.Module], object]] = [
        lambda block: None,
        lambda block: block.compile(fullgraph=True),
    ]
    if precision == "bf16-mixed":
        ways.append(lambda block: compile_blocks([block], cuda_graphs=True))
    for compiles in ways:
        pl.seed_everything(3, verbose=False)
        model = Model(compiles, recorded)
        trainer = pl.Trainer(
            accelerator="cuda",
            devices=1,
            strategy=FastMoEStrategy(stage=stage),
            precision=precision,
            max_epochs=1,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(list(batches), batch_size=None))
        found.append(model.losses)
        graphs.append(model.graphs)
    plain, *others = found
    assert len(plain) == 20
    assert plain[-1] < 0.7 * plain[0]
    for compiled in others:
        assert compiled == pytest.approx(plain, rel=bound)
    assert graphs[0][-1] == graphs[1][-1] == 0
    if precision == "bf16-mixed":
        assert 0 < graphs[2][9] == graphs[2][-1], graphs[2]


def test_experts_that_the_host_counts_are_refused_in_cuda_graphs() -> None:
    _, compiled = pair(torch.float32)
    compile_blocks(compiled, cuda_graphs=True)
    x = torch.randn(3, 20, D, device="cuda")

    def record() -> None:
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            run(compiled, x)

    with pytest.raises(ConfigError, match=r"experts in bf16 .*cuda_graphs=False"):
        record()


def test_cuda_graphs_are_recorded_once(recorded: list[Any]) -> None:
    """What a step takes from the layers and resets leaves the memory that graphs know."""
    eager, compiled = pair(torch.bfloat16)
    guards = [block.moe.nonfinite for block in compiled]
    for block in compiled:
        block.compile(fullgraph=True, mode="reduce-overhead")
        block.moe.nonfinite_policy = "collect"
    x = torch.randn(3, 200, D, device="cuda", dtype=torch.bfloat16)
    after = []
    for step in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        compiled.zero_grad()
        run(compiled, x, scale=4.0 if step < 7 else 64.0)  # replays read it, too
        assert (take_largest(guards, x.device) > 0).all()
        after.append(len(recorded))
    assert 0 < after[3] == after[-1], after
    run(eager, x, scale=64.0)
    assert max(errors(compiled, eager)) < 3e-2
