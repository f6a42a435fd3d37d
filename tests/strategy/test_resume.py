"""Resuming on the same topology equals not having stopped; what does not fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from strategy import resume_runs as runs
from strategy.models import OPTIMIZERS, Case, build_net, loss_of, make_batches

from lightning_fastmoe.checkpoint import CheckpointReader

# ------------------------------------------------------------------------------- the same numbers


def case_of(world=2, stage=2, accumulate=1, **kwargs) -> Case:
    return Case(world, 2, stage, accumulate, steps=runs.STEPS, **kwargs)


RUNS = [
    (case_of(stage=1), "cosine"),
    (case_of(stage=2, accumulate=2), "lambda"),
    (case_of(stage=2, in_configure_model=True), "cosine"),
    (case_of(stage=3, accumulate=2, in_configure_model=True), "cosine"),
    (case_of(world=4, stage=3, accumulate=2), "lambda"),
    (case_of(stage=2, precision="bf16-mixed"), "cosine"),
]


RUNS += [(case_of(stage=2, optimizer=kind), "cosine") for kind in OPTIMIZERS if kind != "AdamW"]
RUNS += [(case_of(stage=3, optimizer="SGD"), "cosine")]


def ident(value) -> str:
    if isinstance(value, Case):
        names = (value.precision, value.optimizer)
        return f"world{value.world}-zero{value.stage}-acc{value.accumulate}-{'-'.join(names)}"
    return value


def assert_equal(actual, expected, what) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), f"{what}: {name}"


@pytest.mark.parametrize(("case", "scheduler"), RUNS, ids=ident)
def test_resuming_changes_no_bit(rank_pool, tmp_path, case, scheduler):
    results = rank_pool.run(runs.straight_and_resumed, case.world, case, scheduler, str(tmp_path))
    split = runs.FIRST * case.accumulate
    for straight, first, rest in results:
        assert len(straight.losses) == runs.STEPS * case.accumulate
        assert len(set(straight.losses)) > runs.STEPS // 2
        assert len({tuple(rates) for rates in straight.rates}) == runs.STEPS
        assert first.losses == straight.losses[:split]
        assert rest.losses == straight.losses[split:]
        assert rest.norms == straight.norms[runs.FIRST :]
        assert rest.rates == straight.rates[runs.FIRST :]
        assert_equal(rest.start, straight.weights[runs.FIRST - 1], "right after loading")
        for own, twin in zip(rest.weights, straight.weights[runs.FIRST :], strict=True):
            assert_equal(own, twin, "after a resumed step")
        assert rest.steps_seen == straight.steps_seen == runs.STEPS * case.accumulate


def test_every_expert_is_found_under_its_global_id(rank_pool, tmp_path):
    case = case_of(world=4, stage=2)
    first = rank_pool.run(runs.fit, 4, case, "cosine", 1, 7, str(tmp_path), None)[0]
    with CheckpointReader(tmp_path / "last.ckpt") as reader:
        saved = {n: reader.read(n) for n in reader.manifest.tensors if n.startswith("weights/net.")}
    weights = first.weights[-1]
    assert saved.keys() == {f"weights/net.{name}" for name in weights}
    assert sum(".experts." in name for name in weights) == 6
    for name, weight in weights.items():
        assert torch.equal(saved[f"weights/net.{name}"], weight)
        if ".experts." in name and "bias" not in name:
            assert len({tuple(expert.flatten().tolist()) for expert in weight}) == len(weight)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_validating_a_checkpoint_gives_the_saved_models_value(rank_pool, tmp_path, stage):
    case = case_of(stage=stage)
    weights = rank_pool.run(runs.fit, 2, case, "cosine", runs.FIRST, 7, str(tmp_path), None)[0]
    path = str(tmp_path / "last.ckpt")
    losses = rank_pool.run(runs.validate, 2, case, path)
    net = build_net(case.num_experts, case.coefficients).eval()
    net.load_state_dict(weights.weights[-1])
    with torch.no_grad():
        expected = sum(float(loss_of(net, batch)) for batch in make_batches(case)[0, 0]) / 2
    for loss in losses:
        assert abs(loss - expected) <= 1e-6 * expected


# ------------------------------------------------------------------------------------- refusals


@pytest.fixture
def last(rank_pool, tmp_path) -> Path:
    """A checkpoint of two ranks."""
    rank_pool.run(runs.save, 2, case_of(), str(tmp_path))
    return tmp_path / "last.ckpt"


def refused(rank_pool, path, world=2) -> list[str]:
    errors = rank_pool.run(runs.resume, world, case_of(world=world), str(path))
    assert [name for name, _ in errors] == ["CheckpointError"] * world
    return [message for _, message in errors]


def test_another_number_of_experts_is_refused_by_name(rank_pool, last):
    for error in rank_pool.run(runs.resume, 2, case_of(num_experts=(4, 4)), str(last)):
        assert error[0] == "CheckpointError"
        assert "layer 'net.moes.1' has 8 experts there, but here num_experts=4" in error[1]


def test_a_missing_directory_is_refused(rank_pool, tmp_path):
    for message in refused(rank_pool, tmp_path / "nowhere.ckpt"):
        assert "nowhere.ckpt does not exist" in message


def test_an_incomplete_checkpoint_is_refused(rank_pool, last):
    (last / "manifest.sha256").unlink()
    for message in refused(rank_pool, last):
        assert "has no manifest.json" in message


NAMES = [
    "rank_00001.json",
    "weights_00001.safetensors",
    "optimizer_00000.safetensors",
    "state.json",
]


def test_a_damaged_file_stops_all_ranks_with_one_message(rank_pool, last, tmp_path):
    damages = {(name, kind) for name in NAMES for kind in ("missing", "cut", "flipped")}
    paths = {}
    for name, kind in sorted(damages):
        copy = shutil.copytree(last, tmp_path / f"{kind}-{name}")
        paths[name, kind] = str(copy)
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1
        (copy / name).unlink()
        if kind != "missing":
            (copy / name).write_bytes(data[: len(data) // 2] if kind == "cut" else data)
    errors = rank_pool.run(runs.resume_all, 2, case_of(), list(paths.values()))
    assert errors[0] == errors[1]
    for (name, kind), (error, message) in zip(paths, errors[0], strict=True):
        assert error == "CheckpointError", (name, kind)
        assert f"{kind}-{name}/{name}" in message


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_of_other_parameters_is_refused(rank_pool, tmp_path, stage):
    for name, message in rank_pool.run(runs.other_model, 2, case_of(stage=stage), str(tmp_path)):
        assert name == "CheckpointError"
        assert "net.more.weight" in message


def test_states_of_a_whole_partition_are_refused(rank_pool, tmp_path):
    """As factored optimizers keep them: they fit no other ranks."""
    path = str(tmp_path / "a.ckpt")
    for name, message in rank_pool.run(runs.factored_states, 2, case_of(), path):
        assert name == "CheckpointError"
        assert "Factored keeps a state 'row' of shape (3,)" in message
        assert "AdamW" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", [2, 3])
def test_without_strict_loading_what_matches_is_taken(rank_pool, tmp_path, stage):
    case = case_of(stage=stage)
    for expected, found, steps in rank_pool.run(runs.not_strict, 2, case, str(tmp_path)):
        assert_equal(found, expected, "after loading")
        assert {"more.weight", "embed.weight", "moes.1.experts.up_proj"} <= found.keys()
        assert steps == 1


def test_only_plain_data_is_loaded_unless_asked(rank_pool, tmp_path):
    results = rank_pool.run(runs.not_plain_data, 2, case_of(), str(tmp_path))
    assert any("fractions.Fraction" in message for message in results[0][0])
    for _, error, loaded in results:
        assert error[0] == "CheckpointError"
        assert "objects.pt" in error[1]
        assert "add_safe_globals" in error[1]
        assert [str(value) for value in loaded] == ["1/3", "1/3"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_weights_alone_validates_but_does_not_resume(rank_pool, tmp_path, stage):
    case = case_of(stage=stage)
    for full, light, error in rank_pool.run(runs.weights_only, 2, case, str(tmp_path)):
        assert full == light
        assert error[0] == "CheckpointError"
        assert "saved with weights only" in error[1]


def test_saving_never_deletes_what_is_no_checkpoint(rank_pool, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for name, message in rank_pool.run(runs.save_into, 2, case_of(), str(tmp_path)):
        assert name == "CheckpointError"
        assert "thesis.txt" in message
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
