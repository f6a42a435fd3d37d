"""Checkpoints of experts that are modules: who writes what, other models, the tools.

That they resume on other ranks is a part of test_reshard.py and test_midway.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from checkpoint.samples import read_manifest, write_manifest_again
from safetensors.torch import load_file
from strategy import reshard_runs
from strategy.expert_modules import Plain, build_modules
from strategy.models import D_FFN, D_MODEL
from strategy.reshard_runs import Layout, WithModules
from strategy.resume_runs import error_of, trainer_for
from strategy.tracing import whole_weights
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.format.tensor_names import split_name
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.cli import main
from lightning_fastmoe.errors import CheckpointError


class Keep(pl.Callback):
    """The weights while the model is sharded, and this rank's buffers."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        saved = pl_module.state_dict().keys()
        self.state = {f"net.{n}": w for n, w in whole_weights(pl_module.net).items()}
        self.state |= {n: b.clone() for n, b in pl_module.named_buffers() if n in saved}


def validated(layout: Layout, module: pl.LightningModule, path: str | None) -> dict[str, Tensor]:
    """The state of a model that is validated: weights of all experts, buffers of this rank's."""
    keep = Keep()
    trainer = trainer_for(layout.case(), 1, limit_val_batches=1, callbacks=[keep])
    trainer.validate(module, ckpt_path=path, verbose=False)
    return keep.state


def load(layout: Layout, path: str, strict: bool = True) -> dict[str, Tensor]:
    """From a checkpoint or file."""
    pl.seed_everything(9, verbose=False)
    module = layout.module()
    module.strict_loading = strict
    return validated(layout, module, path)


class FromWeights(WithModules):
    """Fills itself while it is built; each rank has created its own experts alone."""

    path = ""

    def configure_model(self) -> None:
        super().configure_model()
        load_weights(self.path, self)


def start_from(layout: Layout, path: str) -> dict[str, Tensor]:
    """The same by ``load_weights``."""
    pl.seed_everything(9, verbose=False)
    module = FromWeights(layout.case(), layout.experts)
    module.path = path
    return validated(layout, module, None)


class Other(WithModules):
    """A model that differs from the checkpoint's."""

    change = ""

    def build(self) -> nn.ModuleDict:
        if self.change == "more experts":
            return build_modules(self.experts, (8, 8))
        if self.change == "fewer experts":
            return build_modules(self.experts, (4, 4))
        if self.change == "another kind":
            return build_modules("class")
        net = super().build()
        experts = net["moes"][0].experts
        if 3 in experts.local_ids:
            last = experts.get_submodule("3")
            if self.change == "another shape":
                last.up, last.down = nn.Linear(D_MODEL, 99), nn.Linear(99, D_MODEL)
            if self.change == "one more parameter":
                last.more = nn.Parameter(torch.ones(2))
        return net


def loading_another(layout: Layout, path: str, change: str, strict: bool) -> tuple[str, str]:
    """The error of loading into a model that differs."""
    pl.seed_everything(9, verbose=False)
    module = Other(replace(layout.case(), stage=layout.stage), layout.experts)
    module.change, module.net = change, None
    module.strict_loading = strict
    return error_of(validated, layout, module, path)


def resuming(layout: Layout, path: str) -> tuple[str, str]:
    """The error of going on from a file."""
    return error_of(trainer_for(layout.case(), 6).fit, layout.module(), ckpt_path=path)


def training(layout: Layout) -> tuple[str, str]:
    """The error of training at all."""
    return error_of(trainer_for(layout.case(), 2).fit, layout.module())


class WithExtraState(Plain):
    """Keeps something that is neither parameter nor buffer."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class WithLayer(Plain):
    """Has experts of its own inside."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__(d_model, d_ffn)
        self.inner = MoE(d_model, d_ffn, 2, dispatcher="local")


def sharing(num_experts: int) -> list[nn.Module]:
    """Experts that share a matrix."""
    modules = [Plain(D_MODEL, D_FFN) for _ in range(num_experts)]
    for module in modules[1:]:
        module.up.weight = modules[0].up.weight
    return modules


class Odd(WithModules):
    """Has experts that can't be saved from several ranks."""

    def build(self) -> nn.ModuleDict:
        net = super().build()
        kinds: dict[str, Any] = {"extra": WithExtraState, "inner": WithLayer, "shared": sharing(4)}
        net["moes"][0] = MoE(D_MODEL, D_FFN, 4, expert=kinds[self.experts])
        return net


def refusals(layout: Layout, directory: str) -> list[tuple[str, str]]:
    """What is said at set-up, and of saving by hand."""
    said = []
    for enabled in (True, False):
        pl.seed_everything(7, verbose=False)
        module = Odd(layout.case(), layout.experts)
        trainer = trainer_for(
            layout.case(), 1, enable_checkpointing=enabled, default_root_dir=directory
        )
        error = error_of(trainer.fit, module)
        if not error[1]:
            error = error_of(trainer.save_checkpoint, f"{directory}/by_hand.ckpt")
        said.append(error)
    return said


SAVED = Layout(4, 2, 2, experts="ragged")
ON_TWO, ON_FOUR = Layout(2, 2, 2, experts="ragged"), Layout(4, 4, 1, experts="ragged")
ON_ONE = Layout(1, 1, 3, experts="ragged")
LAST = "net.moes.0.experts.3"


@pytest.fixture(scope="module")
def path(rank_pool, tmp_path_factory):
    """Saved after three steps by four ranks, two of them with the same experts."""
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    rank_pool.run(reshard_runs.straight, SAVED.world, SAVED, str(path))
    return path


def weights_in(path) -> dict[str, torch.Tensor]:
    with CheckpointReader(path) as reader:
        names = [n for n in reader.manifest.tensors if split_name(n)[0] is None]
        return {split_name(n)[1]: reader.read(n) for n in names}


def assert_loaded(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """All parameters, and the buffers of some experts, bit by bit; there are tied ones besides."""
    assert {n for n in expected if not n.endswith("scale")} - {"steps_seen"} <= loaded.keys()
    assert any(n.endswith("scale") for n in loaded)
    for name, value in loaded.items():
        stored = expected[name.replace(".second.weight", ".first.weight")]
        assert torch.equal(value, stored), name


@pytest.fixture(scope="module")
def files(path, tmp_path_factory):
    """The weights in single files."""
    directory = tmp_path_factory.mktemp("files")
    names = [str(directory / "model.ckpt"), str(directory / "model.safetensors")]
    for name in names:
        assert main(["checkpoint", "consolidate", str(path), name]) == 0
    return names


def test_each_rank_writes_its_own_experts_and_only_a_part_of_them(path):
    with CheckpointReader(path) as reader:
        tensors = reader.manifest.tensors
    writers: dict[tuple[int, int], set[int]] = {}
    for name, record in tensors.items():
        parts = name.partition(".moes.")[2].split(".")
        if parts[1:2] == ["experts"]:
            ranks = {int(fragment.file[-17:-12]) for fragment in record.fragments}
            writers.setdefault((int(parts[0]), int(parts[2])), set()).update(ranks)
    assert writers.keys() == {(0, e) for e in range(4)} | {(1, e) for e in range(8) if e != 6}
    for (layer, expert), ranks in writers.items():
        owner = expert // (2, 4)[layer]
        assert ranks <= {owner, owner + 2}, (layer, expert)
    assert {len(ranks) for ranks in writers.values()} == {1, 2}


def test_the_manifest_lists_every_expert(path):
    with CheckpointReader(path) as reader:
        experts = reader.manifest.module_experts["net.moes.1"]
        tied = reader.manifest.tied
    assert [len(names) for names in experts] == [5, 6, 5, 6, 5, 6, 0, 6]
    assert experts[0] == ["first.bias", "first.weight", "gain", "out", "second.weight"]
    assert experts[7] == ["down.bias", "down.weight", "scale", "shift", "up.bias", "up.weight"]
    name = "net.moes.1.experts.4"  # on the second rank
    assert tied[f"{name}.second.weight"] == f"{name}.first.weight"


@pytest.mark.parametrize("layout", [ON_TWO, ON_FOUR, ON_ONE], ids=str)
def test_files_load_bit_by_bit(rank_pool, path, files, layout):
    expected = weights_in(path)
    for file in [str(path), *files]:
        for loaded in rank_pool.run(load, layout.world, layout, file):
            assert_loaded(loaded, expected)
    for loaded in rank_pool.run(start_from, layout.world, layout, str(path)):
        assert_loaded(loaded, expected)


def test_a_consolidated_file_makes_a_model(path, files):
    expected = weights_in(path)
    case = Layout(1, 1, 1).case()
    model = WithModules.load_from_checkpoint(
        files[0], case=case, experts="ragged", weights_only=True
    )
    state = model.state_dict()
    tied = {n for n in state if n.endswith("second.weight")}
    assert state.keys() - tied == expected.keys() == load_file(files[1]).keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for name in tied:
        assert torch.equal(state[name], expected[name.replace("second", "first")])


NUMBERS = [
    ("more experts", "layer 'net.moes.0' has 4 experts there, but here num_experts=8"),
    ("fewer experts", "layer 'net.moes.1' has 8 experts there, but here num_experts=4"),
]
FILE_NUMBERS = [
    ("more experts", "layer 'net.moes.0' has no expert 4 in the file, but here num_experts=8"),
    ("fewer experts", "layer 'net.moes.1' has an expert 7 in the file, but here num_experts=4"),
]
SHAPE = ("another shape", f"'{LAST}.up.weight' has the shape [14, 12] there and [99, 12]")


@pytest.mark.parametrize("strict", [True, False])
def test_other_numbers_of_experts_and_other_shapes_are_refused(rank_pool, path, files, strict):
    cases = [(str(path), NUMBERS), (files[0], FILE_NUMBERS), (files[1], FILE_NUMBERS)]
    for file, numbers in cases:
        for change, expected in [*numbers, SHAPE]:
            for kind, said in rank_pool.run(loading_another, 2, ON_TWO, file, change, strict):
                assert (kind, change) == ("CheckpointError", change)
                assert expected in said, said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("another kind", "only in the checkpoint: net.moes.0.experts.0.gain"),
        ("one more parameter", f"only in the model: {LAST}.more. Set strict_loading=False"),
    ],
)
def test_other_names_are_refused_unless_told_otherwise(rank_pool, path, files, change, expected):
    # In a file of plain weights an expert of another kind may also be one that is missing.
    for file in (str(path), files[1])[: 1 if change == "another kind" else 2]:
        for kind, said in rank_pool.run(loading_another, 2, ON_TWO, file, change, True):
            assert kind == "CheckpointError"
            assert expected in said, said
    if change == "one more parameter":
        results = rank_pool.run(loading_another, 2, ON_TWO, str(path), change, False)
        assert results == [("nothing", "")] * 2


def test_an_optimizer_in_a_single_file_is_refused(rank_pool, files):
    for kind, said in rank_pool.run(resuming, 2, ON_TWO, files[0]):
        assert kind == "CheckpointError"
        assert "Resume from it with expert_parallel_size=1 and save" in said


def test_frozen_experts_can_be_left_out(rank_pool, tmp_path):
    """Also those of which rank 0 has never heard."""
    before = Layout(2, 2, 2, exclude_frozen=True, experts="class")
    after = Layout(4, 4, 1, exclude_frozen=True, experts="class")
    path, again = tmp_path / "a.ckpt", tmp_path / "again.ckpt"
    rank_pool.run(reshard_runs.straight, 2, before, str(path))
    rank_pool.run(reshard_runs.resumed, 4, after, str(path), str(again))
    frozen = {f"net.moes.{m}.experts.{e}.down.bias" for m in (0, 1) for e in (1, 3)}
    for file in (path, again):
        with CheckpointReader(file) as reader:
            assert set(reader.manifest.excluded) == {*frozen, "net.norm.weight"}
            assert not {f"weights/{name}" for name in frozen} & reader.manifest.tensors.keys()


@pytest.mark.parametrize(
    ("experts", "match"),
    [
        ("extra", "of layer 'net.moes.0' has an extra state (WithExtraState.get_extra_state)"),
        ("inner", "of layer 'net.moes.0' contains a MoE layer"),
    ],
)
def test_experts_that_no_checkpoint_can_hold_are_refused(rank_pool, tmp_path, experts, match):
    layout = Layout(2, 2, 1, experts=experts)
    for at_setup, by_hand in rank_pool.run(refusals, 2, layout, str(tmp_path)):
        assert at_setup[0] == "ConfigError"
        assert by_hand[0] == "CheckpointError"
        assert match in at_setup[1]
        assert match in by_hand[1]
    assert not list(tmp_path.iterdir())


def test_stage_3_wants_the_same_structure_on_each_rank(rank_pool):
    """DeepSpeed would stop some ranks in the second step, and the others would wait."""
    layout = Layout(4, 4, 3, experts="ragged")
    for kind, said in rank_pool.run(training, 4, layout):
        assert kind == "ConfigError"
        assert said.startswith("The experts of layer 'net.moes.1' have different modules")


def test_groups_of_the_optimizer_correspond(rank_pool):
    """Else norms would be added up that don't belong together."""
    for experts, counts in (("none on one", [2, 2, 2, 0]), ("no vectors on one", [2, 2, 2, 1])):
        layout = Layout(4, 4, 1, experts=experts)
        results = rank_pool.run(training, 4, layout)
        for rank, (kind, said) in enumerate(results):
            other = 0 if rank == 3 else 3
            assert kind == "ParameterGroupError"
            assert f"Rank {other} trains experts in {counts[other]} of" in said


def test_experts_that_share_a_parameter_are_refused(rank_pool, tmp_path):
    layout = Layout(2, 2, 1, experts="shared")
    for _, by_hand in rank_pool.run(refusals, 2, layout, str(tmp_path)):
        assert by_hand[0] == "CheckpointError"
        assert "'net.moes.0.experts.1.up.weight' are one parameter" in by_hand[1]


# ------------------------------------------------------------------------------------------- tools


@pytest.fixture
def copy(path, tmp_path):
    """Laid out anew by the tool, to be damaged."""
    assert main(["checkpoint", "reshard", str(path), str(tmp_path / "b.ckpt"), "--ranks", "3"]) == 0
    return tmp_path / "b.ckpt"


def verify(path, capsys) -> list[str]:
    capsys.readouterr()
    status = main(["checkpoint", "verify", str(path), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert status == (0 if content["ok"] else 1)
    return [damage["message"] for damage in content["damages"]]


def test_verify_finds_nothing_and_diff_no_difference(path, copy, capsys):
    assert verify(path, capsys) == verify(copy, capsys) == []
    assert main(["checkpoint", "diff", str(path), str(copy)]) == 0
    assert "each once" in text_of(["verify", str(copy)], capsys)


def text_of(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    main(["checkpoint", *arguments])
    return capsys.readouterr().out


def test_a_copy_resumes(rank_pool, path, copy):
    for loaded in rank_pool.run(load, 4, ON_FOUR, str(copy)):
        assert_loaded(loaded, weights_in(path))


def test_inspect_shows_kinds_of_experts(path, capsys):
    text = text_of(["inspect", str(path)], capsys)
    assert "6: nothing" in text
    assert (
        "3: down.bias F32 12; down.weight F32 12x14; scale F32 12; shift F32 12; up.bias F32 14"
        in text
    )
    assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
    (first, second) = json.loads(capsys.readouterr().out)["moe_layers"]
    assert [kind["ids"] for kind in first["modules"]] == [[0], [1], [2], [3]]
    assert len(second["modules"]) == 8
    assert first["experts"]["3.up.weight"]["shape"] == [14, 12]


def forge(path, change) -> None:
    content = read_manifest(path)
    change(content)
    write_manifest_again(path, content)


def lose(content) -> None:
    content["module_experts"]["net.moes.1"][6].append("weight")


def lose_layer(content) -> None:
    content["module_experts"]["net.moes.0"].pop()


def forget(content) -> None:
    content["module_experts"]["net.moes.0"][3].remove("up.weight")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lose,
            "layer 'net.moes.1': expert 6 is missing: net.moes.1.experts.6.weight not in any file",
        ),
        (lose_layer, "lists 3 experts of layer 'net.moes.0', which has num_experts=4"),
        (forget, f"tensor '{LAST}.up.weight' does not belong to any expert of layer 'net.moes.0'"),
    ],
)
def test_a_lost_expert_is_found(copy, capsys, change, expected):
    forge(copy, change)
    found = verify(copy, capsys)
    assert len(found) == 1
    assert expected in found[0]
    with pytest.raises(CheckpointError, match=r"experts"):
        CheckpointReader(copy)


@pytest.mark.parametrize("value", [[], {"net.moes.0": 4}, {"net.moes.0": [3]}])
def test_a_malformed_list_is_refused(copy, capsys, value):
    forge(copy, lambda content: content.update(module_experts=value))
    assert any("module_experts" in message for message in verify(copy, capsys))
