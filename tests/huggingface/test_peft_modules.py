"""Configurations of PEFT beside adapters of experts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface.lora_runs import (
    ALPHA,
    RANK,
    AdaptedAs,
    fits_parameters,
    parameters_adapted_by_peft,
    reference,
    saves_by_configuration,
)
from huggingface.sharding_runs import Run, assert_close, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import add_lora, load_adapters
from lightning_fastmoe.huggingface.peft_modules import check_base_weights, linear_adapters

IDS = torch.arange(3, 20)[None]
ONE = Run(world=1, ep=1, stage=2)


def peft_model(run: Run, **options: Any) -> Any:
    return get_peft_model(make_model(run), LoraConfig(r=RANK, lora_alpha=ALPHA, **options))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
        ({"bias": "all"}, "o_proj.bias"),
        ({"bias": "lora_only"}, "q_proj.base_layer.bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta.default"),
    ],
)
def test_whatever_peft_trains_stays_trainable(options: dict[str, Any], part: str) -> None:
    model = peft_model(Run("gpt_oss"), target_modules=["q_proj"], **options)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith(part) for name in before)
    added = add_lora(model, RANK)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before | {*added}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "up_proj"]])
def test_experts_with_adapters_of_peft_are_refused(targets: Any) -> None:
    model = peft_model(ONE, target_modules=targets)
    with pytest.raises(ConfigError, match="PEFT has put adapters of its own on the experts"):
        add_lora(model, RANK)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["down_proj", "q_proj"], "alpha_pattern": {"down_proj": 3 * ALPHA}},
        {"target_modules": ["down_proj", "q_proj"], "rank_pattern": {"down_proj": RANK + 1}},
        {"target_modules": ["down_proj", "lm_head"], "exclude_modules": r".*\.1\..*"},
    ],
)
def test_layers_that_are_called_as_experts_parameters_are(
    options: dict[str, Any], rank_pool, tmp_path: Path
) -> None:
    """PEFT would apply a pattern of "down_proj" to the experts' parameter of that name, too."""
    run = Run("nemotron_h", world=1, ep=1, stage=2)
    (found,) = rank_pool.run(saves_by_configuration, 1, run, tmp_path, options)
    weights, refused = found
    assert not refused
    trained = AdaptedAs(run, options).net
    trained.load_state_dict(weights, strict=False)
    want = trained(IDS, use_cache=False).logits
    theirs = PeftModel.from_pretrained(make_model(run, "eager"), tmp_path / "adapters")
    assert_close(theirs(IDS, use_cache=False).logits, want, "PEFT")
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", experts_implementation="eager"
    )
    assert_close(merged(IDS, use_cache=False).logits, want, "merged")
    again = peft_model(run, **options)
    load_adapters(again, tmp_path / "adapters")
    assert_close(again(IDS, use_cache=False).logits, want, "ours")


def test_an_adapter_of_a_tied_head_is_not_merged(rank_pool, tmp_path: Path) -> None:
    """Files have no weight of its own for the head, so they would lose it."""
    run = Run("qwen3_moe", world=1, ep=1, stage=2, sizes={"tie_word_embeddings": True})
    options = {"target_modules": ["lm_head"]}
    ((weights, refused),) = rank_pool.run(saves_by_configuration, 1, run, tmp_path, options)
    (error,) = refused
    assert "merged: save_pretrained: " in error
    assert "adapter of net.base_model.model.lm_head.weight, which is tied" in error
    trained = AdaptedAs(run, options).net
    trained.load_state_dict(weights, strict=False)
    want = trained(IDS, use_cache=False).logits
    theirs = PeftModel.from_pretrained(make_model(run, "eager"), tmp_path / "adapters")
    assert_close(theirs(IDS, use_cache=False).logits, want, "PEFT")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("options", "copy"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
        ({"trainable_token_indices": [1, 2]}, "embed_tokens.token_adapter."),
    ],
)
def test_weights_that_peft_trains_in_copies_are_not_left_out(
    options: dict[str, Any], copy: str, tied: bool, rank_pool, tmp_path: Path
) -> None:
    run = replace(ONE, sizes={"tie_word_embeddings": tied})
    options = {"target_modules": ["q_proj"], **options}
    ((_, refused),) = rank_pool.run(saves_by_configuration, 1, run, tmp_path, options)
    adapters, merged = refused
    assert "save_adapters would not save 1 other trained parameters" in adapters
    assert "weights that PEFT trains in copies" in merged
    assert copy in merged
    assert not [*tmp_path.iterdir()]


def test_disabled_adapters_are_refused() -> None:
    model = peft_model(ONE, target_modules=["q_proj"])
    with model.disable_adapter(), pytest.raises(ConfigError, match="q_proj's adapter is disabled"):
        linear_adapters(model)
    assert len(linear_adapters(model)) == 2


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora"])
def test_adapters_that_change_the_weights_beside_them(init: Any, tmp_path: Path) -> None:
    """Files of adapters belong to the weights that the model came with."""
    model = peft_model(ONE, target_modules=["q_proj"], init_lora_weights=init)
    own = make_model(ONE).model.layers[0].self_attn.q_proj.weight
    now = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
    config = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": init}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    if torch.equal(own, now):
        check_base_weights(model.get_base_model())
        with pytest.raises(ConfigError, match="has nothing for .*q_proj"):
            load_adapters(model, tmp_path)
        return
    assert init in ("pissa", "olora")
    for refuses in (
        lambda: check_base_weights(model.get_base_model()),
        lambda: load_adapters(model, tmp_path),
        lambda: load_adapters(make_model(ONE), tmp_path),
    ):
        with pytest.raises(ConfigError, match=f"init_lora_weights='{init}' changes the weights"):
            refuses()


def test_models_that_peft_has_changed_in_place(tmp_path: Path) -> None:
    """transformers' add_adapter makes no wrapper; nor has a wrapper's own model one."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    changed = make_model(ONE)
    changed.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"]))
    for model in (changed, peft_model(ONE, target_modules=["q_proj"]).get_base_model()):
        with pytest.raises(ConfigError, match="has nothing for .*q_proj"):
            load_adapters(model, tmp_path)


@pytest.mark.parametrize(
    ("ep", "stage", "match"),
    [
        (2, 2, r"layers\.0\.mlp\.experts.* can't be sharded over ranks: PEFT's target_parameters"),
        (2, 3, r"layers\.0\.mlp\.experts.* can't be sharded over ranks: PEFT's target_parameters"),
        (1, 3, r"layers\.0\.mlp\.experts.* adapts its parameter down_proj .* ZeRO stage 3"),
    ],
)
def test_parameters_that_peft_replaces_are_refused(
    ep: int, stage: int, match: str, tmp_path: Path, rank_pool: Any
) -> None:
    run = Run(world=2, ep=ep, stage=stage, steps=1)
    for found in rank_pool.run(fits_parameters, 2, run, tmp_path / "a.ckpt"):
        assert re.search(match, found), found
        assert "add_lora" in found


def test_parameters_that_peft_replaces_train_on_one_rank_each(
    tmp_path: Path, rank_pool: Any
) -> None:
    """As with transformers' own experts, whose weights PEFT makes as a whole, too."""
    run = Run(world=2, ep=1, stage=2, steps=2)
    expected = reference(run, parameters_adapted_by_peft(run, "eager"))
    assert any("lora_A" in name for name in expected[0])
    for weights in rank_pool.run(fits_parameters, 2, run, tmp_path / "a.ckpt"):
        for own, twin in zip(weights, expected, strict=True):
            for name, weight in twin.items():
                assert_close(own[name], weight, name)
