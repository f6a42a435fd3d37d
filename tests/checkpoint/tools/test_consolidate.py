"""One file out of a checkpoint, whatever the size of the model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint.samples import (
    add_file,
    forge_file,
    make_tensors,
    read_manifest,
    write_manifest_again,
    write_sample,
)
from safetensors.torch import load_file

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.format.safetensors_stream import StreamedTensor
from lightning_fastmoe.checkpoint.tools.consolidate import Consolidation, consolidate
from lightning_fastmoe.checkpoint.tools.torch_file import write_torch
from lightning_fastmoe.cli import main
from lightning_fastmoe.errors import CheckpointError, ConfigError

WEIGHTS = {n.removeprefix("weights/"): t for n, t in make_tensors().items() if n[0] == "w"}


@pytest.fixture
def path(tmp_path):
    return write_sample(tmp_path / "a.ckpt")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) and a[n].shape == b[n].shape for n in a
    )


def streamed(tensors: dict) -> list[StreamedTensor]:
    return [
        StreamedTensor(n, t.dtype, tuple(t.shape), lambda t=t: t.reshape(-1).split(3))
        for n, t in tensors.items()
    ]


# ----------------------------------------------------------------------------------- the torch file


def test_a_streamed_torch_file_equals_one_of_torch_save(tmp_path):
    tensors = dict(WEIGHTS)
    rest = {"epoch": 3, "hyper_parameters": {"table": torch.arange(5), "again": torch.ones(2, 2)}}
    extra = {"moe._extra_state": {"seen": torch.tensor([7, 8])}}
    file = tmp_path / "a.pt"
    seen = []
    write_torch(file, streamed(tensors), {"tied": "half"}, rest, extra, seen.append)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(file, weights_only=True, **options)
        state = loaded.pop("state_dict")
        assert torch.equal(state.pop("moe._extra_state")["seen"], torch.tensor([7, 8]))
        assert state["tied"].data_ptr() == state["half"].data_ptr()
        del state["tied"]
        assert same(state, tensors)
        assert loaded["epoch"] == 3
        assert same(loaded["hyper_parameters"], rest["hyper_parameters"])
    assert zipfile.ZipFile(file).testzip() is None  # every CRC is right
    whole = {"state_dict": {**tensors, "tied": tensors["half"], **extra}, **rest}
    torch.save(whole, tmp_path / "b.pt")
    ours, theirs = (zipfile.ZipFile(tmp_path / n) for n in ("a.pt", "b.pt"))
    for name in theirs.namelist():
        mine = name.replace("b/", "a/", 1)
        if not name.endswith(("serialization_id", "data.pkl")):
            assert ours.read(mine) == theirs.read(name), name
    assert sum(seen) == sum(t.nbytes for t in tensors.values()) + 40 + 16 + 16


def test_a_tensor_with_too_few_elements(tmp_path):
    short = [StreamedTensor("x", torch.float32, (7,), lambda: [torch.ones(3)])]
    with pytest.raises(CheckpointError, match="of 28 bytes, got 12"):
        write_torch(tmp_path / "a.pt", short, {}, {})


# ----------------------------------------------------------------------------------- consolidation


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.pt"])
def test_consolidate_writes_all_weights_in_either_format(path, tmp_path, name, capsys):
    file = tmp_path / name
    assert main(["checkpoint", "consolidate", str(path), str(file)]) == 0
    assert "6 tensors" in capsys.readouterr().out
    if name.endswith("safetensors"):
        assert same(load_file(file), WEIGHTS)
    else:
        loaded = torch.load(file, weights_only=True)
        assert same(loaded["state_dict"], WEIGHTS)
        assert (loaded["epoch"], loaded["global_step"]) == (1, 3)
        assert "callbacks" not in loaded
    assert sorted(os.listdir(tmp_path)) == sorted(["a.ckpt", name])


def test_another_dtype_and_a_part(path, tmp_path):
    with CheckpointReader(path) as reader:
        options = Consolidation(torch.bfloat16, "moe.experts.")
        consolidate(reader, tmp_path / "m.safetensors", "safetensors", options)
        up = WEIGHTS["moe.experts.up_proj"]
        assert same(load_file(tmp_path / "m.safetensors"), {"up_proj": up.bfloat16()})
        consolidate(reader, tmp_path / "n.pt", "torch", Consolidation(torch.float16))
        state = torch.load(tmp_path / "n.pt", weights_only=True)["state_dict"]
        assert same(
            state, {n: t.half() if t.is_floating_point() else t for n, t in WEIGHTS.items()}
        )
        with pytest.raises(ConfigError, match="no weights whose names begin with 'net'"):
            consolidate(reader, tmp_path / "o.pt", "torch", Consolidation(prefix="net"))


def test_tied_weights_and_extra_state(path, tmp_path):
    content = read_manifest(path)
    content["tied"] = {"net.twin": "head.weight"}
    write_manifest_again(path, content)
    state = json.loads((path / "state.json").read_text())
    array = {"$tensor": ["I64", [2], [3, 4]]}
    state["extra_state"] = {"_extra_state": 5, "moe._extra_state": array, "moe.of_a_hook": "h"}
    state["lightning"]["hyper_parameters"] = {"lr": 0.1}
    forge_file(path, "state.json", json.dumps(state).encode())
    with CheckpointReader(path) as reader:
        consolidate(reader, tmp_path / "m.pt", "torch")
        consolidate(reader, tmp_path / "m.safetensors", "safetensors")
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert loaded["hyper_parameters"] == {"lr": 0.1}
    state = loaded["state_dict"]
    assert state.pop("_extra_state") == 5
    assert state.pop("moe.of_a_hook") == "h"
    assert state.pop("moe._extra_state").tolist() == [3, 4]
    twin = state.pop("net.twin")
    assert twin.data_ptr() == state["head.weight"].data_ptr()
    assert same(state, WEIGHTS)
    assert same(load_file(tmp_path / "m.safetensors"), WEIGHTS)


def test_objects_that_are_no_plain_data(path, tmp_path, capsys):
    buffer = io.BytesIO()
    torch.save([Path("/tmp")], buffer)  # noqa: S108 (never opened)
    add_file(path, "objects.pt", buffer.getvalue())
    assert main(["checkpoint", "consolidate", str(path), str(tmp_path / "m.pt")]) == 3
    error = capsys.readouterr().err
    assert "objects that are not plain data" in error
    assert "PosixPath" in error
    assert "Write a .safetensors file" in error
    assert not (tmp_path / "m.pt").exists()
    assert main(["checkpoint", "consolidate", str(path), str(tmp_path / "m.safetensors")]) == 0


def test_what_is_there_is_kept(path, tmp_path, capsys):
    file = tmp_path / "m.safetensors"
    file.write_text("mine")
    command = ["checkpoint", "consolidate", str(path), str(file)]
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert main(["checkpoint", "consolidate", str(path), str(tmp_path / "m.bin")]) == 2
    assert "--format" in capsys.readouterr().err
    assert main([*command[:3], str(path), "--format", "torch", "--overwrite"]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_a_damaged_checkpoint_leaves_nothing(path, tmp_path, capsys):
    shard = path / "weights_00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    command = ["checkpoint", "consolidate", str(path), str(tmp_path / "m.pt")]
    assert main(command) == 3
    assert "weights_00001.safetensors is damaged" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.ckpt"]


# ------------------------------------------------------------------------------------------ memory

MEASURE = """
import sys
from pathlib import Path
from lightning_fastmoe.cli import main

def peak():
    # Of this program alone; ru_maxrss begins with that of the process that started it.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

small, big, output = sys.argv[1:]
for source in (small, big):
    for verb in ("m.safetensors", "m.pt"):
        file = Path(output, verb)
        if main(["checkpoint", "consolidate", source, str(file), "--overwrite"]):
            sys.exit("failed")
    assert not main(["checkpoint", "reshard", source, output + "/r", "--ranks", "3", "--overwrite"])
    assert not main(["checkpoint", "verify", source])
    assert not main(["checkpoint", "diff", source, output + "/r"])
    print("PEAK", peak())
"""


def test_memory_does_not_grow_with_the_model(path, tmp_path):
    """A tensor of 128 MiB passes through buffers of 16 MiB, in each of the verbs."""
    big = {"weights/moe.experts.up_proj": torch.ones(4, 8 * 2**20), "weights/x": torch.ones(2**20)}
    write_sample(tmp_path / "big.ckpt", big)
    output = tmp_path / "out"
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "big.ckpt"), str(output)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK")]
    assert len(peaks) == 2
    assert peaks[1] - peaks[0] < 100, peaks  # MiB
