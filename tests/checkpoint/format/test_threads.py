"""Several files at once: the same bytes, the first error for all, and little memory."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint.samples import fragments_of, make_manifest, make_tensors, small_files

from lightning_fastmoe.checkpoint import CheckpointReader, OwnedFragment, Publication
from lightning_fastmoe.checkpoint.format import hashing, layout, safetensors_stream
from lightning_fastmoe.checkpoint.format import reader as reader_module
from lightning_fastmoe.checkpoint.format.threads import MAX_THREADS, run_all, thread_count
from lightning_fastmoe.checkpoint.format.writer import write_manifest, write_rank
from lightning_fastmoe.checkpoint.sources.directory import assign_files
from lightning_fastmoe.errors import CheckpointError

STEP = 1000


@pytest.fixture
def small(monkeypatch):
    """As if a kilobyte were much."""
    monkeypatch.setattr(layout, "MIN_FILE_BYTES", 8 * STEP)
    monkeypatch.setattr(layout, "_WHOLE", STEP)
    for module in (safetensors_stream, hashing, reader_module):
        monkeypatch.setattr(module, "BUFFER_BYTES", 512)


def large_tensors() -> dict[str, torch.Tensor]:
    tensors = make_tensors()
    tensors["weights/large"] = torch.randn(5003)
    tensors["weights/half"] = torch.randn(7001).to(torch.bfloat16)
    tensors["optimizer/exp_avg/large"] = torch.randn(5003)
    return tensors


def write(path: Path, threads: int, max_files: int = 8, ranks: int = 2) -> Path:
    publication = Publication(path)
    torch.manual_seed(0)
    written = [
        write_rank(
            publication.directory,
            rank,
            fragments,
            small_files(rank),
            max_files=max_files,
            threads=threads,
        )
        for rank, fragments in enumerate(fragments_of(large_tensors(), ranks))
    ]
    write_manifest(publication.directory, make_manifest(), written)
    publication.commit()
    return path


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# ------------------------------------------------------------------------------------- same bytes


def test_bytes_are_the_same_whatever_the_number_of_threads(tmp_path, small):
    one = content(write(tmp_path / "one.ckpt", 1))
    assert sum(name.startswith("weights_00000_") for name in one) > 1
    for threads in (2, 8):
        assert content(write(tmp_path / f"{threads}.ckpt", threads)) == one


@pytest.mark.parametrize("max_files", [1, 2, 3, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_divided_comes_back_whole(tmp_path, small, max_files, threads):
    path = write(tmp_path / "a.ckpt", threads, max_files)
    torch.manual_seed(0)
    seen: list[int] = []
    with CheckpointReader(path) as reader:
        reader.threads = threads
        reader.verify(on_bytes=seen.append)
        assert sum(seen) == sum(record.size for record in reader.manifest.files.values())
        for name, tensor in large_tensors().items():
            assert torch.equal(reader.read(name), tensor), name
        for name, record in reader.manifest.files.items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == record.sha256


def test_files_are_few_and_about_equally_large(small):
    data = torch.zeros(100_003)
    names = ("weights/a", "optimizer/exp_avg/a", "optimizer/exp_avg_sq/a")
    fragments = [OwnedFragment.of(name, data.shape, 0, data) for name in names]
    for limit in (1, 2, 4, 8):
        files = layout.divide(fragments, 3, limit)
        assert max(2, limit) <= len(files) <= limit + 1
        sizes = [sum(fragment.size for fragment in own) for own in files.values()]
        assert sum(sizes) == sum(fragment.size for fragment in fragments)
        if limit > 2:
            assert max(sizes) <= 1.6 * min(sizes)
    assert list(layout.divide(fragments, 3, 1)) == [
        "weights_00003.safetensors",
        "optimizer_00003.safetensors",
    ]
    assert layout.files_per_rank(1) == layout.files_per_rank(128) == 8
    assert [layout.files_per_rank(n) for n in (256, 1000, 5000)] == [4, 1, 1]


# ------------------------------------------------------------------------------------------- errors


def test_the_first_error_stops_the_other_writers_and_names_its_file(tmp_path, small):
    write_all, calls, lock = safetensors_stream.files.write_all, [0], threading.Lock()

    def failing(fd: int, view: memoryview) -> None:
        with lock:
            calls[0] += 1
            if calls[0] == 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(0.002)
        write_all(fd, view)

    tensors = {"weights/large": torch.zeros(100_000)}
    (fragments,) = fragments_of(tensors, 1)
    with (
        mock.patch.object(safetensors_stream.files, "write_all", failing),
        pytest.raises(OSError, match=r"No space left.*weights_00000_\d.safetensors"),
    ):
        write_rank(tmp_path, 0, fragments, max_files=8, threads=4)
    assert calls[0] < 100, "the others went on to their ends"  # all of it: 790 writes
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_a_flipped_bit_in_any_of_many_files_is_found(tmp_path, small):
    path = write(tmp_path / "a.ckpt", 2)
    for file in sorted(path.glob("*.safetensors")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with CheckpointReader(path) as reader:
            reader.threads = 4
            with pytest.raises(CheckpointError, match=f"{file.name} is damaged.*tensor '"):
                reader.verify()
        file.write_bytes(whole)


def test_a_file_that_ends_early_is_noticed_by_parallel_reads(tmp_path, small):
    path = write(tmp_path / "a.ckpt", 2, max_files=1, ranks=1)
    with CheckpointReader(path) as reader:
        reader.threads = 4
        reader.read("weights/large")
        os.truncate(path / "weights_00000.safetensors", 9000)
        with pytest.raises(CheckpointError, match="weights_00000.safetensors ends at byte"):
            reader.read("weights/large")


# ----------------------------------------------------------------------------------- jobs and files


def test_jobs_return_in_order_and_at_most_so_many_run():
    running, most, lock = 0, 0, threading.Lock()

    def job(i: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return i

    jobs = [lambda report, i=i: job(i) for i in range(12)]
    assert run_all(jobs, 3) == list(range(12))
    assert most == 3
    assert run_all([], 3) == []


def test_threads_are_this_ranks_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert [thread_count(n) for n in (1, 2, 4, 8, 16)] == [MAX_THREADS, 8, 4, 2, 2]


def test_each_rank_verifies_what_it_will_read_unless_that_is_uneven():
    names = {
        f"{k}_{r:05d}{p}.safetensors": 100
        for k in ("weights", "optimizer")
        for r in range(3)
        for p in ("_0", "_1")
    } | {"state.json": 5}
    own = assign_files(names, 3, 3)
    assert all(
        f"_{rank:05d}_" in name or name == "state.json" for rank in range(3) for name in own[rank]
    )
    for world, saved, sizes in (
        (2, 3, names),
        (3, 3, names | {"weights_00000_0.safetensors": 900}),
    ):
        parts = assign_files(sizes, world, saved)
        assert sorted(n for part in parts for n in part) == sorted(sizes)
        loads = [sum(sizes[n] for n in part) for part in parts]
        assert max(loads) <= max(max(sizes.values()), 1.2 * sum(loads) / world)


# ------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from lightning_fastmoe.checkpoint import OwnedFragment
from lightning_fastmoe.checkpoint.format.writer import write_rank

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

data = torch.ones(150_000_000)
before = peak()
fragment = OwnedFragment.of("weights/a", data.shape, 0, data)
written = write_rank(Path(sys.argv[1]), 0, [fragment], max_files=8, threads=8)
print(len(written.files), peak() - before)
"""


def test_eight_writers_need_little_memory(tmp_path):
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    files, extra = map(int, done.stdout.split()[-2:])
    assert files == 8
    assert extra < 100_000_000
