"""Paths and dotted names that the pages mention exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from website.build import ROOT, pages

PAGES = [page for page in pages() if page.name != "kernel_log.md"]
"""All but the log, which tells of files as they were."""
FOLDERS = "lightning_fastmoe|tests|docs|csrc|benchmarks|examples|dev"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]+)`")
NAME = re.compile(r"\blightning_fastmoe(?:\.[A-Za-z_]\w*)+")
MADE = {"lightning_fastmoe/kernels.so"}
"""What a reader makes, and the repository does not have."""
FORMATS = {"lightning_fastmoe.checkpoint", "lightning_fastmoe.expert_load"}
"""Values of ``format`` in files, which look like names."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        if "NAME" not in path and path not in MADE:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_dotted_names_can_be_imported(page: Path) -> None:
    for name in set(NAME.findall(page.read_text(encoding="utf-8"))) - FORMATS:
        parts = name.split(".")
        found = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)
