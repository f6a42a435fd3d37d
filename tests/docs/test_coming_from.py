"""docs/coming_from.md: what it says to write here exists, and is accepted."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from pytorch_lightning.strategies import DeepSpeedStrategy
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from lightning_fastmoe import ExpertLoadMonitor, FastMoEStrategy, MoE, RouterBiasBalancing
from lightning_fastmoe.distributed import ExpertDataParallel
from lightning_fastmoe.huggingface import upcycle
from lightning_fastmoe.nn import convert
from lightning_fastmoe.nn.router import ROUTERS

PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"
TEXT = PAGE.read_text(encoding="utf-8")
SIZES = {"d_model": 16, "d_ffn": 16, "num_experts": 16}
CALLABLE: dict[str, Any] = {
    "MoE": MoE,
    "FastMoEStrategy": FastMoEStrategy,
    "RouterBiasBalancing": RouterBiasBalancing,
    "ExpertLoadMonitor": ExpertLoadMonitor,
}
ON_MODELS = {
    "huggingface.upcycle": upcycle,
    "nn.convert": convert,
    "ExpertDataParallel": ExpertDataParallel,
}
"""Functions that take a model."""


def ours() -> list[str]:
    """The code in the second column of every table."""
    rows = [line.split("|")[2] for line in TEXT.splitlines() if line.startswith("| ")]
    return [code for cell in rows for code in re.findall(r"`([^`]+)`", cell)]


def arguments(code: str) -> tuple[str, dict[str, Any]]:
    """The called name and its keyword arguments; ``...`` stays Ellipsis."""
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    return ast.unparse(call.func), keywords


@pytest.mark.parametrize("code", [c for c in ours() if c.endswith(")")])
def test_call_is_accepted(code: str) -> None:
    name, given = arguments(code)
    if name.startswith("layer"):
        method = getattr(MoE, name.partition(".")[2] or "forward")
        assert set(given) <= set(inspect.signature(method).parameters)
        return
    if name.startswith("parallel."):
        method = getattr(ExpertDataParallel, name.removeprefix("parallel."))
        assert set(given) <= set(inspect.signature(method).parameters)
        return
    if name in ON_MODELS:
        assert set(given) <= set(inspect.signature(ON_MODELS[name]).parameters)
        return
    known = set(inspect.signature(CALLABLE[name]).parameters)
    if name == "FastMoEStrategy":
        known |= set(inspect.signature(DeepSpeedStrategy).parameters)
    assert set(given) <= known
    whole = {key: value for key, value in given.items() if value is not ...}
    CALLABLE[name](**(SIZES if name == "MoE" else {}) | whole)


def test_other_code_is_a_router_or_torch() -> None:
    others = {c for c in ours() if not c.endswith(")")}
    assert {c.strip('"') for c in others if c.startswith('"')} <= set(ROUTERS)
    assert {c for c in others if not c.startswith('"')} == {"torch.utils.checkpoint"}


def test_every_option_of_deepspeed_is_there() -> None:
    section = TEXT.partition("## DeepSpeed-MoE")[2].partition("\n## ")[0]
    options = set(inspect.signature(DeepSpeedMoE.__init__).parameters) - {"self", "use_tutel"}
    assert {o for o in options if f"`{o}" not in section} == set()


def test_fields_of_transformers_exist() -> None:
    for field in ("hidden_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"):
        assert hasattr(Qwen3MoeConfig(), field)
    for config in (Qwen3MoeConfig(), MixtralConfig(), OlmoeConfig()):
        assert hasattr(config, "router_aux_loss_coef")
        assert hasattr(config, "output_router_logits")
    assert hasattr(Qwen3MoeConfig(), "moe_intermediate_size")
    assert not hasattr(MixtralConfig(), "moe_intermediate_size")
    assert not hasattr(OlmoeConfig(), "moe_intermediate_size")
    assert not hasattr(MixtralConfig(), "norm_topk_prob")
