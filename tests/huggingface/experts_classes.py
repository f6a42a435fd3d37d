"""All classes of transformers that follow its experts interface, found in its source, and tiny."""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

EXPERTS, TOP_K, D_MODEL, D_FFN = 5, 2, 16, 24

REFUSED_CLASSES = {"MuseSparkExperts": "has_post_expert_norm=True"}
"""Of later versions of transformers, and why."""
GATED_IN_FP32 = {"BeamExperts", "Inkling2Experts", "Inkling2LoopExperts"}
"""Classes, of later versions, whose activation computes in fp32 whatever the dtype."""
IN_FP32 = {"OpenAIPrivacyFilterExperts", *GATED_IN_FP32}
"""Classes whose own forward computes in fp32 whatever the dtype."""


@functools.cache
def experts_classes() -> dict[str, type[nn.Module]]:
    """Class name -> class, of every decorated class of every model."""
    found: dict[str, type[nn.Module]] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "@use_experts_implementation" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, kind in vars(module).items():
            own = inspect.isclass(kind) and kind.__module__ == module.__name__
            if own and hasattr(kind, "_apply_gate"):
                assert name not in found, f"two classes are called {name}"
                found[name] = kind
    return found


def computed_classes() -> list[str]:
    """The names of those that are not refused."""
    return sorted(experts_classes().keys() - REFUSED_CLASSES)


@functools.cache
def usual_activation(kind: type[nn.Module]) -> str:
    """The activation of the experts in the default config of the class's models."""
    text = inspect.getsource(kind.__init__)
    field = next(
        (
            f
            for f in ("mlp_hidden_act", "hidden_activation", "hidden_act")
            if f"config.{f}]" in text
        ),
        None,
    )
    if field is None:
        return "silu"  # not read
    module = importlib.import_module(kind.__module__)
    for model in vars(module).values():
        config = getattr(model, "config_class", None)
        if config is None or model.__module__ != module.__name__:
            continue
        configs = [config()]
        while configs:
            one = configs.pop()
            if getattr(one, field, None) is not None and "Vision" not in type(one).__name__:
                return str(getattr(one, field))
            configs += [getattr(one, name) for name in getattr(one, "sub_configs", {})]
    raise AssertionError(f"no config of {kind.__name__} has {field}")


def make_experts(
    kind: type[nn.Module],
    dtype: torch.dtype = torch.float64,
    activation: str | None = None,
    implementation: str = "fastmoe",
    d_model: int = D_MODEL,
    d_ffn: int = D_FFN,
) -> Any:
    """A module of class ``kind`` with random weights, biases too."""
    activation = activation or usual_activation(kind)
    config = SimpleNamespace(
        **dict.fromkeys(
            ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
        ),
        **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), activation),
        **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), d_ffn),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), d_model),
        **dict.fromkeys(("mlp_gate_softcap", "mlp_up_softcap"), 0.9),
        post_norm_eps=1e-6,
        moe_latent_size=None,
        swiglu_limit=0.7,  # clamps some
        swiglu_alpha=1.3,
        _experts_implementation=implementation,
    )
    experts = kind(config).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    if isinstance(getattr(experts, "limit", None), float):
        experts.limit = 0.7
    return experts


def make_inputs(
    dtype: torch.dtype = torch.float64, tokens: int = 23, d_model: int = D_MODEL
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, top_k_index (expert 3 is idle) and top_k_weights."""
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(tokens)])
    ids = torch.where(ids == 3, EXPERTS - 1, ids)
    return torch.randn(tokens, d_model, dtype=dtype), ids, torch.rand(tokens, TOP_K, dtype=dtype)


def results(
    experts: Any, implementation: str, inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Output and all gradients, by name. The gradient of the output isn't constant."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    x, ids, weights = inputs
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = experts(x, ids, weights)
    scale = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
    (out.double() * scale).sum().backward()
    found = {name: p.grad for name, p in experts.named_parameters()}
    found |= {"out": out.detach(), "hidden_states": x.grad, "top_k_weights": weights.grad}
    assert all(grad is not None for grad in found.values())
    return found
