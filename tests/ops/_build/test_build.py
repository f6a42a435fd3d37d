"""Finding and building the kernels, with a compiler that only pretends."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ops.toolkit import Machine, compilations, units

from lightning_fastmoe.errors import KernelsUnavailableError
from lightning_fastmoe.ops import _build, native
from lightning_fastmoe.ops._build.ahead import build_ahead
from lightning_fastmoe.ops._build.record import read_record


def built() -> Path:
    outcome = _build.build()
    assert (outcome.reason, outcome.state) == ("", "built")
    assert outcome.library is not None
    return outcome.library


def test_builds_once_and_finds_it_again(machine: Machine, capfd: pytest.CaptureFixture[str]):
    library = built()
    record = read_record(library)
    assert record is not None
    assert record.codes == ("sm_90a",)
    assert record.cuda == "13.0"
    assert record.torch == torch.__version__
    err = capfd.readouterr().err
    assert err.startswith("lightning_fastmoe: compiling CUDA kernels for sm_90a into")
    assert err.count("\n") == 1
    assert compilations(machine.calls()) == sorted(units())
    assert built() == library
    assert machine.calls() == []  # not even for its version
    assert capfd.readouterr().err == ""
    assert sorted(p.name for p in library.parent.iterdir()) == ["lock", "sm_90a.so"]
    (library.parent / "lock").unlink()
    assert built() == library
    assert [p.name for p in library.parent.iterdir()] == ["sm_90a.so"]  # it may be read-only


def test_another_process_without_nvcc_finds_it(machine: Machine):
    library = built()
    machine.uninstall()
    assert built() == library


def test_threads_that_start_together_build_once(machine: Machine):
    with ThreadPoolExecutor(4) as pool:
        outcomes = set(pool.map(lambda _: _build.build(), range(4)))
    assert len(outcomes) == 1
    assert compilations(machine.calls()) == sorted(units())


@pytest.mark.parametrize(
    ("compiled_for", "gpus", "found"),
    [
        ("8.0;9.0a", [(9, 0)], True),
        ("8.0;9.0", [(9, 0)], True),
        ("8.0;9.0a", [(8, 6)], True),
        ("8.0;9.0a", [(8, 0), (9, 0)], True),
        ("8.0;9.0a", [(10, 0)], False),
        ("8.0;9.0a", [(9, 0), (10, 0)], False),
        ("8.0;9.0a", [(8, 0), (7, 5)], False),
        ("8.0+PTX", [(9, 0)], False),  # nvcc is here and makes better code
    ],
)
def test_a_library_is_taken_if_it_serves_all_gpus(
    machine: Machine, compiled_for: str, gpus: list[tuple[int, int]], found: bool
):
    machine.has_gpus()
    ahead = build_ahead(compiled_for)
    machine.calls()
    machine.has_gpus(*gpus)
    library = built()
    assert (library == ahead.library) is found
    assert (machine.calls() == []) is found


def test_ptx_will_do_where_nothing_better_can_be_made(machine: Machine):
    ahead = build_ahead("8.0+PTX")
    machine.uninstall()
    assert built() == ahead.library


def test_ptx_will_do_where_the_user_wants_it(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    library = built()
    assert read_record(library).codes == ("sm_80", "compute_80")
    machine.calls()
    assert built() == library
    assert machine.calls() == []


def test_the_list_of_architectures_is_honoured(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    library = built()
    assert read_record(library).codes == ("sm_80", "sm_90a", "compute_90")
    command = next(call for call in machine.calls() if "sort.cu " in call)
    assert "-gencode=arch=compute_90a,code=sm_90a" in command
    assert "-DTORCH_TARGET_VERSION=0x020b" in command


def test_changed_sources_are_another_library(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    library = built()
    changed = machine.folder / "csrc"
    shutil.copytree(_build.SOURCES, changed)
    with (changed / "common.cuh").open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(_build, "SOURCES", changed)
    assert built() != library
    assert compilations(machine.calls()) == sorted(units() * 2)


def test_another_torch_takes_the_same_library_and_another_cuda_does_not(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    library = built()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    machine.has_gpus((9, 0), cuda="13.2")
    assert built() == library
    machine.has_gpus((9, 0), cuda="14.0")
    machine.install(release="14.1")
    assert built() != library


def test_max_jobs_limits_compilers_and_their_threads(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    action = 'mkdir "{0}" || echo overlap >> "{1}"; sleep 0.02; rmdir "{0}"'
    machine.install(action.format(machine.folder / "busy", machine.log))
    monkeypatch.setenv("MAX_JOBS", "1")
    built()
    calls = machine.calls()
    assert "overlap" not in calls
    assert not any("--threads" in call for call in calls)
    monkeypatch.setenv("MAX_JOBS", str(3 * len(units())))
    build_ahead("8.0;9.0a", force=True)
    assert sum("--threads=2" in call for call in machine.calls()) == len(units()) + 1


def test_a_failed_build_says_how_and_is_tried_again(machine: Machine):
    machine.install("echo 'no host compiler' >&2; exit 1")
    outcome = _build.build()
    assert outcome.library is None
    assert "no host compiler" in outcome.reason
    assert (_build.look().state, _build.look().reason) == ("failed", outcome.reason)
    machine.install()
    library = built()
    assert sorted(p.name for p in library.parent.iterdir()) == ["lock", "sm_90a.so"]


def test_a_full_disk_is_the_reason(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine.install('cat "$0" > /dev/full || exit 1')
    assert "No space left on device" in _build.build().reason
    machine.install()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    reason = _build.build().reason
    assert reason.startswith(f"the cache {machine.cache}")
    assert "No space left on device; set LIGHTNING_FASTMOE_CACHE to" in reason


def test_a_library_without_a_record_is_not_kept(machine: Machine):
    machine.install('for output; do :; done; echo empty > "$output"; exit 0')
    outcome = _build.build()
    assert "without its build record" in outcome.reason
    assert list(machine.cache.rglob("*.so")) == []


def test_damaged_libraries_are_passed_over(machine: Machine):
    library = built()
    library.write_bytes(b"")
    library.with_name("a.so").mkdir()
    machine.calls()
    assert built() == library
    assert compilations(machine.calls()) == sorted(units())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.setenv("LIGHTNING_FASTMOE_KERNELS", "0"), "switches them off"),
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "no CUDA device"),
        (lambda m: m.setattr(torch.version, "cuda", None), "built without CUDA"),
        (lambda m: m.setattr(torch.version, "cuda", "12.8"), "same major version"),
        (lambda m: m.setenv("TORCH_CUDA_ARCH_LIST", "Hopper"), "'Hopper'"),
        (
            lambda m: m.setenv("TORCH_CUDA_ARCH_LIST", "8.0"),
            "='8.0' doesn't cover a GPU of compute capability 9.0; add it, or unset",
        ),
        (lambda m: m.setattr(_build, "SOURCES", Path("nowhere")), "reinstall the package"),
        (lambda m: m.setenv("LIGHTNING_FASTMOE_CACHE", os.devnull + "/x"), "can't be written"),
        (lambda m: m.setenv("LIGHTNING_FASTMOE_CACHE", os.devnull + "/x"), "LIGHTNING_FASTMOE_CAC"),
        (lambda m: m.setenv("LIGHTNING_FASTMOE_CACHE", "/proc/x"), "can't be written"),
        (lambda m: m.setenv("CUDA_HOME", "/nowhere"), "there is no nvcc; install the CUDA toolkit"),
        (lambda m: m.setenv("MAX_JOBS", "many"), "MAX_JOBS='many' is invalid"),
        (lambda m: m.setenv("MAX_JOBS", "0"), "MAX_JOBS='0' is invalid"),
    ],
)
def test_without_a_library_the_reason_is_given_and_nothing_compiled(machine: Machine, monkeypatch: pytest.MonkeyPatch, change, reason: str):
    change(monkeypatch)
    outcome = _build.build()
    assert outcome.library is None
    assert reason in outcome.reason
    assert compilations(machine.calls()) == []


def test_looking_compiles_and_writes_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    assert _build.look().state == "not built"
    assert compilations(machine.calls()) == []
    assert not machine.cache.exists()
    library = built()
    assert _build.look() == _build.Build(library, "", "built")
    monkeypatch.setenv("LIGHTNING_FASTMOE_KERNELS", "0")
    assert _build.look().state == "off"


def test_looking_sees_that_the_cache_cannot_be_written(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LIGHTNING_FASTMOE_CACHE", os.devnull + "/x")
    outcome = _build.look()
    assert outcome.state == "unavailable"
    assert "can't be written" in outcome.reason


class TestPrebuilt:
    """A library that LIGHTNING_FASTMOE_LIBRARY names, or that is in the package's folder."""

    @pytest.fixture
    def library(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(_build, "PACKAGED", machine.folder / "package" / "kernels.so")
        library = build_ahead("9.0a", machine.folder / "elsewhere" / "mine.so").library
        machine.calls()
        return library

    def test_a_named_library_is_used_and_nothing_compiled(self, machine: Machine, library: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LIGHTNING_FASTMOE_LIBRARY", str(library))
        assert built() == library
        assert machine.calls() == []
        assert not machine.cache.exists()

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            (b"sources=", b"sources=0", "was built from other sources (0"),
            (b"cuda=13", b"cuda=12", "with CUDA 12.0"),
            (b"machine=linux", b"machine=haiku", "for haiku-"),
            (b"codes=sm_90a", b"codes=sm_80", "for sm_80, which does not run on a GPU of"),
            (b"lightning_fastmoe_build", b"", "has no build record"),
        ],
    )
    def test_named_but_of_another_kind(
        self,
        machine: Machine,
        library: Path,
        monkeypatch: pytest.MonkeyPatch,
        old: bytes,
        new: bytes,
        reason: str,
    ):
        content = library.read_bytes()
        assert old in content
        library.write_bytes(content.replace(old, new))
        monkeypatch.setenv("LIGHTNING_FASTMOE_LIBRARY", str(library))
        outcome = _build.build()
        assert outcome.library is None
        assert reason in outcome.reason
        assert str(library) in outcome.reason
        assert machine.calls() == []  # nothing takes its place unasked

    def test_named_but_missing(self, machine: Machine, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LIGHTNING_FASTMOE_LIBRARY", "/nowhere.so")
        assert "No such file or directory: '/nowhere.so'" in _build.build().reason

    def test_a_packaged_library_is_used_and_nothing_compiled(self, machine: Machine, library: Path):
        _build.PACKAGED.parent.mkdir()
        shutil.copy(library, _build.PACKAGED)
        assert built() == _build.PACKAGED
        assert machine.calls() == []

    def test_packaged_for_other_gpus(self, machine: Machine, library: Path):
        _build.PACKAGED.parent.mkdir()
        shutil.copy(library, _build.PACKAGED)
        machine.has_gpus((10, 0))
        assert built().parent.parent == machine.cache
        machine.has_gpus((12, 0))
        machine.uninstall()
        reason = _build.build().reason
        assert "there is no nvcc" in reason
        assert f"{_build.PACKAGED} is not used: it was built for sm_90a" in reason


    @pytest.mark.parametrize("packaged", [True, False])
    def test_of_other_sources(self, machine: Machine, library: Path, packaged: bool):
        """In the package, or copied into the cache by hand."""
        file = _build.PACKAGED
        if not packaged:
            file = built().with_name("a.so")
            file.with_name("sm_90a.so").unlink()
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(library.read_bytes().replace(b"sources=", b"sources=0"))
        assert built() != file


class TestAhead:
    def test_without_a_gpu_architectures_are_required(self, machine: Machine):
        machine.has_gpus()
        with pytest.raises(KernelsUnavailableError, match="no GPU was found .* --arch '8.0;9.0a'"):
            build_ahead()

    @pytest.mark.parametrize("cuda", ["13.0", None])
    def test_an_image_builder_without_a_gpu(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch, cuda: str | None
    ):
        """And with a torch that has CUDA, or has not."""
        machine.has_gpus(cuda=cuda)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
        ahead = build_ahead()
        assert ahead.compiled
        assert ahead.record.codes == ("sm_80", "sm_90a")
        machine.uninstall()
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
        machine.has_gpus((9, 0))
        assert built() == ahead.library

    def test_by_default_for_the_gpus_here(self, machine: Machine):
        machine.has_gpus((8, 6), (9, 0))
        assert build_ahead().record.codes == ("sm_86", "sm_90a")

    def test_what_is_there_is_not_compiled_again(self, machine: Machine):
        first = build_ahead("8.0;9.0a")
        machine.calls()
        machine.uninstall()
        for text in ("8.0;9.0a", "9.0", "9.0a 8.0"):
            again = build_ahead(text)
            assert (again.library, again.compiled) == (first.library, False)
        machine.install()
        assert build_ahead("8.6").compiled  # sm_80 would serve it, but was not asked for
        machine.calls()
        in_use = machine.folder / "in_use"  # by a process that has mapped it
        in_use.hardlink_to(first.library)
        forced = build_ahead("8.0;9.0a", force=True)
        assert (forced.library, forced.compiled) == (first.library, True)
        assert not forced.library.samefile(in_use)
        assert compilations(machine.calls()) == sorted(units())

    def test_into_a_folder_and_a_file(self, machine: Machine):
        folder = machine.folder / "out"
        folder.mkdir()
        assert build_ahead("9.0a", folder).library == folder / "kernels.so"
        file = machine.folder / "new" / "my.so"
        assert build_ahead("9.0a", file).compiled
        assert not build_ahead("9.0a", file).compiled
        assert build_ahead("8.0", file).record.codes == ("sm_80",)
        assert [p.name for p in folder.iterdir()] == ["kernels.so"]
        assert [p.name for p in file.parent.iterdir()] == ["my.so"]
        assert not machine.cache.exists()

    def test_a_failure_for_one_list_is_not_that_of_another(self, machine: Machine):
        machine.install("exit 1")
        with pytest.raises(KernelsUnavailableError, match="this failed"):
            build_ahead("7.5")
        assert _build.look().state == "not built"


class TestLoading:
    @pytest.fixture(autouse=True)
    def _anew(self):
        for function in (native.load, native._load):
            function.cache_clear()
        yield
        for function in (native.load, native._load):
            function.cache_clear()

    def test_one_warning_without_a_compiler(self, machine: Machine):
        machine.uninstall()
        with pytest.warns(UserWarning, match="PyTorch's operators.*no nvcc; install") as caught:
            assert native.load() is None
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.load() is None
            assert "no nvcc" in native.unavailable_reason()

    def test_what_cannot_be_loaded_is_a_warning_too(self, machine: Machine):
        library = built()  # text, to the loader
        with pytest.warns(UserWarning, match=f"{library} can't be loaded: .*--force"):
            assert native.load() is None

    @pytest.mark.parametrize(
        ("name", "value"), [("LIGHTNING_FASTMOE_KERNELS", "0"), ("LOCAL_RANK", "1")]
    )
    def test_where_a_warning_would_be_noise_there_is_none(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ):
        machine.uninstall()
        monkeypatch.setenv(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.load() is None
        assert native.unavailable_reason() != ""

    def test_the_layer_computes_without_a_compiler(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ):
        """As on a GPU whose kernels can't be had: the operators are asked for, and absent."""
        from lightning_fastmoe.ops import order_by_expert

        machine.uninstall()
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        ids = torch.tensor([[1, 0], [1, 2]])
        with pytest.warns(UserWarning, match="PyTorch's operators"):
            order = order_by_expert(ids, 3)
        assert order.tokens_per_expert.tolist() == [1, 2, 1]
