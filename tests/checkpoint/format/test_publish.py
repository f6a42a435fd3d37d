"""A checkpoint appears whole, replaces another without a gap, and two saves don't mix."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint.samples import make_tensors, read_manifest, write_sample

from lightning_fastmoe.checkpoint import CheckpointReader, Publication, is_checkpoint
from lightning_fastmoe.checkpoint.format import discard, publish
from lightning_fastmoe.errors import CheckpointError

HEAD = "weights/head.weight"


def seed_of(path) -> int | None:
    """Which sample lies there."""
    with CheckpointReader(path) as reader:
        reader.verify()
        head = reader.read(HEAD)
    return next(s for s in range(9) if torch.equal(head, make_tensors(s)[HEAD]))


def hidden(directory) -> list[str]:
    return sorted(f for f in os.listdir(directory) if f.startswith("."))


@pytest.fixture(params=["exchange", "two renames"])
def replacing(request, monkeypatch):
    """Both ways to replace a checkpoint."""
    if request.param == "two renames":
        monkeypatch.setattr(publish, "exchange", lambda a, b: False)
    return request.param


def test_exchange_works_here(tmp_path):
    """Or the parameter above would test one way twice."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert publish.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b"


def test_replaces_an_older_one(tmp_path, replacing):
    path = write_sample(tmp_path / "last.ckpt")
    write_sample(path, make_tensors(1))
    assert seed_of(path) == 1
    assert hidden(tmp_path) == []
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "empty directory"])
def test_replaces_a_file_or_a_link(tmp_path, replacing, kind):
    path = tmp_path / "last.ckpt"
    target = tmp_path / "target"
    if kind == "file":
        path.write_text("an older format")
    elif kind == "empty directory":
        path.mkdir()
    else:
        path.symlink_to(target)
        if kind == "link":
            write_sample(target, make_tensors(2))
    write_sample(path, make_tensors(1))
    assert seed_of(path) == 1
    assert not path.is_symlink()
    if kind == "link":
        assert seed_of(target) == 2
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("how", ["torch", "legacy", "empty", "text"])
def test_a_file_of_another_kind_is_not_replaced(tmp_path, how):
    """A name without a suffix says nothing, but torch's files begin as zip archives or pickles."""
    path = tmp_path / "train.py"
    if how in ("torch", "legacy"):
        torch.save({"a": 1}, path, _use_new_zipfile_serialization=how == "torch")
    else:
        path.write_text("import torch" if how == "text" else "")
    if how == "text":
        with pytest.raises(CheckpointError, match=r"train.py is a file that doesn't look like"):
            write_sample(path, make_tensors(1))
        assert path.read_text() == "import torch"
    else:
        write_sample(path, make_tensors(1))
        assert seed_of(path) == 1
    assert hidden(tmp_path) == []


NOT_A_CHECKPOINT = [
    ["thesis.txt"],
    ["manifest.json"],
    ["manifest.json", "manifest.sha256.txt", "state.json"],
    [".notes"],
    ["weights_00000.safetensors"],
]


@pytest.mark.parametrize("names", NOT_A_CHECKPOINT, ids=str)
def test_never_deletes_what_is_no_checkpoint(tmp_path, names):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    for name in names:
        (path / name).write_text("years of work")
    with pytest.raises(CheckpointError, match=names[0]):
        write_sample(path, make_tensors(1))
    assert sorted(os.listdir(path)) == names
    assert all((path / name).read_text() == "years of work" for name in names)
    assert hidden(tmp_path) == []


def add_own_files(path, tmp_path) -> dict[str, str]:
    """What a user may put into a checkpoint's directory, and its content."""
    (path / "notes.txt").write_text("mine")
    (path / "model.safetensors").write_text("exported")
    (path / "weights_00002.safetensors").write_text("a shard of another checkpoint")
    (path / ".hidden").write_text("too")
    (path / "plots").mkdir()
    (path / "plots" / "loss.png").write_text("curve")
    (tmp_path / "target").write_text("far")
    (path / "link.json").symlink_to(tmp_path / "target")
    return contents(path, (p for p in path.rglob("*") if p.name not in seen_by_manifest(path)))


def seen_by_manifest(path) -> set[str]:
    return {row[0] for row in read_manifest(path)["files"]} | {"manifest.json", "manifest.sha256"}


def contents(path, files) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in files if p.is_file()}


def replace(path) -> None:
    write_sample(path, make_tensors(1))
    assert seed_of(path) == 1


def delete(path) -> None:
    publish.remove(path)
    assert not path.exists()


@pytest.mark.parametrize("way", [replace, delete])
def test_files_of_the_user_are_kept(tmp_path, replacing, way):
    path = write_sample(tmp_path / "last.ckpt")
    own = add_own_files(path, tmp_path)
    assert len(own) == 6
    kept = tmp_path / "last.ckpt.kept"
    with pytest.warns(UserWarning, match=r"model.safetensors.*They were kept, in .*last.ckpt.kept"):
        way(path)
    assert contents(kept, kept.rglob("*")) == own
    assert (kept / "link.json").is_symlink()
    assert hidden(tmp_path) == []


def test_files_of_the_user_are_kept_each_time(tmp_path):
    path = tmp_path / "last.ckpt"
    for i in range(3):
        write_sample(path, make_tensors(i))
        (path / "notes.txt").write_text(f"notes {i}")
        with pytest.warns(UserWarning, match="notes.txt"):
            write_sample(path, make_tensors(i))
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == ["last.ckpt", "last.ckpt.kept", "last.ckpt.kept-1", "last.ckpt.kept-2"]
    assert [(tmp_path / n / "notes.txt").read_text() for n in found[1:]] == [
        f"notes {i}" for i in range(3)
    ]


def test_files_of_the_user_are_kept_of_a_damaged_checkpoint(tmp_path):
    path = write_sample(tmp_path / "last.ckpt")
    (path / "manifest.json").write_text("{")
    (path / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="not part of the checkpoint: notes.txt"):
        replace(path)
    assert os.listdir(tmp_path / "last.ckpt.kept") == ["notes.txt"]


@pytest.mark.parametrize("way", ["", "publish.exchange = lambda a, b: False"])
def test_files_of_the_user_outlive_a_save_that_died(tmp_path, way):
    path = write_sample(tmp_path / "last.ckpt")
    (path / "notes.txt").write_text("mine")
    killed(path, BEFORE_DELETING.format(way=way))
    with pytest.warns(UserWarning, match="not part of the checkpoint: notes.txt"):
        write_sample(tmp_path / "another.ckpt", make_tensors(2))
    assert (tmp_path / "last.ckpt.kept" / "notes.txt").read_text() == "mine"
    assert seed_of(path) == 1
    assert hidden(tmp_path) == []


def test_a_read_only_checkpoint_is_not_replaced(tmp_path, monkeypatch):
    """The superuser, as whom tests may run, may write anywhere."""
    path = write_sample(tmp_path / "last.ckpt")
    monkeypatch.setattr(discard.os, "access", lambda p, mode: p != path)
    with pytest.raises(CheckpointError, match="last.ckpt is read-only"):
        write_sample(path, make_tensors(1))
    assert seed_of(path) == 0
    assert hidden(tmp_path) == []


def test_an_aborted_save_changes_nothing(tmp_path):
    path = write_sample(tmp_path / "last.ckpt")
    publication = Publication(path)
    (publication.directory / "weights_00000.safetensors").write_text("half")
    publication.abort()
    assert seed_of(path) == 0
    assert hidden(tmp_path) == []


def test_two_saves_to_one_name_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    first = Publication(path)
    with pytest.raises(CheckpointError, match=rf"being saved by another.*\"pid\": {os.getpid()}"):
        Publication(path)
    Publication(tmp_path / "other.ckpt").abort()
    assert first.directory.is_dir(), "another save took it for the remains of a dead one"
    first.abort()
    write_sample(path)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from checkpoint.samples import make_tensors, write_sample
from lightning_fastmoe.checkpoint import Publication
from lightning_fastmoe.checkpoint.format import publish
path = Path(sys.argv[1])
def stop(*args, **kwargs):
    print("here", flush=True)
    time.sleep(60)
{code}
"""


def killed(path, code) -> None:
    """Runs ``code`` in another process until it stops, and kills it there."""
    tests = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=tests, code=code), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
        child.wait(10)


WHILE_WRITING = "Publication(path).directory.joinpath('weights_00000.safetensors').touch(); stop()"
BETWEEN = """
publish.exchange = lambda a, b: False
rename = publish.os.rename
def renaming(a, b):
    if "saving" in str(a):
        stop()
    rename(a, b)
publish.os.rename = renaming
write_sample(path, make_tensors(1))
"""
BEFORE_DELETING = """
{way}
publish.discard = stop
write_sample(path, make_tensors(1))
"""


def test_a_save_that_died_is_never_seen_and_cleared_by_the_next(tmp_path):
    path = write_sample(tmp_path / "last.ckpt")
    killed(path, WHILE_WRITING)
    assert seed_of(path) == 0
    lock, saving = hidden(tmp_path)
    assert lock == ".last.ckpt.fastmoe-lock"
    assert saving.startswith(".last.ckpt.fastmoe-saving-")
    assert not is_checkpoint(tmp_path / saving)
    write_sample(tmp_path / "another.ckpt", make_tensors(2))
    assert hidden(tmp_path) == []
    assert seed_of(path) == 0


def test_a_save_that_died_between_two_renames_is_found(tmp_path):
    path = write_sample(tmp_path / "last.ckpt")
    killed(path, BETWEEN)
    assert not path.exists()
    assert seed_of(path) == 1  # the new one was complete
    write_sample(tmp_path / "another.ckpt", make_tensors(2))
    assert path.exists()
    assert seed_of(path) == 1
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("way", ["", "publish.exchange = lambda a, b: False"])
def test_a_save_that_died_before_deleting_the_older_one(tmp_path, way):
    path = write_sample(tmp_path / "last.ckpt")
    killed(path, BEFORE_DELETING.format(way=way))
    assert seed_of(path) == 1
    write_sample(path, make_tensors(2))
    assert seed_of(path) == 2
    assert hidden(tmp_path) == []


def test_there_is_always_one_while_it_is_replaced(tmp_path):
    """Another process looks all the time."""
    path = write_sample(tmp_path / "last.ckpt")
    code = """
for i in range(100000):
    write_sample(path, make_tensors(i % 3))
    if i == 0: print("here", flush=True)
"""
    tests = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=tests, code=code), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "here\n"
        end = time.monotonic() + 1.5
        looks = 0
        seen, errors = set(), set()
        while time.monotonic() < end:
            assert is_checkpoint(path)
            looks += 1
            try:
                seen.add(seed_of(path))
            except CheckpointError as error:
                errors.add("was replaced while" in str(error))
        child.kill()
        child.wait(10)
    assert looks > 50
    assert len(seen) > 1
    assert errors <= {True}
    assert seed_of(path) in (0, 1, 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("other", ["last.ckpt", "other.ckpt"])
def test_half_a_manifest_of_a_dead_save_is_nobodys_file(tmp_path, name, other):
    dead = tmp_path / f".{other}.fastmoe-saving-0123abcd"
    dead.mkdir()
    (dead / "rank_00000.json").write_bytes(b"{}")
    (dead / name).write_bytes(b'{"format": "lightning_fast')
    write_sample(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]
