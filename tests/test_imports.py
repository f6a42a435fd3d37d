"""What each import loads, and that the strategy's names are there without loading the strategy."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_fastmoe
from lightning_fastmoe import registration
from lightning_fastmoe.errors import ConfigError, ForeignObjectError
from lightning_fastmoe.registration import VARIANTS, ForeignPackageWarning

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    path
    for folder in ("tests", "benchmarks", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "build" not in path.parts
]
ABSENT_ON_PURPOSE = {
    "test_imports.py": ["lightning_fastmoe.nonsense"],
    "test_former_paths.py": ["lightning_fastmoe.lm.nope"],
}

STAGES = """
import sys

def loaded(*names):
    return [name for name in names if name in sys.modules]

HEAVY = ("torch", "torchmetrics", "transformers", "pytorch_lightning", "deepspeed", "jsonargparse")
import lightning_fastmoe
assert loaded(*HEAVY) == [], loaded(*HEAVY)
import lightning_fastmoe.ops
assert loaded(*HEAVY) == ["torch"], loaded(*HEAVY)
from lightning_fastmoe import MoE, moe_losses
assert loaded(*HEAVY) == ["torch"], loaded(*HEAVY)
assert MoE.__module__ == "lightning_fastmoe.nn.moe"

import pytorch_lightning as pl
from pytorch_lightning.strategies import StrategyRegistry
names = [name for name in StrategyRegistry.available_strategies() if name.startswith("fastmoe")]
assert len(names) == 8, names
assert loaded("deepspeed", "lightning_fastmoe.strategy", "lightning_fastmoe.callbacks") == []
strategy = StrategyRegistry.get("fastmoe_stage_3")
assert type(strategy) is lightning_fastmoe.FastMoEStrategy
assert strategy.config["zero_optimization"]["stage"] == 3
assert type(StrategyRegistry.get("fastmoe_offload")) is lightning_fastmoe.OffloadStrategy
assert type(StrategyRegistry.get("fastmoe_offload_ddp")) is lightning_fastmoe.OffloadDDPStrategy
from lightning_fastmoe import *
assert ExpertLoadMonitor.__module__ == "lightning_fastmoe.monitoring.callbacks.expert_load"
"""


def test_each_import_loads_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGES], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match=r"'lightning_fastmoe' has no attribute 'nonsense'"):
        _ = lightning_fastmoe.nonsense
    with pytest.raises(ImportError, match="nonsense"):
        from lightning_fastmoe import nonsense  # noqa: F401


def _named(module: str, name: str) -> object:
    """What ``from module import name`` gives."""
    found = importlib.import_module(module)
    return (
        getattr(found, name)
        if hasattr(found, name)
        else importlib.import_module(f"{module}.{name}")
    )


def absent_names(source: str) -> list[str]:
    """The absent ones among the package's names that a program imports or looks up in modules.

    Much of what is read here runs on a GPU alone, where a name that moved would be noticed late.
    """
    tree = ast.parse(source)
    absent, modules = [], {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        if node.module.split(".")[0] != "lightning_fastmoe":
            continue
        for name in node.names:
            try:
                found = _named(node.module, name.name)
            except (AttributeError, ImportError):
                absent.append(f"{node.module}.{name.name}")
            else:
                if inspect.ismodule(found):
                    modules[name.asname or name.name] = found
    looked_up = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for name, attribute in sorted(looked_up):
        if name in modules and not hasattr(modules[name], attribute):
            absent.append(f"{modules[name].__name__}.{attribute}")
    return absent


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: str(file.relative_to(ROOT)))
def test_programs_import_what_is_there(file: Path) -> None:
    absent = absent_names(file.read_text(encoding="utf-8"))
    assert absent == ABSENT_ON_PURPOSE.get(file.name, [])


def test_absent_names_are_found() -> None:
    source = "from lightning_fastmoe.ops import gone, kernels\nkernels.nowhere\nkernels.sort"
    absent = ["lightning_fastmoe.ops.gone", "lightning_fastmoe.ops.kernels.nowhere"]
    assert absent_names(source + "\nimport torch.gone") == [
        *absent,
        "lightning_fastmoe.ops.kernels.sort",
    ]


def test_all_names_can_be_listed_and_loaded() -> None:
    assert set(lightning_fastmoe.__all__) < set(dir(lightning_fastmoe))
    for name in lightning_fastmoe.__all__:
        assert getattr(lightning_fastmoe, name).__name__ == name
    for name in ("nn", "ops", "callbacks", "checkpoint", "metrics", "strategy", "errors"):
        assert getattr(lightning_fastmoe, name) is sys.modules[f"lightning_fastmoe.{name}"]


@pytest.mark.parametrize("name", ["fastmoe_stage2", "fastmoe_2", "FastMoE-stage-2"])
def test_an_unknown_name_lists_ours(name: str) -> None:
    import pytorch_lightning as pl

    with pytest.raises(ConfigError) as raised:
        pl.Trainer(strategy=name, accelerator="cpu", devices=1, logger=False)
    for known in (name.lower(), *VARIANTS, "FastMoEStrategy"):
        assert known in str(raised.value)


def test_other_unknown_names_stay_lightnings() -> None:
    import pytorch_lightning as pl

    with pytest.raises(ValueError, match="invalid strategy name") as raised:
        pl.Trainer(strategy="dpp", accelerator="cpu", devices=1, logger=False)
    assert not isinstance(raised.value, ConfigError)


REGISTRY = """
from lightning_fabric.strategies.registry import _StrategyRegistry
StrategyRegistry = _StrategyRegistry()
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for the package ``lightning``, with nothing but a registry of strategies."""
    folder = tmp_path / "lightning" / "pytorch"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("from lightning.pytorch import strategies\n")
    (folder / "__init__.py").write_text("")
    (folder / "strategies.py").write_text(REGISTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        del sys.modules[name]


@pytest.mark.parametrize("order", ["before us", "after us"])
def test_the_other_lightning_is_named_once(
    order: str, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, registration._Watcher)]

    def load_both() -> None:
        if order == "before us":
            importlib.import_module("lightning")
        registration.register_with_lightning(lambda **_: None)
        importlib.import_module("lightning")

    with pytest.warns(ForeignPackageWarning, match="import pytorch_lightning as pl") as caught:
        load_both()
    assert len(caught) == 1
    registry = sys.modules["lightning.pytorch.strategies"].StrategyRegistry
    assert registry.available_strategies() == list(VARIANTS)
    with pytest.raises(ForeignObjectError, match="can't be mixed"):
        registry.get("fastmoe_stage_2")


def test_an_import_that_fails_may_be_tried_again(foreign: Path) -> None:
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, registration._Watcher)]
    registration.register_with_lightning(lambda **_: None)
    file = foreign / "lightning" / "pytorch" / "strategies.py"
    file.write_text("raise RuntimeError('once')\n")
    with pytest.raises(RuntimeError, match="once"):
        importlib.import_module("lightning")
    file.write_text(REGISTRY + "# whole\n")
    importlib.invalidate_caches()
    with pytest.warns(ForeignPackageWarning):
        importlib.import_module("lightning")
