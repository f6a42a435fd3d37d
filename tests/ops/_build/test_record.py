"""What a library says about itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_fastmoe.ops._build.record import Key, Record, hash_sources, read_record

RECORD = Record("0123456789abcdef", "13.0", "linux-x86_64", ("sm_80", "sm_90a"), "2.13.0+cpu")
KEY = Key("0123456789abcdef", "13", "linux-x86_64")


def test_it_is_found_among_other_bytes(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(b"\x7fELF\0lightning_fastmoe_build\0" + RECORD.source().encode() + b"\xff{}")
    assert read_record(library) == RECORD


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF and so on",
        b"lightning_fastmoe_build{sources=1;cuda=13.0}",
        b"lightning_fastmoe_build{}",
        RECORD.source().replace(";torch", ";colour=red;torch").encode(),
        RECORD.source().encode()[: RECORD.source().index(";torch")],
    ],
)
def test_a_file_without_a_record_reads_as_none(tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(content)
    assert read_record(library) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sources": "f" * 16}, "other sources (ffffffffffffffff)"),
        ({"cuda": "12.8"}, "CUDA 12.8, and torch here is of CUDA 13"),
        ({"machine": "linux-aarch64"}, "for linux-aarch64, and this is linux-x86_64"),
        ({"codes": ("sm_80", "sm_100a")}, "sm_80, sm_100a, which does not run on a GPU of compute"),
    ],
)
def test_a_record_that_does_not_fit_is_objected_to(changed: dict, reason: str) -> None:
    gpus = [(8, 0), (9, 0)]
    assert reason in replace(RECORD, **changed).objection(KEY, gpus)


@pytest.mark.parametrize("changed", [{}, {"cuda": "13.2"}, {"torch": "2.11.0"}])
def test_other_minor_versions_are_not_objected_to(changed: dict) -> None:
    assert replace(RECORD, **changed).objection(KEY, [(8, 6), (9, 0)]) == ""


def test_names_contents_and_flags_are_hashed(tmp_path: Path) -> None:
    def hash_of(name: str, content: str, *flags: str) -> str:
        file = tmp_path / name
        file.write_text(content)
        return hash_sources([file], flags)

    base = hash_of("a.cu", "x", "-O3")
    assert hash_of("a.cu", "x", "-O3") == base
    others = {
        hash_of("b.cu", "x", "-O3"),
        hash_of("a.cu", "y", "-O3"),
        hash_of("a.cu", "x", "-O2"),
        hash_of("a.cu", "x", "-O", "3"),
    }
    assert len(others | {base}) == 5
