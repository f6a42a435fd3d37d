"""Runs of sharded models of transformers beyond training: what is refused, and what else works."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from typing import Any

import pytest
import torch
from huggingface.experts_classes import computed_classes, experts_classes, make_experts
from huggingface.sharding_runs import (
    PROMPT,
    Run,
    assert_same,
    chosen_experts,
    fits_again,
    generated,
    make_batches,
    make_model,
    monitored,
    outcome_of,
    outcome_of_unnamed,
    poisoned,
    reference,
    run_case,
    saved_partitioned,
    validated,
    warnings_in_evaluation_mode,
)
from torch import nn

from lightning_fastmoe.errors import ConfigError, ShapeError
from lightning_fastmoe.huggingface import choose_dispatcher
from lightning_fastmoe.huggingface.sharded_experts import TransformersLayer, layer_of
from lightning_fastmoe.monitoring.logs import co_activation, expert_load
from lightning_fastmoe.nn.expert_layers import KINDS, expert_layers
from lightning_fastmoe.planning.sizes import model_size


@pytest.mark.parametrize("ep", [2, "auto"])
def test_another_implementation_is_refused(ep: Any, rank_pool) -> None:
    for said in rank_pool.run(outcome_of, 2, Run(ep=ep), "eager"):
        assert said.startswith("ConfigError: The experts of net.model.layers.0.mlp.experts")
        assert "experts_implementation='eager', which knows one device" in said
        assert 'from_pretrained(..., experts_implementation="fastmoe")' in said
        assert "expert_parallel_size=1" in said
        assert "\n" not in said


@pytest.mark.parametrize("ep", [2, "auto"])
def test_experts_that_checkpoints_cannot_name_are_refused(ep: Any, rank_pool) -> None:
    """Also by "auto", which finds none that it could shard."""
    for said in rank_pool.run(outcome_of_unnamed, 2, Run(ep=ep)):
        assert said.startswith("ConfigError: The experts of net.mine (Qwen3MoeExperts) can't be")


@pytest.mark.parametrize("implementation", ["eager", "fastmoe"])
def test_data_parallel_on_request(implementation: str, rank_pool) -> None:
    assert rank_pool.run(outcome_of, 2, Run(ep=1), implementation) == ["", ""]


def test_experts_that_ranks_do_not_divide(rank_pool) -> None:
    for said in rank_pool.run(outcome_of_five, 2, Run()):
        assert said.startswith("TopologyError:")
        assert "net.model.layers.0.mlp" in said


def outcome_of_five(run: Run) -> str:
    return outcome_of(run, num_experts=5)


def test_local_experts_on_request(rank_pool) -> None:
    for trace in rank_pool.run(train_locally, 2, Run(dispatcher="local")):
        assert_same(trace, reference(Run()))


def train_locally(run: Run) -> Any:
    from huggingface.sharding_runs import train

    trace, _, module = train(run)
    layers = [layer for _, layer in expert_layers(module)]
    assert len(layers) == 2
    assert not any(layer.is_sharded for layer in layers)
    return trace


def in_model(experts: Any) -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})


def tied(experts: Any) -> nn.Module:
    model = in_model(experts)
    other = make_experts(experts_classes()["Qwen3MoeExperts"])
    other.down_proj = experts.down_proj
    model["other"] = nn.ModuleDict({"experts": other})
    return model


def changed(**values: Any) -> Any:
    def change(experts: Any) -> nn.Module:
        for name, value in values.items():
            setattr(experts, name, value)
        return in_model(experts)

    return change


def buffered(experts: Any) -> nn.Module:
    experts.register_buffer("counts", torch.zeros(5))
    return in_model(experts)


def replaced(experts: Any) -> nn.Module:
    """The block computes with its experts' weights itself, as a kernel for it may."""
    model = in_model(experts)
    model["mlp"].forward = lambda x: x @ model["mlp"]["experts"].gate_up_proj[0].T
    return model


REFUSED = {
    "the forward of mlp was replaced": replaced,
    r"down_proj is tied \(mlp.experts.down_proj, other.experts.down_proj\)": tied,
    "scale would be ignored": changed(scale=nn.Parameter(torch.ones(5))),
    "counts has no row for each expert": buffered,
    "act_fn.weight has no row for each expert": changed(act_fn=nn.PReLU()),
    "its forward was replaced": changed(forward=lambda *args: args[0]),
    r"num_experts=4 does not fit \{'gate_up_proj': \(5,": changed(num_experts=4),
    "checkpoints find experts by the name 'experts'": lambda e: nn.ModuleDict({"mine": e}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_sharded_is_refused(reason: str) -> None:
    model = REFUSED[reason](make_experts(experts_classes()["Qwen3MoeExperts"]))
    list(expert_layers(model))  # as the strategy does first
    with pytest.raises(ConfigError, match=reason) as caught:
        [kind.check(model) for kind in KINDS]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", computed_classes())
def test_every_class_can_be_sharded(name: str) -> None:
    model = in_model(make_experts(experts_classes()[name]))
    assert [path for path, _ in expert_layers(model)] == ["mlp"]
    for kind in KINDS:
        kind.check(model)


def test_models_call_their_experts_experts() -> None:
    """The name by which checkpoints find them, in the source of every model."""
    for name, kind in experts_classes().items():
        source = inspect.getsource(sys.modules[kind.__module__])
        named = re.findall(rf"self\.(\w+) = {name}\(", source)
        assert set(named) == {"experts"}, (name, named)


def test_a_copy_is_a_layer_of_its_own() -> None:
    model = in_model(make_experts(experts_classes()["Qwen3MoeExperts"]))
    ((_, layer),) = expert_layers(model)
    twin = copy.deepcopy(model)
    ((_, copied),) = expert_layers(twin)
    assert isinstance(copied, TransformersLayer)
    assert copied is not layer
    assert copied.module is twin["mlp"]["experts"]
    assert [id(p) for p in copied.experts.parameters()] == [id(p) for p in twin.parameters()]


def test_unknown_dispatchers_and_models_without_experts() -> None:
    model = in_model(make_experts(experts_classes()["Qwen3MoeExperts"]))
    with pytest.raises(ConfigError, match="dispatcher='faster' is unknown"):
        choose_dispatcher(model, "faster")
    with pytest.raises(ConfigError, match="the model has no experts of transformers"):
        choose_dispatcher(nn.Linear(2, 2), "dedup")


def test_parameters_are_counted_as_experts() -> None:
    model = make_model(Run())
    size = model_size(model)
    assert size.total == sum(p.numel() for p in model.parameters())
    assert [layer.num_experts for layer in size.layers.values()] == [8, 8]
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert size.active == size.total - experts * 5 // 8  # 3 of 8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_in_evaluation_mode_is_said_to_do_nothing(checkpointing, rank_pool) -> None:
    run = Run(world=1, ep=1, steps=1, checkpointing=checkpointing)
    (said,) = rank_pool.run(warnings_in_evaluation_mode, 1, run)
    found = [text for text in said if "is in evaluation mode" in text]
    assert [text.split()[0] for text in found] == (["net"] if checkpointing else [])


def test_partitioned_weights_are_not_written(rank_pool, tmp_path) -> None:
    """With all experts on every rank, too; small weights stay whole and hide it."""
    run = Run(ep=1, stage=3, steps=1, sizes={"hidden_size": 384})
    for said in rank_pool.run(saved_partitioned, 2, run, tmp_path / "model"):
        assert said.startswith("ConfigError: save_pretrained of Qwen3MoeForCausalLM would write")
        assert "lightning_fastmoe.huggingface.save_pretrained(trainer, path)" in said
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("ep", "compiled"), [(2, False), (1, True), (2, True)])
def test_routers_that_give_nan_stop_all_ranks(ep: int, compiled: bool, rank_pool) -> None:
    for said in rank_pool.run(poisoned, 2, Run(ep=ep, compiled=compiled)):
        assert said.startswith("NonFiniteError: NaN or Inf reached the router of")
        assert "net.model.layers.1.mlp on" in said
        assert "step 1 was not taken" in said


def test_rank_zero_generates_with_the_experts_of_all(rank_pool) -> None:
    run = Run()
    first, second = rank_pool.run(generated, 2, run)
    trace, found, weights, tokens = first
    assert_same(trace, reference(run))
    assert second[1] is None
    assert len(tokens) == 2 * 5
    assert second[3] == [0] * len(tokens)
    model = make_model(run, "eager")
    model.load_state_dict(weights)
    wanted = model.eval().generate(PROMPT, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_evaluation(name: str, stage: int, rank_pool) -> None:
    run = Run(name, stage=stage)
    model = make_model(run, "eager").eval()
    chunks = [batch for step in make_batches(run) for micro in step for batch in micro]
    with torch.no_grad():
        wanted = sum(model(**c, use_cache=False).loss.item() for c in chunks) / len(chunks)
    for found in rank_pool.run(validated, 2, run):
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_another_fit_goes_on_with_the_same_experts(stage: int, rank_pool) -> None:
    run = Run(stage=stage)
    for weights, loss, said in rank_pool.run(fits_again, 2, run):
        model = make_model(run, "eager")
        model.load_state_dict(weights)
        chunks = make_batches(run)[0][0]
        with torch.no_grad():
            wanted = sum(model(**chunk, use_cache=False).loss.item() for chunk in chunks) / 2
        assert abs(loss - wanted) < 1e-5 * wanted
        assert said.startswith("TopologyError: Layer 'net.model.layers.0.mlp' holds 4 of its 8")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_bf16_mixed_is_as_close_as_without_sharding(name: str, stage: int, rank_pool) -> None:
    """A row per (token, rank) is rounded once more than a row per expert."""
    exact = reference(Run(name))

    def errors(ep: int, dispatcher: str) -> dict[str, float]:
        run = Run(name, ep=ep, stage=stage, precision="bf16-mixed", steps=1, dispatcher=dispatcher)
        trace = rank_pool.run(run_case, 2, run)[0]
        return {
            key: float((trace.gradients[key] - g).norm() / g.norm())
            for key, g in exact.gradients.items()
        }

    whole = errors(1, "auto")
    assert max(whole.values()) > 1e-4  # it really computes in bf16
    for dispatcher, most, mean in (("all_to_all", 1.5, 1.1), ("dedup", 2.0, 1.3)):
        sharded = errors(2, dispatcher)
        ratios = [sharded[key] / whole[key] for key in sharded if whole[key]]
        assert sum(ratios) / len(ratios) < mean, (dispatcher, ratios)
        for key, error in sharded.items():
            assert error < max(most * whole[key], 2e-2), (dispatcher, key, error, whole[key])


def test_the_sharded_module_checks_shapes_and_ids() -> None:
    model = in_model(make_experts(experts_classes()["Qwen3MoeExperts"]))
    ((_, layer),) = expert_layers(model)
    layer.experts.keep((1, 2))
    assert layer.is_sharded
    assert layer_of(model["mlp"]["experts"]) is layer
    x, ids = torch.randn(3, 16).double(), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"hidden_states \(1, 3, 16\)"):
        model["mlp"]["experts"](x[None], ids, torch.rand(3, 2))
    with pytest.raises(RuntimeError, match=r"outside of \[0, 5\]"):
        model["mlp"]["experts"](x, ids + 6, torch.rand(3, 2))


@pytest.mark.parametrize(
    ("ep", "compiled", "checkpointing"),
    [
        (1, False, True),
        (2, False, True),
        (1, True, False),
        (1, True, True),
        (2, True, False),
        (2, True, True),
    ],
)
def test_monitors_count_what_the_router_chose(
    ep: int, compiled: bool, checkpointing: bool, rank_pool, tmp_path
) -> None:
    """Once, though gradient checkpointing runs each layer twice; scores are not known."""
    run = Run(ep=ep, steps=1, compiled=compiled, checkpointing=checkpointing)
    logged = rank_pool.run(monitored, 2, run, tmp_path)[0]
    log = expert_load.read(tmp_path / expert_load.FILE_NAME)
    shared = co_activation.read(tmp_path / co_activation.FILE_NAME).layers
    wanted = chosen_experts(run)
    assert [layer.name for layer in log.layers] == list(wanted)
    (record,) = log.records
    assert record.entropy == record.confidence == [None, None]
    for i, (name, batches) in enumerate(wanted.items()):
        ids = torch.cat(batches)
        counts = torch.bincount(ids.flatten(), minlength=8)
        assert record.routed[i] == counts.tolist()
        assert record.tokens[i] == len(ids)
        chosen = torch.zeros(len(ids), 8, dtype=torch.int64).scatter(1, ids, 1)
        assert (shared[i].name, shared[i].together) == (name, (chosen.T @ chosen).tolist())
        largest = float(counts.max() / counts.double().mean())
        assert logged[f"moe/{name}/max_load"] == pytest.approx(largest, rel=1e-6)
        assert logged[f"moe/{name}/drop_rate"] == 0
        assert f"moe/{name}/entropy" not in logged
