"""Lists of architectures, and which GPUs they serve."""

from __future__ import annotations

import pytest

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops._build.architectures import (
    NATIVE,
    NOTHING,
    PTX,
    codes_of_gpus,
    codes_of_list,
    flags_of,
    least_service,
    service,
    unserved,
)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("", []),
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("8.0 8.6,9.0 ; 8.0", ["sm_80", "sm_86", "sm_90a"]),
        ("9.0+PTX", ["sm_90a", "compute_90"]),
        ("9.0a+PTX", ["sm_90a", "compute_90a"]),
        ("10.0 10.3a 12.0f+PTX", ["sm_100", "sm_103a", "sm_120f", "compute_120f"]),
    ],
)
def test_a_list_gives_each_architecture_once(text: str, codes: list[str]) -> None:
    assert codes_of_list(text, "x") == codes


@pytest.mark.parametrize("name", ["Hopper", "90", "9.0b", "9.0+ptx", "sm_90", "9."])
def test_what_is_no_architecture(name: str) -> None:
    with pytest.raises(KernelsUnavailableError, match=r"TORCH_X='8\.0;.*write '8\.0;9\.0a\+PTX'"):
        codes_of_list(f"8.0;{name}", "TORCH_X")


def test_gpus_get_all_that_they_can_do() -> None:
    assert codes_of_gpus([(9, 0), (8, 6), (9, 0)]) == ["sm_86", "sm_90a"]
    assert codes_of_gpus([(12, 1), (10, 3)]) == ["sm_103a", "sm_121a"]
    assert codes_of_gpus([]) == []


def test_code_and_ptx_get_their_compiler_flags() -> None:
    assert flags_of(["sm_80", "sm_90a", "compute_90"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("code", "capability", "expected"),
    [
        ("sm_80", (8, 0), NATIVE),
        ("sm_80", (8, 9), NATIVE),
        ("sm_89", (8, 6), NOTHING),
        ("sm_80", (9, 0), NOTHING),
        ("sm_80", (8, 7), NOTHING),  # a Tegra
        ("sm_87", (8, 7), NATIVE),
        ("sm_87", (8, 9), NOTHING),
        ("sm_90a", (9, 0), NATIVE),
        ("sm_90a", (10, 0), NOTHING),
        ("sm_100a", (10, 3), NOTHING),
        ("sm_100", (10, 3), NATIVE),
        ("sm_100f", (10, 3), NATIVE),
        ("sm_103f", (10, 0), NOTHING),
        ("sm_100f", (12, 0), NOTHING),
        ("sm_120", (12, 1), NATIVE),
        ("compute_80", (9, 0), PTX),
        ("compute_80", (8, 0), PTX),
        ("compute_80", (12, 0), PTX),
        ("compute_90", (8, 9), NOTHING),
        ("compute_90a", (9, 0), PTX),
        ("compute_90a", (10, 0), NOTHING),
        ("compute_100f", (10, 3), PTX),
        ("compute_100f", (12, 0), NOTHING),
        ("nonsense", (9, 0), NOTHING),
    ],
)
def test_code_serves_the_gpus_that_can_run_it(code: str, capability: tuple[int, int], expected: int) -> None:
    assert service([code], capability) == expected


def test_the_best_code_counts_and_the_worst_gpu() -> None:
    codes = ["sm_80", "compute_80"]
    assert service(codes, (8, 6)) == NATIVE
    assert least_service(codes, [(8, 6), (9, 0)]) == PTX
    assert least_service(codes, [(8, 6), (7, 5)]) == NOTHING
    assert unserved(codes, [(8, 6), (9, 0)]) == ""
    assert unserved(codes, [(8, 6), (7, 5), (7, 0)]) == "7.5"
