"""What is written can be read: whole, in part, and by the safetensors library."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from checkpoint.samples import STATE, make_tensors, read_manifest, write_sample
from safetensors.torch import load_file

from lightning_fastmoe.checkpoint import CheckpointReader, OwnedFragment
from lightning_fastmoe.checkpoint.format import files, safetensors_stream
from lightning_fastmoe.checkpoint.format.shards import write_shard
from lightning_fastmoe.errors import CheckpointError


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_tensor_comes_back(tmp_path, ranks):
    path = write_sample(tmp_path / "a.ckpt", ranks=ranks)
    with CheckpointReader(path) as reader:
        reader.verify()
        assert reader.manifest.tensors.keys() == make_tensors().keys()
        for name, tensor in make_tensors().items():
            read = reader.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), name
        assert reader.read_state() == STATE
        assert reader.read_rank_state(0) == {"rng": {"torch": b"\0\1"}, "loaders": None}
        assert reader.read_rank_state(ranks) is None


def test_any_range_across_fragments(tmp_path):
    path = write_sample(tmp_path / "a.ckpt", ranks=3)
    expected = make_tensors()["weights/head.weight"].flatten()
    with CheckpointReader(path) as reader:
        assert len(reader.record("weights/head.weight").fragments) == 3
        for start, stop in itertools.combinations(range(36), 2):
            out = torch.full((stop - start,), torch.nan)
            reader.read_into("weights/head.weight", start, out)
            assert torch.equal(out, expected[start:stop])
        with pytest.raises(CheckpointError, match="has 35 elements; 30 to 36"):
            reader.read_into("weights/head.weight", 30, torch.empty(6))


def test_floating_point_tensors_are_converted_and_others_not(tmp_path):
    with CheckpointReader(write_sample(tmp_path / "a.ckpt")) as reader:
        out = torch.empty(35, dtype=torch.bfloat16)
        reader.read_into("weights/head.weight", 0, out)
        assert torch.equal(out, make_tensors()["weights/head.weight"].flatten().bfloat16())
        with pytest.raises(CheckpointError, match=r"weights/seen.*int64.*float32"):
            reader.read_into("weights/seen", 0, torch.empty(1))


def test_only_the_bytes_of_the_interval_are_read(tmp_path, monkeypatch):
    path = write_sample(tmp_path / "a.ckpt", {"weights/big": torch.arange(10_000)}, ranks=1)
    with CheckpointReader(path) as reader:
        reader.read_into("weights/big", 0, torch.empty(1, dtype=torch.int64))  # reads the header
        sizes = []
        read = files.read_exactly

        def counted(fd, view, offset, where):
            sizes.append(len(view))
            read(fd, view, offset, where)

        monkeypatch.setattr("lightning_fastmoe.checkpoint.format.reader.read_exactly", counted)
        out = torch.empty(10, dtype=torch.int64)
        reader.read_into("weights/big", 5000, out)
    assert out.tolist() == list(range(5000, 5010))
    assert sizes == [80]


def test_the_library_reads_our_files(tmp_path):
    path = write_sample(tmp_path / "a.ckpt", ranks=2)
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found.update(load_file(file))
    head = [found[key] for key in sorted(found) if key.startswith("weights/head")]
    assert torch.equal(torch.cat(head), make_tensors()["weights/head.weight"].flatten())
    assert torch.equal(found["weights/half[0:5]"], make_tensors()["weights/half"][:5])


def test_hashes_are_those_of_the_files(tmp_path):
    path = write_sample(tmp_path / "a.ckpt")
    rows = read_manifest(path)["files"]
    assert {row[0] for row in rows} == {
        "optimizer_00000.safetensors",
        "optimizer_00001.safetensors",
        "rank_00000.json",
        "rank_00001.json",
        "state.json",
        "weights_00000.safetensors",
        "weights_00001.safetensors",
    }
    for name, size, sha256 in rows:
        data = (path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)
    line = (path / "manifest.sha256").read_text()
    assert (
        line
        == f"{hashlib.sha256((path / 'manifest.json').read_bytes()).hexdigest()}  manifest.json\n"
    )


@pytest.mark.parametrize("numels", [(1, 2, 3), (63, 64, 65), (64, 64), (200, 1, 100), (127,)])
def test_fragments_larger_and_smaller_than_the_buffer(tmp_path, monkeypatch, numels):
    monkeypatch.setattr(safetensors_stream, "BUFFER_BYTES", 512)  # 64 elements
    tensors = [torch.randn(n, dtype=torch.float64) for n in numels]
    fragments = [OwnedFragment.of(f"weights/{i}", (len(t),), 0, t) for i, t in enumerate(tensors)]
    seen: list[int] = []
    record, written = write_shard(tmp_path / "a.safetensors", fragments, on_bytes=seen.append)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert record.size == len(data) == sum(seen)
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    loaded = load_file(tmp_path / "a.safetensors")
    end = len(data) - 8 * sum(numels)
    for i, (tensor, one) in enumerate(zip(tensors, written, strict=True)):
        assert torch.equal(loaded[f"weights/{i}[0:{len(tensor)}]"], tensor)
        end += 8 * len(tensor)
        assert one.fragment.digest == hashlib.sha256(data[:end]).hexdigest()[:8]


def test_many_open_files_are_closed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_fastmoe.checkpoint.format.reader._MAX_OPEN", 2)
    path = write_sample(tmp_path / "a.ckpt", ranks=5)
    with CheckpointReader(path) as reader:
        for _ in range(2):
            assert torch.equal(
                reader.read("weights/head.weight"), make_tensors()["weights/head.weight"]
            )
            assert len(reader._open) <= 2


def test_reading_stays_with_the_checkpoint_that_was_opened(tmp_path):
    path = write_sample(tmp_path / "a.ckpt")
    with CheckpointReader(path) as reader:
        write_sample(path, make_tensors(seed=1))
        with pytest.raises(CheckpointError, match="was replaced while"):
            reader.read("weights/head.weight")
    with CheckpointReader(path) as reader:
        read = reader.read("weights/head.weight")
    assert torch.equal(read, make_tensors(seed=1)["weights/head.weight"])


def test_a_dtype_that_safetensors_has_not_is_refused(tmp_path):
    fragment = OwnedFragment.of("weights/a", (1,), 0, torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match="weights/a.*complex64"):
        write_shard(tmp_path / "a.safetensors", [fragment])
