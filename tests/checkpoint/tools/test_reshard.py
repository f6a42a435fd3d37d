"""Files laid out anew hold the same checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint.samples import make_tensors, write_sample

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.tools.diff import compare
from lightning_fastmoe.checkpoint.tools.reshard import reshard
from lightning_fastmoe.checkpoint.tools.verify import Audit
from lightning_fastmoe.cli import main


@pytest.fixture
def path(tmp_path):
    tensors = make_tensors()
    g = torch.Generator().manual_seed(1)
    tensors["weights/moe.experts.down_proj"] = torch.randn(4, 128, 160, generator=g)
    tensors["weights/big"] = torch.randn(40_011, generator=g)
    return write_sample(tmp_path / "a.ckpt", tensors, ranks=3)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_everything_is_kept(path, tmp_path, ranks):
    new = tmp_path / "b.ckpt"
    with CheckpointReader(path) as a:
        reshard(a, new, ranks)
        assert list(Audit(new).damages()) == []
        with CheckpointReader(new) as b:
            assert list(compare(a, b)) == []
            for name in ("topology", "progress", "moe_layers", "contents", "written_by"):
                assert getattr(a.manifest, name) == getattr(b.manifest, name)
            assert a.read_state() == b.read_state()
            assert [a.read_rank_state(r) for r in range(4)] == [
                b.read_rank_state(r) for r in range(4)
            ]
            assert a.read_rank_state(2) is not None
            written = [n for n in b.manifest.files if n.startswith("weights")]
            assert len(written) == ranks
            sizes = [b.manifest.files[n].size for n in written]
            assert max(sizes) - min(sizes) < 1500
            if ranks in (2, 4):  # cut between experts
                starts = {p.start for p in b.record("weights/moe.experts.down_proj").fragments}
                assert starts == {i * 128 * 160 for i in range(0, 4, 4 // ranks)}


def test_reshard_overwrites_only_if_told_to(path, tmp_path, capsys):
    new = str(tmp_path / "b.ckpt")
    command = ["checkpoint", "reshard", str(path), new]
    assert main([*command, "--ranks", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"]["state.json"] == (path / "state.json").stat().st_size
    assert main([*command, "--ranks", "2"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--ranks", "0", "--overwrite"]) == 2
    before = (path / "weights_00000.safetensors").read_bytes()
    assert main(["checkpoint", "reshard", str(path), str(path), "--ranks", "1", "--overwrite"]) == 0
    assert (path / "weights_00000.safetensors").read_bytes() != before
    assert main(["checkpoint", "diff", str(path), new]) == 0


def test_a_damaged_checkpoint_is_not_copied(path, tmp_path, capsys):
    file = path / "optimizer_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    command = ["checkpoint", "reshard", str(path), str(tmp_path / "b.ckpt"), "--ranks", "2"]
    assert main(command) == 3
    assert "optimizer_00001.safetensors is damaged" in capsys.readouterr().err
    assert not (tmp_path / "b.ckpt").exists()
    assert main([*command, "--no-verify"]) == 0
