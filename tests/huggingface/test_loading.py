"""Each rank reads its own experts only, and trains as if it had read the whole model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface.loading_runs import finetunes, outcome
from huggingface.sharding_runs import MORE_MODELS, Run, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import from_pretrained, loading
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.placement import Placement, expert_placement


def saved(folder: Path, family: str, original: bool = True) -> Path:
    """The files of a small model, its experts one by one as on the Hub, or stacked."""
    make_model(Run(family)).save_pretrained(folder, save_original_format=original)
    return folder


def half(part: int) -> Any:
    """The placement of every second of two ranks."""
    return lambda n: Placement(tuple(range(part * n // 2, (part + 1) * n // 2)))


@pytest.mark.parametrize("original", [True, False], ids=["one by one", "stacked"])
@pytest.mark.parametrize("family", MORE_MODELS)
def test_a_rank_reads_the_rows_of_its_experts(family, original, tmp_path):
    folder = saved(tmp_path, family, original)
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="fastmoe"
    )
    for part in (0, 1):
        with expert_placement(half(part)):
            own = from_pretrained(folder)
        assert list(expert_layers(own))
        for (name, found), right in zip(own.named_parameters(), whole.parameters(), strict=True):
            wanted = right
            if ".experts." in name:
                wanted = right.chunk(2)[part]
                assert found.shape[0] == right.shape[0] // 2
            assert torch.equal(found, wanted), name
            assert found.dtype == wanted.dtype
        for (name, found), right in zip(own.named_buffers(), whole.buffers(), strict=True):
            assert torch.equal(found, right), name


def test_no_more_is_read(tmp_path, monkeypatch):
    """Of all bytes of experts, one half each; and the function of transformers is put back."""
    folder = saved(tmp_path, "qwen3_moe")
    seen: list[str] = []
    real = loading._own_rows

    def own_rows(*args: Any) -> Any:
        found = real(*args)
        seen.extend(found)
        return found

    monkeypatch.setattr(loading, "_own_rows", own_rows)
    before = transformers.PreTrainedModel._load_pretrained_model
    with expert_placement(half(1)):
        from_pretrained(folder)
    assert transformers.PreTrainedModel._load_pretrained_model is before
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    experts = [name for name in seen if ".experts." in name]
    assert len(experts) == sum(".experts." in name for name in names) / 2
    assert {int(name.split(".experts.")[1].split(".")[0]) for name in experts} == {4, 5, 6, 7}
    assert len(seen) - len(experts) == sum(".experts." not in name for name in names)


def test_memory_is_that_of_a_share(tmp_path):
    """A rank with an eighth of 200 MiB of experts grows by far less than one that has them all."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 1024, "num_experts": 32}
    make_model(Run("qwen3_moe"), **sizes).save_pretrained(tmp_path)
    grown = []
    for shards in (1, 8):
        command = [sys.executable, "-m", "huggingface.loading_runs", str(tmp_path), str(shards)]
        tests = str(Path(__file__).parents[1])
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=280, check=True, cwd=tests
        )
        grown.append(int(done.stdout.split()[-1]))
    assert grown[0] > 190
    assert grown[1] < 80


def test_without_a_strategy_it_is_transformers_own(tmp_path):
    folder = saved(tmp_path, "mixtral")
    model, info = from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not info["missing_keys"]
    assert model.config._experts_implementation == "fastmoe"
    assert all(layer.num_local_experts == 4 for _, layer in expert_layers(model))
    base = from_pretrained(folder, auto_class=transformers.AutoModel)
    assert type(base).__name__ == "MixtralModel"


@pytest.mark.parametrize(
    "run",
    [Run("qwen3_moe", stage=stage) for stage in (1, 2, 3)]
    + [Run("gpt_oss", stage=2), Run("mixtral", world=4, ep=2, stage=3), Run("olmoe", ep="auto")],
    ids=lambda run: f"{run.name}-{run.world}-{run.ep}-{run.stage}",
)
def test_training_is_that_of_a_model_that_was_read_whole(run, tmp_path, rank_pool):
    folder = saved(tmp_path, run.name)
    whole = rank_pool.run(finetunes, run.world, run, folder, False)
    own = rank_pool.run(finetunes, run.world, run, folder, True)
    for (losses, weights, _), (found, last, built) in zip(whole, own, strict=True):
        count = {"gpt_oss": 4, "mixtral": 4}.get(run.name, 8)
        assert built == [count // 2] * 2
        assert len(found) == run.steps
        assert found == losses
        assert last.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(last[name], weight), name


def test_data_parallel_reads_all(tmp_path, rank_pool):
    folder = saved(tmp_path, "mixtral")
    for _, _, built in rank_pool.run(finetunes, 2, Run("mixtral", ep=1), folder, True):
        assert built == [4, 4]


def changed(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


FIRST = "model.layers.0.mlp.experts"
IDS = range(8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(f"{FIRST}.5.up_proj.weight"), r"experts \[0, 1, 2, 3, 4, 6, 7\] of model"),
        (lambda t: t.pop("model.norm.weight"), r"no weights for 1 parameters.*model.norm.weight"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(FIRST)],
            "no weights for 2 parameters",
        ),
        (
            lambda t: t.update({f"{FIRST}.8.up_proj.weight": t[f"{FIRST}.7.up_proj.weight"] + 0}),
            r"experts \[0, 1, 2, 3, 4, 5, 6, 7, 8\] of model.*the model has 8",
        ),
        (
            lambda t: t.update({f"{FIRST}.8.bias": torch.ones(2), "model.new": torch.ones(2)}),
            rf"no parameter for.*: {FIRST}.8.bias, model.new\.",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"other shapes than .*: model.norm.weight is \(3,\), not \(16,\)",
        ),
        (
            lambda t: t.update({f"{FIRST}.{i}.down_proj.weight": torch.ones(3, 12) for i in IDS}),
            rf": {FIRST}.down_proj is \(4, 3, 12\), not \(4, 16, 12\)",
        ),
        (
            lambda t: t.update({f"{FIRST}.5.down_proj.weight": torch.ones(3, 12)}),
            rf"{FIRST}.5.down_proj.weight .* shape \(3, 12\), and other experts' have \(16, 12\)",
        ),
    ],
)
def test_files_of_another_model_are_refused_by_each_rank(change, reason, tmp_path):
    folder = changed(saved(tmp_path, "qwen3_moe"), change)
    for part in (0, 1):
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with expert_placement(half(part)), pytest.raises(ConfigError, match=reason):
                from_pretrained(folder, **options)


def test_a_head_that_was_not_asked_for_is_left_out(tmp_path):
    """But nothing of the base model is, whether its names have the prefix or not."""
    folder = saved(tmp_path / "head", "qwen3_moe")
    with expert_placement(half(0)):
        base = from_pretrained(folder, auto_class=transformers.AutoModel)
        assert type(base).__name__ == "Qwen3MoeModel"
        make_model(Run("qwen3_moe")).model.save_pretrained(tmp_path / "base")
        for source, name in ((folder, "model.layers.0.x"), (tmp_path / "base", "layers.0.x")):
            changed(source, lambda t, name=name: t.update({name: torch.ones(2)}))
            with pytest.raises(ConfigError, match=f"no parameter for.*: {name}"):
                from_pretrained(source, auto_class=transformers.AutoModel)


def test_tied_weights_stay_tied(tmp_path):
    run = Run("mixtral", sizes={"tie_word_embeddings": True})
    make_model(run).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with expert_placement(half(1)):
        model = from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, make_model(run).lm_head.weight)


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "bitsandbytes"])
def test_quantised_weights_are_refused(method, tmp_path):
    folder = saved(tmp_path, "gpt_oss")
    config = json.loads((folder / "config.json").read_text())
    with expert_placement(half(0)):
        with pytest.raises(ConfigError, match="quantised"):
            from_pretrained(folder, quantization_config=transformers.Mxfp4Config())
        config["quantization_config"] = {"quant_method": method}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="Load an unquantised version"):
            from_pretrained(folder)
        with pytest.raises(ConfigError, match="Load an unquantised version"):
            from_pretrained(folder, config=transformers.AutoConfig.from_pretrained(folder))


def test_stacked_experts_of_another_number_are_refused(tmp_path):
    name = "model.layers.1.mlp.experts.down_proj"
    folder = changed(
        saved(tmp_path, "qwen3_moe", original=False),
        lambda t: t.update({name: t[name][:6].clone()}),
    )
    with (
        expert_placement(half(0)),
        pytest.raises(ConfigError, match=r"shape \(6, 16, 12\), which is not a row for each of"),
    ):
        from_pretrained(folder)


def test_what_is_not_read_row_by_row_is_refused(tmp_path):
    folder = saved(tmp_path, "qwen3_moe")
    with expert_placement(half(0)):
        with pytest.raises(ConfigError, match="transformers' own"):
            from_pretrained(folder, experts_implementation="eager")
        with pytest.raises(ConfigError, match="state_dict= was given"):
            from_pretrained(
                None,
                auto_class=transformers.Qwen3MoeForCausalLM,
                config=transformers.AutoConfig.from_pretrained(folder),
                state_dict=load_file(folder / "model.safetensors"),
            )
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(ConfigError, match="not in safetensors files"):
            from_pretrained(folder)


class Mixing:
    """A conversion that nobody knows."""

    dim = 1


class Merge:
    dim = 0


Merge.__name__ = "MergeModulelist"


@pytest.mark.parametrize(
    ("operations", "merges"),
    [([Mixing()], False), ([Merge(), Mixing()], True), ([], True), ([Merge()], False)],
)
def test_conversions_that_may_mix_experts_are_refused(operations, merges):
    with pytest.raises(ConfigError, match="isn't known that it leaves each expert to itself"):
        loading._check_conversion("a", "b", operations, merges=merges)


def test_experts_that_ranks_do_not_divide(tmp_path, rank_pool):
    config = json.loads((saved(tmp_path, "mixtral") / "config.json").read_text())
    config["num_local_experts"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    for said in rank_pool.run(outcome, 2, Run("mixtral"), tmp_path):
        assert said.startswith("TopologyError:"), said
