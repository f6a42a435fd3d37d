"""Every damage is found, all of them, and named; a sound checkpoint has none."""

from __future__ import annotations

import io
import json
import os
import re
import shutil

import pytest
import torch
from checkpoint.format.forgeries import FORGED, HEADERS, KEY, W0, W1, pickled
from checkpoint.samples import (
    add_file,
    forge_file,
    make_tensors,
    read_manifest,
    write_manifest_again,
    write_sample,
    write_state,
)

from lightning_fastmoe.checkpoint.tools.verify import Audit
from lightning_fastmoe.cli import main
from lightning_fastmoe.errors import CheckpointError

UP = "weights/moe.experts.up_proj"


@pytest.fixture
def path(tmp_path):
    return write_sample(tmp_path / "a.ckpt")


def damages(path, **options) -> list[str]:
    return [damage.message for damage in Audit(path, **options).damages()]


def only(path, match) -> None:
    found = damages(path)
    assert len(found) == 1, found
    assert re.search(match, found[0]), found[0]


def forge(path, change) -> None:
    content = read_manifest(path)
    change(content)
    write_manifest_again(path, content)


def test_a_sound_checkpoint(path):
    seen = []
    audit = Audit(path, on_total=lambda n: seen.append(-n), on_bytes=seen.append)
    assert list(audit.damages()) == []
    assert audit.manifest.moe_layers == {"moe": 4}
    assert sum(seen) == 0
    assert len(seen) > 5


def test_a_flipped_bit_anywhere(path):
    for name in [*read_manifest_files(path), "manifest.json", "manifest.sha256"]:
        data = bytearray((path / name).read_bytes())
        for position in range(0, len(data), max(1, len(data) // 30)):
            data[position] ^= 1 << position % 8
            (path / name).write_bytes(data)
            found = list(Audit(path).damages())
            assert any(name in d.message for d in found), (name, position, found)
            data[position] ^= 1 << position % 8
        (path / name).write_bytes(data)
    assert damages(path) == []


def read_manifest_files(path) -> list[str]:
    return [row[0] for row in read_manifest(path)["files"]]


def test_a_flipped_bit_names_the_tensor(path):
    data = bytearray((path / W0).read_bytes())
    data[-1] ^= 1
    (path / W0).write_bytes(data)
    last = max(make_tensors(), key=lambda name: bytes(data).rfind(name.encode() + b"["))
    only(path, f"{W0} is damaged.*{re.escape(last)}")


def test_several_damages_are_all_listed(path):
    for name in (W0, "rank_00001.json"):
        data = bytearray((path / name).read_bytes())
        data[-2] ^= 1
        (path / name).write_bytes(data)
    os.truncate(path / "optimizer_00000.safetensors", 50)
    (path / W1).unlink()
    (path / "notes.txt").write_text("mine")
    found = damages(path)
    assert len(found) == 5, found
    for match in (
        f"{W0} is damaged",
        "rank_00001.json is damaged",
        "optimizer_00000.safetensors has 50 bytes.*optimizer/exp_avg/head.weight",
        f"{W1} is missing.*It holds .*weights/",
        "notes.txt is not part of the checkpoint",
    ):
        assert sum(bool(re.search(match, text)) for text in found) == 1, (match, found)


@pytest.mark.parametrize("name", [W0, "state.json"])
def test_a_cut_file(path, name):
    os.truncate(path / name, (path / name).stat().st_size - 1)
    only(path, f"{name} has .* it was cut short or replaced")


@pytest.mark.parametrize("name", [W0, "state.json", "manifest.json", "manifest.sha256"])
def test_a_missing_file(path, name):
    (path / name).unlink()
    only(path, f"{name} is missing")


def test_an_extra_file(path):
    shutil.copy(path / W0, path / "weights_00002.safetensors")
    only(path, "weights_00002.safetensors is not part of the checkpoint")


def test_files_that_swapped_names_are_damaged(path):
    for a, b in ((W0, "other"), (W1, W0), ("other", W1)):
        (path / a).rename(path / b)
    found = damages(path)
    assert len(found) == 2
    assert all(re.search("weights_0000", text) for text in found)


@pytest.mark.parametrize(("change", "match"), FORGED, ids=[match for _, match in FORGED])
def test_a_forged_manifest(path, change, match):
    forge(path, change)
    found = damages(path)
    assert found
    assert all(str(path) in text for text in found)


def fragments(content) -> list:
    return content["tensors"][UP]["pieces"]


def test_an_expert_that_is_missing(path):
    forge(path, lambda content: fragments(content).pop())
    found = damages(path)
    assert re.search(f"layer 'moe': experts 2 to 3 are missing in tensor '{UP}'", found[0]), found


def test_an_expert_that_is_there_twice(path):
    def repeat(content):
        start, length, file, digest = fragments(content)[1]
        assert (start, length) == (12, 12)
        fragments(content).append([18, 6, file, digest])

    forge(path, repeat)
    found = damages(path)
    match = f"layer 'moe': expert 3 is duplicated in tensor '{UP}'"
    assert re.search(match, found[0]), found


def test_a_layer_without_experts(path):
    forge(path, lambda content: content["moe_layers"].update({"deeper.moe": 8}))
    only(path, "layer 'deeper.moe': none of its 8 experts is in the checkpoint")


def test_tied_to_nothing(path):
    forge(path, lambda content: content["tied"].update({"a.weight": "gone.weight"}))
    only(path, "'a.weight' is listed as stored under 'gone.weight'")


def test_two_contradictions_in_one_manifest(path):
    def change(content):
        fragments(content).pop()
        content["tensors"]["weights/half"]["dtype"] = "F128"

    forge(path, change)
    found = damages(path)
    assert any("experts 2 to 3 are missing" in text for text in found)
    assert any("'weights/half' has dtype 'F128'" in text for text in found)


@pytest.mark.parametrize(("change", "match"), HEADERS, ids=[match for _, match in HEADERS])
def test_a_forged_header(path, change, match):
    assert KEY
    forge_file(path, W0, change((path / W0).read_bytes()))
    found = damages(path)
    assert any(re.search(match, text) and W0 in text for text in found), found


def test_links_are_not_followed(path, tmp_path):
    (path / W0).rename(tmp_path / "elsewhere")
    (path / W0).symlink_to(tmp_path / "elsewhere")
    only(path, f"{W0} can't be opened.*Links")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle(path, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    add_file(path, "objects.pt", pickled(zipped))
    if zipped:
        only(path, "objects.pt holds objects that are not plain data.*--trusted")
        assert damages(path, trusted=True) == []  # its hash is right, and it is not loaded
    else:
        only(path, "objects.pt can't be read: it is not a torch.save archive")
        assert damages(path, trusted=True) == damages(path)
    assert not (tmp_path / "BOMB_WENT_OFF").exists()


def test_objects_of_plain_types_need_no_trust(path):
    buffer = io.BytesIO()
    torch.save([torch.ones(3), {"a": 1}], buffer)
    add_file(path, "objects.pt", buffer.getvalue())
    write_state(path, extra_state={"a": {"$object": 1}})
    assert damages(path) == damages(path, trusted=True) == []
    write_state(path, extra_state={"a": {"$object": 2}})
    only(path, "object 2 does not exist; there are 2")
    assert damages(path, trusted=True) == damages(path)


@pytest.mark.parametrize("text", [b'{"$tuple": 3}', b'{"a": {"$object": 0}}', b"[" * 10_000])
def test_state_that_can_not_be_read(path, text):
    forge_file(path, "state.json", text)
    only(path, r"state\.json")


def test_no_such_directory(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        damages(tmp_path / "none")


# ------------------------------------------------------------------------------------ the command


def test_the_command_on_a_sound_checkpoint(path, capsys):
    assert main(["checkpoint", "verify", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "7 files" in out
    assert "experts: 4 in 1 layer, each once" in out
    assert err == ""  # no bar where there is no terminal


def test_the_command_lists_damages(path, capsys):
    (path / W1).unlink()
    (path / "notes.txt").write_text("mine")
    assert main(["checkpoint", "verify", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert [d["file"] for d in report["damages"]] == [W1, "notes.txt"]
    assert report["experts"] == {"moe": 4}
    assert main(["checkpoint", "verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("damaged: ") == 2
    assert "2 damages found" in out


def test_the_command_without_a_checkpoint(tmp_path, capsys):
    assert main(["checkpoint", "verify", str(tmp_path / "none"), "--json"]) == 3
    assert "does not exist" in json.loads(capsys.readouterr().out)["error"]
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "manifest.json is missing" in capsys.readouterr().out
