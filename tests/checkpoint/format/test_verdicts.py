"""Who verifies a checkpoint and who reads it come to the same verdict, whatever is in it."""

from __future__ import annotations

import pytest
from checkpoint.format import forgeries
from checkpoint.format.forgeries import DAMAGES, damage
from checkpoint.samples import forge_file, read_manifest, write_manifest_again, write_sample

from lightning_fastmoe.checkpoint import CheckpointReader
from lightning_fastmoe.checkpoint.tools.verify import Audit
from lightning_fastmoe.errors import CheckpointError


@pytest.fixture
def path(tmp_path):
    return write_sample(tmp_path / "a.ckpt")


def complaint(path) -> str | None:
    """What reading all of it fails with."""
    try:
        with CheckpointReader(path) as reader:
            reader.verify()
            reader.read_state()
            for rank in range(reader.manifest.topology.world_size):
                reader.read_rank_state(rank)
            for name in reader.manifest.tensors:
                reader.read(name)
    except CheckpointError as error:
        return str(error)
    return None


def both_refuse(path) -> None:
    damages = [damage.message for damage in Audit(path).damages()]
    said = complaint(path)
    assert said is not None
    assert said in damages


def test_both_accept_a_sound_one(path):
    assert complaint(path) is None
    assert list(Audit(path).damages()) == []


MANIFESTS = {f"{i} {match}": change for i, (change, match) in enumerate(forgeries.FORGED)}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_forged_manifests(path, change):
    content = read_manifest(path)
    change(content)
    write_manifest_again(path, content)
    both_refuse(path)


@pytest.mark.parametrize(("change", "match"), forgeries.HEADERS)
def test_forged_headers(path, change, match):
    forge_file(path, forgeries.W0, change((path / forgeries.W0).read_bytes()))
    both_refuse(path)


@pytest.mark.parametrize("value", forgeries.EXTRA.values(), ids=forgeries.EXTRA.keys())
def test_forged_values(path, value):
    forge_file(path, "state.json", forgeries.with_extra(path, value))
    both_refuse(path)


@pytest.mark.parametrize("name", ["rank_00000.json", "rank_00001.json"])
@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b'{"rng": {}}',
        b'{"rng": 1, "loaders": null}',
        b'{"rng": {}, "loaders": null, "layers": []}',
        b'{"rng": {}, "loaders": null, "layers": {"a": {"load": [1]}}}',
        b'{"rng": {}, "loaders": null, "layers": {"a": {"load": [-1], "nonfinite": false}}}',
        b'{"rng": {}, "loaders": null, "layers": {"a": {"load": [true], "nonfinite": false}}}',
        b'{"rng": {}, "loaders": null, "layers": {"a": {"load": null, "nonfinite": 0}}}',
    ],
)
def test_forged_states_of_ranks(path, name, data):
    forge_file(path, name, data)
    both_refuse(path)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files(tmp_path, how):
    names = [row[0] for row in read_manifest(write_sample(tmp_path / "a.ckpt"))["files"]]
    for name in [*names, "manifest.json", "manifest.sha256"]:
        path = write_sample(tmp_path / f"{name}.ckpt")
        damage(path, name, how)
        assert complaint(path) is not None, name
        assert any(name in d.message for d in Audit(path).damages()), name
