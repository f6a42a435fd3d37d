"""Adapters that PEFT has put on a model's linear layers, beside those of its experts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_fastmoe.errors import ConfigError

_A, _B = (re.compile(rf"(.+)\.lora_{part}\.([^.]+)\.weight") for part in "AB")

KEEP_WEIGHTS = (True, False, "gaussian", "eva", "orthogonal")
"""PEFT's ``init_lora_weights`` that leave a layer's own weights as they are."""


@dataclass(frozen=True)
class LinearAdapter:
    """``alpha / r * B A`` of a linear layer.

    Args:
        a: name of the parameter A (r, inputs).
        b: name of the parameter B (outputs, r).
        rank: r.
        alpha: as above.
    """

    a: str
    b: str
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model of transformers inside of PEFT's, or the model itself."""
    wrapped: Any = model
    is_wrapper = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return wrapped.get_base_model() if is_wrapper else model


def trained_by_peft(model: nn.Module) -> set[str]:
    """The names of what models of PEFT train; they have frozen the rest of themselves."""
    return {
        f"{path}.{name}" if path else name
        for path, part in model.named_modules()
        if hasattr(part, "peft_config")
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }


def linear_adapters(model: nn.Module) -> dict[str, LinearAdapter]:
    """The adapters by the name of their linear layer.

    Args:
        model: what ``get_peft_model`` was applied to.

    Raises:
        ConfigError: if a layer has several adapters, or one that computes anything else.
    """
    found = {}
    for name, module in model.named_modules():
        layer: Any = module
        if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
            continue
        adapters = list(layer.lora_A)
        if not isinstance(layer.get_base_layer(), nn.Linear) or len(adapters) != 1:
            raise ConfigError(
                f"{name} ({type(layer.get_base_layer()).__name__}) has {len(adapters)} adapters of"
                " PEFT: besides experts, only linear layers can have one, and one each."
            )
        (key,) = adapters
        if layer.lora_variant or layer.lora_bias[key] or layer.merged:
            raise ConfigError(
                f"{name}'s adapter is merged, or uses an option of PEFT such as use_dora or"
                " lora_bias: only plain B A next to the layer is supported."
            )
        if layer.disable_adapters or key not in layer.active_adapters:
            raise ConfigError(
                f"{name}'s adapter is disabled, so the model computes without it. Enable it with"
                " PEFT's enable_adapter_layers() and set_adapter()."
            )
        rank, alpha, scale = layer.r[key], float(layer.lora_alpha[key]), layer.scaling[key]
        found[name] = LinearAdapter(
            a=f"{name}.lora_A.{key}.weight",
            b=f"{name}.lora_B.{key}.weight",
            rank=rank,
            alpha=alpha if math.isclose(scale, alpha / rank) else scale * rank,  # use_rslora
        )
    return found


def check_base_weights(model: nn.Module) -> None:
    """Refuses adapters whose initialisation has changed the weights beside them.

    Raises:
        ConfigError: since A and B alone belong to other weights than the model's files have.
    """
    for config in getattr(model, "peft_config", {}).values():
        check_initialisation(type(model).__name__, getattr(config, "init_lora_weights", True))


def check_initialisation(whose: object, init: object) -> None:
    """Refuses PEFT's ``init_lora_weights`` that change a layer's own weights."""
    if (init.lower() if isinstance(init, str) else bool(init)) not in KEEP_WEIGHTS:
        raise ConfigError(
            f"{whose}: init_lora_weights={init!r} changes the weights that adapters are added to,"
            " so A and B alone don't describe the model. Use one of"
            f" {', '.join(map(repr, KEEP_WEIGHTS))}, or save_pretrained, which saves the whole"
            " model."
        )


def file_keys(adapters: Mapping[str, LinearAdapter]) -> dict[str, str]:
    """Name of a parameter -> its name in PEFT's files, without the adapter's."""
    keys = {}
    for name, adapter in adapters.items():
        keys[adapter.a], keys[adapter.b] = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    return keys


def target_modules(
    model: nn.Module, adapters: Mapping[str, LinearAdapter]
) -> dict[str, LinearAdapter]:
    """PEFT's ``target_modules``, with one of the adapters that each stands for.

    It is the last part of a name if all layers of that name have such an adapter, as PEFT's users
    and other programs write it, and otherwise whole names. Experts' parameters count as layers:
    they are keys of ``rank_pattern`` and ``alpha_pattern``, too, and have other ranks and scales.
    """
    parts = [n for n, _ in (*model.named_modules(), *model.named_parameters())]
    targets = {}
    for last in sorted({name.rpartition(".")[2] for name in adapters}):
        called = [n for n in parts if n.rpartition(".")[2] == last]
        kinds = {(adapters[n].rank, adapters[n].alpha) if n in adapters else None for n in called}
        if len(kinds) == 1:
            targets[last] = adapters[called[0]]
        else:
            targets |= {n: adapters[n] for n in called if n in adapters}
    return targets


def matches(module: str, names: Iterable[str]) -> str | None:
    """The first of a pattern's keys that PEFT (0.21) applies to a module, None if none does."""
    return next((key for key in names if re.fullmatch(rf"(.*\.)?({key})", module)), None)


def stored_names(names: Iterable[str]) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """What PEFT has renamed among the names of a checkpoint's weights.

    Returns:
        Name of a weight without PEFT -> its name here; and name of a weight that has an adapter
        -> the names of A and B.
    """
    weights, adapters = {}, {}
    for name in names:
        if found := _A.fullmatch(name):
            module, key = found.groups()
            adapters[f"{module}.weight"] = name, f"{module}.lora_B.{key}.weight"
        elif not _B.fullmatch(name):
            weights[name.replace(".base_layer.", ".")] = name
    return weights, adapters
