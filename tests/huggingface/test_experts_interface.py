"""transformers' experts classes with ``experts_implementation="fastmoe"`` against their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface.experts_classes import (
    D_FFN,
    D_MODEL,
    EXPERTS,
    GATED_IN_FP32,
    IN_FP32,
    REFUSED_CLASSES,
    computed_classes,
    experts_classes,
    make_experts,
    make_inputs,
    results,
)
from packaging import version
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.huggingface import experts_interface, fused_activation

SWIGLU = [
    "AXK1Experts",
    "AXK2Experts",
    "AfmoeExperts",
    "Cohere2MoeExperts",
    "DeepseekOcr2TextExperts",
    "DeepseekV2Experts",
    "DeepseekV32Experts",
    "DeepseekV3Experts",
    "Dots1Experts",
    "Ernie4_5_MoeExperts",
    "Ernie4_5_VLMoeMoeExperts",
    "ExaoneMoeExperts",
    "FlexOlmoExperts",
    "Glm4MoeExperts",
    "Glm4MoeLiteExperts",
    "Glm4vMoeTextExperts",
    "GlmMoeDsaExperts",
    "GraniteMoeExperts",
    "GraniteMoeHybridExperts",
    "GraniteMoeSWAExperts",
    "GraniteMoeSharedExperts",
    "HYV3Experts",
    "HunYuanMoEV1Experts",
    "InklingExperts",
    "JambaExperts",
    "KimiLinearExperts",
    "LagunaExperts",
    "Lfm2MoeExperts",
    "MellumExperts",
    "MiMoV2FlashExperts",
    "MiniMaxExperts",
    "MiniMaxM2Experts",
    "Mistral4Experts",
    "MixtralExperts",
    "OlmoeExperts",
    "PhimoeExperts",
    "Qwen2MoeExperts",
    "Qwen3MoeExperts",
    "Qwen3NextExperts",
    "Qwen3OmniMoeTalkerTextExperts",
    "Qwen3OmniMoeThinkerTextExperts",
    "Qwen3VLMoeTextExperts",
    "Qwen3_5MoeExperts",
    "Qwen4ExpTextExperts",
    "SolarOpenExperts",
    "ZayaExperts",
]

OTHERS = {
    "DeepseekV4Experts": "clamps",
    "DiffusionGemmaTextExperts": "GELU by tanh",
    "Gemma4TextExperts": "GELU by tanh",
    "Glm5NextTextExperts": "clamps",
    "GptOssExperts": "clamps, transposed, gate and up alternate",
    "HYV4Experts": "clamps",
    "MiniMaxM3VLExperts": "clamps",
    "NemotronHExperts": "ReLU squared, no gate",
    "OpenAIPrivacyFilterExperts": "clamps, transposed",
}
"""Classes whose own activation is called, and why."""

CLASSES = computed_classes()
LATER = set(CLASSES) - {*SWIGLU, *OTHERS}
"""Of later versions of transformers than the one that is pinned."""


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert value.abs().max() > 0.01, name  # each has something to compare
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < tolerance, f"{name}: {error}"


def test_every_class_is_classified() -> None:
    """A class that is new in transformers fails here once that version is pinned."""
    assert {*SWIGLU, *OTHERS} <= set(CLASSES)
    assert not LATER or version.parse(transformers.__version__) >= version.parse("5.18")
    for name, kind in experts_classes().items():
        if name in LATER | REFUSED_CLASSES.keys():
            continue
        assert fused_activation(make_experts(kind)) == ("swiglu" if name in SWIGLU else None), name


def test_the_page_counts_the_classes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    assert f"each of the {len(SWIGLU) + len(OTHERS)} classes" in page
    assert f"| {len(SWIGLU)} classes with SwiGLU" in page


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_and_gradients(name: str) -> None:
    """fp64 to 1e-10 of the slow twins, and fp32."""
    torch.manual_seed(0)
    experts, inputs = make_experts(experts_classes()[name]), make_inputs()
    found = results(experts, "fastmoe", inputs)
    batched, eager = (1e-5 if name in few else 1e-10 for few in (GATED_IN_FP32, IN_FP32))
    assert_equal(found, results(experts, "batched_mm", inputs), batched)
    assert_equal(found, results(experts, "eager", inputs), eager)
    experts, (x, ids, weights) = experts.float(), inputs
    single = (x.float(), ids, weights.float())
    assert_equal(results(experts, "fastmoe", single), results(experts, "eager", single), 1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh", "swish", "tanh"])
@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "NemotronHExperts", "DeepseekV4Experts"])
def test_other_activations(name: str, activation: str) -> None:
    torch.manual_seed(1)
    experts, inputs = make_experts(experts_classes()[name], activation=activation), make_inputs()
    expected = {
        "Qwen3MoeExperts": {"gelu": "geglu", "relu": "reglu", "swish": "swiglu"},
        "NemotronHExperts": {"gelu": "gelu", "relu": "relu", "swish": "silu"},
    }
    assert fused_activation(experts) == expected.get(name, {}).get(activation)
    assert_equal(results(experts, "fastmoe", inputs), results(experts, "eager", inputs), 1e-10)


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_odd_widths_and_no_tokens(name: str, dtype: torch.dtype) -> None:
    """Rows that are not multiples of 16 bytes, and an empty batch."""
    torch.manual_seed(2)
    experts = make_experts(experts_classes()[name], dtype, d_model=7, d_ffn=9)
    inputs = make_inputs(dtype, d_model=7)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_equal(results(experts, "fastmoe", inputs), results(experts, "eager", inputs), tolerance)
    x, ids, weights = make_inputs(dtype, tokens=1, d_model=7)
    empty = results(experts, "fastmoe", (x[:0], ids[:0], weights[:0]))
    assert empty["out"].shape == empty["hidden_states"].shape == (0, 7)
    assert not any(value.any() for value in empty.values())  # also the weights' gradients


class _Experts(nn.Module):
    """Stacked experts with the default gate, in any layout; the decorator adds the rest."""

    def __init__(self, config: Any, has_gate: bool, has_bias: bool, is_transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
        up, prefix = ((2 * D_FFN), "gate_up_proj") if has_gate else (D_FFN, "up_proj")
        for name, rows, columns in ((prefix, up, D_MODEL), ("down_proj", D_MODEL, D_FFN)):
            shape = (columns, rows) if is_transposed else (rows, columns)
            setattr(self, name, nn.Parameter(torch.randn(EXPERTS, *shape) / 2))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))

    def forward(self, *_: Any) -> Tensor:
        raise AssertionError("not called")


def make_layout(
    has_gate: bool = True,
    has_bias: bool = False,
    is_transposed: bool = False,
    is_concatenated: bool = True,
) -> Any:
    class Experts(_Experts):
        def __init__(self, config: Any) -> None:
            super().__init__(config, has_gate, has_bias, is_transposed)

    decorate = use_experts_implementation(
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
    )
    return decorate(Experts)(SimpleNamespace(_experts_implementation="fastmoe")).double()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
def test_every_layout(has_gate: bool, has_bias: bool, is_transposed: bool) -> None:
    """Also the layouts that no class of transformers has."""
    torch.manual_seed(3)
    experts, inputs = make_layout(has_gate, has_bias, is_transposed), make_inputs()
    fused = None if is_transposed else "swiglu" if has_gate else "silu"
    assert fused_activation(experts) == fused
    assert_equal(results(experts, "fastmoe", inputs), results(experts, "batched_mm", inputs), 1e-10)


def changed(change: str) -> Any:
    """SwiGLU experts that compute something else: half the activation."""
    experts = make_experts(experts_classes()["Qwen3MoeExperts"])
    if change == "hook":
        experts.act_fn.register_forward_hook(lambda module, inputs, out: out / 2)
    elif change == "pre-hook":
        experts.act_fn.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
    elif change == "forward":
        experts.act_fn.forward = lambda x: F.silu(x) / 2
    elif change == "subclass":
        experts.act_fn = type("Half", (nn.SiLU,), {"forward": lambda self, x: F.silu(x) / 2})()
    elif change == "function":
        del experts.act_fn
        experts.act_fn = lambda x: F.silu(x) / 2
    elif change == "gate of the object":
        experts._apply_gate = lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] / 2
    elif change == "gate of a subclass":
        gate = experts._apply_gate
        half = type("Half", (type(experts),), {"_apply_gate": lambda self, h: gate(h) / 2})
        experts.__class__ = half
    return experts


@pytest.mark.parametrize(
    "change",
    ["hook", "pre-hook", "forward", "subclass", "function", "gate of the object"]
    + ["gate of a subclass"],
)
def test_what_only_resembles_silu_is_called(change: str) -> None:
    torch.manual_seed(4)
    inputs = make_inputs()
    plain = results(changed(""), "fastmoe", inputs)["out"]
    experts = changed(change)
    assert fused_activation(experts) is None
    found = results(experts, "fastmoe", inputs)
    assert_equal(found, results(experts, "batched_mm", inputs), 1e-10)
    assert (found["out"] - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"])
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("which", ["some", "whole tokens", "all"])
def test_a_dropped_slot_adds_nothing(
    name: str, on_host: bool, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight is not zero here, as it would be in transformers, and has the gradient zero."""
    torch.manual_seed(5)
    order = experts_interface._order
    monkeypatch.setattr(experts_interface, "_order", lambda *args: order(*args[:3], on_host))
    experts, (x, ids, weights) = make_experts(experts_classes()[name]), make_inputs()
    dropped = torch.rand(ids.shape) < 0.4
    if which == "whole tokens":
        dropped[::3] = True
    elif which == "all":
        dropped[:] = True
    found = results(experts, "fastmoe", (x, ids.masked_fill(dropped, EXPERTS), weights))
    assert not found["top_k_weights"][dropped].any()
    # The same slots in range, with a weight of zero, through the class's own forward.
    wanted = results(experts, "eager", (x, ids, weights.masked_fill(dropped, 0)))
    wanted["top_k_weights"] = wanted["top_k_weights"].masked_fill(dropped, 0)
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-10), key
    assert found["out"].any() == (which != "all")


@pytest.mark.parametrize("bad", [-1, EXPERTS + 1])
def test_ids_out_of_range(bad: int) -> None:
    experts, (x, ids, weights) = make_experts(experts_classes()["Qwen3MoeExperts"]), make_inputs()
    ids[4, 1] = bad
    with pytest.raises(RuntimeError, match=r"top_k_index has an id outside of \[0, 5\]"):
        experts(x, ids, weights)


class _Copies(TorchDispatchMode):
    """Counts operators that write a tensor as large as ``numel``, forward only."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = func.is_view or not isinstance(out, Tensor)
        if not is_view and out.numel() >= self.numel:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_forward_copies_the_weights(name: str, dtype: torch.dtype) -> None:
    """Not even those that are stored transposed or alternately."""
    experts = make_experts(experts_classes()[name], dtype, d_model=64, d_ffn=64)
    inputs = make_inputs(dtype, tokens=4, d_model=64)
    with _Copies(experts.down_proj.numel()) as copies:
        experts(*inputs)
    assert copies.seen == []
    with _Copies(experts.down_proj.numel()) as copies:
        experts.down_proj.clone()
    assert copies.seen == ["aten.clone.default"]


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"])
def test_autocast(name: str) -> None:
    """fp32 weights and tokens in bf16 GEMMs: no further from fp64 than transformers' own.

    Its "eager" adds biases in fp32, its "batched_mm" those in bf16, as this package does.
    """
    torch.manual_seed(6)
    kind = experts_classes()[name]
    exact, inputs = make_experts(kind), make_inputs()
    wanted = results(exact, "eager", inputs)
    single = make_experts(kind, torch.float32)
    single.load_state_dict(exact.state_dict())
    inputs32 = tuple(t.float() if t.is_floating_point() else t for t in inputs)
    errors = {}
    for implementation in ("fastmoe", "eager", "batched_mm"):
        with torch.autocast("cpu", torch.bfloat16):
            found = results(single, implementation, inputs32)
        assert all(value.dtype == torch.float32 for value in found.values())
        errors[implementation] = {
            key: float((found[key] - value).norm() / value.norm()) for key, value in wanted.items()
        }
    for key, error in errors["fastmoe"].items():
        theirs = max(errors["eager"][key], errors["batched_mm"][key])
        assert 1e-4 < error < max(1.5 * theirs, 6e-3), (key, errors)


REFUSED = {
    "needs scale": lambda e: e.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "down_proj is torch.float8_e4m3fn": lambda e: setattr(
        e, "down_proj", nn.Parameter(e.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    ),
    "it has no down_proj": lambda e: delattr(e, "down_proj"),
    "it doesn't say has_gate, is_transposed": lambda e: (
        delattr(e, "has_gate"),
        delattr(e, "is_transposed"),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_ignored_is_refused(reason: str) -> None:
    experts = make_experts(experts_classes()["Qwen3MoeExperts"])
    REFUSED[reason](experts)
    message = "scale would be ignored" if reason == "needs scale" else reason
    with pytest.raises(ConfigError, match=rf"can't compute Qwen3MoeExperts: {message}"):
        experts(*make_inputs())


def test_classes_of_later_versions_are_refused() -> None:
    for name in REFUSED_CLASSES & experts_classes().keys():
        experts = make_experts(experts_classes()[name])
        with pytest.raises(ConfigError, match=f"compute {name}: it has {REFUSED_CLASSES[name]}"):
            experts(*make_inputs())


def test_a_part_that_would_be_ignored_is_refused() -> None:
    experts = make_experts(experts_classes()["Qwen3MoeExperts"])
    experts.post_expert_norm = torch.nn.RMSNorm(experts.hidden_dim)
    with pytest.raises(ConfigError, match="Qwen3MoeExperts: post_expert_norm would be ignored"):
        experts(*make_inputs())


@pytest.mark.parametrize(("option", "value"), [("has_norm", True), ("order", "down")])
def test_options_of_later_versions_are_refused(option: str, value: Any) -> None:
    def decorator(experts_class=None, *, has_gate=True, has_norm=False, order="up"):
        pass

    experts = make_experts(experts_classes()["Qwen3MoeExperts"])
    experts.has_norm, experts.order = False, "up"
    real = sys.modules[ExpertsInterface.__module__]
    experts_interface.register_in(
        SimpleNamespace(ExpertsInterface=ExpertsInterface, use_experts_implementation=decorator)
    )
    try:
        experts(*make_inputs())
        setattr(experts, option, value)
        with pytest.raises(ConfigError, match=f"Qwen3MoeExperts: it has {option}={value}, which"):
            experts(*make_inputs())
    finally:
        experts_interface.register_in(real)


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
import lightning_fastmoe.huggingface
from huggingface.experts_classes import experts_classes, make_experts, make_inputs
from lightning_fastmoe.errors import ConfigError
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
experts = make_experts(experts_classes()["Qwen3MoeExperts"])
mesh = init_device_mesh("cpu", (1,))
experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh, [Shard(0)]))
try:
    experts(*make_inputs())
except ConfigError as error:
    assert "down_proj is sharded by transformers (a DTensor)" in str(error), error
else:
    raise AssertionError("no error")
"""


def test_weights_that_transformers_sharded_are_refused() -> None:
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, tests],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_alternating_rows_with_the_default_gate_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Experts: its gate and up rows alternate"):
        make_layout(is_concatenated=False)(*make_inputs())


def test_wrong_shapes_are_refused() -> None:
    experts, (x, ids, weights) = make_experts(experts_classes()["Qwen3MoeExperts"]), make_inputs()
    with pytest.raises(ShapeError, match=r"hidden_states \(1, 23, 16\) of Qwen3MoeExperts"):
        experts(x[None], ids, weights)
    with pytest.raises(ShapeError, match=r"top_k_index \(22, 2\) and top_k_weights \(23, 2\)"):
        experts(x, ids[1:], weights)
    with pytest.raises(ShapeError, match=r"top_k_index \(23, 2\) and top_k_weights \(23, 1\)"):
        experts(x, ids, weights[:, :1])
    experts.num_experts = 4
    with pytest.raises(ShapeError, match=r"has num_experts=4, but weights of 5 experts"):
        experts(x, ids, weights)


LAZY = """
import sys
import lightning_fastmoe
assert not {"torch", "transformers", "lightning_fastmoe.huggingface"} & sys.modules.keys()
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "fastmoe" in ALL_EXPERTS_FUNCTIONS
from lightning_fastmoe.huggingface import register_experts
assert register_experts() == "fastmoe"
"""

AFTER = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "fastmoe" not in ALL_EXPERTS_FUNCTIONS
import lightning_fastmoe
assert "fastmoe" in ALL_EXPERTS_FUNCTIONS
"""

MISSING = """
import sys
sys.modules["transformers"] = None
import lightning_fastmoe.huggingface as ours
try:
    ours.register_experts()
except ImportError as error:
    assert isinstance(error, ours.experts_interface.MissingPackageError)
    assert "needs transformers 5.17 or newer" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError("no error")
"""


BY_MODEL = """
import lightning_fastmoe
from transformers import OlmoeConfig, OlmoeForCausalLM
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
config = OlmoeConfig(**sizes, vocab_size=9, num_experts=2, num_experts_per_tok=1)
model = OlmoeForCausalLM._from_config(config, experts_implementation="fastmoe")
import torch
from lightning_fastmoe.huggingface import experts_class
seen, weights = [], experts_class.stacked_weights
experts_class.stacked_weights = lambda experts: seen.append(type(experts)) or weights(experts)
model(torch.zeros(1, 2, dtype=torch.long))
assert len(seen) == 1, seen
"""

PROGRAMS = {"before": LAZY, "after": AFTER, "missing": MISSING, "model": BY_MODEL}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_registration(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
