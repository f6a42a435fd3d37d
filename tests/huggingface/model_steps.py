"""A training step of MoECausalLM, all that it yields, and the same documents in rows or packed."""

from __future__ import annotations

import torch
from huggingface.families import SIZES, make_model
from torch import Tensor

from lightning_fastmoe.huggingface import MoECausalLM
from lightning_fastmoe.metrics import DropRate, LoadRatio, RouterEntropy
from lightning_fastmoe.nn import moe_layers
from lightning_fastmoe.nn.router.losses import TOKEN_CHOICE_LOSSES

V = SIZES["vocab_size"]
COEFFICIENTS = {
    **dict.fromkeys(TOKEN_CHOICE_LOSSES, 0.6),
    "load_balancing": 0.3,
    "z_loss": 0.1,
    "importance": 0.2,
    "sequence_balancing": 0.4,
    "global_balancing": 0.5,
}
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
"""fp64, which leaves nothing but the order of sums; angles of positions are fp32, but the same."""


def our_own(name: str, theirs=None) -> MoECausalLM:
    """The model of a family, with every loss on, and a capacity that drops pairs."""
    theirs = make_model(name) if theirs is None else theirs
    module = MoECausalLM(config=theirs.config.to_dict(), load_balancing=0.3, z_loss=0.1)
    module.configure_model()
    take_weights(module, theirs)
    return module.double()


@torch.no_grad()
def take_weights(module: MoECausalLM, theirs) -> None:
    """Those of a model of transformers, by name, but for the experts, which it stacks as we do."""
    ours, given = module.network.state_dict(), theirs.state_dict()
    for name, value in ours.items():
        source = (
            name.replace("mlp.router.weight", "mlp.gate.weight")
            .replace("experts.up_proj", "experts.gate_up_proj")
        )  # fmt: skip
        value.copy_(given[source].view_as(value))


def limited(module: MoECausalLM) -> MoECausalLM:
    for _, layer in moe_layers(module):
        layer.loss_coefficients = {**layer.loss_coefficients, **COEFFICIENTS}
        layer.capacity_factor = 0.8
    return module


def draw(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(3))


def rows_of(documents: list[Tensor], side: str) -> dict[str, Tensor]:
    """Documents as rows, padded on one side with an id that the vocabulary lacks."""
    n = max(map(len, documents))
    tokens = torch.full((len(documents), n), V + 7)
    mask = torch.zeros(len(documents), n, dtype=torch.int64)
    for row, document in enumerate(documents):
        at = slice(0, len(document)) if side == "right" else slice(n - len(document), n)
        tokens[row, at], mask[row, at] = document, 1
    return {"input_ids": tokens, "attention_mask": mask}


def one_row_of(documents: list[Tensor]) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    return {"input_ids": torch.cat(documents).unsqueeze(0), "position_ids": positions.unsqueeze(0)}


def step(module: MoECausalLM, batch) -> dict:
    """All that a training step yields and leaves behind."""
    layers = dict(moe_layers(module))
    seen = {name: [] for name in layers}
    metrics = [kind(layer.num_experts) for layer in layers.values()
               for kind in (LoadRatio, DropRate, RouterEntropy)]  # fmt: skip
    handles = [m.observe(layer) for m, layer in zip(
        metrics, [layer for layer in layers.values() for _ in range(3)], strict=True)]  # fmt: skip
    handles += [
        layer.register_routing_observer(
            lambda _, r, name=name: seen[name].append((r.routed_counts(), r.kept_counts()))
        )
        for name, layer in layers.items()
    ]
    module.train().zero_grad()
    module.log = lambda *a, **k: None
    loss = module.training_step(batch, 0)
    loss.backward()
    for handle in handles:
        handle.remove()
    return {
        "loss": loss.detach(),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "terms": {name: dict(layer.last_losses) for name, layer in layers.items()},
        "loads": seen,
        "metrics": [metric.compute() for metric in metrics],
    }
