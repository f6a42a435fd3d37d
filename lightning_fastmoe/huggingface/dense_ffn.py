"""Recognises dense FFNs of transformers' models by their parts, and checks what they compute."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import GATED_OF, plain_activation
from lightning_fastmoe.ops.activation import apply_activation

_PARTS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Mistral, Gemma
    (("gate_up_proj",), "down_proj"),  # Phi-3, GLM
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # Phi, vision transformers
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class DenseFFN:
    """A recognised FFN.

    Attributes:
        up: (2F, D) if it is gated, gate rows first; else (F, D).
        down: (D, F).
        up_bias: (2F,) or (F,), or None.
        down_bias: (D,), or None.
        activation: a name of :data:`~lightning_fastmoe.ops.activation.ACTIVATIONS`; None if its own
            isn't among them, or it does something else besides.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str | None

    @property
    def d_model(self) -> int:
        """D."""
        return self.down.shape[0]

    @property
    def d_ffn(self) -> int:
        """F."""
        return self.down.shape[1]


def read_ffn(module: nn.Module) -> DenseFFN | None:
    """The FFN that a module is; None if it has other parts.

    What it computes is compared with what its parts would, on random tokens in fp64, so that a
    class with the usual names and a forward pass of its own isn't mistaken. Dropout is something of
    its own, too.

    Raises:
        ConfigError: if its weights are on the meta device.
    """
    if _arguments(module) != 1:  # Bloom's takes the residual, too
        return None
    for ups, down in _PARTS:
        parts = [_linear(getattr(module, name, None)) for name in (*ups, down)]
        if any(part is None for part in parts):
            continue
        *firsts, last = [part for part in parts if part is not None]
        if {id(p) for p in module.parameters()} != {
            id(p) for name in (*ups, down) for p in getattr(module, name).parameters()
        }:
            return None
        biases = [bias for _, bias in firsts if bias is not None]
        if biases and len(biases) < len(firsts):
            return None
        up = torch.cat([weight for weight, _ in firsts])
        found = DenseFFN(up, last[0], torch.cat(biases) if biases else None, last[1], None)
        is_gated = len(ups) == 2 or ups == ("gate_up_proj",)
        if up.is_meta:
            raise ConfigError(
                f"{type(module).__name__} is on the meta device: what it computes can't be looked"
                " at without its weights."
            )
        activation = None if _drops(module) else _activation(module, is_gated)
        found = DenseFFN(up, last[0], found.up_bias, found.down_bias, activation)
        if activation is not None and not _computes_the_same(module, found):
            found = DenseFFN(up, last[0], found.up_bias, found.down_bias, None)
        return found
    return None


def _arguments(module: nn.Module) -> int:
    """Positional arguments that its forward pass needs."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def _drops(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


def _linear(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a linear layer, GPT-2's ``Conv1D`` included."""
    if type(module) is nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    if (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    ):
        return module.weight.detach().T, module.bias.detach()
    return None


def _activation(module: nn.Module, is_gated: bool) -> str | None:
    function = next((getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name)), None)
    plain = plain_activation(function)
    if plain is None:
        return None
    return GATED_OF[plain] if is_gated else plain


@torch.no_grad()
def _computes_the_same(module: nn.Module, ffn: DenseFFN) -> bool:
    assert ffn.activation is not None
    exact = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, ffn.d_model, dtype=torch.float64, generator=generator).to(ffn.up.device)
    up_bias, down_bias = (None if b is None else b.double() for b in (ffn.up_bias, ffn.down_bias))
    h = nn.functional.linear(x, ffn.up.double(), up_bias)
    wanted = nn.functional.linear(apply_activation(h, ffn.activation), ffn.down.double(), down_bias)
    found = exact(x)
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).norm() <= 1e-9 * wanted.norm())
