"""Damaged and forged checkpoints are refused by name, before anything is allocated or run."""

from __future__ import annotations

import os
import shutil
import zipfile

import pytest
import torch
from checkpoint.format.forgeries import EXTRA, FORGED, HEADERS, KEY, W0, W1, pickled, with_extra
from checkpoint.samples import (
    add_file,
    forge_file,
    make_tensors,
    read_manifest,
    split_header,
    write_manifest_again,
    write_sample,
    write_state,
)

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.tools.verify import Audit
from lightning_fastmoe.errors import CheckpointError


@pytest.fixture
def path(tmp_path):
    return write_sample(tmp_path / "a.ckpt")


def verify(path) -> None:
    with CheckpointReader(path) as reader:
        reader.verify()


def refused(path, match) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        verify(path)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- damage


def test_any_flipped_bit_is_found(path):
    with CheckpointReader(path) as reader:
        places = list(reader.manifest.files)
    for name in [*places, "manifest.json", "manifest.sha256"]:
        data = bytearray((path / name).read_bytes())
        for position in range(0, len(data), max(1, len(data) // 60)):
            data[position] ^= 1 << position % 8
            (path / name).write_bytes(data)
            refused(path, name)
            data[position] ^= 1 << position % 8
        (path / name).write_bytes(data)
    verify(path)


def test_a_flipped_bit_names_the_tensor(path):
    header, _ = split_header((path / W1).read_bytes())
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        original = (path / W1).read_bytes()
        data = bytearray(original)
        begin = 8 + int.from_bytes(data[:8], "little")
        data[begin + entry["data_offsets"][1] - 1] ^= 4
        (path / W1).write_bytes(data)
        message = refused(path, W1)
        assert repr(key.split("[")[0]) in message, message
        (path / W1).write_bytes(original)


@pytest.mark.parametrize("name", [W0, "state.json", "rank_00001.json"])
def test_a_cut_file(path, name):
    os.truncate(path / name, (path / name).stat().st_size - 1)
    message = refused(path, "cut short or replaced")
    assert name in message
    assert ("weights/head.weight" in message) == (name == W0)


@pytest.mark.parametrize("name", [W0, "state.json", "manifest.json", "manifest.sha256"])
def test_a_missing_file(path, name):
    (path / name).unlink()
    refused(path, "is missing|has no manifest")


def test_an_extra_file(path):
    shutil.copy(path / W0, path / "weights_00002.safetensors")
    refused(path, "weights_00002.safetensors is not part of the checkpoint")


def test_swapped_shards_even_without_hashes(path):
    for name in (W0, W1):
        (path / name).rename(path / ("x" + name))
    (path / ("x" + W0)).rename(path / W1)
    (path / ("x" + W1)).rename(path / W0)
    content = read_manifest(path)
    for row in content["files"]:
        if row[0] in (W0, W1):
            row[1] = (path / row[0]).stat().st_size
    write_manifest_again(path, content)
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match="the wrong file"):
        reader.read("weights/head.weight")


# ------------------------------------------------------------------------------ forged manifests


@pytest.mark.parametrize(("change", "match"), FORGED, ids=[match for _, match in FORGED])
def test_a_forged_manifest(path, change, match):
    content = read_manifest(path)
    change(content)
    write_manifest_again(path, content)
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointReader(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b'{"a": 1e999}', "1e999 is larger than any"),
        (b'{"a": 1}'.decode().encode("utf-16"), "not JSON"),
        (b'{"a": 1}'.decode().encode("utf-32"), "not JSON"),
    ],
)
def test_a_manifest_that_breaks_parsers(path, text, match):
    write_manifest_again(path, text)
    refused(path, match)


def test_experts_of_a_layer_that_is_not_listed(tmp_path):
    layer = {"moe.router.weight": (4, 2), "moe.experts.down_proj": (4, 2, 3)}
    tensors = make_tensors() | {f"weights/{name}": torch.ones(s) for name, s in layer.items()}
    path = write_sample(tmp_path / "a.ckpt", tensors)
    write_manifest_again(path, {**read_manifest(path), "moe_layers": {}})
    refused(path, "moe_layers does not list layer 'moe', whose experts are present")
    assert ["moe_layers does not list" in d.message for d in Audit(path).damages()] == [True]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_good_manifest_in_another_encoding(path, encoding):
    write_manifest_again(path, (path / "manifest.json").read_text().encode(encoding))
    refused(path, "manifest.json is not JSON")


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line[:-1] + b" ",
        lambda line: line[:-1],
        lambda line: line + b"\n",
        lambda line: line.replace(b"  ", b" *"),
        lambda line: line[:64].upper() + line[64:],
    ],
    ids=["blank", "cut", "longer", "star", "capitals"],
)
def test_a_checksum_that_is_written_otherwise(path, change):
    line = (path / "manifest.sha256").read_bytes()
    (path / "manifest.sha256").write_bytes(change(line))
    refused(path, "does not match manifest.sha256")


def test_the_digest_of_the_last_fragment(path):
    """Where a file ends its own hash says the same, so nothing else would notice."""
    content = read_manifest(path)
    ends = {}
    for name, about in content["tensors"].items():
        for fragment in about["pieces"]:
            file, _, sha256 = content["files"][fragment[2]]
            if sha256.startswith(fragment[3]):
                ends[file] = (name, fragment)
    assert ends.keys() >= {W0, W1}
    name, fragment = ends[W1]
    fragment[3] = f"{int(fragment[3], 16) ^ 1:08x}"
    write_manifest_again(path, content)
    refused(path, f"the digest of tensor '{name}'")


def test_links_are_not_followed(path, tmp_path):
    (path / W0).rename(tmp_path / "elsewhere")
    (path / W0).symlink_to(tmp_path / "elsewhere")
    refused(path, f"{W0} can't be opened.*Links")


def test_a_pipe_does_not_hang(path):
    (path / W0).unlink()
    os.mkfifo(path / W0)
    refused(path, f"{W0} is not a regular file")


# ------------------------------------------------------------------------------- forged headers


@pytest.mark.parametrize(("change", "match"), HEADERS, ids=[match for _, match in HEADERS])
def test_a_forged_header(path, change, match):
    assert KEY in split_header((path / W0).read_bytes())[0]
    forge_file(path, W0, change((path / W0).read_bytes()))
    message = refused(path, match)
    assert str(path) in message


# -------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(path, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    add_file(path, "objects.pt", pickled(zipped))
    with CheckpointReader(path) as reader:
        reader.verify()
        with pytest.raises(CheckpointError, match=r"objects.pt"):
            reader.read_state()
        assert not (tmp_path / "BOMB_WENT_OFF").exists()
        if zipped:  # the test can fail: trusted, it does run
            reader.read_objects(trusted=True)
            assert (tmp_path / "BOMB_WENT_OFF").exists()


def read_everything(path) -> None:
    with CheckpointReader(path) as reader:
        reader.read_state()
        reader.read_rank_state(0)
        reader.read_rank_state(1)
        for name in make_tensors():
            reader.read(name)


def test_no_other_file_is_unpickled(path, tmp_path, monkeypatch):
    """A zip archive in the place of each file is not even looked into."""
    monkeypatch.chdir(tmp_path)
    for name in [row[0] for row in read_manifest(path)["files"]]:
        original = (path / name).read_bytes()
        forge_file(path, name, pickled(zipped=True))
        assert zipfile.is_zipfile(path / name)
        with pytest.raises(CheckpointError, match=name):
            read_everything(path)
        forge_file(path, name, original)
    assert not (tmp_path / "BOMB_WENT_OFF").exists()


@pytest.mark.parametrize("value", EXTRA.values(), ids=EXTRA.keys())
def test_a_value_that_no_save_writes(path, value):
    forge_file(path, "state.json", with_extra(path, value))
    with CheckpointReader(path) as reader:
        reader.verify()
        with pytest.raises(CheckpointError, match=r"state\.json"):
            reader.read_state()


OTHER_STATES = [
    ({"lightning": None}, "'lightning' is missing or not of type dict"),
    ({"optimizer": None}, "lacks the optimizer or engine"),
    ({"engine": None}, "lacks the optimizer or engine"),
    ({"engine": {"counters": {}}}, "'loss_scaler' is missing"),
    ({"engine": {"counters": {"global_steps": -1}, "loss_scaler": {}}}, "holds -1"),
    ({"engine": {"counters": {"global_steps": 1.5}, "loss_scaler": {}}}, "is not of type int"),
    ({"optimizer": {"class": "AdamW"}}, "'groups' is missing"),
    ({"more": 1}, "unknown fields"),
]


@pytest.mark.parametrize(("changes", "match"), OTHER_STATES, ids=[m for _, m in OTHER_STATES])
def test_a_state_without_what_loading_needs(path, changes, match):
    write_state(path, **changes)
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match=match):
        reader.read_state()
