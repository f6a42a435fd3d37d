"""Imports point one way, no file imports itself by way of others, and files stay short.

    errors <- ops, checkpoint/format, monitoring/logs <- nn, monitoring/report
        <- distributed, inference, planning, monitoring/metrics
        <- checkpoint, checkpoint/sources <- zero <- strategy
        <- checkpoint/tools, monitoring/callbacks <- huggingface, callbacks, metrics
        <- demos <- cli

An import counts wherever it stands: at the top, inside a function, under TYPE_CHECKING, or as a
constant string given to ``import_module``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "lightning_fastmoe"
TESTS = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 400

LEVELS = {
    "errors": 0,
    "argument_types": 1,
    "former_paths": 1,
    "lightning_loaders": 1,
    "registration": 1,
    "ops": 1,
    "checkpoint/format": 1,
    "monitoring": 1,
    "monitoring/logs": 1,
    "nn": 2,
    "monitoring/report": 2,
    "distributed": 3,
    "inference": 3,
    "planning": 3,
    "monitoring/metrics": 3,
    "checkpoint": 4,
    "checkpoint/sources": 4,
    "zero": 5,
    "strategy": 6,
    "checkpoint/tools": 7,
    "monitoring/callbacks": 7,
    "huggingface": 8,
    "huggingface/causal_lm": 8,
    "callbacks": 8,
    "metrics": 8,
    "demos": 9,
    "testing": 9,
    "lm": 10,
    "cli": 10,
}
"""A component, which is a folder or a file, may import those of lower levels, and its own level."""

INIT = "__init__"
"""The package's own __init__.py: what users import. It may import everything but ``testing``."""

LIGHTNING = {"pytorch_lightning", "lightning_fabric", "lightning"}
MAY_IMPORT_LIGHTNING = {
    "strategy",
    "monitoring/callbacks",
    "callbacks",
    "demos",
    "huggingface/causal_lm",
    INIT,
}
MAY_IMPORT_DEEPSPEED = {"zero"}
MAY_IMPORT_ONLY = {
    "ops": {"torch"},
    "checkpoint/format": {"numpy", "torch"},
    "monitoring/logs": set(),
    "monitoring/report": {"tensorboard"},
}
"""What else than the standard library components know that are to know little."""

STARTS_AT_ONCE = {"cli"}
"""What is imported before a command's arguments are checked: the standard library alone."""


def component_of(path: str) -> str:
    """``ops`` for ``ops/routing.py``, ``cli`` for ``cli.py``, ``__init__`` for ``__init__.py``.

    The longest of LEVELS that ``path`` begins with, or its first part where it has no level.
    """
    parts = path.removesuffix(".py").split("/")
    starts = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((start for start in starts if start in LEVELS), parts[0])


def imported_modules(path: str, nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import among ``nodes``, parts of PACKAGE/``path``.

    ``from a import b`` yields ``a.b``: b may be a module, and the first parts decide anyway.
    """
    parents = [PACKAGE, *path.split("/")[:-1]]
    for node in nodes:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=module, names=names, level=level):
                base = parents[: len(parents) - level + 1] if level else []
                base = [*base, *([module] if module else [])]
                for alias in names:
                    yield node.lineno, ".".join([*base, alias.name])
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a module that run when it is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_at_import(child)


def late_imports(path: str, source: str) -> Iterator[str]:
    """Imports, where a command has to start at once, of what may take a second to import."""
    if component_of(path) not in STARTS_AT_ONCE:
        return
    for line, module in imported_modules(path, run_at_import(ast.parse(source))):
        top, *rest = module.split(".")
        own = top == PACKAGE and rest and rest[0] in {*STARTS_AT_ONCE, "errors", "__version__"}
        if top not in sys.stdlib_module_names and not own:
            yield f"{path}:{line}: {module}: import it in a function, so that help comes at once"


def rule_broken_by(component: str, module: str) -> str | None:
    """The rule that ``component`` breaks by importing ``module``, None if it breaks none."""
    top, *rest = module.split(".")
    if top != PACKAGE:
        if top in LIGHTNING and component not in MAY_IMPORT_LIGHTNING:
            return f"only {', '.join(sorted(MAY_IMPORT_LIGHTNING))} may import Lightning"
        if top == "deepspeed" and component not in MAY_IMPORT_DEEPSPEED:
            return f"only {', '.join(sorted(MAY_IMPORT_DEEPSPEED))} may import deepspeed"
        allowed = MAY_IMPORT_ONLY.get(component)
        if allowed is not None and top not in allowed | sys.stdlib_module_names:
            names = " and ".join([*sorted(allowed), "the standard library"])
            return f"{component} imports {names} only"
        return None
    target = component_of("/".join(rest)) if rest else INIT
    if target == "testing" and component != "testing":
        return "testing is for tests"
    if component == INIT or target == "__version__":
        return None
    if target not in LEVELS:
        return "inside the package, import from its components, not from the package itself"
    if LEVELS[target] > LEVELS[component]:
        return f"{component} may not import {target}: imports point the other way"
    return None


def violations(path: str, source: str) -> list[str]:
    """One line for each rule broken by ``source``, the text of PACKAGE/``path``."""
    component = component_of(path)
    if component != INIT and component not in LEVELS:
        return [f"{path}: {component} has no place in LEVELS; give it one"]
    found = [
        f"{path}:{line}: {module}: {rule}"
        for line, module in imported_modules(path, ast.walk(ast.parse(source)))
        if (rule := rule_broken_by(component, module))
    ]
    found += late_imports(path, source)
    if (length := len(source.splitlines())) > MAX_LINES:
        found.append(f"{path}: {length} lines, more than {MAX_LINES}; split it")
    return found


def file_of(module: str, files: Iterable[str]) -> str | None:
    """The file that a dotted name of the package is in: the longest start of it that is one."""
    parts = module.split(".")[1:]
    for count in range(len(parts), -1, -1):
        start = "/".join(parts[:count])
        for path in (f"{start}.py", f"{start}/__init__.py".lstrip("/")):
            if path in files:
                return path
    return None


def import_cycles(sources: Mapping[str, str]) -> list[str]:
    """The shortest circle of imports through each file that has one, as ``a.py -> b.py -> a.py``.

    That a module's packages are imported before it doesn't count: no file says so.

    Args:
        sources: path inside the package -> text, of all files.
    """
    graph = {
        path: {
            target
            for _, module in imported_modules(path, ast.walk(ast.parse(source)))
            if module.split(".")[0] == PACKAGE and (target := file_of(module, sources))
        }
        - {path}
        for path, source in sources.items()
    }
    found: dict[frozenset[str], str] = {}
    for start in sorted(graph):
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop(0)
            if start in graph[way[-1]]:
                found.setdefault(frozenset(way), " -> ".join([*way, start]))
                break
            ways += [[*way, target] for target in sorted(graph[way[-1]] - seen)]
            seen |= graph[way[-1]]
    return list(found.values())


def test_the_package_is_where_the_test_looks():
    assert ROOT / "__init__.py" in FILES
    assert len({component_of(file.relative_to(ROOT).as_posix()) for file in FILES}) > 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_file_keeps_the_rules(file: Path):
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) == []


def test_no_file_imports_itself_by_way_of_others():
    sources = {f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8") for f in FILES}
    assert import_cycles(sources) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        pytest.param(
            {"a.py": "from .b import x", "b.py": "if TYPE_CHECKING:\n    from .a import y"},
            ["a.py -> b.py -> a.py"],
            id="types",
        ),
        pytest.param(
            {
                "n/a.py": "from lightning_fastmoe.n import b",
                "n/b.py": "def f():\n    import lightning_fastmoe.n.c",
                "n/c.py": "import_module('lightning_fastmoe.n.a')",
                "d.py": "from .n.a import x",
            },
            ["n/a.py -> n/b.py -> n/c.py -> n/a.py"],
            id="three",
        ),
        pytest.param(
            {"n/__init__.py": "from .a import x", "n/a.py": "from lightning_fastmoe.n import y"},
            ["n/__init__.py -> n/a.py -> n/__init__.py"],
            id="package",
        ),
        pytest.param(
            {"__init__.py": "from .a import x", "a.py": "from lightning_fastmoe import x"},
            ["__init__.py -> a.py -> __init__.py"],
            id="root",
        ),
        pytest.param(
            {
                "n/__init__.py": "from .a import x\nfrom .b import y",
                "n/a.py": "from lightning_fastmoe.n.b import y",
                "n/b.py": "import torch",
            },
            [],
            id="siblings",
        ),
    ],
)
def test_cycles_are_found(sources: dict[str, str], expected: list[str]):
    assert import_cycles(sources) == expected


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param("ops/a.py", "from lightning_fastmoe.nn.moe import MoE", id="upward"),
        pytest.param("ops/a.py", "import lightning_fastmoe.nn", id="upward-plain"),
        pytest.param("ops/a.py", "from ..nn import MoE", id="upward-relative"),
        pytest.param("nn/router/a.py", "from ...strategy import x", id="upward-relative-deep"),
        pytest.param("nn/a.py", "from lightning_fastmoe import distributed", id="from-package"),
        pytest.param("nn/a.py", "from lightning_fastmoe import MoE", id="name-of-package"),
        pytest.param("lm/a.py", "from .. import FastMoEStrategy", id="name-of-package-relative"),
        pytest.param("errors.py", "from lightning_fastmoe.ops import top_k", id="errors"),
        pytest.param("strategy/a.py", "import lightning_fastmoe.callbacks.a", id="callbacks"),
        pytest.param("nn/a.py", "def f():\n    from ..checkpoint import save", id="in-function"),
        pytest.param("ops/a.py", "import numpy as np", id="ops-third-party"),
        pytest.param("ops/a.py", "import importlib\nimportlib.import_module('einops')", id="late"),
        pytest.param("nn/a.py", "import pytorch_lightning as pl", id="nn-lightning"),
        pytest.param("metrics.py", "from lightning_fabric import Fabric", id="metrics-fabric"),
        pytest.param("huggingface/a.py", "import pytorch_lightning", id="converters-lightning"),
        pytest.param("monitoring/metrics/a.py", "import pytorch_lightning", id="room-lightning"),
        pytest.param("checkpoint/a.py", "import deepspeed", id="checkpoint-deepspeed"),
        pytest.param("checkpoint/format/a.py", "import safetensors", id="format-third-party"),
        pytest.param("checkpoint/format/a.py", "from ..save import write", id="format-upward"),
        pytest.param("checkpoint/format/a.py", "from ...nn import MoE", id="format-model"),
        pytest.param("checkpoint/a.py", "from .tools.diff import compare", id="tools-in-runs"),
        pytest.param("monitoring/logs/a.py", "import torch", id="logs-third-party"),
        pytest.param("distributed/a.py", "from deepspeed import comm", id="distributed-deepspeed"),
        pytest.param("callbacks/a.py", "import deepspeed", id="callbacks-deepspeed"),
        pytest.param("strategy/a.py", "from ..testing import spawn", id="testing"),
        pytest.param("__init__.py", "import lightning_fastmoe.testing", id="testing-in-init"),
        pytest.param("utils.py", "import torch", id="component-without-place"),
        pytest.param("cli/entry.py", "from ..demos.byte_lm.cli import run", id="cli-slow-start"),
        pytest.param("cli/a.py", "import torch", id="command-slow-start"),
        pytest.param("cli/a.py", "from lightning_fastmoe.ops import x", id="command-ops"),
        pytest.param("cli/a.py", "def run():\n    import deepspeed", id="command-deepspeed"),
        pytest.param("ops/a.py", "x = 1\n" * (MAX_LINES + 1), id="long-file"),
    ],
)
def test_checker_flags(path: str, source: str):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param("ops/a.py", "import math\nimport torch", id="ops"),
        pytest.param(
            "ops/a.py", "from ..errors import ShapeError\nfrom .b import c", id="downward"
        ),
        pytest.param("nn/router/__init__.py", "from . import losses", id="own-component"),
        pytest.param(
            "demos/a.py", "import pytorch_lightning\nfrom ..metrics import x", id="own-level"
        ),
        pytest.param("cli/entry.py", "from lightning_fastmoe import __version__", id="version"),
        pytest.param("strategy/a.py", "import lightning_fabric", id="strategy"),
        pytest.param("zero/state.py", "from deepspeed.runtime import zero", id="zero"),
        pytest.param("cli/a.py", "def run(a):\n    import torch", id="command-late"),
        pytest.param("cli/a.py", "if TYPE_CHECKING:\n    import torch", id="command-types"),
        pytest.param("cli/a.py", "from ..errors import ConfigError", id="command-errors"),
        pytest.param("testing/a.py", "from lightning_fastmoe.strategy import x", id="testing"),
        pytest.param("__init__.py", "from lightning_fastmoe.cli import main", id="init"),
        pytest.param("ops/a.py", "x = 1\n" * MAX_LINES, id="longest-file"),
    ],
)
def test_checker_lets_pass(path: str, source: str):
    assert violations(path, source) == []


def imports_of_tests(source: str) -> list[str]:
    """The test files that a test imports: what two of them need has a file of its own."""
    names = (name for _, name in imported_modules("tests.py", ast.walk(ast.parse(source))))
    return [name for name in names if any(part.startswith("test_") for part in name.split("."))]


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda f: f.stem)
def test_no_test_imports_a_test(file: Path):
    assert imports_of_tests(file.read_text(encoding="utf-8")) == []


def test_imports_of_tests_are_found():
    source = "from strategy.test_exactness import assert_close\n"
    source += "import gpu.closeness\nfrom a import test_b"
    assert imports_of_tests(source) == ["strategy.test_exactness.assert_close", "a.test_b"]
