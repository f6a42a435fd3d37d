"""Damaged and forged checkpoints are refused by name, before anything is allocated or run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from checkpoint.samples import (
    add_file,
    forge_file,
    join_header,
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

W0, W1 = "weights_00000.safetensors", "weights_00001.safetensors"


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
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match="another file"):
        reader.read("weights/head.weight")


# ------------------------------------------------------------------------------ forged manifests


def forged(change):
    def test(path):
        content = read_manifest(path)
        change(content)
        write_manifest_again(path, content)
        return path

    return test


def tensor(content, name="weights/head.weight"):
    return content["tensors"][name]


EXP_AVG = "optimizer/exp_avg/head.weight"


def drop_expert(content):
    tensor(content, "weights/moe.experts.up_proj")["pieces"].pop()


def repeat_expert(content):
    pieces = tensor(content, "weights/moe.experts.up_proj")["pieces"]
    pieces.insert(1, list(pieces[0]))


def swap(content):
    tensor(content)["pieces"].reverse()


def rename(name):
    def change(content):
        content["files"][0][0] = name

    return change


FORGED = [
    (drop_expert, "experts 2 to 3 are missing in tensor 'weights/moe.experts.up_proj'"),
    (repeat_expert, "experts 0 to 1 are duplicated in tensor 'weights/moe.experts.up_proj'"),
    (lambda c: c["moe_layers"].update(moe=8), "up_proj.*has 4 experts.*num_experts=8"),
    (swap, "weights/head.weight.*are not in any file"),
    (lambda c: tensor(c)["shape"].append(2), "weights/head.weight.*its pieces end at 35"),
    (lambda c: tensor(c).update(shape=[2**40, 2**40]), "weights/head.weight.*invalid shape"),
    (lambda c: tensor(c).update(shape=[-5, -7]), "weights/head.weight.*invalid shape"),
    (lambda c: tensor(c).update(shape=[True, 35]), "weights/head.weight.*not a list of integers"),
    (
        lambda c: tensor(c).update(shape=[2**61], pieces=[[0, 2**61, 5, "0" * 8]]),
        "invalid shape",
    ),
    (
        lambda c: tensor(c).update(shape=[2**50], pieces=[[0, 2**50, 5, "0" * 8]]),
        "weights_00000.*in all",
    ),
    (lambda c: tensor(c).update(dtype="F128"), "weights/head.weight.*dtype 'F128'"),
    (lambda c: tensor(c).update(dtype=["F32"]), "weights/head.weight.*'dtype' is missing or no"),
    (lambda c: tensor(c)["pieces"].__setitem__(0, [0, 0, 5, "0" * 8]), "head.weight.*piece of 0"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(2, 99), "head.weight.*file number 99"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(2, -1), "head.weight.*file number -1"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(1, 1.5), "head.weight.*expected"),
    (lambda c: c["tensors"].update({"other/a": tensor(c)}), "other/a.*is not a tensor name"),
    (lambda c: c["tensors"].update({"weights/a": 3}), "weights/a.*missing"),
    (rename("../../etc/passwd"), r"\.\./\.\./etc/passwd.*not a checkpoint file name"),
    (rename("/etc/passwd"), "/etc/passwd.*not a checkpoint file name"),
    (rename("a\n.json"), "not a checkpoint file name"),
    (rename("manifest.json"), "not a checkpoint file name"),
    (lambda c: c["files"].append(list(c["files"][0])), "listed twice"),
    (lambda c: c["files"][0].__setitem__(1, -1), "an invalid size"),
    (lambda c: c["files"][0].__setitem__(1, 10**9), "the manifest says 1000000000"),
    (lambda c: c.update(format="zip"), "not a checkpoint of this package"),
    (lambda c: c.update(format_version=2), "format_version 2.*newer.*upgrade"),
    (lambda c: c.update(format_version=True), "'format_version' is missing or not of type int"),
    (lambda c: c.update(surprise=1), "unknown fields.*surprise"),
    (lambda c: c.pop("tied"), "'tied' is missing"),
    (lambda c: c["topology"].update(world_size="2"), "'world_size' is missing or not of type int"),
    (lambda c: c.update(excluded=[1]), "'excluded' is not of type str"),
    (lambda c: c.update(excluded=["a", "a"]), "'excluded' lists an entry twice"),
    (lambda c: c.update(contents=[]), "contents is ..; it must be"),
    (lambda c: c.update(contents=["optimizer", "weights"]), "contents is .*it must be"),
    (lambda c: c.update(contents=["weights"]), "exp_avg/head.weight.*but contents is"),
    (lambda c: c["progress"].update(epoch=-1), "'epoch' holds -1, which must be 0 to"),
    (lambda c: c["progress"].update(epoch=2**63), "'epoch' holds 9223372036854775808"),
    (lambda c: c["progress"].update(epoch=1.0), "'epoch' is missing or not of type int"),
    (lambda c: c["progress"].update(epoch=True), "'epoch' is missing or not of type int"),
    (lambda c: c["progress"].pop("epoch"), "progress: the field 'epoch' is missing"),
    (lambda c: c["progress"].update(loss=1), "progress: unknown fields"),
    (lambda c: c["topology"].update(world_size=0), "'world_size' holds 0, which must be 1 to"),
    (lambda c: c["topology"].update(expert_parallel_size=3), "no run has the topology"),
    (lambda c: c["topology"].update(zero_stage=4), "no run has the topology"),
    (lambda c: c["moe_layers"].update(moe=0), "'moe_layers' holds 0, which must be 1 to"),
    (lambda c: c["moe_layers"].update(moe=4.0), "'moe_layers' is not of type int"),
    (lambda c: c["moe_layers"].update(other=4), "'other': none of its 4 experts"),
    (lambda c: c.update(tied={"a": "gone"}), "'a' is listed as stored under 'gone'"),
    (lambda c: c.update(tied={"half": "mask"}), "'half' is listed .* but is also stored itself"),
    (lambda c: c.update(tied={"a" * 5000: "mask"}), "a name of 5000 characters"),
    (lambda c: c.update(module_experts={"moe": [["a", "a"], [], [], []]}), "lists a name twice"),
    (lambda c: c["files"].reverse(), "files must be sorted by name"),
    (lambda c: c["files"][0].__setitem__(1, 10**30), "an invalid size"),
    (lambda c: c["files"][0].__setitem__(1, 350.0), "expected .str, int, str."),
    (lambda c: c["files"][0].__setitem__(2, "g" * 64), "an invalid size or SHA-256"),
    (lambda c: c["files"][0].__setitem__(2, c["files"][0][2].upper()), "an invalid size or SHA-2"),
    (rename("a.json"), "'a.json' is not a checkpoint file name"),
    (lambda c: c["files"].pop(), "file number .* does not exist"),
    (lambda c: c["files"].insert(0, ["a.json", 1, "0" * 64]), "'a.json' is not a checkpoint file"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(0, -1), "invalid position"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(1, 10**4000), "invalid position"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(3, ""), "digest ''"),
    (lambda c: tensor(c)["pieces"][0].__setitem__(3, "ABCDEF01"), "digest 'ABCDEF01'"),
    (lambda c: tensor(c)["pieces"][0].append(1), "head.weight.*expected"),
    (lambda c: tensor(c).update(shape=[10**4000, 10**4000]), "head.weight.*invalid shape"),
    (lambda c: tensor(c).update(shape=[1] * 65 + [35]), "head.weight.*invalid shape"),
    (lambda c: tensor(c).update(extra=1), "head.weight.*unknown fields"),
    (lambda c: c["tensors"].update({"weights/\ud800": tensor(c)}), "is not a tensor name"),
    (lambda c: tensor(c, EXP_AVG).update(shape=[7, 5]), "7, 5., which does not fit parameter"),
    (lambda c: c["tensors"].pop("weights/head.weight"), "'head.weight' does not exist"),
    (
        lambda c: c["tensors"].update({"weights/a": c["tensors"].pop(EXP_AVG)}),
        "'weights/a' is listed in optimizer_00000.safetensors, which holds another kind",
    ),
]


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


def test_the_digest_of_the_last_piece(path):
    """Where a file ends its own hash says the same, so nothing else would notice."""
    content = read_manifest(path)
    ends = {}
    for name, about in content["tensors"].items():
        for piece in about["pieces"]:
            file, _, sha256 = content["files"][piece[2]]
            if sha256.startswith(piece[3]):
                ends[file] = (name, piece)
    assert ends.keys() >= {W0, W1}
    name, piece = ends[W1]
    piece[3] = f"{int(piece[3], 16) ^ 1:08x}"
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

KEY = "weights/head.weight[0:17]"


def edit(change):
    def edited(data):
        header, payload = split_header(data)
        change(header)
        return join_header(header, payload)

    return edited


def swap_offsets(header):
    keys = [k for k in header if k != "__metadata__"]
    a, b = keys[0], keys[1]
    header[a]["data_offsets"] = header[b]["data_offsets"]


HEADERS = [
    (lambda d: (2**63).to_bytes(8, "little") + d[8:], "claims a header of 9223372036854775808"),
    (lambda d: len(d).to_bytes(8, "little") + d[8:], "claims a header of"),
    (lambda d: d[:5], "should hold|cut short"),
    (edit(lambda h: h.pop(KEY)), "does not hold elements 0 to 17 of tensor 'weights/head.weight'"),
    (edit(lambda h: h.update({"x[0:1]": h[KEY]})), "holds 'x.0:1.', of which the manifest"),
    (edit(lambda h: h[KEY].update(shape=[1, 17])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(shape=[2**60])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(dtype="F64")), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(dtype="I32")), "head.weight' has 17 elements of I32"),
    (edit(lambda h: h[KEY].update(dtype=[])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(data_offsets=[-68, 0])), "entry of 'weights/head.weight.0:17."),
    (edit(lambda h: h[KEY].update(data_offsets=[0, 2**70])), "entry of 'weights/head.weight.0:17."),
    (edit(lambda h: h[KEY].update(data_offsets=[400, 468])), "begins at byte|tensors end at"),
    (lambda d: d + b"\0" * 8, "tensors end at"),
    (lambda d: join_header([], split_header(d)[1]), "not a JSON object"),
    (edit(lambda h: h.update(__metadata__={"a": 1})), "__metadata__ is not a map of strings"),
    (edit(lambda h: h[KEY].update(shape=[True])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(shape=[17.0])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(shape=[10**4000])), "entry of 'weights/head.weight.0:17.'"),
    (edit(lambda h: h[KEY].update(extra=1)), "entry of 'weights/head.weight.0:17.'"),
    (edit(swap_offsets), "begins at byte|entry of"),
]


@pytest.mark.parametrize(("change", "match"), HEADERS, ids=[match for _, match in HEADERS])
def test_a_forged_header(path, change, match):
    assert KEY in split_header((path / W0).read_bytes())[0]
    forge_file(path, W0, change((path / W0).read_bytes()))
    message = refused(path, match)
    assert str(path) in message


# -------------------------------------------------------------------------------------- pickles


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("BOMB_WENT_OFF",))


def pickled(zipped: bool) -> bytes:
    if not zipped:
        return pickle.dumps([Bomb()], protocol=2)
    buffer = io.BytesIO()
    torch.save([Bomb()], buffer)
    return buffer.getvalue()


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


DEEP = b'{"$tuple": [' * 450 + b"]}" * 450
EXTRA = {
    "deep": DEEP,
    "deeper": b"[" * 100_000 + b"]" * 100_000,
    "no objects.pt": b'{"$object": 0}',
    "far object": b'{"$object": 1000000000}',
    "object before": b'{"$object": -1}',
    "object true": b'{"$object": true}',
    "object float": b'{"$object": 0.0}',
    "tensor -1": b'{"$tensor": ["F32", [-1], [1.0, 2.0]]}',
    "tensor true": b'{"$tensor": ["F32", [true], [1.0]]}',
    "tensor short": b'{"$tensor": ["F32", [2], [1.0]]}',
    "tensor huge": b'{"$tensor": ["F32", [1000000000000000000000, 0], []]}',
    "tensor long": b'{"$tensor": ["U8", [2000], [' + b"1," * 1999 + b"1]]}",
    "tensor dtype": b'{"$tensor": ["F128", [1], [1.0]]}',
    "tensor cut": b'{"$tensor": ["I64", [1], [1.5]]}',
    "tensor bool": b'{"$tensor": ["BOOL", [1], [2]]}',
    "tensor overflow": b'{"$tensor": ["I8", [1], [300]]}',
    "tensor overflow 64": b'{"$tensor": ["I64", [1], [1' + b"0" * 40 + b"]]}",
    "tensor flat": b'{"$tensor": ["F32", 1, [1.0]]}',
    "tuple of text": b'{"$tuple": "abc"}',
    "tuple of map": b'{"$tuple": {"a": 1}}',
    "float": b'{"$float": "1.0"}',
    "float list": b'{"$float": ["nan"]}',
    "bytes": b'{"$bytes": "a!b"}',
    "bytes list": b'{"$bytes": [1]}',
    "dict twice": b'{"$dict": [[1, 2], [1, 3]]}',
    "dict of map": b'{"$dict": {"a": 1}}',
    "dict of text": b'{"$dict": ["ab", "cd"]}',
    "dict of lists": b'{"$dict": [[[1], 2]]}',
    "two keys": b'{"$tuple": [1], "a": 2}',
    "unknown": b'{"$set": [1]}',
    "infinite": b"1e999",
    "nan": b"NaN",
    "twice": b'{"a": 1, "a": 2}',
}
"""Values that no save writes."""


def with_extra(path, value: bytes) -> bytes:
    text = (path / "state.json").read_bytes()
    assert text.count(b'"extra_state": {}') == 1
    return text.replace(b'"extra_state": {}', b'"extra_state": {"a": ' + value + b"}")


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
