"""What the ranks run in test_generation.py: each generates from prompts of its own."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from distributed.devices import join
from huggingface.sharding_runs import Run, Tuned, make_model
from strategy.tracing import make_trainer, whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.distributed import ExpertDataParallel
from lightning_fastmoe.errors import FastMoEError

EOS, PAD = 7, 0
LENGTHS = [[4, 6], [3], [], [9, 2, 5]]
"""Of each rank's prompts."""


def prompts(rank: int) -> dict[str, Tensor] | None:
    """Padded on the left; None on a rank without any."""
    generator = torch.Generator().manual_seed(rank)
    rows = [torch.randint(8, 60, (n,), generator=generator) for n in LENGTHS[rank]]
    if not rows:
        return None
    width = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}


def generate(model: Any, rank: int, how: str) -> Any:
    """What a rank generates, each up to a length of its own, and by a seed of its own."""
    inputs = prompts(rank)
    if inputs is None:
        return None
    if how == "lookup":  # takes one sequence
        inputs = {name: value[:1] for name, value in inputs.items()}
    torch.manual_seed(20 + rank)
    return model.generate(
        **inputs, max_new_tokens=4 + 3 * rank, eos_token_id=EOS, pad_token_id=PAD, **OPTIONS[how]
    )


def make(name: str) -> Any:
    """A model whose end of text is likely enough to come at different steps."""
    model = make_model(Run(name)).eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    return model


def generates(name: str, ep: int) -> list[Any]:
    """What this rank generates in each way."""
    join("cpu")
    rank = dist.get_rank()
    model = make(name)
    parallel = ExpertDataParallel(model, ep)
    before = hooks(model)
    found = [parallel.on_each_rank(generate, model, rank, how=how) for how in OPTIONS]
    assert hooks(model) == before
    return found


def hooks(model: Any) -> list[Any]:
    """All that run around the forward passes of its parts."""
    parts = [(part._forward_pre_hooks, part._forward_hooks) for part in model.modules()]
    return [hook for both in parts for kind in both for hook in kind.values()]


def fails(ep: int, how: str) -> str:
    """The error of this rank, if rank 1 fails; then everybody generates."""
    join("cpu")
    rank = dist.get_rank()
    model = make("qwen3_moe")
    parallel = ExpertDataParallel(model, ep)

    def function() -> Any:
        if rank == 1:
            if how == "before":
                raise ValueError("no prompt")
            model(**prompts(1))
            if how == "interrupt":
                raise KeyboardInterrupt
            if how == "other layer":
                layer = model.model.layers[1].mlp
                return layer(torch.zeros(1, 1, model.config.hidden_size))
            if how == "trains":
                with torch.enable_grad():
                    return model(**prompts(1))
            raise ValueError("a bad token")
        return generate(model, rank, "greedy")

    try:
        parallel.on_each_rank(function)
    except (FastMoEError, ValueError, KeyboardInterrupt) as error:
        said = f"{type(error).__name__}: {error}"
    again = parallel.on_each_rank(generate, model, rank, "greedy")
    alone = generate(make("qwen3_moe"), rank, "greedy")
    assert (again is None and alone is None) or torch.equal(again, alone)
    return said


class OwnLayers(nn.Module):
    """A language model of MoE layers, one of which routes by token ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(60, 8), nn.Linear(8, 60)
        self.first = MoE(8, 12, 6, 2)
        self.second = MoE(8, 12, 6, 1, router="hash")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.first(x)
        logits: Tensor = self.head(x + self.second(x, token_ids=ids))
        return logits


def continued(model: nn.Module, rank: int) -> list[int]:
    """A sample of a length of its own."""
    ids = [5 + rank]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3 * rank):
        scores = model(torch.tensor([ids]))[0, -1].softmax(-1)
        ids.append(int(torch.multinomial(scores, 1, generator=generator)))
    return ids


def samples_from_own_layers() -> list[int]:
    """Rank 0 never runs the model."""
    join("cpu")
    rank = dist.get_rank()
    model = OwnLayers()
    return ExpertDataParallel(model, 2).on_each_rank(continued, model, rank)


class Generates(pl.Callback):
    """Generates between two steps."""

    def __init__(self) -> None:
        self.found: Any = None
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            self.weights = whole_weights(pl_module.net)
            rank = trainer.global_rank
            self.found = trainer.strategy.on_each_rank(generate, pl_module.net, rank, "greedy")


def generates_in_training(run: Run) -> tuple[Any, dict[str, Tensor]] | str:
    """What is generated from which weights; or the error."""
    callback = Generates()
    try:
        make_trainer(run, callbacks=[callback]).fit(Tuned(run))
    except FastMoEError as error:
        return f"{type(error).__name__}: {error}"
    return callback.found, callback.weights
