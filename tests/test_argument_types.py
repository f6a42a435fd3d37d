"""Arguments of wrong types are named where they are given; numbers of NumPy are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest

from lightning_fastmoe import FastMoEStrategy, MoE
from lightning_fastmoe.argument_types import check_known, check_types, describe, suggestion
from lightning_fastmoe.errors import ConfigError


def _function(
    count: int = 1,
    rate: float | None = None,
    flag: bool = False,
    name: str = "",
    kind: Literal["a", "b"] | None = None,
    options: Mapping[str, Any] | None = None,
    sizes: list[int] | None = None,
    anything: Any = None,
) -> None: ...


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", np.int64(3), 3),
        ("rate", 2, 2),
        ("rate", np.float32(0.5), 0.5),
        ("rate", np.int16(2), 2),
        ("rate", None, None),
        ("flag", np.bool_(True), True),
        ("kind", "b", "b"),
        ("options", {"x": 1}, {"x": 1}),
        ("sizes", [1, np.uint8(2)], [1, 2]),
        ("anything", object, object),
        ("unannotated", "x", "x"),
    ],
)
def test_a_value_of_an_accepted_type_is_taken_as_the_annotated_one(
    name: str, value: Any, expected: Any
) -> None:
    found = check_types("owner", _function, {name: value})[name]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("count", "3", "'3' (str) is invalid: it must be an integer."),
        ("count", True, "True (bool) is invalid: it must be an integer."),
        ("count", np.bool_(True), "it must be an integer."),
        ("count", 3.0, "3.0 (float) is invalid: it must be an integer."),
        ("count", None, "None (NoneType) is invalid: it must be an integer."),
        ("rate", "0.1", "it must be a number or None."),
        ("rate", False, "it must be a number or None."),
        ("flag", "yes", "'yes' (str) is invalid: it must be True or False."),
        ("flag", 1, "1 (int) is invalid: it must be True or False."),
        ("name", 7, "it must be a string."),
        ("kind", "c", "it must be 'a' or 'b' or None."),
        ("options", "x", "it must be a dict or None."),
        ("sizes", [1, "2"], "it must be a list (an integer each) or None."),
        ("sizes", (1, 2), "it must be a list (an integer each) or None."),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_types("owner", _function, {name: value})
    assert str(raised.value).startswith(f"owner: {name}=")
    assert str(raised.value).endswith(wanted)


def test_whole_floats_on_request() -> None:
    assert check_types("o", _function, {"count": 5e8}, whole_floats=True) == {"count": 500_000_000}
    with pytest.raises(ConfigError, match="an integer"):
        check_types("o", _function, {"count": 0.5}, whole_floats=True)


def test_a_misspelt_name_gets_the_closest_as_a_suggestion() -> None:
    known = ["stage", "expert_parallel_size", "num_experts", "nonfinite"]
    assert suggestion("expert_parallel", known) == " Did you mean expert_parallel_size?"
    assert suggestion("num_expert", known) == " Did you mean num_experts?"
    assert suggestion("non_finite", known) == " Did you mean nonfinite?"
    assert suggestion("zzz", known) == ""
    with pytest.raises(ConfigError, match="owner has no argument 'stag'. Did you mean stage"):
        check_known("owner", ["stag"], known)
    assert describe(int | Literal["auto"]) == "an integer or 'auto'"


ARGUMENTS = {"d_model": 8, "d_ffn": 8, "num_experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("d_model", "8", "an integer"),
        ("d_ffn", True, "an integer or None"),
        ("num_experts", 4.0, "an integer or None"),
        ("top_k", "2", "an integer or None"),
        ("activation", None, "a string"),
        ("bias", "no", "True or False"),
        ("normalize_weights", 1, "True or False or None"),
        ("router_options", [1], "a dict or None"),
        ("shared_expert", "8", "an integer or Module or None"),
        ("shared_expert_gate", "yes", "True or False"),
        ("dispatcher", 1, "a string"),
        ("init_std", "0.02", "a number or None"),
        ("autoregressive", 1, "True or False"),
        ("load_balancing", "0.01", "a number or None"),
        ("z_loss", True, "a number or None"),
    ],
)
def test_the_layer_refuses_values_of_a_wrong_type(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as raised:
        MoE(**{**ARGUMENTS, name: value})
    assert str(raised.value).startswith(f"MoE: {name}={value!r} ")
    assert str(raised.value).endswith(f"it must be {wanted}.")


def test_the_layer_takes_numpy_sizes() -> None:
    sizes = {name: np.int64(value) for name, value in ARGUMENTS.items()}
    layer = MoE(**sizes, z_loss=np.float32(0.25))
    assert (layer.num_experts, layer.top_k, layer.loss_coefficients["z_loss"]) == (4, 2, 0.25)
    assert {type(layer.num_experts), type(layer.d_model), type(layer.top_k)} == {int}


STRATEGY = [
    ({"expert_parallel": 2}, "has no argument 'expert_parallel'. Did you mean expert_parallel_"),
    ({"ofload_optimizer": True}, "'ofload_optimizer'. Did you mean offload_optimizer?"),
    ({"stage": "2"}, "stage='2' (str) is invalid: it must be the integer 1, 2 or 3"),
    ({"stage": True}, "stage=True (bool) is invalid: it must be the integer 1, 2 or 3"),
    ({"stage": None}, "it must be the integer 1, 2 or 3"),
    ({"stage": 2.0}, "stage=2.0 (float) is invalid: it must be an integer"),
    ({"expert_parallel_size": "2"}, "it must be 'auto' or an integer of at least 1"),
    ({"expert_parallel_size": 0}, "it must be 'auto' or an integer of at least 1"),
    ({"expert_parallel_size": 2.0}, "it must be 'auto' or an integer of at least 1"),
    ({"expert_parallel_size": [2]}, "it must be an integer or 'auto'"),
    ({"nonfinite": True}, "nonfinite=True is unknown. It must be one of: raise, skip, ignore"),
    ({"async_checkpoint": "yes"}, "async_checkpoint='yes' (str) is invalid: it must be True or F"),
    ({"verify_checkpoints": 0}, "verify_checkpoints=0 (int) is invalid: it must be True or False"),
    ({"trust_checkpoints": None}, "trust_checkpoints=None (NoneType) is invalid: it must be True"),
    ({"offload_optimizer": "cpu"}, "offload_optimizer='cpu' (str) is invalid: it must be True or"),
    ({"reduce_bucket_size": "big"}, "reduce_bucket_size='big' (str) is invalid: it must be an in"),
    ({"timeout": 30}, "timeout=30 (int) is invalid: it must be timedelta or None"),
    ({"precision_plugin": "bf16"}, "it must be Precision or None"),
    ({"zero_optimization": False}, "zero_optimization=False is refused"),
    ({"config": 3}, "config=3 (int) is invalid"),
]


@pytest.mark.parametrize(("arguments", "wanted"), STRATEGY, ids=lambda v: str(v)[:30])
def test_the_strategy_refuses_unknown_names_and_wrong_types(
    arguments: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        FastMoEStrategy(**arguments)
    assert wanted in str(raised.value)
    if "zero_optimization" not in arguments:
        assert "FastMoEStrategy" in str(raised.value)


@pytest.mark.parametrize("stage", [4, -1, 22])
def test_stages_that_do_not_exist_are_refused(stage: int) -> None:
    with pytest.raises(ConfigError) as raised:
        FastMoEStrategy(stage=stage)
    assert f"stage={stage} is not supported" in str(raised.value)
    assert "clipping" not in str(raised.value)  # that is why stage 0 is refused


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, "sets no ZeRO stage"),
        ({"zero_optimization": True}, "sets no ZeRO stage"),
        ({"zero_optimization": {}}, "sets no ZeRO stage"),
        ({"zero_optimization": {"stage": "2"}}, "stage='2' is not supported"),
        ({"zero_optimization": {"stage": 0}}, "stage=0 is not supported"),
    ],
)
def test_stage_of_a_config(config: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        FastMoEStrategy(config=config)


def test_what_a_config_overrules_is_refused() -> None:
    config = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ConfigError, match=r"stage=3 has no effect.*stage to 2"):
        FastMoEStrategy(stage=3, config=config)
    with pytest.raises(ConfigError, match="offload_optimizer=True has no effect with config="):
        FastMoEStrategy(offload_optimizer=True, config=config)
    assert FastMoEStrategy(stage=2, config=dict(config)).config["zero_optimization"]["stage"] == 2


def test_the_strategy_takes_numpy_numbers() -> None:
    strategy = FastMoEStrategy(np.int64(2), stage=np.int32(1), reduce_bucket_size=5e8)
    assert type(strategy.expert_parallel_size) is int
    zero = strategy.config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (1, 500_000_000)
    assert type(zero["stage"]) is int
    assert FastMoEStrategy(logging_level="ERROR").config["zero_optimization"]["stage"] == 2
