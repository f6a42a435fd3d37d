"""The blocks of README.md and docs/*.md run as written, and in the order of the page.

A block that can't run here in a second says why in a comment on the line before it::

    <!-- not run: needs 8 GPUs -->

Its names, its syntax, and the arguments of the commands in it are checked all the same.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_fastmoe import cli
from lightning_fastmoe.cli.table import COMMANDS, PROGRAM, TRAINING
from lightning_fastmoe.demos.byte_lm import cli as lm_cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^((?:<!--[^\n]*-->\n)?)```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n")
RUN = "runs/tiny_lm/checkpoints/last.ckpt"

SMALL_RUN = f"""
model: {{d_model: 16, num_layers: 1, d_ffn: 16, num_experts: 4}}
data: {{path: README.md, seq_len: 16, batch_size: 2, max_val_windows: 2}}
trainer:
  devices: 1
  max_steps: 2
  log_every_n_steps: 1
  val_check_interval: 2
  callbacks:
  - class_path: lightning_fastmoe.ExpertLoadMonitor
  - class_path: pytorch_lightning.callbacks.ModelCheckpoint
    init_args: {{dirpath: {Path(RUN).parent}, save_last: true, every_n_train_steps: 2}}
"""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start(2)) + 1,
            found[2],
            found[3],
            runs=NOT_RUN.fullmatch(found[1]) is None,
        )
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def commands_in(block: Block) -> Iterator[list[str]]:
    """The words of each command of ``lightning-fastmoe`` in a bash block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if PROGRAM in words:
            words = words[words.index(PROGRAM) + 1 :]
            ends = [i for i, word in enumerate(words) if word in ("|", "&&", ";")]
            yield words[: min(ends, default=len(words))]


def test_blocks_are_found() -> None:
    assert {block.page for block in BLOCKS} >= {PAGES[0], ROOT / "docs" / "getting_started.md"}
    assert {block.language for block in BLOCKS} >= {"python", "bash", "yaml", "json"}
    assert sum(block.runs for block in BLOCKS) > len(BLOCKS) / 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_is_defined_on_the_page(page: Path) -> None:
    defined = set(dir(builtins))
    for block in blocks_of(page):
        if block.language != "python":
            continue
        nodes = list(ast.walk(ast.parse(block.text, str(block))))
        for node in nodes:
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    defined.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    defined.add(name)
                case ast.alias(name=name, asname=other):
                    defined.add(other or name.split(".")[0])
        used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used - defined == set(), block


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(b.language == "python" for b in blocks_of(p))],
    ids=lambda page: page.name,
)
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python" and block.runs:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, namespace)  # noqa: S102 - our own pages


class _Parsed(Exception):
    pass


def check_training(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds what is told to LightningCLI to the signatures, and builds nothing."""

    def stop(self: object) -> None:
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [PROGRAM])
        patch.setattr(lm_cli.FastMoECLI, "instantiate_classes", stop)
        with pytest.raises(_Parsed):
            cli.main(words)


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(block.text)
    if isinstance(content, list):
        content = {"trainer": {"callbacks": content}}
    file = tmp_path / "block.yaml"
    file.write_text(yaml.safe_dump(content))
    check_training(["fit", f"--config={file}"], monkeypatch)


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_bash_is_well_formed(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    bash = ["bash", "-n", "-c", block.text]
    done = subprocess.run(bash, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for script in re.findall(r"\bpython (\S+/\S+\.py)", block.text):
        assert (ROOT / script).is_file()
    monkeypatch.chdir(ROOT)
    for words in commands_in(block):
        name, *arguments = words
        if "--print_config" in arguments:
            arguments.remove("--print_config")
        if name in TRAINING:
            check_training([name, *arguments], monkeypatch)
        elif not name.startswith("-"):
            parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
            importlib.import_module(COMMANDS[name].module).add_arguments(parser)
            parser.parse_args(arguments)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with examples/ where `fit` ran for two steps on one process."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("examples", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "small.yaml").write_text(SMALL_RUN)
    command = [sys.executable, "-m", "lightning_fastmoe.cli", "fit"]
    command += ["--config=examples/tiny_lm.yaml", "--config=small.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("block", [block for block in of("bash") if block.runs], ids=str)
def test_bash(
    block: Block,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is not training, which `fit` did before on a smaller model, runs as it stands."""
    (tmp_path / "runs").symlink_to(run_folder / "runs")
    monkeypatch.chdir(tmp_path)
    for words in commands_in(block):
        if words[0] not in TRAINING:
            assert cli.main(words) == 0, capsys.readouterr().err
