"""The blocks of README.md, docs/*.md and the pages beside them run as written, in their order.

A block that can't run here in a second says why in a comment on the line before it::

    <!-- not run: needs 8 GPUs -->

Its names, its syntax, and the commands in it are checked all the same: ``commands.py`` knows which
there are, and holds their arguments to the parsers that will read them.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from website.build import pages

from docs import commands
from lightning_fastmoe import cli
from lightning_fastmoe.cli.table import PROGRAM, TRAINING

ROOT = Path(__file__).parents[2]
PAGES = list(pages())
LANGUAGES = {"python", "bash", "yaml", "json", "dockerfile", "text"}
FENCE = re.compile(r"^((?:<!--[^\n]*-->\n)?)```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n")
VARIABLE = re.compile(r"\bLIGHTNING_FASTMOE_[A-Z_]+\b")
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
        return f"{self.page.relative_to(ROOT)}:{self.line}"


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


def test_blocks_are_found() -> None:
    assert {block.page for block in BLOCKS} >= {
        ROOT / "README.md",
        ROOT / "docs" / "getting_started.md",
    }
    assert {block.language for block in BLOCKS} == LANGUAGES
    assert sum(block.runs for block in BLOCKS) > len(BLOCKS) / 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python" and block.runs:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, namespace)  # noqa: S102 - our own pages


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_blocks_configure_a_training_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(block.text)
    if isinstance(content, list):
        content = {"trainer": {"callbacks": content}}
    file = tmp_path / "block.yaml"
    file.write_text(yaml.safe_dump(content))
    commands.check_training(["fit", f"--config={file}"], monkeypatch)


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_blocks_parse(block: Block) -> None:
    """One value, or one on each line."""
    whole = not re.search(r"\}\n\{", block.text)
    for text in [block.text] if whole else block.text.splitlines():
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_bash_is_well_formed(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    bash = ["bash", "-n", "-c", block.text]
    done = subprocess.run(bash, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(ROOT)
    for words in commands.of_script(block.text):
        commands.check(words, monkeypatch, runs=block.runs)


@pytest.mark.parametrize("block", of("dockerfile"), ids=str)
def test_dockerfile_blocks_run_commands_that_exist(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in block.text.splitlines():
        instruction, _, rest = line.partition(" ")
        assert instruction in ("ENV", "RUN")
        if instruction == "RUN":
            for words in commands.of_script(rest):
                commands.check(words, monkeypatch, runs=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT)
    for found in re.findall(r"`((?:lightning-fastmoe|make) [^`\n]+)`", text):
        commands.check_mention(shlex.split(found), monkeypatch)


def test_environment_variables_exist() -> None:
    folders = (ROOT / "lightning_fastmoe", ROOT / "csrc", ROOT / "tests")
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in commands.SOURCES]
    known = set(VARIABLE.findall(" ".join(f.read_text(encoding="utf-8") for f in files)))
    for page in PAGES:
        assert set(VARIABLE.findall(page.read_text(encoding="utf-8"))) <= known, page


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
def test_bash_blocks_run(
    block: Block,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is not training, which `fit` did before on a smaller model, runs as it stands."""
    (tmp_path / "runs").symlink_to(run_folder / "runs")
    monkeypatch.chdir(tmp_path)
    for program, *words in commands.of_script(block.text):
        if program == PROGRAM and words[0] not in TRAINING:
            assert cli.main(words) == 0, capsys.readouterr().err
