"""Small forged files that would take gigabytes or minutes: refused before they do."""

from __future__ import annotations

import collections
import io
import json
import pickle
import resource
import zipfile

import pytest
import torch
from checkpoint.samples import (
    add_file,
    forge_file,
    read_manifest,
    write_manifest_again,
    write_sample,
)

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.format.json_file import load_json
from lightning_fastmoe.checkpoint.sources.single_file import open_file
from lightning_fastmoe.checkpoint.tools.verify import Audit
from lightning_fastmoe.errors import CheckpointError

GIGABYTES = 6 * 10**9
MORE = 300 * 2**20


@pytest.fixture
def path(tmp_path):
    return write_sample(tmp_path / "a.ckpt")


@pytest.fixture(autouse=True)
def _bounded():
    """What takes more memory than this fails otherwise than by the error that is expected."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused_by_all(path, match) -> None:
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match=match):
        reader.read_objects()
    (damage,) = Audit(path).damages()
    assert damage.file == "objects.pt"
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError) as caught:
        reader.read_objects()
    assert str(caught.value) == damage.message


def archive(pickled: bytes, records: dict[str, bytes] | None = None, method=0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/byteorder", b"little")
        for name, data in (records or {}).items():
            file.writestr(f"a/{name}", data)
        file.writestr("a/version", b"3\n")
    return buffer.getvalue()


class Call:
    """Pickled as a call with these arguments."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.made = (function, arguments, *([state] if state else []))

    def __reduce__(self):
        return self.made


class Storage:
    """Pickled as a reference to the record ``data/0``."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return (
            ("storage", torch.FloatStorage, "0", "cpu", value.numel)
            if isinstance(value, Storage)
            else None
        )


def pickled(value) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump([value])
    return buffer.getvalue()


VIEW = torch._utils._rebuild_tensor_v2
HOOKS = (False, collections.OrderedDict())
BYTES_OF_A_TENSOR = Call(bytearray, Call(VIEW, Storage(4), 0, (), (), *HOOKS))
CALLS = {
    "bytearray": Call(bytearray, GIGABYTES),
    "tensor by size": Call(torch.FloatTensor, GIGABYTES),
    "torch.Tensor by size": Call(torch.Tensor, GIGABYTES),
    "a bytearray as long as a tensor says": BYTES_OF_A_TENSOR,
    "larger than its storage": Call(VIEW, Storage(4), 0, (GIGABYTES,), (1,), *HOOKS),
    "beyond its storage": Call(VIEW, Storage(4), GIGABYTES, (1,), (1,), *HOOKS),
    "strides beyond": Call(VIEW, Storage(4), 0, (2, 2), (GIGABYTES, 1), *HOOKS),
    "repeats an element": Call(VIEW, Storage(4), 0, (GIGABYTES,), (0,), *HOOKS),
    "storage larger than its record": Call(VIEW, Storage(GIGABYTES), 0, (1,), (1,), *HOOKS),
    "a call inside a call": Call(
        torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (GIGABYTES,), None
    ),
    "hex of hex": Call(
        __import__("_codecs").encode, Call(__import__("_codecs").encode, "a"), "hex"
    ),
    "set of a tensor": Call(set, Call(VIEW, Storage(4), 0, (4,), (1,), *HOOKS)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_that_allocates(path, call):
    add_file(path, "objects.pt", archive(pickled(call), {"data/0": b"\0" * 16}))
    refused_by_all(path, "objects.pt asks for .* more memory than the file has bytes")


def nested(depth: int) -> bytes:
    """A key of a map that is a tuple in a tuple and so on: hashing it would overflow the stack."""
    return b"\x80\x02]}N" + b"\x85" * depth + b"K\x01sa."


def test_a_tuple_too_deep_to_be_hashed(path):
    add_file(path, "objects.pt", archive(nested(1_000_000)))
    refused_by_all(path, "objects.pt is nested too deeply")


def test_a_deflated_record(path):
    data = archive(pickle.dumps([1], 2), {"data/0": bytes(2**31 // 16)}, zipfile.ZIP_DEFLATED)
    assert len(data) < 200_000
    add_file(path, "objects.pt", data)
    refused_by_all(path, "compresses nothing")


def test_records_that_overlap(path):
    """Many names for the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", pickle.dumps([1], 2))
        file.writestr("a/data/0", bytes(2**16))
        first = file.getinfo("a/data/0")
        for i in range(1, 50):
            again = zipfile.ZipInfo(f"a/data/{i}")
            for name in ("file_size", "compress_size", "CRC", "header_offset"):
                setattr(again, name, getattr(first, name))
            file.filelist.append(again)
            file.NameToInfo[again.filename] = again
        file._didModify = True
    add_file(path, "objects.pt", buffer.getvalue())
    refused_by_all(path, "compresses nothing")


def test_a_deflated_file_of_another_program(tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, file)
    open_file(file, trusted=False)
    with (
        zipfile.ZipFile(file) as stored,
        zipfile.ZipFile(tmp_path / "small.ckpt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in stored.namelist():
            small.writestr(name, bytes(2**27) if name.endswith("data/0") else stored.read(name))
    with pytest.raises(CheckpointError, match="compresses nothing"):
        open_file(tmp_path / "small.ckpt", trusted=False)


def test_a_key_twice_among_many():
    """In time that grows with their number, not with its square: that would be minutes."""
    keys = ",".join(f'"{i}": 0' for i in range(300_000))
    with pytest.raises(CheckpointError, match="the key '299999' occurs twice"):
        load_json(f'{{{keys}, "299999": 1}}'.encode(), "manifest.json")


def test_many_layers_and_many_tensors(path):
    """As above: names are not compared with all layers."""
    content = read_manifest(path)
    empty = {"dtype": "F32", "shape": [0], "pieces": []}
    count = 15_000
    content["moe_layers"] |= {f"{i}.moe": 1 for i in range(count)}
    content["tensors"] |= {f"weights/{i}.moe.experts.0.a": empty for i in range(count)}
    content["module_experts"] = {f"{i}.moe": [["a"]] for i in range(count)}
    write_manifest_again(path, content)
    with CheckpointReader(path) as reader:
        assert len(reader.manifest.moe_layers) == count + 1
    assert list(Audit(path).damages()) == []


def test_names_that_take_long_to_take_apart(path):
    content = read_manifest(path)
    content["excluded"] = [".experts." * 100_000]
    write_manifest_again(path, content)
    with pytest.raises(CheckpointError, match="a name of 900000 characters"):
        CheckpointReader(path)


def test_plain_objects_of_every_kind_are_read(path):
    values = [
        torch.randn(3, 4).t(),
        torch.zeros(1).expand(1000),
        torch.nn.Parameter(torch.randn(2)),
        torch.randn(5)[2:],
        torch.randn(4).to(torch.bfloat16),
        torch.randn(3).to(torch.float8_e5m2),
        torch.tensor([1, 2], dtype=torch.uint16),
        torch.empty(0, 3),
        torch.tensor(3.0),
        torch.eye(3).to_sparse(),
        torch.Size((10_000, 20_000)),
        torch.device("cpu"),
        torch.float16,
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        {1, 2, 10**30},
        3 + 4j,
        b"abc\xff",
        bytearray(b"xyz"),
        bytearray(),
        (1, (2, (3,))),
        {(1, 2): [None, True, 1.5]},
        [1] * 5000,
    ]
    buffer = io.BytesIO()
    torch.save(values, buffer)
    add_file(path, "objects.pt", buffer.getvalue())
    with CheckpointReader(path) as reader:
        found = reader.read_objects()
    assert [type(v) for v in found] == [type(v) for v in values]
    assert repr(found) == repr(values)
    state = json.loads((path / "state.json").read_text())
    state["extra_state"] = {"last": {"$object": len(values) - 1}}
    forge_file(path, "state.json", json.dumps(state).encode())
    assert list(Audit(path).damages()) == list(Audit(path, trusted=True).damages()) == []
